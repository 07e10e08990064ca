"""Every way to Redis that docs/scale.md promises: each against a real server, with real nodes."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest
from certificates import Authority
from jsclient import Dashboard, Event, JavaScript
from redis.exceptions import RedisError
from redisserver import (
    Proxy,
    RedisServer,
    Sentinel,
    free_port,
    knows_tls,
    redis_program,
    valkey_program,
)
from service import ROOT, SECRET, running, server_for, tables_for, viewer_token, write_settings
from waiting import clock, eventually

import spywatcher
import spywatcher_cluster
from simulator import Guild, PretendDiscord, make_token, snowflake
from spywatcher import RedisSettings, Server
from spywatcher_cluster import Link, Note

#: Of characters that mean something in a URL.
PASSWORD = "hush: p@ss/w%41rd?#"
QUOTED = quote(PASSWORD, safe="")
#: What docs/scale.md gives a user of SpyWatcher's own.
RIGHTS = re.findall(
    r"ACL SETUSER spywatcher on >PASSWORD (.+)", (ROOT / "docs" / "scale.md").read_text("utf-8")
)[0].split()


@pytest.fixture(autouse=True)
def _nothing_tells_the_password(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "spywatcher")
    yield
    assert not any(word in caplog.text for word in (PASSWORD, QUOTED))


class Pair:
    """Two nodes of one service, and what one tells a dashboard of the other."""

    def __init__(self, guild: Guild, js: JavaScript, servers: list[Server]) -> None:
        self.servers = servers
        self._guild = guild
        self._js = js
        self._dashboards: list[Dashboard] = []

    def problems(self) -> list[str | None]:
        """What each node's /health/ready says of Redis."""
        assert not any(PASSWORD in json.dumps(server.health()) for server in self.servers)
        return [server.health()["redis"]["problem"] for server in self.servers]

    async def ready(self) -> None:
        await eventually(lambda: self.problems() == [None, None], timeout=15)
        for server in self.servers:
            await eventually(lambda server=server: server.node.known.complete)

    async def connect(self) -> None:
        """A dashboard at each node."""
        for server in self.servers:
            url = f"http://127.0.0.1:{server.port}"
            dashboard = await self._js.connect(url, token=viewer_token())
            assert (await dashboard.call("subscribe:guild", str(self._guild.id)))["ok"]
            self._dashboards.append(dashboard)

    def say(self, number: int) -> None:
        """Each node tells it to all."""
        for node, server in enumerate(self.servers):
            event = {"number": number, "node": node}
            server.node.deliver("test:event", str(self._guild.id), event, "guild")

    def heard(self) -> list[list[int]]:
        """What each dashboard has heard, each number from two nodes."""
        return [[one["number"] for one in d.received("test:event")] for d in self._dashboards]

    @asynccontextmanager
    async def talking(self) -> AsyncIterator[list[int]]:
        """Both nodes tell the numbers from 0 on, fifty a second; the list has those told."""
        told: list[int] = []

        async def talk() -> None:
            while True:
                self.say(len(told))
                told.append(len(told))
                await asyncio.sleep(0.02)

        task = asyncio.create_task(talk())
        try:
            yield told
        finally:
            task.cancel()
            await asyncio.wait([task])

    def from_afar(self) -> list[list[Event]]:
        """What each dashboard has heard of the other node."""
        return [
            [event for event in dashboard.events("test:event") if event.data["node"] != own]
            for own, dashboard in enumerate(self._dashboards)
        ]

    def longest_silence(self, since: float) -> float:
        """Seconds that a dashboard had to wait for the other node's next number."""
        waits = []
        for events in self.from_afar():
            times = [since, *(event.monotonic for event in events if event.monotonic > since)]
            waits += [clock.lasted(before, after) for before, after in pairwise(times)]
        return max(waits)

    async def exchange(self) -> None:
        """Each node's dashboard hears what the other node says."""
        await self.ready()
        await self.connect()
        self.say(1)
        await eventually(lambda: self.heard() == [[1, 1], [1, 1]])


