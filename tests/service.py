"""A server in a process of its own, as an operator or systemd runs it, and a stand-in for systemd.

    async with running(tmp_path, discord) as service:
        await service.get("/health/ready")
        service.process.send_signal(signal.SIGTERM)
        assert await service.exit_status() == 0

The process works in a folder that holds nothing but a config.toml (and what the test put there).
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPResponse

from simulator import PretendDiscord
from spywatcher import Keys, Server, Tokens, parse_settings

ROOT = Path(__file__).parent.parent
SECRET = "a secret that nobody but the tests knows"
#: Where relative paths of `server_for` start; a new folder for each test.
FOLDER = ROOT
#: Seconds that a process may take to start on a busy machine.
START = 20.0

#: What systemd does between fork and exec: the socket becomes descriptor 3, and the process is named.
HAND_OVER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
    " os.execv(sys.argv[2], sys.argv[2:])"
)


def tables_for(discord: PretendDiscord, /, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tables of config.toml for a server on a free port in front of `discord`, and `more` over them."""
    tables: dict[str, dict[str, Any]] = {
        "server": {"port": 0},
        "auth": {"secret": SECRET},
        "limits": {"connections_per_ip": 5000, "attempts_per_ip": "100000/minute"},
        "discord": {"token": discord.token, "rest_url": discord.rest_url, "startup_grace": 0.0},
    }
    for name, table in more.items():
        tables[name] = {**tables.get(name, {}), **table}
    return tables


def write_settings(folder: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """A config.toml of these tables; JSON's strings, numbers and lists are TOML's too."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()]
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text("\n".join(lines))
    return path


def server_for(discord: PretendDiscord, /, **tables: dict[str, Any]) -> Server:
    """A server in this process, to be started by `async with`."""
    tables = tables_for(discord, **tables)
    return Server(parse_settings(tables, FOLDER), keys=Keys((SECRET,)), token=discord.token)


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

    def __init__(self, process: asyncio.subprocess.Process, port: int = 0) -> None:
        self.process = process
        self.port = port
        self.output = ""
        self._grown = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            async with self._grown:
                self.output += line.decode()
                self._grown.notify_all()

    async def wrote(self, pattern: str, timeout: float = START) -> re.Match[str]:
        """Wait until the output matches `pattern`."""
        try:
            async with asyncio.timeout(timeout), self._grown:
                await self._grown.wait_for(lambda: re.search(pattern, self.output))
        except TimeoutError as error:
            raise AssertionError(f"no {pattern!r} in:\n{self.output}") from error
        match = re.search(pattern, self.output)
        assert match is not None
        return match

    async def get(self, path: str, **options: Any) -> HTTPResponse:
        return await fetch(self.port, path, **options)

    async def exit_status(self, timeout: float = START) -> int:
        """Wait for the end of the process and of its output."""
        async with asyncio.timeout(timeout):
            await self._reading
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
async def running(
    folder: Path,
    *,
    command: Sequence[str] = (sys.executable, str(ROOT / "spywatcher.py")),
    systemd: Systemd | None = None,
    ready: Callable[[Service], Any] | None = None,
) -> AsyncIterator[Service]:
    """The server in `folder`; killed at the end if the test has not stopped it."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONWARNINGS": "default"}
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
        stderr=asyncio.subprocess.STDOUT,
    )
    service = Service(process)
    try:
        service.port = int((await service.wrote(r"listening on http://127\.0\.0\.1:(\d+)"))[1])
        yield service
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await service.exit_status()
