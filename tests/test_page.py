"""The page at /, in a real browser: who comes in, what is seen, and that it stays seen."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import browser as fixtures
import jwt
import pytest
import pytest_asyncio
from browser import Browser, axe_faults
from playwright.async_api import Page, expect
from redisserver import free_port
from service import SECRET, fetch, server_of, viewer_token
from signing import signing_tables
from waiting import eventually
from watching import Watch, Watching

from simulator import Guild, PretendDiscord
from spywatcher import Gateway, Patience

pytestmark = fixtures.IN_ONE_LOOP
browser, chromium = fixtures.browser, fixtures.chromium
discord, js = fixtures.discord, fixtures.js

#: Plugins of the tests stand before the shipped ones, and take the place of those of their name.
OWN_PLUGINS = {"folders": [str(Path(__file__).parent / "page"), "plugins"]}
#: Between two looks of the page at the server's health.
HEALTH_INTERVAL_MS = 5_000
#: The stock client waits so long at most before it tries again.
LONGEST_RETRY_MS = 5_000 * 1.5
VIEWS = ("now", "time", "people", "wall")


@pytest_asyncio.fixture(loop_scope="session")
async def spy(watching: Watching) -> AsyncIterator[Watch]:
    async with watching(plugins=OWN_PLUGINS) as spy:
        yield spy


def address(spy: Watch, view: str = "now", token: str | None = None) -> str:
    """The page's address for an admin, or for whom the token is."""
    return f"{spy.url}/#{view}&token={token or spy.token(role='ADMIN')}"


async def answers(spy: Watch, path: str, status: int) -> bool:
    return (await fetch(spy.server.port, path)).code == status


def state(page: Page) -> Any:
    return expect(page.locator("#state"))


async def looks_on(page: Page, spy: Watch) -> None:
    """The page is connected, and has chosen the guild that it hears of."""
    await state(page).to_have_text("Live")
    await eventually(lambda: spy.server.rooms.has_listeners(f"guild:{spy.guild.id}"))


# ---- coming in -------------------------------------------------------------


async def test_a_token_in_the_address_signs_in_and_is_kept_nowhere(
    browser: Browser, spy: Watch
) -> None:
    page = await browser.open(address(spy))
    await state(page).to_have_text("Live")
    assert await page.evaluate("location.href") == f"{spy.url}/#now"
    stored = await page.evaluate("[{...localStorage}, {...sessionStorage}, document.cookie]")
    assert stored == [{"spywatcher.guild": str(spy.guild.id)}, {}, ""]


async def test_without_a_token_the_page_says_what_to_do_and_takes_one(
    browser: Browser, spy: Watch
) -> None:
    page = await browser.open(spy.url)
    await expect(page.locator("#door-why")).to_contain_text("you need a token")
    await page.get_by_label("Token", exact=True).fill(spy.token(role="ADMIN"))
    await page.keyboard.press("Enter")
    await state(page).to_have_text("Live")


async def test_a_wrong_token_is_named_and_can_be_replaced(browser: Browser, spy: Watch) -> None:
    page = await browser.open(address(spy, token="nonsense"))
    await state(page).to_have_text("Refused")
    await expect(page.locator("#door-why")).to_contain_text("This is no token")
    await page.get_by_label("Token", exact=True).fill(spy.token(role="ADMIN"))
    await page.get_by_role("button", name="Open").click()
    await state(page).to_have_text("Live")


async def test_a_new_address_in_the_same_window_brings_its_token_along(
    browser: Browser, spy: Watch
) -> None:
    page = await browser.open(address(spy, token="nonsense"))
    await state(page).to_have_text("Refused")
    await page.goto(address(spy, "people"))  # only what follows # differs: nothing is loaded
    await state(page).to_have_text("Live")
    assert await page.evaluate("location.hash") == "#people"


async def test_who_looks_next_in_the_same_window_sees_nothing_of_what_was_seen_before(
    browser: Browser, spy: Watch
) -> None:
    page = await browser.open(address(spy))
    await looks_on(page, spy)
    ada = await spy.discord.join(spy.guild, "ada")
    await expect(page.locator("#events li")).to_have_count(1)
    await page.goto(address(spy, token=spy.token("2", role="ADMIN")))
    await expect(page.locator("#no-events")).to_be_visible()
    await spy.discord.message(spy.guild, ada, spy.guild.general)
    await expect(page.locator("#events li p")).to_have_text(["ada wrote in #general"])


