// @ts-check
/**
 * A conversation kept in this browser on request: it is there again after a reload.
 *
 * Rules of this file:
 * 1. Off until the user switches it on. The stored entry is the switch: without it nothing is written.
 * 2. One conversation, of one owner. It is never read, changed or overwritten for another owner, but deleted.
 * 3. What is read is taken for text by a stranger: its shape is checked, and it is shown as an answer is.
 * 4. A browser that keeps nothing, or not so much, is no fault: the answer says whether it was kept.
 */

/** @typedef {import("./account.js").SessionFacts} SessionFacts */
/** @typedef {{question: string, text: string, whole: boolean}} KeptTurn `whole`: the answer came to its end */

const SLOT = "chat-proxy conversation";

/**
 * @param {SessionFacts} session of a user that may chat
 * @returns {string} the conversation's owner. Users of a shared password are one owner, until the session ends
 */
export function ownerOf({ mode, user }) {
  return user === null ? mode : `${mode} ${user}`;
}

/**
 * @param {string} owner
 * @returns {KeptTurn[] | null} what was kept; null when this owner has not switched it on
 */
export function load(owner) {
  const found = read();
  if (found === null) return null;
  if (found.owner === owner) return found.turns;
  remove();
  return null;
}

/**
 * @param {string} owner
 * @param {KeptTurn[]} turns
 * @returns {boolean} false: switched on, but there is no room for it
 */
export function save(owner, turns) {
  return read()?.owner !== owner || write(owner, turns);
}

/**
 * @param {string} owner
 * @param {KeptTurn[]} turns
 * @returns {boolean} whether it is on now
 */
export function switchOn(owner, turns) {
  return write(owner, turns);
}

/** @param {string} owner */
export function switchOff(owner) {
  if (read()?.owner === owner) remove();
}

/** The session has ended: the conversation of a user without a name would be found by the next one. */
export function forgetNameless() {
  const found = read();
  if (found && !found.owner.includes(" ")) remove();
}

/** @returns {{owner: string, turns: KeptTurn[]} | null} */
function read() {
  try {
    const { owner, turns } = JSON.parse(localStorage.getItem(SLOT) ?? "null");
    return typeof owner === "string" && Array.isArray(turns) ? { owner, turns: turns.filter(isTurn) } : null;
  } catch {
    return null; // nothing, or nothing of ours, or storage is closed to this site
  }
}

/** @param {any} turn @returns {turn is KeptTurn} */
function isTurn(turn) {
  return typeof turn?.question === "string" && typeof turn.text === "string" && typeof turn.whole === "boolean";
}

/**
 * @param {string} owner
 * @param {KeptTurn[]} turns
 */
function write(owner, turns) {
  try {
    localStorage.setItem(SLOT, JSON.stringify({ owner, turns }));
    return true;
  } catch {
    return false;
  }
}

function remove() {
  try {
    localStorage.removeItem(SLOT);
  } catch {
    // then there was nothing either
  }
}
