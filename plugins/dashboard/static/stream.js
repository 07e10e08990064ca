// The stream of events: newest first, filtered, pausable, at most KEPT.

import { $, el, say } from "./dom.js";
import { KEPT } from "./guild.js";
import { STATUSES, and, count, hourMinute, time } from "./words.js";

/** How each kind reads. `words` returns text and nodes; the member's name comes before them. */
const KINDS = {
  "message:new": { label: "Messages", words: ({ channelName }) => ["wrote in ", channel(channelName)] },
  "presence:update": {
    label: "Presence",
    words: ({ status }) => ["is ", el("span", { class: "status", "data-status": status }, STATUSES[status] ?? status)],
  },
  "alert:multiClient": {
    label: "Several devices",
    words: ({ platforms }) => ["is on ", el("strong", {}, and(platforms)), " at once"],
  },
  "role:change": { label: "Roles", words: ({ addedRoles }) => ["gained ", el("em", {}, and(addedRoles))] },
  "user:join": { label: "Joins", words: ({ accountAgeDays }) => ["joined; the account is ", age(accountAgeDays)] },
  "user:leave": { label: "Leaves", words: () => ["left"] },
  other: { label: "Others", words: (_data, name) => [el("code", {}, name)] },
};

const channel = (name) => el("span", { class: "channel" }, `#${name}`);
const age = (days) =>
  el("span", days < 7 ? { class: "young" } : {}, days < 1 ? "not a day old" : `${count(days, "day")} old`);
const kindOf = (name) => (name in KINDS ? name : "other");

export class Stream {
  #list = $("#events");
  #pause = $("#pause");
  #empty = $("#no-events");
  #channels = $("#by-channel");
  #hidden = new Set(); // kinds
  #name = "";
  #channel = "";
  #guild = null;
  #shown = 0; // number of the newest event that is on the page
  #paused = false;

  constructor() {
    for (const [kind, { label }] of Object.entries(KINDS)) $("#kinds").append(this.#kindBox(kind, label));
    $("#by-name").addEventListener("input", ({ target }) => this.#filter({ name: target.value.toLowerCase() }));
    this.#channels.addEventListener("change", ({ target }) => this.#filter({ channel: target.value }));
    this.#pause.addEventListener("click", () => this.#setPaused(!this.#paused));
  }

  paint(guild) {
    if (guild !== this.#guild) this.#begin(guild);
    if (!this.#paused) this.#addNew();
    const waiting = guild.eventNumber - this.#shown;
    say(this.#pause, this.#paused ? (waiting ? `Resume · ${waiting} new` : "Resume") : "Pause");
    this.#sayEmpty();
  }

  #begin(guild) {
    this.#guild = guild;
    this.#shown = guild.eventNumber - guild.events.length;
    this.#list.replaceChildren();
    this.#channels.replaceChildren(this.#channels.firstElementChild);
    this.#filter({ channel: "" });
    this.#setPaused(false);
  }

  /** All new rows go in at once, however many there are: one layout for each look at the guild. */
  #addNew() {
    const fresh = this.#guild.events.filter(({ number }) => number > this.#shown);
    if (!fresh.length) return;
    this.#list.prepend(...fresh.map((event) => this.#row(event)).reverse());
    while (this.#list.children.length > KEPT) this.#list.lastElementChild.remove();
    this.#shown = this.#guild.eventNumber;
  }

  #row({ name, data, at }) {
    const kind = name === "gap" ? "gap" : kindOf(name);
    const row = el("li", { class: "event", "data-kind": kind }, el("time", { datetime: new Date(at).toISOString() }, time(at)));
    if (kind === "gap") {
      row.append(el("p", {}, `The connection was lost after ${time(data.from)}; what happened until now is not in this list.`));
      return row;
    }
    const who = data.username ? [el("b", {}, data.username), " "] : [];
    row.append(el("p", {}, ...who, ...KINDS[kind].words(data, name)));
    row.dataset.name = `${data.username ?? ""}`.toLowerCase();
    if (data.channelName) this.#noteChannel((row.dataset.channel = data.channelName));
    row.hidden = !this.#passes(row);
    return row;
  }

  #noteChannel(name) {
    const options = [...this.#channels.options];
    if (options.some((option) => option.value === name) || options.length > 200) return;
    const after = options.slice(1).find((option) => option.value.localeCompare(name) > 0);
    this.#channels.insertBefore(el("option", { value: name }, `#${name}`), after ?? null);
  }

  #passes({ dataset: { kind, name = "", channel: place = "" } }) {
    if (kind === "gap") return true;
    return !this.#hidden.has(kind) && name.includes(this.#name) && (!this.#channel || place === this.#channel);
  }

  #filter({ name = this.#name, channel: place = this.#channel }) {
    this.#name = name;
    this.#channel = place;
    for (const row of this.#list.children) row.hidden = !this.#passes(row);
    this.#sayEmpty();
  }

  #setPaused(paused) {
    this.#paused = paused;
    this.#pause.setAttribute("aria-pressed", paused);
  }

  #kindBox(kind, label) {
    const box = el("input", { type: "checkbox", checked: "" });
    const chip = el("label", { class: "chip", "data-kind": kind, "data-on": true }, box, label);
    box.addEventListener("change", () => {
      this.#hidden[box.checked ? "delete" : "add"](kind);
      chip.dataset.on = box.checked;
      this.#filter({});
    });
    return chip;
  }

  #sayEmpty() {
    const rows = this.#list.children.length;
    const visible = rows && this.#list.querySelector("li:not([hidden])");
    this.#list.dataset.empty = !visible;
    this.#empty.hidden = Boolean(visible);
    const since = this.#guild && hourMinute(this.#guild.live.since);
    say(this.#empty, rows ? `None of the ${count(rows, "event")} kept is of this kind.`
      : `Nothing has happened since ${since}. Events appear the moment somebody writes, comes, goes, joins or gains a role.`);
  }
}