async def test_an_expired_token_is_told_from_a_wrong_one(browser: Browser, spy: Watch) -> None:
    claims = {"discordId": "1", "access": True, "role": "ADMIN", "exp": int(time.time()) - 60}
    page = await browser.open(address(spy, token=jwt.encode(claims, SECRET)))
    await expect(page.locator("#door-why")).to_contain_text("This token has ended")


async def test_who_is_banned_is_told_so(browser: Browser, spy: Watch) -> None:
    page = await browser.open(address(spy, token=viewer_token("BANNED")))
    await expect(page.locator("#door-why")).to_contain_text("You have been banned")


async def test_a_token_that_is_about_to_end_can_be_replaced_without_a_gap(
    browser: Browser, spy: Watch
) -> None:
    page = await browser.open(address(spy, token=spy.token(role="ADMIN", ttl=50.0)))
    await state(page).to_have_text("Token ends soon")
    await page.get_by_label("New token").fill(spy.token(role="ADMIN"))
    await page.get_by_role("button", name="Use it").click()
    await state(page).to_have_text("Live")
    await expect(page.locator("#notice")).to_be_hidden()


async def test_a_token_that_has_ended_can_be_replaced_where_one_is(
    browser: Browser, spy: Watch
) -> None:
    page = await browser.open(spy.url)
    await expect(page.locator("#door")).to_be_visible()
    await page.goto(address(spy, token=spy.token(role="ADMIN", ttl=3.0)))
    await state(page).to_have_text("Token ended")
    await page.get_by_label("New token").fill(spy.token(role="ADMIN"))
    await page.get_by_role("button", name="Use it").click()
    await state(page).to_have_text("Live")


# ---- through Discord -------------------------------------------------------


async def sign_in(page: Page, name: str) -> None:
    await page.get_by_role("link", name="Sign in with Discord").click()
    await page.get_by_role("button", name=name).click()
    await state(page).to_have_text("Live")


async def test_discord_signs_in_and_a_reload_keeps_one_signed_in(
    browser: Browser, discord: PretendDiscord, guild: Guild
) -> None:
    tables = signing_tables(discord, plugins=OWN_PLUGINS)
    async with server_of(discord, tables):
        page = await browser.open(tables["plugin"]["signin"]["public_url"])
        await sign_in(page, "owner")
        await page.reload()
        await state(page).to_have_text("Live")
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.locator("#door-why")).to_contain_text("Sign in to see the guilds")


async def test_who_signs_in_as_another_in_a_second_tab_is_that_one_in_the_first_too(
    browser: Browser, discord: PretendDiscord, guild: Guild
) -> None:
    guild.add_member("ada")
    tables = signing_tables(discord, plugins=OWN_PLUGINS)
    tables["plugin"]["signin"]["token_ttl"] = 62.0  # renewed when half of it is over
    async with server_of(discord, tables):
        url = tables["plugin"]["signin"]["public_url"]
        page = await browser.open(url, fake_clock=True)
        await sign_in(page, "owner")
        second = await page.context.new_page()
        await second.goto(f"{url}/signin?next=/")
        await second.get_by_role("button", name="ada").click()
        await state(second).to_have_text("Live")
        async with page.expect_response("**/signin/token"):
            await page.clock.fast_forward(40_000)
        await expect(page.locator("#no-guild")).to_be_visible()
        await expect(page.get_by_role("button", name="Sign out ada")).to_be_visible()
        await state(page).to_have_text("Live")


# ---- what happens ----------------------------------------------------------


async def test_each_kind_of_event_appears(browser: Browser, spy: Watch) -> None:
    page = await browser.open(address(spy))
    await looks_on(page, spy)
    discord, guild = spy.discord, spy.guild
    rank = await discord.role_create(guild, "Veteran")
    ada = await discord.join(guild, "ada", account_age_days=3)
    await discord.message(guild, ada, guild.general)
    await discord.presence(guild, ada, "online", ["desktop"])
    await discord.presence(guild, ada, "online", ["desktop", "mobile"])
    await discord.add_role(guild, ada, rank)
    await discord.leave(guild, ada)
    await expect(page.locator("#events li p")).to_have_text(
        [
            "ada left",
            "ada gained Veteran",
            "ada is on desktop and mobile at once",
            "ada is online",
            "ada wrote in #general",
            "ada joined; the account is 3 days old",
        ]
    )


