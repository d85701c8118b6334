"""Several workers on one listener: the death of one affects no other, and replacing all of them cuts no stream."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.commands import HELLO, Process, begun, exchange, run, serving, settings_for, started
from support.faults import fault
from support.harness import (
    FULL,
    GOOD,
    LOOPS,
    PATIENCE,
    STARTING,
    Peer,
    ScriptedUpstream,
    delta,
    eventually,
    free_port,
    streaming,
)
from support.redis_server import Redis
from support.stage import Steps

from proxy.limits.store.redis import PREFIX
from proxy.server.workers import PAUSE
from proxy.telemetry.metrics import Family, Total, added_up, lasting
from server.test_metrics import series

pytestmark = [pytest.mark.process, pytest.mark.redis]

PACE = 0.01  # seconds between two questions of those who ask again and again
HELD = 3  # seconds that a dead worker's leases stay, in place of 30
# The deadline of the store is long: it is there, and only this machine may be busy.
START = """
import sys
from proxy.cli import main as cli
from proxy.cli import serve
from proxy.limits import limiter
from proxy.limits.store import shared
shared.HELD_SECONDS, limiter.RENEW_EVERY = {held}, {held} / 3
shared.DEADLINE = {deadline}
if "{loop}" == "asyncio":
    import asyncio
    serve.uvloop = asyncio
raise SystemExit(cli.main())
"""
WIDE = {
    "LIMITS_PER_SESSION": "",
    "LIMITS_PER_ADDRESS": "",
    "LIMITS_NEW_SESSIONS": "",
    "LIMITS_STREAMS_PER_SESSION": "5000",
    "LIMITS_STREAMS_PER_ADDRESS": "5000",
    "LIMITS_TOKENS_PER_SESSION": "",
    "LIMITS_TOKENS_PER_ADDRESS": "1000000000/day",
    "SERVER_CONNECTIONS_PER_ADDRESS": "5000",
}


@contextmanager
def workers(
    tmp_path: Path,
    upstream: str,
    store: Redis,
    *,
    count: int = 2,
    loop: str = "uvloop",
    before: str = "",
    **given: str,
) -> Iterator[Process]:
    """`chat-proxy serve` with that many workers, all of them ready; `before` is run ahead of it, in each process."""
    command = [sys.executable, "-W", "error", "-c", before + START.format(held=HELD, deadline=PATIENCE, loop=loop)]
    given = {"SERVER_WORKERS": str(count), "LIMITS_STORE": store.url, **WIDE, **given}
    with serving(tmp_path, upstream, stdout=None, command=command, **given) as process:
        eventually(lambda: len(seen_serving(process)) == count, STARTING)
        yield process


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def served_by(headers: http.client.HTTPMessage) -> str:
    """Which worker has answered: its requests' ids begin alike."""
    return str(headers["x-request-id"]).partition("-")[0]


def seen_serving(process: Process) -> set[str]:
    """The workers that answer, as far as some connections at one time tell."""
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(process.connect())) for _ in range(12)]
        for connection in connections:
            connection.request("GET", "/api/v1/models")
        return {served_by(answered(connection).headers) for connection in connections}


def both(process: Process) -> set[str]:
    """The two workers, once both are seen: some connections at one time may all have got to one of them."""
    return seen if len(seen := seen_serving(process)) == 2 else set()


