"""A pretend Discord: REST API and gateway v10 on loopback, good enough that hikari cannot tell.

Tests, demos and plugin authors drive it; the bot under test connects to it and never knows::

    async with PretendDiscord() as discord:
        guild = discord.add_guild(name="Night Owls")
        ada = guild.add_member("ada")
        bot = hikari.GatewayBot(discord.token, rest_url=discord.rest_url, banner=None)
        await bot.start(check_for_updates=False)
        await discord.wait_for_bot()
        await discord.message(guild, ada, guild.general, "hello")  # hikari gets MESSAGE_CREATE

The path of one action: state changes -> payload -> what the session's intents allow -> numbered
and remembered for RESUME -> compressed -> socket. Tests of plugins need no network: see `Harness`;
the `*_json` functions give the same payloads to whoever feeds hikari by hand.
Run as a program it plays two guilds: `python simulator.py --port 8123`.

Sections, each using only those above it:
    numbers of the protocol   opcodes, close codes, intents, permissions, as Discord documents them
    ids and times             snowflakes, bot tokens, timestamps
    the guild                 who and what there is, and its JSON
    payloads                  what the gateway sends, made from that
    what intents let through  which bot gets what, and how much of it
    gateway sessions          one shard of a bot, whether it is connected or not
    gateway                   all sessions: who comes in, who gets what, and every fault of Discord's
    gateway sockets           bytes and opcodes, and the limits of what a client may send
    what people do            actions: each changes the guild and tells the bots
    REST                      what bots ask and post
    signing in                Discord's side of OAuth2: whom one may be, tokens, who that is
    the server                PretendDiscord, all of that on a port
    the harness               plugins tried without any network
    a lively guild            people who never sleep
    the demo                  the server of spywatcher.py in front of two such guilds
    command line              the pretend Discord alone
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import collections
import contextlib
import enum
import functools
import hashlib
import http
import importlib
import itertools
import json
import logging
import math
import random
import secrets
import signal
import socket as tcp  # a gateway's socket is called `socket` here
import sys
import tempfile
import textwrap
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar, cast

import hikari
import msgspec
import socketio
import tornado.httpserver
import tornado.httputil
import tornado.netutil
import tornado.routing
import tornado.template
import tornado.web
import tornado.websocket

import spywatcher

__all__ = [
    "PRIVILEGED",
    "Channel",
    "ChannelType",
    "CloseCode",
    "Emitted",
    "Guild",
    "Harness",
    "Intent",
    "LivelyGuild",
    "Member",
    "Overwrite",
    "Permission",
    "PretendDiscord",
    "PretendShard",
    "Role",
    "Thread",
    "User",
    "activity_json",
    "guild_create_json",
    "guild_delete_json",
    "hidden_except",
    "iso",
    "lively_guilds",
    "make_guild",
    "make_token",
    "member_add_json",
    "member_remove_json",
    "message_json",
    "play",
    "presence_json",
    "reaction_json",
    "role_event_json",
    "run_demo",
    "snowflake",
    "thread_create_json",
    "thread_delete_json",
    "typing_json",
    "voice_state_json",
]

Json = dict[str, Any]
T = TypeVar("T")


# ---- numbers of the protocol ----
# Opcodes as Discord documents them (Gateway: Opcodes), all else as hikari has it. Nothing here does anything.

API_VERSION = 10
TRACE = ["simulator"]  # where Discord names the servers that a packet came through


class Op(enum.IntEnum):
    """Gateway opcodes."""

    DISPATCH = 0
    HEARTBEAT = 1
    IDENTIFY = 2
    PRESENCE_UPDATE = 3
    VOICE_STATE_UPDATE = 4
    RESUME = 6
    RECONNECT = 7
    REQUEST_GUILD_MEMBERS = 8
    INVALID_SESSION = 9
    HELLO = 10
    HEARTBEAT_ACK = 11
    REQUEST_SOUNDBOARD_SOUNDS = 31
    REQUEST_CHANNEL_INFO = 43


CloseCode = hikari.errors.ShardCloseCode
Intent = hikari.Intents
Permission = hikari.Permissions
ChannelType = hikari.ChannelType

PRIVILEGED = Intent.ALL_PRIVILEGED
# The flag of an application by the privileged intent that a bot in under a hundred guilds may use
# (Resources: Application, Application Flags, the ones that end in _LIMITED).
APPLICATION_FLAGS = {
    Intent.GUILD_PRESENCES: 1 << 13,
    Intent.GUILD_MEMBERS: 1 << 15,
    Intent.MESSAGE_CONTENT: 1 << 19,
}
EVERYONE_MAY = (
    Permission.ADD_REACTIONS
    | Permission.VIEW_CHANNEL
    | Permission.SEND_MESSAGES
    | Permission.READ_MESSAGE_HISTORY
    | Permission.CONNECT
    | Permission.SPEAK
    | Permission.CREATE_PUBLIC_THREADS
    | Permission.SEND_MESSAGES_IN_THREADS
)


# ---- ids and times ----

DISCORD_EPOCH = datetime(2015, 1, 1, tzinfo=UTC)  # a snowflake counts milliseconds from here
_increments = itertools.count()


def snowflake(at: datetime | None = None) -> int:
    """A new id made at that moment (now, when not given).

    Layout as documented (Reference: Snowflakes): milliseconds, worker, process, increment.
    """
    moment = at or datetime.now(UTC)
    milliseconds = (moment - DISCORD_EPOCH) // timedelta(milliseconds=1)
    # The increment has 12 bits; the ten worker and process bits above it carry on from there, so
    # that four million ids of one millisecond still differ.
    return milliseconds << 22 | next(_increments) & 0x3FFFFF


def days_ago(days: float) -> datetime:
    """That many days before now, in UTC."""
    return datetime.now(UTC) - timedelta(days=days)


def iso(at: datetime | None = None) -> str:
    """ISO 8601 with microseconds and offset, as Discord writes timestamps."""
    return (at or datetime.now(UTC)).isoformat(timespec="microseconds")


def make_token(bot_id: int) -> str:
    """A fake bot token: base64 of the id, a timestamp part, a secret part (Reference: Authentication)."""
    head = base64.urlsafe_b64encode(str(bot_id).encode()).decode().rstrip("=")
    return f"{head}.{secrets.token_urlsafe(4)}.{secrets.token_urlsafe(28)}"


def bot_id_of(token: str) -> int:
    """The id that a bot token starts with; ValueError when it starts with none."""
    head = token.partition(".")[0]
    try:
        return int(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (binascii.Error, ValueError) as error:
        raise ValueError("a bot token begins with the base64 of the bot's id") from error


# ---- the guild ----
# The state: plain data that knows its own JSON (Resources: User, Guild, Channel). `Guild.add_*`
# change it silently, for building a guild that no bot has seen yet; PretendDiscord's actions change
# it and tell the bots.


@dataclass(slots=True)
class User:
    """An account."""

    id: int
    name: str
    display_name: str | None = None
    bot: bool = False
    avatar: str | None = None  # 32 hexadecimal digits

    def to_json(self) -> Json:
        """Resources: User object, as other users see it."""
        return {
            "id": str(self.id),
            "username": self.name,
            "global_name": self.display_name,
            "discriminator": "0",
            "avatar": self.avatar,
            "avatar_decoration_data": None,
            "bot": self.bot,
            "public_flags": 0,
        }


@dataclass(slots=True)
class Member:
    """An account in one guild, with its presence there."""

    user: User
    role_ids: list[int] = field(default_factory=list)
    nick: str | None = None
    joined_at: str = field(default_factory=iso)
    status: str = "offline"
    client_status: dict[str, str] = field(default_factory=dict)
    activities: list[Json] = field(default_factory=list)

    @property
    def id(self) -> int:
        """The id of the account."""
        return self.user.id

    @property
    def name(self) -> str:
        """The username of the account."""
        return self.user.name

    def appear(
        self,
        status: str,
        platforms: Iterable[str] | Mapping[str, str] = (),
        activities: Iterable[Json] = (),
    ) -> None:
        """Change the presence silently; who is offline has neither devices nor activities.

        Platforms are names (`desktop`, `mobile`, `web`) or a whole `client_status`; with none given
        the devices of before stay, or it is the desktop.
        """
        names = platforms or list(self.client_status) or ["desktop"]
        devices = names if isinstance(names, Mapping) else dict.fromkeys(names, status)
        online = status != "offline"
        self.status = status
        self.client_status = dict(devices) if online else {}
        self.activities = list(activities) if online else []

    def to_json(self, *, with_user: bool = True) -> Json:
        """Resources: Guild Member object; messages carry it without its user."""
        body: Json = {
            "roles": [str(role_id) for role_id in self.role_ids],
            "nick": self.nick,
            "avatar": None,
            "joined_at": self.joined_at,
            "premium_since": None,
            "deaf": False,
            "mute": False,
            "pending": False,
            "flags": 0,
            "communication_disabled_until": None,
        }
        return body | {"user": self.user.to_json()} if with_user else body


@dataclass(slots=True)
class Role:
    """A named set of permissions; the one with the guild's id is @everyone."""

    id: int
    name: str
    permissions: int = 0
    position: int = 0
    bot_id: int | None = None

    def to_json(self) -> Json:
        """Resources: Role object."""
        tags = {"tags": {"bot_id": str(self.bot_id)}} if self.bot_id else {}
        return {
            "id": str(self.id),
            "name": self.name,
            "permissions": str(int(self.permissions)),
            "position": self.position,
            "color": 0,
            "colors": {"primary_color": 0, "secondary_color": None, "tertiary_color": None},
            "hoist": False,
            "managed": self.bot_id is not None,
            "mentionable": False,
            "icon": None,
            "unicode_emoji": None,
            "flags": 0,
        } | tags


@dataclass(slots=True)
class Overwrite:
    """What a channel allows or denies one role or, with `member`, one member."""

    id: int
    allow: int = 0
    deny: int = 0
    member: bool = False

    def to_json(self) -> Json:
        """Resources: Channel, Overwrite object."""
        return {
            "id": str(self.id),
            "type": int(self.member),
            "allow": str(int(self.allow)),
            "deny": str(int(self.deny)),
        }


@dataclass(slots=True)
class Channel:
    """A channel that is no thread."""

    id: int
    guild_id: int
    name: str
    type: int = ChannelType.GUILD_TEXT
    position: int = 0
    parent_id: int | None = None
    overwrites: list[Overwrite] = field(default_factory=list)
    last_message_id: int | None = None

    def to_json(self) -> Json:
        """Resources: Channel object."""
        voice = {"bitrate": 64_000, "user_limit": 0, "rtc_region": None}
        return {
            "id": str(self.id),
            "guild_id": str(self.guild_id),
            "type": int(self.type),
            "name": self.name,
            "position": self.position,
            "parent_id": _id_or_none(self.parent_id),
            "permission_overwrites": [overwrite.to_json() for overwrite in self.overwrites],
            "topic": None,
            "nsfw": False,
            "rate_limit_per_user": 0,
            "last_message_id": _id_or_none(self.last_message_id),
            "flags": 0,
        } | (voice if self.type == ChannelType.GUILD_VOICE else {})


@dataclass(slots=True)
class Thread:
    """A public thread below a channel."""

    id: int
    guild_id: int
    parent_id: int
    owner_id: int
    name: str
    created_at: str = field(default_factory=iso)
    last_message_id: int | None = None

    def to_json(self) -> Json:
        """Resources: Channel object, thread fields."""
        return {
            "id": str(self.id),
            "guild_id": str(self.guild_id),
            "parent_id": str(self.parent_id),
            "owner_id": str(self.owner_id),
            "type": int(ChannelType.GUILD_PUBLIC_THREAD),
            "name": self.name,
            "last_message_id": _id_or_none(self.last_message_id),
            "rate_limit_per_user": 0,
            "message_count": 0,
            "total_message_sent": 0,
            "member_count": 1,
            "flags": 0,
            "thread_metadata": {
                "archived": False,
                "locked": False,
                "auto_archive_duration": 1440,
                "archive_timestamp": self.created_at,
                "create_timestamp": self.created_at,
            },
        }


@dataclass(slots=True)
class Guild:
    """A guild with all that is in it; `make_guild` builds one as Discord would."""

    id: int
    name: str
    owner_id: int
    bot_id: int
    joined_at: str = field(default_factory=iso)
    available: bool = True
    members: dict[int, Member] = field(default_factory=dict)
    roles: dict[int, Role] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    threads: dict[int, Thread] = field(default_factory=dict)
    voice: dict[int, int] = field(default_factory=dict)  # member id -> voice channel id
    bans: dict[int, User] = field(default_factory=dict)

    @property
    def owner(self) -> Member:
        """The member who owns the guild."""
        return self.members[self.owner_id]

    @property
    def everyone(self) -> Role:
        """The role that everyone has."""
        return self.roles[self.id]

    @property
    def general(self) -> Channel:
        """The first text channel."""
        return next(c for c in self.channels.values() if c.type == ChannelType.GUILD_TEXT)

    def add_member(
        self,
        name: str,
        *,
        roles: Iterable[Role] = (),
        nick: str | None = None,
        bot: bool = False,
        user: User | None = None,
        user_id: int | None = None,
        account_age_days: float = 400.0,
    ) -> Member:
        """Put someone in silently; `user` brings in an account that exists already."""
        created = days_ago(account_age_days)
        user = user or User(user_id or snowflake(created), name, name.title(), bot)
        member = Member(
            user, [role.id for role in roles], nick, iso(days_ago(account_age_days / 2))
        )
        self.members[user.id] = member
        return member

    def add_role(self, name: str, permissions: int = 0) -> Role:
        """Put a role above all others silently."""
        role = Role(snowflake(), name, permissions, position=len(self.roles))
        self.roles[role.id] = role
        return role

    def add_channel(
        self,
        name: str,
        *,
        kind: int = ChannelType.GUILD_TEXT,
        parent: Channel | None = None,
        overwrites: Iterable[Overwrite] = (),
    ) -> Channel:
        """Put a channel at the end silently."""
        parent_id = parent.id if parent else None
        position = len(self.channels)
        channel = Channel(snowflake(), self.id, name, kind, position, parent_id, list(overwrites))
        self.channels[channel.id] = channel
        return channel

    def add_thread(self, name: str, parent: Channel, owner: Member | None = None) -> Thread:
        """Open a thread silently, by the guild's owner when nobody is named."""
        thread = Thread(snowflake(), self.id, parent.id, owner.id if owner else self.owner_id, name)
        self.threads[thread.id] = thread
        return thread

    def to_partial_json(self) -> Json:
        """Resources: User, an entry of the bot's own list of guilds."""
        permissions = 0
        for role_id in (self.id, *self.members[self.bot_id].role_ids):
            permissions |= int(self.roles[role_id].permissions)
        return {
            "id": str(self.id),
            "name": self.name,
            "icon": None,
            "banner": None,
            "owner": False,
            "permissions": str(permissions),
            "features": [],
        }

    def to_json(self) -> Json:
        """Resources: Guild object, as GUILD_UPDATE and REST carry it."""
        empty = dict.fromkeys(_GUILD_FIELDS_NEVER_SET)
        return empty | {
            "id": str(self.id),
            "name": self.name,
            "owner_id": str(self.owner_id),
            "roles": [role.to_json() for role in self.roles.values()],
            "emojis": [],
            "stickers": [],
            "features": [],
            "afk_timeout": 300,
            "verification_level": 1,
            "default_message_notifications": 1,
            "explicit_content_filter": 0,
            "mfa_level": 0,
            "nsfw": False,
            "nsfw_level": 0,
            "region": "deprecated",
            "premium_tier": 0,
            "premium_subscription_count": 0,
            "premium_progress_bar_enabled": False,
            "preferred_locale": "en-US",
            "system_channel_flags": 0,
            "widget_enabled": False,
            "max_members": 500_000,
            "max_video_channel_users": 25,
        }


