"""Serves the files of the page."""

from __future__ import annotations

import os
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.errors import HeaderList

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE_HEADERS: HeaderList = [
    (b"cache-control", b"no-cache"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", PAGE_POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


OWN_FOLDERS = (Path(__file__).parents[1] / "static", Path(__file__).parents[2] / "static")
"""The page's folder in an installed package, and in a source tree."""
UNSERVED = "examples"
"""The examples in these folders: sources to copy, which a browser cannot run unbundled."""


class PageFiles(StaticFiles):
    """The files of a folder; of the packaged page without UNSERVED."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        is_example = Path(path).parts[:1] == (UNSERVED,)  # the path is normalised already
        return ("", None) if is_example and self.directory in OWN_FOLDERS else super().lookup_path(path)


class UnusableRange(Exception):
    """Starlette is about to refuse a Range with a response of its own."""


class Page:
    """The chat page's files, with a CSP that lets a browser load and run only these."""

    def __init__(self, folder: Path, base_headers: HeaderList, nothing: ASGIApp) -> None:
        self.files = PageFiles(directory=folder, html=True)
        self.headers = [*base_headers, *PAGE_HEADERS]
        self.nothing = nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] in (400, 416):
                    raise UnusableRange
                message["headers"] = [*map(relative, message["headers"]), *self.headers]
            await send(message)

        try:
            await self.files(scope, receive, send_with_headers)
        except UnusableRange:
            await self(without_range(scope), receive, send)
        except HTTPException:
            await self.nothing(scope, receive, send)


def relative(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Removes scheme and host from a redirect to a folder: those of the socket are not the public ones.

    The path begins with exactly one slash: a browser reads what follows two as a host.
    """
    name, value = header
    return (name, b"/" + value.split(b"/", 3)[3].lstrip(b"/")) if name == b"location" else header


def without_range(scope: Scope) -> Scope:
    """The same request for the whole file: a server may ignore Range (RFC 9110 section 14.2)."""
    return {**scope, "headers": [header for header in scope["headers"] if header[0] != b"range"]}


def page_folder(configured: str | None) -> Path | None:
    """The folder served at `/`: the one configured, the one in the package, or the one of a source tree."""
    if configured is not None:
        return Path(configured) if configured else None
    packaged, in_sources = OWN_FOLDERS
    return packaged if packaged.is_dir() else in_sources
