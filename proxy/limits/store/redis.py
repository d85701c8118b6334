"""The limits' truth on Redis, shared by all workers and machines: two scripts, and what if it does not answer.

Rules:
1. One round trip a question: a script looks at all counters of it and books in all of them or in none. Time is the
   server's.
2. Each call has DEADLINE, once it has its place. The first that fails takes the store for gone; until a probe finds it
   again nobody waits for it, and every call says None at once.
3. What is held (a live stream, its reserved tokens) expires by itself HELD_SECONDS after it was renewed last: a worker
   that dies gives back what it held, and pays what it was known to have spent.
4. Keys are hashes: who looks into the store learns no session, user or address from the limits.

Wants Redis 7: a store that is full must still count.

Kinds of counters, by their key:

    moving   sorted set: an entry for each event, its time as score              requests
    fixed    hash: used, held, ends; sorted set `:h`: reservations by expiry      tokens
    held     sorted set: leases by expiry                                        live streams
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

DEADLINE = 0.14  # seconds a call may take: a request waits for two, and must not be 300 ms slower
AT_ONCE = 16  # calls under way; more would open a socket each, and only wait in the store instead of here
HELD_SECONDS = 30  # what is held outlives its worker by this; it is renewed three times as often
RENEW_EVERY = HELD_SECONDS / 3
FIRST_PROBE, LAST_PROBE = 0.25, 5.0  # seconds between probes while it is gone; doubled each time
OPENING = 2.0  # seconds for a probe to open a connection, some round trips: nobody waits for it
TELL_EVERY = 10.0  # seconds between two lines about it
PREFIX = "{chat-proxy}:"  # braces: one slot of a cluster, or a script could not have all of its keys

FUNCTIONS = """#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function forget_dead(key)
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', key .. ':h', '-inf', now)) do
        local id, amount = string.match(member, '^(.*):(%d+)$')
        local spent = redis.call('HGET', key, id) or 0
        redis.call('HINCRBY', key, 'held', -amount)
        redis.call('HINCRBY', key, 'used', spent)
        redis.call('HSET', key, 'paid:' .. id, spent)
        redis.call('ZREM', key .. ':h', member)
    end
end

-- It was not dead after all: what it was made to pay is its own again.
local function pay_back(key, id)
    local paid = redis.call('HGET', key, 'paid:' .. id)
    if not paid then return end
    redis.call('HINCRBY', key, 'used', -paid)
    redis.call('HDEL', key, 'paid:' .. id)
end

-- What is in the counter now, and in how many milliseconds there will be less than `limit` again: a server that allows
-- more may have put more in. Where the clock has gone back (or a server with another one has taken over), nothing is of
-- later than now, or it would count for longer.
local function look(kind, key, window, limit)
    if kind == 'moving' then
        for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. now, '+inf')) do
            redis.call('ZADD', key, now, member)
        end
        redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)
        local found = redis.call('ZCARD', key)
        local first = math.max(0, found - limit)
        local leaving = redis.call('ZRANGE', key, first, first, 'WITHSCORES')[2]
        return found, leaving and leaving + window - now or 0
    elseif kind == 'fixed' then
        local ends = tonumber(redis.call('HGET', key, 'ends') or 0)
        if ends <= now then
            redis.call('DEL', key, key .. ':h')
            return 0, window
        elseif ends > now + window then
            ends = now + window
            redis.call('HSET', key, 'ends', ends)
        end
        forget_dead(key)
        local found = redis.call('HMGET', key, 'used', 'held')
        return (found[1] or 0) + (found[2] or 0), ends - now
    end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    return redis.call('ZCARD', key), 0
end

local function open(key, window)
    if redis.call('EXISTS', key) == 1 then return end
    redis.call('HSET', key, 'used', 0, 'held', 0, 'ends', now + window)
    redis.call('PEXPIRE', key, window)
end

