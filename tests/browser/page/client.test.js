// streamChat: its endings never pass for one another, and it repeats only what may be repeated.

import assert from "node:assert/strict";
import { getEventListeners } from "node:events";
import { test } from "node:test";

import { ChatError, retryAfter, retryDelay, streamChat } from "../../../static/chat/client.js";
import { MAX_EVENT_CHARS } from "../../../static/chat/sse.js";
import { randomCuts, seeded } from "./random.js";

const messages = [{ role: "user", content: "hi" }];
const delta = (content, finish_reason = null, index = 0) =>
  `data: ${JSON.stringify({ choices: [{ index, delta: { content }, finish_reason }] })}\n\n`;
const chunk = (delta, more = {}) => `data: ${JSON.stringify({ choices: [{ index: 0, delta }], ...more })}\n\n`;
const DONE = "data: [DONE]\n\n";

/** A stub of fetch: gives the replies in turn, notes the calls, and breaks off when the signal says so. */
function stub(...replies) {
  const calls = [];
  const fetch = (url, init) => {
    calls.push({ url, init });
    const reply = replies[Math.min(calls.length, replies.length) - 1];
    return typeof reply === "function" ? reply(init) : Promise.resolve(reply);
  };
  return { calls, fetch };
}

/** @param {...(string | Error | "hang")} parts the pieces of the body; an Error breaks it, "hang" never ends it */
function sse(...parts) {
  return (init) => {
    const queue = [...parts];
    const body = new ReadableStream({
      start(controller) {
        init.signal?.addEventListener("abort", () => {
          try {
            controller.error(init.signal.reason); // as Chromium does, and Node; not every browser
          } catch {
            // it had ended
          }
        });
      },
      pull(controller) {
        const part = queue.shift();
        if (part === "hang") return new Promise(() => {});
        if (part === "wait") return new Promise((resolve) => setTimeout(resolve, 10)).then(() => this.pull(controller));
        if (typeof part === "function") {
          part();
          return this.pull(controller);
        }
        if (part instanceof Error) controller.error(part);
        else if (part === undefined) controller.close();
        else controller.enqueue(new TextEncoder().encode(part));
      },
    }, { highWaterMark: 0 });
    return Promise.resolve(new Response(body, { headers: { "content-type": "text/event-stream; charset=utf-8" } }));
  };
}

function refusal(status, code, headers = {}) {
  const body = JSON.stringify({ error: { message: `it is ${code}`, type: "t", param: null, code } });
  return () => Promise.resolve(new Response(body, { status, headers: { "content-type": "application/json", ...headers } }));
}

/** Runs to the end: what was given, and how it ended. */
async function read(replies, options = {}) {
  const { calls, fetch } = stub(...replies);
  const answer = streamChat({ messages, fetch, random: () => 0, ...options });
  const deltas = [];
  let error = null;
  try {
    for await (const delta of answer) deltas.push(delta);
  } catch (caught) {
    assert.ok(caught instanceof ChatError, String(caught?.stack));
    error = caught;
  }
  const texts = deltas.flatMap((delta) => (delta.type === "text" ? [delta.text] : []));
  return { answer, deltas, texts, calls, error };
}

