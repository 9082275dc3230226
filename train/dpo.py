"""Direct preference optimisation: of two answers to a question, the better one is made likelier.

The log-probabilities of the reference, which is the model that the job starts from, are computed
for all batches before the first update, and kept in the workdir. A frozen copy beside the model
would do as many forward passes where each pair is met once, but take a second set of parameters on
the devices at every step: 912 GB of bfloat16 at 456B.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.config import ConfigError
from mmjax.model import Aux, Decoder
from train import distributed
from train.checkpoint import check_sums
from train.config import DpoConfig, JobConfig
from train.data.pipeline import make_stream
from train.job import Job, Scalars
from train.language import MakeStream, fit
from train.losses import dpo_loss, token_logprobs
from train.state import TrainState
from train.step import (
    Batch,
    apply_gradients,
    predicting,
    router_metrics,
    values_and_gradients,
    without_gradient,
)
from train.tokenizing import job_tokenizer


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job.

    Args:
      cfg: With sources of pairs, and init_from a fine-tuned model.
      workdir: Folder of the job.

    Raises:
      ConfigError: no model to start from, or data that cannot be read.
    """
    if not cfg.init_from:
        raise ConfigError("dpo starts from a fine-tuned model: set init_from to its folder")
    tokenizer = job_tokenizer(cfg, workdir, ())
    job = Job(cfg, workdir, tokenizer, cfg.steps)
    make = partial(make_stream, tokenizer=tokenizer)
    reference = reference_logprobs(job, make)
    return fit(job, make, Updates(reference), passes_per_row=2)


