"""The README: what it shows is what is there, and it runs."""

import asyncio
import configparser
import os
import re
import shlex
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from jsclient import node
from service import ROOT
from waiting import PATIENCE, eventually, within
from watching import Watch

README = (ROOT / "README.md").read_text("utf-8")


def block(language: str) -> str:
    """The only block of code in this language."""
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return text


def test_the_plugin_shown_is_the_one_shipped():
    assert block("python") == (ROOT / "plugins" / "messages.py").read_text("utf-8")


def test_the_packages_to_install_are_those_that_are_needed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = setup["options"]["install_requires"].split()
    shown = re.search(r"pip install (.+)", README)
    assert shown
    plain = [re.sub(r">=.*", "", one) for one in needed]  # upper bounds stay
    assert shlex.split(shown[1]) == plain


@asynccontextmanager
async def opened(spy: Watch, name: str, text: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A page as its author would have it: copied, with the address and a token filled in."""
    page = ROOT / "tests" / "node_modules" / f".{name}.mjs"
    page.write_text(text.replace("http://127.0.0.1:3001", spy.url))
    environment = os.environ | {"TOKEN": spy.token(role="ADMIN"), "GUILD": str(spy.guild.id)}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(node(), page, stdout=pipe, env=environment)
    try:
        yield process
    finally:
        process.kill()
        await process.communicate()
        page.unlink()


async def test_the_dashboard_shown_runs(spy: Watch):
    async with opened(spy, "readme", block("js")) as page:
        room = f"guild:{spy.guild.id}"
        await eventually(lambda: list(spy.server.rooms.members(room)))
        await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general)
        async with within(PATIENCE):
            assert await page.stdout.readline() == b"owner in #general\n"


#: The component `LiveAnalyticsDashboard` of the API page, without React: what its effect does once.
COMPONENT = """
import { io } from "socket.io-client";
const socket = io("http://127.0.0.1:3001", {
  auth: { token: process.env.TOKEN },
  transports: ["websocket", "polling"],
  reconnection: true, reconnectionDelay: 1000, reconnectionDelayMax: 5000,
});
socket.emit("subscribe:analytics", process.env.GUILD);
socket.on("analytics:update", () => console.log("analytics"));
socket.emit("subscribe:guild", process.env.GUILD);
socket.on("message:new", (message) => console.log(`${message.username} in #${message.channelName}`));
"""


@pytest.mark.logs("not connected to Discord")
async def test_pages_that_were_there_eight_seconds_before_discord_show_events(watching, discord):
    await discord.refuse()
    began = time.monotonic()
    async with (
        watching(ready=False) as spy,
        opened(spy, "early", block("js")) as readme,
        opened(spy, "component", COMPONENT) as component,
    ):
        await eventually(lambda: len(spy.server.dashboards) == 2, timeout=PATIENCE)
        await eventually(lambda: time.monotonic() > began + 8, timeout=9)
        await discord.accept()
        room = f"guild:{spy.guild.id}"
        await eventually(lambda: len(spy.server.rooms.members(room)) == 2)
        await discord.message(spy.guild, spy.guild.owner, spy.guild.general)
        async with within(PATIENCE):
            assert await readme.stdout.readline() == b"owner in #general\n"
            heard = {await component.stdout.readline() for _ in range(2)}
            assert heard == {b"analytics\n", b"owner in #general\n"}
