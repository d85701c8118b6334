"""Answers on the page as they come over the real server, from an upstream on which everything is staged.

The demo model, with which test_page.py works, ends its answers by itself; this one does as each question says.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Request, expect
from support.browser import CHROMIUM, CHROMIUM_ARGS, PageVisit
from support.harness import DONE, Peer, Running, ScriptedUpstream, Seen, delta, eventually, finish, running
from support.stage import Act, always

pytestmark = [pytest.mark.browser, pytest.mark.node]

ROOT = Path(__file__).resolve().parents[2]
HOSTILE: list[str] = json.loads((ROOT / "tests/browser/page/hostile.json").read_text())
TOKENS = 10_000
ROUNDS = 200  # writes in which so many tokens come


# ---- what the upstream does, by question --------------------------------------------------------------------------


async def before_the_headers(peer: Peer) -> None:
    await peer.gone()


async def before_the_first_token(peer: Peer) -> None:
    await peer.head()
    await peer.chunk(delta(""))
    await peer.gone()


async def in_a_stall(peer: Peer) -> None:
    await peer.head()
    await peer.chunk(delta("Three ") + delta("words ") + delta("came."))
    await peer.gone()


async def while_it_streams(peer: Peer) -> None:
    await peer.head()
    gone = asyncio.create_task(peer.gone())
    while not gone.done():
        await peer.chunk(delta("word "))
        await asyncio.sleep(0.005)


async def whole_without_an_end(peer: Peer) -> None:
    await peer.head()
    await peer.chunk(delta("All of it.") + finish())
    await peer.gone()


async def echo(peer: Peer) -> None:
    """Slowly enough that two of them are under way at one time."""
    messages = question_of(peer)["messages"]
    await peer.head()
    for message in messages:
        await peer.chunk(delta(f"{message['content']} "))
        await asyncio.sleep(0.2)
    await peer.chunk(finish() + DONE)
    await peer.end()


async def hostile(peer: Peer) -> None:
    """The corpus in pieces of three characters, each an event of its own, as tokens come."""
    text = "\n\n".join(HOSTILE)
    await peer.sse(*(delta(text[at : at + 3]) for at in range(0, len(text), 3)), finish() + DONE)


async def ten_thousand(peer: Peer) -> None:
    await peer.head()
    tokens = [*long_answer()]
    for at in range(0, TOKENS, TOKENS // ROUNDS):
        await peer.chunk(b"".join(map(delta, tokens[at : at + TOKENS // ROUNDS])))
        await asyncio.sleep(0.01)
    await peer.chunk(finish() + DONE)
    await peer.end()


def long_answer() -> Iterator[str]:
    """TOKENS words: paragraphs, a list, code and a table, in turn, each longer than any screen."""
    kinds = ["{}", "- **{}**", "    {}", "| {}"]
    for number in range(TOKENS):
        kind, place = divmod(number, TOKENS // 4)
        if place == 0:
            opening = ["", "\n\n", "\n\n```\n", "\n```\n\n| head |\n|---|\n"][kind]
        else:
            opening = " " if place % 12 else "\n\n" if kind == 0 else "\n"
        yield opening + (kinds[kind].format("word") if place % 12 == 0 else "word")


async def busy_once(peer: Peer) -> None:
    """The wait is longer than the page's client honours by itself, so it is for the reader to decide."""
    asked_before = [seen for seen in peer.upstream.seen[:-1] if b"busy once" in seen.body]
    if asked_before:
        await peer.sse(delta("better now"), finish(), DONE)
    else:
        await peer.whole(b'{"error": {"message": "busy"}}', "429 Busy", "application/json", "retry-after: 30")


async def cut(peer: Peer) -> None:
    await peer.head()
    await peer.chunk(delta("Half of an answer"))
    peer.reset()


async def always_busy(peer: Peer) -> None:
    await peer.whole(b'{"error": {"message": "busy"}}', "429 Busy", "application/json", "retry-after: 30")


async def thinks_first(peer: Peer) -> None:
    """For a second, in two hundred unseen pieces; then it says three words."""
    await peer.head()
    for _ in range(20):
        await peer.chunk(b"".join(delta("hm").replace(b'"content"', b'"reasoning_content"') for _ in range(10)))
        await asyncio.sleep(0.05)
    await peer.chunk(delta("Three ") + delta("words ") + delta("only."))
    await peer.chunk(finish() + DONE)
    await peer.end()


async def thinks_for_ever(peer: Peer) -> None:
    await peer.head()
    await peer.chunk(delta("hm").replace(b'"content"', b'"reasoning_content"'))
    await peer.gone()


