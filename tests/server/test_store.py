"""Limits on a real Redis: several servers share their counters, and `when_store_fails` applies during an outage."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import socket
import subprocess
import threading
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from support.commands import run, settings_for
from support.faults import fault
from support.harness import (
    DONE,
    FULL,
    GOOD,
    LOOPS,
    PATIENCE,
    Peer,
    Running,
    ScriptedUpstream,
    chat,
    delta,
    eventually,
    finish,
    free_port,
    raw_chat,
    read_until,
    running,
    send,
    streaming,
)
from support.redis_server import Redis
from support.stage import always

from proxy.accounts.revocation import shared as revocations_module
from proxy.accounts.revocation.file import ControlFile
from proxy.accounts.revocation.shared import MOST_SENT, PAGE, RevokedId, SharedRevocations
from proxy.accounts.revocation.watcher import CHECK_EVERY, RevocationWatcher
from proxy.errors import Busy, TokensExhausted, TooMany
from proxy.limits import limiter as limiter_module
from proxy.limits.limiter import Limiter, Permit
from proxy.limits.requests import ChargeKind
from proxy.limits.status import Subject
from proxy.limits.store import shared as store_module
from proxy.limits.store.charges import Charge
from proxy.limits.store.opening import open_store
from proxy.limits.store.shared import SharedStore
from proxy.limits.streams import Lease
from proxy.settings import from_variables
from proxy.telemetry.logs import Logs

pytestmark = pytest.mark.redis

both_loops = pytest.mark.parametrize("loop", LOOPS)
DEADLINE = store_module.DEADLINE  # the product's own
numbers = itertools.count(1)

NO_REQUESTS = cast(ChargeKind, "a kind without windows")  # so that statuses are those of tokens only


class Link(ScriptedUpstream):
    """A TCP proxy to a store that delays each call by `delay` seconds."""

    def __init__(self, store: Redis) -> None:
        super().__init__(self.carry)
        self.to = store.port
        self.delay = 0.0
        self.stalled_until = 0.0

    def stall(self, seconds: float) -> None:
        """The store's answers wait for so long, from now on."""
        self.stalled_until = time.monotonic() + seconds

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Link:
        super().__enter__()
        return self

    async def carry(self, peer: Peer) -> None:
        """Forwards one packet after the other: a client has one call at a time on a connection."""
        answers, questions = await asyncio.open_connection("127.0.0.1", self.to)
        back = asyncio.create_task(self.carry_back(answers, peer))
        try:
            while data := await peer.reader.read(65536):
                await asyncio.sleep(self.delay)
                questions.write(data)
        finally:
            back.cancel()
            questions.close()

    async def carry_back(self, answers: asyncio.StreamReader, peer: Peer) -> None:
        with suppress(OSError):
            while data := await answers.read(65536):
                while time.monotonic() < self.stalled_until:  # noqa: ASYNC110  # set in another thread
                    await asyncio.sleep(0.005)
                peer.writer.write(data)
            peer.writer.close()


def new_address() -> dict[str, str]:
    number = next(numbers)
    return {"x-forwarded-for": f"198.20.{number >> 8}.{number & 255}"}


@contextmanager
def two_servers(
    store: Redis, loop: str = "uvloop", script: Any = None, **more: str
) -> Iterator[tuple[Running, Running]]:
    """Runs two servers that share a store."""
    with ScriptedUpstream(script or streaming(*GOOD)) as upstream:
        given = {"LIMITS_STORE": store.url, "SESSION_SECRET": "s" * 40, **more}
        with (
            running(upstream.base_url, loop=loop, **given) as one,
            running(upstream.base_url, loop=loop, **given) as other,
        ):
            yield one, other


def used(proxy: Running, address: dict[str, str]) -> dict[str, int]:
    """The used amount of each limit in GET /api/session."""
    limits = send(proxy, "GET", "/api/session", None, address).json["limits"]
    return {limit["name"]: limit["limit"] - limit["remaining"] for limit in limits}


# ---- shared counters ------------------------------------------------------------------------------------------------


@both_loops
def test_requests_are_counted_across_servers(loop: str, store: Redis) -> None:
    """Servers that share a store count requests together, and their refusal has a true Retry-After."""
    with two_servers(store, loop, LIMITS_PER_SESSION="5/hour") as servers:
        address = new_address()
        statuses = [chat(proxy, headers=address).status for proxy in (*servers, *servers, *servers, *servers)]
        assert statuses == [200] * 5 + [429] * 3
        refusal = chat(servers[1], headers=address)
        assert refusal.error["code"] == "rate_limited"
        assert 3500 < int(refusal.headers["retry-after"]) <= 3600
        assert "r=0;t=" in refusal.headers["ratelimit"]
        assert used(servers[0], address)["per_session 5/hour"] == 5
        assert chat(servers[0], headers=new_address()).status == 200


@both_loops
def test_all_windows_of_a_request_are_charged_or_none(loop: str, store: Redis) -> None:
    """A request that one window refuses is charged to no window in the store."""
    with two_servers(store, loop, LIMITS_PER_SESSION="2/hour", LIMITS_PER_ADDRESS="100/hour") as servers:
        address = new_address()
        assert [chat(proxy, headers=address).status for proxy in (*servers, *servers)] == [200, 200, 429, 429]
        assert used(servers[0], address)["per_address 100/hour"] == 2


@both_loops
def test_tokens_are_held_and_settled_across_servers(loop: str, store: Redis) -> None:
    """The largest cost of a live answer is held on both servers; at its end the real cost is booked."""
    go_on = threading.Event()

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.head()
            await peer.chunk(delta("one"))
            await asyncio.to_thread(go_on.wait, PATIENCE)
            usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":11}}\n\n'
            for part in (finish(), usage, DONE):
                await peer.chunk(part)
            await peer.end()

    with two_servers(
        store, loop, script, LIMITS_TOKENS_PER_SESSION="150/hour", POLICY_MAX_OUTPUT_TOKENS="100"
    ) as servers:
        one, other = servers
        sock = raw_chat(one)
        read_until(sock, b"one")
        refusal = chat(other)
        assert (refusal.status, refusal.error["code"]) == (429, "tokens_exhausted")
        assert 3500 < int(refusal.headers["retry-after"]) <= 3600
        go_on.set()
        read_until(sock, DONE)
        eventually(lambda: used(other, {})["tokens_per_session 150/hour"] == 18)
        assert chat(other).status == 200
        sock.close()


