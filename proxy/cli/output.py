"""Messages of the commands on standard error."""

from __future__ import annotations

import sys


def complain(what: str) -> int:
    """The exit code."""
    print(f"chat-proxy: {what}", file=sys.stderr)
    return 2
