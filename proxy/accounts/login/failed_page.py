"""TODO."""

from __future__ import annotations

FAILED_LOGINS = {
    400: "It took too long, was begun in another window, or was broken off.",
    403: "You are known there, but this chat is not open to your account. Please ask the people who run it.",
    502: "The service that knows who you are does not answer as it should. Please try again in a few minutes.",
}


def failed_login(status: int, request_id: str) -> bytes:
    """The page that says so, and what to do. Nothing in it came from outside: an id of a harmless shape at most."""
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
