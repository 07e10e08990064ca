"""Tell dashboards who haunts a guild without speaking. Teaches: keeping data, `every`, `on_subscribe`.

Counted are typing starts, messages, reactions and changes of status of each member, by channel
and hour; never a word of what is written, never a name. Hours are whole hours since 1970 (UTC) by
this machine's clock; the last `window_days` are the current hour and the `window_days * 24 - 1`
before it. A thread counts as a channel of its own. Not counted are bots, webhooks, notices such as
"joined the server", and changes of status of members whom Discord has not sent yet.

The way of a count: a listener adds it to `_fresh`, a dict; twice a second that goes, as one JSON
text, to the thread of `Store`, which adds it to running totals in memory (what the lists are
made from) and to the hours on disk (what a restart, and the end of an hour's stay in the window,
are made from). SQLite does both in a few long statements, during which Python is free to serve.

Where several nodes are one service, `spy.shared` takes the place of the disk: `Sharing` loads from
it whenever this node begins to hold the gateway, and twice a second writes to it what has changed.
Written is what the counts of a member in an hour are, not what came to them: to write twice, or
after a pause, does no harm. The hours "on disk" are then a copy, in a file that has no name and
is gone with the process.
"""

import asyncio
import contextlib
import functools
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import hikari
import msgspec
from msgspec import Meta

from spywatcher import (
    Payload,
    PluginSettings,
    Shared,
    Spy,
    every,
    member_name,
    on,
    on_subscribe,
    timestamp,
)

#: Seconds in which Discord's repeats of a typing start are the same start.
TYPING_LASTS = 10.0
#: Seconds for which a new subscriber may be given what was computed for another one.
STAYS_NEW = 5.0
#: Keys (hour, guild, member, channel) that wait for a disk that takes nothing: about 100 bytes each.
MOST_UNWRITTEN = 500_000
#: Members that are written to other nodes at a time, and seconds between two such writes: a few
#: milliseconds of work, that others can do theirs between.
MOST_SENT = 500
BREATH = 0.005
#: Seconds after which it is a problem that Redis takes nothing; /health/ready names others sooner.
MOST_APART = 30.0
#: Seconds that a stop may take to write the last counts.
LAST_WORDS = 2.0
#: What a message that a member wrote is, other than notices such as "joined the server".
WRITTEN = frozenset({hikari.MessageType.DEFAULT, hikari.MessageType.REPLY})

#: Seconds since 1970.
now: Callable[[], float] = time.time

Id = Annotated[str, Meta(pattern=r"^[0-9]{1,20}$")]
ListLength = Annotated[int, Meta(ge=1, le=1000)]
Result = TypeVar("Result")
#: A guild and a member of it.
Person = tuple[int, int]
#: hour, guild, member, channel, typing starts, messages, reactions, changes of status
Row = list[int]
#: Rows to be added, then people to be dropped.
Job = tuple[list[Row], list[Person]]
TYPING, MESSAGES, REACTIONS, PRESENCES = 4, 5, 6, 7
#: The channel of a change of status.
NOWHERE = 0


class Settings(PluginSettings, frozen=True):
    window_days: Annotated[int, Meta(ge=1, le=366, description="Days that the counts go back.")] = 7
    lurker_min_presence: Annotated[
        int, Meta(ge=1, description="Changes of status that make a silent member a lurker.")
    ] = 5
    ignore_members: Annotated[
        tuple[Id, ...], Meta(description="Members never counted, by id.")
    ] = ()
    ghosts: Annotated[ListLength, Meta(description="Members in the list of ghosts.")] = 10
    lurkers: Annotated[ListLength, Meta(description="Members in the list of lurkers.")] = 10
    channel_diversity: Annotated[
        ListLength, Meta(description="Members in the list of channel diversity.")
    ] = 20


class Ghost(Payload):
    user_id: str
    username: str
    ghost_score: float


class Lurker(Payload):
    user_id: str
    username: str
    lurker_score: float
    channel_count: int


class Explorer(Payload):
    user_id: str
    username: str
    channel_count: int


class Lists(Payload):
    ghosts: list[Ghost]
    lurkers: list[Lurker]
    channel_diversity: list[Explorer]
    timestamp: str


class AnalyticsUpdate(Payload):
    data: Lists
    timestamp: str


# ---- what is kept ----------------------------------------------------------

COUNTS = """(
    hour INTEGER, guild INTEGER, member INTEGER, channel INTEGER,
    typing INTEGER, messages INTEGER, reactions INTEGER, presences INTEGER,
    PRIMARY KEY (hour, guild, member, channel)) WITHOUT ROWID"""

#: In memory. `totals` and `places` are the window summed up; `batch`, `unwritten` and `gone`
#: are under way to the disk. A place is forgotten when its last hour leaves the window.
WORKING = f"""
CREATE TABLE batch {COUNTS};
CREATE TABLE unwritten {COUNTS};
CREATE TABLE gone (guild INTEGER, member INTEGER, PRIMARY KEY (guild, member)) WITHOUT ROWID;
CREATE TABLE totals (
    guild INTEGER, member INTEGER,
    typing INTEGER, messages INTEGER, reactions INTEGER, presences INTEGER, channels INTEGER,
    PRIMARY KEY (guild, member)) WITHOUT ROWID;
CREATE TABLE places (
    guild INTEGER, member INTEGER, channel INTEGER, last INTEGER,
    PRIMARY KEY (guild, member, channel)) WITHOUT ROWID;
"""

