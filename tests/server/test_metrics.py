"""The metrics: the contract's names, true figures, and labels that no client can add to."""

from __future__ import annotations

import http.client
import inspect
import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.harness import (
    DONE,
    GOOD,
    PATIENCE,
    Peer,
    Running,
    ScriptedUpstream,
    chat,
    delta,
    eventually,
    finish,
    free_port,
    random_key,
    raw_chat,
    read_until,
    running,
    send,
    streaming,
)
from support.stage import Steps

from proxy import errors
from proxy.telemetry.metrics import ENDINGS, GAPS, Gaps, Metrics

CONTRACT: dict[str, tuple[str, frozenset[str]]] = {
    "chat_proxy_requests_total": ("counter", frozenset({"code"})),
    "chat_proxy_streams_active": ("gauge", frozenset()),
    "chat_proxy_time_to_first_token_seconds": ("histogram", frozenset()),
    "chat_proxy_token_gap_seconds": ("histogram", frozenset()),
    "chat_proxy_tokens_per_second": ("histogram", frozenset()),
    "chat_proxy_stream_endings_total": ("counter", frozenset({"ending"})),
    "chat_proxy_abort_seconds": ("histogram", frozenset()),
    "chat_proxy_tokens_total": ("counter", frozenset({"direction", "model"})),
    "chat_proxy_upstream_errors_total": ("counter", frozenset({"code"})),
    "chat_proxy_refusals_total": ("counter", frozenset({"code"})),
    "chat_proxy_retries_total": ("counter", frozenset()),
    "chat_proxy_limit_store_up": ("gauge", frozenset()),
}
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}\n\n'

Series = tuple[str, frozenset[tuple[str, str]]]


def series(exposition: bytes) -> dict[Series, float]:
    """Every sample of a scrape by name and labels."""
    families = text_string_to_metric_families(exposition.decode())
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)  # Prometheus refuses a scrape that says one thing twice
    return found


def scraped(proxy: Running) -> dict[Series, float]:
    return series(proxy.on_loop(proxy.service.app.metrics.exposition))


class Figures:
    """The figures of one moment; a series that is not there is 0."""

    def __init__(self, proxy: Running) -> None:
        self.found = scraped(proxy)

    def __call__(self, name: str, **labels: str) -> float:
        return self.found.get((f"chat_proxy_{name}", frozenset(labels.items())), 0.0)

    def all(self, name: str) -> dict[str, float]:
        """A counter's series by the value of its one label; those at 0 left out."""
        named = {labels: value for (full, labels), value in self.found.items() if full == f"chat_proxy_{name}"}
        return {next(iter(labels))[1]: value for labels, value in named.items() if value}


# ---- names --------------------------------------------------------------------------------------------------------


def declared(exposition: bytes) -> dict[str, str]:
    """Name and type of every metric of a scrape, as its TYPE lines say."""
    lines = [line.split() for line in exposition.decode().splitlines() if line.startswith("# TYPE ")]
    return {name: kind for _, _, name, kind in lines}


def test_every_name_of_the_contract() -> None:
    """A server that has done nothing yet shows every metric of the contract with its type, and no other."""
    exposition = Metrics(("m",)).exposition()
    assert declared(exposition) == {name: kind for name, (kind, _) in CONTRACT.items()}


def test_every_label_of_the_contract() -> None:
    """Every sample has exactly its metric's labels, `le` of histograms beside them, and every metric has a sample."""
    metrics = Metrics(("m", "other"))
    for counter in (metrics.requests, metrics.upstream_errors, metrics.refusals):
        counter.labels("x").inc()
    seen = set()
    for name, labels in series(metrics.exposition()):
        metric = next(known for known in CONTRACT if name in variants(known))
        bucket = {"le"} if name.endswith("_bucket") else set()
        assert {label for label, _ in labels} == CONTRACT[metric][1] | bucket
        seen.add(metric)
    assert seen == CONTRACT.keys()


def variants(name: str) -> tuple[str, ...]:
    """The names of a metric's samples."""
    return (f"{name}_bucket", f"{name}_count", f"{name}_sum") if CONTRACT[name][0] == "histogram" else (name,)


def test_known_labels_begin_at_zero() -> None:
    """Endings, models and the store are there before anything happened, so that a rate over them is never without
    a beginning."""
    found = series(Metrics(("m", "other")).exposition())
    endings = {dict(labels)["ending"]: value for (name, labels), value in found.items() if "endings" in name}
    assert endings == dict.fromkeys(("complete", "error", "truncated", "aborted", "timeout", "drained"), 0.0)
    assert set(ENDINGS) == endings.keys()
    tokens = {labels: value for (name, labels), value in found.items() if name == "chat_proxy_tokens_total"}
    assert tokens == {
        frozenset({("direction", direction), ("model", model)}): 0.0
        for direction in ("input", "output")
        for model in ("m", "other")
    }
    assert found["chat_proxy_limit_store_up", frozenset()] == 1.0


