"""What a viewer may see, as Discord's permissions change under a live dashboard.

First each rule over the wire, then random histories judged by an oracle that knows
nothing of the code: it is written from Discord's documentation (Topics: Permissions).
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import hikari
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from length import length
from service import CROWD, ROOT, SECRET
from waiting import eventually

import simulator
import spywatcher
from simulator import (
    Channel,
    Guild,
    Overwrite,
    Permission,
    PretendShard,
    Thread,
    hidden_except,
    iso,
)
from spywatcher import Keys, Server, parse_settings

VIEW = Permission.VIEW_CHANNEL
MANAGE = Permission.MANAGE_GUILD
SOON = 1.0
"""Seconds within which a lost right has to show."""


def lost(guild):
    message = f"Access to guild {guild.id} was lost"
    return {"message": message, "code": "forbidden"}


async def write(spy, place=None):
    await spy.discord.message(spy.guild, spy.guild.owner, place or spy.guild.general)


@pytest.fixture
def staff(guild):
    return guild.add_role("Staff", MANAGE)


@pytest.fixture
def ada(guild, staff):
    return guild.add_member("ada", roles=[staff])


# ---- losing the guild


async def lose_role(spy, ada, staff):
    await spy.discord.remove_role(spy.guild, ada, staff)


async def role_loses_permission(spy, ada, staff):
    await spy.discord.role_update(spy.guild, staff, permissions=VIEW)


async def role_is_deleted(spy, ada, staff):
    await spy.discord.role_delete(spy.guild, staff)


async def is_kicked(spy, ada, staff):
    await spy.discord.kick(spy.guild, ada)


async def bot_is_removed(spy, ada, staff):
    await spy.discord.remove_guild(spy.guild)


async def is_timed_out(spy, ada, staff):
    body = simulator.member_add_json(spy.guild, ada)
    body["communication_disabled_until"] = iso(simulator.days_ago(-1))
    await spy.discord.dispatch("GUILD_MEMBER_UPDATE", body)


async def loses_it_in_an_outage(spy, ada, staff):
    await spy.discord.outage(spy.guild)
    ada.role_ids.clear()
    await spy.discord.outage_over(spy.guild)


async def loses_it_between_sessions(spy, ada, staff):
    ada.role_ids.clear()
    await spy.discord.invalidate()


async def guild_is_lost_between_sessions(spy, ada, staff):
    del spy.discord.guilds[spy.guild.id]
    await spy.discord.invalidate()


LOSSES = [
    lose_role,
    role_loses_permission,
    role_is_deleted,
    is_kicked,
    bot_is_removed,
    is_timed_out,
    loses_it_in_an_outage,
    loses_it_between_sessions,
    guild_is_lost_between_sessions,
]


@pytest.mark.logs("not connected to Discord", required=False)
@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
async def test_who_loses_the_right_leaves_the_room_and_is_told(watching, ada, staff, lose):
    async with watching() as spy:
        dashboard = await spy.dashboard(ada)
        await lose(spy, ada, staff)
        between_sessions = lose.__name__.endswith("sessions")
        assert await dashboard.next("error", 8 if between_sessions else SOON) == lost(spy.guild)
        if spy.guild.id in spy.discord.guilds:
            await write(spy)
        await spy.nothing(dashboard)
        assert not list(spy.server.rooms.names())


async def test_an_owner_who_hands_the_guild_over_leaves(watching, guild):
    bob = guild.add_member("bob")
    async with watching() as spy:
        old = await spy.dashboard(guild.owner)
        await spy.discord.guild_update(guild, owner=bob)
        assert await old.next("error", SOON) == lost(guild)
        await spy.dashboard(bob)


async def test_an_admin_leaves_only_when_the_bot_does(watching, guild, staff):
    async with watching() as spy:
        dashboard = await spy.dashboard()
        await spy.discord.role_delete(guild, staff)
        await spy.discord.outage(guild)
        await spy.discord.outage_over(guild)
        await spy.nothing(dashboard)
        await spy.discord.remove_guild(guild)
        assert await dashboard.next("error", SOON) == lost(guild)


async def test_a_claim_holds_whatever_becomes_of_roles(watching, guild, ada, staff):
    async with watching() as spy:
        token = spy.token(ada, guilds=[str(guild.id)])
        dashboard = await spy.js.connect(spy.url, token=token)
        await dashboard.call("subscribe:guild", str(guild.id))
        await spy.discord.role_delete(guild, staff)
        await write(spy)
        await dashboard.next("message:new")


async def test_owners_and_administrators_need_no_viewer_permission(watching, guild):
    boss = guild.add_member("boss", roles=[guild.add_role("Boss", Permission.ADMINISTRATOR)])
    async with watching(auth={"viewer_permissions": []}) as spy:
        await spy.dashboard(boss)
        await spy.dashboard(guild.owner)


async def test_a_member_who_gains_the_right_may_subscribe_at_once(watching, guild, staff):
    bob = guild.add_member("bob")
    async with watching() as spy:
        dashboard = await spy.connect(bob)
        assert not (await dashboard.call("subscribe:guild", str(guild.id)))["ok"]
        await spy.discord.add_role(guild, bob, staff)
        await spy.discord.caught_up()
        assert (await dashboard.call("subscribe:guild", str(guild.id)))["ok"]


@pytest.mark.parametrize("guild_id", ["0", "18446744073709551616", "99999999999999999999"])
async def test_an_id_that_no_guild_has_is_forbidden(spy, guild_id):
    dashboard = await spy.connect()
    assert (await dashboard.call("subscribe:guild", guild_id))["error"]["code"] == "forbidden"


@pytest.mark.parametrize("guild_id", ["٣", "²", "007", "1_0", "+1", "\ud800", "1\u202e"])
async def test_a_number_that_discord_never_writes_is_no_guild_id(spy, guild_id):
    dashboard = await spy.connect()
    answer = await dashboard.call("subscribe:guild", guild_id)
    assert answer["error"]["code"] == "invalid_guild"
    assert "\u202e" not in answer["error"]["message"]


# ---- while the cache is refilled


def member_chunk(guild, nonce, index=0, count=1, members=()):
    return {
        "guild_id": str(guild.id),
        "members": [member.to_json() for member in members],
        "chunk_index": index,
        "chunk_count": count,
        "nonce": nonce,
    }


class Nobody(PretendShard):
    """A shard that remembers what hikari asks it for and answers nothing."""

    shard_count = 1

    def __init__(self, bot_id: int) -> None:
        super().__init__(bot_id)
        self.asked: list[dict[str, Any]] = []

    async def request_guild_members(self, *_: Any, **about: Any) -> None:
        self.asked.append(about)


@pytest.fixture
def refill(guild, ada):
    """A server without network, whose guild's members are still coming."""
    return Refill(guild, ada)


