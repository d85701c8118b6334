"""OpenID Connect: the authorization code flow with PKCE, against one provider.

    Provider.begin     sends the browser away, with a state, a nonce and a challenge
    Provider.finish    redeems the code, verifies the id_token, and returns the user
    flow.py            what the browser holds in between, and where it goes afterwards
    id_token.py        what makes an id_token true

Rules:
1. OpenID Connect Core 1.0 and Discovery 1.0, RFC 6749, RFC 7636 (PKCE) and RFC 9207 (`iss`), as RFC 9700 wants them.
2. The state ties the answer to the browser, the nonce the token to the flow, the verifier the code to us, and the
   signature the token to the provider; none of them stands in for another.
3. Whatever fails is a LoginFailed. Its reason is for the log, and nothing that was received stands in it, except an
   error code of harmless shape.
4. The transport is called directly: no redirects, no cookies, no proxies. Each call has a deadline and a bounded body.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import cast
from urllib.parse import parse_qsl, quote_plus, urlencode

import httpx
import msgspec

from proxy import settings
from proxy.accounts.login import LoginFailed
from proxy.accounts.login.flow import Flow, encode, is_same, safe_redirect_path
from proxy.accounts.login.id_token import (
    Claims,
    Header,
    Jwk,
    Profile,
    check_binding,
    check_claims,
    header_of,
    read,
    shown,
    verified,
)
from proxy.settings import is_loopback

RANDOM_BYTES = 32  # RFC 7636 section 4.1 recommends it for the verifier
MOST_PARAMETERS = 20  # in the provider's redirect; it has four or five
LONGEST_CODE = 4096  # characters; providers that keep no state send up to 2000
LONGEST_ANSWER = 1 << 20  # bytes; documents, key sets and tokens have 1 to 50 KB
DEADLINE = 10.0  # seconds for each call of the provider: the user sees a blank page meanwhile
LOGOUT_DEADLINE = 2.0  # seconds, when the document is not at hand: a logout is not held up
KEPT_SECONDS = 3600.0  # for the document and the keys: one that is taken back is dead within the hour
REFETCH_SECONDS = 60.0  # between two times that the keys are asked for early

URL = re.compile(r"https?://[!#-;=?-Z_a-z~\[\]]+")  # no space, quote, bracket or backslash to be read in two ways
ACCESS_TOKEN = re.compile(r"[!-~]+")
JSON = frozenset({"application/json", "application/jwk-set+json"})


class Metadata(msgspec.Struct):
    """The discovery document, as far as we need it."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    id_token_signing_alg_values_supported: list[str]
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)
    userinfo_endpoint: str | None = None
    end_session_endpoint: str | None = None
    authorization_response_iss_parameter_supported: bool = False

    @property
    def urls(self) -> list[str]:
        needed = [self.authorization_endpoint, self.token_endpoint, self.jwks_uri]
        return needed + [url for url in (self.userinfo_endpoint, self.end_session_endpoint) if url is not None]


class Jwks(msgspec.Struct):
    keys: list[Jwk]


class Tokens(msgspec.Struct):
    id_token: str
    access_token: str
    token_type: str


class TokenError(msgspec.Struct):
    error: str


