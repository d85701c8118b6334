"""What proxy/relay.py promises, with a scripted source and a scripted browser, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from support.harness import DONE, delta, finish, random_key
from support.transport_servers import LIVENESS, on_both_loops, settled, ticks

from proxy.chat import relay as module
from proxy.chat.relay import Relay, SuspendedSend
from proxy.chat.sse import Events
from proxy.errors import Interruption, StreamDrained, StreamFailed, StreamTimeout, StreamTooLong
from proxy.telemetry.records import Outcome
from proxy.web.cancel import CancelScope, ClientGone, Message, Receive

HEAD: Message = {"type": "http.response.start", "status": 200, "headers": []}
FOREVER = 60.0  # seconds: a deadline that a test does not mean
SOON = 0.2  # seconds: one that it does; a machine that stands still for less changes no result
CUT = httpx.ReadError("cut")


class Cause(Exception):
    """Why a leash was pulled."""


class Browser:
    """What `send` and `receive` lead to. While it does not read, `send` waits, twice a message.

    `faults` are raised by the send of that number, from 1; after one it does not read.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.waiting = 0
        self.sends = 0
        self.faults: dict[int, Exception] = {}
        self._reading = asyncio.Event()
        self._left = asyncio.Event()
        self.read()

    def read(self) -> None:
        self._reading.set()

    def stop_reading(self) -> None:
        self._reading.clear()

    def leave(self) -> None:
        self._left.set()

    @property
    def got(self) -> bytes:
        """The body so far."""
        return b"".join(message.get("body", b"") for message in self.messages)

    async def send(self, message: Message) -> None:
        self.sends += 1
        fault = self.faults.get(self.sends)
        self.waiting += 1
        try:
            if not self._reading.is_set():
                await self._reading.wait()
                await asyncio.sleep(0)
            if fault is not None:
                self.stop_reading()
                raise fault
        finally:
            self.waiting -= 1
        self.messages.append(message)

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}


class Script:
    """A source that the test speaks for. It holds what it has while it is paused, as the transport does."""

    def __init__(self) -> None:
        self.sink: Any = None
        self.paused = False
        self.pauses = 0
        self.aborted = False
        self.held: list[Callable[[], None]] = []

    def say(self, *parts: bytes) -> Script:
        self.held += [lambda part=part: self.sink.data(part) for part in parts]  # type: ignore[misc]
        return self.flow()

    def end(self, error: Exception | None = None) -> Script:
        self.held.append(lambda: self.sink.end(error))
        return self.flow()

    def flow(self) -> Script:
        while self.sink and self.held and not self.paused:
            self.held.pop(0)()
        return self

    def attach(self, sink: Any) -> None:
        self.sink = sink
        self.flow()

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1

    def resume(self) -> None:
        self.paused = False
        self.flow()

    def abort(self) -> None:
        self.sink = None
        self.aborted = True


class RecordedScope(CancelScope):
    """A scope that keeps what it was cancelled for."""

    __slots__ = ("cause",)

    def __init__(self, receive: Receive) -> None:
        super().__init__(receive)
        self.cause: BaseException | None = None

    def cancel(self, cause: BaseException) -> None:
        self.cause = cause
        super().cancel(cause)


class Stage:
    """One relay between a script and a browser, run in a task as the application does it."""

    def __init__(self, *, idle: float = FOREVER, total: float = FOREVER, comment: float = 0, key: str = "") -> None:
        self.source = Script()
        self.browser = Browser()
        self.cancel_scope = RecordedScope(self.browser.receive)
        self.events = Events((key or random_key()).encode())
        self.relay = Relay(
            self.source, self.browser.send, self.events, self.cancel_scope, idle=idle, total=total, comment=comment
        )
        self.outcome: Outcome | None = None
        self.fault: Exception | None = None
        self.told: Interruption | None = None
        self.task = asyncio.create_task(self.play())

    async def play(self) -> None:
        async with self.cancel_scope:
            outcome = await self.relay.run(HEAD)
        self.outcome = outcome
        self.told, self.fault = outcome.error, outcome.bug

    @property
    def broke(self) -> BaseException | None:
        """What the scope was cancelled for, or what the relay found wrong by itself."""
        return self.cancel_scope.cause or (self.outcome.error if self.outcome else None)

    async def begun(self) -> Stage:
        """Waits until the source is being listened to."""
        await settled(lambda: self.source.sink)
        return self

    async def over(self) -> Stage:
        """Waits for the end of the task."""
        async with asyncio.timeout(LIVENESS):
            await self.task
        return self


