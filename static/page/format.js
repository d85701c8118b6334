// @ts-check
/** Numbers in words: times, rates and limits. Pure; the current time is an argument. */

/** @typedef {{name: string, limit: number, remaining: number, reset_at: number}} Limit as in `GET /api/session` */
/** @typedef {{what: string, who: string, window: string}} LimitWords */

const MINUTE = 60;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;
const UNITS = /** @type {[string, number][]} */ ([
  ["day", DAY],
  ["hour", HOUR],
  ["minute", MINUTE],
  ["second", 1],
]);

/**
 * @param {number} seconds
 * @returns {string} the one or two units that matter: "45 seconds", "3 hours 20 minutes", "7 days"
 */
export function duration(seconds) {
  const exact = Math.max(0, Math.ceil(seconds));
  const grain = exact >= 2 * DAY ? DAY : exact >= 2 * HOUR ? MINUTE * 10 : exact >= 10 * MINUTE ? MINUTE : 1;
  const whole = Math.round(exact / grain) * grain;
  const at = UNITS.findIndex(([, size]) => whole >= size);
  if (at < 0) return "0 seconds";
  const [name, size] = UNITS[at];
  const first = plural(Math.floor(whole / size), name);
  const [nextName, nextSize] = UNITS[at + 1] ?? ["", Infinity];
  const second = Math.floor((whole % size) / nextSize);
  return second ? `${first} ${plural(second, nextName)}` : first;
}

/**
 * @param {number} number
 * @param {string} noun
 */
export function plural(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/**
 * @param {number} milliseconds
 * @returns {string} "85 ms", "0.42 s", "12.3 s", "2 min 5 s"
 */
export function elapsed(milliseconds) {
  if (milliseconds < 100) return `${Math.round(milliseconds)} ms`;
  const seconds = milliseconds / 1000;
  if (seconds < 59.95) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  return `${Math.floor(Math.round(seconds) / 60)} min ${Math.round(seconds) % 60} s`;
}

/**
 * @param {string} name e.g. "tokens_per_session 200000/day"
 * @returns {LimitWords} what is counted, for which subject, and over which time
 */
export function limitWords(name) {
  const [, rule = "", count = "", window = ""] = /^(\w+)\s+(\d+)\s*(?:\/|per)\s*(.+)$/.exec(name) ?? [];
  if (!count) return { what: name, who: "", window: "" };
  const what = rule.startsWith("tokens") ? "tokens" : "requests";
  const who = /session$/.test(rule) ? "this session" : /address/.test(rule) ? "your network" : "everyone here";
  return { what, who, window: window.replace(/^1\s+/, "") };
}

/**
 * @param {Limit[]} limits
 * @returns {Limit | null} the one that will be reached first, as a share of itself
 */
export function tightest(limits) {
  const share = (/** @type {Limit} */ { remaining, limit }) => (limit > 0 ? remaining / limit : 1);
  return limits.reduce(
    (least, limit) => (least === null || share(limit) < share(least) ? limit : least),
    /** @type {Limit | null} */ (null),
  );
}

/**
 * @param {Limit} limit
 * @param {number} now Unix seconds
 * @returns {string} when it is full again, in words; "" when it is
 */
export function comesBack({ limit, remaining, reset_at }, now) {
  if (remaining >= limit || reset_at <= now) return "";
  return `resets in ${duration(reset_at - now)}`;
}
