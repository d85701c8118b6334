"""TODO."""

from __future__ import annotations

from proxy.chat.sse import Ending, Events, usage_of
from proxy.telemetry.usage import Usage

BYTES_PER_TOKEN = 3  # of an answer whose upstream counted nothing: the policy's figure for prompts


class UsageMeter:
    """What one request cost: what the upstream counted, or else our estimate."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.used = Usage()
        self.is_known = False
        self.events: Events | None = None  # of a stream that is being relayed

    def so_far(self) -> int:
        """Of an answer that is not over."""
        return self.prompt_tokens + (self.events.count if self.events is not None else 0)

    def note_stream(self, events: Events) -> None:
        used = events.usage or Usage(self.prompt_tokens, events.count)
        if events.ending is Ending.OPEN:  # what it has counted so far may be no more than the prompt
            used = Usage(used.prompt_tokens, max(used.completion_tokens, events.count))
        self.note(used)

    def note_answer(self, answer: bytes) -> None:
        self.note(Usage(self.prompt_tokens, len(answer) // BYTES_PER_TOKEN))
        self.note(usage_of(answer) or self.used)

    def note_no_answer(self, *, paid: bool) -> None:
        """Unless there was one, before something else went wrong."""
        if paid and not self.is_known:
            self.note(Usage(self.prompt_tokens))

    def note(self, used: Usage) -> None:
        self.used, self.is_known = used, True
