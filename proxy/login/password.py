"""Passwords: who knows one, checked with argon2id, and how often one may try.

Rules:
1. A user that does not exist costs the same work as one that does; neither the answer nor its time says which.
2. Hashing runs in a few threads of its own. Who would have to wait too long for one is told to come back.
3. Wrong tries slow a user's next ones down, up to LONGEST_PAUSE. Nobody is locked out: who could do that to a user
   would be a guesser.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError

from proxy.errors import Busy, InvalidCredentials, TooMany

THREADS = 2  # each takes 64 MiB and a tenth of a second a password
MOST_WAITING = 16
FREE_TRIES = 5  # wrong ones in a row before pauses begin
LONGEST_PAUSE = 30.0  # seconds
MOST_NAMES = 4096  # with wrong tries that are remembered
FORGOTTEN_AFTER = 900.0  # seconds without a wrong try
SHARED = ""  # the user in a line that names none


def hashed(password: str) -> str:
    return PasswordHasher().hash(password)


@dataclass(slots=True)
class Tries:
    """Wrong ones in a row, and when (monotonic seconds) the last was."""

    count: int = 0
    last: float = 0.0


@dataclass(slots=True)
class Backoff:
    """How long a name must wait after wrong tries, whether there is such a user or not. Bounded in its names."""

    clock: Callable[[], float]
    tries: dict[str, Tries] = field(default_factory=dict)  # who failed last is last

    def check(self, user: str) -> None:
        """Raises TooMany while a pause lasts."""
        tries = self.tries.get(user)
        if tries is None or tries.count < FREE_TRIES:
            return
        pause = min(LONGEST_PAUSE, 2.0 ** (tries.count - FREE_TRIES))
        left = tries.last + pause - self.clock()
        if left > 0:
            raise TooMany("Too many wrong passwords. Please wait a moment.", retry_after=left)

    def failed(self, user: str) -> None:
        now, tries = self.clock(), self.tries.pop(user, Tries())
        count = tries.count if now - tries.last < FORGOTTEN_AFTER else 0
        self.tries[user] = Tries(count + 1, now)
        if len(self.tries) > MOST_NAMES:
            del self.tries[next(iter(self.tries))]

    def succeeded(self, user: str) -> None:
        self.tries.pop(user, None)


class Passwords:
    """The users of one server: lines of `user:hash`, or one hash that all share."""

    def __init__(self, lines: list[str], clock: Callable[[], float]) -> None:
        self.backoff = Backoff(clock)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="chat-proxy-argon2")
        self.waiting = 0
        self.use(lines)

    def use(self, lines: list[str]) -> None:
        self.hashes = {user: hash_ for user, _, hash_ in map(split, lines)}
        some = next(iter(self.hashes.values()))
        self.nobodys = PasswordHasher.from_parameters(extract_parameters(some)).hash(secrets.token_urlsafe(16))

    def has(self, user: str | None) -> bool:
        return (user or SHARED) in self.hashes

    async def check(self, user: str | None, password: str) -> None:
        """Raises InvalidCredentials, TooMany (after wrong tries) or Busy. `user` is None where all share one."""
        name = user or SHARED
        self.backoff.check(name)
        matches = await self.matches(self.hashes.get(name, self.nobodys), password)
        if not matches or name not in self.hashes:
            self.backoff.failed(name)
            raise InvalidCredentials
        self.backoff.succeeded(name)

    async def matches(self, hash_: str, password: str) -> bool:
        if self.waiting >= MOST_WAITING:
            raise Busy
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, verify, hash_, password)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


def split(line: str) -> tuple[str, str, str]:
    return (SHARED, "", line) if line.startswith("$") else line.partition(":")


def verify(hash_: str, password: str) -> bool:
    try:
        return PasswordHasher().verify(hash_, password)
    except (VerificationError, InvalidHashError):
        return False
