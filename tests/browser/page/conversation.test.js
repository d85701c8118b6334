// A conversation: what it shows, what it sends, and how its answers end.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Conversation } from "../../../static/chat/conversation.js";

const event = (delta, more = {}) => `data: ${JSON.stringify({ choices: [{ index: 0, delta, ...more }] })}\n\n`;
const text = (content) => event({ content });
const DONE = "data: [DONE]\n\n";
const CUT = 'data: {"error": {"message": "cut", "type": "server_error", "param": null, "code": "stream_interrupted"}}\n\n';

/** A fetch that answers each request with the next of these streams; null: it goes on after what it has. */
function serving(...streams) {
  const sent = [];
  const fetch = async (_, { body, signal }) => {
    sent.push(JSON.parse(body));
    const parts = streams[Math.min(sent.length, streams.length) - 1];
    if (parts instanceof Response) return parts.clone();
    const stream = new ReadableStream({
      start(controller) {
        signal.addEventListener("abort", () => controller.error(signal.reason));
        for (const part of parts) if (part !== null) controller.enqueue(new TextEncoder().encode(part));
        if (!parts.includes(null)) controller.close();
      },
    });
    return new Response(stream, { headers: { "content-type": "text/event-stream" } });
  };
  return { sent, fetch };
}

const refused = (status, code) =>
  new Response(JSON.stringify({ error: { message: code, code } }), { status, headers: { "x-should-retry": "false" } });
const brief = ({ messages, status, error }) => [
  messages.map(({ role, content, state }) => `${role} ${content} ${state}`), status, error?.code ?? null,
];
const told = ({ messages }) => messages.map(({ role, content }) => `${role} ${content}`);

test("an answer grows and is complete; each snapshot stays as it was", async () => {
  const { fetch, sent } = serving([text("a"), event({ reasoning: "r" }), event({ tool_calls: [{ index: 0, id: "c", function: { name: "f", arguments: "{}" } }] }), text("b"), DONE]);
  const chat = new Conversation({ fetch, model: "m", body: { temperature: 0 } });
  const seen = [];
  chat.subscribe(() => seen.push(chat.snapshot()));
  assert.equal(await chat.send("hi"), true);
  assert.deepEqual(sent, [{ model: "m", messages: [{ role: "user", content: "hi" }], stream: true, temperature: 0 }]);
  assert.deepEqual(seen.map(brief), [
    [["user hi complete"], "submitted", null],
    [["user hi complete", "assistant ab streaming"], "streaming", null],
    [["user hi complete", "assistant ab complete"], "ready", null],
  ]);
  const answer = chat.snapshot().messages[1];
  assert.deepEqual([answer.reasoning, answer.toolCalls], ["r", [{ index: 0, id: "c", name: "f", arguments: "{}" }]]);
  assert.equal(chat.snapshot().metrics.tokens, 4);
  assert.deepEqual(seen.map(({ metrics }) => metrics === null), [true, false, false]);
});

test("an answer that breaks is interrupted, with its part; one that is refused leaves the question alone", async () => {
  for (const [stream, shown, code] of [
    [[text("a"), CUT], ["user q complete", "assistant a interrupted"], "stream_interrupted"],
    [[text("a")], ["user q complete", "assistant a interrupted"], "truncated"],
    [[CUT], ["user q complete"], "stream_interrupted"],
    [refused(429, "rate_limited"), ["user q complete"], "rate_limited"],
  ]) {
    const chat = new Conversation(serving(stream));
    assert.equal(await chat.send("q"), false);
    assert.deepEqual(brief(chat.snapshot()), [shown, "error", code]);
    assert.equal(chat.snapshot().metrics?.tokens ?? null, shown.length > 1 ? 1 : null, "no figures of no answer");
  }
});

