"""The errors of the proxy: refusals of a request, and interruptions of a stream.

    Refusal                       status + code + OpenAI's error type
    ├── InvalidRequest 400        invalid_request and its kin, UpstreamRejected
    ├── Unauthenticated 401
    ├── Forbidden 403
    ├── NotFound 404, MethodNotAllowed 405, RequestTimeout 408, LengthRequired 411,
    │   BodyTooLarge 413, UnsupportedMediaType 415, HeadersTooLarge 431
    ├── TooMany 429               ours, and UpstreamRateLimited
    ├── InternalError 500
    ├── BadGateway 502            UpstreamAuth, UpstreamUnreachable, UpstreamProtocol
    ├── Unavailable 503           Busy, Draining, LimitsUnavailable
    └── GatewayTimeout 504
    Interruption                  ends a stream that has begun: no status any more, only an event

Rules:
1. The message is ours and tells the reader what to do; nothing an upstream or a client sent stands in it,
   except names that were checked against a list or a pattern.
2. The evidence (what really happened) goes to `reason`, which only the log sees.
3. A code is public and never changes its meaning.
"""

from __future__ import annotations

import json
from math import ceil
from typing import ClassVar, Self

HeaderList = list[tuple[bytes, bytes]]

PATIENCE = 60.0  # seconds of Retry-After beyond which a client should not retry by itself
DEFAULT_WAIT = 1.0  # seconds of Retry-After on a 429 or 503 without a better value; both always have one


def error_body(message: str, type_: str, code: str, param: str | None = None) -> bytes:
    """OpenAI's error object as JSON bytes; what follows `data: ` in a stream, and the body before one."""
    error = {"message": message, "type": type_, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False, separators=(",", ":")).encode()


