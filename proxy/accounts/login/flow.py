"""What the browser holds while it is away to log in somewhere else, and where it goes afterwards. Pure.

Rules:
1. The cookie is signed, not encrypted: the browser is the one party that all of it may be known to.
2. Nothing that came from outside is an address to go to, unless it is plainly a path of ours.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass

import msgspec
from itsdangerous import Signer

SALT = b"chat-proxy.login"
SEPARATOR = "."
FLOW_SECONDS = 600  # to log in over there: a password, a second factor, a mail to wait for
LONGEST_COOKIE = 2048  # bytes; ours are under 1200
LONGEST_PATH = 512  # characters

PLAIN = r"[\w\-.~!$&'()*+,;=:@]"  # what may stand in a path as it is (RFC 3986 section 3.3)
SEGMENT = rf"/(?!\.{{1,2}}(?:[/?#]|\Z))(?:{PLAIN}|%(?![01]|2[EeFf5]|5[Cc]|7[Ff])[0-9A-Fa-f]{{2}})+"
REST = rf"(?:[/?]|{PLAIN}|%(?![01]|7[Ff])[0-9A-Fa-f]{{2}})*"
OWN_PATH = re.compile(rf"(?:/|(?:{SEGMENT})+/?)(?:\?{REST})?(?:#{REST})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Flow:
    """One login under way. `replaced` is the id of the session there was before, or "". `began` is in Unix seconds."""

    state: str
    nonce: str
    verifier: str
    next: str
    replaced: str
    began: int


class FlowCookies:
    """The codec of the state cookie for one set of keys: the newest, which is first, signs; all of them verify."""

    def __init__(self, keys: list[str]) -> None:
        self.signers = [Signer(key, SALT, SEPARATOR, "hmac", hashlib.sha256) for key in keys]

    def seal(self, flow: Flow) -> str:
        return self.signers[0].sign(base64.urlsafe_b64encode(msgspec.json.encode(flow))).decode()

    def open(self, value: bytes, now: float) -> Flow | None:
        """The flow in a cookie of ours that is less than FLOW_SECONDS old; None for anything else."""
        payload = value.rpartition(SEPARATOR.encode())[0]
        if len(value) > LONGEST_COOKIE or not any([is_same(signer.sign(payload), value) for signer in self.signers]):
            return None
        try:
            flow = msgspec.json.decode(base64.urlsafe_b64decode(payload), type=Flow)
        except ValueError:  # of another version of ours
            return None
        return flow if abs(now - flow.began) < FLOW_SECONDS else None  # the clock may have gone back meanwhile


def safe_redirect_path(written: str) -> str:
    """A path of ours with its query and fragment, in ASCII as it goes into a header; for anything else the root.

    Refused is also what only some readers would take for another place: empty or dot segments, encoded slashes, dots
    and percent signs in the path, and backslashes and control characters anywhere, encoded ones too.
    """
    return written if len(written) <= LONGEST_PATH and OWN_PATH.fullmatch(written) else "/"


def encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def is_same(one: str | bytes, other: str | bytes) -> bool:
    """Compares secrets: the time it takes tells nothing."""
    one, other = (value.encode() if isinstance(value, str) else value for value in (one, other))
    return hmac.compare_digest(one, other)
