"""What one address, one viewer and one connection may have, and what happens beyond it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import struct
import time
from types import SimpleNamespace

import jwt
import pytest
from jsclient import ConnectError
from redisserver import Proxy
from service import SECRET
from tornado.httpclient import AsyncHTTPClient
from tornado.httputil import HTTPHeaders
from waiting import clock, eventually, within

import spywatcher
from spywatcher import Allowance, Counters, FrontDoor, Quota, ServerSettings, Strangers

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
BLOCKED = r"address \S+ blocked for 600 s"
UPGRADE = (
    "GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Version: 13\r\n"
)
OPEN = "GET /socket.io/?EIO=4&transport=polling HTTP/1.1\r\nHost: x\r\n\r\n"


DIALED: list[asyncio.StreamWriter] = []


@pytest.fixture(autouse=True)
async def _hang_up():
    """Close what a test has dialed and left open."""
    yield
    while DIALED:
        writer = DIALED.pop()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def count(spy, name, *labels):
    return getattr(spy.server.metrics, name).labels(*labels)._value.get()


async def dial(spy, text="", local="127.0.0.1"):
    """A bare TCP connection from a loopback address, and the first thing said on it."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", spy.server.port, local_addr=(local, 0)
    )
    writer.write(text.encode("latin-1"))
    DIALED.append(writer)
    return reader, writer


async def seconds_until_closed(reader):
    started = clock()
    with contextlib.suppress(ConnectionError):
        async with within(10):
            await reader.read()
    return clock() - started


async def fetch(spy, path="/socket.io/?EIO=4&transport=polling", **options):
    return await AsyncHTTPClient().fetch(spy.url + path, raise_error=False, **options)


async def open_poll(spy, **options):
    """Open a polling session by hand; return its path."""
    answer = await fetch(spy, **options)
    sid = json.loads(answer.body[1:])["sid"]
    return f"/socket.io/?EIO=4&transport=polling&sid={sid}"


# ---- addresses


ADDRESSES = {
    "no header": ("203.0.113.9", [], "203.0.113.9"),
    "a stranger's header": ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),
    "a proxy's header": ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
    "what came before the proxy is the client's": ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
    "two proxies": ("10.0.0.1", ["6.6.6.6, 1.2.3.4, 10.9.9.9"], "1.2.3.4"),
    "two headers": ("10.0.0.1", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
    "proxies only": ("10.0.0.1", ["10.0.0.2"], "10.0.0.2"),
    "nothing readable": ("10.0.0.1", ["1.2.3.4, unknown"], "10.0.0.1"),
    "empty": ("10.0.0.1", [""], "10.0.0.1"),
    "IPv6 by /64": ("2001:db8:0:1:2:3:4:5", [], "2001:db8:0:1::/64"),
    "IPv6 by a proxy": ("10.0.0.1", ["2001:db8:0:1::77"], "2001:db8:0:1::/64"),
    "IPv4 in IPv6": ("::ffff:203.0.113.9", [], "203.0.113.9"),
    "a proxy as IPv4 in IPv6": ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
    "a unix socket": ("0.0.0.0", [], "0.0.0.0"),
    "no address": ("", ["1.2.3.4"], "unknown"),
    "a port": ("10.0.0.1", ["1.2.3.4:4711"], "1.2.3.4"),
    "IPv6 in brackets": ("10.0.0.1", ["[2001:db8:0:1::77]"], "2001:db8:0:1::/64"),
    "IPv6 with a port": ("10.0.0.1", ["[2001:db8:0:1::77]:4711"], "2001:db8:0:1::/64"),
    "a proxy with a port": ("10.0.0.1", ["1.2.3.4:1, 10.9.9.9:2"], "1.2.3.4"),
    "a port that is none": ("10.0.0.1", ["1.2.3.4:x"], "10.0.0.1"),
}


@pytest.mark.parametrize(("peer", "forwarded", "expected"), ADDRESSES.values(), ids=ADDRESSES)
def test_whom_a_request_counts_for(peer, forwarded, expected):
    door = FrontDoor(ServerSettings(trusted_proxies=("10.0.0.0/8",)), None)
    headers = HTTPHeaders()
    for line in forwarded:
        headers.add("X-Forwarded-For", line)
    request = SimpleNamespace(headers=headers, remote_ip=peer)
    assert door.address(request) == expected


