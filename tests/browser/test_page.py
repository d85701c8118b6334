"""The page, in a real browser against the real server with the demo model; and its modules, in plain node.

What no test may see, `PageVisit` collects, and the fixture asserts that there is none of it.
What the demo model cannot stage is in test_page_stream.py, signing in is in test_page_login.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Request, Route, expect
from support.browser import PageVisit
from support.commands import started, url_printed
from support.harness import STARTING, eventually

from proxy import errors

pytestmark = [pytest.mark.browser, pytest.mark.node, pytest.mark.process]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server with its demo model, as `chat-proxy demo` starts it."""
    with started(tmp_path_factory.mktemp("demo"), "demo", "--port", "0", given={}) as process:
        yield url_printed(process)


@pytest.fixture
def visit(context: BrowserContext, url: str) -> Iterator[PageVisit]:
    with PageVisit.of(context, url) as visit:
        yield visit


def sent_json(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.post_data or "")
    return body


# ---- asking ------------------------------------------------------------------------------------------------------


LENGTHS = """() => {
  window.lengths = [];
  const note = () => lengths.push(document.querySelector(".md")?.textContent.length ?? 0);
  const options = { subtree: true, childList: true, characterData: true };
  new MutationObserver(note).observe(document.querySelector("#turns"), options);
}"""


def test_an_answer_streams(visit: PageVisit) -> None:
    """The answer is there word by word, busy and no live region while it grows, and never shorter than before."""
    visit.page.evaluate(LENGTHS)
    visit.ask("Tell me a story", "demo-fast")
    visit.expect_state("streaming")
    expect(visit.answer).to_have_attribute("aria-busy", "true")
    live = "[aria-live], [role=status], [role=alert], [role=log]"  # it would be read out with each word
    assert visit.text.evaluate("(it, live) => it.closest(live) ?? it.querySelector(live)", live) is None
    visit.expect_state("complete")
    expect(visit.answer).not_to_have_attribute("aria-busy", "true")
    lengths: list[int] = visit.page.evaluate("() => lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) >= 5  # a batch each 50 ms; fewer where the machine is busy
    expect(visit.text).to_contain_text("but the lamp was burning.")
    expect(visit.text.get_by_role("heading", name="The lamp at the ford")).to_be_visible()
    expect(visit.answer.locator(".mark")).to_be_hidden()


def test_figures_stand_under_an_answer(visit: PageVisit) -> None:
    """Time to first token, tokens a second, number of tokens and total time are told."""
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    for name, pattern in {
        "ttft": r"^first token (\d+ ms|\d+\.\d+ s)$",
        "rate": r"^\d+(\.\d)? tokens/s$",
        "tokens": r"^\d+ tokens$",
        "total": r"^(\d+ ms|\d+\.\d+ s)$",
    }.items():
        expect(visit.answer.locator(f"[data-figure={name}]")).to_have_text(re.compile(pattern))
    expect(visit.page.get_by_role("status")).to_have_text(re.compile(r"^Complete: \d+ tokens\.$"))


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_stops(visit: PageVisit, way: str) -> None:
    """Stop and Esc end the answer at once: what is there stays, marked, and nothing more comes."""
    visit.ask("Write me a long essay")
    expect(visit.text).to_contain_text("You asked for something long")
    if way == "button":
        visit.page.get_by_role("button", name="Stop").click()
    else:
        visit.page.keyboard.press("Escape")
    visit.expect_state("stopped")
    left = visit.text.inner_text()
    assert left.startswith("How a word crosses the world")
    expect(visit.answer.locator(".mark")).to_contain_text("Stopped")
    expect(visit.page.get_by_role("status")).to_have_text("Stopped.")
    visit.page.wait_for_timeout(300)
    assert visit.text.inner_text() == left
    expect(visit.page.get_by_role("button", name="Send")).to_be_visible()
    expect(visit.answer.get_by_role("button", name="Ask again")).to_be_visible()


def test_keyboard_alone(visit: PageVisit) -> None:
    """Everything is reached by keyboard; Shift+Enter is a new line, Enter sends, and the focus is never lost."""
    expect(visit.message).to_be_focused()
    visit.page.keyboard.type("hello")
    visit.page.keyboard.press("Shift+Enter")
    visit.page.keyboard.type("there")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator(".question")).to_have_text("hello\nthere")
    expect(visit.message).to_be_focused()
    expect(visit.message).to_have_value("")
    visit.expect_state("streaming")
    visit.page.keyboard.press("Escape")
    visit.expect_state("stopped")
    visit.page.get_by_role("button", name="New conversation").focus()
    visit.page.keyboard.press("Enter")
    expect(visit.message).to_be_focused()
    expect(visit.page.locator(".turn")).to_have_count(0)
    visit.page.get_by_role("button", name="Explain streaming").focus()
    visit.page.keyboard.press("Space")
    expect(visit.message).to_be_focused()
    expect(visit.page.locator(".question")).to_have_text("Explain streaming in simple terms")


