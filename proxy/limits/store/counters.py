"""What one transaction of the SQLite store reads and writes: counters, holds, ended holders and revocations.

Rules:
1. The content of a counter is what Redis's scripts would make of the same calls.
2. Moving windows are kept in at most about 30 parts. A part counts until its last event has left the window, so a
   window never grants more than its limit.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from proxy.limits.store.charges import Charge, ChargeResult, CounterState, Revoked

PARTS = 30  # of a moving window
ENDED_FOR = 3_600_000  # ms for which an ended holder is known: a call of it may be repeated

Part: TypeAlias = "list[int]"  # when it began and when its last event was (ms), and the number of its events

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(list[list[int]]).decode


@dataclass(slots=True)
class Row:
    """One counter. Times are in ms; `soon` is no later than the first hold's expiry."""

    key: str
    used: int = 0
    held: int = 0
    ends: int = 0
    soon: int = 0
    parts: list[Part] = field(default_factory=list)


class Counters:
    """The tables within one transaction, at the time `now` (Unix ms)."""

    def __init__(self, db: sqlite3.Connection, now: int) -> None:
        self.db = db
        self.now = now

    # ---- charging ---------------------------------------------------------------------------------------------

    def take(self, charges: list[Charge], holder: str, spent: int, hold: int) -> ChargeResult:
        if self.is_ended(holder):
            return ChargeResult(booked=False, counters=[])  # the call was delayed: its answer is no longer needed
        rows = [self.read(charge) for charge in charges]
        states = [self.state(charge, row) for charge, row in zip(charges, rows, strict=True)]
        booked = all(state.used + charge.amount <= charge.limit for charge, state in zip(charges, states, strict=True))
        if booked:
            for charge, row in zip(charges, rows, strict=True):
                if charge.amount:
                    self.charge(charge, row, holder, spent, hold)
        return ChargeResult(booked, states)

    def read(self, charge: Charge) -> Row:
        """The counter as it is now: without what has ended or expired."""
        key, window = charge.key, charge.seconds * 1000
        found = self.db.execute("SELECT used, held, ends, soon, parts FROM counter WHERE key = ?", (key,)).fetchone()
        if found is None:
            return Row(key)
        used, held, ends, soon, parts = found
        row = Row(key, used, held, ends, soon, decode(parts) if parts else [])
        if charge.kind == "fixed" and row.ends <= self.now:
            self.db.execute("DELETE FROM hold WHERE key = ?", (key,))
            return Row(key)
        if charge.kind != "moving" and row.soon <= self.now:
            self.expire(row)
        if self.is_ahead(row, window):
            self.bring_back(row, window)
        row.parts = [part for part in row.parts if part[1] > self.now - window]
        return row

    def is_ahead(self, row: Row, window: int) -> bool:
        """Whether the clock has gone back since the counter was written."""
        return row.ends > self.now + window or bool(row.parts and row.parts[-1][1] > self.now)

    def bring_back(self, row: Row, window: int) -> None:
        """What lies in the future counts as of now, or it would count for too long."""
        row.ends = min(row.ends, self.now + window)
        row.parts = [[min(began, self.now), min(last, self.now), count] for began, last, count in row.parts]
        self.write(row, self.now + window)

    def state(self, charge: Charge, row: Row) -> CounterState:
        if charge.kind == "fixed":
            return CounterState(row.used + row.held, (row.ends - self.now) / 1000 if row.ends else charge.seconds)
        if charge.kind == "held":
            return CounterState(row.held, 0.0)
        used = sum(part[2] for part in row.parts)
        over = max(0, used - charge.limit)  # a server with a higher limit may have added more
        for _, last, count in row.parts:
            over -= count
            if over < 0:
                return CounterState(used, last / 1000 + charge.seconds - self.now / 1000)
        return CounterState(used, 0.0)

    def charge(self, charge: Charge, row: Row, holder: str, spent: int, hold: int) -> None:
        if charge.kind == "moving":
            self.add_event(charge, row)
            self.write(row, self.now + charge.seconds * 1000)
            return
        self.hold(charge, row, holder, spent, hold)

    def add_event(self, charge: Charge, row: Row) -> None:
        width = charge.seconds * 1000 / PARTS if charge.limit > PARTS else 0
        if row.parts and self.now - row.parts[-1][0] < width:
            row.parts[-1][1:] = self.now, row.parts[-1][2] + 1
        else:
            row.parts.append([self.now, self.now, 1])

    # ---- holds ------------------------------------------------------------------------------------------------

    def hold(self, charge: Charge, row: Row, holder: str, spent: int, hold: int) -> None:
        """Holds the amount until `hold` seconds from now, or goes on holding it."""
        expires = self.now + hold * 1000
        found = self.db.execute(
            "SELECT amount, paid FROM hold WHERE key = ? AND holder = ?", (row.key, holder)
        ).fetchone()
        if found is None or found[1] is not None:
            row.held += charge.amount
            row.used -= found[1] if found else 0  # it was alive after all
        if charge.kind == "fixed" and not row.ends:
            row.ends = self.now + charge.seconds * 1000
        row.soon = min(row.soon or expires, expires)
        values = (row.key, holder, charge.amount, spent, expires)
        self.db.execute("INSERT OR REPLACE INTO hold VALUES (?, ?, ?, ?, ?, NULL)", values)
        self.write(row, max(row.ends, expires))

    def expire(self, row: Row) -> None:
        """Charges what expired holders are known to have spent. Those of live streams are forgotten."""
        query = "SELECT holder, amount, spent FROM hold WHERE key = ? AND expires <= ? AND paid IS NULL"
        for holder, amount, spent in self.db.execute(query, (row.key, self.now)).fetchall():
            row.held -= amount
            if row.ends:
                row.used += spent
                self.db.execute("UPDATE hold SET paid = spent WHERE key = ? AND holder = ?", (row.key, holder))
            else:
                self.db.execute("DELETE FROM hold WHERE key = ? AND holder = ?", (row.key, holder))
        query = "SELECT min(expires) FROM hold WHERE key = ? AND paid IS NULL"
        row.soon = self.db.execute(query, (row.key,)).fetchone()[0] or self.now + ENDED_FOR
        self.write(row, max(row.ends, self.now + ENDED_FOR))  # later than any hold expires

    def keep(self, what: str, used: list[tuple[Charge, int]], holder: str, hold: int) -> None:
        """Renews, settles or adds, as the scripts on Redis do."""
        if self.is_ended(holder):
            return
        if what != "renew":
            self.db.execute("INSERT INTO ended VALUES (?, ?)", (holder, self.now + ENDED_FOR))
        for charge, amount in used:
            row = self.read(charge)
            if charge.kind == "moving":
                for _ in range(amount):
                    self.add_event(charge, row)
                self.write(row, self.now + charge.seconds * 1000)
            elif what == "renew":
                self.hold(charge, row, holder, amount, hold)
            else:
                self.release(charge, row, holder, amount, begins=what == "add")

    def release(self, charge: Charge, row: Row, holder: str, used: int, *, begins: bool) -> None:
        """Ends a hold and charges what was used; only with `begins` in a window that has not begun."""
        query = "DELETE FROM hold WHERE key = ? AND holder = ? RETURNING amount, paid"
        found = self.db.execute(query, (row.key, holder)).fetchone()
        if found is not None:
            row.held -= found[0] if found[1] is None else 0
            row.used -= found[1] or 0
        if charge.kind == "fixed":
            if not row.ends and begins and used:
                row.ends = self.now + charge.seconds * 1000
            row.used += used if row.ends else 0
        if row.ends or row.held or found is not None:
            self.write(row, max(row.ends, self.now + ENDED_FOR))

    def is_ended(self, holder: str) -> bool:
        return self.db.execute("SELECT 1 FROM ended WHERE holder = ?", (holder,)).fetchone() is not None

    def write(self, row: Row, forget: int) -> None:
        parts = encode(row.parts) if row.parts else None
        values = (row.key, row.used, row.held, row.ends, row.soon, parts, forget)
        self.db.execute("INSERT OR REPLACE INTO counter VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    # ---- revocations ------------------------------------------------------------------------------------------

    def exchange(self, since: int, keep: int, page: int, ids: list[bytes]) -> Revoked:
        self.db.executemany("INSERT OR REPLACE INTO revoked VALUES (?, ?)", [(id_, self.now) for id_ in ids])
        query = "SELECT id, stored FROM revoked WHERE stored >= ? ORDER BY stored LIMIT ?"
        found = self.db.execute(query, (since, page)).fetchall()
        if len(found) == page:  # a page ends with all of its last millisecond, so that the next begins after it
            query = "SELECT id, stored FROM revoked WHERE stored BETWEEN ? AND ? ORDER BY stored"
            found = self.db.execute(query, (since, found[-1][1])).fetchall()
        return Revoked(self.now, found, self.rules())

    def replace_rules(self, before: bytes, after: bytes) -> bool:
        if self.rules() != before:
            return False
        self.db.execute("INSERT OR REPLACE INTO value VALUES ('rules', ?)", (after,))
        return True

    def rules(self) -> bytes:
        found = self.db.execute("SELECT value FROM value WHERE name = 'rules'").fetchone()
        return found[0] if found else b""

    def prune(self, keep: int) -> None:
        """Deletes what no longer counts. `keep` is how long revoked ids stay, in ms."""
        self.db.execute("DELETE FROM counter WHERE forget <= ?", (self.now,))
        self.db.execute("DELETE FROM hold WHERE NOT EXISTS (SELECT 1 FROM counter WHERE counter.key = hold.key)")
        self.db.execute("DELETE FROM ended WHERE forget <= ?", (self.now,))
        self.db.execute("DELETE FROM revoked WHERE stored <= ?", (self.now - keep,))
