"""The types of settings: their values, texts of a certain form, and secrets. Pure, except that secrets read files.

Rules:
1. A value is checked here by itself. Rules between settings are in `faults`.
2. An invalid value raises InvalidValue; its text is what the value must be, and never contains the value.
3. A check returns the normal form, so that no other code has to parse a setting.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import limits

USUAL_PORTS = {"http": 80, "https": 443}
SHORTEST_SECRET = 16  # characters; `new-secret` makes 43

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class InvalidValue(ValueError):
    """A value that its type refuses; the text is what it must be."""


# ---- kinds of values ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SettingType:
    """How a value is read: `decode` turns an environment variable's text into what TOML would have given,
    `check` validates and converts it, raising Wrong."""

    decode: Callable[[str], object]
    check: Callable[[object], Any]


def decoded_as(convert: Callable[[str], object], wanted: str) -> Callable[[str], object]:
    def decode(text: str) -> object:
        try:
            return convert(text.strip())
        except (ValueError, KeyError):
            raise InvalidValue(f"must be {wanted}") from None

    return decode


def whole(lowest: int, highest: int) -> SettingType:
    wanted = f"a whole number from {lowest} to {highest}"

    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise InvalidValue(f"must be {wanted}")
        return value

    return SettingType(decoded_as(int, wanted), check)


def seconds(lowest: float, highest: float) -> SettingType:
    wanted = f"seconds, from {lowest:g} to {highest:g}"

    def check(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= highest:
            raise InvalidValue(f"must be {wanted}")
        return float(value)

    return SettingType(decoded_as(float, wanted), check)


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def check_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidValue("must be true or false")
    return value


boolean = SettingType(decoded_as(lambda text: BOOLEANS[text.lower()], "true or false"), check_boolean)


def check_text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidValue("must be text in quotes")
    return value


text = SettingType(str, check_text)


def texts(convert: Callable[[str], Any] = str) -> SettingType:
    """A list of texts, each converted; in the environment separated by commas, in blanks or not."""

    def check(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidValue('must be a list of texts, like ["one", "two"]')
        return tuple(dict.fromkeys(convert(item) for item in value))

    return SettingType(lambda raw: [part.strip() for part in raw.split(",") if part.strip()], check)


def choice(*offered: str) -> SettingType:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in offered:
            raise InvalidValue(f"must be one of {', '.join(offered)}")
        return value

    return SettingType(str.strip, check)


def converted(convert: Callable[[str], Any]) -> SettingType:
    return SettingType(str, lambda value: convert(check_text(value)))


# ---- what a table says of a setting ------------------------------------------------------------------------------

REQUIRED: Any = object()


def setting(kind: SettingType, default: Any = REQUIRED) -> Any:
    """A dataclass field that the loader fills; without a default it must be set."""
    return field(default=default, metadata={"kind": kind})


def secret(check: Callable[[str], str], *, required: bool) -> Any:
    return field(default=REQUIRED if required else None, metadata={"secret": check})


# ---- texts with a shape ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """`amount` per `seconds`; `text` is how people write it, like 20/minute."""

    amount: int
    seconds: int
    text: str


MOST_OF_A_RATE = 10**15 - 1  # the largest number that RateLimit may hold (RFC 9651 section 3.3.1)
LONGEST_WINDOW = 100 * 365 * 86400  # seconds; in milliseconds Redis can still count them exactly


def rates(written: str) -> tuple[Rate, ...]:
    """`20/minute;500/day` in the notation of the `limits` package; empty means no limit. Shortest windows first.

    Of several for one window the smallest holds: the others could never refuse anything.
    """
    found = []
    for part in filter(None, (part.strip() for part in re.split("[;,|]", written))):
        try:
            item = limits.parse(part)
        except ValueError:
            raise InvalidValue("must be rates like 20/minute;500/day") from None
        if item.amount < 1:
            raise InvalidValue("must be rates of at least 1; an empty text means no limit")
        if item.amount > MOST_OF_A_RATE or item.get_expiry() > LONGEST_WINDOW:
            raise InvalidValue(f"must be rates of at most {MOST_OF_A_RATE} in 100 years; an empty text means no limit")
        multiple = f"{item.multiples} " if item.multiples > 1 else ""
        found.append(Rate(item.amount, item.get_expiry(), f"{item.amount}/{multiple}{item.GRANULARITY.name}"))
    loosest_first = sorted(found, key=lambda rate: (rate.seconds, -rate.amount))
    return tuple({rate.seconds: rate for rate in loosest_first}.values())


def host_in_url(host: str | None) -> str:
    """A host as browsers write it, IPv6 in its short form. Raises ValueError for a wildcard, or a name not in ASCII."""
    if host and ":" in host and "%" not in host:
        return f"[{ipaddress.IPv6Address(host)}]"
    if not re.fullmatch(r"[a-z0-9._-]+", host or ""):
        raise ValueError
    return cast(str, host)


def origin(written: str) -> str:
    """An origin as a browser writes it in `Origin`: scheme, host, and the port unless it is the usual one."""
    try:
        url = urlsplit(written.strip())
        host, port = host_in_url(url.hostname), url.port
    except ValueError:
        raise InvalidValue(
            "must be an origin like https://chat.example.org, a name in other letters as xn--..."
        ) from None
    if (
        url.scheme not in ("http", "https")
        or port == 0
        or url.path not in ("", "/")
        or url.query
        or url.fragment
        or "@" in url.netloc
    ):
        raise InvalidValue("must be an origin like https://chat.example.org: no path, no user")
    return f"{url.scheme}://{host}" + ("" if port in (None, USUAL_PORTS[url.scheme]) else f":{port}")


def hosts_of(origin: str) -> set[str]:
    """The values of Host that match an origin: with or without the usual port."""
    url = urlsplit(origin)
    host = url.netloc.lower()
    return {host, f"{host}:{USUAL_PORTS[url.scheme]}"} if url.port is None else {host}


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def base_url(written: str) -> str:
    """The upstream's base URL, without a slash at its end."""
    written = written.strip()
    try:
        url = urlsplit(written)
        valid = url.scheme in ("http", "https") and bool(host_in_url(url.hostname)) and url.port != 0
    except ValueError:
        valid = False
    if not valid or "@" in url.netloc or not re.fullmatch(r"[!-~]+", written) or re.search(r"[?#\\]", written):
        raise InvalidValue("must be a URL like https://api.selamgpt.com/v1: no user, no query")
    return url.scheme + written[len(url.scheme) :].rstrip("/")


