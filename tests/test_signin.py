"""Sign in with Discord: who comes in, as whom, and for how long."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from browser import Browser
from redisserver import free_port
from service import server_for

from simulator import Guild, PretendDiscord
from spywatcher import Server

SignIn = Callable[..., Any]


@pytest.fixture
def signing_in(discord: PretendDiscord, guild: Guild) -> SignIn:
    """Starts servers that sign people in: `async with signing_in(admins=[…]) as url`."""

    @asynccontextmanager
    async def start(**signin: Any) -> AsyncIterator[tuple[Server, Browser]]:
        tables = signin.pop("tables", {})
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        oauth2 = discord.oauth2
        oauth2.redirect_uris.add(f"{url}/signin/callback")
        table = {"client_id": oauth2.client_id, "client_secret": oauth2.client_secret}
        table |= {"public_url": url, **signin}
        server_table = {"host": "127.0.0.1", "port": port} | tables.pop("server", {})
        tables = {"server": server_table, "plugin": {"signin": table}, **tables}
        async with server_for(discord, **tables) as server, Browser(url) as browser:
            yield server, browser

    return start


async def test_who_signs_in_gets_a_token_of_their_own(signing_in: SignIn, guild: Guild) -> None:
    ada = guild.add_member("ada")
    async with signing_in() as (server, browser):
        back = await browser.sign_in(ada.id, "/#wall")
        assert (back.status, back.location) == (302, "/#wall")
        answer = await browser.token()
        assert answer.status == 200
        assert answer.json["user"] == {"id": str(ada.id), "username": "ada", "avatar": None}
        viewer = server.tokens.verify(answer.json["token"])
        assert (viewer.discord_id, viewer.role, viewer.guilds) == (str(ada.id), "USER", None)
