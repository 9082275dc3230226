"""Knights, who tell the truth, and knaves, who lie: who is who?"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from train.rewards.logic.source import Instance, Puzzle, within
from train.rewards.reading import read_assignment

_NAMES = ("Anna", "Bob", "Cora", "Dan", "Eve", "Finn", "Gina", "Hugo")
_KINDS = {"knight": True, "knave": False}

# A claim: its form and the places of those that it is about.
type Claim = tuple[str, int, int]
_TEXTS = {
    "knight": "{a} is a knight",
    "knave": "{a} is a knave",
    "same": "{a} and {b} are of the same kind",
    "differ": "{a} and {b} are of different kinds",
    "both": "{a} and {b} are both knights",
    "either": "at least one of {a} and {b} is a knave",
}


class KnightsAndKnaves(Puzzle):
    """Args: number of people."""

    name = "knights_and_knaves"

    def __init__(self, people: int = 3) -> None:
        self._people = within("people", people, 2, len(_NAMES))

    def generate(self, rng: random.Random) -> Instance:
        """One claim of each, such that only one assignment fits."""
        count = self._people
        names = list(_NAMES[:count])
        while True:
            claims = [_claim(rng, count, speaker) for speaker in range(count)]
            fits = [k for k in itertools.product((True, False), repeat=count) if _fits(k, claims)]
            if len(fits) == 1:
                break
        said = "\n".join(
            f"{names[i]} says: {_TEXTS[form].format(a=names[a], b=names[b])}."
            for i, (form, a, b) in enumerate(claims)
        )
        question = (
            "On an island knights always tell the truth and knaves always lie.\n\n"
            f"{said}\n\nWho is what? Answer with a kind for each name alone, "
            f"such as {names[0]} = knight, {names[1]} = knave."
        )
        kinds = ("knight" if k else "knave" for k in fits[0])
        answer = ", ".join(f"{n} = {k}" for n, k in zip(names, kinds, strict=True))
        return Instance(question, answer, {"names": names, "claims": [list(c) for c in claims]})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """A kind for everyone that fits what they say."""
        found = read_assignment(answer, data["names"])
        if found is None or not all(kind.lower() in _KINDS for kind in found.values()):
            return False
        return _fits([_KINDS[found[name].lower()] for name in data["names"]], data["claims"])


def _claim(rng: random.Random, count: int, speaker: int) -> Claim:
    a, b = rng.sample([i for i in range(count) if i != speaker] + [speaker], 2)
    form = rng.choice(list(_TEXTS))
    return (form, b, a) if a == speaker else (form, a, b)


def _fits(knights: Sequence[bool], claims: Sequence[Sequence[Any]]) -> bool:
    return all(knights[i] == _true(knights, *claim) for i, claim in enumerate(claims))


def _true(knights: Sequence[bool], form: str, first: int, second: int) -> bool:
    a, b = knights[first], knights[second]
    return {
        "knight": a,
        "knave": not a,
        "same": a == b,
        "differ": a != b,
        "both": a and b,
        "either": not (a and b),
    }[form]
