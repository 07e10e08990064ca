"""Any number of processes as one service, over Redis alone (design: more than one machine).

Events travel through one Redis stream per guild, everything else through one control stream; one node
holds the gateway; what it knows of guilds is told to all. It knows no event by name and no
plugin; nothing in here is made unless `[redis] url` is set, and nothing here makes an event wait.

    Link · Line · WriteBehind                   the ways to Redis
    Publisher · Tail · Reader                   what goes into streams, and comes out of them once
    Lease · Terms                               who holds the gateway, and what runs there then
    KnownGuilds · SharedAccess · GuildReporter  what decides who may see what, and is told of it
    Peers · Hearing                             what nodes say of their clients; who takes all notes
    Tickets                                     what a client is owed that comes back elsewhere
    Snapshots · Windows                         what the holder makes for all, and the next goes on with
    ClusterNode                                 all of that, in the place of `spywatcher.Node`
    SharedTables · SharedMarks                  what plugins keep for all nodes
    SharedCounters · SharedConnections          what limits count
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import enum
import functools
import itertools
import math
import operator
import random
import re
import secrets
import ssl
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from datetime import datetime
from typing import Any, Final, Generic, NamedTuple, NoReturn, TypeVar

import hikari
import msgspec
from redis import asyncio as aioredis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from spywatcher import (
    MOST_REMEMBERED,
    RECALL_PATIENCE,
    Access,
    AuthSettings,
    Bot,
    Counters,
    DataOrMaker,
    Destination,
    EventData,
    GatewayEvents,
    Logged,
    Marks,
    News,
    Node,
    OpenConnections,
    OperatorError,
    Parts,
    PluginHost,
    RecoverySettings,
    RedisSettings,
    RightsWatcher,
    RoomFrame,
    Settings,
    ShardRange,
    Shared,
    Tell,
    Throttle,
    Ticket,
    Topic,
    Viewer,
    Work,
    decode_offset,
    destination_of,
    encode_offset,
    end_tasks,
    event_packet,
    is_snowflake,
    log,
    read_secret,
    room_guild,
    shown,
    until_one_ends,
    without_login,
)

# What Redis keeps.

CONTROL: Final = "spywatcher:control"  # stream: of all notes but events
GATEWAY: Final = "spywatcher:gateway"  # who holds it; empty: free
TERM: Final = "spywatcher:term"  # the fencing counter
GUILDS: Final = "spywatcher:guilds"  # hash: guild id -> GuildNews
WINDOWS: Final = (
    "spywatcher:windows"  # hash: Topic -> when its window ends, what is to be sent then
)
TICKET: Final = "spywatcher:ticket:"  # by pid: the run of a node, Ticket
OPEN: Final = "spywatcher:open:"  # by run of a node, hash: whose -> connections that are open there
MARKS: Final = "spywatcher:marks"
#: What plugins keep for all nodes: SHARED:PLUGIN:GUILD:ANYTHING is a hash of texts by member,
#: SHARED:PLUGIN the term and number of the last write. The list of whom to forget is short-lived.
SHARED: Final = "spywatcher:shared"
FORGOTTEN: Final = "spywatcher:forgotten"

# What several parts go by, in seconds.

#: Until a holder that does not renew has lost the gateway. A holder counts fewer, from before it
#: asked, so that it has stopped when another begins.
LOCK_TIME: Final = 8.0
TERM_TIME: Final = 7.5
RENEWAL: Final = 0.5
BEAT_INTERVAL: Final = 1.0
#: Between two tellings of who watches here; what was not told three times is forgotten.
ROLL_CALL: Final = 20.0
REDIS_TIMEOUT: Final = 2.0
#: Between two reads or writes while there is much to do: a burst then shares them.
BUSY_REST: Final = 0.005
#: In milliseconds: for how long a stream's entries are kept.
STREAM_AGE: Final = 60_000
#: In milliseconds, by which another holder may be behind this node's own gateway: for so long after
#: this node has lost the gateway its clients hear nothing of the next holder, so as to hear
#: nothing twice.
CHANGE_OF_SOURCE: Final = 1_000
#: Entries or keys that are written at a time.
BATCH: Final = 256

CLAIM: Final = """
local holder, term = redis.call('GET', KEYS[1]), tonumber(redis.call('GET', KEYS[2]) or 0)
local me, ttl, mine, known = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local may_take = tonumber(ARGV[term > 0 and 5 or 6]) > now
if holder == me and term > 0 then
  redis.call('PEXPIRE', KEYS[1], ttl)
  return {term, now, term}
elseif not holder and mine > 0 and term <= mine then
  term = mine
elseif (holder == '' and tonumber(ARGV[5]) > now) or (not holder and may_take) then
  term = math.max(term, known, tonumber(time[1])) + 1
else
  return {0, now, term}
end
redis.call('SET', KEYS[1], me, 'PX', ttl)
redis.call('SET', KEYS[2], term)
return {term, now, term}
"""
RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], '', 'PX', 60000) end
"""
KEEP_WINDOWS: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 3, #ARGV, 3 do
  if ARGV[i + 1] == '' then
    redis.call('HDEL', KEYS[2], ARGV[i])
  else
    local ends = string.format('%.0f ', now + ARGV[i + 1])
    redis.call('HSET', KEYS[2], ARGV[i], ends .. ARGV[i + 2])
  end
end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
"""
#: Term and number let no write count that was overtaken by a later one: of a holder that slept,
#: or over a connection that was given up.
WRITE_SHARED: Final = """
local term, number = tonumber(ARGV[1]), tonumber(ARGV[2])
local last = redis.call('HMGET', KEYS[2], 'term', 'number')
if term == 0 or tonumber(redis.call('GET', KEYS[1]) or 0) ~= term then return {} end
if tonumber(last[1] or 0) == term and tonumber(last[2]) >= number then return {} end
redis.call('HSET', KEYS[2], 'term', term, 'number', number)
for name, entry in pairs(cjson.decode(ARGV[3])) do
  local key = KEYS[2] .. ':' .. name
  for member, text in pairs(entry[2]) do
    if text == cjson.null then
      redis.call('HDEL', key, member)
    else
      redis.call('HSET', key, member, text)
    end
  end
  redis.call('EXPIRE', key, entry[1])
end
local server = redis.call('INFO', 'server')
return {string.match(server, 'run_id:(%x+)'), redis.call('LRANGE', KEYS[3], 0, -1)}
"""
READ_SHARED: Final = """
local most, cursor, start, found, count = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), {}, 0
for number, key in ipairs(KEYS) do
  local texts = {}
  repeat
    local page = redis.call('HSCAN', key, cursor, 'COUNT', most)
    cursor = page[1]
    for at = 1, #page[2], 2 do texts[page[2][at]] = page[2][at + 1] end
    count = count + #page[2] / 2
  until cursor == '0' or count >= most
  if next(texts) then found[string.sub(key, start)] = texts end
  if count >= most then
    return {cjson.encode(found), cursor == '0' and number or number - 1, cursor}
  end
