// Ghosts, lurkers, channel diversity: bar lists that move smoothly when an update comes.

import { $, KeyedList, el, say } from "./dom.js";
import { count, decimal, number, time } from "./words.js";

const LISTS = [
  {
    name: "ghosts",
    title: "Ghosts",
    why: "How often a member began to type, divided by their messages + 1: they type and think better of it.",
    value: ({ ghostScore }) => ghostScore,
    empty: "Nobody yet. A member appears after beginning to type.",
  },
  {
    name: "lurkers",
    title: "Lurkers",
    why: "How often a member who never wrote came, went or changed status, divided by 1 + typing + reactions.",
    value: ({ lurkerScore }) => lurkerScore,
    more: ({ channelCount }) => (channelCount ? `seen in ${count(channelCount, "channel")}` : ""),
    empty: "Nobody yet. A silent member appears after a few changes of status.",
  },
  {
    name: "channelDiversity",
    title: "Channel diversity",
    why: "In how many channels a member typed, reacted or wrote: who is at home everywhere stands first.",
    value: ({ channelCount }) => channelCount,
    empty: "Nobody yet. A member appears after typing, reacting or writing.",
  },
];

export class Scores {
  #lists = LISTS.map((spec) => ({ ...spec, ...makeList(spec) }));
  #painted = undefined;

  constructor() {
    $("#scores").append(...this.#lists.map(({ section }) => section));
  }

  paint(guild) {
    if (guild.analytics === this.#painted) return;
    this.#painted = guild.analytics;
    say($("#scores-time"), when(guild.analytics));
    for (const { name, rows, note, empty, value } of this.#lists) {
      const members = guild.analytics?.[name] ?? [];
      const most = Math.max(...members.map(value), 1);
      moveSmoothly(rows, () => rows.show(members.map((member) => ({ ...member, part: value(member) / most }))));
      note.hidden = members.length > 0;
      say(note, guild.analytics ? empty : "The first figures come with the next update.");
    }
  }
}

function when(analytics) {
  if (!analytics) return "Counted over the last days. The first update comes as soon as somebody types, writes or reacts.";
  return `Counted over the last days; updated at ${time(Date.parse(analytics.timestamp))}, again when counts change, at most every 30 seconds.`;
}

function makeList({ title, name, why, value, more, empty }) {
  const list = el("ol", { class: "bars" });
  const note = el("p", { class: "empty" }, empty);
  const id = `score-${name}`;
  const section = el("section", { "aria-labelledby": id }, el("h2", { id }, title), el("p", { class: "why" }, why), list, note);
  const update = (row, member) => updateRow(row, member, value(member), more?.(member) ?? "");
  return { section, note, rows: new KeyedList(list, ({ userId }) => userId, makeRow, update) };
}

function makeRow() {
  return el("li", {}, el("b"), el("span", { class: "more" }), el("span", { class: "score" }), el("i", { "aria-hidden": true }));
}

function updateRow(row, { username, part }, score, more) {
  const [name, detail, value, bar] = row.children;
  say(name, username);
  say(detail, more);
  say(value, Number.isInteger(score) ? number(score) : decimal(score));
  bar.style.setProperty("--part", part);
}

/** Let rows glide from where they were to where they are now (first, last, invert, play). */
function moveSmoothly({ nodes }, change) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return change();
  const before = new Map([...nodes.values()].map((node) => [node, node.offsetTop]));
  change();
  for (const node of nodes.values()) {
    const way = before.get(node) - node.offsetTop;
    const appear = { opacity: [0, 1] };
    const glide = { transform: [`translateY(${way}px)`, "none"] };
    if (way !== 0) node.animate(Number.isNaN(way) ? appear : glide, { duration: 450, easing: "ease-out" });
  }
}