/** [label, parts, text, ending, code]; ending "complete" has no code */
const ENDINGS = [
  ["[DONE]", [delta("a"), delta("b"), DONE], "ab", "complete"],
  ["[DONE], and something behind it", [delta("a"), DONE + delta("b")], "a", "complete"],
  ["[DONE] without a finish_reason", [delta("a"), DONE], "a", "complete"],
  ["[DONE], then a reset", [delta("a"), DONE, new TypeError("reset")], "a", "complete"],
  ["finish_reason without [DONE]", [delta("a", "stop")], "a", "complete"],
  ["finish_reason, then a reset", [delta("a", "stop"), new TypeError("reset")], "a", "complete"],
  ["finish_reason of each of two choices", [delta("a"), delta("x", "stop", 1), delta("", "stop")], "a", "complete"],
  ["finish_reason of one of two choices", [delta("a", "stop"), delta("x", null, 1)], "a", "truncated", "truncated"],
  ["a later chunk without the reason does not take it back", [delta("a", "stop"), delta("")], "a", "complete"],
  ["nothing but [DONE]", [DONE], "", "complete"],
  ["clean end without either", [delta("a"), delta("b")], "ab", "truncated", "truncated"],
  ["an empty body", [], "", "truncated", "truncated"],
  ["comments only", [": x\n\n"], "", "truncated", "truncated"],
  ["half of [DONE]", [delta("a"), "data: [DO"], "a", "truncated", "truncated"],
  ["[DONE] without its blank line", [delta("a"), "data: [DONE]"], "a", "truncated", "truncated"],
  ["a reset", [delta("a"), new TypeError("reset")], "a", "truncated", "connection_lost"],
  ["a reset before the first token", [new TypeError("reset")], "", "truncated", "connection_lost"],
  [
    "an error event",
    [delta("a"), 'data: {"error": {"message": "cut", "type": "server_error", "param": null, "code": "stream_interrupted"}}\n\n'],
    "a", "error", "stream_interrupted",
  ],
  ["an error event before the first token", ['data: {"error": {"message": "no", "code": null, "type": "server_error"}}\n\n'], "", "error", "server_error"],
  ["an error event, then [DONE]", [delta("a"), 'data: {"error": {"message": "no", "code": 7}}\n\n', DONE], "a", "error", "7"],
  ["an error event of the other kind", [delta("a"), 'event: error\ndata: {"message": "no"}\n\n', DONE], "a", "error", "stream_error"],
  ["an error that is a word", ['data: {"error": "no"}\n\n'], "", "error", "stream_error"],
  ["an event that is not JSON", [delta("a"), "data: {\n\n", DONE], "a", "error", "bad_event"],
  ["an event that is no object", ["data: null\n\n", DONE], "", "error", "bad_event"],
];

for (const [label, parts, text, ending, code] of ENDINGS) {
  test(`ending: ${label}`, async () => {
    const { answer, texts, error, calls } = await read([sse(...parts)]);
    assert.equal(texts.join(""), text);
    assert.equal(answer.text, text);
    assert.equal(error?.ending ?? "complete", ending);
    if (error) {
      assert.equal(error.code, code);
      assert.equal(error.status, 200);
      assert.equal(error.partial, text);
    }
    assert.equal(calls.length, 1, "an answer that has begun is not asked for again");
  });

  test(`ending: ${label}, byte by byte`, async () => {
    const bytes = parts.flatMap((part) => (typeof part === "string" ? part.split("") : [part]));
    const { texts, error } = await read([sse(...bytes)]);
    assert.equal(texts.join(""), text);
    assert.equal(error?.ending ?? "complete", ending);
  });

  test(`ending: ${label}, cut at random`, async () => {
    const random = seeded(label);
    for (let round = 0; round < 20; round += 1) {
      const pieces = parts.flatMap((part) => (typeof part === "string" ? randomCuts(part, random) : [part]));
      const { texts, error } = await read([sse(...pieces)]);
      assert.equal(texts.join(""), text);
      assert.equal(error?.ending ?? "complete", ending);
    }
  });
}

/** [label, parts, deltas] */
const DELTAS = [
  ["text, empty and none", [chunk({ role: "assistant", content: "" }), chunk({ content: "a" }), chunk({}), chunk(null)], [{ type: "text", text: "a" }]],
  ["a refusal is text", [chunk({ refusal: "no" })], [{ type: "text", text: "no" }]],
  ["reasoning, by either name", [chunk({ reasoning_content: "a", content: null }), chunk({ reasoning: "b", content: "" })], [{ type: "reasoning", text: "a" }, { type: "reasoning", text: "b" }]],
  ["both in one chunk, in order", [chunk({ content: "b", reasoning: "a" })], [{ type: "reasoning", text: "a" }, { type: "text", text: "b" }]],
  ["tool calls", [chunk({ content: null, tool_calls: [{ index: 0, id: "c" }] }), chunk({ tool_calls: [] })], [{ type: "tool_calls", calls: [{ index: 0, id: "c" }] }]],
  ["the finish, once", [delta("a", "stop"), delta("", "stop")], [{ type: "text", text: "a" }, { type: "finish", reason: "stop" }]],
  ["usage, beside choices and alone", [chunk({}, { usage: null }), chunk({}, { usage: { total_tokens: 1 } }), `data: {"choices":[],"usage":{"total_tokens":2}}\n\n`], [{ type: "usage", usage: { total_tokens: 1 } }, { type: "usage", usage: { total_tokens: 2 } }]],
  ["another choice's text and finish are not the first's", [delta("x", "stop", 1)], []],
  ["what no chunk should hold", [`data: {"choices":[null,7,{"delta":7},{"delta":{"content":7,"tool_calls":7,"reasoning":[]}}],"usage":7}\n\n`, `data: {"choices":7}\n\n`, "data: []\n\n"], []],
];

