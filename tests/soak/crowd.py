"""What the soak is made of: an upstream with every fault, and clients of every kind, who know what they must be told.

A question names the fault that the upstream is to answer it with, and has a number that no other has: so whoever reads
an answer to its end knows what it must be, byte for byte.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from support.harness import DONE, Peer, delta, finish

PATIENCE = 15.0  # seconds for whatever takes no more than the longest deadline
SMALL = 16384  # bytes of a client's receive buffer, where the server is to block

# ---- the upstream ---------------------------------------------------------------------------------------------------

ERROR = b'data: {"error":{"message":"Overloaded","type":"server_error","param":null,"code":"overloaded"}}\n\n'
Act = Callable[[Peer, list[bytes]], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """What the upstream does. `ends`: how that must end for who reads all, as `Load.outcome` says it.

    `or_else`: or how it may, when a retry begins so late that there is no time left for its answer.
    """

    weight: int
    ends: str
    act: Act
    events: int = 20
    size: int = 20  # characters of each
    last: bytes = finish() + DONE
    stream: bool = True
    or_else: str = ""

    def parts(self, number: int) -> list[bytes]:
        """The answer to the question of that number, if nothing went wrong; no other answer has a part of it."""
        if not self.stream:
            return [b'{"choices":[{"message":{"content":"%d"},"finish_reason":"stop"}]}' % number]
        return [*(delta(f"{number}.{place}".ljust(self.size)) for place in range(self.events)), self.last]


def stream(pause: float = 0.0) -> Act:
    async def act(peer: Peer, parts: list[bytes]) -> None:
        await peer.head()
        for part in parts:
            await peer.chunk(part)
            await asyncio.sleep(pause)
        await peer.end()

    return act


def half(stop: Callable[[Peer], Awaitable[None]]) -> Act:
    """Half of the stream, and then that."""

    async def act(peer: Peer, parts: list[bytes]) -> None:
        await peer.head()
        for part in parts[: len(parts) // 2]:
            await peer.chunk(part)
            await asyncio.sleep(0.02)
        await stop(peer)

    return act


def whole(status: str, content_type: str = "application/json", *more: str, body: bytes = b"") -> Act:
    async def act(peer: Peer, parts: list[bytes]) -> None:
        await peer.whole(body or parts[0], status, content_type, *more)

    return act


async def silent(peer: Peer, parts: list[bytes] | None = None) -> None:
    await peer.gone()


async def nothing(peer: Peer) -> None:
    """The connection is good for another question."""


async def reset(peer: Peer) -> None:
    if not peer.writer.is_closing():  # the proxy may have been faster
        peer.reset()


async def hang_up(peer: Peer, parts: list[bytes] | None = None) -> None:
    peer.writer.close()


def saying(last_words: bytes, then: Callable[[Peer], Awaitable[None]] = hang_up) -> Callable[[Peer], Awaitable[None]]:
    async def stop(peer: Peer) -> None:
        await peer.send(last_words)
        await then(peer)

    return stop


async def huge_header(peer: Peer, parts: list[bytes]) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx: " + b"x" * (1 << 20) + b"\r\n\r\n")


GOOD = "good"
CUT = "stream_interrupted"
LATE = "504 upstream_timeout"
FAULTS = {
    GOOD: Fault(30, "whole", stream()),
    "slow": Fault(20, "whole", stream(0.1)),
    "not a stream": Fault(10, "whole", whole("200 OK"), stream=False),
    "flood": Fault(5, "whole", stream(), events=500, size=4000),
    "error event": Fault(3, "whole", stream(), last=ERROR),
    "endless": Fault(1, "stream_too_long", stream(0.1), events=200),
    "silent": Fault(3, LATE, silent),
    "silent midway": Fault(3, "stream_timeout", half(silent)),
    "reset": Fault(5, CUT, half(reset)),
    "cut in a chunk": Fault(5, CUT, half(saying(b"40\r\ndata: "))),
    "cut in an event": Fault(5, CUT, half(saying(b'b\r\ndata: {"cho\r\n'))),
    "early end": Fault(5, CUT, half(saying(b"0\r\n\r\n", nothing))),
    "bad framing": Fault(5, CUT, half(saying(b"zz\r\n", silent))),
    "hangs up": Fault(3, "502 upstream_protocol", hang_up),
    "html": Fault(3, "502 upstream_protocol", whole("200 OK", "text/html", body=b"<p>Hello</p>")),
    "huge header": Fault(2, "502 upstream_protocol", huge_header),
    "gzip": Fault(3, "502 upstream_protocol", whole("200 OK", "text/event-stream", "content-encoding: gzip")),
    "401": Fault(2, "502 upstream_auth", whole("401 Unauthorized", body=b"{}")),
    "429": Fault(3, "429 upstream_rate_limited", whole("429 Slow Down", body=b"{}"), or_else=LATE),
    "500": Fault(3, "502 upstream_error", whole("500 Oh", body=b"{}")),
    "503": Fault(3, "502 upstream_error", whole("503 Not Now", body=b"{}"), or_else=LATE),
}


@dataclass
class Model:
    """The script of the upstream; `playing` counts the answers that it is giving."""

    playing: int = 0

    async def __call__(self, peer: Peer) -> None:
        while not peer.writer.is_closing():
            seen = await peer.request()
            peer.upstream.seen.clear()  # or this process would be the one that grows
            name, number = seen.json["messages"][0]["content"].split(":")
            self.playing += 1
            try:
                await FAULTS[name].act(peer, FAULTS[name].parts(int(number)))
            finally:
                self.playing -= 1


# ---- the clients ----------------------------------------------------------------------------------------------------

HEAD = "POST /api/chat HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
MALFORMED = [  # each must be answered 4xx, or not at all
    "NONSENSE\r\n\r\n",
    "GET / HTTP/1.1\r\n\r\n",
    "GET /api/nothing HTTP/1.1\r\nhost: {host}\r\n\r\n",
    "BREW /api/chat HTTP/1.1\r\nhost: {host}\r\n\r\n",
    "GET / HTTP/1.1\r\nhost: {host}\r\nx: " + "x" * 40_000 + "\r\n\r\n",
    HEAD + "content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}",
    HEAD + "content-length: 9\r\n\r\nnot JSON!",
    HEAD + "content-length: 2\r\n\r\n{{}}",
    HEAD + "content-length: 99999999\r\n\r\n",
    HEAD + "transfer-encoding: chunked\r\n\r\nzz\r\n",
    HEAD + "origin: https://elsewhere.example\r\ncontent-length: 2\r\n\r\n{{}}",
    HEAD + "cookie: chat=forged\r\ncontent-length: 2\r\n\r\n{{}}",
]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def read_answer(reader: asyncio.StreamReader, pause: float = 0.0) -> tuple[int, bytes, bytes]:
    """Status, head and body. Raises IncompleteReadError when it is cut."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = head.lower()
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" not in fields:
        length = int(fields.partition(b"content-length: ")[2].split(b"\r", 1)[0])
        return status, head, await reader.readexactly(length)
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
        await asyncio.sleep(pause)
    await reader.readexactly(2)
    return status, head, b"".join(parts)


