"""Number wall: build walls so that every island holds one number, its size."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.rewards.logic.source import Instance, Puzzle, within
from train.rewards.reading import read_grid

_WALL, _LAND = "#", "."

type Cell = tuple[int, int]


class NumberWall(Puzzle):
    """Args: size of the grid, and of the largest island."""

    name = "number_wall"

    def __init__(self, size: int = 5, largest: int = 5) -> None:
        self._size = within("size", size, 3, 12)
        self._largest = within("largest", largest, 1, 9)

    def generate(self, rng: random.Random) -> Instance:
        """Islands of a random solution; there may be other solutions."""
        size = self._size
        while not (islands := self._islands(rng)):
            pass
        given = [[_LAND] * size for _ in range(size)]
        solution = [[_WALL] * size for _ in range(size)]
        for island in islands:
            for r, c in island:
                solution[r][c] = _LAND
            r, c = rng.choice(sorted(island))
            given[r][c] = solution[r][c] = str(len(island))
        question = (
            "Turn cells of this grid into walls (#), so that the cells that are left form islands, "
            "joined by their edges. Every island holds exactly one of the numbers, and has as many "
            "cells. No two islands share an edge, no number becomes a wall, and no 2 by 2 square "
            f"is all walls.\n\n{_show(given)}\n\nAnswer with the rows of the full grid alone: "
            "numbers, # for walls, . for other cells, apart by spaces."
        )
        return Instance(question, _show(solution), {"given": given})

    def check(self, data: Mapping[str, Any], answer: str) -> bool:
        """Any walls by the rules."""
        given = data["given"]
        size = len(given)
        grid = read_grid(answer, size, size, [_WALL, _LAND, *map(str, range(1, 10))])
        if grid is None or any(
            cell != hint and (hint != _LAND or cell != _WALL)
            for row, hints in zip(grid, given, strict=True)
            for cell, hint in zip(row, hints, strict=True)
        ):
            return False
        walls = {(r, c) for r in range(size) for c in range(size) if grid[r][c] == _WALL}
        return not any(square <= walls for square in _squares(size)) and all(
            [grid[r][c] for r, c in island if grid[r][c] != _LAND] == [str(len(island))]
            for island in _joined(set(_cells(size)) - walls)
        )

    def _islands(self, rng: random.Random) -> list[set[Cell]]:
        """Islands that leave no square of walls; none if a random try fails."""
        islands: list[set[Cell]] = []
        squares = list(_squares(self._size))
        for _ in range(4 * self._size**2):
            land = set().union(*islands)
            full = [square for square in squares if not square & land]
            if not full:
                return islands
            cell = rng.choice(sorted(rng.choice(full)))
            touched = [island for island in islands if island & set(_around(cell))]
            if not touched:
                islands.append({cell})
            elif len(touched) == 1 and len(touched[0]) < self._largest:
                touched[0].add(cell)
        return []


def _cells(size: int) -> Iterator[Cell]:
    return itertools.product(range(size), range(size))


def _squares(size: int) -> Iterator[set[Cell]]:
    for r, c in _cells(size - 1):
        yield {(r, c), (r + 1, c), (r, c + 1), (r + 1, c + 1)}


def _around(cell: Cell) -> list[Cell]:
    r, c = cell
    return [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]


def _joined(cells: set[Cell]) -> Iterator[set[Cell]]:
    left = set(cells)
    while left:
        island, edge = set(), [left.pop()]
        while edge:
            cell = edge.pop()
            island.add(cell)
            near = left & set(_around(cell))
            left -= near
            edge += near
        yield island


def _show(grid: Sequence[Sequence[str]]) -> str:
    return "\n".join(" ".join(row) for row in grid)
