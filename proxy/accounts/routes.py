"""The routes of the account: the session, what is left to use, logging in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import msgspec

from proxy.accounts.access import Access
from proxy.accounts.login import LoginFailed
from proxy.accounts.login.failed_page import failed_login
from proxy.accounts.login.flow import CALLBACK
from proxy.accounts.session import Session
from proxy.limits.limiter import Limiter
from proxy.limits.requests import ChargeKind
from proxy.limits.status import LimitStatus, Subject, limit_headers
from proxy.web.client import Edge
from proxy.web.context import RequestContext

if TYPE_CHECKING:  # each needs the packages of its mode
    from proxy.accounts.modes.oidc import OidcMode
    from proxy.accounts.modes.password import PasswordMode

Handler = Callable[[RequestContext], Awaitable[None]]

encode = msgspec.json.Encoder().encode


class AccountRoutes:
    """The handlers of /api/session and the routes below it. `wall` gives Unix seconds."""

    def __init__(
        self,
        models: tuple[str, ...],
        edge: Edge,
        access: Access,
        limits: Limiter,
        wall: Callable[[], float],
    ) -> None:
        self.models = models
        self.edge = edge
        self.access = access
        self.limits = limits
        self.wall = wall

    def table(self) -> dict[str, dict[str, Handler]]:
        """Path -> method -> handler, for the configured mode."""
        mode = self.access.mode
        session: dict[str, Handler] = {"GET": self.show, "DELETE": self.log_out}
        if mode.name == "password":
            session["POST"] = partial(self.log_in, cast("PasswordMode", mode))
        table = {"/api/session": session}
        if mode.name == "oidc":
            oidc = cast("OidcMode", mode)
            table["/api/session/login"] = {"GET": partial(self.start_login, oidc)}
            table[CALLBACK] = {"GET": partial(self.finish_login, oidc)}
        return table

    async def show(self, context: RequestContext) -> None:
        await self.answer(context, await self.access.session_for_page(context))

    async def log_in(self, mode: PasswordMode, context: RequestContext) -> None:
        self.edge.check_origin(context.headers)
        self.edge.check_body(context.headers)
        charged = await self.limits.charge(ChargeKind.LOGIN, Subject("login", context.caller.key))
        context.limit_headers = limit_headers(charged)
        user = await mode.authenticate(context)
        await self.answer(context, await self.access.log_in(context, user))

    async def log_out(self, context: RequestContext) -> None:
        """Idempotent: without a session it succeeds as well. Raises TooMany: revocations are kept for a long time."""
        self.edge.check_origin(context.headers)
        await self.charge_unauthenticated(context)
        self.access.log_out(context)
        await context.answer(200, encode({"logout_url": await self.access.mode.logout_url()}), [])

    async def start_login(self, mode: OidcMode, context: RequestContext) -> None:
        self.edge.check_origin(context.headers)
        try:
            await self.charge_unauthenticated(context)
            present = self.access.opened(context)
            await context.redirect(await mode.start(context, present.id if present else ""))
        except LoginFailed as failed:
            await self.answer_failed_login(context, failed)

    async def finish_login(self, mode: OidcMode, context: RequestContext) -> None:
        """The browser comes from another site: the login's cookie guards this route, not the origin rule."""
        try:
            await self.charge_unauthenticated(context)
            user, flow = await mode.finish(context)
            if flow.replaced:
                self.access.revocations.revoke(flow.replaced, int(self.wall()))
            await self.access.log_in(context, user)
            context.cookies = [*context.cookies, mode.clear_flow_cookie()]
            await context.redirect(flow.next)
        except LoginFailed as failed:
            await self.answer_failed_login(context, failed)

    async def charge_unauthenticated(self, context: RequestContext) -> None:
        await self.limits.charge(ChargeKind.REFUSAL, Subject("refused", context.caller.key))

    async def answer_failed_login(self, context: RequestContext, failed: LoginFailed) -> None:
        context.reason = failed.reason
        await context.answer_page(failed.status, failed_login(failed.status, context.request_id))

    async def answer(self, context: RequestContext, session: Session | None) -> None:
        """The session, the models and the limits; without a session only what is public."""
        statuses: list[LimitStatus] = []
        if session is not None:
            statuses = await self.limits.statuses(ChargeKind.QUESTION, self.access.subject_of(session, context))
        account = {
            "session": {
                "mode": self.access.mode.name,
                "user": session.subject if session else None,
                "expires_at": self.access.sessions.expires_at(session) if session else None,
            },
            "models": self.models,
            "limits": [self.as_json(status) for status in statuses],
        }
        await context.answer(200, encode(account), [])

    def as_json(self, status: LimitStatus) -> dict[str, Any]:
        return {
            "name": f"{status.name} {status.text}",
            "limit": status.limit,
            "remaining": status.remaining,
            "reset_at": int(self.wall() + status.resets_in) + 1,
        }
