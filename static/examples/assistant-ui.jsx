// assistant-ui, with chat-proxy's client as its model: a run is an async generator, and so is the client's answer.
// A ChatError thrown here is what MessagePrimitive.Error and ErrorPrimitive show; the text so far stays.
// npm install @assistant-ui/react react react-dom, and copy chat/ from chat-proxy's static folder.
// Runs under the policy that chat-proxy sends with its own pages.

import {
  AssistantRuntimeProvider, ComposerPrimitive, ErrorPrimitive, MessagePrimitive, ThreadPrimitive, useLocalRuntime,
} from "@assistant-ui/react";

import { streamChat } from "../chat/client.js";
import { batched } from "../chat/deltas.js";

const model = {
  async *run({ messages, abortSignal }) {
    const answer = streamChat({ messages: answered(messages.map(asMessage)), signal: abortSignal });
    try {
      for await (const _ of batched(answer)) yield { content: [{ type: "text", text: answer.text }] };
    } catch (error) {
      if (error.ending !== "aborted") throw error; // assistant-ui knows by itself that it was stopped
    }
  },
};

function asMessage({ role, content }) {
  return { role, content: content.map((part) => (part.type === "text" ? part.text : "")).join("") };
}

/** No answer without a word, and no question that got none: what was refused once would be refused again. */
function answered(messages) {
  const spoken = messages.filter(({ content }) => content !== "");
  return spoken.filter(({ role }, at) => role !== "user" || spoken[at + 1]?.role !== "user");
}

function Question() {
  return <MessagePrimitive.Root className="turn" data-role="user"><MessagePrimitive.Parts /></MessagePrimitive.Root>;
}

function Answer() {
  return (
    <MessagePrimitive.Root className="turn">
      <div data-role="assistant"><MessagePrimitive.Parts components={{ Text: ({ text }) => <p>{text}</p> }} /></div>
      <MessagePrimitive.Error>
        <ErrorPrimitive.Root>No complete answer: <ErrorPrimitive.Message /></ErrorPrimitive.Root>
      </MessagePrimitive.Error>
    </MessagePrimitive.Root>
  );
}

export function Chat() {
  return (
    <AssistantRuntimeProvider runtime={useLocalRuntime(model)}>
      <ThreadPrimitive.Root>
        <ThreadPrimitive.Messages components={{ UserMessage: Question, AssistantMessage: Answer }} />
        <ComposerPrimitive.Root>
          <ComposerPrimitive.Input aria-label="Message" />
          <ThreadPrimitive.If running={false}><ComposerPrimitive.Send>Send</ComposerPrimitive.Send></ThreadPrimitive.If>
          <ThreadPrimitive.If running><ComposerPrimitive.Cancel>Stop</ComposerPrimitive.Cancel></ThreadPrimitive.If>
        </ComposerPrimitive.Root>
      </ThreadPrimitive.Root>
    </AssistantRuntimeProvider>
  );
}
