"""The documents: their tables match the code, their links lead to files, and the README stays short."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from proxy import settings
from proxy.cli import options as cli

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy" / "README.md"]
LONGEST_README = 150  # lines
NEEDED = {"UPSTREAM_BASE_URL": "https://api.example.com", "UPSTREAM_API_KEY": "k" * 20, "POLICY_MODELS": "m"}
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


def test_contributing_shows_what_the_test_command_does() -> None:
    """What CONTRIBUTING.md installs and checks is what tests/run does, and each file that it names is there."""
    guide, run = ((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "tests/run"))
    block = re.sub(r" +#.*", "", guide.partition("```sh\n")[2].partition("```")[0])
    done = [set(line.split()) for line in run.splitlines()]
    others = []
    for command in re.split(r" && |\n", block.strip()):
        words = set(command.replace("/pip ", "/python -m pip ").split())
        if not any(words <= line for line in done):
            others.append(command)
    assert others == [".venv/bin/python -m pytest tests/unit/test_chat_policy.py", "sh tests/run"]
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
                assert re.search(rf"(?m)^ *(?:async )?(?:def|class) {last}\b|^{last}\b", source), (name, path)
