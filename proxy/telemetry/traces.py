"""Traces for OpenTelemetry: one span a request, named by its semantic conventions for HTTP and GenAI.

Rules:
1. A span holds names, numbers and codes, as a log line does: never a prompt, a cookie, a key, an address, a user.
2. No request waits for the collector: ended spans wait in the SDK's bounded queue, and a thread of the SDK sends them.
   The server's shutdown waits at most FLUSH_SECONDS.
3. All state belongs to one server: only the packages' loggers are global, and no surrounding context is read.
4. The OTEL_* variables set where spans go, under which name, and how many are kept; the SDK reads them itself.
5. Only this module imports opentelemetry, and it is imported only where traces are enabled.
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

FLUSH_SECONDS = 2.0  # for the last spans at shutdown; a working collector takes milliseconds
LONGEST_STATE = 512  # characters of a tracestate that must be propagated (W3C Trace Context, 3.3.1.5)
MOST_MEMBERS = 32  # of a tracestate (W3C Trace Context, 3.3.1.1)
SAMPLED_AND_RANDOM = 0x03  # the flags that have a meaning (W3C Trace Context Level 2, 3.2.2.5)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
LIBRARIES = ("opentelemetry", "urllib3")  # loggers of the packages in use
EXPORT_ERRORS = "opentelemetry.exporter.otlp.proto.http.trace_exporter"  # logs failed exports

SILENCE = logging.NullHandler()

# W3C Trace Context, 3.2.2 and 3.3.1.3
PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
MEMBER = re.compile(
    rb"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)

NAMES = {  # log field -> attribute of the conventions, or ours where they define none
    "model": "gen_ai.request.model",
    "retries": "chat_proxy.retries",
    "events": "chat_proxy.events",
    "bytes": "chat_proxy.bytes",
}
PROVIDERS = {  # host of the upstream -> name in the conventions
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
        """`bridge` logs the packages' warnings; `note` gets the reason why spans are lost, and None once they arrive.

        Both are called in other threads. Raises the errors of OpenTelemetry for variables that it cannot use.
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
        """Starts the span of one request; `traceparent` and `tracestate` come from a trusted proxy."""
        method = method if method in METHODS else "_OTHER"
        attributes = {"http.request.method": method}
        if route:
            attributes["http.route"] = route
        name = f"{method} {route}" if route else method
        span = self._tracer.start_span(name, context_of(traceparent, tracestate), SpanKind.SERVER, attributes)
        return Trace(span, self._about_chats, traceparent_of(span.get_span_context()) if self.propagate else None)

    async def aclose(self) -> None:
        """Sends the spans that wait, for at most FLUSH_SECONDS.

        An export that hangs longer hangs in a daemon thread, which does not block the exit.
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
        """Silences the loggers: a message of a thread after the end would go to stderr, with addresses in it."""
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
        self.traceparent = traceparent  # for the upstream, where traces.propagate is on

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
        """`status` is None when there was no response; `tokens` are those of prompt and answer."""
        span = self._span
        if not span.is_recording():
            return
        attributes: dict[str, str | int | float] = {NAMES[name]: log[name] for name in NAMES if name in log}
        attributes["chat_proxy.request_id"] = request_id
        if status is not None:
            attributes["http.response.status_code"] = status
        if ending is not None:
            attributes["chat_proxy.ending"] = ending
        if "model" in log:
            span.update_name(f"chat {log['model']}")
            attributes.update(self._about_chats)
        if "ttft_ms" in log:
            attributes["gen_ai.response.time_to_first_chunk"] = log["ttft_ms"] / 1000
        if tokens is not None:
            attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"] = tokens
        wrong = code or ("error" if ending == "error" else None)
        if wrong is not None:
            attributes["error.type"] = wrong
        span.set_attributes(attributes)
        if has_failed(status, wrong):
            span.set_status(StatusCode.ERROR)
        span.end()


def has_failed(status: int | None, wrong: str | None) -> bool:
    """Returns whether the server failed. A refusal is no failure; an error beside a good status came after the head."""
    if status is None:
        return wrong is not None
    return status >= 500 or (status < 400 and wrong is not None)


# ---- the parent ----------------------------------------------------------------------------------------------------

NO_CONTEXT = Context()


def context_of(traceparent: bytes, tracestate: bytes) -> Context:
    """The context of a span with this parent; of a new trace when the parent is not valid."""
    parent = parent_of(traceparent, tracestate)
    return set_span_in_context(NonRecordingSpan(parent), NO_CONTEXT) if parent else NO_CONTEXT


def parent_of(traceparent: bytes, tracestate: bytes) -> SpanContext | None:
    """Parses a parent (W3C Trace Context, 3.2 and 4.3): of a later version the known part; invalid ones are ignored."""
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
    """Parses a tracestate; checked first, since the SDK logs a warning for each invalid member."""
    members = [member for part in tracestate.split(b",") if (member := part.strip(b" \t"))]
    if len(tracestate) > LONGEST_STATE or len(members) > MOST_MEMBERS or not all(map(MEMBER.fullmatch, members)):
        return TraceState()
    return TraceState.from_header([member.decode() for member in members])


def traceparent_of(context: SpanContext) -> bytes | None:
    """The header for the upstream; None when OTEL_SDK_DISABLED is set."""
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}".encode()


# ---- the exporter --------------------------------------------------------------------------------------------------


class Exporter(SpanExporter):
    """The SDK's exporter for OTLP over HTTP; reports once that spans are lost, and once that they arrive again."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._lost = False
        self._reason = FailureReason()
        self._inner = OTLPSpanExporter()
        export_errors = logging.getLogger(EXPORT_ERRORS)
        export_errors.addHandler(self._reason)
        export_errors.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._reason.start()
        result = self._inner.export(spans)
        lost = result is not SpanExportResult.SUCCESS
        if lost != self._lost:
            self._lost = lost
            self._note(self._reason.text if lost else None)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)

    def leave_logger(self) -> None:
        export_errors = logging.getLogger(EXPORT_ERRORS)
        export_errors.removeHandler(self._reason)
        export_errors.addHandler(SILENCE)


class FailureReason(logging.Handler):
    """Why an export of this thread failed: a status or an error's type, not its text, which contains addresses."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._thread = 0
        self.text = ""

    def start(self) -> None:
        self._thread, self.text = threading.get_ident(), "not accepted in time"

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self._thread or not isinstance(record.args, tuple):
            return
        for argument in record.args:
            if isinstance(argument, int):
                self.text = f"status {argument}"
            elif isinstance(argument, BaseException):
                self.text = type(argument).__name__


def resource() -> Resource:
    """The service that makes the spans: as the variables name it, else this program."""
    return Resource.create(
        {"service.name": "chat-proxy", "service.version": __version__, **OTELResourceDetector().detect().attributes}
    )


def provider_of(upstream: str) -> str | None:
    """The conventions' name of the upstream's vendor, if there is one."""
    host = urlsplit(upstream).hostname or ""
    return next((name for known, name in PROVIDERS.items() if f".{host}".endswith(f".{known}")), None)
