"""The shapes that the grouped product is tuned and measured at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """lhs [rows, inner] and matrices [groups, inner, columns], in bf16 as in Text-01 and M1."""

    rows: int
    inner: int
    columns: int
    groups: int


WIDTH, FFN, EXPERTS, TOP_K = 6144, 9216, 32, 2
# The up- and down-projections of Text-01 for 32,768 tokens.
LAYERS = (Shape(65536, WIDTH, FFN, EXPERTS), Shape(65536, FFN, WIDTH, EXPERTS))
# Token-slots of a decoding batch of 1 to 256 sequences.
DECODING = tuple(Shape(rows, WIDTH, FFN, EXPERTS) for rows in (2, 16, 128, 512))


def balanced(shape: Shape) -> np.ndarray:
    """As many rows for each group."""
    return np.full(shape.groups, shape.rows // shape.groups, np.int32)


def skewed(shape: Shape) -> np.ndarray:
    """One group with a third of the rows, four with none, the rest by chance."""
    rng = np.random.default_rng(0)
    sizes = np.zeros(shape.groups, np.int64)
    largest, *others = rng.permutation(shape.groups)[4:]
    sizes[largest] = shape.rows // 3
    sizes[others] = rng.multinomial(
        shape.rows - sizes[largest], np.full(len(others), 1 / len(others))
    )
    return sizes.astype(np.int32)


def by_chance(shape: Shape) -> np.ndarray:
    """Every row in a group drawn at random, as in decoding."""
    chances = np.full(shape.groups, 1 / shape.groups)
    return np.random.default_rng(shape.rows).multinomial(shape.rows, chances).astype(np.int32)
