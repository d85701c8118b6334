// @ts-check
/**
 * The turns on the screen: one for each question of the conversation, which they follow.
 *
 * Rules of this file:
 * 1. It shows the snapshots of a Conversation, and keeps what only the screen knows: the problem under an answer.
 * 2. How an answer ended is shown by `settle`, when the page knows what follows from it.
 */

import { Turn } from "./turn.js";

/** @typedef {import("../chat/conversation.js").Conversation} Conversation */
/** @typedef {import("../chat/conversation.js").EarlierMessage} EarlierMessage */
/** @typedef {import("../chat/conversation.js").ShownMessage} ShownMessage */
/** @typedef {import("./storage.js").KeptTurn} KeptTurn */

export class Transcript {
  /** @type {Map<string, Turn>} by the id of the question */
  #turns = new Map();
  #list;
  #chat;
  #handlers;

  /**
   * @param {HTMLElement} list
   * @param {Conversation} chat
   * @param {object} handlers
   * @param {(id: string) => void} handlers.onRetry
   * @param {(id: string) => void} handlers.onEdit
   * @param {() => void} handlers.onNew a turn has come
   * @param {() => void} handlers.onShown something has grown
   */
  constructor(list, chat, handlers) {
    this.#list = list;
    this.#chat = chat;
    this.#handlers = handlers;
    chat.subscribe(() => this.#follow());
  }

  get isEmpty() {
    return this.#turns.size === 0;
  }

  /** @returns {KeptTurn[]} the conversation, as storage.js keeps it */
  get kept() {
    const { messages } = this.#chat.snapshot();
    return questionsOf(messages).map(({ id, text }) => {
      const answer = answerTo(messages, id);
      return { question: text, text: answer?.text ?? "", whole: answer?.state === "complete" };
    });
  }

  /** @param {KeptTurn[]} turns */
  restore(turns) {
    this.#chat.reset(turns.flatMap(messagesOf));
  }

  /** @param {HTMLButtonElement} button one that copies an answer @returns {string} the answer */
  textToCopy(button) {
    const { messages } = this.#chat.snapshot();
    const [id] = [...this.#turns].find(([, turn]) => turn.copy === button) ?? [""];
    return answerTo(messages, id)?.text ?? "";
  }

  #follow() {
    const { messages, status, question, metrics } = this.#chat.snapshot();
    this.#forget(new Set(messages.map(({ id }) => id)));
    for (const { id, text } of questionsOf(messages)) {
      if (this.#turns.has(id)) continue;
      const turn = this.#add(id, text);
      if (id !== question) turn.restore(answerTo(messages, id));
    }
    if (question === null) return;
    const turn = this.#turns.get(question);
    if (status === "submitted") turn?.begin();
    else if (status === "streaming" && metrics) turn?.grow(answerTo(messages, question)?.text ?? "", metrics);
  }

  /** Shows how the newest answer ended. */
  settle() {
    const { messages, question, error, metrics } = this.#chat.snapshot();
    const answer = answerTo(messages, question);
    const turn = this.#turns.get(question ?? "");
    if (error) turn?.failed(error, metrics);
    else if (answer?.state === "complete" && metrics) turn?.complete(answer, metrics);
    else turn?.stopped(metrics);
  }

  /**
   * @param {string} id
   * @param {string} question
   */
  #add(id, question) {
    const { onRetry, onEdit, onNew, onShown } = this.#handlers;
    const turn = new Turn(question, { onRetry: () => onRetry(id), onEdit: () => onEdit(id), onShown });
    this.#turns.set(id, turn);
    this.#list.append(turn.element);
    onNew();
    return turn;
  }

  /** @param {Set<string>} known ids of the messages that are left */
  #forget(known) {
    for (const [id, turn] of this.#turns) {
      if (known.has(id)) continue;
      turn.dispose();
      this.#turns.delete(id);
    }
  }
}

/**
 * @param {KeptTurn} turn
 * @returns {EarlierMessage[]}
 */
function messagesOf({ question, text, whole }) {
  const state = whole ? "complete" : "stopped";
  const isAnswered = whole || text !== "";
  /** @type {EarlierMessage[]} */
  const answers = isAnswered ? [{ role: "assistant", content: text, state }] : [];
  return [{ role: "user", content: question }, ...answers];
}

/** @param {ShownMessage[]} messages */
function questionsOf(messages) {
  return messages.filter(({ role }) => role === "user");
}

/**
 * @param {ShownMessage[]} messages
 * @param {string | null} id of a question
 * @returns {ShownMessage | undefined}
 */
export function answerTo(messages, id) {
  const next = messages[messages.findIndex((message) => message.id === id) + 1];
  return id !== null && next?.role === "assistant" ? next : undefined;
}
