"""Settings: what every kind of value accepts, where each comes from, and that all faults are told and no secret is."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import certifi
import pytest
from support.harness import random_key

from proxy import settings
from proxy.settings import REQUIRED, SECTIONS, Fault, Rate, Secret, Settings, SettingsError
from proxy.settings.faults import TRACES_PACKAGE, is_installed

KEY = random_key()
BASE_URL = "https://api.example.com/v1"
REQUIRED_SETTINGS = {"UPSTREAM_BASE_URL": BASE_URL, "UPSTREAM_API_KEY": KEY, "POLICY_MODELS": "m"}
PUBLIC = {"SERVER_PUBLIC_URL": "https://chat.example.org", "SESSION_SECRET": "s" * 43}
ISSUER = "https://id.example.org/"
HASH = "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$aGFzaGhhc2hoYXNo"
NOBODY = 65534  # a user that may not read what root hides


def variables(changes: dict[str, str]) -> dict[str, str]:
    return {f"CHAT_PROXY_{name}": value for name, value in {**REQUIRED_SETTINGS, **changes}.items()}


def from_env(**changes: str) -> Settings:
    return settings.from_variables(variables(changes))


def from_toml(tmp_path: Path, text: str, **changes: str) -> Settings:
    """The settings of a file that holds `text`; what is required comes from the environment."""
    file = tmp_path / "given.toml"
    file.write_text(text, encoding="utf-8")
    return settings.load(str(file), variables(changes))


def value_of(chosen: Settings, name: str) -> Any:
    section, _, setting = name.partition(".")
    return getattr(getattr(chosen, section), setting)


def variable(name: str) -> str:
    """server.port -> SERVER_PORT"""
    return name.replace(".", "_").upper()


def toml_line(name: str, value: object) -> str:
    """JSON's texts, numbers, booleans and lists are TOML's too."""
    section, _, setting = name.partition(".")
    return f"[{section}]\n{setting} = {json.dumps(value, ensure_ascii=False)}\n"


@contextmanager
def refused(*names: str) -> Iterator[list[Fault]]:
    """The body raises SettingsError with faults about exactly these settings, in any order."""
    faults: list[Fault] = []
    with pytest.raises(SettingsError) as caught:
        yield faults
    faults += caught.value.faults
    assert sorted(fault.setting for fault in faults) == sorted(names)


# ---- the contract -----------------------------------------------------------------------------------------------

CONTRACT: dict[str, Any] = {
    "server.host": "127.0.0.1",
    "server.port": 8000,
    "server.socket": "",
    "server.workers": 1,
    "server.public_url": "http://127.0.0.1:8000",
    "server.extra_origins": (),
    "server.trusted_proxies": (ip_network("127.0.0.1/32"), ip_network("::1/128")),
    "server.max_streams": 1000,
    "server.max_body_bytes": 1048576,
    "server.drain_seconds": 30,
    "server.comment_seconds": 0,
    "server.keep_alive_seconds": 75,
    "server.connections_per_address": 100,
    "server.static_dir": None,
    "upstream.base_url": REQUIRED,
    "upstream.api_key": REQUIRED,
    "upstream.auth_header": "Authorization",
    "upstream.auth_scheme": "Bearer",
    "upstream.connect_timeout": 5,
    "upstream.first_byte_timeout": 60,
    "upstream.idle_timeout": 60,
    "upstream.total_timeout": 600,
    "upstream.retries": 2,
    "upstream.ca_file": "",
    "upstream.allow_http": False,
    "session.mode": "anonymous",
    "session.secret": None,
    "session.passwords": None,
    "session.control_file": "",
    "session.lifetime": 604800,
    "session.idle": 86400,
    "oidc.issuer": "",
    "oidc.client_id": "",
    "oidc.client_secret": None,
    "oidc.scopes": ("openid", "email"),
    "oidc.allowed_emails": (),
    "oidc.allowed_domains": (),
    "header.name": "X-Forwarded-Email",
    "policy.models": REQUIRED,
    "policy.force_model": False,
    "policy.max_output_tokens": 4096,
    "policy.output_limit_field": "max_tokens",
    "policy.max_messages": 200,
    "policy.max_input_chars": 200000,
    "policy.system_prompt": "",
    "policy.lock_system": False,
    "policy.allow": (
        *("temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "response_format"),
        *("stream_options", "max_tokens", "max_completion_tokens", "reasoning_effort", "user"),
    ),
    "policy.allow_image_urls": "data",
    "limits.per_session": (Rate(20, 60, "20/minute"), Rate(500, 86400, "500/day")),
    "limits.per_address": (Rate(60, 60, "60/minute"), Rate(2000, 86400, "2000/day")),
    "limits.refusals_per_address": (Rate(120, 60, "120/minute"),),
    "limits.new_sessions": (Rate(30, 3600, "30/hour"),),
    "limits.streams_per_session": 3,
    "limits.streams_per_address": 20,
    "limits.tokens_per_session": (Rate(200000, 86400, "200000/day"),),
    "limits.tokens_per_address": (Rate(1000000, 86400, "1000000/day"),),
    "limits.tokens_total": (),
    "limits.exact_usage": False,
    "limits.store": "memory://",
    "limits.when_store_fails": "local",
    "metrics.host": "127.0.0.1",
    "metrics.port": 0,
    "traces.enabled": False,
    "traces.propagate": False,
    "log.format": "json",
    "log.level": "info",
}


def test_every_name_of_the_contract_has_its_default() -> None:
    """The settings are those of the contract, no more and no fewer, and unset each has the default stated there."""
    chosen = from_env()
    found = {
        f"{section}.{spec.name}": REQUIRED if spec.default is REQUIRED else value_of(chosen, f"{section}.{spec.name}")
        for section, table in SECTIONS.items()
        for spec in dataclasses.fields(table)
    }
    assert found == CONTRACT


def test_what_is_required_is_said() -> None:
    """With nothing set, each required setting is named, with the variable that sets it; nothing else is a fault."""
    with refused("upstream.base_url", "upstream.api_key", "policy.models") as faults:
        settings.from_variables({})
    for fault in faults:
        assert "is required" in fault.message
        assert f"CHAT_PROXY_{variable(fault.setting)}" in fault.message


# ---- kinds of values --------------------------------------------------------------------------------------------

FROM_THE_ENVIRONMENT: dict[str, tuple[str, str, object]] = {
    "whole number": ("server.max_streams", "17", 17),
    "whole number in blanks": ("server.max_streams", " 17 ", 17),
    "lowest port": ("metrics.port", "0", 0),
    "highest port": ("metrics.port", "65535", 65535),
    "seconds": ("upstream.idle_timeout", "2", 2.0),
    "seconds with a fraction": ("upstream.idle_timeout", "0.25", 0.25),
    "true": ("policy.force_model", "true", True),
    "1": ("policy.force_model", "1", True),
    "false": ("policy.force_model", "false", False),
    "0": ("policy.force_model", "0", False),
    "boolean in blanks": ("policy.force_model", " true ", True),
    "text as it is": ("policy.system_prompt", "  Be brief, please. ", "  Be brief, please. "),
    "empty text": ("policy.system_prompt", "", ""),
    "list": ("policy.models", "a,b", ("a", "b")),
    "list in blanks": ("policy.models", " a , b ,", ("a", "b")),
    "list that repeats": ("policy.models", "a,b,a", ("a", "b")),
    "empty list": ("policy.allow", "", ()),
    "list of nothing": ("server.extra_origins", " , ", ()),
    "no proxy at all": ("server.trusted_proxies", "", ()),
    "networks": ("server.trusted_proxies", "10.0.0.0/8, unix", (ip_network("10.0.0.0/8"), "unix")),
    "one address": ("server.trusted_proxies", "10.1.2.3", (ip_network("10.1.2.3/32"),)),
    "network with host bits": ("server.trusted_proxies", "10.1.2.3/8", (ip_network("10.0.0.0/8"),)),
    "choice": ("log.level", "error", "error"),
    "choice in blanks": ("log.level", " error ", "error"),
    "no page": ("server.static_dir", "", ""),
    "no limit": ("limits.per_session", "", ()),
    "header": ("upstream.auth_header", "api-key", "api-key"),
    "no scheme": ("upstream.auth_scheme", "", ""),
    "host in blanks": ("server.host", " ::1 ", "::1"),
    "host with a zone": ("server.host", "fe80::1%eth0", "fe80::1%eth0"),
    "host by name": ("server.host", "localhost", "localhost"),
    "one worker": ("server.workers", "1", 1),
    "exact usage": ("limits.exact_usage", "true", True),
    "no store": ("limits.store", "memory://", "memory://"),
    "redis": ("limits.store", "redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
    "redis over TLS": ("limits.store", "rediss://:pw@a.example", "rediss://:pw@a.example"),
    "redis at a path": ("limits.store", "unix:///run/redis.sock?db=1", "redis+unix:///run/redis.sock?db=1"),
    "sentinels": ("limits.store", "redis+sentinel://a:1,b:2/main", "redis+sentinel://a:1,b:2/main"),
}


@pytest.mark.parametrize("label", FROM_THE_ENVIRONMENT)
def test_environment_value(label: str) -> None:
    """Each kind of value is read from its variable: blanks go, lists split on commas, an empty text sets to empty."""
    name, written, wanted = FROM_THE_ENVIRONMENT[label]
    assert value_of(from_env(**{variable(name): written}), name) == wanted


NOT_FROM_THE_ENVIRONMENT: dict[str, tuple[str, str]] = {
    "word for a number": ("server.max_streams", "many"),
    "fraction for a whole number": ("server.max_streams", "1.5"),
    "empty number": ("server.port", ""),
    "5000 digits": ("server.port", "9" * 5000),
    "word for seconds": ("upstream.idle_timeout", "1m"),
    "nan": ("upstream.idle_timeout", "nan"),
    "infinity": ("upstream.total_timeout", "inf"),
    "yes": ("policy.force_model", "yes"),
    "on": ("policy.force_model", "on"),
    "2": ("policy.force_model", "2"),
    "empty boolean": ("policy.force_model", ""),
    "unknown choice": ("log.level", "verbose"),
    "empty choice": ("log.format", ""),
    "choice in other letters": ("log.level", "INFO"),
    "header with a colon": ("upstream.auth_header", "Authorization:"),
    "empty header": ("upstream.auth_header", ""),
    "header of two lines": ("upstream.auth_header", "X-A\r\nX-B"),
    "scheme of two words": ("upstream.auth_scheme", "Bearer token"),
    "wildcard for a proxy": ("server.trusted_proxies", "*"),
    "name for a proxy": ("server.trusted_proxies", "nginx"),
    "empty host": ("server.host", ""),
    "host with a label too long": ("server.host", f"{'a' * 64}.example"),
    "host with an empty label": ("server.host", "a..example"),
    "host of two words": ("server.host", "127.0.0.1 8000"),
    "empty metrics host": ("metrics.host", " "),
    "no worker": ("server.workers", "0"),
    "a store with a strange port": ("limits.store", "redis://:pw@a.example:6379a/0"),
    "a store with a strange number": ("limits.store", "redis://a.example/db"),
    "sentinels without a name": ("limits.store", "redis+sentinel://a.example:26379"),
    "unknown store": ("limits.store", "memcached://127.0.0.1"),
    "unknown mode": ("session.mode", "open"),
    "not UTF-8": ("policy.system_prompt", "caf\udce9"),
}


@pytest.mark.parametrize("label", NOT_FROM_THE_ENVIRONMENT)
def test_environment_value_refused(label: str) -> None:
    """A value that its kind refuses is one fault, which names setting and variable and says what would be right."""
    name, written = NOT_FROM_THE_ENVIRONMENT[label]
    with refused(name) as faults:
        from_env(**{variable(name): written})
    assert faults[0].source == f"environment variable CHAT_PROXY_{variable(name)}"
    assert faults[0].message


RANGES: dict[str, tuple[float, float]] = {
    "server.port": (0, 65535),
    "server.workers": (1, 64),
    "server.max_streams": (1, 1_000_000),
    "server.max_body_bytes": (1024, 1 << 30),
    "server.drain_seconds": (0, 3600),
    "server.comment_seconds": (0, 3600),
    "server.keep_alive_seconds": (1, 3600),
    "server.connections_per_address": (1, 1_000_000),
    "upstream.connect_timeout": (0.05, 600),
    "upstream.first_byte_timeout": (0.05, 3600),
    "upstream.idle_timeout": (0.05, 3600),
    "upstream.total_timeout": (0.05, 86400),
    "upstream.retries": (0, 10),
    "session.lifetime": (60, 31536000),
    "session.idle": (60, 31536000),
    "policy.max_output_tokens": (1, 10_000_000),
    "policy.max_messages": (1, 100_000),
    "policy.max_input_chars": (1, 100_000_000),
    "limits.streams_per_session": (1, 1_000_000),
    "limits.streams_per_address": (1, 1_000_000),
    "metrics.port": (0, 65535),
}


def test_every_number_has_a_range() -> None:
    """No number of the contract is left without bounds."""
    numbers = {name for name, default in CONTRACT.items() if type(default) is int}
    assert numbers == RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
def test_range(name: str, tmp_path: Path) -> None:
    """A number is accepted at both its bounds and refused beyond them, and the fault tells the bounds."""
    lowest, highest = RANGES[name]
    wide = {  # or one could not reach its bound without the other
        "SESSION_LIFETIME": "31536000",
        "SESSION_IDLE": "60",
        "LIMITS_STORE": "redis://127.0.0.1/0",
    }
    others = {key: written for key, written in wide.items() if key != variable(name)}
    for value in (lowest, highest):
        assert value_of(from_env(**others, **{variable(name): f"{value}"}), name) == value
        assert value_of(from_toml(tmp_path, toml_line(name, value), **others), name) == value
    for value in (lowest - 1, highest + 1):
        with refused(name) as faults:
            from_env(**{variable(name): f"{value}"})
        assert f"from {lowest:g} to " in faults[0].message
        with refused(name):
            from_toml(tmp_path, toml_line(name, value))


FROM_TOML: dict[str, tuple[str, object, object]] = {
    "whole number": ("server.max_streams", 17, 17),
    "seconds as a whole number": ("upstream.idle_timeout", 2, 2.0),
    "seconds with a fraction": ("upstream.idle_timeout", 0.25, 0.25),
    "boolean": ("policy.force_model", True, True),
    "text": ("policy.system_prompt", "Be brief.", "Be brief."),
    "text in other letters": ("policy.system_prompt", "ሰላም", "ሰላም"),
    "list": ("policy.allow", ["tools", "n", "tools"], ("tools", "n")),
    "empty list": ("policy.allow", [], ()),
    "networks": ("server.trusted_proxies", ["10.0.0.0/8", "unix"], (ip_network("10.0.0.0/8"), "unix")),
    "choice": ("policy.allow_image_urls", "none", "none"),
    "rates": ("limits.per_session", "5/hour", (Rate(5, 3600, "5/hour"),)),
    "no limit": ("limits.per_session", "", ()),
    "origins": ("server.extra_origins", ["HTTP://Localhost:5173/"], ("http://localhost:5173",)),
}


@pytest.mark.parametrize("label", FROM_TOML)
def test_toml_value(label: str, tmp_path: Path) -> None:
    """Each kind of value is read from the file."""
    name, written, wanted = FROM_TOML[label]
    assert value_of(from_toml(tmp_path, toml_line(name, written)), name) == wanted


NOT_FROM_TOML: dict[str, tuple[str, object]] = {
    "text for a number": ("server.port", "8000"),
    "fraction for a number": ("server.port", 8000.0),
    "boolean for a number": ("server.max_streams", True),
    "text for seconds": ("upstream.idle_timeout", "60"),
    "boolean for seconds": ("upstream.idle_timeout", True),
    "list for seconds": ("upstream.idle_timeout", [60]),
    "number for a boolean": ("policy.force_model", 1),
    "text for a boolean": ("policy.force_model", "true"),
    "number for a text": ("policy.system_prompt", 5),
    "list for a text": ("policy.system_prompt", ["a"]),
    "text for a list": ("policy.allow", "tools"),
    "number in a list": ("policy.allow", ["tools", 1]),
    "list in a list": ("policy.allow", [["tools"]]),
    "number for a choice": ("log.level", 10),
    "list for a choice": ("log.level", ["info"]),
    "number for a rate": ("limits.per_session", 20),
    "number for a URL": ("server.public_url", 8000),
    "bad one in a list of origins": ("server.extra_origins", ["https://a.example.org", "b.example.org"]),
}


@pytest.mark.parametrize("label", NOT_FROM_TOML)
def test_toml_value_refused(label: str, tmp_path: Path) -> None:
    """A value of the wrong type is one fault, which names the setting and the file: nothing is converted by guess."""
    name, written = NOT_FROM_TOML[label]
    with refused(name) as faults:
        from_toml(tmp_path, toml_line(name, written))
    assert faults[0].source == str(tmp_path / "given.toml")


def test_infinity_and_dates_of_toml_are_refused(tmp_path: Path) -> None:
    """What TOML has and JSON has not is a wrong type, not a crash."""
    written = "[upstream]\nidle_timeout = inf\ntotal_timeout = 12:00:00\nretries = 2026-01-01\n"
    written += "[policy]\nsystem_prompt = {a = 1}\n"
    with refused("upstream.idle_timeout", "upstream.total_timeout", "upstream.retries", "policy.system_prompt"):
        from_toml(tmp_path, written)


# ---- values with a shape ------------------------------------------------------------------------------------------

ORIGINS: dict[str, tuple[str, str | None]] = {
    "https": ("https://chat.example.org", "https://chat.example.org"),
    "slash at the end": ("https://chat.example.org/", "https://chat.example.org"),
    "blanks around": (" https://chat.example.org ", "https://chat.example.org"),
    "capitals": ("HTTPS://Chat.Example.ORG", "https://chat.example.org"),
    "the usual port": ("https://chat.example.org:443", "https://chat.example.org"),
    "another port": ("https://chat.example.org:8443", "https://chat.example.org:8443"),
    "loopback over http": ("http://localhost:5173", "http://localhost:5173"),
    "the usual port of http": ("http://127.0.0.1:80", "http://127.0.0.1"),
    "443 over http": ("http://127.0.0.1:443", "http://127.0.0.1:443"),
    "IPv6": ("http://[::1]:8000", "http://[::1]:8000"),
    "IPv6 at length": ("http://[0:0:0:0:0:0:0:1]:8000", "http://[::1]:8000"),
    "name in its ASCII form": ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
    "empty": ("", None),
    "no scheme": ("chat.example.org", None),
    "other scheme": ("ws://chat.example.org", None),
    "no host": ("https://", None),
    "only a port": ("https://:443", None),
    "path": ("https://chat.example.org/chat", None),
    "query": ("https://chat.example.org/?a=1", None),
    "fragment": ("https://chat.example.org/#a", None),
    "user": ("https://user@chat.example.org", None),
    "password": ("https://user:password@chat.example.org", None),
    "port zero": ("https://chat.example.org:0", None),
    "port out of range": ("https://chat.example.org:99999", None),
    "word for a port": ("https://chat.example.org:http", None),
    "wildcard": ("https://*.example.org", None),
    "two origins": ("https://a.example.org https://b.example.org", None),
    "blank in the host": ("https://chat example.org", None),
    "backslash": ("https://chat.example.org\\evil", None),
    "name in other letters": ("https://bücher.example", None),
    "half an IPv6": ("http://[::1", None),
    "IPv6 with a zone": ("http://[fe80::1%25eth0]", None),
    "null": ("null", None),
}


@pytest.mark.parametrize("label", ORIGINS)
def test_origin(label: str) -> None:
    """public_url becomes what a browser writes as Origin, or is refused: nothing that no browser could ever send."""
    written, wanted = ORIGINS[label]
    given = {**PUBLIC, "SERVER_PUBLIC_URL": written}
    if wanted is None:
        with refused("server.public_url"):
            from_env(**given)
    else:
        assert from_env(**given).server.public_url == wanted
        assert from_env(SERVER_EXTRA_ORIGINS=f"{written},{written}").server.extra_origins == (wanted,)


BASE_URLS: dict[str, tuple[str, str | None]] = {
    "https": ("https://api.example.com/v1", "https://api.example.com/v1"),
    "slash at the end": ("https://api.example.com/v1/", "https://api.example.com/v1"),
    "blanks around": (" https://api.example.com/v1\n", "https://api.example.com/v1"),
    "no path": ("https://api.example.com", "https://api.example.com"),
    "port": ("https://api.example.com:8443/v1", "https://api.example.com:8443/v1"),
    "scheme in capitals": ("HTTPS://api.example.com/v1", "https://api.example.com/v1"),
    "http on loopback": ("http://127.0.0.1:9000/v1", "http://127.0.0.1:9000/v1"),
    "http on loopback by name": ("http://localhost:9000/v1", "http://localhost:9000/v1"),
    "http on loopback, IPv6": ("http://[::1]:9000/v1", "http://[::1]:9000/v1"),
    "plain http": ("http://api.example.com/v1", None),
    "plain http in capitals": ("HTTP://api.example.com/v1", None),
    "plain http, a name like loopback": ("http://127.0.0.1.example.com/v1", None),
    "plain http, private address": ("http://10.0.0.5/v1", None),
    "empty": ("", None),
    "no scheme": ("api.example.com/v1", None),
    "other scheme": ("ftp://api.example.com/v1", None),
    "no host": ("https:///v1", None),
    "user": ("https://user:password@api.example.com/v1", None),
    "query": ("https://api.example.com/v1?key=1", None),
    "empty query": ("https://api.example.com/v1?", None),
    "fragment": ("https://api.example.com/v1#", None),
    "port zero": ("https://api.example.com:0/v1", None),
    "port out of range": ("https://api.example.com:65536/v1", None),
    "blank in the host": ("https://api example.com/v1", None),
    "blank in the path": ("https://api.example.com/v 1", None),
    "two lines": ("https://api.example.com/v1\n/x", None),
    "other letters": ("https://api.example.com/é", None),
    "backslash": ("https://api.example.com\\v1", None),
}


@pytest.mark.parametrize("label", BASE_URLS)
def test_base_url(label: str) -> None:
    """base_url is a URL that can be called, over https or to this machine, whatever way it is written."""
    written, wanted = BASE_URLS[label]
    if wanted is None:
        with refused("upstream.base_url"):
            from_env(UPSTREAM_BASE_URL=written)
    else:
        assert from_env(UPSTREAM_BASE_URL=written).upstream.base_url == wanted


def test_http_to_another_machine_when_allowed() -> None:
    """upstream.allow_http permits plain http, and nothing but it does."""
    chosen = from_env(UPSTREAM_BASE_URL="http://10.0.0.5/v1", UPSTREAM_ALLOW_HTTP="true")
    assert chosen.upstream.base_url == "http://10.0.0.5/v1"


RATES: dict[str, tuple[str, tuple[Rate, ...] | None]] = {
    "one": ("20/minute", (Rate(20, 60, "20/minute"),)),
    "two, shortest first": ("500/day;20/minute", (Rate(20, 60, "20/minute"), Rate(500, 86400, "500/day"))),
    "commas": ("20/minute, 500/day", (Rate(20, 60, "20/minute"), Rate(500, 86400, "500/day"))),
    "bars, as limits has them": ("20/minute|500/day", (Rate(20, 60, "20/minute"), Rate(500, 86400, "500/day"))),
    "words": ("20 per minute", (Rate(20, 60, "20/minute"),)),
    "plural": ("20/minutes", (Rate(20, 60, "20/minute"),)),
    "capitals": ("20 PER Hour", (Rate(20, 3600, "20/hour"),)),
    "multiple": ("20/2 hours", (Rate(20, 7200, "20/2 hour"),)),
    "multiple of one": ("20 per 1 second", (Rate(20, 1, "20/second"),)),
    "month of 30 days": ("5000000/month", (Rate(5000000, 30 * 86400, "5000000/month"),)),
    "separator at the end": ("20/minute;", (Rate(20, 60, "20/minute"),)),
    "one window twice": ("30/day;20/24 hours;40/1 day", (Rate(20, 86400, "20/24 hour"),)),
    "as many as can be told": ("999999999999999/day", (Rate(10**15 - 1, 86400, "999999999999999/day"),)),
    "more than can be told": ("1000000000000000/day", None),
    "longer than can be counted": ("1/100000000 years", None),
    "empty": ("", ()),
    "blank": (" ; ", ()),
    "number alone": ("20", None),
    "unknown period": ("20/fortnight", None),
    "nothing allowed": ("0/minute", None),
    "less than nothing": ("-1/minute", None),
    "fraction": ("1.5/minute", None),
    "one good, one bad": ("20/minute;lots", None),
    "no number": ("/minute", None),
    "digits of another alphabet": ("٢٠/minute", None),
}


@pytest.mark.parametrize("label", RATES)
def test_rates(label: str) -> None:
    """Rates are read in the notation of `limits`, every one of them; empty is no limit; the rest is refused."""
    written, wanted = RATES[label]
    if wanted is None:
        with refused("limits.tokens_total"):
            from_env(LIMITS_TOKENS_TOTAL=written)
    else:
        assert from_env(LIMITS_TOKENS_TOTAL=written).limits.tokens_total == wanted


# ---- where values come from ---------------------------------------------------------------------------------------


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    """A variable wins over the file, also when it sets to empty; the file over the default."""
    file = "[server]\nport = 1111\nmax_streams = 7\n[policy]\nallow = ['tools']\n"
    chosen = from_toml(tmp_path, file, SERVER_PORT="2222", POLICY_ALLOW="")
    assert (chosen.server.port, chosen.server.max_streams, chosen.policy.allow) == (2222, 7, ())


def test_default_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """chat-proxy.toml in the current folder is read when no file is named; that there is none is fine."""
    monkeypatch.chdir(tmp_path)
    assert settings.load(None, variables({})).server.port == 8000
    Path("chat-proxy.toml").write_text("[server]\nport = 1234\n", encoding="utf-8")
    assert settings.load(None, variables({})).server.port == 1234


def test_who_has_no_file_hears_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without chat-proxy.toml, what is required there comes with the command that writes it; with it, without."""
    monkeypatch.chdir(tmp_path)
    for advice in (" (`chat-proxy init` writes one)", ""):
        with refused("upstream.base_url", "upstream.api_key", "policy.models") as faults:
            settings.load(None, {})
        assert faults[0].message == f"is required; set it in chat-proxy.toml{advice} or as CHAT_PROXY_UPSTREAM_BASE_URL"
        Path("chat-proxy.toml").write_text("", encoding="utf-8")


