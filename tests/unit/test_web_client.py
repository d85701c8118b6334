"""The edge: the client's address, its origin, and the announced body. Tables of headers and verdicts."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.errors import BodyTooLarge, CrossOrigin, InvalidRequest, LengthRequired, Refusal, UnsupportedMediaType
from proxy.settings import Server, peer
from proxy.web.client import LONGEST_REMEMBERED, REMEMBERED, UNIX, Address, Caller, Edge, parse_address
from proxy.web.headers import cookies_named, join_repeated

Pairs = list[tuple[bytes, bytes]]

LOCAL = "http://127.0.0.1:8000"
PUBLIC = "https://chat.example.org"


def trusting(*proxies: str, public_url: str = LOCAL) -> Edge:
    return Edge(Server(public_url=public_url, trusted_proxies=tuple(map(peer, proxies))))


def headers(*lines: str) -> Pairs:
    """`Name: value` lines as uvicorn puts them into the scope: names in lower case, values trimmed."""
    pairs = (line.partition(":") for line in lines)
    return [(name.lower().encode(), value.strip().encode("latin-1")) for name, _, value in pairs]


SITES = {
    "local": Edge(Server(public_url=LOCAL)),
    "usual port": Edge(Server(public_url="http://localhost")),
    "public": Edge(Server(public_url=PUBLIC)),
    "odd port": Edge(Server(public_url="https://chat.example.org:8443")),
    "extra": Edge(Server(public_url=PUBLIC, extra_origins=("https://other.example.org", "http://localhost:5173"))),
}

# ---- is it our page ------------------------------------------------------------------------------------------------

ORIGINS = [
    # label, site, headers, passes
    ("no browser", "local", [], True),
    ("our page: both", "local", ["Sec-Fetch-Site: same-origin", f"Origin: {LOCAL}"], True),
    ("an old browser of ours: Origin alone", "local", [f"Origin: {LOCAL}"], True),
    ("our page's GET: fetch metadata alone", "local", ["Sec-Fetch-Site: same-origin"], True),
    ("typed by the user", "local", ["Sec-Fetch-Site: none"], True),
    ("a foreign page", "local", ["Sec-Fetch-Site: cross-site", "Origin: https://evil.example"], False),
    ("a foreign page of an old browser", "local", ["Origin: https://evil.example"], False),
    ("a foreign page's GET without Origin", "local", ["Sec-Fetch-Site: cross-site"], False),
    ("a sibling subdomain", "public", ["Sec-Fetch-Site: same-site", "Origin: https://www.example.org"], False),
    ("same-site, whatever Origin says", "public", ["Sec-Fetch-Site: same-site", f"Origin: {PUBLIC}"], False),
    ("cross-site, whatever Origin says", "public", ["Sec-Fetch-Site: cross-site", f"Origin: {PUBLIC}"], False),
    (
        "same-origin, but Origin is foreign",
        "public",
        ["Sec-Fetch-Site: same-origin", "Origin: https://evil.example"],
        False,
    ),
    ("none, but Origin is foreign", "public", ["Sec-Fetch-Site: none", "Origin: https://evil.example"], False),
    ("a sandboxed frame", "local", ["Sec-Fetch-Site: same-origin", "Origin: null"], False),
    ("null alone", "local", ["Origin: null"], False),
    ("NULL alone", "local", ["Origin: NULL"], False),
    ("an empty Origin", "local", ["Origin:"], False),
    ("an empty Sec-Fetch-Site", "local", ["Sec-Fetch-Site:"], False),
    ("a word that Fetch Metadata does not know", "local", ["Sec-Fetch-Site: same-planet"], False),
    ("Sec-Fetch-Site in capitals, as no browser writes it", "local", ["Sec-Fetch-Site: Same-Origin"], False),
    ("Sec-Fetch-Site twice, both good", "local", ["Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: none"], False),
    (
        "Sec-Fetch-Site twice, the second foreign",
        "local",
        ["Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site"],
        False,
    ),
    ("Origin twice, both ours", "local", [f"Origin: {LOCAL}", f"Origin: {LOCAL}"], False),
    ("Origin twice, ours first", "local", [f"Origin: {LOCAL}", "Origin: https://evil.example"], False),
    ("Origin twice, ours last", "local", ["Origin: https://evil.example", f"Origin: {LOCAL}"], False),
    ("two origins in one line", "local", [f"Origin: {LOCAL} https://evil.example"], False),
    ("the header's name in capitals", "local", ["ORIGIN: https://evil.example"], False),
    ("ours in capitals", "public", ["Origin: HTTPS://CHAT.EXAMPLE.ORG"], True),
    ("http instead of https", "public", ["Origin: http://chat.example.org"], False),
    ("another port", "public", ["Origin: https://chat.example.org:8443"], False),
    ("the usual port written out, as no browser does", "public", ["Origin: https://chat.example.org:443"], False),
    ("an odd port", "odd port", ["Origin: https://chat.example.org:8443"], True),
    ("an odd port left out", "odd port", ["Origin: https://chat.example.org"], False),
    ("a longer name", "public", ["Origin: https://chat.example.org.evil.example"], False),
    ("a name that ends like ours", "public", ["Origin: https://evilchat.example.org"], False),
    ("a user before the name", "public", ["Origin: https://chat.example.org@evil.example"], False),
    ("a slash at the end", "public", [f"Origin: {PUBLIC}/"], False),
    ("a path", "public", [f"Origin: {PUBLIC}/page"], False),
    ("a dot at the end of the name", "public", ["Origin: https://chat.example.org."], False),
    ("twin: localhost", "local", ["Origin: http://localhost:8000"], True),
    ("twin: [::1]", "local", ["Origin: http://[::1]:8000"], True),
    ("twin on another port", "local", ["Origin: http://localhost:3000"], False),
    ("twin over https", "local", ["Origin: https://localhost:8000"], False),
    ("twin with no port", "local", ["Origin: http://localhost"], False),
    ("twins on the usual port", "usual port", ["Origin: http://127.0.0.1"], True),
    ("another loopback address is no twin", "local", ["Origin: http://127.0.0.2:8000"], False),
    ("a public server has no twins", "public", ["Origin: https://localhost"], False),
    ("extra origin", "extra", ["Origin: https://other.example.org"], True),
    ("extra origin on a port of its own", "extra", ["Origin: http://localhost:5173"], True),
    ("the main one beside extra ones", "extra", [f"Origin: {PUBLIC}"], True),
    ("an extra origin's twin is not meant", "extra", ["Origin: http://127.0.0.1:5173"], False),
    ("an extra origin's other scheme", "extra", ["Origin: http://other.example.org"], False),
    (
        "an extra origin is no licence",
        "extra",
        ["Sec-Fetch-Site: same-site", "Origin: https://other.example.org"],
        False,
    ),
    ("bytes that are no text", "local", ["Origin: \xff\xfe"], False),
]


@pytest.mark.parametrize(("site", "lines", "passes"), [case[1:] for case in ORIGINS], ids=[case[0] for case in ORIGINS])
def test_origin_rule(site: str, lines: list[str], passes: bool) -> None:
    """Only our own page, the user's own hand and callers that are no browser pass the origin rule."""
    found = join_repeated(headers(*lines))
    if passes:
        SITES[site].check_origin(found)
    else:
        with pytest.raises(CrossOrigin):
            SITES[site].check_origin(found)


