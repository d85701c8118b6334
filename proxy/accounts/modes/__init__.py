"""The session modes: how a client becomes known. One class a mode, chosen once at the start."""

from __future__ import annotations

from typing import Protocol

from proxy.accounts.session import Session
from proxy.web.context import RequestContext


class Mode(Protocol):
    """The differences between the modes. `name` is the value of `session.mode`.

    `wants_login`: no session is issued without a login.
    """

    name: str
    wants_login: bool

    def subject_of(self, context: RequestContext) -> str | None:
        """The subject of a new session without a login. Raises LoginRequired, Forbidden."""

    def accepts(self, session: Session, context: RequestContext) -> bool:
        """Whether a session of this mode may still be used by this request."""

    def label(self, subject: str | None) -> str:
        """The mode as sessions carry it. A session with another label is not accepted."""

    def use_keys(self, keys: list[str]) -> None:
        """Takes the session secret's lines, newest first."""

    def reload(self) -> None:
        """Reads the mode's own secrets again."""

    def close(self) -> None: ...

    async def logout_url(self) -> str | None:
        """The address where a browser may also end its session with the identity provider."""


class PlainMode:
    """A mode without secrets, logins and resources of its own."""

    name: str
    wants_login = False

    def accepts(self, session: Session, context: RequestContext) -> bool:
        return True

    def label(self, subject: str | None) -> str:
        return self.name

    def use_keys(self, keys: list[str]) -> None:
        """Does nothing: the mode has no cookie of its own."""

    def reload(self) -> None:
        """Does nothing: the mode has no secret of its own."""

    def close(self) -> None:
        """Does nothing: the mode holds no resource."""

    async def logout_url(self) -> str | None:
        return None
