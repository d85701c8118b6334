"""Tickets: a short-lived word, signed with the session's secret, that opens the diagnostic routes. Pure.

Rules:
1. It travels in a header of its own, never in an address: addresses end up in the logs of whatever is in front.
2. The newest key signs, all of them verify, as with sessions; the salt is another, so neither passes for the other.
3. The clock of whoever issued it may be ahead as far as it may be behind: `check` tells how far, once it is let in.
"""

from __future__ import annotations

import hashlib
import hmac

from itsdangerous import Signer

SALT = b"chat-proxy.check"
VALID_SECONDS = 120.0
LONGEST = 128  # bytes; ours are 54


class Tickets:
    """The codec for one set of keys, newest first. Times are Unix seconds."""

    def __init__(self, keys: list[str]) -> None:
        self.signers = [Signer(key, SALT, ".", "hmac", hashlib.sha256) for key in keys]

    def issue(self, now: float) -> str:
        return self.signers[0].sign(b"%d" % now).decode()

    def admit(self, ticket: bytes, now: float) -> bool:
        """Whether this is one of ours, and of these minutes."""
        if len(ticket) > LONGEST or not ticket.isascii():
            return False
        issued, _, _ = ticket.partition(b".")
        if not any(hmac.compare_digest(signer.sign(issued), ticket) for signer in self.signers):
            return False
        return issued.isdigit() and abs(now - int(issued)) <= VALID_SECONDS
