import hikari

from spywatcher import on


class Broken:
    def __call__(self, event): ...


broken = on(hikari.GuildMessageCreateEvent)(Broken())
