"""The upstream and all browsers of a benchmark in one process: one clock, and every byte compared end to end.

    python load.py '{"scenario": "saturated", "streams": 50, ...}'        (see Plan; compare.py calls it)

Prints one JSON object: the scenario's figures, and `faults`, a count by kind. All on loopback, and on asyncio Protocols
since a client library would cost more than what is measured. Linux only: the target's CPU and memory stand in /proc.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count, cycle
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, cast

import uvloop

NEVER = 2.0  # seconds after which a call that was not closed counts as never closed
PATIENCE = 15.0  # seconds for anything that does not depend on the plan
WARM_UP = 0.3  # seconds that are not measured
PACE = 0.05  # seconds between two events of a stream that is left while it talks, or read at a reader's pace
EVENT = (
    'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1760000000,"model":"bench",'
    '"choices":[{"index":0,"delta":{"content":" tok%d"},"logprobs":null,"finish_reason":null}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Plan:
    """What to do to which target. `pid` is the target's process, `headers` go with every request."""

    scenario: str
    pid: int
    port: int
    upstream_port: int
    streams: int
    seconds: float = 1.0
    rounds: int = 1
    cpu: int | None = None
    headers: list[str] = field(default_factory=list)


class Stream:
    """One request and its answer. What happens to it is told to the scenario's `arrived`, `caught_up` and `ended`."""

    __slots__ = (
        *("bench", "client", "closed_at", "has_ended", "left_at", "number", "received", "received_bytes"),
        *("sent", "sent_bytes", "spoken", "spoken_out", "upstream"),
    )

    def __init__(self, bench: Bench, client: Client, number: int) -> None:
        self.bench = bench
        self.client = client
        self.number = number
        self.upstream: Upstream | None = None
        self.sent = self.received = self.sent_bytes = self.received_bytes = self.spoken = 0
        self.spoken_out = self.has_ended = False
        self.left_at: float | None = None
        self.closed_at: float | None = None

    # ---- the upstream's side --------------------------------------------------------------------------------------

    def say(self, *, begin: bool = False, event: bool = False, end: bool = False) -> None:
        """Any of: the response's head, one more event, the end; in one write."""
        parts = [HEAD] if begin else []
        if event:
            parts.append(self.chunk((EVENT % self.spoken).encode()))
            self.spoken += 1
        if end:
            parts += [self.chunk(DONE), b"0\r\n\r\n"]
            self.spoken_out = True
        if self.upstream is not None:
            self.upstream.transport.write(b"".join(parts))

    def chunk(self, data: bytes) -> bytes:
        self.sent = zlib.crc32(data, self.sent)
        self.sent_bytes += len(data)
        return b"%x\r\n%b\r\n" % (len(data), data)

    # ---- the browser's side ---------------------------------------------------------------------------------------

    def got(self, data: bytes) -> None:
        self.received = zlib.crc32(data, self.received)
        self.received_bytes += len(data)
        if self.received_bytes == self.sent_bytes and not self.spoken_out:
            self.bench.caught_up(self)

    def end(self) -> None:
        self.has_ended = True
        if (self.received, self.received_bytes) != (self.sent, self.sent_bytes):
            self.bench.faults["bytes"] += 1
        self.bench.ended(self)

    def leave(self) -> None:
        self.left_at = time.perf_counter()
        self.client.leave()


class Upstream(asyncio.Protocol):
    """One connection from the target."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.stream: Stream | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.bench.upstreams.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not blank or len(body) < int(length):
            return
        self._buffer.clear()
        number = int(json.loads(body)["messages"][0]["content"])
        self.stream = self.bench.streams[number]
        self.stream.upstream = self
        self.bench.arrived(self.stream)

    def close(self) -> None:
        """The scenario is over; that is not the target's fault."""
        self.stream = None
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.bench.upstreams.discard(self)
        stream = self.stream
        if stream is not None and stream.upstream is self:
            stream.upstream = None
            stream.closed_at = time.perf_counter()
            if stream.left_at is None and not stream.has_ended:
                self.bench.faults["upstream closed early"] += 1


