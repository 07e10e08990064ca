"""Throttle: how often one event may go to one room of one guild."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from waiting import eventually

import spywatcher
from spywatcher import Metrics, Throttle, Topic, event_packet

UPDATE = "stats:update"
GUILD, OTHER = "1", "2"


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.time = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._cancelled: set[int] = set()

    def call_later(self, seconds: float, callback: Callable[..., object], *args: object) -> Any:
        number = next(self._order)
        heapq.heappush(self._due, (self.time + seconds, number, lambda: callback(*args)))
        cancelled = self._cancelled
        return type("Timer", (), {"cancel": lambda self: cancelled.add(number)})()

    def advance(self, seconds: float) -> None:
        end = self.time + seconds
        while self._due and self._due[0][0] <= end:
            self.time, number, callback = heapq.heappop(self._due)
            if number not in self._cancelled:
                callback()
        self.time = end


class Wire:
    """What a throttle sent, and when; and whether anybody listens."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.sent: list[tuple[float, str, Any]] = []
        self.listening = True
        self.told: list[tuple[float | None, Any]] = []
        self.metrics = Metrics()
        self.throttle = Throttle(
            {UPDATE: 30.0}, self, self.metrics, call_later=self.clock.call_later, maker_timeout=0.2
        )

    def has_listeners(self, guild_id: str, kind: str) -> bool:
        return self.listening

    def deliver(self, event: str, guild_id: str, fields: dict[str, Any], kind: str) -> None:
        event_packet(event, fields)
        self.sent.append((self.clock.time, guild_id, fields["n"]))

    def window_changed(self, topic: Topic, seconds: float | None, waiting: Any) -> None:
        self.told.append((seconds, waiting))

    def change(self, n: int, guild: str = GUILD, event: str = UPDATE) -> None:
        self.throttle.emit(event, guild, {"n": n}, "guild")


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    wire = Wire()
    yield wire
    await wire.throttle.close()
    assert len(wire.throttle) == 0


async def test_the_first_change_leaves_at_once(wire: Wire) -> None:
    wire.change(1)
    assert wire.sent == [(0.0, GUILD, 1)]


async def test_ten_thousand_changes_in_a_window_give_the_first_and_the_last(wire: Wire) -> None:
    for n in range(10_000):
        wire.change(n)
        wire.clock.advance(29.0 / 10_000)
    wire.clock.advance(100.0)
    assert wire.sent == [(0.0, GUILD, 0), (30.0, GUILD, 9_999)]
    assert wire.metrics.throttled.labels(UPDATE)._value.get() == 9_999


async def test_each_guild_has_its_own_window(wire: Wire) -> None:
    for n in range(100):
        wire.change(n)
        wire.change(-n, OTHER)
    wire.clock.advance(30.0)
    assert wire.sent == [(0, GUILD, 0), (0, OTHER, 0), (30, GUILD, 99), (30, OTHER, -99)]


async def test_steady_changes_leave_once_per_window(wire: Wire) -> None:
    for n in range(100):
        wire.change(n)
        wire.clock.advance(1.0)
    assert [time for time, _, _ in wire.sent] == [0.0, 30.0, 60.0, 90.0]


async def test_a_change_after_a_quiet_window_leaves_at_once(wire: Wire) -> None:
    wire.change(1)
    wire.clock.advance(30.0)
    wire.change(2)
    assert wire.sent == [(0.0, GUILD, 1), (30.0, GUILD, 2)]


async def test_events_without_a_window_are_not_held(wire: Wire) -> None:
    for n in range(5):
        wire.change(n, event="message:new")
    assert [n for _, _, n in wire.sent] == [0, 1, 2, 3, 4]


async def test_windows_that_are_over_are_forgotten(wire: Wire) -> None:
    for guild in range(1_000):
        wire.change(1, str(guild))
        wire.change(2, str(guild))
    assert len(wire.throttle) == 1_000
    wire.clock.advance(60.0)
    assert len(wire.throttle) == 0


def present(wire: Wire, user: str, n: int) -> None:
    wire.throttle.emit(UPDATE, GUILD, {"n": n, "userId": user}, "guild")


async def test_each_member_that_an_event_is_about_has_a_window(wire: Wire) -> None:
    for n in range(6):
        present(wire, str(n), n)
        present(wire, str(n), n + 10)
    wire.clock.advance(30.0)
    assert [n for _, _, n in wire.sent] == [*range(6), *range(10, 16)]


async def test_members_beyond_the_bound_share_one_window(wire: Wire, monkeypatch) -> None:
    monkeypatch.setattr(spywatcher, "MOST_MEMBER_WINDOWS", 2)
    for n in range(100):
        present(wire, str(n), n)
    assert len(wire.throttle) == 3
    wire.clock.advance(30.0)
    assert [n for _, _, n in wire.sent] == [0, 1, 2, 99]
    wire.clock.advance(30.0)
    assert len(wire.throttle) == 0
    present(wire, "200", 200)
    present(wire, "201", 201)
    assert len(wire.throttle) == 2


async def test_a_window_ends_though_its_content_cannot_be_encoded(wire: Wire) -> None:
    with pytest.raises(UnicodeEncodeError):
        wire.throttle.emit(UPDATE, GUILD, {"n": "\ud800"}, "guild")
    wire.change(2)
    wire.clock.advance(30.0)
    assert [n for _, _, n in wire.sent] == [2]


