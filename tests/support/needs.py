"""Which programs a test needs: each has a marker, and a test may start only those that its markers name.

So `-m "not nginx"` selects tests that run on a machine without nginx. Every program is started through
`subprocess.Popen`, which holds a test to its markers.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
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
    """Refuses, in this process and for as long as it lives, to start a program without its marker: raises Unmarked.

    An audit hook would do the same, but it lets other threads run while coverage installs a trace function in one.
    """
    start = subprocess.Popen.__init__

    def checked(self: subprocess.Popen[Any], args: Sequence[Any], *more: Any, **named: Any) -> None:
        program = str(args if isinstance(args, str) else args[0])
        if not is_marked(marker := marker_of(program)):
            raise Unmarked(f"{program} is started by a test without @pytest.mark.{marker}")
        start(self, args, *more, **named)

    subprocess.Popen.__init__ = checked  # type: ignore[assignment,method-assign]
