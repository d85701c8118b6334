"""What a request leaves behind: plain values that the recorder writes into the log, the metrics and the trace.

Nothing here decides anything. The values are defined on this floor so that the recorder needs nothing from above.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from proxy.errors import Interruption
from proxy.telemetry.metrics import Gaps

if TYPE_CHECKING:
    from proxy.telemetry.traces import Trace

MOST_TOKENS = 1 << 40  # in one answer; an upstream that reports more, or a negative number, has not counted
CLIENT_CLOSED = 499  # nginx's status for a client that left before the response began; appears in the log only

Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class Usage(msgspec.Struct):
    """Tokens of one answer, as the upstream counts them."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0


@dataclass(slots=True)
class Outcome:
    """How one streamed answer ended. Times are of the event loop's clock, in seconds.

    `ending` is a label of chat_proxy_stream_endings_total. `error` is what the last event reported to the client.
    `bug` is an unexpected exception, for the log. `abort_seconds` is the time from the client's disconnect to the
    close of the upstream's socket; None when the client stayed.
    """

    ending: str
    error: Interruption | None = None
    bug: Exception | None = None
    events: int = 0
    bytes: int = 0
    first_at: float | None = None
    gaps: Gaps = field(default_factory=Gaps)
    key_leaked: bool = False
    abort_seconds: float | None = None


class RequestRecord:
    """The values of one request for its log line, metrics and span. Filled while the request is handled.

    `log` holds further fields of the log line: names, numbers and codes only.
    """

    __slots__ = (
        "address",
        "began",
        "code",
        "ending",
        "log",
        "method",
        "reason",
        "request_id",
        "route",
        "started",
        "status",
        "trace",
        "used",
    )

    def __init__(self, *, method: str, route: str | None, request_id: str, address: str) -> None:
        self.method = method
        self.route = route
        self.request_id = request_id
        self.address = address
        self.started = time.monotonic()
        self.status = CLIENT_CLOSED
        self.began = False
        self.code: str | None = None
        self.ending: str | None = None
        self.reason: str | None = None
        self.log: dict[str, Any] = {}
        self.used: Usage | None = None
        self.trace: Trace | None = None
