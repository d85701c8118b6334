"""Reads a request to the demo model, and the faults that its last message stages. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MODEL_PACE: Mapping[str, float] = {"demo": 1.0, "demo-fast": 0.25}
"""Each model's delay per token, as a multiple of the configured one."""

MODELS: tuple[str, ...] = tuple(MODEL_PACE)
"""The models it answers for; the first is the default."""

MAX_SILENT_SECONDS = 600
"""As long as any sensible total timeout; a forgotten connection ends by itself."""

DEFAULT_SILENT_SECONDS = 30
MAX_STAGE_PIECE = 80
"""`/cut` and `/silent` strike in the middle, but at most this far into a long answer."""

MAX_PROMPT_CHARS = 20_000
"""How far into the last user message keywords are looked for: a pasted book must not hold up the loop."""

IMAGE_TOKENS = 85
"""What a part that is not text adds to the estimate: OpenAI's price of a small image."""

MAX_ECHO_CHARS = 64
"""How much of an unknown model's name comes back in the error."""


# Errors, in OpenAI's shape --------------------------------------------------------------------------------


class Rejected(Exception):
    """A request that gets an error instead of an answer: its status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def encode(value: object) -> bytes:
    """Compact JSON. A lone surrogate (JSON can carry one, UTF-8 cannot) becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def staged_error(status: int) -> Rejected:
    """The error that `/error` asks for, with OpenAI's type and code for that status."""
    known = {
        400: ("invalid_request_error", "invalid_request"),
        401: ("invalid_request_error", "invalid_api_key"),
        403: ("invalid_request_error", "unsupported_country_region_territory"),
        404: ("invalid_request_error", "model_not_found"),
        429: ("requests", "rate_limit_exceeded"),
    }
    kind, code = known.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
    headers = {"retry-after": "2"} if status in (429, 503) else {}
    return Rejected(status, f"The message asked for /error {status}.", code=code, kind=kind, headers=headers)


# The request ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, understood: `prompt` is the last user message, `limit` the most tokens of the answer."""

    model: str
    prompt: str
    prompt_tokens: int
    stream: bool
    include_usage: bool
    limit: int | None
    stops: tuple[str, ...]


def parse(body: bytes) -> Ask:
    """Reads a chat-completions body. Raises `Rejected` with 400 or 404, whatever the bytes are."""
    fields = _object(body)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise Rejected(400, "You must provide a model.", param="model")
    messages = _messages(fields.get("messages"))
    if _count(fields, "n") not in (None, 1):
        raise Rejected(400, "This server gives one answer: n must be 1.", param="n", code="unsupported_value")
    limits = [_count(fields, name) for name in ("max_tokens", "max_completion_tokens")]
    stream = _flag(fields, "stream", "stream")
    ask = Ask(
        model=model,
        prompt=next((text for role, text, _ in reversed(messages) if role == "user"), "")[:MAX_PROMPT_CHARS],
        prompt_tokens=prompt_tokens(messages),
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options"), stream),
        limit=min((limit for limit in limits if limit is not None), default=None),
        stops=_stops(fields.get("stop")),
    )
    if model not in MODELS:
        message = f"The model `{model[:MAX_ECHO_CHARS]}` does not exist; this server has {', '.join(MODELS)}."
        raise Rejected(404, message, param="model", code="model_not_found")
    return ask


Message = tuple[str, str, int]
"""Role, text, and the number of parts that are not text."""


def prompt_tokens(messages: Iterable[Message]) -> int:
    """An estimate: 3, and for each message 4 plus a quarter of its UTF-8 bytes, plus 85 for each image.

    A quarter of the bytes is close for English and dearer for other scripts, as it is with real tokenizers.
    """
    total = 3
    for _, text, images in messages:
        total += 4 + math.ceil(len(text.encode("utf-8", "replace")) / 4) + IMAGE_TOKENS * images
    return total


def _object(body: bytes) -> dict[str, object]:
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as fault:
        raise Rejected(400, "We could not parse the JSON body of your request.") from fault
    if not isinstance(fields, dict):
        raise Rejected(400, "The body must be a JSON object.")
    return fields


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Rejected(400, "messages must be a list with at least one message.", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise Rejected(400, f"{where} must be an object with a role.", param=where)
    content = value.get("content")
    if content is None:  # an assistant's message with tool calls has none
        return value["role"], "", 0
    if isinstance(content, str):
        return value["role"], content, 0
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Rejected(400, f"{where}.content must be text or a list of parts.", param=f"{where}.content")
    found = [part.get("text") for part in content if part.get("type") == "text"]
    texts = [text for text in found if isinstance(text, str)]
    return value["role"], "\n".join(texts), len(content) - len(texts)


def _count(fields: Mapping[str, object], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Rejected(400, f"{name} must be an integer of at least 1.", param=name)
    return value


def _flag(fields: Mapping[str, object], name: str, param: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise Rejected(400, f"{param} must be true or false.", param=param)
    return value is True


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise Rejected(400, "stream_options must be an object.", param="stream_options")
    if not stream:
        raise Rejected(400, "stream_options is only allowed with stream.", param="stream_options")
    return _flag(options, "include_usage", "stream_options.include_usage")


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Rejected(400, "stop must be a string or a list of strings.", param="stop")
    return tuple(stop for stop in stops if stop)


# The knobs ------------------------------------------------------------------------------------------------

_KNOB = re.compile(r"(?<!\S)/(?:(error|silent)(?:[ \t]+([0-9]{1,6}))?|(cut|slow))(?!\S)")


@dataclass(frozen=True, slots=True)
class Staging:
    """The faults that a message asks for."""

    error: int | None = None
    cut: bool = False
    silent: int = 0
    slow: bool = False


def staging(prompt: str) -> tuple[Staging, str]:
    """The faults staged in `prompt`, and what is left of it."""
    found = {match[1] or match[3]: match[2] for match in _KNOB.finditer(prompt)}
    if not found:
        return Staging(), prompt
    faults = Staging(
        error=_error_status(found["error"]) if "error" in found else None,
        cut="cut" in found,
        silent=_silent_seconds(found["silent"]) if "silent" in found else 0,
        slow="slow" in found,
    )
    return faults, _KNOB.sub("", prompt).strip()


def _error_status(number: str | None) -> int:
    wanted = int(number or 500)
    return wanted if 400 <= wanted <= 599 else 500


def _silent_seconds(number: str | None) -> int:
    return min(int(number or DEFAULT_SILENT_SECONDS), MAX_SILENT_SECONDS)
