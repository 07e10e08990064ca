import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="")
def broken(event): ...
