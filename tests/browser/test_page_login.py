"""The page where people sign in: Chromium against the real server, in each mode with a login.

Whatever a test does, no password may be in the log, and no script may see a cookie: the fixtures assert that.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from argon2 import PasswordHasher
from playwright.sync_api import Browser, BrowserContext, Locator, Request, Route, expect
from support.browser import PageVisit
from support.harness import Peer, Running, ScriptedUpstream, running, send
from support.stage import always

pytestmark = [pytest.mark.browser, pytest.mark.node]

PASSWORDS = {"alice": "Wonderland-7f3", "bob": "Builder-9k2"}
SHARED = "Everybody-4x8"
WRONG = "Looking-Glass-1"
hashed = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash
USERS = "\n".join(f"{user}:{hashed(password)}" for user, password in PASSWORDS.items())
SHARED_HASH = hashed(SHARED)
QUESTION = "And what about this one?"


async def answer(peer: Peer) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "An answer."}, "finish_reason": None}]}
    await peer.sse(f"data: {json.dumps(chunk)}\n\n".encode(), b"data: [DONE]\n\n")


@contextmanager
def serving(**settings: str) -> Iterator[Running]:
    """The real server in one of the modes; afterwards no password may be in its log."""
    with (
        ScriptedUpstream(always(answer)) as upstream,
        running(upstream.base_url, POLICY_MODELS="m", **settings) as proxy,
    ):
        yield proxy
    log = proxy.output.getvalue().decode()
    assert '"route":"GET /api/session"' in log  # it is the log, and it is whole
    for password in (*PASSWORDS.values(), SHARED, WRONG):
        assert password not in log


@contextmanager
def watching(context: BrowserContext, proxy: Running) -> Iterator[PageVisit]:
    """A page of the context, open and watched."""
    with PageVisit.of(context, proxy.url, until="main") as visit:
        yield visit
        if visit.page.url.startswith(proxy.url):
            assert visit.page.evaluate("() => document.cookie") == ""


@pytest.fixture
def proxy() -> Iterator[Running]:
    with serving(SESSION_MODE="password", SESSION_PASSWORDS=USERS) as proxy:
        yield proxy


@pytest.fixture
def visit(proxy: Running, context: BrowserContext) -> Iterator[PageVisit]:
    with watching(context, proxy) as visit:
        yield visit


# ---- what is on the page ------------------------------------------------------------------------------------------


def door(visit: PageVisit) -> Locator:
    return visit.page.get_by_role("region", name=re.compile("^Sign"))


def name(visit: PageVisit) -> Locator:
    return visit.page.get_by_label("Name")


def password(visit: PageVisit) -> Locator:
    return visit.page.get_by_label("Password")


def submit(visit: PageVisit) -> Locator:
    return door(visit).locator("button")


def sign_in(visit: PageVisit, user: str = "alice") -> None:
    name(visit).fill(user)
    password(visit).fill(PASSWORDS[user])
    submit(visit).click()
    expect(visit.message).to_be_focused()


def requests(visit: PageVisit) -> list[str]:
    """What the page asks for, from now on."""
    seen: list[str] = []

    def note(request: Request) -> None:
        seen.append(f"{request.method} {request.url.removeprefix(visit.url)}")

    visit.page.on("request", note)
    return seen


def ask(visit: PageVisit, question: str) -> None:
    visit.message.fill(question)
    visit.message.press("Enter")


def ask_and_wait(visit: PageVisit, question: str) -> None:
    ask(visit, question)
    visit.expect_state("complete")
    expect(visit.text).to_have_text("An answer.")


def session_card(visit: PageVisit) -> Locator:
    visit.page.locator("#account summary").click()
    return visit.page.locator(".account-card")


def sign_out(visit: PageVisit) -> None:
    session_card(visit).get_by_role("button", name="Sign out").click()


def look_at(visit: PageVisit) -> None:
    """As when the user comes back from another tab; headless, all tabs are always visible."""
    visit.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")


def cookie_of(context: BrowserContext) -> str:
    return "; ".join(f"{cookie['name']}={cookie['value']}" for cookie in context.cookies())


def revoke(proxy: Running, context: BrowserContext) -> None:
    """Ends the session through a copy of its cookie."""
    assert send(proxy, "DELETE", "/api/session", headers={"cookie": cookie_of(context)}).status == 200


def expect_closed(visit: PageVisit) -> None:
    """The chat is closed: no message box, no suggestions, no limits, and the password still empty."""
    expect(door(visit)).to_be_visible()
    for hidden in ("#composer", "#suggestions", "#account"):
        expect(visit.page.locator(hidden)).to_be_hidden()


# ---- a password ---------------------------------------------------------------------------------------------------


def test_the_form_is_one_that_people_and_password_managers_know(visit: PageVisit) -> None:
    """Labels, autocomplete, the focus in the first field, and nothing sent or minted before."""
    expect_closed(visit)
    expect(name(visit)).to_be_focused()
    expect(name(visit)).to_have_attribute("autocomplete", "username")
    expect(name(visit)).to_have_accessible_description("Leave empty if you were given only a password")
    expect(password(visit)).to_have_attribute("autocomplete", "current-password")
    expect(password(visit)).to_have_attribute("type", "password")
    expect(visit.page.get_by_role("link", name="Skip to the sign-in")).to_have_attribute("href", "#login-panel")
    assert visit.page.context.cookies() == []


def test_by_keyboard_alone(visit: PageVisit) -> None:
    """Tab goes from the name to the password to the button, each shows its focus, and Enter signs in."""
    keyboard = visit.page.keyboard
    expect(name(visit)).to_be_focused()
    keyboard.type("alice")
    for stop in (password(visit), submit(visit)):
        keyboard.press("Tab")
        expect(stop).to_be_focused()
        assert stop.evaluate("(it) => getComputedStyle(it).outlineStyle") == "solid"
    keyboard.press("Shift+Tab")
    keyboard.type(PASSWORDS["alice"])
    keyboard.press("Enter")
    expect(visit.message).to_be_focused()
    keyboard.type("hello")
    keyboard.press("Enter")
    visit.expect_state("complete")


def test_an_empty_password_is_not_sent(visit: PageVisit) -> None:
    """The browser itself says that the field is missing."""
    expect_closed(visit)
    sent = requests(visit)
    name(visit).fill("alice")
    submit(visit).click()
    expect(password(visit)).to_be_focused()
    assert password(visit).evaluate("(it) => it.validity.valueMissing")
    assert sent == []


def test_a_wrong_password_is_told_and_emptied(visit: PageVisit, proxy: Running) -> None:
    """The alert says it, the field is empty and has the focus, the name stays; the next one may be right."""
    visit.staged = {401}
    name(visit).fill("alice")
    password(visit).fill(WRONG)
    submit(visit).click()
    expect(visit.alert).to_have_text("This name or password is not right. Check them and try again.")
    expect(password(visit)).to_be_focused()
    expect(password(visit)).to_have_value("")
    expect(name(visit)).to_have_value("alice")
    expect_closed(visit)
    visit.assert_accessible()
    expect(submit(visit)).to_be_enabled()
    password(visit).fill(PASSWORDS["alice"])
    password(visit).press("Enter")
    expect(visit.message).to_be_focused()
    expect(visit.alert).to_have_count(0)


def test_the_button_is_closed_while_it_runs(visit: PageVisit) -> None:
    """One click is one try, however impatient."""
    held: list[Route] = []
    visit.page.route("**/api/session", lambda route: held.append(route))
    name(visit).fill("alice")
    password(visit).fill(PASSWORDS["alice"])
    password(visit).press("Enter")
    expect(submit(visit)).to_have_text("Signing in…")
    expect(submit(visit)).to_be_disabled()
    password(visit).press("Enter")
    expect(submit(visit)).to_be_disabled()
    assert len(held) == 1
    held[0].continue_()
    expect(visit.message).to_be_focused()


def test_who_is_signed_in_chats_and_stays_so(visit: PageVisit, context: BrowserContext) -> None:
    """The chat works, the card shows the user, and a reload asks for no password."""
    with visit.page.expect_request("**/api/session") as sent:
        sign_in(visit)
    assert sent.value.method == "POST"
    assert sent.value.post_data_json == {"user": "alice", "password": PASSWORDS["alice"]}
    expect(door(visit)).to_be_hidden()
    assert visit.page.locator("input[type=password]").count() == 0  # the password is on the page no more
    ask_and_wait(visit, "hello")
    expect(session_card(visit)).to_contain_text(re.compile(r"Signed in as alice, expires in 1 day"))
    assert [(cookie["httpOnly"], cookie["sameSite"]) for cookie in context.cookies()] == [(True, "Strict")]
    visit.page.reload()
    expect(visit.page.locator("#welcome-state")).to_contain_text("Signed in as alice")
    expect(visit.message).to_be_focused()
    expect(door(visit)).to_be_hidden()


def test_a_password_that_all_share(context: BrowserContext) -> None:
    """The name stays empty and is not sent; a session without a name is signed in as well."""
    with serving(SESSION_MODE="password", SESSION_PASSWORDS=SHARED_HASH) as proxy, watching(context, proxy) as visit:
        with visit.page.expect_request("**/api/session") as sent:
            password(visit).fill(SHARED)
            password(visit).press("Enter")
        assert sent.value.post_data_json == {"password": SHARED}
        expect(visit.message).to_be_focused()
        expect(session_card(visit).locator("#session-state")).to_have_text(re.compile(r"^Signed in, expires in"))
        visit.page.reload()
        expect(visit.message).to_be_focused()
        sign_out(visit)
        expect_closed(visit)


def test_too_many_tries_are_counted_down(proxy: Running, visit: PageVisit) -> None:
    """A 429 closes the button for as long as Retry-After says, and Enter too; then it is open again."""
    names = itertools.count()
    while wrong_try(proxy, f"user{next(names)}") != 429:
        pass  # until the address has no tries left; a name of its own each, or that one would be the one that waits
    visit.staged = {429}
    visit.page.clock.install()
    visit.page.reload()
    expect_closed(visit)
    tries = requests(visit)
    name(visit).fill("alice")
    password(visit).fill(PASSWORDS["alice"])
    password(visit).press("Enter")
    expect(visit.alert).to_have_text("That was too many tries. Wait for the countdown, then try again.")
    expect(submit(visit)).to_have_text(re.compile(r"^Try again in (\d\d? seconds?|1 minute)$"))
    expect(submit(visit)).to_be_disabled()
    password(visit).press("Enter")
    visit.page.clock.run_for(1000)
    expect(submit(visit)).to_have_text(re.compile(r"^Try again in \d\d? seconds?$"))
    assert tries == ["POST /api/session"]
    visit.page.clock.fast_forward(60_000)
    expect(submit(visit)).to_have_text("Sign in")
    expect(submit(visit)).to_be_enabled()
    expect(password(visit)).to_have_value(PASSWORDS["alice"])


def test_a_server_that_is_away(visit: PageVisit) -> None:
    """Without a connection the form says so and keeps what was typed; signing out says that it did not work."""
    visit.page.route("**/api/session", lambda route: route.abort("connectionrefused"))
    name(visit).fill("alice")
    password(visit).fill(PASSWORDS["alice"])
    submit(visit).click()
    expect(visit.alert).to_contain_text("The server could not be reached.")
    expect(submit(visit)).to_be_enabled()
    visit.page.unroute_all()
    submit(visit).click()
    expect(visit.message).to_be_focused()
    ask_and_wait(visit, "hello")
    visit.page.route("**/api/session", lambda route: route.abort("connectionrefused"))
    sign_out(visit)
    expect(visit.alert).to_contain_text("You are still signed in. The server could not be reached.")
    expect(visit.text).to_have_text("An answer.")
    again = visit.page.locator("#notice").get_by_role("button", name="Retry")
    again.press("Enter")
    expect(visit.message).to_be_focused()
    visit.page.unroute_all()
    again.click()
    expect_closed(visit)
    visit.forgive("ERR_CONNECTION_REFUSED")


def wrong_try(proxy: Running, user: str) -> int:
    body = json.dumps({"user": user, "password": WRONG}).encode()
    return send(proxy, "POST", "/api/session", body, {"content-type": "application/json"}).status


# ---- the end of a session -----------------------------------------------------------------------------------------


def test_signing_out(visit: PageVisit, proxy: Running, context: BrowserContext) -> None:
    """The conversation and the cookie are gone, a copy of the cookie is dead, and the form is back."""
    sign_in(visit)
    ask_and_wait(visit, "a private matter")
    visit.message.fill("another one")
    visit.page.get_by_role("button", name="What the browser sees").click()
    expect(visit.page.get_by_role("dialog")).to_contain_text("a private matter")
    cookie = cookie_of(context)
    sign_out(visit)
    expect(visit.page.get_by_role("heading", name="Signed out")).to_be_visible()
    expect(name(visit)).to_be_focused()
    expect(visit.page.locator(".turn")).to_have_count(0)
    expect_closed(visit)
    expect(visit.page.get_by_role("dialog")).to_contain_text("Ask something, and the request is shown here.")
    assert "a private matter" not in visit.page.content()
    assert context.cookies() == []
    answered = send(proxy, "GET", "/api/session", headers={"cookie": cookie}).json
    assert answered["session"] == {"mode": "password", "user": None, "expires_at": None}
    sign_in(visit)
    expect(visit.message).to_have_value("")
    ask_and_wait(visit, "hello")


def test_signing_out_stops_the_answer_and_clears_every_tab(visit: PageVisit, proxy: Running) -> None:
    """Nothing of a conversation stays in another tab either, nor goes on there."""
    sign_in(visit)
    with watching(visit.page.context, proxy) as other:
        other.page.route("**/api/chat", lambda route: None)  # it is never answered
        ask(other, "a private matter")
        other.expect_state("waiting")
        sign_out(visit)
        expect_closed(visit)
        expect(other.page.locator(".turn")).to_have_count(0)
        expect(other.page.get_by_role("heading", name="Signed out")).to_be_visible()
        expect_closed(other)
        sign_in(other)
        look_at(visit)
        expect(visit.message).to_be_focused()


def test_the_end_over_there(visit: PageVisit) -> None:
    """Where signing out goes on at another address, the browser goes there."""
    elsewhere = "https://id.example.org/logout"
    sign_in(visit)

    def answered(route: Route) -> None:
        route.fulfill(response=route.fetch(), json={"logout_url": elsewhere})

    visit.page.route("**/api/session", answered)
    visit.page.route(elsewhere, lambda route: route.fulfill(content_type="text/html", body="<p>Good bye</p>"))
    sign_out(visit)
    expect(visit.page.get_by_text("Good bye")).to_be_visible()
    assert visit.faults == [f"request: {elsewhere}"]
    visit.faults.clear()


def test_a_session_that_ends_in_the_middle_loses_nothing(
    visit: PageVisit, proxy: Running, context: BrowserContext
) -> None:
    """The form comes, the question waits in the message box, and the conversation goes on where it was."""
    visit.staged = {401}
    sign_in(visit)
    ask_and_wait(visit, "hello")
    revoke(proxy, context)
    ask(visit, QUESTION)
    expect_closed(visit)
    expect(door(visit)).to_contain_text("Your session has ended. Sign in again to go on.")
    expect(visit.page.get_by_role("status")).to_have_text("Your question is kept.")
    expect(name(visit)).to_be_focused()
    expect(visit.page.locator(".question")).to_have_text(["hello"])
    sign_in(visit)
    expect(visit.message).to_have_value(QUESTION)
    expect(visit.page.locator(".question")).to_have_text(["hello"])
    with visit.page.expect_request("**/api/chat") as sent:
        visit.message.press("Enter")
    messages = json.loads(sent.value.post_data or "")["messages"]
    contents = [message["content"] for message in messages]
    assert contents == ["hello", "An answer.", QUESTION]
    visit.expect_state("complete")
    expect(visit.message).to_have_value("")


@pytest.mark.parametrize("code", ["login_required", "session_expired", "session_required"])
def test_every_code_that_asks_for_a_login(visit: PageVisit, proxy: Running, context: BrowserContext, code: str) -> None:
    """In all three cases the page asks for the session again, and keeps what was typed meanwhile."""
    visit.staged = {401}
    sign_in(visit)
    error = {"message": "No.", "type": "authentication_error", "param": None, "code": code}
    held: list[Route] = []

    def refused(route: Route) -> None:
        if held:  # once more, with what the client takes for a new session
            route.fulfill(status=401, json={"error": error})
        held.append(route)

    visit.page.route("**/api/chat", refused)
    ask(visit, QUESTION)
    visit.expect_state("waiting")
    visit.message.fill("typed meanwhile")
    revoke(proxy, context)
    held[0].fulfill(status=401, json={"error": error})
    expect_closed(visit)
    expect(visit.page.locator("#welcome")).to_be_visible()
    sign_in(visit)
    expect(visit.message).to_have_value(f"{QUESTION}\n\ntyped meanwhile")


def test_a_refusal_that_the_session_does_not_confirm(visit: PageVisit) -> None:
    """A 401 of a user that is still signed in stays what it is: an error under the question."""
    visit.staged = {401}
    sign_in(visit)
    error = {"message": "No.", "type": "authentication_error", "param": None, "code": "session_expired"}
    visit.page.route("**/api/chat", lambda route: route.fulfill(status=401, json={"error": error}))
    ask(visit, QUESTION)
    visit.expect_state("failed")
    expect(visit.alert).to_contain_text("Your session has expired")
    expect(visit.message).to_be_visible()


def test_one_user_finds_nothing_of_another(visit: PageVisit, proxy: Running, context: BrowserContext) -> None:
    """A login after the end of another user's session starts with an empty page."""
    visit.staged = {401}
    sign_in(visit, "alice")
    ask_and_wait(visit, "a private matter")
    revoke(proxy, context)
    ask(visit, QUESTION)
    sign_in(visit, "bob")
    expect(visit.message).to_have_value("")
    expect(visit.page.locator(".turn")).to_have_count(0)
    expect(visit.page.locator("#welcome-state")).to_contain_text("Signed in as bob")


