"""Several processes on one listener, and the supervisor that starts, replaces and ends them.

Rules:
1. A worker is the same command once more, with the sockets inherited: it reads settings and secrets itself, so one
   that is started later has those of then.
2. A worker that dies is replaced; after early deaths, or while none can be started, not at once. Its streams are cut,
   nobody else's. But one that refuses the settings before any has served ends all: nobody has been served by them yet.
3. SIGHUP replaces all of them, one by one: the next serves before the one before retires.
4. Each worker has a socket pair to its supervisor: orders go down, figures come up. Whoever finds it closed is alone:
   the worker then drains, and the supervisor counts it as dead.
5. The figures of a worker outlive it, or counters would run backwards.
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

START_SECONDS = 30.0  # for a worker to serve; it takes half of one
REFUSED = 2  # the exit status of one that refuses the settings
YOUNG = 10.0  # seconds: the next would die of what this one has died of
PAUSE = 2.0  # seconds before the next is started then
CUT_SECONDS = 15.0  # for one that is told to end at once: it takes LAST_WORDS, FLUSH, and what is sent at the end
FIGURES_SECONDS = 1.0  # for a worker to tell its figures; then those that it told last stand
LONGEST_LINE = 4 << 20  # bytes of figures: some hundred times what they are

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(list[Family]).decode


# ---- in a worker ---------------------------------------------------------------------------------------------------


async def work(service: Service, channel: socket.socket) -> None:
    """Serves as its supervisor orders. The first figures that it tells are the sign that it serves."""
    reader, writer = await asyncio.open_unix_connection(sock=channel)

    def tell_figures() -> None:
        tell(writer, encode(service.app.metrics.families()))

    async def tell_when_serving() -> None:
        await service.server.began.wait()
        tell_figures()

    orders = {
        b"figures": tell_figures,
        b"retire": service.retiring.set,
        b"drain": service.ending.set,
        b"cut": service.at_once.set,
    }
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tell_when_serving())
        heeding = tasks.create_task(heed(reader, orders, alone=service.ending.set))
        await service.run(on_signal=service.ending.set)  # whoever signals all processes does not mean two signals
        heeding.cancel()
    tell_figures()
    with suppress(OSError):  # nobody is there any more
        await writer.drain()
    writer.close()


def tell(writer: asyncio.StreamWriter, line: bytes) -> None:
    """Nothing to one that has gone."""
    if not writer.is_closing():
        writer.write(line + b"\n")


async def heed(
    reader: asyncio.StreamReader, orders: Mapping[bytes, Callable[[], None]], *, alone: Callable[[], None]
) -> None:
    with suppress(OSError):
        while order := await reader.readline():
            orders[order.strip()]()
    alone()


# ---- in the supervisor ---------------------------------------------------------------------------------------------


class Worker:
    """One process, as its supervisor sees it."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.figures: list[Family] = []
        self.serves = asyncio.Event()
        self.told = asyncio.Event()
        self.ended = asyncio.Event()
        self.is_dismissed = False
        self._began = asyncio.get_running_loop().time()
        self._reader = reader
        self._writer = writer

    async def attend(self) -> None:
        """Hears it out, to its end."""
        with suppress(OSError):
            while line := await self._reader.readline():
                with suppress(msgspec.MsgspecError):  # half a line: it died within
                    self.figures = decode(line)
                self.serves.set()
                self.told.set()
        self._writer.close()
        await asyncio.to_thread(self.process.wait)
        self.ended.set()

    def dismiss(self, order: bytes) -> None:
        self.is_dismissed = True
        tell(self._writer, order)

    async def ask_for_figures(self) -> None:
        self.told.clear()
        tell(self._writer, b"figures")
        await first_of(FIGURES_SECONDS, self.told, self.ended)

    @property
    def has_died_young(self) -> bool:
        return asyncio.get_running_loop().time() < self._began + YOUNG