def test_gaps_fall_into_their_buckets() -> None:
    """A gap is counted in the first bucket whose bound is not below it, and in all above; the sum is true."""
    metrics = Metrics(("m",))
    for times in ((0.005, 0.0051), (0.7, 31.0)):
        gaps = Gaps()
        for gap in times:
            gaps.note(gap)
        metrics.gaps.add(gaps.counts, gaps.total)
    found = series(metrics.exposition())
    buckets = {
        dict(labels)["le"]: value for (name, labels), value in found.items() if name.endswith("gap_seconds_bucket")
    }
    assert [float(bound) for bound in buckets] == [*GAPS, float("inf")]
    expected = [1, *(2,) * 6, *(3,) * 5, 4]  # 0.005 | 0.01 to 0.5 | 1 to 30 | +Inf
    assert list(buckets.values()) == expected
    assert found["chat_proxy_token_gap_seconds_count", frozenset()] == 4
    assert found["chat_proxy_token_gap_seconds_sum", frozenset()] == pytest.approx(31.7101)


# ---- figures ------------------------------------------------------------------------------------------------------


def test_figures_of_one_stream() -> None:
    """A streamed answer counts as one request, one ending, its tokens as the upstream counted them, one time to the
    first token and one gap for each further delivery; while it runs it is active."""
    parts = (delta("a"), delta("b"), finish(), USAGE, DONE)
    steps = Steps(*parts)
    with ScriptedUpstream(steps) as upstream, running(upstream.base_url) as proxy:
        sock = raw_chat(proxy)
        for part in parts:
            steps.allowed.release()
            read_until(sock, part)
            if part is not DONE:
                assert Figures(proxy)("streams_active") == 1
        proxy.line()
        sock.close()
        figures = Figures(proxy)
        assert figures.all("requests_total") == {"200": 1}
        assert figures.all("stream_endings_total") == {"complete": 1}
        assert figures("streams_active") == 0
        assert figures("time_to_first_token_seconds_count") == 1
        assert 0 < figures("time_to_first_token_seconds_sum") < PATIENCE
        assert figures("token_gap_seconds_count") == len(parts) - 1
        assert figures("tokens_per_second_count") == 1
        assert figures("tokens_per_second_sum") > 0
        assert figures("tokens_total", direction="input", model="m") == 11
        assert figures("tokens_total", direction="output", model="m") == 7
        assert figures("tokens_total", direction="output", model="other") == 0
        assert figures("abort_seconds_count") == 0
        assert figures("retries_total") == 0
        assert figures.all("refusals_total") == {}
        assert figures.all("upstream_errors_total") == {}


def test_figures_of_one_abort() -> None:
    """A browser that leaves in mid-stream counts as one request and one abort, with the time that took; not as active,
    not as a refusal."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(delta("a"))
        await peer.gone()

    with ScriptedUpstream(script) as upstream, running(upstream.base_url) as proxy:
        sock = raw_chat(proxy)
        read_until(sock, delta("a"))
        sock.close()
        proxy.line()
        figures = Figures(proxy)
        assert figures.all("requests_total") == {"200": 1}
        assert figures.all("stream_endings_total") == {"aborted": 1}
        assert figures("streams_active") == 0
        assert figures("abort_seconds_count") == 1
        assert figures("abort_seconds_sum") < 1
        assert figures("tokens_total", direction="output", model="m") == 1
        assert figures.all("refusals_total") == {}
        assert figures.all("upstream_errors_total") == {}


def test_figures_of_one_refusal() -> None:
    """A request that is refused counts under its status and its code, and is no stream."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url) as proxy:
        assert chat(proxy, model="gpt-9").error["code"] == "model_not_allowed"
        proxy.line()
        figures = Figures(proxy)
        assert figures.all("requests_total") == {"400": 1}
        assert figures.all("refusals_total") == {"model_not_allowed": 1}
        assert figures.all("stream_endings_total") == {}
        assert figures("time_to_first_token_seconds_count") == 0
        assert upstream.seen == []


