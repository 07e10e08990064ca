"""python-socketio on Tornado as its documentation shows it, with the same token check."""

from __future__ import annotations

import asyncio
import os

import control
import event
import jwt
import socketio
import tornado.netutil
from tornado.httpserver import HTTPServer
from tornado.web import Application


async def serve() -> None:
    redis = os.environ.get("BENCH_REDIS")
    sio = socketio.AsyncServer(
        async_mode="tornado",
        cors_allowed_origins="*",
        ping_interval=300,
        client_manager=socketio.AsyncRedisManager(redis) if redis else None,
    )

    @sio.event
    async def connect(sid: str, environ: dict[str, object], auth: dict[str, str]) -> None:
        jwt.decode(auth["token"], event.SECRET, algorithms=["HS256"])

    @sio.on("subscribe:guild")
    async def subscribe(sid: str, guild_id: str) -> dict[str, object]:
        await sio.enter_room(sid, f"guild:{guild_id}")
        return {"ok": True, "room": f"guild:{guild_id}"}

    async def emit(number: int) -> None:
        await sio.emit("message:new", event.message(number), room=event.ROOM)

    async def elsewhere(number: int) -> None:
        room = f"guild:{event.elsewhere(number)}"
        await sio.emit("message:new", event.message(number), room=room)

    web = HTTPServer(Application([(r"/socket.io/", socketio.get_tornado_handler(sio))]))
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1", backlog=1024)
    web.add_sockets(sockets)
    port = sockets[0].getsockname()[1]
    await control.obey(port, emit, lambda: {"sockets": len(sio.eio.sockets)}, elsewhere)


if __name__ == "__main__":
    asyncio.run(serve())
