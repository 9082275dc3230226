"""Tokens a second, FLOP/s and MFU of a training loop, from counted FLOPs."""

from __future__ import annotations

from mmjax.config import ModelConfig
from mmjax.plan.chips import CHIPS, Number
from mmjax.plan.counts import device_work
from mmjax.plan.job import Job
from mmjax.sharding import MESH_AXES


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
