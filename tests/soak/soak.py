"""The server under every fault at once, for as long as you like: does it grow, does it leak, do those beside notice?

    python tests/soak/soak.py --minutes 30 [--clients 80] [--faults reset,flood] [--rest 12] [--seed 7]

A real `chat-proxy serve`; its upstream and all clients (crowd.py) are in this process. The server's deadlines are
short, so that faults come in quick turns, and so are the windows of its limits: what it remembers on purpose would look
like a leak. Exit code 1 when memory grows, anything is left over, or anybody saw what he should not have. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.compare import ROOT
from support.commands import COMMAND
from support.harness import ScriptedUpstream, environment, free_port, random_key

from soak.crowd import FAULTS, GOOD, PATIENCE, Load, Model, read_answer

SAMPLE_EVERY = 5.0  # seconds; in short runs a twentieth of them
BROWSERS = 50  # with a session; few new ones come, since what is known of each is swept only once there are thousands
MOST_GROWTH = 5.0  # MB an hour, over the second half, for runs of half an hour and more
MOST_NOISE = 8.0  # MB over the second half of shorter ones, while caches still fill
SETTINGS = {
    "POLICY_MODELS": "m",
    **dict.fromkeys(("UPSTREAM_CONNECT_TIMEOUT", "UPSTREAM_FIRST_BYTE_TIMEOUT", "UPSTREAM_IDLE_TIMEOUT"), "1"),
    "UPSTREAM_TOTAL_TIMEOUT": "10",
    "SERVER_DRAIN_SECONDS": "5",
    "SERVER_CONNECTIONS_PER_ADDRESS": "100000",
    **dict.fromkeys(("LIMITS_PER_SESSION", "LIMITS_PER_ADDRESS", "LIMITS_REFUSALS_PER_ADDRESS"), "1000000/second"),
    "LIMITS_NEW_SESSIONS": "1000000/second",
    **dict.fromkeys(("LIMITS_STREAMS_PER_SESSION", "LIMITS_STREAMS_PER_ADDRESS"), "100000"),
    **dict.fromkeys(("LIMITS_TOKENS_PER_SESSION", "LIMITS_TOKENS_PER_ADDRESS"), "1000000000/minute"),
}


# ---- the server -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The server at one moment; `at` in seconds since the start."""

    at: float
    rss_mb: float
    fds: int
    threads: int
    metrics: dict[str, float]

    @property
    def streams(self) -> int:
        return int(self.metrics["chat_proxy_streams_active"])

    def total(self, name: str) -> dict[str, int]:
        """A counter by its label."""
        start = f"chat_proxy_{name}_total{{"
        return {key.split('"')[1]: int(value) for key, value in self.metrics.items() if key.startswith(start) and value}

    def __str__(self) -> str:
        requests = sum(self.total("requests").values())
        return (
            f"{self.at / 60:6.1f} min  rss {self.rss_mb:6.1f} MB  fds {self.fds:4}  threads {self.threads:2}  "
            f"streams {self.streams:4}  requests {requests:7}  endings {self.total('stream_endings')}"
        )


@dataclass
class Server:
    """The process, its two ports, and what it has written."""

    process: subprocess.Popen[bytes]
    port: int
    metrics_port: int
    log: Path
    errors: Path
    key: str
    began: float

    async def sample(self) -> Sample:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.metrics_port, limit=1 << 20)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        _, _, body = await read_answer(reader)
        await reader.read()  # until the server has closed it, or it would be counted
        writer.close()
        lines = [line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#")]
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return Sample(
            time.monotonic() - self.began,
            int(status["VmRSS"].split()[0]) / 1024,
            len(os.listdir(proc / "fd")),
            int(status["Threads"]),
            {name: float(value) for name, value in lines},
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        with self.log.open("rb") as file:
            for line in file:
                yield json.loads(line)


@contextmanager
def serving(upstream: str) -> Iterator[Server]:
    port, metrics_port, key = free_port(), free_port(), random_key()
    variables = {
        **SETTINGS,
        "SERVER_PORT": str(port),
        "METRICS_PORT": str(metrics_port),
        "UPSTREAM_BASE_URL": upstream,
        "UPSTREAM_API_KEY": key,
    }
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder, "log"), Path(folder, "errors")
        with log.open("wb") as stdout, errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*COMMAND, "serve"], cwd=ROOT, env=environment(**variables), stdout=stdout, stderr=stderr
            )
        try:
            yield Server(process, port, metrics_port, log, errors, key, time.monotonic())
        finally:
            process.kill()  # nothing to one that has ended, as it should have
            process.wait()


