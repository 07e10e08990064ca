"""config.toml: one table of settings, from which files, documents and checks follow."""

import re
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from service import ROOT, SECRET

import spywatcher
from spywatcher import OperatorError, Settings, parse_settings, read_secret, read_settings

DEFAULT_TOML = (ROOT / "config.toml").read_text("utf-8")


def faults(**tables: Any) -> list[str]:
    with pytest.raises(OperatorError) as caught:
        parse_settings(tables, Path())
    return list(caught.value.faults)


def meaning(struct: type, key: str) -> str:
    """The sentence that a setting's type carries."""
    hint = get_type_hints(struct, include_extras=True)[key]
    texts = [meta.description for meta in hint.__metadata__ if meta.description]
    assert len(texts) == 1, f"{struct.__name__}.{key} has no description"
    return texts[0]


def plugin_tables() -> dict[str, type]:
    """The `Settings` of each shipped plugin that has some, by the name of its table."""
    host = spywatcher.PluginHost(spywatcher.PluginsSettings(), {}, ROOT, spywatcher.Metrics())
    host.load()
    settings = {name: vars(plugin.module).get("Settings") for name, plugin in host.plugins.items()}
    return {f"plugin.{name}": struct for name, struct in settings.items() if struct}


def known_settings() -> dict[str, tuple[object, str]]:
    """The table itself: key path to default and meaning."""
    sections = {
        field.name: field.type
        for field in msgspec.structs.fields(Settings)
        if isinstance(field.type, type) and issubclass(field.type, spywatcher.Section)
    }
    known: dict[str, tuple[object, str]] = {
        f"throttle.{event}": (seconds, meaning(Settings, "throttle"))
        for event, seconds in Settings().throttle.items()
    }
    return known | {
        f"{name}.{field.name}": (msgspec.to_builtins(field.default), meaning(struct, field.name))
        for name, struct in (sections | plugin_tables()).items()
        for field in msgspec.structs.fields(struct)
    }


def as_lists(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def rows() -> list[str]:
    """The lines of the table in docs/settings.md."""
    return [
        f"| `{path}` | `{spywatcher.shown(as_lists(default))}` | {text} |"
        for path, (default, text) in known_settings().items()
    ]


# ---- one table, told in three places


def test_config_toml_is_the_table_of_defaults():
    table, told = "", {}
    for comment, line in re.findall(
        r"(?:^# (.+)\n)?^(\[.+\]|\S+ = .+)$", DEFAULT_TOML, re.MULTILINE
    ):
        if line.startswith("["):
            table = line.strip("[]")
        else:
            [(key, value)] = tomllib.loads(line).items()
            told[f"{table}.{key}"] = value, comment
    expected = {
        path: (as_lists(default), text) for path, (default, text) in known_settings().items()
    }
    assert told == expected


def test_the_page_of_settings_shows_the_same_table():
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    shown = [line for line in page.splitlines() if re.match(r"\| `\w+\.[\w.:]+` ", line)]
    assert shown == rows()


def test_the_shipped_file_gives_the_defaults():
    shipped = read_settings(ROOT / "config.toml")
    assert msgspec.structs.replace(shipped, plugin={}, folder=Path()) == Settings()


# ---- faults


def test_all_faults_are_told_at_once_with_key_path_and_expectation():
    told = faults(
        server={"port": "http", "hots": "::"},
        heartbeat=3,
        auth={"viewer_permissions": ["MANAGE_GILD"]},
        sever={},
    )
    assert told == [
        'server.port: got "http", expected `int`, got `str`',
        "server.hots: unknown key, did you mean host?",
        "heartbeat: got 3, expected a table",
        "sever: unknown table, did you mean server?",
        "auth.viewer_permissions: MANAGE_GILD is no Discord permission, did you mean MANAGE_GUILD?",
    ]


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("server", "port", 65_536),
        ("server", "port", True),
        ("server", "port", 30.5),
        ("server", "host", 1),
        ("server", "cors_origins", "http://localhost"),
        ("server", "cors_origins", ["localhost:5173"]),
        ("server", "transports", []),
        ("server", "transports", ["carrier pigeon"]),
        ("server", "max_message_bytes", 0),
        ("heartbeat", "interval", 0),
        ("heartbeat", "timeout", -1.0),
        ("auth", "algorithms", ["none"]),
        ("auth", "admin_roles", ["KING"]),
        ("discord", "guilds", [1]),
        ("discord", "guilds", ["Night Owls"]),
        ("plugins", "folders", "plugins"),
        ("log", "level", "loud"),
    ],
)
def test_a_wrong_value_is_refused(table, key, value):
    [fault] = faults(**{table: {key: value}})
    assert fault.startswith(f"{table}.{key}: got {spywatcher.shown(value)}, expected ")