_GUILD_FIELDS_NEVER_SET = (
    "icon",
    "splash",
    "discovery_splash",
    "afk_channel_id",
    "application_id",
    "system_channel_id",
    "rules_channel_id",
    "public_updates_channel_id",
    "safety_alerts_channel_id",
    "vanity_url_code",
    "description",
    "banner",
    "incidents_data",
    "max_presences",
)


def _id_or_none(number: int | None) -> str | None:
    return None if number is None else str(number)


def make_guild(
    name: str,
    *,
    bot: User,
    guild_id: int | None = None,
    owner_id: int | None = None,
) -> Guild:
    """A guild as Discord creates one: an owner, @everyone, a `general` channel; and the bot in it."""
    created = days_ago(700)
    guild_id = guild_id or snowflake(created)
    owner_id = owner_id or snowflake(days_ago(1900))
    guild = Guild(guild_id, name, owner_id, bot.id, iso(days_ago(30)))
    guild.roles[guild_id] = Role(guild_id, "@everyone", EVERYONE_MAY)
    watcher = guild.add_role(bot.name, Permission.VIEW_CHANNEL | Permission.READ_MESSAGE_HISTORY)
    watcher.bot_id = bot.id
    guild.add_member("owner", user_id=owner_id)
    guild.add_member(bot.name, user=bot, roles=[watcher]).appear("online", ["web"])
    guild.add_channel("general")
    return guild


def hidden_except(guild: Guild, *viewers: Role | Member) -> list[Overwrite]:
    """Overwrites of a private channel that only these roles and members see."""
    view = Permission.VIEW_CHANNEL
    open_to = [Overwrite(v.id, allow=view, member=isinstance(v, Member)) for v in viewers]
    return [Overwrite(guild.id, deny=view), *open_to]


# ---- payloads ----
# The raw `d` of gateway dispatches (Gateway Events), made from the state and from nothing else, so
# that they serve a real socket and a test without network alike.


class PretendShard:
    """The little of a shard that hikari's event manager touches, for tests without network."""

    def __init__(self, bot_id: int, shard_id: int = 0) -> None:
        self.id = shard_id
        self.bot_id = bot_id

    def get_user_id(self) -> int:
        """The bot's own id."""
        return self.bot_id

    async def request_guild_members(self, *_: Any, **__: Any) -> None:
        """Nobody answers: give the members with GUILD_CREATE."""


def message_json(
    guild: Guild | None,
    member: Member | User,
    channel: Channel | Thread | int,
    content: str = "hello",
    *,
    webhook_id: int | None = None,
    bot: bool | None = None,
) -> Json:
    """MESSAGE_CREATE. Without a guild it is a direct message; with a webhook id, the webhook's."""
    now = datetime.now(UTC)
    message_id = snowflake(now)
    author = (member.user if isinstance(member, Member) else member).to_json()
    if bot is not None:
        author["bot"] = bot
    body: Json = {
        "id": str(message_id),
        "channel_id": str(channel if isinstance(channel, int) else channel.id),
        "author": author,
        "content": content,
        "timestamp": iso(now),
        "edited_timestamp": None,
        "tts": False,
        "mention_everyone": False,
        "mentions": [],
        "mention_roles": [],
        "attachments": [],
        "embeds": [],
        "components": [],
        "pinned": False,
        "type": 0,
        "flags": 0,
        "nonce": str(message_id),
    }
    return body | _message_origin(guild, member, author, webhook_id)


def _message_origin(
    guild: Guild | None, member: Member | User, author: Json, webhook_id: int | None
) -> Json:
    origin: Json = (
        {"channel_type": int(ChannelType.DM)} if guild is None else {"guild_id": str(guild.id)}
    )
    if webhook_id is not None:  # a webhook posts under its own id and is a member of nothing
        webhook = {"id": str(webhook_id), "bot": True, "discriminator": "0000"}
        return origin | {"webhook_id": str(webhook_id), "author": author | webhook}
    if guild is not None and isinstance(member, Member):
        origin["member"] = member.to_json(with_user=False)
    return origin


def presence_json(guild: Guild, member: Member) -> Json:
    """PRESENCE_UPDATE, also an entry of GUILD_CREATE's presences: the user is only an id."""
    return {
        "user": {"id": str(member.id)},
        "guild_id": str(guild.id),
        "status": member.status,
        "client_status": member.client_status,
        "activities": [activity_json(activity) for activity in member.activities],
    }


def activity_json(activity: Json) -> Json:
    """An activity with the fields that are always there filled in: `{"name": "Chess"}` is enough."""
    made_up = f"{zlib.crc32(repr(activity.get('name')).encode()):016x}"
    return {"id": made_up, "type": 0, "created_at": int(time.time() * 1000), **activity}


def typing_json(
    guild: Guild | None, member: Member | User, channel: Channel | Thread | int
) -> Json:
    """TYPING_START; its timestamp is in seconds."""
    body: Json = {
        "channel_id": str(channel if isinstance(channel, int) else channel.id),
        "user_id": str(member.id),
        "timestamp": int(time.time()),
    }
    if guild is None or isinstance(member, User):
        return body
    return body | {"guild_id": str(guild.id), "member": member.to_json()}


def reaction_json(
    guild: Guild,
    member: Member,
    channel: Channel | Thread,
    message_id: int | str | None = None,
    emoji: str = "👍",
) -> Json:
    """MESSAGE_REACTION_ADD with a Unicode emoji."""
    return {
        "user_id": str(member.id),
        "guild_id": str(guild.id),
        "channel_id": str(channel.id),
        "message_id": str(message_id or snowflake()),
        "member": member.to_json(),
        "emoji": {"id": None, "name": emoji},
        "burst": False,
        "type": 0,
    }


def member_add_json(guild: Guild, member: Member) -> Json:
    """GUILD_MEMBER_ADD and GUILD_MEMBER_UPDATE."""
    return {"guild_id": str(guild.id)} | member.to_json()


def member_remove_json(guild: Guild, member: Member) -> Json:
    """GUILD_MEMBER_REMOVE."""
    return {"guild_id": str(guild.id), "user": member.user.to_json()}


def role_event_json(guild: Guild, role: Role) -> Json:
    """GUILD_ROLE_CREATE and GUILD_ROLE_UPDATE."""
    return {"guild_id": str(guild.id), "role": role.to_json()}


def thread_create_json(thread: Thread) -> Json:
    """THREAD_CREATE of a thread that was just opened."""
    return thread.to_json() | {"newly_created": True}


def thread_delete_json(thread: Thread) -> Json:
    """THREAD_DELETE: four fields of the thread."""
    body = thread.to_json()
    return {key: body[key] for key in ("id", "guild_id", "parent_id", "type")}


def voice_state_json(guild: Guild, member: Member) -> Json:
    """VOICE_STATE_UPDATE; the channel is null for who has hung up."""
    return {
        "guild_id": str(guild.id),
        "channel_id": _id_or_none(guild.voice.get(member.id)),
        "user_id": str(member.id),
        "member": member.to_json(),
        "session_id": f"{member.id:032x}",
        "request_to_speak_timestamp": None,
        "deaf": False,
        "mute": False,
        "self_deaf": False,
        "self_mute": False,
        "self_video": False,
        "suppress": False,
    }


MOST_SHOWN = 75_000  # members of a guild that is shown whole in GUILD_CREATE (Gateway Events)


def guild_create_json(
    guild: Guild,
    intents: int = Intent.ALL,
    *,
    large_threshold: int = 250,
    joined_now: bool = False,
) -> Json:
    """GUILD_CREATE as a session with these intents gets it (Gateway Events: Guild Create).

    Without GUILD_PRESENCES, or of more than 75,000 members, it shows no presence and only the bot and
    who is in voice; a guild over the threshold shows who is online. `unavailable` is missing when the
    bot was just added.
    """
    large = len(guild.members) > large_threshold
    with_presences = bool(intents & Intent.GUILD_PRESENCES) and len(guild.members) <= MOST_SHOWN
    online = [m for m in guild.members.values() if m.status != "offline"]
    always = [guild.members[i] for i in {guild.bot_id, *guild.voice} if i in guild.members]
    shown = (online if large else guild.members.values()) if with_presences else ()
    members = {m.id: m for m in [*always, *shown]}
    voice = guild.voice if intents & Intent.GUILD_VOICE_STATES else {}
    seen_now: Json = {} if joined_now else {"unavailable": False}
    content: Json = {
        "joined_at": guild.joined_at,
        "large": large,
        "member_count": len(guild.members),
        "members": [member.to_json() for member in members.values()],
        "presences": [presence_json(guild, m) for m in online] if with_presences else [],
        "channels": [channel.to_json() for channel in guild.channels.values()],
        "threads": [thread.to_json() for thread in guild.threads.values()],
        "voice_states": [voice_state_json(guild, members[i]) for i in voice if i in members],
        "stage_instances": [],
        "guild_scheduled_events": [],
        "soundboard_sounds": [],
    }
    return guild.to_json() | content | seen_now


def guild_delete_json(guild: Guild, *, outage: bool = False) -> Json:
    """GUILD_DELETE: with `unavailable` Discord has trouble, without it the bot was removed."""
    return {"id": str(guild.id)} | ({"unavailable": True} if outage else {})


# ---- what intents let through ----
# The table of Gateway: List of Intents. Events that are not in it reach everybody.

_GUILD_EVENTS = {
    Intent.GUILDS: """GUILD_CREATE GUILD_UPDATE GUILD_DELETE GUILD_ROLE_CREATE GUILD_ROLE_UPDATE
        GUILD_ROLE_DELETE CHANNEL_CREATE CHANNEL_UPDATE CHANNEL_DELETE CHANNEL_PINS_UPDATE
        THREAD_CREATE THREAD_UPDATE THREAD_DELETE THREAD_LIST_SYNC THREAD_MEMBER_UPDATE
        STAGE_INSTANCE_CREATE STAGE_INSTANCE_UPDATE STAGE_INSTANCE_DELETE""",
    Intent.GUILD_MEMBERS: """GUILD_MEMBER_ADD GUILD_MEMBER_UPDATE GUILD_MEMBER_REMOVE
        THREAD_MEMBERS_UPDATE""",
    Intent.GUILD_MODERATION: "GUILD_AUDIT_LOG_ENTRY_CREATE GUILD_BAN_ADD GUILD_BAN_REMOVE",
    Intent.GUILD_EMOJIS: "GUILD_EMOJIS_UPDATE GUILD_STICKERS_UPDATE",
    Intent.GUILD_INTEGRATIONS: """GUILD_INTEGRATIONS_UPDATE INTEGRATION_CREATE INTEGRATION_UPDATE
        INTEGRATION_DELETE""",
    Intent.GUILD_WEBHOOKS: "WEBHOOKS_UPDATE",
    Intent.GUILD_INVITES: "INVITE_CREATE INVITE_DELETE",
    Intent.GUILD_VOICE_STATES: "VOICE_STATE_UPDATE",
    Intent.GUILD_PRESENCES: "PRESENCE_UPDATE",
    Intent.GUILD_MESSAGES: "MESSAGE_CREATE MESSAGE_UPDATE MESSAGE_DELETE MESSAGE_DELETE_BULK",
    Intent.GUILD_MESSAGE_REACTIONS: """MESSAGE_REACTION_ADD MESSAGE_REACTION_REMOVE
        MESSAGE_REACTION_REMOVE_ALL MESSAGE_REACTION_REMOVE_EMOJI""",
    Intent.GUILD_MESSAGE_TYPING: "TYPING_START",
}
_DIRECT_EVENTS = {
    Intent.DM_MESSAGES: "MESSAGE_CREATE MESSAGE_UPDATE MESSAGE_DELETE CHANNEL_PINS_UPDATE",
    Intent.DM_MESSAGE_REACTIONS: _GUILD_EVENTS[Intent.GUILD_MESSAGE_REACTIONS],
    Intent.DM_MESSAGE_TYPING: "TYPING_START",
}
_NO_CONTENT: Json = {"content": "", "embeds": [], "attachments": [], "components": []}


def _by_event(table: Mapping[Intent, str]) -> dict[str, Intent]:
    return {event: intent for intent, events in table.items() for event in events.split()}


GUILD_INTENT = _by_event(_GUILD_EVENTS)
DIRECT_INTENT = _by_event(_DIRECT_EVENTS)


def let_through(
    name: str, data: Json, intents: int, bot_id: int, *, direct: bool = False
) -> Json | None:
    """What a session with these intents gets of an event: all of it, less the content, or nothing."""
    needed = (DIRECT_INTENT if direct else GUILD_INTENT).get(name, 0)
    own_update = name == "GUILD_MEMBER_UPDATE" and data["user"]["id"] == str(bot_id)
    if needed and not intents & needed and not own_update:
        return None
    has_content = name in ("MESSAGE_CREATE", "MESSAGE_UPDATE")
    if (
        not has_content
        or direct
        or intents & Intent.MESSAGE_CONTENT
        or _content_is_for(bot_id, data)
    ):
        return data
    return data | _NO_CONTENT


