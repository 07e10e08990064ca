"""Many WebSocket clients in one process: raw sockets, one epoll, and no parsing but a comparison.

All clients of a room get the same bytes, and which bytes is known beforehand. So each client is
only a position in the expected stream: every byte is checked, order included, at the speed of
memcmp. Connecting follows RFC 6455, Engine.IO v4 and Socket.IO v5 as the stock client does.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jwt

sys.path.insert(0, str(Path(__file__).parent / "servers"))

import bare_server
import event

READ_BYTES = 1 << 18
TOKEN = jwt.encode(
    {"discordId": "1", "access": True, "role": "ADMIN", "exp": int(time.time()) + 86_400},
    event.SECRET,
    algorithm="HS256",
)
REQUEST = (
    b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def masked(payload: bytes) -> bytes:
    """A client's text frame; a mask of zeros is one too (RFC 6455 §5.3), and costs nothing."""
    size = len(payload)
    head = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return b"\x81" + head + b"\0\0\0\0" + payload


def connect(recover: bool) -> bytes:
    return masked(b"40" + json.dumps({"token": TOKEN, "recover": recover}).encode())


SUBSCRIBE = masked(b'420["subscribe:guild","%s"]' % event.GUILD.encode())


def steps_of(recover: bool) -> list[tuple[bytes, bytes]]:
    """What is sent, and what has to come before the next step."""
    answer = b'"session"' if recover else b"40{"
    return [(REQUEST, b'0{"sid"'), (connect(recover), answer), (SUBSCRIBE, b'430[{"ok":true')]


FRAME_BYTES = len(bare_server.event_frame(0))


class BrokenError(Exception):
    """A client got other bytes than it should have, none in time, or lost its connection."""


class Client:
    """One connection: how far it has come in connecting, then in the stream of events."""

    __slots__ = ("buffer", "position", "socket", "step")

    def __init__(self, port: int, host: str) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if host != "127.0.0.1":
            self.socket.bind((host, 0))
        self.socket.connect_ex(("127.0.0.1", port))
        self.step = -1
        self.buffer = b""
        self.position = 0  # bytes of events received


class Load:
    """All clients of one server; its events are numbered from 0.

    One that stays `awake` asks the kernel again and again instead of sleeping until something has
    come: to wake a sleeper up is work for who sends, and comes and goes as the two fall in step.
    """

    def __init__(
        self, port: int, *, awake: bool = False, recover: bool = False, longer: bool = False
    ) -> None:
        """With `recover` each event has its offset, and the number of the first is `first_offset`;
        its payload can be `longer` by as many bytes.
        """
        self._port = port
        self._recover = recover
        self.first_offset = 0
        self._longer = event.OFFSET_BYTES if longer else 0
        self.frame_bytes = len(self._frame(0))
        self._awake = awake
        self._epoll = select.epoll()
        self.clients: dict[int, Client] = {}
        self._expected = b""

    # -- connecting

    def connect(self, count: int, at_once: int = 100, subscribed: bool = True) -> float:
        """Connect (and subscribe) so many clients; returns the seconds that it took."""
        steps = steps_of(self._recover)[: 3 if subscribed else 2]
        start = time.perf_counter()
        goal, begun, done = count, 0, 0
        while done < goal:
            while begun < goal and begun - done < at_once:
                self._begin(f"127.0.0.{1 + (len(self.clients) // 20_000)}")
                begun += 1
            for client in self.ready(10.0):
                done += self._advance(client, steps)
        return time.perf_counter() - start

    def _begin(self, host: str) -> None:
        client = Client(self._port, host)
        number = client.socket.fileno()
        self.clients[number] = client
        self._epoll.register(number, select.EPOLLIN | select.EPOLLOUT)

    def _advance(self, client: Client, steps: list[tuple[bytes, bytes]]) -> bool:
        """Take the next step if its answer has come; returns whether it was the last."""
        if client.step < 0:
            self._epoll.modify(client.socket.fileno(), select.EPOLLIN)
            client.socket.send(steps[0][0])
            client.step = 0
            return False
        data = client.socket.recv(READ_BYTES)
        if not data:
            raise BrokenError(f"refused in step {client.step}: {client.buffer!r}")
        if client.step == len(steps):
            return False  # what plugins tell a new subscriber
        client.buffer += data
        if steps[client.step][1] not in client.buffer:
            return False
        client.step += 1
        client.buffer = b""
        if client.step == len(steps):
            return True
        client.socket.send(steps[client.step][0])
        return False

    # -- receiving

    def expect(self, count: int) -> None:
        """Make ready for the events with numbers below `count`."""
        have = len(self._expected) // self.frame_bytes
        self._expected += b"".join(map(self._frame, range(have, count)))

    def _frame(self, number: int) -> bytes:
        offset = self.first_offset + number if self._recover else None
        return bare_server.event_frame(number, offset, self._longer)

    def receive(self, upto: int, timeout: float = 120.0) -> tuple[float, float]:
        """Read until every client has had event `upto - 1`; returns when the first and last byte came."""
        first = last = 0.0
        for client, _ in self.progress(upto, timeout):
            last = time.monotonic()
            first = first or last
            del client
        return first, last

    def progress(self, upto: int, timeout: float = 120.0) -> Iterator[tuple[Client, int]]:
        """As `receive`, but tells of each read: the client, and its position before."""
        goal, deadline = upto * self.frame_bytes, time.monotonic() + timeout
        missing = sum(client.position < goal for client in self.clients.values())
        while missing:
            if time.monotonic() > deadline:
                raise BrokenError(f"{missing} clients wait for event {upto - 1}")
            for client in self.ready(1.0):
                before = client.position
                self._read(client)
                missing -= before < goal <= client.position
                yield client, before

    def _read(self, client: Client) -> None:
        data = client.socket.recv(READ_BYTES)
        if not data:
            raise BrokenError(f"closed after {client.position // self.frame_bytes} events")
        if not self._expected.startswith(data, client.position):
            raise BrokenError(f"other bytes than expected after {client.position}: {data[:300]!r}")
        client.position += len(data)

    def ready(self, timeout: float) -> Iterator[Client]:
        """Those that have something to read, or are connected."""
        deadline = time.monotonic() + timeout
        while not (found := self._epoll.poll(0 if self._awake else timeout, 1024)):
            if time.monotonic() > deadline:
                break
        for number, _ in found:
            yield self.clients[number]

    # -- the end

    def close(self) -> None:
        """Close all connections; the next ones count events from 0 only on a new server."""
        for client in self.clients.values():
            client.socket.close()
        self.clients.clear()
