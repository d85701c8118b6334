"""Requests per moving window, counted in this process.

slowapi gives the registration of the configured limits, their key functions and its exception. The check is ours: all
windows of one request are charged together, or none when one refuses.

Rules:
1. Nothing is read from `.env` or the environment: a stray RATELIMIT_ENABLED=false must not switch limits off. So
   slowapi's Limiter, which reads both, is not used.
2. Time is a monotonic clock, so a wall clock that jumps neither frees nor locks a client.
3. A key that was not charged for its whole window is forgotten.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple, TypeAlias, cast

from limits import RateLimitItem
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit, LimitGroup

from proxy.errors import TooMany, TooManySessions
from proxy.limits.heard import LastHeard
from proxy.limits.status import LimitStatus, Subject, keep_newest, limit_headers
from proxy.limits.store.charges import Charge
from proxy.settings import Limits, Rate

Clock = Callable[[], float]
Times: TypeAlias = "array[float]"
Entry: TypeAlias = "tuple[int, Times]"  # seconds that an entry counts, and when each was made

LOGINS = Rate(10, 60, "10/minute")  # per address; a person needs three
CHECKS = Rate(600, 60, "600/minute")  # a run of `check` makes 40 requests, 200 where it has to repeat many
MOST_KEYS = 200_000  # about 80 MB; beyond it the oldest are forgotten
SWEEP_AFTER = 4096  # new keys, and as many again as remain: a sweep is linear, so its share per key is constant


class ChargeKind(Enum):
    """The kinds of events that limits count."""

    QUESTION = auto()  # a request to the model, refused bodies included
    NEW_SESSION = auto()  # a new session for a browser
    REFUSAL = auto()  # a response of 401 or 403, and the start of a login
    LOGIN = auto()  # an attempt to log in with a password
    CHECK = auto()  # a request of `chat-proxy check`, from every address


def by_session(subject: Subject) -> str:
    return subject.session


def by_address(subject: Subject) -> str:
    return subject.address


def registered(name: str, rates: tuple[Rate, ...], key_func: Callable[[Subject], str]) -> list[Limit]:
    """One configured limit as slowapi's Limit objects, a window each. `scope` is its name, `error_message` the rate."""
    limits: list[Limit] = []
    for rate in rates:
        limits += LimitGroup(
            rate.text,
            key_func,
            name,
            per_method=False,
            methods=None,
            error_message=rate.text,
            exempt_when=None,
            cost=1,
            override_defaults=False,
        )
    return limits


class Counted(NamedTuple):
    """One window of one subject: its key, when its oldest entry was made, and how many it has."""

    limit: Limit
    key: str
    oldest: float
    used: int


