"""The diagnostic routes: which requests they accept, what they report, and what they cannot do to the server."""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
from itsdangerous import Signer
from support.harness import (
    GOOD,
    LOOPS,
    Reply,
    Running,
    ScriptedUpstream,
    chat,
    connect,
    eventually,
    read_until,
    running,
    send,
    streaming,
)

from proxy.check.report import CHAT, HEADER, LOOK, Report, decode_report
from proxy.check.routes import LONGEST_STREAM, MOST_EVENTS, MOST_STREAMS, REMEMBERED
from proxy.check.ticket import LONGEST, VALID_SECONDS, Tickets
from proxy.limits import requests
from proxy.limits.requests import CHECKS
from proxy.settings import Rate

NEW, OLD, OTHER = (secrets.token_urlsafe(32) for _ in range(3))
NOWHERE = "http://127.0.0.1:9/v1"
LOOKS = ("echo", "echo&cookie=1", "refusal&status=503", "stream&name=0123456789abcdef&events=1&spacing=0", "departure")


CHAT_BODY = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
CHAT_HEADERS = {"content-type": "application/json"}


@pytest.fixture(scope="module", params=LOOPS)
def proxy(request: pytest.FixtureRequest) -> Iterator[Running]:
    with ExitStack() as stack:
        with patch.object(requests, "CHECKS", Rate(100_000, 60, "100000/minute")):  # it is read when a server starts
            server = stack.enter_context(running(NOWHERE, loop=request.param, SESSION_SECRET=f"{NEW}\n{OLD}"))
        yield server


def ticket(secret: str = NEW, age: float = 0) -> str:
    return Tickets([secret]).issue(time.time() - age)