@pytest.mark.logs(BLOCKED)
async def test_a_spoofed_header_from_an_untrusted_peer_changes_nothing(watching):
    async with watching(server={"trusted_proxies": []}) as spy:
        for _ in range(5):
            await spy.js.refused(spy.url, token="x")
        codes = [
            (await fetch(spy, headers={"X-Forwarded-For": f"203.0.113.{n}"})).code
            for n in range(100)
        ]
        assert codes == [429] * 100
        assert set(spy.server.limits.open) <= {"127.0.0.1"}


@pytest.mark.logs(BLOCKED)
async def test_a_trusted_proxy_speaks_for_many(watching):
    async with watching() as spy:
        for _ in range(5):
            await spy.js.refused(
                spy.url, token="x", extraHeaders={"X-Forwarded-For": "203.0.113.1"}
            )
        for address, code in (("203.0.113.1", 429), ("203.0.113.2", 200)):
            assert (await fetch(spy, headers={"X-Forwarded-For": address})).code == code


# ---- blocks


@TRANSPORTS
@pytest.mark.logs(BLOCKED)
async def test_an_address_is_blocked_after_refusals_in_a_row(spy, transport):
    token = spy.token()
    for _ in range(5):
        refused = await spy.js.refused(spy.url, token="x", transports=[transport])
        assert refused.message == "Invalid token"
    answer = await fetch(spy)
    assert answer.code == 429
    assert 590 <= int(answer.headers["Retry-After"]) <= 600
    assert "error" in (await spy.js.refused(spy.url, token=token, transports=[transport])).message
    assert count(spy, "refused", "malformed") == 5
    assert count(spy, "refused", "blocked") >= 2
    assert spy.server.metrics.blocked._value.get() == 1


def run_out():
    """A well-signed token that was good until a minute ago."""
    claims = {"discordId": "1", "access": True, "role": "USER", "exp": int(time.time()) - 60}
    return jwt.encode(claims, SECRET, algorithm="HS256")


async def test_tokens_that_have_run_out_are_refused_and_block_nobody(spy):
    """A page that was left open over night tries again and again with what it has."""
    expired = run_out()
    for _ in range(6):
        refused = await spy.js.refused(spy.url, token=expired)
        assert (refused.message, refused.data) == ("Invalid token", {"code": "expired"})
    assert (await spy.connect()).id
    assert count(spy, "refused", "expired") == 6


@pytest.mark.logs(BLOCKED)
async def test_wrong_signatures_still_block_among_tokens_that_have_run_out(spy):
    forged, expired = spy.token()[:-4] + "AAAA", run_out()
    for _ in range(5):
        await spy.js.refused(spy.url, token=expired)
        assert (await spy.js.refused(spy.url, token=forged)).data == {"code": "signature"}
    assert (await fetch(spy)).code == 429


async def test_a_success_ends_the_row_of_refusals(spy):
    for _ in range(3):
        for _ in range(4):
            await spy.js.refused(spy.url, token="x")
        await (await spy.connect()).disconnect()


@pytest.mark.logs(BLOCKED)
async def test_a_block_does_not_touch_who_is_in_already(spy):
    """Neighbours behind one NAT keep their dashboards, on both transports."""
    dashboards = [await spy.dashboard(transports=[t]) for t in ("websocket", "polling")]
    for _ in range(5):
        await spy.js.refused(spy.url, token="x")
    await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general)
    for dashboard in dashboards:
        await dashboard.next("message:new")
        assert (await dashboard.call("guilds:list"))["ok"]


@pytest.mark.logs(BLOCKED)
async def test_connections_opened_before_a_block_cannot_try_after_it(spy):
    raws = [await spy.raw() for _ in range(8)]
    said = []
    for raw in raws:
        await raw.send('40{"token":"x"}')
        said += [packet for packet in await raw.closed() if packet.startswith("44")]
    assert ["Invalid token" in packet for packet in said] == [True] * 5 + [False] * 3
    assert '"message":"Too many connections"' in said[-1]


