"""The pretend Discord, judged by the real hikari; where hikari never asks, by a bare WebSocket."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import hikari
import pytest
import tornado.websocket
from waiting import PATIENCE, eventually, within

import simulator
from simulator import (
    CloseCode,
    Guild,
    Harness,
    Intent,
    LivelyGuild,
    Permission,
    PretendDiscord,
    PretendShard,
)

ALL = hikari.Intents.ALL
NONE = hikari.Intents.NONE


class Bot(hikari.GatewayBot):
    """A bot that notes every event it gets."""

    def __init__(
        self,
        discord: PretendDiscord,
        intents: hikari.Intents = ALL,
        *,
        token: str | None = None,
    ) -> None:
        super().__init__(
            token or discord.token,
            rest_url=discord.rest_url,
            intents=intents,
            banner=None,
            logs=None,
            suppress_optimization_warning=True,
        )
        self.seen: list[hikari.Event] = []
        self.subscribe(hikari.Event, self._note)

    async def _note(self, event: hikari.Event) -> None:
        self.seen.append(event)

    def all(self, kind: type[Any]) -> list[Any]:
        """The events of that kind, oldest first."""
        return [event for event in self.seen if isinstance(event, kind)]

    async def some(self, kind: type[Any], count: int) -> list[Any]:
        """The events of that kind, once there are that many, which must be all."""
        await eventually(lambda: len(self.all(kind)) >= count)
        events = self.all(kind)
        assert len(events) == count
        return events

    async def one(self, kind: type[Any]) -> Any:
        """The only event of that kind, once it is here."""
        [event] = await self.some(kind, 1)
        return event


@asynccontextmanager
async def watching(
    discord: PretendDiscord, intents: hikari.Intents = ALL, **start: Any
) -> AsyncIterator[Bot]:
    """A bot that is connected and has digested its guilds."""
    bot = Bot(discord, intents)
    await bot.start(check_for_updates=False, **start)
    try:
        await discord.wait_for_bot()
        yield bot
    finally:
        await close(bot)


async def close(bot: Bot) -> None:
    """hikari 2.7 waits for ever where Python 3.11's `wait_for` has swallowed that a shard is to end:
    then the shard is told again.
    """
    closing = asyncio.create_task(bot.close())
    while not (await asyncio.wait([closing], timeout=1.0))[0]:
        for task in asyncio.all_tasks():
            if task.get_name().startswith("keep alive (shard"):
                task.cancel()
    await closing


@pytest.fixture
async def discord() -> AsyncIterator[PretendDiscord]:
    async with PretendDiscord() as running:
        yield running


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare two waits of hikari's that nothing here is about.

    It rests 0.25 s after each closed socket, for the sake of TLS, and a second or two before it
    reconnects when the last attempt was less than 30 s ago.
    """

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0.01 if seconds == 0.25 else seconds)

    hurry = SimpleNamespace(**vars(asyncio) | {"sleep": sleep})
    monkeypatch.setattr("hikari.impl.shard.asyncio", hurry)
    monkeypatch.setattr("hikari.impl.shard._BACKOFF_WINDOW", 0.0)


class Client:
    """A gateway client that says only what a test tells it to."""

    def __init__(self, socket: tornado.websocket.WebSocketClientConnection) -> None:
        self.socket = socket
        self.inflate: Callable[[bytes], bytes] = zlib.decompressobj().decompress

    @classmethod
    @asynccontextmanager
    async def of(
        cls, discord: PretendDiscord, query: str = "v=10&encoding=json"
    ) -> AsyncIterator[Client]:
        client = cls(await tornado.websocket.websocket_connect(f"{discord.gateway_url}?{query}"))
        try:
            yield client
        finally:
            client.socket.close()

    async def say(self, op: int, d: Any = None) -> None:
        await self.socket.write_message(json.dumps({"op": op, "d": d}))

    async def identify(self, discord: PretendDiscord, **more: Any) -> None:
        await self.say(2, {"token": discord.token, "intents": 1, "properties": {}} | more)

    async def hear(self) -> dict[str, Any] | None:
        """The next packet, or None when the socket was closed."""
        async with within(PATIENCE):
            frame = await self.socket.read_message()
        raw = self.inflate(frame) if isinstance(frame, bytes) else frame
        return None if raw is None else json.loads(raw)

    async def close_code(self) -> int | None:
        """What the server closes with, after whatever else it says."""
        while await self.hear() is not None:
            pass
        return self.socket.close_code


