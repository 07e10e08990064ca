"""The plugin API: what decorators and `spy` promise to plugin authors."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from textwrap import dedent
from typing import Any

import hikari
import pytest
from redisserver import RedisServer
from service import fetch, server_for
from waiting import eventually
from watching import Watch, Watching

from simulator import Guild, Overwrite, PretendDiscord, presence_json
from spywatcher_cluster import GATEWAY, TERM

HEAD = "import hikari\nfrom spywatcher import every, on, on_subscribe\n"


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes a plugin; returns the settings with which it is the only one."""

    def write(source: str, **tables: Any) -> dict[str, Any]:
        folder = tmp_path / "plugins"
        folder.mkdir(exist_ok=True)
        (folder / "stats.py").write_text(HEAD + dedent(source), "utf-8")
        return {"plugins": {"folders": [str(folder)]}, **tables}

    return write


# ---- every -----------------------------------------------------------------


async def test_every_calls_again_and_again(watching: Watching, plugin: Any) -> None:
    tables = plugin("""
        @on_subscribe("guild", emit="unused")
        def nothing(guild_id, spy): pass

        @every(0.05)
        async def tick(spy):
            for guild in spy.bot.cache.get_guilds_view():
                spy.emit("tick", guild, {})
    """)
    async with watching(**tables) as spy:
        dashboard = await spy.dashboard()
        for _ in range(3):
            await dashboard.next("tick")


@pytest.mark.logs(r"ERROR spywatcher: plugin stats: tick failed")
async def test_a_repeated_task_that_raises_is_counted_and_goes_on(
    watching: Watching, plugin: Any
) -> None:
    tables = plugin("""
        @every(0.02)
        def tick(spy): raise ValueError("as planned")
    """)
    async with watching(**tables) as spy:
        failures = spy.server.metrics.plugin_failures.labels("stats")
        await eventually(lambda: failures._value.get() >= 3)


async def test_repeated_tasks_have_ended_before_teardown(
    watching: Watching, plugin: Any, tmp_path: Path
) -> None:
    tables = plugin("""
        ended = []

        @every(0.01)
        async def tick(spy):
            assert not ended

        async def teardown(spy):
            ended.append(True)
            (spy.data_dir / "ended").touch()
    """)
    async with watching(**tables):
        pass
    assert (tmp_path / "ended").exists()


# ---- on_subscribe ----------------------------------------------------------

GREETING = """
    greeted = 0

    @on_subscribe("stats", emit="stats:update")
    async def newest(guild_id, spy):
        global greeted
        greeted += 1
        return {"number": greeted}
"""


async def test_a_new_subscriber_alone_is_greeted_after_its_answer(
    watching: Watching, plugin: Any, guild: Guild
) -> None:
    async with watching(**plugin(GREETING)) as spy:
        first = await spy.dashboard(kinds=["stats"])
        greeting = await first.next("stats:update")
        assert (greeting["number"], greeting["guildId"]) == (1, str(guild.id))
        second = await spy.dashboard(kinds=["stats"])
        assert (await second.next("stats:update"))["number"] == 2
        await spy.nothing(first, "stats:update")


async def test_subscribing_twice_greets_once(watching: Watching, plugin: Any) -> None:
    async with watching(**plugin(GREETING)) as spy:
        dashboard = await spy.dashboard(kinds=["stats", "stats"])
        await dashboard.next("stats:update")
        await spy.nothing(dashboard, "stats:update")


async def test_who_is_refused_is_not_greeted(watching: Watching, plugin: Any, guild: Guild) -> None:
    async with watching(**plugin(GREETING)) as spy:
        dashboard = await spy.connect("5")
        answer = await dashboard.call("subscribe:stats", str(guild.id))
        assert answer["error"]["code"] == "forbidden"
        await spy.nothing(dashboard, "stats:update")


