"""Grouped matrix product: one weight matrix for each contiguous group of rows."""

from kernels_pallas.grouped_matmul.api import grouped_matmul, grouped_swiglu

__all__ = ["grouped_matmul", "grouped_swiglu"]