local function hold_tokens(key, id, amount, spent, hold, window)
    local member = id .. ':' .. amount
    open(key, window)
    redis.call('HSET', key, id, spent)
    if not redis.call('ZSCORE', key .. ':h', member) then redis.call('HINCRBY', key, 'held', amount) end
    redis.call('ZADD', key .. ':h', now + hold, member)
    redis.call('PEXPIRE', key .. ':h', window)
end

local function hold_lease(key, id, hold)
    redis.call('ZADD', key, now + hold, id)
    redis.call('PEXPIRE', key, hold)
end
"""

# KEYS: the holder's mark, then the counters. ARGV: the holder's id, how long it holds (ms), what it has spent, then for
# each counter: kind, amount, limit, window (ms).
# Returns 1 or 0 for booked or not, then for each counter: what was in it before, and ms until some of that is free.
# Of a holder that has ended nobody waits for the answer: the question was long on its way.
TAKE = (
    FUNCTIONS
    + """
local id, hold, spent = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local booked, answer = 1, {1}
if redis.call('EXISTS', KEYS[1]) == 1 then return {0} end
for n = 2, #KEYS do
    local key, at = KEYS[n], 4 + (n - 2) * 4
    local limit = tonumber(ARGV[at + 2])
    local found, free = look(ARGV[at], key, tonumber(ARGV[at + 3]), limit)
    if found + ARGV[at + 1] > limit then booked = 0 end
    answer[#answer + 1], answer[#answer + 2] = found, free
end
answer[1] = booked
if booked == 0 then return answer end
for n = 2, #KEYS do
    local key, at = KEYS[n], 4 + (n - 2) * 4
    local kind, amount, window = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 3])
    if kind == 'moving' and amount > 0 then
        redis.call('ZADD', key, now, id)
        redis.call('PEXPIRE', key, window)
    elseif kind == 'fixed' and amount > 0 then
        hold_tokens(key, id, amount, spent, hold, window)
    elseif kind == 'held' and amount > 0 then
        hold_lease(key, id, hold)
    end
end
return answer
"""
)

# KEYS: the holder's mark, then the counters. ARGV: the holder's id, how long it holds (ms), what to do, then for each
# counter: kind, reserved amount, used amount, window (ms).
# `renew` sees to it that what is held is held, for another while, also in a store that has forgotten, and says what it
# has used by now. `settle` ends it and books what was used, once: its answer may be lost, and it is asked again. The
# mark stands for an hour: in an outage that lasts longer, the few answers that were being settled at its beginning are
# booked twice; marks of a day would take as much memory as all else. It never makes a window: one that is over is
# nobody's any more. `add` does, since what it books was used while the store was away.
KEEP = (
    FUNCTIONS
    + """
local id, hold, what = ARGV[1], tonumber(ARGV[2]), ARGV[3]
if what == 'renew' then
    if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
elseif not redis.call('SET', KEYS[1], 1, 'NX', 'PX', 3600000) then
    return 1
end
for n = 2, #KEYS do
    local key, at = KEYS[n], 4 + (n - 2) * 4
    local kind, amount, used, window = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    look(kind, key, window, 0)
    if kind == 'held' and what == 'renew' then
        hold_lease(key, id, hold)
    elseif kind == 'held' then
        redis.call('ZREM', key, id)
    elseif what == 'renew' then
        pay_back(key, id)
        hold_tokens(key, id, amount, used, hold, window)
    else
        pay_back(key, id)
        redis.call('HDEL', key, id)
        local ended = redis.call('ZREM', key .. ':h', id .. ':' .. amount)
        if ended == 1 then redis.call('HINCRBY', key, 'held', -amount) end
        if what == 'add' and used > 0 then open(key, window) end
        if redis.call('EXISTS', key) == 1 then redis.call('HINCRBY', key, 'used', used) end
    end