@pytest.fixture
def pair(
    request: pytest.FixtureRequest,
    discord: PretendDiscord,
    guild: Guild,
    js: JavaScript,
    tmp_path: Path,
) -> Callable:
    """Starts two nodes with these settings of Redis; where that is of no use, a stop takes the grace."""
    request.node.add_marker(
        pytest.mark.logs("not closed within", required=False)
    )  # on a busy machine

    @asynccontextmanager
    async def start(grace: float = 1.0, **redis: str) -> AsyncIterator[Pair]:
        async with AsyncExitStack() as stack:
            tables = {"redis": redis, "server": {"shutdown_grace": grace}}
            servers = [
                server_for(discord, **tables, storage={"path": str(tmp_path / f"{number}.db")})
                for number in range(2)
            ]
            for server in servers:
                await stack.enter_async_context(server)
            yield Pair(guild, js, servers)

    return start


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with RedisServer(tmp_path / "redis") as redis:
        yield redis


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[RedisServer]:
    """A Redis with a password."""
    async with RedisServer(tmp_path / "redis", password=PASSWORD) as redis:
        yield redis


async def test_two_nodes_meet_over_tcp_in_a_database_of_their_own(pair, redis):
    async with pair(url=f"{redis.url}/3") as nodes:
        await nodes.exchange()
    assert list(await redis.ask("INFO", "keyspace")) == ["db3"]


async def test_two_nodes_meet_over_a_unix_socket(pair, tmp_path):
    path = tmp_path / "redis.sock"
    async with RedisServer(tmp_path / "redis", "--unixsocket", str(path)) as redis:
        async with pair(url=f"unix://{path}?db=2") as nodes:
            await nodes.exchange()
        assert list(await redis.ask("INFO", "keyspace")) == ["db2"]


async def test_two_nodes_meet_over_valkey(pair, tmp_path):
    async with RedisServer(tmp_path / "valkey", program=valkey_program()) as valkey:
        assert (await valkey.ask("INFO", "server"))["server_name"] == "valkey"
        async with pair(url=valkey.url) as nodes:
            await nodes.exchange()


async def stop_while_asking(url: str, turns: int) -> None:
    """A node asks Redis, and so many turns of the loop later it stops."""
    link = Link(RedisSettings(url=url), "")
    asking = asyncio.create_task(link.redis.ping())
    for _ in range(turns):
        await asyncio.sleep(0)
    await link.close()
    await asyncio.gather(asking, return_exceptions=True)


async def test_a_connection_that_is_made_while_its_node_stops_is_closed(redis) -> None:
    for turns in range(12):
        await stop_while_asking(redis.url, turns)
    await eventually(lambda: no_clients(redis))


async def no_clients(redis: RedisServer) -> bool:
    return not await redis.clients()


# ---- passwords and users


async def test_a_password_in_the_url_is_used(pair, locked):
    async with pair(url=f"redis://:{QUOTED}@127.0.0.1:{locked.port}") as nodes:
        await nodes.exchange()


async def test_a_password_in_a_file_is_used(pair, locked, tmp_path):
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    async with pair(url=locked.url, password_file="password") as nodes:
        await nodes.exchange()


@pytest.mark.parametrize(
    "in_file", [False, True], ids=["password in the URL", "password in a file"]
)
async def test_a_user_with_the_documented_rights_is_enough(pair, redis, tmp_path, in_file):
    await redis.ask("ACL", "SETUSER", "spywatcher", "on", f">{PASSWORD}", *RIGHTS)
    await redis.ask("ACL", "SETUSER", "default", "off")
    (tmp_path / "password").write_text(PASSWORD)
    login, file = ("spywatcher", "password") if in_file else (f"spywatcher:{QUOTED}", "")
    url = f"redis://{login}@127.0.0.1:{redis.port}"
    async with pair(url=url, password_file=file) as nodes:
        await nodes.exchange()


REFUSED = r"WARNING spywatcher: Redis refuses this node \(.*see redis.url and redis.password_file"


@pytest.mark.logs(REFUSED)
@pytest.mark.parametrize("file", ["", "password"], ids=["no password", "wrong password"])
async def test_a_wrong_password_is_told_with_the_settings_to_look_at(pair, tmp_path, caplog, file):
    (tmp_path / "password").write_text(PASSWORD)
    async with (
        RedisServer(tmp_path / "redis", password="another") as redis,
        pair(url=redis.url, password_file=file) as nodes,
    ):
        await eventually(lambda: all("redis.password_file" in str(p) for p in nodes.problems()))
        await eventually(lambda: caplog.text.count("Redis refuses this node") == 2)