for (const [label, parts, expected] of DELTAS) {
  test(`deltas: ${label}`, async () => assert.deepEqual((await read([sse(...parts, DONE)])).deltas, expected));
}

test("usage and finish_reason are there afterwards, and the metrics", async () => {
  const usage = `data: ${JSON.stringify({ choices: [], usage: { completion_tokens: 9 } })}\n\n`;
  const { answer } = await read([sse(delta(""), delta("a"), delta("b", "length"), usage, DONE)]);
  assert.deepEqual([answer.usage?.completion_tokens, answer.finishReason, answer.metrics.tokens], [9, "length", 9]);
});

test("metrics: before, without an answer, and of one that took its time", async () => {
  const { fetch } = stub(refusal(503, "busy", { "retry-after-ms": "30" }), sse(delta("a"), delta("b"), delta("c"), DONE));
  const answer = streamChat({ messages, fetch, random: () => 0 });
  assert.deepEqual(answer.metrics, { ttft_ms: null, tokens_per_s: null, total_ms: 0, retries: 0, tokens: 0 });
  const seen = [];
  for await (const delta of answer) {
    seen.push(delta);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const { ttft_ms, tokens_per_s, total_ms, retries, tokens } = answer.metrics;
  assert.deepEqual([seen.length, tokens, retries], [3, 3, 1]);
  assert.ok(ttft_ms >= 29 && total_ms >= ttft_ms + 39, `${ttft_ms} ${total_ms}`);
  assert.ok(tokens_per_s > 0 && tokens_per_s <= 2 / 0.038, `${tokens_per_s}`);
  await new Promise((resolve) => setTimeout(resolve, 20));
  assert.equal(answer.metrics.total_ms, total_ms, "the clock stands still after the end");
  const { answer: refused } = await read([refusal(400, "invalid_request")]);
  assert.deepEqual([refused.metrics.ttft_ms, refused.metrics.tokens], [null, 0]);
});

test("the request is a same-origin POST without any key", async () => {
  const { calls } = await read([sse(DONE)], { model: "m", body: { temperature: 0 } });
  const { url, init } = calls[0];
  assert.equal(url, "/api/chat");
  assert.deepEqual(JSON.parse(init.body), { model: "m", messages, stream: true, temperature: 0 });
  assert.deepEqual(init.headers, { "content-type": "application/json", accept: "text/event-stream" });
  assert.deepEqual([init.method, init.mode, init.redirect], ["POST", "same-origin", "error"]);
});

test("an abort in the middle is an abort, with the part that had come, and ends the request", async () => {
  const controller = new AbortController();
  const { fetch, calls } = stub(sse(delta("a") + delta("b") + delta("c"), "hang"));
  const answer = streamChat({ messages, fetch, signal: controller.signal });
  const texts = [];
  await assert.rejects(
    async () => {
      for await (const { text } of answer) {
        texts.push(text);
        if (text === "b") controller.abort();
      }
    },
    (error) => error.ending === "aborted" && error.code === "aborted" && error.partial === "ab",
  );
  assert.deepEqual(texts, ["a", "b"], "what was in hand is not given out after the abort");
  assert.ok(calls[0].init.signal.aborted);
});

for (const [label, replies] of [
  ["while waiting for the headers", [(init) => new Promise((_, no) => init.signal.addEventListener("abort", () => no(init.signal.reason)))]],
  ["while waiting for the first token", [sse("hang")]],
  ["while waiting to ask again", [refusal(503, "busy", { "retry-after": "4" })]],
]) {
  test(`an abort ${label} is an abort`, async () => {
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 20);
    const began = performance.now();
    const { error } = await read(replies, { signal: controller.signal });
    assert.equal(error?.ending, "aborted");
    assert.ok(performance.now() - began < 1_000);
  });
}

test("an abort beforehand sends nothing", async () => {
  const { error, calls } = await read([sse(DONE)], { signal: AbortSignal.abort() });
  assert.deepEqual([error?.ending, calls.length], ["aborted", 0]);
});

test("leaving the loop ends the request", async () => {
  const { fetch, calls } = stub(sse(delta("a"), "hang"));
  for await (const delta of streamChat({ messages, fetch })) if (delta) break;
  assert.ok(calls[0].init.signal.aborted);
});

