"""Fan-out: who gets which bytes when, what a slow client costs, and that nobody else notices."""

import asyncio
import contextlib
import inspect
import json
import logging
import re
import socket
import ssl
import struct
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.netutil import bind_sockets
from tornado.websocket import websocket_connect
from waiting import clock, eventually
from watching import RawClient

import spywatcher
from spywatcher import Session, State

NAMESPACE = "/"


def cut_off(spy, reason="too slow"):
    """How many clients were cut off for this reason."""
    name = "spywatcher_cut_connections_total"
    return spy.server.metrics.registry.get_sample_value(name, {"reason": reason}) or 0


def broadcast(rooms, room, event, payload, hidden=None):
    packet = spywatcher.event_packet(event, payload)
    rooms.send(room, spywatcher.RoomFrame.of(packet), hidden)


def session_of(spy, client):
    return spy.server.socketio.session_of(client.sid)


class Wire:
    """A client of Socket.IO on bare HTTP and WebSocket, which keeps all that it gets in order."""

    def __init__(self, spy):
        self._spy = spy
        self._url = f"{spy.address}/socket.io/?EIO=4"
        self._socket = None
        self._reader = None
        self._may_read = asyncio.Event()
        self._may_read.set()
        self.events = []  # the arguments of each event, with its name
        self.sid = self.engine_sid = self.welcome = None

    @classmethod
    async def connect(cls, spy, transport="websocket"):
        wire = cls(spy)
        connect = "40" + json.dumps({"token": spy.token(role="ADMIN")})
        if transport == "websocket":
            wire._socket = await websocket_connect(f"ws://{wire._url}&transport=websocket")
            wire.take(await wire._socket.read_message())
            await wire._socket.write_message(connect)
            wire._reader = asyncio.create_task(wire._read_socket())
        else:
            wire.take(await wire.get())
            await wire.post(connect)
            wire._reader = asyncio.create_task(wire._poll())
        await eventually(lambda: wire.welcome)
        return wire

    async def get(self):
        url = f"http://{self._url}&transport=polling"
        sid = f"&sid={self.engine_sid}" if self.engine_sid else ""
        response = await AsyncHTTPClient().fetch(url + sid, request_timeout=30)
        return response.body.decode()

    async def post(self, body):
        url = f"http://{self._url}&transport=polling&sid={self.engine_sid}"
        await AsyncHTTPClient().fetch(url, method="POST", body=body)

    def take(self, body):
        """Note what came; returns whether polling may go on (Engine.IO: NOOP ends it)."""
        for packet in body.split("\x1e"):
            if packet.startswith("0"):
                self.engine_sid = json.loads(packet[1:])["sid"]
            elif packet.startswith("40"):
                self.sid = json.loads(packet[2:])["sid"]
            elif packet.startswith('42["session"'):
                self.welcome = packet
            elif packet.startswith("42"):
                self.events.append(json.loads(packet[2:]))
        return "6" not in body.split("\x1e")

    async def _poll(self):
        while self.take(await self.get()):
            await self._may_read.wait()

    async def _read_socket(self):
        while (packet := await self._socket.read_message()) is not None:
            await self._may_read.wait()
            self.take(packet)

    async def upgrade(self):
        """Go over from polling to WebSocket (Engine.IO protocol v4, Upgrade)."""
        if self._socket is not None:
            return
        self._may_read.set()
        url = f"ws://{self._url}&transport=websocket&sid={self.engine_sid}"
        self._socket = await websocket_connect(url)
        await self._socket.write_message("2probe")
        assert await self._socket.read_message() == "3probe"
        await self._reader
        await self._socket.write_message("5")
        self._reader = asyncio.create_task(self._read_socket())

    def pause(self):
        self._may_read.clear()

    def resume(self):
        self._may_read.set()

    async def close(self):
        self._may_read.set()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, HTTPClientError):
            await self._reader
        if self._socket is not None:
            self._socket.close()
        elif self.engine_sid in self._spy.server.socketio.eio.sockets:
            await self.post("1")

    def numbers(self):
        return [arguments[1] for arguments in self.events]


@contextlib.asynccontextmanager
async def wires(spy, *transports, room="guild:1"):
    """Connected clients, in a room."""
    clients = [await Wire.connect(spy, transport) for transport in transports]
    for client in clients:
        spy.server.rooms.enter(client.sid, room)
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()
        await eventually(lambda: not spy.server.socketio.eio.sockets)


