"""What was revoked, on the store that servers share: a logout on one of them is known to all within a second.

Each server asks every half second, in the call that also says what it has revoked itself. Nothing is asked for a
request: what was heard is in memory. Session ids stand there openly; they are those that nobody can use any more.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from proxy.limits.shared import PREFIX, Shared
from proxy.session import Decree

OVERLAP = 5000  # ms that are heard twice: what was posted in the millisecond of the last question, or while it ran

# KEYS: the notices, the decree. ARGV: since when (ms), how long notices stay (ms), new notices.
EXCHANGE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for n = 3, #ARGV do redis.call('ZADD', KEYS[1], now, ARGV[n]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {now, redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf'), redis.call('GET', KEYS[2])}
"""
KEYS = [f"{PREFIX}revoked", f"{PREFIX}decree"]

encode = msgspec.json.encode
decode = msgspec.json.Decoder(Decree).decode


class Notice(msgspec.Struct, array_like=True):
    """One id that was revoked: its cookies issued up to `until` are dead, and forgotten after `forget_at`."""

    id: str
    until: int
    forget_at: int


decode_notice = msgspec.json.Decoder(Notice).decode


class Bulletin:
    """The board of one store. `keep` is for how many seconds the longest session lives."""

    def __init__(self, shared: Shared, keep: int) -> None:
        self.shared = shared
        self.keep = keep
        self.script = shared.client.register_script(EXCHANGE)
        self.since = 0
        self.unsent: list[Notice] = []

    def post(self, notice: Notice) -> None:
        """Goes out with the next exchange that succeeds."""
        self.unsent.append(notice)

    async def exchange(self) -> tuple[list[Notice], Decree | None]:
        """What was revoked since the last time, and the decree in force; nothing while the store is gone."""
        sending = list(self.unsent)
        arguments = [self.since, self.keep * 1000, *map(encode, sending)]
        answer = await self.shared.ask(lambda: self.script(keys=KEYS, args=arguments))
        if answer is None:
            return [], None
        now, notices, decree = answer
        del self.unsent[: len(sending)]
        self.since = int(now) - OVERLAP
        return [decode_notice(notice) for notice in notices], decode(decree) if decree else None

    async def change(self, change: Callable[[Decree], Decree]) -> bool:
        """Puts up a new decree. False when the store does not answer."""
        _, decree = await self.exchange()
        changed = encode(change(decree or Decree()))
        return bool(await self.shared.ask(lambda: self.shared.client.set(KEYS[1], changed)))