class Refill:
    def __init__(self, guild: Guild, ada: simulator.Member) -> None:
        self.guild, self.ada = guild, ada
        self.server = offline_server(guild.bot_id)
        self.shard = Nobody(guild.bot_id)
        self.access = self.server.access
        self.viewer = spywatcher.Viewer(str(ada.id), "USER")

    @property
    def may_view(self) -> bool | None:
        return self.access.may_view(self.viewer, str(self.guild.id))

    async def feed(self, name: str, payload: Any) -> None:
        self.server.gateway.bot.event_manager.consume_raw_event(name, self.shard, payload)
        await settle()

    async def begin(self) -> str:
        self.access.begin([self.guild.id], spywatcher.ShardRange(0, 1))
        members = self.guild.members
        self.guild.members = {self.guild.bot_id: members[self.guild.bot_id]}
        await self.feed("GUILD_CREATE", simulator.guild_create_json(self.guild) | {"large": True})
        self.guild.members = members
        assert self.may_view is None
        nonce: str = self.shard.asked[0]["nonce"]
        return nonce


async def test_before_the_first_session_nothing_is_known(refill):
    assert refill.may_view is None


async def test_members_who_are_still_coming_are_neither_in_nor_out(refill):
    nonce = await refill.begin()
    await refill.feed("GUILD_MEMBERS_CHUNK", member_chunk(refill.guild, nonce, 0, 2))
    assert refill.may_view is None
    last = member_chunk(refill.guild, nonce, 1, 2, [refill.ada])
    await refill.feed("GUILD_MEMBERS_CHUNK", last)
    assert refill.may_view is True