@pytest.fixture
def writes(monkeypatch):
    """Each write to a client, as it happens: the session, how many frames, the bytes."""
    noted = []
    original = Session.write

    def write(session, frames):
        noted.append((session, len(list(spywatcher.packets_in(frames))), frames))
        return original(session, frames)

    monkeypatch.setattr(Session, "write", write)
    return noted


# ---- one event, many clients


async def test_all_clients_are_written_the_same_bytes(spy, writes):
    async with wires(spy, "websocket", "websocket", "polling"):
        writes.clear()
        broadcast(spy.server.rooms, "guild:1", "x", 1)
        assert len(writes) == 3
        assert len({id(data) for _, _, data in writes}) == 1


async def test_nobody_is_asked_for_who_may_see_an_event_that_nobody_hears(spy):
    rooms = spy.server.rooms
    broadcast(rooms, "guild:1", "x", 1, lambda: pytest.fail("asked who may see it"))
    assert not rooms.has_listeners("guild:1")


async def test_an_event_does_not_reach_those_it_is_hidden_from(spy):
    async with wires(spy, "websocket", "websocket", "polling") as (one, two, three):
        hidden = frozenset([two.sid])
        for number in range(20):
            secret = number % 2 == 1
            broadcast(
                spy.server.rooms, "guild:1", "x", number, (lambda: hidden) if secret else None
            )
        await eventually(lambda: len(one.events) == len(three.events) == 2 * len(two.events) == 20)
        assert one.numbers() == three.numbers() == list(range(20))
        assert two.numbers() == list(range(0, 20, 2))


@pytest.mark.parametrize("size", [1, 125, 126, 65_535, 65_536, 200_000])
async def test_frames_of_every_length_arrive_by_every_way(spy, size):
    async with wires(spy, "websocket", "polling") as clients:
        broadcast(spy.server.rooms, "guild:1", "x", "ä" + "x" * size)
        for client in clients:
            await eventually(lambda client=client: client.events)
            assert client.events == [["x", "ä" + "x" * size]]


# ---- bursts


async def test_the_first_event_of_a_burst_leaves_at_once_and_the_rest_in_one_write(spy, writes):
    async with wires(spy, "websocket") as (client,):
        writes.clear()
        for number in range(50):
            broadcast(spy.server.rooms, "guild:1", "x", number)
        assert [frames for _, frames, _ in writes] == [1]
        await eventually(lambda: len(client.events) == 50)
        assert [frames for _, frames, _ in writes] == [1, 49]
        assert client.numbers() == list(range(50))


async def test_single_events_in_turn_never_wait(spy, writes):
    async with wires(spy, "websocket") as (client,):
        writes.clear()
        for number in range(30):
            broadcast(spy.server.rooms, "guild:1", "x", number)
            assert len(writes) == number + 1
            await eventually(lambda number=number: len(client.events) == number + 1)


async def test_an_idle_room_does_not_wait_for_one_that_rests(watching, writes, monkeypatch):
    monkeypatch.setattr(spywatcher, "REST_PER_COST", 1e9)  # every burst rests as long as it may
    async with watching(fanout={"max_delay": 60.0}) as spy, wires(spy, "websocket") as (busy,):
        other = await Wire.connect(spy)
        spy.server.rooms.enter(other.sid, "guild:2")
        for number in range(3):
            broadcast(spy.server.rooms, "guild:1", "x", number)
        await eventually(lambda: len(busy.events) == 3)
        broadcast(spy.server.rooms, "guild:1", "x", 3)  # rests for a minute
        writes.clear()
        broadcast(spy.server.rooms, "guild:2", "x", 0)
        assert len(writes) == 1
        await other.close()


async def test_rest_never_exceeds_max_delay(watching, monkeypatch):
    monkeypatch.setattr(spywatcher, "REST_PER_COST", 1e9)
    async with watching(fanout={"max_delay": 0.1}) as spy, wires(spy, "websocket") as (client,):
        start = clock()
        for number in range(10):
            broadcast(spy.server.rooms, "guild:1", "x", number)
            broadcast(spy.server.rooms, "guild:1", "x", number)
            await eventually(lambda number=number: len(client.events) == 2 * number + 2)
        assert clock() - start < 10 * (0.1 + 0.1)


