"""The audit lines of the log: logins, failed logins and logouts."""

from __future__ import annotations

from proxy.telemetry.logs import Logs
from proxy.web.context import RequestContext


class Audit:
    def __init__(self, mode: str, logs: Logs) -> None:
        self.mode = mode
        self.logs = logs

    def line(self, context: RequestContext, event: str, **fields: str | None) -> None:
        address, request_id = context.caller.shown, context.request_id
        self.logs.line(event, mode=self.mode, **fields, address=address, request_id=request_id)