def _content_is_for(bot_id: int, message: Json) -> bool:
    """The bot may always read what it wrote and what mentions it."""
    readers = [message.get("author", {}), *message.get("mentions", ())]
    return any(user.get("id") == str(bot_id) for user in readers)


# ---- gateway sessions ----
# What Discord remembers of a shard whether or not it is connected: its intents, its numbering, and
# what it was sent, for RESUME. Sessions know no guild and no message; they carry what they are given.

REPLAY_LIMIT = 10_000  # packets kept for RESUME; a bot that missed more starts a new session
BEGINNING = -1  # no packet was acknowledged yet

_encode = msgspec.json.Encoder().encode


class Packet(msgspec.Struct):
    """What a client sends (Gateway: Payload Structure)."""

    op: int
    d: Any = None


class Identify(msgspec.Struct):
    """`d` of IDENTIFY."""

    token: str
    intents: int
    shard: tuple[int, int] = (0, 1)
    compress: bool = False
    large_threshold: int = 50


class Resume(msgspec.Struct):
    """`d` of RESUME."""

    token: str
    session_id: str
    seq: int


class RequestMembers(msgspec.Struct):
    """`d` of REQUEST_GUILD_MEMBERS; ids come as strings or numbers, one or many."""

    guild_id: str | int
    query: str | None = None
    limit: int = 0
    presences: bool = False
    user_ids: list[str | int] | str | int | None = None
    nonce: str | None = None

    def wanted_ids(self) -> list[int] | None:
        """The ids asked for, or None when the question is a name."""
        if self.user_ids is None:
            return None
        ids = self.user_ids if isinstance(self.user_ids, list) else [self.user_ids]
        return [int(user_id) for user_id in ids]


class Outlet(Protocol):
    """The open socket of a client, as sessions and faults see it."""

    def transmit(self, packet: bytes) -> asyncio.Future[None] | None:
        """Send an encoded packet; the future ends when the kernel has it."""

    def send(self, op: Op, d: Any) -> None:
        """Send a packet that is no dispatch."""

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """Begin the closing handshake."""

    def cut(self) -> None:
        """End the TCP connection without a word."""


class Session:
    """One shard of one bot, from IDENTIFY until it is invalidated."""

    def __init__(self, identify: Identify, socket: Outlet) -> None:
        self.id = secrets.token_hex(16)
        self.intents = Intent(identify.intents)
        self.shard_id, self.shard_count = identify.shard
        self.large_threshold = identify.large_threshold
        self.seq = 0
        self.heard = 0  # the last number that the bot said it has seen
        self.sent: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=REPLAY_LIMIT)
        self.socket: Outlet | None = socket

    def covers(self, guild_id: int | None) -> bool:
        """Whether this shard has the guild; direct messages come on shard 0 (Gateway: Sharding)."""
        return ((guild_id or 0) >> 22) % self.shard_count == self.shard_id

    def push(self, name: str, data: Json) -> asyncio.Future[None] | None:
        """Number a dispatch, remember it, send it when connected; the future ends when it is out."""
        self.seq += 1
        packet = _encode({"op": Op.DISPATCH, "t": name, "s": self.seq, "d": data})
        self.sent.append((self.seq, packet))
        return self.socket.transmit(packet) if self.socket else None

    def remembers(self, seq: int) -> bool:
        """Whether nothing after that number was forgotten."""
        return not self.sent or self.sent[0][0] <= seq + 1

    def missed(self, seq: int) -> list[bytes]:
        """The packets after that number, oldest first."""
        return [packet for number, packet in self.sent if number > seq]


# ---- gateway ----
# Who may come in, what a new session is told, which session gets which dispatch, and every fault
# that Discord is known for. Knows guilds and sessions; sockets are only somewhere to write to.

CHUNK_SIZE = 1000  # members per GUILD_MEMBERS_CHUNK
ASK_AGAIN = 1.0  # seconds that `caught_up` waits for a bot that has not seen all yet


class RefusedError(Exception):
    """The client did something that Discord answers by closing the socket.

    `reason` is what is said along with the code: the code's name in words, unless given.
    """

    def __init__(self, code: CloseCode, reason: str | None = None) -> None:
        self.code = code
        self.reason = reason or code.name.replace("_", " ").capitalize() + "."
        super().__init__(self.reason)


class Gateway:
    """All sessions of all shards, and what is sent to them."""

    def __init__(self, bot: User, token: str, allowed_privileged: int, shards: int) -> None:
        self.bot = bot
        self.token = token
        self.allowed_privileged = int(allowed_privileged)
        self.shards = shards
        self.gateway_url = ""
        self.guilds: dict[int, Guild] = {}
        self.sessions: dict[str, Session] = {}
        self.sockets: set[Outlet] = set()
        self.frozen = False
        self.identifies = self.resumes = self.heartbeats = self.rest_calls = 0
        self._unannounced: list[Guild] = []
        self._changed = asyncio.Event()

    @property
    def application_flags(self) -> int:
        """What the developer portal has switched on, as bots are told."""
        allowed = self.allowed_privileged
        return sum(flag for intent, flag in APPLICATION_FLAGS.items() if allowed & intent)

    # What clients ask.

    def identify(self, identify: Identify, socket: Outlet) -> Session:
        """Open a session, send READY and its guilds; raises RefusedError."""
        self.identifies += 1
        self._check(identify)
        self.announce()
        session = Session(identify, socket)
        self.sessions[session.id] = session
        mine = [guild for guild in self.guilds.values() if session.covers(guild.id)]
        session.push("READY", self._ready(session, mine))
        for guild in mine:
            self._show_guild(session, guild)
        self.changed()
        return session

    def _check(self, identify: Identify) -> None:
        shard_id, shard_count = identify.shard
        self._check_token(identify.token)
        if not 0 <= shard_id < shard_count:
            raise RefusedError(CloseCode.INVALID_SHARD)
        if identify.intents & ~int(Intent.ALL):
            raise RefusedError(CloseCode.INVALID_INTENT)
        if identify.intents & PRIVILEGED & ~self.allowed_privileged:
            raise RefusedError(CloseCode.DISALLOWED_INTENT)

    def _check_token(self, token: str) -> None:
        if token.removeprefix("Bot ") != self.token:
            raise RefusedError(CloseCode.AUTHENTICATION_FAILED)

    def _ready(self, session: Session, guilds: Iterable[Guild]) -> Json:
        me = {"verified": True, "mfa_enabled": True, "email": None, "flags": 0}
        return {
            "v": API_VERSION,
            "user": self.bot.to_json() | me,
            "guilds": [{"id": str(guild.id), "unavailable": True} for guild in guilds],
            "session_id": session.id,
            "session_type": "normal",
            "resume_gateway_url": self.gateway_url,
            "shard": [session.shard_id, session.shard_count],
            "application": {"id": str(self.bot.id), "flags": self.application_flags},
            "private_channels": [],
            "_trace": TRACE,
        }

    def resume(self, resume: Resume, socket: Outlet) -> Session | None:
        """Send again what was missed; None when the session is gone; raises RefusedError."""
        self._check_token(resume.token)
        session = self.sessions.get(resume.session_id)
        if session is None or not session.remembers(resume.seq):
            return None
        if resume.seq > session.seq:
            raise RefusedError(CloseCode.INVALID_SEQ)
        self.resumes += 1
        session.socket = socket
        for packet in session.missed(resume.seq):
            socket.transmit(packet)
        session.push("RESUMED", {"_trace": TRACE})
        self.changed()
        return session

    def request_members(self, session: Session, request: RequestMembers) -> None:
        """Answer with as many GUILD_MEMBERS_CHUNK as it takes, one when nobody is found."""
        guild = self.guilds.get(int(request.guild_id))
        if guild is None or not session.covers(guild.id):
            return
        found = _found_members(guild, request, session.intents)
        chunks = [found[i : i + CHUNK_SIZE] for i in range(0, len(found), CHUNK_SIZE)] or [[]]
        for index, members in enumerate(chunks):
            place = {"chunk_index": index, "chunk_count": len(chunks)}
            body = _chunk_json(guild, members, request, session.intents)
            session.push("GUILD_MEMBERS_CHUNK", place | body)

    def heartbeat(self, session: Session | None, seq: int | None) -> bool:
        """Note how far the bot has come; tells whether to acknowledge."""
        self.heartbeats += 1
        if session is not None and seq is not None:
            session.heard = max(session.heard, seq)
        self.changed()
        return not self.frozen

    def gone(self, socket: Outlet, code: int | None) -> None:
        """A connection is over. Codes 1000 and 1001 from the client end the session for good."""
        if code in (1000, 1001):
            self.forget(socket)
        self.sockets.discard(socket)
        self.detach(socket)

    def forget(self, socket: Outlet) -> None:
        """End the session of a socket: nobody can resume it."""
        self.sessions = {i: s for i, s in self.sessions.items() if s.socket is not socket}

    def detach(self, socket: Outlet) -> None:
        """Send no more dispatches to a socket; its session waits for RESUME."""
        for session in self.sessions.values():
            if session.socket is socket:
                session.socket = None
        self.changed()

    # What is sent.

    async def dispatch(self, name: str, data: Json, *, guild_id: int | None = None) -> None:
        """Send a raw event to every session that covers the guild and whose intents allow it.

        The guild is taken from the data when it is not given; with neither it is a direct event.
        Returns when the kernel has the bytes; a session without a socket gets it when it resumes.
        """
        self.announce()
        if guild_id is None and "guild_id" in data:
            guild_id = int(data["guild_id"])
        sends = [self._push(s, name, data, guild_id) for s in self.sessions.values()]
        await asyncio.gather(*filter(None, sends), return_exceptions=True)

    def _push(
        self, session: Session, name: str, data: Json, guild_id: int | None
    ) -> asyncio.Future[None] | None:
        if not session.covers(guild_id):
            return None
        shown = let_through(name, data, session.intents, self.bot.id, direct=guild_id is None)
        return None if shown is None else session.push(name, shown)

    def announce(self) -> None:
        """Show connected bots the guilds that they were added to since the last time."""
        guilds, self._unannounced = self._unannounced, []
        for guild in guilds:
            self.show(guild, joined_now=True)

    def show(self, guild: Guild, *, joined_now: bool = False) -> None:
        """Send GUILD_CREATE to every session that covers the guild."""
        for session in self.sessions.values():
            self._show_guild(session, guild, joined_now=joined_now)

    def _show_guild(self, session: Session, guild: Guild, *, joined_now: bool = False) -> None:
        if guild.available and session.covers(guild.id) and session.intents & Intent.GUILDS:
            threshold = session.large_threshold
            body = guild_create_json(
                guild, session.intents, large_threshold=threshold, joined_now=joined_now
            )
            session.push("GUILD_CREATE", body)

    # What tests wait for.

    @property
    def connected(self) -> bool:
        """Whether a bot is past READY or RESUMED and has its socket."""
        return bool(self._connected_sessions())

    def _connected_sessions(self) -> list[Session]:
        return [session for session in self.sessions.values() if session.socket]

    def changed(self) -> None:
        """Let every `wait_until` look again."""
        self._changed.set()

    async def wait_until(self, condition: Callable[[], bool], timeout: float = 30.0) -> None:
        """Wait for something to be true of this object; TimeoutError after that many seconds."""
        async with asyncio.timeout(timeout):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def wait_for_bot(self, timeout: float = 30.0, *, shards: int = 1) -> None:
        """Wait until so many shards are connected and have digested all that was sent to them."""
        await self.wait_until(lambda: len(self._connected_sessions()) >= shards, timeout)
        await self.caught_up(timeout)

    async def caught_up(self, timeout: float = 30.0) -> None:
        """Wait until connected bots have seen every packet, by asking each for a heartbeat.

        By then hikari's cache is current and its listeners are started. It allows itself 120
        packets a minute, so a test may ask about a hundred times. Others answer before they have
        digested all: they are asked again.
        """
        goals = {session: session.seq for session in self._connected_sessions()}

        def behind() -> list[Outlet]:
            return [s.socket for s, seq in goals.items() if s.socket and s.heard < seq]

        async with asyncio.timeout(timeout):
            while behind():
                for socket in behind():
                    socket.send(Op.HEARTBEAT, None)
                with contextlib.suppress(TimeoutError):
                    await self.wait_until(lambda: not behind(), ASK_AGAIN)

    # Faults.

    async def drop(self, code: int | None = CloseCode.UNKNOWN_ERROR) -> None:
        """Close every gateway socket with that code, or, with None, without a closing handshake."""
        for socket in self._detach_all():
            if code is None:
                socket.cut()
            else:
                socket.close(code, "Dropped.")

    async def reconnect(self) -> None:
        """Ask every bot to reconnect (op 7); what is sent meanwhile reaches it after RESUME."""
        for socket in self._detach_all():
            socket.send(Op.RECONNECT, None)

    async def invalidate(self, *, resumable: bool = False) -> None:
        """Send op 9; unless resumable the sessions are gone and bots have to IDENTIFY again."""
        for socket in self._detach_all():
            socket.send(Op.INVALID_SESSION, resumable)
        if not resumable:
            self.sessions.clear()

    def _detach_all(self) -> list[Outlet]:
        sockets = list(self.sockets)
        for socket in sockets:
            self.detach(socket)
        return sockets

    def freeze(self) -> None:
        """Acknowledge no heartbeat until `thaw`."""
        self.frozen = True

    def thaw(self) -> None:
        """Acknowledge heartbeats again."""
        self.frozen = False


def _found_members(guild: Guild, request: RequestMembers, intents: int) -> list[Member]:
    """Who is asked for: ids, names that begin so, or everybody, which needs GUILD_MEMBERS."""
    wanted = request.wanted_ids()
    if wanted is not None:
        return [guild.members[i] for i in wanted if i in guild.members]
    if not request.query and not request.limit:
        return list(guild.members.values()) if intents & Intent.GUILD_MEMBERS else []
    return _members_named(guild, request.query or "")[: request.limit or 100]


def _members_named(guild: Guild, beginning: str) -> list[Member]:
    """Whose name here begins so, in any case."""
    beginning = beginning.lower()
    return [m for m in guild.members.values() if (m.nick or m.name).lower().startswith(beginning)]