test("stop ends it: what is there stays, marked, no error, and nothing changes any more", async () => {
  const { fetch } = serving([text("a"), null]);
  const chat = new Conversation({ fetch });
  const sending = chat.send("q");
  await new Promise((resolve) => {
    chat.subscribe(() => chat.snapshot().status === "streaming" && resolve());
  });
  assert.equal(await chat.send("while it runs"), false);
  assert.equal(await chat.regenerate(), false);
  chat.stop();
  assert.equal(await sending, false);
  const stopped = chat.snapshot();
  assert.deepEqual(brief(stopped), [["user q complete", "assistant a stopped"], "ready", null]);
  chat.stop();
  await new Promise((resolve) => setTimeout(resolve, 60));
  assert.equal(chat.snapshot(), stopped);
});

test("the click that stops is over before anything is shown: it must not press what comes in the button's place", async () => {
  const chat = new Conversation(serving([null]));
  const sending = chat.send("q");
  chat.stop();
  for (let turn = 0; turn < 100; turn += 1) await null;
  assert.equal(chat.snapshot().status, "submitted");
  assert.equal(await sending, false);
  assert.equal(chat.snapshot().status, "ready");
});

test("nothing is asked without a question", async () => {
  const { fetch, sent } = serving([text("a"), DONE]);
  const chat = new Conversation({ fetch });
  for (const empty of ["", " \n", [], null]) assert.equal(await chat.send(empty), false);
  assert.deepEqual([sent, chat.snapshot().messages], [[], []]);
});

test("stop before the first word leaves the question alone", async () => {
  const chat = new Conversation(serving([null]));
  const sending = chat.send("q");
  chat.stop();
  await sending;
  assert.deepEqual(brief(chat.snapshot()), [["user q complete"], "ready", null]);
});

test("regenerate asks the last question again, without its answer", async () => {
  const { fetch, sent } = serving([text("one"), DONE], [text("two"), CUT], [text("three"), DONE]);
  const chat = new Conversation({ fetch, initialMessages: [{ role: "system", content: "s" }] });
  assert.equal(await chat.regenerate(), false, "there is no question yet");
  await chat.send("a");
  await chat.send("b");
  assert.equal(await chat.regenerate(), true);
  assert.deepEqual(sent.map(told), [
    ["system s", "user a"],
    ["system s", "user a", "assistant one", "user b"],
    ["system s", "user a", "assistant one", "user b"],
  ]);
  assert.deepEqual(brief(chat.snapshot())[0].slice(3), ["user b complete", "assistant three complete"]);
  assert.equal(chat.snapshot().error, null);
});

test("a refused retry takes nothing away: the answer of before stays until the first word of the next", async () => {
  const { fetch, sent } = serving([text("one"), DONE], refused(429, "rate_limited"), [null], [text("two"), DONE]);
  const chat = new Conversation({ fetch });
  const seen = [];
  await chat.send("a");
  chat.subscribe(() => seen.push(chat.snapshot()));
  assert.equal(await chat.regenerate(), false);
  const stopped = chat.regenerate();
  chat.stop();
  assert.equal(await stopped, false);
  const answered = ["user a complete", "assistant one complete"];
  assert.deepEqual(seen.map(brief), [
    [answered, "submitted", null], [answered, "error", "rate_limited"], [answered, "submitted", null], [answered, "ready", null],
  ]);
  assert.equal(await chat.regenerate(), true);
  assert.deepEqual(told(chat.snapshot()), ["user a", "assistant two"]);
  assert.deepEqual(sent.map(told), [["user a"], ["user a"], ["user a"], ["user a"]]);
});

test("a message has its words as text, whatever its content is made of", async () => {
  const parts = [{ type: "text", text: "what is " }, { type: "image_url", image_url: { url: "data:," } }, { type: "text", text: "this" }];
  const chat = new Conversation({ ...serving([text("a"), text("b"), DONE]), initialMessages: [{ role: "tool", content: null }] });
  await chat.send(parts);
  assert.deepEqual(chat.snapshot().messages.map(({ text }) => text), ["", "what is this", "ab"]);
  assert.equal(chat.snapshot().messages[1].content, parts);
});

test("what was refused before its first word is not sent along again", async () => {
  const { fetch, sent } = serving(refused(400, "input_too_long"), [event({ reasoning: "r" }), CUT], [text("c"), DONE]);
  const chat = new Conversation({ fetch });
  for (const question of ["a", "b", "c"]) await chat.send(question);
  assert.deepEqual(sent.map(told), [["user a"], ["user b"], ["user c"]]);
  assert.deepEqual(told(chat.snapshot()), ["user a", "user b", "assistant ", "user c", "assistant c"]);
});

