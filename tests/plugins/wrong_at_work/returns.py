"""Returns what cannot be sent."""

import hikari

from spywatcher import Payload, on

circle = {}
circle["itself"] = circle


class Typed(Payload):
    user_id: str
    names: list[str] = []


@on(hikari.GuildMessageCreateEvent, emit="returns:text")
def a_text(event):
    return "text"


@on(hikari.GuildMessageCreateEvent, emit="returns:list")
def a_list(event):
    return ["no", "payload"]


@on(hikari.GuildMessageCreateEvent, emit="returns:object")
def an_object(event):
    return {"inner": {"it": object()}}


@on(hikari.GuildMessageCreateEvent, emit="returns:set")
def a_set(event):
    return {"names": {"ada"}}


@on(hikari.GuildMessageCreateEvent, emit="returns:nan")
def not_a_number(event):
    return {"share": float("nan")}


@on(hikari.GuildMessageCreateEvent, emit="returns:huge")
def huge(event):
    return {"user_id": 2**60}


@on(hikari.GuildMessageCreateEvent, emit="returns:circle")
def a_circle(event):
    return circle


@on(hikari.GuildMessageCreateEvent, emit="returns:half")
def half_a_character(event):
    return {"name": "\ud800"}


@on(hikari.GuildMessageCreateEvent, emit="returns:typed")
def wrong_type(event):
    return Typed(user_id=5)


@on(hikari.GuildMessageCreateEvent, emit="returns:inner")
def wrong_inside(event):
    return Typed(user_id="5", names=["ada", 6])


@on(hikari.GuildMessageCreateEvent)
def without_emit(event):
    return {"never": "sent"}
