"""Several nodes are one service: against a real Redis, with faults, each event accounted for."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsclient import QUICK, Dashboard, JavaScript, State
from length import length
from redisserver import Proxy, RedisServer, free_port
from service import (
    ROOT,
    SECRET,
    Service,
    running,
    server_for,
    tables_for,
    viewer_token,
    write_settings,
)
from waiting import clock, eventually, within

import spywatcher
import spywatcher_cluster
from simulator import GatewaySocket, Guild, Op, Packet, Permission, PretendDiscord, hidden_except
from spywatcher import Keys, Server, Tokens, Topic, Viewer
from spywatcher_cluster import Link, Publisher, Reader, Windows

pytestmark = pytest.mark.logs(
    r"no connection to Redis",
    r"Redis does not get the counts",  # as long as that lasts, or of who holds the gateway no more
    r"not connected to Discord",  # a node that is stopped as it takes over from one stopped before
    required=False,
)


#: What nodes wait for of each other, which faults are measured by.
TIMES = ("LOCK_TIME", "TERM_TIME", "RENEWAL", "BEAT_INTERVAL", "STREAM_AGE", "CHANGE_OF_SOURCE")
#: How much shorter it lasts where a test does not promise how long it takes.
HURRY = length(3, 1)
HURRIED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import spywatcher, spywatcher_cluster as cluster
for name in {TIMES}:
    value = getattr(cluster, name)
    setattr(cluster, name, type(value)(value / {HURRY}))
sys.exit(spywatcher.main())
"""


