"""Reinforcement with CISPO: roll out, score, drop groups without signal, several updates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmjax.config import ConfigError
from mmjax.engine import SamplingParams
from mmjax.model import Decoder
from mmjax.tokenizer import Tokenizer
from train.config import CispoConfig, JobConfig
from train.data.reasoning import ReasoningProblems, split_problems
from train.data.streams import Everywhere
from train.job import Job, Scalars
from train.losses import cispo_loss, group_advantages, token_logprobs
from train.rollout import Rollouts, roll_out
from train.state import TrainState
from train.step import apply_gradients, router_metrics
from train.tokenizing import job_tokenizer


class Batch[A: (jax.Array, np.ndarray)](NamedTuple):
    """One update's N groups: sequences [N, G, P + T] int32 (prompt and completion without a gap),
    prompt_lengths [N], completion lengths [N, G]; per completion token [N, G, T]: tokens, behaviour
    and mask (zero in a dropped group); advantages [N, G].
    """

    sequences: A
    prompt_lengths: A
    lengths: A
    tokens: A
    behaviour: A
    mask: A
    advantages: A


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job. A step is one rollout batch with all its updates.

    Args:
      cfg: With data.tasks; usually with init_from a fine-tuned model.
      workdir: Folder of the job.
    """
    rl = cfg.cispo
    if jax.process_count() > 1:
        raise ConfigError(
            f"cispo samples in one process, not in {jax.process_count()}; start one process that "
            "has all devices"
        )
    if not cfg.init_from:
        raise ConfigError("cispo starts from a fine-tuned model: set init_from to its folder")
    problems, held_out = split_problems(
        cfg.data.tasks, cfg.data.size, rl.eval_problems, cfg.seed + 1, cfg.rewards
    )
    tokenizer = job_tokenizer(cfg, workdir, ())
    job = Job(cfg, workdir, tokenizer, cfg.steps * rl.updates_per_batch)
    data = Everywhere(_problem_indices(len(problems), rl.prompts_per_batch, cfg.seed))
    sampling = SamplingParams(rl.max_new_tokens, rl.temperature, eos_id=tokenizer.eos_id)

    def step(state: TrainState, indices: Any) -> tuple[TrainState, Scalars]:
        chosen = [problems[int(i)] for i in indices]
        next_key, key = jax.random.split(jax.random.wrap_key_data(state.key))
        model = nnx.merge(job.graphdef, state.params)
        rollouts = roll_out(
            model,
            tokenizer,
            problems,
            chosen,
            sampling,
            key,
            samples=rl.samples_per_prompt,
            max_prompt_tokens=rl.max_prompt_tokens,
        )
        first = int(state.step) == 0
        before = evaluate(model, tokenizer, held_out, rl) if first else None
        updated = []
        for batch in minibatches(rollouts, rl.updates_per_batch):
            placed = Batch(**job.put(batch._asdict()))
            state, values = cispo_step(job.graphdef, job.optimizer, rl, state, placed)
            updated.append(values)
        state = state._replace(step=state.step + 1, key=jax.random.key_data(next_key))
        metrics = {**rollout_metrics(rollouts), **_summary(updated)}
        number = int(state.step)
        if before is not None:
            metrics["eval/initial_accuracy"] = before
        if number == cfg.steps or (rl.eval_every and number % rl.eval_every == 0):
            trained = nnx.merge(job.graphdef, state.params)
            metrics["eval/accuracy"] = evaluate(trained, tokenizer, held_out, rl)
        return state, metrics

    job.run(data, step, finish_early=partial(_reached, target=rl.target_accuracy))
    job.export()
    return job


