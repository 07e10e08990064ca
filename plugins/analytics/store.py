"""What analytics keep: counts by member, channel and hour, and the window of them summed up."""

from collections.abc import Container
from typing import Annotated, Any

from msgspec import Meta

from spywatcher import PluginSettings

from .._counts import PEOPLE, Person, Row, Rows, Shape, to_json, transaction

Id = Annotated[str, Meta(pattern=r"^[0-9]{1,20}$")]
ListLength = Annotated[int, Meta(ge=1, le=1000)]
#: Rows to be added, then people to be dropped.
Job = tuple[list[Row], list[Person]]


class Settings(PluginSettings, frozen=True):
    #: Days that the counts go back.
    window_days: Annotated[int, Meta(ge=1, le=366)] = 7
    #: Changes of status that make a silent member a lurker.
    lurker_min_presence: Annotated[int, Meta(ge=1)] = 5
    #: Members never counted, by id.
    ignore_members: tuple[Id, ...] = ()
    #: Members in the list of ghosts.
    ghosts: ListLength = 10
    #: Members in the list of lurkers.
    lurkers: ListLength = 10
    #: Members in the list of channel diversity.
    channel_diversity: ListLength = 20


ADD = """ON CONFLICT DO UPDATE SET
    typing = typing + excluded.typing, messages = messages + excluded.messages,
    reactions = reactions + excluded.reactions, presences = presences + excluded.presences"""

SHAPE = Shape(
    columns=("channel", "typing", "messages", "reactions", "presences"),
    keys=1,
    merge=ADD,
    amount="total(typing + messages + reactions + presences)",
)

#: In memory: the window summed up. A place is forgotten when its last hour leaves the window.
SUMS = """
CREATE TABLE totals (
    guild INTEGER, member INTEGER,
    typing INTEGER, messages INTEGER, reactions INTEGER, presences INTEGER, channels INTEGER,
    PRIMARY KEY (guild, member)) WITHOUT ROWID;
CREATE TABLE places (
    guild INTEGER, member INTEGER, channel INTEGER, last INTEGER,
    PRIMARY KEY (guild, member, channel)) WITHOUT ROWID;
"""

GHOSTS = """SELECT member, typing / (messages + 1.0) AS score FROM totals
    WHERE guild = ? AND typing > 0 ORDER BY score DESC, member LIMIT ?"""
# Where there are no messages, all channels are those typed or reacted in.
LURKERS = """SELECT member, presences / (1.0 + typing + reactions) AS score, channels
    FROM totals WHERE guild = ? AND messages = 0 AND presences >= ?
    ORDER BY score DESC, member LIMIT ?"""
EXPLORERS = """SELECT member, channels FROM totals
    WHERE guild = ? AND channels > 0 ORDER BY channels DESC, member LIMIT ?"""


