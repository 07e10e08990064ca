"""How long an event takes from Discord's gateway socket to the JavaScript client's callback.

    python bench/latency.py [--rate 50] [--events 1000]

A pretend Discord writes MESSAGE_CREATE at a steady rate to the socket that hikari reads; the stock
client in a Node process notes when `message:new` reaches its callback. Both ends read the same
clock (CLOCK_MONOTONIC). The way in between is the whole product: hikari, plugin, room, WebSocket.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from jsclient import JavaScript  # noqa: E402  # of this checkout
from watching import Watch, Watching  # noqa: E402

from simulator import PretendDiscord  # noqa: E402

#: Events that are sent before those that count: imports, caches and the first write.
WARM_UP = 50


async def measure(spy: Watch, rate: float, events: int) -> list[float]:
    """Milliseconds of each event, in the order of sending."""
    dashboard = await spy.dashboard(transports=["websocket"])
    sent: list[float] = []
    for number in range(WARM_UP + events):
        due = time.monotonic() if number == 0 else sent[0] + number / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        sent.append(time.monotonic())
        await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general)
    arrived = [(await dashboard.next_event("message:new")).monotonic for _ in sent]
    delays = [(end - start) * 1000 for start, end in zip(sent, arrived, strict=True)]
    return delays[WARM_UP:]


async def run(rate: float, events: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = {"path": f"{folder}/spywatcher.db"}
        async with (
            PretendDiscord() as discord,
            JavaScript() as js,
            Watching(discord, discord.add_guild(), js)(storage=storage) as spy,
        ):
            delays = await measure(spy, rate, events)
    cuts = statistics.quantiles(delays, n=100)
    print(f"gateway socket -> JavaScript callback, {events} events at {rate:g}/s, one client")
    print(f"median {cuts[49]:6.2f} ms   (wanted: under 5)")
    print(f"p99    {cuts[98]:6.2f} ms   (wanted: under 25)")
    print(f"max    {max(delays):6.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rate", type=float, default=50.0, help="events per second")
    parser.add_argument("--events", type=int, default=1000)
    options = parser.parse_args()
    asyncio.run(run(options.rate, options.events))


if __name__ == "__main__":
    main()