async def test_who_has_not_come_with_the_last_members_is_no_member(refill):
    nonce = await refill.begin()
    await refill.feed("GUILD_MEMBERS_CHUNK", member_chunk(refill.guild, nonce))
    assert refill.may_view is False


async def test_members_that_somebody_else_asked_for_complete_nothing(refill):
    await refill.begin()
    await refill.feed("GUILD_MEMBERS_CHUNK", member_chunk(refill.guild, "a plugin's"))
    assert refill.may_view is None


async def test_who_leaves_while_members_are_coming_is_out(refill):
    await refill.begin()
    left = simulator.member_remove_json(refill.guild, refill.ada)
    await refill.feed("GUILD_MEMBER_REMOVE", left)
    assert refill.may_view is False


async def test_who_has_come_already_is_judged_by_the_roles(refill):
    nonce = await refill.begin()
    first = member_chunk(refill.guild, nonce, 0, 2, [refill.ada])
    await refill.feed("GUILD_MEMBERS_CHUNK", first)
    assert refill.may_view is True
    refill.ada.role_ids.clear()
    changed = simulator.member_add_json(refill.guild, refill.ada)
    await refill.feed("GUILD_MEMBER_UPDATE", changed)
    assert refill.may_view is False


async def test_members_are_asked_for_again_after_a_resume(refill):
    nonce = await refill.begin()
    manager = refill.server.gateway.bot.event_manager
    manager.dispatch(hikari.ShardResumedEvent(app=refill.server.gateway.bot, shard=refill.shard))
    await settle()
    assert refill.shard.asked[-1]["nonce"] == nonce


async def test_a_subscription_waits_for_a_shard_that_is_not_there_yet(
    watching, discord, waiting_shard
):
    here, there = discord.add_guild(guild_id=2 << 22), discord.add_guild(guild_id=3 << 22)
    async with watching() as spy:
        dashboard = await spy.connect()
        assert (await dashboard.call("subscribe:guild", str(here.id)))["ok"]
        room = f"guild:{there.id}"
        answer = await dashboard.call("subscribe:guild", str(there.id), timeout=1)
        assert answer == {"ok": True, "room": room, "pending": True}
        waiting_shard.set_result(None)
        await eventually(lambda: spy.server.rooms.has_listeners(room))


async def test_with_all_shards_there_an_unknown_guild_is_forbidden_at_once(
    watching, discord, waiting_shard
):
    waiting_shard.set_result(None)
    async with watching() as spy:
        await discord.wait_for_bot(shards=2)
        dashboard = await spy.connect()
        for guild_id in (4 << 22, 5 << 22):
            answer = await dashboard.call("subscribe:guild", str(guild_id), timeout=1)
            assert answer["error"]["code"] == "forbidden"


@pytest.mark.logs("not connected to Discord", required=False)
async def test_nobody_is_thrown_out_by_a_new_session(watching, guild, ada):
    async with watching() as spy:
        dashboard = await spy.dashboard(ada)
        await spy.discord.invalidate()
        await spy.discord.wait_for_bot()
        await write(spy)
        await dashboard.next("message:new", 8)
        assert dashboard.received("error") == []


# ---- channels


