// Node's Socket.IO server with the same token check; the commands are those of control.py.

import { createServer } from "node:http";
import { createInterface } from "node:readline";
import { Server } from "socket.io";
import jwt from "jsonwebtoken";

const [GUILD, SECRET] = process.argv.slice(2);
const http = createServer();
const io = new Server(http, { pingInterval: 300_000, serveClient: false });

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

function emit(count) {
  for (let i = 0; i < count; i += 1, number += 1) {
    io.to(`guild:${GUILD}`).emit("message:new", {
      userId: `1${String(number).padStart(17, "0")}`,
      username: "owl",
      channelId: "417719834231439",
      channelName: "chat",
      timestamp: "2026-01-01T00:00:00.000Z",
      guildId: GUILD,
    });
  }
}

const seconds = () => Number(process.hrtime.bigint()) / 1e9;
const report = (figures) => process.stdout.write(`${JSON.stringify(figures)}\n`);

function keepEmitting(rate, duration) {
  const start = seconds();
  report({ start });
  let sent = 0;
  const total = Math.floor(rate * duration);
  const tick = () => {
    const due = Math.min(total, Math.floor((seconds() - start) * rate) + 1);
    emit(due - sent);
    sent = due;
    if (sent < total) setTimeout(tick, 1);
  };
  tick();
}

const commands = {
  emit,
  steady: keepEmitting,
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
