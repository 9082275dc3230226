"""What to look at while a run goes on: metrics of a batch, transcripts, and when to stop it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.tokenizer import Tokenizer
from train.cispo_config import AlertsConfig
from train.data.reasoning import ReasoningProblems
from train.distributed import is_primary
from train.rollout import Group, passed, texts_of

# Groups of a batch, and held-out problems, of which transcripts are kept.
_TRANSCRIBED, _EVALUATED = 2, 32


def rollout_metrics(
    groups: Sequence[Group], taken: Sequence[Group], version: int
) -> dict[str, float]:
    """Of all sampled groups: rewards by component, pass rate by task, lengths, why they ended, the
    sampler's entropy, staleness.

    Args:
      groups: All that were sampled since the batch before; in the asynchronous mode there may be
        none, and then nothing is told of them.
      taken: Those that are trained on.
      version: Batches trained on before.
    """
    stale = np.concatenate([version - g.versions[_drawn(g)] for g in taken])
    metrics = {
        "tokens_sampled": float(sum(g.lengths.sum() for g in groups)),
        "tokens_trained": float(sum(g.lengths.sum() for g in taken)),
        "batch_full": float(np.mean([g.has_signal for g in taken])),
        "groups_sampled": float(len(groups)),
        "staleness/mean": float(stale.mean()),
        "staleness/max": float(stale.max()),
    }
    return metrics | _sample_metrics(groups) if groups else metrics


def _sample_metrics(groups: Sequence[Group]) -> dict[str, float]:
    rewards = np.concatenate([g.rewards for g in groups])
    lengths = np.concatenate([g.lengths for g in groups])
    reasons = [reason for g in groups for reason in g.reasons]
    metrics = {
        "reward": float(rewards.mean()),
        "groups_kept": float(np.mean([g.has_signal for g in groups])),
        "length": float(lengths.mean()),
        "length/p99": float(np.percentile(lengths, 99)),
        "truncated": reasons.count("length") / len(reasons),
        "repetition_halts": reasons.count("repetition") / len(reasons),
        "interrupted": float(np.mean([g.forced.any(1).mean() for g in groups])),
        "verifier_failures": float(sum(g.failures for g in groups)),
        "entropy": entropy(groups),
    }
    for name in sorted({name for g in groups for name in g.components}):
        values = [g.components[name] for g in groups if name in g.components]
        metrics[f"reward/{name}"] = float(np.concatenate(values).mean())
    return metrics


def _drawn(group: Group) -> np.ndarray:
    """Which places hold tokens that the sampler drew [G, T]."""
    place = np.arange(group.tokens.shape[1])[None]
    return (place < group.lengths[:, None]) & ~group.forced


def entropy(groups: Sequence[Group]) -> float:
    """Mean -log π of the drawn tokens, nats: an unbiased estimate of the sampler's entropy."""
    return float(-np.concatenate([g.behaviour[_drawn(g)] for g in groups]).mean())


def task_rates(groups: Sequence[Group], problems: ReasoningProblems) -> dict[str, float]:
    """The pass rate of each task in a batch."""
    by_task: dict[str, list[np.ndarray]] = {}
    for group in groups:
        by_task.setdefault(problems[group.problem].task, []).append(passed(group))
    return {task: float(np.concatenate(x).mean()) for task, x in sorted(by_task.items())}


class Health:
    """Notices when a run is ill.

    Args:
      cfg: Thresholds.
    """

    def __init__(self, cfg: AlertsConfig) -> None:
        self._cfg = cfg
        self._streaks: dict[str, int] = {}

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """What is wrong after a step, as a message for the user; None if nothing is.

        Args:
          step: Its number, from 1.
          metrics: Its values.
        """
        broken = sorted(k for k, x in metrics.items() if not math.isfinite(x))
        if broken:
            return (
                f"{', '.join(broken)} is not finite at step {step}; updates with such gradients "
                "were left out. Lower optimizer.learning_rate, or look at the transcripts"
            )
        for name, (wrong, advice) in self._illnesses(metrics).items():
            self._streaks[name] = self._streaks.get(name, 0) + 1 if wrong else 0
            if self._streaks[name] >= self._cfg.patience and step > self._cfg.after:
                return f"{name} is {metrics[name]:.4g} at step {step}; {advice}"
        return None

    def _illnesses(self, metrics: Mapping[str, float]) -> dict[str, tuple[bool, str]]:
        """Whether each watched value is beyond its threshold, and what to do about it."""
        cfg = self._cfg
        watched = {
            "entropy": (-1, cfg.min_entropy, "alerts.min_entropy", "the policy has collapsed"),
            "grad_norm": (1, cfg.max_grad_norm, "alerts.max_grad_norm", "gradients blow up"),
            "probability/correlation": (
                *(-1, cfg.min_correlation, "alerts.min_correlation"),
                "sampler and trainer compute different things",
            ),
            "truncated": (1, cfg.max_truncated, "alerts.max_truncated", "answers do not end"),
        }
        return {
            name: (
                sign * (metrics[name] - limit) > 0,
                f"{key} is {limit:g}: {what}. Go on from an earlier checkpoint with a lower "
                "optimizer.learning_rate, or change the threshold",
            )
            for name, (sign, limit, key, what) in watched.items()
            if limit and name in metrics
        }


class Transcripts:
    """Samples of each step as lines of `transcripts.jsonl`, of several processes by the first.

    Args:
      workdir: Folder of the job.
      start: Step that the job goes on from; lines of later ones, which a killed run wrote, are
        taken out, at 0 all.
    """

    def __init__(self, workdir: Path, start: int) -> None:
        self._path = path = workdir / "transcripts.jsonl"
        if not is_primary():
            return
        kept = [x for x in read_transcripts(workdir) if 0 < start >= x["step"]]
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(x) + "\n" for x in kept))
        os.replace(replacement, path)

    def write(
        self,
        step: int,
        kind: str,
        groups: Sequence[Group],
        problems: ReasoningProblems,
        tokenizer: Tokenizer,
    ) -> None:
        """Writes the best and the worst sample of the first groups, or of all for kind "held-out".

        Args:
          step: Of the job.
          kind: "training" or "held-out".
          groups: Scored.
          problems: What they count in.
          tokenizer: For the texts.
        """
        if not is_primary():
            return
        some = groups[: _EVALUATED if kind == "held-out" else _TRANSCRIBED]
        with self._path.open("a") as file:
            for group in some:
                for record in _records(group, problems, tokenizer):
                    file.write(json.dumps({"step": step, "kind": kind, **record}) + "\n")


def _records(
    group: Group, problems: ReasoningProblems, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    problem, texts = problems[group.problem], texts_of(group, tokenizer)
    for i in dict.fromkeys([int(group.rewards.argmax()), int(group.rewards.argmin())]):
        yield {
            "number": group.number,
            "task": problem.task,
            "question": problem.question,
            "answer": str(problem.answer),
            "text": texts[i],
            "reward": float(group.rewards[i]),
            "components": {name: float(x[i]) for name, x in group.components.items()},
            "tokens": int(group.lengths[i]),
            "ended": group.reasons[i],
        }


def read_transcripts(workdir: Path) -> list[dict[str, Any]]:
    """The lines of transcripts.jsonl so far; one cut short by a kill is dropped."""
    path = workdir / "transcripts.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
