"""What is judged from what was seen, where no nginx of one machine can stage it: distances, clocks, odd answers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from proxy.check import findings
from proxy.check.findings import Finding, obstacle
from proxy.check.judgements import judge
from proxy.check.report import CHAT, LOOK, SPOOF, AbortResult, Answer, Certificate, Observed, Report, Streamed

URL = "https://chat.example.org"
NOW = 1_800_000_000.0
DAY = 86400
HEADERS = [
    ("content-type", "application/json"),
    ("x-request-id", "r-1"),
    ("strict-transport-security", "max-age=31536000; includeSubDomains"),
    ("cache-control", "no-store, no-transform"),
    ("content-security-policy", "default-src 'none'"),
]
COOKIE = "__Host-chat-check=looked; Path=/; Max-Age=60; HttpOnly; SameSite=Strict; Secure"
TIMES = (0.0, 0.1, 0.2, 0.3, 0.4)
REFUSALS = ("session_required", "not_found", "rate_limited", "upstream_error", "busy")

REPORT = Report(
    server="s",
    now=NOW,
    peer=("10.0.0.2", 40000),
    address="198.51.100.7",
    through_proxy=True,
    forwarded="198.51.100.7",
    host="chat.example.org",
    origin=URL,
    fetch_site="same-origin",
    connection=None,
    version="1.1",
    scheme="http",
    cookies=[],
    names_user=False,
    body=0,
    public_url=URL,
    origins=[URL],
    sent=HEADERS,
)


def answer(report: Report | None = REPORT, status: int = 200, **more: Any) -> Answer:
    """An answer that arrived as it was sent."""
    sent = report.sent if report else HEADERS
    headers = {name: value for name, value in sent if name != "set-cookie"}
    cookies = tuple(report.cookies_sent) if report else ()
    return Answer(status, **{"headers": headers, "cookies": cookies, "body": msgspec.json.encode(report), **more})


def report(**changes: Any) -> Report:
    return msgspec.structs.replace(REPORT, **changes)


def refusal(code: str, status: int = 400) -> Answer:
    return Answer(status, {"content-type": "application/json"}, body=json.dumps({"error": {"code": code}}).encode())


STREAM = Streamed(answer(), REPORT, TIMES, tuple(1000 + at for at in TIMES), ended=True, lasted=0.4)
CLEAN = Observed(
    url=URL,
    now=NOW,
    ours=("192.168.1.5", 50000),
    certificate=Certificate(NOW - 10 * DAY, NOW + 80 * DAY),
    offers_h2=True,
    plain=answer(),
    twice=(answer(report(sent=[*HEADERS[:1], ("x-request-id", "r-2")])), answer(report())),
    spoofed=answer(),
    with_cookie=answer(report(sent=[*HEADERS, ("set-cookie", COOKIE)])),
    returned=answer(report(cookies=["__Host-chat-check"])),
    session=Answer(200, cookies=(COOKIE.replace("__Host-chat-check=looked", "__Host-chat=x"),)),
    foreign=refusal("cross_origin", 403),
    page=Answer(200, {"content-security-policy": "default-src 'none'"}),
    whole_body=answer(report(body=1 << 20)),
    body_bytes=1 << 20,
    refusals={code: refusal(code) for code in REFUSALS},
    streams=dict.fromkeys(CHAT, STREAM),
    left=AbortResult("left", 0.003),
    longest_answer=600.0,
)


def seen(**changes: Any) -> list[Finding]:
    return judge(replace(CLEAN, **changes))


def codes(**changes: Any) -> list[str]:
    return [finding.code for finding in seen(**changes)]


def stream(**changes: Any) -> dict[str, Streamed]:
    return {**CLEAN.streams, CHAT[0]: replace(STREAM, **changes)}


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in HEADERS if key != name}


def test_nothing_wrong() -> None:
    assert seen() == []


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # addresses
    "a visitor's own address among others, not believed": (
        {"spoofed": answer(report(forwarded=f"{SPOOF}, 198.51.100.7"))},
        ["forwarded_appended"],
    ),
    "a visitor's own address believed": (
        {"spoofed": answer(report(forwarded=f"{SPOOF}, 10.0.0.2", address=SPOOF))},
        ["forwarded_spoofed"],
    ),
    "a socket's peer that is not trusted": (
        {"plain": answer(report(peer=None, through_proxy=False))},
        ["untrusted_proxy"],
    ),
    "the spoofed echo did not arrive": ({"spoofed": Answer(0, broke="ReadTimeout")}, []),
    "users named by a visitor": ({"spoofed": answer(report(names_user=True))}, ["user_spoofed"]),
    # nothing in between
    "the same socket at both ends": (
        {"ours": ("10.0.0.2", 40000), "plain": answer(report(forwarded=None, connection="close"))},
        [],
    ),
    # names
    "a Host in other letters, with the usual port": ({"plain": answer(report(host="Chat.Example.org:443"))}, []),
    "no Host": ({"plain": answer(report(host=None))}, ["host"]),
    "a Host with another port": ({"plain": answer(report(host="chat.example.org:8443"))}, ["host"]),
    "another public_url": (
        {"plain": answer(report(public_url="https://a.b", origins=["https://a.b"]))},
        ["public_url"],
    ),
    "our page refused because of the Host": (
        {"plain": answer(report(host="chat")), "session": refusal("cross_origin", 403)},
        ["host"],
    ),
    "our page refused for another reason": ({"session": refusal("cross_origin", 403)}, ["own_page"]),
    "our page told to wait": ({"session": refusal("too_many_sessions", 429)}, []),
    "a foreign page not refused": ({"foreign": Answer(200)}, ["foreign_origin"]),
    "a foreign page told to wait": ({"foreign": refusal("rate_limited", 429)}, []),
    "an Origin that was made up": ({"plain": answer(report(origin="https://a.b"))}, ["origin_altered"]),
    # time
    "a clock behind": ({"plain": answer(report(now=NOW - 31))}, ["clock"]),
    "a slow network": ({"plain": answer(report(now=NOW + 9))}, []),
    "a certificate of a few days, renewed daily": ({"certificate": Certificate(NOW - 4 * DAY, NOW + 2 * DAY)}, []),
    "a certificate of a few days, not renewed": (
        {"certificate": Certificate(NOW - 5 * DAY, NOW + 0.9 * DAY)},
        ["certificate_soon"],
    ),
    "a certificate of years": ({"certificate": Certificate(NOW - 1000 * DAY, NOW + 15 * DAY)}, []),
    "a certificate of years, at its end": (
        {"certificate": Certificate(NOW - 1000 * DAY, NOW + 13 * DAY)},
        ["certificate_soon"],
    ),
    "no TLS": ({"certificate": None, "offers_h2": None}, []),
    # headers
    "a page without CSP": ({"page": Answer(200, {})}, ["csp"]),
    "no page": ({"page": refusal("not_found", 404)}, []),
    "a second CSP beside ours": (
        {"plain": answer(headers={**dict(HEADERS), "content-security-policy": "default-src 'none', img-src 'self'"})},
        [],
    ),
    "another CSP": (
        {"plain": answer(headers={**dict(HEADERS), "content-security-policy": "default-src *"})},
        ["csp"],
    ),
    "a second Cache-Control": (
        {"plain": answer(headers={**dict(HEADERS), "cache-control": "no-store, no-transform, max-age=60"})},
        ["cache_control"],
    ),
    "the first of two HSTS is short": (
        {"plain": answer(headers={**dict(HEADERS), "strict-transport-security": "max-age=0, max-age=31536000"})},
        ["hsts"],
    ),
    "HSTS in quotes": (
        {"plain": answer(headers={**dict(HEADERS), "strict-transport-security": 'preload; Max-Age="31536000"'})},
        [],
    ),
    "HSTS without sense": (
        {"plain": answer(headers={**dict(HEADERS), "strict-transport-security": "max-age=forever"})},
        ["hsts"],
    ),
    "lost of a stream alone": (
        {"streams": stream(answer=answer(headers=without("cache-control")))},
        ["cache_control"],
    ),
    # cookies
    "a Domain": (
        {"with_cookie": answer(CLEAN.with_cookie.report, cookies=(f"{COOKIE}; Domain=a.b",))},
        ["cookie_flags"],
    ),
    "the session's own cookie": (
        {"session": Answer(200, cookies=("__Host-chat=x; Path=/; Secure",))},
        ["cookie_flags"],
    ),
    "a cookie that the proxy sets for itself": ({"session": Answer(200, cookies=("lb=1",))}, []),
    "a cookie that was not given": ({"with_cookie": Answer(0, broke="ReadTimeout")}, []),
    # streams
    "cut": ({"streams": stream(ended=False)}, ["stream_cut"]),
    "none": (
        {"streams": stream(report=None, answer=refusal("busy", 503)), "left": AbortResult("unknown", 0)},
        ["no_stream"],
    ),
    "brotli": ({"streams": stream(answer=answer(headers={**dict(HEADERS), "content-encoding": "br"}))}, ["compressed"]),
    "two lumps": ({"streams": stream(arrived=(5.0, 5.0, 5.0, 5.1, 5.1))}, ["buffered"]),
    "a late first event": ({"streams": stream(arrived=(5.15, 5.15, 5.2, 5.3, 5.4))}, []),
    "both in lumps": ({"streams": dict.fromkeys(CHAT, replace(STREAM, arrived=(5.0,) * 5))}, ["buffered"]),
    "a silence that was cut": (
        {"silence": replace(STREAM, ended=False, lasted=60.0), "silence_seconds": 75.0},
        ["read_timeout"],
    ),
    "a silence that was borne": ({"silence": STREAM, "silence_seconds": 75.0}, []),
    # leaving
    "not noticed": ({"left": AbortResult("open", 2.0)}, ["leaving"]),
    "noticed when it was over": ({"left": AbortResult("complete", 2.0)}, ["leaving"]),
    "on another server": ({"left": AbortResult("unknown", 2.0)}, ["leaving_unseen"]),
    # bodies
    "refused in words of the proxy": ({"whole_body": Answer(413, {"content-type": "text/html"})}, ["body_limit"]),
    "refused in our words": ({"whole_body": refusal("body_too_large", 413)}, ["body_limit"]),
    "cut on the way": ({"whole_body": Answer(0, broke="WriteError")}, ["body_limit"]),
    "no room just then": ({"whole_body": refusal("busy", 503)}, []),
    # errors
    "an error of another code": ({"refusals": {"busy": refusal("upstream_error", 502)}}, ["errors_replaced"]),
    "an error that is JSON of somebody else": (
        {"refusals": {"busy": Answer(503, body=b'{"error": "busy"}')}},
        ["errors_replaced"],
    ),
    "an error that is a list": ({"refusals": {"busy": Answer(503, body=b"[]")}}, ["errors_replaced"]),
    # caches
    "the same answer twice": ({"twice": (answer(), answer()), "left": AbortResult("open", 2.0)}, ["cached"]),
}


@pytest.mark.parametrize("label", CASES)
def test_judgement(label: str) -> None:
    """Each case has these findings and no others; each of them says what, why, and what to change."""
    changes, expected = CASES[label]
    found = seen(**changes)
    assert [finding.code for finding in found] == expected, found
    assert all(finding.what and finding.why and finding.change for finding in found)


def test_both_addresses_are_one_finding() -> None:
    """What is wrong at both of the chat's addresses is told once, and names them."""
    (both,) = seen(streams=dict.fromkeys(CHAT, replace(STREAM, ended=False)))
    assert both.what.startswith("/api/chat and /api/v1/chat/completions: ")
    (one,) = seen(streams=stream(ended=False))
    assert one.what.startswith("/api/chat: ")


