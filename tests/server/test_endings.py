"""How a stream ends: rows 5 to 11 and 20 to 23 of the fault table through the real server, every column of each.

`play` is one row: it runs the fault and checks the client's response, the calls at the upstream, the settled tokens,
the log line, and that nothing is left. At the end of each server the harness checks that the key appeared nowhere.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count as counting
from typing import Any, SupportsIndex

import pytest
from support.faults import fault, numbered
from support.harness import (
    DONE,
    LOOPS,
    PATIENCE,
    Peer,
    Reply,
    Running,
    ScriptedUpstream,
    chat,
    chat_request,
    chunks,
    connect,
    delta,
    eventually,
    finish,
    raw_chat,
    read_until,
    running,
    streaming,
)
from support.stage import Act, Stage, always, prompt_tokens

from proxy.chat.sse import BOM, HOLD

IDLE = "0.4"  # seconds of idle_timeout in tests that wait for it
SOON = 10.0  # seconds for an answer that waits for no more than an idle_timeout or the last packet
RACE = 0.05  # seconds: so that a reset does not overtake the bytes before it
MEGABYTE = 1 << 20

both_loops = pytest.mark.parametrize("loop", LOOPS)

EARLY = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":0}}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":11,"total_tokens":18}}\n\n'
ERROR = b'data: {"error":{"message":"Overloaded","type":"server_error","param":null,"code":"overloaded"}}\n\n'


def appended(reply: Reply, whole: bytes) -> str:
    """The code of the one event that the proxy appends to the `whole` ones of the upstream. Fails for anything else."""
    assert reply.body.startswith(whole)
    event = reply.body.removeprefix(whole)
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    error = json.loads(event.removeprefix(b"data: "))["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"].startswith("The answer ")
    assert (error["type"], error["param"]) == ("server_error", None)
    return str(error["code"])


# ---- the ways an upstream stops -------------------------------------------------------------------------------------


async def silent(peer: Peer) -> None:
    await peer.gone()


async def reset(peer: Peer) -> None:
    await asyncio.sleep(RACE)
    peer.reset()


async def cut(peer: Peer) -> None:
    """Closes between two chunks, without the last one."""
    peer.writer.close()


async def cut_in_a_chunk(peer: Peer) -> None:
    await peer.send(b"40\r\ndata: ")
    peer.writer.close()


async def bad_framing(peer: Peer) -> None:
    await peer.send(b"zz\r\n")
    await peer.gone()


async def bad_chunk_end(peer: Peer) -> None:
    await peer.send(b"1\r\nxyz")
    await peer.gone()


async def clean(peer: Peer) -> None:
    """Sends the last chunk; the connection can serve another request."""
    await peer.end()


def stopping(stop: Act, *parts: bytes) -> Act:
    """Sends each part as a chunk of its own, then calls `stop`."""

    async def act(peer: Peer) -> None:
        await peer.head()
        for part in parts:
            await peer.chunk(part)
        await stop(peer)

    return act


def until_eof(stop: Act, *parts: bytes) -> Act:
    """Like `stopping`, with a body that ends with the connection."""

    async def act(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(parts))
        await stop(peer)

    return act


# ---- one row --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A fault and its expected effects. `used` is None for the estimate: the prompt and the events."""

    act: Act
    whole: bytes  # the upstream's bytes that the client gets
    code: str | None  # of the event that the proxy appends
    ending: str
    used: int | None = None
    events: int = 1
    reused: bool = False  # the upstream's connection serves the next request
    fields: dict[str, Any] = field(default_factory=dict)
    at_least: float = 0.0  # seconds


