"""Operations with symbols that the question defines."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from train.rewards.logic.source import Instance, Puzzle, within
from train.rewards.reading import plain

_SYMBOLS = "@#&$%"
_INTEGER = re.compile(r"[+-]?\d{1,40}")


class Operation(Puzzle):
    """Args: symbols that are defined, numbers that they join, and the largest of those."""

    name = "operation"

    def __init__(self, symbols: int = 2, terms: int = 3, largest: int = 9) -> None:
        self._symbols = within("symbols", symbols, 1, len(_SYMBOLS))
        self._terms = within("terms", terms, 2, 8)
        self._largest = within("largest", largest, 1, 1000)

    def generate(self, rng: random.Random) -> Instance:
        """Linear operations, evaluated from left to right."""
        symbols = rng.sample(_SYMBOLS, self._symbols)
        rules = {s: [_coefficient(rng), _coefficient(rng), rng.randint(-9, 9)] for s in symbols}
        value = rng.randint(0, self._largest)
        expression = str(value)
        for _ in range(self._terms - 1):
            symbol, term = rng.choice(symbols), rng.randint(0, self._largest)
            a, b, c = rules[symbol]
            value = a * value + b * term + c
            expression += f" {symbol} {term}"
        defined = "\n".join(f"x {s} y = {a}*x + ({b})*y + ({c})" for s, (a, b, c) in rules.items())
        question = (
            f"Operations are defined by\n\n{defined}\n\nand done from left to right. "
            f"What is {expression}? Answer with the number alone."
        )
        return Instance(question, str(value), {"value": value})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """The value, as a whole number."""
        text = plain(answer)
        if text is None:
            return False
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).rstrip(".")
        return bool(_INTEGER.fullmatch(text)) and int(text) == data["value"]


def _coefficient(rng: random.Random) -> int:
    return rng.choice([-3, -2, -1, 1, 2, 3])
