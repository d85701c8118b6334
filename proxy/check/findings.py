"""A finding, and the findings of a first contact that fails. Pure: observations in, findings out.

Rules:
1. A finding has what is wrong, why it matters, and the line to change: nginx's directive, or a setting.
2. One misconfiguration causes several symptoms; only the root cause is reported.
3. The headers that arrived are compared with those that the server sent: only the server knows the right ones.
4. What was not observed is not judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from proxy.check.report import HEADER, LOOK, Answer

MOST_SKEW = 30.0  # seconds between two clocks, far beyond what a network can feign


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `check`. `level` is ok, warning or fault; `code` is for machines."""

    level: str
    code: str
    what: str
    why: str = ""
    change: str = ""


def fault(code: str, what: str, why: str, change: str) -> Finding:
    return Finding("fault", code, what, why, change)


def warning(code: str, what: str, why: str, change: str) -> Finding:
    return Finding("warning", code, what, why, change)


# ---- what keeps an observer from seeing anything --------------------------------------------------------------------


def unreachable(url: str, reason: str) -> Finding:
    what = f"{url} cannot be reached: {reason}"
    return fault("unreachable", what, "no visitor can reach it either", "DNS, the firewall, nginx: listen")


def unprotected(url: str) -> Finding:
    what, why = f"{url} is plain http", "an attacker on the network can read the session's cookie, and the chats"
    return fault("plain_http", what, why, "nginx: return 301 https://$host$request_uri; and run check with https://")


CERTIFICATE_FAULTS = {
    # OpenSSL's numbers (x509_vfy.h)
    9: ("not_yet_valid", "is not valid yet", "nginx: ssl_certificate; or the clock of this machine"),
    10: ("expired", "has expired", "renew it (certbot renew), then nginx -s reload; nginx: ssl_certificate"),
    62: ("name", "is for another name", "nginx: server_name and ssl_certificate of this name's server block"),
    64: ("name", "is for another address", "nginx: ssl_certificate; or give --url the name that the certificate has"),
}


def untrusted(url: str, number: int, reason: str) -> Finding:
    """OpenSSL's verdict about a certificate."""
    other = ("untrusted", f"is not trusted: {reason}", "nginx: ssl_certificate must be the whole chain (fullchain.pem)")
    code, what, change = CERTIFICATE_FAULTS.get(number, other)
    if code == "untrusted":
        change += "; for a root of your own: --ca-file"
    return fault(f"certificate_{code}", f"the certificate of {url} {what}", "browsers refuse to open the page", change)


def obstacle(url: str, path: str, answer: Answer, now: float, clock_there: float | None) -> Finding | None:
    """Why the first answer at an address is not a report. `clock_there` is its Date; both in Unix seconds."""
    if answer.report is not None:
        return None
    if not answer.status:
        return unreachable(url, answer.broke)
    if answer.status in (301, 302, 303, 307, 308):
        target = urlsplit(answer.headers.get("location", ""))
        place = f"{target.scheme}://{target.netloc}" if target.netloc else "another address"
        what, why = f"{url} redirects to {place}", "a page under the one address cannot call the other's API"
        return fault("redirect", what, why, f"run check with --url {place}; server.public_url has to be the same")
    if answer.status in (502, 504):
        what = f"the proxy does not reach this server: {answer.shown}"
        return fault("proxy_pass", what, "there is no chat", "nginx: proxy_pass; is the server running, and there?")
    if answer.code == "not_found" and path == LOOK:
        if clock_there is not None and abs(clock_there - now) > MOST_SKEW:
            return skewed(clock_there - now)
        what = "the server does not accept the ticket of this check"
        why = "nothing more can be seen without it; with two secrets behind one address sessions are lost, too"
        return fault("ticket", what, why, "session.secret must be the server's own, here as on each server behind url")
    if answer.status in (401, 403):
        what, why = f"a login in front refuses {path}: {answer.shown}", "check has no account there"
        return fault("login", what, why, f"run check where none is wanted, or let {HEADER} through without one")
    if answer.code is not None:
        what = f"the server refuses: {answer.status} {answer.code}"
        return fault("refused", what, "nothing more can be seen now", "try again in a minute")
    what, why = f"{path} is answered by something else: {answer.shown}", "there is no chat"
    return fault("not_routed", what, why, "nginx: location / { proxy_pass http://chat; } for all of /api/")


def skewed(seconds: float) -> Finding:
    direction = "ahead of" if seconds > 0 else "behind"
    what = f"the server's clock is {abs(seconds):.0f} s {direction} this machine's"
    why = "sessions and logins end at the wrong time; two servers may refuse each other's"
    return fault("clock", what, why, "timedatectl set-ntp true, on the one that is wrong")
