"""The embedded demo model: an OpenAI-compatible upstream that needs no key and fails on request.

`chat-proxy demo` runs it as a real HTTP upstream on a loopback port of its own; `chat-proxy upstream` runs it
alone, for people who build a page. It serves `POST /v1/chat/completions` and `GET /v1/models`.

Rules of this file:
1. Everything above `PacedResponse` is pure: no await, no clock, no network. An answer is a row of emissions,
   (seconds after the start, bytes), and what waits for them decides nothing.
2. One piece is one token, in `usage`, in `max_tokens` and on the wire. The prompt: see `prompt_tokens`.
3. A client that leaves, in any phase, ends its answer at once, also in the middle of `/silent`.
4. The key is in no answer. Log lines hold neither the key nor anything that the user wrote.

Knobs, anywhere in the last user message as words of their own; the rest of the message chooses the answer:

| knob         | effect                                                                                     |
|--------------|--------------------------------------------------------------------------------------------|
| `/error 429` | that status (400-599, else 500) in OpenAI's error shape; 429, 503 with Retry-After: 2      |
| `/cut`       | ends in mid-answer and mid-event: connection closed, no terminating chunk, no [DONE]       |
| `/silent 90` | silent for so many seconds in mid-answer (30 without a number, at most 600)                |
| `/slow`      | ten times as long until the first token (with a delay of 0 there is nothing to multiply)   |
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from proxy.demo.answers import STAGED, choose
from proxy.demo.request import (
    MAX_STAGE_PIECE,
    MODEL_PACE,
    MODELS,
    Ask,
    Rejected,
    Staging,
    encode,
    parse,
    staged_error,
    staging,
)

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Room for inline images; the body is held in memory and parsed as a whole."""

FIRST_TOKEN_PIECES = 10
"""The first token takes as long as this many others, as if the model were reading the prompt."""

SLOW_FACTOR = 10
JITTER = 0.3
"""A token is early or late by at most this share of the delay; below 0.5 tokens never change places."""

logger = logging.getLogger(__name__)

Emission = tuple[float, bytes]
"""Seconds after the start at which it is due, and what is sent then."""


# The answer -----------------------------------------------------------------------------------------------

# As tokenizers cut: a word takes along the space before it, long words and numbers fall apart, an indentation
# stays together but for its last space. Every character matches one of the alternatives, so nothing is lost.
_PIECE = re.compile(r" ?[^\W\d_]{1,9}| ?\d{1,3}| ?(?:[^\w\s]|_){1,4}|\n+|[^\S\n]+(?=[^\S\n])|\s")


@dataclass(frozen=True, slots=True)
class Answer:
    """The pieces of an answer, one token each, and why it ends there: "stop" or "length"."""

    pieces: tuple[str, ...]
    finish_reason: str

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def pieces(text: str) -> tuple[str, ...]:
    """`text` cut into word-like pieces; joined they are `text` again."""
    return tuple(_PIECE.findall(text))


def answer(prompt: str, faults: Staging, stops: tuple[str, ...], limit: int | None) -> Answer:
    """The answer to `prompt`, ended before the first of `stops` or after `limit` pieces."""
    text = choose(prompt) if prompt.strip() or faults == Staging() else STAGED.rstrip("\n")
    whole = pieces(text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))])
    if limit is not None and limit < len(whole):
        return Answer(whole[:limit], "length")
    return Answer(whole, "stop")


