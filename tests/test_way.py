"""The way of one event: how many of our own calls lie between the gateway's listener and the socket."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

import spywatcher

#: From the plugin host's subscription, which the gateway calls, to what writes to the client's socket.
MOST_STEPS = 12
FIRST = "Dispatcher._subscription.<locals>.hear"
#: As the map at the top of the file has it: plugin, throttle, address, room, clients.
ORDER = [
    "Guarded.call",
    "Runner._send_result",
    "Throttle.emit",
    "Node.deliver",
    "RightsWatcher.send",
    "Rooms.send",
    "Session.write",
]


def steps(frame: FrameType | None) -> list[str]:
    """Which functions of the server are under way, the first first."""
    names = []
    while frame is not None:
        if frame.f_code.co_filename == spywatcher.__file__:
            names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return names[::-1]


@pytest.mark.parametrize("hidden", [False, True], ids=["for all", "of a channel"])
async def test_an_event_takes_twelve_steps_at_most_to_the_socket(spy, monkeypatch, hidden):
    ways: list[list[str]] = []
    write = spywatcher.Session.write

    def write_and_note(session: spywatcher.Session, *frames: Any) -> Any:
        ways.append([*steps(sys._getframe(1)), "Session.write"])
        return write(session, *frames)

    dashboard = await spy.dashboard()
    monkeypatch.setattr(spywatcher.Session, "write", write_and_note)
    if hidden:
        await spy.discord.message(spy.guild, spy.guild.owner, spy.guild.general)
        await dashboard.next("message:new")
    else:
        await spy.discord.join(spy.guild, "ada")
        await dashboard.next("user:join")
    [way] = [way for way in ways if "Guarded.call" in way]
    way = way[way.index(FIRST) :]
    assert len(way) <= MOST_STEPS, way
    assert [step for step in way if step in ORDER] == ORDER