test("leaving the page ends the request, and only then is it listened to", async () => {
  const page = new EventTarget();
  for (const verb of ["addEventListener", "removeEventListener"]) globalThis[verb] = page[verb].bind(page);
  try {
    const { fetch, calls } = stub(sse(delta("a"), "hang"));
    const answer = streamChat({ messages, fetch });
    const reading = assert.rejects(
      async () => {
        for await (const { text } of answer) if (text) page.dispatchEvent(new Event("pagehide"));
      },
      (error) => error.ending === "aborted" && error.partial === "a",
    );
    await reading;
    assert.ok(calls[0].init.signal.aborted);
    assert.equal(getEventListeners(page, "pagehide").length, 0);
  } finally {
    for (const verb of ["addEventListener", "removeEventListener"]) delete globalThis[verb];
  }
});

test("leaving while the next piece is awaited ends the request at once, too", async () => {
  const { fetch, calls } = stub(sse(delta("a"), "hang"));
  const deltas = streamChat({ messages, fetch })[Symbol.asyncIterator]();
  await deltas.next();
  const awaited = assert.rejects(deltas.next(), (error) => error.ending === "aborted");
  await deltas.return();
  await awaited;
  assert.ok(calls[0].init.signal.aborted);
});

test("a complete answer does not abort its request: the connection lives on", async () => {
  const { calls } = await read([sse(delta("a"), DONE)]);
  assert.equal(calls[0].init.signal.aborted, false);
});

test("silence is not waited out for ever: before the headers an error, after them a truncated answer", async () => {
  const silent = (init) => new Promise((_, no) => init.signal.addEventListener("abort", () => no(init.signal.reason)));
  const before = await read([silent], { idleTimeout: 30 });
  assert.deepEqual([before.error?.ending, before.error?.code], ["error", "client_timeout"]);
  const after = await read([sse(delta("a"), "hang")], { idleTimeout: 30 });
  assert.deepEqual([after.error?.ending, after.error?.code, after.error?.partial], ["truncated", "client_timeout", "a"]);
});

test("signs of life are no first token; a first token ends that wait", async () => {
  const parts = Array.from({ length: 200 }, () => [": alive\n\n", "wait"]).flat();
  const waited = await read([sse(...parts)], { firstTokenTimeout: 300, idleTimeout: 1_000 });
  assert.deepEqual([waited.error?.ending, waited.error?.code], ["truncated", "client_timeout"]);
  const silent = (init) => new Promise((_, no) => init.signal.addEventListener("abort", () => no(init.signal.reason)));
  assert.equal((await read([silent], { firstTokenTimeout: 30 })).error?.code, "client_timeout");
  const begun = await read([sse(delta("a"), ...parts.slice(0, 120), DONE)], { firstTokenTimeout: 300 });
  assert.deepEqual([begun.error, begun.texts], [null, ["a"]]);
});

test("a tab that slept past its deadlines reads what came meanwhile, and asks nothing twice", async (context) => {
  let asleep = 0;
  const awake = performance.now.bind(performance);
  context.mock.method(performance, "now", () => awake() + asleep);
  const sleep = () => (asleep = 3_600_000);
  const waits = Array.from({ length: 50 }, () => "wait");
  const { texts, error, calls } = await read([sse(delta("a"), "wait", sleep, ...waits, delta("b"), DONE)], { idleTimeout: 300 });
  assert.deepEqual([texts, error, calls.length], [["a", "b"], null, 1]);
});

test("a reader that takes its time is no silence", async () => {
  const { fetch } = stub(sse(delta("a") + delta("b"), delta("c"), DONE));
  const texts = [];
  for await (const { text } of streamChat({ messages, fetch, idleTimeout: 40, firstTokenTimeout: 40 })) {
    texts.push(text);
    await new Promise((resolve) => setTimeout(resolve, 80));
  }
  assert.deepEqual(texts, ["a", "b", "c"]);
});

test("after finish_reason, a stream that neither ends nor says [DONE] is whole in three seconds", async (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const { calls, fetch } = stub(sse(delta("a", "stop"), "hang"));
  const deltas = streamChat({ messages, fetch, idleTimeout: 60_000 })[Symbol.asyncIterator]();
  await deltas.next();
  await deltas.next();
  const end = deltas.next();
  await new Promise((resolve) => setImmediate(resolve));
  context.mock.timers.tick(3_000);
  assert.equal((await end).done, true);
  assert.ok(calls[0].init.signal.aborted);
});

