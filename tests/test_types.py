"""`spywatcher.py types`: what it declares, judged by TypeScript's compiler and AsyncAPI's parser."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from jsclient import node
from service import ROOT, write_settings

import spywatcher
import spywatcher_types
from simulator import Harness, LivelyGuild

TESTS = Path(__file__).parent
CLIENT = (TESTS / "dashboard.ts").read_text("utf-8")
Printed = Callable[..., str]


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Printed:
    """What the command prints with the shipped plugins and, in mine.py, those of the test."""

    def run(*arguments: str, source: str = "") -> str:
        own = tmp_path / "own"
        own.mkdir()
        (own / "mine.py").write_text("import hikari\nfrom spywatcher import *\n" + dedent(source))
        folders = {"folders": [str(ROOT / "plugins"), str(own)]}
        config = write_settings(tmp_path, {"plugins": folders})
        assert spywatcher.main(["--config", str(config), "types", *arguments]) == 0
        return capsys.readouterr().out

    return run


def compiled(folder: Path, declarations: str, client: str) -> str:
    """What TypeScript's compiler says of a client beside these declarations; nothing if all is well."""
    (folder / "spywatcher.d.ts").write_text(declarations, "utf-8")
    (folder / "dashboard.ts").write_text(client, "utf-8")
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(TESTS / "node_modules")
    options = ["--strict", "--noEmit", "--module", "esnext", "--moduleResolution", "bundler"]
    compiler = str(TESTS / "node_modules" / "typescript" / "bin" / "tsc")
    command = [node(), compiler, *options, "--types", "node", "dashboard.ts"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_a_client_of_each_event_compiles_against_the_declarations(
    tmp_path: Path, printed: Printed
) -> None:
    declarations = printed()
    events = re.findall(r'^  "(\S+)": \(data:', declarations, re.M)
    listeners = [f'socket.on("{event}", (data) => show(typeof data));' for event in events]
    assert len(events) >= 10
    assert compiled(tmp_path, declarations, "\n".join([CLIENT, *listeners])) == ""


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ('socket.on("message:new", (m) => m.usernme);', "'usernme' does not exist"),
        ('socket.on("message:old", () => {});', "message:old"),
        ('socket.emit("subscribe:guild", 5);', "'number' is not assignable"),
        ('socket.emit("subscribe:nothing", "5");', "subscribe:nothing"),
    ],
)
def test_a_mistake_in_a_client_does_not_compile(
    tmp_path: Path, printed: Printed, wrong: str, complaint: str
) -> None:
    assert complaint in compiled(tmp_path, printed(), f"{CLIENT}\n{wrong}\n")


OWN = """
    class Place(Payload):
        \"\"\"Where somebody talks.\"\"\"
        channel_id: hikari.Snowflake
        name: str | None = None

    class Session(Payload):
        user_id: str
        places: dict[str, list[Place]]
        pair: tuple[int, bool] = (1, True)

    @on(hikari.VoiceStateUpdateEvent, emit="voice:session", room="voice")
    async def voice(event, spy: "Spy") -> Session | None:
        \"\"\"Somebody talks.\"\"\"
        spy.emit("voice:raw", event.guild_id, {}, room="voice")

    @on(hikari.GuildTypingEvent, emit='typing:"start"')
    def typing(event):
        return {"anything": 1}

    @on(hikari.RoleCreateEvent, emit="role:create")
    def created(event):
        if event.role.name:
            return Place(channel_id=event.role.id)
        return None
"""
OWN_CLIENT = """
import { io, type Socket } from "socket.io-client";
import type { ClientToServer, ServerToClient } from "./spywatcher";
const socket: Socket<ServerToClient, ClientToServer> = io();
socket.emit("subscribe:voice", "1");
socket.on("session", ({ recovered }) => recovered);
socket.on("voice:session", ({ places, pair, guildId }) => {
  const name: string | null = places["here"][0].name;
  const [count, loud]: [number, boolean] = pair;
  return `${places["here"][0].channelId.length} ${name} ${count} ${loud} ${guildId}`;
});
socket.on("voice:raw", ({ guildId, timestamp }) => guildId + timestamp);
socket.on("role:create", ({ channelId }) => channelId.length);
socket.on('typing:"start"', ({ guildId, anything }) => [guildId, anything]);
"""


def test_an_authors_events_are_declared_too(tmp_path: Path, printed: Printed) -> None:
    declarations = printed(source=OWN)
    assert compiled(tmp_path, declarations, OWN_CLIENT) == ""
    assert "/** Somebody talks. */" in declarations
    assert "/** Where somebody talks. */" in declarations


@pytest.mark.parametrize("source", ["", OWN], ids=["shipped", "an author's own"])
def test_asyncapis_own_parser_finds_no_fault(printed: Printed, source: str) -> None:
    document = printed("--asyncapi", source=source)
    command = [node(), str(TESTS / "asyncapi.mjs")]
    judged = subprocess.run(command, input=document, capture_output=True, text=True)
    assert (judged.returncode, judged.stderr) == (0, ""), judged.stdout
    rooms = [name for name in json.loads(document)["channels"] if name.startswith("room.")]
    assert rooms[:2] == ["room.analytics", "room.guild"]


def test_what_goes_out_is_what_is_declared() -> None:
    names = ("messages", "presence", "members")
    with Harness(*(ROOT / "plugins" / f"{name}.py" for name in names)) as h:
        h.run(LivelyGuild(h.discord).warm_up(200))
        declared = spywatcher_types.declarations(h.host.loader)
    forms = {event.name: event.schema["$ref"].rpartition("/")[2] for event in declared.events}
    for event, fields, _ in h.emitted:
        assert fields.keys() == declared.schemas[forms[event]]["properties"].keys()


@pytest.mark.logs("ERROR spywatcher: plugin mine: not loaded: division by zero")
def test_with_a_broken_plugin_nothing_is_declared(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text("1 / 0")
    config = write_settings(tmp_path, {"plugins": {"folders": [str(tmp_path / "own")]}})
    assert spywatcher.main(["--config", str(config), "types"]) == 2
    assert capsys.readouterr().out == ""
