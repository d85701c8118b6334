"""The commands as a shell sees them: real processes, their exit codes, what they print, and how signals end them."""

from __future__ import annotations

import asyncio
import fcntl
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from support.commands import (
    COMMAND,
    HELLO,
    begun,
    chat,
    exchange,
    run,
    serving,
    settings_for,
    started,
    url_printed,
)
from support.harness import (
    DONE,
    GOOD,
    PATIENCE,
    STARTING,
    Peer,
    Script,
    ScriptedUpstream,
    delta,
    environment,
    eventually,
    free_port,
    pieces,
    random_key,
    streaming,
)
from support.stage import Steps

from proxy import __version__, settings
from proxy.cli import admin
from proxy.demo import request as demo_request

pytestmark = [pytest.mark.process]

PIPE = 4096  # bytes, the smallest that Linux gives
MODELS_LIST = b'{"object":"list","data":[]}'


def answering(status: str, body: bytes) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.whole(body, status)

    return script


# ---- usage --------------------------------------------------------------------------------------------------------

USAGE_ERRORS: dict[str, list[str]] = {
    "no command": [],
    "unknown command": ["start"],
    "unknown option": ["serve", "--port", "1"],
    "option without its value": ["serve", "--config"],
    "an argument too many": ["new-secret", "now"],
    "word for a port": ["demo", "--port", "http"],
    "port out of range": ["demo", "--port", "65536"],
    "negative port": ["upstream", "--port=-1"],
    "negative delay": ["upstream", "--delay-ms=-1"],
    "no number for a delay": ["upstream", "--delay-ms", "nan"],
}


@pytest.mark.parametrize("label", USAGE_ERRORS)
def test_usage_error(label: str, tmp_path: Path) -> None:
    """A command line that cannot be meant is told the usage on stderr, and exits 2."""
    done = run(tmp_path, *USAGE_ERRORS[label])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: chat-proxy")


def test_no_command(tmp_path: Path) -> None:
    """Without a command all commands are listed."""
    done = run(tmp_path)
    for command in ("demo", "serve", "check", "init", "sessions"):
        assert re.search(rf"(?m)^    {command} ", done.stderr)


VALUES = {
    "word for a port": (["demo", "--port", "http"], "--port: must be a port, from 0 to 65535"),
    "port out of range": (["upstream", "--port", "65536"], "--port: must be a port, from 0 to 65535"),
    "no number for a delay": (["upstream", "--delay-ms", "soon"], "--delay-ms: must be milliseconds, up to an hour"),
    "address without a scheme": (["check", "--url", "chat.example.org"], "--url: must be an origin like https://"),
    "word for a time": (
        ["sessions", "revoke", "--before", "noon"],
        "--before: must be a time that is past, like 2026-",
    ),
    "time to come": (["sessions", "revoke", "--before", "9999-12-31"], "--before: must be a time that is past"),
    "nobody": (["sessions", "revoke", "--user", ""], "--user: must be a name, in UTF-8"),
    "a name that is no text": (["sessions", "revoke", "--user", "a\udcff"], "--user: must be a name, in UTF-8"),
    "time before times": (["sessions", "revoke", "--before", "0001-01-01"], "--before: must be a time that is past"),
}


@pytest.mark.parametrize("label", VALUES)
def test_value_that_an_option_cannot_have(label: str, tmp_path: Path) -> None:
    """It is told what would be right, in the user's words and not in those of our code."""
    arguments, wanted = VALUES[label]
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert wanted in done.stderr


def test_version(tmp_path: Path) -> None:
    """--version prints the version and exits 0."""
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"chat-proxy {__version__}\n", "")


