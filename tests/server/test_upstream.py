"""The client side: rows 1 to 4 and 12 to 19 of the fault table through the real server, and what one call may do.

`play` is one row: what the client got, what the upstream saw, how the token account was settled, what the log says.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from itertools import cycle, pairwise
from pathlib import Path

import httpx
import pytest
import trustme
from hypothesis import example, given
from hypothesis import settings as tuned
from hypothesis import strategies as st
from support.faults import fault, numbered
from support.harness import (
    DONE,
    GOOD,
    LOOPS,
    PATIENCE,
    Clock,
    Peer,
    Reply,
    Running,
    Script,
    ScriptedUpstream,
    attempts,
    chat,
    delta,
    eventually,
    finish,
    full_port,
    pieces,
    random_key,
    raw_chat,
    read_until,
    running,
    streaming,
)
from support.stage import Act, Stage, always, prompt_tokens

from proxy import settings
from proxy.chat import api_key, upstream, upstream_errors
from proxy.chat.api_key import ApiKey, pieces_of, secret_in
from proxy.chat.upstream import Upstream
from proxy.chat.upstream_errors import retry_after
from proxy.errors import (
    BadGateway,
    GatewayTimeout,
    Refusal,
    UpstreamAuth,
    UpstreamProtocol,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnreachable,
)
from proxy.settings import Secret
from proxy.transport.pool import Transport

FIRST_BYTE = 1.6  # seconds of first_byte_timeout on the stage: what has to fit into it fits easily, and it soon ends
THEIR_TEXT = "what the upstream wrote"  # stands in every answer of it, and must not go any further
ANSWER = json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "x": "ሰላም"}).encode()

both_loops = pytest.mark.parametrize("loop", LOOPS)


# ---- what the upstream does -----------------------------------------------------------------------------------------


def saying(status: str, *headers: str, body: bytes | None = None, content_type: str = "application/json") -> Act:
    """A whole answer; without a body, OpenAI's error object."""
    error = {"message": THEIR_TEXT, "type": THEIR_TEXT, "param": None, "code": None}
    content = json.dumps({"error": error}).encode() if body is None else body

    async def act(peer: Peer) -> None:
        await peer.whole(content, status, content_type, f"x-text: {THEIR_TEXT}", "connection: close", *headers)
        peer.writer.close()

    return act


def error_of(**fields: object) -> bytes:
    return json.dumps({"error": {"message": THEIR_TEXT, **fields}}).encode()


def sending(*parts: bytes) -> Act:
    """Raw bytes, and then nothing."""

    async def act(peer: Peer) -> None:
        for part in parts:
            await peer.send(part)
        await peer.gone()
        peer.writer.close()

    return act


def echoing(status: str) -> Act:
    """Hands back all that we sent, our key with it: in the status line, in headers and in the body."""

    async def act(peer: Peer) -> None:
        assert peer.seen is not None
        key = peer.seen.headers["authorization"]
        body = json.dumps({"error": {"message": peer.seen.head.decode(), "code": key, "param": key}}).encode()
        headers = (f"www-authenticate: {key}", f"x-key: {key}", "connection: close")
        await peer.whole(body, f"{status} {key}", "application/json", *headers)
        peer.writer.close()

    return act


def half(status: str, content_type: str, *headers: str) -> Act:
    """An answer whose rest does not come; its connection is good for nothing."""
    lines = [f"HTTP/1.1 {status}", f"content-type: {content_type}", "content-length: 1000", *headers]
    return sending("\r\n".join(lines).encode() + b"\r\n\r\n" + THEIR_TEXT.encode())


async def silent(peer: Peer) -> None:
    await peer.gone()
    peer.writer.close()


async def resets(peer: Peer) -> None:
    peer.reset()


async def closes(peer: Peer) -> None:
    peer.writer.close()


async def resets_in_its_answer(peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    await asyncio.sleep(0.05)
    peer.reset()


async def ends_within_its_answer(peer: Peer) -> None:
    """... which has no other end than that of the connection."""
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + ANSWER[:-1])
    peer.writer.close()


async def streams(peer: Peer) -> None:
    await peer.sse(*GOOD)
    peer.writer.close()


async def closes_in_its_headers(peer: Peer) -> None:
    await peer.send(HEAD[:30])
    peer.writer.close()


def in_turn(*acts: Act) -> Act:
    """The first act, then the second, ..., and from the first again."""
    turns = cycle(acts)

    async def act(peer: Peer) -> None:
        await next(turns)(peer)

    return act


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


# ---- one row --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is staged, and what must come of it. `billed`: the prompt is paid for, otherwise nothing is."""

    act: Act
    refusal: type[Refusal]
    billed: bool = False
    code: str | None = None  # in the answer, when it is the upstream's own
    param: str | None = None
    calls: int = 1
    retry_after: int | None = None  # seconds
    retry_after_ms: int | None = None
    should_retry: str | None = None  # x-should-retry
    stream: bool = True
    reason: str = ""  # what the log must hold


