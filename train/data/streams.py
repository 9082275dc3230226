"""Batches whose rows come from several independent streams, so that processes can share the work.

Stream s of S fills rows s·B/S to (s+1)·B/S of every batch and reads every S-th example. Which
process reads which stream follows from the mesh; the batches are the same for any number of
processes, and so are the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import numpy as np

type Batch = dict[str, np.ndarray]


class Resumable(Protocol):
    """What a job reads: an iterator whose place can be saved and taken up again.

    `get_state` is JSON, by stream, of the streams that this process reads; `set_state` takes the
    states of all streams.
    """

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]:
        """The places of this process's streams."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Back to a place."""


class Streams:
    """Batches of B rows from S streams, of which this process reads those that it needs.

    Args:
      make: Stream s of `count`, as batches of B / S rows.
      count: S, a divisor of B.
      batch: B.
      rows: Rows of a batch that this process needs; the others come as zeros.
    """

    def __init__(
        self,
        make: Callable[[int], grain.DatasetIterator[Batch]],
        count: int,
        batch: int,
        rows: np.ndarray,
    ) -> None:
        self._count, self._size = count, batch // count
        needed = sorted({int(row) // self._size for row in rows})
        self._streams = {s: make(s) for s in needed}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts = {s: next(stream) for s, stream in self._streams.items()}
        first = next(iter(parts.values()))
        whole = {
            k: np.zeros((self._count * len(x), *x.shape[1:]), x.dtype) for k, x in first.items()
        }
        for s, part in parts.items():
            for name, x in part.items():
                whole[name][s * self._size : (s + 1) * self._size] = x
        return whole

    def get_state(self) -> dict[str, Any]:
        """Of the streams that this process reads, by number."""
        return {str(s): stream.get_state() for s, stream in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Back to a place; raises KeyError for a stream that the state does not know."""
        for s, stream in self._streams.items():
            stream.set_state(state[str(s)])
