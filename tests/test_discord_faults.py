"""Whatever Discord sends or withholds, the server lives: it says why, tries again, and recovers.

Each row is one fault: where it is, what comes, and a word of the reason in /health/ready. While it
lasts the bot tries again and again, dashboards stay connected, and the log has one line for each
cause; after it everything works.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import time

import pytest
from faultydiscord import Fault, FaultyDiscord, gateway_info, ready_json
from service import server_for, viewer_token
from waiting import PATIENCE, eventually, within

from simulator import Op, guild_create_json, make_guild, message_json, presence_json
from spywatcher import Gateway, Patience, UpstreamError

#: Seconds that a step may take here, so that a row takes no longer.
STEP = 0.4
HASTY = Patience(
    step=STEP,
    first_retry=0.05,
    last_retry=0.1,
    lasted=5.0,
    tries=2,
    sessions=1000,
    session_every=1.0,
)
AWAY = pytest.mark.logs("WARNING spywatcher: not connected to Discord", required=False)


# ---- how things can be wrong


def answer(body, status=200, **headers):
    """A REST answer; `body` is text, bytes, or what JSON can say."""

    def act(handler):
        handler.set_status(status)
        handler.set_header("Content-Type", "application/json")
        for name, value in headers.items():
            handler.set_header(name.replace("_", "-"), value)
        text = isinstance(body, str | bytes | dict)
        handler.finish(body if text else json.dumps(body))

    return act


def info(**wrong):
    return lambda handler: handler.finish(gateway_info(handler.discord, **wrong))


def without(key):
    def act(handler):
        body = gateway_info(handler.discord)
        del body[key]
        handler.finish(body)

    return act


async def nothing(handler):
    """Neither answer nor close until the test is over."""
    await handler.discord.healed.wait()


async def slowly(handler):
    """A byte now and then, never the whole."""
    for _ in range(50):
        await asyncio.sleep(STEP / 4)
        if handler.request.connection.stream.closed():
            return
        handler.write(" ")
        await handler.flush()


def hang_up(handler):
    handler.detach().close()


def half_an_answer(handler):
    stream = handler.detach()
    stream.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"url":')
    asyncio.get_running_loop().call_later(0.05, stream.close)


def raw(data):
    def act(handler):
        stream = handler.detach()
        stream.write(data)
        asyncio.get_running_loop().call_later(0.05, stream.close)

    return act


def close(code, reason="No."):
    return lambda socket: socket.close(code, reason)


def cut(socket):
    socket.cut()


def frame(data):
    return lambda socket: socket.send_bytes(data)


def text(content):
    return lambda socket: socket.send_text(content)


def packet(**fields):
    return lambda socket: socket.send(fields)


def hello(interval):
    return packet(op=Op.HELLO, d={"heartbeat_interval": interval})


def ready(**wrong):
    return lambda socket: socket.dispatch("READY", ready_json(socket.discord, **wrong))


def ready_without(key):
    def act(socket):
        body = ready_json(socket.discord)
        del body[key]
        socket.dispatch("READY", body)

    return act


HTML = "<!doctype html><title>Just a moment...</title>"
DEEP = "[" * 20_000
HUGE = b"x" * 200_000

REST = {
    "broken JSON": (answer('{"url": "ws://'), "cannot be read"),
    "an object without fields": (answer({}), "cannot be read"),
    "a list": (answer([]), "cannot be read"),
    "null": (answer(None), "cannot be read"),
    "a number": (answer(17), "cannot be read"),
    "a text": (answer('"hello"'), "cannot be read"),
    "an empty body": (answer(""), "cannot be read"),
    "HTML": (answer(HTML), "cannot be read"),
    "bytes that are no UTF-8": (answer(b"\xff\xfe{}"), "cannot be read"),
    "JSON as deep as the sea": (answer(DEEP), "cannot be read"),
    "more than anybody reads": (answer(HUGE), "cannot be reached"),
    "no url": (without("url"), "cannot be read"),
    "no shards": (without("shards"), "cannot be read"),
    "no session_start_limit": (without("session_start_limit"), "cannot be read"),
    "url null": (info(url=None), "cannot be read"),
    "a url of HTTP": (info(url="http://127.0.0.1:9/"), "cannot be read"),
    "a url without host": (info(url="wss://"), "cannot be read"),
    "a url with a port that is none": (info(url="ws://127.0.0.1:99999"), "cannot be read"),
    "a url where nobody listens": (info(url="ws://127.0.0.1:9/"), "connection was lost"),
    "a url whose host is unknown": (info(url="ws://nowhere.invalid/"), "HELLO|connection was lost"),
    "shards as text": (info(shards="many"), "cannot be read"),
    "no shard at all": (info(shards=0), "cannot be read"),
    "a billion shards": (info(shards=10**9), "cannot be read"),
    "no session left": (
        info(session_start_limit={"total": 1, "remaining": 0, "reset_after": 50}),
        "no session any more",
    ),
    "sessions left as text": (
        info(session_start_limit={"remaining": "x", "reset_after": 1}),
        "cannot be read",
    ),
    "204": (raw(b"HTTP/1.1 204 Nothing\r\n\r\n"), "answers 204"),
    "a redirect": (answer("", 302, Location="http://127.0.0.1:9/"), "answers 302"),
    "400": (answer({"message": "no", "code": 0}, 400), "answers 400"),
    "403 in HTML": (answer(HTML, 403), "answers 403"),
    "404": (answer({"message": "404: Not Found", "code": 0}, 404), "answers 404"),
    "429": (answer({"message": "slow", "retry_after": 0.1, "global": False}, 429), "asks to wait"),
    "429, global": (answer({"retry_after": 0.1, "global": True}, 429), "asks to wait"),
    "429 without retry_after": (answer({"message": "slow"}, 429), "asks to wait"),
    "429 with retry_after as text": (answer({"retry_after": "soon"}, 429), "asks to wait"),
    "429 with a negative retry_after": (answer({"retry_after": -5}, 429), "asks to wait"),
    "429 with NaN": (answer('{"retry_after": NaN}', 429), "asks to wait"),
    "429 in HTML": (answer(HTML, 429, Retry_After="0.1"), "asks to wait"),
    "429 as a list": (answer([], 429), "asks to wait"),
    "500": (answer("", 500), "answers 500"),
    "502 in HTML": (answer(HTML, 502), "answers 502"),
    "503": (answer({"message": "later"}, 503), "answers 503"),
    "522": (answer("", 522), "answers 522"),
    "a status that is none": (raw(b"HTTP/1.1 999 Odd\r\n\r\n"), "cannot be reached|answers 999"),
    "no HTTP at all": (raw(b"220 smtp.example ESMTP\r\n"), "cannot be reached"),
    "nothing": (nothing, "cannot be reached"),
    "a byte now and then": (slowly, "cannot be reached"),
    "a closed connection": (hang_up, "cannot be reached"),
    "half an answer": (half_an_answer, "cannot be reached"),
}
UPGRADE = {
    "403": (answer(HTML, 403), "connection was lost"),
    "500": (answer("", 500), "connection was lost"),
    "200": (answer(HTML), "connection was lost"),
    "429": (answer({"retry_after": 1}, 429), "connection was lost"),
    "nothing": (nothing, "connection was lost|no HELLO"),
    "a closed connection": (hang_up, "connection was lost"),
    "no HTTP at all": (raw(b"220 smtp.example ESMTP\r\n"), "connection was lost"),
}
#: At any step of the gateway.
ANYWHERE = {
    "bad zlib": (frame(b"\x00garbage\x00\x00\xff\xff"), "cannot be read"),
    "a text frame": (frame("hello"), "cannot be read"),
    "broken JSON": (text('{"op": '), "cannot be read"),
    "no UTF-8": (frame(b"\xff\x00\x00\xff\xff"), "cannot be read"),
    "a list": (text("[]"), "cannot be read"),
    "null": (text("null"), "cannot be read"),
    "no op": (text("{}"), "cannot be read"),
    "JSON as deep as the sea": (text(DEEP), "cannot be read"),
    "closed with 1000": (close(1000), "closed with 1000"),
    "closed with 1011": (close(1011), "closed with 1011"),
    "closed with 4000": (close(4000), "closed with 4000"),
    "closed with 4001": (close(4001), "closed with 4001"),
    "closed with 4002": (close(4002), "closed with 4002"),
    "closed with 4003": (close(4003), "closed with 4003"),
    "closed with 4005": (close(4005), "closed with 4005"),
    "closed with 4007": (close(4007), "closed with 4007"),
    "closed with 4008": (close(4008), "closed with 4008"),
    "closed with 4009": (close(4009), "closed with 4009"),
    "closed with 4010": (close(4010), "closed with 4010"),
    "closed with 4011": (close(4011), "closed with 4011"),
    "closed with 4999": (close(4999), "closed with 4999"),
    "cut": (cut, "connection was lost"),
}
HELLO = ANYWHERE | {
    "nothing": (nothing, "no HELLO within"),
    "another op": (packet(op=Op.HEARTBEAT_ACK), "cannot be read"),
    "no data": (packet(op=Op.HELLO), "cannot be read"),
    "data null": (packet(op=Op.HELLO, d=None), "cannot be read"),
    "no interval": (packet(op=Op.HELLO, d={}), "cannot be read"),
    "an interval as text": (hello("often"), "cannot be read"),
    "an interval of nothing": (hello(0), "heartbeat each"),
    "a negative interval": (hello(-5), "heartbeat each"),
    "an interval of years": (hello(1e300), "heartbeat each"),
    "an interval that is no number": (hello(float("nan")), "heartbeat each"),
    "reconnect": (packet(op=Op.RECONNECT), "connection was lost"),
}
READY = ANYWHERE | {
    "nothing": (nothing, "no READY within"),
    "invalid session": (packet(op=Op.INVALID_SESSION, d=False), "connection was lost"),
    "invalid session, to be resumed": (
        packet(op=Op.INVALID_SESSION, d=True),
        "connection was lost",
    ),
    "invalid session without a word": (packet(op=Op.INVALID_SESSION), "cannot be read"),
    "reconnect": (packet(op=Op.RECONNECT), "connection was lost"),
    "RESUMED instead": (packet(op=0, t="RESUMED", s=1, d={}), "instead of READY"),
    "data null": (packet(op=0, t="READY", s=1, d=None), "cannot be read"),
    "a list": (packet(op=0, t="READY", s=1, d=[]), "cannot be read"),
    "no session_id": (ready_without("session_id"), "cannot be read"),
    "no resume_gateway_url": (ready_without("resume_gateway_url"), "cannot be read"),
    "no user": (ready_without("user"), "cannot be read"),
    "user null": (ready(user=None), "cannot be read"),
    "no guilds": (ready_without("guilds"), "cannot be read"),
    "guilds of null": (ready(guilds=[None]), "cannot be read"),
    "no application": (ready_without("application"), "cannot be read"),
    "a name that is none": (packet(op=0, t=None, s=1, d={}), "cannot be read"),
}
RESUMED = ANYWHERE | {
    "nothing": (nothing, "no RESUMED within"),
    "invalid session": (packet(op=Op.INVALID_SESSION, d=False), ""),
    "reconnect": (packet(op=Op.RECONNECT), "connection was lost"),
}
del (
    RESUMED["closed with 4010"],
    RESUMED["closed with 4011"],
)  # these begin anew, and no longer resume
CONNECTED = ANYWHERE | {
    "invalid session again and again": (packet(op=Op.INVALID_SESSION, d=False), ""),
    "reconnect again and again": (packet(op=Op.RECONNECT), ""),
    "a dispatch without a name": (packet(op=0, s=2, d={}), ""),
    "a dispatch of null": (packet(op=0, t=None, s=None, d=None), ""),
}
ROWS = [
    pytest.param(place, act, why, id=f"{place}: {name}")
    for place, rows in {
        "rest": REST,
        "upgrade": UPGRADE,
        "hello": HELLO,
        "ready": READY,
        "resumed": RESUMED,
        "connected": CONNECTED,
    }.items()
    for name, (act, why) in rows.items()
]


# ---- what is held against them


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(Gateway, "patience", HASTY)


def serve(discord, **tables):
    return server_for(discord, **tables)


def lines_about_discord(caplog):
    return [r.getMessage() for r in caplog.records if "to Discord" in r.getMessage()]


@AWAY
@pytest.mark.parametrize(("place", "act", "why"), ROWS)
async def test_the_worst_is_that_discord_is_away(js, caplog, place, act, why):
    caplog.set_level(logging.INFO, "spywatcher")
    async with FaultyDiscord(Fault(place, act)) as discord, serve(discord) as server:
        url = f"http://127.0.0.1:{server.port}"
        dashboard = await js.connect(url, token=viewer_token())
        if place == "resumed":
            await eventually(lambda: server.gateway.connected)
            next(iter(discord.sockets)).close(4000)
        tries = 1 if place == "resumed" else 3  # what is no answer to RESUME ends the session
        await eventually(seen(server, why, lambda: discord.came[place] >= tries), timeout=10)
        assert_one_line_a_cause(lines_about_discord(caplog))
        discord.heal()
        await eventually(lambda: server.gateway.connected)
        assert not server._gateway_task.done()
        await eventually(lambda: lists_the_guild(dashboard, discord))
        assert (await dashboard.state()).connected


def seen(server, why, condition):
    """Whether the condition was true once, and /health/ready has given the reason."""
    reasons = set()

    def look():
        reasons.add(server.gateway.health()["problem"] or "")
        told = any(word in reason for word in why.split("|") for reason in reasons)
        assert told, reasons
        return condition()

    return look


def assert_one_line_a_cause(lines):
    counted = collections.Counter(lines)
    away = {line: count for line, count in counted.items() if line.startswith("not connected")}
    assert set(away.values()) <= {1}, lines
    assert sum(counted.values()) - len(away) <= 1 + len(away), lines  # the start, and each return


async def lists_the_guild(dashboard, discord):
    await asyncio.sleep(0.1)  # no more than it may ask
    answered = await dashboard.call("guilds:list")
    return [guild["id"] for guild in answered["guilds"]] == [str(discord.guild.id)]


# ---- refused for good


@AWAY
@pytest.mark.parametrize(
    ("place", "act", "told"),
    [
        ("rest", answer({"message": "401: Unauthorized", "code": 0}, 401), "put the new one into"),
        ("ready", close(4004), r"put the new one into \[discord\] token$"),
        ("resumed", close(4004), r"put the new one into \[discord\] token$"),
        ("ready", close(4012), "no longer speaks .*: upgrade hikari"),
        ("ready", close(4013), "no longer speaks .*: upgrade hikari"),
        ("ready", close(4014), "switch on Server Members Intent"),
    ],
)
async def test_what_only_the_operator_can_mend_ends_it(place, act, told):
    async with FaultyDiscord(Fault(place, act)) as discord, serve(discord) as server:
        if place == "resumed":
            await eventually(lambda: server.gateway.connected)
            next(iter(discord.sockets)).close(4000)
        async with within(PATIENCE):
            with pytest.raises(UpstreamError, match=told):
                await server.wait_closed()


# ---- neither a flood of requests nor of sessions


@AWAY
async def test_sessions_that_keep_ending_are_begun_more_and_more_rarely(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "spywatcher")
    monkeypatch.setattr(Gateway, "patience", HASTY._replace(sessions=3, session_every=60.0))
    fault = Fault("connected", packet(op=Op.INVALID_SESSION, d=False))
    async with FaultyDiscord(fault) as discord, serve(discord) as server:
        await eventually(
            lambda: "sessions keep ending; the next begins in" in (reason(server) or ""), 10
        )
        assert discord.came["ready"] == 3
        await nothing_more(discord, "ready")
    assert_one_line_a_cause(lines_about_discord(caplog))


@AWAY
async def test_retry_after_is_kept(caplog):
    caplog.set_level(logging.INFO, "spywatcher")
    act = answer({"message": "slow down", "retry_after": 0.5, "global": True}, 429)
    began = time.monotonic()
    async with FaultyDiscord(Fault("rest", act)) as discord, serve(discord) as server:
        await eventually(lambda: discord.came["rest"] == 4)
        assert time.monotonic() - began >= 3 * 0.5
        assert "asks to wait" in reason(server)
    assert len(lines_about_discord(caplog)) == 1


def test_no_step_is_waited_for_longer_than_a_minute():
    patience = Patience()
    assert max(patience.step, patience.last_retry, patience.quiet) <= 60
    day = 86_400
    assert day / patience.session_every + patience.sessions < 1000  # then Discord resets the token


def reason(server):
    return server.gateway.health()["problem"]


async def nothing_more(discord, place):
    came = discord.came[place]
    with pytest.raises(AssertionError):
        await eventually(lambda: discord.came[place] > came, timeout=STEP)


# ---- one packet that cannot be read


def sick_message(guild):
    body = message_json(guild, guild.owner, guild.general, "top secret")
    return body | {"author": body["author"] | {"id": None}}


@pytest.mark.logs(
    r"ERROR spywatcher: cannot read Discord's MESSAGE_CREATE: TypeError: .* at \w+\.py:\d+ \w+; it is left out$"
)
async def test_what_cannot_be_read_is_told_without_what_was_written(spy, caplog):
    dashboard = await spy.dashboard()
    guild = spy.guild
    for _ in range(3):
        await spy.discord.dispatch("MESSAGE_CREATE", sick_message(guild))
    await spy.discord.message(guild, guild.owner, guild.general)
    await dashboard.next("message:new")
    assert "top secret" not in caplog.text
    assert sum("cannot read" in record.getMessage() for record in caplog.records) == 1
    counted = spy.server.metrics.unreadable_packets.labels("MESSAGE_CREATE")
    assert counted._value.get() == 3


SICK_PRESENCES = [
    *({"guild_id": one} for one in ("x", "", "9" * 5000, None, 7)),
    *({"user": one} for one in ({}, {"id": None}, {"id": "x"}, [], None)),
    *({"status": one} for one in (None, 5, ["online"])),
    *({"client_status": one} for one in (None, [], {"web": 1})),
]


@pytest.mark.logs("ERROR spywatcher: cannot read Discord's PRESENCE_UPDATE: ")
async def test_presences_that_cannot_be_read_are_left_out_and_end_nothing(spy):
    dashboard, discord, guild = await spy.dashboard(), spy.discord, spy.guild
    body = presence_json(guild, guild.owner)
    for sick in SICK_PRESENCES:
        await discord.dispatch("PRESENCE_UPDATE", body | sick, guild_id=guild.id)
    await discord.presence(guild, guild.owner, "dnd", ["web"])
    assert (await dashboard.next("presence:update"))["status"] == "dnd"
    assert discord.identifies == 1
    counted = spy.server.metrics.unreadable_packets.labels("PRESENCE_UPDATE")
    assert counted._value.get() == len(SICK_PRESENCES)


@pytest.mark.logs("ERROR spywatcher: cannot read Discord's GUILD_CREATE: ")
async def test_a_guild_that_cannot_be_read_is_named_until_it_can(spy, discord):
    sick = make_guild("Sick Owls", bot=discord.bot)
    body = guild_create_json(sick)
    await discord.dispatch("GUILD_CREATE", body | {"members": None}, guild_id=sick.id)
    await discord.caught_up()
    assert reason(spy.server) == f"cannot be read: GUILD_CREATE of guild {sick.id} (Sick Owls)"
    assert spy.server.problem
    await discord.dispatch("GUILD_CREATE", body, guild_id=sick.id)
    await discord.caught_up()
    assert reason(spy.server) is None


# ---- several shards


@AWAY
async def test_with_several_shards_it_is_ready_with_all_of_them(watching, discord, waiting_shard):
    async with watching(ready=False) as spy:
        gateway = spy.server.gateway
        await eventually(lambda: gateway.health()["shards"] == {"connected": 1, "all": 2})
        assert not gateway.connected
        await eventually(lambda: "shard 1: no READY within" in reason(spy.server), 10)
        waiting_shard.set_result(None)
        await eventually(lambda: gateway.connected)
        one = next(iter(discord.sockets))
        one.close(4000)
        await eventually(lambda: not gateway.connected)
        await eventually(lambda: gateway.connected)
