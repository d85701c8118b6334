"""An identity that a proxy in front vouches for: the name it puts into a header, once it has logged somebody in."""

from __future__ import annotations

from proxy.errors import Forbidden, LoginRequired
from proxy.web.client import Caller
from proxy.web.headers import Headers

LONGEST_NAME = 256  # bytes: it has to fit into the session's cookie


def user_from_header(headers: Headers, header: bytes, caller: Caller) -> str:
    """The user. Raises LoginRequired where none is named, Forbidden where whoever names one is not believed."""
    written = headers.get(header)
    if written is None:
        raise LoginRequired
    if not caller.through_proxy:
        raise Forbidden(reason="an identity from a peer that is no trusted proxy")
    try:
        user = written.decode().strip()
    except UnicodeDecodeError:
        raise Forbidden(reason="an identity that is not UTF-8") from None
    if not user:
        raise LoginRequired
    if "," in user or not user.isprintable() or len(written) > LONGEST_NAME:  # two of them were joined with a comma
        raise Forbidden(reason="an identity that is not one name")
    return user