# ---- what a bot sees of a guild ----


async def test_hikari_finds_the_whole_guild_in_its_cache(discord: PretendDiscord) -> None:
    guild = discord.add_guild("Night Owls", guild_id=1 << 60, owner_id=77)
    mod = guild.add_role("mod", Permission.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[mod], nick="Countess")
    ada.appear("dnd", ["mobile"], [{"name": "Chess"}])
    thread = guild.add_thread("raid", guild.general)
    async with watching(discord) as bot:
        cached = bot.cache.get_guild(guild.id)
        member = bot.cache.get_member(guild.id, ada.id)
        presence = bot.cache.get_presence(guild.id, ada.id)
        assert cached
        assert cached.name == "Night Owls"
        assert cached.owner_id == 77
        assert member
        assert member.display_name == "Countess"
        assert mod.id in member.role_ids
        assert presence
        assert presence.client_status.mobile == hikari.Status.DO_NOT_DISTURB
        assert bot.cache.get_role(mod.id).permissions == hikari.Permissions.MANAGE_GUILD
        assert bot.cache.get_guild_channel(guild.general.id).name == "general"
        assert bot.cache.get_thread(thread.id).parent_id == guild.general.id
        assert bot.get_me().id == discord.bot_id


async def test_starting_a_bot_takes_one_rest_call_and_one_identify(discord: PretendDiscord) -> None:
    async with watching(discord):
        assert (discord.rest_calls, discord.identifies, discord.resumes) == (1, 1, 0)


async def test_a_guild_made_while_the_bot_is_connected_comes_with_its_members(
    discord: PretendDiscord,
) -> None:
    async with watching(discord) as bot:
        guild = discord.add_guild("Later")
        ada = guild.add_member("ada")
        joined = await bot.one(hikari.GuildJoinEvent)
        assert joined.guild_id == guild.id
        assert ada.id in joined.members


async def test_without_privileged_intents_a_guild_shows_only_the_bot(
    discord: PretendDiscord,
) -> None:
    guild = discord.add_guild()
    guild.add_member("ada").appear("online", ["web"])
    async with watching(discord, hikari.Intents.ALL_UNPRIVILEGED) as bot:
        assert list(bot.cache.get_members_view_for_guild(guild.id)) == [discord.bot_id]
        assert not bot.cache.get_presences_view_for_guild(guild.id)


@pytest.mark.parametrize(
    "intents",
    [ALL, ALL & ~hikari.Intents.GUILD_PRESENCES],
    ids=["with presences", "without presences"],
)
async def test_hikari_chunks_a_large_guild_until_it_knows_everybody(
    discord: PretendDiscord, intents: hikari.Intents
) -> None:
    guild = discord.add_guild()
    people = [guild.add_member(f"owl{number}") for number in range(1200)]
    people[0].appear("online", ["web"])
    async with watching(discord, intents) as bot:
        chunks = await bot.some(hikari.MemberChunkEvent, 2)
        assert [len(chunk.members) for chunk in chunks] == [1000, 202]
        assert len(bot.cache.get_members_view_for_guild(guild.id)) == 1202
        known = bot.cache.get_presences_view_for_guild(guild.id)
        assert (people[0].id in known) == bool(intents & hikari.Intents.GUILD_PRESENCES)


async def test_members_are_found_by_name_and_by_id(discord: PretendDiscord) -> None:
    guild = discord.add_guild()
    ada, _ = guild.add_member("ada"), guild.add_member("grace")
    async with watching(discord) as bot:
        await bot.request_guild_members(guild.id, query="AD", limit=5, nonce="by name")
        await bot.request_guild_members(guild.id, users=[ada.id, 404], nonce="by id")
        by_name, by_id = await bot.some(hikari.MemberChunkEvent, 2)
        assert list(by_name.members) == list(by_id.members) == [ada.id]
        assert by_id.not_found == [404]
        assert by_id.nonce == "by id"


async def test_shards_share_the_guilds_between_them(discord: PretendDiscord) -> None:
    even, odd = discord.add_guild(guild_id=2 << 22), discord.add_guild(guild_id=3 << 22)
    async with watching(discord, shard_count=2) as bot:
        await discord.wait_for_bot(shards=2)
        await discord.message(even, even.owner, even.general)
        await discord.message(odd, odd.owner, odd.general)
        await discord.direct_message(odd.owner)
        events = await bot.some(hikari.MessageCreateEvent, 3)
        shard_of = {event.message.guild_id: event.shard.id for event in events}
        assert shard_of == {even.id: 0, odd.id: 1, None: 0}


