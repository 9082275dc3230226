"""Supervised fine-tuning: chats, worked solutions or pictures; only the answers are predicted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mmjax.tokenizer import Tokenizer
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
    tokenizer = data_tokenizer(cfg, workdir)
    job = Job(cfg, workdir, tokenizer, cfg.steps)
    return fit(job, partial(make_stream, tokenizer=tokenizer))


def data_tokenizer(cfg: JobConfig, workdir: Path) -> Tokenizer:
    """The tokenizer of a job, where need be one that is made for its data.

    Args:
      cfg: With any data.source but "pictures".
      workdir: Folder of the job.
    """
    if cfg.data.source == "recall":
        return recall_tokenizer(cfg, workdir)
    if cfg.data.source == "text":
        return job_tokenizer(cfg, workdir, sample_texts(cfg.data))
    from train.data.reasoning import worked_texts  # reasoning-gym takes seconds to import

    return job_tokenizer(cfg, workdir, worked_texts(cfg))
