"""Any dataset of the package reasoning-gym, scored by its own verifier or by `gym_rules`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from mmjax.config import ConfigError
from train.data.sources import Problem, Source
from train.data.worked import WORKED
from train.rewards.gym_rules import FIRST_WORDS, RULES, foreign

_MAX_LENGTH = 20_000
# Numbers that take minutes and gigabytes to write out, such as 1e999999999.
_GIANT = re.compile(r"\d[eE][+-]?\d{4}")


class GymSource(Source):
    """Problems of one reasoning-gym dataset.

    Args:
      task: As the config names it.
      name: Of the dataset.
      params: Its parameters, over the defaults in `WORKED`, over reasoning-gym's own.

    Raises:
      ConfigError: an unknown dataset, or parameters that it does not take.
    """

    def __init__(self, task: str, name: str, params: Mapping[str, Any]) -> None:
        super().__init__(task)
        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.0)
            raise ConfigError(
                f"unknown reasoning task {name!r}; near: {', '.join(close)}. "
                "docs/rewards.md says what there is"
            )
        self._name = name
        self._params = {**(WORKED[name].params if name in WORKED else {}), **params}

    def draw(self, size: int, seed: int, *, held_out: bool) -> Iterator[Problem]:
        """Problems of this seed; held-out ones have another."""
        self._dataset = self._create(size, seed)
        for i in range(size):
            entry = self._dataset[i]
            yield Problem(self.task, entry["question"], entry["answer"] or "", entry)

    def score(self, problem: Problem, answer: str) -> float:
        """Right or wrong; what reasoning-gym gives for less than right counts as wrong."""
        if len(answer) > _MAX_LENGTH or _GIANT.search(answer) or foreign(problem, answer):
            return 0.0
        if self._name in FIRST_WORDS and len(answer.split()) > len(problem.answer.split()):
            return 0.0
        if self._name in RULES:
            return float(RULES[self._name](problem, answer))
        return float(self._dataset.score_answer(answer, problem.entry) >= 1.0)

    def _create(self, size: int, seed: int) -> Any:
        try:
            return reasoning_gym.create_dataset(self._name, size=size, seed=seed, **self._params)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"task {self.task!r}: {error}") from None
