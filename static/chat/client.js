// @ts-check
/**
 * One question to `/api/chat`, answered as a stream. The types are in client.d.ts.
 *
 *     const answer = streamChat({ messages, model, signal });
 *     for await (const delta of answer) {
 *       if (delta.type === "text") show(delta.text);     // or see textOf in deltas.js
 *     }                                                  // came to its end: the answer is complete
 *
 * Rules of this file:
 * 1. The loop ends normally only when the answer is complete. Every other ending throws a ChatError that says which
 *    (`truncated`, `aborted`, `error`) and carries the text so far as `partial`.
 * 2. Complete means `[DONE]`, or a finish_reason for every choice seen; whatever the socket does afterwards.
 * 3. A request is repeated only before its answer began, only on statuses that say so, and never silently for long.
 *    A connection that broke is never a reason, so a tab that slept and wakes up asks nothing twice.
 * 4. Leaving the loop, by `break`, by an exception or by the signal, ends the request at once; leaving the page, too.
 * 5. No key, and no other origin: the session cookie does it, and the page cannot read even that.
 */

import { SSEParser } from "./sse.js";

/** @typedef {import("./client.js").BadEnding} BadEnding */
/** @typedef {import("./client.js").ChatOptions} ChatOptions */
/** @typedef {import("./client.js").Delta} Delta */
/** @typedef {import("./client.js").ChatStream} ChatStream */
/** @typedef {import("./client.js").ErrorFacts} ErrorFacts */
/** @typedef {import("./client.js").Headerlike} Headerlike */
/** @typedef {import("./client.js").SentRequest} SentRequest */

/** A 502 that asking again does not help: the server's key is wrong. */
const LASTING_CODE = "upstream_auth";
/** Milliseconds. A longer wait asked for by the server is the reader's to decide on: it is an error with retryAfter. */
const MAX_HONOURED_WAIT = 5_000;
const FIRST_BACKOFF = 500;
const MAX_BACKOFF = 8_000;
/** Milliseconds given to the last bytes after `[DONE]`, so that the connection can be used again. */
const DRAIN = 1_000;
/** Milliseconds given to a stream that has a finish_reason, but has neither said `[DONE]` nor ended. */
const SETTLE = 3_000;
/** A timer that is late by so many milliseconds has slept, with its tab; what came meanwhile is read first. */
const ASLEEP = 2_000;

/** Why an answer is not complete. */
export class ChatError extends Error {
  name = "ChatError";
  /** @type {BadEnding} */
  ending = "error";
  code = "";
  status = 0;
  /** @type {number | null} */
  retryAfter = null;
  partial = "";
  /** @type {string | null} */
  requestId = null;

  /**
   * @param {string} message for people: the server's, where there is one
   * @param {ErrorFacts} facts
   */
  constructor(message, facts) {
    super(message);
    Object.assign(this, facts);
  }
}

/**
 * Asks, and gives the answer piece by piece.
 * @param {ChatOptions} options
 * @returns {ChatStream} iterate it once; its fields fill while you do
 */