test("a stop after the finish, but before [DONE], leaves the answer whole", async () => {
  const controller = new AbortController();
  const { fetch } = stub(sse(delta("a", "stop"), "hang"));
  const seen = [];
  for await (const { type } of streamChat({ messages, fetch, signal: controller.signal })) {
    seen.push(type);
    if (type === "finish") controller.abort();
  }
  assert.deepEqual(seen, ["text", "finish"]);
});

test("a stop on the piece that comes with the finish is a stop: what is still in hand would be missing", async () => {
  const controller = new AbortController();
  const last = chunk({ reasoning: "r", content: "a" }).replace('"delta"', '"finish_reason":"stop","delta"');
  const { fetch } = stub(sse(last, DONE));
  const answer = streamChat({ messages, fetch, signal: controller.signal });
  await assert.rejects(
    async () => {
      for await (const { type } of answer) if (type === "reasoning") controller.abort();
    },
    (error) => error.ending === "aborted",
  );
  assert.deepEqual([answer.text, answer.finishReason], ["", null]);
});

test("a stop in onRetry does not wait for the repetition", async () => {
  const controller = new AbortController();
  const began = performance.now();
  const options = { signal: controller.signal, onRetry: () => controller.abort() };
  const { error, calls } = await read([refusal(503, "busy", { "retry-after": "5" })], options);
  assert.deepEqual([error?.ending, calls.length], ["aborted", 1]);
  assert.ok(performance.now() - began < 4_000);
});

test("an error ends the request, too; its cause and its listener are not forgotten, nor kept", async () => {
  const { signal } = new AbortController();
  const { calls } = await read([sse(delta("a"), 'data: {"error": "no"}\n\n', "hang")], { signal });
  assert.ok(calls[0].init.signal.aborted);
  assert.equal(getEventListeners(signal, "abort").length, 0);
  const reset = new TypeError("reset");
  assert.equal((await read([sse(delta("a"), reset)])).error?.cause, reset);
});

test("an event beyond the parser's bound is an error", async () => {
  const { error } = await read([sse("data: ", "x".repeat(MAX_EVENT_CHARS), "y")]);
  assert.deepEqual([error?.ending, error?.code], ["error", "bad_event"]);
});

test("what arrives in the moment of the stop is not shown", async () => {
  const controller = new AbortController();
  const body = new ReadableStream({
    pull(stream) {
      controller.abort();
      stream.enqueue(new TextEncoder().encode(delta("a")));
    },
  }, { highWaterMark: 0 });
  const answer = new Response(body, { headers: { "content-type": "text/event-stream" } });
  const { texts, error } = await read([answer], { signal: controller.signal });
  assert.deepEqual([texts, error?.ending, error?.partial], [[], "aborted", ""]);
});

test("what follows [DONE] is read, so that the connection can be used again", async () => {
  let isRead = false;
  await read([sse(delta("a"), DONE, ": bye\n\n", () => (isRead = true), ": bye\n\n")]);
  await new Promise((resolve) => setImmediate(resolve));
  assert.ok(isRead);
});

test("a stream can be read once", async () => {
  const { answer } = await read([sse(DONE)]);
  assert.throws(() => answer[Symbol.asyncIterator](), TypeError);
});

for (const [status, code] of [[429, "upstream_rate_limited"], [502, "upstream_error"], [503, "busy"]]) {
  test(`${status} before the first token is asked again, and the wait announced`, async () => {
    const waits = [];
    const again = refusal(status, code, { "retry-after-ms": "10" });
    const options = { onRetry: ({ attempt, delay, error }) => waits.push([attempt, delay, error.code]) };
    const { texts, calls } = await read([again, again, sse(delta("a"), DONE)], options);
    assert.deepEqual([texts, calls.length], [["a"], 3]);
    assert.deepEqual(waits, [[1, 10, code], [2, 10, code]]);
  });
}

test("it gives up after the repetitions, with the last refusal's facts", async () => {
  const { error, calls } = await read([refusal(503, "busy", { "retry-after-ms": "5", "x-request-id": "r1" })]);
  assert.equal(calls.length, 3);
  assert.deepEqual([error?.ending, error?.status, error?.code, error?.message], ["error", 503, "busy", "it is busy"]);
  assert.deepEqual([error?.retryAfter, error?.requestId, error?.partial], [0.005, "r1", ""]);
});

