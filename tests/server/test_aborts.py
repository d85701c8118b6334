"""A client that disconnects, in any phase and in any way, ends its upstream call, and nothing is left of it.

Rows 25 to 29 and 41 of the fault table. Times are measured at the upstream's socket. Their bound is ten times the
promised 50 ms, plus the time for which this machine kept the process waiting; the benchmark measures the promise.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.faults import fault
from support.harness import (
    FULL,
    GOOD,
    LOOPS,
    PATIENCE,
    Peer,
    Running,
    ScriptedUpstream,
    attempts,
    chat_request,
    connect,
    delta,
    eventually,
    full_port,
    raw_chat,
    read_until,
    reset,
    running,
    streaming,
)

from proxy.chat import policy
from proxy.server import listener as listener_module

BOUND = 0.5  # seconds
MANY = 100 if FULL else 30
MEDIUM = 65536  # bytes of socket buffers of a client that blocks early; below a loopback segment reading takes ages
SMALL = 16384  # of a client that blocks at once
SO_ATTACH_FILTER = 26  # of asm-generic/socket.h; Python has no name for it

FIRST, SECOND = delta("first"), delta("second")
LONG = delta("x" * 4000)
FEW = 18  # long events: more than the kernel takes for a client with a small buffer, too little to pause our writes


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


WAYS: dict[str, Callable[[socket.socket], None]] = {
    "close": socket.socket.close,
    "reset": reset,
    "half-close": half_close,
}

both_loops = pytest.mark.parametrize("loop", LOOPS)
all_ways = pytest.mark.parametrize("way", WAYS)


class Noise:
    """Measures how long this machine keeps the process waiting inside the `with` block."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._queued = queued()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Noise:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            before = time.monotonic()
            time.sleep(0.005)
            self.worst = max(self.worst, time.monotonic() - before - 0.005)

    @property
    def seconds(self) -> float:
        """The allowance: a few stalls as long as the longest, plus all waits for a processor, which add up."""
        return 4 * self.worst + sum(now - self._queued.get(thread, 0) for thread, now in queued().items())


