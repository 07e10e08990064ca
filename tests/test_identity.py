"""Who comes in, and what they may see: over the JavaScript client, by hikari's cache."""

import time

import jwt
import pytest
from service import SECRET
from waiting import eventually, within

from simulator import Permission

SOUND = {"discordId": "1", "access": True, "role": "USER"}
TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])


def signed(claims, secret=SECRET, algorithm="HS256"):
    return jwt.encode(claims, secret, algorithm=algorithm)


# ---- tokens


@TRANSPORTS
async def test_without_a_token_nobody_comes_in(spy, transport):
    for auth in ({}, {"token": ""}, {"token": None}, None):
        refused = await spy.js.refused(spy.url, auth=auth, transports=[transport])
        assert (refused.message, refused.data) == ("Authentication required", None)


@TRANSPORTS
@pytest.mark.parametrize(
    ("code", "token"),
    [
        ("malformed", "not.a.token"),
        ("malformed", "x"),
        ("malformed", 12345),
        ("malformed", {"token": "nested"}),
        ("malformed", "x" * 9000),
        ("signature", signed(SOUND, "another secret that is long enough")),
        ("signature", signed(SOUND, SECRET * 2, "HS512")),
        ("signature", signed(SOUND, None, "none")),
        ("claims", signed({"access": True, "role": "USER"})),
        ("claims", signed(SOUND | {"discordId": 1})),
        ("claims", signed(SOUND | {"discordId": ""})),
        ("claims", signed(SOUND | {"access": False})),
        ("claims", signed(SOUND | {"access": "true"})),
        ("claims", signed(SOUND | {"role": "KING"})),
        ("claims", signed(SOUND | {"role": ["ADMIN"]})),
        ("claims", signed(SOUND | {"guilds": "1"})),
        ("claims", signed(SOUND | {"guilds": [1]})),
        ("malformed", signed(SOUND | {"exp": "soon"})),
        ("claims", signed(SOUND | {"nbf": int(time.time()) + 86_400})),
        ("expired", signed(SOUND | {"exp": 1})),
    ],
)
async def test_a_bad_token_is_refused_with_what_is_wrong(spy, transport, code, token):
    refused = await spy.js.refused(spy.url, auth={"token": token}, transports=[transport])
    assert (refused.message, refused.data) == ("Invalid token", {"code": code})


@TRANSPORTS
async def test_the_banned_are_denied(spy, transport):
    token = spy.token(role="BANNED")
    refused = await spy.js.refused(spy.url, token=token, transports=[transport])
    assert (refused.message, refused.data) == ("Access denied", None)


@TRANSPORTS
async def test_a_sound_token_comes_in(spy, transport):
    dashboard = await spy.connect("1", transports=[transport])
    assert await dashboard.call("guilds:list") == {
        "ok": True,
        "guilds": [],
        "complete": True,
    }


async def test_a_token_without_exp_never_expires(spy):
    dashboard = await spy.js.connect(spy.url, token=signed(SOUND))
    assert (await dashboard.call("guilds:list"))["ok"]


async def test_a_refusal_says_nothing_of_the_secret_or_the_server(spy):
    refused = await spy.js.refused(spy.url, token=signed(SOUND, SECRET[::-1]))
    assert SECRET not in str(refused.args)
    assert "Traceback" not in str(refused.args)


@pytest.mark.parametrize("auth", ["", "{}", '{"token":"x"}', "[]", '"text"', "17"])
async def test_who_is_refused_loses_the_transport(spy, auth):
    """Stock python-socketio leaves it open, for further attempts without end."""
    raw = await spy.raw()
    async with within(2):
        await raw.send("40" + auth)
        said = await raw.closed()
    assert said[0].startswith('44{"message":"')


async def test_who_is_refused_while_polling_loses_the_session(spy):
    refused = await spy.js.open(spy.url, token="x", transports=["polling"], reconnection=False)
    await refused.refused()
    await eventually(lambda: not spy.server.socketio.eio.sockets, timeout=2)


# ---- what they may see


