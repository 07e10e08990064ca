"""Rooms: what dashboards ask for and what they get, on both transports, whatever they send."""

import asyncio
import collections
import gc
import inspect
import json
import socket

import engineio
import pytest
import socketio
from engineio.async_drivers import tornado as stock_driver
from jsclient import UNDEFINED, NoAnswerError
from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httpclient import AsyncHTTPClient
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from waiting import eventually, within

import spywatcher

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
UNKNOWN = "123456789012345678"


def error(code, message):
    return {"ok": False, "error": {"message": message, "code": code}}


async def write(spy, *authors, count=1):
    """Let people write; the one that the tests call ada when nobody is named."""
    for _ in range(count):
        for author in authors or [spy.guild.owner]:
            await spy.discord.message(spy.guild, author, spy.guild.general)


# ---- asking


@TRANSPORTS
async def test_a_subscriber_gets_events_until_it_unsubscribes(spy, transport):
    dashboard = await spy.dashboard(transports=[transport])
    await write(spy)
    await dashboard.next("message:new")
    room = f"guild:{spy.guild.id}"
    answer = await dashboard.call("unsubscribe:guild", str(spy.guild.id))
    assert answer == {"ok": True, "room": room}
    await write(spy)
    await spy.nothing(dashboard)


async def test_who_did_not_subscribe_gets_nothing(spy):
    dashboard = await spy.connect()
    await write(spy)
    await spy.nothing(dashboard)


async def test_subscribing_works_without_an_acknowledgement(spy):
    dashboard = await spy.connect()
    await dashboard.emit("subscribe:guild", str(spy.guild.id))
    await dashboard.call("guilds:list")
    await write(spy)
    await dashboard.next("message:new")


async def test_subscribing_twice_gives_one_copy(spy):
    dashboard = await spy.dashboard(kinds=["guild", "guild"])
    await write(spy)
    await dashboard.next("message:new")
    await spy.nothing(dashboard)


async def test_unsubscribing_once_is_enough_after_subscribing_twice(spy):
    dashboard = await spy.dashboard(kinds=["guild", "guild"])
    await dashboard.call("unsubscribe:guild", str(spy.guild.id))
    await write(spy)
    await spy.nothing(dashboard)


async def test_unsubscribing_without_a_subscription_is_harmless(spy):
    dashboard = await spy.connect()
    answer = await dashboard.call("unsubscribe:guild", UNKNOWN)
    assert answer == {"ok": True, "room": f"guild:{UNKNOWN}"}
    await spy.nothing(dashboard)


async def test_events_wait_for_neither_an_answer_nor_each_other(spy):
    """What came before an unsubscription is still delivered, before its answer."""
    dashboard = await spy.dashboard()
    await write(spy, count=20)
    await spy.discord.caught_up()
    await dashboard.call("unsubscribe:guild", str(spy.guild.id))
    assert len(dashboard.received("message:new")) == 20


async def test_a_forbidden_guild_is_refused_by_answer_and_by_error_event(spy):
    dashboard = await spy.connect("1")
    answer = await dashboard.call("subscribe:guild", UNKNOWN)
    expected = error("forbidden", f"No access to guild {UNKNOWN}")
    assert answer == expected
    assert await dashboard.next("error") == expected["error"]


async def test_a_refusal_without_acknowledgement_is_an_error_event(spy):
    dashboard = await spy.connect()
    await dashboard.emit("subscribe:guild", "nonsense")
    assert (await dashboard.next("error"))["code"] == "invalid_guild"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], "invalid_guild"),
        ([None], "invalid_guild"),
        ([UNDEFINED], "invalid_guild"),
        ([""], "invalid_guild"),
        (["abc"], "invalid_guild"),
        (["1" * 21], "invalid_guild"),
        (["-1"], "invalid_guild"),
        ([" 1"], "invalid_guild"),
        (["1\n"], "invalid_guild"),
        (["\uff11\uff12"], "invalid_guild"),
        ([123], "invalid_guild"),
        ([1.5], "invalid_guild"),
        ([True], "invalid_guild"),
        ([[]], "invalid_guild"),
        ([["1"]], "invalid_guild"),
        ([{}], "invalid_guild"),
        ([{"guildId": {"$ne": {"deep": [{"deeper": None}]}}}], "invalid_guild"),
        ([{"__proto__": {"toString": 1}}], "invalid_guild"),
        ([b"\x00\xff"], "invalid_guild"),
        ([{"binary": b"\x00"}], "invalid_guild"),
        (["1", "2"], "bad_request"),
        (["1", {}, None, 4], "bad_request"),
    ],
)
async def test_bad_input_is_answered_and_harms_nobody(spy, args, code):
    dashboard = await spy.dashboard()
    for event in ("subscribe:guild", "unsubscribe:guild"):
        answer = await dashboard.call(event, *args)
        assert (answer["ok"], answer["error"]["code"]) == (False, code)
        assert len(answer["error"]["message"]) < 120
    await write(spy)
    await dashboard.next("message:new")