async def test_a_block_ends(watching):
    async with watching(limits={"block_after": 1, "block_for": 0.5}) as spy:
        logging.getLogger("spywatcher").setLevel(logging.ERROR)
        try:
            await spy.js.refused(spy.url, token="x")
        finally:
            logging.getLogger("spywatcher").setLevel(logging.NOTSET)
        assert (await fetch(spy)).code == 429

        async def is_over():
            return (await fetch(spy)).code == 200

        await eventually(is_over, timeout=3)


# ---- how many


@TRANSPORTS
async def test_an_address_has_so_many_connections(watching, transport):
    async with watching(limits={"connections_per_ip": 2}) as spy:
        first = await spy.connect()
        await spy.connect(transports=["polling"])
        refused = await spy.js.refused(spy.url, token=spy.token(), transports=[transport])
        assert (refused.message, refused.data) == ("Too many connections", {"retryAfter": 10})
        await first.disconnect()
        await eventually(lambda: spy.server.limits.open["127.0.0.1"] < 2)
        assert (await spy.connect()).id
        assert count(spy, "refused", "connections_per_ip") == 1


async def test_a_viewer_has_so_many_connections(watching):
    async with watching(limits={"connections_per_viewer": 2}) as spy:
        for _ in range(2):
            await spy.connect("1")
        refused = await spy.js.refused(spy.url, token=spy.token("1"))
        assert (refused.message, refused.data) == ("Too many connections", {"retryAfter": 10})
        assert (await spy.connect("2")).id
        assert count(spy, "refused", "connections_per_viewer") == 1


@TRANSPORTS
async def test_attempts_beyond_the_limit_are_answered_at_the_handshake(watching, transport):
    async with watching(limits={"attempts_per_ip": "3/minute"}) as spy:
        for _ in range(3):
            await (await spy.connect()).disconnect()
        headers = {"Origin": "http://localhost:5173"}
        answer = await fetch(spy, headers=headers)
        assert answer.code == 429
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
        refused = await spy.js.refused(spy.url, token=spy.token(), transports=[transport])
        assert refused.message in ("websocket error", "xhr poll error")
        assert count(spy, "refused", "attempts_per_ip") == 2
        assert not spy.server.metrics.blocked._value.get()


async def test_valid_viewers_behind_one_address_all_come_back_by_themselves(watching):
    """However often all of their connections break: attempts are put off, nobody is blocked."""
    async with watching(limits={"attempts_per_ip": "10/second"}) as spy:
        dashboards = []
        for transport in ["websocket", "polling"] * 4:
            dashboards.append(await spy.connect(transports=[transport]))
        for _ in range(3):
            for dashboard in dashboards:
                await dashboard.drop()
            for dashboard in dashboards:
                await dashboard.reconnected(timeout=20)
        assert count(spy, "refused", "attempts_per_ip") > 0
        assert not spy.server.metrics.blocked._value.get()


@pytest.mark.faults
async def test_forty_dashboards_behind_one_address_are_back_within_90_seconds(watching):
    """By the limits and the client as they come, each connection cut twice within a minute."""
    stock = {"reconnectionDelay": 1000, "reconnectionDelayMax": 5000}
    async with watching() as spy, Proxy(spy.server.port) as office:
        url = f"http://127.0.0.1:{office.port}"
        dashboards = []
        for number in range(40):
            token = spy.token(str(number), guilds=[str(spy.guild.id)])
            transports = [["websocket", "polling"], ["polling", "websocket"]][number % 2]
            one = await spy.js.connect(url, token=token, transports=transports, **stock)
            assert (await one.call("subscribe:guild", str(spy.guild.id)))["ok"]
            dashboards.append(one)
        for wait in (25, 0):
            await office.cut()
            await eventually(lambda: not len(spy.server.dashboards))
            await office.mend()
            cut = time.monotonic()
            await asyncio.sleep(wait)
        back: dict[int, float] = {}
        while time.monotonic() - cut < 90 and len(back) < len(dashboards):
            for one in dashboards:
                if (await one.state()).connected:
                    back.setdefault(one.number, time.monotonic() - cut)
            await asyncio.sleep(0.1)
        seconds = sorted(back.values())
        assert len(seconds) == len(dashboards)
        print(f"half are back in {seconds[19]:.1f} s, all in {seconds[-1]:.1f}")
        assert not spy.server.metrics.blocked._value.get()


