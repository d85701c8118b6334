"""Visitors: which of them get a session, what it allows, and that no visitor learns or takes anything of another.

All of it through the real server. Every test comes from addresses of its own, as a trusted proxy would name them, so
that the tests can share a server and not their allowances.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.harness import (
    DONE,
    GOOD,
    PATIENCE,
    Peer,
    Reply,
    Running,
    ScriptedUpstream,
    delta,
    eventually,
    finish,
    read_until,
    running,
    send,
)

from proxy.accounts.session import Session
from proxy.limits.requests import ChargeKind
from proxy.limits.status import Subject

HOUR, DAY = 3600, 86_400
SECURE = "https://chat.example.org"
numbers = itertools.count(1)


def new_address() -> str:
    """An address that no other test comes from."""
    number = next(numbers)
    return f"198.18.{number >> 8}.{number & 255}"


# ---- the upstream: it does what the last message says ------------------------------------------------------------


def usage(total: int) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\n' % (total - 1)


async def obedient(peer: Peer) -> None:
    """`hold` stays in mid-answer; `cost 5` reports 5 tokens; each answer tries to plant a cookie in its reader."""
    while True:
        seen = await peer.request()
        wish = seen.json["messages"][-1]["content"].split()
        number = len(peer.upstream.seen)
        planting = f"set-cookie: upstream={number}; Path=/"
        if not seen.json.get("stream"):
            await peer.whole(
                b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}',
                "200 OK",
                "application/json",
                planting,
            )
            continue
        await peer.head("200 OK", "text/event-stream", planting)
        if wish[0] == "hold":
            await peer.chunk(delta("held"))
            await peer.gone()
            return
        if wish[0] == "cost":
            await peer.chunk(delta("dear") + finish() + usage(int(wish[1])) + DONE)
        else:
            await peer.chunk(b"".join(GOOD))
        await peer.end()


# ---- the visitors -------------------------------------------------------------------------------------------------


def question(wish: str = "hi", **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": wish}], "stream": True, **fields}).encode()


@dataclass
class Program:
    """An SDK, or curl: no Origin, no fetch metadata; it keeps no cookie unless it is given one."""

    proxy: Running
    address: str = field(default_factory=new_address)
    cookie: str = ""

    @property
    def own_headers(self) -> dict[str, str]:
        headers = {"X-Forwarded-For": self.address, "Host": self.proxy.url.partition("://")[2]}
        return headers | ({"Cookie": self.cookie} if self.cookie else {})

    def send(self, method: str, path: str, body: bytes | None = None, /, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return send(self.proxy, method, path, body, {**self.own_headers, **named})

    def chat(self, wish: str = "hi", /, **fields: Any) -> Reply:
        return self.send("POST", "/api/chat", question(wish, **fields), Content_Type="application/json")

    def session(self) -> Reply:
        return self.send("GET", "/api/session")

    def leave(self) -> Reply:
        return self.send("DELETE", "/api/session")

    @property
    def id(self) -> str:
        return self.cookie.partition("=")[2].partition(".")[0]

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within it an answer is being written; at the end its reader leaves."""
        body = question("hold")
        lines = [f"{name}: {value}" for name, value in self.own_headers.items()]
        head = "\r\n".join(["POST /api/chat HTTP/1.1", *lines, "Content-Type: application/json"])
        before = self.proxy.service.app.limits.leases.live
        with socket.create_connection(("127.0.0.1", self.proxy.port), PATIENCE) as sock:
            sock.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            read_until(sock, b"held")
            yield
        eventually(lambda: self.proxy.service.app.limits.leases.live <= before)


@dataclass
class Browser(Program):
    """Our page in a browser: says where it comes from, and keeps the cookie it was given last."""

    @property
    def own_headers(self) -> dict[str, str]:
        return super().own_headers | {"Origin": self.proxy.url, "Sec-Fetch-Site": "same-origin"}

    def send(self, method: str, path: str, body: bytes | None = None, /, **headers: str) -> Reply:
        reply = super().send(method, path, body, **headers)
        for line in reply.headers.get_all("set-cookie", []):
            self.cookie = "" if "Max-Age=0" in line else line.partition(";")[0]
        return reply


def copy_of(visitor: Program) -> Program:
    return Program(visitor.proxy, visitor.address, visitor.cookie)


def is_clearing(reply: Reply, name: str = "chat") -> bool:
    return (reply.headers["set-cookie"] or "").startswith(f"{name}=; Path=/; Max-Age=0;")


