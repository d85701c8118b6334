"""TODO."""

from __future__ import annotations

import msgspec

from proxy.accounts.session import Session

SWEEP_AFTER = 1024  # revoked ids, and as many again as live, between two sweeps for expired ones


class RevocationRules(msgspec.Struct, frozen=True):
    """What was revoked by hand. Each decree begins a new generation; cookies carry the one they were issued in.

    Killed is who was issued in a generation before `everyone`, or before that of the subject in `users`, or before
    `before` (Unix seconds). A generation is the second it began in, or one more than the last: so those of a file that
    was lost, or of two places, are in order, and two decrees can be merged.
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
        """Kills whom either kills."""
        users = {user: max(self.users.get(user, 0), other.users.get(user, 0)) for user in self.users | other.users}
        return RevocationRules(
            max(self.generation, other.generation),
            max(self.everyone, other.everyone),
            max(self.before, other.before),
            users,
        )

    def kills(self, session: Session) -> bool:
        least = max(self.everyone, self.users.get(session.subject or "", 0))
        return session.generation < least or session.issued < self.before


class Revocations:
    """What was revoked: ids that were logged out in this process, and the decree that holds for all processes."""

    def __init__(self) -> None:
        self.decree = RevocationRules()
        self._until: dict[str, tuple[int, int]] = {}  # each until its last cookie has expired anyway
        self._sweep_at = SWEEP_AFTER

    def kill(self, session: Session) -> bool:
        return self.until(session.id) >= session.issued or self.decree.kills(session)

    def revoke(self, session: Session, now: float, forget_at: float) -> tuple[int, int]:
        """Kills the cookies of this id issued until `now`, or until this one was when the clock has gone back since.

        `forget_at`: when the last cookie issued at `now` has expired. Returns until when cookies are dead, and when
        that may be forgotten.
        """
        until = max(int(now), session.issued)
        forget_at = int(forget_at) + until - int(now)
        self.hear(session.id, until, forget_at, now)
        return until, forget_at

    def hear(self, id_: str, until: int, forget_at: int, now: float) -> None:
        """Somebody has revoked this id, here or on another server."""
        if until > self.until(id_):
            self._until[id_] = (until, forget_at)
        if len(self._until) >= self._sweep_at:
            self._until = {known: entry for known, entry in self._until.items() if entry[1] > now}
            self._sweep_at = 2 * len(self._until) + SWEEP_AFTER

    def until(self, id_: str) -> int:
        """The last second whose cookies are dead for this id; -1 when it was not revoked."""
        entry = self._until.get(id_)
        return entry[0] if entry else -1
