"""The definition, every token against every token in float32: quadratic, obvious, the oracle.

The recurrence itself would decay the state token by token, and rates near 1e-8 round away in
exp(-s); a decay over n tokens is exp(-s n) here.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.lightning_attention.clock import chunk_weights, read_clock
from kernels_pallas.numerics import einsum32


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
    start = jnp.zeros(q.shape[0], jnp.int32)
    w = chunk_weights(decay, read_clock(segment_ids), start, start)
    dot = partial(einsum32, dtype=jnp.dtype(jnp.float32))
    out = dot("bhij,bjhv->bihv", dot("bihk,bjhk->bhij", q, k) * w.within, v)
    out += dot("bhi,bihv->bihv", w.entering, dot("bihk,bhkv->bihv", q, initial_state))
    state = dot("bhj,bjhk->bjhk", w.leaving, k)
    state = dot("bjhk,bjhv->bhkv", state, v) + w.keep[..., None, None] * initial_state
    return out.astype(v.dtype), state
