"""Rights are asked for before Discord has said enough, change, and end; who is told of that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import test_access
import test_cluster
from waiting import clock, eventually
from watching import Watch

import simulator
import spywatcher
from simulator import Overwrite, Permission, hidden_except, iso

AWAY = "not connected to Discord"
SOON = 1.0


async def write(spy, place=None):
    await spy.discord.message(spy.guild, spy.guild.owner, place or spy.guild.general)


@pytest.fixture
def hasty(monkeypatch):
    patience = spywatcher.Patience(first_retry=0.05)
    monkeypatch.setattr(spywatcher.Gateway, "patience", patience)


@pytest.fixture
def ada(guild):
    return guild.add_member("ada", roles=[guild.add_role("Staff", Permission.MANAGE_GUILD)])


@pytest.fixture
def before_discord(watching, discord, hasty):
    """A server that is up before Discord lets its bot in."""

    @asynccontextmanager
    async def start() -> AsyncIterator:
        await discord.refuse()
        async with watching(ready=False) as spy:
            yield spy

    return start


async def arrive(spy):
    await spy.discord.accept()
    await spy.discord.wait_for_bot()


# ---- before Discord has said enough


@pytest.mark.logs(AWAY, required=False)
async def test_a_subscription_before_discord_is_there_is_pending_then_brings_events(
    before_discord, guild
):
    async with before_discord() as spy:
        dashboard = await spy.connect()
        answer = await dashboard.call("subscribe:guild", str(guild.id), timeout=1)
        assert answer == {"ok": True, "room": f"guild:{guild.id}", "pending": True}
        await arrive(spy)
        await dashboard.next("presence:snapshot")
        await write(spy)
        await dashboard.next("message:new")


@pytest.mark.logs(AWAY, required=False)
async def test_a_pending_subscription_that_may_not_be_ends_in_an_error(before_discord, guild):
    async with before_discord() as spy:
        dashboard = await spy.connect("77")
        unknown = str(guild.id + 1)
        for guild_id in (str(guild.id), unknown):
            assert (await dashboard.call("subscribe:guild", guild_id))["pending"]
        await arrive(spy)
        errors = [await dashboard.next("error", 3) for _ in range(2)]
        assert {error["code"] for error in errors} == {"forbidden"}
        texts = {error["message"] for error in errors}
        assert texts == {f"No access to guild {one}" for one in (guild.id, unknown)}


@pytest.mark.logs(AWAY, required=False)
async def test_a_pending_room_counts_and_is_left_by_unsubscribe(watching, discord, guild, hasty):
    await discord.refuse()
    async with watching(ready=False, limits={"rooms_per_connection": 1}) as spy:
        dashboard = await spy.connect()
        assert (await dashboard.call("subscribe:guild", str(guild.id)))["pending"]
        refused = await dashboard.call("subscribe:guild", "5")
        assert refused["error"]["code"] == "too_many_rooms"
        assert (await dashboard.call("unsubscribe:guild", str(guild.id)))["ok"]
        await arrive(spy)
        await eventually(lambda: spy.server.access.complete)
        await write(spy)
        await spy.nothing(dashboard, "message:new", "presence:snapshot")


@pytest.mark.logs(AWAY, required=False)
async def test_nothing_waits_behind_pending_subscriptions(before_discord):
    async with before_discord() as spy:
        dashboard = await spy.connect()
        started = clock()
        calls = [dashboard.call("subscribe:guild", str(n)) for n in range(1, 18)]
        assert all(answer["pending"] for answer in await asyncio.gather(*calls))
        assert clock() - started < SOON


@pytest.mark.logs(AWAY, required=False)
async def test_who_asks_once_before_discord_is_there_is_told_which_guilds_there_are(
    before_discord, guild
):
    async with before_discord() as spy:
        dashboard = await spy.connect()
        asked = await dashboard.call("guilds:list")
        assert (asked["guilds"], asked["complete"]) == ([], False)
        await arrive(spy)
        told = await dashboard.next("guilds:update", 3)
        assert [one["id"] for one in told["guilds"]] == [str(guild.id)]
        assert (await dashboard.call("guilds:list"))["complete"]


# ---- guilds:update


async def test_a_right_won_or_lost_and_a_new_name_are_told(watching, guild, ada):
    async with watching() as spy:
        dashboard = await spy.connect(ada)
        assert len((await dashboard.call("guilds:list"))["guilds"]) == 1
        await spy.discord.guild_update(guild, name="Renamed")
        assert (await dashboard.next("guilds:update"))["guilds"][0]["name"] == "Renamed"
        roles, ada.role_ids = list(ada.role_ids), []
        await spy.discord.dispatch("GUILD_MEMBER_UPDATE", simulator.member_add_json(guild, ada))
        assert (await dashboard.next("guilds:update"))["guilds"] == []
        ada.role_ids = roles
        await spy.discord.dispatch("GUILD_MEMBER_UPDATE", simulator.member_add_json(guild, ada))
        assert len((await dashboard.next("guilds:update"))["guilds"]) == 1


async def test_many_changes_are_told_at_most_once_a_second(watching, guild):
    async with watching() as spy:
        dashboard = await spy.connect()
        await dashboard.call("guilds:list")
        began = time.monotonic()
        for number in range(30):
            await spy.discord.guild_update(guild, name=f"n{number}")
        names = []
        while "n29" not in names:
            names.append((await dashboard.next("guilds:update"))["guilds"][0]["name"])
        assert len(names) <= time.monotonic() - began + 1


async def test_who_has_not_asked_is_not_told(spy):
    dashboard = await spy.connect()
    await spy.discord.guild_update(spy.guild, name="Renamed")
    await spy.discord.caught_up()
    await dashboard.call("unsubscribe:guild", "1")
    assert not dashboard.received("guilds:update")


async def test_nothing_is_kept_of_who_is_gone(watching, guild, ada):
    async with watching() as spy:
        dashboard = await spy.dashboard(ada)
        await dashboard.call("guilds:list")
        await dashboard.call("subscribe:analytics", str(guild.id))
        await dashboard.disconnect()
        rights = spy.server.rights
        await eventually(lambda: not rights.subscriptions.connected)
        assert not rights.subscriptions.guilds()
        assert not rights.lists._lists


# ---- what decides, line by line


async def test_a_role_that_is_deleted_grants_nothing_to_who_still_carries_it(watching, guild, ada):
    role = guild.add_role("Secret")
    ada.role_ids.append(role.id)
    secret = guild.add_channel("secret", overwrites=hidden_except(guild, role))
    async with watching() as spy:
        dashboard = await spy.dashboard(ada)
        ids = {"guild_id": str(guild.id), "role_id": str(role.id)}
        await spy.discord.dispatch("GUILD_ROLE_DELETE", ids)
        await write(spy, secret)
        await spy.nothing(dashboard)


async def test_a_role_that_is_deleted_denies_nothing(watching, guild, ada):
    role = guild.add_role("Muted")
    ada.role_ids.append(role.id)
    denied = [Overwrite(role.id, deny=Permission.VIEW_CHANNEL)]
    place = guild.add_channel("place", overwrites=denied)
    async with watching() as spy:
        dashboard = await spy.dashboard(ada)
        ids = {"guild_id": str(guild.id), "role_id": str(role.id)}
        await spy.discord.dispatch("GUILD_ROLE_DELETE", ids)
        await write(spy, place)
        await dashboard.next("message:new")


async def test_a_token_that_changes_outside_of_the_room_counts_inside(watching, guild, ada):
    guild.general.overwrites = hidden_except(guild)
    async with watching() as spy:
        token = spy.token(ada, role="ADMIN")
        dashboard = await spy.js.connect(spy.url, token=token)
        await dashboard.call("subscribe:guild", str(guild.id))
        await write(spy)
        await dashboard.next("message:new")
        await dashboard.call("unsubscribe:guild", str(guild.id))
        assert (await dashboard.call("auth:refresh", spy.token(ada)))["ok"]
        await dashboard.call("subscribe:guild", str(guild.id))
        await write(spy)
        await spy.nothing(dashboard, "message:new")


async def test_settings_that_change_while_nobody_listens_count_later(watching, guild, ada):
    guild.general.overwrites = hidden_except(guild)
    async with watching(auth={"channel_visibility": False}) as spy:
        dashboard = await spy.dashboard(ada)
        await write(spy)
        await dashboard.next("message:new")
        await dashboard.call("unsubscribe:guild", str(guild.id))
        change_auth(spy, channel_visibility=True)
        await dashboard.call("subscribe:guild", str(guild.id))
        await write(spy)
        await spy.nothing(dashboard, "message:new")


def change_auth(spy: Watch, **changed: Any) -> None:
    """What SIGHUP does after these keys of [auth] have changed."""
    replace = spywatcher.msgspec.structs.replace
    auth = replace(spy.server._settings.auth, **changed)
    settings = replace(spy.server._settings, auth=auth)
    spy.server.reload(settings, spywatcher.read_keys(auth, settings.folder))


async def test_lists_follow_who_is_an_admin(spy, guild):
    roles = ("MODERATOR", "ADMIN")
    tokens = [spy.token(str(number), role=role) for number, role in enumerate(roles, 7)]
    both = [await spy.js.connect(spy.url, token=token) for token in tokens]
    assert [len((await one.call("guilds:list"))["guilds"]) for one in both] == [0, 1]
    change_auth(spy, admin_roles=("MODERATOR",))
    assert [len((await one.call("guilds:list"))["guilds"]) for one in both] == [1, 0]


async def test_a_time_out_ends_without_an_event(watching, guild, ada):
    guild.add_role("x")
    powers = Permission.MANAGE_GUILD | Permission.VIEW_CHANNEL | spywatcher.MANAGE_THREADS
    guild.roles[ada.role_ids[0]].permissions = powers
    thread = guild.add_thread("private", guild.general)
    async with watching(auth={"viewer_permissions": ["VIEW_CHANNEL"]}) as spy:
        dashboard = await spy.dashboard(ada)
        private = {"type": 12, "newly_created": True}
        await spy.discord.dispatch("THREAD_CREATE", thread.to_json() | private)
        end = datetime.now(UTC) + timedelta(seconds=1.5)
        body = simulator.member_add_json(guild, ada) | {"communication_disabled_until": iso(end)}
        await spy.discord.dispatch("GUILD_MEMBER_UPDATE", body)
        await write(spy, thread)
        await spy.nothing(dashboard, "message:new")
        await eventually(lambda: datetime.now(UTC) > end)
        await write(spy, thread)
        await dashboard.next("message:new")


async def test_a_list_has_a_guild_again_once_a_time_out_ends(watching, guild, ada):
    async with watching() as spy:
        dashboard = await spy.connect(ada)
        await dashboard.call("guilds:list")
        end = datetime.now(UTC) + timedelta(seconds=1.5)
        body = simulator.member_add_json(guild, ada) | {"communication_disabled_until": iso(end)}
        await spy.discord.dispatch("GUILD_MEMBER_UPDATE", body)
        assert (await dashboard.next("guilds:update"))["guilds"] == []
        assert len((await dashboard.next("guilds:update"))["guilds"]) == 1


async def test_who_subscribes_again_without_the_right_is_not_even_given_what_waits(
    watching, guild, ada
):
    async with watching() as spy:
        page, subscriptions = await spy.dashboard(ada), spy.server.rights.subscriptions
        [dashboard] = subscriptions.connected.values()
        for number in range(3):  # the first leaves at once, the others a little later
            spy.server.node.deliver("x", str(guild.id), {"number": number}, "guild")
        auth = spy.server._settings.auth
        needed = spywatcher.msgspec.structs.replace(auth, viewer_permissions=("BAN_MEMBERS",))
        spy.server.access.reconfigure(needed)
        with pytest.raises(spywatcher.ClientError, match="No access"):
            await subscriptions.subscribe(dashboard, "guild", str(guild.id))
        assert (await page.next("error"))["message"] == f"Access to guild {guild.id} was lost"
        await spy.nothing(page, "error")
        assert [event["number"] for event in page.received("x")] == [0]


SECRET_SNAPSHOT = """
from spywatcher import Payload, on_subscribe