export function streamChat({
  messages, model, body, signal,
  url = "/api/chat", sessionUrl = "/api/session",
  retries = 2, idleTimeout = 90_000, firstTokenTimeout = 150_000,
  fetch = globalThis.fetch, random = Math.random,
  onRequest, onResponse, onEvent, onRetry,
}) {
  const controller = new AbortController(); // its reason is the error that is thrown
  const leave = () => controller.abort(fault("aborted", "The answer was stopped.", "aborted"));
  const late = () =>
    controller.abort(fault("client_timeout", "Nothing arrived for too long.", status === 200 ? "truncated" : "error"));
  /** @param {"addEventListener" | "removeEventListener"} verb */
  const listen = (verb) => {
    signal?.[verb]("abort", leave);
    globalThis[verb]?.("pagehide", leave); // a page that is kept for the way back would go on asking
  };
  const idle = alarm(late);
  const first = alarm(late);
  /** @type {Map<number, string | null | undefined>} finish_reason by choice */
  const choices = new Map();
  let isRead = false;
  let status = 0; // of the response; 200: the answer has begun
  let isDone = false;
  let tokens = 0; // deltas with something in them: with most models one token each
  let repetitions = 0;
  let startedAt = 0; // this and the next ones: milliseconds
  let firstAt = 0;
  let lastAt = 0;
  let endedAt = 0;

  /** @type {ChatStream} */
  const answer = {
    text: "",
    finishReason: null,
    usage: null,
    requestId: null,
    get metrics() {
      const count = answer.usage?.completion_tokens ?? tokens;
      return {
        ttft_ms: firstAt ? firstAt - startedAt : null,
        tokens_per_s: count > 1 && lastAt > firstAt ? ((count - 1) * 1000) / (lastAt - firstAt) : null,
        total_ms: startedAt && (endedAt || performance.now()) - startedAt,
        retries: repetitions,
        tokens: count,
      };
    },
    [Symbol.asyncIterator]() {
      if (isRead) throw new TypeError("it was read before");
      isRead = true;
      const deltas = read();
      const end = deltas.return.bind(deltas);
      deltas.return = () => {
        leave(); // a generator alone would first wait for the next piece
        return end(undefined);
      };
      return deltas;
    },
  };
  return answer;

  /** Whether the answer is whole, should nothing more arrive. */
  function isWhole() {
    return isDone || (choices.size > 0 && [...choices.values()].every(Boolean));
  }

  /** @returns {AsyncGenerator<Delta, undefined, undefined>} */
  async function* read() {
    let whole = false;
    startedAt = performance.now();
    listen("addEventListener");
    try {
      if (signal?.aborted) leave();
      const reader = await ask();
      const parser = new SSEParser();
      while (!isDone) {
        idle.set(isWhole() ? SETTLE : idleTimeout);
        const { value, done } = await reader.read();
        controller.signal.throwIfAborted();
        if (done) break;
        for (const event of parser.feed(value)) {
          onEvent?.(event);
          for (const delta of take(event)) {
            idle.clear(); // the reader of this loop may take its time
            if (firstAt) first.clear();
            yield delta;
            controller.signal.throwIfAborted(); // what is still in hand is not shown after a stop
          }
        }
      }
      if (!isWhole()) throw fault("truncated", "The answer broke off.", "truncated");
      whole = true;
      drain(reader, leave);
    } catch (error) {
      const said = error instanceof ChatError && error !== controller.signal.reason; // by the stream
      if (said || !isWhole()) throw explained(error);
    } finally {
      endedAt = performance.now();
      idle.clear();
      first.clear();
      listen("removeEventListener");
      if (!whole) leave();
    }
  }

  /**
   * Sends the request, and sends it again where that is allowed.
   * @returns {Promise<ReadableStreamDefaultReader<Uint8Array>>} of a 200 with an event stream
   * @throws {ChatError}
   */
  async function ask() {
    const { signal } = controller;
    /** @type {SentRequest} */
    const request = {
      method: "POST",
      url,
      headers: { "content-type": "application/json", accept: "text/event-stream" },
      body: JSON.stringify({ model, messages, stream: true, ...body }),
    };
    for (let renewed = false; ; ) {
      signal.throwIfAborted();
      idle.set(idleTimeout);
      first.set(firstTokenTimeout);
      status = 0;
      onRequest?.(request);
      // A redirect is an error: a conversation is never forwarded to another address.
      const response = await fetch(url, { ...request, signal, mode: "same-origin", redirect: "error" });
      ({ status } = response);
      answer.requestId = response.headers.get("x-request-id");
      onResponse?.(response);
      if (status === 200) return streamOf(response).getReader();
      const error = await refusal(response);
      if (error.code === "session_required" && sessionUrl && !renewed) {
        renewed = true;
        if ((await fetch(sessionUrl, { signal })).ok) continue;
      }
      const again = repetitions < retries && error.code !== LASTING_CODE;
      const delay = again ? retryDelay(response, repetitions, random()) : null;
      if (delay === null) throw error;
      idle.clear();
      first.clear();
      repetitions += 1;
      onRetry?.({ attempt: repetitions, delay, error });
      await pause(delay, signal);
    }
  }

  /**
   * @param {import("./sse.js").SSEEvent} event
   * @returns {Generator<Delta, void, void>}
   * @throws {ChatError} for an error event, and for what cannot be read
   */
  function* take(event) {
    isDone ||= event.data.trim() === "[DONE]";
    if (isDone) return;
    const chunk = readChunk(event);
    for (const { index = 0, delta, finish_reason: reason } of listOf(chunk.choices).map(Object)) {
      const known = choices.get(index);
      choices.set(index, known); // its end counts from its last piece on
      for (const found of index ? [] : piecesOf(Object(delta))) {
        tokens += 1;
        lastAt = performance.now();
        firstAt ||= lastAt;
        if (found.type === "text") answer.text += found.text;
        yield found;
      }
      choices.set(index, known || reason);
      if (!index && reason && !known) yield { type: "finish", reason: (answer.finishReason = reason) };
    }
    const { usage } = chunk;
    if (usage && typeof usage === "object") yield { type: "usage", usage: (answer.usage = usage) };
  }

  /**
   * @param {unknown} cause
   * @returns {ChatError}
   */
  function explained(cause) {
    const error =
      controller.signal.reason ??
      (cause instanceof ChatError ? cause
      : cause instanceof RangeError ? fault("bad_event", cause.message)
      : status === 200 ? fault("connection_lost", "The connection broke.", "truncated")
      : fault("network_error", "The server could not be reached."));
    if (error !== cause) error.cause = cause;
    return Object.assign(error, { partial: answer.text, requestId: answer.requestId, status });
  }
}

/**
 * @param {string} code
 * @param {string} message
 * @param {BadEnding} [ending]
 */
