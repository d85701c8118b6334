"""The page of a login that failed: the browser comes from the provider and runs no script of ours there."""

from __future__ import annotations

FAILED_LOGINS = {
    400: "The sign-in took too long, was started in another window, or was cancelled.",
    403: "Your account was recognised, but it may not use this chat. Please ask the operator.",
    502: "The sign-in service did not answer correctly. Please try again in a few minutes.",
}


def failed_login(status: int, request_id: str) -> bytes:
    """An HTML page with the cause and the next step. It contains no text from outside but a checked request id."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Signing in did not work</title>
<main>
<h1>Signing in did not work</h1>
<p>{FAILED_LOGINS[status]}</p>
<p><a href="/api/session/login">Sign in again</a>, or go back to <a href="/">the chat</a>.</p>
<p><small>Request {request_id}</small></p>
</main>
</html>
""".encode()