HOSTS = [
    # label, site, headers, passes
    ("ours", "local", ["Host: 127.0.0.1:8000"], True),
    ("localhost", "local", ["Host: localhost:8000"], True),
    ("LOCALHOST", "local", ["Host: LOCALHOST:8000"], True),
    ("[::1]", "local", ["Host: [::1]:8000"], True),
    ("another port", "local", ["Host: 127.0.0.1:8001"], False),
    ("no port", "local", ["Host: 127.0.0.1"], False),
    ("DNS rebinding", "local", ["Host: evil.example:8000"], False),
    ("a name that begins like ours", "local", ["Host: localhost.evil.example:8000"], False),
    ("::1 without brackets", "local", ["Host: ::1:8000"], False),
    ("no Host", "local", [], False),
    ("an empty Host", "local", ["Host:"], False),
    ("Host twice, both ours", "local", ["Host: localhost:8000", "Host: localhost:8000"], False),
    ("Host twice, ours first", "local", ["Host: localhost:8000", "Host: evil.example"], False),
    ("Host twice, ours last", "local", ["Host: evil.example", "Host: localhost:8000"], False),
    ("http without :80", "usual port", ["Host: localhost"], True),
    ("http with :80", "usual port", ["Host: localhost:80"], True),
    ("http with :443", "usual port", ["Host: localhost:443"], False),
    ("a twin with :80", "usual port", ["Host: [::1]:80"], True),
    ("https without :443", "public", ["Host: chat.example.org"], True),
    ("https with :443", "public", ["Host: chat.example.org:443"], True),
    ("https with :80", "public", ["Host: chat.example.org:80"], False),
    ("https in capitals", "public", ["Host: Chat.Example.ORG"], True),
    ("the address that the proxy connects to", "public", ["Host: 127.0.0.1:8000"], False),
    ("a sibling", "public", ["Host: www.example.org"], False),
    ("a dot at its end", "public", ["Host: chat.example.org."], False),
    ("a user before it", "public", ["Host: me@chat.example.org"], False),
    ("an odd port", "odd port", ["Host: chat.example.org:8443"], True),
    ("an odd port left out", "odd port", ["Host: chat.example.org"], False),
    ("an extra origin's host", "extra", ["Host: other.example.org"], True),
    ("an extra origin's host with :443", "extra", ["Host: other.example.org:443"], True),
    ("an extra origin's host on its port", "extra", ["Host: localhost:5173"], True),
    ("an extra origin's host on another port", "extra", ["Host: localhost:8000"], False),
    ("bytes that are no text", "local", ["Host: \xff\xfe"], False),
]