PHASES: dict[str, Act] = {
    "before the headers": before_the_headers,
    "before the first token": before_the_first_token,
    "while it streams": while_it_streams,
    "in a stall": in_a_stall,
}
ACTS: dict[str, Act] = {
    **PHASES,
    "whole without an end": whole_without_an_end,
    "hostile": hostile,
    "ten thousand": ten_thousand,
    "busy once": busy_once,
    "always busy": always_busy,
    "cut": cut,
    "thinks first": thinks_first,
    "thinks for ever": thinks_for_ever,
}


def question_of(peer: Peer) -> dict[str, Any]:
    assert peer.seen is not None
    asked: dict[str, Any] = peer.seen.json
    return asked


async def act(peer: Peer) -> None:
    await ACTS.get(question_of(peer)["messages"][-1]["content"], echo)(peer)


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(always(act)) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(upstream: ScriptedUpstream) -> Iterator[Running]:
    with running(upstream.base_url, UPSTREAM_RETRIES="0", POLICY_MAX_OUTPUT_TOKENS="100000") as proxy:
        yield proxy


@pytest.fixture
def visit(context: BrowserContext, proxy: Running) -> Iterator[PageVisit]:
    with PageVisit.of(context, proxy.url) as visit:
        yield visit


def ask(visit: PageVisit, question: str) -> None:
    visit.message.fill(question)
    visit.message.press("Enter")


def asked(upstream: ScriptedUpstream, visit: PageVisit, question: str) -> Seen:
    """The request, as it has reached the upstream."""
    before = len(upstream.seen)
    ask(visit, question)
    return eventually(lambda: upstream.seen[before:])[0]


def test_the_rate_of_a_model_that_thinks_first(visit: PageVisit) -> None:
    """What it thought counts as tokens, so the time in which it did counts for the rate."""
    ask(visit, "thinks first")
    visit.expect_state("complete")
    expect(visit.text).to_have_text("Three words only.")
    expect(visit.answer.locator("[data-figure=tokens]")).to_have_text("203 tokens")
    rate = visit.answer.locator("[data-figure=rate]").inner_text()
    assert float(rate.removesuffix(" tokens/s").replace(",", "")) < 2000  # not of the moment in which it spoke


def test_a_model_that_thinks_is_not_silent(visit: PageVisit) -> None:
    """The reader is told that something goes on, also where it is not shown, and may stop it."""
    ask(visit, "thinks for ever")
    expect(visit.page.get_by_role("status")).to_have_text("The model is thinking…")
    visit.expect_state("waiting")
    visit.page.keyboard.press("Escape")
    visit.expect_state("stopped")
    expect(visit.answer.locator(".mark")).to_have_text("Stopped before the first word.")


# ---- an answer that is not wanted any more ------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_stop_in_each_phase(visit: PageVisit, upstream: ScriptedUpstream, phase: str) -> None:
    """Stop ends the call at the upstream, keeps what has come, says so, and leaves the page ready for the next one."""
    call = asked(upstream, visit, phase)
    if phase in ("before the headers", "before the first token"):
        visit.expect_state("waiting")
    else:
        expect(visit.text).to_contain_text("word ")
    visit.page.get_by_role("button", name="Stop").click()
    visit.expect_state("stopped")
    eventually(lambda: call.closed)
    expect(visit.page.get_by_role("status")).to_have_text("Stopped.")
    expect(visit.answer.locator(".mark")).to_have_text(re.compile("^Stopped"))
    if phase == "in a stall":
        expect(visit.text).to_have_text("Three words came.")
    expect(visit.page.get_by_role("button", name="Send")).to_be_visible()
    ask(visit, "next")
    visit.expect_state("complete")
    expect(visit.text).to_contain_text("next")


def test_an_answer_that_was_left_says_nothing_any_more(visit: PageVisit, upstream: ScriptedUpstream) -> None:
    """A new conversation does not show that the previous answer is complete, even if it is."""
    call = asked(upstream, visit, "whole without an end")
    expect(visit.text).to_have_text("All of it.")
    visit.page.get_by_role("button", name="New conversation").click()
    eventually(lambda: call.closed)
    expect(visit.page.get_by_role("status")).to_have_text("New conversation.")
    expect(visit.page.locator(".turn")).to_have_count(0)


