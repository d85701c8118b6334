"""The demo model: over real sockets what clients see, and without them what the pure part decides."""

from __future__ import annotations

import itertools
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from httpx import Response
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from support.harness import eventually

from proxy.demo import answers as demo_answers
from proxy.demo import model as demo
from proxy.demo import request as demo_request

KEY = "demo-" + secrets.token_hex(16)
DEADLINE = 10.0
"""Seconds that anything may take before a test gives up; generous, since only liveness is promised."""


# Servers and requests -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Running:
    port: int
    thread: int  # the server's, to tell its log lines from those of one that is still ending

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def openai(self, api_key: str = KEY) -> OpenAI:
        return OpenAI(base_url=self.base_url, api_key=api_key, max_retries=0, timeout=DEADLINE)

    def post(self, body: object = None, *, content: bytes | None = None, key: str | None = KEY) -> Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        url = f"{self.base_url}/chat/completions"
        if content is None:
            return httpx.post(url, json=body, headers=headers, timeout=DEADLINE, trust_env=False)
        return httpx.post(url, content=content, headers=headers, timeout=DEADLINE, trust_env=False)

    def stream(self, message: str, **fields: object) -> list[dict[str, Any]]:
        """The events of a whole stream, `[DONE]` taken off."""
        reply = self.post(asking(message, stream=True, **fields))
        assert reply.status_code == 200
        events = reply.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@contextmanager
def serving(api_key: str | None = KEY, delay_seconds: float = 0.0) -> Iterator[Running]:
    app = demo.build(api_key=api_key, delay_seconds=delay_seconds, clock=lambda: 1_700_000_000.5)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield Running(server.servers[0].sockets[0].getsockname()[1], thread.ident or 0)
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def model() -> Iterator[Running]:
    """A demo model without delay, which wants `KEY`."""
    with serving() as running:
        yield running


def asking(message: object, **fields: object) -> dict[str, object]:
    return {"model": "demo", "messages": [{"role": "user", "content": message}], **fields}


def content(events: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


# openai-python as people use it ---------------------------------------------------------------------------


def test_the_common_loop_over_a_stream(model: Running) -> None:
    """Every chunk of a stream without include_usage has a choice, so the loop that everyone copies works."""
    with model.openai() as client:
        stream = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Write a short story."}], stream=True
        )
        text, reasons = "", []
        for chunk in stream:
            if chunk.choices[0].delta.content:
                text += chunk.choices[0].delta.content
            reasons.append(chunk.choices[0].finish_reason)
            assert chunk.usage is None
            assert chunk.object == "chat.completion.chunk"
            assert chunk.created == 1_700_000_000
    assert text == demo_answers.choose("Write a short story.")
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}


def test_usage_comes_last_and_with_empty_choices(model: Running) -> None:
    """With include_usage the last chunk has the usage and no choices; one content chunk is one token."""
    with model.openai() as client:
        stream = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    *others, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(1 for chunk in others if chunk.choices[0].delta.content)
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in others)


def test_one_object_without_stream(model: Running) -> None:
    """Without stream the answer is one chat.completion with the same text and the same count of tokens."""
    with model.openai() as client:
        reply = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hello"}])
    text = demo_answers.choose("hello")
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.content == text
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(demo.pieces(text))
    assert reply.usage.prompt_tokens == 3 + 4 + 2


def test_models_are_listed(model: Running) -> None:
    """GET /v1/models lists MODELS, the default first."""
    with model.openai() as client:
        assert tuple(entry.id for entry in client.models.list()) == demo_request.MODELS


def test_a_wrong_key_is_an_authentication_error(model: Running) -> None:
    """A wrong key is 401 `invalid_api_key`, and neither key comes back."""
    wrong = "wrong-" + secrets.token_hex(16)
    with model.openai(wrong) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hello"}])
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert wrong not in caught.value.response.text
    assert KEY not in caught.value.response.text


