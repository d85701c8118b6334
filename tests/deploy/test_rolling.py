"""A new version under load: two instances behind the shipped site are restarted in turn, without a failed request.

By default a tenth of it; CHAT_PROXY_FULL=1 runs 200 questions a second through 20 restarts, each way.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from support.commands import COMMAND
from support.harness import (
    DONE,
    FULL,
    PATIENCE,
    STARTING,
    Peer,
    ScriptedUpstream,
    delta,
    environment,
    eventually,
    finish,
    free_port,
    random_key,
)
from support.nginx import HOST, Front, Site, front
from support.nginx_clients import QUESTION

from deploy.test_nginx import moved

pytestmark = [pytest.mark.nginx, pytest.mark.process]

RATE = 200 if FULL else 20  # questions a second
RESTARTS = 20 if FULL else 2
ANSWER = [delta(f"{number} ") for number in range(5)]
PACE = 0.05  # seconds between two events: an answer takes a quarter of a second, so many are live at each restart
WHOLE = b"".join([*ANSWER, finish(), DONE])

# What systemd does: the socket becomes descriptor 3, and the variables name the process that is about to be.
HANDING_OVER = """\
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "server"}
os.execv(sys.argv[2], sys.argv[2:])
"""

BODY = json.dumps(QUESTION).encode()
REQUEST = b"\r\n".join(
    [
        b"POST /api/chat HTTP/1.1",
        b"host: " + HOST.encode(),
        b"content-type: application/json",
        b"content-length: %d" % len(BODY),
        b"",
        BODY,
    ]
)

UNLIMITED = {
    "LIMITS_PER_SESSION": "1000000/minute",
    "LIMITS_PER_ADDRESS": "1000000/minute",
    "LIMITS_STREAMS_PER_SESSION": "100000",
    "LIMITS_STREAMS_PER_ADDRESS": "100000",
    "LIMITS_TOKENS_PER_SESSION": "",
    "LIMITS_TOKENS_PER_ADDRESS": "",
}


async def answering(peer: Peer) -> None:
    while True:
        await peer.request()
        await peer.head()
        for event in ANSWER:
            await peer.chunk(event)
            await asyncio.sleep(PACE)
        await peer.chunk(finish() + DONE)
        await peer.end()


class Instance:
    """One `chat-proxy serve`, on a port of its own, or on a socket that stays open while it restarts."""

    def __init__(self, folder: Path, name: str, settings: dict[str, str], *, handed: bool) -> None:
        self.path = folder / f"{name}.sock"
        self.log = folder / f"{name}.log"
        self.port = free_port()
        self.settings = {f"CHAT_PROXY_{key}": value for key, value in settings.items()}
        self.door: socket.socket | None = None
        if handed:
            self.door = socket.socket(socket.AF_UNIX)
            self.door.bind(str(self.path))
            self.door.listen(1024)
        self.process = self.start()

    @property
    def place(self) -> str:
        return f"unix:{self.path}" if self.door else f"127.0.0.1:{self.port}"

    def start(self) -> subprocess.Popen[bytes]:
        told = environment() | self.settings | {"CHAT_PROXY_SERVER_PORT": str(self.port)}
        command = [*COMMAND, "serve"]
        number: tuple[int, ...] = ()
        if self.door:
            number = (self.door.fileno(),)
            told["CHAT_PROXY_SERVER_TRUSTED_PROXIES"] = "unix"
            command = [sys.executable, "-c", HANDING_OVER, str(*number), *command]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=told, cwd=self.log.parent, stdout=log, stderr=log, pass_fds=number)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
        with socket.socket(socket.AF_UNIX if self.door else socket.AF_INET) as probe:
            probe.settimeout(PATIENCE * 3)
            try:
                probe.connect(str(self.path) if self.door else ("127.0.0.1", self.port))
            except ConnectionRefusedError:
                return False
            probe.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
            return probe.recv(99).startswith(b"HTTP/1.1 200 ")

    def restart(self) -> None:
        """As `systemctl restart` does it: told to end, awaited, started; then asked until it is ready."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(STARTING) == 0
        self.process = self.start()
        eventually(self.is_ready, STARTING)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.door:
            self.door.close()


