"""`python -m train.demo`: fine-tune a tiny M1, reinforce it, show what it learned.

Runs `configs/demo.py:sft`, then `configs/demo.py:cispo`, each resumable, and writes to the
workdir: learning_curve.png, transcripts.md, summary.json, the Orbax checkpoints of both jobs and
the reinforced model as a safetensors folder, from which `mmjax generate` then answers a held-out
question.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

import mmjax
from mmjax.sharding import make_mesh
from mmjax.tokenizer import Tokenizer
from train.allocator import keep_freed_memory
from train.config import JobConfig, build
from train.data.reasoning import Problem, ReasoningProblems, split_problems
from train.metrics import read_metrics
from train.rollout import Group, Sampler, accuracy, evaluate, texts_of
from train.tasks import run_task

_CONFIG = Path(__file__).parent.parent / "configs" / "demo.py"
_TRANSCRIPTS = 6


def run(workdir: Path, seed: int, overrides: dict[str, object] | None = None) -> dict[str, float]:
    """Both jobs and all that the demo shows.

    Args:
      workdir: Where everything goes.
      seed: Of both jobs.
      overrides: Dotted config keys of either stage, for tests.

    Returns:
      Greedy accuracy on held-out problems before and after, and the seconds that each part took.
    """
    console = Console()
    started = time.perf_counter()
    sft = _job("sft", seed, workdir, overrides)
    console.rule("1. supervised fine-tuning on solutions with and without thinking")
    _finish(run_task(sft, workdir / "sft").stop_signal)
    sft_seconds = time.perf_counter() - started
    cispo = _job("cispo", seed, workdir, overrides)
    console.rule("2. reinforcement with CISPO")
    _finish(run_task(cispo, workdir / "cispo").stop_signal)
    cispo_seconds = time.perf_counter() - started - sft_seconds

    console.rule("3. before and after, on problems that neither job has seen")
    train_problems, held_out = split_problems(
        cispo.data.tasks, cispo.data.size, cispo.cispo.eval_problems, cispo.seed, cispo.rewards
    )
    common = train_problems.texts & held_out.texts
    assert not common, f"held-out problems among the training ones: {sorted(common)[:3]}"
    before = _answers(workdir / "sft" / "model", held_out, cispo)
    after = _answers(workdir / "cispo" / "model", held_out, cispo)
    summary = {
        "seed": float(seed),
        "accuracy_after_sft": accuracy(before),
        "accuracy_after_cispo": accuracy(after),
        "held_out_problems": float(len(held_out)),
        "length_after_sft": float(np.mean([g.lengths for g in before])),
        "length_after_cispo": float(np.mean([g.lengths for g in after])),
        "sft_seconds": sft_seconds,
        "cispo_seconds": cispo_seconds,
        "total_seconds": time.perf_counter() - started,
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    tokenizer = Tokenizer.load(workdir / "sft" / "model")
    _write_transcripts(workdir / "transcripts.md", list(held_out), before, after, tokenizer)
    draw_curve(workdir)
    console.print(_table(summary))
    console.print(f"curve {workdir}/learning_curve.png, transcripts {workdir}/transcripts.md")
    console.print(f"checkpoints {workdir}/cispo/checkpoints, model folder {workdir}/cispo/model")

    console.rule("4. the exported folder, loaded again")
    command = ["generate", str(workdir / "cispo" / "model"), "--temperature", "0"]
    command += ["--max-tokens", str(cispo.cispo.max_new_tokens), "--prompt", held_out[0].question]
    console.print("mmjax " + " ".join(command[:-1]) + f" {held_out[0].question!r}", soft_wrap=True)
    subprocess.run([sys.executable, "-m", "mmjax.cli", *command], check=True)
    return summary


def draw_curve(workdir: Path) -> None:
    """Reward, held-out accuracy and length over the CISPO job, to learning_curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(workdir / "cispo")
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    top.plot([r["step"] for r in records], [r["reward"] for r in records], label="reward, sampled")
    evaluated = [(r["step"], r["eval/accuracy"]) for r in records if "eval/accuracy" in r]
    start = [(0.0, r["eval/initial_accuracy"]) for r in records if "eval/initial_accuracy" in r]
    top.plot(*zip(*(start + evaluated), strict=True), "o-", label="held-out accuracy, greedy")
    top.set(ylim=(0, 1.02), ylabel="share right", title="A tiny M1 reinforced with CISPO")
    top.legend(loc="lower right")
    bottom.plot([r["step"] for r in records], [r["length"] for r in records], color="C2")
    bottom.set(xlabel="rollout batch", ylabel="tokens a completion")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(workdir / "learning_curve.png", dpi=110)
    plt.close(figure)


def _job(stage: str, seed: int, workdir: Path, overrides: dict[str, object] | None) -> JobConfig:
    # By its path, as the --config flag does: train imports nothing of configs.
    config: ConfigDict = runpy.run_path(str(_CONFIG))["get_config"](stage)
    config.seed = seed
    if stage == "cispo":
        config.init_from = str(workdir / "sft" / "model")
    config.update_from_flattened_dict(overrides or {})
    return build(config)


def _finish(stop_signal: int | None) -> None:
    if stop_signal is not None:
        sys.exit(128 + stop_signal)


def _answers(folder: Path, problems: ReasoningProblems, cfg: JobConfig) -> list[Group]:
    """Greedy completions of all problems by the model in a folder."""
    mesh = make_mesh(devices=jax.devices()[:1])
    tokenizer = Tokenizer.load(folder)
    sampler = Sampler(mmjax.load(folder), tokenizer, cfg, mesh)
    return evaluate(sampler, tokenizer, problems, cfg.sampling, cfg.cispo.max_new_tokens)


def _write_transcripts(
    path: Path,
    problems: Sequence[Problem],
    before: Sequence[Group],
    after: Sequence[Group],
    tokenizer: Tokenizer,
) -> None:
    """Problems that reinforcement won first, then the others in order."""
    gained = np.array([b.rewards[0] - a.rewards[0] for a, b in zip(before, after, strict=True)])
    lines = ["# Before and after CISPO, greedy, held-out problems\n"]
    for i in np.argsort(-gained, kind="stable")[:_TRANSCRIPTS]:
        lines.append(f"## {problems[i].question}\n\nright answer: {problems[i].answer}\n")
        for name, side in (("fine-tuned", before[i]), ("reinforced", after[i])):
            mark = "right" if side.rewards[0] else "wrong"
            (text,) = texts_of(side, tokenizer)
            lines.append(f"{name} ({mark}):\n\n```\n{text}\n```\n")
    path.write_text("\n".join(lines))


def _table(summary: dict[str, float]) -> Table:
    table = Table("", "fine-tuned", "reinforced")
    for name, key, form in (("greedy accuracy", "accuracy", ".3f"), ("tokens", "length", ".1f")):
        values = (summary[f"{key}_after_sft"], summary[f"{key}_after_cispo"])
        table.add_row(name, *(format(v, form) for v in values))
    table.add_row("seconds", *(f"{summary[f'{s}_seconds']:.0f}" for s in ("sft", "cispo")))
    return table


def main(argv: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Fine-tune and reinforce a tiny M1.")
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    summary = run(args.workdir, args.seed)
    print(f"done in {summary['total_seconds']:.0f} s")


if __name__ == "__main__":
    main()
