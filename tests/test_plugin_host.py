"""Plugins: found, loaded, fenced. The broken ones are files in tests/plugins."""

import os
import sys

import pytest
from service import ROOT, SECRET, run, write_settings

import spywatcher
from simulator import Harness, User, make_token, message_json, snowflake
from spywatcher import Metrics, OperatorError, PluginLoader, PluginsSettings

FOLDER = ROOT / "tests" / "plugins"


def loaded(case, *, tables=None, disabled=()):
    """A loader that has loaded the plugins of one folder."""
    loader = PluginLoader(
        PluginsSettings(folders=(case,), disabled=disabled), tables or {}, FOLDER, Metrics()
    )
    loader.load_all()
    return loader


def plugins(case):
    return {"plugins": {"folders": [str(FOLDER / case)]}}


async def write(spy):
    await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general)


# ---- finding and loading


def test_plugins_load_in_the_order_of_their_names_and_some_names_are_skipped():
    assert list(loaded("order").plugins) == ["alpha", "beta", "folder"]


def test_a_disabled_plugin_is_not_loaded():
    assert list(loaded("order", disabled=("beta",)).plugins) == ["alpha", "folder"]


def test_of_two_plugins_of_one_name_the_first_folder_wins():
    loader = PluginLoader(
        PluginsSettings(folders=("order", "json_named", "order")), {}, FOLDER, Metrics()
    )
    loader.load_all()
    assert list(loader.plugins) == ["alpha", "beta", "folder", "json"]


def own_folder(tmp_path, name, event):
    """A folder with one plugin that emits the event."""
    (tmp_path / f"{name}.py").write_text(
        "import hikari\nfrom spywatcher import on\n"
        f"@on(hikari.RoleCreateEvent, emit='{event}')\ndef said(event): ...\n"
    )
    return PluginsSettings(folders=(str(tmp_path), "plugins"))


def test_a_plugin_that_replaces_another_of_its_name_is_told_once(tmp_path, caplog):
    caplog.set_level("INFO")
    loader = PluginLoader(own_folder(tmp_path, "messages", "mine:new"), {}, ROOT, Metrics())
    loader.load_all()
    loader.files.take_changed()
    assert loader.plugins["messages"].events == {"mine:new"}
    mine, shipped = tmp_path / "messages.py", ROOT / "plugins" / "messages.py"
    assert caplog.messages == [f"plugin messages: {mine} replaces {shipped}"]


@pytest.mark.logs("plugin a_dup: not loaded: plugins members and a_dup both claim .* user:join")
def test_a_shipped_plugin_keeps_its_events_from_others(tmp_path):
    loader = PluginLoader(own_folder(tmp_path, "a_dup", "user:join"), {}, ROOT, Metrics())
    loader.load_all()
    assert "user:join" in loader.plugins["members"].events
    assert list(loader.failures) == ["a_dup"]


