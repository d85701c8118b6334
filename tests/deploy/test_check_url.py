"""`chat-proxy check --url` before a real nginx: each deliberate mistake is found, and a right configuration has none.

All of them are server blocks of one nginx, each on a port of its own, in front of one server that answers to all of
their names; so each costs one run of `check` and no start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qsl, urlsplit

import pytest
import trustme
from support.commands import run
from support.harness import FULL, PATIENCE, Peer, Running, ScriptedUpstream, environment, random_key, running
from support.nginx import listening, serving

from proxy.check import prober as checkup
from proxy.check.findings import Finding
from proxy.check.ticket import Tickets
from proxy.cli import main as cli
from proxy.limits import requests
from proxy.settings import Rate, Secret, Settings
from proxy.transport import tls

pytestmark = [pytest.mark.nginx, pytest.mark.process]

NOWHERE = "http://127.0.0.1:9/v1"  # no check with --url calls the model
SECRET = secrets.token_urlsafe(32)
TIMEOUT = 60.0 if FULL else 1.2  # seconds for which the model may be silent; --slow takes a quarter more
SHORT, LONG = ("60s", "90s") if FULL else ("1s", "5s")  # what nginx bears
TIMEOUTS = {f"UPSTREAM_{name}_TIMEOUT": str(TIMEOUT) for name in ("IDLE", "FIRST_BYTE")}

RIGHT = {
    "listen": "listen ADDRESS ssl http2;",
    "certificate": "ssl_certificate FOLDER/good.pem; ssl_certificate_key FOLDER/good.key;",
    "pass": "location / { proxy_pass http://chat; }",
    "version": "proxy_http_version 1.1;",
    "connection": 'proxy_set_header Connection "";',
    "host": "proxy_set_header Host $http_host;",
    "forwarded": "proxy_set_header X-Forwarded-For $remote_addr;",
    "buffering": "proxy_buffering off;",
    "timeout": "proxy_read_timeout 90s;",
    "gzip": "gzip off;",
}
CACHE = "proxy_cache chats; proxy_cache_valid any 1m; proxy_ignore_headers Cache-Control;"
OOPS = "location = /oops.html { internal; return 200 '<h1>Oops</h1>'; }"


@dataclass(frozen=True)
class Mistake:
    """What stands in place of a right line or is added, and what has to be found: a code, and words of the hint."""

    code: str
    hint: str
    instead: dict[str, str] = field(default_factory=dict)
    more: str = ""
    level: str = "fault"
    slow: bool = False


MISTAKES = {
    "buffering on": Mistake(
        "buffered",
        "proxy_buffering off;",
        {"buffering": "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;"},
    ),
    "gzip on": Mistake("compressed", "gzip off;", {"gzip": "gzip on; gzip_types text/event-stream;"}),
    "read timeout short": Mistake(
        "read_timeout", "proxy_read_timeout 630s;", {"timeout": f"proxy_read_timeout {SHORT};"}, slow=True
    ),
    "forwarded appended": Mistake(
        "forwarded_spoofed",
        "proxy_set_header X-Forwarded-For $remote_addr;",
        {"forwarded": "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"},
    ),
    "forwarded missing": Mistake(
        "forwarded_missing", "proxy_set_header X-Forwarded-For $remote_addr;", {"forwarded": ""}
    ),
    "host missing": Mistake("host", "proxy_set_header Host $http_host;", {"host": ""}),
    "host without its port": Mistake(
        "host", "proxy_set_header Host $http_host;", {"host": "proxy_set_header Host $host;"}
    ),
    "HTTP/1.0": Mistake("http10", "proxy_http_version 1.1;", {"version": "proxy_http_version 1.0;"}),
    "no keep-alive": Mistake("no_keepalive", 'proxy_set_header Connection "";', {"connection": ""}, level="warning"),
    "no HTTP/2": Mistake("no_h2", "http2", {"listen": "listen ADDRESS ssl;"}, level="warning"),
    "errors replaced": Mistake(
        "errors_replaced",
        "proxy_intercept_errors off;",
        more=f"proxy_intercept_errors on; error_page 502 503 504 /oops.html; {OOPS}",
    ),
    "own page for 404": Mistake(
        "errors_replaced",
        "proxy_intercept_errors off;",
        more=f"proxy_intercept_errors on; error_page 404 /oops.html; {OOPS}",
    ),
    "small bodies": Mistake("body_limit", "client_max_body_size 1m;", more="client_max_body_size 100k;"),
    "leaving ignored": Mistake("leaving", "proxy_ignore_client_abort off;", more="proxy_ignore_client_abort on;"),
    "cookie without flags": Mistake(
        "cookie_flags", "proxy_cookie_flags", more="proxy_cookie_flags ~ nosecure nohttponly nosamesite;"
    ),
    "session cookie lax": Mistake(
        "cookie_flags", "proxy_cookie_flags", more="proxy_cookie_flags __Host-chat samesite=lax;"
    ),
    "cookie path": Mistake("cookie_flags", "proxy_cookie_path", more="proxy_cookie_path / /chat/;"),
    "cookie hidden": Mistake("cookie_lost", "proxy_hide_header", more="proxy_hide_header Set-Cookie;"),
    "cookie kept back": Mistake("cookie_unreturned", "proxy_set_header Cookie", more='proxy_set_header Cookie "";'),
    "HSTS hidden": Mistake("hsts", "proxy_hide_header", more="proxy_hide_header Strict-Transport-Security;"),
    "HSTS short": Mistake(
        "hsts",
        "add_header",
        more="proxy_hide_header Strict-Transport-Security; add_header Strict-Transport-Security max-age=60;",
    ),
    "CSP hidden": Mistake("csp", "proxy_hide_header", more="proxy_hide_header Content-Security-Policy;"),
    "request id hidden": Mistake("request_id", "proxy_hide_header", more="proxy_hide_header X-Request-Id;"),
    "nosniff hidden": Mistake("header_lost", "proxy_hide_header", more="proxy_hide_header X-Content-Type-Options;"),
    "caching allowed": Mistake("cache_control", "expires", more="expires 1h;"),
    "cached": Mistake("cached", "proxy_cache off;", {"buffering": ""}, more=CACHE),
    "origin removed": Mistake("origin_altered", "proxy_set_header Origin", more='proxy_set_header Origin "";'),
    "origin rewritten": Mistake(
        "origin_altered", "proxy_set_header Origin", more="proxy_set_header Origin https://chat.example.org;"
    ),
    "fetch metadata removed": Mistake(
        "origin_altered", "proxy_set_header Sec-Fetch-Site", more='proxy_set_header Sec-Fetch-Site "";'
    ),
    "API elsewhere": Mistake("not_routed", "location /", more="location /api/check/ { return 200 hello; }"),
    "chat elsewhere": Mistake("not_routed", "location /", more="location = /api/chat { return 200 hello; }"),
    "login in front": Mistake("login", "check", more="location /api/ { return 401; }"),
    "one address only": Mistake(
        "compressed",
        "gzip off;",
        more="location = /api/v1/chat/completions { proxy_pass http://chat; gzip on; gzip_types *; }",
    ),
    "server not there": Mistake("proxy_pass", "proxy_pass", {"pass": "location / { proxy_pass http://127.0.0.1:9; }"}),
    "redirect": Mistake("redirect", "--url https://www.example.org", more="return 301 https://www.example.org/;"),
    "certificate expired": Mistake(
        "certificate_expired",
        "certbot renew",
        {"certificate": "ssl_certificate FOLDER/old.pem; ssl_certificate_key FOLDER/old.key;"},
    ),
    "certificate of another name": Mistake(
        "certificate_name",
        "ssl_certificate",
        {"certificate": "ssl_certificate FOLDER/other.pem; ssl_certificate_key FOLDER/other.key;"},
    ),
    "certificate of nobody": Mistake(
        "certificate_untrusted",
        "fullchain.pem",
        {"certificate": "ssl_certificate FOLDER/stranger.pem; ssl_certificate_key FOLDER/stranger.key;"},
    ),
    "certificate soon over": Mistake(
        "certificate_soon",
        "certbot renew",
        {"certificate": "ssl_certificate FOLDER/soon.pem; ssl_certificate_key FOLDER/soon.key;"},
        level="warning",
    ),
}


def readme() -> dict[str, str]:
    """The lines of RIGHT from `pass` on, as docs/nginx.md has them: one location with all that a site must say."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "nginx.md").read_text(encoding="utf-8")
    (location,) = re.findall(r"```nginx\n(.*?)```", text, re.DOTALL)
    assert "http://127.0.0.1:8000;" in location
    names = list(RIGHT)
    nothing = dict.fromkeys(names[names.index("pass") :], "")
    return nothing | {"pass": location.replace("http://127.0.0.1:8000;", "http://chat;")}