def test_installed_command(tmp_path: Path) -> None:
    """The package installs the command `chat-proxy`, which is the same."""
    done = subprocess.run(
        [Path(sys.executable).with_name("chat-proxy"), "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=STARTING,
    )
    assert (done.returncode, done.stdout) == (0, f"chat-proxy {__version__}\n")


# ---- a reader that has gone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "code"), [("new-secret", 2), ("--help", 0)])
def test_reader_who_has_left(command: str, code: int, tmp_path: Path) -> None:
    """A closed pipe (`| head -1`) is not reported as an error."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        done = subprocess.run(
            [*COMMAND, command], stdout=output, stderr=subprocess.PIPE, env=environment(), timeout=STARTING
        )
    assert (done.returncode, done.stderr) == (code, b"")


def test_output_that_does_not_fit(tmp_path: Path) -> None:
    """A secret that could not be written is told, and is no success."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "new-secret"], stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=STARTING
        )
    assert (done.returncode, done.stderr) == (2, b"chat-proxy: No space left on device\n")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_serving_without_standard_streams(closed: str, tmp_path: Path) -> None:
    """What a server was started without, it does without: it serves, and no visitor's socket takes the log."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND]
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        serving(tmp_path, upstream.base_url, command=command) as process,
    ):
        for _ in range(3):
            assert chat(process) == b"".join(GOOD)
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0


def test_interrupted_check(tmp_path: Path) -> None:
    """Ctrl-C ends a command that waits at once, without a word of Python's."""
    waiting = threading.Event()

    async def silent(peer: Peer) -> None:
        await peer.request()
        waiting.set()
        await peer.gone()

    with ScriptedUpstream(silent) as upstream:
        given = settings_for(upstream.base_url)
        with started(tmp_path, "check", given=given) as process:
            assert waiting.wait(STARTING)
            process.tell(signal.SIGINT)
            assert process.exit_code() == -signal.SIGINT


# ---- making -------------------------------------------------------------------------------------------------------


def test_new_secret(tmp_path: Path) -> None:
    """new-secret prints one fresh secret each time, which is accepted as session.secret."""
    made = [run(tmp_path, "new-secret").stdout for _ in range(2)]
    assert made[0] != made[1]
    for line in made:
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", line)
        assert settings.session_keys(line) == line.strip()


def test_init_writes_a_file_that_works(tmp_path: Path) -> None:
    """init writes chat-proxy.toml; with the key in the environment `check` finds nothing wrong in it."""
    done = run(tmp_path, "init")
    assert (done.returncode, done.stderr) == (0, "")
    assert "chat-proxy.toml" in done.stdout
    with ScriptedUpstream(answering("200 OK", MODELS_LIST)) as upstream:
        checked = run(tmp_path, "check", UPSTREAM_API_KEY=random_key(), UPSTREAM_BASE_URL=upstream.base_url)
        assert (checked.returncode, checked.stderr) == (0, "")
    assert run(tmp_path, "check").returncode == 2  # the key, and only the key, is missing
    chosen = settings.load(str(tmp_path / "chat-proxy.toml"), environment(UPSTREAM_API_KEY=random_key()))
    assert chosen.upstream.base_url == "https://api.selamgpt.com/v1"


def test_init_names_only_real_settings(tmp_path: Path) -> None:
    """What init's file holds in comments is accepted when it is uncommented, and its active lines are the defaults."""
    file = tmp_path / "all.toml"
    file.write_text(re.sub(r"(?m)^# (\w+ = )", r"\1", admin.TEMPLATE), encoding="utf-8")
    given = environment(UPSTREAM_API_KEY=random_key(), SESSION_SECRET="s" * 43)
    chosen = settings.load(str(file), given)
    assert chosen.server.public_url == "https://chat.example.org"
    assert chosen.limits.tokens_total
    file.write_text(admin.TEMPLATE, encoding="utf-8")
    plain = settings.from_variables(environment(**settings_for("https://x"), SESSION_SECRET="s" * 43))
    chosen = settings.load(str(file), given)
    assert (chosen.server, chosen.limits) == (plain.server, plain.limits)
    assert chosen.policy.max_output_tokens == plain.policy.max_output_tokens


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    """init leaves a chat-proxy.toml that is there as it is, says so and exits 2."""
    file = tmp_path / "chat-proxy.toml"
    file.write_text("mine", encoding="utf-8")
    done = run(tmp_path, "init")
    assert (done.returncode, done.stdout) == (2, "")
    assert "chat-proxy.toml" in done.stderr
    assert file.read_text(encoding="utf-8") == "mine"


def test_init_where_nothing_can_be_written() -> None:
    """init says what could not be written, not only that something could not."""
    done = run(Path("/proc"), "init")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "chat-proxy: chat-proxy.toml cannot be written: No such file or directory\n"


