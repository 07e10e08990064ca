import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="good:message")
def broken(event): ...
