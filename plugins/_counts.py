"""Rows by hour, guild and member that outlive the process: what `analytics` and `history` keep alike.

Not a plugin. There is one way to write: what is kept of a member in an hour is written as it *is*,
never as what came to it, so that to write twice, or after a pause, does no harm.

The way of a row: a plugin hands its newest to `Rows`, in a thread. They wait in memory until what
was kept before is here, then become part of the working set, an SQLite file that has no name and
is gone with the process; whose rows changed is noted. `Keeper` loads from what outlives the
process and then brings there what is noted, twice a second: a `SingleFile`, or where several
nodes are one service Redis. What neither takes now stays noted.

One instance of a plugin at a time does so, under `spy.alone`: when a plugin is reloaded, the fresh
one counts in memory until the `teardown` of the old one has written its last. One server at a time
uses a file, which it locks: a second one says so and does not count.
"""

import asyncio
import base64
import contextlib
import fcntl
import itertools
import logging
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from spywatcher import Shared, Spy

#: Keys that wait in memory: about 100 bytes each.
MOST_WAITING = 500_000
#: The largest number in SQLite. Discord gives out larger ids from 2084 on.
LARGEST = 2**63 - 1
#: Rows of one statement: well within the 32,766 values that SQLite takes.
MOST_INSERTED = 500
#: Members that are written to Redis at a time, and seconds between two such writes: a few
#: milliseconds of work, that others can do theirs between.
MOST_SENT = 500
BREATH = 0.005
#: Seconds after which it is a problem that Redis takes nothing; /health/ready names others sooner.
MOST_APART = 30.0
#: Seconds that a stop may take to write the last rows.
LAST_WORDS = 2.0

#: A guild and a member of it.
Person = tuple[int, int]
#: hour, guild, member, then the columns of the shape
Row = list[Any]
Result = TypeVar("Result")


class Shape(NamedTuple):
    """How a plugin's rows look."""

    #: What follows hour, guild and member.
    columns: tuple[str, ...]
    #: How many of these tell rows of one member in one hour apart.
    keys: int
    #: SQL that adds up two rows of one key.
    merge: str
    #: SQL: how much a member has in a file, as `forget` tells it.
    amount: str
    #: A column whose values are bytes; they are text (base64) in Redis.
    packed: str = ""

    @property
    def table(self) -> str:
        key = ", ".join(("hour", "guild", "member", *self.columns[: self.keys]))
        columns = ", ".join(self.columns)
        return f"(hour INTEGER, guild INTEGER, member INTEGER, {columns}, PRIMARY KEY ({key})) WITHOUT ROWID"

    def values(self, prefix: str, first: int) -> str:
        """The columns from a JSON array, of which `first` comes before."""
        values = [f"{prefix} ->> {first + number}" for number in range(len(self.columns))]
        return self._by_column("unpacked", values)

    @property
    def texts(self) -> str:
        """The columns as JSON can hold them."""
        return self._by_column("packed", self.columns)

    def _by_column(self, function: str, values: Sequence[str]) -> str:
        return ", ".join(
            f"{function}({value})" if column == self.packed else value
            for column, value in zip(self.columns, values, strict=True)
        )


KEYS = (
    "(hour INTEGER, guild INTEGER, member INTEGER, PRIMARY KEY (hour, guild, member)) WITHOUT ROWID"
)
PEOPLE = "(SELECT value ->> 0, value ->> 1 FROM json_each(?))"

#: One step for each hour that there is, however many rows it has.
HOURS = """WITH RECURSIVE hours (hour) AS (
    SELECT min(hour) FROM work.counts UNION ALL
    SELECT (SELECT min(hour) FROM work.counts WHERE hour > hours.hour) FROM hours
    WHERE hour IS NOT NULL)"""
#: Rows of those who are to go.
OF_GONE = f"""(hour, guild, member) IN
    ({HOURS} SELECT hours.hour, gone.guild, gone.member FROM hours, gone)"""
#: Whose rows in an hour differ from what is kept.
NOTE = "INSERT OR IGNORE INTO work.noted SELECT DISTINCT hour, guild, member FROM"


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


