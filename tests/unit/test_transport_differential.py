"""Our transport against httpx's own: the same bytes, statuses, headers and classes of error.

Over real servers, and over a corpus of odd and malformed answers, fed whole, byte by byte and split at random. Where
ours differs on purpose, the row has the reason and the expected result; everywhere else httpx decides.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from support.transport_servers import (
    CHUNKED,
    OK,
    PATHS,
    REAL_SERVERS,
    Certificates,
    Handler,
    Peer,
    Recorder,
    chunk,
    on_both_loops,
    real_server,
    serving,
)

from proxy.transport.connection import ResponseStream
from proxy.transport.pool import Transport

LENGTH = OK + b"Content-Length: "
PADDING = b"x" * 40_000


@dataclass(frozen=True)
class Outcome:
    """The response as its caller receives it; `error` is the name of a class, or empty for a complete body."""

    status: int = 0
    reason: bytes = b""
    version: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    error: str = ""


async def pulled(transport: httpx.AsyncBaseTransport, request: httpx.Request) -> Outcome:
    try:
        response = await transport.handle_async_request(request)
    except httpx.TransportError as error:
        return Outcome(error=type(error).__name__)
    assert isinstance(response.stream, httpx.AsyncByteStream)
    body, failed = b"", ""
    try:
        async for part in response.stream:
            body += part
    except httpx.TransportError as error:
        failed = type(error).__name__
    finally:
        await response.aclose()
    return outcome(response, body, failed)


async def pushed(transport: Transport, request: httpx.Request) -> Outcome:
    try:
        response = await transport.handle_async_request(request)
    except httpx.TransportError as error:
        return Outcome(error=type(error).__name__)
    assert isinstance(response.stream, ResponseStream)
    recorder = Recorder()
    response.stream.attach(recorder)
    await recorder.finish()
    return outcome(response, recorder.body, "" if recorder.error is None else type(recorder.error).__name__)


def outcome(response: httpx.Response, body: bytes, error: str) -> Outcome:
    headers = tuple((name, value) for name, value in response.headers.raw if name.lower() != b"date")
    reason, version = response.extensions["reason_phrase"], response.extensions["http_version"]
    return Outcome(response.status_code, reason, version, headers, body, error)


# ---- the corpus -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An answer, after which the server closes. `differs` is what ours gives instead of httpx's, `why` the reason."""

    answer: bytes
    method: str = "POST"
    differs: Outcome | None = None
    why: str = ""


def good(body: bytes, *headers: tuple[bytes, bytes], status: int = 200, reason: bytes = b"OK") -> Outcome:
    return Outcome(status, reason, b"HTTP/1.1", headers, body)


REFUSED = Outcome(error="RemoteProtocolError")
CHUNKED_HEADER = (b"Transfer-Encoding", b"chunked")
BROKEN = Outcome(200, b"OK", b"HTTP/1.1", (CHUNKED_HEADER,), b"", "RemoteProtocolError")
LLHTTP = "llhttp, which Node's clients use too, refuses it; h11 is lenient"
VERSIONS = "no request of ours asks for that version"
BOUNDS = "our bounds: 100 fields and 64 KiB; httpx has 100 KiB and no limit of fields"

