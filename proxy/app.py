"""The application: its routes, its lifespan, and the journey of a chat request.

    origin -> session -> request limits -> policy -> streams and tokens -> upstream -> relay -> settle

`ChatProxy.chat` is that journey, top to bottom. The order of its lines is the documented precedence of errors.
`Resource` is what all routes have in common: refusals, headers, the log line.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
from starlette.routing import Mount, Route, Router
from starlette.types import Receive, Scope, Send

from proxy import __version__
from proxy.accounts.access import Access
from proxy.accounts.routes import AccountRoutes, Handler
from proxy.chat import policy
from proxy.chat.answer import Answers
from proxy.chat.upstream import Upstream, UpstreamCall
from proxy.chat.usage import UsageMeter
from proxy.check.report import CHAT, LOOK
from proxy.check.routes import DiagnosticRoutes
from proxy.check.ticket import Tickets
from proxy.errors import (
    Draining,
    HeaderList,
    InternalError,
    LimitsUnavailable,
    MethodNotAllowed,
    NotFound,
    Refusal,
    StreamDrained,
    TooMany,
)
from proxy.limits.limiter import Limiter
from proxy.limits.requests import ChargeKind
from proxy.limits.status import Subject, limit_headers
from proxy.settings import Settings, refused_by_opentelemetry
from proxy.telemetry.logs import Bridge, Logs
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.recorder import RequestRecorder
from proxy.web.cancel import CancelScope, ClientGone
from proxy.web.client import Edge
from proxy.web.context import RequestContext
from proxy.web.headers import bare_refusal, join_repeated
from proxy.web.probes import Probe
from proxy.web.static_files import Page, page_folder

if TYPE_CHECKING:
    from proxy.telemetry.traces import Traces

HSTS = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")

encode = msgspec.json.Encoder().encode


class Resource:
    """One route: checks method and host, runs the handler, makes an answer of a Refusal or a bug, and records it."""

    def __init__(self, proxy: ChatProxy, route: str | None = None, **methods: Handler) -> None:
        self.proxy = proxy
        self.route = route  # the configured path for the log, never the one a client sent
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
                proxy.recorder.alarm_if_due(context, refusal)
                await context.refuse(await proxy.limited(context, refusal))
        except ClientGone:
            context.ending = "aborted"
        except Exception as error:  # noqa: BLE001  # the one place where a bug becomes an answer
            proxy.logs.bug(error, request_id=context.request_id)
            context.code = InternalError.code
            if not context.began:
                await context.refuse(InternalError())
        finally:
            proxy.recorder.close(context)
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
    """A route that shows a request with a check ticket what becomes of requests and answers on their way.

    The Host is not checked then: what a proxy in front made of it is one of the questions. Without a ticket the route
    is what its methods define; with neither it does not exist.
    """

    def __init__(self, proxy: ChatProxy, route: str, show: Handler, **methods: Handler) -> None:
        super().__init__(proxy, route, **methods)
        self.show = show

    async def handler(self, context: RequestContext) -> Handler:
        if self.proxy.draining or not self.proxy.diagnosis.admits(context):
            return await super().handler(context)
        context.log["check"] = True
        charged = await self.proxy.limits.charge(ChargeKind.CHECK, Subject("check", "check"))
        context.limit_headers = limit_headers(charged)
        return self.diagnose

    async def diagnose(self, context: RequestContext) -> None:
        with suppress(ClientGone):  # no chat was aborted
            await self.show(context)


class ChatProxy:
    """The ASGI application of one server. All state is its own, so two of them share nothing.

    `clock` gives monotonic seconds, `wall` Unix seconds, `randomness` so many random bytes.
    """

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
        self.edge = Edge(server)
        self.limits = Limiter(settings.limits, server.max_streams, clock, self.note_store, logs.bug)
        self.access = Access(
            settings, self.edge, self.limits, transport, logs, clock=clock, wall=wall, randomness=randomness
        )
        self.account = AccountRoutes(settings.policy.models, self.edge, self.access, self.limits, wall)
        self.transport = transport
        self.upstream = Upstream(
            settings.upstream, transport, user_agent=f"chat-proxy/{__version__}", random=secrets.SystemRandom().random
        )
        self.metrics = Metrics(settings.policy.models)
        self.metrics.streams.set_function(lambda: self.limits.leases.live)
        self.metrics.store_up.set_function(lambda: self.limits.is_up)
        self.recorder = RequestRecorder(self.metrics, logs)
        self.traces = self.open_traces() if settings.traces.enabled else None
        self.base_headers: HeaderList = [HSTS] if server.is_https else []
        self.run_id = randomness(6).hex()  # followed by a number, the id of a request: unique, and cheap to make
        self.numbers = itertools.count(1)
        self.draining = False
        self.is_cut = False  # the drain's time is over
        self.busy = 0  # requests under way
        self.quiet = asyncio.Event()  # set while there are none
        self.quiet.set()
        self.active_scopes: set[CancelScope] = set()  # of answers that may go on during the drain
        self.answers = Answers(settings, self.upstream, self.recorder, logs, self.active_scopes)
        self.diagnosis = self.build_diagnosis(wall)
        self.nothing = Resource(self)
        self.router = self.build_router()

    def open_traces(self) -> Traces:
        """Raises SettingsError for variables that OpenTelemetry refuses, some of them on import."""
        bridge, upstream = Bridge(self.logs), self.settings.upstream.base_url
        try:
            from proxy.telemetry.traces import Traces  # opentelemetry is needed here only

            return Traces(self.settings.traces, upstream, bridge=bridge, note=self.note_traces)
        except Exception as error:  # noqa: BLE001  # OpenTelemetry raises errors of many kinds
            raise refused_by_opentelemetry(error) from None

    def build_diagnosis(self, wall: Callable[[], float]) -> DiagnosticRoutes:
        return DiagnosticRoutes(
            self.settings,
            self.edge,
            self.active_scopes,
            server=self.run_id,
            tickets=Tickets(self.access.keys),
            cookie=self.access.cookie,
            is_draining=lambda: self.draining,
            wall=wall,
        )

    def build_router(self) -> Router:
        api: dict[str, dict[str, Handler]] = {"/api/v1/models": {"GET": self.list_models}, **self.account.table()}
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
            route = self.nothing if has_escaped_path(scope) else self.router
            await route(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # a bug before there is a context, or while a file is served
            self.logs.bug(error)
            await bare_refusal(send, InternalError())

    # ---- the journey of a request ---------------------------------------------------------------------------------

    async def chat(self, context: RequestContext) -> None:
        self.edge.check_origin(context.headers)
        self.edge.check_body(context.headers)
        body = await context.body(self.settings.server.max_body_bytes)
        session = await self.access.session_of(context)
        subject = self.access.subject_of(session, context)
        context.limit_headers = limit_headers(await self.limits.charge(ChargeKind.QUESTION, subject))
        request = policy.apply(body, self.settings.policy, exact_usage=self.settings.limits.exact_usage)
        del body  # prompts are long, and answers take their time
        context.log["model"] = request.model
        call = UpstreamCall(request.body, context.request_id, context.traceparent)
        meter = UsageMeter(request.prompt_tokens)
        most_tokens = request.prompt_tokens + request.choices * request.output_tokens
        async with await self.limits.hold(subject, most_tokens, meter.so_far) as permit:
            try:
                if self.is_cut:  # the body or the limit store took longer than the drain had left
                    raise Draining
                await self.answers.answer(context, request, call, meter)
            finally:
                permit.settle(meter.total)
                self.recorder.record_tokens(context, request.model, meter.used, call.retries)

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
        context = RequestContext(
            scope,
            receive,
            send,
            route=route,
            caller=caller,
            headers=headers,
            base_headers=self.base_headers,
            request_id=self.edge.request_id(caller, headers) or f"{self.run_id}-{next(self.numbers):x}",
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
        """Counts a 401 or 403 against the address. Returns the refusal, or a 429 or 503 in its place."""
        if refusal.status not in (401, 403):
            return refusal
        try:
            await self.limits.charge(ChargeKind.REFUSAL, Subject("refused", context.caller.key))
        except (TooMany, LimitsUnavailable) as instead:
            return instead
        return refusal

    def cut(self) -> None:
        """Ends every answer under way, at the end of the drain: by an event, or by a refusal before its head."""
        self.is_cut = True
        for scope in list(self.active_scopes):
            scope.cancel(StreamDrained())

    def reload_secrets(self) -> None:
        """Reads the secrets' files again. Streams under way keep their key, and every session stays valid."""
        self.upstream.key.reload()
        self.access.reload()
        self.diagnosis.tickets = Tickets(self.access.keys)
        self.logs.line("secrets_read")

    # ---- notes from elsewhere, for the log ------------------------------------------------------------------------

    def note_no_request(self, peer: str | None, refusal: Refusal) -> None:
        """The protocol refused bytes before they became a request."""
        self.recorder.record_invalid(self.edge.caller(peer, {}).shown, refusal)

    def note_store(self, lost: str | None) -> None:
        """The limit store is lost, for this reason, or available again."""
        if lost:
            self.logs.line("limits_unavailable", "error", reason=lost, policy=self.settings.limits.when_store_fails)
        else:
            self.logs.line("limits_available")

    def note_traces(self, lost: str | None) -> None:
        """Spans do not reach their collector, for this reason, or do again. Called in a thread of the exporter."""
        if lost:
            self.logs.line("traces_unavailable", "warning", reason=lost)
        else:
            self.logs.line("traces_available")


def has_escaped_path(scope: Scope) -> bool:
    """A path of the API with percent escapes: a proxy in front that matches paths may have read another one."""
    path: str = scope.get("path", "")  # a lifespan scope has none
    return path.startswith("/api") and path.encode() != scope["raw_path"]