def _chunk_json(
    guild: Guild, members: Sequence[Member], request: RequestMembers, intents: int
) -> Json:
    """GUILD_MEMBERS_CHUNK but for its place among the chunks."""
    body: Json = {"guild_id": str(guild.id), "members": [m.to_json() for m in members]}
    absent = [str(i) for i in request.wanted_ids() or () if i not in guild.members]
    if absent:
        body["not_found"] = absent
    if request.presences and intents & Intent.GUILD_PRESENCES:
        body["presences"] = [presence_json(guild, m) for m in members if m.status != "offline"]
    return body | ({"nonce": request.nonce} if request.nonce else {})


# ---- gateway sockets ----
# Bytes: compression on the way out, opcodes on the way in. A socket knows the gateway and its own
# session, no guild.

MESSAGE_LIMIT = 4096  # bytes of a packet from a client (Gateway: Sending Events)
SEND_LIMIT = 120  # packets from a client in a window (Gateway: Rate Limiting)
# A minute, less a second: a client that keeps to its own minute may not be closed for the delay
# between its clock and this one.
SEND_WINDOW = 59.0
HEARTBEAT_GRACE = 1.0  # seconds that a heartbeat may be late

Frame = str | bytes  # a text frame or a binary one
Pack = Callable[[bytes], Frame]


def _plain(packet: bytes) -> Frame:
    return packet.decode()


def _zlib_stream() -> Pack:
    """One context for the whole connection, flushed after each packet (Gateway: zlib-stream)."""
    deflator = zlib.compressobj()
    return lambda packet: deflator.compress(packet) + deflator.flush(zlib.Z_SYNC_FLUSH)


def _zstd_stream() -> Pack:
    """The same with zstd, for which hikari asks where Python or `backports.zstd` brings it."""
    home = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    deflator = importlib.import_module(home).ZstdCompressor()
    return lambda packet: bytes(deflator.compress(packet, deflator.FLUSH_BLOCK))


TRANSPORTS: Mapping[str, Callable[[], Pack]] = {
    "": lambda: _plain,
    "zlib-stream": _zlib_stream,
    "zstd-stream": _zstd_stream,
}


class GatewaySocket(tornado.websocket.WebSocketHandler):
    """One connection of a client."""

    def initialize(self, gateway: Gateway, heartbeat_interval: float) -> None:
        """Tornado's constructor; the interval is in seconds."""
        self.gateway = gateway
        self.heartbeat_interval = heartbeat_interval
        self._pack: Pack = _plain
        self._session: Session | None = None
        self._sends = 0
        self._window_ends = 0.0
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def session(self) -> Session | None:
        """The session that this connection carries; after INVALID SESSION none, until the next."""
        mine = self._session is not None and self._session.socket is self
        return self._session if mine else None

    def check_origin(self, origin: str) -> bool:
        """Any page may connect, as with Discord."""
        return True

    def open(self, *_: str, **__: str) -> None:
        """Say HELLO."""
        self.set_nodelay(True)
        self.gateway.sockets.add(self)
        try:
            self._pack = self._negotiated()
        except RefusedError as refusal:
            self.refuse(refusal)
            return
        interval_ms = round(self.heartbeat_interval * 1000)
        self.send(Op.HELLO, {"heartbeat_interval": interval_ms, "_trace": TRACE})
        self._await_heartbeat()

    def _negotiated(self) -> Pack:
        """How to pack what goes out, from the address (Gateway: Gateway URL Query String Params)."""
        if self.get_query_argument("v", None) != str(API_VERSION):
            raise RefusedError(CloseCode.INVALID_VERSION)
        encoding = self.get_query_argument("encoding", "json")
        if encoding != "json":
            raise RefusedError(CloseCode.DECODE_ERROR, f"No encoding {encoding} here, only json.")
        compress = self.get_query_argument("compress", "")
        if compress not in TRANSPORTS:
            raise RefusedError(CloseCode.DECODE_ERROR, f"No compression {compress} here.")
        return TRANSPORTS[compress]()

    def _await_heartbeat(self) -> None:
        """Close the connection unless a heartbeat comes in time; its session is over then (4009)."""
        self._stop_waiting()
        seconds = self.heartbeat_interval + HEARTBEAT_GRACE
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._time_out)

    def _stop_waiting(self) -> None:
        if self._deadline:
            self._deadline.cancel()

    def _time_out(self) -> None:
        self.gateway.forget(self)
        self.refuse(RefusedError(CloseCode.SESSION_TIMEOUT))

    def transmit(self, packet: bytes) -> asyncio.Future[None] | None:
        """Send an encoded packet; None when the socket is closing."""
        frame = self._pack(packet)
        try:
            sent = self.write_message(frame, binary=isinstance(frame, bytes))
        except tornado.websocket.WebSocketClosedError:
            return None
        # A client may go at any moment, and most writes have nobody waiting to hear of it.
        sent.add_done_callback(lambda done: done.cancelled() or done.exception())
        return sent

    def send(self, op: Op, d: Any) -> None:
        """Send a packet that is no dispatch."""
        self.transmit(_encode({"op": op, "d": d, "s": None, "t": None}))

    def refuse(self, refusal: RefusedError) -> None:
        """Close for something the client did."""
        self.gateway.detach(self)
        self.close(refusal.code, refusal.reason)

    def cut(self) -> None:
        """End the TCP connection without a closing handshake."""
        if self.ws_connection and self.ws_connection.stream:
            self.ws_connection.stream.close()

    def on_close(self) -> None:
        """The connection is over, whoever ended it."""
        self._stop_waiting()
        self.gateway.gone(self, self.close_code)

    def on_message(self, message: str | bytes) -> None:
        """Answer one packet."""
        try:
            self._check_limits(message)
            self._receive(msgspec.json.decode(message, type=Packet))
        except msgspec.MsgspecError:
            self.refuse(RefusedError(CloseCode.DECODE_ERROR))
        except RefusedError as refusal:
            self.refuse(refusal)

    def _check_limits(self, message: str | bytes) -> None:
        if len(message if isinstance(message, bytes) else message.encode()) > MESSAGE_LIMIT:
            raise RefusedError(CloseCode.DECODE_ERROR)
        now = time.monotonic()
        if now >= self._window_ends:
            self._window_ends, self._sends = now + SEND_WINDOW, 0
        self._sends += 1
        if self._sends > SEND_LIMIT:
            raise RefusedError(CloseCode.RATE_LIMITED)

    def _receive(self, packet: Packet) -> None:
        receive = self._RECEIVERS.get(packet.op)
        if receive is None:
            raise RefusedError(CloseCode.UNKNOWN_OPCODE)
        if self.session is None and packet.op not in (Op.HEARTBEAT, Op.IDENTIFY, Op.RESUME):
            raise RefusedError(CloseCode.NOT_AUTHENTICATED)
        receive(self, packet.d)

    def _heartbeat(self, d: Any) -> None:
        seq = msgspec.convert(d, int) if d is not None else None
        self._await_heartbeat()
        if self.gateway.heartbeat(self.session, seq):
            self.send(Op.HEARTBEAT_ACK, None)

    def _identify(self, d: Any) -> None:
        if self.session is not None:
            raise RefusedError(CloseCode.ALREADY_AUTHENTICATED)
        identify = msgspec.convert(d, Identify)
        if identify.compress and self._pack is _plain:  # Gateway: Payload Compression
            self._pack = zlib.compress
        self._session = self.gateway.identify(identify, self)

    def _resume(self, d: Any) -> None:
        if self.session is not None:
            raise RefusedError(CloseCode.ALREADY_AUTHENTICATED)
        self._session = self.gateway.resume(msgspec.convert(d, Resume), self)
        if self._session is None:
            self.send(Op.INVALID_SESSION, False)

    def _request_members(self, d: Any) -> None:
        if self.session is not None:
            self.gateway.request_members(self.session, msgspec.convert(d, RequestMembers))

    def _ignore(self, d: Any) -> None:
        """The bot's own presence and voice, and what else nobody here asks for."""

    _RECEIVERS: Mapping[int, Callable[[GatewaySocket, Any], None]] = {
        Op.HEARTBEAT: _heartbeat,
        Op.IDENTIFY: _identify,
        Op.RESUME: _resume,
        Op.REQUEST_GUILD_MEMBERS: _request_members,
        Op.PRESENCE_UPDATE: _ignore,
        Op.VOICE_STATE_UPDATE: _ignore,
        Op.REQUEST_SOUNDBOARD_SOUNDS: _ignore,
        Op.REQUEST_CHANNEL_INFO: _ignore,
    }


# ---- what people do ----
# Each action changes the state, then dispatches what Discord would; it returns when that is sent.


class Happenings(Gateway):
    """Everything that members, moderators and Discord itself do in guilds."""

    async def message(
        self,
        guild: Guild,
        member: Member,
        channel: Channel | Thread,
        content: str = "hello",
        *,
        webhook_id: int | None = None,
        bot: bool | None = None,
    ) -> Json:
        """Someone writes; returns the message, which deleting and reacting take."""
        body = message_json(guild, member, channel, content, webhook_id=webhook_id, bot=bot)
        channel.last_message_id = int(body["id"])
        await self.dispatch("MESSAGE_CREATE", body)
        return body

    async def message_edit(
        self, guild: Guild, channel: Channel | Thread, message: Json, content: str
    ) -> None:
        """A message is edited."""
        edited = message | {"content": content, "edited_timestamp": iso()}
        await self.dispatch("MESSAGE_UPDATE", edited)

    async def message_delete(self, guild: Guild, channel: Channel | Thread, message: Json) -> None:
        """A message is deleted."""
        ids = {"id": message["id"], "channel_id": str(channel.id), "guild_id": str(guild.id)}
        await self.dispatch("MESSAGE_DELETE", ids)

    async def direct_message(self, sender: Member | User, content: str = "psst") -> Json:
        """Someone writes to the bot alone."""
        body = message_json(None, sender, snowflake(), content)
        await self.dispatch("MESSAGE_CREATE", body)
        return body

    async def reaction(
        self,
        guild: Guild,
        member: Member,
        channel: Channel | Thread,
        message: Json | None = None,
        emoji: str = "👍",
    ) -> None:
        """Someone reacts to a message, to some old one when none is given."""
        message_id = message["id"] if message else None
        body = reaction_json(guild, member, channel, message_id, emoji)
        await self.dispatch("MESSAGE_REACTION_ADD", body)

    async def typing(self, guild: Guild, member: Member, channel: Channel | Thread) -> None:
        """Someone begins to type."""
        await self.dispatch("TYPING_START", typing_json(guild, member, channel))

    async def presence(
        self,
        guild: Guild,
        member: Member,
        status: str = "online",
        platforms: Iterable[str] | Mapping[str, str] = (),
        activities: Iterable[Json] = (),
    ) -> None:
        """Someone comes, goes, or changes devices; the arguments are those of `Member.appear`."""
        member.appear(status, platforms, activities)
        await self.dispatch("PRESENCE_UPDATE", presence_json(guild, member))

    async def voice(self, guild: Guild, member: Member, channel: Channel | None) -> None:
        """Someone enters a voice channel, or hangs up."""
        guild.voice.pop(member.id, None)
        if channel:
            guild.voice[member.id] = channel.id
        await self.dispatch("VOICE_STATE_UPDATE", voice_state_json(guild, member))

    async def join(
        self,
        guild: Guild,
        name: str,
        *,
        user: User | None = None,
        bot: bool = False,
        account_age_days: float = 400.0,
    ) -> Member:
        """Someone joins just now."""
        member = guild.add_member(name, user=user, bot=bot, account_age_days=account_age_days)
        member.joined_at = iso()
        await self.dispatch("GUILD_MEMBER_ADD", member_add_json(guild, member))
        return member

    async def leave(self, guild: Guild, member: Member) -> None:
        """Someone leaves."""
        guild.members.pop(member.id)
        guild.voice.pop(member.id, None)
        await self.dispatch("GUILD_MEMBER_REMOVE", member_remove_json(guild, member))

    async def kick(self, guild: Guild, member: Member) -> None:
        """Someone is thrown out: the same packet as leaving; for the bot, the guild goes."""
        if member.id == guild.bot_id:
            await self.remove_guild(guild)
        else:
            await self.leave(guild, member)

    async def ban(self, guild: Guild, member: Member) -> None:
        """Someone is thrown out and may not come back."""
        guild.bans[member.id] = member.user
        await self.dispatch("GUILD_BAN_ADD", member_remove_json(guild, member))
        await self.kick(guild, member)

    async def rename(
        self, guild: Guild, member: Member, *, name: str | None = None, nick: str | None = None
    ) -> None:
        """Someone changes the account's name, everywhere, or the nickname, here; "" removes it."""
        member.user.name = name or member.user.name
        if nick is not None:
            member.nick = nick or None
        shared = [g for g in self.guilds.values() if member.id in g.members] if name else [guild]
        for place in shared:
            await self._member_update(place, place.members[member.id])

    async def set_roles(self, guild: Guild, member: Member, *roles: Role) -> None:
        """Someone has exactly these roles from now on."""
        member.role_ids = [role.id for role in roles]
        await self._member_update(guild, member)

    async def add_role(self, guild: Guild, member: Member, role: Role) -> None:
        """Someone gains a role."""
        member.role_ids.append(role.id)
        await self._member_update(guild, member)

    async def remove_role(self, guild: Guild, member: Member, role: Role) -> None:
        """Someone loses a role."""
        member.role_ids.remove(role.id)
        await self._member_update(guild, member)

    async def _member_update(self, guild: Guild, member: Member) -> None:
        await self.dispatch("GUILD_MEMBER_UPDATE", member_add_json(guild, member))

    async def role_create(self, guild: Guild, name: str, permissions: int = 0) -> Role:
        """A role is made."""
        role = guild.add_role(name, permissions)
        await self.dispatch("GUILD_ROLE_CREATE", role_event_json(guild, role))
        return role

    async def role_update(
        self, guild: Guild, role: Role, *, name: str | None = None, permissions: int | None = None
    ) -> None:
        """A role is renamed or its permissions change."""
        role.name = name or role.name
        role.permissions = role.permissions if permissions is None else permissions
        await self.dispatch("GUILD_ROLE_UPDATE", role_event_json(guild, role))

    async def role_delete(self, guild: Guild, role: Role) -> None:
        """A role is gone, also from those who had it; for them there is no packet."""
        guild.roles.pop(role.id)
        for member in guild.members.values():
            member.role_ids = [role_id for role_id in member.role_ids if role_id != role.id]
        ids = {"guild_id": str(guild.id), "role_id": str(role.id)}
        await self.dispatch("GUILD_ROLE_DELETE", ids)

    async def channel_create(
        self,
        guild: Guild,
        name: str,
        *,
        kind: int = ChannelType.GUILD_TEXT,
        parent: Channel | None = None,
        overwrites: Iterable[Overwrite] = (),
    ) -> Channel:
        """A channel is made."""
        channel = guild.add_channel(name, kind=kind, parent=parent, overwrites=overwrites)
        await self.dispatch("CHANNEL_CREATE", channel.to_json())
        return channel

    async def channel_update(
        self,
        guild: Guild,
        channel: Channel,
        *,
        name: str | None = None,
        overwrites: Iterable[Overwrite] | None = None,
    ) -> None:
        """A channel is renamed or its overwrites are replaced."""
        channel.name = name or channel.name
        channel.overwrites = channel.overwrites if overwrites is None else list(overwrites)
        await self.dispatch("CHANNEL_UPDATE", channel.to_json())

    async def channel_delete(self, guild: Guild, channel: Channel) -> None:
        """A channel is gone, with its threads."""
        guild.channels.pop(channel.id)
        guild.threads = {i: t for i, t in guild.threads.items() if t.parent_id != channel.id}
        await self.dispatch("CHANNEL_DELETE", channel.to_json())

    async def thread_create(
        self, guild: Guild, channel: Channel, name: str, owner: Member | None = None
    ) -> Thread:
        """A thread is opened."""
        thread = guild.add_thread(name, channel, owner)
        await self.dispatch("THREAD_CREATE", thread_create_json(thread))
        return thread

    async def thread_delete(self, guild: Guild, thread: Thread) -> None:
        """A thread is deleted."""
        guild.threads.pop(thread.id)
        await self.dispatch("THREAD_DELETE", thread_delete_json(thread))

    async def guild_update(
        self, guild: Guild, *, name: str | None = None, owner: Member | None = None
    ) -> None:
        """A guild is renamed or changes hands."""
        guild.name = name or guild.name
        guild.owner_id = owner.id if owner else guild.owner_id
        await self.dispatch("GUILD_UPDATE", guild.to_json(), guild_id=guild.id)

    async def remove_guild(self, guild: Guild) -> None:
        """The bot is thrown out of a guild, or the guild is deleted."""
        self.guilds.pop(guild.id)
        await self.dispatch("GUILD_DELETE", guild_delete_json(guild), guild_id=guild.id)

    async def outage(self, guild: Guild) -> None:
        """Discord has trouble with a guild."""
        guild.available = False
        await self.dispatch(
            "GUILD_DELETE", guild_delete_json(guild, outage=True), guild_id=guild.id
        )

    async def outage_over(self, guild: Guild) -> None:
        """The guild is back."""
        guild.available = True
        self.show(guild)


