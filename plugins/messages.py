"""Tell dashboards who writes, and where. The smallest plugin: one event in, one event out."""

import hikari

from spywatcher import Payload, Spy, channel_name, on, timestamp, user_name

WRITTEN = {hikari.MessageType.DEFAULT, hikari.MessageType.REPLY}  # others are notices


class MessageNew(Payload):
    user_id: str
    username: str
    channel_id: str
    channel_name: str
    timestamp: str


@on(hikari.GuildMessageCreateEvent, emit="message:new")
def message_new(event: hikari.GuildMessageCreateEvent, spy: Spy) -> MessageNew | None:
    if event.message.type not in WRITTEN:
        return None
    return MessageNew(
        user_id=str(event.author_id),
        username=user_name(event.author),
        channel_id=str(event.channel_id),
        channel_name=channel_name(spy.bot.cache, event.channel_id),
        timestamp=timestamp(event.message.created_at),
    )
