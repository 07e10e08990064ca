"""SpyWatcher, with a look every few milliseconds at how late its loop is.

    python watched_server.py --config FILE

At its end `late.json` beside FILE has `[when, seconds late]` of each look, by the monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import spywatcher

EVERY = 0.005


async def watch(looks: list[tuple[float, float]]) -> None:
    while True:
        due = time.monotonic() + EVERY
        await asyncio.sleep(EVERY)
        looks.append((due, time.monotonic() - due))


async def serve(config: Path) -> None:
    settings = spywatcher.read_settings(config)
    keys, token = spywatcher.credentials_of(settings)
    stopped, looks = asyncio.Event(), []
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    make_node = spywatcher.node_type(settings)
    async with spywatcher.Server(settings, keys=keys, token=token, make_node=make_node) as server:
        print(f"listening on http://127.0.0.1:{server.port}", flush=True)
        watching = asyncio.create_task(watch(looks))
        await stopped.wait()
        watching.cancel()
        (config.parent / "late.json").write_text(json.dumps(looks))


if __name__ == "__main__":
    spywatcher.run_until_stopped(serve(Path(sys.argv[-1])))
