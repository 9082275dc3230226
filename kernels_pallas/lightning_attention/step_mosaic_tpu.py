"""One decoding step of lightning attention on a pool of states, for TPUs, in Pallas.

The grid is (H / heads, B) and its last axis runs in order, so program and compile time are the same
for any batch. A table, prefetched to scalar memory, steers each row's block of the pool into VMEM
and back to where it came from: the pool is updated in place, each active entry is read and written
once, and the copies of neighbouring rows overlap.

An inactive row is steered to the entry of the active row before it (or, where there is none, of
the first active row). That block is in VMEM already, so nothing is copied for it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Long enough a copy to hide a grid step's fixed cost, small enough that a batch of one overlaps.
_BLOCK_BYTES = 2**20


def lightning_attention_step_mosaic_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    state: jax.Array,
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One token for each active row of a batch, on a pool of N states.

        S[slots[b]] = exp(-s) S[slots[b]] + k_b v_bᵀ,    o_b = q_b S[slots[b]]

    Args:
      q: Queries [B, H, K].
      k: Keys [B, H, K].
      v: Values [B, H, V].
      decay: s [H] float32.
      state: The pool [N, H, K, V] float32; donate it, and it is updated where it lies.
      slots: [B] int32, row b's entry in the pool; negative for an inactive row. Active rows must
        have different entries.

    Returns:
      out [B, H, V] in v.dtype, zeros for inactive rows; and the pool, its other entries untouched.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.2.
    """
    batch, total, key_dim = q.shape
    value_dim = v.shape[-1]
    heads = _heads(total, 4 * key_dim * value_dim)

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(batch, total // heads, heads, -1)

    def row(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, heads, dim), lambda h, b, *_: (b, h, 0, 0))

    pool = pl.BlockSpec(
        (None, heads, key_dim, value_dim), lambda h, b, active, entry: (entry[b], h, 0, 0)
    )
    size = batch * total * key_dim * value_dim
    out, state = pl.pallas_call(
        _kernel,
        out_shape=(
            jax.ShapeDtypeStruct((batch, total // heads, heads, value_dim), v.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(total // heads, batch),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                row(key_dim),
                row(key_dim),
                row(value_dim),
                pool,
            ],
            out_specs=(row(value_dim), pool),
        ),
        input_output_aliases={6: 1},  # The pool, counted behind the two tables.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=5 * size, bytes_accessed=8 * size, transcendentals=0),
        name="lightning_attention_step",
    )(*_tables(slots), jnp.exp(-decay), *map(blocks, (q, k, v)), state)
    return out.reshape(v.shape), state


def _heads(total: int, head_bytes: int) -> int:
    """Heads a block: as many as `_BLOCK_BYTES` has room for."""
    return max(
        n
        for n in range(1, total + 1)
        if total % n == 0 and n * head_bytes <= max(_BLOCK_BYTES, head_bytes)
    )


def _tables(slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows are active [B], and the entry that each row's block comes from [B]."""
    active = slots >= 0
    last_active = jax.lax.cummax(jnp.where(active, jnp.arange(slots.shape[0]), -1))
    source = jnp.where(last_active < 0, jnp.argmax(active), last_active)
    return active.astype(jnp.int32), jnp.maximum(slots[source], 0)


def _kernel(
    active: Any,  # [B] in scalar memory
    entry: Any,  # [B] in scalar memory, for the index maps
    keep: Any,  # [H] in scalar memory
    q: Any,  # [heads, K]
    k: Any,
    v: Any,  # [heads, V]
    old: Any,  # [heads, K, V]
    out: Any,  # [heads, V]
    new: Any,  # [heads, K, V]
) -> None:
    heads = new.shape[0]
    first_head, b = pl.program_id(0) * heads, pl.program_id(1)
    is_active = active[b] != 0

    @pl.when(is_active)
    def _step() -> None:
        # Columns, to broadcast along V; one row a head is too little work for the MXU.
        queries, keys = (x[...].astype(jnp.float32).T for x in (q, k))  # [K, heads]
        values = v[...].astype(jnp.float32)
        rows = []
        for h in range(heads):
            head = slice(h, h + 1)
            new[h] = keep[first_head + h] * old[h] + keys[:, head] * values[head]
            rows.append(jnp.sum(queries[:, head] * new[h], axis=0, keepdims=True))
        out[...] = jnp.concatenate(rows).astype(out.dtype)

    @pl.when(~is_active)
    def _skip() -> None:
        out[...] = jnp.zeros_like(out)

    # Rows before the first active one hold its block, as does everyone if none is active. It goes
    # back as it came unless a row changes it.
    @pl.when((b == 0) & ~is_active)
    def _keep() -> None:
        new[...] = old[...]
