"""Examples to packed rows: what `language_step` eats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from train.data.streams import Batch, Streams

# Rows that Grain fills at the same time; more waste less padding.
_BINS = 32


class Example(NamedTuple):
    """ids of one document, and 1 for each that is to be predicted."""

    ids: list[int]
    loss_mask: list[int]


def packed_batches(
    examples: Sequence[Example],
    length: int,
    batch: int,
    seed: int,
    *,
    streams: int = 1,
    rows: np.ndarray | None = None,
) -> Streams:
    """Endless shuffled batches of packed rows, checkpointable.

    Args:
      examples: None longer than `length`.
      length: T, tokens a row.
      batch: B, rows a batch.
      seed: Of the order, new in each epoch.
      streams: S, each of which packs every S-th example into B / S rows of a batch.
      rows: Rows of a batch that this process needs; None for all.

    Returns:
      Iterator over tokens, segment_ids, positions [B, T] int32, loss_mask [B, T] float32.
    """

    def stream(s: int) -> grain.DatasetIterator[Batch]:
        return _packed(examples[s::streams], length, batch // streams, seed + s)

    return Streams(stream, streams, batch, np.arange(batch) if rows is None else rows)


def _packed(
    examples: Sequence[Example], length: int, batch: int, seed: int
) -> grain.DatasetIterator[Batch]:
    shape = {"tokens": length, "loss_mask": length}
    rows = (
        grain.MapDataset.source(_AsArrays(examples))
        .seed(seed)
        .shuffle()
        .repeat()
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
    packed = grain.experimental.FirstFitPackIterDataset(
        rows, length_struct=shape, num_packing_bins=max(_BINS, batch), seed=seed
    )
    return iter(packed.map(_rename).batch(batch, drop_remainder=True))


class _AsArrays:
    """A Grain source over examples."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self._examples[index]
        return {
            "tokens": np.asarray(example.ids, np.int32),
            "loss_mask": np.asarray(example.loss_mask, np.float32),
        }


def _rename(row: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        "tokens": row["tokens"].astype(np.int32),
        "segment_ids": row["tokens_segment_ids"].astype(np.int32),
        "positions": row["tokens_positions"].astype(np.int32),
        "loss_mask": row["loss_mask"].astype(np.float32),
    }
