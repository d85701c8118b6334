"""How much they may ask: requests, live streams, tokens. What crosses the three rooms is defined here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

from proxy.errors import HeaderList


class Subject(NamedTuple):
    """Who pays: what the key functions see. Empty keys are refused, they would count everyone as one.

    `session` is the user's own name once one has logged in: who has many sessions has still one allowance.
    """

    session: str
    address: str
    is_named: bool = False


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """One limit as it stands for one subject. `resets_in` is in seconds from now."""

    name: str
    limit: int
    remaining: int
    resets_in: float
    window: int = 0  # seconds; 0 for limits that know no time
    text: str = ""  # the window as it was configured, like 20/minute


def keep_newest(entries: dict[Any, Any], most: int) -> None:
    """Forgets the oldest until there is room for a fifth of `most` again, or strangers could fill the memory."""
    for key in list(islice(entries, max(0, len(entries) - most * 4 // 5))):
        del entries[key]


def limit_headers(standings: list[LimitStatus]) -> HeaderList:
    """`RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10)."""
    if not standings:
        return []
    policies, states = [], []
    for standing in standings:
        label = f'"{standing.name} {standing.text}"' if standing.text else f'"{standing.name}"'
        window = f";w={standing.window}" if standing.window else ""
        policies.append(f"{label};q={standing.limit}{window}")
        states.append(f"{label};r={standing.remaining};t={max(0, ceil(standing.resets_in))}")
    return [(b"ratelimit-policy", ", ".join(policies).encode()), (b"ratelimit", ", ".join(states).encode())]
