"""Passwords: who knows one, checked with argon2id, and how often one may try.

Rules:
1. A user that does not exist costs the work of the costliest that does; where all lines are of one make, neither the
   answer nor its time says which.
2. Hashing runs in a few threads of its own. Who would have to wait too long for one is told to come back.
3. Wrong tries of a name at an address slow the next ones there down, up to LONGEST_PAUSE. A guesser elsewhere slows
   nobody down: or he could lock users out.
4. A changed password ends the sessions that the old one began: `mark` is part of them.
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
FREE_TRIES = 5  # wrong ones in a row before pauses begin
LONGEST_PAUSE = 30.0  # seconds
MOST_NAMES = 4096  # with wrong tries that are remembered
FORGOTTEN_AFTER = 900.0  # seconds without a wrong try
Who = tuple[str, str]  # a name, and the address that tries it
SHARED = ""  # the user in a line that names none


def hashed(password: str) -> str:
    return PasswordHasher().hash(password)


@dataclass(slots=True)
class Tries:
    """Wrong ones in a row, and when (monotonic seconds) the last was."""

    count: int = 0
    last: float = -FORGOTTEN_AFTER

    @property
    def pause(self) -> float:
        return min(LONGEST_PAUSE, 2.0 ** min(self.count - FREE_TRIES, 10)) if self.count >= FREE_TRIES else 0.0


@dataclass(slots=True)
class Backoff:
    """How long a name must wait at an address after wrong tries, whether there is such a user or not. Bounded."""

    clock: Callable[[], float]
    tries: dict[Who, Tries] = field(default_factory=dict)  # who failed last is last

    def begin(self, who: Who) -> None:
        """Counts a try, as wrong until it `succeeded`: tries at the same time are tries, too. Raises TooMany."""
        now, tries = self.clock(), self.tries.get(who, Tries())
        if now - tries.last >= FORGOTTEN_AFTER:
            tries = Tries()
        left = tries.last + tries.pause - now
        if left > 0:
            raise TooMany("Too many wrong passwords. Please wait a moment.", retry_after=left)
        self.tries.pop(who, None)
        self.tries[who] = Tries(tries.count + 1, now)
        if len(self.tries) > MOST_NAMES:
            del self.tries[next(iter(self.tries))]

    def succeeded(self, who: Who) -> None:
        self.tries.pop(who, None)


class Passwords:
    """The users of one server: lines of `user:hash`, or one hash that all share."""

    def __init__(self, lines: list[str], clock: Callable[[], float]) -> None:
        self.backoff = Backoff(clock)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="chat-proxy-argon2")
        self.waiting = 0
        self.use(lines)

    def use(self, lines: list[str]) -> None:
        self.hashes = {user: hash_ for user, _, hash_ in map(split, lines)}
        self.nobodys = of_nobody(max(self.hashes.values(), key=cost))

    def has(self, user: str | None) -> bool:
        return (user or SHARED) in self.hashes

    def mark(self, user: str | None) -> str:
        """Something that changes with the user's password."""
        return hashlib.blake2b(self.hashes[user or SHARED].encode(), digest_size=6).hexdigest()

    async def check(self, user: str | None, password: str, address: str) -> None:
        """Raises InvalidCredentials, TooMany (after wrong tries) or Busy. `user` is None where all share one."""
        name = user or SHARED
        if self.waiting >= MOST_WAITING:
            raise Busy
        self.backoff.begin((name, address))
        hash_ = self.hashes.get(name, self.nobodys)
        matches = await self.matches(hash_, password)
        if not matches or self.hashes.get(name) != hash_:  # nobody's, or changed meanwhile
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


def of_nobody(hash_: str) -> str:
    """One of the same make that no password has, without the work of hashing one: live answers would wait for it."""
    make, _, digest = hash_.rpartition("$")
    return f"{make}${base64.b64encode(secrets.token_bytes(len(digest) * 3 // 4)).decode().rstrip('=')}"


def verify(hash_: str, password: str) -> bool:
    try:
        return PasswordHasher().verify(hash_, password)
    except (VerificationError, InvalidHashError):
        return False
