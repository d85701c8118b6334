"""How a server ends: no new work, live answers to their end or to `drain_seconds`, then a word to the rest.

Rows 31 and 32 of the fault table. `Service.end` is what a signal calls; the signals themselves are tested with real
processes.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.commands import serving
from support.faults import fault
from support.harness import (
    DONE,
    FULL,
    LOOPS,
    PATIENCE,
    Peer,
    Running,
    ScriptedUpstream,
    chat,
    chat_request,
    chunks,
    connect,
    delta,
    eventually,
    finish,
    raw_chat,
    read_until,
    running,
    send,
)

from proxy.chat import policy
from proxy.server import runner
from proxy.server import service as server

FIRST, SECOND = delta("first"), delta("second")
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
LONG = "30"  # seconds of drain that no test here waits for
SMALL = 16384  # bytes of socket buffers where a client is to block early
LARGE = delta("x" * 50_000)

CROWD = 1000 if FULL else 100  # live streams; the default max_streams is as many
PACE = CROWD / 1000  # seconds between two events of one stream of a crowd, which makes 1,000 a second in all
ON_THE_WAY = 3  # events written that a cut stream need not have: one just then, one into the cut, one of patience

both_loops = pytest.mark.parametrize("loop", LOOPS)


@dataclass
class Play:
    """A proxy, and an upstream that does what the question says: "answer", "silence", "flood", "much", "half", ..."""

    proxy: Running
    upstream: ScriptedUpstream
    may_finish: bool = False
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def prompt(self) -> int:
        """What the prompt of each of these questions is estimated at."""
        body = chat_request(self.proxy, **question("nothing")).partition(b"\r\n\r\n")[2]
        return policy.apply(body, self.proxy.settings.policy).prompt_tokens

    def ask(self, what: str, **fields: Any) -> socket.socket:
        """A client that has asked, and whose question has reached the upstream."""
        before = len(self.upstream.seen)
        client = self.stack.enter_context(raw_chat(self.proxy, **question(what), **fields))
        eventually(lambda: len(self.upstream.seen) == before + 1)
        return client

    def end(self) -> None:
        """One signal."""
        self.proxy.on_loop(self.proxy.service.end)

    def assert_over(self, patience: float = PATIENCE) -> None:
        """The service ends, and has left nothing open, held or counted."""
        eventually(self.proxy.loop.is_closed, patience)
        app = self.proxy.service.app
        transport: Any = app.transport
        assert (app.active_scopes, app.busy, app.limits.leases.live, transport.open_sockets) == (set(), 0, 0, 0)
        eventually(lambda: not self.upstream.open)


def question(what: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"{what:10}"}]}


@contextmanager
def playing(loop: str, drain_seconds: str, **overrides: str) -> Iterator[Play]:
    plays: list[Play] = []

    async def script(peer: Peer) -> None:
        while True:
            await act(peer, (await peer.request()).json["messages"][0]["content"].strip())

    async def act(peer: Peer, what: str) -> None:
        if what == "nothing":
            return await peer.gone()
        if what == "not now":
            return await peer.whole(b"", "503 Service Unavailable", "text/plain", "retry-after: 30")
        await peer.head(content_type="application/json" if what == "half" else "text/event-stream")
        if what == "half":
            await peer.chunk(b'{"choices": [')
            return await peer.gone()
        await peer.chunk(FIRST)
        if what == "much":
            await fill(peer, plays[0].proxy)
            await peer.chunk(finish() + DONE)
            return await peer.end()
        while what == "flood":
            await peer.chunk(delta("x" * 4000))
        if what == "silence":
            await peer.chunk(SECOND[:20])
            return await peer.gone()
        while not plays[0].may_finish:
            await peer.chunk(b": waiting\n\n")
            await asyncio.sleep(0.01)
        for part in (SECOND, finish(), USAGE, DONE):
            await peer.chunk(part)
        return await peer.end()

    settings = {"SERVER_DRAIN_SECONDS": drain_seconds, **overrides}
    with ScriptedUpstream(script) as upstream, running(upstream.base_url, loop=loop, **settings) as proxy:
        play = Play(proxy, upstream)
        plays.append(play)
        with play.stack:
            yield play


async def fill(peer: Peer, proxy: Running) -> None:
    """Sends events, one at a time, until the server would have to wait before it writes another."""
    sent = len(proxy.sent)
    while not proxy.blocked_clients:
        await peer.chunk(LARGE)
        sent += len(LARGE)
        await asyncio.to_thread(eventually, lambda: len(proxy.sent) >= sent)  # noqa: B023  # over before it changes


def code_of(event: bytes) -> str:
    code: str = json.loads(event.removeprefix(b"data: "))["error"]["code"]
    return code


# ---- while it drains ------------------------------------------------------------------------------------------------


@fault(31)
@both_loops
def test_live_streams_run_on_and_new_requests_are_refused(loop: str) -> None:
    """After the first signal no request begins and every answer ends; the service ends with the last one."""
    with playing(loop, LONG) as play:
        proxy = play.proxy
        clients = [play.ask("answer") for _ in range(3)]
        for client in clients:
            read_until(client, FIRST)
        play.end()
        eventually(lambda: proxy.lines("draining"))
        assert proxy.lines("draining")[0]["live"] == 3

        assert send(proxy, "GET", "/readyz").status == 503
        assert send(proxy, "GET", "/healthz").status == 200
        for refused in (chat(proxy), chat(proxy, stream=False), send(proxy, "GET", "/api/session")):
            assert (refused.status, refused.error["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["connection"] == "close"
        assert len(play.upstream.seen) == 3

        play.may_finish = True
        for client in clients:
            rest = b"".join(chunks(client, begun=True))
            assert rest.replace(b": waiting\n\n", b"") == SECOND + finish() + USAGE + DONE
        finished = time.monotonic()
        play.assert_over()
        assert time.monotonic() - finished < PATIENCE / 2
        streams = [line for line in proxy.lines() if line["status"] == 200]
        assert [(line["ending"], line["code"], line["tokens"]) for line in streams] == [("complete", None, 7)] * 3
        assert [line["code"] for line in proxy.lines() if line["status"] == 503] == ["draining"] * 3
        assert set(proxy.tokens_used().values()) == {21}


@both_loops
def test_a_kept_connection_is_refused_and_closed(loop: str) -> None:
    """A connection that was idle when the drain began gets its 503 too, and the end of the connection with it."""
    with playing(loop, LONG) as play:
        kept = http.client.HTTPConnection("127.0.0.1", play.proxy.port, timeout=PATIENCE)
        kept.request("GET", "/healthz")
        kept.getresponse().read()
        play.ask("answer")
        play.end()
        eventually(lambda: play.proxy.lines("draining"))
        kept.request("GET", "/api/v1/models")
        answer = kept.getresponse()
        assert (answer.status, answer.headers["connection"]) == (503, "close")
        answer.read()
        assert kept.sock is None  # http.client has seen that it closes
        kept.close()


@both_loops
def test_nothing_to_wait_for(loop: str) -> None:
    """A server without live answers ends at once, whatever drain_seconds says, idle connections or not."""
    with playing(loop, LONG) as play, connect(play.proxy), connect(play.proxy) as idle:
        idle.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        read_until(idle, b"ok")
        play.end()
        play.assert_over(PATIENCE / 2)


# ---- when its time is over ------------------------------------------------------------------------------------------


def time_over(play: Play) -> None:
    """The drain's time is over, or is cut short by the second signal."""
    play.end()
    if play.proxy.service.drain_seconds == float(LONG):
        eventually(lambda: play.proxy.lines("draining"))
        play.end()


