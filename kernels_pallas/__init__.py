"""Array kernels of the MiniMax-01 / M1 family. Arrays in, arrays out: no modules, no meshes."""

from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, listed_ffn
from kernels_pallas.lightning_attention import lightning_attention, lightning_attention_step
from kernels_pallas.paged_attention import paged_attention, write_pages

__all__ = [
    "grouped_matmul",
    "grouped_swiglu",
    "lightning_attention",
    "lightning_attention_step",
    "listed_ffn",
    "paged_attention",
    "write_pages",
]
