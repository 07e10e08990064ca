"""What the plugin host costs an event: a listener called by it, beside the function called by hand.

    python bench/plugins.py [--quick]

By the host is: from hikari's call of the one subscription for the type of event to the fields, checked,
with guild and time, where the throttle takes them over. By hand is the function alone. hikari's own
decoding and what comes after the plugin are in neither. Each is measured in many short rounds, and the
best counts: whatever else the machine does only adds.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import hikari  # noqa: E402  # of this checkout's environment
from report import keep, parse_arguments, show  # noqa: E402

from simulator import Guild, PretendDiscord  # noqa: E402
from spywatcher import (  # noqa: E402
    DiscordSettings,
    Gateway,
    HostContext,
    Metrics,
    PluginHost,
    PluginLoader,
    PluginsSettings,
    wanted_events,
)

PLUGINS = {
    "a payload of five fields": """
        from spywatcher import Payload

        class Said(Payload):
            user_id: str
            username: str
            channel_id: str
            channel_name: str
            timestamp: str

        @on(hikari.GuildMessageCreateEvent, emit="said")
        def said(event, spy):
            return Said(
                user_id=str(event.author_id), username=event.author.username,
                channel_id=str(event.channel_id), channel_name="general", timestamp="now",
            )
    """,
    "a dict of two fields": """
        @on(hikari.GuildMessageCreateEvent, emit="said")
        def said(event, spy):
            return {"user_id": event.author_id, "length": 3}
    """,
    "nothing": """
        @on(hikari.GuildMessageCreateEvent, emit="said")
        def said(event, spy):
            return None
    """,
}


class Bench:
    """One plugin in a host without a server, and an event for it."""

    def __init__(self, source: str, folder: Path) -> None:
        lines = ["import hikari", "from spywatcher import on", *source.splitlines()]
        (folder / "said.py").write_text("\n".join(line.removeprefix(" " * 8) for line in lines))
        self._folder = folder

    async def start(self) -> None:
        metrics = Metrics()
        folders = PluginsSettings(folders=(str(self._folder),))
        plugins = PluginLoader(folders, {}, self._folder, metrics)
        plugins.load_all()
        discord = PretendDiscord()
        guild = discord.add_guild()
        gateway = Gateway(DiscordSettings(), discord.token, wanted_events(plugins), metrics)
        bot = gateway.bot
        self.sent: list[Any] = []
        context = HostContext(
            bot=bot,
            presences=gateway.presences,
            emit=lambda *event: self.sent.append(event),
            settled=lambda: True,
            watches=lambda guild_id: int(guild_id) == guild.id,
            storage=self._folder / "counts.db",
        )
        host = PluginHost(plugins, context, metrics, 5.0)
        await host.start()
        self.event = message_event(bot, guild)
        self.hear = bot.events.dispatch
        self._function = host.plugins["said"].module.said
        self._spy = host.runners["said"].spy

    def by_host(self, events: int) -> float:
        """Microseconds of CPU for each event."""
        began = time.process_time()
        for _ in range(events):
            self.hear(self.event)
        seconds = time.process_time() - began
        self.sent.clear()
        return seconds / events * 1e6

    def by_hand(self, events: int) -> float:
        """Microseconds of CPU for each event."""
        began = time.process_time()
        for _ in range(events):
            self._function(self.event, self._spy)
        return (time.process_time() - began) / events * 1e6


def message_event(bot: hikari.GatewayBot, guild: Guild) -> hikari.GuildMessageCreateEvent:
    from simulator import message_json

    factory = bot.event_factory
    body = message_json(guild, guild.owner, guild.general)
    event = factory.deserialize_message_create_event(None, body)  # type: ignore[arg-type]  # no shard is asked
    assert isinstance(event, hikari.GuildMessageCreateEvent)
    return event


async def measure(name: str, events: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(PLUGINS[name], Path(folder))
        await bench.start()
        bench.hear(bench.event)
        assert bool(bench.sent) == (name != "nothing")
        pairs = [(bench.by_host(events), bench.by_hand(events)) for _ in range(rounds)]
    hosted, alone = (min(column) for column in zip(*pairs, strict=True))
    return {"host": hosted, "hand": alone, "overhead": hosted - alone}


def main() -> None:
    quick = parse_arguments(__doc__ or "").quick
    events, rounds = 150, 50 if quick else 500
    figures = {name: asyncio.run(measure(name, events, rounds)) for name in PLUGINS}
    rows = [[name, one["host"], one["hand"], one["overhead"]] for name, one in figures.items()]
    show("Microseconds an event", ["what it returns", "host", "by hand", "overhead"], rows)
    keep("plugins", figures)


if __name__ == "__main__":
    main()
