// @ts-check
/**
 * Server-Sent Events, parsed while they arrive: chunks in, whole events out.
 *
 * Rules of this file:
 * 1. Pure: no network, no timer, no callback. The caller feeds, and gets back what became whole.
 * 2. A chunk may end anywhere: inside a character, between CR and LF, inside the byte order mark.
 * 3. An event is delivered with its blank line, at once. A CR is a line end by itself, so nothing waits for a LF.
 * 4. What never got its blank line is not an event; at the end of a stream it is dropped (as the standard says).
 * 5. Every character is looked at once, however the stream was cut.
 *
 * Source: https://html.spec.whatwg.org/multipage/server-sent-events.html (parsing and interpreting an event stream).
 * Left out on purpose: `retry`, because a POST is never silently sent again.
 */

/**
 * Most UTF-16 units one unfinished event may hold. Single events of 10 MB exist (inline images); this is that
 * with room to spare, and still something that a page can hold in memory.
 */
export const MAX_EVENT_CHARS = 16 * 1024 * 1024;

/**
 * One whole event.
 * @typedef {object} SSEEvent
 * @property {string} event its type, "message" unless the stream named another
 * @property {string} data its data lines, joined by LF
 * @property {string} id the last event id so far, "" unless the stream gave one
 */

export class SSEParser {
  #max;
  #decoder = newDecoder();
  #atStart = true; // a byte order mark is one only here
  #afterCR = false; // a LF that comes next belongs to that CR
  #line = ""; // the line that has no end yet
  /** @type {string[]} */
  #data = [];
  #size = 0; // characters in #data
  #type = "";
  #id = "";

  /** @param {{maxEventChars?: number}} [options] */
  constructor({ maxEventChars = MAX_EVENT_CHARS } = {}) {
    this.#max = maxEventChars;
  }

  /**
   * Takes the next chunk: bytes (UTF-8, split anywhere) or text. Use one kind for one stream.
   * @param {Uint8Array | string} chunk
   * @returns {SSEEvent[]} the events that this chunk completed, in order
   * @throws {RangeError} when the event under way has outgrown the bound; only `reset` helps then
   */
  feed(chunk) {
    if (this.#size + this.#line.length > this.#max) {
      throw new RangeError(`an event is longer than ${this.#max} characters`);
    }
    let text = typeof chunk === "string" ? chunk : this.#decoder.decode(chunk, { stream: true });
    if (text === "") return [];
    if (this.#atStart) text = text.replace(/^\uFEFF/, "");
    this.#atStart = false;
    const lines = (this.#afterCR && text.startsWith("\n") ? text.slice(1) : text).split(/\r\n?|\n/);
    this.#afterCR = text.endsWith("\r");
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop() ?? "";
    return lines.flatMap((line) => this.#endLine(line));
  }

  /** Forgets everything: ready for another stream. */
  reset() {
    this.#decoder = newDecoder();
    this.#atStart = true;
    this.#afterCR = false;
    this.#line = "";
    this.#id = "";
    this.#clear();
  }

  /**
   * @param {string} line without its end
   * @returns {SSEEvent[]} the event, if this was the blank line that ends one with data
   */
  #endLine(line) {
    if (line === "") {
      const data = this.#data;
      const event = { event: this.#type || "message", data: data.join("\n"), id: this.#id };
      this.#clear();
      return data.length ? [event] : [];
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon); // "" is a comment
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (name === "data") {
      this.#data.push(value);
      this.#size += value.length + 1;
    } else if (name === "event") {
      this.#type = value;
    } else if (name === "id" && !value.includes("\0")) {
      this.#id = value;
    }
    return [];
  }

  #clear() {
    this.#data = [];
    this.#size = 0;
    this.#type = "";
  }
}

/** The parser looks for the byte order mark itself, so that bytes and text behave alike. */
function newDecoder() {
  return new TextDecoder("utf-8", { ignoreBOM: true });
}