def test_a_file_that_cannot_be_read_is_not_told_to_lack_anything(tmp_path: Path) -> None:
    """What a broken or missing file may well say, or would decide, is no fault beside that; others' faults are told."""
    file = tmp_path / "broken.toml"
    file.write_text("[policy]\nmodels = [demo]\n", encoding="utf-8")
    given = {"CHAT_PROXY_SERVER_WORKERS": "2", "CHAT_PROXY_UPSTREAM_API_KEY": "k" * 20}
    for path in (file, tmp_path / "nowhere.toml"):
        with refused("--config"):
            settings.load(str(path), given)
        with refused("--config", "server.port"):
            settings.load(str(path), given | {"CHAT_PROXY_SERVER_PORT": "http"})


def test_named_file_must_be_there(tmp_path: Path) -> None:
    """A file that was named and cannot be read is a fault that names it."""
    for path in (tmp_path / "nowhere.toml", tmp_path):
        with refused("--config") as faults:
            settings.load(str(path), variables({}))
        assert faults[0].source == str(path)
        assert faults[0].message.startswith("cannot be read: ")


BROKEN: dict[str, bytes] = {
    "no value": b"[server]\nport =\n",
    "no quotes": b"[policy]\nsystem_prompt = Be brief\n",
    "a key twice": b"[server]\nport = 1\nport = 2\n",
    "a section twice": b"[server]\n[server]\n",
    "Latin-1": b"[policy]\nsystem_prompt = 'caf\xe9'\n",
    "5000 digits": b"[server]\nport = " + b"9" * 5000,
    "5000 brackets": b"a = " + b"[" * 5000,
    "a binary file": bytes(range(256)),
}