HTML = {"content-type": "text/html"}
OBSTACLES: dict[str, tuple[str, Answer, float | None, str | None]] = {
    "none": (LOOK, answer(), None, None),
    "no answer": (LOOK, Answer(0, broke="ReadTimeout: "), None, "unreachable"),
    "a redirect": (LOOK, Answer(301, {"location": "https://www.example.org/x"}), None, "redirect"),
    "a redirect to nowhere": (LOOK, Answer(302), None, "redirect"),
    "our 404": (LOOK, refusal("not_found", 404), NOW + 3, "ticket"),
    "our 404, an hour ahead": (LOOK, refusal("not_found", 404), NOW + 3600, "clock"),
    "our 404 at the chat's address": (CHAT[0], refusal("not_found", 404), NOW, "refused"),
    "their 404": (LOOK, Answer(404, HTML), None, "not_routed"),
    "their page": (CHAT[0], Answer(200, HTML), None, "not_routed"),
    "their 401": (LOOK, Answer(401, HTML), None, "login"),
    "their 502": (LOOK, Answer(502, HTML), None, "proxy_pass"),
    "their 502 in our shape": (LOOK, refusal("server_unreachable", 502), None, "proxy_pass"),
    "too many": (LOOK, refusal("rate_limited", 429), None, "refused"),
    "draining": (LOOK, refusal("draining", 503), None, "refused"),
}


@pytest.mark.parametrize("label", OBSTACLES)
def test_what_keeps_from_seeing(label: str) -> None:
    """What stands between check and its first report is one finding, or none."""
    path, first, clock_there, code = OBSTACLES[label]
    found = obstacle(URL, path, first, NOW, clock_there)
    assert (found.code if found else None) == code


@pytest.mark.parametrize(
    ("number", "code"),
    [(9, "not_yet_valid"), (10, "expired"), (18, "untrusted"), (20, "untrusted"), (62, "name"), (64, "name")],
)
def test_certificates(number: int, code: str) -> None:
    """OpenSSL's verdicts in words, with what to do."""
    found = findings.untrusted(URL, number, "unable to get local issuer certificate")
    assert found.code == f"certificate_{code}"
    assert found.change


def test_hint_for_a_host_without_a_port() -> None:
    """$host has no port, so it will do where the usual one is used, and only there."""
    (usual,) = seen(plain=answer(report(host="chat")))
    assert usual.change == "nginx: proxy_set_header Host $host;"
    odd = "https://chat.example.org:8443"
    (other,) = seen(url=odd, plain=answer(report(host="chat.example.org", origin=odd, origins=[odd])))
    assert other.change == "nginx: proxy_set_header Host $http_host;"
