// streamChat: its endings never pass for one another, and it repeats only what may be repeated.

import assert from "node:assert/strict";
import { test } from "node:test";

import { ChatError, MAX_HONOURED_WAIT, retryAfter, retryDelay, streamChat } from "../../static/chat/client.js";

const messages = [{ role: "user", content: "hi" }];
const delta = (content, finish_reason = null, index = 0) =>
  `data: ${JSON.stringify({ choices: [{ index, delta: { content }, finish_reason }] })}\n\n`;
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
            controller.error(new DOMException("aborted", "AbortError"));
          } catch {
            // it had ended
          }
        });
      },
      pull(controller) {
        const part = queue.shift();
        if (part === "hang") return new Promise(() => {});
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
  const texts = [];
  try {
    for await (const text of answer) texts.push(text);
    return { answer, texts, calls, error: null };
  } catch (error) {
    assert.ok(error instanceof ChatError, String(error?.stack));
    return { answer, texts, calls, error };
  }
}

/** [label, parts, text, ending, code]; ending "complete" has no code */
const ENDINGS = [
  ["[DONE]", [delta("a"), delta("b"), DONE], "ab", "complete"],
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
}

test("usage, finish_reason and the number of deltas are there afterwards", async () => {
  const usage = `data: ${JSON.stringify({ choices: [], usage: { completion_tokens: 9 } })}\n\n`;
  const { answer } = await read([sse(delta(""), delta("a"), delta("b", "length"), usage, DONE)]);
  assert.deepEqual([answer.usage?.completion_tokens, answer.finishReason, answer.deltas], [9, "length", 2]);
});

test("the request is a same-origin POST without any key", async () => {
  const { calls } = await read([sse(DONE)], { model: "m", body: { temperature: 0 } });
  const { url, init } = calls[0];
  assert.equal(url, "/api/chat");
  assert.deepEqual(JSON.parse(init.body), { model: "m", messages, stream: true, temperature: 0 });
  assert.deepEqual(init.headers, { "content-type": "application/json", accept: "text/event-stream" });
  assert.deepEqual([init.method, init.mode, init.credentials, init.redirect], ["POST", "same-origin", "same-origin", "error"]);
});

test("an abort in the middle is an abort, with the part that had come, and ends the request", async () => {
  const controller = new AbortController();
  const { fetch, calls } = stub(sse(delta("a") + delta("b") + delta("c"), "hang"));
  const answer = streamChat({ messages, fetch, signal: controller.signal });
  const texts = [];
  await assert.rejects(
    async () => {
      for await (const text of answer) {
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
  for await (const text of streamChat({ messages, fetch })) if (text) break;
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

/** [label, status, headers, attempt, jitter, milliseconds or null] */
const DELAYS = [
  ["backoff grows", 503, {}, 0, 1, 500],
  ["backoff grows", 503, {}, 1, 1, 1000],
  ["backoff is capped", 503, {}, 20, 1, 8000],
  ["jitter shortens it by half at most", 503, {}, 0, 0, 250],
  ["Retry-After is a floor", 429, { "retry-after": "2" }, 0, 0, 2000],
  ["Retry-After with jitter", 429, { "retry-after": "2" }, 0, 1, 2250],
  ["retry-after-ms goes first", 429, { "retry-after": "2", "retry-after-ms": "300" }, 0, 0, 300],
  ["at the bound", 429, { "retry-after": String(MAX_HONOURED_WAIT / 1000) }, 0, 0, MAX_HONOURED_WAIT],
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
