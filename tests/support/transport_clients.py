"""The client side of the tests of proxy/transport: a Transport, and ways to read a response."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest

from proxy.transport.connection import ResponseStream
from proxy.transport.pool import Transport
from support.transport_servers import Peer, Recorder, post

UNTRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loading certifi's roots takes longer than a test


@contextlib.asynccontextmanager
async def transporting(**options: Any) -> AsyncIterator[Transport]:
    """A transport; asserts that closing it leaves no socket."""
    transport = Transport(**{"ssl_context": UNTRUSTING, **options})
    try:
        yield transport
    finally:
        await transport.aclose()
        assert transport.open_sockets == 0


async def pull(response: httpx.Response) -> bytes:
    try:
        return b"".join([part async for part in cast(ResponseStream, response.stream)])
    finally:
        await response.aclose()


async def pull_to_the_fault(response: httpx.Response) -> tuple[bytes, httpx.TransportError]:
    """The bytes before the fault, and the error."""
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


async def failure(transport: Transport, url: str, **timeout: float) -> httpx.TransportError:
    """The error that a request raises."""
    with pytest.raises(httpx.TransportError) as caught:
        await transport.handle_async_request(post(url, b"{}", **timeout))
    return caught.value


async def async_parts() -> AsyncIterator[bytes]:
    for part in (b"one", b"", b"two"):
        await asyncio.sleep(0)
        yield part


def endless(start: bytes, more: bytes) -> Any:
    """Answers with `start`, then sends `more` until the client closes."""

    async def handler(peer: Peer) -> None:
        await peer.answer(start)
        while more:
            await peer.send(more)
        await peer.gone()

    return handler
