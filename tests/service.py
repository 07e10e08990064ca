"""The server as tests have it: its settings, and how it runs.

In this process, where a test looks into it (`watching.py` puts a guild and dashboards around it):

    async with server_for(discord) as server: ...

In a process of its own, as an operator runs it:

    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path) as service:
        await service.get("/health/ready")
        service.process.send_signal(signal.SIGTERM)
        assert await service.exit_status() == 0

That process works in a folder that holds nothing but a config.toml (and what the test put there);
`Systemd` stands for what else runs it.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from waiting import within

from simulator import PretendDiscord
from spywatcher import Keys, Server, Tokens, node_type, parse_settings

ROOT = Path(__file__).parent.parent
#: 32 bytes and more, as PyJWT asks for HS256.
SECRET = "a secret that nobody but the tests knows"
#: Where relative paths of `server_for` start; a new folder for each test.
FOLDER = ROOT
#: Seconds that a process may take to start on a busy machine.
START = 60.0

#: For tests whose clients all come from one address.
CROWD: dict[str, Any] = {"connections_per_ip": 5000, "attempts_per_ip": "100000/minute"}
Tables = dict[str, dict[str, Any]]

#: What systemd does between fork and exec: the socket becomes descriptor 3, and the process is named.
HAND_OVER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
    " os.execv(sys.argv[2], sys.argv[2:])"
)


def plain_tables(discord: PretendDiscord) -> Tables:
    """Tables of config.toml for a server on a free port in front of `discord`, all else by default.

    On a machine as busy as tests make it a stop and a plugin may take longer than an operator waits.
    """
    return {
        "server": {"port": 0, "shutdown_grace": 20.0},
        "plugins": {"handler_timeout": 20.0},
        "auth": {"secret": SECRET},
        "discord": {"token": discord.token, "rest_url": discord.rest_url, "startup_grace": 0.0},
    }


def tables_for(discord: PretendDiscord, /, **more: dict[str, Any]) -> Tables:
    """The same with room for a crowd, and `more` over it, key by key."""
    return merged(plain_tables(discord) | {"limits": CROWD}, more)


def merged(tables: Tables, more: Tables) -> Tables:
    """TOML tables, those of `more` key by key over those of `tables`."""
    return tables | {name: tables.get(name, {}) | table for name, table in more.items()}


def write_settings(folder: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """A config.toml of these tables; JSON's strings, numbers and lists are TOML's too."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()]
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text("\n".join(lines), "utf-8")
    return path


def server_for(discord: PretendDiscord, /, **tables: dict[str, Any]) -> Server:
    """A server in this process with room for a crowd, to be started by `async with`."""
    return server_of(discord, tables_for(discord, **tables))


def server_of(discord: PretendDiscord, tables: Tables) -> Server:
    """A server in this process with just these settings, to be started by `async with`."""
    settings = parse_settings(tables, FOLDER)
    node = node_type(settings)
    return Server(settings, keys=Keys((SECRET,)), token=discord.token, make_node=node)


def viewer_token(role: str = "ADMIN", discord_id: str = "1") -> str:
    return Tokens(Keys((SECRET,)), ["HS256"]).issue(discord_id, role)


async def fetch(port: int, path: str, **options: Any) -> HTTPResponse:
    """GET from a server on this host, whatever it answers."""
    client = AsyncHTTPClient(force_instance=True)
    try:
        return await client.fetch(f"http://127.0.0.1:{port}{path}", raise_error=False, **options)
    finally:
        client.close()


class Service:
    """A running process and all that it has written."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        #: Where it says that it listens, and the port of that.
        self.url = ""
        self.port = 0
        #: All that it has written, and the lines of stdout and of stderr alone.
        self.output = ""
        self.out: list[str] = []
        self.log: list[str] = []
        self._grown = asyncio.Condition()
        assert process.stdout is not None
        assert process.stderr is not None
        self._reading = asyncio.gather(
            self._read(process.stdout, self.out), self._read(process.stderr, self.log)
        )

    async def _read(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        async for line in stream:
            async with self._grown:
                self.output += line.decode()
                lines.append(line.decode().rstrip("\n"))
                self._grown.notify_all()

    async def wrote(self, pattern: str, timeout: float = START) -> re.Match[str]:
        """Wait until the output matches `pattern`, in which ^ and $ are those of a line."""
        matching = re.compile(pattern, re.MULTILINE)
        waiting = asyncio.create_task(self._wait_for(matching))
        either: list[asyncio.Future[Any]] = [waiting, self._reading]
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        match = matching.search(self.output)
        assert match is not None, f"no {pattern!r} in:\n{self.output}"
        return match

    async def _wait_for(self, matching: re.Pattern[str]) -> None:
        async with self._grown:
            await self._grown.wait_for(lambda: matching.search(self.output))

    async def listens(self) -> None:
        """Wait until it accepts connections."""
        match = await self.wrote(r"listening on (http://\S+:(\d+))")
        self.url, self.port = match[1], int(match[2])

    async def get(self, path: str, **options: Any) -> HTTPResponse:
        return await fetch(self.port, path, **options)

    async def exit_status(self, timeout: float = START) -> int:
        """Wait for the end of the process and of its output."""
        async with within(timeout):
            await asyncio.shield(self._reading)
            return await self.process.wait()


class Systemd:
    """Systemd's side of the protocol: what the service tells, and the socket that outlives it."""

    def __init__(self, folder: Path, watchdog: float = 0.0) -> None:
        self.told: list[tuple[float, str]] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.listener.getsockname()[1]
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.bind(str(folder / "notify"))
        self.environment = {"NOTIFY_SOCKET": str(folder / "notify")}
        if watchdog:
            self.environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        asyncio.get_running_loop().add_reader(self._notify, self._hear)

    def _hear(self) -> None:
        lines = self._notify.recv(4096).decode().split("\n")
        self.told += [(time.monotonic(), line) for line in lines]

    def heard(self, start: str) -> list[str]:
        """What the service told so far that begins with `start`."""
        return [line for _, line in self.told if line.startswith(start)]

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._notify)
        self._notify.close()
        self.listener.close()

    async def __aenter__(self) -> Systemd:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()


@asynccontextmanager
async def started(
    folder: Path,
    *arguments: object,
    command: Sequence[str] = (sys.executable, str(ROOT / "spywatcher.py")),
    systemd: Systemd | None = None,
    warnings: str = "default",
) -> AsyncIterator[Service]:
    """`python spywatcher.py ARGUMENTS` in `folder`; killed at the end if the test has not stopped it."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONWARNINGS": warnings}
    command = [*command, *map(str, arguments)]
    descriptors: tuple[int, ...] = ()
    if systemd is not None:
        environment |= systemd.environment | {"LISTEN_FDS": "1"}
        number = systemd.listener.fileno()
        descriptors = (number,)
        command = (sys.executable, "-c", HAND_OVER, str(number), *command)
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=environment,
        pass_fds=descriptors,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    service = Service(process)
    try:
        yield service
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await service.exit_status()


@asynccontextmanager
async def running(folder: Path, *arguments: object, **options: Any) -> AsyncIterator[Service]:
    """The same once it accepts connections."""
    async with started(folder, *arguments, **options) as service:
        await service.listens()
        yield service


async def run(folder: Path, *arguments: object) -> tuple[int, list[str], list[str]]:
    """Run it to its end, with no more warnings than an operator sees; return exit status and the
    lines of stdout and stderr.
    """
    async with started(folder, *arguments, warnings="") as service:
        return await service.exit_status(), service.out, service.log
