"""One room, many clients: deliveries a second, beside other servers in the same run.

Single events go out one at a time, the next when every client has had the last (a closed loop);
bursts go out in one go; the steady stream has a fixed rate and is timed from when an event was
due. Every client checks every byte. Rounds alternate between the servers.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import load
import peers
import report

CLIENTS = 1_000
SIZES = {"single": 1, "burst 100": 100, "burst 1000": 1_000}
SCALE = (1, 10, 100, 1_000, 10_000)
#: How long one turn of a server lasts at least, and how many make a round: short ones, so that what
#: slows the machine for a while slows all servers. The order stays the same: whoever had two turns
#: in a row would find its memory in the processor's cache, and be 5% faster.
SECONDS = 0.1
TURNS = 8
#: To clients that can recover, and beside it what tells why it differs: the bytes of an offset in
#: the payload, and one more server like the first, which shows how much is chance.
RECOVERY = ["spywatcher", "spywatcher again", "spywatcher+bytes", "spywatcher+recovery"]
#: What a server needs too long for is left out: (kind, burst) -> rounds at most.
MOST_ROUNDS = {("stock", 100): 1, ("stock", 1000): 0, ("node", 1000): 2, ("bare", 1000): 2}


class Bench:
    """One server with its clients, and how many events it has sent."""

    def __init__(self, peer: peers.Peer, clients: int) -> None:
        self.peer = peer
        recover = peer.kind == "spywatcher+recovery"
        longer = peer.kind == "spywatcher+bytes"
        self.load = load.Load(peer.port, awake=True, recover=recover, longer=longer)
        self.load.connect(clients)
        if recover:
            self.load.first_offset = peer.usage()["offset"] + 1
        self.clients = clients
        self.sent = 0

    def emit(self, count: int) -> tuple[float, float]:
        self.load.expect(self.sent + count)
        self.sent += count
        self.peer.send("emit", count)
        return self.load.receive(self.sent)

    def turn(self, size: int) -> tuple[float, list[float]]:
        """Bursts of one size: how long all took, and for each the seconds from first to last byte."""
        spreads = []
        self.load.expect(self.sent + 5 * max(size, 1_000))
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < SECONDS:
            first, last = self.emit(size)
            spreads.append(last - first)
        return spent, spreads

    def steady(self, rate: int, seconds: float) -> dict[str, float]:
        """Latency in ms from when an event was due, CPU share of one core, and how late it ended."""
        count = int(rate * seconds)
        self.load.expect(self.sent + count)
        before = self.peer.usage()["cpu"]
        self.peer.send("steady", rate, seconds)
        start = self.peer.answer()["start"]
        reads = [
            (time.monotonic(), position, client.position)
            for client, position in self.load.progress(self.sent + count)
        ]
        ended = time.monotonic()
        latencies = latencies_ms(reads, self.load.frame_bytes, self.sent, start, rate)
        self.sent += count
        return {
            "p50": report.percentile(latencies, 0.5),
            "p99": report.percentile(latencies, 0.99),
            "cpu": (self.peer.usage()["cpu"] - before) / (ended - start),
            "late": ended - start - seconds,
        }


def latencies_ms(
    reads: list[tuple[float, int, int]], size: int, first: int, start: float, rate: float
) -> list[float]:
    """One latency per event and client; an event has come when its last byte has."""
    return [
        (moment - start - (number - first) / rate) * 1000
        for moment, before, after in reads
        for number in range(before // size, after // size)
    ]


def measure(
    benches: list[Bench], size: int, turns: int = TURNS
) -> dict[str, tuple[float, list[float]]]:
    """One round of bursts, in turns: deliveries a second, and seconds from first to last byte."""
    spent: dict[str, float] = defaultdict(float)
    spreads: dict[str, list[float]] = defaultdict(list)
    for _ in range(turns):
        for bench in benches:
            seconds, found = bench.turn(size)
            spent[bench.peer.kind] += seconds
            spreads[bench.peer.kind] += found
    return {
        bench.peer.kind: (
            bench.clients * size * len(spreads[bench.peer.kind]) / spent[bench.peer.kind],
            spreads[bench.peer.kind],
        )
        for bench in benches
    }


def compare(kinds: list[str], rounds: int) -> dict[str, Any]:
    """All servers at once, their rounds in turn; figures by kind and measure, one a round."""
    figures: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    with peers.started(kinds) as started:
        benches = [Bench(peer, CLIENTS) for peer in started]
        for _ in range(rounds * 4):
            for kind, (rate, spreads) in measure(benches, 1).items():
                figures[kind]["single"].append(rate)
                figures[kind]["spread"] += spreads
        for size in (100, 1000):
            for number in range(rounds):
                turn = [
                    bench
                    for bench in benches
                    if number < MOST_ROUNDS.get((bench.peer.kind, size), rounds)
                ]
                for kind, (rate, _) in measure(turn, size, turns=1).items():
                    figures[kind][f"burst {size}"].append(rate)
        for _ in range(rounds):
            for bench in benches:
                if bench.peer.kind.startswith("spywatcher"):
                    figures[bench.peer.kind]["steady"].append(bench.steady(1_000, 3.0))
    return figures


def cost_of_recovery(starts: int, rounds: int) -> dict[str, Any]:
    """Deliveries a second as a share of the first server's in the same round; by kind and measure.

    Each start is of new processes: one may be some percent faster than its equal while it lives.
    """
    shares: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    for number in range(starts):
        with peers.started(RECOVERY[:: -1 if number % 2 else 1]) as started:
            benches = [Bench(peer, CLIENTS) for peer in started]
            for _ in range(rounds):
                for name, size in SIZES.items():
                    rates = {kind: rate for kind, (rate, _) in measure(benches, size).items()}
                    for kind, rate in rates.items():
                        shares[kind][name].append(rate / rates["spywatcher"])
    return shares


def scale(kinds: list[str], sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Deliveries a second from one client to many: single events, and bursts of 100.

    One server after the other: descriptors would not do for the 10,000 clients of all.
    """
    figures: dict[str, Any] = {kind: {} for kind in kinds}
    for size in sizes:
        rates: dict[str, Any] = defaultdict(lambda: defaultdict(list))
        for _ in range(rounds):
            for kind in kinds:
                with peers.started([kind]) as [peer]:
                    bench = Bench(peer, size)
                    rates[kind]["single"].append(measure([bench], 1)[kind][0])
                    rates[kind]["burst 100"].append(measure([bench], 100, turns=1)[kind][0])
                    bench.load.close()
        for kind in kinds:
            figures[kind][str(size)] = {
                name: report.median(values) for name, values in rates[kind].items()
            }
    return figures


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    ours = figures["spywatcher"]
    return {
        kind: {
            **{name: report.median(found[name]) for name in ("single", "burst 100", "burst 1000")},
            "spread_p99_ms": report.percentile(found["spread"], 0.99) * 1000,
            "ours_by_this": {
                name: report.ratio(ours[name], found[name])
                for name in ("single", "burst 100", "burst 1000")
            },
            "steady": {
                name: report.median([one[name] for one in found["steady"]])
                for name in ("p50", "p99", "cpu", "late")
            },
        }
        for kind, found in figures.items()
    }


