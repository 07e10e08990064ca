"""What the server gives a browser that asks for the page: which files, and how it may treat them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from browser import PAGE, need_built_page
from jsclient import node
from service import ROOT, fetch
from watching import Watch, Watching

FILES = [*(PAGE / "static").iterdir(), *(PAGE / "vendor").glob("*.*s")]


async def test_the_page_may_load_nothing_from_elsewhere(spy: Watch) -> None:
    need_built_page()
    answer = await fetch(spy.server.port, "/")
    assert answer.code == 200
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= set(policy)
    assert {"connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_files_come_with_their_types_and_a_head_like_a_get(spy: Watch) -> None:
    types = {"main.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
    for name, media_type in types.items():
        got = await fetch(spy.server.port, f"/dashboard/{name}")
        head = await fetch(spy.server.port, f"/dashboard/{name}", method="HEAD")
        assert got.headers["Content-Type"].split(";")[0] == media_type
        assert head.code == 200
        assert head.body == b""
        assert head.headers["Content-Length"] == str(len(got.body))


async def test_a_file_that_the_browser_has_is_not_sent_again(spy: Watch) -> None:
    first = await fetch(spy.server.port, "/dashboard/main.js")
    assert first.headers["Cache-Control"] == "no-cache"
    headers = {"If-None-Match": first.headers["ETag"]}
    again = await fetch(spy.server.port, "/dashboard/main.js", headers=headers)
    assert (again.code, again.body) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..", "__init__.py", "package.json", ".fetched"])
async def test_only_the_files_of_the_page_are_served(spy: Watch, name: str) -> None:
    assert (await fetch(spy.server.port, f"/dashboard/{name}")).code == 404


async def test_without_what_npm_fetches_the_server_says_in_a_line_that_the_page_is_not_built(
    watching: Watching, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    copy = tmp_path / "plugins" / "dashboard"
    shutil.copytree(PAGE, copy, ignore=shutil.ignore_patterns("vendor"))
    async with watching(plugins={"folders": [str(copy.parent), "plugins"]}) as spy:
        answer = await fetch(spy.server.port, "/")
        assert answer.code == 503
        assert b"make dashboard" in answer.body
    assert "the page at / is not built: `make dashboard`" in caplog.text


def test_all_that_the_page_loads_is_less_than_200_kb() -> None:
    need_built_page()
    sizes = {path.name: path.stat().st_size for path in FILES}
    assert len(sizes) > 15
    assert sum(sizes.values()) < 200_000, sizes


def test_scripts_are_free_of_errors_of_syntax() -> None:
    parse = """
        for (const identifier of process.argv.slice(1))
            new vm.SourceTextModule(fs.readFileSync(identifier, "utf8"), { identifier });
    """
    scripts = sorted((PAGE / "static").glob("*.js"))
    command = [node(), "--experimental-vm-modules", "--eval", parse, *scripts]
    parsed = subprocess.run(command, capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Kolkata", "Pacific/Chatham"])
def test_the_page_counts_right_in_each_time_zone(zone: str) -> None:
    command = [node(), ROOT / "tests" / "page" / "counts.test.mjs"]
    environment = {**os.environ, "TZ": zone}
    counted = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert counted.returncode == 0, counted.stdout
