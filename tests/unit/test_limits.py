"""The limits in one process: request windows, live streams, tokens. The test moves the clock.

Times are multiples of 1/64 second, which floats hold exactly, so a test can assert the exact moment.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit
from support.harness import FULL, Clock, unmeasured

from proxy.errors import Busy, Refusal, TokensExhausted, TooMany, TooManySessions, TooManyStreams
from proxy.limits import requests, tokens
from proxy.limits.requests import ChargeKind, MovingWindows, RequestLimits
from proxy.limits.status import LimitStatus, Subject, limit_headers
from proxy.limits.streams import Lease, Leases
from proxy.limits.tokens import Reservation, Tokens
from proxy.settings import Limits, rates

TICK = 1 / 64
ANN, BEN = Subject("ann", "203.0.113.1"), Subject("ben", "203.0.113.2")
ANN_ELSEWHERE, ANNS_GUEST = Subject("ann", "203.0.113.2"), Subject("guest", "203.0.113.1")


def limited(
    per_session: str = "",
    per_address: str = "",
    *,
    new_sessions: str = "",
    refusals: str = "",
    tokens_per_session: str = "",
    tokens_per_address: str = "",
    tokens_total: str = "",
) -> Limits:
    return Limits(
        per_session=rates(per_session),
        per_address=rates(per_address),
        new_sessions=rates(new_sessions),
        refusals_per_address=rates(refusals),
        tokens_per_session=rates(tokens_per_session),
        tokens_per_address=rates(tokens_per_address),
        tokens_total=rates(tokens_total),
    )


def counting(clock: Clock, per_session: str = "", per_address: str = "", **more: str) -> RequestLimits:
    return RequestLimits(limited(per_session, per_address, **more), clock)


def allowed(limits: RequestLimits, subject: Subject, kind: ChargeKind = ChargeKind.QUESTION) -> bool:
    try:
        limits.charge(kind, subject)
    except TooMany:
        return False
    return True


def wait_of(refusal: Refusal) -> float:
    assert refusal.retry_after is not None
    return refusal.retry_after


# ---- requests: the windows -----------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.integers(0, 3) | st.integers(0, 80) | st.sampled_from([64, 192]),  # ticks that pass before the request
        st.sampled_from([ANN, BEN, ANN_ELSEWHERE, ANNS_GUEST]),
    ),
    max_size=60,
)
WINDOWS = {"per_session": [(2, 1), (5, 3)], "per_address": [(3, 1), (7, 3)]}
"""The model's limits: (amount, seconds)."""


def windows_limited(clock: Clock) -> RequestLimits:
    return counting(clock, "2/second;5/3 seconds", "3/second;7/3 seconds")


@dataclass
class Model:
    """Moving windows by their definition: the time and the subject of every accepted request."""

    accepted: list[tuple[float, Subject]] = field(default_factory=list)

    def counted(self, name: str, subject: Subject, seconds: int, now: float) -> int:
        owner = 0 if name == "per_session" else 1
        return sum(1 for at, charged in self.accepted if at > now - seconds and charged[owner] == subject[owner])

    def remaining(self, subject: Subject, now: float) -> list[int]:
        return [
            amount - self.counted(name, subject, seconds, now)
            for name, windows in WINDOWS.items()
            for amount, seconds in windows
        ]


@given(steps)
def test_windows_match_the_definition(walk: list[tuple[int, Subject]]) -> None:
    """A request passes exactly when every one of its moving windows has room, and counts in all of them or in none."""
    clock, model = Clock(), Model()
    limits = windows_limited(clock)
    for ticks, subject in walk:
        clock.now += ticks * TICK
        room = model.remaining(subject, clock.now)
        assert [status.remaining for status in limits.statuses(ChargeKind.QUESTION, subject)] == room
        passes = allowed(limits, subject)
        assert passes == all(room)
        if passes:
            model.accepted.append((clock.now, subject))
            room = [left - 1 for left in room]
        assert [status.remaining for status in limits.statuses(ChargeKind.QUESTION, subject)] == room


@given(steps)
def test_never_more_than_the_limit_in_any_window(walk: list[tuple[int, Subject]]) -> None:
    """No window of the limit's length, wherever it begins, holds more accepted requests than the limit."""
    clock, times = Clock(), []
    limits = counting(clock, "4/second")
    for ticks, _ in walk:
        clock.now += ticks * TICK
        if allowed(limits, ANN):
            times.append(clock.now)
    for start in times:
        assert sum(1 for at in times if start <= at < start + 1) <= 4


def test_a_place_is_free_after_exactly_the_window() -> None:
    """An entry counts until a tick before the end of its window, and no longer at the end."""
    clock = Clock()
    limits = counting(clock, "1/minute")
    assert allowed(limits, ANN)
    clock.now += 60 - TICK
    assert not allowed(limits, ANN)
    clock.now += TICK
    assert allowed(limits, ANN)


