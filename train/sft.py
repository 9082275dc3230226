"""Supervised fine-tuning: chats, worked solutions or pictures; only the answers are predicted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from train import pictures
from train.config import JobConfig
from train.data.pipeline import make_stream, sample_texts
from train.evaluation.recall import recall_tokenizer
from train.job import Job
from train.language import fit
from train.tokenizing import job_tokenizer


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job.

    Args:
      cfg: With any data.source.
      workdir: Folder of the job.

    Raises:
      ConfigError: data that cannot be read, a solution that does not fit a row.
    """
    if cfg.data.source == "pictures":
        return pictures.run(cfg, workdir)
    if cfg.data.source == "recall":
        tokenizer = recall_tokenizer(cfg, workdir)
    elif cfg.data.source == "reasoning":
        from train.data.reasoning import worked_texts  # reasoning-gym takes seconds to import

        tokenizer = job_tokenizer(cfg, workdir, worked_texts(cfg))
    else:
        tokenizer = job_tokenizer(cfg, workdir, sample_texts(cfg.data))
    job = Job(cfg, workdir, tokenizer, cfg.steps)
    return fit(job, partial(make_stream, tokenizer=tokenizer))
