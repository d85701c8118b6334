// The parser of server-sent events: whole, byte by byte, and split at random.

import assert from "node:assert/strict";
import { test } from "node:test";

import { SSEParser } from "../../../static/chat/sse.js";
import { randomCuts, seeded } from "./random.js";

const BOM = "\uFEFF";
/** [label, stream, the events' data (or whole events)] */
const STREAMS = [
  ["LF", "data: a\n\ndata: b\n\n", ["a", "b"]],
  ["CRLF", "data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]],
  ["CR", "data: a\r\rdata: b\r\r", ["a", "b"]],
  ["all three in one stream", "data: a\n\r\ndata: b\r\n\rdata: c\r\r\n", ["a", "b", "c"]],
  ["a byte order mark first", `${BOM}data: a\n\n`, ["a"]],
  ["only the first one is a mark", `${BOM}${BOM}data: a\n\ndata: b\n\n`, ["b"]],
  ["a mark inside is text", `data: ${BOM}a\n\n`, [`${BOM}a`]],
  ["comments", ": hello\n\n:\n\ndata: a\n: between\ndata: b\n\n", ["a\nb"]],
  ["several lines", "data: a\ndata\ndata: c\n\n", ["a\n\nc"]],
  ["only the first space goes", "data:a\n\ndata:  b\n\n", ["a", " b"]],
  ["empty data is an event", "data\n\ndata:\n\n", ["", ""]],
  ["no data, no event", "event: ping\n\nid: 1\n\n\n\n", []],
  ["unknown fields", "foo: bar\nretry: 10\ndata: a\n\n", ["a"]],
  ["field names are exact", " data: a\nDATA: b\ndata : c\n\n", []],
  ["a tail without its blank line is dropped", "data: a\n\ndata: b\n", ["a"]],
  ["characters of one to four bytes", "data: aéሰ😀\n\n", ["aéሰ😀"]],
  ["separators of other kinds are text", "data: a\u2028b\u0085c\u000bd\n\n", ["a\u2028b\u0085c\u000bd"]],
  [
    "types and ids",
    "event: x\nid: 7\ndata: a\n\ndata: b\n\nid: 8\0\ndata: c\n\nid\ndata: d\n\n",
    [
      { event: "x", data: "a", id: "7" },
      { event: "message", data: "b", id: "7" },
      { event: "message", data: "c", id: "7" },
      { event: "message", data: "d", id: "" },
    ],
  ],
];

const bytesOf = (text) => new TextEncoder().encode(text);

function feedAll(chunks, parser = new SSEParser()) {
  return chunks.flatMap((chunk) => parser.feed(chunk));
}

function assertEvents(events, expected) {
  const whole = expected.map((one) => (typeof one === "string" ? { event: "message", data: one, id: "" } : one));
  assert.deepEqual(events, whole);
}

for (const [label, stream, expected] of STREAMS) {
  test(`${label}: whole`, () => {
    assertEvents(feedAll([bytesOf(stream)]), expected);
    assertEvents(feedAll([stream]), expected);
  });

  test(`${label}: byte by byte, and character by character`, () => {
    assertEvents(feedAll([...bytesOf(stream)].map((byte) => Uint8Array.of(byte))), expected);
    assertEvents(feedAll(stream.split("")), expected);
  });

  test(`${label}: cut at random`, () => {
    const random = seeded(label);
    for (let round = 0; round < 100; round += 1) {
      assertEvents(feedAll(randomCuts(bytesOf(stream), random)), expected);
    }
  });
}

test("an event is there with its last byte, and not before", () => {
  for (const end of ["\n\n", "\r\n\r", "\r\r"]) {
    const parser = new SSEParser();
    assert.deepEqual(feedAll([...bytesOf(`data: a${end.slice(0, -1)}`)].map((byte) => Uint8Array.of(byte)), parser), []);
    assert.equal(parser.feed(end.slice(-1)).length, 1);
  }
});

test("empty chunks change nothing", () => {
  assertEvents(feedAll(["data: a\r", "", "\n", "", "\r", "", "\n"]), ["a"]);
  assertEvents(feedAll([new Uint8Array(), bytesOf(`${BOM}data: a\n\n`)]), ["a"]);
});

test("reset forgets half a line, half an event, half a character, the id and the beginning", () => {
  const parser = new SSEParser();
  feedAll([bytesOf("id: 7\nevent: x\ndata: a\n\ndata: b\ndata: é").slice(0, -1)], parser);
  parser.reset();
  assertEvents(parser.feed(bytesOf(`${BOM}data: c\n\n`)), ["c"]);
});

test("an event without end is refused at the bound, in one line or in many", () => {
  for (const piece of ["x".repeat(10), "data: 345\n", ": 3456789"]) {
    const parser = new SSEParser({ maxEventChars: 100 });
    const feed = () => {
      for (let round = 0; round < 30; round += 1) parser.feed(piece);
    };
    assert.throws(feed, RangeError);
    parser.reset();
    assertEvents(parser.feed("data: a\n\n"), ["a"]);
  }
});

test("a long stream of short events never meets the bound", () => {
  const parser = new SSEParser({ maxEventChars: 100 });
  assert.equal(feedAll(Array.from({ length: 1000 }, () => "data: 0123456789\n\n"), parser).length, 1000);
});

test("the work grows with the bytes, not with their square: 4 MB in one event, in small pieces", () => {
  const parser = new SSEParser();
  const before = process.cpuUsage();
  const piece = bytesOf("x".repeat(64));
  const events = [...parser.feed("data: ")];
  for (let sent = 0; sent < 4 << 20; sent += 64) events.push(...parser.feed(piece));
  events.push(...parser.feed("\n\n"));
  assert.equal(events[0].data.length, 4 << 20);
  const { user, system } = process.cpuUsage(before); // microseconds of our own: others may use the machine, too
  assert.ok(user + system < 5_000_000);
});
