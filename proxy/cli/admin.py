"""The commands of an operator: secrets, passwords, sessions, and the first settings file."""

from __future__ import annotations

import argparse
import getpass
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from proxy import settings
from proxy.accounts.revocation.file import ControlFile
from proxy.accounts.revocation.rules import RevocationRules
from proxy.accounts.revocation.shared import SharedRevocations
from proxy.cli.output import complain
from proxy.limits.store.opening import open_store

TEMPLATE = """\
# chat-proxy: every setting is described in docs/settings.md. Secrets do not belong in this file:
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
# tokens_total = "5000000/month"            # the most that all clients together may use
"""


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
        return complain("the password must not be empty, the user without colons and blanks, both in UTF-8")
    print(f"{user}:{hashed(password)}" if user else hashed(password))
    return 0


def password_given() -> str:
    """The password: typed twice, or the first line of standard input. Raises ValueError, UnicodeError."""
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
    print(f"Revoked, in {control.path}. Servers with this control file apply it within a second.")
    if is_new and not chosen.limits.is_shared:
        print("The file is new. Does the server use another one (session.control_file)?", file=sys.stderr)
    if options.user and chosen.session.mode == "anonymous":
        print("session.mode is anonymous: sessions have no user. Does the server use another?", file=sys.stderr)
    if chosen.limits.is_shared:
        if not uvloop.run(revoke_in_store(chosen, change)):
            return complain("limits.store does not answer; servers that share it do not apply it yet")
        print("Servers that share limits.store apply it as well.")
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
        return await SharedRevocations(shared, chosen.session.lifetime).change(change)
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
