"""The server: the listener, uvicorn with a guarded protocol, signals, drain.

Rules:
1. We make the listening socket ourselves, with TCP_NODELAY on: accepted sockets inherit it whatever uvicorn does.
2. What a socket may do to us has a bound: sockets an address, bytes it does not take, requests it piles up.
3. First SIGTERM or Ctrl-C: no new work, live answers go on for `drain_seconds`, then end with an event. Second: now.
4. Nothing of uvicorn's own texts reaches a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import termios
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import certifi
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from proxy.app import ChatProxy
from proxy.edge import parse_address
from proxy.errors import InvalidRequest
from proxy.logs import Bridge, Logs
from proxy.metrics import Metrics
from proxy.settings import Server as ServerSettings
from proxy.settings import Settings, on_port
from proxy.transport import Transport
from proxy.visit import API_HEADERS

BACKLOG = 2048
WRITE_DEADLINE = 30.0  # seconds a client may leave our bytes untaken: longer than any hiccup, short of a leak
LOOKS = 10  # at what clients have not taken, within one WRITE_DEADLINE
LAST_WORDS = 2.0  # seconds for the final events of a drain to reach their browsers
FLUSH = 5  # seconds uvicorn may take to close what is left
GC_THRESHOLDS = (50_000, 20, 50)  # streams make little garbage in cycles; the default looks for it far too often


def listen(server: ServerSettings) -> socket.socket:
    """The listening socket. Raises OSError."""
    if server.socket:
        return listen_on_path(Path(server.socket))
    family, kind, proto, _, address = socket.getaddrinfo(
        server.host, server.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def listen_on_path(path: Path) -> socket.socket:
    """A Unix socket that its owner and group may use; a dead one of an earlier run is replaced."""
    if path.is_socket() and not is_alive(path):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o117)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def is_alive(path: Path) -> bool:
    """Does somebody listen there?"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def as_bound(settings: Settings, listener: socket.socket) -> Settings:
    """The settings with the port that the kernel chose, when it was asked to."""
    if settings.server.socket or settings.server.port:
        return settings
    return on_port(settings, listener.getsockname()[1])


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol for one connection, within bounds. The app of its config says which bounds."""

    _address: str | None = None
    _unsent = 0  # bytes that the client had not taken when we looked last
    _stuck_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        guard: Guard = self.config.app  # type: ignore[assignment]
        if self.client is not None and not guard.admit(self.client[0]):
            transport.abort()
        elif self.client is not None:
            self._address = self.client[0]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            guard: Guard = self.config.app  # type: ignore[assignment]
            guard.leave(self._address)
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """Who half-closes is gone; the loop would first wait until all that was written is taken."""
        if self.is_answering:
            self.hang_up()

    # A second request while one is live ends the connection, however little of it has come: uvicorn would put it in
    # the first one's place and stop reading, and so nobody would see the first one's disconnect.

    def data_received(self, data: bytes) -> None:
        if self.is_answering and not self.cycle.more_body:
            self.hang_up()
        else:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        if self.is_answering:
            self.hang_up()
        else:
            super().on_headers_complete()

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def hang_up(self) -> None:
        """Closes at once, and tells the request that is being answered, before more of this read can change it."""
        self.transport.abort()
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def send_400_response(self, msg: str) -> None:
        if self.is_answering and self.cycle.response_started:
            self.hang_up()
            return
        if self.is_answering:  # it broke off within its body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = InvalidRequest("The request is not valid HTTP.").body()
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *API_HEADERS]
        lines = [
            STATUS_LINE[400],
            *(name + b": " + value + b"\r\n" for name, value in head),
            b"connection: close\r\n\r\n",
        ]
        self.transport.write(b"".join([*lines, body]))
        self.transport.close()

    def resume_writing(self) -> None:
        self._unsent = 0  # the client took most of what waited
        super().resume_writing()

    def check_writing(self, now: float) -> None:
        """Aborts when the client has taken nothing of what waits for it for WRITE_DEADLINE seconds.

        As much as before is the sign of that. More is none: it may take less than comes, until the buffer is full.
        """
        unsent = self.transport.get_write_buffer_size() + unsent_by_kernel(self.transport)
        if not unsent or unsent != self._unsent:
            self._unsent, self._stuck_since = unsent, now
        elif now - self._stuck_since >= WRITE_DEADLINE:
            self.transport.abort()


def unsent_by_kernel(transport: asyncio.Transport) -> int:
    """Bytes in the socket's send queue that the client has not acknowledged (tcp(7), SIOCOUTQ)."""
    try:
        queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):  # the socket has just gone
        return 0
    return int.from_bytes(queued, sys.byteorder)


