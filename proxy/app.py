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

from proxy import __version__, policy
from proxy.access import CALLBACK, Access
from proxy.diagnosis import Diagnosis
from proxy.edge import Edge, gather
from proxy.errors import (
    Draining,
    GatewayTimeout,
    Headers,
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
from proxy.events import Events
from proxy.exchange import Event, Exchange, State
from proxy.ledger import Bill, Ledger
from proxy.limits import Standing, Subject, limit_headers
from proxy.limits.allowance import Allowance
from proxy.limits.requests import ask, diagnose, refuse
from proxy.login import LoginFailed
from proxy.logs import Bridge, Logs
from proxy.metrics import Metrics
from proxy.observed import CHAT, LOOK
from proxy.page import Page, Probe, failed_login, page_folder
from proxy.relay import ClientGone, Leash, Relay
from proxy.session import Session
from proxy.settings import Settings, refused_by_opentelemetry
from proxy.transport import ResponseStream
from proxy.upstream import Attempts, Upstream, secret_in
from proxy.visit import STREAM_HEADERS, Visit, bare_refusal

if TYPE_CHECKING:
    from proxy.traces import Traces

Handler = Callable[[Visit], Awaitable[None]]

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
        visit = proxy.visit(scope, receive, send, self.route)
        proxy.enter()
        try:
            try:
                handler = await self.handler(visit)
                await handler(visit)
            except Refusal as refusal:
                proxy.ledger.alarm_if_due(visit, refusal)
                await visit.refuse(await proxy.limited(visit, refusal))
        except ClientGone:
            visit.ending = "aborted"
        except Exception as error:  # noqa: BLE001  # the one place where a bug becomes an answer
            proxy.logs.bug(error, request_id=visit.request_id)
            visit.code = InternalError.code
            if not visit.began:
                await visit.refuse(InternalError())
        finally:
            proxy.ledger.close(visit, self.route)
            proxy.leave()

    async def handler(self, visit: Visit) -> Handler:
        if self.proxy.draining:
            await visit.drop_body()
            raise Draining
        if not self.methods:
            raise NotFound
        if visit.method not in self.methods:
            raise MethodNotAllowed(headers=[(b"allow", ", ".join(self.methods).encode())])
        self.proxy.edge.check_host(visit.found)
        return self.methods[visit.method]


class Examined(Resource):
    """An address at which a bearer of a ticket is shown what becomes of requests and answers there.

    The Host is let be: what became of it on the way is what a bearer wants to know. To anybody else the address is
    what its methods say; without any, like one that is not there.
    """

    def __init__(self, proxy: ChatProxy, route: str, show: Handler, **methods: Handler) -> None:
        super().__init__(proxy, route, **methods)
        self.show = show

    async def handler(self, visit: Visit) -> Handler:
        if self.proxy.draining or not self.proxy.access.admits_check(visit):
            return await super().handler(visit)
        visit.log["check"] = True
        visit.standings = await self.proxy.limits.charge(diagnose, Subject("check", "check"))
        return self.examine

    async def examine(self, visit: Visit) -> None:
        with suppress(ClientGone):  # no chat was broken off
            await self.show(visit)


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
        self.limits = Allowance(settings.limits, server.max_streams, clock, self.note_store, logs.bug)
        self.access = Access(
            settings, self.edge, self.limits, transport, logs, clock=clock, wall=wall, randomness=randomness
        )
        self.upstream = Upstream(
            settings.upstream, transport, user_agent=f"chat-proxy/{__version__}", random=secrets.SystemRandom().random
        )
        self.transport = transport
        self.metrics = Metrics(settings.policy.models)
        self.ledger = Ledger(self.metrics, logs)
        self.metrics.streams.set_function(lambda: self.limits.leases.live)
        self.metrics.store_up.set_function(lambda: self.limits.is_up)
        self.traces = self.open_traces() if settings.traces.enabled else None
        self.base_headers: Headers = [HSTS] if server.is_https else []
        self.run_id = randomness(6).hex()  # with a number behind it, the id of a request: unique, and cheap
        self.numbers = itertools.count(1)
        self.draining = False
        self.is_cut = False  # the drain's time is over
        self.busy = 0  # requests being answered
        self.quiet = asyncio.Event()  # set while there are none
        self.quiet.set()
        self.live: set[Leash] = set()  # those among them that the drain lets go on for a while
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
            from proxy.traces import Traces  # opentelemetry is needed here only

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
                *(Route(path, Examined(self, path, show, POST=self.chat)) for path in CHAT),
                *(Route(path, Resource(self, path, **methods)) for path, methods in api.items()),
                Route(LOOK, Examined(self, LOOK, show)),
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
            address = self.nothing if is_disguised(scope) else self.router
            await address(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # a bug before there is a visit, or in serving a file
            self.logs.bug(error)
            await bare_refusal(send, InternalError())

    # ---- the way of a request -------------------------------------------------------------------------------------

    async def chat(self, visit: Visit) -> None:
        self.edge.check_origin(visit.found)
        self.edge.check_body(visit.found)
        body = await visit.body(self.settings.server.max_body_bytes)
        session = await self.access.session_of(visit)
        subject = self.access.subject_of(session, visit)
        visit.standings = await self.limits.charge(ask, subject)
        order = policy.apply(body, self.settings.policy, exact_usage=self.settings.limits.exact_usage)
        del body  # prompts are long, and answers take their time
        visit.log["model"] = order.model
        most = order.prompt_tokens + order.choices * order.output_tokens
        attempts, bill = Attempts(), Bill(order.prompt_tokens)
        async with await self.limits.hold(subject, most, bill.so_far) as hold:
            try:
                if self.is_cut:  # the body, or the store, took longer than the drain had time
                    raise Draining
                if order.stream:
                    await self.stream(visit, order, attempts, bill)
                else:
                    await self.complete(visit, order, attempts, bill)
            except Refusal as refusal:
                bill.note_no_answer(paid=refusal.billed)
                raise
            except Exception:  # the client left, or a bug
                bill.note_no_answer(paid=attempts.sent)
                raise
            finally:
                hold.settle(bill.used.prompt_tokens + bill.used.completion_tokens)
                self.ledger.count(visit, order, attempts, bill.used)

    async def stream(self, visit: Visit, order: policy.Order, attempts: Attempts, bill: Bill) -> None:
        """Relays one stream to its end, whatever the end. Raises while nothing has begun."""
        exchange = Exchange()
        source: ResponseStream | None = None
        relay: Relay | None = None
        broke: Interruption | None = None
        try:
            async with Leash(visit.receive, self.live) as leash:
                await leash.listen()
                source = await self.upstream.stream(order.body, visit.request_id, attempts, visit.traceparent)
                order.body = b""
                relay = self.relay(visit, order, source, leash, attempts.key)
                bill.events = relay.events
                exchange.on(Event.BEGIN)
                await relay.run(visit.head(200, [*STREAM_HEADERS, *limit_headers(visit.standings)]))
        except ClientGone:
            self.ledger.note_abort(leash)
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
            self.logs.bug(error, request_id=visit.request_id)
            broke = StreamFailed()
        finally:
            if source is not None:
                source.abort()
            if relay is not None:
                bill.note_stream(relay.events)
        if exchange.state is State.STREAMING:
            broke = await relay.finish(broke)
            exchange.on(Event.BREAK if broke else Event.COMPLETE)
        self.ledger.note_stream(visit, relay, exchange.state, broke)

    def relay(self, visit: Visit, order: policy.Order, source: ResponseStream, leash: Leash, key: str) -> Relay:
        upstream, comment = self.settings.upstream, self.settings.server.comment_seconds
        events = Events(secret_in(key), order.choices, withhold_usage=order.usage_for_us)
        idle, total = upstream.idle_timeout, upstream.total_timeout
        return Relay(source, visit.send, events, leash, idle=idle, total=total, comment=comment)

    async def complete(self, visit: Visit, order: policy.Order, attempts: Attempts, bill: Bill) -> None:
        """Passes on one whole answer."""
        try:
            async with Leash(visit.receive, self.live) as leash:
                await leash.listen()
                answer = await self.upstream.complete(order.body, visit.request_id, attempts, visit.traceparent)
        except ClientGone:
            self.ledger.note_abort(leash)
            raise
        except Interruption as interruption:
            raise refusal_before_start(interruption, attempts) from None
        bill.note_answer(answer)
        visit.log["bytes"] = len(answer)
        await visit.answer(200, answer, limit_headers(visit.standings))

    # ---- the small routes -----------------------------------------------------------------------------------------

    async def show_session(self, visit: Visit) -> None:
        await self.answer_account(visit, await self.access.session_for_page(visit))

    async def log_in(self, visit: Visit) -> None:
        self.edge.check_origin(visit.found)
        self.edge.check_body(visit.found)
        await self.answer_account(visit, await self.access.login(visit))

    async def start_login(self, visit: Visit) -> None:
        self.edge.check_origin(visit.found)
        try:
            await visit.redirect(await self.access.start_login(visit))
        except LoginFailed as failed:
            await self.tell_failed_login(visit, failed)

    async def finish_login(self, visit: Visit) -> None:
        """Comes from another site: what guards it is the flow's cookie, not the origin rule."""
        try:
            await visit.redirect(await self.access.finish_login(visit))
        except LoginFailed as failed:
            await self.tell_failed_login(visit, failed)

    async def tell_failed_login(self, visit: Visit, failed: LoginFailed) -> None:
        visit.reason = failed.reason
        await visit.tell(failed.status, failed_login(failed.status, visit.request_id))

    async def answer_account(self, visit: Visit, session: Session | None) -> None:
        """Who the visitor is, what may be asked for, what is left; without a session only what anybody may know."""
        shown = {
            "session": {
                "mode": self.access.mode,
                "user": session.subject if session else None,
                "expires_at": self.access.sessions.expires_at(session) if session else None,
            },
            "models": self.settings.policy.models,
            "limits": [self.shown(standing) for standing in await self.standings(session, visit)],
        }
        await visit.answer(200, encode(shown), [])

    async def standings(self, session: Session | None, visit: Visit) -> list[Standing]:
        return await self.limits.standings(ask, self.access.subject_of(session, visit)) if session else []

    def shown(self, standing: Standing) -> dict[str, Any]:
        return {
            "name": f"{standing.name} {standing.text}",
            "limit": standing.limit,
            "remaining": standing.remaining,
            "reset_at": int(self.wall() + standing.resets_in) + 1,
        }

    async def end_session(self, visit: Visit) -> None:
        """Logs out; of nothing, too. Raises TooMany: what is revoked is remembered for long."""
        self.edge.check_origin(visit.found)
        await self.limits.charge(refuse, Subject("refused", visit.caller.key))
        self.access.logout(visit)
        await visit.answer(200, encode({"logout_url": await self.access.logout_url()}), [])

    async def list_models(self, visit: Visit) -> None:
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "chat-proxy"}
            for name in self.settings.policy.models
        ]
        await visit.answer(200, encode({"object": "list", "data": models}), [])

    # ---- what all requests share ----------------------------------------------------------------------------------

    def visit(self, scope: Scope, receive: Receive, send: Send, route: str | None) -> Visit:
        found = gather(scope["headers"])
        peer = scope["client"]
        caller = self.edge.caller(peer[0] if peer else None, found)
        request_id = self.edge.request_id(caller, found) or f"{self.run_id}-{next(self.numbers):x}"
        visit = Visit(
            scope, receive, send, caller=caller, found=found, base_headers=self.base_headers, request_id=request_id
        )
        if self.traces is not None:
            visit.trace = self.traces.begin(visit.method, route, *self.edge.trace_parent(caller, found))
        return visit

    def enter(self) -> None:
        self.busy += 1
        self.quiet.clear()

    def leave(self) -> None:
        self.busy -= 1
        if not self.busy:
            self.quiet.set()

    async def limited(self, visit: Visit, refusal: Refusal) -> Refusal:
        """Refusing costs something too: who is refused too often is told to wait instead."""
        if refusal.status not in (401, 403):
            return refusal
        try:
            await self.limits.charge(refuse, Subject("refused", visit.caller.key))
        except (TooMany, LimitsUnavailable) as instead:
            return instead
        return refusal

    def cut(self) -> None:
        """Ends every live answer with an event, or a refusal where none has begun: the drain's time is over."""
        self.is_cut = True
        for leash in list(self.live):
            leash.pull(StreamDrained())

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


def is_disguised(scope: Scope) -> bool:
    """An address of the API in escapes: whoever looks at paths in front of us may have taken it for another."""
    path: str = scope.get("path", "")  # a lifespan scope has none
    return path.startswith("/api") and path.encode() != scope["raw_path"]


def refusal_before_start(interruption: Interruption, attempts: Attempts) -> Refusal:
    """What an interruption is while the answer can still be a status."""
    if isinstance(interruption, StreamDrained):
        return Draining(billed=attempts.sent)
    return GatewayTimeout(should_retry=False, reason=interruption.reason, billed=attempts.sent)