@dataclass
class Load:
    """All clients, and what they saw."""

    port: int
    random: random.Random
    faults: list[str]
    seen: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    cookies: list[str] = field(default_factory=list)  # of browsers
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def connection(self, buffer: int = 0) -> AsyncIterator[Streams]:
        sock = socket.socket()
        sock.setblocking(False)
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.close()

    def request(self, name: str, number: int) -> bytes:
        """A question, half of them as one of the browsers asks it."""
        asked = {"messages": [{"role": "user", "content": f"{name}:{number}"}], "stream": FAULTS[name].stream}
        body = json.dumps(asked)
        head = HEAD.format(host=self.host)
        if self.random.random() < 0.5:
            head += f"origin: http://{self.host}\r\ncookie: {self.random.choice(self.cookies)}\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()

    def any_request(self) -> bytes:
        return self.request(self.any_fault(), next(self.numbers))

    def any_fault(self) -> str:
        return self.random.choices(self.faults, [FAULTS[name].weight for name in self.faults])[0]

    def outcome(self, parts: list[bytes], status: int, body: bytes) -> str:
        """How an answer ended: "whole", the code of our event behind whole events, a status and its code, or worse."""
        if status != 200:
            return f"{status} {json.loads(body)['error']['code']}"
        if body == b"".join(parts):
            return "whole"
        *events, last = body.removesuffix(b"\n\n").split(b"\n\n")
        if [event + b"\n\n" for event in events] == parts[: len(events)] and last.startswith(b'data: {"error"'):
            return str(json.loads(last[6:])["error"]["code"])
        return "bytes that were never sent"

    async def ask(self, streams: Streams, name: str, pause: float = 0.0) -> bool:
        """One question and its answer, which must be what the fault makes of it. False: the server will close."""
        fault, number = FAULTS[name], next(self.numbers)
        streams[1].write(self.request(name, number))
        status, head, body = await read_answer(streams[0], pause)
        outcome = self.outcome(fault.parts(number), status, body)
        self.seen[f"{name}: {outcome}"] += 1
        slowed = pause > 0 and outcome == "stream_too_long"
        if outcome not in (fault.ends, fault.or_else) and not slowed:
            self.wrong[f"{name}: {outcome}"] += 1
        return b"connection: close" not in head

    # ---- what clients do ---------------------------------------------------------------------------------------

    async def read_all(self) -> None:
        async with self.connection() as streams:
            for _ in range(self.random.randint(1, 4)):
                if not await self.ask(streams, self.any_fault()):
                    break

    async def meet(self) -> None:
        """A new browser, and its question."""
        async with self.connection() as streams:
            self.cookies.append(await self.come(streams))
            await self.ask(streams, GOOD)

    async def read_slowly(self) -> None:
        async with self.connection(SMALL) as streams:
            await self.ask(streams, "flood" if "flood" in self.faults else GOOD, 0.02)

    async def leave(self) -> None:
        """At any moment, the asking included, and in any way."""
        async with self.connection() as (reader, writer):
            request = self.any_request()
            writer.write(request[: self.random.choice([len(request), self.random.randrange(len(request))])])
            await asyncio.sleep(self.random.uniform(0, 1.5) ** 2)
            await self.go(reader, writer)

    async def go(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        way = self.random.choice(["close", "reset", "half-close"])
        self.seen[f"left: {way}"] += 1
        if way == "reset":
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif way == "half-close":
            writer.write_eof()
            await asyncio.wait_for(reader.read(), PATIENCE)  # the server hears it

    async def stop_reading(self) -> None:
        async with self.connection(SMALL) as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(self.request("flood" if "flood" in self.faults else GOOD, next(self.numbers)))
            await asyncio.sleep(self.random.choice([1, 3, 8, 40]))  # 40: beyond the server's patience
            writer.transport.abort()
            self.seen["left: without reading"] += 1

    async def send_malformed(self) -> None:
        async with self.connection() as (reader, writer):
            request = self.random.choice(MALFORMED)
            writer.write(request.format(host=self.host).encode())
            status, _, body = await read_answer(reader)
            self.seen[f"malformed: {self.outcome([], status, body)}"] += 1
            if not 400 <= status < 500:
                self.wrong[f"malformed: {status} for {request[:60]!r}"] += 1

    async def say_nothing(self) -> None:
        async with self.connection() as (reader, writer):
            writer.write(self.random.choice([b"", b"P", b"GET / HTTP/1.1\r\nhost: "]))
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), self.random.choice([0.5, 2, PATIENCE]))
                self.seen["silent: closed by the server"] += 1

    async def pipeline(self) -> None:
        async with self.connection() as (reader, writer):
            writer.write(self.any_request())
            await asyncio.sleep(self.random.choice([0, 0.05, 0.3]))
            writer.write(self.any_request())
            with suppress(TimeoutError):  # the first one may have been over by then
                await asyncio.wait_for(reader.read(), 3)
                self.seen["pipelined: closed by the server"] += 1

    async def come(self, streams: Streams) -> str:
        """A browser comes: the page, a session; its cookie."""
        cookie = ""
        for path in ("/", "/api/v1/models", "/healthz", "/api/session"):
            get = f"GET {path} HTTP/1.1\r\nhost: {self.host}\r\nsec-fetch-site: same-origin\r\n\r\n"
            streams[1].write(get.encode())
            status, head, _ = await read_answer(streams[0])
            assert status == 200, head
            cookie = head.decode().partition("set-cookie: ")[2].partition(";")[0]
        return cookie

    async def visit(self) -> None:
        """Some of those that come log out again, others keep their cookie for further requests."""
        async with self.connection() as streams:
            cookie = await self.come(streams)
            if self.random.random() < 0.2:
                end = f"DELETE /api/session HTTP/1.1\r\nhost: {self.host}\r\ncookie: {cookie}\r\n\r\n"
                streams[1].write(end.encode())
                assert (await read_answer(streams[0]))[0] == 200
            else:
                self.cookies[self.random.randrange(len(self.cookies))] = cookie
        self.seen["visits"] += 1

    async def live(self, until: float) -> None:
        """One client after the other, until that time."""
        kinds = {self.read_all: 400, self.read_slowly: 30, self.leave: 300, self.stop_reading: 30}
        kinds |= {self.send_malformed: 80, self.say_nothing: 30, self.pipeline: 60, self.visit: 2}
        while time.monotonic() < until:
            await asyncio.sleep(self.random.uniform(0, 0.5))
            kind = self.random.choices(list(kinds), list(kinds.values()))[0]
            try:
                await kind()
            except (OSError, asyncio.IncompleteReadError, TimeoutError, AssertionError) as error:
                self.seen[f"{kind.__name__}: {type(error).__name__}"] += 1
                if kind in (self.read_all, self.read_slowly, self.visit):
                    self.wrong[f"{kind.__name__}: {error!r}"] += 1