# ---- check --------------------------------------------------------------------------------------------------------


def test_check_finds_nothing(tmp_path: Path) -> None:
    """check with good settings and a good upstream says ok, exits 0, and made one call: GET /models with the key."""
    with ScriptedUpstream(answering("200 OK", MODELS_LIST)) as upstream:
        given = {**settings_for(upstream.base_url), "LIMITS_TOKENS_TOTAL": "1000000/day"}
        done = run(tmp_path, "check", **given)
        assert (done.returncode, done.stderr) == (0, "")
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok", "ok"]
        (seen,) = upstream.seen
        assert seen.head.startswith(b"GET /v1/models HTTP/1.1\r\n")
        assert seen.headers["authorization"] == f"Bearer {given['UPSTREAM_API_KEY']}"
        assert seen.body == b""


def test_check_warns_without_a_total(tmp_path: Path) -> None:
    """While tokens_total is unset check warns that nothing bounds the bill; a warning is no fault."""
    with ScriptedUpstream(answering("200 OK", MODELS_LIST)) as upstream:
        done = run(tmp_path, "check", **settings_for(upstream.base_url))
    assert done.returncode == 0
    warning = next(line for line in done.stdout.splitlines() if line.startswith("warning"))
    assert warning.split()[1] == "limits.tokens_total"


def test_check_warns_of_a_door_that_is_open(tmp_path: Path) -> None:
    """With neither list set, every account at the provider may log in."""
    given = {"SESSION_MODE": "oidc", "OIDC_ISSUER": "https://id.example", "OIDC_CLIENT_ID": "c"}
    with ScriptedUpstream(answering("200 OK", MODELS_LIST)) as upstream:
        done = run(tmp_path, "check", **settings_for(upstream.base_url), **given, OIDC_CLIENT_SECRET="s")
        assert "warning  oidc.allowed_emails" in done.stdout
        given["OIDC_ALLOWED_DOMAINS"] = "example.org"
        done = run(tmp_path, "check", **settings_for(upstream.base_url), **given, OIDC_CLIENT_SECRET="s")
        assert "oidc.allowed_emails" not in done.stdout


LISTS: dict[str, tuple[bytes, bool]] = {
    "without it": (b'{"object":"list","data":[{"id":"m-2"},{"id":"other"}]}', True),
    "with it": (b'{"object":"list","data":[{"id":"m-2"},{"id":"m"}]}', False),
    "empty": (MODELS_LIST, False),
    "no list": (b'{"models":["m-2"]}', False),
    "no JSON": (b"<html>\xff", False),
    "deep": (b'{"x":' + b"[" * 100_000, False),
}


@pytest.mark.parametrize("label", LISTS)
def test_check_warns_of_a_model_that_is_not_listed(label: str, tmp_path: Path) -> None:
    """A model that the upstream's list does not have is mostly a slip of the pen, but lists have gaps: no fault. A list
    that cannot be read says nothing."""
    body, warns = LISTS[label]
    with ScriptedUpstream(answering("200 OK", body)) as upstream:
        done = run(tmp_path, "check", **settings_for(upstream.base_url))
    assert done.returncode == 0
    assert ("warning  policy.models: the upstream does not list m\n" in done.stdout) == warns
    assert ("policy.models" in done.stdout) == warns


def test_check_warns_of_a_limit_below_one_answer(tmp_path: Path) -> None:
    """A token limit that no answer fits into is valid, and yet never meant."""
    with ScriptedUpstream(answering("200 OK", b"{}")) as upstream:
        given = {"LIMITS_TOKENS_TOTAL": "1000000/day", "LIMITS_TOKENS_PER_SESSION": "4000/day"}
        done = run(tmp_path, "check", **settings_for(upstream.base_url), **given)
    assert done.returncode == 0
    assert "warning  limits.tokens_per_session allows less than one answer" in done.stdout


