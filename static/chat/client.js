// @ts-check
/**
 * One question to `/api/chat`, answered as a stream.
 *
 *     const answer = streamChat({ messages, model, signal });
 *     for await (const text of answer) show(text);       // came to its end: the answer is complete
 *
 * Rules of this file:
 * 1. The loop ends normally only when the answer is complete. Every other ending throws a ChatError that says which
 *    (`truncated`, `aborted`, `error`) and carries the text so far as `partial`.
 * 2. Complete means `[DONE]`, or a finish_reason for every choice seen; whatever the socket does afterwards.
 * 3. A request is repeated only before its answer began, only on statuses that say so, and never silently for long.
 * 4. Leaving the loop, by `break`, by an exception or by the signal, ends the request at once.
 * 5. No key, and no other origin: the session cookie does it, and the page cannot read even that.
 */

import { SSEParser } from "./sse.js";

/** @typedef {{role: "system" | "user" | "assistant", content: string | object[]}} Message */
/** @typedef {"truncated" | "aborted" | "error"} BadEnding */
/** @typedef {{prompt_tokens?: number, completion_tokens?: number, total_tokens?: number}} Usage */
/** @typedef {{method: string, url: string, headers: Record<string, string>, body: string}} SentRequest */
/** @typedef {{attempt: number, delay: number, error: ChatError}} RetryNotice `delay` in milliseconds */

/**
 * @typedef {object} ChatOptions
 * @property {Message[]} messages the conversation, oldest first
 * @property {string} [model] one of the server's models; without it the server takes its first
 * @property {AbortSignal} [signal] abort it to stop the answer
 * @property {Record<string, unknown>} [body] further fields of the request, e.g. `{temperature: 0.2}`
 * @property {string} [url] default `/api/chat`
 * @property {string} [sessionUrl] where a lost session is fetched anew, default `/api/session`; "" to leave it lost
 * @property {number} [retries] repetitions at most, default 2
 * @property {number} [idleTimeout] milliseconds without a byte before we give up, default 90,000: the server's own
 *   deadlines are 60 s, and its word on what happened is better than ours
 * @property {typeof globalThis.fetch} [fetch]
 * @property {() => number} [random] the jitter, 0 to 1
 * @property {(request: SentRequest) => void} [onRequest] each request as it is sent
 * @property {(response: Response) => void} [onResponse] each response, when its headers are in
 * @property {(event: import("./sse.js").SSEEvent) => void} [onEvent] each event, as received
 * @property {(notice: RetryNotice) => void} [onRetry] before each wait for a repetition
 */

const RETRY_STATUSES = new Set([429, 502, 503]);
/** A 502 that asking again does not help: the server's key is wrong. */
const LASTING_CODES = new Set(["upstream_auth"]);
/** Milliseconds. A longer wait asked for by the server is the reader's to decide on: it is an error with retryAfter. */
export const MAX_HONOURED_WAIT = 5_000;
const FIRST_BACKOFF = 500;
const MAX_BACKOFF = 8_000;
/** Milliseconds given to the last bytes after `[DONE]`, so that the connection can be used again. */
const DRAIN = 1_000;
/** Milliseconds given to a stream that has a finish_reason, but has neither said `[DONE]` nor ended. */
const SETTLE = 3_000;

/** Why an answer is not complete. */
export class ChatError extends Error {
  /**
   * @param {string} message for people: the server's, where there is one
   * @param {object} facts
   * @param {BadEnding} facts.ending
   * @param {string} facts.code the server's code, or `aborted`, `truncated`, `connection_lost`, `network_error`,
   *   `client_timeout`, `protocol_error` (no event stream), `bad_event`, `http_<status>`
   * @param {number} [facts.status] HTTP status; 0 without a response
   * @param {number | null} [facts.retryAfter] seconds after which the server would like to be asked again
   * @param {string} [facts.partial] the text that had arrived
   * @param {string | null} [facts.requestId] what the server's log calls this request
   * @param {unknown} [facts.cause]
   */
  constructor(message, { ending, code, status = 0, retryAfter = null, partial = "", requestId = null, cause }) {
    super(message, { cause });
    this.name = "ChatError";
    this.ending = ending;
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
    this.partial = partial;
    this.requestId = requestId;
  }
}

