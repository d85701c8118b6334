"""One connection to a server, and the response stream of the exchange on it.

    ResponseStream    the consumer's end of one exchange: pushed into a Sink, or pulled with `async for`
    Connection        one socket: the stream that gets its bytes, and how it ends

Rules:
1. One socket per live stream. An exchange that is cancelled, times out or is closed early aborts it at once; a finished
   connection is idle before its consumer learns of the end.
2. An exchange is ended through its ResponseStream only: its connection may by then serve another one.
3. The bytes parsed before a fault are delivered, then the fault: a broken answer never looks like a complete one.
4. Errors are httpx's own, as its default transport raises them; `__cause__` is the OSError or ssl.SSLError behind one.
5. A body fragment costs one C call, a socket read one call of the sink: no task, timer or future per read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol, cast

import httpx

from proxy.transport.framing import OutgoingRequest, ResponseParser

HELD_HIGH_WATER = 65536  # held body bytes that pause reading; one more read, 256 KiB, may be added
STALE_SECONDS = 2.0  # a race with the server's idle limit is lost within a round trip, not later

TIMEOUTS = {"read": httpx.ReadTimeout, "write": httpx.WriteTimeout}  # there is no pool that could time out
Origin = tuple[str, str, int]  # scheme, host, port: a connection is reused for the same origin only


class Sink(Protocol):
    """Receives a body from the socket. Neither method may raise: that would break the connection."""

    def data(self, data: bytes) -> None:
        """Decoded body bytes, once per socket read. May call the stream's `pause`, `resume` or `abort`."""

    def end(self, error: httpx.TransportError | None) -> None:
        """Once, and last; None when the body is complete by its framing. Never called after the consumer's `abort`."""


def discard(data: bytes) -> None:
    """The receiver of a connection without a stream."""


class Owner(Protocol):
    """The pool of a connection."""

    def keep(self, connection: Connection) -> None:
        """The connection is idle."""

    def remove_idle(self, connection: Connection) -> None:
        """The connection is not idle any more."""

    def forget(self, connection: Connection) -> None:
        """The socket is closed."""


@dataclass(slots=True, eq=False, repr=False)
class Connection(asyncio.Protocol):
    """One socket, from before it is connected until it is lost. Serves one stream at a time."""

    owner: Owner
    origin: Origin
    deadline: asyncio.Timeout | None = None  # while it is connecting
    idle_since: float = 0.0
    writable: bool = True
    _deliver: Callable[[bytes], None] = discard
    _transport: asyncio.Transport | None = None
    _stream: ResponseStream | None = None
    _reading: bool = True

    def begin(self, stream: ResponseStream) -> None:
        self._stream = stream
        self.deliver_to(stream.hold)

    def deliver_to(self, receiver: Callable[[bytes], None]) -> None:
        """Sets where body bytes go: a sink's `data`, the stream's `hold`, or `discard`."""
        self._deliver = receiver

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        stream = self._stream
        if stream is None:
            self.abort()  # bytes that no request asked for: a later answer could not be trusted
            return
        parser = stream.parser
        body = parser.feed(data)
        if body:
            self._deliver(body)
        elif parser.status:
            stream.wake()
        if parser.ended and self._stream is stream:
            self._settle(stream)

    def eof_received(self) -> None:
        if self._stream is None:
            self.abort()
        else:
            self._stream.parser.eof()
            self._settle(self._stream)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._stream is None:
            self.abort()
        elif exc is None:  # on uvloop, a TLS connection that ends without close_notify: it may have been cut
            self.fail(httpx.RemoteProtocolError("the server closed the connection within the TLS session"))
        else:
            failed = httpx.WriteError if self._stream.is_sending else httpx.ReadError
            self.fail(failed(str(exc) or type(exc).__name__), cause=exc)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self._stream is not None:
            self._stream.wake()

    @property
    def open(self) -> asyncio.Transport | None:
        """The socket, if it can be written to and paused: uvloop raises on a transport that is closing."""
        return None if self._transport is None or self._transport.is_closing() else self._transport

    def write(self, data: bytes) -> None:
        if transport := self.open:
            transport.write(data)

    def pause(self) -> None:
        if self._reading and (transport := self.open):
            self._reading = False
            transport.pause_reading()

    def resume(self) -> None:
        if not self._reading and (transport := self.open):
            self._reading = True
            transport.resume_reading()

    def abort(self) -> None:
        """Closes the socket at once. The stream is not notified."""
        self._detach()
        if self._transport is None:
            self.owner.forget(self)
        else:
            self.owner.remove_idle(self)
            self._transport.abort()  # connection_lost calls this again

    def fail(self, error: httpx.TransportError, *, cause: Exception | None = None) -> None:
        """Closes the socket at once, and ends the stream with the error."""
        error.__cause__ = cause
        stream = self._stream
        self.abort()
        if stream is not None:
            stream.finish(error)

    def _settle(self, stream: ResponseStream) -> None:
        """The answer has ended: keeps or closes the connection, then ends the stream."""
        self._detach()
        parser, transport = stream.parser, self.open
        sent = not stream.is_sending and transport is not None and not transport.get_write_buffer_size()
        if parser.keep_alive and sent:
            self.resume()
            self.owner.keep(self)
        else:
            self.abort()
        stream.finish(parser.fault)

    def _detach(self) -> None:
        if self._stream is not None:
            self._stream.parser.close()
            self._stream = None
            self.deliver_to(discard)


