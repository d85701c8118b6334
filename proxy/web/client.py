"""The client's address, and whether the request comes from the server's own page. Pure.

Rules:
1. `X-Forwarded-For` is read from the right, and only as far as the addresses are proxies that the operator listed.
2. The origin rule is Fetch Metadata's resource isolation (w3c/webappsec-fetch-metadata) with `Origin` beside it:
   each that is present must pass; a request with neither does not come from a browser.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from proxy.errors import BodyTooLarge, CrossOrigin, InvalidRequest, LengthRequired, UnsupportedMediaType
from proxy.settings import Network, Server, hosts_of
from proxy.web.headers import Headers

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UNIX = "unix"  # the address of a Unix socket peer that forwards no other
REMEMBERED = 4096  # resolved addresses to cache: parsing one costs more than all other checks here
LONGEST_REMEMBERED = 512  # bytes of X-Forwarded-For, ten hops; clients could fill the memory with longer ones
REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
PORT_AFTER_ADDRESS = re.compile(r"(?:\[([^\]]+)\]|(\d+\.\d+\.\d+\.\d+))(?::\d{1,5})?")


@dataclass(frozen=True, slots=True)
class Caller:
    """The source of a request. Limits count by `key`; the log contains `shown`."""

    key: str
    shown: str
    through_proxy: bool


def parse_address(written: str) -> Address | None:
    """Parses an address as proxies write it: with a port, in brackets, with a zone, or IPv4 inside IPv6."""
    written = written.strip()
    if matched := PORT_AFTER_ADDRESS.fullmatch(written):
        written = matched[1] or matched[2]
    try:
        address = ipaddress.ip_address(written.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def counted_as(address: Address) -> str:
    """The subscriber behind an address: an IPv4 address, or the /64 that an IPv6 host picks its addresses from."""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def shown_as(address: Address) -> str:
    """The network for the log: enough to see a pattern, too little to identify a person (/24 and /48)."""
    prefix = 24 if isinstance(address, ipaddress.IPv4Address) else 48
    return str(ipaddress.ip_network((address, prefix), strict=False))


class Edge:
    """The edge of one server: its origins, its host names, its trusted proxies."""

    def __init__(self, server: Server) -> None:
        origins = {server.public_url, *server.extra_origins}
        if server.is_local:
            origins |= loopback_twins(server.public_url)
        self.origins = frozenset(origin.encode() for origin in origins)
        self.hosts = frozenset(host.encode() for origin in origins for host in hosts_of(origin))
        self.networks: list[Network] = [peer for peer in server.trusted_proxies if not isinstance(peer, str)]
        self.trusts_unix = "unix" in server.trusted_proxies
        self.max_body_bytes = server.max_body_bytes
        self._resolve = lru_cache(REMEMBERED)(self.resolve)

    # ---- addresses -------------------------------------------------------------------------------------------------

    def caller(self, peer: str | None, headers: Headers) -> Caller:
        """The caller behind `peer` (None: a Unix socket)."""
        forwarded = headers.get(b"x-forwarded-for", b"")
        resolve = self._resolve if len(forwarded) <= LONGEST_REMEMBERED else self.resolve
        return resolve(peer, forwarded)

    def resolve(self, peer: str | None, forwarded: bytes) -> Caller:
        address = parse_address(peer) if peer else None
        trusted = self.trusts_unix if address is None else self.is_proxy(address)
        if trusted:
            address = self.walk(address, forwarded)
        if address is None:
            return Caller(UNIX, UNIX, trusted)
        return Caller(counted_as(address), shown_as(address), trusted)

    def walk(self, address: Address | None, forwarded: bytes) -> Address | None:
        """From the right: the first address that is not a trusted proxy, or the last one that can be parsed."""
        for written in reversed(forwarded.decode("latin-1").split(",")):
            hop = parse_address(written)
            if hop is None:
                break
            address = hop
            if not self.is_proxy(hop):
                break
        return address

    def is_proxy(self, address: Address) -> bool:
        return any(address in network for network in self.networks)

    def is_proxy_at(self, peer: str) -> bool:
        address = parse_address(peer)
        return address is not None and self.is_proxy(address)

    def subscriber_at(self, peer: str) -> str:
        """The key of the peer itself, without the addresses it forwards."""
        return self._resolve(peer, b"").key

    def request_id(self, caller: Caller, headers: Headers) -> str | None:
        """The request id that a trusted proxy set; other peers' are ignored."""
        given = headers.get(b"x-request-id")
        if given is None or not caller.through_proxy or not REQUEST_ID.fullmatch(given):
            return None
        return given.decode()

    def trace_parent(self, caller: Caller, headers: Headers) -> tuple[bytes, bytes]:
        """`traceparent` and `tracestate` as a trusted proxy sent them, unchecked; other peers' are ignored."""
        if not caller.through_proxy:
            return b"", b""
        return headers.get(b"traceparent", b""), headers.get(b"tracestate", b"")

    # ---- the origin ------------------------------------------------------------------------------------------------

    def check_host(self, headers: Headers) -> None:
        """Raises CrossOrigin for an unknown host name: DNS rebinding, or a proxy that does not forward Host."""
        if headers.get(b"host", b"").strip().lower() not in self.hosts:
            raise CrossOrigin(reason="foreign Host")

    def check_origin(self, headers: Headers) -> None:
        """Raises CrossOrigin unless the request comes from the server's own page, or not from a browser."""
        site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        if site is not None and site not in (b"same-origin", b"none"):
            raise CrossOrigin(reason="Sec-Fetch-Site is foreign")
        if origin is not None and origin.lower() not in self.origins:
            raise CrossOrigin(reason="Origin is foreign")

    @staticmethod
    def is_browser(headers: Headers) -> bool:
        return b"origin" in headers or b"sec-fetch-site" in headers

    # ---- the announced body ----------------------------------------------------------------------------------------

    def check_body(self, headers: Headers) -> None:
        """Checks a body's headers. Raises UnsupportedMediaType unless it is JSON, LengthRequired, BodyTooLarge."""
        kind = re.split(rb"[;,]", headers.get(b"content-type", b""), maxsplit=1)[0]
        if kind.strip().lower() != b"application/json":
            raise UnsupportedMediaType
        length = headers.get(b"content-length")
        if length is None:
            if b"transfer-encoding" not in headers:
                raise LengthRequired
        elif not length.isdigit():
            raise InvalidRequest("The Content-Length is not a number.")
        elif len(length) > 18 or int(length) > self.max_body_bytes:
            raise BodyTooLarge


def loopback_twins(public_url: str) -> set[str]:
    """The loopback names of this machine on the same port: people type any of them."""
    url = urlsplit(public_url)
    port = f":{url.port}" if url.port else ""
    return {f"{url.scheme}://{host}{port}" for host in ("localhost", "127.0.0.1", "[::1]")}
