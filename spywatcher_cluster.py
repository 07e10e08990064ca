"""Many processes as one service, over Redis.

Any number of processes as one service, on Redis alone (design: more than one machine). Events
travel through one Redis stream per guild, everything else through one control stream; one node
holds the gateway; what it knows of guilds is told to all. It knows no event by name and no
plugin; nothing in here is made unless `[redis] url` is set, and nothing here makes an event wait.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import math
import random
import re
import secrets
import socket
import ssl
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, NoReturn

import hikari
import limits
import limits.aio
import msgspec
from socketio.async_pubsub_manager import AsyncPubSubManager
from tornado.httpclient import AsyncHTTPClient, HTTPClientError

from spywatcher import (
    MOST_REMEMBERED,
    Access,
    AuthSettings,
    BoundedMemory,
    DataOrMaker,
    EventData,
    Greet,
    Marks,
    Metrics,
    News,
    OpenConnections,
    OperatorError,
    RedisSettings,
    Rooms,
    SectionT,
    ShardRange,
    Shared,
    Sid,
    Throttle,
    Topic,
    Viewer,
    being_cancelled,
    event_packet,
    is_snowflake,
    log,
    without_login,
)

CONTROL: Final = "spywatcher:control"
GUILDS: Final = "spywatcher:guilds"  # hash: guild id -> GuildTruth
GATEWAY: Final = "spywatcher:gateway"  # who holds it; empty: free
TERM: Final = "spywatcher:term"  # the fencing counter
WINDOWS: Final = (
    "spywatcher:windows"  # hash: Topic -> when its window ends, what is to be sent then
)
#: A topic of guilds' streams too, where all others are kinds of rooms.
CHANGE: Final = "truth:change"

#: Seconds until a holder that does not renew has lost the gateway. A holder counts fewer, from
#: before it asked, so that it has stopped when another begins.
LOCK_TIME: Final = 8.0
TERM_TIME: Final = 7.5
RENEWAL: Final = 0.5
#: Seconds for which a holder without Redis keeps what its gateway brings, unsent.
MOST_MUTED: Final = 30.0
#: Seconds of contact with Redis before a gateway that nobody holds may be taken, so that a holder
#: that is alive comes first: where it has run out; where Redis knows no term, and nobody told of
#: one (else LOCK_TIME: a holder that is cut off from Redis counts on that).
EXPIRED_PATIENCE: Final = 1.0
#: Seconds, by Redis' clock, in which a claim counts: a Redis that was frozen does not act on old ones.
CLAIM_LASTS: Final = 1.0
#: Seconds for which a node without Redis promises a holder without Redis not to take over.
PROMISE_TIME: Final = 3.0
FIRST_PATIENCE: Final = 1.5
REDIS_TIMEOUT: Final = 2.0
#: Seconds that a client may be kept waiting for Redis; and those, from then on, in which no other is.
PATIENCE: Final = 0.25
SLOW_FOR: Final = 1.0
FIRST_DELAY: Final = 0.05
LAST_DELAY: Final = 0.5
#: Milliseconds of a stream's entries that are kept, and the most entries of one.
STREAM_AGE: Final = 60_000
STREAM_LENGTH: Final = 20_000
#: Entries and bytes that may wait for Redis, and that are kept to be sent again to an emptied one.
MOST_WAITING: Final = 100_000
MOST_WAITING_BYTES: Final = 67_108_864
MOST_RECENT: Final = 20_000
RECENT_AGE: Final = 30.0
BATCH: Final = 256
#: Seconds between two reads or writes while there is much to do: a burst then shares them.
BUSY_REST: Final = 0.005
#: Seconds for which a guild that nobody watches any more is still read: a page that reloads.
LINGER: Final = 15.0
PROBE_INTERVAL: Final = 5.0
BEAT_INTERVAL: Final = 1.0
#: Greetings that may be under way to this node's new subscribers.
MOST_GREETINGS: Final = 1_000
#: Seconds between two tellings of who watches here; what was not told three times is forgotten.
ROLL_CALL: Final = 20.0
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
#: Milliseconds for which Redis keeps windows that have ended: a takeover takes less.
WINDOWS_LAST: Final = 60_000
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
#: Milliseconds for which a node's share of open connections counts that it does not tell again.
SHARE_LASTS: Final = 60_000
SHARE: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local elsewhere = {}
for i, key in ipairs(KEYS) do
  local mine = ARGV[i + 2]
  if mine == '0' then
    redis.call('HDEL', key, ARGV[1])
  else
    redis.call('HSET', key, ARGV[1], mine .. string.format(' %.0f', now + ARGV[2]))
    redis.call('PEXPIRE', key, ARGV[2])
  end
  elsewhere[i] = 0
  local shares = redis.call('HGETALL', key)
  for n = 1, #shares, 2 do
    local count, ends = string.match(shares[n + 1], '(%d+) (%d+)')
    if tonumber(ends) <= now then
      redis.call('HDEL', key, shares[n])
    elseif shares[n] ~= ARGV[1] then
      elsewhere[i] = elsewhere[i] + count
    end
  end
end
return elsewhere
"""

#: What plugins keep for all nodes: SHARED:PLUGIN:GUILD:ANYTHING is a hash of texts by member,
#: SHARED:PLUGIN the term and number of the last write. The list of whom to forget is short-lived.
SHARED: Final = "spywatcher:shared"
MARKS: Final = "spywatcher:marks"
FORGOTTEN: Final = "spywatcher:forgotten"
#: Seconds for which the holder, or one that takes over meanwhile, can read whom to forget.
FORGOTTEN_AGE: Final = 300
#: Members read at a time: a few milliseconds of Redis, and of whoever takes them.
SHARED_CHUNK: Final = 2_000
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