def look(
    proxy: Running, what: str, method: str = "GET", body: bytes | None = None, path: str = LOOK, **headers: str
) -> Reply:
    """A request with a good ticket."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return send(proxy, method, f"{path}?check={what}", body, {HEADER: ticket(), **more})


def report(reply: Reply) -> Report:
    assert reply.status == 200, reply.body
    return decode_report(reply.body)


def fields(headers: http.client.HTTPMessage) -> dict[str, str]:
    """What does not differ between two answers to the same request."""
    return {name: value for name, value in headers.items() if name not in ("x-request-id", "date")}


# ---- tickets --------------------------------------------------------------------------------------------------------


def resigned(payload: bytes, secret: str = NEW, salt: bytes = b"chat-proxy.check") -> str:
    return Signer(secret, salt, ".", "hmac", hashlib.sha256).sign(payload).decode()


BAD_TICKETS: dict[str, Callable[[], str | None]] = {
    "none": lambda: None,
    "empty": lambda: "",
    "forged": lambda: f"{int(time.time())}.{'A' * 43}",
    "of another secret": lambda: ticket(OTHER),
    "replayed after its time": lambda: ticket(age=VALID_SECONDS + 5),
    "of a time to come": lambda: ticket(age=-VALID_SECONDS - 5),
    "made younger": lambda: ticket(age=500).replace(str(int(time.time() - 500)), str(int(time.time()))),
    "cut": lambda: ticket()[:-1],
    "with more behind it": lambda: ticket() + "A",
    "twice": lambda: f"{ticket()}, {ticket()}",
    "a session's signature": lambda: resigned(b"%d" % time.time(), salt=b"chat-proxy.session"),
    "no time in it": lambda: resigned(b"now"),
    "an endless time in it": lambda: resigned(b"9" * 60),
    "too long": lambda: resigned(b"0" * LONGEST),
    "not ASCII": lambda: "\xe9" * 20,
}


@pytest.mark.parametrize("label", BAD_TICKETS)
def test_without_a_good_ticket_there_is_nothing(label: str, proxy: Running) -> None:
    """Without a good ticket the address is what any unknown one is: 404, by any method, to the last header."""
    before = set(proxy.service.app.diagnosis.departures)  # of the tests before this one
    given = BAD_TICKETS[label]()
    headers = {} if given is None else {HEADER: given}
    unknown = send(proxy, "GET", "/api/nothing/echo", headers=headers)
    assert unknown.status == 404
    for what in LOOKS:
        for method in ("GET", "POST", "DELETE", "OPTIONS"):
            reply = send(proxy, method, f"{LOOK}?check={what}", headers=headers)
            assert (reply.status, reply.body) == (404, unknown.body)
            assert fields(reply.headers) == fields(unknown.headers)
    assert set(proxy.service.app.diagnosis.departures) == before


@pytest.mark.parametrize("secret", [NEW, OLD], ids=["newest", "older"])
def test_each_key_lets_in(secret: str, proxy: Running) -> None:
    """The newest key and those before it verify: check may run with either while they are changed."""
    for age in (0, VALID_SECONDS - 5, 5 - VALID_SECONDS):
        assert send(proxy, "GET", f"{LOOK}?check=echo", headers={HEADER: ticket(secret, age)}).status == 200


def test_the_newest_key_signs() -> None:
    """A ticket of two keys is one of the first."""
    issued = Tickets([NEW, OLD]).issue(1000)
    assert Tickets([NEW]).admit(issued.encode(), 1000)
    assert not Tickets([OLD]).admit(issued.encode(), 1000)
    assert len(issued) < LONGEST / 2


def test_reloaded_secrets_let_in(tmp_path: Any) -> None:
    """A key that SIGHUP has brought lets in, and one that it has taken does not."""
    file = tmp_path / "secret"
    file.write_text(OLD)
    with running(NOWHERE, SESSION_SECRET_FILE=str(file)) as proxy:
        file.write_text(NEW)
        proxy.on_loop(proxy.service.app.reload_secrets)
        assert send(proxy, "GET", f"{LOOK}?check=echo", headers={HEADER: ticket(NEW)}).status == 200
        assert send(proxy, "GET", f"{LOOK}?check=echo", headers={HEADER: ticket(OLD)}).status == 404


def test_a_generated_secret_lets_nobody_in() -> None:
    """Without a configured secret no ticket can be signed."""
    with running(NOWHERE) as proxy:
        assert send(proxy, "GET", f"{LOOK}?check=echo", headers={HEADER: ticket()}).status == 404


def test_no_ticket_in_the_log(proxy: Running) -> None:
    """Neither a ticket that was good nor one that was not is in a log line or a metric; the route is."""
    for shown in (ticket(), ticket(OTHER)):
        lines = len(proxy.lines())
        send(proxy, "GET", f"{LOOK}?check=echo", headers={HEADER: shown})
        assert proxy.line(lines + 1)["route"] == f"GET {LOOK}"
        written = proxy.output.getvalue() + proxy.service.app.metrics.exposition()
        assert shown.partition(".")[2].encode() not in written


@pytest.mark.parametrize("what", ["", "nothing", "echo%00", "__init__"])
def test_what_cannot_be_shown(what: str, proxy: Running) -> None:
    """An unknown check with a valid ticket is 404."""
    for path in (LOOK, *CHAT):
        assert look(proxy, what, "POST", b"", path).error["code"] == "not_found"
    assert send(proxy, "POST", LOOK, headers={HEADER: ticket()}).error["code"] == "not_found"
    assert send(proxy, "GET", "/api/check/other", headers={HEADER: ticket()}).error["code"] == "not_found"


@pytest.mark.parametrize("path", CHAT)
def test_the_chats_own_address_shows_it_too(path: str) -> None:
    """With a ticket a chat's address shows the same; without, or with a bad one, it is a chat like any."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, SESSION_SECRET=NEW) as proxy:
        assert report(look(proxy, "echo", "POST", b"123", path)).body == 3
        assert b"[DONE]" in look(proxy, wish(), "POST", b"", path).body
        assert upstream.seen == []
        eventually(lambda: [line.get("check") for line in proxy.lines()] == [True, True])
        for given in (ticket(OTHER), ""):
            reply = send(proxy, "POST", f"{path}?check=echo", CHAT_BODY, {**CHAT_HEADERS, HEADER: given})
            assert reply.body == b"".join(GOOD)
        assert len(upstream.seen) == 2
        assert HEADER not in upstream.seen[-1].headers
        assert look(proxy, "echo", "GET", None, path).status == 200


