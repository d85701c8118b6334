"""How settings are found: one TOML file, the environment over it, secrets from places made for secrets.

Rules:
1. Every fault is collected before anything is said; the caller gets all of them in one `SettingsError`.
2. Secrets come from `$CREDENTIALS_DIRECTORY/<section>_<name>`, then `CHAT_PROXY_<SECTION>_<NAME>_FILE`, then
   the variable itself; never from the file that is likely to be committed.
3. An unknown name is a fault, with the nearest known one. Only variables that Kubernetes adds are ignored.
4. A file that cannot be read is one fault. Its settings are not reported as missing, nor rules that depend on them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy.settings.faults import Fault, SettingsError, contradictions
from proxy.settings.tables import SECTIONS, Settings
from proxy.settings.values import REQUIRED, InvalidValue, Secret, SettingType

PREFIX = "CHAT_PROXY_"
DEFAULT_FILE = "chat-proxy.toml"
KUBERNETES = re.compile(r".*(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)\Z")
SPECS = {section: {spec.name: spec for spec in dataclasses.fields(table)} for section, table in SECTIONS.items()}


def load(file: str | None, environ: Mapping[str, str]) -> Settings:
    """Settings from `file` (None: chat-proxy.toml in the current folder, if it is there) and the environment.

    Raises SettingsError with every fault; a file that was named and is missing is one.
    """
    faults: list[Fault] = []
    written = read_file(file, faults)
    advice = "" if file or Path(DEFAULT_FILE).exists() else " (`chat-proxy init` writes one)"
    return Loader(written, file or f"{DEFAULT_FILE}{advice}", environ, faults).settings()


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
    """Reads the tables out of a parsed file and an environment, collecting faults."""

    def __init__(self, written: dict[str, Any], file: str, environ: Mapping[str, str], faults: list[Fault]) -> None:
        self.written = written
        self.file = file
        self.environ = {
            name: value for name, value in environ.items() if name.startswith(PREFIX) and not is_kubernetes(name, value)
        }
        self.credentials = environ.get("CREDENTIALS_DIRECTORY")
        self.is_blind = bool(faults)  # the file could not be read
        self.faults = faults
        self.sources: dict[str, str] = {}  # where each setting that was given came from

    def settings(self) -> Settings:
        self.find_unknown()
        settings = with_public_url(Settings(**{name: self.section(name, table) for name, table in SECTIONS.items()}))
        if not self.is_blind:
            self.faults += contradictions(settings, {fault.setting for fault in self.faults}, self.sources)
        if self.faults:
            raise SettingsError(self.faults)
        return settings

    def section(self, section: str, table: type[Any]) -> Any:
        """The section with what could be read; what could not has its fault, and REQUIRED in its place."""
        values = {}
        for name, spec in SPECS[section].items():
            read = self.secret if "secret" in spec.metadata else self.value
            values[name] = read(section, spec)
        return table(**values)

    def value(self, section: str, spec: dataclasses.Field[Any]) -> Any:
        kind: SettingType = spec.metadata["kind"]
        name, variable = f"{section}.{spec.name}", variable_of(section, spec.name)
        table = self.written.get(section)
        try:
            if variable in self.environ:
                self.sources[name] = f"environment variable {variable}"
                return kind.check(kind.decode(utf8(self.environ[variable])))
            if isinstance(table, dict) and spec.name in table:
                self.sources[name] = self.file
                return kind.check(table[spec.name])
        except InvalidValue as wrong:
            self.faults.append(Fault(name, self.sources[name], str(wrong)))
            return REQUIRED
        if spec.default is REQUIRED and not self.is_blind:
            self.faults.append(Fault(name, "", f"is required; set it in {self.file} or as {variable}"))
        return spec.default

    def secret(self, section: str, spec: dataclasses.Field[Any]) -> Any:
        check: Callable[[str], str] = spec.metadata["secret"]
        name, variable = f"{section}.{spec.name}", variable_of(section, spec.name)
        try:
            found = self.find_secret(section, spec.name, variable)
            if found is not None:
                return Secret(check(utf8(found.value)), found.path, check)
        except OSError as error:  # its filename may be a key, put into ..._FILE by mistake
            self.faults.append(Fault(name, self.sources[name], f"cannot be read: {error.strerror}"))
        except UnicodeDecodeError:
            self.faults.append(Fault(name, self.sources[name], "is not UTF-8 text"))
        except InvalidValue as wrong:
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
        settings = [f"{section}.{name}" for section, specs in SPECS.items() for name in specs]
        for section, table in self.written.items():
            if section not in SPECS:
                self.unknown(section, self.file, [*SPECS, *settings], "section")
            elif not isinstance(table, dict):
                self.faults.append(Fault(section, self.file, f"is a section: its settings stand under [{section}]"))
            else:
                self.find_unknown_in(section, table, settings)
        variables = list(known_variables())
        for variable in sorted(self.environ.keys() - set(variables)):
            self.unknown(variable, "environment", variables, "variable")

    def find_unknown_in(self, section: str, table: dict[str, Any], settings: list[str]) -> None:
        for name in table:
            if name not in SPECS[section]:
                self.unknown(f"{section}.{name}", self.file, settings, "setting")
            elif "secret" in SPECS[section][name].metadata:
                variable = variable_of(section, name)
                message = f"a secret does not belong in this file; set {variable} or {variable}_FILE"
                self.faults.append(Fault(f"{section}.{name}", self.file, message))

    def unknown(self, name: str, source: str, known: Iterable[str], what: str) -> None:
        folded = {candidate.casefold(): candidate for candidate in known}
        near = difflib.get_close_matches(name.casefold(), folded, n=1)
        near = near or [candidate for candidate in folded if candidate.endswith(f".{name.casefold()}")]
        hint = f"; did you mean {folded[near[0]]}?" if near else ""
        self.faults.append(Fault(name, source, f"there is no such {what}{hint}"))


def variable_of(section: str, name: str) -> str:
    return f"{PREFIX}{section}_{name}".upper()


def known_variables() -> Iterator[str]:
    for section, specs in SPECS.items():
        for name, spec in specs.items():
            yield variable_of(section, name)
            if "secret" in spec.metadata:
                yield f"{variable_of(section, name)}_FILE"


def is_kubernetes(name: str, value: str) -> bool:
    """Whether Kubernetes injected the variable, for a Service whose name begins with chat-proxy."""
    addressed = value.startswith(("tcp://", "udp://", "sctp://"))
    return bool(KUBERNETES.match(name)) or (name.endswith("_PORT") and addressed)


def utf8(raw: str) -> str:
    """The text of an environment variable; bytes that are not UTF-8 come as lone surrogates, which nothing can send."""
    try:
        raw.encode()
    except UnicodeEncodeError:
        raise InvalidValue("is not UTF-8 text") from None
    return raw


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
