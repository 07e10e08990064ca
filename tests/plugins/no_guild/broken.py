"""Emits for an event that belongs to no guild."""

import hikari

from spywatcher import on


@on(hikari.ShardConnectedEvent, emit="broken:shard")
def broken(event):
    return {}
