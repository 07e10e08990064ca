"""Random histories of one client, against an oracle that knows what it is owed.

In any order: events in two guilds, with and without a channel; cuts, some before what was sent has been
read, and returns; rights lost and won, a channel hidden and shown, a guild that the bot has to leave,
tokens that allow less; rooms entered and left. At each return just that must come which the client has
missed and may have, or nothing at all in a new session.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any, NamedTuple

from length import length
from waiting import eventually
from watching import RawClient, Watch, Watching

from simulator import Guild, Member, Permission, Role, hidden_except
from spywatcher import Viewer

PAGE = {"Origin": "http://localhost:5173"}
MAX_EVENTS = 12
HISTORIES = length(60, 2_000)


class Said(NamedTuple):
    """An event; its number is its place."""

    number: int
    guild_id: str
    in_channel: bool


class Oracle:
    """What is so, and what follows from it (design: rooms, recovery)."""

    def __init__(self, guild_ids: set[str]) -> None:
        self.guilds = guild_ids  # in which the bot is
        self.manages = set(guild_ids)  # of which the viewer may view something
        self.hidden: set[str] = set()  # of which the channel is hidden from it
        self.named: set[str] | None = None  # what its token allows instead
        self.rooms: dict[str, int] = {}  # by guild, how much had been said when it came in
        self.said: list[Said] = []

    def may_view(self, guild_id: str) -> bool:
        allowed = self.manages if self.named is None else self.named
        return guild_id in self.guilds & allowed

    def judge(self) -> None:
        self.rooms = {one: since for one, since in self.rooms.items() if self.may_view(one)}

    def shows(self, event: Said) -> bool:
        return not (event.in_channel and event.guild_id in self.hidden)

    def missed(self, seen: int) -> list[int] | None:
        """Of what was said after the first `seen` events; None where that is too much."""
        after = [
            event
            for event in self.said
            if event.number >= max(seen, self.rooms.get(event.guild_id, len(self.said)))
        ]
        for guild_id in self.rooms:
            if sum(event.guild_id == guild_id for event in after) > MAX_EVENTS:
                return None
        return [event.number for event in after if self.shows(event)]


class History:
    """Lets things happen, to the server and to the oracle."""

    def __init__(
        self, spy: Watch, guilds: list[Guild], staff: list[Role], people: list[Member]
    ) -> None:
        self.spy = spy
        self.guilds = {str(guild.id): guild for guild in guilds}
        self.staff = dict(zip(self.guilds, staff, strict=True))
        self.people = dict(zip(self.guilds, people, strict=True))  # one user, a member of each
        self.ada = people[0]
        self.oracle = Oracle(set(self.guilds))
        self.auth: dict[str, Any] = {"token": spy.token(self.ada)}
        self.token_names: set[str] | None = None
        self.raw: RawClient | None = None
        self.seen = 0  # how much had been said at the client's latest offset
        self.got: list[int] = []
        self.due: list[int] = []  # sent since it has connected

    async def begin(self) -> None:
        await self.connect()
        for guild_id in self.guilds:
            await self.enter(guild_id)

    async def any_step(self) -> None:
        steps = {
            self.say: 8,
            self.cut_or_return: 6,
            self.change_room: 3,
            self.change_right: 4,
            self.change_channel: 3,
            self.change_token: 1,
            self.lose_guild: 0.2,
        }
        [step] = random.choices(list(steps), list(steps.values()))
        await step()

    def any_guild(self) -> str:
        return random.choice(list(self.guilds))

    # -- the client

    async def connect(self) -> None:
        self.oracle.named = self.token_names
        self.oracle.judge()
        missed = self.oracle.missed(self.seen) if "offset" in self.auth else None
        self.raw = await self.spy.raw(headers=PAGE)
        await self.raw.send("40" + json.dumps(self.auth))
        pid = json.loads(str(await self.raw.read())[2:])["pid"]
        assert (pid == self.auth.get("pid")) is (missed is not None)
        if missed is None:
            self.oracle.rooms = {}
        self.auth["pid"], self.got, self.due = pid, [], missed or []
        rooms = sorted(f"guild:{guild_id}" for guild_id in self.oracle.rooms)
        session = await self.read_until("session")
        assert session == {"recovered": missed is not None, "rooms": rooms}
        assert self.got == self.due
        self.seen = len(self.oracle.said)

    async def read_until(self, name: str) -> Any:
        """Take what comes, up to this event or answer, as the stock client does."""
        assert self.raw is not None
        while True:
            packet = str(await self.raw.read())
            event, *args = json.loads(packet.lstrip("0123456789"))
            if packet.startswith("43"):
                event, args = "answer", [event]
            elif isinstance(args[-1], str):
                self.auth["offset"] = args[-1]
            if event == "x":
                self.got.append(args[0]["number"])
                self.seen = self.got[-1] + 1
            if event == name:
                return args[0]

    async def ask(self, *request: object) -> Any:
        assert self.raw is not None
        await self.raw.send("421" + json.dumps(request))
        answer = await self.read_until("answer")
        await self.hear_all()
        return answer

    async def hear_all(self) -> None:
        """Take all that is due: answers do not wait for the events of a room that rests."""
        while self.raw is not None and len(self.got) < len(self.due):
            await self.read_until("x")
        assert self.raw is None or self.got == self.due

    async def cut_or_return(self) -> None:
        if self.raw is None:
            await self.connect()
            return
        if random.random() < 0.5:
            await self.ask("guilds:list")
        self.raw.socket.stream.close()
        self.raw = None
        await eventually(lambda: not len(self.spy.server.dashboards))

    # -- what happens

    async def say(self) -> None:
        for _ in range(random.randint(1, 5)):
            event = Said(len(self.oracle.said), self.any_guild(), random.random() < 0.5)
            self.oracle.said.append(event)
            payload: dict[str, Any] = {"number": event.number}
            if event.in_channel:
                payload["channelId"] = str(self.guilds[event.guild_id].general.id)
            self.spy.server.node.deliver("x", event.guild_id, payload, "guild")
            if self.raw and event.guild_id in self.oracle.rooms and self.oracle.shows(event):
                self.due.append(event.number)

    async def change_room(self) -> None:
        guild_id = self.any_guild()
        if self.raw is None:
            return
        if guild_id in self.oracle.rooms:
            await self.ask("unsubscribe:guild", guild_id)
            del self.oracle.rooms[guild_id]
        else:
            await self.enter(guild_id)

    async def enter(self, guild_id: str) -> None:
        answer = await self.ask("subscribe:guild", guild_id)
        assert answer["ok"] is self.oracle.may_view(guild_id)
        if answer["ok"]:
            self.oracle.rooms[guild_id] = len(self.oracle.said)

    async def change_right(self) -> None:
        guild_id = self.any_guild()
        await self.hear_all()  # who loses a right is not even given what waits
        if guild_id in self.oracle.guilds:
            self.oracle.manages ^= {guild_id}
            manages = guild_id in self.oracle.manages
            change = self.spy.discord.add_role if manages else self.spy.discord.remove_role
            await change(self.guilds[guild_id], self.people[guild_id], self.staff[guild_id])
            await self.settle()

    async def change_channel(self) -> None:
        guild_id = self.any_guild()
        if guild_id in self.oracle.guilds:
            self.oracle.hidden ^= {guild_id}
            guild = self.guilds[guild_id]
            overwrites = hidden_except(guild) if guild_id in self.oracle.hidden else []
            await self.spy.discord.channel_update(guild, guild.general, overwrites=overwrites)
            await self.settle()

    async def lose_guild(self) -> None:
        guild_id = self.any_guild()
        await self.hear_all()
        if guild_id in self.oracle.guilds:
            self.oracle.guilds.discard(guild_id)
            await self.spy.discord.remove_guild(self.guilds[guild_id])
            await self.settle()

    async def change_token(self) -> None:
        names = random.choice([None, None, {self.any_guild()}])
        self.auth["token"] = self.spy.token(self.ada, guilds=sorted(names or ()))
        self.token_names = names
        if self.raw is not None:
            await self.hear_all()
            assert (await self.ask("auth:refresh", self.auth["token"]))["ok"]
            self.oracle.named = names
            self.oracle.judge()

    async def settle(self) -> None:
        """Until the server knows how things stand; hikari asks for members 120 times a minute."""
        await eventually(lambda: all(map(self.is_known, self.guilds)), timeout=60)
        for _ in range(50):  # listeners begin some turns after the cache is new
            await asyncio.sleep(0)
        self.spy.server.rights.checking.run(1.0)  # else so many changes are judged together
        self.oracle.judge()

    def is_known(self, guild_id: str) -> bool:
        guild = self.guilds[guild_id]
        there = self.spy.server.access.may_view(Viewer("1", "ADMIN"), guild_id)
        if guild_id not in self.oracle.guilds or not there:
            return there is (guild_id in self.oracle.guilds)
        cache = self.spy.server.gateway.bot.cache
        member = cache.get_member(guild.id, self.ada.id)
        channel = cache.get_guild_channel(guild.general.id)
        return (
            member is not None
            and channel is not None
            and (self.staff[guild_id].id in member.role_ids) is (guild_id in self.oracle.manages)
            and bool(channel.permission_overwrites) is (guild_id in self.oracle.hidden)
        )

    async def end(self) -> None:
        """Look once more, and put everything back."""
        if self.raw is None:
            await self.connect()
        await self.ask("guilds:list")
        assert self.raw is not None
        await self.raw.send("41")
        self.raw.socket.stream.close()
        for guild_id, guild in self.guilds.items():
            if guild_id not in self.oracle.guilds:
                self.spy.discord.guilds[guild.id] = guild
                await self.spy.discord.outage_over(guild)
            if guild_id not in self.oracle.manages:
                await self.spy.discord.add_role(guild, self.people[guild_id], self.staff[guild_id])
            if guild_id in self.oracle.hidden:
                await self.spy.discord.channel_update(guild, guild.general, overwrites=[])
        self.oracle = Oracle(set(self.guilds))
        await self.settle()
        viewer = self.spy.server.tokens.verify(self.spy.token(self.ada))
        may_view = self.spy.server.access.may_view
        await eventually(lambda: all(may_view(viewer, one) for one in self.guilds), timeout=60)
        await eventually(lambda: not len(self.spy.server.dashboards))


async def test_every_history_gives_each_viewer_its_own_and_all_of_it(
    discord, guild, watching: Watching
) -> None:
    guilds = [guild, discord.add_guild(name="Second")]
    staff = [one.add_role("Staff", Permission.MANAGE_GUILD) for one in guilds]
    ada = guild.add_member("ada", roles=[staff[0]])
    there = guilds[1].add_member("ada", user=ada.user, roles=[staff[1]])
    limits = {"attempts_per_ip": "1000000/minute", "events_per_connection": "100000/second"}
    recovery = {"max_events": MAX_EVENTS}
    tables = {"limits": limits, "recovery": recovery, "plugins": {"folders": []}}
    async with watching(**tables) as spy:
        for number in range(HISTORIES):
            seed = random.randrange(2**32)
            random.seed(seed)
            history = History(spy, guilds, staff, [ada, there])
            try:
                await history.begin()
                for _ in range(random.randint(5, 40)):
                    await history.any_step()
                await history.end()
            except AssertionError as error:
                error.add_note(f"history {number}, seed {seed}")
                raise
