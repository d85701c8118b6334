"""The API key: its file, and the pattern that finds parts of it in a response."""

from __future__ import annotations

import re
from collections.abc import Callable

from proxy import settings

KEY_CHECK = 1.0  # seconds between two checks of the key's file
KEY_PREFIX = re.compile(r"(?:[a-z]{1,12}[-_]){0,3}")  # sk-proj-; it rarely matches in a random part
PIECE = 8  # characters of a key that are enough to identify it
PLACEHOLDERS = frozenset(  # for servers that check no key; these are at least a PIECE long
    {"dummy-key", "lm-studio", "no-key-required", "not-needed", "not_needed", "placeholder", "sk-no-key-required"}
)


class ApiKey:
    """The key and its file. A new key in the file is used within KEY_CHECK seconds, from the next request on.

    `pieces` finds any PIECE characters of the key's random part in lower or upper case. It also finds those of the
    previous key: responses to requests with that key may still be arriving.
    """

    def __init__(self, secret: settings.Secret, clock: Callable[[], float]) -> None:
        self._secret = secret
        self._clock = clock
        self._next_check = clock() + KEY_CHECK
        self.pieces = pieces_of(secret.value)

    def value(self) -> str:
        if self._secret.path is not None and self._clock() >= self._next_check:
            self.reload()
        return self._secret.value

    def reload(self) -> None:
        self._next_check = self._clock() + KEY_CHECK
        reread = self._secret.again()
        if reread != self._secret:
            self.pieces = pieces_of(reread.value, self._secret.value)
            self._secret = reread


def secret_in(key: str) -> bytes:
    """The bytes that no response may contain; empty if the key is shorter than PIECE or a known placeholder."""
    return b"" if len(key) < PIECE or key.lower() in PLACEHOLDERS else key.encode()


def pieces_of(*keys: str) -> re.Pattern[bytes]:
    """A pattern that finds any PIECE characters of a key's random part: the part after prefixes like `sk-proj-`.

    If that part is shorter, the pattern finds the whole key.
    """
    pieces = set()
    for key in filter(secret_in, keys):
        secret_part = KEY_PREFIX.sub("", key, count=1)
        if len(secret_part) < PIECE:
            pieces.add(key)
        pieces |= {secret_part[i : i + PIECE] for i in range(len(secret_part) - PIECE + 1)}
    return re.compile(("|".join(re.escape(piece) for piece in sorted(pieces)) or "(?!)").encode(), re.IGNORECASE)
