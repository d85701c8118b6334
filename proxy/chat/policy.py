"""What a page may ask of the model: body bytes in, upstream bytes and facts out.

Rules:
1. Pure: no await, no clock, no network; nothing is kept but the rules in ready-made form.
2. We judge what the upstream will read. So what two JSON readers may understand differently is refused, never
   repaired: bytes that are not UTF-8, a BOM, NaN, lone surrogates, deep nesting, a name twice in an object we
   read, a name that differs from one we read only in case (Go's encoding/json takes `Role` for `role`).
3. What we do not touch goes on byte for byte, in its order. With nothing to change, that is the whole body.
4. Optional fields pass by name (`allow`); content parts and image URLs with the fields we know, no others.
   A message's other fields (name, tool_calls, tool_call_id, ...) pass unread, whatever its role.
5. null in an optional field counts as absent. It is passed on, except in `model` and the output limits.
6. Of a client's text only names that match SAFE_NAME come back in an answer (rule 1 of `errors`).

JSON that cannot be trusted to mean one thing is `invalid_json`; JSON that asks for the wrong thing is not.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache

import msgspec
from msgspec import Raw

from proxy import errors, settings
from proxy.chat.json_fields import (
    MESSAGES,
    OBJECT,
    OBJECTS,
    STRING,
    TOO_DEEP,
    Members,
    Message,
    absent,
    boolean,
    check_depth,
    check_known,
    check_lookalikes,
    decode,
    integer,
    named,
    parse,
    path_to,
    wrong,
)

MAX_PARTS = 4096  # of content in all messages, 3 us each; the body's limit alone would let 40,000 through
MAX_CHOICES = 128  # OpenAI's own bound for `n`; each choice may cost a whole output limit
BYTES_PER_TOKEN = 3  # of the prompt as JSON: English has about 4, code and Chinese 3; rather too dear
IMAGE_TOKENS = 1600  # for one image: about the most that large models count (GPT-4o 1445, Claude 1600)
RULES_KEPT = 8  # a process has one set of rules, and one more after each reload

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
OPERATOR_ROLES = ("system", "developer")
ALWAYS_ALLOWED = frozenset({"model", "messages", "stream"})
OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens")
NOT_PROMPT = frozenset({"model", "messages", "stream", "n", "stream_options", *OUTPUT_LIMITS})
MESSAGE_FIELDS = frozenset({"role", "content"})
USUAL_MESSAGES = (["role", "content"], ["content", "role"])  # nothing to check in their names
PART_FIELDS = {kind: frozenset({"type", kind}) for kind in ("text", "image_url", "refusal")}
IMAGE_FIELDS = frozenset({"url", "detail"})
STREAM_FIELDS = frozenset({"include_usage"})

DATA_URL = r"data:image/[A-Za-z0-9.+-]{1,64};base64,"
IMAGE_URLS = {  # by allow_image_urls: what a URL must match, and its description
    "none": (re.compile(r"(?!)"), "cannot be used: images are not accepted here"),
    "data": (re.compile(DATA_URL), "must be an inline image: data:image/...;base64,..."),
    "https": (
        re.compile(DATA_URL + r"|https://[^\x00-\x20\x7f\\]+\Z"),
        "must be data:image/...;base64,... or an https:// URL",
    ),
}


@dataclass(slots=True)
class ChatRequest:
    """A validated request for the upstream, and what it may cost. `body` is emptied once it has been sent.

    `output_tokens` is the limit of one choice. `prompt_tokens` estimates the messages as they go upstream and
    the optional values beside them (tools, ...): their JSON bytes / BYTES_PER_TOKEN, without the image URLs,
    + IMAGE_TOKENS for each image. `include_usage`: the page asked for it in stream_options; `usage_for_us`: we did,
    and the page must not see the answer.
    """

    body: bytes
    model: str
    stream: bool
    choices: int
    output_tokens: int
    prompt_tokens: int
    include_usage: bool
    usage_for_us: bool


def apply(body: bytes, rules: settings.Policy, *, exact_usage: bool = False) -> ChatRequest:
    """The order that `body` places under `rules`; with `exact_usage` the upstream is asked what a stream has cost.

    Raises InvalidJson, InvalidRequest, ModelNotAllowed, FieldNotAllowed, TooManyMessages, InputTooLong; their
    `param` is the field's path, like messages[3].content.
    """
    try:
        return chat_request(body, rules, exact_usage)
    except RecursionError:
        raise errors.InvalidJson(f"The request {TOO_DEEP}.") from None


def chat_request(body: bytes, rules: settings.Policy, exact_usage: bool) -> ChatRequest:
    fields = parse(body)
    check_names(fields, allowed_names(rules))
    model, edits = choose_model(fields, rules)
    stream = boolean(fields.get("stream"), "stream")
    include_usage = usage_wanted(fields, stream)
    usage_for_us = exact_usage and stream and not include_usage
    output_tokens, limits = limit_output(fields, rules)
    reader = MessagesReader(rules)
    reader.read(fields.get("messages"))
    messages = opening(rules) + bytes(fields["messages"])[1:]
    if rules.system_prompt:
        edits["messages"] = Raw(messages)
    edits |= limits
    if usage_for_us:
        edits["stream_options"] = with_usage(fields)
    return ChatRequest(
        body=rewritten(fields, edits) if edits else body,
        model=model,
        stream=stream,
        choices=1 if absent(fields, "n") else integer(fields["n"], "n", MAX_CHOICES),
        output_tokens=output_tokens,
        prompt_tokens=reader.tokens(len(messages) + unread_bytes(fields)),
        include_usage=include_usage,
        usage_for_us=usage_for_us,
    )


@lru_cache(RULES_KEPT)
def allowed_names(rules: settings.Policy) -> frozenset[str]:
    return ALWAYS_ALLOWED.union(rules.allow)


@lru_cache(RULES_KEPT)
def opening(rules: settings.Policy) -> bytes:
    """The bytes that replace the first bracket of `messages`: it, and the operator's message."""
    message = msgspec.json.encode({"role": "system", "content": rules.system_prompt})
    return b"[" + message + b"," if rules.system_prompt else b"["