class Updates:
    """DPO's update on each batch, with the reference of that batch.

    Args:
      reference: From `reference_logprobs`.
    """

    def __init__(self, reference: np.ndarray) -> None:
        self._reference, self._next = reference, -1

    def __call__(self, job: Job, state: TrainState, batch: Any) -> tuple[TrainState, Scalars]:
        """The next update; the first one is the one after those of the state."""
        if self._next < 0:
            self._next = int(state.step)
        batch = batch | {"reference": self._reference[self._next]}
        self._next += 1
        return dpo_step(
            job.graphdef,
            job.optimizer,
            job.cfg.dpo,
            state,
            job.put(batch),
            job.frozen,
            job.cfg.optimizer.microbatches,
        )


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "cfg", "frozen", "microbatches"),
    donate_argnames="state",
)
def dpo_step(
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    cfg: DpoConfig,
    state: TrainState,
    batch: Batch,
    frozen: tuple[str, ...] = (),
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One AdamW update on the mean loss of the batch's pairs.

    Args:
      graphdef: Of the model.
      optimizer: From `train.optimizer`.
      cfg: Of the loss.
      state: Donated.
      batch: tokens, segment_ids, positions, loss_mask [B, T] of the preferred answers and, as
        `rejected_...`, of the others, a pair having the same segment id in both; and reference
        [B, P, 2], see `reference_logprobs`.
      frozen: Patterns of parameters that get no gradient.
      microbatches: As in `train.step.language_step`.
    """

    def loss_fn(params: nnx.State, part: Batch, weights: jax.Array, share: jax.Array) -> Any:
        model = nnx.merge(graphdef, without_gradient(params, frozen))
        logprobs, counts, aux = pair_logprobs(model, part, part["reference"].shape[1])
        metrics = preference_metrics(logprobs, part["reference"], counts, weights, cfg)
        aux = jax.tree.map(lambda x: share * x, aux)
        total = metrics["loss"] + model.cfg.router_aux_loss_coef * aux.load_balancing_loss
        return total, ((metrics, aux), ())

    pairs = jnp.arange(1, batch["reference"].shape[1] + 1, dtype=jnp.int32)
    real = (jnp.max(batch["segment_ids"], axis=1)[:, None] >= pairs[None]).astype(jnp.float32)
    weights = real / jnp.maximum(jnp.sum(real), 1)
    both = [batch["segment_ids"], batch["rejected_segment_ids"]]
    tokens = jnp.sum(jnp.concatenate(both, axis=1) != 0, axis=1)
    (loss, ((metrics, aux), _)), grads = values_and_gradients(
        loss_fn, state.params, batch, weights, tokens, microbatches
    )
    state, norm = apply_gradients(optimizer, state, grads)
    metrics |= {"total_loss": loss, "grad_norm": norm, "pairs": jnp.sum(real)}
    return state._replace(step=state.step + 1), metrics | router_metrics(aux)


def pair_logprobs(model: Decoder, batch: Batch, pairs: int) -> tuple[jax.Array, jax.Array, Aux]:
    """log π of the answers of each pair, chosen and rejected [B, P, 2], 0 where a row has fewer.

    Args:
      model: π.
      batch: See `dpo_step`.
      pairs: P, most of a row.

    Returns:
      These; how many tokens each answer has, at least 1; and the routers' aux.
    """
    # The two answers of a pair beside each other, so that rows stay on their devices.
    tokens, segments, positions, mask = (
        jnp.stack([batch[name], batch[f"rejected_{name}"]], axis=1).reshape(
            -1, batch[name].shape[1]
        )
        for name in ("tokens", "segment_ids", "positions", "loss_mask")
    )
    out = model(tokens, positions=positions, segment_ids=segments, compute_logits=False)
    logprobs = token_logprobs(model, out.hidden, jnp.roll(tokens, -1, axis=1))
    counted = predicting(segments, mask)

    def by_pair(x: jax.Array) -> jax.Array:
        """Sums over the tokens of each segment, [2B, T] to [B, P, 2]."""
        numbers = jnp.arange(1, pairs + 1, dtype=jnp.int32)
        here = segments[:, :, None] == numbers[None, None]
        sums = jnp.sum(jnp.where(here, x[:, :, None], 0), axis=1)
        return sums.reshape(-1, 2, pairs).swapaxes(1, 2)

    return by_pair(logprobs * counted), jnp.maximum(by_pair(counted), 1), out.aux


def preference_metrics(
    logprobs: jax.Array,
    reference: jax.Array,
    counts: jax.Array,
    weights: jax.Array,
    cfg: DpoConfig,
) -> dict[str, jax.Array]:
    """The loss, and what there is to watch, as sums over the pairs with their weights.

    An answer's reward is β log(π / π_ref), its implicit reward; a pair is right where that of the
    chosen one is the larger.

    Args:
      logprobs: log π of the answers [B, P, 2].
      reference: log π_ref of them [B, P, 2].
      counts: Their tokens [B, P, 2].
      weights: Of the pairs [B, P], together 1 in a batch.
      cfg: Of the loss.
    """
    ratios = logprobs - reference
    if cfg.length_normalised:
        ratios /= counts
    loss = dpo_loss(ratios[..., 0], ratios[..., 1], cfg.beta, cfg.label_smoothing)
    rewards = cfg.beta * ratios
    watched = {
        "loss": loss,
        "rewards/chosen": rewards[..., 0],
        "rewards/rejected": rewards[..., 1],
        "rewards/margin": rewards[..., 0] - rewards[..., 1],
        "rewards/accuracy": (rewards[..., 0] > rewards[..., 1]).astype(jnp.float32),
        "logprobs/chosen": logprobs[..., 0],
        "logprobs/rejected": logprobs[..., 1],
    }
    return {name: jnp.sum(weights * x) for name, x in watched.items()}


def reference_logprobs(job: Job, make: MakeStream) -> np.ndarray:
    """log π_ref of the answers of all the job's batches [steps, B, P, 2], in float32.

    They are kept in `reference.npy` of the workdir, and in `reference.json` of which model they
    are, how many batches are done, and a check sum of each. A later run reads the batches again
    and goes on where they end or first differ; another model starts anew.

    Args:
      job: Whose initial model is the reference.
      make: The job's batches.
    """
    cfg, data = job.cfg, job.cfg.data
    model = _identity(job)
    table, sums = _kept(job, model, (cfg.steps, data.batch_size, data.pairs_per_row, 2))
    told = f"log-probabilities of the reference: {{}} of {cfg.steps} batches"
    with (
        jax.set_mesh(job.mesh),
        closing(make(cfg, steps=cfg.steps, rows=job.rows)) as stream,
    ):
        everywhere = NamedSharding(job.mesh, PartitionSpec())
        compute = jax.jit(
            _of_batch, static_argnames=("graphdef", "pairs"), out_shardings=everywhere
        )
        for number in range(cfg.steps):
            batch = job.put(next(stream))
            found = _digest(check_sums(batch))
            if sums[number : number + 1] == [found]:
                continue
            if sums[number:]:
                if distributed.is_primary():
                    print(f"batch {number + 1} has changed; so has its reference", file=sys.stderr)
                del sums[number:]
                _note(job, table, model, sums)  # Before what it tells is written over.
            logprobs = compute(job.graphdef, job.state.params, batch, data.pairs_per_row)
            table[number] = np.asarray(logprobs)
            sums.append(found)
            if (number + 1) % cfg.checkpoint.every == 0 or number + 1 == cfg.steps:
                _note(job, table, model, sums)
                if distributed.is_primary():
                    print(told.format(number + 1), file=sys.stderr)
    return table


def _of_batch(
    graphdef: nnx.GraphDef[Decoder], params: nnx.State, batch: Batch, pairs: int
) -> jax.Array:
    return pair_logprobs(nnx.merge(graphdef, params), batch, pairs)[0]


def _kept(job: Job, model: str, shape: tuple[int, ...]) -> tuple[np.ndarray, list[int]]:
    """The table of an earlier run and the check sums of its batches, or an empty one and none."""
    table, sums = np.zeros(shape, np.float32), list[int]()
    if distributed.is_primary():
        job.workdir.mkdir(parents=True, exist_ok=True)
        file, note = job.workdir / "reference.npy", job.workdir / "reference.json"
        kept = _read_note(note)
        if kept.get("of") == model and _is_table(file, shape):
            table, sums = np.lib.format.open_memmap(file, "r+"), list(kept["sums"])
        else:
            note.unlink(missing_ok=True)
            table = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    sums = distributed.union({"sums": sums} if distributed.is_primary() else {})["sums"]
    if sums and jax.process_count() > 1:
        shared = distributed.from_primary(np.asarray(table))
        # The first process goes on writing to its file; the others to a copy that can be written.
        table = table if distributed.is_primary() else shared.copy()
    return table, sums


def _read_note(path: Path) -> dict[str, Any]:
    """What is done, nothing where that cannot be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _is_table(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file holds a whole table. Opened to write, one that is cut off would be filled
    with zeros.
    """
    try:
        found = np.load(file, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return found.shape == shape and found.dtype == np.float32


def _note(job: Job, table: np.ndarray, model: str, sums: list[int]) -> None:
    if isinstance(table, np.memmap):
        table.flush()
        unfinished = job.workdir / "reference.json.unfinished"
        unfinished.write_text(json.dumps({"of": model, "sums": sums}))
        os.replace(unfinished, job.workdir / "reference.json")


def _identity(job: Job) -> str:
    """Changes when the reference does: by its shape and by the values of its parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(job.state.params)
    values = check_sums({jax.tree_util.keystr(path): x for path, x in leaves})
    return f"{_digest(values):08x} {job.model_cfg}"


def _digest(sums: Mapping[str, int]) -> int:
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())
