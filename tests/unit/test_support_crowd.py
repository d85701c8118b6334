"""The tests that run beside each other leave those alone that measure."""

from __future__ import annotations

import fcntl
import threading
from contextlib import ExitStack
from pathlib import Path

from support.crowd import place
from support.harness import PATIENCE, eventually


def is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_quiet_test_is_alone_and_its_turn_comes(tmp_path: Path) -> None:
    """It waits for the tests under way, and later ones wait for it, not for each other."""
    inside: list[str] = []
    quiet_is_over = threading.Event()

    def measure() -> None:
        with place(tmp_path, alone=True):
            inside.append("quiet")
            assert quiet_is_over.wait(PATIENCE)
            assert inside[-1] == "quiet"
            inside.append("quiet has gone")

    def come_later() -> None:
        with place(tmp_path, alone=False):
            inside.append("later")

    measuring, later = threading.Thread(target=measure), threading.Thread(target=come_later)
    with ExitStack() as there, place(tmp_path, alone=False):
        there.enter_context(place(tmp_path, alone=False))
        measuring.start()
        eventually(lambda: is_locked(tmp_path / "door"))  # it waits in it
        later.start()
        assert inside == []
    eventually(lambda: inside)
    assert is_locked(tmp_path / "room")
    quiet_is_over.set()
    for thread in (measuring, later):
        thread.join(PATIENCE)
    assert inside == ["quiet", "quiet has gone", "later"]
