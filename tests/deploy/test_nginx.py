"""The shipped nginx site as people will run it: real nginx, TLS, HTTP/1.1 and HTTP/2, in front of the real server.

The surrounding main file says the worst about streams that one can (tests/nginx.py); the site must not care. Where an
instance must misbehave, a scripted one stands in its place.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import trustme
from playwright.sync_api import Browser, expect
from support.browser import PageVisit, chromium_at
from support.harness import (
    DONE,
    GOOD,
    PATIENCE,
    Peer,
    Running,
    Script,
    ScriptedUpstream,
    delta,
    eventually,
    finish,
    free_port,
    running,
    streaming,
)
from support.nginx import HOST, Front, Site, front
from support.nginx_clients import PROTOCOLS, Answer, Http2, ask, asking, exchange, get, read_until
from support.nginx_clients import finish as rest_of
from support.stage import Steps

from proxy import errors
from proxy.check import prober as checkup

pytestmark = [pytest.mark.browser, pytest.mark.nginx]

ROUTES = ["/api/chat", "/api/v1/chat/completions"]
SLOW_ABORT = 0.5  # seconds: a hundred times what it takes

both = pytest.mark.parametrize("protocol", PROTOCOLS)


# ---- the stage ------------------------------------------------------------------------------------------------------


def public(**overrides: str) -> dict[str, str]:
    """The settings of a server behind the site."""
    return {"SERVER_PUBLIC_URL": f"https://{HOST}", "SESSION_SECRET": secrets.token_hex(20), **overrides}


@contextmanager
def on_socket(folder: Path, upstream: str, name: str = "1", **overrides: str) -> Iterator[tuple[Running, str]]:
    """The real server on a Unix socket, as shipped, and how nginx finds it."""
    place = folder / f"{name}.sock"
    with running(upstream, **public(SERVER_SOCKET=str(place), SERVER_TRUSTED_PROXIES="unix", **overrides)) as proxy:
        yield proxy, f"unix:{place}"


@contextmanager
def behind(folder: Path, script: Script, site: Site | None = None, **overrides: str) -> Iterator[tuple[Front, Running]]:
    """nginx, the real server on a Unix socket, and an upstream that does this."""
    folder = folder.resolve()
    with (
        ScriptedUpstream(script) as upstream,
        on_socket(folder, upstream.base_url, **overrides) as (proxy, place),
        front(folder / "nginx", site or Site([place])) as site_front,
    ):
        yield site_front, proxy


def at(upstream: ScriptedUpstream) -> str:
    """A scripted instance of ours, as nginx finds it."""
    return f"127.0.0.1:{upstream.port}"


def assert_in_our_shape(answer: Answer, status: int, code: str) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store, no-transform"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"]
    assert answer.error.keys() == {"message", "type", "param", "code"}
    assert answer.error["code"] == code
    assert "strict-transport-security" in answer.headers
    assert not answer.cut


class Held:
    """A script that answers "hold" when the test says so, and everything else at once."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    async def __call__(self, peer: Peer) -> None:
        while True:
            asked = (await peer.request()).json["messages"][0]["content"]
            if asked != "hold":
                await peer.sse(*GOOD)
                continue
            await peer.head()
            await peer.chunk(delta("a"))
            await asyncio.to_thread(self.go_on.wait, PATIENCE)
            await peer.chunk(finish() + DONE)
            await peer.end()


HOLD = [{"role": "user", "content": "hold"}]


def test_the_doctor_finds_nothing(tmp_path: Path) -> None:
    """`chat-proxy check --url` through the site as it is shipped has nothing to say."""
    folder, authority = tmp_path.resolve(), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    with (
        on_socket(folder, "http://127.0.0.1:9/v1") as (proxy, place),
        front(folder / "nginx", Site([place], host="localhost"), authority) as site,
    ):
        url = f"https://localhost:{site.port}"
        edge = proxy.service.app.edge
        edge.origins |= {url.encode()}
        edge.hosts |= {f"localhost:{site.port}".encode()}
        found, _ = checkup.examine(proxy.settings, url, ca_file=str(folder / "ca.pem"))
        assert found == []