function fault(code, message, ending = "error") {
  return new ChatError(message, { code, ending });
}

/** @param {unknown} value @returns {any[]} */
function listOf(value) {
  return Array.isArray(value) ? value : [];
}

/**
 * @param {any} delta of a chunk's choice
 * @returns {Delta[]}
 */
function piecesOf({ content, refusal, reasoning, reasoning_content, tool_calls }) {
  /** @type {any[]} */
  const pieces = [
    { type: "reasoning", text: reasoning_content ?? reasoning },
    { type: "text", text: content ?? refusal },
    { type: "tool_calls", calls: listOf(tool_calls) },
  ];
  return pieces.filter(({ text, calls }) => isText(text) || calls?.length);
}

/** @param {unknown} value */
function isText(value) {
  return typeof value === "string" && value !== "";
}

/**
 * How long to wait before the request is sent again. Pure.
 * @param {{status: number, headers: Headerlike}} response
 * @param {number} attempt repetitions so far
 * @param {number} jitter 0 to 1
 * @returns {number | null} milliseconds; null: do not send it again
 */
export function retryDelay({ status, headers }, attempt, jitter) {
  const wish = headers.get("x-should-retry");
  if (wish === "false" || (wish !== "true" && ![429, 502, 503].includes(status))) return null;
  const asked = retryAfter(headers);
  if (asked !== null) return asked * 1000 <= MAX_HONOURED_WAIT ? asked * 1000 + jitter * 250 : null;
  return Math.min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** attempt) * (0.5 + jitter / 2);
}

/**
 * @param {Headerlike} headers
 * @param {number} [now] Unix milliseconds
 * @returns {number | null} seconds to wait, from retry-after-ms or Retry-After (RFC 9110, 10.2.3: seconds or a date)
 */
export function retryAfter(headers, now = Date.now()) {
  for (const [name, unit] of /** @type {[string, number][]} */ ([["retry-after-ms", 1000], ["retry-after", 1]])) {
    const value = headers.get(name) ?? "";
    if (/^\d+(\.\d+)?$/.test(value)) return Number(value) / unit;
  }
  const date = Date.parse(headers.get("retry-after") ?? "");
  return isNaN(date) ? null : Math.max(0, (date - now) / 1000);
}

/**
 * @param {import("./sse.js").SSEEvent} event
 * @returns {any} the chunk, an object
 * @throws {ChatError} also for an error event: OpenAI's object, or whatever an upstream made of it
 */
function readChunk({ event, data }) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    // what is no JSON is no chunk either
  }
  if (Object(chunk) !== chunk) throw fault("bad_event", "An event is no chunk.");
  const error = chunk.error || (event === "error" && chunk);
  if (!error) return chunk;
  const message = isText(error) ? error : error.message;
  const code = String(error.code ?? error.type ?? "stream_error");
  throw fault(code, message || "The answer ended with an error.");
}

/**
 * @param {Response} response with status 200
 * @throws {ChatError} when it is no event stream
 */
function streamOf({ headers, body }) {
  if (body && /^text\/event-stream\s*(;|$)/i.test(headers.get("content-type") ?? "")) return body;
  body?.cancel().catch(() => {}); // of no interest, and it may never end
  throw fault("protocol_error", "This is no event stream.");
}

/**
 * @param {Response} response with another status
 * @returns {Promise<ChatError>}
 */
async function refusal(response) {
  const { status, headers } = response;
  const body = await response.json().catch(() => null); // not from us: a gateway's HTML page, or cut
  const { message, code } = Object(body?.error);
  const error = fault(String(code || `http_${status}`), message || `The server answered with status ${status}.`);
  return Object.assign(error, { status, retryAfter: retryAfter(headers) });
}

/**
 * Reads what follows `[DONE]`, so that the response ends by itself and its connection can be used again.
 * @param {ReadableStreamDefaultReader<Uint8Array>} reader
 * @param {() => void} leave
 */
async function drain(reader, leave) {
  const timer = setTimeout(leave, DRAIN);
  try {
    while (!(await reader.read()).done);
  } catch {
    // it was complete before
  }
  clearTimeout(timer);
}

/**
 * @param {number} milliseconds
 * @param {AbortSignal} signal
 * @returns {Promise<void>} rejects when the signal aborts
 */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, milliseconds);
    if (signal.aborted) reject();
    signal.addEventListener("abort", reject); // the signal lives no longer than its request
  });
}

/** @typedef {ReturnType<typeof alarm>} Alarm */

/**
 * One timer, set again and again.
 * @param {() => void} ring
 */
function alarm(ring) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  const clear = () => clearTimeout(timer);
  /** @param {number} milliseconds from now */
  const set = (milliseconds) => {
    clear();
    const due = performance.now() + milliseconds;
    timer = setTimeout(() => {
      if (performance.now() - due < ASLEEP) ring();
      else timer = setTimeout(ring, ASLEEP);
    }, milliseconds);
  };
  return { set, clear };
}
