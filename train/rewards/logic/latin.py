"""Grids with each number once in every row and column: sudoku, futoshiki, skyscrapers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from train.rewards.logic.source import Instance, Puzzle, within
from train.rewards.reading import read_grid

type Grid = Sequence[Sequence[int]]


def latin_square(rng: random.Random, size: int, box: int = 1) -> list[list[int]]:
    """A random one; with boxes of box × box that hold each number once, where box² = size."""
    order = [
        [band * box + i for band in rng.sample(range(size // box), size // box)
         for i in rng.sample(range(box), box)]
        for _ in range(2)
    ]  # fmt: skip
    numbers = rng.sample(range(1, size + 1), size)
    shift = (lambda r: r % box * box + r // box) if box > 1 else (lambda r: r)
    return [[numbers[(shift(r) + c) % size] for c in order[1]] for r in order[0]]


def is_latin(grid: Grid, box: int = 1) -> bool:
    """Whether every row, column and box holds 1 … size."""
    size = len(grid)
    areas = [[(r, c) for c in range(size)] for r in range(size)]
    areas += [[(r, c) for r in range(size)] for c in range(size)]
    if box > 1:
        areas += [
            [(r + i, c + j) for i in range(box) for j in range(box)]
            for r in range(0, size, box)
            for c in range(0, size, box)
        ]
    every = list(range(1, size + 1))
    return all(sorted(grid[r][c] for r, c in area) == every for area in areas)


def read_numbers(answer: str, size: int) -> list[list[int]] | None:
    """A grid of 1 … size from an answer."""
    cells = read_grid(answer, size, size, [str(n) for n in range(1, size + 1)])
    return None if cells is None else [[int(c) for c in row] for row in cells]


def show(grid: Grid) -> str:
    """Rows of numbers, `.` for 0."""
    return "\n".join(" ".join(str(c) if c else "." for c in row) for row in grid)


def _blanked(rng: random.Random, grid: Grid, share: float) -> list[list[int]]:
    size = len(grid)
    hidden = set(rng.sample(range(size * size), round(share * size * size)))
    return [[0 if r * size + c in hidden else grid[r][c] for c in range(size)] for r in range(size)]


def _agrees(grid: Grid, given: Grid) -> bool:
    rows = zip(grid, given, strict=True)
    return all(g in (0, c) for row, hints in rows for c, g in zip(row, hints, strict=True))


def _share(blanks: float) -> float:
    if not 0 < blanks <= 1:
        raise ValueError(f"blanks = {blanks} is no share of the cells, above 0 and at most 1")
    return blanks


class Sudoku(Puzzle):
    """Args: size of the grid (4 or 9), and the share of its cells that are blank."""

    name = "sudoku"

    def __init__(self, size: int = 4, blanks: float = 0.5) -> None:
        if size not in (4, 9):
            raise ValueError(f"size = {size}; sudoku has 4 or 9")
        self._size, self._blanks = size, _share(blanks)

    def generate(self, rng: random.Random) -> Instance:
        """Blanks in a random solution; there may be other solutions."""
        box = math.isqrt(self._size)
        solution = latin_square(rng, self._size, box)
        given = _blanked(rng, solution, self._blanks)
        question = (
            f"Fill in this sudoku: every row, every column and every {box} by {box} box holds the "
            f"numbers 1 to {self._size} once. A dot is a blank.\n\n{show(given)}\n\n"
            "Answer with the rows of the full grid alone, numbers apart by spaces."
        )
        return Instance(question, show(solution), {"given": given})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """Any filling by the rules."""
        grid = read_numbers(answer, len(data["given"]))
        return (
            grid is not None
            and is_latin(grid, math.isqrt(len(grid)))
            and _agrees(grid, data["given"])
        )


class Futoshiki(Puzzle):
    """Args: size of the grid, share of blank cells, and signs between neighbours."""

    name = "futoshiki"

    def __init__(self, size: int = 4, blanks: float = 0.8, signs: int = 6) -> None:
        self._size, self._blanks = within("size", size, 3, 9), _share(blanks)
        self._signs = within("signs", signs, 0, 2 * size * (size - 1))

    def generate(self, rng: random.Random) -> Instance:
        """Signs and blanks in a random solution; there may be other solutions."""
        size = self._size
        solution = latin_square(rng, size)
        given = _blanked(rng, solution, self._blanks)
        pairs = [((r, c), (r, c + 1)) for r in range(size) for c in range(size - 1)]
        pairs += [((r, c), (r + 1, c)) for r in range(size - 1) for c in range(size)]
        less = [
            [*a, *b] if solution[a[0]][a[1]] < solution[b[0]][b[1]] else [*b, *a]
            for a, b in sorted(rng.sample(pairs, self._signs))
        ]
        rules = "\n".join(f"({r}, {c}) < ({s}, {d})" for r, c, s, d in _from_one(less))
        question = (
            f"Fill in this futoshiki: every row and every column holds the numbers 1 to {size} "
            f"once. A dot is a blank.\n\n{show(given)}\n\nCells (row, column), counted from 1:\n"
            f"{rules}\n\nAnswer with the rows of the full grid alone, numbers apart by spaces."
        )
        return Instance(question, show(solution), {"given": given, "less": less})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """Any filling by the rules."""
        grid = read_numbers(answer, len(data["given"]))
        return (
            grid is not None
            and is_latin(grid)
            and _agrees(grid, data["given"])
            and all(grid[r][c] < grid[s][d] for r, c, s, d in data["less"])
        )


class Skyscrapers(Puzzle):
    """Args: size of the grid."""

    name = "skyscrapers"

    def __init__(self, size: int = 4) -> None:
        self._size = within("size", size, 3, 9)

    def generate(self, rng: random.Random) -> Instance:
        """The views of a random solution; there may be other solutions."""
        solution = latin_square(rng, self._size)
        views = _views(solution)
        sides = "\n".join(f"{side}: {' '.join(map(str, seen))}" for side, seen in views.items())
        question = (
            f"Towers 1 to {self._size} high stand on a {self._size} by {self._size} grid, each "
            "height once in every row and every column. A higher tower hides the lower ones behind "
            "it. So many towers are seen from the sides, left to right or top to bottom:\n\n"
            f"{sides}\n\nAnswer with the rows of the grid alone, numbers apart by spaces."
        )
        return Instance(question, show(solution), {"size": self._size, "views": views})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """Any grid with these views."""
        grid = read_numbers(answer, data["size"])
        return grid is not None and is_latin(grid) and _views(grid) == data["views"]


def _from_one(rows: list[list[int]]) -> list[list[int]]:
    return [[n + 1 for n in row] for row in rows]


def _views(grid: Grid) -> dict[str, list[int]]:
    columns = list(zip(*grid, strict=True))
    return {
        "top": [_seen(c) for c in columns],
        "bottom": [_seen(c[::-1]) for c in columns],
        "left": [_seen(r) for r in grid],
        "right": [_seen(r[::-1]) for r in grid],
    }


def _seen(towers: Sequence[int]) -> int:
    return sum(tower == max(towers[: i + 1]) for i, tower in enumerate(towers))
