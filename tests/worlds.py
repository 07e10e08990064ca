"""Guilds in which things happen at random, counted by a plugin and by a plain computation beside it.

A test says how the plugin is set (`settings`), what happens (steps, by the names of methods) and what must
come of it (`compare`).
"""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from counting import BOT, Clock, Counting
from redisserver import RedisServer

from simulator import (
    Guild,
    Json,
    Member,
    make_guild,
    member_add_json,
    member_remove_json,
    message_json,
    presence_json,
    reaction_json,
    typing_json,
)
from spywatcher import RedisSettings
from spywatcher_cluster import TERM, Link, SharedTables

#: (name of a method, arguments)
Step = tuple[Any, ...]
GUILDS, PEOPLE = 2, 4
#: What members do in a channel: its gateway event and JSON.
ACTS: dict[str, tuple[str, Any]] = {
    "typing": ("TYPING_START", typing_json),
    "message": ("MESSAGE_CREATE", message_json),
    "reaction": ("MESSAGE_REACTION_ADD", reaction_json),
}


class Machines:
    """One after the other they count, each with an empty disk: all that one finds is in Redis."""

    def __init__(self, redis: RedisServer, link: Link) -> None:
        self._redis = redis
        self._link = link
        self._term = 0

    async def next(self) -> dict[str, Any]:
        """What the next `Counting` is made with."""
        self._term += 1
        await self._redis.ask("SET", TERM, self._term)
        share = partial(SharedTables, self._link, self._term)
        return {"path": f"machine{self._term}.db", "share": share}


class World:
    """Guilds with people and a bot, and the plugin that counts what happens there."""

    #: Settings of the plugin, with its name as `plugin`.
    settings: ClassVar[dict[str, Any]]

    def __init__(self, folder: Path, machines: Machines | None = None) -> None:
        """With machines, each start is at another one."""
        self.folder = folder
        self.machines = machines
        self.clock = Clock()
        self.guilds = [make_guild(f"guild {n}", bot=BOT) for n in range(GUILDS)]
        self.users = [self.guilds[0].add_member(f"user {n}").user for n in range(PEOPLE)]
        self.users.append(self.guilds[0].add_member("robot", bot=True).user)
        for user in self.users:
            self.guilds[1].add_member(user.name, user=user)
        self.counting: Counting

    async def live(self, story: list[Step]) -> None:
        await self.begin()
        try:
            for step, *values in story:
                await getattr(self, step)(*values)
            await self.compare()
        finally:
            await self.counting.__aexit__()

    async def begin(self) -> None:
        more = await self.machines.next() if self.machines else {}
        counting = Counting(self.folder, self.guilds, clock=self.clock, **self.settings, **more)
        self.counting = await counting.__aenter__()
        if self.machines:
            await self.flush()

    async def compare(self) -> None:
        """Raises AssertionError where the plugin and the plain computation differ."""
        raise NotImplementedError

    def member(self, g: int, u: int) -> Member | None:
        return self.guilds[g].members.get(self.users[u].id)

    # -- what may happen

    async def feed_act(self, kind: str, guild: Guild, member: Member, channel: Any) -> None:
        name, make = ACTS[kind]
        await self.counting.feed(name, make(guild, member, channel))

    async def feed_presence(self, guild: Guild, member: Member, status: str) -> None:
        member.appear(status, {} if status == "offline" else {"desktop": status})
        await self.counting.feed("PRESENCE_UPDATE", presence_json(guild, member))

    async def feed_member(self, name: str, guild: Guild, member: Member) -> None:
        make = member_remove_json if name == "GUILD_MEMBER_REMOVE" else member_add_json
        payload: Json = make(guild, member)
        await self.counting.feed(name, payload)

    async def wait(self, seconds: float) -> None:
        self.clock.time += seconds

    async def flush(self) -> None:
        await self.counting.flush()


def live_alone(world: type[World], story: list[Step]) -> None:
    """A world whose counts are in a file."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(world(Path(folder)).live(story))


def live_on_machines(world: type[World], story: list[Step]) -> None:
    """A world whose counts are in Redis."""

    async def live(folder: Path) -> None:
        async with RedisServer(folder) as redis:
            link = Link(RedisSettings(url=redis.url), "")
            await world(folder, Machines(redis, link)).live(story)
            await link.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(Path(folder)))