CHANNELS = {
    "open": (lambda g, a, s: [], True),
    "denied to everyone": (lambda g, a, s: hidden_except(g), False),
    "allowed to the role": (lambda g, a, s: hidden_except(g, s), True),
    "allowed to the member": (lambda g, a, s: hidden_except(g, a), True),
    "denied to the role": (lambda g, a, s: [Overwrite(s.id, deny=VIEW)], False),
    "member before role": (
        lambda g, a, s: [Overwrite(s.id, deny=VIEW), Overwrite(a.id, allow=VIEW, member=True)],
        True,
    ),
    "denied to the member": (lambda g, a, s: [Overwrite(a.id, deny=VIEW, member=True)], False),
    "allow before deny among roles": (
        lambda g, a, s: [Overwrite(s.id, deny=VIEW), Overwrite(a.role_ids[1], allow=VIEW)],
        True,
    ),
}


@pytest.mark.parametrize(("overwrites", "visible"), CHANNELS.values(), ids=CHANNELS)
async def test_channel_events_follow_the_overwrites(
    watching, guild, ada, staff, overwrites, visible
):
    ada.role_ids.append(guild.add_role("Second").id)
    channel = guild.add_channel("secret", overwrites=overwrites(guild, ada, staff))
    thread = guild.add_thread("below", channel)
    async with watching() as spy:
        dashboard, admin = await spy.dashboard(ada), await spy.dashboard()
        owner = await spy.dashboard(guild.owner)
        for place in (channel, thread, guild.general):
            await write(spy, place)
        await spy.nothing(dashboard, "error")
        expected = 3 if visible else 1
        await eventually(lambda: len(admin.received("message:new")) == 3)
        await eventually(lambda: len(owner.received("message:new")) == 3)
        assert len(dashboard.received("message:new")) == expected


async def test_a_change_of_overwrites_counts_from_the_next_message(watching, guild, ada):
    async with watching() as spy:
        dashboard = await spy.dashboard(ada)
        await write(spy)
        await dashboard.next("message:new")
        await spy.discord.channel_update(guild, guild.general, overwrites=hidden_except(guild))
        await write(spy)
        await spy.nothing(dashboard)
        await spy.discord.channel_update(guild, guild.general, overwrites=[])
        await write(spy)
        await dashboard.next("message:new")


async def test_who_joins_a_room_later_is_judged_too(watching, guild, ada):
    """What was worked out for those in the room says nothing of who comes after them."""
    guild.general.overwrites = hidden_except(guild)
    async with watching() as spy:
        admin = await spy.dashboard()
        await write(spy)
        await admin.next("message:new")
        dashboard = await spy.dashboard(ada)
        await write(spy)
        await admin.next("message:new")
        await spy.nothing(dashboard)


async def test_a_private_thread_is_for_those_who_manage_threads(watching, guild, ada, staff):
    thread = guild.add_thread("private", guild.general)
    async with watching() as spy:
        dashboard, admin = await spy.dashboard(ada), await spy.dashboard()
        private = {"type": 12, "newly_created": True}
        await spy.discord.dispatch("THREAD_CREATE", thread.to_json() | private)
        await write(spy, thread)
        await admin.next("message:new")
        await spy.nothing(dashboard)
        powers = MANAGE | VIEW | hikari.Permissions.MANAGE_THREADS
        await spy.discord.role_update(guild, staff, permissions=powers)
        await write(spy, thread)
        await dashboard.next("message:new")


async def test_channel_visibility_can_be_switched_off(watching, guild, ada):
    guild.general.overwrites = hidden_except(guild)
    async with watching(auth={"channel_visibility": False}) as spy:
        dashboard = await spy.dashboard(ada)
        await write(spy)
        await dashboard.next("message:new")


async def test_an_event_costs_no_permission_computation_per_viewer(watching, guild, ada):
    async with watching() as spy:
        dashboard = await spy.dashboard(ada)
        await write(spy)
        await dashboard.next("message:new")
        asked = []
        spy.server.access.may_see = lambda *about: asked.append(about)
        await write(spy)
        await dashboard.next("message:new")
        assert asked == []