def test_the_conversation_goes_along(visit: PageVisit) -> None:
    """A question takes what was said before it along, but not what was refused; a new conversation takes nothing."""
    visit.staged = {502}
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    visit.ask("/error 500", "demo-fast")
    visit.expect_state("failed")
    with visit.page.expect_request("**/api/chat") as second:
        visit.ask("a joke", "demo-fast")
    body = sent_json(second.value)
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert [body["model"], body["stream"], body["messages"][2]["content"]] == ["demo-fast", True, "a joke"]
    visit.page.get_by_role("button", name="New conversation").click()
    with visit.page.expect_request("**/api/chat") as third:
        visit.ask("thanks", "demo-fast")
    assert [message["content"] for message in sent_json(third.value)["messages"]] == ["thanks"]
    visit.expect_state("complete")


def test_the_view_follows_only_a_reader_at_the_end(visit: PageVisit) -> None:
    """The growing text is kept in view, until the reader scrolls up: then it stands still and offers the way back."""
    scroller = visit.page.locator("#scroller")
    latest = visit.page.get_by_role("button", name="Latest")
    at_end = "(it) => it.scrollHeight - it.scrollTop - it.clientHeight < 60"
    visit.ask("Write me a long essay", "demo-fast")
    eventually(lambda: bool(scroller.evaluate("(it) => it.scrollHeight > it.clientHeight + 300")))
    assert scroller.evaluate(at_end)
    expect(latest).to_be_hidden()
    scroller.hover()
    visit.page.mouse.wheel(0, -250)
    expect(latest).to_be_visible()
    before = scroller.evaluate("(it) => it.scrollTop")
    length = len(visit.text.inner_text())
    eventually(lambda: len(visit.text.inner_text()) > length + 200)
    assert scroller.evaluate("(it) => it.scrollTop") == before
    latest.click()
    expect(latest).to_be_hidden()
    eventually(lambda: bool(scroller.evaluate(at_end)))
    visit.page.keyboard.press("Escape")
    visit.expect_state("stopped")


@pytest.mark.parametrize("way", ["key", "trackpad"])
def test_a_small_step_up_is_not_taken_back(visit: PageVisit, way: str) -> None:
    """One arrow key, or a slow finger, is enough to read where one likes while the answer grows."""
    scroller = visit.page.locator("#scroller")
    visit.ask("Write me a long essay", "demo-fast")
    eventually(lambda: bool(scroller.evaluate("(it) => it.scrollHeight > it.clientHeight + 300")))
    if way == "key":
        scroller.focus()
        visit.page.keyboard.press("ArrowUp")
    else:
        scroller.hover()
        for _ in range(5):
            visit.page.mouse.wheel(0, -8)
            visit.page.wait_for_timeout(60)  # an update of the answer comes between
    expect(visit.page.get_by_role("button", name="Latest")).to_be_visible()
    before = scroller.evaluate("(it) => it.scrollTop")
    length = len(visit.text.inner_text())
    eventually(lambda: len(visit.text.inner_text()) > length + 100)
    assert scroller.evaluate("(it) => it.scrollTop") <= before
    visit.page.keyboard.press("Escape")
    visit.expect_state("stopped")