@pytest.mark.parametrize("label", BROKEN)
def test_broken_file(label: str, tmp_path: Path) -> None:
    """A file that is not TOML is one fault, which names the file and quotes nothing of it."""
    file = tmp_path / "broken.toml"
    file.write_bytes(BROKEN[label])
    with refused("--config") as faults:
        settings.load(str(file), variables({}))
    assert faults[0].source == str(file)
    assert "brief" not in str(faults[0])


def test_broken_file_names_the_place(tmp_path: Path) -> None:
    """Where TOML's parser knows line and column, the fault tells them."""
    with refused("--config") as faults:
        from_toml(tmp_path, "[server]\nport =\n")
    assert "line 2" in faults[0].message


UNKNOWN_IN_FILE: dict[str, tuple[str, str, str]] = {
    "section": ("[sever]\nport = 1\n", "sever", "server"),
    "setting": ("[server]\nprot = 1\n", "server.prot", "server.port"),
    "setting of another section": ("[server]\nbase_url = 'x'\n", "server.base_url", "upstream.base_url"),
    "setting without a section": ("models = ['m']\n", "models", "policy.models"),
    "short setting without a section": ("port = 1\n", "port", "server.port"),
    "section in a section": ("[log.level]\ninfo = 1\n[limit.per_session]\na = 1\n", "limit", "limits"),
}


