"""The recurrence itself, one token at a time in float32: slow, obvious, the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lightning_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    initial_state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention` by its definition. Shapes as in the public function."""
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    keep = jnp.exp(-decay)[None, :, None, None]  # [1, H, 1, 1]

    def token(
        carry: tuple[jax.Array, jax.Array], x: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        state, last_id = carry  # [B, H, K, V], [B]
        q_t, k_t, v_t, id_t = x
        real = id_t != 0
        restart = real & (last_id != 0) & (id_t != last_id)
        entering = jnp.where(restart[:, None, None, None], 0, state)
        updated = keep * entering + k_t[..., :, None] * v_t[..., None, :]
        is_real = real[:, None, None, None]
        out = jnp.einsum("bhk,bhkv->bhv", q_t, updated, precision=jax.lax.Precision.HIGHEST)
        state = jnp.where(is_real, updated, state)
        return (state, jnp.where(real, id_t, last_id)), jnp.where(is_real[..., 0], out, 0)

    def by_token(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.astype(jnp.float32), 1, 0)

    carry = (initial_state, jnp.zeros(q.shape[0], jnp.int32))
    tokens = (by_token(q), by_token(k), by_token(v), segment_ids.T)
    (state, _), out = jax.lax.scan(token, carry, tokens)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), state
