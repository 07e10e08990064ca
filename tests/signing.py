"""A server that signs people in, and a browser as far as that needs one."""

from __future__ import annotations

import http.cookies
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import aiohttp
from redisserver import free_port
from service import Tables, fetch, merged, server_of, tables_for
from tornado.httpclient import HTTPResponse

from simulator import PretendDiscord
from spywatcher import Server


class Page(NamedTuple):
    """What a browser got."""

    status: int
    headers: Any
    text: str

    @property
    def location(self) -> str:
        """Where it is sent."""
        return str(self.headers["Location"])

    @property
    def query(self) -> dict[str, str]:
        """The query of that place."""
        return dict(parse_qsl(urlsplit(self.location).query))

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    def cookie(self, name: str) -> str:
        """The `Set-Cookie` of this name, whole; empty if there is none."""
        cookies = self.headers.getall("Set-Cookie", [])
        return next((str(c) for c in cookies if c.startswith(f"{name}=")), "")


class Browser:
    """One browser: `async with Browser(url) as ada: await ada.sign_in("ada")`."""

    def __init__(self, url: str, trust: ssl.SSLContext | bool = True) -> None:
        """`trust` says whose certificates count, where the server has one."""
        self.url = url
        jar, connector = aiohttp.CookieJar(unsafe=True), aiohttp.TCPConnector(ssl=trust)
        self._http = aiohttp.ClientSession(cookie_jar=jar, connector=connector)

    async def __aenter__(self) -> Browser:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.close()

    async def get(self, place: str, **options: Any) -> Page:
        return await self._ask("GET", place, **options)

    async def post(self, place: str, **options: Any) -> Page:
        return await self._ask("POST", place, **options)

    async def _ask(self, method: str, place: str, **options: Any) -> Page:
        url = place if "://" in place else self.url + place
        options = {"allow_redirects": False, **options}
        async with self._http.request(method, url, **options) as answer:
            return Page(answer.status, answer.headers, await answer.text())

    def cookie(self, name: str) -> str | None:
        """The value of a cookie that this server set."""
        found = [cookie.value for cookie in self._http.cookie_jar if cookie.key == name]
        return found[0] if found else None

    def keep(self, name: str, value: str) -> None:
        """Put a cookie there in place of the server's, whoever made it."""
        path = "/signin" if name == "spywatcher_signin" else "/"
        cookie = http.cookies.SimpleCookie({name: value})
        cookie[name]["path"] = path
        self._http.cookie_jar.update_cookies(cookie, aiohttp.client.URL(self.url))

    async def begin(self, after: str = "/") -> Page:
        """As far as Discord's page."""
        return await self.get("/signin", params={"next": after})

    async def choose(self, begun: Page, user_id: int | str) -> Page:
        """On Discord's page, be this one; "" cancels. Returns the way back, which is still to go."""
        return await self.post(begun.location, data={"user": str(user_id)})

    async def sign_in(self, user_id: int | str, after: str = "/") -> Page:
        """The whole way; returns the last answer of this server."""
        chosen = await self.choose(await self.begin(after), user_id)
        return await self.get(chosen.location)

    async def token(self, **options: Any) -> Page:
        return await self.post("/signin/token", **options)


async def picture_of(browser: Browser) -> HTTPResponse:
    """What the page shows beside the name."""
    cookie = {"Cookie": f"spywatcher_session={browser.cookie('spywatcher_session')}"}
    return await fetch(urlsplit(browser.url).port or 80, "/signin/avatar", headers=cookie)


def signing_tables(discord: PretendDiscord, /, **more: dict[str, Any]) -> Tables:
    """Tables of config.toml with sign-in on, on a port that is free now; `more` as in `tables_for`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    discord.oauth2.redirect_uris.add(f"{url}/signin/callback")
    signin = {
        "client_id": discord.oauth2.client_id,
        "client_secret": discord.oauth2.client_secret,
        "public_url": url,
    }
    server = {"host": "127.0.0.1", "port": port}
    plugin = {"plugin": {"signin": signin | more.pop("signin", {})}}
    return merged(tables_for(discord, server=server, **plugin), more)


@asynccontextmanager
async def signing_in(
    discord: PretendDiscord, /, **more: dict[str, Any]
) -> AsyncIterator[tuple[Server, Browser]]:
    """That server in this process, and a browser; the table `signin` is that of the plugin."""
    tables = signing_tables(discord, **more)
    url = tables["plugin"]["signin"]["public_url"]
    async with server_of(discord, tables) as server, Browser(url) as browser:
        await discord.wait_for_bot()
        yield server, browser
