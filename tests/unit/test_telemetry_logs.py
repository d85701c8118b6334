"""The log: what a line looks like, and that writing it costs the caller nothing, whatever becomes of the reader."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
from support.harness import eventually

from proxy.settings import Log
from proxy.telemetry.logs import QUEUE, Bridge, Descriptor, Logs

JSON = Log()
TEXT = Log(format="text")
AT_ONCE = 0.5  # seconds: a hundred times what queueing one line may take, on a machine with other things to do
PIPE = 4096  # bytes, the smallest that Linux gives


def written(configured: Log, *events: tuple[str, str], **fields: Any) -> bytes:
    """What a log shows of these (event, level) with these fields."""
    output = io.BytesIO()
    logs = Logs(configured, output)
    for event, level in events:
        logs.line(event, level, **fields)
    logs.close()
    return output.getvalue()


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A small pipe's ends, for reading and for writing; either may be closed by the test."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE)
    try:
        yield reading, writing
    finally:
        for end in (reading, writing):
            with suppress(OSError):
                os.close(end)


def read_lines(reading: int) -> list[dict[str, Any]]:
    """All lines until the other end is closed."""
    with os.fdopen(os.dup(reading), "rb") as file:
        return [json.loads(line) for line in file]


def test_lines_of_several_writers_stay_whole() -> None:
    """What reaches a pipe at one time is whole lines, and no more than the pipe takes in one piece."""
    reading, writing = os.pipe2(os.O_DIRECT)  # each write is a packet, and each read gives one
    lines = [b"%d %b\n" % (number, b"x" * (number * 37 % 900)) for number in range(60)] + [b"y" * 5000 + b"\n", b"z\n"]
    Descriptor(writing).write(b"".join(lines))
    os.close(writing)
    with closing(os.fdopen(reading, "rb", buffering=0)) as pipe:
        packets = list(iter(lambda: pipe.read(2 * PIPE), b""))
    assert b"".join(packets) == b"".join(lines)
    short = [packet for packet in packets if b"y" not in packet]
    assert all(packet.endswith(b"\n") and len(packet) <= PIPE for packet in short)
    assert len(packets) < len(lines) / 4


# ---- lines --------------------------------------------------------------------------------------------------------


def test_json_line() -> None:
    """A line is one JSON object, time, level and event first, then the fields in their order, null where unknown."""
    before = time.time()
    line = written(JSON, ("request", "info"), status=200, code=None, route="GET /ü\n", ttft_ms=1.5)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    fields = json.loads(line)
    assert list(fields) == ["time", "level", "event", "status", "code", "route", "ttft_ms"]
    assert before <= fields.pop("time") <= time.time()
    assert list(fields.values()) == ["info", "request", 200, None, "GET /ü\n", 1.5]


def test_text_line() -> None:
    """A text line is time of day, level, event and the fields that have a value."""
    line = written(TEXT, ("request", "warning"), status=200, code=None, route="GET /ü")
    assert line[2:3] + line[5:6] == b"::"
    assert line[8:].decode() == " warning request status=200 route=GET /ü\n"


FORGERIES = {
    "line feed": ("a\nb", r"a\nb"),
    "carriage return": ("a\rb", r"a\rb"),
    "escape sequence": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "right-to-left mark": ("a\u202eb", r"a\u202eb"),
    "lone surrogate": ("a\udcffb", r"a\udcffb"),
}


@pytest.mark.parametrize("label", FORGERIES)
def test_text_line_is_one_line(label: str) -> None:
    """Nothing in a field can begin another line, or do something to the terminal that shows it."""
    value, shown = FORGERIES[label]
    line = written(TEXT, ("request", "info"), route=value).decode()
    assert line.endswith(f"request route={shown}\n")
    assert len(line.splitlines()) == 1


LEVELS = ("debug", "info", "warning", "error")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("format_", ["json", "text"])
def test_level_filter(level: str, format_: str) -> None:
    """Lines below the configured level are not written; those at it and above it are."""
    shown = written(Log(format=format_, level=level), *((f"event-{each}", each) for each in LEVELS)).decode()
    assert [each for each in LEVELS if f"event-{each}" in shown] == list(LEVELS[LEVELS.index(level) :])


@pytest.mark.parametrize("configured", [JSON, TEXT], ids=["json", "text"])
def test_line_that_cannot_be_shown(configured: Log) -> None:
    """A field that no format can show costs its own line its fields, and no other line anything."""

    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

    output = io.BytesIO()
    logs = Logs(configured, output)
    logs.line("first")
    logs.line("second", odd=Hostile())
    eventually(lambda: output.getvalue().count(b"\n") == 2)
    logs.line("third")
    logs.close()
    lines = output.getvalue().decode().splitlines()
    assert [event in line for event, line in zip(("first", "second", "third"), lines, strict=True)] == [True] * 3
    assert "unshown" in lines[1]


def test_bug_shows_no_text() -> None:
    """An unexpected exception is shown as its type and the places it came through; its text may quote a visitor."""

    def handler(body: str) -> None:
        raise ValueError(f"cannot parse {body}")

    output = io.BytesIO()
    logs = Logs(JSON, output)
    try:
        try:
            handler("my diary")
        except ValueError as error:
            raise KeyError("my diary") from error
    except KeyError as error:
        logs.bug(error, request_id="r1")
    logs.close()
    fields = json.loads(output.getvalue())
    assert (fields["level"], fields["event"], fields["error"], fields["request_id"]) == (
        "error",
        "bug",
        "KeyError",
        "r1",
    )
    assert [place.rsplit(" ", 1)[1] for place in fields["at"]] == ["test_bug_shows_no_text"]
    assert f"{__file__}:" in fields["at"][0]
    assert b"diary" not in output.getvalue()


def test_lines_of_libraries() -> None:
    """Other packages' warnings come as their logger and template, without the arguments; what is below is left out."""
    output = io.BytesIO()
    logs = Logs(JSON, output)
    library = logging.Logger("some.library")
    library.addHandler(Bridge(logs))
    library.info("hello %s", "secret")
    library.warning("took %s", "secret")
    library.error("broke %s" + "x" * 300, "secret")
    logs.close()
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    found = [(line["level"], line["logger"], line["message"]) for line in lines]
    long = ("broke %s" + "x" * 300)[:200]
    assert found == [("warning", "some.library", "took %s"), ("error", "some.library", long)]


