"""How much CPU an event from Discord's gateway costs: SpyWatcher beside discord.js and discord.py.

    python bench/ingest.py [--quick] [--mix status] [--checkout FOLDER] [--members N]

A pretend Discord writes frames, made beforehand, to the gateway socket of one bot after the other,
as fast as that reads them. SpyWatcher is the whole product with a dashboard in the guild's room,
which must get every event that is one, in order of each member, and so is discord.js with Socket.IO;
discord.js and discord.py alone only decode, and call an empty listener. Neither counts anything:
SpyWatcher without its plugins that do is what they compare with.
What counts is the CPU time of the bot's process, all threads and children of the kernel's included.
`--checkout` puts another version of SpyWatcher beside this one. `--members` measures nothing but the
memory of a bot with so many members in its guild, each with a presence.

Where the time goes in the status mix (perf, py-spy and timers around each step, on the machine of
results.json). Of 46 µs an event:
- 13 are the counting of analytics and history, five of them in SQLite's threads;
- 12 are hikari's and aiohttp's, from the socket to a packet's bytes (decompression is 0.5), and the
  writing to dashboards;
- 21 are the rest. A change of status takes 3 to read and 17 to reach the room, a message 3 and 30
  (10 of them hikari's objects), typing 2 and 10. No function has more than a twelfth.
discord.js and Socket.IO take 29 and count nothing. What was tried and brought nothing: one account of
the thread's time for all plugins' functions, and fewer calls around each of them.

Where the memory goes with 100,000 members. Of 250 MB:
- 108 are there before the first member (Node and discord.js: 97): 84 of them are modules, hikari's 18,
  aiohttp's 13, cryptography's 8, and 7 for the Redis clients that python-socketio imports;
- 76 are hikari's cache: 755 bytes a member, in two records (290), two cells (96), three texts (170),
  id, date and roles (150) and two tables (50);
- 8 are who appears how, 20 the roster of `presence:snapshot` (for a minute after somebody subscribed),
  15 analytics' and history's;
- the rest is what was freed but not given back.
0.7 of discord.js' would be 155. What was tried and brought little: MALLOC_ARENA_MAX=1 (8 MB),
malloc_trim (nothing).
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import re
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import load  # noqa: E402  # after the path
import report  # noqa: E402
from peers import SERVERS, event, node_path  # noqa: E402

import simulator  # noqa: E402
from simulator import Guild, Member, PretendDiscord  # noqa: E402

#: A plugin for who hears what the others hear.
LISTENING = ROOT / "bench" / "listening"
MEMBERS = 2_000
#: Frames that are written in one go, as a busy connection has them.
TOGETHER = 50
STATUSES = ("online", "idle", "dnd", "offline")
DEVICES = ("desktop", "mobile", "web")
NAMES = {
    "spywatcher": "SpyWatcher",
    "spywatcher-counts": "SpyWatcher without analytics and history",
    "other": "SpyWatcher, the other checkout",
    "discord.js+socket.io": "discord.js that tells a dashboard",
    "discord.js": "discord.js that only listens",
    "discord.py": "discord.py that only listens",
}
CONFIG = """
[server]
host = "127.0.0.1"
port = 0
max_queue_bytes = 268_435_456
[heartbeat]
interval = 300.0
[auth]
secret = "{secret}"
[limits]
connections_per_ip = 1_000_000
connections_per_viewer = 1_000_000
attempts_per_ip = "100000000/minute"
[discord]
token = "{token}"
rest_url = "{rest}"
startup_grace = 0.0
[plugins]
folders = ["{plugins}", "{listening}"]
disabled = {disabled}
watch = false
[plugin.presence]
snapshot_members = 0
"""


class Mix(NamedTuple):
    """What happens, in percent; the rest is typing."""

    presences: int
    messages: int
    #: Of the presences those that change nothing but an activity.
    activities: int


MIXES = {"status": Mix(70, 15, 0), "activity": Mix(85, 10, 80)}

#: Name and content of each.
Packets = Iterable[tuple[str, dict[str, Any]]]


class Crowd:
    """A guild's members, and what they do, as packets: the same for each who asks."""

    def __init__(self, guild: Guild, mix: Mix, seed: int) -> None:
        self._guild = guild
        self._mix = mix
        self._dice = random.Random(seed)
        self._people = [member for member in guild.members.values() if not member.user.bot]
        #: What a dashboard has to get of each member, in order.
        self.expected: dict[str, list[str]] = collections.defaultdict(list)

    def packets(self, count: int) -> Packets:
        for _ in range(count):
            member = self._dice.choice(self._people)
            kind = self._dice.randrange(100)
            if kind < self._mix.presences:
                yield "PRESENCE_UPDATE", self._presence(member)
            elif kind < self._mix.presences + self._mix.messages:
                self.expected[str(member.id)].append("message:new")
                yield (
                    "MESSAGE_CREATE",
                    simulator.message_json(self._guild, member, self._guild.general, ""),
                )
            else:
                yield (
                    "TYPING_START",
                    simulator.typing_json(self._guild, member, self._guild.general),
                )

    def _presence(self, member: Member) -> dict[str, Any]:
        if self._dice.randrange(100) < self._mix.activities:
            song = {"name": "Spotify", "type": 2, "details": f"song {self._dice.random()}"}
            member.appear(member.status, member.client_status, [song])
        else:
            status = self._dice.choice([one for one in STATUSES if one != member.status])
            devices = () if status == "offline" else (self._dice.choice(DEVICES),)
            member.appear(status, devices, member.activities)
            self.expected[str(member.id)].append(status)
        return simulator.presence_json(self._guild, member)