# ---- REST ----
# What bots read when they start (`GET /gateway/bot`), and what a plugin is likely to ask or to post.
# Errors have Discord's shape and numbers (Opcodes and Status Codes: HTTP, JSON).


class ApiError(tornado.web.HTTPError):
    """A request that Discord answers with `{"message": …, "code": …}`."""

    def __init__(self, status: int, message: str, code: int = 0) -> None:
        super().__init__(status)
        self.body = {"message": message, "code": code}


class RestHandler(tornado.web.RequestHandler):
    """Answers requests that carry the bot's token."""

    def initialize(self, discord: Happenings, answers: Mapping[str, Answer] | None = None) -> None:
        """Tornado's constructor; `answers` by method, none where the route does not exist."""
        self.discord = discord
        self.answers = answers or {}

    def prepare(self) -> None:
        """Let nobody in without the token, and nowhere but to the routes below."""
        self.discord.rest_calls += 1
        public = _gateway in self.answers.values()
        if self.request.headers.get("Authorization") != f"Bot {self.discord.token}" and not public:
            raise tornado.web.HTTPError(401)
        if not self.answers:
            raise tornado.web.HTTPError(404)

    def query(self, name: str, default: int, most: int) -> int:
        """A number of the query; an ApiError 400 outside of 0 to `most`."""
        text = self.get_query_argument(name, str(default))
        if not text.isdecimal() or int(text) > most:
            raise ApiError(400, "Invalid Form Body", 50035)
        return int(text)

    async def get(self, *ids: str) -> None:
        """Answer from the state."""
        await self._answer(*ids)

    async def post(self, *ids: str) -> None:
        """Change the state and answer with what was made."""
        await self._answer(*ids)

    async def _answer(self, *ids: str) -> None:
        answer = self.answers.get(str(self.request.method))
        if answer is None:
            raise tornado.web.HTTPError(405)
        body = answer(self, *ids)
        self._finish_json(await body if isinstance(body, Awaitable) else body)

    def write_error(self, status_code: int, **about: Any) -> None:
        """Discord's error body."""
        error = about["exc_info"][1]
        plain = {"message": f"{status_code}: {http.HTTPStatus(status_code).phrase}", "code": 0}
        self._finish_json(error.body if isinstance(error, ApiError) else plain)

    def _finish_json(self, body: Json | list[Json]) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(_encode(body))


#: `(call, *ids of the path)`: the body of the answer, or a coroutine that ends with it.
Answer = Callable[..., Json | list[Json] | Awaitable[Json]]


def _found(table: Mapping[int, T], key: str, what: str, code: int) -> T:
    if int(key) not in table:
        raise ApiError(404, f"Unknown {what}", code)
    return table[int(key)]


def _gateway(call: RestHandler) -> Json:
    return {"url": call.discord.gateway_url}


def _gateway_bot(call: RestHandler) -> Json:
    # A thousand sessions a day as for small bots; sixteen may start at once, so that no test of
    # sharding has to sit out the five seconds between two waves.
    limit = {"total": 1000, "remaining": 1000, "reset_after": 86_400_000, "max_concurrency": 16}
    return _gateway(call) | {"shards": call.discord.shards, "session_start_limit": limit}


def _me(call: RestHandler) -> Json:
    return call.discord.bot.to_json() | {"verified": True, "mfa_enabled": True, "flags": 0}


def _application(call: RestHandler) -> Json:
    bot = call.discord.bot
    return {
        "id": str(bot.id),
        "name": bot.name,
        "icon": None,
        "description": "",
        "bot_public": False,
        "bot_require_code_grant": False,
        "owner": bot.to_json(),
        "team": None,
        "verify_key": "00" * 32,
        "flags": call.discord.application_flags,
        "approximate_guild_count": len(call.discord.guilds),
        "approximate_user_install_count": 0,
        "approximate_user_authorization_count": 0,
    }


def _my_guilds(call: RestHandler) -> list[Json]:
    guilds = call.discord.guilds
    return [guilds[i].to_partial_json() for i in _page(guilds, call, default=200, most=200)]


def _page(table: Iterable[int], call: RestHandler, default: int, most: int) -> list[int]:
    """The ids that `limit` and `after` ask for, in order."""
    after = call.query("after", 0, most=1 << 64)
    return sorted(i for i in table if i > after)[: call.query("limit", default, most)]


def _guild(call: RestHandler, guild_id: str) -> Guild:
    return _found(call.discord.guilds, guild_id, "Guild", 10004)


def _guild_body(call: RestHandler, guild_id: str) -> Json:
    guild = _guild(call, guild_id)
    online = sum(m.status != "offline" for m in guild.members.values())
    counts = {
        "approximate_member_count": len(guild.members),
        "approximate_presence_count": online,
    }
    return guild.to_json() | (counts if call.get_query_argument("with_counts", "") else {})


def _guild_channels(call: RestHandler, guild_id: str) -> list[Json]:
    return [channel.to_json() for channel in _guild(call, guild_id).channels.values()]


def _active_threads(call: RestHandler, guild_id: str) -> Json:
    threads = _guild(call, guild_id).threads.values()
    return {"threads": [thread.to_json() for thread in threads], "members": []}


def _guild_roles(call: RestHandler, guild_id: str) -> list[Json]:
    return [role.to_json() for role in _guild(call, guild_id).roles.values()]


def _guild_role(call: RestHandler, guild_id: str, role_id: str) -> Json:
    return _found(_guild(call, guild_id).roles, role_id, "Role", 10011).to_json()


def _members(call: RestHandler, guild_id: str) -> list[Json]:
    if not call.discord.allowed_privileged & Intent.GUILD_MEMBERS:
        raise ApiError(403, "Missing Access", 50001)
    members = _guild(call, guild_id).members
    return [members[i].to_json() for i in _page(members, call, default=1, most=1000)]


def _search_members(call: RestHandler, guild_id: str) -> list[Json]:
    beginning = call.get_query_argument("query", "")
    found = _members_named(_guild(call, guild_id), beginning)
    return [member.to_json() for member in found[: call.query("limit", 1, most=1000)]]


def _member(call: RestHandler, guild_id: str, user_id: str) -> Json:
    return _found(_guild(call, guild_id).members, user_id, "Member", 10007).to_json()


def _bans(call: RestHandler, guild_id: str) -> list[Json]:
    bans = _guild(call, guild_id).bans
    return [_ban_json(bans[i]) for i in _page(bans, call, default=1000, most=1000)]


def _ban(call: RestHandler, guild_id: str, user_id: str) -> Json:
    return _ban_json(_found(_guild(call, guild_id).bans, user_id, "Ban", 10026))


def _ban_json(user: User) -> Json:
    return {"reason": None, "user": user.to_json()}


def _user(call: RestHandler, user_id: str) -> Json:
    members = {i: m for guild in call.discord.guilds.values() for i, m in guild.members.items()}
    return _found(members, user_id, "User", 10013).user.to_json()


def _place(call: RestHandler, channel_id: str) -> tuple[Guild, Channel | Thread]:
    """A channel or thread, and whose it is."""
    places: dict[int, tuple[Guild, Channel | Thread]] = {}
    for guild in call.discord.guilds.values():
        places |= {i: (guild, place) for i, place in (guild.channels | guild.threads).items()}
    return _found(places, channel_id, "Channel", 10003)


def _channel(call: RestHandler, channel_id: str) -> Json:
    return _place(call, channel_id)[1].to_json()


async def _post_message(call: RestHandler, channel_id: str) -> Json:
    guild, channel = _place(call, channel_id)
    try:
        said = msgspec.json.decode(call.request.body, type=dict[str, Any])
    except msgspec.MsgspecError:
        raise ApiError(400, "Invalid Form Body", 50035) from None
    if not any(said.get(part) for part in ("content", "embeds", "components", "sticker_ids")):
        raise ApiError(400, "Cannot send an empty message", 50006)
    me, content = guild.members[guild.bot_id], said.get("content") or ""
    return await call.discord.message(guild, me, channel, content)


ROUTES: Mapping[str, Answer] = {
    r"GET /gateway": _gateway,
    r"GET /gateway/bot": _gateway_bot,
    r"GET /users/@me": _me,
    r"GET /users/@me/guilds": _my_guilds,
    r"GET /users/(\d+)": _user,
    r"GET /applications/@me": _application,
    r"GET /oauth2/applications/@me": _application,
    r"GET /guilds/(\d+)": _guild_body,
    r"GET /guilds/(\d+)/channels": _guild_channels,
    r"GET /guilds/(\d+)/threads/active": _active_threads,
    r"GET /guilds/(\d+)/roles": _guild_roles,
    r"GET /guilds/(\d+)/roles/(\d+)": _guild_role,
    r"GET /guilds/(\d+)/members": _members,
    r"GET /guilds/(\d+)/members/search": _search_members,
    r"GET /guilds/(\d+)/members/(\d+)": _member,
    r"GET /guilds/(\d+)/bans": _bans,
    r"GET /guilds/(\d+)/bans/(\d+)": _ban,
    r"GET /channels/(\d+)": _channel,
    r"POST /channels/(\d+)/messages": _post_message,
}


def by_path(routes: Mapping[str, Answer]) -> dict[str, dict[str, Answer]]:
    """`{path: {method: answer}}`."""
    paths: dict[str, dict[str, Answer]] = {}
    for route, answer in routes.items():
        method, path = route.split(" ")
        paths.setdefault(path, {})[method] = answer
    return paths


# ---- signing in ----
# Discord's side of OAuth2 (Topics: OAuth2, authorization code grant, RFC 6749 and 7636): a page on which
# one picks whom of the pretend people to be, the token that a code is traded for, its revocation,
# who it belongs to, and their picture. Nobody has a password here.

AUTHORIZE_PATH = "/oauth2/authorize"
CODE_LASTS = 60.0  # seconds until a code that nobody trades is void
TOKEN_LASTS = 604_800  # seconds, as Discord's
ONE_PIXEL = b"GIF89a\1\0\1\0\x80\0\0%s\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
AUTHORIZE_PAGE = tornado.template.Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Pretend Discord</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 sans-serif; max-width: 26rem; margin: 4rem auto; padding: 0 1rem }
button { display: block; width: 100%; margin: .5rem 0; padding: .6rem; font: inherit }
</style>
<h1>Pretend Discord</h1>
<p>{{ application }} wants to know who you are. Whom do you want to be?</p>
<form method="post">
{% for user_id, label in people %}<button name="user" value="{{ user_id }}">{{ label }}</button>
{% end %}<button name="user" value="">Cancel</button>
</form>
"""
)


@dataclass(slots=True)
class Grant:
    """Somebody's consent: a code, then the access token that it was traded for."""

    user: User
    redirect_uri: str
    scope: str
    challenge: str = ""
    made: float = field(default_factory=time.monotonic)