@pytest.mark.parametrize(("table", "key"), [("auth", "secret"), ("discord", "token")])
def test_a_fault_never_shows_a_secret(table, key):
    [fault] = faults(**{table: {key: [["hush"]]}})
    assert fault.startswith(f"{table}.{key}: got a value not shown here, expected ")
    assert "hush" not in fault


def test_no_secret_is_printed(capsys, tmp_path):
    config = tmp_path / "config.toml"
    hush = "hush, " * 6
    config.write_text(f'[auth]\nsecret = "{hush}"\n[discord]\ntoken = "quiet"\n')
    (tmp_path / "plugins").mkdir()
    assert spywatcher.main(["--config", str(config), "check"]) == 0
    shown = capsys.readouterr().out
    assert "auth.secret = (set, not shown)" in shown
    assert "hush" not in shown
    assert "quiet" not in shown


def test_a_whole_number_may_stand_for_seconds():
    assert parse_settings({"heartbeat": {"interval": 3}}, Path()).heartbeat.interval == 3.0


def test_a_table_of_a_plugin_must_be_a_table():
    assert faults(plugin={"presence": 3}) == ["plugin.presence: got 3, expected a table"]


# ---- files


def test_a_file_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("[server\n")
    with pytest.raises(OperatorError, match=r"config.toml: not TOML: .*line 1"):
        read_settings(tmp_path / "config.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OperatorError, match=r"other.toml: cannot be read: No such file"):
        read_settings(tmp_path / "other.toml")


def test_faults_name_the_file(tmp_path):
    (tmp_path / "config.toml").write_text("[server]\nport = -1\n")
    with pytest.raises(OperatorError, match=r"config.toml: server.port: got -1"):
        read_settings(tmp_path / "config.toml")


def test_the_working_directory_goes_before_the_folder_of_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_settings(None).folder == ROOT
    (tmp_path / "config.toml").write_text("[server]\nport = 4000\n")
    settings = read_settings(None)
    assert (settings.server.port, settings.folder) == (4000, tmp_path)


def test_without_any_file_the_defaults_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spywatcher, "__file__", str(tmp_path / "bin" / "spywatcher.py"))
    (tmp_path / "bin" / "plugins").mkdir(parents=True)
    assert read_settings(None) == Settings(folder=tmp_path / "bin")


def test_a_secret_may_lie_in_a_file_relative_to_the_settings(tmp_path):
    (tmp_path / "key").write_text(SECRET + "\n")
    assert read_secret("", "key", tmp_path, "auth.secret") == SECRET


def test_a_secret_and_its_file_exclude_each_other(tmp_path):
    with pytest.raises(OperatorError, match=r"auth.secret: set, and auth.secret_file too"):
        read_secret(SECRET, "key", tmp_path, "auth.secret")


def test_a_missing_secret_file_is_named_but_never_its_neighbours(tmp_path):
    with pytest.raises(OperatorError, match=r"auth.secret_file: key cannot be read"):
        read_secret("", "key", tmp_path, "auth.secret")


def test_plugin_folders_are_relative_to_the_settings_file(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "empty.py").write_text("")
    (tmp_path / "config.toml").write_text('[plugins]\nfolders = ["mine"]\n')
    monkeypatch.chdir(ROOT)
    settings = read_settings(tmp_path / "config.toml")
    host = spywatcher.PluginHost(
        settings.plugins, settings.plugin, settings.folder, spywatcher.Metrics()
    )
    host.load()
    assert list(host.plugins) == ["empty"]
