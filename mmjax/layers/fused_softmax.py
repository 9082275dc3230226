"""Causal softmax attention of rows to themselves by cuDNN's fused kernels, where they apply.

cuDNN has a forward and a backward that never write scores to memory, for bf16 on GPUs, and knows
rows that are one document with padding behind it. Rows of several documents, which only a batch
tells, go through `mmjax.layers.softmax` in the same program: `lax.cond` runs one of the two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import dispatch
from mmjax.layers.softmax import DENSE_SCORES, softmax_attention

# The largest head of cuDNN's backward on every GPU that has the kernels.
_MAX_HEAD = 128
# What a policy of `jax.checkpoint` may keep, so that a backward does not attend again.
PRIMITIVE = "dot_product_attention_fwd"


def self_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    index: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"] | None,
) -> Float[Array, "B T H K"]:
    """softmax(q kᵀ / sqrt(K)) v of a sequence to itself, causal within segments.

    Args:
      q: Queries [B, T, H, K].
      k: Keys [B, T, G, K], G dividing H.
      v: Values [B, T, G, K].
      index: Place of each query in its row [B, T]; -1 for padding.
      segment_ids: [B, T], 0 for padding; None where all tokens are of one segment.

    Returns:
      [B, T, H, K] in v.dtype; zeros for padding.
    """

    def in_blocks() -> jax.Array:
        return softmax_attention(
            q, k, v, index, query_segments=segment_ids, key_segments=segment_ids
        )

    if why_not(q) is not None:
        return in_blocks()
    if segment_ids is None:
        return _fused(q, k, v, None)
    whole, lengths = _one_document(segment_ids)
    return jax.lax.cond(whole, lambda: _fused(q, k, v, lengths), in_blocks)


def why_not(q: jax.Array) -> str | None:
    """Why cuDNN cannot take these queries, or would gain nothing; None where it can."""
    target = dispatch.target(q)
    length, dim = q.shape[1], q.shape[3]
    if target.platform != "gpu":
        return f"it needs a GPU; the arrays are on {target}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if dim > _MAX_HEAD or dim % 8:
        return f"heads of {dim}; it takes multiples of 8 up to {_MAX_HEAD}"
    if length * length <= DENSE_SCORES:
        return f"{length} tokens are few enough for all scores at once"
    return None


def _one_document(segment_ids: jax.Array) -> tuple[Bool[Array, ""], Int32[Array, " B"]]:
    """Whether every row is one document from its first token on; its tokens."""
    real = segment_ids != 0
    same = (segment_ids == segment_ids[:, :1]) & real
    lengths = jnp.sum(same, axis=1, dtype=jnp.int32)
    front = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return (same == real).all() & (front == real).all() & (lengths > 0).all(), lengths


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    if lengths is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    real = jnp.arange(q.shape[1], dtype=jnp.int32)[None] < lengths[:, None]

    def keep(x: jax.Array) -> jax.Array:
        """Zeros for padding, whatever the kernel leaves there, forward and backward."""
        return jnp.where(real[:, :, None, None], x, 0)

    out = jax.nn.dot_product_attention(
        keep(q),
        keep(k),
        keep(v),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return keep(out)