def keep(visit: PageVisit) -> None:
    session_card(visit).get_by_label("Keep this conversation in this browser").check()
    visit.page.keyboard.press("Escape")


def kept(visit: PageVisit) -> str:
    stored: str = visit.page.evaluate("() => JSON.stringify({ ...localStorage, ...sessionStorage })")
    return stored


def test_signing_out_deletes_what_was_kept(visit: PageVisit) -> None:
    """A kept conversation is there for its owner, after the end of the session too; signing out deletes it."""
    sign_in(visit)
    keep(visit)
    ask_and_wait(visit, "a private matter")
    visit.page.context.clear_cookies()
    visit.page.reload()
    expect_closed(visit)
    expect(visit.page.locator(".turn")).to_have_count(0)
    sign_in(visit)
    expect(visit.page.locator(".question")).to_have_text("a private matter")
    sign_out(visit)
    expect_closed(visit)
    assert kept(visit) == "{}"
    sign_in(visit)
    expect(visit.page.locator(".turn")).to_have_count(0)


def test_one_user_finds_nothing_that_another_has_kept(
    visit: PageVisit, proxy: Running, context: BrowserContext
) -> None:
    """It is deleted when another user signs in; an older tab neither brings it back nor changes theirs."""
    sign_in(visit, "alice")
    keep(visit)
    ask_and_wait(visit, "a private matter")
    context.clear_cookies()
    with watching(context, proxy) as other:
        expect_closed(other)
        sign_in(other, "bob")
        expect(other.page.locator(".turn")).to_have_count(0)
        assert kept(other) == "{}"
        keep(other)
        ask_and_wait(other, "a matter of bob")
        visit.page.goto("about:blank")  # where a page is left, it writes down what it has
        assert "a private matter" not in kept(other)
        assert "a matter of bob" in kept(other)


