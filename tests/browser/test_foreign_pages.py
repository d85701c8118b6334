"""Foreign pages in a real browser: whatever they try on a visitor who has a session here, it comes to nothing.

Another port of the same host is the hard case: the browser calls it the same site, and sends the Strict cookie along.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from support.harness import GOOD, Running, ScriptedUpstream, eventually, running, streaming

pytestmark = [pytest.mark.browser]

# Every way in which a page can make a browser send something, each with every kind of body it can give it.
ATTACK = """
async (target) => {
  const body = JSON.stringify({ messages: [{ role: "user", content: "hi" }], stream: false });
  const readable = [];
  const kinds = ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"];
  const paths = ["/api/chat", "/api/v1/chat/completions", "/api/session"];
  const attempt = async (path, options) => {
    try {
      const response = await fetch(target + path, { credentials: "include", ...options });
      if (response.type !== "opaque") readable.push(`${options.method} ${path} ${response.status}`);
    } catch { /* refused by the browser, as it should be */ }
  };
  for (const path of paths) {
    for (const mode of ["cors", "no-cors", "same-origin"]) {
      for (const kind of kinds) await attempt(path, { method: "POST", mode, body, headers: { "content-type": kind } });
      for (const method of ["GET", "DELETE"]) await attempt(path, { method, mode });
    }
    for (const kind of kinds) navigator.sendBeacon(target + path, new Blob([body], { type: kind }));
    for (const enctype of kinds.slice(1)) {
      const frame = document.createElement("iframe");
      frame.name = `f${Math.random()}`;
      const form = document.createElement("form");
      Object.assign(form, { method: "POST", action: target + path, enctype, target: frame.name });
      const input = document.createElement("input");
      Object.assign(input, { name: '{"messages":[{"role":"user","content":"', value: '"}]}' });
      form.append(input);
      document.body.append(frame, form);
      const loaded = new Promise((done) => (frame.onload = done));
      form.submit();
      await Promise.race([loaded, new Promise((done) => setTimeout(done, 300))]);
    }
    for (const tag of ["img", "script", "iframe", "link"]) {
      const element = document.createElement(tag);
      element.rel = "stylesheet";
      element[tag === "link" ? "href" : "src"] = target + path;
      document.body.append(element);
    }
  }
  await new Promise((done) => setTimeout(done, 300));
  return readable;
}
"""


class Foreign(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<!doctype html><title>foreign</title><body></body>"
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def foreign_port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Foreign)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@contextmanager
def visitor(browser: Browser) -> Iterator[tuple[Page, Running, ScriptedUpstream]]:
    """A user with a session here, on another site in the same browser."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url) as proxy:
        context = browser.new_context()
        page = context.new_page()
        page.goto(proxy.url)
        eventually(lambda: context.cookies())
        yield page, proxy, upstream
        context.close()


def minted(proxy: Running) -> int:
    """Entries of the limit on new sessions."""
    entries = proxy.service.app.limits.requests.windows.entries
    return sum(len(times) for key, (_, times) in entries.items() if "new_sessions" in key)


def assert_nothing_came_of_it(page: Page, proxy: Running, upstream: ScriptedUpstream, readable: list[str]) -> None:
    assert readable == []
    assert upstream.connections == 0
    assert minted(proxy) == 1  # on our own page, before
    attempts = [line for line in proxy.lines() if line["route"] and not line["route"].startswith("GET /api/session")]
    assert len(attempts) > 10
    assert {line["status"] for line in attempts} <= {403, 405}
    page.goto(proxy.url)
    assert page.evaluate("document.cookie") == ""
    ask = """async () => (await fetch("/api/chat", {
        method: "POST", headers: {"content-type": "application/json"},
        body: JSON.stringify({messages: [{role: "user", content: "hi"}], stream: true})})).status"""
    assert page.evaluate(ask) == 200  # the visitor is still who they were, with all that was allowed
    assert minted(proxy) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "foreign.localhost"])
def test_a_page_of_another_origin(browser: Browser, foreign_port: int, host: str) -> None:
    with visitor(browser) as (page, proxy, upstream):
        page.goto(f"http://{host}:{foreign_port}/")
        readable = page.evaluate(ATTACK, proxy.url)
        assert_nothing_came_of_it(page, proxy, upstream, readable)


def test_a_page_without_an_origin(browser: Browser, foreign_port: int) -> None:
    """A sandboxed frame: its Origin is `null`."""
    with visitor(browser) as (page, proxy, upstream):
        page.goto(f"http://127.0.0.1:{foreign_port}/")
        page.evaluate(
            """() => new Promise((done) => {
                const frame = document.createElement("iframe");
                frame.sandbox = "allow-scripts allow-forms";
                frame.srcdoc = "<!doctype html><body></body>";
                frame.onload = done;
                document.body.append(frame);
            })"""
        )
        readable = page.frames[-1].evaluate(ATTACK, proxy.url)
        assert_nothing_came_of_it(page, proxy, upstream, readable)


@pytest.mark.parametrize("path", ["/api/session", "/api/v1/models", "/api/chat"])
def test_a_link_from_elsewhere_mints_nothing(browser: Browser, foreign_port: int, path: str) -> None:
    """A visitor without a session that a foreign page sends to the API leaves no trace in the limits."""
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url) as proxy:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{foreign_port}/")
        page.evaluate("(url) => { location.href = url }", proxy.url + path)
        page.wait_for_url(proxy.url + path)
        proxy.line()
        assert minted(proxy) == 0
        assert context.cookies() == []
        context.close()
