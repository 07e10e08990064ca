"""The whole process: listening, stopping so that dashboards come back, refusing foreign pages."""

import asyncio
import json
import signal
import socket

import aiohttp
import pytest
import socketio
from redisserver import free_port
from service import SECRET, run, running, tables_for, write_settings
from tornado.httpclient import AsyncHTTPClient, HTTPClientError
from waiting import PATIENCE, eventually, within

import spywatcher
from simulator import PretendDiscord

TOKEN = spywatcher.Tokens(spywatcher.Keys((SECRET,)), ["HS256"]).issue("1", "ADMIN", ttl=86_400)
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
GOOD, EVIL = "http://localhost:5173", "https://evil.example"


async def request(spy, path="/socket.io/?EIO=4&transport=polling", **options):
    return await AsyncHTTPClient().fetch(spy.url + path, raise_error=False, **options)


# ---- start and stop


async def test_it_says_where_it_listens_and_serves_there(tmp_path, discord, guild, js):
    write_settings(tmp_path, tables_for(discord))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        dashboard = await js.connect(service.url, token=TOKEN)
        assert (await dashboard.call("subscribe:guild", str(guild.id)))["ok"]
        await discord.message(guild, guild.owner, guild.general)
        assert (await dashboard.next("message:new"))["username"] == "owner"


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
async def test_localhost_is_both_loopbacks_and_the_default(spy, host):
    url = f"http://{host}:{spy.server.port}"
    assert await (await spy.js.connect(url, token=spy.token())).call("guilds:list")


async def test_a_port_that_is_taken_on_either_loopback_is_a_fault():
    with (
        socket.create_server(("::1", 0), family=socket.AF_INET6) as taken,
        pytest.raises(OSError, match="in use"),
    ):
        spywatcher.listen("localhost", taken.getsockname()[1])


@SIGNALS
async def test_a_signal_stops_it_and_dashboards_come_back_to_the_next(
    tmp_path, discord, js, number
):
    port = free_port()
    write_settings(tmp_path, tables_for(discord, server={"port": port}))
    async with running(tmp_path) as first:
        dashboards = [
            await js.connect(first.url, token=TOKEN, transports=[transport])
            for transport in ("websocket", "polling")
        ]
        first.process.send_signal(number)
        assert await first.exit_status() == 0
        assert "Traceback" not in "".join(first.log)
    assert await dashboards[0].disconnected() == "transport close"
    end = await dashboards[1].disconnection()
    assert (end.reason in ("transport close", "transport error"), end.active) == (True, True)
    async with running(tmp_path):
        for dashboard in dashboards:
            await dashboard.reconnected()
            assert (await dashboard.call("guilds:list"))["ok"]


async def test_python_socketios_polling_client_comes_back_after_a_stop(tmp_path, discord):
    """It takes Engine.IO's CLOSE packet as final."""
    port = free_port()
    heartbeat = {"interval": 1.0, "timeout": 5.0}  # the client waits out its last poll
    write_settings(tmp_path, tables_for(discord, server={"port": port}, heartbeat=heartbeat))
    connects = []
    async with aiohttp.ClientSession() as http:  # its own sessions it does not close
        client = socketio.AsyncClient(http_session=http, reconnection_delay=0.1)
        client.on("connect", lambda: connects.append(client.sid))
        async with running(tmp_path) as first:
            options = {"transports": ["polling"], "wait_timeout": PATIENCE}
            await client.connect(first.url, auth={"token": TOKEN}, **options)
            first.process.send_signal(signal.SIGTERM)
            assert await first.exit_status() == 0
        async with running(tmp_path):
            await eventually(lambda: len(connects) == 2)
            assert (await client.call("guilds:list"))["ok"]
            await client.shutdown()