@pytest.mark.parametrize(("site", "lines", "passes"), [case[1:] for case in HOSTS], ids=[case[0] for case in HOSTS])
def test_host_rule(site: str, lines: list[str], passes: bool) -> None:
    """Only the names this server is known under pass the host rule, with or without the usual port."""
    found = join_repeated(headers(*lines))
    if passes:
        SITES[site].check_host(found)
    else:
        with pytest.raises(CrossOrigin):
            SITES[site].check_host(found)


@pytest.mark.parametrize("edge", SITES.values(), ids=SITES)
def test_no_cors_by_accident(edge: Edge) -> None:
    """Neither a wildcard nor null ever becomes an origin or a host of ours."""
    assert not edge.origins & {b"*", b"null", b""}
    assert not edge.hosts & {b"*", b""}


BROWSERS = [
    ("an SDK", ["Host: 127.0.0.1:8000", "User-Agent: Mozilla/5.0"], False),
    ("Origin", [f"Origin: {LOCAL}"], True),
    ("Sec-Fetch-Site", ["Sec-Fetch-Site: none"], True),
    ("both, empty", ["Origin:", "Sec-Fetch-Site:"], True),
    ("other fetch metadata only", ["Sec-Fetch-Mode: cors"], False),
]


@pytest.mark.parametrize(("lines", "verdict"), [case[1:] for case in BROWSERS], ids=[case[0] for case in BROWSERS])
def test_browser_is_known_by_what_only_browsers_send(lines: list[str], verdict: bool) -> None:
    """Origin or Sec-Fetch-Site, whatever stands in it, makes a caller a browser; nothing else does."""
    assert Edge.is_browser(join_repeated(headers(*lines))) is verdict


# ---- addresses -----------------------------------------------------------------------------------------------------

V4, V6 = "203.0.113.7", "2001:db8:1:2::7"
V6_KEY = "2001:db8:1:2::/64"

