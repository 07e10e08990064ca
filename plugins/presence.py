"""Tell dashboards who comes and goes, and on how many devices. Teaches: settings and memory."""

import time
from typing import Annotated

import hikari
from msgspec import Meta

from spywatcher import Payload, PluginSettings, Spy, member_name, on

#: Members remembered for `alert_cooldown`; beyond it the longest silent are forgotten.
MOST_REMEMBERED = 100_000


class Settings(PluginSettings, frozen=True):
    alert_cooldown: Annotated[
        float, Meta(ge=0, description="Seconds in which a member causes no second alert.")
    ] = 60.0


class PresenceUpdate(Payload):
    user_id: str
    username: str
    status: str


class MultiClient(Payload):
    user_id: str
    username: str
    platforms: list[str]


_alerted: dict[tuple[int, int], float] = {}


@on(hikari.PresenceUpdateEvent, emit="presence:update")
def presence_update(event: hikari.PresenceUpdateEvent, spy: Spy) -> PresenceUpdate | None:
    status = status_of(event.presence)
    if status == status_of(event.old_presence) or is_bot(event, spy):
        return None  # Discord sends changes of activity too
    return PresenceUpdate(
        user_id=str(event.user_id),
        username=member_name(spy.bot.cache, event.guild_id, event.user_id),
        status=status,
    )


@on(hikari.PresenceUpdateEvent, emit="alert:multiClient", settled=True)
def multi_client(event: hikari.PresenceUpdateEvent, spy: Spy) -> MultiClient | None:
    platforms = platforms_of(event.presence)
    grown = platforms - platforms_of(event.old_presence)
    if len(platforms) < 2 or not grown or is_bot(event, spy):
        return None
    if cooling_down((event.guild_id, event.user_id), spy.settings.alert_cooldown):
        return None
    return MultiClient(
        user_id=str(event.user_id),
        username=member_name(spy.bot.cache, event.guild_id, event.user_id),
        platforms=sorted(platforms),
    )


def status_of(presence: hikari.MemberPresence | None) -> str:
    """hikari keeps no presence of members who are offline."""
    return "offline" if presence is None else str(presence.visible_status)


def platforms_of(presence: hikari.MemberPresence | None) -> set[str]:
    if presence is None:
        return set()
    status = presence.client_status
    named = {"desktop": status.desktop, "mobile": status.mobile, "web": status.web}
    return {name for name, value in named.items() if value != hikari.Status.OFFLINE}


def is_bot(event: hikari.PresenceUpdateEvent, spy: Spy) -> bool:
    member = spy.bot.cache.get_member(event.guild_id, event.user_id)
    return member is not None and member.is_bot


def cooling_down(member: tuple[int, int], cooldown: float) -> bool:
    """Whether the member had an alert a moment ago; if not, it has one now."""
    now = time.monotonic()
    if now - _alerted.pop(member, float("-inf")) < cooldown:
        _alerted[member] = now
        return True
    _alerted[member] = now
    if len(_alerted) > MOST_REMEMBERED:
        del _alerted[next(iter(_alerted))]
    return False
