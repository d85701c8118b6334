"""Settings: one TOML file, the environment over it, secrets from places made for secrets.

Rules:
1. Every fault is collected before anything is said; the caller gets all of them in one `SettingsError`.
2. A fault names the setting, where its value came from and what would be right. It never shows a value,
   since people put secrets into the wrong variable.
3. Secrets come from `$CREDENTIALS_DIRECTORY/<section>_<name>`, then `CHAT_PROXY_<SECTION>_<NAME>_FILE`, then
   the variable itself; never from the file that is likely to be committed.
4. What this version cannot do yet is refused at start, not ignored.

The tables at the end of this file are the contract; everything above reads them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import ipaddress
import re
import ssl
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import limits

PREFIX = "CHAT_PROXY_"
DEFAULT_FILE = "chat-proxy.toml"
SHORTEST_SECRET = 16  # characters; `new-secret` makes 43
KUBERNETES = re.compile(r".*(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)\Z")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, in words for the operator."""

    setting: str
    source: str
    message: str

    def __str__(self) -> str:
        where = f" (from {self.source})" if self.source else ""
        return f"{self.setting}{where}: {self.message}"


class SettingsError(Exception):
    """All faults of one set of settings."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("\n".join(map(str, faults)))


class Wrong(ValueError):
    """A value that its kind refuses; the text says what would be right."""


# ---- kinds of values ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """How a value is read: `decode` turns an environment variable's text into what TOML would have given,
    `check` validates and converts it, raising Wrong."""

    decode: Callable[[str], object]
    check: Callable[[object], Any]


def decoded_as(convert: Callable[[str], object], wanted: str) -> Callable[[str], object]:
    def decode(text: str) -> object:
        try:
            return convert(text.strip())
        except (ValueError, KeyError):
            raise Wrong(f"wants {wanted}") from None

    return decode


def whole(lowest: int, highest: int) -> Kind:
    wanted = f"a whole number from {lowest} to {highest}"

    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise Wrong(f"wants {wanted}")
        return value

    return Kind(decoded_as(int, wanted), check)


def seconds(lowest: float, highest: float) -> Kind:
    wanted = f"seconds, from {lowest:g} to {highest:g}"

    def check(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= highest:
            raise Wrong(f"wants {wanted}")
        return float(value)

    return Kind(decoded_as(float, wanted), check)


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def check_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise Wrong("wants true or false")
    return value


boolean = Kind(decoded_as(lambda text: BOOLEANS[text.lower()], "true or false"), check_boolean)


def check_text(value: object) -> str:
    if not isinstance(value, str):
        raise Wrong("wants text in quotes")
    return value


text = Kind(str, check_text)


def texts(convert: Callable[[str], Any] = str) -> Kind:
    """A list of texts, each converted; in the environment separated by commas, in blanks or not."""

    def check(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise Wrong('wants a list of texts, like ["one", "two"]')
        return tuple(dict.fromkeys(convert(item) for item in value))

    return Kind(lambda raw: [part.strip() for part in raw.split(",") if part.strip()], check)


def choice(*offered: str) -> Kind:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in offered:
            raise Wrong(f"wants one of {', '.join(offered)}")
        return value

    return Kind(str.strip, check)


def converted(convert: Callable[[str], Any]) -> Kind:
    return Kind(str, lambda value: convert(check_text(value)))


# ---- values with a shape ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """`amount` per `seconds`; `text` is how people write it, like 20/minute."""

    amount: int
    seconds: int
    text: str


def rates(written: str) -> tuple[Rate, ...]:
    """`20/minute;500/day` in the notation of the `limits` package; empty means no limit."""
    found = []
    for part in filter(None, (part.strip() for part in re.split("[;,|]", written))):
        try:
            item = limits.parse(part)
        except ValueError:
            raise Wrong("wants rates like 20/minute;500/day") from None
        if item.amount < 1:
            raise Wrong("wants rates of at least 1; an empty text means no limit")
        multiple = f"{item.multiples} " if item.multiples > 1 else ""
        found.append(Rate(item.amount, item.get_expiry(), f"{item.amount}/{multiple}{item.GRANULARITY.name}"))
    return tuple(sorted(dict.fromkeys(found), key=lambda rate: rate.seconds))


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
        raise Wrong("wants an origin like https://chat.example.org, a name in other letters as xn--...") from None
    if (
        url.scheme not in ("http", "https")
        or port == 0
        or url.path not in ("", "/")
        or url.query
        or url.fragment
        or "@" in url.netloc
    ):
        raise Wrong("wants an origin like https://chat.example.org: no path, no user")
    usual = {"http": 80, "https": 443}[url.scheme]
    return f"{url.scheme}://{host}" + ("" if port in (None, usual) else f":{port}")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def base_url(written: str) -> str:
    """Where the upstream's API begins, without the slash at its end."""
    written = written.strip()
    try:
        url = urlsplit(written)
        valid = url.scheme in ("http", "https") and bool(host_in_url(url.hostname)) and url.port != 0
    except ValueError:
        valid = False
    if not valid or "@" in url.netloc or not re.fullmatch(r"[!-~]+", written) or re.search(r"[?#\\]", written):
        raise Wrong("wants a URL like https://api.selamgpt.com/v1: no user, no query")
    return url.scheme + written[len(url.scheme) :].rstrip("/")