for (const [label, reply] of [
  ["400", refusal(400, "input_too_long")],
  ["403", refusal(403, "cross_origin")],
  ["500", refusal(500, "internal_error")],
  ["504", refusal(504, "upstream_timeout")],
  ["a wrong key", refusal(502, "upstream_auth")],
  ["x-should-retry: false", refusal(503, "busy", { "x-should-retry": "false", "retry-after": "0" })],
  ["a wait longer than people sit through", refusal(429, "rate_limited", { "retry-after": "60" })],
  ["another origin's page with status 200", () => Promise.resolve(new Response("<html>", { headers: { "content-type": "text/html" } }))],
  ["no connection", () => Promise.reject(new TypeError("Failed to fetch"))],
]) {
  test(`not asked again: ${label}`, async () => {
    const { error, calls } = await read([reply]);
    assert.equal(calls.length, 1);
    assert.equal(error?.ending, "error");
  });
}

test("without a response there is no status, whatever was answered before", async () => {
  const down = () => Promise.reject(new TypeError("Failed to fetch"));
  const { error } = await read([refusal(503, "busy", { "retry-after-ms": "5", "x-request-id": "r1" }), down]);
  assert.deepEqual([error?.code, error?.ending, error?.status], ["network_error", "error", 0]);
});

/** [label, status, headers, attempt, jitter, milliseconds or null] */
const DELAYS = [
  ["backoff grows", 503, {}, 0, 1, 500],
  ["backoff grows", 503, {}, 1, 1, 1000],
  ["backoff is capped", 503, {}, 20, 1, 8000],
  ["jitter shortens it by half at most", 503, {}, 0, 0, 250],
  ["Retry-After is a floor", 429, { "retry-after": "2" }, 0, 0, 2000],
  ["Retry-After with jitter", 429, { "retry-after": "2" }, 0, 1, 2250],
  ["retry-after-ms goes first", 429, { "retry-after": "2", "retry-after-ms": "300" }, 0, 0, 300],
  ["at the bound", 429, { "retry-after": "5" }, 0, 0, 5000],
  ["beyond the bound", 429, { "retry-after": "6" }, 0, 0, null],
  ["nonsense in Retry-After counts as absent", 503, { "retry-after": "soon" }, 0, 1, 500],
  ["told not to", 503, { "x-should-retry": "false" }, 0, 1, null],
  ["told to", 500, { "x-should-retry": "true" }, 0, 1, 500],
  ["other statuses", 500, {}, 0, 1, null],
];

for (const [label, status, headers, attempt, jitter, expected] of DELAYS) {
  test(`delay: ${label}`, () => {
    assert.equal(retryDelay({ status, headers: new Headers(headers) }, attempt, jitter), expected);
  });
}

test("Retry-After may be a date", () => {
  const now = Date.parse("2026-01-01T00:00:00Z");
  const header = (value) => new Headers({ "retry-after": value });
  assert.equal(retryAfter(header("Thu, 01 Jan 2026 00:00:30 GMT"), now), 30);
  assert.equal(retryAfter(header("Wed, 31 Dec 2025 00:00:00 GMT"), now), 0);
});

test("a lost session is fetched once, and the question asked once more", async () => {
  const session = () => Promise.resolve(new Response("{}"));
  const lost = refusal(401, "session_required");
  const found = await read([lost, session, sse(delta("a"), DONE)]);
  assert.deepEqual(found.calls.map(({ url }) => url), ["/api/chat", "/api/session", "/api/chat"]);
  assert.deepEqual(found.texts, ["a"]);
  const gone = await read([lost, session, lost]);
  assert.deepEqual([gone.error?.code, gone.calls.length], ["session_required", 3]);
  const closed = await read([lost, refusal(403, "cross_origin")]);
  assert.deepEqual([closed.error?.code, closed.calls.length], ["session_required", 2]);
});

test("other kinds of 401 are the reader's: nothing is fetched behind their back", async () => {
  for (const code of ["session_expired", "login_required", "invalid_credentials"]) {
    assert.equal((await read([refusal(401, code)])).calls.length, 1);
  }
});

test("a gateway's page in place of our error still has its status for a code", async () => {
  const page = () => Promise.resolve(new Response("<h1>504</h1>", { status: 504 }));
  const { error } = await read([page]);
  assert.deepEqual([error?.code, error?.status], ["http_504", 504]);
});
