"""Typed job configuration: a py-config's plain values in, frozen dataclasses out.

`configs/*.py:get_config()` returns an `ml_collections.ConfigDict`; `build` turns it into a
`JobConfig`. A key that no dataclass has is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax.config import ConfigError, ModelConfig
from mmjax.model import REMAT
from mmjax.sharding import DEFAULT_RULES, ShardingError, ShardingRules

# Spelled out here, so that a wrong config is answered without importing JAX's losses.
NORMALISERS = ("group_tokens", "tokens", "sample", "prompt", "max_tokens")
SCALES = ("group", "batch", "none")
_PRESETS = ("tiny", "minimax_text_01", "minimax_m1", "minimax_vl_01")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as M1 uses it, with warm-up and decay.

    Attributes:
      learning_rate: Peak.
      warmup_steps: Updates of linear warm-up from zero.
      decay: "constant", "cosine", "linear" or "exponential", after the warm-up.
      decay_steps: Updates from the end of the warm-up to the final rate; 0 for all that are left.
      final_ratio: Final rate over peak.
      b1, b2, eps, weight_decay: AdamW's. M1 found gradients of 1e-18 to 1e-5, hence eps 1e-15.
      clip_norm: Largest global gradient norm; 0 for no clipping.

    Source: MiniMax-M1 report, section 3.2; MiniMax-01, section 4.2.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 0
    decay: str = "constant"
    decay_steps: int = 0
    final_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a pretrain or sft job reads.

    Attributes:
      source: "text" (files of plain text or JSONL), or "reasoning" (worked solutions of `tasks`).
      paths: For "text": files, or glob patterns.
      tasks: For "reasoning" and cispo: tasks as docs/rewards.md names them.
      size: For "reasoning": problems to draw from.
      direct_share: For "reasoning": share of the solutions that answer without thinking, so that
        reinforcement has to find out which way pays.
      sequence_length: T, tokens a packed row.
      batch_size: B, packed rows an update.
      streams: Independent streams that fill a batch, each with every S-th document and its share
        of the rows. Processes share the reading of them; the batches do not depend on the number
        of processes, but on this. A multiple of the processes leaves no document read twice.
      tokenizer: Folder with a tokenizer.json; empty for a character tokenizer made from the data.
    """

    source: str = "text"
    paths: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    size: int = 20000
    direct_share: float = 0.0
    sequence_length: int = 256
    batch_size: int = 8
    streams: int = 1
    tokenizer: str = ""


@dataclasses.dataclass(frozen=True)
class CispoConfig:
    """The policy loss, the batches that it is taken over, and their evaluation.

    Attributes:
      algorithm: "cispo", or for comparison "grpo", "dapo", "dr_grpo", "gspo"; see
        `train.policy_losses`.
      prompts_per_batch: N, groups of each rollout batch.
      samples_per_prompt: G, completions of each prompt.
      updates_per_batch: Off-policy updates on one rollout batch (M1: 16).
      max_prompt_tokens: Longest prompt; longer ones are an error.
      max_new_tokens: Longest completion.
      temperature: Of the sampler.
      is_weight_cap: cispo's absolute upper bound of the importance weight, 1 + ε_high of eq. 5.
      is_weight_floor: cispo's absolute lower bound; 0, as in the paper, is none.
      trust_low, trust_high: cispo's unified mask, ε_low and ε_high of the paper's eq. 7; both or
        none.
      clip_low, clip_high: ε of the other algorithms, relative to 1; None for the published ones.
      anchor: What the ratio is taken to: "behaviour", the sampler when it drew the token, or
        "proximal", the trainer's policy before the batch's first update.
      correction_cap: With anchor "proximal", cap of the factor π_proximal / π_behaviour; 0 for no
        such factor.
      normaliser: How tokens are averaged, see `train.policy_losses.normalise`; empty for the
        algorithm's own.
      advantage_scale: "group", "batch" or "none", see `train.advantages`; empty for the
        algorithm's own.
      length_buckets: Widths that batches are padded to, even shares of max_new_tokens; each is
        compiled once.
      eval_every: Rollout batches between evaluations; 0 for only at the start and the end.
      eval_problems: Held-out problems.
      target_accuracy: Stop early once an evaluation reaches it; above 1 never.

    Source: MiniMax-M1 report, section 3.1.
    """

    algorithm: str = "cispo"
    prompts_per_batch: int = 32
    samples_per_prompt: int = 16
    updates_per_batch: int = 4
    max_prompt_tokens: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    is_weight_cap: float = 5.0
    is_weight_floor: float = 0.0
    trust_low: float | None = None
    trust_high: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    anchor: str = "behaviour"
    correction_cap: float = 0.0
    normaliser: str = ""
    advantage_scale: str = ""
    length_buckets: int = 1
    eval_every: int = 10
    eval_problems: int = 256
    target_accuracy: float = 2.0

    @property
    def loss(self) -> Algorithm:
        """The algorithm's published choices, with those of this config in their place."""
        own = ALGORITHMS[self.algorithm]
        return Algorithm(
            self.normaliser or own.normaliser,
            self.advantage_scale or own.advantage_scale,
            own.clip_low if self.clip_low is None else self.clip_low,
            own.clip_high if self.clip_high is None else self.clip_high,
        )


