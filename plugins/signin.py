"""Sign people in with Discord. Teaches: routes, signatures of one's own, what all nodes remember.

OAuth2's authorization code grant (RFC 6749 §4.1, with PKCE, RFC 7636), asked through hikari:

    GET  /signin?next=/path   sends the browser to Discord
    GET  /signin/callback     takes it back, asks Discord who that is, begins a session
    POST /signin/token        a token for Socket.IO, for who has a session
    GET  /signin/avatar       their picture, fetched from Discord
    POST /signout             ends the session

A sign-in under way and a session are signed cookies of the browser; nothing is kept of them here.
What must not count a second time is remembered: each finished sign-in for ten minutes, each session
that was ended until it would have ended by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import re
import secrets
import sqlite3
import time
from base64 import b64encode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Awaitable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urljoin, urlsplit
from weakref import WeakKeyDictionary

import hikari
import msgspec
from hikari.impl import HTTPSettings, HTTPTimeoutSettings
from msgspec import Meta
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httputil import url_concat
from tornado.template import Template
from tornado.web import HTTPError, RequestHandler, create_signed_value, decode_signed_value

from spywatcher import Marks, PluginSettings, Spy, route, timestamp, user_name

SESSION: Final = "spywatcher_session"
STATE: Final = "spywatcher_signin"
#: Tells scripts that there is a session, which they cannot see: to ask in vain is an error in the
#: browser's console. Nothing follows from it here.
HINT: Final = "spywatcher_signed_in"
#: Seconds in which a sign-in must be finished.
STATE_LASTS: Final = 600
#: Seconds for all that Discord is asked about one sign-in, and for handing its token back.
PATIENCE: Final = 20.0
REVOKE_PATIENCE: Final = 5.0
#: Seconds and bytes that a picture may take, and the forms in which no script can be.
PICTURE_PATIENCE: Final = 5.0
PICTURE_BYTES: Final = 262_144
PICTURE_TYPES: Final = frozenset({"image/gif", "image/jpeg", "image/png", "image/webp"})
#: Seconds for which the browser keeps it.
PICTURE_LASTS: Final = 3_600
#: Sign-ins that one address may begin in a minute, and the addresses that are counted.
STARTS: Final = 30
MOST_ADDRESSES: Final = 10_000
#: Bytes of a `next`: it has to fit into a cookie.
LONGEST_NEXT: Final = 1_000
DAY: Final = 86_400.0

DiscordId = Annotated[str, Meta(pattern=r"^[0-9]{1,20}$")]


class Settings(PluginSettings, frozen=True):
    #: Id of the application at Discord; empty: nobody can sign in.
    client_id: Annotated[str, Meta(pattern=r"^[0-9]{0,20}$")] = ""
    #: Secret of the application.
    client_secret: str = ""
    #: File that holds the secret instead.
    client_secret_file: str = ""
    #: How browsers reach this server, like https://watch.example.
    public_url: str = ""
    #: Discord's page to sign in at; empty: that beside [discord] rest_url.
    authorize_url: str = ""
    #: Where pictures of viewers are fetched.
    cdn_url: str = hikari.urls.CDN_URL
    #: Days after which one has to sign in again.
    session_days: Annotated[float, Meta(gt=0, le=400)] = 7.0
    #: Seconds that a token for Socket.IO is good.
    token_ttl: Annotated[float, Meta(gt=0, le=DAY)] = 900.0
    #: Discord ids whose tokens have the role ADMIN.
    admins: tuple[DiscordId, ...] = ()
    #: Discord ids that get no token.
    banned: tuple[DiscordId, ...] = ()

    def __post_init__(self) -> None:
        if not self.client_id:
            return
        secret, faults = read_client_secret(self)
        faults += public_url_faults(self.public_url)
        if faults:
            raise ValueError(*faults)
        msgspec.structs.force_setattr(self, "client_secret", secret)
        msgspec.structs.force_setattr(self, "public_url", origin_of(self.public_url))

    @property
    def needs_secret(self) -> bool:
        return bool(self.client_id)

    @property
    def redirect_uri(self) -> str:
        """What the developer portal has to list."""
        return f"{self.public_url}/signin/callback"


def read_client_secret(settings: Settings) -> tuple[str, list[str]]:
    """The secret, and what is wrong with it; a file was made with or without a byte order mark."""
    secret = settings.client_secret
    file = settings.client_secret_file
    if secret and file:
        return "", ["client_secret: set, and client_secret_file too; expected one of them"]
    try:
        secret = secret or (Path(file).read_text("utf-8-sig").strip() if file else "")
    except (OSError, UnicodeDecodeError) as error:
        return "", [f"client_secret_file: {file} cannot be read: {error}"]
    faults = [] if secret else ["client_secret: not set, expected the secret of the application"]
    return secret, faults


def public_url_faults(url: str) -> list[str]:
    """What keeps Discord from sending browsers back there."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    bare = f"{parts.scheme}://{parts.netloc}"
    if not host or not url.isascii() or "@" in url or url.rstrip("/").lower() != bare.lower():
        return [f"public_url: got {url!r}, expected the like of https://watch.example"]
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        return [f"public_url: got {url!r}, expected https (http is for loopback alone)"]
    return []


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def origin_of(url: str) -> str:
    """An origin as browsers write it: in small letters, without a default port (RFC 6454 §6.2)."""
    parts = urlsplit(url.lower())
    default = {"http": ":80", "https": ":443"}[parts.scheme]
    return f"{parts.scheme}://{parts.netloc.removesuffix(default)}"


