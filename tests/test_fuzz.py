"""Nonsense of every kind, against a server in a process of its own.

    FUZZ_SECONDS=600 FUZZ_SEED=7 make test ARGS="-k fuzz"

Every byte comes from the seed; a run that fails names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import jwt
import pytest
from service import SECRET, Service, running, tables_for, viewer_token, write_settings
from waiting import eventually

SECONDS = float(os.environ.get("FUZZ_SECONDS", "6"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
FUZZERS = 8
HEAD = "Host: x\r\nX-Forwarded-For: 10.{}.{}.1\r\n"
UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
PATH = "/socket.io/?EIO=4&transport="
PACKETS = (
    '420["guilds:list"]',
    '421["subscribe:guild","1"]',
    '42["unsubscribe:guild",{"a":[1,null,true]}]',
    '422["auth:refresh","x"]',
    '42["connect",{}]',
    '42/admin,5["*","x"]',
    '40{"token":"x"}',
    "40/n,{}",
    "41",
    "430[]",
    "431[1]",
    '44{"message":"x"}',
    '451-["x",{"_placeholder":true,"num":0}]',
    '452-3["x",{"_placeholder":true,"num":7}]',
    "461-0[]",
    "2probe",
    "3",
    "5",
    "6",
    "1",
    "0{}",
    "bAAECAw==",
    '42["' + "[" * 2_000,
    "42" + "[" * 5_000 + "]" * 5_000,
    '42["\\ud800","\\u202e"]',
    "42" + "9" * 5_000,
    '4299999999999999999999["x"]',
    '42[1e999,-0,NaN,"' + "9" * 400 + '"]',
    "é\x00\ufeff",
    "",
)
CLAIMS = (
    (
        "discordId",
        ["1", "", "0", "007", "٣", "9" * 30, 1, None, [], {}, "x" * 3000, "\n", "\ud800"],
    ),
    ("access", [True, False, 1, "true", None]),
    ("role", ["USER", "ADMIN", "BANNED", "KING", None, 1, ["ADMIN"], {}]),
    ("exp", [2**33, 0, -1, 1e300, 10**400, True, "1", "soon", None, [], float("nan"), 2**33 + 0.5]),
    ("guilds", [[], ["1"], "1", [1], None, [[]], {}, ["x"] * 300]),
    ("nbf", [0, 2**33, "x", None]),
    ("aud", ["x", [], None, 1]),
)


class Fuzzer:
    """One source of nonsense, and its way to the server."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self.random = random.Random(seed)
        self.done = 0

    async def run(self, until: float) -> None:
        ways: list[Callable[[], Awaitable[None]]] = [
            self.bytes,
            self.requests,
            self.frames,
            self.packets,
            self.polls,
            self.tokens,
        ]
        while time.monotonic() < until:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self.random.choice(ways)()
            self.done += 1

    # -- what is sent

    def mutated(self, data: bytes) -> bytes:
        """Bytes changed, cut out, doubled or put in, a few times."""
        found = bytearray(data)
        for _ in range(self.random.choice((0, 1, 1, 2, 5, 20))):
            at = self.random.randrange(len(found) + 1)
            match self.random.randrange(4):
                case 0:
                    found[at : at + 1] = self.random.randbytes(1)
                case 1:
                    del found[at : at + self.random.randrange(1, 9)]
                case 2:
                    found[at:at] = found[at : at + self.random.randrange(1, 40)]
                case _:
                    found[at:at] = self.random.choice((b"\0", b"[", b'"', b"\r\n", b"\xff", b"-"))
        return bytes(found)

    def head(self) -> str:
        return HEAD.format(self.random.randrange(250), self.random.randrange(4))

    def frame(self, payload: bytes, opcode: int = 1, start: int = 0x80) -> bytes:
        size = len(payload)
        length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + struct.pack("!H", size)
        return bytes((start | opcode,)) + length + b"\0\0\0\0" + payload

    def packet(self) -> bytes:
        packet = self.random.choice(PACKETS).encode("utf-8", "surrogatepass")
        return self.mutated(packet) if self.random.random() < 0.7 else packet

    def token(self) -> str:
        claims = {name: self.random.choice(values) for name, values in CLAIMS}
        for name in self.random.sample(list(claims), self.random.randrange(5)):
            del claims[name]
        with contextlib.suppress(UnicodeError):
            token = jwt.encode(claims, SECRET, algorithm="HS256")
            mutate = self.random.random() < 0.4
            return self.mutated(token.encode()).decode("latin-1") if mutate else token
        return "x"

    # -- how it is sent

    async def _talk(self, *parts: bytes, patience: float = 0.05) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(reader.read(100_000), patience)
            return b""
        finally:
            writer.close()

    async def bytes(self) -> None:
        await self._talk(self.random.randbytes(self.random.randrange(2_000)), patience=0.01)

    async def requests(self) -> None:
        method = self.random.choice(("GET", "POST", "OPTIONS", "HEAD", "PUT", "PRI", "get"))
        query = self.random.choice(
            ("polling", "websocket", "x&sid=%ff", "polling&sid=x", "polling&j=x", "polling&sid=")
        )
        extra = self.random.choice(
            (
                "",
                UPGRADE,
                "Origin: \xff\r\n",
                "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 3\r\n",
                "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\n",
                "Transfer-Encoding: chunked\r\n",
                "Expect: 100-continue\r\nContent-Length: 99999999999\r\n",
                "Content-Length: -1\r\n",
            )
        )
        text = f"{method} {PATH}{query} HTTP/1.1\r\n{self.head()}{extra}\r\nabc"
        await self._talk(self.mutated(text.encode("latin-1")), patience=0.02)

    def _websocket(self) -> bytes:
        return f"GET {PATH}websocket HTTP/1.1\r\n{self.head()}{UPGRADE}\r\n".encode()

    def _connect(self) -> bytes:
        return b"40" + json.dumps({"token": viewer_token()}).encode()

    async def frames(self) -> None:
        frames = [self.frame(self._connect())]
        for _ in range(self.random.randrange(1, 8)):
            opcode = self.random.choice((0, 1, 1, 2, 8, 9, 10, 3, 15))
            start = self.random.choice((0x80, 0x80, 0, 0xC0, 0xF0))
            frames.append(self.mutated(self.frame(self.packet()[:2_000], opcode, start)))
        await self._talk(self._websocket(), *frames)

    async def packets(self) -> None:
        frames = [self.frame(self._connect())] if self.random.random() < 0.8 else []
        frames += [
            self.frame(self.packet()[:16_000], self.random.choice((1, 1, 1, 2)))
            for _ in range(self.random.randrange(1, 30))
        ]
        await self._talk(self._websocket(), *frames)

    async def polls(self) -> None:
        head = self.head()
        answer = await self._talk(f"GET {PATH}polling HTTP/1.1\r\n{head}\r\n".encode(), patience=1)
        found = re.search(rb'"sid":"([^"]+)"', answer)
        path = PATH + "polling&sid=" + (found[1].decode() if found else "x")
        bodies = [self._connect() if self.random.random() < 0.8 else self.packet()]
        bodies += [
            b"\x1e".join(self.packet() for _ in range(self.random.randrange(1, 20)))[:16_000]
            for _ in range(3)
        ]
        posts = [
            f"POST {path} HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            for body in bodies
        ]
        poll = f"GET {path} HTTP/1.1\r\n{head}\r\n".encode()
        await asyncio.gather(self._talk(*posts), self._talk(poll), return_exceptions=True)

    async def tokens(self) -> None:
        connect = b"40" + json.dumps({"token": self.token()}).encode()
        await self._talk(self._websocket(), self.frame(connect[:16_000]))


