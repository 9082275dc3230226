"""Game of 24: reach a target with each of some numbers once."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from train.rewards.logic.source import Instance, Puzzle, within
from train.rewards.reading import evaluate, plain


class GameOf24(Puzzle):
    """Args: numbers given, their largest value, and the target."""

    name = "game_of_24"

    def __init__(self, numbers: int = 4, largest: int = 13, target: int = 24) -> None:
        self._count = within("numbers", numbers, 2, 6)
        self._largest = within("largest", largest, 4, 100)
        self._target = within("target", target, 1, 1000)

    def generate(self, rng: random.Random) -> Instance:
        """Joins random numbers by random signs until one is the target."""
        for _ in range(100_000):
            numbers = [rng.randint(1, self._largest) for _ in range(self._count)]
            parts = [str(n) for n in numbers]
            while len(parts) > 1:
                right, left = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
                parts.append(f"({left} {rng.choice('+-*/')} {right})")
            found = evaluate(parts[0])
            if found and found.value == self._target:
                answer = parts[0][1:-1]
                given = ", ".join(map(str, numbers))
                question = (
                    f"Use each of the numbers {given} exactly once, with + - * / and parentheses, "
                    f"to make {self._target}. Answer with the expression alone."
                )
                return Instance(question, answer, {"numbers": numbers, "target": self._target})
        raise ValueError(f"no game found for target {self._target}; choose smaller numbers")

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """Value and numbers; `= target` may stand after the expression."""
        text = plain(answer)
        if text is None:
            return False
        expression, equals, result = text.partition("=")
        found = evaluate(expression)
        return (
            found is not None
            and found.value == data["target"]
            and sorted(found.numbers) == sorted(data["numbers"])
            and (not equals or result.strip() == str(data["target"]))
        )
