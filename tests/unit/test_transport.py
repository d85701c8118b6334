"""What proxy/transport.py promises, over real sockets, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import os
import random
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import httpx
import pytest
from support.harness import LOOPS
from support.transport_servers import (
    CHUNKED,
    EMPTY,
    LIVENESS,
    OK,
    Certificates,
    Peer,
    Recorder,
    always,
    chunk,
    on_both_loops,
    once,
    post,
    run,
    serving,
    settled,
    then_silent,
    ticks,
)

from proxy.transport import connection as module
from proxy.transport import framing
from proxy.transport.connection import ResponseStream
from proxy.transport.pool import Transport

UNTRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loading certifi's roots takes longer than a test
ONE_READ = 256 * 1024  # the most that either loop reads at once
TEXT = bytes(random.Random(7).choices(b"abcdefgh \n", k=5000))

FRAMINGS = {
    "content-length": OK + b"Content-Length: 5000\r\n\r\n" + TEXT,
    "chunked": CHUNKED + b"".join(chunk(TEXT[i : i + 123]) for i in range(0, 5000, 123)) + b"0\r\n\r\n",
    "until EOF": OK + b"\r\n" + TEXT,
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + TEXT,
}


@contextlib.asynccontextmanager
async def transporting(**options: Any) -> AsyncIterator[Transport]:
    transport = Transport(**{"ssl_context": UNTRUSTING, **options})
    try:
        yield transport
    finally:
        await transport.aclose()
        assert transport.open_sockets == 0


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


async def pull(response: httpx.Response) -> bytes:
    try:
        return b"".join([part async for part in cast(ResponseStream, response.stream)])
    finally:
        await response.aclose()


async def pull_to_the_fault(response: httpx.Response) -> tuple[bytes, httpx.TransportError]:
    seen = b""
    try:
        async for part in stream_of(response):
            seen += part
    except httpx.TransportError as error:
        return seen, error
    raise AssertionError("it ended")


async def push(response: httpx.Response) -> Recorder:
    recorder = Recorder()
    stream_of(response).attach(recorder)
    return await recorder.finish()


def stream_of(response: httpx.Response) -> ResponseStream:
    assert isinstance(response.stream, ResponseStream)
    return response.stream


def split(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


# ---- the body, pushed and pulled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("size", [1 << 20, 700, 7])
@on_both_loops
async def test_push_and_pull_give_the_same_whole_body(framing: str, size: int) -> None:
    """Every framing, however it is cut into segments, gives the body byte for byte, pushed as well as pulled."""
    async with serving(once(*split(FRAMINGS[framing], size))) as upstream, transporting() as transport:
        pushed = await push(await transport.handle_async_request(post(upstream.url)))
        assert pushed.error is None
        assert pushed.body == TEXT
        assert await pull(await transport.handle_async_request(post(upstream.url))) == TEXT


@on_both_loops
async def test_one_socket_read_is_one_call_of_the_sink() -> None:
    """The fragments of one read are joined, and reads are not: as many calls as segments."""
    go = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.answer(CHUNKED)
        await go.wait()
        for _ in range(5):
            await peer.send(b"".join(chunk(b"data: x\n\n") for _ in range(50)))
            await asyncio.sleep(0.01)
        await peer.send(b"0\r\n\r\n")

    async with serving(handler) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        recorder = Recorder()
        stream_of(response).attach(recorder)
        go.set()
        await recorder.finish()
        assert recorder.parts == [b"data: x\n\n" * 50] * 5


@on_both_loops
async def test_what_came_with_the_headers_is_delivered_at_attach() -> None:
    """A sink attached after the whole answer came gets it, and its end, at once."""
    async with (
        serving(always(CHUNKED + chunk(b"ab") + b"0\r\n\r\n")) as upstream,
        transporting() as transport,
    ):
        response = await transport.handle_async_request(post(upstream.url))
        recorder = Recorder()
        stream_of(response).attach(recorder)
        assert recorder.parts == [b"ab"]
        assert recorder.error is None


@on_both_loops
async def test_a_body_is_read_once() -> None:
    """A second sink, or iterating beside a sink, is StreamConsumed."""
    async with serving(always(EMPTY)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        stream_of(response).attach(Recorder())
        with pytest.raises(httpx.StreamConsumed):
            stream_of(response).attach(Recorder())
        with pytest.raises(httpx.StreamConsumed):
            await pull(response)


@on_both_loops
async def test_an_ordinary_client_can_use_it() -> None:
    """httpx.AsyncClient works on it: json, streaming by lines, leaving in the middle."""
    lines = b"".join(chunk(b"line %d\n" % i) for i in range(3))

    async def handler(peer: Peer) -> None:
        await peer.answer(OK + b"Content-Type: application/json\r\nContent-Length: 8\r\n\r\n" + b'{"a": 1}')
        await peer.answer(CHUNKED, lines)
        await peer.gone()

    transport = Transport()
    async with serving(handler) as upstream, httpx.AsyncClient(transport=transport) as client:
        assert (await client.get(upstream.url)).json() == {"a": 1}
        async with client.stream("POST", upstream.url, json={}) as response:
            seen = []
            async for line in response.aiter_lines():
                seen.append(line)
                if len(seen) == 3:
                    break
            assert seen == ["line 0", "line 1", "line 2"]
            assert transport.open_sockets == 1
        await settled(lambda: upstream.open == transport.open_sockets == 0)


# ---- the head -------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_headers_come_as_they_were_sent() -> None:
    """Names keep their case, repeated ones their order; values lose the whitespace around them."""
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
    """100 and 103 leave no trace in the response, and neither do the fields behind a chunked body."""
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
    """HEAD, 204 and 304 have no body, whatever their headers say; HEAD's connection is not used again."""
    async with serving(then_silent(answer)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(httpx.Request(method, upstream.url))
        assert (await push(response)).body == b""
        await settled(lambda: transport.open_sockets == (1 if kept else 0))


# ---- the request on the wire ----------------------------------------------------------------------------------------


@on_both_loops
async def test_a_request_goes_out_as_it_was_built() -> None:
    """Method, target with its query, headers in their order, body: in one write, so that it is one segment."""
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


async def async_parts() -> AsyncIterator[bytes]:
    for part in (b"one", b"", b"two"):
        await asyncio.sleep(0)
        yield part


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("framing", ["chunked", "content-length"])
@on_both_loops
async def test_a_streamed_body_is_framed_as_its_headers_say(kind: str, framing: str) -> None:
    """Parts of sync and async streams arrive as one body; an empty part does not end it."""
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
    """Injection through any part of the head, and bodies that do not fit it, are LocalProtocolError."""
    whole: list[bytes] = []

    async def handler(peer: Peer) -> None:
        whole.append((await peer.request()).body)

    async with serving(handler) as upstream, transporting() as transport:
        arguments = {"method": "POST", "url": upstream.url, **BAD_REQUESTS[fault]}
        with pytest.raises(httpx.LocalProtocolError):
            await transport.handle_async_request(httpx.Request(**arguments))
        await settled(lambda: transport.open_sockets == upstream.open == 0)
    assert whole == []


@on_both_loops
async def test_only_http_and_https() -> None:
    """Any other scheme is UnsupportedProtocol."""
    async with transporting() as transport:
        with pytest.raises(httpx.UnsupportedProtocol):
            await transport.handle_async_request(httpx.Request("GET", "ftp://127.0.0.1/"))


@on_both_loops
async def test_small_writes_are_not_delayed() -> None:
    """TCP_NODELAY is on."""
    async with serving(then_silent(CHUNKED)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        connection = stream_of(response)._connection
        assert connection is not None
        assert connection._transport is not None
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@on_both_loops
async def test_the_caller_hears_when_the_server_may_be_at_work() -> None:
    """extensions["sent"] is called once the whole request is on its way, and not while only connecting or sending."""
    calls: list[int] = []

    async def counted() -> AsyncIterator[bytes]:
        yield b"a"
        assert calls == []
        yield b"b"

    async with serving(always(EMPTY)) as upstream, transporting() as transport:
        for content in b"ab", counted():
            request = httpx.Request("POST", upstream.url, content=content)
            request.extensions["sent"] = lambda: calls.append(1)
            await push(await transport.handle_async_request(request))
            assert calls == [1]
            calls.clear()
        refused = httpx.Request("POST", "http://127.0.0.1:1/", content=b"a")
        refused.extensions["sent"] = lambda: calls.append(1)
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(refused)
        assert calls == []


# ---- reuse ----------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_finished_connection_is_used_again() -> None:
    """Requests one after another share one socket, and it is idle before the consumer hears of the end."""
    async with serving(always(CHUNKED + chunk(b"a") + b"0\r\n\r\n")) as upstream, transporting() as transport:
        for _ in range(5):
            response = await transport.handle_async_request(post(upstream.url))
            assert await pull(response) == b"a"
            await response.aclose()
        assert (upstream.accepted, transport.open_sockets) == (1, 1)


@on_both_loops
async def test_live_streams_do_not_share_or_wait() -> None:
    """Each live stream has a socket of its own; there is no limit to queue for."""
    async with serving(then_silent(CHUNKED)) as upstream, transporting() as transport:
        responses = [await transport.handle_async_request(post(upstream.url)) for _ in range(150)]
        assert upstream.accepted == transport.open_sockets == 150
        for response in responses:
            await response.aclose()
        await settled(lambda: upstream.open == transport.open_sockets == 0)


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab",
        OK + b"Content-Length: 2\r\n\r\nabHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nX",
        OK + b"Content-Length: 2\r\n\r\nab!",
        CHUNKED + b"2\r\nab\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\nXX",
    ],
)
@on_both_loops
async def test_what_cannot_be_trusted_again_is_closed(answer: bytes) -> None:
    """`close`, HTTP/1.0 and bytes behind the end: the answer stands, nothing is added to it, the connection goes."""
    async with serving(then_silent(answer)) as upstream, transporting() as transport:
        recorder = await push(await transport.handle_async_request(post(upstream.url)))
        assert (recorder.body, recorder.error) == (b"ab", None)
        await settled(lambda: upstream.open == transport.open_sockets == 0)


