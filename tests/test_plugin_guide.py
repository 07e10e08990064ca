"""docs/plugins.md: every piece of code in it does what the page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from jsclient import node
from service import ROOT
from watching import Watching

import spywatcher
from simulator import ChannelType, Guild, Harness, PretendDiscord

GUIDE = (ROOT / "docs" / "plugins.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The pieces of code in this language."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", GUIDE, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


PLUGINS = {block.split('"""')[1]: block for block in blocks("python") if block.startswith('"""')}


@pytest.fixture
def harness(tmp_path: Path, request: pytest.FixtureRequest) -> Harness:
    """The plugin of the page whose first line is the test's parameter."""
    path = tmp_path / "mine.py"
    path.write_text(PLUGINS[request.param], "utf-8")
    return Harness(path)


def plugin(first_line: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("harness", [first_line], indirect=True)


def test_every_language_of_the_page_is_run() -> None:
    assert set(re.findall(r"^ *```(\w+)$", GUIDE, re.MULTILINE)) == {"sh", "python", "js", "toml"}


def test_the_commands_of_the_page_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [commands] = blocks("sh")
    make_folder, make_demo = commands.splitlines()
    subprocess.run(shlex.split(make_folder), check=True)
    make, target, arguments = shlex.split(make_demo)
    assert (make, target, arguments[:5]) == ("make", "demo", "ARGS=")
    commands_of = [["demo", *shlex.split(arguments[5:])]]
    commands_of += map(shlex.split, re.findall(r"`\.venv/bin/python spywatcher.py ([^>`]+)", GUIDE))
    parsed = [spywatcher.parse_arguments(words) for words in commands_of]
    assert [one.plugins for one in parsed] == [tmp_path / "mine"] * 3


def test_the_script_of_the_page_runs() -> None:
    [script] = blocks("js")
    socket = 'const socket = {on: (name, heard) => heard({messageId: name, guildId: "7"})};'
    done = subprocess.run([node(), "-e", socket + script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("message:delete 7\n", "")


@plugin("Tell dashboards each minute how many members are in voice channels.")
def test_voice_states_are_counted(harness: Harness) -> None:
    ada = harness.guild.add_member("ada")
    harness.guild.voice[ada.id] = harness.guild.add_channel("x", kind=ChannelType.GUILD_VOICE).id
    with harness as h:
        h.tick()
        assert h.emitted[0].fields["count"] == 1


@plugin("Tell dashboards for how long somebody was there who leaves.")
def test_days_stayed_are_told(harness: Harness) -> None:
    ada = harness.guild.add_member("ada")
    ada.joined_at = "2020-01-01T00:00:00+00:00"
    with harness as h:
        h.run(h.discord.leave(h.guild, ada))
        assert h.emitted[0].fields["daysStayed"] > 2000


@plugin("Count reactions by minute, and tell a new subscriber at once.")
def test_reactions_are_counted(harness: Harness) -> None:
    with harness as h:
        ada = h.guild.add_member("ada")
        h.run(h.discord.reaction(h.guild, ada, h.guild.general))
        h.tick()
        assert [one.fields["count"] for one in h.emitted] == [1]


@plugin("Count reactions by minute, and tell a new subscriber at once.")
def test_who_subscribes_is_told_what_was_counted(harness: Harness) -> None:
    ada = harness.guild.add_member("ada")
    with harness as h:
        h.run(h.discord.reaction(h.guild, ada, h.guild.general))
        [[told], [of_member]] = h.subscribe(), h.subscribe("guild", ada)
        assert told.fields["count"] == of_member.fields["count"] == 1


async def test_the_other_plugins_of_the_page_run_in_a_server(
    watching: Watching, guild: Guild, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    names = {line: f"plugin{number}" for number, line in enumerate(PLUGINS)}
    for line, name in names.items():
        (folder / f"{name}.py").write_text(PLUGINS[line], "utf-8")
    (folder / "plugin4.py").rename(folder / "rich.py")
    table = tomllib.loads("".join(blocks("toml")))
    ada = guild.add_member("ada")
    async with watching(
        plugins={"folders": ["plugins", str(folder)]}, plugin=table["plugin"]
    ) as spy:
        own = {"rich", *names.values()} - {"plugin4"}
        assert spy.server.plugins.running.keys() > own
        assert spy.server.plugins.running["rich"].spy.settings.least == 5
        dashboard = await spy.dashboard()
        devices = ["desktop", "mobile", "web"]
        await spy.discord.presence(guild, ada, "online", devices)
        assert (await dashboard.next("alert:threeDevices"))["username"] == "ada"


def test_the_settings_of_the_page_are_sound() -> None:
    for block in blocks("toml"):
        spywatcher.parse_settings(tomllib.loads(block), ROOT)


def test_the_test_of_the_page_passes(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "deletes.py").write_text(
        PLUGINS["Tell dashboards when a message is deleted."]
    )
    [test] = [block for block in blocks("python") if not block.startswith('"""')]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the page's test is in the clone's folder
    done = subprocess.run(
        [sys.executable, "-c", test], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_all_that_can_happen_in_a_test_is_there() -> None:
    [verbs] = re.findall(r"^- \*\*Something happens\*\*(.*?)^- ", GUIDE, re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"`(\w+)[(`]", verbs))
    assert len(names) > 5
    assert not [name for name in names if not hasattr(PretendDiscord, name)]


def test_every_name_that_may_be_imported_is_in_the_guide_or_is_for_few() -> None:
    few = {"Shared", "timestamp"}
    for name in set(spywatcher.__all__) - few - {"Spy", "Subscriber"}:
        assert name in GUIDE, name
    for hook in spywatcher.HOOKS:
        assert f"`{hook}" in GUIDE
    for need in spywatcher.NEEDS:
        assert f'"{need}"' in GUIDE