# ---- what people do ----

Act = Callable[[PretendDiscord, Guild], Awaitable[object]]
ACTIONS: dict[hikari.Intents, dict[type[hikari.Event], Act]] = {
    hikari.Intents.GUILDS: {
        hikari.RoleCreateEvent: lambda d, g: d.role_create(g, "mod"),
        hikari.RoleUpdateEvent: lambda d, g: d.role_update(g, g.everyone, permissions=0),
        hikari.RoleDeleteEvent: lambda d, g: d.role_delete(g, g.add_role("mod")),
        hikari.GuildChannelCreateEvent: lambda d, g: d.channel_create(g, "art"),
        hikari.GuildChannelUpdateEvent: lambda d, g: d.channel_update(g, g.general, name="x"),
        hikari.GuildChannelDeleteEvent: lambda d, g: d.channel_delete(g, g.general),
        hikari.GuildThreadCreateEvent: lambda d, g: d.thread_create(g, g.general, "raid"),
        hikari.GuildThreadDeleteEvent: lambda d, g: d.thread_delete(
            g, g.add_thread("raid", g.general)
        ),
        hikari.GuildUpdateEvent: lambda d, g: d.guild_update(g, name="new"),
        hikari.GuildLeaveEvent: lambda d, g: d.remove_guild(g),
        hikari.GuildUnavailableEvent: lambda d, g: d.outage(g),
    },
    hikari.Intents.GUILD_MEMBERS: {
        hikari.MemberCreateEvent: lambda d, g: d.join(g, "bob"),
        hikari.MemberDeleteEvent: lambda d, g: d.kick(g, g.owner),
        hikari.MemberUpdateEvent: lambda d, g: d.rename(g, g.owner, nick="boss"),
    },
    hikari.Intents.GUILD_MODERATION: {
        hikari.BanCreateEvent: lambda d, g: d.ban(g, g.owner),
    },
    hikari.Intents.GUILD_VOICE_STATES: {
        hikari.VoiceStateUpdateEvent: lambda d, g: d.voice(g, g.owner, g.general),
    },
    hikari.Intents.GUILD_PRESENCES: {
        hikari.PresenceUpdateEvent: lambda d, g: d.presence(g, g.owner),
    },
    hikari.Intents.GUILD_MESSAGES: {
        hikari.GuildMessageCreateEvent: lambda d, g: d.message(g, g.owner, g.general),
        hikari.GuildMessageDeleteEvent: lambda d, g: d.message_delete(g, g.general, {"id": "5"}),
    },
    hikari.Intents.GUILD_MESSAGE_REACTIONS: {
        hikari.GuildReactionAddEvent: lambda d, g: d.reaction(g, g.owner, g.general),
    },
    hikari.Intents.GUILD_MESSAGE_TYPING: {
        hikari.GuildTypingEvent: lambda d, g: d.typing(g, g.owner, g.general),
    },
    hikari.Intents.DM_MESSAGES: {
        hikari.DMMessageCreateEvent: lambda d, g: d.direct_message(g.owner),
    },
}


async def test_every_action_reaches_hikari_as_its_event(discord: PretendDiscord) -> None:
    actions = {kind: act for group in ACTIONS.values() for kind, act in group.items()}
    async with watching(discord) as bot:
        for kind, act in actions.items():
            await act(discord, discord.add_guild())
            await bot.one(kind)


async def test_an_action_stays_hidden_from_a_bot_that_lacks_its_intent(
    discord: PretendDiscord,
) -> None:
    bots = {intent: Bot(discord, ALL & ~intent) for intent in ACTIONS}
    await asyncio.gather(*(bot.start(check_for_updates=False) for bot in bots.values()))
    await discord.wait_for_bot(shards=len(bots))
    for group in ACTIONS.values():
        for act in group.values():
            await act(discord, discord.add_guild())
    await discord.caught_up()
    await asyncio.gather(*(bot.close() for bot in bots.values()))
    for lacking, group in ACTIONS.items():
        for kind in group:
            assert [intent for intent, bot in bots.items() if not bot.all(kind)] == [lacking]


