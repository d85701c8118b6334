"""The TLS contexts of all clients in this project: which roots they trust."""

from __future__ import annotations

import ssl
from functools import cache

import certifi


@cache
def default_ssl_context() -> ssl.SSLContext:
    """Trusts certifi's roots. Made once: reading them takes 20 ms, and the context is never changed."""
    return ssl.create_default_context(cafile=certifi.where())


def upstream_ssl_context(ca_file: str) -> ssl.SSLContext | None:
    """Trusts certifi's roots and those in `ca_file`. Without one None: the default. Raises OSError, ssl.SSLError."""
    if not ca_file:
        return None
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_verify_locations(ca_file)
    return context


def system_ssl_context(ca_file: str | None) -> ssl.SSLContext:
    """Trusts the system's roots (SSL_CERT_FILE), certifi's, and those in `ca_file`. Raises OSError, ssl.SSLError."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context
