"""`python -m train.scaling --config=configs/scaling_cpu.py`: the grid, its laws, their picture."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from train.errors import USER_ERRORS
from train.scaling.grid import check_kept, do, runs_of
from train.scaling.report import report

_CONFIG = config_flags.DEFINE_config_file("config", None, "A grid: configs/scaling_cpu.py.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/scaling", "Folder of the runs and the result.")


def main(argv: list[str]) -> None:
    """Runs what is not finished, then reports."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; a key is set by --config.KEY=VALUE")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    workdir = Path(str(_WORKDIR.value))
    console = Console()
    try:
        runs = runs_of(_CONFIG.value)
        check_kept(runs, workdir)
        for number, run in enumerate(runs, 1):
            console.rule(f"{number}/{len(runs)} {run.name}")
            job = do(run, workdir)
            if job is not None and job.stop_signal is not None:
                console.print("stopped with a checkpoint; run the same command to go on")
                sys.exit(128 + job.stop_signal)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    report(runs, workdir, console)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    flags.mark_flags_as_required(["config"])
    app.run(main)
