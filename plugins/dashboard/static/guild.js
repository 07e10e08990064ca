// What the page knows of one guild, kept up by the server's events alone. Knows neither page nor socket.

import { History, hourOf } from "./history.js";
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
  /** Whether some who are online were not on the list. */
  unnamedOnline = false;
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
    this.live.lose(from, now);
    this.#keep("gap", { from }, now);
  }

  get online() {
    return this.counts && this.counts.online + this.counts.idle + this.counts.dnd;
  }

  get memberCount() {
    if (this.history.known) return this.history.membersNow;
    return this.counts && this.online + this.counts.offline;
  }

  /** How many of those online are known by name: of a large guild not all. */
  get knownOnline() {
    return this.#count(({ status }) => status !== "offline");
  }

  get onSeveralDevices() {
    return this.#count(onSeveral);
  }

  #count(passes) {
    let number = 0;
    for (const member of this.members.values()) if (passes(member)) number += 1;
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
      this.#countOut(before?.status ?? this.#likelyBefore(status));
      this.counts[status] += 1;
      this.live.setOnline(this.online, now);
    }
    const devices = status === "offline" ? [] : (platforms ?? before?.platforms ?? []);
    this.setMember({ userId, username, status, platforms: devices });
  }

  /** What a member was who is not on the list. Only changes are told, so who is offline now was not; and a list
   *  that is cut short names who is online first, so of those missing all are offline unless it ends before them.
   */
  #likelyBefore(status) {
    return status === "offline" || (this.unnamedOnline && status !== "online") ? "online" : "offline";
  }

  #countOut(status) {
    this.counts[status] = Math.max(0, this.counts[status] - 1);
  }

  /** The server counts exactly: what was only likely is put right when an hour begins, with those online then. */
  lowerOnline(most, now) {
    const tooMany = Math.min(this.counts.online, this.online - most);
    if (!this.unnamedOnline || tooMany <= 0) return;
    this.counts.online -= tooMany;
    this.counts.offline += tooMany;
    this.live.setOnline(this.online, now);
  }

  setMember(member) {
    this.members.delete(member.userId); // who changed last stands last
    this.members.set(member.userId, member);
    this.memberChanges += 1;
    if (this.members.size > MOST_MEMBERS) this.#forgetOffline();
  }

  removeMember(userId, now) {
    if (this.counts) {
      this.#countOut(this.members.get(userId)?.status ?? "offline");
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
    guild.unnamedOnline = guild.knownOnline < guild.online;
    guild.memberChanges += 1;
    guild.live.setOnline(guild.online, now);
  },
  "history:update"(guild, data, now) {
    guild.historyError = null;
    guild.history.merge(data, now);
    const hour = guild.history.at(hourOf(Date.parse(data.timestamp)));
    if (guild.counts && hour.online) guild.lowerOnline(hour.online, now);
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
