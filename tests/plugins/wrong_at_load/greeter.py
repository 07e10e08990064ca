from spywatcher import on_subscribe


@on_subscribe("guild", emit="greeter:hello")
def broken(guild_id): ...