CALLERS = [
    # label, trusted proxies, peer, X-Forwarded-For lines, key, through a proxy
    ("a caller of its own", ["127.0.0.1"], V4, [], V4, False),
    ("a caller that forwards itself", ["127.0.0.1"], V4, ["198.51.100.1"], V4, False),
    ("a proxy that says nothing", ["127.0.0.1"], "127.0.0.1", [], "127.0.0.1", True),
    ("through a proxy", ["127.0.0.1"], "127.0.0.1", [V4], V4, True),
    ("the left part is the visitor's invention", ["127.0.0.1"], "127.0.0.1", [f"198.51.100.1, {V4}"], V4, True),
    ("an invented proxy on the left", ["127.0.0.1"], "127.0.0.1", [f"198.51.100.1, 127.0.0.1, {V4}"], V4, True),
    ("two proxies", ["127.0.0.1", "10.0.0.0/8"], "127.0.0.1", [f"{V4}, 10.1.2.3"], V4, True),
    (
        "two proxies, invention on the left",
        ["127.0.0.1", "10.0.0.0/8"],
        "127.0.0.1",
        [f"1.1.1.1, {V4}, 10.1.2.3"],
        V4,
        True,
    ),
    ("the second is not trusted", ["127.0.0.1"], "127.0.0.1", [f"{V4}, 10.1.2.3"], "10.1.2.3", True),
    ("lines in their order", ["127.0.0.1", "10.0.0.0/8"], "127.0.0.1", [V4, "10.1.2.3"], V4, True),
    ("all hops are proxies", ["127.0.0.1", "10.0.0.0/8"], "127.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3", True),
    ("everybody is trusted", ["0.0.0.0/0", "::/0"], "192.0.2.1", [f"{V4}, 198.51.100.1"], V4, True),
    ("junk", ["127.0.0.1"], "127.0.0.1", ["unknown"], "127.0.0.1", True),
    ("junk at the right end", ["127.0.0.1"], "127.0.0.1", [f"{V4}, unknown"], "127.0.0.1", True),
    ("junk behind a proxy", ["127.0.0.1", "10.0.0.0/8"], "127.0.0.1", [f"{V4}, _hidden, 10.1.2.3"], "10.1.2.3", True),
    ("junk left of the caller", ["127.0.0.1"], "127.0.0.1", [f"<script>, {V4}"], V4, True),
    ("an empty header", ["127.0.0.1"], "127.0.0.1", [""], "127.0.0.1", True),
    ("an empty item at the right end", ["127.0.0.1"], "127.0.0.1", [f"{V4},"], "127.0.0.1", True),
    ("an empty item on the left", ["127.0.0.1"], "127.0.0.1", [f", {V4}"], V4, True),
    ("blanks and tabs", ["127.0.0.1"], "127.0.0.1", [f"1.1.1.1 ,\t {V4}\t "], V4, True),
    ("empty brackets", ["127.0.0.1"], "127.0.0.1", ["[]"], "127.0.0.1", True),
    ("empty brackets with a port", ["127.0.0.1"], "127.0.0.1", [f"{V4}, []:80"], "127.0.0.1", True),
    ("a port behind IPv4", ["127.0.0.1"], "127.0.0.1", [f"{V4}:5678"], V4, True),
    ("IPv6", ["127.0.0.1"], "127.0.0.1", [V6], V6_KEY, True),
    ("IPv6 in brackets", ["127.0.0.1"], "127.0.0.1", [f"[{V6}]"], V6_KEY, True),
    ("IPv6 in brackets with a port", ["127.0.0.1"], "127.0.0.1", [f"[{V6}]:5678"], V6_KEY, True),
    ("a bracket that does not close", ["127.0.0.1"], "127.0.0.1", [f"[{V6}"], "127.0.0.1", True),
    ("a zone", ["127.0.0.1"], "127.0.0.1", ["fe80::1%eth0"], "fe80::/64", True),
    ("a zone in brackets with a port", ["127.0.0.1"], "127.0.0.1", ["[fe80::1%eth0]:5678"], "fe80::/64", True),
    ("an empty zone", ["127.0.0.1"], "127.0.0.1", ["fe80::1%"], "fe80::/64", True),
    ("IPv4 in IPv6", ["127.0.0.1"], "127.0.0.1", [f"::ffff:{V4}"], V4, True),
    ("IPv4 in IPv6, in brackets with a port", ["127.0.0.1"], "127.0.0.1", [f"[::ffff:{V4}]:5678"], V4, True),
    ("IPv4 in IPv6, in hexadecimal", ["127.0.0.1"], "127.0.0.1", ["::ffff:cb00:7107"], V4, True),
    ("a proxy on an IPv6 socket, IPv4 inside", ["127.0.0.1"], "::ffff:127.0.0.1", [V4], V4, True),
    ("a proxy with a zone", ["fe80::/10"], "fe80::1%eth0", [V4], V4, True),
    ("IPv6 of one house is one", ["127.0.0.1"], "127.0.0.1", ["2001:db8:1:2:ffff::1"], V6_KEY, True),
    ("IPv6 of the next house is another", ["127.0.0.1"], "127.0.0.1", ["2001:db8:1:3::7"], "2001:db8:1:3::/64", True),
    ("IPv4 with zeros before its numbers is junk", ["127.0.0.1"], "127.0.0.1", ["203.0.113.007"], "127.0.0.1", True),
    ("an address as one number is junk", ["127.0.0.1"], "127.0.0.1", ["3405803783"], "127.0.0.1", True),
    ("a name is junk", ["127.0.0.1"], "127.0.0.1", ["localhost"], "127.0.0.1", True),
    ("a quoted address is junk", ["127.0.0.1"], "127.0.0.1", [f'"{V4}"'], "127.0.0.1", True),
    ("bytes that are no text", ["127.0.0.1"], "127.0.0.1", ["\xb2\xb3.0.0.1"], "127.0.0.1", True),
    ("nobody is trusted", [], "127.0.0.1", [V4], "127.0.0.1", False),
    ("a socket peer, trusted", ["unix"], None, [V4], V4, True),
    ("a socket peer, trusted, saying nothing", ["unix"], None, [], UNIX, True),
    ("a socket peer, trusted, saying junk", ["unix"], None, ["unix:"], UNIX, True),
    ("a socket peer behind a proxy", ["unix", "10.0.0.0/8"], None, [f"{V4}, 10.1.2.3"], V4, True),
    ("a socket peer, not trusted", ["127.0.0.1"], None, [V4], UNIX, False),
    ("unix trusts no addresses", ["unix"], "127.0.0.1", [V4], "127.0.0.1", False),
]