def test_an_unknown_model_is_not_found(model: Running) -> None:
    """A model that is not in MODELS is 404 `model_not_found`."""
    with model.openai() as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-0", messages=[{"role": "user", "content": "hello"}])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_a_staged_429_is_a_rate_limit_error(model: Running) -> None:
    """`/error 429` raises the SDK's RateLimitError and says when to come back."""
    with model.openai() as client, pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "please /error 429"}], stream=True
        )
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.code == "rate_limit_exceeded"


# The bytes ------------------------------------------------------------------------------------------------


def test_the_stream_is_openai_s_wire_format(model: Running) -> None:
    """Role first, then content, an empty delta with the reason, [DONE]; compact, and readable as UTF-8."""
    reply = model.post(asking("ሰላም", stream=True))
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *_, last, done, rest = reply.content.split(b"\n\n")
    assert first.startswith(b'data: {"id":"chatcmpl-')
    assert b'"delta":{"role":"assistant","content":""' in first
    assert b'"delta":{},"logprobs":null,"finish_reason":"stop"' in last
    assert (done, rest) == (b"data: [DONE]", b"")
    assert "ሰላም".encode() in reply.content
    assert b"usage" not in reply.content


def test_usage_is_null_before_it_is_known(model: Running) -> None:
    """With include_usage all chunks but the last say `"usage": null`, as OpenAI's do."""
    *others, last = model.stream("hello", stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in others)
    assert last["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 9, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 2, "max_completion_tokens": None}, 2),
    ],
)
def test_token_limits(model: Running, fields: dict[str, object], tokens: int) -> None:
    """The answer ends with reason `length` at the smaller of the two limits, one piece being one token."""
    events = model.stream("hello", **fields)
    assert content(events) == "".join(demo.pieces(demo_answers.choose("hello"))[:tokens])
    assert sum(1 for event in events if event["choices"][0]["delta"].get("content")) == tokens
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["demo model", ["nowhere", "demo model", "connect"]])
def test_stop_strings(model: Running, stop: object) -> None:
    """The answer ends before the first stop string that would occur in it."""
    events = model.stream("hello", stop=stop)
    assert content(events) == "Hello! 👋 I am the "
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("label", "body", "param"),
    [
        ("not JSON", b"{", None),
        ("not UTF-8", b'{"model": "\xff"}', None),
        ("NaN", b'{"model": NaN}', None),
        ("too deep", b"[" * 100_000, None),
        ("huge integer", b'{"n": ' + b"1" * 10_000 + b"}", None),
        ("not an object", b"[]", None),
        ("empty", b"", None),
        ("no model", {"messages": [{"role": "user", "content": "x"}]}, "model"),
        ("no messages", {"model": "demo"}, "messages"),
        ("empty messages", {"model": "demo", "messages": []}, "messages"),
        ("message without role", {"model": "demo", "messages": [{"content": "x"}]}, "messages[0]"),
        (
            "content a number",
            {"model": "demo", "messages": [{"role": "user", "content": 1}]},
            "messages[0].content",
        ),
        ("two answers", asking("x", n=2), "n"),
        ("no tokens", asking("x", max_tokens=0), "max_tokens"),
        ("tokens true", asking("x", max_tokens=True), "max_tokens"),
        ("tokens a float", asking("x", max_completion_tokens=1.0), "max_completion_tokens"),
        ("stream a string", asking("x", stream="yes"), "stream"),
        ("stream_options alone", asking("x", stream_options={"include_usage": True}), "stream_options"),
        ("stream_options a list", asking("x", stream=True, stream_options=[]), "stream_options"),
        (
            "include_usage a number",
            asking("x", stream=True, stream_options={"include_usage": 1}),
            "stream_options.include_usage",
        ),
        ("stop a number", asking("x", stop=5), "stop"),
    ],
)
def test_malformed_requests(model: Running, label: str, body: object, param: str | None) -> None:
    """A request that cannot be understood is 400 in OpenAI's shape and names the field."""
    reply = model.post(content=body) if isinstance(body, bytes) else model.post(body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), label
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_beyond_the_bound(model: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body longer than MAX_BODY_BYTES is 413."""
    monkeypatch.setattr(demo, "MAX_BODY_BYTES", 1000)
    assert model.post(asking("x" * 1000)).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/chat/completions", 404),
        ("GET", "/models", 404),
        ("GET", "/v1/chat/completions", 405),
    ],
)
def test_other_routes(model: Running, method: str, path: str, status: int) -> None:
    """Only the two /v1 routes exist; everything else is refused in OpenAI's shape."""
    reply = httpx.request(method, f"http://127.0.0.1:{model.port}{path}", trust_env=False)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer \xe9",
    ],
    ids=["none", "empty", "no key", "another scheme", "no scheme", "a letter more", "a letter less", "not ASCII"],
)
def test_what_is_not_the_key(model: Running, header: str | None) -> None:
    """Only the whole key after `Bearer` opens the door; everything else is 401 without the key in it."""
    headers = {} if header is None else {b"authorization": header.encode("latin-1")}
    url = f"{model.base_url}/chat/completions"
    reply = httpx.post(url, json=asking("x"), headers=headers, trust_env=False)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert KEY not in reply.text


