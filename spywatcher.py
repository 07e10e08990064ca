"""SpyWatcher: what happens in your Discord guilds, live in any browser.

One process. In comes a Discord gateway session (hikari); out go Socket.IO events to browser
dashboards (Tornado, python-socketio). Nothing here knows an event by name: every event that a
dashboard sees is made by a plugin.

The way of one event:
    gateway -> plugin -> room -> clients that may see it

The sections, each using only those above it:
    errors               whose fault it was, and what they are told
    settings             config.toml: one table of keys, types, defaults, meanings
    identity and access  who a viewer is, which guilds and channels they may see
    rooms and fan-out    Engine.IO sessions, rooms, and the shortest way from one event to all of them
    plugin API           all that a plugin may import
    plugin host          finds, loads, runs and fences plugins
    gateway              the session with Discord, kept alive
    web handlers         the Tornado side of Socket.IO
    server               puts the parts together, starts and stops them
    command line         serve, demo, check, token
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import importlib.util
import inspect
import itertools
import json
import logging
import secrets
import signal
import sys
import time
import tomllib
import unicodedata
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final, Literal, NoReturn, Self, TypeVar, get_args

import engineio
import hikari
import jwt
import msgspec
import socketio
from engineio import packet as engineio_packet
from hikari.events import base_events
from msgspec import Meta
from socketio.exceptions import ConnectionRefusedError as SocketIORefusal
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream, StreamBufferFullError, StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler

__version__ = "0.1.0"

#: What a plugin may import; everything else may change without notice.
__all__ = [
    "Payload",
    "PluginSettings",
    "Spy",
    "channel_name",
    "clean_name",
    "member_name",
    "on",
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

Origin = Annotated[str, Meta(pattern=r"^(\*|null|https?://[^/\s]+)$")]
Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
SecondsOrZero = Annotated[float, Meta(ge=0)]
GuildId = Annotated[str, Meta(pattern=r"^[0-9]{1,20}$")]
PermissionName = Annotated[str, Meta(pattern=r"^[A-Z_]+$")]
Role = Literal["USER", "ADMIN", "MODERATOR", "BANNED"]
Algorithm = Literal["HS256", "HS384", "HS512"]
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


class HeartbeatSettings(Section, frozen=True):
    interval: Annotated[Seconds, Meta(description="Seconds between two pings to a client.")] = 25.0
    timeout: Annotated[Seconds, Meta(description="Seconds a client has to answer a ping.")] = 60.0


class AuthSettings(Section, frozen=True):
    secret: Annotated[str, Meta(description="Key that signs the viewers' tokens.")] = ""
    secret_file: Annotated[str, Meta(description="File that holds the key instead.")] = ""
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


class FanoutSettings(Section, frozen=True):
    max_delay: Annotated[
        SecondsOrZero, Meta(description="Longest seconds a burst may be held to share a write.")
    ] = 0.05


class PluginsSettings(Section, frozen=True):
    folders: Annotated[
        tuple[str, ...], Meta(description="Where plugins are, relative to the settings file.")
    ] = ("plugins",)
    disabled: Annotated[tuple[str, ...], Meta(description="Plugins not to load, by name.")] = ()


class LogSettings(Section, frozen=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level logged.")
    ] = "info"
    format: Annotated[Literal["text", "json"], Meta(description="Form of a log line.")] = "text"


class Settings(Section, frozen=True):
    """All of config.toml. `folder` is where it lay: relative paths start there."""

    server: ServerSettings = ServerSettings()
    heartbeat: HeartbeatSettings = HeartbeatSettings()
    auth: AuthSettings = AuthSettings()
    discord: DiscordSettings = DiscordSettings()
    fanout: FanoutSettings = FanoutSettings()
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
            came = "a value not shown here" if key in SECRET_KEYS else shown(value)
            faults.append(f"{path}.{key}: got {came}, expected {expected}")
    return to(**values)


def nearest(key: str, known: Iterable[str]) -> str:
    """The rest of a sentence that tells what `key` should have been."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0)
    return f", did you mean {close[0]}?" if close else ""


def shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_settings(tables: dict[str, Any], folder: Path) -> Settings:
    """Check all tables at once; raises OperatorError with one line per fault."""
    faults: list[str] = []
    sections: dict[str, Any] = {"folder": folder}
    types = {
        field.name: field.type
        for field in msgspec.structs.fields(Settings)
        if isinstance(field.type, type) and issubclass(field.type, Section)
    }
    for name, table in tables.items():
        if name == "plugin":
            sections["plugin"] = check_plugin_tables(table, faults)
        elif name in types:
            sections[name] = check_table(table, types[name], name, faults)
        else:
            faults.append(f"{name}: unknown table{nearest(name, [*types, 'plugin'])}")
    settings = Settings(**sections)
    faults += permission_faults(settings.auth)
    if faults:
        raise OperatorError(*faults)
    return settings


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


def permission_faults(auth: AuthSettings) -> list[str]:
    known = [str(permission.name) for permission in hikari.Permissions]
    return [
        f"auth.viewer_permissions: {name} is no Discord permission{nearest(name, known)}"
        for name in auth.viewer_permissions
        if name not in known
    ]


def read_settings(path: Path | None) -> Settings:
    """Read `path`, or the first config.toml found as the command line promises, or the defaults."""
    if path is None:
        here = [Path("config.toml"), Path(__file__).parent / "config.toml"]
        path = next((place for place in here if place.is_file()), None)
        if path is None:
            return Settings(folder=Path(__file__).parent)
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


def read_secret(value: str, file: str, folder: Path, key: str) -> str:
    """The secret itself, or what its file holds (without the line end). Empty if neither is set."""
    if not file:
        return value
    if value:
        raise OperatorError(f"{key}: set, and {key}_file too; expected one of them")
    try:
        return (folder / file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"{key}_file: {file} cannot be read: {error}") from error


# ------------------------------------------------------------------ identity and access
# Who is there (a signed token) and what they may see (Discord's permissions, by hikari's
# cache). The only place that decides either. It knows no sockets and no rooms.

ROLES: Final = frozenset(get_args(Role))
#: A token is a few hundred bytes; nothing longer is worth the work of checking it.
MAX_TOKEN_BYTES: Final = 4096
#: Unicode categories that steer a display instead of showing something.
UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
ALL_PERMISSIONS: Final = hikari.Permissions.all_permissions()


class Viewer(msgspec.Struct, frozen=True):
    """Who a dashboard belongs to: the claims of its token (API page, Authentication)."""

    discord_id: str
    role: str
    guilds: frozenset[str] | None = None
    expires: float | None = None


