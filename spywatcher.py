"""SpyWatcher: what happens in your Discord guilds, live in any browser.

One process. In comes a Discord gateway session (hikari); out go Socket.IO events to browser
dashboards (Tornado, python-socketio). Nothing here knows an event by name: every event that a
dashboard sees is made by a plugin.

Who writes a plugin finds what it may import below the sections, in `help(spywatcher)`, and the way to
it in docs/plugins.md:

    import hikari
    from spywatcher import on

    @on(hikari.RoleCreateEvent, emit="role:create")
    def role_create(event):
        return {"name": event.role.name}

The way of one event:
    hikari -> plugin -> throttle -> address -> room -> clients that may see it

The sections, each using only those above it:
    errors               whose fault it was, and what they are told
    settings             config.toml: one table of keys, types, defaults, meanings
    metrics              what is counted, for Prometheus
    names                what is shown of what people, channels and guilds are called
    identity and access  who a viewer is, which guilds and channels they may see
    limits               how much one address, one viewer, one connection may have
    rooms and fan-out    Engine.IO sessions, rooms, and the shortest way from one event to all of them
    recovery             what clients that come back have missed
    throttle             how often one event may go to one guild
    plugin API           all that a plugin may import
    plugin host          finds, loads, runs and fences plugins
    gateway              the session with Discord, kept alive
    node                 this process alone, or as one of several: who judges, leads and delivers
    web handlers         the Tornado side of Socket.IO
    server               puts the parts together, starts and stops them
    command line         serve, demo, check, types, token, forget
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import collections
import contextlib
import contextvars
import copy
import dataclasses
import difflib
import enum
import errno
import faulthandler
import functools
import gc
import hashlib
import heapq
import hmac
import importlib
import inspect
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import socket
import sys
import textwrap
import threading
import time
import tomllib
import traceback
from base64 import b64decode, b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from datetime import UTC, datetime
from operator import call, itemgetter, or_
from pathlib import Path
from types import ModuleType, coroutine
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
    get_args,
    get_origin,
)
from weakref import WeakValueDictionary

import engineio
import hikari
import jwt
import msgspec
import regex
import socketio
import yarl
from engineio import packet as engineio_packet
from hikari.events import base_events
from hikari.impl.event_manager_base import filtered
from msgspec import Meta
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream, SSLIOStream, StreamBufferFullError, StreamClosedError
from tornado.netutil import bind_sockets
from tornado.routing import PathMatches
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketHandler

__version__ = "0.1.0"

#: What a plugin may import; everything else may change without notice.
__all__ = [
    "Marks",
    "Payload",
    "PluginSettings",
    "Presence",
    "PresenceUpdateEvent",
    "Shared",
    "Spy",
    "Subscriber",
    "channel_name",
    "every",
    "member_name",
    "on",
    "on_subscribe",
    "role_name",
    "route",
    "timestamp",
    "user_name",
]

log = logging.getLogger("spywatcher")


# ------------------------------------------------------------------------------- errors
# One root. The subclass says whose fault it was, and with it who is told what: an operator
# reads one line per fault and no traceback; a client reads a sentence and a code, never a
# path or a plugin's insides; bugs are none of these classes and keep their traceback.


class SpyWatcherError(Exception):
    """Root of all errors that SpyWatcher raises on purpose."""


class OperatorError(SpyWatcherError):
    """Settings, files or plugins are wrong. One line per fault; exit status 2."""

    def __init__(self, *faults: str) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(self.faults)


@contextlib.contextmanager
def collecting(faults: list[str]) -> Iterator[None]:
    """What an operator has to change goes to `faults`, to be told together."""
    try:
        yield
    except OperatorError as error:
        faults += error.faults


class UpstreamError(SpyWatcherError):
    """Discord refused us for good; the line says what to change and where. Exit status 2."""


class PluginError(SpyWatcherError):
    """A plugin broke the contract; the message names the plugin and what it did."""


class ClientError(SpyWatcherError):
    """A client asked for what it cannot have: `{message, code}` goes back to it (design: rooms).

    `code` is one of invalid_guild, forbidden, rate_limited, too_many_rooms, unknown_event,
    bad_request.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def to_wire(self) -> dict[str, str]:
        return {"message": self.message, "code": self.code}


class RefusedConnectionError(SpyWatcherError):
    """A connection may not come in: the client's `connect_error` has this message and data."""

    def __init__(self, message: str, **data: object) -> None:
        super().__init__(message)
        self.message = message
        self.data = data


# ----------------------------------------------------------------------------- settings
# The one table of settings: key, type, default and a sentence each. config.toml and the
# README's table say the same (tests hold them together). Nothing here knows what a setting
# is for; whoever needs one is handed its section.

# A title says what an operator should have written (see `expected`).
Port = Annotated[int, Meta(ge=0, le=65535, title="a whole number from 0 to 65535")]
Positive = Annotated[int, Meta(ge=1, title="a whole number, 1 or more")]
Seconds = Annotated[float, Meta(gt=0, title="a number of seconds above 0, such as 5.0")]
#: Browsers' and the kernel's timers count milliseconds in 31 bits.
HeartbeatSeconds = Annotated[
    float, Meta(gt=0, le=86_400, title="a number of seconds above 0, a day (86400) at most")
]
SecondsOrZero = Annotated[float, Meta(ge=0, title="a number of seconds, such as 5.0")]
GuildId = Annotated[
    str, Meta(pattern=r"^[0-9]{1,20}$", title='a guild id in quotes, such as "123456789012345678"')
]
Role = Literal["USER", "ADMIN", "MODERATOR", "BANNED"]
Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "ES256"]
Rate = Annotated[
    str,
    Meta(
        pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour|day)$",
        title='a rate in quotes, such as "60/minute" (second, minute, hour or day)',
    ),
]
Transport = Literal["websocket", "polling"]


ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://((\*\.)?[a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")


def plain_origin(text: str) -> str:
    """An origin as browsers write it (RFC 6454 §6): small letters, IDN encoded, no default port.

    Raises ValueError with what to write instead. `*`, `null`, `https://*.host` (any below) and
    `http://host:*` (any port) are origins too.
    """
    small = text.strip().lower()
    if small in ("*", "null"):
        return small
    if "://" not in small:
        raise ValueError(f'expected a scheme: "http://{small}" or "https://{small}"')
    any_port = ":*" if small.endswith(":*") else ""
    try:
        origin = str(yarl.URL(small.removesuffix(":*")).origin())
    except ValueError as error:
        raise ValueError(f'expected "scheme://host" or "scheme://host:port": {error}') from error
    if not ORIGIN.fullmatch(origin):
        raise ValueError('expected "scheme://host", with * only as "*.host" or alone')
    if re.search(r":[0-9]*:\*$", small):
        any_of_it = re.sub(r":[0-9]+$", "", origin) + ":*"
        raise ValueError(f'expected one port or any: "{origin}" or "{any_of_it}"')
    if not set("/?#@").isdisjoint(small.partition("://")[2]):
        raise ValueError(f'expected it without what is not host and port: "{origin}"')
    return origin + any_port


def known_network(text: str) -> str:
    """An address or a network; raises ValueError for what is none."""
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(
            f'expected an address or network, such as "127.0.0.1" or "10.0.0.0/8": {error}'
        ) from error
    return text


def known_host(text: str) -> str:
    """A name or an address; raises ValueError for more than that."""
    plain = re.sub(r"^\w+://|\[|\].*|[/?#].*|\s", "", text)
    if plain.count(":") == 1:
        plain = plain.partition(":")[0]
    if plain != text:
        raise ValueError(f'expected a name or an address alone, such as "{plain or "localhost"}"')
    try:
        text.encode("idna")  # as it is when it is looked up
    except UnicodeError as error:
        raise ValueError(f"expected a name or an address: {error.__cause__ or error}") from error
    return text


def known_permission(name: str) -> str:
    """A permission as Discord calls it; raises ValueError with the nearest one."""
    known = [str(permission.name) for permission in hikari.Permissions]
    if name in known:
        return name
    [close] = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)
    raise ValueError(f'expected a Discord permission in capitals, such as "{close}"')


#: How a text, or each of a list, is read, where the type does not say all of it.
READ_EACH: Final[dict[str, Callable[[str], str]]] = {
    "server.host": known_host,
    "server.cors_origins": plain_origin,
    "server.trusted_proxies": known_network,
    "server.metrics_from": known_network,
    "auth.viewer_permissions": known_permission,
}


class Section(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One table of config.toml; above each key stands what config.toml and docs/settings.md say of it."""


class ServerSettings(Section, frozen=True):
    #: Address to listen on; "localhost" is both of 127.0.0.1 and ::1.
    host: str = "localhost"
    #: Port to listen on; 0 picks a free one.
    port: Port = 3001
    #: Pages that may connect from another origin; "*" is any.
    cors_origins: tuple[str, ...] = ("http://localhost:5173", "http://127.0.0.1:5173")
    #: Addresses or networks that may set X-Forwarded-For.
    trusted_proxies: tuple[str, ...] = ("127.0.0.1", "::1")
    #: Engine.IO transports offered.
    transports: Annotated[tuple[Transport, ...], Meta(min_length=1)] = ("websocket", "polling")
    #: Largest message a client may send.
    max_message_bytes: Positive = 16_384
    #: Unsent bytes a client may pile up before it is cut off.
    max_queue_bytes: Positive = 1_048_576
    #: Seconds that a stop may take.
    shutdown_grace: Seconds = 5.0
    #: Addresses or networks besides this host that may read /metrics.
    metrics_from: tuple[str, ...] = ()


class HeartbeatSettings(Section, frozen=True):
    #: Seconds between two pings to a client.
    interval: HeartbeatSeconds = 25.0
    #: Seconds a client has to answer a ping.
    timeout: HeartbeatSeconds = 60.0


class AuthSettings(Section, frozen=True):
    #: Key that signs the viewers' tokens; a list rotates keys, newest first.
    secret: str | tuple[str, ...] = ""
    #: File that holds the key instead, one a line.
    secret_file: str = ""
    #: PEM file of the public key for RS256 or ES256.
    public_key_file: str = ""
    #: JWT algorithms accepted.
    algorithms: Annotated[tuple[Algorithm, ...], Meta(min_length=1)] = ("HS256",)
    #: Token roles that may view every watched guild.
    admin_roles: tuple[Role, ...] = ("ADMIN",)
    #: Discord permissions of which others need one in the guild.
    viewer_permissions: tuple[str, ...] = ("MANAGE_GUILD",)
    #: Channel events reach only viewers who may see the channel.
    channel_visibility: bool = True
    #: Seconds a connection may stay open without a valid token.
    connect_timeout: Seconds = 10.0


class DiscordSettings(Section, frozen=True):
    #: The bot's token.
    token: str = ""
    #: File that holds the token instead.
    token_file: str = ""
    #: Watch only these; empty: every guild the bot is in.
    guilds: tuple[GuildId, ...] = ()
    #: Where Discord's REST API answers.
    rest_url: Annotated[
        str,
        Meta(
            pattern=r"^https?://[^/]",
            title='a URL in quotes, such as "https://discord.com/api/v10"',
        ),
    ] = "https://discord.com/api/v10"
    #: Seconds after a new gateway session without alerts and role changes.
    startup_grace: SecondsOrZero = 5.0


class LimitsSettings(Section, frozen=True):
    #: Open connections of one address, on all nodes together; IPv6 counts by /64.
    connections_per_ip: Positive = 50
    #: Open connections of one viewer, on all nodes together.
    connections_per_viewer: Positive = 20
    #: Connections without a valid token yet, all together.
    unauthenticated: Positive = 1_000
    #: Connections that one address may begin.
    attempts_per_ip: Rate = "60/minute"
    #: Refused attempts in a row before the address is blocked.
    block_after: Positive = 5
    #: Seconds that a block lasts.
    block_for: Seconds = 600.0
    #: Events that one client may send.
    events_per_connection: Rate = "20/second"
    #: Rooms that one client may be in.
    rooms_per_connection: Positive = 200


class FanoutSettings(Section, frozen=True):
    #: Longest seconds a burst may be held to share a write.
    max_delay: SecondsOrZero = 0.05


class RecoverySettings(Section, frozen=True):
    #: Seconds of missed events that a client which comes back gets; 0: none.
    window: SecondsOrZero = 120.0
    #: Missed events of one guild beyond which a client starts anew.
    max_events: Positive = 1_000


class RedisSettings(Section, frozen=True):
    #: Redis that several servers share; empty: one process, all in memory.
    url: Annotated[
        str,
        Meta(
            pattern=r"^(|(rediss?|unix|redis\+sentinel)://.+)$",
            title='a URL in quotes, such as "redis://127.0.0.1:6379"',
        ),
    ] = ""
    #: File that holds Redis' password.
    password_file: str = ""


class StorageSettings(Section, frozen=True):
    #: SQLite file of counts, relative to the settings file.
    path: Annotated[str, Meta(min_length=1)] = "spywatcher.db"


#: The folder of an operator's own plugins. Its name also stands for the plugins shipped with
#: the server, so that those are there wherever the settings are.
OWN_PLUGINS: Final = "plugins"


class PluginsSettings(Section, frozen=True):
    #: Where plugins are, relative to the settings file; "plugins" brings the shipped ones too.
    folders: tuple[str, ...] = (OWN_PLUGINS,)
    #: Plugins not to load, by name.
    disabled: tuple[str, ...] = ()
    #: Reload a plugin when its file changes.
    watch: bool = True
    #: Seconds that an async function of a plugin may take.
    handler_timeout: Seconds = 5.0


class LogSettings(Section, frozen=True):
    #: Least level logged.
    level: Literal["debug", "info", "warning", "error"] = "info"
    #: Form of a log line.
    format: Literal["text", "json"] = "text"


#: Seconds between two broadcasts of one event to one guild; what a file adds is added to it.
THROTTLE: Final = {"analytics:update": 30.0, "history:update": 60.0}


class Settings(Section, frozen=True):
    """All of config.toml. `folder` is where it lay: relative paths start there; `source` says which
    file was read.
    """

    server: ServerSettings = ServerSettings()
    heartbeat: HeartbeatSettings = HeartbeatSettings()
    auth: AuthSettings = AuthSettings()
    discord: DiscordSettings = DiscordSettings()
    limits: LimitsSettings = LimitsSettings()
    #: Seconds between two broadcasts of this event to one guild; any event may have a row.
    throttle: dict[str, Seconds] = msgspec.field(default_factory=THROTTLE.copy)
    fanout: FanoutSettings = FanoutSettings()
    recovery: RecoverySettings = RecoverySettings()
    redis: RedisSettings = RedisSettings()
    storage: StorageSettings = StorageSettings()
    plugins: PluginsSettings = PluginsSettings()
    plugin: dict[str, dict[str, Any]] = {}
    log: LogSettings = LogSettings()
    folder: Path = Path()
    source: str = "the defaults"


class SettingsError(OperatorError):
    """Settings are wrong. `sound` has those that are not, so that what else is wrong is found."""

    def __init__(self, *faults: str, sound: Settings) -> None:
        super().__init__(*faults)
        self.sound = sound


SECRET_KEYS: Final = frozenset({"secret", "token", "client_secret"})
SectionT = TypeVar("SectionT", bound=msgspec.Struct)


def check_table(table: object, to: type[SectionT], path: str, faults: list[str]) -> SectionT:
    """Turn one TOML table into a section; every fault is appended to `faults` with its key path."""
    fields = {field.name: field.type for field in msgspec.structs.fields(to)}
    values = {}
    for key, value in as_table(table, path, faults).items():
        if key in fields:
            values[key] = read_value(value, fields[key], f"{path}.{key}", faults)
        else:
            faults.append(f"{path}.{key}: unknown key{nearest(key, fields)}")
    try:
        return to(**{key: value for key, value in values.items() if value is not msgspec.UNSET})
    except ValueError as error:  # what the section itself says of values that do not fit together
        faults += [f"{path}.{fault}" for fault in error.args] or [f"{path}: does not fit together"]
        return to()


def as_table(value: object, path: str, faults: list[str]) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    came = shown(value) if isinstance(value, int | float) else "something else"  # or a secret
    faults.append(f"{path}: got {came}, expected a table")
    return {}


def read_value(value: object, kind: Any, path: str, faults: list[str]) -> Any:
    """What a setting of this type is; UNSET, and one more fault, where the value is wrong."""
    try:
        read = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        key = path.rpartition(".")[2]
        came = "a value not shown here" if is_secret(key, value) else shown(without_login(value))
        wanted = expected(kind)
        why = f"expected {wanted}" if wanted else str(error)[:1].lower() + str(error)[1:]
        faults.append(f"{path}: got {came}, {why}")
        return msgspec.UNSET
    if path not in READ_EACH:
        return read
    texts = (read,) if isinstance(read, str) else read
    sound = []
    for text in texts:
        try:
            sound.append(READ_EACH[path](text))
        except ValueError as error:
            faults.append(f"{path}: got {shown(text)}, {error}")
    return read if isinstance(read, str) else tuple(sound)


def is_secret(key: str, value: object) -> bool:
    """Whether a value of this key, or a URL deep in some other value, is not to be shown."""
    return key in SECRET_KEYS or (not isinstance(value, str) and "://" in shown(value))


PLAIN_WORDS: Final[dict[Any, str]] = {
    bool: "true or false",
    str: "a text in quotes",
    int: "a whole number",
    float: "a number",
}
#: What a list in TOML, or in a plugin, may be for.
COLLECTIONS: Final = (set, frozenset, list, tuple)
BOUNDS: Final = {
    "gt": "above {:g}",
    "ge": "from {:g}",
    "lt": "below {:g}",
    "le": "up to {:g}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


def expected(kind: Any) -> str:
    """What a setting of this type takes, in words; empty where there are none."""
    if get_origin(kind) is Annotated:
        metas = [meta for meta in kind.__metadata__ if isinstance(meta, Meta)]
        titles = [meta.title for meta in metas if meta.title]
        bounds = [
            words.format(bound)
            for meta in metas
            for name, words in BOUNDS.items()
            if (bound := getattr(meta, name)) is not None
        ]
        return titles[0] if titles else " ".join([expected(get_args(kind)[0]), *bounds]).strip()
    if get_origin(kind) is Literal:
        return f"one of {', '.join(shown(choice) for choice in get_args(kind))}"
    if isinstance(kind, enum.EnumType):
        choices: Iterable[enum.Enum] = kind
        return f"one of {', '.join(shown(choice.value) for choice in choices)}"
    if get_origin(kind) is dict:
        return "a table"
    if get_origin(kind) in COLLECTIONS:
        each = expected(get_args(kind)[0])
        return f"a list in [ ] of each {each}" if each else "a list in [ ]"
    if get_args(kind):
        return " or ".join(filter(None, map(expected, get_args(kind))))
    return PLAIN_WORDS.get(kind, "")


def nearest(key: str, known: Iterable[str]) -> str:
    """The rest of a sentence that tells what `key` should have been."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0)
    return f", did you mean {close[0]}?" if close else ""


def shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


HOST_AND_PORT: Final = re.compile(r"((\[[^\]]*\]|[^:\[\]]+)(:\d{0,5})?)?")


def without_login(value: object) -> object:
    """A URL as it may be shown: not whom it lets in, by which password; anything else as it is."""
    if not isinstance(value, str) or ("://" not in value and "@" not in value):
        return value
    head, at, place = value.rpartition("@")
    place, more, _ = place.partition("?")
    scheme, slashes, hosts = (head if at else place).partition("://")
    if at:
        place = f"{scheme if slashes else ''}{slashes}***@{place}"
    elif not all(HOST_AND_PORT.fullmatch(host) for host in hosts.partition("/")[0].split(",")):
        place = f"{scheme}://***"  # a login whose host was forgotten
    return place + (more and "?***")


def parse_settings(
    tables: dict[str, Any], folder: Path, source: str = Settings().source
) -> Settings:
    """Check all tables at once; raises SettingsError with one line per fault."""
    faults: list[str] = []
    sections: dict[str, Any] = {"folder": folder, "source": source}
    types = section_types()
    for name, table in tables.items():
        if name == "plugin":
            sections["plugin"] = check_plugin_tables(table, folder, faults)
        elif name == "throttle":
            sections["throttle"] = check_throttle_table(table, faults)
        elif name in types:
            sections[name] = check_table(table, types[name], name, faults)
        elif isinstance(table, dict):
            faults.append(f"{name}: unknown table{nearest(name, [*types, 'plugin', 'throttle'])}")
        else:
            owners = [f"[{one}]" for one, kind in types.items() if name in kind.__struct_fields__]
            faults.append(
                f"{name}: expected below a table: {' or '.join(owners) or '[server], say'}"
            )
    settings = Settings(**sections)
    if faults:
        raise SettingsError(*faults, sound=settings)
    return settings


def section_types() -> dict[str, type[Section]]:
    return {
        field.name: field.type
        for field in msgspec.structs.fields(Settings)
        if isinstance(field.type, type) and issubclass(field.type, Section)
    }


def check_plugin_tables(
    table: object, folder: Path, faults: list[str]
) -> dict[str, dict[str, Any]]:
    """`[plugin.NAME]` is checked by the plugin itself; here only that each is a table.

    What a key that ends with `_file` names is relative to the settings file: the path is made whole.
    """
    return {
        name: {
            key: str(folder / entry) if is_file(key, entry) else entry
            for key, entry in as_table(entries, f"plugin.{name}", faults).items()
        }
        for name, entries in as_table(table, "plugin", faults).items()
    }


def is_file(key: str, value: object) -> bool:
    return key.endswith("_file") and isinstance(value, str) and value != ""


def check_throttle_table(table: object, faults: list[str]) -> dict[str, float]:
    """`[throttle]`: any event's name and its seconds; the defaults stay where nothing is said."""
    return THROTTLE | {
        event: read_value(seconds, Seconds, f'throttle."{event}"', faults)
        for event, seconds in as_table(table, "throttle", faults).items()
    }


def changed_keys(old: Settings, new: Settings) -> list[str]:
    """The key paths whose values differ; of a plugin's settings, only its table."""
    tables = [("plugin", old.plugin, new.plugin)]
    for name in section_types():
        before, after = getattr(old, name), getattr(new, name)
        tables.append((name, msgspec.structs.asdict(before), msgspec.structs.asdict(after)))
    return [
        f"{name}.{key}"
        for name, before, after in tables
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def shipped_plugins() -> Path | None:
    """The plugins that came with this file: beside a plain copy of it, or as it was installed."""
    here = Path(__file__).resolve().parent
    places = [here / OWN_PLUGINS, here / "spywatcher_plugins"]
    return next((place for place in places if place.is_dir()), None)


def read_settings(path: Path | None) -> Settings:
    """Read `path`, or the first config.toml found as the command line promises, or the defaults.

    Raises OperatorError with a line for each fault.
    """
    if path is None:
        here = [Path("config.toml"), Path(__file__).parent / "config.toml"]
        path = next((place for place in here if place.is_file()), None)
        if path is None:
            plain = (Path(__file__).parent / OWN_PLUGINS).is_dir()
            folders = " or ".join(dict.fromkeys(str(place.resolve().parent) for place in here))
            return Settings(
                folder=Path(__file__).resolve().parent if plain else Path.cwd(),
                source=f"no config.toml in {folders}",
            )
    try:
        return parse_settings(read_toml(path), path.resolve().parent, str(path))
    except OperatorError as error:
        error.faults = tuple(f"{path}: {fault}" for fault in error.faults)
        raise


#: Tables in tables: settings need four.
DEEPEST: Final = 32


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file; raises OperatorError for what is no TOML, or nested without sense."""
    text = read_text(path)
    try:
        tables = tomllib.loads(text)
        if depth(tables) > DEEPEST:
            raise RecursionError
    except tomllib.TOMLDecodeError as error:
        advice = syntax_advice(text, str(error))
        raise OperatorError(f"not TOML: {error}{advice and f': {advice}'}") from error
    except RecursionError as error:
        raise OperatorError(f"nested more than {DEEPEST} levels deep") from error
    return tables


def depth(value: object) -> int:
    """How many tables and lists lie in each other."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


#: What is wrong with a line that is no TOML: how it looks, and what to write instead.
SYNTAX_ADVICE: Final = (
    (r"[\u2018-\u201f\u00ab\u00bb]", 'write straight quotes: "'),
    (r"=\s*['\"]?\s*$", "write a value after ="),
    (r"=.*\\", "write / instead of \\, or single quotes around the text"),
    (r"=\s*(True|False|TRUE|FALSE)\b", "write true or false, in small letters"),
    (r"=\s*(yes|no|on|off|Yes|No|On|Off)\b", "write true or false"),
    (r"=\s*(None|null|nil)\b", "leave the line out"),
    (r"=\s*\d[\d.]*\s*[A-Za-z]+", "write a number without unit, or a text in quotes"),
    (r"=\s*0\d", "write quotes around a text, no zeros before a number"),
    (r"['\"]\s+['\"]", "write a comma between two texts"),
    (r"=\s*['\"][^'\"]*$", "write a quote at the end of the text"),
    (r"=\s*[^\s\d'\"\[{+-].*", 'write quotes around a text: "..."'),
    (r",\s*}", "write no comma before }"),
    (r"^\s*\[[^\]=]*$", "write ] after the name of a table"),
    (r"^\s*[\w.-]+:[\w.-]+\s*=", 'write quotes around a key with a colon: "a:b" = ...'),
    (r"^\s*['\"]?[\w.-]+['\"]?\s*:", "write = between a key and its value"),
    (r"^\s*[\w.-]+\s+[^=\s]", "write = between a key and its value"),
    (r"^[^=\[]*$", "write = between a key and its value"),
)


def syntax_advice(text: str, error: str) -> str:
    """What to write instead; of the line itself nothing is shown, since it may hold a secret."""
    if "Cannot declare" in error:
        return "this table is there twice, put all its keys under one"
    if "Cannot overwrite" in error:
        return "this key is there twice, leave one out"
    found = re.search(r"at line (\d+)", error)
    lines = text.splitlines()
    line = lines[min(int(found[1]), len(lines)) - 1] if found and lines else ""
    return next((advice for looks, advice in SYNTAX_ADVICE if re.search(looks, line)), "")


def storage_of(settings: Settings) -> Path:
    """The SQLite file of counts."""
    return settings.folder / settings.storage.path


#: More than any file of settings, keys or secrets has.
MOST_FILE_BYTES: Final = 1_048_576


def read_text(path: Path) -> str:
    """A text file as any editor may have left it: BOM and CRLF are gone, and UTF-16 is read too.

    Raises OperatorError without showing what is in it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        raise OperatorError(f"cannot be read: {error.strerror}") from error
    if len(data) > MOST_FILE_BYTES:
        raise OperatorError(f"cannot be read: it has more than {MOST_FILE_BYTES} bytes")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise OperatorError(f"cannot be read: no UTF-8 at byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_file(name: str, folder: Path, key: str) -> str:
    """What a file named by a setting holds; raises OperatorError without showing it."""
    try:
        return read_text(folder / name).strip()
    except OperatorError as error:
        raise OperatorError(f"{key}: {name} {error}") from error


def read_secret(value: str, file: str, folder: Path, key: str) -> str:
    """The secret itself, or what its file holds. Empty if neither is set."""
    if value and file:
        raise OperatorError(f"{key}: set, and {key}_file too; expected one of them")
    text = read_file(file, folder, f"{key}_file") if file else value
    if file and not text:
        raise OperatorError(f"{key}_file: {file} is empty")
    return text


# ------------------------------------------------------------------------------ metrics
# What is counted, for Prometheus. Each part is handed its server's one `Metrics` and counts on
# it where something happens; what only has to be read is read when a scrape asks. Counting
# knows no part: names and labels are all that is here. A label's values come from this code
# or from plugins, never from a client or from Discord, so that they stay few.


class Tally:
    """A counter with one label, where prometheus_client's costs too much: `tally.counts[name] += 1`."""

    def __init__(self, name: str, meaning: str, label: str) -> None:
        self.counts: dict[str, float] = collections.defaultdict(float)
        self._about = f"spywatcher_{name}", meaning, [label]

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What prometheus_client asks for at a scrape."""
        name, meaning, labels = self._about
        family = CounterMetricFamily(name, meaning, labels=labels)
        for label, amount in tuple(self.counts.items()):
            family.add_metric([label], amount)
        yield family


class Metrics:
    """All figures of one server: `metrics.refused.labels("banned").inc()`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        count = self._counter
        self.refused = count("refused_connections", "Connections refused.", "reason")
        self.blocked = count("blocked_addresses", "Times that an address was blocked.")
        self.refused_requests = count("refused_requests", "Clients' requests refused.", "reason")
        self.cut = count("cut_connections", "Connections that the server broke off.", "reason")
        self.received = Tally("received_events", "Discord's events handed to plugins.", "event")
        self.sent = Tally("sent_events", "Events that went to a room with listeners.", "event")
        self.dropped = count("dropped_events", "Events that went to nobody.", "reason")
        self.throttled = count("throttled_events", "Events held back to be merged.", "event")
        self.deliveries = count("deliveries", "Events written to a client, each client counted.")
        self.recovered = count("recovered_clients", "Clients that missed nothing while away.")
        self.not_recovered = count(
            "not_recovered_clients", "Clients that came back too late or wrongly.", "reason"
        )
        self.plugin_failures = count("plugin_failures", "Faults of plugins.", "plugin")
        self.plugin_pauses = count("plugin_pauses", "Functions paused for failing.", "plugin")
        self.plugin_seconds = Tally("plugin_seconds", "Time spent in plugins.", "plugin")
        self.plugin_counts = count("plugin_counts", "What plugins count.", "plugin", "what")
        self.gateway_changes = count("gateway_changes", "Turns of the link to Discord.", "change")
        self.gateway_failures = count("gateway_failures", "Tries that failed.", "cause")
        for tally in (self.received, self.sent, self.plugin_seconds):
            self.registry.register(tally)
        self.unreadable_packets = count("unreadable_packets", "Packets left out.", "event")

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, namespace="spywatcher", registry=self.registry)

    def gauge(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """A figure of now; `read` is called at each scrape. Names end in the unit, if there is one."""
        Gauge(name, meaning, namespace="spywatcher", registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """All figures in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)


# -------------------------------------------------------------------------------- names
# What people, channels, roles and guilds are called: shown as Discord shows it, and nothing unseen.
# It knows Unicode, by the package `regex`, and nothing of where a name comes from.

#: Longest names in characters: of accounts twice what Discord allows today; of channels, threads,
#: roles and guilds Discord's own limit.
USERNAME_LENGTH: Final = 64
NAME_LENGTH: Final = 100

#: What shows nothing: controls, halves of surrogate pairs, line separators, annotation marks, and
#: what Unicode lets be ignored (zero-width, bidi and filler characters, selectors, tags).
INVISIBLE: Final = r"[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\ufff9-\ufffb\p{Default_Ignorable_Code_Point}]"
#: Scripts in which a joiner or non-joiner changes what is read: Arabic to Mandaic and N'Ko, those of
#: India and its neighbours, Mongolian, Adlam, Rohingya.
JOINING: Final = (
    "\u0620-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1a20-\u1cff\ua840-\uabff\ufb50-\ufdff"
    "\ufe70-\ufefc\U00010a00-\U00010fff\U00011000-\U00011fff\U0001e900-\U0001e95f"
)
#: What of the invisible stays, since what is beside it shows otherwise without it: the tags of a
#: region's flag (UTS #51), what joins emoji, what chooses text or picture, the variants of symbols
#: and letters (Unicode Standard §23.4), and joiners beside letters that join.
NEEDED: Final = (
    r"🏴[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f"
    r"|(?<=[\p{ExtPict}\p{Emoji_Modifier}\ufe0f\u20e3])\u200d(?=\p{ExtPict})"
    r"|(?<=[\p{Emoji}\p{ExtPict}])[\ufe0e\ufe0f]"
    r"|(?<=[0\u2100-\u2bff\p{Han}\p{Myanmar}\p{Phags_Pa}\u3001\u3002\uff01-\uff1f])[\ufe00-\ufe0d]"
    r"|(?<=\p{Han})[\U000e0100-\U000e01ef]"
    r"|(?<=[\u1807\u1820-\u18aa])[\u180b-\u180f]"
    rf"|(?<=[{JOINING}])[\u200c\u200d]|[\u200c\u200d](?=[{JOINING}])"
)
UNSEEN: Final = regex.compile(f"({NEEDED})|{INVISIBLE}")
#: An empty cell of Braille is as wide as a letter and as blank as a space.
BLANK: Final = regex.compile(rf"(?:{INVISIBLE}|[\s\u2800])*")
#: What is read as one character (UAX #29).
CHARACTER: Final = regex.compile(r"\X")


def clean_text(text: str) -> str:
    """`text` without what is invisible, but for what emoji or a script need to look as they do."""
    if text.isascii() and text.isprintable():
        return text
    return UNSEEN.sub(lambda found: found[1] or "", text)


@functools.lru_cache(maxsize=8192)
def shown_name(name: str | None, own_id: int, longest: int) -> str:
    """A name as it may leave; the id where nothing of it can be seen."""
    text = clean_text(name or "")
    return str(int(own_id)) if BLANK.fullmatch(text) else shortened(text.strip(), longest)


def shortened(text: str, longest: int) -> str:
    """At most so many code points of `text`, with no picture or letter cut in two."""
    if len(text) > longest:
        starts = [found.start() for found in CHARACTER.finditer(text[: longest + 1])]
        text = text[: starts[-1] or longest]
    return text.strip()


# ------------------------------------------------------------------ identity and access
# Who is there (a signed token) and what they may see (Discord's permissions, by hikari's
# cache). The only place that decides either. It knows no sockets and no rooms.

#: Room for some 270 guild ids; nothing longer is worth the work of checking it.
MAX_TOKEN_BYTES: Final = 8192
#: Seconds by which the clock of who made a token may be ahead of ours.
CLOCK_DIFFERENCE: Final = 10.0
#: What web applications put into their tokens for others is not looked at; `nbf` is, in `Tokens`.
JWT_CHECKS: Final = jwt.types.Options(
    verify_aud=False,
    verify_iat=False,
    verify_iss=False,
    verify_jti=False,
    verify_nbf=False,
    verify_sub=False,
)
#: Seconds since 1970, up to the year 9999: a page's milliseconds are not taken.
Moment = Annotated[float, Meta(gt=0, le=253_402_300_799)]
#: A key no shorter than the hash it makes (RFC 7518 §3.2).
LEAST_SECRET_BYTES: Final = {"HS256": 32, "HS384": 48, "HS512": 64}
#: Permissions are plain ints here: combining hikari's flags costs ten times as much.
VIEW_CHANNEL: Final = int(hikari.Permissions.VIEW_CHANNEL)
CONNECT: Final = int(hikari.Permissions.CONNECT)
MANAGE_THREADS: Final = int(hikari.Permissions.MANAGE_THREADS)
ADMINISTRATOR: Final = int(hikari.Permissions.ADMINISTRATOR)
ALL_PERMISSIONS: Final = int(hikari.Permissions.all_permissions())
#: What a time-out leaves (Discord documentation: Permissions), and what it does not end for who
#: only reads: a voice channel's text.
LEFT_IN_TIMEOUT: Final = VIEW_CHANNEL | CONNECT | int(hikari.Permissions.READ_MESSAGE_HISTORY)
VOICE_TYPES: Final = (hikari.ChannelType.GUILD_VOICE, hikari.ChannelType.GUILD_STAGE)


class Viewer(msgspec.Struct, frozen=True, rename={"discord_id": "discordId", "expires": "exp"}):
    """Who a dashboard belongs to: the claims of its token (API page, Authentication)."""

    discord_id: Annotated[str, Meta(min_length=1)]
    role: Role
    guilds: frozenset[str] | None = None
    expires: Moment | None = None


class Keys(msgspec.Struct, frozen=True):
    """What tokens are checked with: secrets for HS*, newest first; a public key for RS*, ES*."""

    secrets: tuple[str, ...] = ()
    public: str = ""

    def of(self, algorithm: str) -> tuple[str, ...]:
        """Never a public key for HS*: its bytes are known to all (RFC 8725 §2.1)."""
        if algorithm.startswith("HS"):
            return self.secrets
        return (self.public,) if self.public else ()


def read_keys(auth: AuthSettings, folder: Path) -> Keys:
    """The keys that the settings name; raises OperatorError for one that is missing or too short."""
    listed = auth.secret if isinstance(auth.secret, tuple) else (auth.secret,)
    text = read_secret("\n".join(listed), auth.secret_file, folder, "auth.secret")
    lines = text.splitlines()
    if auth.secret_file:  # in which an editor may have left blanks and empty lines
        lines = list(filter(None, map(str.strip, lines)))
    file = auth.public_key_file
    keys = Keys(
        secrets=tuple(lines),
        public=read_file(file, folder, "auth.public_key_file") if file else "",
    )
    key = "auth.secret_file" if auth.secret_file else "auth.secret"
    faults = [fault for one in auth.algorithms for fault in key_faults(one, keys, key)]
    if faults:
        raise OperatorError(*faults)
    return keys


def key_faults(algorithm: str, keys: Keys, secret: str) -> Iterator[str]:
    """What is wrong with the keys that tokens of this algorithm would be checked with; `secret` is the
    setting that holds those for HS*.
    """
    least = LEAST_SECRET_BYTES.get(algorithm, 0)
    if not least and not keys.public:
        yield f"auth.public_key_file: not set, expected the key for {algorithm}"
    for key in keys.of(algorithm):
        size = len(key.encode())
        if size < least:
            yield f"{secret}: got {size} bytes, expected {least} or more for {algorithm}"
        elif not is_key_for(algorithm, key):
            name = secret if least else "auth.public_key_file"
            yield f"{name}: got a key that is none for {algorithm}"


def is_key_for(algorithm: str, key: str) -> bool:
    """Whether tokens can be checked with this key; raises OperatorError without `cryptography`."""
    try:
        jwt.get_algorithm_by_name(algorithm).prepare_key(key)
    except NotImplementedError as error:
        raise OperatorError(
            f"auth.algorithms: {algorithm} needs the extra spywatcher[crypto]"
        ) from error
    except (jwt.InvalidKeyError, ValueError, TypeError):
        return False
    return True


class Tokens:
    """Checks and makes the viewers' tokens (JWT, RFC 7519; RFC 8725 for what to refuse)."""

    def __init__(self, keys: Keys, algorithms: Sequence[str]) -> None:
        self.reconfigure(keys, algorithms)

    def reconfigure(self, keys: Keys, algorithms: Sequence[str]) -> None:
        """Check by these from now on; who is connected stays so until its token ends."""
        self._keys = keys
        self._algorithms = tuple(algorithms)

    def verify(self, token: object) -> Viewer:
        """The viewer a token stands for; raises RefusedConnectionError with the published message."""
        if token is None or token == "":
            raise RefusedConnectionError("Authentication required")
        viewer = self._viewer(self._claims(token))
        if viewer.role == "BANNED":
            raise RefusedConnectionError("Access denied")
        return viewer

    def _claims(self, token: object) -> dict[str, Any]:
        """What a token says; only one that is well signed can be refused as `expired`."""
        if not isinstance(token, str) or len(token) > MAX_TOKEN_BYTES:
            raise RefusedConnectionError("Invalid token", code="malformed")
        try:
            return self._decode(token)
        except jwt.ExpiredSignatureError:
            code = "expired"
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
            code = "signature"
        except (jwt.DecodeError, UnicodeError):
            code = "malformed"
        except (jwt.InvalidTokenError, TypeError, ValueError, OverflowError, RecursionError):
            code = "claims"
        raise RefusedConnectionError("Invalid token", code=code)

    def _decode(self, token: str) -> dict[str, Any]:
        for algorithm in self._algorithms:
            for key in self._keys.of(algorithm):
                with contextlib.suppress(jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
                    return jwt.decode(token, key, algorithms=[algorithm], options=JWT_CHECKS)
        raise jwt.InvalidSignatureError

    @staticmethod
    def _viewer(claims: dict[str, Any]) -> Viewer:
        try:
            viewer = msgspec.convert(claims, Viewer)
            begins = msgspec.convert(claims.get("nbf"), float | None) or 0.0
            msgspec.json.encode(viewer)  # half of a surrogate pair could be sent to nobody
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            raise RefusedConnectionError("Invalid token", code="claims") from error
        if claims.get("access") is True and begins <= time.time() + CLOCK_DIFFERENCE:
            return viewer
        raise RefusedConnectionError("Invalid token", code="claims")

    def issue(
        self, discord_id: str, role: str = "USER", guilds: Sequence[str] = (), ttl: float = 900.0
    ) -> str:
        """A token that `verify` takes for `ttl` seconds, if the role is not BANNED.

        Raises OperatorError without a secret, and for what `verify` would not take.
        """
        if not self.can_issue:
            raise OperatorError("auth.secret: not set, expected the key that signs tokens")
        algorithm = next(name for name in self._algorithms if name.startswith("HS"))
        claims: dict[str, Any] = {
            "discordId": discord_id,
            "access": True,
            "role": role,
            "exp": int(time.time() + ttl),
        }
        if guilds:
            claims["guilds"] = list(guilds)
        token = jwt.encode(claims, self._keys.secrets[0], algorithm=algorithm)
        if len(token) > MAX_TOKEN_BYTES:
            raise OperatorError(
                f"token: got {len(token)} bytes with {len(guilds)} guilds, expected"
                f" {MAX_TOKEN_BYTES} at most; name fewer guilds, or use a role of auth.admin_roles"
            )
        try:
            self._viewer(self._claims(token))
        except RefusedConnectionError as refusal:
            raise OperatorError(f"token: nobody would take it: {refusal.data['code']}") from refusal
        return token

    @property
    def can_issue(self) -> bool:
        """Whether there is a secret, and an algorithm that uses it."""
        return bool(self._keys.secrets) and any(name.startswith("HS") for name in self._algorithms)

    def derive_key(self, purpose: str) -> bytes:
        """32 bytes that only who has the newest secret can know (HMAC-SHA256); raises OperatorError
        without one. What tokens are signed with begins with "ey": this is never one of them.
        """
        if not self._keys.secrets:
            raise OperatorError(
                "auth.secret: not set, expected the key that plugins' keys come from"
            )
        secret = self._keys.secrets[0].encode()
        return hmac.digest(secret, f"spywatcher:{purpose}".encode(), "sha256")


class Directory(Protocol):
    """What access is decided by; what it gives has the attributes of hikari's entities."""

    def guild_ids(self) -> Collection[int]: ...
    def guilds_of(self, user_id: int, /) -> Collection[int]: ...
    def get_guild(self, guild_id: int, /) -> Any: ...
    def get_member(self, guild_id: int, user_id: int, /) -> Any: ...
    def get_role(self, role_id: int, /) -> Any: ...
    def get_guild_channel(self, channel_id: int, /) -> Any: ...
    def get_thread(self, thread_id: int, /) -> Any: ...


class CacheReader:
    """hikari's cache, read without the copy that its public methods make of each entity.

    Rights are judged of every viewer at each change, and a copy costs more than the judgement.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def guild_ids(self) -> Collection[int]:
        entries = self._cache._guild_entries.freeze()
        return [guild_id for guild_id, record in entries.items() if record.guild is not None]

    def guilds_of(self, user_id: int) -> Collection[int]:
        """Those of which this user is a member."""
        entries = self._cache._guild_entries.freeze().items()
        return [
            one for one, record in entries if record.members and user_id in record.members._data
        ]

    def get_guild(self, guild_id: int) -> Any:
        record = self._cache._guild_entries.get(guild_id)
        return record and record.guild

    def get_member(self, guild_id: int, user_id: int) -> Any:
        record = self._cache._guild_entries.get(guild_id)
        cell = record.members.get(user_id) if record and record.members else None
        return cell and cell.object

    def get_user(self, guild_id: int, user_id: int) -> Any:
        """The account of a member."""
        member = self.get_member(guild_id, user_id)
        return member and member.user.object

    def get_role(self, role_id: int) -> Any:
        return self._cache._role_entries.get(role_id)

    def get_guild_channel(self, channel_id: int) -> Any:
        return self._cache._guild_channel_entries.get(channel_id)

    def get_thread(self, thread_id: int) -> Any:
        return self._cache._guild_thread_entries.get(thread_id)


class ShardRange(NamedTuple):
    """One shard's share of all guilds (Discord documentation: Gateway, Sharding)."""

    shard: int
    shards: int

    def has(self, guild_id: int) -> bool:
        return hikari.snowflakes.calculate_shard_id(self.shards, guild_id) == self.shard


class Cached(enum.Enum):
    """How much of a guild the cache holds, and so what an entry proves that is not there.

    Discord fills hikari's cache in steps, and anew with each gateway session. READY names the
    guilds of a shard; each of them comes with GUILD_CREATE; the members of a large one follow in
    chunks. Each step leads to one state, whatever the state was before:

        it is heard that                                  the guild is then
        the bot stops, or READY names it                  COMING
        READY does not, and the cache still has it        LOST
        GUILD_CREATE came, members follow                 MEMBERS_COMING
        GUILD_CREATE or the last chunk came, or it went   WHOLE

    A guild that was never heard of is COMING until READY of its shard came, then WHOLE: the bot is not
    in it.
    """

    COMING = "nothing is proved: what is there may be old, what is not there may still come"
    LOST = "the bot is not in it: hikari 2.7 keeps a guild that went while it was away"
    MEMBERS_COMING = "a member who is not there may still come, unless seen to leave meanwhile"
    WHOLE = "what is not there does not exist"


class Access:
    """Decides which guilds and channels a viewer may see, by hikari's cache as it is now.

    Where a missing entry proves nothing (`Cached`), `may_view` answers None instead of False.
    Whatever is on its way to a dashboard passes `may_have`.
    """

    def __init__(self, auth: AuthSettings, watched: Sequence[str], cache: Directory) -> None:
        self.reconfigure(auth)
        self._watched = frozenset(watched)
        self._cache = cache
        self._begun: set[ShardRange] = set()  # shards whose READY came
        self._states: dict[int, Cached] = {}  # of guilds that are not WHOLE
        #: By guild whose members are coming: the nonce with which they were asked for, and who has left.
        self.members_coming: dict[int, tuple[str, set[int]]] = {}

    def reconfigure(self, auth: AuthSettings) -> None:
        self._admin_roles = frozenset(auth.admin_roles)
        self._needed = ADMINISTRATOR
        for name in auth.viewer_permissions:
            self._needed |= int(hikari.Permissions[name])
        self._channel_visibility = auth.channel_visibility

    # -- how sure the cache is

    def begin(self, guild_ids: Iterable[int], shard_range: ShardRange) -> Collection[int]:
        """A new gateway session is about to send these guilds: all that the bot has of its shard.

        Returns those that the cache has and the bot has not.
        """
        coming = frozenset(guild_ids)
        lost = frozenset(filter(shard_range.has, self._cache.guild_ids())) - coming
        self._begun.add(shard_range)
        for guild_id in lost:
            self._set(guild_id, Cached.LOST)
        for guild_id in coming:
            self._set(guild_id, Cached.COMING)
        return lost

    def is_whole(self, guild_id: int) -> bool:
        """Whether the cache holds all of this guild, even if that is nothing."""
        return self._state(guild_id) is Cached.WHOLE

    @property
    def all_whole(self) -> bool:
        """Whether every shard has said which guilds it brings, and the cache holds all of each."""
        begun = any(len(self._begun) == one.shards for one in self._begun)
        filling = (Cached.COMING, Cached.MEMBERS_COMING)
        return begun and not any(state in filling for state in self._states.values())

    @property
    def complete(self) -> bool:
        """Whether it is known which guilds each viewer may see."""
        return self.all_whole

    def end(self) -> None:
        """The bot goes, and with it all that the cache holds."""
        self._begun.clear()
        self._states.clear()
        self.members_coming.clear()

    def expect_members(self, guild_id: int, nonce: str) -> None:
        """All of this guild is in the cache but its members, who are about to come."""
        self._set(guild_id, Cached.MEMBERS_COMING)
        self.members_coming[guild_id] = nonce, set()

    def fill(self, guild_id: int) -> None:
        """All of this guild is in the cache, or it is gone."""
        self._set(guild_id, Cached.WHOLE)

    def _set(self, guild_id: int, state: Cached) -> None:
        self.members_coming.pop(guild_id, None)
        self._states[guild_id] = state
        if state is Cached.WHOLE:
            del self._states[guild_id]

    def _state(self, guild_id: int) -> Cached:
        begun = any(one.has(guild_id) for one in self._begun)
        return self._states.get(guild_id, Cached.WHOLE) if begun else Cached.COMING

    def leave(self, guild_id: int, user_id: int) -> None:
        """This member has left, so it is not among those who are coming."""
        if guild_id in self.members_coming:
            self.members_coming[guild_id][1].add(user_id)

    def _is_sure(self, viewer: Viewer, guild_id: int) -> bool:
        """Whether what the cache does not have of the guild or the viewer in it is not there."""
        state = self._state(guild_id)
        if state is Cached.MEMBERS_COMING:
            _, gone = self.members_coming[guild_id]
            return self._member(viewer, guild_id) is not None or viewer.discord_id in map(str, gone)
        return state in (Cached.LOST, Cached.WHOLE)

    def may_have(self, viewer: Viewer, guild_id: str, channel_id: str = "") -> bool:
        """The judge of all ways out: whether who is in a room of the guild may have this now.

        Who is in stays in while it is not known whether that is right.

            what decides                       is heard by                   what is judged anew
            roles, channels, overwrites        CHANNEL_CHANGES               channels of the guild
            roles, owner, name of the guild    GUILD_CHANGES                 all in the guild
            roles and time-out of a member     MEMBER_CHANGES                that viewer in the guild
            the end of a time-out              the clock, at each judgement  channels of the guild
            guilds that come, go or are lost   the gateway's sessions        all in the guild
            the token                          `auth:refresh`                that viewer in its guilds
            settings, another gateway holder   `check_all`                   all
            who is in a room                   `Rooms.members`               channels of the room
        """
        if self.may_view(viewer, guild_id) is False:
            return False
        return not channel_id or self.may_see(viewer, guild_id, channel_id)

    # -- guilds

    def watches(self, guild_id: int | str) -> bool:
        """Whether events of this guild are for anyone at all."""
        return not self._watched or str(guild_id) in self._watched

    def may_view(self, viewer: Viewer, guild_id: str) -> bool | None:
        """Whether the bot watches this guild and the viewer may see it; None: not known yet."""
        if not self.watches(guild_id):
            return False
        number = int(guild_id)
        guild = self._cache.get_guild(number)
        is_there = guild is not None and self._states.get(number) is not Cached.LOST
        if is_there and self._may_view(viewer, guild):
            return True
        return False if self._is_sure(viewer, number) else None

    def _may_view(self, viewer: Viewer, guild: Any) -> bool:
        if viewer.role in self._admin_roles:
            return True
        if viewer.guilds is not None:
            return str(int(guild.id)) in viewer.guilds
        member = self._member(viewer, guild.id)
        if member is None:
            return False
        return bool(left_by_timeout(member, self._granted(viewer, guild, member)) & self._needed)

    def guilds_to_judge(self, viewer: Viewer) -> Collection[int]:
        """Of all others `may_view` is not true."""
        if viewer.role in self._admin_roles:
            return self._cache.guild_ids()
        if viewer.guilds is not None:
            return [int(guild_id) for guild_id in viewer.guilds if is_snowflake(guild_id)]
        is_user = is_snowflake(viewer.discord_id)
        return self._cache.guilds_of(int(viewer.discord_id)) if is_user else ()

    def summary(self, viewer: Viewer, guild_id: int) -> dict[str, str | None] | None:
        """What `guilds:list` says of a guild; None where this viewer may not see it."""
        if not self.may_view(viewer, str(int(guild_id))):
            return None
        guild = self._cache.get_guild(guild_id)
        name = shown_name(guild.name, guild_id, NAME_LENGTH)
        return {"id": str(int(guild_id)), "name": name, "icon": guild.icon_hash}

    def list_key(self, viewer: Viewer) -> object:
        """The same for viewers who may see the same guilds, whatever those are; of a viewer for whom
        membership decides, the Discord id.
        """
        if viewer.role in self._admin_roles:
            return None
        return viewer.discord_id if viewer.guilds is None else viewer.guilds

    def timed_out_until(self, viewer: Viewer, guild_ids: Iterable[int]) -> float:
        """When the first of the viewer's time-outs ends, in seconds since 1970; else `math.inf`."""
        if viewer.role in self._admin_roles:
            return math.inf
        ends = [timeout_end(self._member(viewer, guild_id)) for guild_id in guild_ids]
        return min((end for end in ends if end > time.time()), default=math.inf)

    # -- channels

    def may_see(self, viewer: Viewer, guild_id: str, channel_id: str) -> bool:
        """Whether a viewer of the guild may see this channel or thread in it."""
        if not self._channel_visibility or viewer.role in self._admin_roles:
            return True
        guild = self._cache.get_guild(int(guild_id))
        if guild is None:
            return False
        member = self._member(viewer, guild.id)
        if member is None:  # named by a `guilds` claim, but perhaps a member not yet sent
            return viewer.guilds is not None and self._is_sure(viewer, guild.id)
        granted = self._granted(viewer, guild, member)
        needed, overwrites = read_channel(self._cache, int(channel_id))
        if granted != ALL_PERMISSIONS:
            # A role that is gone grants and denies nothing, whoever still carries its id.
            roles = [
                one for one in member.role_ids if one != guild.id and self._cache.get_role(one)
            ]
            for ids in ((guild.id,), roles, (int(viewer.discord_id),)):
                granted = overwritten(granted, overwrites, ids)
            granted = left_by_timeout(member, granted)
        return granted & needed == needed

    # -- members

    def _member(self, viewer: Viewer, guild_id: int) -> Any:
        if not is_snowflake(viewer.discord_id):
            return None
        return self._cache.get_member(guild_id, int(viewer.discord_id))

    def _granted(self, viewer: Viewer, guild: Any, member: Any) -> int:
        """Guild-wide permissions (Discord documentation: Permissions, base permissions)."""
        if guild.owner_id == int(viewer.discord_id):
            return ALL_PERMISSIONS
        granted = 0
        for role_id in (guild.id, *member.role_ids):  # the guild's own id is @everyone
            role = self._cache.get_role(role_id)
            granted |= int(role.permissions) if role is not None else 0
        return ALL_PERMISSIONS if granted & ADMINISTRATOR else granted


def read_channel(directory: Directory, channel_id: int) -> tuple[int, Mapping[int, Any]]:
    """What it takes to read a channel or thread, and its overwrites.

    What is not known, only who holds all permissions may read.
    """
    needed = VIEW_CHANNEL
    thread = directory.get_thread(channel_id)
    if thread is not None:
        channel_id = thread.parent_id
        if thread.type is hikari.ChannelType.GUILD_PRIVATE_THREAD:
            # Who else was invited to a private thread, hikari's cache cannot say.
            needed |= MANAGE_THREADS
    channel = directory.get_guild_channel(channel_id)
    if getattr(channel, "type", None) in VOICE_TYPES:
        needed |= CONNECT
    overwrites = getattr(channel, "permission_overwrites", None)
    return (ALL_PERMISSIONS, {}) if overwrites is None else (needed, overwrites)


def overwritten(granted: int, overwrites: Mapping[int, Any], ids: Iterable[int]) -> int:
    """What a channel leaves of permissions by what it says of these (Discord documentation:
    Permissions, Overwrites).
    """
    allow = deny = 0
    for one in map(overwrites.get, ids):
        if one is not None:
            allow, deny = allow | int(one.allow), deny | int(one.deny)
    return granted & ~deny | allow


def left_by_timeout(member: Any, granted: int) -> int:
    """What a time-out leaves of permissions, after all else (Discord documentation: Permissions)."""
    if granted == ALL_PERMISSIONS or timeout_end(member) <= time.time():
        return granted
    return granted & LEFT_IN_TIMEOUT


def timeout_end(member: Any) -> float:
    """When the time-out of a member ends or ended, in seconds since 1970; 0: there is none."""
    until = member.raw_communication_disabled_until if member is not None else None
    return until.timestamp() if until is not None else 0.0


def is_snowflake(text: str) -> bool:
    """A Discord id as Discord writes it: 1 to 20 digits, the first of several not 0."""
    return 1 <= len(text) <= 20 and text.isascii() and text.isdigit() and text == str(int(text))


# ------------------------------------------------------------------------------- limits
# How much of everything one address, one viewer and one connection may have. It knows neither
# protocols nor tokens: it is asked before work is done, and told how it ended.

#: Keys remembered at once; beyond it the one whose window began first is forgotten.
MOST_REMEMBERED: Final = 50_000
#: Told to clients that are one connection too many: nobody knows when one will be free.
RETRY_AFTER: Final = 10.0
#: A browser polls on one connection and sends on another.
CONNECTIONS_OF_A_POLLER: Final = 2
#: Seconds between two lines of the log on one address.
LOG_INTERVAL: Final = 60.0
SECONDS_OF: Final = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0}


CountedT = TypeVar("CountedT", bound=Hashable)


def remove_one(counter: collections.Counter[CountedT], key: CountedT) -> None:
    """One fewer; what has none takes no memory."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


class Counters:
    """How often something happened within a window of seconds, which begins with the first time."""

    def __init__(self) -> None:
        # How often, and when the window ends (time.monotonic); in the order in which they began.
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def count_here(self, key: str, seconds: float) -> int:
        """Count one more in this process alone; returns how many there are by now."""
        now = time.monotonic()
        count, until = self._counts.get(key, (0, 0.0))
        if until <= now:
            self._counts.pop(key, None)
            self._forget_some(now)
            count, until = 0, now + seconds
        self._counts[key] = count + 1, until
        return count + 1

    def _forget_some(self, now: float) -> None:
        while self._counts:
            oldest = next(iter(self._counts))
            if len(self._counts) < MOST_REMEMBERED and self._counts[oldest][1] > now:
                return
            del self._counts[oldest]

    async def count(self, key: str, seconds: float) -> int:
        """Count one more; returns how many there are by now."""
        return self.count_here(key, seconds)

    async def seconds_left(self, key: str) -> float:
        """Until the window ends; 0 where nothing has been counted in one."""
        return max(0.0, self._counts.get(key, (0, 0.0))[1] - time.monotonic())

    async def clear(self, key: str) -> None:
        """Count from the beginning again."""
        self._counts.pop(key, None)


class Quota(NamedTuple):
    """So many in so many seconds."""

    amount: int
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Quota:
        """A rate as it is written in the settings: "60/minute"."""
        count, _, unit = text.partition("/")
        return cls(int(count), SECONDS_OF[unit])


class Allowance:
    """What one transport may still send: a burst at first, then as much as the rate gives back."""

    __slots__ = ("_moment", "_used")

    def __init__(self) -> None:
        self._used = 0.0
        self._moment = 0.0

    def take(self, quota: Quota, burst: int) -> bool:
        """Use one of it; False if there is none."""
        now = time.monotonic()
        given_back = (now - self._moment) * quota.amount / quota.seconds
        self._used, self._moment = max(0.0, self._used - given_back), now
        if self._used + 1 > burst:
            return False
        self._used += 1
        return True


class Stranger(Protocol):
    """A connection or a session that has not authenticated."""

    @property
    def address(self) -> str:
        """Whose share it takes; empty: nobody's."""

    def drop(self, reason: str) -> None:
        """Close it; the reason is counted."""


class Strangers:
    """Whoever has not authenticated yet: each for `patience` seconds, and no more than `capacity`.

    Beyond that the longest silent one is dropped, so that a proper client, which authenticates
    at once, always gets in. The same holds within what one address may have of it, its `share`.
    """

    def __init__(self, capacity: int, share: int, patience: float) -> None:
        self.reconfigure(capacity, share, patience)
        # The longest silent one first.
        self._deadlines: OrderedDict[Stranger, asyncio.TimerHandle | None] = OrderedDict()
        self._of_address: collections.Counter[str] = collections.Counter()

    def reconfigure(self, capacity: int, share: int, patience: float) -> None:
        """For those who come from now on."""
        self._capacity = capacity
        self._share = share
        self._patience = patience

    def __len__(self) -> int:
        return len(self._deadlines)

    def enter(self, who: Stranger) -> None:
        """Let it wait, from now on and behind all others."""
        self.leave(who)
        late = "not authenticated in time"
        loop = asyncio.get_running_loop()
        self._deadlines[who] = loop.call_later(self._patience, self._drop, who, late)
        self._of_address[who.address] += 1
        if who.address and self._of_address[who.address] > self._share:
            neighbours = (one for one in self._deadlines if one.address == who.address)
            self._drop(next(neighbours), "made room")
        elif len(self) > self._capacity:
            self.make_room(1)

    def leave(self, who: Stranger) -> None:
        """It has authenticated, or it is gone."""
        if who in self._deadlines:
            self.suspend(who)
            del self._deadlines[who]
            remove_one(self._of_address, who.address)

    def touch(self, who: Stranger) -> None:
        """It has said something, so others are silent for longer; it has no more time for that."""
        if who in self._deadlines:
            self._deadlines.move_to_end(who)

    def suspend(self, who: Stranger) -> None:
        """It waits for us: no deadline until it enters again."""
        self.touch(who)
        if deadline := self._deadlines.get(who):
            deadline.cancel()
            self._deadlines[who] = None

    def make_room(self, places: int) -> int:
        """Drop the longest silent ones; returns how many there were."""
        longest_silent = list(itertools.islice(self._deadlines, places))
        for who in longest_silent:
            self._drop(who, "made room")
        return len(longest_silent)

    def _drop(self, who: Stranger, reason: str) -> None:
        self.leave(who)
        who.drop(reason)


class Connection:
    """One TCP connection, from its first byte to its last: a stranger's, unless it carries a session.

    It carries the session whose latest poll, latest POST or WebSocket came by it; nothing that a request
    merely names makes it anybody's. A session that has not authenticated is a stranger itself, in
    place of the connections that carry it. `address` is the peer's, known before it says a word; of
    a proxy, which speaks for many, empty.
    """

    def __init__(self, limits: Limits, stream: IOStream, address: str) -> None:
        self._strangers = limits.strangers
        self._cut = limits.metrics.cut
        self._stream = stream
        self._session: object | None = None
        self.address = address
        #: Its WebSocket has taken it from the web server, and tells of its end.
        self.detached = False
        self._strangers.enter(self)

    def drop(self, reason: str) -> None:
        self._cut.labels(reason).inc()
        self._stream.close()

    def carry(self, session: object) -> None:
        """It is this session's from now on."""
        self._session = session
        self._strangers.leave(self)

    def release(self, session: object) -> None:
        """It is this session's no more."""
        if self._session is session:
            self._session = None
            self.wait()

    def wait(self) -> None:
        """There is nothing to be answered."""
        if self._session is None and not self._stream.closed():
            self._strangers.enter(self)

    def end(self) -> None:
        """It is closed."""
        self._session = None
        self._strangers.leave(self)


class OpenConnections(collections.Counter[str]):
    """How many connections are open in this process, by whose they are: an address's, a viewer's."""

    async def enter(self, whose: str) -> int:
        """Count one more; returns how many there were before, in other processes too."""
        self[whose] += 1
        return self[whose] - 1

    def leave(self, whose: str) -> None:
        """Count one fewer."""
        remove_one(self, whose)

    def viewers(self) -> Iterator[str]:
        """The Discord ids of those who have some."""
        return (whose.removeprefix(VIEWER) for whose in self if whose.startswith(VIEWER))


#: With a Discord id, whose a viewer's connections are; no address looks like this.
VIEWER: Final = "viewer/"


# What counts against what:
#
#   connections_per_ip      sessions, by the address of the request that began them
#   connections_per_viewer  sessions that have authenticated
#   unauthenticated         strangers
#   attempts_per_ip         each session that is begun, and each further CONNECT on it: 429, no block
#   block_after             refused tokens in a row, whatever is wrong with them; but a well-signed one
#                           that has expired counts nothing: every valid viewer comes with one some day
#   events_per_connection   what a transport sends, however often it says CONNECT on it
class Limits:
    """What addresses and connections may do, and who is blocked."""

    def __init__(
        self,
        settings: LimitsSettings,
        patience: float,
        counters: Counters,
        connections: OpenConnections,
        metrics: Metrics,
    ) -> None:
        self.strangers = Strangers(0, 0, patience)
        self.metrics = metrics
        self.reconfigure(settings, patience)
        self._counters = counters
        self._logged = Counters()
        #: Sessions open now, by address and, of those who have authenticated, by `VIEWER`.
        self.open = connections

    def reconfigure(self, settings: LimitsSettings, patience: float) -> None:
        """Count by these from now on; who is in already stays in."""
        self.settings = settings
        share = CONNECTIONS_OF_A_POLLER * settings.connections_per_ip
        self.strangers.reconfigure(settings.unauthenticated, share, patience)
        self._attempts = Quota.parse(settings.attempts_per_ip)
        self._events = Quota.parse(settings.events_per_connection)

    def log_once(self, address: str, what: str) -> bool:
        """Whether to log this of an address: a line a minute for each, however often it knocks."""
        return self._logged.count_here(f"{address}/{what}", LOG_INTERVAL) == 1

    async def blocked_for(self, address: str) -> float:
        """Seconds that the address is still blocked; 0 if it is not."""
        return await self._counters.seconds_left(f"blocked/{address}")

    async def attempt(self, address: str) -> float:
        """Count one; returns the seconds to wait if it is one too many, else 0."""
        key = f"attempts/{address}"
        if await self._counters.count(key, self._attempts.seconds) <= self._attempts.amount:
            return 0.0
        return max(1.0, await self._counters.seconds_left(key))

    async def begin(self, address: str) -> RefusedConnectionError | None:
        """A session begins. One too many is let in far enough to be told what is returned."""
        before = await self.open.enter(address)
        return (
            self.over("connections_per_ip") if before >= self.settings.connections_per_ip else None
        )

    async def refused(self, address: str, refusal: RefusedConnectionError) -> None:
        """A token was refused; enough of them in a row block the address."""
        code = refusal.data.get("code")
        self.metrics.refused.labels(code or refusal.message).inc()
        if code == "expired":
            return
        key, seconds = f"refused/{address}", self.settings.block_for
        if await self._counters.count(key, seconds) >= self.settings.block_after:
            await self._counters.clear(key)
            await self._counters.count(f"blocked/{address}", seconds)
            self.metrics.blocked.inc()
            log.warning("address %s blocked for %g s", address, seconds)

    async def accepted(self, address: str) -> None:
        """A token was accepted: refusals are counted from the beginning again."""
        await self._counters.clear(f"refused/{address}")

    async def enter(self, discord_id: str, *, replaces: bool = False) -> None:
        """A viewer has one more connection; raises RefusedConnectionError if that is one too many,
        unless it replaces one that may still be counted.
        """
        whose, most = VIEWER + discord_id, self.settings.connections_per_viewer
        if await self.open.enter(whose) >= most and not replaces:
            self.open.leave(whose)
            raise self.over("connections_per_viewer")

    def may_send(self, allowance: Allowance) -> bool:
        """Whether one more event may be sent. All rooms can be joined at once, at each reconnect."""
        return allowance.take(
            self._events, self._events.amount + self.settings.rooms_per_connection
        )

    def over(self, limit: str, seconds: float = RETRY_AFTER) -> RefusedConnectionError:
        """The refusal of one too many; unlike a wrong token it leads to no block."""
        self.metrics.refused.labels(limit).inc()
        return RefusedConnectionError("Too many connections", retryAfter=math.ceil(seconds))


# -------------------------------------------------------------------- rooms and fan-out
# From one event to the bytes on every socket. python-engineio keeps the sessions and the
# polling transport, python-socketio the protocol; a WebSocket is written to here, without a
# queue or a task in between (stock python-socketio starts a task and frames anew for every
# recipient). Rooms know sessions and bytes: nothing of Discord, plugins or viewers.
#
# Every private name of these libraries that the project touches is touched in this section;
# tests/test_rooms.py fails clearly when an upgrade moves one.

NAMESPACE: Final = "/"
#: A flush that carried a burst is followed by this many times its own cost of rest, so that
#: fan-out leaves half of the time to all else: more would only make events wait for longer.
REST_PER_COST: Final = 1.0
#: Bytes of one write, or a quarter of `max_queue_bytes`; a longer burst goes out in several, so
#: that a client that does read can drain its socket in between and is not taken for a slow one.
MAX_WRITE_BYTES: Final = 131_072
#: Bytes of events that may wait for resting rooms, all together, in one copy for all clients.
#: Past it they leave at once: who produces faster than this process can write must not fill it.
MAX_BACKLOG_BYTES: Final = 8_388_608
#: Of a client's bytes, those kept for the frames that Tornado writes by itself: one pong and
#: one close frame (RFC 6455 §5.5). It does not expect that the buffer has no room for them.
CONTROL_BYTES: Final = 256
MAX_ATTACHMENTS: Final = 8
#: The one name under which a handler hears what clients send.
REQUEST: Final = "request"

Sid = str
Hidden = frozenset[Sid]
NOBODY: Final[Hidden] = frozenset()


def frame_of(payload: bytes, *, binary: bool = False) -> bytes:
    """An Engine.IO packet as a WebSocket frame, unmasked and final (RFC 6455 §5.2)."""
    size, start = len(payload), b"\x82" if binary else b"\x81"
    if size < 126:
        return start + size.to_bytes(1, "big") + payload
    if size < 65_536:
        return start + b"\x7e" + size.to_bytes(2, "big") + payload
    return start + b"\x7f" + size.to_bytes(8, "big") + payload


def packets_in(frames: bytes) -> Iterator[str]:
    """Such frames as parts of a poll's body (Engine.IO protocol v4, HTTP long-polling)."""
    rest = memoryview(frames)
    while rest:
        begin = {126: 4, 127: 10}.get(rest[1], 2)
        end = begin + int.from_bytes(rest[2:begin] or rest[1:2], "big")
        payload = rest[begin:end]
        yield str(payload, "utf-8") if rest[0] == 0x81 else "b" + b64encode(payload).decode()
        rest = rest[end:]


class RoomFrame(NamedTuple):
    """An event of a room in both its forms, encoded once for all recipients.

    `frame[session.tracks]` is that which a session gets.
    """

    plain: bytes
    #: For clients that can recover: its offset is one more argument.
    tracked: bytes

    @classmethod
    def of(cls, packet: bytes, offset: str = "") -> RoomFrame:
        plain = frame_of(packet)
        if not offset:
            return cls(plain, plain)
        return cls(plain, frame_of(b'%b,"%b"]' % (packet[:-1], offset.encode())))


def event_packet(event: str, *arguments: object) -> bytes:
    """A Socket.IO EVENT in the main namespace, in its Engine.IO MESSAGE (protocols v5 and v4)."""
    return b"42" + msgspec.json.encode((event, *arguments))


def event_frame(event: str, *arguments: object) -> bytes:
    return frame_of(event_packet(event, *arguments))


def connect_frame(sid: Sid, **more: str) -> bytes:
    """The reply to CONNECT: to who can recover, it says a `pid` too (Socket.IO protocol v5)."""
    return frame_of(b"40" + msgspec.json.encode({"sid": sid, **more}))


PING: Final = frame_of(b"2")
NOOP: Final = frame_of(b"6")
PROBED: Final = frame_of(b"3probe")
CLOSE: Final = "1"
PONG: Final = "3"
MESSAGE: Final = "4"
BASE64: Final = "b"
PROBE: Final = "2probe"
UPGRADE: Final = "5"


class ConnectionLog(logging.LoggerAdapter[logging.Logger]):
    """Names the connection in each line, and as a field of its own for the JSON form."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        assert self.extra is not None
        return f"connection {self.extra['connection']}: {msg}", {**kwargs, "extra": self.extra}


class State(enum.Enum):
    """Where a session is; see `NEXT`."""

    POLLING = enum.auto()
    PROBING = enum.auto()
    WEBSOCKET = enum.auto()
    ENDING = enum.auto()
    CLOSED = enum.auto()


# How a session lives (Engine.IO protocol v4). It begins POLLING, with its OPEN packet in the queue.
# If the request that began it was a WebSocket's, that is attached at once; else a second connection
# may take over: the client probes it, polls are answered with NOOP meanwhile, and after the client's
# "5" it is attached. A session that is told to end while something waits for its next poll is ENDING
# until that has come. It is CLOSED at once by whatever goes wrong; what then is left to do for
# others (Socket.IO's handlers, the limits) happens once, in `_finish`.
#
#   state      what is sent to it      what comes from it   the poll that comes or waits
#   POLLING    waits in the queue      is heard             is answered once something waits
#   PROBING    waits in the queue      is heard             NOOP
#   WEBSOCKET  goes to the socket      is heard             NOOP
#   ENDING     is dropped              only pongs, "1"      gets what waits, and CLOSED it is
#   CLOSED     is dropped              is dropped           gets what waits, then 400
#
# An end by the server is never Engine.IO's CLOSE packet nor Socket.IO's DISCONNECT: stock clients
# take those as final, while they come back by themselves after a 400 or a closed connection.
NEXT: Final[Mapping[State, frozenset[State]]] = {
    State.POLLING: frozenset({State.PROBING, State.WEBSOCKET, State.ENDING, State.CLOSED}),
    State.PROBING: frozenset({State.POLLING, State.WEBSOCKET, State.ENDING, State.CLOSED}),
    State.WEBSOCKET: frozenset({State.CLOSED}),
    State.ENDING: frozenset({State.CLOSED}),
    State.CLOSED: frozenset(),
}


def message_of(packet: str | bytes) -> str | bytes | None:
    """What a client's MESSAGE carries; None of a PONG or CLOSE. Raises ValueError for all others."""
    kind = packet[:1]
    if isinstance(packet, bytes):
        return packet
    if kind == MESSAGE:
        return packet[1:]
    if kind == BASE64:
        return b64decode(packet[1:], validate=True)
    if kind in (PONG, CLOSE):
        return None
    raise ValueError("no packet of a client's")


class PollQueue:
    """What waits for a client's next poll; what it was answered last counts until it polls again."""

    __slots__ = ("_answered", "_poll", "bytes", "frames", "poller")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        #: How much waits, with that answer.
        self.bytes = 0
        self._answered = 0  # bytes of it
        #: The latest poll, and what is done when it is to be answered.
        self.poller: SocketHandler | None = None
        self._poll: asyncio.Future[None] | None = None

    @property
    def polled(self) -> bool:
        """Whether a poll waits for its answer."""
        return self._poll is not None

    @property
    def read(self) -> bool:
        """Whether the kernel has taken all of the latest answer."""
        return self.poller is None or not stream_of(self.poller).writing()

    def put(self, frames: bytes) -> None:
        self.frames.append(frames)
        self.bytes += len(frames)
        self.wake()

    def begin(self, poller: SocketHandler) -> None:
        """A poll comes: the client has had what the one before was answered with."""
        self.poller = poller
        self.bytes -= self._answered
        self._answered = 0

    async def wait(self) -> None:
        """Returns when `wake` is called: something has come, or something else has changed."""
        self._poll = asyncio.get_running_loop().create_future()
        await self._poll
        self._poll = None

    def wake(self) -> None:
        if self._poll is not None and not self._poll.done():
            self._poll.set_result(None)

    def take(self) -> bytes:
        """All of it, to be sent."""
        frames = b"".join(self.frames)
        self.frames, self._answered = [], len(frames)
        return frames


class Heartbeat:
    """Pings a client, and lets it go where no PONG comes back; one timer, no task."""

    __slots__ = ("_awaits_pong", "_session", "_timer")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._awaits_pong = False
        self._timer: asyncio.TimerHandle | None = None

    def beat(self) -> None:
        """Ping after the interval: at the start, and after each PONG."""
        if self._timer is not None and not self._awaits_pong:
            return  # a PONG that nobody asked for
        self._awaits_pong = False
        self._call_later(self._session.server.ping_interval, self._ping)

    def _ping(self) -> None:
        self._awaits_pong = True
        self._session.write(PING)
        engine = self._session.server
        self._call_later(engine.ping_timeout, self._session.lose, engine.reason.PING_TIMEOUT)

    def _call_later(self, seconds: float, call: Callable[..., None], *args: object) -> None:
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(seconds, call, *args)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


#: While polls and POSTs are the transport.
POLLED: Final = frozenset({State.POLLING, State.PROBING, State.ENDING})


# Slots: with a thousand clients in turn, each further piece of memory is one more cache miss, and
# these add up to a tenth of what the system call takes.
@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Session:
    """One Engine.IO session, in the place of python-engineio's own.

    While the client polls or upgrades, frames wait in a queue; once its WebSocket is attached
    they go straight to the socket, and what the kernel does not take waits in Tornado's stream.
    Either way no more than `max_queue_bytes` wait, or the client is cut off.
    """

    server: Engine
    sid: str
    #: Whom it counts for.
    address: str
    #: Why its CONNECT will be refused, if it will; the client learns it as `connect_error`.
    refusal: RefusedConnectionError | None = None
    #: How often the client has said CONNECT, and what it may still send.
    connects: int = 0
    allowance: Allowance = dataclasses.field(default_factory=Allowance)
    #: Names the connection in the log; the Engine.IO id would let a reader take it over.
    log: ConnectionLog = dataclasses.field(
        default_factory=lambda: ConnectionLog(log, {"connection": secrets.token_hex(4)})
    )
    state: State = State.POLLING
    from_browser: bool = False  # the latest request that brought packets named a page's origin
    tracks: bool = False  # room events come to it with their offsets (see "recovery")
    handler: SocketHandler | None = None  # its WebSocket, once that is the transport
    posting: bool = False  # one POST is at work
    #: By which TCP connections it comes: the latest of each kind of request.
    _carriers: dict[str, Connection] = dataclasses.field(default_factory=dict)
    _stream: IOStream | None = None
    _socket: socket.socket | None = None  # None under TLS: only its stream may write
    _alone: bool = True  # nobody but `write` writes to the stream
    _direct: socket.socket | None = None  # while it may be written to without a look at its stream
    queue: PollQueue = dataclasses.field(default_factory=PollQueue)
    _prober: SocketHandler | None = None
    heartbeat: Heartbeat = dataclasses.field(init=False)
    _end: asyncio.Task[None] | None = None  # what is left to do, once it is closed

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(self)

    def _become(self, state: State) -> bool:
        """Go over to the state, if that may follow; wakes the poll that waits."""
        if state not in NEXT[self.state]:
            return False
        self.state, self._direct = state, None
        self.queue.wake()
        return True

    @property
    def closed(self) -> bool:
        return self.state is State.CLOSED

    def carried_by(self, connection: Connection, kind: str) -> None:
        """A request of this session has come: of its kind, no other connection is this session's."""
        before = self._carriers.get(kind)
        self._carriers[kind] = connection
        connection.carry(self)
        if before is not None and before not in self._carriers.values():
            before.release(self)

    # -- to the client

    async def send(self, pkt: engineio_packet.Packet) -> None:
        """What the libraries call for each packet."""
        encoded = pkt.encode()
        self.write(frame_of(encoded, binary=True) if pkt.binary else frame_of(encoded.encode()))

    def write(self, frames: bytes) -> bool:
        """Send whole frames. Never waits, never raises.

        Returns whether the client has been keeping up: nothing of it waits in this process.
        """
        direct, sent = self._direct or self._idle_socket(), 0
        try:
            if direct is not None and (sent := direct.send(frames)) == len(frames):
                return True  # IOStream.write costs three times as much as this system call
        except BlockingIOError:
            pass
        except OSError:
            self.lose()
            return True
        self._direct = None
        return self._write_later(frames, sent)

    def _idle_socket(self) -> socket.socket | None:
        """The socket, if there is one and nothing waits to be written to it."""
        if self.closed or self._socket is None or self._stream is None or self._stream.writing():
            return None
        if self._alone:
            self._direct = self._socket
        return self._socket

    def share_stream(self) -> None:
        """Tornado writes to the stream as well: it has been asked for a pong."""
        self._alone, self._direct = False, None

    def _write_later(self, frames: bytes, sent: int) -> bool:
        """The same for what is left of them after so many bytes."""
        if not frames or self.state in (State.ENDING, State.CLOSED):
            return True
        if self._stream is None:
            if self.queue.bytes + len(frames) > self.server.max_queue_bytes:
                self.cut("too slow")
            else:
                self.queue.put(frames)
            return True
        try:
            write_within(self.server.max_queue_bytes, self._stream, memoryview(frames)[sent:])
        except StreamBufferFullError:
            self.cut("too slow")
        except StreamClosedError:
            self.lose()
        return False

    async def poll(self, handler: SocketHandler) -> bytes:
        """The frames that a poll is answered with; returns once there is something, nothing when it is over.

        Two polls at a time end the session, as they do in Node's: which is read first?
        """
        if self.queue.polled or not self.queue.read:
            self.cut("overlapping polls")
            return b""
        self.queue.begin(handler)
        self.carried_by(handler.connection, "GET")
        if self.state is State.POLLING and not self.queue.frames:
            await self.queue.wait()
        if self.state in (State.PROBING, State.WEBSOCKET):
            return NOOP
        if self.state is State.ENDING:
            self.lose(self.server.reason.SERVER_DISCONNECT)
        return self.queue.take()

    # -- from the client

    async def feed(self, message: str | bytes) -> None:
        """Take one Engine.IO packet; a malformed one ends the session, as it does in Node's."""
        if self.closed:
            return
        try:
            data = message_of(message)
        except ValueError:
            self.cut("malformed packet")
            return
        if data is not None:
            if self.state is not State.ENDING:
                await self.server.trigger("message", self.sid, data)
        elif message[:1] == PONG:
            self.heartbeat.beat()
        else:
            self.queue.frames = [NOOP]  # a poll that waits, as Node's answers it
            self.lose(self.server.reason.CLIENT_DISCONNECT)
        await asyncio.sleep(0)  # however much one client sends, the others have their turn

    # -- the upgrade from polling (Engine.IO protocol v4, Upgrade): 2probe, 3probe, 5

    def begin_upgrade(self, handler: SocketHandler) -> bool:
        """A WebSocket wants to take over from polling; one at a time."""
        if self._prober is None and self.state is State.POLLING:
            self._prober = handler
        return handler is self._prober

    def probe(self, handler: SocketHandler) -> bool:
        """It asks whether it may: polls are answered with NOOP from now on."""
        return handler is self._prober and self._become(State.PROBING)

    def upgrade(self, handler: SocketHandler) -> bool:
        """It takes over, if it has asked."""
        if handler is not self._prober or self.state is not State.PROBING:
            return False
        self.attach(handler)
        return True

    def attach(self, handler: SocketHandler) -> None:
        """From now on this WebSocket is the transport; what waited goes first, and nobody polls."""
        if not self._become(State.WEBSOCKET):
            handler.close()
            return
        self.from_browser = handler.from_browser
        self.handler, self._prober, self.queue.poller = handler, None, None
        self.carried_by(handler.connection, "websocket")
        self._stream = websocket_stream(handler)
        if not isinstance(self._stream, SSLIOStream):
            self._socket = self._stream.socket
        self.write(self.queue.take())

    def detach(self, handler: SocketHandler) -> None:
        """This connection is gone: with it the session, or only the attempt to upgrade."""
        if handler is self.handler or (handler is self.queue.poller and self.queue.polled):
            self.lose()
        elif handler is self._prober:
            self._prober = None
            if self.state is State.PROBING:
                self._become(State.POLLING)

    # -- the end

    def end(self) -> None:
        """Close the transport once the client has had what was sent to it so far."""
        if self.queue.frames and self._become(State.ENDING):
            asyncio.get_running_loop().call_later(self.server.ending_timeout, self.lose)
        elif self.state is not State.ENDING:
            self.lose(self.server.reason.SERVER_DISCONNECT)

    def end_soon(self) -> None:
        """The same once this turn of the loop has sent what it has to say."""
        asyncio.get_running_loop().call_soon(self.end)

    def cut(self, reason: str, level: int = logging.INFO) -> None:
        """Drop the client now, without waiting for it; the reason is logged and counted."""
        if self.closed:
            return
        if self.server.limits.log_once(self.address, reason):
            self.log.log(level, "%s cut off: %s", self.address, reason)
        self.server.metrics.cut.labels(reason).inc()
        self.queue.frames.clear()
        self.lose()
        if self._stream is not None:
            self._stream.close()
        elif self.queue.poller is not None and not self.queue.polled:
            stream_of(self.queue.poller).close()  # an answer that nobody reads

    #: It has not authenticated. Strangers come by the thousand: counted, but hardly logged.
    drop = functools.partialmethod(cut, level=logging.DEBUG)

    def lose(self, reason: str | None = None) -> None:
        """The transport is gone, or shall be."""
        if self._become(State.CLOSED):
            reason = reason or self.server.reason.TRANSPORT_CLOSE
            self._end = self.server.start_background_task(self._finish, reason)

    async def close(self, reason: str | None = None) -> None:
        """End the session and its transport at once; returns when all who care know of its end."""
        self.lose(reason or self.server.reason.SERVER_DISCONNECT)
        assert self._end is not None
        await asyncio.wait([self._end])

    async def _finish(self, reason: str) -> None:
        """Tell Socket.IO, once; then let go of everything."""
        self.heartbeat.stop()
        await self.server.trigger("disconnect", self.sid, reason)
        self.server.forget(self)
        for connection in set(self._carriers.values()):
            connection.release(self)
        self.server.close_sockets(self.handler, self._prober)
        # What refers to each other stays in memory until the garbage collector comes by.
        self.handler = self._prober = self.queue.poller = None
        self._stream = self._socket = None
        self._carriers = {}
        del self.heartbeat


def close_gently(handler: WebSocketHandler, patience: float) -> None:
    """Ask the client to close, and close without it after `patience` seconds."""
    if handler.ws_connection is not None:
        stream = websocket_stream(handler)
        handler.close()
        if not stream.closed():
            asyncio.get_running_loop().call_later(patience, stream.close)


def write_within(limit: int, stream: IOStream, data: memoryview) -> None:
    """Write if no more than `limit` bytes then wait; else raises StreamBufferFullError."""
    stream.max_write_buffer_size = max(0, limit - CONTROL_BYTES)
    try:
        stream.write(data)
    finally:
        stream.max_write_buffer_size = max(CONTROL_BYTES, limit)


def websocket_stream(handler: WebSocketHandler) -> IOStream:
    """What carries an open WebSocket."""
    assert handler.ws_connection is not None
    assert handler.ws_connection.stream is not None
    return handler.ws_connection.stream


def stream_of(handler: RequestHandler) -> IOStream:
    """What carries a request that is not a WebSocket's."""
    stream: IOStream = handler.request.connection.stream  # type: ignore[union-attr]  # HTTP/1's
    return stream


class Engine(engineio.AsyncServer):  # type: ignore[misc]  # python-engineio has no types
    """The Engine.IO server; its sessions are `Session`s, and their requests `SocketHandler`'s."""

    #: Seconds that a client has to fetch its last packets or to close before it is forgotten.
    ending_timeout = 4.0

    def __init__(self, *, max_queue_bytes: int, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self.max_queue_bytes = max_queue_bytes
        self.limits = limits
        self.metrics = limits.metrics
        #: WebSockets whose sessions have ended before their clients had ended the upgrade.
        self._upgrading: set[SocketHandler] = set()
        self._none_upgrading = asyncio.Event()
        self._none_upgrading.set()

    async def admit(self, address: str, transport: str) -> Session:
        """A new session, which has to authenticate in time; its OPEN packet is already under way."""
        session = Session(self, self.generate_id(), address)
        session.refusal = await self.limits.begin(address)
        self.limits.strangers.enter(session)
        self.sockets[session.sid] = session
        may_upgrade = transport == "polling" and "websocket" in self.transports
        hello = {
            "sid": session.sid,
            "upgrades": ["websocket"] if may_upgrade else [],
            "pingInterval": int(self.ping_interval * 1000),
            "pingTimeout": int(self.ping_timeout * 1000),
            "maxPayload": self.max_http_buffer_size,
        }
        session.write(frame_of(b"0" + msgspec.json.encode(hello)))
        session.heartbeat.beat()
        await self.trigger("connect", session.sid, {})
        return session

    async def trigger(self, event: str, *args: object) -> None:
        """Tell Socket.IO, and wait until it is done with it."""
        await self._trigger_event(event, *args, run_async=False)

    def close_sockets(self, handler: SocketHandler | None, prober: SocketHandler | None) -> None:
        """Close a session's WebSocket; and the one that was to take over from polling, once the client
        has said "5", which `SocketHandler` answers so, or has had its time.

        A stock client whose probe was answered has stopped polling: when this closes before, it takes
        that for a failed attempt, and neither polls again nor reconnects.
        """
        if handler is not None:
            close_gently(handler, self.ending_timeout)
        if prober is not None:
            self._upgrading.add(prober)
            self._none_upgrading.clear()
            patience = self.ending_timeout
            asyncio.get_running_loop().call_later(patience, close_gently, prober, patience)

    def socket_closed(self, handler: SocketHandler) -> None:
        """This WebSocket is gone."""
        self._upgrading.discard(handler)
        if not self._upgrading:
            self._none_upgrading.set()

    async def upgrades_end(self, timeout: float) -> None:
        """Until all of these are closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._none_upgrading.wait()

    def forget(self, session: Session) -> None:
        """It is closed."""
        self.sockets.pop(session.sid, None)
        self.limits.strangers.leave(session)
        self.limits.open.leave(session.address)


class Clients(socketio.AsyncManager):  # type: ignore[misc]  # python-socketio has no types
    """Who is connected, as python-socketio asks for it; the rooms are in `Rooms`.

    The stock manager has one more room for each client, and walks all rooms whenever one leaves.
    """

    def __init__(self, rooms: Rooms) -> None:
        super().__init__()
        self._listeners = rooms

    def basic_enter_room(
        self, sid: Sid, namespace: str, room: str | None, eio_sid: str | None = None
    ) -> None:
        if room is None:
            super().basic_enter_room(sid, namespace, room, eio_sid)

    def basic_disconnect(self, sid: Sid, namespace: str, **kwargs: Any) -> None:
        self._listeners.remove(sid)
        self.basic_leave_room(sid, namespace, None)
        for pending in (self.pending_connect, self.pending_disconnect):
            if sid in pending.get(namespace, ()):
                pending[namespace].remove(sid)
                if not pending[namespace]:
                    del pending[namespace]


class PacketJson:
    """JSON of Socket.IO packets, which may hold what is encoded already (`msgspec.Raw`)."""

    loads = staticmethod(engineio.json.loads)

    @staticmethod
    def dumps(data: object, separators: object = None) -> str:
        return msgspec.json.encode(data).decode()


class JsonPacket(socketio.packet.Packet):  # type: ignore[misc]  # python-socketio has no types
    """A Socket.IO packet with that."""

    json = PacketJson


class SocketIO(socketio.AsyncServer):  # type: ignore[misc]  # python-socketio has no types
    """The Socket.IO server. Bad packets end their session; `request` hears every client event."""

    def __init__(self, rooms: Rooms, **options: Any) -> None:
        super().__init__(client_manager=Clients(rooms), serializer=JsonPacket, **options)
        self._rooms = rooms
        self.eio.on("message", self._take_packet)

    def session_of(self, sid: Sid) -> Session | None:
        """The transport of a connected client."""
        session: Session | None = self.eio.sockets.get(
            self.manager.eio_sid_from_sid(sid, NAMESPACE)
        )
        return session

    def _engineio_server_class(self) -> type[Engine]:
        return Engine

    async def _take_packet(self, eio_sid: str, data: str | bytes) -> None:
        """The library trusts what it parses; here whatever it trips over is the client's fault."""
        try:
            await self._handle_eio_message(eio_sid, data)
        except Exception as error:
            # Only the type: some messages quote what the client sent.
            log.debug("malformed Socket.IO packet: %s", type(error).__name__)
            self._cut(eio_sid)
        half_done = self._binary_packet.get(eio_sid)
        if half_done is not None and half_done.attachment_count > MAX_ATTACHMENTS:
            del self._binary_packet[eio_sid]
            self._cut(eio_sid)

    def _cut(self, eio_sid: str) -> None:
        session = self.eio.sockets.get(eio_sid)
        if session is not None:
            session.cut("malformed packet")

    async def _handle_connect(self, eio_sid: str, namespace: str | None, data: Any) -> None:
        """Stock python-socketio calls a handler that fails once more, and keeps for ever who went
        meanwhile; its refusals are no objects and leave the transport open. Here the handler
        sends the reply itself, with all that is to follow it, in one write.
        """
        try:
            await self._connect(self.eio.sockets[eio_sid], namespace or NAMESPACE, data)
        except RefusedConnectionError as refusal:
            error: dict[str, object] = {"message": refusal.message}
            if refusal.data:
                error["data"] = refusal.data
            kind = socketio.packet.CONNECT_ERROR
            await self._send_packet(eio_sid, self.packet_class(kind, error, namespace=namespace))

    async def _connect(self, session: Session, namespace: str, auth: Any) -> None:
        if namespace != NAMESPACE:
            raise RefusedConnectionError("Invalid namespace")
        if session.state in POLLED and self.manager.sid_from_eio_sid(session.sid, NAMESPACE):
            return  # a browser sends a POST again whose connection was reset
        session.connects += 1
        if session.connects > 1 and (seconds := await self.eio.limits.attempt(session.address)):
            session.end_soon()
            raise self.eio.limits.over("attempts_per_ip", seconds)
        sid = await self.manager.pre_connect(session.sid, NAMESPACE)
        if sid is None:
            raise RefusedConnectionError("Already connected")
        try:
            await self._trigger_event("connect", NAMESPACE, sid, {}, auth)
        except Exception:
            session.end_soon()
            await self.manager.disconnect(sid, NAMESPACE)
            raise
        await self.manager.connect(sid, NAMESPACE)
        if session.closed:  # meanwhile
            await self._handle_eio_disconnect(session.sid, self.reason.TRANSPORT_CLOSE)

    async def _handle_event(self, eio_sid: str, namespace: str, ack: int, data: Any) -> None:
        """Stock python-socketio would let a client name any handler: "connect", "disconnect", "*"."""
        await super()._handle_event(eio_sid, namespace, ack, [REQUEST, data[0], *data[1:]])

    async def _trigger_event(self, event: str, namespace: str, *args: Any) -> Any:
        """Call a handler; what goes wrong in one is never a client's fault."""
        try:
            return await super()._trigger_event(event, namespace, *args)
        except RefusedConnectionError:
            raise
        except Exception:
            log.exception("a Socket.IO handler failed")
            raise

    async def _handle_eio_disconnect(self, eio_sid: str, reason: str) -> None:
        """Stock python-socketio keeps for ever what waited for its attachments."""
        self._binary_packet.pop(eio_sid, None)
        await super()._handle_eio_disconnect(eio_sid, reason)


def library_log(name: str) -> logging.Logger:
    """A log for a library that reports clients' mistakes as errors: only its bugs get through.

    Handed to the library, it also keeps it from installing a handler of its own.
    """
    logger = logging.getLogger(f"spywatcher.{name}")
    logger.setLevel(logging.ERROR)
    logger.filters = [lambda record: bool(record.exc_info)]
    return logger


class Room:
    """Who listens to one room, and what waits for them while it rests."""

    __slots__ = ("members", "rest", "sids", "waiting")

    def __init__(self) -> None:
        self.members: dict[Sid, Session] = {}
        self.sids: tuple[Sid, ...] | None = None  # of `members`; None: not asked for since a change
        self.waiting: collections.deque[Outgoing] = collections.deque()
        self.rest: asyncio.Handle | None = None  # runs out when the room may be written to


class Outgoing(NamedTuple):
    """An event on its way to a room; the numbers tell which was sent first."""

    number: int
    room: Room
    frame: RoomFrame
    hidden: Hidden


class Outbox:
    """Room events on their way out.

    The first event of a burst leaves at once. What comes in the same turn of the loop is joined
    into one write per client, and after such a write its room rests in proportion to the cost,
    never over `max_delay`: so a flood shares writes and a single event is never held. Whatever
    rooms its events went to, each client gets them in the order in which they were sent.
    """

    def __init__(self, max_delay: float, max_write: int, deliveries: Counter) -> None:
        self._max_delay = max_delay
        self._max_write = max_write
        self._deliveries = deliveries
        self._numbers = itertools.count(1)
        self._busy: dict[Room, None] = {}  # those with something waiting, in order
        self._bytes = 0
        self._had: dict[Session, int] = {}  # up to which number who got ahead of its rooms

    def send(self, room: Room, frame: RoomFrame, hidden: Hidden) -> None:
        room.waiting.append(Outgoing(next(self._numbers), room, frame, hidden))
        self._busy[room] = None
        self._bytes += len(frame.plain)
        if room.rest is None or self._bytes > MAX_BACKLOG_BYTES:
            self._flush(room)

    def catch_up(self, sid: Sid, session: Session) -> None:
        """Write now what one client is due, so that only later events find its rooms changed."""
        if not self._busy:
            return
        had = self._had.get(session, 0)
        due = [
            out.frame[session.tracks]
            for out in in_order(room for room in self._busy if sid in room.members)
            if out.number > had and sid not in out.hidden
        ]
        if due:
            session.write(b"".join(due))
            self._deliveries.inc(len(due))
        self._had[session] = next(self._numbers)

    def forget(self, room: Room) -> None:
        """Drop what waits for a room that nobody is in any more."""
        self._bytes -= sum(len(out.frame.plain) for out in room.waiting)
        room.waiting.clear()
        self._busy.pop(room, None)
        if room.rest is not None:
            room.rest.cancel()

    def _flush(self, room: Room) -> None:
        if room.rest is not None:
            room.rest.cancel()
            room.rest = None
        if not room.waiting:
            return
        batch = self._take_batch(room)
        started = time.perf_counter()
        written, keeping_up = deliver(batch, self._had)
        cost = time.perf_counter() - started
        self._deliveries.inc(written)
        if not self._busy:
            self._had.clear()
        rest = min(cost * REST_PER_COST, self._max_delay)
        if not keeping_up:
            rest = self._max_delay
        elif len(batch) == 1 or room.waiting:
            rest = 0
        self._rest({room, *(out.room for out in batch)}, rest)

    def _rest(self, rooms: Iterable[Room], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        for room in rooms:
            if room.rest is not None:
                room.rest.cancel()
            room.rest = loop.call_later(seconds, self._flush, room)

    def _take_batch(self, room: Room) -> list[Outgoing]:
        """What waits for a room, up to `_max_write` bytes and at least one event.

        Where a member is in another room for which something waits, all that waits comes along.
        """
        shared = any(
            not room.members.keys().isdisjoint(other.members)
            for other in self._busy
            if other is not room
        )
        batch: list[Outgoing] = []
        size = 0
        for out in in_order(self._busy) if shared else room.waiting:
            size += len(out.frame.tracked)
            if batch and size > self._max_write:
                break
            batch.append(out)
        for out in batch:
            self._bytes -= len(out.frame.plain)
            out.room.waiting.popleft()
            if not out.room.waiting:
                del self._busy[out.room]
        return batch


def in_order(rooms: Iterable[Room]) -> Iterator[Outgoing]:
    """What waits for these rooms, as it was sent."""
    return heapq.merge(*(room.waiting for room in rooms))


def deliver(batch: Sequence[Outgoing], had: Mapping[Session, int]) -> tuple[int, bool]:
    """Write a batch to each client: what went to its rooms, is not hidden from it and not yet `had`.

    Clients that get the same share the joined bytes. Returns how many events were written, each
    client counted, and whether most are keeping up.
    """
    ways: dict[tuple[Room, Hidden], int] = {}
    for out in batch:
        ways.setdefault((out.room, out.hidden), 1 << len(ways))
    written = keeping_up = behind = 0
    for (tracks, bits, number), audience in audiences(ways, had).items():
        due = batch
        if len(ways) > 1 or number:
            due = [o for o in batch if ways[o.room, o.hidden] & bits and o.number > number]
        frames = b"".join([out.frame[tracks] for out in due])
        written += len(due) * len(audience)
        for session in audience:
            if session.write(frames):
                keeping_up += 1
            else:
                behind += 1
    return written, behind <= keeping_up


def audiences(
    ways: Mapping[tuple[Room, Hidden], int], had: Mapping[Session, int]
) -> Mapping[tuple[bool, int, int], Collection[Session]]:
    """Who gets the same: in which form, the bits of the ways that reach them, what they `had`."""
    (room, hidden), bit = next(iter(ways.items()))
    if len(ways) == 1 and not hidden and not had:
        sessions = room.members.values()
        forms = {tracks: [s for s in sessions if s.tracks is tracks] for tracks in (False, True)}
        return {(tracks, bit, 0): some for tracks, some in forms.items() if some}
    reached: dict[Session, int] = {}
    for (room, hidden), bit in ways.items():
        for sid, session in room.members.items():
            if sid not in hidden:
                reached[session] = reached.get(session, 0) | bit
    groups: dict[tuple[bool, int, int], list[Session]] = {}
    for session, bits in reached.items():
        groups.setdefault((session.tracks, bits, had.get(session, 0)), []).append(session)
    return groups


class Rooms:
    """Who is in which room, and the way of an event to them.

    A client is added once it is connected; what it is in is forgotten when it is removed.
    """

    def __init__(self, max_delay: float, max_queue_bytes: int, metrics: Metrics) -> None:
        self._metrics = metrics
        max_write = min(MAX_WRITE_BYTES, max_queue_bytes // 4)
        self._outbox = Outbox(max_delay, max_write, metrics.deliveries)
        self._rooms: dict[str, Room] = {}
        self._rooms_of: dict[Sid, set[str]] = {}
        self._sessions: dict[Sid, Session] = {}

    def __len__(self) -> int:
        return len(self._rooms)

    def members(self, room: str) -> tuple[Sid, ...]:
        """Who is in the room: the same tuple, not only an equal one, until that changes."""
        target = self._rooms.get(room)
        if target is None:
            return ()
        if target.sids is None:
            target.sids = tuple(target.members)
        return target.sids

    def has_listeners(self, room: str) -> bool:
        """Whether anybody listens: where nobody does, no payload needs to be made."""
        return room in self._rooms

    def names(self) -> Iterable[str]:
        """The rooms that anybody is in."""
        return tuple(self._rooms)

    def rooms_of(self, sid: Sid) -> frozenset[str]:
        """The rooms that a client is in."""
        return frozenset(self._rooms_of.get(sid, ()))

    # -- coming and going

    def add(self, sid: Sid, session: Session) -> None:
        """A client is connected."""
        self._sessions[sid] = session

    def remove(self, sid: Sid) -> None:
        """It is gone, and so is what waits for it."""
        for room in self.rooms_of(sid):
            self.expel(sid, room)
        self._rooms_of.pop(sid, None)
        self._sessions.pop(sid, None)

    def enter(self, sid: Sid, room: str) -> None:
        """The client gets what is sent from now on; harmless where it is in, or gone."""
        session = self._sessions.get(sid)
        if session is not None:
            self._outbox.catch_up(sid, session)
            target = self._rooms.setdefault(room, Room())
            target.members[sid] = session
            target.sids = None
            self._rooms_of.setdefault(sid, set()).add(room)

    def leave(self, sid: Sid, room: str) -> None:
        """As a client wishes: it still gets what came before."""
        if room in self._rooms_of.get(sid, ()):
            self.catch_up(sid)
            self.expel(sid, room)

    def catch_up(self, sid: Sid) -> None:
        """What a client is due from before goes out now."""
        self._outbox.catch_up(sid, self._sessions[sid])

    def expel(self, sid: Sid, room: str) -> None:
        """Against its wish: not even what waits."""
        self._rooms_of.get(sid, set()).discard(room)
        target = self._rooms.get(room)
        if target is not None:
            target.members.pop(sid, None)
            target.sids = None
            if not target.members:
                self._outbox.forget(target)
                del self._rooms[room]

    # -- events

    def send(self, room: str, frame: RoomFrame, hidden: Callable[[], Hidden] | None = None) -> None:
        """Send an event to all in a room but the `hidden`, who are asked for if anybody is in it."""
        target = self._rooms.get(room)
        if target is not None:
            self._outbox.send(target, frame, hidden() if hidden else NOBODY)


# ----------------------------------------------------------------------------- recovery
# What clients are owed that lost their connection and come back (Socket.IO: Connection state
# recovery). A log for each guild keeps the latest events as they went out; a ticket for each client
# that can recover says in which rooms it is. It knows no rights and no sockets: whoever asks for
# what a client has missed decides what of it the client may have.

#: Bytes of events that one guild's log may hold, and that one client may be sent at once.
MAX_LOG_BYTES: Final = 1_048_576


class Destination(NamedTuple):
    """Where an event goes: to those in a room who may see the channel, if it belongs to one."""

    guild_id: str
    kind: str
    channel_id: str = ""

    @classmethod
    def of(cls, room: str) -> Destination:
        kind, _, guild_id = room.partition(":")
        return cls(guild_id, kind)

    @property
    def room(self) -> str:
        return f"{self.kind}:{self.guild_id}"


class Logged(NamedTuple):
    """An event as it went to a guild's room."""

    position: int
    moment: float
    to: Destination
    #: In the form with the offset.
    frame: bytes


class GuildLog:
    """The latest events of one guild; knows up to where it has none."""

    def __init__(self, settings: RecoverySettings, begin: int) -> None:
        self._window, self._max_events = settings.window, settings.max_events
        self._events: collections.deque[Logged] = collections.deque()
        self._trimmed = begin
        self._filled = math.inf  # from there on all is here, also what was not heard here
        self.bytes = 0

    def add(self, event: Logged) -> None:
        self._events.append(event)
        self.bytes += len(event.frame)
        oldest = event.moment - self._window
        while (
            len(self._events) > self._max_events
            or self.bytes > MAX_LOG_BYTES
            or self._events[0].moment < oldest
        ):
            self._trimmed = self._events[0].position
            self.bytes -= len(self._events.popleft().frame)

    def reaches(self, position: int, heard_elsewhere: bool = False) -> bool:
        """Whether all is here that came after it, to the clients of this node or of all."""
        return position >= (max(self._trimmed, self._filled) if heard_elsewhere else self._trimmed)

    def fill(self, since: int, events: Iterable[Logged]) -> bool:
        """Have all that came after `since`, if that may be kept: these, and what is here."""
        first = self._events[0].position if self._events else math.inf
        older = [event for event in events if event.position < first]
        size = sum(len(event.frame) for event in older)
        if len(older) + len(self._events) > self._max_events or size + self.bytes > MAX_LOG_BYTES:
            return False
        self._events.extendleft(reversed(older))
        self.bytes += size
        self._trimmed, self._filled = min(self._trimmed, since), min(self._filled, since)
        return True

    def since(self, position: int) -> list[Logged] | None:
        """What came after it, oldest first; None where some of that is here no more."""
        if not self.reaches(position):
            return None
        missed = list(itertools.takewhile(lambda e: e.position > position, reversed(self._events)))
        return missed[::-1]


# On the wire: the reply to CONNECT carries the ticket's private id, `pid`, and every room event an
# offset, a string as last argument. A client that comes back says both. Offsets are positions in one
# count of all events, which one process keeps at a time, so one of them says how far a client is in every
# guild. A process begins at 0, which keeps offsets short, and counts on from the furthest that a client
# says it had from one before: a stock client may say that offset again, which then is before all that
# its new ticket is owed. A snapshot is sent to one client, between two events: its offset adds the
# number of the client's snapshots.
#
#   a ticket is   from                       until                    its rooms have a listener
#   held          CONNECT                    its connection is lost   yes
#   awaited       its connection was lost    CONNECT with its pid     yes
#   gone          `window` seconds of that, or at once where its client said DISCONNECT


class Seen(NamedTuple):
    """How far a client is, as an offset says it."""

    #: Of the latest event it has, in the count of all.
    position: int
    #: How many snapshots it had by then; an event's offset does not say.
    snapshots: int = 0


class Ticket(msgspec.Struct, eq=False):
    """What a client that can recover is known by, and the rooms that it is in."""

    pid: str
    #: By its latest token.
    viewer: Viewer
    #: By room, the position at which the client entered it: nothing from before is owed.
    rooms: dict[str, int] = {}
    #: Rooms that it is to be in once it is known that it may.
    pending: set[str] = set()
    #: How many snapshots its client was sent,
    snapshots: int = 0
    #: and by room where the latest is that may not have reached it; None: not sent yet.
    unseen: dict[str, Seen | None] = {}
    #: Whether its client has asked which guilds there are, and so is told of changes.
    lists: bool = False
    until: float = math.inf  # awaited until then, by the monotonic clock

    def since(self, seen: int) -> dict[str, int]:
        """By guild, the position after which its client is owed something, if it has `seen` so much."""
        since: dict[str, int] = {}
        for room, entered in self.rooms.items():
            guild_id = room_guild(room)
            position = max(entered, seen)
            since[guild_id] = min(position, since.get(guild_id, position))
        return since


class GuildLogs:
    """Counts all events, and keeps the latest of each guild that somebody may come back to."""

    def __init__(self, settings: RecoverySettings) -> None:
        self._settings = settings
        #: Of the latest event.
        self.position = 0
        self._logs: dict[str, GuildLog] = {}

    @property
    def size(self) -> int:
        """Bytes that all of them hold."""
        return sum(log.bytes for log in self._logs.values())

    @property
    def offset(self) -> str:
        """Where all of them are now."""
        return encode_offset(self.position)

    def reach(self, position: int) -> None:
        """All events up to there have been here."""
        self.position = max(self.position, position)

    def keep(self, guild_id: str) -> None:
        """Somebody is owed from now on what comes in this guild."""
        self._logs.setdefault(guild_id, GuildLog(self._settings, self.position))

    def drop(self, guild_id: str) -> None:
        """Nobody is any more."""
        del self._logs[guild_id]

    def add(self, to: Destination, packet: bytes, position: int = 0) -> RoomFrame:
        """The event as it goes out, of the next position if of none; it is kept where somebody is owed it."""
        position = position or self.position + 1
        self.reach(position)
        guild_log = self._logs.get(to.guild_id)
        if guild_log is None:
            return RoomFrame.of(packet)
        frame = RoomFrame.of(packet, encode_offset(position))
        guild_log.add(Logged(position, time.monotonic(), to, frame.tracked))
        return frame

    def since(self, guild_id: str, position: int) -> list[Logged] | None:
        """What came in the guild after it, oldest first; None where some of that is here no more."""
        return self._logs[guild_id].since(position)

    def reaches(self, guild_id: str, position: int, heard_elsewhere: bool) -> bool:
        """Whether all is here that came in the guild after that, to the clients of this node or of all."""
        guild_log = self._logs.get(guild_id)
        return guild_log is not None and guild_log.reaches(position, heard_elsewhere)

    def fill(self, guild_id: str, since: int, events: Iterable[Logged]) -> bool:
        """Put before what is here of a guild what else has come after `since`, oldest first.

        Returns whether all that came since is here then.
        """
        guild_log = self._logs.get(guild_id)
        return guild_log is not None and guild_log.fill(since, events)


class Pids:
    """Private ids of tickets, each bound to its viewer: whoever else says one is told apart at once."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def make(self, discord_id: str) -> str:
        nonce = secrets.token_urlsafe(12)
        return f"{nonce}.{self._signature(nonce, discord_id)}"

    def _signature(self, nonce: str, discord_id: str) -> str:
        made = hmac.digest(self._key, f"{nonce}:{discord_id}".encode(), "sha256")
        return urlsafe_b64encode(made[:18]).decode()

    def is_genuine(self, pid: object, discord_id: str) -> bool:
        """Whether this viewer was given it."""
        if not isinstance(pid, str) or len(pid) > 64 or not pid.isascii():
            return False
        nonce, _, signature = pid.partition(".")
        expected = self._signature(nonce, discord_id)
        return hmac.compare_digest(signature.encode(), expected.encode())


class Recovery:
    """Keeps tickets for as long as their clients may come back, and says what each is owed."""

    def __init__(
        self,
        settings: RecoverySettings,
        key: bytes,
        changed: Callable[[Ticket], None] = lambda ticket: None,
    ) -> None:
        """Pids are signed with the key; `changed` hears of every change of a held ticket."""
        self._window = settings.window
        self.logs = GuildLogs(settings)
        self.pids = Pids(key)
        self._changed = changed
        self._tickets: dict[str, Ticket] = {}
        self._awaited: collections.OrderedDict[str, Ticket] = collections.OrderedDict()
        self._in_room: collections.Counter[str] = collections.Counter()  # tickets, by room
        self._in_guild: collections.Counter[str] = collections.Counter()
        self._of_viewer: collections.Counter[str] = collections.Counter()

    @property
    def enabled(self) -> bool:
        return self._window > 0

    def has_listeners(self, room: str) -> bool:
        """Whether somebody is, or may come back, who is owed what goes to the room."""
        self._forget_late()
        return room in self._in_room

    def rooms(self) -> Iterable[str]:
        """Those of which somebody is owed what goes to them."""
        self._forget_late()
        return tuple(self._in_room)

    # -- tickets

    def issue(self, viewer: Viewer) -> Ticket:
        """A ticket for a new session of this viewer."""
        ticket = Ticket(self.pids.make(viewer.discord_id), viewer)
        self._register(ticket)
        self._changed(ticket)
        return ticket

    def adopt(self, ticket: Ticket) -> None:
        """A client is awaited here that had its ticket elsewhere; what is here of it is outdated."""
        if (before := self._tickets.get(ticket.pid)) is not None:
            self._drop(before)
        self._register(ticket)
        rooms, ticket.rooms = ticket.rooms, {}
        for room, position in rooms.items():
            self.enter(ticket, room)
            ticket.rooms[room] = position
        self.await_return(ticket)

    def _register(self, ticket: Ticket) -> None:
        self._tickets[ticket.pid] = ticket
        self._of_viewer[ticket.viewer.discord_id] += 1

    def find(self, pid: object, discord_id: str) -> Ticket | None:
        """The ticket that this viewer was given, if it is here."""
        self._forget_late()
        return self._tickets.get(str(pid)) if self.pids.is_genuine(pid, discord_id) else None

    def disown(self, pid: str) -> None:
        """Its client has come back elsewhere."""
        if (ticket := self._tickets.get(pid)) is not None:
            self._drop(ticket)

    def held(self) -> list[Ticket]:
        """Those whose clients are connected."""
        return [ticket for ticket in self._tickets.values() if ticket.until == math.inf]

    def has(self, ticket: Ticket) -> bool:
        return ticket.pid in self._tickets

    def hold(self, ticket: Ticket) -> None:
        """Its client is connected."""
        ticket.until = math.inf
        self._awaited.pop(ticket.pid, None)
        self._changed(ticket)

    def await_return(self, ticket: Ticket) -> None:
        """Its client has lost its connection."""
        if self._tickets.get(ticket.pid) is not ticket:
            return  # it has come back elsewhere
        ticket.until = time.monotonic() + self._window
        self._awaited[ticket.pid] = ticket
        if len(self._awaited) > MOST_REMEMBERED:
            self.forget(next(iter(self._awaited.values())))

    def forget(self, ticket: Ticket) -> None:
        """Its client will not come back with it."""
        self._drop(ticket)
        self._changed(ticket)

    def _drop(self, ticket: Ticket) -> None:
        self._awaited.pop(ticket.pid, None)
        if self._tickets.pop(ticket.pid, None) is not None:
            remove_one(self._of_viewer, ticket.viewer.discord_id)
        for room in tuple(ticket.rooms):
            self._leave(ticket, room)

    def has_ticket(self, discord_id: str) -> bool:
        """Whether a client of this viewer's is there, or awaited, that can recover."""
        return discord_id in self._of_viewer

    def viewers(self) -> Iterable[str]:
        """Whose clients these are, by Discord id."""
        return tuple(self._of_viewer)

    def awaited(self, guild_id: str) -> list[Ticket]:
        """Those of clients that have lost their connection in a room of this guild."""
        self._forget_late()
        return [
            ticket
            for ticket in (self._awaited.values() if guild_id in self._in_guild else ())
            if guild_id in map(room_guild, ticket.rooms)
        ]

    def _forget_late(self) -> None:
        now = time.monotonic()
        while self._awaited and (first := next(iter(self._awaited.values()))).until < now:
            self._drop(first)

    def enter(self, ticket: Ticket, room: str) -> None:
        """From now on its client is owed what goes to the room."""
        if room not in ticket.rooms:
            ticket.rooms[room] = self.logs.position
            guild_id = room_guild(room)
            self._in_room[room] += 1
            self._in_guild[guild_id] += 1
            self.logs.keep(guild_id)
            self._changed(ticket)

    def wait_for(self, ticket: Ticket, room: str) -> None:
        """Its client is to be in the room once it is known that it may."""
        ticket.pending.add(room)
        self._changed(ticket)

    def list_for(self, ticket: Ticket) -> None:
        """Its client is told which guilds there are, also after it has come back."""
        if not ticket.lists:
            ticket.lists = True
            self._changed(ticket)

    def leave(self, ticket: Ticket, room: str) -> None:
        """Its client is owed nothing more of the room."""
        self._leave(ticket, room)
        self._changed(ticket)

    def _leave(self, ticket: Ticket, room: str) -> None:
        if ticket.rooms.pop(room, None) is not None:
            guild_id = room_guild(room)
            ticket.unseen.pop(room, None)
            remove_one(self._in_room, room)
            remove_one(self._in_guild, guild_id)
            if guild_id not in self._in_guild:
                self.logs.drop(guild_id)

    def missed(self, ticket: Ticket, offset: object) -> list[Logged] | None:
        """All that its client has missed of its rooms, in order; None where that is not here whole."""
        seen = decode_offset(offset)
        if seen is None or seen.position > self.logs.position:  # of a process whose clock was ahead
            return None
        missed: list[Logged] = []
        for guild_id, position in ticket.since(seen.position).items():
            events = self.logs.since(guild_id, position)
            if events is None:
                return None
            missed += [
                event
                for event in events
                if event.position > max(seen.position, ticket.rooms.get(event.to.room, math.inf))
            ]
        return sorted(missed)

    def number_snapshot(self, ticket: Ticket, room: str) -> str:
        """The offset of a snapshot of the room that its client is sent now."""
        ticket.snapshots += 1
        ticket.unseen[room] = Seen(self.logs.position, ticket.snapshots)
        self._changed(ticket)
        return encode_offset(self.logs.position, ticket.snapshots)

    @staticmethod
    def rooms_without_snapshot(ticket: Ticket, offset: object) -> list[str]:
        """Those of which its client, by what it says, has not received what it was sent last."""
        seen = decode_offset(offset) or Seen(0)
        ticket.unseen = {
            room: sent for room, sent in ticket.unseen.items() if sent is None or sent > seen
        }
        return list(ticket.unseen)


def room_guild(room: str) -> str:
    return room.partition(":")[2]


#: An offset as this server makes them, in base64 without padding: at most 48 bits, and a number.
OFFSET: Final = re.compile(r"((?:[\w-]{4})?[\w-]{2,4})(?:\.(\d{1,9}))?", re.ASCII)
#: What is believed of another process's count: a client that lies could have all offsets be longer.
MOST_BELIEVED: Final = 1 << 40


def encode_offset(position: int, snapshots: int = 0) -> str:
    """In as few bytes as can be: they go out with every event."""
    data = position.to_bytes((position.bit_length() + 7) // 8 or 1, "big")
    offset = urlsafe_b64encode(data).decode().rstrip("=")
    return f"{offset}.{snapshots}" if snapshots else offset


def decode_offset(offset: object) -> Seen | None:
    """How far a client is that says this; None for what is no offset."""
    found = OFFSET.fullmatch(offset) if isinstance(offset, str) else None
    if found is None:
        return None
    position, snapshots = found.groups(default="0")
    return Seen(int.from_bytes(urlsafe_b64decode(position + "=="), "big"), int(snapshots))


# ----------------------------------------------------------------------------- throttle
# How often one event may go to one room of one guild: the first time at once, then once per
# window with the newest content, so that the last change is never lost. It knows names and
# seconds; what is sent, to whom and how is not its business.

#: The fields of an event.
EventData = dict[str, Any]
#: Takes an event for one client: its name and fields.
Tell = Callable[[str, EventData], None]
#: The fields, or what makes them once they are really sent; None then sends nothing.
DataOrMaker = EventData | Callable[[], Awaitable[EventData | None]]
#: Windows that one event may have open in one room for members, each its own; who comes then
#: shares one with all others who do.
MOST_MEMBER_WINDOWS: Final = 1_000


class Topic(NamedTuple):
    """What has a window of its own."""

    event: str
    guild_id: str
    kind: str
    #: Whom an event with a `userId` is about; empty where it has none.
    member: str = ""


class Timer(Protocol):
    """What `call_later` gives back."""

    def cancel(self) -> None: ...


def call_later(seconds: float, callback: Callable[..., object], *args: object) -> Timer:
    """The clock of the running loop."""
    return asyncio.get_running_loop().call_later(seconds, callback, *args)


class Outlet(Protocol):
    """Where events go that may leave now."""

    def has_listeners(self, guild_id: str, kind: str) -> bool: ...

    def deliver(self, event: str, guild_id: str, fields: EventData, kind: str) -> None: ...

    def window_changed(
        self, topic: Topic, seconds: float | None, waiting: DataOrMaker | None
    ) -> None:
        """A window opens or ends, or other content waits for its end.

        It stays open for `seconds` (None: as long as before); `waiting` is still to be sent.
        """


class Throttle:
    """Holds events back for as long as their window says; keeps only windows that are open.

    What nobody listens to is neither made nor held. A window opens when its content is about to
    be made, and lasts from when that was sent; it ends however that goes.
    """

    def __init__(
        self,
        windows: Mapping[str, float],
        outlet: Outlet,
        metrics: Metrics,
        maker_timeout: float = 5.0,
        call_later: Callable[..., Timer] = call_later,
    ) -> None:
        #: Seconds by event; those without a row are not held. May be replaced at any time.
        self.windows = windows
        self._outlet = outlet
        self._metrics = metrics
        self._maker_timeout = maker_timeout
        self._call_later = call_later
        self._newest: dict[Topic, DataOrMaker | None] = {}  # what waits for the end of its window
        self._of_members: collections.Counter[Topic] = collections.Counter()
        self._timers: dict[Topic, Timer] = {}
        self._making: set[asyncio.Task[None]] = set()
        self._closing = False

    def __len__(self) -> int:
        """Windows open now."""
        return len(self._newest)

    def emit(self, event: str, guild_id: str, content: DataOrMaker, kind: str) -> None:
        """Send now, or at the end of the window unless something newer comes. Never waits."""
        if event not in self.windows and not callable(content):
            self._outlet.deliver(event, guild_id, content, kind)
        elif not self._outlet.has_listeners(guild_id, kind):
            if not callable(content):  # what is not made is no event
                self._metrics.dropped.labels("nobody listens").inc()
        elif event in self.windows:
            self._hold(self._topic(event, guild_id, content, kind), content)
        elif callable(content):
            self._send_soon(Topic(event, guild_id, kind), content, held=False)

    def resume(self, topic: Topic, seconds: float, waiting: DataOrMaker | None) -> None:
        """Go on with a window that another throttle opened: so long it is still open."""
        if topic not in self._newest:
            self._enter(topic, waiting)
            self._timers[topic] = self._call_later(seconds, self._end, topic)

    async def close(self) -> None:
        """Forget all that is held and end what is being made; nobody is told of that."""
        self._closing = True
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)
        self._closing = False
        for timer in self._timers.values():
            timer.cancel()
        self._newest.clear()
        self._of_members.clear()
        self._timers.clear()

    # -- windows

    def _topic(self, event: str, guild_id: str, content: DataOrMaker, kind: str) -> Topic:
        everybody = Topic(event, guild_id, kind)
        member = "" if callable(content) else str(content.get("userId") or "")
        topic = everybody._replace(member=member)
        full = self._of_members[everybody] >= MOST_MEMBER_WINDOWS
        return everybody if full and topic not in self._newest else topic

    def _enter(self, topic: Topic, waiting: DataOrMaker | None) -> None:
        if topic not in self._newest and topic.member:
            self._of_members[topic._replace(member="")] += 1
        self._newest[topic] = waiting

    def _hold(self, topic: Topic, content: DataOrMaker) -> None:
        if topic in self._newest:
            self._metrics.throttled.labels(topic.event).inc()
            self._newest[topic] = content
            self._outlet.window_changed(topic, None, content)
        else:
            self._open(topic, content)

    def _open(self, topic: Topic, content: DataOrMaker) -> None:
        self._enter(topic, None)
        self._outlet.window_changed(topic, 0.0, content)
        if callable(content):
            self._send_soon(topic, content, held=True)
        else:
            try:
                self._send(topic, content)
            finally:
                self._start(topic)

    def _start(self, topic: Topic) -> None:
        seconds = self.windows.get(topic.event, 0.0)
        self._timers[topic] = self._call_later(seconds, self._end, topic)
        self._outlet.window_changed(topic, seconds, self._newest[topic])

    def _end(self, topic: Topic) -> None:
        del self._timers[topic]
        content = self._newest[topic]
        if content is not None and self._outlet.has_listeners(topic.guild_id, topic.kind):
            with self._logging(topic):
                self._open(topic, content)
            return
        del self._newest[topic]
        if topic.member:
            everybody = topic._replace(member="")
            self._of_members[everybody] -= 1
            if not self._of_members[everybody]:
                del self._of_members[everybody]
        self._outlet.window_changed(topic, 0.0, None)

    # -- sending

    def _send(self, topic: Topic, fields: EventData) -> None:
        self._outlet.deliver(topic.event, topic.guild_id, fields, topic.kind)

    def _send_soon(
        self, topic: Topic, make: Callable[[], Awaitable[EventData | None]], held: bool
    ) -> None:
        task = asyncio.create_task(self._make(topic, make, held))
        self._making.add(task)
        task.add_done_callback(self._making.discard)

    async def _make(
        self, topic: Topic, make: Callable[[], Awaitable[EventData | None]], held: bool
    ) -> None:
        try:
            with self._logging(topic):
                async with asyncio.timeout(self._maker_timeout):
                    fields = await make()
                if fields is not None and not self._closing:
                    self._send(topic, fields)
        finally:
            # While closing, it is still to be sent: by whoever goes on with the window.
            if held and not self._closing:
                self._start(topic)

    @contextlib.contextmanager
    def _logging(self, topic: Topic) -> Iterator[None]:
        """Nobody is there to be told of what goes wrong in a task or at the end of a window."""
        try:
            yield
        except TimeoutError:
            log.error("%s: not made within %s s", topic.event, self._maker_timeout)
        except Exception as error:  # an encoder's, of whatever a plugin put into an event
            log.error("%s could not be sent: %s", topic.event, type(error).__name__)


# --------------------------------------------------------------------------- plugin API
# The contract with plugin authors, and all of it: what is in `__all__` is API, the rest of
# this file is not. Decorators only mark functions; the plugin host acts on the marks.

#: What Discord puts in place of the name of a channel that the bot may not see.
HIDDEN_CHANNEL_NAME: Final = "___hidden___"
Maker = TypeVar("Maker", bound=Callable[..., Any])
HandlerT = TypeVar("HandlerT", bound=type[RequestHandler])


class Payload(msgspec.Struct, rename="camel", kw_only=True):
    """Base of an event's fields: snake_case in Python, camelCase on the wire.

        class MessageDelete(Payload):
            message_id: str
            channel_id: str

    The values are checked against the annotations when they go out; a `hikari.Snowflake` becomes
    a string, a `datetime` ISO 8601. The host adds `guildId` and, where the payload has none,
    `timestamp`. A payload with a `channel_id` reaches only viewers who may see that channel.
    """


#: A payload, or an async function that makes one (or None) when it is really sent.
PayloadOrMaker = Payload | dict[str, Any] | Callable[[], Awaitable[Payload | dict[str, Any] | None]]


class PluginSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base of a plugin's `class Settings`: the keys of its `[plugin.NAME]` table in config.toml.

        class Settings(PluginSettings, frozen=True):
            #: Characters shown.
            longest: Annotated[int, Meta(ge=1)] = 80

    Give each key a type and a default. Wrong values are refused with their key path, what does not
    fit together by `__post_init__` with `ValueError("key: what is wrong", …)`; what is in force is
    `spy.settings`, which follows a reload of the settings. What a key that ends with `_file` names
    is relative to config.toml; it comes as a whole path.
    """

    @property
    def needs_secret(self) -> bool:
        """Whether the plugin, set like this, calls `spy.key` or `spy.issue_token`: a server
        without a secret then does not start.
        """
        return False


class Mark(msgspec.Struct, frozen=True):
    """What a decorator notes on a function: for which hook it is, and what it was given."""

    #: A key of HOOKS.
    hook: str
    #: The event that `on` hears, the seconds of `every`, the pattern of `route`.
    of: Any = None
    emit: str | None = None
    room: str = "guild"
    settled: bool = False
    bots: bool = False


#: The attribute that marks are kept in.
MARKS: Final = "__spywatcher__"
#: What the host calls in a plugin, by decorator or by its name in the module, and what a function
#: for it may take; `route` has classes. Besides there are `class Settings(PluginSettings)` and `needs`.
HOOKS: Final[dict[str, tuple[str, ...]]] = {
    "@on": ("event", "event, spy"),
    "@every": ("spy",),
    "@on_subscribe": ("guild_id, spy", "guild_id, spy, viewer"),
    "@route": (),
    "setup": ("spy",),
    "teardown": ("spy",),
    "forget": ("storage, member_id, guild_id",),
}


class Need(NamedTuple):
    """What hikari keeps only for plugins that say so."""

    components: hikari.api.CacheComponents
    #: What Discord has to send for that.
    event: type[hikari.Event]
    #: The beginnings of the attributes that are empty without it.
    attributes: tuple[str, ...]


CACHE: Final = hikari.api.CacheComponents
#: What a plugin may put into `needs`.
NEEDS: Final = {
    "activities": Need(CACHE.PRESENCES, hikari.PresenceUpdateEvent, ("activities", "get_presence")),
    "emojis": Need(CACHE.EMOJIS, hikari.EmojisUpdateEvent, ("old_emoji", "get_emoji")),
    "invites": Need(CACHE.INVITES, hikari.InviteCreateEvent, ("old_invite", "get_invite")),
    "messages": Need(
        CACHE.MESSAGES, hikari.GuildMessageCreateEvent, ("old_message", "get_message")
    ),
    "stickers": Need(
        CACHE.GUILD_STICKERS, hikari.StickersUpdateEvent, ("old_sticker", "get_sticker")
    ),
    "voice": Need(
        CACHE.VOICE_STATES, hikari.VoiceStateUpdateEvent, ("old_state", "get_voice_state")
    ),
}


def marked(function: Maker, mark: Mark) -> Maker:
    """The same function (or class) with one more mark on it."""
    setattr(function, MARKS, [*vars(function).get(MARKS, ()), mark])
    return function


def on(
    event: type[hikari.Event] | str,
    *,
    emit: str | None = None,
    room: str = "guild",
    settled: bool = False,
    bots: bool = False,
) -> Callable[[Maker], Maker]:
    """Call the function for each such event, as `(event)` or `(event, spy)`; it may be async.

        @on(hikari.GuildMessageDeleteEvent, emit="message:delete")
        def message_delete(event):
            return MessageDelete(message_id=event.message_id, channel_id=event.channel_id)

    What it returns, a Payload or a dict, goes out as the Socket.IO event `emit` to the room
    `room:GUILD_ID` of `event.guild_id`; None sends nothing. Without `emit` it only listens.

    `event` is a class of hikari's, or the name of another plugin's event: then the function is
    handed that event's fields, a dict, as they go out.

        @on("alert:multiClient")
        async def notify(fields, spy): ...

    What bots, webhooks and Discord's own users do, and what comes of somebody of whom nobody knows
    yet who that is, is no event, unless `bots=True`. With `settled`, nothing is sent within
    `[discord] startup_grace` of a new gateway session, while what looks like news is only Discord
    telling how things stand.
    """
    check_source(event, emit)
    if emit is not None:
        check_name("emit", emit)
    check_kind(room)
    return lambda function: marked(function, Mark("@on", event, emit, room, settled, bots))


def every(seconds: float) -> Callable[[Maker], Maker]:
    """Call the function, plain or async, with `(spy)`, again and again.

        @every(60)
        async def look(spy): ...

    First after `seconds`, then that long after each time it has ended. What it raises is logged
    and counted, and it goes on. Of several nodes (docs/scale.md) only the one that holds the
    gateway calls it: a plugin is at work there alone, from its `setup` to its `teardown`.
    """
    given: object = seconds  # the function itself, where the brackets were left out
    if not isinstance(given, int | float) or not 0 < given < math.inf:
        raise PluginError(f"every({shown(given)}): expected seconds, as in @every(60)")
    return lambda function: marked(function, Mark("@every", seconds))


def on_subscribe(kind: str, *, emit: str) -> Callable[[Maker], Maker]:
    """Call the function, plain or async, with `(guild_id, spy)` when a client enters a room.

        @on_subscribe("guild", emit="stats:update")
        def newest(guild_id, spy):
            return {"messages": counted[guild_id]}

    The room is `kind:guild_id`. What is returned goes to that client alone, as the event `emit`,
    after the answer to its subscription; None sends nothing. With a third argument it is handed
    the `Subscriber`, whose `may_see` says which channels to leave out.
    """
    check_kind(kind)
    check_name("emit", emit)
    return lambda function: marked(function, Mark("@on_subscribe", emit=emit, room=kind))


def route(pattern: str) -> Callable[[HandlerT], HandlerT]:
    """Serve this `tornado.web.RequestHandler` at each path that the pattern matches as a whole.

        @route(r"/stats/([0-9]+)")
        class Stats(tornado.web.RequestHandler):
            def get(self, guild_id):
                self.finish({"messages": counted[guild_id]})

    Groups are handed to `get`, `post` and so on. `self.spy` is the plugin's. Every node serves
    it, from the plugin's loading to its removal; the server's own paths come first. Anybody may
    ask: what is not for everybody, the handler has to guard.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise PluginError(f"route({shown(pattern)}): {error}") from error
    if not pattern.startswith("/"):
        raise PluginError(f"route({shown(pattern)}): expected a path that begins with /")

    def mark(handler: Any) -> Any:
        if not (isinstance(handler, type) and issubclass(handler, RequestHandler)):
            raise PluginError(f"route({shown(pattern)}) belongs on a RequestHandler")
        return marked(handler, Mark("@route", pattern))

    return mark


def check_source(event: object, emit: str | None) -> None:
    """Refuse what `on` cannot listen to, or has no guild to emit to; raises PluginError."""
    if isinstance(event, str):
        check_name("on", event)
        for name in (f"Guild{event}Event", f"Guild{event}", f"{event}Event", event):
            if hasattr(hikari, name):
                raise PluginError(
                    f'on("{event}") names no plugin\'s event: write on(hikari.{name})'
                )
    elif not (isinstance(event, type) and issubclass(event, hikari.Event)):
        came = getattr(event, "__name__", shown(event))
        raise PluginError(
            f"on({came}): expected a class of hikari's events or the name of a plugin's event"
        )
    elif emit and not has_guild(event):
        raise PluginError(f"on({event.__name__}) has no guild_id: leave emit= out, use spy.emit")


def has_guild(event_type: type[hikari.Event]) -> bool:
    """Whether events of this type, or of a narrower one, say of which guild they are."""
    return hasattr(event_type, "guild_id") or any(map(has_guild, event_type.__subclasses__()))


def check_name(where: str, name: object) -> None:
    """Refuse what cannot be an event's name; raises PluginError."""
    if not isinstance(name, str) or not name or clean_text(name) != name or len(name) > 100:
        raise PluginError(f"{where}: got {shown(name)}, expected an event's name")


def check_kind(kind: object) -> None:
    """Refuse what cannot be a kind of room; raises PluginError."""
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,49}", kind):
        raise PluginError(f"got {shown(kind)}, expected a kind of room: letters, digits, - and _")


def user_name(user: hikari.User) -> str:
    """An account's username as it may leave: `ada`; the id where nothing of it can be seen.

        user_name(event.author)

    Of this and the other names, what is invisible is removed (but for what emoji and scripts need);
    usernames have 64 characters at most, other names 100.
    """
    return shown_name(user.username, user.id, USERNAME_LENGTH)


def member_name(cache: hikari.api.Cache, guild_id: int, user_id: int) -> str:
    """A member's username as it is now; the id while Discord has not sent the member.

        member_name(spy.bot.cache, event.guild_id, event.user_id)

    Asks for the member, not the user: hikari 2.7 drops users still cached as members once one of
    their messages leaves its cache.
    """
    user = CacheReader(cache).get_user(guild_id, user_id)
    return user_name(user) if user else str(int(user_id))


def role_name(role: hikari.Role) -> str:
    """A role's name as it may leave.

        [role_name(role) for role in event.member.get_roles()]

    Where nothing of it can be seen, it is the id.
    """
    return shown_name(role.name, role.id, NAME_LENGTH)


def channel_name(cache: hikari.api.Cache, channel_id: int) -> str:
    """The name of a channel or thread.

        channel_name(spy.bot.cache, event.channel_id)

    Where Discord hides the name or has not sent it, it is the id.
    """
    known = CacheReader(cache)
    channel = known.get_guild_channel(channel_id) or known.get_thread(channel_id)
    name = channel.name if channel else None
    return shown_name(None if name == HIDDEN_CHANNEL_NAME else name, channel_id, NAME_LENGTH)


def timestamp(moment: datetime | None = None) -> str:
    """A moment as it goes out.

        timestamp(event.message.created_at)  # "2026-01-02T03:04:05.678Z"

    That is ISO 8601 in UTC with milliseconds and `Z`; now, unless a moment is given.
    """
    if moment is not None:
        utc = moment.astimezone(UTC)
        return utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return moment_as_text(time.time_ns() // 1_000_000)


@functools.lru_cache(maxsize=1)
def moment_as_text(milliseconds: int) -> str:
    """Made once a millisecond: most events go out with the time of now."""
    return timestamp(datetime.fromtimestamp(milliseconds / 1000, UTC))


class News(NamedTuple):
    """What `Shared.write` has to tell."""

    #: Redis was restarted since the last write: what it had may be lost, what it lost may be back.
    restarted: bool
    #: (guild or None for all, member) that the command line has had forgotten in the last
    #: minutes, told once to each node that begins to hold the gateway. Their
    #: entries are removed; what else the plugin has of them is for it to remove.
    forgotten: list[tuple[int | None, int]]


class Shared(Protocol):
    """What a plugin keeps of members for all nodes of a service, in Redis; `spy.shared`.

        async for chunk in spy.shared.read():
            counts.add(json.loads(chunk))
        await spy.shared.write('{"5:2026-01": [86400, {"7": "3 messages"}]}')

    Tables of texts, one text a member. A table is named `GUILD_ID:ANYTHING`, a member by its id;
    so `spywatcher.py forget` finds what it has to remove. Chunks and changes are JSON, for a
    thread to make and take, SQLite's for one. Of all nodes one has this at a time, from a
    plugin's `setup` to its `teardown`: read all, then write what is new every now and then.
    Both raise ConnectionError while Redis does not answer, `write` for good once another node
    holds the gateway: keep what is new, and try again for as long as the plugin is at work.
    """

    def read(self) -> AsyncIterator[str]:
        """All that there is, in chunks `{table: {member: text}}`; a member may come twice."""

    async def write(self, changes: str) -> News:
        """Change some, all or none: `{table: [seconds, {member: text}]}`; null removes a text.

        The table goes by itself when nothing was written to it for that many seconds. A few
        hundred members at a time keep Redis quick for others.
        """


class Marks(Protocol):
    """Names that all nodes remember for a while, in Redis: what is used up, who has signed out.

        if not await spy.marks.put(f"used {code}", 600):
            raise tornado.web.HTTPError(400)

    Both raise ConnectionError while Redis does not answer.
    """

    async def put(self, name: str, seconds: float) -> bool:
        """Remember a name for so long; False, and nothing else, if it is remembered already."""

    async def has(self, name: str) -> bool:
        """Whether a name is remembered."""


class Presence(NamedTuple):
    """How a member appears, as `spy.presence` tells it:

        Presence(status="dnd", platforms=frozenset({"desktop", "mobile"}))

    Whoever is offline is on no platform.
    """

    #: online, idle, dnd or offline
    status: str
    #: Of desktop, mobile and web those that the member is on.
    platforms: frozenset[str]


class PresenceUpdateEvent(hikari.PresenceUpdateEvent):
    """hikari's event, as plugins hear it: it tells, too, how the member appeared `before`, and `now`.

        @on(PresenceUpdateEvent, emit="gone")
        def gone(event):
            return {"userId": str(event.user_id)} if event.now.status == "offline" else None

    Who is not known appeared as None before. hikari's objects (`presence`, `old_presence`, `user`)
    are made when they are first asked for: these two cost a tenth.
    """

    __slots__ = ("_make", "before", "guild_id", "now", "user_id")

    guild_id: hikari.Snowflake
    user_id: hikari.Snowflake
    before: Presence | None
    now: Presence

    def __init__(
        self,
        shard: hikari.api.GatewayShard,
        guild_id: hikari.Snowflake,
        user_id: hikari.Snowflake,
        appeared: tuple[Presence | None, Presence],
        make: Callable[[], hikari.PresenceUpdateEvent],
    ) -> None:
        self.shard, self.guild_id, self.user_id = shard, guild_id, user_id
        self.before, self.now = appeared
        self._make = make

    def __getattr__(self, name: str) -> Any:
        """hikari's fields, which are empty at first."""
        if name not in ("presence", "old_presence", "user"):
            raise AttributeError(name)
        made = self._make()
        self.presence, self.old_presence, self.user = made.presence, made.old_presence, made.user
        return getattr(self, name)


class Subscriber(msgspec.Struct, frozen=True):
    """Who has subscribed, for a function of `on_subscribe` with three arguments.

    @on_subscribe("guild", emit="voice:snapshot")
    def snapshot(guild_id, spy, viewer):
        return {"channels": [one for one in talking(guild_id) if viewer.may_see(one["id"])]}
    """

    #: The Discord id of the viewer's token, and the token's role: USER, ADMIN or MODERATOR.
    discord_id: str
    role: str
    #: Whether the viewer may see a channel or thread of the guild, by its id.
    may_see: Callable[[int | str], bool]


class Spy:
    """What a plugin is handed: its settings, its log, the bot, and the way to the dashboards.

    @on(hikari.RoleCreateEvent)
    def role_create(event, spy):
        if spy.settings.verbose:
            spy.log.info("a role more in %s", event.guild_id)
        spy.emit("role:create", event.guild_id, {"name": event.role.name})
    """

    def __init__(
        self,
        name: str,
        settings: Any,
        context: HostContext,
        metrics: Metrics,
        emit: Callable[..., None],
    ) -> None:
        #: The `[plugin.NAME]` table: the plugin's `Settings`, or a dict if it has none.
        self.settings = settings
        #: A logger that names the plugin.
        self.log = logging.getLogger(f"spywatcher.plugin.{name}")
        #: hikari's bot: cache and REST.
        self.bot = context.bot
        #: The SQLite file of `[storage] path`, which the shipped plugin `analytics` keeps; `history`
        #: has its own beside it.
        self.storage = context.storage
        #: What all nodes keep together; None in a single process.
        self.shared: Shared | None = None
        #: What all nodes remember, on each of them; None in a single process.
        self.marks = context.marks(name)
        #: Where Discord's REST API answers: what `hikari.RESTApp` takes as `url`.
        self.rest_url = context.rest_url
        #: Held by one instance of the plugin at a time. On a reload the fresh one is set up before
        #: the `teardown` of the old one: what must not be done by both is done under this.
        self.alone = context.alone(name)
        self._name = name
        self._context = context
        self._metrics = metrics
        self._emit = emit
        self._problem: str | None = None

    @property
    def data_dir(self) -> Path:
        """The folder for files that a plugin keeps: where `[storage] path` is."""
        return self.storage.parent

    def count(self, what: str, amount: float = 1) -> None:
        """Add to `spywatcher_plugin_counts_total{plugin, what}` in /metrics; few different `what`s."""
        self._metrics.plugin_counts.labels(self._name, what).inc(amount)

    def emit(
        self, event: str, guild_id: int | str, payload: PayloadOrMaker, room: str = "guild"
    ) -> None:
        """Send an event to the room `room:guild_id`, as returning it from a listener does.

        Instead of a payload it may be an async function that makes it. That is called only when
        the event is really sent: not while nobody listens, and once per window of `[throttle]`.
        """
        self._emit(event, str(int(guild_id)), payload, room)

    def presence(self, guild_id: int | str, user_id: int | str) -> Presence | None:
        """How a member, or a bot, appears now; None of whom Discord has not sent.

            spy.presence(event.guild_id, event.user_id).status

        It is kept for plugins that hear `hikari.PresenceUpdateEvent`; for others all are offline.
        """
        return self._context.presences.of(int(guild_id), int(user_id))

    def online(self, guild_id: int | str) -> list[int]:
        """The ids of the guild's members who are not offline; bots are left out."""
        return self._context.presences.online(int(guild_id))

    def issue_token(
        self, discord_id: str, role: Role = "USER", ttl: float = 900.0, guilds: Sequence[str] = ()
    ) -> str:
        """A token with which a dashboard may connect for `ttl` seconds; signed with `[auth] secret`.

        `guilds` are those that it may view, whatever Discord says; none: what Discord says counts.
        Raises an exception where the server has no secret.
        """
        return self._context.tokens.issue(discord_id, role, guilds, ttl)

    def key(self, purpose: str) -> bytes:
        """32 bytes for signatures of the plugin's own, derived from `[auth] secret`.

        The same for a plugin and a purpose on every node and after every restart, until the secret
        is changed. Raises an exception where the server has none.

            hmac.digest(spy.key("cookie"), value, "sha256")
        """
        return self._context.tokens.derive_key(f"plugin {self._name}: {purpose}")

    def address(self, request: HTTPServerRequest) -> str:
        """Whom a request counts for: the client's address, behind a trusted proxy too; of IPv6 the /64."""
        return self._context.address(request)

    def lists_origin(self, origin: str) -> bool:
        """Whether `[server] cors_origins` names this page's origin; "*" and "null" name nobody."""
        return self._context.lists_origin(origin)

    @property
    def problem(self) -> str | None:
        """What keeps this plugin from its work, for the operator to read in /health/ready; or None.

        A change is logged, and each time that a problem is set it counts as a fault.
        """
        return self._problem

    @problem.setter
    def problem(self, text: str | None) -> None:
        if text is not None:
            self._metrics.plugin_failures.labels(self._name).inc()
        if text != self._problem:
            level = logging.INFO if text is None else logging.WARNING
            self.log.log(level, "%s", text or "all is well again")
        self._problem = text


# -------------------------------------------------------------------------- plugin host
# Finds, loads, starts, calls and stops plugins, and keeps one's faults from all others. It
# knows the marks of the plugin API; it knows no event, no socket and no room but by name.
#
# The way of an event: Dispatcher (one subscription for each event type) -> Guarded (one function
# of one plugin) -> Runner (that plugin at work) -> HostContext.emit.

#: The package of all plugins' modules.
PLUGINS_PACKAGE: Final = "spywatcher_plugins"
#: Socket.IO's own names and the server's; clients could not tell a plugin's from these.
RESERVED_EVENTS: Final = frozenset(
    {"connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"}
    | {"error", "session", "auth:expiring", "auth:refresh", "guilds:list", "guilds:update"}
)
#: What a plugin's function may raise and the server goes on. `SystemExit` ends nothing here.
FAULTS: Final = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)


class HostContext(NamedTuple):
    """What one server gives all of its plugins to work with."""

    bot: Bot
    presences: Presences
    #: The way to the rooms: event, guild id, content, kind of room.
    emit: Callable[[str, str, DataOrMaker, str], None]
    #: Whether the gateway session is past its startup grace.
    settled: Callable[[], bool]
    #: Whether a guild is one of those to be watched.
    watches: Callable[[int | str], bool]
    storage: Path
    #: What a plugin of this name keeps for all nodes; None where there is one.
    share: Callable[[str], Shared | None] = lambda name: None
    #: What signs tokens, and what plugins sign themselves.
    tokens: Tokens = Tokens(Keys(), ())
    #: Whether a viewer of a guild may see a channel of it.
    may_see: Callable[[Viewer, str, str], bool] = lambda viewer, guild_id, channel_id: True
    #: What a plugin of this name has all nodes remember; None where there is one.
    marks: Callable[[str], Marks | None] = lambda name: None
    rest_url: str = ""
    #: Whom a request counts for.
    address: Callable[[HTTPServerRequest], str] = lambda request: ""
    #: Whether a page of this origin is named in the settings.
    lists_origin: Callable[[str], bool] = lambda origin: False
    #: The lock of all instances of a plugin of this name.
    alone: Callable[[str], asyncio.Lock] = lambda name: asyncio.Lock()


# -- what goes out

#: The largest whole number that JavaScript's numbers hold exactly: Number.MAX_SAFE_INTEGER.
SAFE_INTEGER: Final = 2**53 - 1
MOST_NESTED: Final = 16
PAYLOADS: Final = (msgspec.Struct, dict)
NESTED: Final = (msgspec.Struct, dict, list, tuple)
SNAKE_CASE: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)+")
HALF_A_CHARACTER: Final = re.compile("[\ud800-\udfff]")


def finish_payload(event: str, payload: object, guild_id: str) -> EventData:
    """The fields as they go out: `guildId` added, and `timestamp` where it is missing.

    Raises PluginError for what cannot be sent, and for values that their annotations do not allow.
    """
    if not isinstance(payload, PAYLOADS):
        raise PluginError(
            f"{event}: returned {described(payload)}, expected a Payload, a dict or None"
        )
    values = as_json(payload, event)
    if isinstance(payload, msgspec.Struct):
        check_annotations(event, type(payload), values)
    fields: EventData = in_camel_case(values)
    fields["guildId"] = guild_id
    if "timestamp" not in fields:
        fields["timestamp"] = timestamp()
    return fields


def described(value: object) -> str:
    """A value as a log line names it: never more than its beginning."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else ""
    return f"{type(value).__name__} {text[:40]}".strip()


def unsendable(path: Sequence[object], why: str) -> PluginError:
    """What no event can carry; the path is the event, then where in it the value stands."""
    event, *fields = map(str, path)
    return PluginError(": ".join(filter(None, [event, ".".join(fields), why])))


def as_json(value: Any, *path: object) -> Any:
    """A value in JSON's own types, structs under their wire names; raises PluginError."""
    if not isinstance(value, NESTED):
        return scalar_as_json(value, path)
    if len(path) > MOST_NESTED:
        raise unsendable(path, f"nested deeper than {MOST_NESTED}, or in a circle")
    members: Iterable[tuple[Any, Any]]
    if isinstance(value, msgspec.Struct):
        names = value.__struct_encode_fields__
        members = zip(names, msgspec.structs.astuple(value), strict=True)
    elif isinstance(value, dict):
        members = value.items()
    else:
        return [as_json(item, *path, number) for number, item in enumerate(value)]
    return {
        key if type(key) is str and key.isascii() else str(scalar_as_json(key, path)): (
            # most values are such texts, and a call costs more than this
            item if type(item) is str and item.isascii() else as_json(item, *path, key)
        )
        for key, item in members
    }


def scalar_as_json(value: object, path: Sequence[object]) -> str | int | float | None:
    """A value that holds no others; raises PluginError."""
    match value:
        case None | bool():
            return value
        case hikari.Snowflake():
            return str(int(value))
        case str():  # hikari's enums of texts are, too
            if not value.isascii() and HALF_A_CHARACTER.search(value):
                raise unsendable(path, "half of a surrogate pair is no text")
            return str.__str__(value)
        case int():
            if abs(value) > SAFE_INTEGER:
                raise unsendable(path, "JavaScript rounds a number so large: send it as a str")
            return int(value)
        case float():
            if not math.isfinite(value):
                raise unsendable(path, f"JSON has no {value}")
            return float(value)
        case datetime():
            return timestamp(value)
    raise unsendable(path, f"{described(value)} cannot be sent as JSON")


def check_annotations(event: str, form: type[msgspec.Struct], fields: EventData) -> None:
    """Raises PluginError where a value is not what the payload's class says."""
    try:
        msgspec.convert(fields, form, dec_hook=accept)
    except msgspec.ValidationError as error:
        names = dict(zip(form.__struct_encode_fields__, form.__struct_fields__, strict=True))
        wire = re.findall(r"`\$\.(\w+)", str(error))[:1]
        field = [names.get(name, name) for name in wire]
        raise unsendable([event, form.__name__, *field], str(error)) from None


def accept(form: type, value: object) -> object:
    """Annotations that JSON knows nothing of, such as `hikari.Snowflake`, are not checked."""
    return value


def in_camel_case(value: Any) -> Any:
    """The same with camelCase for each key in snake_case."""
    if type(value) is dict:
        return {
            camel_case(key) if "_" in key else key: (
                item if type(item) is str else in_camel_case(item)
            )
            for key, item in value.items()
        }
    return [in_camel_case(item) for item in value] if type(value) is list else value


@functools.lru_cache(maxsize=1024)
def camel_case(name: str) -> str:
    if not SNAKE_CASE.fullmatch(name):
        return name
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))


# -- who is there

#: In the order of the codes below.
STATUSES: Final = ("offline", "online", "idle", "dnd")
PLATFORMS: Final = {"desktop": 1, "mobile": 2, "web": 4}
#: A member in a number: status * 8 + platforms, and this for who is no person.
BOT: Final = 32
APPEARANCES: Final = [
    Presence(status, frozenset(name for name, bit in PLATFORMS.items() if bits & bit))
    for status in STATUSES
    for bits in range(8)
]
NO_MEMBERS: Final[dict[int, int]] = {}


class Presences:
    """Who is in which guild, and how each appears: a number for each member.

    It is told what the gateway brings before anybody hears of it (Discord documentation: Gateway
    Events). Of who leaves nothing is kept; of who is not a member yet nothing is taken.
    """

    def __init__(self) -> None:
        self._guilds: dict[int, dict[int, int]] = collections.defaultdict(dict)
        self._takers = {
            "READY": self._ready,
            "GUILD_CREATE": self._guild,
            "GUILD_DELETE": self._guild,
            "GUILD_MEMBERS_CHUNK": self._chunk,
            "GUILD_MEMBER_ADD": self._member,
            "GUILD_MEMBER_UPDATE": self._member,
            "GUILD_MEMBER_REMOVE": self._member_gone,
        }

    def of(self, guild_id: int, user_id: int) -> Presence | None:
        code = self.code(guild_id, user_id)
        return None if code is None else APPEARANCES[code]

    def online(self, guild_id: int) -> list[int]:
        """People who are not offline."""
        return [user for user, code in self._guilds.get(guild_id, {}).items() if 0 < code < BOT]

    def is_person(self, guild_id: int, user_id: int) -> bool:
        """Whether this is a member, and no bot."""
        return self._guilds.get(guild_id, {}).get(user_id, BOT) < BOT

    def clear(self) -> None:
        self._guilds.clear()

    def code(self, guild_id: int, user_id: int) -> int | None:
        """How a member appears, as `code_of` says it; None of who is none."""
        code = self._guilds.get(guild_id, NO_MEMBERS).get(user_id)
        return None if code is None else code % BOT

    def update(self, guild_id: int, user_id: int, code: int) -> int | None:
        """Take how a member appears now; returns how it appeared before, as `code` does."""
        members = self._guilds.get(guild_id, NO_MEMBERS)
        before = members.get(user_id)
        if before is None:
            return None
        members[user_id] = before & BOT | code
        return before % BOT

    def take(self, event: str, payload: Any) -> None:
        """What a packet other than PRESENCE_UPDATE says of who is there."""
        if taker := self._takers.get(event):
            taker(payload)

    def _ready(self, payload: Any) -> None:
        """Of the shard's guilds that it does not name the bot has left while it was away."""
        named = {int(guild["id"]) for guild in payload["guilds"]}
        served = ShardRange(*payload.get("shard", (0, 1)))
        for guild_id in [one for one in self._guilds if served.has(one) and one not in named]:
            del self._guilds[guild_id]

    def _guild(self, payload: Any) -> None:
        if not payload.get("unavailable"):
            self._guilds.pop(int(payload["id"]), None)
            if "members" in payload:
                self._enter(payload["id"], payload["members"], payload.get("presences", ()))

    def _chunk(self, payload: Any) -> None:
        self._enter(payload["guild_id"], payload["members"], payload.get("presences", ()))

    def _member(self, payload: Any) -> None:
        self._enter(payload["guild_id"], [payload], ())

    def _member_gone(self, payload: Any) -> None:
        self._guilds[int(payload["guild_id"])].pop(int(payload["user"]["id"]), None)

    def _enter(self, guild_id: str, entries: Iterable[Any], presences: Iterable[Any]) -> None:
        members = self._guilds[int(guild_id)]
        for entry in entries:
            user = entry["user"]
            user_id, is_bot = int(user["id"]), user.get("bot") or user.get("system")
            members[user_id] = members.get(user_id, 0) % BOT | (BOT if is_bot else 0)
        for presence in presences:
            user_id = int(presence["user"]["id"])
            if user_id in members:
                code = code_of(presence["status"], presence["client_status"])
                members[user_id] = members[user_id] & BOT | code


def code_of(status: str, devices: Mapping[str, str]) -> int:
    """A status that is not known is one of being there."""
    if status in ("offline", "invisible"):
        return 0
    code = 8 * (STATUSES.index(status) if status in STATUSES else 1)
    for name, value in devices.items():
        if value != "offline":
            code |= PLATFORMS.get(name, 0)
    return code


# -- who acts


def is_author_person(event: Any, presences: Presences) -> bool:
    message = event.message
    return not message.webhook_id and is_person(message.author)


def was_author_person(event: Any, presences: Presences) -> bool:
    """Discord tells nothing of a message that was deleted but its ids: unknown counts as a person's."""
    message = event.old_message
    return message is None or (not message.webhook_id and is_person(message.author))


def is_user_person(event: Any, presences: Presences) -> bool:
    if isinstance(event, PresenceUpdateEvent) and event.before is not None:  # a member's
        return presences.is_person(event.guild_id, event.user_id)
    user = getattr(event, "user", None) or getattr(event, "member", None)
    if user is None or getattr(user, "username", None) is hikari.UNDEFINED:
        return presences.is_person(event.guild_id, event.user_id)
    return is_person(user)


def is_person(user: hikari.PartialUser | hikari.UndefinedType | None) -> bool:
    """Discord leaves out what is false."""
    return bool(user) and not user.is_bot and not user.is_system  # type: ignore[union-attr]  # UNDEFINED is false


#: Whether a person did what an event tells of, by the first of these attributes that its type has;
#: events of other types are nobody's doing. Not people are bots, webhooks, Discord's own users, and
#: whoever is not known: neither the event nor the cache says who that is.
PERSON_RULES: Final[dict[str, Callable[[Any, Presences], bool]]] = {
    "old_messages": lambda event, presences: True,  # of many authors
    "is_human": is_author_person,
    "old_message": was_author_person,
    "user_id": is_user_person,
    "state": lambda event, presences: is_person(event.state.member),
    "interaction": lambda event, presences: is_person(event.interaction.user),
    "invite": lambda event, presences: (
        event.invite.inviter is None or is_person(event.invite.inviter)
    ),
}


# -- one function of a plugin

#: Failures in a row after which a function is not called for a while,
MOST_FAILURES: Final = 20
#: and the seconds of that.
PAUSE: Final = 60.0
#: Seconds that a function may hold up the loop before it is named.
BLOCKING: Final = 0.1
#: Kinds of faults remembered as told.
MOST_KINDS: Final = 100


class Standing(NamedTuple):
    """What this thread and the others of this process have had so far."""

    #: Seconds that it ran, and that the others did.
    ran: float
    others: float
    #: Nanoseconds for which each of all these could have run and had no processor.
    waited: collections.Counter[int | None]
    #: How often all garbage was collected, which takes 0.1 s with some thousand dashboards.
    collected: int


def standing() -> Standing:
    """Of the thread that asks."""
    ran = time.thread_time()
    waited = collections.Counter[int | None]()
    for thread in threading.enumerate():
        path = f"/proc/self/task/{thread.native_id}/schedstat"  # kernel's sched-stats.rst
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            waited[thread.native_id] = int(file.read().split()[1])
    return Standing(ran, time.process_time() - ran, waited, gc.get_stats()[-1]["collections"])


def seconds_held(seconds: float, before: Standing) -> float:
    """For how much of the last seconds this thread kept everybody waiting: it worked, or it slept.

    Not while the others had the interpreter, nor while a busy machine let one of them or itself wait;
    nothing is known where all garbage was collected meanwhile.
    """
    now = standing()
    if now.collected > before.collected:
        return 0.0
    waited = now.others - before.others + (now.waited - before.waited).total() / 1e9
    return max(min(seconds, now.ran - before.ran), seconds - waited)


def kind_of_fault(error: BaseException) -> object:
    """The same for faults that one line in the log stands for: of ours, whatever value it was of."""
    if isinstance(error, SpyWatcherError):
        return re.sub(r"'.*'|\d+", "", str(error))
    where = traceback.extract_tb(error.__traceback__)[-1:]
    return where and (where[0].filename, where[0].lineno)


def reason(error: BaseException) -> str:
    """An exception in a line."""
    return str(error) if isinstance(error, SpyWatcherError) else f"{type(error).__name__}: {error}"


def traceback_of(error: BaseException) -> BaseException | None:
    """Our own refusals say all in one line; a plugin author needs the traceback of theirs."""
    return None if isinstance(error, SpyWatcherError) else error


@contextlib.contextmanager
def caught(told: Callable[[BaseException], None]) -> Iterator[None]:
    """Has a plugin's faults inside `told`; that this task is to end is none of them."""
    try:
        yield
    except FAULTS as error:
        if being_cancelled():
            raise
        told(error)


def being_cancelled() -> bool:
    """Whether the task that asks was to end: redis-py 8.1 may swallow what told it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def end_tasks(
    tasks: Iterable[asyncio.Task[Any]], patience: float = 0.25, within: float = math.inf
) -> None:
    """Cancel these, and again after `patience` seconds as long as they go on; what they raise is lost.
    After `within` seconds those that still go on are left alone.

    `asyncio.wait_for` of Python 3.11, and so redis-py 8.1 and hikari 2.7, may swallow a cancellation
    that meets an answer. What a task has to do at its end must take less.
    """
    tasks, until = set(tasks), time.monotonic() + within
    while (left := {one for one in tasks if not one.done()}) and time.monotonic() < until:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=patience)
    for task in tasks - left:
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()  # asyncio complains of one that nobody has looked at


async def until_one_ends(*works: Coroutine[Any, Any, object]) -> None:
    """Run these until one of them ends, then end the others; raises what that one raises."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_tasks(tasks)
    for task in done:
        task.result()


@dataclasses.dataclass(eq=False)
class Guarded:
    """One function of a plugin. What it raises, returns wrongly or waits for harms nobody else: it is
    counted, and logged once of its kind.
    """

    plugin: str
    metrics: Metrics
    function: Callable[..., Any]
    #: As log lines name it.
    name: str
    #: Seconds for which it may be awaited; None: for ever.
    time_limit: float | None
    #: What it is handed behind what it is called with.
    arguments: tuple[object, ...] = ()
    #: What failed in it or with it, for the log.
    where: str = ""
    #: What takes an event and what the function returned for it.
    then: Callable[[Any, Any], object] = lambda event, result: None
    _told: set[object] = dataclasses.field(default_factory=set)
    _failed_in_row: int = 0
    _paused_until: float = 0.0
    _standing: Standing = dataclasses.field(default_factory=standing)
    _stood_at: float = 0.0
    _longest: float = 0.0
    _running: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)

    @property
    def paused(self) -> bool:
        return self._paused_until > time.monotonic()

    def call(self, event: object) -> None:
        """Call it with an event, and `then` once what it returns is there."""
        if self._paused_until and self.paused:
            return
        try:
            result = self._step(self.function, event, *self.arguments)
            if hasattr(result, "__await__"):
                then = functools.partial(self.then, event)
                task = asyncio.create_task(self._finish(self._awaited(result), then))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                return
            if result is not None:
                self.then(event, result)
        except FAULTS as error:
            self._failed(error)
        else:
            self._failed_in_row = 0

    async def ask(
        self, *subject: object, then: Callable[[Any], Any] = lambda result: result
    ) -> Any:
        """Call it, and return what `then` makes of what it returns; None when it fails or is paused."""
        return None if self.paused else await self._finish(self.run(*subject), then)

    async def run(self, *subject: object) -> Any:
        """Call it and return what it returns; raises what it raises."""
        result = self._step(self.function, *subject, *self.arguments)
        return await self._awaited(result) if hasattr(result, "__await__") else result

    async def wait(self) -> None:
        """Until what was called has ended."""
        if self._running:
            await asyncio.wait(self._running)

    async def _finish(self, result: Awaitable[Any], then: Callable[[Any], Any]) -> Any:
        with caught(self._failed):
            answer = await result
            made = None if answer is None else then(answer)
            self._failed_in_row = 0
            return made

    async def _awaited(self, result: Awaitable[Any]) -> Any:
        """What comes of it; raises PluginError after so long, even where it heeds no cancellation."""
        if self.time_limit is None:
            return await self.in_steps(result)
        task = asyncio.create_task(self.in_steps(result))
        # nobody may wait for it any more, and asyncio need not complain of what it raised then
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            await asyncio.wait([task], timeout=self.time_limit)
            if task.done():
                return task.result()
            raise PluginError(f"took longer than {self.time_limit:g} s and was cancelled")
        finally:
            task.cancel()

    async def in_steps(self, result: Awaitable[Any]) -> Any:
        """What comes of it; each step of it is counted, for each holds up the loop."""
        return await self._steps(result)

    @coroutine
    def _steps(self, result: Awaitable[Any]) -> Generator[Any, Any, Any]:
        steps: Any = result.__await__()  # a coroutine's or a future's: both have all three
        resume, value = steps.send, None
        while True:
            try:
                awaited = self._step(resume, value)
            except StopIteration as end:
                return end.value
            try:
                resume, value = steps.send, (yield awaited)
            except BaseException as error:  # a cancellation, most often: it is for what is awaited
                resume, value = steps.throw, error

    # -- its account

    def _step(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call what holds up the loop; count the time, and name it if that was long.

        Named again when it was twice as long.
        """
        began = time.perf_counter()
        if began > self._stood_at + BLOCKING:  # to ask each time would cost more than most calls
            self._standing, self._stood_at = standing(), began
        try:
            return function(*arguments)
        except SystemExit as error:  # of a task's, asyncio makes it the end of the process
            raise PluginError(f"SystemExit: {error}") from error
        finally:
            seconds = time.perf_counter() - began
            self.metrics.plugin_seconds.counts[self.plugin] += seconds
            if seconds > BLOCKING:
                self._name_blocking(seconds_held(seconds, self._standing))

    def _name_blocking(self, seconds: float) -> None:
        if seconds > max(BLOCKING, 2 * self._longest):
            self._longest = seconds
            held_up = "plugin %s: %s held up the server for %.0f ms"
            log.warning(held_up, self.plugin, self.name, seconds * 1000)

    def _failed(self, error: BaseException) -> None:
        self.report(error)
        self._failed_in_row += 1
        if self._failed_in_row % MOST_FAILURES == 0 and not self.paused:
            self._paused_until = time.monotonic() + PAUSE
            self.metrics.plugin_pauses.labels(self.plugin).inc()
            paused = "plugin %s: %s%s failed %d times in a row and is paused for %.0f s"
            log.error(paused, self.plugin, self.name, self.where, MOST_FAILURES, PAUSE)

    def report(self, error: BaseException) -> None:
        """Count a fault, and log it if it is the first of its kind."""
        self.metrics.plugin_failures.labels(self.plugin).inc()
        kind = type(error), kind_of_fault(error)
        if kind not in self._told and len(self._told) < MOST_KINDS:
            self._told.add(kind)
            failed = "plugin %s: %s failed%s: %s"
            why, trace = reason(error), traceback_of(error)
            log.error(failed, self.plugin, self.name, self.where, why, exc_info=trace)


# -- one plugin


class Hook(NamedTuple):
    """A function of a plugin, or a handler's class, that the host calls."""

    mark: Mark
    function: Any
    #: How many arguments it takes of those that it may.
    takes: int


class Plugin:
    """One loaded plugin: its module, and what the host calls in it, each checked."""

    def __init__(self, name: str, path: Path, module: ModuleType, table: dict[str, Any]) -> None:
        self.name = name
        self.path = path
        self.module = module
        code = read_code(path)
        #: Event and kind of room of each `spy.emit` in its files.
        self.emitted = code.emitted
        self.settings_form = settings_form(module, reads_settings="settings" in code.attributes)
        self.settings = self.check_settings(table)
        check_names(module)
        self._hooks = hooks_of(module)
        self.needs = checked_needs(module, code.attributes)
        check_payloads(name, module)
        marks = [hook.mark for hook in self._hooks if hook.mark.emit]
        self.events = {str(mark.emit) for mark in marks}
        self.kinds = frozenset(mark.room for mark in marks)

    def hooks(self, *names: str) -> list[Hook]:
        """What it has for these keys of HOOKS, in the order of the file."""
        return [hook for hook in self._hooks if hook.mark.hook in names]

    def event_types(self) -> set[type[hikari.Event]]:
        """The events that Discord has to send for it."""
        heard = {hook.mark.of for hook in self.hooks("@on") if isinstance(hook.mark.of, type)}
        return heard | {NEEDS[need].event for need in self.needs}

    def check_settings(self, table: dict[str, Any]) -> Any:
        """The plugin's `[plugin.NAME]` table as it reads it; raises OperatorError."""
        if self.settings_form is None:
            return table
        faults: list[str] = []
        settings = check_table(table, self.settings_form, f"plugin.{self.name}", faults)
        if faults:
            raise OperatorError(*faults)
        return settings


def own_things(module: ModuleType) -> list[tuple[str, Any]]:
    """What the plugin has defined, in its files, by the names in its module; each once."""
    home = module.__name__
    seen: dict[int, tuple[str, Any]] = {}
    for name, value in vars(module).items():
        where = getattr(value, "__module__", home)
        if isinstance(where, str) and (where == home or where.startswith(f"{home}.")):
            seen.setdefault(id(value), (name, value))
    return list(seen.values())


def hooks_of(module: ModuleType) -> list[Hook]:
    """What the host calls in it; raises PluginError for what it cannot call."""
    named = [(vars(module)[name], [Mark(name)]) for name in HOOKS if name in vars(module)]
    marked = [(one, getattr(one, "__dict__", {}).get(MARKS, [])) for _, one in own_things(module)]
    return [
        Hook(mark, function, arguments_taken(function, HOOKS[mark.hook]))
        for function, marks in [*marked, *named]
        for mark in marks
    ]


def settings_form(module: ModuleType, *, reads_settings: bool) -> type[msgspec.Struct] | None:
    """The class that a `[plugin.NAME]` table is checked by; None where the plugin does that itself."""
    form = vars(module).get("Settings")
    if form is None:
        return None if reads_settings else PluginSettings
    if not (isinstance(form, type) and issubclass(form, PluginSettings)):
        raise PluginError("Settings: expected class Settings(PluginSettings, frozen=True)")
    missing = [field.name for field in msgspec.structs.fields(form) if field.required]
    if missing:
        raise PluginError(f"Settings.{missing[0]}: each key needs a default")
    return form


def check_names(module: ModuleType) -> None:
    """Raises PluginError for a name that is nearly one that the host looks for."""
    hooks = [name for name in HOOKS if name.isidentifier()]
    for name, value in own_things(module):
        function = inspect.isfunction(value) and MARKS not in vars(value)
        constant = isinstance(value, (*COLLECTIONS, str))
        looked_for = hooks if function else ["needs"] if constant else []
        plain = name.replace("_", "").lower()
        near = difflib.get_close_matches(plain, looked_for, n=1, cutoff=0.85)
        if near and name not in looked_for and name[0] != "_":
            raise PluginError(f"{name} is no hook, did you mean {near[0]}? (else begin it with _)")
        settings = isinstance(value, type) and issubclass(value, PluginSettings)
        if settings and "Settings" not in vars(module):
            raise PluginError(f"class {name} is never read, did you mean Settings?")


def checked_needs(module: ModuleType, used: Mapping[str, str]) -> frozenset[str]:
    """What hikari has to keep for the plugin; raises PluginError where it asks for less than it uses."""
    needs = vars(module).get("needs", frozenset())
    if not isinstance(needs, COLLECTIONS) or not NEEDS.keys() >= set(needs):
        raise PluginError(f"needs: got {shown(needs)}, expected some of {', '.join(NEEDS)}")
    for name, need in NEEDS.items():
        empty = [attribute for attribute in sorted(used) if attribute.startswith(need.attributes)]
        if empty and name not in needs:
            where = used[empty[0]]
            raise PluginError(f'{empty[0]} stays empty without needs = {{"{name}"}} ({where})')
    return frozenset(needs)


class Code(NamedTuple):
    """What a plugin's files say without being run."""

    #: The names of all attributes that they read, and where one of them is.
    attributes: dict[str, str]
    #: Event and kind of room of each `spy.emit("event", …)`.
    emitted: set[tuple[str, str]]


def read_code(path: Path) -> Code:
    """All files of a plugin."""
    code = Code({}, set())
    for file in files_of(path):
        for node in ast.walk(ast.parse(file.read_bytes())) if file.suffix == ".py" else ():
            match node:
                case ast.Attribute(attr=name):
                    code.attributes[name] = f"{file.name}, line {node.lineno}"
                case ast.Call(
                    func=ast.Attribute(attr="emit"), args=[ast.Constant(str(event)), *more]
                ):
                    named = (one.value for one in node.keywords if one.arg == "room")
                    room = [*more[2:3], *named, ast.Constant("guild")][0]
                    if isinstance(room, ast.Constant):
                        code.emitted.add((event, str(room.value)))
    return code


def arguments_taken(function: Any, forms: Sequence[str]) -> int:
    """How many arguments the function takes, in the longest of these forms that it allows."""
    if not forms:
        return 0
    expected = " or ".join(f"({form})" for form in forms)
    name = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, type) or not hasattr(function, "__name__"):
        raise PluginError(f"{name}: expected a function of {expected}")
    signature = inspect.signature(function)
    for form in reversed(forms):
        with contextlib.suppress(TypeError):
            return len(signature.bind(*form.split(", ")).args)
    raise PluginError(f"{name} takes {signature}, expected {expected}")


def check_payloads(plugin: str, module: ModuleType) -> None:
    """Raises PluginError for annotations that values cannot be checked by."""
    for name, value in own_things(module):
        if isinstance(value, type) and issubclass(value, Payload):
            fields = value.__struct_fields__
            telling = [one for one in fields if re.fullmatch(r"(\w+_)?channel(_id|_name)?", one)]
            if telling and "channel_id" not in fields:
                why = "goes to all who see the guild: only channel_id hides an event"
                log.warning("plugin %s: %s.%s %s", plugin, name, telling[0], why)
            try:
                msgspec.convert({}, value, dec_hook=accept)
            except msgspec.ValidationError:
                continue  # it has fields without a default
            except (TypeError, NameError) as error:
                raise PluginError(f"class {name}: {error}") from error


class PluginHandler(RequestHandler):
    """The host's side of a plugin's route."""

    spy: Spy
    _guarded: Guarded
    _fault: BaseException | None = None

    def initialize(self) -> None:
        """Tornado closes the connection of a handler that cannot be made: tell it as any other fault."""
        try:
            super().initialize()
        except FAULTS as error:
            self._fault = error

    def prepare(self) -> Awaitable[None] | None:
        if self._fault is not None:
            raise self._fault
        return super().prepare()

    async def _execute(self, *arguments: Any, **groups: Any) -> None:
        """All that answers a request; whoever holds up the server is named."""
        try:
            await self._guarded.in_steps(super()._execute(*arguments, **groups))
        except PluginError as error:  # a SystemExit: Tornado answers what is an Exception
            self._guarded.report(error)
            self.send_error(500)

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        super().set_default_headers()

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        """A client reads of a bug no more than 500; whose it is, the log says."""
        if value is not None and not isinstance(value, HTTPError):
            self._guarded.report(value)


class Runner:
    """One plugin at work: events, time and new subscribers reach it here, and its events leave here."""

    #: Seconds that `setup` may take,
    setup_limit: ClassVar[float] = 10.0
    #: and what is repeated once it is cancelled, which it is twice: it may have to clean up.
    end_limit: ClassVar[float] = 2.0

    def __init__(
        self,
        plugin: Plugin,
        context: HostContext,
        metrics: Metrics,
        time_limit: float,
        claim: Callable[[Plugin, str, str], None],
        publish: Callable[[str, EventData], None],
    ) -> None:
        self.plugin = plugin
        self._context = context
        self._time_limit = time_limit
        #: Refuses an event and a kind of room that are not the plugin's to use.
        self._claim = claim
        #: Tells other plugins what goes out.
        self._publish = publish
        self._dropped = metrics.dropped.labels
        #: From its `setup` to its `teardown`.
        self.at_work = False
        self._tasks: list[asyncio.Task[None]] = []
        self.spy = Spy(plugin.name, plugin.settings, context, metrics, self._emit)
        self._guard = functools.partial(Guarded, plugin.name, metrics)
        #: What makes an event's payload when it is really sent, by event.
        self._makers: dict[str, Guarded] = {}
        #: What the host calls, by the keys of HOOKS.
        self.hooks = {
            name: [(hook, self._guarded(hook)) for hook in plugin.hooks(name)] for name in HOOKS
        }
        self.setup, self.teardown = map(self._if_there, ("setup", "teardown"))
        #: What the plugin serves: a pattern of the whole path, and what answers there.
        self.routes = [
            (PathMatches(hook.mark.of), self._page(hook.function, guarded))
            for hook, guarded in self.hooks["@route"]
        ]

    def _guarded(self, hook: Hook) -> Guarded:
        mark, name, limit = hook.mark, hook.function.__name__, self._time_limit
        guard = functools.partial(self._guard, hook.function)
        match mark.hook:
            case "@on":
                where = f" on {getattr(mark.of, '__name__', mark.of)}"
                then = functools.partial(self._send_result, mark)
                return guard(name, limit, (self.spy,)[: hook.takes - 1], where, then)
            case "@on_subscribe":
                return guard(f"making {mark.emit}", limit, where=f" in {name}")
            case "setup":
                return guard("setup", self.setup_limit, (self.spy,))
            case "teardown":
                return guard("teardown", limit, (self.spy,))
        return guard(name, None, (self.spy,))

    def _if_there(self, name: str) -> Guarded:
        nothing = self._guard(lambda spy: None, name, None, (self.spy,))
        return next((guarded for _, guarded in self.hooks[name]), nothing)

    def _page(self, handler: type[RequestHandler], guarded: Guarded) -> type[RequestHandler]:
        own = {"spy": self.spy, "_guarded": guarded}
        return type(handler.__name__, (PluginHandler, handler), own)

    def paused(self) -> list[str]:
        """Functions that are not called for a while, since they failed again and again."""
        everything = itertools.chain.from_iterable(self.hooks.values())
        return [f"{self.plugin.name}.{one.name}" for _, one in everything if one.paused]

    # -- life

    async def set_up(self) -> None:
        """Run the plugin's `setup`; raises whatever that raises."""
        self.spy.shared = self._context.share(self.plugin.name)
        await self.setup.run()

    def begin(self) -> None:
        """Be at work: hear events, greet, and repeat what is repeated."""
        self.at_work = True
        self._tasks = [
            asyncio.create_task(self._repeat(hook.mark.of, guarded))
            for hook, guarded in self.hooks["@every"]
        ]

    def end(self) -> bool:
        """Repeat nothing more; whether it was at work, and is to be torn down."""
        was_at_work, self.at_work = self.at_work, False
        for task in self._tasks:
            task.cancel()
        return was_at_work

    async def tear_down(self) -> None:
        """Wait for what still runs, then run the plugin's `teardown`."""
        await end_tasks(self._tasks, self.end_limit / 2, self.end_limit)
        for (_, guarded), task in zip(self.hooks["@every"], self._tasks, strict=False):
            if not task.done():
                guarded.report(PluginError("goes on though it was cancelled"))
        for _, guarded in self.hooks["@on"]:
            await guarded.wait()
        with caught(self.teardown.report):
            await self.teardown.run()

    @staticmethod
    async def _repeat(seconds: float, guarded: Guarded) -> None:
        while True:
            await asyncio.sleep(seconds)
            await guarded.ask()

    # -- events

    async def greet(
        self, kind: str, guild_id: str, tell: Tell, subscriber: Subscriber | None
    ) -> None:
        """`tell` a client that entered `kind:guild_id` what the plugin has for it, as it comes.

        Without a subscriber, what all of them would get.
        """
        finish = functools.partial(finish_payload, guild_id=guild_id)
        for (mark, _, takes), guarded in self.hooks["@on_subscribe"]:
            if mark.room == kind and (subscriber or takes < 3):
                event, arguments = str(mark.emit), (guild_id, self.spy, subscriber)[:takes]
                fields = await guarded.ask(*arguments, then=functools.partial(finish, event))
                channel_id = fields and fields.get("channelId")
                if fields and (not channel_id or not subscriber or subscriber.may_see(channel_id)):
                    tell(event, fields)

    def _send_result(self, mark: Mark, event: Any, result: object) -> None:
        if mark.emit is None:
            raise PluginError(f"returned {described(result)}, but on() has no emit= to send it as")
        if mark.settled and not self._context.settled():
            self._dropped("startup grace").inc()
            return
        guild_id = guild_of(event)
        fields = self._finished(mark.emit, guild_id, result)
        self._context.emit(mark.emit, guild_id, fields, mark.room)

    def _emit(self, event: str, guild_id: str, payload: PayloadOrMaker, room: str) -> None:
        """What `spy.emit` does."""
        self._claim(self.plugin, event, room)
        if not self._context.watches(guild_id):
            self._dropped("guild not watched").inc()
        elif callable(payload):
            if event not in self._makers:
                self._makers[event] = self._guard(call, f"making {event}", self._time_limit)
            finish = functools.partial(self._finished, event, guild_id)
            make = functools.partial(self._makers[event].ask, payload, then=finish)
            self._context.emit(event, guild_id, make, room)
        else:
            self._context.emit(event, guild_id, self._finished(event, guild_id, payload), room)

    def _finished(self, event: str, guild_id: str, payload: object) -> EventData:
        fields = finish_payload(event, payload, guild_id)
        self._publish(event, fields)
        return fields


def guild_of(event: Any) -> str:
    """The guild of hikari's event, or of the fields of a plugin's."""
    guild_id = event["guildId"] if isinstance(event, dict) else getattr(event, "guild_id", None)
    if guild_id is None:
        raise PluginError(f"{type(event).__name__} has no guild_id, so it cannot be emitted")
    return str(int(guild_id))


# -- all plugins

#: How many plugins may hear each other's events one after the other, of one event of hikari's.
MOST_CHAINED: Final = 8
CHAIN: Final = contextvars.ContextVar("how many plugins' events led here", default=0)


class Dispatcher:
    """Hands each event to the plugins that hear it: one subscription for each type of event."""

    def __init__(self, context: HostContext, metrics: Metrics) -> None:
        self._context = context
        self._received = metrics.received.counts
        self._hearers: dict[type | str, list[tuple[Mark, Guarded]]] = {}
        self._subscribed: dict[type[hikari.Event], Callable[[Any], None]] = {}
        self._counted: hikari.Event | None = None

    def connect(self, runners: Iterable[Runner]) -> None:
        """From now on these plugins hear all that happens, in this order."""
        hearers: dict[type | str, list[tuple[Mark, Guarded]]] = {}
        for runner in runners:
            for hook, guarded in runner.hooks["@on"]:
                hearers.setdefault(hook.mark.of, []).append((hook.mark, guarded))
        self._hearers = hearers
        wanted = {source for source in hearers if not isinstance(source, str)}
        bot = self._context.bot
        for event_type in self._subscribed.keys() - wanted:
            bot.events.unsubscribe(event_type, self._subscribed.pop(event_type))
        for event_type in sorted(wanted - self._subscribed.keys(), key=lambda one: one.__name__):
            if not missing_intents(event_type, bot.intents):
                self._subscribed[event_type] = self._subscription(event_type)
                bot.events.subscribe(event_type, self._subscribed[event_type])

    def publish(self, event: str, fields: EventData) -> None:
        """Hand a plugin's event to other plugins."""
        if hearers := self._hearers.get(event):
            if CHAIN.get() >= MOST_CHAINED:
                raise PluginError(f"{event} comes of itself, through plugins that hear each other")
            before = CHAIN.set(CHAIN.get() + 1)
            try:
                for _, guarded in hearers:
                    guarded.call(copy.deepcopy(fields))
            finally:
                CHAIN.reset(before)

    def _subscription(self, event_type: type[hikari.Event]) -> Callable[[Any], None]:
        """Calls plain functions one after the other, and waits for none that is async."""
        presences, cache = self._context.presences, self._context.bot.cache
        rules = (rule for name, rule in PERSON_RULES.items() if hasattr(event_type, name))
        rule = next(rules, None)

        def hear(event: Any) -> None:
            guild_id = getattr(event, "guild_id", None)
            if guild_id is not None and not self._context.watches(guild_id):
                return
            person = rule is None or rule(event, presences)
            if self._counted is not event:  # it comes once for each type that it is of
                self._counted = event
                self._received[type(event).__name__] += 1
            if event_type is hikari.MemberDeleteEvent and event.old_member is None:
                # hikari 2.7 does not say who left as long as it keeps a message of theirs
                event.old_member = cache.get_member(event.guild_id, event.user_id)
            for mark, guarded in self._hearers.get(event_type, ()):
                if person or mark.bots:
                    guarded.call(event)

        return hear


def missing_intents(event_type: type[hikari.Event], had: hikari.Intents) -> hikari.Intents:
    """What a session with these intents lacks to get such events from guilds."""
    choices = base_events.get_required_intents_for(event_type)
    in_guilds = [choice for choice in choices if not choice & hikari.Intents.ALL_DMS] or choices
    if not in_guilds or any(choice & had == choice for choice in in_guilds):
        return hikari.Intents.NONE
    return min(in_guilds, key=int) & ~had


#: Files and folders that are no plugins: parts of one, and tests.
NO_PLUGIN: Final = re.compile(r"[_.].*|test_.*|.*_test|tests|conftest")
#: The files of a plugin, and a digest of what each holds; one that leads nowhere is left out.
Contents = list[tuple[Path, bytes]]


class PluginFiles:
    """Where plugins are, an operator's own before the shipped ones, and which have changed since they
    were taken.
    """

    #: Seconds between two looks.
    pace: ClassVar[float] = 0.4
    #: Seconds for which a change must have rested, for editors write in several steps;
    rest: ClassVar[float] = 0.3
    #: and for which more is awaited where a file is empty or no Python.
    patience: ClassVar[float] = 1.5

    def __init__(self, settings: PluginsSettings, folder: Path) -> None:
        self._shipped = shipped_plugins()
        places = [self._places(folder, name) for name in settings.folders]
        self._folders = list(dict.fromkeys(itertools.chain.from_iterable(places)))
        self.disabled = settings.disabled
        #: Each plugin as it was taken; None for one that has gone.
        self._taken: dict[str, Contents | None] = {}
        #: What has changed since, as it is now, and since when.
        self._seen: dict[str, tuple[Contents | None, float]] = {}

    def _places(self, folder: Path, name: str) -> list[Path]:
        """The folder that settings name so, and the shipped one that it stands for."""
        places = [(folder / name).resolve()]
        if Path(name).parts[:1] == (OWN_PLUGINS,) and self._shipped:
            places.append(self._shipped / Path(name).relative_to(OWN_PLUGINS))
        found = [place for place in places if place.is_dir()]
        if not found:
            raise OperatorError(f"plugins.folders: {places[0]} is no folder")
        return found

    def all(self) -> dict[str, list[Path]]:
        """A file of each plugin that there is, by name, disabled or not: the first is the one that counts.

        The shipped ones come first, then each folder's: of two that claim an event the earlier has it.
        """
        found: dict[str, list[Path]] = {}
        for entry in (entry for folder in self._folders for entry in sorted(folder.glob("*"))):
            path = entry / "__init__.py" if entry.is_dir() else entry
            name = entry.name if entry.is_dir() else entry.stem
            is_there = path.is_file() or path is entry  # a link that leads nowhere is told of
            if path.suffix == ".py" and is_there and not NO_PLUGIN.fullmatch(name):
                found.setdefault(name, []).append(path)
        shipped = [name for name, (path, *_) in found.items() if self._shipped in path.parents]
        return {name: found[name] for name in (*shipped, *found)}

    def find(self) -> dict[str, Path]:
        """The plugins to load, in their order."""
        return {name: at for name, (at, *_) in self.all().items() if name not in self.disabled}

    def take(self) -> dict[str, Path]:
        """All plugins as they are now."""
        found = self.find()
        self._taken = {name: contents_of(path) for name, path in found.items()}
        return found

    def forget(self, names: Iterable[str]) -> None:
        """Have these taken once more, though they are as they were."""
        for name in names:
            self._taken.pop(name, None)

    @property
    def resting(self) -> bool:
        """Whether nothing has changed that was not taken, when last looked."""
        return not self._seen

    def take_changed(self) -> dict[str, Path | None]:
        """The plugins that have changed and come to rest; None for one that has gone."""
        found = self.find()
        names = dict.fromkeys([*found, *self._taken])
        return {name: found.get(name) for name in names if self._has_settled(name, found.get(name))}

    def _has_settled(self, name: str, path: Path | None) -> bool:
        contents, now = contents_of(path) if path else None, time.monotonic()
        if contents == self._taken.get(name):
            self._seen.pop(name, None)
            return False
        if name not in self._seen or self._seen[name][0] != contents:
            self._seen[name] = (contents, now)
        rests = now - self._seen[name][1]
        if rests < (self.rest if path is None or is_python(path) else self.patience):
            return False
        self._taken[name], _ = self._seen.pop(name)
        return True


def contents_of(path: Path) -> Contents:
    """What is in a plugin's files now."""
    contents: Contents = []
    for file in files_of(path):
        with contextlib.suppress(OSError):
            status = file.stat()
            if file.is_file():
                written = status.st_mtime_ns, status.st_size, status.st_ino
                contents.append((file, digest_of(file, written)))
    return contents


@functools.lru_cache(maxsize=65_536)  # with fewer than there are files, each look reads them all
def digest_of(file: Path, written: tuple[int, ...]) -> bytes:
    """A file is read once for each time that it was written."""
    return hashlib.sha256(file.read_bytes()).digest()


def files_of(path: Path) -> list[Path]:
    """A plugin's file, or all files in its folder."""
    if path.name != "__init__.py":
        return [path]
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(path.parent)
        for name in names
        if "__pycache__" not in folder and name[0] != "."
    )


def is_python(path: Path) -> bool:
    """Whether a file has something in it, and that can be compiled."""
    try:
        source = path.read_bytes() if path.is_file() else b""
        compile(source, path, "exec")
    except (OSError, SyntaxError, ValueError):
        return False
    return bool(source.strip()) or path.name == "__init__.py"


def load_module(name: str, path: Path) -> ModuleType:
    """Run a plugin's file as a fresh module, under a name that no other module can have.

    Files beside it whose names begin with `_`, no plugins, it may import: `from . import _x`.
    """
    if not path.is_file():
        raise PluginError(f"{path} is no file")
    if "." in name:
        raise PluginError(f"a plugin's name has no dot in it; begin it with _ to leave {path} out")
    importlib.invalidate_caches()  # of folders whose files are new
    package = sys.modules.setdefault(PLUGINS_PACKAGE, ModuleType(PLUGINS_PACKAGE))
    package.__path__ = [str(path.parent.parent if path.name == "__init__.py" else path.parent)]
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:  # a .pyc stays the newest where a file of the same size is written within the same second
        return importlib.import_module(f"{PLUGINS_PACKAGE}.{name}")
    finally:
        sys.dont_write_bytecode = before


def take_modules(name: str) -> dict[str, ModuleType]:
    """Take a plugin's modules out of `sys.modules`, so that the next import makes fresh ones."""
    own = f"{PLUGINS_PACKAGE}.{name}"
    names = [one for one in sys.modules if one == own or one.startswith(f"{own}.")]
    if hasattr(package := sys.modules.get(PLUGINS_PACKAGE), name):
        delattr(package, name)
    return {one: sys.modules.pop(one) for one in names}


@contextlib.contextmanager
def fresh_modules(name: str) -> Iterator[None]:
    """Inside, a plugin is loaded anew; if that comes to nothing, its modules are as before."""
    before = take_modules(name)
    try:
        yield
    except BaseException:
        take_modules(name)
        sys.modules.update(before)
        raise


def line_of(name: str, path: Path) -> str:
    """Where a plugin's file gives something this name: `mine.py, line 3`."""
    source = path.read_text("utf-8", "replace")
    found = re.search(rf"^((async )?def |class )?{name}\b", source, re.MULTILINE)
    line = source[: found.start()].count("\n") + 1 if found else 0
    return f"{path.name}, line {line}" if line else ""


def reason_not_loaded(error: BaseException, path: Path) -> str:
    """Why a plugin did not load, and where in its files that came up."""
    if isinstance(error, SyntaxError | OperatorError):
        return str(error).replace("\n", "; ")  # says where
    place = ""
    home = path.parent if path.name == "__init__.py" else path
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).is_relative_to(home):
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
    about = re.match(r"(class )?(\w+)", str(error))  # our own refusals begin with a name
    if about and not place and isinstance(error, PluginError):
        place = line_of(about[2], path)
    kind = "" if isinstance(error, SpyWatcherError) else type(error).__name__
    more = ", ".join(filter(None, [kind, place]))
    return f"{error} ({more})" if more else str(error)


def check_free(event: str, name: str, plugins: Mapping[str, Plugin]) -> None:
    """Refuse an event that is not this plugin's to send; raises PluginError."""
    if event in RESERVED_EVENTS:
        raise PluginError(f"the event name {event} is reserved")
    for other, plugin in plugins.items():
        if other != name and event in plugin.events:
            raise PluginError(
                f"plugins {other} and {name} both claim the event {event};"
                " disable one of them in [plugins] disabled"
            )


def events_of(plugins: Iterable[Plugin]) -> set[str]:
    """All that these send, or will by `spy.emit`."""
    return {event for one in plugins for event in (*one.events, *dict(one.emitted))}


class PluginLoader:
    """Makes plugins of files, and knows what they ask for; one whose file is wrong is named, and
    what was loaded before stays.
    """

    def __init__(
        self,
        settings: PluginsSettings,
        tables: Mapping[str, dict[str, Any]],
        folder: Path,
        metrics: Metrics,
    ) -> None:
        self.files = PluginFiles(settings, folder)
        #: The `[plugin.NAME]` tables.
        self.tables = tables
        self._failures = metrics.plugin_failures
        self.plugins: dict[str, Plugin] = {}
        #: What did not load or start, and why; the version before may be at work.
        self.failures: dict[str, str] = {}

    def load_all(self) -> None:
        """Load every plugin of the folders.

        Raises OperatorError for wrong `[plugin.NAME]` tables; a plugin that fails is in `failures`
        afterwards.
        """
        faults: list[str] = []
        for name, path in self.files.take().items():
            try:
                self.plugins[name] = self.load(name, path, self.plugins)
            except OperatorError as error:
                faults += error.faults
            except FAULTS as error:  # nothing a plugin does may end the server
                self.report(name, path, error)
        for plugin in self.plugins.values():
            self.warn_of_typos(plugin)
        if faults:
            raise OperatorError(*faults)

    def warn_of_typos(self, plugin: Plugin) -> None:
        """Name what the plugin hears where nobody sends that, but something much like it."""
        known = [event for one in self.plugins.values() for event in one.events]
        for event in (hook.mark.of for hook in plugin.hooks("@on")):
            near = difflib.get_close_matches(str(event), known, n=1, cutoff=0.8)
            if near and event not in known:
                why = f"no plugin emits {event}, did you mean {near[0]}?"
                log.warning("plugin %s: %s", plugin.name, why)

    def load(self, name: str, path: Path, others: Mapping[str, Plugin]) -> Plugin:
        """A plugin as its file is now, which claims no event of others."""
        for hidden in self.files.all().get(name, [])[1:]:
            log.info("plugin %s: %s replaces %s", name, path, hidden)
        with fresh_modules(name):
            plugin = Plugin(name, path, load_module(name, path), self.tables.get(name, {}))
            for event in sorted(plugin.events):
                check_free(event, name, others)
        return plugin

    def report(self, name: str, path: Path, error: BaseException) -> None:
        """Say once why a plugin did not load."""
        self.failures[name] = why = reason_not_loaded(error, path)
        self._failures.labels(name).inc()
        kept = "; the version before goes on" if name in self.plugins else ""
        shown = None if isinstance(error, SyntaxError) else traceback_of(error)
        log.error("plugin %s: not loaded: %s%s", name, why, kept, exc_info=shown)

    # -- what is wrong

    def faults(self) -> list[str]:
        """What is wrong with the plugins, a line each."""
        failed = [f"plugin {name}: {why}" for name, why in sorted(self.failures.items())]
        return failed + self.unknown_names()

    def unknown_names(self) -> list[str]:
        """A line for each plugin that settings name and that is not there."""
        there = sorted(self.files.all())
        named = [(f"plugin.{name}", name) for name in self.tables]
        named += [(f"plugins.disabled: {shown(name)}", name) for name in self.files.disabled]
        return [
            f"{key}: no such plugin{nearest(name, there)}"
            for key, name in named
            if name not in there
        ]

    def check_secret(self, tokens: Tokens) -> None:
        """Raises OperatorError for each plugin that signs where nothing can be signed."""
        signing = [n for n, p in self.plugins.items() if getattr(p.settings, "needs_secret", False)]
        if signing and not tokens.can_issue:
            why = "needs [auth] secret and an algorithm like HS256: a public key signs nothing"
            raise OperatorError(*(f"plugin.{name}: {why}" for name in signing))

    # -- what plugins ask for

    def cached(self) -> hikari.api.CacheComponents:
        """What hikari has to keep for plugins' `needs`."""
        needs = (need for plugin in self.plugins.values() for need in plugin.needs)
        return functools.reduce(or_, (NEEDS[need].components for need in needs), CACHE.NONE)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of room that there are: `guild`, and those that the plugins name."""
        return frozenset({"guild"}).union(*(plugin.kinds for plugin in self.plugins.values()))

    def claim(self, plugin: Plugin, event: str, room: str) -> None:
        """Let a plugin emit an event that nobody else does, to a kind of room that there is."""
        if room not in plugin.kinds and room not in (kinds := self.kinds):
            raise PluginError(
                f"{event}: no plugin has rooms of the kind {shown(room)}{nearest(room, kinds)};"
                " name it in on(room=) or on_subscribe()"
            )
        if event in plugin.events:
            return
        check_name("spy.emit", event)
        check_free(event, plugin.name, self.plugins)
        plugin.events.add(event)


class PluginHost:
    """The loaded plugins at work: set up, heard, served and ended, and replaced when they are saved.

    What they serve is there from the start, on every node; raises OperatorError where one needs a
    secret that is not there.
    """

    def __init__(
        self, loader: PluginLoader, context: HostContext, metrics: Metrics, time_limit: float
    ) -> None:
        loader.check_secret(context.tokens)
        self.loader = loader
        self.failures = loader.failures
        self._context = context
        self._metrics = metrics
        #: Seconds that an async function of a plugin may take.
        self._time_limit = time_limit
        self._dispatcher = Dispatcher(context, metrics)
        #: Whether plugins are at work here, and what is held while that or they change.
        self._leading = False
        self._changing = asyncio.Lock()
        self._look_now = asyncio.Event()
        self._take_over({name: self._runner(one) for name, one in loader.plugins.items()})
        for line in loader.unknown_names():
            log.warning("%s; it may come later", line)

    def _take_over(self, runners: dict[str, Runner]) -> None:
        """Have all that happens go to these, or to those of them that are at work, in one step."""
        #: The loaded plugins with what they work with.
        self.runners = dict(sorted(runners.items()))
        self.loader.plugins = {name: one.plugin for name, one in self.runners.items()}
        self._routes = [route for runner in self.runners.values() for route in runner.routes]
        self._dispatcher.connect(self.running.values())

    @property
    def plugins(self) -> dict[str, Plugin]:
        """The loaded plugins."""
        return self.loader.plugins

    def _runner(self, plugin: Plugin) -> Runner:
        publish, claim = self._dispatcher.publish, self.loader.claim
        return Runner(plugin, self._context, self._metrics, self._time_limit, claim, publish)

    # -- start and stop

    async def start(self) -> None:
        """Set each plugin up, all at once, and let it hear hikari's events.

        One that cannot be set up is left out until it changes or, of several nodes, the gateway
        comes here again.
        """
        async with self._changing:
            self._leading = True
            await asyncio.gather(*map(self._begin, self.runners.values()))
            self._take_over(self.runners)

    async def _begin(self, runner: Runner) -> None:
        name = runner.plugin.name

        def failed(error: BaseException) -> None:
            self.failures[name] = f"setup failed: {reason(error)}"
            runner.setup.report(error)

        with caught(failed):
            await runner.set_up()
            self.failures.pop(name, None)
            runner.begin()

    @property
    def running(self) -> dict[str, Runner]:
        """Those that are at work."""
        return {name: runner for name, runner in self.runners.items() if runner.at_work}

    async def stop(self) -> None:
        """Stop hearing events and tear the plugins down."""
        async with self._changing:
            self._leading = False
            ending = self.running
            for name, runner in ending.items():
                runner.end()
                self.failures.pop(name, None)  # it is not to be at work here now
            self._take_over(self.runners)
            await asyncio.gather(*(runner.tear_down() for runner in ending.values()))

    # -- what is saved meanwhile

    async def follow(self, *, watch: bool) -> None:
        """Take over what changes in the plugins' files, for as long as this runs.

        Without `watch` only when asked to `look`.
        """
        files = self.loader.files
        while True:
            watching = watch or not files.resting
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(files.pace if watching else None):
                    await self._look_now.wait()
            self._look_now.clear()
            try:
                if changed := files.take_changed():
                    await self._change(changed)
            except Exception:  # the next change gets its chance
                log.exception("the plugins' files could not be followed")

    def look(self) -> None:
        """Look at the plugins' files now, watched or not."""
        self._look_now.set()

    async def _change(self, changed: dict[str, Path | None]) -> None:
        """Set up what is new, and then, in one step, let it take the place of what was before."""
        async with self._changing:
            after = {name: one for name, one in self.runners.items() if changed.get(name, True)}
            for name, path in changed.items():
                if path and (runner := await self._prepare(name, path, after)):
                    after[name] = runner
            coming = [one for name, one in after.items() if self.runners.get(name) is not one]
            ending = [one for name, one in self.runners.items() if after.get(name) is not one]
            ending = [runner for runner in ending if runner.end()]
            for runner in coming if self._leading else ():
                runner.begin()
            freed = events_of(self.plugins.values())
            self._take_over(after)
            freed -= events_of(self.plugins.values())
            for name in (name for name, path in changed.items() if path is None):
                take_modules(name)
                self.failures.pop(name, None)
                log.info("plugin %s: gone", name)
            for runner in coming:
                self._say_loaded(runner.plugin)
            if freed and self.failures:  # one of them may claim what is free now
                self.loader.files.forget(self.failures)
                self.look()
            await asyncio.gather(*(runner.tear_down() for runner in ending))

    async def _prepare(self, name: str, path: Path, after: Mapping[str, Runner]) -> Runner | None:
        """A new version, set up where plugins are at work; None where anything of that fails."""
        with caught(functools.partial(self.loader.report, name, path)), fresh_modules(name):
            others = {name: runner.plugin for name, runner in after.items()}
            plugin = self.loader.load(name, path, others)
            for need in sorted(plugin.needs):
                if NEEDS[need].components & ~self._context.bot.cache.settings.components:
                    raise PluginError(
                        f'needs "{need}" asks for a restart: hikari keeps it from its start on'
                    )
            runner = self._runner(plugin)
            if self._leading:
                await runner.set_up()
            return runner

    def _say_loaded(self, plugin: Plugin) -> None:
        self.failures.pop(plugin.name, None)
        log.info("plugin %s: loaded", plugin.name)
        self.loader.warn_of_typos(plugin)
        for event_type in plugin.event_types():
            if missing := missing_intents(event_type, self._context.bot.intents):
                log.warning(
                    "plugin %s: hears %s only after a restart: the session with Discord began"
                    " without the intent %s",
                    plugin.name,
                    event_type.__name__,
                    missing.name,
                )

    # -- requests and subscriptions

    def handler_for(
        self, request: HTTPServerRequest
    ) -> tuple[type[RequestHandler], dict[str, Any]] | None:
        """What a plugin has to answer this request with, and the groups of its path."""
        for path, handler in self._routes:
            if (groups := path.match(request)) is not None:
                return handler, groups
        return None

    async def greet(
        self, kind: str, guild_id: str, tell: Tell, viewer: Viewer | None = None
    ) -> None:
        """`tell` a client that entered `kind:guild_id` what plugins have for it, as it comes.

        That is what this viewer may see; without one, what is the same for all.
        """
        subscriber = self._subscriber(viewer, guild_id) if viewer else None
        runners = self.running.values()
        await asyncio.gather(*(one.greet(kind, guild_id, tell, subscriber) for one in runners))

    def _subscriber(self, viewer: Viewer, guild_id: str) -> Subscriber:
        def may_see(channel_id: int | str) -> bool:
            return self._context.may_see(viewer, guild_id, str(int(channel_id)))

        return Subscriber(viewer.discord_id, viewer.role, may_see)

    # -- how things stand, live settings

    def health(self) -> dict[str, Any]:
        """What runs and what does not, for /health/ready."""
        running = self.running
        out = self.failures.keys() - running.keys()
        problems: dict[str, str | None] = dict.fromkeys(out, "failed to start, see the log")
        problems |= {name: one.spy.problem for name, one in running.items() if one.spy.problem}
        said = "; ".join(f"{name}: {problem}" for name, problem in sorted(problems.items()))
        return {
            "problem": said or None,
            "loaded": sorted(self.plugins),
            "failed": sorted(problems),
            "outdated": sorted(self.failures.keys() & running.keys()),
            "paused": sorted(name for one in running.values() for name in one.paused()),
        }

    def reconfigure(self, tables: Mapping[str, dict[str, Any]]) -> None:
        """From now on each plugin reads these tables in `spy.settings`.

        Raises OperatorError, and then nothing has changed.
        """
        faults: list[str] = []
        checked = []
        for name, runner in self.runners.items():
            with collecting(faults):
                checked.append((runner, runner.plugin.check_settings(tables.get(name, {}))))
        if faults:
            raise OperatorError(*faults)
        self.loader.tables = tables
        for runner, settings in checked:
            runner.plugin.settings = runner.spy.settings = settings


# ------------------------------------------------------------------------------ gateway
# The session with Discord: hikari's bot, kept alive in this process's loop, and the fence around
# whatever Discord sends or does not send: at the worst it is away, with a reason. It reports how
# things stand and says once what changed; it knows neither plugins' functions nor clients.

PORTAL: Final = "https://discord.com/developers/applications -> your application -> Bot"
PRIVILEGED_SWITCHES: Final = {
    hikari.Intents.GUILD_MEMBERS: "Server Members Intent",
    hikari.Intents.GUILD_PRESENCES: "Presence Intent",
    hikari.Intents.MESSAGE_CONTENT: "Message Content Intent",
}
#: Messages that hikari keeps for plugins that need them.
MOST_MESSAGES: Final = 10_000
#: What access and names are answered from. Nothing of what people write is ever kept.
CACHED: Final = (
    hikari.api.CacheComponents.GUILDS
    | hikari.api.CacheComponents.GUILD_CHANNELS
    | hikari.api.CacheComponents.GUILD_THREADS
    | hikari.api.CacheComponents.MEMBERS
    | hikari.api.CacheComponents.ROLES
    | hikari.api.CacheComponents.ME
)


def intents_for(event_types: Iterable[type[hikari.Event]]) -> hikari.Intents:
    """The least intents that bring these events from guilds (Discord documentation: Gateway Intents)."""
    needed = (missing_intents(one, hikari.Intents.NONE) for one in event_types)
    return functools.reduce(or_, needed, hikari.Intents.GUILDS)


class PresenceUpdate(msgspec.Struct):
    """What decides whether a presence is news (Discord documentation: Presence Update)."""

    user: dict[str, Any]
    guild_id: str
    status: str
    client_status: dict[str, str]
    #: Guild and user, and how that one appears (`code_of`).
    ids: tuple[int, int] = (0, 0)
    code: int = 0

    def __post_init__(self) -> None:
        self.ids = int(self.guild_id), int(self.user["id"])
        self.code = code_of(self.status, self.client_status)


class PresencePacket(msgspec.Struct):
    op: int
    t: str
    s: int
    d: PresenceUpdate


read_presence: Final = msgspec.json.Decoder(PresencePacket).decode
#: Stands for the content of a packet that is no event.
UNCHANGED: Final = object()
#: Packets that bring a guild, and where they name it.
GUILD_CONTENT: Final = {"GUILD_CREATE": "id", "GUILD_MEMBERS_CHUNK": "guild_id"}


class Report:
    """Says in the log how the link to Discord stands: each change once, and of one cause at most one
    line in `quiet` seconds. What comes too soon is said later, if it still holds then.
    """

    def __init__(self, quiet: float) -> None:
        self._quiet = quiet
        self._next: dict[str, float] = {}  # by cause, when it may be said again
        self._said = ""
        self._later: asyncio.TimerHandle | None = None
        self._closed = False
        self._cause = ""
        #: Why Discord is away, or how it came back.
        self.why = "connecting"
        self.connected = False

    def say(self, cause: str, why: str, *, connected: bool) -> None:
        self._cause, self.why, self.connected = cause, why, connected
        self._tell()

    def unreadable(self, name: str, what: str) -> None:
        if self._may_say(f"unreadable {name}"):
            log.error("cannot read Discord's %s: %s; it is left out", name, what)

    def close(self) -> None:
        """Say nothing any more."""
        self._closed = True
        if self._later is not None:
            self._later.cancel()

    def _may_say(self, cause: str) -> bool:
        now = time.monotonic()
        if now < self._next.get(cause, 0.0):
            return False
        self._next[cause] = now + self._quiet
        return True

    def _tell(self) -> None:
        if self._closed or self._cause == self._said:
            return
        # A return is news of its own after each way in which Discord went.
        cause = f"back after {self._said}" if self.connected else self._cause
        if not self._may_say(cause):
            wait = self._next[cause] - time.monotonic()
            if self._later is not None:
                self._later.cancel()
            self._later = asyncio.get_running_loop().call_later(wait, self._tell)
            return
        self._said = self._cause
        if self.connected:
            log.info("connected to Discord: %s", self.why)
        else:
            log.warning("not connected to Discord (%s); dashboards stay up, trying again", self.why)


class Patience(NamedTuple):
    """How long the gateway waits, in seconds, and how often it begins anew."""

    #: For each of: the answer of REST, HELLO, READY, RESUMED.
    step: float = 30.0
    #: Between two tries: doubled each time, less a random part.
    first_retry: float = 1.0
    last_retry: float = 60.0
    #: After a connection that lasted so long the next one begins at once.
    lasted: float = 30.0
    #: Tries in a row to begin a session after which REST is asked again where the gateway is.
    tries: int = 6
    #: New sessions that may begin in a row, for each shard; then one in so many seconds, of all
    #: shards together. Discord resets the token of who begins 1,000 a day.
    sessions: int = 5
    session_every: float = 120.0
    #: Between two lines of one cause in the log.
    quiet: float = 60.0


class AwayError(SpyWatcherError):
    """Discord cannot be had for now. `cause` is one of few words, `why` a sentence for the log."""

    def __init__(self, cause: str, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.cause = cause
        self.why = why
        #: Seconds that Discord asked to wait.
        self.wait = wait


#: Longest that Discord's `retry_after` is believed, in seconds.
LONGEST_WAIT: Final = 86_400.0
#: An answer of `GET /gateway/bot` has some 200 bytes.
MOST_REST_BYTES: Final = 65_536
#: Seconds between two groups of shards that begin a session (Discord documentation: Sharding).
STARTUP_WINDOW: Final = 5.0
#: What a HELLO may ask for, in seconds between two heartbeats; Discord's is 41.25.
LONGEST_HEARTBEAT: Final = 600.0
#: Close codes (Discord documentation: Gateway Close Event Codes): no other try would end otherwise,
FINAL_CODES: Final = frozenset({4004, 4012, 4013, 4014})
#: another number of shards may help, which only REST tells,
START_OVER_CODES: Final = frozenset({4010, 4011})
#: or the session is over. After any other it is resumed.
NEW_SESSION_CODES: Final = frozenset({4003, 4005, 4007, 4009})


class SessionStartLimit(msgspec.Struct):
    remaining: Annotated[int, Meta(ge=0)]
    reset_after: Annotated[float, Meta(ge=0)]  # milliseconds
    max_concurrency: Annotated[int, Meta(ge=1)] = 1


class GatewayInfo(msgspec.Struct):
    """What REST says of the gateway (Discord documentation: Get Gateway Bot)."""

    url: Annotated[str, Meta(pattern=r"^wss?://[^\s/?#]+")]
    shards: Annotated[int, Meta(ge=1, le=4096)]
    session_start_limit: SessionStartLimit


async def fetch_gateway(rest_url: str, token: str, patience: Patience) -> GatewayInfo:
    """Ask REST for the gateway. Raises UpstreamError if the token is refused, else AwayError."""
    client = AsyncHTTPClient(force_instance=True, max_body_size=MOST_REST_BYTES)
    headers = {
        "Authorization": f"Bot {token}",
        "User-Agent": f"DiscordBot (spywatcher, {__version__})",
    }
    request = HTTPRequest(
        f"{rest_url.rstrip('/')}/gateway/bot",
        headers=headers,
        connect_timeout=patience.step,
        request_timeout=patience.step,
        follow_redirects=False,
    )
    answer = asyncio.ensure_future(client.fetch(request, raise_error=False))
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        response = await asyncio.shield(answer)  # Tornado logs what fails after it was cancelled
    except Exception as error:  # whatever a server may send
        raise AwayError("rest", f"its REST API cannot be reached: {reason_of(error)}") from error
    finally:
        client.close()
    refuse_answer(response)
    try:
        return msgspec.json.decode(response.body, type=GatewayInfo)
    except msgspec.DecodeError as error:
        why = f"its answer to GET /gateway/bot cannot be read: {error}"
        raise AwayError("rest answer", why) from error


def refuse_answer(response: HTTPResponse) -> None:
    """Raise what any status but 200 means."""
    if response.code == 401:
        raise UpstreamError("Discord refused the bot token")
    if response.code == 429:
        wait = retry_after(response)
        raise AwayError("rest 429", f"it asks to wait {wait:.0f} s before the next request", wait)
    if response.code == 599:  # Tornado's own: no answer
        raise AwayError("rest", f"its REST API cannot be reached: {reason_of(response.error)}")
    if response.code != 200:
        raise AwayError("rest status", f"its REST API answers {response.code}")


def retry_after(response: HTTPResponse) -> float:
    """Seconds that Discord asks to wait, from the body or the header (Rate Limits); 0 if in neither."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        body = json.loads(response.body)
        wait = body["retry_after"] if "retry_after" in body else response.headers["Retry-After"]
        if float(wait) > 0:  # not so NaN
            return min(float(wait), LONGEST_WAIT)
    with contextlib.suppress(ValueError):
        return min(max(float(response.headers.get("Retry-After", 0)), 0.0), LONGEST_WAIT)
    return 0.0


def reason_of(error: BaseException | None) -> str:
    """What went wrong, in a few words; nothing that was sent is quoted at length."""
    said = clean_text(str(error)).strip()
    speaks = said and isinstance(error, OSError | hikari.HikariError | HTTPError)
    return shortened(said if speaks else f"{type(error).__name__}: {said}", 120)


def closed_with(error: object) -> str:
    code, reason = getattr(error, "code", None), getattr(error, "reason", "")
    return shortened(f"closed with {code} ({clean_text(str(reason))})", 120)


def place_of(error: BaseException) -> str:
    """FILE:LINE FUNCTION in which an error arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def ids_of(payload: Any) -> tuple[hikari.Snowflake, hikari.Snowflake]:
    """Guild and user of a packet about a member."""
    return hikari.Snowflake(payload["guild_id"]), hikari.Snowflake(payload["user"]["id"])


class GatewayEvents(hikari.impl.EventManagerImpl):
    """hikari's, but plain functions may subscribe too: they are called at once, without a task, so
    that they find everything as the packet left it. Of a packet that it cannot read no payload is
    shown. A presence is an event where status or platforms changed, without activities; all are, as
    they came, where hikari keeps presences for plugins that need activities.
    """

    def __init__(self, gateway: Gateway, *hikaris: Any, cache: Any) -> None:
        super().__init__(*hikaris, cache=cache)
        self._gateway = gateway
        self._presences = gateway.presences
        self._whole = bool(cache.settings.components & hikari.api.CacheComponents.PRESENCES)
        self._plain: dict[type[Any], tuple[Callable[[Any], Any], ...]] = {}

    def consume_raw_event(
        self, event_name: str, shard: hikari.api.GatewayShard, payload: Any
    ) -> None:
        if payload is UNCHANGED:
            return
        consumer = self._consumers[event_name.lower()]  # LookupError: hikari knows no such event
        if type(payload) is dict and self._enabled_for_event(hikari.ShardPayloadEvent):
            factory = self._event_factory
            self.dispatch(factory.deserialize_shard_payload_event(shard, payload, name=event_name))
        if not consumer.is_enabled:
            return
        try:
            self._presences.take(event_name, payload)
            consumer.callback(shard, payload)
            if self._whole and self._cache and event_name == "GUILD_MEMBER_REMOVE":
                self._cache.delete_presence(*ids_of(payload))  # hikari 2.7 keeps it
        except hikari.UnrecognisedEntityError:
            return
        except Exception as error:
            if event_name == "READY":
                raise AwayError("READY", f"READY cannot be read: {reason_of(error)}") from error
            self._gateway.packet_unreadable(event_name, payload, error)
        else:
            self._gateway.packet_read(event_name, payload)

    def subscribe(
        self, event_type: type[Any], callback: Callable[[Any], Any], *, _nested: int = 0
    ) -> None:
        if inspect.iscoroutinefunction(callback):
            super().subscribe(event_type, callback, _nested=_nested + 1)
        else:
            self._plain[event_type] = (*self._plain.get(event_type, ()), callback)
            self._increment_listener_group_count(event_type, 1)

    def unsubscribe(self, event_type: type[Any], callback: Callable[[Any], Any]) -> None:
        plain = self._plain.pop(event_type, ())
        if left := tuple(one for one in plain if one != callback):
            self._plain[event_type] = left
        if callback in plain:
            self._increment_listener_group_count(event_type, -1)
        else:
            super().unsubscribe(event_type, callback)

    def _enabled_for_event(self, event_type: type[hikari.Event], /) -> bool:
        types = event_type.dispatches()
        return not self._plain.keys().isdisjoint(types) or self._has_async(types)

    def _has_async(self, types: Iterable[type[hikari.Event]]) -> bool:
        return not (
            self._listeners.keys().isdisjoint(types) and self._waiters.keys().isdisjoint(types)
        )

    def dispatch(self, event: hikari.Event, *, return_tasks: bool = False) -> Any:
        types = event.dispatches()
        for event_type in types:
            for callback in self._plain.get(event_type, ()):
                callback(event)
        if return_tasks or self._has_async(types):
            return super().dispatch(event, return_tasks=return_tasks)
        return None

    def read_packet(self, data: bytes) -> Any:
        """A packet from its JSON. Of a presence stands there what decides, or that it is `UNCHANGED`."""
        with contextlib.suppress(msgspec.MsgspecError, ValueError, KeyError):
            if b'"PRESENCE_UPDATE"' in data and not self._wants_all():
                packet = read_presence(data)
                if packet.t == "PRESENCE_UPDATE":
                    known = self._presences.code(*packet.d.ids) == packet.d.code
                    content = UNCHANGED if known else packet.d
                    return {"op": packet.op, "t": packet.t, "s": packet.s, "d": content}
            return msgspec.json.decode(data)
        return json.loads(data)  # it takes more than the standard allows

    def _wants_all(self) -> bool:
        return self._whole or self._enabled_for_event(hikari.ShardPayloadEvent)

    @filtered(PresenceUpdateEvent, hikari.api.CacheComponents.PRESENCES)
    def on_presence_update(self, shard: hikari.api.GatewayShard, payload: Any) -> None:
        update = msgspec.convert(payload, PresenceUpdate)
        guild_id, user_id = map(hikari.Snowflake, update.ids)
        code = update.code
        before = self._presences.update(guild_id, user_id, code)
        if before == code and not self._whole:
            return
        appeared = None if before is None else APPEARANCES[before], APPEARANCES[code]
        make = functools.partial(self._hikaris, shard, payload, appeared[0])
        event = PresenceUpdateEvent(shard, guild_id, user_id, appeared, make)
        if self._whole and self._cache:
            presence = event.presence  # with it the old one is read, before it goes
            if code and before is not None:
                self._cache.update_presence(presence)
            else:
                self._cache.delete_presence(guild_id, user_id)
        self.dispatch(event)

    def _hikaris(
        self, shard: hikari.api.GatewayShard, payload: Any, before: Presence | None
    ) -> hikari.PresenceUpdateEvent:
        """What hikari makes of it, with activities only where it keeps presences."""
        if self._whole and self._cache:
            old = self._cache.get_presence(*ids_of(payload))
        else:
            if isinstance(payload, PresenceUpdate):
                payload = msgspec.structs.asdict(payload)
            payload = {**payload, "activities": ()}
            old = self._old(payload, before)
        factory = self._event_factory
        return factory.deserialize_presence_update_event(shard, payload, old_presence=old)

    def _old(self, payload: Any, before: Presence | None) -> hikari.MemberPresence | None:
        """hikari's form of how a member appeared; None for offline, as hikari has it."""
        if before is None or before.status == "offline":
            return None
        devices = dict.fromkeys(before.platforms, before.status)
        old = {"status": before.status, "client_status": devices}
        return self._entity_factory.deserialize_member_presence({**payload, **old})


class TakingTurns:
    """A gateway connection whose reader lets others have their turn: hikari takes all packets that
    have come in one go, and after a pause these may be thousands.
    """

    #: Seconds for which it may go on.
    TURN: Final = 0.005

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._until = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def receive_json(self) -> Any:
        if time.monotonic() > self._until:
            await asyncio.sleep(0)
            self._until = time.monotonic() + self.TURN
        return await self._connection.receive_json()


class Brake:
    """How many sessions a shard may begin: a few at once, later one every so many seconds."""

    def __init__(self, at_once: int, every: float) -> None:
        self._left = float(at_once)
        self._at_once = at_once
        self._every = every
        self._since = time.monotonic()

    @property
    def wait(self) -> float:
        """Seconds until a session may begin."""
        now = time.monotonic()
        self._left = min(self._at_once, self._left + (now - self._since) / self._every)
        self._since = now
        return max(0.0, (1 - self._left) * self._every)

    def take(self) -> None:
        self._left -= 1


class Shard(hikari.impl.GatewayShardImpl):
    """hikari's shard, but each step has its time, and whatever breaks it is followed by another try.

    Discord documentation: Gateway, Connection Lifecycle. `_awaited` says which step it is at, and so
    what Discord owes:

        step       at most (`Patience`)     then
        HELLO      step                     READY without a session, RESUMED with one
        READY      step                     events
        RESUMED    step                     events
        events     -                        the pause
        (pause)    last_retry, or the brake HELLO

    A step that fails leads to the pause. The session is given up for a new one when Discord says so,
    or when instead of READY or RESUMED came nothing, or what cannot be read.
    """

    def __init__(self, gateway: Gateway, brake: Brake, **hikaris: Any) -> None:
        super().__init__(**hikaris)
        self._gateway = gateway
        self._patience = gateway.patience
        self._brake = brake
        self._awaited = "HELLO"
        self._failures = 0
        self._broken: Exception | None = None
        self._lifetime: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to connect; unlike hikari's this does not wait until Discord has let it in."""
        self._handshake_event = asyncio.Event()
        self._keep_alive_task = asyncio.create_task(
            self._keep_alive(), name=f"keep alive (shard {self.id})"
        )

    async def _keep_alive(self) -> None:
        try:
            while True:
                if self._session_id is None:
                    await self._wait_for_brake()
                began = time.monotonic()
                try:
                    await self._live()
                    self._away("lost", "the connection was lost")
                except Exception as error:  # whatever Discord sends
                    self._away(*self._cause(error))
                    if self._is_final(error) or self._is_lost():
                        self._gateway.shard_ended(error)
                        return
                if self._is_closing:  # told as the socket was closed, where hikari 2.7 swallows it
                    return
                await asyncio.sleep(self._pause(time.monotonic() - began))
        except asyncio.CancelledError:
            self._is_closing = True

    async def _wait_for_brake(self) -> None:
        while (wait := self._brake.wait) > 0:
            self._away("sessions", f"sessions keep ending; the next begins in {wait:.0f} s")
            await asyncio.sleep(wait)

    async def _live(self) -> None:
        """One connection, from its beginning to its end; raises what broke it."""
        try:
            await self._connect()
            if self._has_begun():
                self._awaited = "events"
                self._gateway.shard_up(self)
                self._event_manager.dispatch(self._event_factory.deserialize_connected_event(self))
                await asyncio.wait(self._lifetime, return_when=asyncio.FIRST_COMPLETED)
            if self._broken is not None:
                raise self._broken
        finally:
            await self._hang_up()

    def _has_begun(self) -> bool:
        """Whether READY or RESUMED came."""
        handshake = self._handshake_event
        return handshake is not None and handshake.is_set()

    async def _connect(self) -> tuple[asyncio.Task[None], ...]:
        self._awaited, self._broken, self._lifetime = "HELLO", None, []
        connecting = asyncio.create_task(super()._connect())
        try:
            async with asyncio.timeout(self._patience.step) as self._deadline:
                tasks = await asyncio.shield(connecting)
        except TimeoutError as error:
            why = f"no {self._awaited} within {self._patience.step:g} s"
            raise AwayError(self._awaited, why) from error
        finally:
            await self._give_up(connecting)
        if self._broken is not None:
            raise self._broken
        if self._has_begun() and self._session_id is None:
            raise AwayError("READY", "RESUMED came instead of READY")
        return tasks

    async def _give_up(self, connecting: asyncio.Task[Any]) -> None:
        """End a step that is not over. hikari 2.7 leaks what it is cancelled in before its socket is there."""
        patience = time.monotonic() + CLOSING_PATIENCE
        while self._ws is None and not connecting.done() and time.monotonic() < patience:
            await asyncio.wait([connecting], timeout=CLOSING_PATIENCE / 50)
        await end_tasks([connecting])

    async def _heartbeat(self, heartbeat_interval: float) -> None:
        """hikari begins this with HELLO, right before it sends IDENTIFY or RESUME."""
        with self._lifelong():
            self._awaited = "RESUMED" if self._seq is not None else "READY"
            if self._awaited == "READY":
                self._brake.take()
            if not 0 < heartbeat_interval <= LONGEST_HEARTBEAT:
                why = f"HELLO asks for a heartbeat each {heartbeat_interval:g} s"
                raise AwayError("HELLO", why)
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._patience.step)
            await super()._heartbeat(heartbeat_interval)
            raise AwayError("heartbeat", "it answers no heartbeat")

    async def _poll_events(self) -> None:
        with self._lifelong():
            self._ws = TakingTurns(self._ws)  # type: ignore[assignment]  # all that is asked of it
            await super()._poll_events()

    @contextlib.contextmanager
    def _lifelong(self) -> Iterator[None]:
        """A task that lives as long as the connection; its error is `_broken`, since hikari loses some."""
        self._lifetime.append(asyncio.current_task())  # type: ignore[arg-type]  # it runs in one
        try:
            yield
        except Exception as error:  # whatever Discord sends
            self._broken = self._broken or error

    async def _hang_up(self) -> None:
        """End the connection and all that lives as long."""
        await asyncio.sleep(0)  # what was begun a moment ago is in `_lifetime` only now
        await end_tasks(self._lifetime)
        ws, self._ws = self._ws, None
        if ws is not None:
            code = hikari.ShardCloseCode.GOING_AWAY if self._is_closing else RESUME_LATER
            with contextlib.suppress(Exception):  # it is over, one way or another
                async with asyncio.timeout(CLOSING_PATIENCE):
                    await ws.send_close(code=code, message=b"")
        if self._has_begun() and self._handshake_event is not None:
            self._handshake_event.clear()
            self._event_manager.dispatch(self._event_factory.deserialize_disconnected_event(self))

    def _forget_session(self) -> None:
        self._seq = self._session_id = self._resume_gateway_url = None

    def _is_final(self, error: Exception) -> bool:
        return getattr(error, "code", None) in FINAL_CODES | START_OVER_CODES

    def _is_lost(self) -> bool:
        """Whether the gateway may be elsewhere by now; nothing is given up for asking REST."""
        tried = self._failures >= self._patience.tries
        return tried and self._session_id is None and not self._gateway.any_connected

    def _cause(self, error: Exception) -> tuple[str, str]:
        """What to say of an error, and of the session what is left of it."""
        if isinstance(error, hikari.GatewayServerClosedConnectionError):
            if error.code in NEW_SESSION_CODES:
                self._forget_session()
            return "closed", f"the connection was lost: {closed_with(error)}"
        if isinstance(error, hikari.GatewayConnectionError | OSError):
            return "lost", f"the connection was lost: {reason_of(error)}"
        if self._awaited in ("READY", "RESUMED"):
            self._forget_session()
        if isinstance(error, AwayError):
            return error.cause, error.why
        return "unreadable", f"its {self._awaited} cannot be read: {reason_of(error)}"

    def _pause(self, lasted: float) -> float:
        """Seconds until the next try: none after a connection that lasted, else longer each time."""
        patience = self._patience
        self._failures = 0 if lasted >= patience.lasted else min(self._failures + 1, 10)
        longest = min(patience.first_retry * 2 ** (self._failures - 1), patience.last_retry)
        return random.uniform(longest / 2, longest) if self._failures else 0.0

    def _away(self, cause: str, why: str) -> None:
        self._gateway.shard_away(self, cause, why)


#: Seconds that a connection in the making gets to be made, when it is to end; and one to be closed.
CLOSING_PATIENCE: Final = 1.0
#: With 1000 or 1001 Discord would end the session (Discord documentation: Initiating a Disconnect).
RESUME_LATER: Final = 3000


class Bot(hikari.GatewayBot):
    """hikari's bot with shards of ours. It is begun with what REST said, and asks it nothing itself."""

    def __init__(self, gateway: Gateway, token: str, **hikaris: Any) -> None:
        super().__init__(token, **hikaris)
        self._gateway = gateway
        self._event_manager = self.events = GatewayEvents(
            gateway, self._entity_factory, self._event_factory, self._intents, cache=self._cache
        )

    async def begin(self, info: GatewayInfo, brakes: Mapping[int, Brake]) -> None:
        """Start a shard for each brake; returns once each is about to connect."""
        self._closed_event, self._closing_event = asyncio.Event(), asyncio.Event()
        self._rest.start()
        self._voice.start()
        self._event_manager.dispatch(self._event_factory.deserialize_starting_event())
        for number, (shard_id, brake) in enumerate(brakes.items()):
            if number and number % info.session_start_limit.max_concurrency == 0:
                await asyncio.sleep(STARTUP_WINDOW)
            self._shards[shard_id] = shard = self._shard(info, shard_id, brake)
            await shard.start()
        self._event_manager.dispatch(self._event_factory.deserialize_started_event())

    def _shard(self, info: GatewayInfo, shard_id: int, brake: Brake) -> Shard:
        return Shard(
            self._gateway,
            brake,
            shard_id=shard_id,
            shard_count=info.shards,
            url=info.url,
            token=self._token,
            intents=self._intents,
            http_settings=self._http_settings,
            proxy_settings=self._proxy_settings,
            event_manager=self._event_manager,
            event_factory=self._event_factory,
            loads=self.events.read_packet,
        )


def refusal(code: object, switches: str, token_key: str) -> str:
    """What an operator reads of the code with which Discord refused: what to change, and where."""
    if code == 4014:
        return (
            f"Discord refused the intents: switch on {switches} at {PORTAL}"
            " -> Privileged Gateway Intents"
        )
    if code in (4012, 4013):
        return (
            f"Discord no longer speaks this version of its gateway ({code}): upgrade hikari"
            f" (this is {hikari.__version__}) and SpyWatcher"
        )
    table, _, key = token_key.partition(".")
    return (
        f"Discord refused the bot token: reset it at {PORTAL} -> Reset Token"
        f" and put the new one into [{table}] {key}"
    )


class Gateway:
    """Keeps one bot connected to Discord, and says so in the log whenever that changes."""

    patience = Patience()
    #: Seconds without an answered heartbeat after which the session counts as silent. Discord
    #: asks for one each 41.25 s.
    silence_limit = 60.0
    #: Seconds that the supervisor may take for one step before it counts as stuck.
    turn_limit = 30.0

    def __init__(
        self,
        settings: DiscordSettings,
        token: str,
        wanted: dict[type[hikari.Event], list[str]],
        metrics: Metrics,
        cached: hikari.api.CacheComponents = hikari.api.CacheComponents.NONE,
    ) -> None:
        self._settings = settings
        self._token = token
        self._metrics = metrics
        self._turned = time.monotonic()
        self._wanted = wanted
        self._fresh_since = float("-inf")
        self._brakes: dict[int, Brake] = {}
        self._up: set[int] = set()
        self._ended: Exception | None = None
        self._closing: asyncio.Task[None] | None = None
        self._how = ""  # of the newest session
        self._unread_guilds: dict[str, str] = {}
        self._report = Report(self.patience.quiet)
        self.intents = intents_for(wanted)
        self.presences = Presences()
        #: The setting that holds the bot's token.
        self.token_key = "discord.token_file" if settings.token_file else "discord.token"
        try:
            self.bot = self._make_bot(token, cached)
        except ValueError as error:
            raise OperatorError(
                f"{self.token_key}: got what is no bot token, expected the one from {PORTAL}"
            ) from error
        self.bot.events.subscribe(hikari.ShardReadyEvent, self._on_ready)
        self.bot.events.subscribe(hikari.ShardResumedEvent, self._on_resumed)

    def _make_bot(self, token: str, cached: hikari.api.CacheComponents) -> Bot:
        # Well within the time of a step, so that aiohttp itself tidies up what hangs.
        timeouts = hikari.impl.HTTPTimeoutSettings(total=self.patience.step * 0.7)
        return Bot(
            self,
            token,
            rest_url=self._settings.rest_url,
            intents=self.intents,
            cache_settings=hikari.impl.CacheSettings(
                components=CACHED | cached, max_messages=MOST_MESSAGES
            ),
            http_settings=hikari.impl.HTTPSettings(timeouts=timeouts),
            suppress_optimization_warning=True,
            banner=None,
            logs=None,
        )

    def settled(self) -> bool:
        """Whether the gateway session is older than the startup grace."""
        return time.monotonic() - self._fresh_since >= self._settings.startup_grace

    async def run(self) -> None:
        """Stay connected until cancelled; raises UpstreamError once Discord refuses us for good."""
        failures = 0
        self._report = Report(self.patience.quiet)  # that of the last time is closed
        while True:
            asked = 0.0
            try:
                await self._turning(self._begin())
                failures = 0
                await self._turning(self.bot.join())
                if (code := getattr(self._ended, "code", None)) in FINAL_CODES:
                    raise UpstreamError(code)  # any other end: REST is to be asked again
            except UpstreamError as error:
                text = refusal(error.args[0], self._switches(), self.token_key)
                raise UpstreamError(text) from error
            except AwayError as error:
                self._away(error.cause, error.why)
                asked = error.wait
            except Exception as error:  # whatever Discord sends
                self._away("unreadable", reason_of(error))
            await self._close()
            patience = self.patience
            wait = min(patience.first_retry * 2**failures, patience.last_retry)
            failures = min(failures + 1, 10)
            await self._turning(asyncio.sleep(max(wait, asked)))

    async def close(self) -> None:
        """End the session with Discord, when `run` has ended."""
        self._report.close()  # the end is no news
        await self._close()

    async def _begin(self) -> None:
        info = await fetch_gateway(self._settings.rest_url, self._token, self.patience)
        limit = info.session_start_limit
        if limit.remaining < info.shards:
            wait = min(limit.reset_after / 1000, LONGEST_WAIT)
            why = f"it lets begin no session any more for {wait:.0f} s"
            raise AwayError("sessions", why, wait)
        every = self.patience.session_every * info.shards
        self._brakes = {
            shard_id: self._brakes.get(shard_id) or Brake(self.patience.sessions, every)
            for shard_id in range(info.shards)
        }
        self._ended = None
        await self.bot.begin(info, self._brakes)

    async def _turning(self, step: Coroutine[Any, Any, None]) -> None:
        """Wait for a step that may take any time, and note meanwhile that this still runs."""
        task = asyncio.create_task(step)
        try:
            while not task.done():
                self._turned = time.monotonic()
                await asyncio.wait([task], timeout=self.turn_limit / 4)
            task.result()
        except asyncio.CancelledError:
            self._report.close()  # see `run`: the step may still end with a report
            raise
        finally:
            self._turned = time.monotonic()
            await end_tasks([task])

    @property
    def alive(self) -> bool:
        """Whether the supervisor still runs: no step of its own, such as closing, is stuck."""
        return time.monotonic() - self._turned < self.turn_limit

    @property
    def latency(self) -> float:
        """Seconds Discord took to answer the last heartbeat; NaN before the first."""
        return self.bot.heartbeat_latency

    @property
    def silence(self) -> float:
        """Seconds since Discord answered a heartbeat, on the shard that waits longest; NaN as above."""
        # hikari tells nobody when; the private name is held by tests/test_health.py.
        heard = (shard._last_heartbeat_ack_received for shard in self.bot.shards.values())  # type: ignore[attr-defined]
        return max((time.time() - moment for moment in heard), default=float("nan"))

    @property
    def guilds(self) -> int:
        return watched(self.bot.cache.get_guilds_view(), self._settings)

    def health(self) -> dict[str, Any]:
        """How the link to Discord stands, for /health/ready."""
        problem = None
        if not self.connected:
            problem = f"not connected to Discord ({self._report.why})"
        elif self.silence > self.silence_limit:
            problem = f"Discord has not answered for {self.silence:.0f} s"
        elif self._unread_guilds:
            problem = f"cannot be read: {'; '.join(self._unread_guilds.values())}"
        return {
            "problem": problem,
            "connected": self.connected,
            "shards": {"connected": len(self._up), "all": len(self._brakes)},
            "heartbeatAge": finite(self.silence),
            "latency": finite(self.latency),
            "guilds": self.guilds,
        }

    @property
    def any_connected(self) -> bool:
        return bool(self._up)

    @property
    def connected(self) -> bool:
        """Whether all shards are."""
        return bool(self._up) and len(self._up) == len(self._brakes)

    async def _close(self) -> None:
        self._up.clear()
        self._unread_guilds.clear()
        if self.bot.is_alive:  # hikari 2.7 cannot close what was cancelled as it closed
            if self._closing is None or self._closing.done():
                self._closing = asyncio.create_task(self.bot.close())
            await asyncio.shield(self._closing)
        self.presences.clear()

    # -- refused for good

    def _switches(self) -> str:
        """The switches of the developer portal that are needed, and for what."""
        return " and ".join(
            f"{switch} (for {', '.join(self._wanted_by(intent))})"
            for intent, switch in PRIVILEGED_SWITCHES.items()
            if intent & self.intents
        )

    def _wanted_by(self, intent: hikari.Intents) -> list[str]:
        plugins = [
            plugin
            for event_type, names in self._wanted.items()
            if intents_for([event_type]) & intent
            for plugin in names
        ]
        return sorted(set(plugins))

    # -- what shards tell

    def shard_up(self, shard: hikari.api.GatewayShard) -> None:
        """READY or RESUMED came, and the listeners of that have heard it."""
        self._up.add(shard.id)
        if self.connected:
            self._report.say("connected", self._how, connected=True)

    def shard_away(self, shard: hikari.api.GatewayShard, cause: str, why: str) -> None:
        self._up.discard(shard.id)
        self._away(cause, why if shard.shard_count == 1 else f"shard {shard.id}: {why}")

    def shard_ended(self, error: Exception) -> None:
        """A shard is over, and with it the bot; `run` has to judge why."""
        self._ended = error

    def _on_ready(self, event: hikari.ShardReadyEvent) -> None:
        self._fresh_since = time.monotonic()
        self._metrics.gateway_changes.labels("new session").inc()
        self._how = f"a new session, guilds: {watched(event.unavailable_guilds, self._settings)}"

    def _on_resumed(self, event: hikari.ShardResumedEvent) -> None:
        self._metrics.gateway_changes.labels("resumed").inc()
        self._how = "session resumed, nothing missed"

    def _away(self, cause: str, why: str) -> None:
        if self._report.connected:
            self._metrics.gateway_changes.labels("lost").inc()
        self._metrics.gateway_failures.labels(cause).inc()
        self._report.say(cause, why, connected=False)

    # -- what the bot tells of packets

    def packet_unreadable(self, name: str, payload: Any, error: Exception) -> None:
        self._metrics.unreadable_packets.labels(name).inc()
        self._report.unreadable(name, f"{reason_of(error)} at {place_of(error)}")
        if name in GUILD_CONTENT and isinstance(payload, dict):
            guild_id = str(payload.get(GUILD_CONTENT[name]))
            shown = shown_name(str(payload.get("name") or ""), 0, NAME_LENGTH)
            self._unread_guilds[guild_id] = f"{name} of guild {clean_text(guild_id)[:20]}" + (
                f" ({shown})" if shown != "0" else ""
            )

    def packet_read(self, name: str, payload: Any) -> None:
        if self._unread_guilds and name in (*GUILD_CONTENT, "GUILD_DELETE"):
            self._unread_guilds.pop(str(payload.get(GUILD_CONTENT.get(name, "id"))), None)


def watched(guild_ids: Collection[int], settings: DiscordSettings) -> int:
    """How many of these are watched."""
    named = settings.guilds
    return sum(str(one) in named for one in guild_ids) if named else len(guild_ids)


def finite(number: float) -> float | None:
    """JSON has no NaN."""
    return round(number, 3) if math.isfinite(number) else None


# --------------------------------------------------------------------------------- node
# The one seam between a process alone and one of several: who judges, counts, keeps, leads and
# delivers. `Node` is a process alone; spywatcher_cluster.ClusterNode overrides it. A node knows
# no event by name and no client; nothing else in this file knows that there may be others.


def destination_of(guild_id: str, kind: str, fields: EventData) -> Destination:
    channel_id = fields.get("channelId") or fields.get("channel_id") or ""
    return Destination(guild_id, kind, str(channel_id))


#: What is run again and again.
Work = Callable[[], Coroutine[Any, Any, None]]
#: Seconds in which a client's return waits for what this process is still to hear.
RECALL_PATIENCE: Final = 12.0


class Parts(NamedTuple):
    """What of its own process a node works with."""

    clients: RightsWatcher
    rooms: Rooms
    recovery: Recovery
    plugins: PluginHost
    throttle: Throttle
    metrics: Metrics


class Node:
    """A process alone."""

    _parts: Parts

    def __init__(self, settings: Settings, bot: Bot) -> None:
        #: Who judges, counts attempts, and counts open connections.
        self.access = Access(settings.auth, settings.discord.guilds, CacheReader(bot.cache))
        self.counters = Counters()
        self.connections = OpenConnections()

    # -- start, stop, how things stand

    def attach(self, parts: Parts) -> None:
        """Called once, when all parts are made."""
        self._parts = parts

    def start(self) -> None:
        """Called when this process listens."""

    async def stop(self, grace: float) -> None:
        """Called when plugins and gateway have stopped; takes `grace` seconds at most."""

    def health(self) -> dict[str, Any]:
        """For /health/ready: what shares the work with others."""
        return {"problem": None}

    # -- the gateway

    @property
    def leading(self) -> bool:
        """Whether the session with Discord is this process's to keep."""
        return True

    async def lead(self, work: Work, rest: Work) -> None:
        """Have gateway and plugins `work` whenever they are this process's, and then `rest`.

        To end it, `work` is cancelled until it ends, and `rest` takes its time. Raises what `work`
        raises.
        """
        try:
            await until_one_ends(work())
        finally:
            await rest()

    def share(self, plugin: str) -> Shared | None:
        """What a plugin keeps for all nodes; None where there is one."""
        return None

    def marks(self, plugin: str) -> Marks | None:
        """What a plugin has all nodes remember; None where there is one."""
        return None

    # -- events

    def has_listeners(self, guild_id: str, kind: str) -> bool:
        """Whether anybody is in the room, or may come back to it: else no payload needs to be made."""
        return self._listens(Destination(guild_id, kind).room)

    def _listens(self, room: str) -> bool:
        return self._parts.rooms.has_listeners(room) or self._parts.recovery.has_listeners(room)

    def deliver(self, event: str, guild_id: str, fields: EventData, kind: str) -> None:
        """The last step of an event that all nodes share: to whom it goes."""
        to = destination_of(guild_id, kind, fields)
        if self._listens(to.room):
            self._parts.metrics.sent.counts[event] += 1
            frame = self._parts.recovery.logs.add(to, event_packet(event, fields))
            self._parts.clients.send(to, frame)
        else:
            self._parts.metrics.dropped.labels("nobody listens").inc()

    def window_changed(
        self, topic: Topic, seconds: float | None, waiting: DataOrMaker | None
    ) -> None:
        """As the throttle tells it (`Outlet.window_changed`), for whoever leads next."""

    # -- dashboards

    def ticket_changed(self, ticket: Ticket) -> None:
        """A client that can recover has come, or is in other rooms; or its ticket is gone."""

    async def recall(self, pid: object, viewer: Viewer, offset: object) -> bool:
        """Have here what the client is owed that says this pid; returns in `RECALL_PATIENCE`.

        Returns whether it was another process's client: its connection there counts no more.
        """
        recovery, seen = self._parts.recovery, decode_offset(offset)
        if seen and seen.position < MOST_BELIEVED and recovery.find(pid, viewer.discord_id) is None:
            recovery.logs.reach(seen.position)  # a process before this one has counted so far
        return False

    def viewer_entered(self, discord_id: str) -> None:
        """A viewer has one dashboard more here; all of them stand in `connections`."""

    def follow(self, guild_id: str) -> asyncio.Task[None] | None:
        """Done when what other nodes send to the guild's rooms is heard here; None: it is."""
        return None

    async def send_snapshots(self, kind: str, guild_id: str, tell: Tell, viewer: Viewer) -> None:
        """`tell` a viewer who is a new subscriber of the room what plugins have for it."""
        await self._parts.plugins.greet(kind, guild_id, tell, viewer)


# ------------------------------------------------------------------------- web handlers
# The Tornado side of Socket.IO: which requests get through, and the bytes of a WebSocket
# handed to its session. Bounds and refusals come before any work.


#: Headers of a request, together: a browser's are below 4 KiB.
MAX_HEADER_BYTES: Final = 16_384
#: A buffer of so many bytes is made and zeroed for every read; clients send little at a time.
READ_BYTES: Final = 8_192
SOCKET_PATH: Final = "/socket.io/"
ORIGIN_SHOWN: Final = 100


class Origins:
    """Which pages may connect: the same host, or one that is listed.

    "https://*.host" is any below, "http://host:*" one on any port.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        listed = frozenset(patterns)
        self._any, self._null = "*" in listed, "null" in listed
        self._named = re.compile("|".join(map(origin_pattern, listed - {"*", "null"})) or "(?!)")

    def allow(self, origin: str | None, host: str) -> bool:
        """`origin` and `host` as in the request's headers (RFC 6454; absent outside of browsers)."""
        if origin is None or self._any:
            return True
        same = origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
        return same or (self._null and origin.lower() == "null") or self.lists(origin)

    def lists(self, origin: str) -> bool:
        """Whether it is named, by a pattern too; "*" and "null" are nobody's names."""
        return self._named.fullmatch(origin.lower()) is not None


def origin_pattern(listed: str) -> str:
    exact = re.escape(listed)
    return exact.replace(r"://\*\.", r"://[^/]+\.").replace(r":\*", r"(:[0-9]+)?")


#: Headers by which a request shows that a proxy passed it on; of "X-…" there are too many to name.
PASSED_ON: Final = re.compile(
    r"forwarded|via|cdn-.*|cf-.*|.*-ip|x-(?!prometheus-).*", re.IGNORECASE
)


class OperatorNetworks:
    """Who may read what is the operator's alone: this host itself, and who is listed.

    The address is the one that the kernel names, never one from a header. A reverse proxy on this
    host has a local address too while it speaks for the whole world: what it may have passed on
    shows by its headers, by HTTP/1.0 or by a `Host` that is missing or no local one, and gets in
    only if that address is listed.
    """

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(text) for text in networks]

    def include(self, request: HTTPServerRequest) -> bool:
        peer = parse_address(request.remote_ip or "")
        if peer is None:
            return False
        if any(peer in network for network in self._networks):
            return True
        passed_on = request.version == "HTTP/1.0" or any(map(PASSED_ON.fullmatch, request.headers))
        named = is_local(request.host_name) and "Host" in request.headers
        return peer.is_loopback and named and not passed_on


def is_local(host: str) -> bool:
    """Whether a `Host` header, without its port, names the loopback."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class FrontDoor:
    """What is decided about a request before anything is spent on it, and the connections that are open."""

    def __init__(self, settings: ServerSettings, limits: Limits) -> None:
        self.limits = limits
        #: Nobody is let in any more; connections that are open may still ask.
        self.closed = False
        self._connections: dict[IOStream, Connection] = {}
        self.reconfigure(settings)

    def reconfigure(self, settings: ServerSettings) -> None:
        self.origins = Origins(settings.cors_origins)
        self.operators = OperatorNetworks(settings.metrics_from)
        self._proxies = [ipaddress.ip_network(text) for text in settings.trusted_proxies]

    # -- connections

    def open(self, stream: IOStream, peer: str) -> None:
        """A TCP connection was accepted; of a proxy's it is not known yet whom it counts for."""
        client = parse_address(peer)
        of_proxy = client is None or self._is_proxy(client)
        address = "" if client is None or of_proxy else address_key(client)
        self._connections[stream] = Connection(self.limits, stream, address)

    def connection(self, request: HTTPServerRequest) -> Connection | None:
        """What a request comes by; None once its WebSocket has taken it."""
        stream: IOStream | None = getattr(request.connection, "stream", None)
        return None if stream is None else self._connections.get(stream)

    def close(self, stream: IOStream) -> None:
        """The connection was closed, or the web server is done with it."""
        connection = self._connections.get(stream)
        if connection is not None and (stream.closed() or not connection.detached):
            del self._connections[stream]
            connection.end()

    # -- addresses

    def address(self, request: HTTPServerRequest) -> str:
        """Whom a request counts for: its peer or, of a trusted proxy, the right-most hop that is none."""
        hops = ",".join(request.headers.get_list("X-Forwarded-For")).split(",")
        client = parse_address(request.remote_ip or "")
        while hops and client is not None and self._is_proxy(client):
            hop = parse_hop(hops.pop())
            if hop is None:
                break
            client = hop
        return address_key(client) if client is not None else "unknown"

    def lists(self, origin: str) -> bool:
        """Whether `cors_origins` names the page's origin."""
        return self.origins.lists(origin)

    def _is_proxy(self, address: Address) -> bool:
        return any(address in network for network in self._proxies)


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> Address | None:
    """An address; one of IPv4 that was mapped into IPv6 is still one of IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if address.version == 6 else address


def parse_hop(text: str) -> Address | None:
    """An entry of X-Forwarded-For: some proxies add the port, and then brackets to IPv6."""
    text = text.strip().strip('"')
    if text.startswith("["):
        return parse_address(text[1:].partition("]")[0])
    host, colon, port = text.partition(":")
    return parse_address(host if colon and port.isdecimal() else text)


def address_key(address: Address) -> str:
    """What is counted as one address: of IPv6 the /64, since every household has one."""
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Handler(RequestHandler):
    """Base of what is served: JSON without a banner, never from a cache."""

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Cache-Control", "no-store")

    def compute_etag(self) -> None:
        """None: an answer that nobody keeps is never answered with 304."""

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """What Tornado refuses by itself: above all other methods than those that there are."""
        if status_code == 405:
            self.set_header("Allow", ", ".join(self.SUPPORTED_METHODS))
        self.finish({"message": self._reason})


#: In the place of each request that has become a WebSocket.
UPGRADED: Final = HTTPServerRequest(
    start_line=RequestStartLine("GET", SOCKET_PATH, "HTTP/1.1"), headers=HTTPHeaders(Host="")
)


class SocketHandler(Handler, WebSocketHandler):
    """One request of a Socket.IO client: a poll, or its WebSocket."""

    SUPPORTED_METHODS = ("GET", "POST", "OPTIONS")

    def initialize(self, engine: Engine, door: FrontDoor) -> None:
        self._engine = engine
        self._door = door
        self._address = door.address(self.request)
        self._sid = parse_sid(self.request)
        #: Whether the request names a page's origin.
        self.from_browser = "Origin" in self.request.headers
        self._session: Session | None = None
        self._stream = stream_of(self)
        connection = door.connection(self.request)
        assert connection is not None
        self.connection = connection

    async def prepare(self) -> None:
        """Turn away foreign pages and blocked addresses."""
        origin = self.request.headers.get("Origin")
        session = self._engine.sockets.get(self._sid)
        for who in filter(None, (self.connection, session)):
            self._engine.limits.strangers.touch(who)
        if not self._door.origins.allow(origin, self.request.host):
            self._refuse(403, "origin", "This origin is not allowed", unlisted(origin))
            return
        if origin is not None:
            self.set_header("Access-Control-Allow-Origin", origin)
            self.set_header("Access-Control-Allow-Credentials", "true")
            self.set_header("Vary", "Origin")
        if session is None and (seconds := await self._door.limits.blocked_for(self._address)):
            self.set_header("Retry-After", str(math.ceil(seconds)))
            self._refuse(429, "blocked", "Too many refused attempts")

    def check_origin(self, origin: str) -> bool:
        return True  # `prepare` has done it, for polls too

    async def get(self, *args: Any, **kwargs: Any) -> None:
        websocket = self.request.headers.get("Upgrade", "").lower() == "websocket"
        if fault := self._fault("websocket" if websocket else "polling"):
            self._refuse(400, "handshake", fault)
        elif self._sid is None and self._door.closed:
            self._refuse(503, "draining", "The server is stopping")
        elif self._sid is None and (seconds := await self._door.limits.attempt(self._address)):
            self.set_header("Retry-After", str(math.ceil(seconds)))
            self._refuse(429, "attempts_per_ip", "Too many connections")
        elif websocket:
            await super().get(*args, **kwargs)
        else:
            await self._poll()

    async def _poll(self) -> None:
        session = self._engine.sockets.get(self._sid)
        self._session = session or await self._engine.admit(self._address, "polling")
        self._answer("\x1e".join(packets_in(await self._session.poll(self))))

    async def post(self) -> None:
        """Two at a time end the session, as they do in Node's: which is to be taken first?"""
        session = self._engine.sockets.get(self._sid)
        if session is None or session.state not in POLLED or session.posting:
            if session is not None and session.posting:
                session.cut("overlapping posts")
            self._refuse(400, "handshake", "Unknown session")
            return
        session.posting = True
        try:
            session.carried_by(self.connection, "POST")
            session.from_browser = self.from_browser
            for message in self.request.body.decode().split("\x1e"):
                await session.feed(message)
        except UnicodeDecodeError:
            session.cut("malformed packet")
        finally:
            session.posting = False
        self._answer("ok")

    def options(self) -> None:
        """CORS preflight (Fetch standard)."""
        self.set_header("Access-Control-Allow-Methods", "GET, POST")
        asked = self.request.headers.get("Access-Control-Request-Headers", "Content-Type")
        self.set_header("Access-Control-Allow-Headers", asked)
        self.set_status(204)

    def _answer(self, body: str) -> None:
        """Engine.IO's answer; none is the end of the session, which no client takes as final."""
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        if not body:
            self.set_status(400)
        self.finish(body)

    def _fault(self, transport: str) -> str | None:
        """What is wrong with a GET (Engine.IO protocol v4)."""
        session = self._engine.sockets.get(self._sid)
        if transport not in self._engine.transports:
            return f"The {transport} transport is switched off"
        if self.get_query_argument("transport", "") != transport:
            return "Invalid transport"
        if self.get_query_argument("EIO", "") != "4":
            return "Unsupported protocol version"
        if self._sid is not None and (session is None or session.state not in POLLED):
            return "Unknown session"
        return None

    def _refuse(self, status: int, reason: str, message: str, detail: str = "") -> None:
        """Answer with the message; the detail is for the log alone."""
        self._engine.metrics.refused.labels(reason).inc()
        if self._door.limits.log_once(self._address, reason):
            log.info("%s refused: %s%s", self._address, message, detail)
        self.set_status(status)
        self.finish({"message": message})

    async def open(self, *args: str, **kwargs: str) -> None:
        self.connection.detached = True
        self.set_nodelay(True)  # Tornado takes it back after each answer, that of the upgrade too
        # Until it is a session's, nothing that Tornado writes by itself may pile up either.
        self._stream.max_write_buffer_size = self._engine.max_queue_bytes
        self._forget_handshake()
        if self._sid is None:
            session = await self._engine.admit(self._address, "websocket")
            if self.ws_connection is None:
                session.cut("gone")  # while the limits were asked
            else:
                self._session = session
                session.attach(self)
        else:
            self._session = self._engine.sockets.get(self._sid)
            if self._session is None or not self._session.begin_upgrade(self):
                self.close()

    def _detach_stream(self) -> IOStream:
        """Tornado's puts a refusal in the place of eleven methods: a kilobyte for each client."""
        return self.detach()

    def _forget_handshake(self) -> None:
        """An idle WebSocket lives for hours; the request, its connection and the answer need not."""
        self.request.headers.clear()  # Tornado's frames still have them
        self.request = UPGRADED
        self._headers = UPGRADED.headers
        self.ui = None  # type: ignore[assignment]  # as Tornado itself has it at the end

    async def on_message(self, message: str | bytes) -> None:
        session = self._session
        if session is None:
            return
        self._engine.limits.strangers.touch(self.connection)
        if session.handler is self:
            await session.feed(message)
        elif message == PROBE and session.probe(self):
            with contextlib.suppress(StreamClosedError):
                self._stream.write(PROBED)
        elif message != UPGRADE or not session.upgrade(self):
            self.close()

    def on_ping(self, data: bytes) -> None:
        if self._session is not None:
            self._session.share_stream()

    def on_close(self) -> None:
        self._door.close(self._stream)
        self._engine.socket_closed(self)
        if self._session is not None:
            self._session.detach(self)
            self._session = None

    def log_exception(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Only what is a fault of ours: not what the client did, nor that the process ends meanwhile."""
        others = HTTPError | StreamClosedError | StreamBufferFullError | asyncio.CancelledError
        if not isinstance(error, others):
            log.error("%s %s failed", self.request.method, self.request.path, exc_info=error)


def unlisted(origin: str | None) -> str:
    """Which origin that is, and what would let it in."""
    shown = clean_text(origin or "")[:ORIGIN_SHOWN]
    return f"; {shown!r} is not in [server] cors_origins"


def parse_sid(request: HTTPServerRequest) -> str | None:
    """The session that a request names."""
    sids = request.query_arguments.get("sid")
    return sids[0].decode("utf-8", "replace") if sids else None


class OperatorHandler(Handler):
    """What is there for operators and their tools: `read` is asked for the status and what to say, by
    whether an operator asks.
    """

    SUPPORTED_METHODS = ("GET", "HEAD")

    def initialize(self, door: FrontDoor, read: Callable[[bool], tuple[int, Any]]) -> None:
        self._inside = door.operators.include(self.request)
        self._read = read

    def get(self) -> None:
        status, said = self._read(self._inside)
        self.set_status(status)
        if isinstance(said, bytes):
            self.set_header("Content-Type", CONTENT_TYPE_LATEST)
        self.finish(said)

    def head(self) -> None:
        """As GET without a body (RFC 9110 §9.3.2); Tornado leaves that out."""
        self.get()


def readiness(parts: Mapping[str, dict[str, Any]], inside: bool) -> tuple[int, dict[str, Any]]:
    """200, or 503 and which part does not do its work; only operators read why."""
    oks = {name: not part["problem"] for name, part in parts.items()}
    ready = all(oks.values())
    told = {name: {"ok": ok, **(parts[name] if inside else {})} for name, ok in oks.items()}
    return 200 if ready else 503, {"status": "ready" if ready else "not ready", "parts": told}


def figures(metrics: Metrics, inside: bool) -> tuple[int, bytes | dict[str, str]]:
    """All of them, for Prometheus; for operators only."""
    if inside:
        return 200, metrics.text()
    return 403, {"message": "Only for this host and for [server] metrics_from"}


class NotFoundHandler(Handler):
    """Everything that is not served."""

    def prepare(self) -> None:
        self.set_status(404)
        self.finish({"message": "Not found"})


class Site(Application):
    """All that is served. Who is served has its time for that, but not by naming a session."""

    door: FrontDoor
    plugins: PluginHost

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        connection = self.door.connection(request)
        if connection is not None and request.path != SOCKET_PATH:
            self.door.limits.strangers.suspend(connection)
        own = super().find_handler(request, **kwargs)
        found = self.plugins.handler_for(request)
        if own.handler_class is not NotFoundHandler or found is None:
            return own
        handler, groups = found
        return self.get_handler_delegate(request, handler, **groups)

    def log_request(self, handler: RequestHandler) -> None:
        """Called when a request is done with; nothing is logged."""
        connection = self.door.connection(handler.request)
        if connection is not None and handler.request.path != SOCKET_PATH:
            connection.wait()


class Acceptor:
    """A socket that Tornado accepts connections on; it pauses while there is no file descriptor left.

    Tornado would ask again at once, for ever, and log each time.
    """

    #: What accept(2) fails with when the process or the host has no room for one more.
    FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
    #: Seconds of a pause after room was made, and where there were no strangers to make it.
    PAUSE: Final = (0.05, 1.0)
    #: Strangers that go then: enough for who waits, and fewer than usually are there.
    STRANGERS: Final = 100

    def __init__(self, listening: socket.socket, limits: Limits) -> None:
        self._socket = listening
        self._limits = limits
        self._full_until = 0.0
        self.fileno = listening.fileno
        self.close = listening.close

    @property
    def problem(self) -> str | None:
        """A sentence while it pauses, and for a little longer."""
        full = time.monotonic() < self._full_until
        return "no file descriptor is left for one more connection" if full else None

    def accept(self) -> tuple[socket.socket, Any]:
        """socket.accept; raises BlockingIOError where that would not help."""
        try:
            return self._socket.accept()
        except OSError as error:
            if error.errno not in self.FULL:
                raise
            self._pause(error)
            raise BlockingIOError(error.errno, error.strerror) from error

    def _pause(self, error: OSError) -> None:
        made_room = self._limits.strangers.make_room(self.STRANGERS)
        seconds = self.PAUSE[0 if made_room else 1]
        self._full_until = time.monotonic() + self.PAUSE[1] + seconds
        if self._limits.log_once("", "full"):
            log.error("no connection can be accepted: %s; raise LimitNOFILE", error.strerror)
        IOLoop.current().update_handler(self, 0)
        call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        if self.fileno() >= 0:  # else it is listened on no more
            IOLoop.current().update_handler(self, IOLoop.READ)


class WebServer(HTTPServer):
    """Tornado's, with TCP_NODELAY (without it two small writes in a row stall for 40 ms), an end
    for clients that take nothing, and an entry at the door for each connection.
    """

    #: Set by whoever makes the server: Tornado's has no constructor of its own to extend.
    door: FrontDoor
    #: Seconds that a client may leave what it is sent unread or unacknowledged.
    patience: float
    acceptors: Sequence[Acceptor] = ()

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        self.acceptors = [Acceptor(listening, self.door.limits) for listening in sockets]
        super().add_sockets(self.acceptors)  # type: ignore[arg-type]  # all that it asks of a socket

    @property
    def problem(self) -> str | None:
        """A sentence while connections cannot be accepted."""
        return next((one.problem for one in self.acceptors if one.problem), None)

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        with contextlib.suppress(OSError, StreamClosedError):  # it may have gone already
            stream.set_nodelay(True)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: tcp(7)
                milliseconds = math.ceil(self.patience * 1000)
                stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self.door.open(stream, address[0] if address else "")
        super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        self.door.close(server_conn.stream)
        super().on_close(server_conn)


# ------------------------------------------------------------------------------- server
# Puts the parts together. This section and the command line are the only ones that know
# them all: the dashboards' requests, the way of an event to its room, start and stop.

EVENT_SHOWN: Final = 40
#: How `Tokens` refuses who is banned.
BANNED: Final = "Access denied"
#: Seconds before a token ends that its dashboard is warned (design: identity and access).
EXPIRY_WARNING: Final = 60.0
#: Seconds after which a subscription is answered, though other nodes' events are not heard yet.
SUBSCRIBE_PATIENCE: Final = 0.8
#: Seconds between two rounds of `guilds:update` (design: rooms).
LIST_INTERVAL: Final = 1.0
#: Seconds that changes of rights are collected before rooms are looked through; what is sent to a
#: guild's rooms meanwhile has those looked through first.
CHECK_DELAY: Final = 0.05
#: Seconds that the loop is held at a time by judging rooms and lists.
SLICE: Final = 0.01


class Comeback(NamedTuple):
    """What a client says in `auth` of its CONNECT (Socket.IO protocol v5)."""

    token: object
    recover: object
    pid: object
    offset: object

    @classmethod
    def of(cls, auth: object) -> Comeback:
        said = auth if isinstance(auth, dict) else {}
        return cls(*map(said.get, cls._fields))


@dataclasses.dataclass(eq=False)
class Dashboard:
    """One connected dashboard: whose it is, its transport and, if it can recover, its ticket."""

    sid: Sid
    session: Session
    viewer: Viewer
    ticket: Ticket | None
    _expiry: Timer | None = None

    def __post_init__(self) -> None:
        #: Rooms that it is to be in once it is known that it may; those of its ticket, if it has one.
        self.pending: set[str] = set() if self.ticket is None else self.ticket.pending
        self.take_token(self.viewer)

    def tell(self, event: str, *arguments: object) -> None:
        self.session.write(event_frame(event, *arguments))

    # -- the life of its token

    def take_token(self, viewer: Viewer) -> None:
        """By this token it is here from now on, and until that expires."""
        self.viewer = viewer
        if self.ticket is not None:
            self.ticket.viewer = viewer
        self.forget_token()
        if viewer.expires is not None:
            warning = viewer.expires - time.time() - EXPIRY_WARNING
            self._expiry = call_later(warning, self._warn, viewer.expires)

    def forget_token(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _warn(self, expires: float) -> None:
        moment = datetime.fromtimestamp(expires, UTC)
        self.tell("auth:expiring", {"expiresAt": timestamp(moment)})
        self._expiry = call_later(expires - time.time(), self._expire)

    def _expire(self) -> None:
        """Only the transport ends: a stock client comes back with what its `auth` gives then."""
        self.tell("error", {"message": "Token expired", "code": "expired"})
        self.session.end()


@dataclasses.dataclass(eq=False)
class Subscriptions:
    """The dashboards that are connected, and who of them is in which guild's rooms (design: rooms).

    a room is   from                                      until
    pending     it was asked for and may_view was None,   may_view is not None,
                or other nodes are not heard yet          or they are heard
    entered     may_view was True                         may_view is False
    left        may_view is False: with an `error`        it is asked for again
    """

    _rooms: Rooms
    _access: Access
    _limits: Limits
    _plugins: PluginLoader
    _node: Node
    _recovery: Recovery

    def __post_init__(self) -> None:
        self.connected: dict[Sid, Dashboard] = {}
        self.by_pid: dict[str, Dashboard] = {}  # those that can recover
        #: Those who are in a room of a guild or wait to be: nobody else is judged.
        self._by_guild: dict[str, dict[Dashboard, None]] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def kinds(self) -> Collection[str]:
        return self._plugins.kinds

    def is_connected(self, discord_id: str) -> bool:
        """Whether this Discord user has a dashboard open, or one that may come back."""
        by_ticket = self._recovery.has_ticket(discord_id)
        return by_ticket or VIEWER + discord_id in self._limits.open

    def guilds(self) -> Iterable[str]:
        """Those that anybody is in a room of, waits to be, or may come back to."""
        return {*self._by_guild, *map(room_guild, self._recovery.rooms())}

    def guilds_of(self, dashboard: Dashboard) -> set[str]:
        return set(map(room_guild, self._rooms.rooms_of(dashboard.sid) | dashboard.pending))

    # -- coming and going

    def add(self, dashboard: Dashboard) -> None:
        """A dashboard is connected, and in no room yet."""
        self._rooms.add(dashboard.sid, dashboard.session)
        self.connected[dashboard.sid] = dashboard
        if dashboard.ticket is not None:
            self.by_pid[dashboard.ticket.pid] = dashboard

    def remove(self, sid: Sid) -> Dashboard:
        """Its client is gone; its ticket stays in its rooms."""
        dashboard = self.connected.pop(sid)
        if dashboard.ticket is not None:
            del self.by_pid[dashboard.ticket.pid]
        for guild_id in self.guilds_of(dashboard):
            self._forget(dashboard, guild_id)
        return dashboard

    def resume(self, dashboard: Dashboard, ticket: Ticket) -> None:
        """It has come back to the rooms that it was in, or waited for."""
        for room in tuple(ticket.rooms):
            self._enter(dashboard, room)
        for guild_id in set(map(room_guild, dashboard.pending)):
            self._by_guild.setdefault(guild_id, {})[dashboard] = None
            self.judge_one(dashboard, guild_id)

    # -- as clients ask

    async def subscribe(self, dashboard: Dashboard, kind: str, guild_id: str) -> dict[str, Any]:
        """The answer, within a second; what is still to be decided is `pending`."""
        room, entered = f"{kind}:{guild_id}", self._rooms.rooms_of(dashboard.sid)
        rooms = entered | dashboard.pending
        if room not in rooms and len(rooms) >= self._limits.settings.rooms_per_connection:
            raise ClientError("too_many_rooms", f"Already in {len(rooms)} rooms")
        if self._access.may_view(dashboard.viewer, guild_id) is False:
            self._expel(dashboard, guild_id)
            raise ClientError("forbidden", f"No access to guild {guild_id}")
        if room not in entered:
            dashboard.pending.add(room)
            if dashboard.ticket is not None:
                self._recovery.wait_for(dashboard.ticket, room)
            self._by_guild.setdefault(guild_id, {})[dashboard] = None
            if (following := self.judge_one(dashboard, guild_id)) is not None:
                await asyncio.wait({following}, timeout=SUBSCRIBE_PATIENCE)
        return {"room": room, "pending": True} if room in dashboard.pending else {"room": room}

    def unsubscribe(self, dashboard: Dashboard, room: str) -> dict[str, Any]:
        self._leave(dashboard, room)
        return {"room": room}

    # -- as rights are

    def judge(self, guild_id: str, discord_ids: Collection[str] | None) -> None:
        """Whether these viewers, or (None) all, may be in the guild's rooms; who comes back too."""
        for dashboard in tuple(self._by_guild.get(guild_id, ())):
            if discord_ids is None or dashboard.viewer.discord_id in discord_ids:
                self.judge_one(dashboard, guild_id)
        for ticket in self._recovery.awaited(guild_id):
            wanted = discord_ids is None or ticket.viewer.discord_id in discord_ids
            if wanted and self._access.may_view(ticket.viewer, guild_id) is False:
                for room in [room for room in ticket.rooms if room_guild(room) == guild_id]:
                    self._recovery.leave(ticket, room)

    def judge_one(self, dashboard: Dashboard, guild_id: str) -> asyncio.Task[None] | None:
        """Put a dashboard into the guild's rooms that it waits for, or out of all of them.

        Returns what it waits for, besides Discord: other nodes' events of the guild.
        """
        if dashboard.sid not in self.connected:
            return None
        may_view = self._access.may_view(dashboard.viewer, guild_id)
        if may_view is False:
            self._expel(dashboard, guild_id)
        pending = [room for room in dashboard.pending if room_guild(room) == guild_id]
        if not may_view or not pending:
            return None
        following = self._node.follow(guild_id)
        if following is not None:
            following.add_done_callback(lambda _: self.judge_one(dashboard, guild_id))
            return following
        for room in pending:
            self._enter(dashboard, room)
            self.send_snapshots_soon(dashboard, room)
        return None

    def _enter(self, dashboard: Dashboard, room: str) -> None:
        dashboard.pending.discard(room)
        self._by_guild.setdefault(room_guild(room), {})[dashboard] = None
        self._rooms.enter(dashboard.sid, room)
        if dashboard.ticket is not None:
            self._recovery.enter(dashboard.ticket, room)

    def _expel(self, dashboard: Dashboard, guild_id: str) -> None:
        """Once it is sure that a viewer may not, it is not even given what waits for it."""
        entered = self._rooms.rooms_of(dashboard.sid)
        rooms = [one for one in entered | dashboard.pending if room_guild(one) == guild_id]
        if not rooms:
            return
        lost = not entered.isdisjoint(rooms)
        for room in rooms:
            self._rooms.expel(dashboard.sid, room)
            self._leave(dashboard, room)
        self._limits.metrics.refused_requests.labels("right_lost" if lost else "forbidden").inc()
        text = f"Access to guild {guild_id} was lost" if lost else f"No access to guild {guild_id}"
        dashboard.tell("error", ClientError("forbidden", text).to_wire())

    def _leave(self, dashboard: Dashboard, room: str) -> None:
        self._rooms.leave(dashboard.sid, room)
        dashboard.pending.discard(room)
        if dashboard.ticket is not None:
            self._recovery.leave(dashboard.ticket, room)
        if room_guild(room) not in self.guilds_of(dashboard):
            self._forget(dashboard, room_guild(room))

    def _forget(self, dashboard: Dashboard, guild_id: str) -> None:
        dashboards = self._by_guild.get(guild_id, {})
        dashboards.pop(dashboard, None)
        if not dashboards:
            self._by_guild.pop(guild_id, None)

    # -- snapshots

    def send_snapshots_soon(self, dashboard: Dashboard, room: str) -> None:
        """What plugins have for a new subscriber; in a task, so that the answer comes first.

        To who can recover it goes with an offset, and again where it did not arrive.
        """
        if dashboard.ticket is not None:
            dashboard.ticket.unseen[room] = None
        task = asyncio.create_task(self._send_snapshots(dashboard, room, dashboard.ticket))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _send_snapshots(self, dashboard: Dashboard, room: str, ticket: Ticket | None) -> None:
        kind, _, guild_id = room.partition(":")
        tell = functools.partial(self._tell_snapshot, dashboard, Destination(guild_id, kind))
        try:
            await self._node.send_snapshots(kind, guild_id, tell, dashboard.viewer)
        finally:
            here = dashboard.sid in self.connected  # else it was not sent, and is after the return
            if here and ticket is not None and ticket.unseen.get(room, ticket) is None:
                del ticket.unseen[room]  # nobody had anything

    def _tell_snapshot(
        self, dashboard: Dashboard, room: Destination, event: str, payload: EventData
    ) -> None:
        to = destination_of(room.guild_id, room.kind, payload)
        if to.room not in self._rooms.rooms_of(dashboard.sid) or not self._access.may_have(
            dashboard.viewer, to.guild_id, to.channel_id
        ):
            return
        offset: tuple[str, ...] = ()
        if dashboard.ticket is not None:
            self._rooms.catch_up(dashboard.sid)  # its offset says that all before it has come
            offset = (self._recovery.number_snapshot(dashboard.ticket, to.room),)
        dashboard.tell(event, payload, *offset)


ThingT = TypeVar("ThingT", bound=Hashable)


class InSlices(Generic[ThingT]):
    """Something to be done with each of many things, a little later and never for long at a time."""

    def __init__(self, work: Callable[[ThingT], None]) -> None:
        self._work = work
        self._waiting: OrderedDict[ThingT, None] = OrderedDict()
        self._timer: Timer | None = None

    def add(self, things: Iterable[ThingT], delay: float = 0.0) -> None:
        """What waits already keeps its place."""
        self._waiting.update(dict.fromkeys(things))
        if self._waiting and self._timer is None:
            self._timer = call_later(delay, self.run)

    def run(self, seconds: float = SLICE) -> None:
        """Go on for so long; the rest has its turn after whatever else waits."""
        self._timer, until = None, time.monotonic() + seconds
        while self._waiting and time.monotonic() < until:
            self._work(self._waiting.popitem(last=False)[0])
        self.add(())


class GuildList:
    """The guilds that all viewers with one `Access.list_key` may see, as things stand."""

    def __init__(self, access: Access, viewer: Viewer) -> None:
        guild_ids = access.guilds_to_judge(viewer)
        seen = filter(None, [access.summary(viewer, one) for one in guild_ids])
        self.encoded = msgspec.json.encode(sorted(seen, key=itemgetter("name", "id")))
        self.complete = access.complete
        #: When it is outdated, though Discord says nothing.
        self.until = access.timed_out_until(viewer, guild_ids)

    @functools.cached_property
    def update(self) -> bytes:
        """Encoded once for all who are told."""
        return event_frame("guilds:update", {"guilds": msgspec.Raw(self.encoded)})


class GuildLists:
    """Answers `guilds:list`, and tells of each change whoever has asked (design: rooms).

    A list is made once for all who may see the same. It lasts until something changes, or until
    nobody who was told of it is there.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lists: WeakValueDictionary[object, GuildList] = WeakValueDictionary()
        self._told: dict[Dashboard, GuildList] = {}  # who has asked, and what it heard last
        self._telling = InSlices(self._tell)
        self._round: asyncio.TimerHandle | None = None
        self._last_round = 0.0

    def ask(self, dashboard: Dashboard) -> dict[str, Any]:
        now = self._news_for(dashboard)
        return {"guilds": msgspec.Raw(now.encoded), "complete": now.complete}

    def resume(self, dashboard: Dashboard) -> None:
        """It is back, and may have missed a change: it is told how things stand."""
        now = self._news_for(dashboard)
        if now.complete:
            dashboard.session.write(now.update)

    def remove(self, dashboard: Dashboard) -> None:
        """It is told no more."""
        self._told.pop(dashboard, None)

    def change(self, discord_ids: Collection[str] | None = None) -> None:
        """Something has changed for these viewers, whose lists are their own, or (None) for all."""
        if discord_ids is None:
            self._lists.clear()
        for discord_id in discord_ids or ():
            self._lists.pop(discord_id, None)
        self.tell_within(0.0)

    def tell_within(self, seconds: float) -> None:
        """Tell of what has changed by then; no dashboard twice in a second."""
        loop = asyncio.get_running_loop()
        due = max(loop.time() + seconds, self._last_round + LIST_INTERVAL)
        if self._told and (self._round is None or due < self._round.when()):
            if self._round is not None:
                self._round.cancel()
            self._round = loop.call_at(due, self._begin_round)

    def _begin_round(self) -> None:
        self._round, self._last_round = None, asyncio.get_running_loop().time()
        self._telling.add(self._told)

    def _tell(self, dashboard: Dashboard) -> None:
        told = self._told.get(dashboard)
        if told is not None:
            now = self._news_for(dashboard)
            if told.encoded != now.encoded or told.complete < now.complete:
                dashboard.session.write(now.update)

    def _news_for(self, dashboard: Dashboard) -> GuildList:
        """The list as things stand, which it is about to be told."""
        key, now = self._access.list_key(dashboard.viewer), time.time()
        made = self._lists.get(key)
        if made is None or made.until <= now or made.complete != self._access.complete:
            made = self._lists[key] = GuildList(self._access, dashboard.viewer)
        self._told[dashboard] = made
        if made.until < math.inf:
            self.tell_within(made.until - now)
        return made


#: Who was in the room, who of them may not see the channel, and how long that holds at most.
Judged = tuple[tuple[Sid, ...], Hidden, float]


@dataclasses.dataclass(eq=False)
class RightsWatcher:
    """Hears what changes rights (the table is in `Access.may_have`), and keeps rooms and lists in line.

    hikari runs listeners in the order of the gateway's packets, and these are subscribed before
    any plugin's: whatever comes after a change is judged by it. Rooms are looked through a little
    later, in slices, or when something is about to be sent to them.
    """

    _access: Access
    _rooms: Rooms
    subscriptions: Subscriptions

    def __post_init__(self) -> None:
        self.lists = GuildLists(self._access)
        #: Guilds whose rooms are to be looked through: for these viewers, or (None) for all.
        self._stale: dict[str, set[str] | None] = {}
        self.checking = InSlices(self._look_through)
        #: Who may not see a channel, until something changes in its guild.
        self._judged: dict[str, dict[Destination, Judged]] = {}

    # Each by its own class: hikari calls who hears a base class after all others, plugins too.
    #: What of a guild can change which channels its viewers may see,
    CHANNEL_CHANGES: ClassVar[tuple[type[hikari.Event], ...]] = (
        hikari.GuildChannelCreateEvent,
        hikari.GuildChannelUpdateEvent,
        hikari.GuildChannelDeleteEvent,
        hikari.GuildThreadCreateEvent,
        hikari.GuildThreadUpdateEvent,
        hikari.GuildThreadDeleteEvent,
        hikari.ThreadListSyncEvent,
    )
    #: and what can change besides whether they may see anything of it.
    GUILD_CHANGES: ClassVar[tuple[type[hikari.Event], ...]] = (
        hikari.RoleCreateEvent,
        hikari.RoleUpdateEvent,
        hikari.RoleDeleteEvent,
        hikari.GuildUpdateEvent,
    )
    MEMBER_CHANGES: ClassVar[tuple[type[hikari.Event], ...]] = (
        hikari.MemberCreateEvent,
        hikari.MemberUpdateEvent,
        hikari.MemberDeleteEvent,
    )

    @classmethod
    def event_types(cls) -> tuple[type[hikari.Event], ...]:
        """What it has to hear: intents follow from it."""
        return cls.CHANNEL_CHANGES + cls.GUILD_CHANGES + cls.MEMBER_CHANGES

    def subscribe(self, events: GatewayEvents) -> None:
        for change in self.CHANNEL_CHANGES:
            events.subscribe(change, self._on_channel_change)
        for change in self.GUILD_CHANGES:
            events.subscribe(change, self._on_guild_change)
        for change in self.MEMBER_CHANGES:
            events.subscribe(change, self._on_member_change)
        events.subscribe(hikari.ShardReadyEvent, self._on_new_session)
        events.subscribe(hikari.StoppingEvent, self._on_stopping)
        events.subscribe(hikari.ShardResumedEvent, self._on_resumed)
        events.subscribe(hikari.GuildAvailableEvent, self._on_guild)
        events.subscribe(hikari.GuildJoinEvent, self._on_guild)
        events.subscribe(hikari.GuildLeaveEvent, self._on_guild)
        events.subscribe(hikari.MemberChunkEvent, self._on_members)

    # -- to dashboards

    def send(self, to: Destination, frame: RoomFrame) -> None:
        """An event to those in a room who may see it."""
        if to.guild_id in self._stale:
            self._look_through(to.guild_id)
        hidden = functools.partial(self._hidden, to) if to.channel_id else None
        self._rooms.send(to.room, frame, hidden)

    def _hidden(self, to: Destination) -> Hidden:
        """Who in the room may not see the channel; each is judged once until something changes."""
        judged, members = self._judged.setdefault(to.guild_id, {}), self._rooms.members(to.room)
        of_members, hidden, until = judged.get(to, ((), NOBODY, 0.0))
        if of_members is not members or until <= time.time():
            viewers = {sid: self.subscriptions.connected[sid].viewer for sid in members}
            hidden = frozenset(
                sid
                for sid, viewer in viewers.items()
                if not self._access.may_have(viewer, to.guild_id, to.channel_id)
            )
            guild_ids = (int(to.guild_id),)
            ends = [self._access.timed_out_until(viewers[sid], guild_ids) for sid in hidden]
            judged[to] = members, hidden, min(ends, default=math.inf)
        return hidden

    def end(self, pid: str) -> None:
        if (dashboard := self.subscriptions.by_pid.get(pid)) is not None:
            dashboard.session.lose()

    # -- what is judged anew

    def check(self, guild_id: str, discord_id: str | None = None) -> None:
        """Something has changed in a guild: for all of its viewers, or for one."""
        self._judged.pop(guild_id, None)
        viewers = self._stale.setdefault(guild_id, set())
        if discord_id is None:
            self._stale[guild_id] = None
        elif viewers is not None:
            viewers.add(discord_id)
        self.checking.add([guild_id], CHECK_DELAY)

    def check_all(self) -> None:
        """Something has changed that decides everywhere."""
        self._judged.clear()
        self._stale.update(dict.fromkeys(self.subscriptions.guilds()))
        self.lists.change()
        self.checking.add(self._stale)

    def check_dashboard(self, dashboard: Dashboard) -> None:
        """It has another token: what that one does not allow is left at once."""
        for guild_id in self.subscriptions.guilds_of(dashboard):
            self._judged.pop(guild_id, None)
            self.subscriptions.judge_one(dashboard, guild_id)
        self.lists.tell_within(0.0)

    def _look_through(self, guild_id: str) -> None:
        """Who is in its rooms may go, if something has changed."""
        if guild_id in self._stale:
            viewers = self._stale.pop(guild_id)
            self.subscriptions.judge(guild_id, viewers)
            self.lists.change(viewers)

    def _on_channel_change(self, event: Any) -> None:
        self._judged.pop(str(event.guild_id), None)

    def _on_guild_change(self, event: Any) -> None:
        self.check(str(event.guild_id))

    def _on_member_change(self, event: Any) -> None:
        if isinstance(event, hikari.MemberDeleteEvent):
            self._access.leave(event.guild_id, event.user_id)
        discord_id = str(event.user_id)
        if self.subscriptions.is_connected(discord_id):
            self.check(str(event.guild_id), discord_id)

    # -- while the cache is refilled

    def _on_new_session(self, event: hikari.ShardReadyEvent) -> None:
        shard_range = shard_range_of(event.shard)
        lost = self._access.begin(event.unavailable_guilds, shard_range)
        asked_for = filter(shard_range.has, map(int, self.subscriptions.guilds()))
        for guild_id in {*lost, *asked_for}:
            self.check(str(guild_id))

    def _on_stopping(self, event: hikari.StoppingEvent) -> None:
        self._access.end()
        self._judged.clear()

    async def _on_resumed(self, event: hikari.ShardResumedEvent) -> None:
        """What was asked for on the connection that broke may never have been heard."""
        for guild_id, (nonce, _) in tuple(self._access.members_coming.items()):
            if shard_range_of(event.shard).has(guild_id):
                await event.shard.request_guild_members(guild_id, nonce=nonce)

    def _on_guild(self, event: hikari.GuildEvent) -> None:
        """It came, or it is gone."""
        nonce = getattr(event, "chunk_nonce", None)
        if nonce is None:
            self._fill(event.guild_id)
        else:  # hikari has asked for the rest of the members
            self._access.expect_members(event.guild_id, nonce)
            self.check(str(event.guild_id))

    def _on_members(self, event: hikari.MemberChunkEvent) -> None:
        nonce, _ = self._access.members_coming.get(event.guild_id, (None, None))
        if nonce and event.nonce == nonce and event.chunk_index == event.chunk_count - 1:
            self._fill(event.guild_id)
        else:
            self.check(str(event.guild_id))

    def _fill(self, guild_id: int) -> None:
        self._access.fill(guild_id)
        self.check(str(guild_id))


#: What follows the reply to CONNECT for who cannot recover.
NEW_SESSION: Final = event_frame("session", {"recovered": False, "rooms": []})


class Comebacks:
    """Gives a client that comes back all that it missed, or a new session (design: recovery)."""

    def __init__(
        self,
        recovery: Recovery,
        access: Access,
        subscriptions: Subscriptions,
        most_bytes: int,
        metrics: Metrics,
    ) -> None:
        self._recovery = recovery
        self._access = access
        self._subscriptions = subscriptions
        self._most_bytes = min(MAX_LOG_BYTES, most_bytes)
        self._metrics = metrics

    async def end_half_open(self, viewer: Viewer, comeback: Comeback) -> bool:
        """Whether the connection that this client had was still taken for open: it counts no more."""
        ticket = self._recovery.find(comeback.pid, viewer.discord_id)
        half_open = self._subscriptions.by_pid.get(ticket.pid) if ticket else None
        if half_open is None:
            return False
        await half_open.session.close()
        return True

    def let_in(self, sid: Sid, session: Session, viewer: Viewer, comeback: Comeback) -> Dashboard:
        """The reply to CONNECT, in the same write what was missed, then `session`.

        All in one turn of the loop: nothing that comes meanwhile is lost, or comes before.
        """
        ticket, missed = self._ticket_for(session, viewer, comeback)
        session.tracks = ticket is not None
        dashboard = Dashboard(sid, session, viewer, ticket)
        self._subscriptions.add(dashboard)
        if ticket is None:
            session.write(connect_frame(sid) + NEW_SESSION)
            return dashboard
        unseen = self._recovery.rooms_without_snapshot(ticket, comeback.offset)
        start = connect_frame(sid, pid=ticket.pid)
        if missed is not None:
            session.write(start + missed)
            start = b""
            self._metrics.recovered.inc()
            self._subscriptions.resume(dashboard, ticket)
        rooms = sorted(ticket.rooms.keys() | ticket.pending)
        state = {"recovered": missed is not None, "rooms": rooms}
        session.write(start + event_frame("session", state, self._recovery.logs.offset))
        for room in unseen:
            self._subscriptions.send_snapshots_soon(dashboard, room)
        return dashboard

    def _ticket_for(
        self, session: Session, viewer: Viewer, comeback: Comeback
    ) -> tuple[Ticket | None, bytes | None]:
        """That which the client had, with what it has missed; else a new one, if it can recover."""
        recover = comeback.recover
        wanted = recover if isinstance(recover, bool) else session.from_browser
        if not wanted or not self._recovery.enabled:
            return None, None
        ticket, missed = self._take_back(viewer, comeback)
        return ticket or self._recovery.issue(viewer), missed

    def _take_back(
        self, viewer: Viewer, comeback: Comeback
    ) -> tuple[Ticket, bytes] | tuple[None, None]:
        """The ticket that the client had with the frames that it has missed, if all are here."""
        ticket = self._recovery.find(comeback.pid, viewer.discord_id)
        if comeback.pid is None or (ticket and ticket.pid in self._subscriptions.by_pid):
            return None, None
        if ticket is None:
            obstacle = "unknown or too late"
        elif not self._leave_forbidden(ticket, viewer):
            obstacle = "rights not known"
        elif (missed := self._missed(ticket, viewer, comeback.offset)) is None:
            obstacle = "too much missed"
        else:
            ticket.viewer = viewer
            self._recovery.hold(ticket)
            return ticket, missed
        self._metrics.not_recovered.labels(obstacle).inc()
        if ticket is not None:
            self._recovery.forget(ticket)
        return None, None

    def _leave_forbidden(self, ticket: Ticket, viewer: Viewer) -> bool:
        """Leave the rooms that it may not view any more; returns whether all is known of that."""
        for room in tuple(ticket.rooms):
            may_view = self._access.may_view(viewer, room_guild(room))
            if may_view is None:
                return False
            if not may_view:
                self._recovery.leave(ticket, room)
        return True

    def _missed(self, ticket: Ticket, viewer: Viewer, offset: object) -> bytes | None:
        """The frames that the client has missed and may have; None where they are not here whole,
        or too much.
        """
        missed = self._recovery.missed(ticket, offset)
        if missed is None:
            return None
        frames = b"".join(
            event.frame
            for event in missed
            if self._access.may_have(viewer, event.to.guild_id, event.to.channel_id)
        )
        return frames if len(frames) <= self._most_bytes else None

    def remember_list(self, dashboard: Dashboard) -> None:
        """It has asked which guilds there are, and is told of changes after a return too."""
        if dashboard.ticket is not None:
            self._recovery.list_for(dashboard.ticket)

    def expect(self, ticket: Ticket, session: Session) -> None:
        """Keep for its client what comes from now on, unless it has said DISCONNECT."""
        if session.closed:
            self._recovery.await_return(ticket)
        else:
            self._recovery.forget(ticket)


@dataclasses.dataclass(eq=False)
class Dashboards:
    """Lets dashboards in and sees them go, and hears what they ask (design: identity)."""

    _sio: SocketIO
    _tokens: Tokens
    _limits: Limits
    _node: Node
    _rights: RightsWatcher
    _comebacks: Comebacks

    def __post_init__(self) -> None:
        self._subscriptions = self._rights.subscriptions
        self._sio.on("connect", self._connect)
        self._sio.on("disconnect", self._disconnect)
        self._sio.on(REQUEST, self._request)

    def __len__(self) -> int:
        return len(self._subscriptions.connected)

    # -- coming and going

    async def _connect(self, sid: Sid, environ: dict[str, Any], auth: object) -> None:
        """Let a client in, and tell it so."""
        session = self._sio.session_of(sid)
        if session is None:  # to nobody: it has left right after it sent CONNECT
            raise RefusedConnectionError("Gone")
        comeback = Comeback.of(auth)
        try:
            viewer = await self._identify(session, comeback)
        except RefusedConnectionError as refusal:
            if self._limits.log_once(session.address, refusal.message):
                address = session.address
                session.log.info("%s refused: %s %s", address, refusal.message, refusal.data or "")
            raise
        dashboard = self._comebacks.let_in(sid, session, viewer, comeback)
        if dashboard.ticket is not None and dashboard.ticket.lists:
            self._rights.lists.resume(dashboard)
        session.log.info("viewer %s is in", clean_text(viewer.discord_id)[:EVENT_SHOWN])
        self._node.viewer_entered(viewer.discord_id)

    async def _identify(self, session: Session, comeback: Comeback) -> Viewer:
        if session.refusal is not None and comeback.pid is None:
            raise session.refusal
        if seconds := await self._limits.blocked_for(session.address):
            raise self._limits.over("blocked", seconds)
        try:
            viewer = self._tokens.verify(comeback.token)
        except RefusedConnectionError as refusal:
            await self._limits.refused(session.address, refusal)
            raise
        self._limits.strangers.leave(session)
        moved = await self._node.recall(comeback.pid, viewer, comeback.offset)
        replaced = await self._comebacks.end_half_open(viewer, comeback) or moved
        if session.refusal is not None and not replaced:
            raise session.refusal
        await self._limits.accepted(session.address)
        await self._limits.enter(viewer.discord_id, replaces=replaced)
        return viewer

    async def _disconnect(self, sid: Sid, reason: str) -> None:
        dashboard = self._subscriptions.remove(sid)
        self._rights.lists.remove(dashboard)
        dashboard.forget_token()
        session = dashboard.session
        if dashboard.ticket is not None:
            self._comebacks.expect(dashboard.ticket, session)
        self._limits.open.leave(VIEWER + dashboard.viewer.discord_id)
        if not session.closed:  # it left Socket.IO, and its transport is a stranger's again
            self._limits.strangers.enter(session)
        session.log.info("viewer is gone: %s", reason)

    # -- requests

    async def _request(self, sid: Sid, event: object, *args: object) -> dict[str, Any]:
        dashboard = self._subscriptions.connected[sid]
        try:
            if not self._limits.may_send(dashboard.session.allowance):
                raise ClientError("rate_limited", "Too many events; slow down")
            return {"ok": True, **await self._answer(event, dashboard, args)}
        except ClientError as error:
            self._limits.metrics.refused_requests.labels(error.code).inc()
            dashboard.tell("error", error.to_wire())
            return {"ok": False, "error": error.to_wire()}

    async def _answer(
        self, event: object, dashboard: Dashboard, args: tuple[object, ...]
    ) -> dict[str, Any]:
        if event == "guilds:list":
            self._comebacks.remember_list(dashboard)
            return self._rights.lists.ask(dashboard)
        if event == "auth:refresh":
            return self._refresh(dashboard, args)
        verb, _, kind = event.partition(":") if isinstance(event, str) else ("", "", "")
        if kind in self._subscriptions.kinds and verb == "subscribe":
            return await self._subscriptions.subscribe(dashboard, kind, guild_argument(args))
        if kind in self._subscriptions.kinds and verb == "unsubscribe":
            return self._subscriptions.unsubscribe(dashboard, f"{kind}:{guild_argument(args)}")
        raise ClientError("unknown_event", f"Unknown event: {quoted(event)}")

    def _refresh(self, dashboard: Dashboard, args: tuple[object, ...]) -> dict[str, Any]:
        """A new token for the same viewer; what it no longer allows is left."""
        token = only_argument(args, "the token")
        try:
            viewer = self._tokens.verify(token)
        except RefusedConnectionError as refusal:
            if refusal.message == BANNED:  # out, once it has been told
                dashboard.session.end_soon()
            raise ClientError("forbidden", refusal.message) from refusal
        if viewer.discord_id != dashboard.viewer.discord_id:
            raise ClientError("forbidden", "The token is another viewer's")
        dashboard.take_token(viewer)
        self._rights.check_dashboard(dashboard)
        return {}


def shard_range_of(shard: hikari.api.GatewayShard) -> ShardRange:
    """The guilds whose events come by this shard."""
    return ShardRange(shard.id, shard.shard_count)


def only_argument(args: tuple[object, ...], name: str) -> object:
    """The argument of a request that takes one; None without any."""
    if len(args) > 1:
        raise ClientError("bad_request", f"Expected one argument, {name}; got {len(args)}")
    return args[0] if args else None


def guild_argument(args: tuple[object, ...]) -> str:
    """The one argument of a subscription: a guild id, a string of 1 to 20 digits."""
    guild_id = only_argument(args, "the guild id")
    if isinstance(guild_id, str) and is_snowflake(guild_id):
        return guild_id
    came = quoted(guild_id)
    raise ClientError("invalid_guild", f"Expected a guild id, a string of 1-20 digits; got {came}")


def quoted(value: object) -> str:
    """The beginning of what a client sent, fit to be sent back."""
    return "a binary value" if isinstance(value, bytes) else clean_text(shown(value))[:EVENT_SHOWN]


class Pulse:
    """Measures how late the loop gets to what is due; the worst of the last ten seconds counts."""

    INTERVAL: Final = 0.25
    #: Seconds late from which dashboards notice and health says so.
    TOO_LATE: Final = 1.0

    def __init__(self) -> None:
        self._due = float("inf")
        self._late: collections.deque[float] = collections.deque(
            [0.0], maxlen=int(10 / self.INTERVAL)
        )

    @property
    def lag(self) -> float:
        """Seconds; counts a delay that is not over yet, too."""
        return max(*self._late, time.monotonic() - self._due, 0.0)

    async def run(self) -> None:
        while True:
            self._due = time.monotonic() + self.INTERVAL
            await asyncio.sleep(self.INTERVAL)
            self._late.append(time.monotonic() - self._due)

    def health(self) -> dict[str, Any]:
        late = f"the event loop is {self.lag:.1f} s late" if self.lag > self.TOO_LATE else None
        return {"problem": late, "lag": round(self.lag, 3)}


#: What `Server.reload` takes over while it runs; everything else needs a restart.
LIVE: Final = (
    "auth.",
    "limits.",
    "log.",
    "plugin.",
    "server.cors_origins",
    "server.metrics_from",
    "server.shutdown_grace",
    "server.trusted_proxies",
)
#: Seconds between two clients that are told of a stop; fewer where that would take too long. They
#: come back soon after they were told: all in one moment would be more than a server takes in.
GOODBYE_PACE: Final = 0.01
GOING_AWAY: Final = 1001  # RFC 6455 §7.4.1


def make_socketio(settings: Settings, rooms: Rooms, limits: Limits) -> SocketIO:
    return SocketIO(
        rooms,
        async_mode="tornado",
        async_handlers=False,  # one request of a client at a time, in their order
        monitor_clients=False,  # each session has its own timer
        cors_allowed_origins=[],  # SocketHandler decides
        http_compression=False,
        transports=list(settings.server.transports),
        ping_interval=settings.heartbeat.interval,
        ping_timeout=settings.heartbeat.timeout,
        max_http_buffer_size=settings.server.max_message_bytes,
        max_queue_bytes=settings.server.max_queue_bytes,
        limits=limits,
        logger=library_log("socketio"),
        engineio_logger=library_log("engineio"),
    )


def measure(server: Server) -> None:
    """Enter what is read when a scrape asks."""
    gauge, gateway, plugins = server.metrics.gauge, server.gateway, server.plugins
    sessions = server.socketio.eio.sockets
    gauge("connections", "Open connections, silent ones too.", lambda: len(sessions))
    gauge("dashboards", "Connected dashboards.", lambda: len(server.dashboards))
    gauge("rooms", "Rooms with listeners.", lambda: len(server.rooms))
    gauge("recovery_bytes", "Events kept for who comes back.", lambda: server.recovery.logs.size)
    gauge("guilds", "Watched guilds.", lambda: gateway.guilds)
    gauge("gateway_connected", "1 while connected to Discord.", lambda: gateway.connected)
    gauge("gateway_latency_seconds", "Of Discord's latest heartbeat.", lambda: gateway.latency)
    gauge("gateway_silence_seconds", "Since that heartbeat.", lambda: gateway.silence)
    gauge("loop_lag_seconds", "Worst delay of the last 10 s.", lambda: server.pulse.lag)
    gauge("plugins_loaded", "Loaded plugins.", lambda: len(plugins.health()["loaded"]))
    gauge("plugins_failed", "Plugins in trouble.", lambda: len(plugins.health()["failed"]))
    gauge("ready", "1 while /health/ready says so.", lambda: server.problem is None)


def make_web(server: Server, settings: Settings) -> WebServer:
    limit = settings.server.max_message_bytes

    def operators(path: str, read: Callable[[bool], tuple[int, Any]]) -> tuple[Any, ...]:
        return path, OperatorHandler, {"door": server.door, "read": read}

    application = Site(
        [
            (SOCKET_PATH, SocketHandler, {"door": server.door, "engine": server.socketio.eio}),
            operators(r"/health/live", lambda inside: (200, {"status": "live"})),
            operators(r"/health/ready", lambda inside: readiness(server.health(), inside)),
            operators(r"/metrics", lambda inside: figures(server.metrics, inside)),
        ],
        default_handler_class=NotFoundHandler,
        websocket_max_message_size=limit,
    )
    application.door = server.door
    application.plugins = server.plugins
    patience = settings.heartbeat.interval + settings.heartbeat.timeout
    web = WebServer(
        application,
        max_body_size=limit,
        max_header_size=MAX_HEADER_BYTES,
        chunk_size=READ_BYTES,
        max_buffer_size=max(limit, MAX_HEADER_BYTES) + 2 * READ_BYTES,
        body_timeout=settings.auth.connect_timeout,
        idle_connection_timeout=patience,
    )
    web.door, web.patience = server.door, patience
    return web


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets; `localhost` is both loopbacks, whatever the host's files say of it."""
    if host != "localhost":
        return bind_sockets(port, host, backlog=1024)
    first = listening(socket.AF_INET, "127.0.0.1", port)
    try:
        return [first, listening(socket.AF_INET6, "::1", first.getsockname()[1])]
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # a host without IPv6
            return [first]
        first.close()
        if port == 0 and error.errno == errno.EADDRINUSE:  # free on one of them only
            return listen(host, port)
        raise


def listening(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    listener = socket.create_server((host, port), family=family, backlog=1024)
    listener.setblocking(False)
    return listener


def wanted_events(plugins: PluginLoader) -> dict[type[hikari.Event], list[str]]:
    """Which events are needed, and by whom."""
    wanted = {event_type: ["access"] for event_type in RightsWatcher.event_types()}
    for plugin in plugins.plugins.values():
        for event_type in plugin.event_types():
            wanted.setdefault(event_type, []).append(plugin.name)
    return wanted


class Server:
    """All the parts of one process, made from settings; `async with` starts and stops them.

    `sockets` that listen already (systemd's) are used instead of `[server] host` and `port`;
    `make_node` says whether this process is alone.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        keys: Keys,
        token: str,
        sockets: Sequence[socket.socket] = (),
        make_node: Callable[[Settings, Bot], Node] = Node,
    ) -> None:
        self._settings = self._started_with = settings
        self._sockets = list(sockets)
        self.metrics = Metrics()
        self.pulse = Pulse()
        loader = PluginLoader(settings.plugins, settings.plugin, settings.folder, self.metrics)
        loader.load_all()
        wanted, cached = wanted_events(loader), loader.cached()
        self.gateway = Gateway(settings.discord, token, wanted, self.metrics, cached)
        self.node = make_node(settings, self.gateway.bot)
        self.access = self.node.access
        self.tokens = Tokens(keys, settings.auth.algorithms)
        self.limits = Limits(
            settings.limits,
            settings.auth.connect_timeout,
            self.node.counters,
            self.node.connections,
            self.metrics,
        )
        fanout = settings.fanout.max_delay, settings.server.max_queue_bytes
        self.rooms = Rooms(*fanout, self.metrics)
        self.socketio = make_socketio(settings, self.rooms, self.limits)
        key = self.tokens.derive_key("recovery") if self.tokens.can_issue else os.urandom(32)
        self.recovery = Recovery(settings.recovery, key, self.node.ticket_changed)
        timeout = settings.plugins.handler_timeout
        self.throttle = Throttle(settings.throttle, self.node, self.metrics, timeout)
        self.door = FrontDoor(settings.server, self.limits)
        self.plugins = PluginHost(loader, self._workplace(), self.metrics, timeout)
        self.rights = self._make_rights()
        self.dashboards = self._make_dashboards()
        self.node.attach(
            Parts(self.rights, self.rooms, self.recovery, self.plugins, self.throttle, self.metrics)
        )
        measure(self)
        self.web = make_web(self, settings)
        self.port = 0
        self._tasks: list[asyncio.Task[None]] = []

    def _make_rights(self) -> RightsWatcher:
        subscriptions = Subscriptions(
            self.rooms, self.access, self.limits, self.plugins.loader, self.node, self.recovery
        )
        return RightsWatcher(self.access, self.rooms, subscriptions)

    def _make_dashboards(self) -> Dashboards:
        most_bytes = self._settings.server.max_queue_bytes // 2
        comebacks = Comebacks(
            self.recovery, self.access, self.rights.subscriptions, most_bytes, self.metrics
        )
        return Dashboards(
            self.socketio, self.tokens, self.limits, self.node, self.rights, comebacks
        )

    # -- how things stand

    def health(self) -> dict[str, dict[str, Any]]:
        """Each part's `problem`, None or a sentence, with its figures."""
        stopping = "draining: the server is stopping" if self.door.closed else None
        return {
            "server": {"problem": stopping or self.web.problem},
            "loop": self.pulse.health(),
            "gateway": self.gateway.health() if self.node.leading else {"problem": None},
            "plugins": self.plugins.health(),
            "redis": self.node.health(),
        }

    @property
    def problem(self) -> str | None:
        """The first part's problem, if any."""
        return next((part["problem"] for part in self.health().values() if part["problem"]), None)

    @property
    def alive(self) -> bool:
        """Whether the parts that must never rest still run; the loop does, if this is asked on it."""
        turning = self.gateway.alive or not self.node.leading
        return turning and not any(task.done() for task in self._tasks)

    # -- start, reload, stop

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, then connect to Discord. Raises OperatorError when the port cannot be had."""
        self.rights.subscribe(self.gateway.bot.events)
        sockets = self._sockets or self._bind()
        self.web.add_sockets(sockets)
        host, self.port = sockets[0].getsockname()[:2]
        self.node.start()
        self._gateway_task = asyncio.create_task(
            self.node.lead(self._work, self._rest), name="gateway"
        )
        pulse = asyncio.create_task(self.pulse.run(), name="pulse")
        files = asyncio.create_task(
            self.plugins.follow(watch=self._settings.plugins.watch), name="plugins' files"
        )
        self._tasks = [self._gateway_task, pulse, files]
        host = f"[{host}]" if ":" in host else host
        log.info("listening on http://%s:%d", host, self.port)

    async def _work(self) -> None:
        """Have plugins at work and the gateway running: both are one node's alone."""
        await self.plugins.start()
        await self.gateway.run()

    async def _rest(self) -> None:
        try:
            await self.gateway.close()
        finally:
            await self.throttle.close()
            await self.plugins.stop()

    def _workplace(self) -> HostContext:
        locks = collections.defaultdict[str, asyncio.Lock](asyncio.Lock)
        return HostContext(
            bot=self.gateway.bot,
            presences=self.gateway.presences,
            emit=self.throttle.emit,
            settled=self.gateway.settled,
            watches=self.access.watches,
            storage=storage_of(self._settings),
            share=self.node.share,
            tokens=self.tokens,
            may_see=self.access.may_see,
            marks=self.node.marks,
            rest_url=self._settings.discord.rest_url,
            address=self.door.address,
            lists_origin=self.door.lists,
            alone=locks.__getitem__,
        )

    def _bind(self) -> list[socket.socket]:
        server = self._settings.server
        try:
            return listen(server.host, server.port)
        except OSError as error:
            unknown = isinstance(error, socket.gaierror)  # its numbers are others than errno's
            why = error.strerror if unknown else os.strerror(error.errno or 0)
            key = "host" if unknown or error.errno == errno.EADDRNOTAVAIL else "port"
            place = f"{server.host}:{server.port}"
            raise OperatorError(f"server.{key}: cannot listen on {place}: {why}") from error

    async def wait_closed(self) -> None:
        """Returns never; raises UpstreamError once Discord refuses us for good."""
        await asyncio.shield(self._gateway_task)  # who waits no more does not end it

    def reload(self, settings: Settings, keys: Keys) -> list[str]:
        """Take over what can change live; nobody is disconnected.

        Returns the key paths of changes that need a restart. Raises OperatorError, and then
        nothing has changed.
        """
        self.plugins.reconfigure(settings.plugin)
        changed = changed_keys(self._started_with, settings)
        self.tokens.reconfigure(keys, settings.auth.algorithms)
        self.access.reconfigure(settings.auth)
        self.limits.reconfigure(settings.limits, settings.auth.connect_timeout)
        self.door.reconfigure(settings.server)
        self.throttle.windows = settings.throttle
        self.rights.check_all()
        self._settings = settings
        self.plugins.look()
        return [key for key in changed if not key.startswith(LIVE)]

    async def stop(self) -> None:
        """Not ready from now on; close every connection so that clients come back by themselves.

        Takes `shutdown_grace`, and a tenth of it where plugins take longer. They are torn down, so
        that what they count is kept.
        """
        self.door.closed = True
        self.web.stop()
        grace = self._settings.server.shutdown_grace
        until = time.monotonic() + grace
        work = [
            asyncio.create_task(self._stop_sources(until), name="plugins and gateway"),
            asyncio.create_task(self._close_sessions(grace / 2), name="connections"),
        ]
        _, late = await asyncio.wait(work, timeout=grace)
        for task in late:
            log.warning("%s not closed within %s s", task.get_name(), grace)
            task.cancel()
        await asyncio.wait(work)
        await self._close_sessions(0)
        await self.socketio.eio.upgrades_end(until - time.monotonic())
        await self.web.close_all_connections()

    async def _stop_sources(self, until: float) -> None:
        try:
            for task in self._tasks:  # once: what the first has to do then takes its time
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            # `wait_closed` tells of what they raised.
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:  # a stop that takes too long is cancelled
            grace = self._settings.server.shutdown_grace
            await self.node.stop(min(max(until - time.monotonic(), grace / 10), grace / 2))

    async def _close_sessions(self, within: float) -> None:
        """In random order, at an even pace that needs no more than `within` seconds.

        Of what a busy machine delays, a little is made up for: else many would be told at once.
        """
        sessions = list(self.socketio.eio.sockets.values())
        random.shuffle(sessions)
        pace = min(GOODBYE_PACE, within / max(1, len(sessions)))
        due = time.monotonic()
        for session in sessions:
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(max(early, GOODBYE_PACE))
            await self._say_goodbye(session)
            due = max(due, time.monotonic() - 2 * GOODBYE_PACE) + pace

    @staticmethod
    async def _say_goodbye(session: Session) -> None:
        if session.handler is not None:
            session.handler.close(GOING_AWAY)
        await session.close()


#: Seconds between two looks at the status line that `systemctl status` shows.
STATUS_INTERVAL: Final = 1.0


class Systemd:
    """What systemd hands this process and hears from it; elsewhere both are nothing.

    The protocol is a datagram of lines and three variables (sd_notify(3), sd_listen_fds(3),
    sd_watchdog_enabled(3)): less than any binding of it.
    """

    #: The first descriptor that systemd passes (SD_LISTEN_FDS_START).
    FIRST_SOCKET: Final = 3

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Takes its variables out of `environ`, so that no child of ours answers to them."""
        self._address = environ.pop("NOTIFY_SOCKET", "")
        ours = environ.pop("LISTEN_PID", "") == str(os.getpid())
        descriptors = int(environ.pop("LISTEN_FDS", "0"))
        environ.pop("LISTEN_FDNAMES", None)
        count = descriptors if ours else 0
        self._inherited = range(self.FIRST_SOCKET, self.FIRST_SOCKET + count)
        watched = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = int(environ.pop("WATCHDOG_USEC", "0"))
        timeout = microseconds / 1e6 if watched else 0
        #: Seconds between two signs of life; half of what systemd waits. None: it does not watch.
        self.interval = timeout / 2 or None

    def sockets(self) -> list[socket.socket]:
        """The listening sockets of `spywatcher.socket`."""
        sockets = [socket.socket(fileno=number) for number in self._inherited]
        for inherited in sockets:
            inherited.setblocking(False)
            os.set_inheritable(inherited.fileno(), False)
        return sockets

    def tell(self, *lines: str) -> None:
        """Send e.g. READY=1. Whoever listens may have gone: that is no reason to stop."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            # "@" marks an abstract socket, whose real name begins with a zero byte.
            address = re.sub("^@", "\0", self._address)
            with contextlib.suppress(OSError):
                sender.sendto("\n".join(lines).encode(), address)

    def tell_reloading(self) -> None:
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def watch(self, server: Server) -> None:
        """Keep systemd's status line true, and its watchdog quiet only while the server turns."""
        said = None
        while True:
            status = f"STATUS={server.gateway.guilds} guilds, {len(server.dashboards)} dashboards"
            if server.problem:
                status += f"; {server.problem}"
            if status != said:
                self.tell(said := status)
            if self.interval and server.alive:
                self.tell("WATCHDOG=1")
            await asyncio.sleep(min(self.interval or STATUS_INTERVAL, STATUS_INTERVAL))


# ------------------------------------------------------------------------- command line
# Parse, check, build, run. Exit status 0: a clean stop; 2: the operator has something to
# change, said in one line per fault; 1: anything else, with its traceback.

EXIT_OPERATOR: Final = 2
#: Python's own are 700, 10, 10: at 10,000 clients a quarter of the time that connecting takes.
GC_THRESHOLDS: Final = (20_000, 20, 20)
TTL_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message and, of a bug, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": timestamp(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if hasattr(record, "connection"):
            line["connection"] = record.connection
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """One event a line; what a client sent cannot begin a line of its own."""

    def __init__(self, *, dated: bool = True) -> None:
        date = "%(asctime)s " if dated else ""
        super().__init__(f"{date}%(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        record.message = record.message.replace("\n", "\\n").replace("\r", "\\r")
        return super().formatMessage(record)


class JournalHandler(logging.StreamHandler[Any]):
    """Writes the level before each line, as journald reads it (sd-daemon(3))."""

    LEVELS: Final = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6}

    def format(self, record: logging.LogRecord) -> str:
        number = self.LEVELS.get(record.levelname, 7)
        return "\n".join(f"<{number}>{line}" for line in super().format(record).splitlines())


def logs_to_journal(environ: Mapping[str, str]) -> bool:
    """Whether stderr is the journal's own (systemd.exec(5), $JOURNAL_STREAM)."""
    status = os.fstat(2)
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up_logging(settings: LogSettings) -> None:
    """Log to stderr. hikari tells of each attempt to reconnect; `Gateway` says it once per change.

    Never at its own debug level: there hikari quotes what Discord sends.
    """
    journal = logs_to_journal(os.environ)
    as_json = settings.format == "json"
    form = JsonFormatter() if as_json else TextFormatter(dated=not journal)
    handler = JournalHandler(sys.stderr) if journal else logging.StreamHandler(sys.stderr)
    handler.setFormatter(form)
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    quiet = settings.level != "debug"
    # Tornado reports clients' mistakes there, at any level; its bugs go to "tornado.application".
    logging.getLogger("tornado.general").setLevel(logging.CRITICAL if quiet else logging.DEBUG)
    logging.getLogger("hikari").setLevel(logging.ERROR if quiet else logging.INFO)
    logging.getLogger("hikari.gateway").setLevel(logging.CRITICAL if quiet else logging.INFO)


def parse_ttl(text: str) -> float:
    """`90`, `90s`, `15m`, `12h` or `30d`, in seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in TTL_UNITS else (text, "s")
    if not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected e.g. 90s, 15m, 12h or 30d")
    return float(int(number) * TTL_UNITS[unit])


def parse_id(text: str) -> int:
    """A Discord id: 1 to 20 digits, and not 0."""
    if text == "0" or not is_snowflake(text):
        raise argparse.ArgumentTypeError(f"got {text}, expected 1-20 digits, and not 0")
    return int(text)


def parse_port(text: str) -> int:
    """A port; 0 picks a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 to 65535")
    return int(text)


def parse_folder(text: str) -> Path:
    """A folder that is there, whatever is the working directory later."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    everywhere = argparse.ArgumentParser(add_help=False)  # before a command and behind it
    no_default, about = argparse.SUPPRESS, "settings (config.toml)"
    everywhere.add_argument("--config", type=Path, default=no_default, metavar="FILE", help=about)
    about = "Watch Discord guilds live, from any browser."
    parser = argparse.ArgumentParser("spywatcher", description=about, parents=[everywhere])
    parser.add_argument("--version", action="version", version=f"SpyWatcher {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, run: Callable[..., None], about: str) -> Callable[..., argparse.Action]:
        command = commands.add_parser(name, help=about, parents=[everywhere])
        command.set_defaults(command=run)
        return command.add_argument

    an_id: dict[str, Any] = {"type": parse_id, "metavar": "ID"}
    add("serve", serve_command, "run the server (the default)")
    demo = add("demo", demo_command, "serve against the built-in pretend Discord")
    demo("--port", type=parse_port, metavar="N", help="port to listen on; 0 picks a free one")
    check = add("check", check_command, "validate settings and plugins")
    check("--settings", action="store_true", help="print all settings in force")
    types = add("types", types_command, "TypeScript declarations of all events, or AsyncAPI 3")
    types("--asyncapi", action="store_true", help="an AsyncAPI 3 document instead")
    for command in (demo, check, types):
        command("--plugins", type=parse_folder, metavar="DIR", help="more plugins to load")
    token = add("token", token_command, "make a viewer's token")
    token("--discord-id", required=True, help="the viewer's user id", **an_id)
    token("--role", default="USER", choices=sorted(get_args(Role)))
    token("--guild", action="append", default=[], help="may view it", **an_id)
    token("--ttl", type=parse_ttl, default=900.0, help="life time, e.g. 15m")
    forget = add("forget", forget_command, "remove a member's counts")
    forget("--member", required=True, help="the member", **an_id)
    forget("--guild", help="in this guild only", **an_id)
    return parser.parse_args(arguments, argparse.Namespace(config=None, command=serve_command))


def code_beside(name: str, use: str) -> Any:
    """A module that few need, so that it is loaded only for that `use`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OperatorError(
            f"{use}: {error.name} is missing, expected {name}.py beside {Path(__file__).name}"
            " and what it imports"
        ) from error


def cluster_code() -> Any:
    return code_beside("spywatcher_cluster", "redis.url")


def node_type(settings: Settings) -> Callable[[Settings, Bot], Node]:
    """Makes this process's node: alone, or one of several where they have a Redis to meet at."""
    makes: Callable[[Settings, Bot], Node] = Node
    return cluster_code().ClusterNode if settings.redis.url else makes


def bot_token_of(settings: Settings) -> str:
    discord = settings.discord
    key = "discord.token_file" if discord.token_file else "discord.token"
    token = read_secret(discord.token, discord.token_file, settings.folder, "discord.token")
    if token.lower().startswith("bot "):
        raise OperatorError(f'{key}: begins with "Bot ", expected only what comes after that')
    if not re.fullmatch("[!-~]*", token):  # the error of a header quotes it, and would be logged
        raise OperatorError(
            f"{key}: got blanks, lines or other letters too, expected a token alone"
        )
    return token


def credentials_of(settings: Settings, *, needed: bool = True) -> tuple[Keys, str]:
    """What tokens are checked with, and the bot's own.

    Raises OperatorError where one is wrong or, if they are `needed`, missing.
    """
    faults: list[str] = []
    keys, token = Keys(), ""
    with collecting(faults):
        keys = read_keys(settings.auth, settings.folder)
    with collecting(faults):
        token = bot_token_of(settings)
    if not faults and needed and (keys == Keys() or not token):
        faults.append(
            "auth.secret and discord.token must both be set (or auth.secret_file and"
            " discord.token_file); to look around without a bot: python spywatcher.py demo"
        )
    if faults:
        raise OperatorError(*faults)
    return keys, token


def serve_command(settings: Settings, arguments: argparse.Namespace) -> None:
    keys, token = credentials_of(settings)
    systemd = Systemd(os.environ)
    sockets, make_node = systemd.sockets(), node_type(settings)
    server = Server(settings, keys=keys, token=token, sockets=sockets, make_node=make_node)
    reload = functools.partial(reload_settings, server, lambda: read_settings(arguments.config))
    faulthandler.enable(2)  # systemd's watchdog sends SIGABRT: every thread's stack to the journal
    run_until_stopped(run_server(server, systemd, reload))


def reload_settings(server: Server, read: Callable[[], Settings]) -> None:
    """What SIGHUP does: read the settings again; a fault in them changes nothing."""
    try:
        settings = read()
        with naming_source(settings):
            keys = read_keys(settings.auth, settings.folder)
            if keys == Keys():
                raise OperatorError("auth.secret: not set any more")
            for_restart = server.reload(settings, keys)
    except OperatorError as error:
        log.error("settings not reloaded, nothing has changed: %s", "; ".join(error.faults))
        return
    set_up_logging(settings.log)
    log.info("settings reloaded")
    if for_restart:
        log.warning("these need a restart: %s", ", ".join(for_restart))


def check_command(settings: Settings, arguments: argparse.Namespace) -> None:
    """Print what there is, and say what `serve` would refuse and which plugins do not load."""
    plugins = plugin_loader(settings, arguments.plugins)
    faults = faults_beside_file(settings, plugins)
    if arguments.settings:
        print(settings_text(settings))
    for plugin in plugins.plugins.values():
        print(plugin_text(plugin))
    if faults:
        raise OperatorError(*faults)
    print(f"all is well with {settings.source}")


def faults_beside_file(
    settings: Settings, plugins: PluginLoader, *, complete: bool = True
) -> list[str]:
    """What is wrong with what settings name: plugins (which are loaded by it), keys, token, Redis.

    Where settings are not `complete`, what is missing is no fault.
    """
    faults: list[str] = []
    with collecting(faults):
        plugins.load_all()
    with collecting(faults):
        keys, token = credentials_of(settings, needed=complete)
        if keys != Keys():
            plugins.check_secret(Tokens(keys, settings.auth.algorithms))
        if token:  # this takes none that is no token
            Gateway(settings.discord, token, wanted_events(plugins), Metrics())
    with collecting(faults):
        if settings.redis.url:
            cluster_code().check_redis(settings)
    return faults + plugins.faults()


def plugin_loader(settings: Settings, first: Path | None = None) -> PluginLoader:
    """Of the folders that settings name, with one before them."""
    folders = (*([str(first)] if first else []), *settings.plugins.folders)
    chosen = msgspec.structs.replace(settings.plugins, folders=folders)
    return PluginLoader(chosen, settings.plugin, settings.folder, Metrics())


def plugin_text(plugin: Plugin) -> str:
    """What a plugin sends, is called for, needs and serves."""
    intents = nothing = hikari.Intents.NONE
    for event_type in plugin.event_types():
        intents |= missing_intents(event_type, nothing)
    form = plugin.settings_form
    rows: dict[str, Iterable[str]] = {
        "sends": plugin.events | {event for event, _ in plugin.emitted},
        "hears": [getattr(one.mark.of, "__name__", one.mark.of) for one in plugin.hooks("@on")],
        "every": [f"{one.mark.of:g} s" for one in plugin.hooks("@every")],
        "greets": [one.mark.room for one in plugin.hooks("@on_subscribe")],
        "hooks": [one.mark.hook for one in plugin.hooks("setup", "teardown", "forget")],
        "rooms": plugin.kinds,
        "routes": [one.mark.of for one in plugin.hooks("@route")],
        "intents": [str(intent.name) for intent in intents],
        "needs": plugin.needs,
        "settings": form.__struct_fields__ if form else plugin.settings,
    }
    lines = [
        textwrap.fill(
            ", ".join(sorted(set(of))),
            100,
            initial_indent=f"  {what:<10}",
            subsequent_indent=" " * 12,
        )
        for what, of in rows.items()
        if of
    ]
    return "\n".join([f"{plugin.name}:", *lines])


def types_command(settings: Settings, arguments: argparse.Namespace) -> None:
    """Print what dashboards say and hear; nothing of it while a plugin does not load."""
    spywatcher_types = code_beside("spywatcher_types", "the command types")
    plugins = plugin_loader(settings, arguments.plugins)
    plugins.load_all()
    if faults := plugins.faults():
        raise OperatorError(*faults)
    write = spywatcher_types.asyncapi if arguments.asyncapi else spywatcher_types.typescript
    print(write(plugins))


def settings_text(settings: Settings) -> str:
    """All settings as TOML would have them; a secret is shown only as set or not."""
    lines = []
    for name, section in msgspec.to_builtins(settings, enc_hook=str).items():
        if not isinstance(section, dict):
            continue
        tables = section.items() if name == "plugin" else [("", section)]
        for plugin, table in tables:
            path = f"{name}.{plugin}" if plugin else name
            for key, value in table.items():
                hidden = key in SECRET_KEYS and value
                may_show = "(set, not shown)" if hidden else shown(without_login(value))
                lines.append(f"{path}.{key} = {may_show}")
    return "\n".join(lines)


def token_command(settings: Settings, arguments: argparse.Namespace) -> None:
    tokens = Tokens(read_keys(settings.auth, settings.folder), settings.auth.algorithms)
    viewer, guilds = str(arguments.discord_id), [str(guild) for guild in arguments.guild]
    print(tokens.issue(viewer, arguments.role, guilds, arguments.ttl))


def forget_command(settings: Settings, arguments: argparse.Namespace) -> None:
    """Remove what plugins keep of a member; a running server follows within 10 seconds."""
    plugins, member, guild = plugin_loader(settings), arguments.member, arguments.guild
    plugins.load_all()
    if settings.redis.url:
        shared = asyncio.run(cluster_code().forget_shared(settings, member, guild))
        print(f"Redis: {shared} removed")
    for name, plugin in plugins.plugins.items():
        for _, forget, _ in plugin.hooks("forget"):
            try:
                print(f"plugin {name}: {int(forget(storage_of(settings), member, guild))} removed")
            except FAULTS as error:  # as in PluginLoader.load_all
                raise OperatorError(f"plugin {name} could not forget: {error}") from error
    if plugins.failures:
        raise OperatorError(*(f"plugin {name}: {e}" for name, e in plugins.failures.items()))


def demo_command(settings: Settings, arguments: argparse.Namespace) -> None:
    """Serve a pretend Discord instead, until stopped."""
    demo = code_beside("simulator", "the command demo")
    run_until_stopped(demo.run_demo(settings, arguments.port, arguments.plugins, arguments.config))


async def run_server(
    server: Server, systemd: Systemd | None = None, reload: Callable[[], None] = lambda: None
) -> None:
    """Serve until a signal comes or Discord refuses us for good."""
    systemd = systemd or Systemd({})
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)

    def on_sighup() -> None:
        systemd.tell_reloading()
        try:
            reload()
        finally:
            systemd.tell("READY=1")

    loop.add_signal_handler(signal.SIGHUP, on_sighup)
    async with server:
        systemd.tell("READY=1")
        try:
            await until_one_ends(server.wait_closed(), stopping.wait(), systemd.watch(server))
        finally:
            systemd.tell("STOPPING=1", "STATUS=draining")


def run_until_stopped(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop where it is installed (extra `speedups`), else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    else:
        loop_factory = uvloop.new_event_loop
    # Nearly all that the garbage collector walks lives as long as its client: let it walk less, and
    # never through what was imported: that alone takes 50 ms.
    gc.set_threshold(*GC_THRESHOLDS)
    gc.freeze()
    runner = asyncio.Runner(loop_factory=loop_factory)
    try:
        runner.run(main)
    finally:
        if runner.run(everything_ends(main)):
            runner.close()


async def everything_ends(main: Coroutine[Any, Any, None]) -> bool:
    """Cancel all that is left; whether it heeded that. What does not, asyncio would wait for for ever."""
    own = asyncio.current_task()
    for task in [task for task in asyncio.all_tasks() if task.get_coro() is main]:
        task.cancel()  # something has broken off the loop: it still has to stop, in its own time
        await asyncio.wait([task])
    left = asyncio.all_tasks() - {own}
    await end_tasks(left, within=1.0)
    return all(task.done() for task in left)


@contextlib.contextmanager
def naming_source(settings: Settings) -> Iterator[None]:
    """Faults of settings, met inside, say which file was read, or that there was none."""
    try:
        yield
    except OperatorError as error:
        raise OperatorError(*with_source(error.faults, settings)) from error


def with_source(faults: Iterable[str], settings: Settings) -> list[str]:
    keys = re.compile(rf"({'|'.join([*section_types(), 'plugin', 'throttle'])})\.\w")
    return [f"{fault} ({settings.source})" if keys.match(fault) else fault for fault in faults]


def say_faults(*faults: str) -> None:
    """One line each on stderr; in the journal each is an error (sd-daemon(3))."""
    mark = "<3>" if logs_to_journal(os.environ) else ""
    print("\n".join(f"{mark}spywatcher: {fault}" for fault in faults), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, build, run. Returns the exit status."""
    parsed = parse_arguments(arguments)
    try:
        settings = read_settings(parsed.config)
        set_up_logging(settings.log)
        with naming_source(settings):
            try:
                parsed.command(settings, parsed)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough, as in `types | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OperatorError as error:
        faults = list(error.faults)
        if isinstance(error, SettingsError) and parsed.command in (serve_command, check_command):
            plugins = plugin_loader(error.sound, getattr(parsed, "plugins", None))
            more = faults_beside_file(error.sound, plugins, complete=False)
            faults += with_source(more, error.sound)
        say_faults(*faults)
        return EXIT_OPERATOR
    except UpstreamError as error:
        say_faults(str(error))
        return EXIT_OPERATOR
    return 0


if __name__ == "__main__":
    # Plugins import `spywatcher`; without this they would get a second copy of this module,
    # and mark their functions for a host that does not exist.
    sys.modules["spywatcher"] = sys.modules["__main__"]
    sys.exit(main())
