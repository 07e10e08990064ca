"""docs/websocket-api.md: what the page promises is what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jsclient import node
from service import ROOT

import spywatcher
import spywatcher_types

PAGE = (ROOT / "docs" / "websocket-api.md").read_text("utf-8")
SECRET = "a key of thirty-two bytes or more, as HS256 wants it"


def section(heading: str) -> str:
    """What stands under a heading of the page, up to the next one of the same level."""
    level, _, _ = heading.partition(" ")
    return PAGE.split(f"\n{heading}\n")[1].split(f"\n{level} ")[0]


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[number]


def first_column(heading: str) -> set[str]:
    return set(re.findall(r"^\| `([\w:. ]+)`", section(heading), re.MULTILINE))


def examples() -> dict[str, dict[str, object]]:
    """The example of each event, by its name."""
    found = re.findall(r"^\*\*`([\w:]+)`\*\*.*?```json\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    return {event: json.loads(text) for event, text in found}


@pytest.fixture(scope="module")
def plugins() -> spywatcher.PluginLoader:
    plugins = spywatcher.PluginLoader(spywatcher.PluginsSettings(), {}, ROOT, spywatcher.Metrics())
    plugins.load_all()
    return plugins


def test_each_event_of_the_shipped_plugins_is_described(plugins: spywatcher.PluginLoader) -> None:
    declared = {event for plugin in plugins.plugins.values() for event in plugin.events}
    assert set(examples()) == declared


def test_each_room_of_the_shipped_plugins_has_its_requests(
    plugins: spywatcher.PluginLoader,
) -> None:
    for kind in {kind for plugin in plugins.plugins.values() for kind in plugin.kinds}:
        assert f"`subscribe:{kind}`" in section("## Requests")
        assert f"`unsubscribe:{kind}`" in section("## Requests")


def test_each_error_code_of_the_server_is_described() -> None:
    source = (ROOT / "spywatcher.py").read_text("utf-8")
    raised = set(re.findall(r'ClientError\(\s*"(\w+)"', source)) | {"expired"}
    assert first_column("## Errors") == raised


def test_each_refusal_of_a_connection_is_described() -> None:
    source = (ROOT / "spywatcher.py").read_text("utf-8")
    raised = set(re.findall(r'(?:RefusedConnectionError|SocketIORefusal)\("([A-Z][\w ]+)"', source))
    assert first_column("## Refusals") == raised - {"Gone"}  # that one is told to nobody


def test_each_limit_shown_is_the_default() -> None:
    limits = spywatcher.LimitsSettings()
    table = section("## Limits").replace(",", "")
    for key in ("connections_per_ip", "connections_per_viewer", "rooms_per_connection"):
        assert re.search(rf"\| {getattr(limits, key)} \(`{key}`\)", table), key
    heartbeat = spywatcher.HeartbeatSettings()
    assert f"each {heartbeat.interval:.0f} s, {heartbeat.timeout:.0f} s" in section("## Limits")


def test_a_token_made_in_node_as_shown_gets_in(tmp_path: Path) -> None:
    program = block("js", 1) + f"console.log(spywatcherToken('42', {json.dumps(SECRET)}));"
    (tmp_path / "mint.mjs").write_text(program)
    made = subprocess.run([node(), tmp_path / "mint.mjs"], capture_output=True, check=True)
    tokens = spywatcher.Tokens(spywatcher.Keys(secrets=(SECRET,)), ["HS256"])
    assert tokens.verify(made.stdout.decode().strip()).discord_id == "42"


def test_a_token_made_in_python_as_shown_gets_in() -> None:
    program = block("python") + f"print(spywatcher_token('42', {SECRET!r}))"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    tokens = spywatcher.Tokens(spywatcher.Keys(secrets=(SECRET,)), ["HS256"])
    assert tokens.verify(made.stdout.decode().strip()).discord_id == "42"


@pytest.mark.parametrize("event", sorted(examples()))
def test_an_example_has_the_fields_that_its_plugin_sends(
    event: str, plugins: spywatcher.PluginLoader
) -> None:
    declared = spywatcher_types.declarations(plugins)
    [schema] = [one.schema for one in declared.events if one.name == event]
    while "$ref" in schema:
        schema = declared.schemas[schema["$ref"].rpartition("/")[2]]
    assert set(examples()[event]) == set(schema["properties"])


@pytest.mark.parametrize("name", ["session", "guilds:update", "auth:expiring", "error"])
def test_each_event_to_one_connection_is_described(name: str) -> None:
    assert name in first_column("### To one connection")
