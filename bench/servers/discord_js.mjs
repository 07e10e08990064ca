// A bot on discord.js that hears what SpyWatcher hears. With a secret it also tells dashboards, over
// Socket.IO: who writes, and whose status changes, with the fields and the token check of SpyWatcher.
//
//     node discord_js.mjs http://127.0.0.1:PORT/api TOKEN [SECRET]

import { createServer } from "node:http";
import { Client, Events, GatewayIntentBits } from "discord.js";
import jwt from "jsonwebtoken";
import { Server } from "socket.io";

const [api, token, secret] = process.argv.slice(2);
const { Guilds, GuildMembers, GuildPresences, GuildMessages } = GatewayIntentBits;
const { GuildMessageTyping, GuildMessageReactions } = GatewayIntentBits;
const client = new Client({
  intents: [Guilds, GuildMembers, GuildPresences, GuildMessages, GuildMessageTyping, GuildMessageReactions],
  rest: { api },
});

let heard = 0;
const count = () => {
  heard += 1;
};

function tellDashboards(io) {
  const emit = (event, guildId, fields) => io.to(`guild:${guildId}`).emit(event, { ...fields, guildId });
  client.on(Events.PresenceUpdate, (before, now) => {
    if ((before?.status ?? "offline") === now.status || now.user.bot) return;
    const { userId, status } = now;
    const timestamp = new Date().toISOString();
    emit("presence:update", now.guild.id, { userId, username: now.user.username, status, timestamp });
  });
  client.on(Events.MessageCreate, ({ author, channel, guildId, createdAt }) => {
    if (author.bot) return;
    const where = { channelId: channel.id, channelName: channel.name, timestamp: createdAt.toISOString() };
    emit("message:new", guildId, { userId: author.id, username: author.username, ...where });
  });
  client.on(Events.TypingStart, count);
}

function countOnly() {
  for (const event of [Events.PresenceUpdate, Events.MessageCreate, Events.TypingStart]) client.on(event, count);
}

function dashboards(http) {
  const io = new Server(http, { pingInterval: 300_000, serveClient: false });
  io.use((socket, next) => {
    try {
      jwt.verify(socket.handshake.auth.token, secret, { algorithms: ["HS256"] });
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
  return io;
}

const http = createServer();
if (secret) tellDashboards(dashboards(http));
else countOnly();
client.once(Events.ClientReady, async () => {
  for (const guild of client.guilds.cache.values()) await guild.members.fetch({ withPresences: true });
  if (!secret) console.log("ready");
  else http.listen(0, "127.0.0.1", () => console.log(`listening on http://127.0.0.1:${http.address().port}`));
});
await client.login(token);
