"""History: what is counted by the hour, what is kept of it, and what reaches dashboards."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from counting import HOUR, ROOT, Counting
from service import running, tables_for, write_settings
from waiting import eventually, passed
from watching import Watching

from simulator import (
    Guild,
    Json,
    Member,
    PretendDiscord,
    member_add_json,
    member_remove_json,
    message_json,
    presence_json,
    reaction_json,
    typing_json,
)

UPDATE = "history:update"
SOON = {UPDATE: 0.2}
WEEK = 168 * HOUR


@pytest.fixture
def ada(owls: Guild) -> Member:
    return owls.add_member("ada")


@pytest.fixture
async def counting(tmp_path: Path, owls: Guild, ada: Member) -> AsyncIterator[Counting]:
    async with Counting(tmp_path, [owls], plugin="history") as counting:
        yield counting


async def writes(counting: Counting, guild: Guild, member: Member, **more: Any) -> None:
    message = message_json(guild, member, guild.general, **more)
    await counting.feed("MESSAGE_CREATE", message)


async def hours(counting: Counting, guild: Guild) -> list[Json]:
    """The hours, without their times."""
    found = (await counting.update(guild))["hours"]
    return [{what: count for what, count in hour.items() if what != "hour"} for hour in found]


def counts(**some: int) -> Json:
    return {"messages": 0, "joins": 0, "leaves": 0, "active": 0, "online": 0} | some


def rows(path: Path, sql: str = "SELECT * FROM counts") -> list[Any]:
    db = sqlite3.connect(path)
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


def file_of(counting: Counting) -> Path:
    return counting.path.with_name("counts.history.db")


# ---- what is counted -------------------------------------------------------


async def test_who_writes_types_and_reacts_in_an_hour_is_one_active_member(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    for _ in range(2):
        await writes(counting, owls, ada)
        await counting.feed("TYPING_START", typing_json(owls, ada, owls.general))
        await counting.feed("MESSAGE_REACTION_ADD", reaction_json(owls, ada, owls.general))
    assert await hours(counting, owls) == [counts(messages=2, active=1)]


async def test_an_hour_is_told_in_utc_with_the_count_of_discord(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    await writes(counting, owls, ada)
    update = await counting.update(owls)
    assert update["hours"][0]["hour"] == "2023-11-14T22:00:00.000Z"
    assert update["members"] == len(owls.members) == 3
    bob = owls.add_member("bob")
    await counting.feed("GUILD_MEMBER_ADD", member_add_json(owls, bob))
    assert (await counting.update(owls))["members"] == 4


async def test_bots_webhooks_and_notices_do_not_count(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    robot = owls.add_member("robot", bot=True)
    await counting.feed("GUILD_MEMBER_ADD", member_add_json(owls, robot))
    robot.appear("online", {"desktop": "online"})
    await counting.feed("PRESENCE_UPDATE", presence_json(owls, robot))
    await writes(counting, owls, robot)
    await writes(counting, owls, ada, webhook_id=5)
    await counting.feed("MESSAGE_CREATE", message_json(owls, ada, owls.general) | {"type": 7})
    await counting.feed("TYPING_START", typing_json(owls, robot, owls.general))
    await counting.feed("MESSAGE_REACTION_ADD", reaction_json(owls, robot, owls.general))
    await counting.feed("GUILD_MEMBER_REMOVE", member_remove_json(owls, robot))
    assert await hours(counting, owls) == []


async def test_who_comes_and_goes_is_counted(counting: Counting, owls: Guild) -> None:
    bob = owls.add_member("bob")
    await counting.feed("GUILD_MEMBER_ADD", member_add_json(owls, bob))
    await counting.feed("GUILD_MEMBER_REMOVE", member_remove_json(owls, bob))
    assert await hours(counting, owls) == [counts(joins=1, leaves=1)]


async def test_the_peak_of_an_hour_is_at_least_who_was_online_when_it_began(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    ada.appear("idle", {"desktop": "idle"})
    await counting.feed("PRESENCE_UPDATE", presence_json(owls, ada))
    counting.clock.time += HOUR
    ada.appear("offline", {})
    await counting.feed("PRESENCE_UPDATE", presence_json(owls, ada))
    counting.clock.time += HOUR
    await writes(counting, owls, ada)
    assert await hours(counting, owls) == [
        counts(online=1),
        counts(online=1),
        counts(messages=1, active=1),
    ]


# ---- what is kept ----------------------------------------------------------


async def test_an_active_member_is_one_over_a_restart(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    for _ in range(2):
        async with Counting(tmp_path, [owls], plugin="history") as counting:
            await writes(counting, owls, ada)
            last = await hours(counting, owls)
    assert last == [counts(messages=2, active=1)]


async def test_when_an_hour_ends_nothing_of_its_members_is_kept(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    await writes(counting, owls, ada)
    await counting.flush()
    assert ada.id in {row[2] for row in rows(file_of(counting))}
    counting.clock.time += HOUR
    await counting.flush()
    assert {row[2] for row in rows(file_of(counting))} == {0}
    assert await hours(counting, owls) == [counts(messages=1, active=1)]


async def test_a_week_that_is_over_is_one_row_and_says_the_same(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    counting.clock.time += WEEK - counting.clock.time % WEEK
    for number in range(168):
        for _ in range(number % 3 * 150):
            counting.counter.count("messages", owls.id)
        await writes(counting, owls, ada)
        counting.clock.time += HOUR
    before = await hours(counting, owls)
    for _ in range(2):
        await counting.flush()
    assert len(rows(file_of(counting))) == 1
    assert await hours(counting, owls) == before
    assert before == [counts(messages=n % 3 * 150 + 1, active=1) for n in range(168)]


async def test_what_is_older_than_the_days_kept_is_deleted_by_the_week(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    async with Counting(tmp_path, [owls], plugin="history", days=14) as counting:
        await writes(counting, owls, ada)
        await counting.flush()
        counting.clock.time += 14 * 24 * HOUR
        await counting.flush()
        assert len(rows(file_of(counting))) == 1
        counting.clock.time += WEEK
        await counting.flush()
        assert rows(file_of(counting)) == []


@pytest.mark.logs(r"WARNING .*counts\.history\.db is used by another server")
async def test_a_second_server_on_a_file_does_not_count(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    async with Counting(counting.path.parent, [owls], plugin="history") as second:
        await writes(second, owls, ada)
        await second.flush()
        assert "another server" in str(second.problem)
        assert await second.counter.newest(owls.id) is None
    assert await hours(counting, owls) == []


async def test_a_fresh_instance_counts_on_where_the_old_one_ends(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    lock = asyncio.Lock()
    old = Counting(tmp_path, [owls], plugin="history", alone=lambda plugin: lock)
    fresh = Counting(tmp_path, [owls], plugin="history", alone=lambda plugin: lock)
    async with old:
        await writes(old, owls, ada)
        await old.flush()
        await fresh.__aenter__()
        await writes(old, owls, ada)
        await writes(fresh, owls, ada)
        assert await fresh.counter.newest(owls.id) is None
    await fresh.flush()
    assert (UPDATE, str(owls.id)) in fresh.emitted
    assert await hours(fresh, owls) == [counts(messages=3, active=1)]
    await fresh.__aexit__()


async def test_forgetting_covers_the_members_of_the_current_hour(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    await writes(counting, owls, ada)
    await counting.flush()
    config = counting.path.with_suffix(".toml")
    config.write_text(
        f'[plugins]\nfolders = ["{ROOT / "plugins"}"]\n[storage]\npath = "{counting.path.name}"\n'
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "spywatcher.py"), "--config", str(config)),
        *("forget", "--member", str(ada.id)),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert said.decode() == "plugin analytics: 0 removed\nplugin history: 1 removed\n"
    await counting.flush()
    assert await hours(counting, owls) == [counts(messages=1)]
    await writes(counting, owls, ada)
    assert await hours(counting, owls) == [counts(messages=2, active=1)]


# ---- what reaches dashboards -----------------------------------------------


async def test_a_new_subscriber_gets_the_window_and_then_what_changes(
    watching: Watching, guild: Guild
) -> None:
    ada = guild.add_member("ada")
    async with watching(throttle=SOON) as spy:
        await spy.discord.message(guild, ada, guild.general)
        await spy.discord.caught_up()
        dashboard = await spy.dashboard(kinds=["history"])
        update = await dashboard.next(UPDATE)
        assert update["guildId"] == str(guild.id)
        assert update["members"] == len(guild.members)
        assert [(hour["messages"], hour["active"]) for hour in update["hours"]] == [(1, 1)]
        await spy.discord.message(guild, ada, guild.general)
        changed = await dashboard.next(UPDATE)
        if changed["hours"] == update["hours"]:  # of the first message, held back until now
            changed = await dashboard.next(UPDATE)
        assert [hour["messages"] for hour in changed["hours"]] == [2]
        assert changed["hours"][0]["hour"] == update["hours"][0]["hour"]


async def test_a_kill_loses_at_most_the_last_second(
    tmp_path: Path, discord: PretendDiscord, guild: Guild
) -> None:
    ada = guild.add_member("ada")
    write_settings(tmp_path, tables_for(discord, storage={"path": "kept.db"}))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        for _ in range(20):
            await discord.message(guild, ada, guild.general)
        await discord.caught_up()
        await passed(1.0)  # the promise itself
        service.process.kill()
    path = tmp_path / "kept.history.db"
    assert await eventually(lambda: rows(path, "SELECT sum(messages) FROM counts")) == [(20,)]