@given(steps)
def test_retry_after_is_true_of_requests(walk: list[tuple[int, Subject]]) -> None:
    """A client that waits as long as the refusal announces is accepted; a tick less is not enough."""
    clock = Clock()
    limits = windows_limited(clock)
    for ticks, subject in walk:
        clock.now += ticks * TICK
        try:
            limits.charge(ChargeKind.QUESTION, subject)
        except TooMany as refusal:
            wait = wait_of(refusal)
            assert 0 < wait <= 3
            clock.now += wait - TICK
            assert not allowed(limits, subject)
            clock.now += TICK
            assert allowed(limits, subject)


def test_a_refused_request_costs_nothing() -> None:
    """A request that the narrow window refuses does not count in the wide one."""
    clock = Clock()
    limits = counting(clock, "1/second;3/minute", "4/hour")
    assert [allowed(limits, ANN) for _ in range(50)] == [True] + [False] * 49
    for _ in range(2):
        clock.now += 1
        assert allowed(limits, ANN)
    assert [status.remaining for status in limits.statuses(ChargeKind.QUESTION, ANN)] == [0, 0, 1]
    clock.now += 1
    assert not allowed(limits, ANN)
    assert [status.remaining for status in limits.statuses(ChargeKind.QUESTION, ANN)] == [1, 0, 1]


def test_sessions_share_their_address() -> None:
    """The sessions of an address share its limit; other addresses have limits of their own."""
    limits = counting(Clock(), "2/minute", "3/minute")
    assert [allowed(limits, ANN) for _ in range(3)] == [True, True, False]
    assert [allowed(limits, ANNS_GUEST) for _ in range(2)] == [True, False]
    assert allowed(limits, BEN)


def test_a_session_keeps_its_count_when_its_address_changes() -> None:
    """A session that changes its address keeps its count."""
    limits = counting(Clock(), "2/minute", "3/minute")
    assert allowed(limits, ANN)
    assert allowed(limits, ANN_ELSEWHERE)
    assert not allowed(limits, ANN_ELSEWHERE)
    assert not allowed(limits, ANN)


def test_each_kind_has_windows_of_its_own() -> None:
    """Questions, new sessions and refusals have windows of their own, also at the same rate and address."""
    limits = counting(Clock(), per_address="1/minute", new_sessions="1/minute", refusals="1/minute")
    for event in (ChargeKind.QUESTION, ChargeKind.NEW_SESSION, ChargeKind.REFUSAL):
        assert allowed(limits, ANN, event)
        assert not allowed(limits, ANN, event)
        assert allowed(limits, BEN, event)


def test_an_empty_setting_limits_nothing() -> None:
    """An empty setting limits nothing, has no status and stores no entry."""
    limits = counting(Clock())
    assert [limits.charge(ChargeKind.QUESTION, ANN) for _ in range(10_000)][-1] == []
    assert limits.statuses(ChargeKind.QUESTION, ANN) == []
    assert limits.windows.entries == {}


def test_refusals_name_the_full_windows() -> None:
    """Questions and new sessions have error codes of their own; a refusal has the longest wait and the full windows."""
    clock = Clock()
    limits = counting(clock, "1/second;2/minute;9/hour", new_sessions="1/hour")
    limits.charge(ChargeKind.QUESTION, ANN)
    clock.now += 10
    limits.charge(ChargeKind.QUESTION, ANN)
    with pytest.raises(TooMany) as questions:
        limits.charge(ChargeKind.QUESTION, ANN)
    assert (questions.value.code, questions.value.retry_after) == ("rate_limited", 50)
    assert dict(questions.value.headers()) == {
        b"retry-after": b"50",
        b"retry-after-ms": b"50000",
        b"ratelimit-policy": b'"per_session 1/second";q=1;w=1, "per_session 2/minute";q=2;w=60',
        b"ratelimit": b'"per_session 1/second";r=0;t=1, "per_session 2/minute";r=0;t=50',
    }
    limits.charge(ChargeKind.NEW_SESSION, ANN)
    with pytest.raises(TooManySessions) as sessions:
        limits.charge(ChargeKind.NEW_SESSION, ANN)
    assert (sessions.value.code, sessions.value.retry_after) == ("too_many_sessions", 3600)


def test_statuses_give_when_the_next_place_frees() -> None:
    """A status has the limit, the remainder after this request, and the time until the oldest entry leaves."""
    clock = Clock()
    limits = counting(clock, "3/minute", "5/2 hours")
    assert limits.statuses(ChargeKind.QUESTION, ANN) == [
        LimitStatus("per_session", 3, 3, 60, 60, "3/minute"),
        LimitStatus("per_address", 5, 5, 7200, 7200, "5/2 hour"),
    ]
    limits.charge(ChargeKind.QUESTION, ANN)
    clock.now += 15
    assert limits.charge(ChargeKind.QUESTION, ANN) == [
        LimitStatus("per_session", 3, 1, 45, 60, "3/minute"),
        LimitStatus("per_address", 5, 3, 7185, 7200, "5/2 hour"),
    ]


