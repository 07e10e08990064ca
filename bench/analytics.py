"""The analytics plugin against one row per event, side by side: 100,000 members, 7 days, 5,000,000 events.

    python bench/analytics.py [--small] [--seed N] [--sharing]

Both sides get the same events and answer with the same three lists. The plugin's listeners are
called with prepared event objects, as hikari would call them, on a running event loop; the
other side is what one would write first: a table with a row per event and an index on guild and
time, three GROUP BY queries per update. Then a real server, with a pretend Discord of all those
members and a dashboard over loopback, tells what updates cost everybody else.

At last, or with --sharing alone: what it costs to share the counts with other nodes over Redis. The
same events are taken with and without it, in turn, and a second holder loads what is there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hikari
import tornado.websocket

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from redisserver import RedisServer  # noqa: E402  # after the path

from simulator import Guild, PretendDiscord  # noqa: E402
from spywatcher import Keys, Presence, RedisSettings, Server, load_module, parse_settings  # noqa: E402
from spywatcher_cluster import TERM, Link, SharedTables  # noqa: E402

GUILD = 81_384_788_765_712_384
FIRST_CHANNEL = 201_384_788_765_712_384
FIRST_MEMBER = 301_384_788_765_712_384
CHANNELS = 50
DAYS = 7
#: The table's word for a kind of event, and how many of 100 are of that kind.
KINDS = (("typing", 35), ("message", 30), ("reaction", 15), ("presence", 20))
#: Events handed to the listeners before the loop gets a turn.
SLICE = 200
SECRET = "nothing but a benchmark's secret"

Event = tuple[float, int, int, str]  # when, member, channel, kind

THERE = Presence("online", frozenset({"desktop"}))
AWAY = Presence("offline", frozenset())


def make_events(members: int, events: int, seed: int, end: float) -> Iterator[Event]:
    """In order of time. A tenth of the members does a third of everything; each uses few channels."""
    chance = random.Random(seed)
    kinds = [kind for kind, percent in KINDS for _ in range(percent)]
    step = DAYS * 86_400 / events
    start = end - DAYS * 86_400 + 3600
    for number in range(events):
        member = int(members * chance.random() ** 2)
        kind = kinds[chance.randrange(100)]
        channel = (member * 7 + int(12 * chance.random() ** 2)) % CHANNELS
        moment = min(start + number * step, end)
        yield moment, member, 0 if kind == "presence" else FIRST_CHANNEL + channel, kind


# ---- the plugin ------------------------------------------------------------


def make_server(folder: Path, discord: PretendDiscord) -> Server:
    settings = parse_settings(
        {
            "server": {"port": 0},
            "discord": {"rest_url": discord.rest_url, "startup_grace": 0.0},
            "storage": {"path": str(folder / "plugin.db")},
            "limits": {"events_per_connection": "1000/second"},
            "plugins": {"folders": [str(ROOT / "plugins")]},
        },
        folder,
    )
    return Server(settings, keys=Keys(secrets=(SECRET,)), token=discord.token)


def prepare(module: Any, event: Event, online: dict[int, bool], spy: Any) -> Callable[[], Any]:
    """The call that hikari would make."""
    _, number, channel, kind = event
    member = SimpleNamespace(is_bot=False)
    about = SimpleNamespace(
        guild_id=GUILD,
        user_id=FIRST_MEMBER + number,
        author_id=FIRST_MEMBER + number,
        channel_id=channel,
        member=member,
    )
    if kind == "typing":
        return lambda: module.typing(about)
    if kind == "reaction":
        return lambda: module.reaction(about)
    if kind == "message":
        about.is_human = True
        about.message = SimpleNamespace(type=hikari.MessageType.DEFAULT)
        return lambda: module.message(about)
    was = online.get(number, False)
    online[number] = not was
    about.before, about.now = (THERE, AWAY) if was else (AWAY, THERE)
    return lambda: module.presence(about)


def load_plugin() -> Any:
    return load_module("analytics", ROOT / "plugins" / "analytics" / "__init__.py")


def pretend_spy(module: Any, storage: Path, shared: Any = None) -> Any:
    """What a server hands to the plugin."""
    cache = SimpleNamespace(get_guilds_view=dict, get_members_view_for_guild=lambda guild: {})
    return SimpleNamespace(
        settings=module.Settings(),
        storage=storage,
        log=logging.getLogger("analytics"),
        bot=SimpleNamespace(cache=cache),
        shared=shared,
        alone=asyncio.Lock(),
        emit=lambda *event, room: None,
        count=lambda what, amount=1: None,
    )


async def ingest(
    module: Any, events: Iterator[Event], hand_over: Callable[[], Awaitable[object]]
) -> tuple[float, int]:
    """Seconds that the listeners and the store took for all events, and how many those were."""
    cache = SimpleNamespace(get_member=lambda guild, user: SimpleNamespace(is_bot=False))
    spy = SimpleNamespace(bot=SimpleNamespace(cache=cache))
    online: dict[int, bool] = {}
    spent, count, moment = 0.0, 0, 0.0
    module.now = module.elapsed = lambda: moment
    while chunk := list(zip(range(50_000), events)):  # noqa: B905  # ends with the shorter
        calls = [(event[0], prepare(module, event, online, spy)) for _, event in chunk]
        started = time.perf_counter()
        for number in range(0, len(calls), SLICE):
            for moment, call in calls[number : number + SLICE]:  # noqa: B007  # `now` reads it
                call()
            await asyncio.sleep(0)
        await hand_over()
        spent += time.perf_counter() - started
        count += len(calls)
    return spent, count


# ---- one row per event -----------------------------------------------------


class RowPerEvent:
    """What one would write first."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("CREATE TABLE events (time REAL, guild, member, channel, kind TEXT)")
        self.db.execute("CREATE INDEX by_time ON events (guild, time)")

    def fill(self, events: Iterator[Event]) -> None:
        last: dict[tuple[int, int], float] = {}
        for moment, number, channel, kind in events:
            if kind == "typing":  # repeats are one start here, too
                if moment - last.get((number, channel), 0.0) < 10.0:
                    continue
                last[number, channel] = moment
            member = FIRST_MEMBER + number
            self.db.execute(
                "INSERT INTO events VALUES (?,?,?,?,?)", (moment, GUILD, member, channel, kind)
            )
        self.db.commit()

    def update(self, since: float) -> tuple[list[Any], list[Any], list[Any]]:
        count = "sum(kind = '{}')".format
        where = "FROM events WHERE guild = ? AND time >= ?"
        queries = (
            f"SELECT member, {count('typing')} / ({count('message')} + 1.0) AS score {where}"
            f" GROUP BY member HAVING {count('typing')} > 0 ORDER BY score DESC, member LIMIT 10",
            f"SELECT member, {count('presence')} / (1.0 + {count('typing')} + {count('reaction')})"
            " AS score, count(DISTINCT iif(kind IN ('typing', 'reaction'), channel, NULL))"
            f" {where} GROUP BY member HAVING {count('message')} = 0 AND {count('presence')} >= 5"
            " ORDER BY score DESC, member LIMIT 10",
            f"SELECT member, count(DISTINCT channel) AS channels {where} AND kind <> 'presence'"
            " GROUP BY member ORDER BY channels DESC, member LIMIT 20",
        )
        first, second, third = (self.db.execute(sql, (GUILD, since)).fetchall() for sql in queries)
        return first, second, third


