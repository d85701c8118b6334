// @ts-check
/** Who the server takes us for, and what is left of the limits: `GET /api/session`, shown. */

import { make } from "./dom.js";
import { comesBack, duration, limitWords, tightest } from "./figures.js";

/** @typedef {import("./figures.js").Limit} Limit */
/** @typedef {{mode: string, user: string | null, expires_at: number | null}} SessionFacts */
/** @typedef {{session: SessionFacts, models: string[], limits: Limit[]}} Account */

/**
 * Asks the server; in anonymous mode that is what makes the session.
 * @returns {Promise<Account>}
 * @throws {Error} with `code`, `status` and `retryAfter` as ChatError has them
 */
export async function fetchAccount() {
  const response = await fetch("/api/session", { credentials: "same-origin", cache: "no-store" }).catch((cause) => {
    throw failure("The server could not be reached.", "network_error", 0, null, cause);
  });
  const body = await response.json().catch(() => null);
  if (response.ok && body?.session) return body;
  const error = body?.error;
  throw failure(
    error?.message ?? `The server answered with status ${response.status}.`,
    error?.code ?? (response.ok ? "protocol_error" : `http_${response.status}`),
    response.status,
    Number(response.headers.get("retry-after")) || null,
  );
}

/**
 * @param {string} message
 * @param {string} code
 * @param {number} status
 * @param {number | null} retryAfter
 * @param {unknown} [cause]
 */
function failure(message, code, status, retryAfter, cause) {
  return Object.assign(new Error(message, { cause }), { code, status, retryAfter });
}

/** @param {SessionFacts} session @returns {boolean} */
export function needsLogin({ mode, user }) {
  return mode !== "anonymous" && user === null;
}

/**
 * @param {{card: HTMLDetailsElement, tightest: HTMLElement, list: HTMLElement, state: HTMLElement}} elements
 * @param {Account} account
 * @param {number} now Unix seconds
 */
export function showAccount(elements, { session, limits }, now) {
  elements.card.hidden = false;
  const least = tightest(limits);
  elements.tightest.replaceChildren(...(least ? [meter(least), short(least)] : ["Session"]));
  elements.list.replaceChildren(...limits.map((limit) => row(limit, now)));
  elements.list.hidden = limits.length === 0;
  elements.state.replaceChildren(...sessionWords(session, now));
}

/** @param {Limit} limit */
function short(limit) {
  const { what, window } = limitWords(limit.name);
  const words = `${limit.remaining.toLocaleString("en")} of ${limit.limit.toLocaleString("en")} ${what} left`;
  return make("span", {}, words, make("span", { class: "wide" }, window ? ` this ${window}` : ""));
}

/**
 * @param {Limit} limit
 * @param {number} now
 */
function row(limit, now) {
  const { what, who, window } = limitWords(limit.name);
  return make(
    "li",
    { "data-limit": limit.name },
    make("span", {}, `${what}${window ? ` a ${window}` : ""}`),
    make("b", {}, `${limit.remaining.toLocaleString("en")} of ${limit.limit.toLocaleString("en")}`),
    meter(limit),
    make("small", {}, [who, comesBack(limit, now)].filter(Boolean).join(", ")),
  );
}

/** @param {Limit} limit */
function meter({ name, limit, remaining }) {
  const most = Math.max(limit, 1);
  return make("meter", {
    min: "0",
    max: String(most),
    low: String(most * 0.2),
    high: String(most * 0.5),
    optimum: String(most),
    value: String(remaining),
    "aria-label": `Left of ${name}`,
  });
}

/**
 * @param {SessionFacts} session
 * @param {number} now
 * @returns {(string | Node)[]}
 */
function sessionWords({ mode, user, expires_at }, now) {
  if (needsLogin({ mode, user, expires_at })) return ["Not signed in"];
  const who = user === null ? "Anonymous session" : `Signed in as ${user}`;
  if (expires_at === null) return [who];
  const date = new Date(expires_at * 1000);
  const words = expires_at > now ? `expires in ${duration(expires_at - now)}` : "expired";
  const time = make("time", { datetime: date.toISOString(), title: date.toLocaleString() }, words);
  return [`${who}, `, time];
}
