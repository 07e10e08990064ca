"""Emits for an event of which only some belong to a guild."""

import hikari

from spywatcher import on


@on(hikari.MessageCreateEvent, emit="broken:message")
def broken(event):
    return {}


@on(hikari.DMMessageCreateEvent)
def direct(event):
    """So that Discord sends those, too."""
