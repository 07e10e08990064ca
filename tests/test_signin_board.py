"""One's own dashboard on another host signs people in: docs/signin.md's own code, in a real browser
that takes no cookies of third parties."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import browser as fixtures
import pytest
import tornado.web
from browser import Browser
from playwright.async_api import expect
from redisserver import free_port
from service import ROOT, server_of
from signing import signing_tables

from simulator import Guild, PretendDiscord
from spywatcher import timestamp

pytestmark = fixtures.IN_ONE_LOOP
#: It takes no cookies of third parties, as all browsers are to.
browser, chromium = fixtures.browser, fixtures.whole_chromium
discord = fixtures.discord

BODY = '<p id="who"></p><a id="signin" hidden>Sign in</a><button id="signout">Sign out</button>'
CLIENT = ROOT / "tests" / "node_modules" / "socket.io-client" / "dist" / "socket.io.esm.min.js"


def shown_code(server: str) -> str:
    """The script of docs/signin.md, for this server; it notes its socket for the test."""
    text = (ROOT / "docs" / "signin.md").read_text("utf-8")
    [script] = re.findall(r"^```js\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    script = script.replace("https://watch.example", server)
    return f'import {{ io }} from "/io.js";\n{script}\nwindow.socket = socket;'


class Board(tornado.web.RequestHandler):
    """The dashboard's own web server."""

    def initialize(self, server: str) -> None:
        self.server = server

    def get(self, path: str) -> None:
        kinds = {"io.js": CLIENT.read_text("utf-8"), "page.js": shown_code(self.server)}
        if path in kinds:
            self.set_header("Content-Type", "text/javascript")
        self.finish(kinds.get(path) or f'{BODY}<script type="module" src="/page.js"></script>')


@asynccontextmanager
async def board(server: str, port: int) -> AsyncIterator[None]:
    application = tornado.web.Application(
        [(r"/(.*)", Board, {"server": server})], log_function=lambda handler: None
    )
    serving = application.listen(port, "127.0.0.1")
    try:
        yield
    finally:
        serving.stop()
        await serving.close_all_connections()


@pytest.fixture(autouse=True)
def _asks_in_vain(browser: Browser) -> None:
    """The board asks for a token to see whether somebody is signed in."""
    browser.expected.append("401.*/signin/token")


def on_localhost(discord: PretendDiscord, port: int) -> tuple[dict[str, Any], str]:
    """Tables for a server whose pages may lie on that port: another origin, but the same site."""
    tables = signing_tables(discord, server={"cors_origins": [f"http://localhost:{port}"]})
    url = f"http://localhost:{tables['server']['port']}"
    tables["plugin"]["signin"]["public_url"] = url
    discord.oauth2.redirect_uris.add(f"{url}/signin/callback")
    return tables, url


async def test_a_board_of_ones_own_signs_in_looks_and_signs_out(
    discord: PretendDiscord, guild: Guild, browser: Browser
) -> None:
    port = free_port()
    tables, url = on_localhost(discord, port)
    async with server_of(discord, tables), board(url, port):
        page = await browser.open(f"http://localhost:{port}/view")
        await page.locator("#signin").click()
        await page.get_by_role("button", name="owner").click()
        await expect(page.locator("#who")).to_have_text("owner")
        assert page.url == f"http://localhost:{port}/view"
        answer = await page.evaluate("socket.emitWithAck('guilds:list')")
        assert [found["name"] for found in answer["guilds"]] == [guild.name]
        await page.locator("#signout").click()
        await expect(page.locator("#signin")).to_be_visible()


async def test_it_renews_the_token_before_it_ends(
    discord: PretendDiscord, guild: Guild, browser: Browser
) -> None:
    port = free_port()
    tables, url = on_localhost(discord, port)
    tables["plugin"]["signin"]["token_ttl"] = 62.0
    async with server_of(discord, tables) as server, board(url, port):
        page = await browser.open(f"http://localhost:{port}/view")
        await page.locator("#signin").click()
        async with page.expect_response("**/signin/token") as first:
            await page.get_by_role("button", name="owner").click()
        async with page.expect_response("**/signin/token") as renewed:
            assert (await first.value).ok
        assert (await (await renewed.value).json())["expiresAt"] > timestamp()
        assert await page.evaluate("socket.connected")
        assert len(server.socketio.eio.sockets) == 1


async def test_a_board_on_another_site_gets_nothing(
    discord: PretendDiscord, guild: Guild, browser: Browser
) -> None:
    """The same board, opened under a name of another site: the cookie is not sent."""
    port = free_port()
    tables, url = on_localhost(discord, port)
    tables["server"]["cors_origins"].append(f"http://127.0.0.1:{port}")
    async with server_of(discord, tables), board(url, port):
        page = await browser.open(f"http://127.0.0.1:{port}/view")
        await page.locator("#signin").click()
        await page.get_by_role("button", name="owner").click()
        await expect(page.locator("#signin")).to_be_visible()
        await expect(page.locator("#who")).to_be_empty()


async def test_the_page_in_the_box_signs_in_there_too(
    discord: PretendDiscord, guild: Guild, browser: Browser
) -> None:
    tables = signing_tables(discord)
    async with server_of(discord, tables):
        page = await browser.open(tables["plugin"]["signin"]["public_url"])
        await page.get_by_role("link", name="Sign in with Discord").click()
        await page.get_by_role("button", name="owner").click()
        await expect(page.locator("#state")).to_have_text("Live")
