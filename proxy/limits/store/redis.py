"""The counters of the limits on Redis, shared by all workers and machines: two scripts, and the handling of outages.

Rules:
1. One round trip a charge: a script reads all its counters and charges all of them or none. Time is the store's.
2. Each call has DEADLINE, once it has its place. The first that fails marks the store as unavailable; until a probe
   succeeds, every call returns None at once.
3. A hold (a live stream, its reserved tokens) expires HELD_SECONDS after its last renewal: the holds of a worker that
   dies are released, and what it is known to have spent is charged.
4. Keys are hashes: the store reveals no session, user or address.

Needs Redis 7: a store that is full must still count (allow-oom).

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
from pathlib import Path
from typing import Any, Protocol

DEADLINE = 0.14  # seconds a call may take: a request waits for two, and may be at most 300 ms slower
AT_ONCE = 16  # calls under way; further ones would each open a socket, and wait in the store instead of here
HELD_SECONDS = 30  # a hold outlives its worker by this; it is renewed three times as often
RENEW_EVERY = HELD_SECONDS / 3
FIRST_PROBE, LAST_PROBE = 0.25, 5.0  # seconds between probes of an unavailable store; doubled each time
OPENING = 2.0  # seconds for a probe to open a connection, some round trips: no request waits for it
REPORT_EVERY = 10.0  # seconds between two log lines about an unavailable store
PREFIX = "{chat-proxy}:"  # braces: one slot of a cluster, since a script needs all of its keys there

HERE = Path(__file__).parent
FUNCTIONS = (HERE / "functions.lua").read_text(encoding="utf-8")
TAKE = FUNCTIONS + (HERE / "take.lua").read_text(encoding="utf-8")
KEEP = FUNCTIONS + (HERE / "keep.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Charge:
    """An amount for one counter. `kind` is moving, fixed or held; `name` is the setting's, `seconds` the window's.

    The limit is not part of the counter's key, so changing it does not reset what was used.
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
    def key(self) -> str:
        hashed = hashlib.blake2b(f"{self.seconds} {self.subject}".encode(), digest_size=12).hexdigest()
        return f"{PREFIX}{self.name}:{hashed}"


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


def mark_of(holder: str) -> str:
    """The key that marks a holder as ended."""
    return f"{PREFIX}ended:{holder}"


def take_arguments(charges: list[Charge], holder: str = "", spent: int = 0) -> tuple[list[str], list[str | int]]:
    """Keys and arguments of take.lua."""
    holder = holder or secrets.token_hex(8)
    arguments: list[str | int] = [holder, HELD_SECONDS * 1000, spent]
    for charge in charges:
        arguments += [charge.kind, charge.amount, charge.limit, charge.seconds * 1000]
    return [mark_of(holder), *(charge.key for charge in charges)], arguments