class Dashboard(threading.Thread):
    """A WebSocket client in the guild's room that keeps all it gets, to be read later."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._chunks: list[bytes] = []
        for request, answer in load.steps_of(recover=False):
            self._socket.sendall(request)
            came = b""
            while answer not in came:
                came += self._socket.recv(load.READ_BYTES)
        self.start()

    def run(self) -> None:
        while chunk := self._socket.recv(load.READ_BYTES):
            self._chunks.append(chunk)

    def heard(self) -> dict[str, list[str]]:
        """Of each member, in order, the new status or the name of the event."""
        heard: dict[str, list[str]] = collections.defaultdict(list)
        for name, fields in map(
            json.loads, re.findall(rb'42(\["[a-z]+:[a-z]+",\{.*?\}\])', b"".join(self._chunks))
        ):
            if name in ("presence:update", "message:new"):
                heard[fields["userId"]].append(fields.get("status", name))
        return heard

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Bot:
    """A process that listens to the pretend Discord."""

    def __init__(
        self, process: asyncio.subprocess.Process, dashboard: Dashboard | None, port: int
    ) -> None:
        self._process = process
        self.dashboard = dashboard
        self.port = port

    @property
    def cpu(self) -> float:
        """Seconds so far, of all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident(self) -> float:
        """MB."""
        statm = Path(f"/proc/{self._process.pid}/statm").read_text()
        return int(statm.split()[1]) * resource.getpagesize() / 1e6

    async def idle(self) -> None:
        """Until it does nothing more with what it got."""
        before = -1.0
        while self.cpu - before > 0.02:
            before = self.cpu
            await asyncio.sleep(0.5)