def scale_times(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Let terms, and what streams keep, last so much shorter."""
    for name in TIMES:
        value = getattr(spywatcher_cluster, name)
        monkeypatch.setattr(spywatcher_cluster, name, type(value)(value / by))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults last as much shorter as terms do."""
    scale_times(monkeypatch, HURRY)


def of_a_term(share: float) -> float:
    """Seconds: so much of the time after which a holder that does not renew has lost the gateway."""
    return spywatcher_cluster.LOCK_TIME * share


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with RedisServer(tmp_path) as redis:
        yield redis


class Nodes:
    """Servers of one service in this process, each behind its own way to Redis."""

    def __init__(
        self, redis: RedisServer, discord: PretendDiscord, guild: Guild, js: JavaScript
    ) -> None:
        self.redis = redis
        self.folder = redis.folder
        self.discord = discord
        self.guild = guild
        self.js = js
        self.servers: list[Server] = []
        self.proxies: list[Proxy] = []
        self._stack = AsyncExitStack()

    async def add(self, **tables: dict[str, Any]) -> Server:
        proxy = await self._stack.enter_async_context(Proxy(self.redis.port))
        storage = {"path": str(self.folder / f"node{len(self.servers)}.db")}
        server = server_for(self.discord, redis={"url": proxy.url}, storage=storage, **tables)
        await self._stack.enter_async_context(server)
        self.servers.append(server)
        self.proxies.append(proxy)
        return server

    @property
    def holder(self) -> Server:
        [holder] = [s for s in self.servers if s.node.lease.holds()]
        return holder

    async def ready(self) -> None:
        """Every node knows the guilds."""
        for server in self.servers:
            await eventually(partial(is_ready, server))

    async def dashboard(
        self, server: Server, viewer: str = "1", role: str = "ADMIN", **options: Any
    ) -> Dashboard:
        token = Tokens(Keys((SECRET,)), ["HS256"]).issue(viewer, role)
        dashboard = await self.js.connect(
            f"http://127.0.0.1:{server.port}", token=token, transports=["websocket"], **options
        )
        answer = await dashboard.call("subscribe:guild", str(self.guild.id))
        assert answer["ok"], answer
        if answer.get("pending"):  # another node knows a viewer once the holder has told of it
            await dashboard.next("presence:snapshot")
        return dashboard

    async def close(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def nodes(
    redis: RedisServer, discord: PretendDiscord, guild: Guild, js: JavaScript
) -> AsyncIterator[Nodes]:
    nodes = Nodes(redis, discord, guild, js)
    try:
        yield nodes
    finally:
        await nodes.close()


def is_ready(server: Server) -> bool:
    """Whether it has no problem and knows the guilds."""
    assert server.problem is None, server.problem
    return server.node.known.complete


def say(server: Server, guild: Guild, number: int) -> None:
    server.node.deliver("test:event", str(guild.id), {"number": number}, "guild")


def numbers(dashboard: Dashboard) -> list[int]:
    return [data["number"] for data in dashboard.received("test:event")]


@asynccontextmanager
async def talking(server: Server, guild: Guild, rate: float = 100) -> AsyncIterator[list[float]]:
    """Emit numbered events meanwhile; the list has the time of each."""
    sent: list[float] = []

    async def talk() -> None:
        begun = time.monotonic()
        while True:
            while len(sent) < (time.monotonic() - begun) * rate:
                sent.append(time.monotonic())
                say(server, guild, len(sent) - 1)
            await asyncio.sleep(1 / rate)

    task = asyncio.create_task(talk())
    try:
        yield sent
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_an_event_reaches_the_clients_of_every_node_once(nodes, redis, guild):
    for _ in range(3):
        await nodes.add()
    await nodes.ready()
    dashboards = [await nodes.dashboard(server) for server in nodes.servers]
    ada = await nodes.discord.join(guild, "ada")
    for _ in range(20):
        await nodes.discord.message(guild, ada, guild.general)
    for dashboard in dashboards:
        await eventually(lambda d=dashboard: len(d.received("message:new")) == 20)
        assert len(dashboard.received("user:join")) == 1


async def two_nodes(nodes: Nodes, **tables: dict[str, Any]) -> list[Dashboard]:
    """The first holds the gateway: what happens is emitted there."""
    await nodes.add(**tables)
    await eventually(lambda: nodes.servers[0].node.leading)
    await nodes.add(**tables)
    await nodes.ready()
    return [await nodes.dashboard(server) for server in nodes.servers]


async def everything_came(dashboards: list[Dashboard], count: int) -> None:
    """Each number once and in order, at each client."""
    for dashboard in dashboards:
        await eventually(lambda d=dashboard: len(numbers(d)) >= count)
        assert numbers(dashboard) == list(range(count))


async def page(nodes: Nodes, server: Server, **options: Any) -> Dashboard:
    """A dashboard in a browser: one that can recover."""
    options = {**QUICK, "extraHeaders": {"Origin": "http://localhost:5173"}, **options}
    return await nodes.dashboard(server, **options)


async def cut_again_and_again(dashboards: list[Dashboard]) -> None:
    for _ in range(20):
        for dashboard in dashboards:
            await dashboard.drop()
        await asyncio.gather(*(dashboard.reconnected() for dashboard in dashboards))


async def all_recover(dashboards: list[Dashboard], count: int) -> None:
    await everything_came(dashboards, count)
    assert all(map(always_recovered, dashboards))


async def test_who_comes_back_to_its_node_gets_what_it_missed_once(nodes, guild, monkeypatch):
    monkeypatch.setattr(Reader, "LINGER", 0.1)
    for _ in range(2):
        await nodes.add()
    await nodes.ready()
    dashboards = [await page(nodes, server) for server in nodes.servers]
    async with talking(nodes.holder, guild) as sent:
        await cut_again_and_again(dashboards)
    await all_recover(dashboards, len(sent))


async def test_a_node_reads_on_for_who_may_come_back_alone(nodes, guild, monkeypatch):
    monkeypatch.setattr(Reader, "LINGER", 0.1)
    for _ in range(2):
        await nodes.add()
    await nodes.ready()
    dashboard = await page(nodes, other(nodes), reconnection=False)
    await dashboard.drop()
    beats = spywatcher_cluster.BEAT_INTERVAL * 3
    async with talking(nodes.holder, guild) as sent:
        await asyncio.sleep(beats)
    await dashboard.reconnect()
    await everything_came([dashboard], len(sent))


@asynccontextmanager
async def balanced(nodes: Nodes) -> AsyncIterator[Balancer]:
    """Two nodes behind one address; each connection goes to the next of them."""
    for _ in range(2):
        await nodes.add()
    await nodes.ready()
    async with Balancer(*(server.port for server in nodes.servers)) as balancer:
        yield balancer


#: Dashboards in a rolling restart.
CROWD = length(60, 300)
#: The client's own way to come back.
STOCK = {"reconnectionDelay": 1000, "reconnectionDelayMax": 5000, "randomizationFactor": 0.5}


def always_recovered(dashboard: Dashboard) -> bool:
    return all(session["recovered"] for session in dashboard.received("session")[1:])


async def test_who_comes_back_to_another_node_gets_what_it_missed_once(nodes, guild):
    async with balanced(nodes) as balancer:
        dashboards = [await page(nodes, balancer) for _ in range(3)]
        async with talking(nodes.holder, guild) as sent:
            await cut_again_and_again(dashboards)
        await all_recover(dashboards, len(sent))


async def test_a_viewer_comes_back_to_a_node_that_has_not_heard_of_it(nodes, guild):
    ada = guild.add_member("ada", roles=[guild.add_role("staff", Permission.MANAGE_GUILD)])
    async with balanced(nodes) as balancer:
        dashboard = await page(nodes, balancer, viewer=str(ada.id), role="USER", reconnection=False)
        await dashboard.drop()
        async with talking(nodes.holder, guild) as sent:
            await eventually(lambda: len(sent) > 20)
        await dashboard.reconnect()
        await everything_came([dashboard], len(sent))


async def test_of_a_stream_that_was_trimmed_no_part_comes(nodes, redis, guild):
    async with balanced(nodes) as balancer:
        dashboard = await page(nodes, balancer, reconnection=False)
        await dashboard.drop()
        for number in range(5):
            say(nodes.holder, guild, number)
        stream = f"spywatcher:guild:{guild.id}"
        await eventually(lambda: redis.ask("XLEN", stream))
        position = nodes.holder.recovery.logs.position
        await eventually(lambda: all(s.recovery.logs.position >= position for s in nodes.servers))
        await redis.ask("XTRIM", stream, "MAXLEN", 3)
        await dashboard.reconnect()
        await dashboard.reconnected()
        await dashboard.next("session")
        assert await dashboard.next("session") == {"recovered": False, "rooms": []}
        await dashboard.quiet("test:event")


async def test_the_pid_of_another_viewer_is_of_no_use_at_any_node(nodes, redis, guild):
    async with balanced(nodes) as balancer:
        victim = await page(nodes, balancer)
        [key] = await eventually(lambda: redis.ask("KEYS", "spywatcher:ticket:*"))
        pid, offset = key.decode().rpartition(":")[2], nodes.holder.recovery.logs.offset
        owner, _ = msgspec.msgpack.decode(await redis.ask("GET", key))
        for said in (pid, pid[::-1], "x.y"):
            for server in nodes.servers:
                await server.node.recall(said, Viewer("666", "ADMIN"), offset)
                assert server.recovery.find(said, "666") is None
        assert msgspec.msgpack.decode(await redis.ask("GET", key))[0] == owner
        assert (await victim.state()).connected


@pytest.mark.faults
@pytest.mark.parametrize("holds", [True, False], ids=["the holder", "another"])
async def test_who_was_at_a_node_that_is_killed_misses_nothing_that_others_got(
    nodes, processes, holds
):
    holder = await find_holder(processes)
    killed = processes.pop(holder if holds else holder - 1)
    async with Balancer(killed.port) as balancer, chatting(nodes, rate=100) as sent:
        moving = [await page(nodes, balancer) for _ in range(10)]
        staying = [await page(nodes, service) for service in processes]
        balancer.ports[:] = [service.port for service in processes]
        await eventually(lambda: all(len(authors(d)) > 20 for d in moving + staying))
        killed.process.kill()
        await asyncio.gather(*(dashboard.reconnected() for dashboard in moving))
        back = len(sent)
        await eventually(lambda: all(authors(d)[-1] > back + 20 for d in moving))
    assert all(map(always_recovered, moving))
    for dashboard in moving:
        misses_nothing_of(dashboard, staying)
        assert len(gaps(dashboard)) <= holds  # what Discord sent while nobody held the gateway


def misses_nothing_of(dashboard: Dashboard, others: list[Dashboard]) -> None:
    """What any of them got since it came it got too, in order and once."""
    in_order_and_once(dashboard)
    got = authors(dashboard)
    for other in others:
        in_order_and_once(other)
        due = [number for number in authors(other) if got[0] <= number <= got[-1]]
        assert not set(due) - set(got)


def gaps(dashboard: Dashboard) -> list[int]:
    """Behind which numbers others are missing."""
    return [before for before, after in pairwise(authors(dashboard)) if after != before + 1]


@pytest.mark.faults
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_who_comes_back_after_all_nodes_began_anew_misses_nothing_that_others_got(
    nodes, tmp_path, how
):
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(in_processes(nodes, tmp_path, count=2))
        ports = [service.port for service in services]
        balancer = await stack.enter_async_context(Balancer(*ports))
        dashboards = [await page(nodes, balancer) for _ in range(6)]
        sent = await stack.enter_async_context(chatting(nodes))
        await eventually(lambda: all(len(authors(d)) > 20 for d in dashboards))
        for service in services:
            service.process.send_signal(how)
        for number, service in enumerate(services):
            await service.exit_status()
            await stack.enter_async_context(process_in(tmp_path / f"node{number}"))
        await asyncio.gather(*(dashboard.reconnected(30) for dashboard in dashboards))
        back = len(sent)
        await eventually(lambda: all(authors(d)[-1] > back + 20 for d in dashboards))
        assert all(map(always_recovered, dashboards))
        await balancer.cut()
    for dashboard in dashboards:
        misses_nothing_of(dashboard, dashboards)
        assert len(gaps(dashboard)) <= 1


@pytest.mark.faults
@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
@pytest.mark.usefixtures("hurried")
async def test_a_redis_that_is_killed_and_comes_back_loses_nothing(nodes, redis, guild, empty):
    dashboards = await two_nodes(nodes)
    async with talking(nodes.servers[0], guild) as sent:
        await eventually(lambda: len(sent) > 20)
        await redis.kill()
        await asyncio.sleep(of_a_term(5 / 8))
        await redis.start(empty=empty)
        await eventually(lambda: all(s.node.link.up for s in nodes.servers), timeout=1)
        count = len(sent)
        await eventually(lambda: len(sent) > count + 20)
    await everything_came(dashboards, len(sent))


@pytest.mark.faults
@pytest.mark.usefixtures("hurried")
async def test_a_frozen_redis_delays_no_local_event(nodes, redis, guild):
    dashboards = await two_nodes(nodes)
    async with talking(nodes.servers[0], guild) as sent:
        await eventually(lambda: len(sent) > 20)
        redis.freeze()
        await asyncio.sleep(of_a_term(10 / 8))
        redis.thaw()
        await eventually(lambda: all(s.node.link.up for s in nodes.servers))
    await everything_came(dashboards, len(sent))
    times = [event.monotonic for event in dashboards[0].events("test:event")]
    assert max(came - went for came, went in zip(times, sent, strict=True)) <= 0.05


@pytest.mark.faults
async def test_a_hundred_cut_connections_lose_nothing_and_leak_nothing(nodes, redis, guild):
    dashboards = await two_nodes(nodes)
    before = await redis.clients()
    async with talking(nodes.servers[0], guild) as sent:
        for _ in range(100):
            await redis.ask("CLIENT", "KILL", "TYPE", "normal")
            await asyncio.sleep(0.05)
    await everything_came(dashboards, len(sent))
    await eventually(lambda: all(s.node.link.up for s in nodes.servers))
    assert await redis.clients() <= before


@asynccontextmanager
async def chatting(nodes: Nodes, rate: float = 50) -> AsyncIterator[list[float]]:
    """Members n0, n1, … write one message each meanwhile; the list has the time of each."""
    sent: list[float] = []

    async def chat() -> None:
        while True:
            author = nodes.guild.add_member(f"n{len(sent)}")
            sent.append(time.monotonic())
            await nodes.discord.message(nodes.guild, author, nodes.guild.general)
            await asyncio.sleep(1 / rate)

    task = asyncio.create_task(chat())
    try:
        yield sent
    finally:
        task.cancel()
        await asyncio.wait([task])


def authors(dashboard: Dashboard) -> list[int]:
    return [int(data["username"][1:]) for data in dashboard.received("message:new")]


def last_message(dashboard: Dashboard) -> float:
    """When it came."""
    return dashboard.events("message:new")[-1].monotonic


def longest_silence(dashboard: Dashboard, since: float) -> float:
    times = [event.monotonic for event in dashboard.events("message:new")]
    times = [since, *(moment for moment in times if moment > since)]
    return max(clock.lasted(before, after) for before, after in pairwise(times))


def in_order_and_once(dashboard: Dashboard) -> None:
    got = authors(dashboard)
    assert got == sorted(set(got))


@pytest.mark.faults
@pytest.mark.usefixtures("hurried")
async def test_a_holder_cut_off_from_redis_is_replaced_and_is_silent_before_that(nodes, redis):
    dashboards = await two_nodes(nodes)
    holder = nodes.servers.index(nodes.holder)
    async with chatting(nodes):
        await eventually(lambda: all(len(authors(d)) > 20 for d in dashboards))
        cut = time.monotonic()
        await nodes.proxies[holder].cut()
        await eventually(lambda: nodes.servers[1 - holder].node.lease.holds(), timeout=10)
        assert nodes.servers[holder].node.lease.holds() is False
        await eventually(lambda: last_message(dashboards[1 - holder]) > cut + of_a_term(5 / 8))
        await nodes.proxies[holder].mend()
        await eventually(lambda: not nodes.servers[holder].node.leading)
        ended = time.monotonic()
        await eventually(lambda: last_message(dashboards[holder]) > ended + of_a_term(6 / 8))
    await eventually(lambda: authors(dashboards[0])[-20:] == authors(dashboards[1])[-20:])
    for dashboard in dashboards:
        in_order_and_once(dashboard)
    assert longest_silence(dashboards[1 - holder], cut) <= 10


async def cut_off_for(nodes: Nodes, seconds: float) -> None:
    """Have another node take over for so long; each client hears each event once, of one source."""
    dashboards = await two_nodes(nodes)
    holder = nodes.servers.index(nodes.holder)
    old, new = nodes.servers[holder].node, nodes.servers[1 - holder].node
    async with chatting(nodes):
        await eventually(lambda: all(len(authors(d)) > 20 for d in dashboards))
        cut = time.monotonic()
        await nodes.proxies[holder].cut()
        while time.monotonic() < cut + seconds:
            assert not (old.lease.holds() and new.lease.holds())
            await asyncio.sleep(0.01)
        await eventually(new.lease.holds)  # at once, unless its host was elsewhere
        await nodes.proxies[holder].mend()
        await eventually(lambda: not old.leading)
        ended = time.monotonic()
        await eventually(lambda: last_message(dashboards[holder]) > ended + 2)
    await eventually(lambda: authors(dashboards[0])[-20:] == authors(dashboards[1])[-20:])
    for dashboard in dashboards:
        in_order_and_once(dashboard)
    assert longest_silence(dashboards[holder], cut) <= 4
    assert longest_silence(dashboards[1 - holder], cut) <= 10
    assert old.publisher.fenced > 0
    assert old.publisher.dropped == 0


async def test_who_is_cut_off_while_another_holds_the_gateway_tells_nobody_anything_twice(
    nodes, monkeypatch
):
    """For ninety seconds, ten of them in terms that are as much shorter."""
    shorter = length(9, 1)
    scale_times(monkeypatch, shorter)
    await cut_off_for(nodes, 90 / shorter)


async def test_who_was_cut_off_for_long_learns_anew_who_may_see_what(nodes, guild, monkeypatch):
    scale_times(monkeypatch, 10)
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manager])
    await two_nodes(nodes)
    away = nodes.servers.index(other(nodes))
    dashboard = await nodes.dashboard(nodes.servers[away], str(ada.id), "USER")
    await nodes.proxies[away].cut()
    await nodes.discord.remove_role(guild, ada, manager)
    await asyncio.sleep(spywatcher_cluster.STREAM_AGE / 1000)  # what streams keep is not all, then
    await nodes.redis.ask("XTRIM", spywatcher_cluster.CONTROL, "MAXLEN", 0)
    await nodes.proxies[away].mend()
    assert (await dashboard.next("error", timeout=5))["code"] == "forbidden"