def begin(
    command: Sequence[str], environ: Mapping[str, str], listener: socket.socket
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A process with the listener, and our end of the pair. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs, ExitStack() as undone:
        undone.enter_context(ours)
        descriptors = listener.fileno(), theirs.fileno()
        process = subprocess.Popen(  # noqa: S603  # the command is our own
            [*command, "--worker", ",".join(map(str, descriptors))],
            env=environ,
            pass_fds=descriptors,
            process_group=0,  # Ctrl-C is for the supervisor; here it would be the second signal
        )
        undone.pop_all()
    return process, ours


class Supervisor:
    """`count` workers on one listener. `command` with its `environ` starts one, once it is told its descriptors.

    `validate` raises SettingsError where one that is started now would refuse to.
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
        self.alive: set[Worker] = set()  # those, and the ones that begin or end
        self.past: list[Family] = []  # figures of those that have ended
        self.pause = 0.0  # before workers are started
        self.is_to_replace = False
        self.has_served = False
        self.has_been_refused = False  # by a worker, before any has served
        self.changing = asyncio.Lock()  # held by whoever starts and dismisses
        self.ending = asyncio.Event()
        self.tasks = asyncio.TaskGroup()

    async def run(self) -> None:
        """Returns when, after a SIGTERM or Ctrl-C or a refusal, the last worker has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        figures = uvicorn_for(MetricsPage(self.exposition), 75, lifespan="off")
        with bridged(self.logs):
            async with self.tasks as tasks:
                loop.add_signal_handler(signal.SIGHUP, self.replace_soon)
                if self.metrics_listener is not None:
                    tasks.create_task(figures.serve(sockets=[self.metrics_listener]))
                await self.fill()
                await self.ending.wait()
                while self.alive:
                    await next(iter(self.alive)).ended.wait()
                figures.end()
        self.logs.close()

    def end(self) -> None:
        """What a signal does, and what it does to each worker: the first begins the drain, the second ends it.

        Also for one that hears no order, since it hangs.
        """
        order = b"drain"
        if self.ending.is_set():
            order = b"cut"
            asyncio.get_running_loop().call_later(CUT_SECONDS, self.kill)
        self.ending.set()
        for worker in self.alive:
            worker.dismiss(order)

    def kill(self) -> None:
        for worker in self.alive:
            worker.process.kill()

    async def fill(self) -> None:
        """Starts as many as are missing."""
        async with self.changing:
            while len(self.serving) < self.count and not self.ending.is_set():
                await first_of(self.pause, self.ending)
                await asyncio.gather(*(self.start() for _ in range(self.count - len(self.serving))))

    def replace_soon(self) -> None:
        """What a signal does. Those that come before it has its turn mean the same.

        A worker that is replaced goes on for as long as its answers do: too many of them would fill the memory.
        """
        if not self.is_to_replace:
            self.is_to_replace = True
            self.tasks.create_task(self.replace_all())

    async def replace_all(self) -> None:
        """Stops at the first that does not serve: the settings of before are better than none."""
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
                    worker.dismiss(b"retire")
        self.logs.line("workers_replaced")

    async def start(self) -> bool:
        """Whether there is one more that serves."""
        if self.ending.is_set():
            return False
        try:
            process, ours = begin(self.command, self.environ, self.listener)
        except OSError as error:  # no room for another process, or the program is being installed anew
            self.pause = PAUSE
            self.logs.line("worker_not_started", "error", reason=error.strerror)
            return False
        worker = Worker(process, *await asyncio.open_unix_connection(sock=ours, limit=LONGEST_LINE))
        self.alive.add(worker)
        if self.ending.is_set():  # meanwhile
            worker.dismiss(b"drain")
        self.tasks.create_task(self.look_after(worker))
        await first_of(START_SECONDS, worker.serves, worker.ended, self.ending)
        if worker.serves.is_set() and not worker.ended.is_set():
            self.serving.append(worker)
            self.has_served = True
            return True
        if not self.ending.is_set():
            process.kill()
        return False

    async def look_after(self, worker: Worker) -> None:
        await worker.attend()
        self.alive.discard(worker)
        self.past = added_up([self.past, lasting(worker.figures)])
        if worker.is_dismissed:
            return
        self.pause = PAUSE if worker.has_died_young else 0.0
        self.logs.line("worker_died", "error", pid=worker.process.pid, status=worker.process.returncode)
        if worker.process.returncode == REFUSED and not self.has_served:
            self.has_been_refused = True
            self.end()
        if worker in self.serving:
            self.serving.remove(worker)
            await self.fill()

    async def exposition(self) -> bytes:
        """The text that Prometheus scrapes: the figures of all workers, dead ones too, as those of one process."""
        await asyncio.gather(*(worker.ask_for_figures() for worker in self.alive))
        return Total([self.past, *(worker.figures for worker in self.alive)]).exposition()