@on_both_loops
async def test_bytes_on_an_idle_connection_close_it() -> None:
    """Bytes that no request asked for cannot become the next request's answer."""

    async def handler(peer: Peer) -> None:
        await peer.answer(EMPTY)
        await asyncio.sleep(0.02)
        await peer.send(OK + b"Content-Length: 6\r\n\r\npoison")
        await peer.gone()

    async with serving(handler) as upstream, transporting() as transport:
        await push(await transport.handle_async_request(post(upstream.url)))
        assert transport.open_sockets == 1
        await settled(lambda: transport.open_sockets == 0)
        assert (await push(await transport.handle_async_request(post(upstream.url)))).body == b""
        assert upstream.accepted == 2


@on_both_loops
async def test_idle_connections_are_closed_after_their_time() -> None:
    """idle_seconds after its last answer a connection is gone, with no request to trigger that; others stay."""
    async with serving(always(EMPTY)) as upstream, transporting(idle_seconds=0.9) as transport:
        responses = [transport.handle_async_request(post(upstream.url)) for _ in range(2)]
        await asyncio.gather(*responses)
        assert transport.open_sockets == 2
        await asyncio.sleep(0.6)
        await transport.handle_async_request(post(upstream.url))
        await settled(lambda: transport.open_sockets == 1, 0.75)
        await settled(lambda: transport.open_sockets == upstream.open == 0)


@on_both_loops
async def test_a_connection_past_its_idle_time_is_not_used() -> None:
    """A loop that was blocked over the deadline does not hand out an old connection."""
    async with serving(always(EMPTY)) as upstream, transporting(idle_seconds=0.0) as transport:
        await transport.handle_async_request(post(upstream.url))
        await transport.handle_async_request(post(upstream.url))
        assert upstream.accepted == 2