class Totals:
    """The window summed up by member, in memory: what the lists are made from."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._db = rows.db
        self._db.executescript(SUMS)

    def lists(self, guild: int, settings: Settings) -> tuple[list[Any], list[Any], list[Any]]:
        run, least = self._db.execute, settings.lurker_min_presence
        return (
            run(GHOSTS, (guild, settings.ghosts)).fetchall(),
            run(LURKERS, (guild, least, settings.lurkers)).fetchall(),
            run(EXPLORERS, (guild, settings.channel_diversity)).fetchall(),
        )

    def counted(self, guild: int) -> list[Person]:
        """Everybody who was counted in a guild."""
        return self._db.execute(
            "SELECT guild, member FROM totals WHERE guild = ?", (guild,)
        ).fetchall()

    def known_as(self, guild: int | None, member: int) -> list[Person]:
        """A member, in one guild or in all where it was counted."""
        return self._db.execute(
            "SELECT guild, member FROM totals WHERE member = ? AND guild = ifnull(?, guild)",
            (member, guild),
        ).fetchall()

    def add(self, table: str) -> None:
        """Sum up a table's rows, too."""
        horizon = (self._rows.horizon,)
        self._db.execute(
            "INSERT INTO totals SELECT guild, member,"
            f" sum(typing), sum(messages), sum(reactions), sum(presences), 0 FROM {table}"
            f" WHERE hour > ? GROUP BY guild, member {ADD}",
            horizon,
        )
        self._db.execute(
            f"INSERT INTO places SELECT guild, member, channel, max(hour) FROM {table}"
            " WHERE hour > ? AND channel > 0 GROUP BY guild, member, channel"
            " ON CONFLICT DO UPDATE SET last = max(last, excluded.last)",
            horizon,
        )
        self._count_channels(f"SELECT guild, member FROM {table} WHERE channel > 0")

    def drop(self, people: list[Person]) -> None:
        for table in ("totals", "places"):
            self._db.execute(
                f"DELETE FROM {table} WHERE (guild, member) IN {PEOPLE}", (to_json(people),)
            )

    def begin(self) -> None:
        """Sum up everything anew."""
        for table in ("totals", "places"):
            self._db.execute(f"DELETE FROM {table}")
        for table in self._rows.tables:
            self.add(table)

    def slide(self, horizon: int) -> None:
        """Take out the hours that leave the window."""
        for table in self._rows.tables:
            self._db.execute(
                "INSERT INTO totals SELECT guild, member,"
                " -sum(typing), -sum(messages), -sum(reactions), -sum(presences), 0"
                f" FROM {table} WHERE hour > ? AND hour <= ? GROUP BY guild, member {ADD}",
                (self._rows.horizon, horizon),
            )
        self._count_channels("SELECT guild, member FROM places WHERE last <= ?", horizon)
        self._db.execute("DELETE FROM places WHERE last <= ?", (horizon,))
        self._db.execute(
            "DELETE FROM totals WHERE max(typing, messages, reactions, presences) <= 0"
        )

    def _count_channels(self, people: str, *horizon: int) -> None:
        self._db.execute(
            "UPDATE totals SET channels = (SELECT count(*) FROM places WHERE last > ?"
            " AND places.guild = totals.guild AND places.member = totals.member)"
            f" WHERE (guild, member) IN ({people})",
            (*(horizon or (self._rows.horizon,)), *horizon),
        )


class Store:
    """The rows and their totals, side by side. Lives in one thread."""

    def __init__(self) -> None:
        self.rows = Rows(SHAPE)
        self._db = self.rows.db
        self._totals = Totals(self.rows)
        self._settings = Settings()

    def take(self, jobs: list[Job], hour: int, settings: Settings) -> bool:
        """Add the rows and drop the people of each job; whether anything else changed, too."""
        with transaction(self._db):
            for rows, people in jobs:
                if rows and self.rows.add(rows):  # what is not kept could not leave the window
                    self._totals.add("batch")
                self._drop(people)
        horizon, before = hour - settings.window_days * 24, self.rows.horizon
        if settings != self._settings:
            self._adopt(settings, horizon)
        elif horizon > before:
            with transaction(self._db):
                self._totals.slide(horizon)
            self.rows.horizon = horizon
        self.rows.settle()
        return 0 < before != self.rows.horizon

    def begin(self) -> None:
        """What was kept before is here: count on."""
        self.rows.loaded = True
        self._adopt(self._settings, self.rows.horizon)

    def lists(self, guild: int) -> tuple[list[Any], list[Any], list[Any]]:
        """Ghosts (member, score), lurkers (member, score, channels), explorers (member, channels)."""
        return self._totals.lists(guild, self._settings)

    def keep(self, guild: int, present: Container[int]) -> bool:
        """Drop everybody of a guild who is not present any more; whether there was anybody."""
        absent = [person for person in self._totals.counted(guild) if person[1] not in present]
        with transaction(self._db):
            self._drop(absent)
        return bool(absent)

    def forget(self, guild: int | None, member: int) -> list[int]:
        """Drop a member; in which guilds it was."""
        people = self._totals.known_as(guild, member)
        with transaction(self._db):
            self._drop(people)
        return [guild for guild, _ in people]

    def _drop(self, people: list[Person]) -> None:
        if people:
            self._totals.drop(people)
            self.rows.drop(people)

    def _adopt(self, settings: Settings, horizon: int) -> None:
        """Count anew by these settings."""
        self._settings = settings
        self.rows.hours, self.rows.horizon = settings.window_days * 24, horizon
        self.rows.ignore([int(member) for member in settings.ignore_members])
        self.rows.settle()
        with transaction(self._db):
            self._totals.begin()
