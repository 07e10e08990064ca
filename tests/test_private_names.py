"""The libraries' private names that the project touches: an upgrade that moves one fails here.

`make upgrade-check` runs the suite on the newest releases; what moved is then the first thing to read.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import attrs
import engineio
import pytest
import redis.asyncio
import redis.asyncio.sentinel
import socketio
import tornado.web
from hikari.impl import CacheImpl, CacheSettings
from hikari.internal.cache import GuildRecord, MemberData
from hikari.internal.collections import FreezableDict
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.iostream import BaseIOStream, IOStream
from tornado.tcpserver import TCPServer
from tornado.websocket import WebSocketHandler, WebSocketProtocol, WebSocketProtocol13

import spywatcher

ROOT = Path(__file__).parent.parent

#: What is called or overridden, with its parameters.
METHODS = [
    (engineio.AsyncServer, "_trigger_event", "event args kwargs"),
    (engineio.AsyncServer, "generate_id", ""),
    (engineio.AsyncServer, "send_packet", "sid pkt"),
    (engineio.AsyncServer, "start_background_task", "target args kwargs"),
    (socketio.AsyncServer, "_engineio_server_class", ""),
    (socketio.AsyncServer, "_handle_connect", "eio_sid namespace data"),
    (socketio.AsyncServer, "_handle_eio_disconnect", "eio_sid reason"),
    (socketio.AsyncServer, "_handle_eio_message", "eio_sid data"),
    (socketio.AsyncServer, "_handle_event", "eio_sid namespace id data"),
    (socketio.AsyncServer, "_send_packet", "eio_sid pkt"),
    (socketio.AsyncServer, "_trigger_event", "event namespace args"),
    (socketio.AsyncManager, "basic_disconnect", "sid namespace kwargs"),
    (socketio.AsyncManager, "basic_enter_room", "sid namespace room eio_sid"),
    (socketio.AsyncManager, "basic_leave_room", "sid namespace room"),
    (socketio.AsyncManager, "connect", "sid namespace"),
    (socketio.AsyncManager, "disconnect", "sid namespace kwargs"),
    (socketio.AsyncManager, "eio_sid_from_sid", "sid namespace"),
    (socketio.AsyncManager, "pre_connect", "eio_sid namespace"),
    (HTTPServer, "handle_stream", "stream address"),
    (HTTPServer, "on_close", "server_conn"),
    (TCPServer, "add_sockets", "sockets"),
    (IOLoop, "update_handler", "fd events"),
    (tornado.web.Application, "find_handler", "request kwargs"),
    (tornado.web.Application, "log_request", "handler"),
    (tornado.web.RequestHandler, "_execute", "transforms args kwargs"),
    (WebSocketHandler, "_detach_stream", ""),
    (WebSocketHandler, "on_ping", "data"),
]


@pytest.mark.parametrize(("owner", "name", "parameters"), METHODS)
def test_a_method_is_where_it_was(owner: type, name: str, parameters: str) -> None:
    found = [p for p in inspect.signature(getattr(owner, name)).parameters if p != "self"]
    assert found == parameters.split()


def test_attributes_of_the_servers_are_where_they_were() -> None:
    server = socketio.AsyncServer(async_mode="tornado")
    assert server._binary_packet == server.environ == server.eio.sockets == {}
    assert set(server.reserved_events) >= {"connect", "disconnect"}
    for name in ("rooms", "pending_connect", "pending_disconnect"):
        assert getattr(server.manager, name) == {}


def test_tornado_is_as_fan_out_needs_it() -> None:
    assert {"write", "writing", "closed"} <= set(vars(IOStream) | vars(BaseIOStream))
    assert "max_write_buffer_size" in inspect.signature(BaseIOStream.__init__).parameters
    assert "stream" in WebSocketProtocol13.__annotations__
    assert "handler" in inspect.signature(WebSocketProtocol.__init__).parameters
    accept = inspect.getsource(tornado.netutil.add_accept_handler)
    assert "except BlockingIOError" in accept  # what `Acceptor` tells it with


def test_the_cache_of_hikari_holds_what_rights_are_read_from() -> None:
    cache = CacheImpl(object(), CacheSettings())  # type: ignore[arg-type]  # asked for nothing here
    for kind in ("guild", "guild_channel", "guild_thread", "role"):
        assert not getattr(cache, f"_{kind}_entries")
    assert FreezableDict({1: 2})._data == {1: 2}  # its own `in` raises and catches a KeyError
    assert {"guild", "members"} <= {field.name for field in attrs.fields(GuildRecord)}
    needed = {"role_ids", "raw_communication_disabled_until"}
    assert needed <= {field.name for field in attrs.fields(MemberData)}


async def test_the_cache_of_hikari_gives_a_members_account_without_a_copy(spy: Any) -> None:
    cache, guild = spy.server.gateway.bot.cache, spy.guild
    found = [spywatcher.CacheReader(cache).get_user(guild.id, guild.owner.id) for _ in range(2)]
    assert found[0] is found[1]
    assert found[0].username == guild.owner.name
    assert isinstance(cache._guild_entries[guild.id].members[guild.owner.id].object, MemberData)


async def test_redis_is_as_the_part_for_several_nodes_needs_it() -> None:
    sentinel = redis.asyncio.Sentinel([("127.0.0.1", 1)])
    pool = sentinel.master_for("x").connection_pool
    assert [one.connection_pool for one in pool.sentinel_manager.sentinels]
    assert (pool.service_name, pool.master_address) == ("x", None)


#: Names of other people's objects that begin with an underscore and may be used; all others of
#: `spywatcher.py` and `spywatcher_cluster.py` belong to the object that uses them.
KNOWN = {
    "_binary_packet",
    "_data",
    "_guild_channel_entries",
    "_guild_entries",
    "_guild_thread_entries",
    "_last_heartbeat_ack_received",
    "_role_entries",
}
OWN = {"self", "cls"}


@pytest.mark.parametrize("name", ["spywatcher.py", "spywatcher_cluster.py"])
def test_no_private_name_is_used_that_is_not_listed_here(name: str) -> None:
    """`namedtuple._replace` and the like are public; `other._x` of the own class is allowed."""
    tree = ast.parse((ROOT / name).read_text("utf-8"))
    own = {node.attr for node in ast.walk(tree) if is_own(node)} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not is_own(node)
    }
    public = {"_replace", "_asdict", "_fields"}
    assert {one for one in used - own - public if not one.startswith("__")} <= KNOWN


def is_own(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in OWN
    )


def test_the_versions_of_what_is_overridden_are_bounded() -> None:
    wanted = (ROOT / "setup.cfg").read_text("utf-8")
    for library in ("hikari", "python-engineio", "python-socketio", "tornado"):
        assert f"    {library}~=" in wanted, library
    assert spywatcher.engineio.__name__ == "engineio"
