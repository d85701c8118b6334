"""Mode `header`: a trusted proxy has authenticated the user and sends the name in a header."""

from __future__ import annotations

from proxy.accounts.modes import PlainMode
from proxy.accounts.session import Session
from proxy.errors import Forbidden, LoginRequired
from proxy.web.client import Caller
from proxy.web.context import RequestContext
from proxy.web.headers import Headers

LONGEST_NAME = 256  # bytes: the name must fit into the session's cookie


class HeaderMode(PlainMode):
    name = "header"

    def __init__(self, header_name: str) -> None:
        self.header = header_name.lower().encode()

    def subject_of(self, context: RequestContext) -> str | None:
        return user_from_header(context.headers, self.header, context.caller)

    def accepts(self, session: Session, context: RequestContext) -> bool:
        """The session belongs to the user that this request names."""
        return session.subject == self.subject_of(context)


def user_from_header(headers: Headers, header: bytes, caller: Caller) -> str:
    """The user. Raises LoginRequired without a name, Forbidden for a name from an untrusted peer or of a wrong form."""
    value = headers.get(header)
    if value is None:
        raise LoginRequired
    if not caller.through_proxy:
        raise Forbidden(reason="an identity from a peer that is no trusted proxy")
    try:
        user = value.decode().strip()
    except UnicodeDecodeError:
        raise Forbidden(reason="an identity that is not UTF-8") from None
    if not user:
        raise LoginRequired
    if "," in user or not user.isprintable() or len(value) > LONGEST_NAME:  # two headers were joined with a comma
        raise Forbidden(reason="an identity that is not one name")
    return user
