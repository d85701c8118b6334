"""The values that all kinds of limits share: the subject that is charged, and the status of a limit. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

from proxy.errors import HeaderList


class Subject(NamedTuple):
    """The subject of a charge: what the key functions read. Empty keys are errors: they would count all clients as one.

    `session` is the user's name after a login, so that a user with several sessions has one allowance.
    """

    session: str
    address: str
    is_named: bool = False


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """One limit for one subject. `resets_in` is in seconds from now."""

    name: str
    limit: int
    remaining: int
    resets_in: float
    window: int = 0  # seconds; 0 for limits without a window
    text: str = ""  # the rate as configured, like 20/minute


def keep_newest(entries: dict[Any, Any], most: int) -> None:
    """Removes the oldest entries until a fifth of `most` is free; otherwise clients could fill the memory."""
    for key in list(islice(entries, max(0, len(entries) - most * 4 // 5))):
        del entries[key]


def limit_headers(statuses: list[LimitStatus]) -> HeaderList:
    """`RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10)."""
    if not statuses:
        return []
    policies, states = [], []
    for status in statuses:
        label = f'"{status.name} {status.text}"' if status.text else f'"{status.name}"'
        window = f";w={status.window}" if status.window else ""
        policies.append(f"{label};q={status.limit}{window}")
        states.append(f"{label};r={status.remaining};t={max(0, ceil(status.resets_in))}")
    return [(b"ratelimit-policy", ", ".join(policies).encode()), (b"ratelimit", ", ".join(states).encode())]
