"""Batches whose rows come from several independent streams, so that processes can share the work.

Stream s of S fills rows s·B/S to (s+1)·B/S of every batch and reads a part of every source that is
its own. Which process reads which stream follows from the mesh; the batches are the same for any
number of processes, and so are the checkpoints.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from mmjax.config import ConfigError

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


class Streams(grain.DatasetIterator):
    """Batches of B rows from S streams, of which this process reads those that it needs.

    Each stream reads ahead in a thread of its own.

    Args:
      make: Rows of stream s of `count`.
      count: S, a divisor of B.
      batch: B.
      rows: Rows of a batch that this process needs; the others come as zeros.
      prefetch: Batches that a stream has ready in advance.
      keys: Values of the config, by key, that have to be the same for a state to fit.
      sources: Rows of each source, which have to be as well.
    """

    def __init__(
        self,
        make: Callable[[int], grain.IterDataset],
        count: int,
        batch: int,
        rows: np.ndarray,
        prefetch: int = 2,
        keys: Mapping[str, Any] | None = None,
        sources: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self._streams: dict[int, grain.DatasetIterator] = {}
        self._count, self._size = count, batch // count
        self._of = {
            "keys": {"data.streams": count} | dict(keys or {}),
            "sources": dict(sources or {}),
        }
        needed = sorted({int(row) // self._size for row in rows})

        def ahead(s: int) -> grain.DatasetIterator:
            batches = make(s).batch(self._size, drop_remainder=True)
            return iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch))

        self._streams = {s: ahead(s) for s in needed}
        self._waited = self._fill = 0.0

    def __next__(self) -> Batch:
        started = time.perf_counter()
        parts = {s: next(stream) for s, stream in self._streams.items()}
        self._waited = time.perf_counter() - started
        first = next(iter(parts.values()))
        whole = {
            k: np.zeros((self._count * len(x), *x.shape[1:]), x.dtype) for k, x in first.items()
        }
        for s, part in parts.items():
            for name, x in part.items():
                whole[name][s * self._size : (s + 1) * self._size] = x
        own = np.concatenate([part["segment_ids"] for part in parts.values()])
        self._fill = np.count_nonzero(own) / own.size
        return whole

    def get_state(self) -> dict[str, Any]:
        """Of the streams that this process reads, by number."""
        return {
            str(s): {**stream.get_state(), "of": self._of} for s, stream in self._streams.items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Back to a place.

        Raises:
          ConfigError: the state is of other streams or sources, whose documents would come twice
            or not at all.
        """
        self._check(state, exactly=True)
        for s, stream in self._streams.items():
            stream.set_state(state[str(s)])

    def go_on(self, after: Mapping[str, Any]) -> None:
        """Starts a stage where the one before it stopped, whose state `after` is.

        Raises:
          ConfigError: the state is of other streams, or a source of both has changed.
        """
        self._check(after, exactly=False)
        for s, stream in self._streams.items():
            stream.set_state(after[str(s)] | {"rows": 0})

    def _check(self, state: Mapping[str, Any], *, exactly: bool) -> None:
        """Compares with what a state is of; sources that only one of them has, if so wanted."""
        saved = state.get("0", {}).get("of")
        if saved is None:
            raise ConfigError("the state does not say of which data it is; start in a new workdir")
        there, here = saved["sources"], self._of["sources"]
        names = there.keys() | here.keys() if exactly else there.keys() & here.keys()
        changes = [
            f"{key} was {saved['keys'].get(key)} and is {value}"
            for key, value in self._of["keys"].items()
            if saved["keys"].get(key) != value
        ]
        changes += [
            f"data source {name!r} had {there.get(name, 0)} rows and has {here.get(name, 0)}"
            for name in sorted(names)
            if there.get(name) != here.get(name)
        ]
        if changes:
            raise ConfigError(
                f"the data is not the checkpoint's: {'; '.join(changes)}; set it back, or start in "
                "a new workdir"
            )

    def close(self) -> None:
        """Ends the threads."""
        for stream in self._streams.values():
            stream.close()

    def metrics(self) -> dict[str, float]:
        """Of the last batch: seconds that it was waited for, share of its tokens that are no
        padding; and documents so far that were skipped or changed, of this process's streams.
        """
        told = {"data/wait": self._waited, "data/fill": self._fill}
        kinds: Counter[str] = Counter()
        for key, count in counts(self.get_state()).items():
            kinds[key.rpartition("/")[2]] += count
        return told | {f"data/{kind}": float(kinds[kind]) for kind in KINDS if kinds[kind]}


# What `counts` may tell of a source, beside its documents and tokens.
KINDS = ("malformed", "empty", "too_long", "undecodable", "cut", "dropped")


def counts(state: Mapping[str, Any]) -> Counter[str]:
    """What happened to documents, by SOURCE/KIND, in all streams of a state."""
    total: Counter[str] = Counter()
    for stream in state.values():
        total.update(stream["mixture"]["counts"])
    return total
