"""Causal softmax attention of rows to themselves by cuDNN's fused kernels, where they apply.

cuDNN has a forward and a backward that never write scores to memory, for bf16 on GPUs, and knows
rows that are one document with padding behind it. Rows of several documents, which only a batch
tells, get a mask, or go through `mmjax.layers.softmax` where the mask would take too much memory;
in the same program: `lax.cond` runs one of the two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import dispatch
from mmjax.layers.softmax import DENSE_SCORES, softmax_attention

# The largest head of cuDNN's backward on every GPU that has the kernels.
_MAX_HEAD = 128
# The largest mask of documents, in bytes as cuDNN reads it: 8 rows of 8K tokens, 2 of 16K.
_MOST_MASK = 1 << 30
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
    mask_bytes = q.dtype.itemsize * segment_ids.size * segment_ids.shape[1]

    def packed() -> jax.Array:
        return _masked(q, k, v, segment_ids) if mask_bytes <= _MOST_MASK else in_blocks()

    return jax.lax.cond(whole, lambda: _fused(q, k, v, lengths), packed)


def why_not(q: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why cuDNN cannot take these queries, or would gain nothing; None where it can."""
    target = dispatch.target(q if isinstance(q, jax.Array) else None)
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
    q, k, v = (_keep(x, real) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return _keep(out, real)


def _masked(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    real = segment_ids != 0
    same = (segment_ids[:, :, None] == segment_ids[:, None]) & real[:, None]
    q, k, v = (_keep(x, real) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, mask=same[:, None], is_causal=True, implementation="cudnn"
    )
    return _keep(out, real)


def _keep(x: jax.Array, real: jax.Array) -> jax.Array:
    """Zeros for padding, whatever the kernel leaves there, forward and backward."""
    return jnp.where(real[:, :, None, None], x, 0)
