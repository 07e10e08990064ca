"""Analytics are right: random histories, against a plain computation in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counting import HOUR, Clock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import PEOPLE, Machines, Step, World, live_alone, live_on_machines

from simulator import Guild, Json, Member

RULES = {"window_days": 1, "lurker_min_presence": 2, "ghosts": 3, "lurkers": 3}
RULES |= {"channel_diversity": 4}
CHANNELS = 2


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


class Watched(World):
    """What analytics count, and the oracle beside it."""

    settings = RULES

    def __init__(self, folder: Path, machines: Machines | None = None) -> None:
        super().__init__(folder, machines)
        self.oracle = Oracle(self.clock)
        for guild in self.guilds:
            for n in range(CHANNELS):
                guild.add_channel(f"channel-{n}")

    async def compare(self) -> None:
        for guild in self.guilds:
            assert await self.counting.lists(guild) == self.oracle.lists(guild)
            assert self.counting.problem is None

    async def act(self, kind: str, g: int, u: int, c: int) -> None:
        guild = self.guilds[g]
        if member := self.member(g, u):
            channel = list(guild.channels.values())[c]
            self.oracle.count(kind, guild, member, channel.id)
            await self.feed_act(kind, guild, member, channel)

    async def appear(self, g: int, u: int, status: str) -> None:
        if member := self.member(g, u):
            if member.status != status:
                self.oracle.count("presence", self.guilds[g], member)
            await self.feed_presence(self.guilds[g], member, status)

    async def rename(self, u: int, name: str) -> None:
        self.users[u].name = name
        for g, guild in enumerate(self.guilds):
            if member := self.member(g, u):
                await self.feed_member("GUILD_MEMBER_UPDATE", guild, member)

    async def leave(self, g: int, u: int) -> None:
        if member := self.remove(g, u):
            await self.feed_member("GUILD_MEMBER_REMOVE", self.guilds[g], member)

    def remove(self, g: int, u: int) -> Member | None:
        member = self.guilds[g].members.pop(self.users[u].id, None)
        if member is not None:
            self.oracle.drop(self.guilds[g], member)
        return member

    async def join(self, g: int, u: int) -> None:
        if self.member(g, u) is None:
            member = self.guilds[g].add_member(self.users[u].name, user=self.users[u])
            await self.feed_member("GUILD_MEMBER_ADD", self.guilds[g], member)

    async def restart(self, g: int, leaver: int, hours: int) -> None:
        """While it is down somebody leaves, and time passes."""
        await self.compare()
        await self.counting.__aexit__()
        self.remove(g, leaver)
        self.oracle.started.clear()
        self.clock.time += hours * HOUR
        await self.begin()


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
def test_the_lists_are_those_of_a_plain_computation(history: list[Step]) -> None:
    live_alone(Watched, history)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=30, max_size=90))
def test_they_are_so_where_each_restart_is_at_another_machine(history: list[Step]) -> None:
    live_on_machines(Watched, history)
