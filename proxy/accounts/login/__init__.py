"""The ways to log in. Each room knows one of them and nothing of the others; `access` says who may do what."""

from __future__ import annotations


class LoginFailed(Exception):
    """A login that came to nothing.

    `status` says whose doing it was: 400 the browser's or its user's, 403 somebody we know and do not let in, 502 the
    provider's. `reason` is what really happened, for the log.
    """

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(reason)
