"""Ways to be wrong: each is told in one clear line, and the good plugin beside them works.

The plugins are files, in tests/plugins/wrong_at_load and tests/plugins/wrong_at_work.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from service import ROOT, fetch
from waiting import clock, eventually
from watching import Watch, Watching

import spywatcher
from simulator import Harness
from spywatcher import BLOCKING, Metrics, OperatorError, PluginLoader, PluginsSettings

FOLDER = ROOT / "tests" / "plugins"
#: Why each plugin of tests/plugins/wrong_at_load is not loaded.
WHY = {
    "arguments": r"broken takes \(event, spy, more\), expected \(event\) or \(event, spy\) \(arguments.py, line 7\)",
    "binary": "source code string cannot contain null bytes|invalid|codec can't decode",
    "circle": r"cannot import name 'ONE' .*ImportError, two.py, line 1",
    "dotted.name": "a plugin's name has no dot in it",
    "duplicate": "plugins a_good and duplicate both claim the event good:message; disable one",
    "event_of_old": r"on\(\"MessageCreate\"\) .* write on\(hikari.GuildMessageCreateEvent\).*line 10",
    "exits": r"3 \(SystemExit, exits.py, line 3\)",
    "greeter": r"broken takes \(guild_id\), expected \(guild_id, spy\) or \(guild_id, spy, viewer\)",
    "import_error": r"No module named 'no_such_module_anywhere' .*import_error.py, line 1",
    "instance": r"Broken: expected a function of \(event\) or \(event, spy\)",
    "link": "link.py is no file",
    "need": "need is no hook, did you mean needs",
    "needs_more": r"old_state stays empty without needs = \{\"voice\"\}",
    "needs_what": "needs: got .*coffee.*, expected some of activities, emojis, invites, messages, stickers, voice",
    "no_arguments": r"broken takes \(\), expected \(spy\)",
    "no_name": r"emit: got \"\", expected an event's name \(no_name.py, line 6\)",
    "no_guild": r"on\(StartedEvent\) has no guild_id: leave emit= out, use spy.emit.*line 6",
    "no_event": r"on\(Member\): expected a class of hikari's events.*no_event.py, line 6",
    "not_called": r"every\(.*\): expected seconds.*not_called.py, line 4",
    "page": r"route\(\"/page\"\) belongs on a RequestHandler",
    "path": r"route\(\"page\"\): expected a path that begins with /",
    "payload": "class Broken: name 'Somebody' is not defined",
    "raises": r"boom at import \(RuntimeError, raises.py, line 1\)",
    "reserved": "the event name connect is reserved",
    "room": 'got "my room", expected a kind of room',
    "set_up": "set_up is no hook, did you mean setup",
    "setting": "class Setting is never read, did you mean Settings",
    "settings_default": "Settings.limit: each key needs a default",
    "settings_type": r"expected class Settings\(PluginSettings",
    "setup_arguments": r"setup takes \(\), expected \(spy\)",
    "syntax_error": r"invalid syntax \(syntax_error.py, line 1\)",
}
#: What is wrong with these is in no line of their own.
WITHOUT_LINE = {"binary", "dotted.name", "duplicate", "link", "reserved"}


@pytest.mark.logs(*(f"ERROR spywatcher: plugin {name}: not loaded: " for name in WHY))
def test_each_plugin_that_does_not_load_is_named_in_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader = PluginLoader(PluginsSettings(folders=("wrong_at_load",)), {}, FOLDER, Metrics())
    loader.load_all()
    assert sorted(loader.plugins) == ["a_good", "json"]
    assert sorted(loader.failures) == sorted(WHY)
    for name, why in WHY.items():
        [line] = [line for line in loader.faults() if line.startswith(f"plugin {name}: ")]
        assert re.search(why, line), line
        assert name in WITHOUT_LINE or re.search(r"\(.*, line \d+\)$", line), line
        assert f"spywatcher_plugins.{name}" not in sys.modules
    assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == len(WHY)


def test_a_key_for_a_plugin_without_settings_is_refused() -> None:
    tables = {"messages": {"foo": 1}}
    loader = PluginLoader(PluginsSettings(), tables, ROOT, Metrics())
    with pytest.raises(OperatorError, match=r"plugin.messages.foo: unknown key"):
        loader.load_all()


# ---- at work ---------------------------------------------------------------


def at_work(*names: str) -> dict[str, Any]:
    """Settings with which these of tests/plugins/wrong_at_work run beside the good one."""
    others = {path.stem for path in (FOLDER / "wrong_at_work").glob("*.py")}
    disabled = sorted(others - {"a_good", *names})
    return {"folders": [str(FOLDER / "wrong_at_work")], "disabled": disabled}


async def still_here(spy: Watch) -> Any:
    """Somebody writes, and the good plugin says so."""
    dashboard = await spy.dashboard()
    await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general)
    assert (await dashboard.next("good:message"))["text"] == "still here"
    return dashboard


RUBBISH = {
    "a_text": "returns:text: returned str 'text', expected a Payload, a dict or None",
    "a_list": "returns:list: returned list, expected a Payload, a dict or None",
    "an_object": "returns:object: inner.it: object cannot be sent as JSON",
    "a_set": "returns:set: names: set cannot be sent as JSON",
    "not_a_number": "returns:nan: share: JSON has no nan",
    "huge": "returns:huge: user_id: JavaScript rounds a number so large: send it as a str",
    "a_circle": "returns:circle: itself.*nested deeper than 16, or in a circle",
    "half_a_character": "returns:half: name: half of a surrogate pair is no text",
    "wrong_type": r"returns:typed: Typed.user_id: Expected `str`, got `int`",
    "wrong_inside": r"returns:inner: Typed.names: Expected `str`, got `int`",
    "without_emit": r"returned dict, but on\(\) has no emit= to send it as",
}


@pytest.mark.logs(
    *(
        f"plugin returns: {name} failed on GuildMessageCreateEvent: {why}"
        for name, why in RUBBISH.items()
    )
)
async def test_what_cannot_be_sent_is_told_with_its_reason(watching: Watching) -> None:
    async with watching(plugins=at_work("returns")) as spy:
        dashboard = await still_here(spy)
        await spy.nothing(dashboard)


@pytest.mark.logs(
    "plugin raises: plain failed on GuildMessageCreateEvent: RuntimeError: boom",
    "plugin raises: later failed on GuildMessageCreateEvent: RuntimeError: boom later",
    "plugin raises: exits failed on GuildMessageCreateEvent: SystemExit: 0",
    "plugin raises: cancels failed on GuildMessageCreateEvent: CancelledError",
    "plugin raises: tick failed: RuntimeError: boom again",
    "plugin raises: making raises:hello failed in hello: RuntimeError: boom at hello",
    "plugin raises: teardown failed: RuntimeError: boom at the end",
    r"plugin raises: tick failed 20 times in a row and is paused for 60 s",
)
async def test_what_is_raised_is_told_once_of_its_kind_and_counted_each_time(
    watching: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(plugins=at_work("raises")) as spy:
        for _ in range(3):
            await still_here(spy)
        failures = spy.server.metrics.plugin_failures.labels("raises")
        await eventually(lambda: failures._value.get() >= 3 * 4 + 3 + 20)
        health = spy.server.plugins.health()
        assert (health["problem"], health["paused"]) == (None, ["raises.tick"])
    said = [record.getMessage() for record in caplog.records if "boom" in record.getMessage()]
    assert len(said) == len(set(said))


EXITS = """
import asyncio, sys, hikari
from spywatcher import on, on_subscribe, route
from tornado.web import RequestHandler