async def ready(server: Server) -> Sample:
    """Returns when it answers. Raises TimeoutError, or AssertionError when it has ended instead."""
    async with asyncio.timeout(PATIENCE):
        while True:
            assert server.process.poll() is None, server.errors.read_text()
            with suppress(OSError):
                return await server.sample()
            await asyncio.sleep(0.05)


# ---- the run --------------------------------------------------------------------------------------------------------


async def run(options: argparse.Namespace, server: Server, upstream: ScriptedUpstream, model: Model) -> list[str]:
    """The whole soak. Returns what was found wrong."""
    await ready(server)
    load = Load(server.port, random.Random(options.seed), [GOOD, *options.faults])
    for _ in range(BROWSERS):
        await load.meet()
    await asyncio.sleep(0.5)  # for the server to hear that these have gone
    before, kept_before = await server.sample(), upstream.open

    seconds = options.minutes * 60
    samples = await under_load(server, load, seconds, options.clients)
    await asyncio.sleep(options.rest)
    after, kept, playing = await server.sample(), upstream.open, model.playing
    print(after, "after all have left", sep="  ")

    await load.meet()
    last = await server.sample()
    server.process.terminate()
    code = await asyncio.to_thread(server.process.wait, PATIENCE)

    report(samples, load, last)
    found = [f"{count} x {what}" for what, count in load.wrong.items()]
    if code:
        found.append(f"the server's exit code was {code}")
    if after.streams or playing:
        found.append(f"{after.streams} streams and {playing} upstream calls are left")
    if after.fds - kept > before.fds - kept_before:
        found.append(f"{after.fds} descriptors, {kept} of them idle upstream; before {before.fds} and {kept_before}")
    return found + growth(samples, seconds) + told(server, last)


async def under_load(server: Server, load: Load, seconds: float, clients: int) -> list[Sample]:
    """The samples that were taken while all clients were at work; they have gone when this returns."""
    until = time.monotonic() + seconds
    samples: list[Sample] = []
    tasks = [asyncio.create_task(load.live(until)) for _ in range(clients)]
    while time.monotonic() < until:
        await asyncio.sleep(min(SAMPLE_EVERY, seconds / 20))
        samples.append(await server.sample())
        if len(samples) == 1 or samples[-1].at // 60 != samples[-2].at // 60:
            print(samples[-1], flush=True)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    return samples


def slope(samples: list[Sample], name: str) -> float:
    """Least squares over the second half, an hour."""
    later = samples[len(samples) // 2 :]
    times, values = [sample.at for sample in later], [getattr(sample, name) for sample in later]
    return statistics.linear_regression(times, values).slope * 3600


def growth(samples: list[Sample], seconds: float) -> list[str]:
    per_hour = slope(samples, "rss_mb")
    grown = per_hour * seconds / 2 / 3600
    if per_hour > MOST_GROWTH if seconds >= 1800 else grown > MOST_NOISE:
        return [f"memory grew by {grown:.1f} MB in the second half, {per_hour:.1f} MB an hour"]
    return []


def told(server: Server, last: Sample) -> list[str]:
    """What the log and stderr say that they should not; and the log must have counted what the metrics have."""
    events: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    found = []
    for line in server.lines():
        events[line["event"]] += 1
        if line.get("ending"):
            endings[line["ending"]] += 1
        if line["event"] == "bug":
            found.append(f"bug: {line}")
    print("log lines   ", dict(events))
    if endings != last.total("stream_endings"):
        found.append(f"the log has counted {dict(endings)}, the metrics {last.total('stream_endings')}")
    if errors := server.errors.read_text():
        found.append(f"stderr: {errors[:2000]}")
    if server.key.encode() in server.log.read_bytes():
        found.append("the key is in the log")
    return found


def report(samples: list[Sample], load: Load, last: Sample) -> None:
    print(f"\nsecond half, an hour: rss {slope(samples, 'rss_mb'):+.2f} MB, fds {slope(samples, 'fds'):+.1f}")
    print("statuses    ", last.total("requests"))
    print("endings     ", last.total("stream_endings"))
    print("refusals    ", last.total("refusals") | last.total("upstream_errors"))
    for what, count in sorted(load.seen.items()):
        print(f"{count:8} {what}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The server under every fault at once.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=80, help="at one time")
    parser.add_argument("--faults", type=lambda text: text.split(","), default=list(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--rest", type=float, default=12.0, help="seconds between the last client and the last look")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    if unknown := set(options.faults) - set(FAULTS):
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    model = Model()
    with ScriptedUpstream(model) as upstream, serving(upstream.base_url) as server:
        print(f"server {server.process.pid} on port {server.port}")
        found = asyncio.run(run(options, server, upstream, model))
    print("\nnothing wrong" if not found else "\nwrong:\n  " + "\n  ".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