@pytest.mark.parametrize("event", ["no:such", "", "subscribe:", "subscribe:x", ":", "message:new"])
async def test_an_unknown_event_is_answered(spy, event):
    dashboard = await spy.connect()
    answer = await dashboard.call(event, str(spy.guild.id))
    assert answer == error("unknown_event", f"Unknown event: {json.dumps(event)}")


@TRANSPORTS
async def test_guilds_list_tells_id_name_and_icon(watching, discord, guild, transport):
    discord.add_guild("Aviary")
    guild.name = "Night\u200b Owls\u202e"
    async with watching() as spy:
        dashboard = await spy.connect(transports=[transport])
        listed = (await dashboard.call("guilds:list"))["guilds"]
        assert [(found["name"], found["icon"]) for found in listed] == [
            ("Aviary", None),
            ("Night Owls", None),
        ]
        assert listed[1]["id"] == str(guild.id)


async def test_guilds_list_takes_no_notice_of_arguments(spy):
    dashboard = await spy.connect()
    assert await dashboard.call("guilds:list", {"a": 1}) == await dashboard.call("guilds:list")


# ---- more than one


async def test_two_sockets_of_one_viewer_are_independent(spy):
    first, second = await spy.dashboard(), await spy.dashboard()
    await first.call("unsubscribe:guild", str(spy.guild.id))
    await write(spy)
    await second.next("message:new")
    await first.disconnect()
    await write(spy)
    await second.next("message:new")
    assert first.received("message:new") == []


async def test_two_guilds_on_one_socket_are_told_apart(watching, discord, guild):
    other = discord.add_guild("Elsewhere")
    async with watching() as spy:
        dashboard = await spy.dashboard()
        await dashboard.call("subscribe:guild", str(other.id))
        await discord.message(other, other.owner, other.general)
        await write(spy)
        came = [(await dashboard.next("message:new"))["guildId"] for _ in range(2)]
        assert came == [str(other.id), str(guild.id)]


async def test_who_leaves_and_returns_has_to_subscribe_again(spy):
    dashboard = await spy.dashboard()
    await dashboard.drop()
    await dashboard.reconnected()
    assert (await dashboard.call("subscribe:guild", str(spy.guild.id)))["ok"]
    await write(spy)
    await dashboard.next("message:new")


async def test_who_is_gone_leaves_nothing_behind(spy):
    dashboards = [await spy.dashboard(transports=[t]) for t in ("websocket", "polling")]
    for dashboard in dashboards:
        await dashboard.disconnect()
    await eventually(lambda: not spy.server.socketio.eio.sockets)
    assert not spy.server.rooms._rooms
    assert not spy.server.rooms._rooms_of
    assert not spy.server.rights.subscriptions.connected


# ---- the way there


async def test_a_burst_arrives_whole_and_in_order_on_both_transports(spy):
    dashboards = [await spy.dashboard(transports=[t]) for t in ("websocket", "polling")]
    names = [f"m{number}" for number in range(300)]
    for name in names:
        spy.server.node.deliver("message:new", str(spy.guild.id), {"name": name}, "guild")
    for dashboard in dashboards:
        came = [(await dashboard.next("message:new"))["name"] for _ in names]
        assert came == names


async def test_an_upgrade_in_the_middle_of_a_burst_loses_and_reorders_nothing(spy):
    dashboard = await spy.js.open(
        spy.url, token=spy.token(role="ADMIN"), transports=["polling", "websocket"]
    )
    await dashboard.connected()
    await dashboard.emit("subscribe:guild", str(spy.guild.id))
    room, count = f"guild:{spy.guild.id}", 0
    await eventually(lambda: room in spy.server.rooms._rooms)
    upgrade = asyncio.create_task(dashboard.upgraded())
    while not upgrade.done():
        spy.server.node.deliver("message:new", str(spy.guild.id), {"number": count}, "guild")
        count += 1
        await asyncio.sleep(0.001)
    spy.server.node.deliver("message:new", str(spy.guild.id), {"number": count}, "guild")
    came = [(await dashboard.next("message:new"))["number"] for _ in range(count + 1)]
    assert came == list(range(count + 1))
    assert (await dashboard.state()).transport == "websocket"


async def test_a_polling_client_goes_over_to_websocket_by_itself(spy):
    dashboard = await spy.dashboard(transports=["polling", "websocket"])
    assert await dashboard.upgraded() == "websocket"
    await write(spy)
    await dashboard.next("message:new")


