"""Which pages may connect: every kind of origin on both transports, answered before the 101."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest
from tornado.httpclient import AsyncHTTPClient
from waiting import PATIENCE, within

from spywatcher import OperatorError, Origins, parse_settings

LISTED = ["https://dash.example", "https://*.pages.example", "https://*.port.example:8443"]
ORIGINS = {
    "absent": (None, True),
    "null": ("null", False),
    "same": ("http://{address}", True),
    "same over TLS": ("https://{address}", True),
    "listed": ("https://dash.example", True),
    "listed, in capitals": ("HTTPS://Dash.Example", True),
    "listed, other scheme": ("http://dash.example", False),
    "listed, other port": ("https://dash.example:8443", False),
    "wildcard subdomain": ("https://a.pages.example", True),
    "wildcard sub-subdomain": ("https://a.b.pages.example", True),
    "wildcard with port": ("https://a.port.example:8443", True),
    "wildcard without its port": ("https://a.port.example", False),
    "the domain of the wildcard": ("https://pages.example", False),
    "a domain that ends like it": ("https://evilpages.example", False),
    "a domain that begins like it": ("https://a.pages.example.evil", False),
    "a listed one that goes on": ("https://dash.example.evil", False),
    "foreign": ("https://evil.example", False),
    "foreign, this port": ("http://evil.example:{port}", False),
    "no address at all": ("file://", False),
    "two": ("https://dash.example,https://evil.example", False),
    "empty": ("", False),
}
WEBSOCKET = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


async def status_of(spy, transport, origin):
    """What a request from this origin is answered with, read from the socket's first line."""
    headers = {"Host": spy.address} | (WEBSOCKET if transport == "websocket" else {})
    if origin is not None:
        headers["Origin"] = origin.format(address=spy.address, port=spy.server.port)
    lines = [f"GET /socket.io/?EIO=4&transport={transport} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    reader, writer = await asyncio.open_connection("127.0.0.1", spy.server.port)
    writer.write("\r\n".join([*lines, "", ""]).encode())
    async with within(PATIENCE):
        line = await reader.readline()
    writer.close()
    return int(line.split()[1])


@pytest.mark.parametrize("transport", ["websocket", "polling"])
async def test_every_origin_is_answered_before_a_connection_exists(watching, transport):
    async with watching(server={"cors_origins": LISTED}) as spy:
        for name, (origin, welcome) in ORIGINS.items():
            expected = {True: 101 if transport == "websocket" else 200, False: 403}[welcome]
            assert await status_of(spy, transport, origin) == expected, name
        assert spy.server.metrics.refused.labels("origin")._value.get() == sum(
            not welcome for _, welcome in ORIGINS.values()
        )


@pytest.mark.parametrize(
    ("listed", "origin"), [("null", "null"), ("*", "null"), ("*", "https://evil.example")]
)
@pytest.mark.parametrize("transport", ["websocket", "polling"])
async def test_null_and_any_have_to_be_listed(watching, transport, listed, origin):
    async with watching(server={"cors_origins": [listed]}) as spy:
        assert await status_of(spy, transport, origin) in (101, 200)


async def test_a_preflight_is_answered_for_listed_pages_only(watching):
    async with watching(server={"cors_origins": LISTED}) as spy:
        url = f"{spy.url}/socket.io/?EIO=4&transport=polling"
        for origin, code in (("https://dash.example", 204), ("https://evil.example", 403)):
            answer = await AsyncHTTPClient().fetch(
                url, method="OPTIONS", headers={"Origin": origin}, raise_error=False
            )
            allowed = answer.headers.get("Access-Control-Allow-Origin")
            assert (answer.code, allowed) == (code, origin if code == 204 else None)


async def test_a_listed_page_connects_with_the_stock_client(watching):
    async with watching(server={"cors_origins": LISTED}) as spy:
        for transport in ("websocket", "polling"):
            headers = {"Origin": "https://a.pages.example"}
            assert (await spy.connect(transports=[transport], extraHeaders=headers)).id
            foreign = {"Origin": "https://evil.example"}
            refused = await spy.js.refused(
                spy.url, token=spy.token(), transports=[transport], extraHeaders=foreign
            )
            assert refused.message in ("websocket error", "xhr poll error")


@pytest.mark.parametrize(
    "pattern", ["dash.example", "https://", "https://a/b", "https://a*.b", "https://*"]
)
def test_a_pattern_that_could_never_match_is_refused(pattern, tmp_path):
    with pytest.raises(OperatorError, match="cors_origins"):
        parse_settings({"server": {"cors_origins": [pattern]}}, tmp_path)


def test_what_is_allowed_does_not_depend_on_the_order_of_the_list():
    for patterns in itertools.permutations(LISTED):
        assert Origins(patterns).allow("https://x.pages.example", "host")
        assert not Origins(patterns).allow("https://pages.example", "host")


async def test_who_is_turned_away_is_named_with_the_setting_once(watching, caplog):
    caplog.set_level(logging.INFO, "spywatcher")
    async with watching() as spy:
        for _ in range(3):
            assert await status_of(spy, "websocket", "http://localhost:8080") == 403
    told = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(told) == 1
    assert "'http://localhost:8080'" in told[0]
    assert "[server] cors_origins" in told[0]


def test_a_host_may_be_listed_with_any_port():
    origins = Origins(["http://localhost:*", "http://[::1]:*"])
    for origin in (
        "http://localhost",
        "http://localhost:8080",
        "HTTP://LOCALHOST:1",
        "http://[::1]:3",
    ):
        assert origins.allow(origin, "host"), origin
    for origin in (
        "https://localhost:8080",
        "http://localhost:8080.evil.example",
        "http://localhost:",
        "http://localhost:x",
        "http://localhost.evil.example:80",
    ):
        assert not origins.allow(origin, "host"), origin