def test_check_tells_all_faults_of_settings(tmp_path: Path) -> None:
    """Faults in the settings are told all at once on stderr, with their number, without a secret; check exits 2 and
    does not call the upstream."""
    canary = random_key()
    with ScriptedUpstream(answering("200 OK", MODELS_LIST)) as upstream:
        given = {
            **settings_for(upstream.base_url),
            "SERVER_PORT": canary,
            "SESSION_SECRET": "canary",
            "LOG_LEVLE": "info",
        }
        done = run(tmp_path, "check", **given)
        assert upstream.seen == []
    assert (done.returncode, done.stdout) == (2, "")
    assert "3 fault(s)" in done.stderr
    for name in ("server.port", "session.secret", "CHAT_PROXY_LOG_LEVLE", "CHAT_PROXY_LOG_LEVEL"):
        assert name in done.stderr
    for secret in (canary, "canary", given["UPSTREAM_API_KEY"]):
        assert secret not in done.stderr


UPSTREAM_FAULTS = {
    "wrong key": ("401 Unauthorized", "upstream_auth"),
    "no access": ("403 Forbidden", "upstream_auth"),
    "wrong address": ("404 Not Found", "upstream_rejected"),
    "moved": ("301 Moved Permanently", "upstream_protocol"),
    "broken": ("500 Internal Server Error", "upstream_error"),
}


@pytest.mark.parametrize("label", UPSTREAM_FAULTS)
def test_check_tells_an_upstream_fault(label: str, tmp_path: Path) -> None:
    """An upstream that refuses is a fault, told with our code and its status; check exits 1 and shows nothing of what
    the upstream said, the key least of all."""
    status, code = UPSTREAM_FAULTS[label]
    given = settings_for("")
    key = given["UPSTREAM_API_KEY"]
    with ScriptedUpstream(answering(status, json.dumps({"error": {"code": key, "message": key}}).encode())) as upstream:
        done = run(tmp_path, "check", **{**given, "UPSTREAM_BASE_URL": upstream.base_url})
        assert len(upstream.seen) == 1
    assert (done.returncode, done.stderr) == (1, "")
    fault = done.stdout.splitlines()[-1]
    assert fault.startswith(f"fault    upstream: {code} (upstream status {status[:3]})")
    assert "/chat/completions" in fault  # what base_url must not end in
    assert not any(piece in done.stdout for piece in pieces(key))


def test_check_without_an_upstream(tmp_path: Path) -> None:
    """An upstream that is not there is a fault; check exits 1."""
    done = run(tmp_path, "check", **settings_for(f"http://127.0.0.1:{free_port()}/v1"))
    assert (done.returncode, done.stderr) == (1, "")
    assert "upstream_unreachable (ConnectError: Connection refused)" in done.stdout.splitlines()[-1]


def test_check_of_a_silent_upstream(tmp_path: Path) -> None:
    """An upstream that does not answer in first_byte_timeout is a fault; check exits 1."""

    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.gone()

    with ScriptedUpstream(silent) as upstream:
        done = run(tmp_path, "check", **settings_for(upstream.base_url), UPSTREAM_FIRST_BYTE_TIMEOUT="0.2")
    assert (done.returncode, done.stderr) == (1, "")
    assert "upstream_timeout" in done.stdout.splitlines()[-1]