async def test_what_waited_for_long_is_sent_and_not_kept_to_be_sent_again(
    nodes, guild, monkeypatch
):
    monkeypatch.setattr(Publisher, "RECENT_AGE", 0.0)
    dashboards = await two_nodes(nodes)
    for number in range(3):
        say(nodes.servers[0], guild, number)
        await everything_came(dashboards, number + 1)


async def test_a_node_without_a_term_tells_nothing_of_guilds(nodes, guild):
    dashboards = await two_nodes(nodes)
    lost = other(nodes)
    lost.access.begin([], spywatcher.ShardRange(0, 1))  # as Discord's last word to who lost it
    say(lost, guild, 1)
    await eventually(lambda: all(numbers(dashboard) == [1] for dashboard in dashboards))
    assert guild.id in nodes.holder.node.known.guilds


@pytest.mark.logs(r"an entry of spywatcher:\S+ cannot be read")
async def test_entries_that_do_not_decode_are_skipped_counted_and_told_once(nodes, redis, guild):
    dashboards = await two_nodes(nodes)
    for stream in ("spywatcher:control", f"spywatcher:guild:{guild.id}"):
        for junk in (b"\xc1", b"\x93\x01", b"", b"\x95\xa1x\x00\xa1x\xa1x\xa1x"):
            await redis.ask("XADD", stream, "*", "n", junk, "i", "1")
        await redis.ask("XADD", stream, "*", "other", "field")
    say(nodes.servers[0], guild, 1)
    for dashboard in dashboards:
        await dashboard.next("test:event", timeout=1)
    for server in nodes.servers:
        await eventually(lambda s=server: figure(s, "redis_unreadable") == 10)


