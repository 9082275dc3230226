"""Word sorting by an alphabet of the question's own."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

from train.rewards.logic.source import Instance, Puzzle, within
from train.rewards.reading import plain, read_items


class WordSorting(Puzzle):
    """Args: words, their letters, and letters of the alphabet that the words use."""

    name = "word_sorting"

    def __init__(self, words: int = 5, length: int = 4, letters: int = 6) -> None:
        self._words = within("words", words, 2, 100)
        self._length = within("length", length, 1, 20)
        self._letters = within("letters", letters, 2, 26)
        if words > letters**length // 2:
            raise ValueError(f"words = {words} are too many of {length} out of {letters} letters")

    def generate(self, rng: random.Random) -> Instance:
        """Random words, increasing by default or decreasing."""
        alphabet = rng.sample(string.ascii_lowercase, 26)
        letters = rng.sample(alphabet, self._letters)
        words: set[str] = set()
        while len(words) < self._words:
            words.add("".join(rng.choices(letters, k=self._length)))
        descending = rng.random() < 0.5
        right = sorted(words, key=lambda w: [alphabet.index(c) for c in w], reverse=descending)
        given = rng.sample(right, len(right))
        question = (
            f"Sort these words in {'de' if descending else 'in'}creasing order, where the order "
            f"of the letters is {' '.join(alphabet)}.\n\n{', '.join(given)}\n\n"
            "Answer with the sorted words alone, apart by commas."
        )
        return Instance(question, ", ".join(right), {"right": right})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """All words in order; on one line, or a line each."""
        text = plain(answer)
        if text is None:
            return False
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        items = read_items(text) if len(lines) == 1 else lines
        return items is not None and [item.lower() for item in items] == data["right"]
