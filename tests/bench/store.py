"""Measures the cost of limits on a shared store: chat-proxy with memory:// and with redis://, in one run.

    python tests/bench/store.py [--seconds 3] [--rounds 3]

Each round measures answers of one event (load.py) from one server, then from the other; the result is the median of
the rounds. The servers have one CPU, the load and the store another. Exit code 1 when a byte was changed or an
answer was cut.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import redis

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.redis_server import Redis

from bench.compare import STREAMS, Target, cell, chat_proxy, cpus, faults_of, measure

CALLS = 3  # per request: the charge, the hold of tokens and a stream, and their settling


@contextlib.contextmanager
def a_store() -> Iterator[redis.Redis]:
    """A Redis server of the benchmark, without persistence."""
    with tempfile.TemporaryDirectory() as folder:
        server = Redis(Path(folder))
        try:
            if pair := cpus():
                os.sched_setaffinity(server.process.pid, {pair[1]})
            with server.client() as client:
                yield client
        finally:
            server.stop()


def calls(client: redis.Redis) -> int:
    """The number of scripts that the store has run."""
    counted: Any = client.info("commandstats")
    return int(counted.get("cmdstat_evalsha", {"calls": 0})["calls"])


def measured_on(client: redis.Redis, target: Target, seconds: float) -> dict[str, Any]:
    """One round with the store. A round in which a busy machine marked the store as unavailable counts as a fault."""
    before = calls(client)
    result = measure(target, "requests", STREAMS["requests"], seconds, 1)
    if result.get("requests"):
        result["calls_per_request"] = (calls(client) - before) / result["requests"]
        if result["calls_per_request"] < CALLS:
            result["faults"]["the store was marked as unavailable"] = 1
    return result


ROWS = {
    "CPU us per one-event request": "cpu_us_per_request",
    "Redis calls per request": "calls_per_request",
    "requests per second": "requests_per_second",
}


def shown(rounds: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'':32}{'memory://':>12}{'redis://':>12}{'ratio':>8}"]
    for label, figure in ROWS.items():
        memory, shared = (
            median(found) if (found := [result[figure] for result in results if figure in result]) else None
            for results in rounds.values()
        )
        ratio = shared / memory if shared is not None and memory else None
        lines.append(f"{label:32}{cell(memory):>12}{cell(shared):>12}{cell(ratio):>8}")
    return "\n".join(lines)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    options.add_argument("--rounds", type=int, default=3, help="of each server")
    chosen = options.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {"memory": [], "redis": []}
    with a_store() as client:
        url = f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"
        with chat_proxy() as memory, chat_proxy(LIMITS_STORE=url, SESSION_SECRET="s" * 40) as shared:
            for _ in range(chosen.rounds):
                rounds["memory"].append(measure(memory, "requests", STREAMS["requests"], chosen.seconds, 1))
                rounds["redis"].append(measured_on(client, shared, chosen.seconds))
    print(shown(rounds))
    faults = [fault for name, results in rounds.items() for result in results for fault in faults_of({name: result})]
    print(f"faults: {len(faults)}", *faults, sep="\n  ")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