# ---- the leash -------------------------------------------------------------------------------------------------------


Body = Callable[[CancelScope], Awaitable[None]]


async def outcome(body: Body, live: set[CancelScope] | None = None) -> Exception | None:
    """What comes out of a leash around `body`. Fails when a cancellation is still on its way to this task."""
    raised: Exception | None = None
    held = CancelScope(Browser().receive, live)
    try:
        async with held:
            await body(held)
    except (Cause, TimeoutError, ValueError) as error:
        raised = error
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)
    return raised


def soon(function: Callable[..., object], *arguments: Any) -> None:
    asyncio.get_running_loop().call_soon(function, *arguments)


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


@on_both_loops
async def test_pull_raises_its_cause_where_the_body_waits() -> None:
    """The body sees a cancellation at its await; what comes out of the `with` is the cause. The moment is noted."""
    seen = []
    cause = Cause()

    async def body(held: CancelScope) -> None:
        soon(held.cancel, cause)
        try:
            await forever()
        except asyncio.CancelledError:
            seen.append(held.cancelled_at)
            raise

    before = asyncio.get_running_loop().time()
    assert await outcome(body) is cause
    assert before <= seen[0] <= asyncio.get_running_loop().time()


@on_both_loops
async def test_only_the_first_pull_counts() -> None:
    """Of two causes the first is raised, and no cancellation of the second stays behind."""
    first, second = Cause(), Cause()

    async def body(held: CancelScope) -> None:
        soon(held.cancel, first)
        soon(held.cancel, second)
        await forever()

    assert await outcome(body) is first


@on_both_loops
async def test_pull_before_the_beginning_or_after_the_end_does_nothing() -> None:
    """A scope that has ended can be cancelled without effect."""
    leashes = []

    async def body(held: CancelScope) -> None:
        leashes.append(held)
        await asyncio.sleep(0)

    CancelScope(Browser().receive).cancel(Cause())
    assert await outcome(body) is None
    leashes[0].cancel(Cause())
    await asyncio.sleep(0)
    assert leashes[0].cancelled_at == 0


@on_both_loops
async def test_body_that_finishes_in_the_tick_of_the_pull() -> None:
    """Whether the pull or the awaited result comes first in one tick, the cause is raised and nothing stays behind."""
    for result_first in (True, False):

        async def body(held: CancelScope, result_first: bool = result_first) -> None:
            result = asyncio.get_running_loop().create_future()
            both = [(result.set_result, None), (held.cancel, Cause())]
            for function, argument in both if result_first else reversed(both):
                soon(lambda f=function, a=argument: f(a) if not result.done() or f == held.cancel else None)
            await result

        assert isinstance(await outcome(body), Cause)


@on_both_loops
async def test_body_that_pulls_its_own_leash() -> None:
    """It ends with the cause, at its next await or at its end; never does the cancellation hit a later await."""

    async def ends(held: CancelScope) -> None:
        held.cancel(Cause())

    async def waits(held: CancelScope) -> None:
        held.cancel(Cause())
        await forever()

    assert isinstance(await outcome(ends), Cause)
    assert isinstance(await outcome(waits), Cause)


@on_both_loops
async def test_a_body_that_fails_by_itself_keeps_its_error() -> None:
    """When the body raises an exception of its own, that one comes out, cancelled or not."""

    async def fails(held: CancelScope) -> None:
        raise ValueError

    async def fails_when_pulled(held: CancelScope) -> None:
        soon(held.cancel, Cause())
        with contextlib.suppress(asyncio.CancelledError):
            await forever()
        raise ValueError

    async def fails_after_its_own_pull(held: CancelScope) -> None:
        held.cancel(Cause())
        raise ValueError

    for body in (fails, fails_when_pulled, fails_after_its_own_pull):
        assert isinstance(await outcome(body), ValueError), body