def test_the_end_stays_in_view_when_there_is_less_room(visit: PageVisit) -> None:
    """As when a keyboard appears on the screen, or the message box grows: a reader at the end stays there."""
    scroller = visit.page.locator("#scroller")
    left = "(it) => Math.round(it.scrollHeight - it.scrollTop - it.clientHeight)"
    visit.ask("markdown", "demo-fast")
    visit.expect_state("complete")
    eventually(lambda: scroller.evaluate(left) == 0)
    visit.page.set_viewport_size({"width": 1280, "height": 420})
    eventually(lambda: scroller.evaluate(left) == 0)
    visit.message.fill("one\ntwo\nthree\nfour")
    eventually(lambda: scroller.evaluate(left) == 0)
    expect(visit.page.get_by_role("button", name="Latest")).to_be_hidden()


# ---- doing it over ------------------------------------------------------------------------------------------------


def test_regenerate_asks_the_same_again(visit: PageVisit) -> None:
    """The last answer can be had anew; it stays until the first word of the next one, and for good if none comes."""
    visit.staged = {418}
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    before = visit.text.inner_text()
    visit.page.route("**/api/chat", lambda route: route.fulfill(status=418, body="{}"))
    visit.answer.get_by_role("button", name="Regenerate").click()
    visit.expect_state("failed")
    assert visit.text.inner_text() == before
    visit.page.unroute_all()
    with visit.page.expect_request("**/api/chat") as sent:
        visit.ask("thanks", "demo-fast")
    roles = [message["role"] for message in sent_json(sent.value)["messages"]]
    assert roles == ["user", "assistant", "user"]  # the refusal has cost nothing
    visit.expect_state("complete")
    expect(visit.page.get_by_role("button", name="Regenerate")).to_have_count(1)  # for the last one alone
    visit.stream("Something else.")
    with visit.page.expect_request("**/api/chat") as again:
        visit.answer.get_by_role("button", name="Regenerate").click()
    assert sent_json(again.value)["messages"] == sent_json(sent.value)["messages"]
    visit.expect_state("complete")
    expect(visit.text).to_have_text("Something else.")
    expect(visit.page.locator(".turn")).to_have_count(2)
    expect(visit.message).to_be_focused()


def test_an_edited_question_takes_the_place_of_the_last_one(visit: PageVisit) -> None:
    """It goes back into the message box; what was being written there is set aside, and back in the end."""
    for question in ("hello", "thanks"):
        visit.ask(question, "demo-fast")
        visit.expect_state("complete")
    visit.message.fill("a draft")
    edit = visit.page.get_by_role("button", name="Edit question")
    expect(edit).to_have_count(1)  # of the last one alone
    edit.click()
    expect(visit.message).to_be_focused()
    expect(visit.message).to_have_value("thanks")
    visit.page.keyboard.press("Escape")
    expect(visit.message).to_have_value("a draft")
    edit.click()
    visit.page.get_by_role("button", name="Cancel").click()
    expect(visit.message).to_have_value("a draft")
    expect(visit.page.locator(".question")).to_have_text(["hello", "thanks"])
    edit.click()
    visit.message.fill("a joke")
    with visit.page.expect_request("**/api/chat") as sent:
        visit.message.press("Enter")
    assert [message["content"] for message in sent_json(sent.value)["messages"]][::2] == ["hello", "a joke"]
    visit.expect_state("complete")
    expect(visit.page.locator(".question")).to_have_text(["hello", "a joke"])
    expect(visit.message).to_have_value("a draft")


# ---- a conversation that is kept ----------------------------------------------------------------------------------

KEPT = "() => JSON.stringify({ ...localStorage, ...sessionStorage })"


def keep(visit: PageVisit) -> Locator:
    visit.page.locator("#account summary").click()
    return visit.page.get_by_label("Keep this conversation in this browser")


def test_nothing_is_kept_unasked(visit: PageVisit) -> None:
    """Without the reader's wish no word is stored anywhere in the browser, and none is left after it is withdrawn."""
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    assert visit.page.evaluate(KEPT) == "{}"
    wish = keep(visit)
    expect(wish).not_to_be_checked()
    wish.check()
    assert "hello" in visit.page.evaluate(KEPT)
    wish.uncheck()
    assert visit.page.evaluate(KEPT) == "{}"
    visit.page.reload()
    expect(visit.page.locator("#welcome")).to_be_visible()


