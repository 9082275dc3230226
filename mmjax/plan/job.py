"""What is planned: a model, a job and its sizes, read from a config file, a folder or a preset."""

from __future__ import annotations

import dataclasses
import difflib
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.config import ConfigError, ModelConfig
from mmjax.model import REMAT
from mmjax.plan.chips import PlanError
from mmjax.sharding import DEFAULT_RULES, ShardingRules

JOBS = ("train", "prefill", "decode")
PRESETS = ("minimax_m1", "minimax_text_01", "minimax_vl_01", "tiny")


@dataclasses.dataclass(frozen=True)
class Job:
    """One step of one job.

    Attributes:
      kind: "train": forward, backward and AdamW on batch · length tokens; "prefill": `batch`
        prompts of `length` tokens into a cache; "decode": one token for each of `batch` rows that
        have `length` tokens behind them.
      model: The architecture.
      batch: Rows.
      length: Tokens of a row.
      remat: What a train step recomputes, see `mmjax.Decoder`.
      moments: dtype of AdamW's two moments; empty for the parameters' own.
      sharding: How parameters lie while they are trained; to serve they lie by `SERVING_RULES`.
    """

    kind: str
    model: ModelConfig
    batch: int
    length: int
    remat: str = "super_block"
    moments: str = ""
    sharding: ShardingRules = DEFAULT_RULES

    def __post_init__(self) -> None:
        choices = {
            "job": (self.kind, JOBS),
            "remat": (self.remat, REMAT),
            "moments": (self.moments, ("", "float32", "bfloat16")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise PlanError(f"{name} {value!r} is unknown; known: {', '.join(known)}")
        if self.batch < 1 or self.length < 1:
            raise PlanError(f"batch {self.batch} and length {self.length} must be at least 1")
        limit = self.model.max_position_embeddings
        if self.length > limit:
            raise PlanError(f"length {self.length} is beyond the model's {limit} positions")

    @property
    def new_tokens(self) -> int:
        """Tokens that one step takes in, of all rows."""
        return self.batch * (1 if self.kind == "decode" else self.length)

    @property
    def moments_dtype(self) -> str:
        """dtype of the moments, never empty."""
        return self.moments or self.model.param_dtype


@dataclasses.dataclass(frozen=True)
class Request:
    """What a config says about a plan; None and empty where it says nothing."""

    model: ModelConfig
    batch: int | None = None
    length: int | None = None
    remat: str = "super_block"
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sharding: ShardingRules = DEFAULT_RULES


def read_request(source: str) -> Request:
    """Reads `configs/NAME.py[:STAGE]`, a model folder with a config.json, or a preset's name.

    A .py file is executed and its `get_config(stage)` asked, as the trainer does; of what it
    returns only the model, the row sizes, the remat policy, the mesh and the sharding are used.

    Raises:
      PlanError: there is no such file, folder or preset, or the file cannot be run.
      ConfigError: it describes no model.
      ShardingError: its `sharding` is wrong.
    """
    if source in PRESETS:
        return Request(_text_half(getattr(ModelConfig, source)()))
    path, _, stage = source.partition(":")
    if path.endswith(".py"):
        return _from_values(_run_config(Path(path), stage), source)
    if Path(source).exists():
        return Request(_text_half(ModelConfig.from_hf(source)))
    raise PlanError(
        f"{source!r} is no config file (.py), no model folder and no preset; "
        f"presets: {', '.join(PRESETS)}"
    )


def _run_config(path: Path, stage: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise PlanError(f"{path} does not exist")
    try:
        get_config = runpy.run_path(str(path))["get_config"]
    except ModuleNotFoundError as error:
        raise PlanError(
            f"{path} imports {error.name}, which is not installed; "
            "`pip install ml_collections`, or name a model folder or a preset instead"
        ) from error
    except KeyError:
        raise PlanError(f"{path} has no get_config()") from None
    try:
        config = get_config(stage) if stage else get_config()
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from error
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _from_values(values: Mapping[str, Any], source: str) -> Request:
    data = values.get("data") or {}
    return Request(
        model=_model(dict(values.get("model") or {}), source),
        batch=data.get("batch_size"),
        length=data.get("sequence_length"),
        remat=values.get("remat", "super_block"),
        mesh=dict(values.get("mesh") or {}),
        sharding=ShardingRules.from_values(values.get("sharding") or {}),
    )


def _model(values: dict[str, Any], source: str) -> ModelConfig:
    preset = values.pop("preset", "tiny")
    if preset not in PRESETS:
        raise ConfigError(f"{source}: unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ConfigError(f"{source}: unknown key model.{key}; did you mean model.{near}?")
    config = _text_half(getattr(ModelConfig, preset)(**values))
    return config


def _text_half(config: ModelConfig) -> ModelConfig:
    """What is planned: a vision tower is a thousandth of VL-01."""
    return dataclasses.replace(config, vision=None)
