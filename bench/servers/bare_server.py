"""The kernel's limit: one `send` per event and client, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket

import control
import event

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3


def frame(payload: bytes) -> bytes:
    size = len(payload)
    return b"\x81" + (bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")) + payload


def event_frame(number: int, offset: int | None = None, longer: int = 0) -> bytes:
    """With an offset as clients get it that can recover (docs/websocket-api.md, Reconnecting)."""
    said: list[object] = ["message:new", event.message(number, longer)]
    if offset is not None:
        said.append(base64.urlsafe_b64encode(offset.to_bytes(3, "big")).decode())
    return frame(b"42" + json.dumps(said, separators=(",", ":")).encode())


async def welcome(client: socket.socket, clients: list[socket.socket]) -> None:
    """As little of HTTP, Engine.IO and Socket.IO as gets a client subscribed."""
    loop = asyncio.get_running_loop()
    request = await loop.sock_recv(client, 4096)
    key = re.search(rb"Sec-WebSocket-Key: (\S+)", request)
    assert key is not None
    accept = base64.b64encode(hashlib.sha1(key[1] + MAGIC).digest())
    await loop.sock_sendall(
        client,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n" + frame(b'0{"sid":"x"}'),
    )
    await loop.sock_recv(client, 4096)
    await loop.sock_sendall(client, frame(b'40{"sid":"x"}'))
    await loop.sock_recv(client, 4096)
    await loop.sock_sendall(client, frame(b'430[{"ok":true}]'))
    clients.append(client)


async def accept_all(listener: socket.socket, clients: list[socket.socket]) -> None:
    tasks = set()
    while True:
        client, _ = await asyncio.get_running_loop().sock_accept(listener)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.create_task(welcome(client, clients))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def serve() -> None:
    clients: list[socket.socket] = []

    async def send_to_all(number: int) -> None:
        data = event_frame(number)
        behind = []
        for client in clients:
            try:
                client.send(data)
            except BlockingIOError:
                behind.append(client)
        for client in behind:
            await asyncio.get_running_loop().sock_sendall(client, data)

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(accept_all(listener, clients))
        port = listener.getsockname()[1]
        await control.obey(port, send_to_all, lambda: {"sockets": len(clients)})
        accepting.cancel()


if __name__ == "__main__":
    asyncio.run(serve())
