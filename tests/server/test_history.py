"""The limits hold in histories of grants: in memory, and on a real Redis with faults.

history.py is the checker; the processes of history_hits.py make the histories. CHAT_PROXY_FULL=1 makes a million hits,
and 10,000 over HTTP; by default it makes 40,000, and 1,000 over HTTP.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import Process, serving, settings_for
from support.harness import (
    DONE,
    FULL,
    PATIENCE,
    STARTING,
    Peer,
    Script,
    ScriptedUpstream,
    chat,
    delta,
    eventually,
    finish,
    running,
    streaming,
    unmeasured,
)
from support.history import STORE, Grant, Violation, fixed, moving, simultaneous, split_at_resets
from support.redis_server import Redis

from proxy.chat.policy import apply
from proxy.errors import TokensExhausted, TooMany, TooManyStreams
from proxy.limits.limiter import Limiter, Permit
from proxy.limits.requests import ChargeKind
from proxy.limits.status import Subject
from proxy.limits.store import shared as store_module
from proxy.settings import from_variables
from server.test_store import leases, used
from server.test_workers import HELD, START, WIDE, ends, lines

HITS = 1_000_000 if FULL else 40_000
ROUND = 7_500  # hits between the first fault and the last
TESTS = Path(__file__).parents[1]
PROCESSES = 8
UNANSWERED = "unanswered"
FROZEN_AT_MOST = 20.0  # seconds
PAUSE = 0.03  # seconds between two hits of a task, of which each process has eight
GRAIN = 0.0015  # seconds: Redis counts in milliseconds

# ---- the checker ----------------------------------------------------------------------------------------------------


def at(time: float, amount: int = 1, late: float = 0.0, key: str = "k", by: str = STORE, until: float = 0.0) -> Grant:
    return Grant(key, amount, time, time + late, by, until)


Check = Callable[[list[Grant], int, float], list[Violation]]
PLANTED: dict[str, tuple[Check, list[Grant], list[float]]] = {
    "moving: all at once": (moving, [at(0), at(0), at(0)], [0]),
    "moving: as many as may be": (moving, [at(0), at(0.5), at(1), at(1.5)], []),
    "moving: one too early": (moving, [at(0), at(0.5), at(0.99), at(1.6)], [0]),
    "moving: across two minutes of the clock": (moving, [at(0.1), at(0.9), at(1.05)], [0.1]),
    "moving: one that is worth three": (moving, [at(0, 3)], [0]),
    "moving: two keys are two": (moving, [at(0), at(0), at(0, key="other"), at(0, key="other")], []),
    "moving: in the second of two keys": (moving, [at(0), *[at(5, key="other")] * 3], [5]),
    "moving: perhaps a window later": (moving, [at(0), at(0.5), at(0.9, late=0.2)], []),
    "moving: late, but surely within": (moving, [at(0, late=0.5), at(0.1, late=0.6), at(0.2, late=0.7)], [0]),
    "moving: at the end of much": (moving, [*(at(n * 0.5) for n in range(100)), at(49.6)], [49]),
    "fixed: as many as may be": (fixed, [at(0), at(0.9), at(1.0), at(1.1)], []),
    "fixed: one too many": (fixed, [at(0), at(0.9), at(0.99)], [0]),
    "fixed: one too many in the second": (fixed, [at(0), at(0.9), at(1.0), at(1.1), at(1.9)], [1.0]),
    "fixed: a window that begins too early": (fixed, [at(0), at(0.9), at(0.95), at(1.0)], [0]),
    "fixed: after a pause": (fixed, [at(0), at(7.5), at(8.0), at(8.4)], [7.5]),
    "fixed: tokens": (fixed, [at(0, 1), at(0.2, 1), at(1.1, 1), at(1.2, 2)], [1.1]),
    "fixed: perhaps of the next": (fixed, [at(0, late=0.1), at(0.2), at(0.95, late=0.1), at(1.2), at(1.3)], []),
    "fixed: late, but surely within": (fixed, [at(0, late=0.3), at(0.1, late=0.3), at(0.2, late=0.3)], [0]),
    "fixed: surely within the second": (fixed, [at(0), at(1.0, late=0.1), at(1.3), at(1.8)], [1.0]),
    "together: one after the other": (
        lambda grants, limit, _: simultaneous(grants, limit),
        [at(0, until=1), at(0, until=2), at(1, until=3), at(2, until=4)],
        [],
    ),
    "together: three": (
        lambda grants, limit, _: simultaneous(grants, limit),
        [at(0, until=1), at(0, until=2), at(0.5, late=0.4, until=3)],
        [0.9],
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_checker_finds_what_was_planted(case: str) -> None:
    """With a limit of two a second, the checker reports the windows with more, and no others."""
    check, grants, expected = PLANTED[case]
    random.shuffle(grants)
    violations = check(grants, 2, 1.0)
    assert sorted({violation.began for violation in violations}) == expected
    assert all(violation.granted > 2 for violation in violations)


times = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 3), st.integers(0, 15)), min_size=1, max_size=60)


@given(times)
def test_the_checker_is_right_about_moving_windows(walk: list[tuple[int, int, int]]) -> None:
    """With exact times the checker agrees with the definition; with inexact times it reports no false violation."""
    exact = [at(tick / 64, amount) for tick, amount, _ in walk]
    too_many = {
        start.asked
        for start in exact
        if sum(grant.amount for grant in exact if start.asked <= grant.asked < start.asked + 1) > 4
    }
    assert {violation.began for violation in moving(exact, 4, 1.0)} == too_many
    blurred = [at((tick - late) / 64, amount, 2 * late / 64) for tick, amount, late in walk]
    if moving(blurred, 4, 1.0):
        assert too_many


@given(times)
def test_the_checker_is_right_about_fixed_windows(walk: list[tuple[int, int, int]]) -> None:
    """The same for fixed windows."""
    exact = [at(tick / 64, amount) for tick, amount, _ in sorted(walk)]
    too_many, ends, total = set(), 0.0, 0
    began = 0.0
    for grant in exact:
        if grant.asked >= ends:
            began, ends, total = grant.asked, grant.asked + 1, 0
        total += grant.amount
        if total > 4:
            too_many.add(began)
    assert {violation.began for violation in fixed(exact, 4, 1.0)} == too_many
    blurred = [at((tick - late) / 64, amount, 2 * late / 64) for tick, amount, late in walk]
    if fixed(blurred, 4, 1.0):
        assert too_many


def test_a_reset_begins_a_new_history() -> None:
    """A grant certainly before or after a reset counts there; one that may be on either side has amount 0 on both."""
    grants = [at(0), at(0.9, late=0.05), at(0.9, late=0.2), at(1.05), at(1.05, late=0.3), at(1.2), at(3)]
    parts = split_at_resets(grants, [(1.0, 1.1), (2.0, 2.0)])
    assert [[grant.asked for grant in part if grant.amount] for part in parts] == [[0, 0.9], [1.2], [3]]
    assert [[grant.asked for grant in part if not grant.amount] for part in parts] == [[0.9, 1.05, 1.05]] * 2 + [[]]
    assert split_at_resets(grants, []) == [grants]


# ---- many processes on one store, with faults -------------------------------------------------------------------

SETTINGS = {
    "LIMITS_PER_SESSION": "5/second",
    "LIMITS_PER_ADDRESS": "12/second",
    "LIMITS_STREAMS_PER_SESSION": "2",
    "LIMITS_STREAMS_PER_ADDRESS": "5",
    "LIMITS_TOKENS_PER_SESSION": "400/second",
    "LIMITS_TOKENS_PER_ADDRESS": "1200/second",
    "LIMITS_TOKENS_TOTAL": "2000/second",
}
LIMITS: list[tuple[str, str, Callable[..., list[Violation]], int]] = [
    ("charge", "session", moving, 5),
    ("charge", "address", moving, 12),
    ("hold", "session", fixed, 400),
    ("hold", "address", fixed, 1200),
    ("hold", "all", fixed, 2000),
]
STREAMS = {"session": 2, "address": 5}


@dataclass
class Histories:
    """The records of several processes: grants by kind and owner. The kind "unanswered" holds grants that may have been
    booked without a record: for a process that was killed, or for a call that timed out.
    """

    grants: dict[tuple[str, str], list[Grant]] = field(default_factory=dict)
    renewed: list[Grant] = field(default_factory=list)
    refused: int = 0
    unavailable: int = 0
    merges: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    held_at_the_end: list[int] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)

    def read(self, name: str, path: Path) -> None:
        asked: dict[str, list[str]] = {}
        for line in path.read_text().splitlines():
            what, *fields = line.split(" ")
            if what in ("charge", "hold"):
                self.granted(what, fields)
            elif what == "pending":
                asked[fields[3]] = fields
            elif what == "resolved":
                del asked[fields[0]]
            elif what == "renewed":
                by = UNANSWERED if fields[1] == fields[2] else name
                self.renewed.append(Grant(fields[0], 0, float(fields[1]), float(fields[2]), by))
            elif what == "restored":
                self.merges.setdefault(name, []).append((float(fields[0]), float(fields[0])))
            elif what == "end":
                self.held_at_the_end.append(int(fields[0]))
            elif what == "bug":
                self.bugs.append(line)
            else:
                self.refused += what == "refused"
                self.unavailable += what == "unavailable"
        for session, address, when, _ in asked.values():
            self.granted("unanswered", [session, address, "0", when, when, name, "0"])

    def granted(self, what: str, fields: list[str]) -> None:
        session, address, amount, asked, answered, by, until = fields
        for owner, key in (("session", session), ("address", address), ("all", "all")):
            grant = Grant(key, int(amount), float(asked), float(answered), by, float(until))
            self.grants.setdefault((what, owner), []).append(grant)

    def count(self, by: str | None = None) -> int:
        return sum(by in (None, grant.by) for what in ("charge", "hold") for grant in self.grants[what, "session"])

    def granted_by(self, what: str, owner: str, name: str) -> list[Grant]:
        return [grant for grant in self.grants[what, owner] if grant.by == name]

    def unanswered(self, owner: str, name: str) -> list[Grant]:
        """The unrecorded grants of one process, or of all processes for the store; their amounts are 0."""
        grants = self.grants.get(("unanswered", owner), [])
        renewed = [grant for grant in self.renewed if name == STORE and owner_of(grant.key) == owner]
        return renewed + [replace(grant, by=UNANSWERED) for grant in grants if name in (STORE, grant.by)]

    def violations(self, resets: list[tuple[float, float]]) -> list[tuple[str, Violation]]:
        """The violations by the store between two resets, and by the local counters of each process: of requests in any
        window, of tokens between two merges, since a merge moves them to the store and resets the local counters. Their
        windows may have begun in the store.
        """
        names = {grant.by for grant in self.grants["charge", "session"] + self.grants["hold", "session"]}
        violations = []
        for name in names:
            for what, owner, check, limit in LIMITS:
                begins_anew = resets if name == STORE else self.merges.get(name, []) if what == "hold" else []
                granted = self.granted_by(what, owner, name)
                if what == "hold":
                    granted = granted + self.unanswered(owner, name) + self.begun_in_store(owner, name)
                for part in split_at_resets(granted, begins_anew):
                    violations += [(name, one) for one in check([widened(grant) for grant in part], limit, 1.0, GRAIN)]
            for owner, limit in STREAMS.items():
                for part in split_at_resets(self.granted_by("hold", owner, name), resets if name == STORE else []):
                    violations += [(name, one) for one in simultaneous([stream(grant) for grant in part], limit)]
        return violations

    def begun_in_store(self, owner: str, name: str) -> list[Grant]:
        """The grants of the store, for a process: each may have begun a window that its local counters go on with."""
        if name == STORE:
            return []
        keys = {grant.key for grant in self.granted_by("hold", owner, name)}
        stored = self.granted_by("hold", owner, STORE)
        return [replace(grant, amount=0, until=0.0) for grant in stored if grant.key in keys]


def owner_of(key: str) -> str:
    return "all" if key == "all" else {"s": "session", "a": "address"}[key[0]]


def widened(grant: Grant) -> Grant:
    """A call to a frozen store may have begun a window when the store was thawed."""
    return replace(grant, answered=grant.asked + FROZEN_AT_MOST) if grant.by == UNANSWERED else grant


def stream(grant: Grant) -> Grant:
    return Grant(grant.key, 1, grant.asked, grant.answered, grant.by, grant.until)


class Crowd:
    """Processes that use one store. Each writes a file of its name; a killed one is replaced."""

    def __init__(self, folder: Path, hits: int, **limits: str) -> None:
        self.folder = folder
        self.limits = {**SETTINGS, **limits}
        self.hits = hits
        self.pids: dict[str, int] = {}
        self.readers: dict[str, BinaryIO] = {}
        self.lines: Counter[str] = Counter()
        self.ended: set[str] = set()

    def __enter__(self) -> Crowd:
        command = [sys.executable, "-m", "support.history_hits"]
        pipe = subprocess.PIPE
        self.parent = subprocess.Popen(command, env=unmeasured(), cwd=TESTS, stdin=pipe, stdout=pipe, text=True)
        for number in range(PROCESSES):
            self.start(f"process-{number}", self.hits // PROCESSES)
        return self

    def __exit__(self, *exception: object) -> None:
        for name, reader in self.readers.items():
            if name not in self.ended:
                self.kill(name)
            reader.close()
        self.parent.communicate()

    def start(self, name: str, hits: int) -> None:
        path = self.folder / name
        path.touch()
        self.readers[name] = path.open("rb")
        plan = {"name": name, "hits": hits, "path": str(path), "limits": self.limits, "pause": PAUSE}
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        self.parent.stdin.write(json.dumps(plan) + "\n")
        self.parent.stdin.flush()
        self.pids[name] = int(self.parent.stdout.readline())

    def kill(self, name: str) -> None:
        self.ended.add(name)
        with suppress(ProcessLookupError):
            os.kill(self.pids[name], signal.SIGKILL)

    def hits_done(self) -> int:
        """The number of hits so far."""
        for name, reader in self.readers.items():
            written = reader.read()
            self.lines[name] += sum(
                written.count(word) for word in (b"charge ", b"hold ", b"refused\n", b"unavailable\n")
            )
            if b"end " in written:
                self.ended.add(name)
        return self.lines.total()

    def until(self, share: float) -> None:
        eventually(lambda: self.hits_done() >= share * self.hits, PATIENCE + self.hits / 100)

    def replace(self, number: int) -> None:
        """Kills a process with SIGKILL during its work, and starts another one for the rest."""
        before = [name for name in self.pids if name.startswith(f"process-{number}")]
        self.kill(before[-1])
        self.hits_done()
        left = self.hits // PROCESSES - sum(self.lines[name] for name in before)
        self.start(f"process-{number}.{len(before)}", max(0, left))

    def histories(self) -> Histories:
        """The records of all processes, once they have ended."""
        eventually(lambda: self.hits_done() and len(self.ended) == len(self.pids), PATIENCE + self.hits / 100)
        histories = Histories()
        for name in self.pids:
            histories.read(name, self.folder / name)
        return histories


@contextmanager
def record_interval(moments: list[tuple[float, float]]) -> Iterator[None]:
    began = time.monotonic()
    yield
    moments.append((began, time.monotonic()))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    yield server
    server.stop()


@pytest.mark.process
@pytest.mark.redis
@pytest.mark.parametrize("policy", ["local", "refuse"])
def test_the_limits_hold_on_a_store_through_its_faults(policy: str, store: Redis, tmp_path: Path) -> None:
    """With killed processes and a store that is emptied, frozen and restarted, the store never grants more than the
    limits. In each outage the local counters of a process grant at most the limits once more with `local`, and nothing
    with `refuse`. Afterwards nothing is held.
    """
    hits = HITS * 3 // 4 if policy == "local" else HITS // 4
    rounds = max(1, hits // ROUND)
    emptied: list[tuple[float, float]] = []
    limits = {"LIMITS_STORE": store.url, "LIMITS_WHEN_STORE_FAILS": policy}
    with Crowd(tmp_path, hits, **limits) as crowd:
        for number in range(rounds):
            crowd.until((number + 0.1) / rounds)
            with record_interval(emptied), store.client() as client:
                client.flushall()
            crowd.until((number + 0.25) / rounds)
            store.freeze()
            crowd.until((number + 0.35) / rounds)  # by now every process has noticed
            store.thaw()
            crowd.until((number + 0.6) / rounds)
            crowd.replace(number % PROCESSES)
            crowd.until((number + 0.75) / rounds)
            with record_interval(emptied):
                store.stop()
                time.sleep(0.2)
                store.start()
        histories = crowd.histories()
    assert histories.bugs == []
    assert histories.violations(emptied) == []
    assert set(histories.held_at_the_end) == {0}
    assert len(histories.held_at_the_end) >= PROCESSES  # also counts processes that were replaced after their end
    with store.client() as client:
        assert leases(client) == []  # the holds of killed processes were lost with the store
    assert histories.count() + histories.refused + histories.unavailable >= 0.99 * hits
    assert histories.refused > hits // 20
    if policy == "local":
        assert histories.unavailable == 0
        assert all(histories.count(f"process-{number}") for number in range(PROCESSES))
    else:
        assert histories.unavailable > 0
        assert histories.count() == histories.count(STORE)


# ---- one process, in memory -----------------------------------------------------------------------------------------


def test_the_limits_hold_in_memory() -> None:
    """The limits hold in memory, at exact times: the test moves the clock in steps that floats hold exactly."""
    histories = asyncio.run(run_in_memory(HITS // 2))
    assert histories.violations([]) == []
    assert histories.held_at_the_end == [0]
    assert min(histories.refused, histories.count()) > HITS // 20


async def run_in_memory(hits: int) -> Histories:
    now, histories = 0.0, Histories()
    live: list[tuple[float, float, Permit, list[str]]] = []  # by their ends, in random order at equal times
    variables = {"UPSTREAM_BASE_URL": "http://127.0.0.1/v1", "UPSTREAM_API_KEY": "k" * 30, "POLICY_MODELS": "m"}
    chosen = from_variables({f"CHAT_PROXY_{name}": value for name, value in {**variables, **SETTINGS}.items()})
    limits = Limiter(chosen.limits, 1000, lambda: now, lambda reason: None, lambda bug: None)
    for _ in range(hits):
        now += random.choice((0, 0, 0, 1, 1, 2)) / 64
        while live and live[0][0] < now:
            _, _, permit, fields = heappop(live)
            async with permit:
                permit.settle(int(fields[2]))
            histories.granted("hold", fields)
        number = random.randrange(8)
        subject = Subject(f"s{number}", f"a{number % 2}")
        try:
            if random.random() < 0.6:
                await limits.charge(ChargeKind.QUESTION, subject)
                histories.granted("charge", [*subject[:2], "1", str(now), str(now), "memory", "0"])
            else:
                amount, until = random.randint(50, 150), now + random.choice((1, 2, 3, 5, 100)) / 64
                permit = await limits.hold(subject, amount)
                used = amount if number % 2 else random.randint(0, amount)
                fields = [*subject[:2], str(used), str(now), str(now), "memory", str(until)]
                heappush(live, (until, random.random(), permit, fields))
        except (TooMany, TokensExhausted, TooManyStreams):
            histories.refused += 1
    for _, _, permit, fields in live:
        async with permit:
            permit.settle(int(fields[2]))
        histories.granted("hold", fields)
    histories.held_at_the_end.append(limits.leases.live + len(limits.leases.held))
    return histories


# ---- over HTTP, through two workers ---------------------------------------------------------------------------------

VISITORS = 4
REQUESTS_A_SECOND, ANSWERS_A_SECOND = 5, 3  # per visitor
QUESTION = b'{"messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":10}'


@dataclass
class SentRequest:
    """One request over HTTP: its visitor, its times, and the status and code of its answer; status 0 without one."""

    visitor: str
    asked: float
    answered: float = 0.0
    status: int = 0
    code: str = ""

    def grant(self, amount: int) -> Grant:
        if not self.status:
            return Grant(self.visitor, 0, self.asked, self.asked + FROZEN_AT_MOST)
        return Grant(self.visitor, amount, self.asked, self.answered)


def tokens_held() -> int:
    """The tokens that the policy reserves for one answer; the test's upstream uses all of them."""
    chosen = from_variables(
        {f"CHAT_PROXY_{name}": value for name, value in settings_for("http://127.0.0.1/v1").items()}
    )
    order = apply(QUESTION, chosen.policy)
    return order.prompt_tokens + order.output_tokens