@on_both_loops
async def test_no_more_than_max_idle_are_kept() -> None:
    """Beyond max_idle the oldest idle connection is closed; 0 keeps none."""
    for most in (2, 0):
        async with serving(always(EMPTY)) as upstream, transporting(max_idle=most) as transport:
            await asyncio.gather(*[transport.handle_async_request(post(upstream.url)) for _ in range(5)])
            await settled(lambda most=most: transport.open_sockets == upstream.open == most)  # type: ignore[misc]


@on_both_loops
async def test_origins_do_not_share_connections() -> None:
    """A connection serves its scheme, host and port only."""
    async with serving(always(EMPTY)) as one, serving(always(EMPTY)) as two, transporting() as transport:
        for url in (one.url, two.url, one.url.replace("127.0.0.1", "localhost"), one.url, two.url):
            await transport.handle_async_request(post(url))
        assert (one.accepted, two.accepted) == (2, 1)


@on_both_loops
async def test_a_connection_closed_while_idle_is_replaced() -> None:
    """The server's closing is noticed at once; the next request connects anew."""
    async with serving(once(EMPTY)) as upstream, transporting() as transport:
        for count in (1, 2):
            await transport.handle_async_request(post(upstream.url))
            await settled(lambda: transport.open_sockets == 0)
            assert upstream.accepted == count


def stale(*second: bytes, reset: bool = False, delay: float = 0.0, first: bytes = EMPTY) -> Any:
    """Answers once; breaks on the second request of a connection, after saying `second`."""

    async def handler(peer: Peer) -> None:
        await peer.answer(first)
        await peer.request()
        await asyncio.sleep(delay)
        await peer.send(*second)
        if reset:
            peer.reset()

    return handler


@pytest.mark.parametrize("reset", [False, True])
@on_both_loops
async def test_a_stale_connection_costs_one_retry(reset: bool) -> None:
    """A reused connection that breaks before one byte of answer is replaced by a new one, once, unseen."""
    async with serving(stale(reset=reset)) as upstream, transporting() as transport:
        await asyncio.gather(*[transport.handle_async_request(post(upstream.url)) for _ in range(3)])
        assert upstream.accepted == transport.open_sockets == 3
        response = await transport.handle_async_request(post(upstream.url))
        assert response.status_code == 200
        assert upstream.accepted == 4


NOT_STALE: dict[str, dict[str, Any]] = {
    "a byte was answered": {"second": [b"H"]},
    "an interim answer came": {"second": [b"HTTP/1.1 100 Continue\r\n\r\n"]},
    "it took too long to be a race": {"delay": 0.1},
}