CORPUS: dict[str, Row] = {
    # bodies that are well framed
    "length": Row(LENGTH + b"2\r\n\r\nab"),
    "length 0": Row(LENGTH + b"0\r\n\r\n"),
    "chunked": Row(CHUNKED + chunk(b"ab") + chunk(b"cde") + b"0\r\n\r\n"),
    "chunked, upper case": Row(
        OK + b"TRANSFER-ENCODING: Chunked\r\n\r\n" + chunk(b"ab") + b"0\r\n\r\n",
        differs=good(b"ab", (b"TRANSFER-ENCODING", b"Chunked")),
        why="h11 puts the value in lower case; ours gives headers as they came",
    ),
    "chunk sizes in upper case and with zeros": Row(CHUNKED + b"000A\r\n0123456789\r\n0\r\n\r\n"),
    "chunk extensions": Row(CHUNKED + b"2;a=b;c\r\nab\r\n0;d\r\n\r\n"),
    "trailers": Row(CHUNKED + chunk(b"ab") + b"0\r\nX: y\r\nZ: w\r\n\r\n"),
    "until EOF": Row(OK + b"\r\nab"),
    "until EOF, empty": Row(OK + b"\r\n"),
    "HTTP/1.0 until EOF": Row(b"HTTP/1.0 200 OK\r\n\r\nab"),
    "HTTP/1.0 with a length": Row(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab"),
    "HTTP/1.0 chunked": Row(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"),
    "205 until EOF": Row(b"HTTP/1.1 205 Reset\r\n\r\nab"),
    "no reason": Row(b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nab"),
    "empty reason": Row(b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nab"),
    "long reason": Row(b"HTTP/1.1 200 All is well here\r\nContent-Length: 2\r\n\r\nab"),
    "unknown status": Row(b"HTTP/1.1 799 What\r\nContent-Length: 2\r\n\r\nab"),
    "headers empty, padded, repeated, in Latin-1": Row(
        OK + b"A:\r\nB:  x \t\r\nb: y\r\nC: \xe9\r\nContent-Length: 0\r\n\r\n"
    ),
    # no body
    "HEAD with a length": Row(LENGTH + b"500\r\n\r\n", method="HEAD"),
    "HEAD chunked": Row(CHUNKED, method="HEAD"),
    "HEAD": Row(OK + b"\r\n", method="HEAD"),
    "HEAD with a body": Row(LENGTH + b"2\r\n\r\nab", method="HEAD"),
    "204": Row(b"HTTP/1.1 204 None\r\n\r\n"),
    "204 with a length": Row(b"HTTP/1.1 204 None\r\nContent-Length: 2\r\n\r\n"),
    "304 with a length": Row(b"HTTP/1.1 304 Same\r\nContent-Length: 500\r\n\r\n"),
    "304 chunked": Row(b"HTTP/1.1 304 Same\r\nTransfer-Encoding: chunked\r\n\r\n"),
    # interim answers
    "100": Row(b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH + b"2\r\n\r\nab"),
    "103": Row(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + LENGTH + b"2\r\n\r\nab"),
    "102, 103 and so on": Row(b"HTTP/1.1 102 P\r\n\r\nHTTP/1.1 103 E\r\n\r\n" * 9 + LENGTH + b"2\r\n\r\nab"),
    "100 with a length": Row(b"HTTP/1.1 100 C\r\nContent-Length: 9\r\n\r\n" + LENGTH + b"2\r\n\r\nab"),
    "100, then nothing": Row(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "101": Row(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nab"),
    "200 with an upgrade": Row(OK + b"Upgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 2\r\n\r\nab"),
    # bytes after the end
    "a second answer": Row(LENGTH + b"2\r\n\r\nab" + LENGTH + b"2\r\n\r\ncd"),
    "junk after a length": Row(LENGTH + b"2\r\n\r\nabjunk"),
    "junk after the last chunk": Row(CHUNKED + chunk(b"ab") + b"0\r\n\r\njunk"),
    "junk after close": Row(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nabjunk"),
    "junk after 204": Row(b"HTTP/1.1 204 None\r\n\r\njunk"),
    # cut short
    "nothing": Row(b""),
    "half a status line": Row(b"HTTP/1.1 20"),
    "half a header": Row(OK + b"Content-Le"),
    "headers without an end": Row(LENGTH + b"2\r\n"),
    "length not reached": Row(LENGTH + b"5\r\n\r\nab"),
    "cut before the body": Row(LENGTH + b"5\r\n\r\n"),
    "cut in a chunk": Row(CHUNKED + b"5\r\nab"),
    "cut in a chunk size": Row(CHUNKED + chunk(b"ab") + b"5"),
    "cut between chunks": Row(CHUNKED + chunk(b"ab")),
    "cut before the last CRLF": Row(CHUNKED + chunk(b"ab") + b"0\r\n"),
    "cut in the trailers": Row(CHUNKED + chunk(b"ab") + b"0\r\nX: y\r\n"),
    # bad chunks
    "chunk size not hex": Row(CHUNKED + chunk(b"ab") + b"xyz\r\nab\r\n0\r\n\r\n"),
    "chunk size empty": Row(CHUNKED + chunk(b"ab") + b"\r\nab\r\n0\r\n\r\n"),
    "chunk size negative": Row(CHUNKED + chunk(b"ab") + b"-2\r\nab\r\n0\r\n\r\n"),
    "chunk size with 0x": Row(CHUNKED + chunk(b"ab") + b"0x2\r\nab\r\n0\r\n\r\n"),
    "chunk size too big": Row(CHUNKED + chunk(b"ab") + b"f" * 24 + b"\r\nab\r\n0\r\n\r\n"),
    "no CRLF after a chunk": Row(CHUNKED + chunk(b"ab") + b"2\r\ncdXX2\r\nef\r\n0\r\n\r\n"),
    "chunk longer than its size": Row(CHUNKED + b"2\r\nabc\r\n0\r\n\r\n"),
    "space after a chunk size": Row(
        CHUNKED + b"2  \r\nab\r\n0\r\n\r\n",
        differs=BROKEN,
        why=LLHTTP,
    ),
    "LF for CRLF in chunks": Row(CHUNKED + b"2\nab\n0\n\n"),
    # lengths and codings that contradict
    "length and chunked": Row(
        OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        differs=REFUSED,
        why="RFC 9112 section 6.3: it ought to be handled as an error; httpx lets chunked win",
    ),
    "chunked and length": Row(
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        differs=REFUSED,
        why="as above",
    ),
    "two lengths that differ": Row(LENGTH + b"2\r\nContent-Length: 3\r\n\r\nabc"),
    "two lengths that agree": Row(
        LENGTH + b"2\r\nContent-Length: 2\r\n\r\nab",
        differs=REFUSED,
        why="llhttp refuses it; RFC 9110 section 8.6 allows both, and no sane server sends it",
    ),
    "a list of lengths": Row(LENGTH + b"2, 2\r\n\r\nab", differs=REFUSED, why="as above"),
    "length not a number": Row(LENGTH + b"two\r\n\r\nab"),
    "length negative": Row(LENGTH + b"-2\r\n\r\nab"),
    "length with a plus": Row(LENGTH + b"+2\r\n\r\nab"),
    "length empty": Row(LENGTH + b"\r\n\r\nab"),
    "length too big": Row(LENGTH + b"9" * 40 + b"\r\n\r\nab"),
    "gzip coding": Row(OK + b"Transfer-Encoding: gzip\r\n\r\nab"),
    "gzip, chunked": Row(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"),
    "chunked twice": Row(CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"),
    "identity coding": Row(OK + b"Transfer-Encoding: identity\r\n\r\nab"),
    # bad heads
    "not HTTP": Row(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "HTML": Row(b"<html>hello</html>\r\n\r\n"),
    "ICY": Row(b"ICY 200 OK\r\n\r\n"),
    "HTTP/2.0": Row(b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nab", differs=REFUSED, why=VERSIONS),
    "HTTP/0.9": Row(b"HTTP/0.9 200 OK\r\nContent-Length: 2\r\n\r\nab", differs=REFUSED, why=VERSIONS),
    "HTTP/1.2": Row(b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nab", differs=REFUSED, why=VERSIONS),
    "RTSP": Row(
        b"RTSP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab",
        differs=Outcome(200, b"OK", b"HTTP/1.0", ((b"Content-Length", b"2"),), b"ab"),
        why="llhttp takes RTSP for HTTP/1.0 and does not tell; it is closed after that one answer",
    ),
    "status of four digits": Row(b"HTTP/1.1 2000 OK\r\n\r\n"),
    "status of two digits": Row(b"HTTP/1.1 20 OK\r\n\r\n"),
    "status 099": Row(b"HTTP/1.1 099 OK\r\n\r\n"),
    "status 000": Row(b"HTTP/1.1 000 OK\r\n\r\n"),
    "no status": Row(b"HTTP/1.1 OK\r\n\r\n"),
    "LF line ends": Row(b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab", differs=REFUSED, why=LLHTTP),
    "CR line ends": Row(b"HTTP/1.1 200 OK\rContent-Length: 2\r\rab"),
    "CRLF before the status line": Row(
        b"\r\n" + LENGTH + b"2\r\n\r\nab",
        differs=good(b"ab", (b"Content-Length", b"2")),
        why="llhttp skips empty lines, as RFC 9112 section 2.2 has servers do; nothing can hide in them",
    ),
    "folded header": Row(OK + b"A: b\r\n c\r\nContent-Length: 2\r\n\r\nab", differs=REFUSED, why=LLHTTP),
    "space before the colon": Row(OK + b"A : b\r\nContent-Length: 2\r\n\r\nab"),
    "no colon": Row(OK + b"Abc\r\nContent-Length: 2\r\n\r\nab"),
    "empty name": Row(OK + b": b\r\nContent-Length: 2\r\n\r\nab"),
    "bad character in a name": Row(OK + b"A(b): c\r\nContent-Length: 2\r\n\r\nab"),
    "NUL in a value": Row(OK + b"A: b\0c\r\nContent-Length: 2\r\n\r\nab"),
    "control character": Row(OK + b"A: \x01\r\nContent-Length: 2\r\n\r\nab", differs=REFUSED, why=LLHTTP),
    "CR in a value": Row(OK + b"A: b\rc\r\nContent-Length: 2\r\n\r\nab"),
    # bounds
    "40 KB of headers": Row(OK + b"A: " + PADDING + b"\r\nContent-Length: 2\r\n\r\nab"),
    "80 KB of headers": Row(
        OK + b"A: %b\r\nB: %b\r\nContent-Length: 2\r\n\r\nab" % (PADDING, PADDING),
        differs=REFUSED,
        why=BOUNDS,
    ),
    "200 KB of headers": Row(OK + (b"A: " + PADDING + b"\r\n") * 5 + b"Content-Length: 2\r\n\r\nab"),
    "100 headers": Row(OK + b"A: b\r\n" * 99 + b"Content-Length: 2\r\n\r\nab"),
    "101 headers": Row(OK + b"A: b\r\n" * 100 + b"Content-Length: 2\r\n\r\nab", differs=REFUSED, why=BOUNDS),
    "a reason of 80 KB": Row(
        b"HTTP/1.1 200 %b%b\r\nContent-Length: 2\r\n\r\nab" % (PADDING, PADDING), differs=REFUSED, why=BOUNDS
    ),
}


def whole(answer: bytes) -> list[bytes]:
    return [answer]


def byte_by_byte(answer: bytes) -> list[bytes]:
    """Splits both ends of a long answer into bytes, not its middle, which would only take time."""
    if len(answer) < 2000:
        return [answer[i : i + 1] for i in range(len(answer))]
    return [*byte_by_byte(answer[:500]), *split_at_random(answer[500:-500]), *byte_by_byte(answer[-500:])]


def split_at_random(answer: bytes) -> list[bytes]:
    dice = random.Random(answer)
    cuts = sorted(dice.randrange(len(answer) + 1) for _ in range(dice.randrange(2, 9)))
    spans = zip([0, *cuts], [*cuts, len(answer)], strict=True)
    return [answer[start:end] for start, end in spans if start < end]


SPLITS: tuple[Callable[[bytes], list[bytes]], ...] = (whole, byte_by_byte, split_at_random)


def answering(parts: list[bytes]) -> Handler:
    async def handler(peer: Peer) -> None:
        await peer.answer(*parts)

    return handler


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


@pytest.mark.parametrize("label", CORPUS)
@on_both_loops
async def test_odd_and_malformed_answers(label: str, certificates: Certificates) -> None:
    """Each answer gives the result of httpx or of its row, pushed as well as pulled, however it is split."""
    row = CORPUS[label]
    ours = Transport(ssl_context=certificates.client, max_idle=0)  # another test covers bytes that arrive later
    theirs = httpx.AsyncHTTPTransport(verify=certificates.client)
    for split in SPLITS:
        async with serving(answering(split(row.answer))) as upstream:

            def request(url: str = upstream.url) -> httpx.Request:
                return httpx.Request(row.method, url, content=b"{}" if row.method == "POST" else None)

            expected = await pulled(theirs, request())
            if row.differs is not None:
                assert row.why
                assert expected != row.differs, "they agree: the row is out of date"
                expected = row.differs
            assert await pulled(ours, request()) == expected, split
            assert await pushed(ours, request()) == expected, split
    await ours.aclose()
    await theirs.aclose()


# ---- real servers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=REAL_SERVERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[tuple[str, str]]:
    """Its kind and its URL."""
    with real_server(request.param, tmp_path_factory.mktemp("server"), certificates) as url:
        yield request.param, url


def parts_of(body: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 7000):
            yield body[start : start + 7000]

    return parts


def exchanges(*, chunked: bool) -> list[tuple[str, str, Any]]:
    """Method, path and content, in the order in which they follow each other on one connection."""
    plain = [(method, path, None) for path in PATHS for method in ("GET", "HEAD")]
    big = random.Random(1).randbytes(60_000)
    bodies = [b"", b"small", big, *([parts_of(b"small"), parts_of(big)] if chunked else [])]
    return [*plain, *[("POST", "/echo", body) for body in bodies], *plain[:6]]


@on_both_loops
async def test_real_servers(server: tuple[str, str], certificates: Certificates) -> None:
    """Each framing that these servers use gives the same result as in httpx, request after request."""
    kind, url = server
    ours = Transport(ssl_context=certificates.client)
    theirs = httpx.AsyncHTTPTransport(verify=certificates.client)
    timeout = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}

    def request(method: str, path: str, content: Any) -> httpx.Request:
        body = content() if callable(content) else content
        return httpx.Request(method, url + path, content=body, extensions={"timeout": timeout})

    for exchange in exchanges(chunked=kind != "http.server"):  # which cannot read a chunked request
        expected = await pulled(theirs, request(*exchange))
        assert expected.error == "", exchange
        assert await pulled(ours, request(*exchange)) == expected, exchange
        assert await pushed(ours, request(*exchange)) == expected, exchange
    assert ours.open_sockets <= 1
    await ours.aclose()
    await theirs.aclose()


@on_both_loops
async def test_errors_of_connecting(certificates: Certificates) -> None:
    """Refused, unresolved, TLS against plain text and an unknown scheme raise what httpx raises."""
    stranger = Certificates()
    ours = Transport(ssl_context=certificates.client)
    theirs = httpx.AsyncHTTPTransport(verify=certificates.client)

    async def handler(peer: Peer) -> None:
        await peer.send(OK + b"\r\n")

    async with serving(handler) as plain, serving(handler, tls=stranger.server("127.0.0.1")) as untrusted:
        urls = ["http://127.0.0.1:1/", "http://nosuch.invalid/", "ftp://127.0.0.1/", untrusted.url]
        for url in (*urls, plain.url.replace("http:", "https:")):
            request = httpx.Request("GET", url, extensions={"timeout": {"connect": 2.0}})
            expected = await pulled(theirs, request)
            assert expected.error
            assert await pulled(ours, request) == expected
        await ours.aclose()
        await theirs.aclose()