@both_loops
def test_live_streams_are_counted_across_servers(loop: str, store: Redis) -> None:
    """Live streams count on both servers until their clients leave."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(delta("one"))
        await peer.gone()

    with two_servers(store, loop, script, LIMITS_STREAMS_PER_SESSION="2") as (one, other):
        socks = [raw_chat(one), raw_chat(other)]
        for sock in socks:
            read_until(sock, b"one")
        refusal = chat(other)
        assert (refusal.status, refusal.error["code"]) == (429, "too_many_streams")
        for sock in socks:
            sock.close()
        with store.client() as client:
            eventually(lambda: not leases(client))
        with raw_chat(other) as sock:
            read_until(sock, b"one")


def leases(client: redis.Redis) -> list[Any]:
    """All leases and reservations in the store."""
    held: list[Any] = []
    for pattern in ("*:streams_*", "*:h"):
        for key in client.scan_iter(match=pattern):
            held += client.zrange(key, 0, -1)
    return held


def test_names_do_not_reach_the_store(store: Redis) -> None:
    """The keys in the store contain no address."""
    with two_servers(store) as servers:
        chat(servers[0], headers={"x-forwarded-for": "203.0.113.77"})
        with store.client() as client:
            keys = client.keys()
            assert all(key.startswith(b"{chat-proxy}:") for key in keys)
            assert len(keys) > 4
            assert not any(b"203.0.113" in key for key in keys)


@pytest.mark.parametrize("scheme", ["redis", "unix", "password"])
def test_store_urls(scheme: str, store: Redis) -> None:
    """The URL of the store may have a Unix socket, a password and a database number."""
    url = store.url
    if scheme == "unix":
        url = f"unix://{store.folder / 'redis.sock'}?db=1"
    if scheme == "password":
        with store.client() as client:
            client.config_set("requirepass", "s3cret")
        url = f"redis://:s3cret@127.0.0.1:{store.port}/2"
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, LIMITS_STORE=url) as proxy:
        assert chat(proxy).status == 200
        assert proxy.service.app.limits.store is not None
        assert proxy.service.app.limits.store.is_up
        assert b"s3cret" not in proxy.output.getvalue()


# ---- shared revocations ---------------------------------------------------------------------------------------------


def status_and_code(proxy: Running, cookie: str) -> tuple[int, str | None]:
    reply = chat(proxy, headers={"cookie": cookie})
    return reply.status, None if reply.status == 200 else reply.error["code"]


@contextmanager
def two_servers_with_control_files(
    store: Redis, loop: str, folder: Path, **more: str
) -> Iterator[tuple[Running, Running]]:
    """Runs two servers with one session secret and a control file each."""
    given = {"LIMITS_STORE": store.url, "SESSION_SECRET": "s" * 40, **more}
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        running(upstream.base_url, loop=loop, SESSION_CONTROL_FILE=str(folder / "a"), **given) as one,
        running(upstream.base_url, loop=loop, SESSION_CONTROL_FILE=str(folder / "b"), **given) as other,
    ):
        yield one, other


@both_loops
def test_a_logout_reaches_all_servers(loop: str, store: Redis, tmp_path: Path) -> None:
    """A logout revokes the cookie on every server; a server that starts later reads it before its first request."""
    with two_servers_with_control_files(store, loop, tmp_path) as (one, other):
        cookie = chat(one, headers={"sec-fetch-site": "same-origin"}).cookie
        assert status_and_code(other, cookie) == (200, None)
        assert send(one, "DELETE", "/api/session", None, {"cookie": cookie}).status == 200
        assert status_and_code(one, cookie) == (401, "session_required")
        eventually(lambda: status_and_code(other, cookie) == (401, "session_required"))
    with two_servers_with_control_files(store, loop, tmp_path) as (one, other):
        assert status_and_code(other, cookie) == (401, "session_required")


@both_loops
def test_a_logout_during_an_outage_arrives_after_it(
    loop: str, store: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logout during an outage of the store reaches the other servers when the store is back."""
    monkeypatch.setattr(store_module, "DEADLINE", DEADLINE)
    with two_servers_with_control_files(store, loop, tmp_path) as (one, other):
        cookie = chat(one, headers={"sec-fetch-site": "same-origin"}).cookie
        store.freeze()
        assert send(one, "DELETE", "/api/session", None, {"cookie": cookie}).status == 200
        assert status_and_code(other, cookie) == (200, None)
        eventually(lambda: one.lines("limits_unavailable"))
        store.thaw()
        eventually(lambda: status_and_code(other, cookie) == (401, "session_required"), 30.0)


@pytest.mark.process
def test_a_revocation_by_command_reaches_all_servers(store: Redis, tmp_path: Path) -> None:
    """`sessions revoke --all` revokes on all servers; without a store that answers it exits with 2."""
    with two_servers_with_control_files(store, "uvloop", tmp_path) as servers:
        cookies = [chat(proxy, headers={"sec-fetch-site": "same-origin"}).cookie for proxy in servers]
        assert revoke("--all", store=store, control=tmp_path / "elsewhere").returncode == 0
        for proxy, cookie in zip(servers, cookies, strict=True):
            eventually(lambda proxy=proxy, cookie=cookie: status_and_code(proxy, cookie)[0] == 401)  # type: ignore[misc]
        fresh = chat(servers[0], headers={"sec-fetch-site": "same-origin"}).cookie
        assert status_and_code(servers[1], fresh) == (200, None)
        store.stop()
        done = revoke("--all", store=store, control=tmp_path / "elsewhere")
        assert (done.returncode, "does not answer" in done.stderr) == (2, True)
        store.start()


