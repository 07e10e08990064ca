"""Wait for a condition with a deadline, where no event tells that it has come true."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 0.01
"""Seconds between two looks: short beside what tests wait for, long beside what a look costs."""


async def eventually(condition: Callable[[], T | Awaitable[T]], timeout: float = 5.0) -> T:
    """Call `condition` until what it returns (or its coroutine does) is true, and return that.

    An AssertionError inside counts as "not yet". After `timeout` seconds it is raised as it came;
    a condition that was only false raises one that shows the last value.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        late = loop.time() >= deadline
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
