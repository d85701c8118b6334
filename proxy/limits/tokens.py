"""Token limits: the most that an answer may cost is reserved before it, and its real cost is settled after it.

The windows are fixed and begin with the first token counted in them. A reservation is the prompt's estimate plus the
largest possible answer, so parallel requests cannot overdraw a limit: each of them holds its worst case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.errors import TokensExhausted
from proxy.limits.heard import LastHeard
from proxy.limits.status import LimitStatus, Subject, keep_newest, limit_headers
from proxy.limits.store.charges import Charge
from proxy.settings import Limits, Rate

MOST_WINDOWS = 100_000  # about 35 MB; beyond it the oldest are forgotten
SWEEP_AFTER = 4096  # new windows, and as many again as remain, between two sweeps for ended ones


@dataclass(slots=True)
class Window:
    """The tokens used in it, of which the shared store knows `heard`. `ends` is in seconds of the monotonic clock."""

    ends: float
    used: int = 0
    heard: int = 0


class Reservation:
    """Tokens held for one answer. Settled once; leaving the `with` without that returns all of them."""

    __slots__ = ("_windows", "amount")

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.settle(0)

    def __init__(self, windows: list[Window], amount: int) -> None:
        self._windows = windows
        self.amount = amount

    def settle(self, used: int) -> None:
        """Replaces the held tokens by the used ones. A window that has ended meanwhile no longer counts."""
        for window in self._windows:
            window.used += used - self.amount
        self._windows = []


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """One configured limit; `key` selects what it counts by."""

    name: str
    rate: Rate
    key: Callable[[Subject], str]


class Tokens:
    """The token limits of one server, counted in this process."""

    def __init__(self, limits: Limits, clock: Callable[[], float], heard: LastHeard | None = None) -> None:
        self.clock = clock
        self.heard = heard or LastHeard(clock)
        self.limits = [
            *(
                TokenLimit("tokens_per_session", rate, lambda subject: subject.session)
                for rate in limits.tokens_per_session
            ),
            *(
                TokenLimit("tokens_per_address", rate, lambda subject: subject.address)
                for rate in limits.tokens_per_address
            ),
            *(TokenLimit("tokens_total", rate, lambda subject: "all") for rate in limits.tokens_total),
        ]
        self.windows: dict[tuple[int, str], Window] = {}
        self.sweep_at = SWEEP_AFTER

    def reserve(self, windows: dict[tuple[int, str], Window], amount: int) -> Reservation:
        """Holds `amount` tokens in all windows, which `check` has just returned."""
        self.make_room()
        for key, window in windows.items():
            window.used += amount
            self.windows[key] = window
        return Reservation(list(windows.values()), amount)

    def check(self, subject: Subject, amount: int) -> dict[tuple[int, str], Window]:
        """The subject's windows, if all have room for `amount`; nothing is held. Raises TokensExhausted."""
        held = [(limit, key, self.window(limit, key)) for limit, key in self.keys(subject)]
        short = [self.status_of(limit, window) for limit, _, window in held if window.used + amount > limit.rate.amount]
        if short:
            wait = max(status.resets_in for status in short)
            raise TokensExhausted(retry_after=wait, headers=limit_headers(short))
        return {key: window for _, key, window in held}

    def charges(self, subject: Subject, amount: int) -> list[Charge]:
        """The same as charges for a shared store."""
        return [self.charge_of(limit, key, amount) for limit, key in self.keys(subject)]

    def charge_of(self, limit: TokenLimit, key: tuple[int, str], amount: int) -> Charge:
        rate = limit.rate
        return Charge("fixed", limit.name, key[1], amount, rate.amount, rate.seconds, rate.text)

    def used(self) -> list[tuple[Charge, int]]:
        """The tokens used here, and not known to the shared store, in the windows that have not ended."""
        now = self.clock()
        return [
            (self.charge_of(self.limits[key[0]], key, 0), window.used - window.heard)
            for key, window in self.windows.items()
            if window.ends > now and window.used > window.heard
        ]

    def forget(self) -> None:
        """Leaves counting to the shared store again. Should it be lost before it answers, these windows go on."""
        now = self.clock()
        for key, window in self.windows.items():
            if window.ends > now:
                self.heard.keep(self.charge_of(self.limits[key[0]], key, 0), window.used, window.ends)
        self.windows.clear()

    def statuses(self, subject: Subject) -> list[LimitStatus]:
        """The subject's status; without tokens_total: a visitor must not learn what the server has left."""
        return [
            self.status_of(limit, self.window(limit, key))
            for limit, key in self.keys(subject)
            if limit.name != "tokens_total"
        ]

    def status_of(self, limit: TokenLimit, window: Window) -> LimitStatus:
        rate = limit.rate
        remaining = max(0, rate.amount - window.used)
        return LimitStatus(limit.name, rate.amount, remaining, window.ends - self.clock(), rate.seconds, rate.text)

    def keys(self, subject: Subject) -> list[tuple[TokenLimit, tuple[int, str]]]:
        """The limits that count for the subject. A named user cannot evade a limit by a new session, so the address,
        which others may share, is not charged."""
        charged = []
        for number, limit in enumerate(self.limits):
            if subject.is_named and limit.name == "tokens_per_address":
                continue
            key = limit.key(subject)
            if not key:
                raise ValueError("a limit without a key would count all clients as one")
            charged.append((limit, (number, key)))
        return charged

    def window(self, limit: TokenLimit, key: tuple[int, str]) -> Window:
        """The current window of the key, or the one that would begin now."""
        window, now = self.windows.get(key), self.clock()
        if window and window.ends > now:
            return window
        heard = self.heard.of(limit.name, limit.rate.seconds, key[1])
        return Window(heard.ends, heard.used, heard.used) if heard else Window(now + limit.rate.seconds)

    def make_room(self) -> None:
        if len(self.windows) < self.sweep_at:
            return
        now = self.clock()
        self.windows = {key: window for key, window in self.windows.items() if window.ends > now}
        keep_newest(self.windows, MOST_WINDOWS)
        self.sweep_at = min(2 * len(self.windows) + SWEEP_AFTER, MOST_WINDOWS)
