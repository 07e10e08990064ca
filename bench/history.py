"""The history plugin with 10,000 guilds and 400 days: the size of its file, and how long a subscriber waits.

    python bench/history.py [--small] [--seed N]

The guilds are of many sizes, few large and most small, with days, nights and weekends; 500 are
unlike, the others repeat them. Weeks that are over are put into the store as it has them then, the
hours of the current one one after the other, as the plugin hands them over. Then the plugin begins
anew from the file, and a subscriber of one guild after the other is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from spywatcher import load_module  # noqa: E402  # after the path

FIRST_GUILD = 81_384_788_765_712_384
#: Thursday the first of January 2026, in hours since 1970.
FIRST_HOUR = 490_896
DAY = 24
#: Guilds that do not repeat others.
UNLIKE = 500


def make_hour(hour: int, sizes: list[float], chance: random.Random) -> Iterator[list[Any]]:
    """A row for each guild; the size of one is the messages that it has in a good hour."""
    day = 0.15 + 0.85 * max(0.0, math.sin((hour % DAY - 7) / DAY * 2 * math.pi) * 0.5 + 0.5) ** 2
    day *= 1.3 if hour // DAY % 7 in (2, 3) else 1.0
    for number, size in enumerate(sizes):
        messages = max(0, round(chance.gauss(size * day, math.sqrt(size * day) + size * day / 4)))
        active = min(messages, round(chance.gauss(size * day / 3, math.sqrt(size * day) / 3)))
        online = max(0, round(chance.gauss(size * 3 * (day + 0.5), math.sqrt(size))))
        joins = int(chance.random() < size / 200) + int(chance.random() < size / 1000)
        leaves = int(chance.random() < size / 220)
        if messages or joins or leaves or online:
            counts = (messages, joins, leaves, max(active, 0), online)
            yield [hour, FIRST_GUILD + number, 0, *counts, None]


def pretend_spy(module: Any, folder: Path) -> Any:
    """What a server hands to the plugin."""
    cache = SimpleNamespace(get_guilds_view=dict)
    return SimpleNamespace(
        settings=module.Settings(),
        storage=folder / "counts.db",
        log=logging.getLogger("history"),
        bot=SimpleNamespace(cache=cache),
        shared=None,
        alone=asyncio.Lock(),
        emit=lambda *event, room: None,
        count=lambda what, amount=1: None,
    )


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("counts.history.db*"))


async def fill(module: Any, folder: Path, guilds: int, days: int, seed: int) -> tuple[float, int]:
    """Seconds for an hour of all guilds, and the bytes of the file before it is closed."""
    chance = random.Random(seed)
    sizes = [chance.lognormvariate(1.0, 1.5) for _ in range(min(guilds, UNLIKE))]
    await module.setup(pretend_spy(module, folder))
    history, week, last = module.history, module.WEEK, FIRST_HOUR + days * DAY
    current = (last - 1) // week * week
    for first in range(FIRST_HOUR, current, week):
        module.now = lambda first=first: first * 3600.0
        await history.flush()
        await history.keeper.run(put_week, module, first, sizes, guilds, chance)
        await history.keeper.step()
    spent, largest = 0.0, 0
    for hour in range(current, last):
        module.now = lambda hour=hour: hour * 3600.0
        alike = list(make_hour(hour, sizes, chance))
        rows = [row for start in range(0, guilds, UNLIKE) for row in moved(alike, start)]
        started = time.perf_counter()
        await history.keeper.run(history._store.take, rows, hour, module.Settings())
        await history.keeper.step()
        spent += time.perf_counter() - started
    largest = size_of(folder)
    await module.teardown(None)
    return spent / (last - current), largest


def put_week(
    module: Any, first: int, sizes: list[float], guilds: int, chance: random.Random
) -> None:
    """As the store has it once the week is over."""
    hours: dict[int, dict[int, Any]] = {}
    for hour in range(first, first + module.WEEK):
        for _, guild, _, *counts, _ in make_hour(hour, sizes, chance):
            hours.setdefault(guild, {})[hour] = module.Counts(*counts)
    packed = [[first, guild, 0, 0, 0, 0, 0, 0, module.pack(first, h)] for guild, h in hours.items()]
    with module.transaction(module.history._store.rows.db):
        for start in range(0, guilds, UNLIKE):
            for row in moved(packed, start):
                module.history._store.rows.put(row)


def moved(rows: list[list[Any]], start: int) -> Iterator[list[Any]]:
    """The same for other guilds."""
    return ([hour, guild + start, *counts] for hour, guild, *counts in rows)


Waits = list[float]


async def subscribe(
    module: Any, folder: Path, guilds: int, seed: int
) -> tuple[float, Waits, Waits]:
    """Seconds until the file is loaded, and for each of 1,000 subscribers those it waits and those of CPU.

    On a busy machine the two differ by what other processes took.
    """
    started = time.perf_counter()
    await module.setup(pretend_spy(module, folder))
    await module.history.keeper.started()
    loaded = time.perf_counter() - started
    chance, waits, cpu = random.Random(seed), [], []
    for _ in range(1_000):
        guild = FIRST_GUILD + chance.randrange(guilds)
        started, burnt = time.perf_counter(), time.process_time()
        update = await module.newest(str(guild), None)
        msgspec.json.encode(msgspec.to_builtins(update))
        waits.append(time.perf_counter() - started)
        cpu.append(time.process_time() - burnt)
    await module.teardown(None)
    return loaded, waits, cpu


async def run(guilds: int, days: int, seed: int, folder: Path) -> None:
    module: Any = load_module("history", ROOT / "plugins" / "history.py")
    hour, largest = await fill(module, folder, guilds, days, seed)
    loaded, waits, cpu = await subscribe(module, folder, guilds, seed)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    percentiles = statistics.quantiles(waits, n=100)
    print(f"{guilds:,} guilds, {days} days")
    for name, value, asked in [
        ("file, at the end", f"{size_of(folder) / 1e6:,.0f} MB", "400 MB or less"),
        ("  before that, with its log", f"{largest / 1e6:,.0f} MB", "400 MB or less"),
        ("a subscriber's answer, median", f"{percentiles[49] * 1000:,.1f} ms", "20 ms or less"),
        ("  p99", f"{percentiles[98] * 1000:,.1f} ms", "20 ms or less"),
        ("  p99 of CPU", f"{statistics.quantiles(cpu, n=100)[98] * 1000:,.1f} ms", "20 ms or less"),
        ("an hour of all guilds, kept", f"{hour * 1000:,.0f} ms", ""),
        ("loaded after a restart within", f"{loaded:,.1f} s", ""),
        ("resident memory at most", f"{memory / 1e3:,.0f} MB", ""),
    ]:
        print(f"  {name:40} {value:>12}   {asked}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="500 guilds, 60 days")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    guilds, days = (500, 60) if options.small else (10_000, 400)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(guilds, days, options.seed, Path(folder)))


if __name__ == "__main__":
    main()
