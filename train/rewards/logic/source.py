"""Puzzles as a source of problems."""

from __future__ import annotations

import abc
import random
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from mmjax.config import ConfigError
from train.data.sources import Problem, Source


class Instance(NamedTuple):
    """question; answer, one of those that are right; data: what `Puzzle.check` needs, as JSON."""

    question: str
    answer: str
    data: dict[str, Any]


class Puzzle(abc.ABC):
    """A family of puzzles; the constructor's parameters are its difficulty.

    Raises:
      ValueError: in the constructor, for a difficulty that has no puzzles.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def generate(self, rng: random.Random) -> Instance:
        """A puzzle that has an answer."""

    @abc.abstractmethod
    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """Whether a text is an answer by the rules, and nothing else."""


class LogicSource(Source):
    """Problems of one family.

    Args:
      task: As the config names it.
      puzzle: The family's class.
      params: Its difficulty.

    Raises:
      ConfigError: parameters that the family does not take.
    """

    def __init__(self, task: str, puzzle: type[Puzzle], params: Mapping[str, Any]) -> None:
        super().__init__(task)
        try:
            self._puzzle = puzzle(**params)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"task {task!r}: {error}") from None

    def draw(self, size: int, seed: int, *, held_out: bool) -> Iterator[Problem]:
        """Problems of this seed; held-out ones have another."""
        for i in range(size):
            question, answer, data = self._puzzle.generate(random.Random(f"{seed} {i}"))
            yield Problem(self.task, question, answer, data)

    def score(self, problem: Problem, answer: str) -> float:
        """By the rules of the puzzle."""
        return float(self._puzzle.check(problem.entry, answer))


def within(name: str, value: int, low: int, high: int) -> int:
    """The value.

    Raises:
      ValueError: it is outside low … high.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} = {value} is not within {low} … {high}")
    return value
