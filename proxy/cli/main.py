"""The commands. Exit codes: 0, 1 (check found faults), 2 (usage or settings)."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import errno
import getpass
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import uvloop
from starlette.types import ASGIApp

from proxy import __version__, settings
from proxy.accounts.revocation.file import ControlFile
from proxy.accounts.revocation.redis import RedisRevocations
from proxy.accounts.revocation.rules import RevocationRules
from proxy.chat.upstream import Upstream
from proxy.check import prober as checkup
from proxy.check.findings import Finding
from proxy.demo import model as demo
from proxy.errors import Refusal
from proxy.limits.store.redis import DEADLINE, open_store
from proxy.server.listener import WRITE_DEADLINE, activated_socket, as_bound, listen
from proxy.server.runner import Uvicorn, uvicorn_for
from proxy.server.service import Service, allow_all_descriptors, ssl_context
from proxy.server.workers import Supervisor, work
from proxy.telemetry.logs import Descriptor, Logs
from proxy.transport.connection import Transport

TEMPLATE = """\
# chat-proxy: every setting is described in README.md. Secrets do not belong in this file:
#   CHAT_PROXY_UPSTREAM_API_KEY     the key of the model's API (or ..._API_KEY_FILE: a file that holds it)
#   CHAT_PROXY_SESSION_SECRET       `chat-proxy new-secret` makes one; needed once public_url is not loopback

[server]
host = "127.0.0.1"
port = 8000
# public_url = "https://chat.example.org"   # what people type; https switches on __Host- cookies and HSTS

[upstream]
base_url = "https://api.selamgpt.com/v1"

[policy]
models = ["selam-turbo"]        # the first is the default
max_output_tokens = 4096        # the most one answer may be asked for
# system_prompt = "You are a helpful assistant."

[limits]
per_session = "20/minute;500/day"
per_address = "60/minute;2000/day"
tokens_per_session = "200000/day"
tokens_per_address = "1000000/day"
# tokens_total = "5000000/month"            # the most this server may spend, whoever asks
"""


def main(argv: list[str] | None = None) -> int:
    replace_closed_streams()
    try:
        options = parser().parse_args(argv)
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except settings.SettingsError as error:
        print(f"chat-proxy: {len(error.faults)} fault(s) in the settings:", file=sys.stderr)
        for fault in error.faults:
            print(f"  {fault}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head -1`: who reads has enough
        return 2
    except OSError as error:
        return complain(error.strerror or str(error))
    except KeyboardInterrupt:  # as a shell expects it: by the signal, so that its loops end, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        raise
    finally:
        drop_unwritten()


def complain(what: str) -> int:
    """The exit code."""
    print(f"chat-proxy: {what}", file=sys.stderr)
    return 2


def replace_closed_streams() -> None:
    """What we were started without becomes /dev/null, or the first socket would be descriptor 1 and get the log."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))


