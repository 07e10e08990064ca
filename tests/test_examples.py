"""The examples in plugins/examples: each does what its first line says, in fewer than 40 lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from service import ROOT, fetch
from waiting import eventually
from watching import Watching

from simulator import ChannelType, Guild, message_json, snowflake

FOLDER = ROOT / "plugins" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def example(watching: Watching) -> Callable[..., Any]:
    """A server with all examples beside the shipped plugins."""
    folders = ["plugins", "plugins/examples"]  # the shipped ones, wherever the settings are
    return lambda **tables: watching(plugins={"folders": folders}, **tables)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_teaches(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) < 40
    assert "Teaches: " in lines[0]


async def test_examples_are_not_loaded_unless_named(watching: Watching) -> None:
    async with watching() as spy:
        assert not {path.stem for path in EXAMPLES} & set(spy.server.plugins.plugins)


async def test_a_deleted_message_is_told_with_its_author(example: Any, guild: Guild) -> None:
    ada = guild.add_member("ada")
    async with example() as spy:
        dashboard = await spy.dashboard()
        message = await spy.discord.message(guild, ada, guild.general)
        await dashboard.next("message:new")
        await spy.discord.message_delete(guild, guild.general, message)
        deleted = await dashboard.next("message:deleted")
        assert (deleted["messageId"], deleted["username"]) == (message["id"], "ada")
        old = {"id": str(snowflake())}
        await spy.discord.message_delete(guild, guild.general, old)
        assert (await dashboard.next("message:deleted"))["username"] is None


async def test_an_edited_message_is_told_and_a_preview_is_not(example: Any, guild: Guild) -> None:
    ada = guild.add_member("ada")
    async with example() as spy:
        dashboard = await spy.dashboard()
        body = message_json(guild, ada, guild.general)
        await spy.discord.dispatch("MESSAGE_UPDATE", body)
        edited = body | {"edited_timestamp": "2026-01-01T00:00:00+00:00"}
        await spy.discord.dispatch("MESSAGE_UPDATE", edited)
        assert (await dashboard.next("message:edited"))["messageId"] == body["id"]
        await spy.nothing(dashboard, "message:edited")


async def test_voice_is_joined_changed_and_left(example: Any, guild: Guild) -> None:
    ada = guild.add_member("ada")
    lounge = guild.add_channel("lounge", kind=ChannelType.GUILD_VOICE)
    stage = guild.add_channel("stage", kind=ChannelType.GUILD_VOICE)
    async with example() as spy:
        dashboard = await spy.dashboard()
        told = []
        for channel in (lounge, stage, stage, None):
            await spy.discord.voice(guild, ada, channel)
        for _ in range(3):
            move = await dashboard.next("voice:move")
            told.append((move["username"], move["action"], move["channelName"]))
        assert told == [
            ("ada", "joined", "lounge"),
            ("ada", "moved", "stage"),
            ("ada", "left", "stage"),
        ]
        await spy.nothing(dashboard, "voice:move")


async def test_a_role_that_is_lost_is_told(example: Any, guild: Guild) -> None:
    role = guild.add_role("helper")
    ada = guild.add_member("ada", roles=[role])
    async with example() as spy:
        dashboard = await spy.dashboard()
        await spy.discord.remove_role(guild, ada, role)
        assert (await dashboard.next("role:removed"))["removedRoles"] == ["helper"]


async def test_typing_soon_after_anothers_message_is_told(example: Any, guild: Guild) -> None:
    ada, bob = guild.add_member("ada"), guild.add_member("bob")
    async with example() as spy:
        dashboard = await spy.dashboard()
        await spy.discord.message(guild, ada, guild.general)
        await spy.discord.typing(guild, ada, guild.general)
        await spy.discord.typing(guild, bob, guild.general)
        quick = await dashboard.next("typing:quick")
        assert (quick["username"], 0 <= quick["seconds"] < 5) == ("bob", True)
        await spy.nothing(dashboard, "typing:quick")


async def test_who_types_is_told_once_a_window(example: Any, guild: Guild) -> None:
    people = [guild.add_member(name) for name in ("ada", "bob", "cleo")]
    async with example(throttle={"typing:start": 0.3}) as spy:
        dashboard = await spy.dashboard()
        assert (await dashboard.next("typing:start"))["usernames"] == []
        for member in people:
            await spy.discord.typing(guild, member, guild.general)
        assert (await dashboard.next("typing:start"))["usernames"] == ["ada"]
        assert (await dashboard.next("typing:start"))["usernames"] == ["bob", "cleo"]
        await spy.nothing(dashboard, "typing:start")


async def test_an_alert_is_posted_to_a_webhook_and_calls_nobody(example: Any, guild: Guild) -> None:
    ada = guild.add_member("@everyone")
    post = {"content": "@everyone is on desktop, mobile", "allowed_mentions": {"parse": []}}
    async with webhook() as (url, posts), example(plugin={"webhook": {"url": url}}) as spy:
        await spy.discord.presence(guild, ada, "online", ["desktop", "mobile"])
        await eventually(lambda: posts == [post])


async def test_the_counters_page_shows_messages_and_remembers_them(
    example: Any, guild: Guild, tmp_path: Path
) -> None:
    for count in (1, 2):
        async with example() as spy:
            dashboard = await spy.dashboard()
            await spy.discord.message(guild, guild.owner, guild.general)
            await dashboard.next("message:new")
            page = await fetch(spy.server.port, "/counter")
            assert f"<p>{count} messages</p>" in page.body.decode()


def webhook() -> Any:
    """A server that fails at first; gives its address and what was posted to it."""
    from contextlib import asynccontextmanager

    from tornado.httpserver import HTTPServer
    from tornado.testing import bind_unused_port
    from tornado.web import Application, RequestHandler

    posts: list[Any] = []
    attempts: list[int] = []

    class Hook(RequestHandler):
        def post(self) -> None:
            attempts.append(1)
            if len(attempts) < 2:
                self.set_status(503)
            else:
                posts.append(json.loads(self.request.body))

    @asynccontextmanager
    async def serve() -> Any:
        sock, port = bind_unused_port()
        server = HTTPServer(Application([("/", Hook)], log_function=lambda handler: None))
        server.add_socket(sock)
        try:
            yield f"http://127.0.0.1:{port}/", posts
        finally:
            server.stop()
            await server.close_all_connections()

    return serve()
