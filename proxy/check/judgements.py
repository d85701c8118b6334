"""What each observation of a run means: one function a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from proxy.check.findings import MOST_SKEW, Finding, fault, skewed, warning
from proxy.check.report import CHAT, SPOOF, Answer, Observed, Report, Streamed
from proxy.settings import hosts_of

LUMPED = 0.5  # of the time over which events were sent: when they arrive within less, they were held back
LEAST_SPREAD = 0.2  # seconds of sending, below which an observer's own scheduling is taken for a lump
LEAST_HSTS = 180 * 86400  # seconds
SOON = 14 * 86400  # seconds a certificate should still have; or a sixth of its life, when that is less
SESSION_COOKIES = ("__Host-chat", "chat")


# ---- the judges -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence for a judgement: all observations, and the first report."""

    seen: Observed
    report: Report

    @property
    def is_direct(self) -> bool:
        """There is nothing in between: the socket here is the socket there."""
        far = self.report.peer
        if self.seen.ours is not None and far is not None and self.seen.ours == tuple(far):
            return True
        plain = self.seen.url.startswith("http://")  # the server has no TLS: with https there is a proxy
        return plain and not self.report.through_proxy and self.report.forwarded is None

    @property
    def is_named_right(self) -> bool:
        """Host and public_url are what people type; without that our own page is foreign to the server."""
        return same_host(self.report.host, self.seen.url) and self.seen.url in self.report.origins

    @property
    def is_cached(self) -> bool:
        one, other = (answer.report for answer in self.seen.twice)
        return one is not None and other is not None and one.request_id == other.request_id

    @property
    def is_https(self) -> bool:
        return self.report.public_url.startswith("https://")


Judge = Callable[[Evidence], Iterator[Finding]]


def about_names(case: Evidence) -> Iterator[Finding]:
    url, report = case.seen.url, case.report
    if not same_host(report.host, url):
        variable = "$host" if urlsplit(url).port is None else "$http_host"
        what = f"Host arrives as {report.host}, and people typed {urlsplit(url).netloc}"
        why = "every request for /api/ is refused: 403 cross_origin"
        yield fault("host", what, why, f"nginx: proxy_set_header Host {variable};")
    if url not in report.origins:
        what = f"people come to {url}, and the server takes itself for {report.public_url}"
        why = "its own page is refused as a foreign one; cookies and HSTS follow public_url, too"
        yield fault("public_url", what, why, f'server.public_url = "{url}"; or list it in server.extra_origins')


def same_host(host: str | None, url: str) -> bool:
    return (host or "").lower() in hosts_of(url)


def about_the_certificate(case: Evidence) -> Iterator[Finding]:
    certificate = case.seen.certificate
    if certificate is None:
        return
    left = certificate.not_after - case.seen.now
    if left < min(SOON, (certificate.not_after - certificate.not_before) / 6):
        what = f"the certificate expires in {left / 86400:.1f} days"
        yield warning(
            "certificate_soon", what, "its renewal should have happened by now", "certbot renew; nginx -s reload"
        )


def about_http(case: Evidence) -> Iterator[Finding]:
    report = case.report
    if case.seen.offers_h2 is False:
        what, why = "HTTP/2 is not offered", "a browser has six connections for all its tabs, and each answer takes one"
        yield warning("no_h2", what, why, "nginx: listen 443 ssl http2; (from 1.25.1 on: http2 on;)")
    if case.is_direct:
        return
    both = 'nginx: proxy_http_version 1.1; proxy_set_header Connection "";'
    if report.version == "1.0":
        what, why = "requests arrive as HTTP/1.0", "an answer that broke off ends like one that is whole"
        yield fault("http10", what, why, both)
    elif (report.connection or "").lower() == "close":
        what, why = "each request comes on a connection of its own", "it costs time and sockets"
        yield warning("no_keepalive", what, why, f"{both} upstream chat {{ ...; keepalive 32; }}")


