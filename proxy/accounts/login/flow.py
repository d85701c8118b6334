"""The cookie of a login under way at the provider, and the path to return to. Pure.

Rules:
1. The cookie is signed, not encrypted: the browser may read all of it.
2. A redirect goes to a path of this server only, never to an address from outside.
"""

from __future__ import annotations

import base64
import hmac
import re
from dataclasses import dataclass

import msgspec

from proxy.web.signing import SignedValues

SALT = b"chat-proxy.login"
CALLBACK = "/api/session/callback"
FLOW_SECONDS = 600  # for a login at the provider: a password, a second factor, an e-mail
LONGEST_COOKIE = 2048  # bytes; valid ones are under 1200
LONGEST_PATH = 512  # characters

PLAIN = r"[\w\-.~!$&'()*+,;=:@]"  # characters of a path without escapes (RFC 3986 section 3.3)
SEGMENT = rf"/(?!\.{{1,2}}(?:[/?#]|\Z))(?:{PLAIN}|%(?![01]|2[EeFf5]|5[Cc]|7[Ff])[0-9A-Fa-f]{{2}})+"
REST = rf"(?:[/?]|{PLAIN}|%(?![01]|7[Ff])[0-9A-Fa-f]{{2}})*"
OWN_PATH = re.compile(rf"(?:/|(?:{SEGMENT})+/?)(?:\?{REST})?(?:#{REST})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Flow:
    """One login under way. `replaced` is the id of the previous session, or "". `began` is in Unix seconds."""

    state: str
    nonce: str
    verifier: str
    next: str
    replaced: str
    began: int


class FlowCookies:
    """The codec of the login cookie under `keys`, newest first."""

    def __init__(self, keys: list[str]) -> None:
        self.codec = SignedValues(keys, SALT)

    def seal(self, flow: Flow) -> str:
        return self.codec.sign(base64.urlsafe_b64encode(msgspec.json.encode(flow)))

    def open(self, value: bytes, now: float) -> Flow | None:
        """The flow of a valid cookie that is less than FLOW_SECONDS old; None otherwise."""
        if len(value) > LONGEST_COOKIE or (verified := self.codec.verify(value)) is None:
            return None
        try:
            flow = msgspec.json.decode(base64.urlsafe_b64decode(verified.payload), type=Flow)
        except ValueError:  # a cookie of another version
            return None
        return flow if abs(now - flow.began) < FLOW_SECONDS else None  # abs: the clock may have gone back


def safe_redirect_path(written: str) -> str:
    """A path of this server with query and fragment, in ASCII; "/" for everything else.

    Also refused is what some parsers read as another address: empty or dot segments, encoded slashes, dots and percent
    signs in the path, and backslashes and control characters anywhere, encoded or not.
    """
    return written if len(written) <= LONGEST_PATH and OWN_PATH.fullmatch(written) else "/"


def encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def is_same(one: str | bytes, other: str | bytes) -> bool:
    """Compares secrets in constant time."""
    one, other = (value.encode() if isinstance(value, str) else value for value in (one, other))
    return hmac.compare_digest(one, other)
