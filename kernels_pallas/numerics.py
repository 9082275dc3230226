"""Contractions whose precision follows the operands, shared by the XLA implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"


def product(x: jax.Array) -> jax.Array:
    """x, marked as the result of a matrix product, which `jax.checkpoint` may be told to keep."""
    marked: jax.Array = checkpoint_name(x, PRODUCT)
    return marked


def einsum32(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`jnp.einsum` with operands in `dtype` and a float32 result.

    float32 operands are contracted in true float32: TF32 and one-pass bf16, the defaults of
    GPUs and TPUs, would change results without a word.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        spec,
        a.astype(dtype),
        b.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
