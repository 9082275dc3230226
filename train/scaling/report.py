"""What a grid comes to: its laws, printed, written and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from train.scaling.grid import Run, points_of
from train.scaling.laws import PUBLISHED, Laws, Point, fit, frontier

_COLOURS = {"softmax": "C0", "lightning": "C1", "hybrid": "C2"}


def report(runs: list[Run], workdir: Path, console: Console) -> None:
    """Fits, prints and draws what the runs of a grid have left in its workdir."""
    points: dict[str, list[Point]] = {}
    for run in runs:
        points.setdefault(run.kind, []).extend(points_of(run, workdir))
    laws = {}
    for kind, some in points.items():
        try:
            laws[kind] = fit(frontier(some))
        except ValueError as error:
            console.print(f"{kind}: {error}; take more sizes, or a smaller evaluation.every")
    write(workdir, points, laws)
    console.print(table(laws))
    console.print(f"laws and points in {workdir}/scaling.json, picture in {workdir}/scaling.svg")


def write(workdir: Path, points: dict[str, list[Point]], laws: dict[str, Laws]) -> None:
    """scaling.json and scaling.svg."""
    found = {
        kind: {
            "laws": {
                name: law._asdict()
                for name, law in (laws[kind]._asdict() if kind in laws else {}).items()
            },
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
            texts = [f"{x.coefficient:.5g} C^{x.exponent:.4f}" for x in some]
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
        colour, best = _COLOURS[kind], frontier(some)
        for run in dict.fromkeys(point.run for point in some):
            line = [point for point in some if point.run == run]
            axis.plot(*_curve(line), color=colour, alpha=0.3, linewidth=1)
        axis.plot(*_curve(best), "o", color=colour, markersize=3)
        if kind in laws:
            law = laws[kind].loss
            ends = np.array([best[0].compute, best[-1].compute])
            name = f"{kind}: {law.coefficient:.3g} C^{law.exponent:.3f}"
            axis.plot(ends, law.at(ends), "--", color=colour, label=name)
    axis.set(
        xscale="log", yscale="log", xlabel="PFLOP/s-days", ylabel="held-out loss, nats a token"
    )
    axis.grid(alpha=0.3, which="both")
    if laws:
        axis.legend()
    figure.savefig(path)
    plt.close(figure)


def _curve(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.compute for point in points], [point.loss for point in points]