# ---- streams --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("path", ROUTES)
def test_each_event_arrives_before_the_next_is_sent(path: str, protocol: str, tmp_path: Path) -> None:
    """No buffering and no compression on either route, whatever the main file says and the browser accepts."""
    parts = (delta("a"), delta("b"), finish(), DONE)
    steps = Steps(*parts)
    with (
        behind(tmp_path, steps) as (site, _),
        asking(site, protocol, path, {"accept-encoding": "gzip, br", "sec-fetch-site": "same-origin"}) as answer,
    ):
        received = b""
        for part in parts:
            steps.allowed.release()
            received += read_until(answer, part)
        assert (received + rest_of(answer).body, answer.status) == (b"".join(parts), 200)
        assert "content-encoding" not in answer.headers
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-chat=")
        assert {"Secure", "HttpOnly", "SameSite=Strict", "Path=/"} <= {word.strip() for word in cookie.split(";")}


@both
@pytest.mark.parametrize("path", ROUTES)
def test_nginx_itself_holds_nothing_back(path: str, protocol: str, tmp_path: Path) -> None:
    """The site's own word is enough: an instance whose answers do not ask for it (X-Accel-Buffering) streams, too."""
    steps = Steps(delta("a"), delta("b"), DONE)
    with (
        ScriptedUpstream(steps) as instance,
        front(tmp_path / "nginx", Site([at(instance)])) as site,
        asking(site, protocol, path) as answer,
    ):
        for part in steps.parts:
            steps.allowed.release()
            assert read_until(answer, part) == part
        assert not rest_of(answer).cut


@both
def test_every_byte_of_a_long_stream(protocol: str, tmp_path: Path) -> None:
    """A megabyte of events of all sizes comes out as it went in."""
    parts = [delta(secrets.token_urlsafe(size)) for size in (1, 100, 4000, 40_000, 7, 16_384) * 16]
    with behind(tmp_path, streaming(*parts, finish(), DONE)) as (site, _):
        assert ask(site, protocol).body == b"".join([*parts, finish(), DONE])


@both
@pytest.mark.parametrize("moment", ["before the head", "within the answer"])
def test_leaving_reaches_the_model(moment: str, protocol: str, tmp_path: Path) -> None:
    """A visitor that stops an answer ends the call upstream at once; over HTTP/2 the connection stays open."""

    async def script(peer: Peer) -> None:
        await peer.request()
        if moment == "within the answer":
            await peer.head()
            await peer.chunk(delta("a"))
        await peer.gone()

    with ScriptedUpstream(script) as upstream, ExitStack() as stack:
        proxy, place = stack.enter_context(on_socket(tmp_path, upstream.base_url))
        site = stack.enter_context(front(tmp_path / "nginx", Site([place])))
        for number in range(5):
            with asking(site, protocol) as answer:
                eventually(lambda: upstream.open == 1 and len(upstream.seen) > number)  # noqa: B023  # used at once
                if moment == "within the answer":
                    read_until(answer, delta("a"))
                left = time.monotonic()
                answer.leave()
                eventually(lambda: upstream.seen[-1].closed)
                assert (upstream.seen[-1].closed or 0) - left < SLOW_ABORT
                if isinstance(answer, Http2):
                    answer.ask("GET", "/api/v1/models", {})
                    assert rest_of(answer).status == 200
        aborted = eventually(lambda: [line for line in proxy.lines() if line["status"] != 200 or line["ending"]][4:])
        assert aborted[-1]["ending"] == "aborted"


