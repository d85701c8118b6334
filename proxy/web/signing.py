"""Signs values that a client keeps and sends back: session cookies, login cookies, check tickets. Pure.

Rules:
1. HMAC-SHA256 with a salt for each purpose, so that a value of one purpose is not valid for another.
2. The newest key signs, all keys verify: rotating the secret invalidates nothing.
3. A value is valid only in the exact spelling that was signed: base64 decoders accept several of one signature.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

from itsdangerous import Signer

SEPARATOR = "."


class Verified(NamedTuple):
    """The payload of a valid value. `is_current`: the newest key signed it."""

    payload: bytes
    is_current: bool


class SignedValues:
    """The codec of one purpose. `keys` are newest first."""

    def __init__(self, keys: list[str], salt: bytes) -> None:
        self.signers = [Signer(key, salt, SEPARATOR, "hmac", hashlib.sha256) for key in keys]

    def sign(self, payload: bytes) -> str:
        return self.signers[0].sign(payload).decode()

    def verify(self, value: bytes) -> Verified | None:
        """The payload of a value that one of the keys signed, else None. Every key is tried: constant time."""
        payload, _, _ = value.rpartition(SEPARATOR.encode())
        matches = [hmac.compare_digest(signer.sign(payload), value) for signer in self.signers]
        return Verified(payload, matches[0]) if any(matches) else None
