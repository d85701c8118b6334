/** One question to `/api/chat`, answered as a stream: see client.js for its rules. */

import type { SSEEvent } from "./sse.js";

/** Text, or a list of parts. */
export type Content = string | readonly object[] | null;

/** As OpenAI has it, so that objects of your own and of its clients will do. */
export interface Message {
  role: "system" | "user" | "assistant" | "tool" | "developer" | (string & {});
  content?: Content;
  name?: string;
  tool_calls?: readonly object[];
  tool_call_id?: string;
}

/** A part of a tool call, as it came: parts of one `index` belong together. See `withCalls` in deltas.js. */
export interface ToolCallPiece {
  index?: number;
  id?: string | null;
  function?: { name?: string | null; arguments?: string | null } | null;
}

export interface Usage {
  prompt_tokens?: number;
  completion_tokens?: number;
  total_tokens?: number;
  [detail: string]: unknown;
}

/** What arrives. Text and reasoning are pieces to append; of several choices it is the first's. */
export type Delta =
  | { type: "text"; text: string }
  | { type: "reasoning"; text: string }
  | { type: "tool_calls"; calls: ToolCallPiece[] }
  /** Why the model stopped: "stop", "length", "tool_calls", "content_filter", ... */
  | { type: "finish"; reason: string }
  /** The upstream's count, where it gives one: ask with `body: {stream_options: {include_usage: true}}`. */
  | { type: "usage"; usage: Usage };

/**
 * `truncated`: the connection broke, or ended before the answer did. `aborted`: you stopped it. `error`: refused, or
 * the stream said so (the server's `stream_interrupted` among them).
 */
export type BadEnding = "truncated" | "aborted" | "error";

export interface ErrorFacts {
  ending: BadEnding;
  /**
   * The server's code, or `aborted`, `truncated`, `connection_lost`, `network_error`, `client_timeout`,
   * `protocol_error` (no event stream), `bad_event`, `http_<status>`.
   */
  code: string;
  /** HTTP status; 0 without a response. */
  status?: number;
  /** Seconds after which the server would like to be asked again. */
  retryAfter?: number | null;
  /** The text that had arrived. */
  partial?: string;
  /** What the server's log calls this request. */
  requestId?: string | null;
}

/** Why an answer is not complete. Its `message` is for people: the server's, where there is one. */
export class ChatError extends Error implements Required<ErrorFacts> {
  constructor(message: string, facts: ErrorFacts);
  ending: BadEnding;
  code: string;
  status: number;
  retryAfter: number | null;
  partial: string;
  requestId: string | null;
}

export interface SentRequest {
  method: string;
  url: string;
  headers: Record<string, string>;
  body: string;
}

export interface ChatOptions {
  /** The conversation, oldest first. */
  messages: readonly Message[];
  /** One of the server's models; without it the server takes its first. */
  model?: string;
  /** Abort it to stop the answer, and the model. Leaving the page does the same. */
  signal?: AbortSignal;
  /** Further fields of the request, e.g. `{temperature: 0.2}`. */
  body?: Record<string, unknown>;
  /** Default `/api/chat`. */
  url?: string;
  /** Where a lost session is fetched anew, default `/api/session`; "" to leave it lost. */
  sessionUrl?: string;
  /** Repetitions at most, default 2. */
  retries?: number;
  /**
   * Milliseconds without a byte before we give up, default 90,000: the server's own deadlines are 60 s, and its word
   * on what happened is better than ours.
   */
  idleTimeout?: number;
  /** Milliseconds from the request to the first delta, whatever else may arrive; default 150,000. */
  firstTokenTimeout?: number;
  fetch?: typeof globalThis.fetch;
  /** The jitter, 0 to 1. */
  random?: () => number;
  /** Each request, as it is sent. */
  onRequest?: (request: SentRequest) => void;
  /** Each response, when its headers are in. */
  onResponse?: (response: Response) => void;
  /** Each event, as received. */
  onEvent?: (event: SSEEvent) => void;
  /** Before each wait for a repetition; `delay` in milliseconds. */
  onRetry?: (notice: { attempt: number; delay: number; error: ChatError }) => void;
}

export interface Metrics {
  /** Milliseconds to the first delta; null before that. */
  ttft_ms: number | null;
  /** Between the first and the last token; null when there is nothing between. */
  tokens_per_s: number | null;
  /** Milliseconds, until now or to the end. */
  total_ms: number;
  retries: number;
  /** The upstream's own count of the answer's tokens, or deltas: with most models the same. */
  tokens: number;
}

/** Iterate it once; its fields fill while you do. The loop throws ChatError unless the answer is complete. */
export interface ChatStream {
  [Symbol.asyncIterator](): AsyncGenerator<Delta, void, void>;
  text: string;
  finishReason: string | null;
  usage: Usage | null;
  requestId: string | null;
  readonly metrics: Metrics;
}

/** Asks, and gives the answer piece by piece. */
export function streamChat(options: ChatOptions): ChatStream;

export interface Headerlike {
  get(name: string): string | null;
}

/** Milliseconds to wait before a request is sent again (`jitter` 0 to 1); null: not to be sent again. */
export function retryDelay(
  response: { status: number; headers: Headerlike },
  attempt: number,
  jitter: number,
): number | null;

/** Seconds to wait, from retry-after-ms or Retry-After (seconds or a date). */
export function retryAfter(headers: Headerlike, now?: number): number | null;