def boot_clock() -> float:
    """Seconds that go on while this process, or its machine, sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def guild_stream(guild_id: str) -> str:
    return f"spywatcher:guild:{guild_id}"


class Note(msgspec.Struct, array_like=True, frozen=True):
    """What a stream's entry holds.

    `number` counts what `source`, one run of one node, put into this stream: a reader tells by it
    what it has had. `term` is that of the gateway's holder, 0 for what no gateway brought.
    """

    source: str
    number: int
    term: int
    topic: str
    detail: str = ""
    body: bytes = b""


class Link:
    """Redis, and whether it can be reached."""

    def __init__(self, settings: RedisSettings, password: str) -> None:
        self._open = functools.partial(open_redis, settings.url, password)
        self.redis, self.errors = self._open()
        self._clients = [self.redis]
        self.up = False
        self._slow_until = float("-inf")
        self._why = self._fault = ""
        self._faulty_until = float("-inf")
        self._said = ""  # how things stand, as the log has it: "up", "lost" or "faulty"
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def patience(self) -> AsyncIterator[None]:
        """What a client waits for; raises one of `errors` when that takes too long, or would."""
        if not self.up or time.monotonic() < self._slow_until:
            raise TimeoutError
        try:
            async with asyncio.timeout(PATIENCE):
                yield
        except TimeoutError:
            self._slow_until = time.monotonic() + SLOW_FOR
            raise

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Raise ConnectionError, which plugins know, for one of `errors`."""
        try:
            yield
        except self.errors as error:
            raise ConnectionError(str(error)) from error

    async def keep(self, work: Callable[[], Awaitable[object]]) -> NoReturn:
        """Do `work`, and again whenever Redis is lost: soon at first, then twice a second."""
        delay = FIRST_DELAY
        while True:
            began = time.monotonic()
            try:
                await work()
            except self.errors as error:
                self._lost(error)
            except Exception:  # a bug, which must not end what has to go on
                log.exception("the link to Redis failed")
            if time.monotonic() - began > LAST_DELAY + REDIS_TIMEOUT:
                delay = FIRST_DELAY
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, LAST_DELAY)

    def client(self, may_connect: Callable[[], bool]) -> Any:
        """A client of one's own, whose connections are made, or made anew, only where one may."""
        client, _ = self._open(may_connect)
        self._clients.append(client)
        return client

    def own_address(self) -> str:
        """This host's address as Redis' host (or Sentinel's) sees it; nothing is sent to find out."""
        [options, *_] = [pool.connection_kwargs for pool in sentinel_pools(self.redis)] or [
            self.redis.connection_pool.connection_kwargs
        ]
        place = options.get("host", "127.0.0.1"), options.get("port", 6379)
        with contextlib.suppress(OSError):
            family, _, _, _, address = socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        return "127.0.0.1"

    @property
    def problem(self) -> str | None:
        """Why Redis is of no use now, if so."""
        return None if self.up else self._fault or "no connection to Redis"

    def found(self) -> None:
        """Redis has answered. That it refuses something else meanwhile counts more."""
        if time.monotonic() < self._faulty_until:
            return
        self.up = True
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
            self._faulty_until = time.monotonic() + LAST_DELAY * 2
        if self._timer is None and self._said != ("faulty" if self._fault else "lost"):
            self._timer = asyncio.get_running_loop().call_later(1.0, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._said = "faulty" if self._fault else "lost"
        why = self._fault or f"no connection to Redis ({self._why})"
        log.warning("%s; dashboards stay up, trying again", why)

    async def close(self) -> None:
        self.up = False
        if self._timer is not None:
            self._timer.cancel()
        for client in self._clients:
            for pool in (client.connection_pool, *sentinel_pools(client)):
                with contextlib.suppress(*self.errors):
                    await pool.aclose()


def fault_of(error: Exception) -> str:
    """What an operator has to mend, where Redis is there and will not have this node; else empty."""
    from redis.exceptions import AuthenticationError, ResponseError

    if isinstance(error, AuthenticationError | ResponseError):
        said = str(error).rpartition("of pipeline caused error: ")[2]  # before it is what was sent
        return f"Redis refuses this node ({said}): see redis.url and redis.password_file"
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


def open_redis(
    url: str, password: str, may_connect: Callable[[], bool] | None = None
) -> tuple[Any, tuple[type[Exception], ...]]:
    """A client for redis://, rediss://, unix:// or redis+sentinel://, and what it raises.

    Each call is tried once: whoever makes it knows best what to do next. Raises OperatorError.
    """
    from redis import asyncio as aioredis  # a single process needs none
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError

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
        if may_connect is not None and not may_connect():
            raise aioredis.ConnectionError("Redis closed the connection")
        await connection.on_connect()

    options: dict[str, Any] = {
        "socket_timeout": REDIS_TIMEOUT,
        "socket_connect_timeout": REDIS_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    more: dict[str, Any] = {"redis_connect_func": greet}
    if password:
        more["password"] = password
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
    return client, (RedisError, OSError, TimeoutError)


def sentinel_client(found: re.Match[str], options: dict[str, Any], more: dict[str, Any]) -> Any:
    """A client for the Redis of which the Sentinels say that it is the master now.

    Sentinels are asked without user and password, as they are by default.
    """
    from redis.asyncio import sentinel as redis_sentinel
    from redis.asyncio.connection import parse_url

    make: Any = redis_sentinel.Sentinel  # no types
    urls = [parse_url(f"redis://{host}") for host in found["hosts"].split(",")]
    places = [(one["host"], one.get("port", 26379)) for one in urls]
    login = parse_url(f"redis://{found['login'] or ''}@host/{found['db'] or 0}")
    del login["host"]
    sentinel = make(places, sentinel_kwargs=options, **{**options, **login, **more})
    return sentinel.master_for(found["name"] or "mymaster")


class Waiting(NamedTuple):
    """An entry on its way to Redis; `guild` is the field of GUILDS that is set before it."""

    stream: str
    term: int
    data: bytes
    guild: str
    since: float


class Publisher:
    """Puts notes into streams, in order, behind a bounded queue that outlives Redis."""

    def __init__(self, link: Link, source: str, verdict: Callable[[int], bool | None]) -> None:
        self._link = link
        self._redis = link.client(lambda: not self._server_known)
        self._server_known = False
        self._source = source
        self._verdict = verdict
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
        self.dropped = 0
        #: What GUILDS is to hold of a guild, as of now.
        self.snapshot: Callable[[str], bytes | None] = lambda guild_id: None
        #: Called when Redis came back as another run of it, perhaps without its data.
        self.on_restart: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._queue) + len(self._batch)

    async def drained(self) -> None:
        """Until nothing waits for Redis."""
        await self._drained.wait()

    def put(
        self,
        stream: str,
        topic: str,
        detail: str = "",
        body: bytes = b"",
        *,
        term: int = 0,
        guild: str = "",
    ) -> None:
        """Never waits; past the bounds the oldest goes."""
        self._numbers[stream] += 1
        note = Note(self._source, self._numbers[stream], term, topic, detail, body)
        data = msgspec.msgpack.encode(note)
        self._queue.append(Waiting(stream, term, data, guild, time.monotonic()))
        self._bytes += len(data)
        while len(self._queue) > MOST_WAITING or self._bytes > MOST_WAITING_BYTES:
            self._drop(self._queue.popleft())
        self._wake.set()
        self._drained.clear()

    def _drop(self, item: Waiting) -> None:
        self._bytes -= len(item.data)
        if not self.dropped:
            log.error("other nodes miss events: Redis was away for too long or took too little")
        self.dropped += 1

    async def work(self) -> None:
        """Send over one connection, for as long as it lasts: the next may lead to another Redis."""
        self._queue.extendleft(reversed(self._batch))
        self._batch = []
        self._server_known = False
        await self._redis.connection_pool.disconnect()
        server = (await self._redis.info("server"))["run_id"]
        self._server_known = True
        if self._server not in ("", server):
            self._queue.extendleft(reversed(self._recent))
            self._bytes += sum(len(item.data) for item in self._recent)
            self._recent.clear()
            self.on_restart()
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
            verdict = self._verdict(self._queue[0].term)
            if verdict is None:
                await asyncio.sleep(BUSY_REST)
            elif not verdict:
                self._drop(self._queue.popleft())
            else:
                term = self._queue[0].term
                while self._queue and len(self._batch) < BATCH and self._queue[0].term in (0, term):
                    self._batch.append(self._queue.popleft())

    async def _wait_on_line(self) -> None:
        """Until there is something to send; a connection that ends meanwhile is noticed."""
        try:
            async with asyncio.timeout(BEAT_INTERVAL):
                await self._wake.wait()
        except TimeoutError:
            await self._redis.ping()

    async def _write(self) -> None:
        pipe = self._redis.pipeline(transaction=False)
        streams = {item.stream for item in self._batch}
        for guild in {item.guild for item in self._batch} - {""}:
            truth = self.snapshot(guild)
            pipe.hdel(GUILDS, guild) if truth is None else pipe.hset(GUILDS, guild, truth)
        for item in self._batch:
            pipe.xadd(item.stream, {"n": item.data}, minid=max(0, self._now - STREAM_AGE))
        for stream in streams:
            pipe.xtrim(stream, maxlen=STREAM_LENGTH, approximate=True)
            pipe.pexpire(stream, STREAM_AGE * 2)
        answers = await pipe.execute()
        self._now = int(next(a for a in answers if isinstance(a, bytes)).partition(b"-")[0])
        self._bytes -= sum(len(item.data) for item in self._batch)
        self._recent.extend(self._batch)
        self._batch = []
        oldest = time.monotonic() - RECENT_AGE
        while len(self._recent) > MOST_RECENT or self._recent[0].since < oldest:
            self._recent.popleft()


def numbers_of(entry_id: str) -> tuple[int, int]:
    """Milliseconds and count of an entry's id (Redis documentation: Streams, Entry IDs)."""
    milliseconds, _, count = entry_id.partition("-")
    return int(milliseconds), int(count)


class Tail:
    """How far one stream was read, and what was had from whom."""

    def __init__(self, last: str) -> None:
        self.last = last
        self._first = numbers_of(last)
        self._had: dict[str, int] = {}
        self._term = 0

    def begins_before(self, entry_id: bytes) -> bool:
        return self._first < numbers_of(entry_id.decode())

    def admits(self, note: Note) -> bool:
        """Whether this note is new: not had before, and not of a holder that was replaced."""
        had = self._had.get(note.source, 0)
        if note.number <= had or 0 < note.term < self._term:
            return False
        if had and note.number > had + 1:
            log.error("%d events of another node were lost", note.number - had - 1)
        self._had[note.source] = note.number
        self._term = max(self._term, note.term)
        return True


class Reader:
    """Reads the control stream and those of the guilds that this node's clients are in."""

    def __init__(
        self,
        link: Link,
        source: str,
        prepare: Callable[[list[Note]], Awaitable[Callable[[Note], None]]],
        on_event: Callable[[str, Note], None],
    ) -> None:
        self._link = link
        self._source = source
        self._own = f"spywatcher:node:{source}"
        self._prepare = prepare
        self._on_event = on_event
        self._tails: dict[str, Tail] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._newest = "0-0"
        self._heard = time.monotonic()

    def __len__(self) -> int:
        return len(self._tails)

    # -- which streams

    async def follow(self, stream: str) -> None:
        """Read a stream from now on; returns when that is so, or when Redis takes too long to say."""
        if (leaving := self._leaving.pop(stream, None)) is not None:
            leaving.cancel()
        if stream in self._tails:
            return
        if self._link.up:
            with contextlib.suppress(*self._link.errors):
                await self.poke()
        self._tails.setdefault(stream, Tail(self._newest))
        if self._link.up:
            with contextlib.suppress(*self._link.errors):
                await self.poke()  # ends the read that waits, so that the next one has the stream

    def leave(self, stream: str) -> None:
        """Nobody needs this stream for now."""
        if stream in self._tails and stream not in self._leaving:
            loop = asyncio.get_running_loop()
            self._leaving[stream] = loop.call_later(LINGER, self._drop, stream)

    def _drop(self, stream: str) -> None:
        del self._leaving[stream], self._tails[stream]

    def close(self) -> None:
        for timer in self._leaving.values():
            timer.cancel()

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
        return time.monotonic() - self._heard > PROBE_INTERVAL * 2.5

    async def probe(self) -> None:
        """Hear oneself through Redis, or read anew."""
        while True:
            await self.poke()
            await asyncio.sleep(PROBE_INTERVAL)
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
            where = {stream: tail.last for stream, tail in self._tails.items()}
            found = await self._link.redis.xread(where, count=1000, block=1000)
            self._link.found()
            # Rights travel in the control stream, and were put there before what they decide.
            for stream, entries in sorted(found, key=lambda one: one[0] != CONTROL.encode()):
                await self._take(stream.decode(), entries)
            if found:
                await asyncio.sleep(BUSY_REST)

    def _restart_after_clock_step(self) -> None:
        """A Redis that came back with an earlier clock gives earlier ids: read all that it has."""
        now, _ = numbers_of(self._newest)
        for tail in self._tails.values():
            if numbers_of(tail.last)[0] > now + 1:
                tail.last = "0-0"

    async def _take(self, stream: str, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        tail = self._tails.get(stream)
        if tail is None:
            return
        if stream == self._own:
            self._heard = time.monotonic()
        else:
            notes = [msgspec.msgpack.decode(fields[b"n"], type=Note) for _, fields in entries]
            handle: Callable[[Note], None] = functools.partial(self._on_event, stream)
            if stream == CONTROL:
                handle = await self._prepare(notes)
            for note, (entry_id, _) in zip(notes, entries, strict=True):
                if not tail.admits(note) or note.source == self._source:
                    continue
                if note.topic != CHANGE or not self._comes_again(note, stream, entry_id):
                    self._handle(handle, note)
        tail.last = entries[-1][0].decode()

    @staticmethod
    def _handle(handle: Callable[[Note], None], note: Note) -> None:
        """One bad note, of a node of another version perhaps, must not stop all others."""
        try:
            handle(note)
        except Exception:
            log.exception("a note of another node could not be taken: %s", note.topic)

    def _comes_again(self, note: Note, stream: str, entry_id: bytes) -> bool:
        """Whether a change in the control stream will be read in its place among the guild's events."""
        tail = self._tails.get(guild_stream(note.detail))
        return stream == CONTROL and tail is not None and tail.begins_before(entry_id)


class Lease:
    """The right to hold the gateway, which one node has for a term."""

    def __init__(self, link: Link, source: str) -> None:
        self._link = link
        self.source = source
        self._claim = link.redis.register_script(CLAIM)
        self._release = link.redis.register_script(RELEASE)
        self._until = float("-inf")
        #: The latest term that this node has heard of.
        self.known = 0
        self._offset: float | None = None  # of Redis' clock, in milliseconds; None: not known yet
        self._empty_since = math.inf  # since when Redis knows no term, by `boot_clock`
        self._claims_until = self._promised = float("-inf")
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        #: 0: not this node's.
        self.term = 0
        #: Whether this node wants the gateway at all.
        self.wanted = True
        #: Called when the term is certain again after it was in doubt.
        self.on_certain: Callable[[], None] = lambda: None

    def holds(self) -> bool:
        """Whether no other node can hold the gateway now, by this node's own clock."""
        return self.term > 0 and boot_clock() < self._until

    def verdict(self, term: int) -> bool | None:
        """Whether what was done in this term still counts; None: Redis has to say."""
        if term == 0:
            return True
        if term != self.term:
            return False
        return True if self.holds() else None

    def saw_term(self, term: int) -> None:
        """Another node had this term."""
        self.known = max(self.known, term)

    def wake(self) -> None:
        """The gateway has become free."""
        self._wake.set()

    async def wait(self, held: bool) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: (self.term > 0) == held)

    async def work(self) -> None:
        """Renew, or wait for a chance to take over, for as long as Redis answers."""
        if self.term and boot_clock() - self._until > MOST_MUTED:
            await self._become(0, 0.0)
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
        deadlines = self._deadlines(contact)
        milliseconds = int(LOCK_TIME * 1000)
        args = [self.source, milliseconds, self.term, self.known, *deadlines]
        term, now, latest = await self._claim(keys=[GATEWAY, TERM], args=args)
        self._offset = int(now) - boot_clock() * 1000
        self._empty_since = math.inf if latest else min(self._empty_since, boot_clock())
        self._link.found()
        return int(term)

    def _deadlines(self, contact: float) -> tuple[int, int]:
        """Until when, by Redis' clock, the gateway may be taken: where it ran out, where Redis is new."""
        now = boot_clock()
        if self._offset is None or now < self._promised:
            return 0, 0
        self._claims_until = now + CLAIM_LASTS
        until = int(self._offset + self._claims_until * 1000)
        empty = min(contact, now - self._empty_since)
        patience = LOCK_TIME if self.known else FIRST_PATIENCE
        return until * (contact >= EXPIRED_PATIENCE), until * (empty >= patience)

    def promise(self) -> bool:
        """Not to take over for PROMISE_TIME, if this node has no more Redis than the one that asks."""
        now = boot_clock()
        if self._link.up or self.term or now < self._claims_until:
            return False
        self._promised = now + PROMISE_TIME
        return True

    def extend(self, until: float) -> None:
        """All others have promised."""
        if self.holds():
            self._until = max(self._until, until)

    async def _become(self, term: int, until: float) -> None:
        doubted = self.term > 0 and not self.holds()
        changed, self.term, self._until = term != self.term, term, until
        self.saw_term(term)
        if changed:
            log.info("this node %s the gateway", "holds" if term else "no longer holds")
            async with self._changed:
                self._changed.notify_all()
        elif doubted:
            self.on_certain()

    async def release(self) -> None:
        """Let another node take over at once."""
        self.wanted = False
        if self.term:
            with contextlib.suppress(*self._link.errors):
                await self._release(keys=[GATEWAY], args=[self.source])
        await self._become(0, 0.0)


class RoleTruth(msgspec.Struct, array_like=True, frozen=True):
    permissions: hikari.Permissions


class OverwriteTruth(msgspec.Struct, array_like=True, frozen=True):
    allow: hikari.Permissions
    deny: hikari.Permissions


class ChannelTruth(msgspec.Struct, array_like=True, frozen=True):
    permission_overwrites: dict[int, OverwriteTruth]


class ThreadTruth(msgspec.Struct, array_like=True, frozen=True):
    parent_id: int
    type: hikari.ChannelType


class MemberTruth(msgspec.Struct, array_like=True, frozen=True):
    id: int
    role_ids: list[int]
    disabled_until: datetime | None

    def communication_disabled_until(self) -> datetime | None:
        """As hikari's: None once it is over."""
        until = self.disabled_until
        return until if until is not None and until > datetime.now(UTC) else None


class GuildTruth(msgspec.Struct, array_like=True, frozen=True):
    """What of a guild decides who may see what in it; its fields are named as hikari's."""

    id: int
    name: str
    icon_hash: str | None
    owner_id: int
    roles: dict[int, RoleTruth]
    channels: dict[int, ChannelTruth]
    threads: dict[int, ThreadTruth]


class GuildChange(msgspec.Struct, array_like=True, frozen=True):
    """What has changed in a guild; None: it is gone."""

    roles: dict[int, RoleTruth | None] = {}
    channels: dict[int, ChannelTruth | None] = {}
    threads: dict[int, ThreadTruth | None] = {}


#: What one user is in each guild; None: no member.
Memberships = dict[int, MemberTruth | None]


def encode_truth(truth: object) -> bytes:
    """hikari's flags and enumerations go as their numbers."""
    return msgspec.msgpack.encode(truth, enc_hook=int)


def decode_truth(data: bytes, form: type[SectionT] | Any) -> Any:
    return msgspec.msgpack.decode(data, type=form, dec_hook=lambda kind, value: kind(value))


def update(known: dict[int, Any], news: Mapping[int, Any]) -> None:
    """Enter what is new and drop what is None."""
    for number, new in news.items():
        if new is None:
            known.pop(number, None)
        else:
            known[number] = new


class Replica:
    """What the holder of the gateway told of its guilds; answers as hikari's cache does."""

    def __init__(self) -> None:
        self.guilds: dict[int, GuildTruth] = {}
        self.members: dict[int, Memberships] = {}
        #: Users of whom everything was told: where `members` has nothing, they are no members.
        self.whole: set[int] = set()
        self._role_guild: dict[int, int] = {}
        self._channel_guild: dict[int, int] = {}
        #: Whether the holder has told of all of its guilds.
        self.complete = False
        self._loaded: set[int] = set()  # from Redis: what a holder said once, perhaps long ago
        self._heard = float("-inf")
        self._changed = asyncio.Event()

    @property
    def fresh(self) -> bool:
        """Whether a holder was heard of within its term: else what is known may be outdated."""
        return boot_clock() - self._heard < LOCK_TIME

    def beat(self, complete: bool) -> None:
        self._heard = boot_clock()
        if complete != self.complete:
            self.complete = complete
            self._wake()

    async def wait(self) -> None:
        """Until something changes."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def knows(self, guild_id: int) -> bool:
        """Whether what is here of a guild is how things stand, even if that is nothing."""
        return self.complete or (guild_id in self.guilds and guild_id not in self._loaded)

    def load_guild(self, guild_id: int, guild: GuildTruth) -> None:
        """Something to begin with: it counts once a holder says that it has told everything."""
        if guild_id not in self.guilds:
            self.put_guild(guild_id, guild)
            self._loaded.add(guild_id)

    def put_guild(self, guild_id: int, guild: GuildTruth | None) -> None:
        self._loaded.discard(guild_id)
        old = self.guilds.pop(guild_id, None)
        if old is not None:
            for number in old.roles:
                self._role_guild.pop(number, None)
            for number in (*old.channels, *old.threads):
                self._channel_guild.pop(number, None)
        if guild is not None:
            self.guilds[guild_id] = guild
            self._role_guild.update(dict.fromkeys(guild.roles, guild_id))
            self._channel_guild.update(dict.fromkeys((*guild.channels, *guild.threads), guild_id))
        self._wake()

    def change_guild(self, guild_id: int, change: GuildChange) -> None:
        guild = self.guilds.get(guild_id)
        if guild is None:
            return
        for known, news, places in (
            (guild.roles, change.roles, self._role_guild),
            (guild.channels, change.channels, self._channel_guild),
            (guild.threads, change.threads, self._channel_guild),
        ):
            update(known, news)
            update(places, {number: guild_id if new else None for number, new in news.items()})
        self._wake()

    def put_members(self, user_id: int, news: Memberships, whole: bool) -> list[int]:
        """`whole`: nothing else is known or true. Returns the guilds in which this changes anything."""
        old = self.members.get(user_id, {})
        new = news if whole else old | news
        self.members[user_id] = new
        if whole:
            self.whole.add(user_id)
        self._wake()
        return [guild for guild in {*old, *new} if old.get(guild) != new.get(guild)]

    def knows_member(self, user_id: int, guild_id: int) -> bool:
        return user_id in self.whole or guild_id in self.members.get(user_id, {})

    def forget_member(self, user_id: int) -> None:
        self.members.pop(user_id, None)
        self.whole.discard(user_id)

    # -- as hikari.api.Cache

    def get_guild(self, guild_id: int) -> GuildTruth | None:
        return self.guilds.get(guild_id)

    def get_guilds_view(self) -> Mapping[int, GuildTruth]:
        return self.guilds

    def get_member(self, guild_id: int, user_id: int) -> MemberTruth | None:
        return self.members.get(user_id, {}).get(guild_id)

    def get_role(self, role_id: int) -> RoleTruth | None:
        guild = self.guilds.get(self._role_guild.get(role_id, 0))
        return guild.roles.get(role_id) if guild else None

    def get_guild_channel(self, channel_id: int) -> ChannelTruth | None:
        guild = self.guilds.get(self._channel_guild.get(channel_id, 0))
        return guild.channels.get(channel_id) if guild else None

    def get_thread(self, thread_id: int) -> ThreadTruth | None:
        guild = self.guilds.get(self._channel_guild.get(thread_id, 0))
        return guild.threads.get(thread_id) if guild else None


class Truth:
    """What the holder of the gateway tells all nodes: its guilds, and the members who look on.

    Members are told only of viewers who have a dashboard open somewhere, so that a guild of
    100,000 costs no more than one of ten.
    """

    CHANGES: Final[tuple[type[hikari.Event], ...]] = (
        hikari.RoleCreateEvent,
        hikari.RoleUpdateEvent,
        hikari.RoleDeleteEvent,
        hikari.GuildChannelCreateEvent,
        hikari.GuildChannelUpdateEvent,
        hikari.GuildChannelDeleteEvent,
        hikari.GuildThreadCreateEvent,
        hikari.GuildThreadUpdateEvent,
        hikari.GuildThreadDeleteEvent,
    )
    MEMBER_CHANGES: Final[tuple[type[hikari.Event], ...]] = (
        hikari.MemberCreateEvent,
        hikari.MemberUpdateEvent,
        hikari.MemberDeleteEvent,
    )

    def __init__(
        self, cache: hikari.api.Cache, replica: Replica, tell: Callable[..., None]
    ) -> None:
        self._cache = cache
        self._replica = replica
        self._tell = tell
        self._filled: set[int] = set()  # guilds that hikari's cache holds all of
        self._expected: set[int] = set()  # guilds that are to come
        self._expects_all = False  # every shard has said which
        self._wanted: dict[int, float] = {}  # viewers with a dashboard anywhere, until when

    @property
    def complete(self) -> bool:
        """Whether every guild has been told of, by this holder or by one before."""
        return self._replica.complete or self._all_filled

    @property
    def _all_filled(self) -> bool:
        return self._expects_all and self._filled >= self._expected

    def wants(self, user_id: int) -> bool:
        """Whether this user looks on somewhere."""
        return user_id in self._wanted

    def subscribe(self, events: hikari.api.EventManager) -> None:
        """Before whoever judges by what is told here."""
        events.subscribe(hikari.GuildUpdateEvent, self._on_guild_update)
        for change in self.CHANGES:
            events.subscribe(change, self._on_change)
        for change in self.MEMBER_CHANGES:
            events.subscribe(change, self._on_member_change)

    async def _on_guild_update(self, event: hikari.GuildUpdateEvent) -> None:
        if event.guild_id in self._filled:
            self._tell_guild(event.guild_id)

    async def _on_change(self, event: Any) -> None:
        """Told in the guild's stream too: there each event is judged by what came before it."""
        if event.guild_id not in self._filled:
            return
        if isinstance(event, hikari.RoleEvent):
            role = self._cache.get_role(event.role_id)
            change = GuildChange(roles={int(event.role_id): role_truth(role) if role else None})
        elif isinstance(event, hikari.GuildThreadEvent):
            thread = self._cache.get_thread(event.thread_id)
            change = GuildChange(
                threads={int(event.thread_id): thread_truth(thread) if thread else None}
            )
        else:
            channel = self._cache.get_guild_channel(event.channel_id)
            change = GuildChange(
                channels={int(event.channel_id): channel_truth(channel) if channel else None}
            )
        self._replica.change_guild(int(event.guild_id), change)
        guild = str(int(event.guild_id))
        self._tell(CHANGE, guild, encode_truth(change), guild=guild)
        self._tell(CHANGE, guild, encode_truth(change), stream=guild_stream(guild))

    async def _on_member_change(self, event: Any) -> None:
        if event.user_id in self._wanted:
            self.tell_members(int(event.user_id), int(event.guild_id))

    async def filled(self, guild_id: int) -> None:
        """Until hikari's cache holds all of this guild."""
        while guild_id not in self._filled:
            await self._replica.wait()

    def expect(self, guild_ids: Iterable[int], *, all_begun: bool) -> None:
        """A gateway session is about to fill these guilds; of no shard is that still to be heard."""
        coming = frozenset(map(int, guild_ids))
        self._expected |= coming
        self._filled -= coming
        self._expects_all = all_begun

    def fill(self, guild_id: int) -> None:
        """All of this guild is in hikari's cache, or it is gone."""
        self._filled.add(int(guild_id))
        self._tell_guild(guild_id)
        for user_id in self._wanted:
            self.tell_members(user_id, int(guild_id))
            if self._all_filled and user_id not in self._replica.whole:
                self.tell_members(user_id)

    def end(self) -> None:
        """This node holds the gateway no longer."""
        self._filled.clear()
        self._expected.clear()
        self._expects_all = False

    def tell_all(self) -> None:
        """Redis may have lost everything."""
        for guild_id in self._filled:
            self._tell_guild(guild_id)

    def want(self, viewers: Iterable[int]) -> None:
        """These have a dashboard somewhere."""
        self._wanted.update(dict.fromkeys(viewers, boot_clock() + ROLL_CALL * 3))

    def forget(self) -> None:
        """Nobody has spoken of these viewers for long."""
        now = boot_clock()
        for user_id in [user for user, until in self._wanted.items() if until < now]:
            del self._wanted[user_id]
            self._replica.forget_member(user_id)

    def _tell_guild(self, guild_id: int) -> None:
        guild = self._cache.get_guild(guild_id)
        truth = self._guild_truth(guild) if guild is not None else None
        self._replica.put_guild(int(guild_id), truth)
        self._tell("guild", str(int(guild_id)), guild=str(int(guild_id)))

    def snapshot(self, guild_id: str) -> bytes | None:
        guild = self._replica.guilds.get(int(guild_id))
        return None if guild is None else encode_truth(guild)

    def _guild_truth(self, guild: hikari.Guild) -> GuildTruth:
        cache, key = self._cache, guild.id
        channels = cache.get_guild_channels_view_for_guild(key).values()
        return GuildTruth(
            id=int(key),
            name=guild.name,
            icon_hash=guild.icon_hash,
            owner_id=int(guild.owner_id),
            roles={
                int(role.id): role_truth(role)
                for role in cache.get_roles_view_for_guild(key).values()
            },
            channels={int(channel.id): channel_truth(channel) for channel in channels},
            threads={
                int(thread.id): thread_truth(thread)
                for thread in cache.get_threads_view_for_guild(key).values()
            },
        )

    def tell_members(self, user_id: int, *guilds: int) -> None:
        """Of these guilds if anything is new there, else of all, whatever it is.

        Of a guild that hikari's cache is still being filled with nothing is said.
        """
        known = self._replica.members.get(user_id, {})
        news = {guild: self._member(guild, user_id) for guild in guilds or self._filled}
        if guilds and all(known.get(guild, self) == member for guild, member in news.items()):
            return
        whole = not guilds and self._all_filled
        if whole:
            news = {guild: member for guild, member in news.items() if member is not None}
        self._replica.put_members(user_id, news, whole)
        self._tell("members", str(user_id), encode_truth((whole, news)))

    def _member(self, guild_id: int, user_id: int) -> MemberTruth | None:
        member = self._cache.get_member(guild_id, user_id)
        if member is None:
            return None
        until = member.raw_communication_disabled_until
        return MemberTruth(user_id, list(map(int, member.role_ids)), until)


def role_truth(role: hikari.Role) -> RoleTruth:
    return RoleTruth(role.permissions)


def thread_truth(thread: hikari.GuildThreadChannel) -> ThreadTruth:
    return ThreadTruth(int(thread.parent_id), hikari.ChannelType(thread.type))


def channel_truth(channel: hikari.PermissibleGuildChannel) -> ChannelTruth:
    overwrites = channel.permission_overwrites.values()
    return ChannelTruth({int(one.id): OverwriteTruth(one.allow, one.deny) for one in overwrites})


class Learner:
    """Takes in what the holder of the gateway tells, and says whose rights that changes."""

    def __init__(self, link: Link, replica: Replica, truth: Truth) -> None:
        self._link = link
        self._replica = replica
        self._truth = truth
        #: Called when the rights in a guild have changed, of all or of one viewer.
        self.on_rights: Callable[[str, str | None], None] = lambda guild_id, viewer: None

    async def load(self) -> None:
        """What a holder told before this node was there."""
        known = await self._link.redis.hgetall(GUILDS)
        for guild_id, data in known.items():
            self._replica.load_guild(int(guild_id), decode_truth(data, GuildTruth))
        await asyncio.Event().wait()

    async def fetch(self, notes: Iterable[Note]) -> dict[str, bytes | None]:
        """What Redis holds of the guilds that these notes are about."""
        ids = list(dict.fromkeys(note.detail for note in notes if note.topic == "guild"))
        found = await self._link.redis.hmget(GUILDS, ids) if ids else []
        return dict(zip(ids, found, strict=True))

    def on_beat(self, note: Note) -> None:
        self._replica.beat(note.detail == "complete")

    def on_guild(self, guild_id: str, data: bytes | None) -> None:
        truth = decode_truth(data, GuildTruth) if data is not None else None
        self._replica.put_guild(int(guild_id), truth)
        self.on_rights(guild_id, None)

    def on_change(self, note: Note) -> None:
        self._replica.change_guild(int(note.detail), decode_truth(note.body, GuildChange))
        self.on_rights(note.detail, None)

    def on_members(self, note: Note) -> None:
        if self._truth.wants(int(note.detail)):
            whole, members = decode_truth(note.body, tuple[bool, Memberships])
            for guild_id in self._replica.put_members(int(note.detail), members, whole):
                self.on_rights(str(guild_id), note.detail)


class Viewers:
    """Who has a dashboard open here, said to all nodes: of no others does the holder tell."""

    def __init__(
        self,
        truth: Truth,
        replica: Replica,
        leading: Callable[[], bool],
        tell: Callable[..., None],
    ) -> None:
        self._truth = truth
        self._replica = replica
        self._leading = leading
        self._tell = tell
        self._dashboards: collections.Counter[int] = collections.Counter()

    def enter(self, discord_id: str) -> None:
        """A viewer has a dashboard here."""
        if is_snowflake(discord_id):
            self._dashboards[int(discord_id)] += 1
            self._ask(int(discord_id))

    def exit(self, discord_id: str) -> None:
        """One dashboard of this viewer is gone."""
        if is_snowflake(discord_id):
            user_id = int(discord_id)
            self._dashboards[user_id] -= 1
            if not self._dashboards[user_id]:
                del self._dashboards[user_id]

    def call_roll(self) -> None:
        """Say who looks on from here, and ask again for whom nothing was told."""
        viewers = list(self._dashboards)
        self._truth.want(viewers)
        self._tell("viewers", body=msgspec.msgpack.encode(viewers))
        for user_id in viewers:
            self._ask(user_id)

    def _ask(self, user_id: int) -> None:
        if user_id not in self._replica.whole:
            self._tell("ask", str(user_id))
            self._answer(user_id)

    def _answer(self, user_id: int) -> None:
        self._truth.want([user_id])
        if self._leading():
            self._truth.tell_members(user_id)

    def on_ask(self, note: Note) -> None:
        self._answer(int(note.detail))

    def on_viewers(self, note: Note) -> None:
        self._truth.want(msgspec.msgpack.decode(note.body, type=list[int]))


async def no_greeting(kind: str, guild_id: str, tell: Callable[[str, EventData], None]) -> None:
    """Nothing for a new subscriber."""


class Peers:
    """The other nodes: where they are asked whether they have lost Redis, and what they listen to."""

    def __init__(self, link: Link, lease: Lease, tell: Callable[..., None]) -> None:
        self._link = link
        self._lease = lease
        self._tell = tell
        self._asked_at: dict[str, tuple[str, float]] = {}  # where, and until when
        self._listening: dict[str, frozenset[str]] = {}
        self._told: frozenset[str] = frozenset()
        self._address = ""
        #: The rooms that have listeners here.
        self.rooms: Callable[[], Iterable[str]] = lambda: ()

    def settle(self, host: str, port: int, secret: str) -> None:
        """This node listens there."""
        address = host if host not in ("0.0.0.0", "::") else self._link.own_address()
        address = f"[{address}]" if ":" in address else address
        self._address = f"http://{address}:{port}/cluster/{secret}"

    def introduce(self) -> None:
        """Where this node is, and its latest term: who is new would not wait for that one's holder."""
        self._tell("node", self._address, msgspec.msgpack.encode(self._lease.known))

    def tell_rooms(self, again: bool) -> None:
        rooms = frozenset(self.rooms())
        if again or rooms != self._told:
            self._told = rooms
            self._tell("rooms", body=msgspec.msgpack.encode(list(rooms)))

    def listened(self, room: str) -> bool:
        """Whether anybody listens to it at another node."""
        return any(room in rooms for rooms in self._listening.values())

    def on_node(self, note: Note) -> None:
        self._lease.saw_term(msgspec.msgpack.decode(note.body, type=int))
        if note.source not in self._asked_at:
            self.introduce()
            self.tell_rooms(again=True)
        self._asked_at[note.source] = note.detail, boot_clock() + ROLL_CALL * 3

    def on_rooms(self, note: Note) -> None:
        rooms = msgspec.msgpack.decode(note.body, type=list[str])
        self._listening[note.source] = frozenset(rooms)

    def on_bye(self, note: Note) -> None:
        self._asked_at.pop(note.source, None)
        self._listening.pop(note.source, None)
        self._lease.wake()

    def forget(self) -> None:
        """Nothing was heard of these for long."""
        now = boot_clock()
        for source in [source for source, (_, until) in self._asked_at.items() if until < now]:
            del self._asked_at[source]
            self._listening.pop(source, None)

    async def consult(self) -> NoReturn:
        """A holder that has lost Redis goes on while all others say that they have lost it too."""
        client = AsyncHTTPClient(force_instance=True)
        try:
            while True:
                began = boot_clock()
                if self._lease.holds() and not self._link.up:
                    asked = [self._promises(client, url) for url, _ in self._asked_at.values()]
                    if all(await asyncio.gather(*asked)):
                        self._lease.extend(began + PROMISE_TIME - RENEWAL)
                await asyncio.sleep(RENEWAL)
        finally:
            client.close()

    @staticmethod
    async def _promises(client: AsyncHTTPClient, url: str) -> bool:
        try:
            answer = await client.fetch(url, request_timeout=RENEWAL, method="POST", body=b"")
        except (HTTPClientError, OSError):
            return False
        return answer.code == 200


class Greetings:
    """What the plugins at the holder have for new subscribers of any node."""

    def __init__(self, leading: Callable[[], bool], tell: Callable[..., None]) -> None:
        self._leading = leading
        self._tell = tell
        self._waiting: collections.OrderedDict[str, Callable[[str, EventData], None]]
        self._waiting = collections.OrderedDict()
        self._under_way: set[asyncio.Task[None]] = set()
        #: What this node's plugins have.
        self.own: Greet = no_greeting

    async def greet(self, kind: str, guild_id: str, tell: Callable[[str, EventData], None]) -> None:
        if self._leading():
            await self.own(kind, guild_id, tell)
            return
        ticket = secrets.token_hex(8)
        self._waiting[ticket] = tell
        if len(self._waiting) > MOST_GREETINGS:
            self._waiting.popitem(last=False)
        self._tell("greet", ticket, f"{kind}:{guild_id}".encode())

    def on_greet(self, note: Note) -> None:
        if not self._leading():
            return
        kind, _, guild_id = note.body.decode().partition(":")

        def tell(event: str, payload: EventData) -> None:
            self._tell("greeting", note.detail, msgspec.json.encode((event, payload)))

        task = asyncio.create_task(self.own(kind, guild_id, tell))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def on_greeting(self, note: Note) -> None:
        if note.detail in self._waiting:
            self._waiting[note.detail](*msgspec.json.decode(note.body))

    async def make(self, event: str, guild_id: str, kind: str) -> EventData | None:
        """What a new subscriber of the room would get as this event."""
        made: list[EventData | None] = [None]
        await self.own(
            kind, guild_id, lambda name, fields: made.append(fields) if name == event else None
        )
        return made[-1]


class Windows:
    """The throttle's open windows, kept in Redis for whoever holds the gateway next."""

    def __init__(
        self,
        link: Link,
        lease: Lease,
        leading: Callable[[], bool],
        remake: Callable[[Topic], Awaitable[EventData | None]],
    ) -> None:
        self._link = link
        self._lease = lease
        self._leading = leading
        self._remake = remake
        self._keep = link.redis.register_script(KEEP_WINDOWS)
        self._open: dict[Topic, tuple[float, DataOrMaker | None]] = {}  # until when, and what waits
        self._news: set[Topic] = set()
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()

    def share(self, throttle: Throttle) -> None:
        """These windows are all nodes'."""
        self._throttle = throttle
        throttle.on_change = self._note

    def _note(self, topic: Topic, seconds: float | None, waiting: DataOrMaker | None) -> None:
        now = boot_clock()
        until, before = self._open.get(topic, (now, None))
        if not self._leading() or (seconds is None and callable(before) and callable(waiting)):
            return
        self._open[topic] = until if seconds is None else now + seconds, waiting
        self._news.add(topic)
        if seconds:
            self._wake.set()

    def tell_all(self) -> None:
        """Redis may have lost everything."""
        self._news.update(self._open)

    async def work(self) -> None:
        """A window that opens is told at once; what waits for its end, twice a second."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEWAL):
                    await self._wake.wait()
            self._wake.clear()
            await self.flush()
            await asyncio.sleep(BUSY_REST)

    async def flush(self) -> None:
        """Tell Redis what is new, if this node's term still counts there."""
        async with self._flushing:
            news, self._news = self._news, set()
            kept = False
            try:
                if news and self._lease.term:
                    rows = [value for topic in news for value in self._row(topic)]
                    longest = max(self._throttle.windows.values(), default=0.0)
                    args = [self._lease.source, int(longest * 1000) + WINDOWS_LAST, *rows]
                    kept = await self._keep(keys=[GATEWAY, WINDOWS], args=args)
            finally:
                if not kept:
                    self._news |= news

    def _row(self, topic: Topic) -> tuple[bytes, int | str, bytes]:
        """What KEEP_WINDOWS takes: the topic, milliseconds to its end (empty: it is over), what waits."""
        name = msgspec.json.encode(topic)
        until, waiting = self._open.get(topic, (0.0, None))
        left = max(0, math.ceil((until - boot_clock()) * 1000))
        if waiting is None and not left:
            self._open.pop(topic, None)
            return name, "", b""
        return name, left, msgspec.json.encode(True if callable(waiting) else waiting)

    async def load(self) -> None:
        """Go on where the last holder was, if Redis can say where."""
        self._open.clear()
        self._news.clear()
        pipe = self._link.redis.pipeline()
        pipe.hgetall(WINDOWS)
        pipe.time()
        try:
            found, (seconds, microseconds) = await pipe.execute()
            now = seconds * 1000 + microseconds // 1000
            for name, value in found.items():
                ends, _, waiting = value.partition(b" ")
                left = max(0, int(ends) - now) / 1000
                self._resume(msgspec.json.decode(name, type=Topic), left, waiting)
        except self._link.errors:
            pass
        except Exception:  # as in Reader._handle
            log.exception("the throttle's windows could not be taken over")

    def _resume(self, topic: Topic, left: float, encoded: bytes) -> None:
        waiting: Any = msgspec.json.decode(encoded)
        if waiting is True:  # made by a plugin; that of the last holder is gone
            waiting = functools.partial(self._remake, topic)
        self._open[topic] = boot_clock() + left, waiting
        self._throttle.resume(topic, left, waiting)

    async def end(self) -> None:
        """This node holds the gateway no longer."""
        await self._throttle.close()


class Cluster:
    """This node among the others: what it tells them, and what it does with what they tell."""

    def __init__(self, settings: RedisSettings, password: str, cache: hikari.api.Cache) -> None:
        #: Names this run of this node.
        self.source = secrets.token_hex(8)
        self.link = Link(settings, password)
        self.lease = Lease(self.link, self.source)
        self.publisher = Publisher(self.link, self.source, self.lease.verdict)
        self.reader = Reader(self.link, self.source, self._prepare, self._on_event)
        self.replica = Replica()
        self.truth = Truth(cache, self.replica, self._tell)
        #: Whether this node's gateway runs; whether it still may, the lease says.
        self.leading = False
        self._muted: collections.deque[tuple[str, str, str, bytes]] = collections.deque(
            maxlen=10_000
        )
        self.learner = Learner(self.link, self.replica, self.truth)
        self.viewers = Viewers(self.truth, self.replica, lambda: self.leading, self._tell)
        self.peers = Peers(self.link, self.lease, self._tell)
        self.greetings = Greetings(lambda: self.leading, self._tell)
        self.windows = Windows(self.link, self.lease, lambda: self.leading, self._remake)
        self.connections = SharedConnections(self.link, self.source)
        self._tasks: list[asyncio.Task[Any]] = []
        self._topics: dict[str, Callable[[Note], None]] = {
            "request": lambda note: self.on_request(msgspec.json.decode(note.body)),
            "beat": self.learner.on_beat,
            CHANGE: self.learner.on_change,
            "members": self.learner.on_members,
            "viewers": self.viewers.on_viewers,
            "ask": self.viewers.on_ask,
            "who": lambda note: self.viewers.call_roll(),
            "node": self.peers.on_node,
            "rooms": self.peers.on_rooms,
            "greet": self.greetings.on_greet,
            "greeting": self.greetings.on_greeting,
            "bye": self.peers.on_bye,
        }
        #: Hands an event to this node's clients: guild id, kind of room, channel id, packet.
        self.deliver: Callable[[str, str, str, bytes], None] = lambda *event: None
        #: Called when the rights in a guild have changed, of all or of one viewer.
        self.on_rights: Callable[[str, str | None], None] = lambda guild_id, viewer: None
        self.learner.on_rights = lambda guild_id, viewer: self.on_rights(guild_id, viewer)
        #: Called with a viewer's Discord id when one of its dashboards came here, or went.
        self.enter, self.exit = self.viewers.enter, self.viewers.exit
        #: Does what another node's Socket.IO manager asks for.
        self.on_request: Callable[[dict[str, Any]], None] = lambda request: None
        self.lease.on_certain = self._speak
        self.publisher.on_restart = self._retell
        self.publisher.snapshot = self.truth.snapshot

    def make_access(self, auth: AuthSettings, watched: Sequence[str]) -> Access:
        """The same judge on every node."""
        return SharedAccess(auth, watched, self)

    def make_counters(self, memory: BoundedMemory) -> limits.aio.storage.Storage:
        """One count of an address's attempts for all nodes."""
        return SharedCounters(self.link, memory)

    def share(self, plugin: str) -> Shared:
        """What a plugin keeps for all nodes, while the gateway is this node's."""
        return SharedTables(self.link, self.lease.term, plugin)

    def marks(self, plugin: str) -> Marks:
        """What a plugin has all nodes remember."""
        return SharedMarks(self.link, plugin)

    def make_rooms(self, max_delay: float, metrics: Metrics) -> Rooms:
        """Rooms with clients of every node."""
        return ClusterRooms(max_delay, metrics, self)

    def measure(self, metrics: Metrics) -> None:
        metrics.gauge("redis_connected", "1 while Redis answers.", lambda: self.link.up)
        metrics.gauge(
            "redis_deaf", "1 while this node does not hear itself.", lambda: self.reader.deaf
        )
        metrics.gauge("redis_streams", "Streams that this node reads.", lambda: len(self.reader))
        metrics.gauge("redis_waiting", "Entries that wait for Redis.", lambda: len(self.publisher))
        metrics.gauge(
            "redis_dropped", "Entries that never reached Redis.", lambda: self.publisher.dropped
        )
        metrics.gauge("gateway_held", "1 while the gateway is this node's.", self.lease.holds)

    def start(self, host: str, port: int) -> None:
        """`host` and `port` are where this node listens, for the other nodes to ask it there."""
        self.peers.settle(host, port, self.source)
        works = [self.publisher.work, self.reader.work, self.lease.work, self.learner.load]
        works += [self.reader.probe, self.windows.work, self.connections.work]
        self._tasks = [asyncio.create_task(self.link.keep(work)) for work in works]
        self._tasks += [asyncio.create_task(work()) for work in (self._beat, self.peers.consult)]

    async def stop(self, grace: float) -> None:
        """Send what waits, let go of the gateway, end."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace / 2):
                    await self.connections.close()
                    await self.publisher.drained()
                    with contextlib.suppress(*self.link.errors):
                        await self.windows.flush()
            await self.lease.release()
            self._tell("bye")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(grace / 2, REDIS_TIMEOUT)):
                    await self.publisher.drained()
        finally:  # a stop that takes too long is cancelled
            await self._end()

    async def _end(self) -> None:
        left = set(self._tasks)
        while left:  # redis-py 8.1 may swallow a cancellation that meets an answer
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=0.1)
        self.reader.close()
        await self.link.close()

    @property
    def problem(self) -> str | None:
        """Why this node should get no new clients, if so."""
        if self.link.problem:
            return self.link.problem
        if self.reader.deaf:
            return "deaf: does not hear itself through Redis"
        if not self.replica.fresh:
            return "no node holds the gateway"
        return None

    def health(self) -> dict[str, Any]:
        """For /health/ready."""
        return {
            "problem": self.problem,
            "gateway": "held" if self.lease.holds() else "standby",
            "waiting": len(self.publisher),
            "lost": self.publisher.dropped,
        }

    # -- the gateway

    async def lead(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the gateway whenever it is this node's; raises what that raises."""
        while True:
            await self.lease.wait(held=True)
            self.leading = True
            self._tell("who")
            tasks = [
                asyncio.create_task(self._take_over(run)),
                asyncio.create_task(self.lease.wait(held=False)),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if tasks[0].done():
                    tasks[0].result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self.leading = False
                self._muted.clear()
                self.truth.end()
                await self.windows.end()

    async def _take_over(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await self.windows.load()
        if not being_cancelled():
            await run()

    async def _remake(self, topic: Topic) -> EventData | None:
        """What was to be sent by the last holder; names are there once Discord has sent the guild."""
        event, guild_id, kind = topic
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MOST_MUTED):
                await self.truth.filled(int(guild_id))
        return await self.greetings.make(event, guild_id, kind)

    async def _beat(self) -> None:
        """The holder says that it is there; all say who watches here, for it to tell of them."""
        for count in itertools.count():
            if self.lease.holds():
                self.replica.beat(self.truth.complete)
                self._tell("beat", "complete" if self.truth.complete else "")
            self.truth.forget()
            self.peers.forget()
            self.peers.tell_rooms(count % ROLL_CALL == 0)
            if count % ROLL_CALL == 0:
                self.viewers.call_roll()
                self.connections.tell_all()
                self.peers.introduce()
            await asyncio.sleep(BEAT_INTERVAL)

    # -- events

    def emit(self, guild_id: str, kind: str, channel_id: str, packet: bytes) -> None:
        """To this node's clients at once, and to the other nodes as soon as Redis can.

        Of a gateway that another node may have taken over nothing goes out, until that is clear.
        """
        if self.leading and not self.lease.holds():
            self._muted.append((guild_id, kind, channel_id, packet))
            return
        self.deliver(guild_id, kind, channel_id, packet)
        self.send(guild_id, kind, channel_id, packet, self.lease.term if self.leading else 0)

    def _speak(self) -> None:
        """The gateway was this node's all the time."""
        while self._muted:
            self.emit(*self._muted.popleft())

    def send(self, guild_id: str, kind: str, channel_id: str, packet: bytes, term: int = 0) -> None:
        """To the other nodes' clients alone."""
        self.publisher.put(guild_stream(guild_id), kind, channel_id, packet, term=term)

    def request(self, request: dict[str, Any]) -> None:
        """To the Socket.IO managers of the other nodes."""
        self._tell("request", body=msgspec.json.encode(request))

    def _on_event(self, stream: str, note: Note) -> None:
        if note.topic == CHANGE:
            self.learner.on_change(note)
        else:
            self.deliver(stream.rpartition(":")[2], note.topic, note.detail, note.body)

    def _retell(self) -> None:
        """Redis may have lost everything."""
        self.connections.tell_all()
        if self.leading:
            self.truth.tell_all()
            self.windows.tell_all()

    # -- the control stream

    def _tell(
        self,
        topic: str,
        detail: str = "",
        body: bytes = b"",
        guild: str = "",
        stream: str = CONTROL,
    ) -> None:
        term = self.lease.term if topic in ("beat", "guild", CHANGE, "members") else 0
        self.publisher.put(stream, topic, detail, body, term=term, guild=guild)

    async def _prepare(self, notes: list[Note]) -> Callable[[Note], None]:
        """Fetch what these notes are about; returns what takes one of them."""
        return functools.partial(self._take, await self.learner.fetch(notes))

    def _take(self, guilds: dict[str, bytes | None], note: Note) -> None:
        self.lease.saw_term(note.term)
        if note.topic == "guild":
            self.learner.on_guild(note.detail, guilds[note.detail])
        else:
            self._topics[note.topic](note)


class SharedAccess(Access):
    """Decides as `Access` does, on every node alike, by what the holder of the gateway told."""

    def __init__(self, auth: AuthSettings, watched: Sequence[str], cluster: Cluster) -> None:
        super().__init__(auth, watched, cluster.replica)
        self._cluster = cluster
        self._replica = cluster.replica

    def begin(self, guild_ids: Iterable[int], shard_range: ShardRange) -> None:
        coming = frozenset(guild_ids)
        super().begin(coming, shard_range)
        self._cluster.truth.expect(coming, all_begun=self.all_begun)
        for guild_id in self.lost:
            self._cluster.truth.fill(guild_id)
            self._cluster.on_rights(str(guild_id), None)
        self.lost = frozenset()

    def fill(self, guild_id: int) -> None:
        self._cluster.truth.fill(guild_id)
        super().fill(guild_id)

    def may_view(self, viewer: Viewer, guild_id: str) -> bool | None:
        """None, too, while no holder is heard of or it has not told of this guild."""
        if not self.watches(guild_id):
            return False
        if not self._replica.fresh or not self._replica.knows(int(guild_id)):
            return None
        return super().may_view(viewer, guild_id)

    async def _news(self) -> None:
        await self._replica.wait()

    def _is_sure(self, viewer: Viewer, guild_id: int) -> bool:
        by_claim = viewer.role in self._admin_roles or viewer.guilds is not None
        if not self._replica.knows(guild_id) or by_claim or not is_snowflake(viewer.discord_id):
            return self._replica.knows(guild_id)
        return self._replica.knows_member(int(viewer.discord_id), int(guild_id))


class ClusterRooms(AsyncPubSubManager, Rooms):  # type: ignore[misc]  # no types
    """Rooms whose clients may be on other nodes: what is asked of a client goes to where it is."""

    def __init__(self, max_delay: float, metrics: Metrics, cluster: Cluster) -> None:
        # python-socketio's constructor between the two hands no arguments on.
        Rooms.__init__(self, max_delay, metrics)
        self.host_id = cluster.source
        self._cluster = cluster
        self._rooms_in: collections.Counter[str] = collections.Counter()
        cluster.on_request = self._do
        cluster.peers.rooms = lambda: self._rooms

    def initialize(self) -> None:
        Rooms.initialize(self)  # no reading task: the cluster's reader reads

    async def enter_room(
        self, sid: Sid, namespace: str, room: str, eio_sid: str | None = None
    ) -> None:
        """Returns when this node reads what other nodes send to the room."""
        await super().enter_room(sid, namespace, room, eio_sid)
        guild_id = room.partition(":")[2]
        if guild_id:
            await self._cluster.reader.follow(guild_stream(guild_id))
            self._leave_unless_heard(guild_id)

    def listened(self, guild_id: str, kind: str) -> bool:
        room = f"{kind}:{guild_id}"
        return super().listened(guild_id, kind) or self._cluster.peers.listened(room)

    def basic_enter_room(
        self, sid: Sid, namespace: str, room: str | None, eio_sid: str | None = None
    ) -> None:
        known = room is None or self.has_listeners(room)
        super().basic_enter_room(sid, namespace, room, eio_sid)
        if room is not None and not known and self.has_listeners(room):
            self._rooms_in[room.partition(":")[2]] += 1

    def basic_leave_room(self, sid: Sid, namespace: str, room: str | None) -> None:
        known = room is not None and self.has_listeners(room)
        super().basic_leave_room(sid, namespace, room)
        if room is not None and known and not self.has_listeners(room):
            guild_id = room.partition(":")[2]
            self._rooms_in[guild_id] -= 1
            self._leave_unless_heard(guild_id)

    def _leave_unless_heard(self, guild_id: str) -> None:
        if self._rooms_in[guild_id] <= 0:
            del self._rooms_in[guild_id]
            self._cluster.reader.leave(guild_stream(guild_id))

    async def _publish(self, data: dict[str, Any]) -> None:
        """What goes to all of a guild's room goes the way of its events, in order with them."""
        kind, _, guild_id = str(data.get("room") or "").partition(":")
        plain = not (data.get("binary") or data.get("callback") or data.get("skip_sid"))
        if data["method"] == "emit" and guild_id and plain:
            arguments = [] if data["data"] == [None] else data["data"]
            self._cluster.send(guild_id, kind, "", event_packet(data["event"], *arguments))
        else:
            self._cluster.request(data)

    def _do(self, request: dict[str, Any]) -> None:
        """Another node's request, in the words of python-socketio's own managers."""
        handlers = {
            "emit": self._handle_emit,
            "callback": self._handle_callback,
            "disconnect": self._handle_disconnect,
            "enter_room": self._handle_enter_room,
            "leave_room": self._handle_leave_room,
            "close_room": self._handle_close_room,
        }
        self.server.start_background_task(handlers[request["method"]], request)


class SharedTables(Shared):
    """What one plugin keeps in Redis, for as long as the gateway is this node's by `term`."""

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
                    args = [SHARED_CHUNK, cursor, len(prefix) + 1]
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
        forgotten = [decode_forgotten(entry) for entry in listed - self._told]
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


def decode_forgotten(entry: bytes) -> tuple[int | None, int]:
    """A guild or None, a member; the third part only makes the entry unlike all others."""
    guild, member, _ = entry.decode().split(":")
    return int(guild) if guild else None, int(member)


async def forget_shared(
    settings: RedisSettings, password: str, member_id: int, guild_id: int | None
) -> int:
    """Remove a member from what plugins keep in Redis, and have the holder of the gateway follow.

    Returns how many texts there were; raises OperatorError when Redis does not answer.
    """
    redis, errors = open_redis(settings.url, password)
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
    except errors as error:
        raise OperatorError(f"redis.url: nothing forgotten, no answer: {error}") from error
    return removed


class SharedCounters(limits.aio.storage.Storage):
    """The limits' counters in Redis; in this process's memory while Redis takes too long."""

    STORAGE_SCHEME = None

    def __init__(self, link: Link, memory: BoundedMemory) -> None:
        super().__init__()
        self._link = link
        self._memory = memory

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        return self._link.errors

    async def _ask(self, *commands: tuple[Any, ...]) -> list[Any] | None:
        """The answers to some commands; None when Redis is not there in time."""
        pipe = self._link.redis.pipeline()
        for command in commands:
            pipe.execute_command(*command)
        try:
            async with self._link.patience():
                return list(await pipe.execute())
        except self._link.errors:
            return None

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        name = f"spywatcher:limits:{key}"
        counted = await self._ask(
            ("SET", name, 0, "PX", math.ceil(expiry * 1000), "NX"), ("INCRBY", name, amount)
        )
        return int(counted[1]) if counted else await self._memory.incr(key, expiry, amount)

    async def get(self, key: str) -> int:
        counted = await self._ask(("GET", f"spywatcher:limits:{key}"))
        return int(counted[0] or 0) if counted else await self._memory.get(key)

    async def get_expiry(self, key: str) -> float:
        left = await self._ask(("PTTL", f"spywatcher:limits:{key}"))
        return time.time() + max(0, left[0]) / 1000 if left else await self._memory.get_expiry(key)

    async def check(self) -> bool:
        return self._link.up

    async def reset(self) -> int:
        return await self._memory.reset()

    async def clear(self, key: str) -> None:
        await self._ask(("DEL", f"spywatcher:limits:{key}"))
        await self._memory.clear(key)


class SharedConnections(OpenConnections):
    """Counts those of all nodes: of each, a hash in Redis has this node's share beside the others'.

    All goes one way, in order. What one node has not told again for a minute counts no more.
    """

    def __init__(self, link: Link, source: str) -> None:
        super().__init__()
        self._link = link
        self._source = source
        self._share = link.redis.register_script(SHARE)
        #: What Redis is to be told, and who waits for how many there are elsewhere.
        self._news: dict[str, asyncio.Future[int]] = {}
        self._wake = asyncio.Event()
        self._telling = asyncio.Lock()
        self._closed = False

    async def enter(self, whose: str) -> int:
        """Without Redis, or while it is slow, this node's own count decides."""
        before = await super().enter(whose)
        answer = self._tell(whose)
        with contextlib.suppress(*self._link.errors):
            async with self._link.patience():
                before += await asyncio.shield(answer)
        return before

    def leave(self, whose: str) -> None:
        super().leave(whose)
        self._tell(whose)

    def _tell(self, whose: str) -> asyncio.Future[int]:
        answer = self._news.setdefault(whose, asyncio.get_running_loop().create_future())
        if len(self._news) > MOST_REMEMBERED:
            self._news.pop(next(iter(self._news)))
        self._wake.set()
        return answer

    def tell_all(self) -> None:
        for whose in self:
            self._tell(whose)

    async def work(self) -> None:
        """Tell and ask for as long as Redis answers."""
        while True:
            while not self._news:
                self._wake.clear()
                await self._wake.wait()
            await self._exchange()
            if self._news:
                await asyncio.sleep(BUSY_REST)

    async def close(self) -> None:
        """This node's are about to be closed: they count no more."""
        self._closed = True
        self.tell_all()
        with contextlib.suppress(*self._link.errors):
            while self._news:
                await self._exchange()

    async def _exchange(self) -> None:
        """Tell some news, and hear of these how many there are elsewhere."""
        async with self._telling:
            batch = dict(itertools.islice(self._news.items(), BATCH))
            for whose in batch:
                del self._news[whose]
            try:
                elsewhere = await self._ask(batch)
            except BaseException:
                self._news = batch | self._news
                raise
        for answer, count in zip(batch.values(), elsewhere, strict=True):
            if not answer.done():
                answer.set_result(count)

    async def _ask(self, names: Iterable[str]) -> list[int]:
        keys = [f"spywatcher:open:{whose}" for whose in names]
        counts = [0 if self._closed else self[whose] for whose in names]
        return list(await self._share(keys=keys, args=[self._source, SHARE_LASTS, *counts]))
