"""Several processes run the tests beside each other; those marked `quiet` have the machine to themselves.

What a quiet test measures the machine's other work would spoil. The rules:

1. A test that is not quiet shares the room with all others, a quiet one has it alone: a lock on a file of this run.
2. Nobody enters while somebody waits at the door, so that a quiet test's turn comes however many others there are.
3. A process that dies leaves the room and the door: the kernel gives its locks back.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, how)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do where a forked child still has it open


@contextmanager
def place(run: Path, *, alone: bool) -> Iterator[None]:
    """A place among the tests of the run whose folder this is."""
    with ExitStack() as stack:
        with locked(run / "door", fcntl.LOCK_EX):
            stack.enter_context(locked(run / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


def is_quiet(item: pytest.Item) -> bool:
    return item.get_closest_marker("quiet") is not None
