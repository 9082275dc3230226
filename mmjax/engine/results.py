"""What the engine gives back."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "repetition"]


class RequestError(ValueError):
    """A request that cannot be run; the message names the value and the limit."""


class TokenLogprob(NamedTuple):
    """A token, its log-probability, and the likeliest ones in its place as (token, logprob)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass
class Output:
    """What one sample of a request gained since its last Output.

    Attributes:
      request_id: Of the request.
      index: Which of its samples, 0 to n - 1.
      token_ids: New tokens, an end token included.
      text: New text, whole characters only. Text that may yet become a stop string is held back.
      logprobs: Of the new tokens, if asked for.
      finish_reason: Why the sample ended, None while it goes on.
      prompt_tokens: Of the request.
      cached_tokens: Prompt tokens of this sample that were not computed again.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int


@dataclasses.dataclass
class Completion:
    """One whole sample; the fields are those of `Output`."""

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def extend(self, output: Output) -> None:
        """Takes in what the sample gained."""
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        self.finish_reason = output.finish_reason
        self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the engine holds now, and what it has done so far.

    Attributes:
      running: Samples with a slot.
      waiting: Samples without one; the swapped ones included.
      swapped: Samples whose pages were moved to the host for want of pages.
      slots: Samples that can run at a time.
      pages_used: KV pages of running samples and cached prefixes.
      pages_cached: Of these, the ones that cached prefixes alone hold.
      pages_total: KV pages there are.
      prompt_tokens: Prompt tokens of admitted samples.
      cached_prompt_tokens: Of these, the ones that were not computed again.
      generated_tokens: New tokens of all samples.
      preemptions: Samples moved to the host so far.
    """

    running: int
    waiting: int
    swapped: int
    slots: int
    pages_used: int
    pages_cached: int
    pages_total: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    preemptions: int
