"""The way to the upstream: an `httpx.AsyncBaseTransport` on an asyncio Protocol, with httptools as the parser.

    Transport         httpx's API: holds the sockets, keeps the idle ones, retries once on a stale one
    ResponseStream    the consumer's end of one exchange: pushed into a Sink, or pulled with `async for`
    _Connection       one socket: who gets its bytes, and what becomes of it
    _Answer           one response out of socket reads: framing and bounds, no I/O
    _Outgoing         one request as bytes: grammar and framing, no I/O

Rules:
1. One socket per live stream, no pool to queue in. What is cancelled, times out or is closed early is aborted at once;
   a finished connection is idle before its consumer hears of the end.
2. An exchange is ended through its ResponseStream only: its connection may by then serve somebody else.
3. httptools parses, strictly, with no leniency switched on. What it cannot know (the end of a body framed by EOF, the
   missing body of a HEAD, that nothing may follow the end) is tracked here.
4. What was parsed before a fault is delivered, then the fault: an answer that broke never looks like one that ended.
5. Errors are httpx's own, as its default transport raises them; `__cause__` is the OSError or ssl.SSLError behind one.
6. A body fragment costs one C call, a socket read one call of the sink: no task, timer or future per read.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import InitVar, dataclass, field
from functools import cache
from typing import Protocol, cast

import certifi
import httptools
import httpx

MAX_FIELDS = 100  # of one header section; servers send 10 to 30, and each costs memory
MAX_BARREN_BYTES = 65536  # in a row with no body byte among them (heads, trailers); servers send 1 to 8 KiB
HELD_HIGH_WATER = 65536  # held body bytes that stop the reading; one more read, 256 KiB, may come on top
STALE_SECONDS = 2.0  # a race with the server's idle limit is lost within a round trip, not later
IDLE_SECONDS = 30.0  # below the 60 to 75 s of common front ends, so that this race is rare
MAX_IDLE = 100  # sockets kept for nobody; beyond it the oldest goes

TIMEOUTS = {"read": httpx.ReadTimeout, "write": httpx.WriteTimeout}  # there is no pool to time out
Origin = tuple[str, str, int]  # scheme, host, port: what a connection can be used again for
VERSIONS = {"1.1": b"HTTP/1.1", "1.0": b"HTTP/1.0"}
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch  # RFC 9110 section 5.6.2
TARGET = re.compile(rb"[!-~]+").fullmatch
VALUE = re.compile(rb"[\t -~\x80-\xff]*").fullmatch  # RFC 9110 section 5.5


class Sink(Protocol):
    """Takes a body as it comes off the socket. Neither method may raise: it would break the connection."""

    def data(self, data: bytes) -> None:
        """Decoded body bytes, once per socket read. May call the stream's `pause`, `resume` or `abort`."""

    def end(self, error: httpx.TransportError | None) -> None:
        """Once, and last; None when the body is complete by its framing. Never called after the consumer's `abort`."""


class _Outgoing:
    """A request as bytes, for one attempt. What could be read differently is a LocalProtocolError instead."""

    __slots__ = ("_left", "head")

    def __init__(self, request: httpx.Request) -> None:
        method, target, raw = request.method.encode(), request.url.raw_path, request.headers.raw
        legal = all([TOKEN(name) and VALUE(value) for name, value in raw])
        if not (legal and TOKEN(method) and TARGET(target)):
            raise httpx.LocalProtocolError("illegal character in the method, the target or a header")
        fields = b"".join([b"%b: %b\r\n" % field for field in raw])
        self.head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method, target, fields)
        names = [name.lower() for name, _ in raw]
        lengths, codings = names.count(b"content-length"), names.count(b"transfer-encoding")
        if names.count(b"host") != 1 or lengths + codings > 1:
            raise httpx.LocalProtocolError("not one Host, or several headers that frame the body")
        framing = b"transfer-encoding" if codings else b"content-length"
        value = raw[names.index(framing)][1] if lengths or codings else b"0"
        if not (value.lower() == b"chunked" if codings else value.isdigit()):
            raise httpx.LocalProtocolError(f"{framing.decode()} is {value.decode('latin-1')!r}")
        self._left = None if codings else int(value)  # body bytes still to come, if their number is declared

    def frame(self, part: bytes) -> bytes:
        """One part of the body as it goes out."""
        if self._left is None:
            return b"%x\r\n%b\r\n" % (len(part), part) if part else b""
        self._left -= len(part)
        if self._left < 0:
            raise httpx.LocalProtocolError("the body is longer than Content-Length says")
        return part

    def last(self) -> bytes:
        """What goes out after the last part."""
        if self._left:
            raise httpx.LocalProtocolError("the body is shorter than Content-Length says")
        return b"0\r\n\r\n" if self._left is None else b""


