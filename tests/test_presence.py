"""presence:update and alert:multiClient, from Discord's JSON to the page."""

import re

import pytest

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
NO_COOLDOWN = {"presence": {"alert_cooldown": 0.0}}


@pytest.fixture
def ada(guild):
    """A member whom the bot finds offline."""
    return guild.add_member("ada")


# ---- presence:update


@TRANSPORTS
async def test_a_change_of_status_has_exactly_the_documented_fields(ada, spy, transport):
    dashboard = await spy.dashboard(transports=[transport])
    await spy.discord.presence(spy.guild, ada, "idle")
    event = await dashboard.next_event("presence:update")
    assert len(event.args) == 1
    moment = event.data.pop("timestamp")
    assert ISO.fullmatch(moment)
    assert event.data == {
        "userId": str(ada.id),
        "username": "ada",
        "status": "idle",
        "guildId": str(spy.guild.id),
    }


async def test_every_status_is_told_also_after_offline(ada, spy):
    dashboard = await spy.dashboard()
    statuses = ["online", "idle", "dnd", "offline", "dnd", "offline", "online"]
    for status in statuses:
        await spy.discord.presence(spy.guild, ada, status)
    came = [(await dashboard.next("presence:update"))["status"] for _ in statuses]
    assert came == statuses


async def test_changes_of_activity_and_device_are_no_change_of_status(ada, spy):
    await spy.discord.presence(spy.guild, ada, "online", ["desktop"])
    dashboard = await spy.dashboard()
    await spy.discord.presence(spy.guild, ada, "online", activities=[{"name": "Chess"}])
    await spy.discord.presence(spy.guild, ada, "online", ["mobile"])
    await spy.discord.presence(spy.guild, ada, "online", ["mobile"])
    await spy.nothing(dashboard)


async def test_offline_again_is_no_news(ada, spy):
    dashboard = await spy.dashboard()
    await spy.discord.presence(spy.guild, ada, "offline")
    await spy.nothing(dashboard)


async def test_what_discord_shows_at_the_start_is_no_change(ada, watching, guild):
    ada.appear("dnd", {"desktop": "dnd", "mobile": "dnd"}, ())
    async with watching(plugin=NO_COOLDOWN) as spy:
        dashboard = await spy.dashboard()
        await spy.discord.presence(guild, ada, "dnd", ["desktop", "mobile"])
        await spy.nothing(dashboard)


async def test_bots_are_silent(watching, guild):
    robot = guild.add_member("robot", bot=True)
    async with watching() as spy:
        dashboard = await spy.dashboard()
        await spy.discord.presence(guild, robot, "online", ["desktop", "web"])
        await spy.nothing(dashboard)


async def test_of_a_member_that_discord_has_not_sent_nothing_is_told(spy, guild):
    dashboard = await spy.dashboard()
    stranger = guild.add_member("stranger")
    await spy.discord.presence(guild, stranger, "online")
    await spy.nothing(dashboard)


async def test_a_member_who_wrote_keeps_the_name(ada, spy):
    """hikari 2.7 drops the user, not the member, once a message leaves its cache."""
    dashboard = await spy.dashboard()
    for _ in range(5):
        await spy.discord.message(spy.guild, ada, spy.guild.general)
    await spy.discord.presence(spy.guild, ada, "online")
    assert (await dashboard.next("presence:update"))["username"] == "ada"


async def test_a_renamed_member_has_the_new_name(ada, spy):
    dashboard = await spy.dashboard()
    await spy.discord.rename(spy.guild, ada, name="countess")
    await spy.discord.presence(spy.guild, ada, "online")
    assert (await dashboard.next("presence:update"))["username"] == "countess"


# ---- alert:multiClient


async def alerts(dashboard, spy):
    """The platforms of each alert that has come, once all is said."""
    await spy.discord.caught_up()
    await dashboard.call("guilds:list")
    return [alert["platforms"] for alert in dashboard.received("alert:multiClient")]


@TRANSPORTS
async def test_an_alert_has_exactly_the_documented_fields(ada, spy, transport):
    dashboard = await spy.dashboard(transports=[transport])
    await spy.discord.presence(spy.guild, ada, "online", ["web", "desktop"])
    event = await dashboard.next_event("alert:multiClient")
    assert ISO.fullmatch(event.data.pop("timestamp"))
    assert event.args == (
        {
            "userId": str(ada.id),
            "username": "ada",
            "platforms": ["desktop", "web"],
            "guildId": str(spy.guild.id),
        },
    )


async def test_each_growth_alerts_once_and_shrinking_never(ada, watching, guild):
    async with watching(plugin=NO_COOLDOWN) as spy:
        dashboard = await spy.dashboard()
        steps = ["desktop", "desktop mobile", "desktop mobile", "desktop mobile web", "web", "web"]
        for step in [*steps, "mobile web"]:
            await spy.discord.presence(guild, ada, "online", step.split())
        assert await alerts(dashboard, spy) == [
            ["desktop", "mobile"],
            ["desktop", "mobile", "web"],
            ["mobile", "web"],
        ]


async def test_one_device_for_another_is_no_alert(ada, spy):
    dashboard = await spy.dashboard()
    for device in ("desktop", "mobile", "web"):
        await spy.discord.presence(spy.guild, ada, "online", [device])
    assert await alerts(dashboard, spy) == []


async def test_activities_on_two_devices_are_no_new_alert(ada, watching, guild):
    async with watching(plugin=NO_COOLDOWN) as spy:
        dashboard = await spy.dashboard()
        for activity in ("Chess", "Go", "Poker"):
            await spy.discord.presence(
                guild, ada, "online", ["desktop", "mobile"], [{"name": activity}]
            )
        assert await alerts(dashboard, spy) == [["desktop", "mobile"]]


async def test_a_member_cools_down_after_an_alert_others_do_not(ada, watching, guild):
    bob = guild.add_member("bob")
    async with watching() as spy:
        dashboard = await spy.dashboard()
        for member in (ada, bob):
            await spy.discord.presence(guild, member, "online", ["desktop", "mobile"])
            await spy.discord.presence(guild, member, "offline")
            await spy.discord.presence(guild, member, "online", ["desktop", "web"])
        assert await alerts(dashboard, spy) == [["desktop", "mobile"]] * 2


async def test_an_unknown_platform_is_no_device(ada, spy):
    dashboard = await spy.dashboard()
    await spy.discord.presence(spy.guild, ada, "online", ["desktop", "embedded"])
    assert await alerts(dashboard, spy) == []


async def test_after_a_new_session_alerts_wait_for_the_grace(ada, watching, guild):
    async with watching(discord={"startup_grace": 30.0}) as spy:
        dashboard = await spy.dashboard()
        await spy.discord.presence(guild, ada, "online", ["desktop", "mobile"])
        await dashboard.next("presence:update")
        assert await alerts(dashboard, spy) == []


async def test_ids_arrive_as_strings(ada, spy):
    dashboard = await spy.dashboard()
    await spy.discord.presence(spy.guild, ada, "online", ["desktop", "mobile"])
    for name in ("presence:update", "alert:multiClient"):
        event = await dashboard.next(name)
        assert isinstance(event["userId"], str)
        assert isinstance(event["guildId"], str)
