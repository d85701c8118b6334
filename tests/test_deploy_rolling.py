"""A new version under load: two instances behind the shipped site are restarted in turn, and nobody notices.

By default a tenth of it; CHAT_PROXY_FULL=1 runs 200 questions a second through 20 restarts, each way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from harness import (
    DONE,
    PATIENCE,
    Peer,
    ScriptedUpstream,
    delta,
    environment,
    eventually,
    finish,
    free_port,
    random_key,
)
from nginx import HOST, Front, Site, front
from nginx_clients import JSON, QUESTION
from test_cli import COMMAND
from test_deploy_nginx import moved

FULL = os.environ.get("CHAT_PROXY_FULL") == "1"
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
            probe.settimeout(PATIENCE)
            try:
                probe.connect(str(self.path) if self.door else ("127.0.0.1", self.port))
            except ConnectionRefusedError:
                return False
            probe.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
            return probe.recv(99).startswith(b"HTTP/1.1 200 ")

    def restart(self) -> None:
        """As `systemctl restart` does it: told to end, awaited, started; then asked until it is ready."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE * 3) == 0
        self.process = self.start()
        eventually(self.is_ready, PATIENCE * 3)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.door:
            self.door.close()


@dataclass
class Crowd:
    """Questions at a steady rate, and how each of them went."""

    site: Front
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    async def ask(self, client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        try:
            extensions = {"sni_hostname": HOST}
            answer = await client.post("/api/chat", json=QUESTION, headers=JSON, extensions=extensions)
        except httpx.HTTPError as error:
            self.outcomes[f"{type(error).__name__}: {error}"] += 1
        else:
            whole = answer.status_code == 200 and answer.content == WHOLE
            self.outcomes["whole" if whole else f"{answer.status_code}: {answer.content[-200:]!r}"] += 1
            self.seconds.append(time.monotonic() - began)

    async def run(self, until: asyncio.Future[None]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(
                base_url=f"https://127.0.0.1:{self.site.port}",
                headers={"host": HOST},
                verify=self.site.trust,
                timeout=PATIENCE * 3,
                limits=limits,
                trust_env=False,
            ) as client,
            asyncio.TaskGroup() as tasks,
        ):
            began, sent = time.monotonic(), 0
            while not until.done():
                while sent < (time.monotonic() - began) * RATE:
                    tasks.create_task(self.ask(client))
                    sent += 1
                await asyncio.sleep(0.5 / RATE)


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
            eventually(instance.is_ready, PATIENCE * 3)
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
            restarted = asyncio.ensure_future(asyncio.to_thread(restart_in_turn, both))
            await crowd.run(restarted)
            await restarted

        asyncio.run(play())
        again = Counter(moved(site))
        assert crowd.outcomes.keys() == {"whole"}, crowd.outcomes
        assert len(upstream.seen) == crowd.outcomes["whole"]
        assert again.keys() <= {"503, 200", "502, 200"}
    if FULL:
        crowd.seconds.sort()
        figures = f"{RESTARTS} at {RATE}/s, {len(crowd.seconds)} answers; asked elsewhere: {dict(again)}; "
        figures += f"median {crowd.seconds[len(crowd.seconds) // 2]:.2f} s, slowest {crowd.seconds[-1]:.2f} s"
        with capsys.disabled():
            print(f"\nrolling restarts ({door}): {figures}")


def restart_in_turn(both: list[Instance]) -> None:
    for number in range(RESTARTS):
        both[number % 2].restart()
