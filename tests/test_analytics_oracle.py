"""Analytics are right: random histories, against a plain computation in memory."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
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
from spywatcher import RedisSettings
from spywatcher_cluster import TERM, Link, SharedTables

RULES = {"window_days": 1, "lurker_min_presence": 2, "ghosts": 3, "lurkers": 3}
RULES |= {"channel_diversity": 4}
GUILDS, PEOPLE, CHANNELS = 2, 4, 2


@dataclass
class Oracle:
    """The definitions, one event at a time and without any thought of speed."""

    clock: Clock
    events: list[tuple[int, str, int, int, int]] = field(default_factory=list)
    started: dict[tuple[int, int], float] = field(default_factory=dict)

    def count(self, kind: str, guild: Guild, member: Member, channel: int = 0) -> None:
        if member.user.bot:
            return
        if kind == "typing":
            if self.clock.time - self.started.get((member.id, channel), float("-inf")) < 10.0:
                return
            self.started[member.id, channel] = self.clock.time
        hour = int(self.clock.time // HOUR)
        self.events.append((hour, kind, guild.id, member.id, channel))

    def drop(self, guild: Guild, member: Member) -> None:
        self.events = [e for e in self.events if e[2:4] != (guild.id, member.id)]

    def lists(self, guild: Guild) -> Json:
        oldest = int(self.clock.time // HOUR) - RULES["window_days"] * 24
        recent = [e for e in self.events if e[0] > oldest and e[2] == guild.id]
        people = [
            (m.id, m.user.name, [e for e in recent if e[3] == m.id]) for m in guild.members.values()
        ]
        return {
            "ghosts": top("ghosts", ghosts(people)),
            "lurkers": top("lurkers", lurkers(people)),
            "channelDiversity": top("channel_diversity", explorers(people)),
        }


def ghosts(people: Any) -> Any:
    for member, name, events in people:
        starts, messages = amount(events, "typing"), amount(events, "message")
        if starts:
            yield starts / (messages + 1), member, name, {}


def lurkers(people: Any) -> Any:
    for member, name, events in people:
        presences = amount(events, "presence")
        active = [e[4] for e in events if e[1] in ("typing", "reaction")]
        if presences >= RULES["lurker_min_presence"] and not amount(events, "message"):
            more = {"channelCount": len(set(active))}
            yield presences / (1 + len(active)), member, name, more


def explorers(people: Any) -> Any:
    for member, name, events in people:
        channels = {e[4] for e in events if e[1] != "presence"}
        if channels:
            yield len(channels), member, name, {}


def amount(events: Any, kind: str) -> int:
    return sum(e[1] == kind for e in events)


def top(which: str, scored: Any) -> list[Json]:
    names = {"ghosts": "ghostScore", "lurkers": "lurkerScore", "channel_diversity": "channelCount"}
    ranked = sorted(scored, key=lambda row: (-row[0], row[1]))[: RULES[which]]
    return [
        {"userId": str(member), "username": name, names[which]: round(score, 3), **more}
        for score, member, name, more in ranked
    ]


class World:
    """Guilds with people and a bot, what happens in them, and who counts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.oracle = Oracle(self.clock)
        self.guilds = [make_guild(f"guild {n}", bot=BOT) for n in range(GUILDS)]
        users = [self.guilds[0].add_member(f"user {n}").user for n in range(PEOPLE)]
        users.append(self.guilds[0].add_member("robot", bot=True).user)
        for user in users:
            self.guilds[1].add_member(user.name, user=user)
        for guild in self.guilds:
            for n in range(CHANNELS):
                guild.add_channel(f"channel-{n}")
        self.users = users
        self.counting: Counting

    async def live(self, history: list[tuple[Any, ...]]) -> None:
        await self.begin()
        try:
            for step, *values in history:
                await getattr(self, step)(*values)
            await self.compare()
        finally:
            await self.counting.__aexit__()

    async def begin(self) -> None:
        counting = Counting(self.folder, self.guilds, clock=self.clock, **RULES)
        self.counting = await counting.__aenter__()

    async def compare(self) -> None:
        for guild in self.guilds:
            assert await self.counting.lists(guild) == self.oracle.lists(guild)
            assert self.counting.problem is None

    async def act(self, kind: str, g: int, u: int, c: int) -> None:
        guild = self.guilds[g]
        member = guild.members.get(self.users[u].id)
        if member is None:
            return
        channel = list(guild.channels.values())[c]
        make: Any = {"typing": typing_json, "message": message_json, "reaction": reaction_json}
        name = {"typing": "TYPING_START", "message": "MESSAGE_CREATE"}
        self.oracle.count(kind, guild, member, channel.id)
        await self.counting.feed(
            name.get(kind, "MESSAGE_REACTION_ADD"), make[kind](guild, member, channel)
        )

    async def appear(self, g: int, u: int, status: str) -> None:
        guild = self.guilds[g]
        member = guild.members.get(self.users[u].id)
        if member is None:
            return
        if member.status != status:
            self.oracle.count("presence", guild, member)
        member.appear(status, {} if status == "offline" else {"desktop": status})
        await self.counting.feed("PRESENCE_UPDATE", presence_json(guild, member))

    async def rename(self, u: int, name: str) -> None:
        self.users[u].name = name
        for guild in self.guilds:
            if member := guild.members.get(self.users[u].id):
                await self.counting.feed("GUILD_MEMBER_UPDATE", member_add_json(guild, member))

    async def leave(self, g: int, u: int) -> None:
        guild = self.guilds[g]
        member = guild.members.pop(self.users[u].id, None)
        if member is not None:
            self.oracle.drop(guild, member)
            await self.counting.feed("GUILD_MEMBER_REMOVE", member_remove_json(guild, member))

    async def join(self, g: int, u: int) -> None:
        guild, user = self.guilds[g], self.users[u]
        if user.id not in guild.members:
            member = guild.add_member(user.name, user=user)
            await self.counting.feed("GUILD_MEMBER_ADD", member_add_json(guild, member))

    async def wait(self, seconds: float) -> None:
        self.clock.time += seconds

    async def flush(self) -> None:
        await self.counting.flush()

    async def restart(self, g: int, leaver: int, hours: int) -> None:
        """While it is down somebody leaves, and time passes."""
        await self.compare()
        await self.counting.__aexit__()
        member = self.guilds[g].members.pop(self.users[leaver].id, None)
        if member is not None:
            self.oracle.drop(self.guilds[g], member)
        self.oracle.started.clear()
        self.clock.time += hours * HOUR
        await self.begin()


