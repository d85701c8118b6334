/** What may be done with the deltas of an answer. */

import type { Delta, ToolCallPiece } from "./client.js";

/** The text alone. */
export function textOf(deltas: AsyncIterable<Delta>): AsyncGenerator<string, void, void>;

/**
 * What arrives, in batches: the first at once, the others every `milliseconds` (default 50), also while nothing more
 * comes. What is in hand is given out before an error is thrown.
 */
export function batched<T>(source: AsyncIterable<T>, milliseconds?: number): AsyncGenerator<T[], void, void>;

/** A tool call, as far as it has come: `arguments` is JSON once the answer is complete. */
export interface ToolCall {
  index: number;
  id: string;
  name: string;
  arguments: string;
}

/** Adds the pieces of a `tool_calls` delta to the calls so far. */
export function withCalls(calls: readonly ToolCall[], pieces: readonly ToolCallPiece[]): ToolCall[];