async def test_large_events_arrive(spy):
    dashboard = await spy.dashboard()
    for size in (100, 125, 126, 65_535, 65_536, 300_000):
        spy.server.node.deliver("message:new", str(spy.guild.id), {"text": "x" * size}, "guild")
        assert len((await dashboard.next("message:new"))["text"]) == size


@TRANSPORTS
async def test_a_message_of_a_megabyte_costs_its_sender_the_connection(spy, transport):
    """It is refused before it is read; the client comes back by itself and others go on."""
    sender = await spy.connect(transports=[transport])
    other = await spy.dashboard()
    with pytest.raises(NoAnswerError):
        await sender.call("subscribe:guild", "1" * 1_000_000, timeout=2)
    await sender.reconnected()
    assert (await sender.call("guilds:list"))["ok"]
    await write(spy)
    await other.next("message:new")
    assert (await other.state()).connected


async def test_a_client_that_stops_reading_is_cut_off_alone(watching):
    async with watching(server={"max_queue_bytes": 65_536}) as spy:
        reader = await spy.dashboard()
        raw = await spy.raw(spy.token(role="ADMIN"))
        await raw.send(f'42["subscribe:guild","{spy.guild.id}"]')
        room = f"guild:{spy.guild.id}"
        await eventually(lambda: len(list(spy.server.rooms.members(room))) == 2)
        raw.stop_reading()
        sent = 0
        while len(list(spy.server.rooms.members(room))) == 2:
            spy.server.node.deliver(
                "message:new", str(spy.guild.id), {"n": sent, "text": "x" * 16_000}, "guild"
            )
            sent += 1
            assert (await reader.next("message:new"))["n"] == sent - 1
        assert (await reader.state()).connected


# ---- clients that are no Socket.IO clients

OPEN = [
    "",  # an empty frame
    "9",  # no Engine.IO packet
    "x",
    "{}",
    "4",  # no Socket.IO packet
    "49",
    "4x",
    "42",  # an event without a name
    "42[",
    "42{}",
    "42[]",
    "42null",
    "42[[1]]",
    '42"text"',
    "43",  # an answer to nothing
    "4399[]",
    "45",  # a binary event without its parts
    "45-",
    "45x-[]",
    "45999-[]",
    '451-["subscribe:guild",{"_placeholder":true,"num":7}]',
    "4/nowhere,",
    '42/nowhere,["x"]',
    "41/nowhere,",
    '420123456789012345678901234567890["guilds:list"]',
    "0",  # what only a server says
    "1",
    "5",
    "6",
    b"\x00\xff",  # bytes that no packet announced
    "3probe",
    "42" + "[" * 2000,
    '42["guilds:list"' + ',"x"' * 2000 + "]",
]


@pytest.mark.parametrize("packet", OPEN, ids=lambda packet: repr(packet)[:24])
async def test_a_malformed_packet_harms_only_its_own_session(spy, packet):
    bystander = await spy.dashboard()
    raw = await spy.raw(spy.token(role="ADMIN"))
    await raw.send(packet)
    await write(spy)
    await bystander.next("message:new")
    fresh = await spy.connect()
    assert (await fresh.call("guilds:list"))["ok"]


@pytest.mark.parametrize("packet", ["9", "x", "49", "42[", "42{}", b"\xff"])
async def test_a_malformed_packet_ends_its_session(spy, packet):
    raw = await spy.raw(spy.token(role="ADMIN"))
    await raw.send(packet)
    async with within(2):
        await raw.closed()


@pytest.mark.parametrize(
    "event", ["connect", "disconnect", "connect_error", "__disconnect_final", "*"]
)
async def test_a_reserved_event_reaches_no_handler(spy, event):
    """Stock python-socketio would call the server's own handlers with a client's arguments."""
    raw = await spy.raw(spy.token(role="ADMIN"))
    viewers = dict(spy.server.rights.subscriptions.connected)
    await raw.send(f'420["{event}",{{"token":"x"}}]')
    said = [await raw.read(), await raw.read()]
    assert any(packet.startswith('430[{"ok":false') for packet in said)
    assert spy.server.rights.subscriptions.connected == viewers
    await raw.send('421["guilds:list"]')
    assert (await raw.read()).startswith('431[{"ok":true')


async def test_a_namespace_that_does_not_exist_is_refused_and_the_main_one_goes_on(spy):
    raw = await spy.raw(spy.token(role="ADMIN"))
    await raw.send("40/admin,")
    assert await raw.read() == '44/admin,{"message":"Invalid namespace"}'
    await raw.send('420["guilds:list"]')
    assert (await raw.read()).startswith('430[{"ok":true')


async def test_the_javascript_client_is_told_of_an_invalid_namespace(spy):
    refused = await spy.js.refused(f"{spy.url}/admin", token=spy.token(role="ADMIN"))
    assert refused.message == "Invalid namespace"


