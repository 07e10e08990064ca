// A bot on discord.js that hears what SpyWatcher hears, and counts it.
//
//     node discord_js.mjs http://127.0.0.1:PORT/api TOKEN

import { Client, Events, GatewayIntentBits } from "discord.js";

const [api, token] = process.argv.slice(2);
const { Guilds, GuildMembers, GuildPresences, GuildMessages } = GatewayIntentBits;
const { GuildMessageTyping, GuildMessageReactions } = GatewayIntentBits;
const client = new Client({
  intents: [Guilds, GuildMembers, GuildPresences, GuildMessages, GuildMessageTyping, GuildMessageReactions],
  rest: { api },
});

let heard = 0;
for (const event of [Events.PresenceUpdate, Events.MessageCreate, Events.TypingStart])
  client.on(event, () => {
    heard += 1;
  });
client.once(Events.ClientReady, async () => {
  for (const guild of client.guilds.cache.values()) await guild.members.fetch({ withPresences: true });
  console.log("ready");
});
await client.login(token);