def answered(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    answer = connection.getresponse()
    answer.read()
    return answer


def lines(process: Process, event: str) -> list[dict[str, Any]]:
    return [line for line in process.logged() if line["event"] == event]


def ends(process: Process) -> None:
    process.tell(signal.SIGTERM)
    assert process.exit_code() == 0


class Reader:
    """One client that has the first event of a stream, and reads it to its end, whatever it is."""

    def __init__(self, process: Process) -> None:
        self.connection = process.connect()
        self.answer = begun(self.connection)
        self.worker = served_by(self.answer.headers)
        self.got: bytes = self.answer.read1()
        self.broke = False

    def read_to_the_end(self) -> None:
        with closing(self.connection):
            try:
                while part := self.answer.read1():
                    self.got += part
            except (http.client.HTTPException, ConnectionError):
                self.broke = True


# ---- one dies -----------------------------------------------------------------------------------------------------


@fault(33)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_killed_worker_takes_only_its_streams_along(loop: str, tmp_path: Path, store: Redis) -> None:
    """Row 33: of the streams of two workers only the killed one's break, visibly; its upstream calls are closed, its
    leases and reservations expire by themselves, what it had spent is paid, and another worker takes its place."""
    count = 500 if FULL else 60
    go_on = threading.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(GOOD[0])
        left = asyncio.create_task(peer.gone())
        while not (left.done() or go_on.is_set()):
            await asyncio.wait({left}, timeout=0.05)
        if not left.done():
            await peer.chunk(b"".join(GOOD[1:]))
            await peer.end()
            await left

    with ScriptedUpstream(script) as upstream, workers(tmp_path, upstream.base_url, store, loop=loop) as process:
        readers = [Reader(process) for _ in range(count)]
        by_worker = Counter(reader.worker for reader in readers)
        assert len(by_worker) == 2, "the listener gave all to one"
        with store.client() as counted:
            assert leases(counted) == 2 * count  # the sessions' and the address's
            victim = min(process.children())
            os.kill(victim, signal.SIGKILL)
            eventually(lambda: lines(process, "worker_died"))
            died = lines(process, "worker_died")[0]
            assert (died["pid"], died["status"]) == (victim, -signal.SIGKILL)
            eventually(lambda: sum(seen.closed is not None for seen in upstream.seen) in by_worker.values())
            go_on.set()
            threads = [threading.Thread(target=reader.read_to_the_end) for reader in readers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            broken = {reader.worker for reader in readers if reader.broke}
            assert len(broken) == 1
            for reader in readers:
                assert reader.broke == (reader.worker in broken)
                assert (reader.got == b"".join(GOOD)) == (not reader.broke)
                assert reader.got.startswith(GOOD[0])
            whole = {"complete": count - by_worker[broken.pop()]}
            eventually(lambda: Counter(line["ending"] for line in lines(process, "request") if line["ending"]) == whole)
            eventually(lambda: leases(counted) == 0)
            eventually(lambda: held_tokens(counted) == 0)
            logged = next(line for line in lines(process, "request") if line["ending"])
            prompt, each = logged["tokens"] - logged["events"], logged["tokens"]
            killed = count - whole["complete"]
            paid = used_tokens(process) - whole["complete"] * each
            assert prompt * killed <= paid <= (prompt + 1) * killed  # an event may have come after the last renewal
        eventually(lambda: len(seen_serving(process)) == 2, STARTING)
        ends(process)
        eventually(lambda: upstream.open == 0)


def leases(store: Any) -> int:
    """Those that have not expired."""
    seconds, microseconds = store.time()
    now = seconds * 1000 + microseconds // 1000
    return sum(store.zcount(key, now, "+inf") for key in store.scan_iter(f"{PREFIX}streams_per_*", 1000))


def used_tokens(process: Process) -> int:
    """By all at this address, as a session's page is told."""
    limits = json.loads(process.get("/api/session")[1])["limits"]
    return sum(each["limit"] - each["remaining"] for each in limits if each["name"].startswith("tokens_per_address"))


def held_tokens(store: Any) -> int:
    """The metrics as the next scrape finds them."""
    seconds, microseconds = store.time()
    now = seconds * 1000 + microseconds // 1000
    return sum(store.zcount(key, now, "+inf") for key in store.scan_iter(f"{PREFIX}tokens_per_*:h", 1000))


def test_early_deaths_are_not_repeated_at_once(tmp_path: Path, store: Redis) -> None:
    """Where workers die as soon as they begin, others are tried after a pause, and serve once they can."""
    broken = tmp_path / "broken"
    broken.touch()
    code = f"import os, sys\nif '--worker' in sys.argv and os.path.exists({str(broken)!r}): raise SystemExit(3)\n"
    command = [sys.executable, "-c", code + START.format(held=HELD, deadline=PATIENCE, loop="uvloop")]
    given = {"SERVER_WORKERS": "2", "LIMITS_STORE": store.url, "SERVER_PORT": str(free_port())}
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        started(tmp_path, "serve", given={**settings_for(upstream.base_url), **given}, command=command) as process,
    ):
        process.port = int(given["SERVER_PORT"])
        eventually(lambda: len(lines(process, "worker_died")) >= 4, STARTING)
        deaths = [line["time"] for line in lines(process, "worker_died")]
        assert max(deaths) - min(deaths) >= PAUSE  # two at once, a pause, two more
        broken.unlink()
        eventually(lambda: len(seen_serving(process)) == 2, STARTING)
        ends(process)


def test_a_worker_that_cannot_be_started_ends_nobody(tmp_path: Path, store: Redis) -> None:
    """While no process can be started (here: the program is away, as when it is installed anew) SIGHUP changes nothing,
    and those that serve go on; afterwards it replaces them again, and who has died is replaced, too."""
    program = tmp_path / "python"
    away = tmp_path / "away"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    code = f"import sys\nsys.executable = {str(program)!r}\n"
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        workers(tmp_path, upstream.base_url, store, before=code) as process,
    ):
        first = eventually(lambda: both(process), STARTING)
        program.rename(away)
        process.tell(signal.SIGHUP)
        eventually(lambda: lines(process, "worker_not_started"), STARTING)
        assert seen_serving(process) <= first
        os.kill(min(process.children()), signal.SIGKILL)
        eventually(lambda: len(lines(process, "worker_not_started")) >= 3, STARTING)
        away.rename(program)
        eventually(lambda: both(process), STARTING)
        process.tell(signal.SIGHUP)
        eventually(lambda: lines(process, "workers_replaced"), STARTING)
        assert not seen_serving(process) & first
        ends(process)