def code_of(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.error["code"]


def wait_told(reply: Reply) -> int:
    """The Retry-After of a refusal, which must be a whole number of seconds, 1 or more."""
    assert re.fullmatch(r"[1-9]\d*", reply.headers["retry-after"])
    return int(reply.headers["retry-after"])


def sealed(proxy: Running, session: Session) -> str:
    access = proxy.service.app.access
    return f"{access.cookie}={access.sessions.seal(session)}"


# ---- the servers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(obedient) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def wide(upstream: ScriptedUpstream) -> Iterator[Running]:
    """A server with limits that no test reaches."""
    with running(upstream.base_url, SERVER_MAX_BODY_BYTES="2048") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def tight(upstream: ScriptedUpstream) -> Iterator[Running]:
    """A server whose limits are reached at once."""
    with running(
        upstream.base_url,
        SERVER_MAX_STREAMS="3",
        LIMITS_PER_SESSION="4/4 seconds",
        LIMITS_PER_ADDRESS="100/minute",
        LIMITS_NEW_SESSIONS="3/hour",
        LIMITS_REFUSALS_PER_ADDRESS="3/minute",
        LIMITS_STREAMS_PER_SESSION="1",
        LIMITS_STREAMS_PER_ADDRESS="2",
        LIMITS_TOKENS_PER_SESSION="10000/4 seconds",
        LIMITS_TOKENS_PER_ADDRESS="20000/day",
    ) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def secure(upstream: ScriptedUpstream) -> Iterator[Running]:
    """A server behind a proxy that speaks https."""
    with running(
        upstream.base_url,
        SERVER_PUBLIC_URL=SECURE,
        SESSION_SECRET=secrets.token_urlsafe(32),
    ) as proxy:
        yield proxy


# ---- sessions: minted ----------------------------------------------------------------------------------------------


def test_a_page_gets_its_session(wide: Running) -> None:
    """The page's first request mints a session; the next ones go on with it, and set no cookie again."""
    page = Browser(wide)
    first = page.session()
    assert first.status == 200
    assert re.fullmatch(r"chat=[\w-]{22}\.anonymous\.\.\d+\.\d+\.0\.[\w-]{43}", page.cookie)
    flags = first.headers["set-cookie"].split("; ")[1:]
    assert flags == ["Path=/", f"Max-Age={DAY}", "HttpOnly", "SameSite=Strict"]
    for reply in (page.session(), page.chat(), page.session()):
        assert (reply.status, reply.headers["set-cookie"]) == (200, None)


def test_a_question_without_a_cookie_mints(wide: Running) -> None:
    """A page that asks at once, without a session, is answered and given one in the same response."""
    page = Browser(wide)
    first = page.chat()
    assert (first.status, first.body) == (200, b"".join(GOOD))
    kept = page.id
    assert len(kept) == 22
    assert page.chat().headers["set-cookie"] is None
    other = Browser(wide, page.address)
    other.chat(stream=False)
    assert other.id not in ("", kept)


def test_a_refused_question_keeps_its_session(wide: Running) -> None:
    """A session minted for a question that is then refused is given all the same, or each try would mint another."""
    page = Browser(wide)
    assert code_of(page.chat(model="unknown")) == (400, "model_not_allowed")
    kept = page.id
    assert len(kept) == 22
    assert page.chat().headers["set-cookie"] is None


def test_a_program_gets_its_addresss_session(wide: Running) -> None:
    """A program that keeps no cookie has one session per address, on both paths and whatever it asks."""
    program, other = Program(wide), Program(wide)
    replies = [
        program.chat(),
        program.chat(stream=False),
        program.session(),
        program.send(
            "POST", "/api/v1/chat/completions", question(), Content_Type="application/json", Authorization="Bearer x"
        ),
    ]
    assert [reply.status for reply in replies] == [200] * 4
    ids = {reply.cookie.partition(".")[0] for reply in replies}
    assert len(ids) == 1
    assert other.chat().cookie.partition(".")[0] not in ids


def test_a_program_that_keeps_its_cookie_goes_on_with_it(wide: Running) -> None:
    """The cookie that a program was given works like any other."""
    program = Program(wide)
    program.cookie = program.chat().cookie
    reply = program.chat()
    assert (reply.status, reply.headers["set-cookie"]) == (200, None)


def test_an_addresss_session_is_no_new_session(tight: Running) -> None:
    """Programs without cookies use up nothing of what an address may mint."""
    program = Program(tight)
    for _ in range(4):
        assert program.session().status == 200
    pages = [Browser(tight, program.address) for _ in range(4)]
    assert [page.session().status for page in pages] == [200, 200, 200, 429]


def test_programs_of_an_address_share_their_limits(tight: Running) -> None:
    """All programs of an address that keep no cookie count as one session; a page at that address does not."""
    address = new_address()
    assert [Program(tight, address).chat(stream=False).status for _ in range(5)] == [200] * 4 + [429]
    assert Browser(tight, address).chat().status == 200


@pytest.mark.parametrize("path", ["/api/v1/models", "/healthz", "/readyz", "/", "/page/page.js", "/api/nothing"])
def test_looking_around_mints_nothing(wide: Running, path: str) -> None:
    """The list of models, the probes and the page's files set no cookie, and read none."""
    for visitor in (Browser(wide), Program(wide), Program(wide, cookie="chat=forged")):
        reply = visitor.send("GET", path)
        assert reply.headers["set-cookie"] is None
        assert reply.status == (404 if path == "/api/nothing" else 200)


# ---- sessions: bad cookies -----------------------------------------------------------------------------------------


def good_cookie(proxy: Running) -> str:
    page = Browser(proxy)
    page.session()
    return page.cookie


def revoked_cookie(proxy: Running) -> str:
    page = Browser(proxy)
    page.session()
    copy = page.cookie
    page.leave()
    return copy


BAD_COOKIES: dict[str, Callable[[Running], str]] = {
    "garbage": lambda proxy: "chat=garbage",
    "empty": lambda proxy: "chat=",
    "forged": lambda proxy: good_cookie(proxy)[:-4] + "AAAA",
    "of another id": lambda proxy: good_cookie(proxy).replace("chat=", "chat=A"),
    "twice the same": lambda proxy: "; ".join([good_cookie(proxy)] * 2),
    "a good one and a planted one": lambda proxy: f"{good_cookie(proxy)}; chat=planted",
    "a planted one and a good one": lambda proxy: f"chat=planted; {good_cookie(proxy)}",
    "too long": lambda proxy: "chat=" + "a" * 2000,
    "beyond ASCII": lambda proxy: "chat=\xff\xfe",
    "revoked": revoked_cookie,
}


@pytest.mark.parametrize("make", BAD_COOKIES.values(), ids=BAD_COOKIES)
def test_a_bad_cookie_is_refused_and_cleared(wide: Running, make: Callable[[Running], str]) -> None:
    """A question with a bad cookie gets 401 session_required and the cookie cleared, from a page and from a program."""
    cookie = make(wide)
    for visitor in (Program(wide, cookie=cookie), Browser(wide, cookie=cookie)):
        reply = visitor.chat()
        assert code_of(reply) == (401, "session_required")
        assert reply.error["type"] == "authentication_error"
        assert is_clearing(reply)
    assert visitor.chat().status == 200  # the browser has dropped it


@pytest.mark.parametrize("make", BAD_COOKIES.values(), ids=BAD_COOKIES)
def test_a_bad_cookie_is_replaced_for_the_page(wide: Running, make: Callable[[Running], str]) -> None:
    """When the page asks for its session with a bad cookie, it gets a new one: reloading heals."""
    page = Browser(wide, cookie=make(wide))
    bad = page.cookie
    reply = page.session()
    assert reply.status == 200
    assert len(page.id) == 22
    assert page.cookie not in bad
    assert page.chat().headers["set-cookie"] is None


@pytest.mark.parametrize("cookies", ["theme=dark", "__Host-chat=garbage", "Chat=garbage", "chats=garbage"])
def test_other_cookies_are_not_ours(wide: Running, cookies: str) -> None:
    """A cookie of another name, however near, is none of our business."""
    assert Program(wide, cookie=cookies).chat().status == 200


def aged(proxy: Running, issued: float, renewed: float) -> Session:
    now = int(time.time())
    return Session(secrets.token_urlsafe(16), "anonymous", None, now - int(issued), now - int(renewed))


@pytest.mark.parametrize(("issued", "unused"), [(DAY + 1, DAY + 1), (7 * DAY + 1, 60)], ids=["idle", "absolute"])
def test_an_expired_cookie_mints_anew(wide: Running, issued: float, unused: float) -> None:
    """A cookie of ours that has only expired is replaced without a word, for a page's question and for its session."""
    old = aged(wide, issued, unused)
    for ask_with in (Browser.chat, Browser.session):
        page = Browser(wide, cookie=sealed(wide, old))
        assert ask_with(page).status == 200
        assert page.id not in ("", old.id)
        assert page.chat().headers["set-cookie"] is None


def test_a_cookie_in_use_is_renewed(wide: Running) -> None:
    """After a quarter of its idle time a cookie is given anew: the same session, with the time that remains to it."""
    old = aged(wide, 6.5 * DAY, DAY / 2)
    page = Browser(wide, cookie=sealed(wide, old))
    reply = page.chat()
    assert (reply.status, page.id) == (200, old.id)
    lives = int(re.findall(r"Max-Age=(\d+)", reply.headers["set-cookie"])[0])
    assert DAY / 2 - 5 <= lives <= DAY / 2
    assert page.chat().headers["set-cookie"] is None


# ---- sessions: leaving ---------------------------------------------------------------------------------------------


def test_leaving_kills_all_copies(wide: Running) -> None:
    """After a logout the cookie is cleared, and its copies are dead wherever they are shown; other sessions live."""
    page, other = Browser(wide), Browser(wide)
    page.session()
    other.session()
    copy = copy_of(page)
    elsewhere = Program(wide, cookie=page.cookie)
    reply = page.leave()
    assert (reply.status, reply.json) == (200, {"logout_url": None})
    assert is_clearing(reply)
    for dead in (copy, elsewhere):
        assert code_of(dead.chat()) == (401, "session_required")
    assert other.chat().headers["set-cookie"] is None
    assert page.chat().status == 200
    assert page.id != copy.id


def test_leaving_is_idempotent(wide: Running) -> None:
    """A logout is idempotent: without a session or with a bad cookie it is 200, and the cookie is cleared."""
    page = Browser(wide)
    page.session()
    copy = copy_of(page)
    visitors = [page, page, copy, Program(wide), Browser(wide), Program(wide, cookie="chat=forged; chat=twice")]
    for visitor in visitors:
        reply = visitor.leave()
        assert (reply.status, reply.json) == (200, {"logout_url": None})
        assert is_clearing(reply)
    assert eventually(lambda: wide.lines("logout"))


def test_leaving_is_for_the_page_only(wide: Running) -> None:
    """A foreign page cannot log its visitor out."""
    page = Browser(wide)
    page.session()
    assert code_of(page.send("DELETE", "/api/session", Origin="https://evil.example")) == (403, "cross_origin")
    assert code_of(page.send("DELETE", "/api/session", Sec_Fetch_Site="same-site")) == (403, "cross_origin")
    assert page.chat().status == 200


def test_an_address_lives_on_after_its_logout(wide: Running) -> None:
    """A program's logout kills its cookie, and not what its address is given from then on."""
    program = Program(wide)
    program.cookie = program.chat().cookie
    dead = copy_of(program)
    program.leave()
    program.cookie = ""
    for _ in range(2):
        fresh = program.chat()
        assert fresh.status == 200
        again = Program(wide, program.address, fresh.cookie)
        assert (again.id, again.chat().status) == (dead.id, 200)
        assert code_of(dead.chat()) == (401, "session_required")


# ---- limits on visitors without a session --------------------------------------------------------------------------


def test_too_many_sessions(tight: Running) -> None:
    """An address mints so many sessions and no more; those it has go on, and other addresses mint theirs."""
    address = new_address()
    pages = [Browser(tight, address) for _ in range(3)]
    assert [page.session().status for page in pages] == [200] * 3
    late = Browser(tight, address)
    for reply in (late.session(), late.chat()):
        assert code_of(reply) == (429, "too_many_sessions")
        assert HOUR - 10 <= wait_told(reply) <= HOUR
        assert reply.headers["ratelimit-policy"] == '"new_sessions 3/hour";q=3;w=3600'
        assert re.fullmatch(r'"new_sessions 3/hour";r=0;t=\d+', reply.headers["ratelimit"])
        assert reply.headers["set-cookie"] is None
    assert [page.chat().status for page in pages] == [200] * 3
    assert Browser(tight).session().status == 200


def test_a_foreign_page_uses_up_nothing(tight: Running) -> None:
    """Whatever a foreign page sends with its visitor's cookie mints nothing, asks nothing and counts nowhere."""
    page = Browser(tight)
    page.session()
    before = page.session().json["limits"]
    foreign = copy_of(page)
    for headers in ({"Origin": "https://evil.example"}, {"Sec_Fetch_Site": "cross-site"}, {"Origin": "null"}):
        reply = foreign.send("POST", "/api/chat", question(), Content_Type="application/json", **headers)
        assert code_of(reply) == (403, "cross_origin")
        assert reply.headers["access-control-allow-origin"] is None
    assert [entry["remaining"] for entry in page.session().json["limits"]] == [entry["remaining"] for entry in before]
    stranger = Program(tight)
    assert code_of(stranger.send("GET", "/api/session", Sec_Fetch_Site="cross-site")) == (403, "cross_origin")
    assert [Browser(tight, stranger.address).session().status for _ in range(3)] == [200] * 3


def test_refusals_are_limited(tight: Running) -> None:
    """An address with too many refusals gets 429; its other requests are not affected."""
    page = Browser(tight)
    page.session()
    knocker = Program(tight, page.address, "chat=forged")
    assert code_of(knocker.chat()) == (401, "session_required")
    assert code_of(knocker.send("GET", "/api/session", Host="evil.example")) == (403, "cross_origin")
    assert code_of(knocker.send("POST", "/api/chat", Origin="null")) == (403, "cross_origin")
    for reply in (knocker.chat(), knocker.send("POST", "/api/chat", Origin="null"), knocker.session()):
        assert code_of(reply) == (429, "rate_limited")
        assert 50 <= wait_told(reply) <= 60
        assert reply.headers["ratelimit-policy"] == '"refusals_per_address 3/minute";q=3;w=60'
    assert page.chat().status == 200
    assert code_of(Program(tight, cookie="chat=forged").chat()) == (401, "session_required")


# ---- limits on sessions --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_requests_are_limited_for_as_long_as_told(tight: Running) -> None:
    """The request too many gets 429 with a whole Retry-After and RateLimit headers; after that time it passes."""
    page = Browser(tight)
    for remaining in (3, 2, 1, 0):
        reply = page.chat()
        assert reply.status == 200
        assert (
            reply.headers["ratelimit-policy"] == '"per_session 4/4 second";q=4;w=4, "per_address 100/minute";q=100;w=60'
        )
        assert reply.headers["ratelimit"].startswith(f'"per_session 4/4 second";r={remaining};t=')
    refused = page.chat()
    assert code_of(refused) == (429, "rate_limited")
    assert refused.error["type"] == "rate_limit_error"
    assert refused.headers["ratelimit-policy"] == '"per_session 4/4 second";q=4;w=4'
    assert re.fullmatch(r'"per_session 4/4 second";r=0;t=[1-4]', refused.headers["ratelimit"])
    assert 1 <= int(refused.headers["retry-after-ms"]) <= 4000
    assert wait_told(refused) <= 4
    time.sleep(wait_told(refused))
    assert page.chat().status == 200


def test_a_refused_body_counts_as_a_request(tight: Running) -> None:
    """Bodies that are refused use up the allowance like answers do; answers about the session do not."""
    page = Browser(tight)
    page.session()
    for body in (b"{", question(model="unknown"), question(tools=[]), b"[]"):
        assert page.send("POST", "/api/chat", body, Content_Type="application/json").status == 400
    assert page.session().status == 200
    assert page.send("GET", "/api/v1/models").status == 200
    assert code_of(page.chat()) == (429, "rate_limited")


def test_streams_at_one_time(tight: Running) -> None:
    """A session writes so many answers at a time, an address so many; when a reader leaves, a place is free."""
    first = Browser(tight)
    second, third = Browser(tight, first.address), Browser(tight, first.address)
    for page in (first, second, third):
        page.session()
    with first.holding():
        reply = first.chat()
        assert code_of(reply) == (429, "too_many_streams")
        assert (wait_told(reply), reply.headers["ratelimit-policy"]) == (1, '"streams_per_session";q=1')
        with second.holding():
            reply = third.chat(stream=False)
            assert code_of(reply) == (429, "too_many_streams")
            assert (wait_told(reply), reply.headers["ratelimit-policy"]) == (1, '"streams_per_address";q=2')
        assert third.chat(stream=False).status == 200
    assert first.chat().status == 200


def test_a_full_process_is_busy(tight: Running) -> None:
    """Beyond max_streams new visitors get 503 busy; a client over its own limit gets that limit's 429."""
    pages = [Browser(tight) for _ in range(3)]
    with ExitStack() as stack:
        for page in pages:
            page.session()
            stack.enter_context(page.holding())
        reply = Browser(tight).chat()
        assert code_of(reply) == (503, "busy")
        assert wait_told(reply) >= 1
        assert code_of(Program(tight).chat(stream=False)) == (503, "busy")
        assert code_of(pages[0].chat()) == (429, "too_many_streams")
        assert Program(tight).send("GET", "/healthz").status == 200
    assert Browser(tight).chat().status == 200


@pytest.mark.slow
def test_tokens_are_limited_for_as_long_as_told(tight: Running) -> None:
    """When the tokens are spent, 429 tokens_exhausted says for how long; after that time there are new ones."""
    page = Browser(tight)
    assert page.chat("cost 9500").status == 200
    refused = page.chat(max_tokens=500)
    assert code_of(refused) == (429, "tokens_exhausted")
    assert refused.headers["ratelimit-policy"] == '"tokens_per_session 10000/4 second";q=10000;w=4'
    assert re.fullmatch(r'"tokens_per_session 10000/4 second";r=500;t=[1-4]', refused.headers["ratelimit"])
    assert wait_told(refused) <= 4
    assert page.chat(max_tokens=400).status == 200
    time.sleep(wait_told(refused))
    assert page.chat(max_tokens=500).status == 200


def test_live_answers_hold_their_worst_case(tight: Running) -> None:
    """While answers are being written, others of their address wait for tokens they might need; then they do not."""
    address = new_address()
    pages = [Browser(tight, address) for _ in range(3)]
    for page in pages:
        page.session()
    assert pages[0].chat("cost 9000").status == 200
    with pages[1].holding():
        assert pages[2].chat(max_tokens=4096, stream=False).status == 200
        assert pages[2].chat("cost 4000").status == 200
        assert code_of(pages[2].chat(max_tokens=4096)) == (429, "tokens_exhausted")
    assert pages[2].chat(max_tokens=4096, stream=False).status == 200


def test_minting_gets_round_no_tokens(tight: Running) -> None:
    """New sessions of an address spend from the account of their address."""
    address = new_address()
    for _ in range(2):
        assert Browser(tight, address).chat("cost 9990").status == 200
    refused = Browser(tight, address).chat()
    assert code_of(refused) == (429, "tokens_exhausted")
    assert DAY - 10 <= wait_told(refused) <= DAY
    assert Browser(tight).chat().status == 200


def test_the_environment_opens_no_gates(
    upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server started beside a stray `.env`, under stray RATELIMIT_* variables, limits as it was told to."""
    Path(tmp_path, ".env").write_text("RATELIMIT_ENABLED=false\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATELIMIT_ENABLED", "false")
    with running(upstream.base_url, LIMITS_PER_SESSION="1/minute") as proxy:
        program = Program(proxy)
        assert [program.chat().status for _ in range(3)] == [200, 429, 429]


# ---- two users -----------------------------------------------------------------------------------------------------


def test_two_users_share_no_allowance(tight: Running) -> None:
    """What one user asks, holds and spends, another has still."""
    ann, ben = Browser(tight), Browser(tight)
    ann.session()
    ben.session()
    before = ben.session().json
    with ann.holding():
        assert code_of(ann.chat()) == (429, "too_many_streams")
        assert ben.chat(stream=False).status == 200
    ann.chat("cost 10000")
    assert ann.chat().status == 429
    assert ann.chat().status == 429
    after = ben.session().json
    assert before["session"] == after["session"]
    spent = [new["remaining"] - old["remaining"] for old, new in zip(before["limits"], after["limits"], strict=True)]
    assert spent == [-1, -1, -2, -2]
    assert ben.chat().status == 200


def test_no_cookie_of_the_upstream_travels(wide: Running, upstream: ScriptedUpstream) -> None:
    """A cookie that the upstream plants reaches no browser, and no later request, of the same user or another."""
    pages = [Browser(wide), Browser(wide), Browser(wide), Program(wide)]
    mark = len(upstream.seen)
    for _, page, stream in itertools.product(range(2), pages, (True, False)):
        reply = page.chat(stream=stream)
        assert reply.status == 200
        assert all(line.startswith("chat=") for line in reply.headers.get_all("set-cookie", []))
    seen = upstream.seen[mark:]
    assert len(seen) == 16
    for request in seen:
        assert b"cookie" not in request.head.lower()
        assert b"upstream=" not in request.head + request.body


def test_the_upstream_cannot_tell_who_asks(wide: Running, upstream: ScriptedUpstream) -> None:
    """Neither cookie, address, origin nor session of a visitor goes upstream."""
    page = Browser(wide)
    page.session()
    mark = len(upstream.seen)
    page.chat()
    head = upstream.seen[mark].head.decode("latin-1")
    for mine in (page.cookie, page.id, page.address, "origin:", "sec-fetch", "forwarded", "referer"):
        assert mine not in head.lower() if mine.islower() else mine not in head


def test_the_log_keeps_no_cookie_and_no_whole_address(wide: Running) -> None:
    """A request's line names the session by a keyed hash and the address by its network."""
    page, other = Browser(wide), Browser(wide)
    first, second, third = (wide.line_of(reply) for reply in (page.session(), page.chat(), other.chat()))
    assert first["session"] == second["session"] != third["session"]
    assert first["address"] == page.address.rpartition(".")[0] + ".0/24"
    written = wide.output.getvalue().decode()
    for secret in (page.cookie.partition("=")[2], page.id, other.id, f'"{page.address}"'):
        assert secret not in written


# ---- what the page is told -----------------------------------------------------------------------------------------


def test_session_shape(tight: Running) -> None:
    """GET /api/session has exactly the shape of the contract, with one entry for every window."""
    page = Browser(tight)
    now = int(time.time())
    reply = page.session()
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store, no-transform"
    told = reply.json
    assert list(told) == ["session", "models", "limits"]
    session = told["session"]
    assert session == {"mode": "anonymous", "user": None, "expires_at": session["expires_at"]}
    assert type(session["expires_at"]) is int
    assert now + DAY <= session["expires_at"] <= now + DAY + 5
    assert told["models"] == ["m", "other"]
    assert [list(entry) for entry in told["limits"]] == [["name", "limit", "remaining", "reset_at"]] * 4
    assert [(entry["name"], entry["limit"], entry["remaining"]) for entry in told["limits"]] == [
        ("per_session 4/4 second", 4, 4),
        ("per_address 100/minute", 100, 100),
        ("tokens_per_session 10000/4 second", 10_000, 10_000),
        ("tokens_per_address 20000/day", 20_000, 20_000),
    ]
    for entry, seconds in zip(told["limits"], (2, 60, 2, DAY), strict=True):
        assert type(entry["reset_at"]) is int
        assert now + seconds <= entry["reset_at"] <= now + seconds + 5


def test_session_tells_what_is_left(tight: Running) -> None:
    """After a question the page is told what is left of requests and tokens, and when it comes back."""
    page = Browser(tight)
    page.chat("cost 1234")
    left = {entry["name"].split()[0]: entry["remaining"] for entry in page.session().json["limits"]}
    assert left == {"per_session": 3, "per_address": 99, "tokens_per_session": 8766, "tokens_per_address": 18_766}


def test_request_ids(wide: Running) -> None:
    """A proxy's request id goes through to the answer and the upstream; a bad one is replaced, and all are unique."""
    page = Browser(wide)
    assert page.send("GET", "/api/v1/models", X_Request_Id="from-nginx_1").headers["x-request-id"] == "from-nginx_1"
    made = {page.send("GET", "/api/v1/models", X_Request_Id="a b").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", request_id) for request_id in made)


@pytest.mark.parametrize("forwarded", ["[]", "[]:80", ",", "unknown", "%", "\xff", "1.1.1.1, []", "[" * 3000])
def test_no_forwarded_junk_breaks_the_server(wide: Running, forwarded: str) -> None:
    """Whatever a visitor writes into X-Forwarded-For, the answer is one of ours."""
    reply = send(wide, "GET", "/api/session", headers={"X-Forwarded-For": forwarded})
    assert (reply.status, reply.json["session"]["mode"]) == (200, "anonymous")


# ---- which fault is told -------------------------------------------------------------------------------------------

Arranged = AbstractContextManager[None]


@dataclass
class Fault:
    """One thing that is wrong: with the request (`spoil`), or with the state of things when it comes (`arrange`)."""

    stage: int
    name: str
    status: int
    code: str
    spoil: dict[str, Any] = field(default_factory=dict)
    arrange: Callable[[Running, str], Arranged] | None = None


@contextmanager
def setting(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def full_process(proxy: Running) -> AbstractContextManager[None]:
    return setting(proxy.service.app.limits.leases, "max_streams", 0)


ASK, MINT = ChargeKind.QUESTION, ChargeKind.NEW_SESSION


@contextmanager
def spent(proxy: Running, kind: ChargeKind, address: str) -> Iterator[None]:
    """Fills the limits of this kind at the address, from another session."""
    limits = proxy.service.app.limits.requests
    subject = Subject("other", address)
    counted = next(counted for counted in limits.count(kind, subject) if counted.limit.scope != "per_session")
    with setting(counted.limit.limit, "amount", counted.used + 1):
        limits.charge(kind, subject)
        yield


@contextmanager
def tokens_held(proxy: Running, address: str) -> Iterator[None]:
    tokens, amount = proxy.service.app.limits.tokens, 1_000_000_000
    with tokens.reserve(tokens.check(Subject("other", address), amount), amount):
        yield


@contextmanager
def streams_held(proxy: Running, address: str) -> Iterator[None]:
    leases = proxy.service.app.limits.leases
    with setting(leases, "per_address", 1), leases.acquire(Subject("other", address)):
        yield


FAULTS = [
    Fault(0, "draining", 503, "draining", {}, lambda proxy, _: setting(proxy.service.app, "draining", True)),
    Fault(1, "no such path", 404, "not_found", {"path": "/api/nothing"}),
    Fault(1, "no such method", 405, "method_not_allowed", {"method": "PUT"}),
    Fault(2, "foreign host", 403, "cross_origin", {"Host": "evil.example"}),
    Fault(3, "foreign origin", 403, "cross_origin", {"Origin": "https://evil.example"}),
    Fault(3, "foreign site", 403, "cross_origin", {"Sec-Fetch-Site": "cross-site"}),
    Fault(4, "no JSON", 415, "unsupported_media_type", {"Content-Type": "text/plain"}),
    Fault(5, "long", 413, "body_too_large", {"padding": 3000}),
    Fault(5, "long, in chunks", 413, "body_too_large", {"padding": 3000, "Transfer-Encoding": "chunked"}),
    Fault(6, "bad cookie", 401, "session_required", {"Cookie": "chat=forged"}),
    Fault(6, "too many sessions", 429, "too_many_sessions", {"Cookie": ""}, lambda proxy, at: spent(proxy, MINT, at)),
    Fault(7, "too many requests", 429, "rate_limited", {}, lambda proxy, at: spent(proxy, ASK, at)),
    Fault(8, "bad JSON", 400, "invalid_json", {"body": b"{"}),
    Fault(8, "bad request", 400, "field_not_allowed", {"body": question(tools=[])}),
    Fault(9, "no tokens", 429, "tokens_exhausted", {}, tokens_held),
    Fault(9, "too many streams", 429, "too_many_streams", {}, streams_held),
    Fault(10, "full process", 503, "busy", {}, lambda proxy, _: full_process(proxy)),
]


def asked_with(proxy: Running, faults: tuple[Fault, ...]) -> Reply:
    page = Browser(proxy)
    page.session()
    wrong: dict[str, Any] = {}
    for fault in faults:
        wrong |= fault.spoil
    body = wrong.pop("body", question()) + b" " * wrong.pop("padding", 0)
    if "Transfer-Encoding" in wrong:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    method, path = wrong.pop("method", "POST"), wrong.pop("path", "/api/chat")
    headers = {**page.own_headers, "Content-Type": "application/json", **wrong}
    with ExitStack() as stack:
        for fault in faults:
            if fault.arrange is not None:
                stack.enter_context(fault.arrange(proxy, page.address))
        return send(proxy, method, path, body, {name: value for name, value in headers.items() if value})


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_alone(wide: Running, fault: Fault) -> None:
    """Every fault of the table below is told by its own code when it is the only one, and makes no upstream call."""
    reply = asked_with(wide, (fault,))
    assert code_of(reply) == (fault.status, fault.code)
    if fault.status in (429, 503):
        wait_told(reply)
    assert asked_with(wide, ()).status == 200


PAIRS = [pair for pair in itertools.combinations(FAULTS, 2) if pair[0].stage < pair[1].stage]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name} + {pair[1].name}")
def test_the_first_fault_is_told(wide: Running, upstream: ScriptedUpstream, pair: tuple[Fault, Fault]) -> None:
    """Of two faults the one that the contract names first is told, and the upstream is not called."""
    calls = len(upstream.seen)
    assert code_of(asked_with(wide, pair)) == (pair[0].status, pair[0].code)
    assert len(upstream.seen) == calls


def test_host_comes_before_origin(wide: Running) -> None:
    """Of a foreign Host and a foreign Origin, which share a code, the log names the Host."""
    host, origin = (next(fault for fault in FAULTS if fault.name == f"foreign {name}") for name in ("host", "origin"))
    assert wide.line_of(asked_with(wide, (host, origin)))["reason"] == "foreign Host"


def test_draining_is_for_new_work(wide: Running) -> None:
    """While draining, `/readyz` says so, `/healthz` does not, and API and connection close."""
    with setting(wide.service.app, "draining", True):
        assert Program(wide).send("GET", "/readyz").status == 503
        assert Program(wide).send("GET", "/healthz").status == 200
        for reply in (Program(wide).chat(), Program(wide).session(), Program(wide).send("GET", "/api/v1/models")):
            assert code_of(reply) == (503, "draining")
            assert reply.headers["connection"] == "close"
            assert reply.headers["set-cookie"] is None


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_are_read_only(wide: Running, path: str, method: str) -> None:
    """A probe answers GET and HEAD; a POST that was sent to the wrong address is not told that all is well."""
    reply = send(wide, method, path, headers={"Host": "evil.example"})
    assert code_of(reply) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "GET, HEAD"
    assert Program(wide).send("HEAD", path).status == 200


# ---- https ---------------------------------------------------------------------------------------------------------


def test_https_cookies(secure: Running) -> None:
    """Under an https public_url the cookie is __Host-chat and Secure, when it is given and when it is cleared."""
    page = Browser(secure)
    reply = page.session()
    assert reply.status == 200
    flags = reply.headers["set-cookie"].split("; ")
    assert flags[0].startswith("__Host-chat=")
    assert flags[1:] == ["Path=/", f"Max-Age={DAY}", "HttpOnly", "SameSite=Strict", "Secure"]
    assert page.chat().status == 200
    copy = copy_of(page)
    assert page.leave().headers["set-cookie"] == "__Host-chat=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict; Secure"
    assert code_of(copy.chat()) == (401, "session_required")
    assert is_clearing(copy.chat(), "__Host-chat")


def test_https_knows_no_plain_cookie(secure: Running) -> None:
    """A cookie without the prefix, which a sibling could plant, is not read."""
    page = Browser(secure)
    page.session()
    plain = Program(secure, cookie=page.cookie.replace("__Host-chat", "chat"))
    reply = plain.chat()
    assert reply.status == 200
    assert page.id not in reply.cookie


@pytest.mark.parametrize("path", ["/api/session", "/api/v1/models", "/api/nothing", "/", "/nothing", "/healthz"])
def test_https_is_remembered(secure: Running, path: str) -> None:
    """Every answer under an https public_url tells browsers to come by https only."""
    assert Browser(secure).send("GET", path).headers["strict-transport-security"].startswith("max-age=31536000")


@pytest.mark.parametrize("path", ["/api/session", "/", "/healthz"])
def test_http_is_not_remembered(wide: Running, path: str) -> None:
    """A server on loopback says nothing about https, or the browser would refuse it from then on."""
    assert Browser(wide).send("GET", path).headers["strict-transport-security"] is None


def test_https_hosts(secure: Running) -> None:
    """The public name passes, with and without its port; the name that the proxy connects to does not."""
    for host in ("chat.example.org", "chat.example.org:443", "Chat.Example.org"):
        assert Program(secure).send("GET", "/api/v1/models", Host=host).status == 200
    for host in (f"127.0.0.1:{secure.port}", f"localhost:{secure.port}", "chat.example.org:80", "evil.example"):
        assert code_of(Program(secure).send("GET", "/api/v1/models", Host=host)) == (403, "cross_origin")
        assert Program(secure).send("GET", "/healthz", Host=host).status == 200


# ---- the page ------------------------------------------------------------------------------------------------------

PAGE_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "form-action": "'none'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/index.html", "text/html"),
        ("/page/page.js", "text/javascript"),
        ("/style/base.css", "text/css"),
    ],
)
def test_the_page(wide: Running, path: str, kind: str) -> None:
    """The page's files run nothing but themselves; HEAD says the same as GET, and no more."""
    got, head = (Program(wide).send(method, path) for method in ("GET", "HEAD"))
    assert (got.status, head.status) == (200, 200)
    assert got.headers["content-type"] == f"{kind}; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in got.headers["content-security-policy"].split(";"))
    assert policy == PAGE_POLICY
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["referrer-policy"] == "no-referrer"
    assert got.headers["cross-origin-opener-policy"] == "same-origin"
    assert got.headers["cache-control"] == "no-cache"
    assert int(got.headers["content-length"]) == len(got.body) > 0
    assert head.body == b""
    assert {**head.headers, "date": ""} == {**got.headers, "date": ""}


