"""Supervised fine-tuning on the synthetic tasks."""

from __future__ import annotations

from pathlib import Path

from train.config import JobConfig
from train.evaluation.examples import RecallExamples
from train.evaluation.lexicon import word_tokenizer
from train.evaluation.loop import suite_of
from train.job import Job
from train.language import fit
from train.tokenizing import job_tokenizer


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job.

    Args:
      cfg: With data.source "recall".
      workdir: Folder of the job.
    """
    given = (workdir / "tokenizer.json").exists() or cfg.data.tokenizer or cfg.init_from
    tokenizer = job_tokenizer(cfg, workdir, ()) if given else word_tokenizer()
    suite = suite_of(cfg, tokenizer)
    examples = RecallExamples(
        cfg.data, tokenizer, cfg.seed, suite.prompts if suite else frozenset()
    )
    job = Job(cfg, workdir, tokenizer, cfg.steps)
    return fit(job, job.packed_batches(examples))
