"""The commands, as an operator types them."""

import asyncio
import json
import logging
import os
import signal
import sys

import jwt
import pytest
from service import ROOT, SECRET, running, tables_for, write_settings

import spywatcher
from simulator import make_token, snowflake

SOUND = {"auth": {"secret": SECRET}, "discord": {"token": make_token(snowflake())}}
BROKEN = {"folders": [str(ROOT / "tests" / "plugins" / "raises_at_import")]}


@pytest.fixture
def command(capsys):
    """Runs a command in this process: exit status and the lines of stdout and stderr."""

    def run(*arguments):
        status = spywatcher.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield run
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("hikari", "hikari.gateway"):
        logging.getLogger(name).setLevel(logging.NOTSET)


# ---- serve


@pytest.mark.parametrize("serve", [[], ["serve"]])
def test_without_secrets_serve_names_both_and_points_to_the_demo(tmp_path, serve, command):
    status, out, log = command("--config", write_settings(tmp_path, {}), *serve)
    assert (status, out, len(log)) == (2, [], 1)
    assert all(word in log[0] for word in ("auth.secret", "discord.token", "demo"))


def test_faults_in_the_settings_are_one_line_each(tmp_path, command):
    config = write_settings(tmp_path, {"server": {"port": "http", "hots": "x"}})
    status, _, log = command("--config", config)
    assert (status, log) == (
        2,
        [
            f'spywatcher: {config}: server.port: got "http", expected a whole number from 0 to 65535',
            f"spywatcher: {config}: server.hots: unknown key, did you mean host?",
        ],
    )


def test_a_redis_without_the_code_for_it_is_a_fault(tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "spywatcher_cluster", None)  # as where it was not copied
    config = write_settings(tmp_path, SOUND | {"redis": {"url": "redis://127.0.0.1"}})
    status, _, log = command("--config", config, "check")
    assert (status, log) == (
        2,
        [
            "spywatcher: redis.url: spywatcher_cluster is missing, expected spywatcher_cluster.py"
            f" beside spywatcher.py and what it imports ({config})"
        ],
    )


@pytest.mark.parametrize(("name", "code"), [("types", "spywatcher_types"), ("demo", "simulator")])
def test_a_command_without_the_code_for_it_says_which_file_it_needs(
    name, code, monkeypatch, command
):
    monkeypatch.setitem(sys.modules, code, None)  # as where it was not copied
    assert command(name) == (
        2,
        [],
        [
            f"spywatcher: the command {name}: {code} is missing, expected {code}.py beside"
            " spywatcher.py and what it imports"
        ],
    )


async def test_secrets_may_come_from_files(tmp_path, discord):
    (tmp_path / "key").write_text(SECRET)
    (tmp_path / "bot").write_text(discord.token + "\n")
    files = {
        "auth": {"secret": "", "secret_file": "key"},
        "discord": {"token": "", "token_file": "bot"},
    }
    config = write_settings(tmp_path, tables_for(discord, **files))
    async with running(tmp_path, "--config", config) as service:
        await discord.wait_for_bot()
        await service.wrote("connected to Discord: a new session, guilds: 0$")


async def test_json_logs_are_json_line_by_line(tmp_path, discord, js):
    write_settings(tmp_path, tables_for(discord, log={"format": "json", "level": "debug"}))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        await js.refused(service.url, token="hush.hush.hush")
        service.process.send_signal(signal.SIGTERM)
        assert await service.exit_status() == 0
    lines = [json.loads(line) for line in service.log]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert "hush" not in "".join(service.log)


@pytest.mark.parametrize("level", ["debug", "info"])
async def test_no_level_shows_a_secret_or_what_people_write(tmp_path, discord, guild, js, level):
    token = spywatcher.Tokens(spywatcher.Keys((SECRET,)), ["HS256"]).issue("1", role="ADMIN")
    write_settings(tmp_path, tables_for(discord, log={"level": level}))
    async with running(tmp_path) as service:
        await discord.wait_for_bot()
        dashboard = await js.connect(service.url, token=token)
        await dashboard.call("subscribe:guild", str(guild.id))
        await discord.message(guild, guild.owner, guild.general, "top secret")
        await dashboard.next("message:new")
        service.process.send_signal(signal.SIGTERM)
        await service.exit_status()
    log = "\n".join(service.log)
    assert [word for word in (SECRET, token, discord.token, "top secret") if word in log] == []


# ---- check


