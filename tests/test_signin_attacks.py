"""Sign in with Discord, as attackers and a Discord that fails would have it: each is refused.

An attack is a function of what it needs; it returns what the server answered at last.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
import tornado.web
from jsclient import JavaScript
from signing import Browser, Page, picture_of, signing_in
from tornado.web import create_signed_value
from waiting import within

from simulator import Guild, Member, PretendDiscord
from spywatcher import Server, Spy

LISTED = "https://board.example"


class Scene(NamedTuple):
    """A server that signs people in, ada's browser, and mallory's."""

    server: Server
    ada: Browser
    mallory: Browser
    ada_id: int
    mallory_id: int

    @property
    def spy(self) -> Spy:
        """What the plugin was handed."""
        return self.server.plugins.runners["signin"].spy

    def sign(self, name: str, value: str, *, age: float = 0.0, purpose: str = "") -> str:
        """A cookie's value as the plugin signs it."""
        key = self.spy.key(purpose or name)
        return create_signed_value(key, name, value, clock=lambda: time.time() - age).decode()

    async def back(self) -> Page:
        """Ada is on Discord's page and consents; the way back is still to go."""
        return await self.ada.choose(await self.ada.begin(), self.ada_id)


Attack = Callable[[Scene], Awaitable[Page]]
STATE = "spywatcher_signin"
SESSION = "spywatcher_session"


def changed(place: str, **query: str | None) -> str:
    """The address with other values in its query; None takes one out."""
    path, _, rest = place.partition("?")
    pairs = [pair for pair in rest.split("&") if pair.partition("=")[0] not in query]
    return f"{path}?" + "&".join([*pairs, *(f"{k}={v}" for k, v in query.items() if v is not None)])


# ---- the way back from Discord ---------------------------------------------


async def state_missing(scene: Scene) -> Page:
    return await scene.ada.get(changed((await scene.back()).location, state=None))


async def state_wrong(scene: Scene) -> Page:
    return await scene.ada.get(changed((await scene.back()).location, state="a" * 43))


async def state_empty(scene: Scene) -> Page:
    return await scene.ada.get(changed((await scene.back()).location, state=""))


async def state_not_ascii(scene: Scene) -> Page:
    return await scene.ada.get(changed((await scene.back()).location, state="%C3%A9"))


async def state_no_text(scene: Scene) -> Page:
    return await scene.ada.get(changed((await scene.back()).location, state="%FF%00"))


async def state_twice(scene: Scene) -> Page:
    return await scene.ada.get((await scene.back()).location + "&state=" + "a" * 43)


async def state_of_another_browser(scene: Scene) -> Page:
    """Mallory's way back, pressed on ada: she would be signed in as mallory."""
    await scene.ada.begin()
    pressed = await scene.mallory.choose(await scene.mallory.begin(), scene.mallory_id)
    return await scene.ada.get(pressed.location)


async def no_cookie(scene: Scene) -> Page:
    return await scene.mallory.get((await scene.back()).location)


async def state_reused(scene: Scene) -> Page:
    """The cookie was kept, and Discord gives a second code for the same question."""
    begun = await scene.ada.begin()
    kept = str(scene.ada.cookie(STATE))
    await scene.ada.get((await scene.ada.choose(begun, scene.ada_id)).location)
    scene.ada.keep(STATE, kept)
    return await scene.ada.get((await scene.ada.choose(begun, scene.ada_id)).location)


async def way_back_gone_twice(scene: Scene) -> Page:
    place = (await scene.back()).location
    await scene.ada.get(place)
    return await scene.ada.get(place)


async def cookie_of_state_tampered(scene: Scene) -> Page:
    """Another `next` in it."""
    place = (await scene.back()).location
    forged = scene.sign(STATE, json.dumps(["v", "https://evil.example"]), purpose="other")
    scene.ada.keep(STATE, forged)
    return await scene.ada.get(place)