@pytest.mark.logs(r"ERROR spywatcher: plugin stats: making stats:update failed")
async def test_a_greeting_that_raises_does_not_undo_the_subscription(
    watching: Watching, plugin: Any, guild: Guild
) -> None:
    tables = plugin("""
        @on_subscribe("stats", emit="stats:update")
        def newest(guild_id, spy): raise ValueError("as planned")

        @on(hikari.GuildMessageCreateEvent, emit="said", room="stats")
        def said(event): return {}
    """)
    ada = guild.add_member("ada")
    async with watching(**tables) as spy:
        dashboard = await spy.dashboard(kinds=["stats"])
        await spy.discord.message(guild, ada, guild.general)
        await dashboard.next("said")


# ---- emit ------------------------------------------------------------------


async def test_ten_thousand_changes_are_two_events(
    watching: Watching, plugin: Any, guild: Guild
) -> None:
    source = """
        made = 0

        @on_subscribe("guild", emit="burst")
        def newest(guild_id, spy): pass

        @on(hikari.GuildMessageCreateEvent)
        def burst(event, spy):
            async def make():
                global made
                made += 1
                return {"made": made, "changes": changes}

            for changes in range(1, 10_001):
                spy.emit("burst", event.guild_id, make)
    """
    ada = guild.add_member("ada")
    async with watching(**plugin(source, throttle={"burst": 0.3})) as spy:
        dashboard = await spy.dashboard()
        await spy.discord.message(guild, ada, guild.general)
        assert (await dashboard.next("burst"))["made"] == 1
        last = await dashboard.next("burst")
        assert (last["made"], last["changes"]) == (2, 10_000)
        await spy.nothing(dashboard, "burst")


@pytest.mark.logs(r"ERROR spywatcher: plugin stats: making burst failed")
async def test_a_maker_that_raises_is_named(watching: Watching, plugin: Any, guild: Guild) -> None:
    source = """
        @on(hikari.GuildMessageCreateEvent, emit="said")
        def said(event, spy):
            async def make(): raise ValueError("as planned")

            spy.emit("burst", event.guild_id, make)
            return {}
    """
    ada = guild.add_member("ada")
    async with watching(**plugin(source, throttle={"burst": 0.1})) as spy:
        dashboard = await spy.dashboard()
        await spy.discord.message(guild, ada, guild.general)
        await dashboard.next("said")
        failures = spy.server.metrics.plugin_failures.labels("stats")
        await eventually(lambda: failures._value.get() == 1)


# ---- guilds, files, problems ----------------------------------------------


async def test_events_of_guilds_that_are_not_watched_reach_no_plugin(
    watching: Watching, plugin: Any, guild: Guild
) -> None:
    source = """
        heard = []

        @on(hikari.GuildMessageCreateEvent, emit="said")
        def said(event): heard.append(int(event.guild_id)); return {}
    """
    ada = guild.add_member("ada")
    async with watching(**plugin(source, discord={"guilds": [str(guild.id)]})) as spy:
        other = spy.discord.add_guild("Early Birds")
        bob = other.add_member("bob")
        dashboard = await spy.dashboard()
        await spy.discord.message(other, bob, other.general)
        await spy.discord.message(guild, ada, guild.general)
        await dashboard.next("said")
        assert spy.server.plugins.plugins["stats"].module.heard == [guild.id]


