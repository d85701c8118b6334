"""Traces for OpenTelemetry: one span a request, in the words of its conventions for HTTP and for GenAI.

Rules:
1. A span holds names, numbers and codes, as a log line does: never a prompt, a cookie, a key, an address, a user.
2. No request waits for the collector: ended spans wait in the SDK's bounded queue, a thread of its own sends them. The
   end of the server waits FLUSH_SECONDS at most.
3. All of it is one server's own: nothing global is set but the packages' loggers, and no surrounding context is read.
4. Where spans go, under which name, and how many are kept, the OTEL_* variables say; the SDK reads them itself.
5. opentelemetry is spoken to here and nowhere else, and this room is entered only where traces are switched on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from proxy import __version__, settings

FLUSH_SECONDS = 2.0  # for the last spans to get away, at the end; a collector that is well takes milliseconds
LONGEST_STATE = 512  # characters of a tracestate: as many as everybody has to pass on (W3C Trace Context, 3.3.1.5)
MOST_MEMBERS = 32  # of a tracestate (W3C Trace Context, 3.3.1.1)
SAMPLED_AND_RANDOM = 0x03  # the flags that have a meaning (W3C Trace Context Level 2, 3.2.2.5)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
LIBRARIES = ("opentelemetry", "urllib3")  # loggers of the packages that work here
COMPLAINING = "opentelemetry.exporter.otlp.proto.http.trace_exporter"  # the logger of what did not get through

SILENCE = logging.NullHandler()

# W3C Trace Context, 3.2.2 and 3.3.1.3
PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
MEMBER = re.compile(
    rb"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)

NAMES = {  # of what stands in a request's log, as the conventions have them; ours where they have none
    "model": "gen_ai.request.model",
    "retries": "chat_proxy.retries",
    "events": "chat_proxy.events",
    "bytes": "chat_proxy.bytes",
}
PROVIDERS = {  # names of the conventions, by the host of the upstream
    "api.openai.com": "openai",
    "openai.azure.com": "azure.ai.openai",
    "services.ai.azure.com": "azure.ai.inference",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "amazonaws.com": "aws.bedrock",
    "api.cohere.com": "cohere",
    "api.deepseek.com": "deepseek",
    "api.groq.com": "groq",
    "api.mistral.ai": "mistral_ai",
    "api.perplexity.ai": "perplexity",
    "api.x.ai": "x_ai",
}

Note = Callable[[str | None], None]


class Traces:
    """The spans of one server. Its threads live until `aclose`."""

    def __init__(self, configured: settings.Traces, upstream: str, *, bridge: logging.Handler, note: Note) -> None:
        """`bridge` takes the packages' warnings; `note` is told why spans are lost, and None once they get through.

        Both are called in other threads. Raises whatever OpenTelemetry does when it cannot use a variable.
        """
        self.propagate = configured.propagate
        provider = provider_of(upstream)
        self._about_chats = {"gen_ai.operation.name": "chat"} | ({"gen_ai.provider.name": provider} if provider else {})
        self._bridge = bridge
        for name in LIBRARIES:
            logging.getLogger(name).addHandler(bridge)
        self._exporter = Exporter(note)
        self._provider = TracerProvider(resource=resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("chat-proxy", __version__)

    def begin(self, method: str, route: str | None, traceparent: bytes = b"", tracestate: bytes = b"") -> Trace:
        """The span of one request; `traceparent` and `tracestate` are those of whoever may be believed."""
        method = method if method in METHODS else "_OTHER"
        attributes = {"http.request.method": method}
        if route:
            attributes["http.route"] = route
        name = f"{method} {route}" if route else method
        span = self._tracer.start_span(name, within(traceparent, tracestate), SpanKind.SERVER, attributes)
        return Trace(span, self._about_chats, traceparent_of(span.get_span_context()) if self.propagate else None)

    async def aclose(self) -> None:
        """Sends what waits, as long as that takes no more than FLUSH_SECONDS.

        What hangs then, hangs in threads that hold up no exit.
        """
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # its loop is closed already
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="chat-proxy-traces", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await done.wait()
        self._leave_loggers()

    def _leave_loggers(self) -> None:
        """In silence: what a thread still says after the end would go to stderr, with all that it quotes."""
        for name in LIBRARIES:
            library = logging.getLogger(name)
            library.removeHandler(self._bridge)
            library.addHandler(SILENCE)
        self._exporter.leave_logger()


class Trace:
    """One request's span."""

    __slots__ = ("_about_chats", "_span", "traceparent")

    def __init__(self, span: Span, about_chats: Mapping[str, str], traceparent: bytes | None) -> None:
        self._span = span
        self._about_chats = about_chats
        self.traceparent = traceparent  # for the upstream, where it is to know

    def end(
        self,
        *,
        request_id: str,
        status: int | None,
        code: str | None,
        ending: str | None,
        tokens: tuple[int, int] | None,
        log: Mapping[str, Any],
    ) -> None:
        """`status` is None when nothing was answered; `tokens` are those of prompt and answer."""
        span = self._span
        if not span.is_recording():
            return
        found: dict[str, str | int | float] = {NAMES[name]: log[name] for name in NAMES if name in log}
        found["chat_proxy.request_id"] = request_id
        if status is not None:
            found["http.response.status_code"] = status
        if ending is not None:
            found["chat_proxy.ending"] = ending
        if "model" in log:
            span.update_name(f"chat {log['model']}")
            found.update(self._about_chats)
        if "ttft_ms" in log:
            found["gen_ai.response.time_to_first_chunk"] = log["ttft_ms"] / 1000
        if tokens is not None:
            found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"] = tokens
        wrong = code or ("error" if ending == "error" else None)
        if wrong is not None:
            found["error.type"] = wrong
        span.set_attributes(found)
        if has_failed(status, wrong):
            span.set_status(StatusCode.ERROR)
        span.end()


