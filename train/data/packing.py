"""Documents to packed rows: what `language_step` eats.

A row starts with any of the documents that wait, so that the pieces of a long one are spread; then,
as long as one fits, it takes the longest that does. Which documents wait is told by their numbers,
so that the state of it is small, and another stage goes on with them in rows of another length.
"""

from __future__ import annotations

import bisect
import itertools
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from mmjax.config import ConfigError
from train.data.examples import Example
from train.data.mixture import Mixture

# Pieces among which the best fit is looked for, as long as they are not more than so many rows;
# and rows that they fill at least, however many it takes.
_PIECES, _MOST_ROWS, _LEAST_ROWS = 256, 64, 2

type Row = dict[str, np.ndarray]


class Pictures(NamedTuple):
    """What is packed beside tokens: tiles [N, S, S, 3] uint8, features of a tile, tiles a row."""

    tiles: np.ndarray
    patches: int
    most: int


class Piece(NamedTuple):
    """Tokens start to stop of a source's document, the tiles that come with them, and a check sum
    of the document, which may be read again later.
    """

    source: str
    number: int
    start: int
    stop: int
    tiles: int
    check: int

    @property
    def size(self) -> int:
        """Tokens."""
        return self.stop - self.start


class PackedRows(grain.IterDataset):
    """Rows of tokens, segment_ids, positions and loss_mask [T], without end.

    Args:
      mixture: Where documents come from.
      length: T. A longer document is cut; each piece is a segment of its own.
      rows: Of the stage, for the mixture's weights.
      pictures: If examples have tiles; none has more than a row.
      pairs: If examples are pairs, the most of a row; there are `rejected_` arrays too, in which
        the other answers have the same segment ids. None is longer than a row.
    """

    def __init__(
        self,
        mixture: Mixture,
        length: int,
        rows: int,
        pictures: Pictures | None = None,
        pairs: int = 0,
    ) -> None:
        super().__init__()
        self._arguments = mixture, length, rows, pictures, pairs

    def __iter__(self) -> PackingIterator:
        return PackingIterator(*self._arguments)