# ---- serve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "check"])
def test_missing_config(command: str, tmp_path: Path) -> None:
    """A --config that is not there is a fault that names it; exit 2."""
    done = run(tmp_path, command, "--config", "nowhere.toml", **settings_for("https://api.example.com"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.toml" in done.stderr


def test_serve_reads_its_config(tmp_path: Path) -> None:
    """serve takes its settings from --config, secrets from the environment, and logs JSON lines to stdout: first where
    it listens, so that nobody waits before a screen that stays empty."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        port = free_port()
        written = f'[server]\nport = {port}\n[upstream]\nbase_url = "{upstream.base_url}"\n[policy]\nmodels = ["m"]\n'
        (tmp_path / "my.toml").write_text(written, encoding="utf-8")
        given = {"UPSTREAM_API_KEY": random_key()}
        with started(tmp_path, "serve", "--config", "my.toml", given=given) as process:
            process.port = port
            eventually(process.answers, STARTING)
            assert chat(process) == b"".join(GOOD)
            process.tell(signal.SIGTERM)
            assert process.exit_code() == 0
    assert [line["event"] for line in process.logged()] == ["listening", "request", "draining"]
    first = process.logged()[0]
    assert (first["version"], first["at"]) == (__version__, f"127.0.0.1:{port}")
    assert first["public_url"] == f"http://127.0.0.1:{port}"
    assert process.stderr.read_bytes() == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signal_ends_an_idle_server(number: signal.Signals, tmp_path: Path) -> None:
    """A server with nothing to do ends at the first signal, with idle connections open, and exits 0."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, serving(tmp_path, upstream.base_url) as process:
        chat(process)
        with closing(process.connect()) as idle:
            exchange(idle, "/healthz")
            process.tell(number)
            assert process.exit_code() == 0


def test_stream_goes_on_after_the_first_signal(tmp_path: Path) -> None:
    """After the first Ctrl-C a live stream goes on, new work is refused and /readyz says so; the second ends the stream
    with the `draining` event, closes the upstream, and the server exits 0."""
    steps = Steps(delta("a"), delta("b"), ends=False)
    steps.allowed.release()
    with ScriptedUpstream(steps) as upstream, serving(tmp_path, upstream.base_url) as process:
        with closing(process.connect()) as connection, closing(begun(connection)) as answer:
            assert answer.read1() == delta("a")
            process.tell(signal.SIGINT)
            eventually(lambda: process.get("/readyz")[0] == 503)
            status, body = process.get("/api/v1/models")
            assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
            steps.allowed.release()
            assert answer.read1() == delta("b")
            process.tell(signal.SIGINT)
            last = answer.read()
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "draining"
        assert last.endswith(b"}\n\n")
        assert process.exit_code() == 0
        assert steps.left.wait(PATIENCE)
    assert [line["ending"] for line in process.logged() if line["event"] == "request" and line["ending"]] == ["drained"]


def test_drain_ends_with_the_last_stream(tmp_path: Path) -> None:
    """After one SIGTERM the server ends as soon as its last stream has, which is whole; it exits 0."""
    go_on = threading.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(GOOD[0])
        await asyncio.to_thread(go_on.wait, PATIENCE)
        for part in GOOD[1:]:
            await peer.chunk(part)
        await peer.end()

    with (
        ScriptedUpstream(script) as upstream,
        serving(tmp_path, upstream.base_url) as process,
        closing(process.connect()) as connection,
        closing(begun(connection)) as answer,
    ):
        assert answer.read1() == GOOD[0]
        process.tell(signal.SIGTERM)
        eventually(lambda: process.get("/readyz")[0] == 503)
        go_on.set()
        assert answer.read() == b"".join(GOOD[1:])
        assert process.exit_code() == 0


def test_drain_has_an_end(tmp_path: Path) -> None:
    """When drain_seconds are over, what still streams is ended with the event, and the server exits 0."""
    steps = Steps(delta("a"), delta("b"), ends=False)
    steps.allowed.release()
    with (
        ScriptedUpstream(steps) as upstream,
        serving(tmp_path, upstream.base_url, SERVER_DRAIN_SECONDS="0.2") as process,
        closing(process.connect()) as connection,
        closing(begun(connection)) as answer,
    ):
        assert answer.read1() == delta("a")
        process.tell(signal.SIGTERM)
        assert json.loads(answer.read().removeprefix(b"data: "))["error"]["code"] == "draining"
        assert process.exit_code() == 0
        steps.allowed.release()


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("127.0.0.1:8000", timeout=PATIENCE)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self.path))


def test_serve_on_a_unix_socket(tmp_path: Path) -> None:
    """server.socket is a socket for its owner and group only; a dead one is replaced."""
    path = tmp_path / "chat.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        given = {**settings_for(upstream.base_url), "SERVER_SOCKET": str(path)}
        with started(tmp_path, "serve", given=given) as process:

            def answer() -> tuple[int, bytes] | None:
                with closing(UnixConnection(path)) as connection:
                    try:
                        return exchange(connection, "/api/chat", **HELLO)
                    except (ConnectionRefusedError, FileNotFoundError):  # the dead one, none, or not listening yet
                        return None

            assert eventually(answer) == (200, b"".join(GOOD))
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            process.tell(signal.SIGTERM)
            assert process.exit_code() == 0
        assert process.logged()[0]["at"] == str(path)