def show(results: dict[str, Any]) -> None:
    rows = [
        [
            peers.NAMES[kind],
            found["single"],
            found["burst 100"],
            found["burst 1000"],
            found["ours_by_this"]["single"],
            found["ours_by_this"]["burst 1000"],
            found["spread_p99_ms"],
        ]
        for kind, found in results.items()
    ]
    header = ["deliveries a second", "single", "burst of 100", "burst of 1,000"]
    header += ["SpyWatcher by this", "in bursts", "first to last, p99 ms"]
    report.show(f"Fan-out, {CLIENTS:,} clients in one room", header, rows)
    rows = [
        [peers.NAMES[kind], *(found["steady"][name] for name in ("p50", "p99", "cpu", "late"))]
        for kind, found in results.items()
        if found["steady"]["p50"] is not None
    ]
    header = ["1,000 events a second", "p50 ms", "p99 ms", "of one core", "late by s"]
    report.show(f"Steady stream, {CLIENTS:,} clients", header, rows)


def show_recovery(shares: dict[str, Any]) -> dict[str, Any]:
    """Also returns what it shows: by kind and measure, the median of all rounds."""
    found = {
        kind: {name: report.median(values) for name, values in by_name.items()}
        for kind, by_name in shares.items()
    }
    rows = [[peers.NAMES[kind], *(found[kind][name] for name in SIZES)] for kind in RECOVERY[1:]]
    header = ["by SpyWatcher to clients that cannot recover", *SIZES]
    report.show("What recovery costs: deliveries a second, and how much is chance", header, rows)
    return found


def main() -> None:
    options = report.parse_arguments(__doc__ or "", compares=True)
    quick = options.quick
    kinds = options.only or [*peers.SPYWATCHERS, "spywatcher+recovery", "node", "stock", "bare"]
    if options.checkout:
        kinds.append(peers.add_checkout(options.checkout))
    results = summary(compare(kinds, rounds=1 if quick else 3))
    show(results)
    recovery = {}
    if "spywatcher+recovery" in kinds:
        recovery = show_recovery(cost_of_recovery(starts=1 if quick else 4, rounds=3))
    if options.only:
        return
    sizes = SCALE[:4] if quick else SCALE
    scaling = scale(["spywatcher", "node", "bare"], sizes, rounds=1 if quick else 2)
    rows = [
        [f"{peers.NAMES[kind]}, {name}", *(scaling[kind][str(size)][name] for size in sizes)]
        for kind in scaling
        for name in ("single", "burst 100")
    ]
    header = ["deliveries a second", *(f"{size:,} clients" for size in sizes)]
    report.show("Scaling", header, rows)
    figures = {"clients": CLIENTS, "servers": results, "recovery": recovery, "scaling": scaling}
    report.keep("fanout", figures)


if __name__ == "__main__":
    main()
