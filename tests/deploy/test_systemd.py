"""The shipped systemd units: systemd's own verdict on them, and its own tool handing a socket to the real command."""

from __future__ import annotations

import configparser
import http.client
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.commands import COMMAND, assert_calm, children, exchange, settings_for
from support.harness import (
    GOOD,
    PATIENCE,
    STARTING,
    ScriptedUpstream,
    environment,
    eventually,
    free_port,
    is_open,
    random_key,
    streaming,
)
from support.nginx import DEPLOY
from support.redis_server import Redis

from proxy import settings
from proxy.server.listener import WRITE_DEADLINE, listen
from proxy.server.runner import FLUSH
from proxy.server.service import LAST_EVENTS

pytestmark = [pytest.mark.nginx, pytest.mark.process, pytest.mark.redis, pytest.mark.tools]

UNITS = DEPLOY / "systemd"
PROGRAM = Path(sys.executable).with_name("chat-proxy")
MOST_EXPOSURE = 1.5  # of 10, as systemd-analyze counts it; without limits on who is talked to it cannot be below 0.7


# ---- the units ------------------------------------------------------------------------------------------------------


def analyze(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], cwd=folder, capture_output=True, text=True, timeout=PATIENCE
    )


def installed(folder: Path) -> list[str]:
    """The units as shipped, as their first instances, with the program where it is here."""
    names = []
    for unit in sorted(UNITS.glob("*@.*")):
        text = unit.read_text(encoding="utf-8")
        if unit.suffix == ".service":
            assert "/opt/chat-proxy/bin/chat-proxy" in text
            text = text.replace("/opt/chat-proxy/bin/chat-proxy", str(PROGRAM))
        (folder / unit.name).write_text(text, encoding="utf-8")
        names.append(unit.name.replace("@", "@1"))
    return names


def unit() -> configparser.ConfigParser:
    """The service, every key of it with all its values."""
    found = configparser.ConfigParser(dict_type=Gathered, strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's names have capitals
    found.read(UNITS / "chat-proxy@.service")
    return found


class Gathered(dict[str, Any]):
    """Keys that come twice keep both values, in lines."""

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, list) and key in self:
            value = [*self[key], *value]
        super().__setitem__(key, value)


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """systemd-analyze verify has nothing to say about any of them."""
    for name in installed(tmp_path):
        done = analyze("verify", f"./{name}", folder=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), name


def test_exposure(tmp_path: Path) -> None:
    """systemd-analyze security rates the service at 1.5 of 10 at most."""
    installed(tmp_path)
    done = analyze(
        "security", "--offline=yes", f"--threshold={MOST_EXPOSURE * 10:.0f}", "./chat-proxy@.service", folder=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


def test_the_units_words_are_settings_of_ours(tmp_path: Path) -> None:
    """What the service puts into the environment, its credentials and the shipped settings make one valid whole, and
    systemd waits longer than a drain may take."""
    service = unit()["Service"]
    credentials = [line.partition(":")[0] for line in service["LoadCredential"].splitlines()]
    for name, value in {"upstream_api_key": random_key(), "session_secret": "s" * 43}.items():
        assert name in credentials
        (tmp_path / name).write_text(value, encoding="utf-8")
    variables = dict(line.split("=", 1) for line in service["Environment"].splitlines())
    chosen = settings.load(
        str(DEPLOY / "chat-proxy.example.toml"), {**variables, "CREDENTIALS_DIRECTORY": str(tmp_path)}
    )
    assert chosen.session.secret == settings.Secret("s" * 43)
    assert chosen.server.trusted_proxies == ("unix",)
    assert chosen.limits.is_shared
    assert int(service["TimeoutStopSec"].removesuffix("s")) > chosen.server.drain_seconds + LAST_EVENTS + FLUSH
    assert service["RestartPreventExitStatus"] == "2"


# ---- real processes -------------------------------------------------------------------------------------------------


@contextmanager
def activated(folder: Path, places: list[str], names: str, **given: str) -> Iterator[subprocess.Popen[bytes]]:
    """`chat-proxy serve` as systemd starts it at the first connection to one of these places."""
    tool = shutil.which("systemd-socket-activate")
    assert tool, "tests/run installs systemd"
    variables = {f"CHAT_PROXY_{name}": value for name, value in given.items()}
    command = [tool, *(f"--listen={place}" for place in places), f"--fdname={names}"]
    command += [f"--setenv={name}={value}" for name, value in variables.items()]
    with (folder / "stderr").open("wb") as stderr, (folder / "stdout").open("wb") as stdout:
        process = subprocess.Popen(
            [*command, *COMMAND, "serve"], cwd=folder, env=environment(), stderr=stderr, stdout=stdout
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ended(process: subprocess.Popen[bytes], folder: Path) -> str:
    """What it said on stderr, its own end awaited."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(STARTING) == 0
    return (folder / "stderr").read_text(encoding="utf-8")


def test_serve_on_what_systemd_opened(tmp_path: Path) -> None:
    """The server and its metrics answer on the sockets handed over, and the settings' own places stay free."""
    port, metrics, unused = free_port(), free_port(), free_port()
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        given = settings_for(upstream.base_url) | {"SERVER_PORT": str(port), "METRICS_PORT": str(unused)}
        places = [f"127.0.0.1:{port}", f"127.0.0.1:{metrics}"]
        with activated(tmp_path, places, "server:metrics", **given) as process:
            eventually(lambda: is_open(port), STARTING)
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=STARTING)) as client:
                body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
                assert exchange(client, "/api/chat", **body) == (200, b"".join(GOOD))
            with closing(http.client.HTTPConnection("127.0.0.1", metrics, timeout=STARTING)) as client:
                status, text = exchange(client, "/metrics")
                assert (status, b"chat_proxy_streams_active" in text) == (200, True)
            assert not is_open(unused)
            assert_calm(ended(process, tmp_path))