@pytest.mark.parametrize("label", UNKNOWN_IN_FILE)
def test_unknown_name_in_file(label: str, tmp_path: Path) -> None:
    """An unknown name in the file is a fault, with the nearest known name."""
    written, unknown, nearest = UNKNOWN_IN_FILE[label]
    with pytest.raises(SettingsError) as caught:
        from_toml(tmp_path, written)
    found = {fault.setting: fault.message for fault in caught.value.faults}
    assert found[unknown].endswith(f"; did you mean {nearest}?")


def test_unknown_name_far_from_all(tmp_path: Path) -> None:
    """A name that is like no other is a fault without a guess."""
    with refused("zzz") as faults:
        from_toml(tmp_path, "zzz = 1\n")
    assert faults[0].message == "there is no such section"


@pytest.mark.parametrize("written", ["server = 5\n", "[[server]]\nport = 1\n"])
def test_section_that_is_none(written: str, tmp_path: Path) -> None:
    """A section's name with something else in its place is a fault that says how a section is written."""
    with refused("server") as faults:
        from_toml(tmp_path, written)
    assert "[server]" in faults[0].message


UNKNOWN_IN_ENVIRONMENT = {
    "misspelt": ("CHAT_PROXY_SERVER_PROT", "CHAT_PROXY_SERVER_PORT"),
    "without its section": ("CHAT_PROXY_PORT", "CHAT_PROXY_SERVER_PORT"),
    "file of what is no secret": ("CHAT_PROXY_UPSTREAM_BASE_URL_FILE", "CHAT_PROXY_UPSTREAM_BASE_URL"),
    "secret, misspelt": ("CHAT_PROXY_UPSTREAM_APIKEY", "CHAT_PROXY_UPSTREAM_API_KEY"),
    "in small letters": ("CHAT_PROXY_server_port", "CHAT_PROXY_SERVER_PORT"),
}


