"""A real browser for the tests of the page: headless Chromium, driven by Playwright.

One Chromium serves all tests of a file; each gets a context of its own, without cookies and storage of others::

    import browser as fixtures
    pytestmark = fixtures.IN_ONE_LOOP
    browser, chromium = fixtures.browser, fixtures.chromium
    discord, js = fixtures.discord, fixtures.js

    async def test_...(browser, spy):
        page = await browser.open(spy.url)
        await page.get_by_text("Live").wait_for()

Playwright's driver takes half a second to start and belongs to one event loop, so these tests and
what they use of the network share theirs.

What the page writes to its console as an error, or does not catch, fails the test at its end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import pytest_asyncio
from jsclient import JavaScript, Node
from playwright.async_api import Browser as Chromium
from playwright.async_api import BrowserContext, ConsoleMessage, Page, async_playwright, expect

from simulator import PretendDiscord

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "plugins" / "dashboard"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: The same engine without profiles, extensions and settings; a new visitor costs a third.
SHELL = "chromium-headless-shell"
SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # root in a container has no other way
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--test-third-party-cookie-phaseout",  # no page of ours may need cookies of others
)
LAPTOP = {"width": 1366, "height": 860}
DEADLINE_MS = 30_000
expect.set_options(timeout=DEADLINE_MS)


def skip(reason: str) -> NoReturn:
    """Skip the test, which CI must not do."""
    assert "CI" not in os.environ, f"CI tests the page, and {reason}"
    pytest.skip(reason)


def need_built_page() -> None:
    if not (PAGE / "vendor" / "socket.io.js").exists():
        skip("the page is not built here (make dashboard)")


def find_chromium(names: Iterable[str]) -> str:
    """The path of a browser."""
    found = next(filter(None, map(shutil.which, names)), None)
    return found or skip("there is no Chromium here (Debian: apt install chromium)")


@contextmanager
def running_chromium(folder: Path, names: Iterable[str] = BROWSERS) -> Iterator[str]:
    """Run a Chromium, the first of these names; yields the address of its DevTools."""
    process = subprocess.Popen(
        [find_chromium(names), *SWITCHES, f"--user-data-dir={folder}", "about:blank"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"LC_ALL": "en_US.UTF-8"},  # C is no language for JavaScript
        start_new_session=True,  # Debian's names are scripts; a signal has to reach what they run
    )
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        found = next(filter(None, (re.search(r"listening on (ws://\S+)", line) for line in lines)))
        yield found[1]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)


class Browser:
    """What one test uses of the browser."""

    def __init__(self, chromium: Chromium) -> None:
        self.chromium = chromium
        self._contexts: list[BrowserContext] = []
        self.faults: list[str] = []
        #: Console errors that the test means to cause. Those of each: no sign-in is set up here, a busy
        #: machine is late, which its health says, and the server of a test may end before the page.
        self.expected = [
            "404.*/signin/token",
            "503.*/health/ready",
            "ERR_CONNECTION",
            "WebSocket connection",
        ]

    async def open(self, url: str, *, fake_clock: bool = False, **context: Any) -> Page:
        """A new page as a new visitor has it, at `url`. With a fake clock time passes in it as ever,
        and `page.clock.fast_forward(ms)` skips what the page would wait for.
        """
        made = await self.chromium.new_context(**{"viewport": LAPTOP, **context})
        self._contexts.append(made)
        made.set_default_timeout(DEADLINE_MS)
        page = await made.new_page()
        if fake_clock:
            await page.clock.install()
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        await page.goto(url)
        return page

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.faults.append(f"{message.text} ({message.location.get('url')})")

    async def close(self) -> None:
        for context in self._contexts:
            await context.close()

    def unexpected(self) -> list[str]:
        return [
            fault
            for fault in self.faults
            if not any(re.search(pattern, fault) for pattern in self.expected)
        ]


# ---- fixtures --------------------------------------------------------------

IN_ONE_LOOP = pytest.mark.asyncio(loop_scope="session")


@asynccontextmanager
async def driven_chromium(folder: Path, names: Iterable[str]) -> AsyncIterator[Chromium]:
    need_built_page()
    with running_chromium(folder, names) as address:
        async with async_playwright() as playwright:
            yield await playwright.chromium.connect_over_cdp(address)


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chromium]:
    folder = tmp_path_factory.mktemp("chromium")
    async with driven_chromium(folder, [SHELL, *BROWSERS]) as chromium:
        yield chromium


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def whole_chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chromium]:
    """One that has the settings of people, such as which cookies are taken."""
    async with driven_chromium(tmp_path_factory.mktemp("chromium"), BROWSERS) as chromium:
        yield chromium


@pytest_asyncio.fixture(loop_scope="session")
async def browser(chromium: Chromium) -> AsyncIterator[Browser]:
    browser = Browser(chromium)
    yield browser
    await browser.close()
    assert browser.unexpected() == [], browser.unexpected()  # pytest rewrites no asserts here


@pytest_asyncio.fixture(loop_scope="session")
async def discord() -> AsyncIterator[PretendDiscord]:
    async with PretendDiscord() as discord:
        yield discord


@pytest_asyncio.fixture(loop_scope="session")
async def js(node: Node) -> AsyncIterator[JavaScript]:
    async with JavaScript(node) as js:
        yield js


# ---- faults of accessibility -----------------------------------------------


#: The rules of axe-core that a change between light and dark can break.
COLOURS = ["color-contrast", "link-in-text-block"]


async def axe_faults(page: Page) -> list[str]:
    """What axe-core holds to be a serious or critical fault of accessibility, each in a line.

    All its rules in the light, those of colours again in the dark.
    """
    if await page.evaluate("typeof axe") == "undefined":
        await page.evaluate((FOLDER / "node_modules/axe-core/axe.min.js").read_text("utf-8"))
    violations = await page.evaluate("axe.run().then((found) => found.violations)")
    await page.emulate_media(color_scheme="dark")
    violations += await page.evaluate(
        "(rules) => axe.run({ runOnly: rules }).then((found) => found.violations)", COLOURS
    )
    await page.emulate_media(color_scheme="light")
    return [
        f"{fault['id']}: {fault['help']} ({node['html'][:120]})"
        for fault in violations
        if fault["impact"] in {"serious", "critical"}
        for node in fault["nodes"][:3]
    ]
