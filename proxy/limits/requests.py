"""Requests per moving window, through slowapi's Limiter.

slowapi gives registration, key functions, scopes and its exception; `limits` the window arithmetic behind a storage
interface. Ours is the check: all windows of one request are charged together, or none when one refuses.

Rules:
1. Nothing is read from `.env` or the environment: a stray RATELIMIT_ENABLED=false must not open the gates.
2. Time is a monotonic clock, so a wall clock that jumps neither frees nor locks anyone.
3. A key that nobody asked about for its whole window is forgotten.
"""

from __future__ import annotations

import warnings
from array import array
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

from limits import RateLimitItem
from limits.storage import MovingWindowSupport, Storage
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit

from proxy.errors import TooMany, TooManySessions
from proxy.limits.status import LimitStatus, Subject, keep_newest, limit_headers
from proxy.limits.store.redis import Charge
from proxy.settings import Limits, Rate

Clock = Callable[[], float]
Times: TypeAlias = "array[float]"
Entry: TypeAlias = "tuple[int, Times]"  # seconds an entry counts, and when each was made

SCHEME = "chat-proxy-memory"
GUESSES = Rate(10, 60, "10/minute")  # per address; a person needs three
CHECKS = Rate(600, 60, "600/minute")  # a run of `check` makes 40, and 200 where it has to ask often
MOST_KEYS = 200_000  # about 80 MB; beyond it the oldest are forgotten
SWEEP_AFTER = 4096  # new keys, and as many again as live: a sweep is linear, so its share per key is constant


def by_session(request: Subject) -> str:
    return request.session


def by_address(request: Subject) -> str:
    return request.address


# What is limited. slowapi registers limits under functions, and these are their names.


def ask(request: Subject) -> None:
    """A question to the model, refused bodies included."""


def mint(request: Subject) -> None:
    """A new session for a browser."""


def refuse(request: Subject) -> None:
    """An answer of 401 or 403."""


def guess(request: Subject) -> None:
    """A try to log in with a password."""


def diagnose(request: Subject) -> None:
    """A request of `chat-proxy check`, whoever makes it."""


Event = Callable[[Subject], None]


class Counted(NamedTuple):
    """One window of one subject: its key in the storage, when its oldest entry was made, and how many it has."""

    limit: Limit
    key: str
    oldest: float
    used: int


class RequestLimits(Limiter):
    """The request limits of one server, counted in this process."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # slowapi warns that the settings file "" is absent; so it should be
            super().__init__(
                key_func=by_address,
                config_filename="",
                strategy="moving-window",
                storage_uri=f"{SCHEME}://",
                storage_options=cast(dict[str, str], {"clock": clock}),  # handed to MovingWindows as they are
            )
        self.clock = clock
        self.watch("per_session", limits.per_session, by_session, ask)
        self.watch("per_address", limits.per_address, by_address, ask)
        self.watch("new_sessions", limits.new_sessions, by_address, mint)
        self.watch("refusals_per_address", limits.refusals_per_address, by_address, refuse)
        self.watch("logins", (GUESSES,), by_address, guess)
        self.watch("checks", (CHECKS,), by_address, diagnose)

    def get_app_config(self, key: str, default_value: Any = None) -> Any:
        """slowapi's look into `.env` and the environment, closed (rule 1)."""
        return default_value

    def watch(self, name: str, rates: tuple[Rate, ...], key_func: Callable[[Subject], str], event: Event) -> None:
        for rate in rates:
            self.shared_limit(rate.text, scope=name, key_func=key_func, error_message=rate.text)(event)

    def registered(self, event: Event) -> list[Limit]:
        found: list[Limit] = self._route_limits.get(f"{event.__module__}.{event.__name__}", [])
        return found

    def standings(self, event: Event, subject: Subject) -> list[LimitStatus]:
        """Where the subject stands in every window of the event; nothing is charged."""
        return [self.standing(counted, taken=0) for counted in self.count(event, subject)]

    def charge(self, event: Event, subject: Subject) -> list[LimitStatus]:
        """Books one event in all its windows, or in none. Raises TooMany, TooManySessions, with a true Retry-After."""
        windows = self.count(event, subject)
        full = [counted for counted in windows if counted.used >= counted.limit.limit.amount]
        if full:
            standings = [self.standing(counted, taken=0) for counted in full]
            raise too_many(event, standings) from RateLimitExceeded(full[0].limit)
        for limit, key, _, _ in windows:
            self.storage.enter(key, limit.limit.get_expiry())
        return [self.standing(counted, taken=1) for counted in windows]

    def claims(self, event: Event, subject: Subject) -> list[Charge]:
        """One event in all its windows, for a store that others share."""
        claims = []
        for limit in self.registered(event):
            whose, scope = key_of(limit, subject)
            item: RateLimitItem = limit.limit
            text = cast(str, limit.error_message)
            claims.append(Charge("moving", scope, whose, 1, item.amount, item.get_expiry(), text))
        return claims

    def count(self, event: Event, subject: Subject) -> list[Counted]:
        counted = []
        for limit in self.registered(event):
            whose, scope = key_of(limit, subject)
            key = f"{scope} {limit.error_message} {whose}"
            counted.append(Counted(limit, key, *self.storage.window(key, limit.limit.get_expiry())))
        return counted

    @property
    def storage(self) -> MovingWindows:
        return cast(MovingWindows, self.limiter.storage)

    def standing(self, counted: Counted, *, taken: int) -> LimitStatus:
        """A moving window frees a place when its oldest entry leaves it."""
        limit, _, oldest, used = counted
        item: RateLimitItem = limit.limit
        remaining = item.amount - used - taken
        window = item.get_expiry()
        text = cast(str, limit.error_message)  # the rate as it was configured, where slowapi keeps words of ours
        return LimitStatus(limit.scope, item.amount, max(0, remaining), oldest + window - self.clock(), window, text)


