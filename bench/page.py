"""What the page at / costs the browser of who looks at it, in a headless Chromium.

    python bench/page.py [--rate 500] [--seconds 30] [--minutes 4]

How much it loads, when it is first painted, how long its longest task is while events come, and what
its memory does. A crowd (`crowd/messages.py`) takes the place of Discord; three of four events are
messages, one is a change of status of one of 500 members.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Browser, running_chromium  # noqa: E402  # of this checkout
from playwright.async_api import Page, async_playwright  # noqa: E402
from service import server_for  # noqa: E402

from simulator import PretendDiscord  # noqa: E402

WEIGHT = """performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
    .filter((entry) => !entry.name.includes("socket.io/")).reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""
PAINT = 'performance.getEntriesByName("first-contentful-paint")[0].startTime'


async def memory(page: Page) -> tuple[float, int]:
    """MB of JavaScript's heap after a collection, and how many DOM nodes there are."""
    devtools = await page.context.new_cdp_session(page)
    await devtools.send("HeapProfiler.collectGarbage")
    heap = await devtools.send("Runtime.getHeapUsage")
    nodes = await devtools.send("Memory.getDOMCounters")
    await devtools.detach()
    return heap["usedSize"] / 1e6, nodes["nodes"]


async def tasks(browser: Browser, page: Page, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of each task of the page's main thread, by the clock and of CPU.

    On a busy machine the two differ by what other processes took.
    """
    await browser.chromium.start_tracing(
        page=page, categories=["disabled-by-default-devtools.timeline"]
    )
    await asyncio.sleep(seconds)
    trace = json.loads(await browser.chromium.stop_tracing())["traceEvents"]
    main = {
        event["tid"] for event in trace if event.get("args", {}).get("name") == "CrRendererMain"
    }
    whole = [event for event in trace if event["name"] == "RunTask" and "tdur" in event]
    done = [event for event in whole if event["tid"] in main]
    return [event["dur"] / 1000 for event in done], [event["tdur"] / 1000 for event in done]


async def measure(browser: Browser, page: Page, options: argparse.Namespace) -> None:
    await page.locator("[data-state=live]").wait_for()
    print(f"loaded        {await page.evaluate(WEIGHT) / 1000:7.1f} KB  (wanted: under 200)")
    print(f"first paint   {await page.evaluate(PAINT):7.0f} ms  (wanted: under 1000)")
    await asyncio.sleep(5)  # the snapshot has been drawn, the stream is full
    wall, cpu = await tasks(browser, page, options.seconds)
    print(
        f"longest task  {max(cpu):7.0f} ms of CPU  (wanted: under 100), {max(wall):.0f} ms by the clock"
    )
    print(
        f"              in {options.seconds:g} s at {options.rate} events/s, {sum(cpu) / options.seconds / 10:.0f}% of a core"
    )
    for minute in range(options.minutes + 1):
        heap, nodes = await memory(page)
        print(f"minute {minute:3}    {heap:7.1f} MB  {nodes} DOM nodes", flush=True)
        await asyncio.sleep(60 if minute < options.minutes else 0)


async def run(options: argparse.Namespace) -> None:
    tables: dict[str, dict[str, Any]] = {
        "plugins": {
            "folders": [str(ROOT / "bench" / "crowd"), "plugins"],
            "disabled": ["presence"],
        },
        "plugin": {"messages": {"rate": options.rate}},
    }
    with tempfile.TemporaryDirectory() as folder:
        tables["storage"] = {"path": f"{folder}/spywatcher.db"}
        async with PretendDiscord() as discord:
            discord.add_guild()
            async with server_for(discord, **tables) as server, async_playwright() as playwright:
                await discord.wait_for_bot()
                token = server.tokens.issue("1", "ADMIN", ttl=86_400)  # longer than any run
                with running_chromium(Path(folder) / "chromium") as devtools:
                    browser = Browser(await playwright.chromium.connect_over_cdp(devtools))
                    page = await browser.open(f"http://127.0.0.1:{server.port}/#token={token}")
                    await measure(browser, page, options)
                    await browser.close()
                    print("\n".join(browser.unexpected()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=int, default=500, help="events a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="in which tasks are timed")
    parser.add_argument("--minutes", type=int, default=4, help="in which memory is looked at")
    parser.add_argument("--quick", action="store_true", help="a first look")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.minutes = 5.0, 0
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