# ---- what is remembered ----


class Session(msgspec.Struct, array_like=True, frozen=True):
    """What the session's cookie says, signed. `key` names the session; `avatar` is a URL."""

    key: str
    id: str
    username: str
    avatar: str | None


class UnderWay(msgspec.Struct, array_like=True, frozen=True):
    """What the cookie of a sign-in says, signed. `state` is made from the verifier, as PKCE has it:
    who knows the one from an address cannot make the other.
    """

    verifier: str
    next: str

    @property
    def state(self) -> bytes:
        return urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).rstrip(b"=")


class FileMarks(Marks):
    """What a server alone remembers: a small file beside its counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def put(self, name: str, seconds: float) -> bool:
        insert = "INSERT OR IGNORE INTO marks VALUES (?, ?) RETURNING 1"
        return await asyncio.to_thread(self._run, insert, name, time.time() + seconds)

    async def has(self, name: str) -> bool:
        select = "SELECT 1 FROM marks WHERE name = ? AND until > ?"
        return await asyncio.to_thread(self._run, select, name, time.time())

    def _run(self, command: str, *arguments: object) -> bool:
        """Whether there is a row to return."""
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=PATIENCE)) as file, file:
                file.execute(
                    "CREATE TABLE IF NOT EXISTS marks"
                    " (name TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID"
                )
                file.execute("DELETE FROM marks WHERE until <= ?", (time.time(),))
                return file.execute(command, arguments).fetchone() is not None
        except sqlite3.Error as error:
            raise ConnectionError(f"{self._path}: {error}") from error


class Starts:
    """How many sign-ins each address has begun in its minute."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def too_many(self, address: str) -> bool:
        """Count one more."""
        now = time.monotonic()
        began, count = self._counts.get(address, (now, 0))
        if now - began >= 60.0:
            began, count = now, 0
        self._counts[address] = began, count + 1
        if len(self._counts) > MOST_ADDRESSES:
            self._counts.popitem(last=False)
        return count >= STARTS


_starts: WeakKeyDictionary[Spy, Starts] = WeakKeyDictionary()


def marks_of(spy: Spy) -> Marks:
    return spy.marks or FileMarks(spy.data_dir / "signin.db")


# ---- asking Discord ----


