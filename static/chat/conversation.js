// @ts-check
/**
 * A conversation for a page to show: messages that grow, and what may be done about them. react.js is one way to show
 * it; anything else that can subscribe is another.
 *
 *     const chat = new Conversation({ model: "demo" });
 *     chat.subscribe(() => render(chat.snapshot()));
 *     await chat.send("Hello");
 *
 * Rules of this file:
 * 1. One answer at a time. A snapshot is never changed: each flush makes a new one, and tells it once.
 * 2. An answer that broke is `interrupted`, one that was stopped is `stopped`; only a whole one is `complete`.
 * 3. What was refused before its first word is not sent along again: it would be refused for ever.
 * 4. A retry that is refused takes nothing away: the answer of before stays until the first word of the next.
 * 5. After stop() nothing of that answer changes any more, and the upstream call is closed.
 */

import { streamChat } from "./client.js";
import { batched, withCalls } from "./deltas.js";

/** @typedef {import("./client.js").ChatError} ChatError */
/** @typedef {import("./client.js").Content} Content */
/** @typedef {import("./client.js").Delta} Delta */
/** @typedef {import("./client.js").Message} Message */
/** @typedef {import("./conversation.js").ConversationOptions} ConversationOptions */
/** @typedef {import("./conversation.js").ShownMessage} ShownMessage */
/** @typedef {import("./conversation.js").Snapshot} Snapshot */

/** Milliseconds between two updates of a growing answer. */
const FLUSH = 50;

export class Conversation {
  #options;
  /** @type {Snapshot} */
  #now;
  /** @type {Set<() => void>} */
  #listeners = new Set();
  /** @type {AbortController | null} of the answer under way */
  #live = null;
  #made = 0; // messages so far

  /** @param {ConversationOptions} [options] */
  constructor(options = {}) {
    this.#options = options;
    const messages = (options.initialMessages ?? []).map(({ role, content = null }) => this.#message(role, content));
    this.#now = { messages, status: "ready", error: null, metrics: null };
  }

  /** @param {ConversationOptions} options for the next request */
  configure(options) {
    this.#options = options;
  }

  snapshot = () => this.#now;

  /** @param {() => void} listener */
  subscribe = (listener) => {
    this.#listeners.add(listener);
    return () => void this.#listeners.delete(listener);
  };

  /** @param {Content} content */
  send = async (content) => {
    const isNothing = typeof content === "string" ? content.trim() === "" : !content?.length;
    if (this.#live || isNothing) return false;
    const messages = [...this.#now.messages, this.#message("user", content)];
    return this.#answer(messages, messages);
  };

  regenerate = async () => {
    const { messages } = this.#now;
    const last = messages.findLastIndex(({ role }) => role === "user");
    if (this.#live || last < 0) return false;
    return this.#answer(messages.slice(0, last + 1), messages);
  };

  stop = () => this.#live?.abort();

  /**
   * @param {ShownMessage[]} messages the last one is the question
   * @param {ShownMessage[]} before what stands there until the first word, and for good if none comes
   * @returns {Promise<boolean>} whether there is a complete answer now
   */
  async #answer(messages, before) {
    const { initialMessages: _, ...options } = this.#options;
    const controller = (this.#live = new AbortController());
    const answer = streamChat({ ...options, messages: toSend(messages), signal: controller.signal });
    let message = this.#message("assistant", "", "streaming");
    this.#tell({ messages: before, status: "submitted", error: null, metrics: null });
    try {
      for await (const deltas of batched(answer, FLUSH)) {
        message = deltas.reduce(withDelta, message);
        this.#tell({ messages: [...messages, message], status: "streaming", error: null, metrics: answer.metrics });
      }
      await clickOver(controller.signal);
      this.#end([...messages, { ...message, state: "complete" }], "ready", null, answer.metrics);
      return true;
    } catch (caught) {
      await clickOver(controller.signal);
      const error = /** @type {ChatError} */ (caught);
      const stopped = error.ending === "aborted";
      const state = stopped ? "stopped" : "interrupted";
      const [shown, metrics] = isEmpty(message)
        ? [before, null]
        : [[...messages, /** @type {const} */ ({ ...message, state })], answer.metrics];
      this.#end(shown, stopped ? "ready" : "error", stopped ? null : error, metrics);
      return false;
    }
  }

  /**
   * @param {ShownMessage[]} messages
   * @param {Snapshot["status"]} status
   * @param {ChatError | null} error
   * @param {Snapshot["metrics"]} metrics
   */
  #end(messages, status, error, metrics) {
    this.#live = null;
    this.#tell({ messages, status, error, metrics });
  }

  /** @param {Snapshot} snapshot */
  #tell(snapshot) {
    this.#now = snapshot;
    for (const listener of this.#listeners) listener();
  }

  /**
   * @param {Message["role"]} role
   * @param {Content} content
   * @param {ShownMessage["state"]} [state]
   * @returns {ShownMessage}
   */
  #message(role, content, state = "complete") {
    this.#made += 1;
    return { id: `m${this.#made}`, role, content, text: textIn(content), reasoning: "", toolCalls: [], state };
  }
}

/**
 * Where a page puts Send in the place of Stop, and React takes one element for both, the click on Stop would send: a
 * browser asks what a button is for only after all that its click has set off at once.
 * @param {AbortSignal} stop
 * @returns {Promise<void> | undefined}
 */
function clickOver(stop) {
  return stop.aborted ? new Promise((resolve) => void setTimeout(resolve)) : undefined;
}

/**
 * @param {ShownMessage} message
 * @param {Delta} delta
 * @returns {ShownMessage}
 */
function withDelta(message, delta) {
  if (delta.type === "text") {
    const text = message.text + delta.text;
    return { ...message, text, content: text };
  }
  if (delta.type === "reasoning") return { ...message, reasoning: message.reasoning + delta.text };
  if (delta.type === "tool_calls") return { ...message, toolCalls: withCalls(message.toolCalls, delta.calls) };
  return message;
}

/** @param {Content} content */
function textIn(content) {
  if (typeof content === "string") return content;
  return (content ?? []).map((part) => /** @type {{text?: string}} */ (part).text ?? "").join("");
}

/** @param {ShownMessage} message */
function isEmpty({ text, reasoning, toolCalls }) {
  return text === "" && reasoning === "" && toolCalls.length === 0;
}

/**
 * @param {ShownMessage[]} messages
 * @returns {Message[]} the messages for the model: no question without an answer, no empty answer
 */
function toSend(messages) {
  const spoken = messages.filter(({ role, content }) => role !== "assistant" || content !== "");
  const answered = spoken.filter(({ role }, at) => role !== "user" || spoken[at + 1]?.role !== "user");
  return answered.map(({ role, content }) => ({ role, content }));
}
