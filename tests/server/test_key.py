"""The key canary: upstreams that return our key in every possible place, and browsers that never receive it.

The harness searches for all pieces of 8 characters of the key at the end of each server; `assert_unseen` does so after
each case, ignoring case, so that the leaking case is the one that fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.harness import DONE, LOOPS, Peer, ScriptedUpstream, chat, delta, eventually, finish, pieces, running
from support.stage import Act, Stage, always, prompt_tokens

from proxy.chat.sse import HOLD

HALF = delta("half")

Text = Callable[[str], bytes]  # the text that a case writes, from the key


@pytest.fixture(scope="module", params=LOOPS)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(request.param, UPSTREAM_RETRIES="0").open() as stage:
        yield stage


def key_of(peer: Peer) -> str:
    """The key in our Authorization header."""
    assert peer.seen is not None
    return peer.seen.headers["authorization"].removeprefix("Bearer ")


def whole_head(peer: Peer) -> str:
    assert peer.seen is not None
    return peer.seen.head.decode()


def assert_unseen(stage: Stage) -> None:
    proxy = stage.proxy
    proxy.assert_key_unseen()
    seen = bytes(proxy.sent + proxy.output.getvalue()).lower()
    for piece in pieces(proxy.key):
        assert piece.lower().encode() not in seen


def alarms(stage: Stage) -> list[str]:
    """The request ids of all alarms so far."""
    return [line["request_id"] for line in stage.proxy.lines("key_alarm")]


# ---- before the answer begins ---------------------------------------------------------------------------------------


def saying(status: str, text: Text, *, content_type: str = "application/json", header: Text | None = None) -> Act:
    async def act(peer: Peer) -> None:
        key = key_of(peer)
        more = [header(key).decode()] if header else []
        await peer.whole(text(key), status, content_type, "connection: close", *more)
        peer.writer.close()

    return act


def in_header(status: str, header: Text, content_type: str = "text/event-stream") -> Act:
    return saying(status, lambda key: HALF, content_type=content_type, header=header)


def raw(text: Text) -> Act:
    async def act(peer: Peer) -> None:
        await peer.send(text(key_of(peer)))
        peer.writer.close()

    return act


def error(**fields: Any) -> Text:
    """An error object of OpenAI; each value contains the key."""
    return lambda key: json.dumps({"error": {name: value(key) for name, value in fields.items()}}).encode()


async def echo_of_the_request(peer: Peer) -> None:
    body = json.dumps({"error": {"message": whole_head(peer), "code": "invalid_api_key"}}).encode()
    await peer.whole(body, "401 Unauthorized", "application/json", "connection: close")
    peer.writer.close()


SMALL = slice(8, 40)  # of the random part

REFUSED: dict[str, tuple[Act, int, str, bool]] = {
    "401 that echoes the request": (echo_of_the_request, 502, "upstream_auth", True),
    "403 with the key": (saying("403 Forbidden", lambda key: key.encode()), 502, "upstream_auth", True),
    "400 with the key as message": (saying("400 No", error(message=str)), 400, "upstream_rejected", False),
    "400 with the key as code": (saying("400 No", error(code=str)), 400, "upstream_rejected", False),
    "400 with a piece as code": (
        saying("400 No", error(code=lambda key: "x_" + key.lower()[10:18])), 400, "upstream_rejected", False
    ),
    "400 with a piece as param": (
        saying("400 No", error(param=lambda key: f"messages[{key.lower()[SMALL]}]")), 400, "upstream_rejected", False
    ),
    "404 with the key as type": (saying("404 No", error(type=str)), 400, "upstream_rejected", False),
    "429 with the key": (saying("429 No", error(message=str)), 429, "upstream_rate_limited", False),
    "500 with the key": (
        saying("500 No", lambda key: f"<h1>{key}</h1>".encode(), content_type="text/html"), 502, "upstream_error", False
    ),
    "200 in HTML": (
        saying("200 OK", lambda key: f"<p>{key}".encode(), content_type="text/html"), 502, "upstream_protocol", False
    ),
    "200 in JSON": (saying("200 OK", error(message=str)), 502, "upstream_protocol", False),
    "a reason phrase": (
        raw(lambda key: f"HTTP/1.1 500 {key}\r\ncontent-length: 0\r\n\r\n".encode()), 502, "upstream_error", False
    ),
    "a status": (raw(lambda key: f"HTTP/1.1 {key} OK\r\n\r\n".encode()), 502, "upstream_protocol", False),
    "a protocol": (raw(lambda key: f"{key}\r\n\r\n".encode()), 502, "upstream_protocol", False),
    "a line of the headers": (
        raw(lambda key: f"HTTP/1.1 200 OK\r\n{key}\r\n\r\n".encode()), 502, "upstream_protocol", False
    ),
    "a content type": (
        saying("200 OK", lambda key: HALF, content_type="text/event-stream, x", header=lambda key: b"x: y"),
        502, "upstream_protocol", False,
    ),
    "a location": (in_header("302 No", lambda key: f"location: /{key}".encode()), 502, "upstream_protocol", False),
    "a Retry-After": (
        in_header("429 No", lambda key: f"retry-after: {key}".encode()), 429, "upstream_rate_limited", False
    ),
    "a content coding": (
        in_header("200 OK", lambda key: f"content-encoding: {key}".encode()), 502, "upstream_protocol", False
    ),
    "a transfer coding": (
        raw(lambda key: f"HTTP/1.1 200 OK\r\ntransfer-encoding: {key}\r\n\r\n".encode()), 502, "upstream_protocol",
        False,
    ),
    "a content length": (
        raw(lambda key: f"HTTP/1.1 200 OK\r\ncontent-length: {key}\r\n\r\n".encode()), 502, "upstream_protocol", False
    ),
    "an upgrade": (
        raw(lambda key: f"HTTP/1.1 101 No\r\nupgrade: {key}\r\nconnection: upgrade\r\n\r\n".encode()), 502,
        "upstream_protocol", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("act", "status", "code", "alarm"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_holds_nothing_of_the_key(act: Act, status: int, code: str, alarm: bool, stage: Stage) -> None:
    """Wherever the upstream writes the key into a refusal, the browser and the log get our own text instead."""
    before = len(alarms(stage))
    reply, line, _ = stage.chat(act)
    assert (reply.status, reply.error["code"], line["code"]) == (status, code, code)
    assert_unseen(stage)
    assert alarms(stage)[before:] == ([line["request_id"]] if alarm else [])


@pytest.mark.parametrize("content_type", ["{}", "text/{}", "{}/x; charset=utf-8", "text/event-stream{}", "{} "])
@pytest.mark.parametrize("case", [str, str.lower, str.upper])
def test_a_content_type_of_the_key_is_not_logged(content_type: str, case: Callable[[str], str], stage: Stage) -> None:
    """The log names a wrong content type, unless it contains our key."""

    async def act(peer: Peer) -> None:
        await peer.whole(HALF, "200 OK", content_type.format(case(key_of(peer))[SMALL]), "connection: close")
        peer.writer.close()

    reply, line, _ = stage.chat(act)
    assert (reply.status, reply.error["code"]) == (502, "upstream_protocol")
    assert line["reason"].startswith("content-type ")
    assert_unseen(stage)


# ---- whole answers --------------------------------------------------------------------------------------------------


def answer(text: Text) -> Text:
    """A chat.completion with this content."""
    return lambda key: json.dumps({"choices": [{"message": {"content": text(key).decode()}}]}).encode()


ECHOES: dict[str, Text] = {
    "the key": lambda key: key.encode(),
    "its random part": lambda key: key[8:].encode(),
    "in capitals": lambda key: key.upper().encode(),
    "in small letters": lambda key: key.lower().encode(),
    "its first eight characters": lambda key: b"it begins with " + key[8:16].encode(),
    "its last eight characters": lambda key: b"it ends with " + key[-8:].encode(),
    "eight in between": lambda key: key[20:28].encode(),
}


@pytest.mark.parametrize("text", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_whole_answer_with_the_key_is_refused(text: Text, chunked: bool, stage: Stage) -> None:
    """A whole answer with eight characters of the key is refused: 502, the prompt charged, and an alarm."""

    async def in_chunks(peer: Peer) -> None:
        await peer.head("200 OK", "application/json", "connection: close")
        for byte in answer(text)(key_of(peer)):
            await peer.chunk(bytes([byte]))
        await peer.end()
        peer.writer.close()

    before = len(alarms(stage))
    reply, line, _ = stage.chat(in_chunks if chunked else saying("200 OK", answer(text)), stream=False)
    assert (reply.status, reply.error["code"]) == (502, "upstream_protocol")
    assert line["tokens"] == prompt_tokens(stage.proxy, stream=False)
    assert_unseen(stage)
    assert alarms(stage)[before:] == [line["request_id"]]


def test_seven_characters_are_no_leak(stage: Stage) -> None:
    """An answer with seven characters of the key, or with its prefix `sk-test-`, is passed on."""
    text: Text = lambda key: f"sk-test- {key[8:15]} {key[-7:]}".encode()  # noqa: E731  # a text like the others
    reply, _, _ = stage.chat(saying("200 OK", answer(text)), stream=False)
    assert reply.status == 200
    assert reply.json["choices"][0]["message"]["content"] == text(stage.proxy.key).decode()


# ---- streams --------------------------------------------------------------------------------------------------------


def streaming(*texts: Text) -> Act:
    """An endless stream of these parts, each as a chunk of its own."""

    async def act(peer: Peer) -> None:
        await peer.head()
        for text in texts:
            await peer.chunk(text(key_of(peer)))
        await peer.gone()
        peer.writer.close()

    return act


def same(part: bytes) -> Text:
    return lambda key: part


def echo(key: str) -> bytes:
    return delta(f"you are {key}, hello")


half = same(HALF)
STREAMS: dict[str, tuple[list[Text], bytes]] = {
    "at once": ([echo], b""),
    "after some events": ([half, half, echo], HALF * 2),
    "behind events in one chunk": ([lambda key: HALF * 3 + echo(key) + HALF], HALF * 3),
    "before further events": ([half, echo, half, half], HALF),
    "in a comment": ([half, lambda key: f": {key}\n\n".encode()], HALF),
    "in an event's name": ([half, lambda key: f"event: {key}\ndata: x\n\n".encode()], HALF),
    "in an id": ([half, lambda key: f"id: {key}\ndata: x\n\n".encode()], HALF),
    "as a line of its own": ([half, lambda key: f"{key}\n\n".encode()], HALF),
    "with CR LF": ([half, lambda key: f"data: {key}\r\n\r\n".encode()], HALF),
    "in an error event": ([half, lambda key: b'data: {"error":{"message":"%b"}}\n\n' % key.encode()], HALF),
    "in the last event": ([half, lambda key: finish(key)], HALF),
    "beside [DONE]": ([half, lambda key: f"data: [DONE]\n: {key}\n\n".encode()], HALF),
    "after finish_reason": ([half, same(finish()), echo], HALF + finish()),
    "after [DONE]": ([half, same(DONE), echo], HALF + DONE),
    "with [DONE] in one chunk": ([half, lambda key: DONE + echo(key)], HALF + DONE),
    "in the whole head of our request": ([half, lambda key: b"data: Bearer %b\n\n" % key.encode()], HALF),
    "letter by letter": (
        [half, *[lambda key, i=i: echo(key)[i : i + 1] for i in range(len(echo("k" * 48)))]],
        HALF,
    ),
}


def assert_stopped(stage: Stage, act: Act, whole: bytes) -> None:
    """Asserts that the browser got the whole events before the key, then our event; an alarm; the upstream closed."""
    before = len(alarms(stage))
    reply, line, _ = stage.chat(act)
    assert reply.status == 200
    assert reply.body.startswith(whole)
    ours = reply.body.removeprefix(whole)
    assert json.loads(ours.removeprefix(b"data: "))["error"]["code"] == "stream_interrupted"
    assert not reply.cut
    assert (line["ending"], line["code"]) == ("truncated", "stream_interrupted")
    assert line["events"] == whole.count(b"\n\n")
    assert line["tokens"] == prompt_tokens(stage.proxy) + line["events"]
    assert_unseen(stage)
    assert alarms(stage)[before:] == [line["request_id"]]
    eventually(lambda: not stage.upstream.open)


@pytest.mark.parametrize(("texts", "whole"), STREAMS.values(), ids=STREAMS)
def test_a_stream_with_the_key_is_stopped(texts: list[Text], whole: bytes, stage: Stage) -> None:
    """No byte of the event that contains the key, nor of any later event, reaches the browser."""
    assert_stopped(stage, streaming(*texts), whole)


@pytest.mark.parametrize("place", range(8, len(echo("k" * 48)), 9))
def test_a_key_in_two_chunks(place: int, stage: Stage) -> None:
    """Wherever the event with the key is cut, the browser gets the events before it and no more."""
    act = streaming(half, lambda key: echo(key)[:place], lambda key: echo(key)[place:])
    assert_stopped(stage, act, HALF)


@pytest.mark.parametrize("place", [-1, 0, 1, 30, 47, 48, 60, 5_000])
def test_a_key_in_an_event_that_goes_out_early(place: int, stage: Stage) -> None:
    """In an event of over 64 KiB, a key across the border between sent and held bytes is stopped too."""

    async def act(peer: Peer) -> None:
        key = key_of(peer)
        long = b"data: " + b"." * (HOLD + place) + key.encode() + b"." * HOLD
        await peer.head()
        for start in range(0, len(long), HOLD + 1):
            await peer.chunk(long[start : start + HOLD + 1])
        await peer.gone()
        peer.writer.close()

    before = len(alarms(stage))
    reply, line, _ = stage.chat(act)
    early, _, ours = (
        reply.body.rpartition(b"\n\ndata: ") if reply.body.startswith(b"data: .") else (b"", b"", reply.body)
    )
    assert set(early) <= set(b"data: .")
    assert json.loads(ours.removeprefix(b"data: "))["error"]["code"] == "stream_interrupted"
    assert (line["ending"], line["code"]) == ("truncated", "stream_interrupted")
    assert_unseen(stage)
    assert alarms(stage)[before:] == [line["request_id"]]
    eventually(lambda: not stage.upstream.open)


def test_a_key_in_the_last_unfinished_line(stage: Stage) -> None:
    """Bytes after a clean end that form no event are searched like the rest."""

    async def act(peer: Peer) -> None:
        await peer.head("200 OK", "text/event-stream", "connection: close")
        await peer.chunk(HALF + finish() + b": " + key_of(peer).encode())
        await peer.end()
        peer.writer.close()

    assert_stopped(stage, act, HALF + finish())


@pytest.mark.parametrize(
    "text", ["5;{}\r\n", "{}\r\n", "1\r\nx{}\r\n", "0\r\nx-trailer: {}\r\n\r\n", "0\r\n{}\r\n\r\n"]
)
def test_a_key_in_the_framing(text: str, stage: Stage) -> None:
    """Chunk sizes, chunk extensions and trailers are not passed on, however malformed."""

    async def act(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(HALF)
        await peer.send(text.format(key_of(peer)).encode())
        peer.writer.close()

    reply, line, _ = stage.chat(act)
    assert reply.body.startswith(HALF + b'data: {"error":')
    assert line["code"] == "stream_interrupted"
    assert_unseen(stage)


def test_the_key_in_headers_of_a_good_stream(stage: Stage) -> None:
    """A stream whose headers echo our request is passed on, without those headers."""

    async def act(peer: Peer) -> None:
        key = key_of(peer)
        await peer.send(f"HTTP/1.1 103 {key}\r\nlink: <{key}>\r\n\r\n".encode())
        await peer.head(
            f"200 {key}", f"text/event-stream; x={key}", f"set-cookie: {key}", f"{key}: 1", "connection: close"
        )
        await peer.chunk(HALF + DONE)
        await peer.send(f"0\r\nx-key: {key}\r\n\r\n".encode())
        peer.writer.close()

    reply, line, _ = stage.chat(act)
    assert (reply.body, line["ending"]) == (HALF + DONE, "complete")
    assert_unseen(stage)


# ---- keys that are no secrets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["none", "EMPTY", "ollama", "sk-1234", "lm-studio"])
def test_a_placeholder_is_not_searched_for(key: str) -> None:
    """A key that is a placeholder or short, for a server that needs none, is no leak when an answer contains it."""
    text = f"none of it is EMPTY, says ollama to {key[3:]}"

    async def act(peer: Peer) -> None:
        assert peer.seen is not None
        if peer.seen.json["stream"]:
            await peer.sse(delta(text) + delta(text), delta("x" * HOLD + text), finish(), DONE)
        else:
            await saying("200 OK", answer(lambda _: text.encode()))(peer)

    with ScriptedUpstream(always(act)) as upstream, running(upstream.base_url, key=key) as proxy:
        assert chat(proxy).body == delta(text) * 2 + delta("x" * HOLD + text) + finish() + DONE
        assert chat(proxy, stream=False).json["choices"][0]["message"]["content"] == text
        assert upstream.seen[0].headers["authorization"] == f"Bearer {key}"
        assert proxy.lines("key_alarm") == []
