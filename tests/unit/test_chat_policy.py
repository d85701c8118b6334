"""The policy: what it refuses and in which words, and that it touches nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as tuned
from hypothesis import strategies as st
from support.harness import FULL

from proxy import errors
from proxy.chat import json_fields, policy
from proxy.settings import Policy

EXAMPLES = 2000 if FULL else 30
MUTANTS = 500 if FULL else 30  # of one body in one example
SLOWEST = 2.0  # seconds for the dearest megabyte: ten times what it takes

RULES = Policy(models=("small", "large"))
PNG = "data:image/png;base64,iVBORw0KGgo="
HELLO = [{"role": "user", "content": "hello"}]
HEAD = b'{"messages":[{"role":"user","content":"hello"}]'  # a good body but for its last bracket

tuning = tuned(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def rules(**changes: Any) -> Policy:
    return dataclasses.replace(RULES, **changes)


def with_fields(*names: str, **changes: Any) -> Policy:
    return rules(allow=(*RULES.allow, *names), **changes)


def body(messages: object = HELLO, **fields: object) -> bytes:
    return json.dumps({"messages": messages, **fields}, ensure_ascii=False).encode()


def upstream(order: policy.ChatRequest) -> Any:
    return json.loads(order.body)


def answer(sent: bytes, rules: Policy) -> policy.ChatRequest | errors.Refusal:
    """What comes of it; a refusal has status 400 and makes a body."""
    try:
        return policy.apply(sent, rules)
    except errors.Refusal as refused:
        found = refused
    assert found.status == 400
    assert b"error" in found.body()
    return found


def refusal(sent: bytes, rules: Policy) -> errors.Refusal:
    found = answer(sent, rules)
    assert isinstance(found, errors.Refusal)
    return found


@dataclass(frozen=True)
class Case:
    name: str
    body: bytes
    param: str | None = None
    code: str = "invalid_request"
    rules: Policy = field(default=RULES)


def check(case: Case) -> None:
    found = refusal(case.body, case.rules)
    assert (found.status, found.code, found.param) == (400, case.code, case.param)
    assert found.type == "invalid_request_error"
    assert case.param is None or case.param in found.message
    assert found.message.endswith(".")


def table(*cases: Case) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def message(**fields: object) -> bytes:
    return body([fields])


def part(part: object, role: str = "user") -> bytes:
    return body([{"role": role, "content": [part]}])


def image(url: object, **more: object) -> bytes:
    return part({"type": "image_url", "image_url": {"url": url, **more}})


# ---- JSON ----------------------------------------------------------------------------------------------------


def not_json(name: str, sent: bytes, param: str | None = None, rules: Policy = RULES) -> Case:
    return Case(name, sent, param, "invalid_json", rules)


def unread(value: bytes) -> bytes:
    """A body whose `stop`, which the policy passes unread, is written like that."""
    return HEAD + b',"stop":' + value + b"}"


@table(
    not_json("empty", b""),
    not_json("whitespace", b" \r\n\t "),
    not_json("NUL", b"\0"),
    not_json("truncated", HEAD),
    not_json("truncated in a string", HEAD[:-10]),
    not_json("trailing junk", HEAD + b"} x"),
    not_json("trailing bracket", HEAD + b"}}"),
    not_json("trailing NUL", HEAD + b"}\0"),
    not_json("two objects", HEAD + b"}" + HEAD + b"}"),
    not_json("a BOM", b"\xef\xbb\xbf" + HEAD + b"}"),
    not_json("UTF-16", (HEAD + b"}").decode().encode("utf-16")),
    not_json("UTF-16 without a BOM", (HEAD + b"}").decode().encode("utf-16-le")),
    not_json("bad UTF-8 in the text", HEAD.replace(b"hello", b"\xff") + b"}"),
    not_json("bad UTF-8 unread", unread(b'"\xff"')),
    not_json("bad UTF-8 in a name", HEAD + b',"\xff":1}'),
    not_json("bad UTF-8 between values", HEAD + b",\xa0" + b'"stop":1}'),
    not_json("overlong UTF-8", unread(b'"\xc0\xaf"')),
    not_json("half a UTF-8 character", unread(b'"\xe6\xb1"')),
    not_json("a surrogate as UTF-8", unread(b'"\xed\xa0\x80"')),
    not_json("beyond Unicode", unread(b'"\xf4\x90\x80\x80"')),
    not_json("no-break space between values", HEAD + b",\xc2\xa0" + b'"stop":1}'),
    not_json("form feed between values", HEAD + b",\f" + b'"stop":1}'),
    not_json("a list", b"[]"),
    not_json("null", b"null"),
    not_json("a string", b'"x"'),
    not_json("a number", b"1"),
    not_json("NaN", unread(b"NaN")),
    not_json("Infinity", unread(b"Infinity")),
    not_json("-Infinity", unread(b"-Infinity")),
    not_json("NaN deep inside", unread(b'[{"a":[NaN]}]')),
    not_json("NaN as a limit", HEAD + b',"max_tokens":NaN}'),
    not_json("leading zero", unread(b"01")),
    not_json("leading plus", unread(b"+1")),
    not_json("no digit after the point", unread(b"1.")),
    not_json("no digit before the point", unread(b".5")),
    not_json("no digit in the exponent", unread(b"1e")),
    not_json("minus alone", unread(b"-")),
    not_json("hexadecimal", unread(b"0x10")),
    not_json("underscore", unread(b"1_0")),
    not_json("other digits", unread("１".encode())),
    not_json("True", unread(b"True")),
    not_json("undefined", unread(b"undefined")),
    not_json("single quotes", unread(b"'x'")),
    not_json("a name without quotes", HEAD + b",stop:1}"),
    not_json("a comment", HEAD + b"/* */}"),
    not_json("comma before the end", HEAD + b",}"),
    not_json("comma in a list", unread(b"[1,]")),
    not_json("no value", unread(b"")),
    not_json("a control character in the text", HEAD.replace(b"hello", b"a\nb") + b"}"),
    not_json("a control character unread", unread(b'"\x01"')),
    not_json("NUL in a string", unread(b'"\0"')),
    not_json("a control character in a name", HEAD + b',"st\top":1}'),
    not_json("unknown escape", unread(rb'"\x41"')),
    not_json("short escape", unread(rb'"\u12"')),
    not_json("odd digits in an escape", unread(rb'"\u 123"')),
    not_json("lone high surrogate in the text", HEAD.replace(b"hello", rb"\ud800") + b"}"),
    not_json("lone low surrogate in the text", HEAD.replace(b"hello", rb"\udc00 hello") + b"}"),
    not_json("surrogates the wrong way round", HEAD.replace(b"hello", rb"\ude00\ud83d") + b"}"),
    not_json("two high surrogates", unread(rb'"\ud83d\ud83d\ude00"')),
    not_json("lone surrogate unread", unread(rb'["\ud800"]')),
    not_json("lone surrogate in a name", HEAD + rb',"\ud800":1}'),
    not_json("surrogates parted by a backslash", unread(rb'"\ud83d\\\ude00"')),
)
def test_json_that_readers_may_take_differently_is_refused(case: Case) -> None:
    """Whatever is not exactly JSON in UTF-8 is 400 invalid_json, also in values that pass unread."""
    check(case)


ONE_IMAGE = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,QQ=="%s}%s}'


def parts(raw: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":"x"},{"role":"user","content":[' + raw + b"]}]}"


def raw_message(raw: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":"x"},{' + raw + b"}]}"


@table(
    not_json("messages", HEAD + b',"messages":[]}', "messages"),
    not_json("model", HEAD + b',"model":"small","model":"secret"}', "model"),
    not_json("model, the same", HEAD + b',"model":"small","model":"small"}', "model"),
    not_json("model, escaped", HEAD + rb',"model":"small","mod\u0065l":"secret"}', "model"),
    not_json("model, escaped first", HEAD + rb',"\u006Dodel":"secret","model":"small"}', "model"),
    not_json("max_tokens", HEAD + b',"max_tokens":1,"max_tokens":1000000}', "max_tokens"),
    not_json("max_tokens and null", HEAD + b',"max_tokens":1000000,"max_tokens":null}', "max_tokens"),
    not_json("stream", HEAD + b',"stream":true,"stream":false}', "stream"),
    not_json("an unread field", HEAD + b',"temperature":1,"temperature":2}', "temperature"),
    not_json("a forbidden field", HEAD + b',"evil":1,"evil":2}', "evil"),
    not_json("a name that cannot be shown", HEAD + b',"<b>":1,"<b>":2}', None),
    not_json("three times", HEAD + b',"user":"a","user":"b","user":"c"}', "user"),
    not_json("role", raw_message(b'"role":"user","role":"system","content":"x"'), "messages[1].role"),
    not_json("role, escaped", raw_message(rb'"role":"user","\u0072ole":"system"'), "messages[1].role"),
    not_json("content", raw_message(b'"role":"user","content":"x","content":[]'), "messages[1].content"),
    not_json("role twice alone", raw_message(b'"role":"user","role":"user"'), "messages[1].role"),
    not_json("name", raw_message(b'"role":"user","content":"x","name":1,"name":2'), "messages[1].name"),
    not_json("a message's odd name", raw_message(b'"role":"user","content":"","<":1,"<":2'), "messages[1]"),
    not_json("type", parts(b'{"type":"text","text":"x","type":"file"}'), "messages[1].content[0].type"),
    not_json("text", parts(b'{"type":"text","text":"x","text":"y"}'), "messages[1].content[0].text"),
    not_json(
        "image_url",
        parts(b'{"type":"text","text":"x"},' + ONE_IMAGE % (b"", b',"image_url":{"url":"http://10.0.0.1/"}')),
        "messages[1].content[1].image_url",
    ),
    not_json("url", parts(ONE_IMAGE % (b',"url":"http://a/"', b"")), "messages[1].content[0].image_url.url"),
    not_json(
        "url, escaped",
        parts(ONE_IMAGE % (rb',"\u0075rl":"http://10.0.0.1/"', b"")),
        "messages[1].content[0].image_url.url",
    ),
    not_json(
        "include_usage",
        HEAD + b',"stream":true,"stream_options":{"include_usage":true,"include_usage":false}}',
        "stream_options.include_usage",
    ),
    not_json(
        "an unread stream option",
        HEAD + b',"stream":true,"stream_options":{"x":true,"x":false}}',
        "stream_options.x",
    ),
)
def test_a_name_that_comes_twice_is_refused_in_every_object_we_read(case: Case) -> None:
    """Two readers may take different ones of two values, so none of them is passed; escapes hide no name."""
    check(case)


@table(
    Case("Role", raw_message(b'"role":"user","Role":"system","content":"x"'), "messages[1].role"),
    Case("ROLE alone", raw_message(b'"ROLE":"user","content":"x"'), "messages[1].role"),
    Case("Content", raw_message(b'"role":"user","content":"x","Content":"y"'), "messages[1].content"),
    Case("escaped", raw_message(rb'"role":"user","content":"x","\u0043ontent":"y"'), "messages[1].content"),
    Case("Model", HEAD + b',"Model":"secret"}', "Model", "field_not_allowed"),
    Case("Max_Tokens", HEAD + b',"Max_Tokens":1000000}', "Max_Tokens", "field_not_allowed"),
    Case("a long s", HEAD + ',"meſſages":[]}'.encode(), None, "field_not_allowed"),
    Case("a Kelvin sign", HEAD + ',"max_to\u212aens":1}'.encode(), None, "field_not_allowed"),
    Case("Type", part({"type": "text", "text": "x", "Type": "file"}), "messages[0].content[0].Type"),
    Case("URL", image(PNG, URL="http://10.0.0.1/"), "messages[0].content[0].image_url.URL"),
    Case(
        "Include_Usage",
        body(stream=True, stream_options={"Include_Usage": True}),
        "stream_options.include_usage",
    ),
    Case(
        "include_usage with a long s",
        body(stream=True, stream_options={"include_uſage": True}),
        "stream_options.include_usage",
    ),
)
def test_a_name_that_differs_only_in_case_is_refused(case: Case) -> None:
    """Go's JSON reader takes `Role` for `role`, so nothing we judge can be said a second time in capitals."""
    check(case)