@pytest.mark.parametrize("subject", [Subject("", "203.0.113.1"), Subject("ann", "")])
def test_an_empty_key_is_refused(subject: Subject) -> None:
    """A subject without a key raises ValueError: it would be counted together with others, or not at all."""
    limits = counting(Clock(), "5/minute", "5/minute")
    for attempt in (limits.charge, limits.statuses):
        with pytest.raises(ValueError, match="without a key"):
            attempt(ChargeKind.QUESTION, subject)
    assert limits.windows.entries == {}


# ---- requests: the memory ------------------------------------------------------------------------------------------

MANY = 30_000


def entered(windows: MovingWindows, key: str, limit: int, expiry: int) -> bool:
    """Adds an entry if the window has room for it."""
    if windows.window(key, expiry)[1] >= limit:
        return False
    windows.enter(key, expiry)
    return True


def test_dead_keys_do_not_accumulate() -> None:
    """With 100,000 clients that come and go, at most twice the live keys and SWEEP_AFTER more are stored."""
    clock, live = Clock(), 1000
    limits = counting(clock, "5/second")
    storage = limits.windows
    largest = 0
    for number in range(MANY):
        clock.now += 1 / live
        limits.charge(ChargeKind.QUESTION, Subject(f"session {number}", "203.0.113.1"))
        largest = max(largest, len(storage.entries))
    assert largest <= 2 * (live + 1) + requests.SWEEP_AFTER


def test_a_burst_of_keys_is_forgotten() -> None:
    """After a burst of 100,000 clients, later ones cause sweeps that remove the dead keys and no live key."""
    clock = Clock()
    storage = MovingWindows(clock)
    assert entered(storage, "of the day", 1, 86400)
    for number in range(MANY):
        assert entered(storage, f"burst {number}", 1, 60)
    assert len(storage.entries) == MANY + 1
    clock.now += 60
    for number in range(MANY + requests.SWEEP_AFTER):
        clock.now += TICK
        assert entered(storage, f"later {number}", 1, 1)
    assert len(storage.entries) <= 2 * 66 + requests.SWEEP_AFTER
    assert not any(key.startswith("burst") for key in storage.entries)
    assert not entered(storage, "of the day", 1, 86400)


def test_a_key_holds_no_more_than_its_limit() -> None:
    """However often a client asks, its key has at most as many times as the limit allows; old ones are removed."""
    clock = Clock()
    storage = MovingWindows(clock)
    for _ in range(1000):
        entered(storage, "key", 5, 60)
        clock.now += 7
        assert len(storage.entries["key"][1]) <= 5
    clock.now += 60
    assert storage.window("key", 60) == (clock.now, 0)
    assert len(storage.entries["key"][1]) == 0


# ---- requests: slowapi ---------------------------------------------------------------------------------------------


def test_limits_are_registered_with_slowapi() -> None:
    """A configured limit is a Limit of slowapi with its key function; the refusal's cause is slowapi's exception."""
    limits = counting(Clock(), "1/minute", "2/minute")
    registered = limits.limits[ChargeKind.QUESTION]
    assert [type(limit) for limit in registered] == [Limit, Limit]
    assert [limit.key_func(ANN) for limit in registered] == [ANN.session, ANN.address]
    limits.charge(ChargeKind.QUESTION, ANN)
    with pytest.raises(TooMany) as raised:
        limits.charge(ChargeKind.QUESTION, ANN)
    assert isinstance(raised.value.__cause__, RateLimitExceeded)