@pytest.mark.parametrize("way", ["reload", "close"])
def test_leaving_in_mid_stream_ends_the_call(visit: PageVisit, upstream: ScriptedUpstream, way: str) -> None:
    """Reloading the page or closing its tab costs no further token, and a reload starts with an empty page."""
    call = asked(upstream, visit, "while it streams")
    expect(visit.text).to_contain_text("word ")
    if way == "close":
        visit.page.close()
    else:
        visit.page.reload()
        expect(visit.page.locator(".turn")).to_have_count(0)
        expect(visit.message).to_be_focused()
    eventually(lambda: call.closed)


def test_going_to_another_page_ends_the_call_too(browser: Browser, proxy: Running, upstream: ScriptedUpstream) -> None:
    """Although the browser keeps this one at hand, and shows it again as it was: with a part of the answer."""
    keeping = browser.browser_type.launch(
        executable_path=CHROMIUM, args=CHROMIUM_ARGS, ignore_default_args=["--disable-back-forward-cache"]
    )
    try:
        with PageVisit.of(keeping.new_context(), proxy.url) as visit:
            visit.page.evaluate("() => addEventListener('pageshow', (event) => (window.kept = event.persisted))")
            call = asked(upstream, visit, "while it streams")
            expect(visit.text).to_contain_text("word ")
            visit.page.goto(f"{proxy.url}/favicon.svg")
            eventually(lambda: call.closed)
            visit.page.evaluate("() => history.back()")
            visit.page.wait_for_function("() => window.kept")
            expect(visit.answer.locator(".mark")).to_have_text("Stopped: this is a part of the answer.")
            visit.forgive("404")  # a picture has no favicon
    finally:
        keeping.close()


def test_two_tabs_at_once(visit: PageVisit, context: BrowserContext, proxy: Running) -> None:
    """Two tabs share the session, and neither the conversation nor the answer that is under way."""
    with PageVisit.of(context, proxy.url) as other:
        for tab, name in ((visit, "first"), (other, "second")):
            ask(tab, name)
            tab.expect_state("complete")
        ask(visit, "while it streams")
        expect(visit.text).to_contain_text("word ")
        ask(other, "third")
        other.expect_state("complete")
        expect(other.text).to_have_text("second second third")
        expect(visit.answer).to_have_attribute("data-state", "streaming")
        visit.page.keyboard.press("Escape")
        visit.expect_state("stopped")
        assert len(context.cookies()) == 1


# ---- what goes wrong on the way -----------------------------------------------------------------------------------


def test_a_refusal_says_what_to_do_and_counts_down(visit: PageVisit) -> None:
    """A 429 becomes an alert with advice; Retry waits for Retry-After, is then enabled, and asks again."""
    visit.staged = {429}
    visit.page.clock.install()
    ask(visit, "busy once")
    visit.expect_state("failed")
    expect(visit.alert).to_contain_text("Wait for the countdown, then retry.")
    retry = visit.answer.get_by_role("button", name="Retry")
    expect(retry).to_be_disabled()
    expect(retry).to_have_text(re.compile(r"^Retry in \d\d seconds$"))
    assert "seconds" not in visit.alert.inner_text()  # it would be read out again each second
    visit.page.clock.fast_forward(31_000)
    expect(retry).to_have_text("Retry")
    expect(retry).to_be_enabled()
    retry.click()
    visit.expect_state("complete")
    expect(visit.text).to_have_text("better now")
    expect(visit.alert).to_have_count(0)
    expect(visit.page.locator(".turn")).to_have_count(1)


def test_offline_and_back(visit: PageVisit, context: BrowserContext) -> None:
    """Without a network the page says so and keeps the question; with it again, the question can be asked."""
    context.set_offline(True)
    expect(visit.page.get_by_role("status")).to_have_text("You are offline.")
    ask(visit, "hello")
    visit.expect_state("failed")
    expect(visit.alert).to_contain_text("Check your connection, then retry.")
    context.set_offline(False)
    expect(visit.page.get_by_role("status")).to_have_text("You are online again.")
    visit.answer.get_by_role("button", name="Retry").click()
    visit.expect_state("complete")
    expect(visit.text).to_have_text("hello")
    visit.forgive("ERR_INTERNET_DISCONNECTED")