/**
 * Asks, and gives the answer's text piece by piece.
 * @param {ChatOptions} options
 * @returns {ChatStream} iterate it once; its fields fill while you do
 */
export function streamChat(options) {
  return new ChatStream(options);
}

/** What the events of one answer add up to. Pure. */
export class Answer {
  text = "";
  /** Events that carried text: with most models one token each. */
  deltas = 0;
  /** @type {Usage | null} */
  usage = null;
  /** @type {Map<number, string | null>} finish_reason by choice */
  #choices = new Map();
  done = false;

  /** @returns {string | null} why the model stopped: "stop", "length", "content_filter", ... */
  get finishReason() {
    return this.#choices.get(0) ?? null;
  }

  /** @returns {boolean} whether the answer is whole, should nothing more arrive */
  get complete() {
    return this.done || (this.#choices.size > 0 && [...this.#choices.values()].every((reason) => reason !== null));
  }

  /**
   * @param {import("./sse.js").SSEEvent} event
   * @returns {string} the text it adds to the first choice; "" for none
   * @throws {ChatError} for an error event, and for what cannot be read
   */
  take(event) {
    if (event.data.trim() === "[DONE]") {
      this.done = true;
      return "";
    }
    const chunk = readChunk(event);
    if (chunk.usage && typeof chunk.usage === "object") this.usage = chunk.usage;
    let added = "";
    for (const choice of Array.isArray(chunk.choices) ? chunk.choices : []) {
      const index = choice?.index ?? 0;
      this.#choices.set(index, choice?.finish_reason ?? this.#choices.get(index) ?? null);
      const text = choice?.delta?.content ?? choice?.delta?.refusal;
      if (index === 0 && typeof text === "string") added += text;
    }
    if (added !== "") {
      this.text += added;
      this.deltas += 1;
    }
    return added;
  }
}

export class ChatStream {
  #options;
  #answer = new Answer();
  #started = false;
  #timedOut = false;
  /** @type {string | null} */
  requestId = null;

  /** @param {ChatOptions} options */
  constructor(options) {
    this.#options = options;
  }

  /** The text so far. */
  get text() {
    return this.#answer.text;
  }

  /** Events with text so far. */
  get deltas() {
    return this.#answer.deltas;
  }

  /** Why the model stopped; null before it did. */
  get finishReason() {
    return this.#answer.finishReason;
  }

  /** The upstream's own count, where it gave one. */
  get usage() {
    return this.#answer.usage;
  }

  /** @returns {AsyncGenerator<string, void, void>} */
  [Symbol.asyncIterator]() {
    if (this.#started) throw new TypeError("a ChatStream can be read once");
    this.#started = true;
    return this.#read();
  }

  async *#read() {
    const { signal, idleTimeout = 90_000, onEvent } = this.#options;
    const controller = new AbortController();
    const leave = () => controller.abort();
    signal?.addEventListener("abort", leave, { once: true });
    const deadline = new Deadline(() => {
      this.#timedOut = true;
      leave();
    });
    const answer = this.#answer;
    let phase = "asking";
    try {
      if (signal?.aborted) throw signal.reason;
      const response = await this.#ask(controller.signal, deadline, idleTimeout);
      phase = "reading";
      const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
      const parser = new SSEParser();
      while (!answer.done) {
        deadline.set(answer.complete ? SETTLE : idleTimeout);
        const { value, done } = await reader.read();
        if (done) break;
        for (const event of parser.feed(value)) {
          if (signal?.aborted) throw signal.reason; // what is still in hand is not shown after a stop
          onEvent?.(event);
          const text = answer.take(event);
          if (text !== "") {
            deadline.clear(); // the reader of this loop may take its time
            yield text;
          }
          if (answer.done) break;
        }
      }
      if (!answer.complete) throw ended("The answer broke off before its end.", "truncated", "truncated");
      phase = "whole";
      drain(reader, controller);
    } catch (error) {
      if (answer.complete && !(error instanceof ChatError)) return;
      throw this.#explain(error, phase);
    } finally {
      deadline.clear();
      signal?.removeEventListener("abort", leave);
      if (phase !== "whole") leave();
    }
  }

