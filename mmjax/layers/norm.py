"""RMSNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas import row_norm
from mmjax.layers import weights


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x²) + eps) · scale, with float32 statistics, cast down before the scale.

    A row of zeros has no direction; its gradient is taken to be zero. The formal one, 1/sqrt(eps)
    a norm, overflows to NaN over the depth of a post-norm stack.

    Source: the released modeling_minimax_m1.py.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    x32 = jnp.where(mean_square > 0, x32, 0)
    normed = (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normed * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale."""

    def __init__(self, size: int, axis: str | None, eps: float, dtype: str) -> None:
        self.scale = weights.ones((size,), (axis,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Norms the last axis."""
        return rms_norm(x, self.scale[...], self.eps)

    def of_step(self, x: Float[Array, "B D"], row_align: int = 1) -> Float[Array, "R D"]:
        """Norms the rows of a decode step on one device, without a gradient.

        Rows of zeros fill them up to a multiple of row_align.
        """
        return row_norm(x, self.scale[...], self.eps, row_align=row_align)
