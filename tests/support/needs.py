"""Which programs a test needs: each has a marker, and a test may start only those that its markers name.

So `-m "not nginx"` selects tests that run on a machine without nginx. A test is held to its markers by an audit hook,
which sees every program that this process starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARKERS = {
    "browser": ("chromium",),
    "nginx": ("nginx",),
    "node": ("node", "npm"),
    "process": ("python", "chat-proxy", "sh"),
    "redis": ("redis-server",),
    "tools": (),  # every other program: curl, openssl, promtool, systemd-analyze
}


class Unmarked(Exception):
    """A test starts a program that none of its markers names."""


def marker_of(program: str) -> str:
    """The marker of a program, by its file name."""
    if "playwright" in program:  # drives the browser, with a node of its own
        return "browser"
    name = Path(program).name
    return next((marker for marker, names in MARKERS.items() if name.startswith(names)), "tools")


def watch_programs(is_marked: Callable[[str], bool]) -> None:
    """Refuses, in this process and for as long as it lives, to start a program without its marker: raises Unmarked."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and not is_marked(marker := marker_of(str(arguments[0]))):
            raise Unmarked(f"{arguments[0]} is started by a test without @pytest.mark.{marker}")

    sys.addaudithook(hook)
