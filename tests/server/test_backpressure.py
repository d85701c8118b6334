"""An upstream that is faster than its client: the bytes held are bounded, and all of them arrive.

The buffers of all four sockets are small, so the number of bytes that the upstream sent shows what the proxy holds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import pytest
from support.faults import fault
from support.harness import (
    DONE,
    GOOD,
    LOOPS,
    PATIENCE,
    Peer,
    Running,
    ScriptedUpstream,
    chat,
    chat_request,
    chunks,
    delta,
    eventually,
    finish,
    raw_chat,
    running,
)

SMALL = 65536  # bytes of a socket's buffer
HELD = 1 << 20  # bytes that the proxy may hold of one stream
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
ROW = delta("x" * 4000)
FOREVER = 1 << 40  # bytes

both_loops = pytest.mark.parametrize("loop", LOOPS)


@dataclass
class Flood:
    """An upstream that sends one stream as fast as it can, and its client, which does not read yet."""

    proxy: Running
    client: socket.socket
    peer: Peer
    pushed: int = 0  # bytes of events that the upstream sent
    sent: Any = field(default_factory=hashlib.sha256)
    closed: float = 0.0  # when the proxy closed the connection

    def bound(self) -> int:
        """The bytes that the proxy may hold, plus the buffers of four sockets and of the script."""
        transport: Any = self.proxy.service.app.transport
        (inner,) = [connection._transport.get_extra_info("socket") for connection in transport._connections]
        receiving, sending = (
            [self.client, inner],
            [self.proxy.service.listener, self.peer.writer.get_extra_info("socket")],
        )
        kernel: int = sum(end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for end in receiving)
        kernel += sum(end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for end in sending)
        return HELD + kernel + int(self.peer.writer.transport.get_write_buffer_limits()[1])

    def has_stalled(self, seconds: float = 0.3) -> bool:
        """Whether, for so long, the proxy reads nothing and the upstream sends nothing."""
        before = self.pushed
        time.sleep(seconds)
        transport: Any = self.proxy.service.app.transport
        paused = not any(connection._transport.is_reading() for connection in transport._connections)
        waits = self.peer.writer.transport.get_write_buffer_size() > 0
        return paused and waits and before == self.pushed > 0


@contextmanager
def flooding(loop: str, size: int, *end: bytes, **overrides: str) -> Iterator[Flood]:
    """Yields when the upstream can send no more. Its stream has `size` bytes of events, then `end`.

    Later requests get a short answer.
    """
    floods: list[Flood] = []
    peers: list[Peer] = []
    may_pour = threading.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        if peers:
            await peer.sse(*GOOD)
            return
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        await peer.head()
        peers.append(peer)
        await asyncio.to_thread(may_pour.wait, PATIENCE)
        pouring = asyncio.ensure_future(pour(peer, floods[0]))
        await peer.gone()
        floods[0].closed = time.monotonic()
        pouring.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await pouring

    async def pour(peer: Peer, flood: Flood) -> None:
        for part in chain(repeat(ROW, size // len(ROW)), end):
            await peer.chunk(part)
            flood.pushed += len(part)
            flood.sent.update(part)
        await peer.end()

    with (
        ScriptedUpstream(script) as upstream,
        running(upstream.base_url, loop=loop, **overrides) as proxy,
        raw_chat(proxy, buffers=SMALL) as client,
    ):
        eventually(lambda: peers and proxy.service.app.active_scopes)
        floods.append(Flood(proxy, client, peers[0]))
        proxy.on_loop(narrow(proxy))
        may_pour.set()
        eventually(floods[0].has_stalled)
        yield floods[0]


def narrow(proxy: Running) -> Callable[[], None]:
    """Makes the receive buffers of the proxy's upstream sockets small."""
    transport: Any = proxy.service.app.transport

    def narrow_now() -> None:
        for connection in transport._connections:
            end = connection._transport.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)

    return narrow_now


@fault(24)
@both_loops
def test_a_slow_client_slows_the_upstream_and_gets_all(loop: str) -> None:
    """While the client does not read, the upstream is paused and few bytes are held; then every byte arrives."""
    with flooding(loop, 8 << 20, finish(), USAGE, DONE) as flood:
        assert flood.pushed < flood.bound() < 2 << 20
        stopped_at = flood.pushed
        time.sleep(0.5)
        assert flood.pushed == stopped_at
        received = hashlib.sha256()
        for chunk in chunks(flood.client):
            received.update(chunk)
        assert received.hexdigest() == flood.sent.hexdigest()
        line = flood.proxy.line()
        assert (line["ending"], line["status"], line["code"]) == ("complete", 200, None)
        assert line["bytes"] == flood.pushed
        assert line["tokens"] == 7
        assert len(flood.peer.upstream.seen) == 1
        assert set(flood.proxy.tokens_used().values()) == {7}  # what the upstream counted


