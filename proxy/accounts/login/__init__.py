"""The ways to log in, one module each, independent of each other."""

from __future__ import annotations


class LoginFailed(Exception):
    """A login that failed.

    `status` is 400 when the browser or its user caused it, 403 when the provider authenticated a user that is not
    allowed, 502 when the provider failed. `reason` is for the log.
    """

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(reason)
