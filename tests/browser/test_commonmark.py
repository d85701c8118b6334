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
    "raw HTML is shown as text": """
        14 21 31 91 110 148-151 153-156 158-167 169-180 182-191 309 344 475-477 494 524 536 613-615 623
        630-631 642-643
    """,
    "reference links are left out: a definition comes when its links are shown already": """
        23 33 192-198 200-211 214-218 317 526-535 537-547 549-571 573 576-577 582-593
    """,
    "indented code is left out: models indent lines without meaning code": """
        1-3 5-8 18 36 48 69 107 111-112 114 116-118 134 225 231 236 252-254 257 264 270-274 278 286-290 313
    """,
    "underlined headings are left out: models draw a rule below a paragraph": """
        59 80-86 89-90 95-96 100 102-103 115 141 300
    """,
    "links lead to absolute http and https addresses only": """
        22 484-487 489 492-493 495-496 498-504 517 520 522 578-581 596-599 601 604-605
    """,
    "a bare http address is a link, and one in angle brackets ends where it would end without them": """
        20 346 480-481 508 511 513 548 602-603 608 611
    """,
    "of the named character references the usual ones are known": """
        25 32 41
    """,
    "`\\(` begins a formula": """
        12
    """,
    "lists and quotes are read as models write them: nested with little indent, empty items too": """
        238 276 280 285 297 311-312 367
    """,
    "an address within the text of what is no link is a link": """
        518-519 574-575
    """,
    "more than six marks in a row are an ornament": """
        417
    """,
    "a title may not stand in a line of its own; a space that is not ASCII ends an address": """
        507 510
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