@partial(jax.jit, static_argnames=("graphdef", "optimizer", "cfg"), donate_argnames="state")
def cispo_step(
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    cfg: CispoConfig,
    state: TrainState,
    batch: Batch[jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One off-policy update on whole groups; `state.step` is left to the caller.

    A batch without any group that says something changes nothing, optimizer moments included.
    """

    def loss_fn(params: nnx.State) -> tuple[jax.Array, tuple[Any, ...]]:
        model = nnx.merge(graphdef, params)
        logprobs, aux = completion_logprobs(model, batch, cfg.temperature)
        loss, stats = cispo_loss(
            logprobs, batch.behaviour, batch.advantages, batch.mask, cfg.is_weight_cap
        )
        total = loss + model.cfg.router_aux_loss_coef * aux.load_balancing_loss
        drift = jnp.max(jnp.abs(logprobs - batch.behaviour) * batch.mask)
        return total, (loss, stats, aux, drift)

    (_, (loss, stats, aux, drift)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updated, norm = apply_gradients(optimizer, state, grads)
    says = batch.mask.sum() > 0
    state = jax.tree.map(lambda new, old: jnp.where(says, new, old), updated, state)
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "is_weight/mean": stats.ratio_mean,
        "is_weight/max": stats.ratio_max,
        "is_weight/capped": stats.capped,
        "logprob_drift": drift,
        **router_metrics(aux),
    }
    return state, metrics


def completion_logprobs(
    model: Decoder, batch: Batch[jax.Array], temperature: float
) -> tuple[jax.Array, Any]:
    """log π of every completion token [N, G, T] by one forward pass, and the routers' aux."""
    groups, samples, width = batch.tokens.shape
    sequences = batch.sequences.reshape(groups * samples, -1)
    prompt = jnp.repeat(batch.prompt_lengths, samples)  # [N G]
    length = prompt + batch.lengths.reshape(-1)
    place = jnp.arange(sequences.shape[1], dtype=jnp.int32)[None]
    real = (place < length[:, None]).astype(jnp.int32)
    out = model(sequences, segment_ids=real, compute_logits=False)
    # The hidden state before each completion token predicts it.
    before = prompt[:, None] - 1 + jnp.arange(width, dtype=jnp.int32)[None]
    hidden = jnp.take_along_axis(out.hidden, before[:, :, None], axis=1)
    logp = token_logprobs(model, hidden, batch.tokens.reshape(-1, width), temperature)
    return logp.reshape(batch.tokens.shape), out.aux


def minibatches(rollouts: Rollouts, updates: int) -> list[Batch[np.ndarray]]:
    """Whole groups dealt out to the updates, those with a signal evenly.

    Args:
      rollouts: N groups; N a multiple of `updates`.
      updates: Off-policy updates on them.
    """
    advantages, kept = map(np.asarray, group_advantages(jnp.asarray(rollouts.rewards)))
    groups, samples, width = rollouts.tokens.shape
    place = np.arange(width)[None, None]
    mask = (place < rollouts.lengths[:, :, None]) & kept[:, None, None]
    sequences = np.zeros((groups, samples, rollouts.prompts.shape[1] + width), np.int32)
    for group, start in enumerate(rollouts.prompt_lengths):
        sequences[group, :, :start] = rollouts.prompts[group, :start]
        sequences[group, :, start : start + width] = rollouts.tokens[group]
    whole = Batch(
        sequences,
        rollouts.prompt_lengths,
        rollouts.lengths,
        rollouts.tokens,
        rollouts.behaviour,
        mask.astype(np.float32),
        advantages,
    )
    order = np.argsort(~kept, kind="stable")
    return [Batch(*(x[order[i::updates]] for x in whole)) for i in range(updates)]


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Reward, share of groups with a signal, lengths and truncation of one rollout batch."""
    rewards = rollouts.rewards
    mixed = rewards.max(axis=1) > rewards.min(axis=1)
    return {
        "reward": float(rewards.mean()),
        "groups_kept": float(mixed.mean()),
        "length": float(rollouts.lengths.mean()),
        "truncated": float(1 - rollouts.finished.mean()),
        "verifier_failures": float(rollouts.failures),
    }


def evaluate(
    model: Decoder, tokenizer: Tokenizer, problems: ReasoningProblems, cfg: CispoConfig
) -> float:
    """Share of problems that greedy decoding solves."""
    greedy = SamplingParams(cfg.max_new_tokens, temperature=0.0, eos_id=tokenizer.eos_id)
    done = roll_out(
        model,
        tokenizer,
        problems,
        list(problems),
        greedy,
        jax.random.key(0),
        samples=1,
        max_prompt_tokens=cfg.max_prompt_tokens,
    )
    return float(done.rewards.mean())


def _problem_indices(count: int, batch: int, seed: int) -> grain.DatasetIterator[np.ndarray]:
    """Endless shuffled batches of problem indices, checkpointable."""
    rows = grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch)
    return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _summary(updates: list[dict[str, jax.Array]]) -> dict[str, jax.Array | float]:
    """Means over the updates of one batch; drift before the first of them, when sampler and
    trainer hold the same weights.
    """
    fetched = jax.device_get(updates)
    summary: dict[str, jax.Array | float] = {
        name: float(np.mean([u[name] for u in fetched])) for name in fetched[0]
    }
    summary["is_weight/max"] = float(max(u["is_weight/max"] for u in fetched))
    summary["logprob_drift"] = float(fetched[0]["logprob_drift"])
    return summary


def _reached(metrics: Scalars, *, target: float) -> bool:
    """Whether the step's evaluation, if it had one, reached the target."""
    return float(metrics.get("eval/accuracy", 0.0)) >= target
