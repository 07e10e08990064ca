"""Claims an event that another plugin claims too."""

import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="same:event")
def broken(event):
    return {}
