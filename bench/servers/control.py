"""The commands of a benchmark, as lines of JSON on stdin; the other end is peers.py.

`["emit", count]` sends that many events in one go, `["steady", rate, seconds]` so many a second,
`["elsewhere", rate, seconds]` does so in guilds without clients, `["usage"]` answers on stdout with CPU seconds, resident bytes and whatever the server adds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

Emit = Callable[[int], Awaitable[None] | None]


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


async def obey(
    port: int, emit: Emit, figures: Callable[[], dict[str, int]], elsewhere: Emit | None = None
) -> None:
    """Announce the port, then do as told until stdin ends."""
    commands = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(commands)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    report({"port": port})
    numbers = itertools.count()
    running = set()
    async for line in commands:
        command, *arguments = json.loads(line)
        if command == "emit":
            await emit_all(emit, numbers, arguments[0])
        elif command == "steady":
            running = {asyncio.create_task(keep_emitting(emit, numbers, *arguments))}
        elif command == "elsewhere":
            assert elsewhere is not None
            running = {asyncio.create_task(keep_emitting(elsewhere, itertools.count(), *arguments))}
        else:
            cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            report({"cpu": cpu, "resident": resident_bytes(), **figures()})
    del running


async def emit_all(emit: Emit, numbers: itertools.count[int], count: int) -> None:
    for number in itertools.islice(numbers, count):
        if (result := emit(number)) is not None:
            await result


async def keep_emitting(
    emit: Emit, numbers: itertools.count[int], rate: float, seconds: float
) -> None:
    """Event i is due at start + i / rate; those that are late go out together."""
    start = time.monotonic()
    report({"start": start})
    sent, total = 0, int(rate * seconds)
    while sent < total:
        due = min(total, int((time.monotonic() - start) * rate) + 1)
        await emit_all(emit, numbers, due - sent)
        sent = due
        await asyncio.sleep(max(0.0, start + sent / rate - time.monotonic()))


def report(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)