@pytest.mark.parametrize("place", [".env", "environment"])
def test_nothing_outside_the_settings_switches_limits_off(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an `.env` in the current folder nor RATELIMIT_* variables switch limits off, on or elsewhere."""
    strays = {
        "RATELIMIT_ENABLED": "false",
        "RATELIMIT_SWALLOW_ERRORS": "true",
        "RATELIMIT_HEADERS_ENABLED": "true",
        "RATELIMIT_STORAGE_URL": "memory://",
        "RATELIMIT_STRATEGY": "fixed-window",
        "RATELIMIT_DEFAULT": "1/day",
        "RATELIMIT_APPLICATION": "1/day",
        "RATELIMIT_KEY_PREFIX": "stray",
        "RATELIMIT_IN_MEMORY_FALLBACK": "1000/second",
        "RATELIMIT_IN_MEMORY_FALLBACK_ENABLED": "true",
    }
    monkeypatch.chdir(tmp_path)
    if place == ".env":
        Path(".env").write_text("".join(f"{name}={value}\n" for name, value in strays.items()))
    else:
        for name, value in strays.items():
            monkeypatch.setenv(name, value)
    limits = counting(Clock(), "2/minute")
    assert [allowed(limits, ANN) for _ in range(4)] == [True, True, False, False]
    assert {kind: [limit.error_message for limit in registered] for kind, registered in limits.limits.items()} == {
        ChargeKind.QUESTION: ["2/minute"],
        ChargeKind.NEW_SESSION: [],
        ChargeKind.REFUSAL: [],
        ChargeKind.LOGIN: ["10/minute"],
        ChargeKind.CHECK: ["600/minute"],
    }


# ---- leases --------------------------------------------------------------------------------------------------------


def leases(per_session: int = 2, per_address: int = 3, max_streams: int = 4) -> Leases:
    return Leases(Limits(streams_per_session=per_session, streams_per_address=per_address), max_streams)


def refusal_of(leases: Leases, subject: Subject) -> type[Refusal]:
    with pytest.raises(Refusal) as raised:
        leases.acquire(subject)
    assert raised.value.retry_after is not None
    assert raised.value.retry_after >= 1
    return type(raised.value)


def assert_none_held(held: Leases) -> None:
    assert (held.live, dict(held.held)) == (0, {})


def test_streams_of_a_session() -> None:
    """A session has at most its limit of live answers; the next is refused until one of them ends."""
    held = leases(per_session=2)
    with held.acquire(ANN):
        with held.acquire(ANN):
            assert refusal_of(held, ANN) is TooManyStreams
            assert refusal_of(held, ANN_ELSEWHERE) is TooManyStreams
            with held.acquire(BEN):
                pass
        with held.acquire(ANN):
            pass
    assert_none_held(held)


def test_streams_of_an_address() -> None:
    """The sessions of an address share its places."""
    held = leases(per_session=2, per_address=3)
    with held.acquire(ANN), held.acquire(ANN), held.acquire(ANNS_GUEST):
        assert refusal_of(held, ANNS_GUEST) is TooManyStreams
        with held.acquire(BEN):
            pass
    assert_none_held(held)


def test_streams_of_the_process() -> None:
    """A full process is busy for all clients, but a client over its own limit gets that limit's refusal."""
    held = leases(per_session=2, per_address=3, max_streams=3)
    with held.acquire(ANN), held.acquire(ANN), held.acquire(ANNS_GUEST):
        assert refusal_of(held, BEN) is Busy
        assert refusal_of(held, ANN) is TooManyStreams
        assert refusal_of(held, ANNS_GUEST) is TooManyStreams
    with held.acquire(BEN):
        pass
    assert_none_held(held)


def test_a_refused_lease_holds_nothing() -> None:
    """A refused lease changes no count, for any reason and however often."""
    held = leases(per_session=1, per_address=2, max_streams=2)
    with held.acquire(ANN), held.acquire(ANNS_GUEST):
        before = dict(held.held)
        for subject in [ANN, ANNS_GUEST, Subject("third", ANN.address), BEN] * 100:
            refusal_of(held, subject)
        assert (held.live, dict(held.held)) == (2, before)
    assert_none_held(held)


@pytest.mark.parametrize("left_by", [ValueError(), Busy(), KeyboardInterrupt(), GeneratorExit(), None])
def test_a_lease_is_released_on_any_exit(left_by: BaseException | None) -> None:
    """A lease is released however its stream ends."""
    held = leases(max_streams=1)
    with suppress(BaseException), held.acquire(ANN):
        assert held.live == 1
        if left_by is not None:
            raise left_by
    assert_none_held(held)


def test_equal_sessions_and_addresses_are_counted_separately() -> None:
    """A session id that equals an address is not counted as that address."""
    held = leases(per_session=1, per_address=2)
    with held.acquire(Subject("same", "same")), held.acquire(Subject("other", "same")):
        assert held.status(Subject("same", "elsewhere")) == LimitStatus("streams_per_session", 1, 0, 0)
        assert held.status(Subject("third", "same")) == LimitStatus("streams_per_session", 1, 1, 0)
    assert_none_held(held)


def test_refused_streams_name_the_limit() -> None:
    """The refusal's headers name the limit that was reached, and no window: the end of an answer is unknown."""
    held = leases(per_session=1, per_address=1)
    with held.acquire(ANN):
        for subject, name in ((ANN, b"streams_per_session"), (ANNS_GUEST, b"streams_per_address")):
            with pytest.raises(TooManyStreams) as raised:
                held.acquire(subject)
            headers = dict(raised.value.headers())
            assert headers[b"ratelimit-policy"] == b'"%s";q=1' % name
            assert headers[b"ratelimit"] == b'"%s";r=0;t=1' % name
            assert headers[b"retry-after"] == b"1"


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([ANN, BEN, ANN_ELSEWHERE, ANNS_GUEST])), max_size=60))
def test_leases_never_exceed_any_limit(walk: list[tuple[bool, Subject]]) -> None:
    """In any order of begins and ends, no count exceeds its limit, and at the end no lease is held."""
    held = leases(per_session=2, per_address=3, max_streams=4)
    live: list[tuple[Subject, Lease]] = []
    for begins, subject in walk:
        if not begins:
            if live:
                live.pop(0)[1].__exit__(None, None, None)
            continue
        of_session = sum(1 for one, _ in live if one.session == subject.session)
        of_address = sum(1 for one, _ in live if one.address == subject.address)
        if of_session >= 2 or of_address >= 3:
            assert refusal_of(held, subject) is TooManyStreams
        elif len(live) >= 4:
            assert refusal_of(held, subject) is Busy
        else:
            live.append((subject, held.acquire(subject)))
        assert held.live == len(live)
    for _, lease in live:
        lease.__exit__(None, None, None)
    assert_none_held(held)


