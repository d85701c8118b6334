"""The commands as processes of their own: run to their end, or until they are told to end; and a client for these.

For what only a process shows: exit codes, signals, output, workers. A server that a test looks into is in harness.py.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from support.harness import FULL, STARTING, environment, eventually, free_port, random_key

COMMAND = [sys.executable, "-W", "error", "-m", "proxy"]
LONGEST = 3 * STARTING if FULL else STARTING  # seconds; at full size `check --slow` sits through 75 s of silence
HELLO = {"messages": [{"role": "user", "content": "hello"}], "stream": True}


def run(folder: Path, *arguments: str, **given: str) -> subprocess.CompletedProcess[str]:
    """One command to its end, in `folder`. Whatever it does, it shows no traceback and no warning of Python's."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment(**given), capture_output=True, text=True, timeout=LONGEST
    )
    assert_calm(done.stderr)
    return done


def assert_calm(stderr: str) -> None:
    for sign in ("Traceback", "Warning", "Exception ignored", "Fatal Python error", "was never"):
        assert sign not in stderr, stderr


def children(pid: int) -> set[int]:
    """The processes that this one has started, and not yet seen end."""
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


class Process:
    """A command that runs until it is told to end; its output goes to files, so it never waits for a reader."""

    def __init__(self, folder: Path, command: list[str], given: dict[str, str], stdout: IO[bytes]) -> None:
        self.stdout = folder / "stdout"
        self.stderr = folder / "stderr"
        self.port = 0  # set by whoever knows it
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment(**given), stdout=stdout, stderr=stderr, process_group=0
            )

    def printed(self) -> str:
        return self.stdout.read_text(encoding="utf-8")

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.printed().splitlines()]

    def tell(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(STARTING)

    def children(self) -> set[int]:
        return children(self.process.pid)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=STARTING)

    def get(self, path: str, port: int | None = None) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=STARTING)) as connection:
            return exchange(connection, path)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.stderr.read_text(encoding="utf-8")
        try:
            return self.get("/healthz")[0] == 200
        except ConnectionRefusedError:
            return False


@contextmanager
def started(
    folder: Path,
    *arguments: str,
    given: dict[str, str],
    stdout: IO[bytes] | None = None,
    command: list[str] = COMMAND,
) -> Iterator[Process]:
    """The process while it runs. It must end by itself, without a word of Python's on stderr."""
    with stdout or (folder / "stdout").open("wb") as output:
        process = Process(folder, [*command, *arguments], given, output)
    try:
        yield process
    finally:
        process.process.kill()  # nothing to one that has ended, as it should have
        process.process.wait()
    assert_calm(process.stderr.read_text(encoding="utf-8"))


@contextmanager
def serving(
    folder: Path,
    upstream: str,
    *arguments: str,
    stdout: IO[bytes] | None = None,
    command: list[str] = COMMAND,
    **given: str,
) -> Iterator[Process]:
    """`chat-proxy serve` on a free port, ready."""
    given = {**settings_for(upstream), "SERVER_PORT": str(free_port()), **given}
    with started(folder, "serve", *arguments, given=given, stdout=stdout, command=command) as process:
        process.port = int(given["SERVER_PORT"])
        eventually(process.answers, STARTING)
        yield process


def url_printed(process: Process) -> str:
    """The URL in what the process printed, once it has."""
    found = eventually(lambda: re.findall(r"http://127\.0\.0\.1:(\d+)(\S*)", process.printed()), STARTING)
    port, path = found[0]
    process.port = int(port)
    return f"http://127.0.0.1:{port}{path}"


def settings_for(upstream: str) -> dict[str, str]:
    return {"UPSTREAM_BASE_URL": upstream, "UPSTREAM_API_KEY": random_key(), "POLICY_MODELS": "m"}


def exchange(connection: http.client.HTTPConnection, path: str, **body: Any) -> tuple[int, bytes]:
    """Status and body of one request: a GET, or a POST of `body`."""
    ask(connection, path, **body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def ask(connection: http.client.HTTPConnection, path: str, **body: Any) -> None:
    headers = {"content-type": "application/json"} if body else {}
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)


def chat(process: Process) -> bytes:
    """One streamed answer, whole."""
    with closing(process.connect()) as connection:
        status, body = exchange(connection, "/api/chat", **HELLO)
    assert status == 200, body
    return body


def begun(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    """A streamed answer that has its head."""
    ask(connection, "/api/chat", **HELLO)
    answer = connection.getresponse()
    assert answer.status == 200
    return answer
