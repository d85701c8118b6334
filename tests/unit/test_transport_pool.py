"""Connecting, reusing and closing connections, over real sockets on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import httpx
import pytest
from support.transport_clients import UNTRUSTING, async_parts, failure, pull, push, stream_of, transporting
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
)

from proxy.transport import connection
from proxy.transport.pool import Transport


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


# ---- requests -------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_an_ordinary_client_can_use_it() -> None:
    """httpx.AsyncClient works on the transport: JSON, streaming by lines, leaving in mid-stream."""
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


@on_both_loops
async def test_only_http_and_https() -> None:
    """Any other scheme raises UnsupportedProtocol."""
    async with transporting() as transport:
        with pytest.raises(httpx.UnsupportedProtocol):
            await transport.handle_async_request(httpx.Request("GET", "ftp://127.0.0.1/"))


# ---- connecting -----------------------------------------------------------------------------------------------------


@on_both_loops
async def test_refused_and_unresolved() -> None:
    """Both raise ConnectError; its cause tells them apart."""
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
    """A server that closes between accepting and our first byte causes a ConnectError at once."""
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


@on_both_loops
async def test_connect_timeout_covers_tcp() -> None:
    """A server that does not accept the connection causes a ConnectTimeout."""
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
    """A server that accepts the connection and never completes the handshake causes a ConnectTimeout."""

    async def silent(peer: Peer) -> None:
        await peer.gone()

    async with serving(silent) as upstream, transporting(ssl_context=certificates.client) as transport:
        url = upstream.url.replace("http:", "https:")
        assert type(await failure(transport, url, connect=0.1)) is httpx.ConnectTimeout
        await settled(lambda: transport.open_sockets == upstream.open == 0)


def test_connect_timeout_covers_the_resolver() -> None:
    """A name that does not resolve in time causes a ConnectTimeout (on asyncio: a test cannot patch uvloop's)."""

    async def hanging(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(LIVENESS)

    async def resolve() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "getaddrinfo", hanging)
            async with transporting() as transport:
                error = await failure(transport, "http://name.invalid/", connect=0.05)
                assert type(error) is httpx.ConnectTimeout

    run("asyncio", resolve())


# ---- reuse ----------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_finished_connection_is_used_again() -> None:
    """Consecutive requests share one socket: it is idle before the consumer receives the end."""
    async with serving(always(CHUNKED + chunk(b"a") + b"0\r\n\r\n")) as upstream, transporting() as transport:
        for _ in range(5):
            response = await transport.handle_async_request(post(upstream.url))
            assert await pull(response) == b"a"
            await response.aclose()
        assert (upstream.accepted, transport.open_sockets) == (1, 1)


@on_both_loops
async def test_live_streams_do_not_share_or_wait() -> None:
    """Each live stream has a socket of its own; no limit makes a request wait."""
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
    """`close`, HTTP/1.0 and bytes after the end leave the answer as it is and close the connection."""
    async with serving(then_silent(answer)) as upstream, transporting() as transport:
        recorder = await push(await transport.handle_async_request(post(upstream.url)))
        assert (recorder.body, recorder.error) == (b"ab", None)
        await settled(lambda: upstream.open == transport.open_sockets == 0)


@on_both_loops
async def test_bytes_on_an_idle_connection_close_it() -> None:
    """Bytes on an idle connection close it: they cannot become the next request's answer."""

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
    """A connection is closed idle_seconds after its last answer, without a request that triggers it; others stay."""
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
    """A loop that was blocked past the deadline does not reuse an expired connection."""
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
async def test_leaving_a_finished_stream_does_not_affect_the_next_one() -> None:
    """The connection of a complete answer serves the next request, whatever is done to the old stream."""
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


# ---- stale connections ----------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_connection_closed_while_idle_is_replaced() -> None:
    """A connection that the server closes is dropped at once; the next request opens a new one."""
    async with serving(once(EMPTY)) as upstream, transporting() as transport:
        for count in (1, 2):
            await transport.handle_async_request(post(upstream.url))
            await settled(lambda: transport.open_sockets == 0)
            assert upstream.accepted == count


def stale(*second: bytes, reset: bool = False, delay: float = 0.0, first: bytes = EMPTY) -> Any:
    """Answers once; sends `second` on the second request of a connection and breaks off."""

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
    """A reused connection that breaks before the first byte of the answer is replaced once, invisibly to the caller."""
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
    """A connection that breaks after the first byte of the answer, or after STALE_SECONDS, raises: no retry."""
    options = NOT_STALE[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "STALE_SECONDS", 0.05)
        handler = stale(*options.get("second", []), delay=options.get("delay", 0.0))
        async with serving(handler) as upstream, transporting() as transport:
            await transport.handle_async_request(post(upstream.url))
            with pytest.raises(httpx.RemoteProtocolError):
                await transport.handle_async_request(post(upstream.url))
            assert upstream.accepted == 1


@on_both_loops
async def test_a_new_connection_and_a_streamed_body_are_not_retried() -> None:
    """Neither is retried: a new connection cannot be stale, and a stream cannot be sent twice."""

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
    """Silence on a reused connection raises ReadTimeout: it does not show that the connection was stale."""
    async with serving(stale(delay=5)) as upstream, transporting() as transport:
        await transport.handle_async_request(post(upstream.url))
        with pytest.raises(httpx.ReadTimeout):
            await transport.handle_async_request(post(upstream.url, read=0.05))
        assert upstream.accepted == 1


# ---- closing --------------------------------------------------------------------------------------------------------


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
    """aclose also closes a socket that is open but not yet assigned to its request."""
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