class StoreGone(Exception):
    """The store has not answered, or with an error. `reason` is the error's type."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Client(Protocol):
    """The part of redis.asyncio.Redis that is used."""

    connection_pool: Any

    def register_script(self, script: str) -> Any: ...
    async def aclose(self) -> None: ...


class RedisStore:
    """The shared counters. `report` gets a reason when the store is lost (at most every REPORT_EVERY), and None when it
    is available again; `on_found` is awaited before that."""

    def __init__(
        self,
        client: Client,
        clock: Callable[[], float],
        *,
        report: Callable[[str | None], None],
    ) -> None:
        self.client = client
        self.clock = clock
        self.report = report
        self.is_up = True
        self.on_found: Callable[[], Any] | None = None
        self.take_script = client.register_script(TAKE)
        self.keep_script = client.register_script(KEEP)
        self._places = asyncio.Semaphore(AT_ONCE)
        self._abandoned: set[asyncio.Future[Any]] = set()
        self._reported_at = -REPORT_EVERY
        self._probing: asyncio.Task[None] | None = None

    async def take(self, charges: list[Charge], holder: str = "", spent: int = 0) -> ChargeResult | None:
        """Charges all or none; None when the store does not answer. A holder that never settles is charged `spent`."""
        answer = await self.call(self.take_script, *take_arguments(charges, holder, spent))
        if answer is None:
            return None
        numbers = [int(number) for number in answer]
        counters = [CounterState(used, free / 1000) for used, free in zip(numbers[1::2], numbers[2::2], strict=True)]
        return ChargeResult(numbers[0] == 1, counters)

    async def renew(self, spent: Iterable[tuple[Charge, int]], holder: str) -> bool:
        """Renews a hold, of which so much is spent. False when the store does not answer, as in the next two."""
        return await self.keep("renew", spent, holder)

    async def settle(self, used: Iterable[tuple[Charge, int]], holder: str) -> bool:
        """Ends a hold and charges what was used in its place; once, however often it is called."""
        return await self.keep("settle", used, holder)

    async def add(self, used: Iterable[tuple[Charge, int]], holder: str) -> bool:
        """Charges what was used while the store was unavailable: it may have lost the window."""
        return await self.keep("add", used, holder)

    async def keep(self, what: str, used: Iterable[tuple[Charge, int]], holder: str) -> bool:
        arguments: list[str | int] = [holder, HELD_SECONDS * 1000, what]
        keys = [mark_of(holder)]
        for charge, amount in used:
            keys.append(charge.key)
            arguments += [charge.kind, charge.amount, amount, charge.seconds * 1000]
        return await self.call(self.keep_script, keys, arguments) is not None

    async def call(self, script: Any, keys: list[str], arguments: list[str | int]) -> Any:
        """The script's answer; None when the store does not answer."""
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
        """The result of a call of the client. Raises StoreGone, also for the client's own errors, such as those after a
        connection has ended.

        Runs in a task of its own, which is abandoned at the deadline: the client may have lost its cancellation.
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
                self._abandoned.add(asking)
                asking.add_done_callback(self.forget)
                asking.cancel()

    def forget(self, asking: asyncio.Future[Any]) -> None:
        self._abandoned.discard(asking)
        if not asking.cancelled():
            asking.exception()  # marks it as retrieved; otherwise asyncio would log it

    # ---- lost and found -------------------------------------------------------------------------------------------

    def lose(self, reason: str) -> None:
        if not self.is_up:
            return
        self.is_up = False
        if self.clock() - self._reported_at >= REPORT_EVERY:
            self._reported_at = self.clock()
            self.report(reason)
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self.probe())

    async def probe(self) -> None:
        """Repeats a charge until the store answers and has received what it missed."""
        pause = FIRST_PROBE
        while not self.is_up:
            await asyncio.sleep(pause)
            pause = min(LAST_PROBE, pause * 2)
            await self.try_again()
        self.report(None)

    async def try_again(self) -> None:
        self.is_up = await self.answers()
        if self.is_up and self.on_found is not None:
            await self.on_found()

    async def answers(self) -> bool:
        """Whether the store answers in time, once there is a connection for each call.

        The connections are new: older ones may be dead, or lead to a server that is no longer the master.
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
        """Opens a connection for each call: opening one may take longer than DEADLINE, so the first call would mark the
        store as unavailable."""
        await asyncio.gather(*(self.book(OPENING) for _ in range(AT_ONCE)), return_exceptions=True)

    async def book(self, deadline: float) -> None:
        """Charges a counter of the probe. Raises StoreGone."""
        charge = Charge("moving", "probe", secrets.token_hex(8), 1, 1, 1)
        await self.ask(self.take_script, *take_arguments([charge]), deadline)

    async def aclose(self) -> None:
        """Tries an unavailable store once more: this is the last chance to send what it missed."""
        if self._probing is not None and not self._probing.done():
            self._probing.cancel()
            await self.try_again()
        await self.client.aclose()


def open_store(url: str, clock: Callable[[], float], report: Callable[[str | None], None]) -> RedisStore:
    """Opens the store at a URL of the `limits` package: redis://, rediss://, redis+unix://, redis+sentinel://.

    The packages are imported here since only such a store needs them.
    """
    from limits.storage import storage_from_string
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    options: dict[str, Any] = {
        "implementation": "redispy",
        "retry": Retry(NoBackoff(), 0),
    }
    storage: Any = storage_from_string(f"async+{url}", **options)
    return RedisStore(storage.bridge.get_connection(), clock, report=report)
