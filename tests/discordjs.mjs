// A bot written with the stock discord.js: it asks and posts what bots do, then tells what it hears.
//
//     node discordjs.mjs http://127.0.0.1:PORT/api TOKEN
//
// Each line on stdout is JSON: first {"ready": …} with what REST answered, then {"message": content}.

import { Client, GatewayIntentBits, Events } from "discord.js";

const [api, token] = process.argv.slice(2);
const say = (line) => console.log(JSON.stringify(line));
const names = (people) => [...people.values()].map((member) => member.user.username).sort();
const intents = Object.values(GatewayIntentBits).filter((bit) => typeof bit === "number");
const client = new Client({ intents, rest: { api } });

async function ask() {
  const guild = await client.guilds.fetch([...client.guilds.cache.keys()][0]);
  const [role] = [...guild.roles.cache.keys()];
  return {
    guilds: (await client.guilds.fetch()).size,
    members: names(await guild.members.list({ limit: 1000 })),
    all: names(await guild.members.fetch()),
    found: names(await guild.members.search({ query: "AD" })),
    threads: (await guild.channels.fetchActiveThreads()).threads.map((thread) => thread.name),
    role: (await guild.roles.fetch(role, { force: true })).name,
    banned: names(await guild.bans.fetch()),
    sent: (await guild.channels.cache.find((c) => c.name === "general").send("hello")).content,
  };
}

client.once(Events.ClientReady, async () => say({ ready: await ask() }));
client.on(Events.MessageCreate, (message) => say({ message: message.content }));
client.on(Events.Error, (error) => say({ error: error.message }));
process.once("SIGTERM", () => client.destroy().then(() => process.exit(0)));
await client.login(token);
