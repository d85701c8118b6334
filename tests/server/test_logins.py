"""Logging in: a password, an identity from a proxy in front, and revoking by hand. All through the real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from hypothesis import given
from hypothesis import strategies as st
from support.commands import run, settings_for
from support.harness import (
    GOOD,
    LOOPS,
    STARTING,
    Clock,
    Reply,
    Running,
    ScriptedUpstream,
    chat,
    eventually,
    running,
    send,
    streaming,
)

from proxy.accounts.login import password as room
from proxy.accounts.login.password import FREE_ATTEMPTS, LONGEST_PAUSE, MOST_NAMES, Backoff, Passwords
from proxy.accounts.modes.header import user_from_header
from proxy.accounts.revocation import watcher as revoked
from proxy.accounts.revocation.file import ControlFile
from proxy.accounts.revocation.rules import RevocationRules
from proxy.accounts.session import Session
from proxy.cli import main as cli
from proxy.errors import Busy, Forbidden, InvalidCredentials, LoginRequired, Refusal, TooMany
from proxy.settings import SettingsError
from proxy.web.client import Caller

RIGHT = "correct horse"
cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash
ALICE, BOB = f"alice:{cheap(RIGHT)}", f"bob:{cheap('battery staple')}"
numbers = itertools.count(1)


@contextmanager
def serving(mode: str = "password", loop: str = "uvloop", **more: str) -> Iterator[Running]:
    given = {"SESSION_MODE": mode, **({"SESSION_PASSWORDS": f"{ALICE}\n{BOB}"} if mode == "password" else {}), **more}
    with ScriptedUpstream(streaming(*GOOD)) as upstream, running(upstream.base_url, loop=loop, **given) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def proxy() -> Iterator[Running]:
    with serving() as proxy:
        yield proxy


def new_address() -> dict[str, str]:
    number = next(numbers)
    return {"x-forwarded-for": f"198.19.{number >> 8}.{number & 255}"}


def login(proxy: Running, user: str | None = "alice", password: str = RIGHT, **headers: str) -> Reply:
    body = {"password": password, **({"user": user} if user is not None else {})}
    return post(proxy, json.dumps(body).encode(), **headers)


def post(proxy: Running, body: bytes, **headers: str) -> Reply:
    sent = {"content-type": "application/json", **new_address(), **{k.replace("_", "-"): v for k, v in headers.items()}}
    return send(proxy, "POST", "/api/session", body, sent)


def account(proxy: Running, cookie: str = "", **headers: str) -> dict[str, Any]:
    reply = send(
        proxy, "GET", "/api/session", None, {**new_address(), **headers, **({"cookie": cookie} if cookie else {})}
    )
    assert reply.status == 200
    found: dict[str, Any] = reply.json
    return found


def asked(proxy: Running, cookie: str = "", **headers: str) -> tuple[int, str | None]:
    reply = chat(proxy, headers={**new_address(), **({"cookie": cookie} if cookie else {}), **headers})
    return reply.status, None if reply.status == 200 else reply.error["code"]


# ---- a password -----------------------------------------------------------------------------------------------------


def test_without_a_login_there_is_nothing(proxy: Running) -> None:
    assert asked(proxy) == (401, "login_required")
    shown = account(proxy)
    assert shown["session"] == {"mode": "password", "user": None, "expires_at": None}
    assert shown["limits"] == []
    assert send(proxy, "GET", "/api/session", None, new_address()).headers["set-cookie"] is None


def test_who_knows_the_password_may_ask(proxy: Running) -> None:
    reply = login(proxy)
    assert reply.status == 200
    assert reply.json["session"]["mode"] == "password"
    assert reply.json["session"]["user"] == "alice"
    assert reply.json["session"]["expires_at"] > time.time()
    assert {limit["name"].split()[0] for limit in reply.json["limits"]} == {
        "per_session",
        "per_address",
        "tokens_per_session",
    }
    flags = reply.headers["set-cookie"]
    assert "HttpOnly" in flags
    assert "SameSite=Strict" in flags
    assert asked(proxy, reply.cookie) == (200, None)
    assert account(proxy, reply.cookie)["session"] == reply.json["session"]
    line = proxy.line_of(reply, "login")
    assert (line["mode"], line["user"]) == ("password", "alice")
    assert line["session"] not in reply.cookie


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("alice", "wrong"),
        ("alice", ""),
        ("bob", RIGHT),
        ("nobody", RIGHT),
        ("", RIGHT),
        (None, RIGHT),
        ("Alice", RIGHT),
    ],
)
def test_who_does_not_may_not(proxy: Running, user: str | None, password: str) -> None:
    reply = login(proxy, user, password)
    assert (reply.status, reply.error["code"]) == (401, "invalid_credentials")
    assert reply.headers["set-cookie"] is None
    line = proxy.line_of(reply, "login_failed")
    assert line["user"] == (user if user in ("alice", "bob") else None)  # a password may stand in the wrong field
    assert RIGHT.encode() not in proxy.output.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        *(b"[]", b'"x"', b"{}", b'{"password":1}', b'{"password":"x","user":1}', b'{"password":"x","more":1}'),
        *(b'{"password":"%b"}' % (b"x" * 1025), b"[" * 3000),
    ],
)
def test_what_is_no_login_is_refused(proxy: Running, body: bytes) -> None:
    reply = post(proxy, body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("body", [b"", b"{", b'{"password":"x"} y', b'{"password":"\xff"}', b"password=x"])
def test_a_login_that_is_no_json_is_told_so(proxy: Running, body: bytes) -> None:
    """By the code that a question would get."""
    reply = post(proxy, body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")


def test_a_login_keeps_to_the_rules_of_every_post(proxy: Running) -> None:
    assert post(proxy, b"{}", sec_fetch_site="cross-site").error["code"] == "cross_origin"
    assert post(proxy, b"{}", origin="https://evil.example").error["code"] == "cross_origin"
    assert post(proxy, b"{}", content_type="text/plain").error["code"] == "unsupported_media_type"
    assert post(proxy, b" " * 5000).error["code"] == "body_too_large"


def test_a_login_begins_a_new_session_and_ends_the_old(proxy: Running) -> None:
    first = login(proxy).cookie
    second = login(proxy, cookie=first).cookie
    assert first != second
    assert asked(proxy, second) == (200, None)
    assert asked(proxy, first) == (401, "session_required")


def test_leaving_ends_it(proxy: Running) -> None:
    cookie = login(proxy).cookie
    reply = send(proxy, "DELETE", "/api/session", None, {"cookie": cookie, **new_address()})
    assert reply.json == {"logout_url": None}
    assert asked(proxy, cookie) == (401, "session_required")
    assert proxy.line_of(reply, "logout")["user"] == "alice"


def test_a_user_has_one_allowance() -> None:
    """... however many sessions and addresses, and does not use up that of others behind the same address."""
    with serving(LIMITS_PER_SESSION="2/hour", LIMITS_TOKENS_PER_ADDRESS="1/day") as proxy:
        here = new_address()
        assert [asked(proxy, login(proxy).cookie, **here)[0] for _ in range(3)] == [200, 200, 429]
        assert asked(proxy, login(proxy, "bob", "battery staple").cookie, **here) == (200, None)


def test_a_shared_password() -> None:
    """With a shared password each session has its own allowance, and sessions are counted like anonymous ones."""
    with serving(SESSION_PASSWORDS=cheap(RIGHT), LIMITS_PER_SESSION="1/hour", LIMITS_NEW_SESSIONS="2/hour") as proxy:
        one, two = login(proxy, None), login(proxy, None)
        assert one.json["session"]["user"] is None
        assert [asked(proxy, one.cookie)[0], asked(proxy, two.cookie)[0], asked(proxy, one.cookie)[0]] == [
            200,
            200,
            429,
        ]
        here = new_address()["x-forwarded-for"]
        codes = [login(proxy, None, x_forwarded_for=here).status for _ in range(3)]
        assert codes == [200, 200, 429]
        assert login(proxy, "somebody").status == 401


def test_guessing_is_slow(proxy: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most ten tries a minute of one address reach argon2, right or wrong."""
    reached: list[str] = []
    real = room.verify

    def verify(hash_: str, password: str) -> bool:
        reached.append(password)
        return real(hash_, password)

    monkeypatch.setattr(room, "verify", verify)
    here = new_address()["x-forwarded-for"]
    replies = [login(proxy, f"user{number}", "guess", x_forwarded_for=here) for number in range(12)]
    assert [reply.status for reply in replies] == [401] * 10 + [429] * 2
    assert replies[-1].error["code"] == "rate_limited"
    assert 50 <= int(replies[-1].headers["retry-after"]) <= 60
    assert len(reached) == 10