def test_workers_without_their_supervisor_end(tmp_path: Path, store: Redis) -> None:
    """When the supervisor is killed its workers drain and end: nothing keeps the port, no stream is cut."""
    steps = Steps(delta("a"), delta("b"), ends=False)
    steps.allowed.release()
    with ScriptedUpstream(steps) as upstream, workers(tmp_path, upstream.base_url, store) as process:
        pids = process.children()
        with closing(process.connect()) as connection, closing(begun(connection)) as answer:
            assert answer.read1() == delta("a")
            os.kill(process.process.pid, signal.SIGKILL)
            steps.allowed.release()
            assert answer.read1() == delta("b")
        eventually(lambda: not any(map(is_running, pids)))


# ---- all are replaced ---------------------------------------------------------------------------------------------


class Busy:
    """Does something again and again, in a thread, until it is stopped."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.enough = threading.Event()
        self.thread = threading.Thread(target=self.go_on)
        self.thread.start()

    def go_on(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        self.enough.set()
        self.thread.join(PATIENCE)


class Scraper(Busy):
    """Reads one of the counters."""

    def __init__(self, process: Process, port: int) -> None:
        self.port = port
        self.told: list[float] = []
        super().__init__(process)

    def go_on(self) -> None:
        while not self.enough.wait(PACE):
            self.told.append(endings(self.process, self.port))


class Asker(Busy):
    """Asks one question after the other, on a connection that it keeps as long as the server does."""

    def __init__(self, process: Process) -> None:
        self.answers = 0
        self.faults: list[str] = []
        super().__init__(process)

    def go_on(self) -> None:
        with closing(self.process.connect()) as connection:
            while not self.enough.wait(PACE):
                status, body = exchange(connection, "/api/chat", **HELLO)
                self.answers += 1
                if (status, body) != (200, b"".join(GOOD)):
                    self.faults.append(f"{status} {body!r}")


def test_replacing_all_cuts_nobody(tmp_path: Path, store: Redis) -> None:
    """SIGHUP under load: every worker is another one afterwards, no request failed meanwhile, a stream that was live
    before is whole, and the figures of those that have ended still count."""
    held = threading.Event()

    async def script(peer: Peer) -> None:
        seen = await peer.request()
        await peer.head()
        await peer.chunk(GOOD[0])
        if b"wait" in seen.body:
            await asyncio.to_thread(held.wait, 2 * STARTING)
        for part in GOOD[1:]:
            await peer.chunk(part)
        await peer.end()

    metrics_port = free_port()
    with (
        ScriptedUpstream(script) as upstream,
        workers(tmp_path, upstream.base_url, store, METRICS_PORT=str(metrics_port)) as process,
        closing(process.connect()) as waiting,
    ):
        body = {"messages": [{"role": "user", "content": "wait"}], "stream": True}
        waiting.request("POST", "/api/chat", json.dumps(body), {"content-type": "application/json"})
        live = waiting.getresponse()
        before, first = process.children(), seen_serving(process)
        scraper = Scraper(process, metrics_port)
        askers = [Asker(process) for _ in range(8)]
        for rounds in range(1, 3):
            process.tell(signal.SIGHUP)
            eventually(lambda rounds=rounds: len(lines(process, "workers_replaced")) == rounds, STARTING)  # type: ignore[misc]
        scraper.stop()
        for asker in askers:
            asker.stop()
        assert scraper.told == sorted(scraper.told)
        assert [asker.faults for asker in askers] == [[]] * 8
        assert all(asker.answers for asker in askers)
        assert not seen_serving(process) & first
        figures = series(process.get("/metrics", metrics_port)[1])
        assert figures["chat_proxy_streams_active", frozenset()] == 1
        held.set()
        assert live.read() == b"".join(GOOD)
        eventually(lambda: not any(map(is_running, before)))
        whole = sum(asker.answers for asker in askers) + 1
        assert endings(process, metrics_port) == whole
        ends(process)
    assert len([line for line in lines(process, "request") if line["ending"] == "complete"]) == whole


def endings(process: Process, port: int) -> float:
    figures = series(process.get("/metrics", port)[1])
    return figures["chat_proxy_stream_endings_total", frozenset({("ending", "complete")})]


def test_many_signals_to_replace_all_are_two(tmp_path: Path, store: Redis) -> None:
    """The first, and one for what has changed since: all that came meanwhile mean that."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, workers(tmp_path, upstream.base_url, store) as process:
        for _ in range(20):
            process.tell(signal.SIGHUP)
            time.sleep(0.01)
        eventually(lambda: len(lines(process, "workers_replaced")) == 2, STARTING)
        eventually(lambda: len(process.children()) == 2, STARTING)  # nor is a third on its way
        ends(process)
        assert len(lines(process, "workers_replaced")) == 2