# ---- writing ------------------------------------------------------------------------------------------------------


def test_lines_come_soon_and_in_order() -> None:
    """Lines are written without closing the log, in the order they were given, every one once."""
    output = io.BytesIO()
    logs = Logs(JSON, output)
    with closing(logs):
        for number in range(300):
            logs.line("request", number=number)
            if number % 100 == 0:
                time.sleep(0.06)  # a batch's time: some of them begin while others are written
        eventually(lambda: output.getvalue().count(b"\n") == 300)
    assert [json.loads(line)["number"] for line in output.getvalue().splitlines()] == list(range(300))


def test_close_writes_what_is_queued() -> None:
    """close() writes every line that was queued before it, at once, and ends the thread."""
    output = io.BytesIO()
    logs = Logs(JSON, output)
    for _ in range(QUEUE):
        logs.line("request")
    logs.close()
    assert output.getvalue().count(b"\n") == QUEUE
    assert logs.dropped == 0
    assert not thread_of(logs).is_alive()


def test_close_without_a_line() -> None:
    """A log without a line never starts its thread, and closes."""
    output = io.BytesIO()
    logs = Logs(JSON, output)
    logs.line("request", "debug")
    logs.close()
    assert (logs._thread, output.getvalue()) == (None, b"")


@pytest.mark.quiet
def test_full_pipe_drops_and_counts() -> None:
    """When nobody reads, lines are queued up to the bound and then dropped and counted; the caller never waits. Once
    somebody reads, what was queued arrives whole and in order, and then how many were not."""
    with pipe() as (reading, writing):
        logs = Logs(JSON, Descriptor(writing))
        logs.line("stuck", text="x" * 2 * PIPE)
        eventually(lambda: not logs.queue)  # the thread has it, and hangs in the write
        began = time.monotonic()
        for number in range(QUEUE + 1000):
            logs.line("request", number=number)
        assert time.monotonic() - began < AT_ONCE
        assert (len(logs.queue), logs.dropped) == (QUEUE, 1000)

        reader = Reader(reading)
        eventually(lambda: not logs.queue)
        logs.line("after")
        logs.close()
        os.close(writing)
        lines = reader.lines()
    assert lines[0]["event"] == "stuck"
    assert [line["number"] for line in lines if line["event"] == "request"] == list(range(QUEUE))
    assert [line["count"] for line in lines if line["event"] == "lines_dropped"] == [1000]
    assert lines[-1]["event"] == "after"


