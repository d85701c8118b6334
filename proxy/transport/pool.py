"""The httpx transport: opens connections, keeps the idle ones, and retries once on a stale one.

Its live streams are unlimited, so there is no queue in which an aborted request could keep its place.
"""

from __future__ import annotations

import asyncio
import ssl

import httpx

from proxy.transport.connection import Connection, Origin, ResponseStream
from proxy.transport.framing import OutgoingRequest
from proxy.transport.tls import default_ssl_context

IDLE_SECONDS = 30.0  # below the 60 to 75 s of common front ends, so that reuse rarely races with their idle limit
MAX_IDLE = 100  # idle sockets; beyond it the oldest is closed


class Transport(httpx.AsyncBaseTransport):
    """Sends requests to any origin over HTTP/1.1, on one event loop. Unlimited in its live streams.

    `ssl_context` replaces the default one, which trusts certifi's roots. A finished connection waits `idle_seconds`
    for the next request; at most `max_idle` do.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | None = None,
        idle_seconds: float = IDLE_SECONDS,
        max_idle: int = MAX_IDLE,
    ) -> None:
        self._ssl_context = ssl_context or default_ssl_context()
        self._idle_seconds = idle_seconds
        self._max_idle = max_idle
        self._connections: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # in the order in which they became idle
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._emptied = asyncio.Event()

    @property
    def open_sockets(self) -> int:
        """Every socket held: live, idle and connecting."""
        return len(self._connections)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Returns when the headers of the final response are in; its `stream` is a ResponseStream.

        Raises ConnectError, ConnectTimeout, ReadError, ReadTimeout, WriteError, WriteTimeout, RemoteProtocolError,
        LocalProtocolError and UnsupportedProtocol. `request.extensions["sent"]`, if there, is called as the last byte
        is written to the socket: from then on the server may be working on the request.
        """
        origin = origin_of(request.url)
        outgoing = OutgoingRequest(request)
        if (connection := self.reuse(origin)) is not None:
            stream = ResponseStream(connection, request)
            try:
                return await stream.exchange(request, outgoing)
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                if not (stream.is_stale() and isinstance(request.stream, httpx.ByteStream)):
                    raise
            outgoing = OutgoingRequest(request)
        connection = await self._connect(origin, request.extensions.get("timeout", {}).get("connect"))
        return await ResponseStream(connection, request).exchange(request, outgoing)

    async def aclose(self) -> None:
        """Aborts every socket and returns when the last one is gone.

        Live streams end with a ReadError; requests that are still connecting, and any later one, with a ConnectError.
        """
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in tuple(self._connections):
            if connection.deadline is None:
                connection.fail(httpx.ReadError("the transport was closed"))
            elif not connection.deadline.expired():
                connection.deadline.reschedule(0)
        if self._connections:
            self._emptied.clear()
            await self._emptied.wait()

    async def _connect(self, origin: Origin, seconds: float | None) -> Connection:
        connect = asyncio.get_running_loop().create_connection
        connection = Connection(self, origin)
        scheme, host, port = origin
        tls, name = (self._ssl_context, host) if scheme == "https" else (None, None)
        self._connections.add(connection)
        try:
            async with asyncio.timeout(seconds) as connection.deadline:
                if not self._closed:
                    await connect(lambda: connection, host, port, ssl=tls, server_hostname=name)
            if self._closed or not connection.open:
                raise ConnectionAbortedError("the connection was closed before its first request")
        except BaseException as error:
            connection.abort()
            self.forget(connection)  # after a cancellation uvloop calls no connection_lost
            if isinstance(error, TimeoutError) and not self._closed:
                raise httpx.ConnectTimeout("the server took too long to connect") from error
            if isinstance(error, (OSError, ValueError)):  # ValueError: a host name that no resolver takes
                raise httpx.ConnectError(str(error) or type(error).__name__) from error
            raise
        finally:
            connection.deadline = None
        return connection

    def reuse(self, origin: Origin) -> Connection | None:
        """The connection of this origin that became idle last, the likeliest to be alive."""
        oldest = asyncio.get_running_loop().time() - self._idle_seconds
        for connection in reversed(self._idle):
            if connection.origin == origin and connection.open and connection.idle_since > oldest:
                del self._idle[connection]
                return connection
        return None

    def keep(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle[connection] = None
        if len(self._idle) > self._max_idle:
            next(iter(self._idle)).abort()
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._idle_seconds, self._sweep)

    def _sweep(self) -> None:
        """Closes what has been idle too long; one timer for all connections."""
        self._sweeper = None
        loop = asyncio.get_running_loop()
        for connection in tuple(self._idle):
            expires = connection.idle_since + self._idle_seconds
            if expires > loop.time():
                self._sweeper = loop.call_at(expires, self._sweep)
                return
            connection.abort()

    def remove_idle(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def forget(self, connection: Connection) -> None:
        """Its socket is gone."""
        self._idle.pop(connection, None)
        self._connections.discard(connection)
        if not self._connections:
            self._emptied.set()


def origin_of(url: httpx.URL) -> Origin:
    if url.scheme not in ("http", "https"):
        raise httpx.UnsupportedProtocol(f"the scheme is {url.scheme!r}, not http or https")
    return url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80)
