"""The README: what it shows is what is there, and it runs."""

import asyncio
import configparser
import os
import re

from jsclient import node
from service import ROOT
from waiting import eventually
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
    needed = re.findall(r"^([\w-]+)", setup["options"]["install_requires"], re.MULTILINE)
    shown = re.search(r"pip install (.+)", README)
    assert shown
    assert shown[1].split() == needed


async def test_the_dashboard_shown_runs(spy: Watch):
    """As a page's author would have it: copied, with the address and a token filled in."""
    page = ROOT / "tests" / "node_modules" / ".readme.mjs"
    page.write_text(block("js").replace("http://127.0.0.1:3001", spy.url))
    environment = os.environ | {"TOKEN": spy.token(role="ADMIN")}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(node(), page, stdout=pipe, env=environment)
    try:
        room = f"guild:{spy.guild.id}"
        await eventually(lambda: list(spy.server.rooms.members(room)))
        await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general)
        async with asyncio.timeout(5):
            assert await process.stdout.readline() == b"owner in #general\n"
    finally:
        process.kill()
        await process.communicate()
        page.unlink()
