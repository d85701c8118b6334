"""The store in a file: what it counts over time, what it keeps over a restart, and what it does without its file."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from support.harness import STARTING, Clock, eventually, unmeasured
from support.redis_server import Redis

from proxy.limits.store import shared
from proxy.limits.store.charges import Charge, ChargeResult
from proxy.limits.store.counters import PARTS
from proxy.limits.store.opening import open_engine, open_store
from proxy.limits.store.shared import SharedStore
from proxy.limits.store.sqlite import SqliteEngine
from proxy.settings import SettingsError

DAY = 86400
HOLD = 30  # seconds

REQUESTS = Charge("moving", "per_session", "s", 1, 5, 60)
MANY = Charge("moving", "per_address", "a", 1, 500, DAY)
TOKENS = Charge("fixed", "tokens_total", "all", 100, 250, 3600)
STREAMS = Charge("held", "streams_per_session", "s", 1, 2)


@asynccontextmanager
async def engine_at(path: Path, clock: Clock | None = None) -> AsyncIterator[SqliteEngine]:
    engine = SqliteEngine(str(path), clock or time.time)
    try:
        yield engine
    finally:
        await engine.aclose()


def story(path: Path, tell: Callable[[SqliteEngine, Clock], Awaitable[None]]) -> None:
    """Runs a test on an engine whose time is the clock's."""

    async def run() -> None:
        clock = Clock(1_800_000_000.0)
        async with engine_at(path, clock) as engine:
            await tell(engine, clock)

    asyncio.run(run())


async def take(engine: SqliteEngine, *charges: Charge, holder: str = "", spent: int = 0) -> ChargeResult:
    name = holder or random.randbytes(8).hex()
    return await engine.take(list(charges), name, spent, hold=HOLD, again=False)


async def used(engine: SqliteEngine, *charges: Charge) -> list[int]:
    result = await take(engine, *(charge.of(0) for charge in charges))
    return [state.used for state in result.counters]


# ---- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("charge", [REQUESTS, MANY], ids=["each event", "in parts"])
def test_a_moving_window_never_grants_more(charge: Charge, tmp_path: Path) -> None:
    """However the events fall, no window of that length has more than the limit, and a refused one succeeds after the
    time that the store gave."""

    async def tell(engine: SqliteEngine, clock: Clock) -> None:
        granted: list[float] = []
        chance = random.Random(7)
        for _ in range(3000):
            clock.now += chance.choice([0.0, 0.2, 5.0]) * charge.seconds / charge.limit
            result = await take(engine, charge)
            (state,) = result.counters
            if result.booked:
                granted.append(clock.now)
            elif chance.random() < 0.2:
                clock.now += state.free_in + 0.002
                assert (await take(engine, charge)).booked
                granted.append(clock.now)
            recent = [moment for moment in granted if moment > clock.now - charge.seconds + 0.001]
            assert len(recent) <= charge.limit
        assert len(granted) > charge.limit
        with closing(sqlite3.connect(tmp_path / "db")) as db:
            (size,) = db.execute("SELECT max(length(parts)) FROM counter").fetchone()
        assert size < 20 * (PARTS + 2)

    story(tmp_path / "db", tell)


def test_all_are_charged_or_none(tmp_path: Path) -> None:
    async def tell(engine: SqliteEngine, clock: Clock) -> None:
        assert (await take(engine, TOKENS, STREAMS, holder="one")).booked
        assert (await take(engine, TOKENS, STREAMS, holder="two")).booked
        refused = await take(engine, REQUESTS, TOKENS, STREAMS)
        assert not refused.booked
        assert [state.used for state in refused.counters] == [0, 200, 2]
        assert refused.counters[1].free_in == pytest.approx(3600)
        assert await used(engine, REQUESTS, TOKENS, STREAMS) == [0, 200, 2]

    story(tmp_path / "db", tell)