@pytest.mark.parametrize("label", UNKNOWN_IN_ENVIRONMENT)
def test_unknown_variable(label: str) -> None:
    """An unknown variable with our prefix is a fault, with the nearest name; its value is not shown."""
    unknown, nearest = UNKNOWN_IN_ENVIRONMENT[label]
    with refused(unknown) as faults:
        settings.from_variables({**variables({}), unknown: "8000"})
    assert faults[0].source == "environment"
    assert f"; did you mean {nearest}" in faults[0].message
    assert "8000" not in str(faults[0])


def test_variables_of_others_are_ignored() -> None:
    """Only names with our prefix are ours."""
    settings.from_variables({**variables({}), "PATH": "/bin", "RATELIMIT_ENABLED": "false", "chat_proxy_x": "1"})


KUBERNETES = {
    "CHAT_PROXY_SERVICE_HOST": "10.96.0.12",
    "CHAT_PROXY_SERVICE_PORT": "8000",
    "CHAT_PROXY_SERVICE_PORT_HTTP": "8000",
    "CHAT_PROXY_PORT": "tcp://10.96.0.12:8000",
    "CHAT_PROXY_PORT_8000_TCP": "tcp://10.96.0.12:8000",
    "CHAT_PROXY_PORT_8000_TCP_PROTO": "tcp",
    "CHAT_PROXY_PORT_8000_TCP_PORT": "8000",
    "CHAT_PROXY_PORT_8000_TCP_ADDR": "10.96.0.12",
    "CHAT_PROXY_PORT_53_UDP": "udp://10.96.0.12:53",
    "CHAT_PROXY_PORT_53_UDP_ADDR": "10.96.0.12",
    "CHAT_PROXY_METRICS_SERVICE_HOST": "10.96.0.13",
    "CHAT_PROXY_SERVER_SERVICE_PORT": "8000",
    "CHAT_PROXY_SERVER_PORT": "tcp://10.96.0.14:8000",
    "CHAT_PROXY_DNS_PORT": "udp://10.96.0.15:53",
    "CHAT_PROXY_CALLS_PORT": "sctp://10.96.0.16:7",
}


