"""Which document comes next: sources in turn by their shares of the tokens, each in an order of its
own that starts anew, shuffled anew, when it is through.
"""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from grain.experimental import index_shuffle

from mmjax.config import ConfigError
from train.data.examples import Example, Skipped

# Blocks whose rows are shuffled together: what a source of blocks keeps in memory.
_TOGETHER = 4
# So many rows are shuffled as a list.
_LISTED = 1 << 16
_TOLD = 5  # Skipped rows of a source that are told one by one.
# Before as many documents are read, their share is no share.
_FEW = 100


class Rows(Protocol):
    """Anything with rows to read one by one, or in blocks of so many rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...

    @property
    def blocks(self) -> Sequence[int]:
        """Rows of the parts that are read as a whole, in order; empty if there are none such."""


class Pool(NamedTuple):
    """One source as a stream reads it: its documents, epoch after epoch, and its weight.

    documents: Element n is the n-th that this stream reads, an `Example` or what was `Skipped`.
    start, end: Weight at the first and at the last row of the stage.
    """

    name: str
    documents: grain.MapDataset
    start: float
    end: float


def ordered(
    rows: Rows, encode: Callable[[Any], Example | Skipped], seed: int, stream: int, streams: int
) -> grain.MapDataset:
    """The part of a source that belongs to one stream, in a random order, new in each epoch.

    Stream s of S has the rows from s·N/S to (s+1)·N/S: none is in two streams.

    Raises:
      ConfigError: there are fewer rows than streams.
    """
    start, stop = stream * len(rows) // streams, (stream + 1) * len(rows) // streams
    if start == stop:
        raise ConfigError(
            f"data.streams is {streams}, but a source has only {len(rows)} documents; "
            "use fewer streams"
        )
    part = _Part(rows, start, stop)
    seed = zlib.crc32(f"{seed} {stream}".encode())
    sizes = _cut(rows.blocks or (len(rows),), start, stop)
    return BlockShuffle(part, sizes, seed).map(encode)


class _Part(grain.MapDataset):
    """Rows from start to stop, epoch after epoch."""

    # Not `MapDataset.source`, which takes longer to count a short row than reading and packing it.
    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        super().__init__()
        self._rows, self._start, self._length = rows, start, stop - start

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self._rows[self._start + index % self._length]


class BlockShuffle(grain.MapDataset):
    """Shuffles blocks, and then the rows of a few successive ones among each other.

    Rows that are read as a whole, such as a row group of Parquet, would otherwise be read again for
    each of them. Rows that can be read alone are one block.

    Args:
      parent: The rows.
      sizes: Of the blocks; they add up to the rows.
      seed: Of the first epoch.
    """

    def __init__(self, parent: grain.MapDataset, sizes: np.ndarray, seed: int) -> None:
        super().__init__(parent)
        self._sizes, self._seed = sizes, seed
        self._starts = np.cumsum(sizes) - sizes
        self._length = len(parent)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._length)
        if len(self._sizes) == 1:
            seed = self._group_seed(epoch, 0)
            return self._parent[_shuffled(place, self._length, seed) + epoch * self._length]
        order, ends = self._order(epoch)
        first = int(np.searchsorted(ends, place, side="right")) // _TOGETHER * _TOGETHER
        before = int(ends[first - 1]) if first else 0
        group = order[first : first + _TOGETHER]
        inner = np.cumsum(self._sizes[group])
        row = _shuffled(place - before, int(inner[-1]), self._group_seed(epoch, first))
        block = int(np.searchsorted(inner, row, side="right"))
        within = row - (int(inner[block - 1]) if block else 0)
        return self._parent[int(self._starts[group[block]]) + within + epoch * self._length]

    @lru_cache(maxsize=8)  # noqa: B019 - as below
    def _group_seed(self, epoch: int, first: int) -> int:
        """Of the rows of the blocks from `first` on."""
        return zlib.crc32(f"{self._seed} {epoch} {first}".encode())

    @lru_cache(maxsize=2)  # noqa: B019 - as many of these as a job has sources and streams
    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the order of an epoch, and where each ends."""
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._sizes))
        return order, np.cumsum(self._sizes[order])