@pytest.mark.parametrize("case", NOT_STALE)
@on_both_loops
async def test_what_may_have_been_served_is_not_sent_again(case: str) -> None:
    """Once a byte was answered, or after STALE_SECONDS, a broken connection is the caller's to judge."""
    options = NOT_STALE[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STALE_SECONDS", 0.05)
        handler = stale(*options.get("second", []), delay=options.get("delay", 0.0))
        async with serving(handler) as upstream, transporting() as transport:
            await transport.handle_async_request(post(upstream.url))
            with pytest.raises(httpx.RemoteProtocolError):
                await transport.handle_async_request(post(upstream.url))
            assert upstream.accepted == 1


@on_both_loops
async def test_a_new_connection_and_a_streamed_body_are_not_retried() -> None:
    """A new connection cannot be stale, and a stream cannot be sent twice."""

    async def hang_up(peer: Peer) -> None:
        await peer.request()

    async with serving(hang_up) as upstream, transporting() as transport:
        with pytest.raises(httpx.RemoteProtocolError):
            await transport.handle_async_request(post(upstream.url))
        assert upstream.accepted == 1
    async with serving(stale()) as upstream, transporting() as transport:
        await transport.handle_async_request(post(upstream.url))
        with pytest.raises(httpx.RemoteProtocolError):
            await transport.handle_async_request(httpx.Request("POST", upstream.url, content=async_parts()))
        assert upstream.accepted == 1


@on_both_loops
async def test_a_timeout_on_a_reused_connection_is_not_retried() -> None:
    """Silence is not staleness."""
    async with serving(stale(delay=5)) as upstream, transporting() as transport:
        await transport.handle_async_request(post(upstream.url))
        with pytest.raises(httpx.ReadTimeout):
            await transport.handle_async_request(post(upstream.url, read=0.05))
        assert upstream.accepted == 1


@on_both_loops
async def test_leaving_a_finished_stream_does_not_touch_the_next_user() -> None:
    """Once an answer is whole its connection serves the next request, whatever is done to the old stream."""
    go = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.answer(CHUNKED + chunk(b"one") + b"0\r\n\r\n")
        await peer.answer(CHUNKED)
        await go.wait()
        await peer.send(chunk(b"two") + b"0\r\n\r\n")

    async with serving(handler) as upstream, transporting() as transport:
        first = await transport.handle_async_request(post(upstream.url))
        await settled(lambda: transport._idle)
        second = await transport.handle_async_request(post(upstream.url))
        stream_of(first).pause()
        stream_of(first).resume()
        await first.aclose()
        go.set()
        recorder = await push(second)
        assert (recorder.body, recorder.error, upstream.accepted) == (b"two", None, 1)


# ---- what breaks ----------------------------------------------------------------------------------------------------


async def failure(transport: Transport, url: str, **timeout: float) -> httpx.TransportError:
    with pytest.raises(httpx.TransportError) as caught:
        await transport.handle_async_request(post(url, b"{}", **timeout))
    return caught.value


BREAKS: dict[str, tuple[list[bytes], bool, bytes, type[Exception]]] = {
    "cut in a chunk": ([CHUNKED + b"5\r\nab"], False, b"ab", httpx.RemoteProtocolError),
    "cut before the last chunk": ([CHUNKED + chunk(b"ab")], False, b"ab", httpx.RemoteProtocolError),
    "cut in the trailers": ([CHUNKED + chunk(b"ab") + b"0\r\n"], False, b"ab", httpx.RemoteProtocolError),
    "cut short of its length": (
        [OK + b"Content-Length: 3\r\n\r\nab"],
        False,
        b"ab",
        httpx.RemoteProtocolError,
    ),
    "bad chunk, in one read": ([CHUNKED + chunk(b"ab") + b"zz\r\n"], False, b"ab", httpx.RemoteProtocolError),
    "bad chunk": ([CHUNKED, chunk(b"ab"), b"zz\r\nmore"], False, b"ab", httpx.RemoteProtocolError),
    "no CRLF behind a chunk": ([CHUNKED, b"2\r\nabXX"], False, b"ab", httpx.RemoteProtocolError),
    "reset in a chunk": ([CHUNKED + b"5\r\nab"], True, b"ab", httpx.ReadError),
    "reset until EOF": ([OK + b"\r\nab"], True, b"ab", httpx.ReadError),
}


@pytest.mark.parametrize("case", BREAKS)
@on_both_loops
async def test_a_broken_body_is_delivered_up_to_the_fault(case: str) -> None:
    """What was whole arrives, pushed and pulled; then the error; the connection is gone."""
    parts, reset, body, kind = BREAKS[case]

    async def handler(peer: Peer) -> None:
        await peer.answer(*parts)
        if reset:
            await asyncio.sleep(0.02)
            peer.reset()

    async with serving(handler) as upstream, transporting() as transport:
        recorder = await push(await transport.handle_async_request(post(upstream.url)))
        assert recorder.body == body
        assert type(recorder.error) is kind
        assert isinstance(recorder.error.__cause__, OSError) == reset
        response = await transport.handle_async_request(post(upstream.url))
        seen, failed = await pull_to_the_fault(response)
        assert (seen, type(failed)) == (body, kind)
        await settled(lambda: transport.open_sockets == 0)


@on_both_loops
async def test_a_connection_that_breaks_before_the_headers() -> None:
    """EOF before or within the headers is RemoteProtocolError, a reset is ReadError."""
    for said in (b"", b"HTTP/1.1 2", OK + b"A: b\r\n"):
        async with serving(once(said)) as upstream, transporting() as transport:
            assert type(await failure(transport, upstream.url)) is httpx.RemoteProtocolError

    async def reset(peer: Peer) -> None:
        await peer.request()
        peer.reset()

    async with serving(reset) as upstream, transporting() as transport:
        error = await failure(transport, upstream.url)
        assert type(error) is httpx.ReadError
        assert isinstance(error.__cause__, ConnectionResetError)


@on_both_loops
async def test_refused_and_unresolved() -> None:
    """Both are ConnectError, told apart by their cause."""
    async with transporting() as transport:
        refused = await failure(transport, "http://127.0.0.1:1/")
        assert type(refused) is httpx.ConnectError
        assert isinstance(refused.__cause__, ConnectionRefusedError)
        unresolved = await failure(transport, "http://nosuch.invalid/")
        assert type(unresolved) is httpx.ConnectError
        assert isinstance(unresolved.__cause__, socket.gaierror)
        assert type(await failure(transport, f"http://{'a' * 70}.invalid/")) is httpx.ConnectError


@pytest.mark.parametrize("reset", [False, True])
@on_both_loops
async def test_a_connection_that_is_closed_before_it_is_used(reset: bool) -> None:
    """A server that hangs up between accepting and our first byte is a ConnectError, and not waited for."""
    loop = asyncio.get_running_loop()
    real = loop.create_connection

    async def late(*arguments: Any, **options: Any) -> Any:
        made = await real(*arguments, **options)
        await asyncio.sleep(0.05)
        return made

    async def hang_up(peer: Peer) -> None:
        if reset:
            peer.reset()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "create_connection", late)
        async with serving(hang_up) as upstream, transporting() as transport:
            error = await failure(transport, upstream.url)
            assert type(error) is httpx.ConnectError
            assert isinstance(error.__cause__, ConnectionError)
            assert transport.open_sockets == 0


def endless(start: bytes, more: bytes) -> Any:
    async def handler(peer: Peer) -> None:
        await peer.answer(start)
        while more:
            await peer.send(more)
        await peer.gone()

    return handler


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
    """A head that exceeds its bounds is RemoteProtocolError before it costs more than them."""
    start, more = UNBOUNDED[case]
    async with serving(endless(start, more)) as upstream, transporting() as transport:
        assert type(await failure(transport, upstream.url)) is httpx.RemoteProtocolError
        await settled(lambda: transport.open_sockets == upstream.open == 0)


@pytest.mark.parametrize("more", [b"x" * 999, b"A: b\r\n" * 99, b"A: " + b"x" * 900 + b"\r\n"])
@on_both_loops
async def test_trailers_are_bounded(more: bytes) -> None:
    """Trailers without an end break the stream instead of filling the memory."""
    start = CHUNKED + chunk(b"ab") + b"0\r\n"
    async with serving(endless(start, more)) as upstream, transporting() as transport:
        recorder = await push(await transport.handle_async_request(post(upstream.url)))
        assert recorder.body == b"ab"
        assert type(recorder.error) is httpx.RemoteProtocolError
        await settled(lambda: upstream.open == 0)


@on_both_loops
async def test_heads_up_to_the_bounds_pass() -> None:
    """100 headers, and 60 KB of them, are fine; so is any number of chunk heads read on their own."""
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


@on_both_loops
async def test_a_sink_that_raises_breaks_its_connection_only() -> None:
    """A bug in a sink ends its own stream with an error and leaves no socket."""

    class Buggy(Recorder):
        def data(self, data: bytes) -> None:
            raise RuntimeError("bug")

    heard: list[dict[str, Any]] = []
    async with serving(then_silent(CHUNKED, chunk(b"ab"))) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        buggy = Buggy()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
        with contextlib.suppress(RuntimeError):  # raised here when the body came with the headers
            stream_of(response).attach(buggy)
            await buggy.finish()
            assert type(buggy.error) is httpx.ReadError
        stream_of(response).abort()
        await settled(lambda: transport.open_sockets == upstream.open == 0)