def test_no_key_configured() -> None:
    """With api_key None every client is accepted, with any key and with none."""
    with serving(api_key=None) as open_model:
        assert open_model.post(asking("hello"), key=None).status_code == 200
        assert open_model.post(asking("hello"), key="anything").status_code == 200


def test_an_empty_key_is_a_mistake() -> None:
    """build refuses an empty key, which would accept every client, and a negative delay."""
    with pytest.raises(ValueError, match="api_key"):
        demo.build(api_key=" ")
    with pytest.raises(ValueError, match="delay_seconds"):
        demo.build(api_key=None, delay_seconds=-1)


def test_a_lone_surrogate_comes_back_as_a_question_mark(model: Running) -> None:
    """JSON can name half a character; quoting it is no reason for a 500."""
    reply = model.post(content=b'{"model":"demo","messages":[{"role":"user","content":"hm \\ud800"}]}')
    assert reply.status_code == 200
    assert '"hm ?"' in reply.json()["choices"][0]["message"]["content"]


# Staged faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", ["/cut", "/cut write a long essay"])
def test_cut_breaks_the_connection(model: Running, message: str) -> None:
    """After `/cut` there is half an answer, no [DONE], and an end that HTTP itself calls incomplete."""
    url, headers = f"{model.base_url}/chat/completions", {"authorization": f"Bearer {KEY}"}
    parts: list[bytes] = []
    with (
        httpx.Client(trust_env=False, timeout=DEADLINE) as client,
        client.stream("POST", url, json=asking(message, stream=True), headers=headers) as reply,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        parts.extend(reply.iter_bytes())
    received = b"".join(parts)
    assert received.count(b'"content":') > 10
    assert b"[DONE]" not in received
    assert b'"finish_reason":"stop"' not in received
    assert not received.endswith(b"\n\n")


def test_cut_without_stream(model: Running) -> None:
    """A cut answer in one object is shorter than its Content-Length."""
    with pytest.raises(httpx.RemoteProtocolError):
        model.post(asking("/cut"))


def test_cut_through_the_sdk(model: Running) -> None:
    """The SDK raises in the middle of a cut stream; it does not take it for complete."""
    with model.openai() as client:
        stream = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "/cut"}], stream=True
        )
        pieces = (chunk.choices[0].delta.content for chunk in stream)
        assert len(list(itertools.islice(pieces, 10))) == 10
        with pytest.raises(openai.APIConnectionError):
            list(pieces)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 429, 500, 502, 503, 529])
def test_staged_statuses(model: Running, status: int) -> None:
    """`/error N` answers N in OpenAI's shape, with Retry-After where a client should come back soon."""
    reply = model.post(asking(f"/error {status}", stream=True))
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.headers.get("retry-after") == ("2" if status in (429, 503) else None)


