"""A client that comes back gets what it missed, once and in order, or begins anew: never a part."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from jsclient import QUICK, Dashboard
from waiting import PATIENCE, eventually, within
from watching import RawClient, Watch, Watching

import spywatcher
from simulator import Guild, Member, Permission, PretendDiscord, Role, hidden_except
from spywatcher import (
    MAX_LOG_BYTES,
    Destination,
    Recovery,
    RecoverySettings,
    Viewer,
    event_packet,
)

#: What a page's client sends, and so is known for one that can recover.
PAGE = {"Origin": "http://localhost:5173"}


async def page(spy: Watch, viewer: Member | None = None, **options: Any) -> Dashboard:
    """A dashboard in a browser, subscribed to the guild, past its first `session`."""
    options = {"extraHeaders": PAGE, **QUICK, **options}
    dashboard = await spy.dashboard(viewer, **options)
    assert await dashboard.next("session") == {"recovered": False, "rooms": []}
    return dashboard


def broadcast(spy: Watch, *numbers: int, channel: str = "", kind: str = "guild") -> None:
    """An event with each number, as plugins' go out."""
    for number in numbers:
        payload: dict[str, Any] = {"number": number}
        if channel:
            payload["channelId"] = channel
        spy.server.node.deliver("x", str(spy.guild.id), payload, kind)


async def numbers(dashboard: Dashboard, count: int) -> list[int]:
    return [(await dashboard.next("x"))["number"] for _ in range(count)]


async def bare_page(spy: Watch, **auth: Any) -> tuple[dict[str, Any], RawClient, Any]:
    """A browser's bare connection: what it says when it comes back, itself, what `session` said."""
    raw = await spy.raw(headers=PAGE)
    said = {"token": spy.token(role="ADMIN"), **auth}
    await raw.send("40" + json.dumps(said))
    pid = json.loads(str(await raw.read())[2:])["pid"]
    packet = ""
    while not packet.startswith('42["session"'):
        packet = str(await raw.read())
    _, session, offset = json.loads(packet[2:])
    return said | {"pid": pid, "offset": offset}, raw, session


async def lose(spy: Watch, raw: RawClient) -> None:
    """It has read nothing of late, and its connection is gone."""
    raw.socket.stream.close()
    await eventually(lambda: not len(spy.server.dashboards))


async def away(spy: Watch, dashboard: Dashboard) -> None:
    """Its connection is lost, and the server knows it."""
    await dashboard.drop()
    await eventually(lambda: not len(spy.server.dashboards))


@pytest.mark.parametrize("transports", [["websocket"], ["polling"], ["polling", "websocket"]])
async def test_what_was_missed_comes_once_and_in_order(spy: Watch, transports: list[str]) -> None:
    dashboard = await page(spy, transports=transports)
    broadcast(spy, 1, 2)
    assert await numbers(dashboard, 2) == [1, 2]
    await away(spy, dashboard)
    broadcast(spy, 3, 4, 5)
    await dashboard.reconnected()
    assert dashboard.recovered
    room = f"guild:{spy.guild.id}"
    assert await dashboard.next("session") == {"recovered": True, "rooms": [room]}
    broadcast(spy, 6)
    assert await numbers(dashboard, 4) == [3, 4, 5, 6]
    await dashboard.quiet("x")


async def test_missed_events_come_after_connect_and_before_session(spy: Watch) -> None:
    dashboard = await page(spy)
    await away(spy, dashboard)
    broadcast(spy, 1)
    await dashboard.reconnected()
    await dashboard.next("session")
    assert [event.name for event in dashboard.events()][-2:] == ["x", "session"]


async def test_a_client_that_missed_nothing_recovers(spy: Watch) -> None:
    dashboard = await page(spy)
    await away(spy, dashboard)
    await dashboard.reconnected()
    assert (await dashboard.next("session"))["recovered"]


async def test_a_client_recovers_again_and_again(spy: Watch) -> None:
    dashboard = await page(spy)
    for number in range(10):
        await away(spy, dashboard)
        broadcast(spy, number)
        await dashboard.reconnected()
        assert (await dashboard.next("session"))["recovered"]
    assert await numbers(dashboard, 10) == list(range(10))
    await dashboard.quiet("x")