def test_wrong_tries_slow_a_name_down() -> None:
    """At that address; the delay does not reveal whether the user exists, and locks no user out, there or elsewhere."""
    with serving() as proxy:
        for user in ("alice", "nobody"):
            here = new_address()["x-forwarded-for"]
            for _ in range(FREE_ATTEMPTS):
                assert login(proxy, user, "wrong", x_forwarded_for=here).status == 401
            reply = login(proxy, user, RIGHT, x_forwarded_for=here)
            assert (reply.status, reply.error["code"]) == (429, "rate_limited")
            assert reply.headers["retry-after"] == "1"
            assert '"logins 10/minute";r=' in reply.headers["ratelimit"]
        assert login(proxy).status == 200


def test_a_user_who_is_gone_is_out(tmp_path: Path) -> None:
    """SIGHUP reads the passwords again: a removed user has no session any more."""
    file = tmp_path / "passwords"
    file.write_text(f"{ALICE}\n{BOB}\n")
    with serving(SESSION_PASSWORDS="", SESSION_PASSWORDS_FILE=str(file)) as proxy:
        alice, bob = login(proxy).cookie, login(proxy, "bob", "battery staple").cookie
        file.write_text(f"{BOB}\n")
        proxy.on_loop(proxy.service.app.reload_secrets)
        assert asked(proxy, bob) == (200, None)
        assert asked(proxy, alice) == (401, "login_required")
        assert login(proxy).status == 401