@on_both_loops
async def test_nested_leashes() -> None:
    """The inner cause comes out of the inner `with`, the outer one out of the outer; both at once: the outer wins."""
    for pulled, wanted in {"i": "inner", "o": "outer", "io": "outer", "oi": "outer"}.items():

        async def body(outer: CancelScope, pulled: str = pulled) -> None:
            async with CancelScope(Browser().receive) as inner:
                pulls = {"i": lambda: inner.cancel(ValueError("inner")), "o": lambda: outer.cancel(Cause("outer"))}
                for name in pulled:
                    soon(pulls[name])
                await forever()

        assert str(await outcome(body)) == wanted, pulled


@on_both_loops
async def test_leash_and_timeout_keep_apart() -> None:
    """asyncio.timeout inside a leash: each raises its own; both due in one tick: the leash, as the outer one."""

    async def pulled(held: CancelScope) -> None:
        soon(held.cancel, Cause())
        async with asyncio.timeout(FOREVER):
            await forever()

    async def timed_out(held: CancelScope) -> None:
        async with asyncio.timeout(0.001):
            await forever()

    async def both(held: CancelScope) -> None:
        async with asyncio.timeout(FOREVER) as timeout:
            loop = asyncio.get_running_loop()
            loop.call_later(0.001, held.cancel, Cause())
            timeout.reschedule(loop.time() + 0.001)
            soon(time.sleep, 0.01)
            await forever()

    assert isinstance(await outcome(pulled), Cause)
    assert isinstance(await outcome(timed_out), TimeoutError)
    assert isinstance(await outcome(both), Cause)


@on_both_loops
async def test_cancellation_from_outside_passes_through() -> None:
    """A task cancelled from outside ends as cancelled, also when the scope is cancelled in the same tick."""

    async def body(held: CancelScope) -> None:
        async with held:
            await forever()

    for pulls in ("", "before", "after"):
        held = CancelScope(Browser().receive)
        task = asyncio.create_task(body(held))
        await ticks()
        if pulls == "before":
            held.cancel(Cause())
        task.cancel()
        if pulls == "after":
            held.cancel(Cause())
        await asyncio.wait([task])
        assert task.cancelled(), pulls