async def test_nobody_is_let_in_during_a_stop_on_a_connection_that_is_open(spy):
    reader, writer = await asyncio.open_connection("127.0.0.1", spy.server.port)
    writer.write(b"GET /socket.io/?EIO=4&transport=polling&sid=x HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"}")
    spy.server.door.closed = True  # the first thing that a stop does
    writer.write(b"GET /socket.io/?EIO=4&transport=polling HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 503 " in await reader.readline()
    assert not spy.server.socketio.eio.sockets
    writer.close()
    await writer.wait_closed()


@pytest.mark.logs("not closed within", required=False)  # on a busy machine
async def test_a_client_that_does_not_read_cannot_hold_up_a_stop(watching):
    async with watching(server={"shutdown_grace": 0.5}) as spy:
        raw = await spy.raw(spy.token(role="ADMIN"))
        raw.stop_reading()
        await spy.connect(transports=["polling"])
        async with within(2):
            await spy.server.stop()


async def test_a_port_that_is_taken_is_one_line_and_status_2(tmp_path, discord):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        write_settings(tmp_path, tables_for(discord, server={"port": port}))
        status, _, log = await run(tmp_path, "serve")
    line = f"spywatcher: server.port: cannot listen on localhost:{port}: Address already in use"
    assert (status, log) == (2, [f"{line} (config.toml)"])


async def test_stopping_leaves_no_task_behind(watching):
    before = asyncio.all_tasks()
    async with watching() as spy:
        await spy.dashboard()
    await eventually(lambda: asyncio.all_tasks() <= before)


async def test_two_servers_share_nothing(watching):
    async with watching() as first, watching(storage={"path": "second.db"}) as second:
        await first.dashboard()
        assert first.server.rooms._rooms
        assert not second.server.rooms._rooms


# ---- pages of other origins


async def test_a_listed_page_may_poll(spy):
    answer = await request(spy, headers={"Origin": GOOD})
    assert answer.code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == GOOD
    assert answer.headers["Access-Control-Allow-Credentials"] == "true"
    assert answer.headers["Vary"] == "Origin"


async def test_a_listed_page_may_ask_first(spy):
    answer = await request(spy, method="OPTIONS", headers={"Origin": GOOD})
    assert answer.code == 204
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert answer.headers["Access-Control-Allow-Headers"] == "Content-Type"


async def test_a_listed_page_may_send_the_headers_that_it_asks_for(spy):
    headers = {"Origin": GOOD, "Access-Control-Request-Headers": "authorization,x-trace"}
    answer = await request(spy, method="OPTIONS", headers=headers)
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization,x-trace"
    answer = await request(spy, method="OPTIONS", headers=headers | {"Origin": EVIL})
    assert "Access-Control-Allow-Headers" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_a_foreign_page_may_not(spy, method):
    body = "40{}" if method == "POST" else None
    answer = await request(spy, method=method, body=body, headers={"Origin": EVIL})
    assert answer.code == 403
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert not spy.server.socketio.eio.sockets


async def test_a_foreign_page_is_refused_before_the_websocket_opens(spy):
    """Stock python-engineio answers 101, then stays silent."""
    with pytest.raises(HTTPClientError) as refused:
        await spy.raw(headers={"Origin": EVIL})
    assert refused.value.code == 403
    assert (await spy.raw(headers={"Origin": GOOD})).hello


async def test_the_javascript_client_of_a_foreign_page_is_refused(spy):
    headers = {"Origin": EVIL}
    for transport in ("websocket", "polling"):
        refused = await spy.js.refused(
            spy.url, token=spy.token(), transports=[transport], extraHeaders=headers
        )
        assert refused.message == f"{transport.replace('polling', 'xhr poll')} error"


async def test_the_own_host_and_clients_that_are_no_browsers_may(spy):
    for origin in (f"http://{spy.address}", None):
        headers = {"Origin": origin} if origin else {}
        assert (await request(spy, headers=headers)).code == 200


@pytest.mark.parametrize(
    ("listed", "origin", "allowed"),
    [
        (["*"], EVIL, True),
        ([], GOOD, False),
        (["https://a.example"], "https://a.example", True),
        (["https://a.example"], "http://a.example", False),
        (["https://a.example"], "https://a.example.evil.example", False),
        (["https://*.a.example"], "https://b.a.example", True),
        (["https://*.a.example"], "https://a.example", False),
        (["https://*.a.example"], "https://evila.example", False),
        (["https://a.example"], "null", False),
        (["null"], "null", True),
    ],
)
def test_origins_are_a_setting(listed, origin, allowed):
    assert spywatcher.Origins(listed).allow(origin, "127.0.0.1:3001") == allowed


# ---- what the web sees


@pytest.mark.parametrize("path", ["/index.html", "/socket.io", "/socket.io/x", "/../etc"])
async def test_what_is_not_served_is_404_without_a_banner(spy, path):
    answer = await request(spy, path)
    assert (answer.code, json.loads(answer.body)) == (404, {"message": "Not found"})
    assert "Server" not in answer.headers


async def test_no_answer_names_the_server_software(spy):
    for path in ("/", "/socket.io/?EIO=4&transport=polling", "/socket.io/?EIO=3"):
        assert "Server" not in (await request(spy, path)).headers


async def test_a_post_beyond_the_limit_is_refused_before_it_is_read(spy):
    opened = await request(spy)
    path = "/socket.io/?EIO=4&transport=polling&sid=" + json.loads(opened.body[1:])["sid"]
    for size, code in ((16_000, 200), (20_000, 400)):
        answer = await request(spy, path, method="POST", body="4" + "x" * (size - 1))
        assert answer.code == code
        if code == 200:  # it was heard: no packet of Socket.IO ends the session
            assert not spy.server.socketio.eio.sockets
            opened = await request(spy)
            path = path.partition("&sid=")[0] + "&sid=" + json.loads(opened.body[1:])["sid"]
    assert len(spy.server.socketio.eio.sockets) == 1


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/nowhere"])
async def test_head_is_answered_as_get_without_a_body(spy, path):
    get, head = await request(spy, path), await request(spy, path, method="HEAD")
    assert (head.code, head.body) == (get.code, b"")
    assert head.headers["Content-Type"] == get.headers["Content-Type"]


METHODS = {
    "/health/live": "GET, HEAD",
    "/metrics": "GET, HEAD",
    "/socket.io/?EIO=4&transport=polling": "GET, POST, OPTIONS",
}


@pytest.mark.parametrize(("path", "allowed"), METHODS.items())
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE"])
async def test_other_methods_are_named_in_the_answer(spy, path, allowed, method):
    """RFC 9110 §15.5.6."""
    options = {"body": "x"} if method in ("PUT", "PATCH") else {}
    answer = await request(spy, path, method=method, allow_nonstandard_methods=True, **options)
    assert (answer.code, answer.headers["Allow"]) == (405, allowed)
    assert "Server" not in answer.headers
    assert json.loads(answer.body) == {"message": "Method Not Allowed"}


async def test_a_head_opens_no_session(spy):
    answer = await request(spy, method="HEAD")
    assert (answer.code, answer.headers["Allow"]) == (405, "GET, POST, OPTIONS")
    assert not spy.server.socketio.eio.sockets


async def test_servers_on_all_addresses_say_so(tmp_path):
    async with PretendDiscord() as discord:
        write_settings(tmp_path, tables_for(discord, server={"port": 0, "host": "0.0.0.0"}))
        async with running(tmp_path) as service:
            assert service.url.startswith("http://0.0.0.0:")
