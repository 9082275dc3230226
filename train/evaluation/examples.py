"""Examples of the synthetic tasks without end, none of them stored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import overload

from mmjax.tokenizer import Tokenizer
from train.config import DataConfig
from train.data.examples import Example
from train.evaluation.tasks import Encoder, Sample, Task, TooShortError

# Examples of an epoch: more than any job reads.
_EPOCH = 1 << 30
# The shortest example's share of a row; lengths between are log-uniform.
_SHORTEST = 1 / 8
# What a length grows by that a task does not fit.
_LONGER = 1.25
# Samples that are encoded piece by piece and whole, to see whether that is the same.
_CHECKED = 4


class RecallExamples(Sequence[Example]):
    """Example i of an endless supply, made when it is asked for.

    Lengths are log-uniform from an eighth of a row to a whole one, needles are anywhere, tasks come
    in turn.

    Args:
      data: Tasks and length.
      tokenizer: Of the model.
      seed: Of the samples.
      exclude: Hashes of prompts that must not appear, see `prompt_hash`.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        seed: int,
        exclude: frozenset[bytes] = frozenset(),
    ) -> None:
        self._encoder, self._seed, self._exclude = Encoder(tokenizer), seed, exclude
        self._tasks = [Task(t, self._encoder, "train", seed, chat=True) for t in data.tasks]
        self._longest = data.sequence_length
        self._numbers = range(_EPOCH)
        for task in self._tasks:
            for i in range(_CHECKED):
                self._encoder.check(task.sample(i, self._longest))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> RecallExamples: ...

    def __getitem__(self, index: int | slice) -> Example | RecallExamples:
        if isinstance(index, slice):
            part = object.__new__(RecallExamples)
            part.__dict__ |= self.__dict__ | {"_numbers": self._numbers[index]}
            return part
        prompt, answer = self._encoder.prompt_and_answer(self._sample(self._numbers[index]))
        return Example.answering(prompt, answer)

    def _sample(self, number: int) -> Sample:
        rng = random.Random(f"{self._seed}/{number}")
        task = self._tasks[number % len(self._tasks)]
        length = round(self._longest * _SHORTEST ** rng.random())
        while True:
            try:
                sample = task.sample(number, length)
            except TooShortError:
                if length == self._longest:
                    raise
                length = min(round(length * _LONGER), self._longest)
                continue
            if prompt_hash(sample.text) not in self._exclude:
                return sample
            number += _EPOCH


def prompt_hash(prompt: str) -> bytes:
    """What tells prompts apart."""
    return hashlib.blake2b(prompt.encode(), digest_size=16).digest()