class Rows:
    """The working set, and what waits in memory to become part of it. Lives in one thread."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.db.create_function("packed", 1, to_text, deterministic=True)
        self.db.create_function("unpacked", 1, to_bytes, deterministic=True)
        self.db.executescript(
            f"CREATE TABLE batch {shape.table}; CREATE TABLE waiting {shape.table};"
            "CREATE TABLE gone (guild INTEGER, member INTEGER, PRIMARY KEY (guild, member))"
            " WITHOUT ROWID; ATTACH '' AS work"
        )
        self.begin()
        #: Whether the working set has all that was kept before.
        self.loaded = False
        #: Keys that wait, or a few more.
        self.waiting = 0
        #: For how many hours rows are kept, and the newest hour that is out of these.
        self.hours = self.horizon = 0
        #: How many were written to what outlives the process; who reads it begins again at 0.
        self.written = 0
        #: What keeps the working set from taking what waits, for the operator.
        self.problem: str | None = None

    @property
    def tables(self) -> list[str]:
        """Where rows are now."""
        return ["waiting", "work.counts"] if self.loaded else ["waiting"]

    def add(self, rows: list[Row]) -> str:
        """Take rows; returns the table that has just these, or nothing if there was no room."""
        if self.waiting + len(rows) > MOST_WAITING:
            (self.waiting,) = self.db.execute("SELECT count(*) FROM waiting").fetchone()
        if self.waiting + len(rows) > MOST_WAITING:
            return ""
        table = "batch" if self.waiting else "waiting"
        self.waiting += len(rows)
        self.db.execute("DELETE FROM batch")
        self._insert(table, rows)
        if table == "batch":
            self._merge("batch", "waiting")
        return table

    def drop(self, people: list[Person]) -> None:
        """Remove all rows of these."""
        text = (to_json(people),)
        self.db.execute(f"DELETE FROM waiting WHERE (guild, member) IN {PEOPLE}", text)
        self.db.execute(f"INSERT OR IGNORE INTO gone SELECT * FROM {PEOPLE}", text)

    def settle(self) -> None:
        """Have what waits become part of the working set, and remove what is too old."""
        self.db.execute("DELETE FROM waiting WHERE hour <= ?", (self.horizon,))
        try:
            if self.loaded:
                self._settle()
        except sqlite3.Error as error:
            self.problem = f"no room for a copy of the counts ({error}); counting in memory"
        else:
            self.problem = None

    def discard(self) -> None:
        """Remove what waits."""
        self.waiting = 0
        for table in ("waiting", "gone"):
            self.db.execute(f"DELETE FROM {table}")

    def _settle(self) -> None:
        with transaction(self.db):
            if self.db.execute("SELECT 1 FROM gone LIMIT 1").fetchone():
                self.delete(OF_GONE)
                self.db.execute("DELETE FROM gone")
            if self.waiting:
                self.db.execute(f"{NOTE} waiting")
                self._merge("waiting", "work.counts")
                self.db.execute("DELETE FROM waiting")
            for table in ("counts", "noted"):  # what keeps them knows when they end
                self.db.execute(f"DELETE FROM work.{table} WHERE hour <= ?", (self.horizon,))
        self.waiting = 0

    def ignore(self, members: list[int]) -> None:
        """Remove all rows of these, in all guilds."""
        if members:
            where, values = "member IN (SELECT value FROM json_each(?))", to_json(members)
            self.db.execute(f"DELETE FROM waiting WHERE {where}", (values,))
            if self.loaded:
                self.delete(where, values)

    def delete(self, where: str, *values: Any) -> None:
        """Remove rows of the working set, wherever they are kept."""
        self.db.execute(f"{NOTE} work.counts WHERE {where}", values)
        self.db.execute(f"DELETE FROM work.counts WHERE {where}", values)

    def put(self, row: Row) -> None:
        """Add a row to the working set."""
        self.db.execute("INSERT OR IGNORE INTO work.noted VALUES (?, ?, ?)", row[:3])
        self._insert("work.counts", [row])

    def note_all(self) -> None:
        """What keeps the rows may lack anything."""
        self.db.execute(f"{NOTE} work.counts")

    def begin(self) -> None:
        """Begin the working set, or begin it again."""
        self.db.execute("DETACH DATABASE work")
        self.db.execute("ATTACH DATABASE '' AS work")
        self.db.execute("PRAGMA work.journal_mode = MEMORY")
        tables = {"counts": self.shape.table, "noted": KEYS, "sending": KEYS}
        for name, columns in tables.items():
            self.db.execute(f"CREATE TABLE work.{name} {columns}")

    def _insert(self, table: str, rows: list[Row]) -> None:
        """In a few long statements: between any two Python may have to wait for its turn."""
        for first in range(0, len(rows), MOST_INSERTED):
            some = rows[first : first + MOST_INSERTED]
            places = ", ".join([f"({', '.join('?' * len(some[0]))})"] * len(some))
            values = list(itertools.chain.from_iterable(some))
            try:
                self.db.execute(f"INSERT INTO {table} VALUES {places}", values)
            except OverflowError:
                self._insert(table, [row for row in some if max(row[1:4]) <= LARGEST])

    def _merge(self, table: str, into: str) -> None:
        self.db.execute(f"INSERT INTO {into} SELECT * FROM {table} WHERE true {self.shape.merge}")


def to_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def to_text(packed: bytes | None) -> str | None:
    return None if packed is None else base64.b64encode(packed).decode()


def to_bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


# ---- what outlives the process ---------------------------------------------


class InUseError(Exception):
    """Another server uses the file."""

    def __str__(self) -> str:
        return "another server uses it"


#: Number N brings a file of schema version N to N + 1. Only ever append.
MIGRATIONS = (
    "CREATE TABLE disk.counts {table}; CREATE TABLE disk.forgotten (guild INTEGER, member INTEGER);",
)


class SingleFile:
    """The SQLite file of a single process, by the name `disk` in the connection of the rows."""

    def __init__(self, path: Path, rows: Rows) -> None:
        self.path = path
        self._rows = rows
        self._db = rows.db
        self._lock: int | None = None
        self._attached = False

    def attach(self, *, alone: bool = True) -> None:
        """Open the file, which is made where there is none; `alone`: raise InUseError if not."""
        self._db.execute("ATTACH DATABASE ? AS disk", (str(self.path),))
        self._attached = True
        try:
            if alone:
                self._claim()
            self._prepare()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Close the file."""
        if self._attached:
            self._db.execute("DETACH DATABASE disk")
        self._attached = False
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _claim(self) -> None:
        # Not the database itself: to close a second descriptor of it ends the locks of SQLite.
        self._lock = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUseError from error

    def _prepare(self) -> None:
        run = self._db.execute
        run("PRAGMA disk.auto_vacuum = INCREMENTAL")  # heeded only by an empty file
        run("PRAGMA disk.journal_mode = WAL")
        run("PRAGMA disk.synchronous = NORMAL")  # a crash of the machine may cost a checkpoint
        run("PRAGMA disk.journal_size_limit = 16777216")
        run("PRAGMA disk.secure_delete = ON")
        (version,) = run("PRAGMA disk.user_version").fetchone()
        if version > len(MIGRATIONS):
            raise sqlite3.NotSupportedError(f"written by a newer version (schema {version})")
        for number in range(version, len(MIGRATIONS)):
            migration = MIGRATIONS[number].format(table=self._rows.shape.table)
            self._db.executescript(
                f"BEGIN; {migration} PRAGMA disk.user_version = {number + 1}; COMMIT;"
            )

    def load(self) -> None:
        """Have the working set begin with what the file has."""
        self.detach()
        self.attach()
        self._rows.begin()
        with transaction(self._db):
            self._db.execute("INSERT INTO work.counts SELECT * FROM disk.counts")
            self._db.execute("DELETE FROM disk.forgotten")  # they are not in it any more

    def save(self) -> list[tuple[int | None, int]]:
        """Write what is noted; returns whom the command line has had forgotten since."""
        if not self._attached:  # a damaged one was put aside
            self.attach()
            self._rows.note_all()
        run = self._db.execute
        with transaction(self._db):
            if run("SELECT 1 FROM work.noted LIMIT 1").fetchone():
                run(
                    "DELETE FROM disk.counts"
                    " WHERE (hour, guild, member) IN (SELECT * FROM work.noted)"
                )
                self._rows.written += run(
                    "INSERT INTO disk.counts SELECT counts.* FROM work.noted"
                    " CROSS JOIN work.counts USING (hour, guild, member)"
                ).rowcount
                run("DELETE FROM work.noted")
            old = run("DELETE FROM disk.counts WHERE hour <= ?", (self._rows.horizon,))
            forgotten = run("SELECT guild, member FROM disk.forgotten").fetchall()
            run("DELETE FROM disk.forgotten")
        if old.rowcount > 0:
            self._db.executescript("PRAGMA disk.incremental_vacuum")  # `execute` frees one page
        return forgotten

    def inherit(self) -> None:
        """Have the working set take what it lacks from this file."""
        self.attach()
        here = "SELECT 1 FROM work.counts AS here WHERE (here.hour, here.guild, here.member)"
        missing = (
            f"disk.counts WHERE NOT EXISTS ({here} = (counts.hour, counts.guild, counts.member))"
        )
        with transaction(self._db):
            self._db.execute(f"{NOTE} {missing}")
            self._db.execute(f"INSERT INTO work.counts SELECT * FROM {missing}")

    def leave(self) -> None:
        """All of it is kept elsewhere now."""
        if self._attached:
            self._db.execute("DELETE FROM disk.counts")
            self._db.executescript("PRAGMA disk.incremental_vacuum")
            self.detach()

    def put_aside(self, error: Exception) -> str | None:
        """Where the error says that the file is damaged, rename it; returns a line for the log."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return None
        self.detach()
        aside = self.path.with_name(
            f"{self.path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S%f}Z"
        )
        self.path.rename(aside)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        return f"{self.path} is damaged ({error}): put aside as {aside.name}, a fresh one is begun"

    def forget(self, guild: int | None, member: int) -> int:
        """Remove a member's rows, and have a server that runs follow; how much they were."""
        who = {"guild": guild, "member": member}
        where = "member = :member AND (:guild IS NULL OR guild = :guild)"
        amount, run = self._rows.shape.amount, self._db.execute
        with transaction(self._db):
            (removed,) = run(f"SELECT {amount} FROM disk.counts WHERE {where}", who).fetchone()
            run(f"DELETE FROM disk.counts WHERE {where}", who)
            run("INSERT INTO disk.forgotten VALUES (:guild, :member)", who)
        return int(removed)


