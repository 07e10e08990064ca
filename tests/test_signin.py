"""Sign in with Discord: who comes in, as whom, and for how long."""

from __future__ import annotations

import asyncio
import re
import resource
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import tornado.web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jsclient import JavaScript
from redisserver import RedisServer
from service import SECRET, fetch, run, server_of, write_settings
from signing import Browser, picture_of, signing_in, signing_tables
from waiting import eventually, within

from simulator import Guild, Member, Permission, PretendDiscord
from spywatcher import Keys, Metrics, OperatorError, PluginLoader, parse_settings, read_settings

LISTED = "https://board.example"


@pytest.fixture
def ada(guild: Guild) -> Member:
    return guild.add_member("ada")


# ---- the way in ------------------------------------------------------------


async def test_who_signs_in_gets_a_token_of_their_own(discord: PretendDiscord, ada: Member) -> None:
    async with signing_in(discord) as (server, browser):
        back = await browser.sign_in(ada.id, "/#wall")
        assert (back.status, back.location) == (302, "/#wall")
        answer = await browser.token()
        assert answer.status == 200
        assert answer.json["user"] == {"id": str(ada.id), "username": "ada", "avatar": None}
        viewer = server.tokens.verify(answer.json["token"])
        assert (viewer.discord_id, viewer.role, viewer.guilds) == (str(ada.id), "USER", None)


async def test_discord_is_asked_for_no_more_than_who_it_is(
    discord: PretendDiscord, ada: Member
) -> None:
    async with signing_in(discord) as (_, browser):
        begun = await browser.begin()
        assert begun.status == 302
        assert begun.location.startswith(f"http://127.0.0.1:{discord.port}/oauth2/authorize?")
        assert begun.query["scope"] == "identify"
        assert begun.query["response_type"] == "code"
        assert begun.query["redirect_uri"] == f"{browser.url}/signin/callback"


async def test_discords_token_is_handed_back_at_once(discord: PretendDiscord, ada: Member) -> None:
    async with signing_in(discord) as (_, browser):
        await browser.sign_in(ada.id)
        assert len(discord.oauth2.revoked) == 1
        assert not discord.oauth2.tokens


async def test_the_picture_is_an_address_at_discord(discord: PretendDiscord, ada: Member) -> None:
    async def answer(handler: tornado.web.RequestHandler) -> None:
        handler.finish(me(ada) | {"avatar": "a_" + "0" * 32})

    discord.oauth2.instead["me"] = answer
    async with signing_in(discord) as (_, browser):
        await browser.sign_in(ada.id)
        user = (await browser.token()).json["user"]
        assert user["avatar"].startswith(f"https://cdn.discordapp.com/avatars/{ada.id}/a_0")


async def test_this_server_hands_on_the_picture_of_who_is_signed_in(
    discord: PretendDiscord, ada: Member
) -> None:
    ada.user.avatar = "c0ffee" + "0" * 26
    cdn = {"cdn_url": f"http://127.0.0.1:{discord.port}"}
    async with signing_in(discord, signin=cdn) as (_, browser):
        assert (await picture_of(browser)).code == 404
        await browser.sign_in(ada.id)
        picture = await picture_of(browser)
        assert bytes.fromhex("c0ffee") in picture.body
        assert picture.headers["Content-Type"] == "image/gif"
        assert picture.headers["Cache-Control"] == "private, max-age=3600"
        assert picture.headers["X-Content-Type-Options"] == "nosniff"
        await browser.post("/signout")
        assert (await picture_of(browser)).code == 404


def me(member: Member) -> dict[str, object]:
    return member.user.to_json() | {"mfa_enabled": False, "flags": 0}


async def test_the_token_says_when_it_ends(discord: PretendDiscord, ada: Member) -> None:
    async with signing_in(discord, signin={"token_ttl": 120.0}) as (server, browser):
        await browser.sign_in(ada.id)
        asked = time.time()
        answer = (await browser.token()).json
        expires = server.tokens.verify(answer["token"]).expires
        assert asked + 119 <= expires <= time.time() + 121
        ended = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(expires))
        assert answer["expiresAt"] == ended