def resident(service: Service) -> float:
    """MB of memory that the process holds."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


async def is_empty(service: Service) -> bool:
    """Whether nobody is left; pollers go with the heartbeat."""
    figures = (await service.get("/metrics")).body.decode()
    names = ("connections", "dashboards", "rooms")
    return all(f"\nspywatcher_{name} 0.0\n" in figures for name in names)


async def fuzz(service: Service, seconds: float, seed: int) -> int:
    until = time.monotonic() + seconds
    fuzzers = [Fuzzer(service.port, seed * 1_000 + n) for n in range(FUZZERS)]
    await asyncio.gather(*(fuzzer.run(until) for fuzzer in fuzzers))
    return sum(fuzzer.done for fuzzer in fuzzers)


@pytest.fixture
async def service(tmp_path, discord, guild):
    limits = {"block_after": 1_000_000, "connections_per_viewer": 5_000}
    tables = tables_for(
        discord,
        auth={"secret": SECRET, "connect_timeout": 1.0},
        limits={"connections_per_ip": 5_000, "attempts_per_ip": "100000/minute", **limits},
        heartbeat={"interval": 1.0, "timeout": 1.0},
        plugins={"folders": [str(tmp_path)]},
    )
    write_settings(tmp_path, tables)
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        yield service


async def test_nonsense_makes_no_exception_and_leaves_nothing_behind(service, js):
    folder = f"/proc/{service.process.pid}/fd"
    files = len(os.listdir(folder))
    await fuzz(service, min(3.0, SECONDS / 4), SEED + 1)  # what is kept for all has been made now
    memory = resident(service)
    rounds = await fuzz(service, SECONDS, SEED)
    await eventually(lambda: len(os.listdir(folder)) <= files + 2)
    grown = resident(service) - memory
    print(f"{rounds} rounds of seed {SEED}, {grown:+.1f} MB")
    await eventually(lambda: is_empty(service))
    bad = re.findall(r".*(?:Traceback|ERROR|WARNING|CRITICAL|Warning).*", service.output)
    assert bad == [], f"seed {SEED}"
    assert grown < 20, f"seed {SEED}"
    assert (await js.connect(service.url, token=viewer_token())).id