def forget_member(path: Path, shape: Shape, member: int, guild: int | None) -> int:
    """Remove a member from a file, whether a server uses it or not; returns how much there was."""
    if not path.exists():
        return 0
    rows = Rows(shape)
    try:
        file = SingleFile(path, rows)
        file.attach(alone=False)
        return file.forget(guild, member)
    finally:
        rows.db.close()


# ---- what has them outlive it ----------------------------------------------

Run = Callable[..., Awaitable[Any]]


class Backing(Protocol):
    """What outlives the process."""

    async def load(self) -> None:
        """Have the working set begin with what there is."""

    async def save(self) -> tuple[list[tuple[int | None, int]], bool]:
        """Write what is noted. Returns whom the command line has had forgotten since (guild or
        None for all, member), and whether there is more to write."""


class Alone:
    """The file of a single process."""

    def __init__(self, file: SingleFile, run: Run) -> None:
        self._file = file
        self._run = run

    async def load(self) -> None:
        await self._run(self._file.load)

    async def save(self) -> tuple[list[tuple[int | None, int]], bool]:
        forgotten = await self._run(self._file.save)
        return forgotten, bool(forgotten)


#: In Redis, a table GUILD:HOUR has for each member an array of that hour's rows.
CHANGES = """SELECT json_group_object(
        guild || ':' || hour, json_array((hour + ?) * 3600 - ?, json(members)))
    FROM (SELECT hour, guild, json_group_object(CAST(member AS TEXT), rows) AS members
        FROM (SELECT hour, guild, member, (SELECT nullif(json_group_array(
                    json_array({texts})), '[]') || ''
                FROM work.counts WHERE (counts.hour, counts.guild, counts.member)
                    = (sending.hour, sending.guild, sending.member)) AS rows
            FROM work.sending)
        GROUP BY hour, guild)"""
