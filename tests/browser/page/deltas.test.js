// What is made of deltas: text, batches that lose nothing and wait for nobody, whole tool calls.

import assert from "node:assert/strict";
import { test } from "node:test";

import { batched, textOf, withCalls } from "../../../static/chat/deltas.js";
import { randomCuts, seeded } from "./random.js";

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** A source that gives each item, waits so many milliseconds for a number, or for a promise, and throws an Error. */
async function* source(...parts) {
  for (const part of parts) {
    if (typeof part === "number") await pause(part);
    else if (part instanceof Promise) await part;
    else if (part instanceof Error) throw part;
    else yield part;
  }
}

/** All batches, or so many, with the milliseconds after which they came, and the error at the end. */
async function batches(items, milliseconds, most = Infinity) {
  const began = performance.now();
  const found = [];
  try {
    const coming = batched(items, milliseconds);
    while (found.length < most) {
      const { value: batch, done } = await coming.next();
      if (done) break;
      found.push({ batch, at: performance.now() - began });
    }
    return { found, error: null };
  } catch (error) {
    return { found, error };
  }
}

test("textOf gives the text alone, and the error", async () => {
  const texts = [];
  const deltas = source({ type: "reasoning", text: "x" }, { type: "text", text: "a" }, { type: "finish", reason: "stop" }, new Error("e"));
  await assert.rejects(async () => {
    for await (const text of textOf(deltas)) texts.push(text);
  }, /e/);
  assert.deepEqual(texts, ["a"]);
});

test("the first item is there at once, the others in a batch", async () => {
  const { found } = await batches(source("a", 5, "b", "c", 5, "d", new Promise(() => {})), 1_000, 2);
  assert.deepEqual(found.map(({ batch }) => batch.join("")), ["a", "bcd"], "the timer does not wait for the source");
  assert.ok(found[0].at < 900);
  assert.ok(found[1].at >= 995);
});

test("what is there in one go comes in one go", async () => {
  const { found } = await batches(source(..."abcdef"), 1_000);
  assert.deepEqual(found.map(({ batch }) => batch), [[..."abcdef"]]);
});

test("what is in hand is given out before the error", async () => {
  for (const parts of [["a", "b", new Error("cut")], ["a", 30, "b", "c", new Error("cut")], [new Error("cut")]]) {
    const { found, error } = await batches(source(...parts), 200);
    assert.equal(found.flatMap(({ batch }) => batch).join(""), parts.filter((part) => typeof part === "string").join(""));
    assert.equal(error?.message, "cut");
  }
});

test("however it arrives, every item is there once, in order", async () => {
  const random = seeded("batches");
  await Promise.all(
    Array.from({ length: 40 }, async () => {
      const text = Array.from({ length: 100 }, (_, at) => String.fromCharCode(0x4e00 + at)).join("");
      const parts = randomCuts(text, random).flatMap((piece) => [...piece, Math.floor(random() * 12)]);
      const { found } = await batches(source(...parts), 10);
      assert.equal(found.flatMap(({ batch }) => batch).join(""), text);
    }),
  );
});

test("a slow reader slows the source: one item is asked for ahead, no more", async () => {
  let given = 0;
  const counting = { [Symbol.asyncIterator]: () => ({ next: async () => ({ value: (given += 1), done: false }) }) };
  const found = batched(counting, 5);
  await found.next();
  const before = given;
  await pause(40);
  assert.ok(given - before <= 1);
  await found.return();
});

test("leaving ends the source, an error or an end does not end it again", async () => {
  const ends = [];
  const watched = (label, ...parts) => ({
    [Symbol.asyncIterator]() {
      const items = source(...parts);
      return { next: () => items.next(), return: () => (ends.push(label), items.return()) };
    },
  });
  for await (const batch of batched(watched("left", "a", "b"), 5)) if (batch) break;
  for await (const batch of batched(watched("ended", "a"), 5)) assert.ok(batch);
  assert.deepEqual(ends, ["left"]);
});

test("an error that nobody waits for yet is no unhandled rejection", async () => {
  for (const milliseconds of [0, 1]) {
    const found = batched(source("a", 5, new Error("cut")), milliseconds);
    await found.next();
    await pause(40);
    await assert.rejects(found.next(), /cut/);
  }
});

test("tool calls grow piece by piece, several at one time; the earlier list stays as it was", () => {
  const pieces = [
    [{ index: 0, id: "a", function: { name: "sum", arguments: "" } }],
    [{ index: 0, function: { arguments: '{"x":' } }, { index: 1, id: "b", function: { name: "now" } }],
    [{ index: 1, function: { arguments: "{}" } }, { index: 0, id: null, function: { name: null, arguments: "1}" } }],
    [{ function: null }],
  ];
  const steps = pieces.reduce((all, some) => [...all, withCalls(all.at(-1), some)], [[]]);
  assert.deepEqual(steps.at(-1), [
    { index: 0, id: "a", name: "sum", arguments: '{"x":1}' },
    { index: 1, id: "b", name: "now", arguments: "{}" },
  ]);
  assert.deepEqual(steps[1], [{ index: 0, id: "a", name: "sum", arguments: "" }]);
});