# What differs from RIGHT and yet does no harm.
HARMLESS = {
    "right": Mistake("", ""),
    "as the documents show": Mistake("", "", readme()),
    "buffering on": Mistake("", "", {"buffering": "proxy_buffering on;"}),  # X-Accel-Buffering: no is obeyed
    "gzip of other things": Mistake("", "", {"gzip": "gzip on; gzip_types application/json text/css;"}),
    "large bodies": Mistake("", "", more="client_max_body_size 100m;"),
    "HSTS of its own": Mistake(
        "",
        "",
        more='proxy_hide_header Strict-Transport-Security; add_header Strict-Transport-Security "max-age=63072000";',
    ),
    "longer than the model is silent": Mistake("", "", {"timeout": f"proxy_read_timeout {LONG};"}, slow=True),
}


# ---- the stage ------------------------------------------------------------------------------------------------------


@dataclass
class Port:
    """One server block: where it listens, and what it says."""

    listener: socket.socket
    mistake: Mistake

    @property
    def url(self) -> str:
        return f"https://localhost:{self.listener.getsockname()[1]}"

    def block(self, folder: Path) -> str:
        lines = "\n".join(({**RIGHT, **self.mistake.instead}).values())
        address = "{}:{}".format(*self.listener.getsockname())
        lines = lines.replace("ADDRESS", address).replace("FOLDER", str(folder))
        return f"server {{ server_name localhost;\n{lines}\n{self.mistake.more}\n}}\n"