async def test_guilds_in_the_form_of_another_version_are_one_line_and_told_anew(
    nodes, redis, guild, caplog
):
    caplog.set_level("INFO")
    for guild_id in (guild.id, 1, 2):
        await redis.ask("HSET", "spywatcher:guilds", guild_id, b"\x93\x01")
    await two_nodes(nodes)
    told = [r.getMessage() for r in caplog.records if "another version wrote" in r.getMessage()]
    assert told[0].startswith("another version wrote 3 guilds")
    await eventually(lambda: all(guild.id in s.node.known.guilds for s in nodes.servers))


@pytest.mark.logs("_beat failed, and begins anew")
async def test_a_holder_whose_beat_fails_once_beats_on(nodes, monkeypatch):
    await two_nodes(nodes)
    holder, listening = nodes.holder.node, other(nodes).node

    def fail() -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(holder.peers, "forget", fail)
    await eventually(lambda: holder.peers.forget != fail)
    failed = spywatcher_cluster.boot_clock() + spywatcher_cluster.BEAT_INTERVAL
    await eventually(lambda: listening.known._heard > failed)


async def test_a_frozen_redis_keeps_no_first_subscriber_waiting(nodes, redis, guild):
    await nodes.add()
    await nodes.ready()
    token = viewer_token()
    dashboard = await nodes.js.connect(f"http://127.0.0.1:{nodes.servers[0].port}", token=token)
    redis.freeze()
    assert (await dashboard.call("subscribe:guild", str(guild.id), timeout=1))["ok"]
    redis.thaw()


async def test_a_cancellation_that_redis_swallows_at_a_takeover_holds_up_no_stop(
    nodes, monkeypatch
):
    begun = asyncio.Event()

    async def load(windows: Windows) -> list[Topic]:
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return []

    monkeypatch.setattr(Windows, "load", load)
    server = await nodes.add()
    await begun.wait()
    async with within(2):
        await server.stop()


async def test_a_node_that_holds_the_gateway_again_says_when_it_is_connected(nodes, caplog):
    caplog.set_level(logging.INFO, "spywatcher")
    lease = (await nodes.add()).node.lease
    for times in (1, 2):
        await eventually(
            lambda n=times: caplog.text.count("connected to Discord: a new session") == n,
        )
        await lease.release()
        lease.wanted = True


@pytest.mark.logs("plugins and gateway not closed within 0.5 s")
async def test_a_holder_whose_plugins_never_finish_lets_go_of_the_gateway(nodes, tmp_path):
    (tmp_path / "stuck.py").write_text(
        "import asyncio\nasync def teardown(spy):\n    await asyncio.Event().wait()\n"
    )
    holder = await nodes.add(plugins={"folders": [str(tmp_path)]}, server={"shutdown_grace": 0.5})
    await nodes.ready()
    next_one = await nodes.add()
    await nodes.ready()
    await holder.stop()
    await eventually(next_one.node.lease.holds, timeout=2)


@asynccontextmanager
async def in_processes(
    nodes: Nodes, tmp_path: Path, *command: str, count: int = 3, **tables: dict[str, Any]
) -> AsyncIterator[list[Service]]:
    """Nodes in processes of their own, hurried unless by another command."""
    async with AsyncExitStack() as stack:
        services = []
        for number in range(count):
            folder = tmp_path / f"node{number}"
            folder.mkdir()
            redis = {"url": nodes.redis.url}
            own = {"port": free_port()}  # a restart keeps it
            write_settings(folder, tables_for(nodes.discord, redis=redis, server=own, **tables))
            services.append(await stack.enter_async_context(process_in(folder, *command)))
        for service in services:
            await eventually(lambda s=service: part(s, "server", "redis"))
        yield services


def process_in(folder: Path, *command: str) -> AbstractAsyncContextManager[Service]:
    return running(folder, command=command or (sys.executable, "-c", HURRIED))


@pytest.mark.faults
@pytest.mark.usefixtures("hurried")
async def test_a_new_node_and_an_emptied_redis_make_no_second_holder_of_one_cut_off(nodes, redis):
    await two_nodes(nodes)
    cut_off = nodes.holder
    await nodes.proxies[nodes.servers.index(cut_off)].cut()
    await redis.kill()
    await redis.start(empty=True)
    await nodes.add()
    while cut_off.node.lease.holds():
        assert not any(s.node.lease.holds() for s in nodes.servers if s is not cut_off)
        await asyncio.sleep(0.01)
    await eventually(lambda: any(s.node.lease.holds() for s in nodes.servers), timeout=5)


@pytest.fixture
async def processes(nodes: Nodes, tmp_path: Path) -> AsyncIterator[list[Service]]:
    async with in_processes(nodes, tmp_path) as services:
        yield services


async def part(service: Service, *parts: str) -> dict[str, Any] | None:
    """What /health/ready says of the last of these parts, once none of them has a problem."""
    health = json.loads((await service.get("/health/ready")).body)["parts"]
    sound = all(health[name]["problem"] is None for name in parts)
    return dict(health[parts[-1]]) if sound else None


async def find_holder(services: list[Service]) -> int:
    async def find() -> list[int]:
        parts = [await part(service, "redis") for service in services]
        return [number for number, one in enumerate(parts) if one and one["gateway"] == "held"]

    [holder] = await eventually(find)
    return holder


async def watch(nodes: Nodes, services: list[Service]) -> list[Dashboard]:
    return [await nodes.dashboard(service) for service in services]  # type: ignore[arg-type]


@pytest.mark.faults
async def test_a_holder_that_is_killed_is_replaced_within_ten_seconds(nodes, tmp_path):
    """As the product is; what its throttle holds back comes at the end of the window."""
    script, window = str(ROOT / "spywatcher.py"), {"analytics:update": 13.0}
    command = sys.executable, script
    async with in_processes(nodes, tmp_path, *command, throttle=window) as processes:
        dashboards = await watch(nodes, processes)
        holder = await find_holder(processes)
        left = [d for number, d in enumerate(dashboards) if number != holder]
        async with chatting(nodes):
            await left[0].call("subscribe:analytics", str(nodes.guild.id))
            await eventually(lambda: len(updates(left[0])) == 2)  # what is, and what has changed
            await eventually(lambda: kept(nodes.redis, b" true"))
            killed = time.monotonic()
            processes[holder].process.kill()
            await eventually(lambda: min(map(last_message, left)) > killed + 2, timeout=12)
            await eventually(lambda: len(updates(left[0])) == 3)
    for dashboard in left:
        in_order_and_once(dashboard)
        assert longest_silence(dashboard, killed) <= 10
    _, before, after = updates(left[0])
    assert after - before >= 13.0 - 0.1
    assert clock.lasted(before, after) <= 13.0 + 1


def updates(dashboard: Dashboard) -> list[float]:
    """When the lists came."""
    return [event.monotonic for event in dashboard.events("analytics:update")]


@pytest.mark.faults
async def test_a_holder_that_sleeps_says_nothing_when_it_wakes(nodes, processes):
    dashboards = await watch(nodes, processes)
    holder = await find_holder(processes)
    async with chatting(nodes) as sent:
        await eventually(lambda: all(len(authors(d)) > 20 for d in dashboards))
        stopped = time.monotonic()
        processes[holder].process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(of_a_term(12 / 8) / HURRY)
        processes[holder].process.send_signal(signal.SIGCONT)
        count = len(sent)
        await eventually(lambda: len(sent) > count + 50)
    await eventually(lambda: len({authors(d)[-1] for d in dashboards}) == 1)
    for dashboard in dashboards:
        in_order_and_once(dashboard)
    assert longest_silence(dashboards[holder - 1], stopped) <= 10