class RefusedError(HTTPError):
    """What somebody reads who is turned away; `code` is for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status)
        self.code = code
        self.message = message


WRONG: Final = "Something is wrong with this server. Please wait a moment."
SILENT: Final = "Discord does not answer as it should. This is not your fault."


class RateLimitedError(Exception):
    """Discord said 429."""


def loads(data: bytes | str) -> Any:
    """JSON as hikari reads it; raises where it would wait (of 429 on a route of OAuth2, hikari 2.7
    waits for nothing when that is for all routes, and asks again at once, for ever).
    """
    body = msgspec.json.decode(data)
    if isinstance(body, dict) and "retry_after" in body:
        raise RateLimitedError
    return body


@functools.cache
def http_settings() -> HTTPSettings:
    """Made once: it reads all of the host's certificates, which takes 20 ms."""
    timeouts = HTTPTimeoutSettings(total=PATIENCE)
    return HTTPSettings(timeouts=timeouts, max_redirects=None)


async def ask_discord(spy: Spy, code: str, verifier: str) -> hikari.OwnUser:
    """Whom the code is from, within 25 seconds; the token it is traded for goes back at once.

    Raises RefusedError. Nothing of what Discord says is logged but its status.
    """
    app = hikari.RESTApp(
        http_settings=http_settings(), loads=loads, max_retries=0, url=spy.rest_url
    )
    await app.start()
    try:
        async with asyncio.timeout(PATIENCE), app.acquire(None) as client:
            token = await trade(client, spy, code, verifier)
            try:
                async with app.acquire(str(token), hikari.TokenType.BEARER) as bearer:
                    return await bearer.fetch_my_user()
            finally:
                await revoke(client, spy, str(token))
    except RefusedError:
        raise
    except Exception as error:  # whatever Discord answers, or nothing
        spy.log.warning("Discord did not say who signs in: %s", status_of(error))
        raise RefusedError(502, "discord", SILENT) from None
    finally:
        await app.close()


async def trade(
    client: hikari.api.RESTClient, spy: Spy, code: str, verifier: str
) -> hikari.OAuth2AuthorizationToken:
    settings: Settings = spy.settings
    try:
        return await client.authorize_access_token(
            int(settings.client_id),
            settings.client_secret,
            code,
            settings.redirect_uri,
            code_verifier=verifier,
        )
    except hikari.BadRequestError:
        message = "Discord does not know this sign-in, or knows it as used already."
        raise RefusedError(400, "code", message) from None
    except hikari.UnauthorizedError:
        spy.log.error("Discord refuses [plugin.signin] client_id with this client_secret")
        message = "This server is not set up for it. Its operator has to mend that."
        raise RefusedError(502, "set-up", message) from None


async def revoke(client: hikari.api.RESTClient, spy: Spy, token: str) -> None:
    """Hand Discord's token back. If that fails, it is good for a week, but nobody has it."""
    settings: Settings = spy.settings
    try:
        async with asyncio.timeout(REVOKE_PATIENCE):
            await client.revoke_access_token(int(settings.client_id), settings.client_secret, token)
    except Exception as error:  # as above
        spy.log.warning("Discord's token was not handed back: %s", status_of(error))


async def fetch_picture(url: str) -> HTTPResponse:
    """A picture from Discord; RefusedError where it is none, too large or late."""
    client = AsyncHTTPClient(force_instance=True, max_body_size=PICTURE_BYTES)
    try:
        answer = await client.fetch(
            url,
            request_timeout=PICTURE_PATIENCE,
            follow_redirects=False,
            decompress_response=False,
        )
    except Exception:  # whatever is answered, or nothing
        raise RefusedError(404, "avatar", SILENT) from None
    finally:
        client.close()
    if answer.headers.get("Content-Type") not in PICTURE_TYPES:
        raise RefusedError(404, "avatar", SILENT)
    return answer


def status_of(error: Exception) -> str:
    """What may be logged: never a message, which may quote what was sent."""
    status = getattr(error, "status", None)
    return f"HTTP {int(status)}" if status is not None else type(error).__name__


