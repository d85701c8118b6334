"""The values that pass between the limits and a store: what is charged, and what its counters hold. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Charge:
    """An amount for one counter. `kind` is moving, fixed or held; `name` is the setting's, `seconds` the window's.

    The limit is not part of the counter's key, so changing it does not reset what was used. The key is hashed: a store
    reveals no session, user or address.
    """

    kind: str
    name: str
    subject: str
    amount: int
    limit: int
    seconds: int = 0
    text: str = ""

    def of(self, amount: int) -> Charge:
        return replace(self, amount=amount)

    @property
    def counter(self) -> tuple[str, int, str]:
        """What identifies the counter within this process."""
        return self.name, self.seconds, self.subject

    @property
    def key(self) -> str:
        hashed = hashlib.blake2b(f"{self.seconds} {self.subject}".encode(), digest_size=12).hexdigest()
        return f"{self.name}:{hashed}"


@dataclass(frozen=True, slots=True)
class CounterState:
    """The content of a counter before a charge, and the seconds until some of it is free."""

    used: int
    free_in: float


@dataclass(frozen=True, slots=True)
class ChargeResult:
    """The answer to a list of charges: all `booked`, or none."""

    booked: bool
    counters: list[CounterState]


@dataclass(frozen=True, slots=True)
class Revoked:
    """One page of revocations: the store's time (ms), entries with the time each was stored (ms), and the rules."""

    now: int
    entries: list[tuple[bytes, int]]
    rules: bytes
