"""The pictures of the page in docs/, taken of the demo: `make pictures`.

    python tests/pictures.py [--minutes 15] [--plugins FOLDER]

It takes so long because the live charts show the last 15 minutes. Debian's `fonts-inter` gives the
letters that the pictures have had so far.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from browser import Browser, running_chromium
from playwright.async_api import Page, async_playwright

ROOT = Path(__file__).parent.parent
LAPTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 840}, "device_scale_factor": 1.5}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 840}, "device_scale_factor": 2}
#: Name of the file, view, and how it is looked at.
PICTURES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("page-light.png", "now", {**LAPTOP, "color_scheme": "light"}),
    ("page-dark.png", "now", {**LAPTOP, "color_scheme": "dark"}),
    ("page-time.png", "time", {**LAPTOP, "color_scheme": "light"}),
    ("page-phone.png", "now", {**PHONE, "color_scheme": "light"}),
)
GUILD = "Night Owls 🦉"
#: In one of them it is evening now, as it is in the pretend guild.
ZONES = ("Pacific/Auckland", "Asia/Tokyo", "Asia/Kolkata", "Europe/Berlin", "America/New_York")


def evening_zone() -> str:
    return min(ZONES, key=lambda zone: abs(datetime.now(ZoneInfo(zone)).hour - 20))


@asynccontextmanager
async def demo(*arguments: str) -> AsyncIterator[str]:
    """Run the demo; yields the address that signs in."""
    command = (sys.executable, str(ROOT / "spywatcher.py"), "demo", "--port", "0", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    output = ""
    while (found := re.search(r"http://\S+#token=\S+", output)) is None:
        output += (await process.stdout.readline()).decode()
    reading = asyncio.create_task(process.stdout.read())  # else its pipe fills up
    try:
        yield found[0]
    finally:
        process.terminate()
        await process.wait()
        await reading


async def look(browser: Browser, url: str, view: str, options: dict[str, Any]) -> Page:
    options = {"timezone_id": evening_zone(), "locale": "en-GB", **options}
    page = await browser.open(url.replace("#", f"#{view}&"), **options)
    await page.locator("#guilds").select_option(label=GUILD)
    return page


async def take(minutes: float, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with demo(*arguments) as url, async_playwright() as playwright:
            with running_chromium(Path(folder)) as devtools:
                browser = Browser(await playwright.chromium.connect_over_cdp(devtools))
                pages = [(name, await look(browser, url, *how)) for name, *how in PICTURES]
                await asyncio.sleep(minutes * 60)
                for name, page in pages:
                    await page.bring_to_front()
                    await asyncio.sleep(2)  # a page behind others is painted seldom
                    await page.screenshot(path=ROOT / "docs" / name)
                await browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="of life in the live charts")
    parser.add_argument("--plugins", help="a folder of plugins for the demo")
    options = parser.parse_args()
    asyncio.run(take(options.minutes, *(("--plugins", options.plugins) if options.plugins else ())))


if __name__ == "__main__":
    main()
