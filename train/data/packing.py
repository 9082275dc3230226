"""Examples to packed rows: what `language_step` eats."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np

from train.data.streams import Batch, Streams

# Rows that Grain fills at the same time; more waste less padding.
_BINS = 32


class Example(NamedTuple):
    """ids of one document, and 1 for each that is to be predicted.

    With pictures: `tiles` are numbers of their tiles, and `features` gives for each token the row
    of `Vision.features` of these tiles, -1 for a token of text.
    """

    ids: list[int]
    loss_mask: list[int]
    tiles: Sequence[int] = ()
    features: Sequence[int] = ()


class Pictures(NamedTuple):
    """What is packed beside tokens: tiles [N, S, S, 3] uint8, features of a tile, tiles a row."""

    tiles: np.ndarray
    patches: int
    most: int


def packed_batches(
    examples: Sequence[Example],
    length: int,
    batch: int,
    seed: int,
    *,
    streams: int = 1,
    rows: np.ndarray | None = None,
    pictures: Pictures | None = None,
) -> Streams:
    """Endless shuffled batches of packed rows, checkpointable.

    Args:
      examples: None longer than `length`.
      length: T, tokens a row.
      batch: B, rows a batch.
      seed: Of the order, new in each epoch.
      streams: S, each of which packs every S-th example into B / S rows of a batch.
      rows: Rows of a batch that this process needs; None for all.
      pictures: If examples have tiles; none has more than a row.

    Returns:
      Iterator over tokens, segment_ids, positions [B, T] int32, loss_mask [B, T] float32; with
      pictures also tiles [B, M, S, S, 3] uint8, and image_index [B, T] int32 into the features of
      the row's tiles, -1 for text.
    """

    def stream(s: int) -> grain.DatasetIterator[Batch]:
        return _packed(examples[s::streams], length, batch // streams, seed + s, pictures)

    return Streams(stream, streams, batch, np.arange(batch) if rows is None else rows)


def _packed(
    examples: Sequence[Example], length: int, batch: int, seed: int, pictures: Pictures | None
) -> grain.DatasetIterator[Batch]:
    shape = {"tokens": length, "loss_mask": length}
    if pictures is not None:
        shape |= {"features": length, "tiles": pictures.most}
    rows = (
        grain.MapDataset.source(_AsArrays(examples, pictures is not None))
        .seed(seed)
        .shuffle()
        .repeat()
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
    packed = grain.experimental.FirstFitPackIterDataset(
        rows, length_struct=shape, num_packing_bins=max(_BINS, batch), seed=seed
    )
    return iter(packed.map(partial(_rename, pictures=pictures)).batch(batch, drop_remainder=True))


class _AsArrays:
    """A Grain source over examples."""

    def __init__(self, examples: Sequence[Example], pictures: bool) -> None:
        self._examples, self._pictures = examples, pictures

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self._examples[index]
        arrays = {
            "tokens": np.asarray(example.ids, np.int32),
            "loss_mask": np.asarray(example.loss_mask, np.float32),
        }
        if self._pictures:
            # Rows are filled up with zeros, so nothing is 0 here.
            arrays["features"] = np.asarray(example.features, np.int32) + 1
            arrays["tiles"] = np.asarray(example.tiles, np.int32)
        return arrays


def _rename(row: dict[str, Any], *, pictures: Pictures | None) -> dict[str, np.ndarray]:
    seen = {} if pictures is None else _seen(row, pictures)
    return seen | {
        "tokens": row["tokens"].astype(np.int32),
        "segment_ids": row["tokens_segment_ids"].astype(np.int32),
        "positions": row["tokens_positions"].astype(np.int32),
        "loss_mask": row["loss_mask"].astype(np.float32),
    }


def _seen(row: dict[str, Any], pictures: Pictures) -> dict[str, np.ndarray]:
    """A row's tiles, and its tokens' features counted through the row."""
    owner, index = row["tiles_segment_ids"], row["features"] - 1
    first = np.argmax(owner[None] == row["features_segment_ids"][:, None], axis=1)
    # Row 0 of the features is the newline, whichever the tiles.
    index = np.where(index > 0, index + first * pictures.patches, index)
    tiles = pictures.tiles[np.where(owner > 0, row["tiles"], 0)]
    return {"tiles": tiles, "image_index": index.astype(np.int32)}
