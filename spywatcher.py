"""SpyWatcher: what happens in your Discord guilds, live in any browser.

One process. In comes a Discord gateway session (hikari); out go Socket.IO events to browser
dashboards (Tornado, python-socketio). Nothing here knows an event by name: every event that a
dashboard sees is made by a plugin.

The way of one event:
    gateway -> plugin -> throttle -> room -> clients that may see it

The sections, each using only those above it:
    errors               whose fault it was, and what they are told
    settings             config.toml: one table of keys, types, defaults, meanings
    metrics              what is counted, for Prometheus
    identity and access  who a viewer is, which guilds and channels they may see
    limits               how much one address, one viewer, one connection may have
    rooms and fan-out    Engine.IO sessions, rooms, and the shortest way from one event to all of them
    throttle             how often one event may go to one guild
    plugin API           all that a plugin may import
    plugin host          finds, loads, runs and fences plugins
    gateway              the session with Discord, kept alive
    web handlers         the Tornado side of Socket.IO
    server               puts the parts together, starts and stops them
    command line         serve, demo, check, token, forget
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import difflib
import functools
import gc
import heapq
import importlib
import importlib.util
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
import tempfile
import time
import tomllib
import unicodedata
from base64 import b64encode
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    Self,
    TypeVar,
    get_args,
)

import engineio
import hikari
import jwt
import limits
import limits.aio
import msgspec
import socketio
from engineio import packet as engineio_packet
from hikari.events import base_events
from msgspec import Meta
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from socketio.exceptions import ConnectionRefusedError as SocketIORefusal
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream, SSLIOStream, StreamBufferFullError, StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketHandler

if TYPE_CHECKING:
    from spywatcher_cluster import Cluster

__version__ = "0.1.0"

#: What a plugin may import; everything else may change without notice.
__all__ = [
    "Payload",
    "PluginSettings",
    "Shared",
    "Spy",
    "channel_name",
    "clean_name",
    "every",
    "member_name",
    "on",
    "on_subscribe",
    "timestamp",
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
        super().__init__("\n".join(faults))
        self.faults = faults


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

Origin = Annotated[str, Meta(pattern=r"^(\*|null|https?://(\*\.)?[^/\s*]+)$")]
Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
SecondsOrZero = Annotated[float, Meta(ge=0)]
GuildId = Annotated[str, Meta(pattern=r"^[0-9]{1,20}$")]
PermissionName = Annotated[str, Meta(pattern=r"^[A-Z_]+$")]
Role = Literal["USER", "ADMIN", "MODERATOR", "BANNED"]
Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "ES256"]
Network = Annotated[str, Meta(pattern=r"^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$")]
Rate = Annotated[str, Meta(pattern=r"^[1-9][0-9]*/(second|minute|hour|day)$")]
Transport = Literal["websocket", "polling"]


class Section(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One table of config.toml; `Meta(description=…)` is what the README says of a key."""


class ServerSettings(Section, frozen=True):
    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Port to listen on; 0 picks a free one.")] = 3001
    cors_origins: Annotated[
        tuple[Origin, ...],
        Meta(description='Pages that may connect from another origin; "*" is any.'),
    ] = ("http://localhost:5173", "http://127.0.0.1:5173")
    trusted_proxies: Annotated[
        tuple[Network, ...],
        Meta(description="Addresses or networks that may set X-Forwarded-For."),
    ] = ("127.0.0.1", "::1")
    transports: Annotated[
        tuple[Transport, ...], Meta(min_length=1, description="Engine.IO transports offered.")
    ] = ("websocket", "polling")
    max_message_bytes: Annotated[
        Positive, Meta(description="Largest message a client may send.")
    ] = 16_384
    max_queue_bytes: Annotated[
        Positive, Meta(description="Unsent bytes a client may pile up before it is cut off.")
    ] = 1_048_576
    shutdown_grace: Annotated[Seconds, Meta(description="Seconds that a stop may take.")] = 5.0
    metrics_from: Annotated[
        tuple[Network, ...],
        Meta(description="Addresses or networks besides this host that may read /metrics."),
    ] = ()


class HeartbeatSettings(Section, frozen=True):
    interval: Annotated[Seconds, Meta(description="Seconds between two pings to a client.")] = 25.0
    timeout: Annotated[Seconds, Meta(description="Seconds a client has to answer a ping.")] = 60.0


class AuthSettings(Section, frozen=True):
    secret: Annotated[
        str | tuple[str, ...],
        Meta(description="Key that signs the viewers' tokens; a list rotates keys, newest first."),
    ] = ""
    secret_file: Annotated[
        str, Meta(description="File that holds the key instead, one a line.")
    ] = ""
    public_key_file: Annotated[
        str, Meta(description="PEM file of the public key for RS256 or ES256.")
    ] = ""
    algorithms: Annotated[
        tuple[Algorithm, ...], Meta(min_length=1, description="JWT algorithms accepted.")
    ] = ("HS256",)
    admin_roles: Annotated[
        tuple[Role, ...], Meta(description="Token roles that may view every watched guild.")
    ] = ("ADMIN",)
    viewer_permissions: Annotated[
        tuple[PermissionName, ...],
        Meta(description="Discord permissions of which others need one in the guild."),
    ] = ("MANAGE_GUILD",)
    channel_visibility: Annotated[
        bool, Meta(description="Channel events reach only viewers who may see the channel.")
    ] = True
    connect_timeout: Annotated[
        Seconds, Meta(description="Seconds a connection may stay open without a valid token.")
    ] = 10.0


class DiscordSettings(Section, frozen=True):
    token: Annotated[str, Meta(description="The bot's token.")] = ""
    token_file: Annotated[str, Meta(description="File that holds the token instead.")] = ""
    guilds: Annotated[
        tuple[GuildId, ...], Meta(description="Watch only these; empty: every guild the bot is in.")
    ] = ()
    rest_url: Annotated[str, Meta(description="Where Discord's REST API answers.")] = (
        "https://discord.com/api/v10"
    )
    startup_grace: Annotated[
        SecondsOrZero,
        Meta(description="Seconds after a new gateway session without alerts and role changes."),
    ] = 5.0


class LimitsSettings(Section, frozen=True):
    connections_per_ip: Annotated[
        Positive,
        Meta(
            description="Open connections of one address, on all nodes together; IPv6 counts by /64."
        ),
    ] = 50
    connections_per_viewer: Annotated[
        Positive, Meta(description="Open connections of one viewer, on all nodes together.")
    ] = 20
    unauthenticated: Annotated[
        Positive, Meta(description="Connections without a valid token yet, all together.")
    ] = 1_000
    attempts_per_ip: Annotated[
        Rate, Meta(description="Connections that one address may begin.")
    ] = "60/minute"
    block_after: Annotated[
        Positive, Meta(description="Refused attempts in a row before the address is blocked.")
    ] = 5
    block_for: Annotated[Seconds, Meta(description="Seconds that a block lasts.")] = 600.0
    events_per_connection: Annotated[Rate, Meta(description="Events that one client may send.")] = (
        "20/second"
    )
    rooms_per_connection: Annotated[
        Positive, Meta(description="Rooms that one client may be in.")
    ] = 200


class FanoutSettings(Section, frozen=True):
    max_delay: Annotated[
        SecondsOrZero, Meta(description="Longest seconds a burst may be held to share a write.")
    ] = 0.05


class RedisSettings(Section, frozen=True):
    url: Annotated[
        str,
        Meta(
            pattern=r"^(|(rediss?|unix|redis\+sentinel)://.+)$",
            description="Redis that several servers share; empty: one process, all in memory.",
        ),
    ] = ""
    password_file: Annotated[str, Meta(description="File that holds Redis' password.")] = ""


class StorageSettings(Section, frozen=True):
    path: Annotated[
        str,
        Meta(min_length=1, description="SQLite file of counts, relative to the settings file."),
    ] = "spywatcher.db"


#: The folder of an operator's own plugins. Its name also stands for the plugins shipped with
#: the server, so that those are there wherever the settings are.
OWN_PLUGINS: Final = "plugins"


class PluginsSettings(Section, frozen=True):
    folders: Annotated[
        tuple[str, ...],
        Meta(
            description="Where plugins are, relative to the settings file;"
            ' "plugins" brings the shipped ones too.'
        ),
    ] = (OWN_PLUGINS,)
    disabled: Annotated[tuple[str, ...], Meta(description="Plugins not to load, by name.")] = ()


class LogSettings(Section, frozen=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level logged.")
    ] = "info"
    format: Annotated[Literal["text", "json"], Meta(description="Form of a log line.")] = "text"


#: Seconds between two broadcasts of one event to one guild; what a file adds is added to it.
THROTTLE: Final = {"analytics:update": 30.0}


class Settings(Section, frozen=True):
    """All of config.toml. `folder` is where it lay: relative paths start there."""

    server: ServerSettings = ServerSettings()
    heartbeat: HeartbeatSettings = HeartbeatSettings()
    auth: AuthSettings = AuthSettings()
    discord: DiscordSettings = DiscordSettings()
    limits: LimitsSettings = LimitsSettings()
    throttle: Annotated[
        dict[str, Seconds],
        Meta(
            description="Seconds between two broadcasts of this event to one guild;"
            " any event may have a row."
        ),
    ] = msgspec.field(default_factory=THROTTLE.copy)
    fanout: FanoutSettings = FanoutSettings()
    redis: RedisSettings = RedisSettings()
    storage: StorageSettings = StorageSettings()
    plugins: PluginsSettings = PluginsSettings()
    plugin: dict[str, dict[str, Any]] = {}
    log: LogSettings = LogSettings()
    folder: Path = Path()


SECRET_KEYS: Final = frozenset({"secret", "token"})
SectionT = TypeVar("SectionT", bound=msgspec.Struct)


def check_table(table: object, to: type[SectionT], path: str, faults: list[str]) -> SectionT:
    """Turn one TOML table into a section; every fault is appended to `faults` with its key path."""
    if not isinstance(table, dict):
        faults.append(f"{path}: got {shown(table)}, expected a table")
        return to()
    fields = {field.name: field for field in msgspec.structs.fields(to)}
    values = {}
    for key, value in table.items():
        if key not in fields:
            faults.append(f"{path}.{key}: unknown key{nearest(key, fields)}")
            continue
        try:
            values[key] = msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as error:
            expected = str(error).removeprefix("Expected ")
            secret = key in SECRET_KEYS or (not isinstance(value, str) and "://" in shown(value))
            came = "a value not shown here" if secret else shown(without_login(value))
            faults.append(f"{path}.{key}: got {came}, expected {expected}")
    return to(**values)


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


def parse_settings(tables: dict[str, Any], folder: Path) -> Settings:
    """Check all tables at once; raises OperatorError with one line per fault."""
    faults: list[str] = []
    sections: dict[str, Any] = {"folder": folder}
    types = section_types()
    for name, table in tables.items():
        if name == "plugin":
            sections["plugin"] = check_plugin_tables(table, faults)
        elif name == "throttle":
            sections["throttle"] = check_throttle_table(table, faults)
        elif name in types:
            sections[name] = check_table(table, types[name], name, faults)
        else:
            faults.append(f"{name}: unknown table{nearest(name, [*types, 'plugin', 'throttle'])}")
    settings = Settings(**sections)
    faults += permission_faults(settings.auth) + network_faults(settings.server)
    if faults:
        raise OperatorError(*faults)
    return settings


def section_types() -> dict[str, type[Section]]:
    return {
        field.name: field.type
        for field in msgspec.structs.fields(Settings)
        if isinstance(field.type, type) and issubclass(field.type, Section)
    }


def check_plugin_tables(table: object, faults: list[str]) -> dict[str, dict[str, Any]]:
    """`[plugin.NAME]` is checked by the plugin itself; here only that each is a table."""
    if not isinstance(table, dict):
        faults.append(f"plugin: got {shown(table)}, expected tables [plugin.NAME]")
        return {}
    faults += [
        f"plugin.{name}: got {shown(value)}, expected a table"
        for name, value in table.items()
        if not isinstance(value, dict)
    ]
    return {name: value for name, value in table.items() if isinstance(value, dict)}


def check_throttle_table(table: object, faults: list[str]) -> dict[str, float]:
    """`[throttle]`: any event's name and its seconds; the defaults stay where nothing is said."""
    if not isinstance(table, dict):
        faults.append(f"throttle: got {shown(table)}, expected a table")
        return THROTTLE.copy()
    seconds = THROTTLE.copy()
    for event, value in table.items():
        try:
            seconds[event] = msgspec.convert(value, Seconds)
        except msgspec.ValidationError as error:
            expected = str(error).removeprefix("Expected ")
            faults.append(f'throttle."{event}": got {shown(value)}, expected {expected}')
    return seconds


def permission_faults(auth: AuthSettings) -> list[str]:
    known = [str(permission.name) for permission in hikari.Permissions]
    return [
        f"auth.viewer_permissions: {name} is no Discord permission{nearest(name, known)}"
        for name in auth.viewer_permissions
        if name not in known
    ]


def network_faults(server: ServerSettings) -> list[str]:
    faults = []
    listed = {"trusted_proxies": server.trusted_proxies, "metrics_from": server.metrics_from}
    for key, networks in listed.items():
        for text in networks:
            try:
                ipaddress.ip_network(text)
            except ValueError as error:
                faults.append(f"server.{key}: got {text}, expected a network: {error}")
    return faults


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
    here = Path(__file__).parent
    places = [here / OWN_PLUGINS, here / "spywatcher_plugins"]
    return next((place for place in places if place.is_dir()), None)


def read_settings(path: Path | None) -> Settings:
    """Read `path`, or the first config.toml found as the command line promises, or the defaults."""
    if path is None:
        here = [Path("config.toml"), Path(__file__).parent / "config.toml"]
        path = next((place for place in here if place.is_file()), None)
        if path is None:
            plain = (Path(__file__).parent / OWN_PLUGINS).is_dir()
            return Settings(folder=Path(__file__).parent if plain else Path.cwd())
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise OperatorError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path}: not TOML: {error}") from error
    try:
        return parse_settings(tables, path.resolve().parent)
    except OperatorError as error:
        raise OperatorError(*(f"{path}: {fault}" for fault in error.faults)) from error


def storage_of(settings: Settings) -> Path:
    """The SQLite file of counts."""
    return settings.folder / settings.storage.path


def read_file(name: str, folder: Path, key: str) -> str:
    """What a file named by a setting holds; raises OperatorError without showing it."""
    try:
        return (folder / name).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"{key}: {name} cannot be read: {error}") from error


def read_secret(value: str, file: str, folder: Path, key: str) -> str:
    """The secret itself, or what its file holds. Empty if neither is set."""
    if value and file:
        raise OperatorError(f"{key}: set, and {key}_file too; expected one of them")
    return read_file(file, folder, f"{key}_file") if file else value


