// What the page knows of one guild, kept up by the server's events alone. Knows neither page nor socket.

import { History } from "./history.js";
import { Live } from "./live.js";

/** Events kept for the stream. */
export const KEPT = 500;

/** Members remembered beyond those online; who is offline for longest goes first. */
const MOST_MEMBERS = 5_000;

export class Guild {
  history = new History();
  /** Why there are no days: an `error` of the server, or null. */
  historyError = null;
  analytics = null;
  /** The latest events, oldest first: {number, name, data, at}. */
  events = [];
  members = new Map(); // userId -> {userId, username, status, platforms}
  counts = null; // until presence:snapshot: {online, idle, dnd, offline}
  truncated = false;
  /** Grows with each change of members; with each event. */
  memberChanges = 0;
  eventNumber = 0;

  #skew = 0; // ms that this computer's clock is ahead of the server's

  constructor({ id, name }, now = Date.now()) {
    this.id = id;
    this.name = name;
    this.live = new Live(now);
  }

  /** Take in an event of this guild. Those that no plugin of ours sends are kept for the stream too. */
  take(name, data, now = Date.now()) {
    const quiet = QUIET[name];
    if (quiet) return quiet(this, data, now);
    const at = Math.min(now, Date.parse(data.timestamp) + this.#skew || now);
    EFFECTS[name]?.(this, data, at, now);
    this.#keep(name, data, at);
  }

  /** The connection was lost for a while, and what happened meanwhile did not come. */
  gap(from, now = Date.now()) {
    this.#keep("gap", { from }, now);
  }

  get online() {
    return this.counts && this.counts.online + this.counts.idle + this.counts.dnd;
  }

  get memberCount() {
    if (this.history.known) return this.history.membersNow;
    return this.counts && this.online + this.counts.offline;
  }

  get onSeveralDevices() {
    let number = 0;
    for (const member of this.members.values()) if (onSeveral(member)) number += 1;
    return number;
  }

  synchronise(timestamp, now) {
    this.#skew = now - Date.parse(timestamp);
  }

  /** By the server's clock, which its hours are counted by. */
  serverTime(now) {
    return now - this.#skew;
  }

  changeStatus({ userId, username, status, platforms }, now) {
    const before = this.members.get(userId);
    if (this.counts) {
      // A list cut short has those who are online first: who is not on it was offline, as far as we know.
      const counted = before?.status ?? "offline";
      this.counts[counted] = Math.max(0, this.counts[counted] - 1);
      this.counts[status] += 1;
      this.live.setOnline(this.online, now);
    }
    const devices = status === "offline" ? [] : (platforms ?? before?.platforms ?? []);
    this.setMember({ userId, username, status, platforms: devices });
  }

  setMember(member) {
    this.members.delete(member.userId); // who changed last stands last
    this.members.set(member.userId, member);
    this.memberChanges += 1;
    if (this.members.size > MOST_MEMBERS) this.#forgetOffline();
  }

  removeMember(userId, now) {
    const member = this.members.get(userId);
    if (this.counts) {
      const counted = member?.status ?? "offline";
      this.counts[counted] = Math.max(0, this.counts[counted] - 1);
      this.live.setOnline(this.online, now);
    }
    this.members.delete(userId);
    this.memberChanges += 1;
  }

  #forgetOffline() {
    for (const member of this.members.values()) {
      if (member.status !== "offline") continue;
      this.members.delete(member.userId);
      this.truncated = true;
      return;
    }
  }

  #keep(name, data, at) {
    this.eventNumber += 1;
    this.events.push({ number: this.eventNumber, name, data, at });
    if (this.events.length > KEPT) this.events.shift();
  }
}

export const onSeveral = (member) => member.platforms.length > 1;

/** Events that say how things stand: they are in no stream. */
const QUIET = {
  "presence:snapshot"(guild, { counts, members, truncated, timestamp }, now) {
    guild.synchronise(timestamp, now);
    guild.counts = { ...counts };
    guild.truncated = truncated;
    guild.members = new Map(members.map((member) => [member.userId, member]));
    guild.memberChanges += 1;
    guild.live.setOnline(guild.online, now);
  },
  "history:update"(guild, data, now) {
    guild.historyError = null;
    guild.history.merge(data, now);
  },
  "analytics:update"(guild, { data }) {
    guild.analytics = data;
  },
};

/** What an event of the stream changes besides. */
const EFFECTS = {
  "message:new"(guild, _data, at) {
    guild.live.count("messages", at);
    guild.history.count("messages");
  },
  "presence:update"(guild, data, _at, now) {
    guild.changeStatus(data, now);
  },
  "alert:multiClient"(guild, { userId, username, platforms }) {
    const status = guild.members.get(userId)?.status ?? "online";
    guild.setMember({ userId, username, status, platforms });
  },
  "user:join"(guild, { userId, username }, at) {
    guild.live.count("joins", at);
    guild.history.count("joins");
    if (guild.counts) guild.counts.offline += 1;
    guild.setMember({ userId, username, status: "offline", platforms: [] });
  },
  "user:leave"(guild, { userId }, _at, now) {
    guild.history.count("leaves");
    guild.removeMember(userId, now);
  },
};
