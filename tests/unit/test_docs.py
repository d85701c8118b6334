"""The documents: their tables match the code, their links lead to files, each command in them is run by a test or can
be parsed, and the README stays short."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import errors, settings
from proxy.cli import options as cli
from proxy.cli.serve import listener_for
from proxy.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy" / "README.md"]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}
LONGEST_README = 150  # lines
NEEDED = {"UPSTREAM_BASE_URL": "https://api.example.com", "UPSTREAM_API_KEY": "k" * 20, "POLICY_MODELS": "m"}
TESTED = {  # each block of shell commands, by its document and its first words, and the test that runs it
    ("README.md", "python3 -m venv"): "tests/server/test_documented.py::test_the_demo_starts_from_nothing",
    ("README.md", "sh tests/run"): "tests/run",  # the command that runs this test
    ("README.md", "chat-proxy init"): "tests/server/test_documented.py::test_a_server_is_set_up",
    (
        "CONTRIBUTING.md",
        "python3 -m venv",
    ): "tests/unit/test_docs.py::test_contributing_shows_what_is_tested",
    ("docs/clients.md", "curl -N"): "tests/server/test_documented.py::test_curl_is_a_client",
    ("docs/clients.md", "chat-proxy upstream"): "tests/browser/test_examples.py::test_a_page_is_built_without_a_key",
    # needs systemd as process 1: the test does the same with the processes themselves
    ("deploy/README.md", "for i in"): "tests/deploy/test_rolling.py::test_rolling_restarts",
}
IN_WORDS = ("required", "made in memory", "the packaged page", "chat-proxy.revoked.json")  # no values


def loaded(given: dict[str, str]) -> settings.Settings:
    return settings.from_variables({f"{settings.PREFIX}{name}": value for name, value in {**NEEDED, **given}.items()})


def defaults() -> dict[tuple[str, str], str]:
    """The default of each setting, as the table writes it."""
    table = SETTINGS.partition("\n## Settings\n")[2].partition("\n## ")[0].partition("|---|")[2]
    found, section = {}, ""
    for named, names, default in re.findall(r"(?m)^\| (\w*) ?\| ([a-z0-9_, ]+) \| (.+?) \| ", table):
        section = named or section
        each = names.split(", ")
        alone = len(each) == 1 or default.startswith(IN_WORDS)
        values = [default] * len(each) if alone else default.split(", ")
        found.update({(section, name): value for name, value in zip(each, values, strict=True)})
    return found


def test_every_setting_is_documented() -> None:
    """The table holds every setting there is, and no other."""
    plain = loaded({})
    there = {
        (section.name, setting.name)
        for section in dataclasses.fields(plain)
        for setting in dataclasses.fields(getattr(plain, section.name))
    }
    assert defaults().keys() == there


def test_every_default_is_documented() -> None:
    """Setting every setting to the default in the table changes nothing."""
    given = {
        f"{section}_{name}".upper(): default.removesuffix(" (off)").replace("{port}", "8000")
        for (section, name), default in defaults().items()
        if not default.startswith(IN_WORDS)
    }
    assert loaded({name: "" if value in ("-", "[]") else value for name, value in given.items()}) == loaded({})


def test_every_command_is_documented() -> None:
    """The table of commands, and what --help lists, are the same."""
    table = SETTINGS.partition("\n## Commands\n")[2].partition("\n## ")[0]
    told = {
        word
        for cell in re.findall(r"(?m)^\| (`.*?`.*?) \| ", table)
        for word in re.findall(r"`(?:chat-proxy )?([a-z-]+)", cell)
    }
    listed = re.findall(r"(?m)^    ([a-z-]+)", cli.parser().format_help())
    assert told == set(listed)


def test_contributing_shows_what_is_tested() -> None:
    """What CONTRIBUTING.md installs and checks is what tests/run does, and each file that it names is there."""
    guide, run = ((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "tests/run"))
    block = re.sub(r" +#.*", "", guide.partition("```sh\n")[2].partition("```")[0])
    done = [set(line.split()) for line in run.splitlines() if not line.startswith("#")]
    others = []
    for command in re.split(r" && |\n", block.strip()):
        words = set(command.replace("/pip ", "/python -m pip ").split())
        if not any(words <= line for line in done):
            others.append(command)
    assert others == [".venv/bin/python -m pytest tests/unit/test_chat_policy.py", "sh tests/run fast", "sh tests/run"]
    for path in re.findall(r"(?:proxy|static|tests)/[\w/.]*\w", guide):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short() -> None:
    """The README fits on a few screens; reference belongs into docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Each relative link of a document leads to a file or folder of the repository."""
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), target


def test_the_architecture_names_what_exists() -> None:
    """Each name in the table of rules is defined in the file beside it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| .+\? \| (.+) \|$", text)
    assert len(rows) > 20
    for row in rows:
        for names, path in re.findall(r"((?:`[\w.]+`(?:, )?)*)\[(?:proxy/)?[\w./]+\]\(\.\./([\w./]+)\)", row):
            source = (ROOT / path).read_text(encoding="utf-8")
            for name in re.findall(r"`([\w.]+)`", names):
                last = name.rpartition(".")[2]
                assert re.search(rf"(?m)^ *(?:async )?(?:def|class) {last}\b|^{last}\b|^  {last}\(.*{{$", source), (
                    name,
                    path,
                )