class Client(asyncio.Protocol):
    """One browser's connection; asks again on it when the answer before has ended."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.stream: Stream | None = None
        self._buffer = bytearray()
        self._in_head = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.bench.clients.add(self)

    def ask(self) -> Stream:
        number = next(self.bench.numbers)
        self.stream = self.bench.streams[number] = Stream(self.bench, self, number)
        body = b'{"model":"bench","stream":true,"messages":[{"role":"user","content":"%d"}]}' % number
        self.transport.write(self.bench.request_head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return self.stream

    def leave(self) -> None:
        self.stream = None
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while (stream := self.stream) is not None:
            end = buffer.find(b"\r\n\r\n" if self._in_head else b"\r\n")
            if end < 0:
                return
            if self._in_head:
                if not buffer.startswith(b"HTTP/1.1 200"):
                    self.bench.faults[f"status {buffer[9:12].decode()}"] += 1
                    self.leave()
                del buffer[: end + 4]
                self._in_head = False
                continue
            size = int(buffer[:end], 16)
            if len(buffer) < end + size + 4:
                return
            body = bytes(buffer[end + 2 : end + 2 + size])
            del buffer[: end + size + 4]
            if body:
                stream.got(body)
            else:
                self._in_head = True
                self.stream = None
                stream.end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.bench.clients.discard(self)
        if self.stream is not None:
            self.bench.faults["answer cut"] += 1


def nothing(stream: Stream) -> None:
    """What a scenario does that does not care."""


class Bench:
    """One scenario against one target."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.loop = asyncio.get_running_loop()
        self.streams: dict[int, Stream] = {}
        self.numbers = count()
        self.clients: set[Client] = set()
        self.upstreams: set[Upstream] = set()
        self.faults: Counter[str] = Counter()
        self.arrived: Callable[[Stream], None] = nothing
        self.caught_up: Callable[[Stream], None] = nothing
        self.ended: Callable[[Stream], None] = nothing
        lines = ["POST /api/chat HTTP/1.1", f"host: 127.0.0.1:{plan.port}", "content-type: application/json"]
        self.request_head = "\r\n".join([*lines, *plan.headers, ""]).encode()

    async def run(self) -> dict[str, Any]:
        listening = await self.loop.create_server(lambda: Upstream(self), "127.0.0.1", self.plan.upstream_port)
        figures = await SCENARIOS[self.plan.scenario](self)
        for client in tuple(self.clients):
            client.leave()
        for upstream in tuple(self.upstreams):
            upstream.close()
        listening.close()
        await self.until(lambda: not self.clients and not self.upstreams, "not closed at the end")
        return {**figures, "faults": dict(self.faults)}

    async def ask(self, number: int) -> list[Stream]:
        """So many more browsers, each with a request on its way."""
        asked = []
        for _ in range(number):
            sock = socket.create_connection(("127.0.0.1", self.plan.port), PATIENCE)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, client = await self.loop.create_connection(lambda: Client(self), sock=sock)
            asked.append(client.ask())
        return asked

    async def until(self, condition: Callable[[], object], fault: str, patience: float = PATIENCE) -> None:
        """Waits; what does not come about is a fault, if it has a name."""
        deadline = time.perf_counter() + patience
        while not condition():
            if time.perf_counter() > deadline:
                self.faults.update([fault] if fault else [])
                return
            await asyncio.sleep(0.005)

    def cpu_seconds(self) -> float:
        """CPU time of the target so far."""
        fields = Path(f"/proc/{self.plan.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_kib(self) -> int:
        for line in Path(f"/proc/{self.plan.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise ValueError("no VmRSS")


# ---- the scenarios ---------------------------------------------------------------------------------------------------


async def saturated(bench: Bench) -> dict[str, float]:
    """Every stream gets its next event as soon as its browser has the one before: nothing is ever merged."""
    talking = True
    events = 0

    def caught_up(stream: Stream) -> None:
        nonlocal events
        events += 1
        stream.say(event=talking, end=not talking)

    bench.arrived = lambda stream: stream.say(begin=True, event=True)
    bench.caught_up = caught_up
    streams = await bench.ask(bench.plan.streams)
    await bench.until(lambda: all(stream.spoken for stream in streams), "not begun")
    await asyncio.sleep(WARM_UP)
    cpu, before, began = bench.cpu_seconds(), events, time.perf_counter()
    await asyncio.sleep(bench.plan.seconds)
    cpu, measured, seconds = bench.cpu_seconds() - cpu, events - before, time.perf_counter() - began
    talking = False
    await bench.until(lambda: all(stream.has_ended for stream in streams), "incomplete")
    return {"cpu_us_per_event": cpu * 1e6 / max(1, measured), "events_per_second": measured / seconds}


async def paced(bench: Bench) -> dict[str, float]:
    """Streams of 20 events a second, no two at the same moment: what a crowd of readers costs."""
    bench.arrived = lambda stream: stream.say(begin=True, event=True)
    streams = await bench.ask(bench.plan.streams)
    await bench.until(lambda: all(stream.received_bytes for stream in streams), "not begun")
    speaking = asyncio.ensure_future(speak_in_turn(streams))
    await asyncio.sleep(WARM_UP)
    cpu, before, began = bench.cpu_seconds(), sum(stream.spoken for stream in streams), time.perf_counter()
    await asyncio.sleep(bench.plan.seconds)
    cpu, seconds = bench.cpu_seconds() - cpu, time.perf_counter() - began
    measured = sum(stream.spoken for stream in streams) - before
    speaking.cancel()
    mib = bench.resident_kib() / 1024
    for stream in streams:
        stream.say(end=True)
    await bench.until(lambda: all(stream.has_ended for stream in streams), "incomplete")
    return {
        "cpu_us_per_event": cpu * 1e6 / max(1, measured),
        "events_per_second": measured / seconds,
        "cores": cpu / seconds,
        "mib": mib,
    }


async def speak_in_turn(streams: list[Stream]) -> None:
    """Spins, for a timer's milliseconds would bundle what different models say at different moments."""
    turns, due = cycle(streams), time.perf_counter()
    while True:
        await asyncio.sleep(0)
        if time.perf_counter() >= due:
            next(turns).say(event=True)
            due += PACE / len(streams)


async def requests(bench: Bench) -> dict[str, float]:
    """Answers of one event, one after the other on each connection."""
    talking = True
    answers = 0

    def ended(stream: Stream) -> None:
        nonlocal answers
        answers += 1
        del bench.streams[stream.number]
        if talking:
            stream.client.ask()

    bench.arrived = lambda stream: stream.say(begin=True, event=True, end=True)
    bench.ended = ended
    await bench.ask(bench.plan.streams)
    await asyncio.sleep(WARM_UP)
    cpu, before, began = bench.cpu_seconds(), answers, time.perf_counter()
    await asyncio.sleep(bench.plan.seconds)
    cpu, measured, seconds = bench.cpu_seconds() - cpu, answers - before, time.perf_counter() - began
    talking = False
    await bench.until(lambda: not bench.streams, "incomplete")
    return {
        "cpu_us_per_request": cpu * 1e6 / max(1, measured),
        "requests_per_second": measured / seconds,
        "requests": answers,  # in all: warming up and winding up, too
    }


async def idle(bench: Bench) -> dict[str, float]:
    """Streams that have begun and are silent."""
    bench.arrived = lambda stream: stream.say(begin=True, event=True)
    first = await bench.ask(5)
    await bench.until(lambda: all(stream.received_bytes for stream in first), "not begun")
    before = bench.resident_kib()
    streams = await bench.ask(bench.plan.streams)
    await bench.until(lambda: all(stream.received_bytes for stream in streams), "not begun")
    await asyncio.sleep(bench.plan.seconds)
    return {"kib_per_stream": (bench.resident_kib() - before) / len(streams)}


async def leaving(bench: Bench, *, reached: Callable[[Stream], object], talking: bool = False) -> dict[str, float]:
    """All browsers leave at once; how long until the upstream's sockets are closed. The median of some rounds."""
    rounds = [await leave_once(bench, reached, talking=talking) for _ in range(bench.plan.rounds)]
    never = sum(latencies.count(inf) for latencies in rounds)
    figures = {f"p{part}_ms": median(percentile(latencies, part) for latencies in rounds) * 1000 for part in (50, 99)}
    told = {name: value for name, value in figures.items() if value < inf}
    return {**told, "left": bench.plan.rounds * bench.plan.streams, "never": never}


async def leave_once(bench: Bench, reached: Callable[[Stream], object], *, talking: bool) -> list[float]:
    """The latencies, in order; `inf` for an upstream that was not told."""
    streams = await bench.ask(bench.plan.streams)
    await bench.until(lambda: all(reached(stream) for stream in streams), "not begun")
    speaking = asyncio.ensure_future(keep_talking(streams if talking else []))
    await asyncio.sleep(2 * PACE)
    for stream in streams:
        stream.leave()
    await bench.until(lambda: all(stream.closed_at for stream in streams), "", NEVER)
    speaking.cancel()
    return sorted((stream.closed_at or inf) - (stream.left_at or 0.0) for stream in streams)


async def keep_talking(streams: list[Stream]) -> None:
    while True:
        for stream in streams:
            stream.say(event=True)
        await asyncio.sleep(PACE)


def percentile(ordered: list[float], part: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * part // 100)]


async def abort_before_headers(bench: Bench) -> dict[str, float]:
    return await leaving(bench, reached=lambda stream: stream.upstream)


async def abort_in_silence(bench: Bench) -> dict[str, float]:
    bench.arrived = lambda stream: stream.say(begin=True, event=True)
    return await leaving(bench, reached=lambda stream: stream.received_bytes)


async def abort_while_streaming(bench: Bench) -> dict[str, float]:
    bench.arrived = lambda stream: stream.say(begin=True, event=True)
    return await leaving(bench, reached=lambda stream: stream.received_bytes, talking=True)


SCENARIOS: dict[str, Callable[[Bench], Awaitable[dict[str, float]]]] = {
    "idle": idle,
    "saturated": saturated,
    "paced": paced,
    "requests": requests,
    "abort_before_headers": abort_before_headers,
    "abort_in_silence": abort_in_silence,
    "abort_while_streaming": abort_while_streaming,
}


async def main(plan: Plan) -> None:
    print(json.dumps(await Bench(plan).run()))


if __name__ == "__main__":
    chosen = Plan(**json.loads(sys.argv[1]))
    if chosen.cpu is not None:
        os.sched_setaffinity(0, {chosen.cpu})
    uvloop.run(main(chosen))
