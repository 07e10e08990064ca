"""What dashboards say and hear, as TypeScript declarations and as an AsyncAPI 3 document.

Both follow from the loaded plugins: from the events that their functions emit, and from what these
functions are annotated to return or, without annotations, make as they return. Only the command line (`spywatcher.py types`) uses this file.

The way: plugins -> events -> JSON Schema (msgspec's) -> TypeScript or AsyncAPI. An event whose
function names no payload class is declared as an object of which nothing is known but `guildId` and
`timestamp`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, Final, NamedTuple

import hikari
import msgspec

import spywatcher

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
GUILD_ID: Final[Schema] = {"type": "string", "pattern": "^[0-9]{1,20}$"}
ID_TEXT: Final = "The guild's Discord id."
#: What the host adds to each event of a plugin.
ADDED: Final[dict[str, Schema]] = {
    "guildId": TEXT | {"description": ID_TEXT},
    "timestamp": TEXT | {"description": "ISO 8601, UTC, milliseconds, `Z`."},
}


def struct(description: str, optional: Iterable[str] = (), **properties: Schema) -> Schema:
    """An object with these properties, all there but the optional ones."""
    required = [name for name in properties if name not in optional]
    schema = {"type": "object", "description": description, "properties": properties}
    return schema | {"required": required}


def reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


#: What the server itself says, whatever plugins there are.
SERVER_SCHEMAS: Final[dict[str, Schema]] = {
    "Failure": struct(
        "Why something was refused or has ended.",
        message=TEXT,
        code={
            "enum": [
                "invalid_guild",
                "forbidden",
                "rate_limited",
                "too_many_rooms",
                "unknown_event",
                "bad_request",
                "expired",
            ]
        },
    ),
    "Refusal": struct(
        "`data` of a `connect_error`: what is wrong with the token, or the seconds to wait.",
        optional=("code", "retryAfter"),
        code={"enum": ["expired", "malformed", "signature", "claims"]},
        retryAfter={"type": "number"},
    ),
    "Refused": struct("An answer: no.", ok={"const": False}, error=reference("Failure")),
    "Done": struct("An answer: yes.", ok={"const": True}),
    "InRoom": struct(
        "An answer: yes. A pending room is decided once Discord has said enough to decide.",
        optional=("pending",),
        ok={"const": True},
        room=TEXT,
        pending={"const": True},
    ),
    "GuildSummary": struct(
        "A guild that this viewer may see.",
        id=TEXT,
        name=TEXT,
        icon={"anyOf": [TEXT, {"type": "null"}]},
    ),
    "GuildList": struct(
        "An answer; not `complete` while Discord is still to say which guilds there are.",
        ok={"const": True},
        guilds={"type": "array", "items": reference("GuildSummary")},
        complete={"type": "boolean"},
    ),
    "GuildsUpdate": struct(
        "The guilds that this viewer may see from now on.",
        guilds={"type": "array", "items": reference("GuildSummary")},
    ),
    "Session": struct(
        "Which rooms this connection is in at its start.",
        recovered={"type": "boolean"},
        rooms={"type": "array", "items": TEXT},
    ),
    "AuthExpiring": struct("When the token ends; ISO 8601.", expiresAt=TEXT),
}


class Event(NamedTuple):
    """An event from the server to its clients."""

    name: str
    #: In words; may be empty.
    summary: str
    schema: Schema
    #: The kinds of rooms whose clients get it; none: every client may.
    kinds: tuple[str, ...] = ()


class Request(NamedTuple):
    """An event from a client to the server, and what the server answers, if asked to."""

    name: str
    summary: str
    #: The one argument; None where there is none.
    argument: tuple[str, Schema] | None
    answers: tuple[str, ...]


SERVER_EVENTS: Final = (
    Event("error", "Something was refused, or a right or token has ended.", reference("Failure")),
    Event("session", "First of all, after each CONNECT.", reference("Session")),
    Event("guilds:update", "To who has asked for `guilds:list`.", reference("GuildsUpdate")),
    Event("auth:expiring", "60 s before the token ends.", reference("AuthExpiring")),
)


def requests(kinds: Iterable[str]) -> list[Request]:
    """All that a client may say where there are rooms of these kinds."""
    guild = ("guildId", GUILD_ID)
    rooms = [
        Request(f"{verb}:{kind}", f"{text} the guild's room `{kind}`.", guild, ("InRoom",))
        for kind in kinds
        for verb, text in (("subscribe", "Enter"), ("unsubscribe", "Leave"))
    ]
    return [
        *rooms,
        Request("guilds:list", "Ask which guilds this viewer may see.", None, ("GuildList",)),
        Request("auth:refresh", "Go on with a new token.", ("token", TEXT), ("Done",)),
    ]


# ---- from plugins to events ----


class Declarations(NamedTuple):
    """All of an API."""

    plugins: list[str]
    kinds: list[str]
    events: list[Event]
    requests: list[Request]
    #: What events and answers refer to, by name.
    schemas: dict[str, Schema]


def declarations(plugins: spywatcher.PluginLoader) -> Declarations:
    """What is said and heard with these plugins."""
    sources = [source for plugin in plugins.plugins.values() for source in sources_of(plugin)]
    payloads = {t for source in sources for t in source.payloads}
    found, schemas = schemas_of(payloads)
    for payload in payloads:
        complete(schemas[found[payload]["$ref"].rpartition("/")[2]])
    events = [event_of(name, sources, found) for name in dict.fromkeys(s.event for s in sources)]
    kinds = sorted(plugins.kinds)
    return Declarations(
        plugins=sorted(plugins.plugins),
        kinds=kinds,
        events=[*SERVER_EVENTS, *sorted(events)],
        requests=requests(kinds),
        schemas=SERVER_SCHEMAS | schemas,
    )


class Source(NamedTuple):
    """A function that makes an event."""

    event: str
    kind: str
    summary: str
    #: The classes that it says it returns; none where it does not say.
    payloads: tuple[type[msgspec.Struct], ...]


def sources_of(plugin: spywatcher.Plugin) -> Iterator[Source]:
    """The events of one plugin, and where they are made."""
    hooks = [hook for hook in plugin.hooks("@on", "@on_subscribe") if hook.mark.emit]
    for mark, function, _ in hooks:
        summary = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
        yield Source(str(mark.emit), mark.room, summary, tuple(returned(function)))
    for event, kind in sorted(plugin.emitted):
        if not any(hook.mark.emit == event for hook in hooks):
            yield Source(event, kind, "", ())


def returned(function: Callable[..., Any]) -> list[type[msgspec.Struct]]:
    """The structs that a function returns, as its annotation says, or else its code."""
    if "return" not in getattr(function, "__annotations__", {}):
        return made(function)
    holder = types.SimpleNamespace(__annotations__={"return": function.__annotations__["return"]})
    try:
        hints = typing.get_type_hints(holder, vars(inspect.getmodule(function)))
    except (NameError, TypeError):  # a name that is imported for type checkers alone
        return []
    return [kind for kind in choices(hints["return"]) if is_struct(kind)]


def made(function: Callable[..., Any]) -> list[type[msgspec.Struct]]:
    """The structs of each `return Struct(…)` in a function; none where it returns something else."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    names = [
        getattr(getattr(value, "func", None), "id", "")
        for value in values
        if value is not None and getattr(value, "value", ...) is not None
    ]
    kinds: list[Any] = [vars(inspect.getmodule(function)).get(name) for name in names]
    return kinds if all(map(is_struct, kinds)) else []


