"""The session cookie: made, opened, renewed, revoked; and every way in which a cookie can be bad."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.cookies import SimpleCookie

import pytest
from hypothesis import given
from hypothesis import strategies as st
from itsdangerous import Signer
from support.harness import FULL

from proxy.accounts.revocation.rules import SWEEP_AFTER, Revocations
from proxy.accounts.session import LONGEST_COOKIE, SALT, Opened, Session, Sessions
from proxy.errors import Refusal, SessionExpired, Unauthenticated
from proxy.web.headers import set_cookie
from proxy.web.signing import SEPARATOR

MUTANTS = 100_000 if FULL else 3_000

HOUR, DAY = 3600, 86_400
LIFETIME, IDLE = 7 * DAY, DAY
NOW = 1_800_000_000
OLD, NEW = "old-" + secrets.token_urlsafe(32), "new-" + secrets.token_urlsafe(32)
ID = re.compile(r"[A-Za-z0-9_-]{22}")


def keyed(*keys: str, lifetime: int = LIFETIME, idle: int = IDLE) -> Sessions:
    return Sessions(list(keys or (NEW,)), lifetime=lifetime, idle=idle)


def minted(sessions: Sessions, now: float = NOW) -> Session:
    return sessions.mint(now, secrets.token_bytes(16))


def reopen(sessions: Sessions, session: Session, now: float = NOW, revocations: Revocations | None = None) -> Opened:
    return (revocations or Revocations()).check(sessions.open([sessions.seal(session).encode()], now))


def refused(sessions: Sessions, *cookies: bytes, now: float = NOW) -> Refusal:
    with pytest.raises(Refusal) as raised:
        Revocations().check(sessions.open(list(cookies), now))
    return raised.value


def signed(
    payload: str | bytes, key: str = NEW, salt: bytes = SALT, digest: Callable[..., object] = hashlib.sha256
) -> bytes:
    return Signer(key, salt, SEPARATOR, "hmac", digest).sign(payload)


# ---- made and opened -----------------------------------------------------------------------------------------------

subjects = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64)


@given(
    st.integers(0, 2**32),
    st.binary(min_size=16, max_size=16),
    st.sampled_from(["anonymous", "password", "oidc", "header"]),
    subjects,
    st.integers(0, 2**31),
)
def test_what_was_sealed_opens(now: int, randomness: bytes, mode: str, subject: str | None, generation: int) -> None:
    """A session opens to exactly what was sealed, for any subject; and its cookie needs no quoting."""
    sessions = keyed()
    session = replace(sessions.mint(now, randomness, mode=mode, subject=subject), generation=generation)
    assert reopen(sessions, session, now) == Opened(session, stale=False)
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", sessions.seal(session))


def test_minting_knows_no_one() -> None:
    """A new session holds the randomness as its id, the time in whole seconds, and nothing of anyone."""
    session = keyed().mint(NOW + 0.9, b"\xff" * 16)
    assert session == Session("_____________________w", "anonymous", None, NOW, NOW, 0)
    assert ID.fullmatch(session.id)


def test_cookie_hides_nothing_and_holds_no_key() -> None:
    """A cookie holds the subject and the times, and nothing else: a browser may read all of it."""
    sessions = keyed(NEW, OLD)
    session = sessions.mint(NOW, b"\0" * 16, mode="password", subject="ሰላም")
    id_, mode, subject, issued, renewed, generation, signature = sessions.seal(session).split(".")
    assert (id_, mode, issued, renewed, generation) == ("A" * 22, "password", str(NOW), str(NOW), "0")
    assert base64.urlsafe_b64decode(subject + "=").decode() == "ሰላም"
    assert len(signature) == 43
    assert NEW not in sessions.seal(session)


def test_a_users_longest_cookie_is_ours() -> None:
    """An anonymous cookie is far below the bound on what is read."""
    assert len(keyed().seal(minted(keyed()))) < LONGEST_COOKIE / 5


# ---- rotation ------------------------------------------------------------------------------------------------------


def test_the_first_key_signs() -> None:
    """The newest key seals; a server that knows only that one opens the cookie, and finds it fresh."""
    session = minted(keyed(NEW, OLD))
    cookie = keyed(NEW, OLD).seal(session).encode()
    assert keyed(NEW).open([cookie], NOW) == Opened(session, stale=False)
    assert refused(keyed(OLD), cookie).code == "session_required"


def test_rotation_logs_nobody_out() -> None:
    """A cookie under an older key opens, as stale; given anew, it needs the older key no more."""
    session = minted(keyed(OLD))
    cookie = keyed(OLD).seal(session).encode()
    for keys in ((NEW, OLD), (NEW, "third-" + NEW, OLD)):
        assert keyed(*keys).open([cookie], NOW) == Opened(session, stale=True)
    again = keyed(NEW, OLD).seal(session).encode()
    assert keyed(NEW).open([again], NOW) == Opened(session, stale=False)


def test_a_key_taken_away_is_dead() -> None:
    """When the older key is gone from the list, so are its cookies."""
    cookie = keyed(OLD).seal(minted(keyed(OLD))).encode()
    assert refused(keyed(NEW), cookie).code == "session_required"


# ---- expiry --------------------------------------------------------------------------------------------------------

EXPIRY = [
    # label, seconds since issued, seconds since renewed, verdict
    ("new", 0, 0, "fresh"),
    ("a quarter of idle", DAY // 4, DAY // 4, "fresh"),
    ("a second more than a quarter of idle", DAY // 4 + 1, DAY // 4 + 1, "stale"),
    ("a moment more than a quarter of idle", DAY / 4 + 0.01, DAY / 4 + 0.01, "stale"),
    ("renewed just now", 6 * DAY, 0, "fresh"),
    ("the last second of idle", DAY - 1, DAY - 1, "stale"),
    ("the last moment of idle", DAY - 0.01, DAY - 0.01, "stale"),
    ("idle", DAY, DAY, "expired"),
    ("idle and a moment", DAY + 0.01, DAY + 0.01, "expired"),
    ("the last second of its life, much used", LIFETIME - 1, 0, "fresh"),
    ("the end of its life, much used", LIFETIME, 0, "expired"),
    ("both", LIFETIME, DAY, "expired"),
    ("a year later", 365 * DAY, 365 * DAY, "expired"),
]


@pytest.mark.parametrize(("age", "unused", "verdict"), [case[1:] for case in EXPIRY], ids=[case[0] for case in EXPIRY])
def test_expiry_to_the_second(age: float, unused: float, verdict: str) -> None:
    """A cookie lives until its absolute or its idle end, whichever is first; it asks for renewal after a quarter."""
    sessions = keyed()
    session = Session("A" * 22, "anonymous", None, issued=NOW, renewed=round(NOW + age - unused))
    if verdict == "expired":
        with pytest.raises(SessionExpired):
            reopen(sessions, session, NOW + age)
    else:
        assert reopen(sessions, session, NOW + age).stale == (verdict == "stale")


def test_expires_at_is_the_truth() -> None:
    """A cookie opens until the second that `expires_at` names, and from then on no more."""
    sessions = keyed()
    for session in (
        Session("A" * 22, "anonymous", None, NOW, NOW),
        Session("A" * 22, "anonymous", None, NOW, NOW + 6 * DAY + 5),
    ):
        end = sessions.expires_at(session)
        assert reopen(sessions, session, end - 0.001)
        with pytest.raises(SessionExpired):
            reopen(sessions, session, end)
    assert sessions.expires_at(Session("A", "anonymous", None, NOW, NOW)) == NOW + IDLE
    assert sessions.expires_at(Session("A", "anonymous", None, NOW, NOW + 6 * DAY + 5)) == NOW + LIFETIME


def test_renewal_moves_idle_only() -> None:
    """Renewing keeps subject and issue; a session in use lives to its absolute end and not longer."""
    sessions = keyed()
    session, now = minted(sessions), float(NOW)
    while now < NOW + LIFETIME:
        opened = reopen(sessions, session, now)
        renewed = sessions.renew(opened.session, now)
        assert renewed == replace(session, renewed=int(now))
        session = renewed if opened.stale else session
        now += DAY / 5
    with pytest.raises(SessionExpired):
        reopen(sessions, session, NOW + LIFETIME)


@pytest.mark.parametrize("jump", [HOUR, -HOUR, 0.5, -0.5])
def test_a_jumping_clock_logs_nobody_out(jump: float) -> None:
    """When the clock jumps an hour, in either direction and back again, all sessions live, new ones and used ones."""
    sessions = keyed()
    ages = [
        Session("A" * 22, "anonymous", None, NOW - age, NOW - age % (DAY - HOUR - 1)) for age in range(0, 6 * DAY, HOUR)
    ]
    for session in ages:
        assert reopen(sessions, session, NOW + jump).session == session
        renewed = sessions.renew(session, NOW + jump)
        assert reopen(sessions, renewed, NOW).session == renewed
        assert sessions.expires_at(renewed) >= min(NOW + jump + IDLE, session.issued + LIFETIME) - 1


# ---- bad cookies ---------------------------------------------------------------------------------------------------

GOOD = Session("A" * 22, "anonymous", None, NOW, NOW)
PAYLOAD = f"{'A' * 22}.anonymous..{NOW}.{NOW}.0"
COOKIE = signed(PAYLOAD)


def test_the_good_cookie_of_this_chapter_is_good() -> None:
    """What the bad cookies below are made from opens, so that each of them is refused for its own fault."""
    assert keyed().open([COOKIE], NOW) == Opened(GOOD, stale=False)


BAD = {
    "empty": b"",
    "a word": b"garbage",
    "dots": b"......",
    "no signature": PAYLOAD.encode(),
    "an empty signature": PAYLOAD.encode() + b".",
    "cut by one": COOKIE[:-1],
    "cut in half": COOKIE[: len(COOKIE) // 2],
    "cut at its head": COOKIE[1:],
    "doubled in itself": COOKIE + COOKIE,
    "two cookies run together": COOKIE + b"," + COOKIE,
    "another id": b"B" + COOKIE[1:],
    "another mode": COOKIE.replace(b"anonymous", b"password1"),
    "a subject put in": COOKIE.replace(b"..", b".YWRtaW4.", 1),
    "issued later": COOKIE.replace(str(NOW).encode(), str(NOW + 9).encode(), 1),
    "another generation": COOKIE.replace(b".0.", b".1."),
    "a dot more": COOKIE.replace(b".0.", b".0.."),
    "signature in capitals": PAYLOAD.encode() + b"." + COOKIE.rsplit(b".", 1)[1].upper(),
    "signature spelt otherwise: padding": COOKIE + b"=",
    "signature spelt otherwise: a character base64 skips": COOKIE[:-5] + b"!" + COOKIE[-5:],
    "signature spelt otherwise: a blank at its end": COOKIE + b" ",
    "quoted": b'"' + COOKIE + b'"',
    "signed by another key": signed(PAYLOAD, key=secrets.token_urlsafe(32)),
    "signed by an empty key": signed(PAYLOAD, key=""),
    "signed by the id": signed(PAYLOAD, key="A" * 22),
    "signed under another salt": signed(PAYLOAD, salt=b"chat-proxy.other"),
    "signed under itsdangerous' own salt": signed(PAYLOAD, salt=b"itsdangerous.Signer"),
    "signed with SHA-1": signed(PAYLOAD, digest=hashlib.sha1),
    "signed with SHA-512": signed(PAYLOAD, digest=hashlib.sha512),
    "signed twice": signed(COOKIE.decode()),
    "ours, of a version with fewer fields": signed(f"{'A' * 22}.anonymous.{NOW}"),
    "ours, of a version with more fields": signed(PAYLOAD + ".more"),
    "ours, times that are none": signed(f"{'A' * 22}.anonymous..soon.later.0"),
    "ours, times without end": signed(f"{'A' * 22}.anonymous..inf.nan.0"),
    "ours, a subject that is no base64": signed(f"{'A' * 22}.anonymous.a.{NOW}.{NOW}.0"),
    "ours, a subject that is no UTF-8": signed(f"{'A' * 22}.anonymous._w.{NOW}.{NOW}.0"),
    "ours, and empty": signed(""),
    "ours, beyond ASCII": signed(b"\xff" * 22),
    "starlette's": base64.b64encode(json.dumps({"user": "admin"}).encode()) + b".aRvAAw.c2lnbmF0dXJl",
    "a JWT without algorithm": b"eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.",
    "a letter beyond ASCII": COOKIE + b"\xe9",
    "bytes that are no text": b"\xff\xfe\x00",
    "a zero byte": COOKIE + b"\0",
    "a line break": COOKIE + b"\n",
    "too long": COOKIE + b"A" * LONGEST_COOKIE,
    "too long, and signed by us": signed(f"{'A' * 22}.anonymous.{'A' * LONGEST_COOKIE}.{NOW}.{NOW}.0"),
    "a megabyte of dots": b"." * (1 << 20),
}


@pytest.mark.parametrize("cookie", BAD.values(), ids=BAD)
def test_bad_cookies_have_one_face(cookie: bytes) -> None:
    """Whatever is wrong with a cookie, the outside learns that a session is required, and nothing more."""
    for sessions in (keyed(NEW), keyed(NEW, OLD), keyed(OLD, NEW)):
        refusal = refused(sessions, cookie)
        assert (type(refusal), refusal.code, refusal.message) == (
            Unauthenticated,
            "session_required",
            Unauthenticated.message,
        )
        assert refusal.reason
        assert not [word for word in cookie.decode("latin-1").split(".") if len(word) > 3 and word in refusal.reason]


@pytest.mark.parametrize(
    "cookies",
    [[], [COOKIE, COOKIE], [COOKIE, b""], [b"", COOKIE], [COOKIE, b"forged"], [COOKIE] * 100],
    ids=[
        "none",
        "the same twice",
        "ours and an empty one",
        "an empty one and ours",
        "ours and a forged one",
        "hundred",
    ],
)
def test_one_cookie_or_none(cookies: list[bytes]) -> None:
    """Two cookies of our name are refused even when one is good: a sibling's page may have planted the other."""
    assert refused(keyed(), *cookies).code == "session_required"