both_ends = pytest.mark.parametrize("drain_seconds", ["0.3", LONG], ids=["time over", "second signal"])


@fault(32)
@both_loops
@both_ends
def test_what_is_live_then_gets_a_word_and_the_end(drain_seconds: str, loop: str) -> None:
    """Streams end with whole events, the `draining` event, no [DONE]; their upstream is closed, the account right."""
    with playing(loop, drain_seconds) as play:
        proxy = play.proxy
        clients = [play.ask(what) for what in ("answer", "silence", "silence")]
        for client in clients:
            read_until(client, FIRST)
        began = time.monotonic()
        time_over(play)
        for client in clients:
            rest = b"".join(chunks(client, begun=True))
            assert code_of(rest.replace(b": waiting\n\n", b"")) == "draining"
        assert float(drain_seconds) == float(LONG) or time.monotonic() - began >= 0.3
        play.assert_over()
        assert time.monotonic() - began < PATIENCE
        lines = proxy.lines()
        assert [(line["ending"], line["code"]) for line in lines] == [("drained", "draining")] * 3
        assert [line["tokens"] for line in lines] == [play.prompt + 1] * 3
        assert set(proxy.tokens_used().values()) == {3 * (play.prompt + 1)}
        endings = 'chat_proxy_stream_endings_total{ending="drained"} 3.0'
        assert endings in proxy.service.app.metrics.exposition().decode()
        assert all(seen.closed for seen in play.upstream.seen)


