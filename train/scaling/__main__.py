"""`python -m train.scaling --config=configs/scaling_cpu.py`: the grid, its laws, their picture."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from mmjax.config import ConfigError
from train.scaling.grid import do, points_of, runs_of
from train.scaling.laws import PUBLISHED, Laws, Point, fit, frontier

_CONFIG = config_flags.DEFINE_config_file("config", None, "A grid: configs/scaling_cpu.py.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/scaling", "Folder of the runs and the result.")
_COLOURS = {"softmax": "C0", "lightning": "C1", "hybrid": "C2"}


def main(argv: list[str]) -> None:
    """Runs what is not finished, fits, prints and draws."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; a key is set by --config.KEY=VALUE")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    workdir = Path(str(_WORKDIR.value))
    console = Console()
    try:
        runs = runs_of(_CONFIG.value)
        for number, run in enumerate(runs, 1):
            console.rule(f"{number}/{len(runs)} {run.name}")
            job = do(run, workdir)
            if job is not None and job.stop_signal is not None:
                console.print("stopped with a checkpoint; run the same command to go on")
                sys.exit(128 + job.stop_signal)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    points: dict[str, list[Point]] = {}
    for run in runs:
        points.setdefault(run.kind, []).extend(points_of(run, workdir))
    laws = {kind: fit(frontier(some)) for kind, some in points.items()}
    write(workdir, points, laws)
    console.print(table(laws))
    console.print(f"laws and points in {workdir}/scaling.json, picture in {workdir}/scaling.svg")


def write(workdir: Path, points: dict[str, list[Point]], laws: dict[str, Laws]) -> None:
    """scaling.json and scaling.svg."""
    found = {
        kind: {
            "laws": {name: law._asdict() for name, law in laws[kind]._asdict().items()},
            "points": [point._asdict() for point in some],
            "frontier": [point._asdict() for point in frontier(some)],
        }
        for kind, some in points.items()
    }
    (workdir / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(workdir / "scaling.svg", points, laws)


def table(laws: dict[str, Laws]) -> Table:
    """Ours beside the paper's; C in PFLOP/s-days."""
    view = Table("attention", "", "L(C)", "R²", "N_opt(C)", "D_opt(C)", title="power laws")
    for kind, ours in laws.items():
        for whose, some in (("here", ours), ("paper", PUBLISHED[kind])):
            texts = [f"{x.coefficient:.4g} C^{x.exponent:.4f}" for x in some]
            r2 = "" if np.isnan(some.loss.r2) else f"{some.loss.r2:.3f}"
            view.add_row(kind, whose, texts[0], r2, *texts[1:])
    return view


def draw(path: Path, points: dict[str, list[Point]], laws: dict[str, Laws]) -> None:
    """Every evaluation, the frontiers, and their laws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, some in points.items():
        colour, best, law = _COLOURS[kind], frontier(some), laws[kind].loss
        for run in dict.fromkeys(point.run for point in some):
            line = [point for point in some if point.run == run]
            axis.plot(*_curve(line), color=colour, alpha=0.3, linewidth=1)
        axis.plot(*_curve(best), "o", color=colour, markersize=3)
        ends = np.array([best[0].compute, best[-1].compute])
        name = f"{kind}: {law.coefficient:.3g} C^{law.exponent:.3f}"
        axis.plot(ends, law.at(ends), "--", color=colour, label=name)
    axis.set(
        xscale="log", yscale="log", xlabel="PFLOP/s-days", ylabel="held-out loss, nats a token"
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path)
    plt.close(figure)


def _curve(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.compute for point in points], [point.loss for point in points]


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    flags.mark_flags_as_required(["config"])
    app.run(main)