def about_addresses(case: Evidence) -> Iterator[Finding]:
    """The client's address: with a wrong one all visitors share one limit, or a visitor can choose an address."""
    report, spoofed = case.report, case.seen.spoofed.report
    if case.is_direct:
        return
    replace = "nginx: proxy_set_header X-Forwarded-For $remote_addr;"
    passed = spoofed is not None and SPOOF in (spoofed.forwarded or "")
    if not report.through_proxy:
        peer = report.peer[0] if report.peer else "unix"
        what, why = f"the proxy at {peer} is not trusted", "all visitors count as one, and share one visitor's limits"
        yield fault("untrusted_proxy", what, why, f'server.trusted_proxies = ["{peer}"]')
    elif report.forwarded is None:
        what, why = "X-Forwarded-For does not arrive", "all visitors count as one, and share one visitor's limits"
        if passed:
            why += "; and an address that a visitor sends is accepted, so limits can be evaded"
        yield fault("forwarded_missing", what, why, replace)
    elif spoofed is not None and spoofed.address == SPOOF:
        what = "a visitor's own X-Forwarded-For is believed"
        why = "a visitor that invents addresses has no limit, and the addresses in the log are false"
        yield fault(
            "forwarded_spoofed", what, why, f"{replace} (replaced, not $proxy_add_x_forwarded_for, which appends)"
        )
    elif passed:
        what, why = "a visitor's own X-Forwarded-For is passed on, and not believed", "only trusted_proxies prevents it"
        yield warning("forwarded_appended", what, why, f"{replace} unless another proxy stands before this one")


def about_users(case: Evidence) -> Iterator[Finding]:
    spoofed = case.seen.spoofed.report
    if spoofed is not None and spoofed.names_user and not case.is_direct:
        what, why = "a visitor's own header that names the user arrives", "any visitor can be any user"
        yield fault("user_spoofed", what, why, "nginx: proxy_set_header with the login's own value, for header.name")


def about_origins(case: Evidence) -> Iterator[Finding]:
    seen, report = case.seen, case.report
    if report.origin != seen.url or report.fetch_site != "same-origin":
        lost = "Origin" if report.origin != seen.url else "Sec-Fetch-Site"
        what, why = (
            f"{lost} does not arrive as the browser sent it",
            "pages of other sites cannot be distinguished from the server's own",
        )
        yield fault("origin_altered", what, why, f"nginx: no proxy_set_header {lost}")
    elif not case.is_named_right:
        return  # then the server's own page is refused as well, for a reason that is already reported
    elif seen.foreign.status < 400:
        what = f"a foreign page's request is not refused ({seen.foreign.shown})"
        yield fault("foreign_origin", what, "any page can act as its visitor", "nginx: no proxy_set_header Origin")
    elif seen.session.status == 403:
        what, why = f"our own page is refused: {seen.session.code or seen.session.shown}", "there is no chat"
        yield fault("own_page", what, why, "the log's line of this request has the reason")


def about_cookies(case: Evidence) -> Iterator[Finding]:
    seen, sent = case.seen, seen_sent(case.seen.with_cookie)
    arrived = seen.with_cookie.cookies
    own = [cookie for cookie in seen.session.cookies if name_of(cookie) in SESSION_COOKIES]
    names = {name_of(cookie) for cookie in sent}
    if not names <= {name_of(cookie) for cookie in arrived}:
        what, why = "Set-Cookie does not arrive", "no visitor can have a session"
        yield fault("cookie_lost", what, why, "nginx: no proxy_hide_header Set-Cookie, no proxy_ignore_headers")
        return
    wrong = {flag: None for cookie in (*arrived, *own) for flag in wrong_flags(cookie, is_https=case.is_https)}
    if wrong:
        what = f"the session's cookie arrives with other attributes: {', '.join(wrong)}"
        why = "scripts, foreign pages or plain http can get at it; without Secure and Path=/ browsers drop it (__Host-)"
        change = "nginx: no proxy_cookie_flags, proxy_cookie_path or proxy_cookie_domain for it"
        yield fault("cookie_flags", what, why, change)
    returned = seen.returned.report
    if returned is not None and not names <= set(returned.cookies):
        what, why = "the browser's cookie does not come back to the server", "no visitor can have a session"
        yield fault("cookie_unreturned", what, why, "nginx: no proxy_set_header Cookie")


def seen_sent(answer: Answer) -> list[str]:
    return answer.report.cookies_sent if answer.report is not None else []