async def test_a_viewer_of_two_guilds_sees_one_at_a_time(browser: Browser, spy: Watch) -> None:
    discord, other = spy.discord, spy.discord.add_guild("Book Club")
    bob = other.add_member("bob")
    await discord.outage_over(other)
    ada = await discord.join(spy.guild, "ada")
    page = await browser.open(address(spy))
    await page.locator("#guilds").select_option(label="Book Club")
    await expect(page.locator("#members b").first).to_have_text("bob")
    await discord.message(spy.guild, ada, spy.guild.general)
    await discord.message(other, bob, other.general)
    await expect(page.locator("#events li p")).to_have_text(["bob wrote in #general"])


async def test_who_comes_first_sees_the_guild_with_the_most_people_online(
    browser: Browser, watching: Watching, discord: PretendDiscord, guild: Guild
) -> None:
    for name in ("A", "Z"):
        discord.add_guild(name).add_member("ada").appear("offline")
    guild.name = "M"
    guild.add_member("bob").appear("online", ["web"])
    async with watching(plugins=OWN_PLUGINS) as spy:
        page = await browser.open(address(spy))
        await expect(page.locator("#members b").first).to_have_text("bob")
        assert await page.locator("#guilds").input_value() == str(guild.id)


async def test_members_are_found_by_status_device_and_name(
    browser: Browser, watching: Watching, guild: Guild
) -> None:
    guild.add_member("ada").appear("online", ["desktop", "web"])
    guild.add_member("bob").appear("idle", ["mobile"])
    guild.add_member("carol")
    async with watching(plugins=OWN_PLUGINS) as spy:
        page = await browser.open(address(spy))
        names = page.locator("#members b")
        await expect(names).to_have_text(["ada", "bob", "carol", "owner"])
        await page.get_by_role("button", name="Several 1").click()
        await expect(names).to_have_text(["ada"])
        await page.get_by_role("button", name="Any device").click()
        await page.get_by_role("button", name="Idle 1").click()
        await expect(names).to_have_text(["bob"])
        await page.get_by_role("button", name="All", exact=True).click()
        await page.get_by_placeholder("Find a member").fill("CAR")
        await expect(names).to_have_text(["carol"])


async def test_members_come_and_go_while_one_looks(browser: Browser, spy: Watch) -> None:
    page = await browser.open(address(spy))
    await looks_on(page, spy)
    ada = await spy.discord.join(spy.guild, "ada")
    await spy.discord.presence(spy.guild, ada, "dnd", ["web"])
    await expect(page.locator("#members li", has_text="ada")).to_contain_text("do not disturb")
    await expect(page.get_by_role("button", name="Do not disturb 1")).to_be_visible()
    await spy.discord.leave(spy.guild, ada)
    await expect(page.locator("#members li", has_text="ada")).to_have_count(0)


async def test_the_stream_can_be_filtered_and_paused(browser: Browser, spy: Watch) -> None:
    discord, guild = spy.discord, spy.guild
    art = await discord.channel_create(guild, "art")
    ada = await discord.join(guild, "ada")
    bob = await discord.join(guild, "bob")
    page = await browser.open(address(spy))
    await looks_on(page, spy)
    await discord.message(guild, ada, art)
    await discord.message(guild, bob, guild.general)
    rows = page.locator("#events li:visible p")
    await expect(rows).to_have_count(2)
    await page.locator("#by-channel").select_option("art")
    await expect(rows).to_have_text(["ada wrote in #art"])
    await page.get_by_role("button", name="Pause").click()
    await discord.message(guild, ada, art)
    await page.get_by_role("button", name="Resume · 1 new").click()
    await expect(rows).to_have_count(2)
    await page.get_by_role("checkbox", name="Messages").uncheck()
    await expect(page.locator("#no-events")).to_contain_text("None of the 3 events")


async def test_no_more_than_500_events_are_kept(browser: Browser, spy: Watch) -> None:
    page = await browser.open(address(spy))
    await looks_on(page, spy)
    ada = await spy.discord.join(spy.guild, "ada")
    for _ in range(600):
        await spy.discord.message(spy.guild, ada, spy.guild.general)
    await spy.discord.leave(spy.guild, ada)
    await expect(page.locator("#events li p").first).to_have_text("ada left")
    await expect(page.locator("#events li")).to_have_count(500)


