// @ts-check
/**
 * The visitor: one value, replaced as a whole by each answer of the server. Pure.
 *
 *     unknown -> present | new;   present -> ended (the session ran out) | left (signed out here or in another tab)
 */

import { needsLogin } from "./account.js";
import { ownerOf } from "./storage.js";

/** @typedef {import("./account.js").Account} Account */

/**
 * @typedef {object} Visitor
 * @property {"unknown" | "new" | "ended" | "left" | "present"} state `present`: may ask; the others may not, or not yet
 * @property {Account | null} account from the latest answer of the server
 * @property {string} user the last user with a name; "" before the first
 * @property {string} owner whose conversation is on the screen, as storage.js names it; "" before the first
 */

/** @type {Visitor} before the server's first answer */
export const UNKNOWN = { state: "unknown", account: null, user: "", owner: "" };

/**
 * @param {Visitor} before
 * @param {Account} account the server's answer
 * @returns {Visitor}
 */
export function withAccount(before, account) {
  const user = account.session.user ?? before.user;
  if (needsLogin(account.session)) return { ...before, state: before.state === "present" ? "ended" : "new", account, user };
  return { state: "present", account, user, owner: ownerOf(account.session) };
}

/**
 * @param {Visitor} before
 * @param {string} [mode] of the session that there is none of
 * @returns {Visitor} without a session, which was not ended on purpose
 */
export function withoutSession(before, mode = before.account?.session.mode ?? "header") {
  const { models = [] } = before.account ?? {};
  return withAccount(before, { session: { mode, user: null, expires_at: null }, models, limits: [] });
}

/**
 * @param {Visitor} before
 * @returns {Visitor} signed out
 */
export function signedOut(before) {
  return { ...withoutSession(before), state: "left" };
}

/**
 * @param {Visitor} visitor
 * @returns {boolean} signed out where the next question to the server would sign in again
 */
export function staysOut({ state, account }) {
  return state === "left" && account?.session.mode === "header";
}
