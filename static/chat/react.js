// @ts-check
/**
 * A conversation as a React hook, for React 18 and 19.
 *
 *     const { messages, send, stop, regenerate, status, error, metrics } = useChatStream({ model: "demo" });
 *
 * `react` is the one of your bundler: copy the folder chat/ into your sources and import this file from there. The page
 * that this server brings along does not use it.
 *
 * What happens is in conversation.js; this file shows it. One render per flush. A component that goes away stops its
 * answer, and nothing sets a state after that; StrictMode's second mount finds everything as the first one left it.
 */

import { useEffect, useState, useSyncExternalStore } from "react";

import { Conversation } from "./conversation.js";

/** @typedef {import("./conversation.js").ConversationOptions} ConversationOptions */

/**
 * @param {ConversationOptions} [options] may change from render to render: they hold for the next request
 * @returns {import("./react.js").ChatHook}
 */
export function useChatStream(options = {}) {
  const [chat] = useState(() => new Conversation(options));
  useEffect(() => chat.configure(options));
  useEffect(() => chat.stop, [chat]);
  const shown = useSyncExternalStore(chat.subscribe, chat.snapshot, chat.snapshot);
  const { send, stop, regenerate, remove, reset } = chat;
  return { ...shown, send, stop, regenerate, remove, reset };
}
