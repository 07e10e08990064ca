"""A plugin of one file that imports what lies beside it."""

from ._words import HELLO

SAID = HELLO
