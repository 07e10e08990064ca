// The page: puts its parts together, follows the address (#now, #time, #people, #wall) and paints the guild.

import { Connection } from "./connection.js";
import { $, el, say } from "./dom.js";
import { Guild } from "./guild.js";
import { Members } from "./members.js";
import { Figures, LiveCharts } from "./now.js";
import { OverTime } from "./overtime.js";
import { Scores } from "./scores.js";
import { Status } from "./status.js";
import { Stream } from "./stream.js";
import { Tokens, tokenInAddress } from "./token.js";
import { and, hourMinute } from "./words.js";

/** Between two looks at the guild: whatever came meanwhile is painted in one go. */
const PAINT_INTERVAL = 250;
/** Of so many looks one goes to what need not be as quick: charts, members. */
const SELDOM = 4;
/** Of each guild on the wall; #wall&every=60 says otherwise. */
const WALL_SECONDS = 20;
const WALL_GUILDS = 10;
/** Milliseconds in which guilds say how many are online, before one is chosen for who comes first. */
const COMPARE_FOR = 1_500;
const ANNOUNCE_INTERVAL = 10_000;
const REMEMBERED = "spywatcher.guild";
const VIEWS = ["now", "time", "people", "wall"];

class Page {
  #tokens = new Tokens();
  #connection = new Connection(this.#tokens);
  #status = new Status(this.#connection, this.#tokens);
  #guilds = new Map(); // id -> Guild, of those that are watched
  #chosen = null; // id of the guild on the page
  #comparing = false; // whether all are heard, to begin with the liveliest
  #turned = Date.now(); // when the wall came to the guild it shows
  #announced = 0;
  #view = "now";
  #wallSeconds = WALL_SECONDS;
  #often; // view -> what is painted at each look
  #seldom; // view -> what is painted in turn, one at a look
  #looks = 0;

  constructor() {
    const often = [new Figures($("#figures")), new Stream()];
    const charts = new LiveCharts($("#live"));
    this.#often = { now: often, time: [new OverTime()], people: [new Scores()], wall: often };
    this.#seldom = { now: [charts, new Members()], time: [], people: [], wall: [charts] };
    this.#listen();
  }

