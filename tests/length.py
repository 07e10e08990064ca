"""How long a test goes on that finds more the longer it goes on.

    CUTS = length(100, 1_000)

is 100, or 1,000 in the long form of all tests: `LONG=1 make test test-cluster`, an hour.
"""

from __future__ import annotations

import os


def length(short: int, long: int) -> int:
    """The first, or the second in the long form."""
    return long if os.environ.get("LONG") else short