def test_what_nobody_can_be_named_for_ends_with_the_session(context: BrowserContext) -> None:
    """With a shared password the next user does not find what the previous one has kept."""
    with serving(SESSION_MODE="password", SESSION_PASSWORDS=SHARED_HASH) as proxy, watching(context, proxy) as visit:
        password(visit).fill(SHARED)
        password(visit).press("Enter")
        keep(visit)
        ask_and_wait(visit, "a private matter")
        visit.page.reload()
        expect(visit.page.locator(".question")).to_have_text("a private matter")
        context.clear_cookies()
        visit.page.reload()
        expect_closed(visit)
        assert kept(visit) == "{}"


def test_what_is_typed_into_the_form_survives_a_look_elsewhere(visit: PageVisit) -> None:
    """The page asks for the session again when it becomes visible; the form stays as it is."""
    name(visit).fill("alice")
    password(visit).fill(WRONG)
    with visit.page.expect_response("**/api/session") as answered:
        look_at(visit)
    answered.value.finished()
    visit.page.evaluate("() => new Promise(requestAnimationFrame)")
    expect(name(visit)).to_have_value("alice")
    expect(password(visit)).to_have_value(WRONG)
    expect(password(visit)).to_be_focused()


def test_an_answer_that_comes_late_counts_no_more(visit: PageVisit) -> None:
    """A response from before the login does not close the chat again afterwards."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        if route.request.method == "GET":
            held.append(route)
        else:
            route.continue_()

    expect_closed(visit)
    visit.page.route("**/api/session", hold)
    look_at(visit)
    sign_in(visit)
    with visit.page.expect_response("**/api/session") as late:
        held[0].fulfill(json=account("password", None))
    late.value.finished()
    visit.page.evaluate("() => new Promise(requestAnimationFrame)")
    expect(visit.message).to_be_visible()
    expect(door(visit)).to_be_hidden()


# ---- the other ways in --------------------------------------------------------------------------------------------

ALICE = {"X-Forwarded-Email": "alice@example.org"}


def test_a_header_signs_in(browser: Browser) -> None:
    """The user that the proxy in front names is signed in, chats, and sees after signing out what to do next."""
    with serving(SESSION_MODE="header") as proxy:
        context = browser.new_context(extra_http_headers=ALICE)
        with watching(context, proxy) as visit:
            ask_and_wait(visit, "hello")
            expect(session_card(visit)).to_contain_text("Signed in as alice@example.org")
            visit.page.keyboard.press("Escape")
            sign_out(visit)
            expect_closed(visit)
            expect(door(visit)).to_contain_text("Your organisation's sign-in may still be open: sign out there too.")
            expect(visit.page.locator(".turn")).to_have_count(0)
            asked = requests(visit)
            look_at(visit)
            visit.page.evaluate("() => new Promise(requestAnimationFrame)")
            assert asked == []  # a look at another tab does not sign in again
            door(visit).get_by_role("button", name="Reload").click()
            expect(visit.page.locator("#welcome-state")).to_contain_text("Signed in as alice@example.org")
        context.close()


def test_without_the_header_a_sentence_says_what_to_do(browser: Browser) -> None:
    """It sends the reader to the organisation's sign-in, and Reload is one key away."""
    with serving(SESSION_MODE="header") as proxy:
        context = browser.new_context()
        with watching(context, proxy) as visit:
            expect_closed(visit)
            expect(door(visit)).to_contain_text("Open this chat through your organisation's sign-in")
            expect(door(visit).get_by_role("button", name="Reload")).to_be_focused()
            context.set_extra_http_headers(ALICE)
            visit.page.keyboard.press("Enter")
            expect(visit.message).to_be_focused()
            ask_and_wait(visit, "hello")
        context.close()