#: On disk: number N brings a file of schema version N to N + 1. Only ever append.
MIGRATIONS = (
    f"CREATE TABLE disk.counts {COUNTS}; CREATE TABLE disk.forgotten (guild INTEGER, member INTEGER);",
)

ADD = """ON CONFLICT DO UPDATE SET
    typing = typing + excluded.typing, messages = messages + excluded.messages,
    reactions = reactions + excluded.reactions, presences = presences + excluded.presences"""

PEOPLE = "(SELECT value ->> 0, value ->> 1 FROM json_each(?))"

#: One step for each hour that there is, however many rows it has.
HOURS = """WITH RECURSIVE hours (hour) AS (
    SELECT min(hour) FROM disk.counts UNION ALL
    SELECT (SELECT min(hour) FROM disk.counts WHERE hour > hours.hour) FROM hours
    WHERE hour IS NOT NULL)"""

GHOSTS = """SELECT member, typing / (messages + 1.0) AS score FROM totals
    WHERE guild = ? AND typing > 0 ORDER BY score DESC, member LIMIT ?"""
# Where there are no messages, all channels are those typed or reacted in.
LURKERS = """SELECT member, presences / (1.0 + typing + reactions) AS score, channels
    FROM totals WHERE guild = ? AND messages = 0 AND presences >= ?
    ORDER BY score DESC, member LIMIT ?"""
EXPLORERS = """SELECT member, channels FROM totals
    WHERE guild = ? AND channels > 0 ORDER BY channels DESC, member LIMIT ?"""

#: What the disk of a service of several nodes has besides: members' hours that Redis has not yet
#: as they are here, and those under way to it.
KEYS = (
    "(hour INTEGER, guild INTEGER, member INTEGER, PRIMARY KEY (hour, guild, member)) WITHOUT ROWID"
)
AWARE = f"CREATE TABLE disk.dirty {KEYS}; CREATE TABLE disk.sending {KEYS};"
#: Once everything is there that Redis has. What fires a trigger would overrule its OR IGNORE.
WATCH = "".join(
    f"CREATE TRIGGER disk.on_{event} AFTER {event} ON counts BEGIN INSERT INTO dirty"
    f" VALUES ({which}.hour, {which}.guild, {which}.member) ON CONFLICT DO NOTHING; END;"
    for event, which in (("INSERT", "new"), ("UPDATE", "new"), ("DELETE", "old"))
)

#: In Redis, a table GUILD:HOUR has for each member "[[channel,typing,messages,reactions,presences],…]".
CHANGES = """SELECT json_group_object(
        guild || ':' || hour, json_array((hour + ?) * 3600 - ?, json(members)))
    FROM (SELECT hour, guild, json_group_object(CAST(member AS TEXT), counts) AS members
        FROM (SELECT hour, guild, member, (SELECT nullif(json_group_array(
                    json_array(channel, typing, messages, reactions, presences)), '[]') || ''
                FROM disk.counts WHERE (counts.hour, counts.guild, counts.member)
                    = (sending.hour, sending.guild, sending.member)) AS counts
            FROM disk.sending)
        GROUP BY hour, guild)"""
CHUNK = """SELECT CAST(substr(tables.key, instr(tables.key, ':') + 1) AS INTEGER) AS hour,
        CAST(tables.key AS INTEGER) AS guild, CAST(members.key AS INTEGER) AS member,
        members.value AS counts
    FROM json_each(?) AS tables, json_each(tables.value) AS members"""


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


