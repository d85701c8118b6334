"""Traces: what a collector gets, of which requests, under whose trace; and that nobody waits for it.

The collector is a real receiver of OTLP over HTTP on loopback. What a server has to send it has sent when it has ended,
so the tests look at it then.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from support.commands import chat as chat_with
from support.commands import run, serving, settings_for
from support.harness import (
    DONE,
    GOOD,
    Peer,
    Reply,
    Running,
    ScriptedUpstream,
    chat,
    delta,
    eventually,
    finish,
    free_port,
    pieces,
    random_key,
    raw_chat,
    read_until,
    reset,
    running,
    send,
    streaming,
)
from support.stage import always

from proxy import __version__
from proxy.telemetry import traces

ON = {"TRACES_ENABLED": "true"}
PASSED_ON = {**ON, "TRACES_PROPAGATE": "true"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"
OURS = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
UNSET, ERROR = 0, 2  # statuses of a span
BOUND = 8.0  # seconds for a server to end whose collector does not answer: it waits for two, and the machine is shared


# ---- the collector -------------------------------------------------------------------------------------------------


class Collector:
    """Takes all traces on a port of its own, decoded, with every byte that came."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.heads: list[tuple[str, dict[str, str]]] = []  # path, headers
        self.bytes = b""
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.take(self)

            def log_message(self, format: str, *args: object) -> None:
                """Not to stderr."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        self.bytes += str(handler.headers).encode() + body
        if self.status == 200:
            self.heads.append((handler.path, {name.lower(): value for name, value in handler.headers.items()}))
            self.requests.append(ExportTraceServiceRequest.FromString(body))
        handler.send_response(self.status)
        handler.send_header("content-length", "0")
        handler.end_headers()

    def __enter__(self) -> Collector:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in tuple(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def span(self) -> Span:
        (span,) = self.spans
        return span

    @property
    def resource(self) -> dict[str, Any]:
        return plain(self.requests[0].resource_spans[0].resource.attributes)


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes of the protocol as a dict."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@pytest.fixture(autouse=True)
def without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the OTEL variables of the developer's own environment."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """The one that the variables name."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector


def ask(proxy: Running, **headers: str) -> Reply:
    return chat(proxy, headers=headers)


# ---- what a span holds ---------------------------------------------------------------------------------------------


def test_a_stream_is_a_span(collector: Collector) -> None:
    """One span for one stream: named for its model, with the conventions' attributes and true times."""
    before = time.time_ns()
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, **ON) as proxy:
        reply = ask(proxy)
        line = proxy.line()
    span = collector.span
    assert span.name == "chat m"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.parent_span_id == b""
    assert span.status.code == UNSET
    assert before <= span.start_time_unix_nano < span.end_time_unix_nano <= time.time_ns()
    assert plain(span.attributes) == {
        "http.request.method": "POST",
        "http.route": "/api/chat",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "gen_ai.response.time_to_first_chunk": pytest.approx(line["ttft_ms"] / 1000),
        "gen_ai.usage.input_tokens": line["tokens"] - line["events"],
        "gen_ai.usage.output_tokens": line["events"],
        "chat_proxy.request_id": reply.headers["x-request-id"],
        "chat_proxy.ending": "complete",
        "chat_proxy.events": line["events"],
        "chat_proxy.bytes": len(reply.body),
        "chat_proxy.retries": 0,
    }
    (head,) = collector.heads
    assert head[0] == "/v1/traces"
    assert head[1]["content-type"] == "application/x-protobuf"
    assert collector.resource.items() >= {"service.name": "chat-proxy", "service.version": __version__}.items()


async def cuts(peer: Peer) -> None:
    await peer.head()
    await peer.chunk(delta("a"))
    peer.reset()


async def breaks(peer: Peer) -> None:
    await peer.sse(delta("a"), b'data: {"error": {"message": "no more"}}\n\n')


async def answers_whole(peer: Peer) -> None:
    usage = {"prompt_tokens": 11, "completion_tokens": 7}
    await peer.whole(json.dumps({"choices": [{"message": {"content": "hello"}}], "usage": usage}).encode())