def test_requests_are_limited() -> None:
    """All tickets together open so many requests a minute, and no more: 429 with a Retry-After."""
    with running(NOWHERE, SESSION_SECRET=NEW) as proxy:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        statuses = []
        for _ in range(CHECKS.amount + 1):
            connection.request("GET", f"{LOOK}?check=refusal&status=404", headers={HEADER: ticket()})
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
        connection.close()
        assert statuses == [404] * CHECKS.amount + [429]
        assert int(response.headers["retry-after"]) >= 1
        assert send(proxy, "GET", "/api/session").status == 200


# ---- echo -----------------------------------------------------------------------------------------------------------


def test_echo_tells_what_arrived(proxy: Running) -> None:
    """The report holds what the server made of the request, a foreign Host included, and the headers of its answer."""
    reply = look(
        proxy,
        "echo",
        "POST",
        b"12345",
        host="elsewhere.example",
        origin="https://a.example",
        sec_fetch_site="cross-site",
        cookie="one=secret; two=secret",
        x_forwarded_for="203.0.113.9",
        x_request_id="mine",
    )
    told = report(reply)
    assert (told.host, told.origin, told.fetch_site) == ("elsewhere.example", "https://a.example", "cross-site")
    assert (told.address, told.through_proxy, told.forwarded) == ("203.0.113.9", True, "203.0.113.9")
    assert (told.version, told.scheme, told.body, told.names_user) == ("1.1", "http", 5, False)
    assert told.cookies == ["one", "two"]
    assert b"secret" not in reply.body
    assert told.public_url == proxy.url
    assert proxy.url in told.origins
    assert abs(told.now - time.time()) < 10
    assert told.request_id == "mine"
    arrived = {name: value for name, value in reply.headers.items() if name not in ("date", "content-length")}
    assert dict(told.sent) == arrived


def test_echo_sees_the_socket(proxy: Running) -> None:
    """The peer is the socket's far end: when both ends report the same one, there is no proxy between them."""
    with connect(proxy) as sock:
        sock.sendall(f"GET {LOOK}?check=echo HTTP/1.0\r\n{HEADER}: {ticket()}\r\n\r\n".encode())
        told = decode_report(read_until(sock, b"}").partition(b"\r\n\r\n")[2])
        assert told.peer is not None
        assert tuple(told.peer) == sock.getsockname()
        assert (told.version, told.host) == ("1.0", None)


def test_echo_gives_a_cookie_that_opens_nothing(proxy: Running) -> None:
    """Its cookie has the attributes of a session's, and another name; no session is counted for it."""
    reply = look(proxy, "echo&cookie=1")
    assert reply.headers["set-cookie"] == "chat-check=looked; Path=/; Max-Age=60; HttpOnly; SameSite=Strict"
    assert report(reply).cookies_sent == [reply.headers["set-cookie"]]
    assert look(proxy, "echo").headers["set-cookie"] is None


def test_echo_takes_no_more_than_a_chat(proxy: Running) -> None:
    """A body of max_body_bytes is counted; one byte more is 413 in our shape."""
    most = proxy.settings.server.max_body_bytes
    assert report(look(proxy, "echo", "POST", b"x" * most)).body == most
    assert look(proxy, "echo", "POST", b"x" * (most + 1)).error["code"] == "body_too_large"


def test_names_of_users_are_not_told() -> None:
    """Where a header names users, the report contains that there was one, not its value."""
    with running(NOWHERE, SESSION_SECRET=NEW, SESSION_MODE="header") as proxy:
        reply = look(proxy, "echo", x_forwarded_email="alice@example.org")
        assert report(reply).names_user
        assert b"alice" not in reply.body


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "session_required"), (404, "not_found"), (429, "rate_limited"), (502, "upstream_error"), (503, "busy")],
)
def test_refusals_on_demand(status: int, code: str, proxy: Running) -> None:
    """An error comes as it would, and no metric of refusals has heard of it."""
    before = proxy.service.app.metrics.exposition()
    reply = look(proxy, f"refusal&status={status}")
    assert (reply.status, reply.error["code"]) == (status, code)
    counted = [line for line in proxy.service.app.metrics.exposition().splitlines() if code.encode() in line]
    assert all(line in before for line in counted)


