"""Holds the tests to the fault table: when the whole suite is collected, each fault must have a test on each loop.

And gives those of the page their browser.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import browser, context
from faults import FAULTS
from harness import LOOPS

__all__ = ["browser", "context"]


@pytest.hookimpl(tryfirst=True)  # before -k and -m take some away
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    covered = {(number, loop) for item in items for number in numbers_of(item) for loop in loops_of(item)}
    if unknown := {number for number, _ in covered} - set(FAULTS):
        raise pytest.UsageError(f"no such fault: {sorted(unknown)}")
    if {item.path for item in items} != set(Path(__file__).parent.glob("test_*.py")):
        return  # a part of the suite was asked for
    missing = [
        f"{number} ({name}) on {loop}"
        for number, name in FAULTS.items()
        for loop in LOOPS
        if (number, loop) not in covered
    ]
    if missing:
        raise pytest.UsageError("faults without a test: " + "; ".join(missing))


def numbers_of(item: pytest.Item) -> list[int]:
    return [number for mark in item.iter_markers("fault") for number in mark.args]


def loops_of(item: pytest.Item) -> list[str]:
    """The loop that the item runs on, as one of its parameters names it."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    return [value for value in values if isinstance(value, str) and value in LOOPS]