async def test_who_has_asked_for_its_guilds_is_told_of_changes_after_a_return(spy: Watch) -> None:
    async def name() -> str:
        [guild] = (await dashboard.next("guilds:update"))["guilds"]
        return str(guild["name"])

    dashboard = await page(spy)
    await dashboard.call("guilds:list")
    for number in range(3):
        await away(spy, dashboard)
        await spy.discord.guild_update(spy.guild, name=f"while away {number}")
        await spy.discord.caught_up()
        await dashboard.reconnected()
        assert dashboard.recovered
        assert await name() == f"while away {number}"
        await spy.discord.guild_update(spy.guild, name=f"later {number}")
        assert await name() == f"later {number}"


async def test_who_has_not_asked_is_told_of_no_guilds_after_a_return(spy: Watch) -> None:
    dashboard = await page(spy)
    await away(spy, dashboard)
    await dashboard.reconnected()
    await dashboard.call("unsubscribe:history", "1")
    assert not dashboard.received("guilds:update")


async def test_an_offset_from_before_a_restart_hides_nothing(watching: Watching) -> None:
    async with watching() as spy:
        before, raw, _ = await bare_page(spy)
        await raw.send("420" + json.dumps(["subscribe:guild", str(spy.guild.id)]))
        await eventually(lambda: spy.server.rooms.has_listeners(f"guild:{spy.guild.id}"))
        broadcast(spy, 1, 2, 3)
        while not (packet := str(await raw.read())).startswith('42["x",{"number":3}'):
            pass
        before["offset"] = json.loads(packet[2:])[-1]
    async with watching() as spy:
        said, raw, _ = await bare_page(spy, pid=before["pid"], offset=before["offset"])
        await raw.send("420" + json.dumps(["subscribe:guild", str(spy.guild.id)]))
        await eventually(lambda: spy.server.rooms.has_listeners(f"guild:{spy.guild.id}"))
        await lose(spy, raw)
        broadcast(spy, 1)
        back = await spy.raw(headers=PAGE)
        await back.send("40" + json.dumps(said | {"offset": before["offset"]}))
        assert json.loads(str(await back.read())[2:])["pid"] == said["pid"]
        assert str(await back.read()).startswith('42["x",{"number":1}')


async def test_what_the_throttle_held_back_meanwhile_is_not_lost(watching: Watching) -> None:
    async with watching(throttle={"x": 0.3}) as spy:
        dashboard = await page(spy)
        for number in (1, 2):
            spy.server.throttle.emit("x", str(spy.guild.id), {"number": number}, "guild")
        assert await numbers(dashboard, 1) == [1]
        await away(spy, dashboard)
        before = spy.server.recovery.logs.offset
        await eventually(lambda: spy.server.recovery.logs.offset != before)
        await dashboard.reconnected()
        assert await numbers(dashboard, 1) == [2]
        await dashboard.quiet("x")


# ---- who gets it


async def test_a_client_that_is_no_browser_sees_one_argument_and_no_pid(spy: Watch) -> None:
    raw = await spy.raw()
    await raw.send("40" + json.dumps({"token": spy.token(role="ADMIN")}))
    assert set(json.loads(str(await raw.read())[2:])) == {"sid"}
    session = ["session", {"recovered": False, "rooms": []}]
    assert json.loads(str(await raw.read())[2:]) == session


@pytest.mark.parametrize(
    ("origin", "asked", "gets"),
    [(None, True, True), (PAGE, None, True), (PAGE, False, False), (None, "yes", False)],
)
async def test_browsers_and_who_asks_get_a_pid(
    spy: Watch, origin: dict[str, str] | None, asked: object, gets: bool
) -> None:
    raw = await spy.raw(headers=origin or {})
    said = {"token": spy.token(role="ADMIN")} | ({} if asked is None else {"recover": asked})
    await raw.send("40" + json.dumps(said))
    assert ("pid" in json.loads(str(await raw.read())[2:])) is gets


async def test_python_clients_hear_events_with_handlers_of_one_argument(spy: Watch) -> None:
    client = spywatcher.socketio.AsyncClient(reconnection=False)
    heard: asyncio.Queue[Any] = asyncio.Queue()
    client.on("x", heard.put_nowait)
    token = spy.token(role="ADMIN")
    options = {"transports": ["websocket"], "wait_timeout": PATIENCE}
    await client.connect(spy.url, auth={"token": token}, **options)
    try:
        await client.call("subscribe:guild", str(spy.guild.id))
        broadcast(spy, 1)
        async with within(PATIENCE):
            assert (await heard.get())["number"] == 1
    finally:
        await client.shutdown()


# ---- what cannot be recovered whole