async def cookie_of_state_expired(scene: Scene) -> Page:
    begun = await scene.ada.begin()
    place = (await scene.ada.choose(begun, scene.ada_id)).location
    scene.ada.keep(STATE, scene.sign(STATE, json.dumps(["v", "/"]), age=601))
    return await scene.ada.get(changed(place, state=begun.query["state"]))


async def session_as_cookie_of_state(scene: Scene) -> Page:
    await scene.ada.sign_in(scene.ada_id)
    place = (await scene.back()).location
    scene.ada.keep(STATE, str(scene.ada.cookie(SESSION)))
    return await scene.ada.get(place)


async def code_missing(scene: Scene) -> Page:
    return await scene.ada.get(changed((await scene.back()).location, code=None))


async def code_made_up(scene: Scene) -> Page:
    return await scene.ada.get(changed((await scene.back()).location, code="abc"))


async def code_reused(scene: Scene) -> Page:
    used = (await scene.back()).query["code"]
    await scene.ada.get((await scene.back()).location)
    first = await scene.back()
    await scene.ada.get(changed(first.location, code=used))
    return await scene.ada.get(changed((await scene.back()).location, code=used))


async def code_of_somebody_else(scene: Scene) -> Page:
    """Mallory got hold of ada's code before she used it, and puts it into a sign-in of her own."""
    stolen = (await scene.back()).query["code"]
    own = await scene.mallory.choose(await scene.mallory.begin(), scene.mallory_id)
    return await scene.mallory.get(changed(own.location, code=stolen))


async def code_of_thousands_of_characters(scene: Scene) -> Page:
    return await scene.ada.get(changed((await scene.back()).location, code="a" * 4000))


async def cancelled(scene: Scene) -> Page:
    return await scene.ada.get((await scene.ada.choose(await scene.ada.begin(), "")).location)


async def error_with_markup(scene: Scene) -> Page:
    place = changed((await scene.back()).location, code=None, error="%3Cscript%3Ealert(1)")
    return await scene.ada.get(place + "&error_description=%3Cscript%3Ealert(1)")


CALLBACK: dict[Attack, int] = {
    state_missing: 400,
    state_wrong: 400,
    state_empty: 400,
    state_not_ascii: 400,
    state_no_text: 400,
    state_twice: 400,
    state_of_another_browser: 400,
    no_cookie: 400,
    state_reused: 400,
    way_back_gone_twice: 400,
    cookie_of_state_tampered: 400,
    cookie_of_state_expired: 400,
    session_as_cookie_of_state: 400,
    code_missing: 400,
    code_made_up: 400,
    code_reused: 400,
    code_of_somebody_else: 400,
    code_of_thousands_of_characters: 400,
    cancelled: 403,
    error_with_markup: 403,
}


@pytest.fixture
def people(guild: Guild) -> tuple[Member, Member]:
    return guild.add_member("ada"), guild.add_member("mallory")


async def mounted(
    discord: PretendDiscord, people: tuple[Member, Member], attack: Attack, **tables: Any
) -> Page:
    """What the attack comes to, against a server with these tables."""
    async with signing_in(discord, **tables) as (server, ada), Browser(ada.url) as mallory:
        return await attack(Scene(server, ada, mallory, people[0].id, people[1].id))


@pytest.mark.parametrize(
    ("attack", "status"), CALLBACK.items(), ids=lambda a: getattr(a, "__name__", "")
)
async def test_a_forged_way_back_is_a_page_in_words(
    discord: PretendDiscord, people: Any, attack: Attack, status: int
) -> None:
    page = await mounted(discord, people, attack)
    assert page.status == status
    assert "You are not signed in" in page.text
    assert "Try again</a>" in page.text
    assert "<script" not in page.text
    assert not page.cookie(SESSION)


# ---- open redirects --------------------------------------------------------

