"""Logging in with OpenID Connect: against a provider of ours that can do everything wrong, and one that others wrote.

`Faulty` keeps the protocol and is as strict as a provider can be, except where a test tells it otherwise. No reason of
a refusal may show what nobody but the browser, the provider and we should know: `refusal_of` looks at each.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import subprocess
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_plus, urlencode, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from itsdangerous import Signer
from joserfc.errors import UnsupportedAlgorithmError
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey
from joserfc.jws import JWSRegistry
from support.harness import LOOPS, PATIENCE, Clock, Peer, ScriptedUpstream, Seen, eventually
from support.oidc_provider import log_in, start
from support.stage import always

from proxy.accounts.login import LoginFailed, oidc
from proxy.accounts.login.flow import LONGEST_PATH, SALT, Flow, FlowCookies, safe_redirect_path
from proxy.accounts.login.id_token import ALGORITHMS, Profile, Registry
from proxy.accounts.login.oidc import Provider, name_of
from proxy.settings import Oidc, Secret
from proxy.transport.pool import Transport

NOW = 1_800_000_000  # what the injected wall clock says
CLIENT = "chat+proxy:1"  # form-encoding alters it, as it does the secret
CALLBACK = "https://chat.example.org/api/session/callback"
EMAIL = "Ada@Example.org"
WELL_KNOWN = "/.well-known/openid-configuration"
PATHS = {"discovery": WELL_KNOWN, "token": "/token", "keys": "/jwks", "userinfo": "/userinfo"}
LOCK = Path(__file__).parents[1] / "support" / "oidc" / "package-lock.json"

Act = Callable[[Peer], Awaitable[None]]
Forge = Callable[[dict[str, Any], dict[str, Any]], str]  # a header and claims to a token


# ---- a provider that can do everything wrong ------------------------------------------------------------------------


def key_for(algorithm: str, number: int = 0) -> Key:
    """A private key that fits; the same one for each number."""
    return generated(*ALGORITHMS[algorithm], number)


@lru_cache
def generated(kind: str, curve: str, number: int) -> Key:
    parameters: Any = {"kid": f"{kind}{curve}-{number}"}
    if kind == "RSA":
        return RSAKey.generate_key(2048, parameters)
    return ECKey.generate_key(curve, parameters) if kind == "EC" else OKPKey.generate_key("Ed25519", parameters)


def encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(header: dict[str, Any], claims: object, key: Key) -> str:
    """A token as joserfc's algorithms sign it; its own functions would not make all that is wanted here."""
    parts = f"{encode(json.dumps(header).encode())}.{encode(json.dumps(claims).encode())}"
    return f"{parts}.{encode(JWSRegistry.algorithms[header['alg']].sign(parts.encode(), key))}"


