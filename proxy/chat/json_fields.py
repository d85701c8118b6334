"""Reads JSON strictly: repeated names, depth and sizes are checked, values stay bytes. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set
from itertools import accumulate
from typing import Any, NoReturn

import msgspec
from msgspec import Raw

from proxy import errors

MAX_DEPTH = 64  # levels in a value we pass unread: twice what tool schemas use, half of what serde_json reads
MAX_FIELDS = 64  # of an object that we read: OpenAI's request has about 40; each costs us time
MAX_NAMES = 30_000  # in the whole body, 2 us each before any bound below is reached; its size would let 130,000 in
MAX_DIGITS = 309  # of an integer: no double holds more, and Python itself refuses to read 4,301
SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
TYPE_ERROR = re.compile(r"(?:Expected `([a-z| ]+)`)?.*?(?: - at `\$([\w.\[\]]+)`)?\Z")  # msgspec's message
BOOLEANS = {b"true": True, b"false": False, b"null": False}
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: one level down, one level up
NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


# ---- refusing --------------------------------------------------------------------------------------------

TOO_DEEP = f"is nested too deeply: at most {MAX_DEPTH} levels"


def wrong(path: str, right: str) -> NoReturn:
    raise errors.InvalidRequest(f"{path} {right}.", param=path)


def path_to(parent: str, name: str) -> str | None:
    """The path of a field whose name the client chose; the parent's when the name cannot be shown."""
    path = f"{parent}.{name}" if parent else name
    return path if SAFE_NAME.fullmatch(name) else parent or None


# ---- objects and values ----------------------------------------------------------------------------------


class Key:
    """One occurrence of a name in an object. No two are equal, so a dict keeps a name that comes twice."""

    __slots__ = ("name",)

    def __init__(self, _: type, name: str) -> None:
        self.name = name


Members = dict[Key, Raw]


class Message(msgspec.Struct):
    """A message's fields that we read; when one is written twice, the last."""

    role: str = ""
    content: str | list[Members] | None = None


def decoder(shape: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(shape, dec_hook=Key)


STRING, OBJECT, OBJECTS, MESSAGES = map(decoder, (str, Members, list[Members], list[Message]))


def parse(body: bytes) -> dict[str, Raw]:
    """The body's fields by name; the values are valid JSON in valid UTF-8, more is not known of them."""
    try:
        body.decode()  # msgspec does not check the content of a Raw
        check_names_in_all(body)
        members = OBJECT.decode(body)
    except UnicodeDecodeError as error:
        raise errors.InvalidJson("The request body is not UTF-8 text.", reason=str(error)) from None
    except msgspec.ValidationError:
        raise errors.InvalidJson("The request body must be one JSON object.") from None
    except msgspec.DecodeError as error:
        raise errors.InvalidJson(reason=str(error)) from None
    return named(members, "")


def check_names_in_all(body: bytes) -> None:
    if body.count(b":") > MAX_NAMES and outside_strings(body).count(b":") > MAX_NAMES:
        raise errors.InvalidRequest(f"The request has too many fields in all: at most {MAX_NAMES}.")


def outside_strings(value: bytes) -> bytes:
    """The parts of a JSON text outside its strings."""
    unescaped = value.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(unescaped.split(b'"')[::2])


def named(members: Members, path: str) -> dict[str, Raw]:
    if len(members) > MAX_FIELDS:
        message = f"{path or 'The request'} has too many fields: at most {MAX_FIELDS}."
        raise errors.InvalidRequest(message, param=path or None)
    found = {key.name: value for key, value in members.items()}
    if len(found) != len(members):
        twice = Counter(key.name for key in members).most_common(1)[0][0]
        param = path_to(path, twice)
        raise errors.InvalidJson(f"{param or 'A field'} is written twice; write it once.", param=param)
    return found


def check_lookalikes(fields: dict[str, Raw], known: Set[str], path: str) -> None:
    for name in fields.keys() - known:
        if (meant := name.casefold()) in known:
            wrong(f"{path}.{meant}", "must be written in small letters")


def check_known(fields: dict[str, Raw], known: Set[str], path: str) -> None:
    for name in sorted(fields.keys() - known):
        listed, param = ", ".join(sorted(known)), path_to(path, name)
        raise errors.InvalidRequest(f"{param} is not known here; {path} takes {listed}.", param=param)


def absent(fields: dict[str, Raw], name: str) -> bool:
    return name not in fields or bytes(fields[name]) == b"null"


def decode(decoder: msgspec.json.Decoder[Any], raw: Raw | None, path: str) -> Any:
    """The value; when it, or something in it that we read, has the wrong type, the refusal names that."""
    if raw is None:
        wrong(path, "is required")
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        found = TYPE_ERROR.match(str(error))
        right, inner = found.groups("") if found else ("", "")
        named = right.replace("str", "string").replace(" |", " or")
        wrong(path + inner, f"must be {named}" if named else "must not be a number")  # that no double holds


def boolean(raw: Raw | None, path: str) -> bool:
    written = b"null" if raw is None else bytes(raw)
    if written not in BOOLEANS:
        wrong(path, "must be true or false")
    return BOOLEANS[written]


def integer(raw: Raw, path: str, highest: int | None = None) -> int:
    """At least 1, and written in digits: true, 1.0, 1e3 and "1" are no integers."""
    written = bytes(raw)
    value = int(written) if written.isdigit() and len(written) <= MAX_DIGITS else 0
    if value < 1 or (highest and value > highest):
        wrong(path, f"must be an integer from 1 to {highest}" if highest else "must be an integer, 1 or more")
    return value


def check_depth(raw: Raw, path: str | None) -> None:
    value = bytes(raw)
    if value[0] not in b"[{" or value.count(b"[") + value.count(b"{") <= MAX_DEPTH:
        return
    steps = memoryview(outside_strings(value).translate(STEPS, NO_BRACKETS)).cast("b")
    if max(accumulate(steps)) > MAX_DEPTH:
        raise errors.InvalidJson(f"{path} {TOO_DEEP}.", param=path)
