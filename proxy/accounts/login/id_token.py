"""The id_token: its signature, its audience and its claims. Pure.

Rules:
1. OpenID Connect Core 1.0 section 3.1.3.7, RFC 7515 (signatures), RFC 7517 (keys), RFC 8725 (what goes wrong).
2. A signature is asymmetric, of an algorithm that the provider announces, by a key whose kind fits it. What the token
   itself asks for only chooses among those.
3. joserfc is spoken to here and nowhere else. It gets the public parts of one key, and one algorithm.
4. What fails is a LoginFailed, and nothing of a token stands in its reason.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any, TypeVar

import msgspec
from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwk import JWKRegistry

from proxy.accounts.login import LoginFailed
from proxy.accounts.login.flow import encode, is_same

LEEWAY = 60.0  # seconds by which the provider's clock may differ from ours
LONGEST_EMAIL = 254  # characters (RFC 5321 section 4.5.3.1)
LONGEST_HEADER = 16384  # characters; joserfc allows 512, and some providers put a certificate chain there
WEAKEST_RSA = 2048  # bits (RFC 7518 section 3.3)

HASHES = {"256": hashlib.sha256, "384": hashlib.sha384, "512": hashlib.sha512}
ED25519 = ("OKP", "Ed25519")
ALGORITHMS = {  # with the key type and the curve that each needs
    **{f"{family}{bits}": ("RSA", "") for family in ("RS", "PS") for bits in HASHES},
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ED25519,
    "Ed25519": ED25519,
}
HARMLESS = re.compile(r"[a-z_]{1,40}")  # of an error code: random values have digits, or are longer
SUBJECT = re.compile(r"[ -~]{1,255}")  # OpenID Connect Core section 2
EMAIL = re.compile(r"[!-?A-~]+@[!-?A-~]+")  # ASCII only: in lower case, some other letters turn into ASCII ones

T = TypeVar("T")


class Header(msgspec.Struct):
    """Of a signature. `crit` names extensions that a reader must support (RFC 7515 section 4.1.11)."""

    alg: str
    kid: str | None = None
    crit: object = None


class Jwk(msgspec.Struct, omit_defaults=True):
    """A public key. Private parts and certificates are not even read."""

    kty: str
    kid: str | None = None
    use: str | None = None
    alg: str | None = None
    key_ops: list[str] | None = None
    crv: str = ""
    n: str = ""
    e: str = ""
    x: str = ""
    y: str = ""

    def fits(self, header: Header) -> bool:
        return (
            (self.kty, self.crv) == ALGORITHMS[header.alg]
            and header.kid in (None, self.kid)
            and self.use in (None, "sig")
            and self.alg in (None, header.alg)
            and (self.key_ops is None or "verify" in self.key_ops)
        )

    @property
    def is_weak(self) -> bool:
        return self.kty == "RSA" and len(self.n.lstrip("A")) * 6 < WEAKEST_RSA  # a character is 6 bits, an A is zeros


class Profile(msgspec.Struct):
    """A user's identity. `email_verified` may have any type: only `true` counts."""

    sub: str
    email: str | None = None
    email_verified: object = None

    @property
    def verified_email(self) -> str | None:
        """The address in lower case, when the provider has checked it."""
        email = self.email or ""
        plain = len(email) <= LONGEST_EMAIL and EMAIL.fullmatch(email)
        return email.lower() if plain and self.email_verified is True else None


class Claims(Profile, kw_only=True):
    iss: str
    aud: str | list[str]
    exp: float
    iat: float
    nbf: float = 0
    nonce: str = ""
    azp: str | None = None
    at_hash: str | None = None


def read(data: bytes, kind: type[T], what: str) -> T:
    """JSON as the Struct it should be. Raises LoginFailed."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError):
        raise LoginFailed(502, f"{what}: not the JSON it should be") from None


def shown(code: str) -> str:
    """An error code of the provider, if it has the shape of one."""
    return code if HARMLESS.fullmatch(code) else "an error we do not repeat"


# ---- its signature --------------------------------------------------------------------------------------------------


class Registry(jws.JWSRegistry):
    """joserfc's algorithms, of which one is let through: an empty list would mean its favourites, HS256 among them."""

    max_header_length = LONGEST_HEADER

    def __init__(self, algorithm: str) -> None:
        super().__init__(algorithms=[algorithm], strict_check_header=False)  # unknown fields must be ignored

    def get_alg(self, name: str) -> Any:
        if name not in ALGORITHMS or [name] != self.allowed:
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


def header_of(token: str, announced: list[str]) -> Header:
    """The token's header, its algorithm one that is announced and that we accept. Raises LoginFailed."""
    try:
        raw = base64.urlsafe_b64decode(token.partition(".")[0] + "==")
    except ValueError:
        raise LoginFailed(502, "id_token: not a token") from None
    header = read(raw, Header, "id_token: header")
    if header.alg not in ALGORITHMS or header.alg not in announced:
        raise LoginFailed(502, "id_token: alg is not an asymmetric one that the provider announces")
    if header.crit is not None:
        raise LoginFailed(502, "id_token: crit names an unsupported extension")
    return header


def verified(token: str, header: Header, keys: list[Jwk]) -> Claims:
    """The claims of a token that one of the keys has signed. Raises LoginFailed."""
    fitting = [key for key in keys if key.fits(header)]
    if not fitting or (header.kid is None and len(fitting) > 1):
        raise LoginFailed(502, "id_token: not one key of the provider fits")
    if fitting[0].is_weak:
        raise LoginFailed(502, "id_token: the provider's key is too short")
    try:
        key = JWKRegistry.import_key(msgspec.to_builtins(fitting[0]))
        payload = jws.deserialize_compact(token, key, registry=Registry(header.alg)).payload
    except JoseError as error:
        raise LoginFailed(502, f"id_token: {shown(error.error)}") from None
    except (ValueError, TypeError, RecursionError):
        raise LoginFailed(502, "id_token: the key or the signature cannot be read") from None
    return read(payload or b"", Claims, "id_token: claims")


# ---- its claims -----------------------------------------------------------------------------------------------------


def check_claims(claims: Claims, client_id: str, issuer: str, now: float) -> None:
    """That the token is of this provider, for us, and of this time. Raises LoginFailed."""
    audiences = [claims.aud] if isinstance(claims.aud, str) else claims.aud
    faults = {
        "of another issuer": claims.iss != issuer,
        "for another audience": client_id not in audiences,
        "for several audiences, and no azp": len(audiences) > 1 and claims.azp is None,
        "for another azp": claims.azp not in (None, client_id),
        "expired": now >= claims.exp + LEEWAY,
        "issued in the future": claims.iat > now + LEEWAY,
        "not valid yet": claims.nbf > now + LEEWAY,
        "of a sub that is none": not SUBJECT.fullmatch(claims.sub),
    }
    for fault, headers in faults.items():
        if headers:
            raise LoginFailed(502, f"id_token: {fault}")


def check_binding(claims: Claims, header: Header, nonce: str, access_token: str) -> None:
    """That the token is of this flow, and the access token of this token (section 3.1.3.6). Raises LoginFailed."""
    if not is_same(claims.nonce, nonce):
        raise LoginFailed(400, "id_token: of another nonce")
    digest = HASHES.get(header.alg[-3:], hashlib.sha512)(access_token.encode()).digest()  # Ed25519 goes with SHA-512
    if claims.at_hash is not None and not is_same(claims.at_hash, encode(digest[: len(digest) // 2])):
        raise LoginFailed(502, "id_token: at_hash is of another access token")
