"""Processes that ask the limits as their plans say, and write down what was granted. See test_history.py.

Each line of the input is a Plan; a process of its own works on it, whose id is printed. (They are forked: to import all
of it takes longer than the work.) Each line of a history is written at once, so that it outlives a SIGKILL:

    ask  SESSION ADDRESS AMOUNT ASKED ANSWERED BY UNTIL     a request was granted
    hold SESSION ADDRESS AMOUNT ASKED ANSWERED BY UNTIL     so many tokens and a stream were held, and used
    asks SESSION ADDRESS ASKED NUMBER                       tokens and a stream are asked for
    told NUMBER                                             and nothing about that question is unknown any more
    kept SESSION|ADDRESS|all BEGAN ENDED                    a renewal or a merge may have begun a window of tokens;
                                                            they are the same when the store has not answered
    no | out                                                it was refused, or could not be counted
    found AT                                                the store was back, and what was counted alone is forgotten
    end HELD                                                all is over, and so much is held still
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
from proxy.limits.store import redis as store_module
from proxy.limits.store.redis import Charge, ChargeResult
from proxy.settings import from_variables
from support.history import STORE

SESSIONS, ADDRESSES = 8, 2
NEW_KEYS_EVERY = 5.0  # seconds: in a long history nobody could tell any more where a fixed window began
HOLD_SECONDS = 0.02  # in the middle; a few last as long as LONG_HOLD
LONG_HOLD = 1.5
AMOUNTS = (50, 150)  # tokens of one answer
BOOKED, REFUSED, UNANSWERED, NOT_ASKED = "booked", "refused", "unanswered", "not asked"
store_answer: ContextVar[str] = ContextVar("store_answer", default=NOT_ASKED)
local_since: ContextVar[float] = ContextVar("local_since")  # nothing comes between that and its own decision


@dataclass
class Plan:
    """What to do. `limits` are settings; `pause` seconds are between two hits of one of `tasks` tasks, on average."""

    name: str
    hits: int
    path: str
    limits: dict[str, str]
    pause: float = 0.0
    tasks: int = 8
    renew_every: float = 1.0  # seconds
    deadline: float = 0.5  # a process that is not scheduled for a moment has not lost its store


class History:
    """The allowance of this process, asked and written down."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.file = Path(plan.path).open("ab", buffering=0)  # noqa: SIM115  # as long as the process
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
        """The store's answer shows which of the two decided; the merge, that it forgets its own token windows."""
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
            self.write("restored", time.monotonic())  # its windows are forgotten at once
            await real_merge()

        store.take, store.keep, store.on_found = take, keep, merge

    async def run(self) -> None:
        await self.limiter.start()
        await asyncio.gather(*(self.run_task() for _ in range(self.plan.tasks)))
        while not self.limiter.is_up or self.limiter.unsettled:  # noqa: ASYNC110  # there is no event for it
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
        """The process that has just granted something."""
        return STORE if store_answer.get() == BOOKED else self.plan.name

    async def charge(self, subject: Subject) -> None:
        asked = time.monotonic()
        await self.limiter.charge(ChargeKind.QUESTION, subject)
        answered, by = time.monotonic(), self.by
        self.write("charge", *subject[:2], 1, asked if by == STORE else local_since.get(), answered, by, 0)

    async def hold(self, subject: Subject, number: int) -> None:
        """Every second session uses all that it has held, the others any part of it."""
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
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: their files say when they have ended
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
        else:
            work(Plan(**json.loads(line)))
            os._exit(0)


if __name__ == "__main__":
    main()