def has_failed(status: int | None, wrong: str | None) -> bool:
    """Is it a fault of this side? A refusal is none; what is wrong beside a good status broke after the head."""
    if status is None:
        return wrong is not None
    return status >= 500 or (status < 400 and wrong is not None)


# ---- the parent ----------------------------------------------------------------------------------------------------

NOWHERE = Context()


def within(traceparent: bytes, tracestate: bytes) -> Context:
    """The context of a span with this parent; without a valid one, that of a new trace."""
    parent = parent_of(traceparent, tracestate)
    return set_span_in_context(NonRecordingSpan(parent), NOWHERE) if parent else NOWHERE


def parent_of(traceparent: bytes, tracestate: bytes) -> SpanContext | None:
    """W3C Trace Context, 3.2 and 4.3: of a later version what this one knows is read, what is invalid is as absent."""
    if not (matched := PARENT.fullmatch(traceparent)):
        return None
    version, trace_id, span_id, flags, more = matched.groups()
    if version == b"ff" or (version == b"00" and more):
        return None
    parent = SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16) & SAMPLED_AND_RANDOM),
        trace_state=state_of(tracestate),
    )
    return parent if parent.is_valid else None


def state_of(tracestate: bytes) -> TraceState:
    """Checked before the SDK does, which has a line in the log for each that is wrong."""
    members = [member for part in tracestate.split(b",") if (member := part.strip(b" \t"))]
    if len(tracestate) > LONGEST_STATE or len(members) > MOST_MEMBERS or not all(map(MEMBER.fullmatch, members)):
        return TraceState()
    return TraceState.from_header([member.decode() for member in members])


def traceparent_of(context: SpanContext) -> bytes | None:
    """None of a span that is none: OTEL_SDK_DISABLED is set."""
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}".encode()


# ---- the way out ---------------------------------------------------------------------------------------------------


class Exporter(SpanExporter):
    """The SDK's for OTLP over HTTP. Tells once that spans are lost, and once that they get through again."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._lost = False
        self._ear = Ear()
        self._inner = OTLPSpanExporter()
        complaining = logging.getLogger(COMPLAINING)
        complaining.addHandler(self._ear)
        complaining.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._ear.listen()
        result = self._inner.export(spans)
        lost = result is not SpanExportResult.SUCCESS
        if lost != self._lost:
            self._lost = lost
            self._note(self._ear.heard if lost else None)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)

    def leave_logger(self) -> None:
        complaining = logging.getLogger(COMPLAINING)
        complaining.removeHandler(self._ear)
        complaining.addHandler(SILENCE)


class Ear(logging.Handler):
    """Hears why the export of this thread fails: a status or a kind of error, not the texts, which quote addresses."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._thread = 0
        self.heard = ""

    def listen(self) -> None:
        self._thread, self.heard = threading.get_ident(), "not taken in time"

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self._thread or not isinstance(record.args, tuple):
            return
        for argument in record.args:
            if isinstance(argument, int):
                self.heard = f"status {argument}"
            elif isinstance(argument, BaseException):
                self.heard = type(argument).__name__


def resource() -> Resource:
    """Who makes the spans: what the variables say, else this program."""
    return Resource.create(
        {"service.name": "chat-proxy", "service.version": __version__, **OTELResourceDetector().detect().attributes}
    )


def provider_of(upstream: str) -> str | None:
    """The conventions' name for whoever answers there, if it has one."""
    host = urlsplit(upstream).hostname or ""
    return next((name for known, name in PROVIDERS.items() if f".{host}".endswith(f".{known}")), None)
