"""The service as systemd starts, watches, reloads and restarts it: the protocol, both sides real."""

from __future__ import annotations

import asyncio
import configparser
import itertools
import os
import re
import signal
import sys
import time
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from jsclient import QUICK, JavaScript
from service import (
    ROOT,
    Service,
    Systemd,
    running,
    server_for,
    tables_for,
    viewer_token,
    write_settings,
)
from waiting import clock, eventually

import spywatcher
from simulator import PretendDiscord
from spywatcher import Gateway, ServerSettings

#: A plugin that blocks the loop for a time as soon as somebody types.
BLOCKER = """
import hikari, time
from spywatcher import on

@on(hikari.GuildTypingEvent)
def typing(event):
    print("blocks now", flush=True)
    time.sleep(1.5)
"""


@pytest.fixture
async def discord() -> AsyncIterator[PretendDiscord]:
    async with PretendDiscord() as discord:
        discord.add_guild()
        yield discord


@pytest.fixture
async def systemd(tmp_path: Path) -> AsyncIterator[Systemd]:
    async with Systemd(tmp_path) as systemd:
        yield systemd


@pytest.fixture
async def service(
    tmp_path: Path, discord: PretendDiscord, systemd: Systemd
) -> AsyncIterator[Service]:
    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path, systemd=systemd) as service:
        yield service


# ---- what systemd hears


async def test_ready_is_told_once_connections_are_accepted(
    service: Service, systemd: Systemd
) -> None:
    await eventually(lambda: systemd.heard("READY=1"))
    assert (await service.get("/health/live")).code == 200


async def test_the_status_line_tells_guilds_and_dashboards(
    service: Service, systemd: Systemd, js: JavaScript
) -> None:
    await js.connect(service.url, token=viewer_token())
    # on a busy machine a problem may follow: how late the loop was
    await eventually(lambda: systemd.heard("STATUS=1 guilds, 1 dashboards"))


async def test_a_reload_is_told_from_its_beginning_to_its_end(
    service: Service, systemd: Systemd
) -> None:
    await eventually(lambda: systemd.heard("READY=1"))
    before = time.monotonic_ns() // 1000
    service.process.send_signal(signal.SIGHUP)
    await eventually(lambda: len(systemd.heard("READY=1")) == 2)
    told = [line for _, line in systemd.told if line.startswith(("RELOAD", "MONO", "READY"))]
    assert [line.split("=")[0] for line in told] == [
        "READY",
        "RELOADING",
        "MONOTONIC_USEC",
        "READY",
    ]
    assert before <= int(told[2].split("=")[1]) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a." * 5000 + "a = 1", "[plugin.presence." + "a." * 900 + "a]"]
)
async def test_a_reload_of_a_file_without_sense_is_one_line_and_told_too(
    service: Service, systemd: Systemd, tmp_path: Path, text: str
) -> None:
    await eventually(lambda: systemd.heard("READY=1"))
    (tmp_path / "config.toml").write_text(text)
    service.process.send_signal(signal.SIGHUP)
    await eventually(lambda: len(systemd.heard("READY=1")) == 2)
    await service.wrote("settings not reloaded, nothing has changed: config.toml: nested more than")
    assert sum("settings" in line for line in service.log) == 1
    assert "Traceback" not in service.output


async def test_a_stop_is_told_when_it_begins(service: Service, systemd: Systemd) -> None:
    await eventually(lambda: systemd.heard("READY=1"))
    service.process.send_signal(signal.SIGTERM)
    assert await service.exit_status() == 0
    assert systemd.heard("STOPPING=1")


async def test_a_token_that_discord_refuses_ends_with_the_status_that_prevents_a_restart(
    tmp_path: Path, discord: PretendDiscord, systemd: Systemd
) -> None:
    other = PretendDiscord().token
    write_settings(tmp_path, tables_for(discord, discord={"token": other}))
    async with running(tmp_path, systemd=systemd) as service:
        assert await service.exit_status() == 2
    assert "Discord refused the bot token" in service.output


# ---- the watchdog