async def is_broken(peer: Peer) -> None:
    await peer.whole(b"{}", "500 Internal Server Error")


async def goes_on(peer: Peer) -> None:
    await peer.head()
    await peer.chunk(delta("a"))
    await peer.gone()


async def is_silent(peer: Peer) -> None:
    await peer.gone()


async def ends_well(peer: Peer) -> None:
    await peer.sse(*GOOD)


def ask_whole(proxy: Running) -> None:
    assert chat(proxy, stream=False).status == 200


def leave_amid(proxy: Running) -> None:
    sock = raw_chat(proxy)
    read_until(sock, delta("a"))
    reset(sock)


def leave_before(proxy: Running) -> None:
    sock = raw_chat(proxy)
    eventually(lambda: proxy.upstream_sockets)
    reset(sock)


def get(path: str) -> Callable[[Running], Reply]:
    return lambda proxy: send(proxy, "GET", path)


@dataclass(frozen=True)
class Case:
    """How the newest span of a server looks; an attribute given as None is not in it."""

    answer: Callable[[Peer], Any]
    act: Callable[[Running], object]
    name: str
    status: int
    attributes: dict[str, Any]
    settings: dict[str, str]


def case(
    answer: Callable[[Peer], Any],
    act: Callable[[Running], object],
    name: str = "chat m",
    status: int = UNSET,
    /,
    settings: dict[str, str] | None = None,
    **attributes: Any,
) -> Case:
    names = {
        "http_status": "http.response.status_code",
        "error": "error.type",
        "ending": "chat_proxy.ending",
        "model": "gen_ai.request.model",
        "operation": "gen_ai.operation.name",
        "tokens_in": "gen_ai.usage.input_tokens",
        "tokens_out": "gen_ai.usage.output_tokens",
        "first": "gen_ai.response.time_to_first_chunk",
        "route": "http.route",
        "method": "http.request.method",
    }
    return Case(answer, act, name, status, {names[key]: value for key, value in attributes.items()}, settings or {})


def twice(proxy: Running) -> None:
    ask(proxy)
    assert ask(proxy).status == 429


