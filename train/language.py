"""The loop that pretrain and sft share."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any

from train import distributed
from train.data.streams import KINDS, Streams, counts
from train.job import Job, Scalars
from train.state import TrainState
from train.step import language_step


def fit(job: Job, data: Streams) -> Job:
    """Predicts next tokens of packed batches until the job's last step."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Scalars]:
        measured = data.metrics()
        state, values = language_step(
            job.graphdef, job.optimizer, state, job.put(batch), job.frozen
        )
        return state, values | measured

    with closing(data):
        job.run(data, step)
        _tell_skipped(data)
    job.export()
    return job


def _tell_skipped(data: Streams) -> None:
    """Says what was skipped or changed of the documents of all processes."""
    told = counts(distributed.union(data.get_state()))
    if not distributed.is_primary():
        return
    for key, count in sorted(told.items()):
        source, _, kind = key.rpartition("/")
        if kind in KINDS and count:
            read = told[f"{source}/documents"]
            print(f"data source {source!r}: {count} of {read} documents {kind}", file=sys.stderr)
