// openai-js in the browser, in a React component. Two lines differ from a page that holds a key: apiKey and baseURL.
// (`globalThis` and `?.`: a framework may render it on a server first, where there is no location.)
// An answer that broke ends in an error event, which openai-js throws; without it, half an answer would look whole.
// npm install openai react react-dom. Runs under the policy that chat-proxy sends with its own pages.

import OpenAI from "openai";
import { useEffect, useRef, useState } from "react";

const client = new OpenAI({
  apiKey: "held by the server",
  baseURL: `${globalThis.location?.origin}/api/v1`,
  dangerouslyAllowBrowser: true,
});

export function Chat() {
  const [messages, setMessages] = useState([]);
  const [error, setError] = useState("");
  const [live, setLive] = useState(null);
  const box = useRef(null);
  useEffect(() => {
    const leave = () => live?.abort(); // leaving the page ends the answer
    addEventListener("pagehide", leave);
    return () => {
      removeEventListener("pagehide", leave);
      leave();
    };
  }, [live]);

  async function ask(question) {
    const asked = [...messages, { role: "user", content: question }];
    const controller = new AbortController();
    let text = "";
    setMessages(asked);
    setError("");
    setLive(controller);
    try {
      const request = { model: "demo", messages: asked, stream: true };
      const stream = await client.chat.completions.create(request, { signal: controller.signal });
      for await (const chunk of stream) {
        text += chunk.choices[0]?.delta?.content ?? "";
        setMessages([...asked, { role: "assistant", content: text }]);
      }
    } catch (caught) {
      if (!controller.signal.aborted) setError(text ? `Interrupted: ${caught.message}` : caught.message);
    }
    if (!text && box.current) {
      setMessages(messages); // what was refused is not sent along with the next question
      box.current.value ||= question;
    }
    setLive(null);
  }

  function submit(event) {
    event.preventDefault();
    const question = box.current.value.trim();
    if (live || !question) return;
    void ask(question);
    box.current.value = "";
  }

  return (
    <form onSubmit={submit}>
      {messages.map(({ role, content }, at) => <p key={at} data-role={role}>{content}</p>)}
      {error && <p role="alert">{error}</p>}
      <input aria-label="Message" ref={box} />
      {live
        ? <button key="stop" type="button" onClick={() => live.abort()}>Stop</button>
        : <button key="send">Send</button>}
    </form>
  );
}
