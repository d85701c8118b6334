"""One call of the upstream, with the API key, deadlines and retries.

Rules:
1. The request's headers are built from scratch. The transport is called directly: no cookie jar, no redirects, no
   environment proxies, so no data of one client can be sent with another client's request.
2. Only failures that cannot have cost anything are retried: a connection that was not established, and the statuses
   that mean "not now". Every attempt starts within `first_byte_timeout`.
3. No text of the upstream's errors reaches the client, except a `code` and `param` of harmless shape.
4. httpx's errors are translated only here and in upstream_errors.py.
"""

from __future__ import annotations

import asyncio
import errno
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar, cast

import httpx
import msgspec

from proxy import settings
from proxy.chat.api_key import ApiKey
from proxy.chat.upstream_errors import (
    HARMLESS,
    decoded,
    describe,
    error_of,
    is_json,
    read_at_most,
    refuse_transport,
    retry_after,
)
from proxy.errors import (
    BadGateway,
    Busy,
    GatewayTimeout,
    Refusal,
    UpstreamAuth,
    UpstreamProtocol,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnreachable,
)
from proxy.transport.connection import ResponseStream
from proxy.web.headers import join_repeated

REJECTED = frozenset({400, 404, 413, 422})
RETRIED = frozenset({502, 503, 529})  # and 429

T = TypeVar("T")

FIRST_PAUSE = 0.5  # seconds before the first retry; doubled each time (the guide's 2 ** attempt, starting lower)
LONGEST_PAUSE = 8.0  # seconds; the browser is waiting
LONGEST_ANSWER = 8 << 20  # bytes of an answer that is not streamed
WRITE_TIMEOUT = 30.0  # seconds for the upstream to take more of the request's body
PLAIN_NAME = re.compile(r"[a-z0-9.+/-]{1,40}")  # of a media type or a content coding

Random = Callable[[], float]


class Model(msgspec.Struct):
    id: str


class ModelList(msgspec.Struct):
    data: list[Model]


decode_models = msgspec.json.Decoder(ModelList).decode


@dataclass(slots=True)
class UpstreamCall:
    """One call of the upstream: the request, and what it took.

    `sent`: the whole request was sent, so the upstream may be doing paid work. `key` is the key that was sent: the
    configured one may change before the response arrives.
    """

    body: bytes
    request_id: str
    traceparent: bytes | None = None
    retries: int = 0
    sent: bool = False
    key: str = ""

    def mark_sent(self) -> None:
        self.sent = True


