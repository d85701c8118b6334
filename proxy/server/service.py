"""The service: runs the server until a signal, then drains it.

Rules:
1. First SIGTERM or Ctrl-C: no new requests; live answers go on for `drain_seconds`, then end with an event. The second
   one ends them at once.
2. Some descriptors are kept in reserve: while they run short, new requests are refused with 503, and those under way
   are not affected.
3. A retiring worker stops accepting, serves at most one more request per open connection, then drains.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from proxy.app import ChatProxy
from proxy.server.protocol import Guard, GuardedProtocol
from proxy.server.runner import bridged, uvicorn_for
from proxy.settings import Settings
from proxy.telemetry.logs import Logs
from proxy.transport.pool import Transport
from proxy.transport.tls import upstream_ssl_context

LAST_EVENTS = 2.0  # seconds for the final events of a drain to reach the clients
LAST_REQUESTS = 5.0  # seconds for requests on idle connections of a retiring worker: a busy pool has used them by then
DESCRIPTORS_USED = 0.8  # of those allowed: beyond it new requests are refused
OWN_DESCRIPTORS = 32  # not caused by clients: listeners, the log, the event loop's, the libraries' files
GC_THRESHOLDS = (50_000, 20, 50)  # streams make few reference cycles; the defaults collect far too often


class MetricsPage:
    """`/metrics`, on a listener of its own that is not public."""

    def __init__(self, exposition: Callable[[], Awaitable[bytes]]) -> None:
        self.exposition = exposition

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exists = scope["path"] == "/metrics"
        body = await self.exposition() if exists else b"see /metrics\n"
        headers = [
            (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": 200 if exists else 404, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class Service:
    """One running chat-proxy: its servers, and how it stops."""

    def __init__(
        self, settings: Settings, listener: socket.socket, logs: Logs, metrics_listener: socket.socket | None = None
    ) -> None:
        self.listener = listener
        self.metrics_listener = metrics_listener
        self.logs = logs
        self.drain_seconds = settings.server.drain_seconds
        self.transport = Transport(ssl_context=upstream_ssl_context(settings.upstream.ca_file))
        self.app = ChatProxy(settings, transport=self.transport, logs=logs)
        self.most_sockets = resource.getrlimit(resource.RLIMIT_NOFILE)[0] * DESCRIPTORS_USED - OWN_DESCRIPTORS
        self.guard = Guard(
            self.app,
            most_sockets=settings.server.connections_per_address,
            subscriber=self.app.edge.subscriber_at,
            is_proxy=self.app.edge.is_proxy_at,
            note=self.app.note_no_request,
            is_crowded=self.is_crowded,
        )
        keep_alive = settings.server.keep_alive_seconds
        self.server = uvicorn_for(self.guard, keep_alive, http=GuardedProtocol, lifespan="on")
        self.metrics = uvicorn_for(MetricsPage(self.exposition), keep_alive, lifespan="off")
        self.retiring = asyncio.Event()
        self.ending = asyncio.Event()
        self.at_once = asyncio.Event()

    async def run(self, on_signal: Callable[[], None] | None = None) -> None:
        """Serves until a signal, then drains. Returns when the last answer has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal or self.end)
        loop.add_signal_handler(signal.SIGHUP, self.app.reload_secrets)
        try:
            with bridged(self.logs):
                await self.serve()
        finally:
            self.logs.close()

    async def serve(self) -> None:
        servers = [(self.server, self.listener)]
        if self.metrics_listener is not None:
            servers.append((self.metrics, self.metrics_listener))
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        asyncio.get_running_loop().set_exception_handler(self.note_uncaught)
        self.guard.start()
        async with asyncio.TaskGroup() as tasks:
            for server, listener in servers:
                tasks.create_task(server.serve(sockets=[listener]))
            await first_of(None, self.retiring, self.ending)
            if not self.ending.is_set():
                await self.retire()
            await self.drain()
            for server, _ in servers:
                server.end()
        self.guard.stop()

    def note_uncaught(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs an exception that no code awaits. The loop itself would print it to stderr, with the text it quotes."""
        if (error := context.get("exception")) is not None:
            self.logs.bug(error)
        else:
            self.logs.line("library", "error", logger="asyncio", message=context["message"][:200])

    async def exposition(self) -> bytes:
        return self.app.metrics.exposition()

    def is_crowded(self) -> bool:
        """Whether clients and upstream calls hold so many sockets that descriptors may run out."""
        return len(self.guard.open) + self.transport.open_sockets > self.most_sockets

    def end(self) -> None:
        """Handles a signal: the first begins the drain, the second ends it."""
        if self.ending.is_set():
            self.at_once.set()
        self.ending.set()

    async def retire(self) -> None:
        """Stops accepting, and serves the open connections until they close or a signal comes."""
        for listening in self.server.servers:
            listening.close()
        self.guard.retire(LAST_REQUESTS)
        self.logs.line("retiring", connections=len(self.guard.open))
        await first_of(LAST_REQUESTS, self.guard.left_by_all, self.ending)
        self.guard.close_idle()
        await first_of(None, self.guard.left_by_all, self.ending)

    async def drain(self) -> None:
        """Lets live answers go on, then ends them with an event, and waits until the events are delivered."""
        self.app.draining = True
        self.logs.line("draining", live=len(self.app.active_scopes))
        await first_of(self.drain_seconds, self.app.quiet, self.at_once)
        self.app.cut()
        await first_of(LAST_EVENTS, self.app.quiet)
        for connection in tuple(self.guard.open):
            if connection.is_answering:  # the client does not read its last event
                connection.transport.abort()


async def first_of(seconds: float | None, *events: asyncio.Event) -> None:
    """Returns when one of the events is set, or the time is over."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in waiting:
            future.cancel()


def allow_all_descriptors() -> None:
    """Raises the soft limit to the hard one: the usual 1024 is for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems report no limit and then refuse it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