def queued() -> dict[str, float]:
    """For each thread of this process, the seconds since its start in which it was runnable and had no processor."""
    found = {}
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended, or this kernel does not count
            found[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return found


# ---- the phases -----------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A running phase: the upstream that plays it, the proxy, and the clients of the current round."""

    phase: Phase
    upstream: ScriptedUpstream
    proxy: Running
    clients: list[socket.socket] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)  # times at which the upstream's connections were closed, in order
    sent: int = 0  # bytes that clients of earlier rounds were sent
    is_dark: bool = False  # the clients have lost power
    rounds: int = 0  # requests of earlier rounds
    spent: int = 0  # tokens of earlier rounds

    @property
    def count(self) -> int:
        return len(self.clients)

    @property
    def calls(self) -> int:
        """The number of upstream connections in use."""
        transport: Any = self.proxy.service.app.transport
        return int(transport.open_sockets - len(transport._idle))

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log lines of this round."""
        return self.proxy.lines()[self.rounds :]

    @contextmanager
    def clients_there(self, count: int | None = None) -> Iterator[list[socket.socket]]:
        """Starts a new round; yields its clients when all have reached the phase."""
        eventually(lambda: not self.proxy.service.app.busy)
        self.rounds = len(self.proxy.lines())
        self.spent = sum(line.get("tokens", 0) for line in self.proxy.lines())
        self.upstream.seen.clear()
        self.closed.clear()
        self.clients.clear()
        self.sent = len(self.proxy.sent)
        with ExitStack() as stack:
            for _ in range(count or self.phase.count):
                self.clients.append(stack.enter_context(closing(self.phase.ask(self.proxy))))
            eventually(lambda: self.phase.reached(self))
            yield self.clients

    def assert_stopped(self, left: float, noise: Noise) -> None:
        """Asserts that all calls ended soon after `left` (monotonic), each settled and logged as the phase expects."""
        proxy, phase, bound = self.proxy, self.phase, BOUND + noise.seconds
        wall = time.time() - time.monotonic()
        if phase.calls:
            eventually(lambda: len(self.closed) == self.count)
            assert p99([moment - left for moment in self.closed]) < bound
            eventually(lambda: not self.upstream.open)
        lines = eventually(lambda: lines if len(lines := self.lines) == self.count else [])
        assert p99([line["time"] - wall - left for line in lines]) < bound
        proxy.assert_nothing_left()
        assert len(self.upstream.seen) == self.count * phase.requests, "nobody is called again"

        question = chat_request(proxy).partition(b"\r\n\r\n")[2]
        prompt = policy.apply(question, proxy.settings.policy).prompt_tokens if phase.prompt else 0
        for line in lines:
            assert (line["ending"], line["code"], line["status"]) == ("aborted", None, 200 if phase.begun else 499)
            if phase.events is not None:
                assert line.get("events", 0) == phase.events
            assert line.get("tokens", 0) == prompt + line.get("events", 0)
        used = self.spent + sum(line.get("tokens", 0) for line in lines)
        assert set(proxy.tokens_used().values()) <= {used}
        metrics = proxy.service.app.metrics.exposition().decode()
        assert f'chat_proxy_stream_endings_total{{ending="aborted"}} {self.rounds + self.count}.0' in metrics
        assert "chat_proxy_streams_active 0.0" in metrics


def p99(latencies: list[float]) -> float:
    return sorted(latencies)[max(0, round(len(latencies) * 0.99) - 1)]


Act = Callable[[Scene, Peer], Awaitable[None]]


@dataclass(frozen=True)
class Phase:
    """A moment at which a client may disconnect.

    `act` is the upstream's part after a request; `reached` is true when all clients are in the phase. `events` is the
    number of events that are charged, None for the number in the log; with `prompt` the prompt is charged. `requests`
    is the number of requests that reach the upstream from each client. `row` is the row of the fault table.
    """

    act: Act
    reached: Callable[[Scene], object]
    prompt: bool = True
    events: int | None = 0
    count: int = MANY
    begun: bool = False  # our response has begun
    calls: bool = True  # the upstream has a connection that must be closed
    requests: int = 1
    row: int = 27
    ask: Callable[[Running], socket.socket] = raw_chat
    scheme: str = "http"


def ask_half(proxy: Running) -> socket.socket:
    """Sends a request whose body stops halfway."""
    sock = connect(proxy)
    sock.sendall(chat_request(proxy)[:-20])
    return sock


def ask_whole(proxy: Running) -> socket.socket:
    return raw_chat(proxy, stream=False)


def ask_and_not_read(proxy: Running) -> socket.socket:
    return raw_chat(proxy, buffers=MEDIUM)


def ask_and_take_little(proxy: Running) -> socket.socket:
    return raw_chat(proxy, buffers=SMALL)


def ask_and_leave_to_the_kernel(proxy: Running) -> socket.socket:
    """Sends a request with a small buffer on the client's side only: our kernel holds all bytes, the loop none."""
    sock = socket.socket()
    sock.settimeout(PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    sock.connect(("127.0.0.1", proxy.port))
    sock.sendall(chat_request(proxy))
    return sock


async def silent(scene: Scene, peer: Peer) -> None:
    await peer.gone()


async def not_now(scene: Scene, peer: Peer) -> None:
    while True:
        await peer.whole(b"", "503 Service Unavailable", "text/plain", "retry-after: 30")
        await peer.request()  # of another client, on the same connection


async def refused_slowly(scene: Scene, peer: Peer) -> None:
    await peer.head("400 Bad Request", "application/json")
    await peer.chunk(b'{"error": {"co')
    await peer.gone()


async def half_an_answer(scene: Scene, peer: Peer) -> None:
    await peer.head(content_type="application/json")
    await peer.chunk(b'{"choices": [')
    await peer.gone()


async def two_events(scene: Scene, peer: Peer) -> None:
    await peer.head()
    await peer.chunk(FIRST)
    await peer.chunk(SECOND)
    await peer.gone()


async def while_it_stays(peer: Peer, sending: Awaitable[None]) -> None:
    """Sends until the proxy closes."""
    task = asyncio.ensure_future(sending)
    await peer.gone()
    task.cancel()
    with suppress(asyncio.CancelledError, ConnectionError):
        await task


async def a_little(scene: Scene, peer: Peer) -> None:
    await peer.head()
    for _ in range(FEW):
        await peer.chunk(LONG)
    await peer.gone()


async def talking(scene: Scene, peer: Peer) -> None:
    async def talk() -> None:
        await peer.head()
        while True:
            await peer.chunk(FIRST)
            await asyncio.sleep(0.05)

    await while_it_stays(peer, talk())


async def flooding(scene: Scene, peer: Peer) -> None:
    async def pour() -> None:
        await peer.head()
        while True:
            await peer.chunk(LONG)

    peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MEDIUM)
    await while_it_stays(peer, pour())


