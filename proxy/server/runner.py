"""uvicorn without its signal handling, and with its warnings in the log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

from proxy.telemetry.logs import Bridge, Logs

FLUSH = 5  # seconds uvicorn may take to close the remaining connections
UVICORN_TICK = 0.1  # seconds; every tenth tick renews the Date header


class Uvicorn(uvicorn.Server):
    """uvicorn without its signal handling: it raises signals again after shutdown, so the exit code would not be 0."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.began.set()

    def end(self) -> None:
        self.should_exit = True
        self.ended.set()

    async def main_loop(self) -> None:
        """uvicorn's own, except that `end` interrupts its sleep."""
        ticks = 0
        while not await self.on_tick(ticks):
            ticks = (ticks + 1) % 864_000
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(UVICORN_TICK):
                    await self.ended.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def uvicorn_for(app: Any, keep_alive: float, **more: Any) -> Uvicorn:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the edge reads X-Forwarded-For itself; uvicorn would rewrite the peer before it
        ws="none",
        timeout_keep_alive=int(keep_alive),
        timeout_graceful_shutdown=FLUSH,
        **more,
    )
    return Uvicorn(config)


@contextlib.contextmanager
def bridged(logs: Logs) -> Generator[None, None, None]:
    """Sends uvicorn's warnings to the log."""
    bridge, library = Bridge(logs), logging.getLogger("uvicorn.error")
    library.addHandler(bridge)
    library.propagate = False
    try:
        yield
    finally:
        library.removeHandler(bridge)