@both
def test_a_broken_answer_does_not_look_whole(protocol: str, tmp_path: Path) -> None:
    """Where the model breaks off, the last event is our error, and the response ends as it should."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(delta("a") + delta("b")[:20])
        peer.reset()

    with behind(tmp_path, script) as (site, _):
        answer = ask(site, protocol)
    first, last, nothing = answer.body.split(b"\n\n")
    assert (first + b"\n\n", nothing, answer.cut) == (delta("a"), b"", False)
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "stream_interrupted"


@both
def test_an_instance_that_dies_cuts_the_stream(protocol: str, tmp_path: Path) -> None:
    """When chat-proxy itself dies, the response must be visibly incomplete."""

    async def dying(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(delta("a"))
        peer.reset()

    with ScriptedUpstream(dying) as instance, front(tmp_path / "nginx", Site([at(instance)])) as site:
        answer = ask(site, protocol)
    assert (answer.status, answer.body, answer.cut) == (200, delta("a"), True)


# ---- errors ---------------------------------------------------------------------------------------------------------


async def refusing(peer: Peer) -> None:
    await peer.request()
    await peer.whole(b"no", "500 Internal Server Error", "text/plain")


@both
def test_errors_of_ours_pass_as_they_are(protocol: str, tmp_path: Path) -> None:
    """413, 429 and 502 keep chat-proxy's body and headers, since nginx does not put its own in their place."""
    with behind(tmp_path, refusing, LIMITS_PER_ADDRESS="3/minute", UPSTREAM_RETRIES="0") as (site, _):
        for path in ROUTES:
            broken = ask(site, protocol, path)
            assert_in_our_shape(broken, 502, "upstream_error")
            assert broken.error["message"] == errors.BadGateway.message
        large = ask(site, protocol, padding="x" * 1_050_000)
        assert_in_our_shape(large, 413, "body_too_large")
        limited = [ask(site, protocol) for _ in range(2)][-1]
        assert_in_our_shape(limited, 429, "rate_limited")
        assert limited.error["message"] == errors.TooMany.message
        assert int(limited.headers["retry-after"]) >= 1
        assert "ratelimit" in limited.headers


@both
def test_a_body_beyond_all_bounds(protocol: str, tmp_path: Path) -> None:
    """What nginx itself refuses to read is told in the same words."""
    with (
        behind(tmp_path, streaming(*GOOD)) as (site, proxy),
        exchange(
            site, protocol, "POST", "/api/chat", {"content-type": "application/json", "content-length": "2000000"}
        ) as begun,
    ):
        answer = rest_of(begun)
        assert_in_our_shape(answer, 413, "body_too_large")
        assert answer.error["message"] == errors.BodyTooLarge.message
        assert not proxy.lines()


@both
def test_open_requests_of_one_address(protocol: str, tmp_path: Path) -> None:
    """Beyond the bound nginx answers 429 in our shape, with Retry-After."""
    script = Held()
    place = f"unix:{tmp_path}/1.sock"
    site_ = Site([place], changes={"limit_conn chat_proxy_address 100;": "limit_conn chat_proxy_address 2;"})
    with behind(tmp_path, script, site_) as (site, _), ExitStack() as stack:
        for _ in range(2):
            read_until(stack.enter_context(asking(site, protocol, messages=HOLD)), delta("a"))
        answer = ask(site, protocol)
        assert_in_our_shape(answer, 429, "rate_limited")
        assert answer.headers["retry-after"] == "1"
        script.go_on.set()


def closed_port() -> str:
    return f"127.0.0.1:{free_port()}"


@both
@pytest.mark.parametrize("path", [*ROUTES, "/api/session", "/"])
def test_nobody_there(path: str, protocol: str, tmp_path: Path) -> None:
    """With every instance gone, nginx's own 502 is JSON in our shape, on every route."""
    with front(tmp_path / "nginx", Site([closed_port(), f"unix:{tmp_path}/none.sock"])) as site:
        answer = ask(site, protocol, path) if path in ROUTES else get(site, path, protocol)
    assert_in_our_shape(answer, 502, "server_unreachable")


@both
def test_an_instance_that_is_frozen(protocol: str, tmp_path: Path) -> None:
    """nginx's own 504 is JSON in our shape; after a time-out no other server is asked."""

    async def frozen(peer: Peer) -> None:
        await peer.request()
        await peer.gone()

    with ScriptedUpstream(frozen) as one, ScriptedUpstream(frozen) as other:
        changes = {"proxy_read_timeout 630s;": "proxy_read_timeout 1s;", "timeout 10s;": "timeout 900ms;"}
        with front(tmp_path / "nginx", Site([at(one), at(other)], changes=changes)) as site:
            answer = ask(site, protocol)
        assert_in_our_shape(answer, 504, "server_timeout")
        assert len(one.seen) + len(other.seen) == 1


