"""Connections that break again and again, in every way, while events go on: nothing lost or doubled."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from jsclient import QUICK, Dashboard
from length import length
from redisserver import Proxy
from service import CROWD, running, tables_for, viewer_token, write_settings
from waiting import eventually
from watching import Watch, Watching

import spywatcher
from simulator import Guild

PAGE = {"Origin": "http://localhost:5173"}
CUTS = length(100, 1_000)
Cut = Callable[[Watch, Proxy, Dashboard], Awaitable[None]]


async def close_engine(spy: Watch, proxy: Proxy, dashboard: Dashboard) -> None:
    """As the server closes a session."""
    if session := spy.server.socketio.session_of(dashboard.id):
        await session.close()


async def close_page(spy: Watch, proxy: Proxy, dashboard: Dashboard) -> None:
    """As the client loses its network, if it has one: it would not try again in the middle of that."""
    if (await dashboard.state()).connected:
        await dashboard.drop()


async def cut_tcp(spy: Watch, proxy: Proxy, dashboard: Dashboard) -> None:
    proxy.break_one()


class Talk:
    """Numbered events, in two guilds in turn."""

    def __init__(self, spy: Watch, guilds: list[Guild]) -> None:
        self._spy = spy
        self._guilds = itertools.cycle(guilds)
        self.sent: dict[str, list[int]] = {str(guild.id): [] for guild in guilds}

    def say(self) -> None:
        guild_id = str(next(self._guilds).id)
        number = sum(map(len, self.sent.values()))
        self.sent[guild_id].append(number)
        payload = {"number": number, "guildId": guild_id}
        self._spy.server.node.deliver("x", guild_id, payload, "guild")

    @asynccontextmanager
    async def __call__(self, rate: float = 100) -> AsyncIterator[None]:
        async def talk() -> None:
            loop, begun = asyncio.get_running_loop(), sum(map(len, self.sent.values()))
            start = loop.time()
            while True:
                for _ in range(begun, int((loop.time() - start) * rate)):
                    self.say()
                    begun += 1
                await asyncio.sleep(1 / rate)

        task = asyncio.create_task(talk())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def all_came(self, dashboard: Dashboard) -> None:
        """Each event of each guild, once and in order."""
        count = sum(map(len, self.sent.values()))
        with suppress(AssertionError):  # what came tells more
            await eventually(lambda: len(dashboard.received("x")) >= count, timeout=30)
        for guild_id, sent in self.sent.items():
            got = [one["number"] for one in dashboard.received("x") if one["guildId"] == guild_id]
            assert got == sent


async def crowd(spy: Watch, proxy: Proxy, **options: Any) -> list[Dashboard]:
    """Ten dashboards in the rooms of two guilds."""
    url, options = f"http://127.0.0.1:{proxy.port}", {**QUICK, **options}
    dashboards = []
    for _ in range(10):
        dashboard = await spy.js.connect(
            url, token=spy.token(role="ADMIN"), extraHeaders=PAGE, **options
        )
        dashboards.append(dashboard)
        for guild_id in spy.discord.guilds:
            assert (await dashboard.call("subscribe:guild", str(guild_id)))["ok"]
    return dashboards


async def storm(spy: Watch, proxy: Proxy, dashboards: list[Dashboard], cut: Cut) -> None:
    """Cut after cut, while events go on."""

    async def torment(dashboard: Dashboard) -> None:
        for number in range(CUTS // len(dashboards)):
            await cut(spy, proxy, dashboard)
            await asyncio.sleep(random.uniform(0, 0.3))
            if number % 3:  # else in the middle of its return
                await eventually(lambda: spy.server.socketio.session_of(dashboard.id), timeout=30)

    talk = Talk(spy, list(spy.discord.guilds.values()))
    async with talk():
        await asyncio.gather(*map(torment, dashboards))
    for dashboard in dashboards:
        await talk.all_came(dashboard)
        first, *later = dashboard.received("session")
        assert not first["recovered"]
        assert later
        assert all(session["recovered"] for session in later)


@asynccontextmanager
async def stormy(watching: Watching) -> AsyncIterator[tuple[Watch, Proxy]]:
    limits = {**CROWD, "connections_per_viewer": 1000, "block_after": 100_000}
    async with watching(limits=limits) as spy, Proxy(spy.server.port) as proxy:
        yield spy, proxy


@pytest.mark.parametrize("transport", ["websocket", "polling"])
@pytest.mark.parametrize("cut", [close_engine, close_page, cut_tcp])
async def test_whoever_is_cut_off_again_and_again_misses_nothing(
    discord, guild, watching, cut: Cut, transport: str
) -> None:
    discord.add_guild(name="Second")
    async with stormy(watching) as (spy, proxy):
        dashboards = await crowd(spy, proxy, transports=[transport])
        await storm(spy, proxy, dashboards, cut)


async def test_whoever_is_cut_off_in_the_middle_of_the_upgrade_misses_nothing(
    discord, guild, watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    discord.add_guild(name="Second")
    probe = spywatcher.Session.probe

    def probe_and_die(session: spywatcher.Session, handler: spywatcher.SocketHandler) -> bool:
        if random.random() < 0.5:
            asyncio.get_running_loop().call_soon(session.lose)
        return probe(session, handler)

    async with stormy(watching) as (spy, proxy):
        dashboards = await crowd(spy, proxy, transports=["polling", "websocket"])
        monkeypatch.setattr(spywatcher.Session, "probe", probe_and_die)
        await storm(spy, proxy, dashboards, close_engine)


class LatePolls(Proxy):
    """Once the probe of an upgrade was answered, polls are answered half a second later."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.probed = asyncio.Event()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if b"3probe" in data:
                    self.probed.set()
                elif self.probed.is_set() and data.startswith(b"HTTP/1.1 200"):
                    await asyncio.sleep(0.5)
                writer.write(data)
        writer.close()
        self._writers.discard(writer)


async def test_who_is_in_the_middle_of_the_upgrade_hears_of_a_stop_at_once(
    discord, guild, js, tmp_path
) -> None:
    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path) as service, LatePolls(service.port) as proxy:
        dashboard = await js.open(
            f"http://127.0.0.1:{proxy.port}",
            token=viewer_token(),
            transports=["polling", "websocket"],
        )
        await proxy.probed.wait()
        service.process.send_signal(signal.SIGTERM)
        assert await service.exit_status() == 0
        assert await dashboard.reconnecting(timeout=5)
