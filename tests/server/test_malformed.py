"""Malformed requests: any bytes get one of our own answers or none, and no other client is affected.

CHAT_PROXY_FULL=1 sends 100,000 of them; by default 3,000. `case_at(number)` is the same in every run, so a failed
case can be sent again alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as tuned
from hypothesis import strategies as st
from support.faults import fault
from support.harness import (
    DONE,
    FULL,
    GOOD,
    LOOPS,
    PATIENCE,
    Peer,
    Reply,
    Running,
    Script,
    ScriptedUpstream,
    chunks,
    connect,
    delta,
    eventually,
    finish,
    running,
    send,
    streaming,
)
from support.tricks import CHUNK, HOPELESS, KNOWN, SEED, TRAILERS, Case, case_at, coded, cut_up, post

from proxy.errors import HeaderList, HeadersTooLarge, InvalidRequest
from proxy.server.protocol import MAX_FIELDS, check_head
from proxy.telemetry.logs import Bridge

REQUESTS = 100_000 if FULL else 3_000
EXAMPLES = 5000 if FULL else 80
AT_ONCE = 96
LULL = 0.1  # seconds of silence after which a client stops waiting for an answer to a possibly incomplete request
GAP = 5.0  # seconds between two events of another client's stream: only a stall takes so long
MUCH = 4000  # characters of a failure's message
MOMENT = 0.002  # seconds to wait for the next answer, and between the pieces of a request
PACE = 0.02  # seconds between two events of that stream

both_loops = pytest.mark.parametrize("loop", LOOPS)

# ---- the clients --------------------------------------------------------------------------------------------------

HEAD = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [A-Za-z -]+\r\n((?:[a-z-]+: [\t -~]+\r\n)*)\r\n")
CODES = {  # of a request without a valid body or cookie
    400: {"invalid_json", "invalid_request", "model_not_allowed", "field_not_allowed"},
    401: {"session_required"},
    403: {"cross_origin"},
    404: {"not_found"},
    405: {"method_not_allowed"},
    411: {"length_required"},
    413: {"body_too_large"},
    415: {"unsupported_media_type"},
    431: {"headers_too_large"},
}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    def __str__(self) -> str:
        return f"{'app' if b'x-request-id' in self.headers else 'server'} {self.status}"

    @property
    def closes(self) -> bool:
        return self.headers.get(b"connection") == b"close"


def answers_in(got: bytes, sent: bytes) -> tuple[list[Answer], bytes]:
    """The whole answers, and the bytes after them."""
    answers = []
    while (end := got.find(b"\r\n\r\n") + 4) > 3:
        matched = HEAD.fullmatch(got, 0, end)
        assert matched, "this is no answer"
        if matched[1] == b"100":
            got = got[end:]
            continue
        lines = matched[2].splitlines()
        headers = dict(line.split(b": ", 1) for line in lines)
        assert len(headers) == len(lines), "a header twice"
        length = int(headers[b"content-length"])
        if b"HEAD " in sent and got[end : end + 5] in (b"", b"HTTP/"):
            length = 0
        if len(got) < end + length:
            break
        answers.append(Answer(int(matched[1]), headers, got[end : end + length]))
        got = got[end + length :]
    return answers, got


def check_answer(answer: Answer) -> None:
    assert b"server" not in answer.headers
    assert not any(name.startswith(b"access-control-") for name in answer.headers)
    assert answer.headers[b"x-content-type-options"] == b"nosniff"
    if answer.status < 400:
        assert answer.status in (200, 206)
    elif answer.body:  # no body after HEAD
        assert answer.headers[b"content-type"] == b"application/json"
        assert b"no-store" in answer.headers[b"cache-control"]
        assert answer.closes or b"x-request-id" in answer.headers
        check_error(answer.status, answer.body)


def check_error(status: int, body: bytes) -> None:
    """Asserts that the answer is one of our errors, with a code that the contract lists for this status."""
    (name, error), *more = json.loads(body).items()
    assert (name, more, list(error)) == ("error", [], ["message", "type", "param", "code"])
    assert error["code"] in CODES[status]
    assert error["message"]
    assert error["type"]


@dataclass(eq=False)
class Client:
    """One of many clients that one thread runs."""

    case: Case
    sock: socket.socket
    todo: list[bytes] = field(default_factory=list)
    got: bytes = b""
    moved: float = field(default_factory=time.monotonic)
    closed: bool = False  # our half
    left: bool = False  # before its answer came

    def go_on(self) -> None:
        """Sends the next piece, or half-closes when nothing is left to send or to wait for."""
        now = time.monotonic()
        if self.todo:
            self.moved = now
            with suppress(ConnectionError):  # the request was refused already
                self.sock.sendall(self.todo.pop(0))
        elif self.closed:
            assert now - self.moved < PATIENCE, "the server did not close"
        elif self.case.rude or self.is_answered or (self.case.answers is None and now - self.moved > LULL):
            self.closed, self.left, self.moved = True, not self.is_answered, now
            with suppress(OSError):  # the server closed first
                self.sock.shutdown(socket.SHUT_WR)
        else:
            assert now - self.moved < PATIENCE, "no answer"

    @property
    def is_answered(self) -> bool:
        answers, rest = answers_in(self.got, self.case.sent)
        return bool(answers) and not rest

    def read(self) -> bool:
        """False when the server has closed."""
        try:
            part = self.sock.recv(65536)
        except ConnectionError:
            return False
        self.got += part
        return bool(part)

    def check(self) -> None:
        answers, rest = answers_in(self.got, self.case.sent)
        for answer in answers:
            check_answer(answer)
        # A page may be cut when its client half-closed or sent more bytes: other threads read its files.
        assert not rest or (rest.startswith(b"HTTP/1.1 200 ") and b"content-type: text/html" in rest), "cut"
        assert not any(answer.closes for answer in answers[:-1]), "more after the last answer"
        at_most = 1 if len(self.case.pieces) == 1 else self.case.sent.count(b"HTTP/") + 1
        assert len(answers) <= at_most, "more answers than requests"
        if self.case.answers is not None:
            found = tuple(map(str, answers))
            assert found == self.case.answers or (self.left and not found), f"not {self.case.answers}"


def converse(proxy: Running, cases: Iterable[Case]) -> None:
    """Runs a client for each case, AT_ONCE at a time, and checks its answers."""
    coming, present = iter(cases), dict[socket.socket, Client]()
    try:
        with selectors.DefaultSelector() as selector:
            while True:
                for case in islice(coming, AT_ONCE - len(present)):
                    sock = connect(proxy)
                    selector.register(sock, selectors.EVENT_READ)
                    present[sock] = Client(case, sock, list(case.pieces))
                if not present:
                    return
                for key, _ in selector.select(MOMENT):
                    client = present[cast(socket.socket, key.fileobj)]
                    if not client.read():
                        selector.unregister(client.sock)
                        del present[client.sock]
                        client.sock.close()
                        blaming(client, Client.check)
                for client in present.values():
                    blaming(client, Client.go_on)
    finally:
        for sock in present:
            sock.close()


def blaming(client: Client, act: Callable[[Client], None]) -> None:
    """Calls `act`; a failure names the case, the bytes sent and the bytes received."""
    try:
        act(client)
    except (AssertionError, KeyError, ValueError) as error:
        raise AssertionError(f"{client.case.name}: {client.case.pieces} -> {client.got!r}"[:MUCH]) from error


# ---- the streams beside them --------------------------------------------------------------------------------------


def counting(over: threading.Event) -> Script:
    """Streams numbers until `over` is set. Fails for any request but that of the counting client."""

    async def script(peer: Peer) -> None:
        seen = await peer.request()
        assert seen.json["messages"][-1]["content"] == "count", "this came through"
        await peer.head()
        number = 0
        while not over.is_set():
            await peer.chunk(delta(str(number)))
            number += 1
            await asyncio.sleep(PACE)
        await peer.chunk(finish() + DONE)
        await peer.end()

    return script


def listen_to_the_count(proxy: Running) -> int:
    """Reads the counting stream to its end and returns its length. Raises TimeoutError after a GAP without an event."""
    question = b'{"messages":[{"role":"user","content":"count"}],"stream":true}'
    with connect(proxy) as sock:
        sock.settimeout(GAP)
        sock.sendall(post(b"Content-Length: %d" % len(question), body=question))
        heard = b"".join(chunks(sock))
    count = heard.count(b"\n\n") - 2
    assert heard == b"".join([*(delta(str(number)) for number in range(count)), finish(), DONE])
    return count


@contextmanager
def warnings_in(proxy: Running) -> Iterator[None]:
    """Sends the warnings of uvicorn and the event loop to our log."""
    loggers, bridge = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")], Bridge(proxy.service.logs)
    for logger in loggers:
        logger.addHandler(bridge)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(bridge)
            logger.propagate = True


RATES = ("LIMITS_PER_SESSION", "LIMITS_PER_ADDRESS", "LIMITS_NEW_SESSIONS", "LIMITS_REFUSALS_PER_ADDRESS")
SETTINGS = {"SERVER_PUBLIC_URL": "http://localhost", **dict.fromkeys(RATES, "100000/second")}


@contextmanager
def beside_a_stream(loop: str) -> Iterator[Running]:
    """Runs a server with a live stream of another client. Asserts that it continued, and that nothing is left."""
    over = threading.Event()
    with (
        ScriptedUpstream(counting(over)) as upstream,
        running(upstream.base_url, loop=loop, **SETTINGS) as proxy,
        warnings_in(proxy),
        ThreadPoolExecutor(1) as pool,
    ):
        began = time.monotonic()
        listening = pool.submit(listen_to_the_count, proxy)
        try:
            eventually(lambda: upstream.seen)
            yield proxy
            took = time.monotonic() - began
        finally:
            over.set()
        assert listening.result(PATIENCE) > took / GAP
        assert len(upstream.seen) == upstream.connections == 1
        guard = proxy.service.guard
        eventually(lambda: not guard.open and not guard.reading and not guard.sockets)
        proxy.assert_nothing_left()
        assert proxy.lines("bug") == []
        assert proxy.lines("library") == []
        assert proxy.lines("lines_dropped") == []


# ---- they do no harm ----------------------------------------------------------------------------------------------


@both_loops
def test_known_tricks_get_their_answers(loop: str) -> None:
    """Each known trick gets its one answer, however its bytes are split."""
    dice = random.Random(SEED)
    with beside_a_stream(loop) as proxy:
        for cut in (lambda sent: [sent], lambda sent: cut_up(dice, sent), lambda sent: cut_up(dice, sent, 100)):
            converse(proxy, [Case(name, cut(sent), answers=answers) for name, sent, answers in KNOWN])


@pytest.mark.slow
@fault(39)
@both_loops
def test_malformed_requests_harm_no_other_client(loop: str) -> None:
    """No malformed request gets a 500 or a text that is not ours, and none reaches the upstream."""
    first = list(LOOPS).index(loop) * REQUESTS // 2
    with beside_a_stream(loop) as proxy:
        converse(proxy, map(case_at, range(first, first + REQUESTS // 2)))


@both_loops
def test_trailers_are_no_headers(loop: str) -> None:
    """Trailers are not treated as headers: a proxy in front has not checked them."""
    cases = [Case(name, [sent], answers=(f"app {status}",)) for name, (status, sent) in TRAILERS.items()]
    with beside_a_stream(loop) as proxy:
        converse(proxy, cases)
        converse(proxy, [Case("address", [coded(CHUNK + b"0\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n")])])
        eventually(lambda: proxy.lines()[len(cases) :])
        assert {line["address"] for line in proxy.lines()} == {"127.0.0.0/24"}


@both_loops
def test_trailers_have_a_bound(loop: str) -> None:
    """The bound on fields covers trailers too: otherwise a body of trailers alone would fill memory."""
    with beside_a_stream(loop) as proxy:
        for trailers in (b"A: b\r\n" * 20_000, b"A: " + b"b" * 100_000 + b"\r\n"):
            sent = coded(CHUNK + b"0\r\n" + trailers + b"\r\n")
            converse(proxy, [Case("trailers", [sent], answers=("server 431",))])


# ---- what the contract lists for each address ---------------------------------------------------------------------

QUESTION = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
CHATS = ("/api/chat", "/api/v1/chat/completions")
PROBES = ("/healthz", "/readyz")
ADDRESSES: dict[str, dict[str, set[int]]] = {
    **{chat: {"POST": {200, 400, 401, 403, 415}} for chat in CHATS},
    "/api/v1/models": {"GET": {200, 403}},
    "/api/session": {"GET": {200, 403}, "DELETE": {200, 403}},
}
TWISTS: list[Callable[[str], str]] = [
    lambda path: path,
    lambda path: path + "?a=/api/chat",
    lambda path: path + "/",
    lambda path: path + "%00",
    lambda path: path + "/../session",
    lambda path: path.upper(),
    lambda path: path.replace("a", "%61"),
    lambda path: "/" + path,
]
PARTS: dict[str, tuple[int, list[Any]]] = {  # of a request: how many values, from the first, are valid in a chat
    "method": (1, ["POST", "GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]),
    "path": (2, [*ADDRESSES, "/api", "/api/check/x", "/", "/index.html", "/page/page.js", *PROBES]),
    "twist": (2, TWISTS),
    "body": (1, [QUESTION, HOPELESS, None, b"", b"{", b"null", b"[]", b"{}", b"\xff", b'{"a":NaN}', b"[" * 1000]),
    "host": (3, ["localhost", "LOCALHOST", "127.0.0.1:80", "evil.example", "localhost:81", "a" * 2000]),
    "content-type": (2, ["application/json", "application/json;charset=x", "text/plain", "", "a" * 2000, "\xff", None]),
    "origin": (3, ["http://localhost", "http://127.0.0.1", None, "https://evil.example", "null", "", "\xff"]),
    "sec-fetch-site": (3, ["same-origin", "none", None, "cross-site", "same-site", "", "x"]),
    "cookie": (3, ["other=1", None, ";;=;", "chat=", "chat=a.b", "chat=a; chat=b", "chat=\xff", "chat=" + "a" * 2000]),
    "x-forwarded-for": (8, ["203.0.113.7", None, "unknown", "", "::1, 10.0.0.1", "," * 500, "\xff", "[::1]:x"]),
    "x-request-id": (6, ["abc-1", None, "", "a" * 65, "\xe9", "a b"]),
}
GOOD_PARTS = {name: values[0] for name, (_, values) in PARTS.items()}
changes = st.lists(st.sampled_from([*PARTS]), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(PARTS[name][1]) for name in names})
)
OUR_COOKIE = re.compile(r"chat=[\w.=-]*; Path=/; Max-Age=\d+; HttpOnly; SameSite=Strict")

Ask = Callable[[str, str, bytes | None, dict[str, str]], tuple[Reply, int]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Sends a request; returns its answer and the number of calls at the upstream."""
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        running(upstream.base_url, **SETTINGS) as proxy,
        warnings_in(proxy),
    ):

        def asking(method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[Reply, int]:
            before = len(upstream.seen)
            return send(proxy, method, path, body, headers), len(upstream.seen) - before

        yield asking
        assert proxy.lines("bug") == proxy.lines("library") == []


@tuned(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(changed=changes)
def test_every_answer_is_one_of_the_contract(ask: Ask, changed: dict[str, Any]) -> None:
    """Each request gets a status that the contract lists, with our headers; only a valid chat reaches the upstream."""
    method, path, twist, body, *fields = (GOOD_PARTS | changed).values()
    headers = {name: value for name, value in zip([*PARTS][4:], fields, strict=True) if value is not None}
    reply, calls = ask(method, twist(path), body, headers)
    address = twist(path).partition("?")[0]
    assert reply.status in statuses(method, address)
    check_reply(reply, method, address, headers)
    is_good = all(value in PARTS[name][1][: PARTS[name][0]] for name, value in changed.items())
    assert calls == is_good
    assert not is_good or reply.body == b"".join(GOOD)


def statuses(method: str, address: str) -> set[int]:
    if methods := ADDRESSES.get(address):
        return methods.get(method, {405})
    if address.lower().startswith("/api"):
        return {404}
    is_read = method in ("GET", "HEAD")
    if unquote(address) in PROBES:
        return {200} if is_read else {405}
    return {200, 404} if is_read else {404}


def check_reply(reply: Reply, method: str, address: str, headers: dict[str, str]) -> None:
    names = {name.lower() for name in reply.headers}
    assert not {name for name in names if name.startswith("access-control-") or name == "server"}
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    if reply.status >= 400 and method != "HEAD":
        assert reply.headers["content-type"] == "application/json"
        check_error(reply.status, reply.body)
    assert ("allow" in names) == (reply.status == 405)
    if address.startswith("/api"):
        given_id, our_id = headers.get("x-request-id", ""), reply.headers["x-request-id"]
        assert (our_id == given_id) == (re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given_id) is not None)
        assert "no-store" in reply.headers["cache-control"]
    if "set-cookie" in names:
        assert address in (*CHATS, "/api/session")
        assert OUR_COOKIE.fullmatch(reply.headers["set-cookie"])


# ---- the head, as a pure function ---------------------------------------------------------------------------------


WORDS = [b"localhost", b"[::1]:80", b"chunked", b"chunked, chunked", b"5", b"/"]
words = st.binary(max_size=12) | st.sampled_from(WORDS)
fields = st.tuples(st.binary(max_size=8) | st.sampled_from([b"host", b"transfer-encoding", b"content-length"]), words)


@pytest.mark.slow
@given(
    version=st.text(max_size=4) | st.sampled_from(["1.0", "1.1"]),
    target=words,
    headers=st.lists(fields, max_size=4) | st.lists(fields, min_size=MAX_FIELDS - 1, max_size=MAX_FIELDS + 2),
)
@example(version="1.1", target=b"/", headers=[(b"host", b"a"), *[(b"transfer-encoding", b"chunked")] * 2])
def test_no_bytes_make_the_head_rule_fail(version: str, target: bytes, headers: HeaderList) -> None:
    """The head rule refuses any bytes that a parser might accept, or gives them one meaning."""
    with suppress(InvalidRequest, HeadersTooLarge):
        check_head(version, target, headers)
        names = [name for name, _ in headers]
        assert target.startswith(b"/")
        assert len(names) <= MAX_FIELDS
        assert names.count(b"host") == 1 or (version, names.count(b"host")) == ("1.0", 0)
        assert names.count(b"transfer-encoding") <= (version == "1.1")
