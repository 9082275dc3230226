"""One token of lightning attention on Hopper, in place on a pool of states.

A block of threads serves some columns of one head of one row: TMA brings their state into shared
memory in parts, and each part goes back as soon as it is updated. The pool is read and written
once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import COLUMN, LOG2E, MATRIX, ROW, Ref, tiled

_PART = 64  # Rows of the state that are brought at a time, the least that a warp group holds.
_COLUMNS = 64  # Columns of the state a block of threads: six such blocks share a multiprocessor.


def why_not(key_dim: int, value_dim: int) -> str | None:
    """Why the kernel cannot take heads of these sizes; None where it can."""
    if key_dim % _PART or value_dim % _COLUMNS:
        return f"it needs K and V in multiples of {_PART}; got K = {key_dim}, V = {value_dim}"
    return None


@jax.jit
def lightning_attention_step_mosaic_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    state: jax.Array,
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention_step` with a table of slots, all of it given.

    Args:
      q: Queries [B, H, K].
      k: Keys [B, H, K].
      v: Values [B, H, V].
      decay: s [H] float32.
      state: Pool [N, H, K, V] float32; updated in place where the caller donates it.
      slots: [B] int32, the pool entry of each row; negative for a row that is idle.

    Returns:
      out [B, H, V] in v.dtype, zeros for idle rows, and the pool.
    """
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    pool = jax.new_ref(state)
    mesh = plgpu.Mesh(
        grid=(value_dim // _COLUMNS, heads, batch),
        grid_names=("columns", "head", "row"),
        num_threads=1,
        thread_name="warp_group",
    )

    def body(*refs: Ref) -> None:
        pl.run_scoped(
            functools.partial(_step, *refs),
            plgpu.SMEM((key_dim // _PART, _PART, _COLUMNS), jnp.float32, transforms=tiled(4)),
            plgpu.SMEM((_COLUMNS,), v.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=key_dim // _PART),
            collective_axes="warp_group",
        )

    out = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads, value_dim), v.dtype),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=4 * _COLUMNS * 4,
        ),
        name="lightning_attention_step",
    )(q, k, v, decay, slots, pool)
    return out, jax.freeze(pool)


def _step(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    decay_ref: Ref,
    slots_ref: Ref,
    pool_ref: Ref,
    out_ref: Ref,
    parts_smem: Ref,
    out_smem: Ref,
    loaded: Ref,
) -> None:
    head, row = lax.axis_index("head"), lax.axis_index("row")
    slot = slots_ref[row]
    parts, _, size = parts_smem.shape
    columns = pl.ds(lax.axis_index("columns") * size, size)

    def write(out: jax.Array) -> None:
        out_smem[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, head, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    zeros = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), COLUMN)
    pl.when(slot < 0)(lambda: write(zeros))

    @pl.when(slot >= 0)
    def _active() -> None:
        def rows(part: int) -> Ref:
            return pool_ref.at[slot, head, pl.ds(part * _PART, _PART), columns]

        for part in range(parts):
            plgpu.copy_gmem_to_smem(rows(part), parts_smem.at[part], loaded.at[part])
        keep = jnp.exp2(-LOG2E * decay_ref[head])

        def vector(ref: Ref, window: Any, layout: Any) -> jax.Array:
            x = plgpu.load(ref.at[row, head, window], layout=layout, optimized=False)
            return x.astype(jnp.float32)

        v = vector(v_ref, columns, COLUMN)
        shape = (_PART, size)
        out = zeros
        for part in range(parts):
            window = pl.ds(part * _PART, _PART)
            q, k = vector(q_ref, window, ROW), vector(k_ref, window, ROW)
            plgpu.barrier_wait(loaded.at[part])
            state = plgpu.load(parts_smem.at[part], layout=MATRIX)
            state = keep * state + lax.broadcast_in_dim(k, shape, [0]) * lax.broadcast_in_dim(
                v, shape, [1]
            )
            parts_smem.at[part][...] = state
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(parts_smem.at[part], rows(part))
            out += jnp.sum(lax.broadcast_in_dim(q, shape, [0]) * state, axis=0)
        write(out)
