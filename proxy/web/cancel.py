"""A cancel scope that ends its body for any cause, tied to the client's disconnect.

It does for any cause what asyncio.timeout does for time; the bookkeeping is that of CPython's Lib/asyncio/timeouts.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientGone(Exception):
    """The client closed, reset or half-closed its connection."""


class CancelScope:
    """Cancels the body of an `async with` when the client leaves, or when `cancel` is called.

    `receive` is watched from the start, so the request's body must have been read. While the scope is active it is a
    member of `active_scopes`, so that the drain can cancel all of them. `cancelled_at` is of the loop's clock.
    """

    __slots__ = (
        "_active_scopes",
        "_cancelled",
        "_cancelling",
        "_cause",
        "_receive",
        "_task",
        "_watcher",
        "cancelled_at",
    )

    def __init__(self, receive: Receive, active_scopes: set[CancelScope] | None = None) -> None:
        self._receive = receive
        self._active_scopes = active_scopes if active_scopes is not None else set()
        self._task: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._cause: BaseException | None = None
        self._cancelled = False
        self._cancelling = 0
        self.cancelled_at = 0.0

    async def __aenter__(self) -> CancelScope:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a CancelScope needs a task")
        self._task, self._cancelling = task, task.cancelling()
        self._watcher = asyncio.create_task(self._watch())
        self._active_scopes.add(self)
        return self

    async def listen(self) -> None:
        """Gives the watcher its first turn: the client may have left during an earlier await."""
        await asyncio.sleep(0)

    def cancel(self, cause: BaseException) -> None:
        """Raises `cause` out of the body, at its current await. Has no effect on a scope that is cancelled or ended."""
        if self._task is None or self._cause is not None:
            return
        loop = self._task.get_loop()
        self._cause = cause
        self.cancelled_at = loop.time()
        if self._task is asyncio.current_task():
            loop.call_soon(self._cancel)  # at once it would hit the next await, and the body may be over before that
        else:
            self._cancel()

    def release(self, error: BaseException | None) -> BaseException | None:
        """Ends the scope before its body does; `error` is what the body caught, if anything.

        Returns the cause when the scope was cancelled, else `error`. A cancellation from outside stays a
        CancelledError. Later calls of `cancel` have no effect.
        """
        task, self._task = self._task, None
        watcher, self._watcher = self._watcher, None
        cause, self._cause = self._cause, None
        if watcher is not None:
            watcher.cancel()
        self._active_scopes.discard(self)
        if task is None or cause is None:
            return error
        if not self._cancelled:  # cancelled by the body itself, which has not reached an await since
            return error or cause
        if task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            return cause
        return error

    def _cancel(self) -> None:
        if self._task is not None:
            self._cancelled = True
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cause = self.release(error)
        try:
            if cause is not None and cause is not error:
                raise cause from None
        finally:
            del (
                cause,
                error,
            )  # they hold the frames they passed through; a frame that holds them makes a reference cycle

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.cancel(ClientGone())
