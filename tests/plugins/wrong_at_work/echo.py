"""Hears what it says."""

import hikari

from spywatcher import on


@on(hikari.GuildMessageCreateEvent, emit="echo:a")
def begin(event):
    return {}


@on("echo:a", emit="echo:b")
def again(fields):
    return {}


@on("echo:b", emit="echo:a")
def and_again(fields):
    return {}