def issuer(written: str) -> str:
    """An OpenID provider as it names itself, to the letter: a slash at the end belongs to the name."""
    written = written.strip()
    if written:
        base_url(written)
    return written


def listening_host(written: str) -> str:
    """The host to listen on, without blanks around it. Checks its characters only: it is not looked up."""
    written = written.strip()
    if re.fullmatch(r"[A-Za-z0-9._:%-]+", written) and not re.search(r"[^.]{64}|^\.|\.\.", written):
        return written
    raise InvalidValue("must be an address of this machine, like 127.0.0.1, or 0.0.0.0 for all of them")


def peer(written: str) -> Network | str:
    if written == "unix":
        return written
    try:
        return ipaddress.ip_network(written, strict=False)
    except ValueError:
        raise InvalidValue("must be addresses or networks like 10.0.0.0/8, or unix for socket peers") from None


def header_name(written: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", written):
        raise InvalidValue("must be a header's name, like Authorization")
    return written


def header_word(written: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]*", written):
        raise InvalidValue("must be one word, like Bearer, or an empty text")
    return written


STORES = ("redis", "rediss", "unix", "redis+unix", "redis+sentinel")


def store(written: str) -> str:
    """The URL of the limit store: a file as sqlite:///path, others in the notation of the `limits` package."""
    written = written.strip()
    if written == "memory://" or re.fullmatch(r"sqlite:///[^?#\x00]*[^/?#\x00]", written):
        return written
    try:
        url = urlsplit(written.replace(",", "."))  # sentinels stand in a list
        path = {"redis+sentinel": r"/[^/]+", "unix": r"/.+", "redis+unix": r"/.+"}.get(url.scheme, r"(?:/\d*)?")
        valid = url.scheme in STORES and "://" in written and bool(re.fullmatch(path, url.path))
        valid = valid and (url.scheme == "redis+sentinel" or url.port != 0)
    except ValueError:
        valid = False
    if not valid:
        raise InvalidValue(
            "must be memory://, sqlite:///path, redis://host:6379/0, rediss://, unix:///path or "
            "redis+sentinel://host:26379/name"
        )
    return written.replace("unix://", "redis+unix://", 1) if written.startswith("unix://") else written


# ---- secrets -----------------------------------------------------------------------------------------------------


def lines_of(written: str) -> list[str]:
    return [line.strip() for line in written.split("\n") if line.strip()]


class Secret:
    """A secret's value and where to read it again. Never shown: not by repr, not by str, not in a fault.

    `check` is what the value has to pass, then as now; it gives back the normal form or raises Wrong.
    """

    __slots__ = ("check", "path", "value")

    def __init__(self, value: str, path: Path | None = None, check: Callable[[str], str] = str) -> None:
        self.value = value
        self.path = path
        self.check = check

    def lines(self) -> list[str]:
        return lines_of(self.value)

    def again(self) -> Secret:
        """The secret as its file holds it now; itself without a file, or while that holds nothing valid."""
        if self.path is None:
            return self
        try:
            value = self.check(self.path.read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError, InvalidValue):
            return self
        return Secret(value, self.path, self.check)

    def __repr__(self) -> str:
        return "Secret(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


def key_text(written: str) -> str:
    """A key as it can stand in a header: one line of visible ASCII. Quotes around it are not its own, but a file's."""
    if not re.fullmatch(r"[!-~]+", written) or re.fullmatch(r"""(["']).*\1""", written):
        raise InvalidValue(
            "must be the secret alone, one line of visible ASCII characters: no quotes, no word before it"
        )
    return written


def session_keys(written: str) -> str:
    lines = lines_of(written)
    if any(len(line) < SHORTEST_SECRET for line in lines) or not lines:
        raise InvalidValue(
            f"must be at least {SHORTEST_SECRET} characters a line; `chat-proxy new-secret` makes a good one"
        )
    return "\n".join(lines)


ARGON2ID = r"\$argon2id\$v=19\$m=\d+,t=\d+,p=\d+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+"
PASSWORD_LINE = re.compile(rf"(?:[^:\s]{{1,128}}:)?{ARGON2ID}")


def password_lines(written: str) -> str:
    lines = lines_of(written)
    users = [line.partition(":")[0] for line in lines if not line.startswith("$")]
    if not all(PASSWORD_LINE.fullmatch(line) for line in lines):
        raise InvalidValue("must be lines like user:hash, or one hash for all; `chat-proxy hash-password` makes them")
    if not lines or len(set(users)) != len(users) or (len(lines) > 1 and len(users) != len(lines)):
        raise InvalidValue("must be one line a user, each user once; or one hash without a user, alone")
    return "\n".join(lines)
