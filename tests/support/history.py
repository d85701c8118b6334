"""Checks whether more was granted than the limits allow: a history in, violations out. Pure; imports no limiter.

Rules:
1. A grant was booked at an unknown time between its request and its answer. A violation is reported only if every time
   in between would violate the limit, so a report never depends on chance.
2. A counter that was reset (its store was emptied) begins a new history: see `split_at_resets`.
3. Times are seconds of one clock for all processes that write the history (on Linux the monotonic clock is the
   machine's).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf

STORE = "store"


@dataclass(frozen=True, slots=True)
class Grant:
    """An amount granted to `key` between `asked` and `answered`, `by` the store or by the local counters of a process.

    `until` is the time just before a hold was released; 0 for other grants.
    """

    key: str
    amount: int
    asked: float
    answered: float
    by: str = STORE
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class Violation:
    """`granted` is more than `limit`, for `key` in the window that began at `began`."""

    key: str
    began: float
    granted: int
    limit: int


def grants_by_key(grants: Iterable[Grant]) -> dict[str, list[Grant]]:
    grouped: defaultdict[str, list[Grant]] = defaultdict(list)
    for grant in grants:
        grouped[grant.key].append(grant)
    return grouped


class Total:
    """The sum of the amounts before a time."""

    def __init__(self, amounts: Iterable[tuple[float, int]]) -> None:
        ordered = sorted(amounts)
        self.times = [time for time, _ in ordered]
        self.sums = [0, *accumulate(amount for _, amount in ordered)]

    def before(self, time: float) -> int:
        return self.sums[bisect_left(self.times, time)]


def moving(grants: Iterable[Grant], limit: int, seconds: float, grain: float = 0.0) -> list[Violation]:
    """The windows of this length, wherever they begin, that hold more than the limit. `grain` is the resolution of the
    limiter's clock in seconds, by which its windows may be shorter.

    A grant lies certainly in the window from a to b if it was asked at or after a and answered before b. The sum of
    these is at least the amount answered before b less the amount asked before a.
    """
    violations = []
    for key, of_key in grants_by_key(grants).items():
        asked = Total((grant.asked, grant.amount) for grant in of_key)
        answered = Total((grant.answered, grant.amount) for grant in of_key)
        for began in dict.fromkeys(asked.times):
            granted = answered.before(began + seconds - grain) - asked.before(began)
            if granted > limit:
                violations.append(Violation(key, began, granted, limit))
    return violations


def fixed(grants: Iterable[Grant], limit: int, seconds: float, grain: float = 0.0) -> list[Violation]:
    """The same for windows that begin with the first grant after the end of the previous window.

    A window begins between `first` and `last`: not before the previous one has ended, nor before a grant was asked for,
    and at the latest at the answer to the first grant that is certainly not in the previous one. A grant of amount 0
    may have begun a window, or not.
    """
    violations = []
    for key, of_key in grants_by_key(grants).items():
        asked = sorted((grant.asked, grant.answered, grant.amount) for grant in of_key)
        answered = sorted((grant.answered, grant.asked) for grant in of_key)
        soonest = suffix_minima([answered_at if amount else inf for _, answered_at, amount in asked])
        first_asked = suffix_minima([asked_at for _, asked_at in answered])
        number, ended = 0, -inf
        while number < len(asked):  # from this grant on, none is in the previous window
            first = max(ended, first_asked[bisect_left(answered, (ended,))])
            last = soonest[number]
            ended = first + seconds - grain
            beyond = bisect_left(asked, (ended,))
            granted = sum(amount for _, answered_at, amount in asked[number:beyond] if answered_at < ended)
            if granted > limit:
                violations.append(Violation(key, first, granted, limit))
            number = bisect_left(asked, (last + seconds,))
    return violations


def suffix_minima(values: list[float]) -> list[float]:
    """The least value from each index on."""
    return list(accumulate(reversed(values), min))[::-1]


def simultaneous(grants: Iterable[Grant], limit: int) -> list[Violation]:
    """The times at which more than the limit was held. A hold lasts from its answer until just before its release."""
    violations = []
    for key, of_key in grants_by_key(grants).items():
        steps = [(grant.answered, grant.amount) for grant in of_key if grant.until > grant.answered]
        steps += [(grant.until, -grant.amount) for grant in of_key if grant.until > grant.answered]
        held = 0
        for time, amount in sorted(steps):  # at equal times, releases first
            held += amount
            if held > limit and amount > 0:
                violations.append(Violation(key, time, held, limit))
    return violations


def split_at_resets(grants: Iterable[Grant], resets: Iterable[tuple[float, float]]) -> list[list[Grant]]:
    """The histories between the resets, each of which happened between two times. A grant that may have been booked on
    either side of a reset has amount 0 on both: it may have begun a window there.
    """
    edges = sorted(resets)
    begins = [-inf, *(end for _, end in edges)]
    ends = [*(begin for begin, _ in edges), inf]
    parts: list[list[Grant]] = [[] for _ in begins]
    for grant in grants:
        earliest, latest = bisect_right(begins, grant.asked) - 1, bisect_left(ends, grant.answered)
        if earliest == latest:
            parts[earliest].append(grant)
            continue
        for part in parts[earliest : latest + 1]:
            part.append(replace(grant, amount=0, until=0.0))
    return parts
