"""A request, and what is known of each of its samples while it runs."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.chat import THINK_END, THINK_START, thinks
from mmjax.engine.pages import digests
from mmjax.engine.programs import FORCED, STOPS, Rows
from mmjax.engine.results import FinishReason, Output, TokenLogprob
from mmjax.engine.sampling import SamplingParams
from mmjax.engine.text import TextStream
from mmjax.tokenizer import Tokenizer
from mmjax.vision import Image

# What is forced to close a thinking part that ran out of its budget, and in place of one.
CLOSING = f"\n{THINK_END}\n\n"
NO_THINKING = f"{THINK_START}{THINK_END}\n\n"


def interruption(
    tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray, reply: Sequence[int]
) -> list[int]:
    """Tokens that follow a reply whose thinking has used up its budget: the end of an open thinking
    part, all of one where nothing is written yet, otherwise none.
    """
    said = tokenizer.decode(list(reply))
    # Of a prompt, which may be long and that many samples share, only where the reply says nothing.
    if THINK_START.strip() not in said and THINK_END not in said:
        said = tokenizer.decode(list(prompt)) + said
    if thinks(said):
        return tokenizer.encode(CLOSING)
    return [] if len(reply) else tokenizer.encode(NO_THINKING)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Where prompts are cut into chunks: at `first` · 2^i up to `largest`, then at its multiples.

    Borders depend on the place alone. So every prompt that begins alike is cut alike, and a state
    kept at a border is, to the bit, the one that any of them would compute.
    """

    first: int
    largest: int

    def end(self, start: int, target: int) -> int:
        """Where the chunk that begins at `start` ends, at most at `target`."""
        if start >= self.largest:
            border = (start // self.largest + 1) * self.largest
        else:
            border = self.first
            while border <= start:
                border *= 2
        return min(border, target)

    def borders(self, target: int) -> list[int]:
        """Every border before `target`, and `target` itself; none for 0."""
        found, at = [], 0
        while at < target:
            at = self.end(at, target)
            found.append(at)
        return found

    @property
    def sizes(self) -> list[int]:
        """The lengths that chunks are padded to, ascending."""
        found, size = [self.largest], self.largest
        while size > 16:
            size = max(size // 2, 16)
            found.append(size)
        return found[::-1]

    def size(self, tokens: int) -> int:
        """The length that a chunk of so many tokens is padded to."""
        return next(size for size in self.sizes if size >= tokens)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and how to sample it; its samples share the digests of the prompt.

    `images` are those of the prompt, each with the places of its tokens.
    """

    id: str
    prompt: np.ndarray
    params: SamplingParams
    stop_ids: tuple[int, ...]
    schedule: Schedule
    images: Sequence[tuple[range, Image]] = ()
    _digests: list[tuple[int, bytes]] | None = None

    def digests(self) -> list[tuple[int, bytes]]:
        """Each border of the prompt without its last token, with the digest of what is before."""
        if self._digests is None:
            self._digests = self.digests_of(self.prompt)
        return self._digests

    def digests_of(self, tokens: np.ndarray) -> list[tuple[int, bytes]]:
        """The same of more tokens that begin with the prompt."""
        borders = self.schedule.borders(len(tokens) - 1)
        marks = [(places.start, image.digest) for places, image in self.images]
        return list(zip(borders, digests(tokens, borders, marks), strict=True))


@dataclasses.dataclass(eq=False)
class Sample:
    """One sample.

    Its last token is never in the cache: `computed` of the others are, and a decode step takes in
    the last one and draws the next.

    Attributes:
      request: What it is a sample of.
      index: Which of the request's samples.
      order: Rank by arrival.
      text: Its text so far.
      closing: Tokens that are forced next, to close the thinking part.
      thinking: Whether its budget is not used up.
      new: Tokens drawn.
      computed: Tokens in the cache.
      cached: Prompt tokens that came from a kept prefix.
      slot: Of the state, None while it waits.
      pages: Of keys and values.
      moved: What was brought to the host for want of pages.
      run: Likely tokens in a row.
    """

    request: Request
    index: int
    order: int
    text: TextStream
    closing: list[int] = dataclasses.field(default_factory=list)
    new: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    cached: int = 0
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    moved: Any = None
    run: int = 0
    thinking: bool = False

    @classmethod
    def create(
        cls, request: Request, index: int, order: int, tokenizer: Tokenizer | None
    ) -> Sample:
        """A sample that has not begun."""
        text = TextStream(tokenizer, request.params.stop)
        thinking = request.params.thinking_budget is not None
        return cls(request, index, order, text, thinking=thinking)

    @property
    def target(self) -> int:
        """Tokens that are in the cache before the next is drawn."""
        return len(self.request.prompt) + len(self.new) - 1

    @property
    def limit(self) -> int:
        """Most tokens that will ever be in the cache."""
        return len(self.request.prompt) + self.request.params.max_tokens - 1

    def tokens(self) -> np.ndarray:
        """The prompt and what was drawn."""
        if not self.new:
            return self.request.prompt
        return np.concatenate([self.request.prompt, np.array(self.new, np.int32)])

    def digests(self) -> list[tuple[int, bytes]]:
        """Each border of what is to be prefilled, with the digest of the tokens before it."""
        if not self.new:
            return self.request.digests()
        return self.request.digests_of(self.tokens())

    def steps(self, tokenizer: Tokenizer | None, most: int) -> int:
        """Tokens that the next burst may draw, `most` at most."""
        params = self.request.params
        if self.thinking and params.thinking_budget == len(self.new):
            self.thinking = False
            assert tokenizer is not None
            self.closing = interruption(tokenizer, self.request.prompt, self.new)
        left = params.max_tokens - len(self.new)
        if self.thinking:
            assert params.thinking_budget is not None
            left = min(left, params.thinking_budget - len(self.new))
        if len(self.closing) > FORCED:
            left = min(left, FORCED)
        return min(left, most)

    def row(self, steps: int, seed: tuple[int, int]) -> Rows:
        """The row of a burst."""
        params, halt = self.request.params, self.request.params.repetition_halt
        forced = self.closing[:FORCED]
        return Rows(
            token=self.new[-1] if self.new else self.request.prompt[-1],
            slot=self.slot,
            length=self.computed,
            steps=steps,
            drawn=len(self.new),
            seed=seed,
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=min(params.top_k, 1 << 30),
            run=self.run,
            halt=halt.tokens if halt else 1 << 30,
            sure=math.log(halt.probability) if halt else 0.0,
            forced=len(forced),
            stop_ids=self.request.stop_ids[:STOPS],
            forced_ids=forced,
        )

    def accept(self, ids: list[int], logprobs: list[TokenLogprob] | None, run: int) -> Output:
        """Takes in what a burst drew; says what is new of it, and whether it is the end."""
        params = self.request.params
        self.computed += len(ids)
        self.run = run
        self.closing = self.closing[len(ids) :]
        # The device knows a few stop ids only.
        ended = next((i for i, t in enumerate(ids) if t in self.request.stop_ids), None)
        shown = ids if ended is None else ids[:ended]
        text, stopped = self.text.push(shown)
        reason: FinishReason | None = None
        count = len(ids)
        if stopped is not None:
            reason, count = "stop", stopped
        elif ended is not None:
            reason, count = "stop", ended + 1
        elif params.repetition_halt is not None and run >= params.repetition_halt.tokens:
            reason = "repetition"
        elif len(self.new) + count >= params.max_tokens:
            reason = "length"
        self.new += ids[:count]
        if reason is not None and stopped is None:
            text += self.text.finish()
        kept = None if logprobs is None else logprobs[:count]
        return self.output(ids[:count], text, kept, reason)

    def output(
        self,
        ids: list[int],
        text: str,
        logprobs: list[TokenLogprob] | None,
        reason: FinishReason | None,
    ) -> Output:
        """What the sample gained."""
        prompt = len(self.request.prompt)
        return Output(self.request.id, self.index, ids, text, logprobs, reason, prompt, self.cached)


class Chunk(NamedTuple):
    """Tokens `start` to `end` of a sample, which are computed together, padded to `size`."""

    sample: Sample
    start: int
    end: int
    size: int


def seed_words(seed: int, index: int) -> tuple[int, int]:
    """The key, as two int32, from which sample `index` of a request with this seed draws."""
    raw = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    first, second = np.frombuffer(raw, np.int32).tolist()
    return first, second
