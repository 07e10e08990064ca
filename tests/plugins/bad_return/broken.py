"""Returns what is no payload."""

import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="broken:list")
def a_list(event):
    return ["no", "payload"]


@on(hikari.GuildMessageCreateEvent, emit="broken:object")
def an_object(event):
    return object()
