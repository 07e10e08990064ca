"""Each HTTP method on each path with each header that plays a trick: one right answer for each."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
from waiting import PATIENCE, within

from spywatcher import Pulse

SOCKET = "/socket.io/?EIO=4&transport=polling"
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW")
#: What a method that is known there is answered with; of all others it is 405.
PATHS: dict[str, dict[str, int]] = {
    SOCKET: {"GET": 200, "POST": 400, "OPTIONS": 204},
    "/socket.io/?EIO=3&transport=polling": {"GET": 400, "POST": 400, "OPTIONS": 204},
    "/socket.io/?EIO=4&transport=websocket": {"GET": 400, "POST": 400, "OPTIONS": 204},
    "/socket.io/?EIO=4&transport=polling&sid=none": {"GET": 400, "POST": 400, "OPTIONS": 204},
    "/socket.io/": {"GET": 400, "POST": 400, "OPTIONS": 204},
    "/health/live": {"GET": 200, "HEAD": 200},
    "/health/ready": {"GET": 200, "HEAD": 200},
    "/metrics": {"GET": 200, "HEAD": 200},
}
NOWHERE = ("/socket.io", "/socket.io/x", "//", "/../../etc/passwd", "/%00", "/health/", "*")
HEADERS: dict[str, str] = {
    "none": "",
    "a cookie": "Cookie: a=b; _xsrf=c\r\n",
    "another method": "X-HTTP-Method-Override: GET\r\n",
    "another path": "X-Original-URL: /metrics\r\nX-Rewrite-URL: /metrics\r\n",
    "an upgrade to nothing": "Upgrade: h2c\r\nConnection: Upgrade\r\n",
    "an expectation": "Expect: 100-continue\r\n",
    "a range": "Range: bytes=0-0\r\n",
    "a cache": "If-None-Match: *\r\nIf-Modified-Since: Mon, 01 Jan 2035 00:00:00 GMT\r\n",
    "a name of a page": "Referer: https://evil.example/\r\n",
    "much to accept": f"Accept: {'*/*,' * 500}\r\n",
    "bytes beyond ASCII": "X-Name: \xff\xfe\r\n",
}
#: What makes a request none, or one of somebody who may not: the same on every path.
REFUSED: dict[str, tuple[str, int | None]] = {
    "two lengths": ("Content-Length: 1\r\nContent-Length: 2\r\n", 400),
    "a length and chunks": ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", 400),
    "no number": ("Content-Length: one\r\n", 400),
    "a length below 0": ("Content-Length: -1\r\n", 400),
    "too long a body": ("Content-Length: 99999999\r\n", 400),
    "a line too long": (f"X-Long: {'x' * 20_000}\r\n", None),
    "no colon": ("nothing\r\n", 400),
    "two hosts": ("Host: other\r\n", 400),
}


async def status_of(port: int, method: str, path: str, headers: str) -> int | None:
    """None where the connection was closed instead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    text = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{headers}\r\n"
    writer.write(text.encode("latin-1"))
    line = b"HTTP/1.1 100"
    while line.startswith((b"HTTP/1.1 100", b"\r\n")):
        async with within(PATIENCE):
            line = await reader.readline()
    writer.close()
    return int(line.split()[1]) if line else None


Rows = Iterable[tuple[str, str, tuple[str, str]]]


async def answers(spy: Any, rows: Rows) -> dict[str, int | None]:
    told = {}
    for method, path, (name, headers) in rows:
        key = f"{method} {path} with {name}"
        try:
            told[key] = await status_of(spy.server.port, method, path, headers)
        except TimeoutError:
            told[key] = 0
    return told


async def test_each_method_on_each_path_is_answered_the_same_whatever_headers_say(spy, monkeypatch):
    monkeypatch.setattr(Pulse, "TOO_LATE", math.inf)  # so many requests make a busy machine late
    told = await answers(spy, itertools.product(METHODS, PATHS, HEADERS.items()))
    right = {
        f"{method} {path} with {name}": PATHS[path].get(method, 405)
        for method, path, name in itertools.product(METHODS, PATHS, HEADERS)
    }
    for key, status in right.items():  # a proxy may have passed it on
        if "/metrics" in key and status == 200 and "X-" in HEADERS[key.partition(" with ")[2]]:
            right[key] = 403
    assert {key: status for key, status in told.items() if status != right[key]} == {}


async def test_what_is_served_nowhere_is_not_found_by_any_method(spy):
    told = await answers(spy, itertools.product(METHODS, NOWHERE, HEADERS.items()))
    unknown = ("BREW", "TRACE", "CONNECT")  # to Tornado, which asks no handler then
    right = {key: 405 if key.startswith(unknown) else 404 for key in told}
    assert {key: status for key, status in told.items() if status != right[key]} == {}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_request_that_is_none_is_refused_on_every_path(spy, name):
    headers, status = REFUSED[name]
    told = await answers(spy, itertools.product(("GET", "POST"), PATHS, [(name, headers)]))
    assert set(told.values()) == {status}
    assert await status_of(spy.server.port, "GET", "/health/live", "") == 200