def test_what_kubernetes_injects_is_ignored() -> None:
    """Services named chat-proxy, chat-proxy-server and the like put variables in our way; none of them is read."""
    chosen = settings.from_variables({**variables({}), **KUBERNETES})
    assert chosen == from_env()


def test_only_the_shape_of_kubernetes_is_ignored() -> None:
    """CHAT_PROXY_PORT with a number in it was meant for us, and is the error it is."""
    for unknown in ({"PORT": "8000"}, {"SERVICE_HOSTS": "x"}, {"PORT_X_TCP": "x"}):
        with refused(*(f"CHAT_PROXY_{name}" for name in unknown)):
            from_env(**unknown)


# ---- secrets ------------------------------------------------------------------------------------------------------


def test_secret_from_three_places(tmp_path: Path) -> None:
    """The credential comes before the file that ..._FILE names, and that before the variable; where one is absent the
    next is asked."""
    credentials, file = tmp_path / "credentials", tmp_path / "key"
    credentials.mkdir()
    credential = credentials / "upstream_api_key"
    credential.write_text("from-credential\n", encoding="utf-8")
    file.write_text("\nfrom-file \n", encoding="utf-8")
    given = {**variables({"UPSTREAM_API_KEY": " from-variable\n"}), "CREDENTIALS_DIRECTORY": str(credentials)}
    given["CHAT_PROXY_UPSTREAM_API_KEY_FILE"] = str(file)

    def key() -> tuple[str, Path | None]:
        found = settings.from_variables(given).upstream.api_key
        return found.value, found.path

    assert key() == ("from-credential", credential)
    credential.unlink()
    assert key() == ("from-file", file)
    given["CHAT_PROXY_UPSTREAM_API_KEY_FILE"] = ""
    assert key() == ("from-variable", None)
    del given["CREDENTIALS_DIRECTORY"]
    assert key() == ("from-variable", None)


def test_session_secret_lines() -> None:
    """Session secrets stand one a line, newest first; blanks around and blank lines are nothing, a comma is."""
    chosen = from_env(SESSION_SECRET="\n newest,secret,of-all \n\n the-one-before-that\n")
    assert chosen.session.secret is not None
    assert chosen.session.secret.lines() == ["newest,secret,of-all", "the-one-before-that"]


BAD_SECRETS: dict[str, tuple[str, str]] = {
    "empty key": ("upstream.api_key", ""),
    "key of two lines": ("upstream.api_key", "sk-first\nsk-second"),
    "key with a blank": ("upstream.api_key", "sk-first sk-second"),
    "key with its name": ("upstream.api_key", "Bearer sk-first"),
    "key in quotes": ("upstream.api_key", '"sk-first-of-all"'),
    "client secret in quotes": ("oidc.client_secret", "'hush-hush'"),
    "key in other letters": ("upstream.api_key", "sk-ключ"),
    "key with a control character": ("upstream.api_key", "sk-\x07"),
    "key that is not UTF-8": ("upstream.api_key", "sk-\udcff"),
    "empty session secret": ("session.secret", ""),
    "short session secret": ("session.secret", "fifteen-letters"),
    "one short line": ("session.secret", f"{'a' * 43}\nshort"),
    "session secret that is not UTF-8": ("session.secret", f"{'a' * 43}\udcff"),
}


@pytest.mark.parametrize("label", BAD_SECRETS)
def test_bad_secret(label: str) -> None:
    """A secret that cannot work, or is too short to be one, is a fault that names the place and never the value."""
    name, written = BAD_SECRETS[label]
    with refused(name) as faults:
        from_env(**{variable(name): written})
    assert faults[0].source == f"environment variable CHAT_PROXY_{variable(name)}"
    for line in written.split():
        assert line not in str(faults[0])


@pytest.mark.parametrize("name", ["upstream.api_key", "session.secret"])
def test_secret_in_the_file_is_refused(name: str, tmp_path: Path) -> None:
    """A secret in the TOML file is a fault even where the environment has one; the file is likely to be committed."""
    canary = random_key()
    with refused(name) as faults:
        from_toml(tmp_path, toml_line(name, canary), SESSION_SECRET="s" * 43)
    assert canary not in str(faults[0])
    assert f"CHAT_PROXY_{variable(name)}" in faults[0].message


def test_missing_secret_file(tmp_path: Path) -> None:
    """A secret's file that is missing, a folder or not UTF-8 is a fault that names the variable; the next place is not
    asked, since a key that was replaced must not come back."""
    latin = tmp_path / "latin"
    latin.write_bytes(b"caf\xe9")
    for path, message in {
        tmp_path / "nowhere": "cannot be read: No such file or directory",
        tmp_path: "cannot be read: Is a directory",
        latin: "is not UTF-8 text",
    }.items():
        with refused("upstream.api_key") as faults:
            from_env(UPSTREAM_API_KEY_FILE=str(path))
        assert faults[0] == Fault("upstream.api_key", "the file that CHAT_PROXY_UPSTREAM_API_KEY_FILE names", message)