async def test_the_token_connects_a_dashboard_that_sees_what_its_owner_may(
    discord: PretendDiscord, guild: Guild, ada: Member, js: JavaScript
) -> None:
    """The owner of the guild may look, a plain member may not."""
    async with signing_in(discord) as (server, browser):
        seen = []
        for who in (guild.owner, ada):
            await browser.sign_in(who.id)
            token = (await browser.token()).json["token"]
            dashboard = await js.connect(f"http://127.0.0.1:{server.port}", token=token)
            guilds = (await dashboard.call("guilds:list"))["guilds"]
            seen.append([found["name"] for found in guilds])
        assert seen == [[guild.name], []]


async def test_who_loses_the_role_while_looking_is_shown_out(
    discord: PretendDiscord, guild: Guild, js: JavaScript
) -> None:
    staff = guild.add_role("Staff", Permission.MANAGE_GUILD)
    mod = guild.add_member("mod", roles=[staff])
    async with signing_in(discord) as (server, browser):
        await browser.sign_in(mod.id)
        token = (await browser.token()).json["token"]
        dashboard = await js.connect(f"http://127.0.0.1:{server.port}", token=token)
        assert (await dashboard.call("subscribe:guild", str(guild.id)))["ok"]
        await discord.remove_role(guild, mod, staff)
        assert (await dashboard.next("error"))["code"] == "forbidden"


async def test_nothing_is_served_without_a_client_id(discord: PretendDiscord) -> None:
    async with server_of(discord, signing_tables(discord, signin={"client_id": ""})) as server:
        for path in ("/signin", "/signin/callback"):
            assert (await fetch(server.port, path)).code == 404
        for path in ("/signin/token", "/signout"):
            assert (await fetch(server.port, path, method="POST", body="")).code == 404


# ---- roles -----------------------------------------------------------------


async def test_an_admin_gets_the_role_admin(discord: PretendDiscord, ada: Member) -> None:
    async with signing_in(discord, signin={"admins": [str(ada.id)]}) as (server, browser):
        await browser.sign_in(ada.id)
        assert server.tokens.verify((await browser.token()).json["token"]).role == "ADMIN"


async def test_the_banned_are_told_so_and_get_no_session(
    discord: PretendDiscord, ada: Member
) -> None:
    settings = {"banned": [str(ada.id)], "admins": [str(ada.id)]}
    async with signing_in(discord, signin=settings) as (_, browser):
        refused = await browser.sign_in(ada.id)
        assert refused.status == 403
        assert "banned" in refused.text
        assert browser.cookie("spywatcher_session") is None
        assert (await browser.token()).status == 401


async def test_who_is_banned_while_signed_in_gets_no_further_token(
    discord: PretendDiscord, ada: Member, tmp_path: Path
) -> None:
    tables = signing_tables(discord)
    async with server_of(discord, tables) as server, Browser(public_url(tables)) as browser:
        await browser.sign_in(ada.id)
        tables["plugin"]["signin"]["banned"] = [str(ada.id)]
        server.reload(parse_settings(tables, tmp_path), Keys((SECRET,)))
        refused = await browser.token()
        assert (refused.status, refused.json["code"]) == (403, "banned")


def public_url(tables: dict[str, dict[str, object]]) -> str:
    return str(tables["plugin"]["signin"]["public_url"])  # type: ignore[index]  # a table


# ---- cookies and headers ---------------------------------------------------


@pytest.mark.parametrize(("scheme", "secure"), [("http", False), ("https", True)])
async def test_cookies_are_for_this_server_alone(
    discord: PretendDiscord, ada: Member, scheme: str, secure: bool
) -> None:
    url = {"http": "http://localhost:3001", "https": "https://watch.example"}[scheme]
    discord.oauth2.redirect_uris.add(f"{url}/signin/callback")
    tables = signing_tables(discord, signin={"public_url": url})
    local = f"http://127.0.0.1:{tables['server']['port']}"
    async with server_of(discord, tables), Browser(local) as browser:
        begun = await browser.begin()
        chosen = await browser.choose(begun, ada.id)
        state = begun.cookie("spywatcher_signin")
        way_back = chosen.location.replace(url, local)
        back = await browser.get(way_back, headers={"Cookie": state.partition(";")[0]})
        for cookie in (state, back.cookie("spywatcher_session")):
            assert "; HttpOnly" in cookie
            assert "; SameSite=Lax" in cookie
            assert "Domain" not in cookie
            assert ("; Secure" in cookie) is secure