  start() {
    const token = tokenInAddress();
    if (token !== null) this.#tokens.use(token);
    this.#follow();
    this.#connection.start();
    // A page behind others gets no frames, but its timers go on: those looks would wait for its return, all of them.
    setInterval(() => document.hidden || requestAnimationFrame(() => this.#look()), PAINT_INTERVAL);
  }

  #listen() {
    const on = (name, hear) => this.#connection.addEventListener(name, ({ detail }) => hear(detail));
    on("event", ({ name, data }) => this.#take(name, data));
    on("guilds", (guilds) => this.#onGuilds(guilds));
    on("gap", ({ from }) => this.#eachGuild((guild) => guild.gap(from)));
    on("unavailable", ({ kind, id, message }) => {
      if (kind === "history" && this.#guilds.has(id)) this.#guilds.get(id).historyError = message;
    });
    addEventListener("hashchange", () => this.#onAddress());
    addEventListener("keydown", ({ key }) => {
      if (key === "Escape" && this.#view === "wall") location.hash = "#now";
    });
    $("#guilds").addEventListener("change", ({ target }) => this.#choose(target.value));
  }

  #take(name, data) {
    this.#guilds.get(data.guildId)?.take(name, data);
    if (this.#comparing && [...this.#guilds.values()].every(({ counts }) => counts)) this.#chooseLiveliest();
    if (name === "alert:multiClient" && data.guildId === this.#chosen) this.#announce(data);
  }

  /** Alerts are said to who does not see them, one in a while: a screen reader cannot be hurried. */
  #announce({ username, platforms }) {
    if (Date.now() - this.#announced < ANNOUNCE_INTERVAL) return;
    this.#announced = Date.now();
    say($("#announcer"), `${username} is on ${and(platforms)} at once`);
  }

  // -- guilds

  #onGuilds(guilds) {
    const options = guilds.map(({ id, name }) => el("option", { value: id }, name));
    $("#guilds").replaceChildren(...options);
    for (const { id, name } of guilds) if (this.#guilds.has(id)) this.#guilds.get(id).name = name;
    const ids = guilds.map(({ id }) => id);
    const wanted = [this.#chosen, remembered()].find((id) => ids.includes(id));
    if (wanted || ids.length < 2) this.#choose(wanted ?? ids[0] ?? null);
    else this.#compare();
  }

  #compare() {
    this.#chosen = null;
    this.#comparing = true;
    this.#watch();
    setTimeout(() => this.#comparing && this.#chooseLiveliest(), COMPARE_FOR);
  }

  #chooseLiveliest() {
    const [first] = [...this.#guilds.values()].sort((one, other) => (other.online ?? 0) - (one.online ?? 0));
    this.#choose(first?.id ?? null);
  }

  #choose(id) {
    if (id !== this.#chosen) this.#turned = Date.now();
    this.#chosen = id;
    this.#comparing = false;
    if (id) $("#guilds").value = id;
    if (id && this.#view !== "wall") remember(id);
    this.#watch();
    this.#paint();
  }

  /** Hear of the chosen guild; on the wall of all, so that none is empty when its turn comes. */
  #watch() {
    const all = this.#connection.guilds;
    const shown = this.#view === "wall" || this.#comparing ? all.slice(0, WALL_GUILDS) : [];
    const wanted = all.filter((guild) => guild.id === this.#chosen || shown.includes(guild));
    const ids = wanted.map(({ id }) => id);
    for (const id of this.#guilds.keys()) if (!ids.includes(id)) this.#guilds.delete(id);
    for (const guild of wanted) if (!this.#guilds.has(guild.id)) this.#guilds.set(guild.id, new Guild(guild));
    this.#connection.watch(ids);
  }

  #eachGuild(what) {
    for (const guild of this.#guilds.values()) what(guild);
  }

  #turn() {
    if (Date.now() - this.#turned < this.#wallSeconds * 1_000) return;
    const ids = [...this.#guilds.keys()];
    this.#turned = Date.now();
    if (ids.length > 1) this.#choose(ids[(ids.indexOf(this.#chosen) + 1) % ids.length]);
  }

  // -- the address and the picture

  #onAddress() {
    const token = tokenInAddress();
    if (token !== null) this.#connection.useToken(token);
    this.#follow();
  }

  #follow() {
    const fragment = new URLSearchParams(location.hash.slice(1));
    const [wanted] = fragment.keys();
    this.#wallSeconds = Number(fragment.get("every")) || WALL_SECONDS;
    this.#view = VIEWS.includes(wanted) ? wanted : "now";
    document.body.dataset.view = this.#view;
    for (const view of ["now", "time", "people"]) {
      $(`#${view}-view`).hidden = view !== (this.#view === "wall" ? "now" : this.#view);
    }
    for (const link of document.querySelectorAll("nav a")) {
      if (link.dataset.for === this.#view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (this.#connection.guilds.length) this.#watch();
    this.#paint();
  }

  #look() {
    if (this.#view === "wall") this.#turn();
    this.#looks += 1;
    const due = this.#seldom[this.#view].filter((_, index) => (this.#looks + index) % SELDOM === 0);
    this.#paint(due);
  }

  #paint(seldom = this.#seldom[this.#view]) {
    this.#status.paint();
    const guild = this.#guilds.get(this.#chosen);
    $("#main").classList.toggle("without-guild", !guild);
    say($("#clock"), hourMinute(Date.now()));
    say($("#guild-name"), guild?.name ?? "");
    say($("title"), guild ? `${guild.name} · SpyWatcher` : "SpyWatcher");
    if (guild) for (const painter of [...this.#often[this.#view], ...seldom]) painter.paint(guild, Date.now());
  }
}

/** The guild that was chosen last; a browser that keeps nothing (no cookies) raises instead. */
function remembered() {
  try {
    return localStorage.getItem(REMEMBERED);
  } catch {
    return null;
  }
}

function remember(id) {
  try {
    localStorage.setItem(REMEMBERED, id);
  } catch {
    // The first guild is as good.
  }
}

new Page().start();