def test_only_the_last_user_message_stages(model: Running) -> None:
    """A knob earlier in the conversation, or in the model's own words, does nothing."""
    messages = [
        {"role": "user", "content": "/error 500"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "try /error 500"},
    ]
    reply = model.post({"model": "demo", "messages": messages})
    assert reply.json()["choices"][0]["message"]["content"] == demo_answers.choose("hello")


def test_silence_in_the_middle(model: Running) -> None:
    """`/silent 1` sends half, nothing for a second, and then the rest and [DONE]."""
    url, headers = f"{model.base_url}/chat/completions", {"authorization": f"Bearer {KEY}"}
    with (
        httpx.Client(trust_env=False, timeout=DEADLINE) as client,
        client.stream("POST", url, json=asking("/silent 1", stream=True), headers=headers) as reply,
    ):
        arrivals = [(line, time.monotonic()) for line in reply.iter_lines()]
    assert "data: [DONE]" in [line for line, _ in arrivals]
    gaps = [after - before for (_, before), (_, after) in itertools.pairwise(arrivals)]
    assert max(gaps) > 0.8
    assert 10 < gaps.index(max(gaps)) < len(gaps) - 10


@pytest.mark.parametrize(
    ("message", "stream", "after"),
    [
        ("/slow hello", True, None),
        ("/silent 600", True, b'"content":"'),
        ("a long essay", True, b'"content":"'),
        ("a long essay", False, None),
    ],
)
def test_the_model_stops_when_the_client_leaves(
    message: str, stream: bool, after: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that leaves before the first token, in silence or in mid-stream ends the answer."""
    caplog.set_level(logging.INFO, "proxy.demo.model")
    body = json.dumps(asking(message, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with serving(api_key=None, delay_seconds=0.02) as paced:
        with socket.create_connection(("127.0.0.1", paced.port), timeout=DEADLINE) as client:
            client.sendall(head + body)
            received = b""
            while after is not None and received.count(after) < 5:
                received += client.recv(65536)
            if after is None:
                time.sleep(0.1)

        def said() -> list[str]:
            return [record.message for record in caplog.records if record.thread == paced.thread]

        eventually(lambda: "demo answer: the client left" in said())
    assert "demo answer: complete" not in said()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_leaves_while_it_asks(model: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Half a request and then a disconnect: no answer, no traceback, and the next request is served."""
    caplog.set_level(logging.INFO, "uvicorn")
    with socket.create_connection(("127.0.0.1", model.port), timeout=DEADLINE) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        client.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        time.sleep(0.1)
    time.sleep(0.1)
    assert model.post(asking("hello")).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_the_log_is_silent_about_words_and_keys(model: Running, caplog: pytest.LogCaptureFixture) -> None:
    """What the log says about a request is how it ended."""
    caplog.set_level(logging.DEBUG, "proxy.demo.model")
    model.post(asking("hello, my secret word is heliotrope"))
    eventually(lambda: "demo answer: complete" in caplog.messages)
    assert "heliotrope" not in caplog.text
    assert KEY not in caplog.text


def test_tokens_come_one_by_one() -> None:
    """With a delay the pieces arrive over time and not in one lump at the end."""
    with (
        serving(api_key=None, delay_seconds=0.01) as paced,
        httpx.Client(trust_env=False, timeout=DEADLINE, base_url=paced.base_url) as client,
        client.stream("POST", "/chat/completions", json=asking("hello", stream=True)) as reply,
    ):
        arrivals = [time.monotonic() for _ in reply.iter_bytes()]
    assert len(arrivals) > 10
    assert arrivals[-1] - arrivals[0] > 0.2


# The pure part --------------------------------------------------------------------------------------------


@given(st.text())
def test_pieces_lose_nothing(text: str) -> None:
    """The pieces of any text, joined, are that text, and none is empty."""
    cut = demo.pieces(text)
    assert "".join(cut) == text
    assert all(cut)


@pytest.mark.parametrize("route", demo_answers.ROUTES, ids=lambda route: route.asks.pattern[:20])
def test_pieces_are_as_small_as_words(route: demo_answers.Route) -> None:
    """No answer has a lump in it."""
    assert max(map(len, demo.pieces(route.text))) <= 12


@pytest.mark.parametrize("route", demo_answers.ROUTES, ids=lambda route: route.asks.pattern[:20])
def test_a_paragraph_is_one_line(route: demo_answers.Route) -> None:
    """No answer has accidental line breaks: a page shows them."""
    prose = re.sub(r"^ *```.*?^ *```", "", route.text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^[^\W\d].*\n[^\W\d].*$|^> \w.*\n> \w.*$", prose, flags=re.MULTILINE) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
OPTIONAL = ("max_tokens", "max_completion_tokens", "n", "stop", "stream", "stream_options")
requests = st.fixed_dictionaries(
    {
        "model": st.sampled_from(demo_request.MODELS) | json_values,
        "messages": json_values | st.just([{"role": "user"}]),
    },
    optional=dict.fromkeys(OPTIONAL, json_values),
)


@given(st.binary() | requests.map(demo_request.encode) | json_values.map(demo_request.encode))
def test_parse_never_fails_otherwise(body: bytes) -> None:
    """Whatever the body is, it is understood or it is refused with 400 or 404."""
    try:
        ask = demo_request.parse(body)
    except demo_request.Rejected as refusal:
        refused = refusal
    else:
        assert ask.model in demo_request.MODELS
        return
    assert refused.status in (400, 404)
    assert json.loads(refused.body)["error"]["message"]


@pytest.mark.parametrize(
    ("prompt", "faults", "rest"),
    [
        ("hello", demo_request.Staging(), "hello"),
        ("/cut", demo_request.Staging(cut=True), ""),
        ("/cut a story", demo_request.Staging(cut=True), "a story"),
        ("a story /cut", demo_request.Staging(cut=True), "a story"),
        ("/slow /silent 5 a\nstory", demo_request.Staging(slow=True, silent=5), "a\nstory"),
        ("/silent", demo_request.Staging(silent=30), ""),
        ("/silent 0", demo_request.Staging(), ""),
        ("/silent 999999", demo_request.Staging(silent=600), ""),
        ("/error 429", demo_request.Staging(error=429), ""),
        ("/error", demo_request.Staging(error=500), ""),
        ("/error 200", demo_request.Staging(error=500), ""),
        ("/error 600", demo_request.Staging(error=500), ""),
        ("cut/cut /cutting `/cut` /CUT", demo_request.Staging(), "cut/cut /cutting `/cut` /CUT"),
    ],
)
def test_knobs(prompt: str, faults: demo_request.Staging, rest: str) -> None:
    """A knob is a word of its own; what is left of the message chooses the answer."""
    assert demo_request.staging(prompt) == (faults, rest)


@given(st.text(alphabet="/cutsilenorw 0123456789\n", max_size=60))
def test_staging_takes_any_text(prompt: str) -> None:
    """No text makes the search for knobs fail, and no fault exceeds its bound."""
    faults, _ = demo_request.staging(prompt)
    assert faults.error is None or 400 <= faults.error <= 599
    assert 0 <= faults.silent <= demo_request.MAX_SILENT_SECONDS


@given(st.integers(0, 100_000), st.sampled_from([0.0, 0.001, 0.02, 1.0]), st.booleans(), st.integers(0, 600))
def test_the_timetable_does_not_drift(index: int, delay: float, slow: bool, silent: int) -> None:
    """Each piece is due after the one before it and within JITTER of its place, however late it is."""
    pace = demo.Pace(delay=delay, slow=slow, silent=silent, middle=50)
    assert pace.due(index + 1) >= pace.due(index)
    place = (demo.FIRST_TOKEN_PIECES * (demo.SLOW_FACTOR if slow else 1) + index) * delay
    assert pace.due(index) - place - (silent if index >= 50 else 0) == pytest.approx(0, abs=0.31 * delay)


def test_slow_takes_ten_times_as_long() -> None:
    """`/slow` multiplies the time to the first token by ten and leaves the rest as fast as it was."""
    usual = demo.Pace(delay=0.02, slow=False, silent=0, middle=0)
    slow = demo.Pace(delay=0.02, slow=True, silent=0, middle=0)
    assert slow.due(0) == pytest.approx(10 * usual.due(0))
    assert slow.due(100) - slow.due(0) == pytest.approx(usual.due(100) - usual.due(0))


# The answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("ሰላም", demo_answers.text("amharic")),
        ("Say something in Amharic", demo_answers.text("amharic")),
        ("አማርኛ", demo_answers.text("amharic")),
        ("مرحبا", demo_answers.text("arabic")),
        ("שלום", demo_answers.text("hebrew")),
        ("Hi there!", demo_answers.text("hello")),
        ("Write a LONG text", demo_answers.essay()),
        ("an essay, please", demo_answers.essay()),
        ("Explain machine learning in simple terms.", demo_answers.text("learning")),
        ("Write a short story.", demo_answers.text("story")),
        ("Tell me a joke", demo_answers.text("joke")),
        ("Show me some code", demo_answers.text("code")),
        ("compare three things", demo_answers.text("table")),
        ("a list of things to do", demo_answers.text("list")),
        ("markdown", demo_answers.text("markdown")),
        ("thanks a lot", demo_answers.text("thanks")),
        ("Where do I put my API key?", demo_answers.ABOUT),
        ("how long does it take to Mars", demo_answers.ABOUT),
        ("what is this?", demo_answers.ABOUT),
        ("", demo_answers.ABOUT),
    ],
)
def test_what_is_asked_chooses_the_answer(prompt: str, text: str) -> None:
    """Each prompt gets the answer meant for it, the same one every time."""
    assert demo_answers.choose(prompt) == text.replace("{quote}", demo_answers.quote(prompt)).rstrip("\n")
    assert demo_answers.choose(prompt) == demo_answers.choose(prompt)


