"""Faults of ours and of the machine: a clock that jumps, a log pipe that is full, secrets that change, bugs.

Rows 35, 37, 38 and 40 of the fault table, through the real server, every column of each. Those of the upstream, of the
client and of the server's end have files of their own.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.faults import fault
from support.harness import (
    DONE,
    GOOD,
    LOOPS,
    PATIENCE,
    Peer,
    Reply,
    Running,
    ScriptedUpstream,
    chat,
    chat_request,
    chunks,
    connect,
    delta,
    eventually,
    finish,
    pieces,
    random_key,
    raw_chat,
    read_until,
    running,
    send,
    streaming,
)
from support.stage import always, prompt_tokens

from proxy.chat import answer as answer_module
from proxy.chat import api_key
from proxy.chat.sse import Events
from proxy.errors import InternalError, StreamFailed
from proxy.telemetry import logs
from proxy.telemetry.logs import Descriptor

HOUR = 3600.0
PIPE = 4096  # bytes, the smallest that Linux gives
FIRST, SECOND = delta("first"), delta("second")
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
USED = 7  # tokens, as USAGE says
WHOLE = FIRST + SECOND + finish() + USAGE + DONE
COUNTED = (FIRST, SECOND, finish(), USAGE, DONE)  # the same, event by event

both_loops = pytest.mark.parametrize("loop", LOOPS)


class Halfway:
    """An upstream whose answers wait after their first event until they may finish."""

    def __init__(self) -> None:
        self.may_finish = threading.Event()

    async def __call__(self, peer: Peer) -> None:
        await peer.head()
        await peer.chunk(FIRST)
        assert await asyncio.to_thread(self.may_finish.wait, PATIENCE)
        for part in COUNTED[1:]:
            await peer.chunk(part)
        await peer.end()


def as_browser(proxy: Running, cookie: str = "") -> dict[str, str]:
    """Headers of our page in a browser that holds this cookie."""
    ours = {"host": proxy.url.partition("://")[2], "origin": proxy.url, "sec-fetch-site": "same-origin"}
    return ours | ({"cookie": cookie} if cookie else {})


def ask_with(proxy: Running, cookie: str, **fields: Any) -> socket.socket:
    """A connection on which this session has asked for a stream."""
    sock = connect(proxy)
    sock.sendall(chat_request(proxy, **fields).replace(b"\r\n", f"\r\ncookie: {cookie}\r\n".encode(), 1))
    return sock


def id_of(cookie: str) -> str:
    return cookie.partition("=")[2].partition(".")[0]


def assert_all_used(proxy: Running, used: int) -> None:
    """Once the newest answer is settled, too: its client may have it a moment before. Who got no place for an answer
    has begun no window."""
    both = {"tokens_per_session": used, "tokens_per_address": used}
    expected = [both] if used else [both, {}]
    with suppress(AssertionError):
        eventually(lambda: proxy.tokens_used() in expected, 2.0)
    assert proxy.tokens_used() in expected


# ---- row 35: the wall clock jumps -----------------------------------------------------------------------------------


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[Running, float], None]:
    """Sets the wall clock of the whole process, and so of everything that looks at it, other than its true time."""
    true_time = time.time

    def jump(proxy: Running, seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: true_time() + seconds)
        for holder in (
            proxy.service.app.account,
            proxy.service.app.access,
            proxy.service.app.upstream,
        ):  # they were given the function itself
            monkeypatch.setattr(holder, "wall", time.time)

    return jump


def wait_told(reply: Reply, code: str) -> int:
    assert (reply.status, reply.error["code"]) == (429, code)
    return int(reply.headers["retry-after"])


@fault(35)
@both_loops
@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["ahead", "back"])
def test_a_clock_that_jumps_opens_and_closes_nothing(
    seconds: float, loop: str, jump: Callable[[Running, float], None]
) -> None:
    """Row 35: no session ends, live streams go on, used-up windows stay so until their announced reset, no longer."""
    halfway, few = Halfway(), 100
    limits = {"LIMITS_PER_SESSION": "4/hour", "LIMITS_TOKENS_PER_SESSION": "3000/hour", "SESSION_IDLE": "86400"}
    with ScriptedUpstream(always(halfway)) as server, running(server.base_url, loop=loop, **limits) as proxy:
        app = proxy.service.app
        one, other = [send(proxy, "GET", "/api/session", headers=as_browser(proxy)).cookie for _ in range(2)]
        too_many = 3000 - prompt_tokens(proxy)  # for whoever has used one

        def ask(cookie: str, most: int = few) -> Reply:
            return chat(proxy, headers=as_browser(proxy, cookie), max_tokens=most)

        with ask_with(proxy, one, max_tokens=few) as live:
            read_until(live, FIRST)
            jump(proxy, seconds)
            halfway.may_finish.set()
            assert b"".join(chunks(live, begun=True)) == WHOLE.removeprefix(FIRST)
        line = proxy.line(3)
        assert (line["ending"], line["code"], line["tokens"]) == ("complete", None, USED)

        jump(proxy, 0)
        assert [ask(cookie).body for cookie in (one, one, one, other)] == [WHOLE] * 4
        no_requests, no_tokens = (
            wait_told(ask(one), "rate_limited"),
            wait_told(ask(other, too_many), "tokens_exhausted"),
        )
        assert HOUR - 60 < min(no_requests, no_tokens) <= max(no_requests, no_tokens) <= HOUR

        jump(proxy, seconds)
        assert no_requests - 60 < wait_told(ask(one), "rate_limited") <= no_requests
        assert no_tokens - 60 < wait_told(ask(other, too_many), "tokens_exhausted") <= no_tokens
        shown = send(proxy, "GET", "/api/session", headers=as_browser(proxy, one))
        assert shown.cookie == "", "nobody gets a new session"
        assert shown.json["limits"][0]["remaining"] == 0
        assert ask(other).body == WHOLE
        assert len(server.seen) == 6

        later = lambda: time.monotonic() + no_requests  # noqa: E731  # the clock that counts has gone on
        app.limits.requests.clock = app.limits.requests.windows.clock = later
        assert ask(one).body == WHOLE
        assert_all_used(proxy, 7 * USED)


# ---- row 37: a log pipe that is full ------------------------------------------------------------------------------


@contextmanager
def log_into_pipe(proxy: Running) -> Iterator[tuple[int, int]]:
    """Within it the server logs into a small pipe, of which these are the ends; either may be closed by the test."""
    own = proxy.service.logs.output
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE)
    proxy.service.logs.output = Descriptor(writing)
    try:
        yield reading, writing
    finally:
        proxy.service.logs.output = own
        for end in (reading, writing):
            with suppress(OSError):
                os.close(end)


COSTING = (*GOOD[:-1], USAGE, DONE)


def assert_served(proxy: Running, server: ScriptedUpstream, count: int) -> None:
    """So many answers come as ever, one after the other, and are settled."""
    began, before = time.monotonic(), len(server.seen)
    for _ in range(count):
        reply = chat(proxy)
        assert (reply.status, reply.body) == (200, b"".join(COSTING))
    assert time.monotonic() - began < PATIENCE / 2
    assert len(server.seen) == before + count
    assert_all_used(proxy, USED * len(server.seen))


@fault(37)
@both_loops
def test_a_full_log_holds_up_nobody(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 37: while the log's pipe is full all are served; lines are dropped, and counted once it is read."""
    monkeypatch.setattr(logs, "QUEUE", 5)
    got = bytearray()

    def read(event: str) -> list[dict[str, Any]]:
        with suppress(BlockingIOError):
            got.extend(os.read(reading, PIPE))
        lines = [json.loads(line) for line in got.splitlines(keepends=True) if line.endswith(b"}\n")]
        return [line for line in lines if line["event"] == event]

    with ScriptedUpstream(streaming(*COSTING)) as server, running(server.base_url, loop=loop) as proxy:
        log = proxy.service.logs
        with log_into_pipe(proxy) as (reading, writing):
            os.write(writing, b"\n" * PIPE)
            assert_served(proxy, server, 20)
            assert log.dropped > 0
            os.set_blocking(reading, False)
            eventually(lambda: len(read("request")) + log.dropped == 20)
            assert_served(proxy, server, 1)
            eventually(lambda: len(read("request")) + log.dropped == 21)
            assert sum(line["count"] for line in read("lines_dropped")) == log.dropped  # in one line or more
            for line in read("request"):
                assert (line["ending"], line["code"], line["tokens"]) == ("complete", None, USED)
        assert not any(piece.encode() in got for piece in pieces(proxy.key))