@pytest.mark.logs(r"WARNING spywatcher.plugin.stats: out of tea")
async def test_a_problem_is_logged_once_and_counted_each_time(
    watching: Watching, plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tables = plugin("""
        async def setup(spy):
            for problem in ("out of tea", "out of tea", None, None):
                spy.problem = problem
    """)
    async with watching(**tables) as spy:
        assert spy.server.metrics.plugin_failures.labels("stats")._value.get() == 2
    said = [r.getMessage() for r in caplog.records if r.name == "spywatcher.plugin.stats"]
    assert said == ["out of tea", "all is well again"]


# ---- routes, tokens, keys --------------------------------------------------

PAGES = """
    import json
    from spywatcher import route
    from tornado.web import RequestHandler

    @route(r"/pages/([a-z]+)")
    class Page(RequestHandler):
        def get(self, name):
            self.set_header("Content-Security-Policy", "default-src 'none'")
            self.finish({"name": name, "settings": self.spy.settings})

    @route(r"/broken")
    class Broken(RequestHandler):
        async def get(self): raise ValueError("as planned")

    @route(r"/health/live")
    class Shadow(RequestHandler):
        def get(self): self.finish("not reached")
"""


async def test_a_plugin_serves_a_page_of_its_own(watching: Watching, plugin: Any) -> None:
    async with watching(**plugin(PAGES, plugin={"stats": {"any": 1}})) as spy:
        page = await fetch(spy.server.port, "/pages/one")
        assert json.loads(page.body) == {"name": "one", "settings": {"any": 1}}
        assert page.headers["Content-Security-Policy"] == "default-src 'none'"
        assert "Server" not in page.headers
        assert (await fetch(spy.server.port, "/pages/one/more")).code == 404


async def test_the_servers_own_paths_come_before_a_plugins(watching: Watching, plugin: Any) -> None:
    async with watching(**plugin(PAGES)) as spy:
        answer = await fetch(spy.server.port, "/health/live")
        assert json.loads(answer.body) == {"status": "live"}


@pytest.mark.logs(r"ERROR spywatcher: plugin stats: Broken failed")
async def test_a_page_that_raises_answers_500_without_insides(
    watching: Watching, plugin: Any
) -> None:
    async with watching(**plugin(PAGES)) as spy:
        answer = await fetch(spy.server.port, "/broken")
        assert (answer.code, b"planned" in answer.body) == (500, False)
        assert spy.server.metrics.plugin_failures.labels("stats")._value.get() == 1


@pytest.mark.logs(
    r"ERROR spywatcher: plugin stats: Lost failed: TypeError: Lost.initialize\(\) missing"
)
async def test_a_page_that_cannot_be_made_answers_500(watching: Watching, plugin: Any) -> None:
    tables = plugin("""
        from spywatcher import route
        from tornado.web import RequestHandler

        @route("/lost")
        class Lost(RequestHandler):
            def initialize(self, database): self.database = database
            def get(self): self.finish("not reached")
    """)
    async with watching(**tables) as spy:
        assert (await fetch(spy.server.port, "/lost")).code == 500
        assert spy.server.metrics.plugin_failures.labels("stats")._value.get() == 1


@pytest.mark.logs(r"WARNING spywatcher: plugin stats: Slow held up the server for \d+ ms")
async def test_a_page_that_blocks_is_named(
    watching: Watching, plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tables = plugin("""
        import time
        from spywatcher import route
        from tornado.web import RequestHandler

        @route("/slow")
        class Slow(RequestHandler):
            def get(self): time.sleep(0.2)
    """)
    async with watching(**tables) as spy:
        for _ in range(20):  # one that had to make way for others has the benefit of the doubt
            if "held up" not in caplog.text:
                assert (await fetch(spy.server.port, "/slow")).code == 200
        assert spy.server.metrics.plugin_seconds.counts["stats"] > 0.19


async def test_a_plugin_issues_tokens_that_let_dashboards_in(
    watching: Watching, plugin: Any
) -> None:
    tables = plugin("""
        tokens = []

        def setup(spy):
            tokens.append(spy.issue_token("7", ttl=60.0, guilds=["8"]))
    """)
    async with watching(**tables) as spy:
        [token] = spy.server.plugins.plugins["stats"].module.tokens
        viewer = spy.server.tokens.verify(token)
        assert (viewer.discord_id, viewer.role, viewer.guilds) == ("7", "USER", {"8"})


async def test_keys_differ_by_plugin_and_purpose_and_stay_over_restarts(
    watching: Watching, plugin: Any
) -> None:
    keys: list[dict[str, bytes]] = []
    for _ in range(2):
        async with watching(**plugin("")) as spy:
            key = spy.server.plugins.runners["stats"].spy.key
            keys.append({purpose: key(purpose) for purpose in ("cookie", "state")})
    assert keys[0] == keys[1]
    assert len(set(keys[0].values())) == 2
    assert [len(key) for key in keys[0].values()] == [32, 32]


# ---- what goes out ---------------------------------------------------------


async def test_nested_fields_go_out_in_camel_case_and_ids_as_strings(
    watching: Watching, plugin: Any, guild: Guild
) -> None:
    tables = plugin("""
        import datetime
        from spywatcher import Payload

        class Inner(Payload):
            channel_ids: list[str]
            first_seen: datetime.datetime

        class Outer(Payload):
            user_id: str
            inner_one: Inner
            more: dict

        @on(hikari.GuildMessageCreateEvent, emit="nested")
        def nested(event):
            moment = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
            inner = Inner(channel_ids=[event.channel_id], first_seen=moment)
            more = {"message_id": event.message_id, "list_of": [{"is_new": True}]}
            return Outer(user_id=event.author_id, inner_one=inner, more=more)
    """)
    async with watching(**tables) as spy:
        dashboard = await spy.dashboard()
        message = await spy.discord.message(guild, guild.owner, guild.general)
        fields = await dashboard.next("nested")
    assert fields["userId"] == message["author"]["id"]
    assert fields["innerOne"] == {
        "channelIds": [message["channel_id"]],
        "firstSeen": "2026-01-02T00:00:00.000Z",
    }
    assert fields["more"] == {"messageId": message["id"], "listOf": [{"isNew": True}]}


# ---- who acts --------------------------------------------------------------

EVERYTHING = """
    @on(hikari.MemberCreateEvent, emit="heard")
    @on(hikari.MemberUpdateEvent, emit="heard")
    @on(hikari.MemberDeleteEvent, emit="heard")
    @on(hikari.GuildMessageCreateEvent, emit="heard")
    @on(hikari.GuildReactionAddEvent, emit="heard")
    @on(hikari.GuildTypingEvent, emit="heard")
    @on(hikari.PresenceUpdateEvent, emit="heard")
    @on(hikari.VoiceStateUpdateEvent, emit="heard")
    def heard(event): return {"event": type(event).__name__}
"""


async def do_everything(spy: Watch, name: str, *, bot: bool) -> None:
    discord, guild = spy.discord, spy.guild
    role = await discord.role_create(guild, "managed")
    member = await discord.join(guild, name, bot=bot)
    await discord.add_role(guild, member, role)
    message = await discord.message(guild, member, guild.general, bot=bot)
    await discord.reaction(guild, member, guild.general, message)
    await discord.typing(guild, member, guild.general)
    await discord.presence(guild, member, "online", ["desktop"])
    await discord.voice(guild, member, guild.general)
    await discord.leave(guild, member)


async def test_what_bots_and_webhooks_do_is_no_event(watching: Watching, plugin: Any) -> None:
    async with watching(**plugin(EVERYTHING)) as spy:
        dashboard = await spy.dashboard()
        await do_everything(spy, "robot", bot=True)
        await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general, webhook_id=5)
        await spy.nothing(dashboard)
        await do_everything(spy, "ada", bot=False)
        heard = [(await dashboard.next("heard"))["event"] for _ in range(8)]
        assert len(set(heard)) == 8


async def test_a_plugin_that_asks_for_bots_hears_them(watching: Watching, plugin: Any) -> None:
    async with watching(**plugin(EVERYTHING.replace('"heard")', '"heard", bots=True)'))) as spy:
        dashboard = await spy.dashboard()
        await do_everything(spy, "robot", bot=True)
        for _ in range(8):
            await dashboard.next("heard")


async def test_who_has_left_causes_no_event(watching: Watching, plugin: Any) -> None:
    async with watching(**plugin(EVERYTHING)) as spy:
        dashboard = await spy.dashboard()
        ada = await spy.discord.join(spy.guild, "ada")
        await spy.discord.leave(spy.guild, ada)
        assert (await dashboard.next("heard"))["event"] == "MemberCreateEvent"
        assert (await dashboard.next("heard"))["event"] == "MemberDeleteEvent"
        await spy.discord.dispatch("PRESENCE_UPDATE", presence_json(spy.guild, ada))
        await spy.nothing(dashboard)


# ---- who subscribes --------------------------------------------------------

OF_A_CHANNEL = """
    @on_subscribe("guild", emit="hello")
    def hello(guild_id, spy, viewer):
        return {"viewer": viewer.discord_id, "role": viewer.role}

    @on_subscribe("guild", emit="secret")
    def secret(guild_id, spy):
        return {"channel_id": spy.settings["channel"]}

    @on_subscribe("guild", emit="seen")
    def seen(guild_id, spy, viewer):
        return {"seen": viewer.may_see(spy.settings["channel"])}
"""


async def test_a_greeting_of_a_channel_reaches_only_who_may_see_it(
    watching: Watching, plugin: Any, guild: Guild
) -> None:
    manage = guild.add_role("manager", hikari.Permissions.MANAGE_GUILD)
    ada = guild.add_member("ada", roles=[manage])
    view = int(hikari.Permissions.VIEW_CHANNEL)
    hidden = guild.add_channel("hidden", overwrites=[Overwrite(guild.id, deny=view)])
    settings = {"stats": {"channel": str(hidden.id)}}
    async with watching(**plugin(OF_A_CHANNEL, plugin=settings)) as spy:
        dashboard = await spy.dashboard(ada)
        hello = await dashboard.next("hello")
        assert (hello["viewer"], hello["role"]) == (str(ada.id), "USER")
        assert (await dashboard.next("seen"))["seen"] is False
        await spy.nothing(dashboard, "secret")
        admin = await spy.dashboard()
        assert (await admin.next("secret"))["channelId"] == str(hidden.id)
        assert (await admin.next("seen"))["seen"] is True


# ---- several nodes ---------------------------------------------------------

AT_WORK = """
    began, ticks, ended = [], [], []

    async def setup(spy): began.append(spy.shared)

    @every(0.02)
    def tick(spy): ticks.append(1)

    async def teardown(spy): ended.append(len(ticks))
"""


async def test_a_plugin_is_at_work_where_the_gateway_is(
    plugin: Any, discord: PretendDiscord, guild: Guild, tmp_path: Path
) -> None:
    async with RedisServer(tmp_path) as redis, AsyncExitStack() as stack:
        modules = []
        for _ in range(2):
            server = server_for(discord, **plugin(AT_WORK), redis={"url": redis.url})
            await stack.enter_async_context(server)
            modules.append(server.plugins.plugins["stats"].module)
            await eventually(lambda: len(modules[0].ticks) > 2)
            assert server.plugins.health()["loaded"] == ["stats"]
        assert (modules[1].began, modules[1].ticks) == ([], [])
        await redis.ask("SET", GATEWAY, "another node", "PX", 3000)
        await redis.ask("INCR", TERM)
        await eventually(lambda: modules[0].ended == [len(modules[0].ticks)])
        await redis.ask("DEL", GATEWAY)
        await eventually(lambda: sum(len(module.ended) < len(module.began) for module in modules))
        places = [place for module in modules for place in module.began]
        assert len(set(places)) == len(places) == 2


async def test_what_all_nodes_share_is_nothing_in_a_single_process(
    watching: Watching, plugin: Any
) -> None:
    async with watching(**plugin(AT_WORK)) as spy:
        assert spy.server.plugins.plugins["stats"].module.began == [None]
