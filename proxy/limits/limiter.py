"""What everybody may still ask: one door to the three kinds of limits, counted here or on the shared store.

Without a store, or while it is gone and `when_store_fails` is local, the counters of this process decide. With one,
each question is one round trip; streams hold their lease and their tokens there, renewed while they live.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from types import TracebackType

from proxy.errors import LimitsUnavailable, Refusal, TokensExhausted, TooManyStreams
from proxy.limits.requests import Event, RequestLimits, too_many
from proxy.limits.status import LimitStatus, Subject, limit_headers
from proxy.limits.store.redis import AT_ONCE, RENEW_EVERY, Charge, CounterState, RedisStore, open_store
from proxy.limits.streams import SOON, Lease, Leases
from proxy.limits.tokens import Reservation, Tokens
from proxy.settings import Limits

RENEWED_AT_ONCE = AT_ONCE // 2  # one by one, a thousand would expire on a slow store; requests need places, too
TOLD_AT_ONCE = 100  # counters in one question: thousands would hold the store up for everybody, beyond the deadline


class Permit:
    """What one answer holds while it is written: its place among the live streams, and the most it may cost.

    `settle` books what was used in its place; leaving the `async with` without that gives all of it back. `so_far` says
    what has been used: should this process die, the store books that.
    """

    def __init__(
        self,
        allowance: Limiter,
        lease: Lease,
        claims: list[Charge],
        holder: str,
        reservation: Reservation | None = None,
    ) -> None:
        self.allowance = allowance
        self.lease = lease
        self.claims = claims
        self.holder = holder
        self.so_far: Callable[[], int] = lambda: 0
        self.reservation = reservation  # of the counters here; None while the store has it
        self.is_unheard = False  # asked of the store, which may have booked it without our hearing so
        self.used = 0

    def settle(self, used: int) -> None:
        self.used = used

    @property
    def owed(self) -> list[tuple[Charge, int]]:
        """What the store is to book in place of what it holds: nothing where the counters here have it."""
        used = self.used if self.reservation is None else 0
        return [(claim, used) for claim in self.claims]

    def leave_to_store(self) -> None:
        """From now on the store holds what this process held in its place."""
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
        if self.allowance.shared is not None:
            await self.allowance.settle(self)


class Limiter:
    """The limits of one server. `tell` hears when the store is lost (why) and found (None), `bug` of other failures."""

    def __init__(
        self,
        limits: Limits,
        max_streams: int,
        clock: Callable[[], float],
        tell: Callable[[str | None], None],
        bug: Callable[[BaseException], None],
    ) -> None:
        self.requests = RequestLimits(limits, clock)
        self.leases = Leases(limits, max_streams)
        self.tokens = Tokens(limits, clock)
        self.bug = bug
        self.refuses_alone = limits.when_store_fails == "refuse"
        self.shared: RedisStore | None = None
        if limits.is_shared:
            self.shared = open_store(limits.store, clock, tell)
            self.shared.on_found = self.merge
        self.holds: dict[str, Permit] = {}  # those that the store knows of, or should
        self.unsettled: dict[str, list[tuple[Charge, int]]] = {}  # by holder: what the store has not heard yet
        self._renewing: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Does the store answer? Always, where there is none."""
        return self.shared is None or self.shared.is_up

    async def start(self) -> None:
        if self.shared is not None:
            await self.shared.open()
            self._renewing = asyncio.create_task(self.renew())

    async def aclose(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        if self.shared is not None:
            await self.shared.aclose()

    # ---- requests -------------------------------------------------------------------------------------------------

    async def charge(self, event: Event, subject: Subject) -> list[LimitStatus]:
        """Books one event in all its windows, or in none. Raises TooMany with a true Retry-After, LimitsUnavailable."""
        claims = self.requests.claims(event, subject) if self.shared else []
        taken = await self.shared.take(claims) if self.shared and claims else None
        if taken is None:
            if claims:
                self.check_alone()
            return self.requests.charge(event, subject)
        if not taken.booked:
            raise too_many(
                event, [standing(c, f, 0) for c, f in zip(claims, taken.found, strict=True) if is_full(c, f)]
            )
        return [standing(claim, found, claim.amount) for claim, found in zip(claims, taken.found, strict=True)]

    async def standings(self, event: Event, subject: Subject) -> list[LimitStatus]:
        """Where the subject stands in requests and tokens; nothing is booked. Of a store that is gone, and that nobody
        stands in for, nothing is known."""
        here = [*self.requests.standings(event, subject), *self.tokens.standings(subject)]
        if self.shared is None or not here:
            return here
        claims = [claim.of(0) for claim in (*self.requests.claims(event, subject), *self.tokens.claims(subject, 0))]
        claims = [claim for claim in claims if claim.name != "tokens_total"]  # not the page's business
        taken = await self.shared.take(claims)
        if taken is None:
            return [] if self.refuses_alone else here
        return [standing(claim, found, 0) for claim, found in zip(claims, taken.found, strict=True)]

    # ---- live answers ---------------------------------------------------------------------------------------------

    async def hold(self, subject: Subject, amount: int, so_far: Callable[[], int] = lambda: 0) -> Permit:
        """Raises TokensExhausted, TooManyStreams, Busy, LimitsUnavailable."""
        if self.shared is None:
            return self.hold_here(subject, amount, [], "")
        claims = [*self.tokens.claims(subject, amount), *self.leases.claims(subject)]
        holder = secrets.token_hex(8)
        was_up = self.shared.is_up
        taken = await self.shared.take(claims, holder, so_far())
        if taken is None:
            hold = self.hold_alone(subject, amount, claims, holder, is_unheard=was_up)
        elif not taken.booked:
            raise full([(c, f) for c, f in zip(claims, taken.found, strict=True) if is_full(c, f)])
        else:
            try:
                hold = Permit(self, self.leases.acquire(subject), claims, holder)
            except BaseException:
                nothing = [(claim, 0) for claim in claims]
                if not await self.shared.settle(nothing, holder):
                    self.unsettled[holder] = nothing
                raise
        hold.so_far = so_far
        self.holds[holder] = hold
        return hold

    def hold_alone(
        self, subject: Subject, amount: int, claims: list[Charge], holder: str, *, is_unheard: bool
    ) -> Permit:
        """While the store is gone. A question that it may have heard is settled when it is back, or who asked would be
        in his own way until that expires."""
        try:
            self.check_alone()
            hold = self.hold_here(subject, amount, claims, holder)
        except Refusal:
            if is_unheard:
                self.unsettled[holder] = [(claim, 0) for claim in claims]
            raise
        hold.is_unheard = is_unheard
        return hold

    def hold_here(self, subject: Subject, amount: int, claims: list[Charge], holder: str) -> Permit:
        """By the counters of this process. Who gets no place begins no window of tokens."""
        windows = self.tokens.check(subject, amount)
        lease = self.leases.acquire(subject)
        try:
            return Permit(self, lease, claims, holder, self.tokens.reserve(windows, amount))
        except BaseException as error:
            lease.__exit__(type(error), error, None)
            raise

    async def settle(self, hold: Permit) -> None:
        """Tells the store. One that is gone hears of it when it is back; what it holds expires by itself."""
        assert self.shared is not None
        del self.holds[hold.holder]
        is_heard = hold.reservation is None and await self.shared.settle(hold.owed, hold.holder)
        if not is_heard and (hold.reservation is None or hold.is_unheard):
            self.unsettled[hold.holder] = hold.owed

    async def renew(self) -> None:
        """Holds on to what the live answers of this process hold."""
        while True:
            await asyncio.sleep(RENEW_EVERY)
            try:
                await self.renew_all()
            except Exception as error:  # noqa: BLE001  # the next time may go well, and the leases depend on it
                self.bug(error)

    async def renew_all(self) -> None:
        holders = iter(list(self.holds))
        await asyncio.gather(*(self.renew_each(holders) for _ in range(RENEWED_AT_ONCE)))

    async def renew_each(self, holders: Iterator[str]) -> None:
        assert self.shared is not None
        for holder in holders:
            hold = self.holds.get(holder)  # it may have ended while others were renewed
            if hold is not None and hold.reservation is None:
                spent = hold.so_far()
                await self.shared.renew([(claim, spent) for claim in hold.claims], holder)

    # ---- alone ----------------------------------------------------------------------------------------------------

    def check_alone(self) -> None:
        """Raises LimitsUnavailable where the operator would rather refuse than count alone."""
        if self.shared is not None and self.refuses_alone:
            raise LimitsUnavailable

    async def merge(self) -> None:
        """The store is back. It takes over what live answers hold, and hears what ended ones have used; what it does
        not hear, since it is gone again, is told the next time. Requests stay counted here: they would be again in the
        next outage.
        """
        assert self.shared is not None
        for hold in self.holds.values():
            hold.leave_to_store()
        used = self.tokens.used()
        for first in range(0, len(used), TOLD_AT_ONCE):
            self.unsettled[secrets.token_hex(8)] = used[first : first + TOLD_AT_ONCE]
        self.tokens.forget()  # before anything is waited for: what is counted here after that is not told yet
        await self.renew_all()
        for holder, amounts in list(self.unsettled.items()):
            if not await self.shared.add(amounts, holder):
                return
            del self.unsettled[holder]


def is_full(claim: Charge, found: CounterState) -> bool:
    return found.used + claim.amount > claim.limit


def standing(claim: Charge, found: CounterState, taken: int) -> LimitStatus:
    free_in = found.free_in if found.used else float(claim.seconds)
    remaining = max(0, claim.limit - found.used - taken)
    return LimitStatus(claim.name, claim.limit, remaining, free_in, claim.seconds, claim.text)


def full(found: list[tuple[Charge, CounterState]]) -> TokensExhausted | TooManyStreams:
    """Tokens before streams, as the counters of one process tell them."""
    if tokens := [standing(claim, found, 0) for claim, found in found if claim.kind == "fixed"]:
        longest = max(standing.resets_in for standing in tokens)
        return TokensExhausted(retry_after=longest, headers=limit_headers(tokens))
    claim, _ = found[0]
    return TooManyStreams(retry_after=SOON, headers=limit_headers([LimitStatus(claim.name, claim.limit, 0, SOON)]))
