"""The server under every fault at once leaks nothing, does not grow, and those beside notice nothing.

By default for seconds, which shows that the soak works; `pytest -m soak` for CHAT_PROXY_SOAK_MINUTES, 30 by default.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.harness import unmeasured

from soak import soak

pytestmark = [pytest.mark.process]


def run(minutes: float, *more: str) -> str:
    """What the program prints. It must find nothing wrong."""
    command = [sys.executable, "-W", "error", soak.__file__, "--minutes", str(minutes), *more]
    done = subprocess.run(command, env=unmeasured(), capture_output=True, text=True, timeout=minutes * 60 + 60)
    print(done.stdout, done.stderr)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.quiet
def test_short_soak_finds_nothing() -> None:
    """Some seconds of all faults and all clients: every answer is what it must be, and nothing is left."""
    printed = run(0.08, "--rest", "2", "--clients", "50")
    assert "good: whole" in printed
    assert "nothing wrong" in printed


@pytest.mark.soak
def test_long_soak_finds_nothing() -> None:
    """The same for long enough to see memory grow."""
    run(float(os.environ.get("CHAT_PROXY_SOAK_MINUTES", "30")))
