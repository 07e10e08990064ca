"""What clients cost in memory: idle ones, on WebSockets and polling, ones that come and go, one that
never reads; and what is kept for those that may come back.

    python bench/memory.py [--quick] [--only idle pollers churn stalled recovery]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import load
import peers
import report
from fanout import latencies_ms

sys.path[:0] = [str(Path(__file__).parent.parent)]

import spywatcher  # noqa: E402  # after the path

MEGABYTE = 1_048_576
WAVE = 500
READERS = 50
EVENTS_A_SECOND = 20_000
#: What recovery is measured with: guilds that are watched, events of each a second, and seconds.
GUILDS, RATE, WINDOW = 20, 50, 120


def idle(kind: str, count: int) -> float:
    """Resident KB that each of so many connected clients adds."""
    with peers.started([kind]) as (peer,):
        clients = load.Load(peer.port)
        clients.connect(10)  # what is made once is made now
        before = peer.usage()["resident"]
        clients.connect(count)
        grown = peer.usage()["resident"] - before
        clients.close()
    return float(grown / count / 1024)


class Poller:
    """A client that polls, in the guild's room; it leaves its last poll open."""

    def __init__(self, port: int) -> None:
        self._path = "/socket.io/?EIO=4&transport=polling"
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
        self._path += "&sid=" + json.loads(self._ask("GET")[1:])["sid"]
        self._ask("POST", "40" + json.dumps({"token": load.TOKEN, "recover": False}))
        self._until("40{")
        self._ask("POST", f'420["subscribe:guild","{peers.event.GUILD}"]')
        self._until('430[{"ok":true')
        with contextlib.suppress(TimeoutError):  # what else comes at first
            self._connection.sock.settimeout(0.05)
            while True:
                self._ask("GET")

    def _ask(self, method: str, body: str | None = None) -> str:
        self._connection.request(method, self._path, body)
        return self._connection.getresponse().read().decode()

    def _until(self, answer: str) -> None:
        while answer not in self._ask("GET"):
            pass

    def close(self) -> None:
        self._connection.close()


def polling(kind: str, count: int) -> float:
    """Resident KB that each of so many polling clients adds."""
    with peers.started([kind]) as (peer,):
        clients = [Poller(peer.port) for _ in range(10)]
        before = peer.usage()["resident"]
        clients += [Poller(peer.port) for _ in range(count)]
        grown = peer.usage()["resident"] - before
        for client in clients:
            client.close()
    return float(grown / count / 1024)


def recovery() -> dict[str, float]:
    """What the logs of all guilds hold after a window full of events, and what is allowed."""
    settings = spywatcher.RecoverySettings(window=WINDOW)
    kept = spywatcher.GuildLogs(settings)
    rooms = [spywatcher.Destination(str(10**17 + number), "guild") for number in range(GUILDS)]
    for to in rooms:
        kept.keep(to.guild_id)
    before = peers.resident()
    for number in range(RATE * WINDOW):
        for to in rooms:
            packet = spywatcher.event_packet("message:new", peers.event.message(number))
            kept.add(to, packet)
    allowed = GUILDS * spywatcher.MAX_LOG_BYTES / MEGABYTE
    grown = (peers.resident() - before) / MEGABYTE
    return {"logs_mb": kept.size / MEGABYTE, "grown_mb": grown, "allowed_mb": allowed}


