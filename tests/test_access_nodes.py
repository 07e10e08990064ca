"""Random histories of rights on two nodes, against the oracle: real Redis, real gateway session."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from length import length
from redisserver import RedisServer
from service import SECRET
from test_access import MANAGE, VIEW, Ear
from test_access_histories import KINDS, Asker, LongHistory
from test_cluster import Nodes, nodes, redis  # noqa: F401  # fixtures
from waiting import eventually

import simulator
from simulator import Channel, Thread
from spywatcher import Keys

pytestmark = pytest.mark.logs(
    r"no connection to Redis|not connected to Discord|Redis does not get the counts", required=False
)

STEPS = length(40, 2_000)
#: What is done to one process by hand elsewhere; and what takes a right and gives it back at once,
#: which a node may see as one change or as two.
LEFT_OUT = {"away", "back", "guild", "session_without_the_guild", "time_out_that_runs_out"}
LEFT_OUT |= {"leave_and_join", "reorder", "outage_with_changes"}
#: Seconds each, more where sessions end too often: one in 400 steps, the first soon.
SLOW = ("takeover", "new_session", "resume")


class NodesHistory(LongHistory):
    """The same viewers on each node; packets come by the holder's gateway session."""

    def __init__(self, nodes: Nodes) -> None:  # noqa: F811  # the fixture
        self.nodes, self.fed, self.told = nodes, [], 0
        first, second = nodes.servers
        super().__init__(first)
        for ear in tuple(self.ears):
            self.ears.append(Ear(second, ear.id, ear.role, ear.guilds))
        #: Who hears all, and so knows when a node has heard of everything before.
        self.markers = [Ear(server, 99, "USER", [str(self.guild.id)]) for server in nodes.servers]

    async def begin(self) -> None:
        self.nodes.discord.guilds[self.guild.id] = self.guild
        self.feed("GUILD_CREATE", self.created())
        self.make_private()
        await self.flush()
        for ear in (*self.markers, *self.ears):
            await ear.connect()
            await self.subscribe(ear)

    def feed(self, name: str, payload: Any) -> None:
        self.fed.append((name, payload))

    async def flush(self) -> None:
        fed, self.fed = self.fed, []
        for name, payload in fed:
            await self.nodes.discord.dispatch(name, payload, guild_id=self.guild.id)

    async def subscribe(self, ear: Ear) -> None:
        await ear.say("subscribe:guild", self.guild)
        await self.decided()
        ear.inside = ear.inside or self.oracle.may_view(ear)

    async def decided(self) -> None:
        """Another node is told of a viewer after it came."""

        def pending() -> list[str]:
            connected = [s.rights.subscriptions.connected for s in self.nodes.servers]
            return [room for ones in connected for one in ones.values() for room in one.pending]

        await eventually(lambda: not pending(), timeout=10)

    async def judge(self, place: Channel | Thread) -> int:
        author = self.guild.owner
        self.feed("MESSAGE_CREATE", simulator.message_json(self.guild, author, place, "x"))
        await self.flush()
        for marker in self.markers:
            await eventually(lambda m=marker: self.heard(m, "message:new"), timeout=10)
        for server in self.nodes.servers:
            server.rights.checking.run()
        return sum(self.judge_one(ear, place) for ear in self.ears)

    @staticmethod
    def heard(marker: Ear, event: str) -> bool:
        return any(name == event for name, _ in marker.take())

    def judge_one(self, ear: Ear, place: Channel | Thread) -> bool:
        thrown_out = ear.inside and not self.oracle.may_view(ear)
        ear.inside = ear.inside and not thrown_out
        heard = ear.take()
        due = ear.inside and self.oracle.may_see(ear, place)
        came = [data["channelId"] for name, data in heard if name == "message:new"]
        who = self.nodes.servers.index(ear.server), ear.id, ear.role, ear.guilds
        assert came == [str(place.id)] * due, who
        codes = [data["code"] for name, data in heard if name == "error"]
        assert codes.count("forbidden") >= thrown_out, who
        return due

    async def judge_lists(self) -> None:
        for ear in self.ears:
            await eventually(lambda ear=ear: self.lists_it(ear) == self.oracle.may_view(ear))

    def lists_it(self, ear: Ear) -> bool:
        asker = Asker(ear.server, ear.token)
        answer = ear.server.rights.lists.ask(asker)
        ear.server.rights.lists.remove(asker)
        return str(self.guild.id) in {one["id"] for one in json.loads(bytes(answer["guilds"]))}

    # -- what happens to nodes

    async def do_resume(self, a: int, b: int, c: int) -> None:
        await self.nodes.discord.drop()
        await self.nodes.discord.wait_for_bot()

    async def do_new_session(self, a: int, b: int, c: int) -> None:
        self.people[a % 4].role_ids = [self.roles[1 + b % 3].id]
        before = set(self.nodes.discord.sessions)
        await self.nodes.discord.invalidate()
        await self.new_session(before)

    async def do_takeover(self, a: int, b: int, c: int) -> None:
        """The holder lets go, and another node begins a session of its own."""
        holder = self.nodes.holder
        before = set(self.nodes.discord.sessions)
        await holder.node.lease.release()
        holder.node.lease.wanted = True
        await self.new_session(before)

    async def new_session(self, before: set[str]) -> None:
        """It says neither which threads are private nor whose time-out lasts."""
        self.oracle.timeouts.clear()
        discord = self.nodes.discord
        await eventually(lambda: discord.sessions.keys() - before, timeout=120)
        await discord.caught_up()
        await eventually(lambda: self.nodes.holder.access.all_whole, timeout=15)
        for server in self.nodes.servers:
            await eventually(lambda s=server: s.access.complete, timeout=15)
        await self.events_arrive()
        self.make_private()

    async def events_arrive(self) -> None:
        """A node that was the holder reads on from the end of what another has sent by then."""

        def arrived(marker: Ear) -> bool:
            self.nodes.holder.node.deliver("test:event", str(self.guild.id), {}, "guild")
            return self.heard(marker, "test:event")

        for marker in self.markers:
            await eventually(lambda m=marker: arrived(m), timeout=15)

    async def do_reconnect(self, a: int, b: int, c: int) -> None:
        await super().do_reconnect(a, b, c)
        await self.subscribe(self.ears[a % len(self.ears)])

    async def configure(self, **auth: Any) -> None:
        for server in self.nodes.servers:
            server.rights.checking.run()
        for ear in self.ears:
            ear.inside = ear.inside and self.oracle.may_view(ear)
        for server in self.nodes.servers:
            settings = server._settings
            changed = msgspec.structs.replace(settings.auth, **auth)
            server.reload(msgspec.structs.replace(settings, auth=changed), Keys((SECRET,)))
        self.oracle.admins = set(changed.admin_roles)
        needed = {"MANAGE_GUILD": MANAGE, "VIEW_CHANNEL": VIEW}
        self.oracle.needed = needed[changed.viewer_permissions[0]]
        self.oracle.visibility = changed.channel_visibility


async def relive(nodes: Nodes, seed: int, steps: int) -> int:  # noqa: F811  # the fixture
    quick = [kind for kind in KINDS if kind not in LEFT_OUT and kind not in SLOW]
    chance, history, done, delivered = random.Random(seed), NodesHistory(nodes), [], 0
    await history.begin()
    for number in range(steps):
        kind = SLOW[number // 400 % 3] if number % 400 == 20 else chance.choice(quick)
        done.append((kind, *(chance.randrange(16) for _ in range(3))))
        try:
            delivered += await history.step(*done[-1])
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"seed {seed}: {done}: {error}") from error
    return delivered


async def test_on_two_nodes_nothing_goes_to_the_wrong_viewer(
    nodes: Nodes,  # noqa: F811  # the fixture
    redis: RedisServer,  # noqa: F811  # the fixture
) -> None:
    limits = {"events_per_connection": "1000000/second", "connections_per_viewer": 1_000_000}
    for _ in range(2):
        await nodes.add(limits=limits, plugins={"disabled": ["analytics", "history"]})
    await nodes.ready()
    assert await relive(nodes, 1, STEPS) > STEPS