async def test_each_connect_on_one_transport_is_an_attempt(watching):
    async with watching(limits={"attempts_per_ip": "5/minute"}) as spy:
        raw = await spy.raw(spy.token())
        for _ in range(4):
            await raw.send("41", "40" + json.dumps({"token": spy.token()}))
            assert (await raw.read()).startswith('40{"sid"')
            assert '"session"' in await raw.read()
        await raw.send("41", "40" + json.dumps({"token": spy.token()}))
        [refusal] = await raw.closed()
        assert refusal.startswith('44{"message":"Too many connections","data":{"retryAfter":')
        assert not spy.server.metrics.blocked._value.get()


async def test_a_connect_on_a_transport_that_is_in_is_refused_with_a_message(spy):
    raw = await spy.raw(spy.token())
    await raw.send("40" + json.dumps({"token": spy.token()}))
    assert await raw.read() == '44{"message":"Already connected"}'
    await raw.send('421["guilds:list"]')
    assert (await raw.read()).startswith('431[{"ok":true')


async def test_a_connect_that_a_browser_posts_again_is_not_refused(spy):
    """Its connection was reset before the answer; a refusal would end the stock client for good."""
    path = await open_poll(spy)
    token = json.dumps({"token": spy.token(role="ADMIN")})
    for _ in range(2):
        assert (await fetch(spy, path, method="POST", body=f"40{token}")).code == 200
    packets = (await fetch(spy, path)).body.decode().split("\x1e")
    assert [packet[:2] for packet in packets] == ["40", "42"]
    assert len(spy.server.dashboards) == 1


TIGHT = {"events_per_connection": "3/minute", "rooms_per_connection": 1}


async def test_a_connection_sends_so_many_events(watching):
    """As many as it may join rooms, at once, besides what the rate allows."""
    async with watching(limits=TIGHT) as spy:
        dashboard, other = await spy.connect(), await spy.connect()
        answers = [await dashboard.call("guilds:list") for _ in range(5)]
        assert [answer["ok"] for answer in answers] == [True] * 4 + [False]
        assert answers[4]["error"]["code"] == "rate_limited"
        assert (await other.call("guilds:list"))["ok"]
        assert count(spy, "refused_requests", "rate_limited") == 1


async def test_a_transport_sends_so_many_events_however_often_it_says_connect(watching):
    async with watching(limits=TIGHT) as spy:
        raw, said = await spy.raw(spy.token()), []
        for _ in range(3):
            await raw.send('421["guilds:list"]', '422["guilds:list"]', "41")
            await raw.send("40" + json.dumps({"token": spy.token()}))
            while not (packet := await raw.read()).startswith("40"):
                said.append(packet)
        assert len([packet for packet in said if '"ok":true' in packet]) == 4


async def test_all_rooms_can_be_joined_at_once_and_again_after_a_reconnect(watching, discord):
    for number in range(59):
        discord.add_guild(f"g{number}")
    async with watching() as spy:
        dashboard = await spy.connect()
        for _ in range(2):
            guilds = (await dashboard.call("guilds:list"))["guilds"]
            calls = [
                dashboard.call(f"subscribe:{kind}", guild["id"])
                for guild in guilds
                for kind in ("guild", "analytics")
            ]
            answers = await asyncio.gather(*calls)
            assert [answer["ok"] for answer in answers] == [True] * 120
            await dashboard.drop()
            await dashboard.reconnected()


