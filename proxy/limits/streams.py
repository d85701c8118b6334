"""Limits of live streams: how many answers a session, an address and this process may have at one time.

A lease is taken before the upstream is called and returned when the stream ends, however it ends.
"""

from __future__ import annotations

from collections import Counter

from proxy.errors import Busy, TooManyStreams
from proxy.limits.status import LimitStatus, Subject, limit_headers
from proxy.limits.store.charges import Charge
from proxy.settings import Limits

SOON = 1.0  # seconds until a retry may find a free place; the end of an answer cannot be predicted
BUSY_FOR = 5.0  # the same for a full process: longer, so that waiting clients do not all return at once


class Lease:
    """One place, returned at the end of the `with`."""

    __slots__ = ("_keys", "_leases")

    def __init__(self, leases: Leases, keys: tuple[str, str]) -> None:
        self._leases = leases
        self._keys = keys

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self._leases.release(self._keys)


class Leases:
    """The live streams of this process."""

    def __init__(self, limits: Limits, max_streams: int) -> None:
        self.per_session = limits.streams_per_session
        self.per_address = limits.streams_per_address
        self.max_streams = max_streams
        self.live = 0
        self.held: Counter[str] = Counter()

    def acquire(self, subject: Subject) -> Lease:
        """Takes a place. Raises TooManyStreams, or Busy when the process is full."""
        session, address = keys = (f"session {subject.session}", f"address {subject.address}")
        for name, key, limit in (
            ("streams_per_session", session, self.per_session),
            ("streams_per_address", address, self.per_address),
        ):
            if self.held[key] >= limit:
                headers = limit_headers([LimitStatus(name, limit, 0, SOON)])
                raise TooManyStreams(retry_after=SOON, headers=headers)
        if self.live >= self.max_streams:
            raise Busy(retry_after=BUSY_FOR, reason="max_streams")
        self.live += 1
        for key in keys:
            self.held[key] += 1
        return Lease(self, keys)

    def charges(self, subject: Subject) -> list[Charge]:
        """The same as charges for a shared store; max_streams is a limit of this process only."""
        return [
            Charge("held", "streams_per_session", subject.session, 1, self.per_session),
            Charge("held", "streams_per_address", subject.address, 1, self.per_address),
        ]

    def release(self, keys: tuple[str, str]) -> None:
        self.live -= 1
        for key in keys:
            self.held[key] -= 1
            if not self.held[key]:
                del self.held[key]

    def status(self, subject: Subject) -> LimitStatus:
        held = self.held.get(f"session {subject.session}", 0)
        return LimitStatus("streams_per_session", self.per_session, max(0, self.per_session - held), 0)
