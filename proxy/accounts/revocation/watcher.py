"""Watches the places where sessions are revoked elsewhere: the control file, and the store that servers share.

A request reads memory only. The watcher reads both places several times a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from proxy.accounts.revocation.file import ControlFile
from proxy.accounts.revocation.rules import RevocationRules, Revocations
from proxy.accounts.revocation.shared import RevokedId, SharedRevocations
from proxy.accounts.session import Session
from proxy.limits.store.shared import SharedStore
from proxy.settings import Session as SessionSettings
from proxy.settings import SettingsError
from proxy.telemetry.logs import Logs

Source = Callable[[], Awaitable[None]]
CHECK_EVERY = 0.4  # seconds between two reads; a revocation must take effect within a second


class RevocationWatcher:
    """The revocations of one server. `wall` gives Unix seconds. Raises SettingsError for an unusable control file."""

    def __init__(
        self, configured: SessionSettings, store: SharedStore | None, logs: Logs, wall: Callable[[], float]
    ) -> None:
        self.lifetime = configured.lifetime
        self.logs = logs
        self.wall = wall
        self.known = Revocations()
        self.file = ControlFile(configured.control_file)
        self.shared = SharedRevocations(store, self.lifetime) if store else None
        self._watching: list[asyncio.Task[None]] = []
        self._last_fault = ""
        self.apply_file()

    async def start(self) -> None:
        """Reads all revocations before the first request, then keeps watching."""
        sources: list[Source] = [self.read_file]
        if self.shared is not None:
            sources.append(self.read_shared)
        for source in sources:
            await self.read(source)
        self._watching = [asyncio.create_task(self.watch(source)) for source in sources]

    async def stop(self) -> None:
        """Stops watching, and sends the other servers what they have not received yet."""
        for watching in self._watching:
            watching.cancel()
        if self.shared is not None:
            await self.shared.send_rest()

    def revoke(self, id_: str, issued: int, *, here_only: bool = False) -> None:
        """Revokes the cookies of an id issued until now, on this server and, unless `here_only`, on the others."""
        now = self.wall()
        until, forget_at = self.known.revoke(Session(id_, "", None, issued, issued), now, now + self.lifetime)
        if self.shared is not None and not here_only:
            self.shared.post(RevokedId(id_, until, forget_at))

    async def watch(self, source: Source) -> None:
        """Reads one source for ever. Each has its own task, so a store that does not answer delays no other."""
        while True:
            await asyncio.sleep(CHECK_EVERY)
            await self.read(source)

    async def read(self, source: Source) -> None:
        try:
            await source()
        except Exception as error:  # noqa: BLE001  # every later revocation depends on this task
            self.logs.bug(error)

    async def read_shared(self) -> None:
        is_behind = self.shared is not None  # at the start there may be days of logouts, and requests already arrive
        while is_behind and self.shared is not None:
            revoked, rules = await self.shared.exchange()
            for each in revoked:
                self.known.add(each.id, each.until, each.forget_at, self.wall())
            if rules is not None:
                self.apply(rules)
            is_behind = self.shared.is_behind

    async def read_file(self) -> None:
        try:
            self.apply_file()
            self._last_fault = ""
        except SettingsError as error:
            self.note_unread(str(error))

    def note_unread(self, fault: str) -> None:
        """Logs a fault of the file once, not with every read."""
        if fault != self._last_fault:
            self._last_fault = fault
            self.logs.line("control_file_unread", "error", fault=fault)

    def apply_file(self) -> None:
        rules = self.file.read()
        if rules is not None:
            self.apply(rules)

    def apply(self, rules: RevocationRules) -> None:
        """Adds rules to those in force: the file and the store may each be behind, so both apply."""
        merged = self.known.rules.merged(rules)
        if merged != self.known.rules:
            self.known.rules = merged
            self.logs.line("revoked", generation=merged.generation)