class RequestLimits:
    """The request limits of one server, counted in this process."""

    def __init__(self, limits: Limits, clock: Clock, heard: LastHeard | None = None) -> None:
        self.clock = clock
        self.heard = heard or LastHeard(clock)
        self.windows = MovingWindows(clock)
        self.limits: dict[ChargeKind, list[Limit]] = {
            ChargeKind.QUESTION: [
                *registered("per_session", limits.per_session, by_session),
                *registered("per_address", limits.per_address, by_address),
            ],
            ChargeKind.NEW_SESSION: registered("new_sessions", limits.new_sessions, by_address),
            ChargeKind.REFUSAL: registered("refusals_per_address", limits.refusals_per_address, by_address),
            ChargeKind.LOGIN: registered("logins", (LOGINS,), by_address),
            ChargeKind.CHECK: registered("checks", (CHECKS,), by_address),
        }

    def statuses(self, kind: ChargeKind, subject: Subject) -> list[LimitStatus]:
        """The subject's status in every window of the kind; nothing is charged."""
        return [self.status_of(counted, charged=0) for counted in self.count(kind, subject)]

    def charge(self, kind: ChargeKind, subject: Subject) -> list[LimitStatus]:
        """Charges one event to all its windows, or to none. Raises TooMany, TooManySessions with a true Retry-After."""
        windows = self.count(kind, subject)
        full = [counted for counted in windows if counted.used >= counted.limit.limit.amount]
        if full:
            statuses = [self.status_of(counted, charged=0) for counted in full]
            raise too_many(kind, statuses) from RateLimitExceeded(full[0].limit)
        for limit, key, _, _ in windows:
            self.windows.enter(key, limit.limit.get_expiry())
        return [self.status_of(counted, charged=1) for counted in windows]

    def charges(self, kind: ChargeKind, subject: Subject) -> list[Charge]:
        """One event in all its windows, for a shared store."""
        charges = []
        for limit in self.limits.get(kind, ()):
            item: RateLimitItem = limit.limit
            key, text = key_of(limit, subject), cast(str, limit.error_message)
            charges.append(Charge("moving", limit.scope, key, 1, item.amount, item.get_expiry(), text))
        return charges

    def count(self, kind: ChargeKind, subject: Subject) -> list[Counted]:
        counted = []
        for limit in self.limits.get(kind, ()):
            subject_key, seconds = key_of(limit, subject), limit.limit.get_expiry()
            key = f"{limit.scope} {limit.error_message} {subject_key}"
            oldest, used = self.windows.window(key, seconds)
            heard = self.heard.of(limit.scope, seconds, subject_key)
            if heard and (shared := heard.used + self.windows.since(key, heard.at)) > used:
                oldest, used = heard.at, shared  # when its entries leave the window is not known: at the end, at last
            counted.append(Counted(limit, key, oldest, used))
        return counted

    def status_of(self, counted: Counted, *, charged: int) -> LimitStatus:
        """A moving window frees a place when its oldest entry leaves it."""
        limit, _, oldest, used = counted
        item: RateLimitItem = limit.limit
        seconds, text = item.get_expiry(), cast(str, limit.error_message)
        remaining = max(0, item.amount - used - charged)
        return LimitStatus(limit.scope, item.amount, remaining, oldest + seconds - self.clock(), seconds, text)


def too_many(kind: ChargeKind, full: list[LimitStatus]) -> TooMany:
    """The refusal by these windows."""
    refusal = TooManySessions if kind is ChargeKind.NEW_SESSION else TooMany
    return refusal(retry_after=max(status.resets_in for status in full), headers=limit_headers(full))


def key_of(limit: Limit, subject: Subject) -> str:
    key = limit.key_func(subject)
    if not key:
        raise ValueError("a limit without a key would count all clients as one")
    return key


class MovingWindows:
    """The times of the entries that still count, by key, oldest first. 8 bytes an entry, about 400 a key.

    The storage of the `limits` package keeps dead keys for ever and reads the wall clock.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.entries: dict[str, Entry] = {}
        self.sweep_at = SWEEP_AFTER

    def enter(self, key: str, expiry: int) -> None:
        """Adds an entry now, whatever the limit."""
        if key not in self.entries:
            self.make_room()
            self.entries[key] = (expiry, array("d"))
        self.entries[key][1].append(self.clock())

    def window(self, key: str, expiry: int) -> tuple[float, int]:
        """When the oldest entry younger than `expiry` seconds was made, and how many there are; now and 0 for none."""
        times = self.entries.get(key, (0, NO_TIMES))[1]
        if times and times[0] <= (horizon := self.clock() - expiry):
            del times[: bisect_right(times, horizon)]
        return (times[0], len(times)) if times else (self.clock(), 0)

    def since(self, key: str, moment: float) -> int:
        """The number of entries made after a moment."""
        times = self.entries.get(key, (0, NO_TIMES))[1]
        return len(times) - bisect_right(times, moment)

    def make_room(self) -> None:
        if len(self.entries) < self.sweep_at:
            return
        now = self.clock()
        self.entries = {key: entry for key, entry in self.entries.items() if entry[1] and entry[1][-1] > now - entry[0]}
        keep_newest(self.entries, MOST_KEYS)
        self.sweep_at = min(2 * len(self.entries) + SWEEP_AFTER, MOST_KEYS)


NO_TIMES: Times = array("d")  # of a key without entries; never changed
