"""Counts of a service of several nodes: in Redis, whichever node holds the gateway."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from counting import BOT, HOUR, ROOT, Counting
from jsclient import Dashboard, JavaScript
from redisserver import RedisServer
from service import Service, running, tables_for, viewer_token, write_settings
from waiting import eventually, passed

from simulator import (
    Guild,
    Member,
    PretendDiscord,
    make_guild,
    member_remove_json,
    typing_json,
)
from spywatcher import RedisSettings, timestamp
from spywatcher_cluster import FORGOTTEN, SHARED, TERM, Link, SharedTables

UPDATE = "analytics:update"


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with RedisServer(tmp_path) as redis:
        yield redis


class Machines:
    """Machines that hold the gateway one after the other; each has an empty disk."""

    def __init__(self, redis: RedisServer, guilds: list[Guild]) -> None:
        self.redis = redis
        self.link = Link(RedisSettings(url=redis.url), "")
        self.term = 0
        self.guilds = guilds

    async def next(self, *, path: str = "", **settings: Any) -> Counting:
        """The next holder, to be entered by `async with`."""
        self.term += 1
        await self.redis.ask("SET", TERM, self.term)
        share = partial(SharedTables, self.link, self.term)
        path = path or f"machine{self.term}.db"
        return Counting(self.redis.folder, self.guilds, path=path, share=share, **settings)

    async def texts(self) -> dict[str, dict[str, Any]]:
        """All that Redis has, by table and member."""
        found = {}
        for key in await self.redis.ask("KEYS", f"{SHARED}:analytics:*"):
            texts = await self.redis.ask("HGETALL", key)
            table = key.decode().removeprefix(f"{SHARED}:analytics:")
            found[table] = {one.decode(): json.loads(text) for one, text in texts.items()}
        return found


@pytest.fixture
def ada(owls: Guild) -> Member:
    return owls.add_member("ada")


@pytest.fixture
def bob(owls: Guild) -> Member:
    return owls.add_member("bob")


@pytest.fixture
async def machines(redis: RedisServer, owls: Guild) -> AsyncIterator[Machines]:
    machines = Machines(redis, [owls])
    yield machines
    await machines.link.close()


async def types(counting: Counting, guild: Guild, *members: Member) -> None:
    """One more typing start of each than before."""
    counting.clock.time += 10.0
    for member in members:
        await counting.feed("TYPING_START", typing_json(guild, member, guild.general))


async def ghosts(counting: Counting, guild: Guild) -> dict[str, float]:
    await counting.flush()
    lists = await counting.lists(guild)
    return {ghost["username"]: ghost["ghostScore"] for ghost in lists["ghosts"]}


# ---- what Redis has --------------------------------------------------------


async def test_redis_has_the_counts_by_guild_hour_and_member_for_the_window_and_an_hour(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with await machines.next(window_days=1) as counting:
        await types(counting, owls, ada)
        await counting.flush()
        table = f"{owls.id}:{int(counting.clock.time // HOUR)}"
        assert await machines.texts() == {table: {str(ada.id): [[owls.general.id, 1, 0, 0, 0]]}}
        left = await machines.redis.ask("TTL", f"{SHARED}:analytics:{table}")
        assert 24.9 * HOUR < left <= 25 * HOUR
        counting.reconfigure(window_days=2)
        await counting.flush()
        assert await machines.redis.ask("TTL", f"{SHARED}:analytics:{table}") > 48 * HOUR


async def test_a_large_guild_is_read_and_written_in_parts(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    machines.guilds.clear()  # else all those who are not in it were dropped
    for first in (True, False):
        async with await machines.next() as counting:
            module = counting.module
            for number in range(9_000 * first):
                if number == 5_000:
                    counting.clock.time += HOUR
                module.analytics.count(module.TYPING, owls.id, 1_000_000 + number % 5_000, number)
            await counting.flush()
            summed_up = await counting.in_store(
                lambda db: db.execute("SELECT count(*), sum(typing) FROM totals").fetchone()
            )
            assert summed_up == (5_000, 9_000)


async def test_what_changes_again_and_again_before_it_is_written_is_written(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with await machines.next() as counting:
        analytics, typing = counting.module.analytics, counting.module.TYPING
        await counting.flush()
        for _ in range(3):
            for channel in (1, 2, 3):
                analytics.count(typing, owls.id, ada.id, channel)
            await analytics.flush()
        await counting.flush()
        assert counting.faults == 0
        (texts,) = (await machines.texts()).values()
        assert texts == {str(ada.id): [[channel, 3, 0, 0, 0] for channel in (1, 2, 3)]}


async def test_nothing_of_the_counts_is_on_the_disks_of_the_nodes(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with await machines.next() as counting:
        await types(counting, owls, ada)
        await counting.flush()
        assert not list(machines.redis.folder.glob("machine*"))


async def test_a_member_who_left_is_gone_from_redis(
    machines: Machines, owls: Guild, ada: Member, bob: Member
) -> None:
    async with await machines.next() as counting:
        await types(counting, owls, ada, bob)
        await counting.flush()
        await counting.feed("GUILD_MEMBER_REMOVE", member_remove_json(owls, ada))
        await counting.flush()
        assert [list(texts) for texts in (await machines.texts()).values()] == [[str(bob.id)]]


async def test_who_left_or_is_ignored_by_the_time_of_a_takeover_is_gone_from_redis(
    machines: Machines, owls: Guild, ada: Member, bob: Member
) -> None:
    carl = owls.add_member("carl")
    async with await machines.next() as counting:
        await types(counting, owls, ada, bob, carl)
    del owls.members[ada.id]
    async with await machines.next(ignore_members=[str(bob.id)]) as counting:
        assert await ghosts(counting, owls) == {"carl": 1.0}
        await counting.flush()
        assert [list(texts) for texts in (await machines.texts()).values()] == [[str(carl.id)]]


# ---- who may write ---------------------------------------------------------


async def test_a_holder_that_was_replaced_changes_nothing_when_it_wakes(
    machines: Machines, owls: Guild, ada: Member, bob: Member
) -> None:
    async with await machines.next() as frozen:
        await types(frozen, owls, ada)
        await frozen.flush()
        async with await machines.next() as counting:
            await types(counting, owls, ada, ada, bob)
            await counting.flush()
            before = await machines.texts()
            for _ in range(5):
                await types(frozen, owls, ada)
            await frozen.flush()
            assert await machines.texts() == before


async def test_what_was_refused_is_written_once_it_is_taken(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with await machines.next() as counting:
        await counting.flush()
        await machines.redis.ask("INCR", TERM)
        await types(counting, owls, ada)
        await counting.flush()
        assert await machines.texts() == {}
        await machines.redis.ask("DECR", TERM)
        await counting.flush()
        assert len(await machines.texts()) == 1


async def test_a_write_that_a_later_one_has_overtaken_is_refused(machines: Machines) -> None:
    await machines.redis.ask("SET", TERM, 7)
    table = SharedTables(machines.link, 7, "analytics")
    for count in ("new", "newer"):
        await table.write(f'{{"1:2": [60, {{"3": "[\\"{count}\\"]"}}]}}')
    table._number = 0
    with pytest.raises(ConnectionError):
        await table.write('{"1:2": [60, {"3": "[\\"old\\"]"}]}')
    assert await machines.texts() == {"1:2": {"3": ["newer"]}}


async def test_nobody_writes_without_a_term_even_if_redis_knows_of_none(machines: Machines) -> None:
    with pytest.raises(ConnectionError):
        await SharedTables(machines.link, 0, "analytics").write("{}")


async def test_a_fresh_instance_counts_on_where_the_old_one_ends(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    lock = asyncio.Lock()
    async with AsyncExitStack() as stack:
        old = await machines.next(alone=lambda plugin: lock)
        fresh = Counting(
            machines.redis.folder,
            machines.guilds,
            share=partial(SharedTables, machines.link, machines.term),
            alone=lambda plugin: lock,
        )
        async with old:
            await types(old, owls, ada)
            await old.flush()
            await stack.enter_async_context(fresh)
            await types(old, owls, ada)
            await types(fresh, owls, ada)
            await fresh.flush()
        assert await ghosts(fresh, owls) == {"ada": 3.0}


# ---- faults of Redis -------------------------------------------------------


async def test_what_was_counted_while_redis_was_away_is_there_later(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with await machines.next() as counting:
        assert await ghosts(counting, owls) == {}
        await machines.redis.kill()
        await types(counting, owls, ada)
        assert await ghosts(counting, owls) == {"ada": 1.0}
        assert counting.problem is None
        await machines.redis.start()
        await counting.flush()
    async with await machines.next() as counting:
        assert await ghosts(counting, owls) == {"ada": 1.0}


async def test_a_redis_that_comes_back_empty_gets_everything_again(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with await machines.next() as counting:
        await types(counting, owls, ada)
        await counting.flush()
        before = await machines.texts()
        await machines.redis.kill()
        await machines.redis.start(empty=True)
        await machines.redis.ask("SET", TERM, machines.term)
        await counting.flush()  # finds out
        await counting.flush()
        assert await machines.texts() == before != {}


async def test_a_redis_that_comes_back_with_what_was_removed_loses_it_again(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with await machines.next() as counting:
        await types(counting, owls, ada)
        await counting.flush()
        before = await machines.texts()
        await machines.redis.ask("HSET", f"{SHARED}:analytics:{owls.id}:470000", 5, "[[1,1,0,0,0]]")
        await machines.redis.kill()
        await machines.redis.start()
        await counting.flush()
        await counting.flush()
        assert await machines.texts() == before


async def test_lists_are_told_once_the_counts_of_before_are_there(
    machines: Machines, owls: Guild, ada: Member, bob: Member
) -> None:
    async with await machines.next() as counting:
        await types(counting, owls, ada, bob)
    later = await machines.next()
    await machines.redis.kill()
    del owls.members[bob.id]
    async with later as counting:
        await types(counting, owls, ada)
        await counting.flush()
        assert await counting.module.analytics.newest(owls.id) is None
        assert counting.emitted == []
        await machines.redis.start()
        await counting.flush()
        assert set(counting.emitted) == {("analytics:update", str(owls.id))}
        assert await ghosts(counting, owls) == {"ada": 2.0}


@pytest.mark.logs(r"WARNING .*no room for a copy of the counts \(database or disk is full\)")
async def test_without_room_for_a_copy_counting_goes_on(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with await machines.next() as counting:
        await counting.flush()
        await counting.in_store(lambda db: db.execute("PRAGMA work.max_page_count = 1"))
        for number in range(300):
            counting.module.analytics.count(counting.module.TYPING, owls.id, ada.id, 1_000 + number)
        assert await ghosts(counting, owls) == {"ada": 300.0}
        assert "full" in str(counting.problem)
        await counting.in_store(lambda db: db.execute("PRAGMA work.max_page_count = 1000000"))
        await counting.flush()
        assert counting.problem is None
    assert [len(texts[str(ada.id)]) for texts in (await machines.texts()).values()] == [300]


# ---- forgetting ------------------------------------------------------------


async def forget(folder: Path, url: str, *options: str) -> tuple[int | None, str]:
    """`spywatcher.py forget` at a machine of its own: its exit status and what it says."""
    config = folder / "elsewhere.toml"
    config.write_text(
        f'[plugins]\nfolders = ["{ROOT / "plugins"}"]\n[storage]\npath = "elsewhere.db"\n'
        f'[redis]\nurl = "{url}"\n',
        "utf-8",
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "spywatcher.py"), "--config", str(config)),
        *("forget", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def test_a_holder_at_another_machine_follows_a_forget(
    machines: Machines, owls: Guild, ada: Member, bob: Member
) -> None:
    async with await machines.next() as counting:
        await types(counting, owls, ada, bob)
        await counting.flush()
        answer = await forget(machines.redis.folder, machines.redis.url, "--member", str(ada.id))
        assert answer == (
            0,
            "Redis: 1 removed\nplugin analytics: 0 removed\nplugin history: 0 removed\n",
        )
        assert await ghosts(counting, owls) == {"bob": 1.0}
        await types(counting, owls, ada)
        assert await ghosts(counting, owls) == {"bob": 1.0, "ada": 1.0}
        assert len((await machines.texts()).values()) == 1


async def test_forgetting_can_be_for_one_guild_and_without_a_holder(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    other = make_guild("Early Birds", bot=BOT)
    other.add_member("ada", user=ada.user)
    machines.guilds.append(other)
    async with await machines.next() as counting:
        await types(counting, owls, ada)
        await types(counting, other, ada)
    options = ("--member", str(ada.id), "--guild", str(owls.id))
    assert (await forget(machines.redis.folder, machines.redis.url, *options))[0] == 0
    assert [table.partition(":")[0] for table in await machines.texts()] == [str(other.id)]
    assert 0 < await machines.redis.ask("TTL", FORGOTTEN) <= 300


async def test_forgetting_without_redis_is_an_operator_s_error(machines: Machines) -> None:
    await machines.redis.kill()
    status, said = await forget(machines.redis.folder, machines.redis.url, "--member", "5")
    assert status == 2
    assert said.startswith("spywatcher: redis.url: nothing forgotten, no answer: ")
    assert said.count("\n") == 1


# ---- from one process to several nodes -------------------------------------


async def test_the_file_of_a_single_process_moves_to_redis(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    async with Counting(machines.redis.folder, [owls]) as counting:
        await types(counting, owls, ada)
    async with await machines.next(path="counts.db") as counting:
        assert await ghosts(counting, owls) == {"ada": 1.0}
    async with Counting(machines.redis.folder, [owls]) as counting:
        assert await ghosts(counting, owls) == {}
    async with await machines.next() as counting:
        assert await ghosts(counting, owls) == {"ada": 1.0}


@pytest.mark.logs(r"ERROR .*counts\.db is not taken over: file is not a database")
async def test_a_damaged_file_stays_where_it_is(
    machines: Machines, owls: Guild, ada: Member
) -> None:
    damaged = machines.redis.folder / "counts.db"
    damaged.write_bytes(b"nonsense" * 1_000)
    async with await machines.next(path="counts.db") as counting:
        await types(counting, owls, ada)
        assert await ghosts(counting, owls) == {"ada": 1.0}
    assert damaged.read_bytes() == b"nonsense" * 1_000


# ---- takeovers of real servers ---------------------------------------------


@pytest.fixture
async def nodes(
    redis: RedisServer, discord: PretendDiscord, guild: Guild, tmp_path: Path
) -> AsyncIterator[list[Service]]:
    """Two nodes in processes and folders of their own; the first one holds the gateway."""
    async with AsyncExitStack() as stack:
        services = []
        for number in range(2):
            settings = tables_for(
                discord,
                redis={"url": redis.url},
                plugins={"folders": [str(ROOT / "plugins")]},
                throttle={UPDATE: 0.2},
            )
            folder = write_settings(tmp_path / f"node{number}", settings).parent
            services.append(await stack.enter_async_context(running(folder)))
            if number == 0:
                await services[0].wrote("this node holds the gateway")
                await discord.wait_for_bot()
            await eventually(partial(ready, services[number]), timeout=15)
        yield services


async def ready(service: Service) -> bool:
    return (await service.get("/health/ready")).code == 200


async def watch(js: JavaScript, service: Service, guild: Guild) -> Dashboard:
    dashboard = await js.connect(service.url, token=viewer_token(), transports=["websocket"])
    assert (await dashboard.call("subscribe:analytics", str(guild.id)))["ok"]
    return dashboard


async def told_since(dashboard: Dashboard, moment: str) -> dict[str, int]:
    """In how many channels each was, as the first update says that was made since."""
    updates = await eventually(
        lambda: [u for u in dashboard.received(UPDATE) if u["timestamp"] > moment], timeout=15
    )
    return channels(updates[0])


def channels(update: dict[str, Any]) -> dict[str, int]:
    return {row["username"]: row["channelCount"] for row in update["data"]["channelDiversity"]}


async def type_everywhere(discord: PretendDiscord, guild: Guild, member: Member) -> None:
    """In ten channels that nobody was in before."""
    for number in range(10):
        await discord.typing(guild, member, guild.add_channel(f"c{number}"))
    await discord.caught_up()


async def test_the_lists_go_on_at_another_machine_after_a_clean_stop(
    nodes: list[Service], discord: PretendDiscord, guild: Guild, js: JavaScript
) -> None:
    ada = await discord.join(guild, "ada")
    dashboard = await watch(js, nodes[1], guild)
    await type_everywhere(discord, guild, ada)
    nodes[0].process.terminate()  # at once: nothing was written yet, perhaps
    assert await nodes[0].exit_status() == 0
    await nodes[1].wrote("connected to Discord")
    await discord.wait_for_bot()
    await discord.typing(guild, ada, guild.general)
    await eventually(lambda: channels(dashboard.received(UPDATE)[-1]) == {"ada": 11}, timeout=15)


@pytest.mark.faults
async def test_the_lists_go_on_at_another_machine_after_a_kill(
    nodes: list[Service], discord: PretendDiscord, guild: Guild, js: JavaScript
) -> None:
    ada = await discord.join(guild, "ada")
    dashboard = await watch(js, nodes[1], guild)
    await type_everywhere(discord, guild, ada)
    await passed(1.5)  # the promise itself: more than a second ago
    nodes[0].process.kill()
    assert await told_since(dashboard, timestamp()) == {"ada": 10}


@pytest.mark.faults
async def test_the_hours_go_on_at_another_machine_after_a_kill(
    nodes: list[Service], discord: PretendDiscord, guild: Guild, js: JavaScript
) -> None:
    ada = await discord.join(guild, "ada")
    await discord.message(guild, ada, guild.general)
    await discord.caught_up()
    await passed(1.5)  # the promise itself: more than a second ago
    nodes[0].process.kill()
    await nodes[1].wrote("connected to Discord")
    await discord.wait_for_bot()
    await discord.message(guild, ada, guild.general)
    await discord.caught_up()
    dashboard = await js.connect(nodes[1].url, token=viewer_token(), transports=["websocket"])
    await dashboard.call("subscribe:history", str(guild.id))
    hours = (await dashboard.next("history:update"))["hours"]
    assert sum(hour["messages"] for hour in hours) == 2
    assert sum(hour["joins"] for hour in hours) == 1
    assert sum(hour["active"] for hour in hours) == len(hours)  # 2 if a new hour has begun


@pytest.mark.faults
async def test_the_lists_outlive_a_redis_that_lost_everything_and_then_the_holder(
    nodes: list[Service],
    redis: RedisServer,
    discord: PretendDiscord,
    guild: Guild,
    js: JavaScript,
) -> None:
    ada = await discord.join(guild, "ada")
    dashboard = await watch(js, nodes[1], guild)
    await type_everywhere(discord, guild, ada)
    await eventually(lambda: redis.ask("EXISTS", f"{SHARED}:analytics"))
    await redis.kill()
    await redis.start(empty=True)
    table = f"{SHARED}:analytics:{guild.id}:*"
    await eventually(lambda: redis.ask("KEYS", table), timeout=10)
    nodes[0].process.kill()
    assert await told_since(dashboard, timestamp()) == {"ada": 10}
