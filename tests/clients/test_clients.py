"""The real clients, as users run them: the programs in tests/clients against the server, and the demo model behind it.

openai-js comes from the npm registry into a folder that is kept between runs; package-lock.json says what it must be.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import serving, started, url_printed
from support.harness import (
    DONE,
    Peer,
    Running,
    ScriptedUpstream,
    delta,
    environment,
    finish,
    random_key,
    running,
    streaming,
)
from support.npm import installed
from support.stage import always

from proxy.demo import model as demo
from proxy.demo import request as demo_request

pytestmark = [pytest.mark.node, pytest.mark.process, pytest.mark.tools]

CLIENTS = Path(__file__).parent
LONGEST = 60.0  # seconds for one program; they take one or two
DELAY = 0.01  # seconds between two tokens of the demo model
COMMANDS = {".py": [sys.executable], ".mjs": ["node"], ".sh": ["sh"]}
STREAMING = ["stream.py", "stream_async.py", "stream.mjs"]

HELLO = "hello"
ANSWER = demo.answer(HELLO, demo_request.Staging(), (), None)


@dataclass(frozen=True)
class Model:
    """The demo model as a process of its own."""

    base_url: str
    key: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    key, delay = random_key(), str(DELAY * 1000)
    command = ["upstream", "--port", "0", "--delay-ms", delay]
    with started(tmp_path_factory.mktemp("model"), *command, given={"UPSTREAM_API_KEY": key}) as process:
        yield Model(url_printed(process), key)


@pytest.fixture(scope="module")
def proxy(model: Model) -> Iterator[Running]:
    with running(model.base_url, key=model.key, POLICY_MODELS="demo,demo-fast") as proxy:
        yield proxy


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clients, with what they import beside them."""
    folder = tmp_path_factory.mktemp("clients")
    for program in CLIENTS.iterdir():
        if program.is_file():
            shutil.copy(program, folder)
    locked = [CLIENTS / file for file in ("package.json", "package-lock.json")]
    (folder / "node_modules").symlink_to(installed("clients", locked) / "node_modules")
    return folder


def ran(program: str, proxy_url: str, folder: Path, prompt: str = HELLO) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in environment().items() if not name.startswith("OPENAI_")}
    return subprocess.run(
        [*COMMANDS[Path(program).suffix], program, proxy_url, prompt],
        cwd=folder,
        env=ours | {"PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=LONGEST,
        check=False,
    )


def said(program: str, proxy_url: str, folder: Path, prompt: str = HELLO) -> str:
    """What a program printed that must not fail."""
    process = ran(program, proxy_url, folder, prompt)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def failed(program: str, proxy_url: str, folder: Path, prompt: str = HELLO) -> tuple[str, str]:
    """What a program printed before it failed, and the class and the code of the error."""
    process = ran(program, proxy_url, folder, prompt)
    assert process.returncode == 1
    name, code = process.stderr.partition(":")[0].split()
    return process.stdout, f"{name} {code}"


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", STREAMING)
def test_a_streamed_answer(program: str, proxy: Running, folder: Path) -> None:
    """The guide's loop (choices[0] of every chunk) prints the whole answer, with a made-up key; it never trips."""
    before = len(proxy.lines())
    assert said(program, proxy.url, folder) == ANSWER.text + "\n"
    line = proxy.line(before + 1)
    assert (line["ending"], line["route"]) == ("complete", "POST /api/v1/chat/completions")
    assert line["events"] == len(ANSWER.pieces) + 3  # the role, the finish_reason and [DONE]; no usage was asked for


@pytest.mark.parametrize("program", ["complete.py", "complete.mjs"])
def test_a_whole_answer(program: str, proxy: Running, folder: Path) -> None:
    """Without streaming, from the first model of /models."""
    before = len(proxy.lines())
    assert said(program, proxy.url, folder) == ANSWER.text + "\n"
    assert proxy.line(before + 2)["model"] == "demo"


@pytest.mark.parametrize("program", ["usage.py", "usage.mjs"])
def test_the_usage_chunk_comes_through(program: str, proxy: Running, folder: Path) -> None:
    """A client that asks for the usage gets its chunk, unaltered; the same numbers are booked."""
    before = len(proxy.lines())
    *answer, usage = said(program, proxy.url, folder).splitlines()
    assert "\n".join(answer) == ANSWER.text
    prompt, completion = (int(number) for number in usage.removesuffix(" tokens").split(" + "))
    assert completion == len(ANSWER.pieces)
    assert proxy.line(before + 1)["tokens"] == prompt + completion


def test_nobody_is_given_a_usage_unasked(folder: Path) -> None:
    """The upstream is not asked for what the client did not ask for: a chunk without choices would break its loop."""
    with ScriptedUpstream(streaming(delta("ok"), finish(), DONE)) as upstream:
        with running(upstream.base_url, POLICY_MODELS="demo") as proxy:
            assert said("stream.py", proxy.url, folder) == "ok\n"
        assert "stream_options" not in upstream.seen[0].json


# ---- endings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", STREAMING)
def test_a_truncated_answer_is_an_error(program: str, proxy: Running, folder: Path) -> None:
    """An answer that breaks off raises APIError in every client, after what came before it: none takes it for whole."""
    before = len(proxy.lines())
    printed, error = failed(program, proxy.url, folder, f"/cut {HELLO}")
    assert error == "APIError stream_interrupted"
    assert len(printed) > 10
    assert ANSWER.text.startswith(printed)
    assert proxy.line(before + 1)["ending"] == "truncated"
    assert len(proxy.lines()) == before + 1, "it was not asked again"


@pytest.mark.parametrize("program", STREAMING)
def test_an_answer_without_done_is_whole(program: str, folder: Path) -> None:
    """finish_reason without [DONE] is an end: no client raises."""
    with (
        ScriptedUpstream(streaming(delta("all of it"), finish())) as upstream,
        running(upstream.base_url, POLICY_MODELS="demo") as proxy,
    ):
        assert said(program, proxy.url, folder) == "all of it\n"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["stream.py", "stream.mjs"])
