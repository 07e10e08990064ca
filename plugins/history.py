"""Tell dashboards how busy a guild is, hour by hour, for weeks back.

Counted by guild and hour are messages, joins, leaves, the members who were active (wrote, typed or
reacted) and the most who were online at once. Hours are whole hours since 1970 (UTC) by this
machine's clock. Bots and webhooks do not count, nor do notices such as "joined the server".

Of members there is only who was active in the current hour, by id, to tell them apart; when the
hour ends their number takes their place. When a week ends, a guild's hours become one packed row;
weeks begin on Thursdays, as 1970 did. How all this outlives the process is told in `_counts.py`.
"""

import functools
import itertools
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import hikari
from msgspec import Meta

from spywatcher import (
    Payload,
    PluginSettings,
    PresenceUpdateEvent,
    Spy,
    every,
    on,
    on_subscribe,
    timestamp,
)

from ._counts import (
    MOST_WAITING,
    Keeper,
    Person,
    Row,
    Rows,
    Shape,
    SingleFile,
    forget_member,
    to_json,
    transaction,
)

DAY = 24
WEEK = 7 * DAY
#: Guilds whose week is packed at a time: some milliseconds.
MOST_PACKED = 100
#: Changed hours that may be told, the current one included. Who subscribes gets them all, so that
#: only what changed since the last broadcast is news.
STAYS_NEWS = 3
#: Seconds that the server's start may wait for the counts; beyond them they come later.
LOADS_WITHIN = 1.0
#: What a message that a member wrote is, other than notices such as "joined the server".
WRITTEN = frozenset({hikari.MessageType.DEFAULT, hikari.MessageType.REPLY})
#: The member under whose id a row has the counts of the whole guild.
ALL = 0

#: Seconds since 1970.
now = time.time


class Settings(PluginSettings, frozen=True):
    #: Days that the hours are kept, in whole weeks.
    days: Annotated[int, Meta(ge=1, le=4000)] = 400
    #: Days that a new subscriber gets.
    window_days: Annotated[int, Meta(ge=1, le=400)] = 28


class Hour(Payload):
    hour: str
    messages: int
    joins: int
    leaves: int
    active: int
    online: int


class HistoryUpdate(Payload):
    hours: list[Hour]
    members: int
    timestamp: str


class Counts(NamedTuple):
    """What happened in one hour, as Hour has it."""

    messages: int
    joins: int
    leaves: int
    active: int
    online: int


# ---- what is kept ----------------------------------------------------------

SHAPE = Shape(
    columns=(*Counts._fields, "packed"),
    keys=0,
    merge="""ON CONFLICT DO UPDATE SET
        messages = messages + excluded.messages, joins = joins + excluded.joins,
        leaves = leaves + excluded.leaves, active = active + excluded.active,
        online = max(online, excluded.online), packed = ifnull(excluded.packed, packed)""",
    amount="count(*)",
    packed="packed",
)
#: The rows of a guild at some hours; what is packed in one is of the week that begins with it.
PLACES = "hour IN (SELECT value FROM json_each(?)) AND guild = ? AND member = 0"
FOUND = f"""SELECT hour, messages, joins, leaves, active, online, packed
    FROM work.counts WHERE {PLACES}"""

#: A week of one guild: Counts by hour.
Hours = dict[int, Counts]
LAYOUT = struct.Struct(f"<{len(Counts._fields) * WEEK}I")


def pack(first: int, hours: Hours) -> bytes:
    """A week from its first hour: numbers of 32 bits by kind and hour, the lowest bytes of all first."""
    nothing = Counts(0, 0, 0, 0, 0)
    week = [hours.get(first + number, nothing) for number in range(WEEK)]
    numbers = LAYOUT.pack(*itertools.chain.from_iterable(zip(*week, strict=True)))
    return zlib.compress(b"".join(numbers[number::4] for number in range(4)), 9)


def unpack(first: int, packed: bytes | None) -> Iterator[tuple[int, Counts]]:
    """The hours of a week in which anything was."""
    if packed is None:
        return
    planes, size = zlib.decompress(packed), LAYOUT.size // 4
    numbers = bytearray(LAYOUT.size)
    for number in range(4):
        numbers[number::4] = planes[number * size : (number + 1) * size]
    values = LAYOUT.unpack(numbers)
    kinds = [values[start : start + WEEK] for start in range(0, len(values), WEEK)]
    for hour, counts in enumerate(zip(*kinds, strict=True), first):
        if any(counts):
            yield hour, Counts(*counts)


def add(one: Counts, other: Counts) -> Counts:
    """All of it together; who was online in both is counted once."""
    *sums, _ = (sum(both) for both in zip(one, other, strict=True))
    return Counts._make((*sums, max(one.online, other.online)))