class ResponseStream(httpx.AsyncByteStream):
    """The body of one response. Either `attach` a Sink or iterate; `aclose` it, or `abort` it without an await.

    Iterating raises ReadTimeout, ReadError or RemoteProtocolError. An attached sink's `end` gets the latter two; its
    deadlines are the consumer's own, and `pause` and `resume` are for it.
    """

    __slots__ = (
        "_began",
        "_connection",
        "_consumed",
        "_ended",
        "_error",
        "_held",
        "_paused",
        "_sink",
        "_timeouts",
        "_waiter",
        "is_sending",
        "parser",
    )

    def __init__(self, connection: Connection, request: httpx.Request) -> None:
        self.parser = ResponseParser(to_head=request.method == "HEAD")
        self.is_sending = True
        self._connection: Connection | None = connection
        self._timeouts: dict[str, float | None] = request.extensions.get("timeout", {})
        self._began = asyncio.get_running_loop().time()
        self._held = bytearray()
        self._ended = False
        self._error: httpx.TransportError | None = None
        self._consumed = False
        self._sink: Sink | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        connection.begin(self)

    def attach(self, sink: Sink) -> None:
        """Pushes the body into `sink`, first the held bytes. Raises StreamConsumed when it is already being read."""
        self._consume()
        self._sink = sink
        if not self._paused:
            self._flow()

    def pause(self) -> None:
        """Pauses the socket, and all calls of the sink, until `resume`."""
        self._paused = True
        if self._connection is not None:
            self._connection.deliver_to(self.hold)
            self._connection.pause()

    def resume(self) -> None:
        """Delivers the bytes held meanwhile, and continues reading."""
        if self._paused:
            self._paused = False
            self._flow()

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._consume()
        return self

    async def __anext__(self) -> bytes:
        while not self._held:
            if self._error is not None:
                raise self._failure(self._error)
            if self._ended:
                raise StopAsyncIteration
            await self._wait("read")
        body = bytes(self._held)
        self._held.clear()
        if self._connection is not None:
            self._connection.resume()
        return body

    async def aclose(self) -> None:
        """Aborts the socket of an unfinished answer. After a finished one the socket is already idle."""
        self.abort()

    def abort(self) -> None:
        """`aclose` without the await. An attached sink is not called again."""
        self._sink = None
        self._held.clear()
        if self._connection is not None:
            self._connection.fail(httpx.ReadError("the stream was closed"))

    def _consume(self) -> None:
        if self._consumed:
            raise httpx.StreamConsumed
        self._consumed = True

    def hold(self, data: bytes) -> None:
        """Holds body bytes while there is no sink."""
        self._held += data
        if self._connection is not None and len(self._held) > HELD_HIGH_WATER:
            self._connection.pause()
        self.wake()

    def _flow(self) -> None:
        """Pushes the held bytes, then the end or what follows. The sink may pause or abort in each call."""
        if self._held and self._sink is not None:
            held = bytes(self._held)
            self._held.clear()
            self._sink.data(held)
        if self._sink is None or self._paused:
            return
        if self._connection is not None:
            self._connection.deliver_to(self._sink.data)
            self._connection.resume()
        else:
            sink, self._sink = self._sink, None
            sink.end(self._error)

    def finish(self, error: httpx.TransportError | None) -> None:
        """The connection no longer serves this stream."""
        self._connection, self._ended, self._error = None, True, error
        self.wake()
        if not self._paused:
            self._flow()

    def _failure(self, error: httpx.TransportError) -> httpx.TransportError:
        """The error that ended the stream, to be raised once: a kept error would keep the frames it passed through."""
        self._error = httpx.ReadError("the stream has failed already")
        return error

    async def exchange(self, request: httpx.Request, outgoing: OutgoingRequest) -> httpx.Response:
        """Sends the request and returns when the headers of the response are in."""
        parser = self.parser
        try:
            await self._send(request, outgoing)
            while not parser.status:
                if self._error is not None:
                    raise self._failure(self._error)
                await self._wait("read")
        except BaseException:
            self.abort()
            raise
        headers, parser.headers = parser.headers, []
        extensions = {"http_version": parser.version, "reason_phrase": parser.reason}
        return httpx.Response(parser.status, headers=headers, stream=self, extensions=extensions)

    async def _send(self, request: httpx.Request, outgoing: OutgoingRequest) -> None:
        """Writes the request. Any early answer ends the waiting; an error status ends the sending as well."""
        body, mark_sent = request.stream, request.extensions.get("sent", not_observed)
        if isinstance(body, httpx.ByteStream):
            whole = outgoing.head + outgoing.frame(b"".join(body)) + outgoing.last()
            mark_sent()
            await self._write(whole, unless=200)
        else:
            await self._write(outgoing.head, unless=400)
            async for part in parts_of(body):
                if self._is_answered(400):
                    return
                await self._write(outgoing.frame(part), unless=400)
            last = outgoing.last()
            mark_sent()
            await self._write(last, unless=400)
        self.is_sending = False

    async def _write(self, data: bytes, *, unless: int) -> None:
        connection = self._connection
        if connection is not None:
            connection.write(data)
            while not (connection.writable or self._is_answered(unless)):
                await self._wait("write")

    def _is_answered(self, least: int) -> bool:
        """Whether the exchange is over, or answered with at least this status."""
        return self._ended or self.parser.status >= least

    def is_stale(self) -> bool:
        """Whether the server closed the idle connection while the request was on its way."""
        return self.parser.silent and asyncio.get_running_loop().time() - self._began < STALE_SECONDS

    async def _wait(self, what: str) -> None:
        """Sleeps until `wake`. A timeout or a cancellation aborts the socket."""
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        seconds = self._timeouts.get(what)
        timer = None if seconds is None else loop.call_later(seconds, expire, waiter, TIMEOUTS[what])
        try:
            await waiter
        except BaseException:
            self.abort()
            raise
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def not_observed() -> None:
    """The default of `extensions["sent"]`."""


def expire(waiter: asyncio.Future[None], expired: type[httpx.TimeoutException]) -> None:
    if not waiter.done():
        waiter.set_exception(expired("the server took too long"))


async def parts_of(body: httpx.SyncByteStream | httpx.AsyncByteStream) -> AsyncIterator[bytes]:
    if isinstance(body, httpx.AsyncByteStream):
        async for part in body:
            yield part
    else:
        for part in body:
            yield part
