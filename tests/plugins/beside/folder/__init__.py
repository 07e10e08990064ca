"""A plugin of several files that imports its own, and what lies beside the folder."""

from .._words import HELLO
from .own import WORLD

SAID = f"{HELLO} {WORLD}"
