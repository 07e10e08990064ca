"""Hears typing, as the other bots of bench/ingest.py do, and does nothing with it."""

import hikari

from spywatcher import on


@on(hikari.GuildTypingEvent)
def typing(event: hikari.GuildTypingEvent) -> None:
    pass
