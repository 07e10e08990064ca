// A guild's hours, as `history:update` brings them, and what is read from them: today against a week
// ago, days, the week. Knows no page. Hours that are missing had nothing in them.

export const HOUR = 3_600_000;
const LONGEST_DAYS = 28;
const EMPTY = { messages: 0, joins: 0, leaves: 0, active: 0, online: 0 };

export class History {
  #hours = new Map(); // start in ms since 1970 -> counts
  #sinceUpdate = { messages: 0, joins: 0, leaves: 0 };
  #toCome = { messages: 0, joins: 0, leaves: 0 }; // seen before the last update, which was made still earlier
  oldest = Infinity;
  members = null;
  changes = 0;

  /** Take in a `history:update`: its hours replace what was known of them. */
  merge({ hours, members }, now) {
    this.#noteToCome(hours);
    for (const { hour, ...counts } of hours) this.#hours.set(Date.parse(hour), counts);
    const limit = now - (LONGEST_DAYS + 8) * 24 * HOUR;
    for (const hour of this.#hours.keys()) if (hour < limit) this.#hours.delete(hour);
    this.oldest = Math.min(...this.#hours.keys());
    this.members = members;
    this.#sinceUpdate = { messages: 0, joins: 0, leaves: 0 };
    this.changes += 1;
  }

  /** Count an event that the next `history:update` will bring: today's figures move at once. */
  count(what) {
    this.#sinceUpdate[what] += 1;
    this.changes += 1;
  }

  /** Of what was seen, note what these hours do not have yet: the next update brings it. */
  #noteToCome(hours) {
    for (const [what, seen] of Object.entries(this.#sinceUpdate)) {
      const came = hours.reduce((sum, counts) => sum + counts[what] - this.at(Date.parse(counts.hour))[what], 0);
      this.#toCome[what] = Math.min(seen, Math.max(0, this.#toCome[what] + seen - came));
    }
  }

  get known() {
    return this.members !== null;
  }

  /** Whether there is no hour yet: the server has begun to count just now. */
  get empty() {
    return this.#hours.size === 0;
  }

  at(hour) {
    return this.#hours.get(hour) ?? EMPTY;
  }

  get membersNow() {
    return this.members + this.#sinceUpdate.joins - this.#sinceUpdate.leaves;
  }

  /** Today so far, in the viewer's time zone. `active` is the busiest hour's. */
  today(now) {
    const day = this.#sum(midnight(now), now, 1);
    for (const what of Object.keys(this.#sinceUpdate)) day[what] += this.#sinceUpdate[what] + this.#toCome[what];
    return day;
  }

  /** The same hours a week ago, of the current one as much as has passed; null if not known. */
  weekAgo(now) {
    const then = daysBefore(now, 7);
    if (this.oldest > midnight(then)) return null;
    const passed = (now % HOUR) / HOUR;
    const day = this.#sum(midnight(then), then, passed);
    day.membersThen = this.membersNow;
    for (let hour = hourOf(then) + HOUR; hour <= now; hour += HOUR) {
      day.membersThen -= this.at(hour).joins - this.at(hour).leaves;
    }
    return { ...day, onlineThen: this.at(hourOf(then)).online };
  }

  /** Each of the last days, oldest first; the last one is today so far. */
  days(number, now) {
    return Array.from({ length: number }, (_, index) => {
      const start = midnight(daysBefore(now, number - 1 - index));
      const end = index === number - 1 ? now : midnight(daysBefore(now, number - 2 - index)) - 1;
      return { start, known: end >= this.oldest, ...this.#sum(start, end, 1) };
    });
  }

  /** week[weekday][hour]: the average of `what`, null where no such hour has been seen whole. */
  week(number, what, now) {
    const cells = Array.from({ length: 7 }, () => Array.from({ length: 24 }, () => ({ sum: 0, seen: 0 })));
    const end = hourOf(now);
    for (let hour = Math.max(end - number * 24 * HOUR, this.oldest); hour < end; hour += HOUR) {
      const local = new Date(hour);
      const cell = cells[local.getDay()][local.getHours()];
      cell.sum += this.at(hour)[what];
      cell.seen += 1;
    }
    return cells.map((day) => day.map(({ sum, seen }) => (seen ? sum / seen : null)));
  }

  /** Counts of the hours that begin from `start` to `end`; of that in which `end` lies the part `ofLast`. */
  #sum(start, end, ofLast) {
    const total = { ...EMPTY };
    // Where clocks are half an hour off, an hour of UTC lies in two days: it belongs to the first.
    for (let hour = hourOf(start + HOUR - 1); hour <= end; hour += HOUR) {
      const share = hour === hourOf(end) ? ofLast : 1;
      const { messages, joins, leaves, active, online } = this.at(hour);
      total.messages += messages * share;
      total.joins += joins * share;
      total.leaves += leaves * share;
      total.active = Math.max(total.active, active * share);
      total.online = Math.max(total.online, online);
    }
    return total;
  }
}

export const hourOf = (at) => at - (at % HOUR);

/** The start of that day where the viewer is. */
function midnight(at) {
  return new Date(at).setHours(0, 0, 0, 0);
}

/** The same time of day, that many days earlier: not always 24 hours each. */
function daysBefore(at, days) {
  const date = new Date(at);
  return date.setDate(date.getDate() - days);
}