@pytest.mark.faults
async def test_a_clean_stop_hands_the_gateway_over_at_once(nodes, processes):
    dashboards = await watch(nodes, processes)
    holder = await find_holder(processes)
    async with chatting(nodes):
        await eventually(lambda: all(len(authors(d)) > 20 for d in dashboards))
        stopped = time.monotonic()
        processes[holder].process.terminate()
        left = [d for number, d in enumerate(dashboards) if number != holder]
        await eventually(lambda: min(map(last_message, left)) > stopped + 3)
    for dashboard in left:
        in_order_and_once(dashboard)
        assert longest_silence(dashboard, stopped) <= 2


async def hold_back(nodes: Nodes, watching: Dashboard) -> None:
    """Have a window opened for two events, with something that waits for the end of each."""
    # The holder has loaded the counts: each greeting has lists from now on.
    await eventually(lambda: nodes.redis.ask("HGET", "spywatcher:shared:analytics", "term"))
    await watching.call("subscribe:analytics", str(nodes.guild.id))
    ada, late = nodes.guild.add_member("ada"), nodes.guild.add_channel("late")

    async def both_came() -> bool:
        """The holder learns within a second that somebody listens, and sends nothing before."""
        await nodes.discord.message(nodes.guild, ada, nodes.guild.general)
        greeting_too = len(watching.events("analytics:update")) == 2
        return greeting_too and bool(watching.events("message:new"))

    await eventually(both_came)
    await nodes.discord.message(nodes.guild, ada, late)
    await eventually(lambda: kept(nodes.redis, f'"channelId":"{late.id}"'.encode(), b" true"))


async def kept(redis: RedisServer, *parts: bytes) -> bool:
    """Whether Redis knows of open windows for whose end these wait."""
    windows = b"".join(await redis.ask("HVALS", "spywatcher:windows"))
    return all(part in windows for part in parts)


async def comes_at_the_end(watching: Dashboard, window: float) -> None:
    """What was held back came once, at the end of the window that the last holder opened."""
    await eventually(lambda: len(watching.events("message:new")) == 2, timeout=window + 3)
    await eventually(lambda: len(watching.events("analytics:update")) == 3)
    early, late = (data["channelId"] for data in watching.received("message:new"))
    assert early != late
    for name in ("message:new", "analytics:update"):
        before, after = (event.monotonic for event in watching.events(name)[-2:])
        assert window - 0.1 <= after - before
        assert clock.lasted(before, after) <= window + 1


THROTTLE = {"message:new": 4.0, "analytics:update": 4.0}


async def test_a_window_outlives_a_clean_stop_of_the_holder(nodes, redis):
    for _ in range(2):
        await nodes.add(throttle=THROTTLE)
    await nodes.ready()
    watching = await nodes.dashboard(other(nodes))
    await hold_back(nodes, watching)
    await nodes.holder.stop()
    await comes_at_the_end(watching, 4.0)
    await eventually(lambda: redis.ask("EXISTS", "spywatcher:windows"))
    await eventually(lambda: gone(redis, "spywatcher:windows"))


async def gone(redis: RedisServer, key: str) -> bool:
    return not await redis.ask("EXISTS", key)


@pytest.mark.faults
@pytest.mark.usefixtures("hurried")
async def test_a_holder_that_is_cut_off_sends_nothing_at_the_end_of_a_window(nodes, redis):
    window = of_a_term(13 / 8)
    for _ in range(2):
        await nodes.add(throttle=dict.fromkeys(THROTTLE, window))
    await nodes.ready()
    holder = nodes.servers.index(nodes.holder)
    watching = await nodes.dashboard(nodes.servers[1 - holder])
    at_the_holder = await nodes.dashboard(nodes.servers[holder])
    await hold_back(nodes, watching)
    await nodes.proxies[holder].cut()
    await eventually(lambda: nodes.servers[1 - holder].node.lease.holds(), timeout=10)
    await nodes.proxies[holder].mend()
    await comes_at_the_end(watching, window)
    await eventually(lambda: len(at_the_holder.events("message:new")) == 2)
    await at_the_holder.call("guilds:list")
    assert len(at_the_holder.events("message:new")) == 2


def other(nodes: Nodes) -> Server:
    """A node that does not hold the gateway."""
    return next(server for server in nodes.servers if server is not nodes.holder)


async def test_a_right_lost_takes_the_viewer_out_of_rooms_on_another_node(nodes, redis, guild):
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manager])
    await two_nodes(nodes)
    dashboard = await nodes.dashboard(other(nodes), str(ada.id), "USER")
    await nodes.discord.remove_role(guild, ada, manager)
    error = await dashboard.next("error", timeout=1)
    assert error["code"] == "forbidden"
    await nodes.discord.message(guild, ada, guild.general)
    await nodes.discord.caught_up()
    await dashboard.quiet("message:new")


async def test_a_role_that_is_edited_counts_on_another_node(nodes, redis, guild):
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manager])
    await two_nodes(nodes)
    dashboard = await nodes.dashboard(other(nodes), str(ada.id), "USER")
    await nodes.discord.role_update(guild, manager, permissions=0)
    assert (await dashboard.next("error", timeout=1))["code"] == "forbidden"


async def test_a_member_without_the_right_is_refused_on_every_node(nodes, redis, guild):
    ada = guild.add_member("ada")
    await two_nodes(nodes)
    for server in nodes.servers:
        token = Tokens(Keys((SECRET,)), ["HS256"]).issue(str(ada.id), "USER")
        dashboard = await nodes.js.connect(f"http://127.0.0.1:{server.port}", token=token)
        await dashboard.call("subscribe:guild", str(guild.id))  # perhaps pending for a moment
        assert (await dashboard.next("error"))["code"] == "forbidden"
        assert (await dashboard.call("guilds:list"))["guilds"] == []


async def test_a_hidden_channel_stays_hidden_on_another_node(nodes, redis, guild):
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manager])
    secret = guild.add_channel("secret", overwrites=hidden_except(guild))
    await two_nodes(nodes)
    dashboard = await nodes.dashboard(other(nodes), str(ada.id), "USER")
    await nodes.discord.message(guild, guild.owner, secret)
    await nodes.discord.message(guild, guild.owner, guild.general)
    assert (await dashboard.next("message:new"))["channelName"] == "general"


async def test_threads_that_discord_lists_are_known_on_another_node(nodes, guild):
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manager])
    await two_nodes(nodes)
    dashboard = await nodes.dashboard(other(nodes), str(ada.id), "USER")
    thread = guild.add_thread("plans", guild.general)
    body = {"guild_id": str(guild.id), "threads": [thread.to_json()], "members": []}
    await nodes.discord.dispatch("THREAD_LIST_SYNC", body)
    await nodes.discord.message(guild, guild.owner, thread)
    assert (await dashboard.next("message:new"))["channelName"] == "plans"


async def test_a_channel_that_is_closed_is_closed_before_its_next_event(nodes, redis, guild):
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manager])
    room = guild.add_channel("room")
    await two_nodes(nodes)
    dashboard = await nodes.dashboard(other(nodes), str(ada.id), "USER")
    for _ in range(20):
        await nodes.discord.channel_update(guild, room, overwrites=hidden_except(guild))
        await nodes.discord.message(guild, guild.owner, room)
        await nodes.discord.channel_update(guild, room, overwrites=[])
        await nodes.discord.message(guild, guild.owner, guild.general)
    await eventually(lambda: len(dashboard.received("message:new")) == 20)
    assert {data["channelName"] for data in dashboard.received("message:new")} == {"general"}


