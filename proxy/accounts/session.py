"""Sessions: a signed cookie that says who is asking, and nothing that is secret. Pure: time and randomness come in.

Rules:
1. The cookie holds a random id (128 bit), the mode, the subject, when it was issued and last renewed, and the
   generation; it is signed (HMAC-SHA256, a salt of its own), not encrypted: a browser may read all of it.
2. The first key signs, all of them verify. A cookie under an older key, or one older than a quarter of `idle`,
   is given anew; so rotation logs nobody out.
3. A cookie is either ours and alive, ours and expired, or bad. Bad has one face to the outside.
4. Revoking an id kills every cookie of that id issued until then, copies included. Revoking by generation kills
   whatever was issued before the generation began: of one user, or of all.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from itsdangerous import Signer

from proxy.errors import SessionExpired, Unauthenticated

if TYPE_CHECKING:
    from proxy.accounts.revocation.rules import Revocations

SALT = b"chat-proxy.session"
SEPARATOR = "."
LONGEST_COOKIE = 1024  # bytes; ours are under 200 in anonymous mode, and a subject is bounded by the login
ID_BYTES = 16
REMEMBERED = 4096  # cookies whose signature is known to hold: a few megabytes, and no HMAC for every request of a page


@dataclass(frozen=True, slots=True)
class Session:
    """One visitor. Times are integer Unix seconds; `subject` is None for anonymous visitors."""

    id: str
    mode: str
    subject: str | None
    issued: int
    renewed: int
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """A cookie that was accepted; `stale` asks for a fresh one."""

    session: Session
    stale: bool


def encode_id(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw[:ID_BYTES]).rstrip(b"=").decode()


class Sessions:
    """The codec for one set of keys (newest first), and how long its cookies live (seconds)."""

    def __init__(self, keys: list[str], *, lifetime: int, idle: int) -> None:
        self.signers = [Signer(key, SALT, SEPARATOR, "hmac", hashlib.sha256) for key in keys]
        self.derive_key = hmac.digest(keys[0].encode(), b"chat-proxy.derived", "sha256")
        self.lifetime = lifetime
        self.idle = idle
        self._verified = lru_cache(REMEMBERED)(self.verify)  # only what held is kept: a refusal raises

    # ---- making ---------------------------------------------------------------------------------------------------

    def mint(
        self,
        now: float,
        randomness: bytes,
        *,
        mode: str = "anonymous",
        subject: str | None = None,
        generation: int = 0,
    ) -> Session:
        return Session(encode_id(randomness), mode, subject, int(now), int(now), generation)

    def mint_for_address(self, now: float, address: str, revocations: Revocations) -> Session:
        """The one session that all callers of an address share who keep no cookie, such as scripts and SDKs."""
        randomness = hmac.digest(self.derive_key, address.encode(), "sha256")
        session = self.mint(now, randomness, generation=revocations.decree.generation)
        issued = max(session.issued, revocations.until(session.id) + 1)
        return replace(session, issued=issued, renewed=issued)

    def renew(self, session: Session, now: float) -> Session:
        return replace(session, renewed=int(now))

    def expires_at(self, session: Session) -> int:
        return min(session.issued + self.lifetime, session.renewed + self.idle)

    def seal(self, session: Session) -> str:
        subject = base64.urlsafe_b64encode((session.subject or "").encode()).rstrip(b"=").decode()
        fields = (session.id, session.mode, subject, session.issued, session.renewed, session.generation)
        return self.signers[0].sign(SEPARATOR.join(map(str, fields))).decode()

    # ---- reading --------------------------------------------------------------------------------------------------

    def open(self, cookies: list[bytes], now: float, revocations: Revocations) -> Opened:
        """The session in the one cookie given. Raises Unauthenticated (bad) or SessionExpired (ours, too old)."""
        if len(cookies) != 1:
            raise Unauthenticated(reason="two session cookies")
        value = cookies[0]
        if len(value) > LONGEST_COOKIE or not value.isascii():
            raise Unauthenticated(reason="session cookie is too long or not ASCII")
        session, old_key = self._verified(value)
        if revocations.kill(session):
            raise Unauthenticated(reason="session was revoked")
        if now >= self.expires_at(session):
            raise SessionExpired
        return Opened(session, stale=old_key or now - session.renewed > self.idle / 4)

    def verify(self, value: bytes) -> tuple[Session, bool]:
        """What a cookie says, and whether it is under an old key. Raises Unauthenticated."""
        payload, _, _ = value.rpartition(SEPARATOR.encode())
        for age, signer in enumerate(self.signers):
            if hmac.compare_digest(signer.sign(payload), value):  # unsign takes many spellings of one signature
                return parse(payload.decode()), age > 0
        raise Unauthenticated(reason="session cookie has no valid signature")


def parse(payload: str) -> Session:
    """The fields of a payload whose signature held; another layout is a cookie of another version of ours."""
    try:
        id_, mode, subject, issued, renewed, generation = payload.split(SEPARATOR)
        named = base64.urlsafe_b64decode(subject + "=" * (-len(subject) % 4)).decode() or None
        return Session(id_, mode, named, int(issued), int(renewed), int(generation))
    except ValueError:
        raise Unauthenticated(reason="session cookie is of another version") from None
