// Numbers, times and lists as people read them. One locale, as the page is in one language; the time
// zone is the viewer's own.

const LOCALE = "en-GB";
const whole = new Intl.NumberFormat(LOCALE, { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat(LOCALE, { notation: "compact", maximumFractionDigits: 1 });
const fine = new Intl.NumberFormat(LOCALE, { maximumFractionDigits: 1 });
const list = new Intl.ListFormat(LOCALE);
const clock = new Intl.DateTimeFormat(LOCALE, { timeStyle: "medium" });
const minutes = new Intl.DateTimeFormat(LOCALE, { timeStyle: "short" });
const date = new Intl.DateTimeFormat(LOCALE, { weekday: "short", day: "numeric", month: "short" });

export const zone = clock.resolvedOptions().timeZone;

/** 1,234 up to 99,999; above that 123K, which still fits where it stands. */
export const number = (value) => (Math.abs(value) < 100_000 ? whole : short).format(value);
/** In five characters, for an axis or a comparison. */
export const brief = (value) => (Math.abs(value) < 10_000 ? whole : short).format(value);
export const decimal = (value) => (Math.abs(value) < 100 ? fine : whole).format(value);
export const signed = (value) => (value > 0 ? "+" : "") + number(value);
export const count = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;
export const and = (words) => list.format(words);
export const time = (at) => clock.format(at);
export const hourMinute = (at) => minutes.format(at);
export const day = (at) => date.format(at);

/** "14:00–15:00" */
export const hourRange = (hour) =>
  [hour, hour + 1].map((each) => `${String(each % 24).padStart(2, "0")}:00`).join("–");

export const WEEKDAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

export const STATUSES = { online: "online", idle: "idle", dnd: "do not disturb", offline: "offline" };