@contextlib.contextmanager
def nginx(folder: Path, ports: dict[str, Port], upstreams: list[int]) -> Iterator[None]:
    """nginx with these server blocks in front of servers on these ports."""
    http = (
        f"proxy_cache_path {folder}/cache keys_zone=chats:1m;\n"
        f"upstream chat {{ {' '.join(f'server 127.0.0.1:{port};' for port in upstreams)} keepalive 8; }}\n"
        f"{''.join(port.block(folder) for port in ports.values())}"
    )
    with serving(folder, http, [port.listener for port in ports.values()]):
        yield


def write_certificates(folder: Path) -> None:
    ca, stranger, now = trustme.CA(), trustme.CA(), datetime.now(UTC)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    day = timedelta(days=1)
    for name, certificate in {
        "good": ca.issue_cert("localhost", not_before=now - day, not_after=now + 80 * day),
        "old": ca.issue_cert("localhost", not_before=now - 90 * day, not_after=now - day),
        "soon": ca.issue_cert("localhost", not_before=now - 80 * day, not_after=now + 10 * day),
        "other": ca.issue_cert("other.example"),
        "stranger": stranger.issue_cert("localhost"),
    }.items():
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")


@contextlib.contextmanager
def cutting(port: int, after: int) -> Iterator[str]:
    """The address of a plain forwarder to the port, which resets connections once so many packets have come back."""
    left = [after]

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        sending = asyncio.create_task(pump(reader, forth))
        while left[0] > 0 and (part := await back.read(65536)):
            left[0] -= 1
            writer.write(part)
        for end in (writer, forth):
            end.transport.abort()
        await sending

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(65536):
                writer.write(part)
        writer.transport.abort()

    loop, started = asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()
    ports = []

    async def serve() -> None:
        server = await asyncio.start_server(forward, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        started.set()
        await stop.wait()
        server.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(PATIENCE)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE)