async def test_order_holds_across_rooms(spy):
    """Events to different rooms reach a client of both as they were sent, also in bursts."""
    async with wires(spy, "websocket", "polling") as clients:
        for client in clients:
            spy.server.rooms.enter(client.sid, "guild:2")
        for number in range(300):
            broadcast(spy.server.rooms, f"guild:{1 + number % 2}", "x", number)
            if number % 7 == 0:
                await asyncio.sleep(0)
        for client in clients:
            await eventually(lambda client=client: len(client.events) == 300)
            assert client.numbers() == list(range(300))


async def test_an_event_behind_more_than_one_write_of_another_room_arrives(spy):
    async with wires(spy, "websocket") as (client,):
        spy.server.rooms.enter(client.sid, "guild:2")
        for number in range(5):
            broadcast(spy.server.rooms, "guild:1", "x", [number, "x" * 20_000])
        broadcast(spy.server.rooms, "guild:2", "x", [5, "x" * spywatcher.MAX_WRITE_BYTES])
        await eventually(lambda: len(client.events) == 6)
        assert [number for number, _ in client.numbers()] == list(range(6))


async def test_who_comes_in_the_middle_of_a_burst_gets_only_the_later_part(spy):
    rooms = spy.server.rooms
    async with wires(spy, "websocket") as (early,):
        late = await Wire.connect(spy)
        for number in range(20):
            if number == 10:
                rooms.enter(late.sid, "guild:1")
            broadcast(rooms, "guild:1", "x", number)
        await eventually(lambda: len(early.events) == 20 and len(late.events) == 10)
        assert late.numbers() == list(range(10, 20))
        await late.close()


async def test_who_leaves_in_the_middle_of_a_burst_gets_the_part_before_that_it_may_see(spy):
    rooms = spy.server.rooms
    async with wires(spy, "websocket", "websocket") as (stays, goes):
        hidden = frozenset([goes.sid])
        for number in range(20):
            secret = number % 2 == 1
            broadcast(rooms, "guild:1", "x", number, (lambda: hidden) if secret else None)
        rooms.leave(goes.sid, "guild:1")
        broadcast(rooms, "guild:1", "x", 20)
        await eventually(lambda: len(stays.events) == 21 and len(goes.events) == 10)
        assert goes.numbers() == list(range(0, 20, 2))


async def test_who_is_expelled_does_not_even_get_what_waits(spy):
    async with wires(spy, "websocket", "websocket") as (stays, goes):
        for number in range(20):
            broadcast(spy.server.rooms, "guild:1", "x", number)
        spy.server.rooms.expel(goes.sid, "guild:1")
        await eventually(lambda: len(stays.events) == 20 and goes.events)
        assert goes.numbers() == [0]


async def test_readers_survive_a_burst_of_many_times_their_queue(watching):
    async with watching(server={"max_queue_bytes": 262_144}) as spy:
        room = f"guild:{spy.guild.id}"
        readings = [asyncio.create_task(asyncio.to_thread(read_until_the_end, spy)) for _ in "12"]
        await eventually(lambda: len(tuple(spy.server.rooms.members(room))) == 2)
        for number in range(4_000):  # 4 MB in one turn of the loop
            broadcast(spy.server.rooms, room, "x", [number, "x" * 1_000])
        broadcast(spy.server.rooms, room, "x", "the end")
        for read in await asyncio.gather(*readings):
            assert [int(n) for n in re.findall(rb'"x",.([0-9]+),', read)] == list(range(4_000))
        assert cut_off(spy) == 0


def read_until_the_end(spy):
    """A client in a thread of its own; all that it got."""
    http = (
        "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", spy.server.port), timeout=30) as client:
        client.sendall(http.encode())
        got = bytearray()
        for until, packet in (
            (b'0{"sid"', "40" + json.dumps({"token": spy.token(role="ADMIN")})),
            (b'40{"sid"', f'42["subscribe:guild","{spy.guild.id}"]'),
            (b"the end", ""),
        ):
            while until not in got[-400:]:
                got += client.recv(1 << 18)
            # A mask of zeros leaves the payload as it is.
            head = struct.pack("!BBHI", 0x81, 0xFE, len(packet), 0)
            client.sendall(head + packet.encode())
    return bytes(got)


