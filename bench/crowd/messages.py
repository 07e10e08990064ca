"""In the place of messages.py and presence.py: a crowd that does `rate` things a second, without Discord."""

import itertools
import random

from spywatcher import PluginSettings, Spy, every, on_subscribe

TICK = 0.02  # seconds
MEMBERS = [
    {"userId": str(n), "username": f"member {n}", "status": "online", "platforms": ["desktop"]}
    for n in range(500)
]
STATUSES = ("online", "idle", "dnd", "offline")
numbers = itertools.count()


class Settings(PluginSettings, frozen=True):
    rate: int = 500


@on_subscribe("guild", emit="presence:snapshot")
def presence_snapshot(_guild_id, _spy):
    counts = dict.fromkeys(STATUSES, 0) | {"online": len(MEMBERS)}
    return {"counts": counts, "members": MEMBERS, "truncated": False}


@every(TICK)
def live(spy: Spy):
    for guild in spy.bot.cache.get_guilds_view():
        for _ in range(round(spy.settings.rate * TICK)):
            spy.emit(*something(str(int(guild))))


def something(guild_id):
    member = random.choice(MEMBERS)
    who = {key: member[key] for key in ("userId", "username")}
    if next(numbers) % 4 == 0:
        return "presence:update", guild_id, who | {"status": random.choice(STATUSES)}
    channel = str(random.randrange(20))
    return (
        "message:new",
        guild_id,
        who | {"channelId": channel, "channelName": f"channel {channel}"},
    )