def test_a_hold_is_settled_once(tmp_path: Path) -> None:
    async def tell(engine: SqliteEngine, clock: Clock) -> None:
        await take(engine, TOKENS, STREAMS, holder="one")
        for _ in range(2):
            await engine.keep("settle", [(TOKENS, 7), (STREAMS, 0)], "one", hold=HOLD)
        assert await used(engine, TOKENS, STREAMS) == [7, 0]
        assert not (await take(engine, TOKENS, STREAMS, holder="one")).booked, "a delayed call of an ended holder"
        await engine.keep("add", [(TOKENS, 5), (REQUESTS, 3)], "counted elsewhere", hold=HOLD)
        assert await used(engine, TOKENS, REQUESTS) == [12, 3]

    story(tmp_path / "db", tell)


def test_a_hold_that_is_not_renewed_expires(tmp_path: Path) -> None:
    """A dead worker's stream is free again, and what it had spent by its last renewal is paid. One that was alive after
    all goes on, and pays once."""

    async def tell(engine: SqliteEngine, clock: Clock) -> None:
        await take(engine, TOKENS, STREAMS, holder="dead", spent=3)
        await engine.keep("renew", [(TOKENS, 20), (STREAMS, 20)], "dead", hold=HOLD)
        clock.now += HOLD - 1
        assert await used(engine, TOKENS, STREAMS) == [100, 1]
        clock.now += 2
        assert await used(engine, TOKENS, STREAMS) == [20, 0]
        await engine.keep("renew", [(TOKENS, 30), (STREAMS, 30)], "dead", hold=HOLD)
        assert await used(engine, TOKENS, STREAMS) == [100, 1]
        await engine.keep("settle", [(TOKENS, 40), (STREAMS, 0)], "dead", hold=HOLD)
        assert await used(engine, TOKENS, STREAMS) == [40, 0]

    story(tmp_path / "db", tell)


def test_a_window_ends_and_its_holds_do_not_count_in_the_next(tmp_path: Path) -> None:
    async def tell(engine: SqliteEngine, clock: Clock) -> None:
        await take(engine, TOKENS, holder="one")
        await engine.keep("settle", [(TOKENS, 90)], "one", hold=HOLD)
        clock.now += 3590
        await take(engine, TOKENS, holder="two")
        assert await used(engine, TOKENS) == [190]
        clock.now += 11
        assert await used(engine, TOKENS) == [0]
        await engine.keep("settle", [(TOKENS, 50)], "two", hold=HOLD)
        assert await used(engine, TOKENS) == [0]

    story(tmp_path / "db", tell)


def test_a_clock_that_goes_back_locks_no_client_out(tmp_path: Path) -> None:
    """What lies in the future then counts for a window from now on, and no longer."""

    async def tell(engine: SqliteEngine, clock: Clock) -> None:
        for _ in range(5):
            await take(engine, REQUESTS)
        await take(engine, TOKENS, holder="one")
        clock.now -= DAY
        refused = await take(engine, REQUESTS, TOKENS)
        assert [state.free_in for state in refused.counters] == pytest.approx([60, 3600])
        clock.now += 61
        assert (await take(engine, REQUESTS)).booked

    story(tmp_path / "db", tell)


@pytest.mark.redis
def test_it_counts_as_redis_does(tmp_path: Path, store: Redis) -> None:
    """The same calls have the same results on both engines."""

    async def compare() -> None:
        redis = open_engine(store.url)
        async with engine_at(tmp_path / "db") as sqlite:
            chance = random.Random(3)
            holders: dict[str, list[Charge]] = {}
            for number in range(400):
                what = chance.choice(["take", "take", "renew", "settle", "add"]) if holders else "take"
                if what == "take":
                    holder = f"holder {number}"
                    charges = chance.sample([REQUESTS, TOKENS, STREAMS, MANY], chance.randrange(1, 4))
                    holders[holder] = [charge for charge in charges if charge.kind != "moving"]
                else:
                    holder, charges = chance.choice(list(holders.items()))
                amounts = [(charge, chance.randrange(20)) for charge in charges]
                results = []
                for engine in (redis, sqlite):
                    if what == "take":
                        result = await engine.take(charges, holder, 2, hold=HOLD, again=False)
                        results.append((result.booked, [state.used for state in result.counters]))
                    else:
                        await engine.keep(what, amounts, holder, hold=HOLD)
                assert results[:1] == results[1:], (what, holder, charges)
        await redis.aclose()

    asyncio.run(compare())