async def test_where_not_all_who_are_online_are_named_devices_are_those_of_the_named(
    browser: Browser, watching: Watching, guild: Guild
) -> None:
    guild.add_member("ada").appear("online", ["desktop", "web"])
    for name in ("bob", "carol"):
        guild.add_member(name).appear("online", ["web"])
    async with watching(plugins=OWN_PLUGINS, plugin={"presence": {"snapshot_members": 2}}) as spy:
        page = await browser.open(address(spy))
        figure = page.locator("#figures div", has_text="On several devices")
        await expect(figure).to_contain_text("50% of the 2 known here")


# ---- over time, people -----------------------------------------------------


async def test_history_is_drawn_from_its_counts(browser: Browser, watching: Watching) -> None:
    zone = ZoneInfo("Asia/Kolkata")  # half an hour off: hours of UTC begin at half past
    hours = [[24 * 28, 1, 0, 0, 1, 3], [49, 4, 1, 0, 2, 5], [48, 6, 0, 2, 3, 7]]
    history = {"hours": hours, "members": 1234}
    async with watching(plugins=OWN_PLUGINS, plugin={"history": history}) as spy:
        page = await browser.open(address(spy, "time"), timezone_id=zone.key)
        messages = page.get_by_role("group", name="Messages a day")
        await expect(messages).to_have_attribute("aria-label", re.compile("10 in 28 days"))
        growth = page.get_by_role("group", name="Growth")
        await expect(growth).to_contain_text("-1 in 28 days")
        then = datetime.now(UTC).replace(minute=0) - timedelta(hours=48)
        local = then.astimezone(zone)
        cell = page.locator(f'[data-key="{local.isoweekday() % 7} {local.hour}"]')
        await expect(cell).to_have_text("1.5")
        await page.get_by_role("link", name="Now").click()
        await expect(page.locator("#figures div", has_text="Members")).to_contain_text("1,234")


def noon_zone() -> str:
    """A time zone in which it is past noon: no midnight is near."""
    return f"Etc/GMT{datetime.now(UTC).hour - 12:+d}"


async def test_todays_numbers_are_right_where_the_browsers_clock_is_wrong(
    browser: Browser, watching: Watching
) -> None:
    history = {"hours": [[24 * 7, 10, 0, 0, 1, 9], [0, 40, 0, 0, 1, 3]]}
    async with watching(plugins=OWN_PLUGINS, plugin={"history": history}) as spy:
        page = await browser.open("about:blank", timezone_id=noon_zone())
        await page.clock.install(time=datetime.now(UTC) - timedelta(hours=1))
        await page.goto(address(spy))
        figure = page.locator("#figures div", has_text="Messages today")
        await expect(figure.locator(".value")).to_have_text("40")
        await expect(figure.locator(".change")).to_have_text("compared in 1 day")


async def test_who_is_online_is_set_beside_the_most_of_that_hour_a_week_ago(
    browser: Browser, watching: Watching
) -> None:
    history = {"hours": [[24 * 8, 1, 0, 0, 1, 3], [24 * 7, 10, 0, 0, 1, 9]]}
    async with watching(plugins=OWN_PLUGINS, plugin={"history": history}) as spy:
        page = await browser.open(address(spy), timezone_id=noon_zone())
        figure = page.locator("#figures div", has_text="Online")
        await expect(figure.locator(".change")).to_have_text("up to 9 a week ago")


async def test_numbers_on_an_axis_are_not_cut_off(browser: Browser, watching: Watching) -> None:
    history = {"hours": [[24 * 28, 1, 0, 0, 1, 3], [30, 9_000, 1, 0, 2, 5]]}
    async with watching(plugins=OWN_PLUGINS, plugin={"history": history}) as spy:
        page = await browser.open(address(spy, "time"))
        canvas = page.get_by_role("group", name="Messages a day").locator("canvas")
        await expect(canvas).to_be_visible()
        ink = "(c) => c.getContext('2d').getImageData(0, 0, 1, c.height).data.some(Boolean)"
        await eventually(lambda: canvas.evaluate(ink.replace("0, 0, 1", "0, 0, c.width")))
        assert not await canvas.evaluate(ink)


