import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent)
def broken(event, spy, more): ...
