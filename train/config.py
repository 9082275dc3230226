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

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mmjax.config import ConfigError, ModelConfig
from mmjax.model import REMAT
from mmjax.sharding import DEFAULT_RULES, ShardingError, ShardingRules
from mmjax.vision import VisionConfig
from train import stages
from train.bounds import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Bounds, outside
from train.cispo_config import (
    ALGORITHMS,
    NORMALISERS,
    SCALES,
    AlertsConfig,
    AsynchronousConfig,
    CispoConfig,
    CurriculumConfig,
    SamplingConfig,
    contradictions,
)
from train.cispo_config import BOUNDS as CISPO_BOUNDS

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
      moments: dtype in which AdamW's moments are kept, "float32" or "bfloat16"; empty for that of
        the parameters.
      rounding: How bfloat16 parameters take updates below their last bit: "nearest" loses them,
        "master" keeps a float32 copy that does not, "stochastic" rounds up or down by chance.
      microbatches: Parts of a batch that go through the model one after the other.
      z_loss: Coefficient of the squared logsumexp of the logits; 0 for none.
      frozen: Patterns of parameters that stay as they are: ("vision.*",) for the vision tower and
        its projector, which jobs without pictures never train.

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
    moments: str = ""
    rounding: str = "nearest"
    microbatches: int = 1
    z_loss: float = 0.0
    frozen: tuple[str, ...] = ()