@pytest.mark.parametrize("way", ["redirect", "401"])
def test_a_sign_in_in_front_of_the_server_has_ended(browser: Browser, way: str) -> None:
    """What stands in front then answers in our place: the page shows the way, and the question outlives the reload."""
    with serving(SESSION_MODE="header") as proxy:
        context = browser.new_context(extra_http_headers=ALICE)
        with watching(context, proxy) as visit:
            ask_and_wait(visit, "hello")
            shut_out(visit, way)
            ask(visit, QUESTION)
            expect_closed(visit)
            expect(door(visit)).to_contain_text("Sign in with your organisation again, then reload this page.")
            visit.page.unroute_all()
            door(visit).get_by_role("button", name="Reload").click()
            expect(visit.message).to_have_value(QUESTION)
            visit.page.reload()
            expect(visit.message).to_have_value("")  # kept for once
            visit.forgive("ERR_FAILED")
        context.close()


def shut_out(visit: PageVisit, way: str) -> None:
    """As nginx with auth_request does it, or with error_page to a login."""
    visit.staged = {401}

    def refused(route: Route) -> None:
        if way == "redirect":
            route.fulfill(status=302, headers={"location": f"{visit.url}/oauth2/start"})
        else:
            route.fulfill(status=401, content_type="text/html", body="<h1>401 Authorization Required</h1>")

    visit.page.route("**/api/*", refused)


