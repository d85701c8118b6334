"""The commands in the documents, run as they stand there, except for ports that other tests could use."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.commands import started, url_printed
from support.harness import GOOD, STARTING, ScriptedUpstream, environment, eventually, free_port, running, streaming

pytestmark = [pytest.mark.process]

ROOT = Path(__file__).resolve().parents[2]
INSTALLING = 300.0  # seconds for pip to download and install the pinned packages; with its cache it takes ten
NEEDED = ("proxy", "static", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


def block(document: str, begins: str) -> str:
    """The block of shell commands that begins like this."""
    found = re.findall(rf"(?ms)^```sh\n({re.escape(begins)}.*?)^```", (ROOT / document).read_text(encoding="utf-8"))
    assert len(found) == 1, found
    return str(found[0])


@contextmanager
def shell(script: str, folder: Path, variables: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The script while it runs, with its output in `folder`; then all that it started is stopped."""
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-ec", script], cwd=folder, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STARTING)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def fetched(url: str, **body: object) -> bytes:
    """The body of a response of status 200: to a GET, or to a POST of `body`."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=STARTING) as response:
        return bytes(response.read())


def test_the_demo_starts_from_nothing(tmp_path: Path) -> None:
    """The README's first command installs the pinned packages and the program, and serves the page and an answer."""
    for name in NEEDED:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    command = block("README.md", "python3 -m venv").strip()
    assert command.endswith(" demo")
    output = tmp_path / "output"
    with shell(f"{command} --port 0", tmp_path, environment()) as process:

        def opened() -> list[str]:
            assert process.poll() is None, output.read_text()
            return re.findall(r"http://127\.0\.0\.1:\d+", output.read_text())

        (url,) = eventually(opened, INSTALLING)[:1]
        assert b"<!doctype html>" in fetched(url).lower()
        answer = fetched(f"{url}/api/chat", messages=[{"role": "user", "content": "hello"}], stream=True)
        assert answer.endswith(b"data: [DONE]\n\n")


def test_a_server_is_set_up(tmp_path: Path) -> None:
    """`init`, a key, `check` and `serve`, one after the other, end in a server that is ready."""
    port = free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "upstream").mkdir()
    with started(tmp_path / "upstream", "upstream", "--port", "0", given={}) as upstream:
        base_url = url_printed(upstream)
        variables = environment(UPSTREAM_BASE_URL=base_url, SERVER_PORT=str(port)) | {"PATH": path}
        with shell(block("README.md", "chat-proxy init"), tmp_path, variables) as process:

            def is_ready() -> bool:
                assert process.poll() is None, (tmp_path / "output").read_text()
                try:
                    return b"ok" in fetched(f"http://127.0.0.1:{port}/readyz")
                except OSError:
                    return False

            eventually(is_ready, STARTING)
        upstream.tell(signal.SIGTERM)
        assert upstream.exit_code() == 0
    printed = (tmp_path / "output").read_text()
    assert "ok       settings: every value is valid" in printed
    assert "ok       upstream: it answers, and accepts the key" in printed
    assert (tmp_path / "chat-proxy.toml").exists()


def test_curl_is_a_client() -> None:
    """The curl command of docs/clients.md receives the stream."""
    command = block("docs/clients.md", "curl -N")
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url) as proxy:
        script = command.replace("http://127.0.0.1:8000", proxy.url)
        assert script != command
        done = subprocess.run(["sh", "-ec", script], env=environment(), capture_output=True, timeout=STARTING)
    assert done.stdout == b"".join(GOOD)