@pytest.mark.logs("plugin a_dup: not loaded: plugins z_first and a_dup both claim")
def test_of_two_folders_the_earlier_ones_plugin_has_the_event(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, name in zip(folders, ("z_first", "a_dup"), strict=True):
        folder.mkdir()
        own_folder(folder, name, "same:event")
    loader = PluginLoader(PluginsSettings(tuple(map(str, folders))), {}, ROOT, Metrics())
    loader.load_all()
    assert list(loader.plugins) == ["z_first"]


def test_tests_beside_plugins_are_no_plugins(tmp_path):
    for name in ("test_mine", "mine_test", "conftest", "tests/__init__"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("raise SystemExit")
    folders = own_folder(tmp_path, "testing", "mine:new").folders[:1]
    loader = PluginLoader(PluginsSettings(folders), {}, ROOT, Metrics())
    loader.load_all()
    assert (list(loader.plugins), loader.failures) == (["testing"], {})


TYPO = """
@on("mine:New")
def heard(fields): ...
"""
CHANNELS = """
class Move(Payload):
    from_channel_id: str

class Said(Payload):
    channel_name: str
    channel_id: str

class Count(Payload):
    channels: int
    channel_count: int
"""


@pytest.mark.logs(
    "WARNING spywatcher: plugin beside: no plugin emits mine:New, did you mean mine:new"
)
def test_an_event_that_is_nearly_anothers_is_told(tmp_path, caplog):
    folders = own_folder(tmp_path, "said", "mine:new")
    (tmp_path / "beside.py").write_text("from spywatcher import on" + TYPO)
    (tmp_path / "own.py").write_text("from spywatcher import on" + TYPO.replace("mine:New", "else"))
    PluginLoader(folders, {}, ROOT, Metrics()).load_all()
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 1


@pytest.mark.logs("WARNING spywatcher: plugin moves: Move.from_channel_id goes to all who see the")
def test_a_field_that_tells_of_a_channel_and_hides_nothing_is_told(tmp_path, caplog):
    (tmp_path / "moves.py").write_text("from spywatcher import Payload\n" + CHANNELS)
    PluginLoader(PluginsSettings((str(tmp_path),)), {}, ROOT, Metrics()).load_all()
    assert len(caplog.messages) == 1


@pytest.mark.logs("plugin pipe: not loaded: .*pipe.py is no file")
def test_what_is_no_file_is_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")  # to read it would wait for ever
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__init__.py").touch()
    os.mkfifo(tmp_path / "folder" / "pipe")
    loader = loaded(str(tmp_path))
    assert (list(loader.plugins), list(loader.failures)) == (["folder"], ["pipe"])


def test_a_missing_folder_is_the_operators_fault():
    with pytest.raises(OperatorError, match=r"plugins.folders: .*nowhere is no folder"):
        loaded("nowhere")


def test_a_plugin_may_be_called_as_a_module_of_the_standard_library():
    import json

    loader = loaded("json_named")
    assert loader.plugins["json"].module.TEXT == '{"a": 1}'
    assert sys.modules["json"] is json


def test_a_file_whose_name_begins_with_an_underscore_can_be_imported_by_those_beside_it() -> None:
    plugins = loaded("beside").plugins
    assert {name: plugin.module.SAID for name, plugin in plugins.items()} == {
        "alone": "hello",
        "folder": "hello world",
    }


def test_a_plugin_may_use_dataclasses_and_postponed_annotations():
    module = loaded("dataclass_named").plugins["modern"].module
    assert module.FIELDS == ["count"]
    assert {"counter": module.Later} == module.HINTS


def test_loading_changes_no_path():
    before = list(sys.path)
    loaded("order")
    assert sys.path == before


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        pytest.param(case, reason, marks=pytest.mark.logs(rf"plugin broken: not loaded: {reason}"))
        for case, reason in {
            "raises_at_import": "boom at import",
            "exits_at_import": "0",
            "bad_syntax": r"invalid syntax \(broken.py, line 3\)",
            "reserved": "the event name connect is reserved",
            "claims_twice": "plugins a_first and broken both claim the event same:event; disable one",
        }.items()
    ],
)
def test_a_plugin_that_does_not_load_is_named_and_the_others_go_on(case, reason, caplog):
    loader = loaded(case)
    assert "z_good" in loader.plugins
    assert list(loader.failures) == ["broken"]
    assert "spywatcher_plugins.broken" not in sys.modules or case in ("reserved", "claims_twice")
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1


def test_a_plugins_table_is_checked_by_its_settings():
    loader = loaded("bad_settings", tables={"strict": {"limit": 3, "names": ["a"]}})
    settings = loader.plugins["strict"].settings
    assert (settings.limit, settings.names) == (3, ("a",))


def test_faults_in_a_plugins_table_are_told_with_their_key_path():
    with pytest.raises(OperatorError) as caught:
        loaded("bad_settings", tables={"strict": {"limit": 0, "nmes": []}})
    assert list(caught.value.faults) == [
        "plugin.strict.limit: got 0, expected a whole number from 1",
        "plugin.strict.nmes: unknown key, did you mean names?",
    ]


def test_a_table_may_come_before_its_plugin_and_check_names_it():
    loader = loaded("bad_settings", tables={"strct": {}})
    assert loader.faults() == ["plugin.strct: no such plugin, did you mean strict?"]


def test_a_disabled_plugin_that_is_not_there_is_told():
    loader = loaded("order", disabled=("alpha", "betta"))
    assert loader.faults() == [
        'plugins.disabled: "betta": no such plugin, did you mean beta?',
    ]


def test_a_table_of_a_disabled_plugin_is_no_fault():
    loaded("bad_settings", tables={"strict": {"limit": 0}}, disabled=("strict",))


# ---- running


