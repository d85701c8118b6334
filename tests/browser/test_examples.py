"""The examples, each with its package from the npm registry, bundled and run in Chromium against the real server.

Where the server's own policy for pages lets an example run, it is served by the server, and no violation may be seen.
The upstream is scripted: it goes on when the test has seen what was to be seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from playwright.sync_api import BrowserContext, Locator, expect
from support import nginx
from support.browser import PageVisit
from support.commands import COMMAND, started, url_printed
from support.harness import (
    DONE,
    PATIENCE,
    Peer,
    Running,
    delta,
    environment,
    eventually,
    finish,
    free_port,
    is_open,
    running,
    send,
)
from support.npm import installed
from support.stage import Act, Stage

pytestmark = [pytest.mark.browser, pytest.mark.nginx, pytest.mark.node, pytest.mark.process, pytest.mark.tools]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "static/examples"
TOOLS = ROOT / "tests/browser/examples"
BUNDLING = 60.0  # seconds; it takes three


@dataclass(frozen=True)
class Example:
    """One page, and where on it things are."""

    name: str
    box: str = "[aria-label=Message]"
    send: str = "text=Send"
    stop: str = "text=Stop"
    answer: str = "[data-role=assistant]"
    problem: str = "[role=alert]"
    front: str = "ours"
    is_loud: bool = False
    """It writes errors that it shows to the console, too."""

    def __str__(self) -> str:
        return self.name


EVERY = [
    Example("openai"),
    Example("ai-sdk"),
    Example("fetch-event-source"),
    Example("assistant-ui", problem=".turn:last-of-type [role=alert]"),
    Example("hook"),
    Example("hook-18"),
    Example(
        "deep-chat",
        box="#text-input",
        send="#submit-icon",
        stop="#stop-icon",
        answer=".ai-message-text:not(.error-message-text)",
        problem=".deep-chat-outer-container-role-error:last-child",
        front="nginx",
        is_loud=True,
    ),
]


COMPONENTS = [example for example in EVERY if (EXAMPLES / f"{example}.jsx").exists()]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, in the folder that is served."""
    folder = tmp_path_factory.mktemp("examples")
    for place in ("", "react-18"):
        (folder / place).mkdir(exist_ok=True)
        locked = [TOOLS / place / name for name in ("package.json", "package-lock.json")]
        (folder / place / "node_modules").symlink_to(installed(place or "examples", locked) / "node_modules")
    for source in TOOLS.glob("*.*"):
        shutil.copy(source, folder)
    command = ["node", "bundle.mjs", str(EXAMPLES), str(folder / "pages")]
    subprocess.run(command, cwd=folder, check=True, timeout=BUNDLING)
    return folder / "pages"


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    """nginx's."""
    with nginx.listening(1) as (listener,):
        yield listener


@pytest.fixture(scope="module")
def ports(listener: socket.socket) -> dict[str, int]:
    """Of the servers in front of ours: it has to know them, and they it."""
    return {"nginx": listener.getsockname()[1], "vite": free_port()}


@pytest.fixture(scope="module")
def stage(bundles: Path, ports: dict[str, int]) -> Iterator[Stage]:
    origins = ",".join(f"http://localhost:{port}" for port in ports.values())
    settings = {"SERVER_STATIC_DIR": str(bundles), "SERVER_EXTRA_ORIGINS": origins, "POLICY_MODELS": "demo"}
    with Stage("uvloop", **settings).open() as stage:
        yield stage


POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:"
)
NGINX = """\
    types {{ text/html html; text/javascript js; }}
    server {{
        listen 127.0.0.1:{port};
        root {pages};
        add_header Content-Security-Policy "{policy}";
        location /api/ {{
            proxy_pass http://127.0.0.1:{server};
            proxy_http_version 1.1; proxy_set_header Host $http_host; proxy_buffering off;
        }}
    }}
"""


@pytest.fixture(scope="module")
def nginx_url(
    tmp_path_factory: pytest.TempPathFactory, bundles: Path, listener: socket.socket, stage: Stage
) -> Iterator[str]:
    """The URL of a web server that has the pages, with a policy of its own, and passes /api on."""
    port = listener.getsockname()[1]
    http = NGINX.format(pages=bundles, port=port, server=stage.proxy.port, policy=POLICY)
    with nginx.serving(tmp_path_factory.mktemp("nginx"), http, [listener]):
        yield f"http://localhost:{port}"


