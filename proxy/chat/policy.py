"""The rules for a page's request to the model: body bytes in, a validated ChatRequest out.

Rules:
1. Pure: no await, no clock, no network. Only forms of the rules that are made once are cached.
2. The policy checks what the upstream will read. JSON that two parsers may read differently is refused, never
   repaired: bytes that are not UTF-8, a BOM, NaN, lone surrogates, deep nesting, a repeated name in an object that
   is read, a name that differs from such a field's only in case (Go's encoding/json takes `Role` for `role`).
3. Unchanged fields pass byte for byte, in their order. If nothing changes, the whole body does.
4. Optional fields pass by name (`allow`); content parts and image URLs pass with the listed fields only.
   A message's other fields (name, tool_calls, tool_call_id, ...) pass unread, whatever its role.
5. null in an optional field counts as absent. It is passed on, except in `model` and the output limits.
6. An error message quotes from a client's text only names that match SAFE_NAME (rule 1 of `errors`).

Ambiguous or malformed JSON is `invalid_json`; well-formed JSON that breaks a rule has another code.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

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
    fields_by_name,
    integer,
    parse,
    path_to,
    refuse,
)

MAX_PARTS = 4096  # content parts in all messages, 3 us each; the body's limit alone would allow 40,000
MAX_CHOICES = 128  # OpenAI's own bound for `n`; each choice may cost a whole output limit
BYTES_PER_TOKEN = 3  # of the prompt as JSON: English has about 4, code and Chinese 3; rather an overestimate
IMAGE_TOKENS = 1600  # per image: about the maximum of large models (GPT-4o 1445, Claude 1600)
RULES_KEPT = 8  # cached sets of rules: a process has one, and a new one after each reload

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
OPERATOR_ROLES = ("system", "developer")
ALWAYS_ALLOWED = frozenset({"model", "messages", "stream"})
OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens")
NOT_PROMPT = frozenset({"model", "messages", "stream", "n", "stream_options", *OUTPUT_LIMITS})
MESSAGE_FIELDS = frozenset({"role", "content"})
USUAL_MESSAGES = (["role", "content"], ["content", "role"])  # their names need no check
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
    + IMAGE_TOKENS for each image. `include_usage`: the page requested the usage in stream_options. `usage_for_us`:
    the proxy requested it, so the chunk with the usage must not reach the page.
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
    """The request for the upstream that `body` makes under `rules`; with `exact_usage` it requests a stream's usage.

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
    include_usage = requests_usage(fields, stream)
    usage_for_us = exact_usage and stream and not include_usage
    output_tokens, limits = limit_output(fields, rules)
    reader = MessagesReader(rules)
    reader.read(fields.get("messages"))
    messages = messages_prefix(rules) + bytes(fields["messages"])[1:]
    if rules.system_prompt:
        edits["messages"] = Raw(messages)
    edits |= limits
    if usage_for_us:
        edits["stream_options"] = with_usage(fields)
    return ChatRequest(
        body=rewrite(fields, edits) if edits else body,
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
def messages_prefix(rules: settings.Policy) -> bytes:
    """The bytes that replace the first bracket of `messages`: the bracket and the operator's message."""
    message = msgspec.json.encode({"role": "system", "content": rules.system_prompt})
    return b"[" + message + b"," if rules.system_prompt else b"["


def check_message_fields(fields: dict[str, Raw], path: str) -> None:
    check_lookalikes(fields, MESSAGE_FIELDS, path)
    for name in fields.keys() - MESSAGE_FIELDS:
        check_depth(fields[name], path_to(path, name))


# ---- the top level ---------------------------------------------------------------------------------------

Edits = dict[str, Raw | None]  # new values by field; None removes the field


def check_names(fields: dict[str, Raw], allowed: Set[str]) -> None:
    for name, raw in fields.items():
        if name not in allowed:
            param = path_to("", name)
            message = f"{param or 'A field of the request'} is not allowed here; leave it out."
            raise errors.FieldNotAllowed(message, param=param)
        if name != "messages":
            check_depth(raw, name)


def choose_model(fields: dict[str, Raw], rules: settings.Policy) -> tuple[str, Edits]:
    requested = None if absent(fields, "model") else decode(STRING, fields["model"], "model")
    chosen = rules.models[0] if requested is None or rules.force_model else requested
    if chosen not in rules.models:
        raise errors.ModelNotAllowed(param="model")
    return chosen, {} if chosen == requested else {"model": Raw(msgspec.json.encode(chosen))}


def requests_usage(fields: dict[str, Raw], stream: bool) -> bool:
    if absent(fields, "stream_options"):
        return False
    if not stream:
        refuse("stream_options", "goes with stream: true only")
    options = fields_by_name(decode(OBJECT, fields["stream_options"], "stream_options"), "stream_options")
    check_lookalikes(options, STREAM_FIELDS, "stream_options")
    return boolean(options.get("include_usage"), "stream_options.include_usage")


def with_usage(fields: dict[str, Raw]) -> Raw:
    options = {} if absent(fields, "stream_options") else fields_by_name(OBJECT.decode(fields["stream_options"]), "")
    return Raw(msgspec.json.encode({**options, "include_usage": True}))


def limit_output(fields: dict[str, Raw], rules: settings.Policy) -> tuple[int, Edits]:
    """The highest number of output tokens of one choice, and the edits that enforce it.

    If the body has both limits, the larger one counts: upstreams differ in which one they read.
    """
    highest = rules.max_output_tokens
    limit = Raw(b"%d" % highest)
    requested = {name: integer(fields[name], name) for name in OUTPUT_LIMITS if not absent(fields, name)}
    edits: Edits = {name: None for name in OUTPUT_LIMITS if name in fields and name not in requested}
    edits |= {name: limit for name, value in requested.items() if value > highest}
    if not requested:
        edits[rules.output_limit_field] = limit
    return min(highest, max(requested.values(), default=highest)), edits


def rewrite(fields: dict[str, Raw], edits: Edits) -> bytes:
    return msgspec.json.encode({name: raw for name, raw in (fields | edits).items() if raw is not None})


def unread_bytes(fields: dict[str, Raw]) -> int:
    return sum(len(bytes(raw)) for name, raw in fields.items() if name not in NOT_PROMPT)


# ---- messages --------------------------------------------------------------------------------------------


def usual_text(members: Members) -> str | None:
    """The text of a part that is written as {"type": "text", "text": "..."}: thousands would take the general way too
    long. None for any other part."""
    if len(members) != 2:
        return None
    (first, kind), (second, text) = members.items()
    if first.name != "type" or second.name != "text" or bytes(kind) != b'"text"' or not bytes(text).startswith(b'"'):
        return None
    return cast(str, STRING.decode(text))


class MessagesReader:
    """Reads a page's messages once, and counts characters, parts and images for the limits and the estimate."""

    __slots__ = ("chars", "image_bytes", "images", "parts", "rules")

    def __init__(self, rules: settings.Policy) -> None:
        self.rules = rules
        self.chars = self.parts = self.images = self.image_bytes = 0

    def tokens(self, prompt_bytes: int) -> int:
        return -(-(prompt_bytes - self.image_bytes) // BYTES_PER_TOKEN) + self.images * IMAGE_TOKENS

    def read(self, raw: Raw | None) -> None:
        members = decode(OBJECTS, raw, "messages")
        if not members:
            refuse("messages", "must have at least one message")
        if len(members) > (most := self.rules.max_messages):
            message = f"messages may have {most} entries here; leave the oldest out."
            raise errors.TooManyMessages(message, param="messages")
        for index, message in enumerate(decode(MESSAGES, raw, "messages")):
            self.read_message(members[index], message, f"messages[{index}]")
        if self.chars > (most := self.rules.max_input_chars):
            message = f"messages may have {most} characters of text here; leave the oldest out."
            raise errors.InputTooLong(message, param="messages")

    def read_message(self, members: Members, message: Message, path: str) -> None:
        if [key.name for key in members] not in USUAL_MESSAGES:
            check_message_fields(fields_by_name(members, path), path)
        if message.role not in ROLES:
            refuse(f"{path}.role", f"must be one of {', '.join(ROLES)}")
        if self.rules.lock_system and message.role in OPERATOR_ROLES:
            refuse(f"{path}.role", f"must not be {message.role}: the operator sets the instructions here")
        self.read_content(message, path)

    def read_content(self, message: Message, path: str) -> None:
        content = message.content
        if isinstance(content, str):
            self.chars += len(content)
        elif content:
            self.parts += len(content)
            if self.parts > MAX_PARTS:
                refuse("messages", f"may have {MAX_PARTS} content parts in all")
            for index, members in enumerate(content):
                if (text := usual_text(members)) is not None:
                    self.chars += len(text)
                else:
                    self.read_part(members, message.role, f"{path}.content[{index}]")
        elif content is not None or message.role != "assistant":
            refuse(f"{path}.content", "must be a string or a list of at least one part")

    def read_part(self, members: Members, role: str, path: str) -> None:
        fields = fields_by_name(members, path)
        kind = decode(STRING, fields.get("type"), f"{path}.type")
        if kind not in PART_FIELDS or (kind == "refusal" and role != "assistant"):
            refuse(f"{path}.type", "must be text or image_url; in an assistant's message also refusal")
        check_known(fields, PART_FIELDS[kind], path)
        if kind == "image_url":
            self.read_image(fields.get(kind), f"{path}.image_url")
        else:
            self.chars += len(decode(STRING, fields.get(kind), f"{path}.{kind}"))

    def read_image(self, raw: Raw | None, path: str) -> None:
        fields = fields_by_name(decode(OBJECT, raw, path), path)
        check_known(fields, IMAGE_FIELDS, path)
        url = decode(STRING, fields.get("url"), f"{path}.url")
        pattern, rule = IMAGE_URLS[self.rules.allow_image_urls]
        if not pattern.match(url):
            refuse(f"{path}.url", rule)
        if not absent(fields, "detail"):
            decode(STRING, fields["detail"], f"{path}.detail")
        self.images += 1
        self.image_bytes += len(url)
