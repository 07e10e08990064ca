"""Tell dashboards when a message is deleted or edited. Teaches: `needs`, and what never leaves."""

import hikari

from spywatcher import Payload, on, user_name

needs = {"messages"}  # Discord says which message was deleted, not whose it was


class MessageDeleted(Payload):
    message_id: str
    channel_id: str  # so that only who may see the channel is told
    username: str | None


class MessageEdited(Payload):
    message_id: str
    channel_id: str


@on(hikari.GuildMessageDeleteEvent, emit="message:deleted")
def message_deleted(event: hikari.GuildMessageDeleteEvent) -> MessageDeleted:
    author = event.old_message.author if event.old_message else None  # None: too old to be cached
    return MessageDeleted(
        message_id=str(event.message_id),
        channel_id=str(event.channel_id),
        username=user_name(author) if author else None,
    )


@on(hikari.GuildMessageUpdateEvent, emit="message:edited")
def message_edited(event: hikari.GuildMessageUpdateEvent) -> MessageEdited | None:
    if not event.message.edited_timestamp:  # Discord has only added the preview of a link
        return None
    return MessageEdited(message_id=str(event.message_id), channel_id=str(event.channel_id))