# ---- tokens --------------------------------------------------------------------------------------------------------


def counting_tokens(clock: Clock, per_session: str = "", per_address: str = "", total: str = "") -> Tokens:
    return Tokens(limited(tokens_per_session=per_session, tokens_per_address=per_address, tokens_total=total), clock)


def reserve(token_limits: Tokens, subject: Subject, amount: int) -> Reservation:
    """Reserves in every window or in none."""
    return token_limits.reserve(token_limits.check(subject, amount), amount)


def left(token_limits: Tokens, subject: Subject = ANN) -> list[int]:
    return [status.remaining for status in token_limits.statuses(subject)]


def exhausted(token_limits: Tokens, subject: Subject, amount: int) -> TokensExhausted:
    with pytest.raises(TokensExhausted) as raised:
        reserve(token_limits, subject, amount)
    return raised.value


def test_settling_replaces_the_held_tokens_by_the_used() -> None:
    """A reservation holds its worst case; settling replaces it by the used tokens, once."""
    tokens = counting_tokens(Clock(), "1000/day")
    with reserve(tokens, ANN, 400) as reservation:
        assert left(tokens) == [600]
        reservation.settle(150)
        assert left(tokens) == [850]
        reservation.settle(400)
        assert left(tokens) == [850]
    assert left(tokens) == [850]


@pytest.mark.parametrize("left_by", [None, ValueError(), KeyboardInterrupt(), GeneratorExit()])
def test_an_unsettled_reservation_is_released(left_by: BaseException | None) -> None:
    """An answer that ends without settling, in any way, has used no tokens."""
    tokens = counting_tokens(Clock(), "1000/day", "2000/day", "3000/day")
    with suppress(BaseException), reserve(tokens, ANN, 400):
        assert left(tokens) == [600, 1600]
        if left_by is not None:
            raise left_by
    assert left(tokens) == [1000, 2000]
    assert all(window.used == 0 for window in tokens.windows.values())


def test_more_used_than_held_is_booked() -> None:
    """If the upstream counts more than was held, its count is charged: nothing remains, and requests are refused."""
    tokens = counting_tokens(Clock(), "1000/day")
    reserve(tokens, ANN, 100).settle(1500)
    assert left(tokens) == [0]
    exhausted(tokens, ANN, 1)


def test_a_burst_never_overdraws() -> None:
    """Of 1,000 parallel requests as many are let in as the allowance can pay for in the worst case."""
    tokens = counting_tokens(Clock(), "10000/day", "", "12000/day")
    held: list[Reservation] = []
    for _ in range(1000):
        with suppress(TokensExhausted):
            held.append(reserve(tokens, ANN, 300))
    assert len(held) == 33
    with suppress(TokensExhausted):
        held.extend(reserve(tokens, BEN, 300) for _ in range(1000))
    for reservation in held:
        reservation.settle(300)
    assert max(window.used for window in tokens.windows.values()) <= 12000
    assert left(tokens) == [100]


def test_the_last_token_can_be_spent() -> None:
    """A request that costs exactly the remainder is accepted; one token more is refused."""
    tokens = counting_tokens(Clock(), "1000/day")
    reserve(tokens, ANN, 400).settle(400)
    exhausted(tokens, ANN, 601)
    reserve(tokens, ANN, 600).settle(600)
    assert left(tokens) == [0]
    exhausted(tokens, ANN, 1)


def test_all_windows_or_none() -> None:
    """An amount that one window refuses is held in no other window."""
    tokens = counting_tokens(Clock(), "1000/minute;1500/day", "5000/day", "9000/day")
    exhausted(tokens, ANN, 1001)
    assert tokens.windows == {}
    reserve(tokens, ANN, 900).settle(900)
    exhausted(tokens, ANN, 101)
    assert left(tokens) == [100, 600, 4100]


def test_tokens_are_counted_by_session_address_and_server() -> None:
    """Sessions, addresses and the server are counted separately; one session does not use up another's limit."""
    tokens = counting_tokens(Clock(), "100/day", "150/day", "200/day")
    reserve(tokens, ANN, 100).settle(100)
    assert left(tokens, ANN) == [0, 50]
    assert left(tokens, ANNS_GUEST) == [100, 50]
    assert left(tokens, BEN) == [100, 150]
    exhausted(tokens, ANNS_GUEST, 51)
    reserve(tokens, BEN, 100).settle(100)
    third = Subject("third", "203.0.113.3")
    assert left(tokens, third) == [100, 150]
    refusal = exhausted(tokens, third, 1)
    assert dict(refusal.headers())[b"ratelimit"] == b'"tokens_total 200/day";r=0;t=86400'


