"""A bot on discord.py that hears what SpyWatcher hears, and counts it.

python discord_py.py http://127.0.0.1:PORT/api/v10 TOKEN ws://127.0.0.1:PORT/gateway
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import yarl

with warnings.catch_warnings():  # it imports audioop, which Python 3.11 calls deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    import discord


class Counting(discord.Client):
    heard = 0

    async def on_ready(self) -> None:
        print("ready", flush=True)

    async def on_presence_update(self, before: Any, after: Any) -> None:
        self.heard += 1

    async def on_message(self, message: Any) -> None:
        self.heard += 1

    async def on_typing(self, channel: Any, user: Any, when: Any) -> None:
        self.heard += 1


rest, token, gateway = sys.argv[1:]
discord.http.Route.BASE = rest
discord.gateway.DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(gateway)
intents = discord.Intents.none()
intents.guilds = intents.members = intents.presences = True
intents.guild_messages = intents.guild_typing = intents.guild_reactions = True
Counting(intents=intents).run(token, log_handler=None)