@pytest.mark.parametrize("name", ["check", "serve"])
def test_all_that_is_to_be_changed_is_told_at_once(tmp_path, command, name):
    tables = {
        "auth": {"secret": "short"},
        "discord": {"token": "Bot x"},
        "limits": {"block_for": "10m"},
        "plugin.messages": {"foo": 1},
        "plugin.mesages": {},
    }
    config = write_settings(tmp_path, tables)
    status, out, log = command("--config", config, name)
    assert (status, out, len(log)) == (2, [], 5)
    assert [line.split(" ", 1)[1].split(",")[0] for line in log] == [
        f'{config}: limits.block_for: got "10m"',
        f"plugin.messages.foo: unknown key ({config})",
        "auth.secret: got 5 bytes",
        'discord.token: begins with "Bot "',
        "plugin.mesages: no such plugin",
    ]


def test_the_settings_file_may_be_named_behind_the_command(tmp_path, command):
    config = write_settings(tmp_path, SOUND)
    assert command("check", "--config", config)[1][-1] == f"all is well with {config}"
    other = tmp_path / "other"
    assert command("--config", other, "check", "--config", config)[0] == 0


def test_check_says_that_all_is_well(tmp_path, command):
    config = write_settings(tmp_path, SOUND)
    status, out, log = command("--config", config, "check")
    assert (status, log) == (0, [])
    assert out[out.index("members:") + 1] == "  sends     role:change, user:join, user:leave"
    assert out[-1] == f"all is well with {config}"
    assert not any(line.startswith("server.") for line in out)


def test_check_says_of_each_plugin_what_it_is_called_for_and_what_it_needs(tmp_path, command):
    config = write_settings(tmp_path, SOUND | {"plugins": {"folders": ["plugins"]}})
    (tmp_path / "plugins").mkdir(exist_ok=True)
    (tmp_path / "plugins" / "voices.py").write_text(
        "import hikari\n"
        "from spywatcher import every, on\n"
        "needs = {'voice'}\n"
        "@on(hikari.VoiceStateUpdateEvent, emit='voice:move', room='voice')\n"
        "def moved(event): ...\n"
        "@on('alert:multiClient')\n"
        "def alerted(fields, spy): spy.emit('voice:alert', 1, {})\n"
        "@every(60)\n"
        "def look(spy): ...\n"
    )
    _, out, _ = command("--config", config, "check")
    rows = out[out.index("voices:") + 1 :]
    assert [line.split(maxsplit=1) for line in rows[:6]] == [
        ["sends", "voice:alert, voice:move"],
        ["hears", "VoiceStateUpdateEvent, alert:multiClient"],
        ["every", "60 s"],
        ["rooms", "voice"],
        ["intents", "GUILD_VOICE_STATES"],
        ["needs", "voice"],
    ]


@pytest.mark.parametrize("name", ["check", "types"])
def test_an_authors_folder_needs_no_settings(tmp_path, command, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "owls.py").write_text(
        "from spywatcher import on_subscribe\n"
        "@on_subscribe('owls', emit='owls:seen')\n"
        "def seen(guild_id, spy): ...\n"
    )
    status, out, log = command("--config", write_settings(tmp_path, {}), name, "--plugins", "mine")
    assert [line for line in out if "owls:seen" in line]
    if name == "check":
        assert (status, len(log)) == (2, 1)
        assert log[0].startswith("spywatcher: auth.secret and discord.token must both be set")


def test_long_rows_of_check_are_wrapped(tmp_path, command):
    _, out, _ = command("--config", write_settings(tmp_path, SOUND), "check")
    assert max(map(len, out[:-1])) <= 100


def test_check_prints_the_settings_when_asked(tmp_path, command):
    config = write_settings(tmp_path, SOUND | {"server": {"port": 4000}})
    status, out, log = command("--config", config, "check", "--settings")
    assert (status, log) == (0, [])
    assert "server.port = 4000" in out
    assert "auth.secret = (set, not shown)" in out
    assert SECRET not in "".join(out)


@pytest.mark.parametrize("tables", [{}, {"auth": SOUND["auth"]}, {"discord": SOUND["discord"]}])
@pytest.mark.parametrize("name", ["check", "serve"])
def test_check_refuses_what_serve_refuses(tmp_path, command, tables, name):
    config = write_settings(tmp_path, tables)
    status, _, log = command("--config", config, name)
    assert (status, len(log)) == (2, 1)
    assert log[0].startswith("spywatcher: auth.secret and discord.token must both be set")
    assert log[0].endswith(f"({config})")


