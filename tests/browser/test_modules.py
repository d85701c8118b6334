"""The modules for the browser, seen from outside: their types, what they weigh, and that nothing has to be built.

What they do is in tests/page/*.test.js, in plain node; what they do in a browser, in test_page.py and test_examples.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.npm import installed

pytestmark = [pytest.mark.node, pytest.mark.tools]

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "static"
LOCKED = [ROOT / "tests/browser/examples" / name for name in ("package.json", "package-lock.json")]
PUBLIC = sorted(file.name.removesuffix(".d.ts") for file in (STATIC / "chat").glob("*.d.ts"))
LONGEST = 60.0  # seconds for one tool; they take one or two
MOST_BYTES = 6 * 1024
"""The parser and the client together, minified: less than many an icon."""

STRICT = ["--noEmit", "--strict", "--allowJs", "--checkJs", "--target", "es2024", "--module", "esnext"]
STRICT += ["--moduleResolution", "bundler", "--lib", "es2024,dom,dom.iterable,dom.asynciterable"]

SAME = """
import * as told from "./chat/{name}.js";
import * as made from "./chat/{name}.made.js";
export const all: typeof told = made;
export const only = (name: keyof typeof made): keyof typeof told => name;
"""
"""`told` is the declaration, which goes before the module of its name; `made` is the module under another name."""

USE = """
import { ChatError, streamChat } from "./chat/client.js";
import { batched, textOf } from "./chat/deltas.js";
import { useChatStream } from "./chat/react.js";
import type { ChatCompletionMessageParam } from "openai/resources";
import type { ReactNode } from "react";

interface Mine { role: "user" | "assistant"; content: string }
export const accepted = (mine: readonly Mine[], theirs: ChatCompletionMessageParam[], loose: { role: string }[]) =>
  [mine, theirs, loose, useChatStream().messages].map((messages) => streamChat({ messages }));

export async function use(signal: AbortSignal): Promise<string> {
  let text = "";
  const answer = streamChat({ messages: [{ role: "user", content: "hi" }], signal });
  try {
    for await (const deltas of batched(answer, 50)) {
      for (const delta of deltas) {
        if (delta.type === "text") text += delta.text;
        // @ts-expect-error  it is no text here
        else if (delta.type === "finish") text += delta.text;
        else if (delta.type === "usage") text += String(delta.usage.total_tokens ?? 0);
      }
    }
    for await (const piece of textOf(answer)) text += piece;
  } catch (error) {
    if (error instanceof ChatError && error.ending === "truncated") return error.partial;
  }
  const words: ReactNode = useChatStream().messages.map((message) => message.text);
  // @ts-expect-error  a list of parts is nothing to show
  const parts: ReactNode = useChatStream().messages[0].content;
  // @ts-expect-error  no such status
  if (useChatStream({ model: "m" }).status === "done") text += "?";
  // @ts-expect-error  the messages are the conversation's
  useChatStream({ messages: [] });
  return text + String(words ?? parts) + String(answer.metrics.ttft_ms);
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules, with the tools beside them."""
    folder = tmp_path_factory.mktemp("modules")
    shutil.copytree(STATIC, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("examples"))
    (folder / "node_modules").symlink_to(installed("examples", LOCKED) / "node_modules")
    return folder


def readme() -> str:
    """What it shows of the modules, with what it leaves to its reader."""
    text = (ROOT / "docs/clients.md").read_text()
    module, hook = re.findall(r"```jsx?\n(import .*?/chat/.*?)```", text, re.DOTALL)
    imported, _, used = hook.partition("\n\n")
    theirs = """declare function show(text: string): void;
        type Facts = { ending: string; partial: string; retryAfter: number | null };
        declare function showProblem(message: string, facts: Facts): void;"""
    return f"{imported}\n{theirs}\n{module}\n{{{used}}}".replace('"/chat/', '"./chat/')


def tool(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = folder / "node_modules/.bin" / command[0]
    return subprocess.run(
        [path, *command[1:]], cwd=folder, capture_output=True, encoding="utf-8", timeout=LONGEST, check=False
    )


def test_types(folder: Path) -> None:
    """TypeScript finds no fault in the modules as they are served, nor in their declarations, nor between the two."""
    assert PUBLIC == ["client", "conversation", "deltas", "react", "sse"]
    for name in PUBLIC:
        shutil.copy(folder / f"chat/{name}.js", folder / f"chat/{name}.made.js")
        (folder / f"{name}.same.ts").write_text(SAME.format(name=name))
    (folder / "use.ts").write_text(USE)
    (folder / "readme.ts").write_text(readme())
    folders = [folder, *(folder / name for name in ("chat", "markdown", "page"))]
    sources = [file for place in folders for end in ("js", "ts") for file in place.glob(f"*.{end}")]
    checked = tool(folder, "tsc", *STRICT, *map(str, sources))
    assert (checked.stdout, checked.returncode) == ("", 0)


def test_every_module_says_that_it_is_checked() -> None:
    """An editor checks them, too."""
    for module in STATIC.glob("**/*.js"):
        if "examples" not in module.parts:
            assert module.read_text().startswith("// @ts-check\n"), module.name


def test_size(folder: Path) -> None:
    """The parser and the client are small, whatever minifies them."""
    bundled = tool(folder, "esbuild", "chat/client.js", "--bundle", "--minify", "--format=esm")
    assert bundled.returncode == 0, bundled.stderr
    assert 3000 < len(bundled.stdout.encode()) < MOST_BYTES


def test_nothing_is_imported_from_elsewhere() -> None:
    """No package and no other origin: every import is a file beside it, but for the hook's React."""
    imported = re.compile(r"""(?:^import\b[^"';]*|\bfrom\s*|\bimport\s*\()["']([^"']+)["']""", re.MULTILINE)
    strangers = {
        (module.name, name)
        for module in STATIC.glob("**/*.js")
        if "examples" not in module.parts
        for name in imported.findall(re.sub(r"/\*\*.*?\*/", "", module.read_text(), flags=re.DOTALL))
        if not (name.startswith(("./", "../")) and (module.parent / name).is_file())
    }
    assert strangers == {("react.js", "react")}
