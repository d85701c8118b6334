"""The faults of a set of settings: how they are reported, and the rules between several settings.

Rules:
1. A fault names the setting, where its value came from and what would be right. It never shows a value, since people
   put secrets into the wrong variable.
2. What this version cannot do is refused at start, not ignored; so is what is needed and not installed.
3. A rule is not checked when one of its settings has a fault of its own.
"""

from __future__ import annotations

import importlib.util
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from proxy.settings.tables import Metrics, Server, Settings, Upstream
from proxy.settings.values import is_loopback

LOGIN_PACKAGES = {"password": "argon2", "oidc": "joserfc"}
TRACES_PACKAGE = "opentelemetry.exporter.otlp.proto.http"  # brings the others that are needed


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, in a text for the operator."""

    setting: str
    source: str
    message: str

    def __str__(self) -> str:
        where = f" (from {self.source})" if self.source else ""
        return f"{self.setting}{where}: {self.message}"


class SettingsError(Exception):
    """All faults of one set of settings."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("\n".join(map(str, faults)))


def refused_by_opentelemetry(error: Exception) -> SettingsError:
    """The fault of the OTEL_* variables, which OpenTelemetry reads itself: their names only (rule 1)."""
    named = ", ".join(re.findall(r"OTEL_[A-Z_]+", str(error))) or "OTEL_*"
    message = f"OpenTelemetry cannot use its variables: {named} ({type(error).__name__})"
    return SettingsError([Fault("traces.enabled", "environment", message)])


# ---- of several settings together --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CrossRule:
    """A fault that shows only when several settings are seen together; `needs` must be free of faults of their own."""

    setting: str
    needs: tuple[str, ...]
    holds: Callable[[Settings], bool]
    message: str


def exposes_key(upstream: Upstream) -> bool:
    host = urlsplit(upstream.base_url).hostname or ""
    return upstream.base_url.startswith("http://") and not upstream.allow_http and not is_loopback(host)


def holds_certificates(file: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except (OSError, ValueError):  # ssl.SSLError is the one, a NUL in the name the other
        return False
    return True


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False


def address(listening: Server | Metrics) -> tuple[str, int]:
    return listening.host, listening.port


CONTRADICTIONS = (
    CrossRule(
        "server.public_url",
        ("server.public_url",),
        lambda s: not s.server.is_https and not s.server.is_local,
        "must be https, unless it is a loopback address: a session cookie over plain http can be stolen",
    ),
    CrossRule(
        "session.secret",
        ("server.public_url", "session.secret"),
        lambda s: s.session.secret is None and not s.server.is_local,
        "is required when public_url is not loopback; `chat-proxy new-secret` makes one for CHAT_PROXY_SESSION_SECRET",
    ),
    CrossRule(
        "session.passwords",
        ("session.mode", "session.passwords"),
        lambda s: s.session.mode == "password" and s.session.passwords is None,
        "is required in this mode; `chat-proxy hash-password` makes lines for the file that "
        "CHAT_PROXY_SESSION_PASSWORDS_FILE names",
    ),
    *(
        CrossRule(
            f"oidc.{name}",
            ("session.mode", f"oidc.{name}"),
            lambda s, name=name: s.session.mode == "oidc" and not getattr(s.oidc, name),  # type: ignore[misc]
            f"is required in this mode; the provider gives it when the application is registered there{place}",
        )
        for name, place in (("issuer", ""), ("client_id", ""), ("client_secret", ", for CHAT_PROXY_OIDC_CLIENT_SECRET"))
    ),
    CrossRule(
        "oidc.issuer",
        ("oidc.issuer",),
        lambda s: s.oidc.issuer.startswith("http://") and not is_loopback(urlsplit(s.oidc.issuer).hostname or ""),
        "must be https: an attacker on the network could impersonate any user",
    ),
    CrossRule(
        "session.mode",
        ("session.mode",),
        lambda s: s.session.mode in LOGIN_PACKAGES and not is_installed(LOGIN_PACKAGES[s.session.mode]),
        "needs packages that are not installed: pip install 'chat-proxy[login]'",
    ),
    CrossRule(
        "server.workers",
        ("server.workers", "limits.store"),
        lambda s: s.server.workers > 1 and not s.limits.is_shared,
        "must be used with limits.store on Redis or SQLite when it is more than one: each worker would allow the whole "
        "of every limit, and a logout would be known to one of them only",
    ),
    CrossRule(
        "limits.store",
        ("limits.store",),
        lambda s: s.limits.is_on_redis and not is_installed("redis"),
        "needs packages that are not installed: pip install 'chat-proxy[redis]'",
    ),
    CrossRule(
        "traces.enabled",
        ("traces.enabled",),
        lambda s: s.traces.enabled and not is_installed(TRACES_PACKAGE),
        "needs packages that are not installed: pip install 'chat-proxy[otel]'",
    ),
    CrossRule(
        "traces.propagate",
        ("traces.enabled", "traces.propagate"),
        lambda s: s.traces.propagate and not s.traces.enabled,
        "must be used with traces.enabled: without it there is no span to send",
    ),
    CrossRule(
        "upstream.base_url",
        ("upstream.base_url", "upstream.allow_http"),
        lambda s: exposes_key(s.upstream),
        "must be https: plain http would show the key to the network (upstream.allow_http = true permits it)",
    ),
    CrossRule(
        "upstream.ca_file",
        ("upstream.ca_file",),
        lambda s: bool(s.upstream.ca_file) and not holds_certificates(s.upstream.ca_file),
        "cannot be read, or holds no certificate in PEM format",
    ),
    CrossRule(
        "policy.models",
        ("policy.models",),
        lambda s: not s.policy.models or not all(s.policy.models),
        "is empty, or one of its names is; name at least one model",
    ),
    CrossRule(
        "server.static_dir",
        ("server.static_dir",),
        lambda s: bool(s.server.static_dir) and not Path(s.server.static_dir or "").is_dir(),
        "is not a folder",
    ),
    CrossRule(
        "session.idle",
        ("session.idle", "session.lifetime"),
        lambda s: s.session.idle > s.session.lifetime,
        "is longer than session.lifetime",
    ),
    CrossRule(
        "metrics.port",
        ("metrics.port", "metrics.host", "server.port", "server.host"),
        lambda s: bool(s.metrics.port) and not s.server.socket and address(s.metrics) == address(s.server),
        "is what server.port is; the metrics have a listener of their own",
    ),
)


def contradictions(settings: Settings, faulty: set[str], sources: Mapping[str, str]) -> list[Fault]:
    return [
        Fault(rule.setting, sources.get(rule.setting, ""), rule.message)
        for rule in CONTRADICTIONS
        if faulty.isdisjoint(rule.needs) and rule.holds(settings)
    ]