@on_both_loops
async def test_a_browser_that_leaves_pulls_the_leash() -> None:
    """A disconnect raises ClientGone; what a browser sends otherwise does not; the watcher ends with the body."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    before = len(asyncio.all_tasks())
    async with CancelScope(messages.get):
        await ticks()
        assert messages.empty()
        assert len(asyncio.all_tasks()) == before + 1
    await ticks()
    assert len(asyncio.all_tasks()) == before
    messages.put_nowait({"type": "http.disconnect"})
    with pytest.raises(ClientGone):
        async with CancelScope(messages.get):
            await forever()


@on_both_loops
async def test_a_leash_is_in_its_set_while_it_holds() -> None:
    """The set of active scopes contains those that are entered, and no others, however they ended."""
    live: set[CancelScope] = set()

    async def ends(held: CancelScope) -> None:
        assert live == {held}

    async def fails(held: CancelScope) -> None:
        assert live == {held}
        raise ValueError

    async def pulled(held: CancelScope) -> None:
        for found in live:
            soon(found.cancel, Cause())
        await forever()

    for body, wanted in {ends: type(None), fails: ValueError, pulled: Cause}.items():
        assert isinstance(await outcome(body, live), wanted)
        assert live == set()


# ---- the rest of a coroutine -----------------------------------------------------------------------------------------


def step(coroutine: Any) -> SuspendedSend:
    return SuspendedSend(coroutine, coroutine.send(None))


@on_both_loops
async def test_rest_goes_through_all_waits() -> None:
    """A coroutine stepped once outside a task is finished in one, wait by wait: bare yields, futures, done ones."""
    loop, steps = asyncio.get_running_loop(), []
    first, second = loop.create_future(), loop.create_future()

    async def waits() -> None:
        steps.append(await first)
        await asyncio.sleep(0)
        steps.append(await second)
        await asyncio.sleep(0.001)
        steps.append("end")

    for done_before in (False, True):
        steps.clear()
        first, second = loop.create_future(), loop.create_future()
        rest = step(waits())
        if done_before:
            first.set_result("first")
            second.set_result("second")
        else:
            loop.call_later(0.001, first.set_result, "first")
            loop.call_later(0.002, second.set_result, "second")
        await rest
        assert steps == ["first", "second", "end"]


@on_both_loops
async def test_rest_raises_what_the_coroutine_raises() -> None:
    """An error of the coroutine, or of what it waited for, comes out where the rest is awaited."""
    loop = asyncio.get_running_loop()

    async def waits(future: asyncio.Future[None]) -> None:
        await future
        raise Cause("after its wait")

    failed, fine = loop.create_future(), loop.create_future()
    for future, wanted in ((failed, "of the future"), (fine, "after its wait")):
        rest = step(waits(future))
        if future is failed:
            future.set_exception(Cause("of the future"))
        else:
            future.set_result(None)
        with pytest.raises(Cause, match=wanted):
            await rest


@on_both_loops
async def test_rest_hands_a_cancellation_to_the_coroutine() -> None:
    """Cancelling the task that awaits the rest is seen by the coroutine at its own await, which may still clean up."""
    seen = []

    async def waits() -> None:
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0.001)
            seen.append("cleaned up")
            raise

    async def finishes() -> None:
        await step(waits())

    task = asyncio.create_task(finishes())
    await ticks()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert seen == ["cancelled", "cleaned up"]


# ---- passing on ------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_an_event_goes_out_in_the_call_that_brought_it() -> None:
    """The browser has an event before the source's call returns: no task switch, no queue. The end is a message."""
    stage = await Stage().begun()
    assert stage.browser.messages == [HEAD]
    for number in range(3):
        stage.source.say(delta(str(number)))
        assert stage.browser.messages[-1] == {
            "type": "http.response.body",
            "body": delta(str(number)),
            "more_body": True,
        }
    stage.source.say(finish(), DONE).end()
    await stage.over()
    assert stage.broke is None
    assert stage.told is None
    assert stage.browser.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert stage.relay.bytes_sent == len(stage.browser.got)
    assert stage.relay.first_at is not None
    assert sum(stage.relay.gaps.counts) == 4  # five deliveries
    assert stage.source.pauses == 0


@on_both_loops
async def test_a_comment_is_not_the_first_event() -> None:
    """What an upstream says to keep the connection open passes at once, but the answer has not begun with it."""
    stage = await Stage().begun()
    stage.source.say(b": PROCESSING\n\n", b": PROCESSING\n\n")
    assert stage.browser.got == b": PROCESSING\n\n" * 2
    assert (stage.relay.first_at, stage.relay.gaps.total, sum(stage.relay.gaps.counts)) == (None, 0.0, 0)
    stage.source.say(delta("first"))
    assert stage.relay.first_at is not None
    assert sum(stage.relay.gaps.counts) == 0
    stage.source.say(DONE).end()
    await stage.over()


@on_both_loops
async def test_a_stream_that_is_there_already() -> None:
    """What the source held, its end included, is passed on although the pump never has to wait."""
    for error in (None, CUT):
        stage = Stage()
        stage.source.say(delta("all"), finish(), DONE).end(error)
        await stage.over()
        assert stage.browser.got == delta("all") + finish() + DONE
        assert (stage.broke, stage.told) == (None, None)


@on_both_loops
async def test_the_unfinished_tail_of_an_answer_that_ended_well_is_passed() -> None:
    """After [DONE], bytes without a blank line belong to the answer."""
    stage = await Stage().begun()
    stage.source.say(DONE + b": bye").end()
    await stage.over()
    assert stage.browser.got == DONE + b": bye"
    assert stage.told is None


@on_both_loops
async def test_an_answer_that_breaks_off_says_so() -> None:
    """Whole events, the tail dropped, one error event; the reason names what the transport said."""
    for error, reason in ((None, "ended early"), (CUT, "ReadError: cut")):
        stage = await Stage().begun()
        stage.source.say(delta("whole"), b"data: {").end(error)
        await stage.over()
        assert stage.told is stage.broke
        assert isinstance(stage.told, Interruption)
        assert stage.told.reason == reason
        assert stage.browser.got == delta("whole") + stage.told.event()


