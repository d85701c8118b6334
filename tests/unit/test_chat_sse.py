"""The scanner: no byte is altered, whole events only, and what it notes does not depend on how the bytes came."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import settings as tuned
from hypothesis import strategies as st
from support.harness import DONE, FULL, delta, finish, random_key

from proxy.chat import sse as module
from proxy.chat.sse import BOM, HOLD, Ending, Events, KeyEcho, data_of, is_plain, usage_of
from proxy.telemetry.records import MOST_TOKENS, Usage

tuning = tuned(max_examples=3000 if FULL else 200, deadline=None)

KEY = random_key().encode()
SMALL = 512  # bytes: the hold of tests that pass it in many ways


def chunk(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt: object, completion: object) -> bytes:
    return chunk(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


def fed(parts: Iterable[bytes], choices: int = 1, key: bytes = KEY) -> tuple[Events, bytes]:
    """A scanner that got these parts, and what it let out."""
    events = Events(key, choices)
    return events, b"".join([events.feed(part) for part in parts])


def ending(stream: bytes, choices: int = 1) -> Ending:
    return fed([stream], choices)[0].ending


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def cut_at(data: bytes, places: Iterable[int]) -> list[bytes]:
    ends = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[start:end] for start, end in pairwise(ends)]


# ---- another reading of the standard, to compare with ---------------------------------------------------------------


@dataclass
class Noted:
    """What a stream says, by WHATWG HTML section 9.2.6 and the json module, one line at a time."""

    count: int = 0
    done: bool = False
    failed: bool = False
    finished: set[int | None] = field(default_factory=set)
    usage: Usage | None = None

    def event(self, lines: list[bytes]) -> None:
        data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
        data += [b"" for line in lines if line == b"data"]
        if not data:
            return
        self.count += 1
        text = b"\n".join(data)
        if text.strip() == b"[DONE]":
            self.done = True
            return
        try:
            self.chunk(json.loads(text))
        except (ValueError, AttributeError):
            return

    def chunk(self, said: Any) -> None:
        self.failed |= bool(said.get("error"))
        self.finished |= {choice.get("index", 0) for choice in said.get("choices") or () if says_why(choice)}
        found = said.get("usage")
        if isinstance(found, dict):
            numbers = [found.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
            if all(type(number) is int and 0 <= number <= MOST_TOKENS for number in numbers) and numbers[0]:
                self.usage = Usage(*numbers)


def says_why(choice: Any) -> bool:
    return choice.get("finish_reason") not in (None, "", "null")


def read(stream: bytes) -> tuple[Noted, int, int]:
    """What the stream says; where its last event with a line in it ends; where its last blank line does."""
    noted, lines, event_end, blank_end, start, place = Noted(), list[bytes](), 0, 0, 0, 0
    while place < len(stream):
        if stream[place] not in b"\r\n":
            place += 1
            continue
        line = stream[start:place]
        place += 2 if stream[place : place + 2] == b"\r\n" else 1
        if line:
            lines.append(line if start else line.removeprefix(BOM))
        else:
            event_end = place if lines else event_end
            blank_end = place
            noted.event(lines)
            lines = []
        start = place
    return noted, event_end, blank_end


def assert_same(events: Events, noted: Noted) -> None:
    seen = Noted(events.count, events.done, events.failed, events.finished, events.usage)
    assert seen == noted


# ---- streams of every kind ------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
tokens = st.sampled_from([0, 1, 7, 4096, -1, 1.5, None, "3", MOST_TOKENS, MOST_TOKENS + 1])
choices = st.fixed_dictionaries(
    {"delta": st.fixed_dictionaries({"content": texts})},
    optional={
        "index": st.sampled_from([0, 1, 2, None]),
        "finish_reason": st.sampled_from([None, "", "null", "stop", "length"]),
    },
)
chunks = st.fixed_dictionaries(
    {"id": texts},
    optional={
        "choices": st.none() | st.lists(choices, max_size=2),
        "usage": st.none() | st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens", "x"]), tokens),
        "error": st.sampled_from([None, {}, "", "no", {"message": "broken"}]),
    },
)


@st.composite
def spelled(draw: st.DrawFn) -> str:
    """JSON text as no encoder would write it: blanks anywhere between the tokens, letters of strings escaped."""
    value = draw(chunks)
    blank = st.sampled_from(["", "", "", " ", "\t", "  ", "\n"])
    written = []
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+', json.dumps(value, ensure_ascii=False)):
        if token.startswith('"') and len(token) > 2 and draw(st.integers(0, 9)) == 0:
            place = draw(st.integers(1, len(token) - 2))
            if token[place].isascii() and token[place] not in '"\\':
                token = f"{token[:place]}\\u{ord(token[place]):04x}{token[place + 1 :]}"
        written += [draw(blank), token]
    return "".join(written)


@st.composite
def data_lines(draw: st.DrawFn) -> list[bytes]:
    text = draw(st.one_of(spelled(), chunks.map(json.dumps), st.just("[DONE]"), texts.filter(str.isprintable)))
    colon = draw(st.sampled_from([b"data: ", b"data: ", b"data:"]))
    return [colon + line.encode() for line in text.split("\n")]


def event_of(lines: list[bytes]) -> bytes:
    return b"".join([line + b"\n" for line in lines]) + b"\n"


other_lines = st.sampled_from(
    [b": comment", b":", b"event: message", b"id: 1", b"retry: 10", b"data", b"datas: x", b"x"]
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Events of all sorts with line ends of all sorts, now and then with an unfinished one at the end."""
    usual = draw(st.sampled_from([b"\n", b"\r\n", b"\r", None]))
    line_end = st.sampled_from([b"\n", b"\r\n", b"\r"]) if usual is None else st.just(usual)
    parts = [draw(st.sampled_from([b"", b"", BOM]))]
    for lines in draw(st.lists(st.one_of(data_lines(), data_lines(), st.lists(other_lines, max_size=3)), max_size=6)):
        shuffled = draw(st.permutations([*lines, *draw(st.lists(other_lines, max_size=1))])) if lines[1:] else lines
        parts += [piece for line in shuffled for piece in (line, draw(line_end))]
        parts.append(draw(line_end))
    parts.append(draw(st.sampled_from([b"", b"", b"data: {", b"data: [DONE]", b"\r", b"\n"])))
    return b"".join(parts)