@dataclass
class Site:
    proxy: Running
    folder: Path
    ports: dict[str, Port]

    def examine(self, label: str, settings: Settings | None = None, **more: Any) -> list[Finding]:
        port = self.ports[label]
        found, _ = checkup.examine(
            settings or self.proxy.settings,
            port.url,
            ca_file=str(self.folder / "ca.pem"),
            slow=port.mistake.slow,
            **more,
        )
        return found


@contextlib.contextmanager
def site(folder: Path, mistakes: dict[str, Mistake], *, servers: int = 1, **overrides: str) -> Iterator[Site]:
    """A server behind nginx, which answers to the names of all the server blocks unless told otherwise."""
    write_certificates(folder)
    with listening(len(mistakes)) as listeners:
        ports = {label: Port(listener, mistakes[label]) for label, listener in zip(mistakes, listeners, strict=True)}
        urls = [port.url for port in ports.values()]
        names = {"SERVER_PUBLIC_URL": urls[0], "SERVER_EXTRA_ORIGINS": ",".join(urls)}
        given = {**names, **TIMEOUTS, "SESSION_SECRET": SECRET, **overrides}
        with patch.multiple(checkup, EVENTS=6, SPACING=0.05), ExitStack() as stack:
            with patch.object(requests, "CHECKS", Rate(100_000, 60, "100000/minute")):  # it is read at the start
                proxies = [stack.enter_context(running(NOWHERE, **given)) for _ in range(servers)]
            stack.enter_context(nginx(folder, ports, [proxy.port for proxy in proxies]))
            yield Site(proxies[0], folder, ports)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("wrong"), MISTAKES) as stage:
        yield stage


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("right"), HARMLESS) as stage:
        yield stage


# ---- mistakes of nginx's configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize("label", MISTAKES)
def test_mistake_is_found(label: str, wrong: Site) -> None:
    """Each mistake is found by its name, with why it matters and the line to change; and nothing else is found."""
    mistake = MISTAKES[label]
    found = wrong.examine(label)
    assert [finding.code for finding in found] == [mistake.code], found
    assert found[0].level == mistake.level
    assert mistake.hint in found[0].change
    assert found[0].what
    assert found[0].why


@pytest.mark.parametrize("label", HARMLESS)
def test_nothing_is_found(label: str, right: Site) -> None:
    """A right configuration has no finding, nor has one that differs without harm."""
    assert right.examine(label) == []


def test_further_root_is_needed(right: Site) -> None:
    """Without --ca-file a certificate of the operator's own is not trusted, and no ticket is sent."""
    before = len(right.proxy.sent)
    found, _ = checkup.examine(right.proxy.settings, right.ports["right"].url)
    assert [finding.code for finding in found] == ["certificate_untrusted"]
    assert "--ca-file" in found[0].change
    assert len(right.proxy.sent) == before


# ---- mistakes of our own settings -----------------------------------------------------------------------------------

OURS = {
    "public_url of plain http": (
        "public_url",
        'server.public_url = "https://localhost:',
        "SERVER_PUBLIC_URL",
        "http://localhost",
    ),
    "proxy not trusted": (
        "untrusted_proxy",
        'server.trusted_proxies = ["127.0.0.1"]',
        "SERVER_TRUSTED_PROXIES",
        "10.0.0.0/8",
    ),
    "users named by visitors": ("user_spoofed", "header.name", "SESSION_MODE", "header"),
    "other secret": ("ticket", "session.secret", "SESSION_SECRET", secrets.token_urlsafe(32)),
}