@on_both_loops
async def test_a_long_event_that_breaks_off_gets_a_blank_line_first() -> None:
    """Where part of an event went out early, the error event is still an event of its own."""
    stage = await Stage().begun()
    stage.source.say(b"data: " + b"x" * 100_000).end(CUT)
    await stage.over()
    assert stage.told is not None
    assert stage.browser.got.startswith(b"data: xxx")
    assert stage.browser.got.endswith(b"x\n\n" + stage.told.event())


# ---- a browser that reads slowly -------------------------------------------------------------------------------------


@on_both_loops
async def test_a_send_that_waits_pauses_the_source() -> None:
    """While one message waits the source is paused and no second one is begun; then all of it arrives, in order."""
    stage = await Stage().begun()
    parts = [delta(str(number)) for number in range(5)]
    stage.browser.stop_reading()
    stage.source.say(*parts[:3])
    assert (stage.source.paused, stage.browser.waiting, len(stage.source.held)) == (True, 1, 2)
    await ticks(10)
    assert (stage.browser.waiting, stage.browser.messages) == (1, [HEAD])
    stage.browser.read()
    await settled(lambda: len(stage.browser.messages) == 4)
    assert not stage.source.paused
    stage.source.say(*parts[3:], DONE).end()
    await stage.over()
    assert stage.browser.got == b"".join(parts) + DONE
    assert stage.told is None


@on_both_loops
async def test_a_send_that_waits_for_each_message() -> None:
    """Paused and resumed for every single event, nothing is lost, doubled or reordered."""
    stage = await Stage().begun()
    parts = [delta(str(number)) for number in range(20)]
    stage.browser.stop_reading()
    stage.source.say(*parts, DONE).end()
    for number in range(len(parts) + 1):
        await settled(lambda: stage.browser.waiting)
        assert len(stage.browser.messages) == 1 + number
        stage.browser.read()
        stage.browser.stop_reading()
        await settled(lambda number=number: len(stage.browser.messages) == 2 + number)  # type: ignore[misc]
    stage.browser.read()
    await stage.over()
    assert stage.browser.got == b"".join(parts) + DONE
    assert stage.source.pauses == len(parts) + 1


@on_both_loops
async def test_the_end_while_a_send_waits() -> None:
    """A source that ends, well or badly, while the browser does not read: the browser still gets all, then the end."""
    for error in (None, CUT):
        stage = await Stage().begun()
        stage.browser.stop_reading()
        stage.source.say(delta("slow"))
        stage.relay.end(error)  # a source that does not hold its end back while it is paused
        await ticks(10)
        assert not stage.task.done()
        stage.browser.read()
        await stage.over()
        assert stage.told is not None
        assert stage.browser.got == delta("slow") + stage.told.event()


@on_both_loops
async def test_the_end_together_with_an_event_that_has_to_wait() -> None:
    """The last event, delivered by the stream's own task after a pause and blocked again, is not lost to the end."""
    stage = await Stage().begun()
    stage.browser.stop_reading()
    stage.source.say(delta("slow"))

    def last() -> None:
        stage.relay.data(DONE)
        stage.relay.end(None)

    stage.source.held.append(last)
    await ticks()
    stage.browser.read()
    stage.browser.stop_reading()
    await settled(lambda: delta("slow") == stage.browser.got and stage.browser.waiting)
    await ticks()
    stage.browser.read()
    await stage.over()
    assert stage.browser.got == delta("slow") + DONE
    assert stage.told is None


@on_both_loops
async def test_a_browser_that_leaves_while_a_send_waits() -> None:
    """Blocked or not, leaving ends the stream at once: the source is aborted, the waiting send ended."""
    stage = await Stage().begun()
    stage.browser.stop_reading()
    stage.source.say(delta("slow"))
    await ticks()
    stage.browser.leave()
    await stage.over()
    assert isinstance(stage.broke, ClientGone)
    assert stage.source.aborted
    assert stage.browser.waiting == 0


