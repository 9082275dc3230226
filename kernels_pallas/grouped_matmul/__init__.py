"""Grouped matrix product: one weight matrix for each contiguous group of rows."""

from kernels_pallas.grouped_matmul.api import gains_by_align, grouped_matmul, grouped_swiglu

__all__ = ["gains_by_align", "grouped_matmul", "grouped_swiglu"]