def test_the_page_is_not_sent_twice(wide: Running) -> None:
    """A browser that has a file still gets 304 and no body."""
    tag = Program(wide).send("GET", "/page/page.js").headers["etag"]
    again = Program(wide).send("GET", "/page/page.js", If_None_Match=tag)
    assert (again.status, again.body) == (304, b"")


UNUSABLE = [
    *("bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=5-2", "items=0-3", "bytes=--5", "bytes=0x1-2"),
    *("bytes=99999999-", "bytes=-0", "bytes=0-0,99999999-"),
]


@pytest.mark.parametrize("written", UNUSABLE)
def test_a_range_that_cannot_be_served_is_ignored(wide: Running, written: str) -> None:
    """Malformed or beyond the file's end, it gets the whole file under our headers, and no words but ours."""
    whole = Program(wide).send("GET", "/page/page.js")
    reply = Program(wide).send("GET", "/page/page.js", Range=written)
    assert (reply.status, reply.body) == (200, whole.body)
    assert {**reply.headers, "date": ""} == {**whole.headers, "date": ""}


def test_a_part_of_a_file(wide: Running) -> None:
    """A Range of the file is all that is sent, under the headers of the whole."""
    whole = Program(wide).send("GET", "/page/page.js")
    part = Program(wide).send("GET", "/page/page.js", Range="bytes=2-5")
    assert (part.status, part.body) == (206, whole.body[2:6])
    assert part.headers["content-range"] == f"bytes 2-5/{len(whole.body)}"
    assert part.headers["content-security-policy"] == whole.headers["content-security-policy"]


