"""The client receives exactly the bytes that the upstream sent, in whole events, each without delay.

Through the real server, over real sockets. Hypothesis draws the streams and where they are split.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.harness import (
    DONE,
    LOOPS,
    PATIENCE,
    Peer,
    Running,
    ScriptedUpstream,
    chunks,
    delta,
    eventually,
    finish,
    raw_chat,
    running,
)

EXAMPLES = 100  # on each loop

LINE_ENDS = [b"\n", b"\r\n", b"\r"]
BOM = b"\xef\xbb\xbf"


# ---- what a stream may look like ------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=40).map(str.encode),
    st.binary(max_size=40).map(lambda data: data.translate(None, b"\r\n")),
    st.sampled_from(["ሰላም ልዑል", "👩‍👩‍👧‍👦 ü ß", "\u2028\u0085"]).map(str.encode),
)
fields = st.sampled_from(
    [b"data: ", b"data:", b"data", b"event: ", b"id: ", b"retry: ", b": ", b":", b"x-other: ", b""]
)
chat_lines = st.one_of(
    texts.map(lambda text: delta(text.decode("utf-8", "replace"))), st.sampled_from([finish(), DONE])
)
line_texts = st.one_of(
    st.builds(bytes.__add__, fields, texts),
    chat_lines.map(lambda event: event.removesuffix(b"\n\n")),
)


@st.composite
def events(draw: st.DrawFn) -> bytes:
    """Draws some lines and a blank one. Line ends are independent, but a CR before an LF would be one end."""
    event = b""
    for text in draw(st.lists(line_texts, min_size=1, max_size=4)):
        event += text + draw(st.sampled_from(LINE_ENDS))
    blank = draw(st.sampled_from(LINE_ENDS))
    return event + (b"\r\n" if event.endswith(b"\r") and blank == b"\n" else blank)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Draws a stream that ends cleanly, with or without bytes after its end."""
    beginning = draw(st.sampled_from([b"", b"", BOM, b"\n", b"\r\n\r\n"]))
    middle = b"".join(draw(st.lists(events(), max_size=6)))
    end = draw(st.sampled_from(LINE_ENDS))
    behind = draw(st.one_of(st.just(b""), texts, events(), st.just(b"\n")))
    return beginning + middle + b"data: [DONE]" + end + end + behind


@st.composite
def split_streams(draw: st.DrawFn) -> list[bytes]:
    """Draws a stream and its segments: whole, byte by byte, or cut anywhere."""
    stream = draw(streams())
    how = draw(st.sampled_from(["whole", "byte by byte", "anywhere"]))
    if how == "whole":
        return [stream]
    if how == "byte by byte":
        return [stream[i : i + 1] for i in range(len(stream))]
    cuts = sorted(draw(st.sets(st.integers(1, len(stream) - 1), max_size=10)))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def is_at_boundary(received: bytes | bytearray) -> bool:
    """Whether an SSE parser holds no unfinished event after these bytes (WHATWG HTML, section 9.2.5)."""
    return received.replace(b"\r\n", b"\n").replace(b"\r", b"\n").endswith(b"\n\n")


# ---- the stage ------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A running proxy whose upstream sends the parts of the next of `plans`, each as a chunk of its own."""

    proxy: Running
    plans: queue.SimpleQueue[list[bytes]] = field(default_factory=queue.SimpleQueue)

    def stream(self, parts: list[bytes]) -> Iterator[bytes]:
        """The chunks that the client receives."""
        self.plans.put(parts)
        with raw_chat(self.proxy) as sock:
            yield from chunks(sock)


@pytest.fixture(scope="module", params=LOOPS)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    stages: list[Stage] = []

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.head()
            for part in stages[0].plans.get_nowait():
                await peer.chunk(part)
                await asyncio.sleep(0)
            await peer.end()

    with ScriptedUpstream(script) as upstream, running(upstream.base_url, loop=request.param) as proxy:
        stages.append(Stage(proxy))
        yield stages[0]


