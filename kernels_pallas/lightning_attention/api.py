"""The surface of lightning attention: checks, dispatch, nothing else."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas import dispatch
from kernels_pallas.lightning_attention.chunked import lightning_attention_chunked
from kernels_pallas.lightning_attention.reference import lightning_attention_reference

_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "chunked": lightning_attention_chunked,
    "reference": lightning_attention_reference,
}


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay: Float32[Array, " H"],
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    initial_state: Float32[Array, "B H K V"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H K V"]]:
    """Causal linear attention with a constant decay for each head.

        S_t = exp(-s) S_{t-1} + k_t v_tᵀ,    o_t = q_t S_t

    with no 1/sqrt(K) and no normaliser. Differentiable in q, k, v and initial_state, the
    returned state included. Any T >= 1.

    Args:
      q: Queries [B, T, H, K].
      k: Keys [B, T, H, K].
      v: Values [B, T, H, V].
      decay: s [H] float32, the decay rate of each head per token, s >= 0.
      segment_ids: [B, T] int32. 0 is padding, which neither reads, writes nor decays the
        state; a change of id from one real token to the next restarts the state at zero.
      initial_state: [B, H, K, V] float32, belongs to the row's first segment.
      implementation: None for the best one on the arrays' platform, or "reference" | "chunked".

    Returns:
      out [B, T, H, V] in v.dtype, and the state [B, H, K, V] float32 after the last real token
      of each row.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
      ValueError: shapes that do not fit together.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.2, lightning attention.
    """
    _check_shapes(q, k, v, decay, segment_ids, initial_state)
    run = dispatch.resolve("lightning_attention", implementation, _IMPLEMENTATIONS)
    if initial_state is None:
        batch, _, heads, key_dim = q.shape
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), jnp.float32)
    return run(q, k, v, decay, segment_ids, initial_state)


def lightning_attention_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    decay: Float32[Array, " H"],
    state: Float32[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float32[Array, "B H K V"]]:
    """One token of `lightning_attention`, for decoding.

    Args:
      q: Queries [B, H, K].
      k: Keys [B, H, K].
      v: Values [B, H, V].
      decay: s [H] float32.
      state: [B, H, K, V] float32, the state before this token.

    Returns:
      out [B, H, V] in v.dtype, and the state after this token.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.2.
    """
    kv = k.astype(jnp.float32)[..., :, None] * v.astype(jnp.float32)[..., None, :]
    state = jnp.exp(-decay)[None, :, None, None] * state + kv
    # A product and a sum instead of a dot: one row a head is a matrix-vector product, which
    # this form fuses with the update above into one pass over the state.
    out = jnp.sum(q.astype(jnp.float32)[..., :, None] * state, axis=-2)
    return out.astype(v.dtype), state


def _check_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    initial_state: jax.Array | None,
) -> None:
    batch, length, heads, key_dim = q.shape
    if length < 1:
        raise ValueError("lightning_attention needs at least one token; got T = 0")
    expected = {
        "k": (k, q.shape),
        "v": (v, (batch, length, heads, v.shape[-1])),
        "decay": (decay, (heads,)),
        "segment_ids": (segment_ids, (batch, length)),
        "initial_state": (initial_state, (batch, heads, key_dim, v.shape[-1])),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"lightning_attention: {name} has shape {array.shape}, expected {shape} "
                f"for q of shape {q.shape}"
            )