def test_a_session_of_another_mode_is_none(tmp_path: Path) -> None:
    """A change to `password` mode ends the sessions of the mode before."""
    secret = {"SESSION_SECRET": "s" * 40, "SERVER_PUBLIC_URL": "http://127.0.0.1:8000"}
    hosts = {"host": "127.0.0.1:8000"}
    with serving("anonymous", **secret) as open_door:
        cookie = chat(open_door, headers=hosts).cookie
    with serving(**secret) as closed_door:
        assert asked(closed_door, cookie, **hosts) == (401, "login_required")
        named = login(closed_door, host="127.0.0.1:8000").cookie
        assert asked(closed_door, named, **hosts) == (200, None)
    with serving("anonymous", **secret) as open_door:
        reply = chat(open_door, headers={"cookie": named, **hosts})
        assert reply.status == 200
        assert reply.cookie not in ("", named)


@pytest.mark.parametrize("mode", ["anonymous", "header"])
def test_no_password_in_other_modes(mode: str) -> None:
    with serving(mode) as proxy:
        assert post(proxy, b"{}").status == 405


def test_argon2_is_bounded() -> None:
    passwords = Passwords([ALICE], time.monotonic)
    passwords.waiting = room.MOST_WAITING
    for _ in range(FREE_ATTEMPTS):
        with pytest.raises(Busy):
            asyncio.run(passwords.check("alice", RIGHT, "here"))
    passwords.waiting = 0
    asyncio.run(passwords.check("alice", RIGHT, "here"))  # nobody had looked at them: they were no wrong ones
    passwords.close()


