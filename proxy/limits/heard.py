"""What the shared store last answered about each counter. The counters of this process begin with it in an outage.

Otherwise each outage would grant every limit anew. A counter's content is known as of the last answer, and other
processes may have added to it since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from proxy.limits.status import keep_newest
from proxy.limits.store.charges import Charge, CounterState

MOST_COUNTERS = 100_000  # about 25 MB; beyond it the oldest are forgotten


class Heard(NamedTuple):
    """A counter's content at the time `at`, and when its window ends. Seconds of the monotonic clock."""

    used: int
    at: float
    ends: float


class LastHeard:
    """The last answers. Counters of live streams are left out: each process has its own at hand."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._counters: dict[tuple[str, int, str], Heard] = {}

    def note(self, charges: list[Charge], counters: list[CounterState], *, booked: bool) -> None:
        """Notes the answer to a list of charges. A moving window's last entry leaves it a whole window later."""
        now = self.clock()
        for charge, state in zip(charges, counters, strict=True):
            used = state.used + charge.amount * booked
            ends = now + (charge.seconds if charge.kind == "moving" else state.free_in)
            if used and charge.kind != "held":
                self._counters.pop(charge.counter, None)  # so that the newest stay the last
                self._counters[charge.counter] = Heard(used, now, ends)
        if len(self._counters) > MOST_COUNTERS:
            keep_newest(self._counters, MOST_COUNTERS)

    def keep(self, charge: Charge, used: int, ends: float) -> None:
        """Notes what was counted here when the store is about to receive it: it may be lost before it answers again."""
        self._counters[charge.counter] = Heard(used, self.clock(), ends)

    def correct(self, charge: Charge, used: int, held_at: float) -> None:
        """A charge that was held at that time is settled: its window has `used` in place of the charge's amount."""
        heard = self._counters.get(charge.counter)
        if heard is not None and charge.kind == "fixed" and heard.ends - charge.seconds <= held_at:
            self._counters[charge.counter] = heard._replace(used=heard.used + used - charge.amount)

    def of(self, name: str, seconds: int, subject: str) -> Heard | None:
        """None for a counter that was not heard of, or whose window has ended."""
        heard = self._counters.get((name, seconds, subject))
        return heard if heard is not None and heard.ends > self.clock() else None