def _shuffled(place: int, count: int, seed: int) -> int:
    """Which of `count` rows stands at a place of a random order."""
    # Grain's needs no memory, but takes longer the fewer the rows are.
    if count <= _LISTED:
        return int(_permutation(count, seed)[place])
    return int(index_shuffle(place, max_index=count - 1, seed=seed, rounds=4))


@lru_cache(maxsize=256)
def _permutation(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count).astype(np.int32)


def _cut(sizes: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Sizes of what of the blocks lies between two rows."""
    edges = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    kept = np.diff(np.clip(edges, start, stop))
    return kept[kept > 0]


class Mixture:
    """Draws documents so that tokens come in the shares of the weights.

    At each draw the source that is furthest behind its share comes next, so that each is within
    one document of it. Shares go linearly from those at the stage's start to those at its end.

    Args:
      pools: The sources.
      bad_share: Of the documents read, those that may be malformed.
    """

    def __init__(self, pools: Sequence[Pool], bad_share: float) -> None:
        self.pools = {pool.name: pool for pool in pools}
        self._bad_share = bad_share
        starts, ends = _shares([p.start for p in pools]), _shares([p.end for p in pools])
        self._shares = dict(zip(self.pools, zip(starts, ends, strict=True), strict=True))
        self._told: Counter[str] = Counter()
        self.set_state({})

    def get_state(self) -> dict[str, Any]:
        """JSON: of each source the next document and the tokens it is behind; all counts."""
        return {"next": dict(self._next), "behind": dict(self._behind), "counts": dict(self.counts)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Back to a place; sources that it does not know begin at their start."""
        self._next: Counter[str] = Counter(state.get("next", {}))
        self._behind = dict.fromkeys(self.pools, 0.0) | dict(state.get("behind", {}))
        self.counts: Counter[str] = Counter(state.get("counts", {}))

    def draw(self, progress: float) -> tuple[str, int, Example]:
        """The next document: its source, its number there, what it holds.

        Args:
          progress: Share of the stage that is done.

        Raises:
          ConfigError: too many are malformed, or a source has none that is usable.
        """
        done = min(progress, 1.0)
        shares = {name: a + (b - a) * done for name, (a, b) in self._shares.items()}
        name = max(
            (name for name, share in shares.items() if share > 0),
            key=lambda name: (self._behind[name], shares[name]),
        )
        number, example = self._usable(self.pools[name])
        size = example.size
        for other, share in shares.items():
            self._behind[other] += share * size
        self._behind[name] -= size
        self.counts[f"{name}/tokens"] += size
        return name, number, example

    def read(self, name: str, number: int) -> Example | Skipped:
        """A document that was drawn before, as it is now."""
        found: Example | Skipped = self.pools[name].documents[number]
        return found

    def _usable(self, pool: Pool) -> tuple[int, Example]:
        # Twice, as each epoch has an order of its own: a row may be the first of one and
        # the last of the next.
        for _ in range(2 * len(pool.documents)):
            number = self._next[pool.name]
            self._next[pool.name] += 1
            found = pool.documents[number]
            self.counts[f"{pool.name}/documents"] += 1
            if isinstance(found, Example):
                self.counts[f"{pool.name}/undecodable"] += int(found.undecodable)
                return number, found
            self._note(pool.name, found)
        raise ConfigError(f"data source {pool.name!r} has no usable document: {found.message}")

    def _note(self, name: str, skipped: Skipped) -> None:
        kind = f"{name}/{skipped.kind}"
        self.counts[kind] += 1
        self._told[name] += 1
        if self._told[name] <= _TOLD:
            last = "; more of this source are only counted" if self._told[name] == _TOLD else ""
            print(f"data: skipped ({skipped.kind}) {skipped.message}{last}", file=sys.stderr)
        read = max(self.counts[f"{name}/documents"], _FEW)
        if skipped.kind == "malformed" and self.counts[kind] > self._bad_share * read:
            raise ConfigError(
                f"data source {name!r}: {self.counts[kind]} of the first "
                f"{self.counts[f'{name}/documents']} documents are malformed, data.bad_share is "
                f"{self._bad_share:g}; the last one: {skipped.message}"
            )


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]