CHUNK = """(SELECT CAST(substr(tables.key, instr(tables.key, ':') + 1) AS INTEGER) AS hour,
        CAST(tables.key AS INTEGER) AS guild, CAST(members.key AS INTEGER) AS member,
        members.value AS texts
    FROM json_each(?) AS tables, json_each(tables.value) AS members)"""


class Together:
    """Redis, for a service of several nodes; what a single process left in its file moves there."""

    def __init__(
        self,
        shared: Shared,
        rows: Rows,
        file: SingleFile,
        log: logging.Logger,
        now: Callable[[], float],
        run: Run,
    ) -> None:
        self._shared = shared
        self._rows = rows
        self._db = rows.db
        self._file = file
        self._log = log
        self._now = now
        self._run = run
        self._hours = 0  # for which everything in Redis is kept
        self._doubtful = False  # whether Redis may have lost what it was given, or not lost enough

    async def load(self) -> None:
        await self._run(self._rows.begin)
        async for chunk in self._shared.read():
            await self._run(self._take, chunk)
        self._hours = self._rows.hours
        if self._file.path.exists():
            try:
                await self._run(self._file.inherit)
            except (sqlite3.Error, OSError, InUseError) as error:
                self._log.error("%s is not taken over: %s", self._file.path, error)
                await self._run(self._file.detach)

    async def save(self) -> tuple[list[tuple[int | None, int]], bool]:
        if self._hours != self._rows.hours:
            await self._run(self._rows.note_all)
            self._hours = self._rows.hours
        if self._doubtful:
            await self._compare_all()
        changes = await self._run(self._changes)
        news = await self._shared.write(changes)
        more = await self._run(self._sent)
        self._doubtful = news.restarted
        if more:
            await asyncio.sleep(BREATH)
        else:
            await self._run(self._file.leave)
        return news.forgotten, more

    async def _compare_all(self) -> None:
        """Redis came back: have it get everything, and lose what it should have lost."""
        await self._run(self._rows.note_all)
        async for chunk in self._shared.read():
            await self._run(self._compare, chunk)
        self._doubtful = False

    # -- in the thread of the rows

    def _take(self, chunk: str) -> None:
        """Take some of what Redis has."""
        values = self._rows.shape.values("row.value", 0)
        self._db.execute(
            f"INSERT OR REPLACE INTO work.counts SELECT hour, guild, member, {values}"
            f" FROM {CHUNK}, json_each(texts) AS row",
            (chunk,),
        )

    def _compare(self, chunk: str) -> None:
        """Note what Redis has and should not have any more."""
        self._db.execute(
            f"INSERT OR IGNORE INTO work.noted SELECT hour, guild, member FROM {CHUNK} AS there"
            " WHERE NOT EXISTS (SELECT 1 FROM work.counts WHERE (counts.hour, counts.guild,"
            " counts.member) = (there.hour, there.guild, there.member))",
            (chunk,),
        )

    def _changes(self) -> str:
        """The newest of what is noted, as `Shared.write` takes it."""
        run = self._db.execute
        with transaction(self._db):
            run("INSERT OR IGNORE INTO work.noted SELECT * FROM work.sending")
            run("DELETE FROM work.sending")
            run(
                "INSERT INTO work.sending SELECT * FROM work.noted"
                " ORDER BY hour DESC, guild DESC, member DESC LIMIT ?",
                (MOST_SENT,),
            )
            run(
                "DELETE FROM work.noted WHERE (hour, guild, member) IN (SELECT * FROM work.sending)"
            )
        sql = CHANGES.format(texts=self._rows.shape.texts)
        text: str
        (text,) = run(sql, (self._hours + 1, int(self._now()))).fetchone()
        return text

    def _sent(self) -> bool:
        """Redis has the last changes; whether there are more."""
        self._rows.written += self._db.execute("DELETE FROM work.sending").rowcount
        return self._db.execute("SELECT 1 FROM work.noted LIMIT 1").fetchone() is not None


