"""History is right: random weeks, against a plain computation in memory."""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from counting import BOT, HOUR, Clock, Counting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redisserver import RedisServer

from simulator import (
    Guild,
    Json,
    Member,
    make_guild,
    member_add_json,
    member_remove_json,
    message_json,
    presence_json,
    reaction_json,
    typing_json,
)
from spywatcher import RedisSettings, timestamp
from spywatcher_cluster import TERM, Link, SharedTables

GUILDS, PEOPLE = 2, 4
KEPT_DAYS, WINDOW_DAYS = 14, 28


class Oracle:
    """The definitions, one event at a time and without any thought of speed."""

    def __init__(self, clock: Clock, guilds: list[Guild]) -> None:
        self.clock = clock
        self.guilds = guilds
        self.counts: dict[tuple[int, int], Json] = defaultdict(self.nothing)
        self.active: dict[tuple[int, int], set[int]] = defaultdict(set)

    @staticmethod
    def nothing() -> Json:
        return {"messages": 0, "joins": 0, "leaves": 0, "online": 0}

    @property
    def hour(self) -> int:
        return int(self.clock.time // HOUR)

    def count(self, kind: str, guild: Guild) -> None:
        self.counts[guild.id, self.hour][kind] += 1

    def act(self, guild: Guild, member: Member) -> None:
        self.active[guild.id, self.hour].add(member.id)

    def look(self) -> None:
        """Who is online now was so in this hour."""
        for guild in self.guilds:
            people = [m for m in guild.members.values() if not m.user.bot]
            online = sum(m.status != "offline" for m in people)
            counts = self.counts[guild.id, self.hour]
            counts["online"] = max(online, counts["online"])

    def hours(self, guild: Guild) -> list[Json]:
        """From the oldest that is surely kept."""
        first = self.hour - min(KEPT_DAYS, WINDOW_DAYS) * 24 + 1
        found = []
        for hour in range(first, self.hour + 1):
            active = len(self.active[guild.id, hour])
            counts = {**self.counts[guild.id, hour], "active": active}
            if any(counts.values()):
                found.append({"hour": time_of(hour), **counts})
        return found


def time_of(hour: int) -> str:
    from datetime import UTC, datetime

    return timestamp(datetime.fromtimestamp(hour * HOUR, UTC))


class World:
    """Guilds with people and a bot, what happens in them, and who counts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.guilds = [make_guild(f"guild {n}", bot=BOT) for n in range(GUILDS)]
        self.users = [self.guilds[0].add_member(f"user {n}").user for n in range(PEOPLE)]
        self.users.append(self.guilds[0].add_member("robot", bot=True).user)
        for user in self.users:
            self.guilds[1].add_member(user.name, user=user)
        self.oracle = Oracle(self.clock, self.guilds)
        self.counting: Counting

    async def live(self, story: list[tuple[Any, ...]]) -> None:
        await self.begin()
        try:
            for step, *values in story:
                await getattr(self, step)(*values)
                self.oracle.look()
            await self.compare()
        finally:
            await self.counting.__aexit__()

    async def begin(self, **more: Any) -> None:
        counting = Counting(
            self.folder,
            self.guilds,
            clock=self.clock,
            plugin="history",
            days=KEPT_DAYS,
            window_days=WINDOW_DAYS,
            **more,
        )
        self.counting = await counting.__aenter__()
        self.oracle.look()

    async def compare(self) -> None:
        first = time_of(self.oracle.hour - KEPT_DAYS * 24 + 1)
        for guild in self.guilds:
            update = await self.counting.update(guild)
            hours = [h for h in update["hours"] if h["hour"] >= first]
            assert [h for h in hours if any(v for k, v in h.items() if k != "hour")] == (
                self.oracle.hours(guild)
            )
            assert update["members"] == len(guild.members)
            assert self.counting.problem is None

    def member(self, g: int, u: int) -> Member | None:
        return self.guilds[g].members.get(self.users[u].id)

    async def act(self, kind: str, g: int, u: int) -> None:
        guild, member = self.guilds[g], self.member(g, u)
        if member is None:
            return
        if not member.user.bot:
            self.oracle.act(guild, member)
            if kind == "message":
                self.oracle.count("messages", guild)
        make: Any = {"typing": typing_json, "message": message_json, "reaction": reaction_json}
        names = {"typing": "TYPING_START", "message": "MESSAGE_CREATE"}
        name = names.get(kind, "MESSAGE_REACTION_ADD")
        await self.counting.feed(name, make[kind](guild, member, guild.general))

    async def appear(self, g: int, u: int, status: str) -> None:
        member = self.member(g, u)
        if member is not None:
            member.appear(status, {} if status == "offline" else {"desktop": status})
            await self.counting.feed("PRESENCE_UPDATE", presence_json(self.guilds[g], member))

    async def leave(self, g: int, u: int) -> None:
        guild = self.guilds[g]
        member = guild.members.pop(self.users[u].id, None)
        if member is not None:
            if not member.user.bot:
                self.oracle.count("leaves", guild)
            await self.counting.feed("GUILD_MEMBER_REMOVE", member_remove_json(guild, member))

    async def join(self, g: int, u: int) -> None:
        guild, user = self.guilds[g], self.users[u]
        if user.id not in guild.members:
            member = guild.add_member(user.name, user=user)
            if not user.bot:
                self.oracle.count("joins", guild)
            await self.counting.feed("GUILD_MEMBER_ADD", member_add_json(guild, member))

    async def wait(self, seconds: float) -> None:
        self.clock.time += seconds
        await self.counting.module.history.flush()  # as happens twice a second

    async def flush(self) -> None:
        await self.counting.flush()

    async def restart(self, hours: int) -> None:
        await self.compare()
        await self.counting.__aexit__()
        self.clock.time += hours * HOUR
        await self.begin()

    async def kill(self) -> None:
        """What is not handed to the disk or to Redis is lost with the process; the rest is not."""
        await self.counting.flush()
        await self.counting.abandon()
        await self.begin()


class SharedWorld(World):
    """The same, where each start is at another machine: all that it finds is in Redis."""

    def __init__(self, folder: Path, redis: RedisServer, link: Link) -> None:
        super().__init__(folder)
        self.redis = redis
        self.link = link
        self.term = 0

    async def begin(self, **more: Any) -> None:
        self.term += 1
        await self.redis.ask("SET", TERM, self.term)
        share = partial(SharedTables, self.link, self.term)
        await super().begin(path=f"machine{self.term}.db", share=share)
        await self.flush()


guild, user = st.sampled_from([0, 0, 0, 1]), st.integers(0, PEOPLE)
kinds = st.sampled_from(["typing", "message", "message", "reaction"])
statuses = st.sampled_from(["online", "idle", "dnd", "offline"])
times = st.sampled_from([1.0, 600.0, HOUR, HOUR * 7, HOUR * 24, HOUR * 100, HOUR * 170])
steps = st.one_of(
    *[st.tuples(st.just("act"), kinds, guild, user)] * 6,
    *[st.tuples(st.just("appear"), guild, user, statuses)] * 4,
    *[st.tuples(st.just("wait"), times)] * 4,
    st.tuples(st.just("compare")),
    st.tuples(st.just("leave"), guild, user),
    st.tuples(st.just("join"), guild, user),
    st.tuples(st.just("flush")),
    st.tuples(st.just("restart"), st.integers(0, 30)),
    st.tuples(st.just("kill")),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=30, max_size=120))
def test_the_hours_are_those_of_a_plain_computation(story: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(World(Path(folder)).live(story))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=30, max_size=90))
def test_they_are_so_where_each_restart_is_at_another_machine(story: list[tuple[Any, ...]]) -> None:
    async def live(folder: Path) -> None:
        async with RedisServer(folder) as redis:
            link = Link(RedisSettings(url=redis.url), "")
            await SharedWorld(folder, redis, link).live(story)
            await link.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(Path(folder)))