def test_a_kept_conversation_outlives_a_reload(visit: PageVisit) -> None:
    """Questions, answers and what was only a part are there again, and go along with the next question."""
    keep(visit).check()
    visit.page.keyboard.press("Escape")
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    answer = visit.text.inner_text()
    visit.ask("Write me a long essay", "demo-fast")
    expect(visit.text).to_contain_text("You asked for something long")
    visit.page.evaluate("() => dispatchEvent(new Event('pagehide'))")  # not every browser ends the answer in time
    assert "You asked for something long" in visit.page.evaluate(KEPT)
    visit.page.reload()
    expect(visit.page.locator(".question")).to_have_text(["hello", "Write me a long essay"])
    assert visit.page.locator(".md").first.inner_text() == answer
    expect(visit.text).to_contain_text("You asked for something long")
    expect(visit.answer.locator(".mark")).to_have_text("This is a part of the answer.")
    expect(visit.page.locator("#welcome")).to_be_hidden()
    with visit.page.expect_request("**/api/chat") as sent:
        visit.ask("thanks", "demo-fast")
    assert len(sent_json(sent.value)["messages"]) == 5
    visit.expect_state("complete")
    visit.page.get_by_role("button", name="New conversation").click()
    visit.page.reload()
    expect(keep(visit)).to_be_checked()
    expect(visit.page.locator(".turn")).to_have_count(0)
    assert "hello" not in visit.page.evaluate(KEPT)


def test_another_tab_takes_nothing_back(visit: PageVisit, context: BrowserContext, url: str) -> None:
    """What was asked last is kept: a tab that has stood open since before that is left without a trace."""
    keep(visit).check()
    visit.page.keyboard.press("Escape")
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    with PageVisit.of(context, url) as other:
        expect(other.page.locator(".question")).to_have_text("hello")
        visit.ask("thanks", "demo-fast")
        visit.expect_state("complete")
        other.page.reload()
        expect(other.page.locator(".question")).to_have_text(["hello", "thanks"])


NOT_OURS = [
    "{",
    "null",
    '{"owner": "anonymous", "turns": 1}',
    '{"owner": "anonymous", "turns": [null, {}, {"question": 1}, {"question": "q", "text": [], "whole": 1}]}',
    '{"owner": "password alice", "turns": [{"question": "q", "text": "of hers", "whole": true}]}',
]


def test_what_is_not_ours_is_not_shown(visit: PageVisit) -> None:
    """Whatever is stored in place of a kept conversation, and of whichever user, the page opens with an empty one."""
    visit.staged = {404}  # a picture has no favicon
    for stored in NOT_OURS:
        visit.page.goto(f"{visit.url}/favicon.svg")  # of this origin, and without a script that would write there, too
        visit.page.evaluate("(text) => localStorage.setItem('chat-proxy conversation', text)", stored)
        visit.open()
        expect(visit.page.locator("#welcome-state")).to_contain_text("expires in")
        expect(visit.page.locator("#welcome")).to_be_visible()
        expect(visit.page.locator(".turn")).to_have_count(0)
        assert "hers" not in visit.page.evaluate(KEPT)
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_fault_of_the_model_says_what_to_do(visit: PageVisit) -> None:
    """A 502 becomes an alert with advice, the number of the request for the operator, and Retry."""
    visit.staged = {502}
    visit.ask("/error 500", "demo-fast")
    visit.expect_state("failed")
    expect(visit.alert).to_contain_text("Retry in a moment.")
    expect(visit.answer.locator(".request-id")).to_have_text(re.compile(r"^Request [\w-]+$"))
    expect(visit.answer.get_by_role("button", name="Retry")).to_be_enabled()
    assert visit.text.inner_text() == ""


def test_a_cut_answer_is_interrupted_not_complete(visit: PageVisit) -> None:
    """An answer that broke off keeps its part, and is marked as a part in three ways."""
    visit.ask("/cut a story", "demo-fast")
    visit.expect_state("failed")
    expect(visit.text).to_contain_text("Where the road from the hills meets the river")
    expect(visit.answer.locator(".mark")).to_contain_text("Interrupted")
    expect(visit.alert).to_contain_text("The answer was interrupted")
    expect(visit.answer.get_by_role("button", name="Retry")).to_be_enabled()
    expect(visit.page.get_by_role("status")).not_to_contain_text("Complete")


