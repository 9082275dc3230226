"""Mathematics from files of questions and answers, compared by math-verify."""

from __future__ import annotations

import os
import re

from train.data.files import FileSource
from train.data.sources import Problem
from train.rewards.guarded import shared
from train.rewards.reading import MAX_LENGTH, plain

_HINT = "\n\nPut the final answer in \\boxed{}."
# One way of writing what has several: signs, spaces, groups of digits, a name before the value.
_SIGNS = str.maketrans(
    {
        "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ", "°": "^\\circ ", "≤": "\\leq ",
        "≥": "\\geq ", "∪": "\\cup ", "∩": "\\cap ", "×": "*", "·": "*", "÷": "/", "−": "-",
    }
)  # fmt: skip
_SPACING = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[,!;: ]")
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])")
_NAME = re.compile(r"[A-Za-z](?:_\w+|_\{\w+\})?\s*=(?!=)")
_BRACKETED = re.compile(r"\(\s*([+-]?[\d.]+)\s*\)")
_PERCENT = re.compile(r"\s*\\?%$")
_UNIT = re.compile(r"\s*\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?$")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
# Commands that stand for no work still to be done, and those that always do.
_VALUES = {
    "frac",
    "dfrac",
    "tfrac",
    "circ",
    "pi",
    "infty",
    "cdot",
    "times",
    "div",
    "text",
    "mathrm",
}
_TO_DO = {"int", "iint", "oint", "lim", "sum", "prod", "binom", "det", "gcd", "max", "min", "bmod"}


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
        given, gold = final_answer(answer), _settled(problem.answer)
        if given is None:
            return 0.0
        given = _settled(given)
        if given.replace(" ", "") == gold.replace(" ", ""):
            return 1.0
        if _unworked(gold, given, problem.entry.get("question", "")):
            return 0.0
        return float(any(shared().ask("same_mathematics", *pair) for pair in _pairs(gold, given)))


def final_answer(answer: str) -> str | None:
    r"""What is in the one \boxed{} of an answer; without a box the answer, if it is one line."""
    if len(answer) > MAX_LENGTH:
        return None
    answer = answer.translate(_SIGNS)
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


def _settled(text: str) -> str:
    """A value without what does not change it."""
    text = _SPACING.sub(" ", text.translate(_SIGNS)).strip().strip("$").strip()
    text = _GROUPS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _NAME.sub("", text, count=1).strip() if _NAME.match(text) else text
    bracketed = _BRACKETED.fullmatch(text)
    return bracketed[1] if bracketed else text


def _pairs(gold: str, given: str) -> list[tuple[str, str]]:
    """What may be compared: of percentages the numbers, and for one a share."""
    bare = _PERCENT.sub("", gold), _PERCENT.sub("", given)
    shares = gold != bare[0] and given == bare[1]
    return [bare, (f"\\frac{{{bare[0]}}}{{100}}", given)] if shares else [bare]


def _unworked(gold: str, given: str, question: str) -> bool:
    """Whether an answer leaves work that the right one has done, or repeats the question's."""
    right, found = _operations(gold), _operations(given)
    squeezed = given.replace(" ", "")
    if found and squeezed in question.replace(" ", ""):
        return True
    extra = found - right
    if re.search("[A-Za-z]", _COMMAND.sub("", _UNIT.sub("", gold))):
        return bool(extra & ({"=", "!"} | _TO_DO))
    if right - {"/"}:  # As roots, whose factors have many ways of writing.
        return bool(extra - {"*", "/", "^"})
    if re.search(r"[./]|frac", gold):
        extra -= {"/"}
    return bool(extra)


def _operations(text: str) -> set[str]:
    """The operations in a value: signs between operands, and commands."""
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "", _PERCENT.sub("", _UNIT.sub("", text)))
    commands = set(_COMMAND.findall(text))
    body = _COMMAND.sub(" ", text)
    found = {sign for sign in "*!^=/" if sign in body}
    found |= {"+"} if re.search(r"[\w)\]}]\s*[+-]", body) else set()
    found |= {"*"} if commands & {"cdot", "times"} else set()
    found |= {"/"} if commands & {"frac", "dfrac", "tfrac", "div"} else set()
    return found | (commands - _VALUES)
