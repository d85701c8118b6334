"""What is written down about a request: its bill, its place in the metrics, its one log line, the end of its span.

Nothing here decides anything: a request that could not be written down has been answered all the same.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from proxy.errors import Interruption, Refusal, UpstreamAuth
from proxy.events import Ending, Events, Usage, usage_of
from proxy.exchange import State
from proxy.logs import Logs
from proxy.metrics import Metrics
from proxy.policy import Order
from proxy.relay import Leash, Relay
from proxy.upstream import Attempts
from proxy.visit import Visit

BYTES_PER_TOKEN = 3  # of an answer whose upstream counted nothing: the policy's figure for prompts
LINE: dict[str, Any] = {
    **dict.fromkeys(("request_id", "session", "address", "route", "model", "status", "code", "ending")),
    **dict.fromkeys(("ttft_ms", "duration_ms")),
    **dict.fromkeys(("events", "tokens", "bytes"), 0),
    "reason": None,
}
"""Each line has all of these, whatever its request came to."""


class Bill:
    """What one request cost: what the upstream counted, or else our estimate."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.used = Usage()
        self.is_known = False
        self.events: Events | None = None  # of a stream that is being relayed

    def so_far(self) -> int:
        """Of an answer that is not over."""
        return self.prompt_tokens + (self.events.count if self.events is not None else 0)

    def note_stream(self, events: Events) -> None:
        used = events.usage or Usage(self.prompt_tokens, events.count)
        if events.ending is Ending.OPEN:  # what it has counted so far may be no more than the prompt
            used = Usage(used.prompt_tokens, max(used.completion_tokens, events.count))
        self.note(used)

    def note_answer(self, answer: bytes) -> None:
        self.note(Usage(self.prompt_tokens, len(answer) // BYTES_PER_TOKEN))
        self.note(usage_of(answer) or self.used)

    def note_no_answer(self, *, paid: bool) -> None:
        """Unless there was one, before something else went wrong."""
        if paid and not self.is_known:
            self.note(Usage(self.prompt_tokens))

    def note(self, used: Usage) -> None:
        self.used, self.is_known = used, True


class Ledger:
    """The books of one server."""

    def __init__(self, metrics: Metrics, logs: Logs) -> None:
        self.metrics = metrics
        self.logs = logs

    def count(self, visit: Visit, order: Order, attempts: Attempts, used: Usage) -> None:
        visit.used = used
        visit.log["tokens"] = used.prompt_tokens + used.completion_tokens
        visit.log["retries"] = attempts.retries
        self.metrics.retries.inc(attempts.retries)
        self.metrics.tokens_in[order.model].inc(used.prompt_tokens)
        self.metrics.tokens_out[order.model].inc(used.completion_tokens)

    def note_abort(self, leash: Leash) -> None:
        """The browser left, and by now the upstream's socket is closed."""
        self.metrics.abort.observe(asyncio.get_running_loop().time() - leash.pulled_at)

    def note_stream(self, visit: Visit, relay: Relay, state: State, broke: Interruption | None) -> None:
        metrics, now = self.metrics, asyncio.get_running_loop().time()
        visit.ending = ending_of(state, broke, relay.events)
        if broke is not None:
            visit.code, visit.reason = broke.code, broke.reason
        visit.log["events"] = relay.events.count
        visit.log["bytes"] = relay.bytes_sent
        metrics.gaps.add(relay.gaps.counts, relay.gaps.total)
        if relay.leaked:
            self.alarm(visit, "the upstream sent our key inside a stream")
        if relay.first_at is None:
            return
        ttft = max(0.0, relay.first_at - visit.started)  # uvloop's clock stands still within a turn of the loop
        visit.log["ttft_ms"] = round(ttft * 1000, 1)
        metrics.first_token.observe(ttft)
        if now > relay.first_at and relay.events.count > 1:
            metrics.rate.observe(relay.events.count / (now - relay.first_at))

    def close(self, visit: Visit, route: str | None) -> None:
        """The request's one log line, its place in the metrics, the end of its span."""
        self.metrics.requests.labels(str(visit.status)).inc()
        if visit.ending is not None:
            self.metrics.ending[visit.ending].inc()
        if visit.code is not None:
            by_upstream = visit.code.startswith("upstream")
            (self.metrics.upstream_errors if by_upstream else self.metrics.refusals).labels(visit.code).inc()
        known = {
            "request_id": visit.request_id,
            "address": visit.caller.shown,
            "route": f"{visit.method} {route}" if route else None,
            "status": visit.status,
            "code": visit.code,
            "ending": visit.ending,
            "duration_ms": round((time.monotonic() - visit.started) * 1000, 1),
            "reason": visit.reason,
        }
        self.logs.line("request", **(LINE | known | visit.log))
        if visit.trace is not None:
            visit.trace.end(
                request_id=visit.request_id,
                status=visit.status if visit.began else None,
                code=visit.code,
                ending=visit.ending,
                tokens=(visit.used.prompt_tokens, visit.used.completion_tokens) if visit.used else None,
                log=visit.log,
            )

    def note_no_request(self, address: str, refusal: Refusal) -> None:
        """The same for what the guard refused before it became a request."""
        self.metrics.requests.labels(str(refusal.status)).inc()
        self.metrics.refusals.labels(refusal.code).inc()
        self.logs.line("request", **(LINE | {"address": address, "status": refusal.status, "code": refusal.code}))

    def alarm_if_due(self, visit: Visit, refusal: Refusal) -> None:
        """The key does not work, or comes back: both want the operator, not the visitor."""
        if isinstance(refusal, UpstreamAuth) or refusal.leaked:
            self.alarm(visit, refusal.reason or refusal.code)

    def alarm(self, visit: Visit, what: str) -> None:
        self.logs.line("key_alarm", "error", what=what, request_id=visit.request_id)


def ending_of(state: State, broke: Interruption | None, events: Events) -> str:
    """How a stream ended, as chat_proxy_stream_endings_total counts it."""
    if state is State.ABORTED:
        return "aborted"
    if broke is not None:
        return broke.ending
    return "error" if events.ending is Ending.ERROR else "complete"
