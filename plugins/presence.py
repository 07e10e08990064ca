"""Tell dashboards who comes and goes, and on how many devices. Teaches: settings and memory."""

from __future__ import annotations

import asyncio
import collections
import heapq
import time
from typing import Annotated, NamedTuple

import hikari
from msgspec import Meta

from spywatcher import (
    Payload,
    PluginSettings,
    PresenceUpdateEvent,
    Spy,
    every,
    member_name,
    on,
    on_subscribe,
    user_name,
)

STATUSES = ("online", "idle", "dnd", "offline")
#: Members whose last alert is remembered; beyond it the longest silent are forgotten.
MOST_REMEMBERED = 100_000
#: Members looked up in one go: a few milliseconds.
SLICE = 500
#: Seconds that a roster is kept after somebody asked for it.
ROSTER_KEPT = 60.0


class Settings(PluginSettings, frozen=True):
    #: Seconds after an alert in which its member causes no other.
    alert_cooldown: Annotated[float, Meta(ge=0)] = 60.0
    #: Members that a snapshot names; it counts all.
    snapshot_members: Annotated[int, Meta(ge=0)] = 500


class PresenceUpdate(Payload):
    user_id: str
    username: str
    status: str


class MultiClient(Payload):
    user_id: str
    username: str
    platforms: list[str]


class Present(Payload):
    user_id: str
    username: str
    status: str
    platforms: list[str]


class PresenceSnapshot(Payload):
    counts: dict[str, int]
    members: list[Present]
    truncated: bool


# ---- what changes


@on(PresenceUpdateEvent, emit="presence:update")
def presence_update(event: PresenceUpdateEvent, spy: Spy) -> PresenceUpdate | None:
    note(event.guild_id, event.user_id)
    status = event.now.status
    if status == (event.before.status if event.before else "offline"):
        return None  # Discord sends changes of activity too
    return PresenceUpdate(
        user_id=str(event.user_id),
        username=member_name(spy.bot.cache, event.guild_id, event.user_id),
        status=status,
    )


@on(PresenceUpdateEvent, emit="alert:multiClient", settled=True)
def multi_client(event: PresenceUpdateEvent, spy: Spy) -> MultiClient | None:
    platforms = event.now.platforms
    before = event.before.platforms if event.before else frozenset()
    if len(platforms) < 2 or platforms <= before:
        return None
    if cools_down((event.guild_id, event.user_id), spy.settings.alert_cooldown):
        return None
    return MultiClient(
        user_id=str(event.user_id),
        username=member_name(spy.bot.cache, event.guild_id, event.user_id),
        platforms=sorted(platforms),
    )


#: When each member had the last alert, the oldest first.
alerted: dict[tuple[int, int], float] = {}


def cools_down(member: tuple[int, int], cooldown: float) -> bool:
    """Whether the member had an alert a moment ago; if not, it has one now."""
    now = time.monotonic()
    if now - alerted.get(member, float("-inf")) < cooldown:
        return True
    alerted.pop(member, None)
    alerted[member] = now
    if len(alerted) > MOST_REMEMBERED:
        del alerted[next(iter(alerted))]
    return False


# ---- how things stand, for who comes to see


class Row(NamedTuple):
    """A member, in the order of the snapshot: who is offline last, else by name."""

    offline: bool
    sorted_by: str
    user_id: int
    username: str
    status: str


class Roster:
    """Who is in a guild: looked up slice by slice when first asked for, then where something changed."""

    def __init__(self, spy: Spy, guild_id: int) -> None:
        self._spy = spy
        self._cache = spy.bot.cache
        self._guild_id = guild_id
        self._rows: dict[int, Row] = {}
        self._latest: dict[int, PresenceSnapshot] = {}  # by how many it names
        self.asked = time.monotonic()
        self.changed: set[int] = set(self._cache.get_members_view_for_guild(guild_id))

    async def snapshot(self, longest: int) -> PresenceSnapshot:
        """True at the moment at which it returns; the same for all who ask before it changes."""
        self.asked = time.monotonic()
        while self.changed:
            self._latest.clear()
            for _ in range(min(SLICE, len(self.changed))):
                self._look_up(self.changed.pop())
            if self.changed:
                await asyncio.sleep(0)
        if longest not in self._latest:
            self._latest = {longest: self._make(longest)}
        return self._latest[longest]

    def _make(self, longest: int) -> PresenceSnapshot:
        counted = collections.Counter(row.status for row in self._rows.values())
        return PresenceSnapshot(
            counts={status: counted[status] for status in STATUSES},
            members=list(map(self._present, heapq.nsmallest(longest, self._rows.values()))),
            truncated=len(self._rows) > longest,
        )

    def _look_up(self, user_id: int) -> None:
        member = self._cache.get_member(self._guild_id, user_id)
        if member is None or member.is_bot or member.is_system:
            self._rows.pop(user_id, None)
            return
        presence = self._spy.presence(self._guild_id, user_id)
        status = presence.status if presence else "offline"
        name = user_name(member.user)
        folded = name.casefold()
        sorted_by = name if folded == name else folded  # most are: one text in memory, not two
        self._rows[user_id] = Row(status == "offline", sorted_by, user_id, name, status)

    def _present(self, row: Row) -> Present:
        presence = self._spy.presence(self._guild_id, row.user_id)
        platforms = sorted(presence.platforms) if presence else []
        return Present(
            user_id=str(row.user_id), username=row.username, status=row.status, platforms=platforms
        )


#: Of guilds that somebody asked for a moment ago.
rosters: dict[int, Roster] = {}


@on_subscribe("guild", emit="presence:snapshot")
async def presence_snapshot(guild_id: str, spy: Spy) -> PresenceSnapshot:
    guild = int(guild_id)
    if guild not in rosters:
        rosters[guild] = Roster(spy, guild)
    return await rosters[guild].snapshot(spy.settings.snapshot_members)


def note(guild_id: int, *user_ids: int) -> None:
    if guild_id in rosters:
        rosters[guild_id].changed.update(map(int, user_ids))


@every(ROSTER_KEPT)
def forget_rosters(spy: Spy) -> None:
    """A crowd comes at once, as after a restart; later a roster is made anew."""
    for guild_id, roster in tuple(rosters.items()):
        if time.monotonic() - roster.asked > ROSTER_KEPT:
            del rosters[guild_id]


@on(hikari.MemberCreateEvent)
@on(hikari.MemberUpdateEvent)
def member_changed(event: hikari.MemberCreateEvent | hikari.MemberUpdateEvent) -> None:
    note(event.guild_id, event.user_id)


@on(hikari.MemberChunkEvent)
def members_came(event: hikari.MemberChunkEvent) -> None:
    note(event.guild_id, *event.members)


@on(hikari.MemberDeleteEvent)
def member_left(event: hikari.MemberDeleteEvent) -> None:
    note(event.guild_id, event.user_id)
    alerted.pop((event.guild_id, event.user_id), None)


@on(hikari.GuildAvailableEvent)
@on(hikari.GuildJoinEvent)
@on(hikari.GuildLeaveEvent)
def guild_changed(
    event: hikari.GuildAvailableEvent | hikari.GuildJoinEvent | hikari.GuildLeaveEvent,
) -> None:
    rosters.pop(event.guild_id, None)


async def teardown(spy: Spy) -> None:
    """Another node may be at work now, and nothing is heard here meanwhile."""
    rosters.clear()
    alerted.clear()