NOWHERE = [
    *(
        "//evil.example",
        "///evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
    ),
    *(
        "/\n/evil.example",
        "/\r\nSet-Cookie: a=b",
        " //evil.example",
        "/ /evil.example",
        "evil.example",
    ),
    *("https://evil.example", "HTTPS://EVIL.EXAMPLE", "https:evil.example", "https:/evil.example"),
    *(
        "https:\\\\evil.example",
        "https://board.example@evil.example",
        "https://board.example.evil.example",
    ),
    *("https://evilboard.example", "https://board.example:444", "http://board.example"),
    *("https://board.example\\@evil.example", "https://evil.example\\.board.example"),
    *("https://evil.example#.below.example", "https://evil.example/.below.example"),
    *("https://evil.example?.below.example", "https://.below.example@evil.example"),
    *("javascript:alert(1)", "data:text/html,x", "null", "*", "", "/é", "/" + "a" * 1001),
]


@pytest.mark.parametrize("after", NOWHERE)
async def test_no_next_leads_to_a_foreign_page(
    discord: PretendDiscord, people: Any, after: str
) -> None:
    async def attack(scene: Scene) -> Page:
        return await scene.ada.sign_in(scene.ada_id, after)

    origins = {"cors_origins": ["*", "null", LISTED, "https://*.below.example"]}
    page = await mounted(discord, people, attack, server=origins)
    assert (page.status, page.location) == (302, "/")


@pytest.mark.parametrize("after", ["/", "/a/b?c=d&e=%2F#f", "/#guild=1", f"{LISTED}/x", LISTED])
async def test_a_next_of_ones_own_is_kept(discord: PretendDiscord, people: Any, after: str) -> None:
    async def attack(scene: Scene) -> Page:
        return await scene.ada.sign_in(scene.ada_id, after)

    page = await mounted(discord, people, attack, server={"cors_origins": [LISTED]})
    assert (page.status, page.location) == (302, after)


# ---- sessions that are none ------------------------------------------------


async def no_session(scene: Scene) -> Page:
    return await scene.mallory.token()


async def tampered(scene: Scene) -> Page:
    """Mallory's session, with ada's id in it."""
    await scene.mallory.sign_in(scene.mallory_id)
    version, number, moment, name, _, signature = str(scene.mallory.cookie(SESSION)).split("|")
    own = scene.sign(SESSION, json.dumps(["k", str(scene.ada_id), "ada", None])).split("|")[4]
    scene.mallory.keep(SESSION, "|".join([version, number, moment, name, own, signature]))
    return await scene.mallory.token()


async def expired(scene: Scene) -> Page:
    value = json.dumps(["k", str(scene.ada_id), "ada", None])
    scene.mallory.keep(SESSION, scene.sign(SESSION, value, age=7 * 86_400 + 1))
    return await scene.mallory.token()


async def signed_for_another_purpose(scene: Scene) -> Page:
    value = json.dumps(["k", str(scene.ada_id), "ada", None])
    scene.mallory.keep(SESSION, scene.sign(SESSION, value, purpose=STATE))
    return await scene.mallory.token()


async def sign_in_under_way_as_session(scene: Scene) -> Page:
    await scene.mallory.begin()
    scene.mallory.keep(SESSION, str(scene.mallory.cookie(STATE)))
    return await scene.mallory.token()


async def signed_with_sha1(scene: Scene) -> Page:
    """Tornado's first form of signatures."""
    value = json.dumps(["k", str(scene.ada_id), "ada", None])
    key = scene.spy.key(SESSION)
    scene.mallory.keep(SESSION, create_signed_value(key, SESSION, value, version=1).decode())
    return await scene.mallory.token()


async def unsigned(scene: Scene) -> Page:
    scene.mallory.keep(SESSION, json.dumps(["k", str(scene.ada_id), "ada", None]))
    return await scene.mallory.token()


async def of_another_form(scene: Scene) -> Page:
    scene.mallory.keep(SESSION, scene.sign(SESSION, "[1, 2]"))
    return await scene.mallory.token()


