"""config.toml: one table of settings, from which files, documents and checks follow."""

import datetime
import enum
import functools
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from service import ROOT, SECRET

import spywatcher
from simulator import make_token, snowflake
from spywatcher import OperatorError, Settings, parse_settings, read_secret, read_settings

DEFAULT_TOML = (ROOT / "config.toml").read_text("utf-8")


def faults(**tables: Any) -> list[str]:
    with pytest.raises(OperatorError) as caught:
        parse_settings(tables, Path())
    return list(caught.value.faults)


@functools.cache  # to find a class is to parse its whole file
def meanings(struct: type) -> dict[str, str]:
    """The sentence that stands above each setting."""
    written = re.findall(r"^    #: (.+)\n    (\w+):", inspect.getsource(struct), re.MULTILINE)
    return {key: text for text, key in written}


def plugin_tables() -> dict[str, type]:
    """The `Settings` of each shipped plugin that has some, by the name of its table."""
    loader = spywatcher.PluginLoader(spywatcher.PluginsSettings(), {}, ROOT, spywatcher.Metrics())
    loader.load_all()
    settings = {
        name: vars(plugin.module).get("Settings") for name, plugin in loader.plugins.items()
    }
    return {f"plugin.{name}": struct for name, struct in settings.items() if struct}


def known_settings() -> dict[str, tuple[object, str]]:
    """The table itself: key path to default and meaning."""
    sections = {
        field.name: field.type
        for field in msgspec.structs.fields(Settings)
        if isinstance(field.type, type) and issubclass(field.type, spywatcher.Section)
    }
    known: dict[str, tuple[object, str]] = {
        f"throttle.{event}": (seconds, meanings(Settings)["throttle"])
        for event, seconds in Settings().throttle.items()
    }
    return known | {
        f"{name}.{field.name}": (msgspec.to_builtins(field.default), meanings(struct)[field.name])
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
    assert msgspec.structs.replace(shipped, plugin={}, folder=Path(), source="") == Settings(
        source=""
    )


# ---- faults


def test_all_faults_are_told_at_once_with_key_path_and_expectation():
    told = faults(
        server={"port": "http", "hots": "::"},
        heartbeat=3,
        auth={"viewer_permissions": ["MANAGE_GILD"]},
        sever={},
    )
    assert told == [
        'server.port: got "http", expected a whole number from 0 to 65535',
        "server.hots: unknown key, did you mean host?",
        "heartbeat: got 3, expected a table",
        'auth.viewer_permissions: got "MANAGE_GILD", expected a Discord permission in capitals,'
        ' such as "MANAGE_GUILD"',
        "sever: unknown table, did you mean server?",
    ]


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("server", "port", 65_536),
        ("server", "port", True),
        ("server", "port", 30.5),
        ("server", "host", 1),
        ("server", "cors_origins", "http://localhost"),
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
    quiet = make_token(snowflake())
    config.write_text(f'[auth]\nsecret = "{hush}"\n[discord]\ntoken = "{quiet}"\n')
    (tmp_path / "plugins").mkdir()
    assert spywatcher.main(["--config", str(config), "check", "--settings"]) == 0
    shown = capsys.readouterr().out
    assert "auth.secret = (set, not shown)" in shown
    assert "hush" not in shown
    assert quiet not in shown


def test_a_whole_number_may_stand_for_seconds():
    assert parse_settings({"heartbeat": {"interval": 3}}, Path()).heartbeat.interval == 3.0


def test_a_table_of_a_plugin_must_be_a_table():
    assert faults(plugin={"presence": 3}) == ["plugin.presence: got 3, expected a table"]


class Colour(enum.Enum):
    RED = "red"


class OfPlugin(spywatcher.PluginSettings, frozen=True):
    names: list[str] = []  # noqa: RUF012 - msgspec copies it
    numbers: set[int] = frozenset()
    counts: dict[str, int] = {}  # noqa: RUF012 - the same
    colour: Colour = Colour.RED
    pause: datetime.timedelta = datetime.timedelta(0)

    def __post_init__(self):
        if self.names == ["nobody"]:
            raise ValueError


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("names", "ada", 'got "ada", expected a list in [ ] of each a text in quotes'),
        ("numbers", 1, "got 1, expected a list in [ ] of each a whole number"),
        ("counts", [1], "got [1], expected a table"),
        ("colour", "blue", 'got "blue", expected one of "red"'),
        ("pause", "soon", 'got "soon", invalid ISO8601 duration'),
    ],
)
def test_what_a_plugins_setting_takes_is_said_in_words(key, value, why):
    told = []
    spywatcher.check_table({key: value}, OfPlugin, "plugin.mine", told)
    assert told == [f"plugin.mine.{key}: {why}"]


def test_settings_that_a_plugin_refuses_without_a_word_are_a_fault():
    told = []
    spywatcher.check_table({"names": ["nobody"]}, OfPlugin, "plugin.mine", told)
    assert told == ["plugin.mine: does not fit together"]


# ---- the likeliest mistakes, each answered by one line that says what to write instead

