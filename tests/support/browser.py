"""A real browser for the tests of the page: Debian's Chromium, and what a reader does and finds in it.

No test may see a console error, a violation of the content security policy, or a request to another origin: `PageVisit`
collects them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, expect, sync_playwright

from support.npm import installed

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 20.0
"""Seconds that anything here may take before it counts as hung."""

REPORT_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) =>
  console.error(`CSP: ${event.effectiveDirective} refused ${event.blockedURI}`));
"""


AXE = Path(__file__).parents[1] / "browser" / "axe"


@cache
def axe() -> str:
    """The source of axe-core, which knows the rules of accessibility."""
    return (installed("axe", AXE.iterdir()) / "node_modules/axe-core/axe.min.js").read_text()


@dataclass
class PageVisit:
    """A page that is watched, and what a reader finds on it."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)
    staged: set[int] = field(default_factory=set)
    """Statuses that this test provokes: the browser itself reports them on the console."""

    @classmethod
    @contextmanager
    def of(cls, context: BrowserContext, url: str, *, until: str = "#account") -> Iterator[PageVisit]:
        """A page of the context, watched, and open `until` that is on it; at the end it must have seen no fault."""
        visit = cls(context.new_page(), url)
        visit.watch()
        visit.open(until)
        yield visit
        if not visit.page.is_closed():
            visit.page.unroute_all(behavior="ignoreErrors")
        assert not visit.faults, visit.faults

    def watch(self) -> None:
        self.page.add_init_script(REPORT_VIOLATIONS)
        self.page.on("console", lambda said: self.heard(said.type, said.text))
        self.page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        self.page.on("request", self.sent)

    def heard(self, kind: str, text: str) -> None:
        report = re.match(r"Failed to load resource: the server responded with a status of (\d+)", text)
        if report and int(report[1]) in self.staged:
            return
        if kind in ("error", "warning"):
            self.faults.append(f"console: {text}")

    def sent(self, request: Request) -> None:
        if not request.url.startswith(f"{self.url}/"):
            self.faults.append(f"request: {request.url}")

    def forgive(self, part: str) -> None:
        """What a test has provoked is no fault."""
        self.faults = [fault for fault in self.faults if part not in fault]

    def open(self, until: str = "#account") -> None:
        self.page.goto(self.url)
        expect(self.page.locator(until)).to_be_visible()

    def ask(self, question: str, model: str = "demo") -> None:
        """By keyboard, as most people do."""
        self.page.get_by_label("Model").select_option(model)
        self.message.fill(question)
        self.message.press("Enter")

    @property
    def message(self) -> Locator:
        return self.page.get_by_label("Your message")

    @property
    def answer(self) -> Locator:
        """The last one."""
        return self.page.locator(".answer").last

    @property
    def text(self) -> Locator:
        return self.answer.locator(".md")

    @property
    def alert(self) -> Locator:
        return self.page.get_by_role("alert")

    def expect_state(self, state: str) -> None:
        expect(self.answer).to_have_attribute("data-state", state, timeout=PATIENCE * 1000)

    def assert_accessible(self) -> None:
        """No rule of axe-core is broken by what is shown now, in light and in dark."""
        if not self.page.evaluate("() => 'axe' in window"):
            self.page.evaluate(axe())
        # The bar and the dock fade out in pseudo elements; axe would leave the contrast of all they hold undecided.
        checks = {"checks": {"color-contrast": {"options": {"ignorePseudo": True}}}}
        for scheme, rules in {"light": checks, "dark": {"runOnly": ["color-contrast"], **checks}}.items():
            self.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            found = self.page.evaluate("async (rules) => (await axe.run(rules)).violations", rules)
            broken = [f"{each['help']}: {node['html'][:200]}" for each in found for node in each["nodes"]]
            assert not broken, f"{scheme}: " + "\n".join(broken)

    def stream(self, *contents: str) -> None:
        """From now on the server's answer is this one, with a clean end."""
        chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in contents]
        events = [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]
        body = "".join(f"data: {event}\n\n" for event in events)
        self.page.route("**/api/chat", lambda route: route.fulfill(content_type="text/event-stream", body=body))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that was never here: no cookie, so the server gives it a session of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    yield context
    context.close()


@contextmanager
def chromium_at(browser: Browser, host: str, port: int) -> Iterator[BrowserContext]:
    """Another browser like this one, for which https://`host` is at this port of this machine."""
    chromium = browser.browser_type.launch(
        executable_path=CHROMIUM, args=[*CHROMIUM_ARGS, f"--host-resolver-rules=MAP {host}:443 127.0.0.1:{port}"]
    )
    try:
        yield chromium.new_context(ignore_https_errors=True)  # it does not know the test's authority
    finally:
        chromium.close()
