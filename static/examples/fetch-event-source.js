// @microsoft/fetch-event-source, kept from asking twice. Left alone it sends the POST again whenever the tab is shown
// again, and a second after every error: each time a new answer, which is paid for. Hence openWhenHidden, and an
// onerror that throws. It also resolves when a stream just ends, so the end is looked for in what was received.
// npm install @microsoft/fetch-event-source. Runs under the policy that chat-proxy sends with its own pages.

import { EventStreamContentType, fetchEventSource } from "@microsoft/fetch-event-source";

/** Asks, calls onText with each piece, and returns when the answer is complete. Every other end throws. */
export async function ask(messages, { signal, onText }) {
  let isComplete = false;
  await fetchEventSource("/api/chat", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ messages, stream: true }),
    signal,
    openWhenHidden: true, // a hidden tab goes on reading, and a shown one asks nothing anew
    async onopen(response) {
      if (response.ok && response.headers.get("content-type")?.startsWith(EventStreamContentType)) return;
      const refusal = await response.json().catch(() => null);
      throw new Error(refusal?.error?.message ?? `The server answered with status ${response.status}.`);
    },
    onmessage({ data }) {
      if (data === "[DONE]") {
        isComplete = true;
        return;
      }
      const { error, choices } = JSON.parse(data);
      if (error) throw new Error(error.message);
      if (choices[0]?.finish_reason) isComplete = true;
      const text = choices[0]?.delta?.content;
      if (text) onText(text);
    },
    onerror(error) {
      throw error; // or it is sent again
    },
  });
  signal.throwIfAborted(); // it resolves then, too
  if (!isComplete) throw new Error("The answer broke off.");
}

/** A chat in this element. */
export function mount(root) {
  const messages = [];
  const form = document.createElement("form");
  const list = document.createElement("div");
  const problem = document.createElement("p");
  const box = document.createElement("input");
  const button = document.createElement("button");
  problem.setAttribute("role", "alert");
  problem.hidden = true;
  box.setAttribute("aria-label", "Message");
  button.textContent = "Send";
  form.append(list, problem, box, button);
  root.append(form);
  let live = null;

  function show(role, text) {
    const line = document.createElement("p");
    line.dataset.role = role;
    line.textContent = text;
    list.append(line);
    return line;
  }

  addEventListener("pagehide", () => live?.abort()); // leaving the page ends the answer
  button.addEventListener("click", (event) => {
    if (live) event.preventDefault(); // a stop sends nothing
    live?.abort();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const question = box.value.trim();
    if (live || !question) return;
    live = new AbortController();
    const { signal } = live;
    messages.push({ role: "user", content: question });
    show("user", question);
    box.value = "";
    problem.hidden = true;
    button.textContent = "Stop";
    button.type = "button"; // Enter does not press it
    const line = show("assistant", "");
    try {
      await ask(messages, { signal, onText: (text) => line.append(text) });
    } catch (error) {
      problem.textContent = line.textContent ? `Interrupted: ${error.message}` : error.message;
      problem.hidden = signal.aborted;
    }
    if (line.textContent) messages.push({ role: "assistant", content: line.textContent });
    else messages.pop(); // what was refused is not sent along with the next question
    live = null;
    button.textContent = "Send";
    button.type = "submit";
  });
}