def test_an_answer_that_broke_before_its_first_word_is_no_part(visit: PageVisit) -> None:
    """Where nothing is to be seen, nothing is called a part of the answer."""
    error = {"message": "x", "type": "t", "param": None, "code": "stream_interrupted"}
    event = f"data: {json.dumps({'error': error})}\n\n"
    visit.page.route("**/api/chat", lambda route: route.fulfill(content_type="text/event-stream", body=event))
    visit.ask("hello")
    visit.expect_state("failed")
    expect(visit.alert).to_contain_text("The answer was interrupted")
    expect(visit.answer).not_to_contain_text("part")


def test_a_code_that_the_page_does_not_know(visit: PageVisit) -> None:
    """A code from a newer server is shown with that server's own message."""
    visit.staged = {418}
    error = {"message": "Please use a cup.", "type": "t", "param": None, "code": "teapot"}
    visit.page.route("**/api/chat", lambda route: route.fulfill(status=418, json={"error": error}))
    visit.ask("tea")
    visit.expect_state("failed")
    expect(visit.alert).to_contain_text("Please use a cup.")


def test_there_is_advice_for_every_code() -> None:
    """Every code that the server can send has words of its own on the page."""

    def family(kind: type[errors.Refusal] | type[errors.Interruption]) -> Iterator[str]:
        yield kind.code
        for child in kind.__subclasses__():
            yield from family(child)

    advice = (ROOT / "static/page/error-texts.js").read_text()
    known = set(re.findall(r"^  (\w+): (?:again|otherwise)\(", advice, re.MULTILINE))
    ours = {*family(errors.Refusal), *family(errors.Interruption)}
    ours |= {"login_required", "invalid_credentials", "stream_too_long", "limits_unavailable"}
    assert ours - known == set()


def test_a_server_that_is_away(visit: PageVisit) -> None:
    """Without a connection the page says so, and the question can be asked again."""
    visit.page.route("**/api/chat", lambda route: route.abort("connectionrefused"))
    visit.ask("hello")
    visit.expect_state("failed")
    expect(visit.alert).to_contain_text("Check your connection, then retry.")
    visit.forgive("ERR_CONNECTION_REFUSED")
    visit.page.unroute_all()
    visit.answer.get_by_role("button", name="Retry").click()
    visit.expect_state("complete")


# ---- the session and its limits ----------------------------------------------------------------------------------


def test_the_session_survives_a_reload_and_no_script_sees_it(visit: PageVisit, context: BrowserContext) -> None:
    """A reload keeps the session's cookie and forgets the conversation; document.cookie is empty throughout."""
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    before = context.cookies()
    assert [(cookie["name"], cookie["httpOnly"], cookie["sameSite"]) for cookie in before] == [("chat", True, "Strict")]
    visit.page.reload()
    expect(visit.page.locator("#welcome")).to_be_visible()
    expect(visit.page.locator("#welcome-state")).to_have_text(re.compile(r"^Anonymous session, expires in \d+ \w+"))
    assert [cookie["value"] for cookie in context.cookies()] == [cookie["value"] for cookie in before]
    assert visit.page.evaluate("() => document.cookie") == ""


def test_a_lost_session_is_replaced_without_a_word(visit: PageVisit, context: BrowserContext) -> None:
    """A cookie that the server does not know costs the reader nothing: the page gets a new one and asks once more."""
    visit.staged = {401}
    context.add_cookies([{"name": "chat", "value": "garbled", "url": visit.url}])
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    expect(visit.alert).to_have_count(0)