def answering(used: int) -> Script:
    """An upstream that answers and reports `used` tokens."""
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":10}}\n\n' % (used - 10)
    return streaming(delta("one"), finish(), usage, DONE)


class Clients:
    """Clients that send requests without a break, on reused connections, and record the answers."""

    def __init__(self, process: Process, hits: int) -> None:
        self.process = process
        self.turns = iter(range(hits))
        self.asked: list[SentRequest] = []

    def run(self) -> None:
        connection = self.process.connect()
        for number in self.turns:
            one = SentRequest(f"198.51.100.{number % VISITORS}", time.monotonic())
            self.asked.append(one)
            headers = {"content-type": "application/json", "x-forwarded-for": one.visitor}
            try:
                connection.request("POST", "/api/chat", QUESTION, headers)
                answer = connection.getresponse()
                one.answered, one.status = time.monotonic(), answer.status
                body = answer.read()
            except (http.client.HTTPException, OSError):
                connection.close()  # its worker was killed
                one.status = one.status if one.status == 200 else 0  # a refusal without its body counts as no answer
            else:
                one.code = json.loads(body)["error"]["code"] if one.status != 200 else ""
            time.sleep(random.random() * 0.2)
        connection.close()


@pytest.mark.process
@pytest.mark.redis
def test_the_limits_hold_over_http(store: Redis, tmp_path: Path) -> None:
    """Two workers, one of which is killed, grant a visitor no more than the limit; while the store is frozen, each
    worker grants at most the limit once more. No request gets a 500, and afterwards nothing is held.
    """
    hits, held = 10_000 if FULL else 1_000, tokens_held()
    limits = {
        "LIMITS_PER_SESSION": f"{REQUESTS_A_SECOND}/second",
        "LIMITS_TOKENS_PER_SESSION": f"{ANSWERS_A_SECOND * held}/second",
    }
    command = [sys.executable, "-W", "error", "-c", START.format(held=HELD, deadline=1.0, loop="uvloop")]
    settings = {**WIDE, **limits, "SERVER_WORKERS": "2", "LIMITS_STORE": store.url}
    with (
        ScriptedUpstream(answering(held)) as upstream,
        serving(tmp_path, upstream.base_url, stdout=None, command=command, **settings) as process,
        ThreadPoolExecutor(8) as threads,
    ):
        clients = Clients(process, hits)
        asking = [threads.submit(clients.run) for _ in range(8)]
        eventually(lambda: len(clients.asked) > 0.3 * hits, PATIENCE + hits / 10)
        os.kill(min(process.children()), signal.SIGKILL)
        eventually(lambda: len(clients.asked) > 0.7 * hits, PATIENCE + hits / 10)
        frozen_at = time.monotonic()
        was_lost = bool(lines(process, "limits_unavailable"))  # the machine may be too busy to answer for a second
        store.freeze()
        eventually(lambda: lines(process, "limits_unavailable"))
        store.thaw()
        for thread in asking:
            thread.result(PATIENCE + hits / 10)
        with store.client() as client:
            eventually(lambda: not leases(client))
        ends(process)
    before = [one for one in clients.asked if one.asked < frozen_at]
    for asked, servers in ((before, 3 if was_lost else 1), (clients.asked, 3)):
        requests = [one.grant(1) for one in asked if one.status == 200 or one.code == "tokens_exhausted"]
        answers = [one.grant(held) for one in asked if one.status in (0, 200)]
        assert moving(requests, servers * REQUESTS_A_SECOND, 1.0, GRAIN) == []
        assert fixed(answers, servers * ANSWERS_A_SECOND * held, 1.0, GRAIN) == []
    codes = Counter((one.status, one.code) for one in clients.asked)
    assert set(codes) <= {(200, ""), (429, "rate_limited"), (429, "tokens_exhausted"), (0, "")}
    assert min(codes[200, ""], codes[429, "rate_limited"]) > hits // 20
    assert codes[0, ""] <= 8


