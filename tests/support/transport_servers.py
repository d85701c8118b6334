"""Upstreams for the tests of proxy/transport: scripted ones on raw sockets, real ones as processes.

Rules:
1. Everything is on loopback and on a port that the kernel chose.
2. `on_both_loops` runs a test on asyncio and on uvloop, and fails it if it leaves a task, a socket or an exception
   that only reached the loop's exception handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from support import nginx
from support.harness import LOOPS

LIVENESS = 10.0  # seconds; nothing here should take one, and what hangs should fail
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EMPTY = OK + b"Content-Length: 0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def sockets() -> int:
    """The number of sockets of this process (without pipes: libuv never closes one of them)."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return count


def run(loop: str, main: Coroutine[Any, Any, None], *, seconds: float = 60.0) -> None:
    """Runs `main` on one of LOOPS, and asserts that it leaves nothing."""
    from support.harness import eventually  # not needed when this file is run as a program

    before = sockets()
    complaints: list[dict[str, Any]] = []

    async def guarded() -> None:
        running = asyncio.get_running_loop()
        running.set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(seconds):
            await main
        await settled(lambda: len(asyncio.all_tasks()) == 1)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(guarded())
    assert complaints == []
    eventually(lambda: sockets() <= before)  # other threads of this process may hold sockets for a while


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Turns a coroutine function into a test on both loops; its parameters stay fixtures."""

    def on_loop(loop: str, **fixtures: Any) -> None:
        run(loop, test(**fixtures))

    parameters = list(inspect.signature(test).parameters.values())
    first = inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    on_loop.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    on_loop.__name__, on_loop.__doc__, on_loop.__module__ = test.__name__, test.__doc__, test.__module__
    on_loop.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
    on_both: Callable[..., None] = pytest.mark.parametrize("loop", LOOPS)(on_loop)
    return on_both


async def settled(condition: Callable[[], object], seconds: float = LIVENESS) -> None:
    """Waits until `condition` holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # the condition depends on the kernel, which sets no event
            await asyncio.sleep(0.002)


async def ticks(count: int = 4) -> None:
    """Runs the loop a few times, so that the peer reads the bytes written before in a read of their own."""
    for _ in range(count):
        await asyncio.sleep(0)


@dataclass
class Received:
    """A request as it arrived."""

    head: bytes
    body: bytes


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> Received:
        """The next request. Raises IncompleteReadError when the client has closed."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        fields = {
            line.split(b":", 1)[0].lower(): line.split(b":", 1)[1].strip()
            for line in head.split(b"\r\n")[1:]
            if b":" in line
        }
        body = b""
        if fields.get(b"transfer-encoding") == b"chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        else:
            body = await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
        return Received(head, body)

    async def send(self, *parts: bytes) -> None:
        """Sends each part as a segment of its own."""
        for part in parts:
            if self.writer.transport.is_closing():
                raise ConnectionResetError("the client has gone")
            self.writer.write(part)
            await self.writer.drain()
            await ticks()

    async def answer(self, *parts: bytes) -> Received:
        request = await self.request()
        await self.send(*parts)
        return request

    def reset(self) -> None:
        """Ends the connection with an RST."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None:  # None if the client closed first
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.close()

    async def gone(self) -> None:
        """Returns when the client has closed or reset the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


Handler = Callable[[Peer], Awaitable[None]]


@dataclass
class Upstream:
    """A scripted server, its counters and the requests that it received."""

    url: str = ""
    port: int = 0
    accepted: int = 0
    open: int = 0
    requests: list[Received] = field(default_factory=list)


@contextlib.asynccontextmanager
async def serving(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    """Runs a server that calls `handler` for each connection, and closes the connection after it."""
    upstream = Upstream()
    handlers: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        upstream.accepted += 1
        upstream.open += 1
        try:
            await handler(Peer(reader, writer))
        except (ConnectionError, EOFError, asyncio.CancelledError):
            pass
        finally:
            handlers.discard(task)
            upstream.open -= 1
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls, limit=1 << 20)
    upstream.port = server.sockets[0].getsockname()[1]
    upstream.url = f"{'https' if tls else 'http'}://127.0.0.1:{upstream.port}/"
    try:
        yield upstream
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        await settled(lambda: not handlers)
        await ticks(10)


def always(*parts: bytes) -> Handler:
    """Gives every request the same answer, on connections that stay open."""

    async def handler(peer: Peer) -> None:
        while True:
            await peer.answer(*parts)

    return handler


def once(*parts: bytes) -> Handler:
    """Answers one request, then closes."""

    async def handler(peer: Peer) -> None:
        await peer.answer(*parts)

    return handler


def then_silent(*parts: bytes) -> Handler:
    """Answers one request, then sends nothing until the client closes."""

    async def handler(peer: Peer) -> None:
        await peer.answer(*parts)
        await peer.gone()

    return handler


def post(url: str, content: bytes = b"{}", **timeout: float) -> httpx.Request:
    return httpx.Request("POST", url, content=content, extensions={"timeout": timeout})


class Recorder:
    """A Sink that records its calls; `finish` waits for the end."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.ends: list[httpx.TransportError | None] = []
        self.ended = asyncio.Event()

    def data(self, data: bytes) -> None:
        assert not self.ends, "data after the end"
        assert data, "an empty part"
        self.parts.append(data)

    def end(self, error: httpx.TransportError | None) -> None:
        self.ends.append(error)
        self.ended.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def error(self) -> httpx.TransportError | None:
        assert len(self.ends) == 1, self.ends
        return self.ends[0]

    async def finish(self) -> Recorder:
        async with asyncio.timeout(LIVENESS):
            await self.ended.wait()
        return self


