/** Server-sent events, parsed while they arrive. */

/** Most UTF-16 units that one unfinished event may hold. */
export const MAX_EVENT_CHARS: number;

/** One whole event. */
export interface SSEEvent {
  /** Its type: "message" unless the stream named another. */
  event: string;
  /** Its data lines, joined by LF. */
  data: string;
  /** The last event id so far; "" unless the stream gave one. */
  id: string;
}

export class SSEParser {
  constructor(options?: { maxEventChars?: number });
  /**
   * Takes the next chunk: bytes (UTF-8, split anywhere) or text, one kind for one stream. Returns the events that it
   * completed, in order. Throws RangeError when the event under way has outgrown the bound; only `reset` helps then.
   */
  feed(chunk: Uint8Array | string): SSEEvent[];
  /** Forgets everything: ready for another stream. */
  reset(): void;
}