def choices(annotation: Any) -> Iterator[Any]:
    """The members of a union, through Awaitable and the like."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Awaitable, Coroutine):
        yield from choices(arguments[-1])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from choices(argument)
    else:
        yield annotation


def is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def event_of(name: str, sources: list[Source], found: dict[type, Schema]) -> Event:
    """An event that several functions may make, each in its way."""
    mine = [source for source in sources if source.event == name]
    forms = [found[payload] for source in mine for payload in source.payloads]
    if any(not source.payloads for source in mine):
        forms = []
    forms = [form for i, form in enumerate(forms) if form not in forms[:i]]
    schema = forms[0] if len(forms) == 1 else {"anyOf": forms} if forms else open_object()
    summary = next((source.summary for source in mine if source.summary), "")
    return Event(name, summary, schema, tuple(dict.fromkeys(source.kind for source in mine)))


def open_object() -> Schema:
    schema = struct("", **ADDED)
    return schema | {"additionalProperties": {}}


# ---- JSON Schema ----


def schemas_of(
    payloads: Iterable[type[msgspec.Struct]],
) -> tuple[dict[type, Schema], dict[str, Schema]]:
    """A reference for each class, and all that these refer to, as it goes out."""
    ordered = sorted(payloads, key=lambda t: (t.__module__, t.__qualname__))
    references, schemas = msgspec.json.schema_components(
        ordered, schema_hook=schema_hook, ref_template="#/components/schemas/{name}"
    )
    found = dict(zip(ordered, map(as_sent, references), strict=True))
    return found, {free_name(name): as_sent(schema) for name, schema in schemas.items()}


def schema_hook(kind: Any) -> Schema:
    """What msgspec does not know: ids are texts, and of others nothing is said."""
    return TEXT if isinstance(kind, type) and issubclass(kind, hikari.Snowflake) else {}


def as_sent(schema: Any) -> Any:
    """A schema of what goes out: every field is there, in camelCase, with or without a default."""
    if isinstance(schema, list):
        return [as_sent(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return reference(free_name(str(schema["$ref"]).rpartition("/")[2]))
    sent = {key: as_sent(value) for key, value in schema.items() if key not in ("default", "title")}
    if isinstance(schema.get("properties"), dict):
        names = {name: spywatcher.camel_case(name) for name in schema["properties"]}
        properties = schema["properties"].items()
        sent["properties"] = {names[name]: as_sent(value) for name, value in properties}
        sent["required"] = list(sent["properties"])
    return sent


def free_name(name: str) -> str:
    """The name of a plugin's class, unless something of the server's is called so."""
    taken = SERVER_SCHEMAS.keys() | {"Ack", "Auth", "ClientToServer", "ServerToClient"}
    return f"{name}Payload" if name in taken else name


def complete(schema: Schema) -> None:
    """Add to a payload what the host adds."""
    properties = schema.setdefault("properties", {})
    for name, added in ADDED.items():
        properties.setdefault(name, added)
    schema["required"] = list(properties)


# ---- TypeScript ----

HEAD_OF_TYPESCRIPT: Final = """\
// Written by `python spywatcher.py types`: what dashboards say and hear.
// Plugins: {plugins}.
//
//     import {{ io, type Socket }} from "socket.io-client";
//     import type {{ ClientToServer, ServerToClient }} from "./spywatcher";
//     const socket: Socket<ServerToClient, ClientToServer> = io(url, {{ auth: {{ token }} }});
"""
ALWAYS: Final = """\
/** `auth` of `io(url, {auth})`. */
export interface Auth {
  token: string;
  /** Whether to get what was missed after a short break; browsers do anyway. */
  recover?: boolean;
}