def check_message_fields(fields: dict[str, Raw], path: str) -> None:
    check_lookalikes(fields, MESSAGE_FIELDS, path)
    for name in fields.keys() - MESSAGE_FIELDS:
        check_depth(fields[name], path_to(path, name))


# ---- the top level ---------------------------------------------------------------------------------------

Edits = dict[str, Raw | None]  # what takes a field's place; None: nothing does


def check_names(fields: dict[str, Raw], allowed: Set[str]) -> None:
    for name, raw in fields.items():
        if name not in allowed:
            param = path_to("", name)
            message = f"{param or 'A field of the request'} is not allowed here; leave it out."
            raise errors.FieldNotAllowed(message, param=param)
        if name != "messages":
            check_depth(raw, name)


def choose_model(fields: dict[str, Raw], rules: settings.Policy) -> tuple[str, Edits]:
    asked = None if absent(fields, "model") else decode(STRING, fields["model"], "model")
    chosen = rules.models[0] if asked is None or rules.force_model else asked
    if chosen not in rules.models:
        raise errors.ModelNotAllowed(param="model")
    return chosen, {} if chosen == asked else {"model": Raw(msgspec.json.encode(chosen))}


def usage_wanted(fields: dict[str, Raw], stream: bool) -> bool:
    if absent(fields, "stream_options"):
        return False
    if not stream:
        wrong("stream_options", "goes with stream: true only")
    options = named(decode(OBJECT, fields["stream_options"], "stream_options"), "stream_options")
    check_lookalikes(options, STREAM_FIELDS, "stream_options")
    return boolean(options.get("include_usage"), "stream_options.include_usage")


def with_usage(fields: dict[str, Raw]) -> Raw:
    options = {} if absent(fields, "stream_options") else named(OBJECT.decode(fields["stream_options"]), "")
    return Raw(msgspec.json.encode({**options, "include_usage": True}))