def all_arrived(scene: Scene) -> bool:
    return len(scene.upstream.seen) == scene.count


def all_got(event: bytes) -> Callable[[Scene], bool]:
    def got(scene: Scene) -> bool:
        for client in scene.clients:
            read_until(client, event)
        return True

    return got


async def one_more(scene: Scene, peer: Peer) -> None:
    await peer.head()
    await peer.chunk(FIRST)
    while not scene.is_dark:  # noqa: ASYNC110  # set in another thread
        await asyncio.sleep(0.005)
    await peer.chunk(SECOND)
    await peer.gone()


async def one_event(scene: Scene, peer: Peer) -> None:
    await peer.head()
    await peer.chunk(FIRST)
    await peer.gone()


async def talking_on(scene: Scene, peer: Peer) -> None:
    async def talk() -> None:
        await peer.head()
        await peer.chunk(FIRST)
        while True:
            await asyncio.sleep(0.05)
            if scene.is_dark:
                await peer.chunk(SECOND)

    await while_it_stays(peer, talk())


def all_dark(scene: Scene) -> bool:
    """Waits until all clients have their first event, then cuts their power."""
    all_got(FIRST)(scene)
    return go_dark(scene)


def all_dark_before_headers(scene: Scene) -> bool:
    return all_arrived(scene) and go_dark(scene)


def go_dark(scene: Scene) -> bool:
    for client in scene.clients:
        lose_power(client)
    scene.is_dark = True
    return True


