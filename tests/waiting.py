"""Wait for a condition with a deadline, where no event tells that it has come true.

Deadlines go by `clock`: what a promise says of seconds is of a machine that runs. One that is busy,
or is taken away by its host for two seconds, breaks none.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic, process_time, sleep  # by name: tests set those of the module
from typing import NamedTuple, TypeVar

T = TypeVar("T")

INTERVAL = 0.01
"""Seconds between two looks: short beside what tests wait for, long beside what a look costs."""

PATIENCE = 30.0
"""Seconds that a wait may take for which nothing is promised."""


class Pause(NamedTuple):
    """From when to when, in time.monotonic(), this process stood still, but for the seconds that it ran."""

    began: float
    ended: float
    ran: float


class Clock:
    """Seconds for which this process could run.

    A thread looks every hundredth of a second. Of a longer pause between two looks only what the
    process worked counts (a thread that works may let no other one look); the machine was elsewhere.
    """

    TICK = 0.01
    LONGEST_TICK = 0.05

    def __init__(self) -> None:
        self._ran = 0.0
        self._pauses: deque[Pause] = deque(maxlen=1_000)
        self._looked, self._worked = monotonic(), process_time()
        threading.Thread(target=self._tick, name="clock of tests", daemon=True).start()

    def __call__(self) -> float:
        return self._ran

    def _tick(self) -> None:
        while True:
            sleep(self.TICK)
            now, worked = monotonic(), process_time()
            ran = min(now - self._looked, max(self.LONGEST_TICK, worked - self._worked))
            if ran < now - self._looked:
                self._pauses.append(Pause(self._looked, now, ran))
            self._ran += ran
            self._looked, self._worked = now, worked

    def lasted(self, began: float, ended: float) -> float:
        """How many of the seconds between two moments of time.monotonic() this process could run."""
        this = Pause(self._looked, monotonic(), self.LONGEST_TICK)  # perhaps nobody has looked yet
        return (ended - began) - sum(
            max(0.0, min(ended, pause.ended) - max(began, pause.began) - pause.ran)
            for pause in (*self._pauses, this)
        )


clock = Clock()


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """As asyncio.timeout, by this `clock`: TimeoutError after so many seconds."""
    loop, deadline = asyncio.get_running_loop(), clock() + seconds
    timer: asyncio.TimerHandle
    async with asyncio.timeout(None) as limit:

        def look() -> None:
            nonlocal timer
            if (left := deadline - clock()) > 0:
                timer = loop.call_later(left + INTERVAL, look)
            else:
                limit.reschedule(loop.time())

        timer = loop.call_later(seconds, look)
        try:
            yield
        finally:
            timer.cancel()


async def passed(seconds: float) -> None:
    """Return once so many seconds have passed by this `clock`."""
    end = clock() + seconds
    while True:
        await asyncio.sleep(max(0.0, end - clock()))
        if clock() >= end:
            return


async def eventually(condition: Callable[[], T | Awaitable[T]], timeout: float = PATIENCE) -> T:
    """Call `condition` until what it returns (or its coroutine does) is true, and return that.

    An AssertionError inside counts as "not yet". After `timeout` seconds it is raised as it came;
    a condition that was only false raises one that shows the last value.
    """
    deadline = clock() + timeout
    while True:
        late = clock() >= deadline
        try:
            value = condition()
            result: T = await value if inspect.isawaitable(value) else value
            if result:
                return result
        except AssertionError:
            if late:
                raise
        else:
            assert not late, f"not within {timeout} s; the last value was {result!r}"
        await asyncio.sleep(INTERVAL)