def test_a_password_that_is_changed_while_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed password fails a login with the old one: the session would carry the mark of the new one."""
    passwords = Passwords([ALICE], time.monotonic)

    def verify(hash_: str, password: str) -> bool:
        passwords.use([f"alice:{cheap('another')}"])
        return True

    monkeypatch.setattr(room, "verify", verify)
    with pytest.raises(InvalidCredentials):
        asyncio.run(passwords.check("alice", RIGHT, "here"))
    passwords.close()


A, B = ("a", "here"), ("b", "here")


def test_backoff_grows_to_its_bound_and_is_forgotten() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    pauses = []
    for _ in range(FREE_ATTEMPTS + 2000):
        backoff.begin(A)
        pauses.append(pause_of(backoff, A))
        clock.now += pauses[-1]
    assert pauses[: FREE_ATTEMPTS + 8] == [0] * (FREE_ATTEMPTS - 1) + [1, 2, 4, 8, 16] + [LONGEST_PAUSE] * 4
    assert set(pauses[FREE_ATTEMPTS + 8 :]) == {LONGEST_PAUSE}
    backoff.succeeded(A)
    assert pause_of(backoff, A) == 0
    for _ in range(FREE_ATTEMPTS):
        backoff.begin(B)
    assert pause_of(backoff, B) == 1
    assert pause_of(backoff, ("b", "elsewhere")) == 0
    clock.now += room.FORGOTTEN_AFTER
    assert pause_of(backoff, B) == 0
    for number in range(MOST_NAMES + 10):
        backoff.begin((str(number), "here"))
    assert len(backoff.attempts) == MOST_NAMES


def pause_of(backoff: Backoff, who: tuple[str, str]) -> float:
    """Seconds that the next try would have to wait; it is not made."""
    tries = dict(backoff.attempts)
    try:
        backoff.begin(who)
    except TooMany as refusal:
        return refusal.retry_after or 0
    finally:
        backoff.attempts.clear()
        backoff.attempts.update(tries)
    return 0


def test_guesses_at_the_same_time_are_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted before their work is done, not when it shows that they were wrong."""
    monkeypatch.setattr(room, "verify", lambda hash_, password: time.sleep(0.05))
    passwords = Passwords([ALICE], time.monotonic)

    async def guess() -> list[BaseException | None]:
        tries = (passwords.check("alice", str(number), "here") for number in range(12))
        return await asyncio.gather(*tries, return_exceptions=True)

    refusals = asyncio.run(guess())
    assert sum(isinstance(refusal, InvalidCredentials) for refusal in refusals) == FREE_ATTEMPTS
    assert sum(isinstance(refusal, TooMany) for refusal in refusals) == 12 - FREE_ATTEMPTS
    passwords.close()


def test_dummy_hash_work_is_that_of_the_costliest() -> None:
    dear = PasswordHasher(time_cost=2, memory_cost=16, parallelism=1).hash("x")
    passwords = Passwords([ALICE, f"dear:{dear}"], time.monotonic)
    assert passwords.dummy_hash.split("$")[3] == dear.split("$")[3]
    passwords.close()


