"""Emits what is not its own."""

import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent)
def thief(event, spy):
    spy.emit("good:message", event.guild_id, {"text": "forged"})


@on(hikari.GuildMessageCreateEvent)
def impostor(event, spy):
    spy.emit("disconnect", event.guild_id, {})


@on(hikari.GuildMessageCreateEvent)
def lost(event, spy):
    spy.emit("emits:lost", event.guild_id, {}, room="gild")
