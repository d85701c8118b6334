"""Every setting with its type and its default.

Rules:
1. A section is a table and a setting a line of it, under the name that it has in the file and, in capitals, in the
   environment. A setting is read, checked and reported by its own line alone.
2. Names stay: people's files hold them.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any, get_type_hints
from urllib.parse import urlsplit

from proxy.settings.values import (
    Network,
    Rate,
    Secret,
    base_url,
    boolean,
    choice,
    converted,
    header_name,
    header_word,
    is_loopback,
    issuer,
    key_text,
    listening_host,
    origin,
    password_lines,
    peer,
    rates,
    seconds,
    secret,
    session_keys,
    setting,
    store,
    text,
    texts,
    whole,
)


@dataclass(frozen=True, slots=True)
class Server:
    host: str = setting(converted(listening_host), "127.0.0.1")
    port: int = setting(whole(0, 65535), 8000)
    socket: str = setting(text, "")
    workers: int = setting(whole(1, 64), 1)
    public_url: str = setting(converted(origin), "")
    extra_origins: tuple[str, ...] = setting(texts(origin), ())
    trusted_proxies: tuple[Network | str, ...] = setting(
        texts(peer), (ipaddress.ip_network("127.0.0.1/32"), ipaddress.ip_network("::1/128"))
    )
    max_streams: int = setting(whole(1, 1_000_000), 1000)
    max_body_bytes: int = setting(whole(1024, 1 << 30), 1 << 20)
    drain_seconds: float = setting(seconds(0, 3600), 30.0)
    comment_seconds: float = setting(seconds(0, 3600), 0.0)
    keep_alive_seconds: float = setting(seconds(1, 3600), 75.0)
    connections_per_address: int = setting(whole(1, 1_000_000), 100)
    static_dir: str | None = setting(text, None)

    @property
    def is_https(self) -> bool:
        return self.public_url.startswith("https://")

    @property
    def is_local(self) -> bool:
        return is_loopback(urlsplit(self.public_url).hostname or "")


@dataclass(frozen=True, slots=True)
class Upstream:
    base_url: str = setting(converted(base_url))
    api_key: Secret = secret(key_text, required=True)
    auth_header: str = setting(converted(header_name), "Authorization")
    auth_scheme: str = setting(converted(header_word), "Bearer")
    connect_timeout: float = setting(seconds(0.05, 600), 5.0)
    first_byte_timeout: float = setting(seconds(0.05, 3600), 60.0)
    idle_timeout: float = setting(seconds(0.05, 3600), 60.0)
    total_timeout: float = setting(seconds(0.05, 86400), 600.0)
    retries: int = setting(whole(0, 10), 2)
    ca_file: str = setting(text, "")
    allow_http: bool = setting(boolean, False)


@dataclass(frozen=True, slots=True)
class Session:
    mode: str = setting(choice("anonymous", "password", "oidc", "header"), "anonymous")
    passwords: Secret | None = secret(password_lines, required=False)
    secret: Secret | None = secret(session_keys, required=False)
    control_file: str = setting(text, "")
    lifetime: int = setting(whole(60, 365 * 86400), 604800)
    idle: int = setting(whole(60, 365 * 86400), 86400)


@dataclass(frozen=True, slots=True)
class Oidc:
    issuer: str = setting(converted(issuer), "")
    client_id: str = setting(text, "")
    client_secret: Secret | None = secret(key_text, required=False)
    scopes: tuple[str, ...] = setting(texts(), ("openid", "email"))
    allowed_emails: tuple[str, ...] = setting(texts(str.lower), ())
    allowed_domains: tuple[str, ...] = setting(texts(str.lower), ())


@dataclass(frozen=True, slots=True)
class Header:
    name: str = setting(converted(header_name), "X-Forwarded-Email")


@dataclass(frozen=True, slots=True)
class Policy:
    models: tuple[str, ...] = setting(texts())
    force_model: bool = setting(boolean, False)
    max_output_tokens: int = setting(whole(1, 10_000_000), 4096)
    output_limit_field: str = setting(choice("max_tokens", "max_completion_tokens"), "max_tokens")
    max_messages: int = setting(whole(1, 100_000), 200)
    max_input_chars: int = setting(whole(1, 100_000_000), 200_000)
    system_prompt: str = setting(text, "")
    lock_system: bool = setting(boolean, False)
    allow: tuple[str, ...] = setting(
        texts(),
        (
            *("temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "response_format"),
            *("stream_options", "max_tokens", "max_completion_tokens", "reasoning_effort", "user"),
        ),
    )
    allow_image_urls: str = setting(choice("none", "data", "https"), "data")


@dataclass(frozen=True, slots=True)
class Limits:
    per_session: tuple[Rate, ...] = setting(converted(rates), rates("20/minute;500/day"))
    per_address: tuple[Rate, ...] = setting(converted(rates), rates("60/minute;2000/day"))
    refusals_per_address: tuple[Rate, ...] = setting(converted(rates), rates("120/minute"))
    new_sessions: tuple[Rate, ...] = setting(converted(rates), rates("30/hour"))
    streams_per_session: int = setting(whole(1, 1_000_000), 3)
    streams_per_address: int = setting(whole(1, 1_000_000), 20)
    tokens_per_session: tuple[Rate, ...] = setting(converted(rates), rates("200000/day"))
    tokens_per_address: tuple[Rate, ...] = setting(converted(rates), rates("1000000/day"))
    tokens_total: tuple[Rate, ...] = setting(converted(rates), rates(""))
    exact_usage: bool = setting(boolean, False)
    store: str = setting(converted(store), "memory://")
    when_store_fails: str = setting(choice("local", "refuse"), "local")

    @property
    def is_shared(self) -> bool:
        return self.store != "memory://"

    @property
    def is_on_redis(self) -> bool:
        return self.is_shared and not self.store.startswith("sqlite://")


@dataclass(frozen=True, slots=True)
class Metrics:
    host: str = setting(converted(listening_host), "127.0.0.1")
    port: int = setting(whole(0, 65535), 0)


@dataclass(frozen=True, slots=True)
class Traces:
    enabled: bool = setting(boolean, False)
    propagate: bool = setting(boolean, False)


@dataclass(frozen=True, slots=True)
class Log:
    format: str = setting(choice("json", "text"), "json")
    level: str = setting(choice("debug", "info", "warning", "error"), "info")


@dataclass(frozen=True, slots=True)
class Settings:
    server: Server
    upstream: Upstream
    session: Session
    oidc: Oidc
    header: Header
    policy: Policy
    limits: Limits
    metrics: Metrics
    traces: Traces
    log: Log


SECTIONS: dict[str, type[Any]] = get_type_hints(Settings)
