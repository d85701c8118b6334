"""A request becomes bytes, and the bytes of a response become its head and body, over real sockets on both loops."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.transport_clients import async_parts, endless, failure, pull, push, transporting
from support.transport_servers import (
    CHUNKED,
    EMPTY,
    OK,
    Peer,
    chunk,
    on_both_loops,
    once,
    post,
    serving,
    settled,
    then_silent,
)

from proxy.transport import framing

TEXT = bytes(random.Random(7).choices(b"abcdefgh \n", k=5000))

FRAMINGS = {
    "content-length": OK + b"Content-Length: 5000\r\n\r\n" + TEXT,
    "chunked": CHUNKED + b"".join(chunk(TEXT[i : i + 123]) for i in range(0, 5000, 123)) + b"0\r\n\r\n",
    "until EOF": OK + b"\r\n" + TEXT,
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + TEXT,
}


def split(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


# ---- the request ----------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_request_goes_out_as_it_was_built() -> None:
    """Method, target with its query, headers in their order and body go out in one write, thus in one segment."""
    seen: list[bytes] = []

    async def handler(peer: Peer) -> None:
        seen.append(await peer.reader.read(65536))
        await peer.send(EMPTY)

    async with serving(handler) as upstream, transporting() as transport:
        headers = [(b"Host", b"api.example"), (b"X-B", b"1"), (b"x-a", b"2")]
        request = httpx.Request("PUT", upstream.url + "a%20b?c=d#e", headers=headers, content=b"body")
        await push(await transport.handle_async_request(request))
    head = b"PUT /a%20b?c=d HTTP/1.1\r\nHost: api.example\r\nX-B: 1\r\nx-a: 2\r\nContent-Length: 4\r\n\r\n"
    assert seen == [head + b"body"]


class SyncParts(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield from (b"one", b"", b"two")


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("framing", ["chunked", "content-length"])
@on_both_loops
async def test_a_streamed_body_is_framed_as_its_headers_declare(kind: str, framing: str) -> None:
    """The parts of sync and async streams arrive as one body; an empty part does not end it."""
    framed = {"chunked": {"Transfer-Encoding": "chunked"}, "content-length": {"Content-Length": "6"}}
    in_async = httpx.Request("POST", "http://a", content=async_parts()).stream
    stream = SyncParts() if kind == "sync" else in_async
    bodies: list[bytes] = []

    async def handler(peer: Peer) -> None:
        bodies.append((await peer.request()).body)
        await peer.send(EMPTY)

    async with serving(handler) as upstream, transporting() as transport:
        request = httpx.Request("POST", upstream.url, headers={"Host": "a", **framed[framing]}, stream=stream)
        await push(await transport.handle_async_request(request))
    assert bodies == [b"onetwo"]


HOST = (b"Host", b"a")

LENGTH_2 = (b"Content-Length", b"2")

BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "method": {"method": "GET / HTTP/1.1\r\nX:"},
    "empty method": {"method": ""},
    "non-ASCII method": {"method": "GÉT"},
    "header name": {"headers": [(b"Host", b"a"), (b"X: 1\r\nY", b"a")]},
    "empty header name": {"headers": [(b"Host", b"a"), (b"", b"a")]},
    "CRLF in a value": {"headers": [(b"Host", b"a"), (b"X", b"a\r\nY: b")]},
    "LF in a value": {"headers": [(b"Host", b"a"), (b"X", b"a\nY: b")]},
    "NUL in a value": {"headers": [(b"Host", b"a"), (b"X", b"a\0")]},
    "no host": {"headers": [(b"X", b"a")], "stream": httpx.ByteStream(b"")},
    "two hosts": {"headers": [(b"Host", b"a"), (b"Host", b"b")]},
    "two framings": {"headers": [HOST, LENGTH_2, (b"Transfer-Encoding", b"chunked")], "content": b"ab"},
    "length repeated": {"headers": [HOST, LENGTH_2, LENGTH_2], "content": b"ab"},
    "length no number": {"headers": [(b"Host", b"a"), (b"Content-Length", b"+2")], "content": b"ab"},
    "gzip coding": {"headers": [(b"Host", b"a"), (b"Transfer-Encoding", b"gzip, chunked")]},
    "body too long": {"headers": [(b"Host", b"a"), (b"Content-Length", b"1")], "content": b"ab"},
    "body too short": {"headers": [(b"Host", b"a"), (b"Content-Length", b"3")], "content": b"ab"},
    "stream too short": {"headers": [(b"Host", b"a"), (b"Content-Length", b"9")], "stream": SyncParts()},
    "stream too long": {"headers": [(b"Host", b"a"), (b"Content-Length", b"4")], "stream": SyncParts()},
}


@pytest.mark.parametrize("fault", BAD_REQUESTS)
@on_both_loops
async def test_a_request_that_could_be_read_differently_is_not_sent(fault: str) -> None:
    """Injection through any part of the head, and a body that does not fit its headers, raise LocalProtocolError."""
    whole: list[bytes] = []

    async def handler(peer: Peer) -> None:
        whole.append((await peer.request()).body)

    async with serving(handler) as upstream, transporting() as transport:
        arguments = {"method": "POST", "url": upstream.url, **BAD_REQUESTS[fault]}
        with pytest.raises(httpx.LocalProtocolError):
            await transport.handle_async_request(httpx.Request(**arguments))
        await settled(lambda: transport.open_sockets == upstream.open == 0)
    assert whole == []


# ---- the head -------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_headers_come_as_they_were_sent() -> None:
    """Header names keep their case, repeated headers their order; values lose the whitespace around them."""
    head = b"HTTP/1.1 218 This is fine\r\nX-One:  a \t\r\nx-one: b\r\nEmpty:\r\nObs: \xe9\r\nContent-Length: 0\r\n\r\n"
    async with serving(once(*split(head, 1))) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        assert response.status_code == 218
        assert response.headers.raw == [
            (b"X-One", b"a"),
            (b"x-one", b"b"),
            (b"Empty", b""),
            (b"Obs", b"\xe9"),
            (b"Content-Length", b"0"),
        ]
        assert response.extensions == {"http_version": b"HTTP/1.1", "reason_phrase": b"This is fine"}


@on_both_loops
async def test_interim_responses_are_skipped_and_trailers_dropped() -> None:
    """The response shows no trace of 100 and 103, nor of the fields after a chunked body."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    answer = interim + CHUNKED + chunk(b"ab") + b"0\r\nSet-Cookie: trailer\r\n\r\n"
    async with serving(once(*split(answer, 5))) as upstream, transporting() as transport:
        for _ in range(2):
            response = await transport.handle_async_request(post(upstream.url))
            recorder = await push(response)
            assert (response.status_code, recorder.body, recorder.error) == (200, b"ab", None)
            assert response.headers.raw == [(b"Transfer-Encoding", b"chunked")]
            assert response.extensions["reason_phrase"] == b"OK"


