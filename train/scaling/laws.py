"""Power laws through the compute-efficient frontier of some runs, and MiniMax-01's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmjax.config import ModelConfig
from mmjax.plan.chips import CHIPS
from mmjax.plan.counts import device_work
from mmjax.plan.job import Job
from mmjax.sharding import MESH_AXES

# Through fewer of different compute a line says nothing: two have no residual.
LEAST_POINTS = 3
# FLOPs of a PFLOP/s-day, the paper's unit of compute.
PFLOPS_DAY = 1e15 * 86_400


class Point(NamedTuple):
    """One evaluation of one run: compute C in PFLOP/s-days, parameters N that a token meets
    (embedding and head aside), tokens D, held-out loss L in nats a token.
    """

    run: str
    compute: float
    parameters: int
    tokens: int
    loss: float


class Law(NamedTuple):
    """y = coefficient · C^exponent, and R² of the fit in logarithms (NaN for a published one)."""

    coefficient: float
    exponent: float
    r2: float = float("nan")

    def at(self, compute: np.ndarray) -> np.ndarray:
        """Its values."""
        return self.coefficient * compute**self.exponent


class Laws(NamedTuple):
    """L(C), N_opt(C) and D_opt(C)."""

    loss: Law
    parameters: Law
    tokens: Law


# MiniMax-01 (arXiv 2501.08313), table of the scaling laws: 70M to 7B parameters, up to 300B tokens.
PUBLISHED = {
    "softmax": Laws(Law(3.7087, -0.0798), Law(1.82e8, 0.7118), Law(2.56e10, 0.5102)),
    "lightning": Laws(Law(3.5391, -0.0768), Law(2.74e8, 0.6470), Law(4.43e10, 0.4684)),
    "hybrid": Laws(Law(3.4797, -0.0763), Law(2.57e8, 0.6670), Law(3.70e10, 0.4707)),
}


def train_flops_per_token(model: ModelConfig, length: int) -> float:
    """FLOPs that training needs for one token: what the products take, forward and backward.

    Three times the forward pass; recomputing and what kernels spend beyond the need do not count.

    Args:
      model: The architecture.
      length: Tokens of a row.
    """
    job = Job("train", model, 1, length)
    chip = next(iter(CHIPS.values()))  # Its tiles change what is spent, not what is needed.
    works = device_work(job, dict.fromkeys(MESH_AXES, 1), chip)
    return float(3 * sum(work.model for work in works)) / length


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one reaches with less compute, by compute; none whose loss is no
    number.
    """
    best: list[Point] = []
    finite = [point for point in points if np.isfinite(point.loss)]
    for point in sorted(finite, key=lambda p: (p.compute, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def fit(points: Sequence[Point]) -> Laws:
    """Least squares in logarithms through the frontier.

    Args:
      points: On the frontier, whose compute differs.

    Raises:
      ValueError: there are fewer than LEAST_POINTS.

    Source: MiniMax-01, section on scaling laws; Hoffmann et al. (arXiv 2203.15556), approach 1.
    """
    if len(points) < LEAST_POINTS:
        raise ValueError(f"a law needs {LEAST_POINTS} points on the frontier, got {len(points)}")
    compute = np.array([p.compute for p in points])
    return Laws(
        _power_law(compute, np.array([p.loss for p in points])),
        _power_law(compute, np.array([p.parameters for p in points], float)),
        _power_law(compute, np.array([p.tokens for p in points], float)),
    )


def _power_law(x: np.ndarray, y: np.ndarray) -> Law:
    log_x, log_y = np.log(x), np.log(y)
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    left = log_y - (exponent * log_x + intercept)
    spread = np.sum((log_y - log_y.mean()) ** 2)
    r2 = 1 - np.sum(left**2) / spread if spread else 1.0
    return Law(float(np.exp(intercept)), float(exponent), float(r2))
