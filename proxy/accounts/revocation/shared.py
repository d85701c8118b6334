"""Revocations in the store that servers share: a logout on one server takes effect on all of them within a second.

Each server exchanges them several times a second: one call sends its own and receives the others'. No request waits
for it. The store holds the ids of ended sessions and the names of users whose sessions the operator revoked, in clear.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import msgspec

from proxy.accounts.revocation.rules import RevocationRules
from proxy.limits.store.charges import Revoked
from proxy.limits.store.shared import SharedStore, StoreGone

OVERLAP = 5000  # ms that are read twice: for revocations posted in the millisecond of the last call, or during it
DEADLINE = 2.0  # seconds: no request waits for it, and a long list takes its time
PAGE = 1000  # revoked ids received in one call
MOST_SENT = 200  # revoked ids sent in one call

encode = msgspec.json.encode
decode = msgspec.json.Decoder(RevocationRules).decode


class RevokedId(msgspec.Struct, array_like=True):
    """One id: its cookies issued up to `until` are revoked; the entry is forgotten after `forget_at`."""

    id: str
    until: int
    forget_at: int


decode_revoked = msgspec.json.Decoder(RevokedId).decode


class SharedRevocations:
    """The revocations in one store. `keep` is the lifetime of the longest session, in seconds."""

    def __init__(self, store: SharedStore, keep: int) -> None:
        self.store = store
        self.keep = keep
        self.since = 0
        self.is_behind = False  # the last page was full
        self.unsent: list[RevokedId] = []

    def post(self, revoked_id: RevokedId) -> None:
        """Sends an id with the next exchange that succeeds."""
        self.unsent.append(revoked_id)

    async def exchange(self) -> tuple[list[RevokedId], RevocationRules | None]:
        """The next page of revoked ids, and the rules in force; nothing while the store is unavailable."""
        sending = self.unsent[:MOST_SENT]
        found = await self.ask(PAGE, list(map(encode, sending)))
        self.is_behind = found is not None and len(found.entries) >= PAGE
        if found is None:
            return [], None
        del self.unsent[: len(sending)]
        self.since = found.entries[-1][1] + 1 if self.is_behind else found.now - OVERLAP
        revoked = [revoked_id_of(written) for written, _ in found.entries]
        return [revoked_id for revoked_id in revoked if revoked_id], rules_of(found.rules)

    async def send_rest(self) -> None:
        """Sends the ids that were not sent yet, as long as the store accepts them."""
        while left := len(self.unsent):
            await self.exchange()
            if len(self.unsent) == left:
                return

    async def change(self, change: Callable[[RevocationRules], RevocationRules]) -> bool:
        """Replaces the rules. False when the store does not answer."""
        while True:
            found = await self.ask(1, [])
            if found is None:
                return False
            after = encode(change(rules_of(found.rules) or RevocationRules()))
            try:
                if await self.store.ask(self.store.engine.replace_rules(found.rules, after), DEADLINE):
                    return True
            except StoreGone:
                return False

    async def ask(self, page: int, ids: list[bytes]) -> Revoked | None:
        """A page of what the store has; None when it does not answer."""
        try:
            return await self.store.ask(self.store.engine.exchange(self.since, self.keep * 1000, page, ids), DEADLINE)
        except StoreGone:
            return None


def revoked_id_of(written: bytes) -> RevokedId | None:
    """Decodes one entry; None for one of another version."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return decode_revoked(written)
    return None


def rules_of(written: bytes | None) -> RevocationRules | None:
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return decode(written) if written else None
    return None
