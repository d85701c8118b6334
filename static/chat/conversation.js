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
 * 6. An answer takes its place behind its question, also where later questions follow.
 */

import { streamChat } from "./client.js";
import { batched, withCalls } from "./deltas.js";

/** @typedef {import("./client.js").ChatError} ChatError */
/** @typedef {import("./client.js").Content} Content */
/** @typedef {import("./client.js").Delta} Delta */
/** @typedef {import("./client.js").Message} Message */
/** @typedef {import("./conversation.js").ConversationOptions} ConversationOptions */
/** @typedef {import("./conversation.js").EarlierMessage} EarlierMessage */
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
    this.#now = this.#asked(options.initialMessages ?? []);
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
    return this.#answer(messages, messages.length - 1);
  };

  /** @param {string} [id] of a question; without it the last one */
  regenerate = async (id) => {
    const { messages } = this.#now;
    const at = messages.findLastIndex((message) => message.role === "user" && (id === undefined || message.id === id));
    if (this.#live || at < 0) return false;
    return this.#answer(messages, at);
  };

  stop = () => this.#live?.abort();

  /** @param {string} id of a question */
  remove = (id) => {
    const { messages, status, error, metrics, question } = this.#now;
    const at = messages.findIndex((message) => message.id === id);
    if (this.#live || at < 0) return;
    const left = [...messages.slice(0, at), ...messages.slice(nextQuestion(messages, at))];
    this.#tell(question === id ? still(left) : { messages: left, status, error, metrics, question });
  };

  /** @param {readonly EarlierMessage[]} [messages] */
  reset = (messages = []) => {
    this.stop();
    this.#live = null;
    this.#tell(this.#asked(messages));
  };

  /**
   * @param {readonly EarlierMessage[]} messages
   * @returns {Snapshot} with these, and no answer under way
   */
  #asked(messages) {
    return still(messages.map(({ role, content = null, state }) => this.#message(role, content, state)));
  }

  /**
   * @param {ShownMessage[]} before what is shown until the first word, and for good if none comes
   * @param {number} at the question's place in it
   * @returns {Promise<boolean>} whether there is a complete answer now
   */
  async #answer(before, at) {
    const { initialMessages: _, ...options } = this.#options;
    const controller = (this.#live = new AbortController());
    const question = before[at].id;
    const asked = before.slice(0, at + 1);
    const later = before.slice(nextQuestion(before, at));
    const answer = streamChat({ ...options, messages: toSend(asked), signal: controller.signal });
    let message = this.#message("assistant", "", "streaming");
    /** @type {(messages: ShownMessage[], more: Pick<Snapshot, "status"> & Partial<Snapshot>) => void} */
    const tell = (messages, more) => this.#tell({ messages, error: null, metrics: null, question, ...more });
    /** @type {typeof tell} */
    const end = (messages, more) => {
      if (this.#live !== controller) return; // after reset()
      this.#live = null;
      tell(messages, more);
    };
    tell(before, { status: "submitted" });
    try {
      for await (const deltas of batched(answer, FLUSH)) {
        if (controller.signal.aborted) continue; // it throws next
        message = deltas.reduce(withDelta, message);
        tell([...asked, message, ...later], { status: "streaming", metrics: answer.metrics });
      }
      await clickOver(controller.signal);
      const { finishReason, metrics } = answer;
      end([...asked, { ...message, finishReason, state: "complete" }, ...later], { status: "ready", metrics });
      return true;
    } catch (caught) {
      await clickOver(controller.signal);
      const error = /** @type {ChatError} */ (caught);
      const stopped = error.ending === "aborted";
      const state = stopped ? "stopped" : "interrupted";
      /** @type {Pick<Snapshot, "status" | "error">} */
      const why = stopped ? { status: "ready", error: null } : { status: "error", error };
      if (isEmpty(message)) end(before, why);
      else end([...asked, { ...message, state }, ...later], { ...why, metrics: answer.metrics });
      return false;
    }
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
    const text = textIn(content);
    return { id: `m${this.#made}`, role, content, text, reasoning: "", toolCalls: [], finishReason: null, state };
  }
}

/**
 * @param {ShownMessage[]} messages
 * @returns {Snapshot} of a conversation in which nothing happens
 */
function still(messages) {
  return { messages, status: "ready", error: null, metrics: null, question: null };
}

/**
 * @param {ShownMessage[]} messages
 * @param {number} at the place of a question
 * @returns {number} the place of the next one, or the end
 */
function nextQuestion(messages, at) {
  const next = messages.findIndex(({ role }, place) => place > at && role === "user");
  return next < 0 ? messages.length : next;
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