CASES: dict[str, Case] = {
    "cut by the upstream": case(
        cuts, ask, "chat m", ERROR, http_status=200, ending="truncated", error="stream_interrupted", tokens_out=1
    ),
    "an error of the upstream's": case(breaks, ask, "chat m", ERROR, http_status=200, ending="error", error="error"),
    "silence of the upstream": case(
        goes_on, ask, "chat m", ERROR, http_status=200, ending="timeout", error="stream_timeout",
        settings={"UPSTREAM_IDLE_TIMEOUT": "0.1"},
    ),
    "left amid it": case(goes_on, leave_amid, http_status=200, ending="aborted", error=None, tokens_out=1),
    "left before it": case(is_silent, leave_before, http_status=None, ending="aborted", error=None, first=None),
    "not streamed": case(
        answers_whole, ask_whole, http_status=200, ending=None, tokens_in=11, tokens_out=7, first=None
    ),
    "no answer": case(
        is_broken, ask, "chat m", ERROR, http_status=502, error="upstream_error", ending=None, model="m",
    ),
    "too many requests": case(
        ends_well, twice, "POST /api/chat", http_status=429, error="rate_limited", model=None, operation=None,
        settings={"LIMITS_PER_SESSION": "1/minute"},
    ),
    "not logged in": case(
        ends_well, ask, "POST /api/chat", http_status=401, error="login_required", model=None,
        settings={"SESSION_MODE": "header", "HEADER_NAME": "X-User"},
    ),
    "another route": case(
        ends_well, get("/api/v1/models"), "GET /api/v1/models", http_status=200, error=None, operation=None
    ),
    "no route": case(ends_well, get("/api/of/anything"), "GET", http_status=404, error="not_found", route=None),
    "no method": case(
        ends_well, lambda proxy: send(proxy, "PURGE", "/api/chat"), "_OTHER /api/chat", http_status=405, method="_OTHER"
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", CASES)
def test_each_end_has_its_span(collector: Collector, label: str) -> None:
    """However a request ends, its span says how: an error where the fault is this side's, never for a refusal."""
    wanted = CASES[label]
    with (
        ScriptedUpstream(always(wanted.answer)) as upstream,
        running(upstream.base_url, **ON, **wanted.settings) as proxy,
    ):
        wanted.act(proxy)
        line = proxy.line()
    span = collector.spans[-1]
    found = plain(span.attributes)
    assert span.name == wanted.name
    assert {name: found.get(name) for name in wanted.attributes} == wanted.attributes
    assert span.status.code == wanted.status
    assert found["chat_proxy.request_id"] in {logged["request_id"] for logged in proxy.lines()}
    assert len(collector.spans) == len(proxy.lines()), line


def test_probes_and_files_have_no_span(collector: Collector) -> None:
    """What monitors and browsers fetch all day is no request to trace."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, **ON) as proxy:
        assert [get(path)(proxy).status for path in ("/healthz", "/readyz", "/")] == [200, 200, 200]
        get("/api/v1/models")(proxy)
    assert collector.span.name == "GET /api/v1/models"


def test_retries_are_counted_in_the_span(collector: Collector) -> None:
    """An answer that took a second try is one span, which says so."""
    calls: list[None] = []

    async def busy_at_first(peer: Peer) -> None:
        calls.append(None)
        await (peer.sse(*GOOD) if len(calls) > 1 else peer.whole(b"{}", "503 Busy"))

    with ScriptedUpstream(always(busy_at_first)) as upstream, running(upstream.base_url, **PASSED_ON) as proxy:
        assert ask(proxy).status == 200
        parents = {seen.headers["traceparent"] for seen in upstream.seen}
    assert plain(collector.span.attributes)["chat_proxy.retries"] == 1
    assert len(parents) == 1


# ---- whose trace ---------------------------------------------------------------------------------------------------


def identity(span: Span) -> tuple[str, str]:
    return span.trace_id.hex(), span.parent_span_id.hex()


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "anybody"])
def test_a_trace_is_continued_for_trusted_proxies(collector: Collector, trusted: bool) -> None:
    """A span joins the trace that a trusted proxy names, with its state; other peers' names start a new trace."""
    believed = {"SERVER_TRUSTED_PROXIES": "127.0.0.1" if trusted else "10.0.0.0/8"}
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, **ON, **believed) as proxy:
        ask(proxy, traceparent=GIVEN, tracestate="vendor=1, other@me=x")
    span = collector.span
    assert (identity(span) == (TRACE, PARENT)) is trusted
    assert span.trace_state == ("vendor=1,other@me=x" if trusted else "")
    assert trusted or span.parent_span_id == b""


PARENTS: dict[str, tuple[bytes, bool]] = {
    "as it should be": (GIVEN.encode(), True),
    "not sampled": (f"00-{TRACE}-{PARENT}-00".encode(), True),
    "flags of later": (f"00-{TRACE}-{PARENT}-ff".encode(), True),
    "a later version": (f"01-{TRACE}-{PARENT}-01".encode(), True),
    "a later version with more": (f"01-{TRACE}-{PARENT}-01-what-comes".encode(), True),
    "nothing": (b"", False),
    "more than this version has": (f"00-{TRACE}-{PARENT}-01-more".encode(), False),
    "a later version that goes on": (f"01-{TRACE}-{PARENT}-01.more".encode(), False),
    "a version that there is not": (f"ff-{TRACE}-{PARENT}-01".encode(), False),
    "no trace": (f"00-{'0' * 32}-{PARENT}-01".encode(), False),
    "no parent": (f"00-{TRACE}-{'0' * 16}-01".encode(), False),
    "capitals": (f"00-{TRACE.upper()}-{PARENT}-01".encode(), False),
    "too short": (f"00-{TRACE[1:]}-{PARENT}-01".encode(), False),
    "too long": (f"00-{TRACE}0-{PARENT}-01".encode(), False),
    "two of them": (f"{GIVEN}, {GIVEN}".encode(), False),
    "blanks": (f" {GIVEN}".encode(), False),
    "no flags": (f"00-{TRACE}-{PARENT}".encode(), False),
    "bytes": (b"\xff" * 55, False),
    "32 KiB": (b"0" * 32768, False),
}


@pytest.mark.parametrize("label", PARENTS)
def test_a_parent_is_read_by_its_shape(label: str) -> None:
    """W3C Trace Context, 3.2 and 4.3: what is invalid is as if it were not there."""
    written, valid = PARENTS[label]
    found = traces.parent_of(written, b"")
    assert (found is not None) is valid
    if found is not None:
        assert (f"{found.trace_id:032x}", f"{found.span_id:016x}", found.is_remote) == (TRACE, PARENT, True)


STATES: dict[str, tuple[bytes, str]] = {
    "one": (b"a=1", "a=1"),
    "several": (b"a=1,b=2", "a=1,b=2"),
    "blanks and gaps": (b" a=1 ,, \tb=2", "a=1,b=2"),
    "as many as may be": (b",".join(b"k%d=1" % i for i in range(32)), ",".join(f"k{i}=1" for i in range(32))),
    "one too many": (b",".join(b"k%d=1" % i for i in range(33)), ""),
    "longest": (b"a=" + b"x" * 256 + b",b=" + b"x" * 251, "a=" + "x" * 256 + ",b=" + "x" * 251),
    "too long": (b"a=" + b"x" * 256 + b",b=" + b"x" * 252, ""),
    "twice": (b"a=1,a=2", ""),
    "no value": (b"a", ""),
    "capitals": (b"A=1", ""),
    "bytes": (b"a=\xff", ""),
    "a break of line": (b"a=1\r\nb=2", ""),
}


@pytest.mark.parametrize("label", STATES)
def test_a_state_is_bounded(label: str, caplog: pytest.LogCaptureFixture) -> None:
    """A tracestate passes whole or not at all, with its trace either way, and never says a word in the log."""
    written, wanted = STATES[label]
    found = traces.parent_of(GIVEN.encode(), written)
    assert found is not None
    assert found.trace_state.to_header() == wanted
    assert not caplog.records


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_the_upstream_hears_of_our_span_when_configured(collector: Collector, stream: bool) -> None:
    """With traces.propagate the upstream's request carries our span as its parent, and nothing else of the trace."""
    answer = ends_well if stream else answers_whole
    with ScriptedUpstream(always(answer)) as upstream, running(upstream.base_url, **PASSED_ON) as proxy:
        chat(proxy, stream=stream, headers={"traceparent": GIVEN, "tracestate": "vendor=1", "baggage": "who=me"})
    heard = upstream.seen[0].headers
    span = collector.span
    assert heard["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert not heard.keys() & {"tracestate", "baggage"}


@pytest.mark.parametrize("settings", [{}, ON], ids=["traces off", "traces on"])
def test_the_upstream_hears_of_no_trace_by_default(collector: Collector, settings: dict[str, str]) -> None:
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, **settings) as proxy:
        ask(proxy, traceparent=GIVEN, tracestate="vendor=1")
    assert not upstream.seen[0].headers.keys() & {"traceparent", "tracestate", "baggage"}
    assert len(collector.spans) == len(settings)


def test_who_is_not_sampled_is_not_sent(collector: Collector) -> None:
    """The parent decides: its trace goes on to the upstream as not sampled, and no span of it is sent."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, **PASSED_ON) as proxy:
        ask(proxy, traceparent=f"00-{TRACE}-{PARENT}-00")
    matched = OURS.fullmatch(upstream.seen[0].headers["traceparent"])
    assert matched is not None
    assert matched[1] == TRACE
    assert matched[2] != PARENT
    assert matched[3] == "00"
    assert not collector.spans


def test_the_standard_variables_are_heeded(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, sampler, headers and their like are what the OTEL_* variables say."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-of-ours")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=abc")
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, **ON) as proxy:
        ask(proxy)
        ask(proxy, traceparent=GIVEN)
    assert identity(collector.span) == (TRACE, PARENT)
    assert collector.resource["service.name"] == "chat-of-ours"
    assert collector.resource["deployment.environment.name"] == "test"
    assert collector.heads[0][1]["api-key"] == "abc"


def test_a_disabled_sdk_is_none(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, **PASSED_ON) as proxy:
        assert ask(proxy).status == 200
    assert "traceparent" not in upstream.seen[0].headers
    assert not collector.spans


def test_two_servers_of_one_process_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sends its own spans to its own collector, and its end is not the other's."""
    with Collector() as first, Collector() as second, ScriptedUpstream(streaming(*GOOD)) as upstream:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", first.url)
        with running(upstream.base_url, **ON) as one:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", second.url)
            with running(upstream.base_url, **ON) as other:
                ask(other)
                ask(one)
            ask(one)
        assert (len(first.spans), len(second.spans)) == (2, 1)


PROVIDERS = {
    "https://api.openai.com/v1": "openai",
    "https://me.openai.azure.com/openai/v1": "azure.ai.openai",
    "https://api.mistral.ai/v1": "mistral_ai",
    "https://notapi.openai.com.example.org/v1": None,
    "https://fakeapi.openai.com/v1": None,
    "http://127.0.0.1:9000/v1": None,
}


@pytest.mark.parametrize("url", PROVIDERS)
def test_providers_have_the_conventions_names(url: str) -> None:
    assert traces.provider_of(url) == PROVIDERS[url]


# ---- no request waits, nothing leaks ------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def one_that_hangs() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("collecting", [nobody, one_that_hangs])
def test_a_collector_that_does_not_answer_holds_up_nothing(
    collecting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests go on, with a queue that is full, too; the server ends within its bound, whatever is left to send."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    monkeypatch.setattr(traces, "FLUSH_SECONDS", 0.3)
    with collecting() as url, ScriptedUpstream(streaming(*GOOD)) as upstream:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with running(upstream.base_url, **ON) as proxy:
            assert [ask(proxy).body for _ in range(20)] == [b"".join(GOOD)] * 20
            proxy.line(20)
            slowest = max(line["duration_ms"] for line in proxy.lines())
            ending = time.monotonic()
        took = time.monotonic() - ending
    assert slowest < 5000  # one that waited would have waited for an export, which has ten seconds
    assert 0.3 <= took < BOUND


def test_lost_spans_are_told_once(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line when they do not get through, with the status and no text of the collector's; one when they do again."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    collector.status = 401
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, **ON) as proxy:
        for _ in range(2):
            tried = len(collector.bytes)
            ask(proxy)
            eventually(lambda: len(collector.bytes) > tried)  # noqa: B023  # called at once
        eventually(lambda: proxy.lines("traces_unavailable"))
        collector.status = 200
        ask(proxy)
        eventually(lambda: proxy.lines("traces_available"))
        ask(proxy)
    (lost,) = proxy.lines("traces_unavailable")
    assert (lost["level"], lost["reason"]) == ("warning", "status 401")
    assert len(proxy.lines("traces_available")) == 1
    assert not proxy.lines("library")


def test_no_secret_reaches_a_collector(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece of the key, no prompt, no answer, no cookie, no user, no address: in no byte that is sent."""
    words = {name: secrets.token_hex(8) for name in ("prompt", "answer", "user", "session", "query")}
    header = {"SESSION_MODE": "header", "HEADER_NAME": "X-User", "SERVER_PUBLIC_URL": "http://localhost"}

    async def answer(peer: Peer) -> None:
        assert peer.seen is not None
        broken = words["prompt"] not in peer.seen.body.decode()
        await (cuts(peer) if broken else peer.sse(delta(words["answer"]), finish(), DONE))

    with ScriptedUpstream(always(answer)) as upstream, running(upstream.base_url, **PASSED_ON, **header) as proxy:
        who = {"x-user": words["user"], "x-forwarded-for": "203.0.113.77", "host": "localhost"}
        reply = chat(proxy, headers=who, messages=[{"role": "user", "content": words["prompt"]}])
        assert words["answer"].encode() in reply.body
        chat(proxy, headers={**who, "cookie": f"session={words['session']}"})
        chat(proxy, stream=False, headers=who, model=words["prompt"])
        send(proxy, "GET", f"/api/session?{words['query']}", headers=who)
        send(proxy, "GET", f"/api/{words['query']}", headers=who)
        cookie = reply.cookie.partition("=")[2]
    assert len(collector.spans) == 5
    for forbidden in [*words.values(), *pieces(proxy.key), cookie, "203.0.113"]:
        assert forbidden
        assert forbidden.encode() not in collector.bytes


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_server_that_ends_sends_what_it_has(tmp_path: Path, collector: Collector) -> None:
    """`serve`: the span is not due yet when the signal comes, and gets there; nothing is on stderr, and it exits 0."""
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        serving(tmp_path, upstream.base_url, TRACES_ENABLED="true", TRACES_PROPAGATE="true") as process,
    ):
        chat_with(process)
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0
        assert process.stderr.read_bytes() == b""
    assert upstream.seen[0].headers["traceparent"].split("-")[2] == collector.span.span_id.hex()


@pytest.mark.process
def test_a_server_ends_without_its_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` with a span that no collector takes ends within its bound, exits 0 and writes nothing to stderr."""
    with one_that_hangs() as url, ScriptedUpstream(streaming(*GOOD)) as upstream:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with serving(tmp_path, upstream.base_url, TRACES_ENABLED="true") as process:
            chat_with(process)
            process.tell(signal.SIGTERM)
            began = time.monotonic()
            assert process.exit_code() == 0
            assert time.monotonic() - began < BOUND
            assert process.stderr.read_bytes() == b""


@pytest.mark.process
def test_the_collectors_key_stays_out_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the packages complain of, here a header and an export, is told without the texts that quote it."""
    key = random_key()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"api-key={key},no header {key}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1.5")
    with nobody() as url, ScriptedUpstream(streaming(*GOOD)) as upstream:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"{url}/{key}")
        with serving(tmp_path, upstream.base_url, TRACES_ENABLED="true") as process:
            chat_with(process)
            eventually(lambda: "traces_unavailable" in process.printed())
            process.tell(signal.SIGTERM)
            assert process.exit_code() == 0
            logged = process.logged()
            assert process.stderr.read_bytes() == b""
            assert not [piece for piece in pieces(key) if piece in process.printed()]
    assert [line["reason"] for line in logged if line["event"] == "traces_unavailable"] == ["ConnectionError"]
    assert [line["logger"] for line in logged if line["event"] == "library"] == ["opentelemetry.util.re"]


@pytest.mark.process
def test_variables_that_are_refused_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 2, with the variable's name and not its value."""
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "sk-mistaken")
    done = run(tmp_path, "serve", **settings_for("http://127.0.0.1:9/v1"), SERVER_PORT="0", **ON)
    assert done.returncode == 2
    assert "traces.enabled (from environment): OpenTelemetry cannot use" in done.stderr
    assert "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT" in done.stderr
    assert "sk-mistaken" not in done.stdout + done.stderr


@pytest.mark.process
def test_without_traces_nothing_of_theirs_is_loaded(tmp_path: Path) -> None:
    """Switched off they cost nothing: no package of theirs is imported by a server that has answered."""
    names = [sys.executable, "-X", "importtime", "-m", "proxy"]
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        serving(tmp_path, upstream.base_url, command=names) as process,
        closing(process.connect()),
    ):
        chat_with(process)
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0
    imported = process.stderr.read_text()
    assert "starlette" in imported
    assert not re.search(r"opentelemetry|urllib3|google|proxy\.traces", imported)
