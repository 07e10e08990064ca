"""Has settings of its own."""

from typing import Annotated

from msgspec import Meta

from spywatcher import PluginSettings


class Settings(PluginSettings, frozen=True):
    limit: Annotated[int, Meta(ge=1)] = 10
    names: tuple[str, ...] = ()