# ---- commands and code in the documents ------------------------------------------------------------------------------


def blocks(document: str, *kinds: str) -> list[str]:
    return [code for kind, code in re.findall(r"(?ms)^```(\w+)\n(.*?)^```", TEXTS[document]) if kind in kinds]


def test_each_block_of_commands_is_run_by_a_test() -> None:
    """Every block of shell commands in a document has its test, and that test exists."""
    listed = {(document, " ".join(block.split()[:3])) for document in TEXTS for block in blocks(document, "sh")}
    assert len(listed) == len(TESTED)
    for document, words in listed:
        assert [key for key in TESTED if key[0] == document and words.startswith(key[1])], (document, words)
    for test in TESTED.values():
        path, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test


def commands(text: str) -> set[str]:
    """The uses of `chat-proxy` in inline code and in blocks, without what only a table of options can have."""
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"(?ms)^```(?:sh|console)\n(.*?)^```", text)
    found = set()
    for line in "\n".join(code).splitlines():
        for use in re.findall(r"(?:^|[ /])(?:chat-proxy|-m proxy) ([a-z][^#;&|)>]*)", line):
            if "[" not in use and "\\" not in use:
                found.add(use.strip())
    return found


@pytest.mark.parametrize("document", TEXTS)
def test_each_command_can_be_parsed(document: str) -> None:
    """Each `chat-proxy ...` of a document is a command line that the program accepts."""
    for command in commands(TEXTS[document]):
        arguments = shlex.split(command)
        if arguments[-1] == "--url":
            arguments.append("https://chat.example.org")
        cli.parser().parse_args(arguments)


def test_commands_are_found() -> None:
    """The pattern of the test above finds the commands in prose, in blocks, and with a path in front."""
    assert {"check", "serve", "init"} <= commands(TEXTS["README.md"])
    assert "check --config /etc/chat-proxy/chat-proxy.toml" in commands(TEXTS["deploy/README.md"])
    assert "sessions revoke --user alice" in commands(TEXTS["docs/settings.md"])


def test_the_code_in_the_readme_is_tested() -> None:
    """Each piece of JavaScript in the README stands in docs/clients.md as well, where tests take it from."""
    shown = blocks("README.md", "js", "jsx", "diff")
    assert len(shown) == 3
    for block in shown:
        assert block in blocks("docs/clients.md", "js", "jsx", "diff"), block


def test_the_settings_of_the_readme_are_complete(tmp_path: Path) -> None:
    """The short configuration, with the two secrets, is valid."""
    (tmp_path / "chat-proxy.toml").write_text(*blocks("README.md", "toml"))
    secrets = {"UPSTREAM_API_KEY": "k" * 20, "SESSION_SECRET": "s" * 40}
    given = {f"{settings.PREFIX}{name}": value for name, value in secrets.items()}
    assert settings.load(str(tmp_path / "chat-proxy.toml"), given).server.public_url == "https://chat.example.org"


@pytest.mark.parametrize("document", TEXTS)
def test_each_setting_that_is_named_exists(document: str) -> None:
    """Each `section.name` in a document is a setting."""
    sections = "|".join(section for section, _ in defaults())
    for section, name in re.findall(rf"`(?:[^`\n]*[^`\n\w./-])?({sections})\.([a-z_]+)\b(?![./])", TEXTS[document]):
        assert (section, name) in defaults(), (section, name)