def too_many(event: Event, full: list[LimitStatus]) -> TooMany:
    """The refusal by these windows."""
    refusal = TooManySessions if event is mint else TooMany
    return refusal(retry_after=max(standing.resets_in for standing in full), headers=limit_headers(full))


def key_of(limit: Limit, subject: Subject) -> tuple[str, str]:
    key = limit.key_func(subject)
    if not key:
        raise ValueError("a limit without a key would count everyone as one")
    return key, limit.scope


class MovingWindows(Storage, MovingWindowSupport):
    """A `limits` storage in this process: the times of the entries that still count, oldest first.

    `limits` brings one, which keeps dead keys for ever and reads the wall clock. 8 bytes an entry, about 400 a key.
    """

    STORAGE_SCHEME: list[str] | None = [SCHEME]  # noqa: RUF012  # as `limits` declares it

    def __init__(self, uri: str | None = None, wrap_exceptions: bool = False, *, clock: Clock) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)
        self.clock = clock
        self.entries: dict[str, Entry] = {}
        self.sweep_at = SWEEP_AFTER

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def alive(self, key: str, expiry: int) -> Times:
        """The entries of the key that are younger than `expiry` seconds."""
        times = self.entries.get(key, (0, NOTHING))[1]
        if times and times[0] <= (horizon := self.clock() - expiry):
            del times[: bisect_right(times, horizon)]
        return times

    def enter(self, key: str, expiry: int, amount: int = 1) -> None:
        """Makes so many entries now, whatever the limit."""
        if key not in self.entries:
            self.make_room()
            self.entries[key] = (expiry, array("d"))
        self.entries[key][1].extend([self.clock()] * amount)

    def window(self, key: str, expiry: int) -> tuple[float, int]:
        """When the oldest entry that counts was made, and how many there are."""
        times = self.alive(key, expiry)
        return (times[0], len(times)) if times else (self.clock(), 0)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        if len(self.alive(key, expiry)) + amount > limit:
            return False
        self.enter(key, expiry, amount)
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        return self.window(key, expiry)

    def make_room(self) -> None:
        if len(self.entries) < self.sweep_at:
            return
        now = self.clock()
        self.entries = {key: entry for key, entry in self.entries.items() if entry[1] and entry[1][-1] > now - entry[0]}
        keep_newest(self.entries, MOST_KEYS)
        self.sweep_at = min(2 * len(self.entries) + SWEEP_AFTER, MOST_KEYS)

    def get(self, key: str) -> int:
        return len(self.entries.get(key, (0, NOTHING))[1])

    def get_expiry(self, key: str) -> float:
        expiry, times = self.entries.get(key, (0, NOTHING))
        return times[-1] + expiry if times else self.clock()

    def clear(self, key: str) -> None:
        self.entries.pop(key, None)

    def reset(self) -> int:
        held = len(self.entries)
        self.entries.clear()
        return held

    def check(self) -> bool:
        return True

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        raise NotImplementedError("this storage holds moving windows only")


NOTHING: Times = array("d")  # of a key that has no entries; nobody adds to it
