"""What is evaluated: held-out samples of each task by length and depth, and held-out texts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mmjax.config import ConfigError
from mmjax.tokenizer import Tokenizer
from train.config import EvaluationConfig, SourceConfig
from train.data.examples import Skipped, TextEncoder
from train.data.pipeline import open_source
from train.evaluation.examples import prompt_hash
from train.evaluation.tasks import Encoder, Sample, Task

# Every evaluation of every job asks the same.
_SEED = 0


class Cell(NamedTuple):
    """Samples of one task at one length and depth (None where the task has none)."""

    task: str
    length: int
    depth: float | None
    samples: list[Sample]
    pairs: list[tuple[list[int], list[int]]]


class Texts(NamedTuple):
    """Rows of held-out text [N, T], each a stretch of a document, and segments, 0 for padding."""

    tokens: np.ndarray
    segments: np.ndarray


class Suite:
    """All samples of an evaluation, made once.

    Args:
      cfg: What to evaluate, its lengths given.
      tokenizer: Of the model.
      chat: Whether prompts are in M1's chat form.

    Raises:
      ConfigError: an unknown task, one that is named twice, does not fit its length or is only to
        learn from, or no text to read.
    """

    def __init__(self, cfg: EvaluationConfig, tokenizer: Tokenizer, *, chat: bool) -> None:
        self.cfg, self._tokenizer = cfg, tokenizer
        twice = sorted({task for task in cfg.tasks if cfg.tasks.count(task) > 1})
        if twice:
            raise ConfigError(f"evaluation.tasks names {', '.join(twice)} more than once")
        encoder = Encoder(tokenizer)
        tasks = [Task(text, encoder, "held-out", _SEED, chat=chat) for text in cfg.tasks]
        self.cells = [cell for task in tasks for cell in self._cells(task, encoder)]
        self.texts = self._read() if cfg.paths else None

    def _cells(self, task: Task, encoder: Encoder) -> Iterator[Cell]:
        depths = depths_of(self.cfg.depths) if task.has_depth else [None]
        count = self.cfg.samples * (1 if task.has_depth else self.cfg.depths)
        number = 0
        for length in self.cfg.lengths:
            first = task.sample(number, length)
            if not first.values:
                raise ConfigError(
                    f"task {task.text!r} has no answer that alone is right; it is for data.tasks, "
                    "to learn from"
                )
            encoder.check(first)
            for depth in depths:
                samples = [task.sample(number + i, length, depth) for i in range(count)]
                number += count
                pairs = [encoder.prompt_and_answer(sample) for sample in samples]
                yield Cell(task.text, length, depth, samples, pairs)

    @functools.cached_property
    def prompts(self) -> frozenset[bytes]:
        """Hashes of all prompts, which no training example may have."""
        return frozenset(prompt_hash(s.text) for cell in self.cells for s in cell.samples)

    def _read(self) -> Texts:
        """Stretches of documents, as long as the longest of the lengths where they can be."""
        length = max(self.cfg.lengths)
        source = open_source(SourceConfig("evaluation.paths", self.cfg.paths))
        encode = TextEncoder(self._tokenizer, source.field)
        rows = []
        for i in range(len(source)):
            example = encode(source[i])
            if isinstance(example, Skipped):
                continue
            ids = list(example.ids)
            rows += [ids[i : i + length] for i in range(0, len(ids) - 1, length)]
        # Whole ones first, as only they say anything of late positions, spread over the documents.
        whole = sum(len(row) == length for row in rows)
        rows.sort(key=len, reverse=True)
        count = min(self.cfg.rows, len(rows))
        rows = [rows[i * max(whole, count) // count] for i in range(count)]
        if not rows:
            raise ConfigError(f"evaluation.paths: no text in {', '.join(self.cfg.paths)}")
        tokens = np.zeros((len(rows), length), np.int32)
        segments = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        return Texts(tokens, segments)


def depths_of(count: int) -> list[float | None]:
    """Evenly from the start of the haystack to its end."""
    return [i / max(count - 1, 1) for i in range(count)]