OIDC = {
    "SESSION_MODE": "oidc",
    "OIDC_ISSUER": "https://id.example.org",
    "OIDC_CLIENT_ID": "chat",
    "OIDC_CLIENT_SECRET": "a-secret-of-this-test",
    "OIDC_ALLOWED_DOMAINS": "example.org",
}


def test_a_provider_signs_in(context: BrowserContext) -> None:
    """The link takes along where the reader is, whatever stands there."""
    with serving(**OIDC) as proxy, watching(context, proxy) as visit:
        expect_closed(visit)
        visit.page.goto(f"{visit.url}/index.html?a=1&b=%26#part")
        link = door(visit).get_by_role("link", name="Sign in")
        expect(link).to_be_focused()
        next_ = "%2Findex.html%3Fa%3D1%26b%3D%2526%23part"
        expect(link).to_have_attribute("href", f"/api/session/login?next={next_}")


@pytest.mark.parametrize(("reader", "found"), [("alice", QUESTION), ("bob", "")])
def test_a_question_outlives_the_way_to_a_provider(context: BrowserContext, reader: str, found: str) -> None:
    """An unsent text is back when its author returns; other users do not find it."""
    who: list[str | None] = ["alice"]
    elsewhere = "https://id.example.org/authorize"
    with serving(**OIDC) as proxy, watching(context, proxy) as visit:
        page, visit.staged = visit.page, {401}
        page.route("**/api/session", lambda route: route.fulfill(json=account("oidc", who[-1])))
        page.route("**/api/session/login?*", lambda route: route.fulfill(status=302, headers={"location": elsewhere}))
        page.route(elsewhere, lambda route: route.fulfill(content_type="text/html", body=f"<a href={visit.url}/>Go on"))
        page.reload()
        expect(page.locator("#welcome-state")).to_contain_text("Signed in as alice")
        who.append(None)
        ask(visit, QUESTION)
        door(visit).get_by_role("link", name="Sign in").press("Enter")
        page.get_by_role("link", name="Go on").click()
        expect(door(visit)).to_contain_text("Sign in to use this chat.")  # did not work; once more
        door(visit).get_by_role("link", name="Sign in").click()
        who.append(reader)
        page.get_by_role("link", name="Go on").click()
        expect(page.locator("#welcome-state")).to_contain_text(f"Signed in as {reader}")
        expect(visit.message).to_have_value(found)
        page.reload()
        expect(page.locator("#welcome-state")).to_contain_text(f"Signed in as {reader}")
        expect(visit.message).to_have_value("")  # kept for once
        visit.forgive(f"request: {elsewhere}")


