"""A store that processes share, and the handling of its outages. The engine behind it is Redis or SQLite.

Rules:
1. One round trip a charge: the engine reads all its counters and charges all of them or none. Time is the store's.
2. Each call has DEADLINE, once it has its place. A call that misses it is made once more, unless another one has just
   done so; the second miss marks the store as unavailable. Until a probe succeeds every call returns None at once.
3. A call is late only if our event loop was not: after a loop that was held up, what has arrived is read first. That
   ends after LONGEST_CATCH_UP.
4. A hold (a live stream, its reserved tokens) expires HELD_SECONDS after its last renewal: the holds of a worker that
   dies are released, and what it is known to have spent is charged.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar

from proxy.limits.store.charges import Charge, ChargeResult, Revoked

T = TypeVar("T")

DEADLINE = 0.1  # seconds a call may take: a request makes two, one of them twice, and may be at most 300 ms slower
CALM = 1.0  # seconds after a miss in which a call that began after it is not made once more
LATE = 0.005  # seconds by which a timer of a free event loop is late at most
CATCH_UP = 0.02  # seconds for a loop that was held up to read what has arrived meanwhile
LONGEST_CATCH_UP = 1.0  # seconds in all: a machine without a free moment would wait for ever
AT_ONCE = 16  # calls under way; further ones would each open a socket, and wait in the store instead of here
HELD_SECONDS = 30  # a hold outlives its worker by this; it is renewed three times as often
RENEW_EVERY = HELD_SECONDS / 3
FIRST_PROBE, LAST_PROBE = 0.25, 5.0  # seconds between probes of an unavailable store; doubled each time
OPENING = 2.0  # seconds for a probe to open a connection, some round trips: no request waits for it
REPORT_EVERY = 10.0  # seconds between two log lines about an unavailable store


class Engine(Protocol):
    """Where counters and revocations are kept. Any exception means that it did not answer."""

    async def take(self, charges: list[Charge], holder: str, spent: int, *, hold: int, again: bool) -> ChargeResult:
        """Charges all or none. What it holds for `holder` expires after `hold` seconds, and `spent` is charged then.

        With `again`, an earlier call of the same holder may have been booked: it is not counted twice.
        """

    async def keep(self, what: str, used: list[tuple[Charge, int]], holder: str, *, hold: int) -> None:
        """Renews, settles or adds ("renew", "settle", "add") what the holder has in these counters."""

    async def exchange(self, since: int, keep: int, page: int, ids: list[bytes]) -> Revoked:
        """Stores revoked ids for `keep` ms, and returns those stored since `since` (ms), at most a page of them."""

    async def replace_rules(self, before: bytes, after: bytes) -> bool:
        """Replaces the rules if they are `before`; returns whether they were."""

    async def reconnect(self) -> None:
        """Drops connections that may be dead."""

    async def aclose(self) -> None: ...


class StoreGone(Exception):
    """The store has not answered, or with an error. `reason` is the error's type."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class SharedStore:
    """The shared counters. `report` gets a reason when the store is lost (at most every REPORT_EVERY), and None when it
    is available again; `on_found` is awaited before that."""

    def __init__(self, engine: Engine, clock: Callable[[], float], report: Callable[[str | None], None]) -> None:
        self.engine = engine
        self.clock = clock
        self.report = report
        self.is_up = True
        self.on_found: Callable[[], Any] | None = None
        self._places = asyncio.Semaphore(AT_ONCE)
        self._abandoned: set[asyncio.Future[Any]] = set()
        self._missed_at = -CALM
        self._misses = 0  # since the last call that was answered
        self._reported_at = -REPORT_EVERY
        self._unreported = ""  # why the store was lost
        self._probing: asyncio.Task[None] | None = None

    async def take(self, charges: list[Charge], holder: str = "", spent: int = 0) -> ChargeResult | None:
        """Charges all or none; None when the store does not answer. A holder that never settles is charged `spent`."""
        holder = holder or secrets.token_hex(8)
        return await self.call(lambda again: self.engine.take(charges, holder, spent, hold=HELD_SECONDS, again=again))

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
        amounts = list(used)

        async def kept(again: bool) -> bool:
            await self.engine.keep(what, amounts, holder, hold=HELD_SECONDS)
            return True

        return await self.call(kept) is True

    async def call(self, attempt: Callable[[bool], Awaitable[T]]) -> T | None:
        """The engine's answer; None when the store does not answer. The attempt is told whether it is another one."""
        loop, again = asyncio.get_running_loop(), False
        began = loop.time()
        while self.is_up:
            async with self._places:
                try:
                    answer = await self.ask(attempt(again), DEADLINE) if self.is_up else None
                    self._misses = 0
                    return answer
                except StoreGone as gone:
                    self._misses += 1
                    is_second = again or self._missed_at <= began < self._missed_at + CALM
                    if is_second or self._misses > AT_ONCE:  # many wait for their place behind those that miss
                        self.lose(gone.reason)
                    self._missed_at, again = loop.time(), True
        return None

    async def ask(self, asked: Awaitable[T], deadline: float) -> T:
        """The engine's answer. Raises StoreGone, `deadline` seconds after it began at the latest, and for errors of the
        engine.

        Runs in a task of its own, which is abandoned at the deadline: a client may have lost its cancellation.
        """
        asking = asyncio.ensure_future(asked)
        try:
            if not await self.in_time(asking, deadline):
                raise StoreGone("TimeoutError")
            if (error := asking.exception()) is not None:
                raise StoreGone(type(error).__name__) from error
            return asking.result()
        finally:
            if not asking.done():
                self._abandoned.add(asking)
                asking.add_done_callback(self.forget)
                asking.cancel()

    async def in_time(self, asking: asyncio.Future[Any], deadline: float) -> bool:
        """Whether it is done by the deadline, which moves while the event loop is held up."""
        loop = asyncio.get_running_loop()
        due = loop.time() + deadline
        latest = due + LONGEST_CATCH_UP
        while True:
            await asyncio.wait((asking,), timeout=max(0.0, due - loop.time()))
            if asking.done():
                return True
            if loop.time() - due < LATE or loop.time() > latest:
                return False
            due = loop.time() + CATCH_UP

    def forget(self, asking: asyncio.Future[Any]) -> None:
        self._abandoned.discard(asking)
        if not asking.cancelled():
            asking.exception()  # marks it as retrieved; otherwise asyncio would log it

    # ---- lost and found -------------------------------------------------------------------------------------------

    def lose(self, reason: str) -> None:
        if not self.is_up:
            return
        self.is_up = False
        self._unreported = reason
        self.report_if_due()
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self.probe())

    async def probe(self) -> None:
        """Repeats a charge until the store answers and has received what it missed."""
        pause = FIRST_PROBE
        while not self.is_up:
            await asyncio.sleep(pause)
            pause = min(LAST_PROBE, pause * 2)
            self.report_if_due()
            await self.try_again()
        if not self._unreported:
            self.report(None)

    def report_if_due(self) -> None:
        """Reports the loss, once, and no sooner than REPORT_EVERY after another."""
        if self._unreported and self.clock() - self._reported_at >= REPORT_EVERY:
            self._reported_at = self.clock()
            self.report(self._unreported)
            self._unreported = ""

    async def try_again(self) -> None:
        self.is_up = await self.answers()
        if self.is_up and self.on_found is not None:
            await self.on_found()

    async def answers(self) -> bool:
        """Whether the store answers in time, once there is a connection for each call.

        The connections are new: older ones may be dead, or lead to a server that is no longer the master.
        """
        try:
            await self.ask(self.engine.reconnect(), OPENING)
            await self.ask(self.charge_probe(), OPENING)
            await self.open()
            await self.ask(self.charge_probe(), DEADLINE)
        except StoreGone:
            return False
        return True

    async def open(self) -> None:
        """Opens a connection for each call: opening one may take longer than DEADLINE, so the first call would mark the
        store as unavailable."""
        calls = (self.ask(self.charge_probe(), OPENING) for _ in range(AT_ONCE))
        await asyncio.gather(*calls, return_exceptions=True)

    async def charge_probe(self) -> None:
        charge = Charge("moving", "probe", secrets.token_hex(8), 1, 1, 1)
        await self.engine.take([charge], secrets.token_hex(8), 0, hold=HELD_SECONDS, again=False)

    async def aclose(self) -> None:
        """Tries an unavailable store once more: this is the last chance to send what it missed."""
        if self._probing is not None and not self._probing.done():
            self._probing.cancel()
            await self.try_again()
        await self.engine.aclose()