def test_figures_of_an_upstream_in_trouble() -> None:
    """What the upstream did wrong counts under our code for it, not as a refusal of ours; retries are counted."""
    answers: Iterator[tuple[str, bytes]] = iter(
        [
            ("503 Service Unavailable", b"{}"),
            ("401 Unauthorized", b"{}"),
            ("400 Bad Request", b'{"error":{"code":"context_length_exceeded","param":"messages"}}'),
        ]
    )

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            status, body = next(answers)
            await peer.whole(body, status, "application/json", "retry-after: 0")

    with ScriptedUpstream(script) as upstream, running(upstream.base_url) as proxy:
        assert chat(proxy).error["code"] == "upstream_auth"
        assert chat(proxy).error["code"] == "context_length_exceeded"
        proxy.line(2)
        figures = Figures(proxy)
        assert figures.all("requests_total") == {"502": 1, "400": 1}
        assert figures.all("upstream_errors_total") == {"upstream_auth": 1, "upstream_rejected": 1}
        assert figures.all("refusals_total") == {}
        assert figures("retries_total") == 1


# ---- labels -------------------------------------------------------------------------------------------------------


def codes() -> set[str]:
    """Every code that our errors know."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return {kind.code for kind in kinds if issubclass(kind, errors.Refusal | errors.Interruption)}


ALLOWED: dict[str, set[str]] = {
    "code": codes() | {str(status.value) for status in HTTPStatus} | {"499"},
    "ending": set(ENDINGS),
    "direction": {"input", "output"},
    "model": {"m", "other"},
}


def hostile_requests(mark: str) -> Iterator[tuple[str, str, dict[str, Any] | None, dict[str, str]]]:
    """Requests with `mark` wherever a client can put something: method, path, body, header, cookie."""
    json_type = {"content-type": "application/json"}
    hello = {"messages": [{"role": "user", "content": mark}], "stream": True}
    yield "POST", "/api/chat", {**hello, "model": mark}, json_type
    yield "POST", "/api/chat", {**hello, mark: mark}, json_type
    yield "POST", "/api/chat", {**hello, "stop": mark, "user": mark}, json_type
    yield "POST", "/api/chat", hello, {"content-type": mark}
    yield "POST", "/api/chat", hello, {**json_type, "origin": f"https://{mark}"}
    yield "POST", "/api/chat", hello, {**json_type, "cookie": f"chat={mark}"}
    yield "POST", "/api/chat", hello, {**json_type, "host": mark}
    yield "POST", "/api/chat", hello, {**json_type, "x-request-id": mark, "user-agent": mark}
    yield "GET", f"/{mark}", None, {}
    yield "GET", f"/api/{mark}?{mark}={mark}", None, {}
    yield "PROPFIND", f"/api/chat/{mark}", None, {}
    yield mark.upper(), "/api/chat", None, {}
    yield "TRACE", "/api/session", None, {}


def test_no_client_adds_a_label() -> None:
    """Whatever clients and the upstream put into names, paths, methods and codes, no series takes it up: all labels
    stay in fixed sets, and a second round of it adds no series to the first."""

    async def script(peer: Peer) -> None:
        while True:
            content = (await peer.request()).json["messages"][0]["content"]
            error = json.dumps({"error": {"code": content.lower(), "param": content.lower()}}).encode()
            await peer.whole(error, "422 Unprocessable Entity")

    def round_of(proxy: Running) -> str:
        mark = f"x{random_key()[-20:].lower()}"
        for method, path, body, headers in hostile_requests(mark):
            send(proxy, method, path, None if body is None else json.dumps(body).encode(), headers)
        return mark

    with ScriptedUpstream(script) as upstream, running(upstream.base_url) as proxy:
        mark = round_of(proxy)
        eventually(lambda: not proxy.left_over())
        first = scraped(proxy)
        round_of(proxy)
        eventually(lambda: not proxy.left_over())
        assert scraped(proxy).keys() == first.keys()
        assert ("chat_proxy_upstream_errors_total", frozenset({("code", "upstream_rejected")})) in first
        for _, labels in first:
            for name, value in labels:
                if name != "le":
                    assert value in ALLOWED[name]
        assert mark.encode() not in proxy.service.app.metrics.exposition().lower()


# ---- the listener -------------------------------------------------------------------------------------------------


def test_metrics_have_a_listener_of_their_own() -> None:
    """With metrics.port set, /metrics is served there in Prometheus' text format, and nothing else is; the public
    listener does not know it."""
    port = free_port()
    with ScriptedUpstream(streaming()) as upstream, running(upstream.base_url, METRICS_PORT=str(port)) as proxy:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert declared(answer.read()).keys() == CONTRACT.keys()
        for path in ("/", "/api/session", "/metrics/x"):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (404, b"see /metrics\n")
        connection.close()
        assert send(proxy, "GET", "/metrics").error["code"] == "not_found"