def test_passwords_are_read_without_hashing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP reads them without delaying answers: the dummy hash is derived without hashing."""
    dear = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1, hash_len=20).hash("x")
    with monkeypatch.context() as patch:
        patch.setattr(PasswordHasher, "hash", lambda *given: pytest.fail("hashed"))
        passwords = Passwords([f"dear:{dear}"], time.monotonic)
    assert len(passwords.dummy_hash) == len(dear)
    with pytest.raises(VerifyMismatchError):
        PasswordHasher().verify(passwords.dummy_hash, "x")
    passwords.close()


def test_a_changed_password_ends_sessions(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text(f"{ALICE}\n{BOB}\n")
    with serving(SESSION_PASSWORDS="", SESSION_PASSWORDS_FILE=str(file)) as proxy:
        alice, bob = login(proxy).cookie, login(proxy, "bob", "battery staple").cookie
        file.write_text(f"alice:{cheap('another')}\n{BOB}\n")
        proxy.on_loop(proxy.service.app.reload_secrets)
        assert asked(proxy, alice) == (401, "login_required")
        assert asked(proxy, bob) == (200, None)
        assert asked(proxy, login(proxy, "alice", "another").cookie) == (200, None)


# ---- an identity from a proxy in front ------------------------------------------------------------------------------

ANN = {"x-forwarded-email": "ann@example.org"}


@pytest.fixture(scope="module")
def behind() -> Iterator[Running]:
    with serving("header") as proxy:
        yield proxy


def test_whom_the_proxy_names_is_in(behind: Running) -> None:
    reply = chat(behind, headers={**ANN, **new_address()})
    assert reply.status == 200
    assert account(behind, reply.cookie, **ANN)["session"]["user"] == "ann@example.org"
    assert account(behind, **ANN)["session"]["mode"] == "header"


def test_whom_the_proxy_does_not_name_is_not(behind: Running) -> None:
    assert asked(behind) == (401, "login_required")
    assert account(behind)["session"] == {"mode": "header", "user": None, "expires_at": None}


def test_a_cookie_alone_is_no_identity(behind: Running) -> None:
    """The proxy in front must vouch for each request: its logout is ours, and its user is ours."""
    cookie = chat(behind, headers={**ANN, **new_address()}).cookie
    assert asked(behind, cookie) == (401, "login_required")
    other = account(behind, cookie, **{"x-forwarded-email": "bob@example.org"})
    assert other["session"]["user"] == "bob@example.org"


def test_nobody_else_is_believed() -> None:
    with serving("header", SERVER_TRUSTED_PROXIES="10.0.0.1/32") as proxy:
        assert asked(proxy, **ANN) == (403, "not_allowed")
        assert asked(proxy) == (401, "login_required")
        assert "ann@" not in proxy.output.getvalue().decode()


TRUSTED, STRANGER = Caller("k", "s", through_proxy=True), Caller("k", "s", through_proxy=False)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"ann@example.org", "ann@example.org"),
        (" ሰላም ".encode(), "ሰላም"),
        (b"", LoginRequired),
        (b"  ", LoginRequired),
        (None, LoginRequired),
        (b"ann@example.org, bob@example.org", Forbidden),  # the header came twice
        (b"\xff", Forbidden),
        (b"a\x00b", Forbidden),
        (b"x" * 257, Forbidden),
    ],
)
def test_vouched(written: bytes | None, expected: str | type[Refusal]) -> None:
    found = {} if written is None else {b"x-user": written}
    if isinstance(expected, str):
        assert user_from_header(found, b"x-user", TRUSTED) == expected
    else:
        with pytest.raises(expected):
            user_from_header(found, b"x-user", TRUSTED)
    if written is not None:
        with pytest.raises(Forbidden):
            user_from_header(found, b"x-user", STRANGER)


@given(st.binary())
def test_no_bytes_make_vouched_fail(written: bytes) -> None:
    with suppress(Refusal):
        assert user_from_header({b"x": written}, b"x", TRUSTED).strip()


# ---- revoking by hand -----------------------------------------------------------------------------------------------


def revoke(*arguments: str, control: Path, **more: str) -> subprocess.CompletedProcess[str]:
    given = {**settings_for("https://api.example.com/v1"), "SESSION_CONTROL_FILE": str(control), **more}
    return run(control.parent, "sessions", "revoke", *arguments, **given)


@pytest.mark.process
@pytest.mark.parametrize("loop", LOOPS)
def test_revoking_a_user_by_hand(loop: str, tmp_path: Path) -> None:
    """A running server applies it within a second, others are not affected, and a new login is accepted."""
    control = tmp_path / "revoked.json"
    with serving(loop=loop, SESSION_CONTROL_FILE=str(control)) as proxy:
        alice, bob = login(proxy).cookie, login(proxy, "bob", "battery staple").cookie
        done = revoke("--user", "alice", control=control)
        assert (done.returncode, str(control) in done.stdout, "The file is new" in done.stderr) == (0, True, True)
        eventually(lambda: asked(proxy, alice) == (401, "session_required"), 10 * revoked.CHECK_EVERY)
        assert asked(proxy, bob) == (200, None)
        assert "session.mode is anonymous" in done.stderr  # as these settings have it, the server's not
        again = login(proxy).cookie
        assert asked(proxy, again) == (200, None)
        eventually(lambda: len(proxy.lines("revoked")) == 1)
        assert revoke("--all", control=control).returncode == 0
        eventually(lambda: asked(proxy, bob) == (401, "session_required"), 10 * revoked.CHECK_EVERY)
        assert asked(proxy, again) == (401, "session_required")
        assert asked(proxy, login(proxy).cookie) == (200, None)


@pytest.mark.process
def test_what_was_revoked_stays_so_after_a_restart(tmp_path: Path) -> None:
    control = tmp_path / "revoked.json"
    fixed = {
        "SESSION_SECRET": "s" * 40,
        "SESSION_CONTROL_FILE": str(control),
        "SERVER_PUBLIC_URL": "http://127.0.0.1:8000",
    }
    hosts = {"host": "127.0.0.1:8000"}
    with serving("anonymous", **fixed) as proxy:
        cookie = chat(proxy, headers=hosts).cookie
    assert revoke("--before", str(int(time.time()) + 0), control=control).returncode == 0
    assert revoke("--all", control=control).returncode == 0
    with serving("anonymous", **fixed) as proxy:
        assert asked(proxy, cookie, **hosts) == (401, "session_required")
        assert asked(proxy, **hosts) == (200, None)


@pytest.mark.process
def test_the_control_file_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the first state directory that systemd, or an image, names."""
    name = "chat-proxy.revoked.json"
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}:/nowhere")
    done = revoke("--all", control=Path(), SESSION_CONTROL_FILE="")
    assert (done.returncode, str(tmp_path / name) in done.stdout) == (0, True)
    assert (tmp_path / name).exists()


