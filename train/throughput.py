"""Tokens a second, FLOP/s and MFU of a training loop, from counted FLOPs."""

from __future__ import annotations

import functools
import time

from mmjax.config import ModelConfig
from mmjax.plan.chips import CHIPS, Number, chip_of
from mmjax.plan.counts import device_work
from mmjax.plan.job import Job
from mmjax.sharding import MESH_AXES


@functools.lru_cache(maxsize=32)
def model_flops(cfg: ModelConfig, rows: int, length: int) -> Number:
    """FLOPs that one update needs: three forward passes, whatever is recomputed.

    Softmax attention is counted causal over the whole row, as if it held one document.

    Args:
      cfg: The architecture.
      rows: Rows of a batch.
      length: Tokens of a row.
    """
    job = Job("train", cfg, rows, length)
    alone = dict.fromkeys(MESH_AXES, 1)
    return 3 * sum(work.model for work in device_work(job, alone, CHIPS["h200"]))


class Throughput:
    """Seconds of a step, tokens a second, FLOP/s and MFU, from the times between steps' starts.

    The loop fetches a step's metrics before it starts the next but one, so that steps start as
    often as the devices end them.

    Args:
      devices: Of the job.
      kind: As they call themselves; MFU is told of known ones alone.
    """

    def __init__(self, devices: int, kind: str) -> None:
        self._devices, self._chip = devices, chip_of(kind)
        self._shape: tuple[ModelConfig, int, int] | None = None
        self._laps, self._started = 0, 0.0

    def lap(self, cfg: ModelConfig, rows: int, length: int) -> dict[str, float]:
        """Figures of the last step, now that one of a batch of this shape begins.

        Nothing for the first step of a shape, whose time is the compiler's. Tokens are those of
        whole rows.
        """
        now, shape = time.perf_counter(), (cfg, rows, length)
        self._laps = self._laps + 1 if shape == self._shape else 0
        seconds, self._shape, self._started = now - self._started, shape, now
        if self._laps < 2:
            return {}
        flops = model_flops(cfg, rows, length) / seconds / self._devices
        told = {
            "seconds/step": seconds,
            "tokens_per_second/train": rows * length / seconds,
            "tflops": flops / 1e12,
        }
        return told if self._chip is None else told | {"mfu": flops / self._chip.flops}
