"""In the place of the shipped plugin: a history of known counts, from an hour of 28 days ago to now.

`settings.hours` are [hours ago, messages, joins, leaves, active, online].
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from spywatcher import PluginSettings, Spy, on_subscribe


class Settings(PluginSettings, frozen=True):
    hours: tuple[tuple[int, ...], ...] = ()
    members: int = 100


@on_subscribe("history", emit="history:update")
def history_update(_guild_id: str, spy: Spy) -> dict[str, Any]:
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    fields = ("messages", "joins", "leaves", "active", "online")
    hours = [
        {"hour": f"{now - timedelta(hours=ago):%Y-%m-%dT%H:%M:%S.000Z}"}
        | dict(zip(fields, counts, strict=True))
        for ago, *counts in spy.settings.hours
    ]
    return {"hours": hours, "members": spy.settings.members}