def mutants(good: bytes, count: int) -> Iterator[bytes]:
    """Cookies that differ from a good one by a few edits; the seed is printed by pytest when one is accepted."""
    chance = random.Random(20260101)
    alphabet = bytes(range(256))
    likely = b"ABab01-_.=!%+/ \n\0\xff"
    while count:
        cookie = bytearray(good)
        for _ in range(chance.choice((1, 1, 1, 2, 3, 10))):
            place = chance.randrange(len(cookie) + 1)
            letter = chance.choice(chance.choice((alphabet, likely)))
            match chance.randrange(6):
                case 0:
                    cookie.insert(place, letter)
                case 1:
                    del cookie[place : place + chance.choice((1, 1, 2, 20))]
                case 2:
                    cookie[place:place] = cookie[chance.randrange(len(cookie) + 1) :]
                case 3 if place < len(cookie):
                    cookie[place] ^= 1 << chance.randrange(8)
                case 4 if len(cookie) > 1:
                    cookie[-1:] = bytes([letter])  # where base64 has bits to spare
                case _:
                    cookie[place : place + 1] = bytes([letter])
        if bytes(cookie) != good:
            count -= 1
            yield bytes(cookie)


def test_no_mutant_is_accepted() -> None:
    """Of 10,000 cookies that differ a little from a good one, none opens, and none raises anything but a Refusal."""
    sessions, revocations = keyed(NEW, OLD), Revocations()
    good = [
        sessions.seal(minted(sessions)).encode(),
        sessions.seal(sessions.mint(NOW, b"x" * 16, subject="u")).encode(),
    ]
    for original in good:
        for cookie in mutants(original, MUTANTS // 2):
            with pytest.raises(Unauthenticated) as raised:
                revocations.check(sessions.open([cookie], NOW))
            assert raised.value.code == "session_required", cookie


@given(st.lists(st.binary(max_size=200), max_size=3), st.floats(0, 2**40))
def test_no_bytes_make_open_fail(cookies: list[bytes], now: float) -> None:
    """Whatever bytes come as cookies, whenever, they are refused and nothing breaks."""
    with pytest.raises(Unauthenticated):
        Revocations().check(keyed().open(cookies, now))


fields = st.sampled_from(["", "0", "-1", "1_0", "9" * 400, "nan", "a", "anonymous", "_w", str(NOW), "\n", "\0"])


@given(st.lists(fields | st.text(st.characters(max_codepoint=127), max_size=8), min_size=5, max_size=7).map(".".join))
def test_no_payload_of_ours_makes_open_fail(payload: str) -> None:
    """Even what our own key has signed, in an older or a newer version, opens or is refused and never breaks."""
    with suppress(Unauthenticated):
        keyed().open([signed(payload)], NOW)


# ---- revocation ----------------------------------------------------------------------------------------------------


def revoked(sessions: Sessions, session: Session, revocations: Revocations, now: float) -> bool:
    try:
        reopen(sessions, session, now, revocations)
    except Unauthenticated as refusal:
        return (refusal.code, refusal.message) == ("session_required", Unauthenticated.message)
    return False


def test_revocation_kills_all_copies() -> None:
    """After a logout every cookie of that id is dead: the one shown, older ones and renewed ones; others live."""
    sessions, revocations = keyed(), Revocations()
    session, other = minted(sessions), minted(sessions)
    copies = [session, sessions.renew(session, NOW + HOUR), sessions.renew(session, NOW + 2 * HOUR)]
    revocations.revoke(copies[1], NOW + 2 * HOUR, NOW + 2 * HOUR + LIFETIME)
    assert all(revoked(sessions, copy, revocations, NOW + 2 * HOUR) for copy in copies)
    assert not revoked(sessions, other, revocations, NOW + 2 * HOUR)


def test_revocation_lasts_as_long_as_any_copy() -> None:
    """A logout is remembered until the last copy has expired by itself, however many others log out meanwhile."""
    sessions, revocations = keyed(lifetime=LIFETIME, idle=LIFETIME), Revocations()
    session = minted(sessions)
    revocations.revoke(session, NOW + 0.7, NOW + 0.7 + LIFETIME)
    for now in (NOW + 1, NOW + DAY, NOW + LIFETIME - 0.1):
        revocations.revoke(minted(sessions, now), now, now + LIFETIME)
        assert revoked(sessions, session, revocations, now)
    with pytest.raises(SessionExpired):
        reopen(sessions, session, NOW + LIFETIME, Revocations())


@pytest.mark.parametrize("ahead", [1, HOUR])
def test_revocation_outlasts_a_clock_that_was_ahead(ahead: int) -> None:
    """A cookie issued while the clock was ahead stays dead until it, too, has expired."""
    sessions, revocations = keyed(lifetime=DAY, idle=DAY), Revocations()
    session = minted(sessions, NOW + ahead)
    revocations.revoke(session, NOW, NOW + DAY)
    now = NOW + ahead + DAY - 0.1
    revocations.revoke(minted(sessions, now), now, now + DAY)
    assert revoked(sessions, session, revocations, now)


def test_revocations_are_forgotten() -> None:
    """What has expired anyway is not remembered: a server that runs for years does not grow."""
    sessions, revocations = keyed(), Revocations()
    for hour in range(10_000):
        now = NOW + hour * HOUR
        revocations.revoke(minted(sessions, now), now, now + LIFETIME)
    assert len(revocations._until) <= 2 * (LIFETIME / HOUR + 1) + SWEEP_AFTER


def test_a_clock_that_goes_back_revives_nobody() -> None:
    """A logout holds when the clock goes back an hour after it, and when it went back before it."""
    sessions, revocations = keyed(), Revocations()
    before, after = minted(sessions), minted(sessions, NOW + HOUR)
    revocations.revoke(before, NOW + 10, NOW + 10 + LIFETIME)
    revocations.revoke(after, NOW, NOW + LIFETIME)
    assert revoked(sessions, before, revocations, NOW - HOUR)
    assert revoked(sessions, after, revocations, NOW)
    assert revoked(sessions, after, revocations, NOW + HOUR)


# ---- the session of an address -------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40), st.integers(0, 2**32), st.integers(0, 2**32))
def test_one_address_has_one_session(one: str, other: str, now: int, later: int) -> None:
    """All callers of an address that keep no cookie share an id, at any time; no two addresses do."""
    sessions, revocations = keyed(), Revocations()
    one, other = (address.encode("utf-8", "replace").decode() for address in (one, other))
    first = revocations.reissued(sessions.mint_for_address(now, one))
    assert ID.fullmatch(first.id)
    assert revocations.reissued(sessions.mint_for_address(later, one)).id == first.id
    assert (revocations.reissued(sessions.mint_for_address(now, other)).id == first.id) == (one == other)


def test_an_addresss_session_opens_like_any_other() -> None:
    """What an address is given is an anonymous session, issued now."""
    sessions = keyed()
    session = Revocations().reissued(sessions.mint_for_address(NOW + 0.5, "203.0.113.7"))
    assert session == Session(session.id, "anonymous", None, NOW, NOW)
    assert reopen(sessions, session) == Opened(session, stale=False)


def test_an_addresss_session_cannot_be_guessed() -> None:
    """The id of an address follows from the newest secret: without it the id cannot be computed."""
    ids = {
        Revocations().reissued(keyed(*keys).mint_for_address(NOW, "203.0.113.7")).id
        for keys in ((NEW,), (NEW, OLD), (OLD,))
    }
    assert len(ids) == 2
    plain = base64.urlsafe_b64encode(hashlib.sha256(b"203.0.113.7").digest()[:16]).rstrip(b"=").decode()
    assert plain not in ids


@pytest.mark.parametrize("wait", [0, 0.2, 1, HOUR, -HOUR])
def test_an_address_lives_after_its_logout(wait: float) -> None:
    """A logout kills an address's cookies issued so far; one minted after it lives, even in the same second."""
    sessions, revocations = keyed(), Revocations()
    for _ in range(3):
        session = revocations.reissued(sessions.mint_for_address(NOW, "203.0.113.7"))
        revocations.revoke(session, NOW, NOW + LIFETIME)
        assert revoked(sessions, session, revocations, NOW)
        later = revocations.reissued(sessions.mint_for_address(NOW + wait, "203.0.113.7"))
        assert later.id == session.id
        assert reopen(sessions, later, NOW + wait, revocations).session == later
        assert revoked(sessions, session, revocations, NOW + wait)


# ---- Set-Cookie ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "secure"), [("__Host-chat", True), ("chat", False)])
def test_set_cookie_flags(name: str, secure: bool) -> None:
    """No script reads the cookie, no foreign page sends it, no other path or host gets it, it lives as long as told."""
    value = keyed().seal(minted(keyed()))
    line = set_cookie(name, value, 86400, secure=secure).decode()
    morsel = SimpleCookie(line)[name]
    assert morsel.value == value
    assert (morsel["path"], morsel["max-age"], morsel["samesite"]) == ("/", "86400", "Strict")
    assert morsel["httponly"] is True
    assert bool(morsel["secure"]) is secure
    assert (morsel["domain"], morsel["expires"]) == ("", "")


def test_clearing_a_cookie() -> None:
    """A cookie is cleared under the same flags that set it: browsers ignore anything else for __Host-."""
    assert set_cookie("__Host-chat", "", 0, secure=True) == (
        b"__Host-chat=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict; Secure"
    )