@pytest.mark.logs("stats:update could not be sent: UnicodeEncodeError")
async def test_what_cannot_be_encoded_at_a_window_s_end_holds_up_nothing(wire: Wire) -> None:
    wire.change(1)
    wire.throttle.emit(UPDATE, GUILD, {"n": "\ud800"}, "guild")
    wire.clock.advance(30.0)
    wire.change(3)
    wire.clock.advance(30.0)
    assert [n for _, _, n in wire.sent] == [1, 3]


@pytest.mark.logs("stats:update: not made within 0.2 s")
async def test_a_maker_that_hangs_is_given_up_and_its_window_ends(wire: Wire) -> None:
    async def make() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    wire.throttle.emit(UPDATE, GUILD, make, "guild")
    wire.change(2)
    await eventually(lambda: wire.told[-1][0] == 30.0)
    wire.clock.advance(30.0)
    assert [n for _, _, n in wire.sent] == [2]


@pytest.mark.logs("stats:update could not be sent: ZeroDivisionError")
async def test_a_maker_that_raises_leaves_no_window_open(wire: Wire) -> None:
    async def make() -> dict[str, Any]:
        return {"n": 1 // 0}

    wire.throttle.emit(UPDATE, GUILD, make, "guild")
    await eventually(lambda: wire.told[-1][0] == 30.0)
    wire.clock.advance(30.0)
    assert len(wire.throttle) == 0


async def test_what_nobody_listens_to_is_dropped_and_opens_no_window(wire: Wire) -> None:
    wire.listening = False
    wire.change(1)
    assert len(wire.throttle) == 0
    wire.listening = True
    wire.change(2)
    assert wire.sent == [(0.0, GUILD, 2)]


async def test_what_waits_is_dropped_when_the_last_listener_goes(wire: Wire) -> None:
    wire.change(1)
    wire.change(2)
    wire.listening = False
    wire.clock.advance(30.0)
    assert wire.sent == [(0.0, GUILD, 1)]
    assert len(wire.throttle) == 0


async def test_a_maker_is_called_only_for_what_is_really_sent(wire: Wire) -> None:
    made: list[float] = []

    async def make() -> dict[str, Any]:
        made.append(wire.clock.time)
        return {"n": len(made)}

    for _ in range(10_000):
        wire.throttle.emit(UPDATE, GUILD, make, "guild")
    await eventually(lambda: wire.sent)
    wire.clock.advance(30.0)
    await eventually(lambda: len(wire.sent) == 2)
    wire.clock.advance(100.0)
    assert made == [0.0, 30.0]


async def test_a_change_while_the_first_is_being_made_is_not_lost(wire: Wire) -> None:
    go = asyncio.Event()

    async def make() -> dict[str, Any]:
        await go.wait()
        return {"n": 1}

    wire.throttle.emit(UPDATE, GUILD, make, "guild")
    wire.change(2)
    wire.clock.advance(5.0)
    go.set()
    await eventually(lambda: wire.sent)
    wire.clock.advance(30.0)
    assert wire.sent == [(5.0, GUILD, 1), (35.0, GUILD, 2)]


async def test_a_maker_may_have_nothing_to_send(wire: Wire) -> None:
    asked = asyncio.Event()

    async def make() -> None:
        asked.set()

    wire.throttle.emit(UPDATE, GUILD, make, "guild")
    await asked.wait()
    wire.change(2)
    wire.clock.advance(30.0)
    assert [n for _, _, n in wire.sent] == [2]


async def test_a_window_that_is_set_anew_counts_from_the_next_time(wire: Wire) -> None:
    wire.change(1)
    wire.throttle.windows = {UPDATE: 5.0}
    wire.clock.advance(30.0)
    for n in (2, 3):
        wire.change(n)
    wire.clock.advance(5.0)
    assert [time for time, _, _ in wire.sent] == [0.0, 30.0, 35.0]


async def test_closing_ends_what_is_being_made(wire: Wire) -> None:
    never = asyncio.Event()

    async def make() -> dict[str, Any]:
        await never.wait()
        return {}

    wire.throttle.emit(UPDATE, GUILD, make, "guild")
    wire.throttle.emit("unthrottled", GUILD, make, "guild")
    await wire.throttle.close()
    assert wire.sent == []


async def test_closing_leaves_what_is_being_made_to_whoever_goes_on(wire: Wire) -> None:
    never = asyncio.Event()

    async def make() -> dict[str, Any]:
        await never.wait()
        return {}

    wire.throttle.emit(UPDATE, GUILD, make, "guild")
    await wire.throttle.close()
    assert wire.told == [(0.0, make)]


async def test_a_window_is_told_as_it_opens_is_waited_for_and_ends(wire: Wire) -> None:
    wire.change(1)
    wire.change(2)
    wire.clock.advance(60.0)
    first, second = {"n": 1}, {"n": 2}
    assert wire.told[:3] == [(0.0, first), (30.0, None), (None, second)]
    assert wire.told[3:] == [(0.0, second), (30.0, None), (0.0, None)]


async def test_a_window_of_another_throttle_goes_on(wire: Wire) -> None:
    wire.throttle.resume(Topic(UPDATE, GUILD, "guild"), 10.0, {"n": 1})
    wire.throttle.resume(Topic(UPDATE, OTHER, "guild"), 5.0, None)
    wire.change(2, OTHER)
    wire.clock.advance(100.0)
    assert wire.sent == [(5.0, OTHER, 2), (10.0, GUILD, 1)]