@on_both_loops
async def test_what_waits_when_the_leash_is_pulled_is_not_lost() -> None:
    """Whole events that the browser has not taken yet go before the last word; an end among them is still the end."""
    for part, pulled, ends_well in (
        (delta("slow"), False, False),
        (delta("slow"), True, False),
        (finish() + DONE, False, True),
        (finish() + DONE, True, True),
    ):
        stage = await Stage().begun()
        stage.browser.stop_reading()
        stage.source.say(part)
        if not pulled:
            await ticks()  # else the pull comes before the task has heard of the wait
        stage.cancel_scope.cancel(StreamDrained())
        await settled(lambda stage=stage: stage.source.aborted)  # type: ignore[misc]
        assert not stage.relay.is_delivered
        stage.browser.read()
        await stage.over()
        assert stage.browser.waiting == 0
        if ends_well:
            assert (stage.browser.got, stage.told) == (part, None)
        else:
            assert stage.told is not None
            assert stage.browser.got == part + stage.told.event()
        assert stage.relay.bytes_sent == len(stage.browser.got)


# ---- a send that fails -----------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_send_that_raises() -> None:
    """An error of `send`, at once or after a wait, comes out of the stream's own task; nothing passes after the gap."""
    for waits in (False, True):
        stage = await Stage().begun()
        stage.browser.faults = {2: Cause("send")}
        if waits:
            stage.browser.stop_reading()
        stage.source.say(delta("lost"), delta("after"), DONE)
        await ticks()
        stage.browser.read()
        await settled(lambda stage=stage: stage.source.aborted)  # type: ignore[misc]
        await ticks()
        stage.browser.read()
        await stage.over()
        assert stage.fault is not None
        assert stage.source.aborted
        assert stage.told is not None
        assert stage.browser.got == stage.told.event()


@on_both_loops
async def test_a_send_that_raises_while_the_task_itself_delivers() -> None:
    """What the source held is delivered by the stream's own task, at its beginning or after a pause: an error there
    comes out like any other, and no cancellation is left for the last word, which may have to wait."""
    for resumed in (False, True):
        stage = Stage()
        if resumed:
            await stage.begun()
            stage.browser.stop_reading()
            stage.source.say(delta("first"))
        stage.browser.faults = {2 + resumed: Cause("send")}
        stage.source.say(delta("lost"), DONE).end()
        await ticks()
        stage.browser.read()
        await settled(lambda stage=stage: stage.source.aborted and stage.browser.waiting)  # type: ignore[misc]
        stage.browser.read()
        await stage.over()
        assert stage.fault is not None
        assert stage.told is not None
        assert stage.browser.got == (delta("first") if resumed else b"") + stage.told.event()


# ---- deadlines -------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_silence_ends_the_stream() -> None:
    """idle_timeout counts from the last bytes, whole events or not."""
    stage = await Stage(idle=0.9).begun()
    loop = asyncio.get_running_loop()
    for _ in range(5):
        await asyncio.sleep(0.2)
        stage.source.say(b"d")  # not an event yet, but a sign of life
    last = loop.time()
    await stage.over()
    assert isinstance(stage.told, StreamTimeout)
    assert 0.89 <= loop.time() - last < LIVENESS
    assert stage.source.aborted


@on_both_loops
async def test_an_endless_stream_ends() -> None:
    """total_timeout ends a stream that talks all the time."""
    stage = await Stage(total=0.2).begun()
    while not stage.task.done():
        stage.source.say(delta("more"))
        await asyncio.sleep(0.01)
    assert isinstance(stage.told, StreamTooLong)
    assert stage.source.aborted
    assert stage.browser.got.endswith(delta("more") + stage.told.event())


@on_both_loops
async def test_idle_timeout_does_not_count_while_the_browser_is_slow() -> None:
    """The upstream is not silent while it is paused: the silence is counted anew once the browser has read."""
    stage = await Stage(idle=SOON).begun()
    stage.browser.stop_reading()
    stage.source.say(delta("slow"))
    await asyncio.sleep(4.5 * SOON)  # at no multiple of SOON, when a timer may be due
    assert not stage.task.done()
    read_at = asyncio.get_running_loop().time()
    stage.browser.read()
    await stage.over()
    assert isinstance(stage.told, StreamTimeout)
    assert asyncio.get_running_loop().time() - read_at > SOON * 0.9


