"""The session with Discord: kept alive, resumed, or ended for a reason that one line tells."""

import asyncio
import logging
import time

import hikari
import pytest
from service import run, tables_for, write_settings
from waiting import eventually, within

import spywatcher
from simulator import PRIVILEGED, CloseCode, Intent, PretendDiscord

AWAY = r"WARNING spywatcher: not connected to Discord"


@pytest.fixture
def told(caplog):
    """What the log says of the gateway."""
    caplog.set_level(logging.INFO, "spywatcher")
    return lambda: [r.getMessage() for r in caplog.records if "to Discord" in r.getMessage()]


async def write(spy):
    await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general)


@pytest.mark.logs(AWAY)
async def test_the_server_is_up_before_discord_is(watching, discord, monkeypatch, told):
    hasty = spywatcher.Patience(first_retry=0.01)
    monkeypatch.setattr(spywatcher.Gateway, "patience", hasty)
    await discord.refuse()
    async with watching(ready=False) as spy:
        dashboard = await spy.connect()
        assert await dashboard.call("guilds:list") == {
            "ok": True,
            "guilds": [],
            "complete": False,
        }
        await eventually(told, timeout=10)
        await discord.accept()
        await discord.wait_for_bot()
        await dashboard.call("subscribe:guild", str(spy.guild.id))
        await write(spy)
        await dashboard.next("message:new")
        assert [line[:13] for line in told()] == ["not connected", "connected to "]


@pytest.mark.logs(AWAY)
async def test_after_a_drop_the_session_resumes_and_nothing_is_missed(spy, discord, told):
    dashboard = await spy.dashboard()
    await discord.drop(CloseCode.UNKNOWN_ERROR)
    await write(spy)
    await dashboard.next("message:new", timeout=10)
    assert discord.resumes == 1
    await eventually(lambda: told()[-1].endswith("session resumed, nothing missed"))
    assert sum("not connected" in line for line in told()) == 1


@pytest.mark.logs(AWAY)
async def test_when_the_session_is_lost_a_new_one_goes_on(spy, discord, told):
    dashboard = await spy.dashboard()
    await discord.invalidate()
    await discord.wait_until(lambda: discord.identifies == 2)
    await discord.wait_for_bot()
    await write(spy)
    await dashboard.next("message:new")
    assert told()[-1] == "connected to Discord: a new session, guilds: 1"


async def test_guilds_that_are_not_watched_are_not_counted(watching, discord, told):
    async with watching(discord={"guilds": ["123456789012345678"]}) as spy:
        await eventually(lambda: told() == ["connected to Discord: a new session, guilds: 0"])
        assert len(spy.server.gateway.bot.cache.get_guilds_view()) == 1
        assert spy.server.gateway.health()["guilds"] == 0


@pytest.mark.logs(AWAY, required=False)
async def test_after_a_new_session_old_state_is_no_news(watching, discord, guild):
    """Discord tells everything anew then, which is no change."""
    ada = guild.add_member("ada")
    async with watching() as spy:
        dashboard = await spy.dashboard()
        ada.appear("online", {"desktop": "online", "mobile": "online"}, ())
        await discord.invalidate()
        await discord.wait_until(lambda: discord.identifies == 2)
        await discord.wait_for_bot()
        await spy.nothing(dashboard)


@pytest.mark.logs(AWAY, required=False)
async def test_of_a_guild_that_went_while_the_bot_was_away_nobody_is_online(spy, discord, guild):
    presences = spy.server.gateway.presences
    other = discord.add_guild("gone soon")
    ada = other.add_member("ada")
    ada.appear("idle", ["web"])
    await eventually(lambda: presences.online(other.id) == [ada.id])
    discord.guilds.pop(other.id)
    await discord.invalidate()
    await eventually(lambda: presences.online(other.id) == [])
    assert presences.of(guild.id, guild.owner.id) is not None


async def test_stopping_while_it_connects_takes_no_time(watching, discord):
    async with within(3), watching(ready=False):
        await discord.wait_until(lambda: discord.identifies == 1)


async def test_intents_are_the_least_that_the_plugins_need(spy, discord):
    [session] = discord.sessions.values()
    assert session.intents == (
        Intent.GUILDS
        | Intent.GUILD_MEMBERS
        | Intent.GUILD_PRESENCES
        | Intent.GUILD_MESSAGES
        | Intent.GUILD_MESSAGE_TYPING
        | Intent.GUILD_MESSAGE_REACTIONS
    )


def test_without_plugins_no_privileged_intent_is_asked_for():
    assert spywatcher.intents_for([]) == hikari.Intents.GUILDS
    needed = spywatcher.intents_for([hikari.GuildMessageCreateEvent, hikari.GuildTypingEvent])
    assert not needed & PRIVILEGED


# ---- refused for good: the process ends and says what to change


async def test_a_wrong_token_ends_the_process_with_one_line(tmp_path, discord):
    async with PretendDiscord() as other:
        write_settings(tmp_path, tables_for(discord, discord={"token": other.token}))
        status, out, log = await run(tmp_path, "serve")
    assert (status, out) == (2, [])
    last = log[-1]
    assert last.startswith("spywatcher: Discord refused the bot token: reset it at https://")
    assert last.endswith("put the new one into [discord] token")
    assert "Traceback" not in "".join(log)
    assert other.token not in "".join(log)


async def test_refused_intents_end_the_process_naming_switches_and_plugins(tmp_path):
    async with PretendDiscord(allowed_privileged=0) as discord:
        write_settings(tmp_path, tables_for(discord))
        status, out, log = await run(tmp_path, "serve")
    assert (status, out) == (2, [])
    assert log[-1] == (
        "spywatcher: Discord refused the intents: switch on Server Members Intent (for access, analytics,"
        " history, members, presence) and Presence Intent (for analytics, history, presence) at https://discord.com/developers/applications"
        " -> your application -> Bot -> Privileged Gateway Intents"
    )
    assert "Traceback" not in "".join(log)


async def test_a_token_that_is_none_is_refused_before_any_network(tmp_path, discord):
    write_settings(tmp_path, tables_for(discord, discord={"token": "hush"}))
    status, _, log = await run(tmp_path, "serve")
    assert status == 2
    assert log == [line for line in log if line.startswith("spywatcher: discord.token: got what")]
    assert discord.rest_calls == 0


async def test_others_have_their_turn_while_thousands_of_packets_are_taken():
    def work():
        time.sleep(0.001)  # what a packet makes

    class Full:
        async def receive_json(self):
            work()

    async def take():
        connection = spywatcher.TakingTurns(Full())
        for _ in range(100):
            await connection.receive_json()

    taking, turns = asyncio.create_task(take()), 0
    while not taking.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