def test_broken_credential(tmp_path: Path) -> None:
    """A credential that is there and cannot be used is a fault that names it; the variable is not asked."""
    (tmp_path / "upstream_api_key").write_bytes(b"\xff")
    with refused("upstream.api_key") as faults:
        settings.from_variables({**variables({}), "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert faults[0].source == "credential upstream_api_key"


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may read everything, so the test runs as another user."""
    ours = os.geteuid()
    if ours == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(ours)


def test_unreadable_secret_file(tmp_path: Path) -> None:
    """A secret's file, or a folder of credentials, that this user may not read is a fault and not a crash."""
    file, folder = tmp_path / "key", tmp_path / "credentials"
    file.write_text(KEY, encoding="utf-8")
    folder.mkdir()
    file.chmod(0)
    folder.chmod(0)
    with without_rights():
        for given in ({"CHAT_PROXY_UPSTREAM_API_KEY_FILE": str(file)}, {"CREDENTIALS_DIRECTORY": str(folder)}):
            with pytest.raises(SettingsError) as caught:
                settings.from_variables({**variables({}), **given})
            assert {fault.message for fault in caught.value.faults} == {"cannot be read: Permission denied"}
    folder.chmod(0o700)  # or nobody could clean up


def test_key_in_place_of_its_file_is_not_shown() -> None:
    """A key that was put into ..._FILE by mistake is not in the fault about the file that does not exist."""
    canary = random_key()
    with refused("upstream.api_key") as faults:
        from_env(UPSTREAM_API_KEY_FILE=canary)
    assert canary not in str(faults[0])


def test_no_fault_shows_a_value(tmp_path: Path) -> None:
    """Whatever setting a secret lands in by mistake, in the file or the environment, no fault about it shows it."""
    canary = f"{random_key()} \n*"  # no kind of value but free text accepts it
    accepted = {"server.socket", "session.control_file", "policy.system_prompt", "policy.models", "policy.allow"}
    accepted |= {"oidc.client_id", "oidc.scopes", "oidc.allowed_emails", "oidc.allowed_domains"}
    for name in CONTRACT.keys() - accepted:
        for given in ({variable(name): canary}, {f"{variable(name)}_FILE": canary}, {f"{variable(name)}X": canary}):
            with pytest.raises(SettingsError) as caught:
                from_env(**given)
            assert canary[:20] not in f"{caught.value}{caught.value!r}{caught.value.faults}", name
        file = tmp_path / "given.toml"
        file.write_text(toml_line(name, canary), encoding="utf-8")
        environ = variables({})
        environ.pop(f"CHAT_PROXY_{variable(name)}", None)
        with pytest.raises(SettingsError) as caught:
            settings.load(str(file), environ)
        assert canary[:20] not in f"{caught.value}{caught.value!r}{caught.value.faults}", name


def test_settings_do_not_show_secrets() -> None:
    """repr and str of settings and of secrets show that there is one, and nothing of it."""
    session_secret = secrets.token_urlsafe(32)
    chosen = from_env(SESSION_SECRET=session_secret)
    for shown in (repr(chosen), str(chosen), f"{chosen.upstream.api_key}", repr(dataclasses.asdict(chosen))):
        assert "Secret(...)" in shown
        assert KEY not in shown
        assert session_secret not in shown


def test_secret_is_read_again(tmp_path: Path) -> None:
    """A secret of a file is what the file holds now; while the file is gone, empty or broken it stays what it was."""
    file = tmp_path / "key"
    file.write_text("first", encoding="utf-8")
    held = from_env(UPSTREAM_API_KEY_FILE=str(file)).upstream.api_key
    file.write_text(" second\n", encoding="utf-8")
    assert held.again() == Secret("second")
    for content in (b"", b" \n", b"\xff"):
        file.write_bytes(content)
        assert held.again() is held
    file.unlink()
    assert held.again() is held
    of_variable = from_env().upstream.api_key
    assert of_variable.again() is of_variable


def test_secrets_compare_by_value() -> None:
    """Two secrets are the same when their values are, wherever they came from; a text is no secret."""
    assert Secret("a", Path("x")) == Secret("a")
    assert hash(Secret("a", Path("x"))) == hash(Secret("a"))
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"


# ---- several settings together ------------------------------------------------------------------------------------


CONTRADICTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "plain http in public": ("server.public_url", {**PUBLIC, "SERVER_PUBLIC_URL": "http://chat.example.org"}),
    "a name like loopback": ("server.public_url", {**PUBLIC, "SERVER_PUBLIC_URL": "http://localhost.example.org"}),
    "no session secret in public": ("session.secret", {"SERVER_PUBLIC_URL": "https://chat.example.org"}),
    "no model": ("policy.models", {"POLICY_MODELS": " , "}),
    "folder that is none": ("server.static_dir", {"SERVER_STATIC_DIR": "/no/such/folder"}),
    "file for a folder": ("server.static_dir", {"SERVER_STATIC_DIR": __file__}),
    "ca_file that is not there": ("upstream.ca_file", {"UPSTREAM_CA_FILE": "/no/such/file"}),
    "ca_file that is a folder": ("upstream.ca_file", {"UPSTREAM_CA_FILE": "/"}),
    "ca_file of something else": ("upstream.ca_file", {"UPSTREAM_CA_FILE": __file__}),
    "idle beyond lifetime": ("session.idle", {"SESSION_IDLE": "3601", "SESSION_LIFETIME": "3600"}),
    "no passwords": ("session.passwords", {"SESSION_MODE": "password"}),
    "no issuer": ("oidc.issuer", {"SESSION_MODE": "oidc", "OIDC_CLIENT_ID": "c", "OIDC_CLIENT_SECRET": "s"}),
    "no client": ("oidc.client_id", {"SESSION_MODE": "oidc", "OIDC_ISSUER": ISSUER, "OIDC_CLIENT_SECRET": "s"}),
    "no client's secret": (
        "oidc.client_secret",
        {"SESSION_MODE": "oidc", "OIDC_ISSUER": ISSUER, "OIDC_CLIENT_ID": "c"},
    ),
    "an issuer over plain http": ("oidc.issuer", {"OIDC_ISSUER": "http://id.example.org"}),
    "one port for two": ("metrics.port", {"SERVER_PORT": "9090", "METRICS_PORT": "9090"}),
    "workers that count alone": ("server.workers", {"SERVER_WORKERS": "2"}),
}


@pytest.mark.parametrize("label", CONTRADICTIONS)
def test_contradiction(label: str) -> None:
    """Settings that are right one by one and wrong together are refused, with the source of the one to change."""
    name, given = CONTRADICTIONS[label]
    with refused(name) as faults:
        from_env(**given)
    wanted = f"environment variable CHAT_PROXY_{variable(name)}" if variable(name) in given else ""
    assert faults[0].source == wanted


def test_packages_of_a_store_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.settings.faults.is_installed", lambda package: False)
    with refused("limits.store") as faults:
        from_env(LIMITS_STORE="redis://127.0.0.1")
    assert "pip install 'chat-proxy[redis]'" in faults[0].message


def test_packages_of_traces_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.settings.faults.is_installed", lambda package: False)
    with refused("traces.enabled") as faults:
        from_env(TRACES_ENABLED="true")
    assert "pip install 'chat-proxy[otel]'" in faults[0].message


def test_a_part_of_a_package_that_is_not_there_is_not_there() -> None:
    assert is_installed(TRACES_PACKAGE)
    assert not is_installed("opentelemetry_of_nobody.exporter")


def test_packages_of_a_mode_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode whose packages are not installed is refused at start, with the command that brings them."""
    monkeypatch.setattr("proxy.settings.faults.is_installed", lambda package: False)
    with refused("session.mode") as faults:
        from_env(SESSION_MODE="password", SESSION_PASSWORDS=HASH)
    assert "pip install 'chat-proxy[login]'" in faults[0].message


@pytest.mark.parametrize("lines", [HASH, f"alice:{HASH}", f"alice:{HASH}\n\nbob:{HASH}\n"])
def test_passwords(lines: str) -> None:
    chosen = from_env(SESSION_MODE="password", SESSION_PASSWORDS=lines)
    assert chosen.session.passwords is not None
    assert chosen.session.passwords.lines() == lines.split()


@pytest.mark.parametrize(
    "lines",
    [
        "hunter2",
        "alice:hunter2",
        f"a b:{HASH}",
        f"alice:{HASH}\nalice:{HASH}",
        f"alice:{HASH}\n{HASH}",
        f"{HASH}\n{HASH}",
        f"alice:{HASH.replace('argon2id', 'argon2i')}",
    ],
)
def test_passwords_that_are_none(lines: str) -> None:
    """Plain passwords, two lines for one user, a shared one beside users: refused, and not shown."""
    with refused("session.passwords") as faults:
        from_env(SESSION_MODE="password", SESSION_PASSWORDS=lines)
    assert "hunter2" not in str(faults[0])
    assert "hash-password" in faults[0].message or "one line a user" in faults[0].message


def test_contradiction_with_unused_credentials(tmp_path: Path) -> None:
    """A folder of credentials that lacks one is not said to be where it came from."""
    given = variables({"SERVER_PUBLIC_URL": "https://chat.example.org"})
    with refused("session.secret") as faults:
        settings.from_variables({**given, "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert faults[0].source == ""


def test_models_without_a_name_are_refused(tmp_path: Path) -> None:
    """The file can hold an empty name, where the environment cannot; it is refused."""
    file = tmp_path / "given.toml"
    file.write_text('[policy]\nmodels = ["m", ""]\n', encoding="utf-8")
    with refused("policy.models"):
        settings.load(
            str(file), {f"CHAT_PROXY_{name}": REQUIRED_SETTINGS[name] for name in list(REQUIRED_SETTINGS)[:2]}
        )


CONSISTENT: dict[str, dict[str, str]] = {
    "https with a secret": PUBLIC,
    "loopback over http": {"SERVER_PUBLIC_URL": "http://localhost:3000"},
    "loopback over https": {"SERVER_PUBLIC_URL": "https://[::1]:8443"},
    "idle as long as lifetime": {"SESSION_IDLE": "3600", "SESSION_LIFETIME": "3600"},
    "one port on two addresses": {"SERVER_PORT": "9090", "METRICS_PORT": "9090", "METRICS_HOST": "127.0.0.2"},
    "a socket and a port": {"SERVER_SOCKET": "/run/x", "SERVER_PORT": "9090", "METRICS_PORT": "9090"},
    "roots": {"UPSTREAM_CA_FILE": certifi.where()},
    "page": {"SERVER_STATIC_DIR": str(Path(__file__).parent)},
    "workers with a store": {"SERVER_WORKERS": "2", "LIMITS_STORE": "redis://127.0.0.1/0"},
}


@pytest.mark.parametrize("label", CONSISTENT)
def test_no_contradiction(label: str) -> None:
    """What goes together is accepted."""
    from_env(**CONSISTENT[label])


def test_contradictions_wait_for_good_values() -> None:
    """A setting that has a fault of its own is not blamed for what would follow from it."""
    with refused("server.public_url", "session.lifetime", "upstream.allow_http", "server.port", "metrics.host"):
        from_env(
            SERVER_PUBLIC_URL="chat.example.org",
            SESSION_LIFETIME="long",
            UPSTREAM_BASE_URL="http://10.0.0.5/v1",
            UPSTREAM_ALLOW_HTTP="maybe",
            SERVER_PORT="x",
            METRICS_PORT="9090",
            METRICS_HOST="",
        )


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Ten faults of the file, the environment and the secrets, with two contradictions, are told in one go."""
    written = "[server]\nport = '8000'\nprot = 1\n[polcy]\nmodels = []\n[upstream]\napi_key = 'sk'\nretries = 99\n"
    with refused(
        *("server.port", "server.prot", "polcy", "upstream.retries", "upstream.base_url", "upstream.api_key"),
        *("log.level", "CHAT_PROXY_LOG_LEVLE", "session.secret", "session.idle"),
    ):
        from_toml(
            tmp_path,
            written,
            UPSTREAM_BASE_URL="http://10.0.0.5",
            LOG_LEVEL="loud",
            LOG_LEVLE="loud",
            SESSION_SECRET="short",
            SESSION_IDLE="604801",
        )


def test_error_shows_every_fault_on_a_line() -> None:
    """The error's text is one line a fault: setting, source, what would be right."""
    error = SettingsError([Fault("a.b", "environment", "must be c"), Fault("d.e", "", "is required")])
    assert str(error) == "a.b (from environment): must be c\nd.e: is required"


# ---- public_url and the port --------------------------------------------------------------------------------------


def test_public_url_follows_the_port() -> None:
    """public_url defaults to 127.0.0.1 at the port, also when the kernel chose the port."""
    assert from_env(SERVER_PORT="1234").server.public_url == "http://127.0.0.1:1234"
    bound = settings.on_port(from_env(SERVER_PORT="0"), 4321).server
    assert (bound.port, bound.public_url) == (4321, "http://127.0.0.1:4321")


def test_public_url_that_was_given_stays() -> None:
    """The port that the kernel chose does not replace a public_url, and so not its https and its secure cookies."""
    bound = settings.on_port(from_env(**PUBLIC, SERVER_PORT="0"), 4321).server
    assert (bound.port, bound.public_url) == (4321, "https://chat.example.org")
    assert bound.is_https


LOCAL = {
    "http://127.0.0.1:8000": True,
    "http://127.8.9.10": True,
    "http://[::1]:8000": True,
    "http://localhost": True,
    "https://chat.example.org": False,
    "https://10.0.0.1": False,
    "https://localhost.example.org": False,
}


@pytest.mark.parametrize("url", LOCAL)
def test_is_local(url: str) -> None:
    """Loopback is told by address, or by the one name that is always loopback."""
    server = dataclasses.replace(from_env().server, public_url=url)
    assert server.is_local is LOCAL[url]
    assert server.is_https is url.startswith("https")
