"""What completions are worth: format and correctness, weighted.

Source: MiniMax-M1 report, section 3.1.1: correctness and format rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mmjax.chat import THINK_END, THINK_START, split_thinking
from train.data.reasoning import Problem, ReasoningProblems


class Score(NamedTuple):
    """reward: weighted sum of the components; failed: a reward raised, and the sample counts as
    wrong; components: "format" and "correct", 0 to 1 each (-1 to 1 where answers are compared).
    """

    reward: float
    failed: bool
    components: Mapping[str, float]


def score_completions(
    problems: ReasoningProblems,
    chosen: Sequence[Problem],
    texts: Sequence[str],
    finished: Sequence[bool],
) -> list[Score]:
    """Scores samples, each on its own: one whose reward raises fails alone.

    Only what follows the closed thinking is an answer, so a completion of the wrong form, or cut
    off at the limit, is wrong whatever it says: as wrong as one that loses, where answers are
    compared.

    Args:
      problems: Where the problems are from; it knows verifiers and weights.
      chosen: What each sample was asked.
      texts: Completions without their end token.
      finished: Whether each completion ended by itself.

    Returns:
      A score a sample, in order.
    """
    answers = [
        answer_of(text) if whole else None for text, whole in zip(texts, finished, strict=True)
    ]
    by_task: dict[str, list[int]] = {}
    for i, (problem, answer) in enumerate(zip(chosen, answers, strict=True)):
        if answer is not None:
            by_task.setdefault(problem.task, []).append(i)
    verdicts: dict[int, float | Exception] = {}

    def verify(task: str) -> None:
        rows = by_task[task]
        asked = [(chosen[i], answers[i] or "") for i in rows]
        verdicts.update(zip(rows, problems.score_all(task, asked), strict=True))

    # Side by side, because some wait for other processes and machines.
    with ThreadPoolExecutor(max(len(by_task), 1)) as pool:
        list(pool.map(verify, by_task))
    return [
        _score(problems.weights, answer is not None, verdicts.get(i), problems.lowest(problem.task))
        for i, (problem, answer) in enumerate(zip(chosen, answers, strict=True))
    ]


def answer_of(text: str) -> str | None:
    """What follows the thinking; None unless it is closed exactly once and followed by an answer.

    The opening mark may be missing, since a prompt can end with it.
    """
    thinking, answer = split_thinking(text)
    if thinking is None or not answer:
        return None
    mark = THINK_START.strip()
    return None if mark in thinking or mark in answer or THINK_END in answer else answer


def _score(
    weights: Mapping[str, float], form: bool, verdict: float | Exception | None, lowest: float
) -> Score:
    failed = isinstance(verdict, Exception)
    correct = lowest if verdict is None or isinstance(verdict, Exception) else verdict
    components = {"format": float(form), "correct": correct}
    # A verifier that fails is no reason to reward the form.
    counted = {"correct": correct} if failed else components
    return Score(sum(weights[name] * x for name, x in counted.items()), failed, components)