async def begins_anew(dashboard: Dashboard) -> None:
    await dashboard.reconnected()
    assert not dashboard.recovered
    assert await dashboard.next("session") == {"recovered": False, "rooms": []}


async def test_more_than_max_events_is_a_fresh_start(watching: Watching) -> None:
    async with watching(recovery={"max_events": 3}) as spy:
        dashboard = await page(spy)
        await away(spy, dashboard)
        broadcast(spy, 1, 2, 3, 4)
        await begins_anew(dashboard)
        await dashboard.quiet("x")


async def test_exactly_max_events_recover(watching: Watching) -> None:
    async with watching(recovery={"max_events": 3}) as spy:
        dashboard = await page(spy)
        await away(spy, dashboard)
        broadcast(spy, 1, 2, 3)
        await dashboard.reconnected()
        assert await numbers(dashboard, 3) == [1, 2, 3]


async def test_after_the_window_is_a_fresh_start(watching: Watching) -> None:
    async with watching(recovery={"window": 0.2}) as spy:
        dashboard = await page(spy, reconnection=False)
        await away(spy, dashboard)
        room = f"guild:{spy.guild.id}"
        await eventually(lambda: not spy.server.recovery.has_listeners(room))
        await dashboard.reconnect()
        await begins_anew(dashboard)


async def test_nobody_recovers_where_it_is_switched_off(watching: Watching) -> None:
    async with watching(recovery={"window": 0.0}) as spy:
        raw = await spy.raw(headers=PAGE)
        await raw.send("40" + json.dumps({"token": spy.token(role="ADMIN")}))
        assert set(json.loads(str(await raw.read())[2:])) == {"sid"}


@pytest.mark.parametrize(
    "offset", [None, "", "x", "-1", "1e3", "9" * 8, "9" * 40, 5, ["1"], {}, True, "\u0661", "0x1"]
)
async def test_an_offset_of_another_shape_is_a_fresh_start(spy: Watch, offset: object) -> None:
    first = await page(spy, reconnection=False)
    pid = next(iter(spy.server.rights.subscriptions.by_pid))
    await away(spy, first)
    raw = await spy.raw(headers=PAGE)
    said = {"token": spy.token(role="ADMIN"), "pid": pid, "offset": offset}
    await raw.send("40" + json.dumps(said))
    assert json.loads(str(await raw.read())[2:])["pid"] != pid


@pytest.mark.parametrize(
    "change",
    [
        lambda pid: pid[::-1],
        lambda pid: pid[:-1],
        lambda pid: 7,
        lambda pid: "x" * 10_000,
        lambda pid: ".",
        lambda pid: "é.é",
        lambda pid: "\ud800" + pid[1:],  # JSON can say what no text can
    ],
)
async def test_a_pid_that_was_not_given_out_is_a_fresh_start(spy: Watch, change: Any) -> None:
    first = await page(spy, reconnection=False)
    pid = next(iter(spy.server.rights.subscriptions.by_pid))
    await away(spy, first)
    broadcast(spy, 1)
    raw = await spy.raw(headers=PAGE)
    said = {"token": spy.token(role="ADMIN"), "pid": change(pid), "offset": "0"}
    await raw.send("40" + json.dumps(said))
    assert json.loads(str(await raw.read())[2:])["pid"] != pid
    assert '"session",{"recovered":false' in str(await raw.read())


async def test_a_stolen_pid_is_of_no_use_to_another_viewer(spy: Watch) -> None:
    victim = await page(spy, reconnection=False)
    pid = next(iter(spy.server.rights.subscriptions.by_pid))
    broadcast(spy, 1)
    await victim.next("x")
    thief = await spy.raw(headers=PAGE)
    said = {"token": spy.token("666", role="ADMIN"), "pid": pid, "offset": "0"}
    await thief.send("40" + json.dumps(said))
    assert json.loads(str(await thief.read())[2:])["pid"] != pid
    assert (await victim.state()).connected


async def test_a_pid_that_is_taken_back_by_two_at_once_is_one_connections_alone(spy: Watch) -> None:
    said, _, _ = await bare_page(spy)
    raws = [await spy.raw(headers=PAGE) for _ in range(3)]
    await asyncio.gather(*(raw.send("40" + json.dumps(said)) for raw in raws))
    await eventually(lambda: len(spy.server.dashboards) >= 1)
    await raws[-1].send("40" + json.dumps(said))
    for raw in raws:
        raw.socket.stream.close()
    await eventually(lambda: not len(spy.server.dashboards))


