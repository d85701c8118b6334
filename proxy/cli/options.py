"""The options of the command line, and the types of their values."""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from proxy import __version__, settings
from proxy.cli.admin import run_hash_password, run_init, run_new_secret, run_revoke
from proxy.cli.check import run_check
from proxy.cli.serve import run_demo, run_serve, run_upstream


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
    command.add_argument("user", nargs="?", help="without it: one password for all users")
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
    """Without a command the help is printed."""
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
            raise ValueError  # from an empty shell variable, it would revoke no session
        return written


@contextmanager
def wanting(what: str) -> Iterator[None]:
    """Reports what a value must be; argparse would name the function instead."""
    try:
        yield
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be {what}") from None