def issuer(written: str) -> str:
    """An OpenID provider as it names itself, to the letter: a slash at the end belongs to the name."""
    written = written.strip()
    if written:
        base_url(written)
    return written


def listening_host(written: str) -> str:
    """An address or a name to listen on, in a form that can be looked up at all."""
    written = written.strip()
    if re.fullmatch(r"[A-Za-z0-9._:%-]+", written) and not re.search(r"[^.]{64}|^\.|\.\.", written):
        return written
    raise Wrong("wants an address of this machine, like 127.0.0.1, or 0.0.0.0 for all of them")


def peer(written: str) -> Network | str:
    if written == "unix":
        return written
    try:
        return ipaddress.ip_network(written, strict=False)
    except ValueError:
        raise Wrong("wants addresses or networks like 10.0.0.0/8, or unix for socket peers") from None


def header_name(written: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", written):
        raise Wrong("wants a header's name, like Authorization")
    return written


def header_word(written: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]*", written):
        raise Wrong("wants one word, like Bearer, or an empty text")
    return written


STORES = ("redis", "rediss", "unix", "redis+unix", "redis+sentinel")


def store(written: str) -> str:
    """Where limits count, as the `limits` package writes it."""
    written = written.strip()
    if written == "memory://":
        return written
    try:
        url = urlsplit(written.replace(",", "."))  # sentinels stand in a list
        path = {"redis+sentinel": r"/[^/]+", "unix": r"/.+", "redis+unix": r"/.+"}.get(url.scheme, r"(?:/\d*)?")
        valid = url.scheme in STORES and "://" in written and bool(re.fullmatch(path, url.path))
        valid = valid and (url.scheme == "redis+sentinel" or url.port != 0)
    except ValueError:
        valid = False
    if not valid:
        raise Wrong("wants memory://, redis://host:6379/0, rediss://, unix:///path or redis+sentinel://host:26379/name")
    return written.replace("unix://", "redis+unix://", 1) if written.startswith("unix://") else written


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
        except (OSError, UnicodeDecodeError, Wrong):
            return self
        return Secret(value, self.path, self.check)

    def __repr__(self) -> str:
        return "Secret(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


def key_text(written: str) -> str:
    """A key as it can stand in a header: one line of visible ASCII."""
    if not re.fullmatch(r"[!-~]+", written):
        raise Wrong("wants one line of visible ASCII characters")
    return written


def session_keys(written: str) -> str:
    lines = lines_of(written)
    if any(len(line) < SHORTEST_SECRET for line in lines) or not lines:
        raise Wrong(f"wants at least {SHORTEST_SECRET} characters a line; `chat-proxy new-secret` makes a good one")
    return "\n".join(lines)


ARGON2ID = r"\$argon2id\$v=19\$m=\d+,t=\d+,p=\d+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+"
PASSWORD_LINE = re.compile(rf"(?:[^:\s]{{1,128}}:)?{ARGON2ID}")


def password_lines(written: str) -> str:
    lines = lines_of(written)
    users = [line.partition(":")[0] for line in lines if not line.startswith("$")]
    if not all(PASSWORD_LINE.fullmatch(line) for line in lines):
        raise Wrong("wants lines like user:hash, or one hash for all; `chat-proxy hash-password` makes them")
    if not lines or len(set(users)) != len(users) or (len(lines) > 1 and len(users) != len(lines)):
        raise Wrong("wants one line a user, each user once; or one hash without a user, alone")
    return "\n".join(lines)


# ---- the tables --------------------------------------------------------------------------------------------------

REQUIRED: Any = object()


def setting(kind: Kind, default: Any = REQUIRED) -> Any:
    """A dataclass field that the loader fills; without a default it must be set."""
    return field(default=default, metadata={"kind": kind})


def secret(check: Callable[[str], str], *, required: bool) -> Any:
    return field(default=REQUIRED if required else None, metadata={"secret": check})


@dataclass(frozen=True, slots=True)
class Server:
    host: str = setting(converted(listening_host), "127.0.0.1")
    port: int = setting(whole(0, 65535), 8000)
    socket: str = setting(text, "")
    workers: int = setting(whole(1, 64), 1)
    public_url: str = setting(converted(origin), "")
    extra_origins: tuple[str, ...] = setting(texts(origin), ())
    trusted_proxies: tuple[Network | str, ...] = setting(
        texts(peer), (ipaddress.ip_network("127.0.0.1/32"), ipaddress.ip_network("::1/128"))
    )
    max_streams: int = setting(whole(1, 1_000_000), 1000)
    max_body_bytes: int = setting(whole(1024, 1 << 30), 1 << 20)
    drain_seconds: float = setting(seconds(0, 3600), 30.0)
    comment_seconds: float = setting(seconds(0, 3600), 0.0)
    keep_alive_seconds: float = setting(seconds(1, 3600), 75.0)
    connections_per_address: int = setting(whole(1, 1_000_000), 100)
    static_dir: str | None = setting(text, None)

    @property
    def is_https(self) -> bool:
        return self.public_url.startswith("https://")

    @property
    def is_local(self) -> bool:
        return is_loopback(urlsplit(self.public_url).hostname or "")


@dataclass(frozen=True, slots=True)
class Upstream:
    base_url: str = setting(converted(base_url))
    api_key: Secret = secret(key_text, required=True)
    auth_header: str = setting(converted(header_name), "Authorization")
    auth_scheme: str = setting(converted(header_word), "Bearer")
    connect_timeout: float = setting(seconds(0.05, 600), 5.0)
    first_byte_timeout: float = setting(seconds(0.05, 3600), 60.0)
    idle_timeout: float = setting(seconds(0.05, 3600), 60.0)
    total_timeout: float = setting(seconds(0.05, 86400), 600.0)
    retries: int = setting(whole(0, 10), 2)
    ca_file: str = setting(text, "")
    allow_http: bool = setting(boolean, False)


@dataclass(frozen=True, slots=True)
class Session:
    mode: str = setting(choice("anonymous", "password", "oidc", "header"), "anonymous")
    passwords: Secret | None = secret(password_lines, required=False)
    secret: Secret | None = secret(session_keys, required=False)
    control_file: str = setting(text, "")
    lifetime: int = setting(whole(60, 365 * 86400), 604800)
    idle: int = setting(whole(60, 365 * 86400), 86400)


@dataclass(frozen=True, slots=True)
class Oidc:
    issuer: str = setting(converted(issuer), "")
    client_id: str = setting(text, "")
    client_secret: Secret | None = secret(key_text, required=False)
    scopes: tuple[str, ...] = setting(texts(), ("openid", "email"))
    allowed_emails: tuple[str, ...] = setting(texts(str.lower), ())
    allowed_domains: tuple[str, ...] = setting(texts(str.lower), ())


@dataclass(frozen=True, slots=True)
class Header:
    name: str = setting(converted(header_name), "X-Forwarded-Email")


@dataclass(frozen=True, slots=True)
class Policy:
    models: tuple[str, ...] = setting(texts())
    force_model: bool = setting(boolean, False)
    max_output_tokens: int = setting(whole(1, 10_000_000), 4096)
    output_limit_field: str = setting(choice("max_tokens", "max_completion_tokens"), "max_tokens")
    max_messages: int = setting(whole(1, 100_000), 200)
    max_input_chars: int = setting(whole(1, 100_000_000), 200_000)
    system_prompt: str = setting(text, "")
    lock_system: bool = setting(boolean, False)
    allow: tuple[str, ...] = setting(
        texts(),
        (
            *("temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "response_format"),
            *("stream_options", "max_tokens", "max_completion_tokens", "reasoning_effort", "user"),
        ),
    )
    allow_image_urls: str = setting(choice("none", "data", "https"), "data")


@dataclass(frozen=True, slots=True)
class Limits:
    per_session: tuple[Rate, ...] = setting(converted(rates), rates("20/minute;500/day"))
    per_address: tuple[Rate, ...] = setting(converted(rates), rates("60/minute;2000/day"))
    refusals_per_address: tuple[Rate, ...] = setting(converted(rates), rates("120/minute"))
    new_sessions: tuple[Rate, ...] = setting(converted(rates), rates("30/hour"))
    streams_per_session: int = setting(whole(1, 1_000_000), 3)
    streams_per_address: int = setting(whole(1, 1_000_000), 20)
    tokens_per_session: tuple[Rate, ...] = setting(converted(rates), rates("200000/day"))
    tokens_per_address: tuple[Rate, ...] = setting(converted(rates), rates("1000000/day"))
    tokens_total: tuple[Rate, ...] = setting(converted(rates), rates(""))
    exact_usage: bool = setting(boolean, False)
    store: str = setting(converted(store), "memory://")
    when_store_fails: str = setting(choice("local", "refuse"), "local")

    @property
    def is_shared(self) -> bool:
        return self.store != "memory://"


@dataclass(frozen=True, slots=True)
class Metrics:
    host: str = setting(converted(listening_host), "127.0.0.1")
    port: int = setting(whole(0, 65535), 0)


@dataclass(frozen=True, slots=True)
class Traces:
    enabled: bool = setting(boolean, False)
    propagate: bool = setting(boolean, False)


@dataclass(frozen=True, slots=True)
class Log:
    format: str = setting(choice("json", "text"), "json")
    level: str = setting(choice("debug", "info", "warning", "error"), "info")


@dataclass(frozen=True, slots=True)
class Settings:
    server: Server
    upstream: Upstream
    session: Session
    oidc: Oidc
    header: Header
    policy: Policy
    limits: Limits
    metrics: Metrics
    traces: Traces
    log: Log


SECTIONS: dict[str, type[Any]] = {
    "server": Server,
    "upstream": Upstream,
    "session": Session,
    "oidc": Oidc,
    "header": Header,
    "policy": Policy,
    "limits": Limits,
    "metrics": Metrics,
    "traces": Traces,
    "log": Log,
}


# ---- loading -------------------------------------------------------------------------------------------------------


def load(file: str | None, environ: Mapping[str, str]) -> Settings:
    """Settings from `file` (None: chat-proxy.toml in the current folder, if it is there) and the environment.

    Raises SettingsError with every fault; a file that was named and is missing is one.
    """
    faults: list[Fault] = []
    written = read_file(file, faults)
    return Loader(written, file or DEFAULT_FILE, environ, faults).settings()


def from_variables(environ: Mapping[str, str]) -> Settings:
    """Settings from these variables alone. Raises SettingsError."""
    return Loader({}, DEFAULT_FILE, environ, []).settings()


def read_file(file: str | None, faults: list[Fault]) -> dict[str, Any]:
    path = Path(file or DEFAULT_FILE)
    if file is None and not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        faults.append(Fault("--config", str(path), f"cannot be read: {error.strerror}"))
    except UnicodeDecodeError:
        faults.append(Fault("--config", str(path), "is not UTF-8 text"))
    except (ValueError, RecursionError) as error:  # beside its own errors: a number of 5000 digits, 1000 brackets
        place = re.search(r"\(at [^)]*\)", str(error))
        faults.append(Fault("--config", str(path), f"is not valid TOML {place[0] if place else ''}".rstrip()))
    return {}


class Loader:
    """Reads the tables above out of a parsed file and an environment, collecting faults."""

    def __init__(self, written: dict[str, Any], file: str, environ: Mapping[str, str], faults: list[Fault]) -> None:
        self.written = written
        self.file = file
        self.environ = {
            name: value for name, value in environ.items() if name.startswith(PREFIX) and not is_kubernetes(name, value)
        }
        self.credentials = environ.get("CREDENTIALS_DIRECTORY")
        self.faults = faults
        self.sources: dict[str, str] = {}  # where each setting that was given came from

    def settings(self) -> Settings:
        self.find_unknown()
        settings = with_public_url(Settings(**{name: self.section(name, table) for name, table in SECTIONS.items()}))
        self.faults += contradictions(settings, {fault.setting for fault in self.faults}, self.sources)
        if self.faults:
            raise SettingsError(self.faults)
        return settings

    def section(self, section: str, table: type[Any]) -> Any:
        """The section with what could be read; what could not has its fault, and REQUIRED in its place."""
        values = {}
        for spec in dataclasses.fields(table):
            read = self.secret if "secret" in spec.metadata else self.value
            values[spec.name] = read(section, spec)
        return table(**values)

    def value(self, section: str, spec: dataclasses.Field[Any]) -> Any:
        kind: Kind = spec.metadata["kind"]
        name, variable = f"{section}.{spec.name}", f"{PREFIX}{section}_{spec.name}".upper()
        table = self.written.get(section)
        try:
            if variable in self.environ:
                self.sources[name] = f"environment variable {variable}"
                return kind.check(kind.decode(utf8(self.environ[variable])))
            if isinstance(table, dict) and spec.name in table:
                self.sources[name] = self.file
                return kind.check(table[spec.name])
        except Wrong as wrong:
            self.faults.append(Fault(name, self.sources[name], str(wrong)))
            return REQUIRED
        if spec.default is REQUIRED:
            self.faults.append(Fault(name, "", f"is required; set it in {self.file} or as {variable}"))
        return spec.default

    def secret(self, section: str, spec: dataclasses.Field[Any]) -> Any:
        check: Callable[[str], str] = spec.metadata["secret"]
        name, variable = f"{section}.{spec.name}", f"{PREFIX}{section}_{spec.name}".upper()
        try:
            found = self.find_secret(section, spec.name, variable)
            if found is not None:
                return Secret(check(utf8(found.value)), found.path, check)
        except OSError as error:  # its filename may be a key, put into ..._FILE by mistake
            self.faults.append(Fault(name, self.sources[name], f"cannot be read: {error.strerror}"))
        except UnicodeDecodeError:
            self.faults.append(Fault(name, self.sources[name], "is not UTF-8 text"))
        except Wrong as wrong:
            self.faults.append(Fault(name, self.sources[name], str(wrong)))
        else:
            if spec.default is REQUIRED:
                self.faults.append(
                    Fault(name, "", f"is required; set {variable}, or {variable}_FILE to a file that holds it")
                )
            return spec.default
        return REQUIRED

    def find_secret(self, section: str, name: str, variable: str) -> Secret | None:
        """The secret as it was found, its source noted before it is read. Raises OSError, UnicodeDecodeError."""
        full_name = f"{section}.{name}"
        if self.credentials:
            path = Path(self.credentials, f"{section}_{name}")
            self.sources[full_name] = f"credential {path.name}"
            if path.exists():
                return Secret(path.read_text(encoding="utf-8").strip(), path)
            del self.sources[full_name]
        if named := self.environ.get(f"{variable}_FILE"):
            self.sources[full_name] = f"the file that {variable}_FILE names"
            return Secret(Path(named).read_text(encoding="utf-8").strip(), Path(named))
        if variable in self.environ:
            self.sources[full_name] = f"environment variable {variable}"
            return Secret(self.environ[variable].strip())
        return None

    def find_unknown(self) -> None:
        names = {
            section: {spec.name: spec for spec in dataclasses.fields(table)} for section, table in SECTIONS.items()
        }
        settings = [f"{section}.{name}" for section, specs in names.items() for name in specs]
        for section, table in self.written.items():
            if section not in names:
                self.unknown(section, self.file, [*names, *settings], "section")
                continue
            if not isinstance(table, dict):
                self.faults.append(Fault(section, self.file, f"is a section: its settings stand under [{section}]"))
                continue
            for name in table:
                if name not in names[section]:
                    self.unknown(f"{section}.{name}", self.file, settings, "setting")
                elif "secret" in names[section][name].metadata:
                    variable = f"{PREFIX}{section}_{name}".upper()
                    message = f"a secret does not belong in this file; set {variable} or {variable}_FILE"
                    self.faults.append(Fault(f"{section}.{name}", self.file, message))
        known = set()
        for section, specs in names.items():
            for name, spec in specs.items():
                variable = f"{PREFIX}{section}_{name}".upper()
                known.add(variable)
                if "secret" in spec.metadata:
                    known.add(f"{variable}_FILE")
        for variable in sorted(self.environ.keys() - known):
            self.unknown(variable, "environment", known, "variable")

    def unknown(self, name: str, source: str, known: Iterable[str], what: str) -> None:
        folded = {candidate.casefold(): candidate for candidate in known}
        near = difflib.get_close_matches(name.casefold(), folded, n=1)
        hint = f"; did you mean {folded[near[0]]}?" if near else ""
        self.faults.append(Fault(name, source, f"there is no such {what}{hint}"))


def is_kubernetes(name: str, value: str) -> bool:
    """What Kubernetes injects for a Service whose name begins with chat-proxy; it is about the Service, not for us."""
    addressed = value.startswith(("tcp://", "udp://", "sctp://"))
    return bool(KUBERNETES.match(name)) or (name.endswith("_PORT") and addressed)


def utf8(raw: str) -> str:
    """The text of an environment variable; bytes that are not UTF-8 come as lone surrogates, which nothing can send."""
    try:
        raw.encode()
    except UnicodeEncodeError:
        raise Wrong("is not UTF-8 text") from None
    return raw


def refused_by_opentelemetry(error: Exception) -> SettingsError:
    """What it has against the OTEL_* variables, which are settings that it reads itself: their names (rule 2)."""
    named = ", ".join(re.findall(r"OTEL_[A-Z_]+", str(error))) or "OTEL_*"
    message = f"OpenTelemetry cannot use what its variables say: {named} ({type(error).__name__})"
    return SettingsError([Fault("traces.enabled", "environment", message)])


def with_public_url(settings: Settings) -> Settings:
    if settings.server.public_url:
        return settings  # given, or faulty
    return on_port(settings, settings.server.port)


def on_port(settings: Settings, port: int) -> Settings:
    """The settings of a server that listens on `port`; seen at 127.0.0.1, unless a public_url was given."""
    server = settings.server
    given = server.public_url not in ("", f"http://127.0.0.1:{server.port}")
    public_url = server.public_url if given else f"http://127.0.0.1:{port}"
    return dataclasses.replace(settings, server=dataclasses.replace(server, port=port, public_url=public_url))


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A fault that shows only when several settings are seen together; `needs` must be free of faults of their own."""

    setting: str
    needs: tuple[str, ...]
    holds: Callable[[Settings], bool]
    message: str


def exposes_key(upstream: Upstream) -> bool:
    host = urlsplit(upstream.base_url).hostname or ""
    return upstream.base_url.startswith("http://") and not upstream.allow_http and not is_loopback(host)


def holds_certificates(file: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except (OSError, ValueError):  # ssl.SSLError is the one, a NUL in the name the other
        return False
    return True


LOGIN_PACKAGES = {"password": "argon2", "oidc": "joserfc"}


TRACES_PACKAGE = "opentelemetry.exporter.otlp.proto.http"  # brings the others that are needed


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False


def address(listening: Server | Metrics) -> tuple[str, int]:
    return listening.host, listening.port


CONTRADICTIONS = (
    Contradiction(
        "server.public_url",
        ("server.public_url",),
        lambda s: not s.server.is_https and not s.server.is_local,
        "wants https, unless it is a loopback address: a session cookie over plain http can be stolen",
    ),
    Contradiction(
        "session.secret",
        ("server.public_url", "session.secret"),
        lambda s: s.session.secret is None and not s.server.is_local,
        "is required when public_url is not loopback; `chat-proxy new-secret` makes one",
    ),
    Contradiction(
        "session.passwords",
        ("session.mode", "session.passwords"),
        lambda s: s.session.mode == "password" and s.session.passwords is None,
        "is required in this mode; `chat-proxy hash-password` makes its lines",
    ),
    *(
        Contradiction(
            f"oidc.{name}",
            ("session.mode", f"oidc.{name}"),
            lambda s, name=name: s.session.mode == "oidc" and not getattr(s.oidc, name),  # type: ignore[misc]
            "is required in this mode; the provider gives it when the application is registered there",
        )
        for name in ("issuer", "client_id", "client_secret")
    ),
    Contradiction(
        "oidc.issuer",
        ("oidc.issuer",),
        lambda s: s.oidc.issuer.startswith("http://") and not is_loopback(urlsplit(s.oidc.issuer).hostname or ""),
        "wants https: whoever is on the way could log in as anybody",
    ),
    Contradiction(
        "session.mode",
        ("session.mode",),
        lambda s: s.session.mode in LOGIN_PACKAGES and not is_installed(LOGIN_PACKAGES[s.session.mode]),
        "needs packages that are not installed: pip install 'chat-proxy[login]'",
    ),
    Contradiction(
        "server.workers",
        ("server.workers", "limits.store"),
        lambda s: s.server.workers > 1 and not s.limits.is_shared,
        "wants limits.store on Redis when it is more than one: each worker would allow the whole of every limit, "
        "and a logout would be known to one of them only",
    ),
    Contradiction(
        "limits.store",
        ("limits.store",),
        lambda s: s.limits.is_shared and not is_installed("redis"),
        "needs packages that are not installed: pip install 'chat-proxy[redis]'",
    ),
    Contradiction(
        "traces.enabled",
        ("traces.enabled",),
        lambda s: s.traces.enabled and not is_installed(TRACES_PACKAGE),
        "needs packages that are not installed: pip install 'chat-proxy[otel]'",
    ),
    Contradiction(
        "traces.propagate",
        ("traces.enabled", "traces.propagate"),
        lambda s: s.traces.propagate and not s.traces.enabled,
        "wants traces.enabled: without it there is no span that the upstream could be told of",
    ),
    Contradiction(
        "upstream.base_url",
        ("upstream.base_url", "upstream.allow_http"),
        lambda s: exposes_key(s.upstream),
        "wants https: plain http would show the key to the network (upstream.allow_http = true permits it)",
    ),
    Contradiction(
        "upstream.ca_file",
        ("upstream.ca_file",),
        lambda s: bool(s.upstream.ca_file) and not holds_certificates(s.upstream.ca_file),
        "cannot be read, or holds no certificate in PEM format",
    ),
    Contradiction(
        "policy.models",
        ("policy.models",),
        lambda s: not s.policy.models or not all(s.policy.models),
        "is empty, or one of its names is; name at least one model",
    ),
    Contradiction(
        "server.static_dir",
        ("server.static_dir",),
        lambda s: bool(s.server.static_dir) and not Path(s.server.static_dir or "").is_dir(),
        "is not a folder",
    ),
    Contradiction(
        "session.idle",
        ("session.idle", "session.lifetime"),
        lambda s: s.session.idle > s.session.lifetime,
        "is longer than session.lifetime",
    ),
    Contradiction(
        "metrics.port",
        ("metrics.port", "metrics.host", "server.port", "server.host"),
        lambda s: bool(s.metrics.port) and not s.server.socket and address(s.metrics) == address(s.server),
        "is what server.port is; the metrics have a listener of their own",
    ),
)


def contradictions(settings: Settings, faulty: set[str], sources: Mapping[str, str]) -> list[Fault]:
    return [
        Fault(rule.setting, sources.get(rule.setting, ""), rule.message)
        for rule in CONTRADICTIONS
        if faulty.isdisjoint(rule.needs) and rule.holds(settings)
    ]
