"""The facade of all limits: requests, live streams and tokens, counted in this process or in the shared store.

Without a store, or during its outage where `when_store_fails` is local, the counters of this process decide. In an
outage they begin with what the store last answered, and the store receives what they counted when it is back. With a
store each charge is one round trip; streams hold their lease and their tokens there and renew them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType

from proxy.errors import LimitsUnavailable, Refusal, TokensExhausted, TooManyStreams
from proxy.limits.heard import MOST_COUNTERS, LastHeard
from proxy.limits.requests import ChargeKind, RequestLimits, too_many
from proxy.limits.status import LimitStatus, Subject, keep_newest, limit_headers
from proxy.limits.store.charges import Charge, CounterState
from proxy.limits.store.opening import open_store
from proxy.limits.store.shared import AT_ONCE, RENEW_EVERY, SharedStore
from proxy.limits.streams import SOON, Lease, Leases
from proxy.limits.tokens import Reservation, Tokens
from proxy.settings import Limits

RENEWED_AT_ONCE = AT_ONCE // 2  # one by one, a thousand would expire on a slow store; requests need places as well
SENT_AT_ONCE = 100  # counters in one call: thousands would block the store beyond the deadline of other calls
EVENTS_AT_ONCE = 1000  # requests in one call, for the same reason


class Permit:
    """The holdings of one answer while it is written: a place among the live streams, and the most tokens it may cost.

    `settle` charges what was used in their place; leaving the `async with` without that returns all of them. `so_far`
    gives the tokens used by now, which the store charges if this process dies.
    """

    def __init__(
        self,
        limiter: Limiter,
        lease: Lease,
        charges: list[Charge],
        holder: str,
        reservation: Reservation | None = None,
    ) -> None:
        self.limiter = limiter
        self.lease = lease
        self.charges = charges
        self.holder = holder
        self.so_far: Callable[[], int] = lambda: 0
        self.reservation = reservation  # in the local counters; None while the store has it
        self.may_be_booked = False  # the store did not answer and may have charged it all the same
        self.held_at = limiter.heard.clock()
        self.used = 0

    def settle(self, used: int) -> None:
        self.used = used

    @property
    def owed(self) -> list[tuple[Charge, int]]:
        """The charges that settle it in the store: of 0 tokens where the local counters have them."""
        used = self.used if self.reservation is None else 0
        return [(charge, used) for charge in self.charges]

    def move_to_store(self) -> None:
        """Ends the local reservation: the store holds it from now on."""
        if self.reservation is not None:
            self.reservation.settle(0)
            self.reservation = None

    async def __aenter__(self) -> Permit:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lease.__exit__(kind, error, trace)
        if self.reservation is not None:
            self.reservation.settle(self.used)
        if self.limiter.store is not None:
            await self.limiter.settle(self)


class Limiter:
    """The limits of one server. `report` gets a reason when the store is lost, and None when it is back.

    `bug` logs unexpected exceptions.
    """

    def __init__(
        self,
        limits: Limits,
        max_streams: int,
        clock: Callable[[], float],
        report: Callable[[str | None], None],
        bug: Callable[[BaseException], None],
    ) -> None:
        self.heard = LastHeard(clock)
        self.requests = RequestLimits(limits, clock, self.heard)
        self.leases = Leases(limits, max_streams)
        self.tokens = Tokens(limits, clock, self.heard)
        self.bug = bug
        self.refuses_outage = limits.when_store_fails == "refuse"
        self.store: SharedStore | None = None
        if limits.is_shared:
            self.store = open_store(limits.store, clock, report)
            self.store.on_found = self.merge
        self.permits: dict[str, Permit] = {}  # by holder: those in the store
        self.unsettled: dict[str, list[tuple[Charge, int]]] = {}  # by holder: charges that the store has not received
        self.uncounted: Counter[Charge] = Counter()  # requests that the store has not received
        self._renewing: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether the store answers; true without one."""
        return self.store is None or self.store.is_up

    async def start(self) -> None:
        if self.store is not None:
            await self.store.open()
            self._renewing = asyncio.create_task(self.renew())

    async def aclose(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        if self.store is not None:
            await self.store.aclose()

    # ---- requests -------------------------------------------------------------------------------------------------

    async def charge(self, kind: ChargeKind, subject: Subject) -> list[LimitStatus]:
        """Charges one event to all windows or none. Raises TooMany with a true Retry-After, LimitsUnavailable."""
        charges = self.requests.charges(kind, subject) if self.store else []
        result = await self.store.take(charges) if self.store and charges else None
        if result is None:
            if charges:
                self.check_outage()
            statuses = self.requests.charge(kind, subject)
            self.uncounted.update(charges)
            keep_newest(self.uncounted, MOST_COUNTERS)
            return statuses
        self.heard.note(charges, result.counters, booked=result.booked)
        if not result.booked:
            raise too_many(
                kind, [status_of(c, s) for c, s in zip(charges, result.counters, strict=True) if is_full(c, s)]
            )
        return [status_of(c, s, charged=c.amount) for c, s in zip(charges, result.counters, strict=True)]

    async def statuses(self, kind: ChargeKind, subject: Subject) -> list[LimitStatus]:
        """The subject's request and token limits; nothing is charged. Empty during an outage that refuses requests."""
        here = [*self.requests.statuses(kind, subject), *self.tokens.statuses(subject)]
        if self.store is None or not here:
            return here
        charges = [charge.of(0) for charge in (*self.requests.charges(kind, subject), *self.tokens.charges(subject, 0))]
        charges = [charge for charge in charges if charge.name != "tokens_total"]  # a visitor must not learn it
        result = await self.store.take(charges)
        if result is None:
            return [] if self.refuses_outage else here
        return [status_of(c, s) for c, s in zip(charges, result.counters, strict=True)]

    # ---- live answers ---------------------------------------------------------------------------------------------

    async def hold(self, subject: Subject, amount: int, so_far: Callable[[], int] = lambda: 0) -> Permit:
        """Raises TokensExhausted, TooManyStreams, Busy, LimitsUnavailable."""
        if self.store is None:
            return self.hold_here(subject, amount, [], "")
        charges = [*self.tokens.charges(subject, amount), *self.leases.charges(subject)]
        holder = secrets.token_hex(8)
        was_up = self.store.is_up
        result = await self.store.take(charges, holder, so_far())
        if result is None:
            permit = self.hold_in_outage(subject, amount, charges, holder, may_be_booked=was_up)
        elif not result.booked:
            self.heard.note(charges, result.counters, booked=False)
            raise full([(c, s) for c, s in zip(charges, result.counters, strict=True) if is_full(c, s)])
        else:
            self.heard.note(charges, result.counters, booked=True)
            try:
                permit = Permit(self, self.leases.acquire(subject), charges, holder)
            except BaseException:
                nothing = [(charge, 0) for charge in charges]
                if not await self.store.settle(nothing, holder):
                    self.unsettled[holder] = nothing
                raise
        permit.so_far = so_far
        self.permits[holder] = permit
        return permit

    def hold_in_outage(
        self, subject: Subject, amount: int, charges: list[Charge], holder: str, *, may_be_booked: bool
    ) -> Permit:
        """Holds in the local counters. A call that timed out may still have been charged: it is settled when the store
        returns, or the client counts twice until the hold expires."""
        try:
            self.check_outage()
            permit = self.hold_here(subject, amount, charges, holder)
        except Refusal:
            if may_be_booked:
                self.unsettled[holder] = [(charge, 0) for charge in charges]
            raise
        permit.may_be_booked = may_be_booked
        return permit

    def hold_here(self, subject: Subject, amount: int, charges: list[Charge], holder: str) -> Permit:
        """Holds in the local counters. A refused stream begins no token window."""
        windows = self.tokens.check(subject, amount)
        lease = self.leases.acquire(subject)
        try:
            return Permit(self, lease, charges, holder, self.tokens.reserve(windows, amount))
        except BaseException as error:
            lease.__exit__(type(error), error, None)
            raise

    async def settle(self, permit: Permit) -> None:
        """Settles a permit in the store; during an outage when the store returns. Unsettled holds expire there."""
        if self.store is None:
            return
        del self.permits[permit.holder]
        is_settled = permit.reservation is None and await self.store.settle(permit.owed, permit.holder)
        if is_settled:
            for charge, used in permit.owed:
                self.heard.correct(charge, used, permit.held_at)
        if not is_settled and (permit.reservation is None or permit.may_be_booked):
            self.unsettled[permit.holder] = permit.owed

    async def renew(self) -> None:
        """Renews the holds of all live answers, for ever."""
        while True:
            await asyncio.sleep(RENEW_EVERY)
            try:
                await self.renew_all()
            except Exception as error:  # noqa: BLE001  # the next round may succeed, and the leases depend on it
                self.bug(error)

    async def renew_all(self) -> None:
        holders = iter(list(self.permits))
        await asyncio.gather(*(self.renew_each(holders) for _ in range(RENEWED_AT_ONCE)))

    async def renew_each(self, holders: Iterator[str]) -> None:
        for holder in holders:
            permit = self.permits.get(holder)  # it may have ended while others were renewed
            if self.store is not None and permit is not None and permit.reservation is None:
                spent = permit.so_far()
                await self.store.renew([(charge, spent) for charge in permit.charges], holder)

    # ---- outages --------------------------------------------------------------------------------------------------

    def check_outage(self) -> None:
        """Raises LimitsUnavailable during an outage where `when_store_fails` is refuse."""
        if self.store is not None and self.refuses_outage:
            raise LimitsUnavailable

    async def merge(self) -> None:
        """Moves the holds of live answers to the store that is back, and sends it what was counted here meanwhile.

        What it does not receive, since it is lost again, is sent the next time.
        """
        if self.store is None:
            return
        for permit in self.permits.values():
            permit.move_to_store()
        for used in batches([*self.tokens.used(), *self.uncounted.items()]):
            self.unsettled[secrets.token_hex(8)] = used
        self.uncounted.clear()
        self.tokens.forget()  # before the first await: what is counted here after it has not been sent
        await self.renew_all()
        for holder, amounts in list(self.unsettled.items()):
            if not await self.store.add(amounts, holder):
                return
            del self.unsettled[holder]


def batches(used: list[tuple[Charge, int]]) -> Iterator[list[tuple[Charge, int]]]:
    """The same in parts that the store can take at once."""
    batch: list[tuple[Charge, int]] = []
    events = 0
    for charge, amount in used:
        events += amount if charge.kind == "moving" else 0
        if batch and (len(batch) == SENT_AT_ONCE or events > EVENTS_AT_ONCE):
            yield batch
            batch, events = [], amount if charge.kind == "moving" else 0
        batch.append((charge, amount))
    if batch:
        yield batch


def is_full(charge: Charge, state: CounterState) -> bool:
    return state.used + charge.amount > charge.limit


def status_of(charge: Charge, state: CounterState, charged: int = 0) -> LimitStatus:
    free_in = state.free_in if state.used else float(charge.seconds)
    remaining = max(0, charge.limit - state.used - charged)
    return LimitStatus(charge.name, charge.limit, remaining, free_in, charge.seconds, charge.text)


def full(refused: list[tuple[Charge, CounterState]]) -> TokensExhausted | TooManyStreams:
    """The refusal by these counters: tokens before streams, in the order of the local counters."""
    if tokens := [status_of(charge, state) for charge, state in refused if charge.kind == "fixed"]:
        longest = max(status.resets_in for status in tokens)
        return TokensExhausted(retry_after=longest, headers=limit_headers(tokens))
    charge, _ = refused[0]
    return TooManyStreams(retry_after=SOON, headers=limit_headers([LimitStatus(charge.name, charge.limit, 0, SOON)]))