async def test_where_nothing_has_been_counted_the_page_says_what_will_come(
    browser: Browser, watching: Watching
) -> None:
    async with watching(plugins=OWN_PLUGINS) as spy:
        page = await browser.open(address(spy, "time"))
        await expect(page.locator("#no-history")).to_contain_text("Nothing has been counted yet")
        await page.get_by_role("link", name="Now", exact=True).click()
        await expect(page.locator("#figures")).to_contain_text("compared in 7 days")
        await expect(page.locator("#no-events")).to_contain_text("Nothing has happened since")
    async with watching(plugins={"disabled": ["history"]}) as spy:
        page = await browser.open(address(spy, "time"))
        await expect(page.locator("#no-history")).to_contain_text("keeps no history")


async def test_scores_are_listed_with_what_they_mean(browser: Browser, spy: Watch) -> None:
    page = await browser.open(address(spy, "people"))
    ada = await spy.discord.join(spy.guild, "ada")
    await spy.discord.typing(spy.guild, ada, spy.guild.general)
    ghosts = page.locator("#scores section", has=page.get_by_role("heading", name="Ghosts"))
    await expect(ghosts.locator("li b")).to_have_text(["ada"])
    await expect(ghosts).to_contain_text("divided by their messages + 1")


# ---- hostile names ---------------------------------------------------------

HOSTILE = (
    '<img src=x onerror="document.title=1">',
    "\u202egnp.exe",
    "</li></ol><script>document.title=1</script>",
)


async def test_names_are_text_whatever_they_are(
    browser: Browser, watching: Watching, discord: PretendDiscord, guild: Guild
) -> None:
    guild.name = HOSTILE[0]
    people = [guild.add_member(name) for name in (*HOSTILE, "W" * 10_000)]
    async with watching(plugins=OWN_PLUGINS) as spy:
        page = await browser.open(address(spy), viewport={"width": 360, "height": 780})
        await looks_on(page, spy)
        for person in people:
            await discord.message(guild, person, guild.general)
            await discord.typing(guild, person, guild.general)
        await expect(page.locator("#events li")).to_have_count(len(people))
        await expect(page.locator("#events b", has_text="<img src=x")).to_have_count(1)
        for view in VIEWS:
            await page.evaluate(f"location.hash = '{view}'")
            assert await page.locator("main img, main script").count() == 0
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        assert HOSTILE[0] in await page.title()


# ---- faults ----------------------------------------------------------------


async def test_the_page_comes_back_after_a_restart(
    browser: Browser, watching: Watching, guild: Guild
) -> None:
    ada, port = guild.add_member("ada"), {"port": free_port()}
    async with watching(server=port) as spy:
        page = await browser.open(address(spy), fake_clock=True)
        await looks_on(page, spy)
        await spy.discord.message(guild, ada, guild.general)
        await expect(page.locator("#events li")).to_have_count(1)
    await state(page).to_have_text("Reconnecting")
    async with watching(server=port) as spy:
        await page.clock.fast_forward(LONGEST_RETRY_MS)
        await looks_on(page, spy)
        await spy.discord.message(guild, ada, guild.general)
        await expect(page.locator("#events li:not([data-kind=gap])")).to_have_count(2)
        await expect(page.locator("#events [data-kind=gap]")).to_contain_text("connection was lost")


async def test_after_a_short_cut_not_a_row_is_missed(
    browser: Browser, watching: Watching, guild: Guild
) -> None:
    ada = guild.add_member("ada")
    async with watching() as spy:
        page = await browser.open(address(spy))
        await looks_on(page, spy)
        await spy.discord.message(guild, ada, guild.general)
        await expect(page.locator("#events li")).to_have_count(1)
        await page.context.set_offline(True)
        await state(page).to_have_text("Reconnecting")
        await spy.discord.message(guild, ada, guild.general)
        await page.context.set_offline(False)
        await expect(page.locator("#events li p")).to_have_text(["ada wrote in #general"] * 2)


async def test_a_laptop_that_slept_says_since_when_events_are_missing(
    browser: Browser, watching: Watching
) -> None:
    async with watching(recovery={"window": 0.0}) as spy:
        page = await browser.open(address(spy), fake_clock=True, timezone_id=noon_zone())
        await looks_on(page, spy)
        await page.clock.fast_forward(10 * 60_000)
        row = page.locator("#events [data-kind=gap]")
        await expect(row).to_contain_text("connection was lost after")
        times = re.findall(r"(\d\d):(\d\d):\d\d", await row.inner_text())
        noticed, lost = (60 * int(hour) + int(minute) for hour, minute in times)
        assert noticed - lost >= 9