@pytest.fixture(scope="module")
def fronts(stage: Stage, nginx_url: str) -> dict[str, str]:
    """Where pages are served: by our server under its own policy, or by one in front of it."""
    return {"ours": stage.proxy.url, "nginx": nginx_url}


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False).is_success
    return False


@contextmanager
def serving(*command: str, url: str, folder: Path) -> Iterator[None]:
    """Ready: an open port would not do, for vite opens and closes it first to see whether it is free."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: answers(url), BUNDLING)
            yield
        finally:
            process.terminate()


HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


class Shown:
    """An example on the screen."""

    def __init__(self, example: Example, visit: PageVisit, stage: Stage) -> None:
        self.example = example
        self.visit = visit
        self.stage = stage

    def ask(self, act: Act) -> None:
        """About this question the upstream does `act`; returns when the upstream has it."""
        before = len(self.stage.upstream.seen)
        self.stage.act = act
        self.visit.page.locator(self.example.box).fill("hi")
        self.visit.page.locator(self.example.send).click()
        eventually(lambda: len(self.stage.upstream.seen) > before)

    @property
    def answer(self) -> Locator:
        return self.visit.page.locator(self.example.answer).last

    @property
    def problem(self) -> Locator:
        return self.visit.page.locator(self.example.problem).last

    def sleep(self) -> None:
        """The tab is hidden, frozen, and comes back."""
        page = self.visit.page
        browser = page.context.new_cdp_session(page)
        page.evaluate(HIDE, True)
        for state in ("frozen", "active"):
            browser.send("Page.setWebLifecycleState", {"state": state})
        page.evaluate(HIDE, False)

    def is_ready(self) -> None:
        expect(self.visit.page.locator(self.example.send)).to_be_visible()


CUT = "console: Failed to load resource: net::ERR_INCOMPLETE_CHUNKED_ENCODING"


@contextmanager
def shown(example: Example, context: BrowserContext, fronts: dict[str, str], stage: Stage) -> Iterator[Shown]:
    visit = PageVisit(context.new_page(), fronts[example.front])
    visit.watch()
    visit.page.goto(f"{visit.url}/{example.name}.html")
    yield Shown(example, visit, stage)
    told = "console: No complete answer" if example.is_loud else None
    expected = (told or CUT, CUT)
    assert [fault for fault in visit.faults if not fault.startswith(expected)] == []


def answered(*texts: str) -> Act:
    async def act(peer: Peer) -> None:
        await peer.sse(*map(delta, texts), finish(), DONE)

    return act


@pytest.mark.parametrize("example", EVERY, ids=str)
def test_words_appear_as_they_come(
    example: Example, context: BrowserContext, fronts: dict[str, str], stage: Stage
) -> None:
    """Each piece is on the screen before the next one is sent, and a tab that slept meanwhile asks nothing anew.

    Then the page can ask again, with the conversation.
    """
    before = len(stage.upstream.seen)
    seen = [threading.Event() for _ in range(2)]

    async def act(peer: Peer) -> None:
        await peer.head()
        for text, event in zip(["one ", "two "], seen, strict=True):
            await peer.chunk(delta(text))
            assert await asyncio.to_thread(event.wait, PATIENCE)
        for part in (delta("three"), finish(), DONE):
            await peer.chunk(part)
        await peer.end()

    with shown(example, context, fronts, stage) as page:
        page.ask(act)
        for text, event in zip(["one", "one two"], seen, strict=True):
            expect(page.answer).to_have_text(text)
            page.sleep()
            event.set()
        expect(page.answer).to_have_text("one two three")
        page.is_ready()
        assert len(stage.upstream.seen) == before + 1
        page.ask(answered("fine"))
        expect(page.answer).to_have_text("fine")
        page.is_ready()
        expect(page.problem).to_be_hidden()
        told = stage.upstream.seen[-1].json["messages"]
        assert [message["role"] for message in told] == ["user", "assistant", "user"]
        assert told[1]["content"] == "one two three"


PHASES: dict[str, list[bytes] | None] = {
    "before the head": None,
    "before the first word": [],
    "in the middle": [delta("one "), delta("two")],
}


@pytest.mark.parametrize("example", EVERY, ids=str)
def test_stop_reaches_the_upstream(
    example: Example, context: BrowserContext, fronts: dict[str, str], stage: Stage
) -> None:
    """In every phase; what was there stays, no problem is shown, and the page can ask again."""
    with shown(example, context, fronts, stage) as page:
        for parts in PHASES.values():

            async def act(peer: Peer, parts: list[bytes] | None = parts) -> None:
                if parts is not None:
                    await peer.head()
                    for part in parts:
                        await peer.chunk(part)
                await peer.gone()

            page.ask(act)
            if parts:
                expect(page.answer).to_have_text("one two")
            page.visit.page.locator(example.stop).click()
            call = stage.upstream.seen[-1]
            eventually(partial(getattr, call, "closed"))
            page.is_ready()
            expect(page.problem).to_be_hidden()
        expect(page.answer).to_have_text("one two")
        page.ask(answered("fine"))
        expect(page.answer).to_have_text("fine")


@pytest.mark.parametrize("example", EVERY, ids=str)
def test_half_an_answer_is_shown_as_such(
    example: Example, context: BrowserContext, fronts: dict[str, str], stage: Stage
) -> None:
    """A stream that is cut is an error on the page, beside what had come; it is not asked for again by itself.

    Whether the model's server left us, or we the browser.
    """

    async def talk(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(delta("three four"))
        await peer.gone()

    async def act(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(delta("one two"))
        peer.reset()

    before = len(stage.upstream.seen)
    with shown(example, context, fronts, stage) as page:
        page.ask(act)
        expect(page.problem).to_contain_text("broke off")
        expect(page.answer).to_have_text("one two")
        page.is_ready()
        page.visit.page.wait_for_timeout(200)
        page.ask(talk)
        expect(page.answer).to_have_text("three four")
        expect(page.problem).to_be_hidden()
        cut_connections(stage.proxy)
        expect(page.problem).to_be_visible()
        expect(page.answer).to_have_text("three four")
        page.is_ready()
        page.visit.page.wait_for_timeout(200)
        assert len(stage.upstream.seen) == before + 2
        page.ask(answered("fine"))
        expect(page.answer).to_have_text("fine")
        expect(page.problem).to_be_hidden()


def cut_connections(proxy: Running) -> None:
    """All of its clients' are closed, whatever was to come."""

    def cut() -> None:
        for connection in list(proxy.service.server.server_state.connections):
            cast(Any, connection).transport.abort()

    proxy.on_loop(cut)


