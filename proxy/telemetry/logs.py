"""One JSON line a request, and lines of their own for what an auditor asks about.

Rules:
1. A line holds names, numbers and codes: never a body, a cookie, a key, or a text that came from outside.
2. Writing never holds up the loop: lines wait in a bounded queue, one thread writes them in batches. When the pipe is
   full or closed, lines are dropped and counted; the service goes on, and tells the count once it can.
3. What is queued is shown, whatever it holds: one line a line, and nothing that ends the thread.
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

    Lines are written whole, no more at once than a pipe takes in one piece: several workers may write to it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, data: bytes, /) -> None:
        for part in in_pieces(data):
            left = memoryview(part)
            while left:
                try:
                    left = left[os.write(self.number, left) :]
                except BlockingIOError:  # whoever started us made it non-blocking
                    select.select([], [self.number], [])

    def flush(self) -> None:
        """Nothing is held back."""


def in_pieces(data: bytes) -> Iterator[bytes]:
    """Whole lines, as many at a time as PIPE_BUF holds (pipe(7)); a longer line is a piece of its own."""
    start = 0
    while start < len(data):
        end = data.rfind(b"\n", start, start + select.PIPE_BUF) + 1 or data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end


class Logs:
    """The log of one server. `line` may be called from the loop: it does not wait. Other threads may call it, too."""

    def __init__(self, configured: Log, output: Output | None = None) -> None:
        self.level = LEVELS[configured.level]
        self.render = as_json if configured.format == "json" else as_text
        self.output: Output = output if output is not None else Descriptor(sys.stdout.fileno())
        self.queue: deque[dict[str, Any]] = deque()
        self.dropped = 0
        self._told = 0  # of those dropped
        self._wanted = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def line(self, event: str, level: str = "info", /, **fields: Any) -> None:
        """Queues one line; `fields` are shown in the order given."""
        if LEVELS[level] < self.level:
            return
        if len(self.queue) >= QUEUE:
            self.dropped += 1
            return
        self.queue.append({"time": time.time(), "level": level, "event": event, **fields})
        if not self._wanted.is_set():
            self._wake()

    def bug(self, error: BaseException, **fields: Any) -> None:
        """An exception nobody expected: its type and places, not its text, which may quote what a visitor wrote."""
        places = [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
        ]
        self.line("bug", "error", error=type(error).__name__, at=places, **fields)

    def close(self) -> None:
        """Writes what is queued, as long as that takes no more than a second."""
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
        if dropped > self._told:
            count = dropped - self._told
            told = self.rendered({"time": time.time(), "level": "warning", "event": "lines_dropped", "count": count})
        else:
            told = b""
        try:
            self.output.write(told + b"".join(lines))
            self.output.flush()
            self._told = dropped
        except (OSError, ValueError):  # a closed pipe, a closed file
            self.dropped += len(lines)

    def rendered(self, fields: dict[str, Any]) -> bytes:
        try:
            return self.render(fields)
        except Exception as error:  # noqa: BLE001  # a line that cannot be shown must not be the last one
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


TOLD_ELSEWHERE = "Invalid HTTP request received."  # by uvicorn; the guard has a line of its own for each


class Bridge(logging.Handler):
    """Lines of other packages (uvicorn's warnings) in our format: logger and template, never the arguments."""

    def __init__(self, logs: Logs) -> None:
        super().__init__(logging.WARNING)
        self.logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == TOLD_ELSEWHERE:
            return
        level = "error" if record.levelno >= logging.ERROR else "warning"
        self.logs.line("library", level, logger=record.name, message=str(record.msg)[:200])
