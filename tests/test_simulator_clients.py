"""The pretend Discord, judged by the two libraries that most bots are written with."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yarl
from jsclient import node
from waiting import PATIENCE, eventually, within

from simulator import Guild, PretendDiscord

with warnings.catch_warnings():  # it imports audioop, which Python 3.11 calls deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    import discord as discordpy

discordpy.VoiceClient.warn_nacl = discordpy.VoiceClient.warn_dave = False  # nobody speaks here

FOLDER = Path(__file__).parent


@pytest.fixture
def guild(discord: PretendDiscord) -> Guild:
    """A guild with something of everything that bots ask for."""
    guild = discord.add_guild()
    guild.add_member("ada").appear("dnd", ["mobile"], [{"name": "Chess"}])
    guild.add_thread("raid", guild.general)
    mallory = guild.add_member("mallory")
    guild.bans[mallory.id] = guild.members.pop(mallory.id).user
    return guild


ANSWERS = {
    "guilds": 1,
    "members": ["ada", "owner", "watcher"],
    "all": ["ada", "owner", "watcher"],
    "found": ["ada"],
    "threads": ["raid"],
    "role": "@everyone",
    "banned": ["mallory"],
    "sent": "hello",
}


class DiscordJs:
    """A Node process that runs discordjs.mjs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    @asynccontextmanager
    async def of(cls, discord: PretendDiscord) -> AsyncIterator[DiscordJs]:
        api = discord.rest_url.removesuffix("/v10")
        command = [node(), str(FOLDER / "discordjs.mjs"), api, discord.token]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            yield cls(process)
        finally:
            process.terminate()
            await process.communicate()

    async def says(self) -> dict[str, Any]:
        assert self.process.stdout
        async with within(PATIENCE):
            return json.loads(await self.process.stdout.readline())


async def test_discord_js_asks_posts_and_hears(discord: PretendDiscord, guild: Guild) -> None:
    async with DiscordJs.of(discord) as bot:
        said = [await bot.says(), await bot.says()]  # its own message may come before the answer
        assert {"ready": ANSWERS} in said
        assert {"message": "hello"} in said
        await discord.message(guild, guild.owner, guild.general, "welcome")
        assert await bot.says() == {"message": "welcome"}


@pytest.mark.parametrize(("resumable", "missed"), [(True, ["0", "1", "2"]), (False, [])])
async def test_discord_js_goes_on_after_an_invalid_session(
    discord: PretendDiscord, guild: Guild, resumable: bool, missed: list[str]
) -> None:
    async with DiscordJs.of(discord) as bot:
        await bot.says(), await bot.says()
        await discord.invalidate(resumable=resumable)
        for number in range(3):
            await discord.message(guild, guild.owner, guild.general, str(number))
        await discord.wait_for_bot()
        await discord.message(guild, guild.owner, guild.general, "live")
        heard = [(await bot.says())["message"] for _ in [*missed, "live"]]
        assert heard == [*missed, "live"]
        assert (discord.identifies, discord.resumes) == ((1, 1) if resumable else (2, 0))


class DiscordPy(discordpy.Client):
    """A bot that notes what it hears."""

    def __init__(self) -> None:
        super().__init__(intents=discordpy.Intents.all())
        self.heard: list[str] = []

    async def on_message(self, message: discordpy.Message) -> None:
        self.heard.append(message.content)

    async def ask(self) -> dict[str, Any]:
        """What discordjs.mjs asks."""
        guild = await self.fetch_guild(self.guilds[0].id)
        cached = self.guilds[0]
        return {
            "guilds": len([each async for each in self.fetch_guilds()]),
            "members": sorted([m.name async for m in guild.fetch_members()]),
            "all": sorted(m.name for m in await cached.chunk()),
            "found": [m.name for m in await cached.query_members("AD")],
            "threads": [thread.name for thread in await cached.active_threads()],
            "role": (await guild.fetch_role(guild.id)).name,
            "banned": [ban.user.name async for ban in guild.bans()],
            "sent": (await cached.text_channels[0].send("hello")).content,
        }


@asynccontextmanager
async def discord_py(
    discord: PretendDiscord, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DiscordPy]:
    monkeypatch.setattr(discordpy.http.Route, "BASE", discord.rest_url)
    gateway = discordpy.gateway.DiscordWebSocket
    monkeypatch.setattr(gateway, "DEFAULT_GATEWAY", yarl.URL(discord.gateway_url))
    async with DiscordPy() as bot:
        running = asyncio.create_task(bot.start(discord.token))
        await bot.wait_until_ready()
        yield bot
    await running


async def test_discord_py_asks_posts_and_hears(
    discord: PretendDiscord, guild: Guild, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_py(discord, monkeypatch) as bot:
        assert await bot.ask() == ANSWERS
        [ada] = [m for m in bot.guilds[0].members if m.name == "ada"]
        assert (str(ada.status), ada.activity and ada.activity.name) == ("dnd", "Chess")
        await discord.message(guild, guild.owner, guild.general, "welcome")
        await eventually(lambda: bot.heard == ["hello", "welcome"])


async def test_discord_py_resumes_after_the_connection_was_closed(
    discord: PretendDiscord, guild: Guild, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_py(discord, monkeypatch) as bot:
        await discord.invalidate(resumable=True)
        await discord.message(guild, guild.owner, guild.general, "missed")
        await eventually(lambda: bot.heard == ["missed"], 20)
        assert (discord.identifies, discord.resumes) == (1, 1)
