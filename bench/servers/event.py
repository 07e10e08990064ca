"""The one event of all benchmarks: a `message:new` whose user id says which one it is."""

from __future__ import annotations

GUILD = "613425648685547541"
ROOM = f"guild:{GUILD}"
#: Where the count of events begins: its offsets then have four characters, as from the 65,536th event to
#: the 16,777,216th.
FIRST_POSITION = 1 << 17
#: What an offset adds to an event (docs/websocket-api.md, Reconnecting).
OFFSET_BYTES = len(',"1234"')
SECRET = "the key that all servers of the benchmarks check tokens with"


def elsewhere(number: int) -> str:
    """One of the thousand guilds that no client is in."""
    return str(int(GUILD) + 1 + number % 1000)


def message(number: int, longer: int = 0) -> dict[str, str]:
    """The payload of event `number`; its frame is 190 bytes or so and `longer`, always the same."""
    return {
        "userId": f"1{number:017}",
        "username": "owl" + "-" * longer,
        "channelId": "417719834231439",
        "channelName": "chat",
        "timestamp": "2026-01-01T00:00:00.000Z",
        "guildId": GUILD,
    }