# ---- timeouts -------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_connect_timeout_covers_tcp() -> None:
    """A server that does not take the connection is ConnectTimeout."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as fillers:
        for _ in range(4):  # Linux drops the SYN once the backlog is full
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        await asyncio.sleep(0.05)
        async with transporting() as transport:
            error = await failure(transport, f"http://127.0.0.1:{listener.getsockname()[1]}/", connect=0.1)
            assert type(error) is httpx.ConnectTimeout
            assert transport.open_sockets == 0


@on_both_loops
async def test_connect_timeout_covers_tls(certificates: Certificates) -> None:
    """So is one that takes it and then does not shake hands."""

    async def silent(peer: Peer) -> None:
        await peer.gone()

    async with serving(silent) as upstream, transporting(ssl_context=certificates.client) as transport:
        url = upstream.url.replace("http:", "https:")
        assert type(await failure(transport, url, connect=0.1)) is httpx.ConnectTimeout
        await settled(lambda: transport.open_sockets == upstream.open == 0)


def test_connect_timeout_covers_the_resolver() -> None:
    """And a name that does not resolve in time (on asyncio: uvloop resolves in C, out of a test's reach)."""

    async def hanging(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(LIVENESS)

    async def resolve() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "getaddrinfo", hanging)
            async with transporting() as transport:
                error = await failure(transport, "http://name.invalid/", connect=0.05)
                assert type(error) is httpx.ConnectTimeout

    run("asyncio", resolve())


@on_both_loops
async def test_read_timeout_is_one_deadline_for_the_headers() -> None:
    """Silence is ReadTimeout, and so are headers that trickle: a byte now and then does not buy more time."""

    async def trickle(peer: Peer) -> None:
        await peer.answer(OK)
        while True:
            await peer.send(b"A: b\r\n")
            await asyncio.sleep(0.02)

    for handler in (then_silent(b""), trickle):
        async with serving(handler) as upstream, transporting() as transport:
            began = asyncio.get_running_loop().time()
            assert type(await failure(transport, upstream.url, read=0.1)) is httpx.ReadTimeout
            assert asyncio.get_running_loop().time() - began < 1
            await settled(lambda: transport.open_sockets == upstream.open == 0)


@on_both_loops
async def test_read_timeout_is_between_reads_of_a_pulled_body() -> None:
    """A body may take any time as long as its parts keep coming; the first silence is ReadTimeout and closes."""

    async def handler(peer: Peer) -> None:
        await peer.answer(CHUNKED)
        for _ in range(6):
            await asyncio.sleep(0.2)
            await peer.send(chunk(b"a"))
        await peer.gone()

    async with serving(handler) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url, read=0.8))
        seen, failed = await pull_to_the_fault(response)
        assert (seen, type(failed)) == (b"a" * 6, httpx.ReadTimeout)
        await settled(lambda: transport.open_sockets == upstream.open == 0)


@on_both_loops
async def test_a_pushed_body_has_no_read_timeout() -> None:
    """In push mode the deadlines are the consumer's own."""
    async with serving(then_silent(CHUNKED)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url, read=0.05))
        recorder = Recorder()
        stream_of(response).attach(recorder)
        await asyncio.sleep(0.15)
        assert recorder.ends == []
        assert transport.open_sockets == 1


@on_both_loops
async def test_deadlines_do_not_outlive_their_wait() -> None:
    """Each wait's timer is cancelled with it: a busy hour does not leave an hour's timers."""
    loop = asyncio.get_running_loop()
    real = loop.call_later
    deadlines: list[asyncio.Handle] = []

    def recording(delay: float, *arguments: Any) -> asyncio.Handle:
        timer = real(delay, *arguments)
        if delay == 99:
            deadlines.append(timer)
        return timer

    parts = [CHUNKED, chunk(b"a"), chunk(b"b"), b"0\r\n\r\n"]
    async with serving(always(*parts)) as upstream, transporting(idle_seconds=0.0) as transport:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_later", recording)
            response = await transport.handle_async_request(post(upstream.url, read=99, write=99))
            assert await pull(response) == b"ab"
        assert len(deadlines) >= 2
        assert all(timer.cancelled() for timer in deadlines)


@pytest.mark.parametrize("streamed", [False, True])
@on_both_loops
async def test_write_timeout(streamed: bool) -> None:
    """A server that does not read the request is WriteTimeout."""
    release = asyncio.Event()

    async def deaf(peer: Peer) -> None:
        cast(asyncio.Transport, peer.writer.transport).pause_reading()
        await release.wait()

    async def parts() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100000

    async with serving(deaf) as upstream, transporting() as transport:
        content = parts() if streamed else b"x" * 20_000_000
        request = httpx.Request("POST", upstream.url, content=content, extensions={"timeout": {"write": 0.2}})
        with pytest.raises(httpx.WriteTimeout):
            await transport.handle_async_request(request)
        release.set()
        await settled(lambda: transport.open_sockets == upstream.open == 0)


# ---- early answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@on_both_loops
async def test_an_early_refusal_is_the_answer(streamed: bool) -> None:
    """A refusal that comes before the body was sent is returned at once; the rest is not sent, the socket not kept."""
    release = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await release.wait()

    async def parts() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100000

    async with serving(handler) as upstream, transporting() as transport:
        content = parts() if streamed else b"x" * 20_000_000
        request = httpx.Request("POST", upstream.url, content=content, extensions={"timeout": {"write": 5}})
        response = await transport.handle_async_request(request)
        assert response.status_code == 413
        assert await pull(response) == b"no"
        await settled(lambda: transport.open_sockets == 0)
        release.set()
        await settled(lambda: upstream.open == 0)