@pytest.mark.parametrize("query", ["", "&status=", "&status=200", "&status=418", "&status=%00"])
def test_other_refusals_are_refused(query: str, proxy: Running) -> None:
    assert look(proxy, f"refusal{query}").error["code"] == "invalid_request"


# ---- streams --------------------------------------------------------------------------------------------------------


def wish(name: str = "", events: int | str = 3, spacing: float | str = 0.05) -> str:
    return f"stream&name={name or secrets.token_hex(16)}&events={events}&spacing={spacing}"


def departure(proxy: Running, name: str) -> tuple[str, float]:
    told = look(proxy, f"departure&name={name}").json
    return told["state"], told["at"]


def opened(proxy: Running, name: str, spacing: float = 60) -> socket.socket:
    """A stream of which the first event has come, and the second will not."""
    sock = connect(proxy)
    head = f"GET {LOOK}?check={wish(name, 2, spacing)} HTTP/1.1\r\nhost: 127.0.0.1\r\n{HEADER}: {ticket()}\r\n\r\n"
    sock.sendall(head.encode())
    read_until(sock, b"\n\n\r\n")
    return sock


def test_stream_has_a_rhythm(proxy: Running) -> None:
    """Events come with the time at which each was sent, the first with the report; the last word is [DONE]."""
    name = secrets.token_hex(16)
    reply = look(proxy, wish(name))
    *events, done = reply.body.rstrip(b"\n").split(b"\n\n")
    assert done == b"data: [DONE]"
    told = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert [event["number"] for event in told] == [0, 1, 2]
    times = [event["at"] for event in told]
    assert all(at >= number * 0.05 - 0.001 for number, at in enumerate(times))
    assert dict(told[0]["report"]["sent"])["x-request-id"] == reply.headers["x-request-id"]
    assert told[1]["report"] is None
    state, at = departure(proxy, name)
    assert state == "complete"
    assert at >= times[-1]