@pytest.mark.parametrize("label", OURS)
def test_mistake_in_the_settings_is_found(label: str, tmp_path: Path) -> None:
    """What the server's settings have wrong shows from outside, too."""
    code, hint, name, value = OURS[label]
    origins = {"SERVER_EXTRA_ORIGINS": ""} if name == "SERVER_PUBLIC_URL" else {}
    overrides: dict[str, Any] = {**origins, name: value}
    with site(tmp_path, {"right": Mistake("", "")}, **overrides) as stage:
        session = replace(stage.proxy.settings.session, secret=Secret(SECRET))
        found = stage.examine("right", replace(stage.proxy.settings, session=session))
    assert [finding.code for finding in found] == [code], found
    assert hint in found[0].change


@pytest.mark.parametrize(("ahead", "by"), [(60, "its report"), (-60, "its report"), (3600, "its Date")])
def test_wrong_clock_is_found(ahead: float, by: str, right: Site) -> None:
    """A clock that is wrong by a minute is told by the server; one that is wrong by an hour lets no ticket in."""
    found = right.examine("right", wall=lambda: time.time() + ahead)
    assert [finding.code for finding in found] == ["clock"], found
    told = re.fullmatch(r"the server's clock is (\d+) s (behind|ahead of) this machine's", found[0].what)
    assert told is not None
    assert abs(int(told[1]) - abs(ahead)) <= PATIENCE
    assert told[2] == ("behind" if ahead > 0 else "ahead of")
    assert "set-ntp" in found[0].change


def test_without_anything_in_between() -> None:
    """A server on this machine that is asked directly has no finding: nothing is missing there."""
    with running(NOWHERE, SESSION_SECRET=SECRET) as proxy:
        found, measured = checkup.examine(proxy.settings, proxy.url)
    assert found == []
    assert measured.http is None
    assert measured.leaving_ms is not None


def test_several_servers_behind_one_address(tmp_path: Path) -> None:
    """The server that noticed a disconnect is found among several; their answers are not taken for a cache's."""
    with site(tmp_path, {"right": Mistake("", "")}, servers=3) as stage:
        assert stage.examine("right") == []


@dataclass
class Processes:
    """Several that share one address, as an upstream would: each connection is one's own, and one alone has streams.

    `knows` says which connections belong to that one, and of which stream, counted from 1, it has heard the end.
    """

    knows: Callable[[int, int], bool]
    streams: list[str] = field(default_factory=list)
    connections: int = 0

    async def __call__(self, peer: Peer) -> None:
        self.connections += 1
        own = self.connections
        while True:
            target = (await peer.request()).head.split()[1].decode()
            asked = dict(parse_qsl(urlsplit(target).query))
            if asked["check"] == "stream":
                self.streams.append(asked["name"])
                await peer.head()
                await peer.chunk(b'data: {"number":0,"at":0,"report":null}\n\n')
                return await peer.gone()
            await asyncio.sleep(0.05)  # as the real one waits
            known = self.knows(own, self.streams.index(asked["name"]) + 1)
            await peer.whole(b'{"state":"left","at":0.5}' if known else b'{"state":"unknown","at":0}')


@pytest.mark.parametrize(
    ("knows", "state"),
    [
        (lambda connection, stream: connection == 7, "left"),  # others are asked before it, on connections that stay
        (lambda connection, stream: stream == 3, "left"),
        (lambda connection, stream: False, "unknown"),
    ],
    ids=["one of many", "only at the third try", "none"],
)
def test_the_process_that_knows_is_found(knows: Callable[[int, int], bool], state: str, right: Site) -> None:
    """Connections stay with one process; asked one by one, another might answer for ever."""
    with (
        ScriptedUpstream(Processes(knows)) as processes,
        patch.object(checkup, "LEAVING_PATIENCE", 0.3),
        checkup.Browser(
            f"http://127.0.0.1:{processes.port}", tls.system_ssl_context(None), lambda: "ticket"
        ) as browser,
    ):
        left = checkup.Prober(browser, right.proxy.settings, slow=False).leave()
    assert left.state == state


