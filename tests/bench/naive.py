"""The proxy that one writes in an afternoon, for comparison: starlette's StreamingResponse over httpx's stream.

No sessions, no limits, no policy, no endings: it adds the key and passes the bytes on.

    NAIVE_UPSTREAM=http://127.0.0.1:9000/v1 python naive.py PORT
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

URL = os.environ.get("NAIVE_UPSTREAM", "") + "/chat/completions"
HEADERS = {"authorization": "Bearer sk-bench", "content-type": "application/json"}
client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))  # it must not queue


async def chat(request: Request) -> StreamingResponse:
    body = await request.body()

    async def passed_on() -> AsyncIterator[bytes]:
        async with client.stream("POST", URL, content=body, headers=HEADERS) as response:
            async for part in response.aiter_raw():
                yield part

    return StreamingResponse(passed_on(), media_type="text/event-stream")


app = Starlette(routes=[Route("/api/chat", chat, methods=["POST"])])

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=False, log_level="error")