@pytest.mark.parametrize(
    ("method", "answer", "kept"),
    [
        ("HEAD", OK + b"Content-Length: 5000\r\n\r\n", False),
        ("HEAD", CHUNKED, False),
        ("HEAD", OK + b"\r\n", False),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", True),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5000\r\n\r\n", True),
        ("GET", EMPTY, True),
    ],
)
@on_both_loops
async def test_answers_without_a_body_end_with_their_headers(method: str, answer: bytes, kept: bool) -> None:
    """HEAD, 204 and 304 have no body, whatever their headers declare; the connection of a HEAD is not reused."""
    async with serving(then_silent(answer)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(httpx.Request(method, upstream.url))
        assert (await push(response)).body == b""
        await settled(lambda: transport.open_sockets == (1 if kept else 0))


# ---- the body -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("size", [1 << 20, 700, 7])
@on_both_loops
async def test_push_and_pull_give_the_same_whole_body(framing: str, size: int) -> None:
    """Each framing, however it is cut into segments, gives the body byte for byte, pushed as well as pulled."""
    async with serving(once(*split(FRAMINGS[framing], size))) as upstream, transporting() as transport:
        pushed = await push(await transport.handle_async_request(post(upstream.url)))
        assert pushed.error is None
        assert pushed.body == TEXT
        assert await pull(await transport.handle_async_request(post(upstream.url))) == TEXT


# ---- bounds ---------------------------------------------------------------------------------------------------------


UNBOUNDED: dict[str, tuple[bytes, bytes]] = {
    "a reason without an end": (b"HTTP/1.1 200 ", b"x" * 999),
    "a header without an end": (OK + b"A: ", b"x" * 999),
    "a header name without an end": (OK, b"x" * 999),
    "headers without an end": (OK, b"A: b\r\n" * 99),
    "interim responses without an end": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 40),
    "101 headers in one read": (OK + b"A: b\r\n" * 101 + b"\r\n", b""),
    "big headers in one read": (OK + b"A: %b\r\nB: %b\r\n\r\n" % (b"x" * 40000, b"x" * 40000), b""),
}


@pytest.mark.parametrize("case", UNBOUNDED)
@on_both_loops
async def test_heads_are_bounded(case: str) -> None:
    """A head that exceeds its bounds raises RemoteProtocolError before it costs more memory than they allow."""
    start, more = UNBOUNDED[case]
    async with serving(endless(start, more)) as upstream, transporting() as transport:
        assert type(await failure(transport, upstream.url)) is httpx.RemoteProtocolError
        await settled(lambda: transport.open_sockets == upstream.open == 0)


@pytest.mark.parametrize("more", [b"x" * 999, b"A: b\r\n" * 99, b"A: " + b"x" * 900 + b"\r\n"])
@on_both_loops
async def test_trailers_are_bounded(more: bytes) -> None:
    """Trailers without an end break the stream instead of filling memory."""
    start = CHUNKED + chunk(b"ab") + b"0\r\n"
    async with serving(endless(start, more)) as upstream, transporting() as transport:
        recorder = await push(await transport.handle_async_request(post(upstream.url)))
        assert recorder.body == b"ab"
        assert type(recorder.error) is httpx.RemoteProtocolError
        await settled(lambda: upstream.open == 0)


@on_both_loops
async def test_heads_up_to_the_bounds_pass() -> None:
    """100 headers of 60 KB in all pass, and so does any number of chunk heads in reads of their own."""
    many = OK + b"".join(b"A%d: %b\r\n" % (i, b"x" * 600) for i in range(99)) + b"Content-Length: 0\r\n\r\n"
    async with serving(once(many)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        assert len(response.headers.raw) == 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "MAX_BARREN_BYTES", 200)
        parts = [part for _ in range(60) for part in (b"1;extension=12\r\n", b"a\r\n")]
        async with serving(once(CHUNKED, *parts, b"0\r\n\r\n")) as upstream, transporting() as transport:
            recorder = await push(await transport.handle_async_request(post(upstream.url)))
            assert (recorder.body, recorder.error) == (b"a" * 60, None)
