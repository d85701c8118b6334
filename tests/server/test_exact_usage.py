"""limits.exact_usage: the upstream is asked for the cost of a stream; the client gets the same stream as without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.harness import DONE, LOOPS, Peer, Running, ScriptedUpstream, chat, delta, finish, random_key, running

from proxy.chat import policy
from proxy.chat.sse import Events
from proxy.settings import from_variables
from proxy.telemetry.records import Usage

KEY = random_key()
COST = {"prompt_tokens": 7, "completion_tokens": 11, "total_tokens": 18}
EXTRA = b'data: {"id":"c1","choices":[],"usage":%b}\n\n' % json.dumps(COST).encode()
LAST = finish().replace(b'"finish_reason":"stop"}]', b'"finish_reason":"stop"}],"usage":%b' % json.dumps(COST).encode())
NULL = delta("one").replace(b'"created":1', b'"created":1,"usage":null')
PLAIN = (delta("one"), delta("two"), finish())


async def upstream(peer: Peer) -> None:
    """Answers as the last message asks. Like OpenAI, it sends its usage in an extra chunk only on request."""
    while True:
        fields = (await peer.request()).json
        wants = (fields.get("stream_options") or {}).get("include_usage")
        match fields["messages"][-1]["content"]:
            case "extra":
                await peer.sse(*PLAIN, *([EXTRA] if wants else []), DONE)
            case "null in each":
                await peer.sse(NULL, NULL, finish(), *([EXTRA] if wants else []), DONE)
            case "one read":
                await peer.sse(b"".join([*PLAIN, *([EXTRA] if wants else []), DONE]))
            case "last":
                await peer.sse(*PLAIN[:-1], LAST, DONE)
            case "never":
                await peer.sse(*PLAIN, DONE)


@pytest.fixture(scope="module", params=LOOPS)
def exact(request: pytest.FixtureRequest) -> Iterator[tuple[Running, ScriptedUpstream]]:
    with (
        ScriptedUpstream(upstream) as model,
        running(model.base_url, loop=request.param, LIMITS_EXACT_USAGE="true") as proxy,
    ):
        yield proxy, model


def ask(proxy: Running, what: str, **fields: Any) -> tuple[bytes, int]:
    """Sends a request; returns the answer's bytes and the tokens booked for it."""
    before, lines = proxy.tokens_used().get("tokens_per_session", 0), len(proxy.lines())
    body = chat(proxy, messages=[{"role": "user", "content": what}], **fields).body
    proxy.line(lines + 1)
    return body, proxy.tokens_used()["tokens_per_session"] - before


@pytest.mark.parametrize("what", ["extra", "null in each", "one read", "last", "never"])
def test_exact_usage_leaves_the_stream_unchanged(what: str, exact: tuple[Running, ScriptedUpstream]) -> None:
    """The client gets the same stream as without exact_usage, and the upstream's count is booked if it sends one."""
    proxy, model = exact
    with running(model.base_url) as without:
        plain, estimate = ask(without, what)
    body, booked = ask(proxy, what)
    assert body == plain
    assert booked == (estimate if what == "never" else COST["total_tokens"])
    assert model.seen[-1].json["stream_options"] == {"include_usage": True}
    assert "stream_options" not in model.seen[-2].json


def test_a_client_that_requests_usage_receives_it(exact: tuple[Running, ScriptedUpstream]) -> None:
    """A client that sets include_usage itself receives the chunk with the usage."""
    proxy, _ = exact
    body, booked = ask(proxy, "extra", stream_options={"include_usage": True})
    assert body == b"".join([*PLAIN, EXTRA, DONE])
    assert booked == COST["total_tokens"]


def test_other_stream_options_are_kept(exact: tuple[Running, ScriptedUpstream]) -> None:
    """include_usage is added to the client's own stream_options, which are otherwise unchanged."""
    proxy, model = exact
    for options in ({"include_usage": False}, {"include_obfuscation": False}, None):
        body, _ = ask(proxy, "extra", stream_options=options)
        assert body == b"".join([*PLAIN, DONE])
        assert model.seen[-1].json["stream_options"] == {**(options or {}), "include_usage": True}


def test_whole_answers_request_no_usage() -> None:
    """The body of a request without streaming is passed on unchanged: its answer contains the usage anyway."""
    rules = from_variables(
        {
            "CHAT_PROXY_UPSTREAM_BASE_URL": "http://127.0.0.1/v1",
            "CHAT_PROXY_UPSTREAM_API_KEY": KEY,
            "CHAT_PROXY_POLICY_MODELS": "m",
        }
    ).policy
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}).encode()
    prepared = policy.apply(body, rules, exact_usage=True)
    assert (prepared.body, prepared.usage_for_us) == (body, False)


STREAM = b"".join([*PLAIN, b": comment\n\n", EXTRA, LAST, DONE])


@given(st.sets(st.integers(1, len(STREAM) - 1), max_size=8))
def test_usage_is_withheld_wherever_the_reads_are_cut(places: set[int]) -> None:
    """The chunk with the usage is withheld and counted, wherever the reads split the stream."""
    ends = [0, *sorted(places), len(STREAM)]
    events = Events(KEY.encode(), withhold_usage=True)
    passed = b"".join(events.feed(STREAM[start:end]) for start, end in pairwise(ends))
    assert passed == STREAM.replace(EXTRA, b"")
    assert events.usage == Usage(7, 11)
    assert events.count == len(PLAIN) + 2


@pytest.mark.parametrize(
    "chunk",
    [
        b'data: {"choices":null,"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n',
        b'data: {"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":7.5}}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":"x"}}\n\n',
    ],
)
def test_invalid_usage_is_withheld_too(chunk: bytes) -> None:
    """A chunk without choices is withheld even if its usage is invalid, and passed on without exact_usage."""
    assert Events(KEY.encode(), withhold_usage=True).feed(chunk) == b""
    assert Events(KEY.encode()).feed(chunk) == chunk


@pytest.mark.parametrize(
    "chunk",
    [
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1},"error":{"message":"x"}}\n\n',
        b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n',
    ],
)
def test_nothing_else_is_withheld(chunk: bytes) -> None:
    """A chunk with choices, with an error or without usage is passed on."""
    assert Events(KEY.encode(), withhold_usage=True).feed(chunk) == chunk
    assert Events(KEY.encode()).feed(EXTRA) == EXTRA
