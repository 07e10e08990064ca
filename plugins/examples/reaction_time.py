"""Tell dashboards who begins to type soon after another's message. Teaches: memory with a bound."""

import time
from collections import OrderedDict

import hikari

from spywatcher import Payload, Spy, member_name, on

QUICK = 5.0  # seconds
MOST_CHANNELS = 10_000
latest: OrderedDict[int, tuple[int, float]] = OrderedDict()  # author and moment, by channel


class QuickTyping(Payload):
    user_id: str
    username: str
    channel_id: str
    seconds: float


@on(hikari.GuildMessageCreateEvent)
def remember(event: hikari.GuildMessageCreateEvent) -> None:
    latest.pop(event.channel_id, None)
    latest[event.channel_id] = event.author_id, time.monotonic()
    if len(latest) > MOST_CHANNELS:
        latest.popitem(last=False)


@on(hikari.GuildTypingEvent, emit="typing:quick")
def quick_typing(event: hikari.GuildTypingEvent, spy: Spy) -> QuickTyping | None:
    author_id, moment = latest.get(event.channel_id, (event.user_id, 0.0))
    seconds = time.monotonic() - moment
    if author_id == event.user_id or seconds > QUICK:
        return None
    name = member_name(spy.bot.cache, event.guild_id, event.user_id)
    user_id, channel_id = str(event.user_id), str(event.channel_id)
    return QuickTyping(user_id=user_id, username=name, channel_id=channel_id, seconds=seconds)