# ---- pages ----

#: In the colours of the page in the box (plugins/dashboard/static/style.css).
STYLE: Final = """
:root{color-scheme:light dark;--paper:#fbfaf7;--ink:#17191d;--accent:#0b6f6a;--on-accent:#fff}
@media(prefers-color-scheme:dark){
:root{--paper:#101214;--ink:#eceae5;--accent:#4fc3b5;--on-accent:#06201d}}
body{margin:0 auto;padding:20vh 16px 0;max-width:34rem;background:var(--paper);color:var(--ink);
font:17px/1.5 Inter,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.01em;margin:0 0 12px}
a{display:inline-block;margin-top:12px;padding:8px 16px;border-radius:6px;
background:var(--accent);color:var(--on-accent);font-weight:600;text-decoration:none}
a:focus-visible{outline:2px solid var(--ink);outline-offset:2px}
"""
STYLE_HASH: Final = b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
PAGE: Final = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Not signed in</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{% raw style %}</style></head>
<body><h1>You are not signed in</h1>
<p>{{ message }}</p>
<p><a href="{{ again }}">Try again</a></p>
</body></html>
"""
)
OWN_PATH: Final = re.compile(r"/(?!/)[!-\[\]-~]*")
FOREIGN_URL: Final = re.compile(r"(https?://[^/?#\\@\s]+)([/?#][!-\[\]-~]*)?")


def safe_next(text: str, spy: Spy) -> str:
    """Where a browser may be sent after all: a path of this server, or a page listed in
    cors_origins. Anything else is "/". No backslash, blank or control character is let through:
    browsers read them as slashes, or not at all.
    """
    if len(text) > LONGEST_NEXT:
        return "/"
    foreign = FOREIGN_URL.fullmatch(text)
    listed = foreign is not None and spy.lists_origin(foreign[1])
    return text if listed or OWN_PATH.fullmatch(text) else "/"


class SignInHandler(RequestHandler):
    """Base of all: headers, cookies, and refusals in words."""

    spy: Spy

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    async def prepare(self) -> None:
        if not self.spy.settings.client_id:
            self.set_status(404)
            self.finish({"message": "Not found"})

    def give_cookie(self, name: str, value: msgspec.Struct, seconds: float, path: str) -> None:
        """Only this server reads it, only over TLS, and not when a foreign page asks."""
        signed = create_signed_value(self.spy.key(name), name, msgspec.json.encode(value))
        self.set_cookie(name, signed.decode(), path=path, max_age=int(seconds), **self._flags())

    def give_hint(self, seconds: float) -> None:
        """With 0 seconds it is taken back."""
        flags = self._flags() | {"httponly": False}
        self.set_cookie(HINT, "1", path="/", max_age=int(seconds), **flags)

    def take_cookie(self, name: str, path: str) -> None:
        self.clear_cookie(name, path=path, **self._flags())

    def _flags(self) -> dict[str, Any]:
        secure = self.spy.settings.public_url.startswith("https:")
        return {"httponly": True, "samesite": "Lax", "secure": secure}

    def read_cookie(self, name: str, form: type[Any], seconds: float) -> Any:
        """What the cookie says; None if it is missing, too old, or not signed here for this."""
        value = decode_signed_value(
            self.spy.key(name), name, self.get_cookie(name), seconds / DAY, min_version=2
        )
        try:
            return None if value is None else msgspec.json.decode(value, type=form)
        except msgspec.DecodeError:  # another version made it
            return None

    async def remember(self, name: str, seconds: float) -> bool:
        """Whether this is the first time."""
        return await self._ask(marks_of(self.spy).put(name, seconds))

    async def remembers(self, name: str) -> bool:
        return await self._ask(marks_of(self.spy).has(name))

    async def _ask(self, answer: Awaitable[bool]) -> bool:
        """Who has signed out must stay out, so nobody gets in while nobody knows."""
        try:
            known = await answer
        except ConnectionError:
            self.spy.problem = "it cannot be told who has signed out, so nobody gets a token"
            raise RefusedError(503, "storage", WRONG) from None
        self.spy.problem = None
        return known

    @staticmethod
    def refusal(status: int, about: dict[str, Any]) -> RefusedError:
        """What Tornado's `write_error` is to tell."""
        _, error, _ = about.get("exc_info", (None, None, None))
        if isinstance(error, RefusedError):
            return error
        if status < 500:
            return RefusedError(status, "bad_request", "This server does not know such a request.")
        return RefusedError(status, "internal", WRONG)


