import hikari

from spywatcher import on


@on(hikari.VoiceStateUpdateEvent, emit="voice:move")
def broken(event):
    return {"before": event.old_state}
