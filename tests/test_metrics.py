"""What is counted, how it is named, and who may read it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tornado.websocket
from jsclient import JavaScript
from prometheus_client.parser import text_string_to_metric_families
from service import ROOT, fetch, server_for, viewer_token
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from waiting import eventually

from simulator import Guild, PretendDiscord
from spywatcher import OperatorNetworks, Server


@pytest.fixture
async def server(discord: PretendDiscord, guild: Guild) -> AsyncIterator[Server]:
    async with server_for(discord) as server:
        await discord.wait_for_bot()
        yield server


def figure(server: Server, name: str, **labels: str) -> float:
    """One figure as a scrape would find it; 0 where nothing was counted yet."""
    return server.metrics.registry.get_sample_value(f"spywatcher_{name}", labels) or 0.0


async def reaches(server: Server, value: float, name: str, **labels: str) -> None:
    await eventually(lambda: figure(server, name, **labels) == value)


async def dashboard(server: Server, js: JavaScript, guild: Guild) -> None:
    client = await js.connect(f"http://127.0.0.1:{server.port}", token=viewer_token())
    assert (await client.call("subscribe:guild", str(guild.id)))["ok"]


# ---- what is counted


async def test_an_event_is_counted_on_its_way_in_and_out_and_per_client(
    server: Server, discord: PretendDiscord, guild: Guild, js: JavaScript
) -> None:
    await dashboard(server, js, guild)
    await dashboard(server, js, guild)
    await discord.message(guild, guild.owner, guild.general)
    await reaches(server, 2, "deliveries_total")
    assert figure(server, "received_events_total", event="GuildMessageCreateEvent") == 1
    assert figure(server, "sent_events_total", event="message:new") == 1


async def test_an_event_that_two_functions_hear_came_in_once(
    server: Server, discord: PretendDiscord, guild: Guild
) -> None:
    await discord.presence(guild, guild.owner, "dnd", ["desktop"])
    await reaches(server, 1, "received_events_total", event="PresenceUpdateEvent")


async def test_events_that_nobody_gets_are_counted_with_the_reason(
    server: Server, discord: PretendDiscord, guild: Guild
) -> None:
    await discord.message(guild, guild.owner, guild.general)
    await reaches(server, 1, "dropped_events_total", reason="nobody listens")


async def test_refused_connections_are_counted_by_reason(server: Server, js: JavaScript) -> None:
    url = f"http://127.0.0.1:{server.port}"
    await js.refused(url, token=viewer_token("BANNED"))
    await js.refused(url, token="nonsense")
    assert figure(server, "refused_connections_total", reason="Access denied") == 1
    assert figure(server, "refused_connections_total", reason="malformed") == 1


async def test_refused_requests_are_counted_by_code(server: Server, js: JavaScript) -> None:
    client = await js.connect(f"http://127.0.0.1:{server.port}", token=viewer_token())
    await client.call("subscribe:guild", "404")
    await client.call("nonsense:guild", "404")
    assert figure(server, "refused_requests_total", reason="forbidden") == 1
    assert figure(server, "refused_requests_total", reason="unknown_event") == 1


async def test_connections_that_are_cut_are_counted_by_reason(server: Server) -> None:
    url = f"ws://127.0.0.1:{server.port}/socket.io/?EIO=4&transport=websocket"
    socket = await tornado.websocket.websocket_connect(url)
    await socket.read_message()
    await socket.write_message("not Engine.IO")
    assert await socket.read_message() is None
    socket.close()
    assert figure(server, "cut_connections_total", reason="malformed packet") == 1


async def test_connections_dashboards_and_rooms_are_those_of_now(
    server: Server, guild: Guild, js: JavaScript
) -> None:
    await dashboard(server, js, guild)
    now = [figure(server, name) for name in ("connections", "dashboards", "rooms", "guilds")]
    assert now == [1, 1, 1, 1]


@pytest.mark.logs("plugin faulty: typing failed on GuildTypingEvent")
async def test_a_plugins_faults_and_time_are_its_own(
    discord: PretendDiscord, guild: Guild, tmp_path: Path
) -> None:
    (tmp_path / "faulty.py").write_text(
        "import hikari, time\n"
        "from spywatcher import on\n"
        "@on(hikari.GuildTypingEvent)\n"
        "def typing(event):\n"
        "    time.sleep(0.05)\n"
        "    raise ValueError\n"
    )
    async with server_for(discord, plugins={"folders": [str(tmp_path)]}) as server:
        await discord.wait_for_bot()
        await discord.typing(guild, guild.owner, guild.general)
        await reaches(server, 1, "plugin_failures_total", plugin="faulty")
        await eventually(lambda: figure(server, "plugin_seconds_total", plugin="faulty") > 0.04)


@pytest.mark.logs("not connected to Discord")
async def test_each_turn_of_the_link_to_discord_is_counted(
    server: Server, discord: PretendDiscord
) -> None:
    await reaches(server, 1, "gateway_changes_total", change="new session")
    await reaches(server, 1, "gateway_connected")
    await discord.drop()
    await reaches(server, 1, "gateway_changes_total", change="resumed")
    assert figure(server, "gateway_changes_total", change="lost") == 1


async def test_a_plugin_may_count_what_it_likes(discord: PretendDiscord, tmp_path: Path) -> None:
    (tmp_path / "owl.py").write_text(
        "async def setup(spy):\n    spy.count('hoots')\n    spy.count('hoots', 2)\n"
    )
    async with server_for(discord, plugins={"folders": [str(tmp_path)]}) as server:
        counted = {"plugin": "owl", "what": "hoots"}
        await eventually(lambda: figure(server, "plugin_counts_total", **counted) == 3)


# ---- how it is named


async def scrape(server: Server) -> str:
    return (await fetch(server.port, "/metrics")).body.decode()


async def test_names_follow_the_conventions_of_prometheus(server: Server) -> None:
    for family in text_string_to_metric_families(await scrape(server)):
        if family.name.startswith("spywatcher_") and not family.name.endswith("_created"):
            assert re.fullmatch(r"[a-z][a-z_]*[a-z]", family.name)
            assert family.documentation.endswith(".")
            assert family.type in ("counter", "gauge")
            assert not re.search(r"_(ms|milliseconds|minutes|counter|gauge)(_|$)", family.name)
            assert all(
                sample.name.endswith(("_total", "_created"))
                for sample in family.samples
                if family.type == "counter"
            )


async def test_the_process_is_measured_too(server: Server) -> None:
    text = await scrape(server)
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes"} <= set(text.split())


@pytest.mark.parametrize("file", ["docs/grafana.json", "docs/alerts.yml"])
async def test_alerts_and_the_grafana_board_ask_for_figures_that_exist(
    server: Server, file: str
) -> None:
    known = set(re.findall(r"^# TYPE (\S+)", await scrape(server), re.MULTILINE))
    asked = set(re.findall(r"\b(?:spywatcher|process)_[a-z_]+[a-z]", (ROOT / file).read_text()))
    assert asked
    assert not asked - known


def test_the_grafana_board_is_json_with_a_panel_for_each_question() -> None:
    board = json.loads((ROOT / "docs/grafana.json").read_text())
    assert all(panel["title"] and panel["targets"] for panel in board["panels"])


# ---- who may read it


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"CF-Connecting-IP": "203.0.113.9"},
        {"True-Client-IP": "203.0.113.9"},
        {"Fastly-Client-IP": "203.0.113.9"},
        {"X-Forwarded-Proto": "https"},
        {"X-Request-Id": "1"},
        {"CDN-Loop": "cdn"},
        {"Host": "spy.example.com"},
    ],
)
async def test_what_a_local_proxy_passes_on_is_not_local(
    server: Server, headers: dict[str, str]
) -> None:
    response = await fetch(server.port, "/metrics", headers=headers)
    assert response.code == 403
    assert b"spywatcher_" not in response.body


@pytest.mark.parametrize(
    "request_line", ["GET /metrics HTTP/1.0", "GET /metrics HTTP/1.0\r\nHost: x"]
)
async def test_what_speaks_as_old_proxies_do_is_not_local(
    server: Server, request_line: str
) -> None:
    """nginx passes requests on by HTTP/1.0 unless it is told otherwise; without Host it needs none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"{request_line}\r\n\r\n".encode())
    assert b" 403 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("headers", [{}, {"X-Prometheus-Scrape-Timeout-Seconds": "10"}])