@on(hikari.GuildMessageCreateEvent)
async def listener(event):
    await asyncio.sleep(0)
    sys.exit(3)

@on_subscribe("guild", emit="exits:hello")
async def hello(guild_id, spy):
    sys.exit(4)

@route("/exit")
class Page(RequestHandler):
    async def get(self):
        sys.exit(5)
"""


@pytest.mark.logs(
    "plugin exits: listener failed on GuildMessageCreateEvent: SystemExit: 3",
    "plugin exits: making exits:hello failed in hello: SystemExit: 4",
    "plugin exits: Page failed: SystemExit: 5",
)
async def test_no_plugin_ends_the_server_by_sys_exit(watching: Watching, tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text(EXITS)
    good = FOLDER / "wrong_at_work"
    plugins = at_work() | {"folders": [str(good), str(tmp_path)]}
    async with watching(plugins=plugins) as spy:
        await still_here(spy)
        assert (await fetch(spy.server.port, "/exit")).code == 500
        failures = spy.server.metrics.plugin_failures.labels("exits")
        await eventually(lambda: failures._value.get() == 3)
        await still_here(spy)


@pytest.mark.logs(
    r"plugin hangs: forever failed on GuildMessageCreateEvent: took longer than 0.5 s",
    r"plugin hangs: stubborn failed on GuildMessageCreateEvent: took longer than 0.5 s",
    r"plugin hangs: making hangs:hello failed in hello: took longer than 0.5 s",
    r"plugin hangs: teardown failed: took longer than 0.5 s",
    r"WARNING spywatcher: plugin hangs: blocks held up the server for [1-9]\d\d ms",
    r"WARNING spywatcher: plugin hangs: blocks_later held up the server for [1-9]\d\d ms",
)
async def test_what_hangs_or_blocks_is_named_and_holds_up_nobody(
    watching: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(plugins={**at_work("hangs"), "handler_timeout": 0.5}) as spy:
        await still_here(spy)
        failures = spy.server.metrics.plugin_failures.labels("hangs")
        await eventually(lambda: failures._value.get() >= 3)
        while not {"blocks", "blocks_later"} <= set(re.findall(r"(\w+) held up", caplog.text)):
            await still_here(spy)  # on a busy machine each has the benefit of the doubt


@pytest.mark.logs("plugin hangs_at_setup: setup failed: took longer than 0.3 s and was cancelled")
async def test_a_setup_that_hangs_is_left_out_while_the_server_serves(
    watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spywatcher.Runner, "setup_limit", 0.3)
    async with watching(ready=False, plugins=at_work("hangs_at_setup")) as spy:
        assert spy.server.port  # it listens already
        await spy.discord.wait_for_bot()
        await still_here(spy)
        assert spy.server.plugins.health()["failed"] == ["hangs_at_setup"]


@pytest.mark.logs(
    "plugin emits: thief failed .*: plugins a_good and emits both claim the event good:message",
    "plugin emits: impostor failed .*: the event name disconnect is reserved",
    'plugin emits: lost failed .*: emits:lost: no plugin has rooms of the kind "gild", did you mean',
)
async def test_what_is_not_a_plugins_own_is_not_sent(watching: Watching) -> None:
    async with watching(plugins=at_work("emits")) as spy:
        dashboard = await still_here(spy)
        await spy.nothing(dashboard)


@pytest.mark.logs("plugin echo: .* failed on echo:[ab]: echo:[ab] comes of itself")
async def test_events_that_lead_to_each_other_come_to_an_end(watching: Watching) -> None:
    async with watching(plugins=at_work("echo")) as spy:
        await still_here(spy)


@pytest.mark.logs(
    "plugin any: fails failed: ValueError", "plugin any: fails failed 20 times in a row"
)
async def test_after_a_pause_a_function_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spywatcher, "PAUSE", 0.0)
    calls: list[object] = []

    def fails(subject: object) -> None:
        calls.append(subject)
        raise ValueError

    metrics = Metrics()
    guarded = spywatcher.Guarded("any", metrics, fails, "fails", 1.0)
    for number in range(20):
        guarded.call(number)
    assert metrics.plugin_pauses.labels("any")._value.get() == 1
    guarded.call(20)
    assert calls == [*range(21)]


@pytest.mark.logs(
    "plugin any: slow failed: took longer than 0.01 s",
    "plugin any: slow failed 20 times in a row and is paused for 60 s",
)
async def test_a_pause_is_told_once_though_many_calls_were_under_way() -> None:
    metrics = Metrics()

    async def slow(event: object) -> None:
        await asyncio.Event().wait()

    guarded = spywatcher.Guarded("any", metrics, slow, "slow", 0.01)
    for number in range(100):
        guarded.call(number)
    await guarded.wait()
    assert metrics.plugin_failures.labels("any")._value.get() == 100
    assert metrics.plugin_pauses.labels("any")._value.get() == 1


FAILS_TO_MAKE = """
import hikari
from spywatcher import on
tries = []
@on(hikari.GuildTypingEvent)
def typing(event, spy):
    async def make():
        tries.append(1)
        raise ValueError
    spy.emit("typed", event.guild_id, make)
