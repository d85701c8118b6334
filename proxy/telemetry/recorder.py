"""What is written down about a request: its bill, its place in the metrics, its one log line, the end of its span.

Nothing here decides anything: a request that could not be written down has been answered all the same.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from proxy.chat.exchange import State
from proxy.chat.policy import ChatRequest
from proxy.chat.relay import Relay
from proxy.chat.sse import Ending, Events
from proxy.chat.upstream import UpstreamCall
from proxy.errors import Interruption, Refusal, UpstreamAuth
from proxy.telemetry.logs import Logs
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.usage import Usage
from proxy.web.cancel import CancelScope
from proxy.web.context import RequestContext

LINE: dict[str, Any] = {
    **dict.fromkeys(("request_id", "session", "address", "route", "model", "status", "code", "ending")),
    **dict.fromkeys(("ttft_ms", "duration_ms")),
    **dict.fromkeys(("events", "tokens", "bytes"), 0),
    "reason": None,
}
"""Each line has all of these, whatever its request came to."""


class RequestRecorder:
    """The books of one server."""

    def __init__(self, metrics: Metrics, logs: Logs) -> None:
        self.metrics = metrics
        self.logs = logs

    def count(self, context: RequestContext, order: ChatRequest, attempts: UpstreamCall, used: Usage) -> None:
        context.used = used
        context.log["tokens"] = used.prompt_tokens + used.completion_tokens
        context.log["retries"] = attempts.retries
        self.metrics.retries.inc(attempts.retries)
        self.metrics.tokens_in[order.model].inc(used.prompt_tokens)
        self.metrics.tokens_out[order.model].inc(used.completion_tokens)

    def note_abort(self, cancel_scope: CancelScope) -> None:
        """The browser left, and by now the upstream's socket is closed."""
        self.metrics.abort.observe(asyncio.get_running_loop().time() - cancel_scope.cancelled_at)

    def note_stream(self, context: RequestContext, relay: Relay, state: State, broke: Interruption | None) -> None:
        metrics, now = self.metrics, asyncio.get_running_loop().time()
        context.ending = ending_of(state, broke, relay.events)
        if broke is not None:
            context.code, context.reason = broke.code, broke.reason
        context.log["events"] = relay.events.count
        context.log["bytes"] = relay.bytes_sent
        metrics.gaps.add(relay.gaps.counts, relay.gaps.total)
        if relay.leaked:
            self.alarm(context, "the upstream sent our key inside a stream")
        if relay.first_at is None:
            return
        ttft = max(0.0, relay.first_at - context.started)  # uvloop's clock stands still within a turn of the loop
        context.log["ttft_ms"] = round(ttft * 1000, 1)
        metrics.first_token.observe(ttft)
        if now > relay.first_at and relay.events.count > 1:
            metrics.rate.observe(relay.events.count / (now - relay.first_at))

    def close(self, context: RequestContext, route: str | None) -> None:
        """The request's one log line, its place in the metrics, the end of its span."""
        self.metrics.requests.labels(str(context.status)).inc()
        if context.ending is not None:
            self.metrics.ending[context.ending].inc()
        if context.code is not None:
            by_upstream = context.code.startswith("upstream")
            (self.metrics.upstream_errors if by_upstream else self.metrics.refusals).labels(context.code).inc()
        known = {
            "request_id": context.request_id,
            "address": context.caller.shown,
            "route": f"{context.method} {route}" if route else None,
            "status": context.status,
            "code": context.code,
            "ending": context.ending,
            "duration_ms": round((time.monotonic() - context.started) * 1000, 1),
            "reason": context.reason,
        }
        self.logs.line("request", **(LINE | known | context.log))
        if context.trace is not None:
            context.trace.end(
                request_id=context.request_id,
                status=context.status if context.began else None,
                code=context.code,
                ending=context.ending,
                tokens=(context.used.prompt_tokens, context.used.completion_tokens) if context.used else None,
                log=context.log,
            )

    def note_no_request(self, address: str, refusal: Refusal) -> None:
        """The same for what the guard refused before it became a request."""
        self.metrics.requests.labels(str(refusal.status)).inc()
        self.metrics.refusals.labels(refusal.code).inc()
        self.logs.line("request", **(LINE | {"address": address, "status": refusal.status, "code": refusal.code}))

    def alarm_if_due(self, context: RequestContext, refusal: Refusal) -> None:
        """The key does not work, or comes back: both want the operator, not the visitor."""
        if isinstance(refusal, UpstreamAuth) or refusal.leaked:
            self.alarm(context, refusal.reason or refusal.code)

    def alarm(self, context: RequestContext, what: str) -> None:
        self.logs.line("key_alarm", "error", what=what, request_id=context.request_id)


def ending_of(state: State, broke: Interruption | None, events: Events) -> str:
    """How a stream ended, as chat_proxy_stream_endings_total counts it."""
    if state is State.ABORTED:
        return "aborted"
    if broke is not None:
        return broke.ending
    return "error" if events.ending is Ending.ERROR else "complete"