@on_both_loops
async def test_an_early_success_can_be_read_while_the_body_goes_out() -> None:
    """An answer may begin before the request was read whole; both arrive whole."""
    body = b"x" * 20_000_000
    counted: list[int] = []
    read = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(CHUNKED, chunk(b"early"))
        await read.wait()
        counted.append(len(await peer.reader.readexactly(len(body))))
        await peer.send(chunk(b"late"), b"0\r\n\r\n")
        await peer.gone()

    async with serving(handler) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url, body, write=5))
        assert counted == []
        read.set()
        assert (await push(response)).body == b"earlylate"
        assert counted == [len(body)]


@on_both_loops
async def test_an_early_success_does_not_cut_a_streamed_body() -> None:
    """A server that answers while it reads still gets the whole body."""
    bodies: list[bytes] = []

    async def handler(peer: Peer) -> None:
        head = await peer.reader.readuntil(b"\r\n\r\n")
        assert b"hunked" in head
        await peer.send(CHUNKED)
        bodies.append(await peer.reader.readuntil(b"0\r\n\r\n"))
        await peer.send(b"0\r\n\r\n")

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"part"
            await asyncio.sleep(0.01)

    async with serving(handler) as upstream, transporting() as transport:
        request = httpx.Request("POST", upstream.url, content=parts())
        assert (await push(await transport.handle_async_request(request))).error is None
    assert bodies == [chunk(b"part") * 5 + b"0\r\n\r\n"]


# ---- backpressure ---------------------------------------------------------------------------------------------------


class Flood:
    """Sends chunks as fast as they are taken, and counts what the kernel accepted."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.sent = 0

    async def __call__(self, peer: Peer) -> None:
        peer.writer.transport.set_write_buffer_limits(1)
        await peer.answer(CHUNKED)
        while self.sent < self.total:
            await peer.send(chunk(b"%08d" % (self.sent // 8192) * 1024))
            self.sent += 8192
        await peer.send(b"0\r\n\r\n")
        await peer.gone()

    async def stalls(self) -> int:
        """The number of bytes sent when no more are taken."""
        before = -1
        while before < self.sent:
            before = self.sent
            await asyncio.sleep(0.05)
        return self.sent

    @property
    def whole(self) -> bytes:
        return b"".join(b"%08d" % (i // 8192) * 1024 for i in range(0, self.total, 8192))


def held(response: httpx.Response) -> int:
    return len(stream_of(response)._held)


@pytest.mark.parametrize("tls", [False, True])
@on_both_loops
async def test_a_paused_sink_pauses_the_server(tls: bool, certificates: Certificates) -> None:
    """While paused nothing is delivered, at most one read is held, the server blocks; then all arrives."""
    flood = Flood(24_000_000 // 8192 * 8192)
    context = certificates.server("127.0.0.1") if tls else None
    async with (
        serving(flood, tls=context) as upstream,
        transporting(ssl_context=certificates.client) as transport,
    ):
        response = await transport.handle_async_request(post(upstream.url))
        recorder = Recorder()
        stream = stream_of(response)
        stream.attach(recorder)
        await settled(lambda: len(recorder.body) > 500_000)
        stream.pause()
        stream.pause()
        delivered = len(recorder.parts)
        assert await flood.stalls() < flood.total
        assert len(recorder.parts) == delivered
        assert held(response) <= ONE_READ
        stream.resume()
        stream.resume()
        await recorder.finish()
        assert recorder.error is None
        assert recorder.body == flood.whole


@on_both_loops
async def test_nobody_reading_pauses_the_server() -> None:
    """Before a consumer comes, and between its pulls, a bounded number of bytes is held; all arrive."""
    flood = Flood(24_000_000 // 8192 * 8192)
    async with serving(flood) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        assert await flood.stalls() < flood.total
        assert held(response) <= module.HELD_HIGH_WATER + ONE_READ
        parts = aiter(stream_of(response))
        seen = [await anext(parts)]
        assert await flood.stalls() < flood.total
        assert held(response) <= module.HELD_HIGH_WATER + ONE_READ
        seen.extend([part async for part in stream_of_again(parts)])
        assert b"".join(seen) == flood.whole
        assert transport.open_sockets == 1


async def stream_of_again(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    with contextlib.suppress(StopAsyncIteration):
        while True:
            yield await anext(parts)


class Pausing(Recorder):
    """Pauses the stream in every call of data."""

    stream: ResponseStream

    def data(self, data: bytes) -> None:
        super().data(data)
        self.stream.pause()


@pytest.mark.parametrize("tail", [b"0\r\n\r\n", b"zz\r\n"])
@on_both_loops
async def test_a_pause_within_data_holds_the_end_back(tail: bytes) -> None:
    """The end, or the fault, that came in the same read is delivered at resume and not before."""
    async with serving(then_silent(CHUNKED, chunk(b"ab") + tail)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        sink = Pausing()
        sink.stream = stream_of(response)
        sink.stream.attach(sink)
        await settled(lambda: sink.parts)
        await asyncio.sleep(0.02)
        assert sink.ends == []
        sink.stream.resume()
        assert isinstance(sink.error, httpx.RemoteProtocolError) == (tail != b"0\r\n\r\n")
        assert sink.body == b"ab"


@pytest.mark.parametrize("tls", [False, True])
@on_both_loops
async def test_a_close_behind_a_paused_body_is_held_back(tls: bool, certificates: Certificates) -> None:
    """A server that closes while we are paused: what it said first still arrives, then the end."""
    closed = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.answer(OK + b"\r\n", b"one")
        await closed.wait()
        await peer.send(b"two")

    context = certificates.server("127.0.0.1") if tls else None
    async with (
        serving(handler, tls=context) as upstream,
        transporting(ssl_context=certificates.client) as transport,
    ):
        response = await transport.handle_async_request(post(upstream.url))
        recorder = Recorder()
        stream_of(response).attach(recorder)
        await settled(lambda: recorder.parts)
        stream_of(response).pause()
        closed.set()
        await asyncio.sleep(0.05)
        assert (recorder.body, recorder.ends) == (b"one", [])
        assert held(response) == 0, "the socket was read though paused"
        stream_of(response).resume()
        await recorder.finish()
        assert (recorder.body, recorder.error) == (b"onetwo", None)


@on_both_loops
async def test_a_read_that_was_on_its_way_is_held() -> None:
    """Should a loop still deliver after pause_reading, the sink does not hear of it before resume."""
    async with serving(then_silent(CHUNKED)) as upstream, transporting() as transport:
        stream = stream_of(await transport.handle_async_request(post(upstream.url)))
        recorder = Recorder()
        stream.attach(recorder)
        stream.pause()
        connection = stream._connection
        assert connection is not None
        connection.data_received(chunk(b"ab") + b"0\r\n\r\n")
        assert (recorder.parts, recorder.ends) == ([], [])
        stream.resume()
        assert (recorder.body, recorder.error) == (b"ab", None)


@on_both_loops
async def test_pausing_before_attach_and_after_the_end() -> None:
    """A pause holds for a sink that comes later; pause, resume and abort after the end do nothing."""
    async with (
        serving(always(CHUNKED + chunk(b"ab") + b"0\r\n\r\n")) as upstream,
        transporting() as transport,
    ):
        stream = stream_of(await transport.handle_async_request(post(upstream.url)))
        recorder = Recorder()
        stream.pause()
        stream.attach(recorder)
        assert (recorder.parts, recorder.ends) == ([], [])
        stream.resume()
        assert (recorder.body, recorder.error) == (b"ab", None)
        stream.pause()
        stream.resume()
        stream.abort()
        assert transport.open_sockets == 1


@on_both_loops
async def test_a_connection_that_was_paused_is_fit_for_the_next_request() -> None:
    """An answer that ends while the socket is paused leaves a connection that reads again."""
    big = [
        CHUNKED + chunk(b"x" * 60_000),
        chunk(b"x" * 40_000) + b"0\r\n\r\n",
    ]  # the pause and the end in one read
    async with serving(always(*big)) as upstream, transporting() as transport:
        for _ in range(3):
            response = await transport.handle_async_request(post(upstream.url))
            await settled(lambda: transport._idle)
            assert await pull(response) == b"x" * 100_000
        assert upstream.accepted == 1


# ---- closing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["aclose", "abort", "abort within data", "cancel the pull"])
@on_both_loops
async def test_closing_early_closes_the_socket_at_once(way: str) -> None:
    """However a live stream is left, the server sees it, and the sink hears nothing more."""
    go = asyncio.Event()

    async def handler(peer: Peer) -> None:
        await peer.answer(CHUNKED)
        await go.wait()
        await peer.send(chunk(b"ab") + b"0\r\n\r\n" if way == "abort within data" else b"")
        await peer.gone()

    class Aborting(Recorder):
        def data(self, data: bytes) -> None:
            super().data(data)
            stream.abort()

    async with serving(handler) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        stream = stream_of(response)
        recorder = Aborting() if way == "abort within data" else Recorder()
        if way == "cancel the pull":
            task = asyncio.create_task(pull_without_closing(stream))
            await ticks()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            stream.attach(recorder)
            if way == "aclose":
                await response.aclose()
            elif way == "abort":
                stream.abort()
        go.set()
        await settled(lambda: transport.open_sockets == upstream.open == 0)
        assert recorder.ends == []
        stream.abort()
        stream.resume()


async def pull_without_closing(stream: ResponseStream) -> None:
    async for _ in stream:
        pass


@on_both_loops
async def test_a_closed_stream_gives_nothing() -> None:
    """Reading on after aclose is an error, not an end: what was left out must not look like the whole."""
    async with serving(then_silent(CHUNKED, chunk(b"ab"))) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        await settled(lambda: held(response))
        await response.aclose()
        seen, failed = await pull_to_the_fault(response)
        assert (seen, type(failed)) == (b"", httpx.ReadError)


@on_both_loops
async def test_closing_the_transport() -> None:
    """aclose ends live streams with ReadError, connecting requests with ConnectError, and refuses later ones."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with serving(then_silent(CHUNKED)) as upstream:
            transport = Transport()
            recorder = Recorder()
            stream_of(await transport.handle_async_request(post(upstream.url))).attach(recorder)
            pulled = asyncio.create_task(pull(await transport.handle_async_request(post(upstream.url))))
            shaking = asyncio.create_task(
                transport.handle_async_request(post(f"https://127.0.0.1:{mute.getsockname()[1]}/"))
            )
            await asyncio.sleep(0.02)
            assert transport.open_sockets == 3
            await transport.aclose()
            assert transport.open_sockets == 0
            assert type(recorder.error) is httpx.ReadError
            with pytest.raises(httpx.ReadError):
                await pulled
            with pytest.raises(httpx.ConnectError):
                await shaking
            with pytest.raises(httpx.ConnectError):
                await transport.handle_async_request(post(upstream.url))
            await transport.aclose()
            await settled(lambda: upstream.open == 0)