@dataclass
class Certificates:
    """A test CA, and TLS contexts for servers with its certificates."""

    ca: trustme.CA = field(default_factory=trustme.CA)

    def server(self, *names: str, **options: Any) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(*names, **options).configure_cert(context)
        return context

    @functools.cached_property
    def client(self) -> ssl.SSLContext:
        """Trusts this CA alone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.ca.configure_trust(context)
        return context


# ---- real servers: each answers the same paths, as a process that prints its port ---------------------------------

TREE = {"/fixed": b"hello", "/big": b"0123456789abcdef" * 65536, "/nothing": b""}
PARTS = [b"data: %d\n\n" % i for i in range(20)]
PATHS = [*TREE, "/parts", "/none", "/unmodified", "/close", "/echo", "/repeated", "/missing"]


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """Serves the paths as an ASGI application, for uvicorn."""
    assert scope["type"] == "http"
    path, body, more = scope["path"], b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    status = {"/none": 204, "/unmodified": 304, "/missing": 404}.get(path, 200)
    content = body if path == "/echo" else TREE.get(path, b"")
    headers = [(b"content-length", b"%d" % len(content))] if path in TREE or path == "/echo" else []
    if path == "/close":
        headers.append((b"connection", b"close"))
    if path == "/repeated":
        headers += [(b"Set-Cookie", b"a=1"), (b"x-other", b"between"), (b"Set-Cookie", b"b=2")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for part in PARTS if path == "/parts" else []:
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": content})


def serve_uvicorn(http: str) -> None:
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(asgi, http=http, lifespan="off", log_level="error", ws="none")
    uvicorn.Server(config).run(sockets=[listener])


def serve_aiohttp() -> None:
    from aiohttp import web

    async def handle(request: web.Request) -> web.StreamResponse:
        path, body = request.path, await request.read()
        if path == "/parts":
            response = web.StreamResponse()
            await response.prepare(request)
            for part in PARTS if request.method == "GET" else []:
                await response.write(part)
            return response
        status = {"/none": 204, "/unmodified": 304, "/missing": 404}.get(path, 200)
        whole = web.Response(status=status, body=body if path == "/echo" else TREE.get(path, b""))
        if path == "/close":
            whole.force_close()
        if path == "/repeated":
            whole.headers.add("Set-Cookie", "a=1")
            whole.headers.add("Set-Cookie", "b=2")
        return whole

    async def main() -> None:
        application = web.Application(client_max_size=1 << 24)
        application.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())


def serve_standard_library() -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Paths(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Silent."""

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status = {"/none": 204, "/unmodified": 304, "/missing": 404}.get(self.path, 200)
            content = body if self.path == "/echo" else TREE.get(self.path, b"")
            self.send_response(status)
            if self.path == "/parts":
                self.send_header("Transfer-Encoding", "chunked")
                content = b"".join(chunk(part) for part in PARTS) + b"0\r\nX-Trailer: dropped\r\n\r\n"
            elif self.path == "/close":
                self.close_connection = True  # and no length: the body ends with the connection
                content = b"until the end"
            elif status == 200:
                self.send_header("Content-Length", str(len(content)))
            elif status == 404:
                self.send_header("Content-Length", "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = answer  # noqa: N815  # the names that http.server calls

    server = ThreadingHTTPServer(("127.0.0.1", 0), Paths)
    print(server.server_address[1], flush=True)
    server.serve_forever()


NODE = """
const tree = {'/fixed': 'hello', '/big': '0123456789abcdef'.repeat(65536), '/nothing': ''}
const server = require('http').createServer(async (request, response) => {
  const parts = []
  for await (const part of request) parts.push(part)
  const path = request.url
  response.statusCode = {'/none': 204, '/unmodified': 304, '/missing': 404}[path] ?? 200
  if (path in tree) response.setHeader('Content-Length', tree[path].length)
  if (path === '/close') response.setHeader('Connection', 'close')
  if (path === '/repeated') response.setHeader('Set-Cookie', ['a=1', 'b=2'])
  if (path === '/parts' && request.method === 'GET') {
    response.writeEarlyHints({link: '</style.css>; rel=preload; as=style'})
    response.setHeader('Trailer', 'X-Trailer')
    for (let i = 0; i < 20; i++) {
      response.write(`data: ${i}\\n\\n`)
      await new Promise(setImmediate)
    }
    response.addTrailers({'X-Trailer': 'dropped'})
  }
  response.end(path === '/echo' ? Buffer.concat(parts) : tree[path])
})
server.listen(0, '127.0.0.1', () => console.log(server.address().port))
"""

NGINX = """\
    server {{
        listen {plain}; listen {tls} ssl;
        ssl_certificate {folder}/chain.pem; ssl_certificate_key {folder}/key.pem;
        root {folder}/tree; client_max_body_size 100k;
        error_page 405 =200 $uri;
        location = /parts {{ ssi on; ssi_types *; }}
        location = /none {{ return 204; }}
        location = /unmodified {{ return 304; }}
        location = /close {{ keepalive_timeout 0; return 200 bye; }}
        location = /repeated {{ add_header Set-Cookie a=1; add_header Set-Cookie b=2; return 200 x; }}
        location = /echo {{ proxy_pass http://{plain}/fixed; proxy_method GET; }}
    }}
"""


@contextlib.contextmanager
def process(*command: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


@contextlib.contextmanager
def real_server(kind: str, folder: Path, certificates: Certificates) -> Iterator[str]:
    """Runs a server of this kind; yields its URL."""
    if kind.startswith("nginx"):
        with serving_nginx(folder, certificates) as (plain, tls):
            yield f"http://{plain}" if kind == "nginx" else f"https://{tls}"
        return
    command = ["node", "-e", NODE] if kind == "node" else [sys.executable, "-m", "support.transport_servers", kind]
    with process(*command, cwd=Path(__file__).parents[1]) as running:
        assert running.stdout is not None
        yield f"http://127.0.0.1:{int(running.stdout.readline())}"


@contextlib.contextmanager
def serving_nginx(folder: Path, certificates: Certificates) -> Iterator[list[str]]:
    """Runs nginx; yields its addresses, without and with TLS."""
    tree = folder / "tree"
    tree.mkdir()
    for path, content in {**TREE, "/parts": b"".join(PARTS)}.items():
        (tree / path[1:]).write_bytes(content)
    certificate = certificates.ca.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(folder / "chain.pem", append=True)
    with nginx.listening(2) as listeners:
        places = ["{}:{}".format(*listener.getsockname()) for listener in listeners]
        http = NGINX.format(folder=folder, plain=places[0], tls=places[1])
        with nginx.serving(folder, http, listeners):
            yield places


REAL = {
    "uvicorn-h11": lambda: serve_uvicorn("h11"),
    "uvicorn-httptools": lambda: serve_uvicorn("httptools"),
    "aiohttp": serve_aiohttp,
    "http.server": serve_standard_library,
}
REAL_SERVERS = [
    *(pytest.param(kind, marks=pytest.mark.process) for kind in REAL),
    pytest.param("node", marks=pytest.mark.node),
    *(pytest.param(kind, marks=pytest.mark.nginx) for kind in ("nginx", "nginx-tls")),
]

if __name__ == "__main__":
    REAL[sys.argv[1]]()
