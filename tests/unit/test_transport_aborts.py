"""A stream of proxy/transport that is abandoned at any moment leaves nothing behind.

CHAT_PROXY_FULL=1 runs the sizes of the promise; by default a twentieth of them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any

import httpx
import pytest
from support.harness import FULL, LOOPS
from support.transport_servers import (
    CHUNKED,
    EMPTY,
    Certificates,
    Handler,
    Peer,
    Recorder,
    Upstream,
    always,
    chunk,
    on_both_loops,
    post,
    run,
    serving,
    settled,
    ticks,
)

from proxy.transport.connection import ResponseStream
from proxy.transport.pool import Transport

STREAMS = 20_000 if FULL else 800
TLS_STREAMS = 4_000 if FULL else 200
AT_ONCE = 60
PAUSE = 0.02  # seconds between two parts of an answer, at most; an answer has six
PHASES = ("connecting", "waiting", "reading", "over")
HONEST = 100
WHOLE = b"data: hello\n\n" * 5


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


def idle_only(transport: Transport, upstream: Upstream) -> Callable[[], bool]:
    """Asserts that only idle sockets are held, and that the server counts the same ones."""
    return lambda: transport.open_sockets == len(transport._idle) == upstream.open


# ---- a crowd that leaves at random ----------------------------------------------------------------------------------


def moody() -> Handler:
    """Pauses up to PAUSE seconds between parts; instead of a few answers it resets or closes the connection."""
    dice = random.Random(20)

    async def handler(peer: Peer) -> None:
        while True:
            request = await peer.request()
            if b"/honest" not in request.head:
                await asyncio.sleep(dice.random() * PAUSE)
                mood = dice.random()
                if mood < 0.02:
                    peer.reset()
                if mood < 0.04:
                    return
            await peer.send(CHUNKED)
            for part in range(5):
                await peer.send(chunk(WHOLE[part * 13 : part * 13 + 13]))
                if b"/honest" not in request.head:
                    await asyncio.sleep(dice.random() * PAUSE)
            await peer.send(b"0\r\n\r\n")

    return handler


class Visit:
    """One request, read in one of the ways there are, and left `delay` seconds after it enters the phase `until`."""

    def __init__(self, transport: Transport, url: str, dice: random.Random, left: Counter[str]) -> None:
        self.transport = transport
        self.url = url
        self.way = dice.randrange(3)
        self.until = dice.choice(PHASES)
        self.delay = dice.choice((0.0, dice.random() * 0.001, dice.random() * PAUSE))
        self.left = left
        self.phase = ""
        self.task = asyncio.create_task(self.run())

    def enter(self, phase: str) -> None:
        self.phase = phase
        if phase == self.until:
            asyncio.get_running_loop().call_later(self.delay, self.leave)

    def leave(self) -> None:
        self.left[self.phase] += 1
        self.task.cancel()

    async def run(self) -> None:
        self.enter("connecting")
        request = post(self.url, read=20, connect=20, write=20)
        request.extensions["sent"] = lambda: self.enter("waiting")
        response = await self.transport.handle_async_request(request)
        self.enter("reading")
        assert isinstance(response.stream, ResponseStream)
        await (self.pull(response.stream) if self.way == 0 else self.take_pushes(response.stream))
        self.enter("over")

    async def pull(self, stream: ResponseStream) -> None:
        async for _ in stream:
            pass

    async def take_pushes(self, stream: ResponseStream) -> None:
        recorder = Recorder()
        stream.attach(recorder)
        try:
            if self.way == 1:
                stream.pause()
                await asyncio.sleep(0.005)
                stream.resume()
            await recorder.finish()
        finally:
            stream.abort()


async def crowd(transport: Transport, url: str, count: int) -> Counter[str]:
    """`count` visits, AT_ONCE at a time, each left at a random moment. Returns how many were left in which phase."""
    left: Counter[str] = Counter()
    dice = random.Random(21)
    shared = iter(range(count))

    async def visitor() -> None:
        for _ in shared:
            visit = Visit(transport, url, dice, left)
            await asyncio.gather(visit.task, return_exceptions=True)
            if not visit.task.cancelled() and (error := visit.task.exception()) is not None:
                assert isinstance(error, httpx.ReadError | httpx.RemoteProtocolError), error

    await asyncio.gather(*[visitor() for _ in range(AT_ONCE)])
    return left


async def honest(transport: Transport, url: str) -> None:
    response = await transport.handle_async_request(post(url + "honest", read=5, connect=5))
    assert isinstance(response.stream, ResponseStream)
    recorder = Recorder()
    response.stream.attach(recorder)
    await recorder.finish()
    assert (recorder.body, recorder.error) == (WHOLE, None)


async def abandoned(count: int, certificates: Certificates | None = None) -> None:
    client = certificates.client if certificates else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    transport = Transport(ssl_context=client)
    tls = certificates.server("127.0.0.1") if certificates else None
    async with serving(moody(), tls=tls) as upstream:
        phases = await crowd(transport, upstream.url, count)
        assert min(phases[phase] for phase in PHASES) >= count / 20, phases  # or it proves little
        await settled(idle_only(transport, upstream))
        await settled(lambda: len(asyncio.all_tasks()) == 1 + upstream.open)
        await asyncio.gather(*[honest(transport, upstream.url) for _ in range(HONEST)])
        await settled(idle_only(transport, upstream))
        await transport.aclose()
        assert transport.open_sockets == 0
        await settled(lambda: upstream.open == 0)


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_streams_cancelled_at_random_leave_nothing(loop: str) -> None:
    """After 20,000 cancelled streams, 60 at a time, only idle sockets and no task are left; 100 requests succeed."""
    run(loop, abandoned(STREAMS), seconds=300)


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_streams_cancelled_at_random_leave_nothing_under_tls(loop: str, certificates: Certificates) -> None:
    """The same holds under TLS, where a stream can also be abandoned in the handshake."""
    run(loop, abandoned(TLS_STREAMS, certificates), seconds=300)


# ---- every await, cancelled in turn ---------------------------------------------------------------------------------


class Stepped:
    """Runs a coroutine, and cancels it at its `at`-th await.

    Early: as it begins to wait. Late: after what it waited for has happened, before it could act on that.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int, *, late: bool) -> None:
        self.coroutine = coroutine
        self.at = at
        self.late = late
        self.steps = 0

    def __await__(self) -> Generator[Any, Any, None]:
        task = asyncio.current_task()
        assert task is not None
        try:
            waiting = self.coroutine.send(None)
            while True:
                self.steps += 1
                now = self.steps == self.at
                if now and not self.late:
                    asyncio.get_running_loop().call_soon(task.cancel)
                try:
                    sent = yield waiting
                except BaseException as error:  # noqa: BLE001  # any exception of the coroutine
                    waiting = self.coroutine.throw(error)
                else:
                    if now and self.late:
                        waiting = self.coroutine.throw(asyncio.CancelledError())
                    else:
                        waiting = self.coroutine.send(sent)
        except StopIteration:
            return

    async def run(self) -> None:
        await self