FORMATS = ("", "jsonl", "text", "parquet", "arrayrecord", "datasets", "stdlib")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture; docs/data.md describes the formats.

    Attributes:
      name: By which metrics and checkpoints know it.
      paths: Files or folders, or glob patterns of them; none for "stdlib".
      format: "jsonl", "text", "parquet", "arrayrecord", "datasets" (a folder of `save_to_disk`),
        "stdlib" (the source of Python's standard library), or "" to go by each path's suffix.
      weight: Share of the tokens, over the sum of all sources' weights; 0 rests.
      kind: "text", all of which is predicted, "chat", of which the assistant's turns are, or
        "preference", two answers of which one is preferred, for dpo.
      field: Of a row; empty for "text", or "messages" of a chat.
      thinking: Of chats and answers: "keep" or "drop" the assistant's.
      encoding: Of text and JSONL files that do not start with a byte order mark.
    """

    name: str
    paths: tuple[str, ...] = ()
    format: str = ""
    weight: float = 1.0
    kind: str = "text"
    field: str = ""
    thinking: str = "keep"
    encoding: str = "utf-8"

    @property
    def column(self) -> str:
        """The field that is read."""
        return self.field or {"chat": "messages", "preference": "chosen"}.get(self.kind, "text")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a pretrain, sft or dpo job reads.

    Attributes:
      source: "text" (the documents and chats of `mixture`), "reasoning" (worked solutions of
        `tasks`), "pictures" (with captions, for sft), or "recall" (synthetic tasks, for sft).
      mixture: For "text": its sources, and the share of each.
      paths: For "text": short for a mixture of one source with these paths. For "pictures": one
        folder, see `train.data.pictures`.
      bad_share: Of the documents read, those that may be malformed; more stop the job.
      tasks: For "reasoning" and cispo: tasks as docs/rewards.md names them. For "recall": those of
        docs/evaluation.md.
      size: For "reasoning": problems to draw from.
      direct_share: For "reasoning": share of the solutions that answer without thinking, so that
        reinforcement has to find out which way pays.
      sequence_length: T, tokens a packed row.
      batch_size: B, packed rows an update.
      streams: Independent streams that fill a batch, each with its own part of every source and
        its share of the rows. Processes share the reading of them; the batches do not depend on
        the number of processes, but on this. A multiple of the processes leaves no document read
        twice.
      prefetch: Batches that each stream has ready in advance.
      tokenizer: Folder with a tokenizer.json; empty for one trained on the data.
      question: For "pictures": what is asked of each.
      tiles_per_row: For "pictures": M, most tiles that the examples of a row have together.
      pairs_per_row: For dpo: P, most pairs of answers in a row; 1 for no packing.
    """

    source: str = "text"
    mixture: tuple[SourceConfig, ...] = ()
    paths: tuple[str, ...] = ()
    bad_share: float = 0.01
    tasks: tuple[str, ...] = ()
    size: int = 20000
    direct_share: float = 0.0
    sequence_length: int = 256
    batch_size: int = 8
    streams: int = 1
    prefetch: int = 2
    tokenizer: str = ""
    question: str = "What is this?"
    tiles_per_row: int = 16
    pairs_per_row: int = 16

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The mixture, or the one source that `paths` is short for."""
        return self.mixture or (SourceConfig("text", self.paths),)


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation, see `train.losses.dpo_loss`.

    Attributes:
      beta: How strongly the policy is held to where it started.
      label_smoothing: Share of the preferences that are thought to be the wrong way round.
      length_normalised: Log-probabilities of an answer are divided by its tokens.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False


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
    """When to save, where, and how many to keep.

    Attributes:
      every: Steps between checkpoints (rollout batches, for cispo).
      keep: Latest checkpoints kept; a damaged one falls back to the one before, so more than one.
      keep_every: Steps between those that are kept for good; 0 for none. A multiple of `every`.
      path: Where they go, a folder or an address that Orbax takes (gs://...); empty for the
        workdir's folder `checkpoints`.
      export: Layout of a model folder written at the end, "hf", "hf-native" or "" for none.
      export_every: Steps between model folders `model-STEP` written on the way; 0 for none.
    """

    every: int = 50
    keep: int = 2
    keep_every: int = 0
    path: str = ""
    export: str = ""
    export_every: int = 0


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What a pretrain or sft job is asked on the way; docs/evaluation.md has the tasks.

    Attributes:
      every: Steps between evaluations, of which the last step has one too; 0 for none.
      tasks: Synthetic tasks, such as "niah(keys=4)".
      lengths: Tokens of a prompt with its answer; empty for data.sequence_length.
      depths: Depths of the needle, evenly from the start of the haystack to its end.
      samples: Of a task at each length and depth.
      paths: Files of held-out text, or glob patterns, for the perplexity by position.
      rows: Stretches of them, each as long as the longest of the lengths where there are such.
    """

    every: int = 0
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    depths: int = 5
    samples: int = 8
    paths: tuple[str, ...] = ()
    rows: int = 64


def check_evaluation(cfg: EvaluationConfig) -> list[str]:
    """What is wrong with the values."""
    wrong = outside("evaluation.", cfg, {POSITIVE: "depths samples rows", NOT_NEGATIVE: "every"})
    return wrong + [
        f"evaluation.lengths[{i}] must be positive, got {length}"
        for i, length in enumerate(cfg.lengths)
        if length < 1
    ]


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """One training job.

    Attributes:
      task: "pretrain", "sft", "dpo" or "cispo".
      steps: Updates; for cispo, rollout batches. With stages they say it.
      stages: Of the job one after the other; empty for one with the job's own settings.
      seed: Of everything random: initial weights, data order, sampling.
      model: Architecture; its vocab_size is raised to the tokenizer's.
      model_keys: Those of `model` that the config sets, "vision.…" for its vision half's.
      init_from: Model folder or workdir whose parameters (and tokenizer) the job starts from. Of
        `model` the keys that the config sets then hold where the parameters leave them open (dtype
        and param_dtype, the folder's otherwise, rope_theta, the coefficients of the routers), and
        must agree where they do not.
      remat: What the backward pass recomputes, see `mmjax.Decoder`: "super_block", "layer",
        "products", "none".
      mesh: Size of each mesh axis; empty puts all devices on `data`.
      sharding: Where parameters lie otherwise than by default: logical axes to mesh axes, and under
        `tensors` single parameters, see `ShardingRules.from_values`.
      log_every: Steps between lines of metrics.
    """

    task: str
    steps: int
    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig.tiny)
    model_keys: tuple[str, ...] = dataclasses.field(default=(), metadata={"key": False})
    init_from: str = ""
    remat: str = "super_block"
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sharding: ShardingRules = DEFAULT_RULES
    log_every: int = 1
    stages: tuple[stages.StageConfig, ...] = ()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    dpo: DpoConfig = dataclasses.field(default_factory=DpoConfig)
    cispo: CispoConfig = dataclasses.field(default_factory=CispoConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)
    asynchronous: AsynchronousConfig = dataclasses.field(default_factory=AsynchronousConfig)
    alerts: AlertsConfig = dataclasses.field(default_factory=AlertsConfig)
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "dpo": DpoConfig,
    "cispo": CispoConfig,
    "sampling": SamplingConfig,
    "curriculum": CurriculumConfig,
    "asynchronous": AsynchronousConfig,
    "alerts": AlertsConfig,
    "rewards": RewardsConfig,
    "checkpoint": CheckpointConfig,
    "evaluation": EvaluationConfig,
}
# What their numbers may be.
BOUNDS: dict[str, Mapping[Bounds, str]] = {
    **CISPO_BOUNDS,
    "data": {
        POSITIVE: "size sequence_length batch_size streams prefetch tiles_per_row pairs_per_row",
        SHARE: "bad_share direct_share",
    },
    "optimizer": {
        POSITIVE: "eps microbatches",
        NOT_NEGATIVE: "learning_rate warmup_steps decay_steps weight_decay clip_norm z_loss",
        SHARE: "final_ratio",
        BELOW_ONE: "b1 b2",
    },
    "dpo": {POSITIVE: "beta", NOT_NEGATIVE: "label_smoothing"},
    "rewards": {POSITIVE: "judge_tokens", NOT_NEGATIVE: "correct_weight format_weight"},
    "checkpoint": {POSITIVE: "every keep", NOT_NEGATIVE: "keep_every export_every"},
}
_JOB_BOUNDS = {POSITIVE: "steps log_every", SEED: "seed"}
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
        problems += outside(f"{name}.", values[name], BOUNDS.get(name, {}))
    model = _section(raw, "model", problems)
    model_keys = tuple(sorted(flatten_dict(model, sep=".").keys() - {"preset"}))
    mesh = _section(raw, "mesh", problems)
    for axis, size in mesh.items():
        if not isinstance(size, int) or isinstance(size, bool):
            problems.append(f"mesh.{axis} = {size!r} is no int")
    sharding = _sharding(_section(raw, "sharding", problems), problems)
    others = {*_OTHER_SECTIONS, *SECTIONS, "model_keys"}
    job = _typed_fields(JobConfig, raw, "", problems, skip=others)
    built = _model(model, problems)
    for stage in job.get("stages", ()):
        problems += outside(f"stage {stage.name!r}: ", stage, stages.BOUNDS)
    if job.get("stages") and not problems:
        found = stages.total_steps(job["stages"], values["data"])
        if job.setdefault("steps", found) != found:
            problems.append(f"steps = {job['steps']}, but the stages have {found}; leave steps out")
    for name in ("task",) if job.get("stages") else ("task", "steps"):
        if name not in job:
            problems.append(f"{name} is not set")
    if problems or built is None:
        raise ConfigError("job config: " + "; ".join(problems))
    result = JobConfig(
        **job, **values, model=built, model_keys=model_keys, mesh=mesh, sharding=sharding
    )
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
    vision = _section(values, "vision", problems)
    typed = _typed_fields(ModelConfig, values, "model.", problems, skip={"extra", "vision"})
    seen = _typed_fields(VisionConfig, vision, "model.vision.", problems, skip={"extra"})
    try:
        if seen:
            typed["vision"] = VisionConfig(**seen)
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
        try:
            cast, ok = _coerce(value, hints[key])
        except ConfigError as error:
            problems.append(f"{prefix}{key}: {error}")
            continue
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
            if not isinstance(value, list | tuple):
                return value, False
            items = [_coerce(v, item) for v in value]
            return tuple(v for v, _ in items), all(ok for _, ok in items)
        if dataclasses.is_dataclass(option):
            return _coerce_section(value, typing.cast(type, option))
        if typing.get_origin(option) is Mapping:
            return _coerce_weights(value)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value), True
    if isinstance(value, bool):
        return value, bool in options
    return value, isinstance(value, options)


