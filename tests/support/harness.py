"""What the tests share: a scripted upstream, the real server on port 0, and a raw client.

Nothing is mocked that can be run. The upstream is scripted since faults must be staged; the server is the real
`Service` with real sockets, in a thread with an event loop of its own, so that a test can look inside it afterwards.
"""

from __future__ import annotations

import asyncio
import atexit
import http.client
import io
import json
import os
import secrets
import socket
import string
import struct
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import uvloop

from proxy import settings
from proxy.app import ChatProxy
from proxy.server.listener import as_bound, listen
from proxy.server.protocol import GuardedProtocol
from proxy.server.service import Service
from proxy.settings import PREFIX, from_variables
from proxy.telemetry.logs import Logs
from proxy.web.context import RequestContext

T = TypeVar("T")

PATIENCE = 10.0  # seconds: ten times what anything here should take, so that only a hang fails
FULL = os.environ.get("CHAT_PROXY_FULL") == "1"  # the large tests at their full size; else at a tenth, or as each says
STARTING = 60.0  # seconds for a process to come up, or for a command to do its work: on a busy machine a second or two
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
ALPHABET = string.ascii_letters + string.digits


def random_key() -> str:
    """A key of which no 8 characters come about by chance."""
    return "sk-test-" + "".join(secrets.choice(ALPHABET) for _ in range(40))


def pieces(key: str) -> list[str]:
    secret_part = key.removeprefix("sk-test-")
    return [secret_part[i : i + 8] for i in range(len(secret_part) - 7)]