@pytest.fixture(scope="module")
def own_page(upstream: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a page of its own, with files beside and inside its folder that must not be served."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("page/index.html", "page/inner/file.txt"):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("for everyone")
    for name in ("secret.txt", "page-of-another/secret.txt"):
        path = Path(folder, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("TOP-SECRET")
    Path(folder, "page", "link.txt").symlink_to(Path(folder, "secret.txt"))
    with running(upstream.base_url, SERVER_STATIC_DIR=str(folder / "page")) as proxy:
        yield proxy


NO_FILES = [
    *("/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "/%2e%2e%2fsecret.txt", "/inner/../../secret.txt"),
    *("/..%5csecret.txt", "/..\\secret.txt", "//../secret.txt", "/%252e%252e/secret.txt", "/.%00./secret.txt"),
    *("/../page-of-another/secret.txt", "/%2e%2e/page-of-another/secret.txt", "/link.txt", "/secret.txt"),
    *("//etc/passwd", "/%2fetc/passwd", "/%2f%2fetc/passwd", "/../../../../../../../../etc/passwd", "/etc/passwd"),
    *("/%00", "/index.html%00", "/index.html%00.txt", "/%ff%fe", "/%ed%a0%80", "/" + "a" * 5000, "/" + "a/" * 2000),
    *(
        "/inner/file.txt/more",
        "/nothing",
        "/.git/config",
        "/api/../secret.txt",
        "/api/%2e%2e/index.html",
    ),
]


@pytest.mark.parametrize("path", NO_FILES, ids=lambda path: str(path)[:40])
def test_no_way_out_of_the_folder(own_page: Running, path: str) -> None:
    """No path, however written, leads out of the page's folder: 404 in the error shape."""
    for method in ("GET", "HEAD"):
        reply = Program(own_page).send(method, path)
        assert reply.status == 404
        assert b"TOP-SECRET" not in reply.body
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["content-security-policy"] == "default-src 'none'"
    assert Program(own_page).send("GET", path).error["code"] == "not_found"


def test_a_page_of_ones_own(own_page: Running) -> None:
    """The configured folder is served at `/`, its folders too, under the same policy; the API stays where it is."""
    for path in ("/", "/index.html", "/inner/file.txt", "/inner/../index.html"):
        reply = Program(own_page).send("GET", path)
        assert (reply.status, reply.body) == (200, b"for everyone")
        assert reply.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert Program(own_page).chat().status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_the_page_takes_nothing(wide: Running, method: str) -> None:
    """The page's addresses answer GET and HEAD alone."""
    assert Program(wide).send(method, "/").status in (404, 405)
    assert Program(wide).send(method, "/").headers["access-control-allow-origin"] is None


def test_no_page(upstream: ScriptedUpstream) -> None:
    """With an empty static_dir there is no page, only the API."""
    with running(upstream.base_url, SERVER_STATIC_DIR="") as proxy:
        assert code_of(Program(proxy).send("GET", "/")) == (404, "not_found")
        assert code_of(Program(proxy).send("GET", "/page/page.js")) == (404, "not_found")
        assert Program(proxy).chat().status == 200


def test_redirects_keep_the_origin(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """A folder's address without its slash leads to the one with it, under the name that people see."""
    Path(tmp_path, "docs").mkdir()
    Path(tmp_path, "docs", "index.html").write_text("docs")
    with running(upstream.base_url, SERVER_STATIC_DIR=str(tmp_path)) as proxy:
        reply = Program(proxy).send("GET", "/docs")
        assert (reply.status, reply.headers["location"]) == (307, "/docs/")
        assert Program(proxy).send("GET", "/docs/").body == b"docs"
        for path in ("//elsewhere.example/%2e%2e/docs", "///elsewhere.example/../docs"):
            location = Program(proxy).send("GET", path).headers["location"]
            assert location == "/elsewhere.example/../docs/"  # two slashes would make a host of it


# ---- bugs ----------------------------------------------------------------------------------------------------------


def test_a_bug_is_an_answer_in_our_shape(upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong inside, and however early: 500 `internal_error`, and the log has places but no texts."""

    def bug(*arguments: object) -> None:
        raise RuntimeError("what the visitor wrote")

    with running(upstream.base_url) as proxy:
        app = proxy.service.app
        for place, name in ((app.edge, "caller"), (app.edge, "check_origin"), (app.limits.tokens, "reserve")):
            with monkeypatch.context() as patched:
                patched.setattr(place, name, bug)
                reply = Program(proxy).chat()
            assert (reply.status, reply.error["code"]) == (500, "internal_error")
            assert b"visitor wrote" not in reply.body
        assert Program(proxy).chat().status == 200
        eventually(lambda: len(proxy.lines("bug")) == 3)
        assert b"visitor wrote" not in proxy.output.getvalue()


def test_a_long_wait_is_not_for_clients_to_sit_out(upstream: ScriptedUpstream) -> None:
    """Where waiting takes more than a minute, OpenAI's clients are told not to retry by themselves."""
    with running(upstream.base_url, LIMITS_PER_SESSION="1/hour") as proxy:
        visitor = Program(proxy)
        assert visitor.chat().headers["x-should-retry"] is None
        refused = visitor.chat()
        assert (refused.status, refused.headers["x-should-retry"]) == (429, "false")
