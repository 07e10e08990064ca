"""Raises wherever it is called."""

import asyncio

import hikari

from spywatcher import every, on, on_subscribe


@on(hikari.GuildMessageCreateEvent, emit="raises:message")
def plain(event):
    raise RuntimeError("boom")


@on(hikari.GuildMessageCreateEvent)
async def later(event):
    await asyncio.sleep(0)
    raise RuntimeError("boom later")


@on(hikari.GuildMessageCreateEvent)
def exits(event):
    raise SystemExit(0)


@on(hikari.GuildMessageCreateEvent)
def cancels(event):
    raise asyncio.CancelledError


@every(0.05)
def tick(spy):
    raise RuntimeError("boom again")


@on_subscribe("guild", emit="raises:hello")
def hello(guild_id, spy):
    raise RuntimeError("boom at hello")


async def teardown(spy):
    raise RuntimeError("boom at the end")
