"""What one reply may do next, as a table. Pure.

    WAITING ──BEGIN──> STREAMING ──COMPLETE──> DONE
       │                   │
       ├─────BREAK─────────┼──> FAILED
       └─────LEAVE─────────┴──> ABORTED

Rules:
1. DONE, FAILED and ABORTED are final: whatever comes later changes nothing. So a reset right after `[DONE]` is no
   fault, and a browser that leaves after the last byte has not aborted.
2. In WAITING a fault is still a status; in STREAMING it can only be an event.
"""

from __future__ import annotations

from enum import Enum, auto


class State(Enum):
    WAITING = auto()
    STREAMING = auto()
    DONE = auto()
    ABORTED = auto()
    FAILED = auto()


class Event(Enum):
    BEGIN = auto()  # our response's headers went out
    COMPLETE = auto()  # the last byte of an answer that ended well
    BREAK = auto()  # a refusal, or an interruption
    LEAVE = auto()  # the browser is gone


FINAL = frozenset({State.DONE, State.ABORTED, State.FAILED})

TABLE: dict[State, dict[Event, State]] = {
    State.WAITING: {Event.BEGIN: State.STREAMING, Event.BREAK: State.FAILED, Event.LEAVE: State.ABORTED},
    State.STREAMING: {Event.COMPLETE: State.DONE, Event.BREAK: State.FAILED, Event.LEAVE: State.ABORTED},
}


class WrongStep(RuntimeError):
    """A step that the table does not have: a bug of ours."""


class Exchange:
    """One reply."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = State.WAITING

    def on(self, event: Event) -> bool:
        """Takes the step; False when the reply was over before (rule 1). Raises WrongStep for a step out of order."""
        if self.state in FINAL:
            return False
        try:
            self.state = TABLE[self.state][event]
        except KeyError:
            raise WrongStep(f"{event.name} in {self.state.name}") from None
        return True