  /**
   * Sends the request, and sends it again where that is allowed.
   * @param {AbortSignal} signal
   * @param {Deadline} deadline
   * @param {number} idleTimeout
   * @returns {Promise<Response>} a 200 with an event stream
   * @throws {ChatError}
   */
  async #ask(signal, deadline, idleTimeout) {
    const { fetch = globalThis.fetch, random = Math.random, retries = 2, onResponse, onRetry } = this.#options;
    const request = this.#request();
    let renewed = false;
    for (let attempt = 0; ; ) {
      deadline.set(idleTimeout);
      const response = await this.#send(fetch, request, signal);
      this.requestId = response.headers.get("x-request-id");
      onResponse?.(response);
      if (response.status === 200 && isEventStream(response)) return response;
      const error = await refusal(response);
      if (error.code === "session_required" && !renewed) {
        renewed = true;
        if (await this.#renewSession(fetch, signal)) continue;
      }
      const again = attempt < retries && !LASTING_CODES.has(error.code);
      const delay = again ? retryDelay(response, attempt, random()) : null;
      if (delay === null) throw error;
      attempt += 1;
      deadline.clear();
      onRetry?.({ attempt, delay, error });
      await pause(delay, signal);
    }
  }

  /** @returns {SentRequest} */
  #request() {
    const { url = "/api/chat", messages, model, body } = this.#options;
    return {
      method: "POST",
      url,
      headers: { "content-type": "application/json", accept: "text/event-stream" },
      body: JSON.stringify({ ...(model ? { model } : {}), messages, stream: true, ...body }),
    };
  }

  /**
   * @param {typeof globalThis.fetch} fetch
   * @param {SentRequest} request
   * @param {AbortSignal} signal
   */
  #send(fetch, request, signal) {
    this.#options.onRequest?.(request);
    return fetch(request.url, {
      method: request.method,
      headers: request.headers,
      body: request.body,
      signal,
      mode: "same-origin",
      credentials: "same-origin",
      cache: "no-store",
      redirect: "error", // a conversation is not forwarded to wherever somebody points
    });
  }

  /**
   * @param {typeof globalThis.fetch} fetch
   * @param {AbortSignal} signal
   * @returns {Promise<boolean>} whether there may be a session now
   */
  async #renewSession(fetch, signal) {
    const { sessionUrl = "/api/session" } = this.#options;
    if (sessionUrl === "") return false;
    const response = await fetch(sessionUrl, { signal, credentials: "same-origin", cache: "no-store" });
    return response.ok;
  }

  /**
   * @param {unknown} error
   * @param {string} phase
   * @returns {ChatError}
   */
  #explain(error, phase) {
    const found = this.#name(error, phase);
    found.partial = this.#answer.text;
    found.requestId ??= this.requestId;
    return found;
  }

  /**
   * @param {unknown} error
   * @param {string} phase
   * @returns {ChatError}
   */
  #name(error, phase) {
    if (this.#options.signal?.aborted) return ended("The answer was stopped.", "aborted", "aborted", error);
    const begun = phase !== "asking";
    if (this.#timedOut) {
      return ended("Nothing arrived for too long.", begun ? "truncated" : "error", "client_timeout", error);
    }
    if (error instanceof ChatError) return error;
    if (error instanceof RangeError) return ended(error.message, "error", "bad_event", error);
    return begun
      ? ended("The connection broke before the answer ended.", "truncated", "connection_lost", error)
      : ended("The server could not be reached.", "error", "network_error", error);
  }
}

/**
 * How long to wait before the request is sent again. Pure.
 * @param {{status: number, headers: {get(name: string): string | null}}} response
 * @param {number} attempt repetitions so far
 * @param {number} jitter 0 to 1
 * @returns {number | null} milliseconds; null: do not send it again
 */
export function retryDelay({ status, headers }, attempt, jitter) {
  const wish = headers.get("x-should-retry");
  if (wish === "false" || (wish !== "true" && !RETRY_STATUSES.has(status))) return null;
  const asked = retryAfter(headers);
  if (asked !== null) return asked * 1000 <= MAX_HONOURED_WAIT ? asked * 1000 + jitter * 250 : null;
  return Math.min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** attempt) * (0.5 + jitter / 2);
}

