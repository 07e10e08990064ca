"""How fast clients come in: TCP, WebSocket, Engine.IO and Socket.IO handshake, JWT checked.

Each round connects all clients to one server, a hundred at a time, and drops them; rounds
alternate between the servers, after one that warms each up.
"""

from __future__ import annotations

from collections import defaultdict

import load
import peers
import report


def connect_all(peer: peers.Peer, count: int) -> float:
    """Connections a second."""
    clients = load.Load(peer.port)
    try:
        return count / clients.connect(count, subscribed=False)
    finally:
        clients.close()


def compare(kinds: list[str], count: int, rounds: int) -> dict[str, list[float]]:
    rates = defaultdict(list)
    with peers.started(kinds) as started:
        for peer in started:
            connect_all(peer, min(count, 1_000))
        for _ in range(rounds):
            for peer in started:
                rates[peer.kind].append(connect_all(peer, count))
    return rates


def main() -> None:
    options = report.parse_arguments(__doc__ or "", compares=True)
    quick = options.quick
    kinds = options.only or [*peers.SPYWATCHERS, "node", "stock"]
    if options.checkout:
        kinds.append(peers.add_checkout(options.checkout))
    results = {}
    for count, rounds in ((1_000, 2),) if quick else ((1_000, 5), (10_000, 1)):
        few = [kind for kind in kinds if count < 10_000 or kind in ("spywatcher", "node", "other")]
        rates = compare(few, count, rounds)
        results[str(count)] = {
            kind: {
                "rate": report.median(found),
                "ours_by_this": report.ratio(rates["spywatcher"], found),
            }
            for kind, found in rates.items()
        }
    rows = [
        [f"{peers.NAMES[kind]}, {int(count):,} clients", found["rate"], found["ours_by_this"]]
        for count, by_kind in results.items()
        for kind, found in by_kind.items()
    ]
    header = ["connecting", "connections a second", "SpyWatcher by this"]
    report.show("Connections with a JWT", header, rows)
    if not options.only:
        report.keep("connect", results)


if __name__ == "__main__":
    main()
