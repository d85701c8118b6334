"""The prepared answers of the demo model, and the table that picks one of them.

Rules:
1. Pure and deterministic: the same prompt always gets the same answer.
2. The texts are files in texts/, one line a paragraph, since many pages turn a newline into a line break.
3. `{quote}` in a text becomes the beginning of the prompt; nothing else is filled in.
4. `ROUTES` is tried from the top, the first match wins, and the text `about` answers everything else.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

MAX_QUOTE_CHARS = 60  # enough to recognise a prompt; a whole pasted page would hide the answer
TEXTS = Path(__file__).parent / "texts"


def text(name: str) -> str:
    return (TEXTS / f"{name}.md").read_text(encoding="utf-8")


def essay() -> str:
    """The long answer, several thousand words; its sections alternate through the reflections and the asides."""
    parts: dict[str, Any] = json.loads((TEXTS / "essay.json").read_text(encoding="utf-8"))
    written = [parts["opening"]]
    turns = zip(parts["sections"], cycle(parts["reflections"]), cycle(parts["asides"]), strict=False)
    for section, *templates in turns:
        paragraphs = [template.replace("{subject}", section["subject"]) for template in templates]
        written.append("\n\n".join((f"## {section['title']}", section["facts"], *paragraphs)) + "\n")
    return "\n".join((*written, parts["closing"]))


ABOUT = text("about")
STAGED = text("staged")


@dataclass(frozen=True, slots=True)
class Route:
    """A prompt that `asks` finds something in is answered with `text`."""

    asks: re.Pattern[str]
    text: str


def _route(pattern: str, text: str) -> Route:
    return Route(re.compile(pattern, re.IGNORECASE), text)


ROUTES = (
    _route("[\u1200-\u139f\u2d80-\u2ddf\uab00-\uab2f]|amharic|ethiopic", text("amharic")),
    _route("[\u0600-\u06ff\u0750-\u077f]|\\b(arabic|rtl|right.to.left)\\b", text("arabic")),
    _route("[\u0590-\u05ff]|\\bhebrew\\b", text("hebrew")),
    _route(r"(?<!how )\blong(er)?\b|\bessays?\b", essay()),
    _route(r"\b(markdown|formatting|everything)\b", text("markdown")),
    _route(r"\bstream(s|ed|ing)?\b|\bsse\b", text("streaming")),
    _route(r"\b(api.?key|chat-proxy|proxy|config\w*|settings?|base_url|real model|selam.?gpt)\b", text("about")),
    _route(r"\b(code|coding|python|javascript|typescript|react|function|program|script)\b", text("code")),
    _route(r"\b(table|compare|comparison|versus|vs|difference)\b", text("table")),
    _route(r"\b(story|tale)\b", text("story")),
    _route(r"\b(jokes?|funny|emojis?|laugh)\b", text("joke")),
    _route(r"\b(machine learning|deep learning|neural|language models?|ai)\b", text("learning")),
    _route(r"\b(lists?|steps?|plan|recipe|checklist|to.?do|how (do|can|to))\b", text("list")),
    _route(r"^\W*(thanks|thank you|thx)\b", text("thanks")),
    _route(r"^\W*(hi|hello|hey|selam|good (morning|day|afternoon|evening))\b.{0,40}$", text("hello")),
)


def choose(prompt: str) -> str:
    """The answer to `prompt`, in Markdown, without a final newline."""
    answer = next((route.text for route in ROUTES if route.asks.search(prompt)), ABOUT)
    return answer.replace("{quote}", quote(prompt)).rstrip("\n")


def quote(prompt: str) -> str:
    """The beginning of `prompt` on one line; a code span if Markdown would act upon any of it."""
    words = " ".join(prompt.split())
    if not words:
        return '"..."'
    if len(words) > MAX_QUOTE_CHARS:
        words = words[:MAX_QUOTE_CHARS].rstrip() + "..."
    if re.search(r"[`*_<>\[\]|\\~#&$:/]", words):
        return "`" + words.replace("`", "'") + "`"
    return f'"{words}"'
