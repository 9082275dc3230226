"""Reasoning problems of the package reasoning-gym, with worked solutions for fine-tuning.

Every problem is scored by its own verifier in reasoning-gym; only the worked solutions, which
show a first way of thinking, are written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import reasoning_gym

from mmjax.chat import THINK_END, THINK_START, render_chat
from mmjax.config import ConfigError
from mmjax.tokenizer import EOS


class Problem(NamedTuple):
    """task: name in `TASKS`; question; answer; entry: what the verifier wants back."""

    task: str
    question: str
    answer: str
    entry: dict[str, Any]


class _Task(NamedTuple):
    dataset: str
    params: dict[str, Any]
    think: Callable[[str], str]


class ReasoningProblems:
    """Distinct problems of several tasks, in turn.

    Args:
      tasks: Names in `TASKS`.
      size: Problems to draw; repeated texts are left out, so there can be fewer.
      seed: Of the generators.
      exclude: Texts that must not appear, those of a held-out set.

    Raises:
      ConfigError: an unknown task.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        size: int,
        seed: int,
        exclude: frozenset[str] = frozenset(),
    ) -> None:
        unknown = sorted(set(tasks) - set(TASKS))
        if unknown:
            raise ConfigError(f"unknown reasoning task {unknown}; known: {', '.join(TASKS)}")
        share = -(-size // len(tasks))
        self._datasets = {
            name: reasoning_gym.create_dataset(
                TASKS[name].dataset, size=share, seed=seed, **TASKS[name].params
            )
            for name in tasks
        }
        seen = set(exclude)
        self._problems: list[Problem] = []
        for i in range(size):
            name = tasks[i % len(tasks)]
            entry = self._datasets[name][i // len(tasks)]
            if entry["question"] not in seen:
                seen.add(entry["question"])
                self._problems.append(Problem(name, entry["question"], entry["answer"], entry))

    def __len__(self) -> int:
        return len(self._problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]

    @property
    def texts(self) -> frozenset[str]:
        """All questions."""
        return frozenset(p.question for p in self._problems)

    def score(self, problem: Problem, answer: str) -> float:
        """The verifier's score of an answer, 0 to 1."""
        return float(self._datasets[problem.task].score_answer(answer, problem.entry))


def split_problems(
    tasks: Sequence[str], size: int, held_out: int, seed: int
) -> tuple[ReasoningProblems, ReasoningProblems]:
    """Training and held-out problems, of different seeds and without a common text.

    Args:
      tasks: Names in `TASKS`.
      size: Training problems to draw.
      held_out: Held-out problems to draw.
      seed: Of the training problems; the held-out ones are the same for every seed.
    """
    test = ReasoningProblems(tasks, held_out, seed=10**6)
    train = ReasoningProblems(tasks, size, seed=seed, exclude=test.texts)
    if train.texts & test.texts:
        raise AssertionError("training and held-out problems share a text")
    return train, test


def prompt_text(problem: Problem) -> str:
    """The question in M1's chat template, up to where the assistant starts."""
    return render_chat([{"role": "user", "content": problem.question}])


def worked_solution(problem: Problem, *, thinking: bool = True) -> str:
    """A solution as the assistant would write it, its thinking left empty if so wanted."""
    think = TASKS[problem.task].think(problem.question) if thinking else ""
    return f"{THINK_START}{think}{THINK_END}\n\n{problem.answer}{EOS}"


def _think_chain(question: str) -> str:
    """Running totals from the left: `3+8=11`, then `11-2=9`."""
    expression = question.rpartition(":")[2].strip(" =")
    total, *rest = expression.split()
    lines = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        value = int(total) + (int(term) if sign == "+" else -int(term))
        lines.append(f"{total}{sign}{term}={value}\n")
        total = str(value)
    return "".join(lines)


TASKS: dict[str, _Task] = {
    "chain_sum": _Task(
        "chain_sum",
        {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1},
        _think_chain,
    ),
}