async def test_a_process_with_a_wrong_password_says_so_and_shows_none(discord, tmp_path):
    (tmp_path / "password").write_text(PASSWORD)
    async with RedisServer(tmp_path / "redis", password="another") as redis:
        tables = {"redis": {"url": redis.url, "password_file": "password"}}
        write_settings(tmp_path, tables_for(discord, log={"level": "debug"}, **tables))
        async with running(tmp_path) as service:
            await service.wrote(r"WARNING spywatcher: Redis refuses this node .*password_file")
            ready = await service.get("/health/ready")
            metrics = await service.get("/metrics")
    assert ready.code == 503
    assert "redis.password_file" in json.loads(ready.body)["parts"]["redis"]["problem"]
    for text in (service.output, ready.body.decode(), metrics.body.decode()):
        assert PASSWORD not in text


@pytest.mark.logs(REFUSED)
async def test_a_user_without_a_right_is_told_of(pair, redis, caplog):
    await redis.ask("ACL", "SETUSER", "spywatcher", "on", f">{PASSWORD}", *RIGHTS, "-xadd")
    url = f"redis://spywatcher:{QUOTED}@127.0.0.1:{redis.port}"
    async with pair(url=url) as nodes:
        await eventually(lambda: caplog.text.count("Redis refuses this node") == 2)
        assert all(
            "no permissions" in str(p) or "can't run this" in str(p) for p in nodes.problems()
        )


@pytest.mark.logs(REFUSED)
async def test_a_redis_that_takes_no_writes_is_told_in_its_own_words(pair, redis):
    await redis.ask("REPLICAOF", "127.0.0.1", free_port())
    async with pair(url=redis.url) as nodes:
        said = "Redis refuses this node (You can't write against a read only replica.): see"
        await eventually(lambda: all(said in str(problem) for problem in nodes.problems()))


async def test_a_redis_that_is_too_old_is_told_by_the_version_that_is_needed(redis) -> None:
    with pytest.raises(RedisError) as raised:  # a word where none is known, as MINID was before 6.2
        await redis.ask("XADD", "stream", "NEWER", "0", "*", "key", "value")
    assert spywatcher_cluster.fault_of(raised.value).endswith(": expected Redis 6.2 or newer")


@pytest.mark.logs(REFUSED)
async def test_nodes_go_on_once_the_password_is_right(pair, locked, tmp_path, caplog):
    """Redis' password is put right; theirs they read at their start alone."""
    (tmp_path / "password").write_text("another")
    async with pair(url=locked.url, password_file="password") as nodes:
        await eventually(lambda: caplog.text.count("Redis refuses this node") == 2)
        await locked.ask("CONFIG", "SET", "requirepass", "another")
        await nodes.exchange()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "redis.password_file: password cannot be read"),
        (b"", "redis.password_file: password is empty"),
        (b"\xff\xff", "redis.password_file: password cannot be read"),
    ],
    ids=["absent", "empty", "no text"],
)
def test_a_password_file_that_is_of_no_use_is_an_operator_s_error(tmp_path, capsys, content, fault):
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    redis = {"url": "redis://127.0.0.1", "password_file": "password"}
    [said] = faults_of(tmp_path, capsys, redis)
    assert said.startswith(f"spywatcher: {fault}")


def test_a_password_file_that_may_not_be_read_is_an_operator_s_error(tmp_path, capsys, monkeypatch):
    """The refusal is made up: where tests run as root, root may read every file."""
    open_file = Path.open

    def refuse(path: Path, *how: object, **more: object) -> object:
        if path.name == "password":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    redis = {"url": "redis://127.0.0.1", "password_file": "password"}
    [said] = faults_of(tmp_path, capsys, redis)
    assert "redis.password_file: password cannot be read: Permission denied" in said


#: Settings in which Redis alone may be at fault.
SOUND = {"auth": {"secret": SECRET}, "discord": {"token": make_token(snowflake())}}


