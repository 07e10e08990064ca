import hikari

from spywatcher import on


@on(hikari.StartedEvent, emit="no:guild")
def broken(event): ...