@pytest.mark.parametrize("command", ["serve", "demo", "upstream"])
def test_busy_port(command: str, tmp_path: Path) -> None:
    """A port that another process has is told in plain words, with the port; exit 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        if command == "serve":
            done = run(tmp_path, "serve", **settings_for("https://api.example.com"), SERVER_PORT=port)
        else:
            done = run(tmp_path, command, "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot listen on port {port}: Address already in use" in done.stderr
    assert ("server.port:" if command == "serve" else "--port:") in done.stderr


def test_socket_that_somebody_listens_on(tmp_path: Path) -> None:
    """The socket of a server that is alive is not taken from it."""
    path = tmp_path / "chat.sock"
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        done = run(tmp_path, "serve", **settings_for("https://api.example.com"), SERVER_SOCKET=str(path))
        assert (done.returncode, path.is_socket()) == (2, True)
        assert "Address already in use" in done.stderr


PLACES = {
    "no folder": ("no/such/chat.sock", "No such file or directory"),
    "too long": ("s" * 200, "path too long"),
    "a file": ("file", "Address already in use"),
}


@pytest.mark.parametrize("label", PLACES)
def test_socket_that_cannot_be(label: str, tmp_path: Path) -> None:
    """A Unix socket that cannot be made is told in plain words, with the setting; exit 2, and a file there is left."""
    place, reason = PLACES[label]
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    done = run(tmp_path, "serve", **settings_for("https://api.example.com"), SERVER_SOCKET=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert "server.socket" in done.stderr
    assert reason in done.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_host_that_is_not_ours(host: str, tmp_path: Path) -> None:
    """An address that is not this machine's, or none, is told in plain words, with the setting; exit 2."""
    done = run(tmp_path, "serve", **settings_for("https://api.example.com"), SERVER_HOST=host)
    assert (done.returncode, done.stdout) == (2, "")
    assert "server.host: cannot listen on port 8000" in done.stderr


def test_sighup_reads_the_key_again(tmp_path: Path) -> None:
    """After SIGHUP the next request carries the key that its file holds now."""
    first, second = random_key(), random_key()
    file = tmp_path / "key"
    file.write_text(first, encoding="utf-8")
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        serving(tmp_path, upstream.base_url, UPSTREAM_API_KEY_FILE=str(file)) as process,
    ):
        chat(process)
        file.write_text(f"{second}\n", encoding="utf-8")
        process.tell(signal.SIGHUP)
        time.sleep(0.05)  # the signal's way; well within the second after which the file is looked at anyway
        chat(process)
        assert [seen.headers["authorization"] for seen in upstream.seen] == [f"Bearer {first}", f"Bearer {second}"]
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0


def test_metrics_listener(tmp_path: Path) -> None:
    """With metrics.port set, /metrics is served there, and goes on while the last streams do."""
    steps = Steps(delta("a"), delta("b"), ends=False)
    steps.allowed.release()
    port = free_port()
    with (
        ScriptedUpstream(steps) as upstream,
        serving(tmp_path, upstream.base_url, METRICS_PORT=str(port)) as process,
        closing(process.connect()) as connection,
        closing(begun(connection)) as answer,
    ):
        answer.read1()
        process.tell(signal.SIGTERM)
        eventually(lambda: process.get("/readyz")[0] == 503)
        status, body = process.get("/metrics", port)
        assert status == 200
        assert b"\nchat_proxy_streams_active 1.0\n" in body
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0
        steps.allowed.release()


def test_metrics_port_that_is_busy(tmp_path: Path) -> None:
    """A metrics port that another process has is told in plain words; exit 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = {**settings_for("https://api.example.com"), "METRICS_PORT": str(taken.getsockname()[1])}
        done = run(tmp_path, "serve", **given, SERVER_PORT=str(free_port()))
    assert (done.returncode, done.stdout) == (2, "")
    assert "metrics.port: cannot listen" in done.stderr


def test_log_that_nobody_reads(tmp_path: Path) -> None:
    """A server whose log pipe is full answers as ever, and still ends at a signal, with exit code 0."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE)
    try:
        with (
            ScriptedUpstream(streaming(*GOOD)) as upstream,
            serving(tmp_path, upstream.base_url, stdout=os.fdopen(writing, "wb")) as process,
        ):
            for _ in range(60):  # some 200 bytes a line
                assert process.get("/api/v1/models")[0] == 200
            time.sleep(0.1)  # so that the log hangs, and not only waits for its next batch
            assert chat(process) == b"".join(GOOD)
            process.tell(signal.SIGTERM)
            assert process.exit_code() == 0
    finally:
        os.close(reading)


