"""What every test gets: a watched guild, the JavaScript client, and an eye on what is left over.

A test fails when anything in it logs at WARNING or above without saying so beforehand:

    @pytest.mark.logs(r"plugin broken\\.py failed to load")
    async def test_a_broken_plugin_is_named(...): ...

Each pattern is looked for in "LEVEL logger: message" and must be found; with `required=False` it may.
`request.node.add_marker(pytest.mark.logs(...))` does the same for a pattern known only later.
Tasks whose exception nobody looked at, and files, sockets, loops and processes left open, fail the
test that made them.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import hikari
import pytest
import service
from counting import BOT
from jsclient import JavaScript, Node
from waiting import clock
from watching import Watch, Watching

from simulator import GatewaySocket, Guild, Op, Packet, PretendDiscord, make_guild
from spywatcher import BLOCKING

#: What starts processes again and again, waits for time to pass, or tries very much: `make test-quick`
#: leaves it out.
SLOW = {
    "test_access",
    "test_access_histories",
    "test_access_nodes",
    "test_analytics",
    "test_analytics_oracle",
    "test_analytics_shared",
    "test_bundle",
    "test_cluster",
    "test_command_line",
    "test_demo",
    "test_discord_faults",
    "test_fanout",
    "test_flood",
    "test_fuzz",
    "test_gateway",
    "test_history",
    "test_history_oracle",
    "test_lifecycle",
    "test_limits",
    "test_page",
    "test_plugin_reload",
    "test_readme",
    "test_recovery",
    "test_recovery_histories",
    "test_recovery_storm",
    "test_redis_links",
    "test_rights",
    "test_rights_load",
    "test_server",
    "test_signin",
    "test_signin_attacks",
    "test_signin_board",
    "test_signin_page",
    "test_signin_proxies",
    "test_simulator",
    "test_simulator_clients",
    "test_systemd",
    "test_tokens",
    "test_types",
}

RECORDS = pytest.StashKey[list[logging.LogRecord]]()


class Hasty(ModuleType):
    """asyncio, but for the quarter second that hikari gives TLS to close: there is no TLS here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0 if seconds == 0.25 else seconds)


hikari.impl.shard.asyncio = Hasty("asyncio")
# Each bot reads the host's certificates, which takes longer than most tests, for TLS that none uses.
hikari.impl.config._ssl_factory = functools.cache(hikari.impl.config._ssl_factory)


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """The Node process that all tests share."""
    node = Node()
    yield node
    assert node.stop() == 0


@pytest.fixture
async def js(node: Node) -> AsyncIterator[JavaScript]:
    """The stock Socket.IO client, without any socket yet."""
    async with JavaScript(node) as js:
        yield js


@pytest.fixture
async def discord() -> AsyncIterator[PretendDiscord]:
    """A pretend Discord that waits for the bot."""
    async with PretendDiscord() as discord:
        yield discord


@pytest.fixture
async def waiting_shard(
    discord: PretendDiscord, monkeypatch: pytest.MonkeyPatch
) -> asyncio.Future[None]:
    """Makes it a bot of two shards, the second of which Discord lets in once the future is set."""
    discord.shards = 2
    let_in: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    receive = GatewaySocket._receive

    def hold(socket: GatewaySocket, packet: Packet) -> None:
        if packet.op == Op.IDENTIFY and packet.d["shard"][0] == 1:
            let_in.add_done_callback(lambda _: receive(socket, packet))
        else:
            receive(socket, packet)

    monkeypatch.setattr(GatewaySocket, "_receive", hold)
    return let_in


@pytest.fixture
def guild(discord: PretendDiscord) -> Guild:
    """The guild that is watched, to be furnished before the bot comes."""
    return discord.add_guild()


@pytest.fixture
def owls() -> Guild:
    """A guild of no pretend Discord: a test feeds hikari by hand with what happens there."""
    return make_guild("Night Owls", bot=BOT)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test's servers keep is not there for the next test."""
    monkeypatch.setattr(service, "FOLDER", tmp_path)


