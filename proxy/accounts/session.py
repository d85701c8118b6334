"""Sessions: a signed cookie that identifies the client and contains no secret. Pure: time and randomness are arguments.

Rules:
1. The cookie holds a random id (128 bit), the mode, the subject, the times of issue and renewal, and the generation. It
   is signed, not encrypted: a browser may read all of it.
2. A cookie under an older key, or one older than a quarter of `idle`, is issued again, so that rotating the secret logs
   no user out.
3. A cookie is valid, expired or invalid. Every invalid cookie gets the same response.
4. Revocation is not known here: the caller checks an opened session against revocation/rules.py.
"""

from __future__ import annotations

import base64
import hmac
from dataclasses import dataclass, replace
from functools import lru_cache

from proxy.errors import Unauthenticated
from proxy.web.signing import SEPARATOR, SignedValues

SALT = b"chat-proxy.session"
LONGEST_COOKIE = 1024  # bytes; valid ones are under 200 in anonymous mode, and the login bounds a subject
ID_BYTES = 16
REMEMBERED = 4096  # verified cookies to cache: a few megabytes save an HMAC for every request of a page


@dataclass(frozen=True, slots=True)
class Session:
    """One session. Times are integer Unix seconds; `subject` is None for anonymous visitors."""

    id: str
    mode: str
    subject: str | None
    issued: int
    renewed: int
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """The session of a valid cookie; a `stale` one should be issued again."""

    session: Session
    stale: bool
    expired: bool = False


def encode_id(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw[:ID_BYTES]).rstrip(b"=").decode()


class Sessions:
    """Makes, seals and opens sessions under `keys`, newest first. `lifetime` and `idle` are in seconds."""

    def __init__(self, keys: list[str], *, lifetime: int, idle: int) -> None:
        self.codec = SignedValues(keys, SALT)
        self.derive_key = hmac.digest(keys[0].encode(), b"chat-proxy.derived", "sha256")
        self.lifetime = lifetime
        self.idle = idle
        self._verified = lru_cache(REMEMBERED)(self.verify)  # caches valid cookies only: an invalid one raises

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

    def mint_for_address(self, now: float, address: str, *, generation: int = 0) -> Session:
        """The session that all clients of an address share that keep no cookies, such as scripts and SDKs."""
        return self.mint(now, hmac.digest(self.derive_key, address.encode(), "sha256"), generation=generation)

    def renew(self, session: Session, now: float) -> Session:
        return replace(session, renewed=int(now))

    def expires_at(self, session: Session) -> int:
        return min(session.issued + self.lifetime, session.renewed + self.idle)

    def seal(self, session: Session) -> str:
        subject = base64.urlsafe_b64encode((session.subject or "").encode()).rstrip(b"=").decode()
        fields = (session.id, session.mode, subject, session.issued, session.renewed, session.generation)
        return self.codec.sign(SEPARATOR.join(map(str, fields)).encode())

    # ---- reading --------------------------------------------------------------------------------------------------

    def open(self, cookies: list[bytes], now: float) -> Opened:
        """The session in the one cookie given. Raises Unauthenticated for an invalid cookie, not for an expired one."""
        if len(cookies) != 1:
            raise Unauthenticated(reason="two session cookies")
        value = cookies[0]
        if len(value) > LONGEST_COOKIE or not value.isascii():
            raise Unauthenticated(reason="session cookie is too long or not ASCII")
        session, is_current = self._verified(value)
        stale = not is_current or now - session.renewed > self.idle / 4
        return Opened(session, stale=stale, expired=now >= self.expires_at(session))

    def verify(self, value: bytes) -> tuple[Session, bool]:
        """The session in a cookie, and whether the newest key signed it. Raises Unauthenticated."""
        verified = self.codec.verify(value)
        if verified is None:
            raise Unauthenticated(reason="session cookie has no valid signature")
        return parse(verified.payload.decode()), verified.is_current


def parse(payload: str) -> Session:
    """The fields of a signed payload. Raises Unauthenticated for the layout of another version."""
    try:
        id_, mode, subject, issued, renewed, generation = payload.split(SEPARATOR)
        name = base64.urlsafe_b64decode(subject + "=" * (-len(subject) % 4)).decode() or None
        return Session(id_, mode, name, int(issued), int(renewed), int(generation))
    except ValueError:
        raise Unauthenticated(reason="session cookie is of another version") from None