class PageHandler(SignInHandler):
    """What browsers open."""

    #: Where the browser goes after all.
    after = "/"

    def write_error(self, status_code: int, **about: Any) -> None:
        message = self.refusal(status_code, about).message
        self.finish(PAGE.generate(message=message, again=self._again(), style=STYLE))

    def _again(self) -> str:
        """Where to try again; at `public_url`, since a cookie of another host would be missing later."""
        return url_concat(f"{self.spy.settings.public_url}/signin", {"next": self.after})


@route(r"/signin")
class Start(PageHandler):
    """Sends the browser to Discord."""

    def get(self) -> None:
        self.after = safe_next(self.get_query_argument("next", "/"), self.spy)
        starts = _starts.setdefault(self.spy, Starts())
        if starts.too_many(self.spy.address(self.request)):
            self.spy.count("too many starts")
            raise RefusedError(429, "rate_limited", "Too many sign-ins began here. Wait a minute.")
        settings: Settings = self.spy.settings
        under_way = UnderWay(secrets.token_urlsafe(32), self.after)
        self.give_cookie(STATE, under_way, STATE_LASTS, "/signin")
        state = under_way.state.decode()
        question = {
            "response_type": "code",
            "client_id": settings.client_id,
            "scope": "identify",
            "redirect_uri": settings.redirect_uri,
            "state": state,
            "code_challenge": state,
            "code_challenge_method": "S256",
        }
        page = settings.authorize_url or urljoin(self.spy.rest_url, "/oauth2/authorize")
        self.redirect(url_concat(page, question))


@route(r"/signin/callback")
class Callback(PageHandler):
    """Takes the browser back from Discord."""

    async def get(self) -> None:
        under_way = await self._under_way()
        if error := self.get_query_argument("error", ""):
            who = "You have" if error == "access_denied" else "Discord has"
            raise RefusedError(403, "cancelled", f"{who} cancelled the sign-in on Discord's page.")
        code = self.get_query_argument("code", "")
        if not code:
            raise RefusedError(400, "code", "Discord has sent nothing that says who you are.")
        user = await ask_discord(self.spy, code, under_way.verifier)
        if str(user.id) in self.spy.settings.banned:
            self.spy.count("banned")
            raise RefusedError(
                403, "banned", "You are banned here. The operator of this server said so."
            )
        avatar = avatar_of(user, self.spy.settings.cdn_url)
        session = Session(secrets.token_urlsafe(16), str(int(user.id)), user_name(user), avatar)
        lasts = self.spy.settings.session_days * DAY
        self.give_cookie(SESSION, session, lasts, "/")
        self.give_hint(lasts)
        self.spy.count("signed in")
        self.redirect(under_way.next)

    async def _under_way(self) -> UnderWay:
        """The sign-in that began in this browser; from now on it is used."""
        under_way: UnderWay | None = self.read_cookie(STATE, UnderWay, STATE_LASTS)
        state = self.get_query_argument("state", "")
        if under_way is None or not secrets.compare_digest(under_way.state, state.encode()):
            message = "This sign-in did not begin in this browser, or not in the last ten minutes."
            raise RefusedError(400, "state", message)
        self.after = under_way.next
        self.take_cookie(STATE, "/signin")
        if not await self.remember(f"used {state}", STATE_LASTS):
            raise RefusedError(400, "state", "This sign-in was used already.")
        return under_way