# ---- depth ---------------------------------------------------------------------------------------------------

BOMBS = [b"[", b'{"a":', b'[{"a":', b"[[],", b'["x",', b"[ \n"]
PLACES = [
    b"%s",
    b'{"messages":%s',
    b'{"model":%s',
    b'{"tools":%s',
    b'{"evil":%s',
    b'{"max_tokens":%s',
    b'{"stream_options":%s',
    b'{"messages":[{"role":%s',
    b'{"messages":[{"role":"user","content":%s',
    b'{"messages":[{"role":"user","content":"x","tool_calls":%s',
    b'{"messages":[{"role":"user","content":[{"type":"text","text":%s',
    b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":%s',
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("depth", [json_fields.MAX_DEPTH + 1, 300, 900, 1100, 100_000])
def test_a_depth_bomb_is_a_refusal(place: bytes, bomb: bytes, depth: int) -> None:
    """Nesting of any kind and size, anywhere, closed or not, is a 400 and never a RecursionError."""
    closing = bytes(reversed(bomb)).translate(bytes.maketrans(b"[{", b"]}"), b'" \n:,ax')
    closing = closing if bomb != b"[[]," else b"]"
    nested = bomb * depth + b"1" + closing * depth
    whole = place % nested
    opened = (place % b"").replace(b"[]", b"")
    ends = bytes(reversed(re.sub(rb"[^\[{]", b"", opened))).translate(bytes.maketrans(b"[{", b"]}"))
    allowed = with_fields("tools")
    assert refusal(place % (bomb * depth), allowed).status == 400
    assert refusal(whole + ends, allowed).status == 400


def nested(depth: int, inside: bytes = b"") -> bytes:
    return b"[" * depth + inside + b"]" * depth


@pytest.mark.parametrize("inside", [b"", b"1", rb'"[[[{{\\\"]["', rb'"\\"', b'"","]"'])
@pytest.mark.parametrize(
    ("written", "path"),
    [
        (b'%s,"tools":%%s}' % HEAD, "tools"),
        (raw_message(b'"role":"user","content":"x","tool_calls":%s'), "messages[1].tool_calls"),
        (raw_message(b'"role":"user","content":"x","<":%s'), "messages[1]"),
        (HEAD + b',"stream":true,"stream_options":{"x":%s}}', "stream_options"),
    ],
)
def test_values_we_pass_unread_nest_so_deep_and_no_deeper(written: bytes, path: str, inside: bytes) -> None:
    """MAX_DEPTH levels pass, one more is invalid_json with the field's path; brackets in strings do not count."""
    levels = json_fields.MAX_DEPTH - (path == "stream_options")
    allowed = with_fields("tools")
    fits = written % nested(levels, inside)
    assert upstream(policy.apply(fits, allowed)) == {**json.loads(fits), "model": "small", "max_tokens": 4096}
    found = refusal(written % nested(levels + 1, inside), allowed)
    assert (found.code, found.param) == ("invalid_json", path)
    assert path in found.message


@pytest.mark.parametrize("text", [rb"\"", rb"\\", rb"\\\"", rb"\"[[", rb"{\\", rb"\"\"\\", b"]"])
def test_no_string_hides_depth_or_makes_it(text: bytes) -> None:
    """A string before the brackets, however it ends, changes nothing in how many levels are counted."""
    allowed = with_fields("tools")
    fits = b'{"tools":["%s",%s,"%s"],' % (text, nested(json_fields.MAX_DEPTH - 1), text) + HEAD[1:] + b"}"
    assert policy.apply(fits, allowed)
    assert refusal(fits.replace(b",[[", b",[[[", 1).replace(b"]],", b"]]],", 1), allowed).param == "tools"


def test_many_brackets_side_by_side_are_not_deep() -> None:
    """Depth is what nests, not what stands in a row: a long tools list passes."""
    tools = [{"function": {"name": f'a"{i}\\', "parameters": {"type": "}]"}}} for i in range(100)]
    assert upstream(policy.apply(body(tools=tools), with_fields("tools")))["tools"] == tools


def test_a_deep_stack_gives_a_refusal_too() -> None:
    """Called where little stack is left, a nested body is still a Refusal or an order, nothing else."""

    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
            return
        for depth in range(1, json_fields.MAX_DEPTH + 1):
            with suppress(errors.InvalidJson):
                policy.apply(b'%s,"tools":%s}' % (HEAD, nested(depth)), with_fields("tools"))

    for levels in range(600, 900, 10):
        descend(levels)


# ---- fields --------------------------------------------------------------------------------------------------


@table(
    Case("unknown", body(evil=1), "evil", "field_not_allowed"),
    Case("unknown and null", body(evil=None), "evil", "field_not_allowed"),
    Case("n", body(n=1), "n", "field_not_allowed"),
    Case("n null", body(n=None), "n", "field_not_allowed"),
    Case("tools", body(tools=[]), "tools", "field_not_allowed"),
    Case("best_of", body(best_of=9), "best_of", "field_not_allowed"),
    Case("empty name", body(**{"": 1}), None, "field_not_allowed"),
    Case("markup", body(**{"<script>": 1}), None, "field_not_allowed"),
    Case("a long name", body(**{"a" * 65: 1}), None, "field_not_allowed"),
    Case("a line break", body(**{"a\nb": 1}), None, "field_not_allowed"),
    Case("a space at the end", body(**{"model ": "x"}), None, "field_not_allowed"),
    Case("temperature taken out", body(temperature=1), "temperature", "field_not_allowed", rules(allow=())),
    Case("max_tokens taken out", body(max_tokens=1), "max_tokens", "field_not_allowed", rules(allow=())),
    Case("max_tokens null", body(max_tokens=None), "max_tokens", "field_not_allowed", rules(allow=())),
    Case(
        "stream_options taken out",
        body(stream=True, stream_options={}),
        "stream_options",
        "field_not_allowed",
        rules(allow=("max_tokens",)),
    ),
    Case("too many", body(**{f"x{i}": 1 for i in range(json_fields.MAX_FIELDS)})),
    Case(
        "too many in a message",
        message(role="user", content="x", **{f"x{i}": 1 for i in range(json_fields.MAX_FIELDS)}),
        "messages[0]",
    ),
)
def test_fields_that_are_not_allowed_are_refused(case: Case) -> None:
    """Only fields in `allow` pass; the refusal names the field unless its name is no plain word."""
    check(case)


@table(
    Case("a number", body(model=1), "model"),
    Case("a list", body(model=["small"]), "model"),
    Case("a boolean, forced", body(model=True), "model", rules=rules(force_model=True)),
    Case("unknown", body(model="gpt"), "model", "model_not_allowed"),
    Case("empty", body(model=""), "model", "model_not_allowed"),
    Case("another case", body(model="Small"), "model", "model_not_allowed"),
    Case("a space", body(model="small "), "model", "model_not_allowed"),
    Case("a NUL", body(model="small\0"), "model", "model_not_allowed"),
    Case("a prefix", body(model="smal"), "model", "model_not_allowed"),
)
def test_a_model_that_is_not_offered_is_refused(case: Case) -> None:
    """The model is a string out of the list, to the letter."""
    check(case)


NOT_LIMITS: dict[str, bytes] = {
    "zero": b"0",
    "minus zero": b"-0",
    "negative": b"-1",
    "true": b"true",
    "false": b"false",
    "float": b"1.5",
    "whole float": b"10.0",
    "exponent": b"1e3",
    "beyond doubles": b"1e999",
    "string": b'"10"',
    "empty string": b'""',
    "list": b"[1]",
    "object": b"{}",
    "310 digits": b"9" * 310,
    "5000 digits": b"9" * 5000,
}


@pytest.mark.parametrize("value", NOT_LIMITS.values(), ids=NOT_LIMITS.keys())
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n"])
def test_a_limit_is_a_strict_integer(name: str, value: bytes) -> None:
    """max_tokens, max_completion_tokens and n are integers of at least 1, written as such."""
    check(Case(name, HEAD + b',"%s":%s}' % (name.encode(), value), name, rules=with_fields("n")))


@table(
    Case("n of 129", body(n=129), "n", rules=with_fields("n")),
    Case("stream as a number", body(stream=1), "stream"),
    Case("stream as a string", body(stream="true"), "stream"),
    Case("stream as a list", body(stream=[]), "stream"),
    Case("stream_options as a list", body(stream=True, stream_options=[]), "stream_options"),
    Case("stream_options as true", body(stream=True, stream_options=True), "stream_options"),
    Case("stream_options without stream", body(stream_options={}), "stream_options"),
    Case("stream_options, stream false", body(stream=False, stream_options={}), "stream_options"),
    Case(
        "include_usage as a number",
        body(stream=True, stream_options={"include_usage": 1}),
        "stream_options.include_usage",
    ),
    Case(
        "include_usage as a string",
        body(stream=True, stream_options={"include_usage": "true"}),
        "stream_options.include_usage",
    ),
)
def test_fields_we_read_have_their_type(case: Case) -> None:
    """A field that the policy reads has exactly the type that it should have."""
    check(case)


def test_fields_are_counted_before_they_are_read() -> None:
    """A body full of names or objects is refused before each of them has cost its time; no text counts as one."""
    names = with_fields("tools", max_input_chars=10**6)
    limit = json_fields.MAX_NAMES
    for most, verdict in ((limit - 5, policy.ChatRequest), (limit, errors.InvalidRequest)):
        assert isinstance(answer(body(tools=[{"a": 1}] * most), names), verdict)
    assert refusal(parts(b'{"a":1},' * json_fields.MAX_NAMES + b"{}"), names).param is None
    for full in (parts(b"{}," * limit + b"{}"), parts(b'{"a":"' + b'","a":"' * 2 * limit + b'"}')):
        assert "in all" in refusal(full, names).message
    for text in (': "', '\\": \\', '{"a": 1}', ":", "{}"):
        written = text * (json_fields.MAX_NAMES + 1)
        assert isinstance(answer(message(role="user", content=written), names), policy.ChatRequest)


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "empty messages": lambda size: b'{"messages":[' + b"{}," * (size // 3) + b"{}]}",
    "short messages": lambda size: b'{"messages":[' + b'{"role":"","content":""},' * (size // 25) + b"{}]}",
    "empty parts": lambda size: parts(b"{}," * (size // 3) + b"{}"),
    "short parts": lambda size: parts(b'{"type":"text","text":"a"},' * (size // 27) + b"{}"),
    "names": lambda size: b"{" + b'"a":1,' * (size // 6) + b'"a":1}',
    "long names": lambda size: b'{"messages":[{' + b'"role1":1,' * (size // 10) + b'"a":1}]}',
    "objects in objects": lambda size: b'{"a":' * (size // 6) + b"1" + b"}" * (size // 6),
    "tool calls": lambda size: body(
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}] * (size // 11)}]
    ),
    "lists": lambda size: b'{"messages":[' + b"[]," * (size // 3) + b"[]]}",
    "escapes": lambda size: message(role="user", content="\\" * (size // 2)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_body_costs_much_more_than_its_size(kind: str) -> None:
    """A body made to be expensive costs at most 20 times the CPU time of a plain one of its size: one call of a
    decoder holds the event loop."""
    size = 1 << 20
    plain = message(role="user", content="word " * (size // 5))
    hostile = HOSTILE[kind](len(plain))
    assert cpu_seconds(hostile) < 20 * cpu_seconds(plain)


def cpu_seconds(written: bytes) -> float:
    """The CPU time for one body: the least of some runs, since a busy machine adds to the others."""
    times = []
    for _ in range(5):
        before = time.thread_time()
        answer(written, Policy(models=("m",)))
        times.append(time.thread_time() - before)
    return min(times)


# ---- messages ------------------------------------------------------------------------------------------------


@table(
    Case("missing", b"{}", "messages"),
    Case("null", body(None), "messages"),
    Case("empty", body([]), "messages"),
    Case("an object", body({}), "messages"),
    Case("a string", body("hello"), "messages"),
    Case("an item that is a string", body(["hello"]), "messages[0]"),
    Case("an item that is null", body([*HELLO, None]), "messages[1]"),
    Case("an item that is a list", body([*HELLO, *HELLO, []]), "messages[2]"),
    Case("no role", message(content="x"), "messages[0].role"),
    Case("an empty message", message(), "messages[0].role"),
    Case("role null", message(role=None, content="x"), "messages[0].role"),
    Case("role a number", message(role=1, content="x"), "messages[0].role"),
    Case("role a list", message(role=["user"], content="x"), "messages[0].role"),
    Case("role unknown", message(role="root", content="x"), "messages[0].role"),
    Case("role in capitals", message(role="System", content="x"), "messages[0].role"),
    Case("role with a space", message(role="user ", content="x"), "messages[0].role"),
    Case("role empty", message(role="", content="x"), "messages[0].role"),
    Case("no content", message(role="user"), "messages[0].content"),
    Case("content null", message(role="user", content=None), "messages[0].content"),
    Case("content null from a tool", message(role="tool", content=None), "messages[0].content"),
    Case("content null from the system", message(role="system", content=None), "messages[0].content"),
    Case("content a number", message(role="user", content=1), "messages[0].content"),
    Case("content 1e999", raw_message(b'"role":"user","content":1e999'), "messages[1].content"),
    Case("content true", message(role="user", content=True), "messages[0].content"),
    Case("content an object", message(role="user", content={}), "messages[0].content"),
    Case("content an empty list", message(role="user", content=[]), "messages[0].content"),
    Case("an assistant's empty list", message(role="assistant", content=[]), "messages[0].content"),
    Case("a part that is a string", part("x"), "messages[0].content[0]"),
    Case("a part that is null", part(None), "messages[0].content[0]"),
    Case("a part without a type", part({"text": "x"}), "messages[0].content[0].type"),
    Case("a part of type null", part({"type": None}), "messages[0].content[0].type"),
    Case("a part of type 1", part({"type": 1}), "messages[0].content[0].type"),
    Case("a part of unknown type", part({"type": "video_url"}), "messages[0].content[0].type"),
    Case("audio", part({"type": "input_audio", "input_audio": {}}), "messages[0].content[0].type"),
    Case("a file", part({"type": "file", "file": {"file_id": "x"}}), "messages[0].content[0].type"),
    Case("a user's refusal", part({"type": "refusal", "refusal": "x"}), "messages[0].content[0].type"),
    Case("no text", part({"type": "text"}), "messages[0].content[0].text"),
    Case("text null", part({"type": "text", "text": None}), "messages[0].content[0].text"),
    Case("text a number", part({"type": "text", "text": 1}), "messages[0].content[0].text"),
    Case("text with another field", part({"type": "text", "text": "x", "y": 1}), "messages[0].content[0].y"),
    Case(
        "text with an image",
        part({"type": "text", "text": "x", "image_url": {"url": "http://10.0.0.1/"}}),
        "messages[0].content[0].image_url",
    ),
    Case("text with an odd field", part({"type": "text", "text": "x", "<": 1}), "messages[0].content[0]"),
    Case(
        "refusal a number",
        part({"type": "refusal", "refusal": 1}, "assistant"),
        "messages[0].content[0].refusal",
    ),
    Case(
        "too many parts",
        message(role="user", content=[{"type": "text", "text": ""}] * (policy.MAX_PARTS + 1)),
        "messages",
    ),
    Case("too many messages", body(HELLO * 201), "messages", "too_many_messages"),
    Case("two where one may be", body(HELLO * 2), "messages", "too_many_messages", rules(max_messages=1)),
    Case("too long", body(), "messages", "input_too_long", rules(max_input_chars=4)),
    Case("too long in all", body(HELLO * 3), "messages", "input_too_long", rules(max_input_chars=14)),
    Case(
        "too long in parts",
        part({"type": "text", "text": "hello"}),
        "messages",
        "input_too_long",
        rules(max_input_chars=4),
    ),
    Case(
        "too long a refusal",
        part({"type": "refusal", "refusal": "hello"}, "assistant"),
        "messages",
        "input_too_long",
        rules(max_input_chars=4),
    ),
)
def test_messages_that_are_not_understood_are_refused(case: Case) -> None:
    """Messages have a known role and known content, and not too much of it; the refusal has the path to the fault."""
    check(case)


URL = "messages[0].content[0].image_url.url"


def bad_url(name: str, url: object, mode: str = "data") -> Case:
    return Case(f"{name} under {mode}", image(url), URL, rules=rules(allow_image_urls=mode))


@table(
    bad_url("data", PNG, "none"),
    bad_url("https", "https://example.org/a.png", "none"),
    bad_url("empty", "", "none"),
    bad_url("https", "https://example.org/a.png"),
    bad_url("empty", ""),
    bad_url("empty", "", "https"),
    *[
        bad_url(name, url, mode)
        for mode in ("data", "https")
        for name, url in {
            "http": "http://example.org/a.png",
            "HTTP": "HTTP://example.org/a.png",
            "file": "file:///etc/passwd",
            "ftp": "ftp://example.org/",
            "gopher": "gopher://10.0.0.1/",
            "blob": "blob:https://example.org/1",
            "no scheme": "//example.org/a.png",
            "a path": "/etc/passwd",
            "a space before data": " " + PNG,
            "a line before data": "\n" + PNG,
            "http before data": "http://10.0.0.1/?" + PNG,
            "HTML as data": "data:text/html;base64,PGI+",
            "data without base64": "data:image/png,abc",
            "data with a charset": "data:image/png;charset=utf-8;base64,QQ==",
            "data without a kind": "data:image/;base64,QQ==",
            "data with a slash": "data:image/a/b;base64,QQ==",
            "data with a line": "data:image/pn\ng;base64,QQ==",
            "a number": 1,
            "null": None,
            "a list": [PNG],
        }.items()
    ],
    bad_url("a bare https", "https://", "https"),
    bad_url("a space before https", " https://example.org", "https"),
    bad_url("a line in https", "https://example.org/\r\nHost: x", "https"),
    bad_url("a line after https", "https://example.org/\n", "https"),
    bad_url("a NUL in https", "https://example.org/\0", "https"),
    bad_url("a backslash in https", "https://example.org\\@10.0.0.1/", "https"),
    bad_url("httpsx", "httpsx://example.org", "https"),
    Case("a plain string", part({"type": "image_url", "image_url": PNG}), "messages[0].content[0].image_url"),
    Case("no image_url", part({"type": "image_url"}), "messages[0].content[0].image_url"),
    Case("null", part({"type": "image_url", "image_url": None}), "messages[0].content[0].image_url"),
    Case("no url", part({"type": "image_url", "image_url": {}}), URL),
    Case("detail a number", image(PNG, detail=1), "messages[0].content[0].image_url.detail"),
    Case("detail an object", image(PNG, detail={"a": [1]}), "messages[0].content[0].image_url.detail"),
    Case("a second url", image(PNG, uri="http://10.0.0.1/"), "messages[0].content[0].image_url.uri"),
    Case(
        "text beside the image",
        part({"type": "image_url", "image_url": {"url": PNG}, "text": "x"}),
        "messages[0].content[0].text",
    ),
    Case(
        "an escaped http",
        image(PNG).replace(b"data:image", rb"\u0068ttp://image"),
        URL,
        rules=rules(allow_image_urls="https"),
    ),
)
def test_an_image_url_that_is_not_allowed_is_refused(case: Case) -> None:
    """Nothing but what allow_image_urls names makes the upstream fetch or read anything; http never."""
    check(case)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_locked_system_refuses_the_pages_instructions(role: str) -> None:
    """With lock_system a system or developer message is 400 wherever it stands and however its role is written."""
    locked = rules(lock_system=True)
    for sent in (
        body([*HELLO, {"role": role, "content": "obey"}]),
        body([*HELLO, {"content": "obey", "role": role}]),
        body([*HELLO, {"role": "@", "content": "obey"}]).replace(
            b"@", rb"\u%04x%s" % (ord(role[0]), role[1:].encode())
        ),
        body([*HELLO, {"@": role, "content": "obey"}]).replace(b"@", rb"r\u006fle"),
    ):
        check(Case(role, sent, "messages[1].role", rules=locked))
        assert policy.apply(sent, RULES)
    for other in set(policy.ROLES) - {"system", "developer"}:
        assert policy.apply(message(role=other, content="x"), locked)


def test_no_text_of_the_client_stands_in_a_refusal() -> None:
    """What the page sent does not come back, except names that are plain words."""
    canary = "<canary>"
    wrongs = [
        body(model=canary),
        body(**{canary: 1}),
        body(stream=canary),
        body(max_tokens=canary),
        body(canary),
        body([canary]),
        message(role=canary, content=""),
        message(role="user", content={canary: canary}),
        message(role="user", content="", **{canary: nested(1).decode()}),
        part({"type": canary}),
        part({"type": "text", "text": "", canary: 1}),
        image(canary),
        image(PNG, **{canary: 1}),
        image(PNG, detail=[canary]),
        b'{"%s":1,"%s":2}' % (canary.encode(), canary.encode()),
        body(stream=True, stream_options=canary),
        b"{%s" % canary.encode(),
    ]
    for sent in wrongs:
        found = answer(sent, RULES)
        assert isinstance(found, policy.ChatRequest) or canary.encode() not in found.body()


# ---- what passes ---------------------------------------------------------------------------------------------


def test_a_body_with_nothing_to_change_passes_as_it_is() -> None:
    """Whitespace, escapes and all: the very bytes go upstream."""
    sent = b' { "mod\\u0065l":"small" ,"max_tokens" : 7,\n"messages":[ {"role":"user","content":"\\u0068i"} ] } \n'
    assert policy.apply(sent, RULES).body == sent


@pytest.mark.parametrize("role", policy.ROLES)
def test_every_role_and_its_other_fields_pass(role: str) -> None:
    """The six roles pass, with name, tool_calls, tool_call_id and whatever else untouched."""
    sent = {
        "role": role,
        "content": "x",
        "name": "n",
        "tool_call_id": "1",
        "tool_calls": [{"a": 1}],
        "x": {"y": []},
    }
    assert upstream(policy.apply(message(**sent), RULES))["messages"] == [sent]


@pytest.mark.parametrize(
    "sent",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": ""},
        {"role": "user", "content": [{"text": "", "type": "text"}]},
        {"content": "other order", "role": "user"},
        {"role": "user", "content": "\0\x1f\x7f\u2028\ufeff\ufffe\U0001f600"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG, "detail": None}}]},
    ],
)
def test_messages_as_clients_write_them_pass(sent: dict[str, object]) -> None:
    """null, missing, empty and listed contents pass where they have a meaning; escaped control characters too."""
    assert upstream(policy.apply(message(**sent), RULES))["messages"] == [sent]


def test_image_urls_pass_as_the_rules_say() -> None:
    """`data` lets inline images through, `https` also addresses, in any kind of image."""
    assert policy.apply(image(PNG), RULES)
    assert policy.apply(image("data:image/svg+xml;base64,QQ=="), RULES)
    assert policy.apply(image(PNG), rules(allow_image_urls="https"))
    assert policy.apply(image("https://example.org/ä?b=c"), rules(allow_image_urls="https"))


def test_the_operators_prompt_comes_first() -> None:
    """system_prompt goes before the page's messages, which follow byte for byte; the page's own system stays."""
    prompt = 'Be "kind".\n'
    theirs = b'[ {"role":"system" , "content":"Forget \\u0061ll."}]'
    order = policy.apply(b'{"messages": %s }' % theirs, rules(system_prompt=prompt))
    assert upstream(order)["messages"] == [{"role": "system", "content": prompt}, *json.loads(theirs)]
    assert theirs[1:] in order.body


def test_limits_count_the_pages_messages_only() -> None:
    """max_messages and max_input_chars are the page's, to the last one; the operator's prompt costs it nothing.
    Characters are code points, however they are written."""
    exact = rules(max_messages=1, max_input_chars=5, system_prompt="a long prompt")
    assert policy.apply(body(), exact)
    assert policy.apply(message(role="user", content="\U0001f600äß汉x"), exact)
    assert policy.apply(body([{"role": "user", "content": "@"}]).replace(b"@", rb"\ud83d\ude00" * 5), exact)
    assert policy.apply(image(PNG), exact)


@pytest.mark.parametrize(
    ("sent", "forced", "model"),
    [
        ({}, False, "small"),
        ({"model": None}, False, "small"),
        ({"model": "large"}, False, "large"),
        ({"model": "large"}, True, "small"),
        ({"model": "unheard of"}, True, "small"),
        ({}, True, "small"),
        ({"model": None}, True, "small"),
    ],
)
def test_the_model_is_chosen(sent: dict[str, Any], forced: bool, model: str) -> None:
    """None asked: the first of the list. force_model: the first whatever is asked."""
    order = policy.apply(body(**sent), rules(force_model=forced))
    assert order.model == upstream(order)["model"] == model


LIMITS: list[tuple[dict[str, Any], dict[str, int], int]] = [
    ({}, {"max_tokens": 100}, 100),
    ({"max_tokens": None}, {"max_tokens": 100}, 100),
    ({"max_completion_tokens": None}, {"max_tokens": 100}, 100),
    ({"max_tokens": None, "max_completion_tokens": None}, {"max_tokens": 100}, 100),
    ({"max_tokens": 1}, {"max_tokens": 1}, 1),
    ({"max_tokens": 100}, {"max_tokens": 100}, 100),
    ({"max_tokens": 101}, {"max_tokens": 100}, 100),
    ({"max_tokens": 10**308}, {"max_tokens": 100}, 100),
    ({"max_completion_tokens": 50}, {"max_completion_tokens": 50}, 50),
    ({"max_completion_tokens": 500}, {"max_completion_tokens": 100}, 100),
    ({"max_tokens": None, "max_completion_tokens": 7}, {"max_completion_tokens": 7}, 7),
    ({"max_tokens": 9, "max_completion_tokens": 7}, {"max_tokens": 9, "max_completion_tokens": 7}, 9),
    ({"max_tokens": 1, "max_completion_tokens": 99}, {"max_tokens": 1, "max_completion_tokens": 99}, 99),
    ({"max_tokens": 900, "max_completion_tokens": 7}, {"max_tokens": 100, "max_completion_tokens": 7}, 100),
    (
        {"max_tokens": 900, "max_completion_tokens": 800},
        {"max_tokens": 100, "max_completion_tokens": 100},
        100,
    ),
]


@pytest.mark.parametrize(("sent", "limits", "tokens"), LIMITS)
def test_output_is_limited(sent: dict[str, Any], limits: dict[str, int], tokens: int) -> None:
    """Every limit that is given is clamped, null counts as absent and is dropped, and without any one is set. Of two
    the larger is what an answer may cost: who knows which one the upstream reads, and a page may say 1 in the other."""
    order = policy.apply(body(**sent), rules(max_output_tokens=100))
    assert {name: value for name, value in upstream(order).items() if name in policy.OUTPUT_LIMITS} == limits
    assert order.output_tokens == tokens


def test_the_limit_is_set_in_the_field_the_operator_named() -> None:
    """output_limit_field is set also when the page could not have sent it."""
    named = rules(output_limit_field="max_completion_tokens", allow=())
    assert upstream(policy.apply(body(), named)) == {
        "messages": HELLO,
        "model": "small",
        "max_completion_tokens": 4096,
    }


@pytest.mark.parametrize(
    ("sent", "stream", "choices", "include_usage"),
    [
        ({}, False, 1, False),
        ({"stream": None, "stream_options": None, "n": None}, False, 1, False),
        ({"stream": False, "n": 1}, False, 1, False),
        ({"stream": True, "n": 128}, True, 128, False),
        ({"stream": True, "stream_options": {}}, True, 1, False),
        ({"stream": True, "stream_options": {"include_usage": False, "x": [1]}}, True, 1, False),
        ({"stream": True, "stream_options": {"include_usage": None}}, True, 1, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, 1, True),
    ],
)
def test_facts(sent: dict[str, Any], stream: bool, choices: int, include_usage: bool) -> None:
    """stream, choices and include_usage are what was asked, and what was asked goes upstream."""
    order = policy.apply(body(**sent), with_fields("n"))
    assert (order.stream, order.choices, order.include_usage) == (stream, choices, include_usage)
    assert upstream(order) == {"messages": HELLO, **sent, "model": "small", "max_tokens": 4096}


def tokens(sent: bytes, rules: Policy = RULES) -> int:
    return policy.apply(sent, rules).prompt_tokens


def test_the_prompt_is_estimated_from_its_bytes() -> None:
    """A third of the messages' and tools' JSON bytes, operator's prompt included; other fields cost nothing."""
    for length in (150, 151, 152):
        raw = b'[{"role":"user","content":"%s"}]' % ("ä" * length).encode()
        assert tokens(b'{"messages":%s,"max_tokens":5,"stream":true}' % raw) == math.ceil(len(raw) / 3)
    assert tokens(body(), rules(system_prompt="x" * 3000)) - tokens(body()) >= 1000
    assert tokens(body(tools=["x" * 3000]), with_fields("tools")) - tokens(body()) >= 1000
    hidden = [{"role": "assistant", "tool_calls": ["x" * 3000]}]
    assert tokens(body(hidden)) >= 1000


def test_an_image_costs_a_flat_amount() -> None:
    """However long its data is."""
    short, long = tokens(image(PNG)), tokens(image(PNG + "A" * 100_000))
    assert short == long
    assert policy.IMAGE_TOKENS < short < policy.IMAGE_TOKENS + 50
    three = tokens(message(role="user", content=[{"type": "image_url", "image_url": {"url": PNG}}] * 3))
    assert 3 * policy.IMAGE_TOKENS < three < 3 * policy.IMAGE_TOKENS + 150


MEGABYTES: dict[str, bytes] = {
    "empty messages": b'{"messages":[' + b"{}," * 349_000 + b"{}]}",
    "small messages": b'{"messages":[' + b'{"role":"user","content":""},' * 36_000 + b"{}]}",
    "names in a message": raw_message(b",".join(b'"%x":0' % index for index in range(100_000))),
    "names at the top": b"{" + b",".join(b'"%x":0' % index for index in range(100_000)) + b"}",
    "parts of one name": parts(b'{"a":1},' * 130_000 + b"{}"),
    "parts": parts(b'{"type":"text","text":""},' * 38_000 + b"{}"),
    "chains of brackets": unread(nested(1, b",".join([nested(800)] * 620))),
    "brackets in a row": unread(nested(1, b",".join([b"[]"] * 300_000))),
    "quotes": unread(nested(1, b",".join([b'[[],"",""]'] * 90_000))),
    "escapes": body("\\" * 500_000),
    "a number": HEAD + b',"max_tokens":' + b"9" * 1_000_000 + b"}",
    "an open string": b'{"' + b"a" * 1_000_000,
}


@pytest.mark.parametrize("sent", MEGABYTES.values(), ids=MEGABYTES.keys())
def test_a_megabyte_of_anything_is_read_in_time(sent: bytes) -> None:
    """No body makes the policy work more than in proportion to its size."""
    generous = with_fields("tools", max_messages=100_000, max_input_chars=10**8)
    began = time.thread_time()  # what the machine does beside does not count
    answer(sent, generous)
    assert time.thread_time() - began < SLOWEST


# ---- properties ----------------------------------------------------------------------------------------------
#
# The reference is Python's own json and a policy written out plainly, over values instead of bytes.

WHITESPACE = st.sampled_from(["", "", "", " ", "\n", "\t", "\r\n  "])
NUMBERS = st.sampled_from(["0", "-0", "-0.0", "1E5", "1e+05", "1.50", "0.1e-7", "-1e999", "9" * 400])
TEXTS = st.text(max_size=12) | st.sampled_from([*'\\"汉/{\0\u2028\U0001f600', '\\"['])
LEAVES = NUMBERS | st.sampled_from(["true", "false", "null"])


@st.composite
def strings(draw: st.DrawFn, text: str | None = None) -> str:
    """JSON for a string, each character plain or escaped in one of the ways there are."""
    value = draw(TEXTS) if text is None else text
    return '"' + "".join(draw(spellings(character)) for character in value) + '"'


def spellings(character: str) -> st.SearchStrategy[str]:
    short = json.dumps(character, ensure_ascii=False)[1:-1]
    escaped = "".join(f"\\u{unit:04x}" for unit in units(character))
    ways = [short, short, short, escaped, escaped.upper().replace("\\U", "\\u")]
    return st.sampled_from([*ways, "\\/"] if character == "/" else ways)


def units(character: str) -> list[int]:
    encoded = character.encode("utf-16-be")
    return [int.from_bytes(encoded[index : index + 2]) for index in range(0, len(encoded), 2)]


@st.composite
def objects(draw: st.DrawFn, members: dict[str, str]) -> str:
    names = draw(st.permutations(list(members)))
    pad = WHITESPACE
    inner = ",".join(
        f"{draw(pad)}{draw(strings(name))}{draw(pad)}:{draw(pad)}{members[name]}{draw(pad)}" for name in names
    )
    return "{" + (inner or draw(pad)) + "}"


@st.composite
def lists(draw: st.DrawFn, items: list[str]) -> str:
    return "[" + ",".join(f"{draw(WHITESPACE)}{item}{draw(WHITESPACE)}" for item in items) + "]"


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    in_lists = st.lists(inner, max_size=3).flatmap(lambda items: lists(items))
    return in_lists | st.dictionaries(TEXTS, inner, max_size=3).flatmap(lambda members: objects(members))


ANYTHING = st.recursive(LEAVES | strings(), grown, max_leaves=8)


@st.composite
def content_parts(draw: st.DrawFn) -> str:
    if draw(st.booleans()):
        return draw(objects({"type": draw(strings("text")), "text": draw(strings())}))
    members = {"url": draw(strings(PNG))} | ({"detail": draw(strings("low"))} if draw(st.booleans()) else {})
    return draw(objects({"type": draw(strings("image_url")), "image_url": draw(objects(members))}))


@st.composite
def messages(draw: st.DrawFn) -> str:
    role = draw(st.sampled_from(policy.ROLES))
    listed = st.lists(content_parts(), min_size=1, max_size=3).flatmap(lambda items: lists(items))
    content = draw(strings() | listed | (st.just("null") if role == "assistant" else st.nothing()))
    extra = draw(st.dictionaries(st.sampled_from(["name", "tool_calls", "x y"]), ANYTHING, max_size=2))
    return draw(objects({"role": draw(strings(role)), "content": content, **extra}))


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A good body, oddly written."""
    members = {"messages": draw(lists(draw(st.lists(messages(), min_size=1, max_size=3))))}
    optional = {
        "model": st.sampled_from(["small", "large"]).flatmap(lambda name: strings(name)) | st.just("null"),
        "stream": st.sampled_from(["true", "false", "null"]),
        "max_tokens": st.sampled_from(["1", "4096", "4097", "null", "9" * 40]),
        "max_completion_tokens": st.sampled_from(["3", "5000", "null"]),
        "n": st.sampled_from(["1", "128", "null"]),
        **dict.fromkeys(("temperature", "stop", "tools", "response_format", "seed"), ANYTHING),
    }
    for name, values in optional.items():
        if draw(st.booleans()):
            members[name] = draw(values)
    if members.get("stream") == "true" and draw(st.booleans()):
        usage = draw(st.sampled_from(["true", "false", "null"]))
        members["stream_options"] = draw(objects({"include_usage": usage, "x": draw(ANYTHING)}))
    return (draw(WHITESPACE) + draw(objects(members)) + draw(WHITESPACE)).encode()


policies = st.builds(
    Policy,
    models=st.just(("small", "large")),
    force_model=st.booleans(),
    max_output_tokens=st.sampled_from([1, 4096]),
    output_limit_field=st.sampled_from(policy.OUTPUT_LIMITS),
    system_prompt=st.sampled_from(["", 'Be "kind"\\\n', "汉"]),
    allow=st.just((*RULES.allow, "n", "tools")),
)

READER = json.JSONDecoder()


def skipped(text: str, at: int) -> int:
    found = re.compile(r"[ \t\r\n]*").match(text, at)
    assert found
    return found.end()


def items_of(text: str) -> list[str]:
    """The items of a JSON list, or the names and values of an object in turn, each as it is written."""
    found, at = [], skipped(text, skipped(text, 0) + 1)
    while text[at] not in "]}":
        _, end = READER.raw_decode(text, at)
        found.append(text[at:end])
        at = skipped(text, end)
        at = skipped(text, at + 1) if text[at] in ":," else at
    return found


def members_of(raw: bytes) -> dict[str, str]:
    items = items_of(raw.decode())
    return {json.loads(name): value for name, value in zip(items[::2], items[1::2], strict=True)}


def expected(asked: dict[str, Any], rules: Policy) -> dict[str, Any]:
    wanted = dict(asked)
    if rules.force_model or wanted.get("model") is None:
        wanted["model"] = rules.models[0]
    if rules.system_prompt:
        wanted["messages"] = [{"role": "system", "content": rules.system_prompt}, *wanted["messages"]]
    for name in policy.OUTPUT_LIMITS:
        if name in wanted and wanted[name] is None:
            del wanted[name]
        elif name in wanted:
            wanted[name] = min(wanted[name], rules.max_output_tokens)
    if not wanted.keys() & set(policy.OUTPUT_LIMITS):
        wanted[rules.output_limit_field] = rules.max_output_tokens
    return wanted


@pytest.mark.slow
@tuning
@given(bodies(), policies)
@example(HEAD + b',"seed":1e999,"max_tokens":4096,"model":"small"}', RULES)
def test_untouched_values_are_byte_identical(sent: bytes, rules: Policy) -> None:
    """Any good body, however it is written, passes; what goes upstream has every untouched value and every message
    byte for byte, in order, and means exactly what the rules make of it."""
    order = policy.apply(sent, rules)
    before, after = members_of(sent), members_of(order.body)
    asked = json.loads(sent)
    wanted = expected(asked, rules)
    assert json.loads(order.body) == wanted
    untouched = [name for name in asked if name in wanted and wanted[name] == asked[name]]
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    assert items_of(after["messages"])[bool(rules.system_prompt) :] == items_of(before["messages"])
    assert [name for name in after if name in before] == [name for name in before if name in after]
    limits = [wanted[name] for name in policy.OUTPUT_LIMITS if name in wanted]
    facts = (order.model, order.stream, order.choices, order.output_tokens, order.include_usage)
    usage = (asked.get("stream_options") or {}).get("include_usage")
    assert facts == (
        wanted["model"],
        bool(asked.get("stream")),
        asked.get("n") or 1,
        max(limits),
        bool(usage),
    )


class Repeated(dict[str, Any]):
    """An object in which a name came twice."""


def strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(found)


def no_constant(_: str) -> None:
    raise AssertionError("NaN or Infinity was let through")


def strictly_read(sent: bytes) -> dict[str, Any]:
    """What the body means to a strict reader; fails where readers could differ on what the policy reads."""
    read: dict[str, Any] = json.loads(
        sent.decode(),
        object_pairs_hook=strict_object,
        parse_constant=no_constant,
        parse_int=lambda text: int(text[:4000]),
    )
    contents = [message.get("content") for message in read["messages"]]
    listed = [part for content in contents if isinstance(content, list) for part in content]
    images = [part["image_url"] for part in listed if "image_url" in part]
    for one in (read, read.get("stream_options"), *read["messages"], *listed, *images):
        assert not isinstance(one, Repeated)
    json.dumps(read["messages"], ensure_ascii=False).encode()  # no lone surrogates
    return read


def judge(sent: bytes, rules: Policy) -> bool:
    """Whether it passes. It passes only with the one meaning it has; else it is a 400."""
    order = answer(sent, rules)
    if isinstance(order, errors.Refusal):
        return False
    assert upstream(order) == expected(strictly_read(sent), rules)
    return True


@tuning
@given(
    st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    policies,
)
def test_arbitrary_bytes_are_refused(sent: bytes, rules: Policy) -> None:
    """Bytes of any kind are answered with a Refusal of status 400, never with another exception."""
    judge(sent, rules)


TOKENS = [
    *rb"""{ } [ ] , : " \ null true 1 -1 1.0 1e999 NaN {} [] "" \ud800 \udc00 \u0065 "Role" "system" "small"
    "model" "messages" "role" "content" "type" "text" "image_url" "url" "n" "max_tokens" "stream" "stream_options"
    "include_usage" "model":"small", "role":"user", "content":"x", "max_tokens":1, ,"url":"x" "tools":[], """.split(),
    *(b" ", b"\0", b"\n", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"[" * 99),
]


def mutated(dice: random.Random, sent: bytes) -> bytes:
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        start = dice.randrange(len(sent) + 1)
        end = min(len(sent), start + dice.choice((0, 1, 1, 2, 8)))
        other = dice.randrange(len(sent) + 1)
        token, copy = dice.choice(TOKENS), sent[other : other + 9]
        sent = sent[:start] + dice.choice((b"", token, token, copy, dice.randbytes(1))) + sent[end:]
    return sent


@pytest.mark.slow
@tuning
@given(bodies(), policies, st.randoms(use_true_random=False))
def test_mutated_bodies_have_one_meaning_or_none(sent: bytes, rules: Policy, dice: random.Random) -> None:
    """A good body that was tampered with is a Refusal of status 400, or goes on with the one meaning it has."""
    own = random.Random(dice.random())
    for _ in range(MUTANTS):
        judge(mutated(own, sent), rules)


@tuning
@given(st.lists(st.sampled_from(TOKENS), max_size=30), policies)
def test_tokens_in_any_order_are_judged(soup: list[bytes], rules: Policy) -> None:
    """Pieces of JSON in any order, inside an object that is good so far: a 400, or the one meaning."""
    judge(b"".join(soup), rules)
    judge(HEAD + b"," + b"".join(soup) + b"}", rules)
