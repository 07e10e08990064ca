"""SpyWatcher itself, behind the pretend Discord, with its limits out of the way."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import control
import event

import simulator
import spywatcher
from spywatcher import Server, Settings

OPEN_TO_ALL = spywatcher.LimitsSettings(
    connections_per_ip=1_000_000,
    connections_per_viewer=1_000_000,
    unauthenticated=1_000_000,
    attempts_per_ip="100000000/minute",
)


async def serve() -> None:
    with tempfile.TemporaryDirectory() as folder:
        await serve_from(f"{folder}/counts.db")


async def serve_from(storage: str) -> None:
    async with simulator.PretendDiscord() as discord:
        discord.add_guild(guild_id=int(event.GUILD))
        settings = Settings(
            server=spywatcher.ServerSettings(port=0),
            heartbeat=spywatcher.HeartbeatSettings(interval=300.0),
            auth=spywatcher.AuthSettings(secret=event.SECRET),
            discord=spywatcher.DiscordSettings(token=discord.token, rest_url=discord.rest_url),
            limits=OPEN_TO_ALL,
            # It greets each new subscriber; the other servers greet nobody.
            plugins=spywatcher.PluginsSettings(disabled=("presence",)),
            storage=spywatcher.StorageSettings(path=storage),
            redis=spywatcher.RedisSettings(url=os.environ.get("BENCH_REDIS", "")),
            folder=Path(__file__).parents[2],
        )
        keys = spywatcher.read_keys(settings.auth, settings.folder)
        node = spywatcher.node_type(settings)
        async with Server(settings, keys=keys, token=discord.token, make_node=node) as server:
            if not settings.redis.url:
                await discord.wait_for_bot()
            else:
                while not server.node.known.complete:
                    await server.node.known.wait()
            server.recovery.logs.reach(event.FIRST_POSITION)
            await control.obey(
                server.port, emit_from(server), figures_of(server), elsewhere_from(server)
            )


def elsewhere_from(server: Server) -> control.Emit:
    def emit(number: int) -> None:
        server.node.deliver("message:new", event.elsewhere(number), event.message(number), "guild")

    return emit


def emit_from(server: Server) -> control.Emit:
    longer = event.OFFSET_BYTES if "--longer" in sys.argv else 0

    def emit(number: int) -> None:
        server.node.deliver("message:new", event.GUILD, event.message(number, longer), "guild")

    return emit


def figures_of(server: Server) -> Callable[[], dict[str, int]]:
    def figures() -> dict[str, int]:
        gc.collect()
        rooms, engine = server.rooms, server.socketio.eio
        return {
            "sockets": len(engine.sockets),
            "environ": len(server.socketio.environ),
            "viewers": len(server.dashboards),
            "addresses": len(server.limits.open),
            "strangers": len(server.limits.strangers),
            "rooms": len(rooms),
            "members": len(rooms.members(event.ROOM)),
            "offset": server.recovery.logs.position,
            "namespaces": len(server.socketio.manager.rooms),
            "pending": len(server.socketio.manager.pending_connect)
            + len(server.socketio.manager.pending_disconnect),
        }

    return figures


if __name__ == "__main__":
    if "--uvloop" not in sys.argv:
        sys.modules["uvloop"] = None  # type: ignore[assignment]  # as if it were not installed
    spywatcher.run_until_stopped(serve())
