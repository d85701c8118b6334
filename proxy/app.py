"""The application: the routes, and the way of a request through the house.

    edge -> session -> request limits -> policy -> leases and tokens -> upstream -> relay -> settle

`ChatProxy.chat` is that way, top to bottom. The order in which faults are told is part of the contract, so the order
of its lines is too. `Resource` is what all addresses have in common: refusals, headers, the log line.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
from starlette.routing import Mount, Route, Router
from starlette.types import Receive, Scope, Send

from proxy import __version__
from proxy.accounts.access import CALLBACK, Access
from proxy.accounts.login import LoginFailed
from proxy.accounts.login.failed_page import failed_login
from proxy.accounts.session import Session
from proxy.chat import policy
from proxy.chat.exchange import Event, Exchange, State
from proxy.chat.relay import Relay
from proxy.chat.sse import Events
from proxy.chat.upstream import Upstream, UpstreamCall, secret_in
from proxy.chat.usage import UsageMeter
from proxy.check.report import CHAT, LOOK
from proxy.check.routes import Diagnosis
from proxy.errors import (
    Draining,
    GatewayTimeout,
    HeaderList,
    InternalError,
    Interruption,
    LimitsUnavailable,
    MethodNotAllowed,
    NotFound,
    Refusal,
    StreamDrained,
    StreamFailed,
    TooMany,
)
from proxy.limits.limiter import Limiter
from proxy.limits.requests import ask, diagnose, refuse
from proxy.limits.status import LimitStatus, Subject, limit_headers
from proxy.settings import Settings, refused_by_opentelemetry
from proxy.telemetry.logs import Bridge, Logs
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.recorder import RequestRecorder
from proxy.transport.connection import ResponseStream
from proxy.web.cancel import CancelScope, ClientGone
from proxy.web.client import Edge
from proxy.web.context import RequestContext
from proxy.web.headers import STREAM_HEADERS, bare_refusal, join_repeated
from proxy.web.probes import Probe
from proxy.web.static_files import Page, page_folder

if TYPE_CHECKING:
    from proxy.telemetry.traces import Traces


Handler = Callable[[RequestContext], Awaitable[None]]

HSTS = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")


encode = msgspec.json.Encoder().encode


class Resource:
    """One address: its methods, and what all answers have in common."""

    def __init__(self, proxy: ChatProxy, route: str | None = None, **methods: Handler) -> None:
        self.proxy = proxy
        self.route = route  # as the log names it; what a visitor typed does not belong there
        self.methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        proxy = self.proxy
        context = proxy.new_context(scope, receive, send, self.route)
        proxy.enter()
        try:
            try:
                handler = await self.handler(context)
                await handler(context)
            except Refusal as refusal:
                proxy.ledger.alarm_if_due(context, refusal)
                await context.refuse(await proxy.limited(context, refusal))
        except ClientGone:
            context.ending = "aborted"
        except Exception as error:  # noqa: BLE001  # the one place where a bug becomes an answer
            proxy.logs.bug(error, request_id=context.request_id)
            context.code = InternalError.code
            if not context.began:
                await context.refuse(InternalError())
        finally:
            proxy.ledger.close(context, self.route)
            proxy.leave()

    async def handler(self, context: RequestContext) -> Handler:
        if self.proxy.draining:
            await context.drop_body()
            raise Draining
        if not self.methods:
            raise NotFound
        if context.method not in self.methods:
            raise MethodNotAllowed(headers=[(b"allow", ", ".join(self.methods).encode())])
        self.proxy.edge.check_host(context.headers)
        return self.methods[context.method]


class DiagnosticRoute(Resource):
    """An address at which a bearer of a ticket is shown what becomes of requests and answers there.

    The Host is let be: what became of it on the way is what a bearer wants to know. To anybody else the address is
    what its methods say; without any, like one that is not there.
    """

    def __init__(self, proxy: ChatProxy, route: str, show: Handler, **methods: Handler) -> None:
        super().__init__(proxy, route, **methods)
        self.show = show

    async def handler(self, context: RequestContext) -> Handler:
        if self.proxy.draining or not self.proxy.access.admits_check(context):
            return await super().handler(context)
        context.log["check"] = True
        context.standings = await self.proxy.limits.charge(diagnose, Subject("check", "check"))
        return self.examine

    async def examine(self, context: RequestContext) -> None:
        with suppress(ClientGone):  # no chat was broken off
            await self.show(context)


class ChatProxy:
    """The ASGI application of one server. Everything it counts and remembers is its own."""

    def __init__(
        self,
        settings: Settings,
        *,
        transport: httpx.AsyncBaseTransport,
        logs: Logs,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        server = settings.server
        self.settings = settings
        self.logs = logs
        self.wall = wall
        self.edge = Edge(server)
        self.limits = Limiter(settings.limits, server.max_streams, clock, self.note_store, logs.bug)
        self.access = Access(
            settings, self.edge, self.limits, transport, logs, clock=clock, wall=wall, randomness=randomness
        )
        self.upstream = Upstream(
            settings.upstream, transport, user_agent=f"chat-proxy/{__version__}", random=secrets.SystemRandom().random
        )
        self.transport = transport
        self.metrics = Metrics(settings.policy.models)
        self.ledger = RequestRecorder(self.metrics, logs)
        self.metrics.streams.set_function(lambda: self.limits.leases.live)
        self.metrics.store_up.set_function(lambda: self.limits.is_up)
        self.traces = self.open_traces() if settings.traces.enabled else None
        self.base_headers: HeaderList = [HSTS] if server.is_https else []
        self.run_id = randomness(6).hex()  # with a number behind it, the id of a request: unique, and cheap
        self.numbers = itertools.count(1)
        self.draining = False
        self.is_cut = False  # the drain's time is over
        self.busy = 0  # requests being answered
        self.quiet = asyncio.Event()  # set while there are none
        self.quiet.set()
        self.live: set[CancelScope] = set()  # those among them that the drain lets go on for a while
        self.diagnosis = Diagnosis(
            settings,
            self.edge,
            self.live,
            server=self.run_id,
            cookie=self.access.cookie,
            is_draining=lambda: self.draining,
            wall=wall,
        )
        self.nothing = Resource(self)
        self.router = self.build_router()

    def open_traces(self) -> Traces:
        """Raises SettingsError for variables that OpenTelemetry refuses, some of them when it is imported."""
        bridge, upstream = Bridge(self.logs), self.settings.upstream.base_url
        try:
            from proxy.telemetry.traces import Traces  # opentelemetry is needed here only

            return Traces(self.settings.traces, upstream, bridge=bridge, note=self.note_traces)
        except Exception as error:  # noqa: BLE001  # of any kind, as it comes
            raise refused_by_opentelemetry(error) from None

    def build_router(self) -> Router:
        api: dict[str, dict[str, Handler]] = {
            "/api/v1/models": {"GET": self.list_models},
            "/api/session": {"GET": self.show_session, "DELETE": self.end_session},
        }
        if self.access.mode == "password":
            api["/api/session"]["POST"] = self.log_in
        if self.access.mode == "oidc":
            api["/api/session/login"] = {"GET": self.start_login}
            api[CALLBACK] = {"GET": self.finish_login}
        nothing, show = self.nothing, self.diagnosis.show
        page = page_folder(self.settings.server.static_dir)
        return Router(
            [
                *(Route(path, DiagnosticRoute(self, path, show, POST=self.chat)) for path in CHAT),
                *(Route(path, Resource(self, path, **methods)) for path, methods in api.items()),
                Route(LOOK, DiagnosticRoute(self, LOOK, show)),
                Route("/healthz", Probe(lambda: True, self.base_headers)),
                Route("/readyz", Probe(lambda: not self.draining, self.base_headers)),
                Mount("/api", nothing),
                *([Mount("/", Page(page, self.base_headers, nothing))] if page else []),
            ],
            redirect_slashes=False,
            default=nothing,
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        await self.access.start()
        await self.limits.start()
        yield
        await self.access.stop()
        await self.limits.aclose()
        await self.transport.aclose()
        if self.traces is not None:
            await self.traces.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            address = self.nothing if has_escaped_path(scope) else self.router
            await address(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # a bug before there is a context, or in serving a file
            self.logs.bug(error)
            await bare_refusal(send, InternalError())

    # ---- the way of a request -------------------------------------------------------------------------------------

    async def chat(self, context: RequestContext) -> None:
        self.edge.check_origin(context.headers)
        self.edge.check_body(context.headers)
        body = await context.body(self.settings.server.max_body_bytes)
        session = await self.access.session_of(context)
        subject = self.access.subject_of(session, context)
        context.standings = await self.limits.charge(ask, subject)
        order = policy.apply(body, self.settings.policy, exact_usage=self.settings.limits.exact_usage)
        del body  # prompts are long, and answers take their time
        context.log["model"] = order.model
        most = order.prompt_tokens + order.choices * order.output_tokens
        attempts, bill = UpstreamCall(), UsageMeter(order.prompt_tokens)
        async with await self.limits.hold(subject, most, bill.so_far) as hold:
            try:
                if self.is_cut:  # the body, or the store, took longer than the drain had time
                    raise Draining
                if order.stream:
                    await self.stream(context, order, attempts, bill)
                else:
                    await self.complete(context, order, attempts, bill)
            except Refusal as refusal:
                bill.note_no_answer(paid=refusal.billed)
                raise
            except Exception:  # the client left, or a bug
                bill.note_no_answer(paid=attempts.sent)
                raise
            finally:
                hold.settle(bill.used.prompt_tokens + bill.used.completion_tokens)
                self.ledger.count(context, order, attempts, bill.used)

    async def stream(
        self, context: RequestContext, order: policy.ChatRequest, attempts: UpstreamCall, bill: UsageMeter
    ) -> None:
        """Relays one stream to its end, whatever the end. Raises while nothing has begun."""
        exchange = Exchange()
        source: ResponseStream | None = None
        relay: Relay | None = None
        broke: Interruption | None = None
        try:
            async with CancelScope(context.receive, self.live) as cancel_scope:
                await cancel_scope.listen()
                source = await self.upstream.stream(order.body, context.request_id, attempts, context.traceparent)
                order.body = b""
                relay = self.relay(context, order, source, cancel_scope, attempts.key)
                bill.events = relay.events
                exchange.on(Event.BEGIN)
                await relay.run(context.head(200, [*STREAM_HEADERS, *limit_headers(context.standings)]))
        except ClientGone:
            self.ledger.note_abort(cancel_scope)
            if relay is None:
                raise
            exchange.on(Event.COMPLETE if relay.has_said_all else Event.LEAVE)
        except Interruption as interruption:
            broke = interruption.alone()
            if relay is None:
                raise refusal_before_start(broke, attempts) from None
        except Exception as error:
            if relay is None:
                raise
            self.logs.bug(error, request_id=context.request_id)
            broke = StreamFailed()
        finally:
            if source is not None:
                source.abort()
            if relay is not None:
                bill.note_stream(relay.events)
        if exchange.state is State.STREAMING:
            broke = await relay.finish(broke)
            exchange.on(Event.BREAK if broke else Event.COMPLETE)
        self.ledger.note_stream(context, relay, exchange.state, broke)

    def relay(
        self,
        context: RequestContext,
        order: policy.ChatRequest,
        source: ResponseStream,
        cancel_scope: CancelScope,
        key: str,
    ) -> Relay:
        upstream, comment = self.settings.upstream, self.settings.server.comment_seconds
        events = Events(secret_in(key), order.choices, withhold_usage=order.usage_for_us)
        idle, total = upstream.idle_timeout, upstream.total_timeout
        return Relay(source, context.send, events, cancel_scope, idle=idle, total=total, comment=comment)

    async def complete(
        self, context: RequestContext, order: policy.ChatRequest, attempts: UpstreamCall, bill: UsageMeter
    ) -> None:
        """Passes on one whole answer."""
        try:
            async with CancelScope(context.receive, self.live) as cancel_scope:
                await cancel_scope.listen()
                answer = await self.upstream.complete(order.body, context.request_id, attempts, context.traceparent)
        except ClientGone:
            self.ledger.note_abort(cancel_scope)
            raise
        except Interruption as interruption:
            raise refusal_before_start(interruption, attempts) from None
        bill.note_answer(answer)
        context.log["bytes"] = len(answer)
        await context.answer(200, answer, limit_headers(context.standings))

    # ---- the small routes -----------------------------------------------------------------------------------------

    async def show_session(self, context: RequestContext) -> None:
        await self.answer_account(context, await self.access.session_for_page(context))

    async def log_in(self, context: RequestContext) -> None:
        self.edge.check_origin(context.headers)
        self.edge.check_body(context.headers)
        await self.answer_account(context, await self.access.login(context))

    async def start_login(self, context: RequestContext) -> None:
        self.edge.check_origin(context.headers)
        try:
            await context.redirect(await self.access.start_login(context))
        except LoginFailed as failed:
            await self.tell_failed_login(context, failed)

    async def finish_login(self, context: RequestContext) -> None:
        """Comes from another site: what guards it is the flow's cookie, not the origin rule."""
        try:
            await context.redirect(await self.access.finish_login(context))
        except LoginFailed as failed:
            await self.tell_failed_login(context, failed)

    async def tell_failed_login(self, context: RequestContext, failed: LoginFailed) -> None:
        context.reason = failed.reason
        await context.tell(failed.status, failed_login(failed.status, context.request_id))

    async def answer_account(self, context: RequestContext, session: Session | None) -> None:
        """Who the visitor is, what may be asked for, what is left; without a session only what anybody may know."""
        shown = {
            "session": {
                "mode": self.access.mode,
                "user": session.subject if session else None,
                "expires_at": self.access.sessions.expires_at(session) if session else None,
            },
            "models": self.settings.policy.models,
            "limits": [self.shown(standing) for standing in await self.standings(session, context)],
        }
        await context.answer(200, encode(shown), [])

    async def standings(self, session: Session | None, context: RequestContext) -> list[LimitStatus]:
        return await self.limits.standings(ask, self.access.subject_of(session, context)) if session else []

    def shown(self, standing: LimitStatus) -> dict[str, Any]:
        return {
            "name": f"{standing.name} {standing.text}",
            "limit": standing.limit,
            "remaining": standing.remaining,
            "reset_at": int(self.wall() + standing.resets_in) + 1,
        }

    async def end_session(self, context: RequestContext) -> None:
        """Logs out; of nothing, too. Raises TooMany: what is revoked is remembered for long."""
        self.edge.check_origin(context.headers)
        await self.limits.charge(refuse, Subject("refused", context.caller.key))
        self.access.logout(context)
        await context.answer(200, encode({"logout_url": await self.access.logout_url()}), [])

    async def list_models(self, context: RequestContext) -> None:
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "chat-proxy"}
            for name in self.settings.policy.models
        ]
        await context.answer(200, encode({"object": "list", "data": models}), [])

    # ---- what all requests share ----------------------------------------------------------------------------------

    def new_context(self, scope: Scope, receive: Receive, send: Send, route: str | None) -> RequestContext:
        headers = join_repeated(scope["headers"])
        peer = scope["client"]
        caller = self.edge.caller(peer[0] if peer else None, headers)
        request_id = self.edge.request_id(caller, headers) or f"{self.run_id}-{next(self.numbers):x}"
        context = RequestContext(
            scope, receive, send, caller=caller, headers=headers, base_headers=self.base_headers, request_id=request_id
        )
        if self.traces is not None:
            context.trace = self.traces.begin(context.method, route, *self.edge.trace_parent(caller, headers))
        return context

    def enter(self) -> None:
        self.busy += 1
        self.quiet.clear()

    def leave(self) -> None:
        self.busy -= 1
        if not self.busy:
            self.quiet.set()

    async def limited(self, context: RequestContext, refusal: Refusal) -> Refusal:
        """Refusing costs something too: who is refused too often is told to wait instead."""
        if refusal.status not in (401, 403):
            return refusal
        try:
            await self.limits.charge(refuse, Subject("refused", context.caller.key))
        except (TooMany, LimitsUnavailable) as instead:
            return instead
        return refusal

    def cut(self) -> None:
        """Ends every live answer with an event, or a refusal where none has begun: the drain's time is over."""
        self.is_cut = True
        for cancel_scope in list(self.live):
            cancel_scope.cancel(StreamDrained())

    # ---- what it is told ------------------------------------------------------------------------------------------

    def note_no_request(self, peer: str | None, refusal: Refusal) -> None:
        """The guard refused something before it became a request."""
        self.ledger.note_no_request(self.edge.caller(peer, {}).shown, refusal)

    def note_store(self, lost: str | None) -> None:
        """The limits' store is lost, for this reason, or found again."""
        if lost:
            self.logs.line("limits_unavailable", "error", reason=lost, policy=self.settings.limits.when_store_fails)
        else:
            self.logs.line("limits_available")

    def note_traces(self, lost: str | None) -> None:
        """Spans do not reach their collector, for this reason, or do again. Called in a thread of theirs."""
        if lost:
            self.logs.line("traces_unavailable", "warning", reason=lost)
        else:
            self.logs.line("traces_available")

    def reload_secrets(self) -> None:
        """Reads the secrets' files again. Live streams keep the key they began with; nobody is logged out."""
        self.upstream.key.reload()
        self.access.reload()
        self.logs.line("secrets_read")


def has_escaped_path(scope: Scope) -> bool:
    """An address of the API in escapes: whoever looks at paths in front of us may have taken it for another."""
    path: str = scope.get("path", "")  # a lifespan scope has none
    return path.startswith("/api") and path.encode() != scope["raw_path"]


def refusal_before_start(interruption: Interruption, attempts: UpstreamCall) -> Refusal:
    """What an interruption is while the answer can still be a status."""
    if isinstance(interruption, StreamDrained):
        return Draining(billed=attempts.sent)
    return GatewayTimeout(should_retry=False, reason=interruption.reason, billed=attempts.sent)
