"""A plugin that counts behind a real hikari, fed with raw gateway JSON; no network, own clock.

async with Counting(folder) as counting:
    await counting.feed("TYPING_START", typing_json(guild, ada, guild.general))
    lists = await counting.lists(guild)
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import msgspec

from simulator import Guild, Json, PretendShard, User, guild_create_json, make_token
from spywatcher import (
    DiscordSettings,
    Gateway,
    HostContext,
    Metrics,
    PluginHost,
    PluginLoader,
    Shared,
    parse_settings,
    wanted_events,
)

ROOT = Path(__file__).parent.parent
PLUGINS = ROOT / "plugins"
#: The names of the shipped plugins.
SHIPPED = {path.stem for path in PLUGINS.glob("[!_]*.py")}
SHIPPED |= {path.parent.name for path in PLUGINS.glob("*/__init__.py")}
HOUR = 3600.0
#: Some full hour.
NOON = 1_700_000_000.0 // HOUR * HOUR
BOT = User(735_000_000_000_000_001, "watcher", bot=True)


class Clock:
    """What the plugin takes for the time, in seconds since 1970."""

    def __init__(self) -> None:
        self.time = NOON

    def __call__(self) -> float:
        return self.time


class Counting:
    """One run of the plugin, from its setup to its teardown."""

    def __init__(
        self,
        folder: Path,
        guilds: Iterable[Guild] = (),
        *,
        clock: Clock | None = None,
        path: str = "counts.db",
        share: Callable[[str], Shared | None] = lambda plugin: None,
        alone: Callable[[str], asyncio.Lock] | None = None,
        plugin: str = "analytics",
        **settings: Any,
    ) -> None:
        tables = {
            "plugins": {
                "folders": [str(PLUGINS)],
                "disabled": sorted(SHIPPED - {plugin}),
            },
            "storage": {"path": path},
            "plugin": {plugin: settings},
        }
        self.plugin = plugin
        self.path = folder / path
        self.clock = clock or Clock()
        self.emitted: list[tuple[str, str]] = []
        self._guilds = guilds
        self._share = share
        self._alone = alone
        self._metrics = Metrics()
        self._settings = parse_settings(tables, folder)
        self._plugins = PluginLoader(
            self._settings.plugins, self._settings.plugin, folder, self._metrics
        )

    async def __aenter__(self) -> Self:
        self._plugins.load_all()
        wanted = wanted_events(self._plugins)
        token = make_token(BOT.id)
        gateway = Gateway(DiscordSettings(), token, wanted, self._metrics)
        self._bot = gateway.bot
        self.module: Any = self._plugins.plugins[self.plugin].module
        self.module.now = self.module.elapsed = self.clock
        place = HostContext(
            bot=self._bot,
            presences=gateway.presences,
            emit=lambda event, guild_id, content, room: self.emitted.append((event, guild_id)),
            settled=lambda: True,
            watches=lambda guild_id: True,
            storage=self.path,
            share=self._share,
            alone=self._alone or collections.defaultdict(asyncio.Lock).__getitem__,
        )
        self._host = PluginHost(self._plugins, place, self._metrics, 5.0)
        await self._host.start()
        for guild in self._guilds:
            await self.feed("GUILD_CREATE", guild_create_json(guild))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._host.stop()

    async def feed(self, name: str, payload: Json) -> None:
        """One gateway event, with all that it causes."""
        before = asyncio.all_tasks()
        self._bot.event_manager.consume_raw_event(name, PretendShard(BOT.id), payload)
        while others := asyncio.all_tasks() - before:
            await asyncio.wait(others)

    def reconfigure(self, **settings: Any) -> None:
        """New settings, as a reload brings them."""
        self._host.reconfigure({self.plugin: settings})

    async def flush(self) -> None:
        """Hand all counts to the disk or to Redis, as happens twice a second."""
        await self.counter.keeper.step()

    async def abandon(self) -> None:
        """End as a killed process does: nothing more is written."""
        self.counter.keeper.idle = True
        await self._host.stop()

    @property
    def counter(self) -> Any:
        """The plugin's instance."""
        return getattr(self.module, self.plugin)

    async def update(self, guild: Guild) -> Json:
        """What a new subscriber to history gets."""
        update: Json = msgspec.to_builtins(await self.counter.newest(guild.id))
        return update

    async def lists(self, guild: Guild) -> Json:
        """The data of an update made now, without its timestamp."""
        update: Json = msgspec.to_builtins(await self.module.analytics.compute(guild.id))
        assert update["timestamp"] == update["data"].pop("timestamp")
        data: Json = update["data"]
        return data

    async def in_store(self, work: Any) -> Any:
        """Do something with the SQLite connection, in its thread."""
        return await self.counter.keeper.run(lambda: work(self.counter._store.rows.db))

    @property
    def problem(self) -> str | None:
        """What the operator is shown."""
        problem: str | None = self._host.health()["problem"]
        return problem

    def counted(self, what: str) -> float:
        """What the plugin counted for the operator."""
        return self._metrics.plugin_counts.labels(self.plugin, what)._value.get()

    @property
    def faults(self) -> float:
        """How often anything went wrong."""
        return self._metrics.plugin_failures.labels(self.plugin)._value.get()