class Guard:
    """The application as uvicorn sees it, and the count of sockets by address."""

    def __init__(self, app: ChatProxy) -> None:
        self.app = app
        self.most = app.settings.server.connections_per_address
        self.sockets: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    def admit(self, address: str) -> bool:
        """Counts a socket in; not those of trusted proxies, which speak for many."""
        parsed = parse_address(address)
        if self.sockets[address] >= self.most and not (parsed and self.app.edge.is_proxy(parsed)):
            return False
        self.sockets[address] += 1
        return True

    def leave(self, address: str) -> None:
        self.sockets[address] -= 1
        if not self.sockets[address]:
            del self.sockets[address]


class Uvicorn(uvicorn.Server):
    """uvicorn without its signal handling: it re-raises signals after shutdown, and exit would not be 0."""

    def end(self) -> None:
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def uvicorn_for(app: Any, keep_alive: float, **more: Any) -> Uvicorn:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the edge walks X-Forwarded-For itself; uvicorn would have rewritten the peer before
        ws="none",
        timeout_keep_alive=int(keep_alive),
        timeout_graceful_shutdown=FLUSH,
        **more,
    )
    return Uvicorn(config)


class MetricsPage:
    """`/metrics`, on a listener of its own that the outside does not see."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = scope["path"] == "/metrics"
        body = self.metrics.exposition() if found else b"see /metrics\n"
        headers = [
            (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": 200 if found else 404, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class Service:
    """One running chat-proxy: its servers and the way it ends."""

    def __init__(
        self, settings: Settings, listener: socket.socket, logs: Logs, metrics_listener: socket.socket | None = None
    ) -> None:
        self.listener = listener
        self.metrics_listener = metrics_listener
        self.logs = logs
        self.drain_seconds = settings.server.drain_seconds
        self.app = ChatProxy(settings, transport=Transport(ssl_context=ssl_context(settings)), logs=logs)
        keep_alive = settings.server.keep_alive_seconds
        self.server = uvicorn_for(Guard(self.app), keep_alive, http=GuardedProtocol, lifespan="on")
        self.metrics = uvicorn_for(MetricsPage(self.app.metrics), keep_alive, lifespan="off")
        self.ending = asyncio.Event()
        self.at_once = asyncio.Event()

    async def run(self) -> None:
        """Serves until a signal, then drains. Returns when the last answer has ended."""
        bridge = Bridge(self.logs)
        library = logging.getLogger("uvicorn.error")
        library.addHandler(bridge)
        library.propagate = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        loop.add_signal_handler(signal.SIGHUP, self.app.reload_secrets)
        try:
            await self.serve()
        finally:
            library.removeHandler(bridge)
            self.logs.close()

    async def serve(self) -> None:
        servers = [(self.server, self.listener)]
        if self.metrics_listener is not None:
            servers.append((self.metrics, self.metrics_listener))
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self.look_at_writers()
        async with asyncio.TaskGroup() as tasks:
            for server, listener in servers:
                tasks.create_task(server.serve(sockets=[listener]))
            await self.ending.wait()
            await self.drain()
            for server, _ in servers:
                server.end()
        self.next_look.cancel()

    def look_at_writers(self) -> None:
        """One timer for all connections: a deadline of each write would be paid by every token."""
        loop = asyncio.get_running_loop()
        for connection in list(self.server.server_state.connections):
            cast(GuardedProtocol, connection).check_writing(loop.time())
        self.next_look = loop.call_later(WRITE_DEADLINE / LOOKS, self.look_at_writers)

    def end(self) -> None:
        """What a signal does: the first begins the drain, the second ends it."""
        if self.ending.is_set():
            self.at_once.set()
        self.ending.set()

    async def drain(self) -> None:
        """Lets live answers run on, then ends them with an event, and waits for the events to get through."""
        self.app.draining = True
        self.logs.line("draining", live=len(self.app.live))
        await first_of(self.drain_seconds, self.app.quiet, self.at_once)
        self.app.cut()
        await first_of(LAST_WORDS, self.app.quiet)
        for connection in list(self.server.server_state.connections):
            if self.app.busy:  # with somebody who does not take our last words
                connection.transport.abort()


async def first_of(seconds: float, *events: asyncio.Event) -> None:
    """Returns when one of the events is set, or the time is over."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for future in waiting:
        future.cancel()


def ssl_context(settings: Settings) -> ssl.SSLContext | None:
    """None for the transport's own roots, or those with the operator's beside them."""
    if not settings.upstream.ca_file:
        return None
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_verify_locations(settings.upstream.ca_file)
    return context