@pytest.mark.logs("address 127.0.0.1 blocked", required=False)
async def test_an_address_blocked_by_one_node_is_blocked_by_all(nodes, redis):
    await two_nodes(nodes)
    first, second = (f"http://127.0.0.1:{server.port}" for server in nodes.servers)
    for _ in range(5):
        await nodes.js.refused(first, token="nonsense")
    assert (
        await nodes.js.refused(second, token="nonsense", transports=["polling"])
    ).description == 429


async def shares(redis: RedisServer) -> dict[str, int]:
    """How many open connections Redis knows of, by whose they are."""
    found = Counter[str]()
    for key in await redis.ask("KEYS", "spywatcher:open:*"):
        for whose, count in (await redis.ask("HGETALL", key)).items():
            found[whose.decode()] += int(count)
    return found


async def become(redis: RedisServer, **expected: int) -> None:
    async def are() -> bool:
        return await shares(redis) == {name.replace("_", "/"): n for name, n in expected.items()}

    await eventually(are)


LIMITS = [("connections_per_ip", ("1", "2", "3")), ("connections_per_viewer", ("1", "1", "1"))]


@pytest.mark.parametrize(("limit", "viewers"), LIMITS, ids=["address", "viewer"])
async def test_connections_are_counted_on_all_nodes_together(nodes, redis, limit, viewers):
    for _ in range(2):
        await nodes.add(limits={limit: 2})
    await nodes.ready()
    first, second = nodes.servers
    leaving = await nodes.dashboard(first, viewers[0])
    await nodes.dashboard(second, viewers[1])
    for server in nodes.servers:
        url = f"http://127.0.0.1:{server.port}"
        refused = await nodes.js.refused(url, token=viewer_token(discord_id=viewers[2]))
        assert (refused.message, refused.data) == ("Too many connections", {"retryAfter": 10})
    await leaving.disconnect()
    await eventually(lambda: not first.limits.open)
    await become(redis, **{"127.0.0.1": 1, f"viewer_{viewers[1]}": 1})
    await nodes.dashboard(second, viewers[2])


async def test_of_clients_that_come_at_once_at_two_nodes_no_more_get_in_than_may(
    nodes, redis, monkeypatch
):
    monkeypatch.setattr(Link, "PATIENCE", 5.0)  # on a busy machine Redis seems slow
    for _ in range(2):
        await nodes.add(limits={"connections_per_viewer": 10})
    await nodes.ready()
    urls = [f"http://127.0.0.1:{server.port}" for server in nodes.servers] * 20

    async def try_one(url: str) -> int:
        dashboard = await nodes.js.open(url, token=viewer_token(), transports=["websocket"])
        return isinstance(await dashboard.first_answer(5), State)

    assert sum(await asyncio.gather(*map(try_one, urls))) == 10
    await become(redis, **{"127.0.0.1": 10, "viewer_1": 10})


async def test_connections_that_are_gone_leave_nothing_in_redis(nodes, redis):
    await nodes.add()
    await nodes.add()
    await nodes.ready()
    for _ in range(5):
        came = [await nodes.dashboard(s, str(n)) for n in range(1, 11) for s in nodes.servers]
        await asyncio.gather(*(dashboard.disconnect() for dashboard in came))
    await become(redis)


async def test_a_clean_stop_takes_a_node_s_share_of_connections_along(nodes, redis):
    await two_nodes(nodes)
    await become(redis, **{"127.0.0.1": 2, "viewer_1": 2})
    await nodes.servers[0].stop()
    await become(redis, **{"127.0.0.1": 1, "viewer_1": 1})


async def test_the_share_of_a_node_that_is_gone_is_forgotten_and_that_of_others_is_not(
    nodes, redis, monkeypatch
):
    monkeypatch.setattr(spywatcher_cluster, "ROLL_CALL", 1.0)
    await two_nodes(nodes, limits={"connections_per_viewer": 2})
    await become(redis, **{"127.0.0.1": 2, "viewer_1": 2})
    await nodes.proxies[0].cut()
    url = f"http://127.0.0.1:{nodes.servers[1].port}"
    assert (await nodes.js.refused(url, token=viewer_token())).message == "Too many connections"
    cut = time.monotonic()

    async def gets_in() -> bool:
        dashboard = await nodes.js.open(url, token=viewer_token())
        return isinstance(await dashboard.first_answer(5), State)

    await eventually(gets_in)
    assert time.monotonic() - cut > 1
    assert clock.lasted(cut, time.monotonic()) < 4
    until = time.monotonic() + 4  # longer than a share lasts that is not told again
    while time.monotonic() < until:
        await become(redis, **{"127.0.0.1": 2, "viewer_1": 2})


async def test_without_redis_a_node_counts_its_own_connections_and_tells_them_later(nodes, redis):
    for _ in range(2):
        await nodes.add(limits={"connections_per_viewer": 2})
    await nodes.ready()
    urls = [f"http://127.0.0.1:{server.port}" for server in nodes.servers]
    await redis.kill()
    for url in urls * 2:
        await nodes.js.connect(url, token=viewer_token(), transports=["websocket"], timeout=1)
    for url in urls:
        refused = await nodes.js.refused(url, token=viewer_token())
        assert refused.message == "Too many connections"
    await redis.start(empty=True)
    await eventually(lambda: len(nodes.servers[0].limits.open) == 2)
    await become(redis, **{"127.0.0.1": 4, "viewer_1": 4})


async def test_a_frozen_redis_keeps_no_client_waiting_and_refuses_none(nodes, redis):
    await nodes.add()
    await nodes.ready()
    redis.freeze()
    url = f"http://127.0.0.1:{nodes.servers[0].port}"
    async with within(1):
        for _ in range(3):
            await nodes.js.connect(url, token=viewer_token(), transports=["websocket"])
    redis.thaw()
    await become(redis, **{"127.0.0.1": 3, "viewer_1": 3})


async def test_a_redis_that_is_empty_all_at_once_is_told_everything_again(nodes, redis):
    await two_nodes(nodes)
    await become(redis, **{"127.0.0.1": 2, "viewer_1": 2})
    await redis.kill()
    await redis.start(empty=True)
    await eventually(lambda: redis.ask("EXISTS", "spywatcher:guilds"))
    await become(redis, **{"127.0.0.1": 2, "viewer_1": 2})


async def test_nodes_that_start_without_redis_serve_and_say_so(nodes, redis):
    await redis.kill()
    server = await nodes.add()
    await nodes.add()
    await eventually(lambda: server.problem == "no connection to Redis")
    dashboard = await nodes.js.connect(
        f"http://127.0.0.1:{server.port}",
        token=Tokens(Keys((SECRET,)), ["HS256"]).issue("1", "ADMIN"),
    )
    assert (await dashboard.call("guilds:list"))["guilds"] == []
    await redis.start()
    await nodes.ready()
    assert len((await dashboard.call("guilds:list"))["guilds"]) == 1