def test_requests_that_nginx_cannot_read(tmp_path: Path) -> None:
    """400, 431 and plain HTTP on the TLS port are in our shape, too."""
    with front(tmp_path / "nginx", Site([closed_port()])) as site:
        assert_in_our_shape(get(site, "/", cookie="x" * 33_000), 431, "headers_too_large")
        assert_in_our_shape(get(site, "/", host="a b"), 400, "invalid_request")
        with closing(http.client.HTTPConnection("127.0.0.1", site.port, timeout=PATIENCE)) as plain:
            plain.request("GET", "/")
            answer = plain.getresponse()
            assert (answer.status, json.loads(answer.read())["error"]["code"]) == (400, "invalid_request")


def test_plain_http_is_sent_to_https(tmp_path: Path) -> None:
    """Port 80 only redirects, with the path kept; but for what a certificate's renewal looks for."""
    with (
        front(tmp_path / "nginx", Site([closed_port()])) as site,
        closing(http.client.HTTPConnection("127.0.0.1", site.plain_port, timeout=PATIENCE)) as plain,
    ):
        plain.request("GET", "/some?thing=1", headers={"host": HOST})
        answer = plain.getresponse()
        assert (answer.status, answer.headers["location"]) == (301, f"https://{HOST}/some?thing=1")
        answer.read()
        challenge = tmp_path / "nginx" / "html" / ".well-known" / "acme-challenge" / "token"
        challenge.parent.mkdir(parents=True)
        challenge.write_text("proof")
        plain.request("GET", "/.well-known/acme-challenge/token", headers={"host": HOST})
        assert plain.getresponse().read() == b"proof"


# ---- addresses and users --------------------------------------------------------------------------------------------


@both
def test_forged_addresses_do_not_count(protocol: str, tmp_path: Path) -> None:
    """X-Forwarded-For is nginx's alone: another one in each request does not get round the limit of one address."""
    with behind(tmp_path, streaming(*GOOD), LIMITS_PER_ADDRESS="3/minute") as (site, proxy):
        forged = [{"x-forwarded-for": f"203.0.113.{number}, 198.51.100.1"} for number in range(5)]
        statuses = []
        for headers in forged:
            with asking(site, protocol, headers=headers) as begun:
                statuses.append(rest_of(begun).status)
        assert statuses == [200, 200, 200, 429, 429]
        assert {line["address"] for line in eventually(lambda: proxy.lines()[4:] and proxy.lines())} == {"127.0.0.0/24"}


@both
@pytest.mark.parametrize("path", [*ROUTES, "/api/session", "/"])
def test_what_an_instance_is_told(path: str, protocol: str, tmp_path: Path) -> None:
    """Headers that are believed from a proxy come from nginx alone; the visitor's own are replaced, not added to."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.whole(b"{}")

    forged = {"x-forwarded-for": "203.0.113.7", "x-request-id": "mine", "x-forwarded-email": "boss@example.org"}
    forged |= {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "their=own"}
    with ScriptedUpstream(script) as instance, front(tmp_path / "nginx", Site([at(instance)])) as site:
        method, body = ("POST", b"{}") if path in ROUTES else ("GET", b"")
        with exchange(site, protocol, method, path, forged, body) as begun:
            assert rest_of(begun).status == 200
        (seen,) = instance.seen
        lines = [line.partition(b":")[0].decode().lower() for line in seen.head.splitlines()[1:] if line]
        assert len(set(lines)) == len(lines)
        assert seen.headers["x-forwarded-for"] == "127.0.0.1"
        assert re.fullmatch("[0-9a-f]{32}", seen.headers["x-request-id"])
        assert seen.headers["host"] == HOST
        assert not {"x-forwarded-email", "traceparent", "tracestate"} & seen.headers.keys()
        assert "connection" not in seen.headers
        assert seen.head.split(b"\r\n")[0].endswith(b" HTTP/1.1")


def test_one_request_one_number(tmp_path: Path) -> None:
    """The request's id is nginx's, the same in both logs and in the answer; a visitor's own is not taken over.

    What nginx logs has no query, no address and no cookie in it.
    """
    with behind(tmp_path, streaming(*GOOD)) as (site, proxy):
        answer = get(site, "/api/v1/models?code=secret", **{"x-request-id": "mine", "cookie": "secret=1"})
        assert answer.status == 200
        line = json.loads(eventually(site.logged)[0])
        assert line["request_id"] == answer.headers["x-request-id"] == proxy.line()["request_id"] != "mine"
        assert (line["path"], line["status"], line["upstream_status"]) == ("/api/v1/models", 200, "200")
        assert "secret" not in str(line)
        assert "127.0.0.1" not in str(line)


@both
def test_a_forged_user_is_nobody(protocol: str, tmp_path: Path) -> None:
    """Without a sign-in in front, the header that would name a user never comes from the visitor."""
    with behind(tmp_path, streaming(*GOOD), SESSION_MODE="header") as (site, _):
        headers = {"x-forwarded-email": "boss@example.org"}
        with asking(site, protocol, headers=headers) as begun:
            assert_in_our_shape(rest_of(begun), 401, "login_required")


def test_prompts_stay_in_memory(tmp_path: Path) -> None:
    """Bodies as large as they may be are not written to nginx's disk."""
    with behind(tmp_path, streaming(*GOOD), POLICY_MAX_INPUT_CHARS="2000000") as (site, _):
        for protocol in PROTOCOLS:
            messages = [{"role": "user", "content": "x" * 1_040_000}]
            assert ask(site, protocol, messages=messages).status == 200
        assert "buffered to a temporary file" not in site.errors()