async def start(kind: str, discord: PretendDiscord, folder: Path, root: Path) -> tuple[Any, str]:
    """The process, and the line with which it says that it is there."""
    discord_js = ["node", str(SERVERS / "discord_js.mjs")]
    discord_js += [discord.rest_url.removesuffix("/v10"), discord.token]
    command = {
        "discord.js": discord_js,
        "discord.js+socket.io": [*discord_js, event.SECRET],
        "discord.py": [
            *(sys.executable, str(SERVERS / "discord_py.py")),
            *(discord.rest_url, discord.token, discord.gateway_url),
        ],
    }.get(kind)
    if command is None:
        program = SERVERS / "watched_server.py" if kind == "watched" else root / "spywatcher.py"
        config = folder / "config.toml"
        about = {"secret": event.SECRET, "token": discord.token, "rest": discord.rest_url}
        uncounted = kind == "spywatcher-counts"
        about["disabled"] = json.dumps(["analytics", "history"] if uncounted else ["typing"])
        folders = {"plugins": root / "plugins", "listening": LISTENING}
        config.write_text(CONFIG.format(**folders, **about))
        command = [sys.executable, str(program), "--config", str(config)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *node_path(command), stdout=pipe, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout
    async for line in process.stdout:
        if b"ready" in line or b"listening on" in line:
            return process, line.decode()
    raise RuntimeError(f"{kind} did not start")


@contextlib.asynccontextmanager
async def connected(
    kind: str, discord: PretendDiscord, root: Path, folder: Path | None = None
) -> AsyncIterator[Bot]:
    """A bot that has all of its guilds, at work in `folder`."""
    with tempfile.TemporaryDirectory() as own:
        process, line = await start(kind, discord, folder or Path(own), root)
        rest = asyncio.create_task(process.stdout.read())
        dashboard = None
        try:
            await discord.wait_for_bot(120.0)
            if found := re.search(r"listening on http://[^:]+:(\d+)", line):
                dashboard = await asyncio.to_thread(Dashboard, int(found[1]))
            yield Bot(process, dashboard, int(found[1]) if found else 0)
        finally:
            if dashboard:
                dashboard.close()
            process.terminate()
            await process.wait()
            await rest


async def write(discord: PretendDiscord, packets: Packets) -> None:
    """All packets, to the only session, at the speed at which it reads."""
    frames = await frames_of(discord, packets)
    stream = socket_of(discord).ws_connection.stream
    for number in range(0, len(frames), TOGETHER):
        await stream.write(b"".join(frames[number : number + TOGETHER]))
    await discord.caught_up(300.0)


async def frames_of(discord: PretendDiscord, packets: Packets) -> list[bytes]:
    """The packets as they go to the only session, which must get them all, in this order."""
    (session,) = discord.sessions.values()
    pack, frames = socket_of(discord)._pack, []
    for name, data in packets:
        session.seq += 1
        shown = simulator.let_through(name, data, session.intents, discord.bot.id)
        packet = {"op": simulator.Op.DISPATCH, "t": name, "s": session.seq, "d": shown}
        frames.append(server_frame(pack(json.dumps(packet, separators=(",", ":")).encode())))
        if session.seq % 500 == 0:
            await asyncio.sleep(0)  # or no heartbeat is answered
    return frames


def socket_of(discord: PretendDiscord) -> Any:
    """The pretend Discord's end of the only gateway connection."""
    (session,) = discord.sessions.values()
    return session.socket


def server_frame(packet: bytes | str) -> bytes:
    """A frame as servers send it (RFC 6455 §5.2)."""
    kind, data = (b"\x82", packet) if isinstance(packet, bytes) else (b"\x81", packet.encode())
    size = len(data)
    return kind + (bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")) + data


def crowded(discord: PretendDiscord, members: int) -> Guild:
    guild = discord.add_guild(guild_id=int(event.GUILD))
    for number in range(members):
        guild.add_member(f"member{number}").appear("online", [DEVICES[number % 3]])
    return guild


async def measure(kind: str, mix: Mix, count: int, root: Path) -> dict[str, float]:
    """One bot, from its start to its end."""
    async with PretendDiscord() as discord:
        crowd = Crowd(crowded(discord, MEMBERS), mix, seed=1)
        async with connected(kind, discord, root) as bot:
            await write(discord, crowd.packets(count // 5))  # to warm up
            await bot.idle()
            before, began = bot.cpu, time.monotonic()
            await write(discord, crowd.packets(count))
            seconds = time.monotonic() - began
            await bot.idle()
            spent, resident = bot.cpu - before, bot.resident
            if bot.dashboard:
                assert bot.dashboard.heard() == crowd.expected, "a dashboard got something else"
    return {"per_cpu_second": count / spent, "per_second": count / seconds, "resident": resident}


async def memory(kind: str, members: int, root: Path) -> float:
    async with PretendDiscord() as discord:
        crowded(discord, members)
        async with connected(kind, discord, root) as bot:
            await bot.idle()
            return bot.resident


def show_memory(roots: dict[str, Path], members: int) -> None:
    figures = {kind: asyncio.run(memory(kind, members, root)) for kind, root in roots.items()}
    rows: list[list[object]] = [[NAMES[kind], figures[kind]] for kind in figures]
    report.show(f"{members:,} members with presences", ["bot", "resident MB"], rows)
    report.keep("ingest_memory", {"members": members, "resident_mb": figures})


def show_mixes(roots: dict[str, Path], mixes: list[str], count: int, rounds: int) -> None:
    kept = {}
    for name, mix in ((name, MIXES[name]) for name in mixes):
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in roots}
        for _ in range(rounds):
            for kind, root in roots.items():
                runs[kind].append(asyncio.run(measure(kind, mix, count, root)))
        ours = [run["per_cpu_second"] for run in runs["spywatcher"]]
        rows: list[list[object]] = []
        for kind in roots:
            theirs = [run["per_cpu_second"] for run in runs[kind]]
            times = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            resident = statistics.median(run["resident"] for run in runs[kind])
            rows.append([NAMES[kind], statistics.median(theirs), times, resident])
        header = ["bot", "events per CPU second", "SpyWatcher's to its", "resident MB"]
        report.show(f"{name} mix, {MEMBERS:,} members", header, rows)
        kept[name] = {
            kind: {"events_per_cpu_second": rate, "spywatcher_ratio": times}
            for kind, (_, rate, times, _) in zip(roots, rows, strict=True)
        }
    report.keep("ingest", kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--checkout", type=Path, help="another version of SpyWatcher")
    parser.add_argument("--members", type=int, help="nothing but the memory of so many")
    parser.add_argument("--only", nargs="*", choices=NAMES, help="only these bots")
    parser.add_argument("--mix", nargs="*", choices=MIXES, default=[*MIXES], help="only these")
    options = parser.parse_args()
    roots = dict.fromkeys(NAMES, ROOT) | {"other": options.checkout}
    wanted = options.only or roots
    roots = {kind: root for kind, root in roots.items() if root and kind in wanted}
    if options.members:
        show_memory(roots, options.members)
    else:
        show_mixes(roots, options.mix, *((20_000, 1) if options.quick else (100_000, 3)))


if __name__ == "__main__":
    main()
