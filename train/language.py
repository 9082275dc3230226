"""The loop that pretrain, sft and dpo share: stage after stage, batch after batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

import jax

from train import distributed
from train.data.streams import KINDS, Streams, counts
from train.evaluation.loop import with_evaluation
from train.job import Job, Scalars
from train.stages import Stage, resolve
from train.state import TrainState
from train.step import language_step
from train.throughput import Throughput

type MakeStream = Callable[..., Streams]
type Update = Callable[[Job, TrainState, Any], tuple[TrainState, Scalars]]


def predict_tokens(job: Job, state: TrainState, batch: Any) -> tuple[TrainState, Scalars]:
    """An update on the next tokens of a batch."""
    optimizer = job.cfg.optimizer
    return language_step(
        job.graphdef,
        job.optimizer,
        state,
        job.put(batch),
        job.frozen,
        optimizer.microbatches,
        optimizer.z_loss,
    )


def fit(
    job: Job, make: MakeStream, update: Update = predict_tokens, *, passes_per_row: int = 1
) -> Job:
    """Trains on packed batches until the job's last step.

    Args:
      job: The job.
      make: Batches of a stage, see `train.data.pipeline.make_stream` without its tokenizer.
      update: What each batch does.
      passes_per_row: Rows that go through the model for a row of a batch.
    """
    data = StagedData(job, make)
    speed = Throughput(jax.device_count(), jax.devices()[0].device_kind)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Scalars]:
        shape = job.cfg.data.batch_size * passes_per_row, job.cfg.data.sequence_length
        measured = speed.lap(job.model_cfg, *shape)
        data.announce()
        state, values = update(job, state, batch)
        return state, {**values, **data.metrics(), **measured}

    with closing(data):
        job.run(data, with_evaluation(job, step))
        _tell_skipped(data)
    job.export()
    return job


class StagedData:
    """The batches of a job, stage after stage; the job takes on each stage's settings with its
    first batch.

    A state is the stream's of the stage, with the stage's number, the batches that it has given,
    and the state in which the stage before ended: killed on either side of a change, a job goes on
    as if it had not been.
    """

    def __init__(self, job: Job, make: MakeStream) -> None:
        self._job, self._make, self._stages = job, make, resolve(job.cfg)
        self._told = 0
        self._enter(0, None)

    def _enter(self, index: int, after: dict[str, Any] | None) -> None:
        self._stage, self._after, self._given = self._stages[index], after, 0
        if self._staged:
            self._job.enter(self._stage)
        self.stream = self._make(
            self._job.cfg,
            steps=self._stage.steps,
            from_weights=self._stage.from_weights,
            after=after,
            rows=self._job.rows,
        )

    @property
    def _staged(self) -> bool:
        return len(self._job.cfg.stages) > 0

    def __next__(self) -> Any:
        if self._given == self._stage.steps and self._stage.number < len(self._stages):
            after = distributed.union(self.stream.get_state())
            self.stream.close()
            self._enter(self._stage.number, after)
        self._given += 1
        return next(self.stream)

    def get_state(self) -> dict[str, Any]:
        """Of this process's streams, and where among the stages they are."""
        state = self.stream.get_state()
        if not self._staged:
            return state
        place = {"stage": self._stage.number, "given": self._given, "after": self._after}
        return state | place

    def set_state(self, state: dict[str, Any]) -> None:
        """Back to a place; raises KeyError for one of other stages or streams."""
        if self._staged:
            state = dict(state)
            number, given, after = (state.pop(name) for name in ("stage", "given", "after"))
            if not 1 <= number <= len(self._stages):
                raise KeyError(f"stage {number} of {len(self._stages)}")
            self.stream.close()
            self._enter(number - 1, after)
            self._given = given
        self.stream.set_state(state)

    def announce(self) -> None:
        """Tells of a stage, once."""
        metrics, stage = self._job.metrics, self._stage
        if self._staged and self._told != stage.number and metrics is not None:
            self._told = stage.number
            metrics.stage(stage.name, describe(stage, len(self._stages), self._job))

    def metrics(self) -> dict[str, float]:
        """Those of the stream; the number of the stage, where there are any."""
        stage = {"stage": float(self._stage.number)} if self._staged else {}
        return stage | self.stream.metrics()

    def close(self) -> None:
        """Ends the stream's threads."""
        self.stream.close()


def describe(stage: Stage, count: int, job: Job) -> str:
    """One line about a stage, of so many."""
    data, parts = stage.data, stage.optimizer.microbatches
    split = f" in {parts} microbatches" if parts > 1 else ""
    way = "" if stage.decay == "constant" else f"{stage.decay} to "
    told = [
        f"stage {stage.number} of {count}, {stage.name}, steps {stage.first + 1} to {stage.end}",
        f"{data.batch_size} x {data.sequence_length} tokens{split}",
        f"RoPE base {job.model_cfg.rope_theta:g}",
        f"learning rate {way}{stage.learning_rate:g}",
    ]
    total = sum(source.weight for source in data.mixture)
    if len(data.mixture) > 1 and total:
        shares = ", ".join(f"{s.name} {s.weight / total:.0%}" for s in data.mixture if s.weight)
        told.append(shares if stage.from_weights is None else f"towards {shares}")
    return "; ".join(told)


def _tell_skipped(data: StagedData) -> None:
    """Says what was skipped or changed of the documents of all processes."""
    told = counts(distributed.union(data.stream.get_state()))
    if not distributed.is_primary():
        return
    for key, count in sorted(told.items()):
        source, _, kind = key.rpartition("/")
        if kind in KINDS and count:
            read = told[f"{source}/documents"]
            print(f"data source {source!r}: {count} of {read} documents {kind}", file=sys.stderr)
