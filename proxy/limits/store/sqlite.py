"""Counters and revocations in a file, for the processes of one machine: they outlive a restart.

Rules:
1. One thread has the connection, so that no disk holds up the event loop. What waits for it is one transaction.
2. The journal is a WAL with synchronous=NORMAL: the death of a process loses nothing that was answered, a power cut at
   most the last seconds.
3. Where the file is locked, full, slow or gone, a call raises or is late, as on an engine that does not answer. Only
   `reconnect` opens it anew, and creates it where it was removed.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from proxy.limits.store.charges import Charge, ChargeResult, Revoked
from proxy.limits.store.counters import Counters
from proxy.settings import Fault, SettingsError

T = TypeVar("T")

VERSION = 1  # of the tables; a file with a later one is left alone
BUSY = 0.05  # seconds that a transaction waits for another process
OPENING = 2.0  # seconds that opening waits: several processes may be the first to open a new file
CLOSING = 1.0  # seconds that the end waits for a disk
AT_ONCE = 256  # calls in one transaction
PRUNE_EVERY = 60_000  # ms between two sweeps for rows that no longer count
RECENT = 1000  # charges whose result is kept for a caller that had given up and calls once more

TABLES = """
CREATE TABLE IF NOT EXISTS counter (
    key TEXT PRIMARY KEY, used INTEGER, held INTEGER, ends INTEGER, soon INTEGER, parts BLOB, forget INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hold (
    key TEXT, holder TEXT, amount INTEGER, spent INTEGER, expires INTEGER, paid INTEGER, PRIMARY KEY (key, holder)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ended (holder TEXT PRIMARY KEY, forget INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS revoked (id BLOB PRIMARY KEY, stored INTEGER) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS revoked_stored ON revoked (stored);
CREATE TABLE IF NOT EXISTS value (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
"""


@dataclass(slots=True)
class Job:
    """One call; with `reopens` it begins with a file that is opened anew. `holder` names a charge: with `again`, the
    result of its earlier call counts, if there is one."""

    run: Callable[[Counters], Any]
    answer: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    holder: str = ""
    again: bool = False
    reopens: bool = False
    result: Any = None


class FileReplaced(Exception):
    """The path leads to another file than the one that was open, or to none."""


class SqliteEngine:
    """One file, as `shared.Engine`. `wall` gives Unix seconds."""

    def __init__(self, path: str, wall: Callable[[], float] = time.time) -> None:
        self.path = path
        self.wall = wall
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._recent: dict[str, Any] = {}  # results by holder
        self._db: sqlite3.Connection | None = None
        self._closed_by: Exception | None = None  # until `reconnect`
        self._inode = 0
        self._prune_at = 0
        self._keep = 0  # ms for which revoked ids stay; 0 before the first exchange
        self._thread = threading.Thread(target=self.work, name="store", daemon=True)
        self._thread.start()

    async def take(self, charges: list[Charge], holder: str, spent: int, *, hold: int, again: bool) -> ChargeResult:
        return await self.call(lambda counters: counters.take(charges, holder, spent, hold), holder, again=again)

    async def keep(self, what: str, used: list[tuple[Charge, int]], holder: str, *, hold: int) -> None:
        await self.call(lambda counters: counters.keep(what, used, holder, hold))

    async def exchange(self, since: int, keep: int, page: int, ids: list[bytes]) -> Revoked:
        self._keep = keep
        return await self.call(lambda counters: counters.exchange(since, keep, page, ids))

    async def replace_rules(self, before: bytes, after: bytes) -> bool:
        return await self.call(lambda counters: counters.replace_rules(before, after))

    async def reconnect(self) -> None:
        await self.call(lambda counters: None, reopens=True)

    async def aclose(self) -> None:
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, CLOSING)

    async def call(
        self, run: Callable[[Counters], T], holder: str = "", *, again: bool = False, reopens: bool = False
    ) -> T:
        loop = asyncio.get_running_loop()
        job = Job(run, loop.create_future(), loop, holder, again, reopens)
        self._jobs.put(job)
        result: T = await job.answer
        return result

    # ---- in the thread ----------------------------------------------------------------------------------------

    def work(self) -> None:
        """Runs the jobs, those that wait together in one transaction, until the engine is closed."""
        while (job := self._jobs.get()) is not None:
            jobs: list[Job | None] = [job]
            with suppress(Empty):
                while len(jobs) < AT_ONCE and jobs[-1] is not None:
                    jobs.append(self._jobs.get_nowait())
            self.run([job for job in jobs if job is not None and not job.answer.cancelled()])
            if jobs[-1] is None:
                break
        self.close()

    def run(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        try:
            self.commit(jobs)
        except Exception as error:  # noqa: BLE001  # whatever it is, the store has not answered
            self.roll_back(error)
            failure = error
            tell(jobs, lambda job: job.answer.set_exception(failure))
        else:
            tell(jobs, lambda job: job.answer.set_result(job.result))

    def commit(self, jobs: list[Job]) -> None:
        if any(job.reopens for job in jobs):
            self.close()
            self._closed_by = None
        db = self.connection()
        db.execute("BEGIN IMMEDIATE")
        counters = Counters(db, int(self.wall() * 1000))
        for job in jobs:
            is_known = job.again and job.holder in self._recent
            job.result = self._recent[job.holder] if is_known else job.run(counters)
        if counters.now >= self._prune_at and self._keep:
            self._prune_at = counters.now + PRUNE_EVERY
            counters.prune(self._keep)
        db.execute("COMMIT")
        self._recent |= {job.holder: job.result for job in jobs if job.holder}
        while len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]

    def connection(self) -> sqlite3.Connection:
        """The file's connection; opens it if none is open. Raises FileReplaced when the path leads to another file or
        to none, and from then on the same error until `reconnect`."""
        if self._db is None:
            if self._closed_by is not None:
                raise self._closed_by.with_traceback(None)
            return self.open()
        try:
            inode = os.stat(self.path).st_ino
        except FileNotFoundError:
            inode = 0
        if inode != self._inode:
            raise FileReplaced
        return self._db

    def open(self) -> sqlite3.Connection:
        self._db = open_file(self.path)
        self._inode = os.stat(self.path).st_ino
        return self._db

    def roll_back(self, error: Exception) -> None:
        """Keeps a file that was locked or full; any other is closed until `reconnect`."""
        if isinstance(error, sqlite3.OperationalError) and self._db is not None:
            with suppress(sqlite3.Error):  # there may be no transaction
                self._db.execute("ROLLBACK")
        else:
            self.close()
            if not isinstance(error, sqlite3.OperationalError):  # one that could not be opened is tried again
                self._closed_by = error

    def close(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
        self._db = None


class NewerFile(sqlite3.DatabaseError):
    """The file was written by a later version of this program."""


def open_file(path: str) -> sqlite3.Connection:
    """Opens the file, and makes it where there is none, for its owner alone. Raises sqlite3.Error, OSError.

    A command that root runs makes it for the owner of the folder: the server's own user must be able to open it.
    """
    with suppress(FileExistsError):
        fresh = os.open(path, os.O_CREAT | os.O_EXCL, 0o600)
        if os.geteuid() == 0:
            folder = os.stat(os.path.dirname(path))
            os.fchown(fresh, folder.st_uid, folder.st_gid)
        os.close(fresh)
    db = sqlite3.connect(path, timeout=OPENING, isolation_level=None, check_same_thread=False)
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise NewerFile
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if version < VERSION:
            db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        db.execute(f"PRAGMA busy_timeout = {int(BUSY * 1000)}")
    except sqlite3.Error:
        db.close()
        raise
    return db


def check_file(path: str) -> None:
    """Raises SettingsError for a file that cannot be used; it is left as it is."""
    try:
        db = open_file(path)
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError
        db.close()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):  # by another process, which uses it
            return
        raise unusable(path, f"cannot be used: {error}") from error
    except NewerFile:
        raise unusable(path, f"was written by a newer chat-proxy; run that one, or move it: {mv(path)}") from None
    except sqlite3.Error:
        raise unusable(path, f"is damaged or no store; move it away to begin anew: {mv(path)}") from None
    except OSError as error:
        raise unusable(path, f"cannot be opened: {error.strerror}") from error


def mv(path: str) -> str:
    return f"mv {shlex.quote(path)} {shlex.quote(path + '.old')}"


def unusable(path: str, what: str) -> SettingsError:
    return SettingsError([Fault("limits.store", path, what)])


def tell(jobs: list[Job], how: Callable[[Job], None]) -> None:
    """Calls `how` for each job that is still waited for, on its event loop."""

    def deliver(loop: asyncio.AbstractEventLoop) -> None:
        for job in jobs:
            if job.loop is loop and not job.answer.done():
                how(job)

    for loop in {job.loop for job in jobs}:
        with suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(deliver, loop)