class Tokens:
    """Checks and makes the viewers' tokens (JWT, RFC 7519)."""

    def __init__(self, secret: str, algorithms: Sequence[str]) -> None:
        self._secret = secret
        self._algorithms = list(algorithms)

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
            return jwt.decode(token, self._secret, algorithms=self._algorithms)
        except jwt.ExpiredSignatureError:
            code = "expired"
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
            code = "signature"
        except jwt.DecodeError:
            code = "malformed"
        except (jwt.InvalidTokenError, TypeError, ValueError, OverflowError):
            code = "claims"
        raise RefusedConnectionError("Invalid token", code=code)

    @staticmethod
    def _viewer(claims: dict[str, Any]) -> Viewer:
        discord_id, role = claims.get("discordId"), claims.get("role")
        guilds = claims.get("guilds")
        sound = (
            isinstance(discord_id, str)
            and discord_id != ""
            and claims.get("access") is True
            and isinstance(role, str)
            and role in ROLES
            and (guilds is None or is_list_of_strings(guilds))
        )
        if not sound:
            raise RefusedConnectionError("Invalid token", code="claims")
        expires = claims.get("exp")
        return Viewer(
            discord_id=str(discord_id),
            role=str(role),
            guilds=None if guilds is None else frozenset(guilds),
            expires=None if expires is None else float(expires),
        )

    def issue(
        self, discord_id: str, role: str = "USER", guilds: Sequence[str] = (), ttl: float = 900.0
    ) -> str:
        """A token that `verify` accepts for `ttl` seconds."""
        claims: dict[str, Any] = {
            "discordId": discord_id,
            "access": True,
            "role": role,
            "exp": int(time.time() + ttl),
        }
        if guilds:
            claims["guilds"] = list(guilds)
        return jwt.encode(claims, self._secret, algorithm=self._algorithms[0])


def is_list_of_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class Access:
    """Decides which guilds a viewer may see, by hikari's cache as it is now."""

    def __init__(self, auth: AuthSettings, watched: Sequence[str], cache: hikari.api.Cache) -> None:
        self._admin_roles = frozenset(auth.admin_roles)
        self._needed = hikari.Permissions.NONE
        for name in auth.viewer_permissions:
            self._needed |= hikari.Permissions[name]
        self._watched = frozenset(watched)
        self._cache = cache

    def watches(self, guild_id: str) -> bool:
        """Whether events of this guild are for anyone at all."""
        return not self._watched or guild_id in self._watched

    def may_view(self, viewer: Viewer, guild_id: str) -> bool:
        """Whether the bot watches this guild and the viewer may see it."""
        guild = self._cache.get_guild(hikari.Snowflake(guild_id))
        if guild is None or not self.watches(guild_id):
            return False
        if viewer.role in self._admin_roles:
            return True
        if viewer.guilds is not None:
            return guild_id in viewer.guilds
        return bool(self._permissions(viewer, guild) & self._needed)

    def guilds_of(self, viewer: Viewer) -> list[dict[str, str | None]]:
        """`{id, name, icon}` of each guild that the viewer may see, by name."""
        guilds = [
            {"id": str(guild.id), "name": clean_text(guild.name), "icon": guild.icon_hash}
            for guild in self._cache.get_guilds_view().values()
            if self.may_view(viewer, str(guild.id))
        ]
        return sorted(guilds, key=lambda guild: (guild["name"] or "", guild["id"] or ""))

    def _permissions(self, viewer: Viewer, guild: hikari.Guild) -> hikari.Permissions:
        """Guild-wide permissions (Discord documentation: Permissions, computing base permissions)."""
        if not viewer.discord_id.isdecimal() or len(viewer.discord_id) > 20:
            return hikari.Permissions.NONE
        user_id = hikari.Snowflake(viewer.discord_id)
        if guild.owner_id == user_id:
            return ALL_PERMISSIONS
        member = self._cache.get_member(guild.id, user_id)
        if member is None:
            return hikari.Permissions.NONE
        granted = hikari.Permissions.NONE
        for role_id in {guild.id, *member.role_ids}:  # the guild's own id is @everyone
            role = self._cache.get_role(role_id)
            if role is not None:
                granted |= role.permissions
        return ALL_PERMISSIONS if granted & hikari.Permissions.ADMINISTRATOR else granted