MISTAKES = {
    "curly quotes": ("[log]\nlevel = “info”", 'line 2.*write straight quotes: "'),
    "no quotes": ("[server]\nhost = localhost", r'line 2.*write quotes around a text: "\.\.\."'),
    "a quote too few": ('[log]\nlevel = "info', "write a quote at the end of the text"),
    "a token with Bot": (
        '[discord]\ntoken = "Bot x.y.z"',
        'token: begins with "Bot ", expected only',
    ),
    "a token of two lines": (
        '[discord]\ntoken = "x.y.z\\nx.y.z"',
        "token: got blanks, lines or other letters too, expected a token alone",
    ),
    "ids as numbers": (
        "[discord]\nguilds = [123456789012345678]",
        r"guilds: got \[123456789012345678\], expected a list in \[ \] of each a guild id in quotes",
    ),
    "a list of one without brackets": (
        '[discord]\nguilds = "123456789012345678"',
        r"guilds: got .* expected a list in \[ \]",
    ),
    "an origin with a path": (
        '[server]\ncors_origins = ["https://dash.example/app"]',
        'got "https://dash.example/app", expected it without .*: "https://dash.example"',
    ),
    "an origin with a slash": (
        '[server]\ncors_origins = ["https://dash.example/"]',
        'got "https://dash.example/", expected it without .*: "https://dash.example"',
    ),
    "an origin with two ports": (
        '[server]\ncors_origins = ["http://dash.example:8080:*"]',
        'expected one port or any: "http://dash.example:8080" or "http://dash.example:\\*"',
    ),
    "an origin without scheme": (
        '[server]\ncors_origins = ["dash.example"]',
        'got "dash.example", expected a scheme: "http://dash.example" or "https://dash.example"',
    ),
    "a role in small letters": (
        '[auth]\nadmin_roles = ["admin"]',
        r'got \["admin"\], expected .*one of "USER", "ADMIN"',
    ),
    "a permission in small letters": (
        '[auth]\nviewer_permissions = ["manage guild"]',
        'got "manage guild", expected a Discord permission in capitals, such as "MANAGE_GUILD"',
    ),
    "a rate without unit": (
        "[limits]\nattempts_per_ip = 60",
        r'got 60, expected a rate in quotes, such as "60/minute"',
    ),
    "a rate of an unknown unit": (
        '[limits]\nattempts_per_ip = "60/min"',
        r'got "60/min", expected a rate in quotes, such as "60/minute" \(second, minute',
    ),
    "a heartbeat that never comes": (
        "[heartbeat]\ninterval = inf",
        "interval: got Infinity, expected a number of seconds above 0, a day",
    ),
    "seconds with a unit": (
        '[limits]\nblock_for = "10m"',
        'got "10m", expected a number of seconds above 0, such as 5.0',
    ),
    "seconds with a unit and no quotes": (
        "[limits]\nblock_for = 10m",
        "line 2.*write a number without unit, or a text in quotes",
    ),
    "a number in quotes": (
        '[server]\nport = "3001"',
        'got "3001", expected a whole number from 0 to 65535',
    ),
    "a table twice": ("[log]\n[server]\n[log]", "Cannot declare .*this table is there twice"),
    "a key twice": ("[log]\nlevel='info'\nlevel='debug'", "this key is there twice, leave one out"),
    "no equals sign": ("[server]\nport 3001", "line 2.*write = between a key and its value"),
    "a colon for it": ("[server]\nport: 3001", "line 2.*write = between a key and its value"),
    "True": ("[auth]\nchannel_visibility = True", "line 2.*write true or false, in small letters"),
    "yes": ("[auth]\nchannel_visibility = yes", "line 2.*write true or false"),
    "true in quotes": (
        '[auth]\nchannel_visibility = "true"',
        'got "true", expected true or false',
    ),
    "a trailing comma": ("throttle = {a = 1.0,}", "line 1.*write no comma before }"),
    "an event without quotes": (
        "[throttle]\nanalytics:update = 10.0",
        'line 2.*write quotes around a key with a colon: "a:b" = ...',
    ),
    "a path of Windows": (
        '[plugins]\nfolders = ["C:\\Users\\me"]',
        "write / instead of",
    ),
    "no value": ("[discord]\ntoken =", "line 2.*write a value after ="),
    "a bracket too few": ("[discord\ntoken = 'x'", "line 1.*write ] after the name of a table"),
    "a key misspelt": ('[discord]\ntokn = "x"', "discord.tokn: unknown key, did you mean token?"),
    "a port at the host": (
        '[server]\nhost = "0.0.0.0:3001"',
        'host: got "0.0.0.0:3001", expected a name or an address alone, such as "0.0.0.0"',
    ),
    "brackets at the host": (
        '[server]\nhost = "[::1]:3001"',
        'host: got ".*", expected a name or an address alone, such as "::1"',
    ),
    "a host that no name can be": (
        '[server]\nhost = "watch..example"',
        "host: .* expected a name or an address: label empty or too long",
    ),
    "a URL of Discord without scheme": (
        '[discord]\nrest_url = "discord.com/api/v10"',
        'rest_url: .* expected a URL in quotes, such as "https://discord.com/api/v10"',
    ),
    "a URL for the host": (
        '[server]\nhost = "http://localhost:3001/"',
        'expected a name or an address alone, such as "localhost"',
    ),
    "a secret of digits without quotes": (
        "[auth]\nsecret = 0123",
        "line 2.*write quotes around a text, no zeros before a number",
    ),
    "a list without commas": (
        '[auth]\nadmin_roles = ["USER" "ADMIN"]',
        "line 2.*write a comma between two texts",
    ),
    "a key above all tables": (
        'secret = "x"',
        r"secret: expected below a table: \[auth\]$",
    ),
    "a table misspelt": ("[disord]", "disord: unknown table, did you mean discord?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_one_line_that_says_what_to_write(tmp_path, capsys, mistake):
    text, told = MISTAKES[mistake]
    (tmp_path / "config.toml").write_text(text + "\n", "utf-8")
    assert spywatcher.main(["--config", str(tmp_path / "config.toml"), "check"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(told, line), line


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000 + "]" * 5000,
        "a = " + "{a = " * 5000,
        "a." * 5000 + "a = 1",
        "[plugin." + "a." * 100 + "a]",
        "server = " + "[" * 40 + "]" * 40,
    ],
)
def test_what_is_nested_without_sense_is_one_line(tmp_path, capsys, text):
    (tmp_path / "config.toml").write_text(text, "utf-8")
    assert spywatcher.main(["--config", str(tmp_path / "config.toml"), "check"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("config.toml: nested more than 32 levels deep")


# ---- origins


@pytest.mark.parametrize(
    ("written", "origin"),
    [
        ("capacitor://localhost", "capacitor://localhost"),
        ("tauri://localhost", "tauri://localhost"),
        ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
        ("app://-", "app://-"),
        ("HTTPS://Dash.Example:443", "https://dash.example"),
        ("http://dash.example:80", "http://dash.example"),
        ("http://dash.example:443", "http://dash.example:443"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://straße.example:8443", "https://xn--strae-oqa.example:8443"),
        ("https://*.bücher.example", "https://*.xn--bcher-kva.example"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://[2001:DB8:0:0::01]:080", "http://[2001:db8::1]"),
        ("http://localhost:*", "http://localhost:*"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_an_origin_is_any_scheme_host_and_port(written, origin):
    settings = parse_settings({"server": {"cors_origins": [written]}}, Path())
    assert settings.server.cors_origins == (origin,)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "https://",
        "https://a/b",
        "https://a?b",
        "https://u@a",
        "https://a:99999",
        "https://a:b",
        "https://a:443:*",
        "http://[::1]:80:*",
        "https://a*.b",
        "https://*",
        "https://a b",
        "https://*.",
        "http://[::1",
        "http://[1::2::3]",
        "https://a.example#x",
    ],
)
def test_an_origin_that_no_page_has_is_shown_with_what_is_wrong(written):
    [fault] = faults(server={"cors_origins": [written]})
    assert fault.startswith(f"server.cors_origins: got {spywatcher.shown(written)}, expected ")
    assert "regex" not in fault


# ---- files


TEXT = f'[auth]\nsecret = "{SECRET}"\n'
WRITTEN = {
    "with a BOM": b"\xef\xbb\xbf" + TEXT.encode(),
    "by Windows": TEXT.replace("\n", "\r\n").encode(),
    "as UTF-16": TEXT.encode("utf-16"),
    "both": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_a_file_is_read_however_an_editor_left_it(tmp_path, written):
    (tmp_path / "config.toml").write_bytes(written)
    assert read_settings(tmp_path / "config.toml").auth.secret == SECRET
    (tmp_path / "key").write_bytes(b"\xef\xbb\xbf" + SECRET.encode() + b"\r\n")
    assert read_secret("", "key", tmp_path, "auth.secret") == SECRET


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"x" * 2_000_000, "has more than 1048576 bytes"),
        (b"\xff\xff hush", "no UTF-8 at byte 0"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n", "is empty"),
    ],
)
def test_a_file_that_cannot_be_a_secret_is_named_and_not_shown(tmp_path, content, told):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(OperatorError, match=rf"auth.secret_file: key .*{told}") as caught:
        read_secret("", "key", tmp_path, "auth.secret")
    assert "hush" not in str(caught.value)


def test_a_device_without_end_is_not_read_to_its_end():
    with pytest.raises(OperatorError, match="has more than"):
        read_secret("", "/dev/zero", Path(), "auth.secret")


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
    folder = tmp_path / "bin"
    source = f"no config.toml in {tmp_path} or {folder}"
    assert read_settings(None) == Settings(folder=folder, source=source)


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
    loader = spywatcher.PluginLoader(
        settings.plugins, settings.plugin, settings.folder, spywatcher.Metrics()
    )
    loader.load_all()
    assert list(loader.plugins) == ["empty"]