def lose_power(sock: socket.socket) -> None:
    """Drops every packet to this socket from now on, so its kernel acknowledges nothing."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF's `ret #0`
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(drop_all)))


def all_passed_on(scene: Scene) -> bool:
    return scene.proxy.sent.count(LONG, scene.sent) == scene.count * FEW


def all_blocked(scene: Scene) -> bool:
    return scene.proxy.blocked_clients + len(scene.closed) >= scene.count  # a short write deadline closes some already


PHASES = {
    "during its body": Phase(
        silent, lambda scene: scene.proxy.service.app.busy == scene.count, prompt=False, calls=False, requests=0,
        row=25, ask=ask_half,
    ),
    "in backoff": Phase(
        not_now, lambda scene: all_arrived(scene) and not scene.calls, prompt=False, calls=False, row=26
    ),
    "connecting": Phase(  # in TLS, so that the upstream sees a connection
        silent, lambda scene: scene.upstream.open == scene.count, prompt=False, requests=0, scheme="https"
    ),
    "before headers": Phase(silent, all_arrived),
    "mid-stream": Phase(talking, all_got(FIRST), events=None, begun=True),
    "in silence": Phase(two_events, all_got(SECOND), events=2, begun=True),
    "blocked on a slow reader": Phase(flooding, all_blocked, events=None, begun=True, count=20, ask=ask_and_not_read),
    "in silence, with bytes left untaken": Phase(
        a_little, all_passed_on, events=None, begun=True, count=20, ask=ask_and_take_little
    ),
    "in silence, with bytes left to the kernel": Phase(
        a_little, all_passed_on, events=None, begun=True, count=20, ask=ask_and_leave_to_the_kernel
    ),
    "before a whole answer": Phase(silent, all_arrived, count=20, ask=ask_whole),
    "within a whole answer": Phase(half_an_answer, all_arrived, count=20, ask=ask_whole),
    "within an error's body": Phase(refused_slowly, all_arrived, count=20),
}  # fmt: skip

POWERLESS = {
    "no power, and one more event": Phase(one_more, all_dark, events=2, begun=True),
    "no power, and many more events": Phase(talking_on, all_dark, events=None, begun=True),
    "no power, and no more events": Phase(one_event, all_dark, events=1, begun=True),
    "no power, before headers": Phase(silent, all_dark_before_headers),
    "no power, before a whole answer": Phase(silent, all_dark_before_headers, ask=ask_whole),
}


@contextmanager
def playing(phase: str, loop: str) -> Iterator[Scene]:
    """Runs the upstream of the phase and a proxy in front of it."""
    chosen = (PHASES | POWERLESS)[phase]
    scenes: list[Scene] = []

    async def script(peer: Peer) -> None:
        scene = scenes[0]
        try:
            if chosen.requests:
                await peer.request()
            await chosen.act(scene, peer)
        finally:
            scene.closed.append(time.monotonic())

    with ScriptedUpstream(script) as upstream:
        base_url = upstream.base_url.replace("http", chosen.scheme, 1)
        with running(base_url, loop=loop, SERVER_DRAIN_SECONDS="1") as proxy:
            scenes.append(Scene(chosen, upstream, proxy))
            yield scenes[0]


# ---- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.quiet
@both_loops
@pytest.mark.parametrize("phase", [pytest.param(name, marks=fault(phase.row, 28)) for name, phase in PHASES.items()])
def test_leaving_ends_the_call(phase: str, loop: str, subtests: pytest.Subtests) -> None:
    """Clients that disconnect at once, in any way and phase, each end their upstream call, and nothing is left."""
    with playing(phase, loop) as scene:
        for way, leave in WAYS.items():
            with subtests.test(way), scene.clients_there() as clients, Noise() as noise:
                left = time.monotonic()
                for client in clients:
                    leave(client)
                scene.assert_stopped(left, noise)


@fault(27, 28)
@both_loops
@all_ways
def test_leaving_ends_a_connection_attempt(way: str, loop: str) -> None:
    """A connection attempt that the upstream does not accept ends with its client; nothing is requested or charged."""
    with (
        full_port() as port,
        running(f"http://127.0.0.1:{port}/v1", loop=loop, UPSTREAM_CONNECT_TIMEOUT="60") as proxy,
        closing(raw_chat(proxy)) as sock,
    ):
        eventually(lambda: attempts(port) == 2)
        with Noise() as noise:
            left = time.monotonic()
            WAYS[way](sock)
            eventually(lambda: attempts(port) == 1)
            assert time.monotonic() - left < BOUND + noise.seconds + 0.2
        line = proxy.line()
        assert (line["ending"], line["tokens"], line["status"]) == ("aborted", 0, 499)
        assert line["code"] is None
        assert set(proxy.tokens_used().values()) == {0}


# ---- a second request (row 41) --------------------------------------------------------------------------------------

SECOND_REQUESTS = {
    "whole": b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "its first byte": b"G",
    "with a body": b"POST /api/chat HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\nabc",
    "two of them": b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2,
    "not HTTP": b"\x16\x03\x01\x02\x00",
}


@fault(41)
@both_loops
@pytest.mark.parametrize("phase", ["before headers", "in silence", "blocked on a slow reader"])
def test_a_second_request_closes_the_connection(phase: str, loop: str, subtests: pytest.Subtests) -> None:
    """A second request while an answer is live closes the connection and ends the upstream call."""
    with playing(phase, loop) as scene:
        for name, second in SECOND_REQUESTS.items():
            with subtests.test(name), scene.clients_there(5) as clients, Noise() as noise:
                left = time.monotonic()
                for client in clients:
                    client.sendall(second)
                scene.assert_stopped(left, noise)
                assert len(scene.upstream.seen) == 5
                assert all(is_closed(client) for client in clients)


@both_loops
def test_two_requests_in_one_segment(loop: str) -> None:
    """A second request in the segment of the first closes the connection, and the upstream is never called."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, loop=loop) as proxy:
        with connect(proxy) as sock:
            sock.sendall(chat_request(proxy) * 2)
            with suppress(ConnectionResetError):
                assert sock.recv(65536) == b""
            line = proxy.line()
            assert (line["ending"], line["status"]) == ("aborted", 499)
            assert not any(proxy.tokens_used().values())
            proxy.assert_nothing_left()
        assert upstream.seen == []


