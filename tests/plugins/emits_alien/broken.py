"""Emits the event of another plugin, and a reserved one."""

import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent)
def thief(event, spy):
    spy.emit("good:message", event.guild_id, {"text": "forged"})


@on(hikari.GuildMessageCreateEvent)
def impostor(event, spy):
    spy.emit("disconnect", event.guild_id, {})
