"""Timing that tuner and benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

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


def torch_milliseconds(torch: Any, run: Callable[[], object], *, repeats: int) -> float:
    """`milliseconds` of a peer that runs in torch on a GPU, in groups of three calls."""
    run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 3)
    return statistics.median(times)
