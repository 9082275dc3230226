"""What the kernels compute, step by step in XLA."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.numerics import fill_rows


class Routed(NamedTuple):
    """Rows [N, D] after a residual sum, its norm, and where their tokens go.

    total [N, D]: the sum; normed [N', D]: its norm, filled up with rows of zeros; logits [N, E]
    float32: the router's; share [N, k]: of each chosen expert, summing to 1 over k; expert [N, k]
    int32, E for idle rows.
    """

    total: jax.Array
    normed: jax.Array
    logits: jax.Array
    share: jax.Array
    expert: jax.Array


def row_norm_reference(
    x: jax.Array, scale: jax.Array, eps: float, *, row_align: int = 1
) -> jax.Array:
    """`row_norm`. Shapes as in the public function."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    x32 = jnp.where(mean_square > 0, x32, 0)
    normed = (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return fill_rows(normed * scale.astype(x.dtype)[None], row_align)


def add_norm_route_reference(
    x: jax.Array,
    out: jax.Array,
    scale: jax.Array,
    router: jax.Array,
    real: jax.Array,
    *,
    scales: tuple[float, float],
    eps: float,
    top_k: int,
    row_align: int,
) -> Routed:
    """`add_norm_route`. Shapes as in the public function."""
    alpha, beta = scales
    if out.ndim == 3:
        out = out.sum(0).astype(x.dtype)
    x, out = (rows[: real.size] for rows in (x, out))
    total = alpha * x + beta * out
    normed = row_norm_reference(total, scale, eps)
    logits = (normed[:, :, None].astype(jnp.float32) * router[None]).sum(1)
    top, expert = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    share = (top / top.sum(-1, keepdims=True)).astype(x.dtype)
    expert = jnp.where(real[:, None], expert.astype(jnp.int32), router.shape[1])
    return Routed(total, fill_rows(normed, row_align), logits, share, expert)
