"""Long random histories of all that decides rights, against an oracle that knows nothing of the code.

It is written from Discord's documentation (Topics: Permissions) and from design and documentation of
the API: roles, overwrites, owners, threads, time-outs, outages, sessions, settings, tokens; viewers
in a room, outside of it, and waiting for Discord to say enough.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import hikari
import msgspec
import pytest
from length import length
from service import SECRET
from test_access import MANAGE, VIEW, Ear, History, Oracle, begin_offline, offline_server, settle

import simulator
import spywatcher
from simulator import Channel, Permission, Thread, iso
from spywatcher import Keys, Server

HISTORIES = length(20, 200)
THREADS = spywatcher.MANAGE_THREADS
POWERS = (0, VIEW, MANAGE, VIEW | MANAGE, VIEW | MANAGE | THREADS, Permission.ADMINISTRATOR)
BITS = (VIEW, MANAGE, THREADS, Permission.ADMINISTRATOR)


class WideOracle(Oracle):
    """Knows of settings, time-outs and private threads, too."""

    def __init__(self, guild: simulator.Guild) -> None:
        super().__init__(guild)
        self.admins = {"ADMIN"}
        self.needed = MANAGE
        self.visibility = True
        self.timeouts: dict[int, float] = {}  # end, by member
        self.private: set[int] = set()

    def timed_out(self, user: int) -> bool:
        return self.timeouts.get(user, 0) > time.time()

    def base(self, user: int) -> set[int]:
        member = self.guild.members[user]
        held = [self.guild.roles[one] for one in member.role_ids if one in self.guild.roles]
        bits = self.guild.everyone.permissions
        for role in held:
            bits |= role.permissions
        return {bit for bit in BITS if bits & bit}

    def may_view(self, ear: Ear) -> bool:
        if not self.present:
            return False
        if ear.role in self.admins:
            return True
        if ear.guilds:
            return str(self.guild.id) in ear.guilds
        if ear.id not in self.guild.members:
            return False
        left = self.base(ear.id) & ({VIEW} if self.timed_out(ear.id) else set(BITS))
        return self.rules(ear.id) or self.needed in left

    def may_see(self, ear: Ear, place: Channel | Thread) -> bool:
        user = ear.id
        if not self.visibility or ear.role in self.admins:
            return True
        if user not in self.guild.members:
            return bool(ear.guilds)
        powers = self.base(user) if not self.timed_out(user) else set()
        if place.id in self.private and not self.rules(user) and THREADS not in powers:
            return False
        plain = Ear(ear.server, user, "USER", ear.guilds)
        return super().may_see(plain, place)


class Asker:
    """A dashboard that has asked for its guilds."""

    def __init__(self, server: Server, token: str) -> None:
        self.token, self.viewer = token, server.tokens.verify(token)
        self.session = self

    def write(self, frames: object) -> None:
        """What is told within a second is what is asked for next."""


class LongHistory(History):
    """More viewers, more places, and whatever else can change who may see what."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.oracle: WideOracle = WideOracle(self.guild)
        parent = self.places[2].parent_id  # type: ignore[union-attr]  # it is a thread
        self.private = self.guild.add_thread("private", self.guild.channels[parent])
        self.places.append(self.private)
        self.oracle.private.add(self.private.id)
        claim = [str(self.guild.id)]
        self.ears += [
            Ear(server, self.people[0].id, "ADMIN", []),  # the same viewer once more
            Ear(server, self.people[1].id, "MODERATOR", []),
            Ear(server, 78, "USER", claim),
            Ear(server, 79, "USER", []),
            Ear(server, self.people[2].id, "USER", ["1"]),
        ]
        self.pending: set[Ear] = set()
        self.askers: dict[Ear, Any] = {}
        self.away = False
        self.cached: dict[Ear, bool] = {}  # what hikari's cache says while Discord is away

    async def begin(self) -> None:
        self.feed("GUILD_CREATE", self.created())
        await settle()
        self.make_private()
        for ear in self.ears:
            await ear.connect()
            await self.subscribe(ear)

    def created(self) -> Any:
        for member in self.guild.members.values():
            until = self.oracle.timeouts.get(member.id, 0)
            self.set_timeout(member, until)
        made = simulator.guild_create_json(self.guild)
        for thread in made["threads"]:
            if int(thread["id"]) in self.oracle.private:
                thread["type"] = 12
        for member in made["members"]:
            until = self.oracle.timeouts.get(int(member["user"]["id"]))
            if until:
                member["communication_disabled_until"] = iso(datetime.fromtimestamp(until, UTC))
        return made

    def set_timeout(self, member: simulator.Member, until: float) -> None:
        if until:
            self.oracle.timeouts[member.id] = until

    def make_private(self) -> None:
        if self.private.id in self.guild.threads:
            thread = self.private.to_json() | {"type": 12, "newly_created": True}
            self.feed("THREAD_CREATE", thread)

    def feed(self, name: str, payload: Any) -> None:
        if not self.away:
            super().feed(name, payload)

    def member_update(self, member: simulator.Member) -> None:
        if self.oracle.present and member.id in self.guild.members:
            body = simulator.member_add_json(self.guild, member)
            until = self.oracle.timeouts.get(member.id)
            if until:
                body["communication_disabled_until"] = iso(datetime.fromtimestamp(until, UTC))
            self.feed("GUILD_MEMBER_UPDATE", body)

    async def subscribe(self, ear: Ear) -> None:
        await ear.say("subscribe:guild", self.guild)
        if not self.away:
            ear.inside = ear.inside or self.oracle.may_view(ear)
        elif self.cached[ear]:
            ear.inside = True
        elif not ear.inside:
            self.pending.add(ear)

    async def step(self, name: str, a: int, b: int, c: int) -> int:
        await getattr(self, f"do_{name}")(a, b, c)
        if self.away:
            return 0
        place = self.places[(a + b + c) % 4]
        there = place.id in self.guild.channels or place.id in self.guild.threads
        delivered = await self.judge(place if there else self.guild.general)
        await self.judge_lists()
        return delivered

    async def judge_lists(self) -> None:
        """`guilds:list` of each, which is kept and made anew only where something has changed."""
        lists = self.server.rights.lists
        for ear in self.ears:
            asker = self.askers.get(ear)
            if asker is None or asker.token != ear.token:
                self.forget_asker(ear)
                asker = self.askers[ear] = Asker(self.server, ear.token)
            listed = {one["id"] for one in json.loads(bytes(lists.ask(asker)["guilds"]))}
            assert (str(self.guild.id) in listed) == self.oracle.may_view(ear), ear.role

    def forget_asker(self, ear: Ear) -> None:
        if ear in self.askers:
            self.server.rights.lists.remove(self.askers.pop(ear))

    # -- members

    async def do_roles(self, a: int, b: int, c: int) -> None:
        member = self.people[a % 4]
        chosen = {1 + b % 3, 1 + c % 3} if (a + b) % 3 else set()
        member.role_ids = [self.roles[n].id for n in sorted(chosen)]
        self.member_update(member)

    async def do_nickname(self, a: int, b: int, c: int) -> None:
        self.member_update(self.people[a % 4])

    async def do_time_out(self, a: int, b: int, c: int) -> None:
        member = self.people[a % 4]
        self.oracle.timeouts[member.id] = time.time() + 3600
        self.member_update(member)

    async def do_end_of_time_out(self, a: int, b: int, c: int) -> None:
        self.oracle.timeouts.pop(self.people[a % 4].id, None)
        self.member_update(self.people[a % 4])

    async def do_time_out_that_runs_out(self, a: int, b: int, c: int) -> None:
        member = self.people[a % 4]
        end = datetime.now(UTC) + timedelta(milliseconds=80)
        end = end.replace(microsecond=end.microsecond // 1000 * 1000)
        self.oracle.timeouts[member.id] = end.timestamp()
        self.member_update(member)
        if not self.away:  # who loses the guild by it has to subscribe again
            await self.judge(self.guild.general)
        await asyncio.sleep(max(0, end.timestamp() - time.time()) + 0.005)

    async def do_join(self, a: int, b: int, c: int) -> None:
        member = self.people[a % 4]
        if member.id not in self.guild.members:
            self.oracle.timeouts.pop(member.id, None)
            await super().do_join(a, b, c)

    async def do_leave_and_join(self, a: int, b: int, c: int) -> None:
        """Who has left is out, however soon the return."""
        await self.do_leave(a, b, c)
        if not self.away:
            await self.judge(self.guild.general)
        await self.do_join(a, b, c)

    # -- roles

    async def do_role(self, a: int, b: int, c: int) -> None:
        role = self.roles[a % 4]
        role.permissions = POWERS[b % 6]
        if self.oracle.present and role.id in self.guild.roles:
            self.feed("GUILD_ROLE_UPDATE", simulator.role_event_json(self.guild, role))

    async def do_everyone(self, a: int, b: int, c: int) -> None:
        await self.do_role(0, b, c)

    async def do_role_again(self, a: int, b: int, c: int) -> None:
        role = self.roles[1 + a % 3]
        if role.id not in self.guild.roles:
            self.guild.roles[role.id] = role
            if self.oracle.present:
                self.feed("GUILD_ROLE_CREATE", simulator.role_event_json(self.guild, role))

    async def do_reorder(self, a: int, b: int, c: int) -> None:
        for number in range(1, 4):
            await self.do_role(number, b + number, c)

    # -- channels

    async def do_channel_gone(self, a: int, b: int, c: int) -> None:
        channel = self.places[1]
        if self.guild.channels.pop(channel.id, None) and self.oracle.present:
            self.feed("CHANNEL_DELETE", channel.to_json())

    async def do_channel_back(self, a: int, b: int, c: int) -> None:
        channel = self.places[1]
        assert isinstance(channel, Channel)
        if channel.id not in self.guild.channels:
            self.guild.channels[channel.id] = channel
            if self.oracle.present:
                self.feed("CHANNEL_CREATE", channel.to_json())

    async def do_overwrites(self, a: int, b: int, c: int) -> None:
        a += a % 3 >= len(self.guild.channels)
        await super().do_overwrites(a % len(self.guild.channels), b, c)

    async def do_channel_renamed(self, a: int, b: int, c: int) -> None:
        if self.oracle.present:
            self.feed("CHANNEL_UPDATE", self.guild.general.to_json())

    async def do_open_and_shut(self, a: int, b: int, c: int) -> None:
        for number in range(3):
            await self.do_overwrites(a, b + number, c)

    async def do_thread_gone(self, a: int, b: int, c: int) -> None:
        thread = self.places[2 + a % 2]
        if self.guild.threads.pop(thread.id, None) and self.oracle.present:
            assert isinstance(thread, Thread)
            self.feed("THREAD_DELETE", simulator.thread_delete_json(thread))

    async def do_thread_back(self, a: int, b: int, c: int) -> None:
        thread = self.places[2 + a % 2]
        assert isinstance(thread, Thread)
        if thread.id not in self.guild.threads:
            self.guild.threads[thread.id] = thread
            if self.oracle.present:
                body = simulator.thread_create_json(thread)
                body |= {"type": 12} if thread is self.private else {}
                self.feed("THREAD_CREATE", body)

    async def do_thread_renamed(self, a: int, b: int, c: int) -> None:
        thread = self.places[2]
        if thread.id in self.guild.threads and self.oracle.present:
            self.feed("THREAD_UPDATE", thread.to_json())

    # -- the guild

    async def do_guild_renamed(self, a: int, b: int, c: int) -> None:
        self.guild.name = f"g{a}"
        if self.oracle.present:
            self.feed("GUILD_UPDATE", self.guild.to_json())

    async def do_guild(self, a: int, b: int, c: int) -> None:
        outage = bool(a % 2)
        if self.away:
            self.oracle.present = outage
        elif self.oracle.present:
            self.feed("GUILD_DELETE", simulator.guild_delete_json(self.guild, outage=outage))
            self.oracle.present = outage
            if outage:
                self.feed("GUILD_CREATE", self.created())
        else:
            self.oracle.present = True
            self.feed("GUILD_CREATE", self.created())

    async def do_outage_with_changes(self, a: int, b: int, c: int) -> None:
        if self.oracle.present and not self.away:
            self.feed("GUILD_DELETE", simulator.guild_delete_json(self.guild, outage=True))
            self.people[a % 4].role_ids = [self.roles[1 + b % 3].id]
            self.roles[1 + c % 3].permissions = POWERS[b % 6]
            self.feed("GUILD_CREATE", self.created())

    # -- sessions with Discord

    async def ready(self, *guilds: int) -> None:
        shard: Any = SimpleNamespace(id=0, shard_count=1)
        event: Any = SimpleNamespace(unavailable_guilds=list(guilds), shard=shard)
        self.server.rights._on_new_session(event)

    async def do_resume(self, a: int, b: int, c: int) -> None:
        bot = self.server.gateway.bot
        shard: Any = self.shard
        bot.event_manager.dispatch(hikari.ShardResumedEvent(app=bot, shard=shard))

    async def do_new_session(self, a: int, b: int, c: int) -> None:
        if self.oracle.present and not self.away:
            await self.ready(self.guild.id)
            self.people[a % 4].role_ids = [self.roles[1 + b % 3].id]
            self.feed("GUILD_CREATE", self.created())

    async def do_session_without_the_guild(self, a: int, b: int, c: int) -> None:
        if self.oracle.present and not self.away:
            await self.ready()
            self.oracle.present = False

    async def do_away(self, a: int, b: int, c: int) -> None:
        if self.oracle.present and not self.away:
            await settle()
            self.cached = {ear: self.oracle.may_view(ear) for ear in self.ears}
            bot = self.server.gateway.bot
            bot.event_manager.dispatch(hikari.StoppingEvent(app=bot))
            await settle()
            self.away = True

    async def do_back(self, a: int, b: int, c: int) -> None:
        if not self.away:
            return
        self.away = False
        await self.ready(*[self.guild.id] * self.oracle.present)
        if self.oracle.present:
            self.feed("GUILD_CREATE", self.created())
        await settle()
        self.server.rights.checking.run(seconds=60)
        for ear in self.pending:
            ear.inside = ear.inside or self.oracle.may_view(ear)
        self.pending.clear()

    # -- viewers

    async def do_unsubscribe(self, a: int, b: int, c: int) -> None:
        ear = self.ears[a % len(self.ears)]
        self.pending.discard(ear)
        await ear.say("unsubscribe:guild", self.guild)
        ear.inside = False

    async def do_subscribe(self, a: int, b: int, c: int) -> None:
        await settle()
        await self.subscribe(self.ears[a % len(self.ears)])

    async def do_subscribe_twice(self, a: int, b: int, c: int) -> None:
        for _ in range(2):
            await self.do_subscribe(a, b, c)

    async def do_reconnect(self, a: int, b: int, c: int) -> None:
        ear = self.ears[a % len(self.ears)]
        await ear.session.close()
        self.pending.discard(ear)
        ear.inside = False
        await ear.connect()

    async def do_connect_again(self, a: int, b: int, c: int) -> None:
        """DISCONNECT and CONNECT on the same transport."""
        ear = self.ears[a % len(self.ears)]
        self.pending.discard(ear)
        await ear.session.feed("41")
        await ear.session.feed("40" + json.dumps({"token": ear.token}))
        ear.inside = False

    async def refresh(self, ear: Ear, role: str, guilds: list[str]) -> None:
        if self.away:
            return
        await settle()
        self.server.rights.checking.run(seconds=60)
        ear.inside = ear.inside and self.oracle.may_view(ear)
        ear.role, ear.guilds = role, guilds
        ear.token = self.server.tokens.issue(str(ear.id), role, guilds)
        await ear.session.feed("42" + json.dumps(["auth:refresh", ear.token]))

    async def do_token_of_an_admin(self, a: int, b: int, c: int) -> None:
        await self.refresh(self.ears[a % len(self.ears)], "ADMIN", [])

    async def do_token_of_a_user(self, a: int, b: int, c: int) -> None:
        await self.refresh(self.ears[a % len(self.ears)], "USER", [])

    async def do_token_with_a_claim(self, a: int, b: int, c: int) -> None:
        guilds = [str(self.guild.id)] if b % 2 else ["1"]
        await self.refresh(self.ears[a % len(self.ears)], "USER", guilds)

    # -- settings

    async def configure(self, **auth: Any) -> None:
        if self.away:
            return
        await settle()
        self.server.rights.checking.run(seconds=60)
        for ear in self.ears:
            ear.inside = ear.inside and self.oracle.may_view(ear)
        settings = self.server._settings
        changed = msgspec.structs.replace(settings.auth, **auth)
        self.server.reload(msgspec.structs.replace(settings, auth=changed), Keys(secrets=(SECRET,)))
        self.oracle.admins = set(changed.admin_roles)
        self.oracle.needed = {"MANAGE_GUILD": MANAGE, "VIEW_CHANNEL": VIEW}[
            changed.viewer_permissions[0]
        ]
        self.oracle.visibility = changed.channel_visibility

    async def do_admin_roles(self, a: int, b: int, c: int) -> None:
        await self.configure(admin_roles=[["ADMIN"], ["MODERATOR"], ["ADMIN", "MODERATOR"]][a % 3])

    async def do_channel_visibility(self, a: int, b: int, c: int) -> None:
        await self.configure(channel_visibility=a % 3 > 0)

    async def do_viewer_permissions(self, a: int, b: int, c: int) -> None:
        await self.configure(viewer_permissions=[["MANAGE_GUILD", "VIEW_CHANNEL"][a % 2]])

    async def end(self) -> None:
        await self.do_back(0, 0, 0)
        for ear in self.ears:
            self.forget_asker(ear)
            await ear.session.close()
        if self.oracle.present:
            self.feed("GUILD_DELETE", simulator.guild_delete_json(self.guild))
        await self.configure(
            admin_roles=["ADMIN"], channel_visibility=True, viewer_permissions=["MANAGE_GUILD"]
        )


KINDS = sorted(name[3:] for name in dir(LongHistory) if name.startswith("do_"))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = offline_server(simulator.snowflake())
    await begin_offline(server)
    yield server
    await server.plugins.stop()


def test_there_are_at_least_35_kinds_of_change() -> None:
    assert len(KINDS) >= 35, KINDS


async def relive(server: Server, seed: int, steps: int) -> int:
    """One history; what went before is shown where it goes wrong."""
    chance, history, done = random.Random(seed), LongHistory(server), []
    await history.begin()
    delivered = 0
    for _ in range(steps):
        done.append((chance.choice(KINDS), *(chance.randrange(16) for _ in range(3))))
        try:
            delivered += await history.step(*done[-1])
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {done}") from error
    await history.end()
    return delivered


async def test_nothing_goes_to_the_wrong_viewer_nothing_is_lost_to_the_right_one(server):
    delivered = [await relive(server, seed, 25) for seed in range(HISTORIES)]
    assert sum(delivered) > HISTORIES * 20
