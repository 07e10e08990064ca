import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="x:y", room="my room")
def broken(event): ...
