"""One token of lightning attention in plain XLA, on a pool of states addressed by slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lightning_attention_step_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    state: jax.Array,
    slots: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention_step`. Shapes as in the public function."""
    if slots is None:
        out, state = _advance(q, k, v, decay, state)
        return out.astype(v.dtype), state
    active = slots >= 0
    out, after = _advance(q, k, v, decay, state[jnp.maximum(slots, 0)])
    # Idle rows write past the end of the pool, which drops what they write.
    state = state.at[jnp.where(active, slots, state.shape[0])].set(after, mode="drop")
    return jnp.where(active[:, None, None], out, 0).astype(v.dtype), state


def _advance(
    q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kv = k.astype(jnp.float32)[..., :, None] * v.astype(jnp.float32)[..., None, :]
    state = jnp.exp(-decay)[None, :, None, None] * state + kv
    # Without the barrier the output is worked out from the old state once more, which then cannot
    # be updated in place.
    state = jax.lax.optimization_barrier(state)
    # A product and a sum instead of a dot: one row a head is a matrix-vector product, which
    # this form fuses with the update above into one pass over the state.
    return jnp.sum(q.astype(jnp.float32)[..., :, None] * state, axis=-2), state
