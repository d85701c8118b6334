"""The guard: what sockets may do to us, through the real server, on raw sockets.

Every test has a deadline of its own staged; the figures of the product are long, and the same code holds them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.faults import fault
from support.harness import (
    DONE,
    FULL,
    GOOD,
    LOOPS,
    PATIENCE,
    STARTING,
    Peer,
    Running,
    ScriptedUpstream,
    chat,
    chat_request,
    chunks,
    connect,
    delta,
    environment,
    eventually,
    finish,
    free_port,
    raw_chat,
    read_until,
    reset,
    running,
    send,
    streaming,
)

from proxy.errors import HeadersTooLarge, InvalidRequest, Refusal
from proxy.server import listener as listener_module
from proxy.server import protocol as guard
from proxy.server.listener import listen_on_path
from proxy.server.protocol import MAX_FIELDS, MAX_HEAD_BYTES, check_head
from proxy.server.runner import bridged
from proxy.web import context as visit

SHORT = 0.6  # seconds: a deadline that a test waits for
SOON = 6.0  # seconds: ten times that

POST = "POST /api/chat HTTP/1.1"
JSON = "Content-Type: application/json"

both_loops = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_SECONDS", SHORT)
    monkeypatch.setattr(guard, "TICK", 0.05)
    monkeypatch.setattr(visit, "BODY_SECONDS", SHORT)


@contextmanager
def serving(loop: str = "uvloop", script: Any = None, **settings: str) -> Iterator[tuple[Running, ScriptedUpstream]]:
    with (
        ScriptedUpstream(script or streaming(*GOOD)) as upstream,
        running(upstream.base_url, loop=loop, **settings) as proxy,
    ):
        yield proxy, upstream


def head(proxy: Running, *lines: str, request: str = "GET /api/session HTTP/1.1", host: bool = True) -> bytes:
    own = [f"Host: 127.0.0.1:{proxy.port}"] if host else []
    return "\r\n".join([request, *own, *lines, "", ""]).encode("latin-1")


def to_the_end(sock: socket.socket) -> bytes:
    """All that comes until the server closes; a reset counts as the end."""
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionError:
        pass
    return data


def refused(answer: bytes) -> tuple[int, str]:
    """Status and code of a refusal in our shape that closes the connection."""
    top, _, body = answer.partition(b"\r\n\r\n")
    lines = top.lower().split(b"\r\n")
    assert b"connection: close" in lines
    assert b"content-type: application/json" in lines
    assert b"content-length: %d" % len(body) in lines
    error = json.loads(body)["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return int(lines[0].split()[1]), error["code"]


# ---- time -----------------------------------------------------------------------------------------------------------


@fault(30)
@both_loops
def test_a_silent_socket_is_closed_without_a_word(loop: str, hurried: None) -> None:
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        began = time.monotonic()
        assert to_the_end(sock) == b""
        assert SHORT / 2 < time.monotonic() - began < SOON
        assert proxy.lines() == []


@fault(30)
@both_loops
@pytest.mark.parametrize("reused", [False, True], ids=["first", "on a connection in use"])
def test_a_head_must_come_in_time(loop: str, reused: bool, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(loop) as (proxy, upstream), connect(proxy) as sock:
        if reused:
            sock.sendall(head(proxy, request="GET /healthz HTTP/1.1"))
            read_until(sock, b'{"status":"ok"}')
            time.sleep(SHORT * 1.5)  # waiting between requests is no fault
        assert refused(drip(sock, chat_request(proxy))) == (408, "request_timeout")
        monkeypatch.setattr(guard, "HEAD_SECONDS", 10 * PATIENCE)  # it was closed, and not for another deadline
        eventually(lambda: not proxy.service.guard.open)
        assert upstream.connections == 0
        assert (proxy.line()["status"], proxy.line()["code"]) == (408, "request_timeout")


def drip(sock: socket.socket, data: bytes) -> bytes:
    """Sends a byte at a time until the server has had enough; its answer."""
    deadline = time.monotonic() + SOON
    for place in range(len(data)):
        if select.select([sock], [], [], 0.05)[0]:
            return to_the_end(sock)
        assert time.monotonic() < deadline
        sock.sendall(data[place : place + 1])
    raise AssertionError("it was all taken")


@both_loops
def test_a_bug_of_a_deadline_does_not_end_them_all(
    loop: str, hurried: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next connection is closed in time, and the log has the bug's places, not its text."""

    def bug(connection: guard.GuardedProtocol) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(guard, "HEAD_SECONDS", SHORT)
        raise RuntimeError("what the visitor wrote")

    monkeypatch.setattr(guard.GuardedProtocol, "expire", bug)
    with serving(loop) as (proxy, _), connect(proxy):
        (line,) = eventually(lambda: proxy.lines("bug"))
        assert line["error"] == "RuntimeError"
        assert any("protocol.py" in place for place in line["at"])
        with connect(proxy) as sock:
            assert to_the_end(sock) == b""
        assert b"visitor wrote" not in proxy.output.getvalue()
    assert "visitor wrote" not in "".join(capfd.readouterr())


