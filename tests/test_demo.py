"""The demo: the whole product on loopback, as `make demo` starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest
from jsclient import ConnectError, JavaScript
from service import ROOT, run, running, write_settings
from waiting import eventually

MINE = """
import hikari
from spywatcher import on

@on(hikari.GuildTypingEvent, emit="typing:start")
def typing_start(event):
    return {"userId": str(event.user_id)}
"""


ADDRESS = r"^    (http://localhost:\d+)/#token=(ey\S+)$"


async def test_the_demo_prints_one_address_that_signs_in(js: JavaScript) -> None:
    async with running(ROOT, "demo", "--port", "0") as service:
        url, token = (await service.wrote(ADDRESS)).groups()
        assert "\n".join(service.out).count("http://") == 1
        dashboard = await js.connect(url, token=token)
        owls, readers = (await dashboard.call("guilds:list"))["guilds"]
        assert (await dashboard.call("subscribe:guild", owls["id"]))["ok"]
        assert (await dashboard.call("subscribe:guild", readers["id"]))["ok"]
        await dashboard.next("message:new")
        service.process.send_signal(signal.SIGINT)
        assert await service.exit_status() == 0
        assert "Traceback" not in "".join(service.log)


@pytest.mark.parametrize("origin", ["http://localhost:8080", "http://127.0.0.1:4173"])
async def test_a_page_of_ones_own_may_connect_from_any_port(js: JavaScript, origin: str) -> None:
    async with running(ROOT, "demo", "--port", "0") as service:
        url, token = (await service.wrote(ADDRESS)).groups()
        await js.connect(url, token=token, extraHeaders={"Origin": origin})
        await js.refused(url, token=token, extraHeaders={"Origin": "http://elsewhere.example"})


async def test_five_wrong_tokens_do_not_shut_one_out_for_long(js: JavaScript) -> None:
    async with running(ROOT, "demo", "--port", "0") as service:
        url, token = (await service.wrote(ADDRESS)).groups()
        for _ in range(6):
            await js.refused(url, token="wrong")
        await eventually(lambda: comes_in(js, url, token), 10)


async def comes_in(js: JavaScript, url: str, token: str) -> bool:
    try:
        await js.connect(url, token=token)
    except ConnectError:
        return False
    return True


async def test_lists_of_members_are_filled_when_the_address_is_shown(js: JavaScript) -> None:
    async with running(ROOT, "demo", "--port", "0") as service:
        url, token = (await service.wrote(ADDRESS)).groups()
        dashboard = await js.connect(url, token=token)
        for guild in (await dashboard.call("guilds:list"))["guilds"]:
            await dashboard.call("subscribe:analytics", guild["id"])
            data = (await dashboard.next("analytics:update"))["data"]
            assert all(data[name] for name in ("ghosts", "lurkers", "channelDiversity"))


async def test_the_charts_of_weeks_are_filled_when_the_address_is_shown(js: JavaScript) -> None:
    async with running(ROOT, "demo", "--port", "0") as service:
        url, token = (await service.wrote(ADDRESS)).groups()
        dashboard = await js.connect(url, token=token)
        for guild in (await dashboard.call("guilds:list"))["guilds"]:
            await dashboard.call("subscribe:history", guild["id"])
            hours = (await dashboard.next("history:update"))["hours"]
            assert len(hours) > 27 * 24
            assert sum(hour["messages"] for hour in hours) > 1000


async def test_the_terminal_shows_the_first_event_of_each_kind() -> None:
    async with running(ROOT, "demo", "--port", "0") as service:
        for event in ("message:new", "presence:update", "analytics:update"):
            await service.wrote(rf"^{event} +\{{")
        events = [line.split()[0] for line in service.out if re.match(r"\w+:\w+ +\{", line)]
        assert len(events) == len(set(events))
        assert max(map(len, service.out[-len(events) :])) < 1000


async def test_an_authors_folder_of_plugins_runs_against_the_lively_guild(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "typing.py").write_text(MINE)
    async with running(tmp_path, "demo", "--port", "0", "--plugins", "mine") as service:
        await service.wrote(r"^typing:start .*\n(?:.*\n)*typing:start ")
        saved = MINE.replace("typing:start", "typing:later").replace("emit=", "room='mine', emit=")
        (tmp_path / "mine" / "typing.py").write_text(saved)
        await service.wrote(r"^typing:later ")


SAYS = """
from spywatcher import PluginSettings, every

class Settings(PluginSettings, frozen=True):
    word: str = "nothing"

@every(0.1)
def say(spy):
    spy.log.info("says %s", spy.settings.word)
"""


async def test_the_demo_reads_its_settings_again_when_told_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write_settings(tmp_path, {})
    (tmp_path / "mine" / "says.py").write_text(SAYS)
    async with running(tmp_path, "demo", "--port", "0", "--plugins", "mine") as service:
        await service.wrote("says nothing")
        write_settings(tmp_path, {"plugin.says": {"word": 5}})
        service.process.send_signal(signal.SIGHUP)
        await service.wrote("nothing has changed: .*plugin.says.word: got 5")
        write_settings(tmp_path, {"plugin.says": {"word": "hello"}})
        service.process.send_signal(signal.SIGHUP)
        await service.wrote("says hello")
        assert not [line for line in service.log if "restart" in line]


async def test_a_port_in_use_is_said_with_the_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, log = await run(tmp_path, "demo", "--port", taken.getsockname()[1])
    assert (status, "; take another one: python spywatcher.py demo --port 0" in log[-1]) == (
        2,
        True,
    )


async def test_the_demo_leaves_what_an_operator_has_alone(tmp_path: Path) -> None:
    write_settings(tmp_path, {"redis": {"url": "redis://127.0.0.1:1"}, "discord": {"token": "x"}})
    async with running(tmp_path, "demo", "--port", "0") as service:
        await service.wrote(r"^(message:new|presence:update) ")
    assert os.listdir(tmp_path) == ["config.toml"]
