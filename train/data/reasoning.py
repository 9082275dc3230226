"""Problems of the tasks that a config names, with worked solutions where a task has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from mmjax.chat import THINK_END, THINK_START, render_chat
from mmjax.config import ConfigError
from mmjax.tokenizer import EOS, Tokenizer
from train.config import JobConfig, RewardsConfig
from train.data.examples import Example
from train.data.sources import Family, Problem, parse_task
from train.data.worked import WORKED
from train.rewards.sources import open_source


class ReasoningProblems:
    """Distinct problems of several tasks, in turn.

    Args:
      tasks: As `parse_task` reads them.
      size: Problems to draw; repeated texts are left out, so there can be fewer.
      seed: Of the generators.
      exclude: Texts that must not appear, those of a held-out set.
      rewards: How answers are scored.
      held_out: Whether these are the problems to evaluate on.

    Raises:
      ConfigError: an unknown task, parameters that it does not take or that have no problems, a
        file that cannot be read.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        size: int,
        seed: int,
        exclude: frozenset[str] = frozenset(),
        *,
        rewards: RewardsConfig | None = None,
        held_out: bool = False,
    ) -> None:
        rewards = rewards or RewardsConfig()
        self.weights: Mapping[str, float] = {
            "format": rewards.format_weight,
            "correct": rewards.correct_weight,
        }
        self._sources = {task: open_source(task, rewards) for task in tasks}
        share = -(-size // len(self._sources))
        drawn = [s.draw(share, seed, held_out=held_out) for s in self._sources.values()]
        seen = set(exclude)
        self._problems: list[Problem] = []
        for i in range(size):
            try:
                problem = next(drawn[i % len(drawn)], None)
            except ValueError as error:  # Of a generator: its parameters have no such problem.
                raise ConfigError(f"task {tasks[i % len(drawn)]!r}: {error}") from None
            if problem is not None and problem.question not in seen:
                seen.add(problem.question)
                self._problems.append(problem)

    def __len__(self) -> int:
        return len(self._problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]

    @property
    def digest(self) -> str:
        """Of tasks and questions in their order: the same for the same problems."""
        each = [(problem.task, problem.question) for problem in self._problems]
        return hashlib.sha256(json.dumps(each).encode()).hexdigest()

    @property
    def texts(self) -> frozenset[str]:
        """All questions."""
        return frozenset(p.question for p in self._problems)

    @property
    def families(self) -> dict[str, Family]:
        """Of each task: "rule", or "general" where a model judges."""
        return {task: source.family for task, source in self._sources.items()}

    def metrics(self) -> dict[str, float]:
        """What the scoring watches about itself, by task: of judges, their bias for length."""
        watched = {task: source.metrics() for task, source in self._sources.items()}
        return {
            f"judge/{t}/{name}": x for t, values in watched.items() for name, x in values.items()
        }

    def lowest(self, task: str) -> float:
        """The worst score of a task."""
        return self._sources[task].lowest

    def score(self, problem: Problem, answer: str) -> float:
        """The verifier's verdict on an answer, 0 or 1 (-1 to 1 where answers are compared)."""
        return self._sources[problem.task].score(problem, answer)

    def score_all(self, task: str, asked: Sequence[tuple[Problem, str]]) -> list[float | Exception]:
        """Verdicts on answers to problems of one task, or what scoring one raised."""
        return self._sources[task].score_all(asked)


def split_problems(
    tasks: Sequence[str],
    size: int,
    held_out: int,
    seed: int,
    rewards: RewardsConfig | None = None,
) -> tuple[ReasoningProblems, ReasoningProblems]:
    """Training and held-out problems, of different seeds and without a common text.

    Args:
      tasks: As `parse_task` reads them.
      size: Training problems to draw.
      held_out: Held-out problems to draw.
      seed: Of the training problems; the held-out ones are the same for every seed.
      rewards: How answers are scored.

    Raises:
      ConfigError: what `ReasoningProblems` raises, or tasks that leave one of the two empty.
    """
    test = ReasoningProblems(tasks, held_out, 10**6, rewards=rewards, held_out=True)
    train = ReasoningProblems(tasks, size, seed, test.texts, rewards=rewards)
    if train.texts & test.texts:
        raise AssertionError("training and held-out problems share a text")
    if not len(train) or (held_out and not len(test)):
        raise ConfigError(
            f"{', '.join(tasks)}: {len(train)} problems to train on and {len(test)} held out; "
            "of a file one row in ten is held out, so a few rows are too few"
        )
    return train, test


def prompt_text(problem: Problem) -> str:
    """The question in M1's chat template, up to where the assistant starts."""
    return render_chat([{"role": "user", "content": problem.question}])


def worked_solution(problem: Problem, *, thinking: bool = True) -> str:
    """A solution as the assistant would write it, its thinking left empty if so wanted.

    Raises:
      ConfigError: the task has no worked solutions.
    """
    name, _ = parse_task(problem.task)
    if name not in WORKED:
        raise ConfigError(
            f"task {problem.task!r} has no worked solutions to fine-tune on; "
            f"tasks that have: {', '.join(WORKED)}"
        )
    steps = WORKED[name].think(problem.question) if thinking else ""
    return f"{THINK_START}{steps}{THINK_END}\n\n{problem.answer}{EOS}"


def worked_texts(cfg: JobConfig) -> Iterator[str]:
    """Prompts with their worked solutions, of the problems that a job is fine-tuned on."""
    for problem in _training_problems(cfg):
        yield prompt_text(problem) + worked_solution(problem)


def worked_examples(cfg: JobConfig, tokenizer: Tokenizer) -> list[Example]:
    """The same as examples; only the solution is predicted.

    Raises:
      ConfigError: a solution does not fit a row.
    """
    problems, length = _training_problems(cfg), cfg.data.sequence_length
    direct = np.random.default_rng(cfg.seed).random(len(problems)) < cfg.data.direct_share
    examples = []
    for problem, answer_at_once in zip(problems, direct, strict=True):
        prompt = tokenizer.encode(prompt_text(problem))
        solution = tokenizer.encode(worked_solution(problem, thinking=not answer_at_once))
        if len(prompt) + len(solution) > length:
            raise ConfigError(
                f"a worked solution takes {len(prompt) + len(solution)} tokens, "
                f"data.sequence_length is {length}: {problem.question!r}"
            )
        examples.append(Example.answering(prompt, solution))
    return examples


def _training_problems(cfg: JobConfig) -> ReasoningProblems:
    data = cfg.data
    return _problems(data.tasks, data.size, cfg.cispo.eval_problems, cfg.seed)


@lru_cache(maxsize=1)  # The tokenizer and the examples are made of the same ones.
def _problems(tasks: tuple[str, ...], size: int, held_out: int, seed: int) -> ReasoningProblems:
    return split_problems(tasks, size, held_out, seed)[0]
