"""The probes of a load balancer or an orchestrator: alive, and ready for requests."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from proxy.errors import HeaderList, MethodNotAllowed
from proxy.web.headers import API_HEADERS, bare_refusal

PROBED = ("GET", "HEAD")


class Probe:
    """`/healthz` or `/readyz`: 200 or 503, to every client, under every host name, without a log line."""

    def __init__(self, is_well: Callable[[], bool], base_headers: HeaderList) -> None:
        self.is_well = is_well
        self.headers: HeaderList = [(b"content-type", b"application/json"), *base_headers, *API_HEADERS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in PROBED:
            await bare_refusal(send, MethodNotAllowed(headers=[(b"allow", ", ".join(PROBED).encode())]))
            return
        status, body = (200, b'{"status":"ok"}') if self.is_well() else (503, b'{"status":"draining"}')
        headers = [*self.headers, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send(
            {"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b"", "more_body": False}
        )
