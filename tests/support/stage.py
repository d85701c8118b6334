"""One server and one upstream for many faults in turn: starting a server for each would take long."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from proxy.chat import policy
from proxy.telemetry import logs
from support.harness import PATIENCE, Peer, Reply, Running, Script, ScriptedUpstream, chat, running

Act = Callable[[Peer], Awaitable[None]]  # answers one request at the upstream


def always(act: Act) -> Script:
    """A script that calls `act` for every request on a connection."""

    async def script(peer: Peer) -> None:
        while not peer.writer.is_closing():
            await peer.request()
            await act(peer)

    return script


def prompt_tokens(proxy: Running, **fields: Any) -> int:
    """The policy's estimate for the prompt of harness.chat."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    return policy.apply(json.dumps(body).encode(), proxy.settings.policy).prompt_tokens


class Steps:
    """A script that sends one part of its stream for each release of `allowed`. Without `ends` it stays open."""

    def __init__(self, *parts: bytes, ends: bool = True) -> None:
        self.parts = parts
        self.ends = ends
        self.allowed = threading.Semaphore(0)
        self.left = threading.Event()

    async def __call__(self, peer: Peer) -> None:
        await peer.request()
        await peer.head()
        for part in self.parts:
            await asyncio.to_thread(self.allowed.acquire, timeout=PATIENCE)
            await peer.chunk(part)
        if self.ends:
            await peer.end()
        await peer.gone()
        self.left.set()


class Stage:
    """The server and its upstream, which calls `act` for each request."""

    act: Act
    upstream: ScriptedUpstream
    proxy: Running

    def __init__(self, loop: str, **settings: str) -> None:
        self.loop = loop
        self.settings = settings

    @contextmanager
    def open(self) -> Iterator[Stage]:
        with (
            patch.object(logs, "BATCH_EVERY", 0.002),  # each case waits for its log line
            ScriptedUpstream(always(lambda peer: self.act(peer))) as self.upstream,
            running(self.upstream.base_url, loop=self.loop, **self.settings) as self.proxy,
        ):
            yield self

    def chat(self, act: Act, **fields: Any) -> tuple[Reply, dict[str, Any], int]:
        """Sends a request that `act` answers. Returns the reply, the log line, and the calls at the upstream."""
        self.act = act
        lines, calls = len(self.proxy.lines()), len(self.upstream.seen)
        reply = chat(self.proxy, **fields)
        line = self.proxy.line(lines + 1)
        return reply, line, len(self.upstream.seen) - calls

    def settled(self, before: dict[str, int]) -> dict[str, int]:
        """The tokens booked since tokens_used() returned `before`."""
        return {name: total - before.get(name, 0) for name, total in self.proxy.tokens_used().items()}