async def test_the_watchdog_is_fed_while_all_turns(tmp_path: Path, discord: PretendDiscord) -> None:
    write_settings(tmp_path, tables_for(discord))
    async with Systemd(tmp_path, watchdog=0.4) as systemd, running(tmp_path, systemd=systemd):
        await eventually(lambda: len(systemd.heard("WATCHDOG=1")) >= 6)
        moments = [moment for moment, line in systemd.told if line == "WATCHDOG=1"]
        assert sum(b - a for a, b in itertools.pairwise(moments)) / len(moments) < 0.4


async def test_a_blocked_loop_does_not_feed_the_watchdog(
    tmp_path: Path, discord: PretendDiscord
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "blocker.py").write_text(BLOCKER)
    write_settings(tmp_path, tables_for(discord))
    async with Systemd(tmp_path, watchdog=0.4) as systemd, running(tmp_path, systemd=systemd):
        await discord.wait_for_bot()
        [guild] = discord.guilds.values()
        await discord.typing(guild, guild.owner, guild.general)

        def longest_pause() -> float:
            moments = [moment for moment, line in systemd.told if line == "WATCHDOG=1"]
            return max((b - a for a, b in itertools.pairwise(moments)), default=0.0)

        await eventually(lambda: longest_pause() > 1.2)


async def test_the_watchdogs_abort_leaves_every_threads_stack_in_the_journal(
    tmp_path: Path, discord: PretendDiscord
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "blocker.py").write_text(BLOCKER)
    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        [guild] = discord.guilds.values()
        await discord.typing(guild, guild.owner, guild.general)
        await service.wrote("blocks now")
        service.process.send_signal(signal.SIGABRT)  # what systemd sends
        assert await service.exit_status() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in service.log
    assert any('blocker.py", line' in line for line in service.log)


@pytest.mark.logs("not connected to Discord")
async def test_a_stuck_gateway_supervisor_does_not_feed_the_watchdog(
    discord: PretendDiscord, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: Gateway) -> None:
        await asyncio.Event().wait()

    async with server_for(discord) as server:
        await discord.wait_for_bot()
        assert server.alive
        monkeypatch.setattr(Gateway, "turn_limit", 0.4)
        monkeypatch.setattr(Gateway, "_close", never)
        await discord.drop(4011)  # the supervisor has to close the bot and to ask how many shards
        await eventually(lambda: not server.alive)
        monkeypatch.undo()


@pytest.mark.logs("not connected to Discord")
async def test_an_outage_of_discord_keeps_the_watchdog_fed(
    discord: PretendDiscord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gateway, "turn_limit", 0.4)
    async with server_for(discord, discord={"rest_url": "http://127.0.0.1:9/"}) as server:
        deadline = clock() + 1.5
        while clock() < deadline:
            await eventually(lambda: server.alive, timeout=0.2)
            await asyncio.sleep(0.05)


