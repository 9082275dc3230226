"""Metrics to TensorBoard, to metrics.jsonl, and to one live line on the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class Metrics:
    """Writes the metrics of one job; a resumed job goes on where its checkpoint stood.

    Args:
      workdir: Folder of the job.
      task: Name on the progress line.
      start: Step of the checkpoint that the job resumes from; later lines of metrics.jsonl,
        which the killed run wrote past its last checkpoint, are taken out.
      steps: Of the whole job.
      silent: Keep the history, but write and show nothing: for all processes but one.
    """

    def __init__(
        self, workdir: Path, task: str, start: int, steps: int, *, silent: bool = False
    ) -> None:
        path = Path(os.devnull) if silent else workdir / "metrics.jsonl"
        self.history = [m for m in read_metrics(workdir) if m["step"] <= start]
        if not silent:
            replacement = path.with_suffix(".tmp")
            replacement.write_text("".join(json.dumps(m) + "\n" for m in self.history))
            os.replace(replacement, path)
        self._file = path.open("a")
        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start + 1, write_to_disk=not silent
        )
        self.console = Console(stderr=True, quiet=silent)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
            disable=not sys.stderr.isatty(),
        )
        self._task = task
        self._bar = self._progress.add_task(task, total=steps, completed=start, metrics="")

    def __enter__(self) -> Metrics:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()
        self._board.close()

    def stage(self, name: str, told: str) -> None:
        """Says which stage begins or goes on, and names it on the progress line."""
        self.console.print(told, highlight=False, soft_wrap=True)
        self._progress.update(self._bar, description=f"{self._task} {name}")

    def log(self, step: int, values: Mapping[str, float], *, show: bool = True) -> None:
        """Records the values of one step."""
        record = {"step": step, **{k: float(v) for k, v in values.items()}}
        self.history.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)
        line = "  ".join(f"{k} {float(v):.4g}" for k, v in values.items())
        self._progress.update(self._bar, completed=step, metrics=line)
        if show and not sys.stderr.isatty():
            self.console.print(f"step {step}  {line}", highlight=False, soft_wrap=True)


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl so far; a line cut short by a kill is dropped."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