async def test_nothing_is_answered_before_connect(spy):
    raw = await spy.raw()
    await raw.send('420["guilds:list"]', f'42["subscribe:guild","{spy.guild.id}"]')
    await raw.send("40" + json.dumps({"token": spy.token(role="ADMIN")}))
    assert (await raw.read()).startswith('40{"sid"')
    assert not spy.server.rooms._rooms


# ---- what the connection is made of


async def test_the_open_packet_tells_the_published_heartbeat(spy):
    raw = await spy.raw()
    hello = json.loads(raw.hello[1:])
    assert (hello["pingInterval"], hello["pingTimeout"]) == (25_000, 60_000)
    assert hello["maxPayload"] == 16_384


async def test_both_ends_notice_that_the_other_is_gone(watching):
    async with watching(heartbeat={"interval": 0.1, "timeout": 0.1}) as spy:
        raw = await spy.raw()
        async with within(2):
            assert await raw.closed() == ["2"]
        assert not spy.server.socketio.eio.sockets


@TRANSPORTS
async def test_a_client_that_answers_pings_stays(watching, transport):
    async with watching(heartbeat={"interval": 0.05, "timeout": 20.0}) as spy:
        dashboard = await spy.dashboard(transports=[transport])
        for _ in range(5):
            await dashboard.pinged()
        assert (await dashboard.state()).connected


async def test_no_compression_is_negotiated(spy):
    """Its context would cost five times the memory of an idle client."""
    raw = await spy.raw(headers={"Sec-WebSocket-Extensions": "permessage-deflate"})
    assert "Sec-WebSocket-Extensions" not in raw.socket.headers


async def test_no_write_waits_until_the_one_before_is_acknowledged(spy):
    """Without TCP_NODELAY that takes 40 ms."""
    await spy.raw(spy.token())
    (session,) = spy.server.socketio.eio.sockets.values()
    server_side = spywatcher.websocket_stream(session.handler).socket
    assert server_side.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_polling_can_be_switched_off(watching):
    async with watching(server={"transports": ["websocket"]}) as spy:
        refused = await spy.js.refused(spy.url, token=spy.token(), transports=["polling"])
        assert refused.description == 400
        assert (await spy.connect(transports=["websocket"])).id


async def test_websocket_can_be_switched_off(watching):
    async with watching(server={"transports": ["polling"]}) as spy:
        await spy.js.refused(spy.url, token=spy.token(), transports=["websocket"])
        assert (await spy.connect(transports=["polling", "websocket"])).id


@pytest.mark.parametrize(
    "query",
    ["", "?EIO=3&transport=polling", "?EIO=4&transport=x", "?EIO=4&transport=polling&sid=x"],
)
async def test_a_bad_request_is_answered_with_400(spy, query):
    answer = await AsyncHTTPClient().fetch(f"{spy.url}/socket.io/{query}", raise_error=False)
    assert answer.code == 400


# ---- traps of the stock libraries that this section answers; one that is mended shows here


def test_stock_pings_time_out_earlier_than_published():
    assert engineio.AsyncServer(async_mode="tornado").ping_timeout == 20


def test_stock_compresses_every_websocket():
    assert "return {}" in inspect.getsource(stock_driver.get_tornado_handler)


def test_stock_calls_a_connect_handler_again_after_a_type_error():
    source = inspect.getsource(socketio.AsyncServer._handle_connect)
    assert "except TypeError" in source


async def test_a_poll_may_carry_more_than_16_packets(watching):
    async with watching(limits={"events_per_connection": "100/second"}) as spy:
        dashboard = await spy.connect(transports=["polling"])
        calls = [dashboard.call("guilds:list") for _ in range(60)]
        assert all(answer["ok"] for answer in await asyncio.gather(*calls))


def test_library_logs_pass_bugs_only():
    log = spywatcher.library_log("test")
    record = log.makeRecord(log.name, 40, "f", 1, "a client's mistake", (), None)
    assert not log.filter(record)


# ---- what is kept


def alive():
    """How many there are of what belongs to a request; of headers those that say something."""
    gc.collect()
    kinds = (HTTPServerRequest, HTTP1Connection, HTTP1ServerConnection, spywatcher.SocketHandler)
    found = (type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds))
    headers = sum(isinstance(one, HTTPHeaders) and len(one) > 0 for one in gc.get_objects())
    return collections.Counter(found) + collections.Counter({"HTTPHeaders": headers})


@pytest.mark.parametrize("transports", [["websocket"], ["polling", "websocket"]])
async def test_an_open_websocket_keeps_nothing_of_its_handshake(spy, transports):
    before = alive()
    for _ in range(3):
        await spy.dashboard(transports=transports)
    sessions = spy.server.socketio.eio.sockets.values()
    await eventually(lambda: all(one.state is spywatcher.State.WEBSOCKET for one in sessions))
    await eventually(lambda: alive() - before == {"SocketHandler": 3})