def test_limits_are_shown_and_go_down(visit: PageVisit) -> None:
    """The tightest limit stands under the message box, all of them one click away; an answer makes them smaller."""
    limits = visit.page.locator("#limits [data-limit]")
    session = visit.page.locator('[data-limit^="per_session"]').first
    visit.page.locator("#account summary").click()
    assert limits.count() >= 4
    expect(session).to_contain_text("20 of 20")
    visit.page.keyboard.press("Tab")  # into it
    expect(visit.page.get_by_label("Keep this conversation")).to_be_focused()
    visit.page.keyboard.press("Escape")
    expect(limits.first).to_be_hidden()
    expect(visit.page.locator("#account summary")).to_be_focused()
    visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    expect(session.locator("b")).to_have_text("19 of 20")
    tightest = visit.page.locator("#tightest")
    expect(tightest).to_contain_text(re.compile(r"\d+ of \d+ requests left this minute"))
    expect(tightest.get_by_label(re.compile("^requests a minute left, (this session|your network)$"))).to_be_visible()
    visit.page.set_viewport_size({"width": 360, "height": 740})
    assert re.fullmatch(r"\d+ requests left", tightest.inner_text())  # also there it says what is left


def test_each_script_has_its_own_direction(visit: PageVisit) -> None:
    """Right-to-left text stands right, marks of lists and quotations too; a question keeps its side."""
    for text, direction in {"مرحبا": "rtl", "שלום": "rtl", "ሰላም": "ltr", "hello": "ltr"}.items():
        visit.stream(f"# {text}\n\n{text} `code`\n\n- {text}\n\n> {text}\n>\n> b\n\n|{text}|b|\n|---|---|\n|{text}|2|")
        visit.ask(text)
        visit.expect_state("complete")
        for tag in ("h3", "p", "ul", "blockquote", "table"):
            shown = visit.text.locator(tag).first
            assert shown.evaluate("(it) => getComputedStyle(it).direction") == direction, (text, tag)
        question = visit.page.locator(".question").last.bounding_box()
        column = visit.page.locator(".turns").bounding_box()
        assert question is not None
        assert column is not None
        assert question["x"] + question["width"] == pytest.approx(column["x"] + column["width"], abs=1)


def test_one_model_needs_no_picker(visit: PageVisit) -> None:
    """The picker is there when there is a choice, and only then."""
    expect(visit.page.get_by_label("Model")).to_be_visible()

    def with_one_model(route: Route) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, json={**reply.json(), "models": ["demo"]})

    visit.page.route("**/api/session", with_one_model)
    visit.open()
    expect(visit.page.get_by_label("Model")).to_be_hidden()


# ---- what the page shows, and what it does not do ----------------------------------------------------------------


def test_what_the_browser_sees(visit: PageVisit) -> None:
    """The disclosure shows the request as it was sent; the one on the wire has no key either."""
    with visit.page.expect_request("**/api/chat") as sent:
        visit.ask("hello", "demo-fast")
    visit.expect_state("complete")
    assert "authorization" not in sent.value.all_headers()
    visit.page.get_by_role("button", name="What the browser sees").click()
    panel = visit.page.get_by_role("dialog")
    expect(panel).to_contain_text(f"POST {visit.url}/api/chat")
    expect(panel).to_contain_text("It sends no key")
    expect(panel).to_contain_text("application/json")
    expect(panel.get_by_label("Request body")).to_contain_text('"content": "hello"')
    expect(panel.get_by_label("Last events")).to_contain_text("data: [DONE]")
    visit.page.keyboard.press("Escape")
    expect(panel).to_be_hidden()


def test_markdown_is_shown(visit: PageVisit, context: BrowserContext) -> None:
    """Headings, lists, code, tables and links become what they are; code and message can be copied."""
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.ask("markdown", "demo-fast")
    visit.expect_state("complete")
    expect(visit.text.get_by_role("heading", name="Everything at once")).to_be_visible()
    expect(visit.text.locator("table tbody tr")).to_have_count(3)
    expect(visit.text.locator("ol > li > ol > li")).to_have_count(2)
    link = visit.text.get_by_role("link", name="a link to the Markdown reference")
    expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
    visit.text.get_by_role("button", name="Copy").first.click()
    assert visit.page.evaluate("() => navigator.clipboard.readText()").startswith("def fibonacci(n: int)")
    visit.answer.locator(".actions").get_by_role("button", name="Copy").click()
    assert visit.page.evaluate("() => navigator.clipboard.readText()").startswith("# Everything at once")


ECHOES = ["<img src=x onerror=pwned=1>", "[x](data:text/html,hi)", "</p><svg onload=pwned=1>"]


