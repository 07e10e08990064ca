"""Ten thousand strangers who never authenticate, against a server in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import resource
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
from length import length
from service import ROOT, Service, running, tables_for, viewer_token, write_settings
from strangers import POLL, WAYS, WEBSOCKET
from waiting import clock, eventually

STRANGERS = 10_000
TIMEOUT = 2.0
"""Seconds that the server gives a connection to authenticate."""
CALLERS = 39
"""Who call at the same time, each as soon as the one before has been answered."""
#: What a stranger says before it falls silent; None: what needs a session of its own.
MANNERS = ("", WEBSOCKET, WEBSOCKET + "\r\n", POLL, None)


class Stranger(asyncio.Protocol):
    """A connection that says one thing and then waits for the end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.heard = b""
        self.answered = asyncio.Event()
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self._text.encode())  # type: ignore[attr-defined]  # a socket's

    def data_received(self, data: bytes) -> None:
        self.heard += data
        self.answered.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self.answered.set()


class Crowd:
    """Everybody who has called so far."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.strangers: list[Stranger] = []

    async def come(self) -> None:
        """All of them, as fast as the server answers."""

        async def call_in_turn(first: int) -> None:
            for number in range(first, STRANGERS, CALLERS):
                await self._call(number)

        await asyncio.gather(*map(call_in_turn, range(CALLERS)))

    async def _call(self, number: int) -> None:
        """Half come from addresses of their own, half through the proxy on this host."""
        address = f"127.{1 + number % 200}.{number // 200 % 250}.1"
        header, local = "", (address, 0)
        if number % 2:
            header = f"X-Forwarded-For: 10.{number % 250}.{number // 250}.1\r\n"
            local = ("127.0.0.1", 0)
        manner = MANNERS[number // 2 % 5]
        query = "" if manner is not None else await self._open(local, header)
        text = WEBSOCKET + "\r\n" if manner is None else manner
        text = text.format(query=query, header=header)
        stranger = await self._dial(text, local)
        if text.endswith("\r\n\r\n"):
            await stranger.answered.wait()

    async def _open(self, local: tuple[str, int], header: str) -> str:
        """The query of an upgrade that is never finished."""
        stranger = await self._dial(POLL.format(header=header), local)
        await stranger.answered.wait()
        sid = re.search(rb'"sid":"([^"]+)"', stranger.heard)
        return f"&sid={sid[1].decode()}" if sid else ""

    async def _dial(self, text: str, local: tuple[str, int]) -> Stranger:
        loop = asyncio.get_running_loop()
        _, stranger = await loop.create_connection(
            lambda: Stranger(text), "127.0.0.1", self._port, local_addr=local
        )
        self.strangers.append(stranger)
        return stranger

    @property
    def connected(self) -> int:
        return sum(not stranger.closed for stranger in self.strangers)

    def leave(self) -> None:
        for stranger in self.strangers:
            stranger.transport.close()


def resident(process: int) -> float:
    """MB of memory that the process holds."""
    with open(f"/proc/{process}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024  # type: ignore[index]


@pytest.fixture
async def service(tmp_path, discord, guild) -> AsyncIterator[Service]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder = {"folders": [str(tmp_path)]}
    limits = {"connections_per_ip": 50, "attempts_per_ip": "600/minute"}
    auth = {"connect_timeout": TIMEOUT}
    write_settings(tmp_path, tables_for(discord, auth=auth, limits=limits, plugins=folder))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        yield service
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_strangers_cost_little_and_keep_nobody_out(service, js, node):
    """What the slowest proper client needs is measured beside them."""
    process = service.process.pid
    await (await js.connect(service.url, token=viewer_token())).disconnect()
    memory, files = resident(process), len(os.listdir(f"/proc/{process}/fd"))
    crowd = Crowd(service.port)
    coming = asyncio.create_task(crowd.come())
    most, entering = memory, Stopwatch(process, node.pid, os.getpid())
    for number in itertools.count():
        transport = ["websocket", "polling"][number % 2]
        with entering():
            dashboard = await js.connect(service.url, token=viewer_token(), transports=[transport])
        await dashboard.disconnect()
        most = max(most, resident(process))
        if coming.done():
            break
    await coming
    came = clock()
    await eventually(lambda: not crowd.connected, timeout=TIMEOUT + 2)
    seconds = clock() - came
    most = max(most, resident(process))
    crowd.leave()
    print(f"+{most - memory:.1f} MB, proper clients came in {entering},")
    print(f"all gone {seconds:.1f} s after the last came, {len(crowd.strangers)} in all")
    assert most - memory < 50
    assert entering.worst < 1
    assert len(os.listdir(f"/proc/{process}/fd")) <= files + 5


# ---- ten ways to be a stranger

FLOOD_SECONDS = length(8, 60)


def waited(*processes: int) -> float:
    """Seconds that these processes were ready to run and had no CPU (proc(5): schedstat)."""
    waits = [Path(f"/proc/{one}/schedstat").read_text().split()[1] for one in processes]
    return sum(map(int, waits)) / 1e9


class Stopwatch:
    """What things took, and what of that was the wait of these processes for a CPU."""

    def __init__(self, *processes: int) -> None:
        self._processes = processes
        self.took: list[float] = []
        self.waited: list[float] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        began, before = clock(), waited(*self._processes)
        yield
        self.took.append(clock() - began)
        self.waited.append(waited(*self._processes) - before)

    @property
    def worst(self) -> float:
        """The longest, without what the machine had no CPU for."""
        return max(took - waits for took, waits in zip(self.took, self.waited, strict=True))

    def __str__(self) -> str:
        longest = max(self.took)
        waits = self.waited[self.took.index(longest)]
        return (
            f"{len(self.took)} times, median {median(self.took) * 1000:.0f} ms, worst"
            f" {longest * 1000:.0f} ms (of them {waits * 1000:.0f} waiting for a CPU)"
        )


def with_descriptors(most: int) -> tuple[str, ...]:
    """The server with what `ulimit -n` does between fork and exec."""
    text = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}));"
        " os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    return sys.executable, "-c", text, str(ROOT / "spywatcher.py")


async def strangers_at(port: int, way: str) -> asyncio.subprocess.Process:
    """A thousand of them, for as long as the test is to last."""
    script = Path(__file__).parent / "strangers.py"
    arguments = sys.executable, str(script), str(port), way, str(FLOOD_SECONDS)
    return await asyncio.create_subprocess_exec(*arguments)


@pytest.mark.faults
@pytest.mark.parametrize("way", WAYS)
async def test_a_thousand_strangers_of_any_kind_keep_nobody_out(
    tmp_path, discord, guild, js, node, way
):
    write_settings(tmp_path, tables_for(discord, plugins={}))
    more = {"command": with_descriptors(150)} if way == "out of descriptors" else {}
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    async with running(tmp_path, **more) as service:
        await discord.wait_for_bot()
        inside = await js.connect(service.url, token=viewer_token())
        await inside.call("subscribe:guild", str(guild.id))
        memory = resident(service.process.pid)
        processes = service.process.pid, node.pid, os.getpid()
        entering, hearing = Stopwatch(*processes), Stopwatch(*processes)
        strangers = await strangers_at(service.port, way)
        while strangers.returncode is None:
            with entering():
                dashboard = await js.connect(service.url, token=viewer_token())
            await dashboard.disconnect()
            with hearing():
                await discord.message(guild, guild.owner, guild.general)
                await inside.next_event("message:new")
            await asyncio.sleep(0.1)
        grown = resident(service.process.pid) - memory
    size = sum(len(line) for line in service.log)
    print(f"{way}: in: {entering}; events: {hearing}; +{grown:.1f} MB, log {size}")
    assert entering.worst < 1
    assert hearing.worst < 0.1
    assert grown < 30
    assert size < 1_000_000


async def test_out_of_file_descriptors_it_pauses_and_lets_the_oldest_strangers_go(
    tmp_path, discord, guild, js
):
    write_settings(tmp_path, tables_for(discord, plugins={"folders": [str(tmp_path)]}))
    async with running(tmp_path, command=with_descriptors(150)) as service:
        await discord.wait_for_bot()
        inside = await js.connect(service.url, token=viewer_token())
        strangers = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(400)]
        started = clock()
        dashboard = await js.connect(service.url, token=viewer_token())
        assert clock() - started < 2
        answer = await service.get("/health/ready")
        assert answer.code == 503
        assert "no file descriptor" in json.loads(answer.body)["parts"]["server"]["problem"]
        for _, writer in strangers:
            writer.close()
        for one in (inside, dashboard):
            assert (await one.call("guilds:list"))["ok"]

        async def is_ready():
            return (await service.get("/health/ready")).code == 200

        await eventually(is_ready)
        told = [line for line in service.log if "descriptor" in line or "Too many open" in line]
        assert len(told) == 1
        assert "LimitNOFILE" in told[0]
