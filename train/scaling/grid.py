"""The runs of a grid: every kind of attention at every size, each an ordinary pretrain job."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mmjax.config import LIGHTNING, SOFTMAX, ConfigError
from mmjax.plan.counts import active_parameters
from train.config import JobConfig, build
from train.job import Job
from train.metrics import read_metrics
from train.scaling.laws import LEAST_POINTS, PFLOPS_DAY, Point, train_flops_per_token
from train.tasks import run_task

_KINDS = ("softmax", "lightning", "hybrid")
# Beside each run, the config that it is of.
_CONFIG = "config.json"
_KEYS = ("job", "kinds", "sizes", "every")


@dataclasses.dataclass(frozen=True)
class Run:
    """One job of the grid: its kind of attention, the name of its size, its config."""

    kind: str
    size: str
    cfg: JobConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-{self.size}"


def runs_of(config: ConfigDict) -> list[Run]:
    """Every kind at every size.

    Args:
      config: `job`, a pretrain job with evaluation.paths; `kinds`, of which "hybrid" has a softmax
        layer after every `every` - 1 lightning layers; `sizes`, name to keys of the model.

    Raises:
      ConfigError: an unknown key or kind, or a job that measures no held-out loss.
    """
    raw = config.to_dict()
    unknown = sorted(set(raw) - set(_KEYS))
    missing = [key for key in _KEYS if key not in raw]
    if unknown or missing:
        raise ConfigError(
            f"scaling config: unknown {unknown}, missing {missing}; keys: {', '.join(_KEYS)}"
        )
    wrong = sorted(set(raw["kinds"]) - set(_KINDS))
    if wrong or not raw["kinds"] or not raw["sizes"]:
        raise ConfigError(f"scaling config: kinds {raw['kinds']!r} are to be of {_KINDS}")
    sizes = raw["sizes"].items()
    runs = [_run(raw, kind, size, keys) for kind in raw["kinds"] for size, keys in sizes]
    job = runs[0].cfg
    if job.task != "pretrain" or not job.evaluation.every or not job.evaluation.paths:
        raise ConfigError(
            "scaling config: job needs the task 'pretrain', evaluation.every and evaluation.paths, "
            "whose loss is what the laws are about"
        )
    if (points := len(sizes) * math.ceil(job.steps / job.evaluation.every)) < LEAST_POINTS:
        raise ConfigError(
            f"scaling config: a law needs {LEAST_POINTS} points, {len(sizes)} sizes with "
            f"evaluation.every {job.evaluation.every} in {job.steps} steps give {points}"
        )
    return runs


def _run(raw: Mapping[str, Any], kind: str, size: str, keys: Mapping[str, Any]) -> Run:
    config = ConfigDict(raw["job"])
    config.model = ConfigDict({**raw["job"].get("model", {}), **keys})
    layers = range(1, int(config.model.num_layers) + 1)
    softmax = {
        "softmax": set(layers),
        "lightning": set(),
        "hybrid": {i for i in layers if i % raw["every"] == 0},
    }[kind]
    config.model.layer_types = tuple(SOFTMAX if i in softmax else LIGHTNING for i in layers)
    return Run(kind, size, build(config))


def do(run: Run, workdir: Path) -> Job | None:
    """Runs or resumes a run; None for one that was finished before.

    Args:
      run: Of the grid.
      workdir: Of the grid.
    """
    folder = workdir / run.name
    done = read_metrics(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(_flat(run.cfg), indent=1) + "\n")
    if done and done[-1]["step"] >= run.cfg.steps and "eval/loss" in done[-1]:
        return None
    return run_task(run.cfg, folder)


def check_kept(runs: Sequence[Run], workdir: Path) -> None:
    """Raises ConfigError where folders hold runs of other configs than these."""
    for run in runs:
        folder = workdir / run.name
        if not read_metrics(folder):
            continue
        config, file = _flat(run.cfg), folder / _CONFIG
        kept = json.loads(file.read_text()) if file.exists() else {}
        other = sorted(k for k in {**config, **kept} if config.get(k) != kept.get(k))
        if other:
            told = "; ".join(f"{k} was {kept.get(k)!r}, is {config.get(k)!r}" for k in other[:3])
            raise ConfigError(
                f"{folder} holds a run of another config ({len(other)} keys differ: {told}); take "
                "another workdir, or remove that folder"
            )


def _flat(cfg: JobConfig) -> dict[str, Any]:
    """As JSON brings it back, by dotted keys."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(cfg)))
    return dict(flatten_dict(values, sep="."))


def points_of(run: Run, workdir: Path) -> Iterator[Point]:
    """What a run's evaluations say.

    Compute counts products of every place in a row, padding too, forward and backward, attention
    and LM head included, the embedding's lookup not.
    """
    cfg = run.cfg
    each = train_flops_per_token(cfg.model, cfg.data.sequence_length)
    _, _, parameters = active_parameters(cfg.model)
    for record in read_metrics(workdir / run.name):
        if "eval/loss" in record:
            tokens = int(record["step"]) * cfg.data.batch_size * cfg.data.sequence_length
            compute = each * tokens / PFLOPS_DAY
            yield Point(run.name, compute, parameters, tokens, record["eval/loss"])
