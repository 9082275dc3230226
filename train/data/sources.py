"""Where problems come from: one surface for generators, files and their verifiers."""

from __future__ import annotations

import abc
import ast
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from mmjax.config import ConfigError

type Family = Literal["rule", "general"]


class Problem(NamedTuple):
    """task: as the config names it; question; answer; entry: what the verifier wants back."""

    task: str
    question: str
    answer: str
    entry: dict[str, Any]


class Source(abc.ABC):
    """Problems of one task and their verifier.

    family: "rule" if a rule tells right from wrong, "general" if a model judges.
    workers: Answers that are scored side by side; more than one where scoring waits for others.
    lowest: The worst score, which no answer at all has too.
    """

    family: Family = "rule"
    workers: int = 1
    lowest: float = 0.0

    def __init__(self, task: str) -> None:
        self.task = task

    @abc.abstractmethod
    def draw(self, size: int, seed: int, *, held_out: bool) -> Iterator[Problem]:
        """At most `size` problems; of a file, the rows kept for evaluation or all others."""

    @abc.abstractmethod
    def score(self, problem: Problem, answer: str) -> float:
        """1 for a right answer, 0 for a wrong one. May raise: the sample then counts as failed."""

    def score_all(self, asked: Sequence[tuple[Problem, str]]) -> list[float | Exception]:
        """A verdict for each problem and answer, or what scoring it raised."""
        if self.workers == 1:
            return [self._caught(one) for one in asked]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._caught, asked))

    def metrics(self) -> dict[str, float]:
        """What a source watches about its own scores."""
        return {}

    def _caught(self, asked: tuple[Problem, str]) -> float | Exception:
        try:
            return self.score(*asked)
        except Exception as error:  # a verifier may raise anything on model text
            return error


def parse_task(task: str) -> tuple[str, Mapping[str, Any]]:
    """Name and parameters of a task as a config writes it.

    Args:
      task: `chain_sum`, or with parameters `logic.game_of_24(target=36)`. Values are literals.

    Raises:
      ConfigError: anything else.
    """
    try:
        node = ast.parse(task.strip(), mode="eval").body
        if not isinstance(node, ast.Call):
            return _name(node), {}
        if node.args or any(k.arg is None for k in node.keywords):
            raise ValueError("parameters are given by name")
        return _name(node.func), {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"task {task!r} does not read as name or name(parameter=value, ...): {error}"
        ) from None


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(f"{ast.unparse(node)} is no name")