async def test_a_gateway_task_that_ended_is_no_turning(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        await discord.wait_for_bot()
        server._gateway_task.cancel()
        await eventually(lambda: not server.alive)


# ---- what systemd hands over


async def test_the_service_listens_on_the_socket_that_it_was_handed(
    service: Service, systemd: Systemd
) -> None:
    assert service.port == systemd.port


async def test_clients_that_connect_during_restarts_see_no_refusal(
    tmp_path: Path, discord: PretendDiscord, systemd: Systemd
) -> None:
    write_settings(tmp_path, tables_for(discord))
    refusals: list[Exception] = []

    async def knock(number: int) -> bytes:
        await asyncio.sleep(number / 100)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", systemd.port)
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
        except OSError as error:
            refusals.append(error)
            return b""
        return answer.split(b"\r\n")[0]

    async with running(tmp_path, systemd=systemd) as service:
        await eventually(lambda: systemd.heard("READY=1"))
        knocking = asyncio.gather(*map(knock, range(200)))
        await asyncio.sleep(0.5)
        service.process.send_signal(signal.SIGTERM)
        assert await service.exit_status() == 0
    async with running(tmp_path, systemd=systemd):
        assert set(await knocking) == {b"HTTP/1.1 200 OK"}
    assert refusals == []


async def test_dashboards_come_back_over_a_restart_without_one_refusal(
    tmp_path: Path, discord: PretendDiscord, systemd: Systemd, js: JavaScript
) -> None:
    write_settings(tmp_path, tables_for(discord, limits={"connections_per_viewer": 1000}))
    options = {"token": viewer_token(), **QUICK}
    async with running(tmp_path, systemd=systemd) as service:
        url = service.url
        clients = [await js.connect(url, **options) for _ in range(20)]
        service.process.send_signal(signal.SIGTERM)
        assert await service.exit_status() == 0
    async with running(tmp_path, systemd=systemd):
        for client in clients:
            await client.reconnected(timeout=15)
            assert not client.events("connect_error")


async def test_children_of_the_service_do_not_inherit_its_ties_to_systemd() -> None:
    environ = {
        "NOTIFY_SOCKET": "/nowhere",
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": "0",
        "LISTEN_FDNAMES": "",
        "WATCHDOG_USEC": "4000000",
        "WATCHDOG_PID": str(os.getpid()),
        "PATH": "/bin",
    }
    systemd = spywatcher.Systemd(environ)
    assert environ == {"PATH": "/bin"}
    assert systemd.interval == 2.0
    systemd.tell("READY=1")  # nobody listens there, and nothing happens


def test_what_was_meant_for_another_process_is_left_alone() -> None:
    other = {"LISTEN_PID": "1", "LISTEN_FDS": "3", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "9"}
    systemd = spywatcher.Systemd(other)
    assert systemd.sockets() == []
    assert systemd.interval is None


# ---- the journal


async def test_each_line_in_the_journal_has_its_level(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[log]\nlevel = 'debug'\n")
    script = (
        "import logging, os, spywatcher\n"
        "s = os.fstat(2)\n"
        "os.environ['JOURNAL_STREAM'] = f'{s.st_dev}:{s.st_ino}'\n"
        "spywatcher.set_up_logging(spywatcher.LogSettings(level='debug'))\n"
        "log = logging.getLogger('x')\n"
        "log.debug('d'); log.info('i'); log.warning('w'); log.critical('c')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('e')\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    lines = (await process.communicate())[1].decode().splitlines()
    assert [line[:3] for line in lines[:4]] == ["<7>", "<6>", "<4>", "<2>"]
    assert len(lines) > 6
    assert all(line.startswith("<3>") for line in lines[4:])


# ---- the units


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # systemd's names have capitals
    parser.read_string((ROOT / "systemd" / name).read_text())
    return parser


def test_systemd_waits_longer_for_a_stop_than_the_stop_takes() -> None:
    service = unit("spywatcher.service")["Service"]
    assert float(service["TimeoutStopSec"]) > ServerSettings().shutdown_grace * 2


def test_the_watchdog_waits_longer_than_the_supervisor_may_take() -> None:
    service = unit("spywatcher.service")["Service"]
    assert float(service["WatchdogSec"]) >= Gateway.turn_limit


def test_the_unit_does_what_the_program_expects_of_it() -> None:
    service = unit("spywatcher.service")["Service"]
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert str(spywatcher.EXIT_OPERATOR) in service["RestartPreventExitStatus"].split()
    assert "ExecStartPre" not in service  # a plugin that does not load must not keep all else down


def test_the_settings_of_the_deployment_guide_are_sound() -> None:
    [text] = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    settings = spywatcher.parse_settings(tomllib.loads(text), ROOT)
    service = unit("spywatcher.service")["Service"]
    state = f"/var/lib/{service['StateDirectory']}"
    assert settings.storage.path.startswith(f"{state}/")
    credentials = "/run/credentials/spywatcher.service"
    assert settings.auth.secret_file == f"{credentials}/secret"
    assert settings.discord.token_file == f"{credentials}/token"


def test_the_socket_is_the_one_that_the_settings_name() -> None:
    server = ServerSettings()
    listen = unit("spywatcher.socket")["Socket"]["ListenStream"]
    # One loopback, that of the proxies' files: a host without IPv6 must be able to listen, too.
    assert (listen, server.host) == (f"127.0.0.1:{server.port}", "localhost")