def test_the_total_of_the_server_is_not_shown() -> None:
    """The statuses for the client do not contain the total of the server."""
    tokens = counting_tokens(Clock(), "100/day", "", "200/day")
    assert [status.name for status in tokens.statuses(ANN)] == ["tokens_per_session"]


def test_the_window_begins_with_its_first_token() -> None:
    """A fixed window begins with its first reservation; exactly at its end the whole limit is free again."""
    clock = Clock()
    tokens = counting_tokens(clock, "100/minute")
    clock.now += 1000
    reserve(tokens, ANN, 100).settle(100)
    clock.now += 60 - TICK
    assert wait_of(exhausted(tokens, ANN, 1)) == TICK
    clock.now += TICK
    assert left(tokens) == [100]
    reserve(tokens, ANN, 100).settle(100)
    clock.now += 60 - TICK
    exhausted(tokens, ANN, 1)


@pytest.mark.parametrize("used", [0, 50, 100, 500])
def test_settling_after_the_rollover_leaves_the_new_window_alone(used: int) -> None:
    """Settling an answer of an ended window does not change the next window."""
    clock = Clock()
    tokens = counting_tokens(clock, "100/minute")
    long_one = reserve(tokens, ANN, 100)
    clock.now += 60
    reserve(tokens, ANN, 30).settle(30)
    assert left(tokens) == [70]
    long_one.settle(used)
    assert left(tokens) == [70]


def test_a_rollover_of_one_window_leaves_the_others() -> None:
    """The end of the minute window does not change the day window."""
    clock = Clock()
    tokens = counting_tokens(clock, "100/minute;150/day")
    first = reserve(tokens, ANN, 100)
    clock.now += 60
    assert left(tokens) == [100, 50]
    first.settle(80)
    assert left(tokens) == [100, 70]
    assert wait_of(exhausted(tokens, ANN, 71)) == 86400 - 60


@dataclass
class ModelWindow:
    """One window of the model: its end, and the cost of each reservation in it."""

    ends: float
    costs: dict[int, int] = field(default_factory=dict)


TOKEN_LIMITS = [("session", 100, 2), ("session", 300, 10), ("address", 150, 2), ("total", 400, 10)]

token_steps = st.lists(
    st.tuples(
        st.integers(0, 20) | st.sampled_from([128, 640]),  # ticks that pass before the step
        st.sampled_from([ANN, BEN, ANN_ELSEWHERE, ANNS_GUEST]),
        st.integers(1, 100),  # the amount to reserve
        st.none() | st.tuples(st.integers(0, 10), st.integers(0, 100)),  # or: which one to settle, and its usage in %
    ),
    max_size=50,
)


@given(token_steps)
def test_tokens_match_the_definition(
    walk: list[tuple[int, Subject, int, tuple[int, int] | None]],
) -> None:
    """A reservation is accepted exactly when every window has room; the refusal's wait is exact to the tick."""
    clock = Clock()
    tokens = counting_tokens(clock, "100/2 seconds;300/10 seconds", "150/2 seconds", "400/10 seconds")
    model_windows: dict[tuple[int, str], ModelWindow] = {}
    unsettled: list[tuple[int, int, Reservation, list[ModelWindow]]] = []

    def windows_of(subject: Subject) -> list[ModelWindow]:
        keys = {"session": subject.session, "address": subject.address, "total": ""}
        windows = []
        for number, (owner, _, seconds) in enumerate(TOKEN_LIMITS):
            model_window = model_windows.get((number, keys[owner]))
            if model_window is None or model_window.ends <= clock.now:
                model_window = model_windows[(number, keys[owner])] = ModelWindow(clock.now + seconds)
            windows.append(model_window)
        return windows

    for step, (ticks, subject, amount, settled) in enumerate(walk):
        clock.now += ticks * TICK
        if settled is not None:
            if unsettled:
                number, held, reservation, touched = unsettled.pop(settled[0] % len(unsettled))
                used = held * settled[1] // 100
                reservation.settle(used)
                for model_window in touched:
                    model_window.costs[number] = used
            continue
        charged = windows_of(subject)
        full = [
            model_window.ends - clock.now
            for model_window, (_, limit, _) in zip(charged, TOKEN_LIMITS, strict=True)
            if sum(model_window.costs.values()) + amount > limit
        ]
        if full:
            assert wait_of(exhausted(tokens, subject, amount)) == max(full)
            for model_window in charged:
                if not model_window.costs:
                    model_window.ends = clock.now  # without a counted token it has not begun
            continue
        unsettled.append((step, amount, reserve(tokens, subject, amount), charged))
        for model_window in charged:
            model_window.costs[step] = amount
    shown = left(tokens)
    assert shown == [
        limit - sum(model_window.costs.values())
        for model_window, (owner, limit, _) in zip(windows_of(ANN), TOKEN_LIMITS, strict=True)
        if owner != "total"
    ]


