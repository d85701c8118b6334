"""Server-sent events in transit: the end of each event, and whether the stream has announced its end. Pure.

Rules:
1. No byte is altered, added or reordered. All input comes out, up to the last complete event. Only a chunk with a
   usage and no choices is withheld, if the proxy requested it and the page did not.
2. An event is complete at its blank line; a line ends with LF, CRLF or CR (WHATWG HTML, section 9.2.5).
3. At most `HOLD` bytes of an incomplete event are held; more of it is passed on as it arrives. This bounds memory,
   not the length of an event.
4. Ordinary chunks are searched, not parsed: this code runs for every token of every user. An event is parsed if the
   search cannot rule out an end. An event that was passed on early (rule 3) is counted but not parsed: its first
   bytes are gone.
5. The API key never passes, not even divided in an event that is passed on early. (An empty key guards nothing.)
6. When in doubt, the stream is open: a missed end costs an error event, a falsely detected end hides a broken stream.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

import msgspec

from proxy.telemetry.records import Usage

NOT_TEXT = b"\0" * 8  # stands in for an empty key
HOLD = 64 * 1024  # bytes of an incomplete event: far above any token, affordable for a thousand streams

CONTENT = b'"content":"'
LESSONS = 8  # ordinary events to learn from: the first ones of a stream may differ, such as by a role

BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")  # atomic: a CR LF is never taken for two line ends
LINE = re.compile(rb"\r\n|\n|\r")
BOM = b"\xef\xbb\xbf"


class Ending(Enum):
    """The end that the stream has announced so far, if any."""

    OPEN = "open"
    COMPLETE = "complete"
    ERROR = "error"


class Choice(msgspec.Struct):
    index: int | None = 0
    finish_reason: Any = None


class Chunk(msgspec.Struct):
    """The fields that the proxy reads of a chat.completion.chunk, or of a whole chat.completion."""

    choices: list[Choice] | None = None
    usage: Any = None
    error: Any = None


decode_chunk = msgspec.json.Decoder(Chunk).decode


class KeyEcho(Exception):
    """The upstream sent the API key. `safe` holds the whole events before it."""

    def __init__(self, safe: bytes) -> None:
        self.safe = safe
        super().__init__("the upstream sent our key inside the stream")


class Events:
    """One stream. `feed` takes bytes of the upstream and returns the bytes to pass on."""

    __slots__ = (
        "_after",
        "_before",
        "_keep",
        "_key",
        "_lessons",
        "_tail",
        "_withhold",
        "choices",
        "count",
        "done",
        "failed",
        "finished",
        "partial",
        "usage",
    )

    def __init__(self, key: bytes, choices: int = 1, *, withhold_usage: bool = False) -> None:
        self._key = key = key or NOT_TEXT
        self._withhold = withhold_usage
        self._before = b""  # the bytes before and after the content in this stream's ordinary events, once learned
        self._after = b""
        self._lessons = 0 if b'"' in key else LESSONS
        self._keep = max(1, len(key) - 1)  # held bytes of a long event that may yet become a boundary or the key
        self._tail = bytearray()
        self.choices = choices
        self.count = 0
        self.done = False
        self.failed = False
        self.finished: set[int | None] = set()
        self.partial = False  # a part of the current event has been passed on (rule 3)
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        """The bytes to pass on now. Raises KeyEcho."""
        if self._tail or not data.endswith(b"\n\n"):
            return self.feed_split(data)
        if self.is_like_the_last(data):
            self.count += 1
            return data
        return self.note(data)

    def is_like_the_last(self, data: bytes) -> bool:
        """Whether this is one event that differs from the learned one in its content only (rule 4).

        Then only the content is searched: without a quote it stays inside its string, without a line end inside its
        event. The key contains no quote, so it cannot start before the content or end after it.
        """
        before, after = self._before, self._after
        if not before or not data.startswith(before) or not data.endswith(after):
            return False
        start, stop = len(before), len(data) - len(after)
        return (
            start <= stop
            and data.find(b'"', start, stop) < 0
            and data.find(b"\n", start, stop) < 0
            and data.find(b"\r", start, stop) < 0
            and data.find(self._key, start, stop) < 0
        )

    def learn(self, event: bytes) -> None:
        """Takes a plain event as the pattern for later ones, LESSONS times: some upstreams pad each differently."""
        self._lessons -= 1
        start = event.find(CONTENT) + len(CONTENT)
        stop = event.find(b'"', start)
        if len(CONTENT) <= start < stop and b"\\" not in event[start:stop]:
            self._before, self._after = event[:start], event[stop:]

    def feed_split(self, data: bytes) -> bytes:
        """`feed` for a chunk that does not end with an event, or that continues one."""
        tail = self._tail
        start = max(0, len(tail) - 1)  # a boundary may start with the last held byte
        tail += data
        cut = last_boundary(tail, start)
        out = bytes(tail[:cut])
        if cut:
            del tail[:cut]
            out = self.note(out)
        if self.partial or len(tail) > HOLD:
            return out + self.pass_on(out)
        return out

    def pass_on(self, before: bytes) -> bytes:
        """The bytes to pass on of an event longer than HOLD, after the whole events `before` it. Raises KeyEcho."""
        if self._key in self._tail:
            raise KeyEcho(before)
        out = bytes(self._tail[: -self._keep])
        del self._tail[: -self._keep]
        self.partial = True
        return out

    def rest(self) -> bytes:
        """The bytes held after the last whole event, for a stream that ended well. Raises KeyEcho."""
        out = bytes(self._tail)
        self._tail.clear()
        if self._key in out:
            raise KeyEcho(b"")
        return out

    @property
    def ending(self) -> Ending:
        if self.failed:
            return Ending.ERROR
        if self.done or (self.finished and len(self.finished) >= self.choices):
            return Ending.COMPLETE
        return Ending.OPEN

    # ---- reading what passes --------------------------------------------------------------------------------------

    def note(self, out: bytes) -> bytes:
        """Counts and reads whole events, and returns the bytes to pass on. Raises KeyEcho."""
        if self._key in out:
            raise KeyEcho(self.whole_events_before(out, out.index(self._key)))
        continued = b""
        if self.partial:
            self.partial = False
            self.count += 1
            continued, out = split_at(BLANK_LINE.search(out), out)
        if not is_plain(out):
            return continued + self.read(out)
        events = out.count(b"\n\n")
        self.count += events
        if self._lessons and events == 1:
            self.learn(out)
        return continued + out

    def whole_events_before(self, out: bytes, place: int) -> bytes:
        safe = out[: last_boundary(out[:place], 0)]
        return self.note(safe) if safe else b""

    def read(self, out: bytes) -> bytes:
        """Parses event by event, and returns all bytes except withheld events."""
        kept, start = [], 0
        for boundary in BLANK_LINE.finditer(out):
            event, start = out[start : boundary.end()], boundary.end()
            if not self.read_event(event):
                kept.append(event)
        return b"".join(kept) + out[start:]

    def read_event(self, event: bytes) -> bool:
        """Counts and parses one event; true if it is to be withheld from the page."""
        data = data_of(event)
        if data is None:
            return False
        self.count += 1
        if data.strip() == b"[DONE]":
            self.done = True
            return False
        try:
            chunk = decode_chunk(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False  # not a chunk: passed unchanged, and no end
        if chunk.error:  # clients also take an empty one for none
            self.failed = True
        for choice in chunk.choices or ():
            if choice.finish_reason and choice.finish_reason != "null":  # some write "" or "null" for null
                self.finished.add(choice.index)
        usage = counted(chunk.usage)
        self.usage = usage or self.usage
        if self._withhold and not chunk.choices and isinstance(chunk.usage, dict) and not chunk.error:
            self.count -= 1
            return True
        return False


def split_at(boundary: re.Match[bytes] | None, data: bytes) -> tuple[bytes, bytes]:
    """Splits the data at the end of the boundary."""
    end = boundary.end() if boundary else 0
    return data[:end], data[end:]


def last_boundary(data: bytes | bytearray, start: int) -> int:
    """The index after the last blank line that starts at or after `start`; 0 if there is none.

    A blank line is two line ends in a row, and CR LF is one line end: LF LF, LF CR or CR CR, and the LF after a
    second CR belongs to it.
    """
    place = max(data.rfind(b"\n\n", start), data.rfind(b"\n\r", start), data.rfind(b"\r\r", start))
    if place < 0:
        return 0
    cut = place + 2
    return cut + 1 if data[cut - 1] == 13 and data[cut : cut + 1] == b"\n" else cut


def is_plain(out: bytes) -> bool:
    """Whether every event here starts with its data and ends with LF LF, and none can announce the end.

    `"finish_reason"` cannot occur inside a JSON string (its quotes would be escaped), so counting it is enough. Its
    letters can be escaped only as `\\u00..`.
    """
    reasons = out.count(b'"finish_reason"')
    return (
        out.startswith(b"data:")
        and out.count(b"\n\n") == out.count(b"\n\ndata:") + 1
        and (reasons == out.count(b'"finish_reason":null') or reasons == out.count(b'"finish_reason": null'))
        and b"[DONE]" not in out
        and b'"error"' not in out
        and out.count(b'"usage"') == out.count(b'"usage":null')
        and b"\\u00" not in out
        and b"\r" not in out
    )


def data_of(event: bytes) -> bytes | None:
    """The data of one event: its data lines joined with LF; None without a data line."""
    lines = []
    for line in LINE.split(event.removeprefix(BOM)):
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None


def usage_of(body: bytes) -> Usage | None:
    """The usage in a whole chat.completion, or None."""
    try:
        return counted(decode_chunk(body).usage)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def counted(usage: object) -> Usage | None:
    """The usage if it is plausible: whole numbers, and a prompt of at least one token. Else None."""
    try:
        converted = msgspec.convert(usage, Usage)
    except msgspec.ValidationError:
        return None
    return converted if converted.prompt_tokens else None