@dataclass(slots=True, eq=False)
class _Answer:
    """One response out of socket reads. Nothing raises: a malformed answer shows in `fault`."""

    to_head: bool
    status: int = 0  # 0 until the headers of the final (not 1xx) response are in
    reason: bytes = b""
    version: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    keep_alive: bool = False
    silent: bool = True  # not one byte came
    ended: bool = False  # no further byte belongs to it
    fault: httpx.TransportError | None = None
    on_body: Callable[[bytes], None] = field(init=False)
    _parser: httptools.HttpResponseParser = field(init=False)
    _framed: bool = False  # its headers tell where the body ends
    _barren: int = 0
    _fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    _fragments: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.on_body = self._fragments.append  # called by the parser, with no Python frame
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """The body bytes that one socket read holds."""
        self.silent = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._stop(error.__context__ or error)  # raised by a callback below, or by the parser
        fragments = self._fragments
        if not fragments:
            self._barren += len(data)
            if self._barren > MAX_BARREN_BYTES:
                self._stop(httpx.RemoteProtocolError("headers or trailers without an end"))
            return b""
        self._barren = 0
        body = fragments[0] if len(fragments) == 1 else b"".join(fragments)
        fragments.clear()
        return body

    def eof(self) -> None:
        """The server has sent its last byte, which ends a body that nothing else frames (RFC 9112 section 6.3)."""
        if self.status and not self._framed:
            self.ended = True
        else:
            when = "before its answer" if self.silent else "in the middle of its answer"
            self._stop(httpx.RemoteProtocolError(f"the server closed the connection {when}"))

    def close(self) -> None:
        """Breaks the cycle of the parser and its callbacks."""
        del self._parser

    def _stop(self, error: BaseException) -> None:
        """Nothing further can be read. After the end, that only means that the connection is of no more use."""
        self.keep_alive = False
        if not self.ended:
            self.ended = True
            if not isinstance(error, httpx.TransportError):
                error = httpx.RemoteProtocolError(str(error))
            self.fault = error

    def on_message_begin(self) -> None:
        if self.ended:
            raise httpx.RemoteProtocolError("bytes after the end of the answer")

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self._fields) == MAX_FIELDS:
            raise httpx.RemoteProtocolError("too many headers or trailers")
        self._fields.append((name, value.rstrip(b" \t")))  # the parser strips the left side only

    def on_headers_complete(self) -> None:
        fields, self._fields = self._fields, []  # what comes later are trailers, and dropped
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self.reason = b""
            return
        self.version = VERSIONS.get(self._parser.get_http_version(), b"")
        if status < 200 or not self.version:
            raise httpx.RemoteProtocolError("a status or a version that nobody asked for")
        size = len(self.reason)
        for name, value in fields:
            size += len(name) + len(value)
            if (kind := name.lower()) in (b"content-length", b"transfer-encoding"):
                if self._framed or (kind == b"transfer-encoding" and value.lower() != b"chunked"):
                    raise httpx.RemoteProtocolError("a body framed twice, or in a coding other than chunked")
                self._framed = True
        if size > MAX_BARREN_BYTES:
            raise httpx.RemoteProtocolError("too many bytes of headers")
        self.status, self.headers, self.keep_alive = status, fields, self._parser.should_keep_alive()
        if self.to_head:
            self.ended = True
            raise httpx.RemoteProtocolError("the parser would read what follows a HEAD as its body")

    def on_message_complete(self) -> None:
        self.ended = self.status > 0