def same(update: Any, rows: tuple[list[Any], list[Any], list[Any]]) -> bool:
    """Whether both sides say the same."""
    lists = update.data
    mine = (
        [(int(row.user_id), row.ghost_score) for row in lists.ghosts],
        [(int(row.user_id), row.lurker_score, row.channel_count) for row in lists.lurkers],
        [(int(row.user_id), row.channel_count) for row in lists.channel_diversity],
    )
    theirs = tuple([(row[0], round(row[1], 3), *row[2:]) for row in found] for found in rows)
    return mine == theirs


# ---- what others notice ----------------------------------------------------


async def watch_lag(lags: list[float]) -> None:
    """How much later than asked for a sleeper wakes up, in seconds."""
    while True:
        due = time.perf_counter() + 0.002
        await asyncio.sleep(0.002)
        lags.append(time.perf_counter() - due)


class Live:
    """Messages through pretend Discord, hikari, the server and a socket to one dashboard."""

    def __init__(self, discord: PretendDiscord, guild: Guild, socket: Any) -> None:
        self.discord, self.guild, self.socket = discord, guild, socket
        self.member = next(iter(guild.members.values()))

    async def measure(self, seconds: float, load: Callable[[], Awaitable[object]] | None) -> Any:
        """Latencies of messages and lags of the loop, with the load once a second."""
        latencies: list[float] = []
        lags: list[float] = []
        tasks = [asyncio.create_task(watch_lag(lags))]
        if load is not None:
            tasks.append(asyncio.create_task(once_a_second(load)))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            sent = time.perf_counter()
            await self.discord.message(self.guild, self.member, self.guild.general)
            while '"message:new"' not in (await self.socket.read_message()):
                pass
            latencies.append(time.perf_counter() - sent)
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return latencies, lags


