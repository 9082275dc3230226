"""Rule-checked rewards."""

from __future__ import annotations

from typing import NamedTuple

from mmjax.chat import split_thinking
from train.data.reasoning import Problem, ReasoningProblems


class Score(NamedTuple):
    """reward, 0 or 1; failed: the verifier raised, which counts as 0 for this sample alone."""

    reward: float
    failed: bool


def score_completion(problems: ReasoningProblems, problem: Problem, text: str) -> Score:
    """1 for a completion that closes its thinking and whose answer the verifier accepts whole.

    Args:
      problems: For the verifier.
      problem: What was asked.
      text: The completion without its end token.

    Source: MiniMax-M1 report, section 3.1.1: correctness and format rewards.
    """
    thinking, answer = split_thinking(text)
    if thinking is None:
        return Score(0.0, False)
    try:
        return Score(float(problems.score(problem, answer) >= 1.0), False)
    except Exception:  # a verifier may raise anything on model text
        return Score(0.0, True)