class Totals:
    """The window summed up by member, in memory: what the lists are made from."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        #: The newest hour that is out of the window; 0: not known yet.
        self.horizon = 0

    def lists(self, guild: int, settings: Settings) -> tuple[list[Any], list[Any], list[Any]]:
        run, least = self._db.execute, settings.lurker_min_presence
        return (
            run(GHOSTS, (guild, settings.ghosts)).fetchall(),
            run(LURKERS, (guild, least, settings.lurkers)).fetchall(),
            run(EXPLORERS, (guild, settings.channel_diversity)).fetchall(),
        )

    def absent(self, guild: int, present: list[int]) -> list[Person]:
        """Who was counted in a guild and is not present any more."""
        return self._db.execute(
            "SELECT guild, member FROM totals WHERE guild = ?"
            " AND member NOT IN (SELECT value FROM json_each(?))",
            (guild, msgspec.json.encode(present).decode()),
        ).fetchall()

    def known_as(self, guild: int | None, member: int) -> list[Person]:
        """A member, in one guild or in all where it was counted."""
        return self._db.execute(
            "SELECT guild, member FROM totals WHERE member = ? AND guild = ifnull(?, guild)",
            (member, guild),
        ).fetchall()

    def add(self, table: str) -> None:
        """Sum up a table's hours, too."""
        self._db.execute(
            "INSERT INTO totals SELECT guild, member,"
            f" sum(typing), sum(messages), sum(reactions), sum(presences), 0 FROM {table}"
            f" WHERE hour > ? GROUP BY guild, member {ADD}",
            (self.horizon,),
        )
        self._db.execute(
            f"INSERT INTO places SELECT guild, member, channel, max(hour) FROM {table}"
            " WHERE hour > ? AND channel > 0 GROUP BY guild, member, channel"
            " ON CONFLICT DO UPDATE SET last = max(last, excluded.last)",
            (self.horizon,),
        )
        self._count_channels(f"SELECT guild, member FROM {table}")

    def drop(self, people: str) -> None:
        """`people` is a JSON array of guild and member."""
        for table in ("totals", "places"):
            self._db.execute(f"DELETE FROM {table} WHERE (guild, member) IN {PEOPLE}", (people,))

    def clear(self) -> None:
        self._db.execute("DELETE FROM totals")
        self._db.execute("DELETE FROM places")

    def slide(self, horizon: int, tables: list[str]) -> None:
        """Take out the hours of these tables that leave the window."""
        before, self.horizon = self.horizon, horizon
        try:
            for table in tables:
                self._db.execute(
                    "INSERT INTO totals SELECT guild, member,"
                    " -sum(typing), -sum(messages), -sum(reactions), -sum(presences), 0"
                    f" FROM {table} WHERE hour > ? AND hour <= ? GROUP BY guild, member {ADD}",
                    (before, horizon),
                )
        except sqlite3.Error:
            self.horizon = before
            raise
        self._count_channels("SELECT guild, member FROM places WHERE last <= ?", horizon)
        self._db.execute("DELETE FROM places WHERE last <= ?", (horizon,))
        self._db.execute(
            "DELETE FROM totals WHERE max(typing, messages, reactions, presences) <= 0"
        )

    def _count_channels(self, people: str, *values: int) -> None:
        self._db.execute(
            "UPDATE totals SET channels = (SELECT count(*) FROM places WHERE last > ?"
            " AND places.guild = totals.guild AND places.member = totals.member)"
            f" WHERE (guild, member) IN ({people})",
            (self.horizon, *values),
        )


class Hours:
    """The counts by the hour, in an SQLite file attached as `disk`, and what waits for the disk."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path
        self._version = 0
        self.attached = False
        #: Keys that wait, or a few more.
        self.waiting = 0
        #: Rows that went to disk; whoever reads it begins again at 0.
        self.written = 0
        #: (guild or None for all, member) that the command line had removed meanwhile.
        self.forgotten: list[tuple[int | None, int]] = []

    @property
    def tables(self) -> list[str]:
        """Where hours are now."""
        return ["unwritten", "disk.counts"] if self.attached else ["unwritten"]

    def add_batch(self, size: int) -> bool:
        """Have `batch` wait for the disk; whether there was room."""
        if self.waiting + size > MOST_UNWRITTEN:
            (self.waiting,) = self._db.execute("SELECT count(*) FROM unwritten").fetchone()
        if self.waiting + size > MOST_UNWRITTEN:
            return False
        self.waiting += size
        self._db.execute(f"INSERT INTO unwritten SELECT * FROM batch WHERE true {ADD}")
        return True

    def drop(self, people: str) -> None:
        """`people` is a JSON array of guild and member."""
        self._db.execute(f"DELETE FROM unwritten WHERE (guild, member) IN {PEOPLE}", (people,))
        self._db.execute(f"INSERT OR IGNORE INTO gone SELECT * FROM {PEOPLE}", (people,))

    def attach(self) -> None:
        """Open the file, which is made where there is none."""
        run = self._db.execute
        run("ATTACH DATABASE ? AS disk", (str(self._path),))
        self.attached = True
        try:
            run("PRAGMA disk.auto_vacuum = INCREMENTAL")  # heeded only by an empty file
            run("PRAGMA disk.journal_mode = WAL")
            run("PRAGMA disk.synchronous = NORMAL")  # a crash of the machine may cost a checkpoint
            run("PRAGMA disk.journal_size_limit = 16777216")
            run("PRAGMA disk.secure_delete = ON")
            (schema,) = run("PRAGMA disk.user_version").fetchone()
            if schema > len(MIGRATIONS):
                raise sqlite3.NotSupportedError(f"written by a newer version (schema {schema})")
            for number in range(schema, len(MIGRATIONS)):
                self._db.executescript(
                    f"BEGIN; {MIGRATIONS[number]}; PRAGMA disk.user_version = {number + 1}; COMMIT;"
                )
        except sqlite3.Error:
            self.detach()
            raise

    def detach(self) -> None:
        self.attached = False
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._db.execute("DETACH DATABASE disk")

    def clean(self, ignored: list[int]) -> None:
        """Remove whom the disk should not have."""
        self._remove_gone()
        if ignored:
            self._db.execute(
                "DELETE FROM disk.counts WHERE member IN (SELECT value FROM json_each(?))",
                (msgspec.json.encode(ignored).decode(),),
            )
        (self._version,) = self._db.execute("PRAGMA disk.data_version").fetchone()

    def follow(self) -> bool:
        """When another process wrote to the file, forget whom it had forgotten; whether it did."""
        (version,) = self._db.execute("PRAGMA disk.data_version").fetchone()
        if version == self._version:
            return False
        with transaction(self._db):
            people = self._db.execute("SELECT guild, member FROM disk.forgotten").fetchall()
            for guild, member in people:
                for table in ("disk.counts", "unwritten"):
                    self._db.execute(
                        f"DELETE FROM {table} WHERE member = ? AND guild = ifnull(?, guild)",
                        (member, guild),
                    )
            self._db.execute("DELETE FROM disk.forgotten")
        (self._version,) = self._db.execute("PRAGMA disk.data_version").fetchone()
        self.forgotten += people
        return True

    def write(self, horizon: int) -> None:
        """Bring everything to disk, and remove what is out of the window."""
        with transaction(self._db):
            self._remove_gone()
            if self.waiting:
                self._db.execute(
                    f"INSERT INTO disk.counts SELECT * FROM unwritten WHERE true {ADD}"
                )
                self._db.execute("DELETE FROM unwritten")
            old = self._db.execute("DELETE FROM disk.counts WHERE hour <= ?", (horizon,))
        self.written += self.waiting
        self.waiting = 0
        if old.rowcount > 0:
            self._db.executescript("PRAGMA disk.incremental_vacuum")  # `execute` frees one page

    def _remove_gone(self) -> None:
        if self._db.execute("SELECT 1 FROM gone LIMIT 1").fetchone():
            self._db.execute(
                f"{HOURS} DELETE FROM disk.counts WHERE (hour, guild, member) IN"
                " (SELECT hours.hour, gone.guild, gone.member FROM hours, gone)"
            )
            self._db.execute("DELETE FROM gone")

    def forget(self, guild: int | None, member: int) -> int:
        """Remove a member's counts from the file, and tell a server that runs; how many they were."""
        who = {"guild": guild, "member": member}
        where = "member = :member AND (:guild IS NULL OR guild = :guild)"
        with transaction(self._db):
            counts: int
            (counts,) = self._db.execute(
                "SELECT total(typing + messages + reactions + presences)"
                f" FROM disk.counts WHERE {where}",
                who,
            ).fetchone()
            self._db.execute(f"DELETE FROM disk.counts WHERE {where}", who)
            self._db.execute("INSERT INTO disk.forgotten VALUES (:guild, :member)", who)
        return int(counts)