def test_our_rate_limit(program: str, model: Model, folder: Path) -> None:
    """A client over its limit gets its own RateLimitError, and at once: tomorrow is too long to wait."""
    settings = {"POLICY_MODELS": "demo", "LIMITS_PER_SESSION": "1/day"}
    with running(model.base_url, key=model.key, **settings) as proxy:
        assert said("complete.mjs", proxy.url, folder) == ANSWER.text + "\n"
        assert failed(program, proxy.url, folder) == ("", "RateLimitError rate_limited")
        assert proxy.line(2)["status"] == 429
        assert [line["code"] for line in proxy.lines() if line["status"] == 429] == ["rate_limited"]


@pytest.mark.parametrize("program", ["stream.py", "stream.mjs"])
def test_their_rate_limit(program: str, folder: Path) -> None:
    """The model's 429 is a RateLimitError too; what we have retried the client does not retry once more."""

    async def act(peer: Peer) -> None:
        await peer.whole(b"{}", "429 Too Many Requests", "application/json", "retry-after-ms: 20")

    with ScriptedUpstream(always(act)) as upstream, running(upstream.base_url, POLICY_MODELS="demo") as proxy:
        assert failed(program, proxy.url, folder) == ("", "RateLimitError upstream_rate_limited")
        assert len(upstream.seen) == 3


@pytest.mark.parametrize("program", ["stream.py", "stream.mjs"])
def test_a_model_that_is_not_offered(program: str, folder: Path) -> None:
    """A refusal of ours is the clients' own error class, with our code."""
    with ScriptedUpstream(streaming()) as upstream, running(upstream.base_url, POLICY_MODELS="another") as proxy:
        assert failed(program, proxy.url, folder) == ("", "BadRequestError model_not_allowed")
        assert not upstream.seen


# ---- curl, and both ends as processes -------------------------------------------------------------------------------


def test_curl_shows_events_as_they_come(model: Model, folder: Path, tmp_path: Path) -> None:
    """`curl -N` on /api/chat, the server a process of its own: the first event is there long before the last."""
    with serving(tmp_path, model.base_url, UPSTREAM_API_KEY=model.key, POLICY_MODELS="demo") as process:
        command = ["sh", str(folder / "stream.sh"), f"http://127.0.0.1:{process.port}", HELLO]
        with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as curl:
            assert curl.stdout is not None
            lines, times = [], []
            for line in curl.stdout:
                lines.append(line)
                times.append(time.monotonic())
        assert curl.returncode == 0
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0
        log = process.printed()
    events = [line.removeprefix("data: ") for line in lines if line != "\n"]
    assert events[-1] == "[DONE]\n"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == ANSWER.text
    assert times[-1] - times[0] > len(ANSWER.pieces) * DELAY / 2
    assert model.key not in log
    assert [json.loads(line)["ending"] for line in log.splitlines() if '"POST /api/chat"' in line] == ["complete"]


# ---- what is committed ----------------------------------------------------------------------------------------------


def test_the_lock_records_no_address() -> None:
    """package-lock.json says what openai-js must be (a version and a digest), not where it was found."""
    lock = json.loads((CLIENTS / "package-lock.json").read_text())
    wanted = json.loads((CLIENTS / "package.json").read_text())["dependencies"]
    packages = {name: found for name, found in lock["packages"].items() if name}
    assert {name.removeprefix("node_modules/"): found["version"] for name, found in packages.items()} == wanted
    assert all(found["integrity"].startswith("sha512-") for found in packages.values())
    assert "resolved" not in str(lock)
    assert "http" not in str(lock)
