"""What counts as an answer to a dataset of reasoning-gym: its form first, then its value.

Many of reasoning-gym 0.1.25's own verifiers do not hold. Some pass answers to Python's eval, or to
SymPy's parse_expr, which does the same; others read the first number or letters of a text, so that
"-5", "5/7" and "5 or nothing" pass for 5, or take "nan" for any number. Here an answer is the known
one, or the same number. Where there are several right ones, a rule of ours decides, or reasoning-
gym's verifier, which then sees nothing but a text that is an answer from its first character to its
last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from train.data.sources import Problem
from train.rewards.guarded import shared
from train.rewards.reading import MAX_LENGTH, evaluate

_DIGITS = r"\d{1,3}(?:,\d{3})+|\d{1,400}"
_PLAIN = rf"[+-]?(?:{_DIGITS})?(?:\.\d{{1,400}})?"
_NUMBER = re.compile(rf"(?=.*\d){_PLAIN}")
_SCIENTIFIC = re.compile(r"[+-]?\d{1,40}(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?")
_COMPLEX = re.compile(rf"({_PLAIN})(?:([+-])((?:{_DIGITS})?(?:\.\d+)?)[ij])?|({_PLAIN})[ij]")
_FRACTION = re.compile(
    r"(\$?)(?:\\[dt]?frac\{(-?\d{1,40})\}\{(\d{1,40})\}|(-?\d{1,40})/(\d{1,40}))\1"
)


def same(problem: Problem, answer: str) -> bool:
    """Whether an answer is the known one but for case and spaces, or the same decimal number."""
    known = _squeezed(problem.answer)
    if not known:
        return False
    number, given = _number(known), _number(_squeezed(answer))
    return _squeezed(answer) == known or (number is not None and number == given)


def foreign(problem: Problem, answer: str) -> bool:
    """Whether an answer holds what no answer should: the question, or characters beyond ASCII that
    neither the question nor the known answer has, such as digits and letters that look alike.
    """
    known = problem.question + problem.answer
    strange = {c for c in answer if not c.isascii()} - set(known)
    return problem.question in answer or bool(strange)


def _squeezed(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.casefold().splitlines())
    return "\n".join(line for line in lines if line)


def _number(text: str) -> Decimal | None:
    """A decimal number, thousands in groups or not, and nothing else."""
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _near(known: Decimal, given: Decimal) -> bool:
    """Whether a number rounds to the known one, which has been rounded to its digits."""
    exponent = int(known.as_tuple().exponent)
    return abs(known - given) <= (Decimal(51).scaleb(exponent - 2) if exponent < 0 else 0)


def _numbers(text: str) -> list[Decimal] | None:
    """Numbers between commas, a degree sign after them or not."""
    found = [_number(part.strip().removesuffix("°")) for part in text.split(",")]
    return None if None in found else [x for x in found if x is not None]


def _near_all(known: list[Decimal] | None, given: list[Decimal] | None) -> bool:
    return (
        known is not None
        and given is not None
        and len(known) == len(given)
        and all(_near(*pair) for pair in zip(known, given, strict=True))
    )


def _geometry(problem: Problem, answer: str) -> bool:
    """A number, an angle, or the coordinates of a point."""
    if (problem.answer[:1] == "(") != (answer[:1] == "("):
        return False
    texts = (t[1:-1] if t[:1] + t[-1:] == "()" else t for t in (problem.answer, answer))
    return _near_all(*map(_numbers, texts))


def _roots(problem: Problem, answer: str) -> bool:
    """All of them in any order; where there are none, a word for it."""
    if not problem.answer:
        nothing = r"(?:none|no(?: real)?(?: solutions?| roots?)?)\.?"
        return re.fullmatch(nothing, answer, re.I) is not None
    known, given = _numbers(problem.answer), _numbers(answer)
    return _near_all(known and sorted(known), given and sorted(given))


def _ordered(problem: Problem, answer: str) -> bool:
    """A sorted list of numbers, as text or not."""
    texts = (re.sub(r"[\"' ]", "", t) for t in (problem.answer, answer))
    lists = [_numbers(t[1:-1]) if t[:1] + t[-1:] == "[]" else None for t in texts]
    return _near_all(*lists)


def _complex(problem: Problem, answer: str) -> bool:
    known, given = (_parts(text.replace(" ", "")) for text in (problem.answer, answer))
    return _near_all(known, given)


def _parts(text: str) -> list[Decimal] | None:
    found = _COMPLEX.fullmatch(text)
    if found is None:
        return None
    real, sign, size, alone = found.groups()
    imaginary = f"{sign}{size or 1}" if sign else "0" if alone is None else alone
    imaginary = f"{imaginary}1" if imaginary in ("", "+", "-") else imaginary
    return _numbers(f"{real or '0'},{imaginary}")


def _probability(problem: Problem, answer: str) -> bool:
    """A decimal number or a fraction, to a thousandth of its value."""
    known, given = (_ratio(re.sub(r"\s*/\s*", "/", t)) for t in (problem.answer, answer))
    return known is not None and given is not None and abs(known - given) <= abs(known) / 1000


def _ratio(text: str) -> Fraction | None:
    above, _, below = text.partition("/")
    parts = [_number(part) for part in (above, below or "1")]
    if None in parts or not parts[1]:
        return None
    return Fraction(parts[0]) / Fraction(parts[1])  # type: ignore[arg-type]


def _three_digits(problem: Problem, answer: str) -> bool:
    """As the question asks for."""
    if not _SCIENTIFIC.fullmatch(answer):
        return False
    return f"{Decimal(answer):.2e}" == f"{Decimal(problem.answer):.2e}"


def _lowest_terms(problem: Problem, answer: str) -> bool:
    found = _FRACTION.fullmatch(answer.replace(" ", ""))
    metadata = problem.entry["metadata"]
    wanted = (metadata["simplified_numerator"], metadata["simplified_denominator"])
    if found is None:
        return wanted[1] == 1 and answer.strip() == str(wanted[0])
    return tuple(int(part) for part in found.groups()[1:] if part) == wanted


def _factors(problem: Problem, answer: str) -> bool:
    """In any order, between × * or x."""
    known, given = (sorted(re.split(r"\s*[×*x]\s*", t.strip())) for t in (problem.answer, answer))
    return known == given


def _duration(problem: Problem, answer: str) -> bool:
    """With leading zeros or not, days with their unit or not."""
    known, given = (
        re.sub(r"\b0+(?=\d)", "", _squeezed(text)).replace("days", "day")
        for text in (problem.answer, answer)
    )
    return given in (known, known.removesuffix(" day"))


def _same_json(problem: Problem, answer: str) -> bool:
    """The same values; what is no JSON is compared as text."""
    known, given = (_json(text) for text in (problem.answer, answer))
    # A dump tells true from 1.
    return json.dumps(known, sort_keys=True) == json.dumps(given, sort_keys=True)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


def _one_word(problem: Problem, answer: str) -> bool:
    return answer.replace(" ", "").casefold() == problem.answer.replace(" ", "").casefold()


def _between_commas(problem: Problem, answer: str) -> bool:
    """Words in order, whatever spaces there are beside commas."""
    known, given = (re.split(r"\s*,\s*", t.strip()) for t in (problem.answer, answer))
    return known == given


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
    "advanced_geometry": _geometry,
    "codeio": _same_json,
    "coin_flip": _probability,
    "complex_arithmetic": _complex,
    "countdown": _target,
    "figlet_font": _one_word,
    "fraction_simplification": _lowest_terms,
    "game_of_life": _same_json,
    "intermediate_integration": _antiderivative,
    "list_functions": _same_json,
    "n_queens": _one_of,
    "needle_haystack": _one_word,
    "number_sorting": _ordered,
    "polynomial_equations": _roots,
    "polynomial_multiplication": _same_form,
    "power_function": _three_digits,
    "prime_factorization": _factors,
    "puzzle24": _target,
    "simple_integration": _antiderivative,
    "time_intervals": _duration,
    "word_sorting": _between_commas,
}

_JSON = r"[\[{].*[\]}]"
# Of datasets with several right answers: what the whole of one looks like.
FORMS = {
    name: re.compile(form, re.DOTALL)
    for name, form in {
        "boxnet": _JSON,
        "cryptarithm": r"(?:([A-Z])\s*=\s*\d(?!.*\1)\s*(?:,\s*|$))+",
        "decimal_arithmetic": _NUMBER.pattern,
        "graph_color": _JSON,
        "group_anagrams": _JSON,
        "jugs": _JSON,
        "kakurasu": r"[01](?:[ \n][01])*",
        "knight_swap": _JSON,
        "knights_knaves": r"(\w+) is an? \w+(?!.*\b\1\b)"
        r"(?:(?:,| and|, and|\.) (\w+) is an? \w+(?!.*\b\2\b))*\.?",
        "palindrome_generation": r"[A-Za-z]+",
        "palindrome_partitioning": _JSON,
        "pool_matrix": r"-?\d+(?:\.\d+)?(?:[ \n]-?\d+(?:\.\d+)?)*",
        "propositional_logic": r"[A-Z∧∨→↔¬() ]+",
        "quantum_lock": r"[A-C](?:\s*(?:→|->|,)?\s*[A-C])*",
        "rubiks_cube": r"[FBLRUDMESxyz]w?['2]?(?:\s+[FBLRUDMESxyz]w?['2]?)*",
        "rush_hour": r"[A-Z][+-]\d{1,2}(?:\s+[A-Z][+-]\d{1,2})*",
        "shortest_path": r"(?:up|down|left|right)(?:\s+(?:up|down|left|right))*",
        "sokoban": r"[UDLR]+",
        "tower_of_hanoi": r"Move disk \d+ from Peg \d+ to Peg \d+"
        r"(?:\s*\n\s*Move disk \d+ from Peg \d+ to Peg \d+)*",
        "word_ladder": r"[A-Za-z]+(?:\s*,\s*[A-Za-z]+)+",
    }.items()
}
