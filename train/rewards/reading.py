"""Reads answers strictly: many spellings of one answer, never several answers, never evaluated."""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction
from typing import NamedTuple

# Nobody needs more for an answer, and parsers need time for more.
MAX_LENGTH = 4000
_MAX_DIGITS = 12
_MAX_NESTING = 50
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})
_FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
_WRAPPED = [
    re.compile(p, re.DOTALL)
    for p in (
        r"\\boxed\{(.*)\}",
        r"\$+([^$]*)\$+",
        r"\\\((.*)\\\)",
        r"\\\[(.*)\\\]",
        r"\*\*((?:(?!\*\*).)*)\*\*",
        r"`([^`]*)`",
        r"<answer>(.*)</answer>",
    )
]
_BOLD = re.compile(r"\*\*(.*)\*\*", re.DOTALL)
_LABEL = re.compile(
    r"(?:#+\s*)?(?:\**(?:the )?(?:final )?answer(?: is)?\**\s*:\**\s*"
    r"|(?:the )?(?:final )?answer(?: is)?\s+)",
    re.I,
)
_TOKEN = re.compile(r"\s*(?:(\d+)|(.))", re.DOTALL)
_PAIR = re.compile(
    r"['\"]?(\w+)['\"]?\s*(?:->|=>|[=:]|\bis\b)\s*(?:an? )?['\"]?(\w+)['\"]?", re.ASCII
)
_RULER = re.compile(r"[-+=|\s]*[-+=][-+=|\s]*")


def plain(answer: str) -> str | None:
    r"""An answer without its wrapping, whatever is around what: a code fence, \boxed{}, $…$, \(…\),
    **…**, `…`, <answer>, "Answer:", and the full stop of "The answer is ….".

    Returns:
      ASCII text; None for a longer text than answers need, or one with other characters, such as
      letters that look like others. The signs × · ÷ − become * * / -.
    """
    if len(answer) > MAX_LENGTH:
        return None
    text = answer.translate(_SIGNS).strip()
    if not text.isascii():
        return None
    before = ""
    while text != before:
        before = text
        if fence := _FENCE.fullmatch(text):
            # Spaces at the start of a line may be a grid's.
            fenced = fence[1].strip("\n")
            return fenced if "\n" in fenced else plain(fenced)
        for pattern in _WRAPPED:
            if found := pattern.fullmatch(text):
                text = found[1].strip()
        if label := _LABEL.match(text):
            sentence = re.search(r"\bis\b", label[0], re.I)
            text = text[label.end() :].strip().removesuffix("." if sentence else "")
        # Around powers, which are written ** too, where nothing else comes off.
        if text == before and (found := _BOLD.fullmatch(text)):
            text = found[1].strip()
    return text


def read_items(answer: str) -> list[str] | None:
    """The items of one list: between commas or spaces, in brackets or quotes or not."""
    text = plain(answer)
    if text is None or len(text.splitlines()) > 1:
        return None
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    items = [item.strip().strip("'\"") for item in text.split("," if "," in text else None)]
    return (
        items if all(item and not re.search(r"[\s\[\](){}'\"]", item) for item in items) else None
    )


def read_grid(
    answer: str, rows: int, columns: int, symbols: Collection[str]
) -> list[list[str]] | None:
    """One grid of symbols: cells apart by spaces, commas, bars or brackets, or digits in a row.

    Returns:
      [rows][columns] symbols; None unless the text is exactly that.
    """
    text = plain(answer)
    if text is None:
        return None
    lines = [line for line in text.splitlines() if line.strip() and not _RULER.fullmatch(line)]
    cells = [re.sub(r"[\[\](),|;'\"]", " ", line).split() for line in lines]
    if len(cells) == 1:  # a list of lists, on one line
        flat = cells[0]
        cells = [flat[i : i + columns] for i in range(0, len(flat), columns)]
    if all(len(line) == 1 for line in cells) and columns > 1:
        cells = [list(line[0]) for line in cells]
    good = len(cells) == rows and all(len(line) == columns for line in cells)
    return cells if good and all(cell in symbols for line in cells for cell in line) else None


def read_assignment(answer: str, names: Collection[str]) -> dict[str, str] | None:
    """A value for each name: `A=1, B: 2`, `{"A": 1}`, or a line each, `A is 1`.

    Returns:
      Values by name; None unless every name has exactly one.
    """
    text = plain(answer)
    if text is None:
        return None
    text = re.sub(r"(?m)^\s*\d+[.)]\s+", "", re.sub("[*`]", "", text)).strip("{}[]() \n")
    found: dict[str, str] = {}
    for part in re.split(r"[,;\n]+|\band\b|\.(?=\s)", text):
        if not part.strip():
            continue
        pair = _PAIR.fullmatch(part.strip(" -."))
        if pair is None or pair[1] in found or pair[1] not in names:
            return None
        found[pair[1]] = pair[2]
    return found if len(found) == len(names) else None


class Value(NamedTuple):
    """value: exact, None after a division by zero; numbers: as written, in order."""

    value: Fraction | None
    numbers: list[int]


def evaluate(expression: str) -> Value | None:
    """An arithmetic expression of whole numbers, + - * / and parentheses, in exact fractions.

    Returns:
      None if it is anything else: names, powers, signs before numbers, numbers beyond 12 digits.
    """
    if not expression.isascii():
        return None
    tokens = [a or b for a, b in _TOKEN.findall(expression.rstrip())]
    if len(tokens) > 400 or any(t.isdigit() and len(t) > _MAX_DIGITS for t in tokens):
        return None
    parser = _Parser(tokens)
    try:
        value = parser.sum(0)
    except ZeroDivisionError:
        return Value(None, parser.numbers)
    except SyntaxError:
        return None
    return Value(value, parser.numbers) if not parser.rest else None


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.rest = tokens[::-1]
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.rest and self.rest[-1] in "+-":
            sign = self.rest.pop()
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.rest and self.rest[-1] in "*/":
            sign = self.rest.pop()
            factor = self.atom(depth)
            value = value * factor if sign == "*" else value / factor
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.rest.pop() if self.rest else ""
        if token.isdigit():
            self.numbers.append(int(token))
            return Fraction(int(token))
        if token != "(" or depth >= _MAX_NESTING:
            raise SyntaxError(token)
        value = self.sum(depth + 1)
        if not self.rest or self.rest.pop() != ")":
            raise SyntaxError("unclosed")
        return value
