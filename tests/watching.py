"""A running server in front of a pretend Discord, with dashboards, in one line.

    async def test_a_message_reaches_the_dashboard(spy):
        dashboard = await spy.dashboard()
        ada = await spy.discord.join(spy.guild, "ada")
        await spy.discord.message(spy.guild, ada, spy.guild.general)
        assert (await dashboard.next("message:new"))["username"] == "ada"

A test that needs other settings, or people who are there before the bot comes, asks for `watching`
(and `guild`) instead:

    ada = guild.add_member("ada")
    async with watching(plugin={"presence": {"alert_cooldown": 0.0}}) as spy: ...

Everything is real: hikari over a socket, Tornado on a free port, the stock JavaScript client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import tornado.websocket
from jsclient import DEADLINE, Dashboard, JavaScript
from service import merged, plain_tables, server_of
from tornado.httpclient import HTTPRequest
from waiting import within

from simulator import Guild, Member, PretendDiscord
from spywatcher import Server


class Watch:
    """A running server, the Discord it watches, and what it takes to connect dashboards to it."""

    def __init__(self, server: Server, discord: PretendDiscord, guild: Guild, js: JavaScript):
        self.server = server
        self.discord = discord
        self.guild = guild
        self.js = js
        self._sockets: list[tornado.websocket.WebSocketClientConnection] = []

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return f"127.0.0.1:{self.server.port}"

    @property
    def url(self) -> str:
        """What a page passes to `io(…)`."""
        return f"http://{self.address}"

    def token(
        self,
        viewer: Member | str = "1",
        *,
        role: str = "USER",
        guilds: Sequence[str] = (),
        ttl: float = 900.0,
    ) -> str:
        """A viewer's token; the viewer is a member, or any id."""
        discord_id = viewer if isinstance(viewer, str) else str(viewer.id)
        return self.server.tokens.issue(discord_id, role, guilds, ttl)

    async def connect(self, viewer: Member | str | None = None, **options: Any) -> Dashboard:
        """A connected dashboard: of this viewer, or of an admin. Options are those of `js.open`."""
        token = self.token(role="ADMIN") if viewer is None else self.token(viewer)
        return await self.js.connect(self.url, **{"token": token, **options})

    async def dashboard(
        self,
        viewer: Member | str | None = None,
        *,
        kinds: Sequence[str] = ("guild",),
        **options: Any,
    ) -> Dashboard:
        """Like `connect`, subscribed to these rooms of the guild."""
        dashboard = await self.connect(viewer, **options)
        for kind in kinds:
            answer = await dashboard.call(f"subscribe:{kind}", str(self.guild.id))
            assert answer == {"ok": True, "room": f"{kind}:{self.guild.id}"}
        if "guild" in kinds and self._greets:
            await dashboard.next("presence:snapshot")
        return dashboard

    @property
    def _greets(self) -> bool:
        """Whether a subscriber is told who is there."""
        return "presence" in self.server.plugins.plugins

    async def nothing(self, dashboard: Dashboard, *names: str) -> None:
        """Assert that what happened so far sends nothing of these names (of any) to `dashboard`."""
        await self.discord.caught_up()
        await dashboard.quiet(*names)

    async def raw(self, token: str | None = None, *, query: str = "", **options: Any) -> RawClient:
        """A bare Engine.IO WebSocket; with a token it is past Socket.IO's CONNECT."""
        url = f"ws://{self.address}/socket.io/?EIO=4&transport=websocket{query}"
        socket = await tornado.websocket.websocket_connect(HTTPRequest(url, **options))
        self._sockets.append(socket)
        raw = RawClient(socket, await socket.read_message())
        if token is not None:
            await raw.send("40" + json.dumps({"token": token}))
            answer = await raw.read()
            assert isinstance(answer, str)
            assert answer.startswith('40{"sid"')
            assert await raw.read() == '42["session",{"recovered":false,"rooms":[]}]'
        return raw

    def close(self) -> None:
        """Close the bare sockets that the test left open."""
        for socket in self._sockets:
            socket.close()
            socket.stream.close()  # one that stopped reading would never see the end


class RawClient:
    """A WebSocket that says exactly what a test wants said."""

    def __init__(
        self, socket: tornado.websocket.WebSocketClientConnection, hello: str | bytes | None
    ) -> None:
        self.socket = socket
        self.hello = hello

    async def send(self, *packets: str | bytes) -> None:
        for packet in packets:
            await self.socket.write_message(packet, binary=isinstance(packet, bytes))

    async def read(self) -> str | bytes | None:
        """The next packet; None once the server has closed."""
        async with within(DEADLINE):
            return await self.socket.read_message()

    def stop_reading(self) -> None:
        """Read nothing more from the network, as a client that hangs."""
        asyncio.get_running_loop().remove_reader(self.socket.stream.socket.fileno())

    async def closed(self) -> list[str | bytes]:
        """Wait until the server closes; return what it said before."""
        packets = []
        while (packet := await self.read()) is not None:
            packets.append(packet)
        return packets


class Watching:
    """Starts watches of one test; settings are given as config.toml would have them."""

    def __init__(self, discord: PretendDiscord, guild: Guild, js: JavaScript) -> None:
        self._discord = discord
        self._guild = guild
        self._js = js

    @asynccontextmanager
    async def __call__(self, *, ready: bool = True, **tables: Any) -> AsyncIterator[Watch]:
        """A server with these settings; `ready` waits until it knows the guilds."""
        settings = merged(plain_tables(self._discord), tables)
        async with server_of(self._discord, settings) as server:
            if ready:
                await self._discord.wait_for_bot()
            watch = Watch(server, self._discord, self._guild, self._js)
            try:
                yield watch
            finally:
                watch.close()
