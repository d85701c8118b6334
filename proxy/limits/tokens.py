"""Tokens: what an answer may cost is reserved before, and what it did cost is settled after.

Fixed windows that begin with the first token counted in them. The reservation is the prompt's estimate plus the
most that may be answered, so a burst of parallel requests cannot overdraw: each of them holds its worst case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.errors import TokensExhausted
from proxy.limits.status import LimitStatus, Subject, keep_newest, limit_headers
from proxy.limits.store.redis import Charge
from proxy.settings import Limits, Rate

MOST_WINDOWS = 100_000  # about 35 MB; beyond it the oldest are forgotten
SWEEP_AFTER = 4096  # new windows, and as many again as live, between two sweeps for dead ones


@dataclass(slots=True)
class Window:
    """What was used since it began; both ends in seconds of the monotonic clock."""

    ends: float
    used: int = 0


class Reservation:
    """Tokens held for one answer. Settled once; leaving the `with` unsettled gives all of them back."""

    __slots__ = ("_windows", "amount")

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.settle(0)

    def __init__(self, windows: list[Window], amount: int) -> None:
        self._windows = windows
        self.amount = amount

    def settle(self, used: int) -> None:
        """Books what was used in place of what was held. A window that has ended meanwhile is nobody's any more."""
        for window in self._windows:
            window.used += used - self.amount
        self._windows = []


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """One configured limit and whose tokens it counts."""

    name: str
    rate: Rate
    key: Callable[[Subject], str]


class Tokens:
    """The token limits of one server, counted in this process."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.purses = [
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
        """Holds `amount` tokens in all windows, which `check` has just found to have room."""
        self.make_room()
        for key, window in windows.items():
            window.used += amount
            self.windows[key] = window
        return Reservation(list(windows.values()), amount)

    def check(self, subject: Subject, amount: int) -> dict[tuple[int, str], Window]:
        """The windows that have room for it; nothing is held. Raises TokensExhausted."""
        held = [(purse, key, self.window(purse, key)) for purse, key in self.keys(subject)]
        short = [
            self.standing_of(purse, window) for purse, _, window in held if window.used + amount > purse.rate.amount
        ]
        if short:
            wait = max(standing.resets_in for standing in short)
            raise TokensExhausted(retry_after=wait, headers=limit_headers(short))
        return {key: window for _, key, window in held}

    def claims(self, subject: Subject, amount: int) -> list[Charge]:
        """The same for a store that others share."""
        return [self.claim(purse, key, amount) for purse, key in self.keys(subject)]

    def claim(self, purse: TokenLimit, key: tuple[int, str], amount: int) -> Charge:
        rate = purse.rate
        return Charge("fixed", purse.name, key[1], amount, rate.amount, rate.seconds, rate.text)

    def used(self) -> list[tuple[Charge, int]]:
        """What was used in the windows that still run."""
        now = self.clock()
        return [
            (self.claim(self.purses[key[0]], key, 0), window.used)
            for key, window in self.windows.items()
            if window.ends > now and window.used > 0
        ]

    def forget(self) -> None:
        self.windows.clear()

    def standings(self, subject: Subject) -> list[LimitStatus]:
        """Where the subject stands; what the whole server has left is not the page's business."""
        return [
            self.standing_of(purse, self.window(purse, key))
            for purse, key in self.keys(subject)
            if purse.name != "tokens_total"
        ]

    def standing_of(self, purse: TokenLimit, window: Window) -> LimitStatus:
        rate = purse.rate
        remaining = max(0, rate.amount - window.used)
        return LimitStatus(purse.name, rate.amount, remaining, window.ends - self.clock(), rate.seconds, rate.text)

    def keys(self, subject: Subject) -> list[tuple[TokenLimit, tuple[int, str]]]:
        """The purses that the subject pays from. Who is named cannot get round a limit by a new session, so the
        address, which others may share, does not pay."""
        found = []
        for number, purse in enumerate(self.purses):
            if subject.is_named and purse.name == "tokens_per_address":
                continue
            whose = purse.key(subject)
            if not whose:
                raise ValueError("a limit without a key would count everyone as one")
            found.append((purse, (number, whose)))
        return found

    def window(self, purse: TokenLimit, key: tuple[int, str]) -> Window:
        """The window that runs for the key, or the one that would begin now."""
        window, now = self.windows.get(key), self.clock()
        return window if window and window.ends > now else Window(now + purse.rate.seconds)

    def make_room(self) -> None:
        if len(self.windows) < self.sweep_at:
            return
        now = self.clock()
        self.windows = {key: window for key, window in self.windows.items() if window.ends > now}
        keep_newest(self.windows, MOST_WINDOWS)
        self.sweep_at = min(2 * len(self.windows) + SWEEP_AFTER, MOST_WINDOWS)
