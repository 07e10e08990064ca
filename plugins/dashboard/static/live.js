// The last 15 minutes in steps of 15 seconds: messages, joins, and how many were online. Knows no page.

export const STEP = 15_000;
const STEPS = 60;

export class Live {
  #steps = new Map(); // number of the step since 1970 -> counts
  #onlineBefore = null; // when the first step began
  #lost = []; // [from, to] in ms since 1970, when nothing was heard

  constructor(now) {
    this.since = now;
  }

  /** Count a "messages" or a "joins"; `at` is when it happened, by this computer's clock. */
  count(what, at) {
    this.#step(at)[what] += 1;
  }

  /** So many are online from now on. */
  setOnline(online, now) {
    this.#step(now).online = online;
  }

  /** What happened between these times did not come. */
  lose(from, to) {
    this.#lost = [...this.#lost, [from, to]].slice(-STEPS);
  }

  /** Columns for charts: times in seconds, and null for what was before the page was open or did not come. */
  columns(now) {
    const last = Math.floor(now / STEP);
    this.#forgetBefore(last - STEPS + 1);
    const columns = { times: [], messages: [], joins: [], online: [] };
    let online = this.#onlineBefore;
    for (let number = last - STEPS + 1; number <= last; number += 1) {
      const seen = this.#isSeen(number * STEP, (number + 1) * STEP);
      const step = this.#steps.get(number);
      online = step?.online ?? online;
      columns.times.push((number * STEP) / 1000);
      columns.messages.push(seen ? (step?.messages ?? 0) : null);
      columns.joins.push(seen ? (step?.joins ?? 0) : null);
      columns.online.push(seen ? online : null);
    }
    return columns;
  }

  #isSeen(start, end) {
    return end > this.since && !this.#lost.some(([from, to]) => from <= start && end <= to);
  }

  #step(at) {
    const number = Math.floor(at / STEP);
    if (!this.#steps.has(number)) {
      this.#steps.set(number, { messages: 0, joins: 0, online: null });
      this.#forgetBefore(number - STEPS);
    }
    return this.#steps.get(number);
  }

  #forgetBefore(first) {
    for (const [number, step] of this.#steps) {
      if (number >= first) continue;
      this.#onlineBefore = step.online ?? this.#onlineBefore;
      this.#steps.delete(number);
    }
  }
}