def drop_unwritten() -> None:
    """What standard output did not take, or the interpreter would try once more at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="chat-proxy", description="Holds the API key between a chat page and a language model."
    )
    top.add_argument("--version", action="version", version=f"chat-proxy {__version__}")
    top.set_defaults(run=lambda _: run_help(top))
    commands = top.add_subparsers(metavar="COMMAND")
    command = commands.add_parser("demo", help="everything on this machine, with no key and no settings")
    command.add_argument("--port", type=port, default=8000, help="default: 8000")
    command.set_defaults(run=run_demo)
    command = commands.add_parser("serve", help="the proxy")
    command.add_argument("--config", metavar="FILE", help="default: chat-proxy.toml, if there is one")
    command.add_argument("--worker", type=descriptors, help=argparse.SUPPRESS)  # what a supervisor adds
    command.set_defaults(run=run_serve)
    command = commands.add_parser("check", help="validates the settings and tries the upstream")
    command.add_argument("--config", metavar="FILE", help="default: chat-proxy.toml, if there is one")
    command.add_argument("--url", type=public_url, help="plays a browser through this public address, too")
    command.add_argument("--ca-file", metavar="FILE", help="with --url: a further trust root")
    command.add_argument(
        "--slow", action="store_true", help="with --url: tries the longest silence, which takes as long"
    )
    command.add_argument("--json", action="store_true", help="one JSON object, for machines")
    command.set_defaults(run=run_check)
    command = commands.add_parser("upstream", help="the demo model alone, an OpenAI-compatible server")
    command.add_argument("--port", type=port, default=9000, help="default: 9000")
    command.add_argument("--delay-ms", type=milliseconds, default=20.0, help="for one token; default: 20")
    command.set_defaults(run=run_upstream)
    command = commands.add_parser("new-secret", help="prints a fresh session secret")
    command.set_defaults(run=run_new_secret)
    command = commands.add_parser(
        "hash-password", help="asks for a password and prints its line for the passwords' file"
    )
    command.add_argument("user", nargs="?", help="none: one password for everybody")
    command.set_defaults(run=run_hash_password)
    command = commands.add_parser("sessions", help="ends sessions, in running servers too")
    command = command.add_subparsers(required=True, metavar="COMMAND").add_parser("revoke", help="logs users out")
    command.add_argument("--config", metavar="FILE", help="default: chat-proxy.toml, if there is one")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--user", type=name_of_user, help="all sessions of one user")
    which.add_argument("--all", action="store_true", help="every session")
    which.add_argument("--before", type=moment, metavar="TIME", help="begun before: 2026-01-31T12:00, or Unix seconds")
    command.set_defaults(run=run_revoke)
    command = commands.add_parser("init", help="writes a commented chat-proxy.toml")
    command.set_defaults(run=run_init)
    return top


def run_help(top: argparse.ArgumentParser) -> int:
    """Whoever names no command wants to know which ones there are."""
    top.print_help(sys.stderr)
    return 2


def port(written: str) -> int:
    with wanting("a port, from 0 to 65535"):
        if not 0 <= (number := int(written)) <= 65535:
            raise ValueError
        return number


def descriptors(written: str) -> list[socket.socket]:
    """A worker's listener, and its channel to the supervisor."""
    listener, channel = map(int, written.split(","))
    return [socket.socket(fileno=listener), socket.socket(fileno=channel)]


def milliseconds(written: str) -> float:
    with wanting("milliseconds, up to an hour"):
        if not 0 <= (number := float(written)) < 3_600_000:
            raise ValueError
        return number


def public_url(written: str) -> str:
    with wanting("an origin like https://chat.example.org: no path, no user"):
        return settings.origin(written)


def moment(written: str) -> int:
    """Unix seconds; a time without a zone is this machine's."""
    now = time.time()
    with wanting("a time that is past, like 2026-01-31T12:00, or Unix seconds"):
        seconds = int(written) if written.isdecimal() else int(datetime.fromisoformat(written).timestamp())
        if not 0 <= seconds <= now:
            raise ValueError  # a time to come would end sessions that do not exist yet
        return seconds


def name_of_user(written: str) -> str:
    with wanting("a name, in UTF-8"):
        written.encode()
        if not written.strip():
            raise ValueError  # an empty variable of a shell would end nobody's sessions
        return written


@contextmanager
def wanting(what: str) -> Iterator[None]:
    """Tells of a value what would be right; argparse by itself would name our function."""
    try:
        yield
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"wants {what}") from None


# ---- serving ---------------------------------------------------------------------------------------------------------


def run_serve(options: argparse.Namespace) -> int:
    if options.worker:
        return run_worker(options)
    chosen = settings.load(options.config, os.environ)
    allow_all_descriptors()
    with ExitStack() as listeners:
        listener = listeners.enter_context(listener_for(chosen.server, may_be_handed=True))
        metrics = None
        if chosen.metrics.port:
            configured = settings.Server(host=chosen.metrics.host, port=chosen.metrics.port)
            metrics = listeners.enter_context(listener_for(configured, "metrics", may_be_handed=True))
        bound, logs = as_bound(chosen, listener), Logs(chosen.log)
        logs.line("listening", version=__version__, at=place_of(listener), public_url=bound.server.public_url)
        if chosen.server.workers > 1:
            return uvloop.run(supervise(chosen, options.config, listener, metrics, logs))
        uvloop.run(Service(bound, listener, logs, metrics).run())
    return 0


