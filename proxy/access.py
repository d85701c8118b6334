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

from proxy.edge import Edge, cookies_named
from proxy.errors import (
    InvalidCredentials,
    InvalidJson,
    InvalidRequest,
    LoginRequired,
    Refusal,
    SessionExpired,
    Unauthenticated,
)
from proxy.limits import Subject
from proxy.limits.allowance import Allowance
from proxy.limits.requests import guess, mint, refuse
from proxy.login import LoginFailed
from proxy.login.flow import FLOW_SECONDS, FlowCookies, own_path
from proxy.login.header import vouched
from proxy.logs import Logs
from proxy.observed import HEADER
from proxy.revoked import Revoked
from proxy.session import ID_BYTES, Session, Sessions, set_cookie
from proxy.settings import Secret, Settings
from proxy.ticket import Tickets
from proxy.visit import Visit

if TYPE_CHECKING:
    from proxy.login.oidc import Provider
    from proxy.login.password import Passwords

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
        limits: Allowance,
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
        self.revoked = Revoked(configured, limits.shared, logs, wall)
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

    async def session_of(self, visit: Visit) -> Session:
        """The session of the request's cookie, or a new one where the mode gives one. Raises Unauthenticated."""
        try:
            session = self.present(visit)
        except SessionExpired:
            if self.wants_login:
                raise
            session = None
        except Unauthenticated:
            self.clear_cookie(visit)
            raise
        return session or await self.admit(visit)

    async def session_for_page(self, visit: Visit) -> Session | None:
        """The same for our own page: a bad cookie is replaced, and None says that somebody must log in first."""
        try:
            session = self.present(visit)
        except SessionExpired:
            session = None
        except Unauthenticated:
            await self.limits.charge(refuse, Subject("refused", visit.caller.key))
            self.clear_cookie(visit)
            session = None
        if session is None and not self.wants_login:
            self.edge.check_origin(visit.found)
            try:
                return await self.admit(visit)
            except LoginRequired:
                return None
        return session

    @property
    def wants_login(self) -> bool:
        """Nobody gets a session here without logging in first."""
        return self.mode in ("password", "oidc")

    def present(self, visit: Visit) -> Session | None:
        """The session of the cookie, given anew when it is stale; None without one that this mode serves.

        Raises SessionExpired, or Unauthenticated for a cookie that is bad.
        """
        cookies = self.cookies_of(visit)
        if not cookies:
            return None
        opened = self.sessions.open(cookies, self.wall(), self.revoked.known)
        session = opened.session
        if not self.serves(session, visit):
            return None
        if opened.stale:
            session = self.sessions.renew(session, self.wall())
            self.give_cookie(visit, session)
        self.name_in_log(visit, session)
        return session

    def serves(self, session: Session, visit: Visit) -> bool:
        """Is this session of the mode that is configured now, and of somebody who is still welcome?"""
        if self.passwords is not None and not self.passwords.has(session.subject):
            return False
        if session.mode != self.mode_of(session.subject):
            return False
        return self.mode != "header" or session.subject == vouched(visit.found, self.header, visit.caller)

    def mode_of(self, subject: str | None) -> str:
        """As sessions bear it: with the mark of the password that began them, so that a changed one ends them."""
        return self.mode if self.passwords is None else f"{self.mode}~{self.passwords.mark(subject)}"

    async def admit(self, visit: Visit) -> Session:
        """A new session without a login. Raises LoginRequired where there is none to be had."""
        if self.wants_login:
            raise LoginRequired
        if self.mode == "header":
            return await self.mint(visit, vouched(visit.found, self.header, visit.caller))
        if self.edge.is_browser(visit.found):
            return await self.mint(visit, None)
        session = self.sessions.mint_for_address(self.wall(), visit.caller.key, self.revoked.known)
        self.begin(visit, session)
        return session

    async def mint(self, visit: Visit, subject: str | None) -> Session:
        """A session of its own id. Those without a subject are counted, or minting would be a way round the limits."""
        if subject is None:
            await self.limits.charge(mint, Subject("new", visit.caller.key))
        generation, randomness = self.revoked.known.decree.generation, self.randomness(ID_BYTES)
        mode = self.mode_of(subject)
        session = self.sessions.mint(self.wall(), randomness, mode=mode, subject=subject, generation=generation)
        self.begin(visit, session)
        return session

    def begin(self, visit: Visit, session: Session) -> None:
        self.give_cookie(visit, session)
        self.name_in_log(visit, session)

    def subject_of(self, session: Session, visit: Visit) -> Subject:
        """Whose allowance a session uses: a user has one, however many sessions."""
        if session.subject is None:
            return Subject(session.id, visit.caller.key)
        return Subject(f"{self.mode}:{session.subject}", visit.caller.key, is_named=True)

    # ---- logging in and out ---------------------------------------------------------------------------------------

    async def login(self, visit: Visit) -> Session:
        """A session for who knows the password. Raises InvalidCredentials, InvalidRequest, TooMany, Busy."""
        assert self.passwords is not None
        visit.standings = await self.limits.charge(guess, Subject("login", visit.caller.key))
        try:
            given = decode_login(await visit.body(LONGEST_LOGIN))
        except msgspec.ValidationError:
            raise InvalidRequest('A login is {"password": ...}, with "user" where there are users.') from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidJson from None
        try:
            await self.passwords.check(given.user, given.password, visit.caller.key)
        except InvalidCredentials:
            known = given.user if self.passwords.has(given.user) else None  # a password typed into the wrong field
            self.audit(visit, "login_failed", user=known)
            raise
        return await self.log_in(visit, given.user or None)

    async def log_in(self, visit: Visit, subject: str | None) -> Session:
        """A new id for who has just shown who they are; the one before it is dead."""
        before = self.opened(visit)
        session = await self.mint(visit, subject)
        if before is not None:
            self.revoked.end(before.id, before.issued)
        self.audit(visit, "login", user=subject, session=visit.log["session"])
        return session

    def logout(self, visit: Visit) -> None:
        """Ends the session of the cookie. A cookie that is bad already is as dead as one can be."""
        session = self.opened(visit)
        if session is not None:
            self.revoked.end(session.id, session.issued, here_only=self.is_of_address(session, visit))
            self.name_in_log(visit, session)
            self.audit(visit, "logout", user=session.subject, session=visit.log["session"])
        self.clear_cookie(visit)

    def is_of_address(self, session: Session, visit: Visit) -> bool:
        """The one that all programs at an address share. It ends on this server only: any of them could end it without
        end, and the others would be told each time."""
        return session.id == self.sessions.mint_for_address(0, visit.caller.key, self.revoked.known).id

    def opened(self, visit: Visit) -> Session | None:
        """The session of the cookie, if that is good."""
        try:
            return self.sessions.open(self.cookies_of(visit), self.wall(), self.revoked.known).session
        except Refusal:
            return None

    def audit(self, visit: Visit, event: str, **fields: str | None) -> None:
        address, request_id = visit.caller.shown, visit.request_id
        self.logs.line(event, mode=self.mode, **fields, address=address, request_id=request_id)

    async def start_login(self, visit: Visit) -> str:
        """Where the browser goes to log in. Raises TooMany, LoginFailed."""
        assert self.provider is not None
        await self.limits.charge(refuse, Subject("refused", visit.caller.key))
        asked = dict(parse_qsl(visit.query.decode("latin-1")))
        present = self.opened(visit)
        location, flow = await self.provider.begin(
            self.randomness, own_path(asked.get("next", "/")), present.id if present else ""
        )
        visit.cookies = [self.flow_cookie(self.flows.seal(flow), FLOW_SECONDS)]
        return location

    async def finish_login(self, visit: Visit) -> str:
        """Where the browser goes once it is logged in. Raises TooMany, LoginFailed.

        It was sent here by another site, so the cookie of its session did not come along (SameSite=Strict): which one
        that is stands in the flow's cookie.
        """
        assert self.provider is not None
        await self.limits.charge(refuse, Subject("refused", visit.caller.key))
        cookies = cookies_named(visit.found, self.flow_name.encode())
        flow = self.flows.open(cookies[0], self.wall()) if len(cookies) == 1 else None
        visit.cookies = [self.flow_cookie("", 0)]
        try:
            if flow is None or not self.spend(flow.state):
                raise LoginFailed(400, "no login was begun in this browser, or too long ago, or it is over")
            subject = await self.provider.finish(visit.query, flow)
        except LoginFailed as failed:
            self.audit(visit, "login_failed", reason=failed.reason)
            raise
        if flow.replaced:
            self.revoked.end(flow.replaced, int(self.wall()))
        await self.log_in(visit, subject)
        visit.cookies = [*visit.cookies, self.flow_cookie("", 0)]
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

    def admits_check(self, visit: Visit) -> bool:
        """Is this `chat-proxy check`, of somebody who knows our secret?"""
        ticket = visit.found.get(HEADER.encode())
        return ticket is not None and self.tickets.admit(ticket, self.wall())

    # ---- cookies and the log --------------------------------------------------------------------------------------

    def cookies_of(self, visit: Visit) -> list[bytes]:
        return cookies_named(visit.found, self.cookie.encode())

    def give_cookie(self, visit: Visit, session: Session) -> None:
        lives = self.sessions.expires_at(session) - int(self.wall())
        visit.cookies = [set_cookie(self.cookie, self.sessions.seal(session), lives, secure=self.is_https)]

    def clear_cookie(self, visit: Visit) -> None:
        visit.cookies = [set_cookie(self.cookie, "", 0, secure=self.is_https)]

    def name_in_log(self, visit: Visit, session: Session) -> None:
        visit.log["session"] = hashlib.blake2b(
            session.id.encode(), key=self.sessions.derive_key, digest_size=6
        ).hexdigest()


# Their packages are needed in their modes only.


def open_passwords(secret: Secret | None, clock: Callable[[], float]) -> Passwords:
    from proxy.login.password import Passwords

    assert secret is not None  # the settings have seen to it
    return Passwords(secret.lines(), clock)


def open_provider(settings: Settings, transport: httpx.AsyncBaseTransport, wall: Callable[[], float]) -> Provider:
    from proxy.login.oidc import Provider

    redirect_uri = f"{settings.server.public_url}{CALLBACK}"
    return Provider(settings.oidc, transport, redirect_uri=redirect_uri, wall=wall)
