"""The API key: its file, and how an answer is searched for it."""

from __future__ import annotations

import re
from collections.abc import Callable

from proxy import settings

KEY_CHECK = 1.0  # seconds between two checks of the key's file
KEY_PREFIX = re.compile(r"(?:[a-z]{1,12}[-_]){0,3}")  # sk-proj-; of a random part it would seldom take anything
PIECE = 8  # characters of a key that identify it
PLACEHOLDERS = frozenset(  # keys for servers that check none, as long as a piece
    {"dummy-key", "lm-studio", "no-key-required", "not-needed", "not_needed", "placeholder", "sk-no-key-required"}
)


class ApiKey:
    """The key and its file: a new key in the file is used from the next request on.

    `pieces` finds any PIECE characters of the key's random part in lower or upper case; of the one before it, too,
    since requests that went out with that may still be answered.
    """

    def __init__(self, secret: settings.Secret, clock: Callable[[], float]) -> None:
        self._secret = secret
        self._clock = clock
        self._look_again = clock() + KEY_CHECK
        self.pieces = pieces_of(secret.value)

    def value(self) -> str:
        if self._secret.path is not None and self._clock() >= self._look_again:
            self.reload()
        return self._secret.value

    def reload(self) -> None:
        self._look_again = self._clock() + KEY_CHECK
        again = self._secret.again()
        if again != self._secret:
            self.pieces = pieces_of(again.value, self._secret.value)
            self._secret = again


def secret_in(key: str) -> bytes:
    """The bytes that no answer may contain; empty where the key is too short for a secret, or a known placeholder."""
    return b"" if len(key) < PIECE or key.lower() in PLACEHOLDERS else key.encode()


def pieces_of(*keys: str) -> re.Pattern[bytes]:
    """A pattern that finds any PIECE characters of a key's random part: the part after prefixes like `sk-proj-`.

    Where that part is shorter, it finds the whole key.
    """
    pieces = set()
    for key in filter(secret_in, keys):
        secret_part = KEY_PREFIX.sub("", key, count=1)
        if len(secret_part) < PIECE:
            pieces.add(key)
        pieces |= {secret_part[i : i + PIECE] for i in range(len(secret_part) - PIECE + 1)}
    return re.compile(("|".join(re.escape(piece) for piece in sorted(pieces)) or "(?!)").encode(), re.IGNORECASE)