def play(stage: Stage, row: Row) -> Reply:
    proxy = stage.proxy
    began, used_before = time.monotonic(), proxy.tokens_used()
    alarms_before = len(proxy.lines("key_alarm"))
    reply, line, calls = stage.chat(row.act, stream=row.stream)
    assert time.monotonic() - began < FIRST_BYTE + PATIENCE

    assert reply.status == row.refusal.status
    assert reply.headers["content-type"] == "application/json"
    expected = {"message": row.refusal.message, "type": row.refusal.type, "param": row.param}
    assert reply.json == {"error": {**expected, "code": row.code or row.refusal.code}}
    assert reply.headers["retry-after"] == (str(row.retry_after) if row.retry_after else None)
    wait_ms = row.retry_after_ms or (row.retry_after * 1000 if row.retry_after else None)
    assert reply.headers["retry-after-ms"] == (str(wait_ms) if wait_ms else None)
    assert reply.headers["x-should-retry"] == row.should_retry
    assert THEIR_TEXT.encode() not in proxy.sent

    assert calls == row.calls
    eventually(lambda: not stage.upstream.open)
    proxy.assert_nothing_left()

    assert (line["status"], line["code"], line["ending"]) == (row.refusal.status, row.refusal.code, None)
    assert line["retries"] == row.calls - 1
    assert row.reason in line["reason"]
    assert THEIR_TEXT.encode() not in proxy.output.getvalue()
    used = prompt_tokens(proxy, stream=row.stream) if row.billed else 0
    assert line["tokens"] == used
    assert stage.settled(used_before) == {"tokens_per_session": used, "tokens_per_address": used}
    assert len(proxy.lines("key_alarm")) - alarms_before == (row.refusal is UpstreamAuth)
    proxy.assert_key_unseen()
    return reply