class Counter(Protocol):
    """The plugin's side of a `Keeper`."""

    async def flush(self) -> None:
        """Hand over to `Rows` what was counted."""

    async def begin(self) -> None:
        """The rows of before are in the working set."""

    async def forget(self, guild: int | None, member: int) -> None:
        """The command line has had a member forgotten, in one guild or in all."""


class Keeper:
    """Has a plugin's rows outlive the process, and says what is in the way."""

    def __init__(
        self, spy: Spy, rows: Rows, path: Path, counter: Counter, now: Callable[[], float]
    ) -> None:
        self._spy = spy
        self._rows = rows
        self._counter = counter
        self._thread = ThreadPoolExecutor(1, spy.log.name)
        self._file = SingleFile(path, rows)
        self._backing: Backing = (
            Alone(self._file, self.run)
            if spy.shared is None
            else Together(spy.shared, rows, self._file, spy.log, now, self.run)
        )
        self._patience = 0.0 if spy.shared is None else MOST_APART
        self._one_step = asyncio.Lock()
        self._has_turn = False
        self._agreed = time.monotonic()
        self._problem: str | None = None
        #: Whether the working set has all that was kept before.
        self.loaded = False
        #: Whether another server counts, so that this one should not.
        self.idle = False
        self._first = asyncio.create_task(self.step())

    @property
    def complete(self) -> bool:
        """Whether there is all that will be: with a file that cannot be read, what is in memory."""
        return self.loaded or (self._patience == 0 and self._problem is not None and not self.idle)

    async def run(self, work: Callable[..., Result], *values: Any) -> Result:
        """Do something in the thread of the rows."""
        done = asyncio.get_running_loop().run_in_executor(self._thread, work, *values)
        return await asyncio.shield(done)  # who gives up waiting does not take the counts along

    async def started(self, timeout: float | None = None) -> None:
        """Return once it was tried to load what was kept before, or after `timeout` seconds."""
        await asyncio.wait([self._first], timeout=timeout)

    async def step(self) -> None:
        """Do what there is to do. What prevents it is a problem, and the next step tries again."""
        async with self._one_step:
            try:
                await self._counter.flush()
                if not await self._takes_turn():
                    return
                await self._agree()
            except ConnectionError as error:
                if time.monotonic() - self._agreed > self._patience:
                    self._problem = f"Redis does not get the counts: {error}"
            except InUseError:
                self.idle = True
                self._problem = (
                    f"{self._file.path} is used by another server: this one does not count"
                )
                await self.run(self._rows.discard)
            except (sqlite3.Error, OSError) as error:
                self._problem = await self.run(self._explain, error)
            else:
                self._problem = None
                self._agreed = time.monotonic()
            self._report()

    async def close(self) -> None:
        """Keep the last, and let the next instance of the plugin take its turn."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS):
                    await self._close()
        finally:
            self._first.cancel()
            await self.run(self._file.detach)
            if self._has_turn:
                self._spy.alone.release()
            # It has done all; to wait for its end would hold up the loop.
            self._thread.shutdown(wait=False)

    async def _close(self) -> None:
        if not self._has_turn:
            self._has_turn = await self._spy.alone.acquire()
        if not self.idle:
            await self.step()

    async def _takes_turn(self) -> bool:
        """Whether no other instance of the plugin is still at it."""
        if not self._has_turn and not self._spy.alone.locked():
            self._has_turn = await self._spy.alone.acquire()
        return self._has_turn

    async def _agree(self) -> None:
        if not self.loaded:
            await self._backing.load()
            self.loaded, self.idle = True, False
            await self._counter.begin()
        more = True
        while more:
            forgotten, more = await self._backing.save()
            for guild, member in forgotten:
                await self._counter.forget(guild, member)

    def _explain(self, error: Exception) -> str | None:
        """What keeps the rows from being kept; a damaged file is put aside, and that is all."""
        if self._patience:
            return f"no room for a copy of the counts ({error}); counting in memory"
        path = self._file.path
        try:
            notice = self._file.put_aside(error)
        except OSError as refusal:
            return f"{path} is damaged ({error}) and cannot be moved: {refusal}"
        if notice is None:
            full = ", and new counts are dropped" if self._rows.waiting >= MOST_WAITING else ""
            return f"{path} cannot be written ({error}); counting in memory{full}"
        self._spy.log.error("%s", notice)
        return None

    def _report(self) -> None:
        problem = self._problem or self._rows.problem
        self._spy.problem = problem
        self._spy.count("failed writes", problem is not None)
        written, self._rows.written = self._rows.written, 0
        self._spy.count("written rows", written)
