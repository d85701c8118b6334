"""uvicorn's httptools protocol within bounds: what a connection may cost before, during and after its requests.

Rules:
1. Everything that a connection uses has a bound: the time, bytes and fields of a request's head, the connections of an
   address, pipelined requests, the descriptors of all connections. (The kernel bounds unread bytes: listener.py.)
2. A request that two programs could read differently is refused, not interpreted: nginx in front must have read the
   same one.
3. No text of uvicorn's own reaches a client: refusals here have the shape of all other errors.
4. One timer checks the deadlines of all connections: a timer for each would cost every request.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from proxy.errors import Busy, HeaderList, HeadersTooLarge, InvalidRequest, Refusal, RequestTimeout
from proxy.web.headers import bare_headers

HEAD_SECONDS = 10.0  # for a request's head to be in, from the socket's first moment or the request's first byte
MAX_HEAD_BYTES = 32 * 1024  # nginx passes on 4 x 8 KiB; browsers stop at 4 KiB a cookie
FRAMING_PER_BYTE = 8  # bytes of a body: as much as chunks of one byte each have
MAX_FIELDS = 100  # browsers send 15 to 25, proxies add a few
TICK = 0.5  # seconds between two checks of the deadlines

HOST = re.compile(rb"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")  # RFC 9110 section 7.2, without oddities
CLOSE = (b"connection", b"close")
PROBES = (b"/healthz", b"/readyz")


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol for one connection, within bounds. The app of its config is the Guard."""

    _counted_as: str | None = None  # among the sockets of one subscriber
    spent = 0  # bytes of the current request without its body: head, chunk sizes, extensions, trailers
    is_over = False  # the last response is written

    # ---- the socket comes and goes --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client is not None:
            self._counted_as = self.guard.admit(self.client[0])
            if self._counted_as is None:
                transport.abort()
                return
        self.guard.wait_for(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.leave(self, self._counted_as)
        if self.cycle is not None:
            self.cycle.transport = self.transport  # a LastAnswer would keep us
        self._unset_keepalive_if_required()  # uvicorn forgets it after a reset, and the timer would keep all of this
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """A half-close counts as a disconnect; the loop would first wait until the client has read everything."""
        if self.is_answering:
            self.disconnect()

    @property
    def guard(self) -> Guard:
        return cast(Guard, self.config.app)

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_idle(self) -> bool:
        """Between two requests: no byte of the next has arrived."""
        return not self.is_answering and not self.is_in_body and not self.spent

    @property
    def is_in_body(self) -> bool:
        """The head of a request has arrived, its body has not; it may be answered already."""
        return self.cycle is not None and self.cycle.more_body

    # ---- a request comes in ---------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.is_over:
            return  # further bytes are read only so that a reset does not lose the last response
        if self.is_answering and not self.is_in_body:
            # A second request while one is live, however little of it has come: uvicorn would put it in the first
            # one's place and stop reading, so that the first one's disconnect would go unnoticed.
            self.disconnect()
            return
        if not self.is_in_body:
            self.guard.expect(self)
        self.spent += len(data)
        super().data_received(data)
        if self.spent > most_beside_body(self) and not self.is_over:
            self.refuse(HeadersTooLarge())

    def on_headers_complete(self) -> None:
        if self.is_answering:
            self.disconnect()
            return
        check_request(self)
        self.guard.reading.pop(self, None)
        super().on_headers_complete()
        if self.guard.is_retiring:
            self.cycle.keep_alive = False
        if not self.cycle.keep_alive:
            self.cycle.transport = cast(asyncio.Transport, LastAnswer(self))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.is_in_body:  # a trailer, which must not become a header
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self.spent -= (1 + FRAMING_PER_BYTE) * len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body:  # answered before its body has arrived, which is dropped for a while
            if self.expect_100_continue:
                self.transport.close()  # it is unknown whether the body follows
            else:
                self.guard.wait_for(self)

    def on_message_complete(self) -> None:
        if self.spent > most_beside_body(self):
            raise HeadersTooLarge
        self.spent = 0
        super().on_message_complete()
        if self.cycle.response_complete:
            self.cycle.more_body = False
            self.guard.wait_for(self)

    # ---- refusing -------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when the parser or a callback of it raised, while the error is handled."""
        error = sys.exc_info()[1]
        cause = error.__context__ if error is not None else None
        self.refuse(cause if isinstance(cause, Refusal) else InvalidRequest("The request is not valid HTTP."))

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade was refused, or its connection closed."""

    def refuse(self, refusal: Refusal) -> None:
        """Answers, and closes."""
        if self.is_in_body and self.cycle.response_started:
            self.disconnect()
            return
        if self.is_answering:  # the error is within its body
            self.cycle.waiting_for_100_continue = False
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        else:
            self.guard.note(self.client[0] if self.client else None, refusal)
        self.transport.write(as_bytes(refusal))
        self.close_half()

    def close(self) -> None:
        """Closes after the last response, which may precede the end of its request's body."""
        if self.is_in_body and not self.transport.is_closing():
            self.close_half()
        else:
            self.transport.close()

    def close_half(self) -> None:
        """Closes this half. The other half is read for a while; otherwise a reset might lose the response."""
        self.is_over = True
        self.transport.write_eof()
        self.guard.wait_for(self)

    def disconnect(self) -> None:
        """Closes at once, and ends the request that is being answered, before more of this read can change it."""
        self.transport.abort()
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def expire(self) -> None:
        """HEAD_SECONDS are over: refuses an incomplete request, closes a silent connection."""
        if self.spent and not self.is_over:
            self.refuse(RequestTimeout())
            self.transport.close()
        else:
            self.transport.abort()


class LastAnswer:
    """The transport that uvicorn uses for the last response of a connection, and closes after it."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, connection: GuardedProtocol) -> None:
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing
        self.close = connection.close


def check_request(connection: GuardedProtocol) -> None:
    """Raises a Refusal, which the parser brings to send_400_response."""
    if connection.spent > MAX_HEAD_BYTES and size_of(connection.url, connection.headers) > MAX_HEAD_BYTES:
        raise HeadersTooLarge
    if connection.parser.should_upgrade():
        raise InvalidRequest("This server accepts HTTP/1.1 only, without upgrades.")
    check_head(connection.parser.get_http_version(), connection.url, connection.headers)
    if connection.guard.is_crowded() and connection.url not in PROBES:
        raise Busy


def most_beside_body(connection: GuardedProtocol) -> int:
    return 2 * MAX_HEAD_BYTES if connection.is_in_body else MAX_HEAD_BYTES


def check_head(version: str, target: bytes, headers: HeaderList) -> None:
    """Raises a Refusal for a head that is too long in fields, or that is not plainly one request to this server.

    The parser has refused most of what is malformed; this is what it lets pass (RFC 9112 sections 3.2 and 6.1).
    """
    if len(headers) > MAX_FIELDS:
        raise HeadersTooLarge
    if version not in ("1.0", "1.1"):
        raise InvalidRequest("This server accepts HTTP/1.1 only.")
    if not target.startswith(b"/") or b"#" in target:
        raise InvalidRequest("The request's target must be a path.")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1") or not all(HOST.fullmatch(host.strip()) for host in hosts):
        raise InvalidRequest("The request needs exactly one valid Host.")
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings and (version == "1.0" or len(codings) > 1 or codings[0].strip().lower() != b"chunked"):
        raise InvalidRequest("The request's body must be framed by its length, or chunked.")


def size_of(target: bytes, headers: HeaderList) -> int:
    """The bytes of a head, without separators."""
    return len(target) + sum(len(name) + len(value) for name, value in headers)


def as_bytes(refusal: Refusal) -> bytes:
    """A whole response, for bytes that never became a request."""
    body = refusal.body()
    fields = [field for field in bare_headers(refusal, body) if field != CLOSE]  # some have it already
    lines = [STATUS_LINE[refusal.status], *(b"%b: %b\r\n" % field for field in (*fields, CLOSE)), b"\r\n"]
    return b"".join([*lines, body])


class Guard:
    """The ASGI application of uvicorn, and the state that all of its connections share.

    `most_sockets` is the limit of one subscriber (`subscriber` maps an address to it), except for trusted proxies
    (`is_proxy`). `note` records each refusal that never became a request. `is_crowded`: the process is about to run
    out of descriptors.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        most_sockets: int,
        subscriber: Callable[[str], str],
        is_proxy: Callable[[str], bool],
        note: Callable[[str | None, Refusal], None],
        is_crowded: Callable[[], bool],
    ) -> None:
        self.app = app
        self.most_sockets = most_sockets
        self.subscriber = subscriber
        self.is_proxy = is_proxy
        self.note = note
        self.is_crowded = is_crowded
        self.sockets: Counter[str] = Counter()
        self.open: set[GuardedProtocol] = set()
        self.reading: dict[GuardedProtocol, float] = {}  # incomplete requests, since when; oldest first
        self.is_retiring = False
        self.left_by_all = asyncio.Event()  # while retiring: the last connection is closed
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    # ---- sockets --------------------------------------------------------------------------------------------------

    def admit(self, address: str) -> str | None:
        """Counts a socket. Returns its subscriber, or None when there are too many already."""
        subscriber = self.subscriber(address)
        if self.sockets[subscriber] >= self.most_sockets and not self.is_proxy(address):
            return None
        self.sockets[subscriber] += 1
        return subscriber

    def leave(self, connection: GuardedProtocol, counted_as: str | None) -> None:
        self.open.discard(connection)
        self.reading.pop(connection, None)
        self.note_if_left()
        if counted_as is not None:
            self.sockets[counted_as] -= 1
            if not self.sockets[counted_as]:
                del self.sockets[counted_as]

    def expect(self, connection: GuardedProtocol) -> None:
        """Starts the deadline for the rest of a request's head, if it is not running."""
        if connection not in self.reading:
            self.reading[connection] = asyncio.get_running_loop().time()

    def wait_for(self, connection: GuardedProtocol) -> None:
        """Starts the deadline for the next request, or for the client to close."""
        self.open.add(connection)
        self.reading.pop(connection, None)
        self.expect(connection)

    def retire(self, idle: float) -> None:
        """Makes each further response the last on its connection; closes connections that are idle for so long."""
        self.is_retiring = True
        for connection in self.open:
            connection.timeout_keep_alive = idle  # type: ignore[assignment]  # only ever given to call_later
        self.note_if_left()

    def close_idle(self) -> None:
        for connection in tuple(self.open):
            if connection.is_idle:
                connection.transport.close()

    def note_if_left(self) -> None:
        if self.is_retiring and not self.open:
            self.left_by_all.set()

    # ---- time -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK, self.check_deadlines)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def check_deadlines(self) -> None:
        self.start()  # first, so that a bug does not stop the deadlines
        self.end_overdue(asyncio.get_running_loop().time())

    def end_overdue(self, now: float) -> None:
        while self.reading:
            connection, since = next(iter(self.reading.items()))
            if since + HEAD_SECONDS > now:
                return
            del self.reading[connection]
            connection.expire()