async def may_view(spy, **viewer):
    """What subscribing to the guild answers to this viewer; `guilds:list` must agree with it."""
    dashboard = await spy.js.connect(spy.url, token=spy.token(**viewer))
    answer = await dashboard.call("subscribe:guild", str(spy.guild.id))
    listed = [guild["id"] for guild in (await dashboard.call("guilds:list"))["guilds"]]
    assert answer["ok"] == (str(spy.guild.id) in listed)
    return answer["ok"]


async def test_an_admin_sees_every_watched_guild(spy):
    assert await may_view(spy, role="ADMIN")


@pytest.mark.parametrize("role", ["USER", "MODERATOR"])
async def test_a_stranger_of_no_admin_role_sees_nothing(spy, role):
    assert not await may_view(spy, role=role)


async def test_admin_roles_are_a_setting(watching):
    async with watching(auth={"admin_roles": ["MODERATOR"]}) as spy:
        assert await may_view(spy, role="MODERATOR")
        assert not await may_view(spy, role="ADMIN")


async def test_a_guilds_claim_names_what_may_be_seen(spy, guild):
    assert await may_view(spy, guilds=[str(guild.id)])
    assert not await may_view(spy, guilds=["1"])


async def test_a_guilds_claim_goes_before_permissions(spy, guild):
    assert not await may_view(spy, viewer=guild.owner, guilds=["1"])


async def test_the_owner_may_view(spy, guild):
    assert await may_view(spy, viewer=guild.owner)


@pytest.mark.parametrize(
    ("permissions", "expected"),
    [
        (Permission.MANAGE_GUILD, True),
        (Permission.ADMINISTRATOR, True),
        (Permission.MANAGE_MESSAGES | Permission.KICK_MEMBERS, False),
        (0, False),
    ],
)
async def test_a_member_needs_the_permission(watching, guild, permissions, expected):
    staff = guild.add_role("Staff", permissions)
    ada = guild.add_member("ada", roles=[guild.add_role("Regular"), staff])
    async with watching() as spy:
        assert await may_view(spy, viewer=ada) == expected


async def test_the_permission_may_come_from_everyone(watching, guild):
    guild.everyone.permissions |= Permission.MANAGE_GUILD
    ada = guild.add_member("ada")
    async with watching() as spy:
        assert await may_view(spy, viewer=ada)


async def test_viewer_permissions_are_a_setting(watching, guild):
    kicker = guild.add_member("k", roles=[guild.add_role("K", Permission.KICK_MEMBERS)])
    manager = guild.add_member("m", roles=[guild.add_role("M", Permission.MANAGE_GUILD)])
    async with watching(auth={"viewer_permissions": ["KICK_MEMBERS", "BAN_MEMBERS"]}) as spy:
        assert await may_view(spy, viewer=kicker)
        assert not await may_view(spy, viewer=manager)


async def test_a_plain_member_sees_nothing(watching, guild):
    ada = guild.add_member("ada")
    async with watching() as spy:
        assert not await may_view(spy, viewer=ada)


@pytest.mark.parametrize("viewer", ["x", "-1", "0x10", "9" * 30, "١٢٣", " "])
async def test_a_discord_id_that_is_no_id_sees_nothing(spy, viewer):
    assert not await may_view(spy, viewer=viewer)


async def test_an_unknown_and_a_forbidden_guild_get_the_same_answer(spy, discord):
    """Nobody may learn where the bot is by asking."""
    dashboard = await spy.connect("1")
    unknown, forbidden = "123456789012345678", str(spy.guild.id)
    answers = [await dashboard.call("subscribe:guild", guild) for guild in (unknown, forbidden)]
    assert [answer["error"]["code"] for answer in answers] == ["forbidden", "forbidden"]
    first, second = (answer["error"]["message"] for answer in answers)
    assert first.replace(unknown, "") == second.replace(forbidden, "")


async def test_an_unwatched_guild_is_unknown_even_to_admins(watching, discord, guild):
    other = discord.add_guild("Elsewhere")
    async with watching(discord={"guilds": [str(guild.id)]}) as spy:
        dashboard = await spy.dashboard()
        answer = await dashboard.call("subscribe:guild", str(other.id))
        assert answer["error"]["code"] == "forbidden"
        listed = (await dashboard.call("guilds:list"))["guilds"]
        assert [found["id"] for found in listed] == [str(guild.id)]
