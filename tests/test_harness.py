"""The harness: how a plugin author tries a plugin, with no network, no server and no event loop."""

from __future__ import annotations

import socket
from pathlib import Path
from textwrap import dedent
from typing import Any

import hikari
import pytest
from service import ROOT

import spywatcher
from simulator import (
    ChannelType,
    Harness,
    hidden_except,
    message_json,
    reaction_json,
    typing_json,
    voice_state_json,
)

HEAD = "import hikari\nfrom spywatcher import Payload, PluginSettings, every, on, on_subscribe\n"


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    """Writes mine.py beside a plugin that nobody asked for."""
    (tmp_path / "other.py").write_text("raise RuntimeError('not asked for')")

    def write(source: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(HEAD + dedent(source))
        return path

    return write


def test_raw_json_goes_in_and_events_come_out(plugin: Any) -> None:
    path = plugin("""
        class MessageDelete(Payload):
            message_id: str
            channel_id: str

        @on(hikari.GuildMessageDeleteEvent, emit="message:delete")
        def message_delete(event):
            return MessageDelete(message_id=str(event.message_id), channel_id=str(event.channel_id))
    """)
    with Harness(path) as h:
        guild_id = str(h.guild.id)
        h.feed("MESSAGE_DELETE", {"id": "1", "channel_id": "2", "guild_id": guild_id})
        [(event, fields, room)] = h.emitted
    assert fields.pop("timestamp").endswith("Z")
    assert (event, room) == ("message:delete", f"guild:{guild_id}")
    assert fields == {"messageId": "1", "channelId": "2", "guildId": guild_id}


def test_shipped_plugins_see_people_who_were_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    plugins = [ROOT / "plugins" / f"{name}.py" for name in ("messages", "presence")]
    with Harness(*plugins) as h:
        ada = h.guild.add_member("ada")
        h.run(h.discord.message(h.guild, ada, h.guild.general))
        h.run(h.discord.presence(h.guild, ada, "dnd", ["desktop", "web"]))
        told = {one.event: one.fields for one in h.emitted}
    assert told["message:new"]["channelName"] == "general"
    assert told["presence:update"]["status"] == "dnd"
    assert told["alert:multiClient"]["username"] == "ada"


def test_a_large_guild_is_known_as_on_a_real_connection() -> None:
    with Harness(ROOT / "plugins" / "presence.py") as h:
        people = [h.guild.add_member(f"owl{number}") for number in range(300)]
        h.run(h.discord.presence(h.guild, people[7], "online"))
        assert h.emitted[0].fields["username"] == "owl7"


PRESENCES = """
    @on(hikari.PresenceUpdateEvent, emit="seen")
    def seen(event, spy):
        old, now = event.old_presence, spy.presence(event.guild_id, event.user_id)
        names = [one.name for one in getattr(event.presence, "activities")]
        was = old and [str(old.visible_status), str(old.client_status.mobile)]
        return {"names": names, "was": was, "now": [now.status, *sorted(now.platforms)]}
"""


@pytest.mark.parametrize("needs", ["", '    needs = {"activities"}'])
def test_another_song_is_an_event_for_who_needs_activities(plugin: Any, needs: str) -> None:
    with Harness(plugin(PRESENCES + needs)) as h:
        ada = h.guild.add_member("ada")
        ada.appear("idle", ["mobile"], [])
        song = [{"name": "Chess"}]
        h.run(h.discord.presence(h.guild, ada, "idle", ["mobile"], song))
        h.run(h.discord.presence(h.guild, ada, "dnd", ["mobile", "web"], song))
        seen = [one.fields for one in h.emitted]
    assert [one["names"] for one in seen] == ([["Chess"], ["Chess"]] if needs else [[]])
    assert seen[-1]["was"] == ["idle", "idle"]
    assert seen[-1]["now"] == ["dnd", "mobile", "web"]


@pytest.mark.parametrize("needs", ["", '    needs = {"activities"}'])
def test_a_presence_tells_how_the_member_appeared_before_and_now(plugin: Any, needs: str) -> None:
    path = plugin(
        """
        from spywatcher import PresenceUpdateEvent

        @on(PresenceUpdateEvent, emit="seen")
        def seen(event):
            shown = [event.before, event.now]
            return {"shown": [[one.status, sorted(one.platforms)] for one in shown]}
    """
        + needs
    )
    with Harness(path) as h:
        ada = h.guild.add_member("ada")
        h.run(h.discord.presence(h.guild, ada, "idle", ["mobile"]))
        h.run(h.discord.presence(h.guild, ada, "dnd", ["mobile", "web"]))
        h.run(h.discord.presence(h.guild, ada, "offline"))
        seen = [one.fields["shown"] for one in h.emitted]
    idle, busy, away = ["idle", ["mobile"]], ["dnd", ["mobile", "web"]], ["offline", []]
    assert seen == [[away, idle], [idle, busy], [busy, away]]


def test_hikari_makes_nothing_of_a_presence_that_no_plugin_looks_into(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    factory = hikari.impl.EntityFactoryImpl
    monkeypatch.setattr(factory, "deserialize_member_presence", lambda *_, **__: made.append(1))
    with Harness(ROOT / "plugins" / "presence.py") as h:
        ada = h.guild.add_member("ada")
        h.run(h.discord.presence(h.guild, ada, "idle", ["mobile"]))
        made.clear()  # those of GUILD_CREATE
        h.run(h.discord.presence(h.guild, ada, "dnd", ["mobile"]))
        assert [one.fields["status"] for one in h.emitted] == ["idle", "dnd"]
    assert not made


def test_who_is_online_is_told_without_bots_and_who_is_offline(plugin: Any) -> None:
    path = plugin("""
        @on(hikari.PresenceUpdateEvent, emit="online")
        def online(event, spy):
            return {"ids": [str(one) for one in spy.online(event.guild_id)]}
    """)
    with Harness(path) as h:
        ada, eve = h.guild.add_member("ada"), h.guild.add_member("eve")
        h.guild.add_member("robot", bot=True).appear("online", ["web"])
        for member, status in ((ada, "idle"), (eve, "dnd"), (ada, "offline")):
            h.run(h.discord.presence(h.guild, member, status))
        h.run(h.discord.leave(h.guild, eve))
        h.run(h.discord.presence(h.guild, ada, "online"))
    told = [one.fields["ids"] for one in h.emitted]
    assert told == [[str(ada.id)], [str(ada.id), str(eve.id)], [str(eve.id)], [str(ada.id)]]


def test_what_people_wrote_is_not_there_to_read(plugin: Any) -> None:
    path = plugin("""
        @on(hikari.GuildMessageCreateEvent, emit="said")
        def said(event):
            return {"content": event.content}
    """)
    with Harness(path) as h:
        h.feed("MESSAGE_CREATE", message_json(h.guild, h.guild.owner, h.guild.general, "secret"))
        assert h.emitted[0].fields["content"] is None


def test_settings_hooks_and_new_subscribers(plugin: Any) -> None:
    path = plugin("""
        class Settings(PluginSettings, frozen=True):
            greeting: str = "hello"

        async def setup(spy):
            (spy.data_dir / "kept").touch()

        async def teardown(spy):
            assert (spy.data_dir / "kept").exists()

        @on_subscribe("guild", emit="greeting")
        def greet(guild_id, spy):
            return {"text": spy.settings.greeting}
    """)
    with Harness(path, settings={"mine": {"greeting": "hi"}}) as h:
        assert [one.fields["text"] for one in h.subscribe()] == ["hi"]
        assert h.subscribe("analytics") == []


def test_a_subscriber_is_an_admin_or_a_member_who_may_not_see_all(plugin: Any) -> None:
    path = plugin("""
        @on_subscribe("guild", emit="seen")
        def seen(guild_id, spy, viewer):
            channels = spy.bot.cache.get_guild_channels_view().values()
            return {viewer.role: [one.name for one in channels if viewer.may_see(one.id)]}
    """)
    with Harness(path) as h:
        ada = h.guild.add_member("ada")
        h.guild.add_channel("secret", overwrites=hidden_except(h.guild))
        [admin], [member] = h.subscribe(), h.subscribe(viewer=ada)
    assert "secret" in admin.fields["ADMIN"]
    assert "secret" not in member.fields["USER"]


@pytest.mark.logs("ERROR spywatcher: plugin mine: making broken failed")
def test_what_fails_for_a_new_subscriber_is_raised_to_its_author(plugin: Any) -> None:
    path = plugin("""
        @on_subscribe("guild", emit="broken")
        def broken(guild_id, spy, viewer):
            1 / 0
    """)
    with Harness(path) as h, pytest.raises(spywatcher.PluginError, match="division by zero"):
        h.subscribe()


def test_async_handlers_and_makers_have_ended_when_feed_returns(plugin: Any) -> None:
    path = plugin("""
        import asyncio

        @on(hikari.GuildTypingEvent)
        async def typing(event, spy):
            await asyncio.sleep(0.01)

            async def make():
                await asyncio.sleep(0.01)
                return {"made": True}

            spy.emit("typing:start", event.guild_id, make)

        @on_subscribe("guild", emit="unused")
        def nothing(guild_id, spy): pass

        @every(3600)
        def look(spy): pass
    """)
    with Harness(path) as h:
        h.run(h.discord.typing(h.guild, h.guild.owner, h.guild.general))
        assert [(one.event, one.fields["made"]) for one in h.emitted] == [("typing:start", True)]


def test_what_is_repeated_can_be_called_at_once(plugin: Any) -> None:
    path = plugin("""
        @on_subscribe("guild", emit="tick")
        def nothing(guild_id, spy): pass

        @every(3600)
        async def look(spy):
            for guild_id in spy.bot.cache.get_guilds_view():
                spy.emit("tick", guild_id, {})
    """)
    with Harness(path) as h:
        h.tick()
        assert [one.event for one in h.emitted] == ["tick"]


@pytest.mark.logs("ERROR spywatcher: plugin mine: teardown failed")
def test_what_teardown_raises_is_raised_at_the_end(plugin: Any) -> None:
    path = plugin("""
        def teardown(spy):
            raise LookupError("as planned")
    """)
    with pytest.raises(spywatcher.PluginError, match="teardown failed"), Harness(path):
        pass


@pytest.mark.logs("ERROR spywatcher: plugin mine: .* failed")
def test_what_a_plugin_raises_is_raised_to_its_author(plugin: Any) -> None:
    path = plugin("""
        @on(hikari.GuildTypingEvent)
        def typing(event):
            raise LookupError("as planned")
    """)
    with Harness(path) as h:
        with pytest.raises(spywatcher.PluginError, match="mine") as raised:
            h.run(h.discord.typing(h.guild, h.guild.owner, h.guild.general))
        assert isinstance(raised.value.__cause__, LookupError)


@pytest.mark.logs("ERROR spywatcher: plugin mine")
def test_a_plugin_that_does_not_load_is_raised_to_its_author(plugin: Any) -> None:
    with pytest.raises(spywatcher.PluginError, match="not loaded"), Harness(plugin("1 / 0")):
        pass


@pytest.mark.logs("ERROR spywatcher: cannot read Discord.s TYPING_START")
def test_json_that_hikari_cannot_read_is_raised_to_its_author(plugin: Any) -> None:
    path = plugin("""
        @on(hikari.GuildTypingEvent)
        def typing(event): pass
    """)
    with Harness(path) as h, pytest.raises(spywatcher.PluginError, match="KeyError: 'channel_id'"):
        h.feed("TYPING_START", {"guild_id": str(h.guild.id)})


ACTS = """
    needs = {"voice"}

    @on(hikari.VoiceStateUpdateEvent, emit="acted")
    @on(hikari.GuildTypingEvent, emit="acted")
    @on(hikari.GuildReactionAddEvent, emit="acted")
    @on(hikari.GuildMessageCreateEvent, emit="acted")
    def acted(event):
        who = event.state if hasattr(event, "state") else event
        return {"kind": type(event).__name__, "name": who.member.username}
"""


def test_the_member_that_discord_sends_along_need_not_be_fed(plugin: Any) -> None:
    with Harness(plugin(ACTS)) as h:
        ada, general = h.guild.add_member("ada"), h.guild.general
        h.guild.voice[ada.id] = h.guild.add_channel("talk", kind=ChannelType.VOICE).id
        packets = {
            "TYPING_START": typing_json(h.guild, ada, general),
            "MESSAGE_REACTION_ADD": reaction_json(h.guild, ada, general),
            "VOICE_STATE_UPDATE": voice_state_json(h.guild, ada),
            "MESSAGE_CREATE": message_json(h.guild, ada, general),
        }
        for name, packet in packets.items():
            del packet["member"]
            h.feed(name, packet)
        assert [one.fields["name"] for one in h.emitted] == ["ada"] * len(packets)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("TYPO", {}, "hikari knows no event TYPO"),
        ("MESSAGE_CREATE", {"a": 1}, "feed: no plugin hears a MESSAGE_CREATE without guild_id"),
        ("PRESENCE_UPDATE", {"guild_id": "1"}, "feed: no plugin hears a PRESENCE_UPDATE"),
        (
            "TYPING_START",
            '{"guild_id": "1"}',
            "feed: cannot read this TYPING_START: AttributeError",
        ),
        ("TYPING_START", {"guild_id": "x"}, "feed: cannot read this TYPING_START: ValueError"),
        ("GUILD_MEMBER_UPDATE", {"guild_id": "1"}, "feed: cannot read this .*: KeyError: 'user'"),
        (
            "TYPING_START",
            {"guild_id": "1", "user_id": "5"},
            "feed: no member, and none of h.guild is 5",
        ),
    ],
)
def test_a_packet_that_reaches_nobody_is_raised_to_its_author(
    plugin: Any, name: str, data: Any, why: str
) -> None:
    with Harness(plugin(ACTS)) as h, pytest.raises(spywatcher.PluginError, match=why):
        h.feed(name, data)


@pytest.mark.parametrize("name", ["typo.py", "nowhere/mine.py", "mine.txt", "_mine.py", "empty"])
def test_a_path_without_a_plugin_is_told(tmp_path: Path, name: str) -> None:
    for place in ("mine.py", "mine.txt", "_mine.py"):
        (tmp_path / place).touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(spywatcher.PluginError, match=f"Harness: no plugin at .*{name}$"):
        Harness(tmp_path / name)
