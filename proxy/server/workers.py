"""Several worker processes on one listener, and the supervisor that starts, replaces and stops them.

Rules:
1. A worker runs the same command with the sockets inherited. It reads settings and secrets itself, so a worker that is
   started later has the current ones.
2. A worker that dies is replaced; after an early death, or when none can be started, after a pause. Only its own
   streams are cut. If a worker rejects the settings before any worker was ready, the supervisor exits.
3. SIGHUP replaces all workers one by one: each new one is ready before an old one retires.
4. Each worker has a socket pair to its supervisor: commands go down, metrics come up. When it is closed, the worker
   drains, and the supervisor counts the worker as dead.
5. The metrics of a worker are kept after its end; otherwise counters would decrease.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

import msgspec

from proxy.server.runner import bridged, uvicorn_for
from proxy.server.service import MetricsPage, Service, first_of
from proxy.settings import SettingsError
from proxy.telemetry.logs import Logs
from proxy.telemetry.metrics import Family, Total, added_up, lasting

START_SECONDS = 30.0  # for a worker to become ready; it takes half a second
REFUSED = 2  # exit status of a worker that rejects the settings
YOUNG = 10.0  # seconds: a worker that dies earlier would die again of the same cause
PAUSE = 2.0  # seconds before another is started then
CUT_SECONDS = 15.0  # for a worker to stop at once: LAST_EVENTS, FLUSH, and its last messages
METRICS_SECONDS = 1.0  # for a worker to send its metrics; after that its last ones count
LONGEST_LINE = 4 << 20  # bytes of metrics: some hundred times their usual size

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(list[Family]).decode


# ---- in a worker ---------------------------------------------------------------------------------------------------


async def run_worker(service: Service, channel: socket.socket) -> None:
    """Serves until the supervisor stops it. Its first metrics report that it is ready."""
    reader, writer = await asyncio.open_unix_connection(sock=channel)

    def send_metrics() -> None:
        send(writer, encode(service.app.metrics.families()))

    async def report_ready() -> None:
        await service.server.began.wait()
        send_metrics()

    commands = {
        b"metrics": send_metrics,
        b"retire": service.retiring.set,
        b"drain": service.ending.set,
        b"cut": service.at_once.set,
    }
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(report_ready())
        reading = tasks.create_task(read_commands(reader, commands, closed=service.ending.set))
        await service.run(on_signal=service.ending.set)  # a signal to the whole process group must not count twice
        reading.cancel()
    send_metrics()
    with suppress(OSError):  # the supervisor is gone
        await writer.drain()
    writer.close()


def send(writer: asyncio.StreamWriter, line: bytes) -> None:
    """Sends one line; does nothing when the other side is gone."""
    if not writer.is_closing():
        writer.write(line + b"\n")


async def read_commands(
    reader: asyncio.StreamReader, commands: Mapping[bytes, Callable[[], None]], *, closed: Callable[[], None]
) -> None:
    """Runs each command that the supervisor sends, and `closed` when its side is closed."""
    with suppress(OSError):
        while command := await reader.readline():
            commands[command.strip()]()
    closed()


# ---- in the supervisor ---------------------------------------------------------------------------------------------


class Worker:
    """One worker process in the supervisor."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.metrics: list[Family] = []
        self.is_ready = asyncio.Event()
        self.received = asyncio.Event()
        self.ended = asyncio.Event()
        self.is_stopping = False
        self._began = asyncio.get_running_loop().time()
        self._reader = reader
        self._writer = writer

    async def read_metrics(self) -> None:
        """Reads the worker's metrics until the process ends."""
        with suppress(OSError):
            while line := await self._reader.readline():
                with suppress(msgspec.MsgspecError):  # half a line: the worker died while it wrote
                    self.metrics = decode(line)
                self.is_ready.set()
                self.received.set()
        self._writer.close()
        await asyncio.to_thread(self.process.wait)
        self.ended.set()

    def stop(self, command: bytes) -> None:
        self.is_stopping = True
        send(self._writer, command)

    async def request_metrics(self) -> None:
        self.received.clear()
        send(self._writer, b"metrics")
        await first_of(METRICS_SECONDS, self.received, self.ended)

    @property
    def has_died_young(self) -> bool:
        return asyncio.get_running_loop().time() < self._began + YOUNG