@pytest.mark.parametrize("message", ["ሰላም", "Please answer in Amharic"])
def test_amharic_over_the_wire(model: Running, message: str) -> None:
    """An Amharic answer begins with ሰላም, is mostly Ethiopic, and arrives unharmed."""
    text = content(model.stream(message))
    assert text.startswith("ሰላም")
    assert len(re.findall("[\u1200-\u137f]", text)) > 300


def test_the_default_answer_shows_the_way_to_a_real_model() -> None:
    """It says what it is, shows the two settings, the key's variable and the knobs."""
    text = demo_answers.choose("What can you do for me?")
    for needed in (
        '"What can you do for me?"',
        "no real intelligence",
        'base_url = "https://api.selamgpt.com/v1"',
        "[policy]\nmodels = [",
        "CHAT_PROXY_UPSTREAM_API_KEY",
        "try /cut",
        "/silent 90",
        "/slow",
        "/error 429",
    ):
        assert needed in text


def test_the_long_answer_is_long(model: Running) -> None:
    """Several thousand words, all of its sections different, whole at the other end."""
    text = content(model.stream("a long essay"))
    assert text == demo_answers.choose("a long essay")
    assert len(text.split()) > 3000
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) > 0.9 * len(paragraphs)
    assert "{" not in text


def test_the_showcase_has_everything_a_page_must_render() -> None:
    """Headings, lists, a table, code, a link, emphasis, a quotation, emoji: all in one answer."""
    for sign in (
        "# ",
        "\n- ",
        "\n1. ",
        "|:---|",
        "```python",
        "](https://",
        "**",
        "*italics*",
        "`inline",
        "\n> ",
        "🍏",
    ):
        assert sign in demo_answers.text("markdown")


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ("two\n  words", '"two words"'),
        ("a `tick` and <b>", "`a 'tick' and <b>`"),
        ("x" * 61, '"' + "x" * 60 + '..."'),
        ("  ", '"..."'),
    ],
)
def test_quotes_cannot_break_the_markdown(prompt: str, quoted: str) -> None:
    """A quotation is short, on one line, and a code span if Markdown would act upon any of it."""
    assert demo_answers.quote(prompt) == quoted
