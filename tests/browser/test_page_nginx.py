"""The page as the shipped nginx site serves it from disk, with nothing but `/api/` passed on to the server."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from support.browser import PageVisit, chromium_at
from support.harness import GOOD, ScriptedUpstream, eventually, running, streaming
from support.nginx import HOST, Site, front, shipped

from proxy.web.static_files import PAGE_POLICY

pytestmark = [pytest.mark.browser, pytest.mark.nginx, pytest.mark.node]

STATIC = Path(__file__).resolve().parents[2] / "static"


def test_the_page_from_disk(browser: Browser, tmp_path: Path) -> None:
    """It chats, with a session; only /api/ reaches the server; and no script but its own runs, by the policy that the
    page brings itself: nginx's is taken out."""
    (policy,) = re.findall(r"add_header Content-Security-Policy .*;", shipped()["chat-proxy/page-on-disk.conf"])
    page = Path(shutil.copytree(STATIC, tmp_path / "page"))
    url = f"https://{HOST}"
    settings = {"SERVER_PUBLIC_URL": url, "SESSION_SECRET": secrets.token_hex(20), "SERVER_STATIC_DIR": ""}
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        running(upstream.base_url, **settings) as proxy,
        front(tmp_path / "nginx", Site([f"127.0.0.1:{proxy.port}"], page=page, changes={policy: ""})) as site,
        chromium_at(browser, HOST, site.port) as context,
        PageVisit.of(context, url) as visit,
    ):
        visit.ask("hello", "m")
        visit.expect_state("complete")
        expect(visit.text).to_have_text("Hello")
        assert [cookie["httpOnly"] for cookie in context.cookies()] == [True]
        error = "() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } }"
        assert visit.page.evaluate(error) == "TypeError"
        eventually(
            lambda: visit.page.evaluate("() => true") and len(visit.faults) == 2
        )  # the browser's, and PageVisit's
        visit.forgive("CSP: require-trusted-types-for refused trusted-types-sink")
        visit.forgive("requires 'TrustedHTML' assignment")
        eventually(lambda: {line["route"].split()[1] for line in proxy.lines()} == {"/api/session", "/api/chat"})
        assert "/page/page.js" in {json.loads(line)["path"] for line in site.logged()}


def test_the_page_has_the_policy_that_the_server_sends() -> None:
    """But for what only a header can say."""
    page = (STATIC / "index.html").read_text()
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert found is not None
    assert found[1] == PAGE_POLICY.replace("frame-ancestors 'none'; ", "")