# ---- random histories


def offline_server(bot_id: int) -> Server:
    """A server that is driven by hand: its guard and rooms hear hikari, nothing listens or connects."""
    limits = CROWD | {"events_per_connection": "1000000/second"}
    limits |= {"connections_per_viewer": 1_000_000}
    tables = {"limits": limits, "plugins": {"disabled": ["analytics", "history"]}}
    settings = parse_settings(tables, ROOT)
    token = simulator.make_token(bot_id)
    server = Server(settings, keys=Keys(secrets=(SECRET,)), token=token)
    server.rights.subscribe(server.gateway.bot.event_manager)
    return server


async def begin_offline(server: Server) -> None:
    """Its shard has said that there are no guilds yet, and its plugins are at work."""
    server.access.begin([], spywatcher.ShardRange(0, 1))
    await server.plugins.start()


async def settle() -> None:
    """Let everything run that is ready to."""
    for _ in range(6):
        await asyncio.sleep(0)


class Ear:
    """A viewer who polls: what is sent to it waits until it is taken."""

    def __init__(self, server: Server, viewer_id: int, role: str, guilds: list[str]) -> None:
        self.server, self.id = server, viewer_id
        self.token = server.tokens.issue(str(viewer_id), role, guilds)
        self.role, self.guilds = role, guilds
        self.inside = False

    async def connect(self) -> None:
        self.session = await self.server.socketio.eio.admit("127.0.0.1", "polling")
        await self.session.feed("40" + json.dumps({"token": self.token}))

    async def say(self, event: str, guild: Guild) -> None:
        await self.session.feed("42" + json.dumps([event, str(guild.id)]))

    def take(self) -> list[Any]:
        """What has come since, without an answer to a poll."""
        queue = self.session.queue
        packets = spywatcher.packets_in(queue.take())
        queue.begin(None)
        return [json.loads(packet[2:]) for packet in packets if packet.startswith("42")]


class Oracle:
    """What Discord's documentation says of a guild as it stands."""

    def __init__(self, guild: Guild) -> None:
        self.guild = guild
        self.present = True

    def base(self, user: int) -> set[int]:
        member = self.guild.members[user]
        bits = self.guild.roles[self.guild.id].permissions
        for role_id in member.role_ids:
            if role_id in self.guild.roles:
                bits |= self.guild.roles[role_id].permissions
        return {bit for bit in (VIEW, MANAGE, Permission.ADMINISTRATOR) if bits & bit}

    def rules(self, user: int) -> bool:
        """Whether nothing is closed to this member."""
        return user == self.guild.owner_id or Permission.ADMINISTRATOR in self.base(user)

    def may_view(self, ear: Ear) -> bool:
        if not self.present:
            return False
        if ear.role == "ADMIN":
            return True
        if ear.guilds:
            return str(self.guild.id) in ear.guilds
        if ear.id not in self.guild.members:
            return False
        return self.rules(ear.id) or MANAGE in self.base(ear.id)

    def may_see(self, ear: Ear, place: Channel | Thread) -> bool:
        user = ear.id
        if ear.role == "ADMIN" or (ear.guilds and user not in self.guild.members):
            return True
        if self.rules(user):
            return True
        parent = place.parent_id if isinstance(place, Thread) else place.id
        overwrites = {o.id: o for o in self.guild.channels[parent].overwrites}
        answer = VIEW in self.base(user)
        held = [role for role in self.guild.members[user].role_ids if role in self.guild.roles]
        levels = [[self.guild.id], held, [user]]
        for level in levels:
            here = [overwrites[i] for i in level if i in overwrites]
            if any(o.allow & VIEW for o in here):
                answer = True
            elif any(o.deny & VIEW for o in here):
                answer = False
        return answer