def usage(ask: Ask, reply: Answer) -> dict[str, int]:
    completion = len(reply.pieces)
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": ask.prompt_tokens + completion,
    }


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that all objects of one answer share."""

    id: str
    created: int
    model: str

    def object(self, kind: str, **fields: object) -> dict[str, object]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": "fp_demo", **fields}


def completion(head: Head, ask: Ask, reply: Answer) -> dict[str, object]:
    """The answer as one `chat.completion` object."""
    message = {"role": "assistant", "content": reply.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
    return head.object("chat.completion", choices=[choice], usage=usage(ask, reply))


def chunks(head: Head, ask: Ask, reply: Answer) -> Iterator[dict[str, object]]:
    """The answer as `chat.completion.chunk` objects: role, one for each piece, finish reason, usage.

    As with OpenAI, `usage` stands in every chunk if the request has `include_usage` (null but in the last,
    whose `choices` are empty) and in none otherwise.
    """
    extra: dict[str, object] = {"usage": None} if ask.include_usage else {}

    def chunk(delta: dict[str, object], finish_reason: str | None = None) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return head.object("chat.completion.chunk", choices=[choice], **extra)

    yield chunk({"role": "assistant", "content": "", "refusal": None})
    for piece in reply.pieces:
        yield chunk({"content": piece})
    yield chunk({}, reply.finish_reason)
    if ask.include_usage:
        yield head.object("chat.completion.chunk", choices=[], usage=usage(ask, reply))


# The timetable --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pace:
    """When each piece is due, in seconds after the start: counted from the start, so that it cannot drift."""

    delay: float
    slow: bool
    silent: int
    middle: int

    def due(self, index: int) -> float:
        first = FIRST_TOKEN_PIECES * (SLOW_FACTOR if self.slow else 1)
        silence = self.silent if index >= self.middle else 0
        return (first + index + jitter(index)) * self.delay + silence


def jitter(index: int) -> float:
    """From -JITTER to JITTER, the same for the same index (Knuth's multiplicative hash); 0 for the first."""
    return ((index * 2654435761 >> 12 & 0xFFFF) / 0x8000 - 1) * JITTER if index else 0.0


def streamed(head: Head, ask: Ask, reply: Answer, pace: Pace, cut: bool) -> Iterator[Emission]:
    """The answer as server-sent events; with `cut` the last one stops in the middle of its JSON."""
    last = len(reply.pieces)
    for index, chunk in enumerate(chunks(head, ask, reply), start=-1):  # the role comes with the first piece
        event = b"data: " + encode(chunk) + b"\n\n"
        due = pace.due(min(max(index, 0), last))
        if cut and index == pace.middle:
            yield due, event[: len(event) // 2]
            return
        yield due, event
    yield pace.due(last), b"data: [DONE]\n\n"


def whole(head: Head, ask: Ask, reply: Answer, pace: Pace, cut: bool) -> tuple[Emission, int]:
    """The answer as one JSON object with its full length; with `cut` only the first half of it is sent."""
    body = encode(completion(head, ask, reply))
    return (pace.due(len(reply.pieces)), body[: len(body) // 2] if cut else body), len(body)


# From here on it waits ------------------------------------------------------------------------------------


class PacedResponse:
    """Sends each emission when it is due, the headers before the first, and stops when the client leaves.

    With `cut` it returns without the final message, whereupon uvicorn closes the connection as it stands.
    """

    def __init__(self, headers: Mapping[str, str], emissions: Iterable[Emission], cut: bool) -> None:
        self.headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        self.emissions = emissions
        self.cut = cut

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.TaskGroup() as group:
            left = group.create_task(self._client_left(receive))
            sent = group.create_task(self._send(send))
            await asyncio.wait((left, sent), return_when=asyncio.FIRST_COMPLETED)
            ending = "the client left" if not sent.done() else "cut on request" if self.cut else "complete"
            left.cancel()
            sent.cancel()
        logger.info("demo answer: %s", ending)

    async def _client_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _send(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        started = False
        for due, body in self.emissions:
            # At least one turn of the loop for each: send() does not wait once the client has gone.
            await asyncio.sleep(max(0.0, start + due - loop.time()))
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": self.headers})
                started = True
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if not self.cut:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class Model:
    """The two routes."""

    def __init__(self, api_key: str | None, delay_seconds: float, clock: Callable[[], float]) -> None:
        self._key = None if api_key is None else api_key.encode("utf-8")
        self._delay = delay_seconds
        self._clock = clock
        self._numbers = count(1)

    async def chat(self, request: Request) -> Response | PacedResponse:
        try:
            self._authorise(request)
            return self._reply(parse(await _body(request)))
        except Rejected as refusal:
            return _refused(refusal)

    async def models(self, request: Request) -> Response:
        try:
            self._authorise(request)
        except Rejected as refusal:
            return _refused(refusal)
        common = {"object": "model", "created": int(self._clock()), "owned_by": "chat-proxy"}
        data = [{"id": name, **common} for name in MODELS]
        return Response(encode({"object": "list", "data": data}), media_type="application/json")

    def _authorise(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), self._key):
            raise Rejected(401, "The API key is missing or wrong.", code="invalid_api_key")

    def _reply(self, ask: Ask) -> PacedResponse:
        faults, prompt = staging(ask.prompt)
        if faults.error is not None:
            raise staged_error(faults.error)
        created = int(self._clock())
        head = Head(f"chatcmpl-{created:x}{next(self._numbers):06x}", created, ask.model)
        reply = answer(prompt, faults, ask.stops, ask.limit)
        pace = Pace(
            delay=self._delay * MODEL_PACE[ask.model],
            slow=faults.slow,
            silent=faults.silent,
            middle=min(len(reply.pieces) // 2, MAX_STAGE_PIECE),
        )
        if ask.stream:
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            return PacedResponse(headers, streamed(head, ask, reply, pace, faults.cut), faults.cut)
        emission, length = whole(head, ask, reply, pace, faults.cut)
        headers = {"content-type": "application/json", "content-length": str(length)}
        return PacedResponse(headers, [emission], faults.cut)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            message = f"The body is longer than {MAX_BODY_BYTES} bytes."
            raise Rejected(413, message, headers={"connection": "close"})
    return bytes(body)


def _refused(refusal: Rejected) -> Response:
    return Response(refusal.body, refusal.status, refusal.headers, media_type="application/json")


def _no_route(_request: Request, fault: Exception) -> Response | Awaitable[Response]:
    status = fault.status_code if isinstance(fault, HTTPException) else 500
    headers = fault.headers if isinstance(fault, HTTPException) else None
    message = f"{HTTPStatus(status).phrase}: this server has POST /v1/chat/completions and GET /v1/models."
    return _refused(Rejected(status, message, headers=headers))


def _client_left(_request: Request, _fault: Exception) -> Response | Awaitable[Response]:
    return Response(status_code=400)  # the client is gone


def is_no_staged_cut(record: logging.LogRecord) -> bool:
    """A filter for uvicorn's log, which complains of each cut that was asked for: that is how it is done."""
    return record.msg != "ASGI callable returned without completing response."


def build(
    *,
    api_key: str | None,
    delay_seconds: float = 0.02,
    clock: Callable[[], float] = time.time,
) -> Starlette:
    """The demo model as an ASGI app.

    `api_key`: the bearer token that callers must present; None accepts any caller.
    `delay_seconds`: the time for one token of the first model; 0 is as fast as possible.
    `clock`: Unix time in seconds, for `created`.

    Raises ValueError for an empty key (it would accept every client) and for a negative delay.
    """
    if api_key is not None and not api_key.strip():
        raise ValueError("api_key must not be empty; None accepts any caller")
    if not delay_seconds >= 0:
        raise ValueError("delay_seconds must not be negative")
    model = Model(api_key, delay_seconds, clock)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", model.chat, methods=["POST"]),
            Route("/v1/models", model.models, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _no_route, ClientDisconnect: _client_left},
    )
    app.router.redirect_slashes = False
    return app
