"""Notes when it starts and stops, and says so to dashboards."""

import asyncio

import hikari

from spywatcher import on

life = []


async def setup(spy):
    await asyncio.sleep(0)
    life.append(("setup", spy.settings, spy.log.name))


async def teardown(spy):
    life.append(("teardown", spy.settings, spy.log.name))


@on(hikari.GuildMessageCreateEvent, emit="lived:async")
async def later(event, spy):
    await asyncio.sleep(0)
    return {"life": len(life), "timestamp": "mine"}


@on(hikari.GuildMessageCreateEvent, emit="lived:other", room="other")
def elsewhere(event):
    return {"life": len(life)}


@on(hikari.GuildMessageCreateEvent)
def listens_only(event):
    return None
