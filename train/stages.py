"""Stages of a job as data: how long each is, and the settings and the learning rate in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.bounds import NOT_NEGATIVE

if TYPE_CHECKING:
    from train.config import DataConfig, JobConfig, OptimizerConfig

# What the numbers of a stage may be.
BOUNDS = {
    NOT_NEGATIVE: "tokens steps sequence_length batch_size microbatches rope_theta "
    "router_aux_loss_coef learning_rate"
}
DECAYS = ("constant", "cosine", "linear", "exponential")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a pretrain or sft job. What it does not set stays as in the stage before, and
    in the first one as in the job.

    Attributes:
      name: On the progress line.
      tokens, steps: How long it is; one of the two. Tokens are those of whole rows.
      sequence_length: T, tokens a packed row.
      batch_size: B, packed rows an update.
      microbatches: Parts of a batch that go through the model one after the other.
      rope_theta: Base of the rotary frequencies.
      router_aux_loss_coef: Weight of the load-balancing loss.
      weights: Of the sources of data.mixture, by name; a source that is not named rests.
      blend: Weights go linearly from those of the stage before, instead of changing at once.
      learning_rate: With which the stage ends.
      decay: The way there from the rate before: "constant" (at once), "linear", "cosine" or
        "exponential".
    """

    name: str
    tokens: int = 0
    steps: int = 0
    sequence_length: int = 0
    batch_size: int = 0
    microbatches: int = 0
    rope_theta: float = 0.0
    router_aux_loss_coef: float | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    blend: bool = False
    learning_rate: float | None = None
    decay: str = "constant"


class Stage(NamedTuple):
    """A stage with all its settings.

    number: From 1; first: updates before it; model: fields of the model that the stages so far have
    set; from_weights: of the sources where it starts, None where they do not move; learning_rate:
    with which it ends, and decay: how it comes there.
    """

    number: int
    name: str
    first: int
    steps: int
    data: DataConfig
    optimizer: OptimizerConfig
    model: Mapping[str, float]
    from_weights: Mapping[str, float] | None
    learning_rate: float
    decay: str

    @property
    def end(self) -> int:
        """Updates when it is over."""
        return self.first + self.steps


def resolve(cfg: JobConfig) -> list[Stage]:
    """The stages of a job, at least one, each with what it takes over from those before it."""
    if not cfg.stages:
        peak = cfg.optimizer.learning_rate
        return [Stage(1, "", 0, cfg.steps, cfg.data, cfg.optimizer, {}, None, peak, "constant")]
    found: list[Stage] = []
    data, optimizer = cfg.data, cfg.optimizer
    model: dict[str, float] = {}
    rate = optimizer.learning_rate
    for stage in cfg.stages:
        before = {s.name: s.weight for s in data.mixture}
        data, optimizer = _data(stage, data), _optimizer(stage, optimizer)
        model = model | _model(stage)
        first = found[-1].end if found else 0
        rate = rate if stage.learning_rate is None else stage.learning_rate
        found.append(
            Stage(
                len(found) + 1,
                stage.name,
                first,
                _steps(stage, data),
                data,
                optimizer,
                model,
                before if stage.blend else None,
                rate,
                stage.decay,
            )
        )
    return found


def total_steps(stages: Sequence[StageConfig], data: DataConfig) -> int:
    """Updates of all stages of a job whose own data is given."""
    total = 0
    for stage in stages:
        data = _data(stage, data)
        total += _steps(stage, data)
    return total