@tuning
@given(streams(), st.lists(st.integers(0, 400), max_size=12))
@example(b"data: {\r\ndata: [DONE]\r\n\r\n", [])  # CR LF is one line end: these are two lines of one event
@example(b'data: {"choices":[{"finish_reason":\r\ndata: "stop"}]}\r\n\r\n', [])
@example(b"data: x\n\nevent: ping\n\n: c\n\ndata: y\n\n", [])
@example(b"data: x\r\n\r\ndata: y\r\n\r\n", [11])  # between the CR and the LF of the blank line
@example(b"data: x\n\n\n\ndata: y\n\n", [])
@example(b"data: x\r\rdata: y\n\n", [])
def test_no_split_changes_a_byte_or_a_note(stream: bytes, places: list[int]) -> None:
    """Whole, byte by byte and cut at random, a stream comes out as it went in, and is read as the standard says."""
    noted, *_ = read(stream)
    for parts in ([stream], one_by_one(stream), cut_at(stream, places)):
        events, out = fed(parts)
        assert out + events.rest() == stream
        assert_same(events, noted)


@tuning
@given(streams(), st.lists(st.integers(0, 400), max_size=12))
def test_only_whole_events_come_out_and_at_once(stream: bytes, places: list[int]) -> None:
    """After each part exactly the events that are complete by then are out, never a part of one."""
    events, came, out, starts = Events(KEY), b"", b"", set[int]()
    for part in cut_at(stream, places):
        starts.add(len(came))
        came += part
        out += events.feed(part)
        _, event_end, _ = read(came)
        _, _, blank_end = read(out)
        assert len(out) >= event_end - (event_end - 1 in starts)  # the LF of a CR LF that came after the rest had gone
        assert len(out) == blank_end