def place_of(listener: socket.socket) -> str:
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return os.fsdecode(name)  # bytes, where it is no path
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run_worker(options: argparse.Namespace) -> int:
    listener, channel = options.worker
    with listener, channel:
        chosen = settings.load(options.config, os.environ)
        uvloop.run(work(Service(as_bound(chosen, listener), listener, Logs(chosen.log)), channel))
    return 0


async def supervise(
    chosen: settings.Settings, config: str | None, listener: socket.socket, metrics: socket.socket | None, logs: Logs
) -> int:
    """The exit code."""
    environ = dict(os.environ)
    environ[f"{settings.PREFIX}SERVER_WORKERS"] = str(chosen.server.workers)  # what is read later must suit so many
    if chosen.session.secret is None:
        environ[f"{settings.PREFIX}SESSION_SECRET"] = new_secret()  # or each worker would make one of its own
    supervisor = Supervisor(
        [sys.executable, *sys.orig_argv[1:]],
        environ,
        chosen.server.workers,
        listener,
        logs,
        validate=lambda: settings.load(config, environ),
        metrics_listener=metrics,
    )
    await supervisor.run()
    return 2 if supervisor.has_been_refused else 0


def run_demo(options: argparse.Namespace) -> int:
    with listener_for(settings.Server(port=0)) as upstream:
        variables = {
            "SERVER_PORT": str(options.port),
            "UPSTREAM_BASE_URL": f"http://127.0.0.1:{upstream.getsockname()[1]}/v1",
            "UPSTREAM_API_KEY": f"sk-demo-{secrets.token_urlsafe(24)}",
            "POLICY_MODELS": ",".join(demo.MODELS),
            "LIMITS_NEW_SESSIONS": "1000/hour",  # every private window of whoever builds a page is one
            "LOG_FORMAT": "text",
        }
        chosen = settings.from_variables({f"{settings.PREFIX}{name}": value for name, value in variables.items()})
        with listener_for(chosen.server, option="--port") as listener:
            uvloop.run(serve_demo(as_bound(chosen, listener), listener, upstream))
    return 0


async def serve_demo(chosen: settings.Settings, listener: socket.socket, upstream: socket.socket) -> None:
    model = server_of(demo.build(api_key=chosen.upstream.api_key.value))
    serving = asyncio.create_task(model.serve(sockets=[upstream]))
    print(f"Open {chosen.server.public_url} - the chat page, answered by a demo model. Ctrl-C ends it.", flush=True)
    await Service(chosen, listener, Logs(chosen.log, Descriptor(sys.stderr.fileno()))).run()
    model.end()
    await serving


def server_of(model: ASGIApp) -> Uvicorn:
    logging.getLogger("uvicorn.error").addFilter(demo.is_no_staged_cut)
    return uvicorn_for(model, 75, lifespan="off")


def run_upstream(options: argparse.Namespace) -> int:
    key = os.environ.get(f"{settings.PREFIX}UPSTREAM_API_KEY", "").strip() or None
    with listener_for(settings.Server(port=options.port), option="--port") as listener:
        uvloop.run(serve_model(listener, key, options.delay_ms / 1000))
    return 0


async def serve_model(listener: socket.socket, key: str | None, delay_seconds: float) -> None:
    model = server_of(demo.build(api_key=key, delay_seconds=delay_seconds))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, model.end)
    port = listener.getsockname()[1]
    wanted = "the key in CHAT_PROXY_UPSTREAM_API_KEY" if key else "any key"
    print(f"The demo model answers at http://127.0.0.1:{port}/v1 to {wanted}. Ctrl-C ends it.", flush=True)
    await model.serve(sockets=[listener])


def listener_for(
    server: settings.Server, section: str = "server", *, may_be_handed: bool = False, option: str = ""
) -> socket.socket:
    """The listening socket. Raises SettingsError in words that say which one could not be had, and who asked for it:
    a setting, or an option of the command line."""
    try:
        passed = activated_socket(os.environ, os.getpid(), section, WRITE_DEADLINE) if may_be_handed else None
        return passed or listen(server)
    except OSError as error:
        is_no_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        name = "socket" if server.socket else "host" if is_no_host else "port"
        place = "there" if server.socket else f"on port {server.port}"
        fault = settings.Fault(option or f"{section}.{name}", "", f"cannot listen {place}: {error.strerror or error}")
        raise settings.SettingsError([fault]) from None