@pytest.mark.parametrize("name", ["hook", "openai"])
def test_a_refusal_that_passes_is_waited_out(name: str, context: BrowserContext, bundles: Path) -> None:
    """While another tab is answered there is a 429; a client that honours its Retry-After is answered then."""
    settings = {"SERVER_STATIC_DIR": str(bundles), "POLICY_MODELS": "demo", "LIMITS_STREAMS_PER_SESSION": "1"}
    is_refused = threading.Event()
    with Stage("uvloop", **settings).open() as narrow:

        async def talk(peer: Peer) -> None:
            await peer.head()
            await peer.chunk(delta("one "))
            assert await asyncio.to_thread(is_refused.wait, PATIENCE)
            for part in (delta("two"), finish(), DONE):
                await peer.chunk(part)
            await peer.end()

        fronts = {"ours": narrow.proxy.url}
        with (
            shown(Example(name), context, fronts, narrow) as first,
            shown(Example(name), context, fronts, narrow) as second,
        ):
            second.visit.staged = {429}
            first.ask(talk)
            expect(first.answer).to_have_text("one")
            narrow.act = answered("fine")
            second.visit.page.locator(second.example.box).fill("hi")
            second.visit.page.locator(second.example.send).click()
            eventually(lambda: [line for line in narrow.proxy.lines() if line["code"] == "too_many_streams"])
            is_refused.set()
            expect(second.answer).to_have_text("fine")
            expect(second.problem).to_be_hidden()
            expect(first.answer).to_have_text("one two")
        assert len(narrow.upstream.seen) == 2


