"""What chat-proxy costs beside the proxy that one writes in an afternoon (naive.py), on this machine, in one run.

    python tests/bench/compare.py [--quick]

Linux, loopback, less than two minutes (--quick: less than thirty seconds). The target has one CPU, the upstream and all
browsers (load.py) another, where there are two. CPU figures are steadier than times, and figures of one run compare
with each other only. Every byte is checked; the exit code is 1 when chat-proxy changed one, cut an answer, or left an
upstream call open.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.harness import environment, free_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PATIENCE = 15.0  # seconds for a target to begin or to end
PLENTY = "1000000000000/day"
MANY = "20000"
PROXY_SETTINGS = {
    "SERVER_MAX_STREAMS": MANY,
    "SERVER_CONNECTIONS_PER_ADDRESS": MANY,
    "SERVER_DRAIN_SECONDS": "0",
    "UPSTREAM_API_KEY": "sk-bench-0123456789abcdef",
    "POLICY_MODELS": "bench",
    "LIMITS_PER_SESSION": PLENTY,
    "LIMITS_PER_ADDRESS": PLENTY,
    "LIMITS_STREAMS_PER_SESSION": MANY,
    "LIMITS_STREAMS_PER_ADDRESS": MANY,
    "LIMITS_TOKENS_PER_SESSION": PLENTY,
    "LIMITS_TOKENS_PER_ADDRESS": PLENTY,
    "LOG_LEVEL": "error",
}


class Row(NamedTuple):
    """One line of the result, and how many streams its scenario has."""

    label: str
    scenario: str
    figure: str


ROWS = [
    Row("KiB per idle stream", "idle", "kib_per_stream"),
    Row("CPU us per event, saturated", "saturated", "cpu_us_per_event"),
    Row("CPU us per one-event request", "requests", "cpu_us_per_request"),
    Row("abort ms p50, before headers", "abort_before_headers", "p50_ms"),
    Row("abort ms p99, before headers", "abort_before_headers", "p99_ms"),
    Row("abort ms p50, in silence", "abort_in_silence", "p50_ms"),
    Row("abort ms p99, in silence", "abort_in_silence", "p99_ms"),
    Row("abort ms p50, while streaming", "abort_while_streaming", "p50_ms"),
    Row("abort ms p99, while streaming", "abort_while_streaming", "p99_ms"),
]
STREAMS = {"idle": 500, "saturated": 50, "requests": 16}  # of the others: 100, all of which leave at once


@dataclass(frozen=True)
class Target:
    """A running proxy. `headers` make it take a request for one of a browser's."""

    name: str
    pid: int
    port: int
    upstream_port: int
    headers: list[str]


def cpus() -> tuple[int, int] | None:
    """One CPU for the target and one for the load, where there are two."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else None


@contextlib.contextmanager
def running(
    name: str, command: list[str], port: int, upstream_port: int, variables: Mapping[str, str]
) -> Iterator[Target]:
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if pair := cpus():
            os.sched_setaffinity(process.pid, {pair[0]})
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} does not run: {' '.join(command)}")
            time.sleep(0.05)
        headers = browser_headers(port) if name == "chat-proxy" else []
        yield Target(name, process.pid, port, upstream_port, headers)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def chat_proxy(**settings: str) -> contextlib.AbstractContextManager[Target]:
    port, upstream_port = free_port(), free_port()
    variables = {
        "SERVER_PORT": str(port),
        "UPSTREAM_BASE_URL": f"http://127.0.0.1:{upstream_port}/v1",
        **PROXY_SETTINGS,
        **settings,
    }
    command = [sys.executable, "-m", "proxy", "serve"]
    return running("chat-proxy", command, port, upstream_port, environment(**variables))


def naive() -> contextlib.AbstractContextManager[Target]:
    port, upstream_port = free_port(), free_port()
    command = [sys.executable, str(HERE / "naive.py"), str(port)]
    variables = environment() | {"NAIVE_UPSTREAM": f"http://127.0.0.1:{upstream_port}/v1"}
    return running("naive", command, port, upstream_port, variables)


def browser_headers(port: int) -> list[str]:
    origin = f"http://127.0.0.1:{port}"
    request = urllib.request.Request(f"{origin}/api/session", headers={"Sec-Fetch-Site": "same-origin"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        cookie = response.headers["Set-Cookie"].partition(";")[0]
    return [f"cookie: theme=dark; {cookie}", f"origin: {origin}", "sec-fetch-site: same-origin"]


def measure(target: Target, scenario: str, streams: int, seconds: float, rounds: int) -> dict[str, Any]:
    pair = cpus()
    plan = {
        "scenario": scenario,
        "pid": target.pid,
        "port": target.port,
        "upstream_port": target.upstream_port,
        "streams": streams,
        "seconds": seconds,
        "rounds": rounds,
        "cpu": pair[1] if pair else None,
        "headers": target.headers,
    }
    command = [sys.executable, str(HERE / "load.py"), json.dumps(plan)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return {"faults": {done.stderr.strip().rpartition("\n")[2] or "the load failed": 1}}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def shown(results: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    lines = [f"{'':32}{'chat-proxy':>12}{'naive':>12}{'ratio':>8}"]
    for label, scenario, figure in ROWS:
        ours, theirs = (results[name][scenario].get(figure) for name in ("chat-proxy", "naive"))
        ratio = ours / theirs if ours is not None and theirs else None
        lines.append(f"{label:32}{cell(ours):>12}{cell(theirs):>12}{cell(ratio):>8}")
    return "\n".join(lines)


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def faults_of(results: Mapping[str, dict[str, Any]]) -> list[str]:
    found = []
    for scenario, result in results.items():
        found += [f"{scenario}: {number} x {fault}" for fault, number in result["faults"].items()]
        if result.get("never"):
            found.append(f"{scenario}: {result['never']} of {result['left']} calls were never closed")
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a rough look, in less than thirty seconds")
    options.add_argument("--seconds", type=float, help="of each measurement (3; quick: 1)")
    options.add_argument("--streams", type=int, help="at most so many at once")
    options.add_argument("--json", type=Path, metavar="FILE", help="all figures, for programs")
    chosen = options.parse_args()
    seconds = chosen.seconds or (1.0 if chosen.quick else 3.0)
    results: dict[str, dict[str, dict[str, Any]]] = {"chat-proxy": {}, "naive": {}}
    with chat_proxy() as ours, naive() as theirs:
        for scenario in dict.fromkeys(row.scenario for row in ROWS):
            streams = min(STREAMS.get(scenario, 100), chosen.streams or 1000)
            for target in (ours, theirs):
                rounds = 1 if chosen.quick else 5
                results[target.name][scenario] = measure(target, scenario, streams, seconds, rounds)
    print(shown(results))
    for name, result in results.items():
        faults = faults_of(result)
        print(f"faults of {name}: {len(faults)}", *faults, sep="\n  ")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))
    return 1 if faults_of(results["chat-proxy"]) else 0


if __name__ == "__main__":
    sys.exit(main())
