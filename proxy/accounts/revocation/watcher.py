"""What was revoked, wherever that was done: by a logout here or on another server, or by an operator's hand.

A request asks memory only. What others say is heard a few times a second: from the control file, and from the bulletin
of the store that servers share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from proxy.accounts.revocation.file import ControlFile
from proxy.accounts.revocation.redis import RedisRevocations, RevokedId
from proxy.accounts.revocation.rules import RevocationRules, Revocations
from proxy.accounts.session import Session
from proxy.limits.store.redis import RedisStore
from proxy.settings import Session as SessionSettings
from proxy.settings import SettingsError
from proxy.telemetry.logs import Logs

Source = Callable[[], Awaitable[None]]
CHECK_EVERY = 0.4  # seconds between two looks at what was revoked elsewhere: a second is promised


class RevocationWatcher:
    """The revocations of one server. `wall` gives Unix seconds. Raises SettingsError for a bad control file."""

    def __init__(
        self, configured: SessionSettings, shared: RedisStore | None, logs: Logs, wall: Callable[[], float]
    ) -> None:
        self.lifetime = configured.lifetime
        self.logs = logs
        self.wall = wall
        self.known = Revocations()
        self.control = ControlFile(configured.control_file)
        self.bulletin = RedisRevocations(shared, self.lifetime) if shared else None
        self._watching: list[asyncio.Task[None]] = []
        self._told = ""
        self.obey_control()

    async def start(self) -> None:
        """Hears what there is to hear, before anybody is let in; then goes on listening."""
        sources = [self.read_control, *([self.read_bulletin] if self.bulletin else [])]
        for source in sources:
            await self.look(source)
        self._watching = [asyncio.create_task(self.watch(source)) for source in sources]

    async def stop(self) -> None:
        """Tells the other servers what they have not heard yet."""
        for watching in self._watching:
            watching.cancel()
        if self.bulletin is not None:
            await self.bulletin.tell_rest()

    def end(self, id_: str, issued: int, *, here_only: bool = False) -> None:
        """Kills the cookies of an id that were issued until now, here and where the bulletin is read."""
        now = self.wall()
        until, forget_at = self.known.revoke(Session(id_, "", None, issued, issued), now, now + self.lifetime)
        if self.bulletin is not None and not here_only:
            self.bulletin.post(RevokedId(id_, until, forget_at))

    async def watch(self, source: Source) -> None:
        """Each by itself: a store that does not answer keeps nobody from hearing of the file."""
        while True:
            await asyncio.sleep(CHECK_EVERY)
            await self.look(source)

    async def look(self, source: Source) -> None:
        try:
            await source()
        except Exception as error:  # noqa: BLE001  # all that is revoked from now on depends on this task
            self.logs.bug(error)

    def tell_unread(self, fault: str) -> None:
        """Once, not with every look."""
        if fault != self._told:
            self._told = fault
            self.logs.line("control_file_unread", "error", fault=fault)

    async def read_bulletin(self) -> None:
        assert self.bulletin is not None
        is_behind = True  # who begins has the logouts of days to hear, and is asked for sessions already
        while is_behind:
            notices, decree = await self.bulletin.exchange()
            for notice in notices:
                self.known.hear(notice.id, notice.until, notice.forget_at, self.wall())
            if decree is not None:
                self.obey(decree)
            is_behind = self.bulletin.is_behind

    async def read_control(self) -> None:
        try:
            self.obey_control()
            self._told = ""
        except SettingsError as error:
            self.tell_unread(str(error))

    def obey_control(self) -> None:
        decree = self.control.read()
        if decree is not None:
            self.obey(decree)

    def obey(self, decree: RevocationRules) -> None:
        """What the file says and what the store says, each of which may be behind, hold together."""
        merged = self.known.decree.merged(decree)
        if merged != self.known.decree:
            self.known.decree = merged
            self.logs.line("revoked", generation=merged.generation)