/**
 * @param {{get(name: string): string | null}} headers
 * @param {number} [now] Unix milliseconds
 * @returns {number | null} seconds to wait, from retry-after-ms or Retry-After (RFC 9110, 10.2.3: seconds or a date)
 */
export function retryAfter(headers, now = Date.now()) {
  const milliseconds = headers.get("retry-after-ms");
  if (milliseconds && /^\d+(\.\d+)?$/.test(milliseconds)) return Number(milliseconds) / 1000;
  const value = headers.get("retry-after");
  if (!value) return null;
  if (/^\d+$/.test(value)) return Number(value);
  const date = Date.parse(value);
  return Number.isNaN(date) ? null : Math.max(0, (date - now) / 1000);
}

/**
 * @param {import("./sse.js").SSEEvent} event
 * @returns {any} the chunk, an object
 * @throws {ChatError}
 */
function readChunk(event) {
  let chunk;
  try {
    chunk = JSON.parse(event.data);
  } catch (cause) {
    throw ended("The answer has an event that is not JSON.", "error", "bad_event", cause);
  }
  if (chunk === null || typeof chunk !== "object") {
    throw ended("The answer has an event that is no chunk.", "error", "bad_event");
  }
  if (chunk.error || event.event === "error") throw errorEvent(chunk.error ?? chunk);
  return chunk;
}

/**
 * @param {any} error the `error` of an error event: OpenAI's object, or whatever an upstream made of it
 * @returns {ChatError}
 */
function errorEvent(error) {
  const message = typeof error === "string" ? error : error.message;
  const code = error.code ?? error.type ?? "stream_error";
  return new ChatError(message || "The answer ended with an error.", { ending: "error", code: String(code), status: 200 });
}

/**
 * @param {Response} response anything but a 200 with an event stream
 * @returns {Promise<ChatError>}
 */
async function refusal(response) {
  const requestId = response.headers.get("x-request-id");
  const { status } = response;
  if (status === 200) {
    response.body?.cancel().catch(() => {}); // of no interest, and it may never end
    const message = "The server answered, but not with an event stream.";
    return new ChatError(message, { ending: "error", code: "protocol_error", status, requestId });
  }
  const error = await response.json().then(
    (body) => body?.error,
    () => null, // not from us: a gateway's HTML page, or cut
  );
  return new ChatError(error?.message || `The server answered with status ${status}.`, {
    ending: "error",
    code: error?.code ? String(error.code) : `http_${status}`,
    status,
    retryAfter: retryAfter(response.headers),
    requestId,
  });
}

/** @param {Response} response */
function isEventStream(response) {
  return /^text\/event-stream\s*(;|$)/i.test(response.headers.get("content-type") ?? "") && response.body !== null;
}

/**
 * @param {string} message
 * @param {BadEnding} ending
 * @param {string} code
 * @param {unknown} [cause]
 */
function ended(message, ending, code, cause) {
  return new ChatError(message, { ending, code, cause });
}

/**
 * Reads what follows `[DONE]`, so that the response ends by itself and its connection can be used again.
 * @param {ReadableStreamDefaultReader<Uint8Array>} reader
 * @param {AbortController} controller
 */
async function drain(reader, controller) {
  const timer = setTimeout(() => controller.abort(), DRAIN);
  try {
    while (!(await reader.read()).done);
  } catch {
    // it was complete before
  } finally {
    clearTimeout(timer);
  }
}

/**
 * @param {number} milliseconds
 * @param {AbortSignal} signal
 * @returns {Promise<void>} rejects when the signal aborts
 */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const quit = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", quit);
      resolve();
    }, milliseconds);
    if (signal.aborted) quit();
    else signal.addEventListener("abort", quit, { once: true });
  });
}

/** One timer, set again and again. */
class Deadline {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #passed;

  /** @param {() => void} passed */
  constructor(passed) {
    this.#passed = passed;
  }

  /** @param {number} milliseconds from now */
  set(milliseconds) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(this.#passed, milliseconds);
  }

  clear() {
    clearTimeout(this.#timer);
  }
}