@fault(37)
@both_loops
def test_a_closed_log_holds_up_nobody(loop: str) -> None:
    """Row 37: when the log's reader has gone all are served; lines are dropped, and told once there is another."""
    with ScriptedUpstream(streaming(*COSTING)) as server, running(server.base_url, loop=loop) as proxy:
        log = proxy.service.logs
        with log_into_pipe(proxy) as (reading, _):
            os.close(reading)
            assert_served(proxy, server, 10)
            eventually(lambda: log.dropped == 10)
        assert_served(proxy, server, 1)
        line = proxy.line()
        assert (line["ending"], line["code"], line["tokens"]) == ("complete", None, USED)
        assert [line["count"] for line in proxy.lines("lines_dropped")] == [10]


# ---- row 38: secrets change -----------------------------------------------------------------------------------------


@dataclass
class SecretFiles:
    """The files of a server's secrets, and what stands in them."""

    folder: Path
    key: str
    session: str

    def write(self, *, key: str | None = None, sessions: list[str] | None = None) -> None:
        (self.folder / "key").write_text(f"{key or self.key}\n")
        (self.folder / "session").write_text("\n".join(sessions or [self.session]) + "\n")

    @property
    def variables(self) -> dict[str, str]:
        return {
            "UPSTREAM_API_KEY_FILE": str(self.folder / "key"),
            "SESSION_SECRET_FILE": str(self.folder / "session"),
        }


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SecretFiles:
    monkeypatch.setattr(api_key, "KEY_CHECK", 1e9)  # seconds: they are read when they are told to be, not before
    files = SecretFiles(tmp_path, random_key(), secrets.token_urlsafe(32))
    files.write()
    return files