@pytest.mark.logs("not connected to Discord")
@pytest.mark.logs("failed to communicate with server", required=False)
async def test_the_page_says_when_discord_is_away(
    browser: Browser, watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bot waits longer after each try in vain, up to a minute.
    hasty = Patience(first_retry=0.05, last_retry=0.2)
    monkeypatch.setattr(Gateway, "patience", hasty)
    async with watching() as spy:
        page = await browser.open(address(spy), fake_clock=True)
        await state(page).to_have_text("Live")
        await spy.discord.refuse()
        await spy.discord.drop()
        await eventually(lambda: answers(spy, "/health/ready", 503))
        await page.clock.fast_forward(HEALTH_INTERVAL_MS)
        await state(page).to_have_text("Discord is away")
        await spy.discord.accept()
        await eventually(lambda: answers(spy, "/health/ready", 200))
        await page.clock.fast_forward(HEALTH_INTERVAL_MS)
        await state(page).to_have_text("Live")


async def test_a_page_behind_others_keeps_no_work_for_its_return(
    browser: Browser, spy: Watch
) -> None:
    page = await browser.open(address(spy), fake_clock=True)
    await looks_on(page, spy)
    await page.evaluate(
        """() => {
            globalThis.frames = 0;
            const ask = requestAnimationFrame;
            globalThis.requestAnimationFrame = (look) => { frames += 1; return ask(look); };
            Object.defineProperty(document, "hidden", { get: () => true });
        }"""
    )
    await page.clock.run_for(60_000)
    assert await page.evaluate("frames") == 0


# ---- for everybody ---------------------------------------------------------


async def test_the_page_can_be_used_by_keyboard_alone(browser: Browser, spy: Watch) -> None:
    page = await browser.open(address(spy))
    await expect(page.locator("#main")).to_be_visible()  # it is "Live" before it knows of a guild
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.locator("#main")).to_be_focused()
    seen = set()
    for _ in range(40):
        await page.keyboard.press("Tab")
        seen.add(
            await page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")
        )
    assert {"pause", "by-name", "by-channel", "events", "find", "members"} <= seen


async def test_the_map_of_the_week_is_read_by_arrow_keys(
    browser: Browser, watching: Watching
) -> None:
    history = {"hours": [[300, 1, 0, 0, 1, 3], [1, 4, 1, 0, 2, 5]]}
    async with watching(plugins=OWN_PLUGINS, plugin={"history": history}) as spy:
        page = await browser.open(address(spy, "time"), locale="en-GB")
        await expect(page.locator("#week-reading")).to_contain_text("Busiest")
        await page.locator('#week td[tabindex="0"]').focus()
        await expect(page.locator("#week-reading")).to_contain_text("Monday 00:00")
        await page.keyboard.press("ArrowDown")
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#week-reading")).to_contain_text("Tuesday 01:00")


async def test_axe_finds_no_serious_fault(
    browser: Browser, watching: Watching, guild: Guild
) -> None:
    guild.add_member("ada").appear("online", ["desktop", "web"])
    history = {"hours": [[300, 1, 0, 0, 1, 3], [1, 4, 1, 0, 2, 5]]}
    async with watching(plugins=OWN_PLUGINS, plugin={"history": history}) as spy:
        page = await browser.open(spy.url)
        await expect(page.locator("#door")).to_be_visible()
        assert await axe_faults(page) == []
        await page.get_by_label("Token", exact=True).fill(spy.token(role="ADMIN"))
        await page.keyboard.press("Enter")
        await state(page).to_have_text("Live")
        for view in VIEWS:
            await page.evaluate(f"location.hash = '{view}'")
            assert await axe_faults(page) == [], view


async def test_the_wall_shows_guilds_in_turn_and_nothing_to_press(
    browser: Browser, spy: Watch
) -> None:
    spy.discord.show(spy.discord.add_guild("Book Club"))
    await spy.discord.caught_up()
    page = await browser.open(address(spy, "wall&every=60"), fake_clock=True)
    title = page.locator("#guild-name")
    for name in ("Book Club", spy.guild.name, "Book Club"):
        await expect(title).to_have_text(name)
        await page.clock.fast_forward(61_000)
    assert await page.locator("button:visible, input:visible, select:visible").count() == 0
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="Pause")).to_be_visible()


async def test_nothing_is_loaded_from_elsewhere(browser: Browser, spy: Watch) -> None:
    page = await browser.open("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(address(spy))
    await state(page).to_have_text("Live")
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith(f"{spy.url}/")] == []
