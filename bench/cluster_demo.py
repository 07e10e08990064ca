"""Three nodes, a Redis and the pretend Discord on loopback; Ctrl+C ends them all.

python bench/cluster_demo.py
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from redisserver import RedisServer  # noqa: E402
from service import running, tables_for, viewer_token, write_settings  # noqa: E402

import simulator  # noqa: E402


async def main() -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = await stack.enter_async_context(RedisServer(folder))
        discord = await stack.enter_async_context(simulator.PretendDiscord())
        playing = asyncio.create_task(simulator.play(simulator.lively_guilds(discord)))
        stack.callback(playing.cancel)
        for number in range(3):
            home = folder / f"node{number}"
            home.mkdir()
            write_settings(home, tables_for(discord, redis={"url": redis.url}))
            node = await stack.enter_async_context(running(home))
            print(f"node {number}: {node.url}, process {node.process.pid}")
        print(f"Redis: {redis.url}\ntoken of an admin, good for 15 minutes:\n\n{viewer_token()}\n")
        print("Kill or stop any of them and watch /health/ready of the others. Ctrl+C ends all.")
        await playing


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
