"""The upstream's errors: its error objects, Retry-After, and the translation of httpx's errors into refusals."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import NoReturn, TypeVar, cast

import httpx
import msgspec

from proxy.errors import (
    GatewayTimeout,
    UpstreamProtocol,
    UpstreamUnreachable,
)

T = TypeVar("T")

LONGEST_WAIT = 86400.0  # seconds: a Retry-After of more than a day is taken for a mistake
LONGEST_ERROR = 64 * 1024  # bytes of an error's body; a longer one is not read for its code
ERROR_BODY_TIMEOUT = 5.0  # seconds to read an error's body, or a list of models
DECIMAL = re.compile(r"-?\d{1,15}(?:\.\d{0,15})?", re.ASCII)
HARMLESS = re.compile(r"[a-z0-9_.\[\]]{1,64}")


class UpstreamError(msgspec.Struct):
    code: object = None
    param: object = None


class ErrorBody(msgspec.Struct):
    error: UpstreamError


decode_error = msgspec.json.Decoder(ErrorBody).decode
decode_any = msgspec.json.Decoder(msgspec.Raw).decode


def refuse_transport(error: httpx.TransportError) -> NoReturn:
    reason = describe(error)
    if isinstance(error, httpx.ConnectTimeout):
        raise GatewayTimeout(should_retry=False, reason=reason) from error
    if isinstance(error, httpx.ConnectError):
        raise UpstreamUnreachable(reason=reason) from error
    if isinstance(error, httpx.TimeoutException):
        raise GatewayTimeout(should_retry=False, reason=reason, billed=True) from error
    if isinstance(error, httpx.NetworkError):
        raise UpstreamUnreachable(reason=reason, billed=True) from error
    raise UpstreamProtocol(reason=reason, billed=True) from error


def describe(error: httpx.TransportError) -> str:
    """The types of an error and its causes, for the log. Their texts may quote the request."""
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{type(error).__name__}: {cause.verify_message}"
    if isinstance(cause, socket.gaierror | OSError):
        return f"{type(error).__name__}: {cause.strerror or type(cause).__name__}"
    return type(error).__name__


async def read_at_most(response: httpx.Response, most: int) -> bytes | None:
    """The whole body, or None when it is longer than `most` bytes."""
    parts, size = [], 0
    async for part in cast(AsyncIterator[bytes], response.stream):
        size += len(part)
        if size > most:
            return None
        parts.append(part)
    return b"".join(parts)


def is_json(answer: bytes) -> bool:
    try:
        decode_any(answer)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


async def decoded(response: httpx.Response, most: int, decode: Callable[[bytes], T]) -> T | None:
    """The decoded body; None if it takes over ERROR_BODY_TIMEOUT, has over `most` bytes, or cannot be decoded."""
    try:
        async with asyncio.timeout(ERROR_BODY_TIMEOUT):
            body = await read_at_most(response, most)
        return decode(body or b"")
    except (TimeoutError, httpx.TransportError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


async def error_of(response: httpx.Response) -> UpstreamError:
    body = await decoded(response, LONGEST_ERROR, decode_error)
    return body.error if body else UpstreamError()


def retry_after(headers: httpx.Headers, now: float) -> float | None:
    """Seconds to wait by retry-after-ms (OpenAI's), else by Retry-After in seconds or as a date (RFC 9110).

    Never negative, and at most LONGEST_WAIT; None if neither header can be read.
    """
    milliseconds, written = number(headers.get("retry-after-ms", "")), headers.get("retry-after", "")
    wait = number(written) if milliseconds is None else milliseconds / 1000
    if wait is None:
        wait = seconds_until(written, now)
    return None if wait is None else min(max(0.0, wait), LONGEST_WAIT)


def number(written: str) -> float | None:
    """The value of a decimal number; None for anything else that float() accepts, such as nan."""
    return float(written) if DECIMAL.fullmatch(written.strip()) else None


def seconds_until(date: str, now: float) -> float | None:
    """The seconds from `now` to an HTTP date in any of its three forms, all in UTC (RFC 9110 section 5.6.7)."""
    try:
        moment = parsedate_to_datetime(date)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - now
    except (ValueError, OverflowError):
        return None