@both_loops
def test_requests_one_after_the_other_share_a_connection(loop: str) -> None:
    """The guard against pipelining accepts a next request after the answer to the one before."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, loop=loop) as proxy:
        with connect(proxy) as sock:
            for count in range(1, 4):
                sock.sendall(chat_request(proxy))
                assert GOOD[-1] in read_until(sock, b"\r\n0\r\n\r\n")
                assert proxy.line(count)["ending"] == "complete"
        assert upstream.connections == 1


# ---- a client that does not read (row 29) ---------------------------------------------------------------------------


@fault(29)
@both_loops
@pytest.mark.parametrize(
    "phase",
    [
        "blocked on a slow reader",
        "in silence, with bytes left untaken",
        "in silence, with bytes left to the kernel",
        "no power, and one more event",
        "no power, and many more events",
        "no power, and no more events",
        "no power, before headers",
        "no power, before a whole answer",
    ],
)
def test_a_client_that_stops_reading_is_closed_at_the_write_deadline(
    phase: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is closed at the deadline, not earlier, however few bytes wait; bytes passed on are charged."""
    monkeypatch.setattr(listener_module, "WRITE_DEADLINE", 1.0)
    with playing(phase, loop) as scene, Noise() as noise:
        check_write_deadline(scene, noise)


def check_write_deadline(scene: Scene, noise: Noise) -> None:
    with scene.clients_there(5) as clients:
        blocked = time.monotonic()
        eventually(lambda: len(scene.closed) == 5, 4.0)
        assert min(scene.closed) > min(seen.arrived for seen in scene.upstream.seen) + 1.0
        scene.assert_stopped(blocked + 2.0, noise)
        for client in () if scene.is_dark else clients:
            assert is_closed(client)


def is_closed(sock: socket.socket) -> bool:
    """Reads to the end; fails if the peer does not close."""
    with suppress(ConnectionResetError):
        while sock.recv(65536):
            pass
    return True


def read_some(sock: socket.socket, size: int) -> None:
    while size > 0:
        data = sock.recv(65536)
        assert data, "closed"
        size -= len(data)


@pytest.mark.slow
@both_loops
def test_a_client_that_reads_slowly_is_not_closed(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write deadline applies to clients that read nothing: one that reads a little at a time is not closed."""
    monkeypatch.setattr(
        listener_module, "WRITE_DEADLINE", 3.0
    )  # many pauses long: the kernel's timer runs on while we cannot
    with playing("blocked on a slow reader", loop) as scene, scene.clients_there(1) as clients:
        until = time.monotonic() + 4.5
        while time.monotonic() < until:
            read_some(clients[0], 500_000)  # more than our buffers hold, so that they run low meanwhile
            time.sleep(0.2)
        assert scene.closed == []
        clients[0].close()
        eventually(lambda: scene.closed)