@pytest.mark.faults
@pytest.mark.usefixtures("hurried")
async def test_a_node_without_fresh_truth_admits_nobody_new(nodes, redis, guild):
    await two_nodes(nodes)
    server = other(nodes)
    cut_off = nodes.servers.index(server)
    await nodes.proxies[cut_off].cut()
    await eventually(lambda: not server.node.known.fresh)
    room = f"guild:{guild.id}"
    coming = asyncio.create_task(nodes.dashboard(server))
    await asyncio.wait([coming], timeout=1)
    assert len(server.rooms.members(room)) == 1
    await nodes.proxies[cut_off].mend()
    late = await coming
    await nodes.discord.message(guild, guild.owner, guild.general)
    await late.next("message:new")


async def grown(redis: RedisServer, stream: str, length: int) -> bool:
    return bool(await redis.ask("XLEN", stream) >= length)


@pytest.mark.logs("does not hear itself")
async def test_a_deaf_node_says_so_and_subscribes_anew(nodes, redis, monkeypatch):
    monkeypatch.setattr(Reader, "PROBE_INTERVAL", 0.2)
    await two_nodes(nodes)
    server = nodes.servers[0]
    own = f"spywatcher:node:{server.node.source}"
    in_a_year = int((time.time() + 365 * 86_400) * 1000)
    await redis.ask("XADD", own, f"{in_a_year}-0", "n", b"")
    length = await redis.ask("XLEN", own)
    await eventually(lambda: grown(redis, own, length + 2))  # it probes on, and has read that far
    await redis.ask("DEL", own)  # what comes now has earlier ids, as of a clock that was set back
    await eventually(lambda: (server.problem or "").startswith("deaf"))
    await eventually(lambda: server.problem is None)


@pytest.mark.logs("other nodes miss events", "events of another node were lost")
async def test_what_waits_for_redis_is_bounded_and_the_oldest_goes(
    nodes, redis, guild, monkeypatch
):
    monkeypatch.setattr(Publisher, "MOST_WAITING", 100)
    dashboards = await two_nodes(nodes)
    say(nodes.servers[0], guild, 0)
    await eventually(lambda: len(numbers(dashboards[1])) == 1)
    await nodes.proxies[0].cut()
    for number in range(1, 1001):
        say(nodes.servers[0], guild, number)
    assert len(nodes.servers[0].node.publisher) <= 100
    await nodes.proxies[0].mend()
    await eventually(lambda: numbers(dashboards[1])[-1] == 1000)
    assert numbers(dashboards[0]) == list(range(1001))
    got = numbers(dashboards[1])[1:]
    assert got == list(range(1001 - len(got), 1001))


def figure(server: Server, name: str) -> float | None:
    """As a scrape says."""
    return server.metrics.registry.get_sample_value(f"spywatcher_{name}")


def streams(server: Server) -> float | None:
    """How many of Redis' streams this node reads."""
    return figure(server, "redis_streams")


async def test_a_node_reads_only_the_guilds_of_its_own_clients(nodes, redis, guild, monkeypatch):
    monkeypatch.setattr(Reader, "LINGER", 0.1)
    await nodes.add()
    await nodes.add()
    await nodes.ready()
    idle = streams(nodes.servers[1])
    dashboard = await nodes.dashboard(nodes.servers[0])
    assert (streams(nodes.servers[0]), streams(nodes.servers[1])) == (idle + 1, idle)
    await dashboard.call("unsubscribe:guild", str(guild.id))
    await eventually(lambda: streams(nodes.servers[0]) == idle)


async def test_a_new_subscriber_of_any_node_is_greeted_by_the_holder(nodes, guild):
    ada = guild.add_member("ada")
    await two_nodes(nodes)
    for _ in range(5):
        await nodes.discord.typing(guild, ada, guild.general)
    await nodes.discord.caught_up()
    dashboard = await nodes.dashboard(other(nodes))
    await eventually(lambda: nodes.holder.node.peers.has_listeners(f"guild:{guild.id}"))
    await dashboard.call("subscribe:analytics", str(guild.id))
    update = await dashboard.next("analytics:update")
    assert [ghost["username"] for ghost in update["data"]["ghosts"]] == ["ada"]


async def test_an_event_reaches_another_node_though_nobody_listens_at_the_holder(nodes, guild):
    await nodes.add()
    await nodes.add()
    await nodes.ready()
    dashboard = await nodes.dashboard(other(nodes))
    await nodes.discord.message(guild, guild.owner, guild.general)
    await dashboard.next("message:new")


async def test_a_viewer_on_two_nodes_keeps_its_guilds_when_one_dashboard_leaves(nodes, guild):
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manager])
    second = nodes.discord.add_guild(name="Second")
    second.members[ada.id] = ada
    await two_nodes(nodes)
    here = await nodes.dashboard(nodes.holder, str(ada.id), "USER")
    there = await nodes.dashboard(other(nodes), str(ada.id), "USER")
    await here.disconnect()
    plain = guild.add_role("plain")
    await nodes.discord.add_role(guild, ada, plain)
    await nodes.discord.message(guild, guild.owner, guild.general)
    await there.next("message:new")
    await there.quiet("error")


async def test_a_subscription_on_any_node_waits_for_a_shard_that_is_not_there_yet(
    nodes, discord, waiting_shard
):
    here, there = discord.add_guild(guild_id=2 << 22), discord.add_guild(guild_id=3 << 22)
    for _ in range(2):
        await nodes.add()
    for server in nodes.servers:
        await eventually(lambda s=server: s.node.known.knows(here.id))
    nodes.guild = there
    subscribing = [asyncio.create_task(nodes.dashboard(server)) for server in nodes.servers]
    done, _ = await asyncio.wait(subscribing, timeout=1)
    assert not done
    waiting_shard.set_result(None)
    await asyncio.gather(*subscribing)