"""


@pytest.mark.logs("making typed failed: ValueError", "making typed failed 20 times in a row")
def test_what_makes_an_event_is_paused_like_any_function(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FAILS_TO_MAKE)
    with Harness(path) as h:
        for _ in range(25):
            with contextlib.suppress(spywatcher.PluginError):
                h.run(h.discord.typing(h.guild, h.guild.owner, h.guild.general))
        assert len(h.host.plugins["mine"].module.tries) == 20


def work(seconds: float, step: Callable[[], object] = int) -> None:
    """Take a step again and again for so long, by this thread's own clock."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        step()


def held(doing: Callable[[], object]) -> float:
    """For how long this is said to have held up the server."""
    began, before = time.monotonic(), spywatcher.standing()
    doing()
    return spywatcher.seconds_held(clock.lasted(began, time.monotonic()), before)


#: A thread that had to make way for others while it blocked is given the benefit of the doubt.
TRIES = 20


@pytest.mark.parametrize("blocks", [work, time.sleep], ids=["computes", "sleeps"])
def test_who_works_or_sleeps_is_named_with_how_long(blocks: Callable[[float], None]) -> None:
    assert any(held(lambda: blocks(0.15)) > 0.14 for _ in range(TRIES))


def test_who_starts_a_thread_on_a_busy_machine_is_not_named() -> None:
    """As a plugin's setup does: the start of one waits until it runs."""
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(10)]
    try:
        assert max(held(thread.start) for thread in threads) < BLOCKING
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_who_waits_for_a_thread_that_gets_no_processor_is_not_named(busy_processor: int) -> None:
    """As a plugin does that hands its thread some work, and then needs the interpreter."""
    with ThreadPoolExecutor(1) as others:
        others.submit(be_last_on, busy_processor).result()
        assert held(others.submit(work, 0.02).result) < BLOCKING