# ---- the page -------------------------------------------------------------------------------------------------------

COMES_AND_GOES = {"date", "etag", "last-modified", "content-length", "x-request-id", "server", "connection",
                  "accept-ranges", "transfer-encoding", "content-encoding", "vary"}  # fmt: skip
FILES = ["/", "/index.html", "/page/page.js", "/chat/client.js", "/style/base.css", "/favicon.svg"]


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).parents[2] / "static", folder / "page"))


def test_the_page_from_disk_is_the_page(tmp_path: Path) -> None:
    """Served from nginx's disk, each file has the bytes, the type and the headers that chat-proxy gives it, and what is
    not there is chat-proxy's to answer."""
    place = f"unix:{tmp_path}/1.sock"
    with (
        behind(tmp_path / ".", streaming(*GOOD)) as (through, _),
        front(tmp_path / "disk", Site([place], page=copied(tmp_path))) as on_disk,
    ):
        for path in FILES:
            ours, theirs = get(through, path), get(on_disk, path)
            assert (ours.status, theirs.status, theirs.body) == (200, 200, ours.body)
            assert kept(theirs) == kept(ours), path
        assert_in_our_shape(get(on_disk, "/nothing.js"), 404, "not_found")
        assert ask(on_disk).body == b"".join(GOOD)
    with front(tmp_path / "alone", Site([closed_port()], page=tmp_path / "page")) as on_disk:
        assert get(on_disk, "/", "HTTP/2").status == 200


def kept(answer: Answer) -> dict[str, str]:
    same = {"application/javascript": "text/javascript"}  # of old mime.types
    headers = {name: value for name, value in answer.headers.items() if name not in COMES_AND_GOES}
    kind = headers["content-type"].removesuffix("; charset=utf-8")
    return headers | {"content-type": same.get(kind, kind)}


# ---- several instances ----------------------------------------------------------------------------------------------


@contextmanager
def two(folder: Path, script: Script, **overrides: str) -> Iterator[tuple[Front, Running, Running]]:
    """Two real servers behind the site, with one secret."""
    overrides = public(**overrides)
    with ScriptedUpstream(script) as upstream, ExitStack() as stack:
        first = stack.enter_context(running(upstream.base_url, **overrides))
        second = stack.enter_context(running(upstream.base_url, **overrides))
        instances = [f"127.0.0.1:{proxy.port}" for proxy in (first, second)]
        yield stack.enter_context(front(folder / "nginx", Site(instances))), first, second


def moved(site: Front) -> list[str]:
    """How the requests that more than one instance was asked for went, like "503, 200"."""
    return [status for line in site.logged() if ", " in (status := json.loads(line)["upstream_status"])]