async def test_the_rate_holds_in_the_long_run(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    allowance, sent = Allowance(), 0
    for tick in range(1_000):
        now = tick / 100
        sent += allowance.take(Quota(20, 1.0), burst=220)
    assert sent == pytest.approx(220 + 20 * 10, abs=2)


async def test_a_connection_is_in_so_many_rooms(watching, discord, guild):
    others = [discord.add_guild(f"g{n}") for n in range(2)]
    async with watching(limits={"rooms_per_connection": 2}) as spy:
        dashboard = await spy.dashboard()
        answers = [await dashboard.call("subscribe:guild", str(g.id)) for g in [*others, guild]]
        assert [answer["ok"] for answer in answers] == [True, False, True]
        assert answers[1]["error"]["code"] == "too_many_rooms"


# ---- size


def frame(payload, opcode=1, *, final=True, length=None):
    """A masked client frame (RFC 6455 §5.2) that announces `length` bytes."""
    size = len(payload) if length is None else length
    head = bytes(((0x80 if final else 0) | opcode,))
    if size < 126:
        head += bytes((0x80 | size,))
    elif size < 65_536:
        head += bytes((0xFE,)) + struct.pack("!H", size)
    else:
        head += bytes((0xFF,)) + struct.pack("!Q", size)
    return head + b"\0\0\0\0" + payload


LARGE = {
    "one frame": frame(b"4" * 16_385),
    "one that is only announced": frame(b"4", length=2**40),
    "many small fragments": frame(b"4" * 4_000, final=False)
    + frame(b"4" * 4_000, 0, final=False) * 8,
}


@pytest.mark.parametrize("frames", LARGE.values(), ids=LARGE)
async def test_a_large_message_ends_the_connection_unread(spy, frames):
    reader, writer = await dial(spy, UPGRADE.format(query="") + "\r\n")
    await reader.readuntil(b"\r\n\r\n")
    writer.write(frames)
    assert await seconds_until_closed(reader) < 6
    await eventually(lambda: not spy.server.socketio.eio.sockets)


@pytest.mark.parametrize("size", [16_000, 17_000, 10_000_000])
async def test_a_large_post_is_refused_by_its_length(spy, size):
    path = await open_poll(spy)
    reader, writer = await dial(
        spy, f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
    )
    if size > 16_384:
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    else:
        writer.write(b"6" * size)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_post_without_a_length_is_bounded_as_well(spy):
    path = await open_poll(spy)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    reader, writer = await dial(spy, head + ("1000\r\n" + "6" * 4096 + "\r\n") * 5)
    assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.close()


async def test_large_headers_are_bounded(spy):
    reader, writer = await dial(spy, OPEN[:-2] + "X: " + "x" * 200_000)
    assert await seconds_until_closed(reader) < 5
    writer.close()


async def test_no_stream_holds_more_than_it_can_use(spy):
    await spy.raw()
    session = next(iter(spy.server.socketio.eio.sockets.values()))
    stream = session._stream
    assert stream.max_buffer_size < 256 * 1024
    assert stream.max_write_buffer_size <= 1_048_576


# ---- the silent


async def silent(spy):
    return await dial(spy)


async def half_a_request(spy):
    return await dial(spy, OPEN[:40])


async def half_a_handshake(spy):
    return await dial(spy, UPGRADE.format(query=""))


async def a_websocket_without_connect(spy):
    return await dial(spy, UPGRADE.format(query="") + "\r\n")


async def a_poll_without_connect(spy):
    return await dial(spy, OPEN)


async def an_upgrade_never_finished(spy):
    sid = (await open_poll(spy)).rpartition("=")[2]
    return await dial(spy, UPGRADE.format(query=f"&sid={sid}") + "\r\n")


async def a_body_that_never_ends(spy):
    path = await open_poll(spy)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    return await dial(spy, head + "4")


async def something_else(spy):
    return await dial(spy, "GET /favicon.ico HTTP/1.1\r\nHost: x\r\n\r\n")


async def a_session_that_does_not_exist(spy):
    return await dial(spy, OPEN.replace("polling", "polling&sid=x"))


SILENT = [
    silent,
    half_a_request,
    half_a_handshake,
    a_websocket_without_connect,
    a_poll_without_connect,
    an_upgrade_never_finished,
    a_body_that_never_ends,
    something_else,
    a_session_that_does_not_exist,
]


@pytest.mark.parametrize("begin", SILENT, ids=lambda begin: begin.__name__)
async def test_who_does_not_authenticate_is_closed_in_time(watching, begin):
    async with watching(auth={"connect_timeout": 0.5}) as spy:
        reader, writer = await begin(spy)
        assert await seconds_until_closed(reader) < 2.5
        writer.close()
        await eventually(lambda: not spy.server.socketio.eio.sockets)
        assert count(spy, "cut", "not authenticated in time") >= 1


async def one_session(spy, token):
    """The path of a polling session that has authenticated."""
    path = await open_poll(spy)
    assert (
        await fetch(spy, path, method="POST", body="40" + json.dumps({"token": token}))
    ).code == 200
    assert (await fetch(spy, path)).body.startswith(b'40{"sid"')
    return path


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "PUT"])
async def test_naming_a_session_lifts_no_connection_out_of_the_limits(watching, method):
    limits = {"unauthenticated": 20}
    async with watching(auth={"connect_timeout": 1.0}, limits=limits) as spy:
        path = await one_session(spy, spy.token())
        text = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        lines = [await dial(spy, text) for _ in range(30)]
        why = ("made room", "not authenticated in time")  # the second on a busy machine
        await eventually(lambda: sum(count(spy, "cut", reason) for reason in why) >= 10)
        for reader, _ in lines:
            assert await seconds_until_closed(reader) < 3
        assert (await fetch(spy, path, method="POST", body="3")).code == 200