async def test_who_leaves_on_purpose_is_not_waited_for(spy: Watch) -> None:
    dashboard = await page(spy)
    await dashboard.disconnect()
    room = f"guild:{spy.guild.id}"
    await eventually(lambda: not spy.server.recovery.has_listeners(room))
    assert spy.server.recovery.logs.size == 0


async def test_who_connects_again_and_declines_gets_events_without_offsets(spy: Watch) -> None:
    await page(spy)  # so that events have offsets
    said, raw, _ = await bare_page(spy)
    declined = {"token": said["token"], "recover": False}
    await raw.send("41", "40" + json.dumps(declined))
    await raw.send("42" + json.dumps(["subscribe:guild", str(spy.guild.id)]))
    room = f"guild:{spy.guild.id}"
    await eventually(lambda: len(spy.server.rooms.members(room)) == 2)
    broadcast(spy, 1)
    packet = ""
    while not packet.startswith('42["x"'):
        packet = str(await raw.read())
    assert json.loads(packet[2:]) == ["x", {"number": 1}]


# ---- rights


@pytest.fixture
def staff(guild: Guild) -> Role:
    return guild.add_role("Staff", Permission.MANAGE_GUILD | Permission.VIEW_CHANNEL)


@pytest.fixture
def ada(guild: Guild, staff: Role) -> Member:
    return guild.add_member("ada", roles=[staff])


async def test_of_a_guild_that_may_no_longer_be_seen_nothing_comes(
    ada: Member, staff: Role, spy: Watch
) -> None:
    dashboard = await page(spy, ada)
    await away(spy, dashboard)
    broadcast(spy, 1)
    await spy.discord.remove_role(spy.guild, ada, staff)
    await spy.discord.caught_up()
    await dashboard.reconnected()
    assert await dashboard.next("session") == {"recovered": True, "rooms": []}
    broadcast(spy, 2)
    await dashboard.quiet("x")


async def test_a_right_that_was_lost_and_won_again_while_away_brings_nothing(
    ada: Member, staff: Role, spy: Watch
) -> None:
    dashboard = await page(spy, ada, reconnection=False)
    await away(spy, dashboard)
    await spy.discord.remove_role(spy.guild, ada, staff)
    await spy.discord.caught_up()
    broadcast(spy, 1)
    await spy.discord.add_role(spy.guild, ada, staff)
    await spy.discord.caught_up()
    await dashboard.reconnect()
    await dashboard.reconnected()
    assert await dashboard.next("session") == {"recovered": True, "rooms": []}
    await dashboard.quiet("x")


async def test_who_was_kicked_from_the_guild_while_away_is_owed_nothing(
    ada: Member, spy: Watch
) -> None:
    dashboard = await page(spy, ada)
    await away(spy, dashboard)
    broadcast(spy, 1)
    await spy.discord.kick(spy.guild, ada)
    await spy.discord.caught_up()
    assert spy.server.recovery.logs.size == 0
    await dashboard.reconnected()
    assert await dashboard.next("session") == {"recovered": True, "rooms": []}
    await dashboard.quiet("x")


async def test_of_a_hidden_channel_nothing_comes_and_the_rest_recovers(
    ada: Member, spy: Watch
) -> None:
    dashboard = await page(spy, ada)
    await away(spy, dashboard)
    general = spy.guild.general
    broadcast(spy, 1, 3, channel=str(general.id))
    broadcast(spy, 2)
    await spy.discord.channel_update(spy.guild, general, overwrites=hidden_except(spy.guild))
    await spy.discord.caught_up()
    await dashboard.reconnected()
    assert await numbers(dashboard, 1) == [2]
    await dashboard.quiet("x")


async def test_a_token_that_allows_less_recovers_less(spy: Watch) -> None:
    dashboard = await page(spy)
    await away(spy, dashboard)
    broadcast(spy, 1)
    await dashboard.set_auth({"token": spy.token("1")})
    await dashboard.reconnected()
    assert await dashboard.next("session") == {"recovered": True, "rooms": []}


async def test_a_room_that_was_left_stays_left(spy: Watch) -> None:
    dashboard = await page(spy)
    await dashboard.call("unsubscribe:guild", str(spy.guild.id))
    await away(spy, dashboard)
    broadcast(spy, 1)
    await dashboard.reconnected()
    assert await dashboard.next("session") == {"recovered": True, "rooms": []}