test("options hold for the next request, and ids are unique", async () => {
  const { fetch, sent } = serving([text("a"), DONE]);
  const chat = new Conversation({ fetch, model: "one" });
  await chat.send("a");
  chat.configure({ fetch, model: "two" });
  await chat.send("b");
  assert.deepEqual(sent.map(({ model }) => model), ["one", "two"]);
  assert.equal(new Set(chat.snapshot().messages.map(({ id }) => id)).size, 4);
});

test("who has left is told nothing", async () => {
  const chat = new Conversation(serving([text("a"), DONE]));
  let calls = 0;
  const leave = chat.subscribe(() => (calls += 1));
  leave();
  await chat.send("a");
  assert.equal(calls, 0);
});

test("an earlier question is asked again in its place, with what came before it", async () => {
  const { fetch, sent } = serving([text("one"), DONE], [text("two"), DONE], [text("three"), CUT]);
  const chat = new Conversation({ fetch });
  await chat.send("a");
  await chat.send("b");
  const [{ id }] = chat.snapshot().messages;
  assert.equal(await chat.regenerate("no such id"), false);
  assert.equal(await chat.regenerate(id), false);
  assert.deepEqual(told({ messages: sent[2].messages }), ["user a"]);
  assert.deepEqual(brief(chat.snapshot()), [
    ["user a complete", "assistant three interrupted", "user b complete", "assistant two complete"], "error", "stream_interrupted",
  ]);
  assert.equal(chat.snapshot().question, id);
});

test("a question is removed with its answer, and not while an answer is under way", async () => {
  const { fetch, sent } = serving([text("one"), DONE], [text("two"), CUT], [null]);
  const chat = new Conversation({ fetch });
  await chat.send("a");
  await chat.send("b");
  const { question } = chat.snapshot();
  chat.remove("no such id");
  assert.deepEqual(told(chat.snapshot()), ["user a", "assistant one", "user b", "assistant two"]);
  chat.remove(question);
  assert.deepEqual(brief(chat.snapshot()), [["user a complete", "assistant one complete"], "ready", null]);
  assert.equal(chat.snapshot().question, null);
  const sending = chat.send("c");
  chat.remove(chat.snapshot().question);
  assert.deepEqual(told(chat.snapshot()), ["user a", "assistant one", "user c"]);
  chat.stop();
  await sending;
  assert.deepEqual(sent.map(told).at(-1), ["user a", "assistant one", "user c"]);
});

test("reset ends the answer under way, of which nothing is shown any more", async () => {
  const { fetch } = serving([text("a"), null], [text("b"), DONE]);
  const chat = new Conversation({ fetch });
  const sending = chat.send("q");
  await new Promise((resolve) => {
    chat.subscribe(() => chat.snapshot().status === "streaming" && resolve());
  });
  chat.reset([{ role: "user", content: "of before" }, { role: "assistant", content: "a part", state: "stopped" }]);
  const kept = chat.snapshot();
  assert.deepEqual(brief(kept), [["user of before complete", "assistant a part stopped"], "ready", null]);
  assert.equal(await sending, false);
  assert.equal(chat.snapshot(), kept);
  chat.reset();
  assert.equal(await chat.send("q"), true, "the way is free at once");
  assert.deepEqual(told(chat.snapshot()), ["user q", "assistant b"]);
});

test("a snapshot names the question of its answer, and a whole answer why it ended", async () => {
  const chat = new Conversation(serving([event({ content: "a" }, { finish_reason: "length" }), DONE], [text("b"), CUT]));
  assert.equal(chat.snapshot().question, null);
  for (const reason of ["length", null]) {
    const sending = chat.send("q");
    assert.equal(chat.snapshot().question, chat.snapshot().messages.at(-1).id);
    await sending;
    assert.equal(chat.snapshot().messages.at(-1).finishReason, reason);
    assert.equal(chat.snapshot().question, chat.snapshot().messages.at(-2).id);
  }
});