def test_stream_has_the_headers_of_a_real_one() -> None:
    """What a proxy in front decides by is the same: the headers of a chat's stream, name by name and value by value."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, SESSION_SECRET=NEW) as proxy:
        real, ours = chat(proxy), look(proxy, wish())
    differing = {"date", "x-request-id", "set-cookie", "ratelimit", "ratelimit-policy"}
    assert {name for name, _ in real.headers.items()} - {"set-cookie"} == {name for name, _ in ours.headers.items()}
    assert {item for item in real.headers.items() if item[0] not in differing} == {
        item for item in ours.headers.items() if item[0] not in differing
    }


BAD_WISHES = {
    "nothing": "stream",
    "no name": "stream&name=&events=1&spacing=0",
    "a strange name": wish(name="../../etc/passwd"),
    "no events": wish(events=0),
    "too many events": wish(events=MOST_EVENTS + 1, spacing=0),
    "too long": wish(events=2, spacing=LONGEST_STREAM + 1),
    "too long in all": wish(events=100, spacing=2),
    "back in time": wish(events=2, spacing=-1),
    "no number": wish(events="many"),
    "not a number": wish(events=2, spacing="nan"),
    "endless": wish(events=2, spacing="inf"),
    "once for ever": wish(events=1, spacing="inf"),
}


@pytest.mark.parametrize("label", BAD_WISHES)
def test_streams_are_short(label: str, proxy: Running) -> None:
    """What is no short stream is 400, and nothing is remembered of it."""
    before = len(proxy.service.app.diagnosis.departures)
    assert look(proxy, BAD_WISHES[label]).error["code"] == "invalid_request"
    assert len(proxy.service.app.diagnosis.departures) == before


def test_leaving_is_noticed(proxy: Running) -> None:
    """A stream that was left in a silence ends at once, and the time at which it did can be asked for."""
    name = secrets.token_hex(16)
    began = time.monotonic()
    with opened(proxy, name):
        begun = time.monotonic()
        assert departure(proxy, name)[0] == "open"
        lasted = time.monotonic() - begun
    eventually(lambda: departure(proxy, name)[0] != "open")
    state, at = departure(proxy, name)
    assert state == "left"
    assert lasted - 0.01 <= at <= time.monotonic() - began
    assert departure(proxy, secrets.token_hex(16)) == ("unknown", 0)
    proxy.assert_nothing_left()


def test_a_few_streams_at_a_time(proxy: Running) -> None:
    """Beyond a few at one time it is 503 busy; there is room again when one is left."""
    names = [secrets.token_hex(16) for _ in range(MOST_STREAMS)]
    socks = [opened(proxy, name) for name in names]
    assert look(proxy, wish()).error["code"] == "busy"
    socks.pop().close()
    eventually(lambda: look(proxy, wish(events=1)).status == 200)
    for sock in socks:
        sock.close()
    proxy.assert_nothing_left()


def test_only_the_newest_ends_are_kept(proxy: Running) -> None:
    """What is remembered of streams has a bound."""
    first = secrets.token_hex(16)
    look(proxy, wish(first, 1))
    for _ in range(REMEMBERED):
        look(proxy, wish(events=1))
    assert departure(proxy, first)[0] == "unknown"
    assert len(proxy.service.app.diagnosis.departures) == REMEMBERED


@pytest.mark.parametrize("loop", LOOPS)
def test_a_drain_ends_streams_at_once(loop: str) -> None:
    """A drain does not wait for a diagnostic stream: it ends with the event that a cut answer gets, and no [DONE]."""
    with running(NOWHERE, loop=loop, SESSION_SECRET=NEW, SERVER_DRAIN_SECONDS="60") as proxy:
        with opened(proxy, secrets.token_hex(16)) as sock:
            proxy.on_loop(proxy.service.end)
            rest = read_until(sock, b"\r\n0\r\n")
        assert b'"code":"draining"' in rest
        assert b"[DONE]" not in rest
        eventually(proxy.loop.is_closed)


def test_a_drain_lets_nobody_in() -> None:
    """While a server drains a ticket opens as little as it does anything else: 503."""
    with running(NOWHERE, SESSION_SECRET=NEW) as proxy:
        proxy.service.app.draining = True
        for path in (LOOK, *CHAT):
            assert look(proxy, "echo", "POST", b"", path).error["code"] == "draining"


def test_leaving_before_the_answer(proxy: Running) -> None:
    """A disconnect within a request's body aborts no chat; the log line has status 499 only."""
    with connect(proxy) as sock:
        head = f"POST {CHAT[0]}?check=echo HTTP/1.1\r\nhost: 127.0.0.1\r\n{HEADER}: {ticket()}\r\n"
        sock.sendall(f"{head}content-length: 9\r\n\r\nx".encode())
        eventually(lambda: proxy.service.app.busy)
    (line,) = eventually(lambda: [line for line in proxy.lines() if line["status"] == 499])
    assert (line["ending"], line["check"]) == (None, True)


def test_a_chat_is_not_counted(proxy: Running) -> None:
    """Streams, whole or left, are in no metric of chats, take of no allowance, and call no upstream."""
    app = proxy.service.app
    with opened(proxy, secrets.token_hex(16)):
        assert app.limits.leases.live == 0
    look(proxy, wish())
    proxy.assert_nothing_left()
    metrics = app.metrics.exposition().decode().splitlines()
    counted = [line for line in metrics if line.startswith(("chat_proxy_stream_endings_total", "chat_proxy_time_to"))]
    assert counted
    assert all(line.endswith(" 0.0") for line in counted), counted
    assert all(line["ending"] is None for line in proxy.lines())
    assert proxy.upstream_sockets == 0
