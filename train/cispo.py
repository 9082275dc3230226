"""Reinforcement: roll out, score, replace groups without signal, several updates a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mmjax.config import ConfigError, ModelConfig
from mmjax.model import Aux, Decoder
from mmjax.parallel.sequence import length_multiple
from mmjax.sharding import make_mesh
from train import policy_losses
from train.asynchronous import Pipeline
from train.batches import Batch, by_group, by_sample, minibatches
from train.cispo_config import CispoConfig
from train.config import JobConfig
from train.curriculum import Curriculum, Windows
from train.data.reasoning import ReasoningProblems, split_problems
from train.job import Job, Scalars
from train.losses import token_logprobs
from train.rollout import (
    Asked,
    Group,
    Sampler,
    accuracy,
    check_prompts,
    encode_prompt,
    evaluate,
    passed,
    score,
)
from train.state import TrainState
from train.step import apply_gradients, router_metrics, values_and_gradients
from train.tokenizing import job_tokenizer
from train.watch import Health, Transcripts, entropy, rollout_metrics, task_rates

# What begins the names of `policy_stats`.
_OF_TOKENS = ("ratio/", "clipped/", "probability/")


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job. A step is one rollout batch with all its updates.

    Args:
      cfg: With data.tasks; usually with init_from a fine-tuned model.
      workdir: Folder of the job.
    """
    rl, apart = cfg.cispo, cfg.asynchronous
    if jax.process_count() > 1 and (apart.max_staleness or apart.sampler_devices):
        raise ConfigError(
            "asynchronous.max_staleness and sampler_devices are for one process, not for "
            f"{jax.process_count()}; set both to 0, or start one process that has all devices"
        )
    if not cfg.init_from:
        raise ConfigError("cispo starts from a fine-tuned model: set init_from to its folder")
    problems, held_out = split_problems(
        cfg.data.tasks, cfg.data.size, rl.eval_problems, cfg.seed + 1, cfg.rewards
    )
    tokenizer = job_tokenizer(cfg, workdir, ())
    for drawn in (problems, held_out):
        check_prompts(drawn, tokenizer, rl.max_prompt_tokens)
    training, sampling = split_devices(cfg)
    job = Job(cfg, workdir, tokenizer, cfg.steps * rl.updates_per_batch, training)
    job.check_rows(rl.samples_per_update // cfg.optimizer.microbatches)
    mesh = job.mesh if sampling is training else serving_mesh(job.model_cfg, sampling)
    sampler = Sampler(job.model, tokenizer, cfg, mesh)
    loop = Loop(job, sampler, problems, held_out)
    job.run(loop, loop.step, finish_early=partial(_reached, target=rl.target_accuracy))
    job.export()
    return job


def split_devices(cfg: JobConfig) -> tuple[list[Any], list[Any]]:
    """The devices that train and those that sample; the same list if they take turns.

    Raises:
      ConfigError: there are too few.
    """
    devices, apart = jax.devices(), cfg.asynchronous.sampler_devices
    if apart >= len(devices):
        raise ConfigError(
            f"asynchronous.sampler_devices {apart} leaves none of {len(devices)} devices to train"
        )
    return (devices[:-apart], devices[-apart:]) if apart else (devices, devices)


def serving_mesh(model: ModelConfig, devices: Sequence[Any]) -> Mesh:
    """A mesh to decode on: over KV heads as far as they divide, then over experts."""
    heads = math.gcd(len(devices), model.num_kv_heads)
    experts = math.gcd(len(devices) // heads, model.num_experts)
    return make_mesh({"model": heads, "expert": experts, "data": -1}, devices)


class Loop:
    """All of a run but the model's state: what to sample next, and what was seen.

    It is what the job reads, an endless iterator of itself, so that its place is in every
    checkpoint.

    Args:
      job: With the model's state.
      sampler: The engine.
      problems: To train on.
      held_out: To evaluate on.
    """

    def __init__(
        self, job: Job, sampler: Sampler, problems: ReasoningProblems, held_out: ReasoningProblems
    ) -> None:
        cfg = self._cfg = job.cfg
        self._job, self._sampler, self._held_out = job, sampler, held_out
        self._problems = problems
        tasks = [problem.task for problem in problems]
        self._curriculum = Curriculum(
            tasks, problems.families, cfg.curriculum, cfg.sampling, cfg.seed
        )
        self._windows = Windows(cfg.sampling, cfg.cispo.max_new_tokens)
        self._pipeline = Pipeline(sampler, cfg, self._ask_next, self._score)
        self._health = Health(cfg.alerts)
        self._transcripts: Transcripts | None = None
        self._number = 0  # of the next group
        self._step = 0
        self._seen: list[Group] = []  # sampled for the batch at hand, those left out included
        self._fresh: nnx.State | None = None  # weights that the sampler does not have yet
        self._watched: dict[str, float] = {}
        self._unchecked: Scalars | None = None  # metrics of a step that may still be computed

    # As the job's data.

    def __next__(self) -> Loop:
        return self

    def get_state(self) -> dict[str, Any]:
        """All that a resumed run goes on from."""
        parts = {
            "curriculum": self._curriculum.get_state(),
            "windows": self._windows.get_state(),
            "pipeline": self._pipeline.get_state(),
            "number": self._number,
            "step": self._step,
            "problems": self._problems.digest,
        }
        return {"all": parts}

    def set_state(self, state: dict[str, Any]) -> None:
        """Back to a place.

        Raises:
          ValueError: the problems were others, which the place counts in.
        """
        parts = state["all"]
        if parts["problems"] != self._problems.digest:
            raise ValueError(
                f"its problems were others than these {len(self._problems)}, and pass rates and "
                "places are counted in them; go on with the same data.tasks (and files), "
                "data.size, seed and cispo.eval_problems, or start in another workdir"
            )
        self._curriculum.set_state(parts["curriculum"])
        self._windows.set_state(parts["windows"])
        self._pipeline.set_state(parts["pipeline"], self._ask)
        self._number, self._step = parts["number"], parts["step"]

    # What to sample.

    def _ask(self, number: int, problem: int, limit: int) -> Asked:
        """A group; its draws depend on the job's seed and its number alone."""
        prompt = encode_prompt(self._job.tokenizer, self._problems[problem])
        seed = (self._cfg.seed << 40) + number
        return Asked(number, problem, prompt, self._sampler.params(seed, limit))

    def _ask_next(self) -> Asked:
        (problem,) = self._curriculum.draw(1, self._step)
        self._number += 1
        return self._ask(self._number - 1, problem, self._windows.limit)

    def _score(self, groups: list[Group]) -> list[Group]:
        """Scores groups and takes notice of them."""
        if not groups:
            return []
        cfg, limit = self._cfg, self._windows.limit
        done = score(groups, self._problems, self._job.tokenizer, cfg.sampling, limit)
        for group in done:
            self._curriculum.rates.record(group.problem, passed(group))
        self._seen += done
        return done

    def _in_rounds(self) -> list[Group]:
        """A batch from the weights of now: rounds of sampling until every group has a signal."""
        size, rounds = self._cfg.cispo.prompts_per_batch, self._cfg.sampling.rounds
        kept: list[Group] = []
        for _ in range(rounds):
            asked = [self._ask_next() for _ in range(size - len(kept))]
            kept += [g for g in self._score(self._sampler.sample(asked)) if g.has_signal]
            if len(kept) == size:
                return kept
        spare = [g for g in self._seen if not g.has_signal]
        taken = {g.number for g in [*kept, *spare[: size - len(kept)]]}
        return [g for g in self._seen if g.number in taken]

    # A step.

    def step(self, state: TrainState, _: Any) -> tuple[TrainState, Scalars]:
        """One batch: sample, score, update."""
        if self._transcripts is None:
            self._transcripts = Transcripts(self._job.workdir, self._step)
            self._sampler.update(state.params, self._step)
        clock = Clock()
        metrics: dict[str, Any] = {}
        if self._step == 0:
            metrics |= self._evaluate("eval/initial_accuracy")
            clock.take("evaluate")
        asynchronous = self._cfg.asynchronous.max_staleness > 0
        taken = self._pipeline.batch(self._step, self._poll) if asynchronous else self._in_rounds()
        clock.take("sample")
        self._give_weights()  # The update is about to eat them.
        self._check(self._step)
        metrics |= self._notice(taken)
        state, updated = self._update(state, taken)
        self._step += 1
        self._fresh, self._unchecked = state.params, updated
        if not asynchronous:
            self._give_weights()
            self._check(self._step)
        clock.take("update")
        if self._last_or_due():
            self._give_weights()
            metrics |= self._evaluate("eval/accuracy")
            clock.take("evaluate")
        tokens = {"sample": metrics["tokens_sampled"], "update": metrics["tokens_trained"]}
        return state, {**metrics, **updated, **clock.metrics(tokens)}

    def _notice(self, taken: list[Group]) -> dict[str, Any]:
        """Metrics and transcripts of a batch; moves the curriculum on."""
        seen, self._seen = self._seen, []
        rates = task_rates(seen, self._problems)
        self._curriculum.rates.record_tasks(rates)
        metrics = rollout_metrics(seen, taken, self._step)
        metrics["prompts_retired"] = float(self._curriculum.retired)
        metrics["window"] = float(self._windows.limit)
        metrics |= self._problems.metrics()
        self._watched = metrics
        if len(rates) > 1:
            metrics |= {f"pass/{task}": rate for task, rate in rates.items()}
        self._write("training", self._step + 1, seen, self._problems)
        return metrics

    def _update(self, state: TrainState, taken: list[Group]) -> tuple[TrainState, Scalars]:
        """The updates on one batch."""
        rl, graphdef = self._cfg.cispo, self._job.graphdef
        multiple = length_multiple(self._job.mesh)
        dealt = minibatches(taken, rl, self._windows.limit, multiple)
        counted = np.array([batch.mask.any() for batch in dealt], np.float32)
        batches = [Batch(**self._job.put(by_sample(batch)._asdict())) for batch in dealt]
        if rl.anchor == "proximal":
            batches = [
                b._replace(anchor=policy_logprobs(graphdef, rl, state.params, b)) for b in batches
            ]
        updates = []
        for batch in batches:
            state, values = cispo_step(
                graphdef, self._job.optimizer, rl, state, batch, self._cfg.optimizer.microbatches
            )
            updates.append(values)
        self._windows.record(np.concatenate([g.lengths for g in taken]), entropy(taken))
        values = summary_of(updates, counted)
        if not counted.any():  # Nothing to compare.
            values = {k: x for k, x in values.items() if not k.startswith(_OF_TOKENS)}
        return state._replace(step=state.step + 1), values

    def _poll(self) -> None:
        """Gives the sampler new weights as soon as they are computed."""
        if self._fresh is not None and all(x.is_ready() for x in jax.tree.leaves(self._fresh)):
            self._give_weights()

    def _give_weights(self) -> None:
        if self._fresh is not None:
            self._sampler.update(self._fresh, self._step)
        self._fresh = None

    def _check(self, number: int) -> None:
        """Looks at the metrics of step `number`; waits for them."""
        if self._unchecked is not None:
            values = {k: float(x) for k, x in jax.device_get(dict(self._unchecked)).items()}
            self._job.stop_reason = self._health.check(number, self._watched | values)
        self._unchecked = None

    def _last_or_due(self) -> bool:
        every = self._cfg.cispo.eval_every
        return self._step == self._cfg.steps or bool(every and self._step % every == 0)

    def _evaluate(self, name: str) -> dict[str, float]:
        """Greedy accuracy on the held-out problems, of all tasks and of each."""
        rl, sampling = self._cfg.cispo, self._cfg.sampling
        groups = evaluate(
            self._sampler, self._job.tokenizer, self._held_out, sampling, rl.max_new_tokens
        )
        self._write("held-out", self._step, groups, self._held_out)
        rates = task_rates(groups, self._held_out) if len(self._held_out.families) > 1 else {}
        return {name: accuracy(groups)} | {f"{name}/{task}": x for task, x in rates.items()}

    def _write(
        self, kind: str, step: int, groups: Sequence[Group], problems: ReasoningProblems
    ) -> None:
        assert self._transcripts is not None
        self._transcripts.write(step, kind, groups, problems, self._job.tokenizer)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._taken: dict[str, float] = {}

    def take(self, phase: str) -> None:
        """The time since the last call was the phase's."""
        now = time.perf_counter()
        self._taken[phase] = self._taken.get(phase, 0.0) + now - self._last
        self._last = now

    def metrics(self, tokens: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each phase, and tokens a second of those with tokens."""
        rates = {f"tokens_per_second/{p}": n / self._taken[p] for p, n in tokens.items()}
        return {f"seconds/{phase}": x for phase, x in self._taken.items()} | rates


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "cfg", "microbatches"),
    donate_argnames="state",
)
def cispo_step(
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    cfg: CispoConfig,
    state: TrainState,
    batch: Batch[jax.Array],
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One off-policy update on whole groups; `state.step` is left to the caller.

    A batch without any group that says something changes nothing, optimizer moments included; nor
    does one whose gradient is not finite.

    Args:
      graphdef: Of the model.
      optimizer: From `train.optimizer`.
      cfg: Of the loss.
      state: Donated.
      batch: By sample, R = N G rows.
      microbatches: Parts of R / microbatches rows that go through the model one after the other,
        their gradients summed in float32. A token weighs what it does in the whole batch, so that
        any number of parts gives the same update; routers balance within a part.
    """
    groups = by_group(batch, cfg.samples_per_prompt)
    weights = policy_losses.token_weights(
        groups.mask, groups.lengths, cfg.loss.normaliser, cfg.max_new_tokens
    )

    def loss_fn(
        params: nnx.State, part: Batch[jax.Array], weights: jax.Array, share: jax.Array
    ) -> Any:
        model = nnx.merge(graphdef, params)
        logprobs, aux = completion_logprobs(model, part, cfg.temperature)
        # Of samples alone: their groups are in the weights and the advantages.
        alone = logprobs[:, None], by_group(part, 1), weights[:, None]
        loss = policy_loss(*alone, cfg)
        aux = jax.tree.map(lambda x: share * x, aux)
        total = loss + model.cfg.router_aux_loss_coef * aux.load_balancing_loss
        return total, ((loss, aux), logprobs)

    tokens = batch.prompt_lengths + batch.lengths
    (_, ((loss, aux), logprobs)), grads = values_and_gradients(
        loss_fn, state.params, batch, weights.reshape(batch.mask.shape), tokens, microbatches
    )
    updated, norm = apply_gradients(optimizer, state, grads)
    counts = (batch.mask.sum() > 0) & jnp.isfinite(norm)
    state = jax.tree.map(lambda new, old: jnp.where(counts, new, old), updated, state)
    stats = policy_stats(logprobs.reshape(groups.mask.shape), groups, cfg)
    return state, {"loss": loss, "grad_norm": norm, **stats, **router_metrics(aux)}


def policy_loss(
    logprobs: jax.Array, batch: Batch[jax.Array], weights: jax.Array, cfg: CispoConfig
) -> jax.Array:
    """-J of the config's algorithm on log π_θ and `policy_losses.token_weights` [N, G, T]."""
    objective = _terms(logprobs, batch, cfg).objective
    if cfg.correction_cap:
        drift = jnp.exp(batch.anchor - batch.behaviour)
        objective *= jax.lax.stop_gradient(jnp.minimum(drift, cfg.correction_cap))
    return -jnp.sum(weights * objective)


def policy_stats(
    logprobs: jax.Array, batch: Batch[jax.Array], cfg: CispoConfig
) -> dict[str, jax.Array]:
    """What there is to watch in log π_θ [N, G, T]."""
    return {
        **policy_losses.clip_stats(_terms(logprobs, batch, cfg), batch.advantages, batch.mask),
        **policy_losses.agreement(logprobs, batch.behaviour, batch.mask),
    }


def _terms(logprobs: jax.Array, batch: Batch[jax.Array], cfg: CispoConfig) -> policy_losses.Terms:
    loss, given = cfg.loss, (logprobs, batch.anchor, batch.advantages)
    match cfg.algorithm:
        case "cispo":
            low, high = cfg.trust_low, cfg.trust_high
            trust = None if low is None or high is None else (low, high)
            return policy_losses.cispo(
                *given, cap=cfg.is_weight_cap, floor=cfg.is_weight_floor, trust=trust
            )
        case "gspo":
            return policy_losses.gspo(*given, batch.mask, low=loss.clip_low, high=loss.clip_high)
        case "dapo":
            return policy_losses.dapo(*given, low=loss.clip_low, high=loss.clip_high)
        case _:
            return policy_losses.grpo(*given, clip=loss.clip_low)


@partial(jax.jit, static_argnames=("graphdef", "cfg"))
def policy_logprobs(
    graphdef: nnx.GraphDef[Decoder],
    cfg: CispoConfig,
    params: nnx.State,
    batch: Batch[jax.Array],
) -> jax.Array:
    """log π of every completion token [R, T] under these parameters, of a batch by sample."""
    return completion_logprobs(nnx.merge(graphdef, params), batch, cfg.temperature)[0]


def completion_logprobs(
    model: Decoder, batch: Batch[jax.Array], temperature: float
) -> tuple[jax.Array, Aux]:
    """log π of every completion token [R, T] by one forward pass, and the routers' aux."""
    prompt = batch.prompt_lengths
    out = model(batch.sequences, lengths=prompt + batch.lengths, compute_logits=False)
    # The hidden state before each completion token predicts it.
    width = batch.tokens.shape[-1]
    before = prompt[:, None] - 1 + jnp.arange(width, dtype=jnp.int32)[None]
    hidden = jnp.take_along_axis(out.hidden, before[:, :, None], axis=1)
    return token_logprobs(model, hidden, batch.tokens, temperature), out.aux


@jax.jit
def summary_of(updates: list[dict[str, jax.Array]], counted: jax.Array) -> dict[str, jax.Array]:
    """Means over the updates of one batch that a token counts in, 1 in `counted`; of what compares
    sampler and trainer the first, when both may hold the same weights; of "max" the largest.
    """
    summary = {}
    shares = counted / jnp.maximum(counted.sum(), 1)
    for name in updates[0]:
        each = jnp.stack([u[name] for u in updates])
        largest, first = name.endswith("/max"), name.startswith("probability/")
        # Also of those that do not count a NaN shows.
        summary[name] = each[0] if first else each.max() if largest else (shares * each).sum()
    return summary | {"updates": counted.sum()}


def _reached(metrics: Scalars, *, target: float) -> bool:
    """Whether the step's evaluation, if it had one, reached the target."""
    return float(metrics.get("eval/accuracy", 0.0)) >= target