def merged(own: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With the changes; what is changed to ... is left out."""
    return {name: value for name, value in {**own, **changes}.items() if value is not ...}


@dataclass
class Faulty:
    """A provider of ours. Each dict alters what it would send; an entry of `acts` is done in place of an answer."""

    client_secret: str = field(default_factory=lambda: "s+c/%" + secrets.token_urlsafe(24))
    code: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    access_token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    algorithm: str = "RS256"
    metadata: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    more: bytes = b""  # at the end of the callback's query
    acts: dict[str, Act] = field(default_factory=dict)
    signing: Key | None = None
    published: list[dict[str, Any]] | None = None
    forge: Forge | None = None
    keys_type: str = "application/json; charset=utf-8"
    path: str = ""
    loop: str = "uvloop"
    origin: str = ""
    asked: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    spent: bool = False
    id_token: str = ""

    @property
    def issuer(self) -> str:
        return self.origin + self.path

    @property
    def key(self) -> Key:
        return self.signing or key_for(self.algorithm)

    def authorize(self, url: str) -> bytes:
        """What a browser is sent to, and comes back with: the query of the callback."""
        assert url.startswith(f"{self.origin}/authorize?")
        self.asked = dict(parse_qsl(urlsplit(url).query, strict_parsing=True))
        own = {"code": self.code, "state": self.asked["state"], "iss": self.issuer}
        return urlencode(merged(own, self.callback)).encode() + self.more

    async def act(self, peer: Peer) -> None:
        assert peer.seen is not None
        method, target, _ = peer.seen.head.decode().split(" ", 2)
        self.calls.append(target)
        assert peer.seen.headers["accept-encoding"] == "identity"
        if act := self.acts.get(target):
            await act(peer)
            return
        endpoints = {
            f"GET {self.path.removesuffix('/')}{WELL_KNOWN}": self.discovery,
            "GET /jwks": self.keys,
            "GET /userinfo": self.userinfo,
            "POST /token": self.redeem,
        }
        status, answer = endpoints[f"{method} {target}"](peer.seen)
        kind = self.keys_type if target == "/jwks" else "application/json"
        await peer.whole(json.dumps(answer).encode(), status, kind)

    def discovery(self, _: Seen) -> tuple[str, object]:
        own = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.origin}/authorize",
            "token_endpoint": f"{self.origin}/token",
            "jwks_uri": f"{self.origin}/jwks",
            "userinfo_endpoint": f"{self.origin}/userinfo",
            "end_session_endpoint": f"{self.origin}/end",
            "id_token_signing_alg_values_supported": [self.algorithm],
            "authorization_response_iss_parameter_supported": True,
            "response_types_supported": ["code"],
        }
        return "200 OK", merged(own, self.metadata)

    def keys(self, _: Seen) -> tuple[str, object]:
        own = [key_for(self.algorithm).as_dict(private=False)]
        return "200 OK", {"keys": own if self.published is None else self.published}

    def userinfo(self, seen: Seen) -> tuple[str, object]:
        assert seen.headers["authorization"] == f"Bearer {self.access_token}"
        return "200 OK", merged({"sub": "ada", "email": EMAIL, "email_verified": True}, self.profile)

    def redeem(self, seen: Seen) -> tuple[str, object]:
        assert seen.headers["content-type"] == "application/x-www-form-urlencoded"
        form = dict(parse_qsl(seen.body.decode(), strict_parsing=True))
        if authorization := seen.headers.get("authorization"):
            pair = base64.b64decode(authorization.removeprefix("Basic ")).decode().split(":")
            given = [unquote_plus(part) for part in pair]
        else:
            given = [form.pop("client_id"), form.pop("client_secret")]
        if given != [CLIENT, self.client_secret]:
            return "401 Unauthorized", {"error": "invalid_client"}
        challenge = encode(hashlib.sha256(form.pop("code_verifier").encode()).digest())
        wanted = {"grant_type": "authorization_code", "code": self.code, "redirect_uri": CALLBACK}
        if self.spent or challenge != self.asked["code_challenge"] or form != wanted:
            return "400 Bad Request", {"error": "invalid_grant", "error_description": seen.body.decode()}
        self.spent = True
        return "200 OK", merged(self.granted(), self.tokens)

    def granted(self) -> dict[str, Any]:
        claims = {
            "iss": self.issuer,
            "sub": "ada",
            "aud": CLIENT,
            "exp": NOW + 300,
            "iat": NOW,
            "nonce": self.asked["nonce"],
            "email": EMAIL,
            "email_verified": True,
        }
        header = merged({"alg": self.algorithm, "kid": self.key.kid, "typ": "JWT"}, self.header)
        self.id_token = (self.forge or self.sign)(header, merged(claims, self.claims))
        return {"access_token": self.access_token, "token_type": "Bearer", "id_token": self.id_token}

    def sign(self, header: dict[str, Any], claims: dict[str, Any]) -> str:
        return signed(header, claims, self.key)


@contextmanager
def serving(faulty: Faulty) -> Iterator[Faulty]:
    with ScriptedUpstream(always(faulty.act)) as server:
        faulty.origin = f"http://127.0.0.1:{server.port}"
        yield faulty


def provider_at(
    faulty: Faulty, transport: Transport, clock: Callable[[], float] = lambda: 0.0, **configured: Any
) -> Provider:
    settings = Oidc(
        **{"issuer": faulty.issuer, "client_id": CLIENT, "client_secret": Secret(faulty.client_secret), **configured}
    )
    return Provider(settings, transport, redirect_uri=CALLBACK, wall=lambda: NOW, clock=clock)


async def settled(transport: Transport) -> None:
    """Returns when no connection is left but idle ones: an aborted one goes with the loop's next turn."""
    async with asyncio.timeout(PATIENCE):
        while transport.open_sockets > len(transport._idle):  # noqa: ASYNC110  # it has no event for it
            await asyncio.sleep(0)
    await transport.aclose()


async def attempt(provider: Provider, faulty: Faulty) -> tuple[str, Flow]:
    """One login from its beginning to the subject."""
    faulty.spent = False
    url, flow = await provider.begin(os.urandom, "/", "")
    return await provider.finish(faulty.authorize(url), flow), flow


def login(faulty: Faulty, **configured: Any) -> str:
    """The subject that a whole login comes to, and nothing is left behind. Raises LoginFailed."""

    async def run() -> str:
        transport = Transport()
        try:
            subject, _ = await attempt(provider_at(faulty, transport, **configured), faulty)
            return subject
        finally:
            await settled(transport)

    with asyncio.Runner(loop_factory=LOOPS[faulty.loop]) as runner:
        return runner.run(run())


def refusal_of(faulty: Faulty, **configured: Any) -> tuple[int, str]:
    """Status and reason of a login that must fail; what is secret stands in nothing that a log could hold."""
    with pytest.raises(LoginFailed) as caught:
        login(faulty, **configured)
    error = caught.value
    assert error.__suppress_context__ or error.__context__ is None
    logged = f"{error.reason} {error!r} {''.join(traceback.format_exception(error))}"
    hidden = [faulty.client_secret, faulty.code, faulty.access_token, EMAIL]
    hidden += [part for part in faulty.id_token.split(".") if len(part) > 4]
    hidden += [faulty.asked[name] for name in ("state", "nonce", "code_challenge") if name in faulty.asked]
    assert not [value for value in hidden if value in logged]
    return error.status, error.reason


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with serving(Faulty()) as faulty:
        yield faulty


# ---- how it is told so -----------------------------------------------------------------------------------------------

Plan = Callable[[Faulty], object]


def having(**values: Any) -> Plan:
    def plan(faulty: Faulty) -> None:
        for name, value in values.items():
            setattr(faulty, name, value)

    return plan


def both(*plans: Plan) -> Plan:
    return lambda faulty: [plan(faulty) for plan in plans]


def announcing(*algorithms: str) -> Plan:
    return having(metadata={"id_token_signing_alg_values_supported": list(algorithms)})


def forging(forge: Forge, *announced: str) -> Plan:
    return both(having(forge=forge), announcing(*announced) if announced else having())


def publishing(*names: str, **changes: Any) -> Plan:
    """Keys like `RS256` and `RS256 1`, with these changes."""

    def plan(faulty: Faulty) -> None:
        keys = [
            key_for(algorithm, int(number or 0)) for algorithm, _, number in (name.partition(" ") for name in names)
        ]
        faulty.published = [merged(dict(key.as_dict(private=False)), changes) for key in keys]

    return plan


def renaming(algorithm: str) -> Forge:
    def forge(header: dict[str, Any], claims: dict[str, Any]) -> str:
        _, payload, signature = signed(header, claims, key_for("RS256")).split(".")
        return f"{encode(json.dumps({**header, 'alg': algorithm}).encode())}.{payload}.{signature}"

    return forge


def other_signer(header: dict[str, Any], claims: dict[str, Any]) -> str:
    return signed(header, claims, key_for("RS256", 1))


def spending(faulty: Faulty) -> Act:
    """The code has been used by another client."""

    async def act(peer: Peer) -> None:
        assert peer.seen is not None
        faulty.spent = True
        status, answer = faulty.redeem(peer.seen)
        await peer.whole(json.dumps(answer).encode(), status)

    return act


def rotating(faulty: Faulty) -> Act:
    """The provider has got another secret for us."""

    async def act(peer: Peer) -> None:
        assert peer.seen is not None
        known, faulty.client_secret = faulty.client_secret, "another"
        status, answer = faulty.redeem(peer.seen)
        faulty.client_secret = known
        await peer.whole(json.dumps(answer).encode(), status)

    return act


def weak_key() -> dict[str, Any]:
    """1024 bits, with zeros before them."""
    modulus = (1 << 1023) + 1
    return {"kty": "RSA", "kid": key_for("RS256").kid, "n": encode(bytes(128) + modulus.to_bytes(128)), "e": "AQAB"}


def mac_with_public_key(header: dict[str, Any], claims: dict[str, Any]) -> str:
    """The oldest attack: HS256 with the public key as the secret."""
    pem = key_for("RS256").as_pem(private=False)  # type: ignore[union-attr]
    parts = f"{encode(json.dumps({**header, 'alg': 'HS256'}).encode())}.{encode(json.dumps(claims).encode())}"
    return f"{parts}.{encode(hmac.digest(pem, parts.encode(), 'sha256'))}"


def unsigned(header: dict[str, Any], claims: dict[str, Any]) -> str:
    return f"{encode(json.dumps({**header, 'alg': 'none'}).encode())}.{encode(json.dumps(claims).encode())}."


def with_own_key(header: dict[str, Any], claims: dict[str, Any]) -> str:
    """Signed by a key that the token brings along."""
    key = key_for("RS256", 1)
    return signed({**header, "jwk": key.as_dict(private=False)}, claims, key)


# ---- a login that goes well -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_login_with_each_algorithm(algorithm: str, faulty: Faulty) -> None:
    """Whatever asymmetric algorithm the provider signs with; at_hash is by its hash."""
    faulty.algorithm = algorithm
    digest = hashlib.new(
        "sha512" if algorithm.startswith("Ed") else f"sha{algorithm[-3:]}", faulty.access_token.encode()
    )
    faulty.claims["at_hash"] = encode(digest.digest()[: digest.digest_size // 2])
    assert login(faulty) == EMAIL.lower()
    assert faulty.calls == [WELL_KNOWN, "/token", "/jwks"]


def test_what_the_provider_is_asked(faulty: Faulty) -> None:
    """The authorization request: code flow, S256, the redirect URI to the letter, openid whatever the settings say."""

    async def run() -> None:
        transport = Transport()
        faulty.metadata["authorization_endpoint"] = f"{faulty.origin}/authorize?tenant=1"
        provider = provider_at(faulty, transport, scopes=("email", "profile", "email"))
        taken: list[bytes] = []

        def randomness(count: int) -> bytes:
            taken.append(os.urandom(count))
            return taken[-1]

        url, flow = await provider.begin(randomness, "/?q=1#a", "before")
        assert [len(raw) for raw in taken] == [32, 32, 32]
        assert [flow.state, flow.nonce, flow.verifier] == [encode(raw) for raw in taken]
        assert (flow.next, flow.replaced, flow.began) == ("/?q=1#a", "before", NOW)
        assert dict(parse_qsl(urlsplit(url).query, strict_parsing=True)) == {
            "tenant": "1",
            "response_type": "code",
            "client_id": CLIENT,
            "redirect_uri": CALLBACK,
            "scope": "openid email profile",
            "state": flow.state,
            "nonce": flow.nonce,
            "code_challenge": encode(hashlib.sha256(flow.verifier.encode()).digest()),
            "code_challenge_method": "S256",
        }
        _, elsewhere = await provider.begin(os.urandom, "//evil.example", "")
        assert elsewhere.next == "/"
        await transport.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("path", ["", "/", "/tenant", "/tenant/"])
def test_the_issuers_own_slash(path: str, faulty: Faulty) -> None:
    """The document is looked for behind the issuer without its slash; the issuer is compared with it."""
    faulty.path = path
    assert login(faulty) == EMAIL.lower()
    assert faulty.calls[0] == path.rstrip("/") + WELL_KNOWN


@pytest.mark.parametrize(
    "methods",
    [..., ["client_secret_basic"], ["client_secret_post"], ["private_key_jwt", "client_secret_post"]],
    ids=str,
)
def test_how_we_authenticate(methods: Any, faulty: Faulty) -> None:
    """As the provider allows, and Basic where it says nothing."""
    faulty.metadata["token_endpoint_auth_methods_supported"] = methods
    assert login(faulty) == EMAIL.lower()


def test_the_secret_is_read_again(faulty: Faulty, tmp_path: Path) -> None:
    """A secret that changes in its file is used with the next login."""
    file = tmp_path / "secret"
    file.write_text(faulty.client_secret)
    assert login(faulty, client_secret=Secret("the one before", file)) == EMAIL.lower()


GOOD: dict[str, Plan] = {
    "no iss parameter, none promised": lambda f: (
        f.callback.update(iss=...),
        f.metadata.update(authorization_response_iss_parameter_supported=False),
    ),
    "several aud with our azp": lambda f: f.claims.update(aud=["another", CLIENT], azp=CLIENT),
    "a list of one aud": lambda f: f.claims.update(aud=[CLIENT]),
    "59 s after the end": lambda f: f.claims.update(exp=NOW - 59),
    "a clock 60 s ahead of ours": lambda f: f.claims.update(iat=NOW + 60, nbf=NOW + 60),
    "fractions of a second": lambda f: f.claims.update(exp=NOW + 0.5, iat=NOW - 0.5),
    "no kid, and one key": lambda f: f.header.update(kid=...),
    "fields of a header that we do not know": lambda f: f.header.update(x="y", x5c=["A" * 4000]),
    "a kid that two kinds of key share": publishing("ES256", "RS256", kid="RSA-0"),
    "a key of an unknown kind beside it": lambda f: having(
        published=[{"kty": "AKP", "kid": f.key.kid, "pub": "x"}, f.key.as_dict(private=False)]
    )(f),
    "a key that says what it is for": publishing("RS256", use="sig", alg="RS256", key_ops=["verify"]),
    "a private key, published by mistake": lambda f: having(published=[f.key.as_dict(private=True)])(f),
    "keys with their own media type": having(keys_type="application/jwk-set+json"),
    "bearer, in lower case": lambda f: f.tokens.update(token_type="bearer"),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_allowed(case: str, faulty: Faulty) -> None:
    """Providers differ within the specifications, and clocks a little."""
    GOOD[case](faulty)
    assert login(faulty) == EMAIL.lower()


# ---- what is refused ------------------------------------------------------------------------------------------------


ALG = "id_token: alg is not an asymmetric one that the provider announces"
NO_KEY = "id_token: not one key of the provider fits"
BAD_URL = "discovery: a URL that is not https, or not a plain one"
TWICE = "callback: a parameter that comes twice"

REFUSED: dict[str, tuple[Plan, int, str]] = {
    # the browser's answer
    "another state": (lambda f: f.callback.update(state="x"), 400, "callback: of another state"),
    "a state that is not ASCII": (lambda f: f.callback.update(state="é"), 400, "callback: of another state"),
    "no state": (lambda f: f.callback.update(state=...), 400, "callback: of another state"),
    "an empty state": (lambda f: f.callback.update(state=""), 400, "callback: of another state"),
    "a state twice": (having(more=b"&state=x"), 400, TWICE),
    "a code twice": (having(more=b"&code=x"), 400, TWICE),
    "no code": (lambda f: f.callback.update(code=...), 400, "callback: no code, or too long a one"),
    "an empty code": (lambda f: f.callback.update(code=""), 400, "callback: no code, or too long a one"),
    "a huge code": (lambda f: f.callback.update(code="x" * 4097), 400, "callback: no code, or too long a one"),
    "many parameters": (having(more=b"&a" * 20), 400, "callback: a query that cannot be read"),
    "not UTF-8": (having(more=b"&a=%ff"), 400, "callback: a query that cannot be read"),
    "raw bytes": (having(more=b"&state=\xff\x00"), 400, TWICE),
    "denied": (
        lambda f: f.callback.update(error="access_denied", code=...),
        400,
        "callback: the provider reports access_denied",
    ),
    "an error that is a text": (
        lambda f: f.callback.update(error="<b>" + f.code),
        400,
        "callback: the provider reports an error we do not repeat",
    ),
    "an error that is the code": (
        lambda f: f.callback.update(error=f.code),
        400,
        "callback: the provider reports an error we do not repeat",
    ),
    "an error of another issuer": (
        lambda f: f.callback.update(error="access_denied", iss="https://evil.example"),
        400,
        "callback: of another iss",
    ),
    "mix-up": (lambda f: f.callback.update(iss="https://evil.example"), 400, "callback: of another iss"),
    "mix-up, iss not promised": (
        lambda f: (
            f.callback.update(iss="https://evil.example"),
            f.metadata.update(authorization_response_iss_parameter_supported=False),
        ),
        400,
        "callback: of another iss",
    ),
    "iss with a slash more": (lambda f: f.callback.update(iss=f"{f.issuer}/"), 400, "callback: of another iss"),
    "no iss, though promised": (lambda f: f.callback.update(iss=...), 400, "callback: iss is missing"),
    # discovery
    "discovery of another issuer": (
        lambda f: f.metadata.update(issuer="https://evil.example"),
        502,
        "discovery: of another issuer",
    ),
    "an issuer with a slash more": (
        lambda f: f.metadata.update(issuer=f"{f.issuer}/"),
        502,
        "discovery: of another issuer",
    ),
    "no token endpoint": (lambda f: f.metadata.update(token_endpoint=...), 502, "discovery: not the JSON it should be"),
    "no issuer": (lambda f: f.metadata.update(issuer=...), 502, "discovery: not the JSON it should be"),
    "plain http elsewhere": (lambda f: f.metadata.update(token_endpoint="http://example.org/t"), 502, BAD_URL),
    "another scheme": (lambda f: f.metadata.update(jwks_uri="file:///etc/passwd"), 502, BAD_URL),
    "a line break in a URL": (
        lambda f: f.metadata.update(authorization_endpoint=f"{f.origin}/a\r\nx: y"),
        502,
        BAD_URL,
    ),
    "a backslash in a URL": (lambda f: f.metadata.update(authorization_endpoint="https://a\\@b/"), 502, BAD_URL),
    "a backslash in a host": (lambda f: f.metadata.update(jwks_uri="https://idp.example\\.evil/"), 502, BAD_URL),
    "a space in a URL": (lambda f: f.metadata.update(end_session_endpoint=f"{f.origin}/a b"), 502, BAD_URL),
    "a quote in a URL": (lambda f: f.metadata.update(end_session_endpoint=f'{f.origin}/a"b'), 502, BAD_URL),
    "a user in a URL": (lambda f: f.metadata.update(userinfo_endpoint="https://u:p@a/"), 502, BAD_URL),
    "a fragment in a URL": (lambda f: f.metadata.update(authorization_endpoint=f"{f.origin}/a#"), 502, BAD_URL),
    "no host in a URL": (lambda f: f.metadata.update(end_session_endpoint="https:///x"), 502, BAD_URL),
    "a bracket in a URL": (lambda f: f.metadata.update(end_session_endpoint="https://[::1/"), 502, BAD_URL),
    "a port that is none": (lambda f: f.metadata.update(end_session_endpoint="https://a:b/"), 502, BAD_URL),
    "an impossible port": (lambda f: f.metadata.update(end_session_endpoint="https://a:99999/"), 502, BAD_URL),
    "no way to authenticate": (
        lambda f: f.metadata.update(token_endpoint_auth_methods_supported=["private_key_jwt", "none"]),
        502,
        "discovery: no supported way to authenticate",
    ),
    # the token endpoint
    "a wrong secret": (
        lambda f: f.acts.update({"/token": rotating(f)}),
        502,
        "token: the provider reports invalid_client",
    ),
    "a replayed code": (
        lambda f: f.acts.update({"/token": spending(f)}),
        400,
        "token: the provider reports invalid_grant",
    ),
    "a code that is not theirs": (
        lambda f: f.callback.update(code="another"),
        400,
        "token: the provider reports invalid_grant",
    ),
    "an error that is the secret": (
        lambda f: f.acts.update({"/token": answering(json.dumps({"error": f.client_secret}).encode(), "400 No")}),
        502,
        "token: the provider reports an error we do not repeat",
    ),
    "an error of another type": (
        lambda f: f.acts.update({"/token": answering(b'{"error": 5}', "401 No")}),
        502,
        "token: error: not the JSON it should be",
    ),
    "no id_token": (lambda f: f.tokens.update(id_token=...), 502, "token: not the JSON it should be"),
    "no access token": (lambda f: f.tokens.update(access_token=...), 502, "token: not the JSON it should be"),
    "an access token that breaks a header": (
        lambda f: f.tokens.update(access_token="a\r\nx: y"),
        502,
        "token: not a bearer token",
    ),
    "another kind of token": (lambda f: f.tokens.update(token_type="DPoP"), 502, "token: not a bearer token"),
    # the signature
    "alg none": (forging(unsigned), 502, ALG),
    "alg none, announced": (forging(unsigned, "none", "RS256"), 502, ALG),
    "HS256 with the public key": (forging(mac_with_public_key), 502, ALG),
    "HS256 with the public key, announced": (forging(mac_with_public_key, "HS256", "RS256"), 502, ALG),
    "an alg that was not announced": (announcing("ES256"), 502, ALG),
    "no alg announced": (announcing(), 502, ALG),
    "an alg nobody knows": (lambda f: having(forge=renaming("RS1"))(f), 502, ALG),
    "an unknown kid": (lambda f: f.header.update(kid="another"), 502, NO_KEY),
    "no kid, and two keys": (
        both(having(header={"kid": ...}), publishing("RS256", "RS256 1")),
        502,
        NO_KEY,
    ),
    "no keys": (publishing(), 502, NO_KEY),
    "a key for encryption": (publishing("RS256", use="enc"), 502, NO_KEY),
    "a key for another alg": (publishing("RS256", alg="PS256"), 502, NO_KEY),
    "a key that may only sign": (publishing("RS256", key_ops=["sign"]), 502, NO_KEY),
    "a key of another kind": (publishing("ES256", kid="RSA-0"), 502, NO_KEY),
    "a key on another curve": (
        both(having(algorithm="ES256"), publishing("ES384", kid="ECP-256-0")),
        502,
        NO_KEY,
    ),
    "a symmetric key": (having(published=[{"kty": "oct", "kid": "RSA-0", "k": "AAAA"}]), 502, NO_KEY),
    "a short key": (lambda f: having(published=[weak_key()])(f), 502, "id_token: the provider's key is too short"),
    "a key that is none": (
        publishing("RS256", n="A" * 8 + "!" * 400),
        502,
        "id_token: the key or the signature cannot be read",
    ),
    "a point off the curve": (
        both(having(algorithm="ES256"), publishing("ES256", x=encode(b"\1" * 32))),
        502,
        "id_token: the key or the signature cannot be read",
    ),
    "keys that are no list": (
        lambda f: f.acts.update({"/jwks": answering(b'{"keys": {}}')}),
        502,
        "keys: not the JSON it should be",
    ),
    "signed by another key": (forging(other_signer), 502, "id_token: bad_signature"),
    "a key in the header": (forging(with_own_key), 502, "id_token: bad_signature"),
    "crit": (
        lambda f: f.header.update(crit=["b64"], b64=True),
        502,
        "id_token: crit names an unsupported extension",
    ),
    "b64 without crit": (lambda f: f.header.update(b64=False), 502, "id_token: missing_crit_header"),
    "a header of wrong types": (lambda f: f.header.update(kid=5), 502, "id_token: header: not the JSON it should be"),
    "a jku that is no URL": (lambda f: f.header.update(jku=5), 502, "id_token: invalid_header_value"),
    "a header that is a list": (
        lambda f: having(forge=lambda h, c: encode(b"[]") + "..x")(f),
        502,
        "id_token: header: not the JSON it should be",
    ),
    "a token that is a word": (lambda f: f.tokens.update(id_token="é"), 502, "id_token: not a token"),
    "an empty token": (lambda f: f.tokens.update(id_token=""), 502, "id_token: header: not the JSON it should be"),
    "two parts": (
        lambda f: having(forge=lambda h, c: f.sign(h, c).rpartition(".")[0])(f),
        502,
        "id_token: decode_error",
    ),
    "an encrypted token": (
        lambda f: having(forge=lambda h, c: f.sign(h, c) + ".x.y")(f),
        502,
        "id_token: decode_error",
    ),
    "a huge token": (lambda f: f.claims.update(x="x" * 200_000), 502, "id_token: exceeded_size"),
    "a signature with a letter after it": (
        lambda f: having(forge=lambda h, c: f.sign(h, c) + "=")(f),
        502,
        "id_token: bad_signature",
    ),
    # the claims
    "another iss in the token": (
        lambda f: f.claims.update(iss="https://evil.example"),
        502,
        "id_token: of another issuer",
    ),
    "iss in the token with a slash more": (
        lambda f: f.claims.update(iss=f"{f.issuer}/"),
        502,
        "id_token: of another issuer",
    ),
    "another aud": (lambda f: f.claims.update(aud="another"), 502, "id_token: for another audience"),
    "an aud that begins like ours": (
        lambda f: f.claims.update(aud=CLIENT + "0"),
        502,
        "id_token: for another audience",
    ),
    "no aud in the list": (lambda f: f.claims.update(aud=[]), 502, "id_token: for another audience"),
    "several aud without azp": (
        lambda f: f.claims.update(aud=[CLIENT, "another"]),
        502,
        "id_token: for several audiences, and no azp",
    ),
    "another azp": (lambda f: f.claims.update(azp="another"), 502, "id_token: for another azp"),
    "another azp among several aud": (
        lambda f: f.claims.update(aud=[CLIENT, "another"], azp="another"),
        502,
        "id_token: for another azp",
    ),
    "expired": (lambda f: f.claims.update(exp=NOW - 60), 502, "id_token: expired"),
    "issued in the future": (lambda f: f.claims.update(iat=NOW + 61), 502, "id_token: issued in the future"),
    "not valid yet": (lambda f: f.claims.update(nbf=NOW + 61), 502, "id_token: not valid yet"),
    "no exp": (lambda f: f.claims.update(exp=...), 502, "id_token: claims: not the JSON it should be"),
    "exp as a text": (lambda f: f.claims.update(exp="never"), 502, "id_token: claims: not the JSON it should be"),
    "exp as true": (lambda f: f.claims.update(exp=True), 502, "id_token: claims: not the JSON it should be"),
    "no iat": (lambda f: f.claims.update(iat=...), 502, "id_token: claims: not the JSON it should be"),
    "another nonce": (lambda f: f.claims.update(nonce="x"), 400, "id_token: of another nonce"),
    "no nonce": (lambda f: f.claims.update(nonce=...), 400, "id_token: of another nonce"),
    "another access token": (
        lambda f: f.claims.update(at_hash=encode(bytes(16))),
        502,
        "id_token: at_hash is of another access token",
    ),
    "an empty at_hash": (lambda f: f.claims.update(at_hash=""), 502, "id_token: at_hash is of another access token"),
    "no sub": (lambda f: f.claims.update(sub=...), 502, "id_token: claims: not the JSON it should be"),
    "an empty sub": (lambda f: f.claims.update(sub=""), 502, "id_token: of a sub that is none"),
    "a sub with a line break": (lambda f: f.claims.update(sub="a\nb"), 502, "id_token: of a sub that is none"),
    "a huge sub": (lambda f: f.claims.update(sub="a" * 256), 502, "id_token: of a sub that is none"),
    "claims that are a list": (
        lambda f: having(forge=lambda h, c: signed(h, [c], f.key))(f),
        502,
        "id_token: claims: not the JSON it should be",
    ),
    # userinfo
    "userinfo about another": (
        lambda f: (f.claims.update(email=...), f.profile.update(sub="eve")),
        502,
        "userinfo: of another sub",
    ),
    "userinfo about nobody": (
        lambda f: (f.claims.update(email=...), f.profile.update(sub=...)),
        502,
        "userinfo: not the JSON it should be",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, faulty: Faulty) -> None:
    """Each check by itself: everything else about the login is right."""
    plan, status, reason = REFUSED[case]
    plan(faulty)
    assert refusal_of(faulty) == (status, reason)


@pytest.mark.parametrize("algorithm", ["none", "HS256", "ES256K", "Ed448", "PS256", ""])
def test_only_the_one_algorithm(algorithm: str) -> None:
    """joserfc itself is told so once more, for whatever it may come to read from a header one day."""
    with pytest.raises(UnsupportedAlgorithmError):
        Registry("RS256").get_alg(algorithm)
    if algorithm not in ALGORITHMS:
        with pytest.raises(UnsupportedAlgorithmError):
            Registry(algorithm).get_alg(algorithm)


# ---- a provider that does not answer as it should -------------------------------------------------------------------


def answering(body: bytes, status: str = "200 OK", kind: str = "application/json", *headers: str) -> Act:
    async def act(peer: Peer) -> None:
        await peer.whole(body, status, kind, *headers)

    return act


async def closes(peer: Peer) -> None:
    peer.writer.close()


async def resets(peer: Peer) -> None:
    peer.reset()


async def silent(peer: Peer) -> None:
    await peer.gone()
    peer.writer.close()


async def half(peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    await peer.gone()
    peer.writer.close()


async def endless(peer: Peer) -> None:
    await peer.head(content_type="application/json")
    while True:
        await peer.chunk(b" " * 65536)


async def no_http(peer: Peer) -> None:
    await peer.send(b"SSH-2.0-OpenSSH\r\n")
    peer.writer.close()


BROKEN: dict[str, tuple[Act, str]] = {
    "closes": (closes, "RemoteProtocolError"),
    "resets": (resets, "ReadError from ConnectionResetError"),
    "is no HTTP": (no_http, "RemoteProtocolError"),
    "is silent": (silent, "no answer in time"),
    "is slow in its body": (half, "no answer in time"),
    "never ends": (endless, "over 1048576 bytes"),
    "is huge": (answering(b" " * ((1 << 20) + 1)), "over 1048576 bytes"),
    "sends HTML": (answering(b"<p>Hello", kind="text/html"), "status 200, and not plain JSON"),
    "sends a signed answer": (answering(b"e30", kind="application/jwt"), "status 200, and not plain JSON"),
    "compresses": (
        answering(gzip.compress(b"{}"), "200 OK", "application/json", "content-encoding: gzip"),
        "status 200, and not plain JSON",
    ),
    "fails": (answering(b"{}", "500 Oops"), "status 500"),
    "redirects": (answering(b"{}", "302 Found", "application/json", "location: /elsewhere"), "status 302"),
    "redirects a POST": (answering(b"{}", "307 Go", "application/json", "location: /elsewhere"), "status 307"),
    "has nothing": (answering(b"{}", "404 Not Found"), "status 404"),
    "sends no body": (answering(b""), "not the JSON it should be"),
    "sends no JSON": (answering(b"{"), "not the JSON it should be"),
    "sends a list": (answering(b"[]"), "not the JSON it should be"),
    "sends null": (answering(b"null"), "not the JSON it should be"),
    "sends JSON that is deep": (answering(b'{"sub":' + b"[" * 100_000), "not the JSON it should be"),
    "sends what is not UTF-8": (answering(b'{"sub": "\xff"}'), "not the JSON it should be"),
    "sends wrong types": (
        answering(b'{"sub": 5, "keys": 5, "issuer": 5, "id_token": 5}'),
        "not the JSON it should be",
    ),
}


def hurry(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This call's deadline is short. The others keep theirs: a busy machine may take long to answer them."""
    call = Provider.call

    async def hurried(self: Provider, now: str, *arguments: Any, **named: Any) -> tuple[int, bytes]:
        with pytest.MonkeyPatch.context() as patch:
            if now == what:
                patch.setattr(oidc, "DEADLINE", 0.2)
            return await call(self, now, *arguments, **named)

    monkeypatch.setattr(Provider, "call", hurried)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("what", PATHS)
@pytest.mark.parametrize("case", BROKEN)
def test_an_endpoint_that_breaks(
    case: str, what: str, loop: str, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to any of the calls: a 502 that says which and what, nothing left open, no redirect followed."""
    act, reason = BROKEN[case]
    faulty.loop = loop
    faulty.acts[PATHS[what]] = act
    faulty.claims["email"] = ...
    if reason == "no answer in time":
        hurry(what, monkeypatch)
    began = time.monotonic()
    status, found = refusal_of(faulty)
    assert time.monotonic() - began < PATIENCE
    assert status == 502
    assert re.fullmatch(rf"{what}: {reason}", found)
    assert "/elsewhere" not in faulty.calls


@pytest.mark.parametrize("act", [silent, half])
@pytest.mark.parametrize("what", PATHS)
def test_a_login_that_is_cancelled(what: str, act: Act, faulty: Faulty) -> None:
    """In any of its calls: the connection is closed with it."""
    faulty.acts[PATHS[what]] = act
    faulty.claims["email"] = ...

    async def run() -> None:
        transport = Transport()
        task = asyncio.create_task(attempt(provider_at(faulty, transport), faulty))
        await asyncio.to_thread(eventually, lambda: PATHS[what] in faulty.calls)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(transport)

    asyncio.run(run())


def test_a_provider_that_is_down() -> None:
    """No listener."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        faulty = Faulty(origin=f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert refusal_of(faulty) == (502, "discovery: ConnectError from ConnectionRefusedError")


@pytest.mark.parametrize("issuer", ["http://idp.example.org", "ftp://localhost", "http://127.0.0.1 ", ""])
def test_an_issuer_without_tls(issuer: str) -> None:
    """Plain http: an attacker on the network could be the provider, so it is not asked."""
    assert refusal_of(Faulty(origin=issuer)) == (502, "discovery: a URL that is not https, or not a plain one")


def test_http_only_for_a_local_issuer() -> None:
    """An issuer on https cannot send us to http, not even to our own machine."""

    async def run() -> None:
        provider = provider_at(Faulty(origin="https://idp.example.org"), Transport())
        assert provider.parse_url("https://login.example.com/x", "x").host == "login.example.com"
        for url in ("http://127.0.0.1/", "http://idp.example.org/"):
            with pytest.raises(LoginFailed):
                provider.parse_url(url, "x")

    asyncio.run(run())


# ---- what is remembered ---------------------------------------------------------------------------------------------


def test_documents_are_kept_for_an_hour(faulty: Faulty) -> None:
    """Document and keys are asked for once, and again after an hour; a provider that failed is asked the next time."""

    async def run() -> None:
        transport, clock = Transport(), Clock()
        provider = provider_at(faulty, transport, clock)
        faulty.acts[WELL_KNOWN] = closes
        with pytest.raises(LoginFailed):
            await provider.begin(os.urandom, "/", "")
        faulty.acts.clear()
        faulty.calls.clear()
        await attempt(provider, faulty)
        clock.now += 3599
        await attempt(provider, faulty)
        assert faulty.calls == [WELL_KNOWN, "/token", "/jwks", "/token"]
        clock.now += 1
        await attempt(provider, faulty)
        assert faulty.calls[4:] == [WELL_KNOWN, "/token", "/jwks"]
        await transport.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("named", [True, False], ids=["another kid", "the same kid"])
def test_new_keys(named: bool, faulty: Faulty) -> None:
    """A provider that has changed its key is believed at once; keys are asked for early once a minute at most."""

    def rotate(number: int) -> None:
        faulty.signing = key_for("RS256", number)
        public = faulty.signing.as_dict(private=False)
        faulty.published = [{**public, "kid": public["kid"] if named else "same"}]
        faulty.header["kid"] = faulty.published[0]["kid"]

    async def run() -> None:
        transport, clock = Transport(), Clock()
        provider = provider_at(faulty, transport, clock)
        rotate(0)
        await attempt(provider, faulty)
        rotate(1)
        assert (await attempt(provider, faulty))[0] == EMAIL.lower()
        assert faulty.calls.count("/jwks") == 2
        rotate(2)
        clock.now += 59
        for _ in range(3):
            with pytest.raises(LoginFailed, match=r"bad_signature|not one key"):
                await attempt(provider, faulty)
        assert faulty.calls.count("/jwks") == 2
        clock.now += 1
        assert (await attempt(provider, faulty))[0] == EMAIL.lower()
        assert faulty.calls.count("/jwks") == 3
        await transport.aclose()

    asyncio.run(run())


def test_many_tokens_of_unknown_keys(faulty: Faulty) -> None:
    """A provider that signs with what it does not publish is not asked for keys with every login."""

    async def run() -> None:
        transport = Transport()
        provider = provider_at(faulty, transport)
        faulty.header["kid"] = "unknown"
        for _ in range(5):
            with pytest.raises(LoginFailed, match="not one key"):
                await attempt(provider, faulty)
        assert faulty.calls.count("/jwks") == 2
        await transport.aclose()

    asyncio.run(run())


def test_an_answer_is_good_for_its_own_flow(faulty: Faulty) -> None:
    """The answer to one login does not finish another, and none is good for twice."""

    async def run() -> None:
        transport = Transport()
        provider = provider_at(faulty, transport)
        first_url, first = await provider.begin(os.urandom, "/", "")
        second_url, second = await provider.begin(os.urandom, "/", "")
        assert len({first.state, first.nonce, first.verifier, second.state, second.nonce, second.verifier}) == 6
        answer = faulty.authorize(first_url)
        with pytest.raises(LoginFailed, match="of another state"):
            await provider.finish(answer, second)
        assert "/token" not in faulty.calls, "the code was not even tried"
        assert await provider.finish(answer, first) == EMAIL.lower()
        with pytest.raises(LoginFailed, match="invalid_grant"):
            await provider.finish(answer, first)
        faulty.spent = False
        stolen = faulty.authorize(second_url).replace(second.state.encode(), first.state.encode())
        with pytest.raises(LoginFailed, match="invalid_grant"):  # PKCE: the code is of the second flow
            await provider.finish(stolen, first)
        await transport.aclose()

    asyncio.run(run())


# ---- allowed users --------------------------------------------------------------------------------------------------

LISTS = {"allowed_emails": ("bob@example.com",), "allowed_domains": ("example.org",)}
NOT_LISTED = (403, "the e-mail address is on no list")
NOT_VERIFIED = (403, "no e-mail address that is verified")

ADMISSION: dict[str, tuple[dict[str, Any], dict[str, Any], object]] = {
    "a domain on the list": ({}, LISTS, "ada@example.org"),
    "an address on the list": ({"email": "Bob@Example.COM"}, LISTS, "bob@example.com"),
    "an address, and no domains": (
        {"email": "bob@example.com"},
        {"allowed_emails": LISTS["allowed_emails"]},
        "bob@example.com",
    ),
    "an address on no list": ({"email": "eve@example.com"}, LISTS, NOT_LISTED),
    "a domain, and only addresses": ({}, {"allowed_emails": LISTS["allowed_emails"]}, NOT_LISTED),
    "a subdomain": ({"email": "eve@sub.example.org"}, LISTS, NOT_LISTED),
    "a domain that ends alike": ({"email": "eve@evilexample.org"}, LISTS, NOT_LISTED),
    "a domain that begins alike": ({"email": "eve@example.org.evil"}, LISTS, NOT_LISTED),
    "a dot more": ({"email": "eve@example.org."}, LISTS, NOT_LISTED),
    "two @": ({"email": "user@evil.com@example.org"}, LISTS, NOT_VERIFIED),
    "two @, the other way": ({"email": "user@example.org@evil.com"}, LISTS, NOT_VERIFIED),
    "quoted": ({"email": '"eve@evil.com"@example.org'}, LISTS, NOT_VERIFIED),
    "no local part": ({"email": "@example.org"}, LISTS, NOT_VERIFIED),
    "only a domain": ({"email": "example.org"}, LISTS, NOT_VERIFIED),
    "a space": ({"email": "eve@evil.com @example.org"}, LISTS, NOT_VERIFIED),
    "a line break": ({"email": "eve@example.org\n"}, LISTS, NOT_VERIFIED),
    "a NUL": ({"email": "eve@evil.com\0@example.org"}, LISTS, NOT_VERIFIED),
    "a letter that is ASCII in lower case": (
        {"email": "bob@examp\u212ae.org"},
        {"allowed_domains": ("exampke.org",)},
        NOT_VERIFIED,
    ),
    "a letter that looks like another": ({"email": "bob@ex\u0430mple.org"}, LISTS, NOT_VERIFIED),
    "a huge address": ({"email": "a" * 243 + "@example.org"}, LISTS, NOT_VERIFIED),
    "the longest address": ({"email": "a" * 242 + "@example.org"}, LISTS, "a" * 242 + "@example.org"),
    "not verified": ({"email_verified": False}, LISTS, NOT_VERIFIED),
    "verified as a text": ({"email_verified": "true"}, LISTS, NOT_VERIFIED),
    "verified as a number": ({"email_verified": 1}, LISTS, NOT_VERIFIED),
    "verified as a list": ({"email_verified": [True]}, LISTS, NOT_VERIFIED),
    "everybody": ({}, {}, "ada@example.org"),
    "everybody, not verified": ({"email_verified": False}, {}, "ada"),
    "everybody, verified as a text": ({"email_verified": "true"}, {}, "ada"),
    "everybody, an address of no good shape": ({"email": "a@b@c"}, {}, "ada"),
    "an empty address": ({"email": ""}, LISTS, NOT_VERIFIED),
}


@pytest.mark.parametrize("source", ["id_token", "userinfo"])
@pytest.mark.parametrize("case", ADMISSION)
def test_who_is_let_in(case: str, source: str, faulty: Faulty) -> None:
    """By an address that the provider has verified, to the letter but for its case; wherever it says so."""
    said, configured, expected = ADMISSION[case]
    if source == "userinfo":
        faulty.claims |= {"email": ..., "email_verified": ...}
        faulty.profile = said
    else:
        faulty.claims |= said
    found: object = login(faulty, **configured) if isinstance(expected, str) else refusal_of(faulty, **configured)
    assert found == expected
    assert ("/userinfo" in faulty.calls) == (source == "userinfo")


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any], bool, object]] = {
    "nobody wants it": ({"email": ...}, {"scopes": ("openid",)}, False, "ada"),
    "the scope wants it": ({"email": ...}, {"scopes": ("email",)}, True, "ada@example.org"),
    "a list wants it": ({"email": ...}, {"scopes": (), **LISTS}, True, "ada@example.org"),
    "is it verified?": ({"email_verified": ...}, LISTS, True, "ada@example.org"),
    "null is no answer": ({"email": None}, LISTS, True, "ada@example.org"),
    "there is one already": ({}, LISTS, False, "ada@example.org"),
    "a no is an answer": ({"email_verified": False}, LISTS, False, NOT_VERIFIED),
}


@pytest.mark.parametrize("case", ASKED)
def test_when_userinfo_is_asked(case: str, faulty: Faulty) -> None:
    """Only for an e-mail address that is required and missing in the id_token."""
    claims, configured, asked, expected = ASKED[case]
    faulty.claims |= claims
    found: object = login(faulty, **configured) if isinstance(expected, str) else refusal_of(faulty, **configured)
    assert found == expected
    assert ("/userinfo" in faulty.calls) == asked


def test_no_userinfo(faulty: Faulty) -> None:
    """A provider without one has said all it knows."""
    faulty.metadata["userinfo_endpoint"] = ...
    faulty.claims["email"] = ...
    assert login(faulty) == "ada"
    assert refusal_of(faulty, **LISTS) == NOT_VERIFIED


@given(st.text())
def test_an_address_is_ascii_or_none(email: str) -> None:
    """Nothing becomes an address in lower case that it was not before."""
    found = Profile("ada", email, email_verified=True).verified_email
    assert found is None or (email.isascii() and found == email.lower() and found.count("@") == 1)


# ---- logging out ----------------------------------------------------------------------------------------------------


def test_where_to_log_out(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider's own logout, which brings the browser back; None where there is none, or no answer."""

    async def ask(**metadata: Any) -> str | None:
        transport = Transport()
        faulty.metadata = metadata
        url = await provider_at(faulty, transport).logout_url("https://chat.example.org/")
        await transport.aclose()
        return url

    url = asyncio.run(ask())
    assert url is not None
    assert url.startswith(f"{faulty.origin}/end?")
    assert dict(parse_qsl(urlsplit(url).query)) == {
        "client_id": CLIENT,
        "post_logout_redirect_uri": "https://chat.example.org/",
    }
    assert asyncio.run(ask(end_session_endpoint=...)) is None
    faulty.acts[WELL_KNOWN] = closes
    assert asyncio.run(ask()) is None
    monkeypatch.setattr(oidc, "LOGOUT_DEADLINE", 0.1)
    faulty.acts[WELL_KNOWN] = silent
    began = time.monotonic()
    assert asyncio.run(ask()) is None
    assert time.monotonic() - began < PATIENCE


# ---- the state cookie -----------------------------------------------------------------------------------------------

FLOW = Flow("state", "nonce", "verifier", "/?a=1#b", "id", NOW)
FIELDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
A_FLOW = st.builds(Flow, FIELDS, FIELDS, FIELDS, FIELDS, FIELDS, st.integers(0, 1 << 40))


@given(A_FLOW)
def test_what_was_sealed_opens(flow: Flow) -> None:
    """Under the same key, whatever stands in it; and it is a cookie's value (RFC 6265 section 4.1.1)."""
    sealed = FlowCookies(["a" * 32]).seal(flow)
    assert re.fullmatch(r"[\w\-=]+\.[\w\-]{43}", sealed, re.ASCII)  # 43: SHA-256
    assert FlowCookies(["a" * 32]).open(sealed.encode(), flow.began) == flow


def test_the_largest_cookie_opens() -> None:
    """The longest path that own_path lets through, with ids as long as ours."""
    path = "/" + "a" * (LONGEST_PATH - 1)
    assert safe_redirect_path(path) == path
    flow = Flow("s" * 43, "n" * 43, "v" * 43, path, "r" * 22, NOW)
    sealed = FlowCookies(["a" * 32]).seal(flow)
    assert len(sealed) < 1200
    assert FlowCookies(["a" * 32]).open(sealed.encode(), NOW) == flow


@given(st.binary() | A_FLOW.map(lambda flow: FlowCookies(["b"]).seal(flow).encode()), st.floats(0, 1e12))
@example(b"", 0.0)
@example(b".", 0.0)
@example(b"\xff.\xff", 0.0)
def test_any_other_value_is_none(value: bytes, now: float) -> None:
    """Never an exception."""
    assert FlowCookies(["a"]).open(value, now) is None


@given(st.data())
def test_one_character_changed(data: st.DataObject) -> None:
    """A cookie is ours to the last bit: base64 has several spellings of one value, and a cookie has one."""
    sealed = FlowCookies(["a"]).seal(FLOW).encode()
    place = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != sealed[place]))
    assert FlowCookies(["a"]).open(sealed[:place] + bytes([other]) + sealed[place + 1 :], NOW) is None


def test_another_spelling_of_the_signature() -> None:
    """The last character has bits to spare, and padding may follow: such copies are refused."""
    sealed = FlowCookies(["a"]).seal(FLOW).encode()
    others = [sealed[:-1] + bytes([byte]) for byte in range(256) if byte != sealed[-1]]
    assert not [value for value in [*others, sealed + b"=", b"." + sealed] if FlowCookies(["a"]).open(value, NOW)]


def test_keys_of_the_cookie() -> None:
    """The newest signs, all verify, another does not."""
    sealed = FlowCookies(["new", "old"]).seal(FLOW)
    assert sealed == FlowCookies(["new"]).seal(FLOW)
    assert FlowCookies(["newer", "new"]).open(sealed.encode(), NOW) == FLOW
    assert FlowCookies(["old"]).open(sealed.encode(), NOW) is None


@pytest.mark.parametrize(("after", "opens"), [(0, True), (599, True), (600, False), (-599, True), (-600, False)])
def test_the_cookie_expires(after: int, opens: bool) -> None:
    """After ten minutes; and a clock that has gone back does not make it last."""
    sealed = FlowCookies(["a"]).seal(FLOW).encode()
    assert (FlowCookies(["a"]).open(sealed, NOW + after) is not None) == opens


@pytest.mark.parametrize("payload", [b"", b"!", b"e30=", b"W10=", b"bnVsbA==", base64.urlsafe_b64encode(b"[" * 1000)])
def test_a_cookie_of_another_version(payload: bytes) -> None:
    """Signed by us, but nothing that this version reads."""
    signed_by_us = Signer("a", SALT, ".", "hmac", hashlib.sha256).sign(payload)
    assert FlowCookies(["a"]).open(signed_by_us, NOW) is None


def test_a_cookie_that_is_too_long() -> None:
    """Not even a good signature is looked at."""
    sealed = FlowCookies(["a"]).seal(Flow("x" * 2000, "", "", "", "", NOW)).encode()
    assert FlowCookies(["a"]).open(sealed, NOW) is None


def test_a_session_cookie_is_none() -> None:
    """The same keys sign sessions, under another salt."""
    payload = FlowCookies(["a"]).seal(FLOW).rpartition(".")[0]
    other = Signer("a", b"chat-proxy.session", ".", "hmac", hashlib.sha256).sign(payload)
    assert FlowCookies(["a"]).open(other, NOW) is None


# ---- where it goes afterwards ---------------------------------------------------------------------------------------

OURS = [
    "/",
    "/?x=1",
    "/?x=y&z=%20%2F//",
    "/#a/b?c",
    "/x",
    "/x/",
    "/a.b/..c/c..",
    "/x?next=//y#/z",
    "/%E1%88%B0",
    "/a:b@c",
]
ATTACKS = [
    *("", "x", "?x", "#x", "//", "//evil.example", "///evil.example", "/\\evil.example", "\\/evil.example", "\\\\evil"),
    *("https://evil.example", "https:evil.example", "javascript:alert(1)", "data:text/html,x", "//evil.example/%2f.."),
    *("/\t/evil.example", "/\n/evil.example", "\t//evil.example", " //evil.example", "/x\r\nset-cookie: a=b", "/\0"),
    *("/%2f/evil.example", "/%2Fevil.example", "/%5cevil.example", "/%5C/evil", "/%09/evil", "/%0d%0ax:y", "/%00"),
    *("/.", "/..", "/./", "/../", "/.//evil.example", "/..//evil.example", "/%2e%2e//evil.example", "/%2e", "/a/../b"),
    *("/a//evil.example", "/a/.", "/a/..#x", "/a/..?x", "/%252fevil.example", "/%2", "/%", "/%zz", "/x?%0a", "/x#%7f"),
    *("/é", "/\u2028", "/\uff0f/evil.example", "/\u3002", "//\u0435vil", "/x y", '/"', "/<script>", "/x\u00a0", "/[x]"),
    *("/" + "a" * 512, "/?" + "%20" * 200, "@evil.example", ":80/x", "/x?a\\b", "/x#a\\b"),
]


def resolved(written: str, base: str = "https://chat.example.org") -> str:
    """Where a browser goes: the URL Standard's parser, as far as it takes to tell what stays at `base`."""
    written = written.strip("".join(map(chr, range(33)))).translate(dict.fromkeys(map(ord, "\t\n\r")))
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*:", written):
        return "elsewhere"
    head, mark, rest = re.split(r"([?#])", written, maxsplit=1) if re.search(r"[?#]", written) else (written, "", "")
    head = head.replace("\\", "/")
    if head.startswith("//"):
        return "elsewhere"
    segments: list[str] = []
    parts = head.split("/")[1:]
    for part, after in pairwise([*parts, None]):
        dots = re.sub("%2e", ".", part or "", flags=re.IGNORECASE)
        if dots == "..":
            segments = segments[:-1]
        elif dots != ".":
            segments.append(part or "")
        if dots in (".", "..") and after is None:
            segments.append("")
    return f"{base}/{'/'.join(segments)}{mark}{rest}"


@pytest.mark.parametrize("written", OURS)
def test_our_own_paths(written: str) -> None:
    """Stay as they are."""
    assert safe_redirect_path(written) == written
    assert resolved(written) == f"https://chat.example.org{written}"


@pytest.mark.parametrize("written", ATTACKS, ids=ascii)
def test_no_way_out(written: str) -> None:
    """Whatever may lead elsewhere, or mean another path to another reader, is the root."""
    assert safe_redirect_path(written) == "/"


REFERENCES = st.text(st.sampled_from("/\\.%25fFcC09dD:@?#&=\t\n\r \0éa[]"), max_size=30)


@given(st.text() | REFERENCES | REFERENCES.map("/".__add__))
@example("/x?%25")
def test_any_path_is_ours(written: str) -> None:
    """As a browser resolves it, with not a letter changed; and a second time changes nothing."""
    path = safe_redirect_path(written)
    assert path in (written, "/")
    assert resolved(path) == f"https://chat.example.org{path}"
    assert re.fullmatch(r"/[!-~]*", path)
    assert "//" not in re.split(r"[?#]", path)[0]
    assert safe_redirect_path(path) == path


@pytest.mark.node
def test_the_url_standard_agrees() -> None:
    """node's URL, which is the standard's, takes every path of ours for what `resolved` does; attacks are real."""
    program = """
        const base = "https://chat.example.org/api/session/callback";
        const resolve = (path) => { try { return new URL(path, base).href } catch { return null } };
        console.log(JSON.stringify(JSON.parse(process.argv[1]).map(resolve)));
    """
    sent = json.dumps([*OURS, *ATTACKS])
    process = subprocess.run(["node", "-e", program, sent], capture_output=True, check=True, text=True, timeout=60)
    found = json.loads(process.stdout)
    assert found[: len(OURS)] == [resolved(path) for path in OURS]
    away = {
        path for path, url in zip(ATTACKS, found[len(OURS) :], strict=True) if url and "://chat.example.org/" not in url
    }
    assert {"//evil.example", "/\\evil.example", "/\t/evil.example", " //evil.example"} <= away


# ---- a provider that others wrote -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secret() -> str:
    return "s%c:+&=" + secrets.token_urlsafe(24)


@pytest.fixture(scope="module")
def issuer(secret: str) -> Iterator[str]:
    with start(CLIENT, secret, CALLBACK, post_logout_redirect_uris=["https://chat.example.org/"]) as issuer:
        yield issuer


REAL: dict[str, tuple[str, dict[str, Any], object]] = {
    "an address": ("Ada", {}, "ada@example.org"),
    "an address of their own": ("Bob@Example.com", LISTS, "bob@example.com"),
    "a domain": ("ada", LISTS, "ada@example.org"),
    "no scope for it": ("Ada", {"scopes": ()}, "Ada"),
    "not verified": ("unverified-eve", LISTS, NOT_VERIFIED),
    "not verified, everybody": ("unverified-eve", {}, "unverified-eve"),
    "on no list": ("eve@sub.example.org", LISTS, NOT_LISTED),
}


@pytest.mark.node
@pytest.mark.parametrize("case", REAL)
def test_a_real_provider(case: str, issuer: str, secret: str) -> None:
    """Through its forms to the subject; its answer is valid once, and for no other client."""
    name, configured, expected = REAL[case]

    async def run() -> None:
        transport = Transport()
        settings = Oidc(**{"issuer": issuer, "client_id": CLIENT, "client_secret": Secret(secret), **configured})
        provider = Provider(settings, transport, redirect_uri=CALLBACK, wall=time.time)
        url, flow = await provider.begin(os.urandom, "/", "")
        callback = await asyncio.to_thread(log_in, url, CALLBACK, name)
        _, other = await provider.begin(os.urandom, "/", "")
        with pytest.raises(LoginFailed, match="of another state"):
            await provider.finish(callback.query, other)
        if isinstance(expected, str):
            assert await provider.finish(callback.query, flow) == expected
        else:
            with pytest.raises(LoginFailed) as caught:
                await provider.finish(callback.query, flow)
            assert (caught.value.status, caught.value.reason) == expected
        with pytest.raises(LoginFailed, match="token: the provider reports invalid_grant"):
            await provider.finish(callback.query, flow)
        logout = await provider.logout_url("https://chat.example.org/")
        assert logout is not None
        assert logout.startswith(f"{issuer}/session/end?client_id=")
        await transport.aclose()

    asyncio.run(run())


@pytest.mark.node
def test_a_real_provider_and_a_wrong_secret(issuer: str) -> None:
    """The provider does not know us: its fault, or the operator's, and not the browser's."""

    async def run() -> None:
        transport = Transport()
        settings = Oidc(issuer=issuer, client_id=CLIENT, client_secret=Secret("wrong"))
        provider = Provider(settings, transport, redirect_uri=CALLBACK, wall=time.time)
        url, flow = await provider.begin(os.urandom, "/", "")
        callback = await asyncio.to_thread(log_in, url, CALLBACK, "ada")
        with pytest.raises(LoginFailed, match="token: the provider reports invalid_client") as caught:
            await provider.finish(callback.query, flow)
        assert caught.value.status == 502
        await transport.aclose()

    asyncio.run(run())


def test_the_lock_records_no_address() -> None:
    """tests/oidc/package-lock.json says what each package must be (a version and a digest), not where it was found."""
    lock = json.loads(LOCK.read_text())
    packages = {name: found for name, found in lock["packages"].items() if name}
    assert packages["node_modules/oidc-provider"]["version"] == lock["packages"][""]["dependencies"]["oidc-provider"]
    assert all(found["integrity"].startswith("sha512-") for found in packages.values())
    assert "resolved" not in str(lock)
    assert "://" not in str(lock)


@pytest.mark.parametrize(("sub", "name"), [("ada", "ada"), ("248289761001", "248289761001"), ("a@b.c", "sub:a@b.c")])
def test_a_sub_does_not_read_like_an_address(sub: str, name: str) -> None:
    """At some providers users choose theirs; it must not be another user's verified e-mail address."""
    assert name_of(sub) == name
