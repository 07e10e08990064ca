// The stock Socket.IO client, driven from Python by JSON lines; jsclient.py holds the other end.
//
// A line on stdin is a command: {"command": NAME, "socket": NUMBER, ...}; the table `commands` lists
// them. A line on stdout is a report: {"report": NAME, "socket": NUMBER, "wall": ms since 1970,
// "monotonic": seconds on the clock that Python's time.monotonic() reads, ...}. What JSON cannot say
// is wrapped, both ways: {"$binary": BASE64} and {"$undefined": true}.
//
// Only the public API of socket.io-client is used here, so that what passes with this program passes
// in a browser. The program ends when stdin does.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

// The CommonJS build of the package: it starts in two thirds of the time, and every test starts one.
const { io } = createRequire(import.meta.url)("socket.io-client");

const sockets = new Map();

function unwrap(value) {
  if (Array.isArray(value)) return value.map(unwrap);
  if (value === null || typeof value !== "object") return value;
  if ("$binary" in value) return Buffer.from(value.$binary, "base64");
  if ("$undefined" in value) return undefined;
  return mapValues(value, unwrap);
}

function wrap(value) {
  if (value === undefined) return { $undefined: true };
  if (value === null || typeof value !== "object") return value;
  if (value instanceof ArrayBuffer) return wrap(Buffer.from(value));
  if (ArrayBuffer.isView(value)) {
    const bytes = Buffer.from(value.buffer, value.byteOffset, value.byteLength);
    return { $binary: bytes.toString("base64") };
  }
  if (Array.isArray(value)) return value.map(wrap);
  return mapValues(value, wrap);
}

function mapValues(object, convert) {
  return Object.fromEntries(Object.entries(object).map(([key, value]) => [key, convert(value)]));
}

// Writing to a pipe is synchronous on POSIX: a Python that reads slowly slows this program down, and
// nothing is lost when it exits.
function report(name, socket, fields = {}) {
  const monotonic = Number(process.hrtime.bigint()) / 1e9;
  const line = { report: name, socket, wall: Date.now(), monotonic, ...fields };
  process.stdout.write(JSON.stringify(line) + "\n");
}

function state(socket) {
  return {
    connected: socket.connected,
    active: socket.active,
    recovered: socket.recovered ?? false,
    id: socket.id ?? null,
    transport: socket.io.engine?.transport?.name ?? null,
  };
}

// A transport error describes itself with a number (the HTTP status), or with an event that has a message.
function describe(description) {
  return description?.message ?? description ?? null;
}

function listen(number, socket) {
  socket.on("connect", () => report("connect", number, { state: state(socket) }));
  socket.on("connect_error", (error) =>
    report("connect_error", number, {
      message: error.message,
      data: wrap(error.data ?? null),
      description: describe(error.description),
      body: error.context?.responseText ?? null,
      active: socket.active,
    }),
  );
  socket.on("disconnect", (reason, details) =>
    report("disconnect", number, {
      reason,
      description: describe(details?.description),
      code: details?.context?.code ?? null,
      active: socket.active,
    }),
  );
  socket.onAny((event, ...args) => report("event", number, { event, args: args.map(wrap) }));
  socket.io.on("ping", () => report("ping", number));
  socket.io.on("reconnect_attempt", (attempt) => report("reconnect_attempt", number, { attempt }));
  socket.io.on("reconnect_failed", () => report("reconnect_failed", number));
  socket.io.on("open", () =>
    socket.io.engine.on("upgrade", ({ name }) => report("upgrade", number, { transport: name })),
  );
}

const commands = {
  connect({ socket: number, url, options }) {
    const socket = io(url, { forceNew: true, ...unwrap(options), autoConnect: false });
    sockets.set(number, socket);
    listen(number, socket);
    socket.connect();
  },
  reconnect({ socket }) {
    sockets.get(socket).connect();
  },
  auth({ socket, auth }) {
    sockets.get(socket).auth = unwrap(auth);
  },
  emit({ socket, event, args }) {
    sockets.get(socket).emit(event, ...unwrap(args));
  },
  call({ socket, call, event, args, timeout }) {
    const answer = (error, ...answers) =>
      report("ack", socket, { call, error: error?.message ?? null, answers: answers.map(wrap) });
    sockets.get(socket).timeout(timeout).emit(event, ...unwrap(args), answer);
  },
  disconnect({ socket }) {
    sockets.get(socket).disconnect();
  },
  drop({ socket }) {
    sockets.get(socket).io.engine.close();
  },
  reset({ call }) {
    for (const socket of sockets.values()) {
      socket.offAny();
      socket.removeAllListeners();
      socket.disconnect();
    }
    sockets.clear();
    report("ack", null, { call, error: null, answers: [] });
  },
  state({ socket, call }) {
    report("ack", socket, { call, error: null, answers: [state(sockets.get(socket))] });
  },
};

process.on("uncaughtException", (error) => report("fault", null, { message: error.stack }));

const lines = createInterface({ input: process.stdin, crlfDelay: Infinity });
lines.on("line", (line) => {
  const command = JSON.parse(line);
  commands[command.command](command);
});
lines.on("close", () => process.exit(0));