class SharedWorld(World):
    """The same, where each start is at another machine: all that it finds is in Redis."""

    def __init__(self, folder: Path, redis: RedisServer, link: Link) -> None:
        super().__init__(folder)
        self.redis = redis
        self.link = link
        self.term = 0

    async def begin(self) -> None:
        self.term += 1
        await self.redis.ask("SET", TERM, self.term)
        share = partial(SharedTables, self.link, self.term)
        path = f"machine{self.term}.db"
        counting = Counting(
            self.folder, self.guilds, clock=self.clock, path=path, share=share, **RULES
        )
        self.counting = await counting.__aenter__()
        await self.flush()


guild, user = st.sampled_from([0, 0, 0, 1]), st.integers(0, PEOPLE)
kinds = st.sampled_from(["typing", "typing", "message", "reaction"])
statuses = st.sampled_from(["online", "idle", "dnd", "offline"])
times = st.sampled_from([1.0, 9.9, 10.0, 600.0, HOUR, HOUR * 7, HOUR * 23, HOUR * 24, HOUR * 40])
steps = st.one_of(
    *[st.tuples(st.just("act"), kinds, guild, user, st.integers(0, CHANNELS))] * 6,
    *[st.tuples(st.just("appear"), guild, user, statuses)] * 6,
    *[st.tuples(st.just("wait"), times)] * 2,
    st.tuples(st.just("compare")),
    st.tuples(st.just("rename"), user, st.text("abc", min_size=1, max_size=3)),
    st.tuples(st.just("leave"), guild, user),
    st.tuples(st.just("join"), guild, user),
    st.tuples(st.just("flush")),
    st.tuples(st.just("restart"), guild, user, st.integers(0, 30)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=30, max_size=90))
def test_the_lists_are_those_of_a_plain_computation(history: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(World(Path(folder)).live(history))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=30, max_size=90))
def test_they_are_so_where_each_restart_is_at_another_machine(
    history: list[tuple[Any, ...]],
) -> None:
    async def live(folder: Path) -> None:
        async with RedisServer(folder) as redis:
            link = Link(RedisSettings(url=redis.url), "")
            await SharedWorld(folder, redis, link).live(history)
            await link.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(Path(folder)))