FINISHES = b'"},"finish_reason":"stop"},{"index":1,"delta":{"content":"'
RAW = (  # what may stand between the quotes of a content, or end them
    *(b"a", b" ", "ሰ".encode(), b"\\n", b"\\u0022", b"\\", b"\\\\", b'\\"', b"[DONE]"),
    *(b'"', b'"error"', b"\n", b"\r", b'","role":"assistant'),
    *(FINISHES, b'"},"finish_reason":null},{"delta":{"content":"', b'"}}],"error":"no","x":[{"y":{"content":"'),
    *(b"\n\ndata: [DONE]\n\ndata: x", b"\r\rdata: [DONE]\r\rdata: x", b"\n\n", b"\r\r"),
)
contents = st.lists(st.sampled_from(RAW), max_size=3).map(b"".join)


@tuning
@given(
    st.lists(
        st.one_of(contents.map(lambda raw: delta("@").replace(b"@", raw)), data_lines().map(event_of)), max_size=30
    )
)
@example([delta("a"), delta("b"), delta("c").replace(b"null", b'"stop"')])
@example([delta("a"), delta("@").replace(b"@", FINISHES), delta("c")])
@example([delta("a"), delta("@").replace(b"@", b"\n\ndata: [DONE]\n\ndata: x")])
@example([delta("a"), delta("@").replace(b"@", b"\r\rdata: [DONE]\r\rdata: x")])
@example([delta("a"), delta("a") + DONE, delta("a") + finish()])
def test_events_that_look_like_those_before(parts: list[bytes]) -> None:
    """A long row of events that differ in their content only is read as each of them alone would be."""
    events, out = fed(parts)
    assert out + events.rest() == b"".join(parts)
    assert_same(events, read(b"".join(parts))[0])


@tuning
@given(spelled())
def test_what_is_plain_says_nothing(text: str) -> None:
    """No spelling of an end, an error or a usage is taken for an ordinary event, whatever its blanks and escapes."""
    out = b"".join(b"data: %b\n" % line.encode() for line in text.split("\n")) + b"\n"
    if is_plain(out):
        assert read(out)[0] == Noted(count=1)


@pytest.mark.parametrize(
    "out",
    [
        delta("hello"),
        delta("hello") * 3,
        delta("ሰላም") + b"data: x\nid: 7\n\n",
        delta('"error" [DONE').replace(b'"finish_reason":null', b'"finish_reason": null'),
    ],
)
def test_ordinary_events_are_plain(out: bytes) -> None:
    """What a model sends for nearly every token is searched, not parsed."""
    assert is_plain(out)


NOT_PLAIN = {
    "the end": DONE,
    "a finish reason": finish(),
    "with blanks around it": finish().replace(b'"finish_reason":', b'"finish_reason" :\t'),
    "in two spellings": delta("a") + delta("b").replace(b":null", b": null"),
    "with an escaped letter": finish().replace(b"_reason", b"\\u005freason"),
    "an error": chunk(error={"message": "no"}),
    "a usage": usage(1, 2),
    "CR LF": delta("a").replace(b"\n", b"\r\n"),
    "CR": b"data: x\r\rdata: y\n\n",
    "a comment": b": hello\n\n",
    "an event without data among others": delta("a") + b"event: ping\n\n" + delta("b"),
    "a blank line too many": delta("a") + b"\n\n",
    "a byte order mark": BOM + delta("a"),
}