async def once_a_second(load: Callable[[], Awaitable[object]]) -> None:
    while True:
        started = time.perf_counter()
        await load()
        await asyncio.sleep(max(0.0, 1.0 - (time.perf_counter() - started)))


@contextlib.asynccontextmanager
async def dashboard(server: Server) -> AsyncIterator[Any]:
    """A bare Socket.IO client in the guild's room."""
    url = f"ws://127.0.0.1:{server.port}/socket.io/?EIO=4&transport=websocket"
    socket = await tornado.websocket.websocket_connect(url)
    token = server.tokens.issue("1", role="ADMIN", ttl=86_400)
    await socket.read_message()
    await socket.write_message("40" + json.dumps({"token": token}))
    await socket.read_message()
    await socket.write_message("420" + json.dumps(["subscribe:guild", str(GUILD)]))
    while not str(await socket.read_message()).startswith("430"):
        pass
    yield socket
    socket.close()


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


# ---- what other nodes cost -------------------------------------------------


class Sharing:
    """The plugin alone, with and without Redis; lags of the loop and of Redis are in seconds."""

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        self.redis = redis
        self.folder = folder
        self.link = Link(RedisSettings(url=redis.url), "")
        self.module: Any = load_plugin()
        self.term = 0

    async def begin(self, is_shared: bool) -> Any:
        self.term += 1
        await self.redis.ask("SET", TERM, self.term)
        shared = SharedTables(self.link, self.term, "analytics") if is_shared else None
        spy = pretend_spy(self.module, self.folder / f"{self.term}.db", shared)
        await self.module.setup(spy)
        return self.module.analytics

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[tuple[list[float], list[float]]]:
        """How late the loop is meanwhile, and how long Redis takes to answer others."""
        lags: list[float] = []
        answers: list[float] = []

        async def ask() -> None:
            while True:
                started = time.perf_counter()
                await self.link.redis.ping()
                answers.append(time.perf_counter() - started)
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(watch_lag(lags)), asyncio.create_task(ask())]
        yield lags, answers
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def ingest(self, shared: bool, events: Iterator[Event]) -> dict[str, Any]:
        analytics = await self.begin(shared)
        await self.redis.ask("FLUSHDB")
        await self.redis.ask("SET", TERM, self.term)
        empty = await self.memory()
        step = analytics.keeper.step

        async def keep() -> None:
            while True:
                await asyncio.sleep(0.5)
                await step()

        keeping = asyncio.create_task(keep())
        async with self.watched() as (lags, answers):
            hand_over = analytics.flush if shared else step  # Redis takes its time beside it
            spent, count = await ingest(self.module, events, hand_over)
            started = time.perf_counter()
            await step()
            keeping.cancel()
            after = time.perf_counter() - started
        select = analytics._store.rows.db.execute
        (rows,) = await analytics.keeper.run(
            lambda: select("SELECT count(*) FROM work.counts").fetchone()
        )
        await self.module.teardown(None)
        return {
            "rate": count / spent,
            "after": after,
            "lag": percentile(lags, 99),
            "answers": percentile(answers, 99),
            "rows": rows,
            "memory": (await self.memory() - empty) / rows,
        }

    async def load(self) -> dict[str, float]:
        """As another node does that takes over."""
        async with self.watched() as (lags, answers):
            started = time.perf_counter()
            analytics = await self.begin(True)
            await analytics.keeper.started()
            spent = time.perf_counter() - started
        assert analytics.keeper.loaded
        await self.module.teardown(None)
        return {"spent": spent, "lag": percentile(lags, 99), "answers": percentile(answers, 99)}

    async def memory(self) -> int:
        return int((await self.link.redis.info("memory"))["used_memory"])