@pytest.mark.parametrize(
    ("proxies", "came_from", "forwarded", "key", "through_proxy"),
    [case[1:] for case in CALLERS],
    ids=[case[0] for case in CALLERS],
)
def test_caller(proxies: list[str], came_from: str | None, forwarded: list[str], key: str, through_proxy: bool) -> None:
    """The caller is the first address from the right that is not a trusted proxy; a client cannot choose another."""
    found = join_repeated(headers(*(f"X-Forwarded-For: {line}" for line in forwarded)))
    caller = trusting(*proxies).caller(came_from, found)
    assert (caller.key, caller.through_proxy) == (key, through_proxy)


SHOWN = [
    (V4, "203.0.113.0/24"),
    (V6, "2001:db8:1::/48"),
    ("fe80::1%eth0", "fe80::/48"),
    (f"::ffff:{V4}", "203.0.113.0/24"),
    (None, UNIX),
]


@pytest.mark.parametrize(("came_from", "shown"), SHOWN)
def test_log_sees_a_neighbourhood(came_from: str | None, shown: str) -> None:
    """What a log may hold of an address is its /24, or its /48."""
    assert trusting().caller(came_from, {}).shown == shown


def test_only_x_forwarded_for_is_believed() -> None:
    """No other header that proxies write about addresses has a say."""
    lines = [f"{name}: {V4}" for name in ("Forwarded", "X-Real-IP", "True-Client-IP", "CF-Connecting-IP", "Via")]
    assert trusting("127.0.0.1").caller("127.0.0.1", join_repeated(headers(*lines))).key == "127.0.0.1"


def test_strangers_cannot_fill_the_memory() -> None:
    """Of resolved addresses so many are remembered and no more, and none whose header is long."""
    edge = trusting("127.0.0.1")
    edge.caller("127.0.0.1", {b"x-forwarded-for": b"1.1.1.1, " * LONGEST_REMEMBERED + V4.encode()})
    assert edge._resolve.cache_info().currsize == 0
    for number in range(REMEMBERED + 100):
        address = str(ipaddress.IPv4Address(number + (1 << 24)))
        assert edge.caller("127.0.0.1", {b"x-forwarded-for": address.encode()}).key == address
    assert edge._resolve.cache_info().currsize == REMEMBERED


addresses = st.ip_addresses().map(str)
items = addresses | st.sampled_from(
    ["", " ", "unknown", "[]", "[]:1", "%", "[%]", "10.0.0.1", "::ffff:10.0.0.1", "unix:"]
)