def faults_of(folder: Path, capsys: pytest.CaptureFixture[str], redis: dict[str, str]) -> list[str]:
    """What `check` finds fault with, line by line; it must show no password."""
    config = write_settings(folder, SOUND | {"redis": redis})
    assert spywatcher.main(["--config", str(config), "check"]) == 2
    said = capsys.readouterr()
    assert PASSWORD not in said.out + said.err
    return said.err.splitlines()


REDIS, TLS = "redis://[USER:PASSWORD@]HOST[:PORT][/DB]", "rediss://[USER:PASSWORD@]HOST[:PORT][/DB]"
UNIX, WATCHED = "unix://[USER:PASSWORD@]/PATH[?db=DB]", "redis+sentinel://[USER:PASSWORD@]HOST"


@pytest.mark.parametrize(
    ("url", "shown", "expected"),
    [
        ("redis://:6379", "redis://***", REDIS),  # a port, or a password whose host was forgotten
        ("redis://user:x", "redis://***", REDIS),
        ("redis://host/first", "redis://host/first", REDIS),
        ("redis://host:70000", "redis://host:70000", REDIS),
        (f"redis://:{PASSWORD}@host", "redis://***@host", REDIS),
        (f"redis://host?password={PASSWORD}", "redis://***", REDIS),
        ("redis://host?password=x", "redis://host?***", REDIS),
        ("rediss://host?ssl_cert_reqs=none", "rediss://host?***", TLS),
        ("unix://run/redis.sock", "unix://run/redis.sock", UNIX),
        ("redis+sentinel://a:26379,/0/x", "redis+sentinel://a:26379,/0/x", WATCHED),
        ("redis+sentinel://a/mymaster", "redis+sentinel://a/mymaster", WATCHED),
    ],
)
def test_a_bad_url_is_refused_with_what_came_and_what_was_expected(
    tmp_path, capsys, url, shown, expected
):
    [said] = faults_of(tmp_path, capsys, {"url": url})
    assert said.startswith(f"spywatcher: redis.url: got {shown}")
    assert f", expected {expected}" in said


@pytest.mark.parametrize("url", [f"rdis://:{PASSWORD}@host", f"redis:/{PASSWORD}@host"])
def test_a_url_of_no_known_kind_is_refused_among_all_other_faults(tmp_path, capsys, url):
    [said] = faults_of(tmp_path, capsys, {"url": url})
    assert 'config.toml: redis.url: got "' in said
    assert '***@host", expected' in said


def test_a_password_in_two_places_is_refused(tmp_path, capsys):
    (tmp_path / "password").write_text(PASSWORD)
    redis = {"url": f"redis://:{QUOTED}@host", "password_file": "password"}
    [said] = faults_of(tmp_path, capsys, redis)
    assert "redis.url: redis://***@host has a password, and redis.password_file is set too" in said


def test_a_certificate_that_cannot_be_read_is_named(tmp_path, capsys):
    [said] = faults_of(tmp_path, capsys, {"url": "rediss://host?ssl_ca_certs=/no/such/file"})
    assert "redis.url: cannot use ssl_ca_certs=/no/such/file: No such file" in said


def test_check_shows_a_url_without_its_password(tmp_path, capsys):
    config = write_settings(
        tmp_path, SOUND | {"redis": {"url": f"redis://spy:{QUOTED}@host:6379/1"}}
    )
    assert spywatcher.main(["--config", str(config), "check", "--settings"]) == 0
    said = capsys.readouterr()
    assert 'redis.url = "redis://***@host:6379/1"' in said.out
    assert QUOTED not in said.out + said.err


async def test_serve_ends_with_an_operator_s_error_for_a_bad_url(discord, tmp_path):
    tables = tables_for(discord, redis={"url": "redis://host/first"})
    config = write_settings(tmp_path, tables)
    assert await asyncio.to_thread(spywatcher.main, ["--config", str(config), "serve"]) == 2