async def test_of_many_connections_that_post_for_one_session_only_the_latest_is_its_own(watching):
    async with watching(auth={"connect_timeout": 1.0}) as spy:
        path = await one_session(spy, spy.token())
        text = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n3"
        lines = []
        for _ in range(5):
            lines.append(await dial(spy, text))
            assert b" 200 " in await lines[-1][0].readline()
        for reader, _ in lines[:-1]:
            assert await seconds_until_closed(reader) < 2.5
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lines[-1][0].read(), 1.5)


async def test_asking_again_and_again_does_not_prolong_it(watching):
    async with watching(auth={"connect_timeout": 0.6}) as spy:
        reader, writer = await dial(spy)
        closed = asyncio.create_task(seconds_until_closed(reader))
        while not closed.done():
            writer.write(OPEN.replace("polling", "polling&sid=x").encode())
            await asyncio.wait([closed], timeout=0.1)
        assert closed.result() < 2


async def test_who_leaves_socketio_and_stays_is_a_stranger_again(watching):
    async with watching(auth={"connect_timeout": 0.5}) as spy:
        raw = await spy.raw(spy.token())
        await raw.send("41")
        async with within(2.5):
            await raw.closed()
        assert not spy.server.limits.open


@TRANSPORTS
async def test_who_has_authenticated_stays(watching, transport):
    async with watching(auth={"connect_timeout": 1.0}) as spy:
        dashboard = await spy.dashboard(transports=[transport])
        with pytest.raises(AssertionError):
            await dashboard.disconnected(timeout=1.5)
        assert (await dashboard.call("guilds:list"))["ok"]
        assert len(spy.server.limits.strangers) <= 1  # a spare connection of the poller


async def test_the_longest_silent_one_makes_room(watching):
    async with watching(limits={"unauthenticated": 5}) as spy:
        lines = [await dial(spy, local=f"127.0.0.{n + 1}") for n in range(8)]
        await eventually(lambda: count(spy, "cut", "made room") == 3)
        assert [await seconds_until_closed(reader) < 1 for reader, _ in lines[:3]] == [True] * 3
        assert (await spy.connect()).id
        for _, writer in lines:
            writer.close()


async def test_the_silent_of_one_address_make_room_among_themselves(watching):
    tables = {"limits": {"connections_per_ip": 2}, "server": {"trusted_proxies": []}}
    async with watching(**tables) as spy:
        neighbour, other = await dial(spy, local="127.0.0.2")
        lines = [await dial(spy, local="127.0.0.3") for _ in range(7)]
        await eventually(lambda: count(spy, "cut", "made room") == 3)
        assert len(spy.server.limits.strangers) == 5
        assert not neighbour.at_eof()
        for writer in [other, *(writer for _, writer in lines)]:
            writer.close()


# ---- one at a time


async def test_messages_of_one_connection_are_handled_one_at_a_time(spy):
    """What waits is in Tornado's hands, which then reads no more."""
    raw = await spy.raw(spy.token(role="ADMIN"))
    running = most = 0

    async def answer(*about):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return {}

    spy.server.dashboards._answer = answer
    await raw.send(*[f'42{n}["guilds:list"]' for n in range(15)])
    for _ in range(15):
        await raw.read()
    assert most == 1