@pytest.mark.parametrize(
    "path", ["/signin", "/signin/callback", "/signin/avatar", "/signin/token", "/signout"]
)
async def test_nothing_may_be_framed_or_kept(discord: PretendDiscord, path: str) -> None:
    async with signing_in(discord) as (_, browser):
        for ask in (browser.get, browser.post):
            headers = (await ask(path)).headers
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Frame-Options"] == "DENY"
            assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
            assert headers["Referrer-Policy"] == "no-referrer"
            assert "Server" not in headers


# ---- pages of other origins ------------------------------------------------


async def test_a_listed_page_signs_people_in(discord: PretendDiscord, ada: Member) -> None:
    server_table = {"cors_origins": [LISTED, "https://*.below.example"]}
    async with signing_in(discord, server=server_table) as (_, browser):
        for page in (f"{LISTED}/view?x=1#y", "https://a.below.example"):
            assert (await browser.sign_in(ada.id, page)).location == page
            origin = page.partition("/view")[0]
            answer = await browser.token(headers={"Origin": origin})
            assert answer.status == 200
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert answer.headers["Access-Control-Allow-Credentials"] == "true"
            assert answer.headers["Vary"] == "Origin"


async def test_a_listed_page_can_read_that_nobody_is_signed_in(discord: PretendDiscord) -> None:
    async with signing_in(discord, server={"cors_origins": [LISTED]}) as (_, browser):
        answer = await browser.token(headers={"Origin": LISTED})
        assert (answer.status, answer.json["code"]) == (401, "signed_out")
        assert answer.headers["Access-Control-Allow-Origin"] == LISTED