class Algorithm(typing.NamedTuple):
    """Choices beside the terms of a policy loss."""

    normaliser: str
    advantage_scale: str
    clip_low: float = 0.0
    clip_high: float = 0.0


# As their papers have them; `train.policy_losses` names the papers.
ALGORITHMS = {
    "cispo": Algorithm("group_tokens", "group"),
    "grpo": Algorithm("sample", "group", 0.2, 0.2),
    "dapo": Algorithm("group_tokens", "group", 0.2, 0.28),
    "dr_grpo": Algorithm("max_tokens", "none", 0.2, 0.2),
    "gspo": Algorithm("sample", "group", 3e-4, 4e-4),
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Which completions make a batch, and when one is ended or its reward lessened.

    Attributes:
      rounds: Most rounds of sampling for one batch: groups without a signal are replaced by new
        ones until the batch is full (dynamic sampling). 1 takes the first round as it comes. A
        batch that stays short of groups is filled up with some that have no signal, and says so.
      overlong_tokens: Length of the last stretch before the limit in which the reward falls
        linearly, 0 for none.
      overlong_penalty: What a completion at the limit loses.
      thinking_budget: Tokens after which an open thinking part is closed by force; 0 for never. The
        forced tokens do not count in the loss.
      repetition_tokens: Ends a completion after so many tokens in a row that were each likelier
        than repetition_probability (M1: 3,000 and 0.99); 0 for never.
      repetition_probability: See above.
      retire_pass_rate: Prompts that passed at least so often are not drawn again
        (no-positive-resampling, ScaleRL: 0.9); above 1 for none.
      retire_after: Samples of a prompt before it can be retired.
      slots: Samples that run at a time; 0 for those of a batch, 512 at most.
      windows: Stages of the longest completion, ascending, instead of max_new_tokens alone, which
        must be the last of them (M1: 40K to 80K in six).
      window_share: A stage ends when the 99th percentile of lengths is at least this share of it,
      window_tolerance: and the mean perplexity of the last `window_steps` batches differs from that
        of as many before by less than this share.
      window_steps: See above.

    Source: MiniMax-M1 report, sections 3.2 and 4.2; DAPO (arXiv 2503.14476), sections 3.2 and 3.4;
    ScaleRL (arXiv 2510.13786).
    """

    rounds: int = 1
    overlong_tokens: int = 0
    overlong_penalty: float = 1.0
    thinking_budget: int = 0
    repetition_tokens: int = 3000
    repetition_probability: float = 0.99
    retire_pass_rate: float = 2.0
    retire_after: int = 16
    slots: int = 0
    windows: tuple[int, ...] = ()
    window_share: float = 0.9
    window_tolerance: float = 0.02
    window_steps: int = 8


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """Which tasks the prompts of a batch come from.

    Attributes:
      adaptive: Draw tasks by p (1 - p) of their running pass rate p, and a little of each; else
        evenly.
      memory: Of the running pass rate, the share of its last value that stays after a batch.
      general_from: Batch at which tasks of the family "general" begin to be mixed in.
      general_full: Batch from which they have their full share.
      general_share: Of the prompts, once all are mixed in.

    Source: MiniMax-M1 report, section 4.1: rule-checked tasks first, general ones mixed in later.
    """

    adaptive: bool = False
    memory: float = 0.8
    general_from: int = 0
    general_full: int = 0
    general_share: float = 0.5


@dataclasses.dataclass(frozen=True)
class AsynchronousConfig:
    """Sampling while training.

    Attributes:
      max_staleness: Batches of updates that weights may have gone on by since the first token of a
        group was drawn, when the group is trained on; 0 is the synchronous mode.
      sampler_devices: The job's last devices, which sample alone while the others train; 0 for the
        same devices in turn.
    """

    max_staleness: int = 0
    sampler_devices: int = 0


@dataclasses.dataclass(frozen=True)
class AlertsConfig:
    """When a run is ill and stops with a checkpoint; a value that is not finite always is.

    Attributes:
      after: Batches before which only that counts.
      min_entropy: Lowest mean entropy of the sampler in nats; 0 for any.
      max_grad_norm: Largest mean norm of a batch's gradients before clipping; 0 for any.
      min_correlation: Lowest correlation of the sampler's and the trainer's probabilities; 0 for
        any.
      max_truncated: Largest share of completions cut off at the limit; 0 for any.
      patience: Batches in a row over a threshold before the run stops.
    """

    after: int = 10
    min_entropy: float = 0.0
    max_grad_norm: float = 0.0
    min_correlation: float = 0.0
    max_truncated: float = 0.0
    patience: int = 3


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """What completions are worth; docs/rewards.md names the tasks.

    Attributes:
      correct_weight: Of the verifier's verdict.
      format_weight: Of thinking that is closed exactly once, with an answer after it.
      allow_unsandboxed: Where there is no sandbox, run models' programs all the same, with what
        this process may do.
      sandbox_python: Interpreter of models' programs; empty for this one or the system's.
      judge_url: Endpoint of the judge, up to /v1; or judge_folder, a model folder to judge with.
      judge_model: Its name at the endpoint.
      judge_key: Environment variable that holds the endpoint's key; empty for none.
      judge_tokens: Most tokens of a judge's reply.

    Source: MiniMax-M1 report, section 3.1.1.
    """

    correct_weight: float = 1.0
    format_weight: float = 0.0
    allow_unsandboxed: bool = False
    sandbox_python: str = ""
    judge_url: str = ""
    judge_folder: str = ""
    judge_model: str = ""
    judge_key: str = ""
    judge_tokens: int = 2048


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many to keep.

    Attributes:
      every: Steps between checkpoints (rollout batches, for cispo).
      keep: Latest checkpoints kept.
      export: Layout of a model folder written at the end, "hf", "hf-native" or "" for none.
    """

    every: int = 50
    keep: int = 2
    export: str = ""


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """One training job.

    Attributes:
      task: "pretrain", "sft" or "cispo".
      steps: Updates; for cispo, rollout batches.
      seed: Of everything random: initial weights, data order, sampling.
      model: Architecture; its vocab_size is raised to the tokenizer's.
      init_from: Model folder or workdir whose parameters (and tokenizer) the job starts from.
      remat: What the backward pass recomputes, see `mmjax.Decoder`: "super_block", "layer", "none".
      mesh: Size of each mesh axis; empty puts all devices on `data`.
      sharding: Where parameters lie otherwise than by default: logical axes to mesh axes, and under
        `tensors` single parameters, see `ShardingRules.from_values`.
      log_every: Steps between lines of metrics.
    """

    task: str
    steps: int
    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig.tiny)
    init_from: str = ""
    remat: str = "super_block"
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sharding: ShardingRules = DEFAULT_RULES
    log_every: int = 1
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    cispo: CispoConfig = dataclasses.field(default_factory=CispoConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)
    asynchronous: AsynchronousConfig = dataclasses.field(default_factory=AsynchronousConfig)
    alerts: AlertsConfig = dataclasses.field(default_factory=AlertsConfig)
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "cispo": CispoConfig,
    "sampling": SamplingConfig,
    "curriculum": CurriculumConfig,
    "asynchronous": AsynchronousConfig,
    "alerts": AlertsConfig,
    "rewards": RewardsConfig,
    "checkpoint": CheckpointConfig,
}
# Read by functions of their own.
_OTHER_SECTIONS = ("model", "mesh", "sharding")


