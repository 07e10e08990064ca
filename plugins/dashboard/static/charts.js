// Charts as the page wants them, drawn by uPlot: colours of the style sheet, a heading that reads out what
// the pointer or the arrow keys point at, and words for who does not see the picture.

import { el, say } from "./dom.js";
import { brief } from "./words.js";

/** Whole numbers alone: there are no halves of messages or members. */
const INCREMENTS = Array.from({ length: 8 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();
const charts = new Set();

const color = (name) => getComputedStyle(document.body).getPropertyValue(`--${name}`).trim();

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of charts) chart.rebuild();
});

export class Chart {
  #plot = null;
  #columns = null;
  #spec;
  #canvas = el("div", { class: "canvas" });
  #reading = el("output", { class: "reading", "aria-live": "off" });
  #title;

  /**
   * `spec`: {title, kind ("live" or "daily"), series: [{shape ("bars", "line" or "steps"), color, label}],
   * step (seconds that a value stands for, if its time is their start), range(min, max), reading(index, columns), summary(columns)}; columns are times in s, then numbers or null.
   */
  constructor(parent, spec) {
    this.#spec = spec;
    this.#title = el("h2", {}, spec.title);
    this.figure = el(
      "figure",
      { class: `chart ${spec.kind}`, tabindex: 0, role: "group" },
      el("figcaption", { class: "head" }, this.#title, this.#reading),
      this.#canvas,
    );
    parent.append(this.figure);
    this.figure.addEventListener("keydown", (event) => this.#onKey(event));
    // Read out to who asks, not each second to who is elsewhere.
    this.figure.addEventListener("focus", () => this.#reading.setAttribute("aria-live", "polite"));
    this.figure.addEventListener("blur", () => this.#leave());
    new ResizeObserver(() => this.#resize()).observe(this.#canvas);
    charts.add(this);
  }

  show(columns) {
    this.#columns = columns;
    if (this.#plot) this.#plot.setData(this.#drawn());
    else this.rebuild();
    this.#read(this.#plot?.cursor.idx ?? null);
    this.figure.setAttribute("aria-label", `${this.#spec.title}. ${this.#spec.summary(columns)}`);
  }

  /** Draw from the beginning: uPlot takes its colours when it is made. */
  rebuild() {
    this.#plot?.destroy();
    this.#plot = null;
    if (!this.#columns || !this.#canvas.clientWidth) return;
    this.#plot = new uPlot(this.#options(), this.#drawn(), this.#canvas);
  }

  /** What uPlot gets: a line of steps goes on to the end of its last step. */
  #drawn() {
    const { step, series: specs } = this.#spec;
    if (!step) return this.#columns;
    const [times, ...values] = this.#columns;
    const longer = values.map((column, at) => [...column, specs[at].shape === "steps" ? column.at(-1) : null]);
    return [[...times, times.at(-1) + step], ...longer];
  }

  #resize() {
    const width = this.#canvas.clientWidth;
    if (!width || !this.#columns) return;
    if (this.#plot) this.#plot.setSize({ width, height: this.#canvas.clientHeight });
    else this.rebuild();
  }

  #options() {
    const { fontFamily, fontSize } = getComputedStyle(this.#canvas);
    const em = parseFloat(fontSize);
    const axis = { stroke: color("muted"), font: `${fontSize} ${fontFamily}`, ticks: { show: false } };
    const line = { stroke: color("line"), width: 1 };
    return {
      width: this.#canvas.clientWidth,
      height: this.#canvas.clientHeight,
      padding: [8, 1.4 * em, 0, 0], // the last time on the axis is not cut off
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: { x: { time: true, range: (_plot, min, max) => this.#span(min, max) }, y: { range: (_plot, min, max) => this.#range(min, max) } },
      axes: [
        { ...axis, grid: { show: false }, size: 2 * em, gap: 4, space: 5.5 * em, values: this.#spec.times },
        { ...axis, grid: line, size: (_plot, texts) => em * roomFor(texts ?? []), gap: 6, space: 3 * em, incrs: INCREMENTS, values: (_, ticks) => ticks.map(brief) },
      ],
      series: [{}, ...this.#spec.series.map((each) => series(each, this.#spec.step ? 1 : 0))],
      hooks: { setCursor: [(plot) => this.#read(plot.cursor.idx)] },
    };
  }

  /** Days have room on both sides: their bars stand in the middle. */
  #span(min, max) {
    const { step } = this.#spec;
    return step ? [min, max] : [min - 43_200, max + 43_200];
  }

  #range(min, max) {
    return (this.#spec.range ?? fromZero)(min ?? 0, max ?? 0);
  }

  #read(index) {
    if (!this.#columns) return;
    const known = index !== null && index < this.#columns[0].length;
    say(this.#reading, this.#spec.reading(known ? index : null, this.#columns));
  }

  /** Left and right, Home and End walk over the points and read them out. */
  #onKey(event) {
    const last = this.#columns ? this.#columns[0].length - 1 : -1;
    const index = this.#plot?.cursor.idx ?? last + 1;
    const target = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: last, Escape: null }[event.key];
    if (target === undefined || !this.#plot) return;
    event.preventDefault();
    this.#point(target === null ? null : Math.min(last, Math.max(0, target)));
  }

  #leave() {
    this.#reading.setAttribute("aria-live", "off");
    this.#point(null);
  }

  #point(index) {
    if (!this.#plot) return;
    const left = index === null ? -10 : this.#plot.valToPos(this.#columns[0][index], "x");
    this.#plot.setCursor({ left, top: index === null ? -10 : 1 });
  }
}

/** In widths of an em, beside the axis: digits are narrower than that. */
const roomFor = (texts) => Math.max(3.2, 0.8 + 0.6 * Math.max(...texts.map(({ length }) => length)));

const SHAPES = {
  bars: (align) => ({ paths: uPlot.paths.bars({ size: [0.72, 48], radius: 0.1, align }), width: 0 }),
  line: () => ({ paths: uPlot.paths.linear(), width: 2 }),
  steps: () => ({ paths: uPlot.paths.stepped({ align: 1 }), width: 2 }),
};

function series({ shape, color: name }, align) {
  const stroke = color(name);
  const fill = shape === "bars" ? stroke : undefined; // below a line not all axes begin at zero
  return { ...SHAPES[shape](align), stroke, fill, points: { show: false }, spanGaps: false };
}

/** From zero to a little above; a chart of nothing has room for one. */
export const fromZero = (_min, max) => [0, Math.max(1, max * 1.08)];

/** Around the values: what stands still is a line in the middle. */
export function around(min, max) {
  const room = Math.max(2, (max - min) * 0.15);
  return [Math.max(0, Math.floor(min - room)), Math.ceil(max + room)];
}
