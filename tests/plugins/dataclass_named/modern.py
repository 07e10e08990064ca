"""Postponed annotations and dataclasses: both look their module up in sys.modules."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, get_type_hints

import spywatcher


@dataclass
class Counter:
    count: int = 0
    total: ClassVar[int] = 0


class Modern(spywatcher.Payload):
    counter: Later


class Later(spywatcher.Payload):
    number: int


FIELDS = [field.name for field in fields(Counter)]
HINTS = get_type_hints(Modern)