async def nonsense(peer: Peer) -> None:
    """Answers that are not what they say: compressed, and events."""
    while True:
        streams = b"check=stream" in (await peer.request()).head
        await peer.head("200 OK", "text/event-stream", *([] if streams else ["content-encoding: gzip"]))
        await peer.chunk(b"data: nonsense\n\n")
        await peer.end()


def test_nonsense_is_no_answer(right: Site) -> None:
    """What cannot be read is a finding, or judged by what came before it."""
    with ScriptedUpstream(nonsense) as other:
        url = f"http://127.0.0.1:{other.port}"
        found, _ = checkup.examine(right.proxy.settings, url)
        with checkup.Browser(url, tls.system_ssl_context(None), lambda: "ticket") as browser:
            streamed = checkup.Prober(browser, right.proxy.settings, slow=False).rhythm("/api/chat")
    assert [(finding.code, "DecodingError" in finding.what) for finding in found] == [("unreachable", True)]
    assert (streamed.answer.status, streamed.report, streamed.ended) == (200, None, False)


ELSEWHERE = {
    "plain http": ("http://chat.example.org", "plain_http"),
    "a name too long for any DNS": (f"https://{'a' * 70}.example", "unreachable"),
    "a name that is not there": ("https://nowhere.invalid", "unreachable"),
}


@pytest.mark.parametrize("label", ELSEWHERE)
def test_no_ticket_goes_elsewhere(label: str, right: Site) -> None:
    """Without TLS, or without a server, no ticket is sent."""
    url, code = ELSEWHERE[label]
    with patch.object(Tickets, "issue", side_effect=AssertionError):
        found, _ = checkup.examine(right.proxy.settings, url)
    assert [finding.code for finding in found] == [code]


def test_https_of_a_server_without(right: Site) -> None:
    """An address that speaks no TLS is one finding."""
    found, _ = checkup.examine(right.proxy.settings, f"https://localhost:{right.proxy.port}")
    assert [(finding.code, "SSL" in finding.what) for finding in found] == [("unreachable", True)]


@pytest.mark.parametrize("after", range(0, 30, 6))
def test_a_network_that_fails_ends_in_findings(after: int) -> None:
    """Whenever connections begin to be cut, check ends, with findings and without a traceback."""
    with running(NOWHERE, SESSION_SECRET=SECRET) as proxy, cutting(proxy.port, after) as url:
        found, _ = checkup.examine(proxy.settings, url)
    assert all(finding.what and finding.change for finding in found)
    assert found


def test_nobody_there() -> None:
    """An address without a listener is one finding."""
    with running(NOWHERE, SESSION_SECRET=SECRET) as proxy:
        pass
    found, _ = checkup.examine(proxy.settings, proxy.url)
    assert [(finding.code, "refused" in finding.what) for finding in found] == [("unreachable", True)]


# ---- the command ----------------------------------------------------------------------------------------------------


async def lists_models(peer: Peer) -> None:
    await peer.request()
    await peer.whole(b'{"object":"list","data":[]}')


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(lists_models) as upstream:
        yield upstream


def settings_of(base_url: str, **given: str) -> dict[str, str]:
    """The settings of a server at an https address; an empty one is none."""
    settings = {
        "UPSTREAM_BASE_URL": base_url,
        "UPSTREAM_API_KEY": random_key(),
        "POLICY_MODELS": "m",
        "LIMITS_TOKENS_TOTAL": "1000000/day",
        "SERVER_PUBLIC_URL": "https://localhost",
        "SESSION_SECRET": SECRET,
        **TIMEOUTS,
        **given,
    }
    return {name: value for name, value in settings.items() if value}


def check(folder: Path, model: ScriptedUpstream, *arguments: str, **given: str) -> subprocess.CompletedProcess[str]:
    """One run of the command."""
    done = run(folder, "check", *arguments, **settings_of(model.base_url, **given))
    assert SECRET not in done.stdout + done.stderr
    return done