@given(st.lists(items, max_size=6), st.ip_addresses())
def test_left_of_the_caller_nothing_counts(invented: list[str], true: Address) -> None:
    """Whatever a visitor sends as X-Forwarded-For, a proxy that appends the true address makes that one count."""
    edge = trusting("192.0.2.0/24")
    alone = edge.resolve("192.0.2.1", str(true).encode())
    if not edge.is_proxy(true):
        assert edge.resolve("192.0.2.1", ", ".join([*invented, str(true)]).encode()) == alone


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_one_ipv6_subscriber_is_one(address: ipaddress.IPv6Address, host: int) -> None:
    """All addresses of one /64 share a key, and it names no other network."""
    other = ipaddress.IPv6Address(int(address) >> 64 << 64 | host)
    if address.ipv4_mapped is None and other.ipv4_mapped is None:
        key = trusting().caller(str(address), {}).key
        assert key == trusting().caller(str(other), {}).key
        assert ipaddress.ip_network(key) == ipaddress.ip_network((int(address) >> 64 << 64, 64))


@given(st.ip_addresses(), st.integers(0, 65535))
def test_addresses_are_read_as_proxies_write_them(address: Address, port: int) -> None:
    """An address reads the same bare, in brackets and with a port."""
    plain = parse_address(str(address))
    assert plain is not None
    assert parse_address(f"[{address}]:{port}") == parse_address(f" [{address}] ") == plain


# ---- the request's id ----------------------------------------------------------------------------------------------

REQUEST_IDS = [
    # label, peer, lines, kept
    ("from a proxy", "127.0.0.1", ["X-Request-Id: abc_DEF-123"], "abc_DEF-123"),
    ("64 characters", "127.0.0.1", [f"X-Request-Id: {'a' * 64}"], "a" * 64),
    ("65 characters", "127.0.0.1", [f"X-Request-Id: {'a' * 65}"], None),
    ("empty", "127.0.0.1", ["X-Request-Id:"], None),
    ("none", "127.0.0.1", [], None),
    ("from anyone else", V4, ["X-Request-Id: abc"], None),
    ("from anyone else who claims a proxy", V4, ["X-Request-Id: abc", "X-Forwarded-For: 127.0.0.1"], None),
    ("twice", "127.0.0.1", ["X-Request-Id: abc", "X-Request-Id: abc"], None),
    ("a line break", "127.0.0.1", ["X-Request-Id: abc\r\nevil"], None),
    ("a line break at its end", "127.0.0.1", ["X-Request-Id: abc\x0b\n."], None),
    ("a quote", "127.0.0.1", ['X-Request-Id: a"b'], None),
    ("a letter beyond ASCII", "127.0.0.1", ["X-Request-Id: \xe9t\xe9"], None),
    ("blanks inside", "127.0.0.1", ["X-Request-Id: a b"], None),
]


@pytest.mark.parametrize(
    ("came_from", "lines", "kept"), [case[1:] for case in REQUEST_IDS], ids=[case[0] for case in REQUEST_IDS]
)
def test_request_id(came_from: str, lines: list[str], kept: str | None) -> None:
    """A request's id is kept from trusted proxies alone, and only in a shape that no log can trip over."""
    edge, found = trusting("127.0.0.1"), join_repeated(headers(*lines))
    assert edge.request_id(edge.caller(came_from, found), found) == kept


def test_request_id_ends_where_it_ends() -> None:
    """A line break behind a good id makes it a bad one."""
    assert trusting().request_id(Caller(V4, V4, True), {b"x-request-id": b"abc\n"}) is None


# ---- the body's outside --------------------------------------------------------------------------------------------