def spawn(
    command: Sequence[str], environ: Mapping[str, str], listener: socket.socket
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a worker with the listener. Returns it and this end of the socket pair. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs, ExitStack() as undone:
        undone.enter_context(ours)
        descriptors = listener.fileno(), theirs.fileno()
        process = subprocess.Popen(  # noqa: S603  # the command is our own
            [*command, "--worker", ",".join(map(str, descriptors))],
            env=environ,
            pass_fds=descriptors,
            process_group=0,  # Ctrl-C reaches the supervisor only, which passes it on
        )
        undone.pop_all()
    return process, ours


class Supervisor:
    """Runs `count` workers on one listener. `command` in `environ`, with the descriptors added, starts one.

    `validate` raises SettingsError when a worker that is started now would reject the settings.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        count: int,
        listener: socket.socket,
        logs: Logs,
        *,
        validate: Callable[[], object],
        metrics_listener: socket.socket | None = None,
    ) -> None:
        self.command = command
        self.environ = environ
        self.count = count
        self.listener = listener
        self.logs = logs
        self.validate = validate
        self.metrics_listener = metrics_listener
        self.serving: list[Worker] = []
        self.alive: set[Worker] = set()  # these, and those that start or stop
        self.past: list[Family] = []  # metrics of workers that have ended
        self.pause = 0.0  # before workers are started
        self.is_to_replace = False
        self.was_ready = False
        self.has_been_refused = False  # by a worker, before any was ready
        self.changing = asyncio.Lock()  # held while workers are started and stopped
        self.ending = asyncio.Event()
        self.tasks = asyncio.TaskGroup()

    async def run(self) -> None:
        """Returns when, after a SIGTERM or Ctrl-C or a refusal, the last worker has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        metrics = uvicorn_for(MetricsPage(self.exposition), 75, lifespan="off")
        with bridged(self.logs):
            async with self.tasks as tasks:
                loop.add_signal_handler(signal.SIGHUP, self.replace_soon)
                if self.metrics_listener is not None:
                    tasks.create_task(metrics.serve(sockets=[self.metrics_listener]))
                await self.start_missing()
                await self.ending.wait()
                while self.alive:
                    await next(iter(self.alive)).ended.wait()
                metrics.end()
        self.logs.close()

    def end(self) -> None:
        """Handles a signal, for every worker: the first begins the drain, the second ends it.

        A worker that hangs and reads no command is killed after CUT_SECONDS.
        """
        command = b"drain"
        if self.ending.is_set():
            command = b"cut"
            asyncio.get_running_loop().call_later(CUT_SECONDS, self.kill)
        self.ending.set()
        for worker in self.alive:
            worker.stop(command)

    def kill(self) -> None:
        for worker in self.alive:
            worker.process.kill()

    async def start_missing(self) -> None:
        """Starts workers until there are `count`."""
        async with self.changing:
            while len(self.serving) < self.count and not self.ending.is_set():
                await first_of(self.pause, self.ending)
                await asyncio.gather(*(self.start() for _ in range(self.count - len(self.serving))))

    def replace_soon(self) -> None:
        """Handles SIGHUP. Further signals before the replacement has begun are the same one.

        A replaced worker runs as long as its answers do, so too many of them would fill the memory.
        """
        if not self.is_to_replace:
            self.is_to_replace = True
            self.tasks.create_task(self.replace_all())

    async def replace_all(self) -> None:
        """Stops at the first new worker that does not become ready: the old settings are better than none."""
        async with self.changing:
            self.is_to_replace = False
            try:
                self.validate()
            except SettingsError as error:
                self.logs.line("settings_refused", "error", settings=[fault.setting for fault in error.faults])
                return
            for worker in tuple(self.serving):
                if not await self.start():
                    return
                if worker in self.serving:
                    self.serving.remove(worker)
                    worker.stop(b"retire")
        self.logs.line("workers_replaced")

    async def start(self) -> bool:
        """Starts one worker. Returns whether it became ready."""
        if self.ending.is_set():
            return False
        try:
            process, ours = spawn(self.command, self.environ, self.listener)
        except OSError as error:  # no memory for another process, or the program is being reinstalled
            self.pause = PAUSE
            self.logs.line("worker_not_started", "error", reason=error.strerror)
            return False
        worker = Worker(process, *await asyncio.open_unix_connection(sock=ours, limit=LONGEST_LINE))
        self.alive.add(worker)
        if self.ending.is_set():  # since then
            worker.stop(b"drain")
        self.tasks.create_task(self.watch(worker))
        await first_of(START_SECONDS, worker.is_ready, worker.ended, self.ending)
        if worker.is_ready.is_set() and not worker.ended.is_set():
            self.serving.append(worker)
            self.was_ready = True
            return True
        if not self.ending.is_set():
            process.kill()
        return False

    async def watch(self, worker: Worker) -> None:
        await worker.read_metrics()
        self.alive.discard(worker)
        self.past = added_up([self.past, lasting(worker.metrics)])
        if worker.is_stopping:
            return
        self.pause = PAUSE if worker.has_died_young else 0.0
        self.logs.line("worker_died", "error", pid=worker.process.pid, status=worker.process.returncode)
        if worker.process.returncode == REFUSED and not self.was_ready:
            self.has_been_refused = True
            self.end()
        if worker in self.serving:
            self.serving.remove(worker)
            await self.start_missing()

    async def exposition(self) -> bytes:
        """The metrics of all workers, ended ones included, as those of one process, in Prometheus's text format."""
        await asyncio.gather(*(worker.request_metrics() for worker in self.alive))
        return Total([self.past, *(worker.metrics for worker in self.alive)]).exposition()
