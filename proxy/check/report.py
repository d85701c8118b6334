"""The values of one run of `check --url`: what it observed, and the reports in which the server answers.

Values that both ends speak, and no opinions: `diagnosis` writes the reports, `checkup` reads them and notes what
arrived, `findings` judges.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import msgspec

HEADER = "x-chat-proxy-check"  # bears the ticket (ticket.py)
CHAT = ("/api/chat", "/api/v1/chat/completions")  # where chats happen
LOOK = "/api/check/look"  # the diagnostic route beside them
SPOOF = "203.0.113.77"  # RFC 5737: an address for documentation
FOREIGN = "https://elsewhere.invalid"


class Report(msgspec.Struct, frozen=True):
    """One request as the server received it, and the headers that it sent with its answer."""

    server: str
    now: float
    peer: tuple[str, int] | None
    address: str
    through_proxy: bool
    forwarded: str | None
    host: str | None
    origin: str | None
    fetch_site: str | None
    connection: str | None
    version: str
    scheme: str
    cookies: list[str]
    names_user: bool
    body: int
    public_url: str
    origins: list[str]
    sent: list[tuple[str, str]]

    @property
    def request_id(self) -> str:
        return dict(self.sent)["x-request-id"]

    @property
    def cookies_sent(self) -> list[str]:
        return [value for name, value in self.sent if name == "set-cookie"]


State = Literal["unknown", "open", "complete", "left"]
STATES: tuple[State, ...] = (
    "unknown",
    "open",
    "complete",
    "left",
)  # of several answers the last one in this order counts


class Departure(msgspec.Struct, frozen=True):
    """How a stream ended, and when: in seconds since it began."""

    state: State
    at: float


decode_report = msgspec.json.Decoder(Report).decode


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it arrived; status 0 and a `broke` when there was none. Header names are in lower case."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    cookies: tuple[str, ...] = ()
    body: bytes = b""
    broke: str = ""

    @property
    def report(self) -> Report | None:
        try:
            return decode_report(self.body)
        except msgspec.MsgspecError:
            return None

    @property
    def code(self) -> str | None:
        """The code of an error in our shape; None for everything else."""
        try:
            code = json.loads(self.body)["error"]["code"]
        except (ValueError, TypeError, KeyError):
            return None
        return code if isinstance(code, str) else None

    @property
    def shown(self) -> str:
        kind = self.headers.get("content-type", "no content-type").partition(";")[0]
        return f"{self.status} {kind}" if self.status else self.broke


@dataclass(frozen=True, slots=True)
class Streamed:
    """A stream as it arrived: its events' times at the server and here (each in seconds of a clock of its own)."""

    answer: Answer
    report: Report | None = None
    sent: tuple[float, ...] = ()
    arrived: tuple[float, ...] = ()
    ended: bool = False
    lasted: float = 0.0


@dataclass(frozen=True, slots=True)
class AbortResult:
    """A stream that was left in a silence: how it ended over there, and after how many seconds."""

    state: State
    seconds: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """Unix seconds."""

    not_before: float
    not_after: float


@dataclass(frozen=True, slots=True)
class Observed:
    """All that one run saw, at the chat's address unless named otherwise.

    `ours` is the near end of the plain echo's socket, `now` the middle of that exchange.
    """

    url: str
    now: float
    ours: tuple[str, int] | None
    certificate: Certificate | None
    offers_h2: bool | None
    plain: Answer
    twice: tuple[Answer, Answer]  # to the same GET, beside the chat
    spoofed: Answer
    with_cookie: Answer
    returned: Answer
    session: Answer
    foreign: Answer
    page: Answer
    whole_body: Answer
    body_bytes: int
    refusals: dict[str, Answer]  # by the code that each has to have
    streams: dict[str, Streamed]  # by address
    left: AbortResult
    longest_answer: float  # seconds
    silence: Streamed | None = None
    silence_seconds: float = 0.0