@pytest.mark.parametrize("out", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_a_search_cannot_rule_out_is_not_plain(out: bytes) -> None:
    """Anything beside an ordinary token is parsed."""
    assert not is_plain(out)


# ---- the end --------------------------------------------------------------------------------------------------------

ENDINGS = {
    "nothing": (b"", Ending.OPEN),
    "tokens": (delta("a") + delta("b"), Ending.OPEN),
    "[DONE]": (delta("a") + DONE, Ending.COMPLETE),
    "[DONE] without the blank": (b"data:[DONE]\n\n", Ending.COMPLETE),
    "[DONE] behind an event name": (b"event: end\ndata: [DONE]\n\n", Ending.COMPLETE),
    "[DONE] that is not whole": (b"data: [DONE]\n", Ending.OPEN),
    "[DONE] in a comment": (b": [DONE]\n\n", Ending.OPEN),
    "[DONE] in an answer": (delta("[DONE]"), Ending.OPEN),
    "[DONE] as a line among others": (b"data: {\ndata: [DONE]\n\n", Ending.OPEN),
    "finish_reason": (finish(), Ending.COMPLETE),
    "finish_reason length": (finish("length"), Ending.COMPLETE),
    "finish_reason and a usage": (finish() + usage(3, 4), Ending.COMPLETE),
    "an empty finish_reason": (delta("a").replace(b":null", b':""'), Ending.OPEN),
    "a finish_reason that says null": (delta("a").replace(b":null", b':"null"'), Ending.OPEN),
    "a finish_reason in the text": (delta('"finish_reason":"stop"'), Ending.OPEN),
    "finish_reason without an index": (chunk(choices=[{"finish_reason": "stop"}]), Ending.COMPLETE),
    "finish_reason with the index null": (chunk(choices=[{"index": None, "finish_reason": "stop"}]), Ending.COMPLETE),
    "finish_reason beside a strange usage": (chunk(choices=[{"finish_reason": "stop"}], usage=[1]), Ending.COMPLETE),
    "an error": (delta("a") + chunk(error={"message": "overloaded", "code": None}), Ending.ERROR),
    "an error that is a text": (chunk(error="overloaded"), Ending.ERROR),
    "an error whose choices are null": (chunk(choices=None, error={"message": "no"}), Ending.ERROR),
    "an error, then [DONE]": (chunk(error={"message": "no"}) + DONE, Ending.ERROR),
    "error: null": (chunk(error=None), Ending.OPEN),
    "error: {}": (chunk(error={}), Ending.OPEN),
    "an error in the text": (delta('"error"'), Ending.OPEN),
    "no JSON": (b"data: {finish_reason: stop}\n\n", Ending.OPEN),
    "a list": (b'data: ["finish_reason","stop"]\n\n', Ending.OPEN),
    "bytes that are not UTF-8": (finish().replace(b'"delta":{}', b'"delta":"\xff"'), Ending.COMPLETE),
    "JSON that is too deep": (b'data: {"error":' + b"[" * 5000 + b"]" * 5000 + b"}\n\n", Ending.OPEN),
}


@pytest.mark.parametrize(("stream", "expected"), ENDINGS.values(), ids=ENDINGS)
def test_ending(stream: bytes, expected: Ending) -> None:
    """Complete or failed is a stream that says so in one of the ways its clients understand; in doubt it is open."""
    assert ending(stream) is expected
    assert fed(one_by_one(stream))[0].ending is expected


def test_every_choice_must_finish() -> None:
    """With n choices a finish_reason ends one of them; [DONE] ends all."""
    assert ending(finish(index=0), choices=2) is Ending.OPEN
    assert ending(finish(index=0) + finish(index=0), choices=2) is Ending.OPEN
    assert ending(finish(index=0) + finish(index=1), choices=2) is Ending.COMPLETE
    assert ending(finish(index=1) + DONE, choices=2) is Ending.COMPLETE


# ---- usage ----------------------------------------------------------------------------------------------------------

USAGES: dict[str, tuple[Any, Usage | None]] = {
    "a usage": ({"prompt_tokens": 12, "completion_tokens": 30, "total_tokens": 42}, Usage(12, 30)),
    "the prompt alone": ({"prompt_tokens": 12}, Usage(12, 0)),
    "with details": ({"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"x": 1}}, Usage(1, 2)),
    "null": (None, None),
    "empty": ({}, None),
    "the total alone": ({"total_tokens": 42}, None),
    "no prompt": ({"prompt_tokens": 0, "completion_tokens": 5}, None),
    "less than nothing": ({"prompt_tokens": -1000, "completion_tokens": 1}, None),
    "less than no answer": ({"prompt_tokens": 10, "completion_tokens": -1000}, None),
    "more than there is": ({"prompt_tokens": 10**400, "completion_tokens": 1}, None),
    "a broken number": ({"prompt_tokens": 1.5, "completion_tokens": 1}, None),
    "a text": ({"prompt_tokens": "12", "completion_tokens": 1}, None),
    "true": ({"prompt_tokens": True, "completion_tokens": 1}, None),
    "a list": ([1, 2], None),
}


@pytest.mark.parametrize(("said", "expected"), USAGES.values(), ids=USAGES)
def test_usage_is_believed_when_it_can_be(said: Any, expected: Usage | None) -> None:
    """Only whole numbers that an answer can have are settled; a made-up usage neither refunds nor floods an account."""
    assert fed([chunk(choices=[], usage=said)])[0].usage == expected
    assert usage_of(json.dumps({"choices": [{"index": 0, "message": {}}], "usage": said}).encode()) == expected


def test_last_usage_counts() -> None:
    """Upstreams that tell it as they go are settled by what they said last; null does not take it back."""
    stream = usage(5, 1) + usage(5, 9) + chunk(choices=[], usage=None) + chunk(choices=[], usage={"prompt_tokens": -1})
    assert fed([stream])[0].usage == Usage(5, 9)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"usage":{"prompt_tokens":1}', b"\xff\xfe", b"[" * 100_000])
def test_usage_of_what_cannot_be_read(body: bytes) -> None:
    """An answer that is not a chat.completion has no usage."""
    assert usage_of(body) is None


def test_data_of() -> None:
    """The standard's own examples: lines joined, one blank dropped, comments and other fields left out."""
    assert data_of(b"data: YHOO\ndata: +2\ndata: 10") == b"YHOO\n+2\n10"
    assert data_of(b"data:  two blanks") == b" two blanks"
    assert data_of(b"data\r\ndata") == b"\n"
    assert data_of(b": a comment") is None
    assert data_of(b"event: x\rid: 1") is None


# ---- the hold -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 16_384, 65_536, 262_144])
def test_an_event_without_end_is_not_held_without_end(size: int) -> None:
    """Of an event of a megabyte at most HOLD bytes and one part more are held; it comes out as it went in."""
    stream = b"data: " + b"x" * 1_000_000 + b"\n\n" + DONE
    events, came, gone, out = Events(KEY), 0, 0, []
    for start in range(0, len(stream), size):
        part = stream[start : start + size]
        out.append(events.feed(part))
        came, gone = came + len(part), gone + len(out[-1])
        assert came - gone <= HOLD + size
    assert b"".join(out) == stream
    assert events.count == 2
    assert events.done


def test_an_event_is_held_up_to_its_bound() -> None:
    """Nothing of an unfinished event comes out before there are more than HOLD bytes of it."""
    events = Events(KEY)
    went_out = [(bool(events.feed(part)), events.partial) for part in (b"x" * HOLD, b"x", b"\n\n")]
    assert went_out == [(False, False), (True, True), (True, False)]


@tuning
@given(
    st.integers(0, 3 * SMALL),
    st.lists(st.integers(0, 4 * SMALL), max_size=40),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
)
def test_an_event_passed_on_early_is_counted_and_not_read(size: int, places: list[int], line_end: bytes) -> None:
    """However it was cut, a long event changes no byte; when a part of it went out early it says nothing any more."""
    said = chunk(choices=[{"delta": "x" * size, "finish_reason": "stop"}]).rstrip() + line_end * 2
    stream = b"data: 1" + line_end * 2 + said + b"data: 2" + line_end * 2
    with patch.object(module, "HOLD", SMALL):
        events, early = Events(KEY), False
        out = b""
        for part in cut_at(stream, places):
            out += events.feed(part)
            early |= events.partial
        assert out + events.rest() == stream
        assert events.count == 3
        assert events.finished == (set() if early else {0})


def test_an_event_passed_on_early_does_not_end_the_stream() -> None:
    """What is left of it when it ends is no event, even if its last line reads like one."""
    events, _ = fed([b"data: " + b"x" * HOLD, b"xxx\ndata: [DONE]", b"\n\n"])
    assert (events.count, events.done) == (1, False)


# ---- our key --------------------------------------------------------------------------------------------------------


def leak(parts: Iterable[bytes]) -> bytes:
    """What came out before the key was found. Fails when it was not."""
    events, out = Events(KEY), b""
    try:
        for part in parts:
            out += events.feed(part)
    except KeyEcho as echo:
        return out + echo.safe
    pytest.fail("the key passed")


ECHO = delta("you are " + KEY.decode() + ", hello")


def test_key_in_one_part() -> None:
    """The whole events before the key are safe; its event and all behind it are not."""
    assert leak([delta("a") + delta("b") + ECHO + delta("c")]) == delta("a") + delta("b")
    assert leak([ECHO]) == b""


@pytest.mark.parametrize("place", range(1, len(ECHO)))
def test_key_in_two_parts(place: int) -> None:
    """Wherever the event is cut, nothing of it comes out, and all before it does."""
    assert leak([delta("a") + ECHO[:place], ECHO[place:]]) == delta("a")


@pytest.mark.parametrize("parts", [one_by_one(delta("a") + ECHO), [delta("a"), *one_by_one(ECHO)]])
def test_key_byte_by_byte(parts: list[bytes]) -> None:
    """So does a key that trickles in."""
    assert leak(parts) == delta("a")


@pytest.mark.parametrize(
    "key",
    [KEY, b'sk-"-' + KEY, b'"' + KEY, KEY + b'"', b"\\" + KEY],
    ids=["plain", "a quote within", "a quote before", "a quote behind", "a backslash before"],
)
def test_key_after_many_ordinary_events(key: bytes) -> None:
    """The thousandth event of its kind is searched like the first, whatever letters the key has."""
    before, after = delta("@").split(b"@")
    events, out = fed([delta("a")] * 1000, key=key)
    assert out == delta("a") * 1000
    for echo in (key, b"x" + key + b"x", key.removeprefix(b'"'), key.removesuffix(b'"')):
        if key in before + echo + after:
            with pytest.raises(KeyEcho):
                events.feed(before + echo + after)
    assert events.count == 1000


@pytest.mark.parametrize(
    "echo",
    [b": " + KEY, b"event: " + KEY, b"id: " + KEY, KEY, b"data: [DONE]\ndata: " + KEY],
    ids=["comment", "event", "id", "no field", "behind the end"],
)
def test_key_anywhere_in_an_event(echo: bytes) -> None:
    """Comments, names and unknown fields are searched like data."""
    assert leak([delta("a") + echo + b"\n\n"]) == delta("a")


@tuning
@given(
    st.integers(0, 4 * SMALL),
    st.integers(0, 2 * SMALL),
    st.lists(st.integers(0, 7 * SMALL), max_size=60),
    st.sampled_from([b"", b"\n\n", b'"}\n\n' + DONE]),
)
def test_key_in_an_event_passed_on_early(before: int, after: int, places: list[int], end: bytes) -> None:
    """In a long event, too, no letter of the key comes out, wherever it stands and however it is cut."""
    stream = delta("a") + b"data: " + b"." * before + KEY + b"." * after + end
    with patch.object(module, "HOLD", SMALL):
        events, out = Events(KEY), b""
        try:
            for part in cut_at(stream, places):
                out += events.feed(part)
            out += events.rest()
        except KeyEcho as echo:
            out += echo.safe
        else:
            pytest.fail("the key passed")
    assert set(out.removeprefix(delta("a"))) <= set(b"data: .")
    assert out.startswith(delta("a"))


@pytest.mark.parametrize("place", range(1, len(KEY)))
def test_key_cut_where_a_part_goes_out_early(place: int) -> None:
    """The part of a long event that goes out early ends before the first letter of the key."""
    early = delta("a") + b"data: " + b"." * HOLD
    safe = early[: len(early) + place - len(KEY) + 1]
    assert leak([early + KEY[:place], KEY[place:] + b"\n\n"]) == safe
    assert leak([early, KEY[:place], KEY[place:]]) == safe


def test_key_after_the_last_whole_event() -> None:
    """What is held when a stream ends well is searched before it is let go."""
    events, out = fed([finish() + b": " + KEY])
    assert out == finish()
    with pytest.raises(KeyEcho) as caught:
        events.rest()
    assert caught.value.safe == b""


def test_safe_events_are_noted() -> None:
    """What came before the key is counted, once."""
    events = Events(KEY)
    with pytest.raises(KeyEcho):
        events.feed(delta("a") + usage(3, 4) + ECHO)
    assert events.count == 2
    assert events.usage == Usage(3, 4)


def test_pieces_of_the_key_may_pass() -> None:
    """Only the exact key is the alarm: an answer may well hold a few letters of it."""
    stream = delta(KEY.decode()[:-1]) + delta(KEY.decode()[1:])
    assert fed([stream])[1] == stream