@both_loops
@both_ends
@pytest.mark.parametrize(
    ("what", "stream", "paid"),
    [("nothing", True, True), ("nothing", False, True), ("half", False, True), ("not now", True, False)],
    ids=["before headers", "before a whole answer", "within a whole answer", "in backoff"],
)
def test_what_waits_for_its_answer_is_refused(
    what: str, stream: bool, paid: bool, drain_seconds: str, loop: str
) -> None:
    """A request that has no answer yet gets 503 `draining`; the prompt is paid for if the upstream has it."""
    with playing(loop, drain_seconds) as play:
        client = play.ask(what, stream=stream)
        time_over(play)
        head = read_until(client, b"}}")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close\r\n" in head
        assert b"retry-after: 1\r\n" in head
        assert b'"code":"draining"' in head
        play.assert_over()
        line = play.proxy.line()
        assert (line["status"], line["code"]) == (503, "draining")
        assert line["tokens"] == (play.prompt if paid else 0)
        assert set(play.proxy.tokens_used().values()) == {line["tokens"]}


@both_loops
def test_a_request_that_arrives_in_pieces_meanwhile(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is complete only after the drain's time is over: the upstream is not called any more."""
    monkeypatch.setattr(server, "LAST_EVENTS", 1.5)
    monkeypatch.setattr(runner, "FLUSH", 1)
    with playing(loop, "0.2") as play, connect(play.proxy) as client:
        request = chat_request(play.proxy, **question("nothing"))
        client.sendall(request[:-10])
        eventually(lambda: play.proxy.service.app.busy)
        play.end()
        eventually(lambda: play.proxy.service.app.is_cut)
        client.sendall(request[-10:])
        assert read_until(client, b"}}").startswith(b"HTTP/1.1 503 ")
        play.assert_over()
        assert play.proxy.line()["code"] == "draining"
        assert not any(play.proxy.tokens_used().values())
        assert play.upstream.seen == []


@both_loops
def test_a_client_that_does_not_read_holds_up_nothing(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last word cannot be delivered the server ends without it, and the log says how the stream ended."""
    monkeypatch.setattr(server, "LAST_EVENTS", 0.5)
    monkeypatch.setattr(runner, "FLUSH", 1)
    with playing(loop, "0.2") as play:
        play.ask("flood", buffers=SMALL)
        eventually(lambda: play.proxy.blocked_clients)
        began = time.monotonic()
        play.end()
        play.assert_over()
        assert time.monotonic() - began < PATIENCE / 2
        line = play.proxy.line()
        assert line["ending"] == "drained"
        assert line["tokens"] == play.prompt + line["events"] > play.prompt
        assert set(play.proxy.tokens_used().values()) == {line["tokens"]}


@both_loops
def test_an_end_that_waits_for_its_reader_is_still_the_end(loop: str) -> None:
    """The upstream has said its last, the client has not read it when the time is over: it gets all that was said."""
    with playing(loop, "0.2") as play:
        client = play.ask("much", buffers=SMALL)
        transport: Any = play.proxy.service.app.transport
        eventually(lambda: transport._idle or not all(inner._reading for inner in transport._connections))
        play.end()
        eventually(lambda: play.proxy.service.app.is_cut)
        said = b"".join(chunks(client))
        assert said == FIRST + LARGE * said.count(LARGE) + finish() + DONE
        play.assert_over()
        assert play.proxy.line()["ending"] == "complete"


# ---- a full house ---------------------------------------------------------------------------------------------------


@dataclass
class Crowd:
    """Streams that go on until they may finish; `written` is how many events each of them has been given so far.

    Each is told apart by its number, in the question and in every event, so that none gets a part of another's.
    """

    upstream: ScriptedUpstream = field(init=False)
    may_finish: int = 0  # those with lower numbers
    written: Counter[int] = field(default_factory=Counter)

    async def script(self, peer: Peer) -> None:
        while True:
            number = int((await peer.request()).json["messages"][0]["content"])
            await peer.head()
            while number >= self.may_finish:
                await peer.chunk(self.event(number, self.written[number]))
                self.written[number] += 1
                await asyncio.sleep(PACE)
            await peer.chunk(finish())
            await peer.chunk(DONE)
            await peer.end()

    def event(self, number: int, place: int) -> bytes:
        return delta(f"{number}.{place}")

    def events(self, number: int) -> bytes:
        return b"".join(self.event(number, place) for place in range(self.written[number]))

    def join(self, port: int, size: int, stack: ExitStack) -> list[socket.socket]:
        """So many clients, each of which has its first event."""
        clients = []
        for number in range(size):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            body = json.dumps({"messages": [{"role": "user", "content": str(number)}], "stream": True}).encode()
            head = f"POST /api/chat HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
            client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
            clients.append(client)
        eventually(lambda: len(self.written) == size and min(self.written.values()) >= 1, PATIENCE * 3)
        return clients

    def ending(self, number: int, client: socket.socket) -> str:
        """How a client's answer ended, read to the end of its connection: "whole", or the code of our event.

        Fails when it was cut, has lost or changed an event, or when there is anything else in it.
        """
        body = body_of(b"".join(iter(lambda: client.recv(65536), b"")))
        *events, last = [event + b"\n\n" for event in body.removesuffix(b"\n\n").split(b"\n\n")]
        if last == DONE:
            assert body == self.events(number) + finish() + DONE
            return "whole"
        assert b"".join(events) == b"".join(self.event(number, place) for place in range(len(events)))
        assert self.written[number] - ON_THE_WAY <= len(events) <= self.written[number], "events that came are missing"
        return code_of(last)


def body_of(answer: bytes) -> bytes:
    """The body of a streamed answer that is all there was on its connection. Fails when the framing is cut or wrong."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    body, size = b"", -1
    while size:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)  # of nothing, where the last chunk is missing
        assert rest[size : size + 2] == b"\r\n", "cut within a chunk"
        body, rest = body + rest[:size], rest[size + 2 :]
    assert rest == b"", "bytes behind the last chunk"
    return body


@contextmanager
def crowded(loop: str, drain_seconds: str) -> Iterator[tuple[Play, Crowd, list[socket.socket]]]:
    server.allow_all_descriptors()  # four for each stream are ours
    crowd = Crowd()
    with ScriptedUpstream(crowd.script) as upstream:
        settings = {"SERVER_DRAIN_SECONDS": drain_seconds, "LIMITS_STREAMS_PER_SESSION": str(CROWD)}
        with running(upstream.base_url, loop=loop, **settings) as proxy, ExitStack() as stack:
            yield Play(proxy, upstream), crowd, crowd.join(proxy.port, CROWD, stack)


def endings_logged(proxy: Running) -> Counter[tuple[str, str | None]]:
    """What the log says of all answers that were begun: ending and code."""
    return Counter((line["ending"], line["code"]) for line in proxy.lines() if line["status"] == 200)


@both_loops
def test_a_full_house_goes_on_and_ends_whole(loop: str) -> None:
    """While hundreds of streams are live and the drain has time: no new request, and each stream gets every event."""
    with crowded(loop, LONG) as (play, crowd, clients):
        proxy = play.proxy
        play.end()
        eventually(lambda: proxy.lines("draining"))
        assert proxy.lines("draining")[0]["live"] == CROWD
        before = crowd.written.copy()

        assert send(proxy, "GET", "/readyz").status == 503
        refused = chat(proxy)
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"

        eventually(lambda: all(crowd.written[number] > before[number] + 1 for number in range(CROWD)), PATIENCE * 3)
        assert len(proxy.service.app.active_scopes) == CROWD
        crowd.may_finish = CROWD
        assert [crowd.ending(number, client) for number, client in enumerate(clients)] == ["whole"] * CROWD
        play.assert_over()
        assert endings_logged(proxy) == {("complete", None): CROWD}
        assert [line["code"] for line in proxy.lines() if line["status"] == 503] == ["draining"]


@pytest.mark.quiet
@both_loops
def test_a_full_house_is_told_when_the_time_is_over(loop: str) -> None:
    """At the deadline those that had time are whole, each of the others has its events, one word, and an end."""
    with crowded(loop, "4" if FULL else "1") as (play, crowd, clients):
        play.end()
        eventually(lambda: play.proxy.lines("draining"))
        crowd.may_finish = CROWD // 2
        endings = [crowd.ending(number, client) for number, client in enumerate(clients)]
        play.assert_over()
        counted = Counter(endings)
        assert set(endings[CROWD // 2 :]) == {"draining"}, "these could not finish"
        assert counted["whole"] + counted["draining"] == CROWD
        assert counted["whole"] > 0  # all of the first half, unless this machine is busy
        wanted = {("complete", None): counted["whole"], ("drained", "draining"): counted["draining"]}
        assert endings_logged(play.proxy) == wanted


@pytest.mark.process
def test_second_sigterm_of_a_process(tmp_path: Path) -> None:
    """A real server and real signals: what ended before the second SIGTERM is whole, the rest is told; exit code 0."""
    crowd, size = Crowd(), 20
    with (
        ScriptedUpstream(crowd.script) as upstream,
        serving(tmp_path, upstream.base_url, LIMITS_STREAMS_PER_SESSION="20", SERVER_DRAIN_SECONDS=LONG) as process,
        ExitStack() as stack,
    ):
        clients = crowd.join(process.port, size, stack)
        process.tell(signal.SIGTERM)
        eventually(lambda: process.get("/readyz")[0] == 503)
        crowd.may_finish = size // 2
        before = crowd.written.copy()
        eventually(lambda: sum(line.get("ending") == "complete" for line in process.logged()) == size // 2)
        eventually(lambda: all(crowd.written[number] > before[number] for number in range(size // 2, size)))
        process.tell(signal.SIGTERM)
        endings = [crowd.ending(number, client) for number, client in enumerate(clients)]
        assert endings == ["whole"] * (size // 2) + ["draining"] * (size // 2)
        assert process.exit_code() == 0


@pytest.mark.slow
@both_loops
def test_who_does_not_read_costs_the_others_nothing(loop: str) -> None:
    """An answer that is written whole reaches a slow reader, though another takes no last words."""
    parts = [delta(f"{number}{'x' * 1000}") for number in range(60)]

    async def script(peer: Peer) -> None:
        if (await peer.request()).json["messages"][0]["content"] == "whole":
            await peer.sse(*parts, finish(), DONE)
            return
        await peer.head()
        while not peer.writer.is_closing():
            await peer.chunk(delta("x" * 4000))

    with (
        ScriptedUpstream(script) as model,
        running(model.base_url, loop=loop, SERVER_DRAIN_SECONDS="0.2") as proxy,
        raw_chat(proxy, buffers=4096, messages=[{"role": "user", "content": "flood"}]),
        raw_chat(proxy, buffers=4096, messages=[{"role": "user", "content": "whole"}]) as slow,
    ):
        eventually(lambda: [line for line in proxy.lines() if line["ending"] == "complete"])
        proxy.on_loop(proxy.service.end)
        data = b""
        while part := slow.recv(2000):
            data += part
            time.sleep(0.1)  # longer in all than the last words have
        assert data.endswith(b"0\r\n\r\n")