def test_log_whose_reader_left(tmp_path: Path) -> None:
    """A server whose log pipe was closed answers as ever, and ends with exit code 0."""
    reading, writing = os.pipe()
    os.close(reading)
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        serving(tmp_path, upstream.base_url, stdout=os.fdopen(writing, "wb")) as process,
    ):
        for _ in range(3):
            assert chat(process) == b"".join(GOOD)
            time.sleep(0.06)  # a batch's time: each hits the closed pipe
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0


# ---- demo and upstream --------------------------------------------------------------------------------------------


def test_demo(tmp_path: Path) -> None:
    """demo needs no setting and heeds none; it prints its URL, serves the page and streams an answer; Ctrl-C ends it
    with exit code 0."""
    with started(tmp_path, "demo", "--port", "0", given={"SERVER_PORT": "x", "NONSENSE": "1"}) as process:
        assert url_printed(process) == f"http://127.0.0.1:{process.port}"
        eventually(process.answers, STARTING)
        status, page = process.get("/")
        assert status == 200
        assert b"<!doctype html>" in page.lower()
        assert [model["id"] for model in json.loads(process.get("/api/v1/models")[1])["data"]] == [*demo_request.MODELS]
        answer = chat(process)
        assert answer.startswith(b"data: {")
        assert answer.endswith(DONE)
        process.tell(signal.SIGINT)
        assert process.exit_code() == 0
    assert process.printed().count("\n") == 1
    assert re.search(
        r"(?m)^\d\d:\d\d:\d\d info    request .*ending=complete", process.stderr.read_text(encoding="utf-8")
    )


def test_upstream(tmp_path: Path) -> None:
    """upstream prints its base URL, answers anyone there, with no delay if so told, and ends with exit code 0."""
    with started(tmp_path, "upstream", "--port", "0", "--delay-ms", "0", given={}) as process:
        assert url_printed(process) == f"http://127.0.0.1:{process.port}/v1"
        assert "any key" in process.printed()
        with closing(process.connect()) as connection:
            status, body = exchange(connection, "/v1/chat/completions", **HELLO, model=demo_request.MODELS[0])
            assert status == 200
            assert body.endswith(DONE)
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0


@pytest.mark.parametrize("command", ["demo", "upstream"])
def test_a_cut_that_was_asked_for(command: str, tmp_path: Path) -> None:
    """An answer that is cut because its question said so is no fault of the demo model, and not told as one."""
    path = "/api/chat" if command == "demo" else "/v1/chat/completions"
    with started(tmp_path, command, "--port", "0", given={}) as process:
        url_printed(process)
        if command == "demo":
            eventually(process.answers, STARTING)
        with closing(process.connect()) as connection:
            asked = {"messages": [{"role": "user", "content": "/cut"}], "model": demo_request.MODELS[0], "stream": True}
            with suppress(http.client.IncompleteRead):
                assert not exchange(connection, path, **asked)[1].endswith(DONE)
        process.tell(signal.SIGTERM)
        assert process.exit_code() == 0
    assert "ASGI" not in process.stderr.read_text(encoding="utf-8")


@pytest.mark.parametrize("key", ["sk-mine", " "], ids=["a key", "a blank one"])
def test_upstream_with_a_key(key: str, tmp_path: Path) -> None:
    """With CHAT_PROXY_UPSTREAM_API_KEY set, upstream answers only to that key, which it does not print; set to nothing,
    it is not set."""
    with started(tmp_path, "upstream", "--port", "0", given={"UPSTREAM_API_KEY": key}) as process:
        url_printed(process)
        assert key.strip() == "" or key not in process.printed()
        assert process.get("/v1/models")[0] == (401 if key.strip() else 200)
        process.tell(signal.SIGINT)
        assert process.exit_code() == 0