@on_both_loops
async def test_total_timeout_counts_while_the_browser_is_slow() -> None:
    """A browser that does not read cannot hold an upstream for longer than total_timeout."""
    for idle in (FOREVER, SOON / 2):
        stage = await Stage(idle=idle, total=3 * SOON).begun()
        stage.browser.stop_reading()
        stage.source.say(delta("slow"))
        await settled(lambda stage=stage: stage.source.aborted)  # type: ignore[misc]
        assert isinstance(stage.broke, StreamTooLong)
        stage.browser.read()
        await stage.over()
        assert stage.told is stage.broke


@on_both_loops
async def test_nobody_waits_long_after_done() -> None:
    """An upstream that keeps its socket open after [DONE] is closed soon, and the answer has ended well."""
    linger, module.LINGER = module.LINGER, SOON
    try:
        stage = await Stage().begun()
        stage.source.say(delta("all"), DONE)
        await stage.over()
    finally:
        module.LINGER = linger
    assert isinstance(stage.broke, StreamTimeout)
    assert stage.told is None
    assert stage.source.aborted
    assert stage.browser.got == delta("all") + DONE


@on_both_loops
async def test_done_does_not_prolong_a_short_idle_timeout() -> None:
    """Where idle_timeout is shorter than LINGER, it stays."""
    stage = await Stage(idle=SOON).begun()
    began = asyncio.get_running_loop().time()
    stage.source.say(DONE)
    await stage.over()
    assert asyncio.get_running_loop().time() - began < module.LINGER
    assert stage.told is None


# ---- comments in silence ---------------------------------------------------------------------------------------------

COMMENT = b": keep-alive\n\n"


@on_both_loops
async def test_silence_is_filled_with_comments() -> None:
    """A comment after so many seconds without a delivery, again and again; bytes of a held event do not put it off."""
    stage = await Stage(comment=SOON).begun()
    stage.source.say(delta("first"), b"data: {")
    await settled(lambda: stage.browser.got.count(COMMENT) >= 3)
    assert stage.browser.got.partition(delta("first"))[2].startswith(COMMENT * 2)
    stage.source.say(b"}\n\n", DONE).end()
    await stage.over()
    assert stage.browser.got.replace(COMMENT, b"") == delta("first") + b"data: {}\n\n" + DONE
    assert stage.told is None
    assert stage.events.count == 3
    assert stage.relay.bytes_sent == len(stage.browser.got)


@on_both_loops
async def test_no_comment_where_it_would_do_harm() -> None:
    """None inside an event that was passed on early, none while the browser does not read, and none by default."""
    partial = await Stage(comment=SOON).begun()
    partial.source.say(b"data: " + b"x" * 100_000)
    blocked = await Stage(comment=SOON).begun()
    blocked.browser.stop_reading()
    before = bytes(blocked.browser.got)
    blocked.source.say(delta("slow"))
    plain = await Stage().begun()
    await asyncio.sleep(4 * SOON)
    assert blocked.browser.waiting == 1
    blocked.browser.read()
    for stage in (partial, blocked, plain):
        await settled(lambda stage=stage: not stage.browser.waiting)  # type: ignore[misc]
        stage.source.say(b"\n\n", DONE).end()
        await stage.over()
    assert COMMENT not in partial.browser.got + plain.browser.got
    assert blocked.browser.got.startswith(before + delta("slow"))


@on_both_loops
async def test_comments_are_no_sign_of_life_of_the_upstream() -> None:
    """idle_timeout counts the upstream's silence, whatever we say meanwhile."""
    stage = await Stage(comment=SOON, idle=4 * SOON).begun()
    began = asyncio.get_running_loop().time()
    await stage.over()
    assert isinstance(stage.told, StreamTimeout)
    assert asyncio.get_running_loop().time() - began < LIVENESS / 2
    assert stage.browser.got.startswith(COMMENT)


@on_both_loops
async def test_a_comment_that_has_to_wait() -> None:
    """A comment that the browser does not take pauses the upstream like any event, and is not said twice."""
    stage = await Stage(comment=SOON).begun()
    stage.browser.stop_reading()
    await settled(lambda: stage.source.paused)
    await asyncio.sleep(3 * SOON)
    assert stage.browser.waiting == 1
    stage.source.say(delta("next"), DONE).end()
    stage.browser.read()
    await stage.over()
    assert stage.browser.got == COMMENT + delta("next") + DONE