def clean_text(text: str) -> str:
    """`text` without control, bidi-override and zero-width characters and line separators."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char for char in text if unicodedata.category(char) not in UNSEEN)


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
#: fan-out leaves the loop free for the larger part of the time.
REST_PER_COST: Final = 1.5
#: Bytes of one write; a longer burst goes out in several, so that a client that does read
#: can drain its socket in between and is never taken for a slow one.
MAX_WRITE_BYTES: Final = 131_072
MAX_ATTACHMENTS: Final = 8

Sid = str
Hidden = frozenset[Sid]
NOBODY: Final[Hidden] = frozenset()


def websocket_frame(payload: bytes) -> bytes:
    """One unmasked, final text frame (RFC 6455 §5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


class Frame(engineio_packet.Packet):  # type: ignore[misc]  # python-engineio has no types
    """An Engine.IO packet with its WebSocket frame, each encoded once for all recipients."""

    def __init__(self, packet_type: int, data: object = None) -> None:
        super().__init__(packet_type, data)
        self.bytes = websocket_frame(self.encode().encode())


def event_frame(event: str, payload: object) -> Frame:
    """A Socket.IO EVENT in the main namespace (Socket.IO protocol v5)."""
    return Frame(engineio_packet.MESSAGE, "2" + msgspec.json.encode([event, payload]).decode())


PING: Final = Frame(engineio_packet.PING)
NOOP: Final = Frame(engineio_packet.NOOP)
CLOSE: Final = Frame(engineio_packet.CLOSE)
PROBE: Final = "2probe"
PROBED: Final = "3probe"
UPGRADE: Final = "5"


class Session(engineio.async_socket.AsyncSocket):  # type: ignore[misc]  # python-engineio has no types
    """One Engine.IO session: polls are answered by python-engineio, a WebSocket is written to at once.

    While the client polls or upgrades, packets wait in `queue`; once its WebSocket is attached
    they go straight to the socket, and what the kernel does not take waits in Tornado's stream.
    Either way no more than `max_queue_bytes` wait, or the client is cut off.
    """

    def __init__(self, engine: Engine, sid: str, address: str) -> None:
        super().__init__(engine, sid)
        self.address = address
        self.handler: WebSocketHandler | None = None
        self._stream: IOStream | None = None
        self._waiting = 0  # bytes in the queue
        self._ending = False  # closed as soon as a poll has fetched what waits
        self._awaits_pong = False
        self._timer: asyncio.TimerHandle | None = None

    # -- to the client

    async def send(self, pkt: engineio_packet.Packet) -> None:
        """What the libraries call for each packet."""
        frame = pkt if isinstance(pkt, Frame) else Frame(pkt.packet_type, pkt.data)
        self.write((frame,), frame.bytes)

    def write(self, frames: Sequence[Frame], data: bytes) -> None:
        """Send `frames`; `data` is their WebSocket frames joined. Never waits, never raises."""
        if self.closed:
            return
        stream = self._stream
        if stream is None:
            self._enqueue(frames, len(data))
            return
        rest: bytes | memoryview = data
        try:
            if not stream.writing():
                # The price of IOStream.write is three times that of the system call below.
                sent = stream.socket.send(data)
                if sent == len(data):
                    return
                rest = memoryview(data)[sent:]
        except BlockingIOError:
            pass
        except (OSError, AttributeError):  # AttributeError: the stream has given up its socket
            self._lose()
            return
        self._write_later(stream, rest)

    def _write_later(self, stream: IOStream, data: bytes | memoryview) -> None:
        try:
            stream.write(data)
        except StreamBufferFullError:
            self.cut("too slow")
        except StreamClosedError:
            self._lose()

    def _enqueue(self, frames: Sequence[Frame], size: int) -> None:
        self._waiting += size
        if self._waiting > self.server.max_queue_bytes:
            self.cut("too slow")
            return
        for frame in frames:
            self.queue.put_nowait(frame)

    async def poll(self) -> list[engineio_packet.Packet]:
        """All that waits for a polling client; returns once there is something."""
        packets: list[engineio_packet.Packet] = await super().poll()
        self._waiting = 0
        if self._ending:
            self._lose()
        return packets

    # -- from the client

    async def feed(self, message: str | bytes) -> None:
        """Take one Engine.IO packet; a malformed one ends the session, as it does in Node's."""
        try:
            await self.receive(engineio_packet.Packet(encoded_packet=message))
        except (ValueError, IndexError, engineio.exceptions.UnknownPacketError):
            self.cut("malformed packet")

    async def handle_post_request(self, environ: dict[str, Any]) -> None:
        """Take the packets of one poll's POST, however many fit into `max_message_bytes`."""
        try:
            body = (await environ["wsgi.input"].read()).decode()
        except UnicodeDecodeError:
            self.cut("malformed packet")
            return
        for message in body.split("\x1e"):
            await self.feed(message)

    async def feed_probe(self, handler: WebSocketHandler, message: str | bytes) -> None:
        """The upgrade from polling (Engine.IO protocol v4, Upgrade): 2probe, 3probe, 5."""
        if message == PROBE and not self.upgraded:
            self.upgrading = True  # polls are answered with NOOP from now on
            handler.write_message(PROBED)
            self.queue.put_nowait(NOOP)  # ends the poll that waits
        elif message == UPGRADE and self.upgrading:
            self.attach(handler)
        else:
            handler.close()

    def attach(self, handler: WebSocketHandler) -> None:
        """From now on this WebSocket is the transport; what waited goes first."""
        assert handler.ws_connection is not None
        self.connected = self.upgraded = True
        self.upgrading = False
        self.handler = handler
        stream: IOStream = handler.ws_connection.stream  # type: ignore[assignment]  # set once open
        stream.max_write_buffer_size = self.server.max_queue_bytes
        self._stream = stream
        self._waiting = 0
        while not self.queue.empty():
            frame = self.queue.get_nowait()
            if frame is not None:
                self.write((frame,), frame.bytes)
        self.queue.put_nowait(None)  # a poll that still waits returns empty

    def detach(self, handler: WebSocketHandler) -> None:
        """This WebSocket is gone: with it the session, or only the attempt to upgrade."""
        if handler is self.handler:
            self._lose()
        else:
            self.upgrading = False

    # -- heartbeat: one timer, no task

    def schedule_ping(self) -> None:
        """Ping after the interval; the library calls this at the start and for each PONG."""
        if self._timer is not None:
            if not self._awaits_pong:
                return  # a PONG that nobody asked for
            self._timer.cancel()
        self._awaits_pong = False
        self._timer = asyncio.get_running_loop().call_later(self.server.ping_interval, self._ping)

    def _ping(self) -> None:
        self._awaits_pong = True
        self.write((PING,), PING.bytes)
        self._timer = asyncio.get_running_loop().call_later(
            self.server.ping_timeout, self._lose, self.server.reason.PING_TIMEOUT
        )

    # -- the end

    def end(self) -> None:
        """Close the transport once the client has had what was sent to it so far."""
        if self._stream is not None:
            self._lose(self.server.reason.SERVER_DISCONNECT)
        elif not self._ending:
            self._ending = True
            self.queue.put_nowait(CLOSE)
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(
                self.server.ending_timeout, self._lose
            )

    def cut(self, reason: str) -> None:
        """Drop the client now, without waiting for it; the reason is logged."""
        if not self.closed and not self.closing:
            log.info("client %s cut off: %s", self.address, reason)
            if self._stream is not None:
                self._stream.close()
            self._lose()

    def _lose(self, reason: str | None = None) -> None:
        reason = reason or self.server.reason.TRANSPORT_CLOSE
        self.server.start_background_task(self.close, False, True, reason)

    async def close(
        self, wait: bool = True, abort: bool = False, reason: str | None = None
    ) -> None:
        """End the session and its transport; tells Socket.IO once."""
        if self.closed or self.closing:
            return
        await super().close(wait=False, abort=True, reason=reason)
        self.server.sockets.pop(self.sid, None)
        if self._timer is not None:
            self._timer.cancel()
        if self.handler is not None:
            self.handler.close()
        else:
            self.queue.put_nowait(CLOSE)  # for a poll that still waits


class Engine(engineio.AsyncServer):  # type: ignore[misc]  # python-engineio has no types
    """The Engine.IO server; its sessions are `Session`s."""

    #: Seconds that a polling client has to fetch its last packets before it is forgotten.
    ending_timeout = 5.0

    def __init__(self, *, max_queue_bytes: int, **options: Any) -> None:
        super().__init__(**options)
        self.max_queue_bytes = max_queue_bytes

    async def admit(self, address: str, transport: str) -> Session:
        """A new session, its OPEN packet already under way."""
        session = Session(self, self.generate_id(), address)
        self.sockets[session.sid] = session
        hello = {
            "sid": session.sid,
            "upgrades": self._upgrades(session.sid, transport),
            "pingInterval": int(self.ping_interval * 1000),
            "pingTimeout": int(self.ping_timeout * 1000),
            "maxPayload": self.max_http_buffer_size,
        }
        await session.send(Frame(engineio_packet.OPEN, hello))
        await self._trigger_event("connect", session.sid, {}, run_async=False)
        session.schedule_ping()
        return session

    async def _handle_connect(
        self, environ: dict[str, Any], transport: str, jsonp_index: int | None = None
    ) -> Any:
        """A first poll, by the library's `handle_request`."""
        session = await self.admit(environ["tornado.handler"].address, transport)
        session.connected = True
        return self._ok(await session.poll(), jsonp_index=jsonp_index)


class SocketIO(socketio.AsyncServer):  # type: ignore[misc]  # python-socketio has no types
    """The Socket.IO server. Bad packets end their session and reserved events are refused."""

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
            log.debug("malformed Socket.IO packet: %r", error)
            self._cut(eio_sid)
        half_done = self._binary_packet.get(eio_sid)
        if half_done is not None and half_done.attachment_count > MAX_ATTACHMENTS:
            del self._binary_packet[eio_sid]
            self._cut(eio_sid)

    def _cut(self, eio_sid: str) -> None:
        session = self.eio.sockets.get(eio_sid)
        if session is not None:
            session.cut("malformed packet")

    async def _handle_event(self, eio_sid: str, namespace: str, ack: int, data: Any) -> None:
        """Stock python-socketio would let a client call handlers with arguments of its choice."""
        if data[0] in (*self.reserved_events, "*"):
            data = [f"{data[0]} (reserved)", *data[1:]]
        await super()._handle_event(eio_sid, namespace, ack, data)


def library_log(name: str) -> logging.Logger:
    """A log for a library that reports clients' mistakes as errors: only its bugs get through.

    Handed to the library, it also keeps it from installing a handler of its own.
    """
    logger = logging.getLogger(f"spywatcher.{name}")
    logger.setLevel(logging.ERROR)
    logger.filters = [lambda record: bool(record.exc_info)]
    return logger


class Room:
    """Who listens to one room, and what waits to be written to them.

    The first event of a burst leaves at once. What comes in the same turn of the loop is joined
    into one write per client, and after such a write the room rests in proportion to its cost,
    never over `max_delay`: so a flood shares writes and a single event is never held.
    """

    def __init__(self, max_delay: float) -> None:
        self.members: dict[Sid, Session] = {}
        self._max_delay = max_delay
        self._pending: list[tuple[Frame, Hidden]] = []
        self._timer: asyncio.Handle | None = None

    def send(self, frame: Frame, hidden: Hidden) -> None:
        self._pending.append((frame, hidden))
        if self._timer is None:
            self._flush()

    def drain(self) -> None:
        """Write all that waits, now: what came before a join or a leave is for those of before."""
        while self._pending:
            deliver(self._next_batch(), self.members)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        self._timer = None
        batch = self._next_batch()
        if not batch:
            return
        started = time.perf_counter()
        deliver(batch, self.members)
        cost = time.perf_counter() - started
        loop = asyncio.get_running_loop()
        if len(batch) == 1 or self._pending:
            self._timer = loop.call_soon(self._flush)
        else:
            rest = min(cost * REST_PER_COST, self._max_delay)
            self._timer = loop.call_later(rest, self._flush)

    def _next_batch(self) -> list[tuple[Frame, Hidden]]:
        """What waits, up to MAX_WRITE_BYTES, at least one."""
        size = 0
        for count, (frame, _) in enumerate(self._pending):
            size += len(frame.bytes)
            if size > MAX_WRITE_BYTES and count:
                batch, self._pending = self._pending[:count], self._pending[count:]
                return batch
        batch, self._pending = self._pending, []
        return batch


def deliver(batch: Sequence[tuple[Frame, Hidden]], members: dict[Sid, Session]) -> None:
    """Write a batch to each member, without the frames that are hidden from it."""
    restricted = {hidden for _, hidden in batch if hidden}
    if not restricted:
        frames = [frame for frame, _ in batch]
        data = b"".join(frame.bytes for frame in frames)
        for session in members.values():
            session.write(frames, data)
        return
    views: dict[frozenset[int], tuple[list[Frame], bytes]] = {}
    for sid, session in members.items():
        blind = frozenset(number for number, hidden in enumerate(restricted) if sid in hidden)
        if blind not in views:
            frames = [frame for frame, hidden in batch if sid not in hidden]
            views[blind] = frames, b"".join(frame.bytes for frame in frames)
        frames, data = views[blind]
        if frames:
            session.write(frames, data)


class Rooms(socketio.AsyncManager):  # type: ignore[misc]  # python-socketio has no types
    """Who is in which room. May sit under a pub/sub manager: `emit` is local delivery.

    The stock manager keeps a two-way map per room and one more room per client, and walks all
    of them whenever a client leaves; this one knows each client's rooms.
    """

    def __init__(self, max_delay: float) -> None:
        super().__init__()
        self._max_delay = max_delay
        self._rooms: dict[str, Room] = {}
        self._rooms_of: dict[Sid, set[str]] = {}

    def members(self, room: str) -> Iterable[Sid]:
        return tuple(self._rooms[room].members) if room in self._rooms else ()

    def rooms_of(self, sid: Sid) -> frozenset[str]:
        return frozenset(self._rooms_of.get(sid, ()))

    def broadcast(
        self, room: str, event: str, payload: object, hidden: Callable[[], Hidden] | None = None
    ) -> None:
        """Send an event to all in a room but the `hidden`; costs nothing where nobody listens."""
        target = self._rooms.get(room)
        if target is not None:
            target.send(event_frame(event, payload), hidden() if hidden else NOBODY)

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
        if room in self._rooms and callback is None:
            skipped = [skip_sid] if isinstance(skip_sid, str) else skip_sid or ()
            self.broadcast(room, event, data, lambda: frozenset(skipped))
        else:
            await super().emit(event, data, namespace, room, skip_sid, callback, **kwargs)

    async def leave_room(self, sid: Sid, namespace: str, room: str) -> None:
        """As a client wishes: it still gets what came before."""
        if room in self._rooms_of.get(sid, ()):
            self._rooms[room].drain()
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
                target = self._rooms.setdefault(room, Room(self._max_delay))
                target.drain()
                target.members[sid] = session
                self._rooms_of.setdefault(sid, set()).add(room)

    def basic_leave_room(self, sid: Sid, namespace: str, room: str | None) -> None:
        if room is None:
            super().basic_leave_room(sid, namespace, room)
            return
        self._rooms_of.get(sid, set()).discard(room)
        target = self._rooms.get(room)
        if target is not None:
            target.members.pop(sid, None)
            if not target.members:
                target.close()
                del self._rooms[room]

    def basic_disconnect(self, sid: Sid, namespace: str, **kwargs: Any) -> None:
        for room in self._rooms_of.pop(sid, ()):
            self.basic_leave_room(sid, namespace, room)
        self.basic_leave_room(sid, namespace, None)
        self.callbacks.pop(sid, None)
        for pending in (self.pending_connect, self.pending_disconnect):
            if sid in pending.get(namespace, ()):
                pending[namespace].remove(sid)

    def basic_close_room(self, room: str, namespace: str) -> None:
        for sid in self.members(room):
            self.basic_leave_room(sid, namespace, room)

    def get_rooms(self, sid: Sid, namespace: str) -> list[str]:
        return [sid, *self._rooms_of.get(sid, ())]

    def get_participants(self, namespace: str, room: Any) -> Iterator[tuple[Sid, str]]:
        everyone = self.rooms.get(namespace, {}).get(None, {})
        if room in everyone:
            yield room, everyone[room]
        else:
            for sid in everyone if room is None else self.members(room):
                yield sid, everyone[sid]


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


class Spy:
    """What a plugin is handed: its settings, its log, the bot, and the way to the dashboards."""

    def __init__(
        self, name: str, settings: Any, bot: hikari.GatewayBot, emit: Callable[..., None]
    ) -> None:
        #: The `[plugin.NAME]` table: the plugin's `Settings`, or a dict if it has none.
        self.settings = settings
        #: A logger that names the plugin.
        self.log = logging.getLogger(f"spywatcher.plugin.{name}")
        #: hikari's bot: cache and REST.
        self.bot = bot
        self._emit = emit

    def emit(
        self,
        event: str,
        guild_id: int | str,
        payload: Payload | dict[str, Any],
        room: str = "guild",
    ) -> None:
        """Send an event to the room `room:guild_id`, as returning it from a listener does."""
        self._emit(event, str(int(guild_id)), payload, room)


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
        self.settings = self._check_settings(table)
        self.listeners = [
            (function, listener)
            for function in vars(module).values()
            if getattr(function, "__module__", None) == module.__name__
            for listener in getattr(function, "__listeners__", ())
        ]
        self.events = {listener.emit for _, listener in self.listeners if listener.emit}
        self.kinds = {listener.room for _, listener in self.listeners if listener.emit}
        reserved = self.events & RESERVED_EVENTS
        if reserved:
            raise PluginError(f"the event name {min(reserved)} is reserved")

    def _check_settings(self, table: dict[str, Any]) -> Any:
        form = vars(self.module).get("Settings")
        if form is None:
            return table
        faults: list[str] = []
        settings = check_table(table, form, f"plugin.{self.name}", faults)
        if faults:
            raise OperatorError(*faults)
        return settings


class PluginHost:
    """All plugins. One that fails to load, raises or breaks the contract is named; the rest go on."""

    def __init__(
        self, settings: PluginsSettings, tables: dict[str, dict[str, Any]], folder: Path
    ) -> None:
        self._folders = [folder / name for name in settings.folders]
        self._disabled = frozenset(settings.disabled)
        self._tables = tables
        self._spies: dict[str, Spy] = {}
        self._subscriptions: list[tuple[type[hikari.Event], Any]] = []
        self.plugins: dict[str, Plugin] = {}
        self.failures: dict[str, BaseException] = {}

    # -- loading

    def load(self) -> None:
        """Load every plugin of the folders, in the order of their names.

        Raises OperatorError for a missing folder and for wrong `[plugin.NAME]` tables; a
        plugin that fails is in `failures` afterwards.
        """
        faults: list[str] = []
        for name, path in sorted(self._find().items()):
            try:
                self.plugins[name] = self._load(name, path)
            except OperatorError as error:
                faults += error.faults
            except (Exception, SystemExit) as error:  # nothing a plugin does may end the server
                self.failures[name] = error
                log.error("plugin %s not loaded: %s", name, error, exc_info=traceback_of(error))
        known = {*self.plugins, *self.failures, *self._disabled}
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
            if not folder.is_dir():
                raise OperatorError(f"plugins.folders: {folder} is no folder")
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

    async def start(
        self,
        bot: hikari.GatewayBot,
        emit: Callable[[str, str, dict[str, Any], str], None],
        settled: Callable[[], bool],
    ) -> None:
        """Set up each plugin and let it hear hikari's events; `emit` is the way to the rooms."""
        self._bot, self._emit, self._settled = bot, emit, settled
        for plugin in list(self.plugins.values()):
            await self._start(plugin)

    async def _start(self, plugin: Plugin) -> None:
        def emit(event: str, guild_id: str, payload: Payload | dict[str, Any], room: str) -> None:
            self._claim(plugin, event)
            self._emit(event, guild_id, finish_payload(payload, guild_id), room)

        spy = Spy(plugin.name, plugin.settings, self._bot, emit)
        try:
            await self._run_hook(plugin, "setup", spy)
        except Exception as error:  # as in load
            self.failures[plugin.name] = error
            del self.plugins[plugin.name]
            log.error("plugin %s: setup failed", plugin.name, exc_info=traceback_of(error))
            return
        self._spies[plugin.name] = spy
        for function, listener in plugin.listeners:
            callback = self._callback(plugin, spy, function, listener)
            self._bot.event_manager.subscribe(listener.event_type, callback)
            self._subscriptions.append((listener.event_type, callback))

    async def stop(self) -> None:
        """Stop hearing events and tear the plugins down."""
        for event_type, callback in self._subscriptions:
            self._bot.event_manager.unsubscribe(event_type, callback)
        self._subscriptions.clear()
        for name, spy in self._spies.items():
            try:
                await self._run_hook(self.plugins[name], "teardown", spy)
            except Exception as error:  # as in load
                log.error("plugin %s: teardown failed", name, exc_info=traceback_of(error))
        self._spies.clear()

    @staticmethod
    async def _run_hook(plugin: Plugin, hook: str, spy: Spy) -> None:
        function = vars(plugin.module).get(hook)
        if function is not None:
            await function(spy)

    def _claim(self, plugin: Plugin, event: str) -> None:
        if event in plugin.events:
            return
        owner = next((other for other in self.plugins.values() if event in other.events), None)
        if owner is not None or event in RESERVED_EVENTS:
            whose = f"belongs to plugin {owner.name}" if owner else "is reserved"
            raise PluginError(f"plugin {plugin.name} may not emit {event}, which {whose}")
        plugin.events.add(event)

    def _callback(
        self, plugin: Plugin, spy: Spy, function: Callable[..., Any], listener: Listener
    ) -> Callable[[hikari.Event], Coroutine[Any, Any, None]]:
        """What hikari calls: the plugin's function, fenced in."""
        arguments = (spy,) if len(inspect.signature(function).parameters) > 1 else ()

        async def callback(event: hikari.Event) -> None:
            try:
                result = function(event, *arguments)
                if inspect.isawaitable(result):
                    result = await result
                held_back = listener.settled and not self._settled()
                if result is not None and listener.emit is not None and not held_back:
                    spy.emit(listener.emit, guild_of(event), result, listener.room)
            except Exception as error:  # as in load
                log.error(
                    "plugin %s: %s failed on %s",
                    plugin.name,
                    function.__name__,
                    type(event).__name__,
                    exc_info=traceback_of(error),
                )

        return callback


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


def stopping() -> bool:
    """Whether the task that asks was cancelled, even if a library did not pass that on."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Gateway:
    """Keeps one bot connected to Discord, and says so in the log whenever that changes."""

    def __init__(
        self, settings: DiscordSettings, token: str, wanted: dict[type[hikari.Event], list[str]]
    ) -> None:
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
                    await self.bot.start(check_for_updates=False)
                    if stopping():
                        return  # hikari 2.7 swallows a cancellation that comes as it gets ready
                    delays = itertools.chain([FIRST_RETRY], self._growing_delays())
                    await self.bot.join()
                except hikari.HikariError as error:
                    self._refuse_if_final(error)
                    self._away(str(error))
                except (OSError, RuntimeError, TimeoutError) as error:
                    self._away(str(error) or type(error).__name__)
                await self._close()
                await asyncio.sleep(next(delays))
        finally:
            self._reported_away = True  # the end is no news
            await self._close()

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
        self._back(f"a new session, guilds: {len(event.unavailable_guilds)}")

    async def _on_resumed(self, event: hikari.ShardResumedEvent) -> None:
        self._back("session resumed, nothing missed")

    async def _on_disconnected(self, event: hikari.ShardDisconnectedEvent) -> None:
        self._away("the connection was lost")

    def _back(self, how: str) -> None:
        self.connected, self._reported_away = True, False
        log.info("connected to Discord: %s", how)

    def _away(self, why: str) -> None:
        self.connected = False
        if not self._reported_away:
            self._reported_away = True
            log.warning("not connected to Discord (%s); dashboards stay up, trying again", why)


# ------------------------------------------------------------------------- web handlers
# The Tornado side of Socket.IO: which requests get through, and the bytes of a WebSocket
# handed to its session. Bounds and refusals come before any work.


class Origins:
    """Which pages may connect: the same host, or one that is listed; "https://*.host" is any below."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._any = "*" in patterns
        self._exact = frozenset(patterns)
        self._below = tuple(
            tuple(pattern.split("*", 1)) for pattern in patterns if "://*." in pattern
        )

    def allow(self, origin: str | None, host: str) -> bool:
        """`origin` and `host` as in the request's headers (RFC 6454; absent outside of browsers)."""
        if origin is None or self._any or origin in self._exact:
            return True
        scheme, _, rest = origin.partition("://")
        if scheme in ("http", "https") and rest.lower() == host.lower():
            return True
        return any(origin.startswith(start) and origin.endswith(end) for start, end in self._below)


class SocketHandler(WebSocketHandler):
    """One request of a Socket.IO client: a poll, or its WebSocket."""

    def initialize(self, engine: Engine, origins: Origins) -> None:
        self._engine = engine
        self._origins = origins
        self._session: Session | None = None

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Cache-Control", "no-store")

    def prepare(self) -> None:
        """Refuse foreign pages before anything is spent on them."""
        self.address = self.request.remote_ip or "unknown"
        origin = self.request.headers.get("Origin")
        if not self._origins.allow(origin, self.request.host):
            self._refuse(403, "This origin is not allowed")
        elif origin is not None:
            self.set_header("Access-Control-Allow-Origin", origin)
            self.set_header("Access-Control-Allow-Credentials", "true")
            self.set_header("Vary", "Origin")

    def check_origin(self, origin: str) -> bool:
        return True  # `prepare` has done it, for polls too

    def check_xsrf_cookie(self) -> None:
        """There are no cookies to forge with."""

    async def get(self, *args: Any, **kwargs: Any) -> None:
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            await self._engine.handle_request(self)
        elif fault := self._websocket_fault():
            self._refuse(400, fault)
        else:
            await super().get(*args, **kwargs)

    async def post(self) -> None:
        await self._engine.handle_request(self)

    def options(self) -> None:
        """CORS preflight (Fetch standard)."""
        self.set_header("Access-Control-Allow-Methods", "GET, POST")
        self.set_header("Access-Control-Allow-Headers", "Content-Type")
        self.set_status(204)

    def _websocket_fault(self) -> str | None:
        sid = self.get_query_argument("sid", None)
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

    def _refuse(self, status: int, message: str) -> None:
        self.set_status(status)
        self.finish({"message": message})

    async def open(self, *args: str, **kwargs: str) -> None:
        sid = self.get_query_argument("sid", None)
        if sid is None:
            self._session = await self._engine.admit(self.address, "websocket")
            self._session.attach(self)
        elif sid in self._engine.sockets:
            self._session = self._engine.sockets[sid]
        else:
            self.close()

    async def on_message(self, message: str | bytes) -> None:
        session = self._session
        if session is None or session.closed:
            return
        if session.handler is self:
            await session.feed(message)
        else:
            await session.feed_probe(self, message)

    def on_close(self) -> None:
        if self._session is not None:
            self._session.detach(self)
            self._session = None

    def log_exception(self, *args: Any) -> None:
        log.error("a request failed", exc_info=args)


class NotFoundHandler(RequestHandler):
    """Everything that is not served."""

    def set_default_headers(self) -> None:
        self.clear_header("Server")

    def prepare(self) -> None:
        self.set_status(404)
        self.finish({"message": "Not found"})


class WebServer(HTTPServer):
    """Tornado's, with TCP_NODELAY: without it two small writes in a row stall for 40 ms."""

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        with contextlib.suppress(OSError, StreamClosedError):  # it may have gone already
            stream.set_nodelay(True)
        super().handle_stream(stream, address)


# ------------------------------------------------------------------------------- server
# Puts the parts together. This section and the command line are the only ones that know
# them all: the dashboards' requests, the way of an event to its room, start and stop.

EVENT_SHOWN: Final = 40


class Dashboards:
    """Answers what dashboards say: who comes in, and what they subscribe to (API page; design: rooms)."""

    def __init__(
        self,
        sio: SocketIO,
        rooms: Rooms,
        tokens: Tokens,
        access: Access,
        kinds: Callable[[], frozenset[str]],
    ) -> None:
        self._sio = sio
        self._rooms = rooms
        self._tokens = tokens
        self._access = access
        self._kinds = kinds
        self._viewers: dict[Sid, Viewer] = {}
        sio.on("connect", self._connect)
        sio.on("disconnect", self._disconnect)
        sio.on("*", self._request)
        sio.on("connect", self._refuse_namespace, namespace="*")

    async def _connect(self, sid: Sid, environ: dict[str, Any], auth: object) -> None:
        token = auth.get("token") if isinstance(auth, dict) else None
        try:
            self._viewers[sid] = self._tokens.verify(token)
        except RefusedConnectionError as refusal:
            self._end_soon(sid)
            raise SocketIORefusal(refusal.message, refusal.data or None) from refusal

    async def _refuse_namespace(
        self, namespace: str, sid: Sid, environ: dict[str, Any], auth: object
    ) -> NoReturn:
        raise SocketIORefusal("Invalid namespace")

    async def _disconnect(self, sid: Sid, reason: str) -> None:
        self._viewers.pop(sid, None)

    def _end_soon(self, sid: Sid) -> None:
        """Close the transport once the library has sent its refusal, which it does in this turn."""
        session = self._sio.session_of(sid)
        if session is not None:
            asyncio.get_running_loop().call_soon(session.end)

    async def _request(self, event: object, sid: Sid, *args: object) -> dict[str, Any]:
        try:
            return {"ok": True, **await self._answer(event, sid, args)}
        except ClientError as error:
            self._tell(sid, "error", error.to_wire())
            return {"ok": False, "error": error.to_wire()}

    async def _answer(self, event: object, sid: Sid, args: tuple[object, ...]) -> dict[str, Any]:
        if event == "guilds:list":
            return {"guilds": self._access.guilds_of(self._viewers[sid])}
        verb, _, kind = event.partition(":") if isinstance(event, str) else ("", "", "")
        if kind in self._kinds() and verb == "subscribe":
            return {"room": await self._subscribe(sid, kind, guild_argument(args))}
        if kind in self._kinds() and verb == "unsubscribe":
            room = f"{kind}:{guild_argument(args)}"
            await self._rooms.leave_room(sid, NAMESPACE, room)
            return {"room": room}
        raise ClientError("unknown_event", f"Unknown event: {shown(event)[:EVENT_SHOWN]}")

    async def _subscribe(self, sid: Sid, kind: str, guild_id: str) -> str:
        if not self._access.may_view(self._viewers[sid], guild_id):
            raise ClientError("forbidden", f"No access to guild {guild_id}")
        room = f"{kind}:{guild_id}"
        await self._rooms.enter_room(sid, NAMESPACE, room)
        return room

    def _tell(self, sid: Sid, event: str, payload: object) -> None:
        session = self._sio.session_of(sid)
        if session is not None:
            frame = event_frame(event, payload)
            session.write((frame,), frame.bytes)


def guild_argument(args: tuple[object, ...]) -> str:
    """The one argument of a subscription: a guild id, a string of 1 to 20 digits."""
    if len(args) > 1:
        raise ClientError("bad_request", f"Expected one argument, the guild id; got {len(args)}")
    guild_id = args[0] if args else None
    if (
        isinstance(guild_id, str)
        and len(guild_id) <= 20
        and guild_id.isascii()
        and guild_id.isdigit()
    ):
        return guild_id
    came = "a binary value" if isinstance(guild_id, bytes) else shown(guild_id)[:EVENT_SHOWN]
    raise ClientError("invalid_guild", f"Expected a guild id, a string of 1-20 digits; got {came}")


class Server:
    """All the parts of one process, made from settings; `async with` starts and stops them."""

    def __init__(self, settings: Settings, *, secret: str, token: str) -> None:
        self._settings = settings
        self.plugins = PluginHost(settings.plugins, settings.plugin, settings.folder)
        self.plugins.load()
        self.gateway = Gateway(settings.discord, token, self.plugins.event_types())
        self.access = Access(settings.auth, settings.discord.guilds, self.gateway.bot.cache)
        self.tokens = Tokens(secret, settings.auth.algorithms)
        self.rooms = Rooms(settings.fanout.max_delay)
        self.socketio = SocketIO(
            client_manager=self.rooms,
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
            logger=library_log("socketio"),
            engineio_logger=library_log("engineio"),
        )
        self.dashboards = Dashboards(
            self.socketio, self.rooms, self.tokens, self.access, lambda: self.plugins.kinds
        )
        self.web = self._make_web()
        self.port = 0
        self._gateway_task: asyncio.Task[None] | None = None

    def _make_web(self) -> WebServer:
        limit = self._settings.server.max_message_bytes
        origins = Origins(self._settings.server.cors_origins)
        application = Application(
            [(r"/socket\.io/", SocketHandler, {"engine": self.socketio.eio, "origins": origins})],
            default_handler_class=NotFoundHandler,
            log_function=lambda handler: None,
            websocket_max_message_size=limit,
        )
        return WebServer(application, max_body_size=limit, max_header_size=16_384)

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
        await self.plugins.start(self.gateway.bot, self.emit, self.gateway.settled)
        server = self._settings.server
        try:
            sockets = bind_sockets(server.port, server.host, backlog=1024)
        except OSError as error:
            raise OperatorError(
                f"server.port: cannot listen on {server.host}:{server.port}: {error.strerror}"
            ) from error
        self.web.add_sockets(sockets)
        self.port = sockets[0].getsockname()[1]
        self._gateway_task = asyncio.create_task(self.gateway.run(), name="gateway")
        log.info("listening on http://%s:%d", server.host, self.port)

    async def wait_closed(self) -> None:
        """Returns never; raises UpstreamError once Discord refuses us for good."""
        assert self._gateway_task is not None
        await self._gateway_task

    async def stop(self) -> None:
        """Close every connection so that clients come back by themselves, then all else."""
        self.web.stop()
        if self._gateway_task is not None:
            self._gateway_task.cancel()
            with contextlib.suppress(asyncio.CancelledError, UpstreamError):
                await self._gateway_task
        await self.plugins.stop()
        await self._close_sessions()
        await self.web.close_all_connections()

    async def _close_sessions(self) -> None:
        closing = [session.close() for session in self.socketio.eio.sockets.copy().values()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.server.shutdown_grace):
                await asyncio.gather(*closing)

    def emit(self, event: str, guild_id: str, payload: dict[str, Any], room: str) -> None:
        """The last step of an event: from a plugin to those in the room who may see it."""
        if self.access.watches(guild_id):
            self.rooms.broadcast(f"{room}:{guild_id}", event, payload)


# ------------------------------------------------------------------------- command line
# Parse, check, build, run. Exit status 0: a clean stop; 2: the operator has something to
# change, said in one line per fault; 1: anything else, with its traceback.

EXIT_OPERATOR: Final = 2
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
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """One event a line; what a client sent cannot begin a line of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        record.message = record.message.replace("\n", "\\n").replace("\r", "\\r")
        return super().formatMessage(record)


def set_up_logging(settings: LogSettings) -> None:
    """Log to stderr. hikari tells of each attempt to reconnect; `Gateway` says it once per change."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    if settings.level != "debug":
        logging.getLogger("hikari").setLevel(logging.ERROR)
        logging.getLogger("hikari.gateway").setLevel(logging.CRITICAL)


def parse_ttl(text: str) -> float:
    """`90`, `90s`, `15m`, `12h` or `30d`, in seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in TTL_UNITS else (text, "s")
    if not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected e.g. 90s, 15m, 12h or 30d")
    return float(int(number) * TTL_UNITS[unit])


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
    return parser.parse_args(arguments)


def secret_of(settings: Settings) -> str:
    auth = settings.auth
    return read_secret(auth.secret, auth.secret_file, settings.folder, "auth.secret")


def serve_command(settings: Settings, arguments: argparse.Namespace) -> None:
    secret = secret_of(settings)
    discord = settings.discord
    token = read_secret(discord.token, discord.token_file, settings.folder, "discord.token")
    if not secret or not token:
        raise OperatorError(
            "auth.secret and discord.token must both be set (or auth.secret_file and"
            " discord.token_file); to look around without a bot: python spywatcher.py demo"
        )
    run_until_stopped(run_server(Server(settings, secret=secret, token=token)))


def check_command(settings: Settings, arguments: argparse.Namespace) -> None:
    """Print the settings in force and the plugins; any plugin that does not load is a fault."""
    host = PluginHost(settings.plugins, settings.plugin, settings.folder)
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
            lines.append(f"{name}.{key} = {'(set, not shown)' if hidden else shown(value)}")
    return "\n".join(lines)


def token_command(settings: Settings, arguments: argparse.Namespace) -> None:
    secret = secret_of(settings)
    if not secret:
        raise OperatorError("auth.secret: not set, expected the key that signs tokens")
    tokens = Tokens(secret, settings.auth.algorithms)
    print(tokens.issue(arguments.discord_id, arguments.role, arguments.guild, arguments.ttl))


def demo_command(settings: Settings, arguments: argparse.Namespace) -> None:
    run_until_stopped(run_demo(settings, arguments.port))


async def run_demo(settings: Settings, port: int | None) -> None:
    """The whole product on loopback: pretend Discord, server, and a dashboard that prints."""
    import simulator  # needed by the demo alone; a server is deployed without it

    async with simulator.PretendDiscord() as discord:
        playing = asyncio.create_task(simulator.play(discord))
        secret = secrets.token_hex(32)
        replace = msgspec.structs.replace
        settings = replace(
            settings,
            server=replace(settings.server, port=settings.server.port if port is None else port),
            discord=DiscordSettings(rest_url=discord.rest_url, startup_grace=0.0),
        )
        server = Server(settings, secret=secret, token=discord.token)
        viewer = server.tokens.issue("1", role="ADMIN", ttl=86_400)
        watching = asyncio.create_task(print_events(server, viewer))
        try:
            await run_server(server)
        finally:
            playing.cancel()
            watching.cancel()


async def print_events(server: Server, token: str) -> None:
    """A dashboard in a terminal: what any Socket.IO client sees, one line an event."""
    client = socketio.AsyncClient(logger=False)
    client.on("*", lambda event, data: print(f"{event:18} {json.dumps(data, ensure_ascii=False)}"))
    await server.gateway.bot.event_manager.wait_for(hikari.GuildAvailableEvent, timeout=None)
    url = f"http://127.0.0.1:{server.port}"
    await client.connect(url, auth={"token": token}, transports=["websocket"])
    guilds = (await client.call("guilds:list"))["guilds"]
    print(DEMO_TEXT.format(url=url, token=token, guild=guilds[0]["id"]), flush=True)
    for guild in guilds:
        for kind in sorted(server.plugins.kinds):
            await client.emit(f"subscribe:{kind}", guild["id"])
    await client.wait()


DEMO_TEXT: Final = """
SpyWatcher is watching a pretend guild at {url}. A token for it, good for a day:

{token}

See it from Node (npm install socket.io-client), in a file demo.mjs:

import {{ io }} from "socket.io-client";
const socket = io("{url}", {{ auth: {{ token: "{token}" }} }});
socket.onAny((event, data) => console.log(event, data)).emit("subscribe:guild", "{guild}");

What this dashboard sees meanwhile (Ctrl+C stops it):
"""


async def run_server(server: Server) -> None:
    """Serve until a signal comes or Discord refuses us for good."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with server:
        closed = asyncio.create_task(server.wait_closed())
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([closed, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
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
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, build, run. Returns the exit status."""
    parsed = parse_arguments(arguments)
    try:
        settings = read_settings(parsed.config)
        set_up_logging(settings.log)
        parsed.command(settings, parsed)
    except OperatorError as error:
        print("\n".join(f"spywatcher: {fault}" for fault in error.faults), file=sys.stderr)
        return EXIT_OPERATOR
    except UpstreamError as error:
        print(f"spywatcher: {error}", file=sys.stderr)
        return EXIT_OPERATOR
    return 0


if __name__ == "__main__":
    # Plugins import `spywatcher`; without this they would get a second copy of this module,
    # and mark their functions for a host that does not exist.
    sys.modules["spywatcher"] = sys.modules["__main__"]
    sys.exit(main())