def churn(kind: str, count: int) -> dict[str, Any]:
    """Resident bytes after the first tenth of so many connects and disconnects, and after all."""
    with peers.started([kind]) as (peer,):
        come_and_go(peer, count // 10)
        before = settled(peer)
        come_and_go(peer, count)
        after = settled(peer)
    figures = {"before_mb": before["resident"] / MEGABYTE, "after_mb": after["resident"] / MEGABYTE}
    growth = after["resident"] / before["resident"] - 1
    return {**figures, "growth": growth, "left": held(after)}


def come_and_go(peer: peers.Peer, count: int) -> None:
    for _ in range(count // WAVE):
        clients = load.Load(peer.port)
        clients.connect(WAVE)
        clients.close()


def settled(peer: peers.Peer) -> dict[str, Any]:
    """The server's figures once it has noticed that everybody is gone."""
    deadline = time.monotonic() + 10.0
    while any(held(usage := peer.usage()).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return usage


def held(usage: dict[str, Any]) -> dict[str, int]:
    """What a server holds of its clients, counted."""
    return {name: usage[name] for name in usage if name not in ("resident", "cpu", "offset")}


def stalled(kind: str, megabytes: int, *, stalling: int) -> dict[str, float]:
    """Events for READERS clients that read and some that never do, as fast as a flood can be."""
    count = megabytes * MEGABYTE // load.FRAME_BYTES
    with peers.started([kind]) as (peer,):
        readers, deaf = load.Load(peer.port), load.Load(peer.port)
        readers.connect(READERS)
        deaf.connect(stalling)
        readers.expect(count)
        before = most = peer.resident()
        peer.send("steady", EVENTS_A_SECOND, count / EVENTS_A_SECOND)
        start = peer.answer()["start"]
        reads, asked = [], start
        for client, position in readers.progress(count):
            now = time.monotonic()
            reads.append((now, position, client.position))
            if now - asked > 0.5:
                asked, most = now, max(most, peer.resident())
        latencies = latencies_ms(
            reads[:: 1 + len(reads) // 50_000], load.FRAME_BYTES, 0, start, EVENTS_A_SECOND
        )
        sockets = peer.usage()["sockets"]
        readers.close()
        deaf.close()
    return {
        "grown_mb": (most - before) / MEGABYTE,
        "p99_ms": report.percentile(latencies, 0.99),
        "connected": sockets,
    }


def show_idle(quick: bool) -> dict[str, Any]:
    count = 1_000 if quick else 10_000
    each = {kind: idle(kind, count) for kind in ("spywatcher", "node", "stock")}
    rows: list[list[object]] = [[peers.NAMES[kind], each[kind]] for kind in each]
    report.show(f"{count:,} idle clients", ["resident memory", "KB each"], rows)
    return {"clients": count, "idle_kb": each}


def show_pollers(quick: bool) -> dict[str, Any]:
    count = 100 if quick else 300
    each = {kind: polling(kind, count) for kind in ("spywatcher", "node")}
    rows: list[list[object]] = [[peers.NAMES[kind], each[kind]] for kind in each]
    report.show(f"{count:,} idle clients that poll", ["resident memory", "KB each"], rows)
    return {"pollers": count, "polling_kb": each}


def show_churn(quick: bool) -> dict[str, Any]:
    gone = churn("spywatcher", 5_000 if quick else 100_000)
    rows: list[list[object]] = [
        ["SpyWatcher", gone["before_mb"], gone["after_mb"], gone["growth"] * 100]
    ]
    header = ["clients that come and go", "MB before", "MB after", "growth in %"]
    report.show(f"Left over: {gone['left']}", header, rows)
    return {"churn": gone}


def show_stalled(quick: bool) -> dict[str, Any]:
    size = 50 if quick else 200
    flood = {str(number): stalled("spywatcher", size, stalling=number) for number in (0, 1)}
    rows: list[list[object]] = [
        [f"{number} never read", one["grown_mb"], one["p99_ms"], one["connected"]]
        for number, one in flood.items()
    ]
    header = ["", "MB at most", "p99 ms of the others", "connected at the end"]
    report.show(f"{size} MB of events to {READERS} clients that read", header, rows)
    return {"stalled": flood}


def show_recovery(quick: bool) -> dict[str, Any]:
    held = recovery()
    header = ["kept for who comes back", "MB in logs", "MB of memory", "MB allowed in logs"]
    row = [f"{GUILDS * RATE:,} events a second", *held.values()]
    report.show(f"{GUILDS} guilds, a window of {WINDOW} s", header, [row])
    return {"recovery": held}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "idle": show_idle,
    "pollers": show_pollers,
    "churn": show_churn,
    "stalled": show_stalled,
    "recovery": show_recovery,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="only these")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for name in options.only:
        figures |= PARTS[name](options.quick)
    report.keep("memory", figures)


if __name__ == "__main__":
    main()
