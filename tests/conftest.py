"""Holds the tests to the fault table: when the whole suite is collected, each fault must have a test on each loop.

And gives those of the page their browser, those of the store their Redis, and each test its place among those that run
beside it. Each test may start the programs that its markers name, and no others.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.browser import browser, context
from support.crowd import is_quiet, place
from support.faults import FAULTS
from support.harness import LOOPS
from support.needs import watch_programs
from support.redis_server import redis_folder, store

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

__all__ = ["browser", "context", "redis_folder", "store"]


running: list[pytest.Item] = []  # the test that this process is running


def pytest_configure() -> None:
    watch_programs(lambda marker: not running or running[0].get_closest_marker(marker) is not None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # we run in the background; whom we start would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -k and -m take some away
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=is_quiet)  # the quiet ones last: nobody waits then, and nobody is waited for
    covered = {(number, loop) for item in items for number in numbers_of(item) for loop in loops_of(item)}
    if unknown := {number for number, _ in covered} - set(FAULTS):
        raise pytest.UsageError(f"no such fault: {sorted(unknown)}")
    if {item.path for item in items} != set(Path(__file__).parent.rglob("test_*.py")):
        return  # a part of the suite was asked for
    missing = [
        f"{number} ({name}) on {loop}"
        for number, name in FAULTS.items()
        for loop in LOOPS
        if (number, loop) not in covered
    ]
    if missing:
        raise pytest.UsageError("faults without a test: " + "; ".join(missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    running[:] = [item]
    if not hasattr(item.config, "workerinput"):
        return (yield)  # there are no others
    run: Path = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    with place(run, alone=is_quiet(item)):
        return (yield)


def numbers_of(item: pytest.Item) -> list[int]:
    return [number for mark in item.iter_markers("fault") for number in mark.args]


def loops_of(item: pytest.Item) -> list[str]:
    """The loop that the item runs on, as one of its parameters names it."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    return [value for value in values if isinstance(value, str) and value in LOOPS]
