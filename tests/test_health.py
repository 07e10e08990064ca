"""What /health answers, with each part that can fail made to fail."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from service import fetch, server_for
from waiting import eventually

from simulator import PretendDiscord
from spywatcher import Pulse, Server


@pytest.fixture
async def discord() -> AsyncIterator[PretendDiscord]:
    async with PretendDiscord() as discord:
        discord.add_guild()
        yield discord


async def readiness(server: Server, **options: Any) -> tuple[int, dict[str, Any]]:
    response = await fetch(server.port, "/health/ready", **options)
    return response.code, json.loads(response.body)


async def not_ready(server: Server, part: str) -> str:
    """Wait until this part, and no other, keeps the server from being ready; return why."""

    async def only_this() -> str:
        status, answer = await readiness(server)
        assert status == 503
        assert [name for name, entry in answer["parts"].items() if not entry["ok"]] == [part]
        return str(answer["parts"][part]["problem"])

    return await eventually(only_this)


async def ready(server: Server) -> dict[str, Any]:
    async def is_ready() -> dict[str, Any]:
        status, answer = await readiness(server)
        assert status == 200, answer
        return answer["parts"]

    return await eventually(is_ready)


async def test_a_server_that_does_its_work_is_ready_and_says_how_each_part_stands(
    discord: PretendDiscord,
) -> None:
    async with server_for(discord) as server:
        parts = await ready(server)
        await eventually(lambda: server.gateway.latency >= 0)
        parts = await ready(server)
    assert parts["gateway"]["connected"]
    assert 0 <= parts["gateway"]["latency"] < 5
    assert 0 <= parts["gateway"]["heartbeatAge"] < 5
    assert parts["gateway"]["guilds"] == 1
    assert {"members", "messages", "presence"} <= set(parts["plugins"]["loaded"])
    assert parts["loop"]["lag"] < Pulse.TOO_LATE


@pytest.mark.logs("not connected to Discord")
async def test_a_process_that_answers_is_live_whether_ready_or_not(discord: PretendDiscord) -> None:
    async with server_for(discord, discord={"rest_url": "http://127.0.0.1:9/"}) as server:
        response = await fetch(server.port, "/health/live")
        assert (response.code, json.loads(response.body)) == (200, {"status": "live"})
        await eventually(lambda: "cannot be reached" in server.gateway.health()["problem"])
        assert "not connected to Discord" in await not_ready(server, "gateway")


@pytest.mark.logs("not connected to Discord")
async def test_losing_discord_shows_and_its_return_too(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        await ready(server)
        discord.freeze()
        await discord.drop()
        assert "the connection was lost" in await not_ready(server, "gateway")
        discord.thaw()
        await ready(server)


async def test_a_gateway_that_no_longer_answers_heartbeats_shows(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        await ready(server)
        discord.freeze()
        server.gateway.silence_limit = 0.05
        assert "Discord has not answered for" in await not_ready(server, "gateway")


@pytest.mark.logs("plugin broken: not loaded")
async def test_a_plugin_that_fails_to_load_shows_by_name(
    discord: PretendDiscord, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    async with server_for(discord, plugins={"folders": ["plugins", str(tmp_path)]}) as server:
        assert await not_ready(server, "plugins") == "broken: failed to start, see the log"


@pytest.mark.logs(r"WARNING spywatcher.plugin.sick: the disk is full")
async def test_what_a_plugin_says_of_itself_shows_until_it_takes_it_back(
    discord: PretendDiscord, tmp_path: Path
) -> None:
    (tmp_path / "sick.py").write_text(
        "import hikari\n"
        "from spywatcher import on\n"
        "@on(hikari.GuildTypingEvent)\n"
        "def typing(event, spy):\n"
        "    spy.problem = None if spy.problem else 'the disk is full'\n"
    )
    async with server_for(discord, plugins={"folders": [str(tmp_path)]}) as server:
        await ready(server)
        [guild] = discord.guilds.values()
        await discord.typing(guild, guild.owner, guild.general)
        assert await not_ready(server, "plugins") == "sick: the disk is full"
        await discord.typing(guild, guild.owner, guild.general)
        await ready(server)


async def test_a_loop_that_was_held_up_shows(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        await ready(server)
        time.sleep(Pulse.TOO_LATE + 0.3)  # what a blocking plugin does  # noqa: ASYNC251
        assert "the event loop is " in await not_ready(server, "loop")


async def test_a_stopping_server_says_so_on_connections_that_are_open_already(
    discord: PretendDiscord, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import asyncio\nasync def teardown(spy):\n    await asyncio.sleep(0.5)\n"
    )
    async with server_for(discord, plugins={"folders": [str(tmp_path)]}) as server:
        await ready(server)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        request = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writer.write(request)
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        writer.write(request)
        rest = await reader.read()
        assert b"HTTP/1.1 503" in rest
        assert b"draining: the server is stopping" in rest
        await stopping
        writer.close()


async def test_strangers_learn_which_part_fails_and_not_why(discord: PretendDiscord) -> None:
    async with server_for(discord) as server:
        await ready(server)
        discord.freeze()
        server.gateway.silence_limit = 0.0
        await not_ready(server, "gateway")
        status, answer = await readiness(server, headers={"X-Forwarded-For": "203.0.113.9"})
    assert status == 503
    assert answer["parts"]["gateway"] == {"ok": False}