class OAuth2:
    """The application of the bot, as the developer portal has it, and who has let it in.

    `people` are those whom the authorise page offers, by label; with none it offers all members. A
    handler in `instead`, by `token`, `revoke`, `me` or `picture`, answers in that route's place: how a test has
    Discord fail. `revoked` are the access tokens that were handed back.
    """

    def __init__(self, bot: User, guilds: Mapping[int, Guild]) -> None:
        self.bot = bot
        self.guilds = guilds
        self.client_secret = secrets.token_urlsafe(24)
        self.redirect_uris: set[str] = set()
        self.people: dict[str, User] = {}
        self.instead: dict[str, Callable[[tornado.web.RequestHandler], Awaitable[None]]] = {}
        self.codes: dict[str, Grant] = {}
        self.tokens: dict[str, Grant] = {}
        self.revoked: list[str] = []

    @property
    def client_id(self) -> str:
        """The application's id; that of its bot is the same."""
        return str(self.bot.id)

    def offered(self) -> dict[str, User]:
        """Whom one may be, by label."""
        members = [m for guild in self.guilds.values() for m in guild.members.values()]
        return self.people or {m.name: m.user for m in members if not m.user.bot}

    def consent(self, user: User, query: Mapping[str, str]) -> str:
        """A code for what the authorise page was asked."""
        code = secrets.token_urlsafe(22)
        challenge = query.get("code_challenge", "")
        self.codes[code] = Grant(user, query["redirect_uri"], query.get("scope", ""), challenge)
        return code

    def trade(self, code: str, redirect_uri: str, verifier: str) -> str | None:
        """The access token for a code, once."""
        grant = self.codes.pop(code, None)
        if grant is None or grant.redirect_uri != redirect_uri:
            return None
        if time.monotonic() - grant.made > CODE_LASTS:
            return None
        if grant.challenge and grant.challenge != pkce_challenge(verifier):
            return None
        token = secrets.token_urlsafe(22)
        self.tokens[token] = grant
        return token


def pkce_challenge(verifier: str) -> str:
    """RFC 7636 §4.2, method S256."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class OAuth2Handler(tornado.web.RequestHandler):
    """Base of the routes of OAuth2; `name` is that of `OAuth2.instead`."""

    name = ""

    def initialize(self, oauth2: OAuth2) -> None:
        """Tornado's constructor."""
        self.oauth2 = oauth2

    async def prepare(self) -> None:
        """Let a test answer."""
        if self.name in self.oauth2.instead:
            await self.oauth2.instead[self.name](self)

    def refuse(self, status: int, error: str, description: str) -> None:
        """Discord's body of an OAuth2 error (RFC 6749 §5.2)."""
        self.set_status(status)
        self.finish({"error": error, "error_description": description})


class AuthorizeHandler(OAuth2Handler):
    """The page on which one picks whom to be, or cancels."""

    def get(self) -> None:
        """Show it."""
        if fault := self._fault():
            self.refuse(400, "invalid_request", fault)
            return
        offered = [(user.id, label) for label, user in self.oauth2.offered().items()]
        self.finish(AUTHORIZE_PAGE.generate(application=self.oauth2.bot.name, people=offered))

    def post(self) -> None:
        """Send the browser back with a code, or with what Discord says of a cancelled sign-in."""
        if fault := self._fault():
            self.refuse(400, "invalid_request", fault)
            return
        query = {name: self.get_query_argument(name) for name in self.request.query_arguments}
        users = {str(user.id): user for user in self.oauth2.offered().values()}
        user = users.get(self.get_body_argument("user", ""))
        answer = {"error": "access_denied", "error_description": "The user denied the request"}
        if user is not None:
            answer = {"code": self.oauth2.consent(user, query)}
        answer["state"] = query.get("state", "")
        self.redirect(tornado.httputil.url_concat(query["redirect_uri"], answer))

    def _fault(self) -> str:
        if self.get_query_argument("client_id", "") != self.oauth2.client_id:
            return "Unknown application"
        if self.get_query_argument("redirect_uri", "") not in self.oauth2.redirect_uris:
            return "Invalid OAuth2 redirect_uri"
        if self.get_query_argument("response_type", "") != "code":
            return "Invalid response_type"
        return ""


class CredentialsHandler(OAuth2Handler):
    """Base of what an application asks in its own name (RFC 6749 §2.3.1)."""

    async def prepare(self) -> None:
        """Let nobody in without the client's secret."""
        await super().prepare()
        login = f"{self.oauth2.client_id}:{self.oauth2.client_secret}".encode()
        expected = f"Basic {base64.b64encode(login).decode()}"
        if not self._finished and self.request.headers.get("Authorization") != expected:
            self.refuse(401, "invalid_client", "Invalid client")


class TokenHandler(CredentialsHandler):
    """Trades a code for an access token."""

    name = "token"

    def post(self) -> None:
        """Answer as for `grant_type=authorization_code`; no other is known here."""
        if self.get_body_argument("grant_type", "") != "authorization_code":
            self.refuse(400, "unsupported_grant_type", "Invalid grant_type")
            return
        code, redirect_uri, verifier = (
            self.get_body_argument(name, "") for name in ("code", "redirect_uri", "code_verifier")
        )
        token = self.oauth2.trade(code, redirect_uri, verifier)
        if token is None:
            self.refuse(400, "invalid_grant", 'Invalid "code" in request.')
            return
        self.finish(
            {
                "access_token": token,
                "token_type": "Bearer",
                "expires_in": TOKEN_LASTS,
                "refresh_token": secrets.token_urlsafe(22),
                "scope": self.oauth2.tokens[token].scope,
            }
        )


class RevokeHandler(CredentialsHandler):
    """Takes an access token back (RFC 7009)."""

    name = "revoke"

    def post(self) -> None:
        """An unknown token is revoked already."""
        token = self.get_body_argument("token", "")
        if self.oauth2.tokens.pop(token, None):
            self.oauth2.revoked.append(token)
        self.finish({})


class BearerHandler(OAuth2Handler):
    """`GET /users/@me` in somebody's name; the bot's own is `RestHandler`'s."""

    name = "me"

    def get(self) -> None:
        """Resources: Get Current User, with the scope `identify`."""
        token = self.request.headers["Authorization"].removeprefix("Bearer ")
        grant = self.oauth2.tokens.get(token)
        if grant is None:
            self.set_status(401)
            self.finish({"message": "401: Unauthorized", "code": 0})
            return
        more = {"mfa_enabled": True, "flags": 0, "locale": "en-US", "premium_type": 0}
        self.finish(grant.user.to_json() | more)


class PictureHandler(OAuth2Handler):
    """A picture as Discord's CDN has it: one pixel, of the colour that its hash begins with."""

    name = "picture"

    def get(self, colour: str) -> None:
        """Answer whoever asks."""
        self.set_header("Content-Type", "image/gif")
        self.finish(ONE_PIXEL % bytes.fromhex(colour))


class BearsToken(tornado.routing.Matcher):
    """Requests that carry somebody's access token."""

    def match(self, request: tornado.httputil.HTTPServerRequest) -> Json | None:
        """The arguments of the route, of which there are none; None where it does not match."""
        return {} if request.headers.get("Authorization", "").startswith("Bearer ") else None


def sign_in_routes(oauth2: OAuth2, api: str) -> list[tornado.routing.Rule]:
    """Where all that is, below the API's path; before the bot's routes."""
    handlers = {
        AUTHORIZE_PATH: AuthorizeHandler,
        r"/avatars/\d+/(?:a_)?([0-9a-f]{6})[0-9a-f]{26}\.png": PictureHandler,
        f"{api}/oauth2/token": TokenHandler,
        f"{api}/oauth2/token/revoke": RevokeHandler,
    }
    of_bearers = [tornado.web.url(f"{api}/users/@me", BearerHandler, {"oauth2": oauth2})]
    return [
        *(tornado.web.url(path, handler, {"oauth2": oauth2}) for path, handler in handlers.items()),
        tornado.routing.Rule(BearsToken(), of_bearers),
    ]


# ---- the server ----

API_PATH = f"/api/v{API_VERSION}"
GATEWAY_PATH = "/gateway"
HEARTBEAT_INTERVAL = 41.25  # seconds, what Discord says in HELLO
CLOSING_GRACE = 2.0  # seconds that clients get to answer the closing handshake


