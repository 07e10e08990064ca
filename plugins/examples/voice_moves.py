"""Tell dashboards who joins, leaves or changes voice channels. Teaches: how it was before."""

from typing import Literal

import hikari

from spywatcher import Payload, Spy, channel_name, member_name, on

needs = {"voice"}  # without it old_state is always None, and every move looks like a join


class VoiceMove(Payload):
    user_id: str
    username: str
    action: Literal["joined", "left", "moved"]
    channel_id: str  # of where the member is now or, having left, was
    channel_name: str


@on(hikari.VoiceStateUpdateEvent, emit="voice:move")
def voice_move(event: hikari.VoiceStateUpdateEvent, spy: Spy) -> VoiceMove | None:
    before = event.old_state.channel_id if event.old_state else None
    after = event.state.channel_id
    channel_id = after or before
    if before == after or channel_id is None:  # muted, or shares the screen
        return None
    return VoiceMove(
        user_id=str(event.state.user_id),
        username=member_name(spy.bot.cache, event.guild_id, event.state.user_id),
        action="joined" if before is None else "left" if after is None else "moved",
        channel_id=str(channel_id),
        channel_name=channel_name(spy.bot.cache, channel_id),
    )
