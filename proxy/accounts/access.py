"""Who is asking: where a request gets its session, whatever the mode.

Rules:
1. One mechanism under all modes: a signed cookie (session.py) with an id, and a subject once somebody has logged in.
2. A cookie that is bad (forged, garbled, doubled, revoked) is refused and cleared; one that is only out of date
   (expired, or of a mode or a user that is not served any more) is as good as none.
3. Who logs in gets a new id, and the one before it is dead.
4. What the log says of a session is a keyed hash of its id.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated
from urllib.parse import parse_qsl

import httpx
import msgspec

from proxy.accounts.login import LoginFailed
from proxy.accounts.login.flow import FLOW_SECONDS, FlowCookies, safe_redirect_path
from proxy.accounts.modes.header import user_from_header
from proxy.accounts.revocation.watcher import RevocationWatcher
from proxy.accounts.session import ID_BYTES, Session, Sessions
from proxy.check.report import HEADER
from proxy.check.ticket import Tickets
from proxy.errors import (
    InvalidCredentials,
    InvalidJson,
    InvalidRequest,
    LoginRequired,
    Refusal,
    SessionExpired,
    Unauthenticated,
)
from proxy.limits.limiter import Limiter
from proxy.limits.requests import guess, mint, refuse
from proxy.limits.status import Subject, limit_headers
from proxy.settings import Secret, Settings
from proxy.telemetry.logs import Logs
from proxy.web.client import Edge
from proxy.web.context import RequestContext
from proxy.web.headers import cookies_named, set_cookie

if TYPE_CHECKING:
    from proxy.accounts.login.oidc import Provider
    from proxy.accounts.login.password import Passwords


CALLBACK = "/api/session/callback"
LONGEST_LOGIN = 4096  # bytes of a login's body


class Login(msgspec.Struct, forbid_unknown_fields=True):
    password: Annotated[str, msgspec.Meta(max_length=1024)]
    user: Annotated[str, msgspec.Meta(max_length=128)] | None = None


decode_login = msgspec.json.Decoder(Login).decode


class Access:
    """The sessions of one server. `wall` gives Unix seconds, `clock` monotonic ones, `randomness` so many bytes."""

    def __init__(
        self,
        settings: Settings,
        edge: Edge,
        limits: Limiter,
        transport: httpx.AsyncBaseTransport,
        logs: Logs,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        randomness: Callable[[int], bytes],
    ) -> None:
        configured = settings.session
        self.edge = edge
        self.limits = limits
        self.logs = logs
        self.wall = wall
        self.randomness = randomness
        self.mode = configured.mode
        self.public_url = settings.server.public_url
        self.is_https = settings.server.is_https
        self.cookie = "__Host-chat" if self.is_https else "chat"
        self.flow_name = f"{self.cookie}-login"
        self.lifetime, self.idle = configured.lifetime, configured.idle
        self.header = settings.header.name.lower().encode()
        self.secret = configured.secret or Secret(secrets.token_urlsafe(32))
        self.password_secret = configured.passwords
        self.passwords = open_passwords(configured.passwords, clock) if self.mode == "password" else None
        self.provider = open_provider(settings, transport, wall) if self.mode == "oidc" else None
        self.revoked = RevocationWatcher(configured, limits.shared, logs, wall)
        self._spent: dict[str, int] = {}  # states of logins that have come back, and when they may be forgotten
        self.use_keys()

    # ---- its own life ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self.revoked.start()

    async def stop(self) -> None:
        await self.revoked.stop()
        if self.passwords is not None:
            self.passwords.close()

    def use_keys(self) -> None:
        """Cookies under any of the secret's lines are good, the newest first."""
        self.sessions = Sessions(self.secret.lines(), lifetime=self.lifetime, idle=self.idle)
        self.flows = FlowCookies(self.secret.lines())
        self.tickets = Tickets(self.secret.lines())

    def reload(self) -> None:
        """Reads the secrets' files again. Nobody is logged out but users who are no longer among the passwords."""
        self.secret = self.secret.again()
        self.use_keys()
        if self.passwords is not None and self.password_secret is not None:
            self.password_secret = self.password_secret.again()
            self.passwords.use(self.password_secret.lines())

    # ---- the session of a request ---------------------------------------------------------------------------------

    async def session_of(self, context: RequestContext) -> Session:
        """The session of the request's cookie, or a new one where the mode gives one. Raises Unauthenticated."""
        try:
            session = self.present(context)
        except SessionExpired:
            if self.wants_login:
                raise
            session = None
        except Unauthenticated:
            self.clear_cookie(context)
            raise
        return session or await self.admit(context)

    async def session_for_page(self, context: RequestContext) -> Session | None:
        """The same for our own page: a bad cookie is replaced, and None says that somebody must log in first."""
        try:
            session = self.present(context)
        except SessionExpired:
            session = None
        except Unauthenticated:
            await self.limits.charge(refuse, Subject("refused", context.caller.key))
            self.clear_cookie(context)
            session = None
        if session is None and not self.wants_login:
            self.edge.check_origin(context.headers)
            try:
                return await self.admit(context)
            except LoginRequired:
                return None
        return session

    @property
    def wants_login(self) -> bool:
        """Nobody gets a session here without logging in first."""
        return self.mode in ("password", "oidc")

    def present(self, context: RequestContext) -> Session | None:
        """The session of the cookie, given anew when it is stale; None without one that this mode serves.

        Raises SessionExpired, or Unauthenticated for a cookie that is bad.
        """
        cookies = self.cookies_of(context)
        if not cookies:
            return None
        opened = self.sessions.open(cookies, self.wall(), self.revoked.known)
        session = opened.session
        if not self.serves(session, context):
            return None
        if opened.stale:
            session = self.sessions.renew(session, self.wall())
            self.give_cookie(context, session)
        self.name_in_log(context, session)
        return session

    def serves(self, session: Session, context: RequestContext) -> bool:
        """Is this session of the mode that is configured now, and of somebody who is still welcome?"""
        if self.passwords is not None and not self.passwords.has(session.subject):
            return False
        if session.mode != self.mode_of(session.subject):
            return False
        return self.mode != "header" or session.subject == user_from_header(
            context.headers, self.header, context.caller
        )

    def mode_of(self, subject: str | None) -> str:
        """As sessions bear it: with the mark of the password that began them, so that a changed one ends them."""
        return self.mode if self.passwords is None else f"{self.mode}~{self.passwords.mark(subject)}"

    async def admit(self, context: RequestContext) -> Session:
        """A new session without a login. Raises LoginRequired where there is none to be had."""
        if self.wants_login:
            raise LoginRequired
        if self.mode == "header":
            return await self.mint(context, user_from_header(context.headers, self.header, context.caller))
        if self.edge.is_browser(context.headers):
            return await self.mint(context, None)
        session = self.sessions.mint_for_address(self.wall(), context.caller.key, self.revoked.known)
        self.begin(context, session)
        return session

    async def mint(self, context: RequestContext, subject: str | None) -> Session:
        """A session of its own id. Those without a subject are counted, or minting would be a way round the limits."""
        if subject is None:
            await self.limits.charge(mint, Subject("new", context.caller.key))
        generation, randomness = self.revoked.known.decree.generation, self.randomness(ID_BYTES)
        mode = self.mode_of(subject)
        session = self.sessions.mint(self.wall(), randomness, mode=mode, subject=subject, generation=generation)
        self.begin(context, session)
        return session

    def begin(self, context: RequestContext, session: Session) -> None:
        self.give_cookie(context, session)
        self.name_in_log(context, session)

    def subject_of(self, session: Session, context: RequestContext) -> Subject:
        """Whose allowance a session uses: a user has one, however many sessions."""
        if session.subject is None:
            return Subject(session.id, context.caller.key)
        return Subject(f"{self.mode}:{session.subject}", context.caller.key, is_named=True)

    # ---- logging in and out ---------------------------------------------------------------------------------------

    async def login(self, context: RequestContext) -> Session:
        """A session for who knows the password. Raises InvalidCredentials, InvalidRequest, TooMany, Busy."""
        assert self.passwords is not None
        context.limit_headers = limit_headers(await self.limits.charge(guess, Subject("login", context.caller.key)))
        try:
            given = decode_login(await context.body(LONGEST_LOGIN))
        except msgspec.ValidationError:
            raise InvalidRequest('A login is {"password": ...}, with "user" where there are users.') from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidJson from None
        try:
            await self.passwords.check(given.user, given.password, context.caller.key)
        except InvalidCredentials:
            known = given.user if self.passwords.has(given.user) else None  # a password typed into the wrong field
            self.audit(context, "login_failed", user=known)
            raise
        return await self.log_in(context, given.user or None)

    async def log_in(self, context: RequestContext, subject: str | None) -> Session:
        """A new id for who has just shown who they are; the one before it is dead."""
        before = self.opened(context)
        session = await self.mint(context, subject)
        if before is not None:
            self.revoked.end(before.id, before.issued)
        self.audit(context, "login", user=subject, session=context.log["session"])
        return session

    def logout(self, context: RequestContext) -> None:
        """Ends the session of the cookie. A cookie that is bad already is as dead as one can be."""
        session = self.opened(context)
        if session is not None:
            self.revoked.end(session.id, session.issued, here_only=self.is_of_address(session, context))
            self.name_in_log(context, session)
            self.audit(context, "logout", user=session.subject, session=context.log["session"])
        self.clear_cookie(context)

    def is_of_address(self, session: Session, context: RequestContext) -> bool:
        """The one that all programs at an address share. It ends on this server only: any of them could end it without
        end, and the others would be told each time."""
        return session.id == self.sessions.mint_for_address(0, context.caller.key, self.revoked.known).id

    def opened(self, context: RequestContext) -> Session | None:
        """The session of the cookie, if that is good."""
        try:
            return self.sessions.open(self.cookies_of(context), self.wall(), self.revoked.known).session
        except Refusal:
            return None

    def audit(self, context: RequestContext, event: str, **fields: str | None) -> None:
        address, request_id = context.caller.shown, context.request_id
        self.logs.line(event, mode=self.mode, **fields, address=address, request_id=request_id)

    async def start_login(self, context: RequestContext) -> str:
        """Where the browser goes to log in. Raises TooMany, LoginFailed."""
        assert self.provider is not None
        await self.limits.charge(refuse, Subject("refused", context.caller.key))
        asked = dict(parse_qsl(context.query.decode("latin-1")))
        present = self.opened(context)
        location, flow = await self.provider.begin(
            self.randomness, safe_redirect_path(asked.get("next", "/")), present.id if present else ""
        )
        context.cookies = [self.flow_cookie(self.flows.seal(flow), FLOW_SECONDS)]
        return location

    async def finish_login(self, context: RequestContext) -> str:
        """Where the browser goes once it is logged in. Raises TooMany, LoginFailed.

        It was sent here by another site, so the cookie of its session did not come along (SameSite=Strict): which one
        that is stands in the flow's cookie.
        """
        assert self.provider is not None
        await self.limits.charge(refuse, Subject("refused", context.caller.key))
        cookies = cookies_named(context.headers, self.flow_name.encode())
        flow = self.flows.open(cookies[0], self.wall()) if len(cookies) == 1 else None
        context.cookies = [self.flow_cookie("", 0)]
        try:
            if flow is None or not self.spend(flow.state):
                raise LoginFailed(400, "no login was begun in this browser, or too long ago, or it is over")
            subject = await self.provider.finish(context.query, flow)
        except LoginFailed as failed:
            self.audit(context, "login_failed", reason=failed.reason)
            raise
        if flow.replaced:
            self.revoked.end(flow.replaced, int(self.wall()))
        await self.log_in(context, subject)
        context.cookies = [*context.cookies, self.flow_cookie("", 0)]
        return flow.next

    def spend(self, state: str) -> bool:
        """A login comes back once: the provider is not asked again for whoever keeps the cookie."""
        now = int(self.wall())
        if state in self._spent:
            return False
        self._spent = {spent: until for spent, until in self._spent.items() if until > now}
        self._spent[state] = now + FLOW_SECONDS
        return True

    async def logout_url(self) -> str | None:
        """Where the browser may end its session with the identity provider, too."""
        return await self.provider.logout_url(f"{self.public_url}/") if self.provider else None

    def flow_cookie(self, value: str, seconds: int) -> bytes:
        return set_cookie(self.flow_name, value, seconds, secure=self.is_https, same_site="Lax")

    def admits_check(self, context: RequestContext) -> bool:
        """Is this `chat-proxy check`, of somebody who knows our secret?"""
        ticket = context.headers.get(HEADER.encode())
        return ticket is not None and self.tickets.admit(ticket, self.wall())

    # ---- cookies and the log --------------------------------------------------------------------------------------

    def cookies_of(self, context: RequestContext) -> list[bytes]:
        return cookies_named(context.headers, self.cookie.encode())

    def give_cookie(self, context: RequestContext, session: Session) -> None:
        lives = self.sessions.expires_at(session) - int(self.wall())
        context.cookies = [set_cookie(self.cookie, self.sessions.seal(session), lives, secure=self.is_https)]

    def clear_cookie(self, context: RequestContext) -> None:
        context.cookies = [set_cookie(self.cookie, "", 0, secure=self.is_https)]

    def name_in_log(self, context: RequestContext, session: Session) -> None:
        context.log["session"] = hashlib.blake2b(
            session.id.encode(), key=self.sessions.derive_key, digest_size=6
        ).hexdigest()


# Their packages are needed in their modes only.


def open_passwords(secret: Secret | None, clock: Callable[[], float]) -> Passwords:
    from proxy.accounts.login.password import Passwords

    assert secret is not None  # the settings have seen to it
    return Passwords(secret.lines(), clock)


def open_provider(settings: Settings, transport: httpx.AsyncBaseTransport, wall: Callable[[], float]) -> Provider:
    from proxy.accounts.login.oidc import Provider

    redirect_uri = f"{settings.server.public_url}{CALLBACK}"
    return Provider(settings.oidc, transport, redirect_uri=redirect_uri, wall=wall)
