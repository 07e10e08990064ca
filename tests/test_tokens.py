"""The keys that tokens are checked with, what is refused, and how a token's life ends."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from service import SECRET
from waiting import eventually

import spywatcher
from spywatcher import AuthSettings, Keys, OperatorError, RefusedConnectionError, Tokens, read_keys

SOUND = {"discordId": "1", "access": True, "role": "USER"}
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
LONG = "a secret of sixty-four bytes and more, since HS512 makes a hash that long"


def pem(key):
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def signed(claims=SOUND, key=SECRET, algorithm="HS256", **header):
    return jwt.encode(claims, key, algorithm=algorithm, headers=header or None)


def code_of(token, keys=None, algorithms=("HS256",)):
    """Why a token is refused; None if it is not."""
    try:
        Tokens(keys or Keys(secrets=(SECRET,)), algorithms).verify(token)
    except RefusedConnectionError as refusal:
        return refusal.data["code"] if refusal.message == "Invalid token" else refusal.message
    return None


def part(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


# ---- what is accepted


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_shared_secret_signs_for_the_algorithm_that_is_set(algorithm):
    keys = Keys(secrets=(LONG,))
    assert code_of(signed(key=LONG, algorithm=algorithm), keys, [algorithm]) is None


@pytest.mark.parametrize(("algorithm", "key"), [("RS256", RSA), ("ES256", EC)])
def test_a_public_key_checks_what_the_private_one_signed(tmp_path, algorithm, key):
    (tmp_path / "key.pem").write_text(pem(key))
    keys = read_keys(AuthSettings(algorithms=(algorithm,), public_key_file="key.pem"), tmp_path)
    assert code_of(signed(key=key, algorithm=algorithm), keys, [algorithm]) is None
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    other = other if algorithm == "RS256" else ec.generate_private_key(ec.SECP256R1())
    assert code_of(signed(key=other, algorithm=algorithm), keys, [algorithm]) == "signature"


def test_a_list_of_secrets_rotates_them(tmp_path):
    new, old, gone = (f"{name} secret, thirty-two bytes or more" for name in ("new", "old", "gone"))
    keys = read_keys(AuthSettings(secret=(new, old)), tmp_path)
    assert [code_of(signed(key=key), keys) for key in (new, old, gone)] == [None, None, "signature"]
    assert jwt.decode(Tokens(keys, ["HS256"]).issue("1"), new, algorithms=["HS256"])


def test_a_file_holds_a_secret_a_line(tmp_path):
    (tmp_path / "secrets").write_bytes(f"{SECRET} \r\n \r\n\t{LONG}\r\n".encode())
    keys = read_keys(AuthSettings(secret_file="secrets"), tmp_path)
    assert keys.secrets == (SECRET, LONG)


# ---- what is refused


@pytest.mark.parametrize(
    "token",
    [
        signed(key=None, algorithm="none"),
        f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(SOUND)}.",
        f"{part({'alg': 'NONE'})}.{part(SOUND)}.",
        f"{part({'alg': 'None'})}.{part(SOUND)}.{part('x')}",
        f"{part({'alg': ['HS256']})}.{part(SOUND)}.{part('x')}",
        f"{part({'alg': None})}.{part(SOUND)}.{part('x')}",
        signed(key=LONG, algorithm="HS512"),
        signed(key=RSA, algorithm="RS256"),
    ],
)
def test_only_the_algorithms_that_are_set_count(token):
    assert code_of(token) == "signature"


def test_a_public_key_is_no_secret():
    """Whoever has it could sign with it (RFC 8725 §2.1)."""
    keys = Keys(secrets=(SECRET,), public=pem(RSA))
    body = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(SOUND)}"
    algorithm = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = algorithm.sign(body.encode(), pem(RSA).encode())
    forged = f"{body}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    assert code_of(forged, keys, ["HS256", "RS256"]) == "signature"


@pytest.mark.parametrize(
    "token",
    [
        "x" * 8193,
        signed(SOUND | {"more": "x" * 8192}),
        "\ud800.a.b",
        "ü.ü.ü",
        ".".join([part("[]")] * 3),
        ".".join([part("1")] * 3),
        "..",
        b"bytes",
        ["list"],
        True,
    ],
)
def test_what_is_no_token_is_malformed(token):
    assert code_of(token) == "malformed"


@pytest.mark.parametrize(
    ("exp", "code"),
    [
        (math.nan, "malformed"),
        (math.inf, "malformed"),
        ("soon", "malformed"),
        ([], "malformed"),
        (None, "malformed"),
        (10**400, "claims"),
        (1e300, "claims"),
        (2**63, "claims"),
        pytest.param(int(time.time() * 1000) + 900_000, "claims", id="a page's milliseconds"),
        (str(2**33), "claims"),
        (True, "expired"),
        (False, "expired"),
        (-1, "expired"),
        (-1e300, "expired"),
        (0, "expired"),
        (1.5, "expired"),
        (2**33, None),
        (2**33 + 0.5, None),
    ],
)
def test_exp_is_a_moment(exp, code):
    assert code_of(signed(SOUND | {"exp": exp})) == code


async def test_clocks_may_differ_by_ten_seconds_and_other_claims_are_for_others(spy):
    now = time.time()
    for claims in (
        {"nbf": now + 9},
        {"nbf": 0},
        {"iat": now + 600},
        {"iat": "yesterday"},
        {"sub": 17},
        {"aud": "another service"},
        {"jti": 5},
        {"iss": "https://login.example"},
    ):
        dashboard = await spy.js.connect(spy.url, token=signed(SOUND | claims))
        assert (await dashboard.call("guilds:list"))["ok"], claims


@pytest.mark.parametrize("nbf", [2**33, "soon", [], True, math.nan, 10**400])
def test_a_token_of_later_is_refused(nbf):
    assert code_of(signed(SOUND | {"nbf": nbf})) == "claims"


@pytest.mark.parametrize(
    "claims", [{"discordId": "\ud800"}, {"role": "\ud800"}, {"guilds": ["\ud800"]}, {"\ud800": 1}]
)
def test_half_a_surrogate_pair_is_nobodys_name(claims):
    assert code_of(signed(SOUND | claims)) == "claims"


def test_no_second_is_forgiven_after_exp():
    assert code_of(signed(SOUND | {"exp": int(time.time()) - 1})) == "expired"


@pytest.mark.parametrize(
    "token",
    [signed(SOUND | {"exp": 1}, LONG), signed(SOUND | {"exp": 1})[:-4] + "AAAA"],
)
def test_only_a_well_signed_token_is_told_that_it_has_expired(token):
    assert code_of(token) == "signature"


# ---- what is made


@pytest.mark.parametrize("guilds", [1, 150, 260])
def test_what_is_made_is_taken(guilds):
    tokens = Tokens(Keys((SECRET,)), ["HS256"])
    ids = [str(10**18 + number) for number in range(guilds)]
    assert tokens.verify(tokens.issue("1", guilds=ids)).guilds == frozenset(ids)


@pytest.mark.parametrize(
    ("wanted", "fault"),
    [
        ({"guilds": [str(10**18 + n) for n in range(400)]}, "expected 8192 at most; name fewer"),
        ({"discord_id": ""}, "claims"),
        ({"role": "KING"}, "claims"),
        ({"ttl": 1e12}, "claims"),
        ({"ttl": -1.0}, "expired"),
    ],
)
def test_what_could_not_be_taken_is_not_made(wanted, fault):
    with pytest.raises(OperatorError, match=fault):
        Tokens(Keys((SECRET,)), ["HS256"]).issue(**{"discord_id": "1"} | wanted)


# ---- what does not start


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"secret": "short"}, "got 5 bytes, expected 32 or more for HS256"),
        ({"secret": ("x" * 32, "short")}, "got 5 bytes, expected 32"),
        ({"secret": "x" * 32, "algorithms": ("HS512",)}, "got 32 bytes, expected 64"),
        ({"algorithms": ("RS256",)}, "auth.public_key_file: not set"),
        ({"algorithms": ("RS256",), "public_key_file": "no"}, "cannot be read"),
        ({"algorithms": ("RS256",), "public_key_file": "ec"}, "key_file: got .* none for RS256"),
        ({"secret": f"ssh-rsa {LONG}"}, "auth.secret: got .* none for HS256"),
        ({"algorithms": ("ES256",), "public_key_file": "rsa"}, "none for ES256"),
        ({"algorithms": ("RS256", "ES256"), "public_key_file": "rsa"}, "none for ES256"),
        ({"secret_file": "rsa"}, "auth.secret_file: got .* expected 32 or more"),
        ({"algorithms": ("ES256",), "public_key_file": "junk"}, "none for ES256"),
    ],
)
def test_a_key_that_cannot_work_stops_the_start_and_is_not_shown(tmp_path, settings, fault):
    (tmp_path / "ec").write_text(pem(EC))
    (tmp_path / "rsa").write_text(pem(RSA))
    (tmp_path / "junk").write_text("hunter2 is no key")
    with pytest.raises(OperatorError, match=fault) as raised:
        read_keys(AuthSettings(**settings), tmp_path)
    assert "short" not in str(raised.value)
    assert "hunter2" not in str(raised.value)


# ---- the end of a token's life

#: Seconds in which even a busy machine has let a client in.
LIFE = 2.5


def ending_soon():
    """A token of so many seconds."""
    return signed(SOUND | {"exp": time.time() + LIFE})


@pytest.mark.parametrize("transport", ["websocket", "polling"])
async def test_after_an_expired_token_the_client_comes_back_with_what_its_auth_gives(
    spy, transport
):
    token = ending_soon()
    dashboard = await spy.js.connect(spy.url, token=token, transports=[transport])
    assert (await dashboard.next("auth:expiring"))["expiresAt"].endswith("Z")
    await dashboard.set_auth({"token": spy.token()})
    assert await dashboard.next("error") == {"message": "Token expired", "code": "expired"}
    end = await dashboard.disconnection()
    assert end.reason == {"websocket": "transport close", "polling": "transport error"}[transport]
    assert end.active
    await dashboard.reconnected()
    assert (await dashboard.call("guilds:list"))["ok"]


async def test_who_comes_back_with_the_old_token_is_refused(spy):
    token = ending_soon()
    dashboard = await spy.js.connect(spy.url, token=token)
    await dashboard.next("error")
    assert (await dashboard.refused()).data == {"code": "expired"}
    await eventually(lambda: not spy.server.socketio.eio.sockets)


async def test_who_does_not_answer_the_close_loses_the_connection_all_the_same(spy):
    assert spy.server.socketio.eio.ending_timeout < 5
    spy.server.socketio.eio.ending_timeout = 0.5
    raw = await spy.raw(ending_soon())
    raw.stop_reading()
    stream = next(iter(spy.server.socketio.eio.sockets.values()))._stream
    await eventually(stream.closed, timeout=LIFE + 2)


async def test_a_warning_comes_before_the_end(spy, monkeypatch):
    monkeypatch.setattr(spywatcher, "EXPIRY_WARNING", 1.0)
    ends = time.time() + 2
    dashboard = await spy.js.connect(spy.url, token=signed(SOUND | {"exp": ends}))
    warning = await dashboard.next_event("auth:expiring")
    end = await dashboard.next_event("error")
    assert ends - 1.5 < warning.wall < end.wall


async def test_a_refreshed_token_keeps_the_connection(spy):
    dashboard = await spy.js.connect(spy.url, token=ending_soon())
    await dashboard.next("auth:expiring")
    assert await dashboard.call("auth:refresh", spy.token(ttl=900)) == {"ok": True}
    await dashboard.call("guilds:list")
    with pytest.raises(AssertionError):
        await dashboard.disconnected(timeout=LIFE + 0.2)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (signed(SOUND | {"discordId": "2"}), "The token is another viewer's"),
        (signed(SOUND | {"exp": 1}), "Invalid token"),
        (signed(key=LONG), "Invalid token"),
        (None, "Authentication required"),
        ({"token": "x"}, "Invalid token"),
        (17, "Invalid token"),
    ],
)
async def test_a_refresh_that_is_refused_changes_nothing(spy, token, message):
    dashboard = await spy.js.connect(spy.url, token=signed(SOUND))
    answer = await dashboard.call("auth:refresh", token)
    assert answer == {"ok": False, "error": {"message": message, "code": "forbidden"}}
    assert (await dashboard.call("guilds:list"))["ok"]


async def test_a_refresh_of_two_arguments_is_a_bad_request(spy):
    dashboard = await spy.js.connect(spy.url, token=signed(SOUND))
    error = {"message": "Expected one argument, the token; got 2", "code": "bad_request"}
    answer = await dashboard.call("auth:refresh", signed(SOUND), {"now": True})
    assert answer == {"ok": False, "error": error}


@pytest.mark.parametrize("transport", ["websocket", "polling"])
async def test_who_turns_out_to_be_banned_is_refused_and_out(spy, transport):
    banned = signed(SOUND | {"role": "BANNED"})
    dashboard = await spy.js.connect(spy.url, token=signed(SOUND), transports=[transport])
    await dashboard.set_auth({"token": banned})
    answer = await dashboard.call("auth:refresh", banned)
    assert answer == {"ok": False, "error": {"message": "Access denied", "code": "forbidden"}}
    await dashboard.disconnected()
    assert (await dashboard.refused()).message == "Access denied"
    await eventually(lambda: not spy.server.socketio.eio.sockets)


async def test_a_refresh_takes_its_rights_with_it(spy, guild):
    dashboard = await spy.js.connect(spy.url, token=spy.token(role="ADMIN"))
    await dashboard.call("subscribe:guild", str(guild.id))
    await dashboard.next("presence:snapshot")
    assert (await dashboard.call("auth:refresh", spy.token(guilds=[str(guild.id)])))["ok"]
    await spy.nothing(dashboard)
    assert (await dashboard.call("auth:refresh", spy.token(guilds=["1"])))["ok"]
    assert (await dashboard.next("error"))["code"] == "forbidden"
    assert not list(spy.server.rooms.names())


async def test_what_a_token_does_not_allow_for_a_moment_is_left(spy, guild):
    dashboard = await spy.js.connect(spy.url, token=spy.token(role="ADMIN"))
    await dashboard.call("subscribe:guild", str(guild.id))
    tokens = spy.token(guilds=["1"]), spy.token(guilds=[str(guild.id)])
    answers = [dashboard.call("auth:refresh", token) for token in tokens]
    assert all(answer["ok"] for answer in await asyncio.gather(*answers))
    assert (await dashboard.next("error"))["code"] == "forbidden"
    assert not list(spy.server.rooms.names())