class Secret(Payload):
    channel_id: str

@on_subscribe("guild", emit="secret:snapshot")
def secret(guild_id, spy):
    return Secret(channel_id="{channel}")
"""


async def test_a_snapshot_of_a_channel_is_for_those_who_may_see_it(watching, guild, ada, tmp_path):
    secret = guild.add_channel("secret", overwrites=hidden_except(guild))
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "secret.py").write_text(SECRET_SNAPSHOT.format(channel=secret.id))
    async with watching(plugins={"folders": [str(tmp_path / "plugins")]}) as spy:
        admin, dashboard = await spy.connect(), await spy.connect(ada)
        for one in (dashboard, admin):
            await one.call("subscribe:guild", str(guild.id))
        await admin.next("secret:snapshot")
        await spy.nothing(dashboard)


async def test_the_text_of_a_voice_channel_is_for_those_who_may_connect(watching, guild, ada):
    denied = [Overwrite(guild.id, deny=spywatcher.CONNECT)]
    voice = guild.add_channel("voice", overwrites=denied)
    voice.type = simulator.ChannelType.GUILD_VOICE
    async with watching() as spy:
        dashboard = await spy.dashboard(ada)
        await write(spy, voice)
        await spy.nothing(dashboard)
        await spy.discord.channel_update(guild, voice, overwrites=[])
        await write(spy, voice)
        await dashboard.next("message:new")


#: For each line of the table in `Access.may_have`: what holds it.
HELD_BY = {
    "roles, channels, overwrites": [
        test_a_role_that_is_deleted_grants_nothing_to_who_still_carries_it,
        test_access.test_a_change_of_overwrites_counts_from_the_next_message,
    ],
    "roles, owner, name of the guild": [
        test_a_right_won_or_lost_and_a_new_name_are_told,
        test_access.test_who_loses_the_right_leaves_the_room_and_is_told,
    ],
    "roles and time-out of a member": [
        test_access.test_who_loses_the_right_leaves_the_room_and_is_told,
    ],
    "the end of a time-out": [
        test_a_time_out_ends_without_an_event,
        test_a_list_has_a_guild_again_once_a_time_out_ends,
    ],
    "guilds that come, go or are lost": [
        test_a_pending_subscription_that_may_not_be_ends_in_an_error,
        test_access.test_nobody_is_thrown_out_by_a_new_session,
    ],
    "the token": [test_a_token_that_changes_outside_of_the_room_counts_inside],
    "settings, another gateway holder": [
        test_settings_that_change_while_nobody_listens_count_later,
        test_cluster.test_after_a_takeover_everybody_is_judged_anew,
    ],
    "who is in a room": [test_access.test_who_joins_a_room_later_is_judged_too],
}


def test_all_that_decides_rights_is_held_by_a_test():
    table = spywatcher.Access.may_have.__doc__.split("what decides")[1].splitlines()[1:]
    lines = {line.strip().split("  ")[0] for line in table if line.strip()}
    assert lines == set(HELD_BY)