async def socketio_token_as_session(scene: Scene) -> Page:
    scene.mallory.keep(SESSION, scene.server.tokens.issue(str(scene.ada_id), "ADMIN"))
    return await scene.mallory.token()


async def socketio_token_as_bearer(scene: Scene) -> Page:
    token = scene.server.tokens.issue(str(scene.ada_id), "ADMIN")
    return await scene.mallory.token(headers={"Authorization": f"Bearer {token}"})


async def from_before_a_sign_out(scene: Scene) -> Page:
    await scene.ada.sign_in(scene.ada_id)
    scene.mallory.keep(SESSION, str(scene.ada.cookie(SESSION)))
    assert (await scene.mallory.token()).status == 200
    await scene.ada.post("/signout")
    return await scene.mallory.token()


async def secret_has_changed(scene: Scene) -> Page:
    await scene.ada.sign_in(scene.ada_id)
    scene.server.tokens.reconfigure(type(scene.server.tokens._keys)(("z" * 32,)), ["HS256"])
    return await scene.ada.token()


SESSIONS: list[Attack] = [
    no_session,
    tampered,
    expired,
    signed_for_another_purpose,
    sign_in_under_way_as_session,
    signed_with_sha1,
    unsigned,
    of_another_form,
    socketio_token_as_session,
    socketio_token_as_bearer,
    from_before_a_sign_out,
    secret_has_changed,
]


@pytest.mark.parametrize("attack", SESSIONS, ids=lambda attack: attack.__name__)
async def test_what_is_no_session_gets_no_token(
    discord: PretendDiscord, people: Any, attack: Attack
) -> None:
    page = await mounted(discord, people, attack)
    assert (page.status, page.json["code"]) == (401, "signed_out")
    assert "token" not in page.json


async def test_a_session_is_no_token_for_socketio(
    discord: PretendDiscord, people: Any, js: JavaScript
) -> None:
    async with signing_in(discord) as (_, browser):
        await browser.sign_in(people[0].id)
        refused = await js.refused(browser.url, token=str(browser.cookie(SESSION)))
        assert refused.message == "Invalid token"


# ---- foreign pages ---------------------------------------------------------

FOREIGN = [
    *("https://evil.example", "null", "https://board.example.evil.example", "http://board.example"),
    *("https://board.example:444", "https://evilboard.example", "file://", "https://.example"),
    *("https://board.example, https://evil.example", "*", "board.example"),
]


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("call", ["/signin/token", "/signout"])
async def test_a_foreign_page_is_refused(
    discord: PretendDiscord, people: Any, origin: str, call: str
) -> None:
    async with signing_in(discord, server={"cors_origins": ["*", "null", LISTED]}) as (_, browser):
        await browser.sign_in(people[0].id)
        for method in ("POST", "OPTIONS"):
            page = await browser._ask(method, call, headers={"Origin": origin})
            assert page.status == 403
            assert "Access-Control-Allow-Origin" not in page.headers
        assert (await browser.token()).status == 200


@pytest.mark.parametrize("call", ["/signin/token", "/signout"])
async def test_a_link_or_a_picture_does_nothing(
    discord: PretendDiscord, people: Any, call: str
) -> None:
    async with signing_in(discord) as (_, browser):
        await browser.sign_in(people[0].id)
        assert (await browser.get(call)).status == 405
        assert (await browser.token()).status == 200


# ---- a Discord that fails --------------------------------------------------

Handler = Callable[[tornado.web.RequestHandler], Awaitable[None]]


def saying(
    status: int, body: str = "{}", kind: str = "application/json", **headers: str
) -> Handler:
    async def answer(handler: tornado.web.RequestHandler) -> None:
        handler.set_status(status)
        handler.set_header("Content-Type", kind)
        for name, value in headers.items():
            handler.set_header(name.replace("_", "-"), value)
        handler.finish(None if status == 204 else body)

    return answer