@both
def test_a_draining_instance_moves_questions_on(protocol: str, tmp_path: Path) -> None:
    """While one instance drains every question is answered by the other one, and live answers of both run on."""
    script = Held()
    with two(tmp_path, script) as (site, first, second), ExitStack() as stack:
        held = [stack.enter_context(asking(site, protocol, messages=HOLD)) for _ in range(4)]
        for answer in held:
            read_until(answer, delta("a"))
        assert first.service.app.active_scopes
        assert second.service.app.active_scopes
        first.on_loop(first.service.end)
        eventually(lambda: first.lines("draining"))
        for path in ROUTES * 4:
            moved_on = ask(site, protocol, path)
            assert (moved_on.status, moved_on.body) == (200, b"".join(GOOD))
        assert get(site, "/api/v1/models", protocol).status == 200
        assert set(moved(site)) == {"503, 200"}
        script.go_on.set()
        assert [rest_of(answer).body for answer in held] == [finish() + DONE] * 4


def test_a_full_instance_moves_questions_on(tmp_path: Path) -> None:
    """A 503 `busy` is asked of the other; when all are full, it is chat-proxy's own that the visitor gets."""
    script = Held()
    with two(tmp_path, script, SERVER_MAX_STREAMS="1") as (site, _, _), ExitStack() as stack:
        held = [stack.enter_context(asking(site, "HTTP/2", messages=HOLD)) for _ in range(2)]
        for answer in held:
            assert read_until(answer, delta("a"))
        for _ in range(6):
            full = ask(site)
            assert_in_our_shape(full, 503, "busy")
            assert int(full.headers["retry-after"]) >= 1
        assert set(moved(site)) >= {"503, 503"}
        script.go_on.set()


