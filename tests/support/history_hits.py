"""Processes that call the limits as their plans require, and record each grant. See test_history.py.

Each line of the input is a Plan. A process is forked for it, since the imports take longer than the work, and its id is
printed. Each line of a history is written at once, so that it survives a SIGKILL:

    charge SESSION ADDRESS AMOUNT ASKED ANSWERED BY UNTIL   a request was granted
    hold SESSION ADDRESS AMOUNT ASKED ANSWERED BY UNTIL     a stream was held, and AMOUNT tokens were used
    pending SESSION ADDRESS ASKED NUMBER                    a call for tokens and a stream begins
    resolved NUMBER                                         the effect of that call on the store is recorded
    renewed SESSION|ADDRESS|all BEGAN ENDED                 a renewal or a merge may have begun a window of tokens;
                                                            both times are equal when the store did not answer
    refused | unavailable                                   the call was refused, or could not be counted
    restored AT                                             the store is back; the local token windows are forgotten
    end HELD                                                the plan is done, with the number of holds that remain
    bug ERROR                                               an unexpected exception
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import uvloop

from proxy.errors import LimitsUnavailable, TokensExhausted, TooMany, TooManyStreams
from proxy.limits import limiter as limiter_module
from proxy.limits.limiter import Limiter
from proxy.limits.requests import ChargeKind
from proxy.limits.status import Subject
from proxy.limits.store import shared as store_module
from proxy.limits.store.charges import Charge, ChargeResult
from proxy.settings import from_variables
from support.history import STORE

SESSIONS, ADDRESSES = 8, 2
NEW_KEYS_EVERY = 5.0  # seconds: in a long history the begin of a fixed window could no longer be determined
HOLD_SECONDS = 0.02  # on average; a few holds last LONG_HOLD
LONG_HOLD = 1.5
AMOUNTS = (50, 150)  # tokens of one answer
BOOKED, REFUSED, UNANSWERED, NOT_ASKED = "booked", "refused", "unanswered", "not asked"
store_answer: ContextVar[str] = ContextVar("store_answer", default=NOT_ASKED)
local_since: ContextVar[float] = ContextVar("local_since")  # no await between it and the local decision


@dataclass
class Plan:
    """The work of one process. `limits` are settings; each of `tasks` tasks pauses `pause` seconds on average."""

    name: str
    hits: int
    path: str
    limits: dict[str, str]
    pause: float = 0.0
    tasks: int = 8
    renew_every: float = 1.0  # seconds
    deadline: float = 0.5  # long: a process that is not scheduled for a moment must not lose its store


class History:
    """The limiter of this process, and the file that records its calls."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.file = Path(plan.path).open("ab", buffering=0)  # noqa: SIM115  # open as long as the process
        needed = {"UPSTREAM_BASE_URL": "http://127.0.0.1/v1", "UPSTREAM_API_KEY": "k" * 30, "POLICY_MODELS": "m"}
        chosen = from_variables({f"CHAT_PROXY_{name}": value for name, value in {**needed, **plan.limits}.items()})
        self.limiter = Limiter(chosen.limits, 1000, time.monotonic, lambda reason: None, self.record_bug)
        self.left = plan.hits
        self.call_numbers = count()
        if self.limiter.store is not None:
            self.record_calls(self.limiter.store)

    def record_bug(self, error: BaseException) -> None:
        self.write("bug", repr(error))

    def write(self, *fields: object) -> None:
        self.file.write(" ".join(map(str, fields)).encode() + b"\n")

    def record_calls(self, store: Any) -> None:
        """Records whether the store or the local counters decides each call, and the start of each merge."""
        real_take, real_keep, real_merge = store.take, store.keep, store.on_found

        async def take(charges: list[Charge], holder: str = "", spent: int = 0) -> ChargeResult | None:
            was_up = store.is_up
            result: ChargeResult | None = await real_take(charges, holder, spent)
            local_since.set(time.monotonic())
            if result is None:
                store_answer.set(UNANSWERED if was_up else NOT_ASKED)
            else:
                store_answer.set(BOOKED if result.booked else REFUSED)
            return result

        async def keep(what: str, used: Iterable[tuple[Charge, int]], holder: str) -> bool:
            amounts = list(used)
            began = time.monotonic()
            is_received: bool = await real_keep(what, amounts, holder)
            ended = time.monotonic() if is_received else began
            for charge, _ in amounts:
                if charge.kind == "fixed" and what != "settle":
                    self.write("renewed", charge.subject, began, ended)
            return is_received

        async def merge() -> None:
            self.write("restored", time.monotonic())  # the local token windows are forgotten at once
            await real_merge()

        store.take, store.keep, store.on_found = take, keep, merge

    async def run(self) -> None:
        await self.limiter.start()
        await asyncio.gather(*(self.run_task() for _ in range(self.plan.tasks)))
        while not self.limiter.is_up or self.limiter.unsettled:  # noqa: ASYNC110  # the limiter has no event for it
            await asyncio.sleep(0.01)
        leases = self.limiter.leases
        self.write("end", leases.live + len(leases.held) + len(self.limiter.permits))
        await self.limiter.aclose()

    def turns(self) -> Iterator[int]:
        while self.left:
            self.left -= 1
            yield self.left

    async def run_task(self) -> None:
        for _ in self.turns():
            number = random.randrange(SESSIONS)
            epoch = int(time.monotonic() / NEW_KEYS_EVERY)
            subject = Subject(f"s{number}.{epoch}", f"a{number % ADDRESSES}.{epoch}")
            try:
                await (self.charge(subject) if random.random() < 0.6 else self.hold(subject, number))
            except (TooMany, TokensExhausted, TooManyStreams):
                self.write("refused")
            except LimitsUnavailable:
                self.write("unavailable")
            await asyncio.sleep(random.random() * 2 * self.plan.pause)

    @property
    def by(self) -> str:
        """The origin of the latest grant of this task: the store or this process."""
        return STORE if store_answer.get() == BOOKED else self.plan.name

    async def charge(self, subject: Subject) -> None:
        asked = time.monotonic()
        await self.limiter.charge(ChargeKind.QUESTION, subject)
        answered, by = time.monotonic(), self.by
        self.write("charge", *subject[:2], 1, asked if by == STORE else local_since.get(), answered, by, 0)

    async def hold(self, subject: Subject, number: int) -> None:
        """Odd sessions use all held tokens, even ones a random part."""
        amount = random.randint(*AMOUNTS)
        asked = time.monotonic()
        call_number = next(self.call_numbers)
        self.write("pending", *subject[:2], asked, call_number)
        try:
            permit = await self.limiter.hold(subject, amount)
        except (TokensExhausted, TooManyStreams, LimitsUnavailable):
            if store_answer.get() in (REFUSED, NOT_ASKED):
                self.write("resolved", call_number)
            raise
        async with permit:
            answered, by = time.monotonic(), self.by
            if by != STORE:
                asked = local_since.get()
            is_long = random.random() < 0.02
            await asyncio.sleep(LONG_HOLD if is_long else random.random() * 2 * HOLD_SECONDS)
            used = amount if number % 2 else random.randint(0, amount)
            permit.settle(used)
            until = time.monotonic()
        self.write("hold", *subject[:2], used, asked, answered, by, until)
        if store_answer.get() != UNANSWERED:
            self.write("resolved", call_number)


def work(plan: Plan) -> None:
    random.seed()
    store_module.DEADLINE = plan.deadline
    vars(limiter_module)["RENEW_EVERY"] = plan.renew_every
    uvloop.run(History(plan).run())


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for: their files show their end
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
        else:
            work(Plan(**json.loads(line)))
            os._exit(0)


if __name__ == "__main__":
    main()
