"""message:new, from Discord's JSON to the page."""

import re
from datetime import UTC, datetime

import pytest

from simulator import message_json, snowflake

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@TRANSPORTS
async def test_a_message_has_exactly_the_documented_fields(spy, discord, guild, transport):
    dashboard = await spy.dashboard(transports=[transport])
    ada = await discord.join(guild, "ada")
    sent = await discord.message(guild, ada, guild.general, "top secret")
    event = await dashboard.next_event("message:new")
    moment = datetime.fromisoformat(sent["timestamp"]).astimezone(UTC)
    expected = {
        "userId": str(ada.id),
        "username": "ada",
        "channelId": str(guild.general.id),
        "channelName": "general",
        "timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "guildId": str(guild.id),
    }
    assert event.args == (expected,)
    assert ISO.fullmatch(event.data["timestamp"])


async def test_bots_webhooks_and_direct_messages_are_silent(spy, discord, guild):
    dashboard = await spy.dashboard()
    ada, robot = await discord.join(guild, "ada"), await discord.join(guild, "robot", bot=True)
    await discord.message(guild, robot, guild.general)
    await discord.message(guild, ada, guild.general, webhook_id=snowflake())
    await discord.direct_message(ada)
    await spy.nothing(dashboard, "message:new")


async def test_a_notice_that_discord_writes_for_a_member_is_silent(spy, discord, guild):
    dashboard = await spy.dashboard()
    notice = message_json(guild, guild.owner, guild.general, "") | {"type": 7}  # "joined"
    await discord.dispatch("MESSAGE_CREATE", notice, guild_id=guild.id)
    await spy.nothing(dashboard, "message:new")


async def test_the_bot_does_not_ask_for_what_people_write(spy, discord):
    [session] = discord.sessions.values()
    assert not session.intents & session.intents.MESSAGE_CONTENT
    assert not session.intents & session.intents.DM_MESSAGES


async def test_a_message_is_kept_nowhere(spy, discord, guild):
    await discord.message(guild, guild.owner, guild.general, "top secret")
    await discord.caught_up()
    assert not spy.server.gateway.bot.cache.get_messages_view()


async def test_a_thread_is_a_channel_with_a_name(watching, discord, guild):
    early = guild.add_thread("early birds", guild.general)
    async with watching() as spy:
        dashboard = await spy.dashboard()
        late = await discord.thread_create(guild, guild.general, "late owls")
        for thread in (early, late):
            await discord.message(guild, guild.owner, thread)
            assert (await dashboard.next("message:new"))["channelName"] == thread.name


@pytest.mark.parametrize("name", ["___hidden___", "\u200b", ""])
async def test_a_channel_without_a_name_to_show_is_its_id(watching, discord, guild, name):
    """Discord hides the names of channels that the bot may not see."""
    channel = guild.add_channel(name)
    async with watching() as spy:
        dashboard = await spy.dashboard()
        await discord.message(guild, guild.owner, channel)
        assert (await dashboard.next("message:new"))["channelName"] == str(channel.id)


async def test_a_channel_that_discord_has_not_sent_is_its_id(spy, discord, guild):
    dashboard = await spy.dashboard()
    channel = guild.add_channel("unheard of")
    await discord.message(guild, guild.owner, channel)
    assert (await dashboard.next("message:new"))["channelName"] == str(channel.id)


async def test_a_renamed_channel_and_a_renamed_member_have_their_new_names(spy, discord, guild):
    dashboard = await spy.dashboard()
    await discord.channel_update(guild, guild.general, name="nest")
    await discord.rename(guild, guild.owner, name="athena")
    await discord.message(guild, guild.owner, guild.general)
    event = await dashboard.next("message:new")
    assert (event["username"], event["channelName"]) == ("athena", "nest")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\u202eb\u2066c\u200fd", "abcd"),
        ("a\u200bb\u200dc\ufeffd\u2060e", "abcde"),
        ("a\x00b\nc\x1b[31md", "abc[31md"),
        ("a\u2028b\u2029c", "abc"),
        ("  padded  ", "padded"),
        ("z\u0308e <b>ü</b> 🦉", "z\u0308e <b>ü</b> 🦉"),
    ],
)
async def test_names_are_cleaned(spy, discord, guild, name, shown):
    dashboard = await spy.dashboard()
    ada = await discord.join(guild, name)
    channel = await discord.channel_create(guild, name)
    await discord.message(guild, ada, channel)
    event = await dashboard.next("message:new")
    assert (event["username"], event["channelName"]) == (shown, shown)


async def test_ids_that_a_number_cannot_hold_arrive_whole(spy, discord, guild):
    dashboard = await spy.dashboard()
    ada = guild.add_member("ada", user_id=9_007_199_254_740_993)
    await discord.message(guild, ada, guild.general)
    assert (await dashboard.next("message:new"))["userId"] == "9007199254740993"
