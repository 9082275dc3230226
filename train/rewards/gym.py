"""Any dataset of the package reasoning-gym, scored by `gym_rules`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from mmjax.config import ConfigError
from train.data.sources import Problem, Source
from train.data.worked import WORKED
from train.rewards.gym_rules import FORMS, RULES, foreign, same
from train.rewards.reading import MAX_LENGTH, plain


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
        """Problems of this seed; held-out ones have another.

        Raises:
          ConfigError: the dataset has no known answers, and no verifier that holds.
        """
        self._dataset = self._create(size, seed)
        for i in range(size):
            entry = self._dataset[i]
            problem = Problem(self.task, entry["question"], entry["answer"] or "", entry)
            if entry["answer"] is None and self._name_of(problem) not in FORMS:
                raise ConfigError(f"task {self.task!r} has problems without a known answer")
            yield problem

    def score(self, problem: Problem, answer: str) -> float:
        """Right or wrong, in the answer's own form or out of its wrapping."""
        if len(answer) > MAX_LENGTH or foreign(problem, answer):
            return 0.0
        texts = dict.fromkeys([answer.strip(), plain(answer) or ""])
        return float(any(self._is_right(problem, text) for text in texts if text))

    def _is_right(self, problem: Problem, answer: str) -> bool:
        name = self._name_of(problem)
        if name in RULES:
            return answer == problem.answer or RULES[name](problem, answer)
        if same(problem, answer):
            return True
        if name not in FORMS or not FORMS[name].fullmatch(answer):
            return False
        # Of other lists it would make its own.
        entry = copy.deepcopy(problem.entry)
        return bool(self._dataset.score_answer(answer, entry) >= 1.0)

    def _name_of(self, problem: Problem) -> str:
        """The dataset that a problem is of, which a composite one has drawn it from."""
        source = problem.entry["metadata"].get("source_dataset", self._name)
        return str(source if self._name == "composite" else self._name)

    def _create(self, size: int, seed: int) -> Any:
        try:
            return reasoning_gym.create_dataset(self._name, size=size, seed=seed, **self._params)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"task {self.task!r}: {error}") from None