def test_command_says_ok(right: Site, model: ScriptedUpstream, tmp_path: Path) -> None:
    """At a right address each line begins with ok, the last one has the figures, and the exit code is 0."""
    url = right.ports["right"].url
    done = check(tmp_path, model, "--url", url, "--ca-file", str(right.folder / "ca.pem"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 3
    assert lines[-1].startswith(f"ok       {url}: events arrive one by one")
    assert "not tried (--slow)" in lines[-1]


def test_command_trusts_as_openssl_does(right: Site, model: ScriptedUpstream, tmp_path: Path) -> None:
    """SSL_CERT_FILE names roots as it does everywhere; --slow says how long a silence was borne."""
    with patch.dict(os.environ, SSL_CERT_FILE=str(right.folder / "ca.pem")):
        done = check(tmp_path, model, "--url", right.ports["right"].url, "--slow")
    assert done.returncode == 0, done.stdout
    assert f"{TIMEOUT * 1.25:g} s of silence are possible" in done.stdout


def test_command_tells_a_fault(wrong: Site, model: ScriptedUpstream, tmp_path: Path) -> None:
    """A fault has a line of its own, one for why and one for the change; the exit code is 1."""
    done = check(tmp_path, model, "--url", wrong.ports["host missing"].url, "--ca-file", str(wrong.folder / "ca.pem"))
    assert (done.returncode, done.stderr) == (1, "")
    fault, why, change = done.stdout.splitlines()[2:]
    assert fault.startswith("fault    Host arrives as chat, ")
    assert why == "         why:    every request for /api/ is refused: 403 cross_origin"
    assert change == "         change: nginx: proxy_set_header Host $http_host;"


def test_command_for_machines(wrong: Site, model: ScriptedUpstream, tmp_path: Path) -> None:
    """--json is one object on stdout: whether all is well, every finding, the figures. A warning is no fault."""
    ca_file = ("--ca-file", str(wrong.folder / "ca.pem"), "--json")
    done = check(tmp_path, model, "--url", wrong.ports["HTTP/1.0"].url, *ca_file)
    told = json.loads(done.stdout)
    assert (done.returncode, done.stderr, told["ok"]) == (1, "", False)
    assert [(finding["level"], finding["code"]) for finding in told["findings"]] == [
        ("ok", "settings"),
        ("ok", "upstream"),
        ("fault", "http10"),
    ]
    assert set(told["findings"][-1]) == {"level", "code", "what", "why", "change"}
    assert told["measured"]["http"] == "2"
    done = check(tmp_path, model, "--url", wrong.ports["no HTTP/2"].url, *ca_file)
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"], told["measured"]["http"]) == (0, True, "1.1")
    assert told["findings"][-1]["level"] == "warning"


USAGE: dict[str, tuple[list[str], dict[str, str], str]] = {
    "no secret to sign with": (
        ["--url", "http://127.0.0.1:9"],
        {"SERVER_PUBLIC_URL": "", "SESSION_SECRET": ""},
        "session.secret",
    ),
    "roots that are not there": (["--url", "https://localhost", "--ca-file", "nowhere.pem"], {}, "--ca-file"),
    "roots for nothing": (["--ca-file", "nowhere.pem"], {}, "--url"),
    "slow for nothing": (["--slow"], {}, "--url"),
    "an address with a path": (["--url", "https://localhost/chat"], {}, "--url"),
}


@pytest.mark.parametrize("label", USAGE)
def test_command_wants_sense(
    label: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be done is told before anything is, and exits 2."""
    arguments, given, named = USAGE[label]
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ, environment(**settings_of(NOWHERE, **given)), clear=True):
        try:
            code: Any = cli.main(["check", *arguments])
        except SystemExit as ended:  # argparse's way
            code = ended.code
    told = capsys.readouterr()
    assert told.out == ""
    assert named in told.err
    assert code == 2
