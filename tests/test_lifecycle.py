"""Stop, reload and log, as operators see them: a process, its signals, its exit status, its output."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sqlite3
import time
from bisect import bisect
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import hikari
import pytest
import tornado.websocket
from hikari.impl.shard import _GatewayTransport
from jsclient import JavaScript
from service import (
    SECRET,
    Service,
    fetch,
    running,
    server_for,
    tables_for,
    viewer_token,
    write_settings,
)
from waiting import clock, eventually, passed, within

from simulator import Guild, PretendDiscord
from spywatcher import GOING_AWAY, Bot, Gateway, Keys, PluginHost, Server, Tokens

GRACE = 5.0


async def sockets_to(port: int, count: int) -> list[tornado.websocket.WebSocketClientConnection]:
    """So many authenticated Socket.IO clients, each past its CONNECT."""
    url = f"ws://127.0.0.1:{port}/socket.io/?EIO=4&transport=websocket"
    hello = "40" + json.dumps({"token": viewer_token()})

    async def connect() -> tornado.websocket.WebSocketClientConnection:
        socket = await tornado.websocket.websocket_connect(url)
        await socket.read_message()
        await socket.write_message(hello)
        answer = await socket.read_message()
        assert isinstance(answer, str)
        assert answer.startswith('40{"sid"'), answer
        return socket

    sockets = []
    for _ in range(0, count, 50):
        sockets += await asyncio.gather(*(connect() for _ in range(min(50, count))))
    return sockets


async def ends(sockets: list[tornado.websocket.WebSocketClientConnection]) -> list[float]:
    """Wait until each was told that it is over; return when."""

    async def end(socket: tornado.websocket.WebSocketClientConnection) -> float:
        while await socket.read_message() is not None:
            pass
        ended = time.monotonic()
        assert socket.close_code == GOING_AWAY
        socket.close()
        return ended

    async with within(GRACE * 3):
        return list(await asyncio.gather(*map(end, sockets)))


def busiest(moments: list[float], seconds: float = 0.1) -> int:
    """The most of these moments, the first first, that lie within so many seconds."""
    return max(bisect(moments, moment + seconds) - n for n, moment in enumerate(moments))


# ---- stop


async def test_a_stop_tells_the_dashboards_and_they_come_back_by_themselves(
    discord: PretendDiscord, guild: Guild, js: JavaScript, tmp_path: Path
) -> None:
    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path) as service:
        client = await js.connect(service.url, token=viewer_token())
        service.process.send_signal(signal.SIGTERM)
        ending = await client.disconnection()
        assert (ending.reason, ending.active) == ("transport close", True)
        assert await service.exit_status() == 0


@pytest.mark.logs("connections not closed within", required=False)  # on a busy machine
async def test_clients_are_told_of_a_stop_one_after_the_other_and_not_all_at_once(
    discord: PretendDiscord, guild: Guild
) -> None:
    tables = {"server": {"shutdown_grace": 2.0}, "limits": {"connections_per_viewer": 1000}}
    async with server_for(discord, **tables) as server:
        await discord.wait_for_bot()
        sockets = await sockets_to(server.port, 200)
        told = asyncio.create_task(ends(sockets))
        await server.stop()
        moments = sorted(await told)
    assert moments[-1] - moments[0] > 0.8  # half of the grace; a busy machine takes longer
    assert busiest(moments) <= 30


async def test_a_thousand_clients_are_told_within_the_grace_and_the_process_is_gone(
    discord: PretendDiscord, guild: Guild, tmp_path: Path
) -> None:
    tables = tables_for(
        discord,
        server={"shutdown_grace": GRACE},
        limits={"connections_per_viewer": 2000},
    )
    write_settings(tmp_path, tables)
    async with running(tmp_path) as service:
        sockets = await sockets_to(service.port, 1000)
        told = asyncio.create_task(ends(sockets))
        await discord.wait_for_bot()
        for _ in range(50):
            await discord.message(guild, guild.owner, guild.general)
        await discord.caught_up()
        async with within(GRACE + 1):
            service.process.send_signal(signal.SIGTERM)
            assert await service.exit_status() == 0
        assert len(await told) == 1000
    assert messages_kept(tmp_path / "spywatcher.db") == 50


async def test_what_plugins_hold_is_kept_by_a_stop(
    discord: PretendDiscord, guild: Guild, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "counts.py").write_text(
        "import asyncio, hikari, pathlib\n"
        "from spywatcher import on\n"
        "count = 0\n"
        "@on(hikari.GuildTypingEvent)\n"
        "def typing(event):\n"
        "    global count\n"
        "    count += 1\n"
        "async def teardown(spy):\n"
        "    await asyncio.sleep(0.2)\n"
        "    pathlib.Path('counts').write_text(str(count))\n"
    )
    write_settings(tmp_path, tables_for(discord, plugins={"folders": ["plugins", "mine"]}))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        for _ in range(20):
            await discord.typing(guild, guild.owner, guild.general)
        await discord.caught_up()
        service.process.send_signal(signal.SIGTERM)
        assert await service.exit_status() == 0
    assert (tmp_path / "counts").read_text() == "20"


@pytest.mark.logs("plugins and gateway not closed within 0.5 s")
async def test_a_plugin_that_never_finishes_does_not_hold_up_the_stop(
    discord: PretendDiscord, guild: Guild, tmp_path: Path
) -> None:
    (tmp_path / "stuck.py").write_text(
        "import asyncio\nasync def teardown(spy):\n    await asyncio.Event().wait()\n"
    )
    tables = {"plugins": {"folders": [str(tmp_path)]}, "server": {"shutdown_grace": 0.5}}
    async with server_for(discord, **tables):
        await discord.wait_for_bot()
        started = clock()
    assert clock() - started < 2


async def test_a_plugin_that_heeds_no_cancellation_does_not_keep_the_process(
    discord: PretendDiscord, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stubborn.py").write_text(
        "import asyncio\n"
        "from spywatcher import every\n"
        "@every(0.01)\n"
        "async def stubborn(spy):\n"
        "    spy.log.info('begun')\n"
        "    while True:\n"
        "        try:\n"
        "            await asyncio.Event().wait()\n"
        "        except:\n"
        "            pass\n"
        "def teardown(spy):\n"
        "    spy.log.info('torn down')\n"
    )
    write_settings(tmp_path, tables_for(discord, plugins={"folders": ["mine"]}))
    async with running(tmp_path) as service:
        await service.wrote("begun")
        service.process.send_signal(signal.SIGTERM)
        await service.wrote("stubborn: stubborn failed: goes on though it was cancelled")
        await service.wrote("torn down")
        assert await service.exit_status() == 0


async def swallow_one_cancellation(*_: object) -> None:
    """Go on for ever, as a library does that meets an answer when it is cancelled."""
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("owner", "step"),
    [(Bot, "join"), (PluginHost, "start"), (hikari.impl.GatewayShardImpl, "_poll_events")],
    ids=["the session", "the plugins' start", "the connection"],
)
async def test_a_cancellation_that_a_library_swallows_holds_up_no_stop(
    discord: PretendDiscord, monkeypatch: pytest.MonkeyPatch, owner: type, step: str
) -> None:
    monkeypatch.setattr(owner, step, swallow_one_cancellation)
    async with server_for(discord) as server:
        await asyncio.wait([server._gateway_task], timeout=0.3)  # by then it is at that step
        started = clock()
    assert clock() - started < 2


async def test_a_stop_as_a_lost_connection_is_closed_ends_the_shard(
    discord: PretendDiscord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hikari closes sockets with what may swallow that the shard is to end, and would connect anew."""
    close, closing = _GatewayTransport.send_close, asyncio.Event()

    async def swallow(transport: _GatewayTransport, **how: Any) -> None:
        closing.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await close(transport, **how)

    async with server_for(discord):
        await discord.wait_for_bot()
        monkeypatch.setattr(_GatewayTransport, "send_close", swallow)
        await discord.drop()
        await closing.wait()
        monkeypatch.undo()
        started = clock()
    assert clock() - started < 2