def limit_output(fields: dict[str, Raw], rules: settings.Policy) -> tuple[int, Edits]:
    """The most that one choice may have, and the edits that see to that. Of two limits upstreams read one or the other,
    so what counts is the larger."""
    highest = rules.max_output_tokens
    limit = Raw(b"%d" % highest)
    given = {name: integer(fields[name], name) for name in OUTPUT_LIMITS if not absent(fields, name)}
    edits: Edits = {name: None for name in OUTPUT_LIMITS if name in fields and name not in given}
    edits |= {name: limit for name, value in given.items() if value > highest}
    if not given:
        edits[rules.output_limit_field] = limit
    return min(highest, max(given.values(), default=highest)), edits


def rewritten(fields: dict[str, Raw], edits: Edits) -> bytes:
    return msgspec.json.encode({name: raw for name, raw in (fields | edits).items() if raw is not None})


def unread_bytes(fields: dict[str, Raw]) -> int:
    return sum(len(bytes(raw)) for name, raw in fields.items() if name not in NOT_PROMPT)


# ---- messages --------------------------------------------------------------------------------------------


class MessagesReader:
    """Reads a page's messages once, and counts what limits and estimates need."""

    __slots__ = ("chars", "image_bytes", "images", "parts", "rules")

    def __init__(self, rules: settings.Policy) -> None:
        self.rules = rules
        self.chars = self.parts = self.images = self.image_bytes = 0

    def tokens(self, prompt_bytes: int) -> int:
        return -(-(prompt_bytes - self.image_bytes) // BYTES_PER_TOKEN) + self.images * IMAGE_TOKENS

    def read(self, raw: Raw | None) -> None:
        written = decode(OBJECTS, raw, "messages")
        if not written:
            wrong("messages", "must have at least one message")
        if len(written) > (most := self.rules.max_messages):
            message = f"messages may have {most} entries here; leave the oldest out."
            raise errors.TooManyMessages(message, param="messages")
        for index, message in enumerate(decode(MESSAGES, raw, "messages")):
            self.message(written[index], message, f"messages[{index}]")
        if self.chars > (most := self.rules.max_input_chars):
            message = f"messages may have {most} characters of text here; leave the oldest out."
            raise errors.InputTooLong(message, param="messages")

    def message(self, members: Members, message: Message, path: str) -> None:
        if [key.name for key in members] not in USUAL_MESSAGES:
            check_message_fields(named(members, path), path)
        if message.role not in ROLES:
            wrong(f"{path}.role", f"must be one of {', '.join(ROLES)}")
        if self.rules.lock_system and message.role in OPERATOR_ROLES:
            wrong(f"{path}.role", f"must not be {message.role}: the operator sets the instructions here")
        self.content(message, path)

    def content(self, message: Message, path: str) -> None:
        content = message.content
        if isinstance(content, str):
            self.chars += len(content)
        elif content:
            for index, members in enumerate(content):
                self.part(members, message.role, f"{path}.content[{index}]")
        elif content is not None or message.role != "assistant":
            wrong(f"{path}.content", "must be a string or a list of at least one part")

    def part(self, members: Members, role: str, path: str) -> None:
        self.parts += 1
        if self.parts > MAX_PARTS:
            wrong("messages", f"may have {MAX_PARTS} content parts in all")
        fields = named(members, path)
        kind = decode(STRING, fields.get("type"), f"{path}.type")
        if kind not in PART_FIELDS or (kind == "refusal" and role != "assistant"):
            wrong(f"{path}.type", "must be text or image_url; in an assistant's message also refusal")
        check_known(fields, PART_FIELDS[kind], path)
        if kind == "image_url":
            self.image(fields.get(kind), f"{path}.image_url")
        else:
            self.chars += len(decode(STRING, fields.get(kind), f"{path}.{kind}"))

    def image(self, raw: Raw | None, path: str) -> None:
        fields = named(decode(OBJECT, raw, path), path)
        check_known(fields, IMAGE_FIELDS, path)
        url = decode(STRING, fields.get("url"), f"{path}.url")
        pattern, right = IMAGE_URLS[self.rules.allow_image_urls]
        if not pattern.match(url):
            wrong(f"{path}.url", right)
        if not absent(fields, "detail"):
            decode(STRING, fields["detail"], f"{path}.detail")
        self.images += 1
        self.image_bytes += len(url)