def problems(cfg: JobConfig) -> Iterator[str]:
    """What is wrong with the stages of a job."""
    if cfg.stages and cfg.task in ("cispo", "dpo"):
        yield "stages are for pretrain and sft"
    if cfg.stages and cfg.optimizer.decay != "constant":
        yield f"optimizer.decay {cfg.optimizer.decay!r} beside stages; set it in them"
    names = [stage.name for stage in cfg.stages]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"two stages are called {name!r}"
    known = [source.name for source in cfg.data.mixture]
    rate = cfg.optimizer.learning_rate
    for stage in cfg.stages:
        where = f"stage {stage.name!r}"
        before, rate = rate, rate if stage.learning_rate is None else stage.learning_rate
        if stage.decay == "exponential" and before != rate and not min(before, rate):
            yield (
                f"{where}: decay 'exponential' from {before:g} to {rate:g} neither leaves nor "
                "reaches 0; take 'linear' or 'cosine'"
            )
        if (stage.steps > 0) == (stage.tokens > 0):
            yield f"{where} needs steps or tokens, one of them above 0"
        if stage.decay not in DECAYS:
            yield f"{where}: decay {stage.decay!r}; known: {', '.join(DECAYS)}"
        if unknown := sorted(set(stage.weights) - set(known)):
            yield f"{where} weighs {', '.join(unknown)}; data.mixture has {', '.join(known)}"
        if stage.weights and not (
            min(stage.weights.values()) >= 0 and 0 < sum(stage.weights.values()) < math.inf
        ):
            yield f"{where}: weights must not be negative, and one above 0: {dict(stage.weights)}"
        if stage.blend and not stage.weights:
            yield f"{where} blends, but has no weights to go to"


def division_problems(cfg: JobConfig) -> Iterator[str]:
    """Batches that streams or microbatches do not divide."""
    for stage in resolve(cfg):
        where = f"stage {stage.name!r}: " if cfg.stages else ""
        rows = stage.data.batch_size
        if rows % stage.data.streams:
            yield (
                f"{where}data.batch_size {rows} is no multiple of data.streams "
                f"{stage.data.streams}; every stream fills whole rows"
            )
        if rows % stage.optimizer.microbatches:
            yield (
                f"{where}data.batch_size {rows} is no multiple of optimizer.microbatches "
                f"{stage.optimizer.microbatches}"
            )


def staged_rate(cfg: OptimizerConfig, stages: Sequence[Stage]) -> optax.Schedule:
    """The learning rate over stages: each goes from where the one before ended to its own; a
    warm-up lies over the first updates.
    """
    starts = [cfg.learning_rate, *(stage.learning_rate for stage in stages[:-1])]
    pieces = [
        decay(s.decay, start, s.learning_rate, s.steps)
        for s, start in zip(stages, starts, strict=True)
    ]
    joined = optax.join_schedules(pieces, [stage.end for stage in stages[:-1]])
    if not cfg.warmup_steps:
        return joined

    def warmed(count: jax.Array) -> jax.Array:
        rising = (jnp.asarray(count, jnp.float32) + 1) / cfg.warmup_steps
        return jnp.asarray(joined(count), jnp.float32) * jnp.minimum(rising, 1)

    return warmed


def decay(kind: str, start: float, end: float, steps: int) -> optax.Schedule:
    """From start to end in so many updates, then the end; "constant" is the end at once."""
    if kind == "constant" or start == end:
        return optax.constant_schedule(end)
    if kind == "linear":
        return optax.linear_schedule(start, end, steps)
    if kind == "cosine":  # Also from 0 upwards, which Optax has none for.
        left = optax.cosine_decay_schedule(1.0, steps)
        return lambda count: end + (start - end) * left(count)
    return optax.exponential_decay(start, steps, end / start, end_value=end)


def _steps(stage: StageConfig, data: DataConfig) -> int:
    return stage.steps or math.ceil(stage.tokens / (data.batch_size * data.sequence_length))


def _data(stage: StageConfig, data: DataConfig) -> DataConfig:
    mixture = data.mixture
    if stage.weights:
        mixture = tuple(
            dataclasses.replace(s, weight=stage.weights.get(s.name, 0.0)) for s in mixture
        )
    return dataclasses.replace(
        data,
        sequence_length=stage.sequence_length or data.sequence_length,
        batch_size=stage.batch_size or data.batch_size,
        mixture=mixture,
    )


def _optimizer(stage: StageConfig, optimizer: OptimizerConfig) -> OptimizerConfig:
    parts = stage.microbatches or optimizer.microbatches
    return dataclasses.replace(optimizer, microbatches=parts)


def _model(stage: StageConfig) -> dict[str, float]:
    """Fields of the model that a stage sets."""
    found = {"rope_theta": stage.rope_theta} if stage.rope_theta else {}
    if stage.router_aux_loss_coef is not None:
        found["router_aux_loss_coef"] = stage.router_aux_loss_coef
    return found
