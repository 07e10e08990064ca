"""Sign in with Discord, as people do it: the page in the box, in a real browser."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import browser as fixtures
import pytest
from browser import Browser, axe_faults
from playwright.async_api import Page, expect
from service import running, server_of
from signing import signing_tables
from waiting import eventually

from simulator import Guild, Member, Permission, PretendDiscord

pytestmark = fixtures.IN_ONE_LOOP
browser, chromium = fixtures.browser, fixtures.chromium
discord, js = fixtures.discord, fixtures.js
#: What the console says of a sign-in that was refused.
REFUSED = "403.*signin/callback"


@pytest.fixture
def mod(guild: Guild) -> Member:
    staff = guild.add_role("Staff", Permission.MANAGE_GUILD)
    return guild.add_member("mod", roles=[staff])


def tables_of(discord: PretendDiscord, **signin: str) -> tuple[dict[str, Any], str]:
    tables = signing_tables(discord, signin=signin)
    return tables, tables["plugin"]["signin"]["public_url"]


async def sign_in(page: Page, who: str) -> None:
    """From this server's page, over Discord's, and back."""
    await page.get_by_role("link", name="Sign in with Discord").click()
    await page.get_by_role("button", name=who).click()


def state(page: Page) -> Any:
    return expect(page.locator("#state"))


async def test_in_the_demo_each_of_four_people_sees_what_they_may(
    browser: Browser, tmp_path: Path
) -> None:
    browser.expected.append(REFUSED)
    async with running(tmp_path, "demo", "--port", 0) as demo:
        await demo.wrote(r"Open this address")
        url = f"http://localhost:{demo.port}"
        for who in ("who owns", "a moderator of"):
            page = await browser.open(url)
            await sign_in(page, who)
            await state(page).to_have_text("Live")
            await expect(page.locator("#guilds")).to_contain_text("Night Owls")
            await expect(page.locator("#guilds")).not_to_contain_text("Book Club")
            await page.context.close()
        page = await browser.open(url)
        await sign_in(page, "a plain member")
        await expect(page.locator("#no-guild")).to_contain_text("no guild here that you may see")
        page = await browser.open(url)
        await sign_in(page, "who is banned here")
        await expect(page.locator("body")).to_contain_text("You are banned here")


async def test_who_cancels_may_try_again(
    browser: Browser, discord: PretendDiscord, guild: Guild
) -> None:
    tables, url = tables_of(discord)
    browser.expected.append(REFUSED)
    async with server_of(discord, tables):
        page = await browser.open(url)
        await sign_in(page, "Cancel")
        await expect(page.locator("h1")).to_have_text("You are not signed in")
        await expect(page.locator("p").first).to_have_text(
            "You have cancelled the sign-in on Discord's page."
        )
        assert await axe_faults(page) == []
        await page.get_by_role("link", name="Try again").click()
        await page.get_by_role("button", name="owner").click()
        await state(page).to_have_text("Live")
        assert page.url.startswith(url)


async def test_who_is_signed_in_stays_so_over_a_restart(
    browser: Browser, discord: PretendDiscord, mod: Member
) -> None:
    tables, url = tables_of(discord)
    async with server_of(discord, tables):
        page = await browser.open(url, fake_clock=True)
        await sign_in(page, "mod")
        await state(page).to_have_text("Live")
    await state(page).to_have_text("Reconnecting")
    async with server_of(discord, tables):
        await page.clock.fast_forward(8_000)  # longer than the stock client waits to try again
        await state(page).to_have_text("Live")
        await page.reload()
        await state(page).to_have_text("Live")


async def test_whoever_is_signed_in_never_sees_a_token_end(
    browser: Browser, discord: PretendDiscord, mod: Member
) -> None:
    """One that lasts a few seconds is to end soon from the first on, and is kept for half of them."""
    tables = signing_tables(discord, signin={"token_ttl": 20.0})
    async with server_of(discord, tables) as server:
        page = await browser.open(tables["plugin"]["signin"]["public_url"], fake_clock=True)
        await sign_in(page, "mod")
        await state(page).to_have_text("Live")
        sockets = list(server.socketio.eio.sockets)
        asked: list[str] = []
        page.on("response", lambda answer: asked.append(answer.url))
        for number in (1, 2):
            await page.clock.fast_forward(10_000)
            await eventually(
                partial(lambda wanted: sum("token" in url for url in asked) == wanted, number)
            )
        await state(page).to_have_text("Live")
        await expect(page.locator("#notice")).to_be_hidden()
        assert list(server.socketio.eio.sockets) == sockets


async def test_signing_out_ends_the_second_tab_too(
    browser: Browser, discord: PretendDiscord, mod: Member
) -> None:
    tables, url = tables_of(discord)
    async with server_of(discord, tables):
        page = await browser.open(url)
        await sign_in(page, "mod")
        await state(page).to_have_text("Live")
        second = await page.context.new_page()
        await second.goto(url)
        await state(second).to_have_text("Live")
        await page.get_by_role("button", name="Sign out").click()
        await state(page).to_have_text("Signed out")
        await state(second).to_have_text("Signed out")
        await second.reload()
        await expect(second.get_by_role("link", name="Sign in with Discord")).to_be_visible()


@pytest.mark.logs("cannot be told|signin.db", required=False)
async def test_who_cannot_be_signed_out_is_told_so(
    browser: Browser, discord: PretendDiscord, mod: Member, tmp_path: Path
) -> None:
    tables, url = tables_of(discord)
    browser.expected.append("503.*signout")
    async with server_of(discord, tables):
        page = await browser.open(url)
        await sign_in(page, "mod")
        await state(page).to_have_text("Live")
        (tmp_path / "signin.db").write_text("no database")
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.locator("#notice")).to_contain_text("You are still signed in")
        await state(page).to_have_text("Live")


async def test_who_loses_the_role_while_looking_is_told_so(
    browser: Browser, discord: PretendDiscord, guild: Guild, mod: Member
) -> None:
    tables, url = tables_of(discord)
    async with server_of(discord, tables):
        page = await browser.open(url)
        await sign_in(page, "mod")
        await expect(page.locator("#guilds")).to_contain_text(guild.name)
        await discord.remove_role(guild, mod, guild.roles[mod.role_ids[0]])
        await expect(page.locator("#notice")).to_contain_text(
            f"Access to guild {guild.id} was lost"
        )


async def test_two_browsers_are_two_people(
    browser: Browser, discord: PretendDiscord, guild: Guild, mod: Member
) -> None:
    guild.add_member("ada")
    mod.user.avatar = "c0ffee" + "0" * 26
    tables, url = tables_of(discord, cdn_url=f"http://127.0.0.1:{discord.port}")
    async with server_of(discord, tables):
        first, second = await browser.open(url), await browser.open(url)
        await sign_in(first, "mod")
        await sign_in(second, "ada")
        await expect(first.locator("#guilds")).to_contain_text(guild.name)
        await expect(first.locator("#face img")).to_be_visible()
        await expect(second.locator("#no-guild")).to_be_visible()
        await expect(second.locator("#face")).to_have_text("A")