# ------------------------------------------------------------------------------ metrics
# What is counted, for Prometheus. Each part is handed its server's one `Metrics` and counts on
# it where something happens; what only has to be read is read when a scrape asks. Counting
# knows no part: names and labels are all that is here. A label's values come from this code
# or from plugins, never from a client or from Discord, so that they stay few.


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
        self.received = count("received_events", "Discord's events handed to plugins.", "event")
        self.sent = count("sent_events", "Events that went to a room with listeners.", "event")
        self.dropped = count("dropped_events", "Events that went to nobody.", "reason")
        self.throttled = count("throttled_events", "Events held back to be merged.", "event")
        self.deliveries = count("deliveries", "Events written to a client, each client counted.")
        self.plugin_failures = count("plugin_failures", "Faults of plugins.", "plugin")
        self.plugin_seconds = count("plugin_seconds", "Time spent in plugins.", "plugin")
        self.plugin_counts = count("plugin_counts", "What plugins count.", "plugin", "what")
        self.gateway_changes = count("gateway_changes", "Turns of the link to Discord.", "change")

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, namespace="spywatcher", registry=self.registry)

    def gauge(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """A figure of now; `read` is called at each scrape. Names end in the unit, if there is one."""
        Gauge(name, meaning, namespace="spywatcher", registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """All figures in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)


# ------------------------------------------------------------------ identity and access
# Who is there (a signed token) and what they may see (Discord's permissions, by hikari's
# cache). The only place that decides either. It knows no sockets and no rooms.

ROLES: Final = frozenset(get_args(Role))
#: A token is a few hundred bytes; nothing longer is worth the work of checking it.
MAX_TOKEN_BYTES: Final = 4096
#: The end of the year 9999, in seconds since 1970.
LAST_MOMENT: Final = 253_402_300_799
#: A key no shorter than the hash it makes (RFC 7518 §3.2).
LEAST_SECRET_BYTES: Final = {"HS256": 32, "HS384": 48, "HS512": 64}
#: Unicode categories that steer a display instead of showing something.
UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
LEFT_IN_TIMEOUT: Final = hikari.Permissions.VIEW_CHANNEL | hikari.Permissions.READ_MESSAGE_HISTORY
ALL_PERMISSIONS: Final = hikari.Permissions.all_permissions()


class Viewer(msgspec.Struct, frozen=True):
    """Who a dashboard belongs to: the claims of its token (API page, Authentication)."""

    discord_id: str
    role: str
    guilds: frozenset[str] | None = None
    expires: float | None = None


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
    file = auth.public_key_file
    keys = Keys(
        secrets=tuple(text.splitlines()),
        public=read_file(file, folder, "auth.public_key_file") if file else "",
    )
    faults = [
        f"auth.secret: got {len(secret.encode())} bytes, expected {LEAST_SECRET_BYTES[algorithm]}"
        f" or more for {algorithm}"
        for algorithm in auth.algorithms
        for secret in keys.of(algorithm)
        if len(secret.encode()) < LEAST_SECRET_BYTES.get(algorithm, 0)
    ]
    if not keys.public:
        faults += [
            f"auth.public_key_file: not set, expected the key for {algorithm}"
            for algorithm in auth.algorithms
            if algorithm not in LEAST_SECRET_BYTES
        ]
    faults += [
        f"auth: got a key that is none for {algorithm}"
        for algorithm in auth.algorithms
        if not all(is_key_for(algorithm, key) for key in keys.of(algorithm))
    ]
    if faults:
        raise OperatorError(*faults)
    return keys


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
        if not isinstance(token, str) or len(token) > MAX_TOKEN_BYTES:
            raise RefusedConnectionError("Invalid token", code="malformed")
        viewer = self._viewer(self._claims(token))
        if viewer.role == "BANNED":
            raise RefusedConnectionError("Access denied")
        return viewer

    def _claims(self, token: str) -> dict[str, Any]:
        try:
            algorithm = jwt.get_unverified_header(token).get("alg")
            if algorithm not in self._algorithms:
                raise jwt.InvalidAlgorithmError
            return self._decode(token, str(algorithm))
        except jwt.ExpiredSignatureError:
            code = "expired"
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
            code = "signature"
        except (jwt.DecodeError, UnicodeError):
            code = "malformed"
        except (jwt.InvalidTokenError, TypeError, ValueError, OverflowError, RecursionError):
            code = "claims"
        raise RefusedConnectionError("Invalid token", code=code)

    def _decode(self, token: str, algorithm: str) -> dict[str, Any]:
        for key in self._keys.of(algorithm):
            with contextlib.suppress(jwt.InvalidSignatureError):
                return jwt.decode(token, key, algorithms=[algorithm])
        raise jwt.InvalidSignatureError

    @staticmethod
    def _viewer(claims: dict[str, Any]) -> Viewer:
        discord_id, role = claims.get("discordId"), claims.get("role")
        guilds, expires = claims.get("guilds"), claims.get("exp")
        sound = (
            isinstance(discord_id, str)
            and discord_id != ""
            and claims.get("access") is True
            and isinstance(role, str)
            and role in ROLES
            and (guilds is None or is_list_of_strings(guilds))
            and is_moment(expires)
        )
        if not sound:
            raise RefusedConnectionError("Invalid token", code="claims")
        return Viewer(
            discord_id=str(discord_id),
            role=str(role),
            guilds=None if guilds is None else frozenset(guilds),
            expires=None if expires is None else float(expires),
        )

    def issue(
        self, discord_id: str, role: str = "USER", guilds: Sequence[str] = (), ttl: float = 900.0
    ) -> str:
        """A token that `verify` accepts for `ttl` seconds; raises OperatorError without a secret."""
        algorithm = next((name for name in self._algorithms if name.startswith("HS")), None)
        if algorithm is None or not self._keys.secrets:
            raise OperatorError("auth.secret: not set, expected the key that signs tokens")
        claims: dict[str, Any] = {
            "discordId": discord_id,
            "access": True,
            "role": role,
            "exp": int(time.time() + ttl),
        }
        if guilds:
            claims["guilds"] = list(guilds)
        return jwt.encode(claims, self._keys.secrets[0], algorithm=algorithm)


def is_moment(value: object) -> bool:
    """None, or seconds since 1970 that a calendar knows: a page's milliseconds are not taken."""
    return value is None or (type(value) in (int, float) and 0 < value <= LAST_MOMENT)  # type: ignore[operator]  # a number


def is_list_of_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class Directory(Protocol):
    """What access is decided by; hikari's cache is one."""

    def get_guild(self, guild_id: Any, /) -> Any: ...
    def get_guilds_view(self) -> Mapping[Any, Any]: ...
    def get_member(self, guild_id: Any, user_id: Any, /) -> Any: ...
    def get_role(self, role_id: Any, /) -> Any: ...
    def get_guild_channel(self, channel_id: Any, /) -> Any: ...
    def get_thread(self, thread_id: Any, /) -> Any: ...


class ShardRange(NamedTuple):
    """One shard's share of all guilds (Discord documentation: Gateway, Sharding)."""

    shard: int
    shards: int

    def has(self, guild_id: int) -> bool:
        return hikari.snowflakes.calculate_shard_id(self.shards, guild_id) == self.shard


class Access:
    """Decides which guilds and channels a viewer may see, by hikari's cache as it is now.

    While Discord refills the cache (a new gateway session, an outage that ends, the members of a
    large guild) a missing entry proves nothing: `may_view` then answers None instead of False.
    """

    def __init__(self, auth: AuthSettings, watched: Sequence[str], cache: Directory) -> None:
        self.reconfigure(auth)
        self._watched = frozenset(watched)
        self._cache = cache
        self._begun: set[ShardRange] = set()  # shards that have said which guilds they bring
        self._coming: set[int] = set()
        self._gone_meanwhile: dict[int, set[int]] = {}  # by guild whose members are coming
        #: Guilds that hikari still has and the bot has not.
        self.lost: frozenset[int] = frozenset()
        self._filled = asyncio.Event()

    def reconfigure(self, auth: AuthSettings) -> None:
        self._admin_roles = frozenset(auth.admin_roles)
        self._needed = hikari.Permissions.ADMINISTRATOR
        for name in auth.viewer_permissions:
            self._needed |= hikari.Permissions[name]
        self._channel_visibility = auth.channel_visibility

    # -- how sure the cache is

    def begin(self, guild_ids: Iterable[int], shard_range: ShardRange) -> None:
        """A new gateway session is about to send these guilds: all that the bot has of its shard.

        hikari 2.7 keeps a guild that the bot lost while it was away, so that is noted here.
        """
        coming = frozenset(guild_ids)
        mine = frozenset(filter(shard_range.has, self._cache.get_guilds_view()))
        self.lost = (self.lost - coming) | (mine - coming)
        self._begun.add(shard_range)
        self._coming |= coming

    @property
    def all_begun(self) -> bool:
        """Whether every shard has said which guilds it brings."""
        return any(len(self._begun) == one.shards for one in self._begun)

    def end(self) -> None:
        """The bot goes, and with it all that the cache holds."""
        self._begun.clear()

    def expect_members(self, guild_id: int) -> None:
        """All of this guild is in the cache but its members, who are about to come."""
        self._settle(guild_id)
        self._gone_meanwhile[guild_id] = set()

    def fill(self, guild_id: int) -> None:
        """All of this guild is in the cache, or it is gone."""
        self._settle(guild_id)
        self._filled.set()
        self._filled = asyncio.Event()

    def _settle(self, guild_id: int) -> None:
        self._coming.discard(guild_id)
        self._gone_meanwhile.pop(guild_id, None)
        self.lost -= {guild_id}

    def leave(self, guild_id: int, user_id: int) -> None:
        """This member has left, so it is not among those who are coming."""
        self._gone_meanwhile.get(guild_id, set()).add(user_id)

    async def wait_until_sure(self, viewer: Viewer, guild_id: str, timeout: float) -> bool:
        """`may_view`, but an answer of None is waited for; after `timeout` seconds it is no."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.may_view(viewer, guild_id) is None:
                    await self._news()
        return bool(self.may_view(viewer, guild_id))

    async def _news(self) -> None:
        """Returns once more is known than before."""
        await self._filled.wait()

    def _is_sure(self, viewer: Viewer, guild_id: int) -> bool:
        """Whether what the cache does not have of the guild or the viewer in it is not there."""
        if guild_id in self._coming or not any(one.has(guild_id) for one in self._begun):
            return False
        gone = self._gone_meanwhile.get(guild_id)
        return (
            gone is None
            or self._member(viewer, guild_id) is not None
            or viewer.discord_id in map(str, gone)
        )

    # -- guilds

    def watches(self, guild_id: str) -> bool:
        """Whether events of this guild are for anyone at all."""
        return not self._watched or guild_id in self._watched

    def may_view(self, viewer: Viewer, guild_id: str) -> bool | None:
        """Whether the bot watches this guild and the viewer may see it; None: not known yet."""
        if not self.watches(guild_id):
            return False
        number = hikari.Snowflake(guild_id)
        guild = self._cache.get_guild(number)
        if guild is not None and number not in self.lost and self._may_view(viewer, guild):
            return True
        return False if self._is_sure(viewer, number) else None

    def _may_view(self, viewer: Viewer, guild: hikari.Guild) -> bool:
        if viewer.role in self._admin_roles:
            return True
        if viewer.guilds is not None:
            return str(guild.id) in viewer.guilds
        member = self._member(viewer, guild.id)
        if member is None:
            return False
        granted = without_timed_out(member, self._permissions(member, guild))
        return bool(granted & self._needed)

    def guilds_of(self, viewer: Viewer) -> list[dict[str, str | None]]:
        """`{id, name, icon}` of each guild that the viewer may see, by name."""
        guilds = [
            {"id": str(guild.id), "name": clean_text(guild.name), "icon": guild.icon_hash}
            for guild in self._cache.get_guilds_view().values()
            if self.may_view(viewer, str(guild.id))
        ]
        return sorted(guilds, key=lambda guild: (guild["name"] or "", guild["id"] or ""))

    # -- channels

    def may_see(self, viewer: Viewer, guild_id: str, channel_id: str) -> bool:
        """Whether a viewer of the guild may see this channel or thread in it."""
        if not self._channel_visibility or viewer.role in self._admin_roles:
            return True
        guild = self._cache.get_guild(hikari.Snowflake(guild_id))
        if guild is None:
            return False
        member = self._member(viewer, guild.id)
        if member is None:  # named by a `guilds` claim, but perhaps a member not yet sent
            return viewer.guilds is not None and self._is_sure(viewer, guild.id)
        needed = hikari.Permissions.VIEW_CHANNEL
        number = hikari.Snowflake(channel_id)
        thread = self._cache.get_thread(number)
        if thread is not None:
            number = thread.parent_id
            if thread.type is hikari.ChannelType.GUILD_PRIVATE_THREAD:
                # Who else was invited to a private thread, hikari's cache cannot say.
                needed |= hikari.Permissions.MANAGE_THREADS
        granted = self._channel_permissions(member, guild, number)
        return without_timed_out(member, granted) & needed == needed

    def _channel_permissions(
        self, member: hikari.Member, guild: hikari.Guild, channel_id: hikari.Snowflake
    ) -> hikari.Permissions:
        """Discord documentation: Permissions, Permission Overwrites."""
        granted = self._permissions(member, guild)
        if granted == ALL_PERMISSIONS:
            return granted
        channel = self._cache.get_guild_channel(channel_id)
        overwrites = getattr(channel, "permission_overwrites", None)
        if overwrites is None:
            return hikari.Permissions.NONE
        everyone = overwrites.get(guild.id)
        if everyone is not None:
            granted = granted & ~everyone.deny | everyone.allow
        allow = deny = hikari.Permissions.NONE
        for role_id in set(member.role_ids) - {guild.id}:
            if role_id in overwrites:
                allow |= overwrites[role_id].allow
                deny |= overwrites[role_id].deny
        granted = granted & ~deny | allow
        own = overwrites.get(member.id)
        return granted if own is None else granted & ~own.deny | own.allow

    # -- members

    def _member(self, viewer: Viewer, guild_id: int) -> Any:
        if not is_snowflake(viewer.discord_id):
            return None
        return self._cache.get_member(guild_id, hikari.Snowflake(viewer.discord_id))

    def _permissions(self, member: hikari.Member, guild: hikari.Guild) -> hikari.Permissions:
        """Guild-wide permissions (Discord documentation: Permissions, base permissions)."""
        if guild.owner_id == member.id:
            return ALL_PERMISSIONS
        granted = hikari.Permissions.NONE
        for role_id in {guild.id, *member.role_ids}:  # the guild's own id is @everyone
            role = self._cache.get_role(role_id)
            if role is not None:
                granted |= role.permissions
        if granted & hikari.Permissions.ADMINISTRATOR:
            return ALL_PERMISSIONS
        return granted


def without_timed_out(member: hikari.Member, granted: hikari.Permissions) -> hikari.Permissions:
    """What a time-out leaves of permissions, after all else (Discord documentation: Permissions)."""
    if granted == ALL_PERMISSIONS or not member.communication_disabled_until():
        return granted
    return granted & LEFT_IN_TIMEOUT


def is_snowflake(text: str) -> bool:
    """A Discord id as Discord writes it: 1 to 20 digits, the first of several not 0."""
    return 1 <= len(text) <= 20 and text.isascii() and text.isdigit() and text == str(int(text))


def clean_text(text: str) -> str:
    """`text` without control, bidi-override and zero-width characters and line separators."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char for char in text if unicodedata.category(char) not in UNSEEN)


# ------------------------------------------------------------------------------- limits
# How much of everything one address, one viewer and one connection may have. Counted with the
# library `limits`, so that the same rules can be counted for several machines together. It
# knows neither protocols nor tokens: it is asked before work is done, and told how it ended.

#: Addresses remembered at once; beyond it the one whose window began first is forgotten.
MOST_REMEMBERED: Final = 50_000
#: Told to clients that are one connection too many: nobody knows when one will be free.
RETRY_AFTER: Final = 10.0


#: A browser polls on one connection and sends on another.
CONNECTIONS_OF_A_POLLER: Final = 2
#: Seconds between two lines of the log on one address.
LOG_INTERVAL: Final = 60.0


class BoundedMemory(limits.aio.storage.Storage):
    """Counters with an expiry, in memory. The library's own walks all of its keys at every hit."""

    STORAGE_SCHEME = None

    def __init__(self) -> None:
        super().__init__()
        # In the order in which they began.
        self._counters: OrderedDict[str, tuple[int, float]] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        return LookupError

    def count(self, key: str, expiry: float, amount: int = 1) -> int:
        """What `incr` does, for those who cannot wait."""
        now = time.time()
        count, until = self._counters.get(key, (0, 0.0))
        if until <= now:
            self._counters.pop(key, None)
            self._forget_some(now)
            count, until = 0, now + expiry
        self._counters[key] = count + amount, until
        return count + amount

    def _forget_some(self, now: float) -> None:
        while self._counters:
            oldest = next(iter(self._counters))
            if len(self._counters) < MOST_REMEMBERED and self._counters[oldest][1] > now:
                return
            del self._counters[oldest]

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        return self.count(key, expiry, amount)

    async def get(self, key: str) -> int:
        count, until = self._counters.get(key, (0, 0.0))
        return count if until > time.time() else 0

    async def get_expiry(self, key: str) -> float:
        return self._counters.get(key, (0, time.time()))[1]

    async def check(self) -> bool:
        return True

    async def reset(self) -> int:
        count = len(self._counters)
        self._counters.clear()
        return count

    async def clear(self, key: str) -> None:
        self._counters.pop(key, None)


class Lobby:
    """Whoever has not authenticated yet: each for `patience` seconds, and no more than `capacity`.

    Beyond that the longest silent one is dropped, so that a proper client, which authenticates
    at once, always gets in. The same holds within what one address may have of it, its `share`.
    """

    def __init__(self, capacity: int, share: int, patience: float) -> None:
        self.reconfigure(capacity, share, patience)
        # Both with the longest silent one first; the deadlines with the first to come.
        self._waiting: OrderedDict[object, tuple[str, Callable[[str], None]]] = OrderedDict()
        self._of_address: dict[str, OrderedDict[object, None]] = {}
        self._deadlines: OrderedDict[object, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def reconfigure(self, capacity: int, share: int, patience: float) -> None:
        """For those who come from now on."""
        self._capacity = capacity
        self._share = share
        self._patience = patience

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, who: object) -> bool:
        return who in self._waiting

    def enter(self, who: object, drop: Callable[[str], None], address: str = "") -> None:
        """Let `who` wait; `drop(reason)` is called if it waits too long. No address, no share."""
        loop = asyncio.get_running_loop()
        self.leave(who)
        self._waiting[who] = address, drop
        self._deadlines[who] = loop.time() + self._patience
        neighbours: OrderedDict[object, None] = OrderedDict()
        if address:
            neighbours = self._of_address.setdefault(address, neighbours)
            neighbours[who] = None
        if len(neighbours) > self._share:
            self._drop_first(neighbours, "made room")
        elif len(self._waiting) > self._capacity:
            self._drop_first(self._waiting, "made room")
        if self._timer is None:
            self._timer = loop.call_later(self._patience, self._drop_late)

    def leave(self, who: object) -> None:
        """It has authenticated, or it is gone."""
        address, _ = self._waiting.pop(who, ("", None))
        self._deadlines.pop(who, None)
        if address:
            del self._of_address[address][who]
            if not self._of_address[address]:
                del self._of_address[address]

    def stir(self, who: object) -> None:
        """It has said something, so others are silent for longer; it has no more time for that."""
        if who in self._waiting:
            self._waiting.move_to_end(who)
            address, _ = self._waiting[who]
            if address:
                self._of_address[address].move_to_end(who)

    def _drop_first(self, waiting: Iterable[object], reason: str) -> None:
        who = next(iter(waiting))
        _, drop = self._waiting[who]
        self.leave(who)
        drop(reason)

    def _drop_late(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and self._first_deadline() <= loop.time():
            self._drop_first(self._deadlines, "not authenticated in time")
        self._timer = (
            loop.call_at(self._first_deadline(), self._drop_late) if self._waiting else None
        )

    def _first_deadline(self) -> float:
        return next(iter(self._deadlines.values()))


class OpenConnections(collections.Counter[str]):
    """How many connections are open in this process, by whose they are: an address's, a viewer's."""

    async def enter(self, whose: str) -> int:
        """Count one more; returns how many there were before, in other processes too."""
        self[whose] += 1
        return self[whose] - 1

    def leave(self, whose: str) -> None:
        """Count one fewer."""
        self[whose] -= 1
        if not self[whose]:
            del self[whose]


def viewer_name(discord_id: str) -> str:
    """Whose a viewer's connections are; no address looks like this."""
    return f"viewer/{discord_id}"


class Visit:
    """One connection as the limits see it, from its first packet to its last."""

    def __init__(
        self, limits: Limits, address: str, refusal: RefusedConnectionError | None
    ) -> None:
        self.address = address
        #: Why its CONNECT will be refused, if it will; the client learns it as `connect_error`.
        self.refusal = refusal
        self._limits = limits

    def log_once(self, what: str) -> bool:
        """Whether to log this of it."""
        return self._limits.log_once(self.address, what)

    def end(self) -> None:
        """Called once, when the connection is closed."""
        self._limits.lobby.leave(self)
        self._limits.open.leave(self.address)


class Limits:
    """What addresses and connections may do, and who is blocked."""

    def __init__(
        self,
        settings: LimitsSettings,
        patience: float,
        storage: limits.aio.storage.Storage,
        connections: OpenConnections,
        metrics: Metrics,
    ) -> None:
        self.lobby = Lobby(0, 0, patience)
        self._storage = storage
        self.metrics = metrics
        self.reconfigure(settings, patience)
        self._attempt_limiter = limits.aio.strategies.FixedWindowRateLimiter(storage)
        # What one connection does never leaves this process.
        self._event_limiter = limits.aio.strategies.FixedWindowRateLimiter(BoundedMemory())
        self._told = BoundedMemory()
        #: Connections open now, by address and, of those who have authenticated, by `viewer_name`.
        self.open = connections

    def reconfigure(self, settings: LimitsSettings, patience: float) -> None:
        """Count by these from now on; who is in already stays in."""
        self.settings = settings
        share = CONNECTIONS_OF_A_POLLER * settings.connections_per_ip
        self.lobby.reconfigure(settings.unauthenticated, share, patience)
        self._attempts = limits.parse(settings.attempts_per_ip)
        self._events = limits.parse(settings.events_per_connection)

    def expect(self, who: object, close: Callable[[], None], address: str = "") -> None:
        """Let a connection wait in the lobby; `close` is called if it waits too long."""

        def drop(reason: str) -> None:
            self.metrics.cut.labels(reason).inc()
            close()

        self.lobby.enter(who, drop, address)

    def log_once(self, address: str, what: str) -> bool:
        """Whether to log this of an address: a line a minute for each, however often it knocks."""
        return self._told.count(f"{address}/{what}", LOG_INTERVAL) == 1

    async def blocked_for(self, address: str) -> float:
        """Seconds that the address is still blocked; 0 if it is not."""
        key = f"blocked/{address}"
        if not await self._storage.get(key):
            return 0.0
        return max(1.0, await self._storage.get_expiry(key) - time.time())

    async def visit(self, address: str) -> Visit:
        """A new connection. One too many is let in far enough to be told so."""
        refusal = None
        if not await self._attempt_limiter.hit(self._attempts, address):
            window = await self._attempt_limiter.get_window_stats(self._attempts, address)
            refusal = too_many(max(1.0, window.reset_time - time.time()))
            await self.refused(address, refusal)
        before = await self.open.enter(address)
        if refusal is None and before >= self.settings.connections_per_ip:
            refusal = self.over("connections_per_ip")
        return Visit(self, address, refusal)

    async def refused(self, address: str, refusal: RefusedConnectionError) -> None:
        """An attempt was refused; enough of them in a row block the address."""
        self.metrics.refused.labels(refusal.data.get("code") or refusal.message).inc()
        key = f"refused/{address}"
        seconds = math.ceil(self.settings.block_for)
        if await self._storage.incr(key, seconds) >= self.settings.block_after:
            await self._storage.clear(key)
            await self._storage.incr(f"blocked/{address}", seconds)
            self.metrics.blocked.inc()
            log.warning("address %s blocked for %d s", address, seconds)

    async def let_try(self, visit: Visit) -> None:
        """Before a token is looked at; raises RefusedConnectionError where it makes no difference."""
        if visit.refusal is None and (seconds := await self.blocked_for(visit.address)):
            self.metrics.refused.labels("blocked").inc()
            visit.refusal = too_many(seconds)
        if visit.refusal is not None:
            raise visit.refusal

    async def accepted(self, address: str) -> None:
        """An attempt succeeded: refusals are counted from the beginning again."""
        await self._storage.clear(f"refused/{address}")

    async def enter(self, discord_id: str) -> None:
        """A viewer has one more connection; raises RefusedConnectionError if that is one too many."""
        whose = viewer_name(discord_id)
        if await self.open.enter(whose) >= self.settings.connections_per_viewer:
            self.open.leave(whose)
            raise self.over("connections_per_viewer")

    async def may_send(self, sid: str) -> bool:
        """Whether this connection may send one more event."""
        return await self._event_limiter.hit(self._events, sid)

    def over(self, limit: str) -> RefusedConnectionError:
        """The refusal of one connection too many; unlike a wrong token it leads to no block."""
        self.metrics.refused.labels(limit).inc()
        return too_many(RETRY_AFTER)


def too_many(retry_after: float) -> RefusedConnectionError:
    """`retryAfter` goes out in whole seconds."""
    return RefusedConnectionError("Too many connections", retryAfter=math.ceil(retry_after))


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


class Frame:
    """An Engine.IO packet, encoded once for all recipients: `bytes` is its WebSocket frame.

    Unmasked and final (RFC 6455 §5.2). Where python-engineio expects a packet, this is one.
    """

    __slots__ = ("bytes",)

    def __init__(self, payload: bytes, *, binary: bool = False) -> None:
        size, start = len(payload), b"\x82" if binary else b"\x81"
        if size < 126:
            self.bytes = start + size.to_bytes(1, "big") + payload
        elif size < 65_536:
            self.bytes = start + b"\x7e" + size.to_bytes(2, "big") + payload
        else:
            self.bytes = start + b"\x7f" + size.to_bytes(8, "big") + payload

    @classmethod
    def of(cls, packet: engineio_packet.Packet) -> Frame:
        encoded = packet.encode()
        return cls(encoded, binary=True) if packet.binary else cls(encoded.encode())

    def encode(self, b64: bool = False) -> str:
        """The packet as one part of a poll's body (Engine.IO protocol v4, HTTP long-polling)."""
        payload = self.bytes[{126: 4, 127: 10}.get(self.bytes[1], 2) :]
        return payload.decode() if self.bytes[0] == 0x81 else "b" + b64encode(payload).decode()


def event_packet(event: str, *arguments: object) -> bytes:
    """A Socket.IO EVENT in the main namespace, in its Engine.IO MESSAGE (protocols v5 and v4)."""
    return b"42" + msgspec.json.encode((event, *arguments))


def event_frame(event: str, *arguments: object) -> Frame:
    return Frame(event_packet(event, *arguments))


PING: Final = Frame(b"2")
NOOP: Final = Frame(b"6")
CLOSE: Final = Frame(b"1")
PROBED: Final = Frame(b"3probe")
MESSAGE: Final = "4"
PROBE: Final = "2probe"
UPGRADE: Final = "5"


class ConnectionLog(logging.LoggerAdapter[logging.Logger]):
    """Names the connection in each line, and as a field of its own for the JSON form."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        assert self.extra is not None
        return f"connection {self.extra['connection']}: {msg}", {**kwargs, "extra": self.extra}


class Direct:
    """What is read of a session for every event, in the object itself and not in its dict.

    With a thousand clients in turn, each further piece of memory is one more cache miss, and
    these add up to a tenth of what the system call takes.
    """

    __slots__ = ("_direct",)
    #: The socket while it may be written to without a look at its stream.
    _direct: socket.socket | None


class Session(engineio.async_socket.AsyncSocket, Direct):  # type: ignore[misc]  # python-engineio has no types
    """One Engine.IO session: polls are answered by python-engineio, a WebSocket is written to at once.

    While the client polls or upgrades, packets wait in `queue`; once its WebSocket is attached
    they go straight to the socket, and what the kernel does not take waits in Tornado's stream.
    Either way no more than `max_queue_bytes` wait, or the client is cut off.
    """

    upgrading: bool

    def __init__(self, engine: Engine, sid: str, visit: Visit) -> None:
        super().__init__(engine, sid)
        self.visit = visit
        #: Names the connection in the log; the Engine.IO id would let a reader take it over.
        self.log = ConnectionLog(log, {"connection": secrets.token_hex(4)})
        self.handler: WebSocketHandler | None = None
        self._stream: IOStream | None = None
        self._socket: socket.socket | None = None  # None under TLS: only its stream may write
        self._alone = True  # nobody but `write` writes to the stream
        self._direct = None
        self._poller: WebSocketHandler | None = None  # the latest poll
        self._polling = False  # it has no answer yet
        self.posting = False  # one POST is at work
        self._prober: WebSocketHandler | None = None
        self._waiting = 0  # bytes in the queue, and in the latest poll's answer
        self._answered = 0  # bytes in that answer
        self._lost = False
        self._ending = False  # closed as soon as a poll has fetched what waits
        self._awaits_pong = False
        self._timer: asyncio.TimerHandle | None = None

    # -- to the client

    async def send(self, pkt: engineio_packet.Packet) -> None:
        """What the libraries call for each packet."""
        frame = pkt if isinstance(pkt, Frame) else Frame.of(pkt)
        self.write((frame,), frame.bytes)

    def write(self, frames: Sequence[Frame], data: bytes) -> bool:
        """Send `frames`; `data` is their bytes joined. Never waits, never raises.

        Returns whether the client has been keeping up: nothing of it waits in this process.
        """
        direct, sent = self._direct or self._idle_socket(), 0
        try:
            if direct is not None and (sent := direct.send(data)) == len(data):
                return True  # IOStream.write costs three times as much as this system call
        except BlockingIOError:
            pass
        except OSError:
            self._lose()
            return True
        self._direct = None
        return self._write_later(frames, memoryview(data)[sent:])

    def _idle_socket(self) -> socket.socket | None:
        """The socket, if there is one and nothing waits to be written to it."""
        if self._lost or self._socket is None or self._stream is None or self._stream.writing():
            return None
        if self._alone:
            self._direct = self._socket
        return self._socket

    def share_stream(self) -> None:
        """Tornado writes to the stream as well: it has been asked for a pong."""
        self._alone, self._direct = False, None

    def _write_later(self, frames: Sequence[Frame], data: memoryview) -> bool:
        if self._lost or not data:
            return True
        if self._stream is None:
            self._enqueue(frames, len(data))
            return True
        try:
            write_within(self.server.max_queue_bytes, self._stream, data)
        except StreamBufferFullError:
            self.cut("too slow")
        except StreamClosedError:
            self._lose()
        return False

    def _enqueue(self, frames: Sequence[Frame], size: int) -> None:
        self._waiting += size
        if self._waiting > self.server.max_queue_bytes:
            self.cut("too slow")
            return
        for frame in frames:
            self.queue.put_nowait(frame)

    # -- polls

    async def handle_get_request(self, environ: dict[str, Any]) -> list[Frame]:
        """Answer a poll. Two at a time end the session, as they do in Node's: which is read first?"""
        if self._polling or (self._poller is not None and stream_of(self._poller).writing()):
            self.cut("overlapping polls")
            return []
        self._poller = environ["tornado.handler"]
        self._waiting -= self._answered  # the client asks for more: it has had that
        self._answered = 0
        self._polling = True
        try:
            packets: list[Frame] = await super().handle_get_request(environ)
        finally:
            self._polling = False
        return packets

    async def poll(self) -> list[Frame]:
        """All that waits for a polling client; returns once there is something."""
        packets: list[Frame] = await super().poll()
        self._answered = sum(len(packet.bytes) for packet in packets)
        if CLOSE in packets:
            self._lose()
        elif self._ending:  # next time: the stock client closes before it acts on the rest
            self.queue.put_nowait(CLOSE)
        return packets

    # -- from the client

    async def feed(self, message: str | bytes) -> None:
        """Take one Engine.IO packet; a malformed one ends the session, as it does in Node's."""
        if self._lost or (self._ending and message[:1] == MESSAGE):
            return
        try:
            await self.receive(engineio_packet.Packet(encoded_packet=message))
        except (ValueError, IndexError, engineio.exceptions.UnknownPacketError):
            self.cut("malformed packet")
        await asyncio.sleep(0)  # however much one client sends, the others have their turn

    async def handle_post_request(self, environ: dict[str, Any]) -> None:
        """Take the packets of one poll's POST, however many fit into `max_message_bytes`."""
        try:
            body = (await environ["wsgi.input"].read()).decode()
        except UnicodeDecodeError:
            self.cut("malformed packet")
            return
        for message in body.split("\x1e"):
            await self.feed(message)

    # -- the upgrade from polling (Engine.IO protocol v4, Upgrade): 2probe, 3probe, 5

    def begin_upgrade(self, handler: WebSocketHandler) -> None:
        """A WebSocket wants to take over from polling; one at a time."""
        if self._prober is not None or self.upgraded:
            handler.close()
        else:
            self._prober = handler

    def feed_probe(self, handler: WebSocketHandler, message: str | bytes) -> None:
        if handler is not self._prober:
            return
        if message == PROBE and not self.upgrading:
            self.upgrading = True  # polls are answered with NOOP from now on
            with contextlib.suppress(StreamClosedError):
                websocket_stream(handler).write(PROBED.bytes)
            self.queue.put_nowait(NOOP)  # ends the poll that waits
        elif message == UPGRADE and self.upgrading:
            self.attach(handler)
        else:
            handler.close()

    def attach(self, handler: WebSocketHandler) -> None:
        """From now on this WebSocket is the transport; what waited goes first."""
        self.connected = self.upgraded = True
        self.upgrading = False
        self.handler, self._prober, self._poller = handler, None, None
        self._stream = websocket_stream(handler)
        if not isinstance(self._stream, SSLIOStream):
            self._socket = self._stream.socket
        while not self.queue.empty():
            frame = self.queue.get_nowait()
            self.write((frame,), frame.bytes)
        if self._polling:
            self.queue.put_nowait(NOOP)  # a poll that still waits

    def detach(self, handler: WebSocketHandler) -> None:
        """This connection is gone: with it the session, or only the attempt to upgrade."""
        if handler is self.handler or (handler is self._poller and self._polling):
            self._lose()
        elif handler is self._prober:
            self._prober, self.upgrading = None, False

    # -- heartbeat: one timer, no task

    def schedule_ping(self) -> None:
        """Ping after the interval; the library calls this at the start and for each PONG."""
        if self._timer is not None and not self._awaits_pong:
            return  # a PONG that nobody asked for
        self._awaits_pong = False
        self._call_later(self.server.ping_interval, self._ping)

    def _ping(self) -> None:
        self._awaits_pong = True
        self.write((PING,), PING.bytes)
        self._call_later(self.server.ping_timeout, self._lose, self.server.reason.PING_TIMEOUT)

    def _call_later(self, seconds: float, call: Callable[..., None], *args: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, call, *args)

    # -- the end

    def end(self) -> None:
        """Close the transport once the client has had what was sent to it so far."""
        if self._stream is not None:
            self._lose(self.server.reason.SERVER_DISCONNECT)
        elif not self._ending:
            self._ending = True
            if self.queue.empty():
                self.queue.put_nowait(CLOSE)
            self._call_later(self.server.ending_timeout, self._lose)

    def cut(self, reason: str, level: int = logging.INFO) -> None:
        """Drop the client now, without waiting for it; the reason is logged and counted."""
        if self._lost:
            return
        if self.visit.log_once(reason):
            self.log.log(level, "%s cut off: %s", self.visit.address, reason)
        self.server.metrics.cut.labels(reason).inc()
        self._lose()
        if self._stream is not None:
            self._stream.close()
        elif self._poller is not None and not self._polling:
            stream_of(self._poller).close()  # an answer that nobody reads

    def _lose(self, reason: str | None = None) -> None:
        if not self._lost:
            self._lost, self._direct = True, None
            reason = reason or self.server.reason.TRANSPORT_CLOSE
            self.server.start_background_task(self.close, False, True, reason)

    async def close(
        self, wait: bool = True, abort: bool = False, reason: str | None = None
    ) -> None:
        """End the session and its transport; tells Socket.IO once."""
        if self.closed or self.closing:
            return
        self._lost, self._direct = True, None
        if self._timer is not None:
            self._timer.cancel()
        await super().close(wait=False, abort=True, reason=reason)
        self.server.sockets.pop(self.sid, None)
        self.visit.end()
        self.queue.put_nowait(CLOSE)  # for a poll that still waits
        for handler in (self.handler, self._prober):
            if handler is not None:
                close_gently(handler, self.server.ending_timeout)
        # What refers to each other stays in memory until the garbage collector comes by.
        self.handler = self._prober = self._poller = None
        self._stream = self._socket = self._timer = None


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
    """The Engine.IO server; its sessions are `Session`s."""

    #: Seconds that a client has to fetch its last packets or to close before it is forgotten.
    ending_timeout = 4.0

    def __init__(self, *, max_queue_bytes: int, metrics: Metrics, **options: Any) -> None:
        super().__init__(**options)
        self.max_queue_bytes = max_queue_bytes
        self.metrics = metrics

    async def admit(self, visit: Visit, transport: str) -> Session:
        """A new session, its OPEN packet already under way."""
        session = Session(self, self.generate_id(), visit)
        self.sockets[session.sid] = session
        hello = {
            "sid": session.sid,
            "upgrades": self._upgrades(session.sid, transport),
            "pingInterval": int(self.ping_interval * 1000),
            "pingTimeout": int(self.ping_timeout * 1000),
            "maxPayload": self.max_http_buffer_size,
        }
        await session.send(Frame(b"0" + msgspec.json.encode(hello)))
        await self._trigger_event("connect", session.sid, {}, run_async=False)
        session.schedule_ping()
        return session

    async def _handle_connect(
        self, environ: dict[str, Any], transport: str, jsonp_index: int | None = None
    ) -> Any:
        """A first poll, by the library's `handle_request`."""
        session: Session = await environ["tornado.handler"].admit(transport)
        session.connected = True
        return self._ok(await session.handle_get_request(environ), jsonp_index=jsonp_index)


class SocketIO(socketio.AsyncServer):  # type: ignore[misc]  # python-socketio has no types
    """The Socket.IO server. Bad packets end their session; `request` hears every client event."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
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

    async def _handle_connect(self, eio_sid: str, namespace: str, data: Any) -> None:
        """Stock python-socketio keeps for ever whose connect handler failed or outlived it."""
        namespace = namespace or NAMESPACE
        try:
            await super()._handle_connect(eio_sid, namespace, data)
        finally:
            sid = self.manager.sid_from_eio_sid(eio_sid, namespace)
            if self.manager.is_pre_connected(sid, namespace):
                await self.manager.disconnect(sid, namespace, ignore_queue=True)
            elif eio_sid not in self.eio.sockets:
                await self._handle_eio_disconnect(eio_sid, self.reason.TRANSPORT_CLOSE)

    async def _handle_event(self, eio_sid: str, namespace: str, ack: int, data: Any) -> None:
        """Stock python-socketio would let a client name any handler: "connect", "disconnect", "*"."""
        await super()._handle_event(eio_sid, namespace, ack, [REQUEST, data[0], *data[1:]])

    async def _trigger_event(self, event: str, namespace: str, *args: Any) -> Any:
        """Call a handler; what goes wrong in one is never a client's fault."""
        try:
            return await super()._trigger_event(event, namespace, *args)
        except SocketIORefusal:
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
    frame: Frame
    hidden: Hidden


class Outbox:
    """Room events on their way out.

    The first event of a burst leaves at once. What comes in the same turn of the loop is joined
    into one write per client, and after such a write its room rests in proportion to the cost,
    never over `max_delay`: so a flood shares writes and a single event is never held. Whatever
    rooms its events went to, each client gets them in the order in which they were sent.
    """

    def __init__(self, max_delay: float, deliveries: Counter) -> None:
        self._max_delay = max_delay
        self.max_write = MAX_WRITE_BYTES
        self._deliveries = deliveries
        self._numbers = itertools.count(1)
        self._busy: dict[Room, None] = {}  # those with something waiting, in order
        self._bytes = 0
        self._had: dict[Session, int] = {}  # up to which number who got ahead of its rooms

    @property
    def crowded(self) -> bool:
        """Whether a producer that can wait should give the loop a turn."""
        return self._bytes > self.max_write

    def send(self, room: Room, frame: Frame, hidden: Hidden) -> None:
        room.waiting.append(Outgoing(next(self._numbers), room, frame, hidden))
        self._busy[room] = None
        self._bytes += len(frame.bytes)
        if room.rest is None or self._bytes > MAX_BACKLOG_BYTES:
            self._flush(room)

    def catch_up(self, sid: Sid, session: Session) -> None:
        """Write now what one client is due, so that only later events find its rooms changed."""
        if not self._busy:
            return
        had = self._had.get(session, 0)
        due = [
            out.frame
            for out in in_order(room for room in self._busy if sid in room.members)
            if out.number > had and sid not in out.hidden
        ]
        if due:
            session.write(due, b"".join(frame.bytes for frame in due))
            self._deliveries.inc(len(due))
        self._had[session] = next(self._numbers)

    def forget(self, room: Room) -> None:
        """Drop what waits for a room that nobody is in any more."""
        self._bytes -= sum(len(out.frame.bytes) for out in room.waiting)
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
        """What waits for a room, up to `max_write` bytes and at least one event.

        Where a member is in another room for which something waits, all that waits comes along.
        """
        shared = any(
            not room.members.keys().isdisjoint(other.members)
            for other in self._busy
            if other is not room
        )
        batch: list[Outgoing] = []
        size = 0
        for out in in_order(self._busy if shared else [room]):
            size += len(out.frame.bytes)
            if batch and size > self.max_write:
                break
            batch.append(out)
        for out in batch:
            self._bytes -= len(out.frame.bytes)
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
    for (bits, number), audience in audiences(ways, had).items():
        due = [out for out in batch if ways[out.room, out.hidden] & bits and out.number > number]
        frames = [out.frame for out in due]
        data = b"".join([frame.bytes for frame in frames])
        written += len(frames) * len(audience)
        for session in audience:
            if session.write(frames, data):
                keeping_up += 1
            else:
                behind += 1
    return written, behind <= keeping_up


def audiences(
    ways: Mapping[tuple[Room, Hidden], int], had: Mapping[Session, int]
) -> Mapping[tuple[int, int], Collection[Session]]:
    """Who gets the same: the bits of the ways that reach them, and up to which number they `had`."""
    (room, hidden), bit = next(iter(ways.items()))
    if len(ways) == 1 and not hidden and not had:
        return {(bit, 0): room.members.values()}
    reached: dict[Session, int] = {}
    for (room, hidden), bit in ways.items():
        for sid, session in room.members.items():
            if sid not in hidden:
                reached[session] = reached.get(session, 0) | bit
    groups: dict[tuple[int, int], list[Session]] = {}
    for session, bits in reached.items():
        groups.setdefault((bits, had.get(session, 0)), []).append(session)
    return groups


class Rooms(socketio.AsyncManager):  # type: ignore[misc]  # python-socketio has no types
    """Who is in which room. May sit under a pub/sub manager: `emit` is local delivery.

    The stock manager keeps a two-way map per room and one more room per client, and walks all
    of them whenever a client leaves; this one knows each client's rooms.
    """

    def __init__(self, max_delay: float, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics
        self._outbox = Outbox(max_delay, metrics.deliveries)
        self._rooms: dict[str, Room] = {}
        self._rooms_of: dict[Sid, set[str]] = {}

    def __len__(self) -> int:
        return len(self._rooms)

    def set_server(self, server: SocketIO) -> None:
        super().set_server(server)
        self._outbox.max_write = min(MAX_WRITE_BYTES, server.eio.max_queue_bytes // 4)

    def members(self, room: str) -> tuple[Sid, ...]:
        """Who is in the room: the same tuple, not only an equal one, until that changes."""
        target = self._rooms.get(room)
        if target is None:
            return ()
        if target.sids is None:
            target.sids = tuple(target.members)
        return target.sids

    def listened(self, guild_id: str, kind: str) -> bool:
        """Whether anybody is in the room `kind:guild_id`."""
        return f"{kind}:{guild_id}" in self._rooms

    def names(self) -> Iterable[str]:
        """The rooms that anybody is in."""
        return tuple(self._rooms)

    def rooms_of(self, sid: Sid) -> frozenset[str]:
        return frozenset(self._rooms_of.get(sid, ()))

    def has_listeners(self, room: str) -> bool:
        """Whether anybody listens: where nobody does, no payload needs to be made."""
        return room in self._rooms

    def broadcast(
        self, room: str, event: str, payload: object, hidden: Callable[[], Hidden] | None = None
    ) -> None:
        """Send an event to all in a room but the `hidden`; costs nothing where nobody listens."""
        if self.has_listeners(room):
            self._metrics.sent.labels(event).inc()
            self.send(room, event_packet(event, payload), hidden)
        else:
            self._metrics.dropped.labels("nobody listens").inc()

    def send(self, room: str, packet: bytes, hidden: Callable[[], Hidden] | None = None) -> None:
        """`broadcast` of what is already encoded."""
        target = self._rooms.get(room)
        if target is not None:
            self._outbox.send(target, Frame(packet), hidden() if hidden else NOBODY)

    async def emit(
        self,
        event: str,
        data: Any,
        namespace: str,
        room: str | None = None,
        skip_sid: Any = None,
        callback: Any = None,
        to: str | None = None,
        **kwargs: Any,
    ) -> None:
        """What python-socketio and its pub/sub managers call; whole rooms take the short way."""
        room = to or room
        target = None
        if isinstance(room, str) and not self.is_sid_room(namespace, room):
            target = self._rooms.get(room) if namespace == NAMESPACE else None
            if target is None:
                return
        arguments = list(data) if isinstance(data, tuple) else [] if data is None else [data]
        binary = self.server.packet_class.data_is_binary(arguments)
        if target is None or callback is not None or binary:
            for sid, _ in self.get_participants(namespace, room):
                self._outbox.catch_up(sid, self.server.session_of(sid))
            await super().emit(event, data, namespace, room, skip_sid, callback, **kwargs)
            return
        skipped = [skip_sid] if isinstance(skip_sid, str) else skip_sid or ()
        self._outbox.send(target, event_frame(event, *arguments), frozenset(skipped))
        if self._outbox.crowded:
            await asyncio.sleep(0)

    async def leave_room(self, sid: Sid, namespace: str, room: str) -> None:
        """As a client wishes: it still gets what came before."""
        if room in self._rooms_of.get(sid, ()):
            self._outbox.catch_up(sid, self._rooms[room].members[sid])
        await super().leave_room(sid, namespace, room)

    def expel(self, sid: Sid, room: str) -> None:
        """Against its wish: not even what waits."""
        self.basic_leave_room(sid, NAMESPACE, room)

    def basic_enter_room(
        self, sid: Sid, namespace: str, room: str | None, eio_sid: str | None = None
    ) -> None:
        if room is None:
            super().basic_enter_room(sid, namespace, room, eio_sid)
        elif room != sid:
            session = self.server.session_of(sid)
            if session is not None:
                self._outbox.catch_up(sid, session)
                target = self._rooms.setdefault(room, Room())
                target.members[sid] = session
                target.sids = None
                self._rooms_of.setdefault(sid, set()).add(room)

    def basic_leave_room(self, sid: Sid, namespace: str, room: str | None) -> None:
        if room is None:
            super().basic_leave_room(sid, namespace, room)
            return
        self._rooms_of.get(sid, set()).discard(room)
        target = self._rooms.get(room)
        if target is not None:
            target.members.pop(sid, None)
            target.sids = None
            if not target.members:
                self._outbox.forget(target)
                del self._rooms[room]

    def basic_disconnect(self, sid: Sid, namespace: str, **kwargs: Any) -> None:
        for room in self._rooms_of.pop(sid, ()):
            self.basic_leave_room(sid, namespace, room)
        self.basic_leave_room(sid, namespace, None)
        self.callbacks.pop(sid, None)
        for pending in (self.pending_connect, self.pending_disconnect):
            if sid in pending.get(namespace, ()):
                pending[namespace].remove(sid)
                if not pending[namespace]:
                    del pending[namespace]

    def basic_close_room(self, room: str, namespace: str) -> None:
        for sid in self.members(room):
            self.basic_leave_room(sid, namespace, room)

    def get_rooms(self, sid: Sid, namespace: str) -> list[str]:
        return [sid, *self._rooms_of.get(sid, ())]

    def get_participants(self, namespace: str, room: Any) -> Iterator[tuple[Sid, str]]:
        everyone = self.rooms.get(namespace, {}).get(None, {})
        if room is None:
            sids: Iterable[Sid] = tuple(everyone)
        elif isinstance(room, str):
            sids = (room,) if room in everyone else self.members(room)
        else:
            sids = dict.fromkeys(sid for one in room for sid in self.members(one))
        for sid in sids:
            yield sid, everyone[sid]


# ----------------------------------------------------------------------------- throttle
# How often one event may go to one room of one guild: the first time at once, then once per
# window with the newest content, so that the last change is never lost. It knows names and
# seconds; what is sent, to whom and how is not its business.

#: The fields of an event.
EventData = dict[str, Any]
#: Hands what plugins have for a new subscriber, by kind of room and guild id, to a function of
#: event name and fields.
Greet = Callable[[str, str, Callable[[str, EventData], None]], Coroutine[Any, Any, None]]
#: The fields, or what makes them once they are really sent; None then sends nothing.
DataOrMaker = EventData | Callable[[], Awaitable[EventData | None]]
#: An event's name, a guild id, a kind of room.
Topic = tuple[str, str, str]


class Timer(Protocol):
    """What `call_later` gives back."""

    def cancel(self) -> None: ...


def call_later(seconds: float, callback: Callable[..., object], *args: object) -> Timer:
    """The clock of the running loop."""
    return asyncio.get_running_loop().call_later(seconds, callback, *args)


class Throttle:
    """Holds events back for as long as their window says; keeps only windows that are open.

    What nobody listens to is neither made nor held.
    """

    def __init__(
        self,
        windows: Mapping[str, float],
        send: Callable[[str, str, EventData, str], None],
        listened: Callable[[str, str], bool],
        metrics: Metrics,
        call_later: Callable[..., Timer] = call_later,
    ) -> None:
        #: Seconds by event; those without a row are not held. May be replaced at any time.
        self.windows = windows
        self._send = send
        self._listened = listened
        self._metrics = metrics
        self._call_later = call_later
        self._newest: dict[Topic, DataOrMaker | None] = {}  # what waits for the end of its window
        self._timers: dict[Topic, Timer] = {}
        self._making: set[asyncio.Task[None]] = set()
        self._closing = False
        #: Called whenever a topic's window opens or ends, or other content waits for that: with the
        #: seconds that the window stays open (None: as long as before) and what is still to be sent.
        self.on_change: Callable[[Topic, float | None, DataOrMaker | None], None] = lambda *change: (
            None
        )

    def __len__(self) -> int:
        """Windows open now."""
        return len(self._newest)

    def emit(self, event: str, guild_id: str, content: DataOrMaker, room: str) -> None:
        """Send now, or at the end of the window unless something newer comes. Never waits."""
        topic = event, guild_id, room
        if not self._listened(guild_id, room):
            if not callable(content):  # what is not made is no event
                self._metrics.dropped.labels("nobody listens").inc()
        elif topic in self._newest:
            self._metrics.throttled.labels(event).inc()
            self._newest[topic] = content
            self.on_change(topic, None, content)
        elif event in self.windows:
            self._open(topic, content)
        else:
            self._pass(topic, content, lambda topic: None)

    def resume(self, topic: Topic, seconds: float, waiting: DataOrMaker | None) -> None:
        """Go on with a window that another throttle opened: so long it is still open."""
        if topic not in self._newest:
            self._newest[topic] = waiting
            self._timers[topic] = self._call_later(seconds, self._end, topic)

    async def close(self) -> None:
        """Forget all that is held and end what is being made; `on_change` is not told of that."""
        self._closing = True
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)
        self._closing = False
        for timer in self._timers.values():
            timer.cancel()
        self._newest.clear()
        self._timers.clear()

    def _open(self, topic: Topic, content: DataOrMaker) -> None:
        """A window opens before its content is made, and lasts from when that was sent."""
        self._newest[topic] = None
        self.on_change(topic, 0.0, content)
        self._pass(topic, content, self._start)

    def _start(self, topic: Topic) -> None:
        seconds = self.windows.get(topic[0], 0.0)
        self._timers[topic] = self._call_later(seconds, self._end, topic)
        self.on_change(topic, seconds, self._newest[topic])

    def _end(self, topic: Topic) -> None:
        del self._timers[topic]
        content = self._newest.pop(topic)
        if content is not None and self._listened(topic[1], topic[2]):
            self._open(topic, content)
        else:
            self.on_change(topic, 0.0, None)

    def _pass(self, topic: Topic, content: DataOrMaker, then: Callable[[Topic], None]) -> None:
        if not callable(content):
            self._finish(topic, content, then)
            return
        task = asyncio.create_task(self._make(topic, content, then))
        self._making.add(task)
        task.add_done_callback(self._making.discard)

    async def _make(
        self,
        topic: Topic,
        make: Callable[[], Awaitable[EventData | None]],
        then: Callable[[Topic], None],
    ) -> None:
        fields = None
        try:
            fields = await make()
        finally:
            self._finish(topic, fields, then)

    def _finish(
        self, topic: Topic, fields: EventData | None, then: Callable[[Topic], None]
    ) -> None:
        if self._closing:
            return  # it is still to be sent, by whoever goes on with the window
        event, guild_id, room = topic
        if fields is not None:
            self._send(event, guild_id, fields, room)
        then(topic)


# --------------------------------------------------------------------------- plugin API
# The contract with plugin authors, and all of it: what is in `__all__` is API, the rest of
# this file is not. Decorators only mark functions; the plugin host acts on the marks.

#: What Discord puts in place of the name of a channel that the bot may not see.
HIDDEN_CHANNEL_NAME: Final = "___hidden___"
Maker = TypeVar("Maker", bound=Callable[..., Any])


class Payload(msgspec.Struct, rename="camel", kw_only=True):
    """Base of an event's fields: snake_case in Python, camelCase on the wire.

    The host adds `guildId` and, where the payload has none, `timestamp`. A payload with a
    `channel_id` reaches only viewers who may see that channel.
    """


#: A payload, or an async function that makes one (or None) when it is really sent.
PayloadOrMaker = Payload | dict[str, Any] | Callable[[], Awaitable[Payload | dict[str, Any] | None]]


class PluginSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base of a plugin's `class Settings`: the keys of its `[plugin.NAME]` table.

    Give each a type and a default; wrong values are refused at start with their key path.
    """


class Listener(msgspec.Struct, frozen=True):
    """The mark that `on` leaves on a function."""

    event_type: type[hikari.Event]
    emit: str | None
    room: str
    settled: bool


def on(
    event_type: type[hikari.Event],
    *,
    emit: str | None = None,
    room: str = "guild",
    settled: bool = False,
) -> Callable[[Maker], Maker]:
    """Call the function for each such hikari event, as `(event)` or `(event, spy)`.

    It may be plain or async. What it returns, a Payload or a dict, goes out as the Socket.IO
    event `emit` to the room `room:GUILD_ID` of `event.guild_id`; None sends nothing. With
    `settled`, nothing is sent within `[discord] startup_grace` of a new gateway session, while
    what looks like news is only Discord telling how things stand.
    """

    def mark(function: Maker) -> Maker:
        listeners = [
            *getattr(function, "__listeners__", ()),
            Listener(event_type, emit, room, settled),
        ]
        function.__listeners__ = listeners  # type: ignore[attr-defined]  # the mark itself
        return function

    return mark


def every(seconds: float) -> Callable[[Maker], Maker]:
    """Call the function, plain or async, with `(spy)`, again and again.

    First after `seconds`, then that long after each time it has ended. What it raises is logged
    and counted, and it goes on. Of several nodes (docs/scale.md) only the one that holds the
    gateway calls it: a plugin is at work there alone, from its `setup` to its `teardown`.
    """

    def mark(function: Maker) -> Maker:
        function.__every__ = float(seconds)  # type: ignore[attr-defined]  # the mark itself
        return function

    return mark


def on_subscribe(kind: str, *, emit: str) -> Callable[[Maker], Maker]:
    """Call the function, plain or async, with `(guild_id, spy)` when a client enters a room.

    The room is `kind:guild_id`. What is returned goes to that client alone, as the event `emit`,
    after the answer to its subscription; None sends nothing.
    """

    def mark(function: Maker) -> Maker:
        function.__greets__ = (kind, emit)  # type: ignore[attr-defined]  # the mark itself
        return function

    return mark


def clean_name(name: str) -> str:
    """A name as it may leave: no control, bidi or zero-width characters, 64 characters at most."""
    return clean_text(name).strip()[:64]


def member_name(cache: hikari.api.Cache, guild_id: int, user_id: int) -> str:
    """A member's username as it is now; the id while Discord has not sent the member.

    Asks for the member, not the user: hikari 2.7 drops users still cached as members once one of
    their messages leaves its cache.
    """
    member = cache.get_member(guild_id, user_id)
    return clean_name(member.username) if member else str(int(user_id))


def channel_name(cache: hikari.api.Cache, channel_id: int) -> str:
    """The name of a channel or thread; the id where Discord hides the name or has not sent it."""
    channel = cache.get_guild_channel(channel_id) or cache.get_thread(channel_id)
    name = clean_name(channel.name or "") if channel else ""
    return name if name and name != HIDDEN_CHANNEL_NAME else str(int(channel_id))


def timestamp(moment: datetime | None = None) -> str:
    """ISO 8601 in UTC with milliseconds and `Z`; now, unless a moment is given."""
    moment = moment or datetime.now(UTC)
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class News(NamedTuple):
    """What `Shared.write` has to tell."""

    #: Redis was restarted since the last write: what it had may be lost, what it lost may be back.
    restarted: bool
    #: (guild or None for all, member) that the command line has had forgotten in the last
    #: minutes, told once to each node that begins to hold the gateway. Their
    #: entries are removed; what else the plugin has of them is for it to remove.
    forgotten: list[tuple[int | None, int]]


class Shared(Protocol):
    """What a plugin keeps of members for all nodes of a service, in Redis.

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


class Spy:
    """What a plugin is handed: its settings, its log, the bot, and the way to the dashboards."""

    def __init__(
        self,
        name: str,
        settings: Any,
        bot: hikari.GatewayBot,
        storage: Path,
        emit: Callable[..., None],
        count: Callable[[str, float], None],
        failed: Callable[[], None],
    ) -> None:
        #: The `[plugin.NAME]` table: the plugin's `Settings`, or a dict if it has none.
        self.settings = settings
        #: A logger that names the plugin.
        self.log = logging.getLogger(f"spywatcher.plugin.{name}")
        #: hikari's bot: cache and REST.
        self.bot = bot
        #: The SQLite file of `[storage] path`, which the shipped plugin `analytics` keeps.
        self.storage = storage
        #: What all nodes keep together; None in a single process.
        self.shared: Shared | None = None
        self._emit = emit
        self._count = count
        self._failed = failed
        self._problem: str | None = None

    @property
    def data_dir(self) -> Path:
        """The folder for files that a plugin keeps: where `[storage] path` is."""
        return self.storage.parent

    def count(self, what: str, amount: float = 1) -> None:
        """Add to `spywatcher_plugin_counts_total{plugin, what}` in /metrics; few different `what`s."""
        self._count(what, amount)

    def emit(
        self, event: str, guild_id: int | str, payload: PayloadOrMaker, room: str = "guild"
    ) -> None:
        """Send an event to the room `room:guild_id`, as returning it from a listener does.

        Instead of a payload it may be an async function that makes it. That is called only when
        the event is really sent: not while nobody listens, and once per window of `[throttle]`.
        """
        self._emit(event, str(int(guild_id)), payload, room)

    @property
    def problem(self) -> str | None:
        """What keeps this plugin from its work, for the operator to read in /health/ready; or None.

        A change is logged, and each time that a problem is set it counts as a fault.
        """
        return self._problem

    @problem.setter
    def problem(self, text: str | None) -> None:
        if text is not None:
            self._failed()
        if text != self._problem:
            level = logging.INFO if text is None else logging.WARNING
            self.log.log(level, "%s", text or "all is well again")
        self._problem = text


# -------------------------------------------------------------------------- plugin host
# Finds, loads, starts, calls and stops plugins, and keeps one's faults from all others. It
# knows the marks of the plugin API; it knows no event, no socket and no room but by name.

MODULE_PREFIX: Final = "spywatcher_plugins."
#: Socket.IO's own names and the server's; clients could not tell a plugin's from these.
RESERVED_EVENTS: Final = frozenset(
    [
        "connect",
        "connect_error",
        "disconnect",
        "disconnecting",
        "error",
        "newListener",
        "removeListener",
        "auth:expiring",
        "auth:refresh",
    ]
)


class Plugin:
    """One loaded plugin: its module and what the module marked."""

    def __init__(self, name: str, module: ModuleType, table: dict[str, Any]) -> None:
        self.name = name
        self.module = module
        self.settings = self.check_settings(table)
        own = [
            function
            for function in vars(module).values()
            if getattr(function, "__module__", None) == module.__name__
        ]
        self.listeners = [
            (function, listener)
            for function in own
            for listener in getattr(function, "__listeners__", ())
        ]
        self.repeated = [
            (function, function.__every__) for function in own if hasattr(function, "__every__")
        ]
        self.greeters = [
            (function, *function.__greets__) for function in own if hasattr(function, "__greets__")
        ]
        self.events = {listener.emit for _, listener in self.listeners if listener.emit}
        self.events |= {event for _, _, event in self.greeters}
        self.kinds = {listener.room for _, listener in self.listeners if listener.emit}
        self.kinds |= {kind for _, kind, _ in self.greeters}
        reserved = self.events & RESERVED_EVENTS
        if reserved:
            raise PluginError(f"the event name {min(reserved)} is reserved")

    def check_settings(self, table: dict[str, Any]) -> Any:
        """The plugin's `[plugin.NAME]` table as it reads it; raises OperatorError."""
        form = vars(self.module).get("Settings")
        if form is None:
            return table
        faults: list[str] = []
        settings = check_table(table, form, f"plugin.{self.name}", faults)
        if faults:
            raise OperatorError(*faults)
        return settings


def plugin_folders(names: Sequence[str], folder: Path) -> list[Path]:
    """Where to look, an operator's own before the shipped ones of the same name.

    Raises OperatorError for a folder that is not there.
    """
    folders: list[Path] = []
    for name in names:
        places = [folder / name]
        if name == OWN_PLUGINS and (shipped := shipped_plugins()):
            places.append(shipped)
        found = [place for place in places if place.is_dir()]
        if not found:
            raise OperatorError(f"plugins.folders: {places[0]} is no folder")
        folders += found
    return folders


class HostContext(NamedTuple):
    """What one server gives all of its plugins to work with."""

    bot: hikari.GatewayBot
    #: The way to the rooms: event, guild id, content, kind of room.
    emit: Callable[[str, str, DataOrMaker, str], None]
    #: Whether the gateway session is past its startup grace.
    settled: Callable[[], bool]
    #: Whether a guild is one of those to be watched.
    watches: Callable[[str], bool]
    storage: Path
    #: What a plugin of this name keeps for all nodes; None where there is one.
    share: Callable[[str], Shared | None] = lambda name: None


class Runner:
    """One plugin at work: events, time and new subscribers reach it here; its faults go no further."""

    def __init__(
        self, plugin: Plugin, place: HostContext, claim: Callable[[str], None], metrics: Metrics
    ) -> None:
        self._plugin = plugin
        self._place = place
        self._claim = claim
        self._metrics = metrics
        self._subscriptions: list[tuple[type[hikari.Event], Any]] = []
        self._tasks: list[asyncio.Task[None]] = []
        failed = metrics.plugin_failures.labels(plugin.name).inc
        settings, storage = plugin.settings, place.storage
        self.spy = Spy(plugin.name, settings, place.bot, storage, self._emit, self._count, failed)
        self.spy.shared = place.share(plugin.name)

    async def start(self, count: Callable[[hikari.Event], None]) -> None:
        """Set the plugin up, which may raise anything, and let it hear; `count` sees each event."""
        await self._run_hook("setup")
        for function, listener in self._plugin.listeners:
            callback = self._callback(function, listener, count)
            self._place.bot.event_manager.subscribe(listener.event_type, callback)
            self._subscriptions.append((listener.event_type, callback))
        for function, seconds in self._plugin.repeated:
            self._tasks.append(asyncio.create_task(self._repeat(function, seconds)))

    async def stop(self) -> None:
        """Stop hearing events, and tear the plugin down."""
        for event_type, callback in self._subscriptions:
            self._place.bot.event_manager.unsubscribe(event_type, callback)
        left = set(self._tasks)
        while left:  # redis-py 8.1 may swallow a cancellation that meets an answer
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1.0)  # they may have to clean up
        with self._fence("teardown failed"):
            await self._run_hook("teardown")

    async def greet(self, kind: str, guild_id: str, tell: Callable[[str, EventData], None]) -> None:
        """`tell` a client that entered `kind:guild_id` what the plugin has for it, as it comes."""
        for function, greeted, event in self._plugin.greeters:
            if greeted == kind:
                make = functools.partial(function, guild_id, self.spy)
                fields = await self._make(event, guild_id, make)
                if fields is not None:
                    tell(event, fields)

    def _emit(self, event: str, guild_id: str, payload: PayloadOrMaker, room: str) -> None:
        self._claim(event)
        content: DataOrMaker
        if callable(payload):
            content = functools.partial(self._make, event, guild_id, payload)
        else:
            content = finish_payload(payload, guild_id)
        self._place.emit(event, guild_id, content, room)

    def _count(self, what: str, amount: float) -> None:
        self._metrics.plugin_counts.labels(self._plugin.name, what).inc(amount)

    async def _run_hook(self, name: str) -> None:
        hook = vars(self._plugin.module).get(name)
        if hook is not None:
            await hook(self.spy)

    @contextlib.contextmanager
    def _fence(self, what: str) -> Iterator[None]:
        """Whatever the plugin raises inside is logged and counted, and goes no further."""
        try:
            yield
        except Exception as error:  # nothing a plugin does may end the server
            report_fault(self._metrics, self._plugin.name, what, error)

    async def _repeat(self, function: Callable[..., Any], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            with self._fence(f"{function.__name__} failed"):
                result = function(self.spy)
                if inspect.isawaitable(result):
                    await result

    async def _make(self, event: str, guild_id: str, make: Callable[[], Any]) -> EventData | None:
        fields = None
        with self._fence(f"making {event} failed"):
            payload = make()
            if inspect.isawaitable(payload):
                payload = await payload
            if payload is not None:
                fields = finish_payload(payload, guild_id)
        return fields

    def _callback(
        self,
        function: Callable[..., Any],
        listener: Listener,
        count: Callable[[hikari.Event], None],
    ) -> Callable[[hikari.Event], Coroutine[Any, Any, None]]:
        """What hikari calls: the plugin's function, fenced in."""
        arguments = (self.spy,) if len(inspect.signature(function).parameters) > 1 else ()
        event_name = listener.event_type.__name__
        seconds = self._metrics.plugin_seconds.labels(self._plugin.name)

        async def callback(event: hikari.Event) -> None:
            guild_id = getattr(event, "guild_id", None)
            if guild_id is not None and not self._place.watches(str(int(guild_id))):
                return
            count(event)
            started = time.perf_counter()
            try:
                with self._fence(f"{function.__name__} failed on {event_name}"):
                    result = function(event, *arguments)
                    if inspect.isawaitable(result):
                        result = await result
                    if result is None or listener.emit is None:
                        return
                    if listener.settled and not self._place.settled():
                        self._metrics.dropped.labels("startup grace").inc()
                        return
                    self.spy.emit(listener.emit, guild_of(event), result, listener.room)
            finally:
                seconds.inc(time.perf_counter() - started)

        return callback


class PluginHost:
    """All plugins. One that fails to load, raises or breaks the contract is named; the rest go on."""

    def __init__(
        self,
        settings: PluginsSettings,
        tables: dict[str, dict[str, Any]],
        folder: Path,
        metrics: Metrics,
    ) -> None:
        self._folders = plugin_folders(settings.folders, folder)
        self._metrics = metrics
        self._disabled = frozenset(settings.disabled)
        self._tables = tables
        self._latest: dict[str, hikari.Event] = {}
        self.plugins: dict[str, Plugin] = {}
        self.running: dict[str, Runner] = {}
        self.failures: dict[str, BaseException] = {}

    # -- loading

    def load(self) -> None:
        """Load every plugin of the folders, in the order of their names.

        Raises OperatorError for a missing folder and for wrong `[plugin.NAME]` tables; a
        plugin that fails is in `failures` afterwards.
        """
        faults: list[str] = []
        found = self._find()
        for name, path in sorted(found.items()):
            try:
                self.plugins[name] = self._load(name, path)
            except OperatorError as error:
                faults += error.faults
            except (Exception, SystemExit) as error:  # nothing a plugin does may end the server
                self.failures[name] = error
                report_fault(self._metrics, name, f"not loaded: {error}", error)
        known = {*found, *self._disabled}
        faults += [
            f"plugin.{name}: no such plugin{nearest(name, sorted(known))}"
            for name in self._tables
            if name not in known
        ]
        if faults:
            raise OperatorError(*faults)

    def _find(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self._folders:
            for entry in sorted(folder.iterdir()):
                path = entry / "__init__.py" if entry.is_dir() else entry
                name = entry.name if entry.is_dir() else entry.stem
                usable = path.suffix == ".py" and path.is_file() and name[0] not in "_."
                if usable and name not in self._disabled:
                    found.setdefault(name, path)
        return found

    def _load(self, name: str, path: Path) -> Plugin:
        plugin = Plugin(name, load_module(name, path), self._tables.get(name, {}))
        for other in self.plugins.values():
            for event in sorted(plugin.events & other.events):
                raise PluginError(
                    f"plugins {other.name} and {name} both claim the event {event};"
                    f" disable one of them in [plugins] disabled"
                )
        return plugin

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of room that the plugins name."""
        return frozenset().union(*(plugin.kinds for plugin in self.plugins.values()))

    def event_types(self) -> dict[type[hikari.Event], list[str]]:
        """Which hikari events are listened to, and by which plugins."""
        wanted: dict[type[hikari.Event], list[str]] = {}
        for plugin in self.plugins.values():
            for _, listener in plugin.listeners:
                wanted.setdefault(listener.event_type, []).append(plugin.name)
        return wanted

    # -- running

    async def start(self, place: HostContext) -> None:
        """Set up each plugin and let it hear hikari's events.

        One that cannot be set up is left out; of several nodes, until the gateway comes here again.
        """
        for name, plugin in list(self.plugins.items()):
            claim = functools.partial(self._claim, plugin)
            runner = Runner(plugin, place, claim, self._metrics)
            try:
                await runner.start(self._count)
            except Exception as error:  # as in load
                self.failures[name] = error
                if runner.spy.shared is None:
                    del self.plugins[name]
                report_fault(self._metrics, name, "setup failed", error)
            else:
                self.running[name] = runner

    async def stop(self) -> None:
        """Stop hearing events and tear the plugins down."""
        while self.running:
            _, runner = self.running.popitem()
            await runner.stop()
        for name in self.plugins:
            self.failures.pop(name, None)  # it is not to be at work here now

    async def greet(self, kind: str, guild_id: str, tell: Callable[[str, EventData], None]) -> None:
        """`tell` a client that entered `kind:guild_id` what plugins have for it, as it comes."""
        running = self.running.values()
        await asyncio.gather(*(runner.greet(kind, guild_id, tell) for runner in running))

    def _count(self, event: hikari.Event) -> None:
        """Once per event: its listeners are called one after the other, with the same object."""
        kind = type(event).__name__
        if self._latest.get(kind) is not event:
            self._latest[kind] = event
            self._metrics.received.labels(kind).inc()

    def health(self) -> dict[str, Any]:
        """What runs and what does not, for /health/ready."""
        problems = dict.fromkeys(self.failures, "failed to start, see the log")
        spies = {name: runner.spy for name, runner in self.running.items()}
        problems |= {name: spy.problem for name, spy in spies.items() if spy.problem}
        said = "; ".join(f"{name}: {problem}" for name, problem in sorted(problems.items()))
        return {"problem": said or None, "loaded": sorted(self.plugins), "failed": sorted(problems)}

    # -- live settings

    def check(self, tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The settings of each plugin as of these tables; raises OperatorError."""
        faults: list[str] = []
        checked = {}
        for name, plugin in self.plugins.items():
            try:
                checked[name] = plugin.check_settings(tables.get(name, {}))
            except OperatorError as error:
                faults += error.faults
        if faults:
            raise OperatorError(*faults)
        return checked

    def reconfigure(self, checked: dict[str, Any]) -> None:
        """From now on each plugin reads these in `spy.settings`."""
        for name, settings in checked.items():
            self.plugins[name].settings = settings
            if name in self.running:
                self.running[name].spy.settings = settings

    def _claim(self, plugin: Plugin, event: str) -> None:
        if event in plugin.events:
            return
        owner = next((other for other in self.plugins.values() if event in other.events), None)
        if owner is not None or event in RESERVED_EVENTS:
            whose = f"belongs to plugin {owner.name}" if owner else "is reserved"
            raise PluginError(f"plugin {plugin.name} may not emit {event}, which {whose}")
        plugin.events.add(event)


def forget_member(
    plugins: Iterable[Plugin], storage: Path, member_id: int, guild_id: int | None
) -> dict[str, int]:
    """Have each plugin that keeps anything of a member remove it; how much, by plugin.

    None of them needs to be at work: a server that runs meanwhile is another process. Raises
    OperatorError when a plugin could not.
    """
    removed = {}
    for plugin in plugins:
        hook = vars(plugin.module).get("forget")
        if hook is not None:
            try:
                removed[plugin.name] = int(hook(storage, member_id, guild_id))
            except Exception as error:  # as in PluginHost.load
                raise OperatorError(f"plugin {plugin.name} could not forget: {error}") from error
    return removed


def report_fault(metrics: Metrics, name: str, what: str, error: BaseException) -> None:
    """Count and log a plugin's fault."""
    metrics.plugin_failures.labels(name).inc()
    log.error("plugin %s: %s", name, what, exc_info=traceback_of(error))


def load_module(name: str, path: Path) -> ModuleType:
    """Run a plugin's file as a fresh module, under a name that no other module can have."""
    full_name = MODULE_PREFIX + name
    locations = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(
        full_name, path, submodule_search_locations=locations
    )
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module  # dataclasses and postponed annotations look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module


def guild_of(event: hikari.Event) -> int:
    guild_id = getattr(event, "guild_id", None)
    if guild_id is None:
        raise PluginError(f"{type(event).__name__} has no guild_id, so it cannot be emitted")
    return int(guild_id)


def finish_payload(payload: Payload | dict[str, Any], guild_id: str) -> dict[str, Any]:
    """The fields as they go out: `guildId` added, and `timestamp` where it is missing."""
    fields = msgspec.to_builtins(payload, str_keys=True)
    if not isinstance(fields, dict):
        raise PluginError(f"a payload must be a Payload or a dict, not {type(payload).__name__}")
    fields["guildId"] = guild_id
    fields.setdefault("timestamp", timestamp())
    return fields


def traceback_of(error: BaseException) -> BaseException | None:
    """Our own refusals say all in one line; a plugin author needs the traceback of theirs."""
    return None if isinstance(error, SpyWatcherError) else error


# ------------------------------------------------------------------------------ gateway
# The session with Discord: hikari's bot, kept alive in this process's loop. It reports how
# things stand and says once what changed; it knows neither plugins' functions nor clients.

FIRST_RETRY: Final = 1.0
LAST_RETRY: Final = 60.0
PORTAL: Final = "https://discord.com/developers/applications -> your application -> Bot"
PRIVILEGED_SWITCHES: Final = {
    hikari.Intents.GUILD_MEMBERS: "Server Members Intent",
    hikari.Intents.GUILD_PRESENCES: "Presence Intent",
    hikari.Intents.MESSAGE_CONTENT: "Message Content Intent",
}
#: What access and names are answered from. Nothing of what people write is ever kept.
CACHED: Final = (
    hikari.api.CacheComponents.GUILDS
    | hikari.api.CacheComponents.GUILD_CHANNELS
    | hikari.api.CacheComponents.GUILD_THREADS
    | hikari.api.CacheComponents.MEMBERS
    | hikari.api.CacheComponents.ROLES
    | hikari.api.CacheComponents.PRESENCES
    | hikari.api.CacheComponents.ME
)


def intents_for(event_types: Iterable[type[hikari.Event]]) -> hikari.Intents:
    """The least intents that bring these events from guilds (Discord documentation: Gateway Intents)."""
    intents = hikari.Intents.GUILDS
    for event_type in event_types:
        choices = base_events.get_required_intents_for(event_type)
        in_guilds = [choice for choice in choices if not choice & hikari.Intents.ALL_DMS]
        for choice in sorted(in_guilds or choices, key=int)[:1]:
            intents |= choice
    return intents


class Gateway:
    """Keeps one bot connected to Discord, and says so in the log whenever that changes."""

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
    ) -> None:
        self._metrics = metrics
        self._turned = time.monotonic()
        self._why_away = "connecting"
        self._grace = settings.startup_grace
        self._wanted = wanted
        self._fresh_since = float("-inf")
        self.connected = False
        self._reported_away = False
        self.intents = intents_for(wanted)
        try:
            self.bot = hikari.GatewayBot(
                token,
                rest_url=settings.rest_url,
                intents=self.intents,
                cache_settings=hikari.impl.CacheSettings(components=CACHED),
                suppress_optimization_warning=True,
                banner=None,
                logs=None,
            )
        except ValueError as error:
            raise OperatorError(
                f"discord.token: got what is no bot token, expected the one from {PORTAL}"
            ) from error
        self.bot.event_manager.subscribe(hikari.ShardReadyEvent, self._on_ready)
        self.bot.event_manager.subscribe(hikari.ShardResumedEvent, self._on_resumed)
        self.bot.event_manager.subscribe(hikari.ShardDisconnectedEvent, self._on_disconnected)

    def settled(self) -> bool:
        """Whether the gateway session is older than the startup grace."""
        return time.monotonic() - self._fresh_since >= self._grace

    async def run(self) -> None:
        """Stay connected until cancelled; raises UpstreamError once Discord refuses us for good."""
        delays = itertools.chain([FIRST_RETRY], self._growing_delays())
        try:
            while True:
                try:
                    await self._turning(self.bot.start(check_for_updates=False))
                    delays = itertools.chain([FIRST_RETRY], self._growing_delays())
                    await self._turning(self.bot.join())
                except hikari.HikariError as error:
                    self._refuse_if_final(error)
                    self._away(str(error))
                except (OSError, RuntimeError, TimeoutError) as error:
                    self._away(str(error) or type(error).__name__)
                await self._close()
                await self._turning(asyncio.sleep(next(delays)))
        finally:
            self._reported_away = True  # the end is no news
            await self._close()

    async def _turning(self, step: Coroutine[Any, Any, None]) -> None:
        """Wait for a step that may take any time, and note meanwhile that this still runs."""
        task = asyncio.create_task(step)
        try:
            while not task.done():
                self._turned = time.monotonic()
                await asyncio.wait([task], timeout=self.turn_limit / 4)
            task.result()
        except asyncio.CancelledError:
            self._reported_away = True  # see `run`: the step may still end with a report
            raise
        finally:
            self._turned = time.monotonic()
            task.cancel()  # hikari 2.7 may swallow that as it gets ready: then it just ends
            await asyncio.wait([task])

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
        return len(self.bot.cache.get_guilds_view())

    def health(self) -> dict[str, Any]:
        """How the link to Discord stands, for /health/ready."""
        problem = None
        if not self.connected:
            problem = f"not connected to Discord ({self._why_away})"
        elif self.silence > self.silence_limit:
            problem = f"Discord has not answered for {self.silence:.0f} s"
        return {
            "problem": problem,
            "connected": self.connected,
            "heartbeatAge": finite(self.silence),
            "latency": finite(self.latency),
            "guilds": self.guilds,
        }

    @staticmethod
    def _growing_delays() -> Iterator[float]:
        delay = FIRST_RETRY
        while True:
            delay = min(delay * 2, LAST_RETRY)
            yield delay

    async def _close(self) -> None:
        self.connected = False
        if self.bot.is_alive:
            await self.bot.close()

    def _refuse_if_final(self, error: hikari.HikariError) -> None:
        code = getattr(error, "code", None)
        if isinstance(error, hikari.UnauthorizedError) or code == 4004:
            raise UpstreamError(
                f"Discord refused the bot token: reset it at {PORTAL} -> Reset Token"
                " and put the new one into [discord] token"
            ) from error
        if code == 4014:
            switches = " and ".join(
                f"{switch} (for {', '.join(self._wanted_by(intent))})"
                for intent, switch in PRIVILEGED_SWITCHES.items()
                if intent & self.intents
            )
            raise UpstreamError(
                f"Discord refused the intents: switch on {switches} at {PORTAL}"
                " -> Privileged Gateway Intents"
            ) from error

    def _wanted_by(self, intent: hikari.Intents) -> list[str]:
        plugins = [
            plugin
            for event_type, names in self._wanted.items()
            if intents_for([event_type]) & intent
            for plugin in names
        ]
        return sorted(set(plugins))

    async def _on_ready(self, event: hikari.ShardReadyEvent) -> None:
        self._fresh_since = time.monotonic()
        self._metrics.gateway_changes.labels("new session").inc()
        self._back(f"a new session, guilds: {len(event.unavailable_guilds)}")

    async def _on_resumed(self, event: hikari.ShardResumedEvent) -> None:
        self._metrics.gateway_changes.labels("resumed").inc()
        self._back("session resumed, nothing missed")

    async def _on_disconnected(self, event: hikari.ShardDisconnectedEvent) -> None:
        self._away("the connection was lost")

    def _back(self, how: str) -> None:
        self.connected, self._reported_away = True, False
        log.info("connected to Discord: %s", how)

    def _away(self, why: str) -> None:
        self.connected = False
        self._why_away = why
        if not self._reported_away:
            self._reported_away = True
            self._metrics.gateway_changes.labels("lost").inc()
            log.warning("not connected to Discord (%s); dashboards stay up, trying again", why)


def finite(number: float) -> float | None:
    """JSON has no NaN."""
    return round(number, 3) if math.isfinite(number) else None


# ------------------------------------------------------------------------- web handlers
# The Tornado side of Socket.IO: which requests get through, and the bytes of a WebSocket
# handed to its session. Bounds and refusals come before any work.


#: Headers of a request, together: a browser's are below 4 KiB.
MAX_HEADER_BYTES: Final = 16_384
#: A buffer of so many bytes is made and zeroed for every read; clients send little at a time.
READ_BYTES: Final = 8_192
SOCKET_PATH: Final = "/socket.io/"


class Origins:
    """Which pages may connect: the same host, or one that is listed; "https://*.host" is any below."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._any = "*" in patterns
        self._exact = frozenset(map(str.lower, patterns))
        self._below = tuple(
            tuple(pattern.split("*", 1)) for pattern in self._exact if "://*." in pattern
        )

    def allow(self, origin: str | None, host: str) -> bool:
        """`origin` and `host` as in the request's headers (RFC 6454; absent outside of browsers)."""
        if origin is None or self._any:
            return True
        origin = origin.lower()
        scheme, _, rest = origin.partition("://")
        if origin in self._exact or (scheme in ("http", "https") and rest == host.lower()):
            return True
        return any(origin.startswith(start) and origin.endswith(end) for start, end in self._below)


#: Headers by which a request shows that a proxy passed it on.
PASSED_ON: Final = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip")


class OperatorNetworks:
    """Who may read what is the operator's alone: this host itself, and who is listed.

    The address is the one that the kernel names, never one from a header. A reverse proxy on this
    host has a local address too while it speaks for the whole world: what it passed on shows by
    its headers or by a `Host` that is no local one, and gets in only if that address is listed.
    """

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(text) for text in networks]

    def include(self, request: HTTPServerRequest) -> bool:
        peer = parse_address(request.remote_ip or "")
        if peer is None:
            return False
        if any(peer in network for network in self._networks):
            return True
        passed_on = any(name in request.headers for name in PASSED_ON)
        return peer.is_loopback and not passed_on and is_local(request.host_name)


def is_local(host: str) -> bool:
    """Whether a `Host` header, without its port, names the loopback."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class FrontDoor:
    """What is decided about a request before anything is spent on it."""

    def __init__(self, settings: ServerSettings, limits: Limits) -> None:
        self.limits = limits
        self.reconfigure(settings)

    def reconfigure(self, settings: ServerSettings) -> None:
        self.origins = Origins(settings.cors_origins)
        self.operators = OperatorNetworks(settings.metrics_from)
        self._proxies = [ipaddress.ip_network(text) for text in settings.trusted_proxies]

    def address(self, request: HTTPServerRequest) -> str:
        """Whom a request counts for: its peer or, of a trusted proxy, the right-most hop that is none."""
        hops = ",".join(request.headers.get_list("X-Forwarded-For")).split(",")
        client = parse_address(request.remote_ip or "")
        while hops and client is not None and self._is_proxy(client):
            hop = parse_address(hops.pop().strip())
            if hop is None:
                break
            client = hop
        return address_key(client) if client is not None else "unknown"

    def peer(self, text: str) -> str:
        """Whom a connection counts for before it says a word; of a proxy, nobody."""
        client = parse_address(text)
        return "" if client is None or self._is_proxy(client) else address_key(client)

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


def address_key(address: Address) -> str:
    """What is counted as one address: of IPv6 the /64, since every household has one."""
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class SocketHandler(WebSocketHandler):
    """One request of a Socket.IO client: a poll, or its WebSocket."""

    def initialize(self, engine: Engine, door: FrontDoor) -> None:
        self._engine = engine
        self._door = door
        self._address = door.address(self.request)
        self._sid = parse_sid(self.request)
        self._session: Session | None = None

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Cache-Control", "no-store")

    async def prepare(self) -> None:
        """Turn away blocked addresses and foreign pages."""
        self._settle()
        session = self._engine.sockets.get(self._sid)
        origin = self.request.headers.get("Origin")
        if session is None and (seconds := await self._door.limits.blocked_for(self._address)):
            self.set_header("Retry-After", str(math.ceil(seconds)))
            self._refuse(429, "blocked", "Too many refused attempts")
        elif not self._door.origins.allow(origin, self.request.host):
            self._refuse(403, "origin", "This origin is not allowed")
        elif origin is not None:
            self.set_header("Access-Control-Allow-Origin", origin)
            self.set_header("Access-Control-Allow-Credentials", "true")
            self.set_header("Vary", "Origin")

    def on_finish(self) -> None:
        self._settle()

    def _settle(self) -> None:
        """A connection is a stranger's until a request on it belongs to who has authenticated."""
        limits, connection = self._door.limits, self.request.connection
        stream: IOStream | None = getattr(connection, "stream", None)  # None: a WebSocket has it
        session = self._engine.sockets.get(self._sid)
        if session is not None and session.visit not in limits.lobby:
            limits.lobby.leave(stream)
            return
        if stream is not None and stream not in limits.lobby:
            limits.expect(stream, stream.close)
        for who in (stream, session and session.visit):
            limits.lobby.stir(who)

    async def admit(self, transport: str) -> Session:
        """A new session for this request, which has to authenticate in time."""
        limits = self._door.limits
        visit = await limits.visit(self._address)
        session = await self._engine.admit(visit, transport)
        # Strangers come by the thousand: metrics count them, the log is for what was somebody's.
        limits.lobby.enter(visit, functools.partial(session.cut, level=logging.DEBUG))
        return session

    def check_origin(self, origin: str) -> bool:
        return True  # `prepare` has done it, for polls too

    def check_xsrf_cookie(self) -> None:
        """There are no cookies to forge with."""

    async def get(self, *args: Any, **kwargs: Any) -> None:
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            self._session = self._engine.sockets.get(self._sid)
            await self._engine.handle_request(self)
        elif fault := self._websocket_fault():
            self._refuse(400, "handshake", fault)
        else:
            await super().get(*args, **kwargs)

    async def post(self) -> None:
        """Two at a time end the session, as they do in Node's: which is to be taken first?"""
        session = self._engine.sockets.get(self._sid)
        if session is None or session.posting:
            if session is not None:
                session.cut("overlapping posts")
            self._refuse(400, "handshake", "Unknown session")
            return
        session.posting = True
        try:
            await self._engine.handle_request(self)
        finally:
            session.posting = False

    def options(self) -> None:
        """CORS preflight (Fetch standard)."""
        self.set_header("Access-Control-Allow-Methods", "GET, POST")
        self.set_header("Access-Control-Allow-Headers", "Content-Type")
        self.set_status(204)

    def _websocket_fault(self) -> str | None:
        sid = self._sid
        session = self._engine.sockets.get(sid)
        if "websocket" not in self._engine.transports:
            return "The websocket transport is switched off"
        if self.get_query_argument("transport", "") != "websocket":
            return "Invalid transport"
        if self.get_query_argument("EIO", "") != "4":
            return "Unsupported protocol version"
        if sid is not None and (session is None or session.upgraded or session.closed):
            return "Unknown session"
        return None

    def _refuse(self, status: int, reason: str, message: str) -> None:
        self._engine.metrics.refused.labels(reason).inc()
        if self._door.limits.log_once(self._address, reason):
            log.info("%s refused: %s", self._address, message)
        self.set_status(status)
        self.finish({"message": message})

    async def open(self, *args: str, **kwargs: str) -> None:
        limits = self._door.limits
        # Until it is a session's, nothing that Tornado writes by itself may pile up either.
        stream = websocket_stream(self)
        stream.max_write_buffer_size = self._engine.max_queue_bytes
        if self._sid is None:
            limits.expect(self, stream.close)
            session = await self.admit("websocket")
            limits.lobby.leave(self)
            if self.ws_connection is None:
                session.cut("gone")  # while the limits were asked
            else:
                self._session = session
                session.attach(self)
        elif self._sid in self._engine.sockets:
            self._session = self._engine.sockets[self._sid]
            self._session.begin_upgrade(self)
            limits.expect(self, stream.close)
        else:
            self.close()

    async def on_message(self, message: str | bytes) -> None:
        session = self._session
        if session is None or session.closed:
            return
        if session.handler is self:
            await session.feed(message)
        else:
            session.feed_probe(self, message)
            if session.handler is self:
                self._door.limits.lobby.leave(self)

    def on_ping(self, data: bytes) -> None:
        if self._session is not None:
            self._session.share_stream()

    def on_close(self) -> None:
        self._door.limits.lobby.leave(self)
        if self._session is not None:
            self._session.detach(self)
            self._session = None

    def log_exception(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Only what is not the client's fault; `_refuse` and Tornado have answered the rest."""
        if not isinstance(error, HTTPError | StreamClosedError | StreamBufferFullError):
            log.error("%s %s failed", self.request.method, self.request.path, exc_info=error)


def parse_sid(request: HTTPServerRequest) -> str | None:
    """The session that a request names, as python-engineio reads it."""
    sids = request.query_arguments.get("sid")
    return sids[0].decode("utf-8", "replace") if sids else None


class OperatorHandler(RequestHandler):
    """Base of what is there for operators and their tools; `read` gets what a GET is answered with."""

    def initialize(self, door: FrontDoor, read: Callable[[], Any] = dict) -> None:
        self.inside = door.operators.include(self.request)
        self.read = read

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Cache-Control", "no-store")


class LiveHandler(OperatorHandler):
    """Whether the process answers at all."""

    def get(self) -> None:
        self.finish({"status": "live"})


class ReadyHandler(OperatorHandler):
    """Whether it does its work: 200, or 503 and which part does not; only insiders read why."""

    def get(self) -> None:
        parts = {name: {"ok": not p["problem"], **p} for name, p in self.read().items()}
        ready = all(part["ok"] for part in parts.values())
        if not self.inside:
            parts = {name: {"ok": part["ok"]} for name, part in parts.items()}
        self.set_status(200 if ready else 503)
        self.finish({"status": "ready" if ready else "not ready", "parts": parts})


class MetricsHandler(OperatorHandler):
    """All figures, for Prometheus; insiders only."""

    def get(self) -> None:
        if self.inside:
            self.set_header("Content-Type", CONTENT_TYPE_LATEST)
            self.finish(self.read())
        else:
            self.set_status(403)
            self.finish({"message": "Only for this host and for [server] metrics_from"})


class PromiseHandler(RequestHandler):
    """A node that has lost Redis asks whether this one has, too (see `Lease.promise`)."""

    def initialize(self, secret: str, promise: Callable[[], bool]) -> None:
        self._secret = secret
        self._promise = promise

    def post(self, secret: str) -> None:
        known = secrets.compare_digest(secret, self._secret)
        self.set_status(200 if known and self._promise() else 404)


class NotFoundHandler(RequestHandler):
    """Everything that is not served."""

    def set_default_headers(self) -> None:
        self.clear_header("Server")

    def prepare(self) -> None:
        self.set_status(404)
        self.finish({"message": "Not found"})


class Site(Application):
    """All that is served. Who is served waits in no lobby meanwhile, but for `SocketHandler`'s."""

    limits: Limits

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        if request.path != SOCKET_PATH:
            self.limits.lobby.leave(getattr(request.connection, "stream", None))
        return super().find_handler(request, **kwargs)

    def log_request(self, handler: RequestHandler) -> None:
        """Called when a request is done with; nothing is logged."""
        stream = getattr(handler.request.connection, "stream", None)
        if handler.request.path != SOCKET_PATH and stream is not None:
            self.limits.expect(stream, stream.close)


class WebServer(HTTPServer):
    """Tornado's, with TCP_NODELAY (without it two small writes in a row stall for 40 ms), an end
    for clients that take nothing, and a lobby for connections that have not sent a whole request yet.
    """

    #: Set by whoever makes the server: Tornado's has no constructor of its own to extend.
    door: FrontDoor
    #: Seconds that a client may leave what it is sent unread or unacknowledged.
    patience: float

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        with contextlib.suppress(OSError, StreamClosedError):  # it may have gone already
            stream.set_nodelay(True)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: tcp(7)
                milliseconds = math.ceil(self.patience * 1000)
                stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        peer = self.door.peer(address[0]) if address else ""
        self.door.limits.expect(stream, stream.close, peer)
        super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        self.door.limits.lobby.leave(server_conn.stream)
        super().on_close(server_conn)


# ------------------------------------------------------------------------------- server
# Puts the parts together. This section and the command line are the only ones that know
# them all: the dashboards' requests, the way of an event to its room, start and stop.

EVENT_SHOWN: Final = 40
#: Seconds before a token ends that its dashboard is warned (design: identity and access).
EXPIRY_WARNING: Final = 60.0
#: Seconds that a subscription waits for guilds that Discord is still sending.
SUBSCRIBE_PATIENCE: Final = 5.0


class Dashboard:
    """One connected dashboard: whose it is, and its transport."""

    def __init__(self, viewer: Viewer, session: Session) -> None:
        self.viewer = viewer
        self.session = session
        self.expiry: asyncio.TimerHandle | None = None

    def tell(self, event: str, payload: object) -> None:
        frame = event_frame(event, payload)
        self.session.write((frame,), frame.bytes)


class Dashboards:
    """Answers what dashboards say: who comes in, and what they subscribe to (design: identity, rooms)."""

    def __init__(
        self,
        sio: SocketIO,
        rooms: Rooms,
        tokens: Tokens,
        access: Access,
        limits: Limits,
        plugins: PluginHost,
    ) -> None:
        self._sio = sio
        self._rooms = rooms
        self._tokens = tokens
        self._access = access
        self._limits = limits
        self._plugins = plugins
        self._greetings: set[asyncio.Task[None]] = set()
        self._connected: dict[Sid, Dashboard] = {}
        #: Called with a guild id when one in its rooms is there with another token.
        self.on_audience_change: Callable[[str], None] = lambda guild_id: None
        #: Called with a viewer's Discord id when one of its dashboards came or went.
        self.on_enter: Callable[[str], None] = lambda discord_id: None
        self.on_exit: Callable[[str], None] = lambda discord_id: None
        #: What plugins have for a new subscriber of a room, handed to `tell`.
        self.greet: Greet = plugins.greet
        sio.on("connect", self._connect)
        sio.on("disconnect", self._disconnect)
        sio.on(REQUEST, self._request)
        sio.on("connect", self._refuse_namespace, namespace="*")

    def viewer(self, sid: Sid) -> Viewer:
        return self._connected[sid].viewer

    def is_connected(self, discord_id: str) -> bool:
        """Whether this Discord user has a dashboard open."""
        return viewer_name(discord_id) in self._limits.open

    # -- coming and going

    async def _connect(self, sid: Sid, environ: dict[str, Any], auth: object) -> None:
        session = self._sio.session_of(sid)
        if session is None:
            raise SocketIORefusal("Gone")  # to nobody: it has left right after it sent CONNECT
        try:
            viewer = await self._identify(session.visit, auth)
        except RefusedConnectionError as refusal:
            if session.visit.log_once(refusal.message):
                address = session.visit.address
                session.log.info("%s refused: %s %s", address, refusal.message, refusal.data or "")
            # The library sends the refusal in this turn of the loop; then the transport goes too.
            asyncio.get_running_loop().call_soon(session.end)
            raise SocketIORefusal(refusal.message, refusal.data or None) from refusal
        self._limits.lobby.leave(session.visit)
        self._connected[sid] = Dashboard(viewer, session)
        session.log.info("viewer %s is in", clean_text(viewer.discord_id)[:EVENT_SHOWN])
        self.on_enter(viewer.discord_id)
        self._watch_expiry(sid)

    async def _identify(self, visit: Visit, auth: object) -> Viewer:
        await self._limits.let_try(visit)
        token = auth.get("token") if isinstance(auth, dict) else None
        try:
            viewer = self._tokens.verify(token)
        except RefusedConnectionError as refusal:
            await self._limits.refused(visit.address, refusal)
            raise
        await self._limits.accepted(visit.address)
        await self._limits.enter(viewer.discord_id)
        return viewer

    async def _refuse_namespace(
        self, namespace: str, sid: Sid, environ: dict[str, Any], auth: object
    ) -> NoReturn:
        raise SocketIORefusal("Invalid namespace")

    async def _disconnect(self, sid: Sid, reason: str) -> None:
        dashboard = self._connected.pop(sid)
        if dashboard.expiry is not None:
            dashboard.expiry.cancel()
        self._limits.open.leave(viewer_name(dashboard.viewer.discord_id))
        self.on_exit(dashboard.viewer.discord_id)
        session = dashboard.session
        if not session.closing:  # it left Socket.IO, and its transport is a stranger's again
            self._limits.lobby.enter(session.visit, session.cut)
        session.log.info("viewer is gone: %s", reason)

    def __len__(self) -> int:
        return len(self._connected)

    async def _kick(self, sid: Sid, message: str) -> None:
        """Disconnect for good: a stock client does not come back by itself after this."""
        dashboard = self._connected.get(sid)
        if dashboard is not None:
            dashboard.tell("error", {"message": message})
            await self._sio.disconnect(sid)
            dashboard.session.end()

    # -- the life of a token

    def _watch_expiry(self, sid: Sid) -> None:
        dashboard = self._connected[sid]
        if dashboard.expiry is not None:
            dashboard.expiry.cancel()
            dashboard.expiry = None
        if dashboard.viewer.expires is not None:
            warning = dashboard.viewer.expires - time.time() - EXPIRY_WARNING
            dashboard.expiry = asyncio.get_running_loop().call_later(warning, self._expiring, sid)

    def _expiring(self, sid: Sid) -> None:
        dashboard = self._connected[sid]
        expires = dashboard.viewer.expires or 0.0
        moment = datetime.fromtimestamp(expires, UTC)
        dashboard.tell("auth:expiring", {"expiresAt": timestamp(moment)})
        loop = asyncio.get_running_loop()
        dashboard.expiry = loop.call_later(expires - time.time(), self._expire, sid)

    def _expire(self, sid: Sid) -> None:
        self._sio.start_background_task(self._kick, sid, "Token expired")

    async def _refresh(self, sid: Sid, args: tuple[object, ...]) -> dict[str, Any]:
        """A new token for the same viewer; what it no longer allows is left."""
        dashboard = self._connected[sid]
        try:
            viewer = self._tokens.verify(args[0] if len(args) == 1 else None)
        except RefusedConnectionError as refusal:
            raise ClientError("forbidden", refusal.message) from refusal
        if viewer.discord_id != dashboard.viewer.discord_id:
            raise ClientError("forbidden", "The token is another viewer's")
        dashboard.viewer = viewer
        self._watch_expiry(sid)
        self._check_rights(sid)
        return {}

    def check_all_rights(self) -> None:
        """After a change of what decides them."""
        for sid in tuple(self._connected):
            self._check_rights(sid)

    def _check_rights(self, sid: Sid) -> None:
        for guild_id in {room.partition(":")[2] for room in self._rooms.rooms_of(sid)}:
            self.on_audience_change(guild_id)
            self.check_right(sid, guild_id)

    # -- requests

    async def _request(self, sid: Sid, event: object, *args: object) -> dict[str, Any]:
        try:
            if not await self._limits.may_send(sid):
                raise ClientError("rate_limited", "Too many events; slow down")
            return {"ok": True, **await self._answer(event, sid, args)}
        except ClientError as error:
            self._limits.metrics.refused_requests.labels(error.code).inc()
            if sid in self._connected:
                self._connected[sid].tell("error", error.to_wire())
            return {"ok": False, "error": error.to_wire()}

    async def _answer(self, event: object, sid: Sid, args: tuple[object, ...]) -> dict[str, Any]:
        if event == "guilds:list":
            return {"guilds": self._access.guilds_of(self.viewer(sid))}
        if event == "auth:refresh":
            return await self._refresh(sid, args)
        verb, _, kind = event.partition(":") if isinstance(event, str) else ("", "", "")
        if kind in self._plugins.kinds and verb == "subscribe":
            return {"room": await self._subscribe(sid, kind, guild_argument(args))}
        if kind in self._plugins.kinds and verb == "unsubscribe":
            room = f"{kind}:{guild_argument(args)}"
            await self._rooms.leave_room(sid, NAMESPACE, room)
            return {"room": room}
        raise ClientError("unknown_event", f"Unknown event: {quoted(event)}")

    async def _subscribe(self, sid: Sid, kind: str, guild_id: str) -> str:
        room = f"{kind}:{guild_id}"
        rooms = self._rooms.rooms_of(sid)
        if room not in rooms and len(rooms) >= self._limits.settings.rooms_per_connection:
            raise ClientError("too_many_rooms", f"Already in {len(rooms)} rooms")
        viewer = self.viewer(sid)
        if not await self._access.wait_until_sure(viewer, guild_id, SUBSCRIBE_PATIENCE):
            raise ClientError("forbidden", f"No access to guild {guild_id}")
        if sid in self._connected:  # it may have left meanwhile
            await self._rooms.enter_room(sid, NAMESPACE, room)
            if room not in rooms:
                self._greet_soon(sid, kind, guild_id)
        return room

    def _greet_soon(self, sid: Sid, kind: str, guild_id: str) -> None:
        """What plugins have for a new subscriber; in a task, so that the answer comes first."""

        def tell(event: str, payload: EventData) -> None:
            if f"{kind}:{guild_id}" in self._rooms.rooms_of(sid):
                self._connected[sid].tell(event, payload)

        task = asyncio.create_task(self.greet(kind, guild_id, tell))
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)

    def check_right(self, sid: Sid, guild_id: str) -> None:
        """Take a dashboard that may not view this guild any more out of its rooms."""
        if self._access.may_view(self.viewer(sid), guild_id) is not False:
            return
        rooms = [room for room in self._rooms.rooms_of(sid) if room.endswith(f":{guild_id}")]
        for room in rooms:
            self._rooms.expel(sid, room)
        if rooms:
            lost = ClientError("forbidden", f"Access to guild {guild_id} was lost")
            self._limits.metrics.refused_requests.labels("right_lost").inc()
            self._connected[sid].tell("error", lost.to_wire())


class RightsWatcher:
    """Keeps rooms in line with Discord's permissions, as the gateway tells of each change.

    hikari runs listeners in the order of the gateway's packets, and these are subscribed before
    any plugin's: whatever comes after a change is already judged by it.
    """

    def __init__(self, access: Access, dashboards: Dashboards, rooms: Rooms) -> None:
        self._access = access
        self._dashboards = dashboards
        self._rooms = rooms
        #: Who has been judged and who of them may not see a channel, until anything changes: by
        #: guild, then by room and channel.
        self._judged: dict[str, dict[tuple[str, str], tuple[tuple[Sid, ...], Hidden]]] = {}
        self._awaited: dict[int, str] = {}  # the nonce of the members asked for, by guild
        dashboards.on_audience_change = self._forget

    #: What of a guild can change which channels its viewers may see,
    CHANNEL_CHANGES: Final[tuple[type[hikari.Event], ...]] = (
        hikari.GuildChannelCreateEvent,
        hikari.GuildChannelUpdateEvent,
        hikari.GuildChannelDeleteEvent,
        hikari.GuildThreadCreateEvent,
        hikari.GuildThreadUpdateEvent,
        hikari.GuildThreadDeleteEvent,
        hikari.ThreadListSyncEvent,
    )
    #: and what can change besides whether they may see anything of it.
    GUILD_CHANGES: Final[tuple[type[hikari.Event], ...]] = (
        hikari.RoleUpdateEvent,
        hikari.RoleDeleteEvent,
        hikari.GuildUpdateEvent,
    )
    MEMBER_CHANGES: Final[tuple[type[hikari.Event], ...]] = (
        hikari.MemberCreateEvent,
        hikari.MemberUpdateEvent,
        hikari.MemberDeleteEvent,
    )

    @classmethod
    def event_types(cls) -> tuple[type[hikari.Event], ...]:
        """What it has to hear: intents follow from it."""
        return cls.CHANNEL_CHANGES + cls.GUILD_CHANGES + cls.MEMBER_CHANGES

    def subscribe(self, events: hikari.api.EventManager) -> None:
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
        events.subscribe(hikari.GuildLeaveEvent, self._on_guild_gone)
        events.subscribe(hikari.MemberChunkEvent, self._on_members)

    def hidden(self, room: str, guild_id: str, channel_id: str) -> Hidden:
        """Who in the room may not see the channel; each is judged once until something changes."""
        channels = self._judged.setdefault(guild_id, {})
        members = self._rooms.members(room)
        judged, hidden = channels.get((room, channel_id), ((), NOBODY))
        if judged is not members:
            blind = [
                sid
                for sid in set(members).difference(judged)
                if not self._access.may_see(self._dashboards.viewer(sid), guild_id, channel_id)
            ]
            # Those who are in the room no more are forgotten on the way.
            hidden = hidden.intersection(members).union(blind)
            channels[room, channel_id] = members, hidden
        return hidden

    def _forget(self, guild_id: str) -> None:
        self._judged.pop(guild_id, None)

    def check(self, guild_id: str, discord_id: str | None = None) -> None:
        """Judge anew those in the guild's rooms, or only one of them."""
        self._forget(guild_id)
        rooms = [room for room in self._rooms.names() if room.endswith(f":{guild_id}")]
        for sid in {sid for room in rooms for sid in self._rooms.members(room)}:
            if discord_id in (None, self._dashboards.viewer(sid).discord_id):
                self._dashboards.check_right(sid, guild_id)

    async def _on_channel_change(self, event: Any) -> None:
        self._forget(str(event.guild_id))

    async def _on_guild_change(self, event: Any) -> None:
        self.check(str(event.guild_id))

    async def _on_member_change(self, event: Any) -> None:
        if isinstance(event, hikari.MemberDeleteEvent):
            self._access.leave(event.guild_id, event.user_id)
        discord_id = str(event.user_id)
        if self._dashboards.is_connected(discord_id):
            self.check(str(event.guild_id), discord_id)

    # -- while the cache is refilled

    async def _on_new_session(self, event: hikari.ShardReadyEvent) -> None:
        self._access.begin(event.unavailable_guilds, shard_range_of(event.shard))
        for guild_id in self._access.lost:
            self.check(str(guild_id))

    async def _on_stopping(self, event: hikari.StoppingEvent) -> None:
        self._access.end()

    async def _on_resumed(self, event: hikari.ShardResumedEvent) -> None:
        """What was asked for on the connection that broke may never have been heard."""
        for guild_id, nonce in tuple(self._awaited.items()):
            if shard_range_of(event.shard).has(guild_id):
                await event.shard.request_guild_members(guild_id, nonce=nonce)

    async def _on_guild(self, event: hikari.GuildAvailableEvent | hikari.GuildJoinEvent) -> None:
        if event.chunk_nonce is None:
            self._fill(event.guild_id)
        else:  # hikari has asked for the rest of the members
            self._awaited[event.guild_id] = event.chunk_nonce
            self._access.expect_members(event.guild_id)

    async def _on_members(self, event: hikari.MemberChunkEvent) -> None:
        awaited = event.nonce == self._awaited.get(event.guild_id)
        if awaited and event.chunk_index == event.chunk_count - 1:
            self._fill(event.guild_id)

    async def _on_guild_gone(self, event: hikari.GuildLeaveEvent) -> None:
        self._fill(event.guild_id)

    def _fill(self, guild_id: int) -> None:
        self._awaited.pop(guild_id, None)
        self._access.fill(guild_id)
        self.check(str(guild_id))


def shard_range_of(shard: hikari.api.GatewayShard) -> ShardRange:
    """The guilds whose events come by this shard."""
    return ShardRange(shard.id, shard.shard_count)


def guild_argument(args: tuple[object, ...]) -> str:
    """The one argument of a subscription: a guild id, a string of 1 to 20 digits."""
    if len(args) > 1:
        raise ClientError("bad_request", f"Expected one argument, the guild id; got {len(args)}")
    guild_id = args[0] if args else None
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


# -- parts of a server, alone or a node of several


def cluster_code() -> Any:
    """`spywatcher_cluster`: loaded only where it is needed, since it is for few services."""
    try:
        return importlib.import_module("spywatcher_cluster")
    except ModuleNotFoundError as error:
        raise OperatorError(
            f"redis.url: {error.name} is missing, expected spywatcher_cluster.py beside"
            f" {Path(__file__).name}, and redis-py"
        ) from error


def make_cluster(settings: Settings, cache: hikari.api.Cache) -> Cluster | None:
    """This process's part in a service of several; None, and nothing of it loaded, where it is alone."""
    redis = settings.redis
    if not redis.url:
        return None
    cluster: Cluster = cluster_code().Cluster(redis, redis_password_of(settings), cache)
    return cluster


def redis_password_of(settings: Settings) -> str:
    """Empty where the URL has it, or there is none."""
    file = settings.redis.password_file
    password = read_secret("", file, settings.folder, "redis.password")
    if file and not password:
        raise OperatorError(f"redis.password_file: {file} is empty, expected Redis' password")
    return password


def check_redis(settings: Settings) -> None:
    """Raises OperatorError where no Redis could be reached like this, whatever runs there."""
    if settings.redis.url:
        cluster_code().open_redis(settings.redis.url, redis_password_of(settings))


def make_access(settings: Settings, cache: hikari.api.Cache, cluster: Cluster | None) -> Access:
    auth, watched = settings.auth, settings.discord.guilds
    return cluster.make_access(auth, watched) if cluster else Access(auth, watched, cache)


def make_counters(cluster: Cluster | None) -> limits.aio.storage.Storage:
    return cluster.make_counters(BoundedMemory()) if cluster else BoundedMemory()


def make_connections(cluster: Cluster | None) -> OpenConnections:
    return cluster.connections if cluster else OpenConnections()


def make_rooms(settings: Settings, metrics: Metrics, cluster: Cluster | None) -> Rooms:
    max_delay = settings.fanout.max_delay
    return cluster.make_rooms(max_delay, metrics) if cluster else Rooms(max_delay, metrics)


def make_socketio(settings: Settings, rooms: Rooms, metrics: Metrics) -> SocketIO:
    return SocketIO(
        client_manager=rooms,
        namespaces="*",
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
        metrics=metrics,
        logger=library_log("socketio"),
        engineio_logger=library_log("engineio"),
    )


def measure(server: Server) -> None:
    """Enter what is read when a scrape asks."""
    gauge = server.metrics.gauge
    sessions = server.socketio.eio.sockets
    gauge("connections", "Open connections, silent ones too.", lambda: len(sessions))
    gauge("dashboards", "Connected dashboards.", lambda: len(server.dashboards))
    gauge("rooms", "Rooms with listeners.", lambda: len(server.rooms))
    gauge("guilds", "Watched guilds.", lambda: server.gateway.guilds)
    gauge("gateway_connected", "1 while connected to Discord.", lambda: server.gateway.connected)
    gauge(
        "gateway_latency_seconds",
        "What Discord took to answer the last heartbeat.",
        lambda: server.gateway.latency,
    )
    gauge(
        "gateway_silence_seconds",
        "Since Discord answered a heartbeat.",
        lambda: server.gateway.silence,
    )
    gauge("loop_lag_seconds", "Worst delay of the last 10 s.", lambda: server.pulse.lag)
    gauge("plugins_loaded", "Loaded plugins.", lambda: len(server.plugins.health()["loaded"]))
    gauge("plugins_failed", "Plugins in trouble.", lambda: len(server.plugins.health()["failed"]))
    gauge("ready", "1 while /health/ready says so.", lambda: server.problem is None)
    if server.cluster is not None:
        server.cluster.measure(server.metrics)


def make_web(server: Server, settings: Settings) -> WebServer:
    limit = settings.server.max_message_bytes
    door = {"door": server.door}
    routes: list[Any] = []
    if server.cluster is not None:
        asked = {"secret": server.cluster.source, "promise": server.cluster.lease.promise}
        routes.append((r"/cluster/([0-9a-f]+)", PromiseHandler, asked))
    application = Site(
        [
            *routes,
            (SOCKET_PATH, SocketHandler, {**door, "engine": server.socketio.eio}),
            (r"/health/live", LiveHandler, door),
            (r"/health/ready", ReadyHandler, {**door, "read": server.health}),
            (r"/metrics", MetricsHandler, {**door, "read": server.metrics.text}),
        ],
        default_handler_class=NotFoundHandler,
        websocket_max_message_size=limit,
    )
    application.limits = server.limits
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


def being_cancelled() -> bool:
    """Whether the task that asks was to end: redis-py 8.1 may swallow what told it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Server:
    """All the parts of one process, made from settings; `async with` starts and stops them.

    `sockets` that listen already (systemd's) are used instead of `[server] host` and `port`.
    """

    def __init__(
        self, settings: Settings, *, keys: Keys, token: str, sockets: Sequence[socket.socket] = ()
    ) -> None:
        self._settings = self._started_with = settings
        self._sockets = list(sockets)
        self.metrics = Metrics()
        self.pulse = Pulse()
        self.draining = False
        self.plugins = PluginHost(settings.plugins, settings.plugin, settings.folder, self.metrics)
        self.plugins.load()
        self.gateway = Gateway(settings.discord, token, self._wanted(), self.metrics)
        self.cluster = make_cluster(settings, self.gateway.bot.cache)
        self.access = make_access(settings, self.gateway.bot.cache, self.cluster)
        self.tokens = Tokens(keys, settings.auth.algorithms)
        self.limits = Limits(
            settings.limits,
            settings.auth.connect_timeout,
            make_counters(self.cluster),
            make_connections(self.cluster),
            self.metrics,
        )
        self.rooms = make_rooms(settings, self.metrics, self.cluster)
        self.socketio = make_socketio(settings, self.rooms, self.metrics)
        self.throttle = Throttle(settings.throttle, self.emit, self.rooms.listened, self.metrics)
        self.dashboards = Dashboards(
            self.socketio, self.rooms, self.tokens, self.access, self.limits, self.plugins
        )
        self.rights = RightsWatcher(self.access, self.dashboards, self.rooms)
        if self.cluster is not None:
            self.cluster.deliver = self._deliver
            self.cluster.on_rights = self.rights.check
            self.cluster.greetings.own = self.plugins.greet
            self.cluster.windows.share(self.throttle)
            self.dashboards.greet = self.cluster.greetings.greet
            self.dashboards.on_enter = self.cluster.enter
            self.dashboards.on_exit = self.cluster.exit
        self.door = FrontDoor(settings.server, self.limits)
        measure(self)
        self.web = make_web(self, settings)
        self.port = 0
        self._tasks: list[asyncio.Task[None]] = []

    def _wanted(self) -> dict[type[hikari.Event], list[str]]:
        """Which events are needed, and by whom."""
        wanted = {event_type: ["access"] for event_type in RightsWatcher.event_types()}
        for event_type, names in self.plugins.event_types().items():
            wanted[event_type] = [*wanted.get(event_type, ()), *names]
        return wanted

    # -- how things stand

    def health(self) -> dict[str, dict[str, Any]]:
        """Each part's `problem`, None or a sentence, with its figures."""
        stopping = "draining: the server is stopping" if self.draining else None
        return {
            "server": {"problem": stopping},
            "loop": self.pulse.health(),
            "gateway": self.gateway.health() if self.leading else {"problem": None},
            "plugins": self.plugins.health(),
            "redis": {"problem": None} if self.cluster is None else self.cluster.health(),
        }

    @property
    def leading(self) -> bool:
        """Whether the session with Discord is this process's to keep."""
        return self.cluster is None or self.cluster.leading

    @property
    def problem(self) -> str | None:
        """The first part's problem, if any."""
        return next((part["problem"] for part in self.health().values() if part["problem"]), None)

    @property
    def alive(self) -> bool:
        """Whether the parts that must never rest still run; the loop does, if this is asked on it."""
        turning = self.gateway.alive or not self.leading
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
        run = self.gateway.run
        if self.cluster is not None:
            self.cluster.truth.subscribe(self.gateway.bot.event_manager)
            run = functools.partial(self.cluster.lead, self._lead)
        self.rights.subscribe(self.gateway.bot.event_manager)
        if self.cluster is None:
            await self.plugins.start(self._workplace())
        sockets = self._sockets or self._bind()
        self.web.add_sockets(sockets)
        host, self.port = sockets[0].getsockname()[:2]
        if self.cluster is not None:
            self.cluster.start(host, self.port)
        self._gateway_task = asyncio.create_task(run(), name="gateway")
        pulse = asyncio.create_task(self.pulse.run(), name="pulse")
        self._tasks = [self._gateway_task, pulse]
        host = f"[{host}]" if ":" in host else host
        log.info("listening on http://%s:%d", host, self.port)

    async def _lead(self) -> None:
        """Have the gateway, and the plugins at work, which are so at its holder alone."""
        try:
            await self.plugins.start(self._workplace())
            if not being_cancelled():
                await self.gateway.run()
        finally:
            await self.throttle.close()
            await self.plugins.stop()

    def _workplace(self) -> HostContext:
        emit, storage = self._emit_or_hold, storage_of(self._settings)
        bot, settled = self.gateway.bot, self.gateway.settled
        place = HostContext(bot, emit, settled, self.access.watches, storage)
        return place._replace(share=self.cluster.share) if self.cluster else place

    def _bind(self) -> list[socket.socket]:
        server = self._settings.server
        try:
            return bind_sockets(server.port, server.host, backlog=1024)
        except OSError as error:
            raise OperatorError(
                f"server.port: cannot listen on {server.host}:{server.port}: {error.strerror}"
            ) from error

    async def wait_closed(self) -> None:
        """Returns never; raises UpstreamError once Discord refuses us for good."""
        await self._gateway_task

    def reload(self, settings: Settings, keys: Keys) -> list[str]:
        """Take over what can change live; nobody is disconnected.

        Returns the key paths of changes that need a restart. Raises OperatorError, and then
        nothing has changed.
        """
        plugin_settings = self.plugins.check(settings.plugin)
        changed = changed_keys(self._started_with, settings)
        self.plugins.reconfigure(plugin_settings)
        self.tokens.reconfigure(keys, settings.auth.algorithms)
        self.access.reconfigure(settings.auth)
        self.limits.reconfigure(settings.limits, settings.auth.connect_timeout)
        self.door.reconfigure(settings.server)
        self.throttle.windows = settings.throttle
        self.dashboards.check_all_rights()
        self._settings = settings
        return [key for key in changed if not key.startswith(LIVE)]

    async def stop(self) -> None:
        """Not ready from now on; close every connection so that clients come back by themselves.

        Takes `shutdown_grace` at most. Plugins are torn down, so that what they count is kept.
        """
        self.draining = True
        self.web.stop()
        grace = self._settings.server.shutdown_grace
        work = [
            asyncio.create_task(self._stop_sources(), name="plugins and gateway"),
            asyncio.create_task(self._close_sessions(grace / 2), name="connections"),
        ]
        _, late = await asyncio.wait(work, timeout=grace)
        for task in late:
            log.warning("%s not closed within %s s", task.get_name(), grace)
            task.cancel()
        await asyncio.wait(work)
        await self._close_sessions(0)
        await self.web.close_all_connections()

    async def _stop_sources(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # `wait_closed` tells of them
        await self.throttle.close()
        await self.plugins.stop()
        if self.cluster is not None:
            await self.cluster.stop(self._settings.server.shutdown_grace / 2)

    async def _close_sessions(self, within: float) -> None:
        """In random order, at an even pace that needs no more than `within` seconds."""
        sessions = list(self.socketio.eio.sockets.values())
        random.shuffle(sessions)
        pace = min(GOODBYE_PACE, within / max(1, len(sessions)))
        began = time.monotonic()
        for number, session in enumerate(sessions):
            if (early := began + number * pace - time.monotonic()) > 0:
                await asyncio.sleep(max(early, GOODBYE_PACE))
            await self._say_goodbye(session)

    @staticmethod
    async def _say_goodbye(session: Session) -> None:
        if session.handler is not None:
            session.handler.close(GOING_AWAY)
        await session.close()

    def _emit_or_hold(self, event: str, guild_id: str, content: DataOrMaker, kind: str) -> None:
        """The first step of an event. Other nodes' listeners of a moment ago are not known yet:
        what costs nothing to make goes out for them all the same.
        """
        if (
            self.cluster is not None
            and not callable(content)
            and event not in self.throttle.windows
        ):
            self.emit(event, guild_id, content, kind)
        else:
            self.throttle.emit(event, guild_id, content, kind)

    def emit(self, event: str, guild_id: str, payload: EventData, kind: str) -> None:
        """The last step of an event: from a plugin to those in the room who may see it."""
        if not self.access.watches(guild_id):
            self.metrics.dropped.labels("guild not watched").inc()
            return
        channel_id = str(payload.get("channelId") or payload.get("channel_id") or "")
        if self.cluster is not None:
            self.cluster.emit(guild_id, kind, channel_id, event_packet(event, payload))
        else:
            room = f"{kind}:{guild_id}"
            self.rooms.broadcast(room, event, payload, self._hidden(room, guild_id, channel_id))

    def _hidden(self, room: str, guild_id: str, channel_id: str) -> Callable[[], Hidden] | None:
        """What tells from whom in the room an event of this channel is kept."""
        if not channel_id:
            return None
        return functools.partial(self.rights.hidden, room, guild_id, channel_id)

    def _deliver(self, guild_id: str, kind: str, channel_id: str, packet: bytes) -> None:
        """What `cluster` hands on, to this node's clients."""
        room = f"{kind}:{guild_id}"
        self.rooms.send(room, packet, self._hidden(room, guild_id, channel_id))


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
            address = (
                self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address
            )
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


class JournalFormatter(logging.Formatter):
    """Another form, with the level before each line as journald reads it (sd-daemon(3))."""

    LEVELS: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4))

    def __init__(self, form: logging.Formatter) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        usual = 6 if record.levelno >= logging.INFO else 7
        number = next((number for level, number in self.LEVELS if record.levelno >= level), usual)
        return "\n".join(f"<{number}>{line}" for line in self._form.format(record).splitlines())


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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter(form) if journal else form)
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
    """A Discord id: 1 to 20 digits."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise argparse.ArgumentTypeError(f"got {text}, expected 1-20 digits")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="spywatcher", description="Watch Discord guilds live, from any browser."
    )
    parser.add_argument("--version", action="version", version=f"SpyWatcher {__version__}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings (config.toml)")
    parser.set_defaults(command=serve_command)
    commands = parser.add_subparsers(metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the server (the default)")
    serve.set_defaults(command=serve_command)
    demo = commands.add_parser("demo", help="serve against the built-in pretend Discord")
    demo.add_argument("--port", type=int, help="port to listen on; 0 picks a free one")
    demo.set_defaults(command=demo_command)
    check = commands.add_parser("check", help="validate settings and plugins, print them")
    check.set_defaults(command=check_command)
    token = commands.add_parser("token", help="make a viewer's token")
    token.add_argument("--discord-id", required=True, metavar="ID", help="the viewer's user id")
    token.add_argument("--role", default="USER", choices=sorted(ROLES))
    token.add_argument("--guild", action="append", default=[], metavar="ID", help="may view it")
    token.add_argument("--ttl", type=parse_ttl, default=900.0, help="life time, e.g. 15m")
    token.set_defaults(command=token_command)
    forget = commands.add_parser("forget", help="remove a member's counts")
    forget.add_argument("--member", required=True, type=parse_id, metavar="ID", help="the member")
    forget.add_argument("--guild", type=parse_id, metavar="ID", help="in this guild only")
    forget.set_defaults(command=forget_command)
    return parser.parse_args(arguments)


def bot_token_of(settings: Settings) -> str:
    discord = settings.discord
    return read_secret(discord.token, discord.token_file, settings.folder, "discord.token")


def serve_command(settings: Settings, arguments: argparse.Namespace) -> None:
    keys = read_keys(settings.auth, settings.folder)
    token = bot_token_of(settings)
    if keys == Keys() or not token:
        raise OperatorError(
            "auth.secret and discord.token must both be set (or auth.secret_file and"
            " discord.token_file); to look around without a bot: python spywatcher.py demo"
        )
    systemd = Systemd(os.environ)
    server = Server(settings, keys=keys, token=token, sockets=systemd.sockets())
    reload = functools.partial(reload_settings, server, arguments.config)
    run_until_stopped(run_server(server, systemd, reload))


def reload_settings(server: Server, path: Path | None) -> None:
    """What SIGHUP does: read the settings again; a fault in them changes nothing."""
    try:
        settings = read_settings(path)
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
    """Print the settings in force and the plugins; any plugin that does not load is a fault."""
    read_keys(settings.auth, settings.folder)
    bot_token_of(settings)
    check_redis(settings)
    host = PluginHost(settings.plugins, settings.plugin, settings.folder, Metrics())
    host.load()
    print(settings_text(settings))
    for plugin in host.plugins.values():
        print(f"plugin {plugin.name}: {', '.join(sorted(plugin.events)) or 'no events'}")
    if host.failures:
        raise OperatorError(*(f"plugin {name}: {e}" for name, e in host.failures.items()))


def settings_text(settings: Settings) -> str:
    """All settings as TOML would have them; a secret is shown only as set or not."""
    lines = []
    for name, section in msgspec.to_builtins(settings, enc_hook=str).items():
        if not isinstance(section, dict):
            continue
        for key, value in section.items():
            hidden = key in SECRET_KEYS and value
            may_show = "(set, not shown)" if hidden else shown(without_login(value))
            lines.append(f"{name}.{key} = {may_show}")
    return "\n".join(lines)


def token_command(settings: Settings, arguments: argparse.Namespace) -> None:
    tokens = Tokens(read_keys(settings.auth, settings.folder), settings.auth.algorithms)
    print(tokens.issue(arguments.discord_id, arguments.role, arguments.guild, arguments.ttl))


def forget_command(settings: Settings, arguments: argparse.Namespace) -> None:
    """Remove what plugins keep of a member; a running server follows within 10 seconds."""
    host = PluginHost(settings.plugins, settings.plugin, settings.folder, Metrics())
    host.load()
    if settings.redis.url:
        password = redis_password_of(settings)
        member, guild = arguments.member, arguments.guild
        forget = cluster_code().forget_shared
        shared = asyncio.run(forget(settings.redis, password, member, guild))
        print(f"Redis: {shared} removed")
    plugins, storage = host.plugins.values(), storage_of(settings)
    removed = forget_member(plugins, storage, arguments.member, arguments.guild)
    for name, count in removed.items():
        print(f"plugin {name}: {count} removed")
    if host.failures:
        raise OperatorError(*(f"plugin {name}: {e}" for name, e in host.failures.items()))


def demo_command(settings: Settings, arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = StorageSettings(path=f"{folder}/demo.db")
        settings = msgspec.structs.replace(settings, storage=storage)
        run_until_stopped(run_demo(settings, arguments.port))


async def run_demo(settings: Settings, port: int | None) -> None:
    """The whole product on loopback: pretend Discord, server, and a dashboard that prints."""
    import simulator  # needed by the demo alone; a server is deployed without it

    async with simulator.PretendDiscord() as discord:
        playing = asyncio.create_task(simulator.play(discord))
        keys = Keys(secrets=(secrets.token_hex(32),))
        replace = msgspec.structs.replace
        settings = replace(
            settings,
            server=replace(settings.server, port=settings.server.port if port is None else port),
            auth=replace(settings.auth, algorithms=("HS256",)),
            discord=DiscordSettings(rest_url=discord.rest_url, startup_grace=0.0),
        )
        server = Server(settings, keys=keys, token=discord.token)
        viewer = server.tokens.issue("1", role="ADMIN", ttl=86_400)
        watching = asyncio.create_task(print_events(server, viewer))
        try:
            await run_server(server)
        finally:
            playing.cancel()
            watching.cancel()
            await asyncio.wait([playing, watching])


async def print_events(server: Server, token: str) -> None:
    """A dashboard in a terminal: what any Socket.IO client sees, one line an event."""
    client = socketio.AsyncClient(logger=False, handle_sigint=False)  # run_server does

    def show(event: str, data: object) -> None:
        print(f"{event:18} {json.dumps(data, ensure_ascii=False)}", flush=True)

    client.on("*", show)
    await server.gateway.bot.event_manager.wait_for(hikari.GuildAvailableEvent, timeout=None)
    url = f"http://127.0.0.1:{server.port}"
    await client.connect(url, auth={"token": token}, transports=["websocket"])
    guilds = (await client.call("guilds:list"))["guilds"]
    print(DEMO_TEXT.format(url=url, token=token, guild=guilds[0]["id"]), flush=True)
    for guild in guilds:
        for kind in sorted(server.plugins.kinds):
            await client.emit(f"subscribe:{kind}", guild["id"])
    try:
        await client.wait()
    finally:
        await client.shutdown()


DEMO_TEXT: Final = """
SpyWatcher is watching a pretend guild at {url}. A token for it, good for a day:

{token}

See it from Node (npm install socket.io-client), in a file demo.mjs:

import {{ io }} from "socket.io-client";
const socket = io("{url}", {{ auth: {{ token: "{token}" }} }});
socket.onAny((event, data) => console.log(event, data)).emit("subscribe:guild", "{guild}");

What this dashboard sees meanwhile (Ctrl+C stops it):
"""


async def run_server(
    server: Server, systemd: Systemd | None = None, reload: Callable[[], None] | None = None
) -> None:
    """Serve until a signal comes or Discord refuses us for good."""
    systemd = systemd or Systemd({})
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)

    def on_sighup() -> None:
        systemd.tell_reloading()
        if reload:
            reload()
        systemd.tell("READY=1")

    loop.add_signal_handler(signal.SIGHUP, on_sighup)
    async with server:
        systemd.tell("READY=1")
        closed = asyncio.create_task(server.wait_closed())
        stopped = asyncio.create_task(stopping.wait())
        watching = asyncio.create_task(systemd.watch(server))
        await asyncio.wait([closed, stopped], return_when=asyncio.FIRST_COMPLETED)
        systemd.tell("STOPPING=1", "STATUS=draining")
        for task in (watching, stopped):
            task.cancel()
        if closed.done():
            closed.result()
        closed.cancel()


def run_until_stopped(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop where it is installed (extra `speedups`), else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    else:
        loop_factory = uvloop.new_event_loop
    # Nearly all that the garbage collector walks lives as long as its client: let it walk less.
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main)


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
        parsed.command(settings, parsed)
    except OperatorError as error:
        say_faults(*error.faults)
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
