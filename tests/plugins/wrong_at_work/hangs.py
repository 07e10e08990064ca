"""Never comes back."""

import asyncio
import time

import hikari

from spywatcher import on, on_subscribe


@on(hikari.GuildMessageCreateEvent, emit="hangs:message")
async def forever(event):
    await asyncio.Event().wait()


@on(hikari.GuildMessageCreateEvent)
async def stubborn(event):
    for _ in range(8):
        try:
            await asyncio.sleep(0.2)
        except asyncio.CancelledError:
            continue


@on(hikari.GuildMessageCreateEvent)
def blocks(event):
    time.sleep(0.3)


@on(hikari.GuildMessageCreateEvent)
async def blocks_later(event):
    await asyncio.sleep(0)
    time.sleep(0.3)


@on_subscribe("guild", emit="hangs:hello")
async def hello(guild_id, spy):
    await asyncio.Event().wait()


async def teardown(spy):
    await asyncio.Event().wait()