async def test_a_stop_before_discord_answered_is_a_clean_one(tmp_path: Path) -> None:
    async with PretendDiscord() as discord:
        discord.freeze()
        write_settings(tmp_path, tables_for(discord))
        async with running(tmp_path) as service:
            service.process.send_signal(signal.SIGINT)
            assert await service.exit_status() == 0


# ---- the worst end


KILLS = 20
#: Seconds of counts that a kill may cost (README, docs/deploy.md).
MOST_LOST = 1.0


async def test_killed_again_and_again_under_load_it_starts_again_and_keeps_its_counts(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]  # side by side, for the sake of time
    await asyncio.gather(*(kill_repeatedly(folder, KILLS // 2) for folder in folders))


async def kill_repeatedly(folder: Path, times: int) -> None:
    async with PretendDiscord() as discord:
        guild = discord.add_guild()
        write_settings(folder, tables_for(discord, storage={"path": "kept.db"}))
        kept = 0
        for _ in range(times):
            async with running(folder) as service:
                await discord.wait_for_bot()
                sent = await write_messages(discord, guild, rate=200, seconds=1.3)
                killed = clock()
                service.process.kill()
            before, kept = kept, messages_kept(folder / "kept.db")
            due = sum(moment < killed - MOST_LOST for moment in sent)
            assert due > 20
            assert due <= kept - before <= len(sent)


async def write_messages(
    discord: PretendDiscord, guild: Guild, rate: float, seconds: float
) -> list[float]:
    """Messages at a steady rate; returns when each was sent."""
    started = clock()
    sent: list[float] = []
    while len(sent) < rate * seconds:
        await discord.message(guild, guild.owner, guild.general)
        sent.append(clock())
        await passed(started + len(sent) / rate - clock())
    return sent


def messages_kept(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        [[count]] = database.execute("SELECT total(messages) FROM counts")
        return int(count)


# ---- reload


async def hang_up(service: Service, pattern: str) -> None:
    service.process.send_signal(signal.SIGHUP)
    await service.wrote(pattern)


async def test_a_reload_changes_origins_keys_and_log_and_disconnects_nobody(
    discord: PretendDiscord, guild: Guild, js: JavaScript, tmp_path: Path
) -> None:
    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        client = await js.connect(service.url, token=viewer_token())
        new_secret = "another secret, just as long as the first"
        changed = {"auth": {"secret": new_secret}, "log": {"level": "debug", "format": "json"}}
        changed["server"] = {"cors_origins": ["https://new.example"]}
        write_settings(tmp_path, tables_for(discord, **changed))
        await hang_up(service, r'"message": "settings reloaded"')
        error = await js.refused(service.url, token=viewer_token())
        assert error.data == {"code": "signature"}
        token = Tokens(Keys((new_secret,)), ["HS256"]).issue("2", "ADMIN")
        await js.connect(service.url, token=token)
        path = "/socket.io/?EIO=4&transport=polling"
        answer = await service.get(path, headers={"Origin": "https://new.example"})
        assert answer.code == 200
        assert (await client.call("subscribe:guild", str(guild.id)))["ok"]
        assert not client.events("disconnect")


FAULTS = {
    "[server\n": "not TOML",
    "[server]\nport = 'high'\n": "server.port",
    f"[auth]\nsecret = '{SECRET}'\n[plugin.presence]\nalert_cooldown = 'long'\n": "plugin.presence.alert",
    "[auth]\nsecret = 'short'\n": "auth.secret: got 5 bytes",
    "[auth]\nsecret = ''\n": "auth.secret: not set",
}


async def test_a_bad_file_changes_nothing(
    discord: PretendDiscord, js: JavaScript, tmp_path: Path
) -> None:
    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path) as service:
        for text, fault in FAULTS.items():
            (tmp_path / "config.toml").write_text("[log]\nformat = 'json'\n" + text)
            await hang_up(service, rf"ERROR.*nothing has changed: .*{re.escape(fault)}")
        await js.connect(service.url, token=viewer_token())
        assert '"message"' not in service.output


async def test_a_reload_names_each_change_that_needs_a_restart_until_there_was_one(
    discord: PretendDiscord, tmp_path: Path
) -> None:
    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path) as service:
        write_settings(tmp_path, tables_for(discord, heartbeat={"timeout": 9.0}))
        await hang_up(service, r"WARNING.*these need a restart: heartbeat\.timeout\n")
        service.output = ""
        await hang_up(service, r"WARNING.*these need a restart: heartbeat\.timeout\n")


async def test_a_plugin_reads_its_new_settings_after_a_reload(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        await eventually(lambda: "presence" in server.plugins.running)
        before = server.plugins.plugins["presence"].settings.alert_cooldown
        reload(server, discord, plugin={"presence": {"alert_cooldown": before + 1}})
        spy = server.plugins.runners["presence"].spy
        assert spy.settings.alert_cooldown == before + 1


async def test_a_plugin_that_is_not_at_work_reads_its_new_settings_once_it_is(
    discord: PretendDiscord,
) -> None:
    async with server_for(discord) as server:
        await eventually(lambda: "presence" in server.plugins.running)
        before = server.plugins.plugins["presence"].settings.alert_cooldown
        await server.plugins.stop()  # as at a node that another one has taken the gateway from
        reload(server, discord, plugin={"presence": {"alert_cooldown": before + 1}})
        assert server.plugins.plugins["presence"].settings.alert_cooldown == before + 1


async def test_a_reload_changes_throttle_windows(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        reload(server, discord, throttle={"message:new": 2.0})
        assert server.throttle.windows == {
            "analytics:update": 30.0,
            "history:update": 60.0,
            "message:new": 2.0,
        }


async def test_a_reload_that_takes_a_right_away_takes_dashboards_out_of_the_room(
    discord: PretendDiscord, guild: Guild, js: JavaScript
) -> None:
    async with server_for(discord) as server:
        await discord.wait_for_bot()
        client = await js.connect(f"http://127.0.0.1:{server.port}", token=viewer_token())
        assert (await client.call("subscribe:guild", str(guild.id)))["ok"]
        reload(server, discord, auth={"admin_roles": []})
        assert (await client.next("error"))["code"] == "forbidden"
        assert len(server.rooms) == 0


async def test_limits_follow_a_reload(discord: PretendDiscord, js: JavaScript) -> None:
    async with server_for(discord) as server:
        url = f"http://127.0.0.1:{server.port}"
        await js.connect(url, token=viewer_token())
        reload(server, discord, limits={"connections_per_viewer": 1})
        error = await js.refused(url, token=viewer_token())
        assert error.message == "Too many connections"


async def test_throttle_windows_follow_a_reload(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        reload(server, discord, throttle={"message:new": 7.0})
        assert server.throttle.windows["message:new"] == 7.0


def reload(server: Server, discord: PretendDiscord, /, **tables: dict[str, Any]) -> None:
    settings = server_for(discord, **tables)._settings
    assert server.reload(settings, Keys((SECRET,))) == []


# ---- what is logged


async def test_no_output_shows_a_token_a_secret_or_what_people_write(
    discord: PretendDiscord, guild: Guild, js: JavaScript, tmp_path: Path
) -> None:
    words = "what somebody wrote in confidence"
    write_settings(tmp_path, tables_for(discord, log={"level": "debug"}))
    good, bad = viewer_token(), viewer_token("BANNED")
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        client = await js.connect(service.url, token=good)
        await js.refused(service.url, token=bad)
        await client.emit(words, {words: words})
        await client.call("subscribe:guild", words)
        await service.get(f"/{words.replace(' ', '')}?token={good}")
        await discord.message(guild, guild.owner, guild.general, content=words)
        for packet in (f"42{words}", f'42["{words}', f"4{words}", f'40{{"token":"{good}"'):
            await say(service, packet)
        figures = (await service.get("/metrics")).body.decode()
        health = (await service.get("/health/ready")).body.decode()
        service.process.send_signal(signal.SIGTERM)
        await service.exit_status()
    everything = service.output + figures + health
    assert "viewer 1 is in" in everything
    secrets = [SECRET, discord.token, good, bad, words, words.replace(" ", "")]
    assert [secret for secret in secrets if secret in everything] == []


async def say(service: Service, packet: str) -> None:
    url = f"ws://127.0.0.1:{service.port}/socket.io/?EIO=4&transport=websocket"
    socket = await tornado.websocket.websocket_connect(url)
    await socket.read_message()
    await socket.write_message(packet)
    socket.close()
    await eventually(lambda: socket.close_code or True)


async def test_each_connection_can_be_followed_through_the_log(
    discord: PretendDiscord, js: JavaScript, tmp_path: Path
) -> None:
    write_settings(tmp_path, tables_for(discord, log={"format": "json"}))
    async with running(tmp_path) as service:
        client = await js.connect(service.url, token=viewer_token())
        await client.disconnect()
        await service.wrote("viewer is gone")
        lines = [json.loads(line) for line in service.output.splitlines() if "viewer" in line]
        assert len(lines) == 2
        assert re.fullmatch(r"[0-9a-f]{8}", lines[0]["connection"])
        assert lines[0]["connection"] == lines[1]["connection"]


async def test_a_stopped_service_refuses_new_connections(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        port = server.port
        assert (await fetch(port, "/health/live")).code == 200
    with pytest.raises(ConnectionRefusedError):
        await fetch(port, "/health/live")


@pytest.mark.logs("plugin counts: teardown")
async def test_plugins_are_torn_down_even_if_the_gateway_died_of_a_bug(
    discord: PretendDiscord, guild: Guild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(self: Gateway) -> None:
        raise ZeroDivisionError

    (tmp_path / "counts.py").write_text("async def teardown(spy):\n    raise KeyError\n")
    monkeypatch.setattr(Gateway, "run", run)
    with pytest.raises(ZeroDivisionError):
        async with server_for(discord, plugins={"folders": [str(tmp_path)]}) as server:
            await server.wait_closed()