def test_a_replaced_worker_has_the_settings_of_now(tmp_path: Path, store: Redis) -> None:
    """After SIGHUP the key and the file's settings are those of now; a file that is wrong changes nothing."""
    file = tmp_path / "chat-proxy.toml"
    key = tmp_path / "key"
    file.write_text('[policy]\nmodels = ["first"]\n', encoding="utf-8")
    key.write_text(secrets.token_urlsafe(32), encoding="utf-8")
    command = [sys.executable, "-W", "error", "-c", START.format(held=HELD, deadline=PATIENCE, loop="uvloop")]
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        given = {
            "UPSTREAM_BASE_URL": upstream.base_url,
            "UPSTREAM_API_KEY_FILE": str(key),
            "SERVER_WORKERS": "2",
            "LIMITS_STORE": store.url,
            "SERVER_PORT": str(free_port()),
        }
        with started(tmp_path, "serve", given=given, command=command) as process:
            process.port = int(given["SERVER_PORT"])
            eventually(lambda: len(seen_serving(process)) == 2 if process.answers() else None, STARTING)
            file.write_text("[policy]\nmodels = []\n[serve]\nport = 1\n", encoding="utf-8")
            process.tell(signal.SIGHUP)
            eventually(lambda: lines(process, "settings_refused"), STARTING)
            assert lines(process, "settings_refused")[0]["settings"] == ["serve", "policy.models"]
            assert models(process) == {"first"}
            file.write_text('[policy]\nmodels = ["second"]\n', encoding="utf-8")
            fresh = secrets.token_urlsafe(32)
            key.write_text(fresh, encoding="utf-8")
            process.tell(signal.SIGHUP)
            eventually(lambda: lines(process, "workers_replaced"), STARTING)
            assert models(process) == {"second"}
            with closing(process.connect()) as connection:
                exchange(connection, "/api/chat", **HELLO)
            assert upstream.seen[-1].headers["authorization"] == f"Bearer {fresh}"
            ends(process)


def test_what_workers_share_cannot_be_taken_from_them(tmp_path: Path, store: Redis) -> None:
    """Settings that are right for one process are wrong for the several that are there: neither SIGHUP nor a worker's
    death makes workers that each allow the whole of every limit."""
    file = tmp_path / "chat-proxy.toml"
    written = '[policy]\nmodels = ["m"]\n[server]\nworkers = {}\n[limits]\nstore = "{}"\n'
    file.write_text(written.format(2, store.url), encoding="utf-8")
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        given = {
            "UPSTREAM_BASE_URL": upstream.base_url,
            "UPSTREAM_API_KEY": secrets.token_urlsafe(32),
            "SERVER_PORT": str(free_port()),
        }
        command = [sys.executable, "-W", "error", "-c", START.format(held=HELD, deadline=PATIENCE, loop="uvloop")]
        with started(tmp_path, "serve", given=given, command=command) as process:
            process.port = int(given["SERVER_PORT"])
            first = eventually(lambda: both(process) if process.answers() else set(), STARTING)
            file.write_text(written.format(1, "memory://"), encoding="utf-8")
            process.tell(signal.SIGHUP)
            eventually(lambda: lines(process, "settings_refused") or lines(process, "workers_replaced"), STARTING)
            assert [line["settings"] for line in lines(process, "settings_refused")] == [["server.workers"]]
            assert seen_serving(process) <= first
            os.kill(min(process.children()), signal.SIGKILL)
            eventually(lambda: len(lines(process, "worker_died")) >= 2, STARTING)
            assert lines(process, "worker_died")[1]["status"] == 2
            assert seen_serving(process) < first
            ends(process)


