"""user:join and role:change, from Discord's JSON to the page."""

import re

import pytest

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


# ---- user:join


@TRANSPORTS
async def test_a_join_has_exactly_the_documented_fields(spy, discord, guild, transport):
    dashboard = await spy.dashboard(transports=[transport])
    ada = await discord.join(guild, "ada", account_age_days=12.5)
    event = await dashboard.next_event("user:join")
    assert ISO.fullmatch(event.data.pop("timestamp"))
    assert event.args == (
        {
            "userId": str(ada.id),
            "username": "ada",
            "accountAgeDays": 12,
            "guildId": str(guild.id),
        },
    )


@pytest.mark.parametrize(
    ("days", "told"), [(0.0, 0), (0.9, 0), (1.1, 1), (3000.5, 3000), (-2.0, 0)]
)
async def test_the_age_of_an_account_is_whole_days_and_never_negative(
    spy, discord, guild, days, told
):
    dashboard = await spy.dashboard()
    await discord.join(guild, "ada", account_age_days=days)
    assert (await dashboard.next("user:join"))["accountAgeDays"] == told


async def test_bots_join_silently(spy, discord, guild):
    dashboard = await spy.dashboard()
    await discord.join(guild, "robot", bot=True)
    await spy.nothing(dashboard)


async def test_who_leaves_and_joins_again_is_told_twice(spy, discord, guild):
    dashboard = await spy.dashboard()
    ada = await discord.join(guild, "ada")
    await discord.leave(guild, ada)
    await discord.join(guild, "ada", user=ada.user)
    assert [(await dashboard.next("user:join"))["userId"] for _ in range(2)] == [str(ada.id)] * 2


async def test_who_was_there_at_the_start_has_not_joined(spy):
    dashboard = await spy.dashboard()
    await spy.nothing(dashboard)


# ---- user:leave


@TRANSPORTS
async def test_a_leave_has_exactly_the_documented_fields(spy, discord, guild, transport):
    dashboard = await spy.dashboard(transports=[transport])
    ada = await discord.join(guild, "ada")
    await discord.leave(guild, ada)
    event = await dashboard.next_event("user:leave")
    assert ISO.fullmatch(event.data.pop("timestamp"))
    assert event.args == ({"userId": str(ada.id), "username": "ada", "guildId": str(guild.id)},)


async def test_bots_leave_silently(spy, discord, guild):
    robot = await discord.join(guild, "robot", bot=True)
    dashboard = await spy.dashboard()
    await discord.leave(guild, robot)
    await spy.nothing(dashboard)


# ---- role:change


@TRANSPORTS
async def test_a_gained_role_has_exactly_the_documented_fields(watching, discord, guild, transport):
    artist = guild.add_role("Artist")
    ada = guild.add_member("ada")
    async with watching() as spy:
        dashboard = await spy.dashboard(transports=[transport])
        await discord.add_role(guild, ada, artist)
        event = await dashboard.next_event("role:change")
        assert ISO.fullmatch(event.data.pop("timestamp"))
        assert event.args == (
            {
                "userId": str(ada.id),
                "username": "ada",
                "addedRoles": ["Artist"],
                "guildId": str(guild.id),
            },
        )


@pytest.fixture
def ranks(guild):
    """Three roles, the highest last."""
    return [guild.add_role(name) for name in ("low", "middle", "high")]


async def test_several_roles_come_in_the_order_of_the_role_list(watching, discord, guild, ranks):
    ada = guild.add_member("ada")
    low, middle, high = ranks
    async with watching() as spy:
        dashboard = await spy.dashboard()
        await discord.set_roles(guild, ada, middle, low, high)
        assert (await dashboard.next("role:change"))["addedRoles"] == ["high", "middle", "low"]


async def test_only_what_was_gained_is_told(watching, discord, guild, ranks):
    low, middle, high = ranks
    ada = guild.add_member("ada", roles=[low, middle])
    async with watching() as spy:
        dashboard = await spy.dashboard()
        await discord.set_roles(guild, ada, middle, high)
        assert (await dashboard.next("role:change"))["addedRoles"] == ["high"]


async def test_a_lost_role_and_other_changes_are_silent(watching, discord, guild, ranks):
    ada = guild.add_member("ada", roles=ranks)
    async with watching() as spy:
        dashboard = await spy.dashboard()
        await discord.remove_role(guild, ada, ranks[0])
        await discord.rename(guild, ada, nick="countess")
        await discord.set_roles(guild, ada)
        await spy.nothing(dashboard)


async def test_a_member_that_was_not_cached_gains_nothing(spy, discord, guild):
    """Everything would look new."""
    dashboard = await spy.dashboard()
    role = await discord.role_create(guild, "Artist")
    stranger = guild.add_member("stranger")
    await discord.add_role(guild, stranger, role)
    await spy.nothing(dashboard)
    another = await discord.role_create(guild, "Veteran")
    await discord.add_role(guild, stranger, another)
    assert (await dashboard.next("role:change"))["addedRoles"] == ["Veteran"]


async def test_a_role_that_discord_has_not_sent_is_not_told(spy, discord, guild):
    """`addedRoles` holds names and is never empty."""
    dashboard = await spy.dashboard()
    unheard = guild.add_role("unheard of")
    await discord.add_role(guild, guild.owner, unheard)
    await spy.nothing(dashboard)


async def test_a_bot_that_is_invited_gains_its_role_silently(spy, discord, guild):
    dashboard = await spy.dashboard()
    robot = await discord.join(guild, "robot", bot=True)
    role = await discord.role_create(guild, "robot")
    await discord.add_role(guild, robot, role)
    await spy.nothing(dashboard)


async def test_after_a_new_session_roles_wait_for_the_grace(watching, discord, guild, ranks):
    async with watching(discord={"startup_grace": 30.0}) as spy:
        dashboard = await spy.dashboard()
        await discord.set_roles(guild, guild.owner, *ranks)
        await spy.nothing(dashboard)


async def test_names_of_roles_and_people_are_cleaned(spy, discord, guild):
    dashboard = await spy.dashboard()
    ada = await discord.join(guild, "a\u202eda")
    role = await discord.role_create(guild, "Art\u200bist" + "x" * 80)
    await discord.add_role(guild, ada, role)
    event = await dashboard.next("role:change")
    assert event["username"] == "ada"
    assert event["addedRoles"] == ["Artist" + "x" * 80]
