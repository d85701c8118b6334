"""Clients of an nginx with TLS, one for HTTP/1.1 and one for HTTP/2, with the same few verbs.

Both show an answer as it comes, whether it was cut, and both can leave: HTTP/1.1 by closing its connection, HTTP/2 as
a browser does, by resetting the one stream on a connection that goes on.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset

from support.nginx import Front

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
JSON = {"content-type": "application/json"}


@dataclass
class Answer:
    """An answer to its end; `cut` when that was not the one that its framing announced."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: bool

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found

    @property
    def code(self) -> str:
        return str(self.error["code"])


class Exchange(Protocol):
    """One request and its answer, as it comes."""

    status: int
    headers: dict[str, str]

    def wait_for_head(self) -> None:
        """Returns when status and headers are in."""

    def part(self) -> bytes:
        """The next bytes of the body; none at its end. Raises ConnectionError when it is cut."""

    def leave(self) -> None:
        """As a browser does whose reader presses Stop."""


def folded(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """By lower-case name; what comes twice is joined with a comma."""
    found: dict[str, str] = {}
    for name, value in headers:
        name = name.lower()
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


class Http1:
    name = "http/1.1"

    def __init__(self, front: Front, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.connection = http.client.HTTPConnection(front.host)
        self.connection.sock = front.connect(self.name)
        self.connection.request(method, path, body or None, headers)
        self.answer: http.client.HTTPResponse | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    def wait_for_head(self) -> None:
        self.answer = self.connection.getresponse()
        self.status = self.answer.status
        self.headers = folded(self.answer.getheaders())

    def part(self) -> bytes:
        assert self.answer is not None
        try:
            return self.answer.read1(65536)
        except http.client.IncompleteRead:
            raise ConnectionError("cut") from None

    def leave(self) -> None:
        if self.answer is not None:
            self.answer.close()
        self.connection.close()


class Http2:
    name = "h2"

    def __init__(self, front: Front, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.sock = front.connect(self.name)
        self.protocol = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.protocol.initiate_connection()
        self.host = front.host
        self.events: list[Event] = []
        self.stream = self.status = 0
        self.headers: dict[str, str] = {}
        self.ask(method, path, headers, body)

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> None:
        """One more request, on the same connection. A body that is announced in `headers` may stay away."""
        self.stream = self.protocol.get_next_available_stream_id()
        self.status, self.headers = 0, {}
        names = {":method": method, ":authority": self.host, ":scheme": "https", ":path": path}
        if body:
            names["content-length"] = str(len(body))
        fields = {**names, **headers}
        self.protocol.send_headers(self.stream, [*fields.items()], end_stream="content-length" not in fields)
        self.flush()
        while body:
            most = min(self.protocol.local_flow_control_window(self.stream), self.protocol.max_outbound_frame_size)
            if not most:
                self.pump()
                continue
            part, body = body[:most], body[most:]
            self.protocol.send_data(self.stream, part, end_stream=not body)
            self.flush()

    def flush(self) -> None:
        self.sock.sendall(self.protocol.data_to_send())

    def pump(self) -> None:
        """Takes in what nginx says next."""
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("the connection was closed")
        self.events += self.protocol.receive_data(data)
        self.flush()

    def next(self) -> Event:
        """The next event of the request at hand."""
        while True:
            while not self.events:
                self.pump()
            event = self.events.pop(0)
            if getattr(event, "stream_id", None) == self.stream:
                return event

    def wait_for_head(self) -> None:
        event = self.next()
        while not isinstance(event, ResponseReceived):
            event = self.next()
        fields = folded((str(name), str(value)) for name, value in event.headers)
        self.status, self.headers = int(fields.pop(":status")), fields

    def part(self) -> bytes:
        while True:
            event = self.next()
            if isinstance(event, DataReceived):
                self.protocol.acknowledge_received_data(event.flow_controlled_length, self.stream)
                self.flush()
                if event.data:
                    return event.data
            elif isinstance(event, StreamEnded):
                return b""
            elif isinstance(event, StreamReset):
                raise ConnectionError("the stream was reset")

    def leave(self) -> None:
        self.protocol.reset_stream(self.stream, ErrorCodes.CANCEL)
        self.flush()

    def close(self) -> None:
        self.sock.close()


PROTOCOLS: dict[str, type[Http1] | type[Http2]] = {"HTTP/1.1": Http1, "HTTP/2": Http2}


@contextmanager
def exchange(
    front: Front,
    protocol: str,
    method: str = "GET",
    path: str = "/",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
) -> Iterator[Http1 | Http2]:
    """A request that has been sent."""
    begun = PROTOCOLS[protocol](front, method, path, headers or {}, body)
    try:
        yield begun
    finally:
        begun.close() if isinstance(begun, Http2) else begun.leave()


@contextmanager
def asking(
    front: Front,
    protocol: str,
    path: str = "/api/chat",
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> Iterator[Http1 | Http2]:
    """A question that has been sent; a streamed answer is asked for."""
    body = json.dumps(QUESTION | fields).encode()
    with exchange(front, protocol, "POST", path, JSON | (headers or {}), body) as begun:
        yield begun


def finish(begun: Exchange) -> Answer:
    """The rest of an answer."""
    if not begun.status:
        begun.wait_for_head()
    parts, cut = [], False
    try:
        while part := begun.part():
            parts.append(part)
    except ConnectionError:
        cut = True
    return Answer(begun.status, begun.headers, b"".join(parts), cut)


def read_until(begun: Exchange, wanted: bytes) -> bytes:
    """What came until `wanted` did."""
    if not begun.status:
        begun.wait_for_head()
    data = b""
    while wanted not in data:
        part = begun.part()
        assert part, f"ended before {wanted!r}: {data!r}"
        data += part
    return data


def get(front: Front, path: str, protocol: str = "HTTP/1.1", **headers: str) -> Answer:
    with exchange(front, protocol, path=path, headers=headers) as begun:
        return finish(begun)


def ask(front: Front, protocol: str = "HTTP/1.1", path: str = "/api/chat", **fields: Any) -> Answer:
    with asking(front, protocol, path, **fields) as begun:
        return finish(begun)
