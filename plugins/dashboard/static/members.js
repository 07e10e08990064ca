// Who is here: by status, by device, by name. Kept up by presence:snapshot and what follows it.

import { $, KeyedList, choice, el, say } from "./dom.js";
import { onSeveral } from "./guild.js";
import { STATUSES, and, count, number } from "./words.js";

const MOST_SHOWN = 500;
const RANK = Object.fromEntries(Object.keys(STATUSES).map((status, rank) => [status, rank]));
const BY_STATUS = { all: "All", online: "Online", idle: "Idle", dnd: "Do not disturb", offline: "Offline" };
const BY_DEVICE = { all: "Any device", desktop: "Desktop", mobile: "Mobile", web: "Web", several: "Several" };

const collator = new Intl.Collator();
const byStatusThenName = (a, b) => RANK[a.status] - RANK[b.status] || collator.compare(a.username, b.username);

export class Members {
  #rows = new KeyedList($("#members"), (member) => member.userId, makeRow, updateRow);
  #statuses = choice($("#by-status"), BY_STATUS, "all", (status) => this.#filter({ status }));
  #devices = choice($("#by-device"), BY_DEVICE, "all", (device) => this.#filter({ device }));
  #wanted = { status: "all", device: "all", name: "" };
  #guild = null;
  #painted = null;

  constructor() {
    $("#find").addEventListener("input", ({ target }) => this.#filter({ name: target.value.toLowerCase() }));
  }

  paint(guild) {
    const state = `${guild.id} ${guild.memberChanges}`;
    if (this.#guild === guild && this.#painted === state) return;
    this.#guild = guild;
    this.#painted = state;
    this.#count();
    this.#show();
  }

  #filter(wanted) {
    Object.assign(this.#wanted, wanted);
    if (this.#guild) this.#show();
  }

  /** How many there are, on the buttons that choose them. */
  #count() {
    const { counts } = this.#guild;
    if (counts) for (const status of Object.keys(STATUSES)) label(this.#statuses.get(status), BY_STATUS[status], counts[status]);
    const devices = { desktop: 0, mobile: 0, web: 0, several: this.#guild.onSeveralDevices };
    for (const { platforms } of this.#guild.members.values()) for (const each of platforms) devices[each] += 1;
    for (const [device, total] of Object.entries(devices)) label(this.#devices.get(device), BY_DEVICE[device], total);
  }

  #show() {
    const found = [...this.#guild.members.values()].filter((member) => this.#passes(member)).sort(byStatusThenName);
    this.#rows.show(found.slice(0, MOST_SHOWN));
    say($("#online-note"), this.#note(found.length));
    $("#members").dataset.empty = found.length === 0;
    $("#no-members").hidden = found.length > 0;
    say($("#no-members"), this.#whyEmpty());
  }

  #passes({ status, platforms, username }) {
    const { status: wanted, device, name } = this.#wanted;
    if (wanted !== "all" && status !== wanted) return false;
    if (device === "several" ? platforms.length < 2 : device !== "all" && !platforms.includes(device)) return false;
    return username.toLowerCase().includes(name);
  }

  #note(found) {
    const { truncated, members, memberCount } = this.#guild;
    if (truncated) return `${number(members.size)} of ${number(memberCount)} known here`;
    if (found < members.size) return `${number(found)} of ${number(members.size)}`;
    return count(found, "member") + (memberCount > found ? ", bots left out" : "");
  }

  #whyEmpty() {
    if (this.#guild.members.size) return "Nobody here fits. Choose another status or device, or shorten the name.";
    if (this.#guild.counts) return "No members yet, apart from bots.";
    return "The list of members comes once Discord has sent it; until then those appear whose status changes.";
  }
}

function label(button, text, total) {
  say(button, `${text} ${number(total)}`);
}

function makeRow() {
  return el("li", {}, el("span", { class: "status" }), el("b"), el("span", { class: "devices" }));
}

function updateRow(row, member) {
  const [status, name, devices] = row.children;
  row.dataset.status = status.dataset.status = member.status;
  row.classList.toggle("several", onSeveral(member));
  say(status, STATUSES[member.status] ?? member.status);
  say(name, member.username);
  say(devices, and(member.platforms));
}