# ---- TLS


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
async def secured(tmp_path: Path, ours: Authority) -> AsyncIterator[str]:
    """HOST:PORT of a Redis behind TLS, which asks who connects for a certificate of `ours` too."""
    certificate = ours.sign("127.0.0.1")
    async with AsyncExitStack() as stack:
        if knows_tls(redis_program()):
            port = free_port()
            files = (*("--tls-cert-file", str(certificate)), *("--tls-key-file", str(certificate)))
            more = (*files, "--tls-ca-cert-file", str(ours.file), "--tls-port", str(port))
            await stack.enter_async_context(RedisServer(tmp_path / "redis", *more))
        else:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ours.file)
            context.load_cert_chain(certificate)
            context.verify_mode = ssl.CERT_REQUIRED
            redis = await stack.enter_async_context(RedisServer(tmp_path / "redis"))
            port = (await stack.enter_async_context(Proxy(redis.port, context))).port
        yield f"127.0.0.1:{port}"


async def test_two_nodes_meet_over_tls_with_certificates_on_both_sides(pair, secured, ours):
    own = ours.sign("127.0.0.2")
    files = f"ssl_ca_certs={ours.file}&ssl_certfile={own}&ssl_keyfile={own}"
    async with pair(url=f"rediss://{secured}/1?{files}") as nodes:
        await nodes.exchange()


NO_TLS = r"WARNING spywatcher: no TLS with Redis \(.*see redis.url and its ssl_ca_certs"


@pytest.fixture
async def eavesdropper(ours: Authority) -> AsyncIterator[tuple[str, list[bytes]]]:
    """HOST:PORT of who takes TLS with a certificate of `ours`, and what it is told there."""
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(65_536))
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(ours.sign("127.0.0.1"))
    async with await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heard


@pytest.mark.logs(NO_TLS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["authority", "host"])
async def test_nothing_is_told_to_a_redis_with_another_certificate(
    pair, eavesdropper, ours, tmp_path, caplog, host
):
    """One that another authority has signed, or one for another host."""
    address, heard = eavesdropper
    trusted = ours if host == "localhost" else Authority(tmp_path / "theirs")
    address = address.replace("127.0.0.1", host)
    url = f"rediss://:{QUOTED}@{address}?ssl_ca_certs={trusted.file}"
    async with pair(url=url) as nodes:
        await eventually(lambda: caplog.text.count("no TLS with Redis") == 2)
        assert all("certificate verify failed" in str(p) for p in nodes.problems())
    assert heard == []


@pytest.mark.logs("no connection to Redis")
async def test_tls_never_becomes_plain_text(pair, redis, caplog, monkeypatch):
    monkeypatch.setattr(
        spywatcher_cluster, "REDIS_TIMEOUT", 0.3
    )  # Redis waits for the rest of a line
    async with pair(url=redis.url.replace("redis:", "rediss:")) as nodes:
        await eventually(lambda: caplog.text.count("no connection to Redis") == 2)
        assert nodes.problems() == ["no connection to Redis"] * 2
    assert await redis.ask("DBSIZE") == 0


# ---- Sentinel


class Watched:
    """A master, its replica, and the Sentinel that watches them."""

    def __init__(self, folder: Path) -> None:
        self.master = RedisServer(folder / "master")
        replica_of = ("--replicaof", "127.0.0.1", str(self.master.port))
        self.replica = RedisServer(folder / "replica", *replica_of)
        self.sentinel = Sentinel(folder / "sentinel", self.master)

    @property
    def url(self) -> str:
        """The first Sentinel is away."""
        return f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{self.sentinel.port}/0/mymaster"

    async def is_replaced(self) -> bool:
        """Whether the replica is the master."""
        return await self.sentinel.master() == self.replica.port


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    watched = Watched(tmp_path)
    async with watched.master, watched.replica, watched.sentinel:
        yield watched


async def test_two_nodes_meet_where_sentinel_says(pair, watched):
    async with pair(url=watched.url) as nodes:
        await nodes.exchange()


async def test_a_sentinel_that_is_away_as_a_node_comes_is_asked_later_on(watched) -> None:
    """They are looked at by name: that of the test that is there must not go, or no master is known."""
    link = Link(RedisSettings(url=watched.url), "")
    manager = link.redis.connection_pool.sentinel_manager
    named = set(manager.sentinels)
    await asyncio.gather(*(link.redis.ping() for _ in range(10)))
    assert set(manager.sentinels) == named
    await link.close()