@pytest.mark.process
@pytest.mark.parametrize("arguments", [[], ["--all", "--user", "x"], ["--before", "never"], ["--before", "4000000000"]])
def test_what_revoke_does_not_take(arguments: list[str], tmp_path: Path) -> None:
    control = tmp_path / "revoked.json"
    assert revoke(*arguments, control=control).returncode == 2
    assert not control.exists()


@pytest.mark.process
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"everyone":"x"}', b"\xff"])
def test_a_control_file_of_something_else(content: bytes, tmp_path: Path) -> None:
    """At the start it is a fault; while serving the last word stands, and the log says so."""
    control = tmp_path / "revoked.json"
    with serving("anonymous", SESSION_CONTROL_FILE=str(control)) as proxy:
        control.write_bytes(content)
        (line,) = eventually(lambda: proxy.lines("control_file_unread"))
        assert "session.control_file" in line["fault"]
        assert asked(proxy) == (200, None)
    done = revoke("--all", control=control)
    assert done.returncode == 2
    assert f"session.control_file (from {control}): must be a file that `sessions revoke` wrote" in done.stderr
    assert control.read_bytes() == content


STEPS = st.one_of(st.just(("all",)), st.tuples(st.sampled_from(["user", "issue"]), st.sampled_from("ab")))


@given(st.lists(STEPS, max_size=20))
def test_decrees(steps: list[tuple[str, ...]]) -> None:
    """Sessions issued before a rule about them are revoked, later ones valid, in any order of rules."""
    decree, alive = RevocationRules(), dict[Session, bool]()
    for number, step in enumerate(steps):
        if step[0] == "issue":
            alive[Session(str(number), "password", step[1], 5, 5, decree.generation)] = True
        elif step[0] == "all":
            decree = decree.revoking_all(number)
            alive = dict.fromkeys(alive, False)
        else:
            decree = decree.revoking_user(step[1], number)
            alive = {session: lives and session.subject != step[1] for session, lives in alive.items()}
    assert {session: not decree.revokes(session) for session in alive} == alive


def test_decrees_of_two_places_hold_together() -> None:
    """Rules of a lost and restarted file, or of a file and a store, are merged in any order."""
    old = RevocationRules().revoking_user("a", 1000).revoking_all(1001)
    new = RevocationRules().revoking_user("b", 2000)
    issued = {user: Session("i", "password", user, 5, 5, 1500) for user in "abc"}
    for decree in (old.merged(new), new.merged(old)):
        assert [user for user, session in issued.items() if decree.revokes(session)] == ["b"]
        assert decree.generation == 2000
        assert all(decree.revokes(Session("i", "password", user, 5, 5, 1000)) for user in "abc")


def test_a_control_file_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    file = ControlFile(str(tmp_path / "revoked.json"))
    file.change(lambda decree: decree.revoking_all(7))
    with patch.object(Path, "read_bytes", side_effect=PermissionError(1, "no")), pytest.raises(SettingsError):
        ControlFile.read(file)
    assert file.read() == RevocationRules(7, 7)
    assert file.read() is None


