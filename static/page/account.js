// @ts-check
/** The account: the session and what is left of the limits, from `/api/session`. */

import { make } from "./dom.js";
import { comesBack, duration, limitWords, tightest } from "./format.js";

/** @typedef {import("./format.js").Limit} Limit */
/** @typedef {{mode: string, user: string | null, expires_at: number | null}} SessionFacts */
/** @typedef {{session: SessionFacts, models: string[], limits: Limit[]}} Account */

/** Milliseconds for an answer: a password may have to wait for its turn to be checked. */
const ANSWER = 30_000;

/**
 * In anonymous mode that is what makes the session.
 * @returns {Promise<Account>}
 */
export const fetchAccount = () => askSession("GET", "session");

/**
 * @param {{user?: string, password: string}} credentials
 * @returns {Promise<Account>}
 */
export const signIn = (credentials) => askSession("POST", "session", credentials);

/** @returns {Promise<{logout_url: string | null}>} */
export const signOut = () => askSession("DELETE", "logout_url");

/**
 * @param {"GET" | "POST" | "DELETE"} method
 * @param {string} field that the answer must have
 * @param {object} [body]
 * @returns {Promise<any>} the answer
 * @throws {Error} with `code`, `status` and `retryAfter` as ChatError has them
 */
async function askSession(method, field, body) {
  const response = await fetch("/api/session", {
    method,
    credentials: "same-origin",
    cache: "no-store",
    redirect: "manual",
    signal: AbortSignal.timeout(ANSWER),
    ...(body && { headers: { "content-type": "application/json" }, body: JSON.stringify(body) }),
  }).catch((cause) => {
    throw failure("The server could not be reached.", "network_error", 0, null, cause);
  });
  if (response.type === "opaqueredirect") {
    // Our server has no redirects here: this is the sign-in of a proxy in front of it.
    throw failure("Please sign in first.", "login_required", 401, null);
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer?.[field] !== undefined) return answer;
  const error = answer?.error;
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
export function needsLogin({ mode, expires_at }) {
  return mode !== "anonymous" && expires_at === null; // a shared password has no user name
}

/** @param {SessionFacts} session @returns {boolean} whether a user is signed in, and may sign out */
function isSignedIn(session) {
  return session.mode !== "anonymous" && !needsLogin(session);
}

/**
 * @typedef {object} Elements
 * @property {HTMLElement} card
 * @property {HTMLElement} tightest
 * @property {HTMLElement} list
 * @property {HTMLElement} state
 * @property {HTMLButtonElement} signOut
 */

/**
 * @param {Elements} elements
 * @param {Account} account
 * @param {number} now Unix seconds
 */
export function showAccount(elements, { session, limits }, now) {
  elements.card.hidden = needsLogin(session);
  elements.signOut.hidden = !isSignedIn(session);
  const least = tightest(limits);
  elements.tightest.replaceChildren(...(least ? [meter(least), short(least)] : ["Session"]));
  elements.list.replaceChildren(...limits.map((limit) => row(limit, now)));
  elements.list.hidden = limits.length === 0;
  elements.state.replaceChildren(...sessionWords(session, now));
}

/** @param {Limit} limit */
function short(limit) {
  const { what, window } = limitWords(limit.name);
  const wide = (/** @type {string} */ words) => make("span", { class: "wide" }, words);
  const count = limit.remaining.toLocaleString("en");
  const most = wide(` of ${limit.limit.toLocaleString("en")}`); // on a small screen the meter shows it
  return make("span", {}, count, most, ` ${what} left`, wide(window ? ` this ${window}` : ""));
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
  const { what, who, window } = limitWords(name);
  const most = Math.max(limit, 1);
  return make("meter", {
    min: "0",
    max: String(most),
    low: String(most * 0.2),
    high: String(most * 0.5),
    optimum: String(most),
    value: String(remaining),
    "aria-label": `${what}${window ? ` a ${window}` : ""} left${who ? `, ${who}` : ""}`,
  });
}

/**
 * @param {SessionFacts} session
 * @param {number} now
 * @returns {(string | Node)[]}
 */
function sessionWords(session, now) {
  const { user, expires_at } = session;
  if (needsLogin(session)) return ["Not signed in"];
  const nobody = isSignedIn(session) ? "Signed in" : "Anonymous session";
  const who = user === null ? [nobody] : ["Signed in as ", make("bdi", {}, user)];
  if (expires_at === null) return who;
  const date = new Date(expires_at * 1000);
  const words = expires_at > now ? `expires in ${duration(expires_at - now)}` : "expired";
  const time = make("time", { datetime: date.toISOString(), title: date.toLocaleString() }, words);
  return [...who, ", ", time];
}
