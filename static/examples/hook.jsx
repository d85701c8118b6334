// chat-proxy's own React hook, for React 18 and 19.
// npm install react react-dom, and copy chat/ from chat-proxy's static folder.
// Runs under the policy that chat-proxy sends with its own pages.

import { useRef } from "react";

import { useChatStream } from "../chat/react.js";

export function Chat() {
  const { messages, send, stop, regenerate, status, error, metrics } = useChatStream({ model: "demo" });
  const box = useRef(null);
  const busy = status === "submitted" || status === "streaming";

  function submit(event) {
    event.preventDefault();
    const question = box.current.value.trim();
    if (busy || !question) return;
    void send(question);
    box.current.value = "";
  }

  return (
    <form onSubmit={submit}>
      {messages.map(({ id, role, text, state }) => <p key={id} data-role={role} data-state={state}>{text}</p>)}
      {error && <p role="alert">{error.partial ? "Interrupted: " : ""}{error.message}</p>}
      {metrics && <p className="figures">{metrics.tokens} tokens in {Math.round(metrics.total_ms)} ms</p>}
      <input aria-label="Message" ref={box} />
      {busy ? <button key="stop" type="button" onClick={stop}>Stop</button> : <button key="send">Send</button>}
      {!busy && messages.length > 0 && <button type="button" onClick={regenerate}>Ask again</button>}
    </form>
  );
}
