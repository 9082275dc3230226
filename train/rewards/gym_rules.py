"""Verifiers for those datasets of reasoning-gym whose own ones evaluate a model's text.

reasoning-gym 0.1.25 passes answers to Python's eval, or to SymPy's parse_expr, which does the same;
and its verifier of puzzle24 does not ask whether the given numbers were used.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from train.data.sources import Problem
from train.rewards.guarded import shared
from train.rewards.reading import MAX_LENGTH, evaluate


def _exact(problem: Problem, answer: str) -> bool:
    return answer.strip() == problem.answer


def _one_of(problem: Problem, answer: str) -> bool:
    return answer.strip() in problem.entry["metadata"]["valid_answers"]


def _target(problem: Problem, answer: str) -> bool:
    metadata = problem.entry["metadata"]
    found = evaluate(answer) if len(answer) <= MAX_LENGTH else None
    return (
        found is not None
        and found.value == Fraction(metadata.get("target", 24))
        and sorted(found.numbers) == sorted(metadata["numbers"])
    )


def _same_form(problem: Problem, answer: str) -> bool:
    return len(answer) <= MAX_LENGTH and shared().ask("same_form", problem.answer, answer)


def _antiderivative(problem: Problem, answer: str) -> bool:
    metadata = problem.entry["metadata"]
    return len(answer) <= MAX_LENGTH and shared().ask(
        "antiderivative", str(metadata["integrand"]), str(metadata["variable"]), answer
    )


RULES: dict[str, Callable[[Problem, str], bool]] = {
    "binary_matrix": _exact,
    "countdown": _target,
    "intermediate_integration": _antiderivative,
    "n_queens": _one_of,
    "polynomial_multiplication": _same_form,
    "puzzle24": _target,
    "simple_integration": _antiderivative,
    "spiral_matrix": _exact,
    "string_insertion": _exact,
}