@pytest.mark.parametrize("echo", ECHOES)
def test_an_echo_of_hostile_input_runs_nothing(visit: PageVisit, echo: str) -> None:
    """What the model repeats of a hostile message is text on the page, and nothing else."""
    visit.ask(f"Repeat {echo}", "demo-fast")
    expect(visit.text).to_contain_text(echo)
    assert visit.text.locator("img, svg, script, a[href^=data]").count() == 0
    assert visit.page.evaluate("() => typeof pwned") == "undefined"


def test_everybody_can_use_it(visit: PageVisit) -> None:
    """No rule of accessibility is broken in any state of the page: contrast, names, roles, headings, focus."""
    visit.assert_accessible()  # the welcome
    visit.ask("/silent 60 markdown", "demo-fast")
    expect(visit.text).to_contain_text("A paragraph")
    visit.assert_accessible()  # an answer that is under way
    visit.page.keyboard.press("Escape")
    visit.ask("markdown", "demo-fast")
    visit.expect_state("complete")
    visit.page.locator("#account summary").click()
    visit.assert_accessible()  # a conversation, and the card with the limits
    visit.page.keyboard.press("Escape")
    visit.page.get_by_role("button", name="Edit question").click()
    visit.assert_accessible()
    visit.page.keyboard.press("Escape")
    visit.staged = {502}
    visit.ask("/error 500", "demo-fast")
    visit.expect_state("failed")
    visit.page.get_by_role("button", name="What the browser sees").click()
    visit.assert_accessible()  # an error, and the panel beside the conversation
    visit.page.set_viewport_size({"width": 360, "height": 740})
    visit.assert_accessible()  # the panel over it


@pytest.mark.parametrize("width", [320, 360, 768, 3840])
def test_it_fits_each_screen(browser: Browser, url: str, width: int) -> None:
    """From a phone to a wall nothing is wider than the screen, and what is wide scrolls inside itself."""
    context = browser.new_context(viewport={"width": width, "height": 480}, is_mobile=width < 500)
    with PageVisit.of(context, url) as visit:
        expect(visit.page.get_by_role("heading", name="What would you like to know?")).to_be_in_viewport(ratio=1)
        visit.stream(
            "| a | b | c | d |\n|---|---|---|---|\n| 1 | 2 | 3 | 4 |\n\n", f"```\n{'x' * 300}\n```\n\n", "y" * 300
        )
        visit.page.locator("#model option").last.evaluate("(it) => it.textContent = 'a-model-with-quite-a-long-name'")
        visit.ask("z" * 300, "demo-fast")
        visit.expect_state("complete")
        visit.page.locator("#account summary").click()
        assert visit.page.evaluate("() => document.documentElement.scrollWidth") == width
        for end in ("#account h2", "#session-state"):  # also where the screen is low
            visit.page.locator(end).scroll_into_view_if_needed()
            expect(visit.page.locator(end)).to_be_in_viewport(ratio=1)
        assert visit.page.locator("#scroller").evaluate("(it) => it.scrollWidth - it.clientWidth") == 0
        for button in visit.page.locator(".bar button").all():
            expect(button).to_be_in_viewport(ratio=1)
        for part in (visit.text, visit.page.locator("#composer")):
            box = part.bounding_box()
            assert box is not None
            assert box["x"] + box["width"] / 2 == pytest.approx(width / 2, abs=2)  # one column, in the middle
    context.close()


# ---- the modules, without a browser ------------------------------------------------------------------------------


def test_the_modules_in_node(tmp_path: Path) -> None:
    """The parser, the client and the Markdown keep their own promises: tests/page/*.test.js, in plain node."""
    for folder in ("static", "tests/browser/page"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "package.json").write_text('{"type": "module"}')  # Debian's node does not look into a file to know
    tests = sorted(str(path) for path in (tmp_path / "tests/browser/page").glob("*.test.js"))
    run = subprocess.run(["node", "--test", *tests], capture_output=True, text=True, timeout=2 * STARTING, check=False)
    shown = [line for line in run.stdout.splitlines() if not line.startswith(("# Sub", "ok"))]
    assert run.returncode == 0, "\n".join(shown)