class Store:
    """The counts, as totals and by the hour. Lives in one thread.

    Whatever the disk does, counting goes on in memory: `problem` then says what is wrong, and
    what is not on disk yet waits, up to MOST_UNWRITTEN keys.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._settings = Settings()
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.executescript(WORKING)
        self._totals = Totals(self._db)
        self._summed_up = False
        self.hours = Hours(self._db, path)
        #: What is wrong with the disk, for the operator; None if nothing is.
        self.problem: str | None = None
        #: Lines about what was done to a damaged file, for the log.
        self.notices: list[str] = []

    def take(self, jobs: list[Job], hour: int, settings: Settings) -> bool:
        """Add the rows and drop the people of each job; whether anything else changed, too."""
        moved = settings != self._settings and self._totals.horizon > 0
        if settings != self._settings:
            self._adopt(settings)
        with transaction(self._db):
            for rows, people in jobs:
                self._add(rows)
                self._drop(people)
        try:
            moved |= self._slide(hour - self._settings.window_days * 24)
            moved |= self._reach_disk()
        except (sqlite3.Error, OSError) as error:
            moved |= self._fail(error)
        else:
            self.problem = None
        return moved

    def lists(self, guild: int) -> tuple[list[Any], list[Any], list[Any]]:
        """Ghosts (member, score), lurkers (member, score, channels), explorers (member, channels)."""
        return self._totals.lists(guild, self._settings)

    def keep(self, guild: int, present: list[int]) -> bool:
        """Drop everybody of a guild who is not present any more; whether there was anybody."""
        absent = self._totals.absent(guild, present)
        with transaction(self._db):
            self._drop(absent)
        return bool(absent)

    def forget(self, guild: int | None, member: int) -> int:
        """Remove a member's counts from the file; see `Hours.forget`."""
        self.hours.attach()
        return self.hours.forget(guild, member)

    def close(self) -> None:
        self._db.close()

    def _adopt(self, settings: Settings) -> None:
        """Begin again from what is on disk."""
        self._settings = settings
        self._totals.horizon = 0
        self._summed_up = False

    def _add(self, rows: list[Row]) -> None:
        if not rows:
            return
        columns = ", ".join(f"value ->> {number}" for number in range(8))
        text = msgspec.json.encode(rows).decode()
        self._db.execute("DELETE FROM batch")
        self._db.execute(f"INSERT INTO batch SELECT {columns} FROM json_each(?)", (text,))
        if self.hours.add_batch(len(rows)):  # what is not kept could not leave the window either
            self._totals.add("batch")

    def _drop(self, people: list[Person]) -> None:
        if people:
            text = msgspec.json.encode(people).decode()
            self._totals.drop(text)
            self.hours.drop(text)

    def _slide(self, horizon: int) -> bool:
        """Forget the hours that have left the window; whether there may have been any."""
        before = self._totals.horizon
        if horizon <= before:
            return False
        with transaction(self._db):
            self._totals.slide(horizon, self.hours.tables if self._summed_up else ["unwritten"])
            self._db.execute("DELETE FROM unwritten WHERE hour <= ?", (horizon,))
        return before > 0

    def _reach_disk(self) -> bool:
        """Have everything on disk, and follow what others did there; whether that changed totals."""
        changed = False
        if not self.hours.attached:
            self.hours.attach()
            self._summed_up = False
        if not self._summed_up:
            self._begin()
            changed = self.problem is not None  # else nobody was shown anything without it
        elif self.hours.follow():
            self._sum_up()
            changed = True
        self.hours.write(self._totals.horizon)
        return changed

    def _begin(self) -> None:
        """Continue where the file stopped, and count what was counted meanwhile."""
        self.hours.clean([int(member) for member in self._settings.ignore_members])
        self._sum_up()
        self._summed_up = True

    def _sum_up(self) -> None:
        with transaction(self._db):
            self._totals.clear()
            for table in self.hours.tables:
                self._totals.add(table)

    def _fail(self, error: sqlite3.Error | OSError) -> bool:
        """Note what is wrong; put a damaged file aside and begin a fresh one."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            full = ", and new counts are dropped" if self.hours.waiting >= MOST_UNWRITTEN else ""
            self.problem = f"{self._path} cannot be written ({error}); counting in memory{full}"
            if self.hours.attached and not self._summed_up:
                self.hours.detach()
            return False
        if self.hours.attached:
            self.hours.detach()
        try:
            aside = put_aside(self._path)
        except OSError as refusal:
            self.problem = f"{self._path} is damaged ({error}) and cannot be moved: {refusal}"
            return False
        self.notices.append(
            f"{self._path} is damaged ({error}): put aside as {aside.name}, counting begins anew"
        )
        return True


class Copy(Hours):
    """The hours of a service of several nodes, whose disk is Redis: a copy, in a nameless file."""

    def attach(self) -> None:
        """Begin an empty one."""
        self._db.execute("ATTACH DATABASE '' AS disk")
        self.attached = True
        self._db.executescript(f"{MIGRATIONS[0]} {AWARE}")

    def load(self, chunk: str) -> None:
        """Take some of what Redis has."""
        columns = ", ".join(f"row.value ->> {number}" for number in range(5))
        self._db.execute(
            f"INSERT OR REPLACE INTO disk.counts SELECT hour, guild, member, {columns}"
            f" FROM ({CHUNK}), json_each(counts) AS row",
            (chunk,),
        )

    def watch(self) -> None:
        """Note from now on what changes."""
        self._db.executescript(WATCH)

    def write(self, horizon: int) -> None:
        super().write(horizon)
        self._db.execute("DELETE FROM disk.dirty WHERE hour <= ?", (horizon,))  # Redis knows when

    def doubt(self) -> None:
        """Redis may lack anything."""
        self._db.execute(
            "INSERT OR IGNORE INTO disk.dirty SELECT DISTINCT hour, guild, member FROM disk.counts"
        )

    def compare(self, chunk: str) -> None:
        """Note what Redis has and should not have any more."""
        self._db.execute(
            f"INSERT OR IGNORE INTO disk.dirty SELECT hour, guild, member FROM ({CHUNK}) AS there"
            " WHERE NOT EXISTS (SELECT 1 FROM disk.counts WHERE (counts.hour, counts.guild,"
            " counts.member) = (there.hour, there.guild, there.member))",
            (chunk,),
        )

    def changes(self, window: int, moment: float) -> str:
        """The newest of what Redis lacks, as `Shared.write` takes it."""
        run = self._db.execute
        with transaction(self._db):
            run("INSERT OR IGNORE INTO disk.dirty SELECT * FROM disk.sending")
            run("DELETE FROM disk.sending")
            run(
                "INSERT INTO disk.sending SELECT * FROM disk.dirty"
                " ORDER BY hour DESC, guild DESC, member DESC LIMIT ?",
                (MOST_SENT,),
            )
            run(
                "DELETE FROM disk.dirty WHERE (hour, guild, member) IN (SELECT * FROM disk.sending)"
            )
        text: str
        (text,) = run(CHANGES, (window + 1, int(moment))).fetchone()
        return text

    def sent(self) -> bool:
        """Redis has the last changes; whether there are more."""
        self._db.execute("DELETE FROM disk.sending")
        return self._db.execute("SELECT 1 FROM disk.dirty LIMIT 1").fetchone() is not None


class SharedStore(Store):
    """The same for a service of several nodes: what Redis has comes first."""

    hours: Copy

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.hours = Copy(self._db, path)
        #: Whether everything is here that Redis has.
        self.loaded = False
        self._outdated = False  # whether Redis keeps everything for another time than it should
        self._inherits = False

    def begin(self) -> bool:
        """Load, perhaps anew; whether there is need to."""
        if self.loaded:
            return False
        if self.hours.attached:
            self.hours.detach()
        self.hours.attach()
        return True

    def load(self, chunk: str) -> None:
        self.hours.load(chunk)

    def finish(self) -> None:
        """All is loaded: count on."""
        self.hours.watch()
        self._inherit()
        self.loaded = True

    def changes(self, moment: float) -> str:
        return self.hours.changes(self._settings.window_days * 24, moment)

    def sent(self) -> bool:
        more = self.hours.sent()
        if self._inherits and not more:
            self._leave()
        return more

    def doubt(self) -> None:
        self.hours.doubt()

    def compare(self, chunk: str) -> None:
        self.hours.compare(chunk)

    def drop(self, guild: int | None, member: int) -> list[int]:
        """Drop a member; in which guilds it was."""
        people = self._totals.known_as(guild, member)
        with transaction(self._db):
            self._drop(people)
        return [guild for guild, _ in people]

    def _adopt(self, settings: Settings) -> None:
        self._outdated |= settings.window_days != self._settings.window_days
        super()._adopt(settings)

    def _reach_disk(self) -> bool:
        if not self.loaded:
            self._outdated = False
            return False
        if self._outdated:
            self.hours.doubt()
            self._outdated = False
        return super()._reach_disk()

    def _fail(self, error: sqlite3.Error | OSError) -> bool:
        self.problem = f"no room for a copy of the counts ({error}); counting in memory"
        return False

    # -- what a single process left behind

    def _inherit(self) -> None:
        """Take from the file of a single process what Redis lacks."""
        if not self._path.exists():
            return
        try:
            self._db.execute("ATTACH DATABASE ? AS file", (str(self._path),))
            self._db.execute("PRAGMA file.secure_delete = ON")
            self._db.execute(
                "INSERT INTO disk.counts SELECT * FROM file.counts WHERE NOT EXISTS ("
                "SELECT 1 FROM disk.counts AS here WHERE (here.hour, here.guild, here.member)"
                " = (counts.hour, counts.guild, counts.member))"
            )
        except sqlite3.Error as error:
            self.notices.append(f"{self._path} is not taken over: {error}")
            with contextlib.suppress(sqlite3.Error):  # where it was not even attached
                self._db.execute("DETACH DATABASE file")
        else:
            self._inherits = True

    def _leave(self) -> None:
        """Redis has all of it."""
        self._inherits = False
        self._db.execute("DELETE FROM file.counts")
        self._db.executescript("PRAGMA file.incremental_vacuum; DETACH DATABASE file")


def put_aside(path: Path) -> Path:
    """Rename a database and what SQLite keeps beside it; returns the new name."""
    aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S%f}Z")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    return aside


# ---- counting --------------------------------------------------------------


class Sharing:
    """Has the store and Redis agree: as Redis has it at first, as the store has it from then on."""

    def __init__(self, shared: Shared, run: Callable[..., Awaitable[Any]]) -> None:
        self._shared = shared
        self._run = run  # something of the store, in its thread
        self._doubtful = False  # whether Redis may have lost what it was given, or not lost enough
        self._one_step = asyncio.Lock()
        self._agreed = time.monotonic()
        self.loaded = False
        #: What is wrong here with the copy of what Redis has; None if nothing is.
        self.problem: str | None = None
        #: Called once everything is loaded.
        self.on_loaded: Callable[[], Awaitable[None]]
        #: Called for whom the command line has forgotten: guild or None, member.
        self.on_forgotten: Callable[[int | None, int], Awaitable[None]]

    async def step(self) -> None:
        """Do what there is to do. Where Redis or a disk prevents it, the next step does."""
        try:
            async with self._one_step:
                if not self.loaded:
                    await self._load()
                await self._send()
        except ConnectionError as error:
            if time.monotonic() - self._agreed > MOST_APART:
                self.problem = f"Redis does not get the counts: {error}"
        except sqlite3.Error as error:
            self.problem = f"no room for a copy of the counts: {error}"
        else:
            self.problem = None
            self._agreed = time.monotonic()

    async def _load(self) -> None:
        if await self._run(SharedStore.begin):
            async for chunk in self._shared.read():
                await self._run(SharedStore.load, chunk)
            await self._run(SharedStore.finish)
        self.loaded = True
        await self.on_loaded()

    async def _send(self) -> None:
        more = True
        while more:
            if self._doubtful:
                await self._compare()
            changes = await self._run(SharedStore.changes, now())
            news = await self._shared.write(changes)
            more = await self._run(SharedStore.sent)
            self._doubtful = news.restarted
            for guild, member in news.forgotten:
                await self.on_forgotten(guild, member)
            await asyncio.sleep(BREATH * more)

    async def _compare(self) -> None:
        """Redis came back: have it get everything, and lose what it should have lost."""
        await self._run(SharedStore.doubt)
        async for chunk in self._shared.read():
            await self._run(SharedStore.compare, chunk)
        self._doubtful = False


class Analytics:
    """Takes counts on the event loop, hands them to the store, and has the lists made."""

    def __init__(self, spy: Spy) -> None:
        self._spy = spy
        self._fresh: dict[tuple[int, int, int, int], Row] = {}
        self._jobs: list[Job] = []
        self._typing: dict[tuple[int, int], float] = {}  # (member, channel), the longest ago first
        self._arriving: dict[int, tuple[str, set[int]]] = {}  # guild: nonce, members so far
        self._changed: set[int] = set()  # guilds since they were last computed
        self._latest: dict[int, tuple[float, asyncio.Task[AnalyticsUpdate]]] = {}
        self._thread = ThreadPoolExecutor(1, "analytics")
        self._store: Store | None = None
        self._arrived: dict[int, set[int]] = {}  # guilds that came before the counts: who is there
        self.sharing: Sharing | None = None
        if spy.shared is not None:
            self.sharing = Sharing(spy.shared, self._in_thread)
            self.sharing.on_loaded = self._begin
            self.sharing.on_forgotten = self._drop

    @property
    def _complete(self) -> bool:
        """Whether the lists can be made: else they would be those of the last seconds alone."""
        return self.sharing is None or self.sharing.loaded

    # -- what happens

    def count(self, kind: int, guild: int, member: int, channel: int = NOWHERE) -> None:
        ignored = self._spy.settings.ignore_members
        if ignored and str(member) in ignored:
            return
        hour = int(now() // 3600)
        key = hour, guild, member, channel
        row = self._fresh.get(key)
        if row is None:
            if len(self._fresh) >= MOST_UNWRITTEN:
                return  # the disk has not even answered for long
            row = self._fresh[key] = [hour, guild, member, channel, 0, 0, 0, 0]
        row[kind] += 1
        self.announce(guild)

    def typed(self, guild: int, member: int, channel: int) -> None:
        """A typing start, unless it is one of Discord's repeats."""
        time_of = self._typing
        moment = now()
        while time_of and not 0 <= moment - next(iter(time_of.values())) < TYPING_LASTS:
            del time_of[next(iter(time_of))]
        if (member, channel) not in time_of:
            time_of[member, channel] = moment
            self.count(TYPING, guild, member, channel)

    def left(self, guild: int, member: int) -> None:
        """Drop the member's counts; what comes after, should it join again, is counted anew."""
        if self._fresh or not self._jobs:
            self._close_job()
        self._jobs[-1][1].append((guild, member))
        self.announce(guild)

    def _close_job(self) -> None:
        self._jobs.append((list(self._fresh.values()), []))
        self._fresh = {}

    def announce(self, guild: int) -> None:
        """The guild's lists may have changed."""
        self._changed.add(guild)
        if not self._complete:
            return
        make = functools.partial(self.compute, guild)
        self._spy.emit("analytics:update", guild, make, room="analytics")

    # -- who is still there

    async def guild_arrived(self, guild: int, nonce: str | None, ids: set[int], size: int) -> None:
        """Discord told of a guild: all its members, or those online, the rest in chunks later."""
        self._arriving.pop(guild, None)
        if len(ids) >= size:
            await self._keep(guild, ids)
        elif nonce is not None:
            self._arriving[guild] = nonce, ids

    async def chunk_arrived(self, guild: int, nonce: str | None, ids: set[int], last: bool) -> None:
        """More members of a guild that arrives; what others asked for is not all and proves nothing."""
        expected, before = self._arriving.get(guild, (None, set()))
        if expected is None or nonce != expected:
            return
        before |= ids
        if last:
            del self._arriving[guild]
            await self._keep(guild, before)
            self.announce(guild)  # names that were unknown are known now

    async def _keep(self, guild: int, ids: set[int]) -> None:
        """Drop all others; the first that a new holder of the gateway tells of a guild."""
        if not self._complete:
            self._arrived[guild] = ids
            return
        cached = self._spy.bot.cache.get_members_view_for_guild(guild)
        present = list(ids.union(map(int, cached)))  # some may have joined meanwhile
        await self.flush()
        if await self._in_thread(Store.keep, guild, present) or self.sharing is not None:
            self.announce(guild)

    # -- the store

    async def _begin(self) -> None:
        """The counts of before are here."""
        await self.flush()
        arrived, self._arrived = self._arrived, {}
        for guild in self._changed - arrived.keys() - self._arriving.keys():
            self.announce(guild)
        for guild, ids in arrived.items():
            await self._keep(guild, ids)

    async def _drop(self, guild: int | None, member: int) -> None:
        """Forget a member."""
        await self.flush()
        for changed in await self._in_thread(SharedStore.drop, guild, member):
            self.announce(changed)

    async def flush(self) -> None:
        """Hand over all counts; returns when they are on disk, or wait for it in memory."""
        self._close_job()
        jobs, self._jobs = self._jobs, []
        moved = await self._in_thread(Store.take, jobs, int(now() // 3600), self._spy.settings)
        store = self._store
        assert store is not None
        while store.notices:
            self._spy.log.error("%s", store.notices.pop(0))
        problem = store.problem or (self.sharing.problem if self.sharing else None)
        self._spy.problem = problem
        self._spy.count("failed writes", problem is not None)
        written, store.hours.written = store.hours.written, 0
        self._spy.count("written rows", written)
        for guild in [g for g, (made, _) in self._latest.items() if is_old(made)]:
            del self._latest[guild]
        while store.hours.forgotten:
            self._forget(*store.hours.forgotten.pop())
        if moved:
            for guild in self._spy.bot.cache.get_guilds_view():
                self.announce(int(guild))

    def _forget(self, guild: int | None, member: int) -> None:
        for key in [key for key in self._fresh if key[2] == member and guild in (None, key[1])]:
            del self._fresh[key]

    async def _in_thread(self, work: Callable[..., Result], *values: Any) -> Result:
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._thread, self._run, work, *values)
        return await asyncio.shield(done)  # who gives up waiting does not take the counts along

    def _run(self, work: Callable[..., Result], *values: Any) -> Result:
        if self._store is None:  # SQLite wants the thread that uses a connection to make it
            make = Store if self.sharing is None else SharedStore
            self._store = make(self._spy.storage)
        return work(self._store, *values)

    async def close(self) -> None:
        await self.flush()
        if self.sharing is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS):
                    await self.sharing.step()
        await self._in_thread(Store.close)
        self._thread.shutdown()

    # -- the lists

    async def compute(self, guild: int) -> AnalyticsUpdate:
        """The lists as they are now."""
        task = asyncio.ensure_future(self._make(guild))
        self._latest[guild] = time.monotonic(), task
        return await asyncio.shield(task)

    async def newest(self, guild: int) -> AnalyticsUpdate | None:
        """The same, but no more often than once in STAYS_NEW seconds; None: later, to the room."""
        if not self._complete:
            self.announce(guild)
            return None
        made, task = self._latest.get(guild, (0.0, None))
        if task is None or is_old(made):
            return await self.compute(guild)
        if guild in self._changed:
            self.announce(guild)  # perhaps nobody listened when it changed
        return await asyncio.shield(task)

    async def _make(self, guild: int) -> AnalyticsUpdate:
        self._changed.discard(guild)
        await self.flush()
        ghosts, lurkers, explorers = await self._in_thread(Store.lists, guild)
        name = functools.partial(member_name, self._spy.bot.cache, guild)
        moment = timestamp()
        lists = Lists(
            ghosts=[
                Ghost(user_id=str(member), username=name(member), ghost_score=round(score, 3))
                for member, score in ghosts
            ],
            lurkers=[
                Lurker(
                    user_id=str(member),
                    username=name(member),
                    lurker_score=round(score, 3),
                    channel_count=channels,
                )
                for member, score, channels in lurkers
            ],
            channel_diversity=[
                Explorer(user_id=str(member), username=name(member), channel_count=channels)
                for member, channels in explorers
            ],
            timestamp=moment,
        )
        return AnalyticsUpdate(data=lists, timestamp=moment)