# ---- the file -------------------------------------------------------------------------------------------------------


def test_it_is_kept_over_a_restart(tmp_path: Path) -> None:
    """A new process finds what was counted, and the revocations; the file is its owner's alone."""
    path = tmp_path / "db"

    async def first() -> None:
        async with engine_at(path) as engine:
            await take(engine, REQUESTS, TOKENS, holder="one")
            await engine.keep("settle", [(TOKENS, 60)], "one", hold=HOLD)
            await engine.exchange(0, DAY * 1000, 10, [b"an id"])
            assert await engine.replace_rules(b"", b"rules")
            assert not await engine.replace_rules(b"", b"others")

    async def second() -> None:
        async with engine_at(path) as engine:
            assert await used(engine, REQUESTS, TOKENS) == [1, 60]
            found = await engine.exchange(0, DAY * 1000, 10, [])
            assert ([id_ for id_, _ in found.entries], found.rules) == ([b"an id"], b"rules")

    asyncio.run(first())
    assert path.stat().st_mode & 0o777 == 0o600
    asyncio.run(second())


def test_no_file_is_made_that_the_server_cannot_open(tmp_path: Path) -> None:
    """The files belong to the owner of their folder, also where root runs the command that makes them."""
    if os.geteuid() == 0:
        os.chown(tmp_path, 12345, 12345)

    async def tell() -> None:
        async with engine_at(tmp_path / "db") as engine:
            await take(engine, REQUESTS)
            names = os.listdir(tmp_path)
            assert len(names) == 3
            assert {os.stat(tmp_path / name).st_uid for name in names} == {os.stat(tmp_path).st_uid}

    asyncio.run(tell())


HITS = """
import asyncio, sys, time
from proxy.limits.store.charges import Charge
from proxy.limits.store.opening import open_store

async def main():
    store = open_store(sys.argv[1], time.monotonic, lambda reason: None)
    charge, granted = Charge("moving", "per_session", "s", 1, 300, 3600), 0
    for _ in range(int(sys.argv[2])):
        while (result := await store.take([charge])) is None:
            await asyncio.sleep(0.05)
        granted += result.booked
    await store.aclose()
    print(granted)

asyncio.run(main())
"""


@pytest.mark.process
def test_processes_share_one_file(tmp_path: Path) -> None:
    """Several processes grant a limit once, all together, and each gets an answer."""
    command = [sys.executable, "-c", HITS, f"sqlite://{tmp_path}/db", "200"]
    processes = [subprocess.Popen(command, env=unmeasured(), stdout=subprocess.PIPE, text=True) for _ in range(4)]
    granted = [int(process.communicate(timeout=STARTING)[0]) for process in processes]
    assert sum(granted) == 300


@asynccontextmanager
async def store_at(path: Path, lost: list[str | None]) -> AsyncIterator[SharedStore]:
    store = open_store(f"sqlite://{path}", time.monotonic, lost.append)
    try:
        yield store
    finally:
        await store.aclose()


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(eventually, condition)