# ---- looking ---------------------------------------------------------------------------------------------------------


def run_check(options: argparse.Namespace) -> int:
    chosen = settings.load(options.config, os.environ)
    if options.url:
        check_options(options, chosen)
    elif options.ca_file or options.slow:
        raise settings.SettingsError([settings.Fault("--url", "", "is missing: --ca-file and --slow are about it")])
    told = Printer(as_json=options.json)
    told.add(Finding("ok", "settings", "settings: every value is valid"))
    told.add(*(Finding("warning", "settings", warning) for warning in warnings_about(chosen)))
    told.add(*uvloop.run(check_upstream(chosen)))
    if chosen.limits.is_shared:
        told.add(uvloop.run(check_store(chosen)))
    if options.url:
        found, told.measured = checkup.examine(chosen, options.url, ca_file=options.ca_file, slow=options.slow)
        told.add(*found)
        if not found:
            told.add(Finding("ok", "url", f"{options.url}: {in_words(told.measured)}"))
    told.end()
    return 1 if told.faults else 0


class Printer:
    """What was found so far: lines as they come, or one JSON object at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.findings: list[Finding] = []
        self.measured: checkup.Measured | None = None

    @property
    def faults(self) -> int:
        return sum(finding.level == "fault" for finding in self.findings)

    def add(self, *findings: Finding) -> None:
        self.findings += findings
        for finding in findings if not self.as_json else ():
            print(f"{finding.level:8} {finding.what}")
            for name in ("why", "change"):
                if said := getattr(finding, name):
                    print(f"         {name + ':':7} {said}")

    def end(self) -> None:
        if self.as_json:
            shown = {
                "ok": not self.faults,
                "findings": [dataclasses.asdict(finding) for finding in self.findings],
                "measured": dataclasses.asdict(self.measured) if self.measured else None,
            }
            print(json.dumps(shown, ensure_ascii=False, indent=2))


def in_words(measured: checkup.Measured) -> str:
    """The figures of a public address at which nothing was found."""
    silence = "the longest silence was not tried (--slow)"
    if measured.silence_seconds:
        silence = f"{measured.silence_seconds:g} s of silence are borne"
    return (
        f"events arrive one by one (within {measured.event_delay_ms} ms), "
        f"leaving is known after {measured.leaving_ms} ms; {silence}"
    )


def check_options(options: argparse.Namespace, chosen: settings.Settings) -> None:
    """Raises SettingsError when the public address cannot be looked at."""
    faults = []
    if chosen.session.secret is None:
        faults.append(settings.Fault("session.secret", "", "is needed for --url, and has to be the running server's"))
    if options.ca_file and not settings.holds_certificates(options.ca_file):
        faults.append(settings.Fault("--ca-file", "", "cannot be read, or holds no certificate in PEM format"))
    if faults:
        raise settings.SettingsError(faults)


def warnings_about(chosen: settings.Settings) -> list[str]:
    """What is valid and yet unlikely to be meant."""
    limits, longest = chosen.limits, chosen.policy.max_output_tokens
    found = [
        f"limits.{name} allows less than one answer of policy.max_output_tokens: every question would be refused"
        for name in ("tokens_per_session", "tokens_per_address", "tokens_total")
        if any(rate.amount <= longest for rate in getattr(limits, name))
    ]
    if chosen.session.mode == "oidc" and not (chosen.oidc.allowed_emails or chosen.oidc.allowed_domains):
        found.append("oidc.allowed_emails and oidc.allowed_domains are not set: everybody with an account there may in")
    if not limits.tokens_total:
        found.append("limits.tokens_total is not set: nothing bounds what all visitors together may spend")
    return found


async def check_upstream(chosen: settings.Settings) -> list[Finding]:
    transport = Transport(ssl_context=ssl_context(chosen))
    upstream = Upstream(
        chosen.upstream, transport, user_agent=f"chat-proxy/{__version__}", random=secrets.SystemRandom().random
    )
    try:
        listed = await upstream.probe()
    except Refusal as refusal:
        wanted = "upstream.base_url (all that comes before /chat/completions, mostly ending in /v1) and the key"
        return [Finding("fault", "upstream", f"upstream: {refusal.code} ({refusal.reason}); check {wanted}")]
    finally:
        await transport.aclose()
    found = [Finding("ok", "upstream", "upstream: it answers, and accepts the key")]
    if missing := [name for name in chosen.policy.models if listed and name not in listed]:
        what = f"policy.models: the upstream does not list {', '.join(missing)}"
        found.append(Finding("warning", "models", what, "it may refuse what is asked of such a model"))
    return found


async def check_store(chosen: settings.Settings) -> Finding:
    store = open_store(chosen.limits.store, time.monotonic, lambda lost: None)
    answers = await store.answers()
    await store.aclose()
    if answers:
        return Finding("ok", "store", "limits.store: it answers")
    what = f"limits.store: no answer within {DEADLINE:g} s; check its address, its password, and that it is near"
    return Finding("fault", "store", what)


# ---- making ----------------------------------------------------------------------------------------------------------


def run_new_secret(options: argparse.Namespace) -> int:
    print(new_secret())
    return 0


def new_secret() -> str:
    return secrets.token_urlsafe(32)


def run_hash_password(options: argparse.Namespace) -> int:
    try:
        from proxy.accounts.login.password import hashed  # argon2 is needed here and in its mode only
    except ModuleNotFoundError:
        return complain("hash-password needs packages that are not installed: pip install 'chat-proxy[login]'")
    user = options.user or ""
    try:
        password = password_given()
        (user + password).encode()
    except UnicodeError:
        password = ""
    except ValueError as error:
        return complain(str(error))
    if not password or not re.fullmatch(r"[^:\s]{0,128}", user):
        return complain("wants a password that is not empty, and a user without colons and blanks, both in UTF-8")
    print(f"{user}:{hashed(password)}" if user else hashed(password))
    return 0


def password_given() -> str:
    """What is typed, twice, or the first line of standard input. Raises ValueError, UnicodeError."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    try:
        password = getpass.getpass("Password: ")
        if password != getpass.getpass("Once more: "):
            raise ValueError("the two are not the same")
    except EOFError:  # Ctrl-D
        return ""
    return password