async def test_content_is_empty_without_its_intent(discord: PretendDiscord) -> None:
    guild = discord.add_guild()
    watcher = guild.members[discord.bot_id]
    async with watching(discord, ALL & ~hikari.Intents.MESSAGE_CONTENT) as bot:
        await discord.message(guild, guild.owner, guild.general, "secret")
        await discord.message(guild, watcher, guild.general, "my own")
        await discord.direct_message(guild.owner, "for you")
        events = await bot.some(hikari.MessageCreateEvent, 3)
        assert [event.message.content for event in events] == [None, "my own", "for you"]


async def test_hikari_tells_people_from_bots_and_webhooks(discord: PretendDiscord) -> None:
    guild = discord.add_guild()
    robot = guild.add_member("robot", bot=True)
    async with watching(discord) as bot:
        await discord.message(guild, guild.owner, guild.general)
        await discord.message(guild, robot, guild.general)
        await discord.message(guild, guild.owner, guild.general, webhook_id=55)
        events = await bot.some(hikari.MessageCreateEvent, 3)
        assert [event.is_human for event in events] == [True, False, False]
        assert events[2].author_id == events[2].message.webhook_id == 55


async def test_a_presence_names_the_devices(discord: PretendDiscord) -> None:
    guild = discord.add_guild()
    async with watching(discord) as bot:
        await discord.presence(guild, guild.owner, "idle", ["desktop", "mobile"])
        await discord.presence(guild, guild.owner, "online", {"web": "dnd"})
        await discord.presence(guild, guild.owner, "offline")
        events = await bot.some(hikari.PresenceUpdateEvent, 3)
        devices = [event.presence.client_status for event in events]
        assert [d.desktop for d in devices] == ["idle", "offline", "offline"]
        assert [d.web for d in devices] == ["offline", "dnd", "offline"]
        assert events[1].old_presence.visible_status == "idle"


async def test_roles_gained_and_lost_show_in_the_old_and_the_new_member(
    discord: PretendDiscord,
) -> None:
    guild = discord.add_guild()
    mod = guild.add_role("mod")
    async with watching(discord) as bot:
        await discord.add_role(guild, guild.owner, mod)
        await discord.remove_role(guild, guild.owner, mod)
        await discord.set_roles(guild, guild.owner, mod)
        events = await bot.some(hikari.MemberUpdateEvent, 3)
        changes = [(mod.id in e.old_member.role_ids, mod.id in e.member.role_ids) for e in events]
        assert changes == [(False, True), (True, False), (False, True)]


async def test_a_private_channel_denies_the_view_to_everyone_else(discord: PretendDiscord) -> None:
    guild = discord.add_guild()
    staff = guild.add_role("staff")
    guild.add_channel("office", overwrites=simulator.hidden_except(guild, staff, guild.owner))
    async with watching(discord) as bot:
        channels = bot.cache.get_guild_channels_view_for_guild(guild.id).values()
        [office] = [channel for channel in channels if channel.name == "office"]
        view = hikari.Permissions.VIEW_CHANNEL
        assert office.permission_overwrites[guild.id].deny == view
        assert office.permission_overwrites[staff.id].allow == view
        assert office.permission_overwrites[guild.owner_id].allow == view


async def test_a_new_account_name_shows_in_every_guild(discord: PretendDiscord) -> None:
    one, two = discord.add_guild("one"), discord.add_guild("two")
    ada = one.add_member("ada")
    two.add_member("ada", user=ada.user)
    async with watching(discord) as bot:
        await discord.rename(one, ada, name="lovelace")
        await bot.some(hikari.MemberUpdateEvent, 2)
        assert bot.cache.get_member(two.id, ada.id).username == "lovelace"


async def test_a_guild_comes_back_after_an_outage(discord: PretendDiscord) -> None:
    guild = discord.add_guild()
    async with watching(discord) as bot:
        await discord.outage(guild)
        await bot.one(hikari.GuildUnavailableEvent)
        assert not bot.cache.get_available_guild(guild.id)
        await discord.outage_over(guild)
        await eventually(lambda: bot.cache.get_available_guild(guild.id))


# ---- what goes wrong ----


async def test_a_wrong_token_gets_401(discord: PretendDiscord) -> None:
    bot = Bot(discord, token=simulator.make_token(discord.bot_id))
    with pytest.raises(hikari.UnauthorizedError, match="401: Unauthorized"):
        await bot.start(check_for_updates=False)
    await bot.close()