@both_loops
def test_an_upgrade_behind_a_request_is_not_worth_a_line(loop: str) -> None:
    """The connection is closed as for any second request, without uvicorn's advice about WebSockets."""
    with serving(loop) as (proxy, upstream), bridged(proxy.service.logs), connect(proxy) as sock:
        sock.sendall(chat_request(proxy) + head(proxy, request="CONNECT a:1 HTTP/1.1"))
        assert to_the_end(sock) == b""
        assert proxy.line()["ending"] == "aborted"
        assert proxy.lines("library") == []
        assert upstream.connections == 0


@both_loops
def test_empty_lines_are_no_request(loop: str, hurried: None) -> None:
    """Some clients send one line end too many; those that send nothing else are silent."""
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(b"\r\n" + head(proxy, request="GET /healthz HTTP/1.1"))
        read_until(sock, b'{"status":"ok"}')
        assert refused(drip(sock, b"\r\n" * 1000)) == (408, "request_timeout")


@fault(30)
@both_loops
@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_must_come_in_time(loop: str, framing: str, hurried: None) -> None:
    with serving(loop) as (proxy, upstream), connect(proxy) as sock:
        sock.sendall(head(proxy, "Content-Type: application/json", framing, request="POST /api/chat HTTP/1.1"))
        sock.sendall(b'5\r\n{"mes\r\n' if "chunked" in framing else b'{"mes')
        assert refused(to_the_end(sock)) == (408, "request_timeout")
        assert upstream.connections == 0
        assert proxy.line()["code"] == "request_timeout"
        assert set(proxy.tokens_used().values()) <= {0}