def test_everybody_can_read_what_went_wrong(visit: PageVisit, context: BrowserContext) -> None:
    """No rule of accessibility is broken by a countdown, a fault that lasts, half an answer, a stop, or no network."""
    page, visit.staged = visit.page, {400, 429}
    ask(visit, "always busy")
    visit.expect_state("failed")
    expect(visit.answer.get_by_role("button", name="Retry")).to_be_disabled()
    visit.assert_accessible()
    error = {"message": "No.", "type": "t", "param": None, "code": "input_too_long"}
    page.route("**/api/chat", lambda route: route.fulfill(status=400, json={"error": error}))
    ask(visit, "hello")
    visit.expect_state("failed")
    expect(visit.answer.locator("[data-tone=lasting]")).to_be_visible()
    visit.assert_accessible()
    page.unroute_all()
    ask(visit, "cut")
    visit.expect_state("failed")
    expect(visit.answer.locator(".mark")).to_contain_text("Interrupted")
    visit.assert_accessible()
    ask(visit, "in a stall")
    expect(visit.text).to_contain_text("came")
    page.keyboard.press("Escape")
    visit.expect_state("stopped")
    visit.assert_accessible()
    context.set_offline(True)
    ask(visit, "hello")
    visit.expect_state("failed")
    visit.assert_accessible()
    context.set_offline(False)
    visit.forgive("ERR_INTERNET_DISCONNECTED")
    page.route("**/api/session", lambda route: route.abort("connectionrefused"))
    page.reload()
    expect(page.locator("#notice").get_by_role("button", name="Retry")).to_be_visible()
    visit.assert_accessible()
    visit.forgive("ERR_CONNECTION_REFUSED")


# ---- what the model may do to the page ----------------------------------------------------------------------------


def test_hostile_output_runs_nothing(visit: PageVisit) -> None:
    """A model that was talked into the worst gets nothing run, loaded or styled."""
    sent: list[Request] = []
    visit.page.on("request", lambda request: sent.append(request))
    ask(visit, "hostile")
    visit.expect_state("complete")
    expect(visit.text).to_contain_text("<script>window.pwned=1</script>")
    for link in visit.text.get_by_role("link").all():
        assert re.match(r"https?://", link.get_attribute("href") or "")
    foreign = "script, style, link, img, svg, math, iframe, object, embed, base, meta, form, input, template, video"
    assert visit.text.locator(f"{foreign}, [style], [id], [name]").count() == 0
    names = visit.text.evaluate(
        "(it) => [...new Set([...it.querySelectorAll('*')].flatMap((one) => one.getAttributeNames()))]"
    )
    assert set(names) <= {
        *("class", "dir", "href", "rel", "target", "title", "tabindex", "role", "type", "start", "scope"),
        *("aria-label", "data-copy"),
    }
    assert visit.page.evaluate("() => typeof pwned") == "undefined"
    assert {request.url.removeprefix(visit.url) for request in sent} <= {"/api/chat", "/api/session"}


COUNTING = """() => {
  window.flushes = []; // [milliseconds, what was touched]
  window.longTasks = [];
  new PerformanceObserver((list) => longTasks.push(...list.getEntries().map((entry) => entry.duration)))
    .observe({ type: "longtask" });
  const touched = (record) => 1 + record.addedNodes.length + record.removedNodes.length;
  const options = { subtree: true, childList: true, characterData: true, attributes: true };
  const sum = (records) => records.reduce((sum, record) => sum + touched(record), 0);
  new MutationObserver((records) => flushes.push([performance.now(), sum(records)])).observe(
    document.querySelector("#turns"), options);
}"""


@pytest.mark.quiet
def test_ten_thousand_tokens_stay_smooth(visit: PageVisit, context: BrowserContext) -> None:
    """What an update does to the page depends on what is new, not on what is there; and none is felt by the reader."""
    metrics = context.new_cdp_session(visit.page)
    metrics.send("Performance.enable", {"timeDomain": "threadTicks"})  # a busy machine does not slow this clock down

    def seconds_of_work() -> float:
        found = {each["name"]: each["value"] for each in metrics.send("Performance.getMetrics")["metrics"]}
        return float(found["TaskDuration"])

    visit.page.evaluate(COUNTING)
    before = seconds_of_work()
    ask(visit, "ten thousand")
    visit.page.wait_for_function("() => document.querySelector('.answer')?.dataset.state === 'complete'", polling=250)
    work = seconds_of_work() - before
    flushes: list[tuple[float, int]] = visit.page.evaluate("() => flushes")
    long_tasks: list[float] = visit.page.evaluate("() => longTasks")
    nodes = visit.text.evaluate("(it) => it.querySelectorAll('*').length")
    assert visit.text.evaluate("(it) => it.textContent.match(/word/g).length") == TOKENS
    took = flushes[-1][0] - flushes[0][0]
    assert len(flushes) <= took / 50 * 1.2 + 5  # the first and the last ones come by themselves
    assert sum(touched for _, touched in flushes) < 4 * nodes  # each is made once, and its text grows a few times
    assert work / len(flushes) < 0.025, "an update takes half of the 50 ms until the next one"
    assert len(long_tasks) <= len(flushes) / 10, long_tasks
