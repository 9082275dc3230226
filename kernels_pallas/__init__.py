"""Array kernels of the MiniMax-01 / M1 family. Arrays in, arrays out: no modules, no meshes."""

from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, listed_ffn
from kernels_pallas.lightning_attention import (
    gated_lightning_step,
    lightning_attention,
    lightning_attention_step,
)
from kernels_pallas.paged_attention import paged_attention, write_pages
from kernels_pallas.row_norm import add_norm_route, row_norm

__all__ = [
    "add_norm_route",
    "gated_lightning_step",
    "grouped_matmul",
    "grouped_swiglu",
    "lightning_attention",
    "lightning_attention_step",
    "listed_ffn",
    "paged_attention",
    "row_norm",
    "write_pages",
]
