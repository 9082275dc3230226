"""Ways of thinking for the tasks that a model can be fine-tuned on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Worked(NamedTuple):
    """params: of the dataset, to suit a small model; think: the steps from question to answer."""

    params: dict[str, Any]
    think: Callable[[str], str]


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


def _think_gcd(question: str) -> str:
    """Euclid's remainders: `48%18=12`, `18%12=6`, `12%6=0`."""
    a, b = map(int, question.partition(": ")[2].partition(".")[0].split(", "))
    lines = []
    while b:
        lines.append(f"{a}%{b}={a % b}\n")
        a, b = b, a % b
    return "".join(lines)


def _think_letters(question: str) -> str:
    """Each word with its count of the letter, and the running total: `banana 3 3`."""
    letter, text = question.split('"')[1], question.split('"')[3]
    total, lines = 0, []
    for word in text.split():
        total += word.lower().count(letter.lower())
        lines.append(f"{word} {word.lower().count(letter.lower())} {total}\n")
    return "".join(lines)


def _think_product(question: str) -> str:
    """Partial products of the second factor's digits, then their running sum."""
    first, second = question.partition(": ")[2].partition(".")[0].split(" * ")
    total, lines = 0, []
    for place, digit in enumerate(reversed(second)):
        part = int(first) * int(digit) * 10**place
        lines.append(f"{first}*{int(digit) * 10**place}={part} {total}+{part}={total + part}\n")
        total += part
    return "".join(lines)


WORKED = {
    "chain_sum": Worked(
        {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}, _think_chain
    ),
    "gcd": Worked({"min_numbers": 2, "max_numbers": 2, "max_value": 200}, _think_gcd),
    "letter_counting": Worked({"min_words": 3, "max_words": 6}, _think_letters),
    "products": Worked(
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, _think_product
    ),
}
