"""A server that signs people in, in front of a pretend Discord."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from browser import Browser
from redisserver import free_port
from service import Tables, merged, server_of, tables_for

from simulator import PretendDiscord
from spywatcher import Server


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
        yield server, browser