# ---- the promises ---------------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(parts=split_streams())
def test_bytes_and_boundaries(stage: Stage, parts: list[bytes]) -> None:
    """No byte of any stream, however split, is changed, and the client holds whole events at every moment."""
    sent = b"".join(parts)
    received = b""
    for chunk in stage.stream(parts):
        received += chunk
        assert is_at_boundary(received) or received == sent, "part of an event, though more came"
    assert hashlib.sha256(received).hexdigest() == hashlib.sha256(sent).hexdigest()


def test_large_streams(stage: Stage) -> None:
    """Megabytes, in events from 10 bytes to 1 MiB, split at odd places, arrive unchanged."""
    sizes = [10, 100, 16_000, 65_536, 100_000, 300_000, 1 << 20, 10, 70_000]
    stream = b"".join(delta("\u1230" * (size // 3)) for size in sizes) * 2 + finish() + DONE
    for step in (777, 65_536, len(stream)):
        parts = [stream[i : i + step] for i in range(0, len(stream), step)]
        received = b"".join(stage.stream(parts))
        assert hashlib.sha256(received).hexdigest() == hashlib.sha256(stream).hexdigest()


def held_back(loop: str, parts: list[bytes]) -> list[bytes]:
    """The bytes that the client holds after each part; the upstream waits for them before it sends the next part."""
    turn = threading.Semaphore(0)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        for part in parts:
            assert await asyncio.to_thread(turn.acquire, timeout=PATIENCE)
            await peer.chunk(part)
        await peer.end()

    held = []
    with ScriptedUpstream(script) as upstream, running(upstream.base_url, loop=loop) as proxy, raw_chat(proxy) as sock:
        turn.release()
        received = b""
        for chunk in chunks(sock):
            received += chunk
            held.append(received)
            turn.release()
    return held


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("end", LINE_ENDS, ids=["LF", "CRLF", "CR"])
def test_an_event_arrives_before_the_next_is_sent(end: bytes, loop: str) -> None:
    """No event waits for the next one: the upstream sends each only after the client has read the one before."""
    sent = [
        event.replace(b"\n", end) for event in (delta("one"), delta("two"), delta("\u1230\u120b\u121d"), finish(), DONE)
    ]
    assert held_back(loop, sent) == [b"".join(sent[: count + 1]) for count in range(len(sent))]


@pytest.mark.parametrize("loop", LOOPS)
def test_whole_events_arrive_before_the_rest_of_a_broken_one(loop: str) -> None:
    """When a read ends inside an event, the whole events pass at once; the partial one waits for its rest."""
    first, second = delta("one"), delta("two")
    sent = [first + second[:20], second[20:] + b": comment", b"\n\n" + DONE]
    assert held_back(loop, sent) == [first, first + second, first + second + b": comment\n\n" + DONE]


@pytest.mark.parametrize("loop", LOOPS)
def test_byte_by_byte_the_client_sees_events_only(loop: str) -> None:
    """The upstream sends single bytes, each in its own packet: the client never holds part of an event, and
    receives each before the next one begins."""
    stream = delta("\u1230\u120b\u121d") + b": comment\r\n\r\ndata: x\r\rdata: y\n\r\n" + finish() + DONE

    received = bytearray()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        for count, byte in enumerate(stream, 1):
            await peer.chunk(bytes([byte]))
            await asyncio.sleep(0.001)
            if is_at_boundary(stream[:count]) and not is_at_boundary(stream[: count - 1]):
                await asyncio.to_thread(eventually, lambda count=count: len(received) == count)
        await peer.end()

    with ScriptedUpstream(script) as upstream, running(upstream.base_url, loop=loop) as proxy, raw_chat(proxy) as sock:
        for chunk in chunks(sock):
            received.extend(chunk)
            assert is_at_boundary(received)
        assert received == stream
