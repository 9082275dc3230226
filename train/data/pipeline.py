"""What a job reads, put together: documents → examples → packed rows → batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.tokenizer import Tokenizer
from train.config import JobConfig
from train.data.packing import Example, Pictures, packed_batches
from train.data.streams import Streams
from train.data.text import read_documents


def make_stream(
    cfg: JobConfig,
    tokenizer: Tokenizer,
    *,
    steps: int,
    from_weights: Mapping[str, float] | None = None,
    after: Mapping[str, Any] | None = None,
    rows: np.ndarray | None = None,
) -> Streams:
    """Endless batches of packed rows of one stage, checkpointable; each stage begins anew.

    Args:
      cfg: The stage's data, with data.source "text" or "reasoning".
      tokenizer: Of the model.
      steps: Of the stage.
      from_weights: By source, the weights that the stage starts with.
      after: State of the stage before.
      rows: Rows of a batch that this process needs; None for all.
    """
    if cfg.data.source == "reasoning":
        from train.sft import examples_of  # reasoning-gym takes seconds to import

        return example_stream(examples_of(cfg, tokenizer), cfg, rows=rows)
    documents = read_documents(cfg.data.paths)
    return example_stream(_pieces(documents, tokenizer, cfg.data.sequence_length), cfg, rows=rows)


def example_stream(
    examples: Sequence[Example],
    cfg: JobConfig,
    *,
    rows: np.ndarray | None = None,
    pictures: Pictures | None = None,
) -> Streams:
    """Endless shuffled batches of examples in memory."""
    data = cfg.data
    return packed_batches(
        examples,
        data.sequence_length,
        data.batch_size,
        cfg.seed,
        streams=data.streams,
        rows=rows,
        pictures=pictures,
    )


def _pieces(documents: list[str], tokenizer: Tokenizer, length: int) -> list[Example]:
    """Documents, each closed by the end token, cut where they exceed a row."""
    pieces = []
    for document in documents:
        ids = [*tokenizer.encode(document), tokenizer.eos_id]
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            pieces.append(Example(piece, [1] * len(piece)))
    return pieces
