"""The command `check`: tries the settings, the upstream, the store and the public address."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import time

import uvloop

from proxy import __version__, settings
from proxy.chat.upstream import Upstream
from proxy.check import prober as checkup
from proxy.check.findings import Finding
from proxy.errors import Refusal
from proxy.limits.store.opening import open_store
from proxy.limits.store.shared import DEADLINE
from proxy.transport.pool import Transport
from proxy.transport.tls import upstream_ssl_context

# ---- looking ---------------------------------------------------------------------------------------------------------


def run_check(options: argparse.Namespace) -> int:
    chosen = settings.load(options.config, os.environ)
    if options.url:
        check_options(options, chosen)
    elif options.ca_file or options.slow:
        raise settings.SettingsError([settings.Fault("--url", "", "must be given with --ca-file and --slow")])
    printer = Printer(as_json=options.json)
    printer.add(Finding("ok", "settings", "settings: every value is valid"))
    printer.add(*(Finding("warning", "settings", warning) for warning in warnings_about(chosen)))
    printer.add(*uvloop.run(check_upstream(chosen)))
    if chosen.limits.is_shared:
        printer.add(uvloop.run(check_store(chosen)))
    if options.url:
        found, printer.measured = checkup.examine(chosen, options.url, ca_file=options.ca_file, slow=options.slow)
        printer.add(*found)
        if not found:
            printer.add(Finding("ok", "url", f"{options.url}: {in_words(printer.measured)}"))
    printer.end()
    return 1 if printer.faults else 0


class Printer:
    """Prints findings: each as a line at once, or all as one JSON object at the end."""

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
                if text := getattr(finding, name):
                    print(f"         {name + ':':7} {text}")

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
        silence = f"{measured.silence_seconds:g} s of silence are possible"
    return (
        f"events arrive one by one (within {measured.event_delay_ms} ms), "
        f"leaving is known after {measured.leaving_ms} ms; {silence}"
    )


def check_options(options: argparse.Namespace, chosen: settings.Settings) -> None:
    """Raises SettingsError when the public address cannot be looked at."""
    faults = []
    if chosen.session.secret is None:
        faults.append(settings.Fault("session.secret", "", "must be set for --url: the running server's secret"))
    if options.ca_file and not settings.holds_certificates(options.ca_file):
        faults.append(settings.Fault("--ca-file", "", "must be a readable file of certificates in PEM format"))
    if faults:
        raise settings.SettingsError(faults)


def warnings_about(chosen: settings.Settings) -> list[str]:
    """Warnings about valid settings that are probably a mistake."""
    limits, longest = chosen.limits, chosen.policy.max_output_tokens
    found = [
        f"limits.{name} allows less than one answer of policy.max_output_tokens: every question would be refused"
        for name in ("tokens_per_session", "tokens_per_address", "tokens_total")
        if any(rate.amount <= longest for rate in getattr(limits, name))
    ]
    if chosen.session.mode == "oidc" and not (chosen.oidc.allowed_emails or chosen.oidc.allowed_domains):
        what = "oidc.allowed_emails and oidc.allowed_domains are not set"
        found.append(f"{what}: every account of the provider may sign in")
    if not limits.tokens_total:
        found.append("limits.tokens_total is not set: the tokens of all visitors together have no limit")
    return found


async def check_upstream(chosen: settings.Settings) -> list[Finding]:
    transport = Transport(ssl_context=upstream_ssl_context(chosen.upstream.ca_file))
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
    try:
        store = open_store(chosen.limits.store, time.monotonic, lambda lost: None)
    except settings.SettingsError as error:
        return Finding("fault", "store", f"limits.store: {error.faults[0].message}")
    answers = await store.answers()
    await store.aclose()
    if answers:
        return Finding("ok", "store", "limits.store: it answers")
    what = f"limits.store: no answer within {DEADLINE:g} s; check its address, its password, and that it is near"
    return Finding("fault", "store", what)
