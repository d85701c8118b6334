"""Was more granted than the limits allow? A pure checker: a history in, violations out; it knows no limiter.

Rules:
1. Nobody knows when exactly a grant was booked, only that it was between the question and the answer. What is reported
   has happened wherever in between it was: no violation is a matter of luck.
2. A counter that began anew (its store was emptied) begins a new history: see `apart`.
3. Times are seconds of one clock for all who write the history (on Linux the monotonic clock is the machine's).
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
    """So much was granted to `key`, between `asked` and `answered`. `by` the store, or by a process alone.

    Of what is held for a while `until` is when it was about to be given back.
    """

    key: str
    amount: int
    asked: float
    answered: float
    by: str = STORE
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class Violation:
    """More than `limit` was granted to `key` in the window that began at `began`."""

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
    """How much of it was before a time."""

    def __init__(self, amounts: Iterable[tuple[float, int]]) -> None:
        ordered = sorted(amounts)
        self.times = [time for time, _ in ordered]
        self.sums = [0, *accumulate(amount for _, amount in ordered)]

    def before(self, time: float) -> int:
        return self.sums[bisect_left(self.times, time)]


def moving(grants: Iterable[Grant], limit: int, seconds: float, grain: float = 0.0) -> list[Violation]:
    """Where a window of this length, wherever one lays it, holds more than the limit. `grain`: how coarse the limiter's
    clock is, which makes its windows so much shorter.

    In a window from a to b lies for certain what was answered before b and asked from a on: at least what was answered
    before b, less what was asked before a.
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
    """The same of windows that begin with the first grant after the one before has ended.

    Each begins between `first` and `last`: not before the one before it has ended nor before anything was asked, and at
    the latest when the first that is surely not of the one before was answered. What is worth nothing may have begun
    one, or not.
    """
    violations = []
    for key, of_key in grants_by_key(grants).items():
        asked = sorted((grant.asked, grant.answered, grant.amount) for grant in of_key)
        answered = sorted((grant.answered, grant.asked) for grant in of_key)
        soonest = suffix_minima([answered_at if amount else inf for _, answered_at, amount in asked])
        first_asked = suffix_minima([asked_at for _, asked_at in answered])
        number, ended = 0, -inf
        while number < len(asked):  # from this one on none is of the window before
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
    """For each place the least value from there on."""
    return list(accumulate(reversed(values), min))[::-1]


def simultaneous(grants: Iterable[Grant], limit: int) -> list[Violation]:
    """Where more than the limit was held at one time: from the answer until it was about to be given back."""
    violations = []
    for key, of_key in grants_by_key(grants).items():
        steps = [(grant.answered, grant.amount) for grant in of_key if grant.until > grant.answered]
        steps += [(grant.until, -grant.amount) for grant in of_key if grant.until > grant.answered]
        held = 0
        for time, amount in sorted(steps):  # of one time, what is given back first
            held += amount
            if held > limit and amount > 0:
                violations.append(Violation(key, time, held, limit))
    return violations


def split_at_resets(grants: Iterable[Grant], resets: Iterable[tuple[float, float]]) -> list[list[Grant]]:
    """The histories between the resets, each of which happened between two times. A grant that may have been booked on
    either side of one is worth nothing on both: there it may have begun a window, no more is known.
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