def name_of(cookie: str) -> str:
    return cookie.partition("=")[0].strip()


def wrong_flags(cookie: str, *, is_https: bool) -> list[str]:
    """How a cookie's attributes differ from those that our own have; its age is its own business."""
    parts = [part.strip().partition("=") for part in cookie.split(";")[1:]]
    found = {name.lower(): value for name, _, value in parts}
    wanted = {"path": "/", "httponly": "", "samesite": "Strict", **({"secure": ""} if is_https else {})}
    names = {"path": "Path", "httponly": "HttpOnly", "samesite": "SameSite", "secure": "Secure", "domain": "Domain"}
    wrong = [f"no {names[name]}" for name in wanted if name not in found]
    wrong += [f"{names[name]}={found[name]}" for name in wanted if name in found and found[name] != wanted[name]]
    return wrong + [names[name] for name in ("domain",) if name in found]


def about_headers(case: Evidence) -> Iterator[Finding]:
    """Compares the headers that arrived with those that were sent, of an answer and of a stream."""
    streams = ((stream.report, stream.answer) for stream in case.seen.streams.values())
    answers = ((case.report, case.seen.plain), *streams)
    changed = {
        name: answer.headers.get(name)
        for report, answer in answers
        if report is not None
        for name, value in report.sent
        if name not in NOT_COMPARED and not is_kept(name, value, answer.headers.get(name))
    }
    page = case.seen.page
    if page.status == 200 and "content-security-policy" not in page.headers:
        changed.setdefault("content-security-policy", None)
    for name, arrived in changed.items():
        became = "is lost" if arrived is None else f"arrives as {arrived[:80]!r}"
        code, why = HEADERS.get(name, ("header_lost", "pages and tools rely on it"))
        change = f"nginx: no proxy_hide_header, add_header or expires that touches {name}"
        yield fault(code, f"{name} {became}", why, change)


HEADERS = {
    "strict-transport-security": ("hsts", "an attacker on the network can keep a visitor on plain http"),
    "content-security-policy": ("csp", "what gets into the page as text could run as script"),
    "cache-control": ("cache_control", "caches may keep what belongs to one visitor, or hold back a stream"),
    "x-request-id": ("request_id", "a visitor's complaint cannot be found in the log"),
}
NOT_COMPARED = {
    "set-cookie",  # looked at by themselves
    "x-accel-buffering",  # nginx obeys it, and keeps it
}


def is_kept(name: str, sent: str, arrived: str | None) -> bool:
    """Proxies may add to a header, except to cache-control, where each addition can undo ours."""
    if arrived is None:
        return False
    if name == "strict-transport-security":
        return longest_hsts(arrived) >= LEAST_HSTS
    return sent == arrived if name == "cache-control" else sent in arrived


def longest_hsts(written: str) -> int:
    """max-age of the first one, which is the one that browsers take (RFC 6797 section 8.1)."""
    for part in written.split(",")[0].split(";"):
        name, _, value = part.strip().partition("=")
        if name.lower() == "max-age" and value.strip('"').isdigit():
            return int(value.strip('"'))
    return 0


def about_caches(case: Evidence) -> Iterator[Finding]:
    if case.is_cached:
        what, why = "the same answer came twice: a cache gave it", "one visitor gets what belongs to another"
        yield fault("cached", what, why, "nginx: proxy_cache off; (and no proxy_ignore_headers Cache-Control)")


def about_streams(case: Evidence) -> Iterator[Finding]:
    """Judges the stream of each chat route; the same fault at both is one finding."""
    wrong: dict[str, tuple[Finding, list[str]]] = {}
    for path, stream in case.seen.streams.items():
        if (finding := about_stream(stream)) is not None:
            wrong.setdefault(finding.code, (finding, []))[1].append(path)
    for finding, paths in wrong.values():
        yield replace(finding, what=f"{' and '.join(paths)}: {finding.what}")