@pytest.mark.parametrize("name", ["check", "serve"])
def test_a_token_that_is_none_is_told_by_the_key_that_is_set(tmp_path, command, name):
    (tmp_path / "bot").write_text("hush")
    tables = SOUND | {"discord": {"token_file": "bot"}}
    status, _, log = command("--config", write_settings(tmp_path, tables), name)
    assert (status, len(log)) == (2, 1)
    assert log[0].startswith("spywatcher: discord.token_file: got what is no bot token")
    assert "hush" not in log[0]


@pytest.mark.logs("plugin broken: not loaded: boom at import")
def test_check_refuses_a_plugin_that_does_not_load(tmp_path, command):
    config = write_settings(tmp_path, SOUND | {"plugins": BROKEN})
    status, out, log = command("--config", config, "check")
    assert status == 2
    assert out[:2] == ["z_good:", "  sends     good:message"]
    assert log[-1] == "spywatcher: plugin broken: boom at import (RuntimeError, broken.py, line 3)"


def test_check_refuses_bad_settings(tmp_path, command):
    status, out, log = command("--config", write_settings(tmp_path, {"sever": {}}), "check")
    assert (status, out) == (2, [])
    assert log[0].endswith("sever: unknown table, did you mean server?")


@pytest.mark.parametrize("name", ["types", "check"])
async def test_who_reads_only_the_beginning_of_what_is_printed_sees_no_traceback(name):
    read, write = os.pipe()
    os.close(read)  # as `head` does, once it has enough
    arguments = [sys.executable, str(ROOT / "spywatcher.py"), name]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*arguments, stdout=write, stderr=pipe)
    os.close(write)
    _, said = await process.communicate()
    assert (process.returncode, said) == (1, b"")


# ---- token


def test_without_a_file_it_is_said_where_one_was_looked_for(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spywatcher, "__file__", str(tmp_path / "bin" / "spywatcher.py"))
    status, _, log = command("token", "--discord-id", "1")
    assert (status, log) == (
        2,
        [
            "spywatcher: auth.secret: not set, expected the key that signs tokens"
            f" (no config.toml in {tmp_path} or {tmp_path / 'bin'})"
        ],
    )


async def test_token_makes_a_token_that_the_server_accepts(tmp_path, spy, command):
    config = write_settings(tmp_path, {"auth": {"secret": SECRET}})
    guild = str(spy.guild.id)
    options = ["--discord-id", "42", "--guild", guild, "--ttl", "15m"]
    status, [token], log = command("--config", config, "token", *options)
    assert (status, log) == (0, [])
    dashboard = await spy.js.connect(spy.url, token=token)
    assert (await dashboard.call("subscribe:guild", guild))["ok"]
    claims = jwt.decode(token, SECRET, ["HS256"])
    assert {key: claims[key] for key in ("discordId", "access", "role", "guilds")} == {
        "discordId": "42",
        "access": True,
        "role": "USER",
        "guilds": [guild],
    }


@pytest.mark.parametrize(
    "wrong",
    [
        ["--discord-id", "ada"],
        ["--discord-id=0"],
        ["--discord-id=007"],
        ["--discord-id=1", "--guild=Night Owls"],
    ],
)
def test_what_is_no_id_is_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        spywatcher.main(["token", *wrong])
    assert "expected 1-20 digits" in capsys.readouterr().err


def test_token_without_a_secret_is_refused(tmp_path, capsys):
    config = write_settings(tmp_path, {})
    assert spywatcher.main(["--config", str(config), "token", "--discord-id", "1"]) == 2
    assert capsys.readouterr().err.startswith("spywatcher: auth.secret: not set")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("15m", 900), ("12h", 43_200), ("30d", 2_592_000)],
)
def test_a_life_time_has_a_unit(text, seconds):
    assert spywatcher.parse_ttl(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1w", "m", "1.5h"])
def test_a_life_time_that_is_none_is_refused(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        spywatcher.main(["token", "--discord-id", "1", f"--ttl={text}"])
    assert "expected e.g. 90s" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "", "http"])
def test_a_port_that_cannot_be_is_told_as_such(capsys, port):
    with pytest.raises(SystemExit, match="2"):
        spywatcher.main(["demo", f"--port={port}"])
    assert f"--port: got {port}, expected 0 to 65535" in capsys.readouterr().err
