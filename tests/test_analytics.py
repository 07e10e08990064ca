"""Analytics: what is counted, what reaches dashboards, and what becomes of the file."""

from __future__ import annotations

import asyncio
import collections
import os
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from counting import BOT, HOUR, ROOT, Counting
from service import running, tables_for, write_settings
from waiting import eventually, passed
from watching import Watch, Watching

import spywatcher
from simulator import (
    Guild,
    Json,
    Member,
    PretendDiscord,
    guild_create_json,
    make_guild,
    member_add_json,
    member_remove_json,
    message_json,
    presence_json,
    reaction_json,
    typing_json,
)

UPDATE = "analytics:update"
SOON = {UPDATE: 0.2}


@pytest.fixture
def ada(owls: Guild) -> Member:
    return owls.add_member("ada")


@pytest.fixture
async def counting(tmp_path: Path, owls: Guild, ada: Member) -> AsyncIterator[Counting]:
    async with Counting(tmp_path, [owls]) as counting:
        yield counting


async def types(counting: Counting, guild: Guild, member: Member, channel: Any = None) -> None:
    """One more typing start than before."""
    counting.clock.time += 10.0
    await counting.feed("TYPING_START", typing_json(guild, member, channel or guild.general))


async def score(counting: Counting, guild: Guild) -> list[tuple[str, float]]:
    lists = await counting.lists(guild)
    return [(ghost["username"], ghost["ghostScore"]) for ghost in lists["ghosts"]]


# ---- what is counted -------------------------------------------------------