def test_a_store_that_does_not_answer_delays_no_control_file(
    store: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not answer does not delay the reading of the control file."""
    monkeypatch.setattr(revocations_module, "DEADLINE", 600.0)
    control = tmp_path / "control"
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        given = {"LIMITS_STORE": store.url, "SESSION_CONTROL_FILE": str(control)}
        with running(upstream.base_url, **given) as proxy:
            cookie = chat(proxy, headers={"sec-fetch-site": "same-origin"}).cookie
            store.freeze()
            time.sleep(CHECK_EVERY + 0.1)  # a call is under way by now; its client gives up after 5 s
            ControlFile(str(control)).change(lambda rules: rules.revoking_all(time.time()))
            eventually(lambda: proxy.lines("revoked"), 10 * CHECK_EVERY)
            store.thaw()
            assert status_and_code(proxy, cookie) == (401, "session_required")


def revoke(*arguments: str, store: Redis, control: Path) -> subprocess.CompletedProcess[str]:
    given = {**settings_for("https://api.example.com/v1"), "LIMITS_STORE": store.url}
    return run(control.parent, "sessions", "revoke", *arguments, SESSION_CONTROL_FILE=str(control), **given)


# ---- outages of the store -------------------------------------------------------------------------------------------


@fault(34)
@both_loops
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_local_counting_during_an_outage(how: str, loop: str, store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 34, `local`: requests are served without delay, with one log line; used tokens are booked afterwards."""
    if how == "frozen":
        monkeypatch.setattr(store_module, "DEADLINE", DEADLINE)
    with two_servers(store, loop, LIMITS_PER_SESSION="1000/hour") as (proxy, _):
        address = new_address()
        assert chat(proxy, headers=address).status == 200
        before = proxy.line()["tokens"]
        eventually(lambda: used(proxy, address)["tokens_per_session 1000000000/day"] == before)  # no longer held
        take_down(store, how)
        for _ in range(3):
            began = time.monotonic()
            assert chat(proxy, headers=address).status == 200
            assert time.monotonic() - began < PATIENCE
        (line,) = eventually(lambda: proxy.lines("limits_unavailable"))
        assert line["policy"] == "local"
        assert b"chat_proxy_limit_store_up 0.0" in proxy.service.app.metrics.exposition()
        assert send(proxy, "GET", "/readyz").status == 200
        bring_back(store, how)
        eventually(lambda: proxy.lines("limits_available"), 20.0)
        eventually(lambda: b"chat_proxy_limit_store_up 1.0" in proxy.service.app.metrics.exposition())
        expected = 3 * before if how == "killed" else 4 * before  # a killed store has lost the first answer
        eventually(lambda: used(proxy, address)["tokens_per_session 1000000000/day"] == expected)


@fault(34)
@both_loops
def test_refusing_during_an_outage(loop: str, store: Redis) -> None:
    """Row 34, `refuse`: requests get 503 with a Retry-After until the store is back."""
    with two_servers(store, loop, LIMITS_WHEN_STORE_FAILS="refuse") as (proxy, _):
        visitor = {"cookie": send(proxy, "GET", "/api/session").cookie}
        assert send(proxy, "GET", "/api/session", headers=visitor).json["limits"]
        take_down(store, "killed")
        reply = chat(proxy)
        assert (reply.status, reply.error["code"]) == (503, "limits_unavailable")
        assert int(reply.headers["retry-after"]) >= 1
        assert send(proxy, "GET", "/api/session", headers=visitor).json["limits"] == []  # the remainder is unknown
        bring_back(store, "killed")
        eventually(lambda: chat(proxy).status == 200, 20.0)


def take_down(store: Redis, how: str) -> None:
    (store.stop if how == "killed" else store.freeze)()


def bring_back(store: Redis, how: str) -> None:
    (store.start if how == "killed" else store.thaw)()


def test_a_full_store_still_counts(store: Redis) -> None:
    """A full store refuses writes, except those of scripts with the flag allow-oom, which ours have."""
    with two_servers(store, LIMITS_PER_SESSION="2/hour") as servers:
        with store.client() as client:
            client.config_set("maxmemory", "1")
        address = new_address()
        assert [chat(proxy, headers=address).status for proxy in (*servers, *servers)] == [200, 200, 429, 429]
        assert servers[0].lines("limits_unavailable") == []


@pytest.mark.parametrize("policy", ["local", "refuse"])
@pytest.mark.parametrize("how", ["killed", "frozen", "slow", "restarted", "full"])
def test_no_request_waits_for_a_failing_store(
    how: str, policy: str, store: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Concurrent requests are answered by `when_store_fails`, in time and without a 500; live answers continue."""
    with (
        ScriptedUpstream(always(answer_briefly_or_live)) as upstream,
        Link(store) as link,
        running(upstream.base_url, LIMITS_STORE=link.url, LIMITS_WHEN_STORE_FAILS=policy) as proxy,
        ThreadPoolExecutor(17) as threads,
    ):
        eventually(lambda: chat(proxy).status == 200)
        with raw_chat(proxy, messages=[{"role": "user", "content": "live"}]) as sock:
            read_until(sock, b"data: ")
            live = threads.submit(lateness, sock)
            if how != "full":
                monkeypatch.setattr(store_module, "DEADLINE", DEADLINE)
            disturb(how, store, link)
            burst = list(threads.map(lambda _: timed(proxy), range(32)))
            late = live.result(PATIENCE)
        link.delay = 0.0
        bring_back(store, how if how in ("killed", "frozen") else "")
        expected = {"local": {200}, "refuse": {503}}[policy]
        if how == "full":
            expected = {200}
        statuses = {status for status, _ in burst}
        assert statuses <= {200, 503} if how == "restarted" else statuses == expected
        assert policy == "refuse" or 503 not in statuses
        assert max(seconds for _, seconds in burst) < 3.0
        assert late < 1.0
        assert proxy.lines("bug") == []
        eventually(lambda: chat(proxy).status == 200, 20.0)
        with store.client() as client:
            eventually(lambda: not leases(client))


@fault(26)
@both_loops
def test_a_client_that_leaves_during_a_store_call_causes_no_upstream_call(loop: str, store: Redis) -> None:
    """A client that leaves during a slow store call, or whose call ends after the drain, causes no upstream call,
    though an idle connection exists; its holds are released."""
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        Link(store) as link,
        running(upstream.base_url, loop=loop, LIMITS_STORE=link.url, SERVER_DRAIN_SECONDS="0") as proxy,
    ):
        assert chat(proxy).status == 200
        assert proxy.line()["ending"] == "complete"
        calls = len(upstream.seen)
        link.delay = DEADLINE * 0.6
        for stream in (True, False):
            sock = raw_chat(proxy, stream=stream)
            eventually(lambda: proxy.service.app.busy)
            sock.close()
            eventually(lambda: not proxy.service.app.busy)
        gone = eventually(lambda: lines if len(lines := [e for e in proxy.lines() if e["ending"]]) == 3 else [])[1:]
        assert [(line["ending"], line["tokens"]) for line in gone] == [("aborted", 0)] * 2
        assert proxy.upstream_sockets == 1
        assert len(upstream.seen) == calls
        with raw_chat(proxy) as sock:
            eventually(lambda: proxy.service.app.busy)
            proxy.on_loop(proxy.service.end)
            assert b'"code":"draining"' in read_until(sock, b"}}")
        assert len(upstream.seen) == calls


async def answer_briefly_or_live(peer: Peer) -> None:
    """Sends a short answer; to a request with `live`, an answer that contains the time in each event for a second."""
    assert peer.seen is not None
    await peer.head()
    for number in range(50 if b"live" in peer.seen.body else 0):
        await peer.chunk(delta(f"{number} {time.monotonic()}"))
        await asyncio.sleep(0.02)
    for part in GOOD:
        await peer.chunk(part)
    await peer.end()


def lateness(sock: socket.socket) -> float:
    """The largest delay of an event of a live answer, in seconds."""
    late, data = 0.0, b""
    while DONE not in data:
        data = sock.recv(65536)
        for part in data.split(b'"content":"')[1:]:
            if (written := part.partition(b'"')[0].split())[1:]:
                late = max(late, time.monotonic() - float(written[1]))
    return late


def timed(proxy: Running) -> tuple[int, float]:
    began = time.monotonic()
    return chat(proxy).status, time.monotonic() - began


def disturb(how: str, store: Redis, link: Link) -> None:
    if how == "slow":
        link.delay = 0.4
    elif how == "full":
        with store.client() as client:
            client.config_set("maxmemory", "1")
    elif how == "restarted":
        store.stop()
        store.start()
    else:
        take_down(store, how)


def test_a_probe_opens_a_connection_for_each_call(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe opens a connection for each call: on a slow network calls are in time, but opening connections is not."""
    monkeypatch.setattr(store_module, "DEADLINE", 0.5)

    async def story(url: str) -> None:
        async with limiter_on(store, LIMITS_STORE=url) as limits:
            assert limits.store is not None
            link.delay = 0.15
            limits.store.lose("test")
            for _ in range(5):  # a busy machine may be late too
                await is_up(limits, True)
                await asyncio.gather(*(limits.statuses(NO_REQUESTS, ME) for _ in range(store_module.AT_ONCE)))
                if limits.is_up:
                    return
            pytest.fail("lost each time")

    with Link(store) as link:
        asyncio.run(story(link.url))


def test_connections_are_open_before_the_first_request(store: Redis) -> None:
    """A new server opens its connections before the first request, whose calls would otherwise exceed DEADLINE."""

    async def story(link: Link) -> None:
        async with limiter_on(store, LIMITS_STORE=link.url) as limits:
            await limits.start()
            opened = link.connections
            await asyncio.gather(*(limits.charge(ChargeKind.QUESTION, ME) for _ in range(store_module.AT_ONCE)))
            assert link.connections == opened

    with Link(store) as link:
        asyncio.run(story(link))


def test_a_failover_drops_the_old_connections(store: Redis, tmp_path: Path) -> None:
    """The connections to a former master, which refuses writes and keeps them open, are not used again."""

    async def story(url: str) -> None:
        async with limiter_on(store, LIMITS_STORE=url) as limits:
            await asyncio.gather(*(limits.charge(ChargeKind.QUESTION, ME) for _ in range(8)))
            with store.client() as client:
                client.replicaof("127.0.0.1", free_port())
            await limits.charge(ChargeKind.QUESTION, ME)
            assert not limits.is_up
            link.to = other.port
            await is_up(limits, True)
            await asyncio.gather(*(limits.charge(ChargeKind.QUESTION, ME) for _ in range(8)))
            assert limits.is_up

    other = Redis(tmp_path)
    try:
        with Link(store) as link:
            asyncio.run(story(link.url))
    finally:
        other.stop()


@pytest.mark.parametrize("garbage", [b":x\r\n", b"*x\r\n", b"%1\r\n*0\r\n:1\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_invalid_replies_mark_the_store_as_unavailable(garbage: bytes, store: Redis) -> None:
    """No request gets a 500, whatever the client library does with an invalid reply."""

    class Garbled(Link):
        answer = garbage

        async def carry(self, peer: Peer) -> None:
            while self.answer and await peer.reader.read(65536):
                peer.writer.write(self.answer)
            await super().carry(peer)

    link = Garbled(store)
    with (
        link,
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        running(upstream.base_url, LIMITS_STORE=link.url) as proxy,
    ):
        assert chat(proxy).status == 200
        eventually(lambda: proxy.lines("limits_unavailable"))
        link.answer = b""
        eventually(lambda: proxy.lines("limits_available"), 20.0)
        assert proxy.lines("bug") == []


@pytest.mark.process
def test_a_full_store_still_receives_logouts(store: Redis, tmp_path: Path) -> None:
    """A full store still accepts logouts and revocations."""
    with two_servers_with_control_files(store, "uvloop", tmp_path) as servers, store.client() as client:
        cookies = [chat(proxy, headers={"sec-fetch-site": "same-origin"}).cookie for proxy in servers]
        client.config_set("maxmemory", "1")
        assert send(servers[0], "DELETE", "/api/session", None, {"cookie": cookies[0]}).status == 200
        eventually(lambda: status_and_code(servers[1], cookies[0]) == (401, "session_required"))
        assert revoke("--all", store=store, control=tmp_path / "elsewhere").returncode == 0
        eventually(lambda: status_and_code(servers[0], cookies[1])[0] == 401)


@fault(34)
@both_loops
def test_a_flushed_store_counts_from_zero(loop: str, store: Redis) -> None:
    """A flushed store counts from zero, and no request fails."""
    with two_servers(store, loop, LIMITS_PER_SESSION="1/hour") as (proxy, _):
        address = new_address()
        assert [chat(proxy, headers=address).status for _ in range(2)] == [200, 429]
        with store.client() as client:
            client.flushall()
            client.script_flush()
        assert [chat(proxy, headers=address).status for _ in range(2)] == [200, 429]


@pytest.mark.quiet
@both_loops
def test_no_live_stream_waits_for_the_store(loop: str, store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are forwarded without delay while the store is frozen; the stream's holds are settled afterwards."""
    monkeypatch.setattr(store_module, "DEADLINE", DEADLINE)
    monkeypatch.setattr(limiter_module, "RENEW_EVERY", 0.05)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        for number in range(40):
            await peer.chunk(delta(f"{number} {time.monotonic()}"))
            await asyncio.sleep(0.02)
        for part in (finish(), DONE):
            await peer.chunk(part)
        await peer.end()

    with two_servers(store, loop, script) as (proxy, _), raw_chat(proxy) as sock:
        read_until(sock, b"data: ")
        store.freeze()
        late = lateness(sock)
        store.thaw()
        assert late < 1.0
        eventually(lambda: proxy.lines("limits_available"), 20.0)
        with store.client() as client:
            eventually(lambda: not leases(client), 40.0)


@both_loops
def test_a_busy_machine_does_not_extend_the_deadline(loop: str, store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline that passes while the call is being sent still ends the call."""
    monkeypatch.setattr(store_module, "DEADLINE", DEADLINE)

    async def story() -> float:
        counter = open_store(store.url, time.monotonic, lambda reason: None)
        charge = Charge("moving", "per_session", "s", 1, 9, 9)
        while await counter.take([charge]) is None:  # noqa: ASYNC110  # a busy machine may take a few
            await asyncio.sleep(0.1)
        store.freeze()
        asking = asyncio.create_task(counter.take([charge]))
        await asyncio.sleep(0)  # the call begins
        time.sleep(store_module.DEADLINE + 0.1)  # noqa: ASYNC251  # the CPU is taken by other processes
        began = time.monotonic()
        assert await asking is None
        took = time.monotonic() - began
        await counter.aclose()
        return took

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        assert runner.run(story()) < 1.5


@asynccontextmanager
async def opened(url: str, lost: list[str | None]) -> AsyncIterator[SharedStore]:
    """A store with its connections; `lost` receives what it reports."""
    counter = open_store(url, time.monotonic, lost.append)
    await counter.open()
    try:
        yield counter
    finally:
        await counter.aclose()  # or a call that its client goes on with would keep the loop from ending


@both_loops
def test_a_loop_that_is_held_up_loses_no_store(loop: str, store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """While our own loop is busy, the answers of a healthy store wait to be read: it is not taken for lost."""
    monkeypatch.setattr(store_module, "DEADLINE", DEADLINE)

    async def story() -> None:
        lost: list[str | None] = []
        async with opened(store.url, lost) as counter:
            charges = [Charge("moving", "per_session", "s", 1, 99, 9)]
            asking = [asyncio.create_task(counter.take(charges)) for _ in range(8)]
            for _ in range(8):
                await asyncio.sleep(0)
                time.sleep(DEADLINE * 0.7)  # noqa: ASYNC251  # a long body is decoded
            assert None not in await asyncio.gather(*asking)
            assert lost == []

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(story())


def test_a_missed_call_is_made_once_more(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer that is late is no outage, and what it booked is not booked twice; two in a row are one."""
    monkeypatch.setattr(store_module, "DEADLINE", 0.5)

    async def story(link: Link) -> None:
        lost: list[str | None] = []
        async with opened(link.url, lost) as counter:
            charges = [
                Charge("moving", "per_session", "s", 1, 1, 99),
                Charge("fixed", "tokens_total", "s", 10, 10, 99),
                Charge("held", "streams_per_session", "s", 1, 1),
            ]
            link.stall(0.7)
            result = await counter.take(charges, "one holder")
            assert result is not None
            assert result.booked, "its own first call does not count against it"
            assert lost == []
            another = await counter.take(charges, "another")
            assert another is not None
            assert [state.used for state in another.counters] == [1, 10, 1]
            link.stall(30.0)
            assert await counter.take(charges, "a third") is None
            assert lost == ["TimeoutError"]
            link.stall(0.0)

    with Link(store) as link:
        asyncio.run(story(link))


def test_the_holds_of_a_dead_worker_expire(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream and the tokens of a dead worker are free again after HELD_SECONDS."""
    monkeypatch.setattr(store_module, "HELD_SECONDS", 3)

    async def story() -> None:
        async with limiter_on(store, LIMITS_STREAMS_PER_SESSION="1", LIMITS_TOKENS_PER_SESSION="100/hour") as dead:
            await dead.hold(Subject("s", "a"), 90)  # never ended
        async with limiter_on(store, LIMITS_STREAMS_PER_SESSION="1", LIMITS_TOKENS_PER_SESSION="100/hour") as alive:
            with pytest.raises(TokensExhausted):
                await alive.hold(Subject("s", "a"), 90)
            await asyncio.sleep(3.1)
            async with await alive.hold(Subject("s", "a"), 90) as permit:
                permit.settle(5)
            statuses = await alive.statuses(NO_REQUESTS, Subject("s", "a"))
            assert [(s.name, s.limit - s.remaining) for s in statuses if s.name == "tokens_per_session"] == [
                ("tokens_per_session", 5)
            ]

    asyncio.run(story())


def test_the_spent_tokens_of_a_dead_worker_are_charged(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store charges the prompt of an expired hold, and the tokens answered until its last renewal. A late renewal
    or settling replaces that charge: the tokens count once."""
    monkeypatch.setattr(store_module, "HELD_SECONDS", 1)
    given = {"LIMITS_TOKENS_PER_SESSION": "1000/hour", "LIMITS_TOKENS_PER_ADDRESS": ""}

    async def used(limits: Limiter) -> int:
        statuses = await limits.statuses(NO_REQUESTS, ME)
        return next(each.limit - each.remaining for each in statuses if each.name == "tokens_per_session")

    async def story() -> None:
        async with limiter_on(store, **given) as dead, limiter_on(store, **given) as alive:
            spent = 10
            silent = await dead.hold(ME, 100, lambda: 7)
            await dead.hold(ME, 100, lambda: spent)
            late = await dead.hold(ME, 100, lambda: spent)
            spent = 25
            del dead.permits[silent.holder]  # it is no longer renewed
            await dead.renew_all()
            assert await used(alive) == 300
            await asyncio.sleep(1.1)
            assert await used(alive) == 7 + 25 + 25
            await dead.renew_all()
            assert await used(alive) == 7 + 100 + 100
            await asyncio.sleep(1.1)
            assert await used(alive) == 7 + 25 + 25
            async with late:
                late.settle(40)
            assert await used(alive) == 7 + 25 + 40

    asyncio.run(story())


class limiter_on:  # noqa: N801  # used as a context
    """A Limiter on a store, without a server."""

    def __init__(self, store: Redis, **limits: str) -> None:
        given = {
            "UPSTREAM_BASE_URL": "http://127.0.0.1/v1",
            "UPSTREAM_API_KEY": "k" * 30,
            "POLICY_MODELS": "m",
            "LIMITS_STORE": store.url,
            "LIMITS_STREAMS_PER_ADDRESS": "1000",
            **limits,
        }
        self.limits = from_variables({f"CHAT_PROXY_{name}": value for name, value in given.items()}).limits

    async def __aenter__(self) -> Limiter:
        self.bugs: list[BaseException] = []
        self.limiter = Limiter(self.limits, 1000, time.monotonic, lambda reason: None, self.bugs.append)
        return self.limiter

    async def __aexit__(self, *exception: object) -> None:
        await self.limiter.aclose()
        assert self.bugs == []


# ---- the scripts themselves -----------------------------------------------------------------------------------------


def test_no_window_exceeds_its_limit(store: Redis) -> None:
    """With many concurrent charges of one counter, no window of its length holds more than the limit."""
    limit, seconds, hits = 40, 1, 20000 if FULL else 4000
    granted: list[tuple[float, float]] = []

    async def hit(counter: SharedStore, count: int) -> None:
        charge = Charge("moving", "per_session", "s", 1, limit, seconds)
        for _ in range(count):
            asked = time.monotonic()
            result = await counter.take([charge])
            assert result is not None
            if result.booked:
                granted.append((asked, time.monotonic()))
            await asyncio.sleep(random.random() * 0.02)

    async def all_hit() -> None:
        counter = open_store(store.url, time.monotonic, print)
        await asyncio.gather(*(hit(counter, hits // 20) for _ in range(20)))
        await counter.aclose()

    asyncio.run(asyncio.wait_for(all_hit(), 120))
    ends = sorted(answered for _, answered in granted)
    for asked, _ in granted:  # certainly booked within [asked, asked + seconds)
        inside = [answered for begun, answered in granted if begun >= asked]
        assert bisect_right(sorted(inside), asked + seconds - 0.001) <= limit
    assert len(ends) >= limit


def test_a_burst_never_overdraws(store: Redis) -> None:
    """200 concurrent holds do not exceed the limit; afterwards exactly the used tokens are booked."""

    async def burst() -> tuple[int, int]:
        async with limiter_on(
            store, LIMITS_TOKENS_PER_SESSION="1000/hour", LIMITS_STREAMS_PER_SESSION="1000"
        ) as limits:
            asked = (limits.hold(Subject("s", "a"), 90) for _ in range(200))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            admitted = [answer for answer in answers if isinstance(answer, Permit)]
            assert sum(isinstance(answer, TokensExhausted) for answer in answers) == 200 - len(admitted)
            for permit in admitted:
                async with permit:
                    permit.settle(7)
            statuses = await limits.statuses(NO_REQUESTS, Subject("s", "a"))
            return len(admitted), next(s.limit - s.remaining for s in statuses if s.name == "tokens_per_session")

    admitted, booked = asyncio.run(burst())
    assert (admitted, booked) == (11, 77)
    with store.client() as client:
        assert leases(client) == []


# ---- changes of the settings -----------------------------------------------------------------------------------------


def test_a_changed_limit_keeps_the_count(store: Redis) -> None:
    """Two servers with different limits, as during a rollout, share the count. The Retry-After of the stricter server
    is true, though the other server has accepted more requests than the stricter limit."""

    async def story() -> None:
        many = {"LIMITS_PER_SESSION": "6/minute", "LIMITS_TOKENS_TOTAL": "9000/hour"}
        few = {"LIMITS_PER_SESSION": "2/minute", "LIMITS_TOKENS_TOTAL": "5000/hour"}
        async with limiter_on(store, **many) as loose, limiter_on(store, **few) as strict:
            for _ in range(4):
                await loose.charge(ChargeKind.QUESTION, ME)
                await asyncio.sleep(0.05)  # otherwise all entries leave at one time
            async with await loose.hold(ME, 4000) as permit:
                permit.settle(4000)
            with pytest.raises(TooMany) as refused:
                await strict.charge(ChargeKind.QUESTION, ME)
            with pytest.raises(TokensExhausted):
                await strict.hold(ME, 1001)
            assert (await loose.charge(ChargeKind.QUESTION, ME))[0].remaining == 1
            with store.client() as client:
                (key,) = client.keys("*:per_session:*")
                made = [made for _, made in client.zrange(key, 0, 3, withscores=True)]  # ms of the store's clock
                seconds, microseconds = client.time()
            assert refused.value.retry_after is not None
            then = (seconds + refused.value.retry_after) * 1000 + microseconds / 1000
            assert sum(then < entry + 60_000 for entry in made) < 2

    asyncio.run(story())


# ---- outages and the counts -----------------------------------------------------------------------------------------

ME = Subject("s", "a")


async def booked(limits: Limiter) -> int:
    """The used tokens of the session, held ones included."""
    statuses = await limits.statuses(NO_REQUESTS, ME)
    return next(each.limit - each.remaining for each in statuses if each.name == "tokens_per_session")


async def is_up(limits: Limiter, wanted: bool) -> None:
    deadline = time.monotonic() + 30
    while limits.is_up != wanted:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def lose_store(store: Redis, limits: Limiter) -> None:
    store.stop()
    await limits.statuses(NO_REQUESTS, ME)
    await is_up(limits, False)


async def restore_store(store: Redis, limits: Limiter) -> None:
    await asyncio.to_thread(store.start)
    await is_up(limits, True)
    assert limits.store is not None
    assert limits.store._probing is not None
    await limits.store._probing  # ends when the store has received what it missed


def test_an_answer_that_outlives_an_outage(store: Redis) -> None:
    """Answers that begin or end before, during and after an outage are each booked once, with their used tokens."""

    async def story() -> None:
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="10000/hour", LIMITS_STREAMS_PER_SESSION="9") as limits:
            before = [await limits.hold(ME, 1000) for _ in range(2)]
            assert await booked(limits) == 2000
            await lose_store(store, limits)
            within = [await limits.hold(ME, 1000) for _ in range(2)]
            for permit in (before[0], within[0]):
                async with permit:
                    permit.settle(70)
            await restore_store(store, limits)
            assert (
                await booked(limits) == 2 * 70 + 2 * 1000
            )  # live answers are held again in a store that lost its content
            for permit in (before[1], within[1]):
                async with permit:
                    permit.settle(7)
            assert await booked(limits) == 2 * 70 + 2 * 7
            with store.client() as client:
                assert leases(client) == []

    asyncio.run(story())


def test_a_charge_whose_answer_was_lost_is_released(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen store receives the call and books it when it is thawed. The call was then already counted locally, or
    refused, so the hold in the store is released when the store is back."""

    async def story(**limits: str) -> None:
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="10000/hour", **limits) as limits_:
            assert await booked(limits_) == 0
            store.freeze()
            with monkeypatch.context() as hurried:
                hurried.setattr(store_module, "DEADLINE", DEADLINE)
                answers = [limits_.hold(ME, 1000) for _ in range(3)]
                answered = await asyncio.gather(*answers, return_exceptions=True)
            used = 0
            for permit in answered:
                if isinstance(permit, Permit):
                    async with permit:
                        permit.settle(7)
                        used += 7
            assert used == 0 if limits else used == 21
            store.thaw()
            await is_up(limits_, True)
            with store.client() as client:
                await asyncio.to_thread(eventually, lambda: not limits_.unsettled)
                assert leases(client) == []
            assert await booked(limits_) == used

    asyncio.run(story())
    with store.client() as client:
        client.flushall()
    asyncio.run(story(LIMITS_WHEN_STORE_FAILS="refuse"))


def test_an_outage_grants_no_limit_anew(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store does not answer, limits begin with what it last answered; when it is back it has all that was
    counted meanwhile. However often it is lost, a window grants its limit once."""

    async def story() -> None:
        given = {"LIMITS_PER_SESSION": "6/hour", "LIMITS_TOKENS_PER_SESSION": "", "LIMITS_TOKENS_TOTAL": "1000/day"}
        async with limiter_on(store, **given) as limits:
            assert limits.store is not None

            async def outage(until: Callable[[], Awaitable[None]]) -> None:
                assert limits.store is not None
                store.freeze()
                with monkeypatch.context() as hurried:
                    hurried.setattr(store_module, "DEADLINE", DEADLINE)
                    assert await limits.statuses(NO_REQUESTS, ME)
                await is_up(limits, False)
                await until()
                store.thaw()
                await is_up(limits, True)
                assert limits.store._probing is not None
                await limits.store._probing

            async def spend(requests: int, tokens: int) -> None:
                for _ in range(requests):
                    await limits.charge(ChargeKind.QUESTION, ME)
                async with await limits.hold(ME, 400) as permit:
                    permit.settle(tokens)

            async def nothing_more() -> None:
                with pytest.raises(TooMany):
                    await limits.charge(ChargeKind.QUESTION, ME)
                with pytest.raises(TokensExhausted):
                    await limits.hold(ME, 101)
                async with await limits.hold(ME, 100):
                    pass

            await spend(2, 300)
            await outage(lambda: spend(2, 200))
            await spend(1, 300)
            await outage(lambda: spend_last(limits))
            await outage(nothing_more)  # lost again before it answered a charge
            await nothing_more()
            await outage(nothing_more)
            await nothing_more()

    asyncio.run(story())


async def spend_last(limits: Limiter) -> None:
    """The last request and the last tokens but 100 of a limit of 1000, of which 800 are used."""
    await limits.charge(ChargeKind.QUESTION, ME)
    with pytest.raises(TooMany):
        await limits.charge(ChargeKind.QUESTION, ME)
    with pytest.raises(TokensExhausted):
        await limits.hold(ME, 201)
    async with await limits.hold(ME, 200) as permit:
        permit.settle(100)


def test_a_clock_that_goes_back_locks_no_client_out(store: Redis) -> None:
    """When the store's clock goes back by an hour, its entries lie in the future. They count for their window from now
    on: no client waits that hour, and none gets an extra window."""
    given = {
        "LIMITS_PER_SESSION": "1/minute",
        "LIMITS_TOKENS_PER_SESSION": "100/minute",
        "LIMITS_TOKENS_PER_ADDRESS": "",
    }

    async def story() -> None:
        async with limiter_on(store, **given) as limits:
            await limits.charge(ChargeKind.QUESTION, ME)
            async with await limits.hold(ME, 90) as permit:
                permit.settle(90)
            with store.client() as client:
                for key in client.keys("*:per_session:*"):
                    client.zadd(
                        key, {member: score + 3600_000 for member, score in client.zrange(key, 0, -1, withscores=True)}
                    )
                for key in client.keys("*:tokens_per_session:*"):
                    client.hincrby(key, "ends", 3600_000)
            with pytest.raises(TooMany) as requests:
                await limits.charge(ChargeKind.QUESTION, ME)
            with pytest.raises(TokensExhausted) as tokens:
                await limits.hold(ME, 90)
            assert 0 < (requests.value.retry_after or 0) <= 60
            assert 0 < (tokens.value.retry_after or 0) <= 60

    asyncio.run(story())


def test_a_charge_that_arrives_after_its_settling_books_nothing(store: Redis) -> None:
    """A call that the network delayed until its holder was counted locally and settled books nothing."""

    async def story() -> None:
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="10000/hour") as limits:
            assert limits.store is not None
            charges = [*limits.tokens.charges(ME, 1000), *limits.leases.charges(ME)]
            assert await limits.store.add([(charge, 0) for charge in charges], "holder")
            await limits.store.take(charges, "holder", 300)
            with store.client() as client:
                assert leases(client) == []
            assert await booked(limits) == 0

    asyncio.run(story())


def test_a_charge_without_a_local_place_is_released(store: Redis) -> None:
    """The store has booked a hold that the process then refuses, and fails before the release: it is released later."""

    async def story() -> None:
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="10000/hour") as limits:
            assert limits.store is not None
            store_, limits.leases.max_streams = limits.store, 0
            acquire = limits.leases.acquire

            def lost_meanwhile(subject: Subject) -> Lease:
                store_.lose("test")
                return acquire(subject)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(limits.leases, "acquire", lost_meanwhile)
                with pytest.raises(Busy):
                    await limits.hold(ME, 1000, lambda: 300)
            await is_up(limits, True)
            with store.client() as client:
                await asyncio.to_thread(eventually, lambda: leases(client) == [])
            assert await booked(limits) == 0

    asyncio.run(story())


def test_many_answers_are_renewed_in_time_on_a_slow_store(store: Redis) -> None:
    """Holds are renewed concurrently: a thousand renewals of 30 ms, one by one, would take as long as a hold lasts."""

    async def story(url: str) -> float:
        async with limiter_on(
            store,
            LIMITS_STORE=url,
            LIMITS_TOKENS_PER_SESSION="1000000/hour",
            LIMITS_STREAMS_PER_SESSION="1000",
        ) as limits:
            permits = await asyncio.gather(*(limits.hold(ME, 10) for _ in range(100)))
            began = time.monotonic()
            link.delay = 0.03
            await limits.renew_all()
            took = time.monotonic() - began
            link.delay = 0.0
            for permit in permits:
                async with permit:
                    pass
            assert limits.is_up
            return took

    with Link(store) as link:
        assert asyncio.run(story(link.url)) < 100 * 0.03 * 0.8  # one by one takes at least 100 * 0.03 s


def test_a_window_that_ends_while_an_answer_is_written(store: Redis) -> None:
    """The tokens of an ended window no longer count; the next one begins with neither a debt nor a credit."""

    async def story() -> None:
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="1000/2 second") as limits:
            early = await limits.hold(ME, 900)
            await asyncio.sleep(2.1)
            async with await limits.hold(ME, 10) as permit:
                permit.settle(10)
            async with early:
                early.settle(3)
            assert 10 <= await booked(limits) <= 13
            await lose_store(store, limits)
            late = await limits.hold(ME, 900)
            await restore_store(store, limits)
            await asyncio.sleep(2.1)
            async with late:
                late.settle(3)
            assert 0 <= await booked(limits) <= 3

    asyncio.run(story())


def test_a_second_outage_during_a_merge_loses_nothing(store: Redis) -> None:
    """Amounts that the store did not receive are sent with the next merge, and booked once."""

    async def story() -> None:
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="10000/hour") as limits:
            await lose_store(store, limits)
            async with await limits.hold(ME, 1000) as permit:
                permit.settle(50)
            limits.unsettled["again"] = limits.tokens.used()
            limits.tokens.forget()
            assert limits.store is not None
            await limits.merge()  # the store is still down: nothing may be forgotten
            assert len(limits.unsettled) == 1
            await restore_store(store, limits)
            assert await booked(limits) == 50
            limits.unsettled["again"] = [(limits.tokens.charges(ME, 0)[0], 50)]  # as if the answer had been lost
            await limits.merge()
            assert await booked(limits) == 50

    asyncio.run(story())


def test_a_closing_server_sends_what_was_used(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that closes sends its used tokens, even if the store is back and no probe has noticed it yet."""
    monkeypatch.setattr(store_module, "FIRST_PROBE", 600.0)

    async def story() -> None:
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="10000/hour") as limits:
            await lose_store(store, limits)
            async with await limits.hold(ME, 1000) as permit:
                permit.settle(50)
            await asyncio.to_thread(store.start)
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="10000/hour") as limits:
            assert await booked(limits) == 50

    asyncio.run(story())


def test_a_large_merge_is_sent_in_parts(store: Redis) -> None:
    """The used tokens of thousands of clients are sent in several calls: a single one would block the store for all
    servers and exceed its own deadline each time."""
    many = 1000

    async def story() -> None:
        async with limiter_on(store, LIMITS_TOKENS_TOTAL="1000000/day") as limits:
            await lose_store(store, limits)
            for number in range(many):
                async with await limits.hold(Subject(f"s{number}", f"a{number}"), 10) as permit:
                    permit.settle(7)
            await asyncio.to_thread(store.start)
            with store.client() as client:
                client.config_set("slowlog-log-slower-than", 0)
                client.config_set("slowlog-max-len", 100000)
                await is_up(limits, True)
                await asyncio.to_thread(eventually, lambda: not limits.unsettled)
                longest = max(length_of(entry["command"]) for entry in client.slowlog_get(100000))
                assert longest < 1000
            statuses = await limits.statuses(NO_REQUESTS, Subject("s5", "a5"))
            assert {each.limit - each.remaining for each in statuses} == {7}

    asyncio.run(story())


def length_of(command: bytes) -> int:
    """The number of arguments of a command, of which the slow log shows the first 32."""
    more = re.search(rb"\((\d+) more arguments\)$", command)
    return len(command.split()) + (int(more[1]) if more else 0)


def test_a_permit_of_a_failed_merge_is_sent_with_the_next(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permit that begins during a failed merge is booked with its used tokens, not with its largest cost."""

    async def story() -> None:
        async with limiter_on(store, LIMITS_TOKENS_PER_SESSION="10000/hour") as limits:
            await lose_store(store, limits)
            begun: list[Permit] = []

            async def gone_again() -> None:
                begun.append(await limits.hold(ME, 1000))

            with monkeypatch.context() as patch:
                patch.setattr(limits, "renew_all", gone_again)
                await limits.merge()
            async with begun[0] as permit:
                permit.settle(7)
            await restore_store(store, limits)
            assert await booked(limits) == 7

    asyncio.run(story())


def test_a_renewal_does_not_revive_an_ended_permit(store: Redis) -> None:
    """Permits that end during renewals leave no lease and no reservation in the store."""

    async def story() -> None:
        async with limiter_on(
            store, LIMITS_STREAMS_PER_SESSION="1000", LIMITS_TOKENS_PER_SESSION="1000000/hour"
        ) as limits:
            permits = [await limits.hold(ME, 10) for _ in range(100)]

            async def end(permit: Permit) -> None:
                async with permit:
                    permit.settle(1)

            await asyncio.gather(limits.renew_all(), *(end(permit) for permit in permits), limits.renew_all())
            assert await booked(limits) == 100
            with store.client() as client:
                assert leases(client) == []

    asyncio.run(story())


def test_repeated_outages_grant_nothing_extra(store: Redis) -> None:
    """Requests that were counted locally still count in the next outage."""

    async def story() -> list[str]:
        async with limiter_on(store, LIMITS_PER_SESSION="3/hour", LIMITS_PER_ADDRESS="") as limits:
            answers = []
            for _ in range(3):
                await lose_store(store, limits)
                for _ in range(2):
                    try:
                        await limits.charge(ChargeKind.QUESTION, ME)
                        answers.append("granted")
                    except TooMany:
                        answers.append("refused")
                await restore_store(store, limits)
            return answers

    assert asyncio.run(story()).count("granted") == 3


def test_an_entry_of_another_version_harms_no_client(store: Redis, tmp_path: Path) -> None:
    """Invalid revocations in the store are ignored; valid ones still apply."""
    with two_servers_with_control_files(store, "uvloop", tmp_path) as (one, other):
        cookie = chat(one, headers={"sec-fetch-site": "same-origin"}).cookie
        with store.client() as client:
            client.zadd("{chat-proxy}:revoked", {"{}": time.time() * 1000, "[1,2]": time.time() * 1000})
            client.set("{chat-proxy}:decree", b'{"generation":1,"more":[1]}')
            time.sleep(1.0)
            client.set("{chat-proxy}:decree", b"no decree")
        assert send(one, "DELETE", "/api/session", None, {"cookie": cookie}).status == 200
        eventually(lambda: status_and_code(other, cookie) == (401, "session_required"))
        assert one.lines("bug") == other.lines("bug") == []


def test_all_revocations_are_sent_at_shutdown(store: Redis) -> None:
    """At shutdown all unsent revocations are sent, in several calls if needed, without waiting for a lost store."""

    async def story() -> None:
        async with limiter_on(store) as limits:
            assert limits.store is not None
            revocations = SharedRevocations(limits.store, 3600)
            many = 2 * MOST_SENT + 1
            for number in range(many):
                revocations.post(RevokedId(f"id{number}", 1, 2))
            await revocations.send_rest()
            assert not revocations.unsent
            with store.client() as client:
                assert client.zcard("{chat-proxy}:revoked") == many
            store.stop()
            revocations.post(RevokedId("late", 1, 2))
            await revocations.send_rest()
            assert len(revocations.unsent) == 1

    asyncio.run(story())


@pytest.mark.parametrize("apart", [1, 0])
def test_a_new_worker_reads_all_logouts_at_once(apart: int, store: Redis, tmp_path: Path) -> None:
    """A new worker reads every logout before it serves, not one page with each poll; this includes more than a page
    posted in the same millisecond, as after the thaw of a frozen store."""
    now = int(time.time())
    with store.client() as client:
        entries = {
            f'["id{number}",{now},{now + 60}]': now * 1000 - 5000 + number * apart for number in range(2 * PAGE + 1)
        }
        client.zadd("{chat-proxy}:revoked", entries)

    async def story() -> None:
        given = {**settings_for("http://127.0.0.1:1"), "SESSION_CONTROL_FILE": str(tmp_path / "none")}
        configured = from_variables({f"CHAT_PROXY_{name}": value for name, value in given.items()})
        async with limiter_on(store) as limits:
            revoked = RevocationWatcher(configured.session, limits.store, Logs(configured.log), time.time)
            assert revoked.shared is not None
            async with asyncio.timeout(PATIENCE):
                await revoked.read_shared()
            assert {revoked.known.until(f"id{number}") for number in range(2 * PAGE + 1)} == {now}

    asyncio.run(story())


def test_sessions_of_programs_post_no_revocations(store: Redis, tmp_path: Path) -> None:
    """A logout of the session that the programs of an address share is not sent to other servers: any program could
    repeat it without end."""
    with two_servers_with_control_files(store, "uvloop", tmp_path) as (one, _), store.client() as client:
        for _ in range(5):
            cookie = chat(one).cookie
            assert send(one, "DELETE", "/api/session", None, {"cookie": cookie}).status == 200
        time.sleep(1.0)
        assert client.zcard("{chat-proxy}:revoked") == 0


@pytest.mark.process
def test_check_tries_the_store(store: Redis, tmp_path: Path) -> None:
    """`check` reports whether the store answers."""

    async def models(peer: Peer) -> None:
        await peer.request()
        await peer.whole(b'{"data":[]}')

    with ScriptedUpstream(models) as upstream:
        done = run(tmp_path, "check", **settings_for(upstream.base_url), LIMITS_STORE=store.url)
        assert (done.returncode, "ok       limits.store" in done.stdout) == (0, True)
        store.stop()
        done = run(tmp_path, "check", **settings_for(upstream.base_url), LIMITS_STORE=store.url)
        assert (done.returncode, "fault    limits.store: no answer within 0.1 s" in done.stdout) == (1, True)


# ---- a store in a file ----------------------------------------------------------------------------------------------


@both_loops
def test_servers_on_one_file_share_their_limits_and_logouts(loop: str, tmp_path: Path) -> None:
    """Two servers of one machine count as one, and a restart keeps what was used and the logouts."""
    given = {
        "LIMITS_STORE": f"sqlite://{tmp_path}/chat.db",
        "SESSION_SECRET": "s" * 40,
        "LIMITS_PER_SESSION": "4/hour",
        "LIMITS_TOKENS_TOTAL": "100000/day",
    }
    browser = {"sec-fetch-site": "same-origin"}
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        with (
            running(upstream.base_url, loop=loop, **given) as one,
            running(upstream.base_url, loop=loop, **given) as two,
        ):
            cookie = chat(one, headers=browser).cookie
            other = chat(one, headers=browser).cookie
            mine = {"cookie": cookie}
            assert [chat(proxy, headers=mine).status for proxy in (two, one, two, one)] == [200, 200, 200, 429]
            assert send(one, "DELETE", "/api/session", None, {"cookie": other}).status == 200
            eventually(lambda: status_and_code(two, other) == (401, "session_required"))
            spent = sum(
                line["tokens"] for line in one.lines() + two.lines() if line["status"] == 200 and "tokens" in line
            )
            assert one.lines("limits_unavailable") == two.lines("limits_unavailable") == []
        with running(upstream.base_url, loop=loop, **given) as three:
            assert status_and_code(three, other) == (401, "session_required")
            assert chat(three, headers=mine).status == 429
            held = three.service.app.limits.tokens.charges(Subject("s", "a"), 0)[-1]
            asked = three.service.app.limits.store
            assert asked is not None
            result = asyncio.run_coroutine_threadsafe(asked.take([held]), three.loop).result(PATIENCE)
            assert result is not None
            assert (held.name, result.counters[0].used) == ("tokens_total", spent)


@pytest.mark.process
def test_check_and_revoke_know_a_file(tmp_path: Path) -> None:
    """`check` and `sessions revoke` use the file of the servers; one that is damaged is a fault."""

    async def models(peer: Peer) -> None:
        await peer.request()
        await peer.whole(b'{"data":[]}')

    with ScriptedUpstream(models) as upstream:
        given = {**settings_for(upstream.base_url), "LIMITS_STORE": f"sqlite://{tmp_path}/chat.db"}
        done = run(tmp_path, "check", **given)
        assert (done.returncode, "ok       limits.store: it answers" in done.stdout) == (0, True)
        done = run(tmp_path, "sessions", "revoke", "--all", **given)
        assert (done.returncode, "Servers that share limits.store apply it as well." in done.stdout) == (0, True)
        (tmp_path / "chat.db").write_bytes(b"something else" * 400)
        done = run(tmp_path, "check", **given)
        assert (done.returncode, "fault    limits.store: is damaged or no store" in done.stdout) == (1, True)


@pytest.mark.quiet
@pytest.mark.parametrize("where", ["Redis", "a file"])
def test_heavy_bodies_push_no_store_away(
    where: str, store: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies made to hold the event loop cost no client its answer, and no limit is granted anew."""
    monkeypatch.setattr(store_module, "DEADLINE", DEADLINE)
    rounds, limit = 20, 15
    heavy = b'{"messages":[' + b"{}," * ((1 << 20) // 3 - 10) + b"{}]}"
    given = {
        "LIMITS_STORE": {"Redis": store.url, "a file": f"sqlite://{tmp_path}/chat.db"}[where],
        "LIMITS_PER_SESSION": f"{limit}/hour",
    }
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        running(upstream.base_url, **given) as proxy,
        ThreadPoolExecutor(8) as threads,
    ):

        def attack(_: int) -> int:
            return send(proxy, "POST", "/api/chat", heavy, {"content-type": "application/json", **new_address()}).status

        visitor, statuses = new_address(), []
        for _ in range(rounds):
            attacks = threads.map(attack, range(8))
            statuses.append(chat(proxy, headers=visitor).status)
            assert set(attacks) == {400}
        assert statuses == [200] * limit + [429] * (rounds - limit)
        assert proxy.lines("limits_unavailable") == []
