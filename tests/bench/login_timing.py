"""Does the time of a refused login tell whether there is such a user?

    python tests/bench/login_timing.py [--tries 100]

Interleaves wrong passwords for a user that exists with tries for one that does not, and asks by a permutation test
how often chance alone would make the two groups differ as much. Nothing is to be seen when that is often (p > 0.05).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from contextlib import suppress

from proxy.accounts.login.password import Passwords, hashed
from proxy.errors import InvalidCredentials

SHUFFLES = 5000


async def timed(passwords: Passwords, user: str) -> float:
    """Milliseconds of one refused login."""
    began = time.perf_counter()
    with suppress(InvalidCredentials):
        await passwords.check(user, "wrong", "here")
    taken = time.perf_counter() - began
    passwords.backoff.succeeded((user, "here"))  # or the pauses would be measured
    return taken * 1000


async def measured(tries: int) -> dict[str, list[float]]:
    passwords = Passwords([f"known:{hashed('right')}"], time.monotonic)
    taken: dict[str, list[float]] = {"known": [], "unknown": []}
    order = list(taken) * (tries + 1)
    random.shuffle(order)
    for user in order:
        taken[user].append(await timed(passwords, user))
    passwords.close()
    return taken


def chance(one: list[float], other: list[float]) -> float:
    """How often shuffled groups differ in their medians by as much as these."""
    seen = abs(statistics.median(one) - statistics.median(other))
    both, count = [*one, *other], 0
    for _ in range(SHUFFLES):
        random.shuffle(both)
        count += abs(statistics.median(both[: len(one)]) - statistics.median(both[len(one) :])) >= seen
    return count / SHUFFLES


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the time of a refused login tell whether there is such a user?")
    parser.add_argument("--tries", type=int, default=100)
    taken = asyncio.run(measured(parser.parse_args().tries))
    for user, times in taken.items():
        print(
            f"{user:8} median {statistics.median(times):7.2f} ms, stdev {statistics.stdev(times):6.2f}, n {len(times)}"
        )
    print(f"p = {chance(taken['known'], taken['unknown']):.3f}")


if __name__ == "__main__":
    main()