def account(mode: str, user: str | None) -> dict[str, Any]:
    return {"session": {"mode": mode, "user": user, "expires_at": 4e9 if user else None}, "models": ["m"], "limits": []}


@pytest.mark.parametrize("mode", ["oidc", "header"])
def test_everybody_can_use_each_door(context: BrowserContext, mode: str) -> None:
    """No rule of accessibility is broken by the ways in without a form: at first, after the end, and signed out."""
    with serving(**OIDC | {"SESSION_MODE": mode}) as proxy, watching(context, proxy) as visit:
        page = visit.page
        expect_closed(visit)
        visit.assert_accessible()
        page.route("**/api/session", lambda route: route.fulfill(json=account(mode, "alice")))
        look_at(visit)
        expect(page.locator("#welcome-state")).to_contain_text("Signed in as alice")
        visit.stream("An answer.")
        ask_and_wait(visit, "hello")
        page.unroute_all()
        look_at(visit)
        expect(door(visit)).to_contain_text("Your session has ended.")
        visit.assert_accessible()  # beside the conversation
        page.route("**/api/session", lambda route: route.fulfill(json=account(mode, "alice")))
        look_at(visit)
        expect(visit.message).to_be_visible()
        page.unroute_all()
        sign_out(visit)
        expect(page.get_by_role("heading", name="Signed out")).to_be_visible()
        visit.assert_accessible()