ROWS = {
    "4 silent": Row(silent, GatewayTimeout, True, should_retry="false"),
    "4 silent within its headers": Row(sending(HEAD), GatewayTimeout, True, should_retry="false"),
    "4 silent after an interim answer": Row(
        sending(b"HTTP/1.1 103 Early Hints\r\n\r\n"), GatewayTimeout, True, should_retry="false"
    ),
    "reset before its answer": Row(resets, UpstreamUnreachable, True, reason="ReadError"),
    "closed before its answer": Row(closes, UpstreamProtocol, True),
    "closed within its headers": Row(closes_in_its_headers, UpstreamProtocol, True),
    "12 JSON though SSE was asked": Row(
        saying("200 OK", body=ANSWER), UpstreamProtocol, True, reason="application/json"
    ),
    "12 HTML": Row(
        saying("200 OK", body=THEIR_TEXT.encode(), content_type="text/html; charset=utf-8"), UpstreamProtocol, True,
        reason="text/html",
    ),
    "12 JSON that does not come whole": Row(half("200 OK", "application/json"), UpstreamProtocol, True),
    "12 HTML that does not come whole": Row(half("200 OK", "text/html"), UpstreamProtocol, True),
    "12 no content type": Row(sending(b"HTTP/1.1 200 OK\r\n\r\n" + DONE), UpstreamProtocol, True),
    "12 SSE by another name": Row(
        saying("200 OK", body=DONE, content_type="text/event-streams"), UpstreamProtocol, True
    ),
    "12 SSE though JSON was asked": Row(streams, UpstreamProtocol, True, stream=False, reason="text/event-stream"),
    "12 HTML though JSON was asked": Row(
        saying("200 OK", body=b"<p>", content_type="text/html"), UpstreamProtocol, True, stream=False
    ),
    "13 401": Row(saying("401 Unauthorized", "www-authenticate: Bearer"), UpstreamAuth, reason="401"),
    "13 403": Row(saying("403 Forbidden"), UpstreamAuth, reason="403"),
    "13 401 with our key": Row(echoing("401"), UpstreamAuth, reason="401"),
    "13 403 with our key": Row(echoing("403"), UpstreamAuth, reason="403"),
    "13 401, not streamed": Row(saying("401 Unauthorized"), UpstreamAuth, stream=False),
    "14 400": Row(saying("400 Bad Request"), UpstreamRejected, reason="400"),
    "14 404": Row(
        saying("404 Not Found", body=error_of(code="model_not_found", param=None)), UpstreamRejected,
        code="model_not_found",
    ),
    "14 413": Row(saying("413 Content Too Large"), UpstreamRejected),
    "14 422": Row(
        saying("422 Unprocessable Content", body=error_of(code="bad_field", param="messages[0].content")),
        UpstreamRejected, code="bad_field", param="messages[0].content",
    ),
    "14 no JSON": Row(saying("400 Bad Request", body=b"<html>"), UpstreamRejected),
    "14 another shape": Row(saying("400 Bad Request", body=b'{"error":"no","code":"x"}'), UpstreamRejected),
    "14 not UTF-8": Row(saying("400 Bad Request", body=b'{"error":{"code":"\xff"}}'), UpstreamRejected),
    "14 too deep": Row(saying("400 Bad Request", body=b'{"error":{"code":' + b"[" * 50_000), UpstreamRejected),
    "14 too long": Row(
        saying("400 Bad Request", body=error_of(code="a", x="x" * upstream_errors.LONGEST_ERROR)), UpstreamRejected
    ),
    "14 a code that is a text": Row(
        saying("400 Bad Request", body=error_of(code=THEIR_TEXT, param=THEIR_TEXT)), UpstreamRejected
    ),
    "14 a code that is a number": Row(saying("400 Bad Request", body=error_of(code=7, param=[1])), UpstreamRejected),
    "14 a code that is too long": Row(saying("400 Bad Request", body=error_of(code="a" * 65)), UpstreamRejected),
    "14 an empty code": Row(saying("400 Bad Request", body=error_of(code="", param="")), UpstreamRejected),
    "14 a code with a line end": Row(saying("400 Bad Request", body=error_of(code="a\n")), UpstreamRejected),
    "15 429": Row(saying("429 Too Many Requests"), UpstreamRateLimited, calls=3, retry_after=1, should_retry="false"),
    "15 429 with garbage": Row(
        saying("429 Too Many Requests", "retry-after: soon"), UpstreamRateLimited, calls=3, retry_after=1,
        should_retry="false",
    ),
    "15 429 at once": Row(
        saying("429 Too Many Requests", "retry-after: 0"), UpstreamRateLimited, calls=3, retry_after=1,
        retry_after_ms=1, should_retry="false",
    ),
    "15 429 in 50 ms": Row(
        saying("429 Too Many Requests", "retry-after: 9", "retry-after-ms: 50"), UpstreamRateLimited, calls=3,
        retry_after=1, retry_after_ms=50, should_retry="false",
    ),
    "15 429 later than we wait": Row(
        saying("429 Too Many Requests", "retry-after: 2"), UpstreamRateLimited, retry_after=2
    ),
    "15 429 later than we wait, not streamed": Row(
        saying("429 Too Many Requests", "retry-after: 2"), UpstreamRateLimited, retry_after=2, stream=False
    ),
    "15 429 later than anyone waits": Row(
        saying("429 Too Many Requests", "retry-after: 3600"), UpstreamRateLimited, retry_after=3600,
        should_retry="false",
    ),
    "15 429, then 500": Row(
        in_turn(saying("429 Too Many Requests"), saying("500 Oops")), BadGateway, calls=2, should_retry="false"
    ),
    "16 500": Row(saying("500 Internal Server Error"), BadGateway, reason="500"),
    "16 502": Row(saying("502 Bad Gateway"), BadGateway, calls=3, should_retry="false"),
    "16 503": Row(saying("503 Service Unavailable"), BadGateway, calls=3, should_retry="false"),
    "16 503 later than anyone waits": Row(
        saying("503 Service Unavailable", "retry-after: 3600"), BadGateway, retry_after=3600, should_retry="false"
    ),
    "16 500 later than anyone waits": Row(
        saying("500 Internal Server Error", "retry-after: 3600"), BadGateway, retry_after=3600, should_retry="false"
    ),
    "16 529": Row(saying("529 Overloaded"), BadGateway, calls=3, should_retry="false"),
    "16 504": Row(saying("504 Gateway Timeout"), BadGateway, True, reason="504"),
    "16 502, then 504": Row(
        in_turn(saying("502 Bad Gateway"), saying("504 Gateway Timeout")), BadGateway, True, calls=2,
        should_retry="false",
    ),
    "16 503, then silent": Row(
        in_turn(saying("503 Service Unavailable"), silent), GatewayTimeout, True, calls=2, should_retry="false"
    ),
    "16 503, then HTML": Row(
        in_turn(saying("503 Service Unavailable"), saying("200 OK", content_type="text/html")), UpstreamProtocol, True,
        calls=2, should_retry="false",
    ),
    "16 418": Row(saying("418 I'm a teapot"), BadGateway, reason="418"),
    "16 402": Row(saying("402 Payment Required"), BadGateway),
    "17 301": Row(saying("301 Moved Permanently", "location: /v2"), UpstreamProtocol),
    "17 304": Row(sending(b"HTTP/1.1 304 Not Modified\r\nconnection: close\r\n\r\n"), UpstreamProtocol),
    "status 204": Row(sending(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n"), UpstreamProtocol, True),
    "status 201": Row(saying("201 Created", body=DONE, content_type="text/event-stream"), UpstreamProtocol, True),
    "18 gzip": Row(sending(HEAD + b"content-encoding: gzip\r\n\r\n" + DONE), UpstreamProtocol, True, reason="gzip"),
    "18 two codings": Row(
        sending(HEAD + b"content-encoding: br\r\ncontent-encoding: gzip\r\n\r\n"), UpstreamProtocol, True
    ),
    "19 1 MB header": Row(sending(HEAD + b"x: " + b"y" * 1_000_000 + b"\r\n\r\n"), UpstreamProtocol, True),
    "19 10,000 headers": Row(sending(HEAD + b"x: y\r\n" * 10_000 + b"\r\n"), UpstreamProtocol, True),
    "19 bad status line": Row(sending(b"HTTP/1.1 OK 200\r\n\r\n"), UpstreamProtocol, True),
    "19 no HTTP": Row(sending(b"SSH-2.0-OpenSSH_9.2\r\n"), UpstreamProtocol, True),
    "19 bad header": Row(sending(HEAD + b"x y\r\n\r\n"), UpstreamProtocol, True),
    "19 two lengths": Row(
        sending(HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n"), UpstreamProtocol, True
    ),
    "a whole answer that is cut": Row(
        sending(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
        UpstreamProtocol, True, stream=False,
    ),
    "a whole answer that is reset": Row(resets_in_its_answer, UpstreamProtocol, True, stream=False, reason="ReadError"),
    "a whole answer that ends early": Row(
        ends_within_its_answer, UpstreamProtocol, True, stream=False, reason="not whole JSON"
    ),
    "a whole answer of nothing": Row(saying("200 OK", body=b""), UpstreamProtocol, True, stream=False),
    "a whole answer that is no JSON": Row(saying("200 OK", body=b"<html>"), UpstreamProtocol, True, stream=False),
    "a whole answer that is more": Row(saying("200 OK", body=b"{}{}"), UpstreamProtocol, True, stream=False),
    "a whole answer without an end": Row(saying("200 OK", body=b"[" * 100_000), UpstreamProtocol, True, stream=False),
    "a whole answer that is too long": Row(
        saying("200 OK", body=b" " * (upstream.LONGEST_ANSWER + 1_000_000)), UpstreamProtocol, True, stream=False
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=LOOPS)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(request.param, UPSTREAM_FIRST_BYTE_TIMEOUT=str(FIRST_BYTE)).open() as stage:
        yield stage


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff for tests that have no time: the pauses are asserted elsewhere."""
    monkeypatch.setattr(upstream, "FIRST_PAUSE", 0.02)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("row", numbered(ROWS))
def test_what_the_upstream_does_becomes_a_refusal(row: Row, stage: Stage) -> None:
    """Rows 4 and 12 to 19: our status, code and text; what may be is retried, what may have cost something is paid."""
    play(stage, row)


GOOD_AGAIN = {
    "after 429": in_turn(saying("429 Too Many Requests"), streams),
    "after 429 and 503": in_turn(saying("429 Too Many Requests"), saying("503 Service Unavailable"), streams),
    "after 529 with Retry-After": in_turn(saying("529 Overloaded", "retry-after-ms: 30"), streams),
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("act", GOOD_AGAIN.values(), ids=GOOD_AGAIN)
def test_a_retry_that_succeeds_is_an_answer(act: Act, stage: Stage) -> None:
    """A visitor does not notice that the model was busy for a moment."""
    reply, line, calls = stage.chat(act)
    assert (reply.status, reply.body) == (200, b"".join(GOOD))
    assert (line["ending"], line["retries"]) == ("complete", calls - 1)
    bodies = {seen.body for seen in stage.upstream.seen[-calls:]}
    assert len(bodies) == 1


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/json;x"])
def test_a_whole_answer_passes_byte_for_byte(content_type: str, stage: Stage) -> None:
    """An answer that is not streamed arrives as it was, with our headers, settled by its usage."""
    act = saying("200 OK", "set-cookie: a=b", "content-encoding: identity", body=ANSWER, content_type=content_type)
    reply, line, _ = stage.chat(act, stream=False)
    assert (reply.status, reply.body, line["tokens"]) == (200, ANSWER, 7)
    assert "a=b" not in str(reply.headers)
    assert reply.headers["content-type"] == "application/json"


# ---- rows 1 to 3: connecting ----------------------------------------------------------------------------------------


def refused(proxy: Running, refusal: type[Refusal], *, retries: int, reason: str) -> float:
    """Asks once, and checks the columns of a call that was never sent. Returns how long it took."""
    began = time.monotonic()
    reply = chat(proxy)
    took = time.monotonic() - began
    line = proxy.line()
    expected = {"message": refusal.message, "type": refusal.type, "param": None, "code": refusal.code}
    assert (reply.status, reply.json) == (refusal.status, {"error": expected})
    assert reply.headers["x-should-retry"] == ("false" if retries or refusal is GatewayTimeout else None)
    assert proxy.upstream_sockets == 0
    assert (line["status"], line["code"], line["ending"]) == (refusal.status, refusal.code, None)
    assert (line["retries"], line["tokens"]) == (retries, 0)
    assert reason in line["reason"]
    assert len(proxy.lines()) == 1
    assert proxy.tokens_used() == {"tokens_per_session": 0, "tokens_per_address": 0}
    return took


@contextmanager
def closed_port() -> Iterator[int]:
    """A port of this machine without a listener."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@fault(1)
@both_loops
@pytest.mark.usefixtures("hasty")
def test_connection_refused(loop: str) -> None:
    """Row 1: connection refused: retried, then 502, and nothing is booked."""
    with closed_port() as port, running(f"http://127.0.0.1:{port}/v1", loop=loop) as proxy:
        refused(proxy, UpstreamUnreachable, retries=2, reason="ConnectError: Connect")


@fault(1)
@both_loops
@pytest.mark.parametrize("host", ["nosuch.invalid", "a" * 70 + ".invalid", "a..b"])
@pytest.mark.usefixtures("hasty")
def test_host_unknown(host: str, loop: str) -> None:
    """Row 1: a name without an address, or one that cannot be a name: the same."""
    with running(f"http://{host}/v1", loop=loop, UPSTREAM_ALLOW_HTTP="true") as proxy:
        refused(proxy, UpstreamUnreachable, retries=2, reason="ConnectError")


@fault(1)
@both_loops
@pytest.mark.usefixtures("hasty")
def test_reset_while_connecting(loop: str) -> None:
    """Row 1: a connection that is reset before it stands, here in the TLS handshake: the same."""

    async def script(peer: Peer) -> None:
        await peer.reader.read(1)
        peer.reset()

    with (
        ScriptedUpstream(script) as server,
        running(f"https://127.0.0.1:{server.port}/v1", loop=loop) as proxy,
    ):
        refused(proxy, UpstreamUnreachable, retries=2, reason="ConnectError")
        assert server.connections == 3
        eventually(lambda: not server.open)


@fault(2)
@both_loops
def test_connect_hangs(loop: str) -> None:
    """Row 2: 504 at connect_timeout, without a retry."""
    with (
        full_port() as port,
        running(f"http://127.0.0.1:{port}/v1", loop=loop, UPSTREAM_CONNECT_TIMEOUT="0.3") as proxy,
    ):
        assert 0.3 <= refused(proxy, GatewayTimeout, retries=0, reason="ConnectTimeout") < 2
        assert attempts(port) == 1


@both_loops
def test_first_byte_timeout_covers_connecting(loop: str) -> None:
    """Row 2: a connect_timeout that is the longer one does not lengthen the wait; nothing was sent, nothing is paid."""
    with (
        full_port() as port,
        running(f"http://127.0.0.1:{port}/v1", loop=loop, UPSTREAM_FIRST_BYTE_TIMEOUT="0.3") as proxy,
    ):
        assert 0.3 <= refused(proxy, GatewayTimeout, retries=0, reason="no answer in time") < 2


@dataclass
class TlsServer:
    """A server that completes the TLS handshake and stays silent."""

    port: int = 0
    connections: int = 0
    shaken: int = 0
    closed: int = 0


@contextmanager
def tls_server(certificate: trustme.LeafCert) -> Iterator[TlsServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = TlsServer(listener.getsockname()[1])

        def serve() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return  # the test is over
                server.connections += 1
                connection.settimeout(5)
                tls = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
                with tls, suppress(OSError):  # the client does not like the certificate
                    tls.do_handshake()
                    server.shaken += 1
                server.closed += 1

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@dataclass(frozen=True)
class Certificate:
    name: str = "127.0.0.1"
    trusted: bool = True
    days: int = 1  # from now on
    reason: str = ""


CERTIFICATES = {
    "unknown issuer": Certificate(trusted=False, reason="unable to get local issuer"),
    "expired": Certificate(days=-1, reason="certificate has expired"),
    "wrong name": Certificate("elsewhere.example", reason="IP address mismatch"),
}


@fault(3)
@both_loops
@pytest.mark.parametrize("case", CERTIFICATES.values(), ids=CERTIFICATES)
def test_bad_certificate(case: Certificate, loop: str, tmp_path: Path) -> None:
    """Row 3: a certificate that does not hold: 502, no retry, and the log says why."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    until = datetime.now(UTC) + timedelta(days=case.days)
    certificate = ca.issue_cert(case.name, not_before=until - timedelta(days=2), not_after=until)
    overrides = {"UPSTREAM_CA_FILE": str(tmp_path / "ca.pem")} if case.trusted else {}
    with (
        tls_server(certificate) as server,
        running(f"https://127.0.0.1:{server.port}/v1", loop=loop, **overrides) as proxy,
    ):
        refused(proxy, UpstreamUnreachable, retries=0, reason=f"ConnectError: {case.reason}")
        eventually(lambda: server.closed)
        assert (server.connections, server.shaken) == (1, 0)


@fault(3)
@both_loops
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28"])
def test_bad_tls(answer: bytes, loop: str) -> None:
    """Row 3: a TLS handshake answered in plain text, or refused: 502, no retry, and the reason in the log."""

    async def script(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.send(answer)
        await peer.gone()

    with ScriptedUpstream(script) as server, running(f"https://127.0.0.1:{server.port}/v1", loop=loop) as proxy:
        refused(proxy, UpstreamUnreachable, retries=0, reason="ConnectError: ")
        assert server.connections == 1
        eventually(lambda: not server.open)


# ---- how long it waits ----------------------------------------------------------------------------------------------


def gaps(server: ScriptedUpstream) -> list[float]:
    return [later.arrived - earlier.arrived for earlier, later in pairwise(server.seen)]


def test_backoff_grows_and_stays_inside_first_byte_timeout() -> None:
    """Each pause is about twice the one before; when the next one does not fit, the refusal comes at once."""
    script = always(saying("503 Service Unavailable"))
    with (
        ScriptedUpstream(script) as server,
        running(server.base_url, UPSTREAM_RETRIES="10", UPSTREAM_FIRST_BYTE_TIMEOUT="2.4") as proxy,
    ):
        proxy.service.app.upstream.random = lambda: 0.5  # pauses of 0.375, 0.75 and 1.5 s: the third never fits
        began = time.monotonic()
        assert chat(proxy).status == 502
        assert time.monotonic() - began < PATIENCE
        first, second = gaps(server)[:2]
        assert first >= upstream.FIRST_PAUSE / 2
        assert second >= upstream.FIRST_PAUSE
        assert proxy.line()["retries"] == len(server.seen) - 1


@fault(26)
@both_loops
def test_a_client_that_leaves_in_the_pause_is_not_asked_for(loop: str) -> None:
    """Row 26: a client that leaves before the retry costs nothing, and causes no further call."""
    script = always(saying("503 Service Unavailable", "retry-after: 1"))
    with ScriptedUpstream(script) as server, running(server.base_url, loop=loop) as proxy:
        with raw_chat(proxy):
            eventually(lambda: server.seen)
            time.sleep(0.1)
        line = proxy.line()
        assert (line["ending"], line["tokens"], line["status"]) == ("aborted", 0, 499)
        assert line["code"] is None
        assert set(proxy.tokens_used().values()) == {0}
        proxy.assert_nothing_left()
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("header", "least"),
    [
        (lambda: "retry-after: 1", 1.0),
        (lambda: "retry-after-ms: 150", 0.15),
        (lambda: f"retry-after: {formatdate(time.time() + 2, usegmt=True)}", 0.9),
    ],
    ids=["seconds", "milliseconds", "date"],
)
def test_the_upstream_says_how_long(header: Callable[[], str], least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After in seconds, as a date and in milliseconds is waited for, not our own pause."""
    monkeypatch.setattr(upstream, "FIRST_PAUSE", 20.0)

    async def busy(peer: Peer) -> None:
        await saying("429 Too Many Requests", header())(peer)

    with ScriptedUpstream(always(in_turn(busy, streams))) as server, running(server.base_url) as proxy:
        assert chat(proxy).body == b"".join(GOOD)
        assert least <= gaps(server)[0] < PATIENCE


@pytest.mark.parametrize("stream", [True, False])
def test_no_retries(stream: bool) -> None:
    """With retries = 0 there are none, and the client may try for itself."""
    script = always(saying("503 Service Unavailable", "retry-after: 1"))
    with ScriptedUpstream(script) as server, running(server.base_url, UPSTREAM_RETRIES="0") as proxy:
        reply = chat(proxy, stream=stream)
        assert (reply.status, reply.headers["retry-after"], reply.headers["x-should-retry"]) == (502, "1", None)
        assert len(server.seen) == 1


@both_loops
@pytest.mark.parametrize("begun", [False, True])
def test_a_whole_answer_has_total_timeout(begun: bool, loop: str) -> None:
    """Without a stream there is one deadline for all of it: 504, the upstream closed, the prompt paid."""

    async def slow(peer: Peer) -> None:
        if begun:
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        await silent(peer)

    patience = {"UPSTREAM_TOTAL_TIMEOUT": "0.4", "UPSTREAM_FIRST_BYTE_TIMEOUT": "0.1"}
    with ScriptedUpstream(always(slow)) as server, running(server.base_url, loop=loop, **patience) as proxy:
        began = time.monotonic()
        reply = chat(proxy, stream=False)
        assert 0.4 <= time.monotonic() - began < PATIENCE
        assert (reply.status, reply.error["code"]) == (504, "upstream_timeout")
        assert reply.headers["x-should-retry"] == "false"
        eventually(lambda: not server.open)
        assert proxy.line()["tokens"] == prompt_tokens(proxy, stream=False)


@both_loops
def test_an_upstream_that_does_not_read(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream that does not take the request's body is too slow like one that does not answer."""
    monkeypatch.setattr(upstream, "WRITE_TIMEOUT", 0.3)
    room = {"SERVER_MAX_BODY_BYTES": str(64 << 20), "POLICY_MAX_INPUT_CHARS": str(64 << 20)}
    messages = [{"role": "user", "content": "x" * (32 << 20)}]  # more than the kernel takes for it

    async def deaf(peer: Peer) -> None:
        await asyncio.Event().wait()

    with ScriptedUpstream(deaf) as server, running(server.base_url, loop=loop, **room) as proxy:
        reply = chat(proxy, messages=messages)
        assert (reply.status, reply.error["code"]) == (504, "upstream_timeout")
        line = proxy.line()
        assert line["reason"] == "WriteTimeout"
        assert line["tokens"] == prompt_tokens(proxy, messages=messages)


def test_a_slow_error_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error whose body does not come is told without its code, soon."""
    monkeypatch.setattr(upstream_errors, "ERROR_BODY_TIMEOUT", 0.2)
    act = sending(b'HTTP/1.1 400 No\r\ncontent-length: 99\r\n\r\n{"error":{"code":"late"')
    with ScriptedUpstream(always(act)) as server, running(server.base_url) as proxy:
        began = time.monotonic()
        reply = chat(proxy)
        assert time.monotonic() - began < PATIENCE
        assert (reply.status, reply.error["code"]) == (400, "upstream_rejected")
        eventually(lambda: not server.open)


# ---- the key and where it goes --------------------------------------------------------------------------------------


@fault(17)
@pytest.mark.parametrize("status", [300, 301, 302, 303, 305, 307, 308])
def test_a_redirect_is_not_followed(status: int, stage: Stage) -> None:
    """Row 17: wherever the upstream points to, the key and the conversation go nowhere else."""
    with ScriptedUpstream(streaming(*GOOD)) as elsewhere:
        location = f"location: {elsewhere.base_url}/chat/completions"
        reply = play(stage, Row(half(f"{status} Moved", "text/html", location), UpstreamProtocol, reason=str(status)))
        assert "location" not in reply.headers
        assert elsewhere.connections == 0


def test_cookies_of_the_upstream_are_forgotten() -> None:
    """What the upstream sets as a cookie in one visitor's answer does not come back with another's request."""

    async def act(peer: Peer) -> None:
        await peer.head("200 OK", "text/event-stream", "set-cookie: session=theirs; Path=/")
        await peer.chunk(DONE)
        await peer.end()

    with ScriptedUpstream(always(act)) as server, running(server.base_url) as proxy:
        for _ in range(2):
            chat(proxy)
        assert ["cookie" in seen.headers for seen in server.seen] == [False, False]


def test_environment_proxies_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTPS_PROXY and its kin would send key and conversations through a third party."""
    with ScriptedUpstream(streaming(*GOOD)) as elsewhere, ScriptedUpstream(streaming(*GOOD)) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{elsewhere.port}")
        with running(server.base_url) as proxy:
            assert chat(proxy).status == 200
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    ("overrides", "header", "scheme"),
    [
        ({}, "authorization", "Bearer "),
        ({"UPSTREAM_AUTH_HEADER": "api-key", "UPSTREAM_AUTH_SCHEME": ""}, "api-key", ""),
        ({"UPSTREAM_AUTH_HEADER": "X-Api-Key", "UPSTREAM_AUTH_SCHEME": "Token"}, "x-api-key", "Token "),
    ],
)
def test_auth_header(overrides: dict[str, str], header: str, scheme: str) -> None:
    """The key goes in the header and behind the word that the upstream wants, and nowhere else."""
    with ScriptedUpstream(streaming(*GOOD)) as server, running(server.base_url, **overrides) as proxy:
        chat(proxy)
        seen = server.seen[0]
        assert seen.headers[header] == scheme + proxy.key
        assert (seen.head + seen.body).count(proxy.key.encode()) == 1


def test_request_ids_and_path() -> None:
    """The upstream gets our request id, under the path it was configured with."""
    with ScriptedUpstream(streaming(*GOOD)) as server, running(server.base_url + "/gateway/") as proxy:
        reply = chat(proxy)
        assert server.seen[0].head.startswith(b"POST /v1/gateway/chat/completions HTTP/1.1\r\n")
        assert server.seen[0].headers["x-request-id"] == reply.headers["x-request-id"]


def test_key_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 38: a new key in the file is used from the next request on; the stream that was live goes on as it began."""
    monkeypatch.setattr(api_key, "KEY_CHECK", 0.0)
    old, new = random_key(), random_key()
    file = tmp_path / "key"
    file.write_text(old + "\n")
    go = threading.Event()

    async def act(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(delta("a"))
        assert await asyncio.to_thread(go.wait, 10)
        await peer.chunk(finish())
        await peer.end()

    with (
        ScriptedUpstream(always(act)) as server,
        running(server.base_url, key=old, UPSTREAM_API_KEY_FILE=str(file)) as proxy,
        raw_chat(proxy) as live,
    ):
        read_until(live, delta("a"))
        file.write_text(new + "\n")
        go.set()
        assert chat(proxy).body == delta("a") + finish()
        assert read_until(live, b"0\r\n\r\n").endswith(b"0\r\n\r\n")
        for broken in ("", "two words", "zwölf"):
            file.write_text(broken)
            assert chat(proxy).status == 200
        file.unlink()
        assert chat(proxy).status == 200
        assert [seen.headers["authorization"].split()[1] for seen in server.seen] == [old] + [new] * 5
        for piece in pieces(new):
            assert piece.encode() not in bytes(proxy.sent) + proxy.output.getvalue()


# ---- the key's guard ------------------------------------------------------------------------------------------------


def test_the_key_file_is_looked_at_once_a_second(tmp_path: Path) -> None:
    """Not for every request; a reload (SIGHUP) looks at once."""
    file, clock = tmp_path / "key", Clock(0.0)
    keys = [random_key() for _ in range(3)]
    key = ApiKey(Secret(keys[0], file), clock)
    file.write_text(keys[1])
    clock.now = 0.9
    assert key.value() == keys[0]
    clock.now = 1.0
    assert key.value() == keys[1]
    file.write_text(keys[2])
    clock.now = 1.5
    assert key.value() == keys[1]
    key.reload()
    assert key.value() == keys[2]


def test_a_key_that_is_no_file_stays(tmp_path: Path) -> None:
    """A key from the environment has nothing to be read again."""
    clock = Clock(0.0)
    key = ApiKey(Secret("sk-one"), clock)
    clock.now = 10.0
    assert key.value() == "sk-one"
    key.reload()
    assert key.value() == "sk-one"


def test_the_key_before_is_still_guarded(tmp_path: Path) -> None:
    """Answers to requests that went out with the old key may still come."""
    file = tmp_path / "key"
    old, new = random_key(), random_key()
    key = ApiKey(Secret(old, file), Clock())
    file.write_text(new)
    key.reload()
    for value in (old, new):
        assert key.pieces.search(value.encode())
    key.reload()
    assert key.pieces.search(old.encode())


PIECES = [
    ("sk-abcdefgh12", ["abcdefgh", "bcdefgh1", "cdefgh12"]),
    ("sk-proj-abcdefgh1", ["abcdefgh", "bcdefgh1"]),
    ("sk-ant-api03-abcdefgh", ["api03-ab", "abcdefgh"]),
    ("gsk_0123456789", ["01234567", "12345678", "23456789"]),
    ("AIzaSyA-0123", ["AIzaSyA-", "SyA-0123"]),
    ("Abcd-Efgh_ijkl", ["Abcd-Efg", "Efgh_ijk"]),  # not words in front of a key: a key
    ("a.b*c+d(e[f", ["a.b*c+d(", "*c+d(e[f"]),
    ("abcdefg8", ["abcdefg8"]),
    ("sk-proj-7", ["sk-proj-7"]),  # shorter than a piece: the whole key
]
NO_SECRETS = ["x", "none", "EMPTY", "ollama", "sk-1234", "lm-studio", "LM-Studio", "not_needed", "sk-no-key-required"]
SECRETS = ["correcthorse", "sk-12345", "token-abc123"]


@pytest.mark.parametrize(("key", "found"), PIECES)
def test_pieces_of(key: str, found: list[str]) -> None:
    """Any eight characters in a row of what follows the words before a key give it away, in whatever case."""
    pattern = pieces_of(key)
    for piece in found:
        for written in (piece, piece.upper(), piece.lower(), f"x{piece}x"):
            assert pattern.search(written.encode())
    if len(found[0]) == api_key.PIECE:
        assert not pattern.search(f"{found[0][:-1]} {found[-1][1:]}".encode())
        assert not pattern.search(b"an answer about sk-proj- and sk-ant-api03- and gsk_ keys")


def test_a_word_is_no_secret() -> None:
    """What stands for a key where none is wanted gives nothing away, alone or beside one; any other may be a secret."""
    for word in NO_SECRETS:
        assert secret_in(word) == b""
        assert not pieces_of(word).search(word.encode())
        assert pieces_of(word, "abcdefg8").pattern == pieces_of("abcdefg8").pattern
    for key in (*SECRETS, random_key()):
        assert secret_in(key) == key.encode()
        assert pieces_of(key).search(key.encode())


random_parts = st.text(string.ascii_letters + string.digits, min_size=8, max_size=60)
random_parts = random_parts.filter(secret_in)  # Hypothesis draws words of the source, too, such as "placeholder"


@tuned(max_examples=200)
@given(st.sampled_from(["", "sk-", "sk-proj-", "sk-or-v1-", "gsk_"]), random_parts, st.text(max_size=20), st.data())
def test_every_piece_is_found(prefix: str, random_part: str, around: str, data: st.DataObject) -> None:
    """No eight characters of the random part go unseen, in any surroundings and case."""
    start = data.draw(st.integers(0, len(random_part) - api_key.PIECE))
    piece = random_part[start : start + api_key.PIECE]
    pattern = pieces_of(prefix + random_part)
    assert pattern.search(f"{around}{piece}{around}".encode())
    assert pattern.search(f"{around}{piece.swapcase()}{around}".encode())


# ---- Retry-After ----------------------------------------------------------------------------------------------------

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT

WAITS: list[tuple[dict[str, str], float | None]] = [
    ({}, None),
    ({"retry-after": "0"}, 0.0),
    ({"retry-after": "7"}, 7.0),
    ({"retry-after": " 7 "}, 7.0),
    ({"retry-after": "1.5"}, 1.5),
    ({"retry-after": "-5"}, 0.0),
    ({"retry-after": "86401"}, 86400.0),
    ({"retry-after": "9" * 15}, 86400.0),
    ({"retry-after": "9" * 400}, None),
    ({"retry-after": "nan"}, None),
    ({"retry-after": "inf"}, None),
    ({"retry-after": "1e3"}, None),
    ({"retry-after": "1_000"}, None),
    ({"retry-after": "٣"}, None),
    ({"retry-after": "²"}, None),
    ({"retry-after": ""}, None),
    ({"retry-after": "soon"}, None),
    ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30.0),
    ({"retry-after": "Tuesday, 14-Nov-23 22:13:50 GMT"}, 30.0),
    ({"retry-after": "Tue Nov 14 22:13:50 2023"}, 30.0),
    ({"retry-after": "Tue, 14 Nov 2023 23:13:50 +0100"}, 30.0),
    ({"retry-after": "Tue, 14 Nov 2023 22:13:50 -0000"}, 30.0),
    ({"retry-after": "Tue, 14 Nov 2023 22:00:00 GMT"}, 0.0),
    ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 86400.0),
    ({"retry-after": "Fri, 99 Dec 2023 23:59:59 GMT"}, None),
    ({"retry-after": "Mon, 01 Jan 0001 00:00:00 +2300"}, 0.0),
    ({"retry-after-ms": "1500"}, 1.5),
    ({"retry-after-ms": "0.5"}, 0.0005),
    ({"retry-after-ms": "-1"}, 0.0),
    ({"retry-after-ms": "1500", "retry-after": "60"}, 1.5),
    ({"retry-after-ms": "soon", "retry-after": "60"}, 60.0),
    ({"retry-after-ms": "nan"}, None),
]


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock is set to Tokyo's time."""
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
@pytest.mark.parametrize(("headers", "expected"), WAITS)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    """Seconds, milliseconds and dates of all forms; what cannot be meant is none."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert retry_after(httpx.Headers(raw), NOW) == expected


dates = st.datetimes().map(lambda moment: moment.strftime("%a, %d %b %Y %H:%M:%S GMT"))
written = st.one_of(st.text(), st.floats().map(str), st.integers().map(str), dates)


@tuned(max_examples=300)
@given(st.fixed_dictionaries({}, optional={"retry-after": written, "retry-after-ms": written}), st.floats(0, 1e10))
@example({"retry-after": "1 1 1"}, NOW)
@example({"retry-after": "Mon, 1 Jan 1 1:1:1 1"}, NOW)
def test_retry_after_of_anything(headers: dict[str, str], now: float) -> None:
    """Whatever stands there: a wait of at most a day, or none."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    wait = retry_after(httpx.Headers(raw), now)
    assert wait is None or 0 <= wait <= upstream_errors.LONGEST_WAIT


# ---- probing --------------------------------------------------------------------------------------------------------


def probe(script: Script, **overrides: str) -> Refusal | None:
    """What `chat-proxy check` hears of an upstream; None when it is well."""
    with ScriptedUpstream(script) as server:
        variables = {"UPSTREAM_BASE_URL": server.base_url, "UPSTREAM_API_KEY": random_key(), "POLICY_MODELS": "m"}
        chosen = settings.from_variables({f"CHAT_PROXY_{name}": text for name, text in (variables | overrides).items()})

        async def ask() -> Refusal | None:
            transport = Transport()
            try:
                await Upstream(chosen.upstream, transport, user_agent="test", random=lambda: 0.5).probe()
            except Refusal as refusal:
                return refusal
            finally:
                await transport.aclose()
            return None

        refusal = asyncio.run(ask())
        assert all(seen.head.startswith(b"GET /v1/models HTTP/1.1\r\n") for seen in server.seen)
        return refusal


PROBES: dict[str, tuple[Act, str | None]] = {
    "well": (saying("200 OK", body=b'{"data":[]}'), None),
    "a wrong key": (saying("401 Unauthorized"), "upstream_auth"),
    "no such address": (saying("404 Not Found"), "upstream_rejected"),
    "elsewhere": (saying("302 Found", "location: /"), "upstream_protocol"),
    "busy": (saying("429 Too Many Requests"), "upstream_rate_limited"),
    "broken": (saying("500 Oops"), "upstream_error"),
    "no HTTP": (sending(b"hello\r\n"), "upstream_protocol"),
    "silent": (silent, "upstream_timeout"),
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("act", "code"), PROBES.values(), ids=PROBES)
def test_probe(act: Act, code: str | None) -> None:
    """A probe asks for the models, which costs nothing, and says what is wrong in the words of a call."""
    refusal = probe(always(act), UPSTREAM_FIRST_BYTE_TIMEOUT="0.3" if act is silent else "10")
    assert (refusal and refusal.code) == code
