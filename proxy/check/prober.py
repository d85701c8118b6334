"""`chat-proxy check --url`: plays a browser through the public address, and reports its observations to judgements.py.

Rules:
1. It asks the server's diagnostic routes (diagnosis.py), with a fresh ticket for each request, and never the model.
2. No ticket goes over plain http, or where a certificate does not hold: there it stops, as a browser would.
3. Each request has a deadline. A run makes some forty, eight at a time at most, and two streams at a time.
"""

from __future__ import annotations

import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from proxy.check import findings, judgements
from proxy.check.findings import Finding
from proxy.check.report import (
    CHAT,
    FOREIGN,
    HEADER,
    LOOK,
    SPOOF,
    STATES,
    AbortResult,
    Answer,
    Certificate,
    Departure,
    Observed,
    Report,
    Streamed,
)
from proxy.check.ticket import Tickets
from proxy.settings import USUAL_PORTS, Settings, is_loopback
from proxy.transport.tls import system_ssl_context

DEADLINE = 10.0  # seconds for each thing that is waited for
FOREIGN_USER = "nobody@elsewhere.invalid"
EVENTS, SPACING = 8, 0.1  # of the stream whose rhythm is looked at
LEFT_SILENT = 10.0  # seconds of silence in the stream that is abandoned
LEAVING_PATIENCE = 2.0  # seconds for the server to notice; it takes milliseconds
LEAVING_TRIES = 3  # when the stream is unknown: several processes share the address, and one of them has it
ASKERS = 8  # at one time, so that more than one of those processes is asked
MOST_BODY = 32 << 20  # bytes: more is not sent, whatever server.max_body_bytes allows
LONGEST_SILENCE = 120.0  # seconds: as long as the server's own bound
SILENCE_OVER_TIMEOUT = 1.25  # how much longer than the upstream may be silent a proxy has to bear it
REFUSED = {
    "session_required": "refusal&status=401",
    "not_found": "refusal&status=404",
    "rate_limited": "refusal&status=429",
    "upstream_error": "refusal&status=502",
    "busy": "refusal&status=503",
}
COMPRESSIONS = "gzip, deflate, br, zstd"  # as browsers send it


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures beside the findings; None for what was not observed. Milliseconds, days, seconds."""

    http: str | None = None
    certificate_days: int | None = None
    event_delay_ms: float | None = None
    leaving_ms: float | None = None
    clock_skew_seconds: float | None = None
    silence_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """The first contact: the connection, and the first two reports (see Observed)."""

    url: str
    now: float
    ours: tuple[str, int] | None
    certificate: Certificate | None
    offers_h2: bool | None
    plain: Answer
    first: Answer


def longest_silence(settings: Settings) -> float:
    """Seconds for which a working answer may be silent, and a little more: what --slow tries."""
    upstream, comment = settings.upstream, settings.server.comment_seconds
    idle = min(upstream.idle_timeout, comment or upstream.idle_timeout)
    return min(LONGEST_SILENCE, SILENCE_OVER_TIMEOUT * max(upstream.first_byte_timeout, idle))


def examine(
    settings: Settings,
    url: str,
    *,
    ca_file: str | None = None,
    slow: bool = False,
    wall: Callable[[], float] = time.time,
) -> tuple[list[Finding], Measured]:
    """Looks at `url` (an origin) from outside. The settings are the server's own, with its session.secret."""
    assert settings.session.secret is not None
    tickets = Tickets(settings.session.secret.lines())
    if url.startswith("http://") and not is_loopback(urlsplit(url).hostname or ""):
        return [findings.unprotected(url)], Measured()
    context = system_ssl_context(ca_file)
    try:
        certificate, offers_h2 = greet(url, context)
    except ssl.SSLCertVerificationError as error:
        return [findings.untrusted(url, error.verify_code, error.verify_message)], Measured()
    except (OSError, UnicodeError) as error:  # the latter for a name that no DNS can hold
        reason = error.strerror if isinstance(error, OSError) else None
        return [findings.unreachable(url, reason or str(error))], Measured()
    with Browser(url, context, lambda: tickets.issue(wall())) as browser:
        first = browser.look("echo")
        before = wall()
        plain, ours = browser.chat_from("echo")
        now = (before + wall()) / 2
        for path, answer in ((LOOK, first), (CHAT[0], plain)):
            if obstacle := findings.obstacle(url, path, answer, now, date_of(answer)):
                return [obstacle], Measured()
        connection = Connection(url, now, ours, certificate, offers_h2, plain, first)
        seen = Prober(browser, settings, slow=slow).beyond(connection)
    return judgements.judge(seen), measured(seen)