@pytest.mark.quiet
def test_close_does_not_wait_for_a_full_pipe() -> None:
    """close() gives up on a reader that does not read, in little more than a second."""
    with pipe() as (reading, writing):
        logs = Logs(JSON, Descriptor(writing))
        logs.line("stuck", text="x" * 2 * PIPE)
        eventually(lambda: not logs.queue)
        began = time.monotonic()
        logs.close()
        assert time.monotonic() - began < 1.0 + AT_ONCE
        assert thread_of(logs).is_alive()
        Reader(reading)  # lets the thread end, or it would meet a later test's descriptor
        eventually(lambda: not thread_of(logs).is_alive())


def test_closed_pipe_survives() -> None:
    """When the reader is gone, lines are dropped and counted, and the thread goes on."""
    with pipe() as (reading, writing):
        os.close(reading)
        logs = Logs(JSON, Descriptor(writing))
        for count in (1, 2, 3):
            logs.line("request")
            eventually(lambda count=count: logs.dropped == count)  # type: ignore[misc]
        assert thread_of(logs).is_alive()
        logs.close()


def test_closed_file_survives() -> None:
    """An output that was closed under the log costs lines and nothing else."""
    output = io.BytesIO()
    logs = Logs(JSON, output)
    output.close()
    logs.line("request")
    logs.close()
    assert logs.dropped == 1


def test_dropped_lines_are_told_once() -> None:
    """How many lines were lost is told with the first that get through, and not again."""

    class Flaky(io.BytesIO):
        broken = True

        def flush(self) -> None:
            if self.broken:
                self.truncate(0)
                self.seek(0)
                raise BrokenPipeError

    output = Flaky()
    logs = Logs(JSON, output)
    for count in (1, 2):
        logs.line("lost")
        eventually(lambda count=count: logs.dropped == count)  # type: ignore[misc]
    output.broken = False
    for count in (2, 3):
        logs.line("found")
        eventually(lambda count=count: output.getvalue().count(b"\n") == count)  # type: ignore[misc]
    logs.close()
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [(line["event"], line.get("count")) for line in lines] == [
        ("lines_dropped", 2),
        ("found", None),
        ("found", None),
    ]
    assert lines[0]["level"] == "warning"


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_descriptor_writes_everything(*, blocking: bool) -> None:
    """A batch larger than the pipe arrives whole, also through a non-blocking descriptor."""
    with pipe() as (reading, writing):
        os.set_blocking(writing, blocking)
        logs = Logs(JSON, Descriptor(writing))
        for number in range(500):
            logs.line("request", number=number)
        reader = Reader(reading)
        logs.close()
        os.close(writing)
        assert [line["number"] for line in reader.lines()] == list(range(500))
    assert logs.dropped == 0


class Reader:
    """Reads a pipe's lines in a thread, from when it is made."""

    def __init__(self, reading: int) -> None:
        self._lines: list[dict[str, Any]] = []
        self._reading = reading
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        self._lines = read_lines(self._reading)

    def lines(self) -> list[dict[str, Any]]:
        """All of them, once the writing end is closed."""
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self._lines


def thread_of(logs: Logs) -> threading.Thread:
    assert logs._thread is not None
    return logs._thread
