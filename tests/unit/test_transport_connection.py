"""One exchange on one connection: push and pull, faults, timeouts, backpressure, aborts; on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from support.harness import LOOPS
from support.transport_clients import failure, pull, pull_to_the_fault, push, stream_of, transporting
from support.transport_servers import (
    CHUNKED,
    EMPTY,
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

from proxy.transport import framing
from proxy.transport.connection import HELD_HIGH_WATER, ResponseStream

ONE_READ = 256 * 1024  # the most that either loop reads at once


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


# ---- the body, pushed and pulled ------------------------------------------------------------------------------------


@on_both_loops
async def test_one_socket_read_is_one_call_of_the_sink() -> None:
    """The sink is called once per segment: the fragments of one read are joined, reads are not."""
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
    """A sink that is attached after the whole answer has arrived receives the body and its end at once."""
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
    """A second sink, or iterating beside a sink, raises StreamConsumed."""
    async with serving(always(EMPTY)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        stream_of(response).attach(Recorder())
        with pytest.raises(httpx.StreamConsumed):
            stream_of(response).attach(Recorder())
        with pytest.raises(httpx.StreamConsumed):
            await pull(response)


# ---- sending --------------------------------------------------------------------------------------------------------


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
async def test_sent_is_called_when_the_server_may_be_working() -> None:
    """extensions["sent"] is called once, when the whole request is written, and not while connecting or sending."""
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


# ---- faults ---------------------------------------------------------------------------------------------------------


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
    """The bytes before the fault arrive, pushed and pulled, then the error; the connection is closed."""
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
    """EOF before or within the headers raises RemoteProtocolError, a reset ReadError."""
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
async def test_a_sink_that_raises_breaks_its_connection_only() -> None:
    """A sink that raises ends its own stream with an error and leaves no socket."""

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
async def test_read_timeout_is_one_deadline_for_the_headers() -> None:
    """Silence raises ReadTimeout, and so do headers that trickle: single bytes do not extend the deadline."""

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
    """A body may take any time while its parts keep coming; the first silence raises ReadTimeout and closes."""

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
    """The transport sets no read deadline for an attached sink: its consumer has its own."""
    async with serving(then_silent(CHUNKED)) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url, read=0.05))
        recorder = Recorder()
        stream_of(response).attach(recorder)
        await asyncio.sleep(0.15)
        assert recorder.ends == []
        assert transport.open_sockets == 1


@on_both_loops
async def test_deadlines_do_not_outlive_their_wait() -> None:
    """Each wait cancels its timer when it ends, so timers do not pile up under load."""
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
    """A server that does not read the request causes a WriteTimeout."""
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
    """An error status before the end of the body is returned at once; the rest is not sent, the socket not reused."""
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
    """A response that begins before the server has read the whole request arrives whole, and so does the request."""
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
    """A server that answers while it reads still receives the whole body."""
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


@on_both_loops
async def test_an_answer_before_the_end_of_a_slow_body_closes_the_connection() -> None:
    """The connection of a half-sent request is not reused: the server would read the next request as its body."""

    async def handler(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await peer.gone()

    async def parts() -> AsyncIterator[bytes]:
        yield b"part"
        await settled(lambda: transport.open_sockets == 0)
        yield b"rest"

    async with serving(handler) as upstream, transporting() as transport:
        response = await transport.handle_async_request(httpx.Request("POST", upstream.url, content=parts()))
        assert (response.status_code, await pull(response)) == (413, b"no")
        await settled(lambda: upstream.open == 0)


@on_both_loops
async def test_a_reset_within_a_slow_body_is_a_write_error() -> None:
    """A reset before the request was sent whole is WriteError; after that it is ReadError."""

    async def reset(peer: Peer) -> None:
        await peer.reader.readuntil(b"part\r\n")
        peer.reset()

    async def parts() -> AsyncIterator[bytes]:
        yield b"part"
        await settled(lambda: transport.open_sockets == 0)
        yield b"rest"

    async with serving(reset) as upstream, transporting() as transport:
        with pytest.raises(httpx.WriteError) as caught:
            await transport.handle_async_request(httpx.Request("POST", upstream.url, content=parts()))
        assert isinstance(caught.value.__cause__, ConnectionResetError)


# ---- backpressure ---------------------------------------------------------------------------------------------------


class Flood:
    """Sends chunks as fast as the client reads, and counts the bytes that the kernel accepted."""

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
        """Waits until the kernel accepts no more; returns the number of bytes sent."""
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
    """While paused, nothing is delivered, at most one read is held and the server blocks; then all bytes arrive."""
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
async def test_a_body_without_a_reader_pauses_the_server() -> None:
    """Before a consumer reads, and between its reads, a bounded number of bytes is held; all arrive."""
    flood = Flood(24_000_000 // 8192 * 8192)
    async with serving(flood) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        assert await flood.stalls() < flood.total
        assert held(response) <= HELD_HIGH_WATER + ONE_READ
        parts = aiter(stream_of(response))
        seen = [await anext(parts)]
        assert await flood.stalls() < flood.total
        assert held(response) <= HELD_HIGH_WATER + ONE_READ
        seen.extend([part async for part in rest_of(parts)])
        assert b"".join(seen) == flood.whole
        assert transport.open_sockets == 1


async def rest_of(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
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
    """The end or the fault in the same read is delivered at resume and not before."""
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
    """The bytes that a server sends before it closes a paused connection still arrive, then the end."""
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
    """Bytes that a loop delivers after pause_reading reach the sink at resume and not before."""
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
    """A pause applies to a sink that is attached later; pause, resume and abort after the end do nothing."""
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
    """A connection whose answer ended while it was paused reads again for the next request."""
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
    """Each way of leaving a live stream closes the socket at once, and the sink is not called again."""
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
    """Reading after aclose raises ReadError: an incomplete body must not look complete."""
    async with serving(then_silent(CHUNKED, chunk(b"ab"))) as upstream, transporting() as transport:
        response = await transport.handle_async_request(post(upstream.url))
        await settled(lambda: held(response))
        await response.aclose()
        seen, failed = await pull_to_the_fault(response)
        assert (seen, type(failed)) == (b"", httpx.ReadError)


# ---- what it costs --------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_silent_stream_costs_little_memory() -> None:
    """A live stream without traffic holds less than 8 KiB, and no longer the request's body."""
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
    """An exchange, ended or aborted, leaves no reference cycle: its memory is freed with the last reference to it."""

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
