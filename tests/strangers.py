"""Strangers who never authenticate, in a process of their own: python strangers.py PORT WAY SECONDS."""

from __future__ import annotations

import asyncio
import sys
import time

WEBSOCKET = (
    "GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Version: 13\r\n{header}"
)
POLL = "GET /socket.io/?EIO=4&transport=polling HTTP/1.1\r\nHost: x\r\n{header}\r\n"

COUNT = 1_000
PAUSE = 5.0
"""Seconds between two things that one stranger does: 200 a second in all."""
OPEN = WEBSOCKET.format(query="", header="") + "\r\n"
POLLING = POLL.format(header="")
POST = "POST /socket.io/?EIO=4&transport=polling&sid=x HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"


def frame(text: str, opcode: int = 1) -> bytes:
    """A masked WebSocket frame; the mask is zero."""
    data = text.encode()
    return bytes([0x80 | opcode, 0x80 | len(data), 0, 0, 0, 0]) + data


#: What each says first, and then again and again.
WAYS: dict[str, tuple[str, bytes]] = {
    "silent": ("", b""),
    "slow headers": ("GET /socket.io/ HTTP/1.1\r\n", b"X-A: b\r\n"),
    "slow body": (POST, b"x"),
    "half a handshake": (WEBSOCKET.format(query="", header=""), b""),
    "OPTIONS": ("", b"OPTIONS /socket.io/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    "polls": (POLLING, POLLING.encode()),
    "upgrades": (WEBSOCKET.format(query="&sid=x", header="") + "\r\n", b""),
    "CONNECT": (OPEN, frame('40{"token":"a.b.c"}')),
    "pings": (OPEN, frame("", 9) + frame("2") + frame("3")),
    "out of descriptors": ("", b""),
}


async def flood(port: int, way: str, number: int, until: float) -> None:
    """One stranger, who comes again whenever it is thrown out."""
    first, more = WAYS[way]
    address = f"127.{1 + number % 200}.{number // 200}.1"
    await asyncio.sleep(number / COUNT * PAUSE)
    while time.monotonic() < until:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
            writer.write(first.encode())
            while time.monotonic() < until and not writer.transport.is_closing():
                writer.write(more)
                await asyncio.sleep(PAUSE)
            writer.close()
        except OSError:
            await asyncio.sleep(PAUSE)


async def main(port: int, way: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    await asyncio.gather(*(flood(port, way, number, until) for number in range(COUNT)))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