@pytest.mark.logs(r"plugin broken: broken failed on GuildMessageCreateEvent")
async def test_a_listener_that_raises_is_named_and_the_others_go_on(watching):
    async with watching(**plugins("raises")) as spy:
        dashboard = await spy.dashboard()
        for _ in range(2):
            await write(spy)
            assert (await dashboard.next("good:message"))["text"] == "still here"


@pytest.mark.logs(
    "plugin broken: a_list failed on GuildMessageCreateEvent",
    "plugin broken: an_object failed on GuildMessageCreateEvent",
)
async def test_a_listener_that_returns_no_payload_is_named(watching):
    async with watching(**plugins("bad_return")) as spy:
        dashboard = await spy.dashboard()
        await write(spy)
        await dashboard.next("good:message")
        await spy.nothing(dashboard)


@pytest.mark.logs("plugin broken: thief failed", "plugin broken: impostor failed")
async def test_a_plugin_emits_neither_the_events_of_others_nor_reserved_ones(watching):
    async with watching(**plugins("emits_alien")) as spy:
        dashboard = await spy.dashboard()
        await write(spy)
        assert (await dashboard.next("good:message"))["text"] == "still here"
        await spy.nothing(dashboard)


@pytest.mark.logs(
    "plugin broken: broken failed on MessageCreateEvent: DMMessageCreateEvent has no guild_id"
)
def test_an_event_without_a_guild_cannot_be_emitted():
    path = FOLDER / "no_guild" / "broken.py"
    message = message_json(None, User(snowflake(), "ada"), snowflake())
    with Harness(path) as h, pytest.raises(spywatcher.PluginError):
        h.feed("MESSAGE_CREATE", message)


@pytest.mark.logs("plugin broken: setup failed")
async def test_a_plugin_whose_setup_fails_hears_nothing_and_the_others_go_on(watching):
    async with watching(**plugins("setup_fails")) as spy:
        dashboard = await spy.dashboard()
        await write(spy)
        await dashboard.next("good:message")
        await spy.nothing(dashboard)
        assert list(spy.server.plugins.failures) == ["broken"]


@pytest.mark.logs("plugin broken: teardown failed")
async def test_a_teardown_that_fails_does_not_stop_the_stop(watching):
    async with watching(**plugins("teardown_fails")) as spy:
        await spy.connect()


async def test_setup_and_teardown_run_once_with_settings_and_log(watching):
    async with watching(plugin={"lived": {"any": 1}}, **plugins("life")) as spy:
        life = spy.server.plugins.plugins["lived"].module.life
        assert life == [("setup", {"any": 1}, "spywatcher.plugin.lived")]
    assert [name for name, *_ in life] == ["setup", "teardown"]


async def test_a_listener_may_be_async_and_a_payload_a_dict(watching):
    async with watching(**plugins("life")) as spy:
        dashboard = await spy.dashboard()
        await write(spy)
        expected = {"life": 1, "timestamp": "mine", "guildId": str(spy.guild.id)}
        assert await dashboard.next("lived:async") == expected
        await spy.nothing(dashboard)


async def test_a_plugin_may_name_a_room_of_its_own(watching):
    async with watching(**plugins("life")) as spy:
        dashboard = await spy.dashboard(kinds=["other"])
        await write(spy)
        event = await dashboard.next("lived:other")
        assert sorted(event) == ["guildId", "life", "timestamp"]
        await spy.nothing(dashboard)


async def test_run_as_a_script_plugins_get_the_module_that_runs(tmp_path):
    """Else they would mark functions for a host that does not exist."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "same.py").write_text(
        "import sys, spywatcher\n"
        "assert spywatcher is sys.modules['__main__']\n"
        "assert spywatcher.Payload is sys.modules['__main__'].Payload\n"
    )
    sound = {"auth": {"secret": SECRET}, "discord": {"token": make_token(snowflake())}}
    write_settings(tmp_path, sound | {"plugins": {"folders": ["plugins"]}})
    status, out, log = await run(tmp_path, "check")
    assert (status, log) == (0, [])
    assert "same:" in out


# ---- what plugins are given


def test_payloads_go_out_in_camel_case_with_guild_and_time():
    class Thing(spywatcher.Payload):
        some_field: str
        other: int | None = None

    fields = spywatcher.finish_payload("thing", Thing(some_field="x"), "7")
    moment = fields.pop("timestamp")
    assert fields == {"someField": "x", "other": None, "guildId": "7"}
    assert moment.endswith("Z")