def is_old(made: float) -> bool:
    return time.monotonic() - made >= STAYS_NEW


# ---- what the host calls ---------------------------------------------------

analytics: Analytics


async def setup(spy: Spy) -> None:
    global analytics
    analytics = Analytics(spy)


async def teardown(spy: Spy) -> None:
    await analytics.close()


def forget(storage: Path, member_id: int, guild_id: int | None) -> int:
    """What `spywatcher.py forget` calls."""
    if not storage.exists():
        return 0
    store = Store(storage)
    try:
        return store.forget(guild_id, member_id)
    finally:
        store.close()


@every(0.5)
async def flush(spy: Spy) -> None:
    await analytics.flush()


@every(0.5)
async def share(spy: Spy) -> None:
    if analytics.sharing is not None:
        await analytics.sharing.step()


@on_subscribe("analytics", emit="analytics:update")
async def newest(guild_id: str, spy: Spy) -> AnalyticsUpdate | None:
    return await analytics.newest(int(guild_id))


@on(hikari.GuildTypingEvent)
def typing(event: hikari.GuildTypingEvent) -> None:
    if not event.member.is_bot:
        analytics.typed(int(event.guild_id), int(event.user_id), int(event.channel_id))


@on(hikari.GuildMessageCreateEvent)
def message(event: hikari.GuildMessageCreateEvent) -> None:
    if event.is_human and event.message.type in WRITTEN:
        analytics.count(MESSAGES, int(event.guild_id), int(event.author_id), int(event.channel_id))