end
return {cjson.encode(found), #KEYS, '0'}
"""


#: What a call raises where Redis does not answer as it should.
REDIS_ERRORS: Final = (RedisError, OSError, TimeoutError)
NewsT = TypeVar("NewsT")
StateT = TypeVar("StateT", bound=msgspec.Struct)


def boot_clock() -> float:
    """Seconds that go on while this process, or its machine, sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def guild_stream(guild_id: str) -> str:
    return f"spywatcher:guild:{guild_id}"


class Note(msgspec.Struct, array_like=True, frozen=True):
    """What one node tells the others.

    `source` is one run of one node. `term` is that of the gateway's holder, 0 for what no gateway
    brought.
    """

    source: str
    term: int
    topic: str
    detail: str = ""
    body: bytes = b""
    #: Of the holder, as it was told: how far its count of events was, here and in what it told before
    #: in the same stream; in its first of a term, when that began.
    position: int = 0
    before: int = 0


#: Entries of a stream, as Redis answers.
Found = list[tuple[bytes, dict[bytes, bytes]]]


class Entry(NamedTuple):
    """A note in a stream. `number` counts its source's entries there: by it a reader tells what it had."""

    id: str
    number: int
    note: Note


class Link:
    """Redis, and whether it can be reached."""

    #: Seconds that a client may be kept waiting; and those, from then on, in which no other is.
    PATIENCE: Final = 0.25
    SLOW_FOR: Final = 1.0
    #: Seconds between two tries, first and later on.
    FIRST_DELAY: Final = 0.05
    LAST_DELAY: Final = 0.5

    def __init__(self, settings: RedisSettings, password: str) -> None:
        self._open = functools.partial(open_redis, settings.url, password)
        self._closed = False
        self._pools: list[Any] = []  # of connections to Redis
        self._sentinels: list[Any] = []  # and to Sentinels
        self.redis = self.client(lambda: True)
        self.up = False
        #: Set once Redis has answered.
        self.reached = asyncio.Event()
        self._slow_until = float("-inf")
        self._why = self._fault = ""
        self._faulty_until = float("-inf")
        self._said = ""  # how things stand, as the log has it: "up", "lost" or "faulty"
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def patience(self) -> AsyncIterator[None]:
        """What a client waits for; raises one of REDIS_ERRORS when that takes too long, or would."""
        if not self.up or time.monotonic() < self._slow_until:
            raise TimeoutError
        try:
            async with asyncio.timeout(self.PATIENCE):
                yield
        except TimeoutError:
            self._slow_until = time.monotonic() + self.SLOW_FOR
            raise

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Raise ConnectionError, which plugins know, for one of REDIS_ERRORS."""
        try:
            yield
        except REDIS_ERRORS as error:
            raise ConnectionError(str(error)) from error

    async def keep(self, work: Callable[[], Coroutine[Any, Any, object]]) -> NoReturn:
        """Do `work`, and again whenever Redis is lost: soon at first, then twice a second."""
        delay = self.FIRST_DELAY
        while True:
            began = time.monotonic()
            try:
                await work()
            except REDIS_ERRORS as error:
                self._lost(error)
            except Exception:  # a bug, which must not end what has to go on
                log.exception("%s failed, and begins anew", work.__qualname__)
            if time.monotonic() - began > self.LAST_DELAY + REDIS_TIMEOUT:
                delay = self.FIRST_DELAY
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, self.LAST_DELAY)

    def client(self, may_connect: Callable[[], bool]) -> Any:
        """A client of one's own, whose connections are made, or made anew, only where one may."""
        client = self._open(lambda: not self._closed and may_connect())
        self._pools.append(client.connection_pool)
        self._sentinels += sentinel_pools(client)
        return client

    @property
    def watched(self) -> bool:
        """Whether Sentinels say where Redis is."""
        return bool(self._sentinels)

    async def follow_master(self) -> None:
        """Leave a master in whose place Sentinel has put another: for seconds it may not know that."""
        while True:
            for pool in self._pools:  # each may ask another Sentinel, and these may not agree
                with contextlib.suppress(*REDIS_ERRORS):  # that they are away is no fault of Redis
                    master = await pool.sentinel_manager.discover_master(pool.service_name)
                    if pool.master_address not in (None, master):
                        await pool.disconnect()
            await asyncio.sleep(BEAT_INTERVAL)

    @property
    def problem(self) -> str | None:
        """Why Redis is of no use now, if so."""
        return None if self.up else self._fault or "no connection to Redis"

    def found(self) -> None:
        """Redis has answered. That it refuses something else meanwhile counts more."""
        if time.monotonic() < self._faulty_until:
            return
        self.up = True
        self.reached.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._said != "up":
            self._said = "up"
            log.info("connected to Redis")

    def _lost(self, error: Exception) -> None:
        """Said once, and not of what is mended within a second."""
        self.up = False
        self._why, self._fault = str(error), fault_of(error)
        if self._fault:  # longer than any work waits before it tries again
            self._faulty_until = time.monotonic() + self.LAST_DELAY * 2
        if self._timer is None and self._said != ("faulty" if self._fault else "lost"):
            self._timer = asyncio.get_running_loop().call_later(1.0, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._said = "faulty" if self._fault else "lost"
        why = self._fault or f"no connection to Redis ({self._why})"
        log.warning("%s; dashboards stay up, trying again", why)

    async def close(self) -> None:
        """What is being connected meanwhile, for a client that waits, is closed as soon as it is."""
        self._closed, self.up = True, False
        if self._timer is not None:
            self._timer.cancel()
        for pool in (*self._pools, *self._sentinels):
            with contextlib.suppress(*REDIS_ERRORS):
                await pool.aclose()


class Line:
    """One connection to Redis, which is made anew on request alone: the next may lead to another Redis."""

    def __init__(self, link: Link) -> None:
        self._made = False
        self.redis = link.client(lambda: not self._made)

    async def renew(self) -> str:
        """Returns which run of Redis is at the other end."""
        self._made = False
        await self.redis.connection_pool.disconnect()
        server: str = (await self.redis.info("server"))["run_id"]
        self._made = True
        return server


class WriteBehind(Generic[NewsT]):
    """What Redis is to know of some keys, told in batches; what could not be told is told again."""

    def __init__(
        self,
        write: Callable[[dict[Any, NewsT]], Awaitable[bool]],
        everything: Callable[[], dict[Any, NewsT]],
    ) -> None:
        """`write` returns whether Redis took it; `everything` returns all that there is."""
        self.news: dict[Any, NewsT] = {}
        self._write = write
        self._everything = everything
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()

    def tell_all(self) -> None:
        """Redis may have lost some, or is about to forget it."""
        self.news = self._everything() | self.news

    def wake(self) -> None:
        """Tell at once, and not within half a second."""
        self._wake.set()

    async def work(self) -> None:
        """Tell for as long as Redis answers."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEWAL):
                    await self._wake.wait()
            self._wake.clear()
            if await self.flush():
                self.wake()
            await asyncio.sleep(BUSY_REST)

    async def drain(self) -> None:
        """Tell all that Redis takes."""
        while await self.flush():
            pass

    async def flush(self) -> bool:
        """Tell some of it. Returns whether there is more that Redis would take."""
        async with self._writing:
            batch = dict(itertools.islice(self.news.items(), BATCH))
            for key in batch:
                del self.news[key]
            taken = not batch
            try:
                taken = taken or await self._write(batch)
            finally:
                if not taken:
                    self.news = batch | self.news
        return taken and bool(self.news)


#: What Redis says to one of several commands: behind what was sent, and as Python writes a tuple.
QUOTED_ERROR: Final = re.compile(
    r""".* of pipeline caused error: (?:\(["'])?(.*?)(?:["'],\))?$""", re.DOTALL
)


def fault_of(error: Exception) -> str:
    """What an operator has to mend, where Redis is there and will not have this node; else empty."""
    if isinstance(error, AuthenticationError | ResponseError):
        said = QUOTED_ERROR.sub(r"\1", str(error))
        advice = "see redis.url and redis.password_file"
        if "Invalid stream ID" in said:  # what an older one takes MINID of XADD for
            advice = "expected Redis 6.2 or newer"
        return f"Redis refuses this node ({said}): {advice}"
    if isinstance(error.__context__, ssl.SSLError):
        return f"no TLS with Redis ({error}): see redis.url and its ssl_ca_certs"
    return ""


def sentinel_pools(client: Any) -> list[Any]:
    """The connections to the Sentinels that tell a client where Redis is, if that is how it knows."""
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    return [sentinel.connection_pool for sentinel in manager.sentinels] if manager else []


LOGIN: Final = r"((?P<login>[^@/?#\s]*)@)?"
HOST: Final = r"(\[[0-9A-Fa-f:.%]+\]|[^@:,/?#\[\]\s]+)(:\d{1,5})?"
TLS_FILE: Final = r"ssl_(ca_certs|certfile|keyfile)=[^&#\s]+"
#: The forms of `redis.url`: how each is matched, and how it is told.
URLS: Final = {
    "redis": (rf"redis://{LOGIN}{HOST}(/\d*)?", "redis://[USER:PASSWORD@]HOST[:PORT][/DB]"),
    "rediss": (
        rf"rediss://{LOGIN}{HOST}(/\d*)?(\?{TLS_FILE}(&{TLS_FILE})*)?",
        "rediss://[USER:PASSWORD@]HOST[:PORT][/DB][?ssl_ca_certs=FILE]",
    ),
    "unix": (rf"unix://{LOGIN}/[^?#]+(\?db=\d+)?", "unix://[USER:PASSWORD@]/PATH[?db=DB]"),
    "redis+sentinel": (
        rf"redis\+sentinel://{LOGIN}(?P<hosts>{HOST}(,{HOST})*)(/(?P<db>\d*)(/(?P<name>[\w.-]+))?)?",
        "redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...][/DB[/NAME]]",
    ),
}


def bad_url(url: str) -> OperatorError:
    _, form = URLS.get(url.partition("://")[0], ("", ", ".join(f"{one}://" for one in URLS)))
    return OperatorError(
        f"redis.url: got {without_login(url)}, expected {form}"
        " (other characters than letters and digits as %XX in USER and PASSWORD)"
    )


def open_redis(url: str, password: str, may_connect: Callable[[], bool] = lambda: True) -> Any:
    """A client for redis://, rediss://, unix:// or redis+sentinel://; its calls raise REDIS_ERRORS.

    Each call is tried once: whoever makes it knows best what to do next. Raises OperatorError.
    """
    pattern, _ = URLS.get(url.partition("://")[0], ("", ""))
    found = re.fullmatch(pattern, url)
    if not found:
        raise bad_url(url)
    if password and (found["login"] or "").partition(":")[2]:
        raise OperatorError(
            f"redis.url: {without_login(url)} has a password, and redis.password_file is set too;"
            " expected one of them"
        )

    async def greet(connection: Any) -> None:
        if not may_connect():
            raise aioredis.ConnectionError("Redis closed the connection")
        await connection.on_connect()

    options: dict[str, Any] = {
        "socket_timeout": REDIS_TIMEOUT,
        "socket_connect_timeout": REDIS_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    options["redis_connect_func"] = greet
    more: dict[str, Any] = {"password": password} if password else {}
    try:
        if url.startswith("redis+sentinel:"):
            client: Any = sentinel_client(found, options, more)
        else:
            client = aioredis.Redis.from_url(url, **options, **more)
        if url.startswith("rediss:"):
            client.connection_pool.make_connection().ssl_context.get()
    except ValueError as error:  # a port over 65535, say; its message may quote the password
        raise bad_url(url) from error
    except OSError as error:
        files = url.partition("?")[2]
        raise OperatorError(f"redis.url: cannot use {files}: {error.strerror}") from error
    return client


class Sentinels(Sentinel):
    """Asked by one connection at a time: of two, redis-py 8.1 loses the Sentinel that is away."""

    def __init__(self, *places: Any, **options: Any) -> None:
        super().__init__(*places, **options)  # type: ignore[no-untyped-call]  # it has no types
        self._asking = asyncio.Lock()

    async def discover_master(self, name: str) -> Any:
        """Where it is. What redis-py says where nobody knows is all that it has of each Sentinel."""
        async with self._asking:
            try:
                return await super().discover_master(name)
            except MasterNotFoundError as error:
                said = f"no Sentinel in reach names a master {name!r} that is up"
                raise MasterNotFoundError(said) from error


def sentinel_client(found: re.Match[str], options: dict[str, Any], more: dict[str, Any]) -> Any:
    """A client for the Redis of which the Sentinels say that it is the master now.

    Sentinels are asked without user and password, as they are by default.
    """
    urls = [parse_url(f"redis://{host}") for host in found["hosts"].split(",")]
    places = [(one["host"], one.get("port", 26379)) for one in urls]
    login = parse_url(f"redis://{found['login'] or ''}@host/{found['db'] or 0}")
    del login["host"]
    sentinel = Sentinels(places, sentinel_kwargs=options, **{**options, **login, **more})
    return sentinel.master_for(found["name"] or "mymaster")


def redis_password_of(settings: Settings) -> str:
    """Empty where the URL has it, or there is none."""
    return read_secret("", settings.redis.password_file, settings.folder, "redis.password")


def check_redis(settings: Settings) -> None:
    """Raises OperatorError where no Redis could be reached like this, whatever runs there."""
    open_redis(settings.redis.url, redis_password_of(settings))


class Waiting(NamedTuple):
    """An entry on its way to Redis; `guild` is the field of GUILDS that is set before it, if any."""

    stream: str
    term: int
    data: bytes
    guild: str
    since: float
    number: int = 0  # as of `Entry`, once it may be sent


class Publisher:
    """Puts notes into streams, in order, behind a bounded queue that outlives Redis."""

    #: Topics of notes before which GUILDS has what they are about.
    OF_A_GUILD: Final = ("guild", "change")
    #: The most entries of a stream, and of those that are kept to be sent again to an emptied Redis;
    #: and for how many seconds these are.
    STREAM_LENGTH: Final = 20_000
    RECENT_AGE: Final = 30.0
    #: Milliseconds for which a stream lasts that gets nothing: its last entry tells who comes back
    #: that nothing was missed.
    STREAM_LASTS: Final = 86_400_000
    #: Entries and bytes that may wait for Redis.
    MOST_WAITING: Final = 100_000
    MOST_WAITING_BYTES: Final = 67_108_864

    def __init__(
        self,
        link: Link,
        lease: Lease,
        known: KnownGuilds,
        on_restart: Callable[[], None],
        window: float,
    ) -> None:
        """`on_restart` is called when Redis came back as another run of it, perhaps without its data.

        Entries of the last `window` seconds can be recovered.
        """
        self._age = STREAM_AGE + int(window * 1000)
        self._position = self._began = 0  # in the count of events: now, and when the term began
        self._positions: dict[str, int] = {}  # what each stream was told last in this term
        self._link = link
        self._lease = lease
        self._known = known
        self._on_restart = on_restart
        self._line = Line(link)
        self._numbers: collections.Counter[str] = collections.Counter()
        self._queue: collections.deque[Waiting] = collections.deque()
        self._batch: list[Waiting] = []  # under way
        self._recent: collections.deque[Waiting] = collections.deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._server = ""
        self._now = 0  # Redis' clock, in milliseconds
        #: Entries that never reached Redis: for want of room; since another holder had begun.
        self.dropped = self.fenced = 0

    def __len__(self) -> int:
        return len(self._queue) + len(self._batch)

    async def drained(self) -> None:
        """Until nothing waits for Redis."""
        await self._drained.wait()

    @property
    def leading(self) -> bool:
        """Whether this node may say what only the holder of the gateway says."""
        return self._lease.leading

    def begin_term(self, position: int) -> None:
        """From here on this node's count of events is that of all."""
        self._position = self._began = position
        self._positions.clear()

    def tell(self, topic: str, detail: str = "", content: object = None) -> None:
        """Say something to all other nodes that any node may say, in the form of `Hearing.topics`."""
        self._put(CONTROL, Note(self._lease.source, 0, topic, detail, encode_state(content)))

    def tell_as_holder(self, topic: str, detail: str = "", content: object = None) -> None:
        """Say what only the holder may say; without a term, nothing."""
        if self.leading:
            self._put_counted(CONTROL, topic, detail, encode_state(content))

    def send(self, to: Destination, packet: bytes, position: int) -> None:
        """Send the event of this position to the other nodes as soon as Redis can."""
        self._position = position
        self._put_counted(guild_stream(to.guild_id), to.kind, to.channel_id, packet)

    def _put_counted(self, stream: str, topic: str, detail: str, body: bytes) -> None:
        term, position = self._lease.led, self._position
        before = self._positions.get(stream, self._began)
        self._positions[stream] = position
        self._put(stream, Note(self._lease.source, term, topic, detail, body, position, before))

    def _put(self, stream: str, note: Note) -> None:
        """Never waits; past the bounds the oldest goes."""
        data = msgspec.msgpack.encode(note)
        guild = note.detail if stream == CONTROL and note.topic in self.OF_A_GUILD else ""
        self._queue.append(Waiting(stream, note.term, data, guild, time.monotonic()))
        self._bytes += len(data)
        while self._queue and (
            len(self) > self.MOST_WAITING or self._bytes > self.MOST_WAITING_BYTES
        ):
            self._numbers[self._drop_oldest().stream] += 1  # a gap for readers to see
            if not self.dropped:
                log.error("other nodes miss events: Redis was away for too long or took too little")
            self.dropped += 1
        self._wake.set()
        self._drained.clear()

    def _drop_oldest(self) -> Waiting:
        item = self._queue.popleft()
        self._bytes -= len(item.data)
        return item

    def _number(self, item: Waiting) -> Waiting:
        if item.number:  # it is sent again
            return item
        self._numbers[item.stream] += 1
        return item._replace(number=self._numbers[item.stream])

    async def work(self) -> None:
        """Send over one connection, for as long as it lasts: the next may lead to another Redis."""
        self._queue.extendleft(reversed(self._batch))
        self._batch = []
        server = await self._line.renew()
        if self._server not in ("", server):
            self._queue.extendleft(reversed(self._recent))
            self._bytes += sum(len(item.data) for item in self._recent)
            self._recent.clear()
            self._on_restart()
        self._server = server
        self._link.found()
        while True:
            await self._take_batch()
            await self._write()
            if self._queue:
                await asyncio.sleep(BUSY_REST)

    async def _take_batch(self) -> None:
        """What may be sent now. Of a holder whose term is in doubt nothing, until it is clear."""
        while not self._batch:
            while not self._queue:
                self._drained.set()
                self._wake.clear()
                await self._wait_on_line()
            verdict = self._lease.verdict(self._queue[0].term)
            if verdict is None:
                await asyncio.sleep(BUSY_REST)
            elif not verdict:
                self._drop_oldest()
                self.fenced += 1
            else:
                term = self._queue[0].term
                while self._queue and len(self._batch) < BATCH and self._queue[0].term in (0, term):
                    self._batch.append(self._number(self._queue.popleft()))

    async def _wait_on_line(self) -> None:
        """Until there is something to send; a connection that ends meanwhile is noticed."""
        try:
            async with asyncio.timeout(BEAT_INTERVAL):
                await self._wake.wait()
        except TimeoutError:
            await self._line.redis.ping()

    async def _write(self) -> None:
        pipe = self._line.redis.pipeline(transaction=False)
        streams = {item.stream for item in self._batch}
        for guild in {item.guild for item in self._batch} - {""}:
            data = self._known.encoded(int(guild))
            pipe.hdel(GUILDS, guild) if data is None else pipe.hset(GUILDS, guild, data)
        for item in self._batch:
            fields = {"n": item.data, "i": item.number}
            pipe.xadd(item.stream, fields, minid=max(0, self._now - self._age))
        for stream in streams:
            pipe.xtrim(stream, maxlen=self.STREAM_LENGTH, approximate=True)
            pipe.pexpire(stream, self.STREAM_LASTS)
        answers = await pipe.execute()
        self._now = int(next(a for a in answers if isinstance(a, bytes)).partition(b"-")[0])
        self._bytes -= sum(len(item.data) for item in self._batch)
        self._recent.extend(self._batch)
        self._batch = []
        oldest = time.monotonic() - self.RECENT_AGE
        while self._recent and (
            len(self._recent) > self.STREAM_LENGTH or self._recent[0].since < oldest
        ):
            self._recent.popleft()


def numbers_of(entry_id: str) -> tuple[int, int]:
    """Milliseconds and count of an entry's id (Redis documentation: Streams, Entry IDs)."""
    milliseconds, _, count = entry_id.partition("-")
    return int(milliseconds), int(count)


class Tail:
    """How far one stream was read, and what was had from whom."""

    def __init__(self, last: str) -> None:
        self.last = last
        self._had: dict[str, int] = {}
        self._term = 0
        #: Since when nobody needs the stream.
        self.idle_since = math.inf
        #: Entries that were not there any more, since the reader asked last.
        self.lost = 0

    def admits(self, entry: Entry) -> bool:
        """Whether this entry is new: not had before, and not of a holder that was replaced."""
        note, had = entry.note, self._had.get(entry.note.source, 0)
        if entry.number <= had or 0 < note.term < self._term:
            return False
        self.lost += entry.number - had - 1 if had else 0
        self._had[note.source] = entry.number
        self._term = max(self._term, note.term)
        return True


class Reader:
    """Reads the control stream and those of the guilds that this node's clients are in."""

    #: Entries of one stream that are read at a time.
    BATCH_READ: Final = 1_000
    #: Seconds for which a guild that nobody watches any more is still read: a page may only reload.
    LINGER: Final = 15.0
    PROBE_INTERVAL: Final = 5.0

    def __init__(self, link: Link, source: str, hearing: Hearing) -> None:
        self._link = link
        self._source = source
        self._own = f"spywatcher:node:{source}"
        self._hearing = hearing
        self._tails: dict[str, Tail] = {}
        self._newest = "0-0"
        self._heard = time.monotonic()
        self._read_at = boot_clock()
        #: Whether to catch up before anything else is read.
        self.missed = True
        #: Entries that no note could be made of.
        self.unreadable = 0

    def __len__(self) -> int:
        return len(self._tails)

    # -- which streams

    def follow(self, guild_id: str) -> asyncio.Task[None] | None:
        """Read a guild's stream from now on; None: it is read.

        Done when that is so, or when Redis takes too long to say.
        """
        stream = guild_stream(guild_id)
        if (tail := self._tails.get(stream)) is None:
            return asyncio.create_task(self._begin(stream))
        tail.idle_since = math.inf
        return None

    async def _begin(self, stream: str) -> None:
        await self._poke_soon()
        self._tails.setdefault(stream, Tail(self._newest))
        await self._poke_soon()  # ends the read that waits, so that the next one has the stream

    async def _poke_soon(self) -> None:
        with contextlib.suppress(*REDIS_ERRORS):
            async with self._link.patience():
                await self.poke()

    def leave_all_but(self, needed: Set[str]) -> None:
        """Read streams for LINGER more that are not needed any longer: a page may only reload."""
        now = time.monotonic()
        for stream, tail in list(self._tails.items()):
            is_needed = stream in needed or stream in (CONTROL, self._own)
            tail.idle_since = math.inf if is_needed else min(tail.idle_since, now)
            if now - tail.idle_since >= self.LINGER:
                del self._tails[stream]

    # -- hearing oneself

    async def poke(self) -> None:
        """Put an entry into this node's own stream: what is added anywhere later has a later id."""
        pipe = self._link.redis.pipeline(transaction=False)
        pipe.xadd(self._own, {"n": b""}, maxlen=10)
        pipe.pexpire(self._own, STREAM_AGE)
        entry_id, _ = await pipe.execute()
        milliseconds = int(entry_id.partition(b"-")[0])
        self._newest = f"{milliseconds - 1}-{2**63}"

    @property
    def deaf(self) -> bool:
        """Whether two of its own probes went unheard."""
        return time.monotonic() - self._heard > self.PROBE_INTERVAL * 2.5

    async def probe(self) -> None:
        """Hear oneself through Redis, or read anew."""
        while True:
            await self.poke()
            await asyncio.sleep(self.PROBE_INTERVAL)
            if self.deaf and self._link.up:
                log.error("this node does not hear itself through Redis; it subscribes anew")
                await self._link.redis.connection_pool.disconnect()

    # -- reading

    async def work(self) -> None:
        """Read for as long as Redis answers."""
        await self.poke()
        self._tails.setdefault(CONTROL, Tail(self._newest))
        self._tails.setdefault(self._own, Tail("0-0"))
        self._restart_after_clock_step()
        while True:
            if self.missed:
                await self._hearing.catch_up()
                self.missed = False
            where = {stream: tail.last for stream, tail in self._tails.items()}
            answer = await self._link.redis.xread(where, count=self.BATCH_READ, block=1000)
            self._link.found()
            self._notice_gap()
            found = {stream.decode(): entries for stream, entries in answer}
            if own := found.pop(self._own, None):
                self._heard = time.monotonic()
                self._end(self._own, own)
            await self._take(found)
            if answer:
                await asyncio.sleep(BUSY_REST)

    def _notice_gap(self) -> None:
        """Who has not read for long may find that something was trimmed meanwhile."""
        before, self._read_at = self._read_at, boot_clock()
        self.missed |= self._read_at - before > STREAM_AGE / 2_000

    def _restart_after_clock_step(self) -> None:
        """A Redis that came back with an earlier clock gives earlier ids: read all that it has."""
        now, _ = numbers_of(self._newest)
        for tail in self._tails.values():
            if numbers_of(tail.last)[0] > now + 1:
                tail.last = "0-0"

    async def _take(self, found: dict[str, Found]) -> None:
        """All streams in one, in the order of the holder's count: what decides rights is in the control
        stream, between the events before and after it. How far the count is in one stream, it then is
        in all; beyond what was cut off of a long answer nothing is taken yet.
        """
        streams = {stream: self._counted(stream, entries) for stream, entries in found.items()}
        cut = [
            counted[-1][0]
            for stream, counted in streams.items()
            if counted and len(found[stream]) == self.BATCH_READ
        ]
        limit = min(cut, default=math.inf)
        await self._hearing.prepare([entry.note for _, entry in streams.get(CONTROL, ())])
        batch = [
            (position, stream == CONTROL, stream, entry)
            for stream, counted in streams.items()
            for position, entry in counted
            if position <= limit
        ]
        for _, _, stream, entry in sorted(batch, key=operator.itemgetter(0, 1)):
            self._admit(stream, entry)
        if not cut:
            for stream, entries in found.items():
                self._end(stream, entries)
            self._hearing.caught_up()

    def _counted(self, stream: str, found: Found) -> list[tuple[int, Entry]]:
        """Entries with their place in the holder's count: what says none follows what was before it."""
        entries = list(self.decode(stream, found))
        positions = itertools.accumulate((entry.note.position for entry in entries), max)
        return list(zip(positions, entries, strict=True))

    def _admit(self, stream: str, entry: Entry) -> None:
        tail = self._tails.get(stream)
        if tail is None:
            return
        if tail.admits(entry) and entry.note.source != self._source:
            try:
                self._hearing.take(stream, entry)
            except Exception:  # one bad note, of another version perhaps, must not stop all others
                log.exception("a note of another node could not be taken: %s", entry.note.topic)
        tail.last = entry.id

    def _end(self, stream: str, found: Found) -> None:
        """All that was found in a stream is taken, also what could not be read of it."""
        tail = self._tails.get(stream)
        if tail is not None and found:
            tail.last = found[-1][0].decode()
            self._look_for_losses(stream, tail)

    def has_read(self, stream: str, entry_id: str) -> bool:
        """Whether this entry does not come any more."""
        tail = self._tails.get(stream)
        return tail is not None and numbers_of(entry_id) <= numbers_of(tail.last)

    def _look_for_losses(self, stream: str, tail: Tail) -> None:
        lost, tail.lost = tail.lost, 0
        if lost and stream == CONTROL:
            self.missed = True
        elif lost:
            log.error("%d events of another node were lost", lost)

    def decode(self, stream: str, found: Found) -> Iterator[Entry]:
        """What can be read of these; of the rest the first is told."""
        for entry_id, fields in found:
            try:
                note = msgspec.msgpack.decode(fields[b"n"], type=Note)
                yield Entry(entry_id.decode(), int(fields[b"i"]), note)
            except (KeyError, ValueError) as error:
                if not self.unreadable:
                    log.error("an entry of %s cannot be read: %s", stream, type(error).__name__)
                self.unreadable += 1


class LeaseState(enum.Enum):
    """Where a node stands with the right to hold the gateway, which one node has for a term.

    Redis decides: a key names the holder and runs out after LOCK_TIME, a counter gives each new
    holder a higher term. A node asks every RENEWAL seconds. It may count on an answer for
    TERM_TIME from before it asked, by a clock that goes on while the process sleeps: less than
    LOCK_TIME, so that one holder has stopped telling others before the next begins. What happens
    leads to one state, whatever the state was before:

        it happens that                               the state is then
        Redis says that its term lasts or begins      HELD
        Redis says that it does not, or it lets go    STANDBY
        TERM_TIME goes by without an answer           LAPSED, if it was HELD

        state     it is      its gateway   it publishes           its own clients hear
        STANDBY   not held   is closed     nothing of a gateway   the holder, by the streams
        HELD      held       runs          at once                its own gateway
        LAPSED    in doubt   runs          nothing yet            its own gateway

    A node without Redis is LAPSED for as long as that lasts, and tells its own clients what comes.
    When Redis is back, either nobody else has had a term: the node takes up its own again and
    publishes what it has kept. Or somebody has: what it has kept is dropped, and its clients hear
    the new holder from CHANGE_OF_SOURCE on. So each client has one source at any time.

    The value is whether what was done in its term may be published; None: Redis has to say.
    """

    STANDBY = False
    HELD = True
    LAPSED = None


class Lease:
    """The right to hold the gateway, as Redis gives it to this node and takes it away."""

    #: Seconds of contact with Redis before a gateway that nobody holds may be taken, so that a
    #: holder that is alive comes first: where it has run out; where Redis knows no term, and nobody
    #: told of one (else LOCK_TIME: a holder that is cut off from Redis counts on that).
    EXPIRED_PATIENCE: Final = 1.0
    FIRST_PATIENCE: Final = 1.5
    #: Seconds, by Redis' clock, in which a claim counts: who was frozen does not act on old ones.
    CLAIM_LASTS: Final = 1.0

    def __init__(self, link: Link, source: str) -> None:
        self._link = link
        self.source = source
        self._line = Line(link)
        self._claim = self._line.redis.register_script(CLAIM)
        self._release = link.redis.register_script(RELEASE)
        self._state = LeaseState.STANDBY
        self._until = float("-inf")
        #: The term that is HELD or LAPSED; 0: STANDBY.
        self.term = 0
        #: That in which this node's gateway and plugins run; 0: they do not.
        self.led = 0
        #: The latest term that this node has heard of.
        self.known = 0
        self._lost_at = -math.inf  # when the last term was, by Redis' clock in milliseconds
        self._offset: float | None = None  # of Redis' clock, in milliseconds; None: not known yet
        self._empty_since = math.inf  # since when Redis knows no term, by `boot_clock`
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        #: Whether this node wants the gateway at all.
        self.wanted = True

    @property
    def state(self) -> LeaseState:
        """By this node's own clock, as it is now."""
        if self._state is LeaseState.HELD and boot_clock() >= self._until:
            self._state = LeaseState.LAPSED
        return self._state

    def holds(self) -> bool:
        """Whether no other node can hold the gateway now."""
        return self.state is LeaseState.HELD

    @property
    def leading(self) -> bool:
        """Whether gateway and plugins run here."""
        return self.led > 0

    def verdict(self, term: int) -> bool | None:
        """Whether what was done in this term may be published; None: Redis has to say."""
        if term in (0, self.term):
            return not term or self.state.value
        return False

    def hears(self, term: int) -> bool:
        """Whether what the holder of this term tells is for this node: not beside its own gateway."""
        return not term or not self.term or term < self.term

    def may_have_brought(self, entry: Entry) -> bool:
        """Whether this node's clients may have an event from its own gateway, their source then."""
        milliseconds, _ = numbers_of(entry.id)
        return entry.note.term > 0 and milliseconds < self._lost_at + CHANGE_OF_SOURCE

    def saw_term(self, term: int) -> None:
        """Another node had this term."""
        self.known = max(self.known, term)

    def wake(self) -> None:
        """The gateway has become free."""
        self._wake.set()

    async def wait(self, ready: Callable[[int], bool]) -> None:
        """Until the term is such."""
        async with self._changed:
            await self._changed.wait_for(lambda: ready(self.term))

    async def work(self) -> None:
        """Renew, or wait for a chance to take over, over one connection, for as long as it lasts.

        The next one may lead to another Redis, where a holder that is alive is to come first.
        """
        await self._line.renew()
        since = previous = boot_clock()
        while True:
            began = boot_clock()
            if began - previous > REDIS_TIMEOUT:
                since = began  # this process slept, and saw nothing
            previous = began
            await self._become(await self._ask(began - since), began + TERM_TIME)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEWAL):
                    await self._wake.wait()

    async def _ask(self, contact: float) -> int:
        if not self.wanted:
            return 0
        mine = self.term if self.term >= self.known else 0  # another had a term: Redis has lost it
        milliseconds = int(LOCK_TIME * 1000)
        args = [self.source, milliseconds, mine, self.known, *self._deadlines(contact)]
        term, now, latest = await self._claim(keys=[GATEWAY, TERM], args=args)
        self._offset = int(now) - boot_clock() * 1000
        self._empty_since = math.inf if latest else min(self._empty_since, boot_clock())
        self._link.found()
        return int(term)

    def _deadlines(self, contact: float) -> tuple[int, int]:
        """Until when, by Redis' clock, the gateway may be taken: where it ran out, where Redis is new."""
        now = boot_clock()
        if self._offset is None:
            return 0, 0
        until = int(self._offset + (now + self.CLAIM_LASTS) * 1000)
        empty = min(contact, now - self._empty_since)
        patience = LOCK_TIME if self.known else self.FIRST_PATIENCE
        return until * (contact >= self.EXPIRED_PATIENCE), until * (empty >= patience)

    async def _become(self, term: int, until: float) -> None:
        before, self.term, self._until = self.term, term, until
        self._state = LeaseState.HELD if term else LeaseState.STANDBY
        self.saw_term(term)
        if term == before:
            return
        if before:
            self._lost_at = (self._offset or 0.0) + boot_clock() * 1000
            log.info("this node no longer holds the gateway")
        if term:
            log.info("this node holds the gateway")
        async with self._changed:
            self._changed.notify_all()

    async def release(self) -> None:
        """Let another node take over at once."""
        self.wanted = False
        if self.term:
            with contextlib.suppress(*REDIS_ERRORS):
                await self._release(keys=[GATEWAY], args=[self.source])
        await self._become(0, 0.0)


class RoleState(msgspec.Struct, array_like=True, frozen=True):
    permissions: hikari.Permissions


class OverwriteState(msgspec.Struct, array_like=True, frozen=True):
    allow: hikari.Permissions
    deny: hikari.Permissions


class ChannelState(msgspec.Struct, array_like=True, frozen=True):
    permission_overwrites: dict[int, OverwriteState]
    type: hikari.ChannelType = hikari.ChannelType.GUILD_TEXT


class ThreadState(msgspec.Struct, array_like=True, frozen=True):
    parent_id: int
    type: hikari.ChannelType


class MemberState(msgspec.Struct, array_like=True, frozen=True):
    id: int
    role_ids: list[int]
    raw_communication_disabled_until: datetime | None


class GuildState(msgspec.Struct, array_like=True, frozen=True):
    id: int
    name: str
    icon_hash: str | None
    owner_id: int


class GuildNews(msgspec.Struct, array_like=True, frozen=True):
    """What decides who may see what in a guild, by id: all of it, or what has changed; None: gone.

    What stands here has the attributes of hikari's entities.
    """

    guilds: dict[int, GuildState | None] = {}  # this one alone
    roles: dict[int, RoleState | None] = {}
    channels: dict[int, ChannelState | None] = {}
    threads: dict[int, ThreadState | None] = {}


PARTS: Final = GuildNews.__struct_fields__
#: What one user is in each guild; None: no member.
Memberships = dict[int, MemberState | None]


def encode_state(state: object) -> bytes:
    """hikari's flags and enumerations go as their numbers."""
    return msgspec.msgpack.encode(state, enc_hook=int)


def decode_state(data: bytes, form: Any) -> Any:
    return msgspec.msgpack.decode(data, type=form, dec_hook=as_hikari)


def as_hikari(kind: type[Any], value: Any) -> Any:
    """One of hikari's flags or enumerations, by its number."""
    return kind(value)


def states(entities: Mapping[Any, Any], form: type[StateT]) -> dict[int, StateT | None]:
    """What is told of hikari's entities, by id; None of none."""
    return {
        int(number): entity
        and msgspec.convert(entity, form, from_attributes=True, dec_hook=as_hikari)
        for number, entity in entities.items()
    }


class KnownGuilds:
    """What holders of the gateway told of their guilds; answers as hikari's cache does.

    How sure what is here of a guild is:

        it is heard that                             and while a holder is heard of, it is
        nothing                                      not sure
        Redis has it, as a holder put it there once  not sure
        a holder tells of it, or that it is gone     sure
        a holder says that it has told of all        sure, as is that others do not exist
        notes were missed, or the holder is another  not sure: what is here is learnt anew

    While no holder is heard of (`fresh`) nothing is sure.
    """

    def __init__(self) -> None:
        self.clear()
        self._heard = float("-inf")
        self._changed = asyncio.Event()

    def clear(self) -> None:
        """Forget all: it may be outdated."""
        self.guilds: dict[int, GuildNews] = {}
        self.members: dict[int, Memberships] = {}
        self._all = GuildNews()
        self.doubt()

    def doubt(self) -> None:
        """Another holder has begun: what is here may be outdated until that one has told."""
        self._told: set[int] = set()  # guilds of which a holder told, in this node's hearing
        #: Users of whom everything was told: where `members` has nothing, they are no members.
        self.whole: set[int] = set()
        #: Whether the holder has told of all of its guilds.
        self.complete = False

    @property
    def fresh(self) -> bool:
        """Whether a holder was heard of within its term: else what is known may be outdated."""
        return boot_clock() - self._heard < LOCK_TIME

    def beat(self, complete: bool) -> bool:
        """A holder is there. Returns whether only now everything is known, or again."""
        known = self.fresh and self.complete
        self._heard = boot_clock()
        news, self.complete = complete and not known, complete
        if news:
            self.wake()
        return news

    async def wait(self) -> None:
        """Until something changes."""
        await self._changed.wait()

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def knows(self, guild_id: int) -> bool:
        """Whether what is here of a guild is how things stand, even if that is nothing."""
        return self.complete or guild_id in self._told

    def load_guild(self, guild_id: int, guild: GuildNews) -> None:
        """Something to begin with, from Redis."""
        if guild_id not in self._told:
            self.put_guild(guild_id, guild)
            self._told.discard(guild_id)

    def put_guild(self, guild_id: int, guild: GuildNews) -> None:
        """All of a guild; what is not there is gone."""
        self._told.add(guild_id)
        known = self.guilds.setdefault(guild_id, GuildNews())
        for part in PARTS:
            gone = dict.fromkeys(getattr(known, part))
            self._enter(known, part, gone | getattr(guild, part))
        if not known.guilds:
            del self.guilds[guild_id]
        self.wake()

    def change_guild(self, guild_id: int, change: GuildNews) -> None:
        """Some of a guild that is known."""
        if (known := self.guilds.get(guild_id)) is not None:
            for part in PARTS:
                self._enter(known, part, getattr(change, part))
            self.wake()

    def _enter(self, known: GuildNews, part: str, news: Mapping[int, Any]) -> None:
        for table in (getattr(known, part), getattr(self._all, part)):
            for number, entity in news.items():
                if entity is None:
                    table.pop(number, None)
                else:
                    table[number] = entity

    def encoded(self, guild_id: int) -> bytes | None:
        """What GUILDS is to hold of a guild."""
        guild = self.guilds.get(guild_id)
        return None if guild is None else encode_state(guild)

    def put_members(self, user_id: int, news: Memberships, whole: bool) -> set[int]:
        """`whole`: nothing else is known or true. Returns the guilds in which this changes anything."""
        old = self.members.get(user_id, {})
        new = news if whole else old | news
        changed = {guild for guild in {*old, *new} if old.get(guild) != new.get(guild)}
        self.members[user_id] = new
        if whole and user_id not in self.whole:
            self.whole.add(user_id)
            changed |= self.guilds.keys()
        self.wake()
        return changed

    def knows_member(self, user_id: int, guild_id: int) -> bool:
        return user_id in self.whole or guild_id in self.members.get(user_id, {})

    def forget_member(self, user_id: int) -> None:
        self.members.pop(user_id, None)
        self.whole.discard(user_id)

    # -- as Directory

    def get_guild(self, guild_id: int) -> GuildState | None:
        return self._all.guilds.get(guild_id)

    def guild_ids(self) -> Collection[int]:
        return tuple(self.guilds)

    def guilds_of(self, user_id: int) -> Collection[int]:
        return tuple(self.members.get(user_id, ()))

    def get_member(self, guild_id: int, user_id: int) -> MemberState | None:
        return self.members.get(user_id, {}).get(guild_id)

    def get_role(self, role_id: int) -> RoleState | None:
        return self._all.roles.get(role_id)

    def get_guild_channel(self, channel_id: int) -> ChannelState | None:
        return self._all.channels.get(channel_id)

    def get_thread(self, thread_id: int) -> ThreadState | None:
        return self._all.threads.get(thread_id)


class SharedAccess(Access):
    """Decides as `Access` does, on every node alike, by what holders of the gateway told."""

    def __init__(
        self,
        auth: AuthSettings,
        watched: Sequence[str],
        known: KnownGuilds,
        cache: hikari.api.Cache,
        publisher: Publisher,
    ) -> None:
        super().__init__(auth, watched, known)
        self._known = known
        self._publisher = publisher
        #: Tells the other nodes, while the gateway is this one's.
        self.reporter = GuildReporter(self, cache, known, publisher)

    def begin(self, guild_ids: Iterable[int], shard_range: ShardRange) -> Collection[int]:
        if not self._publisher.leading:  # the last word of a session that counts no more
            return ()
        lost = super().begin(guild_ids, shard_range)
        for guild_id in lost:  # though hikari may still have it
            self.reporter.tell_guild(guild_id, None)
        return lost

    def fill(self, guild_id: int) -> None:
        super().fill(guild_id)
        self.reporter.tell_filled(guild_id)

    def may_view(self, viewer: Viewer, guild_id: str) -> bool | None:
        """None, too, while no holder is heard of or it has not told of this guild."""
        if not self.watches(guild_id):
            return False
        if not self._known.fresh or not self._known.knows(int(guild_id)):
            return None
        return super().may_view(viewer, guild_id)

    @property
    def complete(self) -> bool:
        return self._known.fresh and self._known.complete

    def _is_sure(self, viewer: Viewer, guild_id: int) -> bool:
        by_claim = viewer.role in self._admin_roles or viewer.guilds is not None
        if not self._known.knows(guild_id) or by_claim or not is_snowflake(viewer.discord_id):
            return self._known.knows(guild_id)
        return self._known.knows_member(int(viewer.discord_id), int(guild_id))


class GuildReporter:
    """Tells all nodes of the holder's guilds, and of the members who look on.

    Members are told only of viewers who have a dashboard open somewhere, so that a guild of
    100,000 costs no more than one of ten.
    """

    def __init__(
        self,
        access: Access,
        cache: hikari.api.Cache,
        known: KnownGuilds,
        publisher: Publisher,
    ) -> None:
        self._access = access
        self._cache = cache
        self._known = known
        self._publisher = publisher
        self._wanted: dict[int, float] = {}  # viewers with a dashboard anywhere, until when

    @property
    def complete(self) -> bool:
        """Whether every guild has been told of, by this holder or by one before."""
        return self._known.complete or self._access.all_whole

    def wants(self, user_id: int) -> bool:
        """Whether this user looks on somewhere."""
        return user_id in self._wanted

    def subscribe(self, events: GatewayEvents) -> None:
        """Before whoever judges by what is told here."""
        for change in RightsWatcher.CHANNEL_CHANGES + RightsWatcher.GUILD_CHANGES:
            events.subscribe(change, self._on_change)
        for change in RightsWatcher.MEMBER_CHANGES:
            events.subscribe(change, self._on_member_change)

    def _on_change(self, event: Any) -> None:
        if not self._access.is_whole(event.guild_id):
            return
        if isinstance(event, hikari.ThreadListSyncEvent):  # of many threads at once
            self.tell_guild(event.guild_id, self._cache.get_guild(event.guild_id))
            return
        change, guild_id = self._change_of(event), int(event.guild_id)
        self._known.change_guild(guild_id, change)
        self._publisher.tell_as_holder("change", str(guild_id), change)

    def _change_of(self, event: Any) -> GuildNews:
        cache = self._cache
        if isinstance(event, hikari.GuildUpdateEvent):
            return GuildNews(states({event.guild_id: event.guild}, GuildState))
        if isinstance(event, hikari.RoleEvent):
            number = event.role_id
            return GuildNews(roles=states({number: cache.get_role(number)}, RoleState))
        if isinstance(event, hikari.GuildThreadEvent):
            number = event.thread_id
            return GuildNews(threads=states({number: cache.get_thread(number)}, ThreadState))
        number = event.channel_id
        return GuildNews(channels=states({number: cache.get_guild_channel(number)}, ChannelState))

    def _on_member_change(self, event: Any) -> None:
        if event.user_id in self._wanted:
            self._tell_member(int(event.user_id), int(event.guild_id))

    def tell_filled(self, guild_id: int) -> None:
        """All of this guild is in hikari's cache, or it is gone."""
        self.tell_guild(guild_id, self._cache.get_guild(guild_id))
        for user_id in self._wanted:
            self._tell_member(user_id, int(guild_id))
            if self._access.all_whole and user_id not in self._known.whole:
                self.tell_members(user_id)

    def tell_guild(self, guild_id: int, guild: hikari.Guild | None) -> None:
        """Whole, or that the bot is not in it."""
        self._known.put_guild(int(guild_id), self._all_of(guild) if guild else GuildNews())
        self._publisher.tell_as_holder("guild", str(int(guild_id)))

    def tell_all(self) -> None:
        """Redis may have lost everything."""
        for guild_id in self._filled():
            self.tell_guild(guild_id, self._cache.get_guild(guild_id))

    def _filled(self) -> list[int]:
        guilds = self._cache.get_guilds_view()
        return [int(guild_id) for guild_id in guilds if self._access.is_whole(guild_id)]

    def want(self, viewers: Iterable[int], unknown: Iterable[int]) -> None:
        """These have a dashboard somewhere, and of some of them nothing is known there."""
        self._wanted.update(dict.fromkeys(viewers, boot_clock() + ROLL_CALL * 3))
        if self._publisher.leading:
            for user_id in unknown:
                self.tell_members(user_id)

    def forget(self) -> None:
        """Nobody has spoken of these viewers for long."""
        now = boot_clock()
        for user_id in [user for user, until in self._wanted.items() if until < now]:
            del self._wanted[user_id]
            self._known.forget_member(user_id)

    def _all_of(self, guild: hikari.Guild) -> GuildNews:
        cache, key = self._cache, guild.id
        return GuildNews(
            states({key: guild}, GuildState),
            states(cache.get_roles_view_for_guild(key), RoleState),
            states(cache.get_guild_channels_view_for_guild(key), ChannelState),
            states(cache.get_threads_view_for_guild(key), ThreadState),
        )

    def _tell_member(self, user_id: int, guild_id: int) -> None:
        """What has changed of a member."""
        news = self._memberships(user_id, [guild_id])
        if self._known.members.get(user_id, {}).get(guild_id, self) != news[guild_id]:
            self._tell_memberships(user_id, news, whole=False)

    def tell_members(self, user_id: int) -> None:
        """All that this user is in guilds that hikari's cache holds whole."""
        news, whole = self._memberships(user_id, self._filled()), self._access.all_whole
        if whole:
            news = {guild: member for guild, member in news.items() if member is not None}
        self._tell_memberships(user_id, news, whole)

    def _memberships(self, user_id: int, guild_ids: Iterable[int]) -> Memberships:
        get_member = self._cache.get_member
        return states({one: get_member(one, user_id) for one in guild_ids}, MemberState)

    def _tell_memberships(self, user_id: int, news: Memberships, whole: bool) -> None:
        self._known.put_members(user_id, news, whole)
        self._publisher.tell_as_holder("members", str(user_id), (whole, news))


class Peers:
    """What nodes tell each other of their clients: whose they are, and in which rooms.

    Of no other members does the holder tell, and for no other rooms does it make anything.
    """

    def __init__(
        self,
        lease: Lease,
        publisher: Publisher,
        known: KnownGuilds,
        reporter: GuildReporter,
        connections: OpenConnections,
        parts: Parts,
    ) -> None:
        self._lease = lease
        self._publisher = publisher
        self._known = known
        self._reporter = reporter
        self._connections = connections
        self._parts = parts
        self._told: frozenset[str] = frozenset()  # rooms
        self._until: dict[str, float] = {}  # other nodes
        self._listening: dict[str, frozenset[str]] = {}

    # -- this node's clients

    def ask(self, discord_id: str) -> None:
        """Have the holder tell what this viewer is in its guilds, where that is not known."""
        if is_snowflake(discord_id) and int(discord_id) not in self._known.whole:
            self._tell_viewers({int(discord_id)})

    def call_roll(self) -> None:
        """Say that this node is there, and whose clients are or may come back; ask for all anew."""
        viewers = {*self._connections.viewers(), *self._parts.recovery.viewers()}
        self._tell_viewers(set(map(int, filter(is_snowflake, viewers))))
        self.tell_rooms(again=True)

    def _tell_viewers(self, viewers: set[int]) -> None:
        """With the latest term known here: who is new would not wait for that one's holder."""
        unknown = viewers - self._known.whole
        self._publisher.tell("node", content=(self._lease.known, viewers, unknown))
        self._reporter.want(viewers, unknown)

    def tell_rooms(self, again: bool) -> None:
        """What somebody here is in, or may come back to, if that has changed."""
        rooms = frozenset({*self._parts.rooms.names(), *self._parts.recovery.rooms()})
        if again or rooms != self._told:
            self._told = rooms
            self._publisher.tell("rooms", content=rooms)

    def guilds(self) -> set[str]:
        """Those of which somebody here is in a room, as told last."""
        return set(map(room_guild, self._told))

    # -- other nodes'

    def has_listeners(self, room: str) -> bool:
        """Whether anybody listens to it at another node."""
        return any(room in rooms for rooms in self._listening.values())

    @property
    def others(self) -> Collection[str]:
        """Those that were heard of lately."""
        return self._until.keys()

    def on_node(self, note: Note, content: tuple[int, set[int], set[int]]) -> None:
        term, viewers, unknown = content
        self._lease.saw_term(term)
        self._reporter.want(viewers, unknown)
        is_new = note.source not in self._until
        self._until[note.source] = boot_clock() + ROLL_CALL * 3
        if is_new:
            self.call_roll()

    def on_rooms(self, note: Note, rooms: frozenset[str]) -> None:
        self._listening[note.source] = rooms

    def on_bye(self, note: Note, _: None) -> None:
        self._until.pop(note.source, None)
        self._listening.pop(note.source, None)
        self._lease.wake()

    def forget(self) -> None:
        """Nothing was heard of these for long."""
        now = boot_clock()
        for source in [source for source, until in self._until.items() if until < now]:
            del self._until[source]
            self._listening.pop(source, None)


class Hearing:
    """Takes in what other nodes tell, and has the rights judged that it changes."""

    def __init__(
        self,
        link: Link,
        lease: Lease,
        known: KnownGuilds,
        reporter: GuildReporter,
        peers: Peers,
        parts: Parts,
    ) -> None:
        self._link = link
        self._lease = lease
        self._known = known
        self._reporter = reporter
        self._peers = peers
        self._parts = parts
        self._term = 0  # of the holder that was heard last, this node or another
        self._position = 0  # how far its count of events was
        self._fetched: dict[str, bytes | None] = {}  # what Redis holds of guilds that were told of
        #: By topic, what a note of the control stream says beside its detail, and who takes it.
        self.topics: dict[str, tuple[Any, Callable[[Note, Any], None]]] = {
            "beat": (bool, self._on_beat),  # whether all guilds have been told of
            "guild": (None, self._on_guild),
            "change": (GuildNews, self._on_change),
            "members": (tuple[bool, Memberships], self._on_members),
            "node": (tuple[int, set[int], set[int]], peers.on_node),
            "rooms": (frozenset[str], peers.on_rooms),
            "bye": (None, peers.on_bye),
        }

    async def catch_up(self) -> None:
        """Notes may have been missed: begin anew, with what a holder has put into Redis."""
        if self._lease.leading:
            return
        self._known.clear()
        found = await self._link.redis.hgetall(GUILDS)
        unread = 0
        for guild_id, data in found.items():
            try:
                self._known.load_guild(int(guild_id), decode_state(data, GuildNews))
            except ValueError:
                unread += 1
        if unread:
            log.info("another version wrote %d guilds in Redis: the holder tells them anew", unread)
        self._peers.call_roll()

    async def prepare(self, notes: Iterable[Note]) -> None:
        """Get ready for these notes of the control stream."""
        ids = list(dict.fromkeys(note.detail for note in notes if note.topic == "guild"))
        found = await self._link.redis.hmget(GUILDS, ids) if ids else []
        self._fetched = dict(zip(ids, found, strict=True))

    def take(self, stream: str, entry: Entry) -> None:
        note = entry.note
        self._lease.saw_term(note.term)
        if not self._lease.hears(note.term):
            return
        self._position = max(self._position, note.position)
        if note.term > self._term:
            self.begin_term(note.term)
        if stream == CONTROL:
            form, on_note = self.topics[note.topic]
            on_note(note, decode_state(note.body, form))
        elif not self._lease.may_have_brought(entry):
            to = Destination(stream.rpartition(":")[2], note.topic, note.detail)
            frame = self._parts.recovery.logs.add(to, note.body, note.position)
            self._parts.clients.send(to, frame)

    def begin_term(self, term: int) -> None:
        """Another holder: what the last one told is asked for anew, of guilds and viewers."""
        self._term = term
        self._known.doubt()
        self._peers.call_roll()

    def caught_up(self) -> None:
        """All has been taken that was told before the latest note."""
        if not self._lease.leading:
            self._parts.recovery.logs.reach(self._position)
        self._known.wake()

    # -- what the holder tells

    def _on_beat(self, note: Note, complete: bool) -> None:
        if self._known.beat(complete):
            self._parts.clients.check_all()

    def _on_guild(self, note: Note, _: None) -> None:
        data = self._fetched[note.detail]
        guild = GuildNews() if data is None else decode_state(data, GuildNews)
        self._known.put_guild(int(note.detail), guild)
        self._parts.clients.check(note.detail)

    def _on_change(self, note: Note, change: GuildNews) -> None:
        self._known.change_guild(int(note.detail), change)
        self._parts.clients.check(note.detail)

    def _on_members(self, note: Note, content: tuple[bool, Memberships]) -> None:
        if self._reporter.wants(int(note.detail)):
            whole, members = content
            for guild_id in self._known.put_members(int(note.detail), members, whole):
                self._parts.clients.check(str(guild_id), note.detail)


class Tickets:
    """What clients that can recover are known by, in Redis for the node to which they come back."""

    def __init__(self, node: ClusterNode, parts: Parts, settings: RecoverySettings) -> None:
        self._node = node
        self._recovery = parts.recovery
        self._clients = parts.clients
        self._max_events = settings.max_events
        self._lasts = int((settings.window + ROLL_CALL) * 1000)
        self.writing = WriteBehind(self._write, lambda: {t.pid: t for t in self._recovery.held()})
        self._taking = asyncio.Lock()

    def change(self, ticket: Ticket) -> None:
        """As Redis is to know it, soon; what is not told again lasts as long as a client may be away."""
        self.writing.news[ticket.pid] = ticket
        self.writing.wake()

    async def _write(self, news: dict[str, Ticket]) -> bool:
        pipe = self._node.link.redis.pipeline(transaction=False)
        for pid, ticket in news.items():
            if self._recovery.has(ticket):
                data = msgspec.msgpack.encode((self._node.source, ticket))
                pipe.set(TICKET + pid, data, px=self._lasts)
            else:
                pipe.delete(TICKET + pid)
        await pipe.execute()
        return True

    # -- a client that comes back

    async def complete(self, pid: str, viewer: Viewer, seen: int, moved: bool) -> None:
        """Have here what its guilds' streams have of what came after `seen`, or forget it.

        What is here already is enough for this node's own clients: they heard it from here.
        """
        ticket = self._recovery.find(pid, viewer.discord_id)
        if ticket is None:
            return
        self._node.peers.ask(viewer.discord_id)
        for guild_id in ticket.since(seen):
            if (following := self._node.follow(guild_id)) is not None:
                await following
        while not self._is_known(ticket, viewer, seen):
            await self._node.known.wait()
        for guild_id, since in ticket.since(seen).items():
            here = self._recovery.logs.reaches(guild_id, since, heard_elsewhere=moved)
            if not here and not await self._fill(guild_id, since):
                self._recovery.forget(ticket)

    async def take(self, pid: str) -> bool:
        """The ticket is this node's from now on. Returns whether it was another's."""
        async with self._taking:
            data = await self._node.link.redis.get(TICKET + pid)
            form = tuple[str, Ticket]
            source, ticket = msgspec.msgpack.decode(data, type=form) if data else ("", None)
            if ticket is None or source == self._node.source:
                return False
            self._node.publisher.tell("moved", pid)
            self._recovery.adopt(ticket)
            self.change(ticket)
            await self.writing.drain()
            return True

    def _is_known(self, ticket: Ticket, viewer: Viewer, seen: int) -> bool:
        """Whether this node has heard as much as the client, and what the viewer may view."""
        may_view = self._node.access.may_view
        return self._recovery.logs.position >= seen and all(
            may_view(viewer, guild_id) is not None for guild_id in ticket.since(seen)
        )

    async def _fill(self, guild_id: str, since: int) -> bool:
        """Put what the stream has before what was heard here, unless something in between is gone."""
        if self._node.leading:
            await self._node.publisher.drained()
        stream, reader = guild_stream(guild_id), self._node.reader
        entries = await self._read_back(stream, since)
        return entries is not None and self._recovery.logs.fill(
            guild_id,
            since,
            [
                logged(guild_id, entry.note)
                for entry in entries
                if entry.note.position > since
                and (entry.note.source == self._node.source or reader.has_read(stream, entry.id))
            ],
        )

    async def _read_back(self, stream: str, since: int) -> list[Entry] | None:
        """The latest entries, back to this position; None where some are gone. Most are away shortly."""
        for count in (self._max_events // 10 + 1, self._max_events * 2):
            tail = Tail("0-0")
            found = await self._node.link.redis.xrevrange(stream, count=count)
            entries = list(filter(tail.admits, self._node.reader.decode(stream, found[::-1])))
            if not tail.lost and (not found or has_all_after(entries, since)):
                return entries
        return None

    def on_moved(self, note: Note, _: None) -> None:
        self._recovery.disown(note.detail)
        self._clients.end(note.detail)


def has_all_after(entries: list[Entry], position: int) -> bool:
    """Whether these are all of a guild's that came after it: none before the oldest was trimmed."""
    oldest = entries[0].note if entries else Note("", 0, "")
    return min(oldest.position, oldest.before or math.inf) <= position and oldest.position > 0


def logged(guild_id: str, note: Note) -> Logged:
    frame = RoomFrame.of(note.body, encode_offset(note.position))
    to = Destination(guild_id, note.topic, note.detail)
    return Logged(note.position, time.monotonic(), to, frame.tracked)


class Snapshots:
    """What the plugins at the holder have for new subscribers of any node."""

    #: That may be under way to this node's.
    MOST_SNAPSHOTS: Final = 1_000

    def __init__(self, plugins: PluginHost, publisher: Publisher) -> None:
        self._plugins = plugins
        self._publisher = publisher
        self._waiting: collections.OrderedDict[str, Tell] = collections.OrderedDict()
        self._under_way: set[asyncio.Task[None]] = set()

    async def send(self, kind: str, guild_id: str, tell: Tell, viewer: Viewer) -> None:
        if self._publisher.leading:
            await self._plugins.greet(kind, guild_id, tell, viewer)
            return
        ticket = secrets.token_hex(8)
        self._waiting[ticket] = tell
        if len(self._waiting) > self.MOST_SNAPSHOTS:
            self._waiting.popitem(last=False)
        self._publisher.tell("subscribed", ticket, (kind, guild_id, viewer))

    def on_subscribed(self, note: Note, content: tuple[str, str, Viewer]) -> None:
        if not self._publisher.leading:
            return
        kind, guild_id, viewer = content

        def tell(event: str, payload: EventData) -> None:
            self._publisher.tell("snapshot", note.detail, msgspec.json.encode((event, payload)))

        task = asyncio.create_task(self._plugins.greet(kind, guild_id, tell, viewer))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def on_snapshot(self, note: Note, snapshot: bytes) -> None:
        if note.detail in self._waiting:
            self._waiting[note.detail](*msgspec.json.decode(snapshot))

    async def make(self, topic: Topic) -> EventData | None:
        """What a new subscriber of the room would get as this event."""
        made: list[EventData | None] = [None]
        await self._plugins.greet(
            topic.kind,
            topic.guild_id,
            lambda event, fields: made.append(fields) if event == topic.event else None,
        )
        return made[-1]


class Windows:
    """The throttle's open windows, kept in Redis for whoever holds the gateway next."""

    #: Milliseconds for which Redis keeps those that have ended: a takeover takes less.
    WINDOWS_LAST: Final = 60_000

    def __init__(self, link: Link, lease: Lease, throttle: Throttle) -> None:
        self._link = link
        self._lease = lease
        self._throttle = throttle
        self._keep = link.redis.register_script(KEEP_WINDOWS)
        self._open: dict[Topic, tuple[float, DataOrMaker | None]] = {}  # until when, and what waits
        self.writing = WriteBehind(self._write, lambda: dict.fromkeys(self._open))

    def change(self, topic: Topic, seconds: float | None, waiting: DataOrMaker | None) -> None:
        """As the throttle tells it (`Outlet.window_changed`)."""
        now = boot_clock()
        until, before = self._open.get(topic, (now, None))
        if seconds is None and callable(before) and callable(waiting):
            return
        self._open[topic] = until if seconds is None else now + seconds, waiting
        self.writing.news[topic] = None
        if seconds:  # what waits for the end of one is told twice a second
            self.writing.wake()

    async def _write(self, topics: Iterable[Topic]) -> bool:
        """Tell Redis, if this node's term still counts there. After it nothing is to be told."""
        if not self._lease.term:
            return True
        lasts = max(self._throttle.windows.values(), default=0.0) * 1000
        rows = [value for topic in topics for value in self._row(topic)]
        args = [self._lease.source, int(lasts) + self.WINDOWS_LAST, *rows]
        return bool(await self._keep(keys=[GATEWAY, WINDOWS], args=args))

    def _row(self, topic: Topic) -> tuple[bytes, int | str, bytes]:
        """What KEEP_WINDOWS takes: the topic, milliseconds to its end (empty: it is over), what waits."""
        name = msgspec.json.encode(topic)
        until, waiting = self._open.get(topic, (0.0, None))
        left = max(0, math.ceil((until - boot_clock()) * 1000))
        if waiting is None and not left:
            self._open.pop(topic, None)
            return name, "", b""
        return name, left, msgspec.json.encode(True if callable(waiting) else waiting)

    async def load(self) -> list[Topic]:
        """Go on where the last holder was, if Redis can say where.

        Returns the topics of what plugins were to make at the end of the window.
        """
        self._open.clear()
        self.writing.news.clear()
        pipe = self._link.redis.pipeline()
        pipe.hgetall(WINDOWS)
        pipe.time()
        with contextlib.suppress(*REDIS_ERRORS):
            found, (seconds, microseconds) = await pipe.execute()
            now = seconds * 1000 + microseconds // 1000
            resumed = [self._resume(name, value, now) for name, value in found.items()]
            return [topic for topic in resumed if topic]
        return []

    def _resume(self, name: bytes, value: bytes, now: int) -> Topic | None:
        ends, _, encoded = value.partition(b" ")
        try:
            topic = msgspec.json.decode(name, type=Topic)
            waiting: Any = msgspec.json.decode(encoded)
            left = max(0, int(ends) - now) / 1000
        except ValueError:  # of a node of another version, perhaps
            log.error("a window of the throttle cannot be taken over: %s", shown(name))
            return None
        remake = waiting is True  # made by a plugin; that of the last holder is gone
        if remake:
            waiting = None
        self._open[topic] = boot_clock() + left, waiting
        self._throttle.resume(topic, left, waiting)
        return topic if remake else None


class Terms:
    """Runs gateway and plugins in each term of this node, from where the last holder was."""

    #: Seconds that what the last holder was to send waits for Discord to send its guild.
    FILL_PATIENCE: Final = 30.0
    #: Positions that the last holder may have come to since it was heard: ten seconds.
    UNHEARD_POSITIONS: Final = 1_000_000
    #: Nanoseconds of the clock for each position: no holder has had more events since its term began.
    POSITION_NS: Final = 10_000

    def __init__(self, node: ClusterNode, parts: Parts) -> None:
        self._node = node
        self._parts = parts
        self.windows = Windows(node.link, node.lease, parts.throttle)

    async def lead(self, work: Work, rest: Work) -> None:
        """Never returns; raises what `work` raises."""
        lease = self._node.lease
        while True:
            await lease.wait(lambda term: term > 0)
            term = lease.term
            self._begin(term)
            lost = lease.wait(functools.partial(operator.ne, term))
            try:
                await until_one_ends(self._take_over(work), lost)
            finally:
                await rest()
                lease.led = 0
                self._node.reader.missed = True

    def _begin(self, term: int) -> None:
        """All hear of the term before anything else is told in it."""
        node, logs = self._node, self._parts.recovery.logs
        node.lease.led = term
        by_clock = time.time_ns() // self.POSITION_NS  # beyond those in tickets that Redis has kept
        logs.reach(max(by_clock, logs.position + self.UNHEARD_POSITIONS))
        node.publisher.begin_term(logs.position)
        node.publisher.tell_as_holder("beat", content=False)
        node.hearing.begin_term(term)
        node.known.beat(complete=False)  # what this node hears of its guilds from now on is so

    async def _take_over(self, work: Work) -> None:
        topics = await self.windows.load()
        remaking = [asyncio.create_task(self._remake(topic)) for topic in topics]
        try:
            await work()
        finally:
            for task in remaking:
                task.cancel()

    async def _remake(self, topic: Topic) -> None:
        """What was to be sent by the last holder; names are there once Discord has sent the guild."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.FILL_PATIENCE):
                while not self._node.access.is_whole(int(topic.guild_id)):
                    await self._node.known.wait()
        make = functools.partial(self._node.snapshots.make, topic)
        self._parts.throttle.emit(topic.event, topic.guild_id, make, topic.kind)


class ClusterNode(Node):
    """This process among the others: wires the parts, and answers for them where one alone would."""

    def __init__(self, settings: Settings, bot: Bot) -> None:
        super().__init__(settings, bot)
        self._settings = settings
        #: Names this run of this node.
        self.source = secrets.token_hex(8)
        self.link = Link(settings.redis, redis_password_of(settings))
        self.lease = Lease(self.link, self.source)
        self.known = KnownGuilds()
        window = settings.recovery.window
        self.publisher = Publisher(self.link, self.lease, self.known, self._retell, window)
        watched = settings.discord.guilds
        self.access: SharedAccess = SharedAccess(
            settings.auth, watched, self.known, bot.cache, self.publisher
        )
        self.reporter = self.access.reporter
        self.reporter.subscribe(bot.events)
        self.counters: SharedCounters = SharedCounters(self.link)
        self.connections: SharedConnections = SharedConnections(
            self.link, self.source, lambda: self.peers.others
        )
        self._tasks: list[asyncio.Task[Any]] = []

    def attach(self, parts: Parts) -> None:
        super().attach(parts)
        told = self.lease, self.publisher, self.known, self.reporter
        self.peers = Peers(*told, self.connections, parts)
        self.hearing = Hearing(self.link, self.lease, self.known, self.reporter, self.peers, parts)
        self.reader = Reader(self.link, self.source, self.hearing)
        self.tickets = Tickets(self, parts, self._settings.recovery)
        self.snapshots = Snapshots(parts.plugins, self.publisher)
        self.terms = Terms(self, parts)
        self._kept = [part.writing for part in (self.connections, self.tickets, self.terms.windows)]
        self.hearing.topics |= {
            "subscribed": (tuple[str, str, Viewer], self.snapshots.on_subscribed),
            "snapshot": (bytes, self.snapshots.on_snapshot),  # as JSON has it, and dashboards
            "moved": (None, self.tickets.on_moved),
            "event": (tuple[Destination, bytes], self._on_event),
        }
        measure(self, parts.metrics.gauge)

    # -- start, stop, how things stand

    def start(self) -> None:
        works = [self.publisher.work, self.reader.work, self.lease.work, self.reader.probe]
        works += [self._beat, *(kept.work for kept in self._kept)]
        if self.link.watched:
            works.append(self.link.follow_master)
        self._tasks = [asyncio.create_task(self.link.keep(work)) for work in works]

    async def stop(self, grace: float) -> None:
        """Send what waits, let go of the gateway, end."""
        try:
            for step in (self._send_last, self._let_go):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace / 2):
                        await step()
        finally:  # a stop that takes too long is cancelled
            await end_tasks(self._tasks)
            await self.link.close()

    async def _send_last(self) -> None:
        self.connections.close()
        with contextlib.suppress(*REDIS_ERRORS):
            for kept in self._kept:
                await kept.drain()
        await self.publisher.drained()

    async def _let_go(self) -> None:
        await self.lease.release()
        self.publisher.tell("bye")
        await self.publisher.drained()

    @property
    def problem(self) -> str | None:
        """Why this node should get no new clients, if so."""
        if self.link.problem:
            return self.link.problem
        if self.reader.deaf:
            return "deaf: does not hear itself through Redis"
        return None if self.known.fresh else "no node holds the gateway"

    def health(self) -> dict[str, Any]:
        return {
            "problem": self.problem,
            "gateway": self.lease.state.name.lower(),
            "waiting": len(self.publisher),
            "lost": self.publisher.dropped,
        }

    async def _beat(self) -> None:
        """The holder says that it is there; all say who watches here, for it to tell of them."""
        for count in itertools.count():
            complete = self.reporter.complete
            if self.leading and self.known.beat(complete):
                self._parts.clients.check_all()
            if self.lease.holds():
                self.publisher.tell_as_holder("beat", content=complete)
            self.reporter.forget()
            self.peers.forget()
            self.peers.tell_rooms(again=False)
            self.reader.leave_all_but(set(map(guild_stream, self.peers.guilds())))
            if count % ROLL_CALL == 0:
                self.peers.call_roll()
                self._tell_kept()
            await asyncio.sleep(BEAT_INTERVAL)

    def _retell(self) -> None:
        """Redis may have lost everything."""
        self._tell_kept()
        if self.leading:
            self.reporter.tell_all()

    def _tell_kept(self) -> None:
        for kept in self._kept:
            kept.tell_all()

    # -- the gateway

    @property
    def leading(self) -> bool:
        return self.lease.leading

    async def lead(self, work: Work, rest: Work) -> None:
        await self.terms.lead(work, rest)

    def marks(self, plugin: str) -> Marks:
        return SharedMarks(self.link, plugin)

    def share(self, plugin: str) -> Shared:
        return SharedTables(self.link, self.lease.led, plugin)

    def window_changed(
        self, topic: Topic, seconds: float | None, waiting: DataOrMaker | None
    ) -> None:
        if self.leading:
            self.terms.windows.change(topic, seconds, waiting)

    # -- events

    def has_listeners(self, guild_id: str, kind: str) -> bool:
        room = Destination(guild_id, kind).room
        return super().has_listeners(guild_id, kind) or self.peers.has_listeners(room)

    def deliver(self, event: str, guild_id: str, fields: EventData, kind: str) -> None:
        """By the holder: one node counts events, so that they have one order.

        Other nodes' listeners of a moment ago are not known yet: it goes out for them all the same.
        """
        if self.leading and self.lease.led != self.lease.term:
            return  # this node has lost the gateway: another one is its clients' source now
        self._parts.metrics.sent.counts[event] += 1
        to, packet = destination_of(guild_id, kind, fields), event_packet(event, fields)
        if self.leading:
            self._send(to, packet)
        else:
            self.publisher.tell("event", content=(to, packet))

    def _on_event(self, note: Note, content: tuple[Destination, bytes]) -> None:
        if self.leading:
            self._send(*content)

    def _send(self, to: Destination, packet: bytes) -> None:
        """To this node's clients at once, and to the other nodes as soon as Redis can."""
        logs = self._parts.recovery.logs
        self._parts.clients.send(to, logs.add(to, packet))
        self.publisher.send(to, packet, logs.position)

    # -- dashboards

    def ticket_changed(self, ticket: Ticket) -> None:
        self.tickets.change(ticket)

    async def recall(self, pid: object, viewer: Viewer, offset: object) -> bool:
        seen, moved = decode_offset(offset), False
        genuine = self._parts.recovery.pids.is_genuine(pid, viewer.discord_id)
        if genuine and seen is not None and (self.link.up or not self.link.reached.is_set()):
            with contextlib.suppress(*REDIS_ERRORS):
                async with asyncio.timeout(RECALL_PATIENCE):
                    await self.link.reached.wait()  # this node has only just begun
                    moved = await self.tickets.take(str(pid))
                    await self.tickets.complete(str(pid), viewer, seen.position, moved)
        return moved

    def viewer_entered(self, discord_id: str) -> None:
        self.peers.ask(discord_id)

    def follow(self, guild_id: str) -> asyncio.Task[None] | None:
        return self.reader.follow(guild_id)

    async def send_snapshots(self, kind: str, guild_id: str, tell: Tell, viewer: Viewer) -> None:
        await self.snapshots.send(kind, guild_id, tell, viewer)


def measure(node: ClusterNode, gauge: Callable[[str, str, Callable[[], float]], None]) -> None:
    """What a node says of itself and of Redis at /metrics."""
    link, publisher, reader = node.link, node.publisher, node.reader
    gauge("redis_connected", "1 while Redis answers.", lambda: link.up)
    gauge("redis_deaf", "1 while this node does not hear itself.", lambda: reader.deaf)
    gauge("redis_streams", "Streams that this node reads.", lambda: len(reader))
    gauge("redis_waiting", "Entries that wait for Redis.", lambda: len(publisher))
    gauge("redis_dropped", "Entries that never reached Redis.", lambda: publisher.dropped)
    fenced = "Entries not sent since another node had the gateway."
    gauge("redis_fenced", fenced, lambda: publisher.fenced)
    unreadable = "Entries of other nodes that could not be read."
    gauge("redis_unreadable", unreadable, lambda: reader.unreadable)
    gauge("gateway_held", "1 while the gateway is this node's.", node.lease.holds)


class SharedTables(Shared):
    """What one plugin keeps in Redis, for as long as the gateway is this node's by `term`."""

    #: Members read at a time: a few milliseconds of Redis, and of whoever takes them.
    CHUNK: Final = 2_000

    def __init__(self, link: Link, term: int, plugin: str) -> None:
        self._link = link
        self._term = term
        self._name = f"{SHARED}:{plugin}"
        self._write = link.redis.register_script(WRITE_SHARED)
        self._read = link.redis.register_script(READ_SHARED)
        self._number = int(boot_clock() * 1000)  # the same node may have had the same term before
        self._server = ""
        self._told: set[bytes] = set()

    async def read(self) -> AsyncIterator[str]:
        prefix = f"{self._name}:"
        with self._link.failing():
            self._server = self._server or (await self._link.redis.info("server"))["run_id"]
            page = 0
            while True:
                page, keys = await self._link.redis.scan(page, match=f"{prefix}*", count=1000)
                cursor = b"0"
                while keys:
                    args = [self.CHUNK, cursor, len(prefix) + 1]
                    chunk, done, cursor = await self._read(keys=keys, args=args)
                    keys = keys[done:]
                    yield chunk.decode()
                if not page:
                    return

    async def write(self, changes: str) -> News:
        self._number += 1
        with self._link.failing():
            answer = await self._write(
                keys=[TERM, self._name, FORGOTTEN], args=[self._term, self._number, changes]
            )
        if not answer:
            raise ConnectionError("another node holds the gateway")
        server, listed = answer[0].decode(), set(answer[1])
        restarted = self._server not in ("", server)
        self._server = server
        forgotten = [one for one in map(decode_forgotten, listed - self._told) if one]
        self._told = listed
        return News(restarted, forgotten)


class SharedMarks(Marks):
    """What one plugin has all nodes remember: a key of Redis for each name."""

    def __init__(self, link: Link, plugin: str) -> None:
        self._link = link
        self._prefix = f"{MARKS}:{plugin}:"

    async def put(self, name: str, seconds: float) -> bool:
        lasts = max(1, int(seconds * 1000))
        with self._link.failing():
            return bool(await self._link.redis.set(self._prefix + name, 1, nx=True, px=lasts))

    async def has(self, name: str) -> bool:
        with self._link.failing():
            return bool(await self._link.redis.exists(self._prefix + name))


def decode_forgotten(entry: bytes) -> tuple[int | None, int] | None:
    """A guild or None, a member; the third part only makes the entry unlike all others."""
    try:
        guild, member, _ = entry.decode().split(":")
        return int(guild) if guild else None, int(member)
    except ValueError:
        log.error("whom to forget cannot be read: %s", shown(entry))
        return None


#: Seconds for which the holder, or one that takes over meanwhile, can read whom to forget.
FORGOTTEN_AGE: Final = 300


async def forget_shared(settings: Settings, member_id: int, guild_id: int | None) -> int:
    """Remove a member from what plugins keep in Redis, and have the holder of the gateway follow.

    Returns how many texts there were; raises OperatorError when Redis does not answer.
    """
    redis = open_redis(settings.redis.url, redis_password_of(settings))
    guild = "" if guild_id is None else guild_id
    removed, page = 0, None
    try:
        async with redis, redis.pipeline(transaction=False) as pipe:
            await redis.rpush(FORGOTTEN, f"{guild}:{member_id}:{secrets.token_hex(4)}")
            await redis.expire(FORGOTTEN, FORGOTTEN_AGE)
            while page != 0:
                match = f"{SHARED}:*:{guild or '*'}:*"
                page, keys = await redis.scan(page or 0, match=match, count=1000)
                for key in keys:
                    pipe.hdel(key, member_id)
                removed += sum(await pipe.execute())
    except REDIS_ERRORS as error:
        raise OperatorError(f"redis.url: nothing forgotten, no answer: {error}") from error
    return removed


class SharedCounters(Counters):
    """The limits' counters in Redis; in this process's memory while Redis takes too long."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    async def _ask(self, key: str, *commands: tuple[Any, ...]) -> list[Any] | None:
        """The answers to some commands about a key; None when Redis is not there in time."""
        pipe = self._link.redis.pipeline()
        for name, *rest in commands:
            pipe.execute_command(name, f"spywatcher:limits:{key}", *rest)
        try:
            async with self._link.patience():
                return list(await pipe.execute())
        except REDIS_ERRORS:
            return None

    async def count(self, key: str, seconds: float) -> int:
        once = "SET", 0, "PX", math.ceil(seconds * 1000), "NX"
        counted = await self._ask(key, once, ("INCR",))
        return int(counted[1]) if counted else await super().count(key, seconds)

    async def seconds_left(self, key: str) -> float:
        left = await self._ask(key, ("PTTL",))
        return max(0.0, left[0] / 1000) if left else await super().seconds_left(key)

    async def clear(self, key: str) -> None:
        await self._ask(key, ("DEL",))
        await super().clear(key)


class SharedConnections(OpenConnections):
    """Counts those of all nodes: each node has a hash in Redis, and adds up what the others have there.

    All goes one way, in order. What one node has not told again for a minute counts no more.
    """

    def __init__(self, link: Link, source: str, others: Callable[[], Collection[str]]) -> None:
        """`others` are the nodes that are alive."""
        super().__init__()
        self._link = link
        self._source = source
        self._others = others
        #: Who waits for how many there are elsewhere.
        self.writing: WriteBehind[asyncio.Future[int]] = WriteBehind(
            self._write, lambda: {whose: new_future() for whose in self}
        )
        self._closed = False

    async def enter(self, whose: str) -> int:
        """Without Redis, or while it is slow, this node's own count decides."""
        before = await super().enter(whose)
        answer = self._tell(whose)
        with contextlib.suppress(*REDIS_ERRORS):
            async with self._link.patience():
                before += await asyncio.shield(answer)
        return before

    def leave(self, whose: str) -> None:
        super().leave(whose)
        self._tell(whose)

    def _tell(self, whose: str) -> asyncio.Future[int]:
        news = self.writing.news
        answer = news.setdefault(whose, new_future())
        if len(news) > MOST_REMEMBERED:
            news.pop(next(iter(news)))
        self.writing.wake()
        return answer

    def close(self) -> None:
        """This node's are about to be closed: they count no more."""
        self._closed = True
        self.writing.tell_all()

    async def _write(self, news: dict[str, asyncio.Future[int]]) -> bool:
        """Tell of these, and hear how many there are elsewhere."""
        own, others = OPEN + self._source, list(self._others())
        here = {whose: self[whose] for whose in news if whose in self and not self._closed}
        pipe = self._link.redis.pipeline()
        if gone := news.keys() - here.keys():
            pipe.hdel(own, *gone)
        if here:
            pipe.hset(own, mapping=here)
        pipe.pexpire(own, int(ROLL_CALL * 3000))
        for node in others:
            pipe.hmget(OPEN + node, list(news))
        answers = await pipe.execute()
        shares = answers[len(answers) - len(others) :]
        for number, answer in enumerate(news.values()):
            if not answer.done():
                answer.set_result(sum(int(share[number] or 0) for share in shares))
        return True


def new_future() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()