@given(token_steps)
def test_retry_after_is_true_of_tokens(walk: list[tuple[int, Subject, int, tuple[int, int] | None]]) -> None:
    """A client that waits as long as the refusal announces is accepted; a tick less is not enough."""
    clock = Clock()
    tokens = counting_tokens(clock, "100/2 seconds;300/10 seconds", "150/2 seconds", "400/10 seconds")
    for ticks, subject, amount, _ in walk:
        clock.now += ticks * TICK
        try:
            reserve(tokens, subject, amount)
        except TokensExhausted as refusal:
            wait = wait_of(refusal)
            assert 0 < wait <= 10
            clock.now += wait - TICK
            exhausted(tokens, subject, amount)
            clock.now += TICK
            reserve(tokens, subject, amount)


def test_refused_tokens_name_the_limits() -> None:
    """The refusal has every window that lacks room, with its remainder, and the longest wait."""
    clock = Clock()
    token_limits = counting_tokens(clock, "100/minute;1000/day", "150/hour")
    reserve(token_limits, ANN, 90).settle(90)
    clock.now += 0.5
    refusal = exhausted(token_limits, ANN, 61)
    assert (refusal.status, refusal.code) == (429, "tokens_exhausted")
    headers = dict(refusal.headers())
    assert headers[b"retry-after"] == b"3600"
    assert headers[b"ratelimit-policy"] == (
        b'"tokens_per_session 100/minute";q=100;w=60, "tokens_per_address 150/hour";q=150;w=3600'
    )
    assert (
        headers[b"ratelimit"] == b'"tokens_per_session 100/minute";r=10;t=60, "tokens_per_address 150/hour";r=60;t=3600'
    )


@pytest.mark.parametrize("subject", [Subject("", "203.0.113.1"), Subject("ann", "")])
def test_tokens_refuse_an_empty_key(subject: Subject) -> None:
    """A subject without a key raises ValueError and charges no window."""
    token_limits = counting_tokens(Clock(), "100/day", "100/day")
    for attempt in (lambda: reserve(token_limits, subject, 1), lambda: token_limits.statuses(subject)):
        with pytest.raises(ValueError, match="without a key"):
            attempt()
    assert token_limits.windows == {}


def test_dead_windows_do_not_accumulate() -> None:
    """With 100,000 clients that come and go, at most twice the live windows and SWEEP_AFTER more are stored."""
    clock, live, largest = Clock(), 1000, 0
    token_limits = counting_tokens(clock, "100/second")
    for number in range(MANY):
        clock.now += 1 / live
        reserve(token_limits, Subject(f"session {number}", "203.0.113.1"), 10).settle(5)
        largest = max(largest, len(token_limits.windows))
    assert largest <= 2 * (live + 1) + tokens.SWEEP_AFTER


def test_reading_a_status_costs_no_memory() -> None:
    """Neither a status nor a refusal stores a window."""
    token_limits = counting_tokens(Clock(), "100/day")
    for number in range(100):
        token_limits.statuses(Subject(f"session {number}", "203.0.113.1"))
        exhausted(token_limits, Subject(f"session {number}", "203.0.113.1"), 101)
    assert token_limits.windows == {}


def test_a_sweep_keeps_windows_with_live_answers() -> None:
    """A sweep keeps the held tokens of windows that have not ended."""
    clock = Clock()
    token_limits = counting_tokens(clock, "100/hour")
    reservation = reserve(token_limits, ANN, 60)
    for number in range(2 * tokens.SWEEP_AFTER + 10):
        reserve(token_limits, Subject(f"session {number}", "203.0.113.1"), 1).settle(1)
    assert left(token_limits) == [40]
    reservation.settle(10)
    assert left(token_limits) == [90]


# ---- headers -------------------------------------------------------------------------------------------------------

HEADERS = [
    ("none", [], []),
    (
        "one window",
        [LimitStatus("per_session", 20, 19, 59.2, 60, "20/minute")],
        [
            (b"ratelimit-policy", b'"per_session 20/minute";q=20;w=60'),
            (b"ratelimit", b'"per_session 20/minute";r=19;t=60'),
        ],
    ),
    (
        "two windows",
        [
            LimitStatus("per_session", 20, 0, 1, 60, "20/minute"),
            LimitStatus("per_address", 9, 3, 86399.01, 86400, "9/day"),
        ],
        [
            (b"ratelimit-policy", b'"per_session 20/minute";q=20;w=60, "per_address 9/day";q=9;w=86400'),
            (b"ratelimit", b'"per_session 20/minute";r=0;t=1, "per_address 9/day";r=3;t=86400'),
        ],
    ),
    (
        "no window",
        [LimitStatus("streams_per_session", 3, 0, 1)],
        [(b"ratelimit-policy", b'"streams_per_session";q=3'), (b"ratelimit", b'"streams_per_session";r=0;t=1')],
    ),
    (
        "a moment too late",
        [LimitStatus("per_session", 20, 20, -1.3, 60, "20/minute")],
        [
            (b"ratelimit-policy", b'"per_session 20/minute";q=20;w=60'),
            (b"ratelimit", b'"per_session 20/minute";r=20;t=0'),
        ],
    ),
]