async def test_parallel_posts_end_the_session(spy):
    """As they do in Node's: no order could be kept, and handlers would pile up."""
    path = await open_poll(spy)
    token = json.dumps({"token": spy.token(role="ADMIN")})
    assert (await fetch(spy, path, method="POST", body=f"40{token}")).code == 200
    release = asyncio.Event()

    async def answer(*about):
        await release.wait()
        return {}

    spy.server.dashboards._answer = answer
    post = [fetch(spy, path, method="POST", body='42["guilds:list"]') for _ in range(5)]
    tasks = [asyncio.create_task(one) for one in post]
    await eventually(lambda: not spy.server.socketio.eio.sockets)
    release.set()
    await asyncio.gather(*tasks)
    assert count(spy, "cut", "overlapping posts") == 1


async def test_a_flood_of_one_client_leaves_the_loop_to_others(spy):
    raw, other = await spy.raw(spy.token()), await spy.connect()
    flood = asyncio.create_task(raw.send(*['42["x"]'] * 5_000))
    slowest = 0.0
    for _ in range(20):
        started = clock()
        await other.call("guilds:list")
        slowest = max(slowest, clock() - started)
    assert slowest < 1
    flood.cancel()
    await asyncio.wait([flood])


async def test_a_message_that_is_handled_as_the_process_ends_is_no_error(spy):
    raw = await spy.raw(spy.token(role="ADMIN"))
    flood = asyncio.create_task(raw.send(*['42["x"]'] * 5_000))

    def handled():
        return [task for task in asyncio.all_tasks() if "on_message" in repr(task.get_coro())]

    await eventually(handled)
    for task in handled():
        task.cancel()  # as asyncio does at the end
    await raw.closed()
    flood.cancel()
    await asyncio.wait([flood])


# ---- what must not pile up, or get anywhere


async def test_namespaces_leave_nothing_behind(spy):
    raw = await spy.raw(spy.token())
    manager = spy.server.socketio.manager
    for n in range(200):
        await raw.send(f"40/n{n},")
        assert "Invalid namespace" in await raw.read()
    assert set(manager.rooms) == {"/"}
    assert not manager.pending_connect
    assert not manager.pending_disconnect


async def test_an_attachment_that_never_comes_leaves_nothing_behind(spy):
    raw = await spy.raw(spy.token())
    await raw.send('451-["subscribe:guild",{"_placeholder":true,"num":0}]')
    await eventually(lambda: spy.server.socketio._binary_packet)
    raw.socket.close()
    await eventually(lambda: not spy.server.socketio._binary_packet)


async def test_who_is_refused_is_not_heard_again(spy):
    """The second CONNECT of one POST has a good token, and comes too late."""
    path = await open_poll(spy)
    good = json.dumps({"token": spy.token(role="ADMIN")})
    await fetch(spy, path, method="POST", body=f'40{{"token":"x"}}\x1e40{good}')
    answer = await fetch(spy, path)
    assert b"Invalid token" in answer.body
    assert b'40{"sid"' not in answer.body
    assert not len(spy.server.dashboards)


@pytest.mark.parametrize("first", ['"x"', "{}"])
async def test_two_connects_race_for_one_place(spy, first):
    raw = await spy.raw()
    good = "40" + json.dumps({"token": spy.token()})
    await raw.send(good, good, "40" + first)
    assert (await raw.read()).startswith('40{"sid"')
    assert len(spy.server.dashboards) == 1
    raw.socket.close()
    await eventually(lambda: not len(spy.server.dashboards))
    assert not spy.server.limits.open


@pytest.mark.parametrize("event", ["connect", "disconnect", "*", "request", "connect_error"])
async def test_no_event_reaches_a_handler_by_its_name(spy, event):
    """The arguments are those of the handlers: another client's id, its auth, a reason."""
    victim = await spy.connect("1")
    raw = await spy.raw(spy.token("2"))
    sid = next(iter(spy.server.rights.subscriptions.connected))
    await raw.send("421" + json.dumps([event, sid, {"token": "x"}, "transport error"]))
    packets = [await raw.read(), await raw.read()]
    assert all('"unknown_event"' in packet for packet in packets)
    await victim.quiet()
    assert len(spy.server.dashboards) == 2


