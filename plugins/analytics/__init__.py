"""Tell dashboards who haunts a guild without speaking. Teaches: keeping data, `every`, `on_subscribe`.

Counted are typing starts, messages, reactions and changes of status of each member, by channel
and hour; never a word of what is written, never a name. Hours are whole hours since 1970 (UTC) by
this machine's clock; the last `window_days` are the current hour and the `window_days * 24 - 1`
before it. A thread counts as a channel of its own. Not counted are bots, webhooks, notices such as
"joined the server", and changes of status of members whom Discord has not sent yet.

The way of a count: a listener adds it to a dict (`counting.py`); twice a second that goes, as one
JSON text, to a thread, which adds it to running totals in memory (what the lists are made from)
and to the counts by the hour (what the end of an hour's stay in the window is made from), see
`store.py`. How these outlive the process is told in `_counts.py`, beside this folder. SQLite does
it all in a few long statements, during which Python is free to serve.
"""

import time
from pathlib import Path

import hikari

from spywatcher import PresenceUpdateEvent, Spy, every, on, on_subscribe

from .._counts import forget_member
from .counting import MESSAGES, PRESENCES, REACTIONS, TYPING, Analytics, AnalyticsUpdate
from .store import SHAPE, Settings

__all__ = ["TYPING", "Settings"]

#: What a message that a member wrote is, other than notices such as "joined the server".
WRITTEN = frozenset({hikari.MessageType.DEFAULT, hikari.MessageType.REPLY})

#: Seconds that the server's start may wait for the counts; beyond them they come later.
LOADS_WITHIN = 1.0

#: Seconds since 1970, and seconds since whenever.
now = time.time
elapsed = time.monotonic

analytics: Analytics


async def setup(spy: Spy) -> None:
    global analytics
    analytics = Analytics(spy, lambda: now(), lambda: elapsed())
    await analytics.keeper.started(LOADS_WITHIN)


async def teardown(spy: Spy) -> None:
    await analytics.keeper.close()


def forget(storage: Path, member_id: int, guild_id: int | None) -> int:
    """What `spywatcher.py forget` calls."""
    return forget_member(storage, SHAPE, member_id, guild_id)


@every(0.5)
async def keep(spy: Spy) -> None:
    await analytics.keeper.step()


@on_subscribe("analytics", emit="analytics:update")
async def newest(guild_id: str, spy: Spy) -> AnalyticsUpdate | None:
    return await analytics.newest(int(guild_id))


@on(hikari.GuildTypingEvent)
def typing(event: hikari.GuildTypingEvent) -> None:
    if not event.member.is_bot:
        analytics.typed(int(event.guild_id), int(event.user_id), int(event.channel_id))


@on(hikari.GuildMessageCreateEvent)
def message(event: hikari.GuildMessageCreateEvent) -> None:
    if event.is_human and event.message.type in WRITTEN:
        analytics.count(MESSAGES, int(event.guild_id), int(event.author_id), int(event.channel_id))


@on(hikari.GuildReactionAddEvent)
def reaction(event: hikari.GuildReactionAddEvent) -> None:
    if not event.member.is_bot:
        analytics.count(REACTIONS, int(event.guild_id), int(event.user_id), int(event.channel_id))


@on(PresenceUpdateEvent)
def presence(event: PresenceUpdateEvent) -> None:
    if event.now.status != (event.before.status if event.before else "offline"):
        analytics.count(PRESENCES, int(event.guild_id), int(event.user_id))


@on(hikari.MemberDeleteEvent)
def member_left(event: hikari.MemberDeleteEvent) -> None:
    analytics.left(int(event.guild_id), int(event.user_id))


@on(hikari.MemberUpdateEvent)
def member_renamed(event: hikari.MemberUpdateEvent) -> None:
    if event.old_member is None or event.old_member.username != event.member.username:
        analytics.announce(int(event.guild_id))


@on(hikari.GuildAvailableEvent)
async def guild_arrived(event: hikari.GuildAvailableEvent) -> None:
    size = event.guild.member_count or 0
    await analytics.guild_arrived(int(event.guild_id), event.chunk_nonce, set(event.members), size)


@on(hikari.MemberChunkEvent)
async def members_arrived(event: hikari.MemberChunkEvent) -> None:
    last = event.chunk_index + 1 == event.chunk_count
    await analytics.chunk_arrived(int(event.guild_id), event.nonce, set(event.members), last)
