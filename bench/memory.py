"""What clients cost in memory: idle ones, ones that come and go, and one that never reads."""

from __future__ import annotations

import time
from typing import Any

import load
import peers
import report
from fanout import latencies_ms

MEGABYTE = 1_048_576
WAVE = 500
READERS = 50
EVENTS_A_SECOND = 20_000


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


def main() -> None:
    quick = report.parse_arguments(__doc__ or "").quick
    count = 1_000 if quick else 10_000
    each = {kind: idle(kind, count) for kind in ("spywatcher", "node", "stock")}
    rows: list[list[object]] = [[peers.NAMES[kind], each[kind]] for kind in each]
    report.show(f"{count:,} idle clients", ["resident memory", "KB each"], rows)

    gone = churn("spywatcher", 5_000 if quick else 100_000)
    rows = [["SpyWatcher", gone["before_mb"], gone["after_mb"], gone["growth"] * 100]]
    header = ["clients that come and go", "MB before", "MB after", "growth in %"]
    report.show(f"Left over: {gone['left']}", header, rows)

    size = 50 if quick else 200
    flood = {str(number): stalled("spywatcher", size, stalling=number) for number in (0, 1)}
    rows = [
        [f"{number} never read", one["grown_mb"], one["p99_ms"], one["connected"]]
        for number, one in flood.items()
    ]
    header = ["", "MB at most", "p99 ms of the others", "connected at the end"]
    report.show(f"{size} MB of events to {READERS} clients that read", header, rows)
    report.keep("memory", {"clients": count, "idle_kb": each, "churn": gone, "stalled": flood})


if __name__ == "__main__":
    main()
