"""The commands that serve: `serve`, `demo` and `upstream`."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import secrets
import signal
import socket
import sys
from contextlib import ExitStack

import uvloop
from starlette.types import ASGIApp

from proxy import __version__, settings
from proxy.cli.admin import new_secret
from proxy.demo import model as demo
from proxy.demo import request as demo_request
from proxy.server.listener import WRITE_DEADLINE, activated_socket, as_bound, listen
from proxy.server.runner import Uvicorn, uvicorn_for
from proxy.server.service import Service, allow_all_descriptors
from proxy.server.workers import Supervisor
from proxy.server.workers import run_worker as serve_as_worker
from proxy.telemetry.logs import Descriptor, Logs

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
        uvloop.run(serve_as_worker(Service(as_bound(chosen, listener), listener, Logs(chosen.log)), channel))
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
            "POLICY_MODELS": ",".join(demo_request.MODELS),
            "LIMITS_NEW_SESSIONS": "1000/hour",  # every private window of a page's developer is one
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
    """The listening socket. Raises SettingsError with the setting or the command line option that asked for it."""
    try:
        passed = activated_socket(os.environ, os.getpid(), section, WRITE_DEADLINE) if may_be_handed else None
        return passed or listen(server)
    except OSError as error:
        is_no_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        name = "socket" if server.socket else "host" if is_no_host else "port"
        place = "there" if server.socket else f"on port {server.port}"
        fault = settings.Fault(option or f"{section}.{name}", "", f"cannot listen {place}: {error.strerror or error}")
        raise settings.SettingsError([fault]) from None
