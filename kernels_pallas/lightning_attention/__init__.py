"""Lightning attention: linear attention with one constant decay a head."""

from kernels_pallas.lightning_attention.api import (
    gated_lightning_step,
    lightning_attention,
    lightning_attention_step,
)

__all__ = ["gated_lightning_step", "lightning_attention", "lightning_attention_step"]
