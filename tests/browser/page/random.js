// Randomness that fails the same way twice.

/** @param {string} seed @returns {() => number} 0 to 1 (mulberry32) */
export function seeded(seed) {
  let state = [...seed].reduce((sum, char) => (Math.imul(sum, 31) + (char.codePointAt(0) ?? 0)) | 0, 7);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * @template {string | Uint8Array} T
 * @param {T} whole
 * @param {() => number} random
 * @returns {T[]} the whole in pieces
 */
export function randomCuts(whole, random) {
  const pieces = [];
  for (let at = 0; at < whole.length; ) {
    const end = at + 1 + Math.floor(random() ** 3 * 20);
    pieces.push(/** @type {T} */ (whole.slice(at, end)));
    at = end;
  }
  return pieces;
}
