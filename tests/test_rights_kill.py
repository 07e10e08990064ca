"""The gateway's holder is killed while rights change: nobody on any node gets what they may not.

Each message has an author of its own, n0, n1, …: it tells who was allowed to see it when it was written.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from jsclient import QUICK, Dashboard, NoAnswerError
from length import length
from service import SECRET, Service
from test_cluster import (
    HURRY,
    Balancer,
    Nodes,
    authors,
    find_holder,
    in_order_and_once,
    nodes,
    of_a_term,
    processes,
    redis,
)
from waiting import eventually

from simulator import Channel, Member, Permission, Role, hidden_except
from spywatcher import Keys, Tokens

__all__ = ["nodes", "processes", "redis"]  # fixtures

KILLS = length(1, 20)
#: Seconds that an event may be under way: what came later than that was missed.
LATE = 0.5
CHANGES = 200
pytestmark = pytest.mark.logs(r"no connection to Redis|not connected to Discord", required=False)


class Rights:
    """A guild in which three people win and lose what they may see, and who may see each message."""

    def __init__(self, nodes: Nodes) -> None:
        self.discord, self.guild = nodes.discord, nodes.guild
        self.manager = self.guild.add_role("manager", Permission.MANAGE_GUILD)
        self.secret = self.guild.add_role("secret")
        self.room = self.guild.add_channel("room")
        roles = [self.manager, self.secret]
        self.people = [self.guild.add_member(name, roles=roles) for name in ("ada", "bob", "cyd")]
        #: When each message was written, where, and who could see which place then.
        self.written: list[tuple[float, int, dict[int, set[int]]]] = []

    async def change(self) -> None:
        person = random.choice(self.people)
        kind = random.randrange(8)
        if kind < 3:
            await self.toggle(person, self.manager)
        elif kind < 6:
            await self.toggle(person, self.secret)
        elif kind == 6:
            hidden = hidden_except(self.guild, self.secret)
            overwrites = [] if self.room.overwrites else hidden
            await self.discord.channel_update(self.guild, self.room, overwrites=overwrites)
        else:
            powers = 0 if self.manager.permissions else Permission.MANAGE_GUILD
            await self.discord.role_update(self.guild, self.manager, permissions=powers)

    async def toggle(self, person: Member, role: Role) -> None:
        has = role.id in person.role_ids
        act = self.discord.remove_role if has else self.discord.add_role
        await act(self.guild, person, role)

    async def write(self) -> None:
        place = random.choice([self.room, self.guild.general])
        author = self.guild.add_member(f"n{len(self.written)}")
        see = {
            one.id: {person.id for person in self.people if self.sees(person, one)}
            for one in (self.room, self.guild.general)
        }
        self.written.append((time.monotonic(), place.id, see))
        await self.discord.message(self.guild, author, place)

    def may_have(self, person: Member, number: int, came: float) -> bool:
        """Whether the person could see the message; what a client has missed is judged by what is so
        when it comes back.
        """
        written, place, see = self.written[number]
        sees = [see]
        if came - written > LATE:
            sees += [see for at, _, see in self.written if came - LATE <= at <= came]
        return any(person.id in see[place] for see in sees)

    def sees(self, person: Member, place: Channel) -> bool:
        views = self.manager.permissions and self.manager.id in person.role_ids
        hidden = place is self.room and self.room.overwrites
        return bool(views) and (not hidden or self.secret.id in person.role_ids)


@asynccontextmanager
async def staying(dashboards: list[Dashboard], room: str) -> AsyncIterator[None]:
    """Who is thrown out asks again at once."""

    async def stay(dashboard: Dashboard) -> None:
        while True:
            with suppress(NoAnswerError):  # its node is gone
                await dashboard.call("subscribe:guild", room, timeout=1)
            await asyncio.sleep(0.1)

    tasks = [asyncio.create_task(stay(dashboard)) for dashboard in dashboards]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def change_and_kill(rights: Rights, processes: list[Service]) -> None:
    holder, fatal = await find_holder(processes), random.randrange(CHANGES // 10, CHANGES // 2)
    for number in range(CHANGES):
        await rights.change()
        await rights.write()
        if number == fatal:
            processes[holder].process.kill()
        await asyncio.sleep(of_a_term(1 / 70) / HURRY)


@pytest.fixture
def rights(nodes: Nodes) -> Rights:
    """Before the bot comes."""
    return Rights(nodes)


async def look_on(nodes: Nodes, balancer: Balancer, person: Member) -> Dashboard:
    token = Tokens(Keys((SECRET,)), ["HS256"]).issue(str(person.id))
    options = {**QUICK, "extraHeaders": {"Origin": "http://localhost:5173"}}
    url = f"http://127.0.0.1:{balancer.port}"
    return await nodes.js.connect(url, token=token, transports=["websocket"], **options)


async def everybody_has_their_due(rights: Rights, looking: list[tuple[Dashboard, Member]]) -> None:
    """Once rights have come to rest, each gets what it may have."""
    ada, bob, cyd = rights.people
    await rights.discord.role_update(
        rights.guild, rights.manager, permissions=Permission.MANAGE_GUILD
    )
    for person, roles in (
        (ada, [rights.manager, rights.secret]),
        (bob, []),
        (cyd, [rights.manager]),
    ):
        await rights.discord.set_roles(rights.guild, person, *roles)
    rest = len(rights.written)

    async def have() -> bool:
        await rights.write()
        return all(authors(d)[-1:] > [rest] for d, person in looking if person is not bob)

    await eventually(have)


@pytest.mark.faults
@pytest.mark.parametrize("kill", range(KILLS))
async def test_a_holder_that_is_killed_while_rights_change_lets_nobody_see_more(
    nodes: Nodes,
    rights: Rights,
    processes: list[Service],
    kill: int,
) -> None:
    async with Balancer(*(service.port for service in processes)) as balancer:
        people = [person for person in rights.people for _ in processes]
        looking = [(await look_on(nodes, balancer, person), person) for person in people]
        async with staying([one for one, _ in looking], str(nodes.guild.id)):
            await change_and_kill(rights, processes)
            await everybody_has_their_due(rights, looking)
    for dashboard, person in looking:
        in_order_and_once(dashboard)
        came = zip(authors(dashboard), dashboard.events("message:new"), strict=True)
        wrong = [one for one, event in came if not rights.may_have(person, one, event.monotonic)]
        assert not wrong, person.name