@pytest.mark.parametrize("moment", ["before the task knows", "as the task is woken"])
@on_both_loops
async def test_closing_the_transport_as_a_connection_is_made(moment: str) -> None:
    """A socket that is open but not yet handed to its request is closed too."""
    loop = asyncio.get_running_loop()
    real = loop.create_connection
    made: asyncio.Future[None] = loop.create_future()

    async def late(*arguments: Any, **options: Any) -> Any:
        connected = await real(*arguments, **options)
        await made
        return connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "create_connection", late)
        async with serving(then_silent(CHUNKED)) as upstream:
            transport = Transport(ssl_context=UNTRUSTING)
            request = asyncio.create_task(transport.handle_async_request(post(upstream.url)))
            await settled(lambda: upstream.open == 1)
            if moment == "as the task is woken":
                made.set_result(None)
            await transport.aclose()
            assert transport.open_sockets == 0
            with pytest.raises(httpx.ConnectError):
                await request
            await settled(lambda: upstream.open == 0)


# ---- TLS ------------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_tls_with_a_trusted_certificate(certificates: Certificates) -> None:
    """The name is sent as SNI, the certificate checked, the connection used again."""
    names: list[str | None] = []
    context = certificates.server("localhost")
    context.sni_callback = lambda _, name, __: names.append(name)
    async with (
        serving(always(CHUNKED + chunk(b"ab") + b"0\r\n\r\n"), tls=context) as upstream,
        transporting(ssl_context=certificates.client) as transport,
    ):
        for _ in range(3):
            request = post(upstream.url.replace("127.0.0.1", "localhost"))
            response = await transport.handle_async_request(request)
            assert (await push(response)).body == b"ab"
        assert (names, upstream.accepted) == (["localhost"], 1)


YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@pytest.mark.parametrize("fault", ["expired", "wrong name", "untrusted", "untrusted by certifi"])
@on_both_loops
async def test_tls_with_a_bad_certificate(fault: str, certificates: Certificates) -> None:
    """Expired, for another name, or of an unknown CA: ConnectError, and its cause says so."""
    ours = certificates if fault != "untrusted" else Certificates()
    expired = {"not_before": YESTERDAY - datetime.timedelta(days=9), "not_after": YESTERDAY}
    context = ours.server(
        "example.org" if fault == "wrong name" else "127.0.0.1", **(expired if fault == "expired" else {})
    )
    options = {"ssl_context": None if fault == "untrusted by certifi" else certificates.client}
    async with serving(always(EMPTY), tls=context) as upstream, transporting(**options) as transport:
        error = await failure(transport, upstream.url)
        assert type(error) is httpx.ConnectError
        assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
        assert upstream.requests == []
        await settled(lambda: transport.open_sockets == upstream.open == 0)


@on_both_loops
async def test_a_reset_in_the_handshake_is_no_tls_failure(certificates: Certificates) -> None:
    """A connection that breaks while shaking hands may be tried again: its cause is an OSError, not an SSLError."""

    async def reset(peer: Peer) -> None:
        await peer.reader.read(1)
        peer.reset()

    async with serving(reset) as upstream, transporting(ssl_context=certificates.client) as transport:
        error = await failure(transport, upstream.url.replace("http:", "https:"))
        assert type(error) is httpx.ConnectError
        assert isinstance(error.__cause__, ConnectionError)


@on_both_loops
async def test_plain_http_behind_https_is_a_tls_failure(certificates: Certificates) -> None:
    """A server that does not speak TLS is ConnectError with an SSLError."""
    async with (
        serving(endless(EMPTY, b"junk")) as upstream,
        transporting(ssl_context=certificates.client) as transport,
    ):
        server = socket.create_server(("127.0.0.1", 0))
        with server:
            task = asyncio.create_task(
                failure(transport, f"https://127.0.0.1:{server.getsockname()[1]}/", connect=LIVENESS)
            )
            server.setblocking(False)
            accepted, _ = await asyncio.get_running_loop().sock_accept(server)
            with accepted:
                accepted.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                error = await task
        assert type(error) is httpx.ConnectError
        assert isinstance(error.__cause__, ssl.SSLError)
        assert upstream.accepted == 0


@pytest.mark.parametrize("notified", [True, False])
@on_both_loops
async def test_tls_until_eof_needs_the_close_notify(notified: bool, certificates: Certificates) -> None:
    """A body that ends with the connection is whole if the TLS session was ended; a bare FIN may be anybody's.

    asyncio's TLS reports both alike (uvloop's does not), so there the bare FIN passes, as it does with httpx's own.
    """

    async def handler(peer: Peer) -> None:
        await peer.answer(OK + b"\r\n", b"ab")
        if not notified:
            await asyncio.sleep(0.02)
            with socket.socket(fileno=os.dup(peer.writer.get_extra_info("socket").fileno())) as sock:
                sock.shutdown(socket.SHUT_WR)
            await peer.gone()

    async with (
        serving(handler, tls=certificates.server("127.0.0.1")) as upstream,
        transporting(ssl_context=certificates.client) as transport,
    ):
        recorder = await push(await transport.handle_async_request(post(upstream.url)))
        assert recorder.body == b"ab"
        if isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
            assert recorder.error is None
        else:
            assert isinstance(recorder.error, httpx.RemoteProtocolError) != notified


# ---- what it costs --------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_silent_stream_costs_little_memory() -> None:
    """Below 8 KiB for each live stream without traffic, the request's body not among it."""
    body = b"x" * 50_000
    with socket.create_server(("127.0.0.1", 0), backlog=300) as server:
        server.setblocking(False)
        loop = asyncio.get_running_loop()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        peers: list[socket.socket] = []

        async def opened() -> ResponseStream:
            task = asyncio.create_task(transport.handle_async_request(post(url, body)))
            peer, _ = await loop.sock_accept(server)
            peers.append(peer)
            received = 0
            while received < len(body):
                received += len(await loop.sock_recv(peer, 65536))
            await loop.sock_sendall(peer, CHUNKED + chunk(b"data: x\n\n"))
            stream = stream_of(await task)
            stream.attach(Recorder())
            return stream

        async with transporting() as transport:
            streams = [await opened() for _ in range(20)]
            tracemalloc.start()
            before, _ = tracemalloc.get_traced_memory()
            streams += [await opened() for _ in range(200)]
            after, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert (after - before) / 200 < 8192
            assert transport.open_sockets == len(streams)
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_finished_streams_are_freed_without_the_collector(loop: str) -> None:
    """No cycle is left of an exchange, ended or aborted: its memory goes as soon as its last user does."""

    def exchanges() -> list[object]:
        return [kept for kept in gc.get_objects() if type(kept) in (ResponseStream, framing.ResponseParser)]

    async def main() -> None:
        answer = CHUNKED + chunk(b"ab") + b"0\r\n\r\n"
        async with serving(always(answer)) as upstream, transporting() as transport:
            for leave in ("end", "abort"):
                response = await transport.handle_async_request(post(upstream.url))
                assert len(exchanges()) == 2
                if leave == "end":
                    await push(response)
                else:
                    stream_of(response).abort()
                del response
                await ticks(20)
                assert exchanges() == []

    gc.collect()
    gc.disable()
    try:
        run(loop, main())
    finally:
        gc.enable()