async def test_this_host_may_read_them(server: Server, headers: dict[str, str]) -> None:
    assert (await fetch(server.port, "/metrics", headers=headers)).code == 200


def asks(address: str, **headers: str) -> HTTPServerRequest:
    connection = SimpleNamespace(context=SimpleNamespace(remote_ip=address, protocol="http"))
    return HTTPServerRequest(
        start_line=RequestStartLine("GET", "/metrics", "HTTP/1.1"),
        headers=HTTPHeaders({"Host": "localhost", **headers}),
        connection=connection,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("address", "headers", "inside"),
    [
        ("10.1.2.3", {}, True),
        ("::ffff:10.1.2.3", {}, True),
        ("10.1.2.3", {"X-Forwarded-For": "203.0.113.9"}, True),
        ("203.0.113.9", {}, False),
        ("203.0.113.9", {"X-Forwarded-For": "10.1.2.3"}, False),
        ("203.0.113.9", {"Host": "localhost"}, False),
        ("2001:db8::1", {}, False),
        ("::1", {"Host": "[::1]:3001"}, True),
    ],
)
def test_listed_networks_count_by_the_sockets_own_address(
    address: str, headers: dict[str, str], inside: bool
) -> None:
    assert OperatorNetworks(["10.0.0.0/8"]).include(asks(address, **headers)) is inside


async def test_a_scrape_costs_the_loop_little(server: Server) -> None:
    started = time.thread_time()  # not what others take of the machine meanwhile
    for _ in range(20):
        server.metrics.text()
    assert (time.thread_time() - started) / 20 < 0.02