# ---- everywhere ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_small_screen(browser: Browser, proxy: Running, scheme: Literal["light", "dark"]) -> None:
    """At 360 pixels nothing is wider than the screen; over a keyboard every part of the form can be reached."""
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, is_mobile=True, has_touch=True
    )
    with watching(context, proxy) as visit:
        visit.staged = {401}
        expect_closed(visit)
        name(visit).fill("alice")
        password(visit).fill(WRONG)
        submit(visit).tap()
        expect(visit.alert).to_contain_text("not right")
        fits(visit)
        visit.page.set_viewport_size({"width": 360, "height": 360})
        fits(visit)
        for part in (name(visit), password(visit), submit(visit)):
            part.scroll_into_view_if_needed()
            expect(part).to_be_in_viewport(ratio=1)
        visit.page.set_viewport_size({"width": 360, "height": 740})
        password(visit).fill(PASSWORDS["alice"])
        submit(visit).tap()
        expect(visit.message).to_be_focused()
        expect(session_card(visit).get_by_role("button", name="Sign out")).to_be_in_viewport(ratio=1)
        fits(visit)
    context.close()


def fits(visit: PageVisit) -> None:
    assert visit.page.evaluate("() => document.documentElement.scrollWidth") == 360
    assert visit.page.evaluate("() => document.documentElement.scrollHeight <= innerHeight")
