"""One request as it goes through the house: what is known about it so far, and how it is answered.

Rules:
1. The headers of an answer are built from nothing, here; what an upstream sent has no way in.
2. What the log may say about a request is what was put into its `log`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Receive, Scope, Send

from proxy.errors import BodyTooLarge, HeaderList, Refusal, RequestTimeout
from proxy.limits.status import LimitStatus, limit_headers
from proxy.telemetry.usage import Usage
from proxy.web.cancel import ClientGone
from proxy.web.client import Caller
from proxy.web.headers import API_HEADERS, JSON, Headers

if TYPE_CHECKING:
    from proxy.telemetry.traces import Trace

BODY_SECONDS = 10.0  # for a request's body to be in
BODY_RATE = 16 * 1024  # bytes a second that a long one may take on top: a slow uplink, not a drip
DROPPED_BYTES = 8 << 20  # of an unwanted body; who sends more may find the connection reset
CLIENT_CLOSED = 499  # nginx's status for a caller that left before it was answered; it stands in logs only


class RequestContext:
    """One request: what is known about it so far, and how it is answered."""

    __slots__ = (
        *("__weakref__", "_base_headers", "began", "caller", "code", "cookies", "ending", "headers", "log", "method"),
        *("query", "reason", "receive", "request_id", "scope", "send", "standings", "started", "status", "trace"),
        "used",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        caller: Caller,
        headers: Headers,
        base_headers: HeaderList,
        request_id: str,
    ) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self._base_headers = base_headers
        self.method: str = scope["method"]
        self.query: bytes = scope["query_string"]
        self.caller = caller
        self.headers = headers
        self.request_id = request_id
        self.started = time.monotonic()
        self.cookies: list[bytes] = []
        self.standings: list[LimitStatus] = []
        self.status = CLIENT_CLOSED
        self.code: str | None = None
        self.ending: str | None = None
        self.reason: str | None = None
        self.began = False
        self.log: dict[str, Any] = {}
        self.used: Usage | None = None
        self.trace: Trace | None = None

    @property
    def traceparent(self) -> bytes | None:
        """What an upstream may know of this request's trace."""
        return self.trace.traceparent if self.trace is not None else None

    async def body(self, most: int) -> bytes:
        """The request's body.

        Raises BodyTooLarge beyond `most` bytes, RequestTimeout when it comes too slowly, ClientGone when not whole.
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
        """Lets a body come that nobody wants: closing while it does would take the answer with it."""
        with suppress(Refusal):
            await self.body(DROPPED_BYTES)

    def head(self, status: int, headers: HeaderList) -> Message:
        """The start of the response: ours from the first header to the last."""
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

    async def tell(self, status: int, page: bytes) -> None:
        """A page for a person, where a browser was sent on its own and no script of ours can read an error."""
        await self.whole(status, page, [(b"content-type", b"text/html; charset=utf-8")])

    async def refuse(self, refusal: Refusal) -> None:
        self.code = type(refusal).code  # never the one an upstream gave: it ends up in labels
        self.reason = refusal.reason
        headers = refusal.headers()
        if not any(name == b"ratelimit" for name, _ in headers):
            headers += limit_headers(self.standings)
        await self.answer(refusal.status, refusal.body(), headers)


def extend(deadline: asyncio.Timeout, seconds: float) -> None:
    due = deadline.when()
    if due is not None and not deadline.expired():
        deadline.reschedule(due + seconds)
