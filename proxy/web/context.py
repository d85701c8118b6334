"""One HTTP request and its response.

Rules:
1. The headers of a response are built here, from nothing; no header of an upstream can enter.
2. The log may show of a request only what was put into its record.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import Message, Receive, Scope, Send

from proxy.errors import BodyTooLarge, HeaderList, Refusal, RequestTimeout
from proxy.telemetry.records import RequestRecord
from proxy.web.cancel import ClientGone
from proxy.web.client import Caller
from proxy.web.headers import API_HEADERS, JSON, Headers

BODY_SECONDS = 10.0  # for a request's body to arrive
BODY_RATE = 16 * 1024  # bytes a second that a long body may take on top: a slow uplink, not a drip
DROPPED_BYTES = 8 << 20  # of a body that is read only to be dropped; a longer one may end in a reset connection


class RequestContext(RequestRecord):
    """One request: its parsed head, how its body is read, how it is answered, and the record of it."""

    __slots__ = (
        "__weakref__",
        "_base_headers",
        "caller",
        "cookies",
        "headers",
        "limit_headers",
        "query",
        "receive",
        "scope",
        "send",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        route: str | None,
        caller: Caller,
        headers: Headers,
        base_headers: HeaderList,
        request_id: str,
    ) -> None:
        super().__init__(method=scope["method"], route=route, request_id=request_id, address=caller.shown)
        self.scope = scope
        self.receive = receive
        self.send = send
        self._base_headers = base_headers
        self.query: bytes = scope["query_string"]
        self.caller = caller
        self.headers = headers
        self.cookies: list[bytes] = []
        self.limit_headers: HeaderList = []  # of the limits that this request was counted in

    @property
    def traceparent(self) -> bytes | None:
        """The value of `traceparent` for the upstream."""
        return self.trace.traceparent if self.trace is not None else None

    async def body(self, most: int) -> bytes:
        """The request's body.

        Raises BodyTooLarge beyond `most` bytes, RequestTimeout when it arrives too slowly, and ClientGone when the
        client leaves before its end.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message["body"]
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise BodyTooLarge
                    if not message["more_body"]:
                        return b"".join(parts)
                    extend(deadline, len(part) / BODY_RATE)
        except TimeoutError:
            raise RequestTimeout from None

    async def drop_body(self) -> None:
        """Reads and drops a body that is not needed: to close during its upload would lose the response."""
        with suppress(Refusal):
            await self.body(DROPPED_BYTES)

    def head(self, status: int, headers: HeaderList) -> Message:
        """The start of the response, with every header it has."""
        self.status = status
        self.began = True
        cookies = [(b"set-cookie", cookie) for cookie in self.cookies]
        own = [(b"x-request-id", self.request_id.encode()), *self._base_headers, *API_HEADERS]
        return {"type": "http.response.start", "status": status, "headers": [*headers, *own, *cookies]}

    async def whole(self, status: int, body: bytes, headers: HeaderList) -> None:
        length = (b"content-length", b"%d" % len(body))
        await self.send(self.head(status, [*headers, length]))
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def answer(self, status: int, body: bytes, headers: HeaderList) -> None:
        await self.whole(status, body, [JSON, *headers])

    async def redirect(self, location: str) -> None:
        await self.whole(302, b"", [(b"location", location.encode())])

    async def answer_page(self, status: int, page: bytes) -> None:
        """An HTML page, for a browser that was redirected here and runs no script that could read a JSON error."""
        await self.whole(status, page, [(b"content-type", b"text/html; charset=utf-8")])

    async def refuse(self, refusal: Refusal) -> None:
        self.code = type(refusal).code  # never the upstream's: the code becomes a metric label
        self.reason = refusal.reason
        headers = refusal.headers()
        if not any(name == b"ratelimit" for name, _ in headers):
            headers += self.limit_headers
        await self.answer(refusal.status, refusal.body(), headers)


def extend(deadline: asyncio.Timeout, seconds: float) -> None:
    due = deadline.when()
    if due is not None and not deadline.expired():
        deadline.reschedule(due + seconds)
