"""HTTP/1.1 as bytes: one request out, one response in. Pure: grammar, framing and bounds, no I/O.

Rules:
1. httptools parses, strictly, with no leniency enabled. What it cannot know (the end of a body framed by EOF, the
   missing body of a HEAD, that nothing may follow the end) is tracked here.
2. The bytes parsed before a fault are delivered, then the fault: a broken answer never looks like a complete one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools
import httpx

MAX_FIELDS = 100  # of one header section; servers send 10 to 30, and each costs memory
MAX_BARREN_BYTES = 65536  # in a row with no body byte among them (heads, trailers); servers send 1 to 8 KiB
VERSIONS = {"1.1": b"HTTP/1.1", "1.0": b"HTTP/1.0"}
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch  # RFC 9110 section 5.6.2
TARGET = re.compile(rb"[!-~]+").fullmatch
VALUE = re.compile(rb"[\t -~\x80-\xff]*").fullmatch  # RFC 9110 section 5.5


class OutgoingRequest:
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
            raise httpx.LocalProtocolError("the body is longer than Content-Length")
        return part

    def last(self) -> bytes:
        """The bytes after the last part of the body."""
        if self._left:
            raise httpx.LocalProtocolError("the body is shorter than Content-Length")
        return b"0\r\n\r\n" if self._left is None else b""


@dataclass(slots=True, eq=False)
class ResponseParser:
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
    _framed: bool = False  # its headers define where the body ends
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
        """Ends parsing. After the end of the answer that only makes the connection unusable."""
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
            raise httpx.RemoteProtocolError("a status or a version that was not requested")
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
