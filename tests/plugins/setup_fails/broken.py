"""Fails to start."""

import hikari

from spywatcher import on


async def setup(spy):
    raise RuntimeError("boom at setup")


@on(hikari.GuildMessageCreateEvent, emit="broken:message")
def broken(event):
    return {}
