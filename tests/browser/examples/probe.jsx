// Looks at the hook from outside: what each commit showed, and what happens when the component goes away.

import { useEffect, useState } from "react";

import { useChatStream } from "chat/react.js";

window.commits = [];

function Conversation() {
  const { messages, send, metrics } = useChatStream();
  const shown = messages.at(-1)?.content ?? "";
  useEffect(() => {
    window.commits.push(shown);
    window.metrics = metrics;
  });
  return (
    <>
      <p data-role="assistant">{shown}</p>
      <button onClick={() => void send("hi")}>Send</button>
    </>
  );
}

export function Chat() {
  const [isThere, setThere] = useState(true);
  return (
    <>
      {isThere && <Conversation />}
      <button onClick={() => setThere(!isThere)}>{isThere ? "Leave" : "Come back"}</button>
    </>
  );
}
