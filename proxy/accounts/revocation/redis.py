"""What was revoked, on the store that servers share: a logout on one of them is known to all within a second.

Each server asks a few times a second, in the call that also says what it has revoked itself. Nothing is asked for a
request: what was heard is in memory. Ids of sessions that have ended stand there openly, and names of users whose
sessions an operator has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from proxy.accounts.revocation.rules import RevocationRules
from proxy.limits.store.redis import PREFIX, RedisStore, StoreGone

OVERLAP = 5000  # ms that are heard twice: what was posted in the millisecond of the last question, or while it ran
DEADLINE = 2.0  # seconds: nobody waits for it, and a long list is no sign of a store that is gone
PAGE = 1000  # notices heard at once
MOST_SENT = 200  # notices posted at once

# A store that is full must still hear of a logout: both are allowed to (allow-oom).
# KEYS: the notices, the decree. ARGV: since when (ms), how long notices stay (ms), PAGE, new notices.
# A page ends with all notices of its last millisecond: the next begins after that.
EXCHANGE = """#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for n = 4, #ARGV do redis.call('ZADD', KEYS[1], now, ARGV[n]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local found = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[3])
if #found == 2 * ARGV[3] then found = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], found[#found], 'WITHSCORES') end
return {now, found, redis.call('GET', KEYS[2])}
"""
# KEYS: the decree. ARGV: what was there, what is to be there. Two operators at once do not undo each other.
REPLACE = """#!lua flags=allow-oom
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
KEYS = [f"{PREFIX}revoked", f"{PREFIX}decree"]

encode = msgspec.json.encode
decode = msgspec.json.Decoder(RevocationRules).decode


class RevokedId(msgspec.Struct, array_like=True):
    """One id that was revoked: its cookies issued up to `until` are dead, and forgotten after `forget_at`."""

    id: str
    until: int
    forget_at: int


decode_notice = msgspec.json.Decoder(RevokedId).decode


class RedisRevocations:
    """The board of one store. `keep` is for how many seconds the longest session lives."""

    def __init__(self, shared: RedisStore, keep: int) -> None:
        self.shared = shared
        self.keep = keep
        self.exchange_script = shared.client.register_script(EXCHANGE)
        self.replace_script = shared.client.register_script(REPLACE)
        self.since = 0
        self.is_behind = False  # there is more to be heard than was
        self.unsent: list[RevokedId] = []

    def post(self, notice: RevokedId) -> None:
        """Goes out with the next exchange that succeeds."""
        self.unsent.append(notice)

    async def exchange(self) -> tuple[list[RevokedId], RevocationRules | None]:
        """Some of what was revoked since the last time, and the decree in force; nothing while the store is gone."""
        sending = self.unsent[:MOST_SENT]
        arguments = [self.since, self.keep * 1000, PAGE, *map(encode, sending)]
        answer = await self.ask(self.exchange_script, KEYS, arguments)
        self.is_behind = answer is not None and len(answer[1]) >= 2 * PAGE
        if answer is None:
            return [], None
        now, headers, decree = answer
        del self.unsent[: len(sending)]
        self.since = int(headers[-1]) + 1 if self.is_behind else int(now) - OVERLAP
        return [notice for notice in map(notice_of, headers[::2]) if notice], decree_of(decree)

    async def tell_rest(self) -> None:
        """Sends what has not gone out yet, as long as the store takes it."""
        while left := len(self.unsent):
            await self.exchange()
            if len(self.unsent) == left:
                return

    async def change(self, change: Callable[[RevocationRules], RevocationRules]) -> bool:
        """Puts up a new decree. False when the store does not answer."""
        while True:
            answer = await self.ask(self.exchange_script, KEYS, [self.since, self.keep * 1000, 1])
            if answer is None:
                return False
            before = answer[2] or b""
            after = encode(change(decree_of(before) or RevocationRules()))
            replaced = await self.ask(self.replace_script, KEYS[1:], [before, after])
            if replaced != 0:
                return replaced is not None

    async def ask(self, script: Any, keys: list[str], arguments: list[Any]) -> Any:
        """The script's answer; None when there is none. Whether the store is gone others decide."""
        try:
            return await self.shared.ask(script, keys, arguments, DEADLINE)
        except StoreGone:
            return None


def notice_of(written: bytes) -> RevokedId | None:
    """None for what another version has written."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return decode_notice(written)
    return None


def decree_of(written: bytes | None) -> RevocationRules | None:
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return decode(written) if written else None
    return None