async def test_a_bug_of_ours_is_logged_and_is_not_told(spy, request):
    request.node.add_marker(pytest.mark.logs("a Socket.IO handler failed"))
    raw = await spy.raw(spy.token())

    async def fail(*about):
        raise RuntimeError("the secret is 42")

    spy.server.dashboards._answer = fail
    await raw.send('421["guilds:list"]')
    assert await raw.closed() == []


# ---- what is told


async def test_no_log_line_can_be_forged_or_shows_a_token(watching, caplog):
    caplog.set_level(logging.DEBUG, "spywatcher")
    evil = "x\r\nERROR spywatcher: forged"
    async with watching() as spy:
        await spy.js.refused(spy.url, token=evil)
        await fetch(spy, headers={"Origin": "https://evil.example"})
        raw = await spy.raw(spy.token("forged\n\u202e" + "x" * 100))
        await raw.send(json.dumps([evil]), f"42{json.dumps([evil])}")
        await eventually(lambda: not spy.server.socketio.eio.sockets)
        token = spy.token("1")
        with pytest.raises(ConnectError):
            await spy.js.connect(spy.url, token=token[:-2] + "xx")
    form = spywatcher.TextFormatter(dated=False)
    lines = [form.format(record) for record in caplog.records]
    assert not [line for line in lines if "\n" in line or "\u202e" in line]
    assert not [line for line in lines if token[:20] in line or "forged" in line[60:]]


async def test_refusals_of_one_address_are_a_line_a_minute(watching, caplog):
    caplog.set_level(logging.INFO, "spywatcher")
    async with watching(limits={"block_after": 1_000}) as spy:
        for _ in range(10):
            await spy.js.refused(spy.url, token="x")
            await fetch(spy, headers={"Origin": "https://evil.example"})
    told = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(told) == 2


# ---- the parts by themselves


async def test_memory_is_bounded_and_forgets_what_is_over(monkeypatch):
    monkeypatch.setattr(spywatcher, "MOST_REMEMBERED", 10)
    counters = Counters()
    for n in range(100):
        await counters.count(f"k{n}", 60)
    assert len(counters._counts) == 10
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert await counters.seconds_left("k99") == 0
    assert await counters.count("k99", 60) == 1
    assert len(counters._counts) == 1


async def test_windows_do_not_follow_the_clock_on_the_wall(monkeypatch):
    counters = Counters()
    await counters.count("k", 60)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    assert 59 < await counters.seconds_left("k") <= 60


class Silent:
    """A stranger that notes why it was dropped."""

    address = "a"

    def __init__(self, name, dropped):
        self.name, self._dropped = name, dropped

    def drop(self, reason):
        self._dropped.append((self.name, reason))


def silent_ones(*names):
    dropped = []
    return [Silent(name, dropped) for name in names], dropped


async def test_of_strangers_who_left_nothing_is_kept():
    strangers, (two, _) = Strangers(10, 2, 60), silent_ones("a", "b")
    for who in two:
        strangers.enter(who)
        strangers.leave(who)
    assert len(strangers) == 0
    assert not strangers._of_address


async def test_entering_again_begins_anew_at_the_end():
    strangers, ((a, b, c), dropped) = Strangers(2, 9, 60), silent_ones("a", "b", "c")
    for who in (a, b, a, c):
        strangers.enter(who)
    assert dropped == [("b", "made room")]


async def test_who_speaks_is_not_the_longest_silent_one_and_has_no_more_time():
    strangers, ((a, b, c, d), dropped) = Strangers(3, 9, 0.2), silent_ones(*"abcd")
    for who in (a, b, c):
        strangers.enter(who)
    strangers.touch(a)
    strangers.enter(d)
    assert dropped == [("b", "made room")]
    await eventually(lambda: not len(strangers), timeout=1)
    late = "not authenticated in time"
    assert sorted(dropped[1:]) == [(name, late) for name in "acd"]


async def test_who_is_being_served_has_its_time_and_still_takes_a_place():
    strangers, ((a, b), dropped) = Strangers(1, 9, 0.05), silent_ones("a", "b")
    strangers.enter(a)
    strangers.suspend(a)
    await asyncio.sleep(0.1)
    assert not dropped
    strangers.enter(b)
    assert dropped == [("a", "made room")]
    strangers.leave(b)
