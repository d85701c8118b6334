"""The settings: read and validated at the start, immutable values afterwards.

| room | holds |
|---|---|
| `tables.py` | the contract: every setting, its kind and its default |
| `values.py` | what one setting may be: kinds, shapes, secrets |
| `faults.py` | what is wrong, in words for the operator; what shows only when several settings are seen together |
| `loading.py` | where values are found: file, environment, credentials |

Each knows those that it needs: loading -> faults -> tables -> values. The other rooms of the house come in here.
"""

from __future__ import annotations

from proxy.settings.faults import Fault, SettingsError, holds_certificates, refused_by_opentelemetry
from proxy.settings.loading import DEFAULT_FILE, PREFIX, from_variables, load, on_port
from proxy.settings.tables import SECTIONS, Limits, Log, Oidc, Policy, Server, Session, Settings, Traces, Upstream
from proxy.settings.values import (
    REQUIRED,
    USUAL_PORTS,
    Network,
    Rate,
    Secret,
    hosts_of,
    is_loopback,
    origin,
    peer,
    rates,
    session_keys,
)

__all__ = [
    "DEFAULT_FILE",
    "PREFIX",
    "REQUIRED",
    "SECTIONS",
    "USUAL_PORTS",
    "Fault",
    "Limits",
    "Log",
    "Network",
    "Oidc",
    "Policy",
    "Rate",
    "Secret",
    "Server",
    "Session",
    "Settings",
    "SettingsError",
    "Traces",
    "Upstream",
    "from_variables",
    "holds_certificates",
    "hosts_of",
    "is_loopback",
    "load",
    "on_port",
    "origin",
    "peer",
    "rates",
    "refused_by_opentelemetry",
    "session_keys",
]
