"""What a job reads, put together: sources → examples → mixture → packed rows → batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.chat import render_chat
from mmjax.config import ConfigError
from mmjax.tokenizer import Tokenizer
from train.config import DataConfig, JobConfig, SourceConfig
from train.data.documents import Record, Source
from train.data.examples import (
    NO_CHAT,
    ChatEncoder,
    Example,
    PairEncoder,
    Skipped,
    TextEncoder,
    whole_chat,
)
from train.data.mixture import Mixture, Pool, Rows, ordered
from train.data.packing import PackedRows, Pictures
from train.data.streams import Streams

# Characters that a tokenizer is trained on: more of them hardly change it.
_SAMPLE = 50_000_000


def make_stream(
    cfg: JobConfig,
    tokenizer: Tokenizer,
    *,
    steps: int,
    from_weights: Mapping[str, float] | None = None,
    after: Mapping[str, Any] | None = None,
    rows: np.ndarray | None = None,
) -> Streams:
    """Endless batches of packed rows of one stage, checkpointable.

    Args:
      cfg: The stage's data, with data.source "text", "reasoning" or "recall".
      tokenizer: Of the model.
      steps: Of the stage, over which weights go to those of the mixture.
      from_weights: By source, the weights that the stage starts with; a source that is not named
        starts at 0. None for those of the mixture throughout.
      after: State of the stage before, whose sources are read on where it left them.
      rows: Rows of a batch that this process needs; None for all.

    Returns:
      Iterator over tokens, segment_ids, positions [B, T] int32, loss_mask [B, T] float32; for dpo
      these are of the preferred answers, and there are as many `rejected_` ones.

    Raises:
      ConfigError: sources that cannot be read, or weights that name none.
    """
    data = cfg.data
    if data.source == "reasoning":
        from train.data.reasoning import worked_examples  # reasoning-gym takes seconds to import

        return example_stream(worked_examples(cfg, tokenizer), cfg, after=after, rows=rows)
    if data.source == "recall":
        from train.evaluation.recall import recall_examples

        return example_stream(recall_examples(cfg, tokenizer), cfg, after=after, rows=rows)
    start = _start_weights(data, from_weights)
    opened = {source.name: open_source(source) for source in data.sources}
    encoders = {s.name: encoder(s, tokenizer, data) for s in data.sources}

    def mixture(stream: int) -> Mixture:
        pools = [
            Pool(
                source.name,
                _ordered(opened[source.name], encoders[source.name], source, cfg, stream),
                start[source.name],
                source.weight,
            )
            for source in data.sources
        ]
        return Mixture(pools, data.bad_share)

    sources = {name: len(source) for name, source in opened.items()}
    return _streams(cfg, mixture, sources, steps, after, rows)


def example_stream(
    examples: Sequence[Example],
    cfg: JobConfig,
    *,
    after: Mapping[str, Any] | None = None,
    rows: np.ndarray | None = None,
    pictures: Pictures | None = None,
) -> Streams:
    """Endless shuffled batches of examples in memory.

    Args:
      examples: None longer than a row.
      cfg: Of the job.
      after: State of the stage before, which read as many examples.
      rows: Rows of a batch that this process needs; None for all.
      pictures: If examples have tiles.

    Returns:
      As `make_stream`; with pictures also tiles [B, M, S, S, 3] uint8, and image_index [B, T] int32
      into the features of the row's tiles, -1 for text.
    """

    def mixture(stream: int) -> Mixture:
        held = Held(examples)
        documents = ordered(held, lambda example: example, cfg.seed, stream, cfg.data.streams)
        return Mixture([Pool(cfg.data.source, documents, 1.0, 1.0)], 0.0)

    return _streams(
        cfg, mixture, {cfg.data.source: len(examples)}, cfg.steps, after, rows, pictures
    )


class Held:
    """Rows in memory."""

    blocks: Sequence[int] = ()

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]


def open_source(cfg: SourceConfig) -> Source:
    """Opens a source; files of it without a row are told.

    Raises:
      ConfigError: it cannot be read.
    """
    source = Source(cfg)
    if source.empty:
        shown = ", ".join(source.empty[:3]) + (", ..." if len(source.empty) > 3 else "")
        print(
            f"data source {cfg.name!r}: {len(source.empty)} empty files: {shown}", file=sys.stderr
        )
    return source


def encoder(
    source: SourceConfig, tokenizer: Tokenizer, data: DataConfig
) -> Callable[[Record], Example | Skipped]:
    """What makes examples of a source's rows."""
    if source.kind == "text":
        return TextEncoder(tokenizer, source.column)
    chats = ChatEncoder(tokenizer, source.column, data.sequence_length, source.thinking)
    return PairEncoder(chats) if source.kind == "preference" else chats


def sample_texts(data: DataConfig, seed: int = 0) -> Iterator[str]:
    """Texts of all sources in turn, in a random order, some fifty million characters of them."""
    sources = [ordered(open_source(s), _text_of(s), seed, 0, 1) for s in data.sources]
    left = _SAMPLE
    for place in range(max(map(len, sources))):
        for source in sources:
            text = source[place] if place < len(source) else ""
            yield text
            left -= len(text)
        if left < 0:
            return


def _text_of(source: SourceConfig) -> Callable[[Record], Any]:
    def text(record: Record) -> str:
        found: Any = record.row.get(source.column)
        try:
            if source.kind == "preference":
                found = whole_chat(record.row, "chosen")
            if source.kind != "text":
                found = render_chat(found or (), reply=False)
            found.encode()  # Half a surrogate pair is no text.
        except NO_CHAT:
            return ""  # Told and counted when it is read for training.
        return str(found)

    return text


def _ordered(
    rows: Rows,
    encode: Callable[[Any], Example | Skipped],
    source: SourceConfig,
    cfg: JobConfig,
    stream: int,
) -> Any:
    try:
        return ordered(rows, encode, cfg.seed, stream, cfg.data.streams)
    except ConfigError as error:
        raise ConfigError(f"data source {source.name!r}: {error}") from None


def _start_weights(data: DataConfig, given: Mapping[str, float] | None) -> Mapping[str, float]:
    mixture = {source.name: source.weight for source in data.sources}
    if given is None:
        return mixture
    start = {name: float(given.get(name, 0.0)) for name in mixture}
    if not sum(start.values()) > 0:
        raise ConfigError(
            f"a stage starts with weights of {', '.join(given)}; its mixture has none of them: "
            f"{', '.join(mixture)}"
        )
    return start


def _streams(
    cfg: JobConfig,
    mixture: Callable[[int], Mixture],
    sources: Mapping[str, int],
    steps: int,
    after: Mapping[str, Any] | None,
    rows: np.ndarray | None,
    pictures: Pictures | None = None,
) -> Streams:
    data = cfg.data
    total = steps * data.batch_size // data.streams
    pairs = data.pairs_per_row if cfg.task == "dpo" else 0

    def make(stream: int) -> PackedRows:
        return PackedRows(mixture(stream), data.sequence_length, total, pictures, pairs)

    needed = np.arange(data.batch_size) if rows is None else rows
    keys = {"seed": cfg.seed} | ({"data.tasks": list(data.tasks)} if data.source != "text" else {})
    made = Streams(
        make, data.streams, data.batch_size, needed, data.prefetch, keys=keys, sources=sources
    )
    if after is not None:
        made.go_on(after)
    return made
