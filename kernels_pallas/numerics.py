"""What XLA implementations share: contractions in their operands' precision, the online softmax."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"


def product(x: jax.Array) -> jax.Array:
    """x, marked as the result of a matrix product, which `jax.checkpoint` may be told to keep."""
    marked: jax.Array = checkpoint_name(x, PRODUCT)
    return marked


def fill_rows(x: jax.Array, multiple: int) -> jax.Array:
    """x [N, ...] with rows of zeros up to a multiple of so many."""
    missing = -x.shape[0] % multiple
    return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x


# Score of a key that a query does not see; its weight is set to zero besides.
MASKED = -1e30

type OnlineSoftmax = tuple[jax.Array, jax.Array, jax.Array]


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


def begin_softmax(shape: tuple[int, ...]) -> OnlineSoftmax:
    """Of queries [..., K] before any key: largest score, sum of weights, weighted sum."""
    rows = shape[:-1]
    return (
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def extend_softmax(
    so_far: OnlineSoftmax,
    scores: jax.Array,
    mask: jax.Array | None,
    weigh: Callable[[jax.Array], jax.Array],
) -> OnlineSoftmax:
    """Takes in scores [..., S] of further keys; weigh gives the sum [..., K] of their values.

    A query that sees none of them, by the mask, is left as it was, to the bit.
    """
    top, total, acc = so_far
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    new_top = jnp.maximum(top, scores.max(-1))
    weights = masked_exp(scores, new_top, mask)
    shrink = jnp.exp(top - new_top)
    acc = acc * shrink[..., None] + weigh(weights)
    return new_top, total * shrink + weights.sum(-1), acc


def masked_exp(scores: jax.Array, top: jax.Array, mask: jax.Array | None) -> jax.Array:
    """exp(scores - top) where visible, else 0; scores [..., S], top [...]."""
    weights = jnp.exp(scores - top[..., None])
    return weights if mask is None else jnp.where(mask, weights, 0)