def _coerce_section(value: Any, section: type) -> tuple[Any, bool]:
    """An item of a tuple of sections.

    Raises:
      ConfigError: it has unknown keys, lacks one, or has a value of a wrong type.
    """
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        return value, False
    problems: list[str] = []
    typed = _typed_fields(section, dict(value), "its ", problems)
    for field in dataclasses.fields(section):
        needed = dataclasses.MISSING is field.default is field.default_factory
        if needed and field.name not in value:
            problems.append(f"{field.name} is not set in {value!r}")
    if problems:
        raise ConfigError("; ".join(problems))
    return section(**typed), True


def _coerce_weights(value: Any) -> tuple[Any, bool]:
    """A mapping of names to numbers, as floats."""
    if not isinstance(value, Mapping):
        return value, False
    ok = all(isinstance(x, int | float) and not isinstance(x, bool) for x in value.values())
    return {k: float(x) for k, x in value.items()} if ok else value, ok


def _check(job: JobConfig) -> None:
    problems = []
    choices = {
        "task": (job.task, ("pretrain", "sft", "dpo", "cispo")),
        "remat": (job.remat, REMAT),
        "data.source": (job.data.source, ("text", "reasoning", "pictures", "recall")),
        "optimizer.decay": (job.optimizer.decay, stages.DECAYS),
        "optimizer.moments": (job.optimizer.moments, ("", "float32", "bfloat16")),
        "optimizer.rounding": (job.optimizer.rounding, ("nearest", "master", "stochastic")),
        "cispo.algorithm": (job.cispo.algorithm, tuple(ALGORITHMS)),
        "cispo.anchor": (job.cispo.anchor, ("behaviour", "proximal")),
        "cispo.normaliser": (job.cispo.normaliser, ("", *NORMALISERS)),
        "cispo.advantage_scale": (job.cispo.advantage_scale, ("", *SCALES)),
        "checkpoint.export": (job.checkpoint.export, ("", "hf", "hf-native")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            problems.append(f"{name} = {value!r}; known: {', '.join(map(repr, known))}")
    problems += outside("", job, _JOB_BOUNDS)
    if job.optimizer.decay == "exponential" and not job.optimizer.final_ratio:
        problems.append(
            "optimizer.decay 'exponential' never reaches 0; take an optimizer.final_ratio above 0, "
            "or 'linear' or 'cosine'"
        )
    problems += stages.problems(job)
    if job.task != "cispo" and not problems:
        problems += stages.division_problems(job)
    if job.task == "cispo" and not problems:
        problems += contradictions(job.cispo, job.sampling, job.curriculum, job.asynchronous)
        problems += _update_problems(job)
    if job.checkpoint.keep_every % job.checkpoint.every:
        problems.append(
            f"checkpoint.keep_every {job.checkpoint.keep_every} is no multiple of checkpoint.every "
            f"{job.checkpoint.every}"
        )
    if job.checkpoint.export_every and not job.checkpoint.export:
        problems.append("checkpoint.export_every needs checkpoint.export, 'hf' or 'hf-native'")
    if job.data.source == "pictures" and (job.task != "sft" or len(job.data.paths) != 1):
        problems.append(
            f"data.source 'pictures' is for the task sft and one folder in data.paths, got task "
            f"{job.task!r} and {len(job.data.paths)} paths"
        )
    if job.task == "pretrain" and job.data.source in ("reasoning", "recall"):
        problems.append(f"data.source {job.data.source!r} is for sft; pretrain reads 'text'")
    if job.data.source == "text" and job.task != "cispo":
        problems += _mixture_problems(job.data, job.task)
    if job.task == "dpo":
        problems += _dpo_problems(job)
    if (job.data.source in ("reasoning", "recall") or job.task == "cispo") and not job.data.tasks:
        problems.append("data.tasks is empty; name at least one task")
    problems += check_evaluation(job.evaluation)
    if problems:
        raise ConfigError("job config: " + "; ".join(problems))


def _update_problems(job: JobConfig) -> list[str]:
    problems = []
    if not job.rewards.correct_weight and not job.rewards.format_weight:
        problems.append("rewards.correct_weight and format_weight are both 0: nothing is rewarded")
    if job.evaluation.every:
        problems.append(
            f"evaluation.every {job.evaluation.every} is for pretrain and sft; cispo evaluates by "
            "cispo.eval_every on cispo.eval_problems"
        )
    rows, parts = job.cispo.samples_per_update, job.optimizer.microbatches
    if rows % parts:
        problems.append(
            f"optimizer.microbatches {parts} does not divide the {rows} samples of an update "
            "(prompts_per_batch / updates_per_batch * samples_per_prompt)"
        )
    if job.optimizer.z_loss:
        problems.append(f"optimizer.z_loss {job.optimizer.z_loss} is for pretrain and sft")
    return problems


def _dpo_problems(job: JobConfig) -> list[str]:
    problems = []
    if job.data.source != "text":
        problems.append(f"dpo reads data.source 'text', got {job.data.source!r}")
    if job.dpo.label_smoothing >= 0.5:
        problems.append(f"dpo.label_smoothing must be in [0, 0.5), got {job.dpo.label_smoothing}")
    if job.optimizer.z_loss:
        problems.append(f"optimizer.z_loss {job.optimizer.z_loss} is for pretrain and sft")
    return problems


def _mixture_problems(data: DataConfig, task: str) -> list[str]:
    if bool(data.mixture) == bool(data.paths):
        what = "both are set" if data.paths else "data.paths is empty and so is data.mixture"
        return [f"data.source 'text' needs data.mixture or, for short, data.paths: {what}"]
    problems = []
    for source in data.sources:
        choices = {
            "format": (source.format, FORMATS),
            "kind": (source.kind, ("preference",) if task == "dpo" else ("text", "chat")),
            "thinking": (source.thinking, ("keep", "drop")),
        }
        here = f"data.mixture: {source.name!r}:"
        problems += [
            f"{here} {name} = {value!r}; known: {', '.join(map(repr, known))}"
            for name, (value, known) in choices.items()
            if value not in known
        ]
        if bool(source.paths) == (source.format == "stdlib"):
            problems.append(f"{here} paths = {source.paths!r} with format {source.format!r}")
        if source.kind == "preference" and source.field:
            problems.append(f"{here} field {source.field!r}; pairs are in 'chosen' and 'rejected'")
        if not source.weight >= 0:
            problems.append(f"{here} weight must not be negative, got {source.weight}")
    names = [source.name for source in data.sources]
    if len(set(names)) < len(names):
        problems.append(f"data.mixture: two sources of one name among {', '.join(names)}")
    if not any(source.weight > 0 for source in data.sources):
        problems.append("data.mixture: no source has a weight above 0")
    return problems