async def test_an_intent_that_the_portal_has_off_ends_the_start_with_4014() -> None:
    async with PretendDiscord(allowed_privileged=Intent.GUILD_MEMBERS) as discord:
        bot = Bot(discord, hikari.Intents.GUILDS | hikari.Intents.GUILD_PRESENCES)
        with pytest.raises(hikari.GatewayServerClosedConnectionError) as refused:
            await bot.start(check_for_updates=False)
        await bot.close()
        assert (refused.value.code, refused.value.can_reconnect) == (4014, False)


@pytest.mark.logs("ERROR asyncio: shard 0 raised an exception during shut down")
async def test_a_token_that_was_reset_ends_a_running_bot_with_4004(discord: PretendDiscord) -> None:
    async with watching(discord) as bot:
        discord.token = simulator.make_token(discord.bot_id)
        await discord.drop()
        with pytest.raises(hikari.GatewayServerClosedConnectionError) as refused:
            await bot.join()
        assert refused.value.code == CloseCode.AUTHENTICATION_FAILED


@pytest.mark.parametrize(
    "fault",
    [
        PretendDiscord.drop,
        PretendDiscord.reconnect,
        lambda discord: discord.invalidate(resumable=True),
        pytest.param(
            lambda discord: discord.drop(None),
            marks=pytest.mark.logs("WARNING hikari.gateway.0: failed to communicate"),
        ),
    ],
    ids=["close 4000", "op 7", "op 9 resumable", "cut cable"],
)
async def test_a_bot_resumes_and_gets_what_it_missed_once(
    discord: PretendDiscord, fault: Callable[[PretendDiscord], Awaitable[None]]
) -> None:
    guild = discord.add_guild()
    async with watching(discord) as bot:
        await fault(discord)
        assert not discord.connected
        await discord.message(guild, guild.owner, guild.general, "missed")
        await discord.wait_for_bot()
        await discord.message(guild, guild.owner, guild.general, "live")
        events = await bot.some(hikari.MessageCreateEvent, 2)
        assert [event.message.content for event in events] == ["missed", "live"]
        assert (discord.identifies, discord.resumes) == (1, 1)


async def test_after_a_lost_session_the_bot_identifies_and_what_it_missed_is_gone(
    discord: PretendDiscord,
) -> None:
    guild = discord.add_guild()
    async with watching(discord) as bot:
        await discord.invalidate()
        await discord.message(guild, guild.owner, guild.general, "missed")
        await discord.wait_for_bot()
        await discord.message(guild, guild.owner, guild.general, "live")
        event = await bot.one(hikari.MessageCreateEvent)
        assert event.content == "live"
        assert (discord.identifies, discord.resumes) == (2, 0)


@pytest.mark.logs("ERROR hikari.gateway.0: connection has not received a HEARTBEAT_ACK")
async def test_a_frozen_gateway_is_left_and_resumed() -> None:
    async with PretendDiscord(heartbeat_interval=0.1) as discord, watching(discord):
        discord.freeze()
        await discord.wait_until(lambda: not discord.connected)
        discord.thaw()
        await discord.wait_for_bot()
        assert discord.resumes >= 1


