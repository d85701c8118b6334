"""The session of a request: from its cookie, or a new one, in every mode.

Rules:
1. One mechanism for all modes: a signed cookie (session.py) with an id, and a subject after a login.
2. An invalid cookie (forged, garbled, doubled, revoked) is refused and cleared. A cookie that is only out of date
   (expired, of another mode, or of a user that is no longer accepted) counts as absent.
3. A login gets a new session id, and the previous session is revoked.
4. The log contains a keyed hash of the session's id.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

import httpx

from proxy.accounts.audit import Audit
from proxy.accounts.modes import Mode
from proxy.accounts.modes.anonymous import AnonymousMode
from proxy.accounts.modes.header import HeaderMode
from proxy.accounts.revocation.watcher import RevocationWatcher
from proxy.accounts.session import ID_BYTES, Session, Sessions
from proxy.errors import LoginRequired, Refusal, SessionExpired, Unauthenticated
from proxy.limits.limiter import Limiter
from proxy.limits.requests import ChargeKind
from proxy.limits.status import Subject
from proxy.settings import Secret, Settings
from proxy.telemetry.logs import Logs
from proxy.web.client import Edge
from proxy.web.context import RequestContext
from proxy.web.headers import cookies_named, set_cookie


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
        self.wall = wall
        self.randomness = randomness
        self.is_https = settings.server.is_https
        self.cookie = "__Host-chat" if self.is_https else "chat"
        self.lifetime, self.idle = configured.lifetime, configured.idle
        self.secret = configured.secret or Secret(secrets.token_urlsafe(32))
        self.audit = Audit(configured.mode, logs)
        self.mode = choose_mode(settings, transport, self.audit, self.cookie, clock, wall, randomness)
        self.revocations = RevocationWatcher(configured, limits.store, logs, wall)
        self.use_keys()

    async def start(self) -> None:
        await self.revocations.start()

    async def stop(self) -> None:
        await self.revocations.stop()
        self.mode.close()

    @property
    def keys(self) -> list[str]:
        """The lines of the session secret, newest first."""
        return self.secret.lines()

    def use_keys(self) -> None:
        self.sessions = Sessions(self.keys, lifetime=self.lifetime, idle=self.idle)
        self.mode.use_keys(self.keys)

    def reload(self) -> None:
        """Reads the secrets' files again. Sessions stay valid, except those of users without a password."""
        self.secret = self.secret.again()
        self.use_keys()
        self.mode.reload()

    # ---- the session of a request ---------------------------------------------------------------------------------

    async def session_of(self, context: RequestContext) -> Session:
        """The session of the request's cookie, or a new one where the mode issues one. Raises Unauthenticated."""
        try:
            session = self.present(context)
        except SessionExpired:
            if self.mode.wants_login:
                raise
            session = None
        except Unauthenticated:
            self.clear_cookie(context)
            raise
        return session or await self.admit(context)

    async def session_for_page(self, context: RequestContext) -> Session | None:
        """The same for the server's own page: an invalid cookie is replaced; None where a login is required."""
        try:
            session = self.present(context)
        except SessionExpired:
            session = None
        except Unauthenticated:
            await self.limits.charge(ChargeKind.REFUSAL, Subject("refused", context.caller.key))
            self.clear_cookie(context)
            session = None
        if session is None and not self.mode.wants_login:
            self.edge.check_origin(context.headers)
            try:
                return await self.admit(context)
            except LoginRequired:
                return None
        return session

    def present(self, context: RequestContext) -> Session | None:
        """The session of the cookie, which is issued again when it is stale; None without one that is accepted.

        Raises SessionExpired, or Unauthenticated for an invalid cookie.
        """
        cookies = cookies_named(context.headers, self.cookie.encode())
        if not cookies:
            return None
        opened = self.revocations.known.check(self.sessions.open(cookies, self.wall()))
        session = opened.session
        if session.mode != self.mode.label(session.subject) or not self.mode.accepts(session, context):
            return None
        if opened.stale:
            session = self.sessions.renew(session, self.wall())
            self.give_cookie(context, session)
        self.log_session(context, session)
        return session

    async def admit(self, context: RequestContext) -> Session:
        """A new session without a login. Raises LoginRequired where the mode issues none."""
        subject = self.mode.subject_of(context)
        if subject is not None or self.edge.is_browser(context.headers):
            return await self.mint(context, subject)
        derived = self.sessions.mint_for_address(self.wall(), context.caller.key)
        session = self.revocations.known.reissued(derived)
        self.give(context, session)
        return session

    async def mint(self, context: RequestContext, subject: str | None) -> Session:
        """A session with an id of its own. Anonymous ones are counted: new sessions would evade the limits."""
        if subject is None:
            await self.limits.charge(ChargeKind.NEW_SESSION, Subject("new", context.caller.key))
        session = self.sessions.mint(
            self.wall(),
            self.randomness(ID_BYTES),
            mode=self.mode.label(subject),
            subject=subject,
            generation=self.revocations.known.rules.generation,
        )
        self.give(context, session)
        return session

    def subject_of(self, session: Session, context: RequestContext) -> Subject:
        """The subject that limits count: a user has one allowance, in however many sessions."""
        if session.subject is None:
            return Subject(session.id, context.caller.key)
        return Subject(f"{self.mode.name}:{session.subject}", context.caller.key, is_named=True)

    # ---- logging in and out ---------------------------------------------------------------------------------------

    async def log_in(self, context: RequestContext, subject: str | None) -> Session:
        """A new session for an authenticated user; the previous one is revoked."""
        before = self.opened(context)
        session = await self.mint(context, subject)
        if before is not None:
            self.revocations.revoke(before.id, before.issued)
        self.audit.line(context, "login", user=subject, session=context.log["session"])
        return session

    def log_out(self, context: RequestContext) -> None:
        """Revokes the session of the cookie. An invalid cookie is only cleared."""
        session = self.opened(context)
        if session is not None:
            self.revocations.revoke(session.id, session.issued, here_only=self.is_derived(session, context))
            self.log_session(context, session)
            self.audit.line(context, "logout", user=session.subject, session=context.log["session"])
        self.clear_cookie(context)

    def is_derived(self, session: Session, context: RequestContext) -> bool:
        """Whether it is the session that clients of an address share. Its logout stays on this server: each of them
        can repeat it, and every one would be sent to the others."""
        return session.id == self.sessions.mint_for_address(0, context.caller.key).id

    def opened(self, context: RequestContext) -> Session | None:
        """The session of the cookie, if it is valid."""
        try:
            cookies = cookies_named(context.headers, self.cookie.encode())
            opened = self.sessions.open(cookies, self.wall())
            return self.revocations.known.check(opened).session
        except Refusal:
            return None

    # ---- cookies and the log --------------------------------------------------------------------------------------

    def give(self, context: RequestContext, session: Session) -> None:
        self.give_cookie(context, session)
        self.log_session(context, session)

    def give_cookie(self, context: RequestContext, session: Session) -> None:
        seconds = self.sessions.expires_at(session) - int(self.wall())
        context.cookies = [set_cookie(self.cookie, self.sessions.seal(session), seconds, secure=self.is_https)]

    def clear_cookie(self, context: RequestContext) -> None:
        context.cookies = [set_cookie(self.cookie, "", 0, secure=self.is_https)]

    def log_session(self, context: RequestContext, session: Session) -> None:
        context.log["session"] = hashlib.blake2b(
            session.id.encode(), key=self.sessions.derive_key, digest_size=6
        ).hexdigest()


def choose_mode(
    settings: Settings,
    transport: httpx.AsyncBaseTransport,
    audit: Audit,
    cookie: str,
    clock: Callable[[], float],
    wall: Callable[[], float],
    randomness: Callable[[int], bytes],
) -> Mode:
    """The configured mode. The packages of a login are imported in their mode only."""
    name = settings.session.mode
    if name == "password" and settings.session.passwords is not None:
        from proxy.accounts.modes.password import PasswordMode

        return PasswordMode(settings.session.passwords, clock, audit)
    if name == "oidc":
        from proxy.accounts.modes.oidc import OidcMode

        return OidcMode(settings, transport, audit, cookie=cookie, wall=wall, randomness=randomness)
    return HeaderMode(settings.header.name) if name == "header" else AnonymousMode()
