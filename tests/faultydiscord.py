"""A Discord that fails in one place: whatever a REST answer or a step of the gateway can be but right.

    async with FaultyDiscord(Fault("rest", status(503))) as discord: ...
    discord.heal()

`Fault.place` is where: "rest" (GET /gateway/bot), "upgrade" (of the gateway's HTTP request), "hello",
"ready", "resumed", or "connected", right after READY or RESUMED. Until `heal`, what is right for that
place is left out and the fault's `act` is called instead, with the handler that has to answer.
"""

from __future__ import annotations

import asyncio
import collections
import inspect
import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import tornado.httpserver
import tornado.netutil
import tornado.web
import tornado.websocket

from simulator import Op, User, bot_id_of, guild_create_json, make_guild, make_token, snowflake

Act = Callable[[Any], Any]


class Fault(NamedTuple):
    place: str
    act: Act


class FaultyDiscord:
    """One bot of one guild, for the length of an `async with`."""

    def __init__(self, fault: Fault) -> None:
        self.token = make_token(snowflake())
        self.bot = User(bot_id_of(self.token), "watcher", bot=True)
        self.guild = make_guild("Night Owls", bot=self.bot)
        self.fault = fault
        self.healed = asyncio.Event()
        self.came: collections.Counter[str] = collections.Counter()
        self.sockets: set[FaultySocket] = set()
        self.port = 0

    @property
    def rest_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def gateway_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/gateway"

    def heal(self) -> None:
        """Nothing is wrong from now on."""
        self.healed.set()

    def fails(self, place: str) -> Act | None:
        """Count that the bot has come so far, and tell what it meets there."""
        self.came[place] += 1
        wrong = self.fault.place == place and not self.healed.is_set()
        return self.fault.act if wrong else None

    async def __aenter__(self) -> Self:
        place = {"discord": self}
        self._server = tornado.httpserver.HTTPServer(
            tornado.web.Application(
                [
                    (r"/api/gateway/bot", FaultyRest, place),
                    (r"/gateway/?", FaultySocket, place),
                ],
                log_function=lambda handler: None,
            )
        )
        [listener] = tornado.netutil.bind_sockets(0, "127.0.0.1")
        self.port = listener.getsockname()[1]
        self._server.add_sockets([listener])
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.heal()
        self._server.stop()
        for socket in tuple(self.sockets):
            socket.cut()
        await self._server.close_all_connections()


async def do(act: Act, handler: Any) -> None:
    result = act(handler)
    if inspect.isawaitable(result):
        await result


def gateway_info(discord: FaultyDiscord, **wrong: Any) -> dict[str, Any]:
    url = discord.gateway_url
    limit = {"total": 1000, "remaining": 1000, "reset_after": 1000, "max_concurrency": 1}
    return {"url": url, "shards": 1, "session_start_limit": limit} | wrong


class FaultyRest(tornado.web.RequestHandler):
    def initialize(self, discord: FaultyDiscord) -> None:
        self.discord = discord

    async def get(self) -> None:
        act = self.discord.fails("rest")
        if act is None:
            self.finish(gateway_info(self.discord))
        else:
            await do(act, self)

    def log_exception(self, *about: Any) -> None:
        """Whoever asked may have gone."""


class FaultySocket(tornado.websocket.WebSocketHandler):
    """One connection of the bot, compressed as hikari asks for (zlib-stream)."""

    def initialize(self, discord: FaultyDiscord) -> None:
        self.discord = discord
        self._deflate = zlib.compressobj()

    async def get(self, *args: Any, **kwargs: Any) -> None:
        act = self.discord.fails("upgrade")
        if act is None:
            await super().get(*args, **kwargs)
        else:
            await do(act, self)

    async def open(self, *args: str, **kwargs: str) -> None:
        self.discord.sockets.add(self)
        await self._at("hello", self.hello)

    def on_close(self) -> None:
        self.discord.sockets.discard(self)

    async def _at(self, place: str, right: Callable[[], None]) -> None:
        act = self.discord.fails(place)
        if act is None:
            right()
        else:
            await do(act, self)

    async def on_message(self, message: str | bytes) -> None:
        packet = json.loads(message)
        if packet["op"] == Op.HEARTBEAT:
            self.send({"op": Op.HEARTBEAT_ACK})
        elif packet["op"] == Op.IDENTIFY:
            await self._at("ready", self.ready)
        elif packet["op"] == Op.RESUME:
            await self._at("resumed", self.resumed)

    # what is right

    def hello(self) -> None:
        self.send({"op": Op.HELLO, "d": {"heartbeat_interval": 41_250}})

    def ready(self) -> None:
        self.dispatch("READY", ready_json(self.discord))
        self.dispatch("GUILD_CREATE", guild_create_json(self.discord.guild))
        self._go_on()

    def resumed(self) -> None:
        self.dispatch("RESUMED", {})
        self._go_on()

    def _go_on(self) -> None:
        act = self.discord.fails("connected")
        if act is not None:
            act(self)

    # how it is said

    def dispatch(self, name: Any, data: Any, seq: Any = 1) -> None:
        self.send({"op": Op.DISPATCH, "t": name, "s": seq, "d": data})

    def send(self, packet: Any) -> None:
        self.send_text(json.dumps(packet))

    def send_text(self, text: str) -> None:
        flushed = self._deflate.compress(text.encode()) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        self.send_bytes(flushed)

    def send_bytes(self, data: bytes | str) -> None:
        try:
            sent = self.write_message(data, binary=isinstance(data, bytes))
        except tornado.websocket.WebSocketClosedError:
            return
        sent.add_done_callback(lambda done: done.cancelled() or done.exception())

    def cut(self) -> None:
        """End the TCP connection without a word."""
        if self.ws_connection and self.ws_connection.stream:
            self.ws_connection.stream.close()
        elif not self._finished:
            self.detach().close()

    def log_exception(self, *about: Any) -> None:
        """Whoever asked may have gone."""


def ready_json(discord: FaultyDiscord, **wrong: Any) -> dict[str, Any]:
    return {
        "v": 10,
        "user": discord.bot.to_json() | {"verified": True, "mfa_enabled": True, "flags": 0},
        "guilds": [{"id": str(discord.guild.id), "unavailable": True}],
        "session_id": "s" * 32,
        "resume_gateway_url": discord.gateway_url,
        "shard": [0, 1],
        "application": {"id": str(discord.bot.id), "flags": 0},
    } | wrong
