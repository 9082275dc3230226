"""Cryptarithm: digits for the letters of a sum."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

from train.rewards.logic.source import Instance, Puzzle, within
from train.rewards.reading import read_assignment


class Cryptarithm(Puzzle):
    """Args: digits of the larger number, and numbers in the sum."""

    name = "cryptarithm"

    def __init__(self, digits: int = 3, terms: int = 2) -> None:
        self._digits = within("digits", digits, 1, 12)
        self._terms = within("terms", terms, 2, 5)

    def generate(self, rng: random.Random) -> Instance:
        """Letters in a random sum; other digits may fit as well."""
        low, high = 10 ** (self._digits - 1), 10**self._digits
        terms = [rng.randrange(low, high) for _ in range(self._terms)]
        digits = rng.sample(string.digits, 10)
        code = dict(zip(digits, rng.sample(string.ascii_uppercase, 10), strict=True))
        words = ["".join(code[d] for d in str(n)) for n in [*terms, sum(terms)]]
        letters = sorted(set("".join(words)))
        question = (
            "Every letter stands for a digit, different letters for different digits, and no "
            f"number starts with 0.\n\n{' + '.join(words[:-1])} = {words[-1]}\n\n"
            f"Answer with the digits alone, such as {letters[0]}=1, {letters[-1]}=2."
        )
        back = {letter: digit for digit, letter in code.items()}
        answer = ", ".join(f"{letter}={back[letter]}" for letter in letters)
        return Instance(question, answer, {"words": words})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """Any digits that make the sum right."""
        *terms, total = words = data["words"]
        found = read_assignment(answer, set("".join(words)))
        if found is None or len(set(found.values())) != len(found):
            return False
        if not all(len(d) == 1 and d in string.digits for d in found.values()):
            return False
        if any(found[word[0]] == "0" for word in words if len(word) > 1):
            return False
        *values, right = (int("".join(found[c] for c in word)) for word in [*terms, total])
        return sum(values) == right