def play(stage: Stage, row: Row) -> Reply:
    proxy = stage.proxy
    began, used_before = time.monotonic(), proxy.tokens_used()
    reply, line, calls = stage.chat(row.act, **row.fields)
    took = time.monotonic() - began

    assert (reply.status, reply.cut) == (200, False)
    if row.code is None:
        assert reply.body == row.whole
    else:
        assert appended(reply, row.whole) == row.code
        assert b"[DONE]" not in reply.body
    assert row.at_least <= took < SOON

    assert calls == 1, "nothing is retried once an answer has begun"
    eventually(lambda: stage.upstream.open == row.reused)
    proxy.assert_nothing_left()

    assert (line["status"], line["code"], line["ending"]) == (200, row.code, row.ending)
    assert (line["events"], line["bytes"]) == (row.events, len(reply.body))
    used = prompt_tokens(proxy, **row.fields) + row.events if row.used is None else row.used
    assert line["tokens"] == used
    assert stage.settled(used_before) == {"tokens_per_session": used, "tokens_per_address": used}
    return reply


@pytest.fixture(scope="module", params=LOOPS)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(request.param, POLICY_ALLOW="n,stream_options", UPSTREAM_IDLE_TIMEOUT=IDLE).open() as stage:
        yield stage


HALF = delta("half")

BROKEN = {
    "5 silent": Row(stopping(silent, HALF), HALF, "stream_timeout", "timeout", at_least=float(IDLE)),
    "5 silent at once": Row(stopping(silent), b"", "stream_timeout", "timeout", events=0),
    "5 silent within an event": Row(
        stopping(silent, HALF, b"data: {"), HALF, "stream_timeout", "timeout"
    ),
    "6 reset": Row(stopping(reset, HALF), HALF, "stream_interrupted", "truncated"),
    "6 reset at once": Row(stopping(reset), b"", "stream_interrupted", "truncated", events=0),
    "6 reset after an early usage": Row(
        stopping(reset, EARLY, HALF, HALF), EARLY + HALF * 2, "stream_interrupted", "truncated", 7 + 3, 3
    ),
    "6 reset after a usage so far": Row(
        stopping(reset, HALF, USAGE), HALF + USAGE, "stream_interrupted", "truncated", 18, 2
    ),
    "7 cut between chunks": Row(stopping(cut, HALF, HALF), HALF * 2, "stream_interrupted", "truncated", events=2),
    "7 cut in a chunk": Row(stopping(cut_in_a_chunk, HALF), HALF, "stream_interrupted", "truncated"),
    "7 no chunk size": Row(stopping(bad_framing, HALF), HALF, "stream_interrupted", "truncated"),
    "7 a chunk too long": Row(stopping(bad_chunk_end, HALF), HALF, "stream_interrupted", "truncated"),
    "8 dies inside an event": Row(stopping(cut, HALF, b'data: {"cho'), HALF, "stream_interrupted", "truncated"),
    "8 reset inside an event": Row(stopping(reset, HALF, b'data: {"cho'), HALF, "stream_interrupted", "truncated"),
    "8 inside its blank line": Row(stopping(cut, HALF, HALF[:-1]), HALF, "stream_interrupted", "truncated"),
    "8 inside [DONE]": Row(stopping(cut, HALF, DONE[:-1]), HALF, "stream_interrupted", "truncated"),
    "9 clean end": Row(stopping(clean, HALF), HALF, "stream_interrupted", "truncated", reused=True),
    "9 clean end of nothing": Row(stopping(clean), b"", "stream_interrupted", "truncated", events=0, reused=True),
    "9 with a tail": Row(stopping(clean, HALF, b"data: x"), HALF, "stream_interrupted", "truncated", reused=True),
    "9 without framing": Row(until_eof(cut, HALF), HALF, "stream_interrupted", "truncated"),
    "9 an empty finish_reason": Row(
        stopping(clean, finish("")), finish(""), "stream_interrupted", "truncated", reused=True
    ),
    "9 one of two choices": Row(
        stopping(clean, HALF, finish(index=1)), HALF + finish(index=1), "stream_interrupted", "truncated", events=2,
        reused=True, fields={"n": 2},
    ),
}  # fmt: skip