def _unheard(data: bytes) -> None:
    """Takes what is said to a connection without a stream."""


@dataclass(slots=True, eq=False, repr=False)
class _Connection(asyncio.Protocol):
    """One socket, from before it is connected until it is lost. Serves one stream at a time."""

    owner: Transport
    origin: Origin
    deadline: asyncio.Timeout | None = None  # while it is connecting
    idle_since: float = 0.0
    writable: bool = True
    deliver: Callable[[bytes], None] = _unheard  # a sink's `data`, or the stream's `hold`
    _transport: asyncio.Transport | None = None
    _stream: ResponseStream | None = None
    _reading: bool = True

    def begin(self, stream: ResponseStream) -> None:
        self._stream = stream
        self.deliver = stream._hold

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        stream = self._stream
        if stream is None:
            self.abort()  # nobody asked for these bytes, so no next answer could be trusted
            return
        answer = stream._answer
        body = answer.feed(data)
        if body:
            self.deliver(body)
        elif answer.status:
            stream._wake()
        if answer.ended and self._stream is stream:
            self._settle(stream)

    def eof_received(self) -> None:
        if self._stream is None:
            self.abort()
        else:
            self._stream._answer.eof()
            self._settle(self._stream)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._stream is None:
            self.abort()
        elif exc is None:  # on uvloop, a TLS connection that ends without close_notify: it may have been cut
            self.fail(httpx.RemoteProtocolError("the server closed the connection within the TLS session"))
        else:
            failed = httpx.WriteError if self._stream._sending else httpx.ReadError
            self.fail(failed(str(exc) or type(exc).__name__), cause=exc)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self._stream is not None:
            self._stream._wake()

    @property
    def open(self) -> asyncio.Transport | None:
        """What can be written to and paused: uvloop raises on a transport that is closing."""
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
        """Closes the socket now, with no lingering. The stream is told nothing."""
        self._detach()
        if self._transport is None:
            self.owner._forget(self)
        else:
            self.owner._idle.pop(self, None)
            self._transport.abort()  # connection_lost comes back here

    def fail(self, error: httpx.TransportError, *, cause: Exception | None = None) -> None:
        """Closes the socket now, and tells the stream."""
        error.__cause__ = cause
        stream = self._stream
        self.abort()
        if stream is not None:
            stream._finish(error)

    def _settle(self, stream: ResponseStream) -> None:
        """The answer has ended: the connection is kept or closed, and then the stream hears of it."""
        self._detach()
        answer, transport = stream._answer, self.open
        sent = not stream._sending and transport is not None and not transport.get_write_buffer_size()
        if answer.keep_alive and sent:
            self.resume()
            self.owner._keep(self)
        else:
            self.abort()
        stream._finish(answer.fault)

    def _detach(self) -> None:
        if self._stream is not None:
            self._stream._answer.close()
            self._stream = None
            self.deliver = _unheard


