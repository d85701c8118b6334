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
from collections.abc import Callable

from proxy.edge import Edge, cookies_named
from proxy.errors import Refusal
from proxy.limits import Subject
from proxy.limits.requests import RequestLimits, mint, refuse
from proxy.logs import Logs
from proxy.session import ID_BYTES, Revocations, Session, Sessions, set_cookie
from proxy.settings import Settings
from proxy.visit import Visit


class Access:
    """The sessions of one server. `wall` gives Unix seconds, `randomness` so many bytes."""

    def __init__(
        self,
        settings: Settings,
        edge: Edge,
        requests: RequestLimits,
        logs: Logs,
        *,
        keys: list[str],
        wall: Callable[[], float],
        randomness: Callable[[int], bytes],
    ) -> None:
        self.edge = edge
        self.requests = requests
        self.logs = logs
        self.wall = wall
        self.randomness = randomness
        self.is_https = settings.server.is_https
        self.cookie = "__Host-chat" if self.is_https else "chat"
        self.lifetime, self.idle = settings.session.lifetime, settings.session.idle
        self.revocations = Revocations()
        self.use_keys(keys)

    def use_keys(self, keys: list[str]) -> None:
        """Newest first. Cookies under any of them stay good."""
        self.sessions = Sessions(keys, lifetime=self.lifetime, idle=self.idle)

    # ---- the session of a request ---------------------------------------------------------------------------------

    def session_of(self, visit: Visit) -> Session:
        """The session of the request's cookie, or a new one. Raises Unauthenticated and clears a cookie that is bad."""
        cookies = self.cookies_of(visit)
        if cookies:
            try:
                return self.open_session(visit, cookies)
            except Refusal as refusal:
                if refusal.code != "session_expired":
                    self.clear_cookie(visit)
                    raise
        return self.mint_session(visit)

    def session_for_page(self, visit: Visit) -> Session:
        """The session of the cookie; a missing or bad one is replaced, for our own page only."""
        cookies = self.cookies_of(visit)
        if cookies:
            try:
                return self.open_session(visit, cookies)
            except Refusal as refusal:
                if refusal.code != "session_expired":
                    self.requests.charge(refuse, Subject("refused", visit.caller.key))
        self.edge.check_origin(visit.found)
        return self.mint_session(visit)

    def subject_of(self, session: Session, visit: Visit) -> Subject:
        return Subject(session.id, visit.caller.key)

    # ---- its life -------------------------------------------------------------------------------------------------

    def open_session(self, visit: Visit, cookies: list[bytes]) -> Session:
        opened = self.sessions.open(cookies, self.wall(), self.revocations)
        session = opened.session
        if opened.stale:
            session = self.sessions.renew(session, self.wall())
            self.give_cookie(visit, session)
        self.name_in_log(visit, session)
        return session

    def mint_session(self, visit: Visit) -> Session:
        """A new session: a browser's own, or the one that all programs at this address share."""
        if self.edge.is_browser(visit.found):
            self.requests.charge(mint, Subject("new", visit.caller.key))
            session = self.sessions.mint(self.wall(), self.randomness(ID_BYTES))
        else:
            session = self.sessions.mint_for_address(self.wall(), visit.caller.key, self.revocations)
        self.give_cookie(visit, session)
        self.name_in_log(visit, session)
        return session

    def logout(self, visit: Visit) -> None:
        """Ends the session of the cookie. A cookie that is bad already is as dead as one can be."""
        now = self.wall()
        try:
            opened = self.sessions.open(self.cookies_of(visit), now, self.revocations)
        except Refusal:
            pass  # nothing to revoke; the cookie is cleared below
        else:
            self.revocations.revoke(opened.session, now, now + self.lifetime)
            self.name_in_log(visit, opened.session)
            self.logs.line("logout", session=visit.log["session"], request_id=visit.request_id)
        self.clear_cookie(visit)

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