@pytest.mark.parametrize("example", EVERY, ids=str)
def test_a_refusal_is_shown(example: Example, context: BrowserContext, fronts: dict[str, str], stage: Stage) -> None:
    """A 429 is on the page in the server's words; the next question is answered, and does not take that one along."""

    async def act(peer: Peer) -> None:
        await peer.whole(b"{}", "429 Too Many Requests", "application/json", "retry-after: 90")

    with shown(example, context, fronts, stage) as page:
        page.visit.staged = {429}
        page.ask(act)
        expect(page.problem).to_contain_text("many requests")
        page.is_ready()
        page.ask(answered("fine"))
        expect(page.answer).to_have_text("fine")
        expect(page.problem).to_be_hidden()
        assert [message["role"] for message in stage.upstream.seen[-1].json["messages"]] == ["user"]


@pytest.mark.parametrize("example", EVERY, ids=str)
def test_enter_at_the_wrong_time(
    example: Example, context: BrowserContext, fronts: dict[str, str], stage: Stage
) -> None:
    """Without a question it asks nothing; while an answer comes it leaves what is being written, and the answer."""

    async def act(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(delta("one two"))
        await peer.gone()

    with shown(example, context, fronts, stage) as page:
        box = page.visit.page.locator(example.box)
        before = len(stage.upstream.seen)
        box.press("Enter")
        page.ask(act)
        expect(page.answer).to_have_text("one two")
        box.press_sequentially("next")
        box.press("Enter")
        written = box.evaluate("(it) => it.value ?? it.textContent")
        assert written.strip() == "next"
        assert not stage.upstream.seen[-1].closed
        page.visit.page.locator(example.stop).click()
        page.is_ready()
        assert len(stage.upstream.seen) == before + 1


@pytest.mark.parametrize("example", EVERY, ids=str)
def test_whoever_leaves_stops_the_answer(
    example: Example, context: BrowserContext, fronts: dict[str, str], stage: Stage
) -> None:
    """For another page: the browser may keep this one, with its request, and an event is all that it hears of it.

    Or for another part of the page: a component goes away.
    """

    async def act(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(delta("one two"))
        await peer.gone()

    with shown(example, context, fronts, stage) as page:
        page.ask(act)
        expect(page.answer).to_have_text("one two")
        page.visit.page.evaluate("dispatchEvent(new Event('pagehide'))")
        eventually(partial(getattr, stage.upstream.seen[-1], "closed"))
        page.is_ready()
        expect(page.problem).to_be_hidden()
        if example in COMPONENTS:
            page.ask(act)
            expect(page.answer).to_have_text("one two")
            page.visit.page.evaluate("leave()")
            eventually(partial(getattr, stage.upstream.seen[-1], "closed"))


RENDERING = """
import { renderToString } from "react-dom/server"; import { Chat } from "%s"; console.log(renderToString(<Chat />));
"""


@pytest.mark.parametrize("example", COMPONENTS, ids=str)
def test_a_server_may_render_it_first(example: Example, bundles: Path, tmp_path: Path) -> None:
    """As Next.js does, where there is no page yet and no location."""
    (tmp_path / "package.json").write_text('{"type": "commonjs"}')
    bundler = bundles.parent / "node_modules/.bin/esbuild"
    subprocess.run(
        [bundler, "--bundle", "--platform=node", "--jsx=automatic", "--loader=jsx", f"--outfile={tmp_path}/made.js"],
        input=RENDERING % (EXAMPLES / f"{example}.jsx"),
        env=environment() | {"NODE_PATH": str(bundles.parent / "node_modules")},
        cwd=bundles.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=BUNDLING,
    )
    made = subprocess.run(["node", tmp_path / "made.js"], capture_output=True, text=True, timeout=BUNDLING, check=False)
    assert 'aria-label="Message"' in made.stdout, made.stderr


def test_the_two_lines_of_the_readme_are_those_that_are_tested() -> None:
    lines = re.findall(r"^\+(  \w+: .*)$", (ROOT / "docs/clients.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    assert "\n".join(lines) in (EXAMPLES / "openai.jsx").read_text()


# ---- the hook -------------------------------------------------------------------------------------------------------

PROBES = ["probe", "probe-18"]


@pytest.mark.parametrize("name", PROBES)
def test_the_hook_renders_once_a_flush(
    name: str, context: BrowserContext, fronts: dict[str, str], stage: Stage
) -> None:
    """A thousand tokens cost a render every 50 ms at most, and none is lost."""
    words = [f"w{number} " for number in range(1000)]

    async def act(peer: Peer) -> None:
        await peer.head()
        for at in range(0, len(words), 10):
            await peer.chunk(b"".join(map(delta, words[at : at + 10])))
            await asyncio.sleep(0.005)
        for part in (finish(), DONE):
            await peer.chunk(part)
        await peer.end()

    with shown(Example(name), context, fronts, stage) as page:
        stage.act = act
        page.visit.page.get_by_role("button", name="Send").click()
        expect(page.answer).to_have_text("".join(words).strip())
        commits = page.visit.page.evaluate("commits")
        total = page.visit.page.evaluate("metrics.total_ms")
        assert (
            len(commits) <= total / 50 + 6
        )  # the first two (StrictMode), the question, the first flush, the last, the end
        assert len(commits) >= 8
        assert [len(text) for text in commits[3:]] == sorted(len(text) for text in commits[3:])


@pytest.mark.parametrize("name", PROBES)
def test_a_hook_that_goes_away_stops_its_answer(
    name: str, context: BrowserContext, fronts: dict[str, str], stage: Stage
) -> None:
    """The upstream is told, React has nothing to complain about, and what comes back in its place works."""

    async def act(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(delta("one "))
        await peer.gone()

    with shown(Example(name), context, fronts, stage) as page:
        before = len(stage.upstream.seen)
        stage.act = act
        page.visit.page.get_by_role("button", name="Send").click()
        expect(page.answer).to_have_text("one")
        page.visit.page.get_by_role("button", name="Leave").click()
        eventually(lambda: stage.upstream.seen[before].closed)
        stage.act = answered("fine")
        page.visit.page.get_by_role("button", name="Come back").click()
        page.visit.page.get_by_role("button", name="Send").click()
        expect(page.answer).to_have_text("fine")
        assert len(stage.upstream.seen) == before + 2


# ---- a dev server ---------------------------------------------------------------------------------------------------


def test_vite_passes_the_api_on(
    tmp_path: Path, bundles: Path, context: BrowserContext, ports: dict[str, int], stage: Stage
) -> None:
    """The recipe of docs/clients.md, with the real dev server: words arrive at once, and Stop reaches the upstream."""
    recipe = re.search(r"```js\n(// vite\.config\.js\n.*?)```", (ROOT / "docs/clients.md").read_text(), re.DOTALL)
    assert recipe
    configuration = recipe[1].replace("http://127.0.0.1:8000", stage.proxy.url)
    (tmp_path / "vite.config.js").write_text(configuration)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "node_modules").mkdir()  # vite keeps what it made in there
    for package in (bundles.parent / "node_modules").iterdir():
        (tmp_path / "node_modules" / package.name).symlink_to(package)
    for source in ("chat", "examples"):
        shutil.copytree(ROOT / "static" / source, tmp_path / source)
    (tmp_path / "index.html").write_text(
        '<!doctype html><link rel="icon" href="data:,"><div id="root"></div>'
        '<script type="module" src="main.jsx"></script>'
    )
    (tmp_path / "main.jsx").write_text(
        'import { createRoot } from "react-dom/client"; import { Chat } from "./examples/hook.jsx";'
        'createRoot(document.getElementById("root")).render(<Chat />);'
    )

    async def act(peer: Peer) -> None:
        await peer.head()
        await peer.chunk(delta("one two"))
        await peer.gone()

    port = str(ports["vite"])
    url = f"http://localhost:{port}"
    command = ["node", "node_modules/vite/bin/vite.js", "--port", port, "--strictPort", "--clearScreen=false"]
    with serving(*command, url=url, folder=tmp_path):
        visit = PageVisit(context.new_page(), url)
        visit.watch()
        visit.page.goto(visit.url)
        page = Shown(Example("hook"), visit, stage)
        page.ask(act)
        expect(page.answer).to_have_text("one two")
        visit.page.locator("text=Stop").click()
        eventually(lambda: stage.upstream.seen[-1].closed)
        page.ask(answered("fine"))
        expect(page.answer).to_have_text("fine")


def test_a_page_is_built_without_a_key(tmp_path: Path) -> None:
    """The lines of docs/clients.md: the demo model behind the server, for a page that names another model."""
    recipe = re.search(r"```sh\n(chat-proxy upstream &\n.*?)```", (ROOT / "docs/clients.md").read_text(), re.DOTALL)
    assert recipe
    upstream, server = free_port(), free_port()
    command = Path(sys.executable).with_name("chat-proxy")
    lines = recipe[1].replace("upstream &", f"upstream --port {upstream} &").replace(":9000", f":{upstream}")
    script = re.sub(r"\bchat-proxy (?=upstream|serve)", f"{command} ", lines)
    variables = environment(SERVER_PORT=str(server))
    dev = "http://localhost:5173"
    body = {"model": "selam-turbo", "messages": [{"role": "user", "content": "hello"}]}
    with subprocess.Popen(["sh", "-c", script], cwd=tmp_path, env=variables, start_new_session=True) as shell:
        try:
            eventually(lambda: is_open(server) and is_open(upstream), BUNDLING)
            headers = {"host": "localhost:5173", "origin": dev, "sec-fetch-site": "same-origin"}
            url = f"http://127.0.0.1:{server}/api"
            with httpx.Client(trust_env=False, headers=headers) as page:
                page.get(f"{url}/session").raise_for_status()
                answered = page.post(f"{url}/chat", json=body).raise_for_status()
            assert answered.json()["model"] == "demo"
            unnamed = {"host": "localhost:5174", "origin": "http://localhost:5174", "sec-fetch-site": "same-origin"}
            with httpx.Client(trust_env=False, headers=unnamed) as page:
                refused = page.post(f"{url}/chat", json=body)
            assert refused.status_code == 403
            assert "server.extra_origins" in refused.text  # it says what was forgotten
        finally:
            os.killpg(shell.pid, signal.SIGTERM)


# ---- what is served -------------------------------------------------------------------------------------------------

UNSERVED = ["/examples", "/examples/", "/examples/hook.jsx", "//examples/hook.jsx", "/chat/../examples/hook.jsx"]


def test_our_examples_are_not_served(stage: Stage) -> None:
    """They are sources to copy from; a folder of that name in a page of one's own is served."""
    with running(stage.upstream.base_url) as proxy:
        for path in UNSERVED:
            assert send(proxy, "GET", path).status in (400, 404), path
        reply = send(proxy, "GET", "/examples/hook.jsx")
        assert (reply.status, reply.error["code"]) == (404, "not_found")
        assert send(proxy, "GET", "/chat/react.js").status == 200


def test_a_folder_of_that_name_in_a_page_of_ones_own_is_served(tmp_path: Path, stage: Stage) -> None:
    """The rule is about our page."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/mine.txt").write_text("mine")
    with running(stage.upstream.base_url, SERVER_STATIC_DIR=str(tmp_path)) as proxy:
        assert send(proxy, "GET", "/examples/mine.txt").body == b"mine"


def test_an_installed_package_serves_the_page_without_them(tmp_path: Path) -> None:
    """The wheel as it is built: the page and its modules are there, and the examples are a 404."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check"]
    built = subprocess.run([*pip, "-w", str(tmp_path), str(ROOT)], capture_output=True, text=True, timeout=BUNDLING)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    command = ["env", f"PYTHONPATH={tmp_path}", "PYTHONSAFEPATH=1", *COMMAND]
    with started(tmp_path, "demo", "--port", "0", given={}, command=command) as process:
        url_printed(process)
        expected = {"/": 200, "/chat/client.js": 200, "/chat/client.d.ts": 200, "/examples/hook.jsx": 404}
        assert {path: process.get(path)[0] for path in expected} == expected


# ---- what is committed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [TOOLS, TOOLS / "react-18"], ids=lambda place: place.name)
def test_the_locks_record_no_address(place: Path) -> None:
    """They say what each package must be (a version and a digest), not where it was found."""
    lock = json.loads((place / "package-lock.json").read_text())
    wanted = json.loads((place / "package.json").read_text())["dependencies"]
    packages = {name.removeprefix("node_modules/"): found for name, found in lock["packages"].items() if name}
    assert {name: packages[name]["version"] for name in wanted} == wanted
    assert all(found["integrity"].startswith("sha512-") for found in packages.values())
    assert "resolved" not in str(lock)
    assert "://" not in str(lock)
