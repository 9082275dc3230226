"""Mathematics from files of questions and answers, compared by math-verify."""

from __future__ import annotations

import os
import re

from train.data.files import FileSource
from train.data.sources import Problem
from train.rewards.guarded import shared
from train.rewards.reading import MAX_LENGTH, plain

_HINT = "\n\nPut the final answer in \\boxed{}."
_NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+")
# Of an answer to which a number is the right one: what still has to be worked out.
_UNWORKED = re.compile(r"(?<=.)[+\-*!]|\^(?!\{?\\circ)|\\(?!d?frac|%|text|,|!|;|\$|circ|mathrm|%)")


class MathSource(FileSource):
    """Rows of `question` and `answer`, a number or LaTeX.

    Args: path, of a JSONL file.
    """

    fields = ("question", "answer")
    workers = os.cpu_count() or 1

    def question(self, row: dict[str, str]) -> str:
        """The row's, and how to answer."""
        return row["question"] + _HINT

    def score(self, problem: Problem, answer: str) -> float:
        """Whether what is in the one box, or the whole of a short answer, is the same value."""
        given = final_answer(answer)
        gold = problem.answer
        if given is None or (_NUMBER.fullmatch(gold.strip()) and _UNWORKED.search(given)):
            return 0.0
        if given.replace(" ", "") == gold.replace(" ", ""):
            return 1.0
        return float(shared().ask("same_mathematics", gold, given))


def final_answer(answer: str) -> str | None:
    r"""What is in the one \boxed{} of an answer; without a box the answer, if it is one line."""
    if len(answer) > MAX_LENGTH:
        return None
    if "\\boxed" not in answer:
        text = plain(answer)
        return text if text and len(text) <= 100 and "\n" not in text else None
    before, _, rest = answer.partition("\\boxed{")
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"{": 1, "}": -1}.get(rest[end], 0)
        end += 1
    given = rest[: end - 1].strip()
    if depth or not given or "\\boxed" in before + rest[end:] + given or not given.isascii():
        return None
    return given
