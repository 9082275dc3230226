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


WORKED = {
    "chain_sum": Worked(
        {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}, _think_chain
    ),
}
