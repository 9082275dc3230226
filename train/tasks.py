"""The three tasks by name."""

from __future__ import annotations

from pathlib import Path

from train import cispo, pretrain, sft
from train.config import JobConfig
from train.job import Job

_TASKS = {"pretrain": pretrain.run, "sft": sft.run, "cispo": cispo.run}


def run_task(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job that the config names.

    Args:
      cfg: From `train.config.build`.
      workdir: Folder of the job.
    """
    return _TASKS[cfg.task](cfg, workdir)
