"""A real Redis server with fault injection. conftest.py makes the fixture `store` available to every test."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from proxy.limits.store import shared as store_module
from support.harness import PATIENCE, STARTING, eventually, free_port


class Redis:
    """A Redis server of the test, which can be stopped and frozen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command = ["redis-server", *options, "--dir", str(self.folder), "--unixsocket", str(self.folder / "redis.sock")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        eventually(self.answers, STARTING)

    def answers(self) -> bool:
        with suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=PATIENCE)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def redis_folder() -> Iterator[Path]:
    """A folder with a short path, since the path of a Unix socket is limited to about 100 bytes."""
    path = Path(tempfile.mkdtemp(prefix="chat-proxy-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def store(redis_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """A store with a long DEADLINE, so that a busy machine does not mark it as unavailable."""
    monkeypatch.setattr(store_module, "DEADLINE", PATIENCE)
    server = Redis(redis_folder)
    yield server
    server.stop()