POWERS = (0, VIEW, MANAGE, VIEW | MANAGE, Permission.ADMINISTRATOR)


class History:
    """One guild, five viewers, and what happens to them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        bot = simulator.User(server_bot(server), "spy", bot=True)
        self.guild = simulator.make_guild("g", bot=bot)
        self.shard = Nobody(bot.id)
        self.roles = [self.guild.everyone]
        self.roles += [self.guild.add_role(f"r{n}", POWERS[n + 1]) for n in range(3)]
        people = [self.guild.add_member(f"m{n}", roles=[self.roles[n + 1]]) for n in range(3)]
        self.people = [*people, self.guild.owner]
        secret = hidden_except(self.guild, self.roles[2])
        self.places: list[Channel | Thread] = [
            self.guild.general,
            self.guild.add_channel("secret", overwrites=secret),
        ]
        self.places.append(self.guild.add_thread("t", self.guild.add_channel("parent")))
        self.oracle = Oracle(self.guild)
        claim = [str(self.guild.id)]
        self.ears = [
            Ear(server, people[0].id, "USER", []),
            Ear(server, people[1].id, "USER", []),
            Ear(server, people[2].id, "USER", claim),
            Ear(server, self.guild.owner_id, "USER", []),
            Ear(server, 77, "ADMIN", []),
        ]
        self.numbers = itertools.count()

    async def run(self, steps: list[tuple[str, int, int, int]]) -> int:
        """Returns how many events were delivered."""
        self.feed("GUILD_CREATE", simulator.guild_create_json(self.guild))
        await settle()
        for ear in self.ears:
            await ear.connect()
            await self.subscribe(ear)
        delivered = 0
        for name, a, b, c in steps:
            await getattr(self, f"do_{name}")(a, b, c)
            delivered += await self.judge(self.places[(a + b + c) % 3])
        for ear in self.ears:
            await ear.session.close()
        self.feed("GUILD_DELETE", simulator.guild_delete_json(self.guild))
        await settle()
        return delivered

    def feed(self, name: str, payload: Any) -> None:
        self.server.gateway.bot.event_manager.consume_raw_event(name, self.shard, payload)

    async def subscribe(self, ear: Ear) -> None:
        await ear.say("subscribe:guild", self.guild)
        ear.inside = ear.inside or self.oracle.may_view(ear)

    async def judge(self, place: Channel | Thread) -> int:
        """A message right after what has happened, and whether each viewer got what it may see."""
        if self.oracle.present:
            author = self.guild.owner
            self.feed("MESSAGE_CREATE", simulator.message_json(self.guild, author, place, "x"))
        await settle()
        self.server.rights.checking.run(seconds=60)
        delivered = 0
        for ear in self.ears:
            thrown_out = ear.inside and not self.oracle.may_view(ear)
            ear.inside = ear.inside and not thrown_out
            heard = ear.take()
            messages = [data for name, data in heard if name == "message:new"]
            codes = [data["code"] for name, data in heard if name == "error"]
            due = self.oracle.present and ear.inside and self.oracle.may_see(ear, place)
            assert [m["channelId"] for m in messages] == [str(place.id)] * due
            assert codes.count("forbidden") >= thrown_out
            delivered += len(messages)
        return delivered

    # -- what may happen

    async def do_roles(self, a: int, b: int, c: int) -> None:
        member = self.people[a % 4]
        chosen = {1 + b % 3, 1 + c % 3} if (a + b) % 3 else set()
        member.role_ids = [self.roles[n].id for n in sorted(chosen)]
        if self.oracle.present and member.id in self.guild.members:
            self.feed("GUILD_MEMBER_UPDATE", simulator.member_add_json(self.guild, member))

    async def do_role(self, a: int, b: int, c: int) -> None:
        role = self.roles[a % 4]
        role.permissions = POWERS[b % 5]
        if self.oracle.present and role.id in self.guild.roles:
            self.feed("GUILD_ROLE_UPDATE", simulator.role_event_json(self.guild, role))

    async def do_delete_role(self, a: int, b: int, c: int) -> None:
        role = self.guild.roles.pop(self.roles[1 + a % 3].id, None)
        if role is not None and self.oracle.present:  # members go on to carry its id
            ids = {"guild_id": str(self.guild.id), "role_id": str(role.id)}
            self.feed("GUILD_ROLE_DELETE", ids)

    async def do_overwrites(self, a: int, b: int, c: int) -> None:
        channel = list(self.guild.channels.values())[a % 3]
        targets = [*self.roles, *self.people]
        bits = ((VIEW, 0), (0, VIEW), (0, 0))
        channel.overwrites = [
            Overwrite(targets[n % 8].id, *bits[(n + c) % 3], member=n % 8 > 3)
            for n in dict.fromkeys([b % 8, (b + c) % 8, (b * 3 + 1) % 8])
        ]
        if self.oracle.present:
            self.feed("CHANNEL_UPDATE", channel.to_json())

    async def do_owner(self, a: int, b: int, c: int) -> None:
        owner = self.people[a % 4]
        if owner.id in self.guild.members and self.oracle.present:
            self.guild.owner_id = owner.id
            self.feed("GUILD_UPDATE", self.guild.to_json())

    async def do_leave(self, a: int, b: int, c: int) -> None:
        member = self.people[a % 4]
        if member.id == self.guild.owner_id or not self.guild.members.pop(member.id, None):
            return
        if self.oracle.present:
            left = simulator.member_remove_json(self.guild, member)
            self.feed("GUILD_MEMBER_REMOVE", left)

    async def do_join(self, a: int, b: int, c: int) -> None:
        member = self.people[a % 4]
        if member.id not in self.guild.members:
            self.guild.members[member.id] = member
            if self.oracle.present:
                came = simulator.member_add_json(self.guild, member)
                self.feed("GUILD_MEMBER_ADD", came)

    async def do_guild(self, a: int, b: int, c: int) -> None:
        outage = bool(a % 2)
        if self.oracle.present:
            gone = simulator.guild_delete_json(self.guild, outage=outage)
            self.feed("GUILD_DELETE", gone)
            if outage:
                self.feed("GUILD_CREATE", simulator.guild_create_json(self.guild))
            else:
                self.oracle.present = False
        else:
            self.oracle.present = True
            created = simulator.guild_create_json(self.guild, joined_now=True)
            self.feed("GUILD_CREATE", created)

    async def do_subscribe(self, a: int, b: int, c: int) -> None:
        await settle()
        await self.subscribe(self.ears[a % 5])

    async def do_unsubscribe(self, a: int, b: int, c: int) -> None:
        ear = self.ears[a % 5]
        await ear.say("unsubscribe:guild", self.guild)
        ear.inside = False

    async def do_reconnect(self, a: int, b: int, c: int) -> None:
        ear = self.ears[a % 5]
        await ear.session.close()
        ear.inside = False
        await ear.connect()


def server_bot(server: Server) -> int:
    return simulator.bot_id_of(server.gateway.bot._token)


STEPS = st.lists(
    st.tuples(
        st.sampled_from([name[3:] for name in vars(History) if name.startswith("do_")]),
        st.integers(0, 15),
        st.integers(0, 15),
        st.integers(0, 15),
    ),
    min_size=4,
    max_size=10,
)


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[asyncio.Runner, Server]]:
    """A server in a loop of its own, for all histories."""
    with asyncio.Runner() as runner:
        server = offline_server(simulator.snowflake())

        runner.run(begin_offline(server))
        yield runner, server
        runner.run(server.plugins.stop())


@settings(
    max_examples=length(300, 2_000),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(steps=STEPS)
def test_in_random_histories_nobody_hears_what_it_may_not_see(stage, steps):
    runner, server = stage
    runner.run(History(server).run(steps))
