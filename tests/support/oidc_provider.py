"""An OpenID provider that others wrote (npm's oidc-provider), as a process of its own on loopback.

    with start("client", "secret", "http://127.0.0.1:8000/api/session/callback") as issuer:
        ...

tests/oidc/provider.mjs says who can log in there: anybody. The package comes from the npm registry into a folder that
is kept between runs; tests/oidc/package-lock.json says what it must be.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from support.npm import installed

PROVIDER = Path(__file__).parent / "oidc"
PATIENCE = 20.0  # seconds to start, to stop, or for an answer
MOST_PAGES = 10  # from the login to the callback; it takes six


@contextmanager
def start(client_id: str, client_secret: str, redirect_uri: str, **metadata: object) -> Iterator[str]:
    """The issuer's URL, while it runs. `metadata` is more of the client's, such as post_logout_redirect_uris."""
    client = {"client_id": client_id, "client_secret": client_secret, "redirect_uris": [redirect_uri], **metadata}
    with subprocess.Popen(
        ["node", "provider.mjs"],
        cwd=installed("oidc", PROVIDER.iterdir()),
        env={**os.environ, "OIDC_CLIENT": json.dumps(client)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # it warns of being what it is: for development
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            printed = re.fullmatch(r"issuer (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
            assert printed, "the provider did not start"
            yield printed[1]
        finally:
            process.terminate()
            process.wait(PATIENCE)


def log_in(authorization_url: str, redirect_uri: str, name: str) -> httpx.URL:
    """Goes where a browser is sent, fills in the forms as `name`, and returns the callback that it ends at."""
    with httpx.Client(trust_env=False, timeout=PATIENCE) as browser:
        answer = browser.get(authorization_url)
        for _ in range(MOST_PAGES):
            if answer.is_redirect:
                target = answer.next_request
                assert target is not None
                if str(target.url).startswith(redirect_uri):
                    return target.url
                answer = browser.send(target)
            else:
                assert answer.status_code == 200, answer.text
                action, fields = form_of(answer, name)
                answer = browser.post(action, data=fields)
    raise AssertionError("the provider does not come to an end")


def form_of(page: httpx.Response, name: str) -> tuple[httpx.URL, dict[str, str]]:
    """The page's form, filled in: where it is posted to, and its fields."""
    action = re.search(r'<form[^>]* action="([^"]+)"', page.text)
    assert action is not None, page.text
    hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', page.text))
    typed = {field: name for field in ("login", "password") if f'name="{field}"' in page.text}
    return page.url.join(html.unescape(action[1])), hidden | typed
