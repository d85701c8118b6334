"""TODO."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientGone(Exception):
    """The browser closed, reset or half-closed its connection."""


class CancelScope:
    """Ends the body of an `async with` from outside: when the browser leaves, or when somebody pulls.

    What asyncio.timeout does for time, for any cause; the bookkeeping is that of CPython's Lib/asyncio/timeouts.py.
    `receive` is watched from the beginning, so the request's body must have been read. While it holds, it is in
    `live`, for whoever wants to pull all of them. `pulled_at` is the loop's time.
    """

    __slots__ = ("_cancelled", "_cancelling", "_cause", "_live", "_receive", "_task", "_watcher", "cancelled_at")

    def __init__(self, receive: Receive, live: set[CancelScope] | None = None) -> None:
        self._receive = receive
        self._live = live if live is not None else set()
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._cause: BaseException | None = None
        self._cancelled = False
        self._cancelling = 0
        self.cancelled_at = 0.0

    async def __aenter__(self) -> CancelScope:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._watcher = asyncio.create_task(self._watch())
        self._live.add(self)
        return self

    async def listen(self) -> None:
        """Gives the watcher its first turn: the browser may have left while something before this was waited for."""
        await asyncio.sleep(0)

    def cancel(self, cause: BaseException) -> None:
        """Raises `cause` out of the body, at what it is waiting for; nothing when it is over or pulled already."""
        if self._task is None or self._cause is not None:
            return
        loop = self._task.get_loop()
        self._cause = cause
        self.cancelled_at = loop.time()
        if self._task is asyncio.current_task():
            loop.call_soon(self._cancel)  # at once it would hit the next await, and the body may be over before that
        else:
            self._cancel()

    def _cancel(self) -> None:
        if self._task is not None:
            self._cancelled = True
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        watcher, self._watcher = self._watcher, None
        cause, self._cause = self._cause, None
        assert task is not None
        assert watcher is not None
        watcher.cancel()
        self._live.discard(self)
        try:
            if cause is None:
                return
            if not self._cancelled:  # pulled by the body itself, which then waited for nothing more
                if kind is None:
                    raise cause
            elif task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                raise cause from None
        finally:
            del cause  # it holds the frames it comes through; held by one of them, it would keep all they know

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.cancel(ClientGone())
