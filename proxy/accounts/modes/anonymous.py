"""Mode `anonymous`: every client gets a session."""

from __future__ import annotations

from proxy.accounts.modes import PlainMode
from proxy.web.context import RequestContext


class AnonymousMode(PlainMode):
    name = "anonymous"

    def subject_of(self, context: RequestContext) -> str | None:
        return None