WHOLE = {
    "10 finish_reason": Row(stopping(clean, HALF, finish()), HALF + finish(), None, "complete", events=2, reused=True),
    "10 with a usage": Row(
        stopping(clean, HALF, finish(), USAGE), HALF + finish() + USAGE, None, "complete", 18, 3, reused=True
    ),
    "10 without framing": Row(until_eof(cut, HALF, finish()), HALF + finish(), None, "complete", events=2),
    "10 cut": Row(stopping(cut, HALF, finish()), HALF + finish(), None, "complete", events=2),
    "10 reset": Row(stopping(reset, HALF, finish()), HALF + finish(), None, "complete", events=2),
    "10 silent": Row(stopping(silent, finish()), finish(), None, "complete", at_least=float(IDLE)),
    "10 unterminated": Row(
        stopping(clean, finish(), b"data: [DONE]"), finish() + b"data: [DONE]", None, "complete", reused=True
    ),
    "10 both choices": Row(
        stopping(clean, finish(index=1), finish(index=0)), finish(index=1) + finish(index=0), None, "complete",
        events=2, reused=True, fields={"n": 2},
    ),
    "[DONE] for two choices": Row(
        stopping(clean, finish(index=1), DONE), finish(index=1) + DONE, None, "complete", events=2, reused=True,
        fields={"n": 2},
    ),
    "[DONE] then clean": Row(stopping(clean, HALF, DONE), HALF + DONE, None, "complete", events=2, reused=True),
    "[DONE] then reset": Row(stopping(reset, HALF, DONE), HALF + DONE, None, "complete", events=2),
    "[DONE] then cut": Row(stopping(cut, HALF, DONE), HALF + DONE, None, "complete", events=2),
    "[DONE] then bad framing": Row(stopping(bad_framing, HALF, DONE), HALF + DONE, None, "complete", events=2),
    "11 error event": Row(stopping(clean, HALF, ERROR), HALF + ERROR, None, "error", events=2, reused=True),
    "11 error event, [DONE]": Row(
        stopping(clean, HALF, ERROR, DONE), HALF + ERROR + DONE, None, "error", events=3, reused=True
    ),
    "11 error event, reset": Row(stopping(reset, HALF, ERROR), HALF + ERROR, None, "error", events=2),
    "11 error event, silent": Row(stopping(silent, ERROR), ERROR, None, "error"),
}  # fmt: skip


@pytest.mark.parametrize("row", numbered(BROKEN))
def test_a_broken_answer_never_looks_whole(row: Row, stage: Stage) -> None:
    """Rows 5 to 9: whole events, our event, the end; no tail, no [DONE], no second call; the estimate is charged."""
    play(stage, row)


@pytest.mark.parametrize("row", numbered(WHOLE))
def test_an_answer_that_ended_is_left_as_it_is(row: Row, stage: Stage) -> None:
    """Rows 10 and 11: nothing is appended to a stream that signalled its end, whatever happens to the socket then."""
    play(stage, row)


def test_a_broken_connection_is_not_used_again(stage: Stage) -> None:
    """Row 7: after bad framing the next request opens a new connection; after a clean end it reuses the old one."""
    before = stage.upstream.connections
    for act in (stopping(clean, finish()), stopping(clean, HALF), stopping(bad_framing, finish())):
        stage.chat(act)
    assert stage.upstream.connections <= before + 1
    stage.chat(stopping(clean, finish()))
    assert stage.upstream.connections <= before + 2
    assert stage.upstream.open == 1


def test_an_event_that_went_out_early_is_closed_before_ours(stage: Stage) -> None:
    """A blank line separates a broken event of over 64 KiB from our event, so that a client can parse ours."""
    start = b"data: " + b"x" * (HOLD + 50_000)
    reply, line, _ = stage.chat(stopping(cut, HALF, start))
    broken, ours = reply.body.removeprefix(HALF).split(b"\n\n", 1)
    assert start.startswith(broken)
    assert len(broken) > HOLD
    assert appended(Reply(200, reply.headers, ours), b"") == "stream_interrupted"
    assert line["ending"] == "truncated"


