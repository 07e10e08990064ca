"""Names of people, roles, channels and guilds: shown as Discord shows them, and nothing unseen."""

# ruff: noqa: RUF001  # names of all scripts are the matter here

from __future__ import annotations

import pytest

#: Names as they come and as they go out.
AS_IT_IS = [
    "Ada Lovelace",
    "👨‍👩‍👧 Families",  # U+200D
    "👩🏽‍🚀 crew",
    "🏳️‍🌈 pride",
    "🏴‍☠️",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f England",
    "1️⃣ first",
    "❤︎ as text",
    "🙂‍↔️ no",
    "می‌خواهم",  # Persian, U+200C
    "۱۳۸۰ ه‍",  # Arabic letter, U+200D
    "ශ්‍රී ලංකා",  # Sinhala
    "അവന്‍",  # Malayalam
    "র‍্যাব",  # Bengali
    "葛\U000e0100城",  # the variant of an ideograph
    "ᠮᠣᠩᠭᠣᠯ\u180eᠠ",  # Mongolian, its vowel separator
    "العربية ـ مِصر",
    "עברית",
    "ภาษาไทย",
    "हिन्दी",
    "한국어 방",
    "日本語・部屋",
    "Ελληνικά",
    "Нічні сови",
    "Tiếng Việt",
    "e\u0301cole",
    "\u0600١٢",  # a number sign of category Cf, which shows
    "⠓⠑⠇⠇⠕⠀⠺⠕⠗⠇⠙",  # Braille, with its blank between
    "𝓕𝓪𝓷𝓬𝔂",
]
CLEANED = {
    "\u202egpj.exe\u202c": "gpj.exe",
    "\u2066a\u2069\u061cb": "ab",
    "a\u200bd\u00ada": "ada",
    "a\u200db": "ab",
    "Art\ufe0fist": "Artist",
    "😀\u200d": "😀",
    "👨\u200d\u200d👩": "👨👩",
    "\ufeffBOM": "BOM",
    "a\U000e0061\U000e0062": "a",
    "🏴\U000e0067": "🏴",
    "a\x00\r\n\tb": "ab",
    "ㅤada\uffa0": "ada",
    "  ada ": "ada",
}
#: Nothing can be seen of these.
UNSEEN = [
    "\u200b",
    "\u3164",
    "\u115f\u1160",
    "\uffa0",
    "\u2800\u2800",
    "\u00a0\u3000",
    "\u202e",
    "\ufe0f",
    "\u200d",
    "\u061c\u200c",
    "\U000e0067\U000e007f",
    "",
]


async def told_roles(spy, dashboard, names):
    """The names of these roles as `role:change` tells them, and their ids."""
    roles = [await spy.discord.role_create(spy.guild, name) for name in names]
    await spy.discord.set_roles(spy.guild, spy.guild.owner, *reversed(roles))
    told = (await dashboard.next("role:change"))["addedRoles"]
    order = sorted(roles, key=lambda role: (-role.position, role.id))
    by_id = {role.id: name for role, name in zip(order, told, strict=True)}
    return [by_id[role.id] for role in roles], [str(role.id) for role in roles]


async def test_what_emoji_and_scripts_need_stays(spy):
    dashboard = await spy.dashboard()
    assert (await told_roles(spy, dashboard, AS_IT_IS))[0] == AS_IT_IS


async def test_all_else_that_is_invisible_goes(spy):
    dashboard = await spy.dashboard()
    assert (await told_roles(spy, dashboard, CLEANED))[0] == list(CLEANED.values())


async def test_a_name_of_which_nothing_can_be_seen_is_the_id(spy):
    dashboard = await spy.dashboard()
    names, ids = await told_roles(spy, dashboard, UNSEEN)
    assert names == ids


async def test_the_same_holds_for_people_channels_threads_and_guilds(spy, discord, guild):
    dashboard = await spy.dashboard()
    ada = await discord.join(guild, "\u3164")
    assert (await dashboard.next("user:join"))["username"] == str(ada.id)
    channel = await discord.channel_create(guild, "\u200b")
    thread = await discord.thread_create(guild, guild.general, "\u2800")
    for place in (channel, thread):
        await discord.message(guild, ada, place)
        event = await dashboard.next("message:new")
        assert (event["username"], event["channelName"]) == (str(ada.id), str(place.id))
    await discord.guild_update(guild, name="\u202e")
    await discord.caught_up()
    [listed] = (await dashboard.call("guilds:list"))["guilds"]
    assert listed["name"] == str(guild.id)


async def test_discords_hundred_characters_go_out_whole(spy, discord, guild):
    dashboard = await spy.dashboard()
    title = "x" * 98 + "é!"
    thread = await discord.thread_create(guild, guild.general, title)
    await discord.message(guild, guild.owner, thread)
    assert (await dashboard.next("message:new"))["channelName"] == title
    twins = ["y" * 64 + "1", "y" * 64 + "2"]
    assert (await told_roles(spy, dashboard, twins))[0] == twins
    await discord.guild_update(guild, name=title)
    await discord.caught_up()
    [listed] = (await dashboard.call("guilds:list"))["guilds"]
    assert listed["name"] == title


@pytest.mark.parametrize(
    ("whole", "shown"),
    [
        ("x" * 70, "x" * 64),
        ("x" * 63 + "👩🏽‍🚀 and more", "x" * 63),
        ("x" * 63 + "e\u0301cole", "x" * 63),
        ("x" * 63 + "🇩🇪🇫🇷", "x" * 63),
        ("x" * 62 + "🇩🇪🇫🇷", "x" * 62 + "🇩🇪"),
        ("x" * 62 + "1️⃣", "x" * 62),
    ],
)
async def test_a_name_too_long_is_never_cut_within_what_is_read_as_one(
    spy, discord, guild, whole, shown
):
    dashboard = await spy.dashboard()
    await discord.join(guild, whole)
    assert (await dashboard.next("user:join"))["username"] == shown