class PackingIterator(grain.DatasetIterator):
    """See `PackedRows`."""

    def __init__(
        self, mixture: Mixture, length: int, rows: int, pictures: Pictures | None, pairs: int
    ) -> None:
        super().__init__()
        self._mixture, self._length, self._total = mixture, length, rows
        self._pictures, self._pairs = pictures, pairs
        self._most_pieces = pairs or length
        self._most_tiles = pictures.most if pictures is not None else 0
        self.set_state({})

    def get_state(self) -> dict[str, Any]:
        """JSON: rows so far, the pieces that wait, and the mixture's place."""
        waiting = [*self._waiting.values(), *self._parked]
        return {
            "rows": self._rows,
            "waiting": [list(piece) for piece in waiting],
            "mixture": self._mixture.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Back to a place, or with `rows` 0 to where another stage starts from it."""
        self._rows = int(state.get("rows", 0))
        self._mixture.set_state(state.get("mixture", {}))
        self._examples: dict[tuple[str, int], Example] = {}
        self._left: Counter[tuple[str, int]] = Counter()  # Pieces of each example that wait.
        self._waiting: dict[int, Piece] = {}  # By their number, oldest first.
        self._by_size: list[tuple[int, int]] = []  # Of each its size and minus its number.
        self._tokens = self._count = 0
        pieces = [Piece(*values) for values in state.get("waiting", [])]
        # A source that rests has its pieces wait for a stage that has it again.
        self._parked = [p for p in pieces if p.source not in self._mixture.pools]
        for piece in pieces:
            if piece.source in self._mixture.pools:
                self._add(piece)

    def __next__(self) -> Row:
        if not self._rows:
            self._drop()
        while self._short():
            name, number, example = self._mixture.draw(self._rows / self._total)
            self._examples[name, number] = example
            self._mixture.counts[f"{name}/cut"] += int(example.size > self._length)
            self._add(Piece(name, number, 0, example.size, len(example.tiles), _check(example)))
        self._rows += 1
        return self._filled(self._take())

    def _drop(self) -> None:
        """Drops documents that wait of the stage before and are others in this one's rows, such as
        a chat that is longer than they are.
        """
        numbers: dict[tuple[str, int], list[int]] = {}
        for number, piece in self._waiting.items():
            numbers.setdefault((piece.source, piece.number), []).append(number)
        for key, of_it in numbers.items():
            found = self._mixture.read(*key)
            if isinstance(found, Example) and _check(found) == self._waiting[of_it[0]].check:
                self._examples[key] = found
                continue
            for number in of_it:
                self._remove(number)
            del self._left[key]
            self._mixture.counts[f"{key[0]}/dropped"] += 1

    def _short(self) -> bool:
        few = len(self._waiting) < _PIECES and self._tokens < _MOST_ROWS * self._length
        return few or self._tokens < _LEAST_ROWS * self._length

    def _add(self, piece: Piece) -> None:
        for start in range(piece.start, piece.stop, self._length):
            part = piece._replace(start=start, stop=min(start + self._length, piece.stop))
            self._waiting[self._count] = part
            bisect.insort(self._by_size, (part.size, -self._count))
            self._left[piece.source, piece.number] += 1
            self._tokens += part.size
            self._count += 1

    def _take(self) -> list[Piece]:
        """Pieces of the next row: one at random, then the longest that fit."""
        chosen = int(np.random.default_rng(self._rows).integers(len(self._waiting)))
        row = [self._remove(next(itertools.islice(self._waiting, chosen, None)))]
        space, tiles = self._length - row[0].size, self._most_tiles - row[0].tiles
        at = bisect.bisect(self._by_size, (space, 1))
        while at > 0 and len(row) < self._most_pieces:
            number = -self._by_size[at - 1][1]
            if self._waiting[number].tiles > tiles:
                at -= 1
                continue
            row.append(self._remove(number))
            space, tiles = space - row[-1].size, tiles - row[-1].tiles
            at = min(at - 1, bisect.bisect(self._by_size, (space, 1)))
        return row

    def _remove(self, number: int) -> Piece:
        piece = self._waiting.pop(number)
        del self._by_size[bisect.bisect_left(self._by_size, (piece.size, -number))]
        self._tokens -= piece.size
        return piece

    def _filled(self, pieces: list[Piece]) -> Row:
        """The row's arrays."""
        whole = _empty(self._length)
        if self._pairs:
            whole |= {f"rejected_{name}": x for name, x in _empty(self._length).items()}
        if self._pictures is not None:
            side = self._pictures.tiles.shape[1:]
            whole["tiles"] = np.zeros((self._most_tiles, *side), np.uint8)
            whole["image_index"] = np.full(self._length, -1, np.int32)
        at = tiles = 0
        for segment, piece in enumerate(pieces, 1):
            example, here = self._example(piece), slice(at, at + piece.size)
            _put(whole, "", at, segment, example, piece)
            if example.rejected is not None:
                _put(whole, "rejected_", at, segment, example.rejected, piece)
            if self._pictures is not None:
                self._see(whole, here, example, tiles)
            at, tiles = here.stop, tiles + piece.tiles
        return whole

    def _see(self, row: Row, here: slice, example: Example, first: int) -> None:
        """Puts an example's tiles into the row, from number `first` on."""
        assert self._pictures is not None
        tiles, index = example.tiles, example.features
        row["tiles"][first : first + len(tiles)] = self._pictures.tiles[tiles]
        # Row 0 of the features is the newline, whichever the tiles.
        row["image_index"][here] = np.where(
            index > 0, index + first * self._pictures.patches, index
        )

    def _example(self, piece: Piece) -> Example:
        """Its tokens; after a resume they are read again.

        Raises:
          ConfigError: they are others now.
        """
        key = piece.source, piece.number
        example = self._examples.get(key)
        if example is None:
            found = self._mixture.read(*key)
            if not isinstance(found, Example) or _check(found) != piece.check:
                told = "is another one" if isinstance(found, Example) else found.message
                raise ConfigError(
                    f"data source {piece.source!r} has changed since the checkpoint: document "
                    f"{piece.number} {told}; bring it back, or start in a new workdir"
                )
            example = self._examples[key] = found
        self._left[key] -= 1
        if not self._left[key]:
            del self._left[key], self._examples[key]
        return example


def _check(example: Example) -> int:
    """A check sum of its tokens."""
    found = zlib.crc32(np.ascontiguousarray(example.ids))
    return (
        zlib.crc32(np.ascontiguousarray(example.rejected.ids), found) if example.rejected else found
    )


def _empty(length: int) -> Row:
    whole = {n: np.zeros(length, np.int32) for n in ("tokens", "segment_ids", "positions")}
    return whole | {"loss_mask": np.zeros(length, np.float32)}


def _put(row: Row, prefix: str, at: int, segment: int, example: Example, piece: Piece) -> None:
    """A piece of an example, or of one of two answers as much as it has, from place `at` on."""
    ids = example.ids[piece.start : piece.stop]
    here = slice(at, at + len(ids))
    row[prefix + "tokens"][here] = ids
    row[prefix + "segment_ids"][here] = segment
    row[prefix + "positions"][here] = np.arange(len(ids))
    row[prefix + "loss_mask"][here] = example.loss_mask[piece.start : piece.stop]