async def silent(handler: tornado.web.RequestHandler) -> None:
    await asyncio.sleep(2)


async def cut(handler: tornado.web.RequestHandler) -> None:
    handler.detach().close()


WAIT = '{"message": "slow down", "retry_after": 900.5, "global": %s}'
FAULTS = {
    "400": saying(400, '{"message": "400: Bad Request", "code": 0}'),
    "403": saying(403),
    "404": saying(404),
    "405": saying(405),
    "429": saying(429, WAIT % "false"),
    "429 for all routes": saying(429, WAIT % "true"),
    "429 from before Discord": saying(429, "error code: 1015", "text/plain"),
    "429 without a time": saying(429, '{"message": "slow down"}'),
    "500": saying(500),
    "502 with a page": saying(502, "<html>", "text/html"),
    "garbage": saying(200, "\x00\xff{"),
    "a page": saying(200, "<html>", "text/html"),
    "no object": saying(200, "[1]"),
    "null": saying(200, "null"),
    "empty": saying(200, ""),
    "without fields": saying(200, "{}"),
    "fields of other types": saying(
        200, '{"access_token": 1, "token_type": [], "expires_in": "x", "scope": 3, "id": "x"}'
    ),
    "no content": saying(204, ""),
    "elsewhere": saying(302, Location="https://evil.example/"),
    "error that is no object": saying(400, "[]"),
    "silent": silent,
    "cut off": cut,
}
REFUSES = {("token", "400"): 400}


@pytest.mark.logs(r"WARNING spywatcher.plugin.signin: Discord did not say who", required=False)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["token", "me"])
async def test_a_discord_that_fails_is_a_page_in_words(
    discord: PretendDiscord, people: Any, where: str, fault: str
) -> None:
    discord.oauth2.instead[where] = FAULTS[fault]

    async def attack(scene: Scene) -> Page:
        hurry(scene.server)
        return await scene.ada.get((await scene.back()).location)

    page = await mounted(discord, people, attack)
    assert page.status == REFUSES.get((where, fault), 502)
    assert "Try again</a>" in page.text
    assert not page.cookie(SESSION)
    assert not discord.oauth2.tokens, "the token was not handed back"


def hurry(server: Server) -> None:
    """A second of patience instead of twenty."""
    vars(server.plugins.plugins["signin"].module)["PATIENCE"] = 1.0


@pytest.mark.logs(r"WARNING spywatcher.plugin.signin: Discord's token was not handed back")
@pytest.mark.parametrize("fault", ["429 for all routes", "500", "garbage", "silent", "cut off"])
async def test_who_is_known_comes_in_although_the_token_stays_with_discord(
    discord: PretendDiscord, people: Any, fault: str
) -> None:
    discord.oauth2.instead["revoke"] = FAULTS[fault]

    async def attack(scene: Scene) -> Page:
        vars(scene.server.plugins.plugins["signin"].module)["REVOKE_PATIENCE"] = 0.5
        return await scene.ada.sign_in(scene.ada_id)

    assert (await mounted(discord, people, attack)).status == 302


@pytest.mark.logs(r"ERROR spywatcher.plugin.signin: Discord refuses .* client_secret$")
async def test_a_wrong_client_secret_is_the_operators_to_mend(
    discord: PretendDiscord, people: Any
) -> None:
    async def attack(scene: Scene) -> Page:
        return await scene.ada.sign_in(scene.ada_id)

    page = await mounted(discord, people, attack, signin={"client_secret": "wrong"})
    assert page.status == 502
    assert "operator" in page.text


NO_PICTURES = FAULTS | {
    "with scripts": saying(200, "<svg/>", "image/svg+xml"),
    "too large": saying(200, "x" * 300_000, "image/gif"),
}