def models(process: Process) -> set[str]:
    """As told on several connections."""
    return {json.loads(process.get("/api/v1/models")[1])["data"][0]["id"] for _ in range(8)}


# ---- the end ------------------------------------------------------------------------------------------------------


def test_ctrl_c_begins_one_drain(tmp_path: Path, store: Redis) -> None:
    """Ctrl-C reaches everybody in the terminal, and yet is one signal: live streams go on. The second ends them with
    the `draining` event. Exit 0, and no process is left."""
    steps = Steps(delta("a"), delta("b"), ends=False)
    steps.allowed.release()
    with ScriptedUpstream(steps) as upstream, workers(tmp_path, upstream.base_url, store) as process:
        pids = process.children()
        with closing(process.connect()) as connection, closing(begun(connection)) as answer:
            assert answer.read1() == delta("a")
            os.killpg(process.process.pid, signal.SIGINT)
            eventually(lambda: len(lines(process, "draining")) == 2)
            steps.allowed.release()
            assert answer.read1() == delta("b")
            os.killpg(process.process.pid, signal.SIGINT)
            last = answer.read()
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "draining"
        assert process.exit_code() == 0
        assert not any(map(is_running, pids))
        assert steps.left.wait(PATIENCE)


def test_a_worker_that_hangs_is_ended_by_the_second_signal(tmp_path: Path, store: Redis) -> None:
    """The first waits for it, as for everybody; the second does not wait for ever for one that hears no order."""
    code = "from proxy.server import workers\nworkers.CUT_SECONDS = 0.5\n"
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        workers(tmp_path, upstream.base_url, store, before=code) as process,
    ):
        eventually(lambda: both(process), STARTING)
        hanging, other = process.children()
        os.kill(hanging, signal.SIGSTOP)
        process.tell(signal.SIGTERM)
        eventually(lambda: not is_running(other))
        assert is_running(hanging)
        ends(process)
        assert not is_running(hanging)


def test_a_signal_to_everybody_is_one(tmp_path: Path, store: Redis) -> None:
    """A signal to all processes of a service at once, as systemd may send it, does not cut live streams."""
    steps = Steps(delta("a"), delta("b"), ends=False)
    steps.allowed.release()
    with ScriptedUpstream(steps) as upstream, workers(tmp_path, upstream.base_url, store) as process:
        with closing(process.connect()) as connection, closing(begun(connection)) as answer:
            assert answer.read1() == delta("a")
            for pid in [*process.children(), process.process.pid]:
                os.kill(pid, signal.SIGTERM)
            eventually(lambda: len(lines(process, "draining")) == 2)
            steps.allowed.release()
            assert answer.read1() == delta("b")
            process.tell(signal.SIGTERM)
            assert b'"draining"' in answer.read()
        assert process.exit_code() == 0


def test_a_drain_while_workers_are_replaced(tmp_path: Path, store: Redis) -> None:
    """SIGTERM right behind SIGHUP: those that begin and those that retire end, too."""
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        workers(tmp_path, upstream.base_url, store, count=3) as process,
        closing(process.connect()) as idle,
    ):
        exchange(idle, "/healthz")
        pids = process.children()
        process.tell(signal.SIGHUP)
        eventually(lambda: lines(process, "retiring"), STARTING)
        pids |= process.children()
        ends(process)
        assert not any(map(is_running, pids))
    assert not lines(process, "worker_died")


