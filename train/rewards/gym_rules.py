"""Verifiers for those datasets of reasoning-gym whose own ones do not hold.

Several of reasoning-gym 0.1.25 pass answers to Python's eval, or to SymPy's parse_expr, which does
the same. The one of puzzle24 does not ask whether the given numbers were used, and the one of
game_of_life_halting takes any text for True. Others read the beginning of an answer alone, so that
several answers in a row pass.
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


def foreign(problem: Problem, answer: str) -> bool:
    """Whether an answer holds what no answer should: the question, or characters beyond ASCII that
    neither the question nor the known answer has, such as digits and letters that look alike.
    """
    known = problem.question + problem.answer
    strange = {c for c in answer if not c.isascii()} - set(known)
    return problem.question in answer or bool(strange)


# Their verifiers read as much as they need; an answer has as many words as the known one, or fewer.
FIRST_WORDS = {
    "fraction_simplification",
    "gsm_symbolic",
    "kakurasu",
    "knights_knaves",
    "letter_jumble",
    "polynomial_equations",
    "quantum_lock",
    "spell_backward",
    "survo",
    "time_intervals",
}

RULES: dict[str, Callable[[Problem, str], bool]] = {
    "binary_matrix": _exact,
    "countdown": _target,
    "game_of_life_halting": _exact,
    "intermediate_integration": _antiderivative,
    "n_queens": _one_of,
    "polynomial_multiplication": _same_form,
    "puzzle24": _target,
    "simple_integration": _antiderivative,
    "spiral_matrix": _exact,
    "string_insertion": _exact,
}