async def test_a_preflight_of_a_listed_page_is_answered(discord: PretendDiscord) -> None:
    headers = {
        "Origin": LISTED,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    async with signing_in(discord, server={"cors_origins": [LISTED]}) as (_, browser):
        answer = await browser._ask("OPTIONS", "/signin/token", headers=headers)
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Methods"] == "POST"
        assert answer.headers["Access-Control-Allow-Headers"] == "content-type"


# ---- the end of a session --------------------------------------------------


async def test_signing_out_ends_this_session_and_no_other(
    discord: PretendDiscord, ada: Member
) -> None:
    async with signing_in(discord) as (_, browser), Browser(browser.url) as phone:
        await browser.sign_in(ada.id)
        await phone.sign_in(ada.id)
        assert (await browser.post("/signout")).status == 204
        assert browser.cookie("spywatcher_session") is None
        assert (await browser.token()).status == 401
        assert (await phone.token()).status == 200


async def test_signing_out_twice_is_harmless(discord: PretendDiscord) -> None:
    async with signing_in(discord) as (_, browser):
        assert [(await browser.post("/signout")).status for _ in range(2)] == [204, 204]


async def test_a_session_outlives_a_restart_and_its_end_does_too(
    discord: PretendDiscord, ada: Member
) -> None:
    tables = signing_tables(discord)
    async with Browser(public_url(tables)) as browser, Browser(browser.url) as thief:
        async with server_of(discord, tables):
            await discord.wait_for_bot()
            await browser.sign_in(ada.id)
        async with server_of(discord, tables):
            await discord.wait_for_bot()
            assert (await browser.token()).status == 200
            thief.keep("spywatcher_session", str(browser.cookie("spywatcher_session")))
            await browser.post("/signout")
            assert (await thief.token()).status == 401
        async with server_of(discord, tables):
            assert (await thief.token()).status == 401


async def test_what_is_remembered_goes_when_the_session_would_have_ended(
    discord: PretendDiscord, ada: Member
) -> None:
    async with signing_in(discord) as (server, _):
        signin = server.plugins.plugins["signin"].module
        marks = signin.FileMarks(server.plugins.runners["signin"].spy.data_dir / "marks.db")
        assert await marks.put("short", 0.05)
        assert await marks.put("long", 60)
        assert not await marks.put("long", 60)
        await eventually(lambda: gone(marks))
        assert await marks.has("long")


async def gone(marks: object) -> bool:
    return not await marks.has("short")  # type: ignore[attr-defined]  # of a module loaded by path


@pytest.mark.logs(r"WARNING spywatcher.plugin.signin: it cannot be told who")
async def test_nobody_gets_in_while_nobody_knows_who_is_out(
    discord: PretendDiscord, ada: Member, tmp_path: Path
) -> None:
    async with signing_in(discord) as (_, browser):
        await browser.sign_in(ada.id)
        (tmp_path / "signin.db").write_bytes(b"no database" * 100)
        assert (await browser.token()).status == 503
        assert (await browser.post("/signout")).status == 503
        assert (await browser.sign_in(ada.id)).status == 503


# ---- limits ----------------------------------------------------------------


async def test_too_many_starts_of_one_address_wait_a_minute(discord: PretendDiscord) -> None:
    async with signing_in(discord) as (_, browser):
        statuses = [(await browser.begin()).status for _ in range(31)]
        assert statuses == [302] * 30 + [429]
        elsewhere = await browser.get("/signin", headers={"X-Forwarded-For": "203.0.113.9"})
        assert elsewhere.status == 302


async def test_ten_thousand_sign_ins_that_nobody_finishes_cost_little(
    discord: PretendDiscord,
) -> None:
    async with signing_in(discord) as (server, _):
        await begin_from(server.port, range(500))
        before = memory()
        await begin_from(server.port, range(500, 10_500))
        assert memory() - before < 20e6


async def begin_from(port: int, numbers: range) -> None:
    """A sign-in begun by each of as many addresses, without the cost of a client."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in numbers:
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        head = f"GET /signin HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {address}\r\n\r\n"
        writer.write(head.encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 302 ")
    writer.close()
    await writer.wait_closed()


def memory() -> int:
    """Bytes that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_two_hundred_sign_in_at_once(discord: PretendDiscord, guild: Guild) -> None:
    people = [guild.add_member(f"m{number}") for number in range(200)]
    async with signing_in(discord) as (_, browser), AsyncExitStack() as stack:
        browsers = [await stack.enter_async_context(Browser(browser.url)) for _ in people]

        async def sign_in(number: int) -> str:
            headers = {"X-Forwarded-For": f"10.1.0.{number}"}
            begun = await browsers[number].get("/signin", headers=headers)
            chosen = await browsers[number].choose(begun, people[number].id)
            assert (await browsers[number].get(chosen.location)).status == 302
            return str((await browsers[number].token()).json["user"]["id"])

        async with within(60):
            ids = await asyncio.gather(*map(sign_in, range(len(people))))
        assert ids == [str(member.id) for member in people]
        assert len(discord.oauth2.revoked) == len(people)


# ---- several nodes ---------------------------------------------------------


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with RedisServer(tmp_path / "redis") as redis:
        yield redis


async def test_a_second_node_takes_the_first_ones_sessions(
    discord: PretendDiscord, ada: Member, redis: RedisServer
) -> None:
    """A sign-in begins on one and ends on the other; who signs out on one is out on both."""
    tables = signing_tables(discord, redis={"url": redis.url})
    second = tables | {"server": tables["server"] | {"port": 0}}
    async with (
        server_of(discord, tables),
        server_of(discord, second) as other,
        Browser(public_url(tables)) as browser,
    ):
        there = f"http://127.0.0.1:{other.port}"
        begun = await browser.get(f"{there}/signin")
        chosen = await browser.choose(begun, ada.id)
        assert (await browser.get(chosen.location)).status == 302
        assert [(await browser.post(f"{u}/signin/token")).status for u in (browser.url, there)] == [
            200,
            200,
        ]
        copy = {"Cookie": f'spywatcher_session="{browser.cookie("spywatcher_session")}"'}
        await browser.post(f"{there}/signout")
        for url in (browser.url, there):
            assert (await browser.post(f"{url}/signin/token", headers=copy)).status == 401


@pytest.mark.logs("no connection to Redis", "it cannot be told who", required=False)
async def test_while_redis_is_away_nobody_gets_a_token_and_afterwards_all_do(
    discord: PretendDiscord, ada: Member, redis: RedisServer
) -> None:
    async with signing_in(discord, redis={"url": redis.url}) as (_, browser):
        await browser.sign_in(ada.id)
        await redis.kill()
        refused = await browser.token()
        assert (refused.status, refused.json["code"]) == (503, "storage")
        await redis.start()

        async def is_back() -> bool:
            return (await browser.token()).status == 200

        await eventually(is_back)


# ---- what check says -------------------------------------------------------

PORTAL = {"client_id": "123", "client_secret": "s", "public_url": "https://watch.example"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"client_secret": ""}, "plugin.signin.client_secret: not set"),
        ({"client_secret_file": "x"}, "plugin.signin.client_secret: set, and"),
        (
            {"client_secret": "", "client_secret_file": "x"},
            "client_secret_file: .*x cannot be read",
        ),
        ({"public_url": ""}, "plugin.signin.public_url: got '', expected the like of https://"),
        ({"public_url": "http://watch.example"}, "expected https"),
        ({"public_url": "https://watch.example/spy"}, "expected the like of"),
        ({"public_url": "https://me:pw@watch.example"}, "expected the like of"),
        ({"public_url": "https://watch.example:99999"}, "expected the like of"),
        ({"public_url": "watch.example"}, "expected the like of"),
        ({"client_id": "my bot"}, "plugin.signin.client_id: got"),
        ({"client_secret": 5}, "plugin.signin.client_secret: got a value not shown here"),
        ({"admins": ["ada"]}, "plugin.signin.admins"),
    ],
)
def test_what_cannot_work_is_named(tmp_path: Path, wrong: dict[str, object], said: str) -> None:
    faults = faults_of(tmp_path, PORTAL | wrong)
    assert any(re.search(said, fault) for fault in faults), faults