# ---- the HTTP API ----------------------------------------------------------------------------------------------------


def kinds_of(root: type[errors.Refusal | errors.Interruption]) -> set[type[errors.Refusal | errors.Interruption]]:
    return {root, *(kind for child in root.__subclasses__() for kind in kinds_of(child))}


REFUSALS = {
    (str(kind.status), str(kind.code)) for kind in kinds_of(errors.Refusal) if issubclass(kind, errors.Refusal)
} - {("503", "internal_error")}  # Unavailable is never raised itself


def test_every_error_is_documented() -> None:
    """The table of errors holds every status with its code, and no other."""
    table = TEXTS["docs/http-api.md"].partition("\n## Errors\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"(?m)^\| (\d+) \| `(\w+)` \|", table)) == REFUSALS


def test_every_end_of_a_stream_is_documented() -> None:
    """The table of a stream's last event holds every code, and no other."""
    table = TEXTS["docs/http-api.md"].partition("\n## How a stream ends\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", table)) == {kind.code for kind in kinds_of(errors.Interruption)}


def test_every_metric_is_documented() -> None:
    """The table of metrics holds every metric with its labels, and no other."""
    table = TEXTS["docs/http-api.md"].partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| `(\w+)(?:\{([\w,]+)\})?` \|", table)
    shown = {name: set(filter(None, labels.split(","))) for name, labels in rows}
    metrics = Metrics(("m",))
    families = {family.name: family for family in metrics.registry.collect()}
    assert shown.keys() == {f"{name}_total" if f.type == "counter" else name for name, f in families.items()}
    for counter in (metrics.requests, metrics.endings, metrics.tokens, metrics.upstream_errors, metrics.refusals):
        assert shown[f"{counter._name}_total"] == set(counter._labelnames)


# ---- troubleshooting -------------------------------------------------------------------------------------------------


def strings_of(path: Path) -> list[str]:
    """The string constants of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_symptoms_are_the_servers_own_texts() -> None:
    """Each status, code, quoted text and log event in the table of symptoms is one that the server has."""
    rows = re.findall(r"(?m)^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TEXTS["docs/troubleshooting.md"])[1:]
    assert len(rows) >= 10
    texts = {text for path in (ROOT / "proxy").rglob("*.py") for text in strings_of(path)}
    codes = {kind.code for kind in kinds_of(errors.Interruption)}
    for symptom, _, _ in rows:
        for status, code in re.findall(r"(\d{3}) `(\w+)`", symptom):
            assert (status, code) in REFUSALS
        for name in re.findall(r"(?<!\d{3} )`(\w+)`", symptom):
            assert name in texts | codes, name
        for quoted in re.findall(r'"([^"]+)"', symptom):
            assert quoted in texts or quoted == port_in_use(), quoted


def port_in_use() -> str:
    """The fault of a port that is in use, as of port 8000."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(settings.SettingsError) as caught:
            listener_for(settings.Server(port=port))
    return caught.value.faults[0].message.replace(str(port), "8000")


# ---- files for contributors ------------------------------------------------------------------------------------------

SCHEMAS = {
    "workflows/tests.yml": "vendor.github-workflows",
    "ISSUE_TEMPLATE/bug.yml": "vendor.github-issue-forms",
    "ISSUE_TEMPLATE/feature.yml": "vendor.github-issue-forms",
    "ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
}


@pytest.mark.tools
@pytest.mark.parametrize("file", SCHEMAS)
def test_github_accepts_its_files(file: str) -> None:
    """Each file is valid by its schema, and the list is complete."""
    assert set(SCHEMAS) == {str(path.relative_to(ROOT / ".github")) for path in ROOT.glob(".github/**/*.yml")}
    tool = Path(sys.executable).with_name("check-jsonschema")
    command = [str(tool), "--builtin-schema", SCHEMAS[file], str(ROOT / ".github" / file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_workflow_runs_the_test_command() -> None:
    """A push is tested by the command that a contributor runs."""
    assert "run: sh tests/run\n" in (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")


def test_the_hooks_are_local_and_those_of_the_guide() -> None:
    """pre-commit runs the checks of CONTRIBUTING.md from the environment, and fetches nothing."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    assert " && ".join(re.findall(r"entry: (.*)", hooks)) in TEXTS["CONTRIBUTING.md"].splitlines()