@both_loops
def test_a_long_body_may_take_longer(loop: str, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is added for what has come: a slow uplink is no drip."""
    monkeypatch.setattr(visit, "BODY_RATE", 1000)
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        request = chat_request(proxy, messages=[{"role": "user", "content": "x" * 6000}])
        for place in range(0, len(request), 1000):
            sock.sendall(request[place : place + 1000])
            time.sleep(SHORT / 3)
        assert b" 200 OK" in read_until(sock, DONE)


@both_loops
def test_what_comes_after_its_answer_is_dropped_for_a_while(loop: str, hurried: None) -> None:
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(head(proxy, "Content-Length: 30", request="POST /api/nowhere HTTP/1.1"))
        read_until(sock, b'"not_found"}}')
        sock.sendall(b"x" * 30 + head(proxy, request="GET /healthz HTTP/1.1"))
        read_until(sock, b'{"status":"ok"}')  # the rest came, and so the connection goes on
        sock.sendall(head(proxy, "Content-Length: 30", request="POST /api/nowhere HTTP/1.1") + b"x" * 29)
        assert to_the_end(sock).count(b"HTTP/1.1 ") == 1


@both_loops
def test_the_next_head_is_bounded_too(loop: str) -> None:
    """... after a body that came when its request was answered already."""
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(head(proxy, "Content-Length: 30", request="POST /api/nowhere HTTP/1.1"))
        read_until(sock, b'"not_found"}}')
        sock.sendall(b"x" * 30)
        eventually(lambda: not next(iter(proxy.service.guard.open)).is_in_body)
        sock.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 2 * MAX_HEAD_BYTES)
        assert refused(to_the_end(sock)) == (431, "headers_too_large")


@both_loops
def test_a_long_body_during_a_drain_is_told_so(loop: str) -> None:
    with serving(loop) as (proxy, upstream), connect(proxy) as sock:
        proxy.service.app.draining = True
        size = 6_000_000
        lines = ("Content-Type: application/json", f"Content-Length: {size}")
        sock.sendall(head(proxy, *lines, request="POST /api/chat HTTP/1.1") + b" " * size)
        assert refused(to_the_end(sock)) == (503, "draining")
        assert upstream.connections == 0


@both_loops
def test_an_answer_instead_of_100_continue_ends_the_connection(loop: str) -> None:
    """The client may send the body all the same: it could not be told apart from the next request."""
    lines = ("Content-Type: text/plain", "Content-Length: 30", "Expect: 100-continue")
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(head(proxy, *lines, request="POST /api/chat HTTP/1.1"))
        assert to_the_end(sock).startswith(b"HTTP/1.1 415 ")


@both_loops
def test_a_connection_that_was_reset_is_forgotten(loop: str) -> None:
    """... with all that it held, and not only when it would have been idle for too long."""
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(chat_request(proxy))
        read_until(sock, DONE)
        connection = weakref.ref(eventually(lambda: next(iter(proxy.service.guard.open), None)))
        time.sleep(0.1)  # the answer has ended, and the wait for another request begun
        reset(sock)
        sock.close()
        eventually(lambda: not proxy.service.guard.open)
        eventually(lambda: proxy.on_loop(gc.collect) >= 0 and connection() is None)


def slow_head(proxy: Running) -> bytes:
    return chat_request(proxy)[:40]


def slow_body(proxy: Running) -> bytes:
    return chat_request(proxy)[:-5]


def nothing(proxy: Running) -> bytes:
    return b""


@pytest.mark.quiet
@both_loops
def test_many_slow_sockets_disturb_nobody(loop: str, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow heads, slow bodies, silence and clients that do not read: all closed in time, beside a stream in peace."""
    monkeypatch.setattr(listener_module, "WRITE_DEADLINE", 2.0)
    monkeypatch.setattr(guard, "HEAD_SECONDS", 2.0)  # long enough for what each of them says at once
    monkeypatch.setattr(visit, "BODY_SECONDS", 2.0)
    count = 2000 if FULL else 200
    flood = [delta("x" * 60000)] * 400

    async def script(peer: Peer) -> None:
        seen = await peer.request()
        if seen.json["messages"][0]["content"] == "flood":
            await peer.sse(*flood, DONE)
            return
        await peer.head()
        while not peer.writer.is_closing():
            await peer.chunk(delta("tick"))
            await asyncio.sleep(0.02)

    with serving(loop, script) as (proxy, _), ExitStack() as sockets:
        good = sockets.enter_context(raw_chat(proxy))
        arrivals: list[tuple[float, bytes]] = []
        watcher = threading.Thread(
            target=lambda: arrivals.extend((time.monotonic(), event) for event in all_of(good)), daemon=True
        )
        watcher.start()
        slow = []
        for number in range(count):
            begin = (nothing, slow_head, slow_body)[number % 4] if number % 4 < 3 else None
            sock = sockets.enter_context(connect(proxy, buffers=4096 if begin is None else 0))
            sock.sendall(
                chat_request(proxy, messages=[{"role": "user", "content": "flood"}]) if begin is None else begin(proxy)
            )
            slow.append(sock)
        open_sockets = proxy.service.guard.open  # at first without those that nobody has accepted yet
        eventually(lambda: len(open_sockets) == 1 and len(proxy.lines()) >= count * 3 // 4, patience=30.0)
        good.shutdown(socket.SHUT_RDWR)
        watcher.join(PATIENCE)
        assert {bytes(part.replace(delta("tick"), b"")) for _, part in arrivals} == {b""}, arrivals[-3:]
        assert max(later - earlier for (earlier, _), (later, _) in pairwise(arrivals)) < 5.0
        assert len(arrivals) > 10
        codes = [line["code"] for line in eventually(lambda: lines_of(proxy, count * 3 // 4 + 1))]
        assert codes.count("request_timeout") == count // 2


def all_of(sock: socket.socket) -> Iterator[bytes]:
    with suppress(AssertionError, ConnectionError):  # we cut it ourselves at the end
        yield from chunks(sock)


def lines_of(proxy: Running, count: int) -> list[dict[str, Any]]:
    lines = proxy.lines()
    return lines if len(lines) >= count else []


# ---- size -----------------------------------------------------------------------------------------------------------


@both_loops
@pytest.mark.parametrize(
    "lines",
    [
        ["X-Long: " + "x" * MAX_HEAD_BYTES],
        [f"X-{number}: {'x' * 1000}" for number in range(MAX_HEAD_BYTES // 1000 + 1)],
        [f"X-{number}: x" for number in range(MAX_FIELDS)],
    ],
    ids=["one long field", "many bytes", "many fields"],
)
def test_a_head_has_a_bound(loop: str, lines: list[str]) -> None:
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(head(proxy, *lines))
        assert refused(to_the_end(sock)) == (431, "headers_too_large")
        assert (proxy.line()["status"], proxy.line()["code"]) == (431, "headers_too_large")
        assert (
            'chat_proxy_refusals_total{code="headers_too_large"} 1.0' in proxy.service.app.metrics.exposition().decode()
        )


@both_loops
def test_a_head_up_to_its_bound_is_read(loop: str) -> None:
    fields = [f"X-{number}: x" for number in range(MAX_FIELDS - 2)]
    long = "X-Long: " + "x" * (MAX_HEAD_BYTES - 2000)
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(head(proxy, long, *fields))
        read_until(sock, b"HTTP/1.1 200 OK\r\n")


@both_loops
@pytest.mark.parametrize("endless", ["in a field", "in fields", "in its target"])
def test_who_goes_on_sending_hears_why_not(loop: str, endless: str) -> None:
    """Closing while bytes come in would reset the connection, and the answer would be lost."""
    start, more = {
        "in a field": (b"GET / HTTP/1.1\r\nX: ", b"x" * 65536),
        "in fields": (b"GET / HTTP/1.1\r\n", b"X: x\r\n" * 10000),
        "in its target": (b"GET /", b"x" * 65536),
    }[endless]
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(start)
        for _ in range(80):
            sock.sendall(more)
        sock.shutdown(socket.SHUT_WR)
        assert refused(to_the_end(sock)) == (431, "headers_too_large")


@both_loops
def test_a_body_that_is_too_large_is_told_so(loop: str) -> None:
    """... although the client is still sending, and the connection can be used again."""
    with serving(loop, SERVER_MAX_BODY_BYTES="1024") as (proxy, upstream), connect(proxy) as sock:
        size = 8_000_000
        lines = ("Content-Type: application/json", f"Content-Length: {size}")
        sock.sendall(head(proxy, *lines, request="POST /api/chat HTTP/1.1") + b" " * size)
        assert b'"body_too_large"' in read_until(sock, b"}}")
        sock.sendall(head(proxy, request="GET /healthz HTTP/1.1"))
        read_until(sock, b'{"status":"ok"}')
        assert upstream.connections == 0


LAST = {
    "POST /api/chat HTTP/1.1": (413, "body_too_large"),
    "POST /api/chat HTTP/1.0": (413, "body_too_large"),
    "POST /api/nowhere HTTP/1.1": (404, "not_found"),
    "POST /healthz HTTP/1.1": (405, "method_not_allowed"),
}


@both_loops
@pytest.mark.parametrize("request_line", LAST)
def test_the_last_answer_is_not_lost(loop: str, request_line: str) -> None:
    """... in a reset, where the body is still coming and the connection ends with the answer, as nginx asks for it."""
    with serving(loop, SERVER_MAX_BODY_BYTES="1024") as (proxy, upstream), connect(proxy) as sock:
        size = 8_000_000
        lines = ("Content-Type: application/json", f"Content-Length: {size}", "Connection: close")
        sock.sendall(head(proxy, *lines, request=request_line) + b" " * size)
        assert refused(to_the_end(sock)) == LAST[request_line]
        assert upstream.connections == 0


@both_loops
def test_who_goes_on_sending_after_the_last_answer_is_cut(loop: str, hurried: None) -> None:
    """It is read for a while only, and then closed like any overdue connection."""
    lines = ("Content-Type: text/plain", "Content-Length: 80000000", "Connection: close")
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        connection = weakref.ref(eventually(lambda: next(iter(proxy.service.guard.open), None)))
        sock.sendall(head(proxy, *lines, request=POST))
        assert refused(to_the_end(sock)) == (415, "unsupported_media_type")
        with suppress(ConnectionError):
            for _ in range(int(SOON / 0.01)):
                sock.sendall(b" " * 1000)
                time.sleep(0.01)
            raise AssertionError("it was read to the end")
        eventually(lambda: connection() is None)


@both_loops
def test_a_last_answer_leaves_nothing(loop: str) -> None:
    """Its connection is forgotten when it goes, not when the cycle collector comes by."""
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        connection = weakref.ref(eventually(lambda: next(iter(proxy.service.guard.open), None)))
        sock.sendall(chat_request(proxy).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        assert DONE in to_the_end(sock)
        eventually(lambda: connection() is None)


ENDLESS = {
    "trailers": b"A: b\r\n" * 10000,
    "one trailer": b"A: " + b"b" * 60000,
    "chunk extensions": b"5;a=" + b"b" * 60000,
}


@both_loops
@pytest.mark.parametrize("what", ENDLESS)
def test_the_framing_of_a_body_has_a_bound(loop: str, what: str) -> None:
    """Nothing of it is kept, and a client that sends nothing else is refused."""
    with serving(loop) as (proxy, upstream), connect(proxy) as sock:
        chunk = b"" if "chunk" in what else b"2\r\n{}\r\n0\r\n"
        sock.sendall(head(proxy, JSON, "Transfer-Encoding: chunked", request=POST) + chunk)
        assert flooded(sock, ENDLESS[what]) in ((431, "headers_too_large"), (400, "invalid_request"))
        assert upstream.connections == 0
        (connection,) = proxy.service.guard.open or [None]
        assert connection is None or len(connection.headers) < 10


def flooded(sock: socket.socket, data: bytes) -> tuple[int, str]:
    with suppress(ConnectionError):
        for _ in range(200):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    return refused(to_the_end(sock))


@both_loops
def test_chunks_of_one_byte_are_a_body_like_any_other(loop: str) -> None:
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 20000}], "stream": True}).encode()
        sock.sendall(head(proxy, JSON, "Transfer-Encoding: chunked", request=POST))
        sock.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert b" 200 OK" in read_until(sock, DONE)


# ---- one request, one reading ---------------------------------------------------------------------------------------

TWO_READINGS: dict[str, Callable[[Running], bytes]] = {
    "no host": lambda proxy: head(proxy, host=False),
    "two hosts": lambda proxy: head(proxy, "Host: evil.example"),
    "a host that is none": lambda proxy: head(proxy, "Host: a b", host=False),
    "an empty host": lambda proxy: head(proxy, "Host:", host=False),
    "two lengths": lambda proxy: head(proxy, JSON, "Content-Length: 2", "Content-Length: 3", request=POST) + b"{}",
    "length and chunks": lambda proxy: (
        head(proxy, JSON, "Content-Length: 2", "Transfer-Encoding: chunked", request=POST) + b"0\r\n\r\n"
    ),
    "chunks and length": lambda proxy: (
        head(proxy, JSON, "Transfer-Encoding: chunked", "Content-Length: 2", request=POST) + b"0\r\n\r\n"
    ),
    "a coding we do not know": lambda proxy: head(proxy, JSON, "Transfer-Encoding: gzip, chunked", request=POST),
    "chunked twice": lambda proxy: head(
        proxy, JSON, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked", request=POST
    ),
    "chunks in 1.0": lambda proxy: head(proxy, JSON, "Transfer-Encoding: chunked", request="POST /api/chat HTTP/1.0"),
    "an upgrade": lambda proxy: head(proxy, "Connection: upgrade", "Upgrade: websocket"),
    "h2c": lambda proxy: head(proxy, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"),
    "a tunnel": lambda proxy: head(proxy, request="CONNECT example.org:443 HTTP/1.1"),
    "HTTP/2": lambda proxy: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "version 1.2": lambda proxy: head(proxy, request="GET / HTTP/1.2"),
    "version 0.9": lambda proxy: b"GET /\r\n\r\n",
    "an absolute target": lambda proxy: head(proxy, request="GET http://evil.example/api/session HTTP/1.1"),
    "an asterisk": lambda proxy: head(proxy, request="OPTIONS * HTTP/1.1"),
    "a fragment": lambda proxy: head(proxy, request="GET /api/session#x HTTP/1.1"),
    "bytes that are no ASCII": lambda proxy: head(proxy, request="GET /api/s\xe9ssion HTTP/1.1"),
    "a folded field": lambda proxy: head(proxy, "X: a\r\n b"),
    "a space before the colon": lambda proxy: head(proxy, "X : a"),
    "a NUL": lambda proxy: head(proxy, "X: a\0b"),
    "a TLS greeting": lambda proxy: bytes.fromhex("16030100c8010000c40303") + bytes(200),
}


@fault(39)
@both_loops
def test_what_could_be_read_in_two_ways_is_not_read(loop: str) -> None:
    with serving(loop) as (proxy, upstream):
        for number, (name, request) in enumerate(TWO_READINGS.items(), 1):
            with connect(proxy) as sock:
                sock.sendall(request(proxy))
                assert (name, *refused(to_the_end(sock))) == (name, 400, "invalid_request")
            line = proxy.line(number)
            assert (line["status"], line["code"], line["route"]) == (400, "invalid_request", None)
        assert upstream.connections == 0
        assert proxy.lines("library") == []


@both_loops
def test_a_probe_of_version_1_0_needs_no_host(loop: str) -> None:
    with serving(loop) as (proxy, _), connect(proxy) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert to_the_end(sock).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "target",
    ["/api/%63hat", "/%61pi/chat", "/api%2fchat", "/api/session%20", "/x/..%2fapi/chat", "/api/chat/", "//api/chat"],
)
def test_an_address_has_one_spelling(target: str) -> None:
    """A rule of nginx for /api/chat must not be walked around in escapes."""
    with serving() as (proxy, upstream):
        reply = send(proxy, "POST", target, b"{}", {"content-type": "application/json"})
        assert (reply.status, reply.error["code"]) == (404, "not_found")
        assert upstream.connections == 0


@pytest.mark.parametrize(
    ("version", "target", "headers", "expected"),
    [
        ("1.1", b"/", [(b"host", b"a.example:8000")], None),
        ("1.1", b"/a?b=%20", [(b"host", b"[::1]:80"), (b"transfer-encoding", b"Chunked")], None),
        ("1.0", b"/", [], None),
        ("1.1", b"/", [(b"host", b"a")] + [(b"x", b"y")] * MAX_FIELDS, HeadersTooLarge),
        ("1.1", b"/", [(b"host", b"user@a")], InvalidRequest),
        ("1.1", b"/", [(b"host", b"a:b")], InvalidRequest),
        ("1.1", b"/", [(b"host", b"a"), (b"transfer-encoding", b"identity")], InvalidRequest),
        ("2.0", b"/", [(b"host", b"a")], InvalidRequest),
        ("1.1", b"", [(b"host", b"a")], InvalidRequest),
    ],
)
def test_check_head(version: str, target: bytes, headers: Any, expected: type[Refusal] | None) -> None:
    if expected is None:
        check_head(version, target, headers)
    else:
        with pytest.raises(expected):
            check_head(version, target, headers)


# ---- sockets --------------------------------------------------------------------------------------------------------


def is_admitted(proxy: Running, sock: socket.socket) -> bool:
    """Is a request answered on it?"""
    with suppress(ConnectionError):
        sock.sendall(head(proxy, request="GET /api/v1/models HTTP/1.1"))
        answer = b""
        while part := sock.recv(65536):
            answer += part
            if b"]}" in answer:
                return True
    return False


@both_loops
def test_an_address_has_so_many_sockets(loop: str) -> None:
    """One more is closed, the others stay, and a released place is free. Proxies have no bound."""
    few = {"SERVER_CONNECTIONS_PER_ADDRESS": "3"}
    with serving(loop, SERVER_TRUSTED_PROXIES="", **few) as (proxy, _), ExitStack() as stack:
        socks = [stack.enter_context(connect(proxy)) for _ in range(3)]
        for _ in range(2):
            assert all(is_admitted(proxy, sock) for sock in socks)
            with connect(proxy) as another:
                assert not is_admitted(proxy, another)
        reset(socks.pop())
        eventually(lambda: len(proxy.service.guard.open) == 2)
        assert is_admitted(proxy, stack.enter_context(connect(proxy)))
    with serving(loop, **few) as (proxy, _), ExitStack() as stack:
        assert all(is_admitted(proxy, stack.enter_context(connect(proxy))) for _ in range(5))


def test_an_ipv6_subscriber_is_one_address() -> None:
    """A /64, of which a host picks its addresses, has one bound."""
    with serving("uvloop", SERVER_CONNECTIONS_PER_ADDRESS="2") as (proxy, _):
        admit = proxy.service.guard.admit
        addresses = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1", "192.0.2.1", "::ffff:192.0.2.1"]
        assert [admit(address) is not None for address in addresses] == [True, True, False, True, True, True]
        assert not admit("192.0.2.1")


# ---- descriptors ----------------------------------------------------------------------------------------------------


@fault(36)
@both_loops
def test_newcomers_wait_when_descriptors_run_short(loop: str) -> None:
    """... and requests under way are not affected; probes are answered, and all are served again afterwards."""
    go_on = threading.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(delta("one"))
        await asyncio.to_thread(go_on.wait, PATIENCE)
        for part in (delta("two"), finish(), DONE):
            await peer.chunk(part)
        await peer.end()

    with serving(loop, script) as (proxy, upstream), raw_chat(proxy) as live:
        read_until(live, b"one")
        proxy.service.most_sockets = 2
        reply = chat(proxy)
        assert (reply.status, reply.error["code"]) == (503, "busy")
        assert int(reply.headers["retry-after"]) >= 1
        assert send(proxy, "GET", "/healthz").status == 200
        assert proxy.line()["code"] == "busy"
        go_on.set()
        read_until(live, DONE)
        live.close()
        eventually(lambda: chat(proxy).status == 200)
        assert upstream.connections == 2 or len(upstream.seen) == 2
        assert set(proxy.tokens_used()) == {"tokens_per_session", "tokens_per_address"}


@fault(36)
@both_loops
def test_no_descriptor_for_the_upstream(loop: str) -> None:
    """What others in the process use up is no fault of the model's server."""
    with serving(loop) as (proxy, upstream), connect(proxy) as sock:
        eventually(lambda: len(proxy.service.guard.open) == 1)
        with no_more_descriptors():
            sock.sendall(chat_request(proxy))
            answer = read_until(sock, b"}}")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"busy"' in answer
        assert b"retry-after: 1\r\n" in answer
        assert set(proxy.tokens_used().values()) <= {0}
        assert upstream.connections == 0
        assert chat(proxy).status == 200


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest that is free
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.process
def test_serve_takes_all_descriptors_it_may_have(tmp_path: Path) -> None:
    """The soft limit is raised; the hard one holds, and within it no connection is cut by accident."""
    port = free_port()
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        variables = {
            **environment(),
            "CHAT_PROXY_SERVER_PORT": str(port),
            "CHAT_PROXY_UPSTREAM_BASE_URL": upstream.base_url,
            "CHAT_PROXY_UPSTREAM_API_KEY": "sk-test-" + "k" * 40,
            "CHAT_PROXY_POLICY_MODELS": "m",
        }
        serve = f"ulimit -Sn 64; ulimit -Hn 96; exec {sys.executable} -m proxy serve"
        process = subprocess.Popen(["sh", "-c", serve], env=variables, stdout=subprocess.PIPE, cwd=tmp_path)
        try:
            with ExitStack() as stack:
                eventually(lambda: is_listening(port), STARTING)
                sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(55)]
                request = f"GET /api/session HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
                statuses = []
                for sock in sockets:
                    sock.sendall(request)
                    statuses.append(sock.recv(65536)[9:12])
                assert set(statuses) <= {b"200", b"503"}
                assert statuses[-1] == b"503"
            eventually(lambda: status_of(port, request) == b"200")
        finally:
            process.terminate()
            process.communicate(timeout=STARTING)
        assert process.returncode == 0


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def status_of(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(request)
        return sock.recv(65536)[9:12]


def test_a_unix_socket_is_not_made_where_anybody_may_replace_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError):
        listen_on_path(tmp_path / "chat.sock")
    tmp_path.chmod(0o1777)  # as /tmp is: nobody can remove what is not theirs
    with listen_on_path(tmp_path / "chat.sock") as listener:
        assert Path(listener.getsockname()).stat().st_mode & 0o777 == 0o660
