from spywatcher import PluginSettings


class Setting(PluginSettings, frozen=True):
    limit: int = 1