@pytest.mark.redis
def test_a_burst_never_overdraws_tokens_over_http(store: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 concurrent requests, as many are accepted as have room for their largest cost. Tokens that the upstream
    counts beyond that are booked too; the limit is exceeded by no more than these, and the next request is refused.
    """
    monkeypatch.setattr(store_module, "DEADLINE", PATIENCE)  # a busy machine must not mark the store as unavailable
    held, beyond, may_pay = tokens_held(), 7, 10
    go_on = threading.Event()

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await asyncio.to_thread(go_on.wait, 2 * STARTING)
            usage = b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":10}}\n\n'
            await peer.sse(delta("one"), finish(), usage % (held + beyond - 10), DONE)

    limit = may_pay * held + held // 2
    settings = {"LIMITS_TOKENS_PER_SESSION": f"{limit}/hour"}
    with ScriptedUpstream(script) as upstream, ExitStack() as stack:
        given = {"LIMITS_STORE": store.url, "SESSION_SECRET": "s" * 40, **settings}
        servers = [stack.enter_context(running(upstream.base_url, **given)) for _ in range(2)]
        threads = stack.enter_context(ThreadPoolExecutor(200))
        asked = [threads.submit(chat, servers[number % 2], max_tokens=10) for number in range(200)]
        eventually(lambda: sum(one.done() for one in asked) == 200 - may_pay, STARTING)
        go_on.set()
        replies = [one.result(PATIENCE) for one in asked]
        assert Counter(reply.status for reply in replies) == {200: may_pay, 429: 200 - may_pay}
        assert {reply.error["code"] for reply in replies if reply.status == 429} == {"tokens_exhausted"}
        name = f"tokens_per_session {limit}/hour"
        eventually(lambda: used(servers[0], {})[name] == min(limit, may_pay * (held + beyond)))
        assert may_pay * (held + beyond) <= limit + may_pay * beyond
        with store.client() as client:
            assert sum(
                int(client.hget(key, "used") or 0)
                for key in client.scan_iter("*:tokens_per_session:*")
                if client.type(key) == b"hash"
            ) == may_pay * (held + beyond)
            eventually(lambda: not leases(client))
        assert chat(servers[1], max_tokens=10).status == 429
