"""The tasks by name."""

from __future__ import annotations

import importlib
from pathlib import Path

from train.config import JobConfig
from train.job import Job


def run_task(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job that the config names.

    Args:
      cfg: From `train.config.build`.
      workdir: Folder of the job.
    """
    # Only the module that is needed: reasoning-gym takes seconds to import.
    job: Job = importlib.import_module(f"train.{cfg.task}").run(cfg, workdir)
    return job
