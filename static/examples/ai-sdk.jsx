// The AI SDK's useChat without a backend of its own: the agent runs in the browser and asks chat-proxy.
// maxRetries: 0, because the SDK asks again after any 429, whatever Retry-After says; the server has tried already.
// npm install ai @ai-sdk/react @ai-sdk/openai-compatible zod react react-dom.
// Runs under the policy that chat-proxy sends with its own pages. Only, zod would try whether it may make functions
// from text, and the browser would report that: hence jitless.

import "./setup/jitless.js";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { useChat } from "@ai-sdk/react";
import { DirectChatTransport, ToolLoopAgent } from "ai";
import { useEffect, useRef } from "react";

const server = createOpenAICompatible({ name: "chat-proxy", baseURL: `${globalThis.location?.origin}/api/v1` });
const agent = new ToolLoopAgent({
  model: server("demo"),
  maxRetries: 0,
  onError: () => {}, // the page shows it; otherwise it is written to the console, too
});

class Transport extends DirectChatTransport {
  /** No answer without a word, and no question that got none: what was refused once would be refused again. */
  sendMessages({ messages, ...options }) {
    const spoken = messages.filter(({ parts }) => parts.some(({ type, text }) => type === "text" && text));
    const answered = spoken.filter(({ role }, at) => role !== "user" || spoken[at + 1]?.role !== "user");
    return super.sendMessages({ ...options, messages: answered });
  }
}

const transport = new Transport({ agent, onError: (error) => error.message });

export function Chat() {
  const { messages, sendMessage, stop, status, error } = useChat({ transport, experimental_throttle: 50 });
  const box = useRef(null);
  useEffect(() => {
    addEventListener("pagehide", stop); // leaving the page ends the answer
    return () => removeEventListener("pagehide", stop);
  }, [stop]);
  const busy = status === "submitted" || status === "streaming";

  function submit(event) {
    event.preventDefault();
    const text = box.current.value.trim();
    if (busy || !text) return;
    void sendMessage({ text });
    box.current.value = "";
  }

  return (
    <form onSubmit={submit}>
      {messages.map(({ id, role, parts }) => (
        <p key={id} data-role={role}>{parts.map((part) => (part.type === "text" ? part.text : ""))}</p>
      ))}
      {error && <p role="alert">No complete answer: {error.message}</p>}
      <input aria-label="Message" ref={box} />
      {busy ? <button key="stop" type="button" onClick={stop}>Stop</button> : <button key="send">Send</button>}
    </form>
  );
}
