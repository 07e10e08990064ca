// Node's Socket.IO server with the same token check; the commands are those of control.py.

import { createServer } from "node:http";
import { createInterface } from "node:readline";
import { Server } from "socket.io";
import jwt from "jsonwebtoken";
import { createAdapter } from "@socket.io/redis-adapter";
import { createClient } from "redis";

const [GUILD, SECRET] = process.argv.slice(2);
const http = createServer();
const io = new Server(http, { pingInterval: 300_000, serveClient: false });

if (process.env.BENCH_REDIS) {
  const publisher = createClient({ url: process.env.BENCH_REDIS });
  const subscriber = publisher.duplicate();
  await Promise.all([publisher.connect(), subscriber.connect()]);
  io.adapter(createAdapter(publisher, subscriber));
}

io.use((socket, next) => {
  try {
    socket.data.viewer = jwt.verify(socket.handshake.auth.token, SECRET, { algorithms: ["HS256"] });
    next();
  } catch {
    next(new Error("Invalid token"));
  }
});
io.on("connection", (socket) => {
  socket.on("subscribe:guild", (guildId, answer) => {
    socket.join(`guild:${guildId}`);
    answer({ ok: true, room: `guild:${guildId}` });
  });
});

let number = 0;

function emitTo(guild, number) {
  io.to(`guild:${guild}`).emit("message:new", {
    userId: `1${String(number).padStart(17, "0")}`,
    username: "owl",
    channelId: "417719834231439",
    channelName: "chat",
    timestamp: "2026-01-01T00:00:00.000Z",
    guildId: GUILD,
  });
}

function emit(count) {
  for (let i = 0; i < count; i += 1, number += 1) emitTo(GUILD, number);
}

let others = 0;

function emitElsewhere(count) {
  for (let i = 0; i < count; i += 1, others += 1)
    emitTo(String(BigInt(GUILD) + 1n + BigInt(others % 1000)), others);
}

const seconds = () => Number(process.hrtime.bigint()) / 1e9;
const report = (figures) => process.stdout.write(`${JSON.stringify(figures)}\n`);

function keepEmitting(rate, duration, emitSome = emit) {
  const start = seconds();
  report({ start });
  let sent = 0;
  const total = Math.floor(rate * duration);
  const tick = () => {
    const due = Math.min(total, Math.floor((seconds() - start) * rate) + 1);
    emitSome(due - sent);
    sent = due;
    if (sent < total) setTimeout(tick, 1);
  };
  tick();
}

const commands = {
  emit,
  steady: (rate, duration) => keepEmitting(rate, duration),
  elsewhere: (rate, duration) => keepEmitting(rate, duration, emitElsewhere),
  usage() {
    globalThis.gc?.();
    const { user, system } = process.cpuUsage();
    report({
      cpu: (user + system) / 1e6,
      resident: process.memoryUsage.rss(),
      sockets: io.engine.clientsCount,
    });
  },
};

createInterface({ input: process.stdin })
  .on("line", (line) => {
    const [command, ...args] = JSON.parse(line);
    commands[command](...args);
  })
  .on("close", () => process.exit(0));
http.listen(0, "127.0.0.1", 1024, () => report({ port: http.address().port }));