async def test_what_waits_for_a_room_is_bounded(spy, writes):
    async with wires(spy, "websocket") as (client,):
        size = 100_000
        for number in range(2 * spywatcher.MAX_BACKLOG_BYTES // size):
            broadcast(spy.server.rooms, "guild:1", "x", "x" * size)
            written = sum(len(data) for _, _, data in writes)
            assert (number + 1) * size - written <= spywatcher.MAX_BACKLOG_BYTES + size
        await client.close()


# ---- slow clients


async def test_a_polling_client_that_never_polls_again_is_cut_off(watching):
    async with watching(server={"max_queue_bytes": 65_536}) as spy:
        silent = await Wire.connect(spy, "polling")
        spy.server.rooms.enter(silent.sid, "guild:1")
        silent.pause()
        for _ in range(30):
            broadcast(spy.server.rooms, "guild:1", "x", "x" * 10_000)
            await asyncio.sleep(0)
        await eventually(lambda: not spy.server.socketio.eio.sockets, timeout=10)
        assert cut_off(spy) == 1
        await silent.close()


async def test_a_poll_whose_answer_is_not_read_counts_as_waiting(watching):
    async with watching(server={"max_queue_bytes": 8_000_000}) as spy:
        client = await Wire.connect(spy, "polling")
        spy.server.rooms.enter(client.sid, "guild:1")
        client.pause()
        broadcast(spy.server.rooms, "guild:1", "x", "x" * 7_000_000)  # fits, and is fetched
        await eventually(lambda: client.events)
        assert cut_off(spy) == 0
        broadcast(spy.server.rooms, "guild:1", "x", "x" * 2_000_000)  # no further poll: too much
        await eventually(lambda: not spy.server.socketio.eio.sockets)
        assert cut_off(spy) == 1
        await client.close()


async def test_who_answers_pings_but_never_reads_its_poll_is_let_go_by_the_kernel(watching):
    """After `interval` and `timeout` of the heartbeat, a second here."""
    settings = {"server": {"max_queue_bytes": 8_000_000}}
    async with watching(**settings, heartbeat={"interval": 0.5, "timeout": 0.5}) as spy:
        client = Wire(spy)
        client.take(await client.get())
        await client.post("40" + json.dumps({"token": spy.token(role="ADMIN")}))
        client.take(await client.get())
        spy.server.rooms.enter(client.sid, "guild:1")
        with socket.create_connection(("127.0.0.1", spy.server.port)) as deaf:
            path = f"/socket.io/?EIO=4&transport=polling&sid={client.engine_sid}"
            deaf.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            session = session_of(spy, client)
            await eventually(lambda: session.queue.polled)
            stream = spywatcher.stream_of(session.queue.poller)
            broadcast(spy.server.rooms, "guild:1", "x", "x" * 7_500_000)
            await eventually(stream.writing)

            async def is_over():
                await client.post("3")
                return stream.closed()

            await eventually(is_over, timeout=3)
            assert cut_off(spy) == 0


async def test_a_client_that_pings_without_reading_is_cut_off_without_a_log_line(watching):
    """Tornado answers each WebSocket ping by itself, into the same buffer."""
    async with watching(server={"max_queue_bytes": 65_536}) as spy:
        raw = await spy.raw(spy.token(role="ADMIN"))
        await raw.send(f'42["subscribe:guild","{spy.guild.id}"]')
        room = f"guild:{spy.guild.id}"
        await eventually(lambda: spy.server.rooms.has_listeners(room))
        raw.stop_reading()
        while spy.server.rooms.has_listeners(room):
            raw.socket.ping(b"x" * 100)
            broadcast(spy.server.rooms, room, "x", "x" * 5_000)
            await asyncio.sleep(0)
        assert cut_off(spy) == 1


@pytest.mark.parametrize("size", [100, 4_000, 100_000])
async def test_no_more_than_max_queue_bytes_ever_wait(watching, size):
    async with watching(server={"max_queue_bytes": 65_536}) as spy:
        raw = await spy.raw(spy.token(role="ADMIN"))
        await raw.send(f'42["subscribe:guild","{spy.guild.id}"]')
        room = f"guild:{spy.guild.id}"
        await eventually(lambda: spy.server.rooms.has_listeners(room))
        (session,) = spy.server.socketio.eio.sockets.values()
        stream = spywatcher.websocket_stream(session.handler)
        raw.stop_reading()
        most = 0
        while spy.server.rooms.has_listeners(room):
            broadcast(spy.server.rooms, room, "x", "x" * size)
            most = max(most, len(stream._write_buffer or ()))  # no public name tells how much
            await asyncio.sleep(0)
        # What is left is for frames that Tornado writes by itself: a pong, a close frame.
        assert most <= 65_536 - spywatcher.CONTROL_BYTES


async def test_who_is_cut_off_loses_the_transport(watching, caplog):
    caplog.set_level(logging.INFO)
    async with watching(server={"max_queue_bytes": 65_536}) as spy:
        async with wires(spy, "websocket") as (client,):
            session = session_of(spy, client)
            stream = spywatcher.websocket_stream(session.handler)
            session.cut("too slow")
            await eventually(stream.closed)
        assert "127.0.0.1 cut off: too slow" in caplog.text
        assert cut_off(spy) == 1


# ---- polls and upgrades


async def test_two_polls_at_once_end_the_session(spy):
    client = await Wire.connect(spy, "polling")
    with contextlib.suppress(HTTPClientError):
        await client.get()
    await eventually(lambda: not spy.server.socketio.eio.sockets)
    assert cut_off(spy, "overlapping polls") == 1
    await asyncio.wait([client._reader])  # the other poll is answered with 400
    await client.close()


async def test_a_poll_that_is_broken_off_ends_the_session(spy):
    """What the server would have answered is lost: the client has to come again to know it."""
    _, writer = await asyncio.open_connection("127.0.0.1", spy.server.port)
    client = Wire(spy)
    client.take(await client.get())
    path = f"/socket.io/?EIO=4&transport=polling&sid={client.engine_sid}"
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    session = spy.server.socketio.eio.sockets[client.engine_sid]
    await eventually(lambda: session.queue.polled)
    writer.close()
    await eventually(lambda: not spy.server.socketio.eio.sockets)


async def test_only_one_websocket_may_take_over(spy):
    client = await Wire.connect(spy, "polling")
    url = f"ws://{spy.address}/socket.io/?EIO=4&transport=websocket&sid={client.engine_sid}"
    first, second = await websocket_connect(url), await websocket_connect(url)
    assert await second.read_message() is None
    await first.write_message("2probe")
    assert await first.read_message() == "3probe"
    first.close()
    second.close()
    await eventually(lambda: session_of(spy, client)._prober is None)
    await client.close()


async def test_a_broken_off_upgrade_leaves_polling_as_it_was(spy):
    client = await Wire.connect(spy, "polling")
    url = f"ws://{spy.address}/socket.io/?EIO=4&transport=websocket&sid={client.engine_sid}"
    probing = await websocket_connect(url)
    await probing.write_message("2probe")
    assert await probing.read_message() == "3probe"
    await client._reader
    probing.close()
    session = session_of(spy, client)
    await eventually(lambda: session.state is State.POLLING)
    spy.server.rooms.enter(client.sid, "guild:1")
    broadcast(spy.server.rooms, "guild:1", "x", 1)
    client.take(await client.get())
    assert client.numbers() == [1]
    await client.close()


async def test_under_tls_only_the_stream_writes(spy, tmp_path):
    """A raw `send` on the socket below would be plain text between two TLS records."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(self_signed(tmp_path / "certificate.pem"))
    web = spywatcher.WebServer(spy.server.web.request_callback, ssl_options=context)
    web.door, web.patience = spy.server.door, 60.0
    (listener,) = bind_sockets(0, "127.0.0.1")
    web.add_socket(listener)
    url = f"wss://127.0.0.1:{listener.getsockname()[1]}/socket.io/?EIO=4&transport=websocket"
    wss = await websocket_connect(HTTPRequest(url, validate_cert=False))
    raw = RawClient(wss, await wss.read_message())
    await raw.send("40" + json.dumps({"token": spy.token(role="ADMIN")}))
    sid = json.loads((await raw.read())[2:])["sid"]
    assert '"session"' in await raw.read()
    spy.server.rooms.enter(sid, "guild:1")
    for number in range(100):
        broadcast(spy.server.rooms, "guild:1", "x", number)
    assert [json.loads((await raw.read())[2:])[1] for _ in range(100)] == list(range(100))
    wss.close()
    web.stop()
    await eventually(lambda: not spy.server.socketio.eio.sockets)


def self_signed(path):
    """A certificate and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    pem = serialization.Encoding.PEM
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(pem)
    path.write_bytes(key.private_bytes(pem, form, plain) + certificate)
    return path


async def test_who_goes_while_the_connect_handler_is_at_work_leaves_nothing(spy):
    going = asyncio.Event()
    sio = spy.server.socketio
    connect = sio.handlers[NAMESPACE]["connect"]

    async def slow(sid, environ, auth):
        going.set()
        await eventually(lambda: not sio.eio.sockets)
        await connect(sid, environ, auth)

    sio.on("connect", slow)
    raw = await spy.raw()
    await raw.send("40" + json.dumps({"token": spy.token(role="ADMIN")}))
    await going.wait()
    (session,) = sio.eio.sockets.values()
    session.cut("test")
    await eventually(lambda: not sio.environ and not sio.manager.rooms)
    await eventually(lambda: not sio.manager.pending_connect)


async def test_made_up_namespaces_leave_nothing(spy):
    raw = await spy.raw()
    for number in range(5):
        await raw.send(f"40/{number},")
        assert (await raw.read()).startswith(f"44/{number}")
    manager = spy.server.socketio.manager
    assert manager.rooms == manager.pending_connect == manager.pending_disconnect == {}


# ---- anything in any order

CLIENTS = st.integers(0, 3)
ROOMS = st.sampled_from(["guild:1", "guild:2"])
STEPS = st.one_of(
    st.tuples(st.just("emit"), ROOMS, st.integers(1, 40)),
    st.tuples(st.just("hide"), ROOMS, CLIENTS),
    st.tuples(st.sampled_from(["join", "leave"]), CLIENTS, ROOMS),
    st.tuples(st.sampled_from(["pause", "resume", "upgrade", "close"]), CLIENTS),
    st.tuples(st.just("turn"), st.sampled_from([0.0, 0.0, 0.002, 0.02])),
)


@pytest.fixture
async def crowd(watching):
    """A server that does not mind a thousand connections a minute from one address."""
    async with watching(limits={"attempts_per_ip": "100000/minute"}) as spy:
        yield spy


class Story:
    """Some clients, what happens to them, and what each must have got by then."""

    def __init__(self, spy, clients):
        self.rooms = spy.server.rooms
        self.clients = clients
        self.members = {"guild:1": set(), "guild:2": set()}
        self.due = [[] for _ in clients]
        self.gone = set()
        self.number = 0

    def emit(self, room, count, blind=()):
        hidden = frozenset(self.clients[index].sid for index in blind)
        for _ in range(count):
            self.number += 1
            broadcast(self.rooms, room, "x", self.number, lambda: hidden)
            for index in self.members[room] - set(blind):
                self.due[index].append(self.number)

    def hide(self, room, index):
        self.emit(room, 3, [index])

    async def join(self, index, room):
        if index not in self.gone:
            self.rooms.enter(self.clients[index].sid, room)
            self.members[room].add(index)

    async def leave(self, index, room):
        self.rooms.leave(self.clients[index].sid, room)
        self.members[room].discard(index)

    async def upgrade(self, index):
        if index not in self.gone:
            await self.clients[index].upgrade()

    def pause(self, index):
        self.clients[index].pause()

    def resume(self, index):
        self.clients[index].resume()

    async def close(self, index):
        if index not in self.gone:
            self.gone.add(index)
            for members in self.members.values():
                members.discard(index)
            await self.clients[index].close()

    async def turn(self, seconds):
        await asyncio.sleep(seconds)

    async def happen(self, steps):
        for name, *arguments in steps:
            result = getattr(self, name)(*arguments)
            if inspect.isawaitable(result):
                await result

    async def check(self):
        for index, client in enumerate(self.clients):
            got, due = client.numbers(), self.due[index]
            if index in self.gone:
                assert got == due[: len(got)]
                continue
            client.resume()
            await eventually(lambda c=client, d=due: len(c.events) >= len(d))
            assert client.numbers() == due


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, min_size=5, max_size=60))
async def test_each_client_gets_the_events_of_its_rooms_in_order_once(crowd, steps):
    spy = crowd
    clients = [
        await Wire.connect(spy, transport)
        for transport in ("websocket", "websocket", "polling", "polling")
    ]
    story = Story(spy, clients)
    try:
        await story.happen(steps)
        await story.check()
    finally:
        for index in range(len(clients)):
            await story.close(index)
        await eventually(lambda: not spy.server.socketio.eio.sockets)