async def test_what_is_no_picture_is_not_handed_on(discord: PretendDiscord, people: Any) -> None:
    people[0].user.avatar = "a_" + "0" * 32
    cdn = {"cdn_url": f"http://127.0.0.1:{discord.port}"}
    async with signing_in(discord, signin=cdn) as (server, browser):
        vars(server.plugins.plugins["signin"].module)["PICTURE_PATIENCE"] = 0.5
        await browser.sign_in(people[0].id)
        assert (await picture_of(browser)).code == 200
        for fault, answer in NO_PICTURES.items():
            discord.oauth2.instead["picture"] = answer
            assert (await picture_of(browser)).code == 404, fault


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "a" * 500, "\u202egnp.exe", "\x00"]
)
async def test_a_hostile_name_stays_text(discord: PretendDiscord, people: Any, name: str) -> None:
    people[0].user.name = name
    async with signing_in(discord) as (_, browser):
        assert (await browser.sign_in(people[0].id)).status == 302
        user = (await browser.token()).json["user"]
        assert len(user["username"]) <= 64
        assert user["username"].isprintable()


@pytest.mark.logs(r"spywatcher.plugin.signin", required=False)
@pytest.mark.parametrize("fault", ["none", "400", "429", "garbage", "cut off"])
async def test_no_log_shows_a_secret_a_code_or_a_token(
    discord: PretendDiscord, people: Any, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At the most talkative level that the settings know, hikari and aiohttp included."""
    caplog.set_level(logging.DEBUG)
    if fault in FAULTS:
        discord.oauth2.instead["me"] = FAULTS[fault]
    secrets = [discord.oauth2.client_secret]

    async def attack(scene: Scene) -> Page:
        back = await scene.back()
        secrets.append(back.query["code"])
        page = await scene.ada.get(back.location)
        for name in (STATE, SESSION):
            secrets.append(scene.ada.cookie(name) or page.cookie(name) or "-" * 40)
        secrets.append((await scene.ada.token()).json.get("token", "-" * 40))
        return page

    await mounted(discord, people, attack, log={"level": "debug"})
    secrets += discord.oauth2.revoked
    assert len(secrets) > 5
    assert not [secret for secret in secrets if secret in caplog.text]


def limited(**headers: str) -> Handler:
    """429 as Discord says it of one user or one application."""
    return saying(
        429, WAIT % "false", X_RateLimit_Scope="user", X_RateLimit_Remaining="0", **headers
    )


@pytest.mark.logs(r"hikari", r"Discord did not say who", required=False)
async def test_a_limit_of_one_application_is_no_flood_of_questions(
    discord: PretendDiscord, people: Any
) -> None:
    """hikari asks again by itself for this one: it must wait in between."""
    asked = 0
    answer = limited(
        X_RateLimit_Bucket="b", X_RateLimit_Limit="1", X_RateLimit_Reset_After="900",
        X_RateLimit_Reset=str(time.time() + 900),
    )  # fmt: skip

    async def count(handler: tornado.web.RequestHandler) -> None:
        nonlocal asked
        asked += 1
        await answer(handler)

    discord.oauth2.instead["token"] = count

    async def attack(scene: Scene) -> Page:
        hurry(scene.server)
        return await scene.ada.get((await scene.back()).location)

    assert (await mounted(discord, people, attack)).status == 502
    assert asked < 5


@pytest.mark.faults
@pytest.mark.logs(r"WARNING spywatcher.plugin.signin: Discord('s token was not| did not say)")
@pytest.mark.parametrize("where", ["token", "me"])
async def test_a_silent_discord_is_told_within_thirty_seconds(
    discord: PretendDiscord, people: Any, where: str
) -> None:
    async def silent(handler: tornado.web.RequestHandler) -> None:
        await asyncio.sleep(40)

    discord.oauth2.instead = {where: silent, "revoke": silent}

    async def attack(scene: Scene) -> Page:
        place = (await scene.back()).location
        async with within(30):
            return await scene.ada.get(place)

    assert (await mounted(discord, people, attack)).status == 502
