"""The relay: two things race, the stream from the model and the browser that may leave. No rules of its own.

`Leash` lets others end what a task is doing; `Relay` pumps one stream.

Rules:
1. The pump runs inside the transport's `data_received`: a chunk goes from the upstream's socket to the browser's in
   one call, without a task switch. It steps the `send` coroutine once; when that finishes, all is done.
2. When `send` cannot finish (the browser reads too slowly) it yields a future, and has written nothing yet: uvicorn
   waits first. Then the upstream is paused and the stream's own task awaits the rest of that same coroutine. Nothing is
   queued, so memory stays bounded; what waits when the stream is ended goes out with the last word.
3. Whatever ends a stream early pulls the leash, so it arrives in the stream's own task as one exception: the browser
   that left, a deadline, the drain, a fault of ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from math import inf
from typing import Any, Protocol, cast

from proxy.chat.sse import Ending, Events, KeyEcho
from proxy.errors import Interruption, StreamTimeout, StreamTooLong
from proxy.telemetry.metrics import Gaps
from proxy.web.cancel import CancelScope, Message, Send

LINGER = 1.0  # seconds between `[DONE]` and the end of the upstream's response; it is the next packet, if not the same
KEEP_ALIVE = b": keep-alive\n\n"


class Source(Protocol):
    """What a relay needs of an upstream's response stream: it calls the sink, and can be told to wait.

    The sink's `data` and `end` are called from the socket's callbacks, never while paused, nothing after `end`.
    `abort` closes an unfinished stream's socket at once, and does nothing to a finished one.
    """

    def attach(self, sink: Any) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None: ...


class SuspendedSend:
    """What remains of a coroutine that was stepped once and yielded `waiting`; it is to send `body`."""

    __slots__ = ("body", "coroutine", "waiting")

    def __init__(self, coroutine: Coroutine[Any, Any, None], waiting: Any, body: bytes = b"") -> None:
        self.coroutine = coroutine
        self.waiting = waiting
        self.body = body

    def __await__(self) -> Generator[Any, Any, None]:
        waiting = self.waiting
        try:
            while True:
                try:
                    sent = yield waiting
                except BaseException as error:  # noqa: BLE001  # whatever comes here is meant for the coroutine
                    waiting = self.coroutine.throw(error)
                else:
                    waiting = self.coroutine.send(sent)
        except StopIteration:
            return


class Relay:
    """One stream from `source` to the browser's `send`. Times are in seconds of the loop's clock."""

    __slots__ = (
        *(
            "_blocked",
            "_comment",
            "_commented",
            "_delivered",
            "_ended",
            "_error",
            "_head",
            "_idle",
            "_last",
            "_cancel_scope",
        ),
        *("_loop", "_send", "_source", "_timer", "_until", "_wake"),
        *("bytes_sent", "events", "first_at", "gaps", "leaked"),
    )

    def __init__(
        self,
        source: Source,
        send: Send,
        events: Events,
        cancel_scope: CancelScope,
        *,
        idle: float,
        total: float,
        comment: float = 0,
    ) -> None:
        self._source = source
        self._send = send
        self._cancel_scope = cancel_scope
        self._idle = idle
        self._comment = comment or inf
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._until = self._last + total
        self._wake: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._blocked: SuspendedSend | None = None
        self._head: Message | None = None  # of the response, while it waits to be sent
        self._ended = False
        self._error: Exception | None = None
        self.events = events
        self.first_at: float | None = None
        self._delivered = self._commented = self._last
        self.gaps = Gaps()
        self.bytes_sent = 0
        self.leaked = False

    async def run(self, start: Message) -> None:
        """Sends the head of the response, then pumps until the upstream has nothing more to give.

        Runs inside the leash. Raises Interruption when what the upstream gave was not the end. However this ends, the
        upstream's socket is not left open.
        """
        self._head = start
        try:
            self._arm()
            await self._send(start)  # may have to wait, too: for a browser that has not read the answer before
            self._head = None
            self._last = self._loop.time()
            self._source.attach(self)
            while not self._ended or self._blocked:
                await self._something()
                await self._unblock()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._source.abort()
        if self.events.ending is Ending.OPEN:
            raise Interruption(reason=f"{type(self._error).__name__}: {self._error}" if self._error else "ended early")

    async def finish(self, broke: Interruption | None = None) -> Interruption | None:
        """Says the last word, outside the leash: the rest of an answer that ended well, or why it did not.

        A stream that said it was over is over, whatever broke after that. Returns what the browser was told.
        """
        if self.has_ended_well:
            broke, body = None, self._rest()
        if not self.has_ended_well:
            broke = broke or Interruption(reason="ended early")
            body = (b"\n\n" if self.events.partial else b"") + broke.event()
        self.bytes_sent += len(body)
        if self._head is not None:
            await self._send(self._head)
        await self._send({"type": "http.response.body", "body": self._take_back() + body, "more_body": False})
        return broke

    @property
    def has_ended_well(self) -> bool:
        """The stream has said that it is over, and our key was not in it: nothing that happens later matters."""
        return self.events.ending is not Ending.OPEN and not self.leaked

    @property
    def has_said_all(self) -> bool:
        """It has ended well, and no part of it still waits for the browser to read."""
        return self.has_ended_well and self._blocked is None

    # ---- called by the transport ----------------------------------------------------------------------------------

    def data(self, data: bytes) -> None:
        now = self._last = self._loop.time()
        try:
            out = self.events.feed(data)
        except KeyEcho as echo:
            self._leak(echo)
            out = echo.safe
        except Exception as error:  # noqa: BLE001  # a bug of ours, which the transport would take for a fault of theirs
            self._stop(error)
            return
        if out:
            if self.first_at is not None:
                self.gaps.note(now - self._delivered)
            elif self.events.count:  # not yet with a comment: some upstreams send them while they think
                self.first_at = now
            self._delivered = now
            self.bytes_sent += len(out)
            self._step({"type": "http.response.body", "body": out, "more_body": True})
        if self.events.done:
            self._hurry()

    def end(self, error: Exception | None) -> None:
        self._ended = True
        self._error = error
        self._notify()

    # ---- the pump -------------------------------------------------------------------------------------------------

    def _step(self, message: Message) -> None:
        """Steps `send` once, outside any task (rule 1)."""
        coroutine = cast(Coroutine[Any, Any, None], self._send(message))
        try:
            waiting = coroutine.send(None)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001  # in the transport's callback nobody would hear of it
            self._stop(error)
            return
        self._source.pause()
        self._blocked = SuspendedSend(coroutine, waiting, message["body"])
        self._notify()

    async def _unblock(self) -> None:
        if self._blocked is None:
            return
        try:
            await self._blocked
        except Exception:  # of `send` itself: how much of it went out, nobody knows
            self._blocked = None
            raise
        self._blocked = None
        self._last = self._loop.time()
        self._source.resume()

    def _take_back(self) -> bytes:
        """What still waited to be sent when the leash was pulled (rule 2)."""
        if self._blocked is None:
            return b""
        self._blocked.coroutine.close()
        return self._blocked.body

    def _leak(self, echo: KeyEcho) -> None:
        self.leaked = True
        self._stop(Interruption(reason=str(echo)))

    def _stop(self, cause: Exception) -> None:
        """Takes no more from the source: it may deliver further parts before the task hears of the cause."""
        self._source.abort()
        self._cancel_scope.cancel(cause)

    def _rest(self) -> bytes:
        try:
            return self.events.rest()
        except KeyEcho:
            self.leaked = True
            return b""

    # ---- waking the task ------------------------------------------------------------------------------------------

    async def _something(self) -> None:
        if self._blocked is None and not self._ended:
            self._wake = self._loop.create_future()
            await self._wake

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # ---- deadlines ------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """One timer a stream, set anew only when it fires: an event just leaves its time behind."""
        speak_at = max(self._delivered, self._commented) + self._comment
        self._timer = self._loop.call_at(min(self._last + self._idle, self._until, speak_at), self._check_deadlines)

    def _hurry(self) -> None:
        """After `[DONE]` the upstream has little time left to end its response; nobody waits for more."""
        if self._idle > LINGER and self._timer is not None:
            self._idle = LINGER
            self._timer.cancel()
            self._arm()

    def _check_deadlines(self) -> None:
        now, is_waiting = self._loop.time(), self._blocked is not None or self._head is not None
        if now >= self._until:
            self._cancel_scope.cancel(StreamTooLong("total_timeout"))
        elif not is_waiting and now >= self._last + self._idle:
            self._cancel_scope.cancel(StreamTimeout("idle_timeout"))
        elif is_waiting:
            soon = now + min(self._idle, self._comment)
            self._timer = self._loop.call_at(min(soon, self._until), self._check_deadlines)
        else:
            if now >= max(self._delivered, self._commented) + self._comment:
                self._say_alive(now)
            self._arm()

    def _say_alive(self, now: float) -> None:
        """A comment in the upstream's silence, so that nothing on the way takes the connection for dead."""
        self._commented = now
        if not self.events.partial and not self._ended:  # never inside an event
            self.bytes_sent += len(KEEP_ALIVE)
            self._step({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