class Upstream:
    """One upstream, as configured."""

    def __init__(
        self,
        configured: settings.Upstream,
        transport: httpx.AsyncBaseTransport,
        *,
        user_agent: str,
        random: Random,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.configured = configured
        self.transport = transport
        self.key = ApiKey(configured.api_key, clock)
        self.url = httpx.URL(configured.base_url + "/chat/completions")
        self.models_url = httpx.URL(configured.base_url + "/models")
        self.user_agent = user_agent.encode()
        # Reads have no timeout of their own: asyncio.timeout covers them, and each read would set one more timer.
        self.timeouts = {"connect": configured.connect_timeout, "read": None, "write": WRITE_TIMEOUT, "pool": None}
        self.random = random
        self.wall = wall

    # ---- the two calls --------------------------------------------------------------------------------------------

    async def stream(self, call: UpstreamCall) -> ResponseStream:
        """The upstream's stream, once its status and headers are checked. Raises a Refusal."""
        patience = self.configured.first_byte_timeout
        response = await self.open(call, b"text/event-stream", patience)
        return cast(ResponseStream, response.stream)

    async def complete(self, call: UpstreamCall) -> bytes:
        """A whole answer: at most LONGEST_ANSWER bytes of JSON, within total_timeout. Raises a Refusal.

        The JSON is checked because nothing else reveals a truncated body that ends by closing the connection.
        """
        patience = self.configured.total_timeout
        try:
            async with asyncio.timeout(patience):
                response = await self.open(call, b"application/json", patience)
                try:
                    answer = await read_at_most(response, LONGEST_ANSWER)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise GatewayTimeout(should_retry=False, reason="total_timeout", billed=True) from None
        except httpx.TransportError as error:
            raise UpstreamProtocol(reason=f"body: {type(error).__name__}", billed=True) from error
        if answer is None:
            raise UpstreamProtocol(reason=f"answer is over {LONGEST_ANSWER} bytes", billed=True)
        if self.key.pieces.search(answer):
            raise UpstreamProtocol(reason="the upstream sent our key in an answer", billed=True, leaked=True)
        if not is_json(answer):
            raise UpstreamProtocol(reason="answer is not whole JSON", billed=True)
        return answer

    async def probe(self) -> frozenset[str]:
        """The names of the upstream's models, a free request; empty if the list cannot be read. Raises a Refusal."""
        headers = self.headers(self.key.value(), "check", b"application/json")
        request = httpx.Request("GET", self.models_url, headers=headers)
        request.extensions = {"timeout": self.timeouts}
        try:
            async with asyncio.timeout(self.configured.first_byte_timeout):
                response = await self.transport.handle_async_request(request)
        except TimeoutError:
            raise GatewayTimeout(reason="first_byte_timeout") from None
        except httpx.TransportError as error:
            refuse_transport(error)
        try:
            if response.status_code != 200:
                await self.refuse_status(response)
            return await models_in(response)
        finally:
            await response.aclose()

    # ---- attempts -------------------------------------------------------------------------------------------------

    async def open(self, call: UpstreamCall, wanted: bytes, patience: float) -> httpx.Response:
        """A response of status 200 with the wanted content type, within `patience` seconds including all retries.

        No retry starts after first_byte_timeout (rule 2). Raises a Refusal.
        """
        call.key = self.key.value()
        headers = [
            (b"host", self.url.netloc),  # given like the length below, since deriving them takes httpx longer
            *self.headers(call.key, call.request_id, wanted),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(call.body)),
            *([(b"traceparent", call.traceparent)] if call.traceparent else []),
        ]
        request = httpx.Request("POST", self.url, headers=headers, stream=httpx.ByteStream(call.body))
        request.extensions = {"timeout": self.timeouts, "sent": call.mark_sent}
        clock = asyncio.get_running_loop().time
        retry_until = clock() + min(patience, self.configured.first_byte_timeout)
        try:
            async with asyncio.timeout(patience):
                while True:
                    try:
                        return await self.attempt(request, wanted)
                    except Refusal as refusal:
                        pause = self.pause_after(refusal, call)
                        if pause is None or clock() + pause >= retry_until:
                            raise
                    call.sent = False
                    call.retries += 1
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise GatewayTimeout(should_retry=False, reason="no answer in time", billed=call.sent) from None
        except Refusal as refusal:
            if call.retries:
                refusal.should_retry = False
            raise

    async def attempt(self, request: httpx.Request, wanted: bytes) -> httpx.Response:
        """One attempt: a usable response. Raises a Refusal, whose `retriable` allows another attempt."""
        try:
            response = await self.transport.handle_async_request(request)
        except httpx.ConnectError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EMFILE, errno.ENFILE):
                raise Busy(reason=describe(error)) from error
            if not isinstance(error.__cause__, ssl.SSLError):
                raise UpstreamUnreachable(reason=describe(error), retriable=True) from error
            refuse_transport(error)
        except httpx.TransportError as error:
            refuse_transport(error)
        if response.status_code == 200:
            try:
                self.check_headers(response, wanted)
            except Exception:  # even a bug must not leave the model generating
                await response.aclose()
                raise
            return response
        try:
            await self.refuse_status(response)
        finally:
            await response.aclose()

    def pause_after(self, refusal: Refusal, call: UpstreamCall) -> float | None:
        """Seconds to wait before the next attempt; None if the refusal is final."""
        if not refusal.retriable or call.retries >= self.configured.retries:
            return None
        if refusal.retry_after is not None:
            return refusal.retry_after
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**call.retries) * (0.5 + self.random() / 2)

    # ---- requests -------------------------------------------------------------------------------------------------

    def headers(self, key: str, request_id: str, wanted: bytes) -> list[tuple[bytes, bytes]]:
        scheme = f"{self.configured.auth_scheme} " if self.configured.auth_scheme else ""
        return [
            (self.configured.auth_header.lower().encode(), f"{scheme}{key}".encode()),
            (b"accept", wanted),
            (b"accept-encoding", b"identity"),
            (b"user-agent", self.user_agent),
            (b"x-request-id", request_id.encode()),
        ]

    # ---- responses ------------------------------------------------------------------------------------------------

    def check_headers(self, response: httpx.Response, wanted: bytes) -> None:
        """Raises UpstreamProtocol unless the response has the wanted media type and no content coding."""
        headers = join_repeated((name.lower(), value) for name, value in response.headers.raw)
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if kind == wanted and encoding == b"identity":
            return
        named = [self.shown(name.decode("latin-1"), PLAIN_NAME) or "unreadable" for name in (kind, encoding)]
        raise UpstreamProtocol(reason=f"content-type {named[0]}, content-encoding {named[1]}", billed=True)

    async def refuse_status(self, response: httpx.Response) -> NoReturn:
        """Raises the refusal for a status that is not 200."""
        status = response.status_code
        reason = f"upstream status {status}"
        wait = retry_after(response.headers, self.wall())
        if status in REJECTED:
            error = await error_of(response)
            code, param = self.shown(error.code, HARMLESS), self.shown(error.param, HARMLESS)
            raise UpstreamRejected(upstream_code=code, param=param, reason=reason)
        if status in (401, 403):
            raise UpstreamAuth(reason=reason)
        if status == 429:
            raise UpstreamRateLimited(retry_after=wait, reason=reason, retriable=True)
        if status < 400:
            raise UpstreamProtocol(reason=reason, billed=status < 300)
        raise BadGateway(retry_after=wait, reason=reason, billed=status == 504, retriable=status in RETRIED)

    def shown(self, value: object, shape: re.Pattern[str]) -> str | None:
        """The upstream's value if it has that shape and contains no piece of the key, else None."""
        if isinstance(value, str) and shape.fullmatch(value) and not self.key.pieces.search(value.encode()):
            return value
        return None


async def models_in(response: httpx.Response) -> frozenset[str]:
    listed = await decoded(response, LONGEST_ANSWER, decode_models)
    return frozenset(model.id for model in listed.data) if listed else frozenset()