@pytest.fixture
def watching(discord: PretendDiscord, guild: Guild, js: JavaScript) -> Watching:
    """Starts servers: `async with watching(server={"port": 0}) as spy`."""
    return Watching(discord, guild, js)


@pytest.fixture
async def spy(watching: Watching) -> AsyncIterator[Watch]:
    """A running server with default settings that watches `guild`."""
    async with watching() as spy:
        yield spy


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line sets levels and handlers for its process; not for the tests that follow."""
    names = ("root", "hikari", "hikari.gateway")
    loggers = {logging.getLogger(None if name == "root" else name) for name in names}
    before = {logger: (logger.level, logger.handlers[:]) for logger in loggers}
    yield
    for logger, (level, handlers) in before.items():
        logger.setLevel(level)
        logger.handlers[:] = handlers


# ---- log lines and left-over objects ---------------------------------------
# Hooks, not a fixture: they also see what happens while fixtures and the event loop are closed.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    # What was imported stays; not looking at it again makes the collection after each test cheap.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[RECORDS] = []
    with _recording(item.stash[RECORDS]):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    result = yield
    faults = _left_over()
    faults += _unexpected(item, item.stash[RECORDS])
    if faults:
        more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
        pytest.fail("\n".join(faults[:10] + more), pytrace=False)
    return result


@contextmanager
def _recording(records: list[logging.LogRecord]) -> Iterator[None]:
    """Note each record at WARNING or above that its logger lets through, whatever handlers do."""
    factory = logging.getLogRecordFactory()

    def note(*args: object, **kwargs: object) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        if record.levelno >= logging.WARNING and logging.getLogger(record.name).filter(record):
            records.append(record)
        return record

    logging.setLogRecordFactory(note)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)


@pytest.fixture(autouse=True)
def patience_with_plugins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds up a server for 0.1 s is named where a test is about that; other tests, and the machine's
    host, hold up each other for longer.
    """
    marks = request.node.iter_markers("logs")
    if not any("held up" in pattern for mark in marks for pattern in mark.args):
        monkeypatch.setattr("spywatcher.BLOCKING", 1.0)


def _left_over() -> list[str]:
    """Collect garbage now, so that what complains at its end complains in the test that made it."""
    complaints: list[str] = []

    def note(unraisable: sys.UnraisableHookArgs) -> None:
        complaints.append(f"left over: {unraisable.exc_value} (in {unraisable.object!r})")

    previous, sys.unraisablehook = sys.unraisablehook, note
    try:
        gc.collect()
    finally:
        sys.unraisablehook = previous
    return complaints


def _unexpected(item: pytest.Item, records: list[logging.LogRecord]) -> list[str]:
    """Compare the records with the test's `logs` marks; return a line for each difference."""
    lines = {f"{r.levelname} {r.name}: {r.getMessage()}": r for r in records}
    marks = list(item.iter_markers("logs"))
    patterns = [pattern for mark in marks for pattern in mark.args]
    required = [p for mark in marks if mark.kwargs.get("required", True) for p in mark.args]
    unexpected = [
        f"unexpected log line: {line}\n{_cause(record)}".rstrip()
        for line, record in lines.items()
        if not any(re.search(pattern, line) for pattern in patterns) and not _of_the_host(record)
    ]
    missing = [
        f"expected a log line that matches {pattern!r}"
        for pattern in required
        if not any(re.search(pattern, line) for line in lines)
    ]
    return unexpected + missing


def _of_the_host(record: logging.LogRecord) -> bool:
    """Whether a plugin is named for what the host did: this process stood still, and cannot know it."""
    found = re.search(r"held up the server for (\d+) ms", record.getMessage())
    if found is None:
        return False
    seconds = int(found[1]) / 1000
    logged = record.created - time.time() + time.monotonic()
    return clock.lasted(logged - seconds, logged) < BLOCKING


def _cause(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