end
return 1
"""
)


@dataclass(frozen=True, slots=True)
class Charge:
    """So much of one counter. `kind` is moving, fixed or held; `name` the setting's; `seconds` the window's.

    The counter is the window's, whatever its limit: who changes that has not got back what was used.
    """

    kind: str
    name: str
    whose: str
    amount: int
    limit: int
    seconds: int = 0
    text: str = ""

    def of(self, amount: int) -> Charge:
        return replace(self, amount=amount)

    @property
    def key(self) -> str:
        hashed = hashlib.blake2b(f"{self.seconds} {self.whose}".encode(), digest_size=12).hexdigest()
        return f"{PREFIX}{self.name}:{hashed}"


@dataclass(frozen=True, slots=True)
class CounterState:
    """What a counter held before, and in how many seconds some of it will be free."""

    used: int
    free_in: float


@dataclass(frozen=True, slots=True)
class ChargeResult:
    """The answer to claims: all `booked`, or none."""

    booked: bool
    found: list[CounterState]


def mark_of(holder: str) -> str:
    """The key that says it has ended."""
    return f"{PREFIX}ended:{holder}"


def taking(claims: list[Charge], holder: str = "", spent: int = 0) -> tuple[list[str], list[str | int]]:
    """What TAKE wants for these."""
    holder = holder or secrets.token_hex(8)
    arguments: list[str | int] = [holder, HELD_SECONDS * 1000, spent]
    for claim in claims:
        arguments += [claim.kind, claim.amount, claim.limit, claim.seconds * 1000]
    return [mark_of(holder), *(claim.key for claim in claims)], arguments


class StoreGone(Exception):
    """The store has not answered, or not what was asked. `reason` is the kind of error."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Client(Protocol):
    """What is used of redis.asyncio.Redis."""

    connection_pool: Any

    def register_script(self, script: str) -> Any: ...
    async def aclose(self) -> None: ...


