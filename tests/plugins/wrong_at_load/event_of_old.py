import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent)
def fine(event): ...


@on("MessageCreate")
def broken(event): ...
