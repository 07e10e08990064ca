"""Works, beside all that do not."""

import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="good:message")
def good(event):
    return {"text": "still here"}
