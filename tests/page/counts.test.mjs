// What the page counts, without the page: history by day and week, the live charts, who is online.
// test_dashboard.py runs this with `node --test`, in several time zones.

import assert from "node:assert/strict";
import test from "node:test";
import { Guild, KEPT } from "../../plugins/dashboard/static/guild.js";
import { HOUR, History } from "../../plugins/dashboard/static/history.js";
import { Live, STEP } from "../../plugins/dashboard/static/live.js";
import { brief } from "../../plugins/dashboard/static/words.js";

// In the week before, clocks in Europe went back by an hour: one of its days has 25 of them.
const NOW = Date.parse("2026-10-28T15:20:00Z");
const DAYS = 28;

const entry = (at, counts) => ({
  hour: new Date(at).toISOString(),
  ...{ messages: 0, joins: 0, leaves: 0, active: 0, online: 0, ...counts },
});

/** Each hour of the last days has one message, one join and two active members. */
function steady(now = NOW) {
  const hours = [];
  for (let at = now - (now % HOUR); at > now - DAYS * 24 * HOUR; at -= HOUR) {
    hours.push(entry(at, { messages: 1, joins: 1, active: 2, online: 5 }));
  }
  const history = new History();
  history.merge({ hours, members: 1000 }, now);
  return history;
}

const hoursBegunSince = (start) => Math.floor(NOW / HOUR) - Math.ceil(start / HOUR) + 1;

test("today counts from midnight where the viewer is", () => {
  assert.equal(steady().today(NOW).messages, hoursBegunSince(new Date(NOW).setHours(0, 0, 0, 0)));
  assert.equal(steady().today(NOW).active, 2);
});

test("a week ago the hour that is not over counts for as much as has passed of it", () => {
  const history = steady();
  const then = new Date(NOW).setDate(new Date(NOW).getDate() - 7);
  const { messages, membersThen, onlineThen } = history.weekAgo(NOW);
  const whole = history.today(then).messages - 1;
  assert.equal(messages.toFixed(6), (whole + 1 / 3).toFixed(6));
  assert.equal(membersThen, 1000 - (NOW - then) / HOUR);
  assert.equal(onlineThen, 5);
});

test("there is no week ago where history does not reach", () => {
  const history = new History();
  history.merge({ hours: [entry(NOW - (NOW % HOUR) - 6 * 24 * HOUR, { messages: 3 })], members: 9 }, NOW);
  assert.equal(history.weekAgo(NOW), null);
});

test("days neither lose nor double an hour when clocks change", () => {
  const history = steady();
  const days = history.days(10, NOW);
  const hours = hoursBegunSince(days[0].start);
  assert.equal(days.reduce((sum, { messages }) => sum + messages, 0), hours);
  assert.ok(days.slice(0, -1).every(({ messages }) => messages >= 23 && messages <= 25));
});

test("the week averages the hours that were seen, and knows which were not", () => {
  const history = new History();
  const at = NOW - (NOW % HOUR) - 30 * HOUR;
  history.merge({ hours: [entry(at, { messages: 8 }), entry(at - 7 * 24 * HOUR, { messages: 4 })], members: 1 }, NOW);
  const local = new Date(at);
  const week = history.week(DAYS, "messages", NOW);
  const then = new Date(at - 7 * 24 * HOUR);
  const same = then.getHours() === local.getHours();
  assert.equal(week[local.getDay()][local.getHours()], same ? 6 : 8);
  assert.equal(history.week(7, "messages", NOW)[local.getDay()][local.getHours()], 8);
  assert.ok(new History().week(7, "messages", NOW).flat().every((cell) => cell === null));
});

test("what is counted live is replaced by the next update", () => {
  const history = steady();
  const before = history.today(NOW).messages;
  history.count("messages");
  assert.equal(history.today(NOW).messages, before + 1);
  history.merge({ hours: [entry(NOW - (NOW % HOUR), { messages: 2 })], members: 1000 }, NOW);
  assert.equal(history.today(NOW).messages, before + 1);
});

test("what an update was too early for stays counted until the next one", () => {
  const history = steady();
  const thisHour = (messages) => ({ hours: [entry(NOW - (NOW % HOUR), { messages })], members: 1000 });
  const before = history.today(NOW).messages;
  for (let seen = 0; seen < 3; seen += 1) history.count("messages");
  history.merge(thisHour(2), NOW); // made after the first of the three
  assert.equal(history.today(NOW).messages, before + 3);
  history.count("messages");
  assert.equal(history.today(NOW).messages, before + 4);
  history.merge(thisHour(5), NOW);
  assert.equal(history.today(NOW).messages, before + 4);
});

test("live charts put what comes late where it belongs, and go on with who was online", () => {
  const live = new Live(NOW - 10 * STEP);
  live.setOnline(3, NOW - 10 * STEP);
  live.count("messages", NOW);
  live.count("messages", NOW - 2 * STEP);
  const { messages, online, times } = live.columns(NOW);
  assert.equal(times.length, 60);
  assert.deepEqual(messages.slice(-12), [null, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]);
  assert.deepEqual(online.slice(-12), [null, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]);
  assert.equal(live.columns(NOW + 3600 * 1000).online.at(-1), 3);
});