@pytest.mark.faults
async def test_a_busy_guild_slows_no_other_and_costs_nodes_without_its_viewers_nothing(
    nodes, guild
):
    dashboards = await two_nodes(nodes)

    async def delay(rate: float) -> float:
        before = len(numbers(dashboards[1]))
        async with talking(nodes.servers[0], guild, rate=20) as sent:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                for _ in range(int(rate / 100)):
                    nodes.servers[0].node.deliver("test:busy", "4711", {"number": 1}, "guild")
                await asyncio.sleep(0.01)
        await eventually(lambda: len(numbers(dashboards[1])) == before + len(sent))
        came = dashboards[1].events("test:event")[before:]
        took = sorted(event.monotonic - at for event, at in zip(came, sent, strict=True))
        return took[len(took) // 2]

    read = streams(nodes.servers[1])
    quiet, busy = zip(*[(await delay(0), await delay(1000)) for _ in range(4)], strict=True)
    assert min(busy) <= min(quiet) * 1.2 + 0.003
    assert streams(nodes.servers[1]) == read


class Balancer(Proxy):
    """Passes each connection on to the next node that takes it, as a web server before them does."""

    def __init__(self, *ports: int) -> None:
        super().__init__(0)
        self.ports = list(ports)
        #: When each connection came.
        self.moments: list[float] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.moments.append(time.monotonic())
        for _ in range(len(self.ports)):
            self.ports.append(self.ports.pop(0))
            with suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", self.ports[-1])
        raise ConnectionRefusedError


def busiest(moments: list[float], seconds: float = 0.1) -> int:
    """The most of these moments, the first first, that lie within so many seconds."""
    return max(bisect(moments, moment + seconds) - n for n, moment in enumerate(moments))


async def clients_of(service: Service) -> int:
    text = (await service.get("/metrics")).body.decode()
    return int(float(re.search(r"^spywatcher_dashboards (.+)$", text, re.MULTILINE)[1]))


@pytest.mark.faults
async def test_a_rolling_restart_brings_every_client_back_soon_and_not_all_at_once(
    nodes, processes, tmp_path
):
    async with AsyncExitStack() as stack:
        balancer = await stack.enter_async_context(Balancer(*(s.port for s in processes)))
        dashboards = [
            await page(nodes, balancer, viewer=str(number), **STOCK) for number in range(CROWD)
        ]
        await stack.enter_async_context(chatting(nodes, rate=2))
        for number, service in enumerate(processes):
            leaving = await clients_of(service)
            before = {dashboard.id for dashboard in dashboards}
            balancer.moments.clear()
            service.process.terminate()
            await eventually(
                lambda n=CROWD - leaving, b=before: len(b & {d.id for d in dashboards}) == n,
            )
            assert busiest(balancer.moments) <= max(20, leaving / 5)  # of a hundred, twenty
            assert await service.exit_status() == 0
            again = await stack.enter_async_context(process_in(tmp_path / f"node{number}"))
            await eventually(lambda s=again: part(s, "server", "redis"))
        last = authors(dashboards[0])[-1] + 2
        await eventually(lambda: all(authors(d)[-1] >= last for d in dashboards))
        for dashboard in dashboards:
            assert up_to(last, dashboard) == up_to(last, dashboards[0])
        assert all(map(always_recovered, dashboards))
        await balancer.cut()


def up_to(last: int, dashboard: Dashboard) -> list[int]:
    return [number for number in authors(dashboard) if number <= last]


def places(dashboard: Dashboard) -> list[str]:
    return [data["channelName"] for data in dashboard.received("message:new")]


async def test_a_role_counts_at_its_place_among_the_messages_on_another_node(nodes, redis, guild):
    """Between two messages of one millisecond, too; so do owners."""
    manager, secret = guild.add_role("manager", Permission.MANAGE_GUILD), guild.add_role("secret")
    ada = guild.add_member("ada", roles=[manager])
    room = guild.add_channel("room", overwrites=hidden_except(guild, secret))
    await two_nodes(nodes)
    dashboard = await nodes.dashboard(other(nodes), str(ada.id), "USER")
    for number in range(1, 4):
        for _ in range(60):
            await nodes.discord.message(guild, guild.owner, room)
        await nodes.discord.add_role(guild, ada, secret)
        for _ in range(60):
            await nodes.discord.message(guild, guild.owner, room)
        await nodes.discord.remove_role(guild, ada, secret)
        await nodes.discord.message(guild, guild.owner, guild.general)
        await eventually(lambda n=number: places(dashboard).count("general") == n)
        assert len(places(dashboard)) == number * 61


@pytest.mark.faults
@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("how", ["cut off", "let go"])
async def test_after_a_takeover_everybody_is_judged_anew(nodes, redis, guild, how):
    """Also where another follows at once, so that no node ever missed a holder."""
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    people = [guild.add_member(name, roles=[manager]) for name in ("ada", "bob", "eve")]
    await two_nodes(nodes)
    await nodes.add()
    await nodes.ready()
    holder = nodes.servers.index(nodes.holder)
    survivors = [server for server in nodes.servers if server is not nodes.holder]
    dashboards = [
        await nodes.dashboard(server, str(one.id), "USER") for server in survivors for one in people
    ]
    ada, bob, _ = people
    ada.role_ids.clear()
    del guild.members[bob.id]
    if how == "let go":
        await nodes.holder.node.lease.release()
    else:
        await nodes.proxies[holder].cut()
    await eventually(lambda: any(one.node.lease.holds() for one in survivors))
    new = nodes.holder
    await eventually(lambda: new.access.all_whole)
    for dashboard in (*dashboards[:2], *dashboards[3:5]):
        assert (await dashboard.next("error", timeout=1))["code"] == "forbidden"
    await nodes.discord.message(guild, guild.owner, guild.general)
    for dashboard in (dashboards[2], dashboards[5]):
        await dashboard.next("message:new")


class Gate:
    """While it is shut, Discord answers no bot that wants to begin a session."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.opened.set_result(None)

    def shut(self) -> None:
        self.opened = asyncio.get_running_loop().create_future()

    def open(self) -> None:
        self.opened.set_result(None)


@pytest.fixture
async def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, receive = Gate(), GatewaySocket._receive

    def hold(socket: GatewaySocket, packet: Packet) -> None:
        if packet.op == Op.IDENTIFY:
            gate.opened.add_done_callback(lambda _: receive(socket, packet))
        else:
            receive(socket, packet)

    monkeypatch.setattr(GatewaySocket, "_receive", hold)
    return gate


@pytest.mark.faults
async def test_nobody_is_let_in_by_what_the_last_holder_told(nodes, guild, gate):
    ada = guild.add_member("ada", roles=[guild.add_role("manager", Permission.MANAGE_GUILD)])
    await two_nodes(nodes)
    before, after = nodes.holder, other(nodes)
    for server in nodes.servers:  # that she may is known
        await nodes.dashboard(server, str(ada.id), "USER")
    gate.shut()
    ada.role_ids.clear()  # while nobody holds the gateway
    await before.node.lease.release()
    await eventually(lambda: after.node.leading)
    await eventually(lambda: before.node.lease.known == after.node.lease.term)
    coming = [
        await nodes.js.connect(
            f"http://127.0.0.1:{server.port}", token=viewer_token("USER", str(ada.id))
        )
        for server in nodes.servers
    ]
    for dashboard in coming:
        assert (await dashboard.call("subscribe:guild", str(guild.id)))["pending"]
    gate.open()
    for dashboard in coming:
        assert (await dashboard.next("error", timeout=10))["code"] == "forbidden"


@pytest.mark.faults
@pytest.mark.usefixtures("hurried")
async def test_a_new_holder_judges_before_it_beats_for_the_first_time(nodes, guild, monkeypatch):
    ada = guild.add_member("ada", roles=[guild.add_role("manager", Permission.MANAGE_GUILD)])
    await two_nodes(nodes)
    before, after = nodes.servers.index(nodes.holder), other(nodes)
    dashboard = await nodes.dashboard(after, str(ada.id), "USER")
    ada.role_ids.clear()
    monkeypatch.setattr(spywatcher_cluster, "BEAT_INTERVAL", 60.0)
    await nodes.proxies[before].cut()
    await eventually(lambda: after.node.lease.holds() and after.access.all_whole)
    assert (await dashboard.next("error", timeout=2))["code"] == "forbidden"


@pytest.mark.faults
async def test_a_new_holder_learns_of_viewers_whose_coming_it_missed(nodes, redis, guild):
    manager = guild.add_role("manager", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manager])
    await two_nodes(nodes)
    deaf, holder = other(nodes), nodes.holder
    third = await nodes.add()
    await nodes.ready()
    proxy = nodes.proxies[nodes.servers.index(deaf)]
    await proxy.cut()
    there = await nodes.dashboard(third, str(ada.id), "USER")
    await redis.ask("XTRIM", spywatcher_cluster.CONTROL, "MAXLEN", 0)
    await proxy.mend()
    await eventually(lambda: deaf.node.link.up)
    third.node.lease.wanted = False
    await holder.node.lease.release()
    await eventually(lambda: deaf.node.lease.holds() and deaf.access.all_whole, timeout=10)
    await nodes.discord.remove_role(guild, ada, manager)
    assert (await there.next("error", timeout=2))["code"] == "forbidden"