CONTENT_TYPES = [
    # label, headers, passes
    ("JSON", ["Content-Type: application/json"], True),
    ("with a charset", ["Content-Type: application/json; charset=utf-8"], True),
    ("with a charset and no blank", ["Content-Type: application/json;charset=utf-8"], True),
    ("with blanks before the parameter", ["Content-Type: application/json \t; charset=utf-8"], True),
    ("with an empty parameter", ["Content-Type: application/json;"], True),
    ("in capitals", ["Content-Type: Application/JSON"], True),
    ("twice", ["Content-Type: application/json", "Content-Type: application/json"], True),
    ("twice, JSON first", ["Content-Type: application/json", "Content-Type: text/plain"], True),
    ("twice, JSON last", ["Content-Type: text/plain", "Content-Type: application/json"], False),
    ("a list, JSON last", ["Content-Type: text/plain, application/json"], False),
    ("missing", [], False),
    ("empty", ["Content-Type:"], False),
    ("an empty first value", ["Content-Type: , application/json"], False),
    ("what a form can send: plain", ["Content-Type: text/plain"], False),
    ("what a form can send: plain with JSON's name", ["Content-Type: text/plain; application/json"], False),
    ("what a form can send: urlencoded", ["Content-Type: application/x-www-form-urlencoded"], False),
    ("what a form can send: multipart", ["Content-Type: multipart/form-data; boundary=application/json"], False),
    ("a kin of JSON", ["Content-Type: application/problem+json"], False),
    ("JSON's old name", ["Content-Type: text/json"], False),
    ("a longer name", ["Content-Type: application/jsonp"], False),
    ("blanks inside", ["Content-Type: application / json"], False),
    ("quoted", ['Content-Type: "application/json"'], False),
    ("bytes that are no text", ["Content-Type: \xff"], False),
]


@pytest.mark.parametrize(
    ("lines", "passes"), [case[1:] for case in CONTENT_TYPES], ids=[case[0] for case in CONTENT_TYPES]
)
def test_content_type_rule(lines: list[str], passes: bool) -> None:
    """A body passes as JSON only under the name that no form can send."""
    found = join_repeated(headers(*lines, "Content-Length: 2"))
    if passes:
        SITES["local"].check_body(found)
    else:
        with pytest.raises(UnsupportedMediaType):
            SITES["local"].check_body(found)


LENGTHS = [
    # label, Content-Length lines, refusal
    ("none at all", [], LengthRequired),
    ("0", ["0"], None),
    ("the most", ["1024"], None),
    ("one more", ["1025"], BodyTooLarge),
    ("more than 64 bits", ["9" * 30], BodyTooLarge),
    ("more digits than Python reads", ["9" * 5000], BodyTooLarge),
    ("negative", ["-1"], InvalidRequest),
    ("with a sign", ["+5"], InvalidRequest),
    ("hexadecimal", ["0x10"], InvalidRequest),
    ("with an underscore", ["1_0"], InvalidRequest),
    ("a fraction", ["5.0"], InvalidRequest),
    ("empty", [""], InvalidRequest),
    ("words", ["many"], InvalidRequest),
    ("digits beyond ASCII", ["\xb2"], InvalidRequest),
    ("twice", ["5", "5"], InvalidRequest),
    ("twice, and different", ["5", "6"], InvalidRequest),
]


@pytest.mark.parametrize(("written", "refusal"), [case[1:] for case in LENGTHS], ids=[case[0] for case in LENGTHS])
def test_content_length_rule(written: list[str], refusal: type[Refusal] | None) -> None:
    """A body that announces too much is refused before a byte of it is read."""
    edge = Edge(Server(public_url=LOCAL, max_body_bytes=1024))
    lines = ["Content-Type: application/json", *(f"Content-Length: {length}" for length in written)]
    found = join_repeated(headers(*lines))
    if refusal is None:
        edge.check_body(found)
    else:
        with pytest.raises(refusal) as raised:
            edge.check_body(found)
        assert type(raised.value) is refusal


def test_chunked_body_is_counted_as_it_comes() -> None:
    """A chunked body announces no length and needs none."""
    SITES["local"].check_body(join_repeated(headers("Content-Type: application/json", "Transfer-Encoding: chunked")))


def test_media_type_comes_before_length() -> None:
    """Of two faults in the body's outside, the type is told first."""
    with pytest.raises(UnsupportedMediaType):
        SITES["local"].check_body(join_repeated(headers("Content-Type: text/plain", "Content-Length: 99999999")))


# ---- headers and cookies -------------------------------------------------------------------------------------------


def test_repeated_headers_are_joined() -> None:
    """What comes twice is one value: cookies by a semicolon, everything else by a comma."""
    found = join_repeated([(b"a", b"1"), (b"cookie", b"x=1"), (b"b", b"2"), (b"a", b"3"), (b"cookie", b"y=2")])
    assert found == {b"a": b"1, 3", b"b": b"2", b"cookie": b"x=1; y=2"}