test("live charts show nothing for the time in which nothing could be heard", () => {
  const live = new Live(NOW - 60 * STEP);
  live.setOnline(3, NOW - 60 * STEP);
  live.count("messages", NOW - 6 * STEP);
  live.lose(NOW - 5 * STEP, NOW - 2 * STEP);
  const { messages, joins, online } = live.columns(NOW);
  assert.deepEqual(messages.slice(-7), [1, null, null, null, 0, 0, 0]);
  assert.deepEqual(joins.slice(-7), [0, null, null, null, 0, 0, 0]);
  assert.deepEqual(online.slice(-7), [3, null, null, null, 3, 3, 3]);
});

test("numbers on an axis or in a comparison take five characters", () => {
  const written = [0, 500, 9_000, 20_000, 250_000, 1_500_000].map((value) => brief(value).toLowerCase()); // 20K or 20k, by the browser
  assert.deepEqual(written, ["0", "500", "9,000", "20k", "250k", "1.5m"]);
});

// ---- the guild

const stamp = (at) => new Date(at).toISOString();
const ada = { userId: "1", username: "ada" };

function watched(members = [{ ...ada, status: "offline", platforms: [] }]) {
  const guild = new Guild({ id: "9", name: "Owls" }, NOW);
  const counts = { online: 0, idle: 0, dnd: 0, offline: 0 };
  for (const { status } of members) counts[status] += 1;
  guild.take("presence:snapshot", { counts, members, truncated: false, timestamp: stamp(NOW) }, NOW);
  return guild;
}

test("counts of statuses follow each change, each member once", () => {
  const guild = watched();
  for (const status of ["online", "idle", "dnd", "dnd"]) {
    guild.take("presence:update", { ...ada, status, timestamp: stamp(NOW) }, NOW);
  }
  assert.deepEqual(guild.counts, { online: 0, idle: 0, dnd: 1, offline: 0 });
  guild.take("user:leave", { ...ada, timestamp: stamp(NOW) }, NOW);
  assert.deepEqual(guild.counts, { online: 0, idle: 0, dnd: 0, offline: 0 });
  assert.equal(guild.members.size, 0);
});

test("devices are those of the last alert, and none when offline", () => {
  const guild = watched([{ ...ada, status: "online", platforms: ["web"] }]);
  guild.take("alert:multiClient", { ...ada, platforms: ["mobile", "web"], timestamp: stamp(NOW) }, NOW);
  assert.equal(guild.onSeveralDevices, 1);
  guild.take("presence:update", { ...ada, status: "offline", timestamp: stamp(NOW) }, NOW);
  assert.equal(guild.onSeveralDevices, 0);
});

const entryNow = (online) => ({ hours: [entry(NOW - (NOW % HOUR), { online })], members: 100, timestamp: stamp(NOW) });

test("in a guild whose list does not name all who are online, their number stays right as far as can be told", () => {
  const guild = new Guild({ id: "9", name: "Owls" }, NOW);
  const counts = { online: 10, idle: 0, dnd: 0, offline: 90 };
  const members = [{ ...ada, status: "online", platforms: ["web"] }];
  guild.take("presence:snapshot", { counts, members, truncated: true, timestamp: stamp(NOW) }, NOW);
  const unnamed = (userId, status) =>
    guild.take("presence:update", { userId, username: userId, status, timestamp: stamp(NOW) }, NOW);
  unnamed("2", "offline");
  assert.equal(guild.online, 9);
  unnamed("3", "idle");
  assert.equal(guild.online, 9);
  unnamed("2", "online");
  assert.equal(guild.online, 10);
  guild.take("history:update", entryNow(8), NOW);
  assert.equal(guild.online, 8);
  assert.equal(guild.online + guild.counts.offline, 100);
});

test("where all who are online are named, the number is theirs", () => {
  const guild = watched([{ ...ada, status: "online", platforms: ["web"] }]);
  guild.take("history:update", entryNow(0), NOW);
  assert.equal(guild.online, 1);
});

test("a server whose clock differs changes nothing in the live charts", () => {
  const guild = new Guild({ id: "9", name: "Owls" }, NOW - 60 * STEP);
  const behind = NOW - 3 * HOUR;
  const snapshot = { counts: {}, members: [], truncated: false, timestamp: stamp(behind) };
  guild.take("presence:snapshot", snapshot, NOW);
  guild.take("message:new", { ...ada, timestamp: stamp(behind + STEP) }, NOW + STEP);
  assert.equal(guild.live.columns(NOW + STEP).messages.at(-1), 1);
});

test("hours are read by the clock of the server that counts them", () => {
  const guild = watched();
  const late = NOW + 2 * HOUR;
  guild.take("presence:snapshot", { counts: {}, members: [], truncated: false, timestamp: stamp(NOW) }, late);
  assert.equal(guild.serverTime(late), NOW);
});

test("the stream keeps the latest events, and those that nobody here knows", () => {
  const guild = watched();
  for (let number = 0; number < KEPT + 10; number += 1) {
    guild.take("message:delete", { messageId: String(number), timestamp: stamp(NOW) }, NOW);
  }
  assert.equal(guild.events.length, KEPT);
  assert.equal(guild.events.at(-1).data.messageId, String(KEPT + 9));
});

test("memory stays bounded in a guild of many", () => {
  const guild = watched([]);
  for (let number = 0; number < 20_000; number += 1) {
    const who = { userId: String(number), username: `member ${number}` };
    guild.take("presence:update", { ...who, status: "online", timestamp: stamp(NOW) }, NOW);
    guild.take("presence:update", { ...who, status: "offline", timestamp: stamp(NOW) }, NOW);
  }
  assert.ok(guild.members.size <= 5_001);
});