@fault(38)
@both_loops
@pytest.mark.parametrize("rotated", ["session", "key", "both"])
def test_rotation_disturbs_nobody(rotated: str, loop: str, files: SecretFiles) -> None:
    """Row 38: live streams finish, and all sessions stay valid; then the new key is sent, and the new secret signs."""
    halfway, new_key, new_session = Halfway(), random_key(), secrets.token_urlsafe(32)
    with (
        ScriptedUpstream(always(halfway)) as server,
        running(server.base_url, key=files.key, loop=loop, **files.variables) as proxy,
    ):
        cookie = send(proxy, "GET", "/api/session", headers=as_browser(proxy)).cookie
        with ask_with(proxy, cookie) as live:
            read_until(live, FIRST)
            files.write(
                key=files.key if rotated == "session" else new_key,
                sessions=[files.session] if rotated == "key" else [new_session, files.session],
            )
            proxy.on_loop(proxy.service.app.reload_secrets)
            halfway.may_finish.set()
            reply = chat(proxy, headers=as_browser(proxy, cookie))
            assert (reply.status, reply.body) == (200, WHOLE)
            assert b"".join(chunks(live, begun=True)) == WHOLE.removeprefix(FIRST)

        keys = [seen.headers["authorization"].removeprefix("Bearer ") for seen in server.seen]
        assert keys == [files.key, files.key if rotated == "session" else new_key]
        if rotated == "key":
            assert reply.cookie == ""
        else:
            assert id_of(reply.cookie) == id_of(cookie) != ""
            cookie = reply.cookie
            files.write(key=keys[-1], sessions=[new_session])
            proxy.on_loop(proxy.service.app.reload_secrets)
        assert chat(proxy, headers=as_browser(proxy, cookie)).body == WHOLE

        eventually(lambda: len(proxy.lines()) == 4)
        answers = [line for line in proxy.lines() if line["route"] == "POST /api/chat"]
        assert [(line["ending"], line["code"], line["tokens"]) for line in answers] == [("complete", None, USED)] * 3
        assert_all_used(proxy, 3 * USED)
        assert len(proxy.service.app.limits.tokens.windows) == 2  # of one session and one address: it was the same one
        seen = bytes(proxy.sent) + proxy.output.getvalue()
        assert not any(piece.encode() in seen for piece in pieces(new_key))


@fault(38)
@both_loops
def test_the_key_a_request_went_out_with_is_guarded_to_its_end(loop: str, files: SecretFiles) -> None:
    """An upstream that echoes the key of before, in an answer that begins after the change, is stopped all the same."""
    go = threading.Event()

    async def echo(peer: Peer) -> None:
        assert peer.seen is not None
        assert await asyncio.to_thread(go.wait, PATIENCE)
        await peer.head()
        await peer.chunk(FIRST)
        await peer.chunk(delta(peer.seen.headers["authorization"]) + DONE)
        await peer.gone()
        peer.writer.close()

    with (
        ScriptedUpstream(always(echo)) as server,
        running(server.base_url, key=files.key, loop=loop, **files.variables) as proxy,
        raw_chat(proxy) as client,
    ):
        eventually(lambda: server.seen)
        files.write(key=random_key())
        proxy.on_loop(proxy.service.app.reload_secrets)
        go.set()
        first, ours = chunks(client)
        assert first == FIRST
        assert json.loads(ours.removeprefix(b"data: "))["error"]["code"] == "stream_interrupted"
        assert proxy.line()["code"] == "stream_interrupted"
        assert eventually(lambda: proxy.lines("key_alarm"))


# ---- row 40: bugs ---------------------------------------------------------------------------------------------------

BUG_TEXT = "what the visitor wrote"


def bug() -> Any:
    raise RuntimeError(BUG_TEXT)


