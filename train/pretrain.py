"""Pre-training: documents → packed rows → next-token prediction."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from train.config import JobConfig
from train.data.pipeline import make_stream
from train.data.text import read_documents
from train.job import Job
from train.language import fit
from train.tokenizing import job_tokenizer


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job.

    Args:
      cfg: With data.source "text".
      workdir: Folder of the job.
    """
    tokenizer = job_tokenizer(cfg, workdir, read_documents(cfg.data.paths))
    job = Job(cfg, workdir, tokenizer, cfg.steps)
    return fit(job, partial(make_stream, tokenizer=tokenizer))