def faults_of(folder: Path, table: dict[str, object]) -> list[str]:
    """What `check` and `serve` say of this `[plugin.signin]`, in a folder of its own."""
    settings = read_settings(write_settings(folder, signin_only(table)))
    loader = PluginLoader(settings.plugins, settings.plugin, settings.folder, Metrics())
    try:
        loader.load_all()
    except OperatorError as error:
        return list(error.faults)
    return []


def signin_only(table: dict[str, object], **auth: object) -> dict[str, dict[str, object]]:
    auth = auth or {"secret": "x" * 32}
    return {"auth": auth, "discord": {"token": "MTIz.a.b"}, "plugin.signin": table}


@pytest.mark.parametrize(
    "url", ["https://Watch.Example:443/", "http://localhost:3001", "http://[::1]"]
)
def test_what_can_work_is_taken(tmp_path: Path, url: str) -> None:
    (tmp_path / "client").write_bytes(b"\xef\xbb\xbfs3cret\n")
    more = {"public_url": url, "client_secret": "", "client_secret_file": "client"}
    assert faults_of(tmp_path, PORTAL | more) == []


async def test_check_shows_no_secret(tmp_path: Path) -> None:
    write_settings(tmp_path, signin_only(PORTAL | {"client_secret": "s3cret"}))
    status, out, log = await run(tmp_path, "check", "--settings")
    assert status == 0, log
    assert "plugin.signin.client_secret = (set, not shown)" in out
    assert "s3cret" not in "\n".join([*out, *log])


async def test_check_says_that_a_public_key_signs_nothing(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pem").write_bytes(key.public_bytes(*form))
    auth = {"algorithms": ["ES256"], "public_key_file": "key.pem"}
    write_settings(tmp_path, signin_only(PORTAL, **auth))
    status, _, log = await run(tmp_path, "check")
    assert status == 2
    assert any("plugin.signin: needs [auth] secret" in line for line in log)
