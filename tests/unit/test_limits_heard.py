"""What was last heard of the shared store, with which local counters begin."""

from __future__ import annotations

from support.harness import Clock

from proxy.limits.heard import LastHeard
from proxy.limits.store.charges import Charge, CounterState

TOKENS = Charge("fixed", "tokens_total", "all", 100, 1000, 60)
REQUESTS = Charge("moving", "per_session", "s", 1, 5, 60)
STREAMS = Charge("held", "streams_per_session", "s", 1, 3)


def used(heard: LastHeard, charge: Charge) -> int | None:
    found = heard.of(charge.name, charge.seconds, charge.subject)
    return found.used if found else None


def test_a_counter_is_known_until_its_window_ends() -> None:
    """A fixed window ends when the store said; the last event of a moving one leaves it a window later."""
    clock = Clock()
    heard = LastHeard(clock)
    heard.note(
        [TOKENS, REQUESTS, STREAMS], [CounterState(50, 20.0), CounterState(3, 2.0), CounterState(1, 0)], booked=True
    )
    assert [used(heard, charge) for charge in (TOKENS, REQUESTS, STREAMS)] == [150, 4, None]
    clock.now += 21
    assert [used(heard, charge) for charge in (TOKENS, REQUESTS)] == [None, 4]
    clock.now += 40
    assert used(heard, REQUESTS) is None


def test_a_refused_charge_is_not_part_of_it() -> None:
    heard = LastHeard(Clock())
    heard.note([TOKENS], [CounterState(950, 20.0)], booked=False)
    assert used(heard, TOKENS) == 950


def test_what_was_not_used_is_given_back_in_its_own_window_only() -> None:
    """An answer that was held in the window before corrects nothing: that would grant the next window more."""
    clock = Clock()
    heard = LastHeard(clock)
    heard.note([TOKENS], [CounterState(0, 60.0)], booked=True)
    held_at = clock.now
    heard.correct(TOKENS, 7, held_at)
    assert used(heard, TOKENS) == 7
    clock.now += 61
    heard.note([TOKENS], [CounterState(20, 60.0)], booked=True)
    heard.correct(TOKENS, 7, held_at)
    assert used(heard, TOKENS) == 120
