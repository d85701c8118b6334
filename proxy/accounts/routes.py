"""The routes of the account: who is signed in, what is left to use, logging in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from proxy.accounts.access import Access
from proxy.accounts.login import LoginFailed
from proxy.accounts.login.failed_page import failed_login
from proxy.accounts.session import Session
from proxy.limits.limiter import Limiter
from proxy.limits.requests import ask, refuse
from proxy.limits.status import LimitStatus, Subject
from proxy.web.client import Edge
from proxy.web.context import RequestContext

encode = msgspec.json.Encoder().encode


class AccountRoutes:
    """The handlers of /api/session and what lies below it. `wall` gives Unix seconds."""

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

    async def show(self, context: RequestContext) -> None:
        await self.answer(context, await self.access.session_for_page(context))

    async def log_in(self, context: RequestContext) -> None:
        self.edge.check_origin(context.headers)
        self.edge.check_body(context.headers)
        await self.answer(context, await self.access.login(context))

    async def log_out(self, context: RequestContext) -> None:
        """Idempotent: without a session it succeeds as well. Raises TooMany: revocations are kept for a long time."""
        self.edge.check_origin(context.headers)
        await self.limits.charge(refuse, Subject("refused", context.caller.key))
        self.access.logout(context)
        await context.answer(200, encode({"logout_url": await self.access.logout_url()}), [])

    async def start_login(self, context: RequestContext) -> None:
        self.edge.check_origin(context.headers)
        try:
            await context.redirect(await self.access.start_login(context))
        except LoginFailed as failed:
            await self.answer_failed_login(context, failed)

    async def finish_login(self, context: RequestContext) -> None:
        """The browser comes from another site: the flow's cookie guards this route, not the origin rule."""
        try:
            await context.redirect(await self.access.finish_login(context))
        except LoginFailed as failed:
            await self.answer_failed_login(context, failed)

    async def answer_failed_login(self, context: RequestContext, failed: LoginFailed) -> None:
        context.reason = failed.reason
        await context.answer_page(failed.status, failed_login(failed.status, context.request_id))

    async def answer(self, context: RequestContext, session: Session | None) -> None:
        """The session, the models and the limits; without a session only what is public."""
        statuses = await self.limits.standings(ask, self.access.subject_of(session, context)) if session else []
        account = {
            "session": {
                "mode": self.access.mode,
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
