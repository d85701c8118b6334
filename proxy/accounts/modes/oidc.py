"""Mode `oidc`: users log in at an OpenID provider and come back with a code."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qsl

import httpx

from proxy.accounts.audit import Audit
from proxy.accounts.login import LoginFailed
from proxy.accounts.login.flow import CALLBACK, FLOW_SECONDS, Flow, FlowCookies, safe_redirect_path
from proxy.accounts.login.oidc import Provider
from proxy.accounts.modes import PlainMode
from proxy.errors import LoginRequired
from proxy.settings import Settings
from proxy.web.context import RequestContext
from proxy.web.headers import cookies_named, set_cookie


class OidcMode(PlainMode):
    """`cookie` is the session cookie's name; the login's own cookie is named after it. `wall` gives Unix seconds."""

    name = "oidc"
    wants_login = True

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport,
        audit: Audit,
        *,
        cookie: str,
        wall: Callable[[], float],
        randomness: Callable[[int], bytes],
    ) -> None:
        self.public_url = settings.server.public_url
        self.is_https = settings.server.is_https
        self.provider = Provider(settings.oidc, transport, redirect_uri=f"{self.public_url}{CALLBACK}", wall=wall)
        self.flow_name = f"{cookie}-login"
        self.audit = audit
        self.wall = wall
        self.randomness = randomness
        self.flows = FlowCookies([])
        self._spent: dict[str, int] = {}  # states of completed logins, and when they may be forgotten

    def use_keys(self, keys: list[str]) -> None:
        self.flows = FlowCookies(keys)

    def subject_of(self, context: RequestContext) -> str | None:
        raise LoginRequired

    async def start(self, context: RequestContext, session_id: str) -> str:
        """The provider's address for a login. `session_id` is of the present session, or "". Raises LoginFailed."""
        query = dict(parse_qsl(context.query.decode("latin-1")))
        location, flow = await self.provider.begin(
            self.randomness, safe_redirect_path(query.get("next", "/")), session_id
        )
        context.cookies = [self.flow_cookie(self.flows.seal(flow), FLOW_SECONDS)]
        return location

    async def finish(self, context: RequestContext) -> tuple[str, Flow]:
        """The user that the provider has authenticated, and the login's flow. Raises LoginFailed.

        The browser comes from another site, so it does not send the session's cookie (SameSite=Strict): the flow has
        the id of the session to replace.
        """
        cookies = cookies_named(context.headers, self.flow_name.encode())
        flow = self.flows.open(cookies[0], self.wall()) if len(cookies) == 1 else None
        context.cookies = [self.clear_flow_cookie()]
        try:
            if flow is None or not self.spend(flow.state):
                raise LoginFailed(400, "no login was begun in this browser, or too long ago, or it is over")
            return await self.provider.finish(context.query, flow), flow
        except LoginFailed as failed:
            self.audit.line(context, "login_failed", reason=failed.reason)
            raise

    def spend(self, state: str) -> bool:
        """Marks a login as completed; False when it was before: the provider is asked once for each."""
        now = int(self.wall())
        if state in self._spent:
            return False
        self._spent = {spent: until for spent, until in self._spent.items() if until > now}
        self._spent[state] = now + FLOW_SECONDS
        return True

    async def logout_url(self) -> str | None:
        return await self.provider.logout_url(f"{self.public_url}/")

    def flow_cookie(self, value: str, seconds: int) -> bytes:
        return set_cookie(self.flow_name, value, seconds, secure=self.is_https, same_site="Lax")

    def clear_flow_cookie(self) -> bytes:
        return self.flow_cookie("", 0)
