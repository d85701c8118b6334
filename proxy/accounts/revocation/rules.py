"""Which sessions are revoked: by id, after a logout, and by generation, by the operator. Pure.

Revoking an id revokes every cookie of that id issued until then, copies included. Revoking by generation revokes the
sessions that were issued before the generation began: of one user, or of all.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from proxy.accounts.session import Opened, Session
from proxy.errors import SessionExpired, Unauthenticated

SWEEP_AFTER = 1024  # revoked ids, and as many again as remain, between two sweeps for expired ones


class RevocationRules(msgspec.Struct, frozen=True):
    """The operator's revocations. Each change begins a new generation; cookies carry the one they were issued in.

    Revoked are the sessions of a generation before `everyone`, or before that of their subject in `users`, and those
    issued before `before` (Unix seconds). A generation is the second it began in, or one more than the last: so those
    of a lost file, or of two places, are in order, and two sets of rules can be merged.
    """

    generation: int = 0
    everyone: int = 0
    before: int = 0
    users: dict[str, int] = {}  # msgspec copies it

    def next_generation(self, now: float) -> int:
        return max(self.generation + 1, int(now))

    def revoking_all(self, now: float) -> RevocationRules:
        generation = self.next_generation(now)
        return self.merged(RevocationRules(generation, everyone=generation))

    def revoking_before(self, moment: int, now: float) -> RevocationRules:
        return self.merged(RevocationRules(self.next_generation(now), before=moment))

    def revoking_user(self, user: str, now: float) -> RevocationRules:
        generation = self.next_generation(now)
        return self.merged(RevocationRules(generation, users={user: generation}))

    def merged(self, other: RevocationRules) -> RevocationRules:
        """Rules that revoke the sessions that either of the two revokes."""
        users = {user: max(self.users.get(user, 0), other.users.get(user, 0)) for user in self.users | other.users}
        return RevocationRules(
            max(self.generation, other.generation),
            max(self.everyone, other.everyone),
            max(self.before, other.before),
            users,
        )

    def revokes(self, session: Session) -> bool:
        least = max(self.everyone, self.users.get(session.subject or "", 0))
        return session.generation < least or session.issued < self.before


class Revocations:
    """All revocations known to this process: the ids that were logged out, and the operator's rules."""

    def __init__(self) -> None:
        self.rules = RevocationRules()
        self._until: dict[str, tuple[int, int]] = {}  # each until its last cookie has expired anyway
        self._sweep_at = SWEEP_AFTER

    def revokes(self, session: Session) -> bool:
        return self.until(session.id) >= session.issued or self.rules.revokes(session)

    def check(self, opened: Opened) -> Opened:
        """The same, if it may be used. Raises Unauthenticated when it is revoked, SessionExpired when only too old."""
        if self.revokes(opened.session):
            raise Unauthenticated(reason="session was revoked")
        if opened.expired:
            raise SessionExpired
        return opened

    def reissued(self, session: Session) -> Session:
        """A derived session, issued after the last revocation of its id, and in the current generation."""
        issued = max(session.issued, self.until(session.id) + 1)
        return replace(session, issued=issued, renewed=issued, generation=self.rules.generation)

    def revoke(self, session: Session, now: float, forget_at: float) -> tuple[int, int]:
        """Revokes the cookies of this id issued until `now`; until its own issue when the clock has gone back since.

        `forget_at` is when the last cookie issued at `now` expires. Returns the last second of issue that is revoked,
        and when the revocation may be forgotten.
        """
        until = max(int(now), session.issued)
        forget_at = int(forget_at) + until - int(now)
        self.add(session.id, until, forget_at, now)
        return until, forget_at

    def add(self, id_: str, until: int, forget_at: int, now: float) -> None:
        """Adds the revocation of an id, made here or on another server."""
        if until > self.until(id_):
            self._until[id_] = (until, forget_at)
        if len(self._until) >= self._sweep_at:
            self._until = {known: entry for known, entry in self._until.items() if entry[1] > now}
            self._sweep_at = 2 * len(self._until) + SWEEP_AFTER

    def until(self, id_: str) -> int:
        """The last second of issue that is revoked for this id; -1 when there is none."""
        entry = self._until.get(id_)
        return entry[0] if entry else -1
