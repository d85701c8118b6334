"""Counts the tokens of one answer: by the upstream's usage, or else by an estimate."""

from __future__ import annotations

from proxy.chat.sse import Ending, Events, usage_of
from proxy.telemetry.records import Usage

BYTES_PER_TOKEN = 3  # of an answer without a usage; the policy estimates prompts by the same figure


class UsageMeter:
    """The tokens that one request used so far. `prompt_tokens` is the policy's estimate."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.used = Usage()
        self.is_known = False
        self.events: Events | None = None  # of a stream that is being relayed

    @property
    def total(self) -> int:
        return self.used.prompt_tokens + self.used.completion_tokens

    def so_far(self) -> int:
        """Tokens of an answer that has not ended yet."""
        return self.prompt_tokens + (self.events.count if self.events is not None else 0)

    def note_stream(self, events: Events) -> None:
        used = events.usage or Usage(self.prompt_tokens, events.count)
        if events.ending is Ending.OPEN:  # a usage reported before the end may cover the prompt only
            used = Usage(used.prompt_tokens, max(used.completion_tokens, events.count))
        self.note(used)

    def note_answer(self, answer: bytes) -> None:
        """Takes the usage of a whole answer, else an estimate by its length."""
        self.note(Usage(self.prompt_tokens, len(answer) // BYTES_PER_TOKEN))
        self.note(usage_of(answer) or self.used)

    def note_no_answer(self, *, paid: bool) -> None:
        """Counts the prompt of a paid call that gave no answer. An answer that was noted before stays noted."""
        if paid and not self.is_known:
            self.note(Usage(self.prompt_tokens))

    def note(self, used: Usage) -> None:
        self.used, self.is_known = used, True
