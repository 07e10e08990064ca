import hikari

from spywatcher import on


@on(hikari.Member)
def broken(event): ...
