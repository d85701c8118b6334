"""Mode `password`: users log in with a password, each with their own or all with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from proxy.accounts.audit import Audit
from proxy.accounts.login.password import Passwords
from proxy.accounts.modes import PlainMode
from proxy.errors import InvalidCredentials, InvalidJson, InvalidRequest, LoginRequired
from proxy.settings import Secret
from proxy.web.context import RequestContext

LONGEST_LOGIN = 4096  # bytes of a login's body


class Login(msgspec.Struct, forbid_unknown_fields=True):
    password: Annotated[str, msgspec.Meta(max_length=1024)]
    user: Annotated[str, msgspec.Meta(max_length=128)] | None = None


decode_login = msgspec.json.Decoder(Login).decode


class PasswordMode(PlainMode):
    name = "password"
    wants_login = True

    def __init__(self, secret: Secret, clock: Callable[[], float], audit: Audit) -> None:
        self.secret = secret
        self.passwords = Passwords(secret.lines(), clock)
        self.audit = audit

    def subject_of(self, context: RequestContext) -> str | None:
        raise LoginRequired

    def label(self, subject: str | None) -> str:
        """With a mark of the password, so that a changed or removed password ends the sessions of the old one."""
        return f"{self.name}~{self.passwords.mark(subject)}" if self.passwords.has(subject) else self.name

    def reload(self) -> None:
        self.secret = self.secret.again()
        self.passwords.use(self.secret.lines())

    def close(self) -> None:
        self.passwords.close()

    async def authenticate(self, context: RequestContext) -> str | None:
        """The user of a login request; None with a shared password.

        Raises InvalidCredentials, InvalidRequest, InvalidJson, TooMany, Busy.
        """
        try:
            login = decode_login(await context.body(LONGEST_LOGIN))
        except msgspec.ValidationError:
            raise InvalidRequest('A login is {"password": ...}, with "user" where there are users.') from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidJson from None
        try:
            await self.passwords.check(login.user, login.password, context.caller.key)
        except InvalidCredentials:
            known = login.user if self.passwords.has(login.user) else None  # it may be a password in the wrong field
            self.audit.line(context, "login_failed", user=known)
            raise
        return login.user or None
