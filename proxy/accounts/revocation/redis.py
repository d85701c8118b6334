"""Revocations in the Redis that servers share: a logout on one server takes effect on all of them within a second.

Each server exchanges them several times a second: one call sends its own and receives the others'. No request waits
for it. The store holds the ids of ended sessions and the names of users whose sessions the operator revoked, in clear.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from proxy.accounts.revocation.rules import RevocationRules
from proxy.limits.store.redis import PREFIX, RedisStore, StoreGone

OVERLAP = 5000  # ms that are read twice: for revocations posted in the millisecond of the last call, or during it
DEADLINE = 2.0  # seconds: no request waits for it, and a long list takes its time
PAGE = 1000  # revoked ids received in one call
MOST_SENT = 200  # revoked ids sent in one call

HERE = Path(__file__).parent
EXCHANGE = (HERE / "exchange.lua").read_text(encoding="utf-8")
REPLACE = (HERE / "replace.lua").read_text(encoding="utf-8")
KEYS = [f"{PREFIX}revoked", f"{PREFIX}decree"]

encode = msgspec.json.encode
decode = msgspec.json.Decoder(RevocationRules).decode


class RevokedId(msgspec.Struct, array_like=True):
    """One id: its cookies issued up to `until` are revoked; the entry is forgotten after `forget_at`."""

    id: str
    until: int
    forget_at: int


decode_revoked = msgspec.json.Decoder(RevokedId).decode


class RedisRevocations:
    """The revocations in one store. `keep` is the lifetime of the longest session, in seconds."""

    def __init__(self, store: RedisStore, keep: int) -> None:
        self.store = store
        self.keep = keep
        self.exchange_script = store.client.register_script(EXCHANGE)
        self.replace_script = store.client.register_script(REPLACE)
        self.since = 0
        self.is_behind = False  # the last page was full
        self.unsent: list[RevokedId] = []

    def post(self, revoked_id: RevokedId) -> None:
        """Sends an id with the next exchange that succeeds."""
        self.unsent.append(revoked_id)

    async def exchange(self) -> tuple[list[RevokedId], RevocationRules | None]:
        """The next page of revoked ids, and the rules in force; nothing while the store is unavailable."""
        sending = self.unsent[:MOST_SENT]
        arguments = [self.since, self.keep * 1000, PAGE, *map(encode, sending)]
        answer = await self.ask(self.exchange_script, KEYS, arguments)
        self.is_behind = answer is not None and len(answer[1]) >= 2 * PAGE
        if answer is None:
            return [], None
        now, entries, rules = answer
        del self.unsent[: len(sending)]
        self.since = int(entries[-1]) + 1 if self.is_behind else int(now) - OVERLAP
        return [revoked_id for revoked_id in map(revoked_id_of, entries[::2]) if revoked_id], rules_of(rules)

    async def send_rest(self) -> None:
        """Sends the ids that were not sent yet, as long as the store accepts them."""
        while left := len(self.unsent):
            await self.exchange()
            if len(self.unsent) == left:
                return

    async def change(self, change: Callable[[RevocationRules], RevocationRules]) -> bool:
        """Replaces the rules. False when the store does not answer."""
        while True:
            answer = await self.ask(self.exchange_script, KEYS, [self.since, self.keep * 1000, 1])
            if answer is None:
                return False
            before = answer[2] or b""
            after = encode(change(rules_of(before) or RevocationRules()))
            replaced = await self.ask(self.replace_script, KEYS[1:], [before, after])
            if replaced != 0:
                return replaced is not None

    async def ask(self, script: Any, keys: list[str], arguments: list[Any]) -> Any:
        """The script's answer; None when the store does not answer."""
        try:
            return await self.store.ask(script, keys, arguments, DEADLINE)
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
