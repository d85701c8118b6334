"""Header values: reading those of a request, and the ones that every response of the API has. Pure.

Rules:
1. A header that appears twice is joined with a comma (RFC 9110 section 5.3), cookies with a semicolon; code that needs
   exactly one value then refuses the joined one, without a special case.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import Send

from proxy.errors import (
    HeaderList,
    Refusal,
)

Headers = dict[bytes, bytes]


def join_repeated(fields: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Header fields by lower-case name; the values of a repeated name are joined (rule 1)."""
    headers: Headers = {}
    for name, value in fields:
        if name in headers:
            value = headers[name] + (b"; " if name == b"cookie" else b", ") + value
        headers[name] = value
    return headers


def cookies_named(headers: Headers, name: bytes) -> list[bytes]:
    """Every value of the cookie `name` in the Cookie header, unchanged (RFC 6265 section 5.4)."""
    values = []
    for pair in headers.get(b"cookie", b"").split(b";"):
        key, _, value = pair.strip().partition(b"=")
        if key == name:
            values.append(value)
    return values


API_HEADERS: HeaderList = [
    (b"cache-control", b"no-store, no-transform"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'"),
]
JSON = (b"content-type", b"application/json")
STREAM_HEADERS: HeaderList = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


def bare_headers(refusal: Refusal, body: bytes) -> HeaderList:
    """The headers of a response to a request that has no context."""
    return [JSON, (b"content-length", b"%d" % len(body)), *refusal.headers(), *API_HEADERS]


async def bare_refusal(send: Send, refusal: Refusal) -> None:
    """Answers a request that has no context. Raises when a response has begun; uvicorn then closes the connection."""
    body = refusal.body()
    await send({"type": "http.response.start", "status": refusal.status, "headers": bare_headers(refusal, body)})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def set_cookie(name: str, value: str, max_age: int, *, secure: bool, same_site: str = "Strict") -> bytes:
    """A Set-Cookie value (RFC 6265bis). HttpOnly: no script can read it; Strict: requests from other sites lack it."""
    flags = "; Secure" if secure else ""
    return f"{name}={value}; Path=/; Max-Age={max_age}; HttpOnly; SameSite={same_site}{flags}".encode()
