"""From what happens to the counts, and from the counts to the lists."""

import asyncio
import functools
import time
from collections.abc import Callable

from spywatcher import Payload, Spy, member_name, timestamp

from .._counts import MOST_WAITING, Keeper, Row
from .store import Job, Store

#: Seconds in which Discord's repeats of a typing start are the same start.
TYPING_LASTS = 10.0
#: Seconds for which a new subscriber may be given what was computed for another one.
STAYS_NEW = 5.0
#: Where a row has what.
TYPING, MESSAGES, REACTIONS, PRESENCES = 4, 5, 6, 7
#: The channel of a change of status.
NOWHERE = 0


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


class Analytics:
    """Takes counts on the event loop, hands them to the store, and has the lists made."""

    def __init__(self, spy: Spy, now: Callable[[], float], elapsed: Callable[[], float]) -> None:
        """`now` is in seconds since 1970; of `elapsed` only differences count."""
        self._spy = spy
        self._now = now
        self._elapsed = elapsed
        self._fresh: dict[tuple[int, int, int, int], Row] = {}
        self._jobs: list[Job] = []
        self._typing: dict[tuple[int, int], float] = {}  # (member, channel), the longest ago first
        self._arriving: dict[int, tuple[str, set[int]]] = {}  # guild: nonce, members so far
        self._arrived: dict[int, set[int]] = {}  # guilds that came before the counts: who is there
        self._changed: set[int] = set()  # guilds since they were last computed
        self._announced: set[int] = set()  # of these, since the last flush
        self._latest: dict[int, tuple[float, asyncio.Task[AnalyticsUpdate]]] = {}
        self._store = Store()
        self.keeper = Keeper(spy, self._store.rows, spy.storage, self, now)

    # -- what happens

    def count(self, kind: int, guild: int, member: int, channel: int = NOWHERE) -> None:
        ignored = self._spy.settings.ignore_members
        if self.keeper.idle or (ignored and str(member) in ignored):
            return
        hour = int(self._now() // 3600)
        key = hour, guild, member, channel
        row = self._fresh.get(key)
        if row is None:
            if len(self._fresh) >= MOST_WAITING:
                return  # the disk has not even answered for long
            row = self._fresh[key] = [hour, guild, member, channel, 0, 0, 0, 0]
        row[kind] += 1
        if guild not in self._announced:
            self.announce(guild)

    def typed(self, guild: int, member: int, channel: int) -> None:
        """A typing start, unless it is one of Discord's repeats."""
        time_of = self._typing
        moment = self._elapsed()
        while time_of and moment - next(iter(time_of.values())) >= TYPING_LASTS:
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
        self._announced.add(guild)
        if not self.keeper.complete:
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
        if not self.keeper.complete:
            self._arrived[guild] = ids
            return
        ids.update(self._spy.bot.cache.get_members_view_for_guild(guild))  # who joined meanwhile
        await self.flush()
        anybody = await self.keeper.run(self._store.keep, guild, ids)
        if anybody or self._spy.shared is not None:
            self.announce(guild)

    # -- what the keeper calls

    async def flush(self) -> None:
        """Hand over all counts."""
        self._announced.clear()
        self._close_job()
        jobs, self._jobs = self._jobs, []
        hour, settings = int(self._now() // 3600), self._spy.settings
        moved = await self.keeper.run(self._store.take, jobs, hour, settings)
        for guild in [g for g, (made, _) in self._latest.items() if is_old(made)]:
            del self._latest[guild]
        if moved:
            for guild in self._spy.bot.cache.get_guilds_view():
                self.announce(int(guild))

    async def begin(self) -> None:
        """The counts of before are here."""
        await self.keeper.run(self._store.begin)
        arrived, self._arrived = self._arrived, {}
        for guild, ids in arrived.items():
            await self._keep(guild, ids)
        for guild in self._changed - self._arriving.keys():
            self.announce(guild)

    async def forget(self, guild: int | None, member: int) -> None:
        """Forget a member, and what was counted of it until now."""
        await self.flush()
        for changed in await self.keeper.run(self._store.forget, guild, member):
            self.announce(changed)

    # -- the lists

    async def compute(self, guild: int) -> AnalyticsUpdate:
        """The lists as they are now."""
        task = asyncio.ensure_future(self._make(guild))
        self._latest[guild] = time.monotonic(), task
        return await asyncio.shield(task)

    async def newest(self, guild: int) -> AnalyticsUpdate | None:
        """The same, but no more often than once in STAYS_NEW seconds; None: later, to the room."""
        await self.keeper.started()
        if not self.keeper.complete:
            self.announce(guild)
            return None
        made, task = self._latest.get(guild, (0.0, None))
        if task is None or is_old(made):
            return await self.compute(guild)
        if guild in self._changed:
            self.announce(guild)  # perhaps nobody listened when it changed
        return await asyncio.shield(task)

    async def _make(self, guild: int) -> AnalyticsUpdate:
        await self.keeper.started()
        self._changed.discard(guild)
        self._announced.discard(guild)
        await self.flush()
        ghosts, lurkers, explorers = await self.keeper.run(self._store.lists, guild)
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
