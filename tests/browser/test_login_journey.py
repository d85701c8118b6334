"""Signing in with an OpenID provider that others wrote, from our page and back to it, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import BrowserContext, Page, expect
from support.browser import PATIENCE, PageVisit
from support.harness import GOOD, Running, ScriptedUpstream, chat, eventually, free_port, running, send, streaming
from support.oidc_provider import start

pytestmark = [pytest.mark.browser, pytest.mark.node]

SECRET = "a-clients-secret-and-a-long-one"


@contextmanager
def serving(**more: str) -> Iterator[tuple[Running, str]]:
    """The server, and the provider's address."""
    port = free_port()
    with (
        start("chat", SECRET, f"http://127.0.0.1:{port}/api/session/callback") as issuer,
        ScriptedUpstream(streaming(*GOOD)) as upstream,
    ):
        given = {"SESSION_MODE": "oidc", "OIDC_ISSUER": issuer, "OIDC_CLIENT_ID": "chat", "SERVER_PORT": str(port)}
        with running(upstream.base_url, OIDC_CLIENT_SECRET=SECRET, **given, **more) as proxy:
            yield proxy, issuer


def sign_in(page: Page, name: str) -> None:
    page.get_by_role("link", name="Sign in").click()
    sign_in_there(page, name)


def sign_in_there(page: Page, name: str) -> None:
    page.locator("[name=login]").fill(name)
    page.locator("[name=password]").fill("any")
    page.get_by_role("button", name="Sign-in").click()
    page.get_by_role("button", name="Continue").click()


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Running, str]]:
    with serving(OIDC_ALLOWED_DOMAINS="example.org") as world:
        yield world


def test_from_the_page_and_back_to_it(context: BrowserContext, world: tuple[Running, str]) -> None:
    proxy, _ = world
    page = context.new_page()
    visit = PageVisit(page, proxy.url)
    page.goto(f"{proxy.url}/?room=1#top")
    sign_in(page, "ann")
    page.wait_for_url(f"{proxy.url}/?room=1#top", timeout=PATIENCE * 1000)
    expect(page.locator("#account")).to_contain_text("ann@example.org")
    (cookie,) = [cookie for cookie in context.cookies(proxy.url) if cookie["name"].startswith("chat")]
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == ("chat", True, "Strict")
    assert page.evaluate("document.cookie") == ""
    visit.message.fill("Hello")
    visit.message.press("Enter")
    visit.expect_state("complete")
    line = eventually(lambda: proxy.lines("login"))[-1]
    assert (line["user"], line["mode"]) == ("ann@example.org", "oidc")
    assert SECRET.encode() not in proxy.output.getvalue()
    assert b"code=" not in proxy.output.getvalue()


def test_signing_in_again_ends_the_session_before(context: BrowserContext, world: tuple[Running, str]) -> None:
    """... although its Strict cookie does not come along with the redirect from the provider."""
    proxy, _ = world
    page = context.new_page()
    page.goto(proxy.url)
    sign_in(page, "bob")
    page.wait_for_url(f"{proxy.url}/", timeout=PATIENCE * 1000)
    first = session_cookie(context, proxy)
    assert chat(proxy, headers={"cookie": first}).status == 200
    page.goto(f"{proxy.url}/api/session/login")  # the provider still knows who that is, and asks nothing
    eventually(lambda: session_cookie(context, proxy) != first, PATIENCE)
    reply = chat(proxy, headers={"cookie": first})
    assert (reply.status, reply.error["code"]) == (401, "session_required")
    assert chat(proxy, headers={"cookie": session_cookie(context, proxy)}).status == 200


def session_cookie(context: BrowserContext, proxy: Running) -> str:
    return next((f"chat={c['value']}" for c in context.cookies(proxy.url) if c["name"] == "chat"), "")


def test_who_is_not_invited_is_told_so(context: BrowserContext, world: tuple[Running, str]) -> None:
    proxy, _ = world
    page = context.new_page()
    page.goto(proxy.url)
    sign_in(page, "eve@elsewhere.example")
    expect(page.get_by_role("heading")).to_have_text("Signing in did not work")
    expect(page.get_by_role("main")).to_contain_text("may not use this chat")
    PageVisit(page, proxy.url).assert_accessible()
    assert session_cookie(context, proxy) == ""
    line = eventually(lambda: proxy.lines("login_failed"))[-1]
    assert "elsewhere" not in line["reason"]


def test_signing_out_is_possible_over_there_too(context: BrowserContext, world: tuple[Running, str]) -> None:
    proxy, issuer = world
    reply = send(proxy, "DELETE", "/api/session")
    assert reply.json["logout_url"].startswith(f"{issuer}/session/end?client_id=chat&post_logout_redirect_uri=")


@pytest.mark.parametrize("query", ["", "?state=x&code=y", "?error=access_denied&state=x", "?state=&code="])
def test_a_callback_that_nobody_waits_for(query: str, world: tuple[Running, str]) -> None:
    proxy, _ = world
    reply = send(proxy, "GET", f"/api/session/callback{query}")
    assert reply.status == 400
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "script" not in reply.headers["content-security-policy"]
    assert b"Sign in again" in reply.body
    assert reply.headers["set-cookie"].startswith("chat-login=; ")


def test_the_state_is_of_one_browser(world: tuple[Running, str]) -> None:
    """The answer to another browser's login is refused: a link cannot log a user in as another one."""
    proxy, _ = world
    mine, theirs = (send(proxy, "GET", "/api/session/login?next=/x") for _ in range(2))
    assert mine.status == 302
    assert "SameSite=Lax" in mine.headers["set-cookie"]
    state = re.findall("state=([^&]+)", theirs.headers["location"])[0]
    reply = send(proxy, "GET", f"/api/session/callback?state={state}&code=c", None, {"cookie": mine.cookie})
    assert reply.status == 400


def test_foreign_pages_begin_no_login(world: tuple[Running, str]) -> None:
    proxy, _ = world
    reply = send(proxy, "GET", "/api/session/login", None, {"sec-fetch-site": "cross-site"})
    assert (reply.status, reply.error["code"]) == (403, "cross_origin")


def test_logins_begun_are_limited() -> None:
    with serving(LIMITS_REFUSALS_PER_ADDRESS="3/hour") as (proxy, _):
        statuses = [send(proxy, "GET", "/api/session/login").status for _ in range(4)]
        assert statuses == [302, 302, 302, 429]


def test_a_provider_that_is_gone() -> None:
    with ScriptedUpstream(streaming(*GOOD)) as upstream:
        given = {"OIDC_ISSUER": f"http://127.0.0.1:{free_port()}", "OIDC_CLIENT_ID": "c", "OIDC_CLIENT_SECRET": "s"}
        with running(upstream.base_url, SESSION_MODE="oidc", **given) as proxy:
            reply = send(proxy, "GET", "/api/session/login")
            assert (reply.status, reply.headers["content-type"]) == (502, "text/html; charset=utf-8")
            assert b"did not answer correctly" in reply.body
            assert send(proxy, "DELETE", "/api/session").json == {"logout_url": None}