class RedisStore:
    """The shared counters. `tell` hears of each time the store is lost (a reason, at most every TELL_EVERY) or found
    (None); `on_found` is awaited before it counts as found."""

    def __init__(
        self,
        client: Client,
        clock: Callable[[], float],
        *,
        tell: Callable[[str | None], None],
    ) -> None:
        self.client = client
        self.clock = clock
        self.tell = tell
        self.is_up = True
        self.on_found: Callable[[], Any] | None = None
        self.take_script = client.register_script(TAKE)
        self.keep_script = client.register_script(KEEP)
        self._places = asyncio.Semaphore(AT_ONCE)
        self._left_behind: set[asyncio.Future[Any]] = set()
        self._told_at = -TELL_EVERY
        self._probing: asyncio.Task[None] | None = None

    async def take(self, claims: list[Charge], holder: str = "", spent: int = 0) -> ChargeResult | None:
        """Books all claims or none; None when the store does not answer. `spent` is what a holder will have used even
        if nothing is ever heard of it again."""
        answer = await self.call(self.take_script, *taking(claims, holder, spent))
        if answer is None:
            return None
        numbers = [int(number) for number in answer]
        found = [CounterState(used, free / 1000) for used, free in zip(numbers[1::2], numbers[2::2], strict=True)]
        return ChargeResult(numbers[0] == 1, found)

    async def renew(self, spent: Iterable[tuple[Charge, int]], holder: str) -> bool:
        """Holds on to what is held, of which so much is spent. False when the store does not answer, here as below."""
        return await self.keep("renew", spent, holder)

    async def settle(self, used: Iterable[tuple[Charge, int]], holder: str) -> bool:
        """Gives back what was held, and books what was used in its place; once, however often it is asked."""
        return await self.keep("settle", used, holder)

    async def add(self, used: Iterable[tuple[Charge, int]], holder: str) -> bool:
        """The same for what was used while the store was gone: it may have forgotten the window."""
        return await self.keep("add", used, holder)

    async def keep(self, what: str, used: Iterable[tuple[Charge, int]], holder: str) -> bool:
        arguments: list[str | int] = [holder, HELD_SECONDS * 1000, what]
        keys = [mark_of(holder)]
        for claim, amount in used:
            keys.append(claim.key)
            arguments += [claim.kind, claim.amount, amount, claim.seconds * 1000]
        return await self.call(self.keep_script, keys, arguments) is not None

    async def call(self, script: Any, keys: list[str], arguments: list[str | int]) -> Any:
        """The script's answer; None when there is none."""
        if not self.is_up:
            return None
        try:
            async with self._places:
                return await self.ask(script, keys, arguments, DEADLINE) if self.is_up else None
        except StoreGone as gone:
            self.lose(gone.reason)
            return None

    async def ask(self, script: Any, keys: list[str], arguments: list[Any], deadline: float) -> Any:
        """The script's answer. Raises StoreGone, after `deadline` seconds at the latest."""
        return await self.within(deadline, script(keys=keys, args=arguments))

    async def within(self, deadline: float, doing: Awaitable[Any]) -> Any:
        """What comes of something that the client does. Raises StoreGone: also for errors that are the client's own,
        such as it has when a connection ends under its hands.

        In a task of its own, which is left behind then: nobody waits for a client that has lost its cancellation.
        """
        asking = asyncio.ensure_future(doing)
        try:
            if not (await asyncio.wait((asking,), timeout=deadline))[0]:
                raise StoreGone("TimeoutError")
            if (error := asking.exception()) is not None:
                raise StoreGone(type(error).__name__) from error
            return asking.result()
        finally:
            if not asking.done():
                self._left_behind.add(asking)
                asking.add_done_callback(self.forget)
                asking.cancel()

    def forget(self, asking: asyncio.Future[Any]) -> None:
        self._left_behind.discard(asking)
        if not asking.cancelled():
            asking.exception()  # seen, or asyncio would tell of it

    # ---- lost and found -------------------------------------------------------------------------------------------

    def lose(self, reason: str) -> None:
        if not self.is_up:
            return
        self.is_up = False
        if self.clock() - self._told_at >= TELL_EVERY:
            self._told_at = self.clock()
            self.tell(reason)
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self.probe())

    async def probe(self) -> None:
        """Asks again and again, with a booking, until the store is found and has heard what it missed."""
        pause = FIRST_PROBE
        while not self.is_up:
            await asyncio.sleep(pause)
            pause = min(LAST_PROBE, pause * 2)
            await self.look()
        self.tell(None)

    async def look(self) -> None:
        self.is_up = await self.answers()
        if self.is_up and self.on_found is not None:
            await self.on_found()

    async def answers(self) -> bool:
        """Does it answer in time, once there is a connection for each call?

        New ones: those of before may lead nowhere, or to a server that is not the master any more.
        """
        try:
            await self.within(OPENING, self.client.connection_pool.disconnect(inuse_connections=False))
            await self.book(OPENING)
            await self.open()
            await self.book(DEADLINE)
        except StoreGone:
            return False
        return True

    async def open(self) -> None:
        """Sees to a connection for each call: opening one may take longer than a call has, and whoever asks first would
        take the store for gone."""
        await asyncio.gather(*(self.book(OPENING) for _ in range(AT_ONCE)), return_exceptions=True)

    async def book(self, deadline: float) -> None:
        """Anything, to see whether it can be done. Raises StoreGone."""
        claim = Charge("moving", "probe", secrets.token_hex(8), 1, 1, 1)
        await self.ask(self.take_script, *taking([claim]), deadline)

    async def aclose(self) -> None:
        """A store that is gone is asked once more: who ends now has no other time to tell it what it missed."""
        if self._probing is not None and not self._probing.done():
            self._probing.cancel()
            await self.look()
        await self.client.aclose()


def open_store(url: str, clock: Callable[[], float], tell: Callable[[str | None], None]) -> RedisStore:
    """The store at a URL as `limits` reads it: redis://, rediss://, redis+unix://, redis+sentinel://.

    Its packages are needed only where there is such a store.
    """
    from limits.storage import storage_from_string
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    options: dict[str, Any] = {
        "implementation": "redispy",
        "retry": Retry(NoBackoff(), 0),
    }
    storage: Any = storage_from_string(f"async+{url}", **options)
    return RedisStore(storage.bridge.get_connection(), clock, tell=tell)
