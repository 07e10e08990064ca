"""Tell dashboards who is typing. Teaches: `[throttle]`, and what makes an event once it is sent.

Discord repeats itself every few seconds; with `"typing:start" = 5.0` under `[throttle]` in config.toml
each room is told at most every five seconds, of all who have typed meanwhile.
"""

from collections import defaultdict

import hikari

from spywatcher import Payload, Spy, member_name, on, on_subscribe


class TypingStart(Payload):
    usernames: list[str]


typing: defaultdict[int, set[str]] = defaultdict(set)  # names, by guild


@on(hikari.GuildTypingEvent)
def typed(event: hikari.GuildTypingEvent, spy: Spy) -> None:
    guild_id = event.guild_id
    typing[guild_id].add(member_name(spy.bot.cache, guild_id, event.user_id))

    async def make() -> TypingStart:  # called once a window, and only while somebody listens
        return TypingStart(usernames=sorted(typing.pop(guild_id, ())))

    spy.emit("typing:start", guild_id, make)


@on_subscribe("guild", emit="typing:start")
def nobody_yet(guild_id: str, spy: Spy) -> TypingStart:
    typing.pop(int(guild_id), None)  # nobody listened: what was gathered is old
    return TypingStart(usernames=[])