async def run_sharing(members: int, events: int, seed: int, rounds: int, folder: Path) -> None:
    end = time.time() // 3600 * 3600 + 1800
    async with RedisServer(folder, "--appendonly", "no") as redis:
        sharing = Sharing(redis, folder)
        taken: dict[bool, list[Any]] = {False: [], True: []}
        loads = []
        for _ in range(rounds):
            for shared in (False, True):
                happened = make_events(members, events, seed, end)
                taken[shared].append(await sharing.ingest(shared, happened))
            loads.append(await sharing.load())
        await sharing.link.close()
    report_sharing(members, events, taken, loads)


def report_sharing(members: int, events: int, taken: dict[bool, list[Any]], loads: Any) -> None:
    milli = lambda seconds: f"{seconds * 1000:,.1f} ms"  # noqa: E731  # a word
    middle = lambda runs, what: statistics.median(run[what] for run in runs)  # noqa: E731
    alone, shared = taken[False], taken[True]
    ratio = middle(shared, "rate") / middle(alone, "rate")
    table(
        f"counts shared over Redis: {members:,} members, {events:,} events, {len(loads)} rounds",
        [
            ("events taken in a second", f"{middle(shared, 'rate'):,.0f}", "20,000 or more"),
            ("  without Redis", f"{middle(alone, 'rate'):,.0f}", ""),
            ("  ratio", f"{ratio:.2f} x", ""),
            ("  loop lag meanwhile, p99", milli(middle(shared, "lag")), ""),
            ("  without Redis", milli(middle(alone, "lag")), ""),
            ("  Redis' answers to others meanwhile, p99", milli(middle(shared, "answers")), ""),
            ("  until Redis has the last of them", milli(middle(shared, "after")), ""),
            ("rows", f"{middle(shared, 'rows'):,.0f}", ""),
            ("Redis' memory for a row", f"{middle(shared, 'memory'):,.0f} bytes", ""),
            ("loaded at a takeover within", milli(middle(loads, "spent")), ""),
            ("  loop lag meanwhile, p99", milli(middle(loads, "lag")), ""),
            ("  Redis' answers to others meanwhile, p99", milli(middle(loads, "answers")), ""),
        ],
    )


# ---- the run ---------------------------------------------------------------


def table(title: str, lines: list[tuple[str, str, str]]) -> None:
    print(f"\n{title}")
    for name, value, asked in lines:
        print(f"  {name:52} {value:>22}   {asked}")


def make_guild(discord: PretendDiscord, members: int) -> Guild:
    guild = discord.add_guild("Everybody", guild_id=GUILD)
    user = importlib.import_module("simulator").User
    for number in range(members):
        account = user(FIRST_MEMBER + number, f"member-{number}")
        guild.add_member(account.name, user=account)
    return guild


