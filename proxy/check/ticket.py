"""Tickets: short-lived values, signed with the session's secret, that open the diagnostic routes. Pure.

Rules:
1. A ticket travels in its own header, never in a URL: proxies log URLs.
2. Its salt differs from that of sessions, so neither is valid as the other.
3. The issuer's clock may be ahead as far as behind: `check` reports the difference once a ticket was accepted.
"""

from __future__ import annotations

from proxy.web.signing import SignedValues

SALT = b"chat-proxy.check"
VALID_SECONDS = 120.0
LONGEST = 128  # bytes; valid tickets have 54


class Tickets:
    """Issues and checks tickets under `keys`, newest first. Times are Unix seconds."""

    def __init__(self, keys: list[str]) -> None:
        self.codec = SignedValues(keys, SALT)

    def issue(self, now: float) -> str:
        return self.codec.sign(b"%d" % now)

    def admit(self, ticket: bytes, now: float) -> bool:
        """Whether the ticket is valid and recent."""
        if len(ticket) > LONGEST or not ticket.isascii():
            return False
        verified = self.codec.verify(ticket)
        if verified is None or not verified.payload.isdigit():
            return False
        return abs(now - int(verified.payload)) <= VALID_SECONDS
