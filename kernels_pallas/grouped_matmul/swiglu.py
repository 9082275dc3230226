"""The gate of SwiGLU, shared by the implementations, and SwiGLU through any grouped product."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.numerics import product


def gate(h1: jax.Array, h3: jax.Array) -> jax.Array:
    """silu(h1) h3."""
    return h1 * jax.nn.sigmoid(h1) * h3


def gate_gradients(h1: jax.Array, h3: jax.Array, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `gate` in h1 and h3, computed in float32."""
    h1, h3, d = (x.astype(jnp.float32) for x in (h1, h3, d_out))
    share = jax.nn.sigmoid(h1)
    d_h1 = d * h3 * share * (1 + h1 * (1 - share))
    return d_h1.astype(d_out.dtype), (d * h1 * share).astype(d_out.dtype)


def weighted(x: jax.Array, row_weights: jax.Array) -> jax.Array:
    """Rows [M, N] times their weights [M, 1], in x.dtype."""
    return (x.astype(jnp.float32) * row_weights.astype(jnp.float32)).astype(x.dtype)


def weighted_gate(h1: jax.Array, h3: jax.Array, row_weights: jax.Array) -> jax.Array:
    """`gate`, each row times its weight, computed in float32."""
    return weighted(gate(h1.astype(jnp.float32), h3.astype(jnp.float32)), row_weights).astype(
        h1.dtype
    )


def weight_gradients(h1: jax.Array, h3: jax.Array, d_out: jax.Array) -> jax.Array:
    """Gradient of `weighted_gate` in its weights [M, 1], in float32."""
    hidden = gate(h1.astype(jnp.float32), h3.astype(jnp.float32))
    return jnp.sum(d_out.astype(jnp.float32) * hidden, axis=1, keepdims=True)


def swiglu_through(grouped_product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`grouped_swiglu` by two grouped products; the gate is XLA's to fuse."""

    def grouped_swiglu(
        lhs: jax.Array,
        w1: jax.Array,
        w3: jax.Array,
        group_sizes: jax.Array,
        row_weights: jax.Array | None,
        row_align: int,
    ) -> jax.Array:
        h1, h3 = (product(grouped_product(lhs, w, group_sizes, row_align)) for w in (w1, w3))
        out = gate(h1.astype(jnp.float32), h3.astype(jnp.float32))
        return (out if row_weights is None else weighted(out, row_weights)).astype(lhs.dtype)

    return grouped_swiglu