COOKIES = [
    # label, Cookie lines, values of `chat`
    ("none", [], []),
    ("empty", [""], []),
    ("ours", ["chat=abc"], [b"abc"]),
    ("among others", ["theme=dark; chat=abc; lang=am"], [b"abc"]),
    ("without a blank", ["theme=dark;chat=abc"], [b"abc"]),
    ("with blanks and tabs", ["theme=dark \t;  chat=abc  "], [b"abc"]),
    ("twice in one line", ["chat=abc; chat=def"], [b"abc", b"def"]),
    ("twice in two lines", ["chat=abc", "chat=def"], [b"abc", b"def"]),
    ("twice the same", ["chat=abc; chat=abc"], [b"abc", b"abc"]),
    ("empty value", ["chat="], [b""]),
    ("no value", ["chat"], [b""]),
    ("an equals sign in the value", ["chat=a=b=="], [b"a=b=="]),
    ("quotes are part of the value", ['chat="abc"'], [b'"abc"']),
    ("a comma is part of the value", ["chat=abc,chat=def"], [b"abc,chat=def"]),
    ("names keep their case", ["Chat=abc; CHAT=def"], []),
    ("a longer name", ["chats=abc; xchat=def; __Host-chat=ghi"], []),
    ("the name as a value", ["other=chat=abc"], []),
    ("a nameless cookie that looks like ours", ["=chat=abc"], []),
    ("bytes that are no text", ["chat=\xff\xfe"], [b"\xff\xfe"]),
]


@pytest.mark.parametrize(("lines", "values"), [case[1:] for case in COOKIES], ids=[case[0] for case in COOKIES])
def test_cookies_named(lines: list[str], values: list[bytes]) -> None:
    """Every value under exactly our name is found, as it stands there; none under any other."""
    assert cookies_named(join_repeated(headers(*(f"Cookie: {line}" for line in lines))), b"chat") == values


# ---- whatever comes ------------------------------------------------------------------------------------------------

NAMES = [
    *(b"host", b"origin", b"sec-fetch-site", b"x-forwarded-for", b"x-request-id", b"cookie"),
    *(b"content-type", b"content-length", b"authorization", b""),
]
FRAGMENTS = [
    *(
        b"[",
        b"]",
        b"[]",
        b"%",
        b":",
        b"::",
        b"::1",
        b"::ffff:",
        b"1.2.3.4",
        b"127.0.0.1",
        b",",
        b";",
        b"=",
        b" ",
        b"\t",
    ),
    *(b"http://", b"https://", b"null", b"same-origin", b"none", b"application/json", b"9", b"0", b"-", b".", b"chat"),
    *(b"\x00", b"\n", b"\r\n", b"\xff", b"\xc3\xa9", b"\xb2", b"localhost:8000", b"/", b'"', b"@"),
]
values = st.binary(max_size=40) | st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(b"".join)
PEERS = [None, "127.0.0.1", "::1", "203.0.113.7", "fe80::1%eth0", "::ffff:127.0.0.1"]


def ask_everything(edge: Edge, came_from: str | None, pairs: Iterable[tuple[bytes, bytes]]) -> None:
    found = join_repeated(pairs)
    caller = edge.caller(came_from, found)
    assert caller.key
    assert re.fullmatch(r"unix|[0-9a-f.:]+/\d+", caller.shown)
    edge.request_id(caller, found)
    edge.is_browser(found)
    cookies_named(found, b"chat")
    for check in (edge.check_host, edge.check_origin, edge.check_body):
        with suppress(Refusal):
            check(found)


@given(st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=8), st.sampled_from(PEERS))
@example([(b"x-forwarded-for", b"[]")], "127.0.0.1")
@example([(b"x-forwarded-for", b"[]:80")], None)
def test_no_bytes_make_the_edge_fail(pairs: Pairs, came_from: str | None) -> None:
    """Whatever stands in whichever header, the edge answers or refuses; it never breaks, and the key is never empty."""
    for edge in (trusting("127.0.0.1", "unix"), SITES["public"]):
        ask_everything(edge, came_from, pairs)