@dataclass(slots=True, eq=False, repr=False)
class ResponseStream(httpx.AsyncByteStream):
    """The body of one response. Either `attach` a Sink or iterate; `aclose` it, or `abort` it without an await.

    Iterating raises ReadTimeout, ReadError or RemoteProtocolError. An attached sink's `end` gets the latter two; its
    deadlines are the consumer's own, and `pause` and `resume` are for it.
    """

    connection: InitVar[_Connection]
    request: InitVar[httpx.Request]
    _connection: _Connection | None = field(init=False)
    _answer: _Answer = field(init=False)
    _timeouts: dict[str, float | None] = field(init=False)
    _began: float = field(init=False)
    _sending: bool = True
    _held: bytearray = field(default_factory=bytearray)
    _ended: bool = False
    _error: httpx.TransportError | None = None
    _taken: bool = False
    _sink: Sink | None = None
    _paused: bool = False
    _waiter: asyncio.Future[None] | None = None

    def __post_init__(self, connection: _Connection, request: httpx.Request) -> None:
        self._connection = connection
        self._answer = _Answer(to_head=request.method == "HEAD")
        self._timeouts = request.extensions.get("timeout", {})
        self._began = asyncio.get_running_loop().time()
        connection.begin(self)

    def attach(self, sink: Sink) -> None:
        """Pushes the body into `sink`, first what is held. Raises StreamConsumed when it is being read already."""
        self._take()
        self._sink = sink
        if not self._paused:
            self._flow()

    def pause(self) -> None:
        """Stops the reading of the socket, and all calls of the sink, until `resume`."""
        self._paused = True
        if self._connection is not None:
            self._connection.deliver = self._hold
            self._connection.pause()

    def resume(self) -> None:
        """Delivers what was held meanwhile, and reads on."""
        if self._paused:
            self._paused = False
            self._flow()

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._take()
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
        """Aborts the socket of an unfinished answer. That of a finished one is idle already."""
        self.abort()

    def abort(self) -> None:
        """`aclose` without the await. An attached sink hears nothing more."""
        self._sink = None
        self._held.clear()
        if self._connection is not None:
            self._connection.fail(httpx.ReadError("the stream was closed"))

    def _take(self) -> None:
        if self._taken:
            raise httpx.StreamConsumed
        self._taken = True

    def _hold(self, data: bytes) -> None:
        """Where the body goes while nobody takes it."""
        self._held += data
        if self._connection is not None and len(self._held) > HELD_HIGH_WATER:
            self._connection.pause()
        self._wake()

    def _flow(self) -> None:
        """Pushes what is held, then the end or whatever comes. The sink may pause or abort in each call."""
        if self._held and self._sink is not None:
            held = bytes(self._held)
            self._held.clear()
            self._sink.data(held)
        if self._sink is None or self._paused:
            return
        if self._connection is not None:
            self._connection.deliver = self._sink.data
            self._connection.resume()
        else:
            sink, self._sink = self._sink, None
            sink.end(self._error)

    def _finish(self, error: httpx.TransportError | None) -> None:
        """The connection is done with this stream."""
        self._connection, self._ended, self._error = None, True, error
        self._wake()
        if not self._paused:
            self._flow()

    def _failure(self, error: httpx.TransportError) -> httpx.TransportError:
        """The error that it ended with, to be raised, and not kept: an error keeps the frames it comes through."""
        self._error = httpx.ReadError("the stream has failed already")
        return error

    async def _exchange(self, request: httpx.Request, outgoing: _Outgoing) -> httpx.Response:
        """Sends the request and returns when the headers of the response are in."""
        answer = self._answer
        try:
            await self._send(request, outgoing)
            while not answer.status:
                if self._error is not None:
                    raise self._failure(self._error)
                await self._wait("read")
        except BaseException:
            self.abort()
            raise
        headers, answer.headers = answer.headers, []
        extensions = {"http_version": answer.version, "reason_phrase": answer.reason}
        return httpx.Response(answer.status, headers=headers, stream=self, extensions=extensions)

    async def _send(self, request: httpx.Request, outgoing: _Outgoing) -> None:
        """Writes the request. An answer that comes early ends it: any answer the waiting, a refusal the sending too."""
        body, mark_sent = request.stream, request.extensions.get("sent", _unmarked)
        if isinstance(body, httpx.ByteStream):
            whole = outgoing.head + outgoing.frame(b"".join(body)) + outgoing.last()
            mark_sent()
            await self._write(whole, unless=200)
        else:
            await self._write(outgoing.head, unless=400)
            async for part in _parts(body):
                if self._is_answered(400):
                    return
                await self._write(outgoing.frame(part), unless=400)
            last = outgoing.last()
            mark_sent()
            await self._write(last, unless=400)
        self._sending = False

    async def _write(self, data: bytes, *, unless: int) -> None:
        connection = self._connection
        if connection is not None:
            connection.write(data)
            while not (connection.writable or self._is_answered(unless)):
                await self._wait("write")

    def _is_answered(self, least: int) -> bool:
        """Is the exchange over, or answered with a status of at least this?"""
        return self._ended or self._answer.status >= least

    def _is_stale(self) -> bool:
        """Did the server close the idle connection while the request was on its way?"""
        return self._answer.silent and asyncio.get_running_loop().time() - self._began < STALE_SECONDS

    async def _wait(self, what: str) -> None:
        """Sleeps until `_wake`. However else that ends, by a timeout or a cancellation, the socket is aborted."""
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        seconds = self._timeouts.get(what)
        timer = None if seconds is None else loop.call_later(seconds, _expire, waiter, TIMEOUTS[what])
        try:
            await waiter
        except BaseException:
            self.abort()
            raise
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _unmarked() -> None:
    """Stands for `extensions["sent"]` where nobody asked."""


