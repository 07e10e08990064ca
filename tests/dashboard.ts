// A dashboard as a TypeScript author writes it: the stock client, each documented event, each request.

import { io, type Socket } from "socket.io-client";
import type { Auth, ClientToServer, Refusal, ServerToClient } from "./spywatcher";

const auth: Auth = { token: "…", recover: true };
const socket: Socket<ServerToClient, ClientToServer> = io("http://localhost:3001", { auth });

const show = (...parts: string[]): void => console.log(parts.join(" "));

socket.on("message:new", (m) => show(m.guildId, m.userId, m.username, m.channelId, m.channelName));
socket.on("alert:multiClient", (a) => show(a.username, ...a.platforms.map((p) => p.toUpperCase())));
socket.on("presence:update", (p) => show(p.username, p.status.toUpperCase(), p.timestamp));
socket.on("role:change", (r) => show(r.username, r.addedRoles.join(", ")));
socket.on("user:join", (j) => show(j.username, j.accountAgeDays.toFixed(1)));
socket.on("analytics:update", ({ data, timestamp }) => {
  for (const ghost of data.ghosts) show(ghost.username, ghost.ghostScore.toFixed(2));
  for (const lurker of data.lurkers) show(lurker.username, lurker.lurkerScore.toFixed(2), `${lurker.channelCount}`);
  for (const member of data.channelDiversity) show(member.userId, member.channelCount.toFixed());
  show(timestamp, data.timestamp);
});

socket.on("session", ({ recovered, rooms }) => show(String(recovered), ...rooms));
socket.on("guilds:update", ({ guilds }) => guilds.forEach((guild) => show(guild.id, guild.name, guild.icon ?? "")));
socket.on("auth:expiring", ({ expiresAt }) => socket.emit("auth:refresh", `after ${expiresAt}`));
socket.on("error", ({ message, code }) => show(message, code === "expired" ? "sign in again" : code));
socket.on("connect_error", (error) => {
  const { code, retryAfter } = (error as Error & { data: Refusal }).data;
  show(error.message, code ?? "", retryAfter?.toFixed() ?? "");
});

socket.emit("guilds:list", (answer) => {
  if (!answer.ok) return show(answer.error.message);
  for (const guild of answer.guilds) {
    socket.emit("subscribe:guild", guild.id, (entered) => show(entered.ok ? entered.room : entered.error.code));
    socket.emit("subscribe:analytics", guild.id);
    socket.emit("unsubscribe:guild", guild.id);
  }
});

const answer = await socket.emitWithAck("guilds:list");
if (answer.ok && !answer.complete) show("more to come");
socket.timeout(5000).emit("subscribe:guild", "1", (late, entered) => {
  if (!late && entered.ok) show(entered.pending ? "pending" : entered.room);
});