@pytest.fixture
def busy_processor() -> Iterator[int]:
    """The number of one that another process takes as well."""
    number = min(os.sched_getaffinity(0))
    command = f"import os; os.sched_setaffinity(0, [{number}]); print(flush=True)\nwhile True: pass"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", command], stdout=pipe) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield number
        finally:
            process.kill()


def be_last_on(processor: int) -> None:
    """Have this thread run there, for a hundredth of the time at most."""
    os.sched_setaffinity(0, [processor])
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def test_who_comes_when_garbage_is_due_is_not_named() -> None:
    assert held(lambda: work(0.2, gc.collect)) < BLOCKING


def test_many_short_waits_are_a_long_one() -> None:
    naps = [0.003] * 40
    assert any(held(lambda: [time.sleep(nap) for nap in naps]) > 0.1 for _ in range(TRIES))


def test_who_waited_for_the_interpreter_is_not_named() -> None:
    """Four other threads want it all the time, on a machine that has others to serve too."""
    ended = threading.Event()
    others = [threading.Thread(target=spin, args=(ended,)) for _ in range(4)]
    for other in others:
        other.start()
    try:
        assert max(held(lambda: work(0.03)) for _ in range(2)) < BLOCKING
    finally:
        ended.set()
        for other in others:
            other.join()


def spin(ended: threading.Event) -> None:
    while not ended.is_set():
        pass


def test_reasons_never_show_more_than_the_beginning_of_a_value() -> None:
    assert len(spywatcher.described("x" * 1000)) < 60


@pytest.fixture(autouse=True)
def _no_bytecode(tmp_path: Path) -> None:
    """Loading leaves nothing beside the plugins' files."""
    assert not list((FOLDER / "wrong_at_load").rglob("__pycache__"))
