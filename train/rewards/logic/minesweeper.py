"""Minesweeper: find all mines of a board of which some cells are open."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.rewards.logic.source import Instance, Puzzle, within
from train.rewards.reading import plain

_PAIR = re.compile(r"[(\[]\s*(\d{1,3})\s*,\s*(\d{1,3})\s*[)\]]")
_CLOSED = "?"


class Minesweeper(Puzzle):
    """Args: size of the board, its mines, and the share of the free cells that are closed."""

    name = "minesweeper"

    def __init__(self, size: int = 5, mines: int = 5, closed: float = 0.3) -> None:
        self._size = within("size", size, 2, 20)
        self._mines = within("mines", mines, 1, size * size - 1)
        if not 0 <= closed <= 1:
            raise ValueError(f"closed = {closed} is no share of the cells, 0 to 1")
        self._closed = closed

    def generate(self, rng: random.Random) -> Instance:
        """A random board; there may be other mines that fit what is open."""
        size = self._size
        cells = [(r, c) for r in range(size) for c in range(size)]
        mines = set(rng.sample(cells, self._mines))
        free = [cell for cell in cells if cell not in mines]
        shown = set(rng.sample(free, len(free) - round(self._closed * len(free))))
        board = [
            [str(_near((r, c), mines)) if (r, c) in shown else _CLOSED for c in range(size)]
            for r in range(size)
        ]
        rows = "\n".join(" ".join(row) for row in board)
        question = (
            f"This minesweeper board has {self._mines} mines under its closed cells (?). A number "
            "says how many of the up to eight cells around it are mines.\n\n"
            f"{rows}\n\nAnswer with the mines alone, as (row, column) counted from 1, "
            "such as (1, 2), (3, 1)."
        )
        answer = ", ".join(f"({r + 1}, {c + 1})" for r, c in sorted(mines))
        return Instance(question, answer, {"board": board, "mines": self._mines})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """Any mines that fit the open cells."""
        found = _read(answer)
        board: Sequence[Sequence[str]] = data["board"]
        if found is None or len(found) != data["mines"] or len(set(found)) != len(found):
            return False
        inside = range(len(board))
        if not all(r in inside and c in inside and board[r][c] == _CLOSED for r, c in found):
            return False
        return all(
            cell in (_CLOSED, str(_near((r, c), set(found))))
            for r, row in enumerate(board)
            for c, cell in enumerate(row)
        )


def _near(cell: tuple[int, int], mines: set[tuple[int, int]]) -> int:
    return sum(max(abs(cell[0] - r), abs(cell[1] - c)) == 1 for r, c in mines)


def _read(answer: str) -> list[tuple[int, int]] | None:
    """Pairs, counted from 0, if the answer is nothing else."""
    text = plain(answer)
    if text is None or re.sub(r"[\s,;\[\]{}]", "", _PAIR.sub("", text)):
        return None
    return [(int(r) - 1, int(c) - 1) for r, c in _PAIR.findall(text)]
