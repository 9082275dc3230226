"""The loop that pretrain and sft share."""

from __future__ import annotations

from typing import Any

from train.data.streams import Streams
from train.evaluation.loop import with_evaluation
from train.job import Job, Scalars
from train.state import TrainState
from train.step import language_step


def fit(job: Job, data: Streams) -> Job:
    """Predicts next tokens of packed batches until the job's last step."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Scalars]:
        return language_step(job.graphdef, job.optimizer, state, job.put(batch), job.frozen)

    job.run(data, with_evaluation(job, step))
    job.export()
    return job