class Refusal(Exception):
    """A request that is answered with an error.

    `retry_after` is in seconds from now; it becomes an integer Retry-After of at least 1.
    `should_retry` false makes OpenAI's clients not retry (x-should-retry).
    `billed`: the upstream may have done paid work. `leaked`: it tried to hand out our key, an alarm. `retriable`: the
    upstream may be asked again.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    closes: ClassVar[bool] = False  # the connection closes after the response
    code: str = "internal_error"
    message: str = "Something went wrong on our side. Please try again."

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        reason: str | None = None,
        headers: HeaderList | None = None,
        billed: bool = False,
        leaked: bool = False,
        retriable: bool = False,
    ) -> None:
        self.message = message or self.message
        self.param = param
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.reason = reason
        self.billed = billed
        self.leaked = leaked
        self.retriable = retriable
        self.extra_headers = headers or []
        super().__init__(self.message)

    def body(self) -> bytes:
        return error_body(self.message, self.type, self.code, self.param)

    def headers(self) -> HeaderList:
        headers = list(self.extra_headers)
        wait = self.retry_after
        if wait is None and self.status in (429, 503):
            wait = DEFAULT_WAIT
        if wait is not None:
            headers.append((b"retry-after", b"%d" % max(1, ceil(wait))))
            headers.append((b"retry-after-ms", b"%d" % max(1, ceil(wait * 1000))))
        if self.closes:
            headers.append((b"connection", b"close"))
        should_retry = self.should_retry
        if should_retry is None and wait is not None and wait > PATIENCE:
            should_retry = False
        if should_retry is not None:
            headers.append((b"x-should-retry", b"true" if should_retry else b"false"))
        return headers


class InvalidRequest(Refusal):
    status, type, code = 400, "invalid_request_error", "invalid_request"
    message = "The request is not valid."


class InvalidJson(InvalidRequest):
    code = "invalid_json"
    message = "The request body is not valid JSON."


class ModelNotAllowed(InvalidRequest):
    code = "model_not_allowed"
    message = "This model is not offered here. GET /api/v1/models lists those that are."


class FieldNotAllowed(InvalidRequest):
    code = "field_not_allowed"


class TooManyMessages(InvalidRequest):
    code = "too_many_messages"


class InputTooLong(InvalidRequest):
    code = "input_too_long"


class UpstreamRejected(InvalidRequest):
    code = "upstream_rejected"
    message = "The model's server did not accept this request. Check the model and the options that were sent."

    def __init__(
        self, *, upstream_code: str | None = None, param: str | None = None, reason: str | None = None
    ) -> None:
        super().__init__(param=param, reason=reason)
        self.code = upstream_code or self.code


class Unauthenticated(Refusal):
    status, type, code = 401, "authentication_error", "session_required"
    message = "This session is not valid. Reload the page to get a new one."


class SessionExpired(Unauthenticated):
    code = "session_expired"
    message = "The session has expired. Please sign in again."


class LoginRequired(Unauthenticated):
    code = "login_required"
    message = "Please sign in first."


class InvalidCredentials(Unauthenticated):
    code = "invalid_credentials"
    message = "The name or the password is not right."


class Forbidden(Refusal):
    status, type, code = 403, "permission_error", "not_allowed"
    message = "This is not allowed here."


class CrossOrigin(Forbidden):
    code = "cross_origin"
    message = (
        "This server answers only its own page. Open the chat under its own address. "
        "For the operator: this address must be server.public_url, or be listed in server.extra_origins."
    )


class NotFound(Refusal):
    status, type, code = 404, "invalid_request_error", "not_found"
    message = "There is nothing at this address."


class MethodNotAllowed(Refusal):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"
    message = "This address does not answer that method."


class RequestTimeout(Refusal):
    status, type, code = 408, "invalid_request_error", "request_timeout"
    closes = True
    message = "The request took too long to arrive. Please send it again."


class LengthRequired(Refusal):
    status, type, code = 411, "invalid_request_error", "length_required"
    message = "The request needs a Content-Length."


class BodyTooLarge(Refusal):
    status, type, code = 413, "invalid_request_error", "body_too_large"
    message = "The request is too large. Shorten the conversation or start a new one."


class UnsupportedMediaType(Refusal):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"
    message = "Send JSON, with the header Content-Type: application/json."


class HeadersTooLarge(Refusal):
    status, type, code = 431, "invalid_request_error", "headers_too_large"
    closes = True
    message = "The request's headers are too large. Clear this site's cookies and try again."


class TooMany(Refusal):
    status, type, code = 429, "rate_limit_error", "rate_limited"
    message = "Too many requests. Please wait a moment and try again."


class TooManyStreams(TooMany):
    code = "too_many_streams"
    message = "Too many answers are being written at once. Wait for one to end, or stop it."


class TokensExhausted(TooMany):
    code = "tokens_exhausted"
    message = "The token allowance is used up for now. Please try again later."


class TooManySessions(TooMany):
    code = "too_many_sessions"
    message = "Too many new sessions from this address. Please try again later."


class UpstreamRateLimited(TooMany):
    code = "upstream_rate_limited"
    message = "The model is receiving too many requests. Please try again in a moment."


class InternalError(Refusal):
    pass


class BadGateway(Refusal):
    status, code = 502, "upstream_error"
    message = "The model's server had a problem. Please try again."


class UpstreamAuth(BadGateway):
    code = "upstream_auth"
    message = "The model's server did not accept this service's credentials. Please contact the operator."


class UpstreamUnreachable(BadGateway):
    code = "upstream_unreachable"
    message = "The model's server cannot be reached. Please try again later."


class UpstreamProtocol(BadGateway):
    code = "upstream_protocol"
    message = "The model's server sent an answer that cannot be used. Please try again later."


class Unavailable(Refusal):
    status = 503


class Busy(Unavailable):
    code = "busy"
    message = "The service is at its limit. Please try again in a few seconds."


class Draining(Unavailable):
    code = "draining"
    closes = True
    message = "The service is restarting. Please try again in a few seconds."


class LimitsUnavailable(Unavailable):
    code = "limits_unavailable"
    message = "Usage limits cannot be checked right now. Please try again in a few seconds."


class GatewayTimeout(Refusal):
    status, code = 504, "upstream_timeout"
    message = "The model's server did not answer in time. Please try again."


class Interruption(Exception):
    """A stream that had begun and cannot be finished; it becomes the last event the browser gets."""

    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "stream_interrupted"
    ending: ClassVar[str] = "truncated"  # as chat_proxy_stream_endings_total counts it
    message: ClassVar[str] = "The answer broke off: the connection to the model's server was lost. Please try again."

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        super().__init__(self.message)

    def alone(self) -> Self:
        """Drops the traceback: it would form a reference cycle with the frames that hold this exception."""
        self.__traceback__ = self.__context__ = None
        return self

    def event(self) -> bytes:
        return b"data: " + error_body(self.message, self.type, self.code) + b"\n\n"


class StreamTimeout(Interruption):
    code, ending = "stream_timeout", "timeout"
    message = "The answer broke off: the model's server went silent. Please try again."


class StreamTooLong(Interruption):
    code, ending = "stream_too_long", "timeout"
    message = "The answer took longer than is allowed here and was ended."


class StreamDrained(Interruption):
    code, ending = "draining", "drained"
    message = "The answer broke off: the service is restarting. Please try again in a few seconds."


class StreamFailed(Interruption):
    code, ending = "internal_error", "error"
    message = "The answer broke off: something went wrong on our side. Please try again."