def about_stream(stream: Streamed) -> Finding | None:
    encoding = stream.answer.headers.get("content-encoding", "identity")
    if encoding != "identity":
        what, why = f"streams are compressed ({encoding})", "the compressor holds tokens back until it has enough"
        return fault("compressed", what, why, "nginx: gzip off; (brotli off; zstd off;)")
    if stream.report is None:
        what, why = f"a stream does not arrive ({stream.answer.shown})", "there are no answers"
        return fault("no_stream", what, why, "nginx: location / { proxy_pass http://chat; } for all of /api/")
    if is_lumped(stream):
        sent, arrived = spread(stream.sent), spread(stream.arrived)
        what = f"events arrive in lumps: sent over {sent:.1f} s, they arrived within {arrived:.1f} s"
        why = "visitors see nothing for long, and then everything at once"
        change = "nginx: proxy_buffering off; (and no proxy_ignore_headers X-Accel-Buffering)"
        return fault("buffered", what, why, change)
    if not stream.ended:
        what, why = f"a stream is cut after {stream.lasted:.1f} s", "answers break off"
        return fault("stream_cut", what, why, "nginx: proxy_read_timeout, send_timeout")
    return None


def is_lumped(stream: Streamed) -> bool:
    return spread(stream.sent) > LEAST_SPREAD and spread(stream.arrived) < LUMPED * spread(stream.sent)


def spread(times: tuple[float, ...]) -> float:
    return times[-1] - times[0] if times else 0.0


def about_silence(case: Evidence) -> Iterator[Finding]:
    silence = case.seen.silence
    if silence is not None and not silence.ended:
        wanted = case.seen.silence_seconds
        what = f"a stream that is silent for {wanted:g} s is cut after {silence.lasted:.0f} s"
        why = "a model that thinks for long never gets to answer; upstream.idle_timeout must end it first"
        longest = case.seen.longest_answer + 30
        change = f"nginx: proxy_read_timeout {longest:.0f}s; (longer than upstream.total_timeout)"
        yield fault("read_timeout", what, why, change)


def about_leaving(case: Evidence) -> Iterator[Finding]:
    left = case.seen.left
    if case.seen.streams[CHAT[0]].report is None:
        return  # there was nothing to leave
    if left.state == "unknown":
        what, why = (
            "the end of a stream could not be asked for",
            "several servers share this address, or have restarted",
        )
        yield warning("leaving_unseen", what, why, "run check against one of them alone, or again")
    elif left.state != "left" and not case.is_cached:  # a cache reads on after the client has left
        what = f"a visitor who left was not noticed within {left.seconds:.1f} s"
        why = "the model goes on, and so do its costs"
        yield fault("leaving", what, why, "nginx: proxy_ignore_client_abort off;")


def about_bodies(case: Evidence) -> Iterator[Finding]:
    answer, size = case.seen.whole_body, case.seen.body_bytes
    arrived = answer.report.body if answer.report is not None else None
    if arrived == size or (answer.code is not None and answer.code != "body_too_large"):
        return
    what = f"a body of {size} bytes is refused on the way: {answer.shown}"
    why = "long conversations end in an error that the page cannot read"
    megabytes = -(-size // (1 << 20))
    yield fault("body_limit", what, why, f"nginx: client_max_body_size {megabytes}m; (server.max_body_bytes)")


def about_errors(case: Evidence) -> Iterator[Finding]:
    replaced = {code: answer for code, answer in case.seen.refusals.items() if answer.code != code}
    if replaced:
        shown = ", ".join(f"{code} became {answer.shown}" for code, answer in replaced.items())
        why = "pages and SDKs read code and message of our errors, and when to try again"
        yield fault("errors_replaced", f"errors do not arrive: {shown}", why, "nginx: proxy_intercept_errors off;")


def about_clocks(case: Evidence) -> Iterator[Finding]:
    skew = case.report.now - case.seen.now
    if abs(skew) > MOST_SKEW:
        yield skewed(skew)


def judge(seen: Observed) -> list[Finding]:
    """The findings, in the order in which to repair them. `seen.plain` has a report."""
    report = seen.plain.report
    assert report is not None
    case = Evidence(seen, report)
    return [finding for about in JUDGES for finding in about(case)]


JUDGES: tuple[Judge, ...] = (
    about_names,
    about_the_certificate,
    about_addresses,
    about_users,
    about_origins,
    about_cookies,
    about_headers,
    about_caches,
    about_streams,
    about_silence,
    about_leaving,
    about_http,
    about_bodies,
    about_errors,
    about_clocks,
)