async def run(members: int, events: int, seed: int, rounds: int, folder: Path) -> None:
    end = time.time() // 3600 * 3600 + 1800
    rows = RowPerEvent(folder / "rows.db")
    rows.fill(make_events(members, events, seed, end))
    async with PretendDiscord() as discord:
        guild = make_guild(discord, members)
        async with make_server(folder, discord) as server:
            module: Any = server.plugins.plugins["analytics"].module
            await discord.wait_for_bot(timeout=120.0)
            await discord.caught_up(timeout=120.0)
            lags: list[float] = []
            watcher = asyncio.create_task(watch_lag(lags))
            events_made = make_events(members, events, seed, end)
            spent, count = await ingest(module, events_made, module.analytics.keeper.step)
            watcher.cancel()
            compute = lambda: module.analytics.compute(GUILD)  # noqa: E731  # a load
            since = (end // 3600 - DAYS * 24 + 1) * 3600
            mine, theirs = [], []
            for _ in range(rounds):
                started = time.perf_counter()
                update = await compute()
                mine.append(time.perf_counter() - started)
                started = time.perf_counter()
                found = await asyncio.to_thread(RowPerEvent.update, reopened(rows, folder), since)
                theirs.append(time.perf_counter() - started)
                assert same(update, found), "the two sides disagree"
            async with dashboard(server) as socket:
                live = Live(discord, guild, socket)
                await live.measure(1.0, None)
                quiet, busy = ([], []), ([], [])
                for _ in range(rounds):
                    for phase, load in ((quiet, None), (busy, compute)):
                        for values, more in zip(phase, await live.measure(5.0, load), strict=True):
                            values.extend(more)
    started = time.perf_counter()
    plugin: Any = load_plugin()
    await plugin.setup(pretend_spy(plugin, folder / "plugin.db"))
    await plugin.analytics.keeper.started()
    loaded = time.perf_counter() - started
    await plugin.teardown(None)
    report(members, count, spent, lags, mine, theirs, quiet, busy, loaded, folder)


def reopened(rows: RowPerEvent, folder: Path) -> RowPerEvent:
    """The same file for another thread."""
    rows.db.close()
    rows.db = sqlite3.connect(folder / "rows.db", check_same_thread=False)
    return rows


def report(
    members: int,
    count: int,
    spent: float,
    lags: list[float],
    mine: list[float],
    theirs: list[float],
    quiet: Any,
    busy: Any,
    loaded: float,
    folder: Path,
) -> None:
    milli = lambda seconds: f"{seconds * 1000:,.1f} ms"  # noqa: E731  # a word
    own, other = statistics.median(mine), statistics.median(theirs)
    before, after = percentile(quiet[0], 99), percentile(busy[0], 99)
    size = (folder / "plugin.db").stat().st_size
    other_size = (folder / "rows.db").stat().st_size
    table(
        f"{members:,} members, {count:,} events, {len(mine)} rounds",
        [
            ("events taken in a second", f"{count / spent:,.0f}", "20,000 or more"),
            ("  loop lag meanwhile, p99", milli(percentile(lags, 99)), ""),
            ("one update, median", milli(own), "1,000 ms or less"),
            ("  with a row per event", milli(other), ""),
            ("  ratio", f"{other / own:,.0f} x", "20 x or more"),
            ("lists again after a restart", milli(loaded), ""),
            ("file", f"{size / 1e6:,.0f} MB", "500 MB or less"),
            ("  with a row per event", f"{other_size / 1e6:,.0f} MB", ""),
            (
                "loop lag p99, an update each second",
                milli(percentile(busy[1], 99)),
                "20 ms or less",
            ),
            ("  without updates", milli(percentile(quiet[1], 99)), ""),
            ("message:new p50, an update each second", milli(percentile(busy[0], 50)), ""),
            ("  without updates", milli(percentile(quiet[0], 50)), ""),
            ("message:new p99, an update each second", milli(after), ""),
            ("  without updates", milli(before), ""),
            ("  change", f"{(after / before - 1) * 100:+.0f} %", "within 20 %"),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="2,000 members, 100,000 events")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sharing", action="store_true", help="only what other nodes cost")
    options = parser.parse_args()
    members, events, rounds = (2_000, 100_000, 2) if options.small else (100_000, 5_000_000, 3)
    if not options.sharing:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(run(members, events, options.seed, rounds, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        events = min(events, 1_250_000)
        asyncio.run(run_sharing(members, events, options.seed, 2, Path(folder)))


if __name__ == "__main__":
    main()