def avatar_of(user: hikari.OwnUser, cdn_url: str) -> str | None:
    """The URL of the picture, small; None if there is none."""
    if not re.fullmatch(r"(a_)?[0-9a-f]{32}", user.avatar_hash or ""):
        return None
    url = str(user.make_avatar_url(file_format="PNG", size=64))
    return url.replace(hikari.urls.CDN_URL, cdn_url.rstrip("/"), 1)


# ---- what pages ask for ----


class CallHandler(SignInHandler):
    """What scripts of pages call: of this server, and of those that cors_origins lists."""

    def set_default_headers(self) -> None:
        """Refusals too can be read by the pages that may ask."""
        super().set_default_headers()
        self.set_header("Vary", "Origin")
        if self.spy.lists_origin(self.origin):
            self.set_header("Access-Control-Allow-Origin", self.origin)
            self.set_header("Access-Control-Allow-Credentials", "true")

    @property
    def origin(self) -> str:
        """The page that asks; browsers say so with each POST (Fetch standard)."""
        return self.request.headers.get("Origin", "")

    async def prepare(self) -> None:
        """Turn away foreign pages."""
        await super().prepare()
        own = self.origin in ("", self.spy.settings.public_url)
        if not (self._finished or own or self.spy.lists_origin(self.origin)):
            raise RefusedError(403, "origin", "This origin is not allowed")

    def options(self) -> None:
        """CORS preflight."""
        wanted = self.request.headers.get("Access-Control-Request-Headers", "")
        self.set_header("Access-Control-Allow-Methods", "POST")
        self.set_header("Access-Control-Allow-Headers", wanted)
        self.set_status(204)

    def write_error(self, status_code: int, **about: Any) -> None:
        answer = self.refusal(status_code, about)
        self.finish({"message": answer.message, "code": answer.code})

    async def session(self) -> Session | None:
        """Whose browser this is, unless the session has ended."""
        seconds = self.spy.settings.session_days * DAY
        session: Session | None = self.read_cookie(SESSION, Session, seconds)
        if session is None or await self.remembers(f"ended {session.key}"):
            return None
        return session


@route(r"/signin/token")
class Token(CallHandler):
    """A token for who is signed in."""

    async def post(self) -> None:
        settings: Settings = self.spy.settings
        session = await self.session()
        if session is None:
            self.give_hint(0)
            raise RefusedError(401, "signed_out", "Not signed in")
        if session.id in settings.banned:
            raise RefusedError(403, "banned", "Access denied")
        ttl = settings.token_ttl
        expires = timestamp(datetime.fromtimestamp(int(time.time() + ttl), UTC))
        role: Literal["ADMIN", "USER"] = "ADMIN" if session.id in settings.admins else "USER"
        user = {"id": session.id, "username": session.username, "avatar": session.avatar}
        token = self.spy.issue_token(session.id, role, ttl)
        self.finish({"token": token, "expiresAt": expires, "user": user})


@route(r"/signin/avatar")
class Avatar(CallHandler):
    """The picture of who is signed in, for pages that load nothing from elsewhere."""

    async def get(self) -> None:
        session = await self.session()
        if session is None or session.avatar is None:
            raise RefusedError(404, "avatar", "There is no picture.")
        picture = await fetch_picture(session.avatar)
        self.set_header("Content-Type", picture.headers["Content-Type"])
        self.set_header("Cache-Control", f"private, max-age={PICTURE_LASTS}")
        self.set_header("Vary", "Cookie")
        self.finish(picture.body)


@route(r"/signout")
class SignOut(CallHandler):
    """Ends the session, this browser's and each copy of its cookie."""

    async def post(self) -> None:
        session = await self.session()
        if session is not None:
            await self.remember(f"ended {session.key}", self.spy.settings.session_days * DAY)
        self.take_cookie(SESSION, "/")
        self.give_hint(0)
        self.set_status(204)
