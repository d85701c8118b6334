"""The log: one JSON line a request, and separate lines for the events of an audit.

Rules:
1. A line contains names, numbers and codes: never a body, a cookie, a key, or a text from outside.
2. Logging never blocks the loop: lines wait in a bounded queue, and one thread writes them in batches. When the pipe is
   full or closed, lines are dropped and counted; the service continues, and logs the count once it can.
3. Every queued line is written, whatever its values: on one line, and without an error that ends the thread.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from proxy.settings import Log

QUEUE = 10_000  # lines: some seconds of a busy server, a few megabytes
BATCH_EVERY = 0.05  # seconds between two writes: one thread switch for many lines
HEAD = ("time", "level", "event")  # the fields of every line
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

encode = msgspec.json.Encoder().encode


class Output(Protocol):
    def write(self, data: bytes, /) -> object: ...
    def flush(self) -> object: ...


class Descriptor:
    """A file descriptor as an output, without Python's buffer: a thread that hangs in a write holds the buffer's lock,
    and the interpreter, which flushes at exit, would wait for that lock for ever.

    Only whole lines are written, at most as many as a pipe takes in one piece: several workers may share it.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, data: bytes, /) -> None:
        for part in in_pieces(data):
            left = memoryview(part)
            while left:
                try:
                    left = left[os.write(self.number, left) :]
                except BlockingIOError:  # the parent process made it non-blocking
                    select.select([], [self.number], [])

    def flush(self) -> None:
        """Nothing is buffered."""


def in_pieces(data: bytes) -> Iterator[bytes]:
    """Yields whole lines, as many at a time as fit in PIPE_BUF (pipe(7)); a longer line is its own piece."""
    start = 0
    while start < len(data):
        end = data.rfind(b"\n", start, start + select.PIPE_BUF) + 1 or data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end


class Logs:
    """The log of one server. `line` does not block; any thread may call it."""

    def __init__(self, configured: Log, output: Output | None = None) -> None:
        self.level = LEVELS[configured.level]
        self.render = as_json if configured.format == "json" else as_text
        self.output: Output = output if output is not None else Descriptor(sys.stdout.fileno())
        self.queue: deque[dict[str, Any]] = deque()
        self.dropped = 0
        self._reported = 0  # of the dropped lines
        self._wanted = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def line(self, event: str, level: str = "info", /, **fields: Any) -> None:
        """Queues one line; `fields` keep their order."""
        if LEVELS[level] < self.level:
            return
        if len(self.queue) >= QUEUE:
            self.dropped += 1
            return
        self.queue.append({"time": time.time(), "level": level, "event": event, **fields})
        if not self._wanted.is_set():
            self._wake()

    def bug(self, error: BaseException, **fields: Any) -> None:
        """Logs an unexpected exception: type and code locations, not its text, which may quote a visitor."""
        places = [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
        ]
        self.line("bug", "error", error=type(error).__name__, at=places, **fields)

    def close(self) -> None:
        """Writes the queued lines, for at most a second."""
        self._closed = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _wake(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="chat-proxy-log", daemon=True)
                self._thread.start()
        self._wanted.set()

    def _write_all(self) -> None:
        while not self._closed or self.queue:
            self._wanted.wait()
            if not self._closed:
                time.sleep(BATCH_EVERY)
            self._wanted.clear()
            self._write_batch()

    def _write_batch(self) -> None:
        lines = [self.rendered(self.queue.popleft()) for _ in range(len(self.queue))]
        dropped = self.dropped
        if dropped > self._reported:
            count = dropped - self._reported
            report = self.rendered({"time": time.time(), "level": "warning", "event": "lines_dropped", "count": count})
        else:
            report = b""
        try:
            self.output.write(report + b"".join(lines))
            self.output.flush()
            self._reported = dropped
        except (OSError, ValueError):  # a closed pipe, a closed file
            self.dropped += len(lines)

    def rendered(self, fields: dict[str, Any]) -> bytes:
        try:
            return self.render(fields)
        except Exception as error:  # noqa: BLE001  # one bad line must not end the thread
            return self.render({**{name: fields[name] for name in HEAD}, "unshown": type(error).__name__})


def as_json(fields: dict[str, Any]) -> bytes:
    return encode(fields) + b"\n"


def as_text(fields: dict[str, Any]) -> bytes:
    fields = dict(fields)
    moment = time.strftime("%H:%M:%S", time.localtime(fields.pop("time")))
    level, event = fields.pop("level"), fields.pop("event")
    shown = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    line = f"{moment} {level:7} {event} {shown}"
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line).encode() + b"\n"


LOGGED_ELSEWHERE = "Invalid HTTP request received."  # uvicorn's; the protocol logs each itself


class Bridge(logging.Handler):
    """Logs the warnings of other packages (uvicorn) in our format: logger and template, never the arguments."""

    def __init__(self, logs: Logs) -> None:
        super().__init__(logging.WARNING)
        self.logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == LOGGED_ELSEWHERE:
            return
        level = "error" if record.levelno >= logging.ERROR else "warning"
        self.logs.line("library", level, logger=record.name, message=str(record.msg)[:200])