# ---- as one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["Redis", "a file"])
def test_they_count_and_know_as_one(where: str, tmp_path: Path, store: Redis) -> None:
    """A session that one worker gave is good at all, its limit is one limit, and after a logout each refuses a copy of
    its cookie within a second."""
    url = {"Redis": store.url, "a file": f"sqlite://{tmp_path}/chat.db"}[where]
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        workers(tmp_path, upstream.base_url, store, LIMITS_PER_SESSION="30/minute", LIMITS_STORE=url) as process,
        ExitStack() as stack,
    ):
        with closing(process.connect()) as connection:
            connection.request("GET", "/api/session", headers={"sec-fetch-site": "same-origin"})
            cookie = str(answered(connection).headers["set-cookie"]).partition(";")[0]
        connections: dict[str, http.client.HTTPConnection] = {}
        while len(connections) < 2:
            connection = stack.enter_context(closing(process.connect()))
            connection.request("GET", "/api/session", headers={"cookie": cookie})
            answer = answered(connection)
            assert answer.status == 200
            assert answer.headers["set-cookie"] is None
            connections.setdefault(served_by(answer.headers), connection)

        def asked(connection: http.client.HTTPConnection) -> int:
            headers = {"content-type": "application/json", "cookie": cookie}
            connection.request("POST", "/api/chat", json.dumps(HELLO), headers)
            return answered(connection).status

        both = itertools.cycle(connections.values())
        assert Counter(asked(next(both)) for _ in range(40)) == {200: 30, 429: 10}
        first, second = connections.values()
        first.request("DELETE", "/api/session", headers={"cookie": cookie})
        assert answered(first).status == 200
        logged_out = time.monotonic()
        for connection in (first, second):
            eventually(lambda connection=connection: asked(connection) == 401)  # type: ignore[misc]
        assert time.monotonic() - logged_out < PATIENCE
        ends(process)


def test_more_than_one_wants_a_store(tmp_path: Path) -> None:
    """Workers that would each count alone are not started; the settings' fault says why. Exit 2."""
    done = run(tmp_path, "serve", **settings_for("https://api.example.com"), SERVER_WORKERS="2")
    assert done.returncode == 2
    assert "server.workers" in done.stderr
    assert "limits.store" in done.stderr


def test_settings_that_only_a_worker_can_refuse_end_all(tmp_path: Path, store: Redis) -> None:
    """What is found to be wrong when a worker starts is told as it is with one process: on stderr, and exit 2."""
    (tmp_path / "chat-proxy.revoked.json").write_text("{", encoding="utf-8")
    given = {**settings_for("https://api.example.com"), "SERVER_WORKERS": "2", "LIMITS_STORE": store.url}
    done = run(tmp_path, "serve", **given, SERVER_PORT=str(free_port()))
    assert done.returncode == 2
    assert "session.control_file" in done.stderr


def test_the_listener_of_the_metrics_says_nothing_beside_the_log(tmp_path: Path, store: Redis) -> None:
    """As with one process: what the library complains of does not get to stderr."""
    port = free_port()
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        with workers(tmp_path, upstream.base_url, store, METRICS_PORT=str(port)) as process:
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as peer:
                peer.sendall(b"garbage\r\n\r\n")
                assert peer.recv(1000).startswith(b"HTTP/1.1 400")
            ends(process)
        assert process.stderr.read_bytes() == b""


# ---- their figures ------------------------------------------------------------------------------------------------


def family(kind: str, *samples: tuple[dict[str, str], float], name: str = "x") -> Family:
    return Family(name, "what it is", kind, [(name, labels, value) for labels, value in samples])


def test_figures_add_up() -> None:
    """Counters and gauges of processes are added label by label; of a store that is up or not, the worst is told."""
    one = [family("counter", ({"a": "1"}, 2.0)), family("gauge", ({}, 1.0), name="chat_proxy_limit_store_up")]
    other = [
        family("counter", ({"a": "1"}, 3.0), ({"a": "2"}, 5.0)),
        family("gauge", ({}, 0.0), name="chat_proxy_limit_store_up"),
    ]
    total = {each.name: each.samples for each in added_up([one, other])}
    assert total == {
        "x": [("x", {"a": "1"}, 5.0), ("x", {"a": "2"}, 5.0)],
        "chat_proxy_limit_store_up": [("chat_proxy_limit_store_up", {}, 0.0)],
    }
    assert added_up([]) == []
    assert one[0].samples == [("x", {"a": "1"}, 2.0)], "what was added up is left as it was"


def test_of_the_dead_no_gauge_stays() -> None:
    assert lasting([family("gauge", ({}, 1.0)), family("histogram", ({}, 1.0))]) == [family("histogram", ({}, 1.0))]


def test_figures_are_told_as_one_process_would() -> None:
    """What one process tells through another is, byte for byte, what it would tell itself."""
    from proxy.telemetry.metrics import Metrics

    counted = Metrics(("m",))
    counted.requests.labels("200").inc()
    counted.first_token.observe(0.3)
    assert Total([counted.families()]).exposition() == counted.exposition()