class Provider:
    """One provider, as configured. `wall` gives Unix seconds, `clock` monotonic ones.

    `redirect_uri` is what is registered there, to the letter. The client's secret is read again from its file, if it
    has one, with each login.
    """

    def __init__(
        self,
        configured: settings.Oidc,
        transport: httpx.AsyncBaseTransport,
        *,
        redirect_uri: str,
        wall: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert configured.client_secret is not None
        self.configured = configured
        self.secret = configured.client_secret
        self.scopes = dict.fromkeys(("openid", *configured.scopes))
        self.is_selective = bool(configured.allowed_emails or configured.allowed_domains)
        self.transport = transport
        self.redirect_uri = redirect_uri
        self.wall = wall
        self.clock = clock
        self._metadata: tuple[float, Metadata] | None = None  # both with the moment up to which they are good
        self._keys: tuple[float, list[Jwk]] | None = None
        self._refetch_from = clock()

    # ---- the flow ---------------------------------------------------------------------------------------------------

    async def begin(self, randomness: Callable[[int], bytes], next_: str, replaced: str) -> tuple[str, Flow]:
        """Begins a login: the provider's address for the browser, and the flow for its cookie. Raises LoginFailed."""
        metadata = await self.metadata()
        state, nonce, verifier = [encode(randomness(RANDOM_BYTES)) for _ in range(3)]
        asked = {
            "response_type": "code",
            "client_id": self.configured.client_id,
            "redirect_uri": self.redirect_uri,
            "scope": " ".join(self.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": encode(hashlib.sha256(verifier.encode()).digest()),
            "code_challenge_method": "S256",
        }
        flow = Flow(state, nonce, verifier, safe_redirect_path(next_), replaced, int(self.wall()))
        return with_query(metadata.authorization_endpoint, asked), flow

    async def finish(self, query: bytes, flow: Flow) -> str:
        """The user: the verified e-mail address in lower case, else the provider's `sub`. Raises LoginFailed.

        `query` is the callback's, as it came.
        """
        answer = parameters(query)
        if not is_same(answer.get("state", ""), flow.state):
            raise LoginFailed(400, "callback: of another state")
        metadata = await self.metadata()
        tokens = await self.redeem(self.code_of(answer, metadata), flow.verifier, metadata)
        header = header_of(tokens.id_token, metadata.id_token_signing_alg_values_supported)
        claims = await self.claims_of(tokens.id_token, header, metadata)
        check_claims(claims, self.configured.client_id, self.configured.issuer, self.wall())
        check_binding(claims, header, flow.nonce, tokens.access_token)
        return self.admitted(await self.profile(claims, tokens, metadata))

    async def logout_url(self, to: str) -> str | None:
        """The address where the browser may also end its session with the provider; None without one.

        None also while the provider does not answer: logging out here does not depend on it.
        """
        try:
            async with asyncio.timeout(LOGOUT_DEADLINE):
                endpoint = (await self.metadata()).end_session_endpoint
        except (LoginFailed, TimeoutError):
            return None
        asked = {"client_id": self.configured.client_id, "post_logout_redirect_uri": to}
        return with_query(endpoint, asked) if endpoint else None

    # ---- its steps --------------------------------------------------------------------------------------------------

    def code_of(self, answer: dict[str, str], metadata: Metadata) -> str:
        """The code in an answer of the right state. The issuer comes first: even an error may be another's."""
        promised = metadata.authorization_response_iss_parameter_supported
        if answer.get("iss", "" if promised else self.configured.issuer) != self.configured.issuer:
            raise LoginFailed(400, "callback: iss is missing" if "iss" not in answer else "callback: of another iss")
        if "error" in answer:
            raise LoginFailed(400, f"callback: the provider reports {shown(answer['error'])}")
        if not 0 < len(answer.get("code", "")) <= LONGEST_CODE:
            raise LoginFailed(400, "callback: no code, or too long a one")
        return answer["code"]

    async def redeem(self, code: str, verifier: str, metadata: Metadata) -> Tokens:
        """The tokens for a code, which is good for once (RFC 6749 section 4.1.3)."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self.redirect_uri,
            "code_verifier": verifier,
        }
        client_id, secret, headers = self.configured.client_id, self.secret.again().value, {}
        if "client_secret_basic" in metadata.token_endpoint_auth_methods_supported:
            pair = f"{quote_plus(client_id)}:{quote_plus(secret)}"  # form-encoded before (RFC 6749 section 2.3.1)
            headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif "client_secret_post" in metadata.token_endpoint_auth_methods_supported:
            form |= {"client_id": client_id, "client_secret": secret}
        else:
            raise LoginFailed(502, "discovery: no supported way to authenticate")
        status, body = await self.call("token", metadata.token_endpoint, headers, form, statuses=(200, 400, 401))
        if status != 200:
            error = read(body, TokenError, "token: error").error
            raise LoginFailed(400 if error == "invalid_grant" else 502, f"token: the provider reports {shown(error)}")
        tokens = read(body, Tokens, "token")
        if tokens.token_type.lower() != "bearer" or not ACCESS_TOKEN.fullmatch(tokens.access_token):
            raise LoginFailed(502, "token: not a bearer token")
        return tokens

    async def claims_of(self, token: str, header: Header, metadata: Metadata) -> Claims:
        """The claims of a token that the provider has signed; it may have changed its keys since we asked."""
        try:
            return verified(token, header, await self.keys(metadata))
        except LoginFailed:
            if self.clock() < self._refetch_from:
                raise
        self._refetch_from = self.clock() + REFETCH_SECONDS
        self._keys = None
        return verified(token, header, await self.keys(metadata))

    async def profile(self, claims: Claims, tokens: Tokens, metadata: Metadata) -> Profile:
        """The claims, or those of userinfo when an e-mail address is required and missing."""
        is_wanted = self.is_selective or "email" in self.scopes
        is_open = claims.email is None or claims.email_verified is None
        if not is_wanted or not is_open or metadata.userinfo_endpoint is None:
            return claims
        headers = {"authorization": f"Bearer {tokens.access_token}"}
        _, body = await self.call("userinfo", metadata.userinfo_endpoint, headers)
        profile = read(body, Profile, "userinfo")
        if profile.sub != claims.sub:  # OpenID Connect Core section 5.3.2: it may be about another user
            raise LoginFailed(502, "userinfo: of another sub")
        return profile

    def admitted(self, profile: Profile) -> str:
        """The subject, if one of the lists contains it; without lists every user is accepted."""
        email = profile.verified_email
        if not self.is_selective:
            return email or name_of(profile.sub)
        if email is None:
            raise LoginFailed(403, "no e-mail address that is verified")
        domain = email.rpartition("@")[2]
        if email not in self.configured.allowed_emails and domain not in self.configured.allowed_domains:
            raise LoginFailed(403, "the e-mail address is on no list")
        return email

    # ---- what the provider publishes --------------------------------------------------------------------------------

    async def metadata(self) -> Metadata:
        """The discovery document, its issuer and URLs checked. Raises LoginFailed."""
        if self._metadata is not None and self.clock() < self._metadata[0]:
            return self._metadata[1]
        issuer = self.configured.issuer
        _, body = await self.call("discovery", f"{issuer.removesuffix('/')}/.well-known/openid-configuration")
        headers = read(body, Metadata, "discovery")
        if headers.issuer != issuer:  # OpenID Connect Discovery section 4.3
            raise LoginFailed(502, "discovery: of another issuer")
        for url in headers.urls:
            self.parse_url(url, "discovery")
        self._metadata = (self.clock() + KEPT_SECONDS, headers)
        return headers

    async def keys(self, metadata: Metadata) -> list[Jwk]:
        if self._keys is not None and self.clock() < self._keys[0]:
            return self._keys[1]
        _, body = await self.call("keys", metadata.jwks_uri)
        headers = read(body, Jwks, "keys").keys
        self._keys = (self.clock() + KEPT_SECONDS, headers)
        return headers

    # ---- HTTP -------------------------------------------------------------------------------------------------------

    def parse_url(self, written: str, what: str) -> httpx.URL:
        """Raises LoginFailed unless it is https. Plain http is for an issuer on our own machine, and stays on it."""
        try:
            url = httpx.URL(written if URL.fullmatch(written) else "")
        except httpx.InvalidURL:
            url = httpx.URL("")
        is_local = self.configured.issuer.startswith("http:") and is_loopback(url.host)
        is_plain = url.host and not url.userinfo and "#" not in written and (url.port or 0) < 1 << 16
        if not is_plain or not (url.scheme == "https" or is_local):
            raise LoginFailed(502, f"{what}: a URL that is not https, or not a plain one")
        return url

    async def call(
        self,
        what: str,
        url: str,
        headers: dict[str, str] | None = None,
        form: dict[str, str] | None = None,
        *,
        statuses: tuple[int, ...] = (200,),
    ) -> tuple[int, bytes]:
        """A GET, or the POST of a form: the status, and a body whose content type is JSON. Raises LoginFailed."""
        built = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "chat-proxy"}
        method = "POST" if form else "GET"
        request = httpx.Request(method, self.parse_url(url, what), headers=built | (headers or {}), data=form)
        try:
            async with asyncio.timeout(DEADLINE):
                response = await self.transport.handle_async_request(request)
                try:
                    return response.status_code, await json_of(response, what, statuses)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise LoginFailed(502, f"{what}: no answer in time") from None
        except httpx.TransportError as error:
            kinds = [type(one).__name__ for one in (error, error.__cause__) if one is not None]
            raise LoginFailed(502, f"{what}: {' from '.join(kinds)}") from None


def name_of(sub: str) -> str:
    """A `sub` as a subject: where users choose theirs, it must not read like another's e-mail address."""
    return f"sub:{sub}" if "@" in sub else sub


async def json_of(response: httpx.Response, what: str, statuses: tuple[int, ...]) -> bytes:
    """The body, when status and headers are right. Raises LoginFailed."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if response.status_code not in statuses:
        raise LoginFailed(502, f"{what}: status {response.status_code}")
    if kind not in JSON or coding != "identity":
        raise LoginFailed(502, f"{what}: status {response.status_code}, and not plain JSON")
    body = bytearray()
    async for part in cast(AsyncIterator[bytes], response.stream):
        body += part
        if len(body) > LONGEST_ANSWER:
            raise LoginFailed(502, f"{what}: over {LONGEST_ANSWER} bytes")
    return bytes(body)


def parameters(query: bytes) -> dict[str, str]:
    """Those of the provider's redirect, each of which may be there once (RFC 6749 section 3.1). Raises LoginFailed."""
    written = query.decode("latin-1")
    try:
        pairs = parse_qsl(written, keep_blank_values=True, errors="strict", max_num_fields=MOST_PARAMETERS)
    except ValueError:
        raise LoginFailed(400, "callback: a query that cannot be read") from None
    headers = dict(pairs)
    if len(headers) != len(pairs):
        raise LoginFailed(400, "callback: a parameter that comes twice")
    return headers


def with_query(url: str, values: dict[str, str]) -> str:
    """The URL with more in its query; what it has there already stays (RFC 6749 section 3.1)."""
    return f"{url}{'&' if '?' in url else '?'}{urlencode(values)}"