class PretendDiscord(Happenings):
    """Discord on a loopback port, for the length of an `async with`.

    `token` defaults to a fresh fake one; `allowed_privileged` are the intents that the developer
    portal has switched on; `shards` is the number that `GET /gateway/bot` recommends.
    """

    def __init__(
        self,
        *,
        token: str | None = None,
        allowed_privileged: int = PRIVILEGED,
        port: int = 0,
        heartbeat_interval: float = HEARTBEAT_INTERVAL,
        shards: int = 1,
        bot_name: str = "watcher",
    ) -> None:
        token = token or make_token(snowflake(days_ago(300)))
        super().__init__(
            User(bot_id_of(token), bot_name, bot=True), token, allowed_privileged, shards
        )
        self.port = port
        self.oauth2 = OAuth2(self.bot, self.guilds)
        self._application = self._routed(heartbeat_interval)
        self._server: tornado.httpserver.HTTPServer | None = None
        self._kept: tcp.socket | None = None  # keeps the port while connections are refused

    @property
    def bot_id(self) -> int:
        """The id of the bot's account."""
        return self.bot.id

    @property
    def rest_url(self) -> str:
        """What hikari takes as `rest_url`."""
        return f"http://127.0.0.1:{self.port}{API_PATH}"

    def add_guild(
        self,
        name: str = "Night Owls",
        *,
        guild_id: int | None = None,
        owner_id: int | None = None,
    ) -> Guild:
        """Make a guild with the bot in it.

        A bot that is connected gets its GUILD_CREATE before the next packet, at the latest in the
        next turn of the loop: members put in at once are already part of it.
        """
        guild = make_guild(name, bot=self.bot, guild_id=guild_id, owner_id=owner_id)
        self.guilds[guild.id] = guild
        if self.sessions:
            guild.joined_at = iso()
            self._unannounced.append(guild)
            asyncio.get_running_loop().call_soon(self.announce)
        return guild

    async def __aenter__(self) -> PretendDiscord:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        self._release_port()
        for gateway in self._detach_all():
            gateway.close(CloseCode.GOING_AWAY, "Going away.")
        with contextlib.suppress(TimeoutError):
            await self.wait_until(lambda: not self.sockets, CLOSING_GRACE)
        await self.drop(None)

    async def accept(self) -> None:
        """Listen: the first time on the port asked for, afterwards on the same one again."""
        if self._server is not None:
            return
        self._release_port()
        listeners = tornado.netutil.bind_sockets(self.port, "127.0.0.1")
        self.port = listeners[0].getsockname()[1]
        self.gateway_url = f"ws://127.0.0.1:{self.port}{GATEWAY_PATH}"
        self._server = tornado.httpserver.HTTPServer(self._application)
        self._server.add_sockets(listeners)

    async def refuse(self) -> None:
        """Refuse connections until `accept`, REST and gateway; open gateway sockets stay."""
        if self._server is not None:
            server, self._server = self._server, None
            server.stop()
            self._kept = tcp.socket()
            self._kept.setsockopt(tcp.SOL_SOCKET, tcp.SO_REUSEADDR, 1)
            self._kept.bind(("127.0.0.1", self.port))
            await server.close_all_connections()

    def _release_port(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _routed(self, heartbeat_interval: float) -> tornado.web.Application:
        socket = {"gateway": self, "heartbeat_interval": heartbeat_interval}
        rest = [
            (API_PATH + path, RestHandler, {"discord": self, "answers": answers})
            for path, answers in by_path(ROUTES).items()
        ]
        return tornado.web.Application(
            [(GATEWAY_PATH, GatewaySocket, socket), *sign_in_routes(self.oauth2, API_PATH), *rest],
            default_handler_class=RestHandler,
            default_handler_args={"discord": self},
            log_function=lambda handler: None,  # a refused bot is a result here, not a warning
        )


# ---- the harness ----
# Plugins without a network and without a server: the real plugin host and the real hikari, fed by hand
# as a gateway session of the plugins' own intents would feed them.

PATIENCE = 5.0  # seconds after which what a plugin still does counts as going on in the background
# What Discord never sends of a guild without saying who that is (Gateway Events).
WITH_MEMBER = frozenset(
    {"MESSAGE_CREATE", "MESSAGE_UPDATE", "MESSAGE_REACTION_ADD", "TYPING_START"}
    | {"VOICE_STATE_UPDATE"}
)


class Emitted(NamedTuple):
    """What dashboards in a room would get."""

    event: str
    fields: Json
    room: str


class Harness:
    """Plugins to be tried: feed raw gateway JSON, see what was emitted.

        with Harness("plugins/mine.py") as h:
            ada = h.guild.add_member("ada")
            h.feed("MESSAGE_CREATE", message_json(h.guild, ada, h.guild.general))
            h.run(h.discord.presence(h.guild, ada, "online", ["web"]))
            assert h.emitted[0].event == "message:new"
            assert h.emitted[0].fields["username"] == "ada"

    Each path is a plugin, a file or a folder; `settings` are their `[plugin.NAME]` tables, by name.
    The bot sees the guild before the first packet: whoever is in it by then was there before.
    What a plugin raises, at load or later, is raised here as PluginError, by the call that led to
    it. Not for use where an event loop runs already.
    """

    def __init__(self, *paths: str | Path, settings: Mapping[str, Json] | None = None) -> None:
        self.discord = PretendDiscord()
        self.guild = self.discord.add_guild()
        #: What was emitted so far, in order.
        self.emitted: list[Emitted] = []
        self._paths = [found_plugin(Path(path)) for path in paths]
        self._tables = {name: dict(table) for name, table in (settings or {}).items()}
        self._faults = FaultsLogged()
        self._making: set[asyncio.Task[None]] = set()
        self._resting: set[asyncio.Task[Any]] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            logging.getLogger().addHandler(self._faults)
            stack.callback(logging.getLogger().removeHandler, self._faults)
            self._runner = stack.enter_context(asyncio.Runner())
            self._runner.run(self._start())
            stack.callback(self._end)
            self._raise_faults()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def feed(self, name: str, data: Json) -> None:
        """One dispatch of the gateway: `d` as Discord documents it, of which hikari makes its event.

        What people wrote is left out, and a `member` that is missing is taken from `guild`. Raises
        PluginError for what no bot with the intents of these plugins would get, or could read.
        """
        try:
            whole = self._with_member(data) if name in WITH_MEMBER else data
            direct = "guild_id" not in data
            if (
                let_through(name, whole, self.bot.intents, self.discord.bot.id, direct=direct)
                is None
            ):
                without = " without guild_id" if direct else ""
                raise spywatcher.PluginError(f"feed: no plugin hears a {name}{without}")
            self.run(self.discord.dispatch(name, whole))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise spywatcher.PluginError(f"feed: cannot read this {name}: {what}") from error

    def run(self, doing: Coroutine[Any, Any, T]) -> T:
        """Have something happen, and wait until the plugins are through with it."""
        result = self._runner.run(self._through(doing))
        self._raise_faults()
        return result

    def subscribe(self, kind: str = "guild", viewer: Member | None = None) -> list[Emitted]:
        """What a new subscriber of the guild's room gets at once: this member, else an admin."""
        admin = spywatcher.Viewer("1", "ADMIN")
        subscriber = spywatcher.Viewer(str(viewer.id), "USER") if viewer else admin
        told: list[Emitted] = []
        guild_id = str(self.guild.id)

        def tell(event: str, fields: Json) -> None:
            told.append(Emitted(event, fields, f"{kind}:{guild_id}"))

        self.run(self.host.greet(kind, guild_id, tell, subscriber))
        return told

    def tick(self) -> None:
        """Call once, now, what the plugins have repeated by `every`."""
        self.run(self._tick())

    # Behind the scenes.

    def _with_member(self, data: Json) -> Json:
        """Messages of webhooks, and of who has left, are of nobody in the guild."""
        if "member" in data or "guild_id" not in data:
            return data
        user_id = data.get("user_id") or data.get("author", {}).get("id")
        member = self.guild.members.get(int(user_id or 0))
        if member:
            return data | {"member": member.to_json(with_user="author" not in data)}
        if "user_id" in data:
            raise spywatcher.PluginError(f"feed: no member, and none of h.guild is {user_id}")
        return data

    def _may_see(self, viewer: spywatcher.Viewer, guild_id: str, channel_id: str) -> bool:
        """By the cache as it is now."""
        cache = spywatcher.CacheReader(self.bot.cache)
        access = spywatcher.Access(spywatcher.AuthSettings(), (), cache)
        return access.may_see(viewer, guild_id, channel_id)

    def _end(self) -> None:
        self._runner.run(self.host.stop())
        self._raise_faults()

    def _raise_faults(self) -> None:
        records = self._faults.take()
        if records:
            cause = records[0].exc_info[1] if records[0].exc_info else None
            raise spywatcher.PluginError(records[0].getMessage()) from cause

    async def _start(self) -> None:
        metrics = spywatcher.Metrics()
        names = {path.stem for path in self._paths}
        folders = dict.fromkeys(path.parent for path in self._paths)
        settings = spywatcher.PluginsSettings(tuple(map(str, folders)))
        others = spywatcher.PluginFiles(settings, self._folder).all().keys() - names
        settings = msgspec.structs.replace(settings, disabled=tuple(sorted(others)))
        plugins = spywatcher.PluginLoader(settings, self._tables, self._folder, metrics)
        plugins.load_all()
        discord, wanted = spywatcher.DiscordSettings(), spywatcher.wanted_events(plugins)
        gateway = spywatcher.Gateway(discord, self.discord.token, wanted, metrics, plugins.cached())
        self.bot = gateway.bot
        place = spywatcher.HostContext(
            bot=self.bot,
            presences=gateway.presences,
            emit=self._emit,
            settled=lambda: True,
            watches=lambda guild_id: True,
            storage=self._folder / "counts.db",
            may_see=self._may_see,
            tokens=spywatcher.Tokens(spywatcher.Keys((secrets.token_hex(32),)), ("HS256",)),
        )
        self.host = spywatcher.PluginHost(plugins, place, metrics, settings.handler_timeout)
        await self.host.start()
        self._resting = asyncio.all_tasks()

    def _emit(self, event: str, guild_id: str, content: Any, kind: str) -> None:
        room = f"{kind}:{guild_id}"

        async def make() -> None:
            if (fields := await content()) is not None:
                self.emitted.append(Emitted(event, fields, room))

        if callable(content):
            self._making.add(asyncio.create_task(make()))
        else:
            self.emitted.append(Emitted(event, content, room))

    async def _tick(self) -> None:
        for runner in self.host.runners.values():
            for _, guarded in runner.hooks["@every"]:
                await guarded.ask()

    async def _through(self, doing: Coroutine[Any, Any, T]) -> T:
        if not self.discord.sessions:
            ShardByHand(self.discord, self.bot).identify(int(self.bot.intents))
            await self._rest()  # a large guild's members come after it
        result = await doing
        await self._rest()
        return result

    async def _rest(self) -> None:
        """Until nothing is left to do."""
        while tasks := asyncio.all_tasks() - self._resting - {asyncio.current_task()}:
            done, _ = await asyncio.wait(tasks, timeout=PATIENCE)
            if not done:
                self._resting |= tasks


def found_plugin(path: Path) -> Path:
    """The whole path of a plugin; raises spywatcher.PluginError where a server would find none."""
    whole = path.resolve()
    if whole.parent.is_dir():
        folder = spywatcher.PluginsSettings((str(whole.parent),))
        found = spywatcher.PluginFiles(folder, whole.parent).find().get(whole.stem)
        if found in (whole, whole / "__init__.py"):
            return whole
    raise spywatcher.PluginError(f"Harness: no plugin at {path}")


class FaultsLogged(logging.Handler):
    """Keeps what plugin host, hikari and asyncio log at ERROR: a test has nobody who reads a log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self._records.append(record)

    def take(self) -> list[logging.LogRecord]:
        """What came since the last time."""
        records, self._records = self._records, []
        return records


class ShardByHand(PretendShard):
    """A gateway session that ends in hikari without a socket; both sides take it for theirs."""

    def __init__(self, discord: Gateway, bot: hikari.GatewayBot) -> None:
        super().__init__(discord.bot.id)
        self._discord = discord
        self._bot = bot
        self._session: Session | None = None

    @property
    def is_connected(self) -> bool:
        """There is nothing that could break."""
        return True

    def identify(self, intents: int) -> None:
        """Come in, which brings READY and the guilds."""
        identify = Identify(self._discord.token, intents)
        self._session = self._discord.identify(identify, self)

    def transmit(self, packet: bytes) -> None:
        """What the pretend Discord sends."""
        dispatch = msgspec.json.decode(packet)
        consume = self._bot.event_manager.consume_raw_event
        try:
            consume(dispatch["t"], cast("Any", self), dispatch["d"])
        except LookupError as error:
            raise spywatcher.PluginError(f"hikari knows no event {dispatch['t']}") from error

    async def request_guild_members(
        self, guild: int, *, include_presences: bool = False, nonce: str | None = None, **_: Any
    ) -> None:
        """What hikari asks for once it knows a large guild."""
        assert self._session is not None
        request = RequestMembers(int(guild), presences=include_presences, nonce=nonce)
        self._discord.request_members(self._session, request)

    def send(self, op: Op, d: Any) -> None:
        """Nothing but dispatches means anything here."""

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """There is no connection."""

    def cut(self) -> None:
        """There is no connection."""


# ---- a lively guild ----
# People who never sleep, so that every part of a dashboard has something to show: regulars write, edit,
# delete and talk, lurkers only come and go, ghosts type and never send.

FIRST_NAMES = (
    *("mira", "愛子", "Тобиас", "léna", "राफेल", "priya", "نور", "elif", "kofi", "inês"),
    *("Łukasz", "雪", "darío", "はな", "عمر", "freyja", "luca", "Ζωή", "김하나", "דנה"),
    *("ณัฐ", "Nguyễn", "Şule", "გიორგი", "Արամ", "saoirse", "bruno", "viktor", "小龍", "carmen"),
)
TAILS = ("", " 🌙", "_x", " 🎮", "42", " ✨", "_dev", ".irl", " 👩‍🚀", "99")
CHANNELS = ("art-🎨", "gaming", "日本語", "книги")
VOICE_CHANNELS = ("Lounge 🔊", "Game night")
TOPICS = (
    "raid on friday 🐉",
    "mod list",
    "книга месяца",
    "photo walk 📷",
    "speedrun ideas",
    "おすすめ",
)
RANKS = ("Regular", "🔥 Veteran", "🎨 Artist", "👨‍👩‍👧 Family")
CHATTER = (
    "anyone up for a round tonight?",
    "just pushed the fix",
    "that boss took me nine tries",
    "good morning",
    "lol",
    "who has the link?",
    "brb dinner",
    "ship it",
)
GAMES = ("Factorio", "Celeste", "Deep Rock Galactic", "Balatro")
EMOJI = ("👍", "😂", "🔥", "🦉", "❤️")
DEVICES = ("desktop", "mobile", "web")
STATUSES = ("online", "online", "idle", "dnd")

Act = Callable[[], Awaitable[None]]
Said = tuple[Channel | Thread, Json]  # where, and the message
KEPT = 20  # messages that may yet be edited, deleted or reacted to


class LivelyGuild:
    """A guild with believable people and what each of them does by habit."""

    def __init__(
        self,
        discord: PretendDiscord,
        *,
        name: str = "Night Owls 🦉",
        members: int = 60,
        seed: int = 1,
    ) -> None:
        self.discord = discord
        self.dice = random.Random(seed)
        self.names = self._new_names()
        self.guild = discord.add_guild(name)
        self.ranks = [self.guild.add_role(name) for name in RANKS]
        may = Permission.MANAGE_GUILD | Permission.MANAGE_MESSAGES
        self.staff = staff = self.guild.add_role("Staff", may)
        self.guild.owner.role_ids.append(staff.id)
        channels = [self.guild.general, *map(self.guild.add_channel, CHANNELS)]
        private = hidden_except(self.guild, staff)
        self.staff_room = self.guild.add_channel("staff-room", overwrites=private)
        self.voice_channels = [
            self.guild.add_channel(name, kind=ChannelType.GUILD_VOICE) for name in VOICE_CHANNELS
        ]
        self.threads = [self.guild.add_thread(topic, channels[-1]) for topic in TOPICS[:2]]
        self.channels = channels
        people = [self._settle() for _ in range(max(members, 8))]
        self.lurkers = people[: len(people) // 5]
        self.ghosts = people[len(self.lurkers) : len(people) // 3]
        self.regulars = people[len(people) // 3 :]
        self.newcomers = [self._settle() for _ in range(3)]
        self.said: collections.deque[Said] = collections.deque(maxlen=KEPT)

    def _new_names(self) -> Iterator[str]:
        names = [first + tail for tail in TAILS for first in FIRST_NAMES]
        self.dice.shuffle(names)
        return itertools.chain(names, (f"owl{number}" for number in itertools.count(1)))

    def _settle(self) -> Member:
        """A member who has been here for a while, most of them online, some on two devices."""
        member = self.guild.add_member(
            next(self.names), account_age_days=self.dice.uniform(20, 2500)
        )
        if self._coin(0.7):
            devices = self.dice.sample(DEVICES, 2 if self._coin(0.1) else 1)
            member.appear(self.dice.choice(STATUSES), devices)
        return member

    async def play(self, rate: float) -> None:
        """Do things at that many a second on average, until cancelled."""
        for act in self.acts():
            await asyncio.sleep(self.dice.expovariate(rate))
            await act()

    async def warm_up(self, count: int) -> None:
        """Do that many things at once."""
        for act in itertools.islice(self.acts(), count):
            await act()

    def acts(self) -> Iterator[Act]:
        """What happens next, for ever: shuffled decks in which each habit has its share.

        A deck has about a hundred cards, so that at five things a second each comes in twenty.
        """
        habits: Mapping[Act, int] = {
            self.chat: 26,
            self.lurk: 16,
            self.haunt: 12,
            self.react: 10,
            self.come_and_go: 8,
            self.take_a_device: 4,
            self.put_devices_away: 4,
            self.talk: 4,
            self.edit: 3,
            self.begin_a_game: 3,
            self.confer: 2,
            self.promote: 2,
            self.arrive: 1,
            self.depart: 1,
            self.delete: 2,
            self.rename: 1,
            self.turn_to_a_topic: 1,
        }
        while True:
            deck = [act for act, share in habits.items() for _ in range(share)]
            self.dice.shuffle(deck)
            yield from deck

    # What regulars do.

    async def chat(self) -> None:
        """A regular types, then writes."""
        author, place = self.dice.choice(self.regulars), self._place()
        await self.discord.typing(self.guild, author, place)
        body = await self.discord.message(self.guild, author, place, self.dice.choice(CHATTER))
        self.said.append((place, body))

    async def edit(self) -> None:
        """Somebody changes what was written."""
        if self.said:
            text = self.dice.choice(CHATTER)
            await self.discord.message_edit(self.guild, *self.dice.choice(self.said), text)

    async def delete(self) -> None:
        """Somebody takes back what was written last."""
        if self.said:
            await self.discord.message_delete(self.guild, *self.said.pop())

    async def react(self) -> None:
        """A regular reacts to what was written, now and then a lurker or a ghost."""
        if self.said:
            shy = self._coin(0.2)
            member = self.dice.choice([*self.lurkers, *self.ghosts] if shy else self.regulars)
            emoji, said = self.dice.choice(EMOJI), self.dice.choice(self.said)
            await self.discord.reaction(self.guild, member, *said, emoji)

    async def turn_to_a_topic(self) -> None:
        """A regular opens a thread; there are never more than four."""
        if len(self.threads) >= 4:
            gone = self.threads.pop(0)
            self.said = collections.deque((s for s in self.said if s[0] is not gone), KEPT)
            await self.discord.thread_delete(self.guild, gone)
        owner, topic = self.dice.choice(self.regulars), self.dice.choice(TOPICS)
        channel = self.dice.choice(self.channels)
        self.threads.append(await self.discord.thread_create(self.guild, channel, topic, owner))

    async def talk(self) -> None:
        """A regular enters a voice channel, moves to another or hangs up."""
        talking = [self.guild.members[i] for i in self.guild.voice]
        if len(talking) >= 6 or (talking and self._coin(0.3)):
            await self.discord.voice(self.guild, self.dice.choice(talking), None)
        else:
            member = self.dice.choice(talking if talking and self._coin(0.4) else self._online())
            now = self.guild.voice.get(member.id)
            others = [channel for channel in self.voice_channels if channel.id != now]
            await self.discord.voice(self.guild, member, self.dice.choice(others))

    async def come_and_go(self) -> None:
        """A regular comes, goes, or changes the status."""
        member = self.dice.choice(self.regulars)
        if member.status != "offline" and self._coin(0.5):
            status = self.dice.choice([s for s in STATUSES if s != member.status])
            await self.discord.presence(self.guild, member, status, list(member.client_status))
        else:
            await self._toggle(member)

    async def take_a_device(self) -> None:
        """A regular who is on one device takes another one besides."""
        single = [member for member in self.regulars if len(member.client_status) == 1]
        member = self.dice.choice(single or self.regulars)
        unused = [device for device in DEVICES if device not in member.client_status]
        devices = [*member.client_status, *self.dice.sample(unused, min(len(unused), 1))]
        await self.discord.presence(self.guild, member, "online", devices)

    async def put_devices_away(self) -> None:
        """A regular who is on several devices goes back to one."""
        several = [member for member in self.regulars if len(member.client_status) > 1]
        if several:
            member = self.dice.choice(several)
            device = self.dice.choice(list(member.client_status))
            await self.discord.presence(self.guild, member, member.status, [device])

    async def begin_a_game(self) -> None:
        """A regular begins to play: a presence with another activity and the same status."""
        member, game = self.dice.choice(self._online()), [{"name": self.dice.choice(GAMES)}]
        await self.discord.presence(self.guild, member, member.status, activities=game)

    async def promote(self) -> None:
        """A regular gains a rank; who has all of them begins again."""
        member = self.dice.choice(self.regulars)
        missing = [rank for rank in self.ranks if rank.id not in member.role_ids]
        if not missing:
            kept = [role for i, role in self.guild.roles.items() if i in member.role_ids]
            await self.discord.set_roles(
                self.guild, member, *(r for r in kept if r not in self.ranks)
            )
            missing = self.ranks
        await self.discord.add_role(self.guild, member, self.dice.choice(missing))

    async def rename(self) -> None:
        """A regular takes a nickname."""
        member = self.dice.choice(self.regulars)
        await self.discord.rename(self.guild, member, nick=f"{member.name} the owl")

    # What others do.

    async def lurk(self) -> None:
        """A lurker comes or goes."""
        await self._toggle(self.dice.choice(self.lurkers))

    async def haunt(self) -> None:
        """A ghost types and thinks better of it."""
        await self.discord.typing(self.guild, self.dice.choice(self.ghosts), self._place())

    async def confer(self) -> None:
        """The owner writes where only the staff may read."""
        line = self.dice.choice(CHATTER)
        await self.discord.message(self.guild, self.guild.owner, self.staff_room, line)

    async def arrive(self) -> None:
        """Someone new joins, often with a fresh account."""
        age = self.dice.choice((0.1, 2.0, self.dice.uniform(10, 2000)))
        member = await self.discord.join(self.guild, next(self.names), account_age_days=age)
        self.newcomers.append(member)

    async def depart(self) -> None:
        """Of those who came lately, the first leaves again."""
        if self.newcomers:
            await self.discord.leave(self.guild, self.newcomers.pop(0))

    def _place(self) -> Channel | Thread:
        places: list[Channel | Thread] = [*self.channels, *self.threads]
        return self.dice.choice(places)

    def _online(self) -> list[Member]:
        """The regulars who are there, or all of them at the hour when nobody is."""
        return [m for m in self.regulars if m.status != "offline"] or self.regulars

    async def _toggle(self, member: Member) -> None:
        status = self.dice.choice(STATUSES) if member.status == "offline" else "offline"
        await self.discord.presence(self.guild, member, status, [self.dice.choice(DEVICES)])

    def _coin(self, chance: float) -> bool:
        return self.dice.random() < chance


class PastHour(NamedTuple):
    """What happened in one hour of a guild: `hour` in hours since 1970, `online` at most at once."""

    hour: int
    messages: int
    joins: int
    leaves: int
    active: int
    online: int


def past_hours(dice: random.Random, members: int, weeks: int = 4) -> Iterator[PastHour]:
    """The last weeks of a guild, until the last full hour: weekends, evenings, and it grows. It is
    evening there now, whenever that is, so that the past is of a piece with the life of the demo.
    """
    hours, now = weeks * 7 * 24, int(time.time()) // 3600
    for ago in range(hours, 0, -1):
        moment = datetime.fromtimestamp((now - ago) * 3600, UTC)
        evening = (1 + math.cos(ago / 24 * math.tau)) / 2  # 0 twelve hours before and after
        weekend = 1.3 if moment.weekday() >= 5 else 1.0
        grown = 1.0 - 0.3 * ago / hours
        busy = (0.04 + 0.96 * evening**1.5) * weekend * grown * dice.uniform(0.7, 1.2)
        active = min(round(busy * members * 0.6), members)
        joins = round(busy * dice.uniform(4, 12))
        yield PastHour(
            hour=now - ago,
            messages=active and active + round(busy * members * dice.uniform(30, 50)),
            joins=joins,
            leaves=round(joins * dice.uniform(0.77, 1.21)),
            active=active,
            online=max(
                active, round(members * grown * (0.15 + 0.5 * evening) * dice.uniform(0.9, 1.1))
            ),
        )


def lively_guilds(discord: PretendDiscord, members: int = 60, seed: int = 1) -> list[LivelyGuild]:
    """A lively guild and a quieter one."""
    owls = LivelyGuild(discord, members=members, seed=seed)
    return [owls, LivelyGuild(discord, name="Book Club 📚", members=members // 4, seed=seed + 1)]


async def play(lively: Sequence[LivelyGuild], rate: float = 5.0) -> None:
    """Keep guilds busy until cancelled, each a good deal less than the one before it."""
    await asyncio.gather(*(guild.play(rate / 20**i) for i, guild in enumerate(lively)))


# ---- the demo ----
# The whole product on loopback: the pretend Discord, a real server in front of it, and a dashboard in
# the terminal. What an operator has is left alone: the demo keeps its counts in a folder of its own,
# and of the settings it takes the port, the plugins with theirs, the throttle and the log.

DEMO_TEXT = """
SpyWatcher is watching {guilds}. Open this address; it signs you in, for a day:

    {url}/#token={token}

That token is for dashboards of your own, too. Ctrl+C stops it all. Here you see the first event of
each kind{and_more}:
"""
DEMO_FILE = "demo.db"
LONGEST = 600  # characters of an event that the terminal shows; weeks of history have 60,000
LOOPBACK_ORIGINS = tuple(
    f"{scheme}://{host}:*"
    for scheme in ("http", "https")
    for host in ("localhost", "127.0.0.1", "[::1]")
)
# Things that have happened when the address is shown: they fill the lists of members.
LIFE_BEFORE = 500


async def run_demo(
    settings: spywatcher.Settings,
    port: int | None = None,
    plugins: Path | None = None,
    config: Path | None = None,
) -> None:
    """Serve until a signal comes; `port` and a folder of `plugins` go before the settings', which
    SIGHUP reads again, from the file `config` or where they are by default.

    Raises spywatcher.OperatorError when the port cannot be had or a plugin's settings are wrong.
    """
    async with PretendDiscord() as discord, contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = demo_settings(settings, discord, folder, port, plugins)
        started = with_sign_in(started, discord)
        keys = spywatcher.read_keys(started.auth, started.folder)
        server = spywatcher.Server(started, keys=keys, token=discord.token)

        def read_again() -> spywatcher.Settings:
            settings = spywatcher.read_settings(config)
            now = demo_settings(settings, discord, folder, started.server.port, plugins)
            tables = now.plugin | {"signin": started.plugin["signin"]}
            return msgspec.structs.replace(now, auth=started.auth, plugin=tables)

        lively = lively_guilds(discord)
        discord.oauth2.people = demo_people(lively[0]) | discord.oauth2.people
        give_a_past(server.plugins, lively, folder)
        reload = functools.partial(spywatcher.reload_settings, server, read_again)
        serving = asyncio.create_task(serve(server, reload))
        showing = asyncio.create_task(show(discord, server, lively, plugins))
        both = [serving, showing]
        ended, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.wait(both)
        for task in ended:
            task.result()


async def serve(server: spywatcher.Server, reload: Callable[[], None]) -> None:
    """Run the server until a signal comes; a port in use is said with the way out."""
    try:
        await spywatcher.run_server(server, reload=reload)
    except spywatcher.OperatorError as error:
        way_out = "take another one: python spywatcher.py demo --port 0"
        raise spywatcher.OperatorError(f"{error}; {way_out}") from error


def demo_settings(
    settings: spywatcher.Settings,
    discord: PretendDiscord,
    folder: Path,
    port: int | None,
    plugins: Path | None,
) -> spywatcher.Settings:
    """What the demo's server runs with; an author's own plugin replaces a shipped one of its name."""
    replace = msgspec.structs.replace
    first = () if plugins is None else (str(plugins),)
    return spywatcher.Settings(
        server=spywatcher.ServerSettings(
            host="localhost",
            port=settings.server.port if port is None else port,
            cors_origins=LOOPBACK_ORIGINS,
        ),
        auth=spywatcher.AuthSettings(secret=secrets.token_hex(32)),
        discord=spywatcher.DiscordSettings(rest_url=discord.rest_url, startup_grace=0.0),
        limits=spywatcher.LimitsSettings(block_for=5.0),  # a wrong token is one's own mistake here
        storage=spywatcher.StorageSettings(path=str(folder / DEMO_FILE)),
        plugins=replace(settings.plugins, folders=(*first, *settings.plugins.folders)),
        plugin=settings.plugin,
        throttle=settings.throttle,
        log=settings.log,
        folder=settings.folder,
        source=settings.source,
    )


def with_sign_in(settings: spywatcher.Settings, discord: PretendDiscord) -> spywatcher.Settings:
    """The same with the page's button, which leads to this Discord; port 0 becomes a free one now."""
    port = settings.server.port or free_port()
    url = f"http://localhost:{port}"
    discord.oauth2.redirect_uris.add(f"{url}/signin/callback")
    mallory = User(snowflake(days_ago(3)), "mallory")
    discord.oauth2.people["mallory, who is banned here"] = mallory
    signin = {
        "client_id": discord.oauth2.client_id,
        "client_secret": discord.oauth2.client_secret,
        "public_url": url,
        "banned": [str(mallory.id)],
    }
    replace = msgspec.structs.replace
    server = replace(settings.server, port=port)
    return replace(settings, server=server, plugin=settings.plugin | {"signin": signin})


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    [listener] = tornado.netutil.bind_sockets(0, "127.0.0.1")
    with listener:
        port: int = listener.getsockname()[1]
    return port


def demo_people(lively: LivelyGuild) -> dict[str, User]:
    """Whom one may be on the page of `AuthorizeHandler`: each sees something else."""
    moderator, member = lively.regulars[:2]
    moderator.role_ids.append(lively.staff.id)
    owner, name = lively.guild.owner, lively.guild.name
    return {
        f"{owner.name}, who owns {name}": owner.user,
        f"{moderator.name}, a moderator of {name}": moderator.user,
        f"{member.name}, a plain member": member.user,
    }


def give_a_past(host: spywatcher.PluginHost, lively: Sequence[LivelyGuild], folder: Path) -> None:
    """Have the plugin `history` begin with some weeks, before the server starts."""
    plugin = host.plugins.get("history")
    seed = getattr(plugin and plugin.module, "seed", None)
    if seed is not None:
        seed(
            folder / DEMO_FILE,
            (
                (hour.hour, one.guild.id, hour[1:])
                for one in lively
                for hour in past_hours(one.dice, len(one.guild.members))
            ),
        )


async def show(
    discord: PretendDiscord,
    server: spywatcher.Server,
    lively: Sequence[LivelyGuild],
    plugins: Path | None,
) -> None:
    """Fill the guilds with life, say where to look, and go on until cancelled."""
    await discord.wait_for_bot(timeout=60)
    for i, guild in enumerate(lively):
        await guild.warm_up(LIFE_BEFORE // 4**i)
    await discord.caught_up()
    url = f"http://localhost:{server.port}"
    token = server.tokens.issue("1", role="ADMIN", ttl=86_400)
    names = " and ".join(one.guild.name for one in lively)
    and_more = f", and all of the plugins in {plugins}" if plugins else ""
    print(DEMO_TEXT.format(guilds=names, url=url, token=token, and_more=and_more), flush=True)
    await asyncio.gather(play(lively), watch(server, token, plugins))


async def watch(server: spywatcher.Server, token: str, plugins: Path | None) -> None:
    """A dashboard in a terminal: what any Socket.IO client sees, one line an event."""
    client = socketio.AsyncClient(logger=False, handle_sigint=False)  # run_server does
    seen: set[str] = set()

    def note(event: str, data: object) -> None:
        if event not in seen or (plugins and is_of(plugins, server.plugins, event)):
            text = json.dumps(data, ensure_ascii=False)
            print(f"{event:18} {textwrap.shorten(text, LONGEST, placeholder=' …')}", flush=True)
        seen.add(event)

    client.on("*", note)
    url = f"http://127.0.0.1:{server.port}"
    await client.connect(url, auth={"token": token}, transports=["websocket"])
    guilds = (await client.call("guilds:list"))["guilds"]
    joined: set[str] = set()
    try:
        while True:  # a plugin that is saved meanwhile may open rooms of another kind
            for kind in sorted(server.plugins.loader.kinds - joined):
                joined.add(kind)
                for guild in guilds:
                    await client.emit(f"subscribe:{kind}", guild["id"])
            await asyncio.sleep(1.0)  # nobody tells a client of new kinds: it looks now and then
    finally:
        await client.shutdown()


def is_of(folder: Path, host: spywatcher.PluginHost, event: str) -> bool:
    """Whether a plugin from that folder has the event."""
    owners = [plugin for plugin in host.plugins.values() if event in plugin.events]
    return any(plugin.path.is_relative_to(folder) for plugin in owners)


# ---- command line ----


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the program."""
    parser = argparse.ArgumentParser(
        prog="simulator.py", description="A pretend Discord with a lively guild, on loopback."
    )
    parser.add_argument("--port", type=int, default=8123, help="0 picks a free one")
    parser.add_argument("--members", type=int, default=60, help="people in the guild")
    parser.add_argument("--rate", type=float, default=5.0, help="things that happen per second")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same story")
    return parser.parse_args(arguments)


async def run(options: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    async with PretendDiscord(port=options.port) as discord:
        lively = lively_guilds(discord, options.members, options.seed)
        playing = asyncio.create_task(play(lively, options.rate))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, playing.cancel)
        print(f'rest_url = "{discord.rest_url}"\ntoken = "{discord.token}"', flush=True)
        for one in lively:
            guild = one.guild
            print(f"# guild {guild.id} ({guild.name}), owner {guild.owner_id}", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await playing


if __name__ == "__main__":
    asyncio.run(run(parse()))
