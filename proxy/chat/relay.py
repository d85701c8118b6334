"""Relays one stream from the upstream to the client, until either of them ends it. No protocol rules of its own.

Rules:
1. The pump runs inside the transport's `data_received`: a chunk goes from the upstream's socket to the client's in one
   call, without a task switch. It steps the `send` coroutine once; usually that completes it.
2. When `send` cannot complete (the client reads too slowly) it yields a future and has written nothing yet: uvicorn
   waits first. Then the upstream is paused and the stream's own task awaits the rest of that coroutine. Nothing is
   queued, so memory stays bounded; a part that still waits when the stream ends is sent with the last event.
3. Everything that ends a stream early (a disconnect, a deadline, the drain, a bug) cancels the cancel scope, so the
   stream's own task receives it as one exception.
4. Before the head of the response an exception leaves `run`'s caller; from there on `run` returns an Outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from math import inf
from typing import Any, Protocol, cast

from proxy.chat.sse import Ending, Events, KeyEcho
from proxy.errors import Interruption, StreamFailed, StreamTimeout, StreamTooLong
from proxy.telemetry.metrics import Gaps
from proxy.telemetry.records import Outcome
from proxy.web.cancel import CancelScope, ClientGone, Message, Send

LINGER = 1.0  # seconds from `[DONE]` to the end of the upstream's response; usually the same packet or the next
KEEP_ALIVE = b": keep-alive\n\n"


class Source(Protocol):
    """The part of an upstream's response stream that a relay uses: it calls the sink, and can be paused.

    The sink's `data` and `end` are called from the socket's callbacks, never while paused, and never after `end`.
    `abort` closes an unfinished stream's socket at once, and has no effect on a finished one.
    """

    def attach(self, sink: Any) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None: ...


class SuspendedSend:
    """A `send()` coroutine suspended on `waiting`, with the body it has not written yet."""

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
                except BaseException as error:  # noqa: BLE001  # every exception is for the coroutine
                    waiting = self.coroutine.throw(error)
                else:
                    waiting = self.coroutine.send(sent)
        except StopIteration:
            return


class Relay:
    """One stream from `source` to the client's `send`. Times are in seconds of the loop's clock."""

    __slots__ = (
        "_blocked",
        "_cancel_scope",
        "_comment",
        "_commented",
        "_delivered",
        "_ended",
        "_error",
        "_head",
        "_idle",
        "_last",
        "_loop",
        "_send",
        "_source",
        "_timer",
        "_until",
        "_wake",
        "bytes_sent",
        "events",
        "first_at",
        "gaps",
        "key_leaked",
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
        self._head: Message | None = None  # of the response, until it is sent
        self._ended = False
        self._error: Exception | None = None
        self.events = events
        self.first_at: float | None = None
        self._delivered = self._commented = self._last
        self.gaps = Gaps()
        self.bytes_sent = 0
        self.key_leaked = False

    async def run(self, head: Message) -> Outcome:
        """Sends the head of the response, relays until the upstream has nothing more to give, sends the last event.

        Runs inside the cancel scope and releases it. Returns how the stream ended, whatever happened; raises only the
        CancelledError of a task that is cancelled from outside. The upstream's socket is not left open.
        """
        self._head = head
        try:
            error = self._cancel_scope.release(await self._pump(head))
        except BaseException as raised:  # noqa: BLE001  # sorted below
            error = self._cancel_scope.release(raised)
        try:
            if isinstance(error, ClientGone):
                return self._abandoned()
            if error is not None and not isinstance(error, Exception):
                raise error
            return await self._finish(error)
        finally:
            del error  # its traceback refers to this frame, which would be a reference cycle

    @property
    def has_ended_well(self) -> bool:
        """True when the stream announced its end and did not contain our key: later faults do not matter."""
        return self.events.ending is not Ending.OPEN and not self.key_leaked

    @property
    def is_delivered(self) -> bool:
        """True when the stream has ended well and no part of it waits for the client to read."""
        return self.has_ended_well and self._blocked is None

    # ---- the life of a stream --------------------------------------------------------------------------------------

    async def _pump(self, head: Message) -> Interruption | None:
        """Relays to the end of the upstream's response. Returns an Interruption when that was not the stream's end."""
        try:
            self._arm()
            await self._send(head)  # waits where the client has not read its previous answer
            self._head = None
            self._last = self._loop.time()
            self._source.attach(self)
            while not self._ended or self._blocked:
                if not self._ended and not self._blocked:
                    self._wake = self._loop.create_future()
                    await self._wake
                await self._unblock()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._source.abort()
        if self.events.ending is not Ending.OPEN:
            return None
        return Interruption(reason=f"{type(self._error).__name__}: {self._error}" if self._error else "ended early")

    def _abandoned(self) -> Outcome:
        """The client left. An answer that it has received completely is not an aborted one."""
        outcome = self._outcome(None)
        outcome.abort_seconds = self._loop.time() - self._cancel_scope.cancelled_at
        if not self.is_delivered:
            outcome.ending = "aborted"
        return outcome

    async def _finish(self, error: Exception | None) -> Outcome:
        """Sends the rest of an answer that ended well, or an event with the reason why it did not.

        Runs outside the cancel scope: a stream that announced its end has ended, whatever failed after that.
        """
        bug = None if isinstance(error, Interruption) else error
        broke = error.alone() if isinstance(error, Interruption) else StreamFailed() if error else None
        try:
            broke = await self._send_last(broke)
        except Exception as raised:  # noqa: BLE001  # of `send`: the response has begun, so there is nothing to raise to
            bug, broke = raised, StreamFailed()
        outcome = self._outcome(broke)
        outcome.bug = bug
        return outcome

    async def _send_last(self, broke: Interruption | None) -> Interruption | None:
        """Ends the response. Returns what its last event reported, None for an answer that ended well."""
        body = b""
        if self.has_ended_well:
            try:
                broke, body = None, self.events.rest()
            except KeyEcho:
                self.key_leaked = True
        if not self.has_ended_well:
            broke = broke or Interruption(reason="ended early")
            body = (b"\n\n" if self.events.partial else b"") + broke.event()
        self.bytes_sent += len(body)
        if self._head is not None:
            await self._send(self._head)
        await self._send({"type": "http.response.body", "body": self._take_unsent() + body, "more_body": False})
        return broke

    def _outcome(self, broke: Interruption | None) -> Outcome:
        ending = broke.ending if broke else "error" if self.events.ending is Ending.ERROR else "complete"
        return Outcome(
            ending,
            broke,
            events=self.events.count,
            bytes=self.bytes_sent,
            first_at=self.first_at,
            gaps=self.gaps,
            key_leaked=self.key_leaked,
        )

    # ---- called by the transport ----------------------------------------------------------------------------------

    def data(self, data: bytes) -> None:
        now = self._last = self._loop.time()
        try:
            out = self.events.feed(data)
        except KeyEcho as echo:
            self.key_leaked = True
            self._stop(Interruption(reason=str(echo)))
            out = echo.safe
        except Exception as error:  # noqa: BLE001  # a bug here, which the transport would report as the upstream's
            self._stop(error)
            return
        if out:
            if self.first_at is not None:
                self.gaps.note(now - self._delivered)
            elif self.events.count:  # a comment does not count: some upstreams send them while the model thinks
                self.first_at = now
            self._delivered = now
            self.bytes_sent += len(out)
            self._send_now({"type": "http.response.body", "body": out, "more_body": True})
        if self.events.done:
            self._shorten_idle()

    def end(self, error: Exception | None) -> None:
        self._ended = True
        self._error = error
        self._notify()

    # ---- the pump -------------------------------------------------------------------------------------------------

    def _send_now(self, message: Message) -> None:
        """Steps `send` once, outside any task (rule 1)."""
        coroutine = cast(Coroutine[Any, Any, None], self._send(message))
        try:
            waiting = coroutine.send(None)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001  # the transport's callback has no caller to raise to
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
        except Exception:  # of `send` itself: it is unknown how much was written
            self._blocked = None
            raise
        self._blocked = None
        self._last = self._loop.time()
        self._source.resume()

    def _take_unsent(self) -> bytes:
        """The part that still waited to be sent when the scope was cancelled (rule 2)."""
        if self._blocked is None:
            return b""
        self._blocked.coroutine.close()
        return self._blocked.body

    def _stop(self, cause: Exception) -> None:
        """Closes the source first: it could deliver further parts before the task is cancelled."""
        self._source.abort()
        self._cancel_scope.cancel(cause)

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # ---- deadlines ------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Sets the stream's one timer, which is set again only when it fires: an event only stores its time."""
        speak_at = max(self._delivered, self._commented) + self._comment
        self._timer = self._loop.call_at(min(self._last + self._idle, self._until, speak_at), self._check_deadlines)

    def _shorten_idle(self) -> None:
        """Gives the upstream LINGER to end its response after `[DONE]`: no client needs more of it."""
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
                self._send_comment(now)
            self._arm()

    def _send_comment(self, now: float) -> None:
        """Sends a comment while the upstream is silent, so that no proxy closes the connection as idle."""
        self._commented = now
        if not self.events.partial and not self._ended:  # never inside an event
            self.bytes_sent += len(KEEP_ALIVE)
            self._send_now({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