def environment(**given: str) -> dict[str, str]:
    """This process's, without what would be settings to a server, and with those given: SERVER_PORT="0".

    The tests have variables of that name, too.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    ours.pop("CREDENTIALS_DIRECTORY", None)
    ours.pop("PYTHONUNBUFFERED", None)  # as most people have it, or a pipe that is full would do no harm at exit
    return ours | {f"{PREFIX}{name}": value for name, value in given.items()}


def unmeasured() -> dict[str, str]:
    """The same for a program that works hard and covers no line that is not covered elsewhere: coverage would treble
    its work."""
    return {name: value for name, value in environment().items() if not name.startswith("COVERAGE_")}


def free_port() -> int:
    """A port that nobody else is given while this process lives. Servers may listen there: they set SO_REUSEADDR, too,
    and this socket does not listen."""
    reserved = socket.socket()
    atexit.register(reserved.close)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return int(reserved.getsockname()[1])


def is_open(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a process listens there."""
    try:
        socket.create_connection((host, port), PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def eventually(condition: Callable[[], T], patience: float = PATIENCE) -> T:
    """The first truthy value of the condition; fails when there is none in time."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience:g} s in vain"
        time.sleep(0.005)
    return value


# ---- the upstream -----------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One request as it reached the upstream, and when its connection went."""

    head: bytes
    body: bytes
    arrived: float
    closed: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """The upstream's side of one connection, for scripts."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: ScriptedUpstream) -> None:
        self.reader = reader
        self.writer = writer
        self.upstream = upstream
        self.seen: Seen | None = None

    async def request(self) -> Seen:
        """The next request. Raises asyncio.IncompleteReadError when there is none."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.seen = Seen(head, await self.reader.readexactly(length), time.monotonic())
        self.upstream.seen.append(self.seen)
        return self.seen

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: str = "200 OK", content_type: str = "text/event-stream", *more: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"content-type: {content_type}", "transfer-encoding: chunked", *more]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def whole(
        self, body: bytes, status: str = "200 OK", content_type: str = "application/json", *more: str
    ) -> None:
        lines = [f"HTTP/1.1 {status}", f"content-type: {content_type}", f"content-length: {len(body)}", *more]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def sse(self, *parts: bytes) -> None:
        """A whole stream: head, each part as a chunk of its own, end."""
        await self.head()
        for part in parts:
            await self.chunk(part)
        await self.end()

    def reset(self) -> None:
        """Closes with RST."""
        raw: socket.socket = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Returns when the proxy has closed or reset the connection, and notes when."""
        try:
            while await self.reader.read(65536):
                pass
        except OSError:
            pass  # a reset is a way to go
        if self.seen is not None:
            self.seen.closed = time.monotonic()


Script = Callable[[Peer], Awaitable[None]]


class ScriptedUpstream:
    """Runs the script for every connection, in a thread of its own."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.connections = 0
        self.open = 0
        self.errors: list[BaseException] = []
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedUpstream:
        self._thread.start()
        assert self._started.wait(PATIENCE)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self.errors, self.errors

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        listening = await asyncio.start_server(self._accepted, "127.0.0.1", 0, backlog=1024)
        self.port = listening.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        listening.close()
        unfinished = asyncio.all_tasks() - {asyncio.current_task()}
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        for writer in self._writers:  # of scripts that did not get to begin, or with bytes that nobody takes
            writer.transport.abort()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None]:
        self._writers.append(writer)
        return self._connected(reader, writer)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        peer = Peer(reader, writer, self)
        try:
            await self.script(peer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the proxy left: what the script says about that, it says with gone()
        except asyncio.CancelledError:
            pass  # the test is over
        except BaseException as error:  # noqa: BLE001  # shown by __exit__: it must not vanish in this thread
            self.errors.append(error)
        finally:
            self.open -= 1
            if peer.seen is not None and peer.seen.closed is None:
                peer.seen.closed = time.monotonic()
            writer.close()


def delta(text: str, index: int = 0) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def finish(reason: str = "stop", index: int = 0) -> bytes:
    return delta("", index).replace(
        b'"delta":{"content":""},"finish_reason":null', b'"delta":{},"finish_reason":"%s"' % reason.encode()
    )


DONE = b"data: [DONE]\n\n"


def streaming(*parts: bytes) -> Script:
    """A script that answers every request on a connection with these parts."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.sse(*parts)

    return script


GOOD = (delta("Hel"), delta("lo"), finish(), DONE)


# ---- the proxy --------------------------------------------------------------------------------------------------


class Recorded:
    """A client transport that keeps a copy of all that is written to it; every other attribute is the real one's."""

    def __init__(self, transport: Any, sent: bytearray) -> None:
        self._transport = transport
        self._sent = sent

    def write(self, data: bytes) -> None:
        self._sent.extend(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@dataclass
class Running:
    """The real server, in a thread. `sent` is every byte that any client was sent."""

    service: Service
    settings: settings.Settings
    loop: asyncio.AbstractEventLoop
    key: str
    output: io.BytesIO
    sent: bytearray = field(default_factory=bytearray)
    contexts: weakref.WeakSet[RequestContext] = field(default_factory=weakref.WeakSet)
    baseline: int = 0

    @property
    def port(self) -> int:
        return self.settings.server.port

    @property
    def upstream_sockets(self) -> int:
        """Live, idle and connecting."""
        transport: Any = self.service.app.transport
        return int(transport.open_sockets)

    @property
    def url(self) -> str:
        return self.settings.server.public_url

    @property
    def blocked_clients(self) -> int:
        """The number of clients that read too slowly: their connection accepts no more bytes."""
        return sum(connection.flow.write_paused for connection in tuple(self.service.guard.open))

    def on_loop(self, function: Callable[[], T]) -> T:
        """Calls the function in the server's thread."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE)

    def tasks(self) -> int:
        """Tasks alive; asyncio's own for this call not counted."""
        return self.on_loop(lambda: len(asyncio.all_tasks())) - 1

    def left_over(self) -> dict[str, int]:
        """What a request may not leave behind; empty when it left nothing. Idle upstream connections may stay."""
        app = self.service.app
        transport: Any = app.transport
        counts = {
            "tasks": self.tasks() - self.baseline,
            "live": len(app.active_scopes),
            "busy": app.busy,
            "leases": app.limits.leases.live + len(app.limits.leases.held),
            "sockets": self.on_loop(lambda: transport.open_sockets - len(transport._idle)),
            "contexts": len(self.contexts),  # what only the cycle collector would find may hold a megabyte each
        }
        return {name: count for name, count in counts.items() if count}

    def assert_nothing_left(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while left := self.left_over():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.005)

    def lines(self, event: str = "request") -> list[dict[str, Any]]:
        """The log's lines of one kind so far."""
        written = [json.loads(line) for line in self.output.getvalue().splitlines()]
        return [line for line in written if line["event"] == event]

    def line(self, count: int = 1) -> dict[str, Any]:
        """The newest request's line, once there are `count` of them."""
        return eventually(lambda: self.lines()[count - 1 :])[-1]

    def line_of(self, reply: Reply, event: str = "request") -> dict[str, Any]:
        """The log's line of one request, by the id that its answer carries."""
        id_ = reply.headers["x-request-id"]
        return eventually(lambda: [line for line in self.lines(event) if line["request_id"] == id_])[0]

    def tokens_used(self) -> dict[str, int]:
        """What the token windows hold, by the name of the limit; summed over subjects."""
        tokens = self.service.app.limits.tokens
        used: dict[str, int] = {}
        for (number, _), window in tokens.windows.items():
            name = tokens.limits[number].name
            used[name] = used.get(name, 0) + window.used
        return used

    def assert_key_unseen(self) -> None:
        metrics = self.service.app.metrics.exposition()
        for place, data in {"client": bytes(self.sent), "log": self.output.getvalue(), "metrics": metrics}.items():
            for piece in pieces(self.key):
                assert piece.encode() not in data, f"a piece of the key reached the {place}"


@contextmanager
def running(upstream: str, *, key: str | None = None, loop: str = "uvloop", **overrides: str) -> Iterator[Running]:
    """The server in front of `upstream`, with settings as in the environment: LIMITS_PER_SESSION="3/minute"."""
    key = key or random_key()
    variables = {
        "SERVER_PORT": "0",
        "UPSTREAM_BASE_URL": upstream,
        "UPSTREAM_API_KEY": key,
        "POLICY_MODELS": "m,other",
        "LIMITS_PER_SESSION": "100000/minute",
        "LIMITS_PER_ADDRESS": "100000/minute",
        "LIMITS_NEW_SESSIONS": "100000/minute",
        "LIMITS_REFUSALS_PER_ADDRESS": "100000/minute",
        "LIMITS_STREAMS_PER_SESSION": "1000",
        "LIMITS_STREAMS_PER_ADDRESS": "1000",
        "LIMITS_TOKENS_PER_SESSION": "1000000000/day",
        "LIMITS_TOKENS_PER_ADDRESS": "1000000000/day",
        "SERVER_CONNECTIONS_PER_ADDRESS": "100000",
        **overrides,
    }
    chosen = from_variables({f"{PREFIX}{name}": value for name, value in variables.items()})
    listener = listen(chosen.server)
    metrics = listen(settings.Server(port=chosen.metrics.port)) if chosen.metrics.port else None
    chosen = as_bound(chosen, listener)
    output = io.BytesIO()
    started: list[Running] = []
    ready = threading.Event()

    async def serve() -> None:
        service = Service(chosen, listener, Logs(chosen.log, output), metrics)
        proxy = Running(service, chosen, asyncio.get_running_loop(), key, output)

        class Recording(GuardedProtocol):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(cast(asyncio.Transport, Recorded(transport, proxy.sent)))

        def new_context(*arguments: Any) -> RequestContext:
            begun = ChatProxy.new_context(service.app, *arguments)
            proxy.contexts.add(begun)
            return begun

        service.server.config.http = Recording
        service.app.new_context = new_context  # type: ignore[assignment]
        serving = asyncio.create_task(service.serve())
        await service.server.began.wait()
        if chosen.limits.is_shared:
            await asyncio.sleep(0.1)  # for the tasks of the first connections to the store
        proxy.baseline = len(asyncio.all_tasks())
        started.append(proxy)
        ready.set()
        await serving
        service.logs.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    proxy = started[0]
    try:
        yield proxy
        if not proxy.service.ending.is_set():  # a test that ends the service itself looks for itself
            proxy.assert_nothing_left()
    finally:
        with suppress(RuntimeError):  # its loop is closed already
            proxy.loop.call_soon_threadsafe(proxy.service.end)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    proxy.assert_key_unseen()


# ---- the client ---------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """An answer as one client got it. `cut` when it ended before its framing did."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    cut: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found

    @property
    def last_event(self) -> bytes:
        return self.body.rstrip(b"\n").rsplit(b"\n\n", 1)[-1]

    @property
    def cookie(self) -> str:
        """The first name=value of Set-Cookie."""
        return (self.headers["set-cookie"] or "").partition(";")[0]


def send(
    proxy: Running, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=PATIENCE * 3)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        try:
            return Reply(response.status, response.headers, response.read())
        except http.client.IncompleteRead as error:
            return Reply(response.status, response.headers, error.partial, cut=True)
    finally:
        connection.close()


def chat(proxy: Running, *, stream: bool = True, headers: dict[str, str] | None = None, **fields: Any) -> Reply:
    """POST /api/chat as a program without cookies does it."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
    return send(
        proxy, "POST", "/api/chat", json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})}
    )


def chat_request(proxy: Running, **fields: Any) -> bytes:
    """A streaming chat request, byte for byte."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}).encode()
    head = f"POST /api/chat HTTP/1.1\r\nhost: 127.0.0.1:{proxy.port}\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def connect(proxy: Running, buffers: int = 0) -> socket.socket:
    """A connection to the proxy; with `buffers`, the kernel's own on this way back have so many bytes and fill soon."""
    sock = socket.socket()
    sock.settimeout(PATIENCE)
    if buffers:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        proxy.service.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
    sock.connect(("127.0.0.1", proxy.port))
    return sock


def raw_chat(proxy: Running, *, buffers: int = 0, **fields: Any) -> socket.socket:
    """A socket on which a streaming chat request was sent."""
    sock = connect(proxy, buffers)
    sock.sendall(chat_request(proxy, **fields))
    return sock


def attempts(port: int) -> int:
    """Sockets of this machine that wait for the port to take their connection (SYN_SENT)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "02" for row in rows)


@contextmanager
def full_port() -> Iterator[int]:
    """A port whose listener accepts nothing: Linux drops the SYN once the backlog is full. One attempt is under way."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as fillers:
        port = int(listener.getsockname()[1])
        for _ in range(2):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        eventually(lambda: attempts(port) == 1)  # the queue has taken the other
        yield port


def read_until(sock: socket.socket, wanted: bytes) -> bytes:
    """Reads until `wanted` has come; what was read, with whatever came behind it."""
    data = b""
    while wanted not in data:
        part = sock.recv(65536)
        assert part, f"closed before {wanted!r}: {data!r}"
        data += part
    return data


def chunks(sock: socket.socket, *, begun: bool = False) -> Iterator[bytes]:
    """The body of a streamed answer, chunk by chunk as it comes; of one that has `begun`, what is left of it.

    Raises AssertionError when it is cut.
    """
    with sock.makefile("rb") as file:
        while not begun and (line := file.readline()) != b"\r\n":
            assert line, "closed before the body"
        while line := file.readline():
            data = file.read(int(line, 16) + 2)
            assert data.endswith(b"\r\n"), "closed within a chunk"
            if data == b"\r\n":
                return
            yield data[:-2]
        raise AssertionError("closed before the last chunk")


def reset(sock: socket.socket) -> None:
    """Closes a client's socket with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