def test_an_instance_that_is_gone_moves_questions_on(tmp_path: Path) -> None:
    """A connection that is refused costs a visitor nothing."""
    for gone in (closed_port(), f"unix:{tmp_path}/none.sock"):
        with (
            ScriptedUpstream(streaming(*GOOD)) as instance,
            front(tmp_path / f"nginx-{len(gone)}", Site([gone, at(instance)])) as site,
        ):
            assert {ask(site).status for _ in range(6)} == {200}
            assert set(moved(site)) == {"502, 200"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_question_that_kills_is_asked_twice_at_most(count: int, tmp_path: Path) -> None:
    """The risk that the site takes is bounded, however many instances there are: 502 after the second."""

    async def dying(peer: Peer) -> None:
        await peer.request()
        peer.reset()

    with ExitStack() as stack:
        instances = [stack.enter_context(ScriptedUpstream(dying)) for _ in range(count)]
        site = stack.enter_context(front(tmp_path / "nginx", Site([at(instance) for instance in instances])))
        assert_in_our_shape(ask(site), 502, "server_unreachable")
        assert sum(len(instance.seen) for instance in instances) == min(count, 2)


@pytest.mark.parametrize("status", ["429 Too Many Requests", "500 Internal Server Error", "502 Bad Gateway"])
def test_other_refusals_are_final(status: str, tmp_path: Path) -> None:
    """Only 503 is asked of another instance: what else an instance says may have cost something."""

    async def refuses(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.whole(b"{}", status)

    with ScriptedUpstream(refuses) as one, ScriptedUpstream(refuses) as other:
        with front(tmp_path / "nginx", Site([at(one), at(other)])) as site:
            assert ask(site).status == int(status[:3])
        assert len(one.seen) + len(other.seen) == 1


def test_connections_are_kept(tmp_path: Path) -> None:
    """nginx asks a hundred times over few connections, of a port and of a Unix socket."""
    with ScriptedUpstream(streaming(*GOOD)) as instance:
        with front(tmp_path / "nginx", Site([at(instance)])) as site, asking(site, "HTTP/2") as begun:
            assert rest_of(begun).status == 200
            for _ in range(50):
                assert isinstance(begun, Http2)
                begun.ask("GET", "/api/v1/models", {})
                assert rest_of(begun).status == 200
        assert instance.connections <= 2


# ---- accounts -------------------------------------------------------------------------------------------------------


def oauth2_proxy(users: dict[str, str], asked: list[str]) -> Script:
    """As oauth2-proxy answers: /oauth2/auth names the cookie's user, the rest is its own pages."""

    async def script(peer: Peer) -> None:
        while True:
            seen = await peer.request()
            path = seen.head.split()[1].decode()
            asked.append(path)
            cookie = seen.headers.get("cookie", "").rpartition("account=")[2]
            if not path.startswith("/oauth2/auth"):
                await peer.whole(b"sign in here", "200 OK", "text/html")
            elif cookie in users:
                headers = f"x-auth-request-email: {users[cookie]}", "set-cookie: account=renewed; Path=/; Secure"
                await peer.whole(b"", "202 Accepted", "text/plain", *headers)
            else:
                await peer.whole(b"Unauthorized", "401 Unauthorized", "text/plain")

    return script


@contextmanager
def with_accounts(folder: Path, asked: list[str]) -> Iterator[tuple[Front, Running]]:
    folder = folder.resolve()
    with ScriptedUpstream(oauth2_proxy({"a1": "alice@example.org"}, asked)) as accounts:
        site_ = Site([f"unix:{folder}/1.sock"], accounts=f"http://127.0.0.1:{accounts.port}")
        with behind(folder, streaming(*GOOD), site_, SESSION_MODE="header") as found:
            yield found


@both
def test_who_signed_in_is_known(protocol: str, tmp_path: Path) -> None:
    """oauth2-proxy's word becomes the session's user, and never the visitor's own header; its cookie is renewed."""
    asked: list[str] = []
    alice = {"cookie": "account=a1", "x-forwarded-email": "boss@example.org"}
    with with_accounts(tmp_path, asked) as (site, _):
        with asking(site, protocol, headers=alice) as begun:
            answer = rest_of(begun)
        assert (answer.status, answer.body) == (200, b"".join(GOOD))
        with exchange(site, protocol, path="/api/session", headers=alice) as begun:
            told = rest_of(begun)
        assert json.loads(told.body)["session"]["user"] == "alice@example.org"
        assert "account=renewed" in told.headers["set-cookie"]
        assert set(asked) == {"/oauth2/auth"}


@both
def test_who_did_not_sign_in(protocol: str, tmp_path: Path) -> None:
    """The page sends a visitor to the provider and back, the API says 401 in our shape, and nothing reaches us."""
    asked: list[str] = []
    with with_accounts(tmp_path, asked) as (site, proxy):
        page = get(site, "/?a=1", protocol)
        assert (page.status, page.headers["location"]) == (302, "/oauth2/start?rd=/?a=1")
        with asking(site, protocol, headers={"x-forwarded-email": "boss@example.org", "cookie": "account=b"}) as begun:
            assert_in_our_shape(rest_of(begun), 401, "login_required")
        assert get(site, "/oauth2/start?rd=/", protocol).body == b"sign in here"
        assert_in_our_shape(get(site, "/oauth2/auth", protocol), 404, "not_found")
        assert not proxy.lines()


@both
def test_without_the_accounts(protocol: str, tmp_path: Path) -> None:
    """While oauth2-proxy is down no request is accepted, and the refusal has our shape."""
    site_ = Site([closed_port()], accounts=f"http://{closed_port()}")
    with front(tmp_path / "nginx", site_) as site:
        assert_in_our_shape(ask(site, protocol), 500, "internal_error")


# ---- a real browser -------------------------------------------------------------------------------------------------


def test_a_reader_with_chromium(browser: Browser, tmp_path: Path) -> None:
    """Chromium over TLS and HTTP/2: the page opens, tokens are read before the next are sent, Stop ends the model."""
    told: list[str] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(delta("First words."))
        await peer.gone()
        told.append("gone")

    with (
        behind(tmp_path, script) as (site, _),
        chromium_at(browser, HOST, site.port) as context,
        PageVisit.of(context, f"https://{HOST}") as visit,
    ):
        protocol = "() => performance.getEntriesByType('navigation')[0].nextHopProtocol"
        assert visit.page.evaluate(protocol) == "h2"
        visit.ask("hello", model="m")
        expect(visit.text).to_have_text("First words.")
        visit.page.get_by_role("button", name="Stop").click()
        visit.expect_state("stopped")
        eventually(lambda: told)
        (cookie,) = context.cookies()
        assert (cookie["name"], cookie["secure"], cookie["httpOnly"]) == ("__Host-chat", True, True)
