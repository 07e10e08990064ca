"""History is right: random weeks, against a plain computation in memory."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from counting import HOUR, Clock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import PEOPLE, Machines, Step, World, live_alone, live_on_machines

from simulator import Guild, Json, Member
from spywatcher import timestamp

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
    return timestamp(datetime.fromtimestamp(hour * HOUR, UTC))


class Watched(World):
    """What history counts, and the oracle beside it."""

    settings: ClassVar[dict[str, Any]] = {
        "plugin": "history",
        "days": KEPT_DAYS,
        "window_days": WINDOW_DAYS,
    }

    def __init__(self, folder: Path, machines: Machines | None = None) -> None:
        super().__init__(folder, machines)
        self.oracle = Oracle(self.clock, self.guilds)

    async def begin(self) -> None:
        await super().begin()
        self.oracle.look()

    async def compare(self) -> None:
        self.oracle.look()
        first = time_of(self.oracle.hour - KEPT_DAYS * 24 + 1)
        for guild in self.guilds:
            update = await self.counting.update(guild)
            hours = [h for h in update["hours"] if h["hour"] >= first]
            assert [h for h in hours if any(v for k, v in h.items() if k != "hour")] == (
                self.oracle.hours(guild)
            )
            assert update["members"] == len(guild.members)
            assert self.counting.problem is None

    async def act(self, kind: str, g: int, u: int) -> None:
        guild = self.guilds[g]
        if member := self.member(g, u):
            if not member.user.bot:
                self.oracle.act(guild, member)
                if kind == "message":
                    self.oracle.count("messages", guild)
            await self.feed_act(kind, guild, member, guild.general)

    async def appear(self, g: int, u: int, status: str) -> None:
        if member := self.member(g, u):
            await self.feed_presence(self.guilds[g], member, status)
            self.oracle.look()

    async def leave(self, g: int, u: int) -> None:
        guild = self.guilds[g]
        if member := guild.members.pop(self.users[u].id, None):
            if not member.user.bot:
                self.oracle.count("leaves", guild)
            await self.feed_member("GUILD_MEMBER_REMOVE", guild, member)

    async def join(self, g: int, u: int) -> None:
        guild, user = self.guilds[g], self.users[u]
        if self.member(g, u) is None:
            member = guild.add_member(user.name, user=user)
            if not user.bot:
                self.oracle.count("joins", guild)
            await self.feed_member("GUILD_MEMBER_ADD", guild, member)

    async def wait(self, seconds: float) -> None:
        await super().wait(seconds)
        await self.counting.module.history.flush()  # as happens twice a second
        self.oracle.look()

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
def test_the_hours_are_those_of_a_plain_computation(story: list[Step]) -> None:
    live_alone(Watched, story)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=30, max_size=90))
def test_they_are_so_where_each_restart_is_at_another_machine(story: list[Step]) -> None:
    live_on_machines(Watched, story)