def build(config: ConfigDict) -> JobConfig:
    """Checks a py-config and types it.

    Args:
      config: From `get_config()`, command-line and gin overrides applied.

    Raises:
      ConfigError: unknown keys (with the nearest known one), wrong types, contradictions; all
        at once.
    """
    problems: list[str] = []
    raw = config.to_dict()
    values: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values[name] = _typed(section, _section(raw, name, problems), f"{name}.", problems)
    model = _section(raw, "model", problems)
    mesh = _section(raw, "mesh", problems)
    for axis, size in mesh.items():
        if not isinstance(size, int) or isinstance(size, bool):
            problems.append(f"mesh.{axis} = {size!r} is no int")
    sharding = _sharding(_section(raw, "sharding", problems), problems)
    job = _typed_fields(JobConfig, raw, "", problems, skip=set(_OTHER_SECTIONS) | set(SECTIONS))
    built = _model(model, problems)
    for name in ("task", "steps"):
        if name not in job:
            problems.append(f"{name} is not set")
    if problems or built is None:
        raise ConfigError("job config: " + "; ".join(problems))
    result = JobConfig(**job, **values, model=built, mesh=mesh, sharding=sharding)
    _check(result)
    return result


def _section(raw: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    values = raw.pop(name, None) or {}
    if isinstance(values, Mapping):
        return dict(values)
    problems.append(f"{name} = {values!r} is no section of keys")
    return {}


def _sharding(values: dict[str, Any], problems: list[str]) -> ShardingRules:
    try:
        return ShardingRules.from_values(values)
    except ShardingError as error:
        problems.append(str(error))
        return DEFAULT_RULES


def _model(values: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    preset = values.pop("preset", "tiny")
    if preset not in _PRESETS:
        problems.append(f"model.preset {preset!r} is unknown; known: {', '.join(_PRESETS)}")
        return None
    typed = _typed_fields(ModelConfig, values, "model.", problems, skip={"extra"})
    try:
        return typing.cast(ModelConfig, getattr(ModelConfig, preset)(**typed))
    except ConfigError as error:
        problems.append(str(error))
        return None


def _typed(section: type, raw: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    return section(**_typed_fields(section, raw, prefix, problems))


def _typed_fields(
    section: type,
    raw: dict[str, Any],
    prefix: str,
    problems: list[str],
    skip: set[str] | frozenset[str] = frozenset(),
) -> dict[str, Any]:
    hints = {k: v for k, v in typing.get_type_hints(section).items() if k not in skip}
    typed = {}
    for key, value in raw.items():
        if key not in hints:
            problems.append(f"unknown key {prefix}{key}{_nearest(key, prefix, hints)}")
            continue
        cast, ok = _coerce(value, hints[key])
        if not ok:
            name = getattr(hints[key], "__name__", str(hints[key]))
            problems.append(f"{prefix}{key} = {value!r} is no {name}")
            continue
        typed[key] = cast
    return typed


def _nearest(key: str, prefix: str, hints: Mapping[str, Any]) -> str:
    candidates = list(hints) + ([*SECTIONS, *_OTHER_SECTIONS] if not prefix else [])
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _coerce(value: Any, hint: Any) -> tuple[Any, bool]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        return value, type(None) in options
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            ok = isinstance(value, list | tuple) and all(isinstance(v, item) for v in value)
            return tuple(value) if ok else value, ok
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value), True
    if isinstance(value, bool):
        return value, bool in options
    return value, isinstance(value, options)


def _check(job: JobConfig) -> None:
    problems = []
    choices = {
        "task": (job.task, ("pretrain", "sft", "cispo")),
        "remat": (job.remat, REMAT),
        "data.source": (job.data.source, ("text", "reasoning")),
        "optimizer.decay": (job.optimizer.decay, ("constant", "cosine", "linear", "exponential")),
        "cispo.algorithm": (job.cispo.algorithm, tuple(ALGORITHMS)),
        "cispo.anchor": (job.cispo.anchor, ("behaviour", "proximal")),
        "cispo.normaliser": (job.cispo.normaliser, ("", *NORMALISERS)),
        "cispo.advantage_scale": (job.cispo.advantage_scale, ("", *SCALES)),
        "checkpoint.export": (job.checkpoint.export, ("", "hf", "hf-native")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            problems.append(f"{name} = {value!r}; known: {', '.join(map(repr, known))}")
    positive = {
        "steps": job.steps,
        "data.batch_size": job.data.batch_size,
        "data.sequence_length": job.data.sequence_length,
        "data.streams": job.data.streams,
        "checkpoint.every": job.checkpoint.every,
        "checkpoint.keep": job.checkpoint.keep,
        "log_every": job.log_every,
        **{
            f"cispo.{name}": getattr(job.cispo, name)
            for name in [
                "prompts_per_batch",
                "samples_per_prompt",
                "updates_per_batch",
                "max_prompt_tokens",
                "max_new_tokens",
                "is_weight_cap",
                "length_buckets",
                "temperature",
            ]
        },
        "sampling.rounds": job.sampling.rounds,
        "sampling.window_steps": job.sampling.window_steps,
        "alerts.patience": job.alerts.patience,
    }
    problems += [f"{n} must be positive, got {v}" for n, v in positive.items() if not v > 0]
    if job.task == "cispo" and not problems:
        problems += [*_batch_problems(job), *_loss_problems(job), *_sampling_problems(job)]
    if job.data.streams > 0 and job.data.batch_size % job.data.streams:
        problems.append(
            f"data.batch_size {job.data.batch_size} is no multiple of data.streams "
            f"{job.data.streams}; every stream fills whole rows"
        )
    if job.data.source == "text" and job.task != "cispo" and not job.data.paths:
        problems.append("data.source is 'text' but data.paths is empty")
    if (job.data.source == "reasoning" or job.task == "cispo") and not job.data.tasks:
        problems.append("data.tasks is empty; name at least one reasoning task")
    if problems:
        raise ConfigError("job config: " + "; ".join(problems))


def _batch_problems(job: JobConfig) -> list[str]:
    rl, problems = job.cispo, []
    if rl.prompts_per_batch % rl.updates_per_batch:
        problems.append(
            f"cispo.prompts_per_batch {rl.prompts_per_batch} is no multiple of "
            f"cispo.updates_per_batch {rl.updates_per_batch}; an update takes whole groups"
        )
    if rl.samples_per_prompt < 2:
        problems.append(
            "cispo.samples_per_prompt 1 leaves no group to compare a sample with; take at least 2"
        )
    return problems


def _loss_problems(job: JobConfig) -> list[str]:
    """Combinations that contradict themselves, each with the reason."""
    rl = job.cispo
    return _cispo_problems(rl) if rl.algorithm == "cispo" else _clip_problems(rl)


def _cispo_problems(rl: CispoConfig) -> list[str]:
    cap, trust = rl.is_weight_cap, (rl.trust_low, rl.trust_high)
    return _anchor_problems(rl) + _told(
        (
            cap <= 1,
            f"cispo.is_weight_cap {cap} is absolute, 1 + ε: at most 1 it would bind tokens that "
            f"have not moved; for ε = {cap} write {1 + cap}",
        ),
        (
            not 0 <= rl.is_weight_floor <= 1,
            f"cispo.is_weight_floor {rl.is_weight_floor} must be in [0, 1], where tokens that have "
            "not moved are not bound",
        ),
        (
            trust.count(None) == 1 or any(t is not None and t <= 0 for t in trust),
            f"cispo.trust_low and trust_high are {trust}; they are the two sides of one mask: set "
            "both to positive values, or none",
        ),
        (
            (rl.clip_low, rl.clip_high) != (None, None),
            "cispo.clip_low and clip_high belong to the other algorithms; cispo is bounded by "
            "is_weight_cap",
        ),
    )


def _clip_problems(rl: CispoConfig) -> list[str]:
    name, loss, own = rl.algorithm, rl.loss, CispoConfig()
    bounds = f"cispo.clip_low {loss.clip_low} and clip_high {loss.clip_high}"
    ours = (rl.is_weight_cap, rl.is_weight_floor, rl.trust_low, rl.trust_high)
    return _anchor_problems(rl) + _told(
        (
            ours != (own.is_weight_cap, own.is_weight_floor, own.trust_low, own.trust_high),
            f"{name} clips the update by cispo.clip_low and clip_high; is_weight_cap, "
            "is_weight_floor, trust_low and trust_high are cispo's",
        ),
        (
            not (0 < loss.clip_low < 1 and loss.clip_high > 0),
            f"{name} with {bounds}: low must be in (0, 1), high positive",
        ),
        (
            name in ("grpo", "dr_grpo") and loss.clip_low != loss.clip_high,
            f"{name} has one ε, but {bounds} are two; that makes dapo",
        ),
        (
            name == "dr_grpo" and loss[:2] != ALGORITHMS[name][:2],
            "dr_grpo is grpo without the scale and without a sample's length; with advantage_scale "
            f"{loss.advantage_scale!r} and normaliser {loss.normaliser!r} it is another algorithm",
        ),
        (
            name == "gspo" and loss.normaliser != "sample",
            f"gspo's term is a sample's, and normaliser {loss.normaliser!r} would weigh samples by "
            "their length; leave it 'sample'",
        ),
    )


def _anchor_problems(rl: CispoConfig) -> list[str]:
    return _told(
        (
            rl.anchor == "proximal" and rl.updates_per_batch == 1,
            "cispo.anchor 'proximal' with one update a batch makes every ratio 1, and no bound "
            "ever binds; take 'behaviour' or more cispo.updates_per_batch",
        ),
        (
            rl.correction_cap > 0 and rl.anchor == "behaviour",
            f"cispo.correction_cap {rl.correction_cap} corrects for the sampler, which the ratio "
            "to anchor 'behaviour' does already; set it to 0, or anchor to 'proximal'",
        ),
    )


def _sampling_problems(job: JobConfig) -> list[str]:
    sampling, mode = job.sampling, job.asynchronous
    stages = sampling.windows or (job.cispo.max_new_tokens,)
    return _told(
        (
            list(stages) != sorted(set(stages)) or stages[-1] != job.cispo.max_new_tokens,
            f"sampling.windows {stages} must ascend and end with cispo.max_new_tokens "
            f"{job.cispo.max_new_tokens}",
        ),
        (
            not 0 <= sampling.overlong_tokens < stages[0],
            f"sampling.overlong_tokens {sampling.overlong_tokens} must be less than the shortest "
            f"limit, {stages[0]}",
        ),
        (
            not 0 <= sampling.thinking_budget < stages[0],
            f"sampling.thinking_budget {sampling.thinking_budget} leaves no token of {stages[0]} "
            "for an answer",
        ),
        (
            not 0 < sampling.repetition_probability < 1,
            "sampling.repetition_probability must be in (0, 1), got "
            f"{sampling.repetition_probability}",
        ),
        (
            mode.sampler_devices > 0 and mode.max_staleness < 1,
            "asynchronous.sampler_devices sample while the others train, which is asynchronous; "
            "set asynchronous.max_staleness to at least 1",
        ),
    )


def _told(*cases: tuple[bool, str]) -> list[str]:
    """The texts of the cases that are so."""
    return [text for so, text in cases if so]
