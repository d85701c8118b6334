"""Passwords: checked with argon2id, and slowed down after wrong attempts.

Rules:
1. An unknown user costs the work of the costliest known one; when all hashes have the same parameters, neither the
   response nor its time reveals which users exist.
2. Hashing runs in a few threads of its own. When too many checks wait for one, further ones get 503 `busy`.
3. Wrong attempts for a name from an address delay the next ones there, up to LONGEST_PAUSE. Attempts from other
   addresses do not: an attacker could lock users out.
4. A changed password ends the sessions of the old one: `mark` is part of them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError

from proxy.errors import Busy, InvalidCredentials, TooMany

THREADS = 2  # each takes 64 MiB and a tenth of a second a password
MOST_WAITING = 16
FREE_ATTEMPTS = 5  # wrong ones in a row before delays begin
LONGEST_PAUSE = 30.0  # seconds
MOST_NAMES = 4096  # with wrong attempts that are remembered
FORGOTTEN_AFTER = 900.0  # seconds without a wrong attempt
Source = tuple[str, str]  # a name, and the address of the attempt
SHARED = ""  # the user of a line without one


def hashed(password: str) -> str:
    return PasswordHasher().hash(password)


@dataclass(slots=True)
class Attempts:
    """Wrong attempts in a row, and the time of the last one (monotonic seconds)."""

    count: int = 0
    last: float = -FORGOTTEN_AFTER

    @property
    def pause(self) -> float:
        return min(LONGEST_PAUSE, 2.0 ** min(self.count - FREE_ATTEMPTS, 10)) if self.count >= FREE_ATTEMPTS else 0.0


@dataclass(slots=True)
class Backoff:
    """The delay of a name at an address after wrong attempts, for known and unknown users alike. Bounded."""

    clock: Callable[[], float]
    attempts: dict[Source, Attempts] = field(default_factory=dict)  # the most recent last

    def begin(self, source: Source) -> None:
        """Counts a try, as wrong until it `succeeded`: attempts at the same time are attempts, too. Raises TooMany."""
        now, attempts = self.clock(), self.attempts.get(source, Attempts())
        if now - attempts.last >= FORGOTTEN_AFTER:
            attempts = Attempts()
        left = attempts.last + attempts.pause - now
        if left > 0:
            raise TooMany("Too many wrong passwords. Please wait a moment.", retry_after=left)
        self.attempts.pop(source, None)
        self.attempts[source] = Attempts(attempts.count + 1, now)
        if len(self.attempts) > MOST_NAMES:
            del self.attempts[next(iter(self.attempts))]

    def succeeded(self, source: Source) -> None:
        self.attempts.pop(source, None)


class Passwords:
    """The users of one server: lines of `user:hash`, or one hash that all share."""

    def __init__(self, lines: list[str], clock: Callable[[], float]) -> None:
        self.backoff = Backoff(clock)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="chat-proxy-argon2")
        self.waiting = 0
        self.use(lines)

    def use(self, lines: list[str]) -> None:
        self.hashes = {user: hash_ for user, _, hash_ in map(split, lines)}
        self.dummy_hash = dummy_of(max(self.hashes.values(), key=cost))

    def has(self, user: str | None) -> bool:
        return (user or SHARED) in self.hashes

    def mark(self, user: str | None) -> str:
        """A value that changes with the user's password."""
        return hashlib.blake2b(self.hashes[user or SHARED].encode(), digest_size=6).hexdigest()

    async def check(self, user: str | None, password: str, address: str) -> None:
        """Raises InvalidCredentials, TooMany (after wrong attempts) or Busy. `user` is None where all share one."""
        name = user or SHARED
        if self.waiting >= MOST_WAITING:
            raise Busy
        self.backoff.begin((name, address))
        hash_ = self.hashes.get(name, self.dummy_hash)
        matches = await self.matches(hash_, password)
        if not matches or self.hashes.get(name) != hash_:  # of an unknown user, or changed meanwhile
            raise InvalidCredentials
        self.backoff.succeeded((name, address))

    async def matches(self, hash_: str, password: str) -> bool:
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, verify, hash_, password)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


def split(line: str) -> tuple[str, str, str]:
    return (SHARED, "", line) if line.startswith("$") else line.partition(":")


def cost(hash_: str) -> int:
    parameters = extract_parameters(hash_)
    return parameters.memory_cost * parameters.time_cost


def dummy_of(hash_: str) -> str:
    """A hash with the same parameters that no password matches. Computing one would block live answers."""
    make, _, digest = hash_.rpartition("$")
    return f"{make}${base64.b64encode(secrets.token_bytes(len(digest) * 3 // 4)).decode().rstrip('=')}"


def verify(hash_: str, password: str) -> bool:
    try:
        return PasswordHasher().verify(hash_, password)
    except (VerificationError, InvalidHashError):
        return False