async def test_nothing_from_before_a_room_was_entered_is_owed(spy: Watch) -> None:
    dashboard = await page(spy)
    await spy.dashboard(
        extraHeaders=PAGE, kinds=("analytics",)
    )  # the guild has a log for that, too
    broadcast(spy, 1, kind="analytics")
    await dashboard.call("subscribe:analytics", str(spy.guild.id))
    await dashboard.drop()
    await dashboard.reconnected()
    await dashboard.next("session")
    await dashboard.quiet("x")


# ---- what a new subscriber gets


async def test_a_snapshot_that_never_arrived_comes_after_the_return(spy: Watch) -> None:
    said, raw, _ = await bare_page(spy)
    await raw.send("420" + json.dumps(["subscribe:guild", str(spy.guild.id)]))
    await eventually(lambda: spy.server.rooms.has_listeners(f"guild:{spy.guild.id}"))
    await lose(spy, raw)
    for _ in range(5):  # as often as that one is lost, too
        _, back, session = await bare_page(spy, **said)
        assert session == {"recovered": True, "rooms": [f"guild:{spy.guild.id}"]}
        assert str(await back.read()).startswith('42["presence:snapshot"')
        await lose(spy, back)


async def test_who_had_its_snapshot_gets_it_once(spy: Watch) -> None:
    dashboard = await page(spy)
    for _ in range(2):
        await away(spy, dashboard)
        await dashboard.reconnected()
        assert (await dashboard.next("session"))["recovered"]
    await dashboard.quiet("presence:snapshot")


# ---- limits


def test_twenty_busy_guilds_keep_no_more_than_their_bounds() -> None:
    recovery = Recovery(RecoverySettings(), b"key")
    ticket = recovery.issue(Viewer("1", "ADMIN"))
    guilds = [str(number) for number in range(20)]
    for guild_id in guilds:
        recovery.enter(ticket, f"guild:{guild_id}")
    for size in (100, 5_000):
        packet = event_packet("x", {"text": "x" * size})
        for guild_id in guilds * 2_000:
            recovery.logs.add(Destination(guild_id, "guild"), packet)
        assert recovery.logs.size <= 20 * min(MAX_LOG_BYTES, 1_000 * (len(packet) + 40))
    recovery.forget(ticket)
    assert recovery.logs.size == 0


async def test_a_return_replaces_its_half_open_connection(watching: Watching) -> None:
    limits = {"connections_per_ip": 1, "connections_per_viewer": 1}
    async with watching(limits=limits) as spy:
        said, _, _ = await bare_page(spy)
        again, _, _ = await bare_page(spy, **said)
        assert again["pid"] == said["pid"]
        assert len(spy.server.dashboards) == 1


async def test_who_is_back_before_its_lost_connection_is_cleared_away_recovers(spy: Watch) -> None:
    """As on a busy machine, where both are read in one turn of the loop."""
    said, _, _ = await bare_page(spy)
    [lost] = spy.server.socketio.eio.sockets.values()
    back = await spy.raw(headers=PAGE)
    [session] = [one for one in spy.server.socketio.eio.sockets.values() if one is not lost]
    lost.lose()
    await session.feed("40" + json.dumps(said))
    assert json.loads(str(await back.read())[2:])["pid"] == said["pid"]


async def test_metrics_tell_who_recovered_and_why_not(spy: Watch) -> None:
    dashboard = await page(spy)
    await away(spy, dashboard)
    await dashboard.reconnected()
    await dashboard.next("session")
    text = spy.server.metrics.text().decode()
    assert "spywatcher_recovered_clients_total 1.0" in text


# ---- subscriptions that wait for Discord


async def test_who_was_cut_off_while_a_subscription_was_pending_gets_the_room_in_the_end(
    watching: Watching, discord: PretendDiscord, waiting_shard: asyncio.Future[None]
) -> None:
    there = discord.add_guild(guild_id=3 << 22)
    async with watching(ready=False) as spy:
        await discord.wait_for_bot()
        dashboard = await spy.connect(extraHeaders=PAGE, **QUICK)
        answer = await dashboard.call("subscribe:guild", str(there.id))
        assert answer["pending"]
        await away(spy, dashboard)
        await dashboard.reconnected()
        waiting_shard.set_result(None)
        await dashboard.next("presence:snapshot")
        spy.server.node.deliver("x", str(there.id), {"number": 1}, "guild")
        assert await numbers(dashboard, 1) == [1]
