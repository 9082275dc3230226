"""Timing that tuner and benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax


def milliseconds(run: Callable[[], object], *, repeats: int = 7, calls: int = 5) -> float:
    """Median time of one call, over `repeats` groups of `calls` calls queued back to back."""
    out = jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = None  # Its memory is the next result's, where there is no room for two.
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3
