"""The page's Markdown against the cases of the CommonMark specification.

The page reads a dialect: what it leaves out, and why, is written down here case by case.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.npm import installed

pytestmark = pytest.mark.node

FOLDER = Path(__file__).parent / "commonmark"
FILES = [FOLDER / name for name in ("package.json", "package-lock.json", "cases.mjs")]
PARSER = Path(__file__).resolve().parents[2] / "static/markdown/markdown.js"
CASES = 652

DEVIATIONS = {
    "raw HTML is shown as text, and Markdown inside it is read": """
        21 31 148-191 201 308-309 344 475-477 491 494 524 536 613-617 623 625-631 642-643
    """,
    "an indent makes no code: models write fences, and indent by mistake": """
        1-3 5-8 18 36 48 69 85 100 107 110-112 114-118 134 211 225 231 236 252-254 257 264 270-274 278 286-290
    """,
    "--- below a paragraph is a rule: models mean one, and the paragraph would jump to a heading's size": """
        59 80 83-84 86 89-91 95-96 102-103 141 300
    """,
    "lists are read leniently: two columns of indent are enough to belong to an item, four are not too many": """
        238 276 280 297 311-313
    """,
    "a definition is one line: what has arrived at its end decides": """
        193 195-196 198 208 217 541
    """,
    "an empty address leads nowhere, and a link without a text shows its address": """
        200 484-487 567 581
    """,
    "links lead to http and https addresses only": """
        596-599 601 604-605
    """,
    "a backslash in an address is a slash, as in browsers": """
        202 502 603
    """,
    "of HTML's 2,125 named characters the usual ones are known": """
        25
    """,
    "a line of = that goes on with a quotation underlines its paragraph": """
        93
    """,
    "more than six marks in a row are an ornament": """
        417
    """,
    "a no-break space separates an address from its title": """
        507
    """,
    "an image has no image in its text: nesting needs a bound": """
        574
    """,
}
"""The cases that are read differently, by the reason for it."""


def numbers(ranges: str) -> list[int]:
    """1 3-5 means 1, 3, 4 and 5."""
    ends = [part.partition("-") for part in ranges.split()]
    return [number for first, _, last in ends for number in range(int(first), int(last or first) + 1)]


def test_the_cases_are_read_as_specified_but_for_these() -> None:
    """Every case is read as CommonMark specifies or stands in DEVIATIONS; none stands there without need."""
    allowed = [number for ranges in DEVIATIONS.values() for number in numbers(ranges)]
    assert len(allowed) == len(set(allowed))
    command = ["node", str(installed("commonmark", FILES) / "cases.mjs"), PARSER.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert found["cases"] == CASES
    differ = set(found["differ"])
    assert (sorted(differ - set(allowed)), sorted(set(allowed) - differ)) == ([], [])
