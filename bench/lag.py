"""How late the server's loop is while a busy bot's packets come in.

    python bench/lag.py [--quick] [--rate 10000] [--dashboards 100]

A pretend Discord writes packets of the activity mix (bench/ingest.py) at a steady rate; dashboards
in the guild's room count what they get. A timer on the server's loop notes how late it is called.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ingest
import load
import report

from simulator import PretendDiscord

#: Packets are written so often a second, each time those that are due.
TICKS = 100
#: What each event has once.
ABOUT_MEMBER = b'"userId"'


class Listeners(threading.Thread):
    """Dashboards in the guild's room that count the events they get."""

    def __init__(self, port: int, count: int) -> None:
        super().__init__(daemon=True)
        self._load = load.Load(port)
        self._load.connect(count)
        self.heard = dict.fromkeys(self._load.clients, 0)
        self._open = True
        self.start()

    def run(self) -> None:
        ends = dict.fromkeys(self.heard, b"")
        while self._open:
            for client in self._load.ready(0.2):
                number = client.socket.fileno()
                data = ends[number] + client.socket.recv(load.READ_BYTES)
                self.heard[number] += data.count(ABOUT_MEMBER)
                ends[number] = data[1 - len(ABOUT_MEMBER) :]

    def close(self) -> None:
        self._open = False
        self.join()
        self._load.close()


async def flood(discord: PretendDiscord, frames: list[bytes], rate: int) -> tuple[float, float]:
    """Write the frames at the rate; returns when it began and ended."""
    stream, began = ingest.socket_of(discord).ws_connection.stream, time.monotonic()
    sent = 0
    while sent < len(frames):
        due = min(len(frames), int((time.monotonic() - began) * rate) + 1)
        await stream.write(b"".join(frames[sent:due]))
        sent = due
        await asyncio.sleep(1 / TICKS)
    await discord.caught_up(60.0)
    return began, time.monotonic()


def late_ms(looks: Path, began: float, ended: float) -> list[float]:
    """How late the loop was at each look in that time."""
    return [1000 * late for when, late in json.loads(looks.read_text()) if began <= when <= ended]


async def measure(rate: int, seconds: float, dashboards: int) -> dict[str, Any]:
    async with PretendDiscord() as discord:
        crowd = ingest.Crowd(
            ingest.crowded(discord, ingest.MEMBERS), ingest.MIXES["activity"], seed=1
        )
        with tempfile.TemporaryDirectory() as folder:
            async with ingest.connected("watched", discord, ingest.ROOT, Path(folder)) as bot:
                await ingest.write(discord, crowd.packets(rate // 5))  # to warm up
                crowd.expected.clear()
                frames = await ingest.frames_of(discord, crowd.packets(int(rate * seconds)))
                listeners = await asyncio.to_thread(Listeners, bot.port, dashboards)
                expected = sum(map(len, crowd.expected.values()))
                before = bot.cpu
                began, ended = await flood(discord, frames, rate)
                cpu = (bot.cpu - before) / (ended - began)
                await bot.idle()
                listeners.close()
            late = late_ms(Path(folder, "late.json"), began, ended)
    heard = set(listeners.heard.values())
    return {
        "rate": len(frames) / (ended - began),
        "cpu": cpu,
        "p50_ms": report.percentile(late, 0.5),
        "p99_ms": report.percentile(late, 0.99),
        "max_ms": max(late),
        "events": min(heard),
        "each_got_all": len(heard) == 1 and heard <= {expected},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five seconds instead of thirty")
    parser.add_argument("--rate", type=int, default=10_000, help="packets a second")
    parser.add_argument("--dashboards", type=int, default=100)
    options = parser.parse_args()
    seconds = 5.0 if options.quick else 30.0
    figures = asyncio.run(measure(options.rate, seconds, options.dashboards))
    header = ["packets a second", "of one core", "p50 ms", "p99 ms", "most ms", "events to each"]
    row = [figures[name] for name in ("rate", "cpu", "p50_ms", "p99_ms", "max_ms", "events")]
    report.show(f"Loop lag, {options.dashboards} dashboards, {seconds:.0f} s", header, [row])
    report.keep("lag", {"dashboards": options.dashboards, "seconds": seconds, **figures})
    if not figures["each_got_all"]:
        sys.exit("a dashboard got more or less than the others, or than was sent")


if __name__ == "__main__":
    main()