def run_revoke(options: argparse.Namespace) -> int:
    chosen = settings.load(options.config, os.environ)
    control = ControlFile(chosen.session.control_file)
    change, is_new = change_of(options, chosen.session.mode), not control.path.exists()
    control.change(change)
    print(f"Revoked, in {control.path}. Servers that use this file know it within a second.")
    if is_new and not chosen.limits.is_shared:
        print("It was not there before. Does the server use another one? (session.control_file)", file=sys.stderr)
    if options.user and chosen.session.mode == "anonymous":
        print("Nobody has a name in this session.mode, anonymous. Does the server have another one?", file=sys.stderr)
    if chosen.limits.is_shared:
        if not uvloop.run(revoke_in_store(chosen, change)):
            return complain("limits.store does not answer; servers that share it do not know yet")
        print("So do servers that share limits.store.")
    return 0


def change_of(options: argparse.Namespace, mode: str) -> Callable[[RevocationRules], RevocationRules]:
    now = time.time()
    if options.all:
        return lambda rules: rules.revoking_all(now)
    if options.user is not None:
        user = options.user.lower() if mode == "oidc" else options.user
        return lambda rules: rules.revoking_user(user, now)
    return lambda rules: rules.revoking_before(options.before, now)


async def revoke_in_store(chosen: settings.Settings, change: Callable[[RevocationRules], RevocationRules]) -> bool:
    shared = open_store(chosen.limits.store, time.monotonic, lambda lost: None)
    try:
        return await RedisRevocations(shared, chosen.session.lifetime).change(change)
    finally:
        await shared.aclose()


def run_init(options: argparse.Namespace) -> int:
    path = Path(settings.DEFAULT_FILE)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        return complain(f"{path} is there already; it was left as it is")
    except OSError as error:
        return complain(f"{path} cannot be written: {error.strerror}")
    print(f"Wrote {path}. Next: put the key into CHAT_PROXY_UPSTREAM_API_KEY, then `chat-proxy check`.")
    return 0
