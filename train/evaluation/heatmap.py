"""Heat maps: share of right answers by depth and length, models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(results: Mapping[str, Mapping[str, Any]], path: Path, *, trained: int = 0) -> None:
    """One row of maps a task, one column a model; tasks without a depth are maps of one row.

    Args:
      results: Of each model by its name, as `train.evaluation.loop.evaluate` returns them.
      path: Of the picture, .png or .svg.
      trained: Longest length of the training, marked in the maps; 0 for no mark.
    """
    tasks = list(next(iter(results.values()))["tasks"])
    tables = [[result["tasks"][task] for result in results.values()] for task in tasks]
    heights = [1.2 + 0.32 * len(row[0]["depths"]) for row in tables]
    width = 1.4 + 0.62 * len(tables[0][0]["lengths"])
    figure, axes = plt.subplots(
        len(tasks),
        len(results),
        figsize=(width * len(results), sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for row, task in enumerate(tasks):
        for column, name in enumerate(results):
            axis = axes[row][column]
            _map(axis, tables[row][column], trained)
            axis.set_title(f"{name}\n{task}" if name else task, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _map(axis: Axes, table: Mapping[str, Any], trained: int) -> None:
    lengths, depths, accuracy = table["lengths"], table["depths"], table["accuracy"]
    axis.imshow(accuracy, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths], fontsize=8)
    shown = ["any" if d is None else f"{d:.0%}" for d in depths]
    axis.set_yticks(range(len(depths)), shown, fontsize=8)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel("depth", fontsize=8)
    for y, row in enumerate(accuracy):
        for x, share in enumerate(row):
            axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    beyond = [i for i, length in enumerate(lengths) if trained and length > trained]
    if beyond and beyond[0]:
        axis.axvline(beyond[0] - 0.5, color="black", linewidth=1.5)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
