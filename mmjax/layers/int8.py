"""Weight-only int8: matrices as signed bytes, with a scale for each of their columns."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_LARGEST = 127


class Int8Matrices(NamedTuple):
    """values [..., K, N] int8 and scale [..., 1, N] float32, whose product the matrices are.

    It has the parts of an array's interface that experts use.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        return self.values.shape

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """The matrices themselves."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def to_int8(matrices: jax.Array) -> Int8Matrices:
    """Rounds matrices [..., K, N] to the nearest of 255 values a column, zero among them.

    A column's largest entry is kept but for float32's rounding; an entry is off by at most 1/254 of
    it. A column of zeros stays so.
    """
    x = matrices.astype(jnp.float32)
    scale = jnp.abs(x).max(-2, keepdims=True) / _LARGEST
    values = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Int8Matrices(values, scale)
