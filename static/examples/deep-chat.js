// The deep-chat element, with chat-proxy's client as its handler. `body.messages` is what was asked just now, so the
// conversation is kept here.
// npm install deep-chat, and copy chat/ from chat-proxy's static folder.
// deep-chat makes styles and HTML from strings, so it does not run under the policy that chat-proxy sends with its own
// pages: it needs style-src 'self' 'unsafe-inline', and no require-trusted-types-for. Serve the page from your own web
// server with such a policy, and let that pass /api on to chat-proxy.

import "deep-chat";

import { streamChat } from "../chat/client.js";
import { batched } from "../chat/deltas.js";

/** A chat in this element. */
export function mount(root) {
  const conversation = [];
  const chat = document.createElement("deep-chat");
  chat.style.fontFamily = "system-ui, sans-serif"; // its default is fetched from Google
  chat.errorMessages = { displayServiceErrorMessages: true };
  chat.connect = {
    stream: true,
    async handler(body, signals) {
      const controller = new AbortController();
      const asked = body.messages.map(({ text }) => ({ role: "user", content: text }));
      const answer = streamChat({ messages: [...conversation, ...asked], signal: controller.signal });
      signals.stopClicked.listener = () => controller.abort();
      signals.onOpen();
      try {
        for await (const deltas of batched(answer)) await signals.onResponse({ text: textIn(deltas) });
      } catch (error) {
        if (error.ending !== "aborted") {
          if (answer.text === "") await signals.onResponse({ text: "…" }); // it shows an error after a text only
          await signals.onResponse({ error: `No complete answer: ${error.message}` });
        }
      }
      if (answer.text) conversation.push(...asked, { role: "assistant", content: answer.text });
      signals.onClose();
    },
  };
  root.append(chat);
}

function textIn(deltas) {
  return deltas.map((delta) => (delta.type === "text" ? delta.text : "")).join("");
}