@pytest.mark.logs("WARNING hikari.gateway.0: failed to communicate")
async def test_a_bot_finds_its_way_back_after_connections_were_refused(
    discord: PretendDiscord, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(discord):
        port = discord.port
        await discord.refuse()
        await discord.drop()
        await eventually(lambda: "failed to communicate" in caplog.text)
        await discord.accept()
        await discord.wait_for_bot()
        assert (discord.port, discord.resumes) == (port, 1)


@pytest.mark.logs("WARNING hikari.gateway.0: failed to communicate")
async def test_discord_may_go_away_while_a_bot_is_connected(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with PretendDiscord() as discord:
        bot = Bot(discord)
        await bot.start(check_for_updates=False)
    await eventually(lambda: "failed to communicate" in caplog.text)
    await bot.close()


async def test_a_bot_that_said_goodbye_leaves_no_session(discord: PretendDiscord) -> None:
    async with watching(discord):
        assert discord.connected
    await discord.wait_until(lambda: not discord.sockets)
    assert not discord.sessions


# ---- REST ----


async def test_rest_answers_what_the_state_holds(discord: PretendDiscord) -> None:
    guild = discord.add_guild("Night Owls")
    async with watching(discord) as bot:
        assert (await bot.rest.fetch_my_user()).id == discord.bot_id
        application = await bot.rest.fetch_application()
        assert application.approximate_guild_count == 1
        assert hikari.ApplicationFlags.GUILD_MEMBERS_INTENT in application.flags
        assert (await bot.rest.fetch_user(guild.owner_id)).username == "owner"
        assert (await bot.rest.fetch_member(guild.id, guild.owner_id)).id == guild.owner_id
        assert (await bot.rest.fetch_channel(guild.general.id)).name == "general"
        assert len(await bot.rest.fetch_roles(guild.id)) == 2
        with pytest.raises(hikari.NotFoundError, match="Unknown Channel") as missing:
            await bot.rest.fetch_channel(5)
        assert missing.value.code == 10003


async def test_an_unknown_route_gets_404_and_a_wrong_method_405(discord: PretendDiscord) -> None:
    headers = {"Authorization": f"Bot {discord.token}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.get(f"{discord.rest_url}/nowhere") as answer:
            assert (answer.status, await answer.json()) == (
                404,
                {"message": "404: Not Found", "code": 0},
            )
        async with session.delete(f"{discord.rest_url}/gateway") as answer:
            assert (answer.status, (await answer.json())["code"]) == (405, 0)


async def test_where_the_gateway_is_may_be_asked_without_a_token(discord: PretendDiscord) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{discord.rest_url}/gateway") as answer:
            assert await answer.json() == {"url": discord.gateway_url}
        async with session.get(f"{discord.rest_url}/gateway/bot") as answer:
            assert answer.status == 401


async def test_lists_come_in_pages_and_refusals_have_discords_numbers(
    discord: PretendDiscord,
) -> None:
    guild = discord.add_guild()
    by_id = sorted([guild.owner_id, discord.bot_id])
    headers = {"Authorization": f"Bot {discord.token}"}
    members, messages = f"/guilds/{guild.id}/members", f"/channels/{guild.general.id}/messages"
    async with aiohttp.ClientSession(headers=headers) as session:

        async def ask(method: str, path: str, body: Any = None) -> Any:
            async with session.request(method, discord.rest_url + path, json=body) as answer:
                return await answer.json()

        first = await ask("GET", f"{members}?limit=1")
        rest = await ask("GET", f"{members}?limit=5&after={by_id[0]}")
        assert [int(m["user"]["id"]) for m in first + rest] == by_id
        assert (await ask("GET", f"{members}?limit=1001"))["code"] == 50035
        assert (await ask("POST", messages, {"content": ""}))["code"] == 50006
        discord.allowed_privileged = 0
        assert (await ask("GET", members))["code"] == 50001


# ---- the gateway's own rules ----


@pytest.mark.parametrize(
    ("query", "packets", "code"),
    [
        ("v=10", [(99, None)], CloseCode.UNKNOWN_OPCODE),
        ("v=10", [(2, {"token": 1})], CloseCode.DECODE_ERROR),
        ("v=10", [(8, {"guild_id": "1"})], CloseCode.NOT_AUTHENTICATED),
        ("v=10", [(2, {"token": "wrong"})], CloseCode.AUTHENTICATION_FAILED),
        ("v=10", [(2, {}), (2, {})], CloseCode.ALREADY_AUTHENTICATED),
        ("v=10", [(2, {"shard": [2, 2]})], CloseCode.INVALID_SHARD),
        ("v=10", [(2, {"intents": 1 << 30})], CloseCode.INVALID_INTENT),
        ("v=10", [(1, "x" * 4096)], CloseCode.DECODE_ERROR),
        ("v=10", [(1, None)] * 121, CloseCode.RATE_LIMITED),
        ("v=9", [], CloseCode.INVALID_VERSION),
        ("v=10&encoding=etf", [], CloseCode.DECODE_ERROR),
        ("v=10&compress=foo", [], CloseCode.DECODE_ERROR),
    ],
)
async def test_a_client_that_breaks_the_rules_is_closed_with_discords_code(
    discord: PretendDiscord, query: str, packets: list[tuple[int, Any]], code: CloseCode
) -> None:
    async with Client.of(discord, query) as client:
        for op, d in packets:
            await (client.identify(discord, **d) if op == 2 else client.say(op, d))
        assert await client.close_code() == code


async def test_what_is_not_spoken_here_is_named(discord: PretendDiscord) -> None:
    async with Client.of(discord, "v=10&encoding=etf") as client:
        await client.close_code()
        assert client.socket.close_reason == "No encoding etf here, only json."


async def test_a_client_without_heartbeats_loses_connection_and_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulator, "HEARTBEAT_GRACE", 0.2)
    async with PretendDiscord(heartbeat_interval=0.1) as discord, Client.of(discord) as client:
        await client.identify(discord)
        assert await client.close_code() == CloseCode.SESSION_TIMEOUT
        assert not discord.sessions


async def test_after_an_invalid_session_the_same_connection_may_identify_again(
    discord: PretendDiscord,
) -> None:
    async with Client.of(discord) as client:
        await client.hear()
        await client.identify(discord)
        await client.hear()
        await discord.invalidate()
        assert (await client.hear())["op"] == 9
        await client.identify(discord)
        assert (await client.hear())["t"] == "READY"


@pytest.mark.parametrize("query", ["", "&compress=zlib-stream"])
async def test_packets_travel_plain_or_in_one_zlib_stream(
    discord: PretendDiscord, query: str
) -> None:
    async with Client.of(discord, f"v=10{query}") as client:
        assert (await client.hear())["op"] == 10
        await client.identify(discord)
        assert (await client.hear())["t"] == "READY"


async def test_each_packet_is_compressed_by_itself_when_identify_asks_for_it(
    discord: PretendDiscord,
) -> None:
    async with Client.of(discord) as client:
        await client.hear()
        client.inflate = zlib.decompress
        await client.identify(discord, compress=True)
        assert (await client.hear())["t"] == "READY"


async def test_resuming_from_the_future_is_refused_and_an_unknown_session_invalid(
    discord: PretendDiscord,
) -> None:
    async with Client.of(discord) as first:
        await first.hear()
        await first.identify(discord)
        session_id = (await first.hear())["d"]["session_id"]
        resume = {"token": discord.token, "session_id": session_id, "seq": 99}
        async with Client.of(discord) as ahead, Client.of(discord) as lost:
            await ahead.say(6, resume)
            assert await ahead.close_code() == CloseCode.INVALID_SEQ
            await lost.hear()
            await lost.say(6, resume | {"session_id": "unknown"})
            assert await lost.hear() == {"op": 9, "d": False, "s": None, "t": None}


# ---- ids, tokens, payloads ----


def test_the_map_at_the_top_lists_the_sections_in_their_order() -> None:
    listed = (simulator.__doc__ or "").partition("those above it:\n")[2]
    banners = re.findall(r"^# ---- (.+) ----$", Path(simulator.__file__).read_text(), re.M)
    assert re.findall(r"^    (\S.*?)  ", listed, re.M) == banners


def test_a_snowflake_carries_the_moment_it_was_made() -> None:
    moment = datetime(2020, 2, 2, 20, 20, tzinfo=UTC)
    assert hikari.Snowflake(simulator.snowflake(moment)).created_at == moment


def test_a_token_names_its_bot_and_nonsense_is_refused() -> None:
    assert PretendDiscord(token=simulator.make_token(4321)).bot_id == 4321
    with pytest.raises(ValueError, match="base64 of the bot's id"):
        PretendDiscord(token="nonsense")


async def test_payloads_feed_hikari_without_any_network(discord: PretendDiscord) -> None:
    bot, guild = Bot(discord), simulator.make_guild("Offline", bot=discord.bot)
    shard: Any = PretendShard(discord.bot_id)
    feed = bot.event_manager.consume_raw_event
    feed("GUILD_CREATE", shard, simulator.guild_create_json(guild))
    feed("MESSAGE_CREATE", shard, simulator.message_json(guild, guild.owner, guild.general, "hi"))
    event = await bot.one(hikari.GuildMessageCreateEvent)
    assert event.content == "hi"
    assert event.get_guild().name == "Offline"


# ---- a lively guild ----


class Diary(PretendDiscord):
    """Writes down what would be dispatched; no bot is needed to watch a story."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[str, dict[str, Any]]] = []

    async def dispatch(
        self, name: str, data: dict[str, Any], *, guild_id: int | None = None
    ) -> None:
        self.entries.append((name, data))

    async def watch(self, lively: LivelyGuild, until: Callable[[], bool]) -> None:
        playing = asyncio.create_task(lively.play(rate=5000))
        await eventually(until)
        playing.cancel()

    def who(self, name: str) -> set[int]:
        """The members in the events of that name."""
        users = [
            data.get("author") or data.get("user") or data for n, data in self.entries if n == name
        ]
        return {int(user.get("id") or user["user_id"]) for user in users}


async def test_a_deck_of_a_lively_guild_holds_a_bit_of_everything() -> None:
    diary = Diary()
    await LivelyGuild(diary).warm_up(110)
    assert {name for name, _ in diary.entries} >= {
        *("MESSAGE_CREATE", "MESSAGE_UPDATE", "MESSAGE_DELETE", "MESSAGE_REACTION_ADD"),
        *("TYPING_START", "PRESENCE_UPDATE", "VOICE_STATE_UPDATE", "THREAD_CREATE"),
        *("GUILD_MEMBER_ADD", "GUILD_MEMBER_UPDATE", "GUILD_MEMBER_REMOVE"),
    }
    shown = [data for name, data in diary.entries if name == "PRESENCE_UPDATE"]
    assert {data["status"] for data in shown} == {"online", "idle", "dnd", "offline"}
    assert {device for data in shown for device in data["client_status"]} == {*simulator.DEVICES}


async def test_a_lively_guild_goes_on_for_hours_and_does_not_grow() -> None:
    diary = Diary()
    lively = LivelyGuild(diary)
    before = len(lively.guild.members)
    await lively.warm_up(20_000)
    assert abs(len(lively.guild.members) - before) <= 2
    assert len(lively.guild.threads) <= 4


@pytest.mark.parametrize("seed", range(5))
def test_each_event_of_the_shipped_plugins_comes_within_a_minute(seed: int) -> None:
    names = ("messages.py", "presence.py", "members.py", "analytics", "history.py")
    with Harness(*(Path(simulator.__file__).parent / "plugins" / name for name in names)) as h:
        h.run(LivelyGuild(h.discord, seed=seed).warm_up(5 * 60))
        events = frozenset().union(*(plugin.events for plugin in h.host.plugins.values()))
        greetings = {one.event for one in h.subscribe()}
        assert {one.event for one in h.emitted} | greetings == events


async def test_ghosts_never_write_and_lurkers_never_type() -> None:
    diary = Diary()
    lively = LivelyGuild(diary)
    await diary.watch(lively, lambda: len(diary.entries) > 300)
    ghosts, lurkers = ({m.id for m in group} for group in (lively.ghosts, lively.lurkers))
    assert ghosts & diary.who("TYPING_START")
    assert lurkers & diary.who("PRESENCE_UPDATE")
    assert not ghosts & diary.who("MESSAGE_CREATE")
    assert not lurkers & (diary.who("TYPING_START") | diary.who("MESSAGE_CREATE"))


def test_the_past_of_a_lively_guild_is_plausible() -> None:
    hours = list(simulator.past_hours(random.Random(1), members=60))
    assert [one.hour for one in hours] == list(range(hours[0].hour, hours[0].hour + 4 * 7 * 24))
    assert all(one.active <= one.online <= 60 and one.active <= one.messages for one in hours)
    by_hour = [sum(one.messages for one in hours if one.hour % 24 == h) for h in range(24)]
    busiest, now = by_hour.index(max(by_hour)), hours[-1].hour + 1
    assert (busiest - now + 2) % 24 <= 4
    assert sum(by_hour) > 10_000
    assert sum(one.joins for one in hours) > sum(one.leaves for one in hours) > 0


async def test_the_same_seed_tells_the_same_story() -> None:
    def names(seed: int) -> list[str]:
        guild = LivelyGuild(PretendDiscord(), members=20, seed=seed).guild
        return [member.name for member in guild.members.values()]

    assert names(1) == names(1) != names(2)


async def test_the_program_prints_where_to_connect_and_stops_on_sigterm() -> None:
    program = [sys.executable, "-W", "error", simulator.__file__, "--port", "0", "--members", "8"]
    process = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    rest_url, token = [(await process.stdout.readline()).decode().split('"')[1] for _ in range(2)]
    bot = hikari.GatewayBot(
        token, rest_url=rest_url, banner=None, logs=None, suppress_optimization_warning=True
    )
    await bot.start(check_for_updates=False)
    await eventually(lambda: any(bot.cache.get_guilds_view().values()))
    await bot.close()
    process.send_signal(signal.SIGTERM)
    await process.stdout.read()
    assert await process.wait() == 0
