"""What `chat-proxy check --url` asks of a running server: how its requests and our answers fare on the way.

What is shown stands in the address's query: `?check=echo` and so on, under `/api/check/...` and under the chat's own
addresses. For what is in front of us has rules by address, and only those that chats meet matter.

Rules:
1. Nothing here calls the upstream, takes of a visitor's allowance, or counts as a chat.
2. Streams are few at a time, short, end when the browser leaves, and at once when a drain begins.
3. A report contains its own request and public settings, nothing of other clients.

All of it needs a ticket (ticket.py); the application checks that.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl

import msgspec

from proxy.check.report import HEADER, Departure, Report, State
from proxy.check.ticket import Tickets
from proxy.errors import (
    BadGateway,
    Busy,
    HeaderList,
    Interruption,
    InvalidRequest,
    NotFound,
    Refusal,
    StreamDrained,
    TooMany,
    Unauthenticated,
)
from proxy.settings import Settings
from proxy.web.cancel import CancelScope, ClientGone
from proxy.web.client import Edge
from proxy.web.context import RequestContext
from proxy.web.headers import JSON, STREAM_HEADERS, Headers, set_cookie

MOST_STREAMS = 4  # at one time: a run of `check` has one open
MOST_EVENTS = 100
LONGEST_STREAM = 120.0  # seconds; two minutes of silence are more than any chat should bear
REMEMBERED = 64  # streams whose end may be asked for
LOOK_EVERY = 0.5  # seconds of a silence between two checks for a drain
DEPARTURE_SECONDS = 0.25  # for a stream to end, when its end is asked for: it should have, milliseconds ago
DEPARTURE_LOOK = 0.01
UNKNOWN = Departure("unknown", 0)
COOKIE_SECONDS = 60
REFUSALS: dict[str, type[Refusal]] = {
    str(kind.status): kind for kind in (Unauthenticated, NotFound, TooMany, BadGateway, Busy)
}

Asked = dict[str, str]

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """The requested stream: so many events, so many seconds apart."""

    name: str
    events: int
    spacing: float

    @classmethod
    def of(cls, asked: Asked) -> StreamSpec:
        """Raises InvalidRequest for what is not a short stream."""
        try:
            spec = cls(asked.get("name", ""), int(asked.get("events", "")), float(asked.get("spacing", "")))
        except ValueError:
            raise InvalidRequest("A stream has a name, a number of events, and seconds between them.") from None
        if not re.fullmatch("[0-9a-f]{16,64}", spec.name) or not spec.is_short:
            raise InvalidRequest(f"A stream has up to {MOST_EVENTS} events and lasts {LONGEST_STREAM:g} s at most.")
        return spec

    @property
    def is_short(self) -> bool:
        return 1 <= self.events <= MOST_EVENTS and 0 <= (self.events - 1) * self.spacing <= LONGEST_STREAM


class DiagnosticRoutes:
    """The diagnostic routes of one server. `wall` gives Unix seconds; its streams stand in `live` with the others."""

    def __init__(
        self,
        settings: Settings,
        edge: Edge,
        live: set[CancelScope],
        *,
        server: str,
        tickets: Tickets,
        cookie: str,
        is_draining: Callable[[], bool],
        wall: Callable[[], float],
    ) -> None:
        self.edge = edge
        self.live = live
        self.server = server
        self.tickets = tickets
        self.cookie = f"{cookie}-check"
        self.is_https = settings.server.is_https
        self.public_url = settings.server.public_url
        self.max_body_bytes = settings.server.max_body_bytes
        self.user_header = settings.header.name.lower().encode() if settings.session.mode == "header" else None
        self.is_draining = is_draining
        self.wall = wall
        self.checks: dict[str, Callable[[RequestContext, Asked, int], Awaitable[None]]] = {
            "echo": self.echo,
            "refusal": self.refusal,
            "stream": self.stream,
            "departure": self.departure,
        }
        self.open = 0
        self.departures: dict[str, Departure] = {}  # by a stream's name; the newest last

    def admits(self, context: RequestContext) -> bool:
        """Whether the request has a valid ticket, so it comes from a `chat-proxy check` that has the session secret."""
        ticket = context.headers.get(HEADER.encode())
        return ticket is not None and self.tickets.admit(ticket, self.wall())

    async def show(self, context: RequestContext) -> None:
        """Answers what is asked for, by any method. Raises NotFound for what cannot be shown."""
        asked = dict(parse_qsl(context.query.decode("latin-1")))
        showing = self.checks.get(asked.get("check", ""))
        body = await context.body(self.max_body_bytes)
        if showing is None:
            raise NotFound
        await showing(context, asked, len(body))

    # ---- the request as the server sees it --------------------------------------------------------------------------

    async def echo(self, context: RequestContext, asked: Asked, body: int) -> None:
        """A report of the request; with `&cookie=` it gives one like those of sessions, that opens nothing."""
        if "cookie" in asked:
            context.cookies = [set_cookie(self.cookie, "looked", COOKIE_SECONDS, secure=self.is_https)]
        head = context.head(200, [JSON])
        answer = encode(self.report(context, head["headers"], body))
        head["headers"].append((b"content-length", b"%d" % len(answer)))
        await context.send(head)
        await context.send({"type": "http.response.body", "body": answer, "more_body": False})

    def report(self, context: RequestContext, sent: HeaderList, body: int) -> Report:
        headers, peer = context.headers, context.scope["client"]
        return Report(
            server=self.server,
            now=self.wall(),
            peer=(peer[0], peer[1]) if peer else None,
            address=context.caller.key,
            through_proxy=context.caller.through_proxy,
            forwarded=text_of(headers, b"x-forwarded-for"),
            host=text_of(headers, b"host"),
            origin=text_of(headers, b"origin"),
            fetch_site=text_of(headers, b"sec-fetch-site"),
            connection=text_of(headers, b"connection"),
            version=context.scope["http_version"],
            scheme=context.scope["scheme"],
            cookies=[pair.split("=")[0].strip() for pair in (text_of(headers, b"cookie") or "").split(";")],
            names_user=self.user_header is not None and self.user_header in headers,
            body=body,
            public_url=self.public_url,
            origins=sorted(origin.decode() for origin in self.edge.origins),
            sent=[(name.decode(), value.decode("latin-1")) for name, value in sent],
        )

    async def refusal(self, context: RequestContext, asked: Asked, body: int) -> None:
        """An error as any of ours, asked for by its status; it is counted as none."""
        status = asked.get("status", "")
        if status not in REFUSALS:
            raise InvalidRequest(f"The status is one of {', '.join(REFUSALS)}.")
        refusal = REFUSALS[status]()
        await context.answer(refusal.status, refusal.body(), refusal.headers())

    # ---- streams ----------------------------------------------------------------------------------------------------

    async def stream(self, context: RequestContext, asked: Asked, body: int) -> None:
        """Events at known times, with a real stream's headers; the first one is the report, the last one `[DONE]`."""
        spec = StreamSpec.of(asked)
        if self.open >= MOST_STREAMS:
            raise Busy
        self.open += 1
        started = time.monotonic()  # not the loop's clock: uvloop's stands still in between, and counts milliseconds
        self.note(spec, "open", 0)
        try:
            state = await self.run(context, spec, started, body)
            self.note(spec, state, time.monotonic() - started)
        finally:
            self.open -= 1

    async def run(self, context: RequestContext, spec: StreamSpec, started: float, body: int) -> State:
        """Writes the stream; returns how it ended."""
        last = b"data: [DONE]\n\n"
        try:
            async with CancelScope(context.receive, self.live):
                head = context.head(200, [*STREAM_HEADERS, *context.limit_headers])
                await context.send(head)
                report = self.report(context, head["headers"], body)
                for number in range(spec.events):
                    await self.wait(started + number * spec.spacing)
                    at = time.monotonic() - started
                    event = encode({"number": number, "at": at, "report": report if number == 0 else None})
                    await context.send(
                        {"type": "http.response.body", "body": b"data: %b\n\n" % event, "more_body": True}
                    )
        except ClientGone:
            return "left"
        except Interruption as interruption:
            last = interruption.event()
        await context.send({"type": "http.response.body", "body": last, "more_body": False})
        return "complete"

    async def wait(self, until: float) -> None:
        """Raises StreamDrained when a drain begins: this stream may end at any time."""
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, LOOK_EVERY))
            if self.is_draining():
                raise StreamDrained

    def note(self, spec: StreamSpec, state: State, at: float) -> None:
        self.departures.pop(spec.name, None)
        self.departures[spec.name] = Departure(state, at)
        while len(self.departures) > REMEMBERED:
            del self.departures[next(iter(self.departures))]

    async def departure(self, context: RequestContext, asked: Asked, body: int) -> None:
        """How a stream ended, and when: in seconds since it began; asked for too early, it waits a little."""
        name, until = asked.get("name", ""), time.monotonic() + DEPARTURE_SECONDS
        while (known := self.departures.get(name, UNKNOWN)).state in ("unknown", "open"):
            if time.monotonic() >= until:
                break
            await asyncio.sleep(DEPARTURE_LOOK)
        await context.answer(200, encode(known), [])


def text_of(headers: Headers, name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")
