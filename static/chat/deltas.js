// @ts-check
/**
 * What may be done with the deltas of an answer: its text alone, batches for a screen, whole tool calls.
 *
 *     for await (const deltas of batched(streamChat({ messages }))) render(deltas);
 *
 * Nothing here knows of a network. Nothing gets lost: what was in hand is given out before an error is thrown.
 */

/** @typedef {import("./client.js").Delta} Delta */
/** @typedef {import("./client.js").ToolCallPiece} ToolCallPiece */
/** @typedef {import("./deltas.js").ToolCall} ToolCall */

/**
 * @param {AsyncIterable<Delta>} deltas
 * @returns {AsyncGenerator<string, void, void>} the text alone
 */
export async function* textOf(deltas) {
  for await (const delta of deltas) if (delta.type === "text") yield delta.text;
}

/**
 * What arrives, in batches: the first at once, the others not before `milliseconds` have gone by since the one before,
 * and then at once, whether more is coming or not. The source is asked for one item at a time, so a slow reader slows
 * it down and nothing piles up.
 *
 * @template T
 * @param {AsyncIterable<T>} source
 * @param {number} [milliseconds]
 * @returns {AsyncGenerator<T[], void, void>}
 */
export async function* batched(source, milliseconds = 50) {
  const items = source[Symbol.asyncIterator]();
  const ask = () => {
    const asked = items.next();
    asked.catch(() => {}); // it is awaited later, and must not count as unhandled until then
    return asked;
  };
  let asked = ask();
  let shownAt = -Infinity;
  let isOut = false; // a batch is with the reader: only then can the reader leave
  try {
    for (;;) {
      const first = await asked;
      if (first.done) return;
      asked = ask();
      const batch = [first.value];
      const due = Math.max(performance.now(), shownAt + milliseconds);
      const wait = after(due - performance.now());
      while (performance.now() < due + milliseconds) { // a source that is never at a loss lets no timer run
        const next = await Promise.race([asked, wait.over]).catch(() => null);
        if (!next || next.done) break; // what it was, the next turn sees
        batch.push(next.value);
        asked = ask();
      }
      wait.cancel();
      shownAt = performance.now();
      isOut = true;
      yield batch;
      isOut = false;
    }
  } finally {
    if (isOut) await items.return?.();
  }
}

/** @param {number} milliseconds */
function after(milliseconds) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  /** @type {Promise<null>} */
  const over = new Promise((resolve) => {
    timer = setTimeout(resolve, milliseconds, null);
  });
  return { over, cancel: () => clearTimeout(timer) };
}

/**
 * @param {readonly ToolCall[]} calls as far as they have come; left as they are
 * @param {readonly ToolCallPiece[]} pieces of a `tool_calls` delta
 * @returns {ToolCall[]} with the pieces
 */
export function withCalls(calls, pieces) {
  return pieces.reduce(withPiece, [...calls]);
}

/**
 * @param {ToolCall[]} calls
 * @param {ToolCallPiece} piece
 * @returns {ToolCall[]}
 */
function withPiece(calls, { index = 0, id, function: part }) {
  const known = calls.find((call) => call.index === index);
  const grown = {
    index,
    id: known?.id || (id ?? ""),
    name: (known?.name ?? "") + (part?.name ?? ""),
    arguments: (known?.arguments ?? "") + (part?.arguments ?? ""),
  };
  return known ? calls.map((call) => (call === known ? grown : call)) : [...calls, grown];
}
