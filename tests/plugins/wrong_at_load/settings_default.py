from spywatcher import PluginSettings


class Settings(PluginSettings, frozen=True):
    limit: int
