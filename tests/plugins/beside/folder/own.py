"""A part of a plugin."""

WORLD = "world"
