"""Strict reading of JSON: repeated names, depth and sizes are checked, values stay bytes. Pure.

Every fault is raised as InvalidJson or InvalidRequest, with the path of the field.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set
from itertools import accumulate
from typing import Any, NoReturn

import msgspec
from msgspec import Raw

from proxy import errors

MAX_DEPTH = 64  # levels in a value that passes unread: twice what tool schemas use, half of serde_json's limit
MAX_FIELDS = 64  # in an object that is read: OpenAI's request has about 40, and each costs time
MAX_NAMES = 30_000  # and as many objects in the whole body: decoding one costs as much as 60 bytes of text
MAX_QUOTES = 4 * MAX_NAMES  # of a body that may have more: around each name and its value
MAX_DIGITS = 309  # in an integer: a double holds no more, and int() raises from 4,301 on
SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
TYPE_ERROR = re.compile(r"(?:Expected `([a-z| ]+)`)?.*?(?: - at `\$([\w.\[\]]+)`)?\Z")  # msgspec's message
BOOLEANS = {b"true": True, b"false": False, b"null": False}
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: one level down, one level up
NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


# ---- refusing --------------------------------------------------------------------------------------------

TOO_DEEP = f"is nested too deeply: at most {MAX_DEPTH} levels"


def refuse(path: str, rule: str) -> NoReturn:
    raise errors.InvalidRequest(f"{path} {rule}.", param=path)


def path_to(parent: str, name: str) -> str | None:
    """The path of a field whose name the client chose; the parent's path when the name is not a SAFE_NAME."""
    path = f"{parent}.{name}" if parent else name
    return path if SAFE_NAME.fullmatch(name) else parent or None


# ---- objects and values ----------------------------------------------------------------------------------


class Key:
    """One occurrence of a name in an object. No two are equal, so a dict keeps both when a name is repeated."""

    __slots__ = ("name",)

    def __init__(self, _: type, name: str) -> None:
        self.name = name


Members = dict[Key, Raw]


class Message(msgspec.Struct):
    """The fields of a message that are read; the last one when a field is repeated."""

    role: str = ""
    content: str | list[Members] | None = None


def decoder(shape: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(shape, dec_hook=Key)


STRING, OBJECT, OBJECTS, MESSAGES = map(decoder, (str, Members, list[Members], list[Message]))


def parse(body: bytes) -> dict[str, Raw]:
    """The body's fields by name. The values are valid JSON in valid UTF-8; nothing more has been checked."""
    try:
        body.decode()  # msgspec does not check the bytes of a Raw
        check_structure(body)
        members = OBJECT.decode(body)
    except UnicodeDecodeError as error:
        raise errors.InvalidJson("The request body is not UTF-8 text.", reason=str(error)) from None
    except msgspec.ValidationError:
        raise errors.InvalidJson("The request body must be one JSON object.") from None
    except msgspec.DecodeError as error:
        raise errors.InvalidJson(reason=str(error)) from None
    return fields_by_name(members, "")


def check_structure(body: bytes) -> None:
    """Refuses a body whose decoding would hold the event loop for much longer than its size lets expect."""
    if most_of(body) <= MAX_NAMES:
        return
    bare = unescaped(body)
    if bare.count(b'"') > MAX_QUOTES or most_of(outside_strings(bare)) > MAX_NAMES:
        raise errors.InvalidRequest(f"The request has too many fields or objects in all: at most {MAX_NAMES}.")


def most_of(text: bytes) -> int:
    """The number of names or of objects in a JSON text without strings, whichever is larger; otherwise at least it."""
    return max(text.count(b":"), text.count(b"{"))


def unescaped(value: bytes) -> bytes:
    """A JSON text in which each quote begins or ends a string."""
    return value.replace(b"\\\\", b"").replace(b'\\"', b"")


def outside_strings(bare: bytes) -> bytes:
    """The parts outside the strings of a JSON text from `unescaped`."""
    return b"".join(bare.split(b'"')[::2])


def fields_by_name(members: Members, path: str) -> dict[str, Raw]:
    if len(members) > MAX_FIELDS:
        message = f"{path or 'The request'} has too many fields: at most {MAX_FIELDS}."
        raise errors.InvalidRequest(message, param=path or None)
    fields = {key.name: value for key, value in members.items()}
    if len(fields) != len(members):
        repeated = Counter(key.name for key in members).most_common(1)[0][0]
        param = path_to(path, repeated)
        raise errors.InvalidJson(f"{param or 'A field'} is written twice; write it once.", param=param)
    return fields


def check_lookalikes(fields: dict[str, Raw], known: Set[str], path: str) -> None:
    for name in fields.keys() - known:
        if (lower := name.casefold()) in known:
            refuse(f"{path}.{lower}", "must be written in small letters")


def check_known(fields: dict[str, Raw], known: Set[str], path: str) -> None:
    for name in sorted(fields.keys() - known):
        listed, param = ", ".join(sorted(known)), path_to(path, name)
        raise errors.InvalidRequest(f"{param} is not known here; {path} takes {listed}.", param=param)


def absent(fields: dict[str, Raw], name: str) -> bool:
    return name not in fields or bytes(fields[name]) == b"null"


def decode(decoder: msgspec.json.Decoder[Any], raw: Raw | None, path: str) -> Any:
    """The decoded value. A wrong type is refused with the path of the value in `raw` that has it."""
    if raw is None:
        refuse(path, "is required")
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        match = TYPE_ERROR.match(str(error))
        expected, inner = match.groups("") if match else ("", "")
        types = expected.replace("str", "string").replace(" |", " or")
        refuse(path + inner, f"must be {types}" if types else "must not be a number")  # beyond a double's range


def boolean(raw: Raw | None, path: str) -> bool:
    text = b"null" if raw is None else bytes(raw)
    if text not in BOOLEANS:
        refuse(path, "must be true or false")
    return BOOLEANS[text]


def integer(raw: Raw, path: str, highest: int | None = None) -> int:
    """An integer from 1 on, in digits only: true, 1.0, 1e3 and "1" are refused."""
    text = bytes(raw)
    value = int(text) if text.isdigit() and len(text) <= MAX_DIGITS else 0
    if value < 1 or (highest and value > highest):
        refuse(path, f"must be an integer from 1 to {highest}" if highest else "must be an integer, 1 or more")
    return value


def check_depth(raw: Raw, path: str | None) -> None:
    value = bytes(raw)
    if value[0] not in b"[{" or value.count(b"[") + value.count(b"{") <= MAX_DEPTH:
        return
    steps = memoryview(outside_strings(unescaped(value)).translate(STEPS, NO_BRACKETS)).cast("b")
    if max(accumulate(steps)) > MAX_DEPTH:
        raise errors.InvalidJson(f"{path} {TOO_DEEP}.", param=path)