async def test_repeats_of_a_typing_start_are_one(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    for _ in range(3):
        await counting.feed("TYPING_START", typing_json(owls, ada, owls.general))
        counting.clock.time += 4.0
    assert await score(counting, owls) == [("ada", 1.0)]
    counting.clock.time -= 2.0  # ten seconds after the first one
    await counting.feed("TYPING_START", typing_json(owls, ada, owls.general))
    assert await score(counting, owls) == [("ada", 2.0)]


async def test_an_id_too_large_for_the_store_takes_no_other_counts_along(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    await types(counting, owls, ada)
    packet = typing_json(owls, ada, owls.general)
    packet["member"]["user"]["id"] = str(2**64 - 1)
    await counting.feed("TYPING_START", packet)
    assert await score(counting, owls) == [("ada", 1.0)]


async def test_scores_have_three_decimals(counting: Counting, owls: Guild, ada: Member) -> None:
    await types(counting, owls, ada)
    for _ in range(2):
        await counting.feed("MESSAGE_CREATE", message_json(owls, ada, owls.general))
    assert await score(counting, owls) == [("ada", 0.333)]


async def test_bots_webhooks_and_direct_messages_never_count(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    robot = owls.add_member("robot", bot=True)
    await types(counting, owls, robot)
    await counting.feed("MESSAGE_REACTION_ADD", reaction_json(owls, robot, owls.general))
    await counting.feed("MESSAGE_CREATE", message_json(owls, robot, owls.general))
    await counting.feed("MESSAGE_CREATE", message_json(owls, ada, owls.general, webhook_id=5))
    await counting.feed("MESSAGE_CREATE", message_json(None, ada, 77))
    await counting.feed("TYPING_START", typing_json(None, ada, 77))
    assert await counting.lists(owls) == {"ghosts": [], "lurkers": [], "channelDiversity": []}


async def test_notices_are_not_messages(counting: Counting, owls: Guild, ada: Member) -> None:
    joined = message_json(owls, ada, owls.general) | {"type": 7}
    await counting.feed("MESSAGE_CREATE", joined)
    assert (await counting.lists(owls))["channelDiversity"] == []


async def test_changes_of_activity_are_not_changes_of_status(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    for number in range(12):
        activity = {"name": f"Chess {number}"}
        ada.appear("online" if number < 6 else "idle", {"desktop": "online"}, [activity])
        await counting.feed("PRESENCE_UPDATE", presence_json(owls, ada))
    await counting.flush()
    found = await counting.in_store(
        lambda db: db.execute("SELECT presences FROM totals").fetchall()
    )
    assert found == [(2,)]


async def test_a_thread_is_a_channel_of_its_own(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    thread = owls.add_thread("plans", owls.general)
    await types(counting, owls, ada, owls.general)
    await counting.feed("MESSAGE_CREATE", message_json(owls, ada, thread))
    (row,) = (await counting.lists(owls))["channelDiversity"]
    assert row["channelCount"] == 2


async def test_who_comes_back_begins_anew(counting: Counting, owls: Guild, ada: Member) -> None:
    await types(counting, owls, ada, 1_001)
    await counting.flush()
    await counting.feed("GUILD_MEMBER_REMOVE", member_remove_json(owls, ada))
    await counting.feed("GUILD_MEMBER_ADD", member_add_json(owls, ada))
    await types(counting, owls, ada, 1_002)
    (row,) = (await counting.lists(owls))["channelDiversity"]
    assert row["channelCount"] == 1
    assert await score(counting, owls) == [("ada", 1.0)]


async def test_ignored_members_do_not_count_and_lose_what_they_had(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    async with Counting(tmp_path, [owls]) as counting:
        await types(counting, owls, ada)
    async with Counting(tmp_path, [owls], ignore_members=[str(ada.id)]) as counting:
        await types(counting, owls, ada)
        assert await score(counting, owls) == []
    assert rows(counting.path) == []


async def test_new_settings_count_at_once(counting: Counting, owls: Guild, ada: Member) -> None:
    bob = owls.add_member("bob")
    await counting.feed("GUILD_CREATE", guild_create_json(owls))
    for member in (ada, bob):
        await types(counting, owls, member)
    assert len(await score(counting, owls)) == 2
    counting.reconfigure(ignore_members=[str(ada.id)])
    assert await score(counting, owls) == [("bob", 1.0)]
    counting.reconfigure(window_days=1)
    counting.clock.time += 24 * HOUR
    assert await score(counting, owls) == []


async def test_part_of_the_members_is_not_taken_for_all(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    await types(counting, owls, ada)
    alone = {"guild_id": str(owls.id), "members": [], "chunk_index": 0, "chunk_count": 1}
    await counting.feed("GUILD_MEMBERS_CHUNK", alone)
    await counting.feed("GUILD_CREATE", guild_create_json(owls) | {"members": []})
    assert len(await score(counting, owls)) == 1


@pytest.mark.parametrize(
    "table", [{"window_days": 0}, {"ghosts": "ten"}, {"ignore_members": [5]}, {"windowdays": 7}]
)
def test_wrong_settings_are_refused_with_their_key(table: Json) -> None:
    tables = {"analytics": table}
    folders = spywatcher.PluginsSettings()
    with pytest.raises(
        spywatcher.OperatorError, match=rf"^plugin\.analytics\.{next(iter(table))}:"
    ):
        spywatcher.PluginLoader(folders, tables, ROOT, spywatcher.Metrics()).load_all()


# ---- the file --------------------------------------------------------------


def rows(path: Path, sql: str = "SELECT * FROM counts") -> list[Any]:
    db = sqlite3.connect(path)
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


async def test_counts_are_on_disk_within_a_second(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    await types(counting, owls, ada)
    (row,) = await eventually(lambda: rows(counting.path), timeout=1.0)
    hour = int(counting.clock.time // HOUR)
    assert row == (hour, owls.id, ada.id, owls.general.id, 1, 0, 0, 0)


async def test_neither_names_nor_content_are_kept(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    ada.user.name = "ada-lovelace"
    message = message_json(owls, ada, owls.general, "meet me at noon")
    await counting.feed("MESSAGE_CREATE", message)
    await counting.flush()
    kept = b"".join(path.read_bytes() for path in counting.path.parent.iterdir())
    assert b"at noon" not in kept
    assert b"lovelace" not in kept


async def test_hours_that_left_the_window_are_deleted_and_the_file_shrinks(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    async with Counting(tmp_path, [owls], window_days=1) as counting:
        analytics = counting.module.analytics
        for number in range(20_000):
            analytics.count(counting.module.MESSAGES, owls.id, ada.id, 1_000_000_000 + number)
        await counting.flush()
        counting.clock.time += 24 * HOUR
        await types(counting, owls, ada)
        assert await score(counting, owls) == [("ada", 1.0)]
    assert len(rows(counting.path)) == 1
    assert counting.path.stat().st_size < 65_536


@pytest.mark.logs(
    r"WARNING .*analytics: .*counts\.db cannot be written \(database or disk is full\)"
)
async def test_a_full_disk_stops_nothing_and_is_caught_up_with(
    counting: Counting, owls: Guild, ada: Member, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await counting.flush()
    await counting.in_store(lambda db: db.execute("PRAGMA disk.max_page_count = 1"))
    for number in range(300):
        await types(counting, owls, ada, 1_000_000 + number)
    for _ in range(2):
        await counting.flush()
    assert "full" in str(counting.problem)
    assert await score(counting, owls) == [("ada", 300.0)]
    assert counting.faults == counting.counted("failed writes") > 1
    await counting.in_store(lambda db: db.execute("PRAGMA disk.max_page_count = 1000000"))
    await counting.flush()
    assert counting.problem is None
    assert counting.counted("written rows") == 300
    assert rows(counting.path, "SELECT sum(typing) FROM counts") == [(300,)]
    assert sum("cannot be written" in line for line in caplog.messages) == 1


@pytest.mark.logs(r"WARNING .*cannot be written \(unable to open database")
async def test_a_folder_that_is_missing_is_reported_until_it_is_there(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    async with Counting(tmp_path, [owls], path="later/counts.db") as counting:
        await types(counting, owls, ada)
        assert await score(counting, owls) == [("ada", 1.0)]
        assert "unable to open" in str(counting.problem)
        (tmp_path / "later").mkdir()
        await counting.flush()
        assert counting.problem is None
    assert len(rows(counting.path)) == 1


@pytest.mark.logs(r"WARNING .*cannot be written", required=False)
async def test_who_leaves_while_the_file_is_away_is_not_in_it_later(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    async with Counting(tmp_path, [owls], path="later/counts.db") as counting:
        (tmp_path / "later").mkdir()
        await types(counting, owls, ada)
    (tmp_path / "later").rename(tmp_path / "away")
    async with Counting(tmp_path, [owls], path="later/counts.db") as counting:
        await counting.flush()
        await counting.feed("GUILD_MEMBER_REMOVE", member_remove_json(owls, ada))
        await counting.flush()
        (tmp_path / "away").rename(tmp_path / "later")
        assert await score(counting, owls) == []
    assert rows(tmp_path / "later" / "counts.db") == []


@pytest.mark.logs(r"WARNING .*cannot be written", required=False)
async def test_what_waits_for_a_broken_disk_is_bounded(
    tmp_path: Path, owls: Guild, ada: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Counting(tmp_path, [owls], path="never/counts.db") as counting:
        monkeypatch.setattr("spywatcher_plugins._counts.MOST_WAITING", 100)
        for number in range(150):
            await types(counting, owls, ada, 1_000_000 + number)
            await counting.flush()
        waiting = await counting.in_store(
            lambda db: db.execute("SELECT count(*) FROM waiting").fetchone()
        )
        assert waiting == (100,)
        assert "new counts are dropped" in str(counting.problem)


@pytest.mark.logs(r"WARNING .*counts\.db is used by another server: this one does not count")
async def test_a_second_server_on_a_file_says_so_and_does_not_count(
    counting: Counting, owls: Guild, ada: Member, caplog: pytest.LogCaptureFixture
) -> None:
    second = Counting(counting.path.parent, [owls], clock=counting.clock)
    async with second:
        for _ in range(3):
            await types(counting, owls, ada)
            await second.feed("TYPING_START", typing_json(owls, ada, owls.general))
            await counting.flush()
            await second.flush()
        assert "another server" in str(second.problem)
        assert counting.problem is None
        assert sum("another server" in line for line in caplog.messages) == 1
        assert await score(second, owls) == []
        assert second.emitted == []
    assert await score(counting, owls) == [("ada", 3.0)]
    assert rows(counting.path, "SELECT sum(typing) FROM counts") == [(3,)]


@pytest.mark.logs(r"WARNING .*another server")
async def test_a_second_server_counts_on_once_the_first_has_ended(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    second = Counting(tmp_path, [owls])
    async with AsyncExitStack() as stack:
        async with Counting(tmp_path, [owls]) as first:
            await stack.enter_async_context(second)
            await types(first, owls, ada)
            await types(second, owls, ada)
        await second.flush()
        await types(second, owls, ada)
        assert second.problem is None
        assert await score(second, owls) == [("ada", 2.0)]


@pytest.mark.logs(r"ERROR .*counts\.db is damaged \(.*\): put aside as counts\.db\.damaged-")
async def test_a_damaged_file_is_put_aside(tmp_path: Path, owls: Guild, ada: Member) -> None:
    damaged = b"SQLite format 3\0" + b"nonsense" * 10_000
    (tmp_path / "counts.db").write_bytes(damaged)
    async with Counting(tmp_path, [owls]) as counting:
        await types(counting, owls, ada)
        await counting.flush()
        await counting.flush()
        assert counting.problem is None
    assert len(rows(counting.path)) == 1
    assert [path.read_bytes() for path in put_aside(tmp_path)] == [damaged]


@pytest.mark.logs(r"ERROR .*is damaged", r"WARNING", required=False)
async def test_damage_while_it_runs_is_survived(tmp_path: Path, owls: Guild, ada: Member) -> None:
    async with Counting(tmp_path, [owls]) as counting:
        for number in range(5_000):
            counting.module.analytics.count(5, owls.id, ada.id, 1_000_000 + number)
        await counting.flush()
        await counting.in_store(lambda db: db.execute("PRAGMA disk.wal_checkpoint(TRUNCATE)"))
        size = counting.path.stat().st_size
        with counting.path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        await counting.in_store(lambda db: db.execute("PRAGMA disk.cache_size = 0"))
        await counting.in_store(lambda db: db.execute("PRAGMA disk.shrink_memory"))
        counting.clock.time += HOUR
        for _ in range(3):
            await types(counting, owls, ada)
            await counting.flush()
        assert counting.problem is None
    assert put_aside(tmp_path)
    assert rows(counting.path, "SELECT sum(typing) FROM counts") == [(3,)]


@pytest.mark.logs(r"WARNING .*written by a newer version \(schema 99\)")
async def test_a_file_of_a_newer_version_is_left_alone(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    path = tmp_path / "counts.db"
    rows(path, "PRAGMA user_version = 99")
    before = path.read_bytes()
    async with Counting(tmp_path, [owls]) as counting:
        await types(counting, owls, ada)
        assert await score(counting, owls) == [("ada", 1.0)]
    assert rows(path, "PRAGMA user_version") == [(99,)]
    assert rows(path, "SELECT count(*) FROM sqlite_schema") == [(0,)]
    assert len(before) == path.stat().st_size


def put_aside(folder: Path) -> list[Path]:
    return list(folder.glob("counts.db.damaged-*Z"))


async def test_the_totals_are_those_of_the_hours(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    for hours in (0, 1, 30, 100, 60, 7, 24):
        counting.clock.time += hours * HOUR
        await types(counting, owls, ada)
        await counting.feed("MESSAGE_CREATE", message_json(owls, ada, owls.general))
    await counting.flush()
    sums = "SELECT guild, member, sum(typing), sum(messages), sum(reactions), sum(presences),"
    counted = await counting.in_store(
        lambda db: (
            db.execute("SELECT * FROM totals").fetchall(),
            db.execute(
                f"{sums} count(DISTINCT channel) FROM disk.counts GROUP BY guild, member"
            ).fetchall(),
        )
    )
    assert counted[0] == counted[1] != []


# ---- reloads ---------------------------------------------------------------


async def test_a_fresh_instance_counts_on_where_the_old_one_ends(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    locks: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)
    alone = locks.__getitem__
    async with AsyncExitStack() as stack:
        fresh = Counting(tmp_path, [owls], alone=alone)
        async with Counting(tmp_path, [owls], alone=alone) as old:
            await types(old, owls, ada)
            await old.flush()
            await stack.enter_async_context(fresh)
            await types(old, owls, ada)
            await types(fresh, owls, ada, 1_001)
            await fresh.flush()
            assert fresh.problem is None
            assert await fresh.module.analytics.newest(owls.id) is None
        await fresh.flush()
        assert await score(fresh, owls) == [("ada", 3.0)]
    assert rows(fresh.path, "SELECT sum(typing) FROM counts") == [(3,)]


class Slow:
    """Takes a while to go."""

    def __del__(self) -> None:
        time.sleep(0.3)


async def test_the_end_of_its_thread_holds_up_nobody(tmp_path: Path) -> None:
    """Else the log would name the teardown."""
    of_thread = threading.local()
    async with Counting(tmp_path) as counting:
        await counting.counter.keeper.run(lambda: setattr(of_thread, "last", Slow()))


async def test_a_clock_that_jumps_makes_no_repeat_of_typing_a_start(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    elapsed = iter([0.0, 5.0, 9.0, 10.0])
    counting.module.elapsed = lambda: next(elapsed)
    for jump in (0.0, HOUR, -HOUR, -HOUR):
        counting.clock.time += jump
        await counting.feed("TYPING_START", typing_json(owls, ada, owls.general))
    assert await score(counting, owls) == [("ada", 2.0)]


# ---- forgetting ------------------------------------------------------------


async def forget(path: Path, *options: str) -> tuple[int | None, str]:
    """`spywatcher.py forget`: its exit status and what it says."""
    config = path.with_suffix(".toml")
    folder = ROOT / "plugins"
    config.write_text(
        f'[plugins]\nfolders = ["{folder}"]\n[storage]\npath = "{path.name}"\n', "utf-8"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "spywatcher.py"), "--config", str(config)),
        *("forget", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def test_a_running_server_follows_a_forget(
    counting: Counting, owls: Guild, ada: Member
) -> None:
    bob = owls.add_member("bob")
    for member in (ada, bob):
        await types(counting, owls, member)
    await counting.flush()
    answer = await forget(counting.path, "--member", str(ada.id))
    assert answer == (0, "plugin analytics: 1 removed\nplugin history: 0 removed\n")

    async def followed() -> bool:
        return await score(counting, owls) == [(str(bob.id), 1.0)]

    await eventually(followed, timeout=10.0)
    await counting.flush()
    assert [row[2] for row in rows(counting.path)] == [bob.id]
    assert rows(counting.path, "SELECT * FROM forgotten") == []


async def test_forgetting_can_be_for_one_guild_and_without_a_server(
    tmp_path: Path, owls: Guild, ada: Member
) -> None:
    other = make_guild("Early Birds", bot=BOT)
    other.add_member("ada", user=ada.user)
    async with Counting(tmp_path, [owls, other]) as counting:
        await types(counting, owls, ada)
        await types(counting, other, ada)
    options = ("--member", str(ada.id), "--guild", str(owls.id))
    assert await forget(counting.path, *options) == (
        0,
        "plugin analytics: 1 removed\nplugin history: 0 removed\n",
    )
    assert [row[1] for row in rows(counting.path)] == [other.id]


async def test_forgetting_where_nothing_was_counted_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "counts.db"
    assert await forget(path, "--member", "5") == (
        0,
        "plugin analytics: 0 removed\nplugin history: 0 removed\n",
    )
    assert os.listdir(tmp_path) == ["counts.toml"]


async def test_forgetting_in_a_damaged_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "counts.db").write_bytes(b"nonsense" * 1_000)
    status, said = await forget(tmp_path / "counts.db", "--member", "5")
    assert status == 2
    assert said == "spywatcher: plugin analytics could not forget: file is not a database\n"


# ---- what reaches dashboards -----------------------------------------------


async def test_a_new_subscriber_alone_gets_the_newest(watching: Watching, guild: Guild) -> None:
    ada = guild.add_member("ada")
    async with watching() as spy:
        await spy.discord.typing(guild, ada, guild.general)
        await spy.discord.caught_up()
        first = await spy.dashboard(kinds=["analytics"])
        update = await first.next(UPDATE)
        assert update["guildId"] == str(guild.id)
        assert update["timestamp"] == update["data"]["timestamp"]
        assert [ghost["username"] for ghost in update["data"]["ghosts"]] == ["ada"]
        second = await spy.dashboard(kinds=["analytics"])
        assert await second.next(UPDATE) == update  # not computed again so soon
        await spy.nothing(first, UPDATE)


async def test_a_change_is_told_at_once_and_the_last_one_always(
    watching: Watching, guild: Guild
) -> None:
    ada = guild.add_member("ada")
    async with watching(throttle={UPDATE: 0.5}) as spy:
        dashboard = await spy.dashboard(kinds=["analytics"])
        assert (await dashboard.next(UPDATE))["data"]["channelDiversity"] == []
        channels = [guild.add_channel(f"c{number}") for number in range(50)]
        for channel in channels:
            await spy.discord.typing(guild, ada, channel)
        counted = [await count_of(dashboard), await count_of(dashboard)]
        assert counted[0] < counted[1] == 50
        await dashboard.quiet(UPDATE)


async def count_of(dashboard: Any) -> int:
    (row,) = (await dashboard.next(UPDATE))["data"]["channelDiversity"]
    return int(row["channelCount"])


async def test_nothing_is_computed_while_nobody_listens(watching: Watching, guild: Guild) -> None:
    ada = guild.add_member("ada")
    async with watching(throttle=SOON) as spy:
        computed = computations(spy)
        elsewhere = await spy.dashboard(kinds=["guild"])
        await spy.discord.typing(guild, ada, guild.general)
        await spy.nothing(elsewhere, UPDATE)
        assert computed == []
        await spy.dashboard(kinds=["analytics"])
        await eventually(lambda: computed == [guild.id])


def computations(spy: Watch) -> list[int]:
    """The guilds whose lists are computed from now on."""
    store = spy.server.plugins.plugins["analytics"].module.analytics._store
    computed: list[int] = []
    lists = store.lists
    store.lists = lambda guild: computed.append(guild) or lists(guild)
    return computed


async def test_what_changed_while_nobody_listened_reaches_a_hasty_subscriber(
    watching: Watching, guild: Guild
) -> None:
    ada = guild.add_member("ada")
    async with watching(throttle=SOON) as spy:
        dashboard = await spy.dashboard(kinds=["analytics"])
        assert (await dashboard.next(UPDATE))["data"]["ghosts"] == []
        await dashboard.call("unsubscribe:analytics", str(guild.id))
        await spy.discord.typing(guild, ada, guild.general)
        await spy.discord.caught_up()
        await dashboard.call("subscribe:analytics", str(guild.id))
        assert (await dashboard.next(UPDATE))["data"]["ghosts"] == []
        assert len((await dashboard.next(UPDATE))["data"]["ghosts"]) == 1


async def test_a_renamed_member_is_one_row_with_the_new_name(
    watching: Watching, guild: Guild
) -> None:
    ada = guild.add_member("ada")
    async with watching(throttle=SOON) as spy:
        dashboard = await spy.dashboard(kinds=["analytics"])
        await spy.discord.typing(guild, ada, guild.general)
        await until(dashboard, ["ada"])
        await spy.discord.rename(guild, ada, name="countess")
        await until(dashboard, ["countess"])


async def test_who_leaves_drops_out(watching: Watching, guild: Guild) -> None:
    ada, bob = guild.add_member("ada"), guild.add_member("bob")
    async with watching(throttle=SOON) as spy:
        dashboard = await spy.dashboard(kinds=["analytics"])
        for member in (ada, bob):
            await spy.discord.typing(guild, member, guild.general)
        await until(dashboard, ["ada", "bob"])
        await spy.discord.leave(guild, ada)
        await until(dashboard, ["bob"])


async def test_who_left_a_large_guild_while_the_server_was_down_drops_out(
    watching: Watching, guild: Guild
) -> None:
    crowd = [guild.add_member(f"member {number}") for number in range(1_200)]
    async with watching(throttle=SOON) as spy:
        for member in crowd[:2]:
            await spy.discord.typing(guild, member, guild.general)
        await spy.discord.caught_up()
    del guild.members[crowd[0].id]
    async with watching(throttle=SOON) as spy:
        dashboard = await spy.dashboard(kinds=["analytics"])
        await until(dashboard, ["member 1"])


async def until(dashboard: Any, ghosts: list[str]) -> None:
    """Read updates until one has these ghosts."""
    while True:
        update = await dashboard.next(UPDATE)
        if [ghost["username"] for ghost in update["data"]["ghosts"]] == ghosts:
            return


async def test_a_kill_loses_at_most_the_last_second(
    tmp_path: Path, discord: PretendDiscord, guild: Guild
) -> None:
    ada = guild.add_member("ada")
    write_settings(tmp_path, tables_for(discord, storage={"path": "kept.db"}))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        for number in range(20):
            await discord.typing(guild, ada, guild.add_channel(f"c{number}"))
        await discord.caught_up()
        await passed(1.0)  # the promise itself
        service.process.kill()
    assert rows(tmp_path / "kept.db", "SELECT sum(typing) FROM counts") == [(20,)]
