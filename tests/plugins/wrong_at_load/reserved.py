import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="connect")
def broken(event): ...
