"""Softmax attention over keys and values in pages."""

from kernels_pallas.paged_attention.api import paged_attention, write_pages

__all__ = ["paged_attention", "write_pages"]