@both_loops
def test_a_client_that_reads_now_and_then(loop: str) -> None:
    """A client that pauses many times never has more than the bound held for it, and loses no byte."""
    with flooding(loop, 4 << 20, DONE) as flood:
        received, taken, stops = hashlib.sha256(), 0, 0
        for chunk in chunks(flood.client):
            received.update(chunk)
            taken += len(chunk)
            assert flood.pushed - taken < flood.bound()
            if taken > stops * 200_000:
                stops += 1
                time.sleep(0.02)
        assert stops > 10
        assert received.hexdigest() == flood.sent.hexdigest()
        assert flood.proxy.line()["ending"] == "complete"


@both_loops
def test_total_timeout_ends_the_upstream_of_a_client_that_does_not_read(loop: str) -> None:
    """The upstream call ends although the client does not read; it still gets whole events and the reason."""
    with flooding(loop, FOREVER, UPSTREAM_TOTAL_TIMEOUT="1.5", UPSTREAM_IDLE_TIMEOUT="0.6") as flood:
        arrived = flood.peer.seen.arrived if flood.peer.seen else 0
        eventually(lambda: flood.closed)
        assert 1.4 < flood.closed - arrived < 1.5 + PATIENCE / 2
        assert flood.proxy.lines() == []  # the last event waits for the reader
        body = b"".join(chunks(flood.client))
        events, last = body[: body.rindex(b"data:")], body[body.rindex(b"data:") :]
        assert events == ROW * (len(events) // len(ROW))
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "stream_too_long"
        line = flood.proxy.line()
        assert (line["ending"], line["code"]) == ("timeout", "stream_too_long")
        assert line["tokens"] >= line["events"] >= len(events) // len(ROW)
        assert set(flood.proxy.tokens_used().values()) == {line["tokens"]}


@both_loops
def test_a_client_with_an_unread_answer_holds_no_upstream(loop: str) -> None:
    """A second answer whose head cannot be written still has its deadlines, and its client receives it whole."""
    answer = b'{"choices":[],"x":"%b"}' % (b"x" * 500_000)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.whole(answer)
        await peer.request()
        await peer.head()
        await peer.chunk(ROW)
        await peer.gone()

    settings = {"UPSTREAM_TOTAL_TIMEOUT": "1.2", "UPSTREAM_IDLE_TIMEOUT": "0.4", "SERVER_COMMENT_SECONDS": "0.2"}
    with (
        ScriptedUpstream(script) as upstream,
        running(upstream.base_url, loop=loop, **settings) as proxy,
        raw_chat(proxy, buffers=SMALL, stream=False) as client,
    ):
        eventually(lambda: proxy.blocked_clients)
        client.sendall(chat_request(proxy).replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
        asked = eventually(lambda: upstream.seen[1:])[0]
        eventually(lambda: asked.closed)
        assert asked.closed is not None
        assert asked.closed - asked.arrived > 1.0
        with client.makefile("rb") as file:
            _, _, second = file.read().partition(answer)
        assert second.startswith(b"HTTP/1.1 200 OK\r\n")
        assert second.count(b"data: ") == second.count(b'"code":"stream_too_long"') == 1
        assert second.endswith(b"\r\n0\r\n\r\n")
        eventually(lambda: [line for line in proxy.lines() if line["code"] == "stream_too_long"])
        assert proxy.lines("bug") == []


@both_loops
def test_idle_timeout_does_not_end_a_stream_that_waits_for_its_reader(loop: str) -> None:
    """idle_timeout does not count while the upstream is paused: the answer continues when the client reads."""
    with flooding(loop, 2 << 20, DONE, UPSTREAM_IDLE_TIMEOUT="1") as flood:
        time.sleep(2)
        assert not flood.closed
        received = b"".join(chunks(flood.client))
        assert hashlib.sha256(received).hexdigest() == flood.sent.hexdigest()
        assert flood.proxy.line()["ending"] == "complete"


@both_loops
def test_a_blocked_stream_does_not_delay_other_clients(loop: str) -> None:
    """Other clients are served while one does not read."""
    with flooding(loop, FOREVER) as flood:
        before = time.monotonic()
        for _ in range(20):
            assert chat(flood.proxy).body == b"".join(GOOD)
        assert time.monotonic() - before < PATIENCE / 2
        assert not flood.closed
