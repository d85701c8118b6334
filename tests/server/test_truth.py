"""Streams of all kinds, endings and reading speeds: no broken stream looks complete.

The number of a stream determines it, so a failed one can be repeated alone. CHAT_PROXY_FULL=1 plays 1,000 of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pytest
from support.harness import DONE, LOOPS, Peer, Running, ScriptedUpstream, delta, finish, raw_chat, running

FULL = os.environ.get("CHAT_PROXY_FULL") == "1"
STREAMS = 1000 if FULL else 30
READERS = 20
SMALL = 8192  # bytes of socket buffers, for slow readers
DEADLINES = {"UPSTREAM_IDLE_TIMEOUT": "0.3", "UPSTREAM_TOTAL_TIMEOUT": "0.8"}  # seconds; many streams reach one of them
OURS = b'data: {"error":{"message":"The answer '

ERROR = b'data: {"error":{"message":"Overloaded"}}\n\n'
LASTS = {"done": [DONE], "reason": [finish()], "both": [finish(), DONE], "error": [ERROR], "none": [], "tail": []}


@dataclass(frozen=True)
class Plan:
    """One stream: its events, the bytes after the last one, and the number of bytes up to its end signal."""

    dice: random.Random
    events: list[bytes]
    tail: bytes
    until_end: int | None

    @classmethod
    def of(cls, number: int) -> Plan:
        dice = random.Random(number)
        kinds = [b": comment\n\n", delta("y" * 70_000), delta("y" * 200_000), *(delta("x" * 30_000), delta("x")) * 3]
        last, line_end = dice.choice([*LASTS]), dice.choice([b"\n", b"\n", b"\r\n", b"\r"])
        told = [dice.choice(kinds) for _ in range(dice.randint(0, 12))]
        events = [event.replace(b"\n", line_end) for event in (*told, *LASTS[last])]
        until_end = sum(map(len, events[: len(told) + 1])) if LASTS[last] else None
        return cls(dice, events, b'data: {"cho' if last == "tail" else b"", until_end)

    @property
    def sent(self) -> bytes:
        return b"".join(self.events) + self.tail

    async def play(self, peer: Peer) -> None:
        """Sends the stream in pieces of random sizes, and stops in a random way."""
        sent, start = self.sent, 0
        await peer.head()
        while start < len(sent):
            size = self.dice.choice([7, 100, 5000, 70_000, 300_000])
            await peer.chunk(sent[start : start + size])
            start += size
            await asyncio.sleep(self.dice.choice([0, 0, 0, 0.01]))
        how = self.dice.choice(["end", "end", "reset", "cut", "silent"])
        if how == "end":
            await peer.end()
            return
        await asyncio.sleep(0.03)  # so that a reset does not overtake the bytes before it
        if how == "reset":
            peer.reset()
        elif how == "cut":
            peer.writer.close()
        await peer.gone()

    def fault_of(self, got: bytes) -> str | None:
        """The fault of a body that ended cleanly, or None."""
        place = got.rfind(OURS)
        if place < 0:
            if self.until_end is None:
                return "it looks as if it had ended"
            is_whole = self.sent.startswith(got) and len(got) >= self.until_end
            return None if is_whole else f"it ended after {len(got)} bytes of {self.until_end}"
        before = got[:place]
        ends = {0, *accumulate(map(len, self.events))}
        ends |= {end - 1 for end in ends}  # the LF of a last CR LF may still have been on its way
        if self.sent.startswith(before) and len(before) in ends:
            return None
        is_long = before.endswith(b"\n\n") and self.sent.startswith(before[:-2])  # an event that went out early
        return None if is_long else f"{len(before)} bytes, not whole events, before our event"


async def upstream(peer: Peer) -> None:
    while not peer.writer.is_closing():
        await Plan.of(int((await peer.request()).json["messages"][0]["content"])).play(peer)


def read(proxy: Running, number: int) -> bytes:
    """Reads a whole response, with one pause."""
    dice, data = random.Random(-number - 1), b""
    pause, after = dice.choice([0, 0.2, 1.0]), dice.choice([0, 1000, 100_000])
    with raw_chat(proxy, buffers=dice.choice([0, SMALL]), messages=[{"role": "user", "content": f"{number}"}]) as sock:
        while not data.endswith(b"\r\n0\r\n\r\n"):
            if pause and len(data) >= after:
                time.sleep(pause)
                pause = 0
            part = sock.recv(dice.choice([4096, 65536]))
            assert part, "the response was cut"
            data += part
    return data


def body_of(response: bytes) -> bytes:
    left, parts = response.partition(b"\r\n\r\n")[2], []
    while size := int(left.partition(b"\r\n")[0], 16):
        left = left.partition(b"\r\n")[2]
        parts.append(left[:size])
        left = left[size + 2 :]
    return b"".join(parts)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_looks_whole_is_whole(loop: str) -> None:
    """A response without our event is complete, with its end signal; one with our event has whole events before it."""
    with (
        ScriptedUpstream(upstream) as model,
        running(model.base_url, loop=loop, **DEADLINES) as proxy,
        ThreadPoolExecutor(READERS) as readers,
    ):
        bodies = readers.map(lambda number: body_of(read(proxy, number)), range(STREAMS))
        faults = {number: fault for number, body in enumerate(bodies) if (fault := Plan.of(number).fault_of(body))}
        assert faults == {}
        assert proxy.lines("bug") == proxy.lines("key_alarm") == []