def greet(url: str, context: ssl.SSLContext) -> tuple[Certificate | None, bool | None]:
    """The certificate, and whether HTTP/2 is offered; None for both without TLS. Raises OSError."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    address = (host, parts.port or USUAL_PORTS[parts.scheme])
    with socket.create_connection(address, DEADLINE) as raw:
        if parts.scheme == "http":
            return None, None
        context.set_alpn_protocols(["h2", "http/1.1"])
        with context.wrap_socket(raw, server_hostname=host) as tls:
            shown: Any = tls.getpeercert()
            not_before, not_after = (ssl.cert_time_to_seconds(shown[name]) for name in ("notBefore", "notAfter"))
            return Certificate(not_before, not_after), tls.selected_alpn_protocol() == "h2"


def date_of(answer: Answer) -> float | None:
    try:
        return parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None


class Browser:
    """One client of the public address: no proxy of the environment, no redirects, no memory for cookies."""

    def __init__(self, url: str, context: ssl.SSLContext, ticket: Callable[[], str]) -> None:
        self.url = url
        self.ticket = ticket
        self.client = httpx.Client(base_url=url, verify=context, trust_env=False, timeout=DEADLINE)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    def headers(self, more: dict[str, str]) -> dict[str, str]:
        ours = {"origin": self.url, "sec-fetch-site": "same-origin", "accept-encoding": "identity"}
        return {**ours, "user-agent": "chat-proxy check", **more}

    def look(self, what: str) -> Answer:
        """Something to be shown, beside the chat."""
        return self.ask(f"{LOOK}?check={what}", headers={HEADER: self.ticket()})

    def chat(self, what: str, content: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        """The same at the chat's own address, by a request such as a chat's."""
        return self.ask(f"{CHAT[0]}?check={what}", "POST", content, {**self.chat_headers(), **(headers or {})})

    def chat_headers(self) -> dict[str, str]:
        return {HEADER: self.ticket(), "content-type": "application/json"}

    def ask(
        self, path: str, method: str = "GET", content: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        try:
            response = self.client.request(method, path, content=content, headers=self.headers(headers or {}))
        except httpx.RequestError as error:
            return broken(error)
        finally:
            self.client.cookies.clear()
        return answered(response, response.content)

    def chat_from(self, what: str) -> tuple[Answer, tuple[str, int] | None]:
        """The same, with the near end of the socket that was used."""
        try:
            with closing(self.begin(f"{CHAT[0]}?check={what}", DEADLINE, "identity")) as response:
                near = response.extensions["network_stream"].get_extra_info("client_addr")
                return answered(response, response.read()), (near[0], near[1]) if near else None
        except httpx.RequestError as error:
            return broken(error), None

    def stream(self, path: str, name: str, events: int, spacing: float, patience: float) -> httpx.Response:
        """The head of a stream. Raises httpx.RequestError."""
        query = f"check=stream&name={name}&events={events}&spacing={spacing}"
        return self.begin(f"{path}?{query}", patience, COMPRESSIONS)

    def begin(self, path: str, patience: float, accepted: str) -> httpx.Response:
        headers = self.headers({**self.chat_headers(), "accept-encoding": accepted})
        timeout = httpx.Timeout(DEADLINE, read=patience)
        request = self.client.build_request("POST", path, content=b"", headers=headers, timeout=timeout)
        return self.client.send(request, stream=True)


def broken(error: httpx.RequestError) -> Answer:
    return Answer(0, broke=f"{type(error).__name__}: {error}")


def answered(response: httpx.Response, body: bytes) -> Answer:
    cookies = tuple(response.headers.get_list("set-cookie"))
    return Answer(response.status_code, dict(response.headers), cookies, body)


class Event(msgspec.Struct):
    """One event of a diagnostic stream."""

    number: int
    at: float
    report: Report | None


decode_event = msgspec.json.Decoder(Event).decode
decode_departure = msgspec.json.Decoder(Departure).decode


class Prober:
    """Makes all observations of one run, in turn."""

    def __init__(self, browser: Browser, settings: Settings, *, slow: bool) -> None:
        self.browser = browser
        self.longest_answer = settings.upstream.total_timeout
        self.user_header = settings.header.name
        self.body_bytes = min(MOST_BODY, settings.server.max_body_bytes)
        self.silence_seconds = longest_silence(settings) if slow else 0.0

    def beyond(self, connection: Connection) -> Observed:
        chat, ask = self.browser.chat, self.browser.ask
        with_cookie = chat("echo&cookie=1")
        cookie = "; ".join(cookie.partition(";")[0] for cookie in with_cookie.cookies)
        return Observed(
            url=connection.url,
            now=connection.now,
            ours=connection.ours,
            certificate=connection.certificate,
            offers_h2=connection.offers_h2,
            plain=connection.plain,
            twice=(connection.first, self.browser.look("echo")),
            spoofed=chat("echo", headers={"x-forwarded-for": SPOOF, self.user_header: FOREIGN_USER}),
            with_cookie=with_cookie,
            returned=chat("echo", headers={"cookie": cookie or "none=none"}),
            session=ask("/api/session"),
            foreign=ask("/api/session", "DELETE", headers={"origin": FOREIGN, "sec-fetch-site": "cross-site"}),
            page=ask("/"),
            whole_body=chat("echo", b"0" * self.body_bytes),
            body_bytes=self.body_bytes,
            refusals={code: chat(what) for code, what in REFUSED.items()},
            streams=self.rhythms(),
            left=self.leave(),
            longest_answer=self.longest_answer,
            silence=self.silence(),
            silence_seconds=self.silence_seconds,
        )

    def rhythms(self) -> dict[str, Streamed]:
        """At each address of chats, since each may have rules of its own in front."""
        with ThreadPoolExecutor(len(CHAT)) as threads:
            return dict(zip(CHAT, threads.map(self.rhythm, CHAT), strict=True))

    def rhythm(self, path: str) -> Streamed:
        """A stream that came in lumps is looked at once more, slower: this machine may have stood still."""
        stream = self.stream(path, EVENTS, SPACING, DEADLINE)
        return self.stream(path, EVENTS, 2 * SPACING, DEADLINE) if judgements.is_lumped(stream) else stream

    def silence(self) -> Streamed | None:
        seconds = self.silence_seconds
        return self.stream(CHAT[0], 2, seconds, seconds + DEADLINE) if seconds else None

    def stream(self, path: str, events: int, spacing: float, patience: float) -> Streamed:
        """A stream from its first to its last byte, and when each of its events came."""
        began, sent, arrived, report, ended = time.monotonic(), [], [], None, False
        answer = Answer(0)
        try:
            with closing(self.browser.stream(path, secrets.token_hex(16), events, spacing, patience)) as response:
                answer = answered(response, b"")
                for data in data_of(response):
                    if ended := data == b"[DONE]":
                        break
                    event = decode_event(data)
                    arrived.append(time.monotonic())
                    sent.append(event.at)
                    report = event.report or report
        except httpx.RequestError as error:
            answer = answer if answer.status else broken(error)
        except msgspec.MsgspecError:
            pass  # not what was sent: what came until then is judged
        return Streamed(answer, report, tuple(sent), tuple(arrived), ended, time.monotonic() - began)

    def leave(self) -> AbortResult:
        """Abandons a stream that has begun and is silent, like a user who closes the tab while a model thinks."""
        for _ in range(LEAVING_TRIES):
            name = secrets.token_hex(16)
            stayed, gone = self.begin_and_leave(name), time.monotonic()
            if stayed is None or (ended := self.departure(name)) is None:
                break
            if ended.state == "left":
                return AbortResult("left", max(0.0, ended.at - stayed))
            if ended.state != "unknown":
                return AbortResult(ended.state, time.monotonic() - gone)
        return AbortResult("unknown", 0)

    def begin_and_leave(self, name: str) -> float | None:
        """Seconds from the stream's beginning to leaving it, as far as can be seen from here; None if it was refused.

        Where its head or its first event is held back that is found elsewhere; leaving it still has to be seen.
        """
        began = time.monotonic()
        try:
            with closing(self.browser.stream(CHAT[0], name, 2, LEFT_SILENT, LEAVING_PATIENCE)) as response:
                if response.status_code != 200:
                    return None
                for data in data_of(response):
                    return decode_event(data).at  # and with that it is left
        except (httpx.RequestError, msgspec.MsgspecError):
            pass
        return time.monotonic() - began

    def departure(self, name: str) -> Departure | None:
        """How the stream ended, as soon as it has; None without an answer."""
        until = time.monotonic() + LEAVING_PATIENCE
        known: set[Departure] = set()
        with ThreadPoolExecutor(ASKERS) as threads:
            while time.monotonic() < until and not any(one.state in ("left", "complete") for one in known):
                answers = [one for one in threads.map(self.ask_departure, [name] * ASKERS) if one is not None]
                if not answers:
                    break
                known.update(answers)
        return max(known, key=lambda one: STATES.index(one.state), default=None)

    def ask_departure(self, name: str) -> Departure | None:
        try:
            return decode_departure(self.browser.look(f"departure&name={name}").body)
        except msgspec.MsgspecError:
            return None


def data_of(response: httpx.Response) -> Iterator[bytes]:
    """The data of each event, as it comes. Nothing of a stream that is refused or compressed."""
    if response.status_code != 200 or response.headers.get("content-encoding", "identity") != "identity":
        return
    rest = b""
    for part in response.iter_raw():
        *events, rest = (rest + part).split(b"\n\n")
        yield from (event.removeprefix(b"data: ") for event in events)


def measured(seen: Observed) -> Measured:
    report, certificate = seen.plain.report, seen.certificate
    delays = [max(late) - min(late) for late in map(lateness, seen.streams.values()) if late]
    return Measured(
        http={True: "2", False: "1.1", None: None}[seen.offers_h2],
        certificate_days=int((certificate.not_after - seen.now) / 86400) if certificate else None,
        event_delay_ms=round(max(delays) * 1000, 1) if delays else None,
        leaving_ms=round(seen.left.seconds * 1000, 1) if seen.left.state == "left" else None,
        clock_skew_seconds=round(report.now - seen.now, 1) if report else None,
        silence_seconds=seen.silence_seconds or None,
    )


def lateness(stream: Streamed) -> list[float]:
    """Seconds from each event's sending to its coming, and some that are the same for all: the clocks' difference."""
    return [arrived - sent for arrived, sent in zip(stream.arrived, stream.sent, strict=True)]