# ---- row 20: what does not pass -------------------------------------------------------------------------------------

NEVER = (
    *("set-cookie: a=b", "content-security-policy: script-src *", "access-control-allow-origin: *"),
    *('clear-site-data: "*"', "link: </x>; rel=preload", "x-request-id: theirs", "server: theirs", "x-other: 1"),
    *("refresh: 0; url=http://example.org", "content-disposition: attachment", "retry-after: 5", "age: 4"),
)
OURS = {
    *("content-type", "cache-control", "x-accel-buffering", "x-content-type-options", "x-request-id"),
    *("content-security-policy", "ratelimit", "ratelimit-policy", "set-cookie", "transfer-encoding", "date"),
}


@fault(20)
def test_nothing_but_the_events_passes(stage: Stage) -> None:
    """Row 20: the browser gets the whole stream, but none of the upstream's headers, interim answers and trailers."""

    async def act(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n")
        await peer.head("200 OK", "text/event-stream", "trailer: set-cookie", *NEVER)
        for part in (HALF, finish(), USAGE, DONE):
            await peer.chunk(part)
        await peer.send(b"0\r\nset-cookie: late=1\r\nx-late: 1\r\n\r\n")

    del stage.proxy.sent[:]
    reply = play(stage, Row(act, HALF + finish() + USAGE + DONE, None, "complete", 18, 4, reused=True))
    assert {name.lower() for name in reply.headers} == OURS
    assert [value.partition("=")[0] for value in reply.headers.get_all("set-cookie") or []] == ["chat"]
    assert reply.headers["content-security-policy"] == "default-src 'none'"
    for name in (b"early", b"hints", b"style.css", b"late", b"x-other", b"theirs"):
        assert name not in stage.proxy.sent.lower()


# ---- row 21: what passes, byte for byte -----------------------------------------------------------------------------


def in_line_ends(line_end: bytes) -> bytes:
    """A stream with everything that the standard allows and a usage, in these line ends."""
    said = [BOM + b": hello", b"", delta("ሰላም 👋 ÄÖ").rstrip(), b"", b"event: message", b"id: 7"]
    said += [b'data: {"choices":[],', b'data: "x":1}', b"", b"retry: 100", b"", b":", b"", b"unknown", b""]
    said += [finish().rstrip(), b"", USAGE.rstrip(), b"", b"data:[DONE]", b"", b""]
    return line_end.join(said)


@fault(21)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_every_byte_passes(size: int, line_end: bytes, stage: Stage) -> None:
    """Row 21: byte order mark, comments, UTF-8 and line ends arrive unchanged, wherever the chunks are cut."""
    stream = in_line_ends(line_end)
    parts = [stream[i : i + size] for i in range(0, len(stream), size)]
    play(stage, Row(stopping(clean, *parts), stream, None, "complete", 18, 5, reused=True))


def test_each_event_passes_at_once(stage: Stage) -> None:
    """Each event reaches the browser before the upstream sends the next one; half an event does not."""
    got = threading.Semaphore(0)

    async def act(peer: Peer) -> None:
        await peer.head()
        for number in range(20):
            event = delta(str(number))
            await peer.chunk(event[:20])
            await peer.chunk(event[20:] + event[:-1])
            assert await asyncio.to_thread(got.acquire, timeout=PATIENCE)
            await peer.chunk(event[-1:])
            assert await asyncio.to_thread(got.acquire, timeout=PATIENCE)
        await peer.chunk(DONE)
        await peer.end()

    stage.act = act
    with raw_chat(stage.proxy) as sock:
        passed = []
        for data in chunks(sock):
            passed.append(data)
            got.release()
    assert passed[:-1] == [delta(str(number)) for number in range(20) for _ in range(2)]
    assert passed[-1] == DONE


# ---- rows 22 and 23: what has no end --------------------------------------------------------------------------------


class Unkept(bytearray):
    """Discards what the harness would record: the bytes sent to clients would be most of the memory measured."""

    def extend(self, data: Iterable[SupportsIndex], /) -> None:
        pass


def drain(proxy: Running, buffer: bytearray) -> tuple[int, str]:
    """Reads a whole answer in little memory; returns the size and the digest of its body."""
    got, size = hashlib.sha256(), 0
    with raw_chat(proxy) as sock, io.BufferedReader(sock.makefile("rb", buffering=0), len(buffer)) as file:
        while file.readline() != b"\r\n":
            pass
        while left := int(file.readline(), 16):
            size += left
            while left:
                count = file.readinto(memoryview(buffer)[:left])
                got.update(memoryview(buffer)[:count])
                left -= count
            assert file.readline() == b"\r\n"
    return size, got.hexdigest()


def test_a_live_stream_does_not_hold_what_was_asked() -> None:
    """The prompt is freed once an answer has begun: long conversations would be held as long as their answers last."""

    async def script(peer: Peer) -> None:
        seen = await peer.request()
        seen.body = b""
        await peer.head()
        await peer.chunk(HALF)
        await peer.gone()

    with ScriptedUpstream(script) as upstream, running(upstream.base_url, POLICY_MAX_INPUT_CHARS="1000000") as proxy:
        question = chat_request(proxy, messages=[{"role": "user", "content": "x" * 500_000}])
        tracemalloc.start()
        try:
            with connect(proxy) as sock:
                sock.sendall(question)
                read_until(sock, HALF)
                gc.collect()
                held = proxy.on_loop(lambda: tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        assert held < 250_000


@fault(22)
@both_loops
def test_a_huge_event_passes_in_little_memory(loop: str) -> None:
    """Row 22: an event of 10 MB arrives byte for byte; between two reads at most 1 MiB of it is held."""
    part, count = bytes(range(32, 96)) * 256, 640
    stream = b"data: " + part * count + b"\n\n" + DONE
    expected = len(stream), hashlib.sha256(stream).hexdigest()
    script = streaming(b"data: ", *[part] * count, b"\n\n" + DONE)
    held, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            held.append(proxy.on_loop(lambda: tracemalloc.get_traced_memory()[0]))

    with ScriptedUpstream(script) as upstream, running(upstream.base_url, loop=loop) as proxy:
        proxy.sent = Unkept()
        buffer = bytearray(16_384)
        assert drain(proxy, buffer) == expected  # objects that are made once are made now
        gc.collect()
        tracemalloc.start()
        watching = threading.Thread(target=watch)
        watching.start()
        try:
            assert drain(proxy, buffer) == expected
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            over.set()
            watching.join()
            tracemalloc.stop()
        assert max(held) < MEGABYTE
        assert peak < 2 * MEGABYTE  # within one read, by the one live stream
        line = proxy.line(2)
        assert (line["ending"], line["code"], line["events"]) == ("complete", None, 2)
        assert line["bytes"] == len(stream)
        used = prompt_tokens(proxy) + 2
        assert line["tokens"] == used
        assert proxy.tokens_used() == {"tokens_per_session": 2 * used, "tokens_per_address": 2 * used}
        assert len(upstream.seen) == 2


@fault(23)
@both_loops
def test_an_endless_answer_is_ended(loop: str) -> None:
    """Row 23: an endless answer gets our event at total_timeout, and its upstream call ends."""

    async def endless(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        while True:
            await peer.chunk(delta("again"))
            await asyncio.sleep(0.01)

    with (
        ScriptedUpstream(endless) as upstream,
        running(upstream.base_url, loop=loop, UPSTREAM_TOTAL_TIMEOUT="1") as proxy,
    ):
        began = time.monotonic()
        reply = chat(proxy)
        assert 1.0 <= time.monotonic() - began < PATIENCE
        count = reply.body.count(delta("again"))
        assert count > 10
        assert appended(reply, delta("again") * count) == "stream_too_long"
        eventually(lambda: not upstream.open)
        assert len(upstream.seen) == 1
        line = proxy.line()
        assert (line["code"], line["ending"], line["events"]) == ("stream_too_long", "timeout", count)
        used = prompt_tokens(proxy) + count
        assert line["tokens"] == used
        assert proxy.tokens_used() == {"tokens_per_session": used, "tokens_per_address": used}


@both_loops
def test_an_endless_event_is_ended(loop: str) -> None:
    """Bytes that complete no event do not extend a stream beyond total_timeout."""

    async def trickle(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        while True:
            await peer.chunk(b"x")
            await asyncio.sleep(0.01)

    settings = {"UPSTREAM_TOTAL_TIMEOUT": "0.6", "UPSTREAM_IDLE_TIMEOUT": "0.3"}
    with ScriptedUpstream(trickle) as upstream, running(upstream.base_url, loop=loop, **settings) as proxy:
        assert appended(chat(proxy), b"") == "stream_too_long"
        eventually(lambda: not upstream.open)


# ---- many at once ---------------------------------------------------------------------------------------------------


def test_streams_do_not_disturb_each_other() -> None:
    """Each of a hundred concurrent streams, with all endings, gets its own bytes and its own end."""
    turns = counting()
    stops = (clean, cut, reset, bad_framing)

    async def script(peer: Peer) -> None:
        stop = clean
        while stop is clean:
            seen = await peer.request()
            await peer.head()
            for _ in range(5):
                await peer.chunk(delta(seen.json["messages"][0]["content"]))
                await asyncio.sleep(0.01)
            stop = stops[next(turns) % len(stops)]
            await stop(peer)

    def one(number: int) -> None:
        name = f"visitor {number}"
        replies[number] = chat(proxy, messages=[{"role": "user", "content": name}])

    replies: dict[int, Reply] = {}
    with ScriptedUpstream(script) as upstream, running(upstream.base_url) as proxy:
        threads = [threading.Thread(target=one, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(replies) == 100
        for number, reply in replies.items():
            assert appended(reply, delta(f"visitor {number}") * 5) == "stream_interrupted"
        eventually(lambda: len(proxy.lines()) == 100)
        eventually(lambda: upstream.open <= 25)  # connections that ended cleanly may be reused


@both_loops
def test_a_finished_stream_waits_for_no_timeout(loop: str) -> None:
    """An upstream that keeps its socket open after [DONE] is closed, and its browser does not wait for idle_timeout."""
    script = always(stopping(silent, HALF, DONE))
    with ScriptedUpstream(script) as upstream, running(upstream.base_url, loop=loop) as proxy:
        assert proxy.settings.upstream.idle_timeout == 60
        began = time.monotonic()
        assert chat(proxy).body == HALF + DONE
        assert time.monotonic() - began < SOON
        eventually(lambda: not upstream.open)
        assert (proxy.line()["ending"], proxy.line()["code"]) == ("complete", None)


def test_what_comes_after_the_end_passes_too(stage: Stage) -> None:
    """Events that the upstream sends after [DONE] are passed on."""
    late = b": bye\n\n"
    reply, _, _ = stage.chat(stopping(clean, HALF, DONE, late))
    assert reply.body == HALF + DONE + late


def test_the_head_comes_before_the_first_event(stage: Stage) -> None:
    """The browser gets the headers when the upstream has answered, before the first event."""
    go = threading.Event()

    async def act(peer: Peer) -> None:
        await peer.head()
        assert await asyncio.to_thread(go.wait, PATIENCE)
        await peer.chunk(HALF + DONE)
        await peer.end()

    stage.act = act
    with raw_chat(stage.proxy) as sock:
        head = read_until(sock, b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert head.endswith(b"\r\n\r\n")
        go.set()
        assert DONE in read_until(sock, b"0\r\n\r\n")