@pytest.mark.parametrize(
    ("statuses", "headers"), [case[1:] for case in HEADERS], ids=[str(case[0]) for case in HEADERS]
)
def test_limit_headers(statuses: list[LimitStatus], headers: list[tuple[bytes, bytes]]) -> None:
    """RateLimit-Policy and RateLimit follow draft-ietf-httpapi-ratelimit-headers-10; times are rounded up."""
    assert limit_headers(statuses) == headers


def every_configured_status() -> Iterator[LimitStatus]:
    clock = Clock()
    everything = "1/second;2 per minute;3/5 minutes;4 per 1 day;5/month"
    yield from counting(clock, everything, everything).statuses(ChargeKind.QUESTION, ANN)
    yield from counting_tokens(clock, everything, everything).statuses(ANN)


def test_labels_are_structured_field_strings() -> None:
    """The label of a rate, in any notation, is a string of RFC 8941 and unique within its limit."""
    labels = [f"{status.name} {status.text}" for status in every_configured_status()]
    assert len(labels) == len(set(labels)) == 20
    item = r'"[A-Za-z0-9_ /]+";q=\d+;w=\d+'
    value = dict(limit_headers(list(every_configured_status())))[b"ratelimit-policy"].decode()
    assert re.fullmatch(rf"{item}(, {item})*", value)


def test_a_rate_has_one_name() -> None:
    """Limits of requests and of tokens give the same rate the same short name."""
    names = defaultdict(set)
    for status in every_configured_status():
        names[status.window].add(status.text)
    assert dict(names) == {
        1: {"1/second"},
        60: {"2/minute"},
        300: {"3/5 minute"},
        86400: {"4/day"},
        30 * 86400: {"5/month"},
    }


# ---- memory ---------------------------------------------------------------------------------------------------------

CLIENTS = 1_000_000 if FULL else 50_000
MANY_CLIENTS = """
import sys
from proxy.limits.status import Subject
from proxy.limits.requests import RequestLimits, ChargeKind
from proxy.limits.tokens import Tokens
from proxy.settings import Limits

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

now = 0.0
requests, tokens = RequestLimits(Limits(), lambda: now), Tokens(Limits(), lambda: now)
before = held()
for number in range(int(sys.argv[1])):
    now += 0.0001
    subject = Subject(f"{number:022d}", f"2001:db8:{number >> 16:x}:{number & 65535:x}::/64")
    requests.charge(ChargeKind.NEW_SESSION, subject)
    requests.charge(ChargeKind.QUESTION, subject)
    tokens.reserve(tokens.check(subject, 100), 100).settle(20)
print(held() - before)
now += 1_000_000
for sweep in (requests.windows.make_room, tokens.make_room):
    requests.windows.sweep_at = tokens.sweep_at = 0
    sweep()
print(len(requests.windows.entries) + len(tokens.windows))
"""


@pytest.mark.process
def test_many_clients_fit_into_memory() -> None:
    """CLIENTS sessions and networks take less than 128 MB, and are removed when their windows have ended."""
    command = [sys.executable, "-c", MANY_CLIENTS, str(CLIENTS)]
    done = subprocess.run(command, env=unmeasured(), capture_output=True, text=True, check=True)
    size, left = map(int, done.stdout.split())
    assert size < 128 << 20
    assert left == 0


def test_the_oldest_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound on keys the oldest are removed; the newest keys and the total of the server are kept."""
    monkeypatch.setattr(requests, "MOST_KEYS", 1000)
    monkeypatch.setattr(tokens, "MOST_WINDOWS", 1000)
    clock = Clock()
    limits, token_limits = counting(clock, "1/day"), counting_tokens(clock, "200000/day", "1000000/day", "10000/day")
    for number in range(10_000):
        limits.charge(ChargeKind.QUESTION, Subject(str(number), str(number)))
        reserve(token_limits, Subject(str(number), str(number)), 1).settle(1)
    assert len(limits.windows.entries) <= 1000
    assert len(token_limits.windows) <= 1000
    with pytest.raises(TooMany):
        limits.charge(ChargeKind.QUESTION, Subject("9999", "9999"))
    assert token_limits.statuses(Subject("9999", "9999"))[0].remaining == 199_999
    exhausted(token_limits, Subject("another", "another"), 1)  # the total of the server is never forgotten
