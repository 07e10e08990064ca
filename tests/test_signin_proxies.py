"""Sign in behind Caddy and nginx: the files of docs/, changed as docs/deploy.md says."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from certificates import Authority
from redisserver import free_port
from service import ROOT, server_of
from signing import Browser, signing_tables
from waiting import eventually

from simulator import Guild, PretendDiscord

Proxy = Callable[[Path, int, int, Path], list[str]]


def caddy(folder: Path, port: int, behind: int, certificate: Path) -> list[str]:
    """Writes the file; returns the command that serves by it."""
    text = (ROOT / "docs" / "Caddyfile").read_text("utf-8")
    site = f"https://127.0.0.1:{port} {{\n\ttls {certificate} {certificate}"
    text = text.replace("spy.example.com {", site).replace("127.0.0.1:3001", f"127.0.0.1:{behind}")
    head = "{\n\tadmin off\n\tauto_https disable_redirects\n}\n"
    (folder / "Caddyfile").write_text(head + text, "utf-8")
    return ["caddy", "run", "--config", str(folder / "Caddyfile")]


def nginx(folder: Path, port: int, behind: int, certificate: Path) -> list[str]:
    text = (ROOT / "docs" / "nginx.conf").read_text("utf-8")
    text = text.replace("listen 443", f"listen 127.0.0.1:{port}").replace(
        "127.0.0.1:3001", f"127.0.0.1:{behind}"
    )
    text = text.replace("    listen [::]:443 ssl;\n", "")
    for name in ("fullchain", "privkey"):
        text = text.replace(f"/etc/letsencrypt/live/spy.example.com/{name}.pem", str(certificate))
    (folder / "site.conf").write_text(text, "utf-8")
    kept = " ".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("proxy", "client_body", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}}"
        f" http {{ access_log off; {kept} include {folder}/site.conf; }}",
        "utf-8",
    )
    return ["nginx", "-e", "stderr", "-c", str(folder / "nginx.conf")]


@asynccontextmanager
async def proxied(
    proxy: Proxy, discord: PretendDiscord, folder: Path
) -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    """A server that signs people in behind that proxy; its address, and whom to trust."""
    if shutil.which(proxy.__name__) is None:
        pytest.skip(f"there is no {proxy.__name__} here")
    authority, port = Authority(folder / "ours"), free_port()
    url = f"https://127.0.0.1:{port}"
    discord.oauth2.redirect_uris.add(f"{url}/signin/callback")
    tables = signing_tables(discord, signin={"public_url": url})
    command = proxy(folder, port, tables["server"]["port"], authority.sign("127.0.0.1"))
    async with server_of(discord, tables):
        process = await asyncio.create_subprocess_exec(
            *command,
            stderr=asyncio.subprocess.DEVNULL,
            env={"HOME": str(folder), "PATH": "/usr/bin:/usr/sbin"},
        )
        try:
            await eventually(lambda: listens(port), 10)
            yield url, ssl.create_default_context(cafile=authority.file)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


@pytest.mark.parametrize("proxy", [caddy, nginx])
async def test_people_sign_in_and_out_behind_it(
    discord: PretendDiscord, guild: Guild, tmp_path: Path, proxy: Proxy
) -> None:
    async with (
        proxied(proxy, discord, tmp_path) as (url, trust),
        Browser(url, trust) as browser,
    ):
        assert (await browser.get("/metrics")).status == 404
        begun = await browser.begin("/#now")
        assert begun.query["redirect_uri"] == f"{url}/signin/callback"
        assert "; Secure" in begun.cookie("spywatcher_signin")
        back = await browser.get((await browser.choose(begun, guild.owner.id)).location)
        assert (back.status, back.location) == (302, "/#now")
        answer = await browser.token(headers={"Origin": url})
        assert answer.json["user"]["username"] == "owner"
        assert (await browser.post("/signout", headers={"Origin": url})).status == 204
        assert (await browser.token()).status == 401


@pytest.mark.parametrize("proxy", [caddy, nginx])
async def test_a_made_up_address_gives_nobody_more_sign_ins(
    discord: PretendDiscord, tmp_path: Path, proxy: Proxy
) -> None:
    async with (
        proxied(proxy, discord, tmp_path) as (url, trust),
        Browser(url, trust) as browser,
    ):
        statuses = [
            (await browser.get("/signin", headers={"X-Forwarded-For": f"203.0.113.{n}"})).status
            for n in range(31)
        ]
        assert statuses == [302] * 30 + [429]
