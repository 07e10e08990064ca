"""spywatcher.py as an operator runs it: a real process, its exit status, and what it says.

async with running("--config", config, "serve") as program:
    url = await program.url()
    program.signal(signal.SIGTERM)
    assert await program.exit() == 0
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import Signals
from typing import Any

from watching import ROOT, SECRET

from simulator import PretendDiscord

#: Seconds to import everything and listen, on a machine that has other things to do.
STARTING = 20.0


class Program:
    """A process and the lines that it prints."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said: dict[str, list[str]] = {"out": [], "log": []}
        assert process.stdout
        assert process.stderr
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self._said["out"])),
            asyncio.create_task(self._read(process.stderr, self._said["log"])),
        ]

    @property
    def out(self) -> list[str]:
        """Lines of stdout so far."""
        return self._said["out"]

    @property
    def log(self) -> list[str]:
        """Lines of stderr so far."""
        return self._said["log"]

    async def says(self, pattern: str, timeout: float = STARTING) -> re.Match[str]:
        """Wait for a line, on stdout or stderr, in which the pattern is found."""
        async with asyncio.timeout(timeout):
            while True:
                for line in [*self.out, *self.log]:
                    if match := re.search(pattern, line):
                        return match
                if all(reader.done() for reader in self._readers):
                    raise AssertionError(f"ended without {pattern!r}: {self.out + self.log}")
                await asyncio.sleep(0.01)

    async def url(self) -> str:
        """Wait until it accepts connections; return where."""
        return (await self.says(r"listening on (http://\S+:\d+)$"))[1]

    def signal(self, number: Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    async def exit(self, timeout: float = STARTING) -> int:
        """Wait for the end; return the exit status."""
        async with asyncio.timeout(timeout):
            await asyncio.gather(*self._readers)
            return await self._process.wait()

    async def kill(self) -> None:
        """End it if it has not ended."""
        if self._process.returncode is None:
            self._process.kill()
        await self.exit()

    @staticmethod
    async def _read(stream: asyncio.StreamReader, lines: list[str]) -> None:
        async for line in stream:
            lines.append(line.decode().rstrip("\n"))


@asynccontextmanager
async def running(*arguments: object, cwd: Path = ROOT) -> AsyncIterator[Program]:
    """Run `python spywatcher.py ARGUMENTS` as long as the block lasts."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "spywatcher.py"),
        *map(str, arguments),
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    program = Program(process)
    try:
        yield program
    finally:
        await program.kill()


async def run(*arguments: object, cwd: Path = ROOT) -> tuple[int, list[str], list[str]]:
    """Run it to its end; return exit status, stdout and stderr."""
    async with running(*arguments, cwd=cwd) as program:
        status = await program.exit()
        return status, program.out, program.log


def write_config(folder: Path, **tables: dict[str, Any]) -> Path:
    """A config.toml with these tables; its plugins are the shipped ones unless it says otherwise."""
    tables = {"plugins": {"folders": [str(ROOT / "plugins")]}} | tables
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    config = folder / "config.toml"
    config.write_text("\n".join(lines), "utf-8")
    return config


def serving(folder: Path, pretend: PretendDiscord, **tables: dict[str, Any]) -> Path:
    """Settings of a server that watches this Discord on a free port."""
    defaults: dict[str, dict[str, Any]] = {
        "server": {"port": 0},
        "auth": {"secret": SECRET},
        "discord": {"rest_url": pretend.rest_url, "token": pretend.token, "startup_grace": 0.0},
    }
    merged = {name: table | tables.pop(name, {}) for name, table in defaults.items()}
    return write_config(folder, **merged, **tables)
