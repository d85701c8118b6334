"""Gets one answer from the upstream and gives it to the client, streamed or whole.

Rules:
1. An exception leaves this module only before the response has begun: it becomes a status. From then on a fault is an
   event in the stream, and the stream's Outcome reports it.
2. When the client leaves, in any phase, the upstream's socket is closed. The tokens that were used are always noted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from proxy.chat.api_key import secret_in
from proxy.chat.policy import ChatRequest
from proxy.chat.relay import Relay
from proxy.chat.sse import Events
from proxy.chat.upstream import Upstream, UpstreamCall
from proxy.chat.usage import UsageMeter
from proxy.errors import Draining, GatewayTimeout, Interruption, Refusal, StreamDrained
from proxy.settings import Settings
from proxy.telemetry.logs import Logs
from proxy.telemetry.recorder import RequestRecorder
from proxy.telemetry.records import Outcome
from proxy.web.cancel import CancelScope, ClientGone
from proxy.web.context import RequestContext
from proxy.web.headers import STREAM_HEADERS

T = TypeVar("T")


class Answers:
    """The answers of one server. `active_scopes` holds the cancel scopes of those under way, for the drain."""

    def __init__(
        self,
        settings: Settings,
        upstream: Upstream,
        recorder: RequestRecorder,
        logs: Logs,
        active_scopes: set[CancelScope],
    ) -> None:
        self.idle_timeout = settings.upstream.idle_timeout
        self.total_timeout = settings.upstream.total_timeout
        self.comment_seconds = settings.server.comment_seconds
        self.upstream = upstream
        self.recorder = recorder
        self.logs = logs
        self.active_scopes = active_scopes

    async def answer(
        self, context: RequestContext, request: ChatRequest, call: UpstreamCall, meter: UsageMeter
    ) -> None:
        """Answers one request to its end. Raises a Refusal, or ClientGone, before the response has begun."""
        try:
            await (self.stream if request.stream else self.complete)(context, request, call, meter)
        except Refusal as refusal:
            meter.note_no_answer(paid=refusal.billed)
            raise
        except Exception:  # the client left, or a bug
            meter.note_no_answer(paid=call.sent)
            raise

    async def stream(
        self, context: RequestContext, request: ChatRequest, call: UpstreamCall, meter: UsageMeter
    ) -> None:
        """Relays one stream. From its head on, `relay.run` reports faults in its Outcome."""

        def relay(scope: CancelScope) -> Awaitable[Outcome]:
            return self.relay(context, request, call, meter, scope)

        outcome = await self.until_client_leaves(context, call, relay)
        if outcome.bug is not None:
            self.logs.bug(outcome.bug, request_id=context.request_id)
        self.recorder.record_stream(context, outcome)

    async def relay(
        self, context: RequestContext, request: ChatRequest, call: UpstreamCall, meter: UsageMeter, scope: CancelScope
    ) -> Outcome:
        source = await self.upstream.stream(call)
        try:
            request.body = call.body = b""  # prompts are long, and answers take their time
            events = Events(secret_in(call.key), request.choices, withhold_usage=request.usage_for_us)
            idle, total, comment = self.idle_timeout, self.total_timeout, self.comment_seconds
            relay = Relay(source, context.send, events, scope, idle=idle, total=total, comment=comment)
            meter.events = events
            return await relay.run(context.head(200, [*STREAM_HEADERS, *context.limit_headers]))
        finally:
            source.abort()
            if meter.events is not None:
                meter.note_stream(meter.events)

    async def complete(
        self, context: RequestContext, request: ChatRequest, call: UpstreamCall, meter: UsageMeter
    ) -> None:
        """Passes on one whole answer."""

        def ask(_: CancelScope) -> Awaitable[bytes]:
            return self.upstream.complete(call)

        answer = await self.until_client_leaves(context, call, ask)
        meter.note_answer(answer)
        context.log["bytes"] = len(answer)
        await context.answer(200, answer, context.limit_headers)

    async def until_client_leaves(
        self, context: RequestContext, call: UpstreamCall, work: Callable[[CancelScope], Awaitable[T]]
    ) -> T:
        """The result of `work`, which is cancelled when the client leaves (ClientGone) or the drain ends (Draining)."""
        scope = CancelScope(context.receive, self.active_scopes)
        try:
            async with scope:
                await scope.listen()
                return await work(scope)
        except ClientGone:
            self.recorder.record_abort(asyncio.get_running_loop().time() - scope.cancelled_at)
            raise
        except Interruption as interruption:
            raise refusal_before_head(interruption, call) from None


def refusal_before_head(interruption: Interruption, call: UpstreamCall) -> Refusal:
    """The refusal that reports an interruption while the response can still have a status."""
    if isinstance(interruption, StreamDrained):
        return Draining(billed=call.sent)
    return GatewayTimeout(should_retry=False, reason=interruption.reason, billed=call.sent)
