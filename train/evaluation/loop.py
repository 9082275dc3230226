"""Evaluation inside a job, every so many steps, and what it writes."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.tokenizer import Tokenizer
from train import distributed
from train.config import EvaluationConfig, JobConfig
from train.evaluation.scoring import Prepared, Scorer
from train.evaluation.suite import Suite
from train.job import Job, Scalars
from train.state import TrainState

type Step = Callable[[TrainState, Any], tuple[TrainState, Scalars]]
# {"tasks": {task: {"lengths", "depths", "samples", "accuracy" [depth][length]}},
#  "text": {"loss", "perplexity", "rows", "by_position": [{"from", "to", "loss", "tokens"}]}}
type Result = dict[str, Any]

FOLDER = "evaluation"


def with_evaluation(job: Job, step: Step) -> Step:
    """The same step; after every `evaluation.every`-th and the last one its metrics hold more.

    Each evaluation also goes to `evaluation/step_N.json` in the workdir, with a heat map beside it.

    Args:
      job: Whose model is evaluated.
      step: Of the job.
    """
    every, suite = job.cfg.evaluation.every, suite_of(job.cfg, job.tokenizer)
    if suite is None:
        return step
    scorer, number = Scorer(job.graphdef, job.mesh), -1

    def evaluated(state: TrainState, item: Any) -> tuple[TrainState, Scalars]:
        nonlocal number, scorer
        number = int(state.step) + 1 if number < 0 else number + 1
        state, metrics = step(state, item)
        if number % every and number != job.cfg.steps:
            return state, metrics
        if scorer.graphdef != job.graphdef:  # The job may have changed the model on the way.
            scorer = Scorer(job.graphdef, job.mesh)
        result = evaluate(suite, scorer, state.params, tokens_at_a_time(job.cfg))
        if distributed.is_primary():
            write(result, job.workdir / FOLDER, f"step_{number:08d}")
        return state, {**metrics, **scalars(result)}

    return evaluated


def suite_of(cfg: JobConfig, tokenizer: Tokenizer) -> Suite | None:
    """What a job evaluates; None for nothing."""
    section = cfg.evaluation
    if not section.every or not (section.tasks or section.paths):
        return None
    lengths = section.lengths or (cfg.data.sequence_length,)
    return _suite(dataclasses.replace(section, lengths=lengths), tokenizer, cfg.task != "pretrain")


@functools.lru_cache(maxsize=1)
def _suite(cfg: EvaluationConfig, tokenizer: Tokenizer, chat: bool) -> Suite:
    return Suite(cfg, tokenizer, chat=chat)


def tokens_at_a_time(cfg: JobConfig) -> int:
    """As many as a training batch has."""
    return cfg.data.batch_size * cfg.data.sequence_length


def evaluate(suite: Suite, scorer: Scorer, params: Any, tokens: int) -> Result:
    """Everything in the suite, in forward passes alone.

    Args:
      suite: What to ask.
      scorer: Of the model.
      params: Its parameters.
      tokens: About as many are computed at a time.
    """
    rights: dict[int, np.ndarray] = {}
    for length in dict.fromkeys(cell.length for cell in suite.cells):
        for task in suite.cfg.tasks:
            # All depths together: they fill batches better.
            some = [i for i, c in enumerate(suite.cells) if (c.task, c.length) == (task, length)]
            pairs = [pair for i in some for pair in suite.cells[i].pairs]
            right = scorer.hits(params, Prepared(pairs, length), tokens)
            rights |= dict(zip(some, np.split(right, len(some)), strict=True))
    shares = [float(np.mean(rights[i])) for i in range(len(suite.cells))]
    result: Result = {"tasks": tables(suite, shares)}
    if suite.texts is not None:
        arrays = (suite.texts.tokens, suite.texts.segments)
        logprobs = scorer.logprobs(params, *arrays, tokens)
        result["text"] = by_position(logprobs, suite.texts.segments)
    return result


def tables(suite: Suite, shares: list[float]) -> dict[str, Any]:
    """For each task, the share of right answers [depth][length]."""
    found = {}
    for task in suite.cfg.tasks:
        cells = [(c, share) for c, share in zip(suite.cells, shares, strict=True) if c.task == task]
        depths = list(dict.fromkeys(c.depth for c, _ in cells))
        rows = [[share for c, share in cells if c.depth == depth] for depth in depths]
        found[task] = {
            "lengths": list(suite.cfg.lengths),
            "depths": depths,
            "samples": len(cells[0][0].samples),
            "accuracy": rows,
        }
    return found


def by_position(logprobs: np.ndarray, segments: np.ndarray) -> dict[str, Any]:
    """Loss (nats a token) and perplexity, and the loss of stretches that double in length.

    Args:
      logprobs: Of each row's tokens but the first [N, T - 1].
      segments: Of the rows [N, T], 0 for padding.
    """
    real = segments[:, 1:] != 0
    stretches, start = [], 0
    while start < logprobs.shape[1]:
        stop = min(max(2 * start, 64), logprobs.shape[1])
        part = real[:, start:stop]
        if part.any():
            loss = float(-logprobs[:, start:stop][part].mean())
            counted = {"from": start + 1, "to": stop, "loss": loss, "tokens": int(part.sum())}
            stretches.append({**counted, "perplexity": math.exp(loss)})
        start = stop
    loss = float(-logprobs[real].mean())
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "rows": len(segments),
        "by_position": stretches,
    }


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """What goes to TensorBoard and metrics.jsonl: for each task and length the mean over depths,
    and the held-out loss.
    """
    found = {}
    for task, table in result["tasks"].items():
        means = np.mean(table["accuracy"], axis=0)
        for length, mean in zip(table["lengths"], means, strict=True):
            found[f"eval/{task}/{length}"] = float(mean)
    if "text" in result:
        found["eval/loss"] = result["text"]["loss"]
        for part in result["text"]["by_position"]:
            found[f"eval/loss/{part['from']}-{part['to']}"] = part["loss"]
    return found


def write(result: Result, folder: Path, name: str) -> None:
    """`NAME.json`, and `NAME.png` with the heat maps if there are any."""
    from train.evaluation.heatmap import draw  # Matplotlib takes long to import.

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if result["tasks"]:
        draw({"": result}, folder / f"{name}.png")