def test_serve_on_a_path_that_systemd_opened(tmp_path: Path) -> None:
    """As deploy/systemd does it; the path is still there afterwards, for the next start."""
    path = tmp_path / "1.sock"
    given = settings_for("http://127.0.0.1:9/v1") | {"SERVER_TRUSTED_PROXIES": "unix"}
    with activated(tmp_path, [str(path)], "chat-proxy@1.socket", **given) as process:
        assert_ready(path)
        assert_calm(ended(process, tmp_path))
        assert path.exists()


def test_workers_share_what_systemd_opened(tmp_path: Path, store: Redis) -> None:
    """Several workers behind one door; ExecReload's SIGHUP replaces them, and the door serves on."""
    path = tmp_path / "1.sock"
    given = {"SERVER_TRUSTED_PROXIES": "unix", "SERVER_WORKERS": "2", "LIMITS_STORE": store.url}
    with activated(tmp_path, [str(path)], "server", **settings_for("http://127.0.0.1:9/v1"), **given) as process:
        assert_ready(path)
        eventually(lambda: len(children(process.pid)) == 2, STARTING)
        before = children(process.pid)
        process.send_signal(signal.SIGHUP)
        eventually(lambda: len(after := children(process.pid)) == 2 and not after & before, STARTING)
        assert_ready(path)
        assert_calm(ended(process, tmp_path))


def test_two_sockets_for_one_listener(tmp_path: Path) -> None:
    """What cannot be meant ends the start: exit 2, and one line that says so."""
    ports = [free_port(), free_port()]
    with activated(
        tmp_path,
        [f"127.0.0.1:{port}" for port in ports],
        "a:b",
        **settings_for("http://x.invalid/v1"),
        UPSTREAM_ALLOW_HTTP="1",
    ) as process:
        eventually(lambda: is_open(ports[0]), STARTING)
        assert process.wait(STARTING) == 2
    assert "2 sockets were passed for server" in (tmp_path / "stderr").read_text(encoding="utf-8")


def assert_ready(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(STARTING)  # the socket is there before the server
        eventually(lambda: client.connect_ex(str(path)) == 0, STARTING)  # the path exists before the listener
        client.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(99).startswith(b"HTTP/1.1 200 ")


def test_options_are_those_of_our_own_listeners() -> None:
    """The deadline that serve hands on is the one that listen() sets."""
    with listen(settings.Server(port=0)) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == WRITE_DEADLINE * 1000