@on(hikari.GuildReactionAddEvent)
def reaction(event: hikari.GuildReactionAddEvent) -> None:
    if not event.member.is_bot:
        analytics.count(REACTIONS, int(event.guild_id), int(event.user_id), int(event.channel_id))


@on(hikari.PresenceUpdateEvent)
def presence(event: hikari.PresenceUpdateEvent, spy: Spy) -> None:
    member = spy.bot.cache.get_member(event.guild_id, event.user_id)
    if member is None or member.is_bot:  # who is unknown may be a bot
        return
    if status_of(event.presence) != status_of(event.old_presence):
        analytics.count(PRESENCES, int(event.guild_id), int(event.user_id))


@on(hikari.MemberDeleteEvent)
def member_left(event: hikari.MemberDeleteEvent) -> None:
    analytics.left(int(event.guild_id), int(event.user_id))


@on(hikari.MemberUpdateEvent)
def member_renamed(event: hikari.MemberUpdateEvent) -> None:
    if event.old_member is None or event.old_member.username != event.member.username:
        analytics.announce(int(event.guild_id))


@on(hikari.GuildAvailableEvent)
async def guild_arrived(event: hikari.GuildAvailableEvent) -> None:
    size = event.guild.member_count or 0
    await analytics.guild_arrived(
        int(event.guild_id), event.chunk_nonce, set(map(int, event.members)), size
    )


@on(hikari.MemberChunkEvent)
async def members_arrived(event: hikari.MemberChunkEvent) -> None:
    last = event.chunk_index + 1 == event.chunk_count
    await analytics.chunk_arrived(
        int(event.guild_id), event.nonce, set(map(int, event.members)), last
    )


def status_of(presence: hikari.MemberPresence | None) -> str:
    """hikari keeps no presence of members who are offline."""
    return "offline" if presence is None else str(presence.visible_status)