def _expire(waiter: asyncio.Future[None], expired: type[httpx.TimeoutException]) -> None:
    if not waiter.done():
        waiter.set_exception(expired("the server took too long"))


async def _parts(body: httpx.SyncByteStream | httpx.AsyncByteStream) -> AsyncIterator[bytes]:
    if isinstance(body, httpx.AsyncByteStream):
        async for part in body:
            yield part
    else:
        for part in body:
            yield part


@cache
def default_ssl_context() -> ssl.SSLContext:
    """The same one each time: to read some hundred roots takes 20 ms, and nobody changes it."""
    return ssl.create_default_context(cafile=certifi.where())


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
        self._connections: set[_Connection] = set()
        self._idle: dict[_Connection, None] = {}  # in the order in which they became idle
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
        goes to the socket: from then on the server may be at work.
        """
        origin = _origin(request.url)
        outgoing = _Outgoing(request)
        if (connection := self._reuse(origin)) is not None:
            stream = ResponseStream(connection, request)
            try:
                return await stream._exchange(request, outgoing)
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                if not (stream._is_stale() and isinstance(request.stream, httpx.ByteStream)):
                    raise
            outgoing = _Outgoing(request)
        connection = await self._connect(origin, request.extensions.get("timeout", {}).get("connect"))
        return await ResponseStream(connection, request)._exchange(request, outgoing)

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

    async def _connect(self, origin: Origin, seconds: float | None) -> _Connection:
        connect = asyncio.get_running_loop().create_connection
        connection = _Connection(self, origin)
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
            self._forget(connection)  # after a cancellation uvloop calls no connection_lost
            if isinstance(error, TimeoutError) and not self._closed:
                raise httpx.ConnectTimeout("the server took too long to connect") from error
            if isinstance(error, (OSError, ValueError)):  # ValueError: a host name that no resolver takes
                raise httpx.ConnectError(str(error) or type(error).__name__) from error
            raise
        finally:
            connection.deadline = None
        return connection

    def _reuse(self, origin: Origin) -> _Connection | None:
        """The connection of this origin that became idle last, the likeliest to be alive."""
        oldest = asyncio.get_running_loop().time() - self._idle_seconds
        for connection in reversed(self._idle):
            if connection.origin == origin and connection.open and connection.idle_since > oldest:
                del self._idle[connection]
                return connection
        return None

    def _keep(self, connection: _Connection) -> None:
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

    def _forget(self, connection: _Connection) -> None:
        """Its socket is gone."""
        self._idle.pop(connection, None)
        self._connections.discard(connection)
        if not self._connections:
            self._emptied.set()


def _origin(url: httpx.URL) -> Origin:
    if url.scheme not in ("http", "https"):
        raise httpx.UnsupportedProtocol(f"the scheme is {url.scheme!r}, not http or https")
    return url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80)
