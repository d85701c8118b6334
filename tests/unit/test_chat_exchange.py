"""What one reply may do next: every state with every event."""

from __future__ import annotations

from itertools import product

import pytest

from proxy.chat.exchange import FINAL, Event, Exchange, State, WrongStep

STEPS = {
    (State.WAITING, Event.BEGIN): State.STREAMING,
    (State.WAITING, Event.BREAK): State.FAILED,
    (State.WAITING, Event.LEAVE): State.ABORTED,
    (State.STREAMING, Event.COMPLETE): State.DONE,
    (State.STREAMING, Event.BREAK): State.FAILED,
    (State.STREAMING, Event.LEAVE): State.ABORTED,
}
CASES = list(product(State, Event))


def in_state(state: State) -> Exchange:
    exchange = Exchange()
    exchange.state = state
    return exchange


@pytest.mark.parametrize(("state", "event"), [case for case in CASES if case in STEPS])
def test_steps(state: State, event: Event) -> None:
    """A step of the table is taken, and leads where the table says."""
    exchange = in_state(state)
    assert exchange.on(event) is True
    assert exchange.state is STEPS[state, event]


@pytest.mark.parametrize(("state", "event"), [case for case in CASES if case[0] in FINAL])
def test_final_states_absorb(state: State, event: Event) -> None:
    """What is over stays as it ended: a reset after the end is no fault, and nobody leaves an answer that is told."""
    exchange = in_state(state)
    assert exchange.on(event) is False
    assert exchange.state is state


@pytest.mark.parametrize(("state", "event"), [case for case in CASES if case not in STEPS and case[0] not in FINAL])
def test_steps_out_of_order(state: State, event: Event) -> None:
    """A step that the table does not have is a bug of ours: it is said, and changes nothing."""
    exchange = in_state(state)
    with pytest.raises(WrongStep, match=f"{event.name} in {state.name}"):
        exchange.on(event)
    assert exchange.state is state


def test_final() -> None:
    """Three ways to end, and no fourth."""
    assert {State.DONE, State.FAILED, State.ABORTED} == FINAL


def test_a_reply_waits_first() -> None:
    """A fresh reply has not begun."""
    assert Exchange().state is State.WAITING
