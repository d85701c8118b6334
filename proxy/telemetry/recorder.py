"""Writes one request into the log, the metrics and the trace.

Nothing here decides anything: a request that cannot be recorded has been answered all the same.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from proxy.errors import Refusal, UpstreamAuth
from proxy.telemetry.logs import Logs
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.records import Outcome, RequestRecord, Usage

LINE: dict[str, Any] = {
    **dict.fromkeys(("request_id", "session", "address", "route", "model", "status", "code", "ending")),
    **dict.fromkeys(("ttft_ms", "duration_ms")),
    **dict.fromkeys(("events", "tokens", "bytes"), 0),
    "reason": None,
}
"""The fields of every request line, with the value of those that a request did not fill."""


class RequestRecorder:
    """The recorder of one server."""

    def __init__(self, metrics: Metrics, logs: Logs) -> None:
        self.metrics = metrics
        self.logs = logs

    def record_tokens(self, record: RequestRecord, model: str, used: Usage, retries: int) -> None:
        """The tokens that were settled for one answer, and how often the upstream was asked again."""
        record.used = used
        record.log["tokens"] = used.prompt_tokens + used.completion_tokens
        record.log["retries"] = retries
        self.metrics.retries.inc(retries)
        self.metrics.tokens_in[model].inc(used.prompt_tokens)
        self.metrics.tokens_out[model].inc(used.completion_tokens)

    def record_abort(self, seconds: float) -> None:
        """The time from the client's disconnect to the close of the upstream's socket."""
        self.metrics.abort.observe(seconds)

    def record_stream(self, record: RequestRecord, outcome: Outcome) -> None:
        metrics, now = self.metrics, asyncio.get_running_loop().time()
        record.ending = outcome.ending
        if outcome.error is not None:
            record.code, record.reason = outcome.error.code, outcome.error.reason
        record.log["events"] = outcome.events
        record.log["bytes"] = outcome.bytes
        metrics.gaps.add(outcome.gaps.counts, outcome.gaps.total)
        if outcome.abort_seconds is not None:
            self.record_abort(outcome.abort_seconds)
        if outcome.key_leaked:
            self.alarm(record, "the upstream sent our key inside a stream")
        if outcome.first_at is None:
            return
        ttft = max(0.0, outcome.first_at - record.started)  # uvloop's clock stands still within a turn of the loop
        record.log["ttft_ms"] = round(ttft * 1000, 1)
        metrics.first_token.observe(ttft)
        if now > outcome.first_at and outcome.events > 1:
            metrics.rate.observe(outcome.events / (now - outcome.first_at))

    def close(self, record: RequestRecord) -> None:
        """Writes the request's log line, counts it and ends its span."""
        self.metrics.requests.labels(str(record.status)).inc()
        if record.ending is not None:
            self.metrics.ending[record.ending].inc()
        if record.code is not None:
            by_upstream = record.code.startswith("upstream")
            (self.metrics.upstream_errors if by_upstream else self.metrics.refusals).labels(record.code).inc()
        filled = {
            "request_id": record.request_id,
            "address": record.address,
            "route": f"{record.method} {record.route}" if record.route else None,
            "status": record.status,
            "code": record.code,
            "ending": record.ending,
            "duration_ms": round((time.monotonic() - record.started) * 1000, 1),
            "reason": record.reason,
        }
        self.logs.line("request", **(LINE | filled | record.log))
        if record.trace is not None:
            record.trace.end(
                request_id=record.request_id,
                status=record.status if record.began else None,
                code=record.code,
                ending=record.ending,
                tokens=(record.used.prompt_tokens, record.used.completion_tokens) if record.used else None,
                log=record.log,
            )

    def record_invalid(self, address: str, refusal: Refusal) -> None:
        """The same for bytes that the protocol refused before they became a request."""
        self.metrics.requests.labels(str(refusal.status)).inc()
        self.metrics.refusals.labels(refusal.code).inc()
        self.logs.line("request", **(LINE | {"address": address, "status": refusal.status, "code": refusal.code}))

    def alarm_if_due(self, record: RequestRecord, refusal: Refusal) -> None:
        """The API key is not accepted, or came back in an answer: the operator has to act, not the client."""
        if isinstance(refusal, UpstreamAuth) or refusal.leaked:
            self.alarm(record, refusal.reason or refusal.code)

    def alarm(self, record: RequestRecord, what: str) -> None:
        self.logs.line("key_alarm", "error", what=what, request_id=record.request_id)
