"""Prometheus metrics, one registry a server. Labels come from configuration and fixed sets, never from a client.

The byte path only updates plain numbers (one bisect an event), which are added to the histograms when a stream ends.
The metrics of several processes are added up as `Family` values.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from operator import add
from typing import TypeAlias

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

# Otherwise each counter gets a second metric (_created), which Prometheus does not read in this format.
disable_created_metrics()  # type: ignore[no-untyped-call]

ENDINGS = ("complete", "error", "truncated", "aborted", "timeout", "drained")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
GAPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 400)
ABORTS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)


class GapHistogram:
    """chat_proxy_token_gap_seconds: the sum of the gaps that each stream counts."""

    def __init__(self) -> None:
        self.counts = [0] * (len(GAPS) + 1)
        self.total = 0.0

    def add(self, counts: list[int], total: float) -> None:
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, counts, strict=True)]
        self.total += total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        buckets, running = [], 0
        for bound, count in zip((*map(floatToGoString, GAPS), "+Inf"), self.counts, strict=True):
            running += count
            buckets.append((bound, running))
        family = HistogramMetricFamily("chat_proxy_token_gap_seconds", "Time between two deliveries of one stream")
        family.add_metric([], buckets, self.total)
        yield family


class Metrics:
    """The metrics of one server."""

    def __init__(self, models: tuple[str, ...]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("chat_proxy_requests", "Requests by status", ["code"], registry=registry)
        self.streams = Gauge("chat_proxy_streams_active", "Streams being relayed", registry=registry)
        self.first_token = Histogram(
            "chat_proxy_time_to_first_token_seconds", "Request to first event", buckets=SECONDS, registry=registry
        )
        self.gaps = GapHistogram()
        registry.register(self.gaps)
        self.rate = Histogram(
            "chat_proxy_tokens_per_second", "Answer tokens by seconds since the first", buckets=RATES, registry=registry
        )
        self.endings = Counter("chat_proxy_stream_endings", "How streams ended", ["ending"], registry=registry)
        self.abort = Histogram(
            "chat_proxy_abort_seconds", "Browser gone to upstream closed", buckets=ABORTS, registry=registry
        )
        self.tokens = Counter("chat_proxy_tokens", "Tokens settled", ["direction", "model"], registry=registry)
        self.upstream_errors = Counter("chat_proxy_upstream_errors", "Faults upstream", ["code"], registry=registry)
        self.refusals = Counter("chat_proxy_refusals", "Refusals by code", ["code"], registry=registry)
        self.retries = Counter("chat_proxy_retries", "Retries upstream", registry=registry)
        self.store_up = Gauge("chat_proxy_limit_store_up", "1 while the limit store answers", registry=registry)
        self.store_up.set(1)
        self.ending = {ending: self.endings.labels(ending) for ending in ENDINGS}
        self.tokens_in = {model: self.tokens.labels("input", model) for model in models}
        self.tokens_out = {model: self.tokens.labels("output", model) for model in models}

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def families(self) -> list[Family]:
        """All metrics as plain values, for another process."""
        return [
            Family(
                metric.name, metric.documentation, metric.type, [(s.name, s.labels, s.value) for s in metric.samples]
            )
            for metric in self.registry.collect()
        ]


# ---- several processes ---------------------------------------------------------------------------------------------

Sample: TypeAlias = tuple[str, dict[str, str], float]  # name, labels, value
LEAST = {"chat_proxy_limit_store_up"}  # gauges of which the smallest counts; others are added up


class Family(msgspec.Struct, array_like=True):
    """One metric of one process."""

    name: str
    documentation: str
    kind: str
    samples: list[Sample]

    def collect(self) -> Metric:
        metric = Metric(self.name, self.documentation, self.kind)
        for name, labels, value in self.samples:
            metric.add_sample(name, labels, value)
        return metric


def added_up(processes: Iterable[list[Family]]) -> list[Family]:
    """The metrics of several processes as those of one."""
    totals: dict[str, Family] = {}
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in (family for families in processes for family in families):
        total = totals.setdefault(family.name, Family(family.name, family.documentation, family.kind, []))
        combine = min if family.name in LEAST else add
        for name, labels, value in family.samples:
            key = name, tuple(labels.items())
            if key not in values:
                total.samples.append((name, labels, value))
            values[key] = combine(values[key], value) if key in values else value
    for total in totals.values():
        total.samples = [(name, labels, values[name, tuple(labels.items())]) for name, labels, _ in total.samples]
    return list(totals.values())


def lasting(families: list[Family]) -> list[Family]:
    """The metrics that remain valid after their process has ended: all but its gauges."""
    return [family for family in families if family.kind != "gauge"]


class Total:
    """The metrics of several processes, as a collector of prometheus_client."""

    def __init__(self, processes: Iterable[list[Family]]) -> None:
        self.families = added_up(processes)

    def collect(self) -> Iterator[Metric]:
        return (family.collect() for family in self.families)

    def exposition(self) -> bytes:
        return generate_latest(self)


class Gaps:
    """The gaps of one stream, in seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(GAPS) + 1)
        self.total = 0.0

    def note(self, gap: float) -> None:
        self.counts[bisect_left(GAPS, gap)] += 1
        self.total += gap
