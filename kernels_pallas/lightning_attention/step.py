"""One token of lightning attention in plain XLA, on a pool of states addressed by slots."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.numerics import fill_rows
from kernels_pallas.row_norm.reference import row_norm_reference

type _Step = Callable[..., tuple[jax.Array, jax.Array]]


def as_one_pool(
    state: jax.Array, slots: jax.Array, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """All layers' states [M, N, H, K, V] as one pool [M N, H, K, V], so that a step updates it
    where it lies, and in it the entries of a layer's slots, -1 for idle rows.
    """
    entries = jnp.where(slots >= 0, layer * state.shape[1] + slots, -1)
    return state.reshape(-1, *state.shape[2:]), entries


def gated_step_through(step: _Step) -> _Step:
    """`gated_lightning_step` by an implementation of `lightning_attention_step`."""

    def run(
        projected: jax.Array,
        decay: jax.Array,
        scale: jax.Array,
        state: jax.Array,
        slots: jax.Array,
        layer: jax.Array,
        *,
        eps: float,
        row_align: int,
    ) -> tuple[jax.Array, jax.Array]:
        rows, (heads, dim) = slots.size, state.shape[2:4]
        qkv, gate = jnp.split(projected[:rows], [3 * heads * dim], axis=1)
        q, k, v = jnp.moveaxis(jax.nn.silu(qkv).reshape(rows, heads, 3, dim), 2, 0)
        out, pool = step(q, k, v, decay, *as_one_pool(state, slots, layer))
        normed = row_norm_reference(out.reshape(rows, -1), scale, eps)
        return fill_rows(jax.nn.sigmoid(gate) * normed, row_align), pool.reshape(state.shape)

    return run


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
