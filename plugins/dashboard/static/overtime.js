// The days: a map of the week in the viewer's own time zone, and charts by day.

import { Chart, fromZero } from "./charts.js";
import { $, choice, el, say } from "./dom.js";
import { WEEKDAYS, count, day, decimal, hourRange, number, signed, zone } from "./words.js";

const MEASURES = { messages: "Messages", active: "Active members" };
/** The share of colour of an hour in which next to nothing happened: it differs from one with nothing. */
const FAINTEST = 0.06;
const locale = new Intl.Locale(navigator.language);
const { firstDay } = locale.getWeekInfo?.() ?? locale.weekInfo ?? { firstDay: 1 }; // 1 is Monday, 7 Sunday
const ORDER = WEEKDAYS.map((_, index) => (index + firstDay) % 7);

/** A 7 × 24 table whose cells are read out: with the pointer, or by the arrow keys. */
class WeekMap {
  #reading = $("#week-reading");
  #cells = new Map(); // "weekday hour" -> td
  #values = null;
  #what = "";
  #pointed = null; // key of a cell

  constructor() {
    const hours = Array.from({ length: 24 }, (_, hour) => el("th", { scope: "col" }, hour % 3 ? "" : String(hour)));
    const table = $("#week");
    table.append(el("thead", {}, el("tr", {}, el("td"), ...hours)), el("tbody", {}, ...ORDER.map((weekday) => this.#row(weekday))));
    for (const event of ["pointerover", "focusin"]) table.addEventListener(event, ({ target }) => this.#point(target));
    for (const event of ["pointerleave", "focusout"]) table.addEventListener(event, () => this.#point(table));
    table.addEventListener("keydown", (event) => this.#move(event));
    this.#cells.get(`${ORDER[0]} 0`).tabIndex = 0;
  }

  show(values, what) {
    this.#values = values;
    this.#what = what;
    const most = this.#most;
    for (const [key, cell] of this.#cells) {
      const value = this.#valueOf(key);
      cell.dataset.known = value !== null;
      cell.style.setProperty("--part", value ? FAINTEST + (1 - FAINTEST) * (value / most) : 0);
      say(cell.firstChild, value === null ? "not known yet" : decimal(value));
    }
    this.#read();
  }

  get #most() {
    return Math.max(...this.#values.flat().map(Number), 0);
  }

  #valueOf(key) {
    const [weekday, hour] = key.split(" ");
    return this.#values[weekday][hour];
  }

  #row(weekday) {
    const cells = Array.from({ length: 24 }, (_, hour) => {
      const cell = el("td", { tabindex: -1, "data-key": `${weekday} ${hour}` }, el("span", { class: "unseen" }));
      this.#cells.set(cell.dataset.key, cell);
      return cell;
    });
    return el("tr", {}, el("th", { scope: "row" }, WEEKDAYS[weekday].slice(0, 3)), ...cells);
  }

  #point(target) {
    this.#pointed = target.closest("td")?.dataset.key ?? null;
    if (this.#values) this.#read();
  }

  #read() {
    say(this.#reading, this.#pointed ? this.#sentence(this.#pointed) : this.#summary(this.#most));
  }

  #sentence(key) {
    const [weekday, hour] = key.split(" ").map(Number);
    const value = this.#valueOf(key);
    const when = `${WEEKDAYS[weekday]} ${hourRange(hour)}`;
    return value === null ? `${when}: not seen yet` : `${when}: ${decimal(value)} ${this.#what} an hour on average`;
  }

  #summary(most) {
    if (!most) return `No ${this.#what} in this time.`;
    const [key] = [...this.#cells.keys()].filter((each) => this.#valueOf(each) === most);
    return `Busiest: ${this.#sentence(key)}`;
  }

  #move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const from = event.target.closest("td")?.dataset.key;
    if (!steps || !from) return;
    event.preventDefault();
    const [weekday, hour] = from.split(" ").map(Number);
    const row = (ORDER.indexOf(weekday) + steps[0] + 7) % 7;
    const to = this.#cells.get(`${ORDER[row]} ${(hour + steps[1] + 24) % 24}`);
    this.#cells.get(from).tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }
}

const total = (days, what) => days.reduce((sum, each) => sum + each[what], 0);
const busiest = (days, what) => days.reduce((best, each) => (each[what] > best[what] ? each : best));
const onDay = ({ start }) => day(start);

const DAILY = [
  {
    title: "Messages a day",
    series: [{ shape: "bars", color: "accent" }],
    columns: (days) => [days.map((each) => each.messages)],
    all: (days) => `${number(total(days, "messages"))} in ${count(days.length, "day")}`,
    one: (each) => count(each.messages, "message"),
    most: (days) => `most on ${onDay(busiest(days, "messages"))}: ${number(busiest(days, "messages").messages)}`,
  },
  {
    title: "Active members, busiest hour of each day",
    series: [{ shape: "bars", color: "active" }],
    columns: (days) => [days.map((each) => each.active)],
    all: (days) => `at most ${number(busiest(days, "active").active)}`,
    one: (each) => `${number(each.active)} active`,
    most: (days) => `on ${onDay(busiest(days, "active"))}`,
  },
  {
    title: "Growth: joins, leaves, net",
    series: [
      { shape: "bars", color: "join" },
      { shape: "bars", color: "leave" },
      { shape: "line", color: "ink" },
    ],
    range: (min, max) => [Math.min(-1, min * 1.1), Math.max(1, max * 1.1)],
    columns: (days) => [
      days.map((each) => each.joins),
      days.map((each) => -each.leaves),
      days.map((each) => each.joins - each.leaves),
    ],
    all: (days) => `${signed(total(days, "joins") - total(days, "leaves"))} in ${count(days.length, "day")}`,
    one: (each) => `+${number(each.joins)} −${number(each.leaves)} · net ${signed(each.joins - each.leaves)}`,
    most: (days) => `${count(total(days, "joins"), "join")}, ${count(total(days, "leaves"), "leave")}`,
  },
  {
    title: "Most online at once",
    series: [{ shape: "bars", color: "online" }],
    columns: (days) => [days.map((each) => each.online)],
    all: (days) => `at most ${number(busiest(days, "online").online)}`,
    one: (each) => `${number(each.online)} online`,
    most: (days) => `on ${onDay(busiest(days, "online"))}`,
  },
];

export class OverTime {
  #days = 28;
  #measure = "messages";
  #week = new WeekMap();
  #guild = null;
  #painted = "";
  #shown = []; // the days that the charts show
  #charts;

  constructor() {
    choice($("#days"), { 7: "7 days", 28: "28 days" }, "28", (days) => this.#choose({ days: Number(days) }));
    choice($("#measure"), MEASURES, "messages", (measure) => this.#choose({ measure }));
    say($("#zone"), `Times are yours: ${zone}`);
    this.#charts = DAILY.map((spec) => [spec, this.#chart(spec)]);
  }

  paint(guild, now) {
    $("#history").hidden = guild.history.empty;
    $("#no-history").hidden = !guild.history.empty;
    if (guild.history.empty) return say($("#no-history"), whyNoHistory(guild));
    const at = guild.serverTime(now);
    const state = [guild.id, guild.history.changes, Math.floor(at / 60_000), this.#days, this.#measure].join();
    if (state === this.#painted) return;
    this.#guild = guild;
    this.#painted = state;
    this.#show(at);
  }

  #choose({ days = this.#days, measure = this.#measure }) {
    this.#days = days;
    this.#measure = measure;
    if (this.#guild) this.paint(this.#guild, Date.now());
  }

  #show(now) {
    const { history } = this.#guild;
    this.#week.show(history.week(this.#days, this.#measure, now), MEASURES[this.#measure].toLowerCase());
    this.#shown = history.days(this.#days, now);
    const times = this.#shown.map(({ start }) => start / 1000);
    for (const [spec, chart] of this.#charts) {
      const columns = spec.columns(this.#shown).map((column) => column.map((value, at) => (this.#shown[at].known ? value : null)));
      chart.show([times, ...columns]);
    }
  }

  #dayAt(index) {
    return `${onDay(this.#shown[index])}${index === this.#shown.length - 1 ? " so far" : ""}`;
  }

  #chart({ all, one, most, columns: _columns, ...spec }) {
    const reading = (index) => (index === null ? all(this.#shown) : `${this.#dayAt(index)} · ${one(this.#shown[index])}`);
    const summary = () => `${all(this.#shown)}, ${most(this.#shown)}.`;
    const times = (_plot, splits) => splits.map((second) => day(second * 1000));
    return new Chart($("#daily"), { range: fromZero, ...spec, kind: "daily", times, reading, summary });
  }
}

function whyNoHistory(guild) {
  if (guild.historyError) return "This server keeps no history: its plugin “history” is switched off.";
  if (guild.history.known) return "Nothing has been counted yet. The first hour appears within a minute of something happening.";
  return "The days come within a minute: first those that are kept, then each minute what is new.";
}