@dataclass
class Crowd:
    """Questions at a steady rate over connections that are kept, and how each of them went.

    Written by hand: at this rate, a client library would be busier than all that it tests.
    """

    site: Front
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    open: dict[int, float] = field(default_factory=dict)
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    def oldest(self) -> float:
        """When the question was asked that waits for the end of its answer longest; from any thread."""
        return min(tuple(self.open.values()), default=math.inf)

    async def ask(self, number: int) -> None:
        try:
            async with asyncio.timeout(PATIENCE * 3):
                status, body = await self.exchange()
        except (OSError, asyncio.IncompleteReadError) as error:
            self.outcomes[f"{type(error).__name__}: {error}"] += 1
        else:
            self.outcomes["whole" if (status, body) == (200, WHOLE) else f"{status}: {body[-200:]!r}"] += 1
        self.seconds.append(time.monotonic() - self.open.pop(number))

    async def exchange(self) -> tuple[int, bytes]:
        """One question and its answer."""
        if self.idle:
            reader, writer = self.idle.pop()
        else:
            trust, port = self.site.trust, self.site.port
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname=HOST)
        writer.write(REQUEST)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"\r\ntransfer-encoding: chunked" in head:
            body = b""
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(int(head.partition(b"\r\ncontent-length: ")[2].split()[0]))
        if b"\r\nconnection: close" in head:
            writer.transport.abort()
        else:
            self.idle.append((reader, writer))
        return int(head.split()[1]), body

    async def run(self, until: asyncio.Future[None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            began, due, numbers = time.monotonic(), 0.0, count()
            while not until.done():
                now = (time.monotonic() - began) * RATE
                while due < now:
                    due += 1
                    if len(self.open) < RATE:  # a machine that has other work is not asked ever more at one time
                        number = next(numbers)
                        self.open[number] = time.monotonic()
                        tasks.create_task(self.ask(number))
                await asyncio.sleep(0.5 / RATE)
        for _, writer in self.idle:
            writer.transport.abort()  # nobody would be there for the last words of a TLS connection


@contextmanager
def instances(folder: Path, upstream: str, *, handed: bool) -> Iterator[list[Instance]]:
    settings = {
        "UPSTREAM_BASE_URL": upstream,
        "UPSTREAM_API_KEY": random_key(),
        "POLICY_MODELS": "m",
        "SERVER_PUBLIC_URL": f"https://{HOST}",
        "SESSION_SECRET": "s" * 43,
        **UNLIMITED,
    }
    with ExitStack() as stack:
        both = []
        for name in ("1", "2"):
            both.append(Instance(folder, name, settings, handed=handed))
            stack.callback(both[-1].close)
        for instance in both:
            eventually(instance.is_ready, STARTING)
        yield both


@pytest.mark.parametrize("door", ["port", "handed over"])
def test_rolling_restarts(door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every question asked meanwhile is answered whole: none refused, none cut, none asked of the model twice."""
    with (
        ScriptedUpstream(answering) as upstream,
        instances(tmp_path, upstream.base_url, handed=door == "handed over") as both,
        # all visitors of this test have one address
        front(
            tmp_path / "nginx",
            Site(
                [instance.place for instance in both],
                changes={"limit_conn chat_proxy_address 100;": "limit_conn chat_proxy_address 10000;"},
            ),
        ) as site,
    ):
        crowd = Crowd(site)

        async def play() -> None:
            restarted = asyncio.ensure_future(asyncio.to_thread(restart_in_turn, both, crowd))
            await crowd.run(restarted)
            await restarted

        began = time.monotonic()
        asyncio.run(play())
        took = time.monotonic() - began
        again = Counter(moved(site))
        assert crowd.outcomes.keys() == {"whole"}, crowd.outcomes
        assert len(upstream.seen) == crowd.outcomes["whole"]
        assert again.keys() <= {"503, 200", "502, 200"}
    if FULL:
        crowd.seconds.sort()
        figures = f"{RESTARTS} in {took:.0f} s at {len(crowd.seconds) / took:.0f}/s; asked elsewhere: {dict(again)}; "
        figures += f"median {crowd.seconds[len(crowd.seconds) // 2]:.2f} s, slowest {crowd.seconds[-1]:.2f} s"
        with capsys.disabled():
            print(f"\nrolling restarts ({door}): {figures}")


def restart_in_turn(both: list[Instance], crowd: Crowd) -> None:
    """One after the other, with the pause of deploy/README.md: the one that did their work meanwhile has answered those
    that could not ask the other, before it ends itself. Nobody else would be left to ask.
    """
    for number in range(RESTARTS):
        both[number % 2].restart()
        ready = time.monotonic()
        eventually(lambda: crowd.oldest() > ready, PATIENCE * 3)  # noqa: B023  # called here and now
