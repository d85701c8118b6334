"""The main path: a request through the whole house and back."""

from __future__ import annotations

import asyncio
import json

from support.harness import (
    DONE,
    GOOD,
    Peer,
    ScriptedUpstream,
    chat,
    delta,
    eventually,
    finish,
    running,
    send,
    streaming,
)


def test_stream_passes_unchanged() -> None:
    """What the upstream streamed is what the client gets, with our headers and none of the upstream's."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url) as proxy:
        reply = chat(proxy)
        assert (reply.status, reply.body) == (200, b"".join(GOOD))
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["cache-control"] == "no-store, no-transform"
        assert reply.headers["x-accel-buffering"] == "no"
        assert reply.headers["content-security-policy"] == "default-src 'none'"
        line = proxy.line()
        assert (line["ending"], line["status"], line["code"]) == ("complete", 200, None)


def test_upstream_request_is_built_from_nothing() -> None:
    """The upstream sees our key and the request, and nothing else of the visitor."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url) as proxy:
        chat(
            proxy,
            headers={
                "Cookie": "theme=dark",
                "Authorization": "Bearer made-up",
                "X-Custom": "1",
                "Accept-Encoding": "gzip",
            },
        )
        seen = upstream.seen[0]
        assert seen.headers["authorization"] == f"Bearer {proxy.key}"
        assert seen.headers["accept-encoding"] == "identity"
        assert seen.headers["user-agent"].startswith("chat-proxy/")
        assert set(seen.headers) == {
            *("host", "authorization", "accept", "accept-encoding", "user-agent", "x-request-id"),
            *("content-type", "content-length"),
        }
        assert seen.json == {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "model": "m",
            "max_tokens": 4096,
        }


def test_whole_answer() -> None:
    """A request that does not stream gets the upstream's JSON as it was, with a length."""
    answer = json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}).encode()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.whole(answer)

    with ScriptedUpstream(script) as upstream, running(upstream.base_url) as proxy:
        reply = chat(proxy, stream=False)
        assert (reply.status, reply.body) == (200, answer)
        assert reply.headers["content-type"] == "application/json"
        assert (proxy.line()["tokens"], proxy.line()["bytes"]) == (7, len(answer))
        assert proxy.tokens_used()["tokens_per_session"] == 7


def test_truncated_stream_ends_with_an_event() -> None:
    """An answer that breaks off gets one error event and no [DONE]; its unfinished tail is dropped."""
    with ScriptedUpstream(streaming(delta("half"), b'data: {"cho')) as upstream, running(upstream.base_url) as proxy:
        reply = chat(proxy)
        assert reply.body.startswith(delta("half") + b'data: {"error":{')
        assert json.loads(reply.last_event.removeprefix(b"data: "))["error"]["code"] == "stream_interrupted"
        assert DONE not in reply.body
        assert not reply.cut
        assert proxy.line()["ending"] == "truncated"


def test_finish_reason_without_done_is_an_end() -> None:
    """finish_reason without [DONE] is a clean end: nothing is added."""
    with ScriptedUpstream(streaming(delta("all"), finish())) as upstream, running(upstream.base_url) as proxy:
        assert chat(proxy).body == delta("all") + finish()


def test_models_and_probes() -> None:
    """The allow-list in OpenAI's shape; probes answer anyone; the rest is 404 in the error shape."""
    with ScriptedUpstream(streaming()) as upstream, running(upstream.base_url) as proxy:
        models = send(proxy, "GET", "/api/v1/models")
        assert [entry["id"] for entry in models.json["data"]] == ["m", "other"]
        assert models.headers["set-cookie"] is None
        for probe in ("/healthz", "/readyz"):
            assert send(proxy, "GET", probe, headers={"Host": "10.0.0.1"}).status == 200
        assert send(proxy, "GET", "/api/nothing").error["code"] == "not_found"
        assert send(proxy, "GET", "/nothing").error["code"] == "not_found"
        assert send(proxy, "PUT", "/api/chat").error["code"] == "method_not_allowed"


def test_comments_in_silence() -> None:
    """With comment_seconds, silence is filled with comments, between whole events only; without, nothing is added."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.head()
        await peer.chunk(delta("one") + delta("two")[:20])
        await asyncio.sleep(0.5)
        await peer.chunk(delta("two")[20:] + finish() + DONE)
        await peer.end()

    whole = delta("one") + delta("two") + finish() + DONE
    with ScriptedUpstream(script) as upstream, running(upstream.base_url, SERVER_COMMENT_SECONDS="0.1") as proxy:
        body = chat(proxy).body
        assert body.startswith(delta("one") + b": keep-alive\n\n")
        assert body.replace(b": keep-alive\n\n", b"") == whole
    with ScriptedUpstream(script) as upstream, running(upstream.base_url) as proxy:
        assert chat(proxy).body == whole


def test_each_line_has_the_same_fields() -> None:
    """Every line of the log has all fields: those that a request did not fill are null or 0."""
    names = "request_id session address route model status code ending ttft_ms duration_ms events tokens bytes reason"
    fields = names.split()
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url) as proxy:
        chat(proxy)
        send(proxy, "GET", "/api/session")
        send(proxy, "GET", "/api/nothing")
        send(proxy, "GET", "/api/session", headers={"x-long": "x" * 100_000})  # refused before it is a request
        lines = eventually(lambda: found if len(found := proxy.lines()) == 4 else [])
    assert [line["status"] for line in lines] == [200, 200, 404, 431]
    assert [list(line)[3 : 3 + len(fields)] for line in lines] == [fields] * 4
    for count in ("events", "tokens", "bytes"):
        assert [line[count] > 0 for line in lines] == [True, False, False, False]
    assert [line["model"] for line in lines] == ["m", None, None, None]