/** What the server calls with its answer, which `ok` tells apart. */
export type Ack<Answer> = (answer: Answer | Refused) => void;
"""


def typescript(plugins: spywatcher.PluginLoader) -> str:
    """The declarations as a `.d.ts` file."""
    all_of_it = declarations(plugins)
    interfaces = [interface(name, schema) for name, schema in sorted(all_of_it.schemas.items())]
    heard = [
        line
        for event in all_of_it.events
        for line in (
            *comment(event.summary),
            f"{json.dumps(event.name)}: (data: {ts(event.schema)}) => void;",
        )
    ]
    said = [line for request in all_of_it.requests for line in said_in_typescript(request)]
    return "\n".join(
        [
            HEAD_OF_TYPESCRIPT.format(plugins=", ".join(all_of_it.plugins) or "none"),
            ALWAYS,
            *interfaces,
            block("ServerToClient", heard),
            block("ClientToServer", said),
        ]
    )


def said_in_typescript(request: Request) -> list[str]:
    """A request's line; where there is an argument, the answer need not be asked for.

    Not by `ack?`: of that socket.io-client's types know nothing once `timeout()` is used.
    """
    ack = f"ack: Ack<{' | '.join(request.answers)}>"
    if request.argument is None:
        arguments = ack
    else:
        name, schema = request.argument
        argument = f"{name}: {ts(schema)}"
        arguments = f"...args: [{argument}] | [{argument}, {ack}]"
    return [*comment(request.summary), f"{json.dumps(request.name)}: ({arguments}) => void;"]


def interface(name: str, schema: Schema) -> str:
    if schema.get("type") != "object":
        return f"export type {name} = {ts(schema)};\n"
    lines = members(schema)
    return "\n".join([*comment(schema.get("description", "")), block(name, lines)])


def block(name: str, lines: list[str]) -> str:
    inner = "\n".join(f"  {line}" for line in lines)
    return f"export interface {name} {{\n{inner}\n}}\n"


def comment(text: str) -> list[str]:
    """A TSDoc comment of one line; none for no text."""
    plain = " ".join(text.split()).replace("*/", "* /")
    return [f"/** {plain} */"] if plain else []


def members(schema: Schema) -> list[str]:
    """The lines between the braces of an object type."""
    required = schema.get("required", ())
    lines = []
    for name, value in schema.get("properties", {}).items():
        key = name if re.fullmatch(r"[A-Za-z_$][\w$]*", name) else json.dumps(name)
        mark = "" if name in required else "?"
        lines += [*comment(value.get("description", "")), f"{key}{mark}: {ts(value)};"]
    if "additionalProperties" in schema and schema.get("properties"):
        lines.append("[key: string]: unknown;")
    return lines


TS_NAMES: Final = {
    "string": "string",
    "integer": "number",
    "number": "number",
    "boolean": "boolean",
    "null": "null",
}


def ts(schema: Schema) -> str:
    """The TypeScript type of a JSON Schema, of which msgspec uses a small part."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    if "anyOf" in schema or "oneOf" in schema:
        return " | ".join(dict.fromkeys(map(ts, schema.get("anyOf") or schema["oneOf"])))
    kind = schema.get("type")
    if kind == "array":
        return ts_array(schema)
    if kind == "object":
        return ts_object(schema)
    return TS_NAMES.get(str(kind), "unknown")