class Store:
    """The hours. Lives in one thread."""

    def __init__(self) -> None:
        self.rows = Rows(SHAPE)
        self._db = self.rows.db
        self._current = 0  # the hour whose active members are told apart
        self._unpacked = 0  # the first week that may have to be packed

    def take(self, rows: list[Row], hour: int, settings: Settings) -> None:
        """Add rows, and do what ends with an hour or a week."""
        with transaction(self._db):
            self.rows.add(rows)
        self.rows.hours = settings.days * DAY + WEEK
        self.rows.horizon = hour - self.rows.hours
        self.rows.settle()
        if self.rows.loaded:
            if hour > self._current:
                self._end_hours(hour)
            self._current = hour  # an earlier one where the clock was set back
            self._pack(hour // WEEK * WEEK)

    def begin(self) -> None:
        """What was kept before is here: count on."""
        self.rows.loaded = True
        self.rows.settle()

    def find(self, guild: int, wanted: set[int]) -> list[tuple[int, Counts]]:
        """What there is of these hours, in order."""
        found = self._found(guild, wanted | {hour // WEEK * WEEK for hour in wanted})
        if self._current in found:
            counts, active = found[self._current], self._active(guild)
            found[self._current] = counts._replace(active=counts.active + active)
        return sorted((hour, counts) for hour, counts in found.items() if hour in wanted)

    def forget(self, guild: int | None, member: int) -> None:
        """Drop a member from those who were active in this hour."""
        people: list[Person] = self._db.execute(
            "SELECT DISTINCT guild, member FROM work.counts"
            " WHERE hour >= ? AND member = ? AND guild = ifnull(?, guild)",
            (self._current, member, guild),
        ).fetchall()
        self.rows.drop(people)

    def _active(self, guild: int) -> int:
        active: int
        (active,) = self._db.execute(
            "SELECT count(*) FROM work.counts WHERE hour = ? AND guild = ? AND member > 0",
            (self._current, guild),
        ).fetchone()
        return active

    def _end_hours(self, hour: int) -> None:
        """Have a number take the place of those who were active before this hour."""
        over = "hour >= ? AND hour < ? AND member > 0"
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO work.counts SELECT hour, guild, 0, 0, 0, 0, count(*), 0, NULL"
                f" FROM work.counts WHERE {over} GROUP BY hour, guild {SHAPE.merge}",
                (self._current, hour),
            )
            self._db.execute(
                "INSERT OR IGNORE INTO work.noted"
                f" SELECT DISTINCT hour, guild, 0 FROM work.counts WHERE {over}",
                (self._current, hour),
            )
            self.rows.delete(over, self._current, hour)

    def _pack(self, week: int) -> None:
        """Pack some of the weeks before this one."""
        if week == self._unpacked:
            return
        some = self._db.execute(
            f"SELECT DISTINCT hour / {WEEK} * {WEEK}, guild FROM work.counts"
            f" WHERE hour >= ? AND hour < ? AND hour % {WEEK} > 0 LIMIT ?",
            (self._unpacked, week, MOST_PACKED),
        ).fetchall()
        with transaction(self._db):
            for first, guild in some:
                self._pack_one(first, guild)
        if not some:
            self._unpacked = week

    def _pack_one(self, first: int, guild: int) -> None:
        hours = range(first, first + WEEK)
        packed = pack(first, self._found(guild, hours))
        self.rows.delete(PLACES, to_json(list(hours)), guild)
        self.rows.put([first, guild, ALL, 0, 0, 0, 0, 0, packed])

    def _found(self, guild: int, places: Iterable[int]) -> Hours:
        """What is in the rows of these hours, and in what is packed there."""
        hours: Hours = {}
        rows = self._db.execute(FOUND, (to_json(list(places)), guild)).fetchall()
        for hour, *counts, packed in rows:
            for where, more in [(hour, Counts(*counts)), *unpack(hour, packed)]:
                hours[where] = add(hours[where], more) if where in hours else more
        return hours


# ---- counting --------------------------------------------------------------


class History:
    """Counts on the event loop, hands over to the store, and tells dashboards."""

    def __init__(self, spy: Spy, now: Callable[[], float]) -> None:
        self._spy = spy
        self._now = now
        self._hour = self._this_hour()
        self._fresh: dict[tuple[int, int], Row] = {}  # by hour and guild
        self._active: set[tuple[int, int]] = set()  # guild, member; in this hour
        self._acted: list[Row] = []  # of these, since they were handed over
        self._announced: set[int] = set()  # guilds, since the same
        self._online: dict[int, set[int]] = {}
        self._peaks: dict[int, int] = {}  # of this hour
        self._members: dict[int, int] = {}
        self._changed: dict[int, set[int]] = {}  # hours that were not told yet
        self._waiting: set[int] = set()  # guilds whose subscribers came before the hours
        self._store = Store()
        self.keeper = Keeper(spy, self._store.rows, file_of(spy.storage), self, now)
        for guild in spy.bot.cache.get_guilds_view().values():
            self._resume(guild)

    # -- what happens

    def count(self, what: str, guild: int) -> None:
        """One more of `messages`, `joins` or `leaves`."""
        self._turn()
        row = self._row(guild)
        if row is not None:
            row[3 + Counts._fields.index(what)] += 1
            self._announce(guild)

    def act(self, guild: int, member: int) -> None:
        """A member wrote, typed or reacted."""
        self._turn()
        key = guild, member
        if key in self._active or len(self._acted) >= MOST_WAITING or not self._row(guild):
            return
        if len(self._active) >= MOST_WAITING:
            self._active.clear()  # to hand them over again does no harm
        self._active.add(key)
        self._acted.append([self._hour, *key, 0, 0, 0, 0, 0, None])
        self._announce(guild)

    def appear(self, guild: int, present: Iterable[int], absent: Iterable[int] = ()) -> None:
        """Some are online, others are not any more."""
        self._turn()
        online = self._online.setdefault(guild, set())
        online.update(present)
        online.difference_update(absent)
        self._note_peak(guild)

    def vanish(self, guild: int) -> None:
        """Nobody knows who is online there."""
        self._turn()
        self._online.pop(guild, None)

    def set_members(self, guild: int, count: int) -> None:
        self._members[guild] = count

    def add_members(self, guild: int, more: int) -> None:
        self._members[guild] = self._members.get(guild, 0) + more

    def _resume(self, guild: hikari.GatewayGuild) -> None:
        """Begin with what Discord has told before this plugin was there."""
        cache = self._spy.bot.cache
        known = cache.get_members_view_for_guild(guild.id)
        self._members[int(guild.id)] = max(len(known), guild.member_count or 0)
        self.appear(int(guild.id), self._spy.online(guild.id))

    def _this_hour(self) -> int:
        return int(self._now() // 3600)

    def _turn(self) -> None:
        """Whoever is online when an hour begins was so in that hour."""
        hour = self._this_hour()
        if hour != self._hour:
            self._hour = hour
            for ended in (self._active, self._announced, self._peaks):
                ended.clear()
            for guild in self._online:
                self._note_peak(guild)

    def _note_peak(self, guild: int) -> None:
        count = len(self._online[guild])
        row = self._row(guild) if count > self._peaks.get(guild, 0) else None
        if row is not None:
            self._peaks[guild] = row[7] = count
            self._announce(guild)

    def _row(self, guild: int) -> Row | None:
        """Where this hour's counts are; None if they are not to be counted."""
        key = self._hour, guild
        if self.keeper.idle or (key not in self._fresh and len(self._fresh) >= MOST_WAITING):
            return None
        return self._fresh.setdefault(key, [*key, ALL, 0, 0, 0, 0, 0, None])

    # -- what the keeper calls

    async def flush(self) -> None:
        """Hand over all counts."""
        self._turn()
        rows, self._fresh, self._acted = [*self._fresh.values(), *self._acted], {}, []
        self._announced.clear()
        await self.keeper.run(self._store.take, rows, self._this_hour(), self._spy.settings)

    async def begin(self) -> None:
        """The hours of before are here."""
        self._active.clear()  # what another server had this one drop counts again
        await self.keeper.run(self._store.begin)
        for guild in self._waiting | self._changed.keys():
            make = functools.partial(self.window if guild in self._waiting else self._news, guild)
            self._spy.emit("history:update", guild, make, room="history")
        self._waiting.clear()

    async def forget(self, guild: int | None, member: int) -> None:
        """Forget that a member was active."""
        self._active.clear()
        await self.flush()
        await self.keeper.run(self._store.forget, guild, member)

    # -- what dashboards get

    async def newest(self, guild: int) -> HistoryUpdate | None:
        """The window; None: later, to the room."""
        await self.keeper.started()
        if not self.keeper.loaded:
            self._waiting.add(guild)
            return None
        return await self.window(guild)

    async def window(self, guild: int) -> HistoryUpdate:
        """The hours of the last days."""
        last = self._this_hour()
        first = last - self._spy.settings.window_days * DAY + 1
        return await self._update(guild, set(range(first, last + 1)))

    def _announce(self, guild: int) -> None:
        """This hour of the guild has changed."""
        if guild in self._announced:
            return
        self._announced.add(guild)
        changed = self._changed.setdefault(guild, set())
        if self._hour not in changed:
            changed -= {hour for hour in changed if hour <= self._hour - STAYS_NEWS}
            changed.add(self._hour)
        if self.keeper.loaded:
            make = functools.partial(self._news, guild)
            self._spy.emit("history:update", guild, make, room="history")

    async def _news(self, guild: int) -> HistoryUpdate:
        return await self._update(guild, self._changed.pop(guild, set()))

    async def _update(self, guild: int, wanted: set[int]) -> HistoryUpdate:
        await self.flush()
        found = await self.keeper.run(self._store.find, guild, wanted)
        hours = [
            Hour(hour=timestamp(datetime.fromtimestamp(hour * 3600, UTC)), **counts._asdict())
            for hour, counts in found
        ]
        members = self._members.get(guild, 0)
        return HistoryUpdate(hours=hours, members=members, timestamp=timestamp())


def file_of(storage: Path) -> Path:
    """A file of its own beside that of analytics: one cannot be in the way of the other."""
    return storage.with_name(f"{storage.stem}.history{storage.suffix}")


# ---- what the host calls ---------------------------------------------------

history: History


async def setup(spy: Spy) -> None:
    global history
    history = History(spy, lambda: now())
    await history.keeper.started(LOADS_WITHIN)


async def teardown(spy: Spy) -> None:
    await history.keeper.close()


def seed(storage: Path, hours: Iterable[tuple[int, int, Iterable[int]]]) -> None:
    """Put hours into the file before a server uses it: hour, guild and the numbers of `Counts`."""
    rows = Rows(SHAPE)
    file = SingleFile(file_of(storage), rows)
    file.load()
    rows.loaded = True
    rows.add([[hour, guild, ALL, *counts, None] for hour, guild, counts in hours])
    rows.settle()
    file.save()
    file.detach()
    rows.db.close()


def forget(storage: Path, member_id: int, guild_id: int | None) -> int:
    """What `spywatcher.py forget` calls."""
    return forget_member(file_of(storage), SHAPE, member_id, guild_id)


@every(0.5)
async def keep(spy: Spy) -> None:
    await history.keeper.step()


@on_subscribe("history", emit="history:update")
async def newest(guild_id: str, spy: Spy) -> HistoryUpdate | None:
    return await history.newest(int(guild_id))


@on(hikari.GuildMessageCreateEvent)
def message(event: hikari.GuildMessageCreateEvent) -> None:
    if event.is_human and event.message.type in WRITTEN:
        history.count("messages", int(event.guild_id))
        history.act(int(event.guild_id), int(event.author_id))


@on(hikari.GuildTypingEvent)
def typing(event: hikari.GuildTypingEvent) -> None:
    if not event.member.is_bot:
        history.act(int(event.guild_id), int(event.user_id))


@on(hikari.GuildReactionAddEvent)
def reaction(event: hikari.GuildReactionAddEvent) -> None:
    if not event.member.is_bot:
        history.act(int(event.guild_id), int(event.user_id))


@on(hikari.MemberCreateEvent, bots=True)  # Discord's count has them
def joined(event: hikari.MemberCreateEvent) -> None:
    history.add_members(int(event.guild_id), 1)
    if not event.user.is_bot:
        history.count("joins", int(event.guild_id))


@on(hikari.MemberDeleteEvent, bots=True)
def left(event: hikari.MemberDeleteEvent) -> None:
    history.add_members(int(event.guild_id), -1)
    history.appear(int(event.guild_id), (), [int(event.user_id)])
    if not event.user.is_bot:
        history.count("leaves", int(event.guild_id))


@on(PresenceUpdateEvent)
def presence(event: PresenceUpdateEvent) -> None:
    gone = event.now.status == "offline"
    if event.before is None or gone != (event.before.status == "offline"):
        member = [int(event.user_id)]
        history.appear(int(event.guild_id), () if gone else member, member if gone else ())


@on(hikari.GuildAvailableEvent)
def guild_arrived(event: hikari.GuildAvailableEvent, spy: Spy) -> None:
    history.set_members(int(event.guild_id), event.guild.member_count or 0)
    history.vanish(int(event.guild_id))
    history.appear(int(event.guild_id), spy.online(event.guild_id))


@on(hikari.MemberChunkEvent)
def members_arrived(event: hikari.MemberChunkEvent, spy: Spy) -> None:
    if event.chunk_index + 1 == event.chunk_count:
        history.appear(int(event.guild_id), spy.online(event.guild_id))


@on(hikari.GuildUnavailableEvent)
def guild_gone(event: hikari.GuildUnavailableEvent) -> None:
    history.vanish(int(event.guild_id))


@on(hikari.GuildLeaveEvent)
def guild_left(event: hikari.GuildLeaveEvent) -> None:
    history.vanish(int(event.guild_id))
