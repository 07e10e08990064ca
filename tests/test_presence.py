"""presence:update and alert:multiClient, from Discord's JSON to the page."""

import asyncio
import re

import pytest
from waiting import eventually

from simulator import presence_json

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


async def test_of_a_member_who_is_not_known_nothing_is_told_until_it_is(spy, guild, discord):
    """The members of a large guild come in chunks, after the first changes of some of them."""
    dashboard = await spy.dashboard()
    stranger = guild.add_member("stranger")
    await discord.presence(guild, stranger, "online", ["desktop", "mobile"])
    await spy.nothing(dashboard)
    await discord.dispatch("GUILD_MEMBERS_CHUNK", chunk(guild, stranger))
    await discord.presence(guild, stranger, "idle")
    assert (await dashboard.next("presence:update"))["username"] == "stranger"


def chunk(guild, *members):
    return {
        "guild_id": str(guild.id),
        "members": [member.to_json() for member in members],
        "chunk_index": 0,
        "chunk_count": 1,
        "presences": [presence_json(guild, member) for member in members],
    }


async def test_of_who_left_nothing_is_told_or_kept(spy, guild, discord):
    dashboard = await spy.dashboard()
    presences = spy.server.gateway.presences
    for _ in range(3):
        ada = await discord.join(guild, "ada")
        await discord.presence(guild, ada, "online", ["desktop", "mobile"])
        assert (await dashboard.next("presence:update"))["status"] == "online"
        await discord.leave(guild, ada)
        await discord.presence(guild, ada, "idle")
    await spy.nothing(dashboard, "presence:update")
    assert presences.of(guild.id, ada.id) is None
    assert not presences.online(guild.id)


async def test_who_joins_again_comes_online_anew(spy, guild, discord):
    dashboard = await spy.dashboard()
    ada = await discord.join(guild, "ada")
    for _ in range(2):
        await discord.presence(guild, ada, "online")
        assert (await dashboard.next("presence:update"))["status"] == "online"
        await discord.leave(guild, ada)
        ada = await discord.join(guild, "ada", user=ada.user)


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


async def test_what_is_suppressed_prolongs_nothing(ada, watching, guild):
    async with watching(plugin={"presence": {"alert_cooldown": 0.6}}) as spy:
        dashboard = await spy.dashboard()

        async def come_and_go():
            await spy.discord.presence(guild, ada, "online", ["desktop", "mobile"])
            await spy.discord.presence(guild, ada, "online", ["desktop"])
            await spy.discord.caught_up()
            await asyncio.sleep(0.05)  # no more than it may ask
            return len(dashboard.events("alert:multiClient")) == 3

        await eventually(come_and_go)
        moments = [event.monotonic for event in dashboard.events("alert:multiClient")]
        assert moments[2] - moments[0] > 1.1  # at once, after 0.6 s, after 1.2 s


async def test_who_left_and_joined_again_does_not_cool_down(spy, guild, discord):
    dashboard = await spy.dashboard()
    user = None
    for _ in range(2):
        ada = await discord.join(guild, "ada", user=user)
        user = ada.user
        await discord.presence(guild, ada, "online", ["desktop", "mobile"])
        await discord.leave(guild, ada)
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


# ---- presence:snapshot


async def snapshot_of(spy, **viewer):
    dashboard = await spy.connect(**viewer)
    await dashboard.call("subscribe:guild", str(spy.guild.id))
    return await dashboard.next("presence:snapshot")


async def test_a_new_subscriber_is_told_who_is_there(ada, watching, guild):
    guild.add_member("robot", bot=True).appear("online", ["web"], ())
    guild.add_member("zoe").appear("dnd", {"mobile": "dnd", "desktop": "idle"}, ())
    guild.add_member("Bob").appear("idle", ["web"], ())
    async with watching() as spy:
        snapshot = await snapshot_of(spy)
        assert ISO.fullmatch(snapshot.pop("timestamp"))
        members = snapshot.pop("members")
        assert snapshot == {
            "counts": {"online": 0, "idle": 1, "dnd": 1, "offline": 2},
            "truncated": False,
            "guildId": str(guild.id),
        }
        assert [member["username"] for member in members] == ["Bob", "zoe", "ada", "owner"]
        assert members[1] == {
            "userId": members[1]["userId"],
            "username": "zoe",
            "status": "dnd",
            "platforms": ["desktop", "mobile"],
        }
        assert members[2]["platforms"] == []


async def test_only_the_new_subscriber_is_told_and_by_the_guilds_room_alone(spy):
    first = await spy.dashboard()
    await spy.dashboard()
    await spy.nothing(first)
    other = await spy.connect()
    await other.call("subscribe:analytics", str(spy.guild.id))
    await spy.nothing(other, "presence:snapshot")


async def test_a_later_snapshot_knows_all_that_happened_since(ada, spy, guild, discord):
    assert (await snapshot_of(spy))["counts"]["online"] == 0
    await discord.presence(guild, ada, "online", ["web"])
    bob = await discord.join(guild, "bob")
    eve = await discord.join(guild, "eve")
    await discord.presence(guild, eve, "dnd")
    await discord.rename(guild, bob, name="robert")
    await discord.leave(guild, eve)
    await discord.caught_up()
    snapshot = await snapshot_of(spy)
    assert snapshot["counts"] == {"online": 1, "idle": 0, "dnd": 0, "offline": 2}
    assert [member["username"] for member in snapshot["members"]] == ["ada", "owner", "robert"]


async def test_a_snapshot_counts_all_and_names_some(watching, guild):
    for number in range(1200):
        guild.add_member(f"member{number:04}")
    guild.add_member("zoe").appear("online", ["web"], ())
    async with watching(plugin={"presence": {"snapshot_members": 3}}) as spy:
        await eventually(
            lambda: len(spy.server.gateway.bot.cache.get_members_view_for_guild(guild.id)) > 1200
        )
        snapshot = await snapshot_of(spy)
        assert snapshot["counts"] == {"online": 1, "idle": 0, "dnd": 0, "offline": 1201}
        names = [member["username"] for member in snapshot["members"]]
        assert (names, snapshot["truncated"]) == (["zoe", "member0000", "member0001"], True)