def ts_array(schema: Schema) -> str:
    if "prefixItems" in schema:
        return f"[{', '.join(map(ts, schema['prefixItems']))}]"
    items = schema.get("items")
    return f"Array<{ts(items) if isinstance(items, dict) else 'unknown'}>"


def ts_object(schema: Schema) -> str:
    if schema.get("properties"):
        return f"{{ {' '.join(line for line in members(schema) if line[:3] != '/**')} }}"
    values = schema.get("additionalProperties")
    return f"Record<string, {ts(values) if isinstance(values, dict) else 'unknown'}>"


# ---- AsyncAPI ----


def asyncapi(plugins: spywatcher.PluginLoader) -> str:
    """The declarations as an AsyncAPI 3 document, in JSON; the server is the application."""
    all_of_it = declarations(plugins)
    messages = {key(e.name): message(e.name, e.summary, e.schema) for e in all_of_it.events}
    for request in all_of_it.requests:
        _, argument = request.argument or ("", {"type": "null"})
        messages[key(request.name)] = message(request.name, request.summary, argument)
        messages[key(request.name) + ".ack"] = message(
            f"{request.name} (ack)",
            f"What `{request.name}` is answered with.",
            {"oneOf": [reference(name) for name in (*request.answers, "Refused")]},
        )
    document = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "SpyWatcher",
            "version": spywatcher.__version__,
            "description": "What happens in Discord guilds, live over Socket.IO. The payload of a"
            " message is the first argument of the Socket.IO event that it is named after.",
        },
        "defaultContentType": "application/json",
        "servers": {"local": {"host": "localhost:3001", "protocol": "socket.io"}},
        "channels": channels(all_of_it),
        "operations": operations(all_of_it),
        "components": {"messages": messages, "schemas": all_of_it.schemas},
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def key(event: str) -> str:
    """An event's name as a key of the document's: letters, digits, `.`, `-` and `_`."""
    return re.sub(r"[^\w.-]", ".", event, flags=re.ASCII)


def message(name: str, summary: str, payload: Schema) -> Schema:
    return {"name": name, "payload": payload} | ({"summary": summary} if summary else {})


def channels(all_of_it: Declarations) -> Schema:
    """One for each kind of room, and one for what goes on between a client and the server."""
    own = [key(event.name) for event in all_of_it.events if not event.kinds]
    own += [key(r.name) + end for r in all_of_it.requests for end in ("", ".ack")]
    connection = {"address": "/", "messages": {name: of_component(name) for name in own}}
    rooms = {kind: room(kind, all_of_it.events) for kind in all_of_it.kinds}
    return {"connection": connection} | {f"room.{kind}": one for kind, one in rooms.items()}


def room(kind: str, events: Iterable[Event]) -> Schema:
    return {
        "address": f"{kind}:{{guildId}}",
        "description": f"Entered by `subscribe:{kind}`.",
        "parameters": {"guildId": {"description": ID_TEXT}},
        "messages": {key(e.name): of_component(key(e.name)) for e in events if kind in e.kinds},
    }


def of_component(name: str) -> Schema:
    return {"$ref": f"#/components/messages/{name}"}


def operations(all_of_it: Declarations) -> Schema:
    """What the server sends and what it receives."""
    sent = {
        f"send.{channel}.{name}": {"action": "send"} | through(channel, name)
        for channel, body in channels(all_of_it).items()
        for name in body["messages"]
        if any(key(event.name) == name for event in all_of_it.events)
    }
    received = {
        f"receive.{key(request.name)}": {
            "action": "receive",
            **through("connection", key(request.name)),
            "reply": through("connection", key(request.name) + ".ack"),
        }
        for request in all_of_it.requests
    }
    return sent | received


def through(channel: str, name: str) -> Schema:
    place = f"#/channels/{channel}"
    return {"channel": {"$ref": place}, "messages": [{"$ref": f"{place}/messages/{name}"}]}
