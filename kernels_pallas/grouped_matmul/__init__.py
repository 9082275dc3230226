"""Grouped matrix product: one weight matrix for each contiguous group of rows."""

from kernels_pallas.grouped_matmul.api import (
    LISTED_ALIGN,
    LISTED_ROWS,
    gains_by_align,
    grouped_matmul,
    grouped_swiglu,
    listed_ffn,
)

__all__ = [
    "LISTED_ALIGN",
    "LISTED_ROWS",
    "gains_by_align",
    "grouped_matmul",
    "grouped_swiglu",
    "listed_ffn",
]