@pytest.mark.parametrize("name", ["lock", "new"])
def test_a_link_beside_the_control_file_leads_nowhere(name: str, tmp_path: Path) -> None:
    """Root revokes in a folder of the server's user, where a link could redirect the write, or the ownership."""
    other = tmp_path / "other"
    other.write_bytes(b"of somebody else")
    other.chmod(0o600)
    file = ControlFile(str(tmp_path / "revoked.json"))
    (tmp_path / f"revoked.json.{name}").symlink_to(other)
    with suppress(SettingsError):
        file.change(lambda decree: decree.revoking_all(7))
    assert (other.read_bytes(), other.stat().st_mode & 0o777) == (b"of somebody else", 0o600)
    assert file.read() == (RevocationRules(7, 7) if name == "new" else None)


def test_decrees_before_a_moment() -> None:
    decree = RevocationRules().revoking_before(100, 200).revoking_before(50, 200)
    assert decree.revokes(Session("i", "anonymous", None, 99, 99, 9))
    assert not decree.revokes(Session("i", "anonymous", None, 100, 100))


# ---- making a line of the passwords' file ---------------------------------------------------------------------------


def hash_password(*arguments: str, given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy", "hash-password", *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=STARTING, check=False)


@pytest.mark.process
def test_hash_password() -> None:
    line = hash_password("alice", given="pass word\n").stdout.strip()
    user, _, made = line.partition(":")
    assert user == "alice"
    assert PasswordHasher().verify(made, "pass word")
    assert hash_password(given="x\n").stdout.startswith("$argon2id$")
    assert hash_password("a:b", given="x\n").returncode == 2
    assert hash_password(given="\n").returncode == 2


@pytest.mark.process
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_hash_password_that_is_no_text(locale: str) -> None:
    """Bytes that are not UTF-8, in the password or the name, could never be typed: a message, and exit 2."""
    command = [sys.executable, "-m", "proxy", "hash-password"]
    for user, password in ((b"alice", b"p\xff\n"), (b"al\xffce", b"p\n")):
        done = subprocess.run(
            [*command, user], input=password, capture_output=True, env={"LC_ALL": locale}, timeout=STARTING
        )
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"chat-proxy: the password must not be empty")
        assert done.stderr.count(b"\n") == 1


def test_hash_password_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its package the message names what to install."""
    monkeypatch.delitem(sys.modules, "proxy.accounts.login.password")
    monkeypatch.setitem(sys.modules, "argon2", None)
    assert cli.main(["hash-password", "alice"]) == 2
    assert "chat-proxy[login]" in capsys.readouterr().err


@pytest.mark.process
def test_hash_password_at_a_terminal() -> None:
    """It is asked for twice, unseen. Two different ones, or none (Ctrl-D), are reported."""

    def typed(*keys: bytes) -> tuple[int, str]:
        ours, theirs = os.openpty()
        command = [sys.executable, "-m", "proxy", "hash-password", "alice"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
            seen = b""
            for prompt, key in zip((b"Password: ", b"Once more: "), keys, strict=False):
                while not seen.endswith(prompt):
                    seen += os.read(ours, 4096)
                os.write(ours, key)
            code = process.wait(STARTING)
            os.set_blocking(ours, False)
            with suppress(BlockingIOError):
                seen += os.read(ours, 4096)
        os.close(theirs)
        os.close(ours)
        return code, seen.decode()

    code, said = typed(b"pass word\n", b"pass word\n")
    assert code == 0
    assert "pass word" not in said
    assert PasswordHasher().verify(said.splitlines()[-1].removeprefix("alice:"), "pass word")
    code, said = typed(b"one\n", b"other\n")
    assert (code, said.splitlines()[-1]) == (2, "chat-proxy: the two are not the same")
    code, said = typed(b"\x04")
    assert (code, "Traceback" in said, "must not be empty" in said) == (2, False, True)


def test_an_unknown_user_costs_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """One verification, with the same parameters."""
    hashes: list[str] = []

    def verify(hash_: str, password: str) -> bool:
        hashes.append(hash_)
        return True

    monkeypatch.setattr(room, "verify", verify)
    passwords = Passwords([ALICE], time.monotonic)
    asyncio.run(passwords.check("alice", "x", "here"))
    with pytest.raises(InvalidCredentials):
        asyncio.run(passwords.check("nobody", "x", "here"))
    assert [hash_.split("$")[1:4] for hash_ in hashes] == [ALICE.split(":")[1].split("$")[1:4]] * 2
    passwords.close()