async def test_a_master_that_no_sentinel_knows_is_told_by_its_name_alone(watched) -> None:
    link = Link(RedisSettings(url=f"{watched.url}s"), "")
    with pytest.raises(
        RedisError, match=r"^no Sentinel in reach names a master 'mymasters' that is up$"
    ):
        await link.redis.ping()
    await link.close()


async def test_a_sentinel_that_is_asked_while_a_node_stops_is_left(watched) -> None:
    for turns in range(0, 60, 3):
        await stop_while_asking(watched.url, turns)
    await eventually(lambda: no_clients(watched.sentinel))


@pytest.mark.faults
@pytest.mark.logs("no connection to Redis", "Redis refuses this node", required=False)
@pytest.mark.parametrize("killed", [False, True], ids=["SENTINEL FAILOVER", "master killed"])
async def test_a_failover_loses_no_event_and_takes_seconds(pair, watched, killed):
    await eventually(watched.sentinel.sees_replica, timeout=20)
    async with pair(url=watched.url, grace=5.0) as nodes:
        await nodes.ready()
        await nodes.connect()
        async with nodes.talking() as sent:
            await eventually(lambda: min(map(len, nodes.heard())) > 50)
            begun = time.monotonic()
            if killed:
                await watched.master.kill()
            else:
                await watched.sentinel.ask("SENTINEL", "FAILOVER", "mymaster")
                await eventually(watched.master.is_replica, timeout=30)
            await eventually(watched.is_replaced, timeout=10)
            await eventually(lambda: nodes.problems() == [None, None], timeout=10)
            told = len(sent)
            await eventually(lambda: all(e[-1].data["number"] > told for e in nodes.from_afar()))
        assert nodes.longest_silence(begun) <= 5
        expected = [number for number in range(len(sent)) for _ in range(2)]
        await eventually(lambda: [sorted(heard) for heard in nodes.heard()] == [expected] * 2)


async def events_of(redis: RedisServer, guild: Guild) -> set[bytes]:
    """Of which nodes Redis has an event of this guild."""
    kept = await redis.ask("XRANGE", f"spywatcher:guild:{guild.id}", "-", "+")
    notes = [msgspec.msgpack.decode(fields[b"n"], type=Note) for _, fields in kept]
    return set(re.findall(b'"node":[01]', b"".join(note.body for note in notes)))


@pytest.mark.faults
@pytest.mark.logs("no connection to Redis", required=False)
async def test_nodes_leave_a_master_that_does_not_know_yet_that_it_was_replaced(
    pair, watched, guild
):
    await eventually(watched.sentinel.sees_replica, timeout=20)
    async with pair(url=watched.url, grace=5.0) as nodes:
        await nodes.ready()
        await nodes.connect()
        await watched.sentinel.ask("SENTINEL", "FAILOVER", "mymaster")
        await eventually(watched.is_replaced, timeout=20)
        nodes.say(1)

        async def both_came() -> bool:
            return len(await events_of(watched.replica, guild)) == 2

        await eventually(both_came, timeout=4)
        assert not await watched.master.is_replica()
        await eventually(lambda: nodes.heard() == [[1, 1], [1, 1]])


@pytest.mark.faults
@pytest.mark.logs("no connection to Redis", required=False)
async def test_what_a_replica_has_missed_it_gets_when_it_becomes_the_master(pair, watched, guild):
    await eventually(watched.sentinel.sees_replica, timeout=20)
    async with pair(url=watched.url, grace=5.0) as nodes:
        await nodes.ready()
        await nodes.connect()
        watched.replica.freeze()
        await watched.master.ask("CLIENT", "KILL", "TYPE", "replica")
        nodes.say(1)
        await eventually(lambda: nodes.heard() == [[1, 1], [1, 1]])
        await watched.master.kill()
        watched.replica.thaw()
        await eventually(watched.is_replaced, timeout=20)
        await eventually(lambda: nodes.problems() == [None, None], timeout=10)

        async def everything_is_kept() -> bool:
            return await events_of(watched.replica, guild) == {b'"node":0', b'"node":1'}

        await eventually(everything_is_kept)
        assert nodes.heard() == [[1, 1], [1, 1]]
