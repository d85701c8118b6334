/** A conversation as a React hook. */

import type { Conversation, ConversationOptions, Snapshot } from "./conversation.js";

export interface ChatHook extends Snapshot, Pick<Conversation, "send" | "stop" | "regenerate" | "remove" | "reset"> {}

/**
 * `options` may change from render to render: they hold for the next request. `initialMessages` are read once. A new
 * conversation is `reset()`, or a component with another `key`.
 */
export function useChatStream(options?: ConversationOptions): ChatHook;