@on_both_loops
async def test_comments_go_on_after_a_wait() -> None:
    """A browser that was slow while a comment was due gets the next ones in their time."""
    stage = await Stage(comment=SOON).begun()
    stage.browser.stop_reading()
    stage.source.say(delta("slow"))
    await asyncio.sleep(2.5 * SOON)
    stage.browser.read()
    await settled(lambda: stage.browser.got.partition(delta("slow"))[2].startswith(COMMENT * 2))
    stage.source.say(DONE).end()
    await stage.over()


# ---- the key ---------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_nothing_passes_after_the_key() -> None:
    """An upstream that sends our key ends the stream: whole events before it pass, it does not, nor what follows."""
    key = random_key()
    for held in (False, True):
        stage = Stage(key=key)
        if not held:
            await stage.begun()
        stage.source.say(delta("fine") + delta(key), delta("after"), DONE).end()
        await stage.over()
        assert stage.relay.key_leaked
        assert stage.told is not None
        assert stage.browser.got == delta("fine") + stage.told.event()
        assert stage.source.aborted


@on_both_loops
async def test_the_key_in_the_tail() -> None:
    """A key in what is held after [DONE] turns a good end into a broken one; not a byte of the tail passes."""
    key = random_key()
    stage = await Stage(key=key).begun()
    stage.source.say(DONE + b"data: " + key.encode()).end()
    await stage.over()
    assert stage.relay.key_leaked
    assert stage.told is not None
    assert stage.browser.got == DONE + stage.told.event()


# ---- every await, hung once and cancelled once -----------------------------------------------------------------------


async def hung_at_the_head() -> Stage:
    stage = Stage()
    stage.browser.stop_reading()
    await settled(lambda: stage.browser.waiting)
    return stage


async def hung_without_data() -> Stage:
    return await Stage().begun()


async def hung_in_an_event() -> Stage:
    stage = await Stage().begun()
    stage.browser.stop_reading()
    stage.source.say(delta("slow"))
    await ticks()
    return stage


async def hung_at_the_last_word() -> Stage:
    stage = await Stage().begun()
    stage.source.say(DONE)
    stage.browser.stop_reading()
    stage.source.end()
    await settled(lambda: stage.browser.waiting)
    return stage


AWAITS = {
    "the head": hung_at_the_head,
    "data": hung_without_data,
    "an event": hung_in_an_event,
    "the last word": hung_at_the_last_word,
}


@pytest.mark.parametrize("where", AWAITS)
@on_both_loops
async def test_every_await_can_be_cancelled(where: str) -> None:
    """A task that is cancelled at any of its awaits ends as cancelled, its source aborted, its send ended."""
    stage = await AWAITS[where]()
    stage.task.cancel()
    await asyncio.wait([stage.task])
    assert stage.task.cancelled()
    assert stage.source.aborted
    assert stage.browser.waiting == 0


@pytest.mark.parametrize("where", [where for where in AWAITS if where != "the last word"])
@on_both_loops
async def test_every_await_can_be_pulled(where: str) -> None:
    """Inside the leash, whatever pulls it comes out of whichever await; the browser is told when it reads again."""
    stage = await AWAITS[where]()
    stage.cancel_scope.cancel(StreamDrained())
    await settled(lambda: stage.source.aborted)
    stage.browser.read()
    await stage.over()
    assert isinstance(stage.told, StreamDrained)
    assert stage.browser.got == (delta("slow") if where == "an event" else b"") + stage.told.event()


@on_both_loops
async def test_the_last_word_is_not_on_the_leash() -> None:
    """What is said at the end is said whatever pulls by then: its only bound is the server's write deadline."""
    stage = await hung_at_the_last_word()
    stage.cancel_scope.cancel(StreamFailed())
    stage.browser.leave()
    await ticks()
    assert not stage.task.done()
    stage.browser.read()
    await stage.over()
    assert stage.browser.got == DONE
    assert stage.told is None
