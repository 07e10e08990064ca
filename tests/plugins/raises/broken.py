"""Raises whenever something happens."""

import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="broken:message")
def broken(event):
    raise RuntimeError("boom at event")
