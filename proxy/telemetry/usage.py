"""TODO."""

from __future__ import annotations

from typing import Annotated

import msgspec

MOST_TOKENS = 1 << 40  # in one answer; whoever says more, or less than none, has not counted


Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class Usage(msgspec.Struct):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