def test_a_process_that_holds_the_lock_is_an_outage(tmp_path: Path) -> None:
    """No call waits longer than its deadlines for a file that another process has locked, and all is well after it."""

    async def tell() -> None:
        lost: list[str | None] = []
        async with store_at(tmp_path / "db", lost) as store:
            assert await store.take([REQUESTS]) is not None
            with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as other:
                other.execute("BEGIN EXCLUSIVE")
                began = time.monotonic()
                assert await store.take([REQUESTS]) is None
                assert time.monotonic() - began < 10 * 2 * shared.DEADLINE
                assert not store.is_up
                assert await store.take([REQUESTS]) is None
                other.execute("ROLLBACK")
            await until(lambda: lost == ["OperationalError", None])
            result = await store.take([REQUESTS])
            assert result is not None
            assert result.counters[0].used == 1, "what was not answered was not booked"

    asyncio.run(tell())


def test_a_removed_file_is_reported_and_made_anew(tmp_path: Path) -> None:
    async def tell() -> None:
        lost: list[str | None] = []
        async with store_at(tmp_path / "db", lost) as store:
            await store.take([REQUESTS])
            for name in os.listdir(tmp_path):
                os.remove(tmp_path / name)
            assert await store.take([REQUESTS]) is None
            await until(lambda: lost == ["FileReplaced", None])
            result = await store.take([REQUESTS])
            assert result is not None
            assert result.booked
        assert (tmp_path / "db").exists()

    asyncio.run(tell())


def test_a_full_disk_is_an_outage(tmp_path: Path) -> None:
    """Where there is no room for another page, a call raises, and is counted again when there is."""

    async def tell() -> None:
        async with engine_at(tmp_path / "db") as engine:
            await take(engine, REQUESTS)
            assert engine._db is not None
            (pages,) = engine._db.execute("PRAGMA page_count").fetchone()
            engine._db.execute(f"PRAGMA max_page_count = {pages}")
            ids = [random.randbytes(400) for _ in range(200)]
            with pytest.raises(sqlite3.OperationalError, match="full"):
                await engine.exchange(0, DAY * 1000, 10, ids)
            engine._db.execute("PRAGMA max_page_count = 1000000")
            await engine.exchange(0, DAY * 1000, 10, ids)
            assert await used(engine, REQUESTS) == [1]

    asyncio.run(tell())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no database at all, but some text that is long enough" * 40, "is damaged or no store"),
        ("PRAGMA user_version = 99", "was written by a newer chat-proxy"),
    ],
    ids=["damaged", "newer"],
)
def test_a_file_that_cannot_be_used_is_left_alone(content: bytes | str, words: str, tmp_path: Path) -> None:
    """The start ends with the reason and the command that moves the file; the file stays as it is."""
    path = tmp_path / "the db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute(content)
    before = path.read_bytes()
    with pytest.raises(SettingsError) as caught:
        open_store(f"sqlite://{path}", time.monotonic, lambda reason: None)
    assert words in str(caught.value)
    assert f"mv '{path}' '{path}.old'" in str(caught.value)
    assert path.read_bytes() == before
    os.remove(path)


def test_a_missed_charge_is_not_booked_twice(tmp_path: Path) -> None:
    """A call that was given up and made once more has one result."""

    async def tell(engine: SqliteEngine, clock: Clock) -> None:
        first = await engine.take([REQUESTS, MANY], "one", 0, hold=HOLD, again=False)
        again = await engine.take([REQUESTS, MANY], "one", 0, hold=HOLD, again=True)
        assert again == first
        assert await used(engine, REQUESTS, MANY) == [1, 1]

    story(tmp_path / "db", tell)


def test_what_no_longer_counts_is_removed(tmp_path: Path) -> None:
    async def tell(engine: SqliteEngine, clock: Clock) -> None:
        await take(engine, REQUESTS, TOKENS, STREAMS, holder="one", spent=1)
        await engine.keep("settle", [(STREAMS, 0)], "another", hold=HOLD)
        await engine.exchange(0, DAY * 1000, 10, [b"an id"])
        clock.now += 2 * DAY
        await engine.exchange(0, DAY * 1000, 10, [])
        with closing(sqlite3.connect(tmp_path / "db")) as db:
            for table in ("counter", "hold", "ended", "revoked"):
                assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table

    story(tmp_path / "db", tell)
