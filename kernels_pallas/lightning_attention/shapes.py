"""The shapes that lightning attention is tuned and measured at."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Rows, tokens and heads; K = V = 128 in bf16, as in Text-01 and M1."""

    batch: int
    length: int
    heads: int


DIM = 128
# Text-01 has 64 heads; a device has 8 of them under tensor parallelism over 8.
LAYERS = tuple(
    Shape(1, length, heads)
    for heads, lengths in (
        (64, (8192, 32768, 131072, 524288)),
        (8, (16384, 65536, 262144, 524288)),
    )
    for length in lengths
)
# Rows of a decoding batch.
SLOTS = (1, 16, 64, 128, 256)


def decay_rates(heads: int, *, slowest: bool = False) -> list[float]:
    """The rates of Text-01's first layer: those of its first, or of its last, `heads` of 64."""
    rates = [2 ** (-8 * (h + 1) / 64) * (1 + 1e-5) for h in range(64)]
    return rates[-heads:] if slowest else rates[:heads]
