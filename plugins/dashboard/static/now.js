// The six large numbers, each against the same hours a week ago, and the three live charts.

import { Chart, around } from "./charts.js";
import { el, say } from "./dom.js";
import { STEP } from "./live.js";
import { brief, count, decimal, hourMinute, number, time } from "./words.js";

const WAITING = "–";

/** What each number is: its value, the one of a week ago (`most`: of that hour), and what it says instead of a comparison. */
const FIGURES = [
  { label: "Members", now: (guild) => guild.memberCount, then: (_guild, ago) => ago.membersThen },
  { label: "Online", now: (guild) => guild.online, then: (_guild, ago) => ago.onlineThen, most: true },
  { label: "Messages today", now: today("messages"), then: (_guild, ago) => ago.messages },
  { label: "Joins today", now: today("joins"), then: (_guild, ago) => ago.joins },
  {
    label: "Active, busiest hour",
    title: "Members who wrote, typed or reacted in one hour of today",
    now: today("active"),
    then: (_guild, ago) => ago.active,
  },
  {
    label: "On several devices",
    now: (guild) => guild.counts && guild.onSeveralDevices,
    instead: severalOf,
  },
];

/** Of a list cut short not all devices are known: "25% of the 500 known here". */
function severalOf({ online, knownOnline, onSeveralDevices }) {
  if (!knownOnline) return "";
  const share = `${number((100 * onSeveralDevices) / knownOnline)}% of`;
  return knownOnline < online ? `${share} the ${number(knownOnline)} known here` : `${share} those online`;
}

function today(what) {
  return (guild, _ago, now) => (guild.history.known ? guild.history.today(now)[what] : null);
}

export class Figures {
  #rows;

  constructor(parent) {
    this.#rows = FIGURES.map((figure) => {
      const value = el("dd", { class: "value" }, WAITING);
      const change = el("dd", { class: "change" });
      const label = el("dt", figure.title ? { title: figure.title } : {}, figure.label);
      parent.append(el("div", {}, label, value, change));
      return { ...figure, value, change };
    });
  }

  paint(guild, pageTime) {
    const now = guild.serverTime(pageTime);
    const ago = guild.history.known ? guild.history.weekAgo(now) : null;
    for (const figure of this.#rows) {
      const current = figure.now(guild, ago, now) ?? null;
      const [words, way = ""] = comparison(figure, current, guild, ago, now);
      say(figure.value, current === null ? WAITING : number(current));
      say(figure.change, words);
      figure.change.dataset.way = way;
    }
  }
}

/** "▲ 12% · 214 a week ago" and which way that is, if any; "≈ 214 a week ago"; "up to 39 a week ago" */
function comparison({ then, most, instead }, current, guild, ago, now) {
  if (instead) return [instead(guild)];
  if (!ago) return [whyNot(guild, now)];
  if (current === null) return [""];
  const before = then(guild, ago);
  if (most) return [`up to ${brief(before)} a week ago`];
  const way = before >= 1 ? wayOf(current / before) : "";
  return [`${change(way, current / before)}${brief(before)} a week ago`, way];
}

/** Less than half a percent is no change. */
const wayOf = (ratio) => (ratio > 1.005 ? "up" : ratio < 0.995 ? "down" : "same");

function change(way, ratio) {
  if (way === "") return "";
  if (way === "same") return "≈ ";
  const much = ratio > 3 ? `×${decimal(ratio)}` : `${number(100 * Math.abs(ratio - 1))}%`;
  return `${way === "up" ? "▲" : "▼"} ${much} · `;
}

function whyNot(guild, now) {
  if (guild.historyError) return "no history here";
  if (!guild.history.known) return "";
  const days = guild.history.empty ? 7 : Math.ceil(7 - (now - guild.history.oldest) / 86_400_000);
  return `compared in ${count(Math.max(1, days), "day")}`;
}

const last = (column, steps) => column.slice(-steps).reduce((sum, each) => sum + (each ?? 0), 0);
const clock = (_plot, splits) => splits.map((second) => hourMinute(second * 1000));

/** A live chart's heading reads what is pointed at, or how it stands now. */
function reading(unit, now) {
  return (index, [times, values]) => {
    if (index === null || values[index] === null) return now(values);
    return `${time(times[index] * 1000)} · ${unit(values[index])}`;
  };
}

const LIVE = [
  {
    title: "Messages",
    column: "messages",
    series: [{ shape: "bars", color: "accent" }],
    unit: (value) => count(value, "message"),
    now: (values) => `${number(last(values, 4))} in the last minute`,
  },
  {
    title: "Online",
    column: "online",
    series: [{ shape: "steps", color: "online" }],
    range: around,
    unit: (value) => `${number(value)} online`,
    now: (values) => (values.at(-1) === null ? "" : `${number(values.at(-1))} now`),
  },
  {
    title: "Joins",
    column: "joins",
    series: [{ shape: "bars", color: "join" }],
    unit: (value) => count(value, "join"),
    now: (values) => `${number(last(values, 60))} in 15 minutes`,
  },
];

export class LiveCharts {
  #charts;

  constructor(parent) {
    this.#charts = LIVE.map(({ column, unit, now, ...spec }) => {
      const read = reading(unit, now);
      const summary = (columns) => `The last 15 minutes: ${read(null, columns)}.`;
      return [column, new Chart(parent, { ...spec, kind: "live", step: STEP / 1000, times: clock, reading: read, summary })];
    });
  }

  paint(guild, now) {
    const columns = guild.live.columns(now);
    for (const [column, chart] of this.#charts) chart.show([columns.times, columns[column]]);
  }
}
