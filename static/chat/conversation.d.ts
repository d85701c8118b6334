/** A conversation for a page to show, whatever the page is made with. */

import type { ChatError, ChatOptions, Content, Message, Metrics } from "./client.js";
import type { ToolCall } from "./deltas.js";

export interface ShownMessage {
  /** Unique in its conversation. */
  id: string;
  role: Message["role"];
  /** As it was sent, or is sent along. */
  content: Content;
  /** The words of it, to be shown. */
  text: string;
  reasoning: string;
  toolCalls: ToolCall[];
  /** Of a complete answer, as the model gave it: `length` where it was cut at the limit. */
  finishReason: string | null;
  /** Of an answer: `interrupted` when it broke off, `stopped` when you did it; both are only a part of it. */
  state: "streaming" | "complete" | "interrupted" | "stopped";
}

/** What there is to show at one time. Never changed: a new one takes its place. */
export interface Snapshot {
  readonly messages: ShownMessage[];
  /** `submitted` until the first delta. */
  readonly status: "ready" | "submitted" | "streaming" | "error";
  /** Why there is no answer, or only a part of one; null after stop(). */
  readonly error: ChatError | null;
  /** Of the newest answer; null until its first delta. */
  readonly metrics: Metrics | null;
  /** The id of the question that the newest answer is for; null before the first. */
  readonly question: string | null;
}

/** A message from before. An answer's `state` is `complete` unless it is given. */
export type EarlierMessage = Pick<Message, "role" | "content"> & Partial<Pick<ShownMessage, "state">>;

/** As for streamChat, but for the messages, which are here. */
export interface ConversationOptions extends Omit<ChatOptions, "messages" | "signal"> {
  initialMessages?: readonly EarlierMessage[];
}

export class Conversation {
  constructor(options?: ConversationOptions);
  /** For the next request. */
  configure(options: ConversationOptions): void;
  snapshot: () => Snapshot;
  /** Returns what ends it. */
  subscribe: (listener: () => void) => () => void;
  /**
   * Whether there is a complete answer; never throws: see `error`. While an answer is under way it does nothing, nor
   * without a question.
   */
  send: (content: Content) => Promise<boolean>;
  /** Asks a question again, by default the last; its answer stays until the first word of the new one. */
  regenerate: (id?: string) => Promise<boolean>;
  /** Ends the answer, and the model's work on it. */
  stop: () => void;
  /** Removes a question and its answer, so that neither is sent along again. Does nothing while an answer is under way. */
  remove: (id: string) => void;
  /** Ends the answer under way and shows these messages instead of the others; none: a new conversation. */
  reset: (messages?: readonly EarlierMessage[]) => void;
}
