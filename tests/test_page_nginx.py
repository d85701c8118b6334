"""The page as nginx serves it from disk, with nothing but `/api/` passed on to the server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from browser import Visit
from harness import GOOD, ScriptedUpstream, eventually, running, streaming
from playwright.sync_api import BrowserContext, expect

from proxy.page import PAGE_POLICY

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "/srv/chat/static"  # in the README's example
CONFIGURATION = """
daemon off; master_process off; pid {folder}/pid; error_log stderr crit;
events {{ worker_connections 64; }}
http {{
  include /etc/nginx/mime.types; access_log {folder}/access.log;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port};
    location /api/ {{
      proxy_pass http://127.0.0.1:{proxy}; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For $remote_addr; proxy_buffering off;
    }}
    {files}
  }}
}}
"""


def readme_location() -> str:
    """What the README says about serving the files."""
    blocks = re.findall(r"```nginx\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if FOLDER in block]
    return str(found)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def nginx(folder: Path, port: int, proxy: int) -> Iterator[None]:
    """nginx on this port, with a copy of the page and the server behind it."""
    shutil.copytree(ROOT / "static", folder / "static")
    files = readme_location().replace(FOLDER, str(folder / "static"))
    configuration = folder / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, port=port, proxy=proxy, files=files))
    with subprocess.Popen(["/usr/sbin/nginx", "-c", str(configuration), "-p", str(folder)]) as process:
        try:
            eventually(lambda: answers(port))
            yield
        finally:
            process.terminate()


def test_the_page_from_disk(tmp_path: Path, context: BrowserContext) -> None:
    """It chats, with a session; only /api/ reaches the server; and no script but its own runs, by its own policy."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (
        ScriptedUpstream(streaming(*GOOD)) as upstream,
        running(upstream.base_url, SERVER_PUBLIC_URL=url, SERVER_STATIC_DIR="") as proxy,
        nginx(tmp_path, port, proxy.port),
        Visit.of(context, url) as visit,
    ):
        visit.ask("hello", "m")
        visit.expect_state("complete")
        expect(visit.text).to_have_text("Hello")
        assert [cookie["httpOnly"] for cookie in context.cookies()] == [True]
        error = "() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } }"
        assert visit.page.evaluate(error) == "TypeError"
        eventually(
            lambda: visit.page.evaluate("() => true") and len(visit.faults) == 2
        )  # the browser reports it, and Visit
        visit.forgive("CSP: require-trusted-types-for refused trusted-types-sink")
        visit.forgive("requires 'TrustedHTML' assignment")
        eventually(lambda: {line["route"].split()[1] for line in proxy.lines()} == {"/api/session", "/api/chat"})
    assert "GET /page.js HTTP/1.1" in (tmp_path / "access.log").read_text()


def test_the_page_has_the_policy_that_the_server_sends() -> None:
    """But for what only a header can say."""
    page = (ROOT / "static/index.html").read_text()
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert found is not None
    assert found[1] == PAGE_POLICY.replace("frame-ancestors 'none'; ", "")