async def cancel_at_each_await(
    make: Callable[[], Coroutine[Any, Any, Any]], left: Callable[[], Awaitable[None]], *, late: bool
) -> int:
    """Runs `make()` once for each of its awaits, cancelled there, `left` asserting after each; then undisturbed.

    Returns the number of awaits.
    """
    for at in itertools.count(1):
        stepped = Stepped(make(), at, late=late)
        task = asyncio.create_task(stepped.run())
        await asyncio.gather(task, return_exceptions=True)
        await left()
        if stepped.steps < at:
            assert task.exception() is None
            return stepped.steps
        assert task.cancelled(), f"the cancellation at await {at} was lost"
    raise AssertionError


async def streamed_body() -> AsyncIterator[bytes]:
    for _ in range(3):
        await asyncio.sleep(0)
        yield b"x" * 300_000


async def slow_reader(peer: Peer) -> None:
    """Reads a body slowly, so that the client has to wait for its writes."""
    while True:
        await asyncio.sleep(0.005)
        await peer.answer(CHUNKED + chunk(b"ab"), chunk(b"cd"), b"0\r\n\r\n")


async def stale(peer: Peer) -> None:
    """Answers the first request of a connection and breaks on the second."""
    await peer.answer(EMPTY)
    await peer.request()


SCENARIOS: dict[str, tuple[Handler, bytes | Callable[[], AsyncIterator[bytes]], bool, int]] = {
    # what the server does, the body, is there an idle connection, the least number of awaits there must be
    "new connection": (slow_reader, b"{}", False, 3),  # connect, headers, body
    "reused connection": (slow_reader, b"{}", True, 2),  # headers, body
    "stale connection": (stale, b"{}", True, 3),  # headers, connect, headers
    "a body that waits for the server": (slow_reader, b"x" * 8_000_000, True, 3),  # write, headers, body
    "a streamed body": (slow_reader, streamed_body, True, 6),  # its own three, write, headers, body
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
@on_both_loops
async def test_a_request_cancelled_at_any_await_leaves_nothing(
    scenario: str, tls: bool, late: bool, certificates: Certificates
) -> None:
    """A cancellation while connecting, sending, waiting for the headers or reading closes the socket at once."""
    handler, content, warm, least = SCENARIOS[scenario]
    context = certificates.server("127.0.0.1") if tls else None
    transport = Transport(ssl_context=certificates.client, max_idle=1 if warm else 0)
    async with serving(handler, tls=context) as upstream:

        async def visit() -> None:
            body = content if isinstance(content, bytes) else content()
            request = httpx.Request("POST", upstream.url, content=body)
            request.extensions = {"timeout": {"connect": 5}}
            response = await transport.handle_async_request(request)
            try:
                async for _ in response.aiter_raw():
                    pass
            finally:
                await response.aclose()

        async def left() -> None:
            assert transport.open_sockets <= 1
            await settled(lambda: transport.open_sockets == len(transport._idle))
            await settled(lambda: upstream.open == transport.open_sockets)
            await settled(lambda: len(asyncio.all_tasks()) == 1 + upstream.open)
            if warm and not transport._idle:
                await (await transport.handle_async_request(post(upstream.url))).aread()

        if warm:
            await left()
        assert await cancel_at_each_await(visit, left, late=late) >= least
        await transport.aclose()


@pytest.mark.parametrize("late", [False, True])
@on_both_loops
async def test_closing_the_transport_can_be_cancelled_at_any_await(late: bool) -> None:
    """aclose closes every live, idle and connecting socket before its first await."""
    async with serving(always(CHUNKED)) as upstream:

        async def closed_at(at: int) -> bool:
            """Cancels an aclose at its `at`-th await, if there is one."""
            transport = Transport(ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
            live = [await transport.handle_async_request(post(upstream.url)) for _ in range(2)]
            connecting = asyncio.create_task(transport.handle_async_request(post(upstream.url)))
            await ticks(1)
            assert transport.open_sockets == len(live) + 1
            stepped = Stepped(transport.aclose(), at, late=late)
            await asyncio.gather(asyncio.create_task(stepped.run()), return_exceptions=True)
            await settled(lambda: transport.open_sockets == upstream.open == 0)
            with pytest.raises(httpx.ConnectError):
                await connecting
            return stepped.steps >= at

        awaits = 0
        while await closed_at(awaits + 1):
            awaits += 1
        assert awaits >= 1