def in_turn(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The real function, except at its call of this number."""
    calls = itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        return bug() if next(calls) == at else real(*arguments, **named)

    return call


Break = Callable[[Running, pytest.MonkeyPatch], None]


def breaking(place: Callable[[Running], object], name: str, at: int = 1) -> Break:
    """Puts a bug where it comes to pass at this call."""

    def break_it(proxy: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        holder = place(proxy)
        monkeypatch.setattr(holder, name, in_turn(getattr(holder, name), at))

    return break_it


def breaking_send(proxy: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server cannot write the second event: the third message, behind the head and the first."""
    real = proxy.service.app.new_context

    def new_context(*arguments: Any) -> Any:
        made = real(*arguments)
        send, messages = made.send, itertools.count(1)

        async def send_or_fail(message: Any) -> None:
            await (bug() if next(messages) == 3 else send(message))

        made.send = send_or_fail
        return made

    monkeypatch.setattr(proxy.service.app, "new_context", new_context)


async def talking(peer: Peer) -> None:
    """One event; would go on."""
    await peer.head()
    await peer.chunk(FIRST)
    await peer.gone()
    peer.writer.close()


async def talking_on(proxy: Running, peer: Peer) -> None:
    """Two events, the second when the client has been sent the first; would go on."""
    await peer.head()
    await peer.chunk(FIRST)
    await asyncio.to_thread(eventually, lambda: FIRST in proxy.sent)
    await peer.chunk(SECOND)
    await peer.gone()
    peer.writer.close()


def check_bug(proxy: Running, server: ScriptedUpstream, *, calls: int, used: int) -> dict[str, Any]:
    """The columns that all bugs have in common. Returns the request's line."""
    line = proxy.line()
    assert line["code"] == "internal_error"
    assert len(server.seen) == calls
    eventually(lambda: not server.open, 2.0)
    assert line.get("tokens", 0) == used
    assert_all_used(proxy, used)
    (told,) = eventually(lambda: proxy.lines("bug"))
    assert (told["error"], told["request_id"]) == ("RuntimeError", line["request_id"])
    assert BUG_TEXT.encode() not in bytes(proxy.sent) + proxy.output.getvalue()
    return line


BEFORE = {
    "before the call": (breaking(lambda proxy: proxy.service.app.limits.leases, "acquire"), 0),
    "making the call": (breaking(lambda proxy: proxy.service.app.upstream, "headers"), 0),
    "reading the answer's head": (breaking(lambda proxy: proxy.service.app.upstream, "check_headers"), 1),
    "making the relay": (breaking(lambda proxy: answer_module, "Relay"), 1),
}


@fault(40)
@both_loops
@pytest.mark.parametrize(
    ("break_it", "calls"),
    BEFORE.values(),
    ids=BEFORE,
)
def test_a_bug_before_the_answer_is_a_status(
    break_it: Break, calls: int, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 40: 500 in the shape of all errors; what the upstream was asked is paid for, its call ends at once."""
    with ScriptedUpstream(always(talking)) as server, running(server.base_url, loop=loop) as proxy:
        break_it(proxy, monkeypatch)
        reply = chat(proxy)
        error = {"message": InternalError.message, "type": "server_error", "param": None, "code": "internal_error"}
        assert (reply.status, reply.json) == (500, {"error": error})
        line = check_bug(proxy, server, calls=calls, used=prompt_tokens(proxy) if calls else 0)
        assert (line["status"], line["ending"]) == (500, None)


AMID = {
    "writing an event": (breaking_send, 2),
    "reading an event": (breaking(lambda proxy: Events, "feed", 2), 1),
}


@fault(40)
@both_loops
@pytest.mark.parametrize(
    ("break_it", "events"),
    AMID.values(),
    ids=AMID,
)
def test_a_bug_amid_the_answer_is_an_event(
    break_it: Break, events: int, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 40: the whole events so far, ours, the end; what was counted is paid for, the call ends at once."""
    with ScriptedUpstream(streaming()) as server, running(server.base_url, loop=loop) as proxy:
        server.script = always(partial(talking_on, proxy))
        break_it(proxy, monkeypatch)
        reply = chat(proxy)
        assert (reply.status, reply.cut, reply.body) == (200, False, FIRST + StreamFailed().event())
        line = check_bug(proxy, server, calls=1, used=prompt_tokens(proxy) + events)
        assert (line["status"], line["ending"], line["events"]) == (200, "error", events)


@fault(40)
@both_loops
def test_a_bug_behind_the_answer_does_not_refund_it(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 40: an answer that has arrived is paid for, whatever goes wrong in writing down how it was."""
    with ScriptedUpstream(streaming(*COUNTED)) as server, running(server.base_url, loop=loop) as proxy:
        breaking(lambda proxy: proxy.service.app.recorder, "record_stream")(proxy, monkeypatch)
        assert chat(proxy).body == WHOLE
        assert proxy.line()["code"] == "internal_error"
        assert_all_used(proxy, USED)
